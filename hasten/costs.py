"""Which steps to compute, to forecast and to leave unguided: costs from watched requests, and an exact programme.

The costs are those of DPCache (offline costs of extrapolating, an exact programme over them), with one more choice: a
step may run without its unconditional branch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.core.errors import ConfigError
from hasten.core.path import Kind, Path, row_of, solve2
from hasten.core.request import Request, current
from hasten.speed.cache import Cache
from hasten.speed.guidance import Engine as Guide
from hasten.speed.guidance import Guidance, Progress
from hasten.speed.halves import layout_of
from hasten.speed.host import Host
from hasten.speed.transform import Applied, Transform, override

LONGEST = 8  # most steps skipped in a row


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
class Gram:
    """Mean products of what the network said at any two steps, from which the error of every plan follows.

    Args:
        products: [V, V], float64: first what the sampler was given at each step, then, where there is guidance, the
            conditional predictions. In mean squares.
        times: Of the steps, on the path.
        scale: The guidance that was watched; 1 where there was none.
    """

    products: Tensor
    times: tuple[float, ...]
    scale: float = 1.0

    @classmethod
    def of(cls, traces: Sequence[Trace]) -> Gram:
        """From watched requests of one step count."""
        n, total = len(traces[0].cond), None
        for trace in traces:
            said = [trace.whole(k) for k in range(n)] + (trace.cond if trace.uncond else [])
            rows = torch.stack([v.flatten() for v in said]).double()
            found = rows @ rows.T / rows.shape[1]
            total = found if total is None else total + found
        assert total is not None
        return cls(total / len(traces), tuple(float(t[0]) for t in traces[0].t), traces[0].scale)

    @property
    def steps(self) -> int:
        return len(self.times)

    @property
    def guided(self) -> bool:
        return len(self.products) > len(self.times)

    def square(self, weights: Tensor) -> Tensor:
        """Mean squares [...] of weighted sums [..., V] of what the network said."""
        return ((weights @ self.products) * weights).sum(-1).clamp_min(0)  # rounding leaves less where nothing changes

    def errors(self, feel: Tensor, before: int | None, i: int, alone: bool) -> Tensor:
        """Weights [L, V] of the samples' error: of computing step i, then none until step i + 1, i + 2 ...

        ``before`` is the computed step before i. Skipped steps get the line through the two (Cache's ``degree=1``).

        Args:
            feel: [N]; s_k, the error of the samples for an error of 1 at step k, as :func:`moves` has it.
            alone: Step i and those that follow from it are not guided.
        """
        n, t = self.steps, self.times
        row = n if alone else 0
        total, found = torch.zeros(len(self.products), dtype=torch.float64), []
        for k in range(i, min(n, i + LONGEST + 1)):
            if k > i or alone:
                line = 0.0 if before is None else (t[k] - t[i]) / (t[i] - t[before])
                total[row + i] += feel[k] * (1 + line)
                if before is not None:
                    total[row + before] -= feel[k] * line
                total[k] -= feel[k]
            found.append(total.clone())
        return torch.stack(found)


@dataclass(frozen=True)
class Steps:
    """A plan of the steps: ``F`` computed and guided, ``A`` computed unguided, ``f`` and ``a`` forecast after such.

    Args:
        modes: One letter a step.
        units: Branch evaluations: 2 for F where there is guidance, else 1; 1 for A.
        loss: Predicted squared error of the samples.
    """

    modes: str
    units: int
    loss: float

    def cache(self, weights: Any = ()) -> list[Any]:
        """The cache that does this, if anything is skipped: by fitted weights, or by the line that was planned with."""
        skips = tuple(m in "fa" for m in self.modes)
        return [Cache("schedule", mask=skips, weights=weights, degree=None if weights else 1)] if any(skips) else []

    def guidance(self, scale: float) -> list[Any]:
        """The guidance that does this, if any step goes without."""
        scales = tuple(1.0 if m in "Aa" else scale for m in self.modes)
        return [Guidance(scales=scales)] if any(m in "Aa" for m in self.modes) else []


def plans(found: Gram, feel: Tensor, warmup: int = 2) -> list[Steps]:
    """For every number of units the plan of the least loss, by an exact dynamic programme: units falling, loss rising.

    Its state is the last two computed steps, from which the next ones are forecast.

    Args:
        feel: [N]; s_k, the error of the samples for an error of 1 at step k, as :func:`moves` has it.
        warmup: Steps at the start that are computed and guided.
    """
    n, kinds = found.steps, [("F", 2), ("A", 1)] if found.guided else [("F", 1)]
    most = n * kinds[0][1]
    start = torch.full((most + 1,), math.inf, dtype=torch.float64)
    start[0] = 0.0
    best: dict[tuple[int, int], Tensor] = {(-1, 0): start}  # (last computed, next to compute): losses by units
    came: dict[tuple[int, int], list[tuple[int, str]]] = {}
    for i in range(n):
        for before in [h for h, at in best if at == i]:
            for letter, units in kinds:
                if i < warmup and letter == "A":
                    continue
                # Errors of one gap are summed as vectors, for they partly cancel; those of two count apart.
                losses = found.square(found.errors(feel, None if before < 0 else before, i, letter == "A"))
                for j, loss in enumerate(losses.tolist(), i + 1):
                    if i < warmup - 1 and j > i + 1:
                        break
                    total = torch.full_like(start, math.inf)
                    total[units:] = best[before, i][: most + 1 - units] + loss
                    here = best.setdefault((i, j), torch.full_like(start, math.inf))
                    trace = came.setdefault((i, j), [(-1, "")] * (most + 1))
                    for b in (total < here).nonzero().flatten().tolist():
                        here[b], trace[b] = total[b], (before, letter)
    made, least = [], math.inf
    for b in range(most + 1):  # few units first: drop those that cost more and lose as much
        loss, last = min((float(v[b]), i) for (i, j), v in best.items() if j == n)
        if loss < least:
            least = loss
            made.append(Steps(trail(came, last, n, b, dict(kinds)), b, loss))
    return made[::-1]


def refined(found: Gram, feel: Tensor, plan: Steps, warmup: int = 2) -> Steps:
    """A plan of as many units from which no computed step can be moved by up to four for the better.

    The first ``warmup`` steps stay. The programme takes the errors of different gaps as independent; the loss here,
    which the plan carries away, is the mean of that and of their sum as one vector: errors which undo each other, or
    add up, are seen.
    """
    known: dict[tuple[int | None, int, bool], Tensor] = {}

    def loss(modes: str) -> float:
        computed = [k for k, m in enumerate(modes) if m.isupper()]
        parts = []
        for before, i, end in zip([None, *computed], computed, [*computed[1:], len(modes)], strict=False):
            key = (before, i, modes[i] == "A")
            if key not in known:
                known[key] = found.errors(feel, *key)
            if end - i > len(known[key]):
                return math.inf
            parts.append(known[key][end - i - 1])
        gaps = torch.stack(parts)
        return 0.5 * float(found.square(gaps).sum() + found.square(gaps.sum(0)))

    modes, least = plan.modes, loss(plan.modes)
    better = True
    while better:
        better = False
        for j, k in ((j, j + d) for j in range(warmup, len(modes)) for d in (-4, -3, -2, -1, 1, 2, 3, 4)):
            if modes[j].isupper() and warmup <= k < len(modes) and modes[k].islower():
                tried = moved(modes, j, k)
                now = loss(tried)
                if now < 0.999 * least:
                    modes, least, better = tried, now, True
    return Steps(modes, plan.units, least)


def moved(modes: str, j: int, k: int) -> str:
    """The plan with what is computed at step j computed at step k, and the forecasts named by what they follow."""
    marks = {i: m for i, m in enumerate(modes) if m.isupper() and i != j} | {k: modes[j]}
    text, last = "", "F"
    for i in range(len(modes)):
        last = marks.get(i, last)
        text += marks.get(i, last.lower())
    return text


def trail(came: dict[tuple[int, int], list[tuple[int, str]]], i: int, j: int, b: int, units: dict[str, int]) -> str:
    """The modes of the best plan whose last computed step is i, and that settles all steps with b units."""
    text = ""
    while j:
        before, letter = came[i, j][b]
        text = letter + letter.lower() * (j - i - 1) + text
        i, j, b = before, i, b - units[letter]
    return text


def straight(path: Path, kind: Kind, t: Tensor, s: Tensor | None) -> tuple[float, float]:
    """(p, q) of the straight step p pred + q x from t to s, None being the end; (0, 0) where there is none."""
    at = path.coeffs(t.double().flatten()[0])
    to = path.coeffs((torch.zeros_like(t) if s is None else s).double().flatten()[0])
    try:
        p, q = solve2(at[0], at[1], *row_of(at, kind), to[0], to[1], kind)
    except ConfigError:  # at this end the sample and the prediction do not say the rest
        return 0.0, 0.0
    return float(p), float(q)


def moves(trace: Trace, path: Path, kind: Kind) -> Tensor:
    """[N]: how far an error of 1 in the prediction at each step moves the sample.

    That is all a step's error costs where the next gap's fitted weights undo what they can of it
    (:mod:`hasten.fitted`); measured with single held steps and no fit, early steps cost more.
    """
    t = trace.t
    return torch.tensor(
        [abs(straight(path, kind, now, then)[0]) for now, then in zip(t, [*t[1:], None], strict=True)],
        dtype=torch.float64,
    )
