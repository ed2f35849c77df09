"""Which steps to compute when the rest is forecast: an exact dynamic programme over one uncached run of a few prompts.

A segment from a computed step j to the next one k forecasts v at the steps between from the last computed ones, as
``Cache("schedule", degree=...)`` does. The error it leaves in the sample, sum_l dt_l (forecast_l - v_l), is a fixed
combination of the recorded predictions, so that its norm follows from their Gram matrix and no plan needs a call.
Errors of one segment add as vectors (they partly cancel), those of different segments as squares.
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


def segment(gram: Any, sigmas: list[float], past: tuple[int, ...], k: int, degree: int) -> float:
    """The squared error of computing ``past`` (newest first) and next k, forecasting what is between."""
    if k == past[0] + 1:
        return 0.0
    steps = range(past[0] + 1, k)
    times = [sigmas[i] for i in past]
    total = dict.fromkeys((*past, *steps), 0.0)
    for m in steps:
        dt = sigmas[m + 1] - sigmas[m]
        total[m] -= dt
        for i, w in zip(past, forecast(times, sigmas[m], degree), strict=False):
            total[i] += dt * w
    return sum(a * b * gram[i][j] for i, a in total.items() for j, b in total.items())


def plans(gram: Tensor, sigmas: list[float], degree: int, counts: tuple[int, ...]) -> dict[int, str]:
    """For every count of computed steps the mask of the least error: ``1`` is a skip."""
    rows, n = gram.tolist(), len(gram)
    known: dict[tuple[tuple[int, ...], int], float] = {}
    best: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {(0,): (0.0, (0,))}
    found: dict[int, str] = {}
    for count in range(1, max(counts) + 1):
        if count in counts:
            ends = []
            for past, (loss, path) in best.items():
                if n - past[0] <= LONGEST:
                    ends.append((loss + segment(rows, sigmas, past, n, degree), path))
            if ends:
                path = min(ends)[1]
                found[count] = "".join("0" if i in path else "1" for i in range(n))
        after: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
        for past, (loss, path) in best.items():
            for k in range(past[0] + 1, min(n, past[0] + LONGEST + 1)):
                if (past, k) not in known:
                    known[past, k] = segment(rows, sigmas, past, k, degree)
                state, total = (k, *past)[: degree + 1], loss + known[past, k]
                if total < after.get(state, (math.inf, ()))[0]:
                    after[state] = total, (*path, k)
        best = after
    return found
