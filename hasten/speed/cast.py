"""Weights and activations in bfloat16: half the memory, and several times the matmuls where the chip has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hasten.core.errors import ConfigError, NotReversible
from hasten.speed.transform import Applied, Transform, one_of, override


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Every floating tensor in nested tuples, lists and mappings as ``dtype``; labels and masks stay."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {k: _cast(v, dtype) for k, v in value.items()}
    return type(value)(_cast(v, dtype) for v in value) if isinstance(value, (tuple, list)) else value


@dataclass(frozen=True)
class Cast:
    """Parameters to ``dtype``; samples and conditions are cast on the way in, outputs back to the caller's dtype.

    Times stay in float32 (8 bits of mantissa would merge neighbouring steps), and so do buffers.

    Args:
        dtype: ``bfloat16``.
        keep: Keep the originals (on the CPU) for the undo; False drops them, and undo raises NotReversible.
    """

    dtype: str = "bfloat16"
    keep: bool = True
    name: ClassVar[str] = "cast"
    order: ClassVar[int] = 12

    def __post_init__(self) -> None:
        one_of("Cast", "dtype", self.dtype, ("bfloat16",))

    def _chosen(self, net: nn.Module) -> list[nn.Parameter]:
        return [p for p in net.parameters() if p.is_floating_point() and p.dtype != torch.bfloat16]

    def check(self, net: nn.Module, stack: Sequence[Transform]) -> None:
        chosen = self._chosen(net)
        if not chosen:
            raise ConfigError("Cast: every parameter is bfloat16 already; leave Cast out.")
        for device in {p.device for p in chosen if p.device.type == "cuda"}:
            if torch.cuda.get_device_capability(device) < (8, 0):
                name = torch.cuda.get_device_name(device)
                raise ConfigError(f"Cast: {name} has no bfloat16 (it needs compute capability 8.0); leave Cast out.")

    def apply(self, net: nn.Module) -> Applied:
        """Cast ``net`` in place; its Parameter objects stay the same."""
        chosen = self._chosen(net)
        kept = [(p, p.data.cpu(), p.grad) for p in chosen] if self.keep else []
        for p in chosen:
            p.grad = None  # a float32 gradient does not fit a bfloat16 parameter
            p.data = p.data.to(torch.bfloat16)
        inner = net.forward

        def forward(x_t: Tensor, t: Tensor, cond: Any, *args: Any, **kwargs: Any) -> Any:
            out = inner(x_t.to(torch.bfloat16), t, _cast(cond, torch.bfloat16), *args, **kwargs)
            return _cast(out, x_t.dtype)

        restore = override(net, forward)

        def undo() -> None:
            if not self.keep:
                raise NotReversible("Cast dropped the original weights (keep=False); load the model again.")
            restore()
            for p, data, grad in kept:
                p.data = data.to(p.device)
                p.grad = grad

        def inert() -> str | None:
            return None if chosen else "Cast: no floating parameter was left to cast; leave Cast out."

        return Applied(undo, lambda: {"tensors": len(chosen)}, inert)
