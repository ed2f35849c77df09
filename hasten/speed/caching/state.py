"""What a cache remembers of one CFG branch in one request, and how it measures change."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FEW = 1 << 16  # a mean over this many evenly spread elements differs from that over all by far less than a threshold


def few(v: Tensor) -> Tensor:
    """About ``FEW`` elements of v [B, ...], spread evenly: all where there are no more. A view where v is contiguous.

    The stride is odd, so that it does not pick the same channels of every token.
    """
    flat = v.flatten(1) if v.ndim > 1 else v.reshape(1, -1)
    stride = v.numel() // FEW
    return flat if stride < 2 else flat[:, :: stride | 1]


def change(now: Tensor, before: Tensor) -> float:
    """d(a, b) = mean|a - b| / mean|b|; infinite where b is zero and a is not."""
    moved, size = torch.stack([(now - before).abs().mean(), before.abs().mean()]).tolist()
    return moved / size if size > 0 else (0.0 if moved == 0 else math.inf)


@dataclass
class Snapshot:
    """A computed call.

    Args:
        step, time: Which of the request's times it was, and that time on the path.
        x_t, t, out: Sample, times and prediction; None where a policy keeps residuals instead.
        probe: The first blocks' residual, on a few elements.
        residuals: Of every block that ends a run of blocks: what the run adds to each of its streams.
        like: What a pipeline's network returned, in its own form.
    """

    step: int
    time: float
    x_t: Tensor | None = None
    t: Tensor | None = None
    out: Tensor | None = None
    probe: Tensor | None = None
    residuals: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    like: Any = None


@dataclass
class Branch:
    """What one request remembers of one CFG branch.

    Args:
        past: The latest computed calls, newest last, as many as the policy extrapolates from.
        form: Shape, dtype and device of the sample that they belong to; guidance intervals change the batch midway.
        error: The estimated error so far, since the last computed call.
        latest: What the policy compares the next call with, of the latest call, computed or not.
        rate: EasyCache's k / mean|out|: relative change of the output per mean change of the input.
        blocks: What a stack knows of each block: how its outputs belong to its inputs, or what it returned.
    """

    step: int = -1
    time: float = math.nan
    past: list[Snapshot] = field(default_factory=list)
    form: Any = None
    skips: int = 0  # in a row
    total: int = 0
    error: float = 0.0
    latest: Tensor | None = None
    rate: float = math.nan
    blocks: dict[Any, Any] = field(default_factory=dict)

    def begin(self, form: Any) -> None:
        """Forget everything but the step where the sample has another form than before."""
        if form != self.form:
            self.past, self.blocks, self.form = [], {}, form
            self.error, self.rate, self.latest, self.skips = 0.0, math.nan, None, 0


@dataclass
class Call:
    """One call of the network, while it runs.

    Args:
        free: Whether it may be skipped at all: warm-up, caps and the last step considered.
        skip: The decision; None before it.
        signal: Block 0's modulated input, on a few elements.
        probe, feature: What the first blocks added to the sample's stream, and the stream behind them, on a few
            elements.
        residuals: As in :class:`Snapshot`.
        scratch: What a stack of blocks needs until the call's end.
    """

    mine: Branch
    x_t: Tensor
    t: Tensor
    step: int
    time: float
    free: bool
    skip: bool | None = None
    signal: Tensor | None = None
    probe: Tensor | None = None
    feature: Tensor | None = None
    residuals: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    scratch: dict[Any, Any] = field(default_factory=dict)
