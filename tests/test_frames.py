"""Several times in one video: a time a frame where the network takes its time by tokens, else a sentence."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten import ConfigError, Sampling, denoiser, even, guided, predict, sample
from hasten.models.diffusers import PipelineDenoiser
from hasten.models.probe import record
from hasten.models.template import Time, check_frames, conditions
from tests.pipelines import FAMILIES
from tests.pipelines_more import EXOTIC


@cache
def video() -> tuple[Any, PipelineDenoiser, dict[str, Tensor]]:
    """A pipeline of Wan 2.2 5B's kind, three frames of 4 x 2 positions and so 2 tokens each, and two conditions."""
    pipe, call = EXOTIC["wan22_5b"]()
    net = denoiser(pipe, {**call, "height": 64, "width": 32})
    look = record(pipe, {**net.found.call, **net.found.quiet}, 2, stop=0).looks[-1]
    return pipe, net, {k: torch.cat([v, v]) for k, v in conditions(net.templates[net.shape], look).items()}


def noise(net: PipelineDenoiser, seed: int = 0) -> Tensor:
    return torch.randn(2, *net.shape, generator=torch.Generator().manual_seed(seed))


T = torch.tensor([[0.9, 0.5, 0.2], [0.1, 0.6, 0.8]])


def test_every_token_has_the_time_of_its_frame_as_the_pipeline_lays_them_out() -> None:
    """diffusers flattens a mask [F, h, w] of its patches times t, where the first frame is given."""
    pipe, net, cond = video()
    seen: list[Tensor] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True
    )
    with torch.no_grad():
        pred = net(noise(net), T, cond)
        flat = (torch.ones(2, 3, 2, 1) * net.found.dial(T.double())[:, :, None, None]).flatten(1)  # [B, F, h, w]
    handle.remove()
    assert seen[0].shape == (2, 6) and torch.allclose(seen[0].double(), flat, rtol=1e-5)
    node = net.templates[net.shape]["timestep"]
    assert isinstance(node, Time) and node.slope.shape == (1, 6) and pred.shape == noise(net).shape


@torch.no_grad()
def test_equal_times_of_all_frames_are_a_time_a_sample() -> None:
    _, net, cond = video()
    t = torch.tensor([0.7, 0.3])
    assert torch.equal(net(noise(net), t, cond), net(noise(net), t[:, None].expand(2, 3), cond))


@torch.no_grad()
def test_a_frame_follows_its_own_time_most() -> None:
    _, net, cond = video()
    x, before = noise(net), net(noise(net), T, cond)
    for frame in range(3):
        other = T.clone()
        other[:, frame] = 1 - other[:, frame]
        change = (net(x, other, cond) - before).square().mean((0, 1, 3, 4))
        assert int(change.argmax()) == frame and change.min() > 0


@torch.no_grad()
def test_the_cores_calls_take_a_time_a_frame() -> None:
    _, net, cond = video()
    x0, eps = noise(net, 1), noise(net, 2)
    x_t = net.path.mix(x0, eps, T)
    assert torch.allclose(x_t[1, :, 2], 0.2 * x0[1, :, 2] + 0.8 * eps[1, :, 2], atol=1e-6)
    clean = predict(net, x_t, T, cond)
    velocity = net(x_t, T, cond)
    assert torch.allclose(clean[0, :, 1], (x_t - 0.5 * velocity)[0, :, 1], atol=1e-5)
    uncond = net.null(cond)
    both = [guided(net, x_t, T, cond, uncond, 3.0, "velocity", two_calls=two) for two in (False, True)]
    assert torch.allclose(*both, atol=1e-4)
    assert sample(net, eps, cond, Sampling(even(2))).isfinite().all()


def test_training_with_independent_times_of_frames_lowers_its_loss() -> None:
    """Diffusion forcing (Chen et al. 2024): every frame has its own noise level."""
    pipe, call = EXOTIC["wan22_5b"]()
    net, (_, _, cond) = denoiser(pipe, {**call, "height": 64, "width": 32}), video()
    net.requires_grad_(True)
    opt = torch.optim.Adam(net.parameters(), 3e-3)
    x0, generator = 0.5 * noise(net, 1), torch.Generator().manual_seed(3)
    eps = [torch.randn(x0.shape, generator=generator) for _ in range(4)]
    times = [torch.rand(2, 3, generator=generator) for _ in range(4)]

    def loss(k: int) -> Tensor:
        x_t = net.path.mix(x0, eps[k], times[k])
        return (net(x_t, times[k], cond) - net.path.target(x0, eps[k], times[k], net.kind)).square().mean()

    with torch.no_grad():
        before = sum(float(loss(k)) for k in range(4))
    for step in range(12):
        opt.zero_grad()
        loss(step % 4).backward()
        opt.step()
    with torch.no_grad():
        assert sum(float(loss(k)) for k in range(4)) < 0.9 * before


@pytest.mark.parametrize("shape", [(2, 4), (1, 3), (2, 3, 1)], ids=str)
def test_times_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    _, net, cond = video()
    with pytest.raises(ConfigError, match=r"give t as \[2\] or, a time a frame, \[2, 3\], not"):
        net(noise(net), torch.full(shape, 0.5), cond)


@pytest.mark.parametrize("family", ["wan", "ltx", "sd3"])
def test_a_network_with_one_time_a_sample_says_so(family: str) -> None:
    pipe, call = FAMILIES[family]()
    net = denoiser(pipe, call)
    name = type(pipe.transformer).__name__
    with pytest.raises(ConfigError, match=rf"{name} takes one time for a whole sample; give t as \[B\], not \[1, 3\]"):
        net(torch.randn(1, *net.shape), torch.full((1, 3), 0.5), {})


def test_tokens_of_several_frames_are_refused() -> None:
    node = Time(torch.ones(1, 8), torch.zeros(1, 8), torch.float32)
    x = torch.zeros(1, 4, 4, 4, 4)  # patches of 2 frames and 2 x 2 positions
    with pytest.raises(ConfigError, match="has 8 tokens for 4 frames, none of one frame"):
        check_frames({"t": node}, x, torch.zeros(1, 4), "A network")
    packed = torch.zeros(1, 8, 4)
    with pytest.raises(ConfigError, match=r"For samples \[1, 8, 4\] give t as \[1\], not \[1, 8\]"):
        check_frames({"t": node}, packed, torch.zeros(1, 8), "A network")
