"""A pipeline's encoders leave memory once every prompt is encoded, and come back bit for bit."""

from __future__ import annotations

import gc
import re
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.errors import CheckpointError, ConfigError
from hasten.models.latents import decoders
from hasten.models.probe import networks


@dataclass(frozen=True, eq=False)
class Kept:
    """A component that was let go: its class, folder, a 64-bit hash of each tensor, and its buffers.

    Files hold few of the buffers, which are small; a cast of the whole component has rounded the others.
    """

    name: str
    kind: Any
    folder: str
    dtype: torch.dtype
    device: torch.device
    hashes: dict[str, int]
    buffers: dict[str, Tensor]


def hashes(module: nn.Module) -> dict[str, int]:
    """A number for every tensor of a module's state."""
    return {k: int(torch.hash_tensor(v).view(torch.int64)) for k, v in module.state_dict().items()}


def free(pipe: Any, folder: str | File | None = None) -> list[Kept]:
    """Drop the pipeline's networks that neither denoise nor decode, its encoders, from memory; see `restore`.

    Args:
        folder: Where those are saved that cannot be read again from where they came: built by hand, quantized, adapted.

    Raises:
        ConfigError: If ``folder`` is needed, or offload hooks hold the networks. Nothing is dropped then.
    """
    if getattr(pipe, "_all_hooks", None):
        raise ConfigError("The pipeline's offload hooks hold its networks; call pipe.remove_all_hooks() before free.")
    stay, freed = {id(m) for m in (*networks(pipe), *decoders(pipe).values())}, []
    parts: Any = [(k, m) for k, m in pipe.components.items() if isinstance(m, nn.Module) and id(m) not in stay]
    for name, part in parts:
        home = getattr(part, "name_or_path", None) or getattr(part.config, "_name_or_path", None) or ""
        plain = [f for f in File(home).glob("*.safetensors") if re.fullmatch(r"\w+(-\d+-of-\d+)?", f.stem)]
        if not home or not plain or any(getattr(part, k, 0) for k in ("is_quantized", "_hf_peft_config_loaded")):
            if folder is None:
                raise ConfigError(
                    f"{name} was not read from a folder of safetensors; give free a folder to save it in."
                )
            home = File(folder) / name
            part.save_pretrained(home)
        buffers = dict(part.named_buffers())
        freed.append(Kept(name, type(part), str(home), part.dtype, part.device, hashes(part), buffers))
    part = parts = None
    pipe.register_modules(**{k.name: None for k in freed})
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return freed


def restore(pipe: Any, freed: list[Kept]) -> None:
    """Read what `free` dropped and put it back, bit for bit.

    Raises:
        CheckpointError: If a folder is gone, or holds other weights than were dropped.
    """
    for k in freed:
        try:
            part = k.kind.from_pretrained(k.folder, dtype=k.dtype, use_safetensors=True, local_files_only=True)
        except OSError as error:
            raise CheckpointError(f"{k.name} cannot be read again from {k.folder}: {error}") from error
        if hashes(part) != k.hashes:
            raise CheckpointError(f"{k.name} in {k.folder} is not what was freed; give free a folder to save it in.")
        pipe.register_modules(**{k.name: part.to(k.device)})
        for path, buffer in k.buffers.items():
            owner, _, leaf = path.rpartition(".")
            part.get_submodule(owner)._buffers[leaf] = buffer
