"""A source of encoded prompts, with latents where there are data: shards on disk, read row by row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as File

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hasten.core.denoiser import Batch
from hasten.core.errors import CheckpointError, ConfigError
from hasten.models.template import SIZE


class Shards:
    """Rows of ``PREFIX-00000.safetensors``, ``PREFIX-00001.safetensors`` ...: {name: [n, ...]} in each.

    Raises:
        CheckpointError: If a shard is missing or cannot be read.
    """

    def __init__(self, folder: File, prefix: str):
        files = sorted(folder.glob(f"{prefix}-*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder} holds no {prefix}-*.safetensors; encode or synthesize again.")
        try:
            self.open = [safe_open(f, "pt") for f in files]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder} holds a truncated shard ({error}); delete it and run again.") from error
        self.names = list(self.open[0].keys())
        sizes = [f.get_slice(self.names[0]).get_shape()[0] for f in self.open]
        self.starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]

    def __len__(self) -> int:
        return self.starts[-1]

    def rows(self, index: Sequence[int]) -> dict[str, Tensor]:
        """{name: [len(index), ...]}, padded conditions only as long as the longest of these rows."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.names}
        for i in index:
            shard = next(k for k, start in enumerate(self.starts[1:]) if i < start)
            at = i - self.starts[shard]
            for name in self.names:
                found[name].append(self.open[shard].get_slice(name)[at : at + 1])
        for name in self.names:
            if name + SIZE in found:
                trimmed = [v[0, : int(n)] for v, n in zip(found[name], found[name + SIZE], strict=True)]
                found[name] = [torch.nn.utils.rnn.pad_sequence(trimmed, batch_first=True)]
        return {name: torch.cat(v) for name, v in found.items()}


@dataclass(frozen=True)
class Encoded:
    """Encoded prompts: conditions of ``encode``, for samples of one shape.

    Args:
        folder: What ``encode`` returned.
        shape: One sample, as the denoiser takes it.
        latents: Folder with ``latents-*.safetensors``, x0 [n, *shape] of every prompt in turn; None without data.
    """

    folder: File
    shape: tuple[int, ...]
    latents: File | None = None
    name: str = "prompts"
    classes: int = 0

    def __post_init__(self) -> None:
        conditions = Shards(self.folder, "conditions")
        try:
            order = json.loads((self.folder / "conditions.json").read_text())["rows"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"{self.folder} holds no whole conditions.json ({error}); delete it and encode again."
            raise CheckpointError(why) from error
        data = Shards(self.latents, "latents") if self.latents else None
        if data is not None and len(data) != len(order):
            raise ConfigError(f"There are {len(data)} latents for {len(order)} prompts; encode or synthesize again.")
        uncond: Mapping[str, Tensor] = {}
        if (self.folder / "uncond.safetensors").is_file():
            with safe_open(self.folder / "uncond.safetensors", "pt") as file:
                uncond = {k: file.get_tensor(k) for k in file.keys()}
        for key, value in {"_conditions": conditions, "_order": order, "_data": data, "_uncond": uncond}.items():
            object.__setattr__(self, key, value)

    @property
    def has_data(self) -> bool:
        return self.latents is not None

    @property
    def prompts(self) -> int:
        """How many there are; one that is there twice counts twice."""
        return len(vars(self)["_order"])

    def batch(self, n: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Batch:
        """``n`` prompts drawn with replacement from the generator."""
        return self.rows(torch.randint(self.prompts, (n,), generator=generator).tolist(), device)

    def rows(self, index: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """These prompts."""
        mine, device, n = vars(self), torch.device(device), len(index)
        cond = {k: v.to(device) for k, v in mine["_conditions"].rows([mine["_order"][i] for i in index]).items()}
        uncond = {}
        for k, v in mine["_uncond"].items():
            if k + SIZE in cond:  # lists: both as long as the longer of the two
                long = max(v.shape[1], cond[k].shape[1])
                v, cond[k] = _padded(v, long), _padded(cond[k], long)
            uncond[k] = v.to(device).expand(n, *v.shape[1:])
        x0 = mine["_data"].rows(index)["x0"].to(device) if mine["_data"] else None
        return Batch(cond, uncond, (n, *self.shape), x0, device)


def _padded(v: Tensor, long: int) -> Tensor:
    return torch.cat([v, v.new_zeros(len(v), long - v.shape[1], *v.shape[2:])], 1) if v.shape[1] < long else v


@dataclass(frozen=True)
class Buckets:
    """Sources of several sizes; every batch is of one of them, drawn in proportion to its number of prompts."""

    sources: tuple[Encoded, ...]
    name: str = "prompts"
    classes: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """One sample of the first size."""
        return self.sources[0].shape

    @property
    def has_data(self) -> bool:
        return all(source.has_data for source in self.sources)

    def batch(self, n: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Batch:
        """``n`` prompts of one size."""
        weights = torch.tensor([float(source.prompts) for source in self.sources])
        return self.sources[int(torch.multinomial(weights, 1, generator=generator))].batch(n, generator, device)
