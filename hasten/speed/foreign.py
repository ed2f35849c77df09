"""Weights that another package quantized: torchao, quanto or bitsandbytes, through diffusers' quantization_config."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def packed(v: Tensor) -> bool:
    """Whether this is a package's own type around other tensors; DTensor's parts are plain weights."""
    return hasattr(v, "__tensor_flatten__") and not type(v).__module__.startswith("torch.distributed")


def inner(v: Any) -> Iterator[Tensor]:
    """The plain tensors of which ``v`` consists; itself where it is one."""
    if not packed(v):
        yield v
        return
    for name in v.__tensor_flatten__()[0]:
        yield from inner(getattr(v, name))


def assign(tensor: Any, data: Any) -> None:
    """Give a parameter these values, on their device; to a package's own type an assignment to .data does nothing."""
    if not packed(tensor):
        tensor.data = data
        return
    for name in tensor.__tensor_flatten__()[0]:
        setattr(tensor, name, getattr(data, name))


def quantizer(net: nn.Module) -> str | None:
    """Who quantized ``net``, as diffusers or the types of its weights say; None where nobody did."""
    method = getattr(net, "quantization_method", None)
    if method is not None:
        return str(getattr(method, "value", method))
    return next((type(p).__module__.split(".")[0] for p in net.parameters() if packed(p)), None)
