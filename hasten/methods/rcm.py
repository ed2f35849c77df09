"""rCM: a continuous-time consistency model regularised by distribution matching. Zheng et al. 2025."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hasten.core.calculus import Mode, sum_dims
from hasten.core.curriculum import check_warmup, warmup_of
from hasten.core.denoiser import Batch, guided, predict
from hasten.core.errors import ConfigError
from hasten.core.generate import FewStep
from hasten.core.losses import denoising_x0, dmd_gradient, logged
from hasten.core.method import Clone, Loss, Nets, Sampling, Turn, even
from hasten.core.path import expand
from hasten.core.tangent import trig_tangent, unit_tangent
from hasten.core.times import LogNormal, Times


@dataclass(frozen=True)
class RCM:
    """sCM covers the modes on noised data, DMD sharpens the student's own samples; ``fake`` tracks them.

    Args:
        times: Where the consistency loss acts; log tan t is normal.
        compare: Where real and fake are compared, and fake is trained.
        generate: How DMD's samples are made; roll-outs of 1 to 4 steps with their last one trained, as often each.
        cfg_scale: Guidance of the teacher in both losses; the fake is never guided. None is unguided.
        scm_weight, dmd_weight: Weights of two losses summed over dimensions. The gradient of the first has at most
            norm 2 scm_weight, that of the second grows with the square root of the number of dimensions.
        warmup: Share of the run, or from 1 on iterations, over which the weight of x_t in the tangent rises to 1; DMD
            begins after it.
        tangent_c: c of the normalisation g / (|g| + c) with the Euclidean norm.
        student_every: Updates of fake per student update.
    """

    times: Times = field(default_factory=lambda: LogNormal(-0.8, 1.6))
    compare: Times = field(default_factory=lambda: LogNormal(0.0, 1.6))
    generate: FewStep = field(default_factory=lambda: FewStep((1, 2, 3, 4), "last"))
    cfg_scale: float | None = None
    scm_weight: float = 100.0
    dmd_weight: float = 1.0
    warmup: float = 0.2
    tangent_c: float = 0.1
    student_every: int = 5
    jvp_mode: Mode = "auto"
    needs_data: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        check_warmup("RCM", self.warmup)
        if min(self.scm_weight, self.dmd_weight) <= 0:
            raise ConfigError("rCM needs both weights above 0; one loss alone is the method scm or dmd2.")

    def networks(self, teacher, clone: Clone):
        """student and fake start as the teacher."""
        return {"student": clone(teacher), "fake": clone(teacher), "teacher": teacher}

    @property
    def turns(self) -> tuple[Turn, ...]:
        return Turn(("fake",), self.critic), Turn(("student",), self.student, self.student_every)

    def stages(self, iterations: int):
        """One stage, which knows how long its warm-up is."""
        return ((replace(self, warmup=warmup_of("RCM", self.warmup, iterations)), iterations),)

    def sampling(self, steps: int) -> Sampling:
        """Multistep consistency sampling."""
        return Sampling(even(steps), "renoise")

    def student(self, nets: Nets, batch: Batch, step: int) -> Loss:
        """100 |F - sg(F + g)|^2 + |x - sg(x - grad)|^2, both summed over dimensions."""
        scm = self.consistency(nets, batch, step)
        if step < self.warmup:
            return self.scm_weight * scm, logged(scm=scm)
        dmd = self.matching(nets, batch)
        return self.scm_weight * scm + self.dmd_weight * dmd, logged(scm=scm, dmd=dmd)

    def consistency(self, nets: Nets, batch: Batch, step: int) -> Tensor:
        """|F - sg(F + g/(|g| + c))|^2, the warm-up rho scaling only x_t in the tangent, not the JVP.

        g = -cos t sqrt(1 - rho^2 sin^2 t) (F - dx) - rho cos t sin t x_t - JVP; at rho = 1 it is sCM's.
        """
        out, dx, x_t, t, along = trig_tangent(
            nets["student"], nets["teacher"], batch, self.times, self.cfg_scale, self.jvp_mode
        )
        rho = min(1.0, step / self.warmup) if self.warmup else 1.0
        c, s = torch.cos(t), torch.sin(t)
        pull = expand(c * torch.sqrt(1 - (rho * s).pow(2)), x_t)
        g = -pull * (out.detach() - dx) - rho * expand(c * s, x_t) * x_t - along
        target = out.detach() + unit_tangent(g, self.tangent_c)
        return sum_dims((out - target).float().pow(2)).mean()

    def matching(self, nets: Nets, batch: Batch) -> Tensor:
        """DMD of the student's own samples, as a square whose gradient is twice the normalised difference."""
        x = self.generate(nets["student"], batch)
        x_t, t = self.noised(nets["fake"], x, batch)
        with torch.no_grad():
            real = guided(nets["teacher"], x_t, t, batch.cond, batch.uncond, self.cfg_scale)
            fake = predict(nets["fake"], x_t, t, batch.cond)
            target = x - dmd_gradient(real, fake, x)
        return sum_dims((x - target).float().pow(2)).mean()

    def critic(self, nets: Nets, batch: Batch, step: int) -> Loss:
        """Denoising of the student's samples by fake, weighted with 1/sin^2 t."""
        with torch.no_grad():
            x = self.generate(nets["student"], batch)
        x_t, t = self.noised(nets["fake"], x, batch)
        loss = denoising_x0(nets["fake"].path, predict(nets["fake"], x_t, t, batch.cond), x, t)
        return loss, logged(fake=loss)

    def noised(self, net, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """x_t [B, ...] of x with fresh noise, and its t [B]."""
        t = self.compare.draw(net.path, len(x), x.device)
        return net.path.mix(x, batch.noise(), t), t
