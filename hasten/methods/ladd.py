"""LADD: a GAN on the frozen teacher's own features of noised latents. Sauer et al. 2024b."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hasten.core.denoiser import Batch, predict
from hasten.core.generate import noised_data
from hasten.core.heads import TokenHeads, known_blocks
from hasten.core.losses import approximate_r1, hinge_critic, hinge_generator, logged
from hasten.core.method import Clone, Loss, Nets, Sampling, Turn, even
from hasten.core.times import LogitNormal, Times


@dataclass(frozen=True)
class LADD:
    """The student denoises noised data in one call; its samples are noised again and judged by heads on the teacher.

    The real side is the batch's data: pictures, or, as the paper prefers, latents that the guided teacher made, which
    is how guidance and the alignment with a prompt reach the student.

    Args:
        steps: Sampling step counts of the student; it is trained at the times at which these call it.
        times: Where samples are judged: noisy times judge structure, clean ones texture.
        taps: Blocks of the teacher whose tokens the heads read; None is all of them.
        r1_weight, r1_noise: Weight and size a of the approximate R1 penalty, on the noisy input of real data.
        student_every: Discriminator updates per student update.
    """

    steps: tuple[int, ...] = (1, 2, 4)
    times: Times = field(default_factory=lambda: LogitNormal(1.0, 1.0))
    taps: tuple[int, ...] | None = None
    r1_weight: float = 0.0
    r1_noise: float = 0.1
    student_every: int = 1
    needs_data: bool = field(default=True, init=False)

    def networks(self, teacher, clone: Clone):
        """The student starts as the teacher; disc is a head for each tapped block."""
        disc = TokenHeads(teacher.config.width, len(self.tapped(teacher)), apart="tokens")
        return {"student": clone(teacher), "disc": disc, "teacher": teacher}

    @property
    def turns(self) -> tuple[Turn, ...]:
        return Turn(("disc",), self.critic), Turn(("student",), self.student, self.student_every)

    def stages(self, iterations: int):
        """One stage."""
        return ((self, iterations),)

    def sampling(self, steps: int) -> Sampling:
        """Even times, renoised between them."""
        return Sampling(even(steps), "renoise")

    def tapped(self, teacher) -> tuple[int, ...]:
        """The tapped blocks of ``teacher``."""
        return known_blocks(teacher, tuple(range(len(teacher.blocks))) if self.taps is None else self.taps)

    def student(self, nets: Nets, batch: Batch, step: int) -> Loss:
        """-mean D(x_t), differentiated through the teacher's features; there is no distillation term."""
        x = noised_data(nets["student"], batch, self.steps)
        t = self.times.draw(nets["teacher"].path, len(x), x.device)
        x_t = nets["teacher"].path.mix(x, batch.noise(), t)
        loss = hinge_generator(nets["disc"](self.features(nets["teacher"], x_t, t, batch.cond)))
        return loss, logged(gan=loss)

    def critic(self, nets: Nets, batch: Batch, step: int) -> Loss:
        """The hinge loss of every head's every token on the student's samples and on data, noised to the same times."""
        teacher, disc = nets["teacher"], nets["disc"]
        with torch.no_grad():
            x = noised_data(nets["student"], batch, self.steps)
            t = self.times.draw(teacher.path, len(x), x.device)
            x_t, real_t = teacher.path.mix(x, batch.noise(), t), teacher.path.mix(batch.data, batch.noise(), t)
            seen = [x_t, real_t]
            if self.r1_weight:  # on the noisy input (APT, Lin et al. 2025): clean data would change what is judged
                seen.append(real_t + self.r1_noise * batch.noise())
            many = {k: torch.cat([c] * len(seen)) for k, c in batch.cond.items()}  # all of them in one forward
            features = self.features(teacher, torch.cat(seen), torch.cat([t] * len(seen)), many)
        generated, real, *moved = disc(features).chunk(len(seen))
        loss = adversarial = hinge_critic(real, generated)
        if self.r1_weight:
            loss = adversarial + self.r1_weight * approximate_r1(real, moved[0])
        return loss, logged(disc=adversarial)

    def features(self, teacher, x_t: Tensor, t: Tensor, cond) -> list[Tensor]:
        """The teacher's tokens [B, L, D] after each tapped block, never guided."""
        return predict(teacher, x_t, t, cond, taps=self.tapped(teacher))[1]
