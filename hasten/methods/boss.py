"""BOSS: the teacher's best few times, then its trajectory straightened between them. Nguyen, Nguyen & Nguyen 2024."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch

from hasten.core.bellman import best_times
from hasten.core.denoiser import Batch, on_path
from hasten.core.errors import ConfigError
from hasten.core.generate import trajectory
from hasten.core.losses import logged
from hasten.core.method import Clone, Loss, Nets, Sampling, Turn, even
from hasten.core.path import RECTIFIED_FLOW


@dataclass(frozen=True)
class BOSS:
    """Dynamic programming finds the times (section 3), then the student learns the velocity of each hop (section 4).

    Where the teacher's few steps err least, the student has least to change. It is trained where it will be called and
    nowhere else: at the start of a hop, on the straight line to its end. On rectified flow that is the mean velocity
    (x_t - x_s)/(t - s); other paths are seen as rectified flow through OnPath.

    Args:
        steps: Student steps; a pairs source must hold trajectories of as many hops, ``at`` their times.
        at: Their unit times from 1 to 0. Empty: :meth:`settled` finds them before training.
        substeps: Teacher ``ode`` steps per hop, where trajectories are made on the fly.
        cfg_scale: Guidance of the teacher. None is unguided.
        fine: Even steps out of which the times are chosen (K_max, 100 in the paper).
        count: Trajectories that their local errors are averaged over (100 in the paper).
    """

    steps: int = 4
    at: tuple[float, ...] = ()
    substeps: int = 16
    cfg_scale: float | None = None
    fine: int = 100
    count: int = 100
    needs_data: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if min(self.steps, self.substeps, self.count) < 1 or self.fine < self.steps:
            raise ConfigError(
                f"BOSS needs positive steps, substeps and counts, and no more steps than fine ones, not {self.steps}, "
                f"{self.substeps}, {self.count} and {self.fine}."
            )
        if not self.at:
            return
        falls = all(t > s for t, s in pairwise(self.at)) and (self.at[0], self.at[-1]) == (1.0, 0.0)
        if not falls or len(self.at) != self.steps + 1:
            raise ConfigError(
                f"BOSS' {self.steps} steps need {self.steps + 1} times falling from 1 to 0; without at they are found."
            )

    @property
    def ready(self) -> bool:
        """Whether the times are there."""
        return bool(self.at)

    def settled(
        self, teacher: Any, source: Any, device: Any = "cpu", *, batch: int = 25,
        tell: Callable[[int, int], None] = lambda done, total: None,
    ) -> BOSS:  # fmt: skip
        """Itself with the times whose ``ode`` steps stray least from the teacher's trajectory in fine ones.

        It costs ``fine`` x ``count`` predictions of the teacher, ``batch`` at a time, at most 25.
        """
        if self.at:
            return self
        if self.steps in (1, self.fine):
            return replace(self, at=even(self.steps))
        size = min(batch, 25)
        found = best_times(teacher, source, self.steps, self.fine, self.count, size, self.cfg_scale, device, tell=tell)
        return replace(self, at=found)

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
        """``ode`` steps ``at`` its times; even ones until those are found."""
        if steps != self.steps:
            raise ConfigError(f"BOSS is trained at the times of {self.steps} steps; ask for those, not for {steps}.")
        return Sampling(self.at or even(steps))

    def loss(self, nets: Nets, batch: Batch, step: int) -> Loss:
        """mean|u(x_t, t) - (eps - x0)|^2 at the start of a random hop, (x0, eps) being what both ends contain."""
        if not self.at:
            raise ConfigError("BOSS has no times yet; train method = hasten.settled(method, teacher).")
        path, net = nets["student"].path, on_path(nets["student"], RECTIFIED_FLOW, "velocity")
        pairs = batch.pairs
        if pairs is None:
            pairs = trajectory(nets["teacher"], batch, self.steps, self.substeps, self.cfg_scale, self.at)
        if pairs.shape[1] != self.steps + 1 or batch.pairs is not None and batch.at != self.at:
            raise ConfigError(f"BOSS needs pairs at its own {self.steps + 1} times; make_pairs takes them as at.")
        rows = torch.arange(len(pairs), device=pairs.device)
        i = torch.randint(0, self.steps, (len(pairs),), device=pairs.device)
        edges = path.at(torch.tensor(self.at, device=pairs.device))
        x_t, x_s, t, s = pairs[rows, i], pairs[rows, i + 1], edges[i], edges[i + 1]
        x0, eps = path.chord(x_t, x_s, t, s, "x0"), path.chord(x_t, x_s, t, s, "eps")
        start = net.path.time(path.angle(t))
        velocity = net(net.path.mix(x0, eps, start), start, batch.cond)
        loss = (velocity - (eps - x0)).float().pow(2).mean()
        return loss, logged(boss=loss)
