"""A plan belongs to the guidance that it was measured with, of a native model and of a pipeline."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hasten.accelerate import front_of
from hasten.console import out_console
from hasten.core.errors import CheckpointError, ConfigError
from hasten.core.method import Sampling, even
from hasten.core.request import Request
from hasten.core.sample import sample
from hasten.speed import Cache, Cast, speed_up
from hasten.speed.host import host
from hasten.speed.plan import Plan, fingerprint, guidance_of
from hasten.tuner import tune
from hasten.workload import Workload
from tests.pipelines import FAMILIES
from tests.test_speed import tiny


def run(net: Any, plan: Plan, scale: float) -> None:
    noise, cond, uncond = torch.randn(2, 1, 4, 4), {"label": torch.tensor([0, 1])}, {"label": torch.tensor([2, 2])}
    with speed_up(net, plan) as fast:
        sample(fast, noise, cond, Sampling(even(3), cfg_scale=scale), uncond=uncond)


def test_a_native_plan_is_for_its_guidance_scale(tmp_path):
    net = tiny()
    at = host(net)
    Plan((Cast(),), fingerprint(at, 3, guidance={"cfg_scale": 3.0})).save(tmp_path / "plan.yaml")
    plan = Plan.load(tmp_path / "plan.yaml")
    run(net, plan, 3.0)
    for scale in (1.0, 2.0):
        with pytest.raises(ConfigError, match=f"made for cfg_scale 3.0, not {scale}; ask for 3.0, or tune again"):
            run(net, plan, scale)
    with pytest.raises(ConfigError, match="made for cfg_scale 1.0, not 3.0"):
        run(net, replace(plan, fingerprint=fingerprint(at, 3, guidance={"cfg_scale": 1.0})), 3.0)
    older = {k: v for k, v in plan.fingerprint.items() if k != "guidance"}
    for said in (older, {**older, "guidance": None}):  # made before it was part of a plan, or for any
        run(net, replace(plan, fingerprint=said), 2.0)


def test_guidance_in_a_part_of_the_times_is_another_guidance():
    net = tiny()
    plan = Plan((Cast(),), fingerprint(host(net), 3, guidance={"cfg_scale": 3.0}))
    noise, cond, uncond = torch.randn(2, 1, 4, 4), {"label": torch.tensor([0, 1])}, {"label": torch.tensor([2, 2])}
    for interval in ((0.0, 0.5), (0.5, 1.0)):
        with pytest.raises(ConfigError, match="made for interval None, not"), speed_up(net, plan) as fast:
            sample(fast, noise, cond, Sampling(even(3), cfg_scale=3.0), uncond=uncond, interval=interval)
    whole: Any = [0.0, 1.0]
    with speed_up(net, plan) as fast:
        sample(fast, noise, cond, Sampling(even(3), cfg_scale=3.0), uncond=uncond, interval=whole)


def test_a_request_opened_by_hand_says_nothing_of_a_pipelines_guidance():
    pipe, call = FAMILIES["sd3"]()
    at = host(pipe, call)
    plan = Plan((Cast(),), fingerprint(at, guidance={"guidance_scale": 123.0}))
    plan.fits(at, object(), Request(3))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="made for guidance_scale 123"):
        plan.fits(at, object(), Request(3, state={"call": call}))  # type: ignore[arg-type]


def test_the_tuner_says_the_guidance_of_what_it_measured(monkeypatch):
    asked: list[Any] = []
    monkeypatch.setattr("hasten.tuner.fingerprint", lambda at, steps, shape, guidance: asked.append(guidance) or {})
    tune(tiny(), max_loss={"psnr": 5}, sampling=Sampling(even(12), cfg_scale=2.5), calls=2, layers=[])
    assert asked == [{"cfg_scale": 2.5}]


@pytest.mark.parametrize(
    ("family", "scale", "said"),
    [
        ("sd3", "guidance_scale", {"guidance_scale": 3.5, "skip_guidance_layers": None}),
        ("flux", "guidance_scale", {"guidance_scale": 3.5, "true_cfg_scale": 1.0, "negative prompt": False}),
        ("qwenimage", "true_cfg_scale", {"true_cfg_scale": 3.5, "negative prompt": True}),
    ],
)
def test_a_pipelines_plan_is_for_its_guidance(family, scale, said):
    pipe, call = FAMILIES[family]()
    call = {k: v for k, v in call.items() if k != "num_inference_steps"} | {scale: 3.5}
    work = Workload(pipe, 2, call)
    found = work.guidance
    for key, value in said.items():
        assert found.get(key) == value, found
    plan = Plan((Cast(),), fingerprint(work.host, 2, guidance=found))

    def ask(**more: Any) -> None:
        with speed_up(pipe, plan, call=work.shown) as fast:
            fast(**{**call, **more}, num_inference_steps=2, output_type="latent")

    ask()
    with pytest.raises(ConfigError, match=f"made for {scale} 3.5, not 5.0; ask for 3.5, or tune again"):
        ask(**{scale: 5.0})
    if family == "qwenimage":  # the second branch goes with the negative prompt, whatever the scale
        with pytest.raises(ConfigError, match="made for negative prompt True, not False"):
            ask(negative_prompt=None)
    call.pop(scale)  # the default is what counts then
    default = guidance_of(work.host, call)[scale]
    if default != 3.5:
        with pytest.raises(ConfigError, match=f"made for {scale} 3.5, not {default}"):
            ask()


@pytest.mark.parametrize(
    ("family", "scheduler", "mask"),
    [("sd3", "FlowMatchHeunDiscreteScheduler", "00101100"), ("sdxl", "KDPM2DiscreteScheduler", "00" + 6 * "10" + "0")],
)
def test_a_plan_counts_steps_as_they_are_asked_for_and_its_layers_as_they_are_visited(family, scheduler, mask):
    """Heun's rule looks twice at a time, which counts once; KDPM2 visits a time between each two."""
    import diffusers

    pipe, call = FAMILIES[family]()
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    plan = Plan((Cache("schedule", mask=mask),), {"steps": 8})
    up = speed_up(pipe, plan, call=call)
    with up as fast:
        fast(**call, num_inference_steps=8, output_type="latent")
        assert up.ledger()["cache"]["hit_rate"] == pytest.approx(mask.count("1") / len(mask), abs=0.05)
        with pytest.raises(ConfigError, match="made for 8 steps, not 6; ask for 8"):
            fast(**call, num_inference_steps=6, output_type="latent")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("threshold: 0.05", "threshold: 0.5"),
        ("psnr: 41.5", "psnr: 55.5"),
        ("steps: 8", "steps: 9"),
        ("signature", "signed"),
    ],
)  # fmt: skip
def test_a_plan_whose_stack_or_figures_were_changed_is_refused(old, new, tmp_path):
    file = tmp_path / "plan.yaml"
    plan = Plan((Cache(threshold=0.05), Cast()), {"steps": 8}, {"loss": {"psnr": 41.5}, "front": [{"seconds": 0.1}]})
    plan.save(file)
    assert Plan.load(file) == plan
    text = file.read_text()
    file.write_text("# a remark changes nothing\n" + text)
    assert Plan.load(file) == plan
    file.write_text(text.replace(old, new))
    assert file.read_text() != text
    with pytest.raises(CheckpointError, match="plan.yaml was changed since it was written, .* tune again, or give the"):
        Plan.load(file)


def test_the_front_is_shown():
    points = [
        {"layers": ["cast", "cache"], "seconds": 0.1, "loss": {"psnr": 31.5, "ssim": 0.9}, "within": True},
        {"layers": [], "seconds": 0.4, "loss": {"psnr": "inf", "ssim": 1.0}, "within": True},
    ]
    with out_console.capture() as said:
        out_console.print(front_of(Plan((Cast(),), {}, {"front": points, "budget": {"psnr": 30}})))
    shown = " ".join(said.get().split())
    assert "cast + cache │ 4.00 │ PSNR 31.5 dB │ yes" in shown and "the model as it is │ 1.00" in shown
    assert "SSIM" not in shown
