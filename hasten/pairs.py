"""What a model makes once, to train on: a teacher's trajectories for regression, pairs of images for preferences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hasten import data as datasets
from hasten.core.denoiser import Batch
from hasten.core.errors import ConfigError
from hasten.core.generate import trajectory
from hasten.core.method import Sampling
from hasten.core.path import expand
from hasten.core.sample import sample
from hasten.data import Conditions, Images, conditions, from_arrays
from hasten.whole import write_tensors


@dataclass(frozen=True, eq=False)
class Pairs:
    """Trajectories [N, points + 1, C, H, W], noise first, with ``labels`` [N] int64 or None; a Source."""

    trajectories: Tensor
    labels: Tensor | None = None
    classes: int = 0
    name: str = "pairs"
    at: tuple[float, ...] = ()  # unit times of the points; none are even ones
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
        return Batch(
            cond, uncond, (n, *self.shape), pairs=self.trajectories[index].to(device), device=device, at=self.at
        )


def make_pairs(
    teacher: Any,
    count: int,
    points: int,
    substeps: int = 16,
    cfg_scale: float | None = None,
    *,
    at: Sequence[float] = (),
    seed: int = 0,
    batch: int = 500,
    device: torch.device | str = "cpu",
) -> Iterator[Pairs]:
    """The pair generator: yields all that is made so far after every ``batch``, so the caller can show progress.

    Args:
        teacher: A native network; labels are drawn uniformly over its classes.
        count: Trajectories to make.
        points: Student steps: a trajectory is kept at ``points`` + 1 unit times.
        substeps: Teacher ``ode`` steps between two of them.
        cfg_scale: The teacher's guidance; None is unguided.
        at: Those unit times, from 1 to 0; none are even ones.
        seed: The same seed makes the same pairs; the global random state is left alone.

    Raises:
        ConfigError: If count, points or substeps is not positive.
    """
    if min(count, points, substeps, batch) < 1:
        raise ConfigError(f"Pairs need positive counts, not {count} trajectories of {points} x {substeps} steps.")
    config = teacher.config
    source = Conditions.of(teacher)
    generator = torch.Generator().manual_seed(seed)
    kept: list[Tensor] = []
    labels: list[Tensor] = []
    for start in range(0, count, batch):
        made = source.batch(min(batch, count - start), generator, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            kept.append(trajectory(teacher, made, points, substeps, cfg_scale, at).cpu())
        labels += [made.cond["label"].cpu()] if config.classes else []
        joined = torch.cat(kept)
        kept = [joined]
        name = f"{count} pairs of seed {seed}"
        yield Pairs(joined, torch.cat(labels) if labels else None, config.classes, name, tuple(at))


# --- preferences ----------------------------------------------------------------------------------------------

BOTH = ("preferred", "rejected")


@dataclass(frozen=True, eq=False)
class Preferences:
    """Pairs of images [N, C, H, W], float32 in [-1, 1]: ``preferred`` to ``rejected`` under the same label; a Source.

    Batches carry both in ``pairs`` [n, 2, ...], and the preferred one as x0, so that methods that know no pairs train
    on it alone.

    Args:
        labels: [N] int64, or None.
        classes: Their number; -1 counts them from the labels.

    Raises:
        ConfigError: As :class:`hasten.Images` does, and where the two differ in shape.
    """

    preferred: Tensor
    rejected: Tensor
    labels: Tensor | None = None
    classes: int = -1
    name: str = "preferences"
    has_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.preferred.shape != self.rejected.shape:
            raise ConfigError(
                f"{self.name}: preferred images are {list(self.preferred.shape)}, but rejected ones are "
                f"{list(self.rejected.shape)}; give one of each for every pair."
            )
        found = Images(self.preferred, self.labels, self.classes, self.name)
        Images(self.rejected, self.labels, found.classes if self.labels is not None else -1, self.name)
        object.__setattr__(self, "classes", found.classes)

    @property
    def shape(self) -> tuple[int, ...]:
        """One sample: (C, H, W)."""
        return tuple(self.preferred.shape[1:])

    def __len__(self) -> int:
        return len(self.preferred)

    def batch(self, n: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Batch:
        """``n`` pairs drawn with replacement from the generator."""
        device = torch.device(device)
        index = torch.randint(len(self), (n,), generator=generator, device=generator.device).cpu()
        cond, uncond = conditions(None if self.labels is None else self.labels[index], self.classes, device)
        both = torch.stack([self.preferred[index], self.rejected[index]], 1).to(device)
        return Batch(cond, uncond, (n, *self.shape), both[:, 0], device, both)

    def save(self, file: File | str) -> None:
        """Write a .safetensors file that :func:`load` reads: whole or not at all."""
        file = File(file)
        if file.suffix.lower() != ".safetensors":
            raise ConfigError(f"Preferences are saved as .safetensors, not as {file.name!r}.")
        tensors = {"preferred": self.preferred, "rejected": self.rejected}
        tensors |= {} if self.labels is None else {"labels": self.labels}
        write_tensors(file, tensors)


def load(spec: str) -> Images | Preferences:
    """:func:`hasten.data.load`, and preferences: a .safetensors or .npz file with ``preferred`` and ``rejected``.

    Images are as :func:`hasten.from_arrays` takes them, ``labels`` [N] integers or absent.

    Raises:
        ConfigError: For a file that cannot be read or lacks one of the two.
    """
    file = File(spec).expanduser()
    if file.suffix.lower() not in (".safetensors", ".npz") or not file.is_file():
        return datasets.load(spec)
    try:
        if file.suffix.lower() == ".npz":
            with np.load(file, allow_pickle=False) as found:
                arrays = {k: found[k] for k in (*BOTH, "labels") if k in found.files}
        else:
            arrays = {k: v.numpy() for k, v in load_file(file).items()}
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ConfigError(f"Cannot read {file.name}: {(str(error).splitlines() or ['it is empty'])[0]}.") from error
    if file.suffix.lower() == ".npz" and not arrays.keys() & set(BOTH):
        return datasets.load(spec)  # plain images
    if missing := [k for k in BOTH if k not in arrays]:
        raise ConfigError(f"{file.name} holds no {missing[0]!r}; preferences need {BOTH[0]!r} and {BOTH[1]!r}.")
    better, worse, labels = arrays["preferred"], arrays["rejected"], arrays.get("labels")
    if better.shape != worse.shape:
        raise ConfigError(f"{file.name}: preferred is {list(better.shape)}, but rejected is {list(worse.shape)}.")
    labels = None if labels is None else np.concatenate([labels, labels])
    both = from_arrays(np.concatenate([better, worse]), labels, name=file.name)
    n = len(better)
    return Preferences(both.x[:n], both.x[n:], None if both.labels is None else both.labels[:n], name=file.name)


Score = Callable[[Tensor, "Tensor | None"], Tensor]  # (images [B, C, H, W] in [-1, 1], labels [B]) -> [B]


@torch.no_grad()
def scored_pairs(
    net: Any,
    sampling: Sampling,
    score: Score,
    count: int,
    *,
    seed: int = 0,
    batch: int = 250,
    device: torch.device | str = "cpu",
) -> Preferences:
    """Two samples per condition, the one with the higher ``score`` preferred; pairs of equal scores are left out.

    Args:
        net: A native network; labels are drawn uniformly over its classes.
        sampling: How to sample it: as it will be used, guidance included.
        score: Any callable from images [B, C, H, W] in [-1, 1] and labels [B] (None without classes) to scores [B]:
            a reward model, a classifier's confidence, a rule.
        count: Pairs to sample.
        seed: The same seed makes the same pairs; the global random state is left alone.

    Raises:
        ConfigError: For a diffusers pipeline, counts below 1, scores that are no finite [B], or that never tell two
            samples apart.
    """
    if min(count, batch) < 1:
        raise ConfigError(f"Pairs need positive counts, not {count} in batches of {batch}.")
    if hasattr(net, "components"):
        raise ConfigError("Pairs are sampled from a native network, not from a diffusers pipeline.")
    config = net.config
    source = Conditions.of(net)
    generator = torch.Generator().manual_seed(seed)
    better: list[Tensor] = []
    worse: list[Tensor] = []
    labels: list[Tensor] = []
    for start in range(0, count, batch):
        made = source.batch(min(batch, count - start), generator, device)
        cond, uncond = ({k: torch.cat([c, c]) for k, c in part.items()} for part in (made.cond, made.uncond))
        n = made.shape[0]
        noise = torch.randn((2 * n, *source.shape), generator=generator).to(device)
        fresh = torch.Generator(torch.device(device)).manual_seed(int(torch.randint(2**62, (), generator=generator)))
        x = sample(net, noise, cond, sampling, uncond=uncond, generator=fresh).clamp(-1, 1)
        value = torch.as_tensor(score(x, cond.get("label"))).detach()
        if value.shape != (2 * n,) or not bool(torch.isfinite(value).all()):
            raise ConfigError(f"A score gives one finite number per image, [{2 * n}], not {list(value.shape)}.")
        (a, b), (of_a, of_b) = x.chunk(2), value.to(x.device).chunk(2)
        first, told = expand(of_a > of_b, a), of_a != of_b
        better.append(torch.where(first, a, b)[told].cpu())
        worse.append(torch.where(first, b, a)[told].cpu())
        labels += [made.cond["label"][told].cpu()] if config.classes else []
    if not sum(map(len, better)):
        raise ConfigError("The score is equal for both images of every pair; it must tell samples apart.")
    label, name = torch.cat(labels) if labels else None, f"pairs of seed {seed}"
    return Preferences(torch.cat(better), torch.cat(worse), label, config.classes if labels else -1, name)
