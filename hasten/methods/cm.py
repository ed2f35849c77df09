"""Consistency models: training from data (CT, easy consistency tuning) and distillation (CD).

Song et al. 2023; Geng et al. 2024 (ECT).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hasten.core.denoiser import Batch, guided, per_sample, predict
from hasten.core.losses import logged, pseudo_huber
from hasten.core.method import Clone, Loss, Nets, Sampling, Turn, even, needs_teacher
from hasten.core.path import expand
from hasten.core.times import LogNormal, Times


@dataclass(frozen=True)
class CM:
    """|f(x_t) - sg f(x_r)| / (t - r) with f the x0 prediction and t, r measured as sigma/alpha.

    r = t (1 - q^-(s + 1) (1 + 8 sigmoid(-t))), clamped at 0, where s counts doublings (ECT, section 3).

    Args:
        from_teacher: x_r is one ``ode`` step of the teacher from x_t (CD); else the same noise on the same data (CT).
        q: Base of the shrinking gap.
        double_every: Iterations between doublings of the closeness of r to t.
        doublings: The last s.
        huber: c of the pseudo-Huber distance, per square root of a dimension.
    """

    times: Times = field(default_factory=lambda: LogNormal(-1.1, 2.0))
    from_teacher: bool = False
    cfg_scale: float | None = None
    q: float = 2.0
    double_every: int = 1000
    doublings: int = 7
    huber: float = 5.4e-4
    needs_data: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        needs_teacher(self.cfg_scale, self.from_teacher)

    def networks(self, teacher, clone: Clone):
        """The student starts as the teacher; its own stopped output is the target."""
        student = clone(teacher)
        return {"student": student, "teacher": teacher} if self.from_teacher else {"student": student}

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student",), self.loss),)

    def stages(self, iterations: int):
        """One stage."""
        return ((self, iterations),)

    def sampling(self, steps: int) -> Sampling:
        """Multistep consistency sampling."""
        return Sampling(even(steps), "renoise")

    def earlier(self, ratio: torch.Tensor, step: int) -> torch.Tensor:
        """The ratio sigma/alpha of r, for that of t."""
        s = min(step // self.double_every, self.doublings)
        return (ratio * (1 - self.q ** -(s + 1) * (1 + 8 * torch.sigmoid(-ratio)))).clamp_min(0)

    def loss(self, nets: Nets, batch: Batch, step: int) -> Loss:
        """The weighted pseudo-Huber distance of the two ends of a short stretch of a trajectory."""
        net, x0, eps = nets["student"], batch.data, batch.noise()
        path = net.path
        t = self.times.draw(path, len(x0), x0.device)
        alpha, sigma, _, _ = path.coeffs(t)
        ratio = sigma / alpha.clamp_min(1e-4)
        below = self.earlier(ratio, step)
        r = path.time(torch.atan(below))
        x_t = path.mix(x0, eps, t)
        with torch.no_grad():
            if self.from_teacher:
                teacher = nets["teacher"]
                pred = guided(teacher, x_t, t, batch.cond, batch.uncond, self.cfg_scale)
                noise = (x_t - expand(alpha, x_t) * pred) / expand(sigma, x_t)
                x_r = path.mix(pred, noise, r)
            else:
                x_r = path.mix(x0, eps, r)
            start = expand(r <= 0, x0)  # f is the identity at r = 0; the data is used as it is
            target = torch.where(start, x_r, predict(net, x_r, per_sample(r, x_r), batch.cond))
        distance = pseudo_huber(predict(net, x_t, t, batch.cond), target, self.huber * x0[0].numel() ** 0.5)
        loss = (distance / (ratio - below)).mean()
        return loss, logged(cm=loss)
