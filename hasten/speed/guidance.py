"""Guidance where it pays: the unconditional branch computed in an interval, every few steps, at a scale per step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, ClassVar

import torch

from hasten.core.errors import ConfigError
from hasten.core.request import Request, current
from hasten.models.probe import as_sample
from hasten.speed.halves import Layout, alone, copied, layout_of, parts, whole, zipped
from hasten.speed.host import Host, Look, needs_denoiser, subclassed
from hasten.speed.transform import Applied, Transform, number, override, whole_number

COUNTS = ("calls", "rows", "guided", "skipped", "reused", "rescaled", "checked")


@dataclass
class Progress:
    """What one request remembers of its guidance."""

    step: int = -1
    time: float = math.nan
    position: int = -1  # of the call among those at this time
    act: bool = True  # whether this step is guided,
    compute: bool = True  # and its unconditional branch computed
    ratio: float = 1.0  # (w' - 1) / (w - 1)
    cond: Any = None  # the conditional output of this step
    residual: Any = None  # u - c of the last computed step
    shape: Any = None  # of the sample then
    since: int = 0  # guided steps since then
    said: dict[str, Any] = field(default_factory=dict)  # the arguments of the pipeline's call that set the scale
    given: tuple[Look, Any, Any] | None = None  # of this step: the call, c, and u as it was returned


class Engine:
    """The guidance of one network: counts here, all else in the request."""

    def __init__(self, config: Guidance, at: Host, layout: Layout | None):
        self.config, self.at, self.inner, self.lock = config, at, at.net.forward, Lock()
        self.layout = layout or Layout(True, True)  # hasten's own puts the conditional half first
        self.count: dict[str, int] = dict.fromkeys(COUNTS, 0)
        low, high = config.interval
        self.low, self.high = (float(at.path.at(v)) if at.path else v for v in (low, high))
        self.seen = (-math.inf, math.inf)  # first and last time of the steps

    def add(self, **counts: int) -> None:
        with self.lock:
            for key, n in counts.items():
                self.count[key] += n

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mine, found = current(), self.at.arguments(args, kwargs)
        if mine is None or kwargs.get("taps"):
            return self.inner(*args, **kwargs)
        look = self.at.look(args, kwargs)
        state: Progress = mine.state.setdefault(self, Progress())
        now = float(look.t.flatten()[0])
        if now != state.time:
            state.step, state.time, state.position = state.step + 1, now, -1
        state.position += 1
        role = self.role(look, state, mine)
        rows = len(look.x_t)
        if role is None:
            self.add(calls=1, rows=rows)
            return self.inner(*args, **kwargs)
        if role != "uncond":
            self.plan(look.x_t.shape, state, mine)
        if role == "both":
            self.add(guided=1)
            return self.both(found, look, state, rows, (args, kwargs))
        if role == "cond":
            self.add(calls=1, rows=rows)
            result = self.inner(*args, **kwargs)
            state.cond = copied(result)
            return result
        self.add(guided=1)
        if not state.compute:
            return self.without(look, state, rows, state.cond)
        self.add(calls=1, rows=rows)
        return self.computed(self.inner(*args, **kwargs), look, state, state.cond)

    def role(self, look: Look, state: Progress, mine: Request) -> str | None:
        """Which branch a call computes: ``both``, ``cond``, ``uncond``; None for one without guidance."""
        if self.at.pipe is None:
            return None if mine.scale == 1 else "both" if mine.paired else mine.branch
        x, half = look.x_t, len(look.x_t) // 2
        if not self.guided(state, mine):
            return None
        if self.layout.batched:
            return "both" if len(x) == 2 * half and torch.equal(x[:half], x[half:]) else None
        return "uncond" if state.position % 2 else "cond"

    def guided(self, state: Progress, mine: Request) -> bool:
        """Whether the pipeline's call asks for guidance: an argument is above the value that turns it off."""
        if not state.said:
            call = mine.state.get("call")
            if call is None:
                return False
            known = inspect.signature(type(self.at.pipe).__call__).parameters
            for name in self.at.adapter.found.quiet:
                part, _, attribute = name.partition(".")
                inner = attribute and getattr(getattr(self.at.pipe, part), attribute)
                state.said[name] = inner if attribute else call.get(name, known[name].default)
        off = self.at.adapter.found.quiet
        return any(v is not None and (not isinstance(v, (int, float)) or v > off[k]) for k, v in state.said.items())

    def plan(self, shape: torch.Size, state: Progress, mine: Request) -> None:
        """Decide for a step, at its first call: guided or not, the branch computed or not, and the factor of c - u."""
        now, config = state.time, self.config
        margin = 1e-6 * abs(self.high - self.low)
        state.act = self.low - margin <= now <= self.high + margin
        state.ratio, state.cond, state.given = 1.0, None, None
        with self.lock:
            self.seen = max(self.seen[0], now), min(self.seen[1], now)
        if state.act and config.scales:
            w, wanted = self.scale(state, mine), config.scales[self.part(state.step, mine)]
            state.act, state.ratio = wanted != 1, (wanted - 1) / (w - 1)
        held = state.residual is not None and state.since < config.reuse and state.shape == shape
        state.compute = state.act and not held

    def part(self, step: int, mine: Request) -> int:
        """Which of the scales is the step's: they are even parts of the request's steps."""
        assert self.config.scales is not None
        pipe = self.at.pipe
        steps = mine.steps if pipe is None else len(set(pipe.scheduler.timesteps.tolist()))
        return min(step * len(self.config.scales) // max(steps, 1), len(self.config.scales) - 1)

    def scale(self, state: Progress, mine: Request) -> float:
        """The w of u + w (c - u) that the caller will apply.

        Raises:
            ConfigError: Where its arguments do not say so.
        """
        if self.at.pipe is None:
            return mine.scale
        found = self.at.adapter.found
        known = inspect.signature(type(self.at.pipe).__call__).parameters
        numbers = {k: v for k, v in state.said.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        if len(state.said) == len(numbers) == 1:
            ((name, value),) = numbers.items()
            probed = found.call.get(name, known[name].default)
            more = found.cfg_scale - float(probed)  # 0, or 1 where the pipeline computes c + s (c - u)
            if min(abs(more), abs(more - 1)) < 1e-2 * found.cfg_scale:
                return value + round(more)
        raise ConfigError(f"Guidance: the scale that {state.said} stand for is not known; leave scales out.")

    def both(self, found: dict[str, Any], look: Look, state: Progress, rows: int, call: Any) -> Any:
        """The answer to a call of 2B rows."""
        if state.compute:
            self.add(calls=1, rows=rows)
            result = self.inner(*call[0], **call[1])
            cond, uncond = parts(result, self.layout)
            changed = self.computed(uncond, look, state, cond)
            return result if changed is uncond else whole(cond, changed, self.layout)
        self.add(calls=1, rows=rows // 2)
        cond = self.inner(**alone(self.at, found, self.layout, rows))
        return whole(cond, self.without(look, state, rows // 2, cond), self.layout)

    def computed(self, uncond: Any, look: Look, state: Progress, cond: Any) -> Any:
        """What a computed unconditional output is returned as; the very same object where nothing changes."""
        if not self.config.reuse and state.ratio == 1:
            return uncond
        residual = zipped(torch.sub, uncond, cond)
        if self.config.reuse:
            state.since, state.shape, state.residual = 0, look.x_t.shape, residual
        return uncond if state.ratio == 1 else self.moved(look, state, cond, residual)

    def without(self, look: Look, state: Progress, rows: int, cond: Any) -> Any:
        """What stands for an unconditional output that is not computed: c, or c + the last residual."""
        self.add(skipped=1)
        if not state.act:
            return cond  # u + w (c - u) = c, also where the norm is rescaled to c's
        state.since += 1
        self.add(reused=1)
        return self.moved(look, state, cond, state.residual)

    def moved(self, look: Look, state: Progress, cond: Any, residual: Any) -> Any:
        """u' = c + (w' - 1) / (w - 1) (u - c), for which the caller's u' + w (c - u') is u + w' (c - u)."""
        self.add(rescaled=int(state.ratio != 1))
        made = zipped(lambda c, r: c + state.ratio * r, cond, residual)
        if self.config.scales and self.at.pipe is not None:
            state.given = (look, cond, made)
        return made

    def checked(self, given: Any, mine: Request | None) -> None:
        """Raise ConfigError where a scheduler is given something else than u' + w (c - u'), up to its rows' norms."""
        state = mine.state.get(self) if mine else None
        if mine is None or state is None or state.given is None:
            return
        look, *pair = state.given
        state.given, about, half = None, self.at.adapter.found, len(look.x_t) // (2 if self.layout.batched else 1)
        x, t, w = look.x_t[:half], look.t[:half], self.scale(state, mine)
        c, u = (about.given(self.at.pred(v, x), x, t).double() for v in pair)
        out, want = as_sample(given[:half], x).double(), u + w * (c - u)
        factor = (out * want).sum(-1, keepdim=True) / want.square().sum(-1, keepdim=True).clamp_min(1e-30)
        slack = 0.02 * w * (c - u).norm() + 64 * torch.finfo(x.dtype).eps * want.norm()
        if (out - factor * want).norm() > slack:
            raise ConfigError(
                f"Guidance: the pipeline did not guide with the scale {w:g} that its call says (it may change from "
                "step to step), so scales cannot replace it; leave scales out."
            )
        self.add(checked=1)


@dataclass(frozen=True)
class Guidance:
    """Computes the unconditional branch of classifier-free guidance only where it is wanted.

    Given to a pipeline, whose own formula for guidance, norms and all, stays in place: what it is given for the
    unconditional prediction u is replaced. c is the conditional one, w the caller's scale.

    Args:
        interval: Unit times [lo, hi] of the path, 0 is data, in which guidance acts (Kynkaanniemi et al. 2024);
            outside u = c, and the branch is not computed: one call of two, or half of a batch.
        reuse: Guided steps in a row that take u - c of the last computed step instead of computing it.
        scales: Guidance scales w' in the convention u + w (c - u), each for an equal part of the steps (as many as
            steps: one each), instead of w. Where w' is 1 the branch is not computed.
    """

    interval: tuple[float, float] = (0.0, 1.0)
    reuse: int = 0
    scales: tuple[float, ...] | None = None
    name: ClassVar[str] = "guidance"
    order: ClassVar[int] = 35

    def __post_init__(self) -> None:
        for key in ("interval", "scales"):
            value = getattr(self, key)
            if key == "interval" or value is not None:
                if not isinstance(value, (list, tuple)) or not value or not all(number(v) for v in value):
                    raise ConfigError(f"Guidance: {key} must be numbers such as (0.1, 0.8), not {value!r}.")
                object.__setattr__(self, key, tuple(float(v) for v in value))  # YAML has lists
        if len(self.interval) != 2 or not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise ConfigError(f"Guidance: interval must be 0 <= low < high <= 1, not {self.interval!r}.")
        if not whole_number(self.reuse, 0):
            raise ConfigError(f"Guidance: reuse must be a whole number from 0, not {self.reuse!r}.")

    def check(self, at: Host, stack: Sequence[Transform]) -> None:
        needs_denoiser("Guidance", at)
        if self.interval == (0.0, 1.0) and not self.reuse and not self.scales:
            raise ConfigError(
                "Guidance: an interval of all times without reuse or scales changes nothing; narrow interval, such as "
                "(0.1, 0.8), or leave Guidance out."
            )
        if any(t.name == "compile" and getattr(t, "scope", "") == "net" for t in stack):
            raise ConfigError("Guidance: scope 'net' would compile its decisions; use Compile('blocks') beside it.")
        if at.pipe is None:
            return
        if at.adapter.uncond is None or at.adapter.found.cfg_scale == 1:
            raise ConfigError(
                f"Guidance: {type(at.pipe).__name__} computes no unconditional branch in this call (its guidance is "
                "an input of the network, or its scale is 1); give speed_up a call with a scale above 1 and a "
                "negative prompt, or leave Guidance out."
            )
        layout_of(at)

    def apply(self, at: Host) -> Applied:
        """Put the decisions in front of the network's ``forward``."""
        engine = Engine(self, at, None if at.pipe is None else layout_of(at))
        undos = [override(at.net, engine.forward)]
        if self.scales and at.pipe is not None:
            own = type(at.pipe.scheduler).step

            def step(scheduler: Any, model_output: Any, *args: Any, **kwargs: Any) -> Any:
                engine.checked(model_output, current())
                return own(scheduler, model_output, *args, **kwargs)

            undos.append(subclassed(at.pipe.scheduler, "step", step))

        def undo() -> None:
            for back in reversed(undos):
                back()

        return Applied(undo, lambda: {k: float(v) for k, v in engine.count.items()}, lambda: self._inert(engine))

    def _inert(self, engine: Engine) -> str | None:
        count = engine.count
        plain, rest = count["skipped"] - count["reused"], "or leave Guidance out."
        if not count["guided"]:
            return f"Guidance: none of {count['calls']} calls was guided; sample with a scale above 1, {rest}"
        if self.interval != (0.0, 1.0) and not plain:
            times, inside = (f"{a:.3g} to {b:.3g}" for a, b in (engine.seen, (engine.high, engine.low)))
            return f"Guidance: all guided steps (times {times}) were inside the interval ({inside}); narrow it, {rest}"
        if self.reuse and not count["reused"]:
            return f"Guidance: no residual was reused in {count['guided']} guided steps; take more steps, {rest}"
        if self.scales and not plain and not count["rescaled"]:
            return f"Guidance: the scales are those that {count['guided']} steps had anyway; change them, {rest}"
        if count["rescaled"] and engine.at.pipe is not None and not count["checked"]:
            return (
                "Guidance: the pipeline never stepped its scheduler, so its scale was not verified; leave scales out."
            )
        return None
