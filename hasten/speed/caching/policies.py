"""Cache policies: each estimates the error of a skip, and says how past results combine into what is used instead.

An estimate is a function (config, call) -> error; a call is skipped while the error stays under the threshold. The
weights of past results, newest first, are a function (config, call) -> list; none means that the newest is held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.speed.caching.state import Call, change, few

NEVER = math.inf


# --- estimates ------------------------------------------------------------------------------------------------


def easycache(c: Any, call: Call) -> float:
    """A += k d_in / |out| (Zhou et al. 2025): the output changes k times as much as the input, k measured online."""
    m = call.mine
    if m.latest is not None:
        m.error += m.rate * float((few(call.x_t) - few(m.latest)).abs().mean())
    m.latest = call.x_t.detach().clone()  # the caller may write into it
    return NEVER if math.isnan(m.error) or math.isnan(m.rate) else m.error


def rate(c: Any, call: Call, out: Tensor) -> None:
    """EasyCache's k = d_out / d_in between the last two computed calls."""
    m = call.mine
    m.latest = call.x_t.detach().clone()
    if not m.past:
        return
    last = m.past[-1]
    assert last.x_t is not None and last.out is not None
    pairs = (few(call.x_t) - few(last.x_t), few(out) - few(last.out), few(out))
    d_in, d_out, size = torch.stack([v.abs().mean() for v in pairs]).tolist()
    if d_in > 0 and size > 0:
        m.rate = d_out / d_in / size


def every(c: Any, call: Call) -> float:
    """Compute every ``interval``-th step."""
    return 0.0 if call.step - call.mine.past[-1].step < c.interval else NEVER


def taylor(c: Any, call: Call) -> float:
    """At an interval where one is given, else while EasyCache's estimate allows; never with too short a past."""
    error = every(c, call) if c.interval else easycache(c, call)
    return error if len(call.mine.past) > c.degree else NEVER


def schedule(c: Any, call: Call) -> float:
    """As planned; a branch that did not see the steps of its fitted weights is computed."""
    row = c.weights[call.step] if c.weights else ()
    seen = {s.step for s in call.mine.past}
    return 0.0 if c.mask[call.step] and all(step in seen for step, _ in row) else NEVER


def magcache(c: Any, call: Call) -> float:
    """E += |1 - R|, R the product of the calibrated magnitude ratios since the last computed step (Ma et al. 2025)."""
    m = call.mine
    m.error += abs(1 - math.prod(c.ratios[m.past[-1].step + 1 : call.step + 1]))
    return m.error


def teacache(c: Any, call: Call) -> float:
    """A += poly4(d(m_t, m_before)), m block 0's modulated input, compared at every step (Liu et al. 2024)."""
    m, signal = call.mine, call.signal
    assert signal is not None
    if m.latest is not None:
        d = change(signal, m.latest)
        m.error += max(0.0, sum(a * d**i for i, a in enumerate(reversed(c.coefficients))))
    m.latest = signal
    return m.error


def firstblock(c: Any, call: Call) -> float:
    """d of the first blocks' residual from that at the last computed step (FBCache, DBCache)."""
    last = call.mine.past[-1].probe
    assert call.probe is not None and last is not None
    return change(call.probe, last)


def dicache(c: Any, call: Call) -> float:
    """A += d(y_t, y_before), y the sample's stream behind the probe blocks (Bu et al. 2025)."""
    m = call.mine
    assert call.feature is not None
    if m.latest is not None:
        m.error += change(call.feature, m.latest)
    m.latest = call.feature
    return m.error


def seen(c: Any, call: Call, out: Tensor) -> None:
    """Compare the next call with this one, which was computed before there was anything to compare it with."""
    call.mine.latest = call.signal if call.signal is not None else call.feature


# --- what is used instead -------------------------------------------------------------------------------------


def forecast(times: Sequence[float], now: float, degree: int) -> list[float]:
    """Weights of values at ``times`` (newest first) in sum_i d_i (now - t_0)^i / i! (TaylorSeer, Liu et al. 2025).

    d_0 is the value and d_(i+1) the difference of d_i and of the d_i before, over the times between the two. Degree
    0 and 1 are exact for what is constant and linear in time.
    """
    n = min(degree + 1, len(times))
    rows = [[float(i == j) for j in range(n)] for i in range(n)]  # d_0 at each time, as weights
    total, scale = list(rows[0]), 1.0
    for i in range(1, n):
        rows = [
            [(a - b) / (times[k] - times[k + 1]) for a, b in zip(rows[k], rows[k + 1], strict=True)]
            for k in range(len(rows) - 1)
        ]
        scale *= (now - times[0]) / i
        total = [w + scale * d for w, d in zip(total, rows[0], strict=True)]
    return total


