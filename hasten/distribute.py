"""Copies of networks, model folders, checkpoints, and what little plain data parallelism needs."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path as File
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hasten.core.errors import CheckpointError, ConfigError, UnsupportedModel
from hasten.core.method import Sampling
from hasten.core.path import named_path
from hasten.lora import LoRA, adapters, is_view, merge, shared, view
from hasten.models.dit import DiT, DiTConfig
from hasten.qat import plain
from hasten.whole import recover, sync, write


def clone(net: Any, second_time: bool = False, lora: LoRA | None = None) -> Any:
    """A trainable copy of ``net``; ``second_time`` adds a zero-initialised r embedding, so it starts equal to net.

    With ``lora``, or of a network that has adapters already, it is a :func:`hasten.lora.view`: it shares the weights
    and owns adapters. The rounding of quantization-aware training is not copied. A copy of half-precision weights is
    float32: Adam and an average stand still in bfloat16.

    Raises:
        UnsupportedModel: If a second time is asked for and the network cannot take one.
    """
    if second_time and not hasattr(net, "with_second_time"):
        raise UnsupportedModel(f"{type(net).__name__} cannot take a second time r; choose a method with one time.")
    if lora or is_view(net):
        twin = view(net, lora, second_time)
    else:
        twin = plain(net.with_second_time() if second_time else copy.deepcopy(net))
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in twin.parameters()):
            twin = twin.float()
    return twin.requires_grad_(True).train()


def alike(teacher: Any, start: Any) -> None:
    """Raise ConfigError where ``start`` cannot be an earlier student of ``teacher``."""
    if not hasattr(start, "path"):
        raise ConfigError(f"start is a network, such as hasten.load('runs/first'), not {start!r}.")
    if is_view(start):
        raise ConfigError("start has adapters on weights of another network; give hasten.merge(start).")
    theirs, mine = (f"{n.kind} on {n.path.name}{n.path.args or ''}" for n in (start, teacher))
    if theirs != mine:
        raise ConfigError(f"start predicts {theirs}, the teacher {mine}; give a student of the same teacher.")
    shapes = [replace(n.config, second_time=False) for n in (start, teacher) if isinstance(n.config, DiTConfig)]
    if shapes[1:] and shapes[0] != shapes[1]:
        raise ConfigError("start is another network than the teacher; give a student of the same teacher.")


def begin(nets: Mapping[str, Any], start: Any) -> None:
    """Give the student among ``nets`` the weights of ``start``; an r that start lacks acts on nothing at first.

    Raises:
        ConfigError: If the student cannot have them: they are of another network, or it is one of adapters.
    """
    student = nets["student"]
    if "teacher" not in nets:
        raise ConfigError("This method, as it is set, learns from no teacher; give start as its teacher instead.")
    if is_view(student):
        raise ConfigError("Adapters start on the teacher's own weights; set fit.clone to full, or leave start out.")
    alike(nets["teacher"], start)
    twice, had = (bool(getattr(net, "span", None)) for net in (student, start))
    if had and not twice:
        raise ConfigError("start has learnt a second time r, which this method's student has not; choose another one.")
    try:
        student.load_state_dict(clone(start, second_time=twice).state_dict())
    except RuntimeError as error:  # of a network without a DiTConfig; torch lists every key
        raise ConfigError("start is another network than the teacher; give a student of the same teacher.") from error
    share(student)


def world() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) outside torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average gradients over the ranks in one flat reduction: plain data parallelism."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if world()[1] == 1 or not grads:
        return
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= world()[1]
    for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        g.copy_(part.view_as(g))


def share(net: nn.Module) -> None:
    """Give every rank the first one's weights, so that all start equal however each made its own."""
    if world()[1] > 1:
        for tensor in (*net.parameters(), *net.buffers()):
            dist.broadcast(tensor.data, 0)


# --- files ----------------------------------------------------------------------------------------------------


