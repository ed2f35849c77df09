"""A diffusers pipeline from a folder or the hub, in the dtypes in which it is stored."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path as File
from typing import Any

import torch
from safetensors import safe_open

from hasten.core.errors import ConfigError

HUB = {  # what the hub's errors mean, the narrower first
    "GatedRepoError": "it is gated: accept its terms on its page and log in with `hf auth login`",
    "RepositoryNotFoundError": "the hub has none of that name, or it is private; check the id, or `hf auth login`",
    "OfflineModeIsEnabled": "it is not in the local cache, and the hub is switched off (HF_HUB_OFFLINE)",
    "LocalEntryNotFoundError": "it is not in the local cache, and the hub cannot be reached",
    "ConnectionError": "it is not in the local cache, and the hub cannot be reached",
    "TransportError": "it is not in the local cache, and the hub cannot be reached",  # httpx, for huggingface_hub
}
FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")


def load_pipeline(name: str, device: torch.device | str = "cpu") -> Any:
    """A ``DiffusionPipeline`` from a folder or the hub, every component in the dtype in which it is stored.

    A CPU computes float16 in few of its layers, so there such components are float32.

    Raises:
        ConfigError: For a single file, a folder that holds none, or a hub id that is missing, gated or cannot be
            reached.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    place = File(name).expanduser()
    if place.suffix.lower() in FILES:
        raise ConfigError(
            f"{name!r} names a single file, and a pipeline is a folder or a hub id; write it as a folder once, with "
            "from_single_file and save_pretrained of its diffusers pipeline."
        )
    if place.is_dir() and not (place / "model_index.json").is_file():
        raise ConfigError(f"{name!r} is no diffusers pipeline: it holds no model_index.json.")
    try:
        folder = place if place.is_dir() else File(DiffusionPipeline.download(name))
        dtypes, source = stored(folder, torch.device(device)), str(place) if place.is_dir() else name
        return DiffusionPipeline.from_pretrained(source, dtype=dtypes)
    except Exception as error:  # the hub and diffusers raise a dozen types for what is missing, gated or offline
        raise ConfigError(f"Cannot load the pipeline {name!r}: {why(error)}.") from error


def why(error: BaseException | None) -> str:
    """What is wrong at the bottom of an error of the hub or of diffusers, which hides it behind one of its own."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    kinds = {cls.__name__ for e in chain for cls in type(e).__mro__}
    known = next((sentence for kind, sentence in HUB.items() if kind in kinds), None)
    return known or (str(chain[0]).splitlines() or ["?"])[0].rstrip(".")


def stored(folder: File, device: torch.device) -> dict[str, torch.dtype]:
    """The dtype of most numbers of every component; diffusers knows no ``auto`` and would take float32 for all."""
    half = torch.float32 if device.type == "cpu" else torch.float16
    known = {"F64": torch.float64, "F32": torch.float32, "F16": half, "BF16": torch.bfloat16}
    found = {}
    for part in (p for p in folder.iterdir() if p.is_dir()):
        counts: Counter[str] = Counter()
        for file in (f for f in part.glob("*.safetensors") if "." not in f.stem):  # model.fp16 is a variant
            with safe_open(file, "pt") as weights:
                for tensor in map(weights.get_slice, weights.keys()):
                    counts[tensor.get_dtype()] += math.prod(tensor.get_shape())
        most = max(known, key=counts.__getitem__)  # of floats: quantized weights are stored as integers or in 8 bits
        if counts[most]:
            found[part.name] = known[most]
    return {"default": torch.float32, **found}
