"""How a student makes a sample during training, and a teacher its trajectories."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hasten.core.denoiser import Batch, guided, predict
from hasten.core.errors import ConfigError
from hasten.core.method import even
from hasten.core.sample import Hop, ode


@dataclass(frozen=True)
class FewStep:
    """Backward simulation (DMD2, Yin et al. 2024b, section 4.5): the student's own earlier steps are its input.

    Each roll-out draws a step count and an exit hop; hops before it run without a graph and renoise, so the
    network is trained on exactly the inputs that it will see when it samples.

    Args:
        steps: Sampling step counts to train for, drawn at random; one that is there twice is drawn twice as often.
        exits: ``any`` trains every hop of a roll-out with equal chance, ``last`` the final one only.
    """

    steps: tuple[int, ...] = (1,)
    exits: str = "any"

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) < 1:
            raise ConfigError(f"FewStep needs step counts of at least 1, not {self.steps}.")
        if self.exits not in ("any", "last"):
            raise ConfigError(f"FewStep exits are 'any' or 'last', not {self.exits!r}.")

    def __call__(self, student, batch: Batch) -> Tensor:
        """x0 [B, ...] with a graph through the exit hop."""
        return self.exit(student, batch)[0]

    def exit(self, student, batch: Batch) -> tuple[Tensor, float]:
        """The same, and the unit time of the exit hop."""
        n = random.choice(self.steps)  # Python's generator decides control flow: the same on every rank
        exit_at = random.randrange(n) if self.exits == "any" else n - 1
        times = student.path.at(torch.tensor(even(n), device=batch.device))
        x = batch.noise() * student.path.coeffs(times[0])[1]
        for i in range(exit_at):
            with torch.no_grad():
                x0 = predict(student, x, times[i], batch.cond)
                x = student.path.mix(x0, batch.noise(), times[i + 1])
        return predict(student, x, times[exit_at], batch.cond), even(n)[exit_at]


def noised_data(student, batch: Batch, steps: tuple[int, ...]) -> Tensor:
    """x0 [B, ...] predicted from noised data, at times at which a student of ``steps`` sampling steps is called.

    Every sample draws a step count, then one of its times: with (1, 2, 4), pure noise has a chance of 7 in 12.

    Raises:
        ConfigError: For no step counts, or one below 1.
    """
    if not steps or min(steps) < 1:
        raise ConfigError(f"Step counts must be at least 1, not {steps}.")
    n, device = len(batch.data), batch.device
    counts = torch.tensor(steps, device=device)[torch.randint(len(steps), (n,), device=device)]
    hop = (torch.rand(n, device=device) * counts).long()
    t = student.path.at(1 - hop / counts)
    return predict(student, student.path.mix(batch.data, batch.noise(), t), t, batch.cond)


@torch.no_grad()
def trajectory(
    net, batch: Batch, points: int, substeps: int, cfg_scale: float | None, at: Sequence[float] = ()
) -> Tensor:
    """A teacher's ``ode`` trajectories from fresh noise at ``points`` + 1 unit times: [B, points + 1, ...].

    Args:
        substeps: ``ode`` steps between two points.
        cfg_scale: The teacher's guidance.
        at: The unit times, from 1 to 0; none are even ones.

    Raises:
        ConfigError: If ``at`` are not as many as the points.
    """
    if at and len(at) != points + 1:
        raise ConfigError(f"A trajectory of {points} hops has {points + 1} times, not {len(at)}.")
    between = [t + (s - t) * j / substeps for t, s in pairwise(at) for j in range(substeps)]
    units = [*between, at[-1]] if at else even(points * substeps)
    times = net.path.at(torch.tensor(units, device=batch.device))
    x = batch.noise() * net.path.coeffs(times[0])[1]
    kept = [x]
    look = lambda x, t: guided(net, x, t, batch.cond, batch.uncond, cfg_scale, net.kind)  # noqa: E731
    for i in range(points * substeps):
        x = ode(Hop.between(net.path, net.kind, look, batch.noise, x, times[i], times[i + 1]))
        if (i + 1) % substeps == 0:
            kept.append(x)
    return torch.stack(kept, dim=1)


def pair_error(student, teacher, batch: Batch, substeps: int, cfg_scale: float | None) -> Tensor:
    """mean|G(z) - x0|^2, z and x0 being the ends of the teacher's trajectories (DMD, Yin et al. 2024a, eq. 9).

    Args:
        substeps, cfg_scale: Of the trajectories that are made here; a batch with pairs brings its own.
    """
    pairs = trajectory(teacher, batch, 1, substeps, cfg_scale) if batch.pairs is None else batch.pairs
    x0 = predict(student, pairs[:, 0], student.path.at(1.0), batch.cond)
    return (x0 - pairs[:, -1]).float().pow(2).mean()