def write_folder(folder: File, tensors: dict[str, Tensor], meta: dict[str, Any], name: str) -> None:
    """Write ``name``.safetensors and ``name``.json into ``folder``: whole or not at all, also when the disk fills."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder)
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    for left in (partial, old):  # by a process that was killed here
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir()
    try:
        weights = partial / f"{name}.safetensors"
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, weights)
        sync(weights)
        meta = {**meta, "sha256": digest(weights)}
        (partial / f"{name}.json").write_text(json.dumps({**meta, "self": seal(meta)}, indent=1))
        sync(partial / f"{name}.json")
        if folder.exists():  # a rename cannot replace a full folder: set the old one aside first
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:  # an interrupt too leaves nothing half-written
        shutil.rmtree(partial, ignore_errors=True)
        recover(folder)
        if not isinstance(error, SafetensorError):
            raise
        code = re.search(r"os error (\d+)", str(error))  # all that it says of why, such as a full disk
        known = (
            (int(code[1]), os.strerror(int(code[1])), str(folder)) if code else (f"Could not write {folder}: {error}",)
        )
        raise OSError(*known) from error


def digest(file: File) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest_of(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the tensors' bytes, in hexadecimal."""
    found = hashlib.sha256()
    for t in tensors:
        found.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def seal(meta: dict[str, Any]) -> str:
    """SHA-256 of metadata as JSON, so that a flipped bit in it is found too."""
    return hashlib.sha256(json.dumps(meta).encode()).hexdigest()


