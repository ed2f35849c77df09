"""SiD: score identity distillation, data-free, gradient through both denoisers. Zhou et al. 2024."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hasten.core.calculus import mean_dims
from hasten.core.denoiser import Batch, guided, predict
from hasten.core.generate import FewStep
from hasten.core.losses import denoising_x0, logged
from hasten.core.method import Clone, Loss, Nets, Sampling, Turn, even
from hasten.core.times import Times, Uniform


@dataclass(frozen=True)
class SiD:
    """The student minimises the Fisher divergence between real and fake; fake tracks the student.

    Args:
        alpha: 1.2 in SiD, 1.0 in SiDA; with an exact fake the loss is (1 - alpha) E|D_r - D_f|^2.
        cfg_scale: Guidance of the teacher. None is unguided.
        student_every: Critic updates per student update; 2 is steadier than 1.
    """

    generate: FewStep = field(default_factory=FewStep)
    times: Times = field(default_factory=lambda: Uniform(0.02, 0.98))
    alpha: float = 1.2
    cfg_scale: float | None = None
    student_every: int = 2
    needs_data: bool = field(default=False, init=False)

    def networks(self, teacher, clone: Clone):
        """student and fake start as the teacher."""
        return {"student": clone(teacher), "fake": clone(teacher), "teacher": teacher}

    @property
    def turns(self) -> tuple[Turn, ...]:
        return Turn(("fake",), self.critic), Turn(("student",), self.student, self.student_every)

    def stages(self, iterations: int):
        """One stage."""
        return ((self, iterations),)

    def sampling(self, steps: int) -> Sampling:
        """The times of backward simulation, renoised between them."""
        return Sampling(even(steps), "renoise")

    def student(self, nets: Nets, batch: Batch, step: int) -> Loss:
        """Eq. 23: (D_r - D_f) . [(D_r - x) - alpha (D_r - D_f)] / mean|x - D_r|, all differentiated through x_t."""
        x = self.generate(nets["student"], batch)
        x_t, t = self.noised(nets["fake"], x, batch)
        real = guided(nets["teacher"], x_t, t, batch.cond, batch.uncond, self.cfg_scale)
        fake = predict(nets["fake"], x_t, t, batch.cond)
        norm = mean_dims((x - real).detach().abs()).clamp_min(1e-5)
        gap = real - fake
        loss = (gap * ((real - x) - self.alpha * gap) / norm).mean()
        return loss, logged(sid=loss)

    def critic(self, nets: Nets, batch: Batch, step: int) -> Loss:
        """Denoising of the student's samples."""
        with torch.no_grad():
            x = self.generate(nets["student"], batch)
        x_t, t = self.noised(nets["fake"], x, batch)
        loss = denoising_x0(nets["fake"].path, predict(nets["fake"], x_t, t, batch.cond), x, t)
        return loss, logged(fake=loss)

    def noised(self, net, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """x_t [B, ...] of x with fresh noise, and its t [B]."""
        t = self.times.draw(net.path, len(x), x.device)
        return net.path.mix(x, batch.noise(), t), t
