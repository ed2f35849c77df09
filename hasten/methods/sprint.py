"""SANA-Sprint: a continuous-time consistency model with a GAN on the frozen teacher's features. Chen et al. 2025."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hasten.core.calculus import Mode, sum_dims
from hasten.core.curriculum import check_warmup, warmup_of
from hasten.core.denoiser import Batch, predict
from hasten.core.errors import ConfigError
from hasten.core.heads import LogVariance, TokenHeads
from hasten.core.losses import hinge_critic, hinge_generator, logged
from hasten.core.method import Clone, Loss, Nets, Sampling, Turn, even
from hasten.core.path import expand
from hasten.core.tangent import trig_tangent, unit_tangent
from hasten.core.times import LogNormal, Times


@dataclass(frozen=True)
class Sprint:
    """sCM keeps the teacher's trajectories, LADD (Sauer et al. 2024) keeps details: heads on the teacher's features.

    Args:
        times: Where the student learns; log tan t is normal.
        disc_times: Noise at which the discriminator judges; lower than ``times``, so that texture counts.
        largest: Share of the samples that the discriminator judges that come from the largest time, where a
            one-step sampler starts (max-time weighting).
        cfg_scale: Guidance of the teacher whose velocity is followed. None is unguided.
        scm_weight, gan_weight: Weights of the two losses of the student.
        warmup: Share of the run, or from 1 on iterations, over which rho, the weight of the unstable part of the
            tangent, rises to 1.
        tangent_c: c of the normalisation g / (|g| + c) with the Euclidean norm.
        taps: Blocks of the teacher whose tokens the heads read; None is four spread over its depth.
    """

    times: Times = field(default_factory=lambda: LogNormal(0.2, 1.6))
    disc_times: Times = field(default_factory=lambda: LogNormal(-0.6, 1.0))
    largest: float = 0.5
    cfg_scale: float | None = None
    scm_weight: float = 1.0
    gan_weight: float = 0.5
    warmup: float = 0.2
    tangent_c: float = 0.1
    taps: tuple[int, ...] | None = None
    jvp_mode: Mode = "auto"
    needs_data: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        check_warmup("Sprint", self.warmup)
        if self.gan_weight <= 0:
            raise ConfigError(f"Sprint needs a gan_weight above 0, not {self.gan_weight}; without a GAN it is scm.")
        if not 0 <= self.largest <= 1:
            raise ConfigError(f"Sprint: largest is a share in [0, 1], not {self.largest}.")

    def networks(self, teacher, clone: Clone):
        """The student starts as the teacher; the discriminator is heads alone, the teacher stays frozen."""
        disc = TokenHeads(teacher.config.width, len(self.tapped(teacher)), apart="tokens")
        return {"student": clone(teacher), "logvar": LogVariance(), "disc": disc, "teacher": teacher}

    @property
    def turns(self) -> tuple[Turn, ...]:
        return Turn(("student", "logvar"), self.student), Turn(("disc",), self.critic)

    def stages(self, iterations: int):
        """One stage, which knows how long its warm-up is."""
        return ((replace(self, warmup=warmup_of("Sprint", self.warmup, iterations)), iterations),)

    def sampling(self, steps: int) -> Sampling:
        """Multistep consistency sampling."""
        return Sampling(even(steps), "renoise")

    def tapped(self, net) -> tuple[int, ...]:
        """The tapped blocks of ``net``."""
        depth = len(net.blocks)
        return self.taps or tuple(sorted({depth * i // 4 - 1 for i in range(1, 5)} - {-1}))

    def student(self, nets: Nets, batch: Batch, step: int) -> Loss:
        """The consistency loss plus the generator's hinge loss -D."""
        scm = self.consistency(nets, batch, step)
        gan = hinge_generator(self.judged(nets, self.generated(nets["student"], batch), batch))
        return self.scm_weight * scm + self.gan_weight * gan, logged(scm=scm, gan=gan)

    def consistency(self, nets: Nets, batch: Batch, step: int) -> Tensor:
        """exp(-w) |F - sg(F + g/(|g| + c))|^2 / tan t + w with the learnt w(t), g that of sCM.

        |.| sums over the dimensions D, so that the error is below 1 for any D. The official code has its mean, 1/D,
        which changes w by log D and no more once w is learnt; until then the GAN would outweigh it D-fold.
        """
        out, dx, x_t, t, along = trig_tangent(
            nets["student"], nets["teacher"], batch, self.times, self.cfg_scale, self.jvp_mode
        )
        rho = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        c, s = torch.cos(t), torch.sin(t)
        g = -expand(c * c, x_t) * (out.detach() - dx) - rho * (expand(c * s, x_t) * x_t + along)
        target = out.detach() + unit_tangent(g, self.tangent_c)
        error = sum_dims((out - target).float().pow(2))
        w = nets["logvar"](t / (torch.pi / 2))
        return (torch.exp(-w) * error * c / s + w).mean()

    def generated(self, student, batch: Batch) -> Tensor:
        """x0 of the student from freshly noised data [B, ...], at the largest time for a share of the batch."""
        path, x0 = student.path, batch.data
        t = self.times.draw(path, len(x0), x0.device)
        t = torch.where(torch.rand_like(t) < self.largest, path.at(torch.ones_like(t)), t)
        return predict(student, path.mix(x0, batch.noise(), t), t, batch.cond)

    def judged(self, nets: Nets, x0: Tensor, batch: Batch) -> Tensor:
        """Logits [B, taps * L] of x0 [B, ...], noised to a fresh time, from the teacher's features there."""
        teacher = nets["teacher"]
        t = self.disc_times.draw(teacher.path, len(x0), x0.device)
        x_t = teacher.path.mix(x0, batch.noise(), t)
        return nets["disc"](predict(teacher, x_t, t, batch.cond, taps=self.tapped(teacher))[1])

    def critic(self, nets: Nets, batch: Batch, step: int) -> Loss:
        """Hinge loss of the heads on data and on the student's samples, each with its own noise and times."""
        with torch.no_grad():
            x = self.generated(nets["student"], batch)
        fake, real = self.judged(nets, x, batch), self.judged(nets, batch.data, batch)
        loss = hinge_critic(real, fake)
        return loss, logged(disc=loss, real=real.mean(), generated=fake.mean())
