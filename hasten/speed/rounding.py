"""How one linear is rounded: channels smoothed, what rounds badly in a low-rank branch, the rest on a grid.

SmoothQuant (Xiao et al. 2023), AWQ (Lin et al. 2024), SVDQuant (Li et al. 2025), ViDiT-Q's factors per range of times
(Zhao et al. 2025).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hasten.speed.ao import TorchaoLinear, config
from hasten.speed.linears import KINDS, Branched, Ranged, weights
from hasten.speed.products import by_torchao

GRID = 20  # steps of the searches
ROUNDS = 8  # of the low-rank alternation, at most
SLACK = 16  # more directions than the rank, for the randomized SVD


@dataclass(frozen=True)
class Stats:
    """What a calibration saw of one linear's input.

    Args:
        high: max|X_j| in every range of times, [ranges, in].
        mean: mean|X_j|, [ranges, in].
        rows: A random sample of rows of X, [n, in].
        when: The range of each, [n].
        tokens: Whether it has more rows than samples; modulation has not.
    """

    high: Tensor
    mean: Tensor
    rows: Tensor
    when: Tensor
    tokens: bool = True

    def part(self, index: int, ranges: int) -> Stats:
        """Of one range; of all where ``ranges`` is 1."""
        if ranges == 1:
            return Stats(self.high.amax(0, True), self.mean.mean(0, True), self.rows, self.when, self.tokens)
        mine = self.when == index
        return Stats(self.high[index, None], self.mean[index, None], self.rows[mine], self.when[mine], self.tokens)


def plain(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear that holds these tensors."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def smoothquant(high: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), [in]; 1 where either is all zeros. SmoothQuant, eq. 4."""
    column = weight.abs().amax(0).float()
    s = high.float() ** alpha / column ** (1 - alpha)
    return torch.where((high > 0) & (column > 0), s, 1.0).clamp(1e-5, 1e5)


def awq(mean: Tensor, ratio: float) -> Tensor:
    """s = mean|X|^ratio / sqrt(s_max s_min), [in]."""
    s = mean.float().clamp_min(1e-4) ** ratio
    return s / (s.amax() * s.amin()).sqrt()


def error(module: nn.Module, linear: nn.Linear, rows: Tensor) -> float:
    """||Y - Y'||^2 / ||Y||^2 of what stands in for ``linear``, on ``rows`` [n, in], without the bias."""
    with torch.no_grad():
        bias = 0 if linear.bias is None else linear.bias.float()
        want = linear(rows.to(linear.weight)).float() - bias
        got = module(rows.to(linear.weight)).float() - bias
    return float((got - want).square().sum() / want.square().sum().clamp_min(1e-30))


def searched(candidates: list[Tensor], loss: Callable[[Tensor], float]) -> Tensor:
    """Of the factors, those with the least loss; the first of equals."""
    return min(((loss(s), i, s) for i, s in enumerate(candidates)), key=lambda found: found[:2])[2]


def low_rank(weight: Tensor, rank: int, rounded: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, list[float]]:
    """W [out, in] as up down + R with R easy to round: alternately up down = SVD_rank(W - Q(R)) and R = W - up down.

    It starts with the largest directions of W and goes on while ||R - Q(R)||, which is all the error, falls; a new R
    has a new grid, so that only a measurement can tell. Where not even the first is better than Q(W), it is zero.

    Returns:
        up [out, rank], down [rank, in], and the falling residuals ||R - Q(R)|| / ||W||, that of Q(W) first.
    """
    wide, size = weight.float(), weight.float().norm().clamp_min(1e-30)
    up, down = wide.new_zeros(len(wide), rank), wide.new_zeros(rank, wide.shape[1])
    residuals, target = [float((wide - rounded(wide)).norm() / size)], wide
    for _ in range(ROUNDS):
        left, values, right = svd(target, rank)
        trial = left * values, right.T
        rest = wide - trial[0] @ trial[1]
        close = rounded(rest)
        found = float((rest - close).norm() / size)
        if not found < residuals[-1]:
            break
        (up, down), target = trial, wide - close
        residuals.append(found)
    return up, down, residuals


def svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` largest directions; randomized (Halko et al. 2011) where the matrix is large, with a fixed seed."""
    if min(matrix.shape) <= 8 * (rank + SLACK):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank].T
    devices = [matrix.device] if matrix.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(matrix, rank + SLACK, niter=4)
    return left[:, :rank], values[:rank], right[:, :rank]


def settings(how: Any, high: float, dtype: torch.dtype) -> tuple[str, dict[str, Any]]:
    """The kind of module for a ``Quantize``, and its settings; ``high`` is the largest activation."""
    if by_torchao(how):
        return "torchao", {"dtype": dtype, "how": config(how.dtype, how.scaling, how.group)}
    match how.dtype:
        case "int8_static":
            return "int8_static", {"high": high}
        case "int4_weights":
            return "int4_weights", {"group": how.group}
        case "fp8":
            return "float", {"form": how.scaling, "fast": not how.emulate}
        case "nvfp4" | "mxfp8":
            return "float", {"form": how.dtype}
    return how.dtype, {}


def small(linear: nn.Linear, how: Any, stats: Stats | None) -> nn.Module:
    """What stands in for ``linear`` under a ``Quantize``; ``stats`` are there where it needs them."""
    if how.ranges == 1 or stats is None:
        return one(linear, how, None if stats is None else stats.part(0, 1))
    return Ranged([one(linear, how, stats.part(i, how.ranges)) for i in range(how.ranges)])


def one(linear: nn.Linear, how: Any, stats: Stats | None) -> nn.Module:
    """The same for a single range of times."""
    weight, bias = linear.weight.detach(), linear.bias

    def inner(w: Tensor, b: Tensor | None, s: Tensor | None) -> nn.Module:
        high = 1.0 if stats is None else float((stats.high[0] if s is None else stats.high[0] / s).max())
        kind, given = settings(how, high, weight.dtype)
        return (TorchaoLinear if kind == "torchao" else KINDS[kind])(plain(w, b), **given)

    def smoothed(s: Tensor | None) -> nn.Module:
        module = inner(weight if s is None else weight.float() * s, bias, s)
        return module if s is None else Branched(module, 1 / s)

    s = None
    if stats is not None:
        moved = [getattr(stats, k).to(weight.device) for k in ("high", "mean", "rows", "when")]
        stats = Stats(*moved, tokens=stats.tokens)
        if how.smooth == "search":
            tried = [torch.ones_like(stats.high[0])]  # none; as a factor, so that all blocks compile to one graph
            if how.dtype in ("int4_weights", "int8_weights"):
                tried += [awq(stats.mean[0], i / GRID) for i in range(1, GRID)]
            else:
                tried += [smoothquant(stats.high[0], weight, i / GRID) for i in range(GRID + 1)]
            s = searched(tried, lambda s: error(smoothed(s), linear, stats.rows))
        elif how.smooth is not None:
            s = smoothquant(stats.high[0], weight, how.smooth)
    if not how.rank:
        return smoothed(s)
    whole = weight.float() if s is None else weight.float() * s
    up, down, _ = low_rank(whole, how.rank, lambda w: weights(inner(w, None, s)))
    branch = [v.to(weight.dtype).contiguous() for v in (down, up)]  # strides as of zeros: one graph for all blocks
    return Branched(inner(whole - up @ down, bias, s), None if s is None else 1 / s, *branch)
