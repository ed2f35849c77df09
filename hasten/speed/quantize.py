"""W8A8: int8 weights with a scale per output channel, int8 activations with a dynamic scale per token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.core.errors import ConfigError, NotReversible, UnsupportedModel
from hasten.speed.host import Host
from hasten.speed.transform import Applied, Transform, one_of

TINY = 1e-12  # keeps the scale of a zero row or channel positive


class Int8Linear(nn.Module):
    """y = s_x s_w (q_x q_w^T) + b with q = round(v / s), s = max|v| / 127: symmetric, one s_x a token, one s_w a row.

    The int32 product (``torch._int_mm``) is exact up to 133,000 inputs. There is no ``weight``, so that code that
    asks for its dtype fails and does not cast activations to int8.
    """

    packed: Tensor  # [out, in] int8
    scale: Tensor  # [out] float32
    bias: Tensor  # [out] float32

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp_min(TINY) / 127
        bias = torch.zeros_like(scale) if linear.bias is None else linear.bias.detach().float().clone()
        self.register_buffer("packed", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out] of the same dtype. Raises ConfigError where a gradient is asked for."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise ConfigError("An int8 layer has no gradient; call the quantized network under torch.no_grad().")
        rows = x.reshape(-1, x.shape[-1])
        s_x = rows.abs().amax(dim=1, keepdim=True).float().clamp_min(TINY) / 127
        q = (rows / s_x).round_().to(torch.int8)
        few = x.is_cuda and len(q) <= 16  # cuBLAS wants more than 16 rows
        product = torch.ops.aten._int_mm(F.pad(q, (0, 0, 0, 17 - len(q))) if few else q, self.packed.t())
        product = product[: len(q)] if few else product
        y = torch.addcmul(self.bias, product.float().mul_(s_x), self.scale)
        return y.to(x.dtype).unflatten(0, x.shape[:-1]) if x.ndim != 2 else y.to(x.dtype)


def _linears(at: Host) -> Iterator[tuple[str, nn.Module, str, nn.Linear]]:
    """(path, parent, name, linear) of every place inside the blocks that holds a linear; shared ones repeat."""
    for where, block in zip(at.names, at.blocks, strict=True):
        for path, parent in block.named_modules():
            for name, child in parent._modules.items():
                if type(child) is nn.Linear:
                    yield ".".join(filter(None, (where, path, name))), parent, name, child


@dataclass(frozen=True)
class Quantize:
    """Linears inside ``blocks`` to W8A8; projections, embedders and modulation (adaLN) stay as they are.

    Args:
        dtype: ``int8``.
        min_side: Both sides of a linear must have at least this many features; below about 512 the rounding of
            the activations costs more than the product saves.
        keep: Keep the originals (on the CPU) for the undo; False drops them, which makes the model small, and
            undo raises NotReversible.
    """

    dtype: str = "int8"
    min_side: int = 512
    keep: bool = True
    name: ClassVar[str] = "quantize"
    order: ClassVar[int] = 10

    def __post_init__(self) -> None:
        one_of("Quantize", "dtype", self.dtype, ("int8",))
        if not isinstance(self.min_side, int) or self.min_side < 1:
            raise ConfigError(f"Quantize: min_side must be a whole number of features from 1, not {self.min_side!r}.")

    def _chosen(self, at: Host) -> list[tuple[nn.Module, str, nn.Linear]]:
        """Places to quantize: large enough, no modulation, and on CUDA in the multiples of 8 that cuBLAS needs."""
        return [
            (parent, name, linear)
            for path, parent, name, linear in _linears(at)
            if "modulation" not in path.split(".")
            and min(linear.weight.shape) >= self.min_side
            and not (linear.weight.is_cuda and any(n % 8 for n in linear.weight.shape))
        ]

    def check(self, at: Host, stack: Sequence[Transform]) -> None:
        found = [(path, linear) for path, _, _, linear in _linears(at)]
        if not found:
            raise UnsupportedModel(f"Quantize: no nn.Linear inside the blocks of {type(at.net).__name__}.")
        for device in {linear.weight.device for _, linear in found}:
            if device.type not in ("cpu", "cuda"):
                raise ConfigError(f"Quantize: there is no int8 product on {device.type}; leave Quantize out.")
            if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
                name = torch.cuda.get_device_name(device)
                raise ConfigError(f"Quantize: {name} is older than compute capability 8.0; leave Quantize out.")
        if not self._chosen(at):
            fit = [(path, linear) for path, linear in found if "modulation" not in path.split(".")] or found
            path, big = max(fit, key=lambda item: min(item[1].weight.shape))
            raise ConfigError(
                f"Quantize: none of {len(found)} linears qualifies; the largest, {path}, is "
                f"{big.in_features}x{big.out_features} and min_side is {self.min_side} "
                "(CUDA also needs multiples of 8); lower min_side or leave Quantize out."
            )

    def apply(self, at: Host) -> Applied:
        """Replace the chosen linears of the network in place."""
        chosen, total = self._chosen(at), len({id(linear) for _, _, _, linear in _linears(at)})
        made: dict[int, Int8Linear] = {}  # a linear at two places stays one
        backs: list[Callable[[], None]] = []
        for parent, name, linear in chosen:
            if id(linear) not in made:
                made[id(linear)] = Int8Linear(linear).train(linear.training)
            parent._modules[name] = made[id(linear)]
            if self.keep:
                backs.append(_back(parent, name, linear, made[id(linear)]))
        count = {"layers": float(len(made)), "of": float(total)}

        def undo() -> None:
            if not self.keep:
                raise NotReversible("Quantize dropped the original weights (keep=False); load the model again.")
            for back in reversed(backs):
                back()

        def inert() -> str | None:
            return None if made else "Quantize: no linear qualified; lower min_side or leave Quantize out."

        return Applied(undo, lambda: dict(count), inert)


def _back(parent: nn.Module, name: str, linear: nn.Linear, small: Int8Linear) -> Callable[[], None]:
    """Park ``linear``'s tensors on the CPU; the result puts the same module back where the network now is."""
    for p in linear.parameters():
        p.data = p.data.cpu()

    def back() -> None:
        for p in linear.parameters():
            p.data = p.data.to(small.packed.device)
        parent._modules[name] = linear

    return back
