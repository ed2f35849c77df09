"""The tiny pipelines themselves: they run, repeat, and their output depends on all that it should depend on."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tests.pipeline_parts import picture
from tests.pipelines import FAMILIES
from tests.pipelines_more import EXOTIC, MORE, PLAIN

ALL = FAMILIES | MORE
TIMES = {"timestep", "timesteps", "t"}  # what the networks call their time; all take the latent first
MOVED = 1e-3  # least mean change of a pixel, of [0, 1]
families = pytest.mark.parametrize("family", ALL)


def run(pipe: Any, call: dict[str, Any], seed: int = 0, **changes: Any) -> Tensor:
    """Two steps of a pipeline; pictures or videos with pixels in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    settings = dict(generator=generator, num_inference_steps=2, output_type="pt")
    return torch.as_tensor(pipe(**(call | settings | changes))[0])


def moved(a: Tensor, b: Tensor) -> float:
    """The mean difference of two outputs."""
    return float((a - b).abs().mean())


def networks(pipe: Any) -> list[nn.Module]:
    """A pipeline's denoisers."""
    parts = (getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2"))
    return [part for part in parts if isinstance(part, nn.Module)]


def calls(net: nn.Module, pipe: Any, call: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments, by their names, of a network's calls in two steps of its pipeline."""
    seen: list[dict[str, Any]] = []
    signature = inspect.signature(net.forward)

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(dict(signature.bind(*args, **kwargs).arguments))

    handle = net.register_forward_pre_hook(note, with_kwargs=True)
    run(pipe, call)
    handle.remove()
    return seen


def evaluated(net: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """All that the network returns, as one vector."""
    with torch.no_grad():
        return torch.cat([x.flatten() for x in tree_leaves(net(**(arguments | {"return_dict": False})))])


def test_there_are_as_many_families_as_promised():
    assert len(FAMILIES) == 12 and len(PLAIN) >= 12 and len(EXOTIC) >= 8
    assert not FAMILIES.keys() & MORE.keys() and len(MORE) == len(PLAIN) + len(EXOTIC)


@families
def test_a_call_leaves_seed_steps_and_output_to_the_test(family: str):
    _, call = ALL[family]()
    assert not call.keys() & {"generator", "num_inference_steps", "output_type", "latents"}
    assert "prompt" in call or "class_labels" in call


@families
def test_two_steps_are_finite_and_repeat(family: str):
    pipe, call = ALL[family]()
    out = run(pipe, call)
    assert out.isfinite().all() and out.std() > 0.03 and out.min() >= 0 and out.max() <= 1
    torch.randn(7)  # what was drawn before a pipeline is built does not matter
    again, call = ALL[family]()
    assert run(again, call).equal(out)
    parameters = [p for net in networks(pipe) for p in net.parameters()]
    assert all(p.isfinite().all() and p.count_nonzero() for p in parameters)


@families
def test_the_output_depends_on_prompt_and_seed(family: str):
    pipe, call = ALL[family]()
    other: dict[str, Any] = {"prompt": "two grey dogs"} if "prompt" in call else {"class_labels": [7]}
    out = run(pipe, call)
    assert moved(out, run(pipe, call, **other)) > MOVED
    assert moved(out, run(pipe, call, seed=1)) > 10 * MOVED


@families
def test_the_network_depends_on_latent_and_time(family: str):
    pipe, call = ALL[family]()
    for net in networks(pipe):
        seen = calls(net, pipe, call)
        (time,) = TIMES & seen[0].keys()
        latent = next(iter(inspect.signature(net.forward).parameters))
        arguments = next(c for c in seen if torch.as_tensor(c[time]).max() > 0)
        out = evaluated(net, arguments)
        assert evaluated(net, arguments).equal(out)
        noisy = tree_map(lambda x: x + 0.1 * torch.randn_like(x), arguments[latent])
        for changed in ({latent: noisy}, {time: arguments[time] / 2}):
            share = moved(out, evaluated(net, arguments | changed)) / float(out.std())
            assert share > 2e-3, f"{share:.1e} for another {[*changed]}"


@families
def test_two_prompts_make_a_batch(family: str):
    pipe, call = ALL[family]()
    key = "prompt" if "prompt" in call else "class_labels"
    values = ["two grey dogs", "a cup"] if key == "prompt" else [7, 8]
    changes: dict[str, Any] = {key: values} | ({"negative_prompt": ["", ""]} if "negative_prompt" in call else {})
    out = run(pipe, call, output_type="latent", **changes)  # two autoencoders (Allegro, HunyuanVideo 1.5) decode one
    assert len(out) == 2 and out.isfinite().all() and moved(out[0], out[1]) > MOVED


@pytest.mark.parametrize("family", ["flux_kontext", "flux_fill", "sd_inpaint", "wan_i2v", "ltx_i2v"])
def test_the_output_depends_on_the_picture(family: str):
    pipe, call = EXOTIC[family]()
    assert moved(run(pipe, call), run(pipe, call, image=picture(*call["image"].size, seed=1))) > MOVED


def test_both_experts_are_called_and_each_follows_its_own_guidance():
    pipe, call = EXOTIC["wan22_a14b"]()
    high, low = networks(pipe)
    assert [len(calls(net, pipe, call)) for net in (high, low)] == [2, 2]
    assert moved(run(pipe, call), run(pipe, call, guidance_scale_2=9.0)) > MOVED


def test_times_differ_between_tokens():
    pipe, call = EXOTIC["ltx_i2v"]()
    times = calls(pipe.transformer, pipe, call)[0]["timestep"]  # [2B, tokens], a third of them of the given frame
    assert times.shape == (2, 192) and (times == 0).sum() == 2 * 64
    pipe, call = EXOTIC["wan22_5b"]()
    assert calls(pipe.transformer, pipe, call)[0]["timestep"].shape == (1, 3)


def test_sound_and_video_are_denoised_together():
    pipe, call = EXOTIC["ltx2"]()
    out = pipe(**call, num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0))
    assert out.audio.isfinite().all() and out.audio.std() > 0
    arguments = calls(pipe.transformer, pipe, call)[0]
    louder = arguments | {"audio_hidden_states": 2 * arguments["audio_hidden_states"]}
    video, other = (pipe.transformer(**a)[0].detach() for a in (arguments, louder))
    assert moved(video, other) > MOVED
