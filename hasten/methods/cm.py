"""Consistency models: training from data (iCT, easy consistency tuning) and distillation (CD).

Song et al. 2023; Song & Dhariwal 2024 (iCT); Geng et al. 2024 (ECT).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from hasten.core.curriculum import check_doublings, doubled, doubling_of
from hasten.core.denoiser import Batch, guided, predict
from hasten.core.errors import ConfigError, unknown
from hasten.core.losses import consistency_target, ect_earlier, logged, pseudo_huber
from hasten.core.method import Clone, Loss, Nets, Sampling, Turn, even, needs_teacher
from hasten.core.path import Path, edm, expand
from hasten.core.times import LogNormal, Times, ratio_at

Schedule = Literal["ect", "ict"]


@dataclass(frozen=True)
class CM:
    """|f(x_t) - sg f(x_r)| / (t - r) with f the x0 prediction and t, r measured as sigma/alpha.

    With s counting doublings, ``ect`` sets r = t (1 - q^-(s + 1) (1 + 8 sigmoid(-t))), clamped at 0 (ECT, section 3),
    and ``ict`` makes t and r neighbours on Karras' grid of N = ``intervals`` 2^s + 1 points from data to sigma/alpha =
    80, t being the upper end of the interval that the drawn time falls into: iCT's discretised log-normal.

    Args:
        from_teacher: x_r is one ``ode`` step of the teacher from x_t (CD); else the same noise on the same data (CT).
        schedule: How r follows t: ``ect`` or ``ict``.
        q: Base of ``ect``'s shrinking gap.
        intervals: Of ``ict``'s grid before the first doubling (s0; its s1 is s0 2^doublings).
        double_every: Iterations between doublings; 0 spreads them over the run (iCT's K' = K / (doublings + 1)).
        doublings: The last s.
        huber: c of the pseudo-Huber distance, per square root of a dimension.
    """

    times: Times = field(default_factory=lambda: LogNormal(-1.1, 2.0))
    from_teacher: bool = False
    cfg_scale: float | None = None
    schedule: Schedule = "ect"
    q: float = 2.0
    intervals: int = 10
    double_every: int = 0
    doublings: int = 7
    huber: float = 5.4e-4
    needs_data: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        needs_teacher(self.cfg_scale, self.from_teacher)
        if self.schedule not in get_args(Schedule):
            raise unknown("schedule", self.schedule, get_args(Schedule))
        check_doublings("CM", self.double_every, self.doublings)
        if self.intervals < 1:
            raise ConfigError(f"CM: intervals must be at least 1, not {self.intervals}.")

    def networks(self, teacher, clone: Clone):
        """The student starts as the teacher; its own stopped output is the target."""
        student = clone(teacher)
        return {"student": student, "teacher": teacher} if self.from_teacher else {"student": student}

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student",), self.loss),)

    def stages(self, iterations: int):
        """One stage, which knows when to double."""
        every = doubling_of("CM", self.double_every, self.doublings, iterations)
        return ((replace(self, double_every=every), iterations),)

    def sampling(self, steps: int) -> Sampling:
        """Multistep consistency sampling."""
        return Sampling(even(steps), "renoise")

    def ends(self, path: Path, t: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """t, and sigma/alpha of t and of r, all [B], for drawn times t [B]."""
        s, ratio = doubled(step, self.double_every, self.doublings), ratio_at(path, t)
        if self.schedule == "ect":
            return t, ratio, ect_earlier(ratio, s, self.q)
        top = min(80.0, float(ratio_at(path, path.at(1.0))))
        grid = edm(sigma_max=top).at(torch.linspace(0, 1, self.intervals * 2**s + 1)).to(ratio)
        i = torch.searchsorted(grid, ratio).clamp(1, len(grid) - 1)
        return path.time(torch.atan(grid[i])), grid[i], grid[i - 1]

    def loss(self, nets: Nets, batch: Batch, step: int) -> Loss:
        """The weighted pseudo-Huber distance of the two ends of a short stretch of a trajectory."""
        net, x0, eps = nets["student"], batch.data, batch.noise()
        path = net.path
        t, ratio, below = self.ends(path, self.times.draw(path, len(x0), x0.device), step)
        r = path.time(torch.atan(below))
        x_t = path.mix(x0, eps, t)
        with torch.no_grad():
            if self.from_teacher:
                teacher = nets["teacher"]
                pred = guided(teacher, x_t, t, batch.cond, batch.uncond, self.cfg_scale)
                alpha, sigma, _, _ = path.coeffs(t)
                noise = (x_t - expand(alpha, x_t) * pred) / expand(sigma, x_t)
                x_r = path.mix(pred, noise, r)
            else:
                x_r = path.mix(x0, eps, r)
        target = consistency_target(net, x_r, r, batch.cond)
        distance = pseudo_huber(predict(net, x_t, t, batch.cond), target, self.huber * x0[0].numel() ** 0.5)
        loss = (distance / (ratio - below)).mean()
        return loss, logged(cm=loss)
