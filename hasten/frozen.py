"""Frozen linears in a byte or half a byte a weight, for adapters to be trained on: weight-only int8 and int4.

Dettmers et al. 2023 (QLoRA) train adapters on a rounded backbone; the grids here are the plain symmetric ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from hasten.core.errors import CheckpointError, UnsupportedModel
from hasten.core.packing import from_groups, pack, to_groups, unpack
from hasten.whole import write_tensors

Rounding = Literal["int8", "int4"]
GROUP = 64  # inputs that share a scale in int4
TOP = {"int8": 127, "int4": 7}


def quantize(weight: Tensor, dtype: Rounding) -> tuple[Tensor, Tensor]:
    """A weight [out, in] on a symmetric grid, w = q s with s = max|w| / 127 a row, or max|w| / 7 a group of 64 inputs.

    Returns:
        int8: q [out, in] and s [out, 1] float32. int4: q + 8, two a byte, the first in the low half,
        [out, ceil(in / group) * group / 2] uint8, and s [out, groups] bfloat16; the last group is filled with zeros.
    """
    columns = weight.shape[1]
    if dtype == "int8":
        return to_groups(weight, columns, TOP[dtype])
    q, scale = to_groups(weight, min(GROUP, columns + columns % 2), TOP[dtype], torch.bfloat16)
    return pack(q), scale


def dequantize(packed: Tensor, scale: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight [out, columns] that :func:`quantize` stored, multiplied in float32 and rounded to ``dtype`` once."""
    return from_groups(packed if packed.dtype == torch.int8 else unpack(packed), scale, columns, dtype)


class Product(torch.autograd.Function):
    """x W^T [..., out], or with ``back`` x W [..., in]: what is kept for the backward pass is the packed W alone.

    Its gradient is the other of the two, so that gradients of gradients are as small; W gets none.
    """

    @staticmethod
    def forward(x: Tensor, packed: Tensor, scale: Tensor, columns: int, back: bool) -> Tensor:
        w = dequantize(packed, scale, columns, x.dtype)
        return F.linear(x, w.t() if back else w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the packed weight, for backward and for forward mode."""
        _, packed, scale, ctx.columns, ctx.back = inputs
        ctx.save_for_backward(packed, scale)
        ctx.save_for_forward(packed, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return Product.apply(grads[0], *ctx.saved_tensors, ctx.columns, not ctx.back), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return Product.apply(tangents[0], *ctx.saved_tensors, ctx.columns, ctx.back)


def product(x: Tensor, packed: Tensor, scale: Tensor, columns: int, bias: Tensor | None) -> Tensor:
    """W x + b [..., out] of x [..., in] in x's dtype, or in autocast's, as ``F.linear`` has it."""
    y: Any = Product.apply(x, packed, scale, columns, False)
    return y if bias is None else y + bias.to(y.dtype)


class QuantizedLinear(nn.Linear):
    """A frozen linear whose weight is stored in int8 or int4 and dequantized in every call.

    ``weight`` is computed when it is read, in the dtype that it had.
    """

    packed: nn.Parameter
    scale: nn.Parameter

    def __init__(self, linear: nn.Linear, dtype: Rounding):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        for name, value in zip(("packed", "scale"), quantize(linear.weight, dtype), strict=True):
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.register_parameter("bias", linear.bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out, in]."""
        return dequantize(self.packed, self.scale, self.in_features, self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        return product(input, self.packed, self.scale, self.in_features, self.bias)


# --- a network and back -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rounded:
    """The linears of a network that were rounded in place, and where their weights are as they were.

    Args:
        paths: Names of the linears in ``net``; one at two places has both.
        file: Safetensors with ``PATH`` [out, in] of each.
        hashes: A 64-bit hash of every weight in it.
    """

    net: nn.Module
    dtype: Rounding
    paths: tuple[tuple[str, ...], ...]
    file: File
    hashes: dict[str, int]

    def restore(self) -> None:
        """Put the linears back as they were, bit for bit; once is enough.

        Raises:
            CheckpointError: If the file is gone, or is another one.
        """
        if not isinstance(self.net.get_submodule(self.paths[0][0]), QuantizedLinear):
            return
        try:
            with safe_open(self.file, "pt") as opened:
                weights = {paths[0]: opened.get_tensor(paths[0]) for paths in self.paths}
        except Exception as error:  # safetensors and the file system raise several types
            raise CheckpointError(f"The weights that were rounded cannot be read from {self.file}: {error}.") from error
        if any(number(v) != self.hashes[k] for k, v in weights.items()):
            raise CheckpointError(f"{self.file} does not hold the weights that were rounded; load the pipeline again.")
        for paths in self.paths:
            small: Any = self.net.get_submodule(paths[0])
            linear = nn.Linear(small.in_features, small.out_features, small.bias is not None, device="meta")
            linear.weight, linear.bias = nn.Parameter(weights[paths[0]].to(small.packed.device), False), small.bias
            for path in paths:
                put(self.net, path, linear.train(small.training))


def round_blocks(net: nn.Module, blocks: Sequence[str], dtype: Rounding, file: File) -> Rounded:
    """Replace every linear inside these blocks of ``net`` by a :class:`QuantizedLinear`; see :class:`Rounded`.

    What stands outside of the blocks, the embedders and the first and last projections, is little and stays.

    Args:
        blocks: Names of modules in ``net``.
        file: Gets the weights as they are, from which they come back.

    Raises:
        UnsupportedModel: If there is no linear in them.
        ConfigError: If the file cannot be written. Nothing is changed then.
    """
    found: dict[int, tuple[nn.Linear, list[str]]] = {}
    for path, module in net.named_modules(remove_duplicate=False):
        if type(module) is nn.Linear and any(path.startswith(f"{block}.") for block in blocks):
            found.setdefault(id(module), (module, []))[1].append(path)
    if not found:
        raise UnsupportedModel(f"{type(net).__name__} has no nn.Linear in its blocks to round; drop quantize_base.")
    weights = {paths[0]: linear.weight.detach() for linear, paths in found.values()}
    write_tensors(file, weights)
    hashes = {k: number(v) for k, v in weights.items()}
    del weights
    named = tuple(tuple(paths) for _, paths in found.values())
    for linear, paths in found.values():
        small = QuantizedLinear(linear, dtype).train(linear.training)
        for path in paths:
            put(net, path, small)
    return Rounded(net, dtype, named, file, hashes)


def put(net: nn.Module, path: str, module: nn.Module) -> None:
    """Let ``module`` be at ``path`` in ``net``."""
    parent, _, name = path.rpartition(".")
    net.get_submodule(parent)._modules[name] = module


def number(v: Tensor) -> int:
    """A 64-bit hash of a tensor."""
    return int(torch.hash_tensor(v).view(torch.int64))
