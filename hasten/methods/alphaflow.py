"""AlphaFlow: from trajectory flow matching to MeanFlow as alpha falls from 1 to 0. Zhang et al. 2025."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hasten.core.calculus import Mode, derivative
from hasten.core.denoiser import Batch, on_path
from hasten.core.errors import ConfigError
from hasten.core.flowmaps import part, teacher_velocity, two_times
from hasten.core.losses import logged
from hasten.core.method import Clone, Loss, Nets, Sampling, Turn, even, needs_teacher
from hasten.core.path import RECTIFIED_FLOW, expand
from hasten.core.times import LogitNormal, Times


@dataclass(frozen=True)
class AlphaFlow:
    """u(x_t, t, r) -> alpha v + (1 - alpha) u(x_t - alpha (t - r) v, s, r) with s = alpha r + (1 - alpha) t.

    alpha = 1 regresses on v for every r, alpha = 1/2 halves the hop, and alpha = 0 is MeanFlow's v - (t - r) du/dt.

    Args:
        times, earlier: The laws of two draws, the larger of which is t and the smaller r, as those of MeanFlow; no
            ``earlier`` draws twice from ``times`` (the paper: LogitNormal(-0.4, 1)).
        from_teacher: v is the teacher's (guided) velocity; else the conditional eps - x0 of the data.
        same: Share of the batch with r = t, which is plain flow matching.
        begin, end: Where alpha's sigmoid from 1 to 0 starts and stops, as shares of the run. It reaches 0 at about 0.7
            of this stretch, and before that one step is hardly learnt: a short run wants an end of 0.5.
        sharpness: Of the sigmoid.
        clamp: alpha below it is 0, above one minus it 1.
        power, floor: p and c of the weight alpha / (error + c)^p, with the error averaged over pixels; 1 instead of
            alpha at 0. The paper's power is 1, which learns long gaps late.
        iterations: Length of the run; set by :meth:`stages`.
    """

    times: Times = field(default_factory=lambda: LogitNormal(-0.6, 1.6))
    from_teacher: bool = True
    cfg_scale: float | None = None
    same: float = 0.5
    begin: float = 0.0
    end: float = 1.0
    sharpness: float = 25.0
    clamp: float = 5e-3
    power: float = 0.5
    floor: float = 1e-3
    iterations: int = 1000
    earlier: Times | None = field(default_factory=lambda: LogitNormal(-4.0, 1.6))
    jvp_mode: Mode = "auto"
    needs_data: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        needs_teacher(self.cfg_scale, self.from_teacher)
        if not 0 <= self.begin < self.end <= 1:
            raise ConfigError(f"AlphaFlow needs 0 <= begin < end <= 1, not ({self.begin}, {self.end}).")
        if self.iterations < 1:
            raise ConfigError(f"AlphaFlow needs a run of at least 1 iteration, not {self.iterations}.")

    def networks(self, teacher, clone: Clone):
        """The student is the teacher with a second time."""
        student = clone(teacher, second_time=True)
        return {"student": student, "teacher": teacher} if self.from_teacher else {"student": student}

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student",), self.loss),)

    def stages(self, iterations: int):
        """One stage, which knows how long it is."""
        return ((replace(self, iterations=iterations), iterations),)

    def sampling(self, steps: int) -> Sampling:
        """Hops of the mean velocity."""
        return Sampling(even(steps), "ode", two_time=True)

    def alpha(self, step: int) -> float:
        """The curriculum: 1 - sigmoid(sharpness (progress - 1/2)), clamped to 1 and to 0 (section 4.2)."""
        progress = (step / self.iterations - self.begin) / (self.end - self.begin)
        alpha = 1 / (1 + math.exp(self.sharpness * (min(max(progress, 0.0), 1.0) - 0.5)))
        return 0.0 if alpha < self.clamp or progress > 1 else 1.0 if alpha > 1 - self.clamp or progress < 0 else alpha

    def loss(self, nets: Nets, batch: Batch, step: int) -> Loss:
        """w |u - sg(target)|^2 with w = alpha / (error + c)^p where r < t, without alpha where r = t or alpha = 0."""
        net = on_path(nets["student"], RECTIFIED_FLOW, "velocity")
        x0, eps, path, alpha = batch.data, batch.noise(), net.path, self.alpha(step)
        t, r = two_times(self.times, path, len(x0), x0.device, self.earlier)
        k = round(self.same * len(x0))  # samples are independent, so the first k may be the ones with r = t
        r = torch.cat([t[:k], r[k:]])
        x_t = path.mix(x0, eps, t)
        if self.from_teacher:
            v = teacher_velocity(nets, x_t, t, batch.cond, batch.uncond, self.cfg_scale)
        else:
            v = path.target(x0, eps, t, "velocity")
        rest = self.target(net, x_t[k:], t[k:], r[k:], v[k:], part(batch.cond, slice(k, None)), alpha)
        error = (net(x_t, t, batch.cond, r=r) - torch.cat([v[:k], rest])).float().pow(2).flatten(1).mean(1)
        scale = torch.ones_like(error)
        scale[k:] = alpha or 1.0
        return (scale * error * (error.detach() + self.floor).pow(-self.power)).mean(), logged(alphaflow=error.mean())

    @torch.no_grad()
    def target(self, net, x_t: Tensor, t: Tensor, r: Tensor, v: Tensor, cond, alpha: float) -> Tensor:
        """What u(x_t, t, r) should be."""
        if alpha == 1 or not len(x_t):
            return v
        if alpha == 0:
            tangents = (v, torch.ones_like(t))
            du = derivative(lambda x, t: net(x, t, cond, r=r), (x_t, t), tangents, self.jvp_mode)
            return v - expand(t - r, v) * du
        hop = alpha * (t - r)
        return alpha * v + (1 - alpha) * net(x_t - expand(hop, v) * v, t - hop, cond, r=r)
