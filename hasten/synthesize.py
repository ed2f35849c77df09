"""Synthetic data: the guided samples of a pipeline, made once as latents, for methods that train on data."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from hasten.core.errors import CheckpointError, ConfigError
from hasten.core.method import Sampling, even
from hasten.core.sample import sample
from hasten.distribute import digest_of
from hasten.encoded import Encoded
from hasten.models.diffusers import PipelineDenoiser, denoiser
from hasten.models.encode import encode, fingerprint, rows_in
from hasten.models.encoders import free, restore
from hasten.models.probe import networks
from hasten.models.refuse import several
from hasten.prompts import read_prompts, too_long
from hasten.role import autocast
from hasten.run import pick
from hasten.whole import write, write_tensors

Tell = Callable[[str, int, int], None]  # (what, done, wanted)
FORMAT = "hasten-synthetic-1"
DONE, OPEN = "synthetic.json", "unfinished.json"  # the settings of a finished run, and of one that goes on
OTHERS = ("model_index.json", "hasten.json", "model.json", "model", "checkpoints")  # what a folder of samples has not
RULE = "dpmpp_2m"  # of order 2: in as many steps nearer to the model's own distribution than order 1


def synthesize(
    pipe: Any,
    prompts: Any,
    folder: File | str,
    *,
    steps: int = 50,
    count: int | None = None,
    cfg_scale: float | None = None,
    call: Mapping[str, Any] | None = None,
    batch: int = 4,
    seed: int = 0,
    device: torch.device | str = "cpu",
    shard: int = 64,
    precision: str = "auto",
    whole: bool = True,
    tell: Tell = lambda what, done, total: None,
) -> File:
    """Sample ``pipe`` for every prompt and keep the latents, which ``distill(..., data=folder)`` trains on.

    An interrupted run goes on at its last whole shard and ends with the very same bits: the noise of sample i is a
    function of (seed, i) alone. A shard that is gone or cannot be read is made again. The encoders are out of memory
    while samples are made. Sampled by DPM-Solver++(2M) (Lu et al. 2022) at the even unit times of the pipeline's own
    path, its shift included.

    Args:
        prompts: What ``read_prompts`` takes, or class labels for a class-conditional pipeline.
        folder: Gets ``latents-00000.safetensors`` ... with x0 [n, *shape], the conditions, and ``synthetic.json``.
        steps: Network evaluations per sample; twice as many under guidance.
        count: Samples; more than there are prompts take them in turn. None is one of each.
        cfg_scale: w in u + w (c - u); None is the scale that the pipeline's call applies, 1 is none.
        call: How the pipeline is called, in values that JSON can hold: height, width, negative_prompt ...
        batch: Samples at a time. Another one rounds differently, in the last bits.
        shard: Samples a file.
        precision: ``auto``, ``float32`` or ``bfloat16``, as in training.
        whole: Read the encoders back at the end; a program that ends then can do without.
        tell: Called with (what, done, wanted) as it goes on.

    Returns:
        The folder.

    Raises:
        ConfigError: For counts below 1, no prompts, no such device, a folder that holds something else, or a guidance
            that the pipeline's call has not.
        CheckpointError: If the folder holds samples of another pipeline or other settings.
        UnsupportedModel: If the pipeline cannot be learnt.
    """
    low = [
        k
        for k, v in {"steps": steps, "count": count, "batch": batch, "shard": shard}.items()
        if v is not None and v < 1
    ]
    if low:
        raise ConfigError(f"{low[0]} of a synthesis must be at least 1.")
    folder, device = File(folder).expanduser(), pick(str(device))
    call = plain(call or {})
    several(call)
    net = denoiser(pipe.to(device), call)
    texts = subjects(prompts, net)
    if net.found.subject == "prompt":
        too_long([v for k, v in pipe.components.items() if "tokenizer" in k], texts, stacklevel=3)
    texts = [texts[i % len(texts)] for i in range(count or len(texts))]
    scale = net.found.cfg_scale if cfg_scale is None else float(cfg_scale)
    guidable(net, scale)
    about = {
        **identity(pipe), "path": repr((net.path.name, *net.path.args)), "call": call, "shape": list(net.shape),
        "prompts": texts, "steps": steps, "rule": RULE, "cfg_scale": scale, "seed": seed, "shard": shard,
        "precision": precision,
    }  # fmt: skip
    if begun(folder, about):
        tell("sampling", len(texts), len(texts))
        return folder
    place = encode(pipe, net, texts, folder, tell=lambda done, total: tell("encoding prompts", done, total))
    source = Encoded(place, net.shape)
    sampling = Sampling(even(steps), RULE, cfg_scale=scale)
    freed = free(pipe, folder / "encoders")
    try:
        for k, start in enumerate(range(0, len(texts), shard)):
            file, stop = folder / f"latents-{k:05d}.safetensors", min(start + shard, len(texts))
            if rows_in(file) != stop - start:
                rows = []
                for first in range(start, stop, batch):
                    index = range(first, min(first + batch, stop))
                    with autocast(precision, device):
                        rows.append(drawn(net, source, index, sampling, seed, device).cpu())
                    tell("sampling", index.stop, len(texts))
                write_tensors(file, {"x0": torch.cat(rows)})
            tell("sampling", stop, len(texts))
    finally:
        if whole:
            restore(pipe, freed)
        shutil.rmtree(folder / "encoders", ignore_errors=True)
    os.replace(folder / OPEN, folder / DONE)
    return folder


def drawn(
    net: PipelineDenoiser, source: Encoded, index: Sequence[int], sampling: Sampling, seed: int, device: torch.device
) -> Tensor:
    """x0 [len(index), *shape] of these samples."""
    batch = source.rows(index, device)
    noise = torch.stack([noise_of(seed, i, net.shape) for i in index]).to(device)
    return sample(net, noise, batch.cond, sampling, uncond=batch.uncond or None)


def noise_of(seed: int, i: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise [*shape] of sample ``i``, made on the CPU: the same on every device and in any batch."""
    key = hashlib.blake2b(repr(("synthesize", seed, i)).encode(), digest_size=8).digest()
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1))


