"""Weights and activations in bfloat16: half the memory, and several times the matmuls where the chip has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hasten.core.errors import ConfigError, NotReversible
from hasten.models.probe import tensors
from hasten.speed.foreign import packed, quantizer
from hasten.speed.host import Host, changed
from hasten.speed.transform import Applied, Transform, one_of, override, switch


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
        switch("Cast", "keep", self.keep)

    def _chosen(self, net: nn.Module) -> list[nn.Parameter]:
        return [p for p in net.parameters() if p.is_floating_point() and p.dtype != torch.bfloat16]

    def check(self, at: Host, stack: Sequence[Transform]) -> None:
        chosen = self._chosen(at.net)
        if not chosen:
            raise ConfigError("Cast: every parameter is bfloat16 already; leave Cast out.")
        for p in {type(p): p for p in chosen if packed(p)}.values():
            try:
                p.data.to(torch.bfloat16)
            except Exception as error:  # each package has its own for a type that keeps its dtype
                raise ConfigError(
                    f"Cast: {quantizer(at.net)} has quantized weights of this network to a type that keeps its dtype; "
                    "leave Cast out, or load them with dtype=torch.bfloat16."
                ) from error
        for device in {p.device for p in chosen if p.device.type == "cuda"}:
            if torch.cuda.get_device_capability(device) < (8, 0):
                name = torch.cuda.get_device_name(device)
                raise ConfigError(f"Cast: {name} has no bfloat16 (it needs compute capability 8.0); leave Cast out.")

    def apply(self, at: Host) -> Applied:
        """Cast the network in place; its Parameter objects stay the same."""
        net = at.net
        chosen = self._chosen(net)
        kept = [(p, p.data.cpu(), p.grad) for p in chosen] if self.keep else []
        for p in chosen:
            p.grad = None  # a float32 gradient does not fit a bfloat16 parameter
            p.data = p.data.to(torch.bfloat16)
        inner, _ = net.forward, at.positions  # read now: a compiler cannot look signatures up

        def forward(*args: Any, **kwargs: Any) -> Any:
            dtype = next(v.dtype for v in tensors([args, kwargs]) if v.is_floating_point())
            back = lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v  # noqa: E731
            return changed(inner(**at.cast(args, kwargs, torch.bfloat16)), back)

        restore = [override(net, forward), _decode_in_its_own(at)]

        def undo() -> None:
            if not self.keep:
                raise NotReversible("Cast dropped the original weights (keep=False); load the model again.")
            for back in reversed(restore):
                back()
            for p, data, grad in kept:
                p.data = data.to(p.device)
                p.grad = grad

        def inert() -> str | None:
            return None if chosen else "Cast: no floating parameter was left to cast; leave Cast out."

        return Applied(undo, lambda: {"tensors": len(chosen)}, inert)


def _decode_in_its_own(at: Host) -> Callable[[], None]:
    """Let a pipeline's VAE take latents of another dtype: some pipelines make theirs in the denoiser's dtype."""
    vae = getattr(at.pipe, "vae", None)
    if vae is None:
        return lambda: None
    inner = vae.decode

    def decode(z: Any, *args: Any, **kwargs: Any) -> Any:
        return inner(z.to(vae.dtype) if isinstance(z, Tensor) else z, *args, **kwargs)

    return override(vae, decode, "decode")
