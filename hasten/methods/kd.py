"""Knowledge distillation: regress on the teacher's own trajectories, data-free. Luhman & Luhman 2021."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hasten.core.denoiser import Batch, predict
from hasten.core.generate import trajectory
from hasten.core.losses import logged
from hasten.core.method import Clone, Loss, Nets, Sampling, Turn, even


@dataclass(frozen=True)
class KD:
    """Each of ``steps`` student hops regresses on the teacher's many small ones over the same stretch.

    Args:
        steps: Student steps; a pairs source must hold trajectories of as many hops.
        substeps: Teacher ``ode`` steps per hop, where trajectories are made on the fly.
        cfg_scale: Guidance of the teacher on the fly. None is unguided.
    """

    steps: int = 1
    substeps: int = 16
    cfg_scale: float | None = None
    needs_data: bool = field(default=False, init=False)

    def networks(self, teacher, clone: Clone):
        """The student starts as the teacher."""
        return {"student": clone(teacher), "teacher": teacher}

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student",), self.loss),)

    def stages(self, iterations: int):
        """One stage."""
        return ((self, iterations),)

    def sampling(self, steps: int) -> Sampling:
        """Even ``ode`` steps, as many as it was distilled to."""
        return Sampling(even(steps))

    def loss(self, nets: Nets, batch: Batch, step: int) -> Loss:
        """mean|x0 - x~0|^2 at a random hop, x~0 being that of the chord from its start to its end."""
        student = nets["student"]
        path, pairs = student.path, batch.pairs
        if pairs is None:
            pairs = trajectory(nets["teacher"], batch, self.steps, self.substeps, self.cfg_scale)
        hops = pairs.shape[1] - 1
        i = torch.randint(0, hops, (len(pairs),), device=pairs.device)
        rows = torch.arange(len(pairs), device=pairs.device)
        t, s = (path.at(1 - (i + ahead) / hops) for ahead in (0, 1))
        x_t, x_s = pairs[rows, i], pairs[rows, i + 1]
        target = path.chord(x_t, x_s, t, s, "x0")
        loss = (predict(student, x_t, t, batch.cond) - target).float().pow(2).mean()
        return loss, logged(kd=loss)
