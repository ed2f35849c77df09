"""W8A8: int8 weights with a scale per output channel, int8 activations with a dynamic scale per token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from hasten.core.errors import ConfigError, NotReversible, UnsupportedModel
from hasten.speed.host import Host
from hasten.speed.int8 import Int8Linear
from hasten.speed.transform import Applied, Transform, one_of


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
