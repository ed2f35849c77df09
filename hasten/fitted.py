"""Weights of a planned cache, fitted to a model: what the computed steps say of the skipped ones, by least squares.

A forecast by a polynomial in time knows nothing of the model, and nothing of where the sample has drifted since the
last computed step. Here a skipped step's weights are those that bring the requests of a calibration back to where they
would be uncached, one gap of the mask after the other, each on samples that the gaps before it have already moved.
In effect the request is sampled by a linear multistep solver with coefficients of its own at every step, as are
learnt of solvers (S4S, Frankel et al. 2025) but in closed form: no gradient, and few requests are enough.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.core.errors import ConfigError
from hasten.core.path import Kind, Path
from hasten.costs import Trace, Watch, straight
from hasten.speed.cache import Cache
from hasten.speed.host import host, needs_denoiser
from hasten.speed.transform import speed_up

PAST = 4  # computed steps that a forecast looks back at
RIDGE = 1e-6  # of the mean square of the predictions: late predictions hardly differ from each other

Row = tuple[tuple[int, float], ...]


def fit_weights(
    model: Any,
    mask: Sequence[bool] | str,
    runs: Sequence[Callable[[Any], Any]],
    *transforms: Any,
    call: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """``Cache("schedule", **found)`` for a mask: its weights, on the model as it will run.

    Args:
        mask: One character or bool a step: ``1`` is a skip.
        runs: Functions that sample once from the model they are given, the same sample every time; a few prompts.
        transforms: The others of the stack (Quantize ...).
        call: As in ``speed_up``.

    Raises:
        ConfigError: For runs of another step count than the mask's, or that do not repeat.
    """
    if callable(runs) or not runs or any(not callable(run) for run in runs):
        raise ConfigError("fit_weights needs runs: functions that sample once from the model they are given.")
    plan, at = Cache("schedule", mask=mask), host(model, call)  # type: ignore[arg-type]
    needs_denoiser("fit_weights", at)

    def watched(layers: Sequence[Any]) -> list[Trace]:
        watch = Watch()
        with speed_up(model, *transforms, *layers, watch, call=call) as fast:
            for run in runs:
                run(fast)
        return watch.traces

    modes = "".join("f" if skip else "F" for skip in plan.mask)
    rows = fitted(modes, watched([]), watched, at.path, at.kind)  # type: ignore[arg-type]
    return {"mask": plan.mask, "weights": rows}


def fitted(
    modes: str,
    base: Sequence[Trace],
    watched: Callable[[Sequence[Any]], Sequence[Trace]],
    path: Path,
    kind: Kind,
    others: Sequence[Any] = (),
) -> tuple[Row, ...]:
    """Of every step, the weights of ``modes`` as in :class:`hasten.costs.Steps`.

    Args:
        base: The requests, every step computed and guided.
        watched: Draws the same requests under layers, and says what the network said.
        others: Layers that go with the cache, such as the guidance of the modes.

    Raises:
        ConfigError: Where the requests are not those of ``base``.
    """
    if not base:
        raise ConfigError("fit_weights: no run called the network in a request; sample from the model it is given.")
    n = len(base[0].cond)
    if len(modes) != n:
        raise ConfigError(f"fit_weights: the runs took {n} steps, and the mask has {len(modes)}; give it one a step.")
    computed = [k for k, m in enumerate(modes) if m in "FA"]
    rows: list[Row] = [() if k in computed else ((max(i for i in computed if i < k), 1.0),) for k in range(n)]
    skips = tuple(m in "fa" for m in modes)
    for first, last in itertools.pairwise([*computed, n]):
        if last == first + 1:
            continue
        alone = modes[first] == "A"
        # Where guidance begins or ends, a batch of both branches changes its shape, and the cache forgets.
        since = max((i for i in range(first) if modes[i].upper() != modes[first]), default=-1)
        past = [i for i in reversed(computed) if since < i <= first][:PAST]
        traces = watched([Cache("schedule", mask=skips, weights=tuple(rows)), *others])
        check(base, traces, modes)
        said = [torch.stack([(t.cond[i] if alone else t.whole(i)).flatten() for i in past]).double() for t in traces]
        gram = sum((v @ v.T for v in said), torch.zeros(len(past), len(past), dtype=torch.float64))
        gram += RIDGE * gram.diagonal().mean() * torch.eye(len(past), dtype=torch.float64)
        back = pull(path, kind, traces[0].t[first + 1], traces[0].t[first + 2] if first + 2 < n else None)
        for k in range(first + 1, last):
            # Later steps of the gap have the same past, so what the first left of the drift is orthogonal to it.
            drift = back if k == first + 1 else 0.0
            wanted = [b.whole(k) + drift * (b.x[k] - t.x[k]) for b, t in zip(base, traces, strict=True)]
            right = sum((v @ y.flatten().double() for v, y in zip(said, wanted, strict=True)), gram.new_zeros(()))
            weights = torch.linalg.solve(gram, right)
            rows[k] = tuple(zip(past, weights.tolist(), strict=True))
    return tuple(rows)


def check(base: Sequence[Trace], traces: Sequence[Trace], modes: str) -> None:
    """Raise ConfigError where the requests are not those of ``base``, up to the first step not computed as there.

    The first sample is equal bit for bit; later ones to the rounding of kernels that need not repeat.
    """
    until = next((k for k, m in enumerate(modes) if m != "F"), len(modes) - 1)
    same = len(base) == len(traces) and all(
        b.x[0].shape == t.x[0].shape
        and torch.equal(b.x[0], t.x[0])
        and all(torch.allclose(b.x[k], t.x[k], rtol=0.02, atol=0.02 * float(b.x[k].std())) for k in range(1, until + 1))
        for b, t in zip(base, traces, strict=True)
    )
    if not same:
        raise ConfigError("fit_weights: a run must draw the same sample every time; fix all its noise by a generator.")


def pull(path: Path, kind: Kind, t: Tensor, s: Tensor | None) -> float:
    """What is added to a prediction at t per distance of the sample, so that a straight step to s ends on the course.

    The step is p pred + q x; two courses end in one point where their predictions differ by q/p of the distance.
    """
    p, q = straight(path, kind, t, s)
    found = q / p if p else 0.0
    return found if math.isfinite(found) else 0.0
