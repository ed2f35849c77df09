"""What quantization keeps in safetensors: networks without their originals, and the calls of a calibration."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path as File
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hasten.core.errors import CheckpointError, ConfigError
from hasten.speed.foreign import quantizer
from hasten.speed.linears import KINDS, Branched, Ranged, describe, rebuild
from hasten.whole import write

FORMAT = "hasten-quantized-1"


def save_quantized(net: nn.Module, file: File | str) -> None:
    """Write a network with quantized linears: its state, and in the header how each of them was made.

    Args:
        net: A native network, or a pipeline's denoiser (``pipe.transformer``, ``pipe.unet``), inside ``speed_up`` or
            after it with ``keep=False``.

    Raises:
        ConfigError: If nothing is quantized, if another package quantized some of it, if weights change with the time
            (``ranges`` above 1), or if the file cannot be written.
    """
    if owner := quantizer(net):
        raise ConfigError(
            f"{type(net).__name__} holds weights of {owner}, which are no part of hasten's format; write them with its "
            "own save_pretrained, or with save_prequantized inside speed_up, or quantize the originals by hasten."
        )
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for path, module in net.named_modules(remove_duplicate=False):
        if isinstance(module, Ranged):
            raise ConfigError("A network with weights for several ranges of times cannot be saved; use ranges=1.")
        if isinstance(module, (Branched, *KINDS.values())):
            found.setdefault(id(module), (module, []))[1].append(path)
    inside = {id(m.inner) for m, _ in found.values() if isinstance(m, Branched)}
    listed = [{"paths": paths, **describe(m)} for key, (m, paths) in found.items() if key not in inside]
    if not listed:
        raise ConfigError(
            f"{type(net).__name__} has no quantized linear; save it inside speed_up, or quantize it with keep=False."
        )
    tensors = {name: v.detach().cpu().contiguous().clone() for name, v in net.state_dict().items()}
    about = {"format": FORMAT, "network": type(net).__name__, "linears": listed}
    write(file, lambda partial: save_file(tensors, partial, metadata={"hasten": json.dumps(about)}))


def load_quantized(net: Any, file: File | str) -> Any:
    """Put a file of :func:`save_quantized` into a network of the same architecture, whose own weights are dropped.

    The network may be on the meta device, so that the original never is in memory.

    Returns:
        ``net``.

    Raises:
        CheckpointError: If the file cannot be read, is no such file, or is of another network.
    """
    try:
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {}).get("hasten", "{}"))
            tensors = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors and the file system raise several types
        raise CheckpointError(f"Cannot read the quantized network {file}: {error}.") from error
    if about.get("format") != FORMAT:
        raise CheckpointError(f"{file} is no quantized network of hasten's; write one with save_quantized.")
    if about["network"] != type(net).__name__:
        raise CheckpointError(f"{file} holds a {about['network']}, not a {type(net).__name__}.")
    places = [(path, values) for values in about["linears"] for path in values["paths"]]
    modules = dict(net.named_modules(remove_duplicate=False))
    for path, values in places:
        old = modules.get(path)
        if not isinstance(old, nn.Linear) or (old.in_features, old.out_features) != (values["in"], values["out"]):
            raise CheckpointError(f"{file} is of another network: {path} is no linear of its sizes.")
    for values in about["linears"]:
        module = rebuild(values)
        for path in values["paths"]:
            parent, _, name = path.rpartition(".")
            net.get_submodule(parent)._modules[name] = module.train(net.training)
    try:
        net.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{file} is of another network: {error}") from error
    left = [name for name, v in [*net.named_parameters(), *net.named_buffers()] if v.is_meta]
    if left:
        raise CheckpointError(f"{left[0]} is no part of the file; build the {type(net).__name__} off the meta device.")
    return net


# --- arguments of calls ---------------------------------------------------------------------------------------------


def plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A call's argument as JSON; its tensors, each content once, go into ``tensors``."""
    if isinstance(value, Tensor):
        v = value.detach().cpu().contiguous()
        key = f"call:{int(torch.hash_tensor(v.float() if v.is_floating_point() else v).view(torch.int64))}"
        key += f":{tuple(v.shape)}:{v.dtype}"
        if key in tensors and not torch.equal(tensors[key], v):
            key += f":{len(tensors)}"
        tensors[key] = tensors.get(key, v.clone())
        return {"tensor": key}
    if isinstance(value, Mapping):
        return {"dict": {k: plain(v, tensors) for k, v in value.items()}}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [plain(v, tensors) for v in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise ConfigError(f"A call with a {type(value).__name__} cannot be written; calibrate with calls=0.")


def unplain(value: Any, read: Callable[[str], Tensor]) -> Any:
    """The inverse of :func:`plain`."""
    ((kind, inner),) = value.items()
    match kind:
        case "tensor":
            return read(inner)
        case "dict":
            return {k: unplain(v, read) for k, v in inner.items()}
        case "list" | "tuple":
            found = [unplain(v, read) for v in inner]
            return found if kind == "list" else tuple(found)
    return inner
