"""Linears with rounded weights, and rounded activations where the chip multiplies those; what stands in for nn.Linear.

Each is made from a linear and its settings, on the meta device too, so that a file's tensors can be put into it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.core.errors import ConfigError
from hasten.core.packing import TINY, from_groups, pack, to_groups, unpack
from hasten.speed.foreign import packed
from hasten.speed.grids import E4M3, TOP8, Tiled, decode, encode, nearest
from hasten.speed.host import Host
from hasten.speed.int8 import Int8Linear

RANGE: ContextVar[int] = ContextVar("hasten_range", default=0)  # of times, to which the running call belongs


def places(at: Host) -> Iterator[tuple[str, nn.Module, str, nn.Linear]]:
    """(path, parent, name, linear) of every place in the blocks with a linear not quantized yet; shared ones repeat."""
    for where, block in zip(at.names, at.blocks, strict=True):
        for path, parent in block.named_modules():
            for name, child in parent._modules.items():
                if type(child) is nn.Linear and not packed(child.weight):  # another package's is left to it
                    yield ".".join(filter(None, (where, path, name))), parent, name, child


def without_gradient(x: Tensor) -> None:
    """Raise ConfigError where a gradient is asked for: the rounding has none."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise ConfigError("A quantized layer has no gradient; call the quantized network under torch.no_grad().")


class Rounded(nn.Module):
    """What they share: shapes, and a bias that is zero where the linear has none. There is no ``weight``."""

    bias: Tensor  # [out] float32

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        zero = torch.zeros(linear.out_features, device=linear.weight.device)
        self.register_buffer("bias", zero if linear.bias is None else linear.bias.detach().float().clone())


class Int8WeightLinear(Rounded):
    """W8A16: y = s (x q^T) + b, q [out, in] int8, s = max|w| / 127 a row. Activations keep their dtype."""

    packed: Tensor  # [out, in] int8
    scale: Tensor  # [out] float32

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        packed, scale = to_groups(linear.weight, linear.in_features, 127)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale[:, 0])

    def weights(self) -> Tensor:
        return self.packed * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out] of the same dtype."""
        without_gradient(x)
        return torch.addcmul(self.bias, F.linear(x, self.packed.to(x.dtype)).float(), self.scale).to(x.dtype)


class StaticInt8Linear(Int8WeightLinear):
    """W8A8 with one activation scale from a calibration: no pass over the activations to find it. Larger ones clip."""

    step: Tensor  # [] float32: of the activations' grid

    def __init__(self, linear: nn.Linear, high: float = 1.0):
        super().__init__(linear)
        self.register_buffer("step", torch.full((), max(high / 127, TINY), device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out] of the same dtype."""
        without_gradient(x)
        q = (x.reshape(-1, x.shape[-1]) / self.step.view(1)).round_().clamp_(-127, 127).to(torch.int8)
        rows = len(q)
        if x.is_cuda and rows <= 16:  # cuBLAS wants more than 16 rows
            q = F.pad(q, (0, 0, 0, 17 - rows))
        product = torch.ops.aten._int_mm(q, self.packed.t())[:rows]
        return torch.addcmul(self.bias, product.float(), self.scale * self.step).to(x.dtype).view(*x.shape[:-1], -1)


