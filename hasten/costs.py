"""Which steps to compute, which to hold and which to leave unguided: pairwise costs, and an exact dynamic programme.

The costs are those of DPCache (offline costs of extrapolating, an exact programme over them), with one more choice:
a step may run without its unconditional branch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.core.request import Request, current
from hasten.speed.cache import Cache
from hasten.speed.caching.engine import held
from hasten.speed.guidance import Engine as Guide
from hasten.speed.guidance import Guidance, Progress
from hasten.speed.halves import layout_of
from hasten.speed.host import Host
from hasten.speed.transform import Applied, Transform, override

LONGEST = 6  # most steps held in a row


@dataclass
class Trace:
    """What the network said in one request: by step, the sample, the time, and both branches' predictions.

    Args:
        x, t, cond: Of each step: [B, ...], [B], [B, ...].
        uncond: Of each step, [B, ...]; empty without guidance.
        scale: w of u + w (c - u).
    """

    x: list[Tensor] = field(default_factory=list)
    t: list[Tensor] = field(default_factory=list)
    cond: list[Tensor] = field(default_factory=list)
    uncond: list[Tensor] = field(default_factory=list)
    scale: float = 1.0

    def guided(self, cond: Tensor, uncond: Tensor) -> Tensor:
        """u + w (c - u)."""
        return uncond + self.scale * (cond - uncond)

    def whole(self, k: int) -> Tensor:
        """What the sampler was given at step k."""
        return self.guided(self.cond[k], self.uncond[k]) if self.uncond else self.cond[k]


class Watch:
    """A transform that changes nothing and keeps a :class:`Trace` of every request."""

    name: ClassVar[str] = "watch"
    order: ClassVar[int] = 60

    def __init__(self) -> None:
        self.traces: list[Trace] = []

    def check(self, at: Host, stack: Sequence[Transform]) -> None:
        """Anything with a path can be watched."""

    def apply(self, at: Host) -> Applied:
        """Put the recorder in front of everything else."""
        two = at.pipe is not None and at.adapter.uncond is not None and at.adapter.found.cfg_scale != 1
        guide = Guide(Guidance(reuse=1), at, layout_of(at) if two else None)
        inner = at.net.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            result, mine = inner(*args, **kwargs), current()
            if mine is not None:
                self.note(at, guide, mine, at.look(args, kwargs), result)
            return result

        return Applied(override(at.net, forward), lambda: {"requests": float(len(self.traces))}, lambda: None)

    def note(self, at: Host, guide: Guide, mine: Request, look: Any, result: Any) -> None:
        """Write one call into the request's trace; heun's second look at a time is left out."""
        if self not in mine.state:
            mine.state[self] = (Trace(), Progress())
            self.traces.append(mine.state[self][0])
        trace, state = mine.state[self]
        now = float(look.t.flatten()[0])
        if now != state.time:
            state.step, state.time, state.position = state.step + 1, now, -1
        state.position += 1
        role = guide.role(look, state, mine) or "cond"
        pred, x, t = at.pred(result, look.x_t).detach().float().cpu(), look.x_t.detach().float().cpu(), look.t.cpu()
        if role == "uncond":
            if len(trace.uncond) == state.step:
                trace.uncond.append(pred)
                trace.scale = guide.scale(state, mine)
            return
        if len(trace.cond) != state.step:
            return
        if role == "both":
            first, second = pred.chunk(2)
            cond_first = guide.layout.cond_first
            pred, other = (first, second) if cond_first else (second, first)
            trace.uncond.append(other)
            trace.scale, x, t = guide.scale(state, mine), x.chunk(2)[0], t.chunk(2)[0]
        trace.x.append(x)
        trace.t.append(t)
        trace.cond.append(pred)


@dataclass(frozen=True)
class Errors:
    """Root mean squared errors of what the sampler is given, over all traces.

    Args:
        held: [N, N]; at (i, k) when step k uses what was computed at step i < k.
        alone: [N, N]; the same when neither is guided, and on the diagonal of a computed unguided step; None without
            guidance.
        scale: The guidance that was watched.
    """

    held: Tensor
    alone: Tensor | None
    scale: float = 1.0

    @property
    def steps(self) -> int:
        return len(self.held)


def errors(at: Host, traces: Sequence[Trace]) -> Errors:
    """The errors of holding and of leaving out guidance, measured on watched requests of one step count."""
    n, guided = len(traces[0].cond), bool(traces[0].uncond)
    both, alone = torch.zeros(2, n, n, dtype=torch.float64)

    def later(pred: Tensor, trace: Trace, i: int, k: int) -> Tensor:
        return pred if i == k else held(at, pred, trace.x[i], trace.t[i], trace.x[k], trace.t[k])

    for trace in traces:
        for i in range(n):
            for k in range(i, min(n, i + LONGEST + 1)):
                made, want = later(trace.cond[i], trace, i, k), trace.whole(k)
                if guided:
                    alone[i, k] += (made - want).square().mean().sqrt()
                    made = trace.guided(made, later(trace.uncond[i], trace, i, k))
                if k > i:
                    both[i, k] += (made - want).square().mean().sqrt()
    return Errors(both / len(traces), alone / len(traces) if guided else None, traces[0].scale)


def segments(error: Tensor, weight: Tensor, own: bool) -> Tensor:
    """[N, N + 1]: the squared loss of computing step i and nothing until step j: (sum_k s_k e_ik)^2.

    Errors inside a segment have one cause and add; those of different segments are taken as independent.

    Args:
        own: Whether step i itself has an error: it is computed without guidance.
    """
    n = len(error)
    found = torch.full((n, n + 1), math.inf, dtype=torch.float64)
    for i in range(n):
        total = float(weight[i] * error[i, i]) if own else 0.0
        for j in range(i + 1, min(n, i + LONGEST + 1) + 1):
            found[i, j] = total**2
            if j < n:
                total += float(weight[j] * error[i, j])
    return found


@dataclass(frozen=True)
class Steps:
    """A plan of the steps: ``F`` computed and guided, ``A`` computed unguided, ``f`` and ``a`` held from such a step.

    Args:
        modes: One letter a step.
        units: Branch evaluations: 2 for F where there is guidance, else 1; 1 for A.
        loss: Predicted squared error of the samples.
    """

    modes: str
    units: int
    loss: float

    def transforms(self, scale: float) -> list[Any]:
        """The cache and the guidance that do this, as far as anything is to be done."""
        found: list[Any] = []
        if any(m in "fa" for m in self.modes):
            found.append(Cache("schedule", mask=tuple(m in "fa" for m in self.modes)))
        if any(m in "Aa" for m in self.modes):
            found.append(Guidance(scales=tuple(1.0 if m in "Aa" else scale for m in self.modes)))
        return found


def plans(found: Errors, weight: Tensor, warmup: int = 1) -> list[Steps]:
    """For every number of units the plan of the least loss, by an exact dynamic programme: units falling, loss rising.

    Args:
        weight: [N]; s_k, the error of the samples for an error of 1 at step k.
        warmup: Steps at the start that are computed and guided.
    """
    n, guided = found.steps, found.alone is not None
    kinds = [("F", 2 if guided else 1, segments(found.held, weight, own=False))]
    if found.alone is not None:
        kinds.append(("A", 1, segments(found.alone, weight, own=True)))
    most = n * kinds[0][1]
    best = [[math.inf] * (most + 1) for _ in range(n + 1)]  # best[j][b]: steps before j are settled with b units
    came: dict[tuple[int, int], tuple[int, int, str]] = {}
    best[0][0] = 0.0
    for i in range(n):
        for letter, units, loss in kinds:
            if i < warmup and letter != "F":
                continue
            for j in range(i + 1, min(n, i + LONGEST + 1) + 1):
                if j > i + 1 and i < warmup - 1:
                    break
                more = float(loss[i, j])
                for b in range(most + 1 - units):
                    total = best[i][b] + more
                    if total < best[j][b + units]:
                        best[j][b + units], came[j, b + units] = total, (i, b, letter)
    made, least = [], math.inf
    for b in range(most, 0, -1):
        if best[n][b] < math.inf:
            made.append(Steps(trail(came, n, b), b, best[n][b]))
    kept = []
    for plan in reversed(made):  # few units first: drop those that cost more and lose as much
        if plan.loss < least:
            least = plan.loss
            kept.append(plan)
    return kept[::-1]


def trail(came: dict[tuple[int, int], tuple[int, int, str]], n: int, b: int) -> str:
    """The modes of the best plan that settles all steps with b units."""
    text, j = "", n
    while j:
        i, b, letter = came[j, b]
        text = letter + letter.lower() * (j - i - 1) + text
        j = i
    return text


def sensitivity(probed: dict[int, float], n: int) -> Tensor:
    """[N]: s_k at all steps from those measured, linear in log s between them and constant outside."""
    known = sorted(probed)
    logs = [math.log(max(probed[k], 1e-12)) for k in known]
    found = torch.empty(n, dtype=torch.float64)
    for k in range(n):
        right = next((m for m, p in enumerate(known) if p >= k), len(known) - 1)
        left = max(right - 1, 0) if known[right] > k else right
        span = known[right] - known[left]
        part = min(max((k - known[left]) / span, 0.0), 1.0) if span else 0.0
        found[k] = math.exp(logs[left] + part * (logs[right] - logs[left]))
    return found


def probes(n: int, count: int) -> list[int]:
    """Steps at which a single held step is tried: evenly over the steps that may be held."""
    last = n - 1
    return sorted({1 + round((last - 1) * m / max(count - 1, 1)) for m in range(count)} & set(range(1, n)))
