"""Which linears stay as they are so that the whole network's error keeps within a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.core.errors import ConfigError
from hasten.models.probe import walk
from hasten.speed.host import Host


@torch.no_grad()
def outputs(at: Host, calls: Sequence[dict[str, Any]]) -> list[Tensor]:
    """The network's predictions for calls, arguments by name."""
    device = next(at.net.parameters()).device
    found = []
    for call in calls:
        here = walk(call, lambda v: v.to(device) if isinstance(v, Tensor) else v)
        found.append(at.pred(at.net(**here), at.look((), here).x_t).float())
    return found


def distance(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """||got - want|| / ||want|| over all calls together."""
    pairs = list(zip(got, want, strict=True))
    return float((sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5)


def fewest(count: int, measure: Callable[[int], float], limit: float) -> tuple[int, float]:
    """The least number of worst layers to keep, found by halving, and the error with these kept.

    Args:
        count: How many there are.
        measure: The network's error with so many of the worst kept.

    Raises:
        ConfigError: If the error is above ``limit`` even where only the best layer is rounded.
    """
    if (error := measure(0)) <= limit:
        return 0, error
    first = error
    bad, good = 0, count
    while good - bad > 1:
        middle = (bad + good) // 2
        error = measure(middle)
        if error <= limit:
            good = middle
        else:
            bad = middle
    if good == count:
        raise ConfigError(
            f"Quantize: no layer can be rounded within max_error={limit:g} (all rounded, the error is {first:.3g}); "
            "raise max_error, or choose a finer dtype, smooth or rank."
        )
    return good, measure(good)