def taylor_weights(c: Any, call: Call) -> list[float]:
    """The forecast at this call's time."""
    return forecast([s.time for s in reversed(call.mine.past)], call.time, c.degree)


def planned_weights(c: Any, call: Call) -> list[float]:
    """Those fitted to the model, by step, or the forecast of the degree."""
    if not c.weights:
        return taylor_weights(c, call)
    row = dict(c.weights[call.step])
    return [row.get(s.step, 0.0) for s in reversed(call.mine.past)]


def dicache_weights(c: Any, call: Call) -> list[float]:
    """r_2 + g (r_1 - r_2), g = |p - p_2| / |p_1 - p_2| of the probe's residuals, within [1, 1.5]."""
    past = call.mine.past
    if len(past) < 2:
        return [1.0]
    newest, older, p = past[-1].probe, past[-2].probe, call.probe
    assert newest is not None and older is not None and p is not None
    up, down = torch.stack([(p - older).abs().mean(), (newest - older).abs().mean()]).tolist()
    gain = min(max(up / down if down > 0 else 1.0, 1.0), 1.5)
    return [gain, 1 - gain]


# --- the table ------------------------------------------------------------------------------------------------

GATE = ("threshold", "warmup", "max_skips")


@dataclass(frozen=True)
class Policy:
    """A policy.

    Args:
        level: ``output``: a skip makes no call. ``stack``: the blocks between the first and the last ones are
            skipped and their residual is added. ``deep``: the inner blocks of a UNet keep what they returned.
            ``tokens``: the blocks' linears are computed for some tokens only.
        fields: Of the config: what it reads; setting another one is refused.
        error: The estimate.
        weights: Of past results; None holds the newest.
        after: What is measured when a call was computed.
        past: How many computed calls it looks back at.
        threshold: Its default; None where it has none.
        first: How many blocks are its probe; None where the config says.
    """

    level: str
    fields: tuple[str, ...]
    error: Callable[[Any, Call], float]
    weights: Callable[[Any, Call], list[float]] | None = None
    after: Callable[[Any, Call, Tensor], None] | None = None
    past: Callable[[Any], int] = lambda c: 1
    threshold: float | None = None
    first: int | None = None


def held(c: Any) -> int:
    """As many computed calls as a forecast of the config's degree needs."""
    return (c.degree or 0) + 1


def looked_back(c: Any) -> int:
    """As many computed calls as lie between a skipped one and the oldest that its fitted weights name."""
    oldest = {k: min(step for step, _ in row) for k, row in enumerate(c.weights) if row}
    return max([held(c), *(sum(not v for v in c.mask[i:k]) for k, i in oldest.items())])


POLICIES: dict[str, Policy] = {
    "easycache": Policy("output", GATE, easycache, after=rate, threshold=0.05),
    "taylor": Policy(
        "output", (*GATE, "degree", "interval"), taylor, taylor_weights, after=rate, past=held, threshold=0.05
    ),
    "schedule": Policy("output", ("mask", "degree", "weights"), schedule, planned_weights, past=looked_back),
    "magcache": Policy("output", (*GATE, "ratios"), magcache, threshold=0.1),
    "teacache": Policy("stack", (*GATE, "coefficients", "steps"), teacache, after=seen, threshold=0.2, first=0),
    "firstblock": Policy("stack", (*GATE, "degree"), firstblock, taylor_weights, past=held, threshold=0.1, first=1),
    "dual": Policy(
        "stack", (*GATE, "total_skips", "first", "last", "degree"), firstblock, taylor_weights, past=held, threshold=0.1
    ),
    "dicache": Policy(
        "stack", (*GATE, "first"), dicache, dicache_weights, after=seen, past=lambda c: 2, threshold=0.1
    ),
    "deepcache": Policy("deep", ("interval", "first", "warmup"), every),
    "regions": Policy("tokens", ("interval", "share", "warmup"), every),
}  # fmt: skip


def combined(weights: Sequence[float], past: Sequence[Tensor]) -> Tensor:
    """sum_i w_i v_i, weights newest first and values newest last; the newest itself for the weights [1]."""
    if weights[0] == 1.0 and not any(weights[1:]):
        return past[-1]
    newest = past[-1] if past[-1].dtype == torch.float64 else past[-1].float()
    total = weights[0] * newest  # not in half precision: large weights of opposite signs cancel
    for w, v in zip(weights[1:], reversed(past[:-1]), strict=False):
        if w:
            total = total + w * v.to(newest.dtype)
    return total.to(past[-1].dtype)
