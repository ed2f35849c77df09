"""A linear and what stands in for it: put in, weighed, switched with the time, put back."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import nn

from hasten.core.errors import ConfigError
from hasten.speed.foreign import inner
from hasten.speed.host import Host
from hasten.speed.linears import RANGE
from hasten.speed.rounding import Stats, error
from hasten.speed.transform import override


@dataclass
class Swap:
    """One linear (None once it is dropped), what stands in for it, and all places that hold it."""

    path: str
    linear: Any
    module: nn.Module
    places: list[tuple[nn.Module, str]]

    def put(self, module: nn.Module) -> None:
        """Let ``module`` be at every place."""
        for parent, name in self.places:
            parent._modules[name] = module


def harm(swap: Swap, stats: Stats) -> float:
    """Relative squared output error of a rounded linear on the calibration's rows, each in its range of times."""
    total = 0.0
    for i in range(len(stats.high)):
        token = RANGE.set(i)
        rows = stats.rows[stats.when == i]
        total += error(swap.module, swap.linear, rows) * len(rows) / len(stats.rows) if len(rows) else 0.0
        RANGE.reset(token)
    return total


def saving(swap: Swap) -> int:
    """Bytes of the linear less those of what stands in for it."""
    return size(swap.linear) - size(swap.module)


def size(module: nn.Module) -> int:
    """Bytes of its tensors, those inside other packages' types included."""
    return sum(v.nbytes for outer in [*module.parameters(), *module.buffers()] for v in inner(outer))


def ranged(at: Host, edges: Sequence[float]) -> Callable[[], None]:
    """Let every call of the network say in which range of times it is; the result undoes that."""
    inner = at.net.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        t = at.look(args, kwargs).t
        low, high = (bisect_right(edges, float(v)) for v in (t.min(), t.max()))
        if low != high:
            raise ConfigError("Samples of one call are in different ranges of times; use Quantize(ranges=1).")
        token = RANGE.set(low)
        try:
            return inner(*args, **kwargs)
        finally:
            RANGE.reset(token)

    return override(at.net, forward)


def back(swap: Swap) -> Callable[[], None]:
    """Park the linear's tensors on the CPU; the result puts the same module back where the network now is."""
    linear, small = swap.linear, swap.module
    for p in linear.parameters():
        p.data = p.data.cpu()

    def back() -> None:
        device = next(chain(small.buffers(), small.parameters())).device
        for p in linear.parameters():
            p.data = p.data.to(device)
        swap.put(linear)

    return back