class Int4WeightLinear(Rounded):
    """W4A16: q of -7 to 7, two a byte, with a bfloat16 scale for each group of inputs; dequantized in every call."""

    packed: Tensor  # [out, ceil(in / group) * group / 2] uint8
    scale: Tensor  # [out, ceil(in / group)] bfloat16

    def __init__(self, linear: nn.Linear, group: int = 64):
        super().__init__(linear)
        self.group = group
        q, scale = to_groups(linear.weight, group, 7, torch.bfloat16)
        self.register_buffer("packed", pack(q))
        self.register_buffer("scale", scale)

    def weights(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return from_groups(unpack(self.packed), self.scale, self.in_features, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out] of the same dtype."""
        without_gradient(x)
        return F.linear(x, self.weights(x.dtype), self.bias.to(x.dtype))


class FloatLinear(Rounded):
    """FP8, MXFP8 or NVFP4 on both sides of the product, by a form of :data:`hasten.speed.grids.TILES`.

    Args:
        fast: ``torch._scaled_mm`` (forms ``tensor`` and ``row``); else the same numbers are multiplied in float32,
            which is slow and runs anywhere.
    """

    values: Tensor
    scale: Tensor
    outer: Tensor

    def __init__(self, linear: nn.Linear, form: str = "row", fast: bool = False):
        super().__init__(linear)
        self.form, self.fast = form, fast
        for name, tensor in encode(linear.weight.detach(), form, 0)._asdict().items():
            self.register_buffer(name, tensor)

    def weights(self) -> Tensor:
        return decode(Tiled(self.values, self.scale, self.outer), self.form, self.in_features, 0)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out] of the same dtype; ``row`` goes through bfloat16, as torch's product does."""
        without_gradient(x)
        rows = x.reshape(-1, x.shape[-1])
        if not self.fast:
            y = F.linear(nearest(rows, self.form), self.weights(), self.bias)
        else:
            high = rows.abs().amax(1, keepdim=True) if self.form == "row" else rows.abs().amax().view(1, 1)
            scale = (high.float() / TOP8).clamp_min(TINY)
            q = (rows / scale).clamp_(-TOP8, TOP8).to(E4M3)
            product: Any = torch.ops.aten._scaled_mm
            y = product(q, self.values.t(), scale, self.scale.t(), out_dtype=torch.bfloat16) + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)


class Branched(nn.Module):
    """y = inner(x / s) + (x / s) down^T up^T: smoothed channels and what a low-rank branch carries, either or both."""

    shrink: Tensor | None  # [in] float32: 1 / s
    down: Tensor | None  # [rank, in]
    up: Tensor | None  # [out, rank]

    def __init__(self, inner: nn.Module, shrink: Tensor | None, down: Tensor | None = None, up: Tensor | None = None):
        super().__init__()
        self.inner = inner
        for name, tensor in (("shrink", shrink), ("down", down), ("up", up)):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out] of the same dtype."""
        x = x if self.shrink is None else x * self.shrink.to(x.dtype)
        y = self.inner(x)
        if self.down is None or self.up is None:
            return y
        return y + F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


class Ranged(nn.Module):
    """A linear for each range of times, of which RANGE says the one that runs."""

    def __init__(self, parts: Sequence[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out] of the same dtype."""
        return self.parts[RANGE.get()](x)


# --- from and to plain values -------------------------------------------------------------------------------------

KINDS: dict[str, Any] = {
    "int8": Int8Linear,
    "int8_static": StaticInt8Linear,
    "int8_weights": Int8WeightLinear,
    "int4_weights": Int4WeightLinear,
    "float": FloatLinear,
}


def weights(module: Any) -> Tensor:
    """The rounded weight [out, in] float32 of any of KINDS."""
    return module.packed * module.scale[:, None] if isinstance(module, Int8Linear) else module.weights()


def describe(module: Any) -> dict[str, Any]:
    """Plain values from which :func:`rebuild` makes a module of the same shapes."""
    if isinstance(module, Branched):
        rank = 0 if module.down is None else len(module.down)
        return describe(module.inner) | {"smooth": module.shrink is not None, "rank": rank}
    kind = next(name for name, cls in KINDS.items() if type(module) is cls)
    out, into = module.packed.shape if kind == "int8" else (module.out_features, module.in_features)
    settings = {k: getattr(module, k) for k in ("group", "form", "fast") if hasattr(module, k)}
    return {"kind": kind, "in": into, "out": out, "settings": settings, "smooth": False, "rank": 0}


def rebuild(values: dict[str, Any]) -> nn.Module:
    """The module of :func:`describe`, on the meta device."""
    linear = nn.Linear(values["in"], values["out"], device="meta")
    inner = KINDS[values["kind"]](linear, **values["settings"])
    rank, empty = values["rank"], lambda *shape: torch.empty(*shape, device="meta")  # noqa: E731
    if not values["smooth"] and not rank:
        return inner
    branch = (empty(rank, values["in"]), empty(values["out"], rank)) if rank else (None, None)
    return Branched(inner, empty(values["in"]) if values["smooth"] else None, *branch)
