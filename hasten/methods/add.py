"""ADD: a hinge GAN on features of samples and a score-distillation term. Sauer et al. 2023."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hasten.core.denoiser import Batch, guided
from hasten.core.errors import ConfigError
from hasten.core.generate import noised_data
from hasten.core.heads import PixelFeatures, TokenHeads
from hasten.core.losses import hinge_critic, hinge_generator, logged, r1
from hasten.core.method import Clone, Loss, Nets, Sampling, Turn, even
from hasten.core.times import Times, Uniform


@dataclass(frozen=True)
class ADD:
    """The student denoises noised data in one call; heads on features of its samples and the teacher both judge it.

    The paper's features are a frozen DINOv2's. Nothing is downloaded here: without ``features`` a small convolutional
    network is trained along with the heads. The heads see no condition; it reaches the student through the teacher.
    Samples are a native network's pixels, but a pipeline's latents: they are not decoded, which would cost most memory.

    Args:
        steps: Sampling step counts of the student; it is trained at the times at which these call it.
        times: Where the teacher judges.
        cfg_scale: Guidance of the teacher. None is unguided.
        distill_weight: lambda of eq. 1.
        r1_weight: gamma of the R1 penalty on the heads' inputs for real data (eq. 3).
        features: A frozen module from such samples [B, C, H, W] to a list of ``scales`` token maps
            [B, L, ``width``], its two attributes; only from Python.
        student_every: Discriminator updates per student update.
    """

    steps: tuple[int, ...] = (4,)
    times: Times = field(default_factory=lambda: Uniform(0.02, 0.98))
    cfg_scale: float | None = None
    distill_weight: float = 2.5
    r1_weight: float = 1e-5
    features: nn.Module | None = None
    student_every: int = 1
    needs_data: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if self.features is not None and not all(hasattr(self.features, name) for name in ("width", "scales")):
            raise ConfigError("ADD's features need the attributes width and scales, the sizes of what they return.")

    def networks(self, teacher, clone: Clone):
        """The student starts as the teacher; disc is a head for each scale of the features."""
        features = PixelFeatures(teacher.config.channels) if self.features is None else self.features
        disc = TokenHeads(features.width, features.scales, apart="heads")  # pyright: ignore[reportArgumentType]
        return {"student": clone(teacher), "features": features, "disc": disc, "teacher": teacher}

    @property
    def turns(self) -> tuple[Turn, ...]:
        critics = ("disc", "features") if self.features is None else ("disc",)
        return Turn(critics, self.critic), Turn(("student",), self.student, self.student_every)

    def stages(self, iterations: int):
        """One stage."""
        return ((self, iterations),)

    def sampling(self, steps: int) -> Sampling:
        """Even times, renoised between them."""
        return Sampling(even(steps), "renoise")

    def student(self, nets: Nets, batch: Batch, step: int) -> Loss:
        """-mean D(F(x)) + lambda c(t) mean|x - sg D_teacher(x_t)|^2, with c(t) = alpha_t of a unit-variance path."""
        x = noised_data(nets["student"], batch, self.steps)
        adversarial = hinge_generator(nets["disc"](nets["features"](x)))
        distilled = self.distilled(nets["teacher"], x, batch)
        return adversarial + self.distill_weight * distilled, logged(gan=adversarial, distill=distilled)

    def distilled(self, teacher, x: Tensor, batch: Batch) -> Tensor:
        """Eq. 4: noisier times count less, and the gradient does not pass through the teacher."""
        t = self.times.draw(teacher.path, len(x), x.device)
        with torch.no_grad():
            x_t = teacher.path.mix(x, batch.noise(), t)
            target = guided(teacher, x_t, t, batch.cond, batch.uncond, self.cfg_scale)
        c = torch.cos(teacher.path.angle(t))
        return (c * (x - target).float().pow(2).flatten(1).mean(1)).mean()

    def critic(self, nets: Nets, batch: Batch, step: int) -> Loss:
        """Every head's hinge loss on the student's samples and on data, and R1 on what the heads read."""
        with torch.no_grad():
            x = noised_data(nets["student"], batch, self.steps)
        read, disc = nets["features"], nets["disc"]
        real = read(batch.data)
        loss = adversarial = hinge_critic(disc(real), disc(read(x)))
        if self.r1_weight:
            leaves = [f.detach().requires_grad_() for f in real]
            loss = adversarial + self.r1_weight * r1(disc(leaves), leaves)
        return loss, logged(disc=adversarial)
