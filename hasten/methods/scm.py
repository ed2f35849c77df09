"""sCM: continuous-time consistency models on TrigFlow, trained or distilled. Lu & Song 2025."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hasten.core.calculus import Mode
from hasten.core.curriculum import check_warmup, warmup_of
from hasten.core.denoiser import Batch
from hasten.core.heads import LogVariance
from hasten.core.losses import logged, tangent_normalised
from hasten.core.method import Clone, Loss, Nets, Sampling, Turn, even, needs_teacher
from hasten.core.path import expand
from hasten.core.tangent import trig_tangent
from hasten.core.times import LogNormal, Times


@dataclass(frozen=True)
class SCM:
    """f = cos t x - sin t F is constant along the teacher's trajectory; networks on other paths run through OnPath.

    Args:
        times: log tan t is normal.
        from_teacher: The tangent follows the teacher's (guided) velocity (sCD); else the conditional one (sCT).
        warmup: Share of the run, or from 1 on iterations, over which rho, the weight of the unstable part of g, rises
            to 1.
        tangent_c: c of the normalisation g / (|g| + c), with |g| a root mean square.
    """

    times: Times = field(default_factory=lambda: LogNormal(-1.0, 1.4))
    from_teacher: bool = True
    cfg_scale: float | None = None
    warmup: float = 0.2
    tangent_c: float = 0.1
    jvp_mode: Mode = "auto"
    needs_data: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        check_warmup("SCM", self.warmup)
        needs_teacher(self.cfg_scale, self.from_teacher)

    def networks(self, teacher, clone: Clone):
        """The student starts as the teacher; logvar learns the weighting over t."""
        nets = {"student": clone(teacher), "logvar": LogVariance()}
        return {**nets, "teacher": teacher} if self.from_teacher else nets

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student", "logvar"), self.loss),)

    def stages(self, iterations: int):
        """One stage, which knows how long its warm-up is."""
        return ((replace(self, warmup=warmup_of("SCM", self.warmup, iterations)), iterations),)

    def sampling(self, steps: int) -> Sampling:
        """Multistep consistency sampling."""
        return Sampling(even(steps), "renoise")

    def tangent(self, nets: Nets, batch: Batch, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """F with its graph, g (eq. 7 times cos t, unnormalised) without one, and t.

        g = -cos^2 t (F - dx) - rho (cos t sin t x + JVP), the JVP along (cos t sin t dx, cos t sin t).
        """
        teacher = nets["teacher"] if self.from_teacher else None
        out, dx, x_t, t, along = trig_tangent(
            nets["student"], teacher, batch, self.times, self.cfg_scale, self.jvp_mode
        )
        rho = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        wide = expand(torch.cos(t) * torch.sin(t), x_t)
        g = -expand(torch.cos(t).pow(2), x_t) * (out.detach() - dx) - rho * (wide * x_t + along)
        return out, g, t

    def loss(self, nets: Nets, batch: Batch, step: int) -> Loss:
        """exp(-w) mean|F - sg(F + g/(|g| + c))|^2 + w with the learnt w(t) (eq. 8)."""
        out, g, t = self.tangent(nets, batch, step)
        target = out.detach() + tangent_normalised(g, self.tangent_c)
        error = (out - target).float().pow(2).flatten(1).mean(1)
        w = nets["logvar"](t / (torch.pi / 2))
        return (torch.exp(-w) * error + w).mean(), logged(scm=g.pow(2).mean().sqrt(), logvar=w.mean())
