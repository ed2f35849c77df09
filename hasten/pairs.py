"""Trajectories that a teacher makes once, as a source to train on: knowledge distillation's pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.core.denoiser import Batch
from hasten.core.errors import ConfigError
from hasten.core.generate import trajectory
from hasten.data import Conditions, conditions


@dataclass(frozen=True, eq=False)
class Pairs:
    """Trajectories [N, points + 1, C, H, W], noise first, with ``labels`` [N] int64 or None; a Source."""

    trajectories: Tensor
    labels: Tensor | None = None
    classes: int = 0
    name: str = "pairs"
    has_data: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, ...]:
        """One sample: (C, H, W)."""
        return tuple(self.trajectories.shape[2:])

    def batch(self, n: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Batch:
        """``n`` trajectories drawn with replacement from the generator, in ``Batch.pairs``."""
        device = torch.device(device)
        index = torch.randint(len(self.trajectories), (n,), generator=generator, device=generator.device).cpu()
        cond, uncond = conditions(None if self.labels is None else self.labels[index], self.classes, device)
        return Batch(cond, uncond, (n, *self.shape), pairs=self.trajectories[index].to(device), device=device)


def make_pairs(
    teacher: Any,
    count: int,
    points: int,
    substeps: int = 16,
    cfg_scale: float | None = None,
    *,
    seed: int = 0,
    batch: int = 500,
    device: torch.device | str = "cpu",
) -> Iterator[Pairs]:
    """The pair generator: yields all that is made so far after every ``batch``, so the caller can show progress.

    Args:
        teacher: A native network; labels are drawn uniformly over its classes.
        count: Trajectories to make.
        points: Student steps: a trajectory is kept at ``points`` + 1 even unit times.
        substeps: Teacher ``ode`` steps between two of them.
        cfg_scale: The teacher's guidance; None is unguided.
        seed: The same seed makes the same pairs; the global random state is left alone.

    Raises:
        ConfigError: If count, points or substeps is not positive.
    """
    if min(count, points, substeps, batch) < 1:
        raise ConfigError(f"Pairs need positive counts, not {count} trajectories of {points} x {substeps} steps.")
    config = teacher.config
    source = Conditions((config.channels, *config.size), config.classes)
    generator = torch.Generator().manual_seed(seed)
    kept: list[Tensor] = []
    labels: list[Tensor] = []
    for start in range(0, count, batch):
        made = source.batch(min(batch, count - start), generator, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            kept.append(trajectory(teacher, made, points, substeps, cfg_scale).cpu())
        labels += [made.cond["label"].cpu()] if config.classes else []
        joined = torch.cat(kept)
        kept = [joined]
        yield Pairs(joined, torch.cat(labels) if labels else None, config.classes, f"{count} pairs of seed {seed}")