def guidable(net: PipelineDenoiser, scale: float | None) -> None:
    """Raise ConfigError for a guidance scale other than 1 where the pipeline's call has no unconditional condition."""
    if scale not in (None, 1) and net.uncond is None:
        raise ConfigError(
            f"A cfg_scale of {scale:g} needs an unconditional condition, and this pipeline's call has no "
            "classifier-free guidance; give the call a guidance scale above 1, and a negative_prompt where the "
            "pipeline wants one, or leave cfg_scale out."
        )


def subjects(prompts: Any, net: PipelineDenoiser) -> list[Any]:
    """The prompts, or the class labels where the pipeline takes those. Raises ConfigError where they are neither."""
    if net.found.subject == "prompt":
        return read_prompts(prompts)
    return classes(prompts if isinstance(prompts, Sequence) and not isinstance(prompts, str) else read_prompts(prompts))


def classes(labels: Sequence[Any]) -> list[int]:
    """Class labels as numbers. Raises ConfigError for one that is none."""
    try:
        return [int(label) for label in labels]
    except ValueError as error:
        raise ConfigError(f"This pipeline takes class labels, whole numbers, not {error}.") from error


def plain(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call as JSON gives it back, so that it is equal when read again. Raises ConfigError where it holds no such."""
    try:
        return json.loads(json.dumps(dict(call)))
    except TypeError as error:
        raise ConfigError(f"The call of a synthesis is kept as JSON, which cannot hold it ({error}).") from error


def identity(pipe: Any) -> dict[str, Any]:
    """What tells a pipeline from another: hashes of its class and encoders, and of its denoisers."""
    weights = (p.flatten()[:16] for net in networks(pipe) for p in net.parameters())
    return {"format": FORMAT, "pipeline": fingerprint(pipe), "network": digest_of(weights)}


def begun(folder: File, about: Mapping[str, Any]) -> bool:
    """Whether ``folder`` holds all samples of this run, every shard readable; a new run's settings are written there.

    Raises:
        ConfigError: If it holds a model or a run.
        CheckpointError: If it holds samples of another run.
    """
    name = next((n for n in (DONE, OPEN) if (folder / n).is_file()), None)
    if name is None:
        if other := next((n for n in OTHERS if (folder / n).exists()), None):
            raise ConfigError(f"{folder} holds a model or a run ({other}); choose another output folder for samples.")
        if any(folder.glob("latents-*.safetensors")):
            raise CheckpointError(f"{folder} holds latents of unknown origin; choose another output folder.")
        write(folder / OPEN, lambda file: file.write_text(json.dumps(about, indent=1)))
        return False
    found = read(folder / name)
    differ = [k for k, v in about.items() if found.get(k) != v]
    if differ:
        k = differ[0]
        short = isinstance(about[k], (int, float))
        what = f"its {k} is {found.get(k)}, this run's is {about[k]}" if short else f"its {k} is not the same"
        raise CheckpointError(f"{folder} belongs to another run: {what}; choose another output folder or delete it.")
    if name == DONE and not complete(folder, about):
        os.replace(folder / DONE, folder / OPEN)
        return False
    return name == DONE


def complete(folder: File, about: Mapping[str, Any]) -> bool:
    """Whether every shard of a synthesis is there and can be read, its conditions included."""
    count, shard = len(about["prompts"]), about["shard"]
    latents = [rows_in(folder / f"latents-{k:05d}.safetensors") for k in range(-(-count // shard))]
    conditions = [rows_in(f) for f in folder.glob("conditions-*/conditions-*.safetensors")]
    return latents == [min(shard, count - i) for i in range(0, count, shard)] and sum(conditions) == len(
        dict.fromkeys(about["prompts"])
    )


def read(file: File) -> dict[str, Any]:
    """The settings in a file. Raises CheckpointError where it cannot be read."""
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); delete {file.parent} and synthesize again.") from error


def synthetic(data: Any) -> File | None:
    """The folder that ``data`` names, where it is one of a synthesis, finished or not."""
    folder = File(data).expanduser() if isinstance(data, (str, File)) else None
    return folder if folder and any((folder / name).is_file() for name in (DONE, OPEN)) else None


def describe(folder: File | str, pipe: Any) -> tuple[list[Any], dict[str, Any]]:
    """The prompts of a finished synthesis, one for every sample, and the call with which ``pipe`` made them.

    Raises:
        CheckpointError: If the folder is unfinished, or of another pipeline.
    """
    folder = File(folder).expanduser()
    if not (folder / DONE).is_file():
        what = "is unfinished; the same synthesis goes on" if (folder / OPEN).is_file() else "holds no synthetic data"
        raise CheckpointError(f"{folder} {what}.")
    found, mine = read(folder / DONE), identity(pipe)
    differ = [k for k, v in mine.items() if found.get(k) != v]
    if differ:
        raise CheckpointError(
            f"{folder} was made by another pipeline, or by this one in another precision: its {differ[0]} is not the "
            "same; synthesize again."
        )
    return found["prompts"], found["call"]
