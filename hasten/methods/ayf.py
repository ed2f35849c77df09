"""Align Your Flow: Eulerian map distillation, d/dt X(t->r) = 0 along the teacher. Sabour et al. 2025."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hasten.core.calculus import Mode, derivative
from hasten.core.curriculum import check_warmup, warmup_of
from hasten.core.denoiser import Batch, on_path
from hasten.core.errors import ConfigError
from hasten.core.flowmaps import teacher_velocity
from hasten.core.losses import logged, tangent_normalised
from hasten.core.method import Clone, Loss, Nets, Sampling, Turn, even
from hasten.core.path import RECTIFIED_FLOW, expand
from hasten.core.times import LogitNormal, Times


@dataclass(frozen=True)
class AYF:
    """X(t->r) = x_t - (t - r) F(x_t, t, r) does not change when (x_t, t) moves along the teacher's trajectory.

    At r = t this is flow matching, at r = 0 continuous-time consistency. FlowMap is the paper's Lagrangian sibling.

    Args:
        gaps: Distribution of t - r, the times being those of a rectified flow; r is uniform in what is left.
        warmup: Share of the run, or from 1 on iterations, over which rho, the weight of the unstable part of the
            tangent, rises to ``ceiling``.
        ceiling: Its last value; below 1 it keeps a share 1 - rho of flow matching as a regulariser.
        tangent_c: c of the normalisation g / (|g| + c), with |g| a root mean square.
    """

    gaps: Times = field(default_factory=lambda: LogitNormal(-0.8, 1.0))
    cfg_scale: float | None = None
    warmup: float = 0.2
    ceiling: float = 0.99
    tangent_c: float = 0.1
    jvp_mode: Mode = "auto"
    needs_data: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        check_warmup("AYF", self.warmup)
        if not 0 < self.ceiling <= 1:
            raise ConfigError(f"AYF's ceiling must be above 0 and at most 1, not {self.ceiling}.")

    def networks(self, teacher, clone: Clone):
        """The student is the teacher with a second time."""
        return {"student": clone(teacher, second_time=True), "teacher": teacher}

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student",), self.loss),)

    def stages(self, iterations: int):
        """One stage, which knows how long its warm-up is."""
        return ((replace(self, warmup=warmup_of("AYF", self.warmup, iterations)), iterations),)

    def sampling(self, steps: int) -> Sampling:
        """Hops of the flow map."""
        return Sampling(even(steps), "ode", two_time=True)

    def tangent(self, nets: Nets, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """F with its graph and, without one, g = (F - v) + rho (t - r) (v d_x F + d_t F): -dX/dt where rho is 1."""
        net = on_path(nets["student"], RECTIFIED_FLOW, "velocity")
        x0, eps, path = batch.data, batch.noise(), net.path
        gap = self.gaps.draw(path, len(x0), x0.device)
        r = torch.rand(len(x0), device=x0.device) * (path.t_max - gap)
        t = r + gap
        x_t = path.mix(x0, eps, t)
        v = teacher_velocity(nets, x_t, t, batch.cond, batch.uncond, self.cfg_scale)
        out = net(x_t, t, batch.cond, r=r)
        tangents = (v, torch.ones_like(t))
        along = derivative(lambda x, t: net(x, t, batch.cond, r=r), (x_t, t), tangents, self.jvp_mode)
        rho = min(self.ceiling, (step + 1) / self.warmup) if self.warmup else self.ceiling
        return out, out.detach() - v + rho * expand(gap, v) * along

    def loss(self, nets: Nets, batch: Batch, step: int) -> Loss:
        """mean|F - sg(F - g / (|g| + c))|^2 (algorithm 1)."""
        out, g = self.tangent(nets, batch, step)
        target = out.detach() - tangent_normalised(g, self.tangent_c)
        return (out - target).float().pow(2).mean(), logged(ayf=g.pow(2).mean().sqrt())
