"""From prompts to a plan that is used: a tiny pipeline is tuned, and another one of its weights runs the saved plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.core.errors import ConfigError
from hasten.measure.quality import trajectory
from hasten.speed import Cast
from hasten.workload import Workload
from tests.pipelines import FAMILIES

STEPS, CALLS, PSNR = 8, 2, 20
PROMPTS = ["a red bicycle", "two dogs", "rain over a lake", "a cup"]


def made() -> tuple[Any, dict[str, Any], list[int]]:
    """A pipeline, its call without prompt and steps, and what its network has computed: 2 a guided step, 1 a plain."""
    pipe, call = FAMILIES["sd3"]()
    done = [0]

    def computed(block: Any, args: Any, kwargs: Any) -> None:
        done[0] += len(kwargs["hidden_states"])

    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(computed, with_kwargs=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {k: v for k, v in call.items() if k not in ("prompt", "num_inference_steps")}, done


def drawn(pipe: Any, call: dict[str, Any], steps: int = STEPS) -> Tensor:
    seed = torch.Generator().manual_seed(7)
    return pipe("a horse", **call, num_inference_steps=steps, generator=seed, output_type="pt").images


def test_from_prompts_to_a_plan_in_use(tmp_path, monkeypatch: pytest.MonkeyPatch):
    pipe, call, done = made()

    def counted(thunk: Callable[[], Any], repeats: int, device: torch.device) -> list[float]:
        """What is computed in place of seconds: those of a network this small are noise."""
        before = done[0]
        thunk()
        return [float(done[0] - before)]

    monkeypatch.setattr("hasten.tuner.clocked", counted)
    tuned = hasten.tune(pipe, PROMPTS, max_loss={"psnr": PSNR}, steps=STEPS, calls=CALLS, layers=[Cast()], call=call)
    assert "gains nothing" in tuned.measured["left_out"]["cast"] and tuned.measured["held-out prompts"] == 2
    assert tuned.measured["gain"] > 1.2 and tuned.measured["held_out"]["psnr"] >= PSNR
    assert any(point["loss"]["psnr"] < PSNR for point in tuned.measured["front"])  # the budget is what ends the search
    tuned.save(tmp_path / "plan.yaml")

    plan = hasten.Plan.load(tmp_path / "plan.yaml")
    assert "cache" in [t.name for t in plan.transforms] and plan == tuned
    other, call, done = made()
    held_out = Workload(other, STEPS, call, PROMPTS[1::2])
    before, (own, _) = drawn(other, call), held_out.samples(CALLS, seed=1, start=CALLS)
    with hasten.speed_up(other, plan, call={**call, "prompt": PROMPTS[0]}) as fast:
        done[0] = 0
        after = drawn(fast, call)
        assert done[0] == round(2 * STEPS / plan.measured["gain"]) and not torch.equal(after, before)
        images, _ = held_out.samples(CALLS, seed=1, start=CALLS)
        assert trajectory(own, images)["psnr"] == pytest.approx(plan.measured["held_out"]["psnr"], abs=0.01)
        with pytest.raises(ConfigError, match=f"made for {STEPS} steps, not {STEPS - 2}"):
            drawn(fast, call, STEPS - 2)
        assert torch.equal(drawn(fast, call), after)
    assert torch.equal(drawn(other, call), before)
