"""Calibration: what a policy must know of a model beforehand, measured on that model as it will run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from hasten.core.errors import ConfigError
from hasten.speed.caching.engine import Engine
from hasten.speed.caching.policies import NEVER, Policy
from hasten.speed.caching.state import Call, change, few
from hasten.speed.host import Host, needs_denoiser
from hasten.speed.transform import Applied, Transform, one_of, speed_up

POINTS = 10  # of (d_in, d_out) that a polynomial of degree 4 is fitted to at least


@dataclass(frozen=True)
class Recorder:
    """A transform that computes every call and writes down how signals and predictions change from step to step.

    ``seen`` is (step, d of block 0's modulated input or 0, d of the prediction, ratio of the predictions' mean
    magnitudes) of every call but a branch's first.
    """

    steps: int
    signal: bool
    seen: list[tuple[int, float, float, float]] = field(default_factory=list)
    name: ClassVar[str] = "cache"
    order: ClassVar[int] = 30
    total_skips: ClassVar[int] = 0
    threshold: ClassVar[None] = None
    first: ClassVar[int] = 0
    last: ClassVar[int] = 0
    degree: ClassVar[None] = None

    def check(self, at: Host, stack: Sequence[Transform]) -> None:
        needs_denoiser("calibrate", at)

    def fits(self, steps: int) -> None:
        if steps != self.steps:
            raise ConfigError(f"calibrate: a run took {steps} steps, not {self.steps}; give steps={steps}.")

    def apply(self, at: Host) -> Applied:
        level, fields = ("stack", ("coefficients",)) if self.signal else ("output", ())
        engine = Engine(self, Policy(level, fields, lambda c, call: NEVER, after=self.note, first=0), at)

        def inert() -> str | None:
            return None if self.seen else "calibrate: the runs called the network in no request; sample in them."

        return Applied(engine.install(), lambda: {"calls": engine.calls}, inert)

    @staticmethod
    def note(recorder: Recorder, call: Call, out: Tensor) -> None:
        """Compare with the branch's last call."""
        now = few(out.detach()).clone()
        before = call.mine.blocks.get("calibrate")
        if before is not None:
            signal, last = before
            d_in = 0.0 if call.signal is None else change(call.signal, signal)
            ratio = float(now.abs().mean()) / max(float(last.abs().mean()), 1e-30)
            recorder.seen.append((call.step, d_in, change(now, last), ratio))
        call.mine.blocks["calibrate"] = call.signal, now


def calibrate(
    model: Any,
    policy: str,
    runs: Sequence[Callable[[Any], Any]],
    steps: int,
    *transforms: Any,
    call: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What ``Cache(policy, **found)`` needs to know of a model, as plain numbers.

    ``teacache``: the polynomial of degree 4 that gives the relative change of the prediction for that of block 0's
    modulated input, by least squares over all steps (Liu et al. 2024), and ``steps``. ``magcache``: for every step
    the mean of mean|out_t| / mean|out_(t-1)| over branches and runs (Ma et al. 2025, of the prediction here).

    Args:
        runs: Functions that sample once from the model they are given, in ``steps`` steps; many prompts and seeds.
        transforms: The others of the stack (Quantize ...), for a model is calibrated as it will run.
        call: As in ``speed_up``.

    Raises:
        ConfigError: For another policy, runs of another step count, or too few points.
    """
    one_of("calibrate", "policy", policy, ("teacache", "magcache"))
    if not runs or any(not callable(run) for run in runs):
        raise ConfigError("calibrate needs runs: functions that sample once from the model they are given.")
    recorder = Recorder(steps, policy == "teacache")
    with speed_up(model, *transforms, recorder, call=call) as fast:
        for run in runs:
            run(fast)
    found = np.array(recorder.seen)
    if policy == "magcache":
        each = [found[found[:, 0] == i, 3] for i in range(steps)]
        if any(not len(v) for v in each[1:]):
            raise ConfigError("calibrate: a step had no call to compare; do not change the guidance within a run.")
        return {"ratios": tuple([1.0, *(float(v.mean()) for v in each[1:])])}
    if len(np.unique(found[:, 1])) < POINTS:
        raise ConfigError(f"calibrate: {len(found)} points are too few for a polynomial of degree 4; give more runs.")
    return {"coefficients": tuple(float(v) for v in np.polyfit(found[:, 1], found[:, 2], 4)), "steps": steps}
