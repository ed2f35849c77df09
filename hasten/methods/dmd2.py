"""DMD2: distribution matching with a GAN on the fake's features and backward simulation. Yin et al. 2024b."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hasten.core.calculus import surrogate
from hasten.core.denoiser import Batch, guided, predict
from hasten.core.divergences import check, density_weight, score_gradient
from hasten.core.errors import ConfigError
from hasten.core.generate import FewStep, pair_error
from hasten.core.heads import TokenHeads
from hasten.core.losses import approximate_r1, critic_gan, denoising_x0, generator_gan, logged
from hasten.core.method import Clone, Loss, Nets, Sampling, Turn, even
from hasten.core.path import expand
from hasten.core.times import Times, Uniform


@dataclass(frozen=True)
class DMD2:
    """``fake`` tracks the student's samples, ``disc`` reads fake's features, the student follows both.

    Args:
        generate: How the student makes a sample; ``FewStep`` simulates its own earlier steps.
        times: Where real and fake are compared.
        cfg_scale: Guidance of the teacher; the fake is never guided. None is unguided.
        gan_weight, critic_gan_weight: The generator's (None is 3e-3 exactly when there is data, 0 off), the critic's.
        r1_weight, r1_noise: Weight and size a of the approximate R1 penalty, on the noisy input of real data.
        taps: Blocks whose tokens the discriminator reads; None is the middle and the last.
        student_every: Critic updates per student update.
        divergence: Matched by f-distill (Xu et al. 2025): each sample counts h(r), r from the discriminator's logits;
            ``spread`` in the log is the standard deviation of h, whose mean is 1.
        bins: Intervals of time within which f-distill divides r by its mean over the batch.
        weight: Of fake minus real: ``normalised``, or ``x0`` or ``kl`` without normaliser (Diff-Instruct, Luo 2023).
        regression: Weight of |G(z) - x0|^2 on the teacher's pairs (DMD, Yin et al. 2024a: 0.25, with LPIPS).
        substeps: ``ode`` steps of such a pair, where it is made on the fly; a pairs source brings its own.
    """

    generate: FewStep = field(default_factory=FewStep)
    times: Times = field(default_factory=lambda: Uniform(0.02, 0.98))
    cfg_scale: float | None = None
    gan_weight: float | None = None
    critic_gan_weight: float = 1e-2
    r1_weight: float = 0.0
    r1_noise: float = 0.1
    taps: tuple[int, ...] | None = None
    student_every: int = 5
    divergence: str = "reverse_kl"
    bins: int = 10
    weight: str = "normalised"
    regression: float = 0.0
    substeps: int = 16
    steps: int = field(default=1, init=False)  # hops of a pair

    def __post_init__(self) -> None:
        check(self.divergence, self.weight)
        if self.divergence != "reverse_kl" and self.gan_weight == 0:
            raise ConfigError(f"divergence {self.divergence!r} reads the discriminator; leave gan_weight above 0.")

    @property
    def needs_data(self) -> bool:
        return bool(self.gan_weight) or self.divergence != "reverse_kl"

    def networks(self, teacher, clone: Clone):
        """student and fake start as the teacher; disc is new."""
        nets = {"student": clone(teacher), "fake": clone(teacher), "teacher": teacher}
        if self.gan_weight != 0:
            nets["disc"] = TokenHeads(teacher.config.width, len(self.tapped(teacher)))
        return nets

    @property
    def turns(self) -> tuple[Turn, ...]:
        critics = ("fake",) if self.gan_weight == 0 else ("fake", "disc")
        return Turn(critics, self.critic), Turn(("student",), self.student, self.student_every)

    def stages(self, iterations: int):
        """One stage."""
        return ((self, iterations),)

    def sampling(self, steps: int) -> Sampling:
        """The times of backward simulation, renoised between them."""
        return Sampling(even(steps), "renoise")

    def tapped(self, net) -> tuple[int, ...]:
        """The tapped blocks of ``net``."""
        depth = len(net.blocks)
        return self.taps or tuple(sorted({depth // 2, depth - 1}))

    def gan(self, batch: Batch) -> float:
        """The generator's GAN weight on this batch."""
        if self.needs_data and batch.x0 is None:
            raise ConfigError("gan_weight needs data to discriminate against; give data, or gan_weight=0.")
        usual = 3e-3 if batch.x0 is not None else 0.0
        return usual if self.gan_weight is None else self.gan_weight

    def student(self, nets: Nets, batch: Batch, step: int) -> Loss:
        """Eq. 8 of DMD as a surrogate whose gradient with respect to x is the normalised score difference."""
        x = self.generate(nets["student"], batch)
        x_t, t = self.noised(nets["fake"], x, batch)
        weight, path = self.gan(batch), nets["fake"].path
        with torch.no_grad():
            real = guided(nets["teacher"], x_t, t, batch.cond, batch.uncond, self.cfg_scale)
        if weight:  # one forward of fake serves the score and the features
            fake, features = predict(nets["fake"], x_t, t, batch.cond, taps=self.tapped(nets["fake"]))
            logits = nets["disc"](features)
            adversarial = generator_gan(logits)
            h = density_weight(self.divergence, logits, path.angle(t) / (torch.pi / 2), self.bins)
        else:
            with torch.no_grad():
                fake, adversarial, h = predict(nets["fake"], x_t, t, batch.cond), x.new_zeros(()), torch.ones_like(t)
        grad = expand(h, x) * score_gradient(self.weight, path, t, real, fake.detach(), x.detach())
        loss = surrogate(x, grad) + weight * adversarial
        spread = {} if self.divergence == "reverse_kl" else {"spread": h.std(unbiased=False)}  # near 0 this is DMD2
        log = logged(dmd=grad.abs().mean(), gan=adversarial, **spread)
        if self.regression:
            gap = pair_error(nets["student"], nets["teacher"], batch, self.substeps, self.cfg_scale)
            loss, log = loss + self.regression * gap, log | logged(pairs=gap)
        elif batch.pairs is not None:
            raise ConfigError("These pairs would not be used; set regression (0.25 in DMD), or train without pairs.")
        return loss, log

    def critic(self, nets: Nets, batch: Batch, step: int) -> Loss:
        """Denoising of the student's samples by fake, and the discriminator's loss on its features."""
        with torch.no_grad():
            x = self.generate(nets["student"], batch)
        x_t, t = self.noised(nets["fake"], x, batch)
        if not self.gan(batch):
            loss = denoising_x0(nets["fake"].path, predict(nets["fake"], x_t, t, batch.cond), x, t)
            return loss, logged(fake=loss)
        taps, disc = self.tapped(nets["fake"]), nets["disc"]
        real_t = nets["fake"].path.mix(batch.data, batch.noise(), t)
        twice = {k: torch.cat([c, c]) for k, c in batch.cond.items()}  # samples and data in one forward of 2B
        pred, features = predict(nets["fake"], torch.cat([x_t, real_t]), torch.cat([t, t]), twice, taps=taps)
        loss = denoising_x0(nets["fake"].path, pred[: len(x)], x, t)
        generated, real = disc(features).chunk(2)
        adversarial = critic_gan(real, generated)
        total = loss + self.critic_gan_weight * adversarial
        if self.r1_weight:  # on the noisy input (APT, Lin et al. 2025): clean data would change what is judged
            near = real_t + self.r1_noise * batch.noise()
            moved = disc(predict(nets["fake"], near, t, batch.cond, taps=taps)[1])
            total = total + self.r1_weight * approximate_r1(real, moved)
        return total, logged(fake=loss, disc=adversarial)

    def noised(self, net, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """x_t [B, ...] of x with fresh noise, and its t [B]."""
        t = self.times.draw(net.path, len(x), x.device)
        return net.path.mix(x, batch.noise(), t), t