def read_folder(folder: File, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of :func:`write_folder`.

    Raises:
        CheckpointError: If files are missing, truncated or not what was written.
    """
    recover(folder)
    weights, described = folder / f"{name}.safetensors", folder / f"{name}.json"
    if not weights.is_file() or not described.is_file():
        raise CheckpointError(
            f"{folder} holds no {name}.safetensors with {name}.json; give a folder that hasten wrote."
        )
    try:
        meta = json.loads(described.read_text())
        with safe_open(weights, "pt"):
            pass
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is truncated or corrupt ({error}); delete it to use an earlier one."
        ) from error
    whole = isinstance(meta, dict) and meta.pop("self", "") == seal(meta)
    for file, same in ((described, whole), (weights, whole and meta["sha256"] == digest(weights))):
        if not same:
            raise CheckpointError(f"{file} is not the file that was written (its checksum differs); delete {folder}.")
    return load_file(weights), meta


def save_model(
    net: Any, folder: File | str, samplings: dict[int, Sampling] | None = None, extra: dict[str, Any] | None = None
) -> None:
    """Save a native network as ``model.safetensors`` and ``model.json``: shape, path, kind and how to sample it.

    The adapters of a view are merged into its weights.

    Raises:
        ConfigError: If the network is not native, or its path cannot be named, so that it could not be loaded again.
    """
    net = merge(net)
    if not isinstance(net, DiT):
        raise ConfigError(
            f"save_model saves hasten's own networks, not {type(net).__name__}: export a pipeline's student with "
            "save_pretrained, and save a wrapped module by its own class."
        )
    meta = {
        "format": "hasten-model-1",
        "config": asdict(net.config),
        "path": {"name": named_path(net.path.name, net.path.args).name, "args": list(net.path.args)},
        "kind": net.kind,
        "samplings": {str(k): asdict(v) for k, v in (samplings or {}).items()},
        "extra": extra or {},
    }
    write_folder(File(folder), dict(net.state_dict()), meta, "model")


def load_model(folder: File | str, device: torch.device | str = "cpu") -> DiT:
    """The network that :func:`save_model` wrote, in eval mode. Raises CheckpointError for anything else."""
    tensors, meta = read_folder(File(folder), "model")
    try:
        config = {**meta["config"], "size": tuple(meta["config"]["size"])}
        net = DiT(DiTConfig(**config), named_path(meta["path"]["name"], meta["path"]["args"]), meta["kind"])
        net.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError, ConfigError) as error:
        what = str(error).splitlines()[0]
        raise CheckpointError(f"{folder} is not a model of this version of hasten ({what}).") from error
    return net.to(device).eval()


def read_samplings(folder: File | str) -> dict[int, Sampling]:
    """How the model in ``folder`` wants to be sampled, by step count."""
    try:
        return {int(k): Sampling(**{**v, "times": tuple(v["times"])}) for k, v in _about(folder)["samplings"].items()}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a model of this version of hasten ({error}).") from error


def add_sampling(folder: File | str, sampling: Sampling) -> None:
    """Let the model in ``folder`` be sampled by ``sampling`` in its number of steps; its weights stay as they are.

    Raises:
        CheckpointError: If the folder holds no model.
    """
    folder = File(folder)
    meta = {**_about(folder)}
    meta["samplings"] = {**meta["samplings"], str(len(sampling.times) - 1): asdict(sampling)}
    write(folder / "model.json", lambda file: file.write_text(json.dumps({**meta, "self": seal(meta)}, indent=1)))


def read_extra(folder: File | str) -> dict[str, Any]:
    """What was saved beside the model in ``folder``: recipe, data, iterations."""
    return _about(folder)["extra"]


PEFT = "base_model.model."  # what peft puts before every name


def save_adapter(net: Any, folder: File | str) -> None:
    """Save what a view owns, and not the weights that it shares: ``adapter_model``, and peft's own description of it.

    Raises:
        ConfigError: If ``net`` is no view.
    """
    if not is_view(net):
        raise ConfigError("This network has no adapters; save_model saves it whole.")
    lora, own = adapters(net), net.state_dict()
    tensors = {PEFT + re.sub(r"\.(lora_[AB])$", r".\1.weight", k): v for k, v in own.items()}
    linears = [k.removesuffix(".lora_A") for k in own if k.endswith(".lora_A")]
    whole = sorted({k.split(".")[0] for k, _ in net.named_parameters() if not k.endswith((".lora_A", ".lora_B"))})
    meta = {**asdict(lora), "second_time": bool(whole), "weights": _weights_of(net)}
    write_folder(File(folder), tensors, {"format": "hasten-adapter-1", **meta}, "adapter_model")
    config = {"peft_type": "LORA", "r": lora.rank, "lora_alpha": lora.scale * lora.rank, "target_modules": linears}
    peft = File(folder) / "adapter_config.json"
    peft.write_text(json.dumps({**config, "modules_to_save": whole or None}, indent=1))


def load_adapter(net: Any, folder: File | str, moved: bool = False) -> Any:
    """The view of ``net`` whose adapters :func:`save_adapter` wrote, in eval mode.

    Args:
        moved: Take them as they are although ``net`` has other weights of the same shapes than those they were trained
            on: a preference that the teacher learnt, on its student.

    Raises:
        CheckpointError: If the folder holds something else, or adapters of other weights than those of ``net``.
    """
    tensors, meta = read_folder(File(folder), "adapter_model")
    own = {re.sub(r"\.(lora_[AB])\.weight$", r".\1", k.removeprefix(PEFT)): v for k, v in tensors.items()}
    try:
        twin = clone(net, meta["second_time"], LoRA(meta["rank"], meta["alpha"]))
        twin.load_state_dict(own)
    except (KeyError, TypeError, RuntimeError) as error:
        what = str(error).splitlines()[0]
        raise CheckpointError(f"{folder} holds no adapters for this network ({what}).") from error
    if not moved and meta["weights"] != _weights_of(twin):
        raise CheckpointError(
            f"The adapters in {folder} belong to other weights; load the model they were trained on, or say moved=True."
        )
    return twin.requires_grad_(False).eval()


def _weights_of(net: Any) -> str:
    found = shared(net)
    return digest_of(found[k] for k in sorted(found))


def _about(folder: File | str) -> dict[str, Any]:
    meta = read_folder(File(folder), "model")[1]
    if meta.get("format") != "hasten-model-1":
        raise CheckpointError(f"{folder} is not a model of this version of hasten (no format hasten-model-1).")
    return meta


def checkpoints(out: File) -> list[File]:
    """The complete checkpoints under ``out``, oldest first."""
    for old in (out / "checkpoints").glob(".*.old"):
        recover(old.with_name(old.name[1:-4]))
    return sorted(p for p in (out / "checkpoints").glob("[0-9]*") if p.is_dir())


def save_checkpoint(out: File, done: int, tensors: dict[str, Tensor], meta: dict[str, Any], keep: int = 2) -> File:
    """Write checkpoint ``done``, then drop all but the newest ``keep``, later ones (of a run before) and leftovers."""
    folder = out / "checkpoints" / f"{done:08d}"
    if world()[0] == 0:
        write_folder(folder, tensors, {"format": "hasten-checkpoint-1", **meta}, "state")
        mine = [p for p in checkpoints(out) if p.name <= folder.name][-keep:]
        for other in (out / "checkpoints").iterdir():
            if other not in mine:
                shutil.rmtree(other, ignore_errors=True)
    if world()[1] > 1:
        dist.barrier()
    return folder


def load_checkpoint(out: File, fingerprint: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint under ``out``, or None where there is none.

    Raises:
        CheckpointError: If it is truncated, or was written by a run with another ``fingerprint``.
    """
    found = checkpoints(out)
    if not found:
        return None
    tensors, meta = read_folder(found[-1], "state")
    theirs = meta.get("fingerprint", {})
    differ = [k for k in sorted({*fingerprint, *theirs}) if fingerprint.get(k) != theirs.get(k)]
    if differ:
        k = differ[0]
        raise CheckpointError(
            f"{found[-1]} belongs to another run: its {k} is {theirs.get(k)!r}, this run's is {fingerprint.get(k)!r}; "
            "choose another output folder or delete it."
        )
    return tensors, meta
