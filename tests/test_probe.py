"""Single findings of the probe: the path's shift, texts beside several prompts, half precision's times, no dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hasten import denoiser
from hasten.models.diffusers import of
from hasten.models.probe import record
from hasten.speed import Cache, Guidance, Quantize, speed_up
from tests.pipelines import FAMILIES


@pytest.mark.parametrize("name", ["flux", "flux2", "qwenimage"])
def test_even_unit_times_are_the_pipelines_own_where_its_shift_follows_the_size(name: str) -> None:
    pipe, call = FAMILIES[name]()
    net = denoiser(pipe, call)
    run = record(pipe, {**net.found.call, **net.found.quiet}, 4)
    own = torch.stack([net.found.clock(step.t.double()) for step in run.steps])
    even = net.path.at(torch.linspace(1, 0.25, 4, dtype=torch.float64))
    if pipe.scheduler.config.get("shift_terminal"):  # it stretches the times so that the last is another
        rest = 1 - even
        even = 1 - rest * (1 - pipe.scheduler.config["shift_terminal"]) / rest[-1]
    assert net.path.args[0] != 1
    near = 2e-3 if name == "flux2" else 2e-4  # its shift follows the number of steps too, a little
    assert torch.allclose(own, even, atol=near), (own, even)


@pytest.mark.parametrize("text", ["blurry", ["blurry"]], ids=["text", "list"])
def test_a_negative_prompt_goes_beside_every_prompt(text: Any) -> None:
    """Pipelines repeat a text themselves, and refuse a list that is shorter than the prompts."""
    pipe, call = FAMILIES["sd3"]()
    net = denoiser(pipe, {**call, "negative_prompt": text})
    plain = denoiser(pipe, call)
    assert net.uncond and plain.uncond and all(v.equal(plain.uncond[k]) for k, v in net.uncond.items())
    many = of({"prompt": "a", "negative_prompt": text, "prompt_2": None, "height": 8}, "prompt", ["b", "c"])
    assert many == {"prompt": ["b", "c"], "negative_prompt": ["blurry"] * 2, "prompt_2": None, "height": 8}


def test_the_networks_own_dropout_of_labels_stays_off_in_training() -> None:
    pipe, call = FAMILIES["dit"]()
    net = denoiser(pipe, call).train()
    x, t = torch.randn(16, *net.shape), torch.full((16,), 0.5)
    labels = {k: v.expand(16, *v.shape[1:]) for k, v in net.uncond.items()} if net.uncond else {}
    cond = {k: torch.ones_like(v) for k, v in labels.items()}
    assert net.training and not any(m.training for m in net.net.modules())
    with torch.no_grad():
        assert torch.equal(net(x, t, cond), net(x, t, cond))


@pytest.mark.parametrize(("name", "several"), [("sdxl", "num_images_per_prompt"), ("wan", "num_videos_per_prompt")])
def test_of_several_images_of_a_prompt_one_is_watched(name: str, several: str) -> None:
    pipe, call = FAMILIES[name]()
    net, plain = denoiser(pipe, {**call, several: 2}), denoiser(pipe, call)
    assert (
        net.found.call[several] == 1 and net.found.cfg_scale == plain.found.cfg_scale == 5 and net.shape == plain.shape
    )
    call = {**call, several: 2, "output_type": "latent", "num_inference_steps": 8}
    up = speed_up(pipe, Quantize(min_side=8), Cache(threshold=50.0), Guidance((0.0, 0.5)), call=call)
    with up as fast:
        assert len(fast(**call)[0]) == 2
    assert up.ledger()["cache"]["reused"] > 0 and up.ledger()["guidance"]["skipped"] > 0
