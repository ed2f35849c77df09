"""Which steps to compute when the rest is forecast: an exact dynamic programme over one uncached run of a few prompts.

A segment from a computed step j to the next one k forecasts v at the steps between from the last computed ones, as
``Cache("schedule", degree=...)`` does. The error it leaves in the sample, sum_l dt_l (forecast_l - v_l), is a fixed
combination of the recorded predictions, so that its norm follows from their Gram matrix and no plan needs a call.
Errors of one segment add as vectors (they partly cancel), in the programme those of different segments as squares. A
local search then moves single computed steps while the mean of that sum and of the squared norm of all errors together
falls: on other prompts than the recorded ones it gained up to 6 dB over the programme alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hasten.speed.caching.policies import forecast

LONGEST = 14  # steps from one computed step to the next


def record(requests: Any) -> tuple[Tensor, list[float]]:
    """(Gram matrix [S, S] of the predictions that the scheduler was given, noise levels [S + 1])."""
    scheduler, seen = requests.pipe.scheduler, []
    inner = scheduler.step

    def step(pred: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(pred.detach().double())
        return inner(pred, *args, **kwargs)

    scheduler.step = step
    try:
        requests.draw(slice(None))
    finally:
        del scheduler.step
    v = torch.stack(seen).flatten(2)
    return torch.einsum("and,bnd->ab", v, v) / v.shape[1], scheduler.sigmas.tolist()


def combination(sigmas: list[float], past: tuple[int, ...], k: int, degree: int) -> dict[int, float]:
    """The error of computing ``past`` (newest first) and next k, forecasting what is between: weights of the v_i."""
    if k == past[0] + 1:
        return {}
    steps = range(past[0] + 1, k)
    times = [sigmas[i] for i in past]
    total = dict.fromkeys((*past, *steps), 0.0)
    for m in steps:
        dt = sigmas[m + 1] - sigmas[m]
        total[m] -= dt
        for i, w in zip(past, forecast(times, sigmas[m], degree), strict=False):
            total[i] += dt * w
    return total


def square(gram: Any, total: dict[int, float]) -> float:
    """Its squared norm."""
    return sum(a * b * gram[i][j] for i, a in total.items() for j, b in total.items())


def loss(gram: Any, sigmas: list[float], computed: list[int], degree: int) -> float:
    """Of one plan: the mean of the segments' squared errors summed, and of the square of their sum."""
    apart, together = 0.0, dict.fromkeys(range(len(gram)), 0.0)
    for a, b in zip(computed, [*computed[1:], len(gram)], strict=True):
        past = tuple(i for i in reversed(computed) if i <= a)[: degree + 1]
        part = combination(sigmas, past, b, degree)
        apart += square(gram, part)
        for i, w in part.items():
            together[i] += w
    return 0.5 * apart + 0.5 * square(gram, together)


def refined(gram: Any, sigmas: list[float], computed: list[int], degree: int) -> list[int]:
    """A plan from which no computed step can be moved by up to four for the better."""
    best = loss(gram, sigmas, computed, degree)
    while True:
        moves = ((j, j + d) for j in computed[1:] for d in (-4, -3, -2, -1, 1, 2, 3, 4))
        for j, k in moves:
            if 0 < k < len(gram) and k not in computed:
                tried = sorted({*computed, k} - {j})
                found = loss(gram, sigmas, tried, degree)
                if found < 0.999 * best:
                    computed, best = tried, found
                    break
        else:
            return computed


def plans(gram: Tensor, sigmas: list[float], degree: int, counts: tuple[int, ...]) -> dict[int, str]:
    """For every count of computed steps the mask of the least error: ``1`` is a skip."""
    rows, n = gram.tolist(), len(gram)
    known: dict[tuple[tuple[int, ...], int], float] = {}
    best: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {(0,): (0.0, (0,))}
    found: dict[int, str] = {}
    for count in range(1, max(counts) + 1):
        if count in counts:
            ends = []
            for past, (lost, path) in best.items():
                if n - past[0] <= LONGEST:
                    ends.append((lost + square(rows, combination(sigmas, past, n, degree)), path))
            if ends:
                path = refined(rows, sigmas, list(min(ends)[1]), degree)
                found[count] = "".join("0" if i in path else "1" for i in range(n))
        after: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
        for past, (lost, path) in best.items():
            for k in range(past[0] + 1, min(n, past[0] + LONGEST + 1)):
                if (past, k) not in known:
                    known[past, k] = square(rows, combination(sigmas, past, k, degree))
                state, total = (k, *past)[: degree + 1], lost + known[past, k]
                if total < after.get(state, (math.inf, ()))[0]:
                    after[state] = total, (*path, k)
        best = after
    return found
