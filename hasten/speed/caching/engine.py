"""What every cache does: tell requests, branches and steps apart, ask the policy, remember what was computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from threading import Lock
from typing import Any

from torch import Tensor

from hasten.core.request import Request, current
from hasten.speed.caching.blocks import Blocks
from hasten.speed.caching.deep import Deep
from hasten.speed.caching.policies import Policy, combined
from hasten.speed.caching.stack import Stack
from hasten.speed.caching.state import Branch, Call, Snapshot
from hasten.speed.caching.tokens import Tokens
from hasten.speed.host import Host
from hasten.speed.transform import override

LEVELS: dict[str, type[Blocks]] = {"stack": Stack, "deep": Deep, "tokens": Tokens}


class Engine:
    """The cache of one network: counts here, everything else in the request, keyed by this object and the branch."""

    def __init__(self, config: Any, policy: Policy, at: Host):
        self.config, self.policy, self.at, self.inner = config, policy, at, at.net.forward
        self.blocks = LEVELS[policy.level](self) if policy.level in LEVELS else None
        self.lock = Lock()  # several threads may sample through one network
        self.calls = self.reused = self.outside = 0
        self.nearest = math.inf  # smallest estimated error at which a call was computed for the threshold's sake

    def install(self) -> Callable[[], None]:
        """Put the cache in front of the network's forward and, where it acts inside, of its blocks'."""
        undos = self.blocks.install() if self.blocks else []
        undos.append(override(self.at.net, self.forward))

        def undo() -> None:
            for back in reversed(undos):
                back()

        return undo

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's forward, or what stands for it."""
        request = current()
        if request is None:
            with self.lock:
                self.outside += 1
            return self.inner(*args, **kwargs)
        self.config.fits(self.at.steps(request))
        call = self.opened(request, args, kwargs)
        mine = call.mine
        if self.blocks is None:
            if self.decide(call):
                self.count(call)
                return self.at.output(self.predicted(call), call.x_t, mine.past[-1].like)
            result = self.inner(*args, **kwargs)
        else:
            with self.blocks.during(request, call):
                result = self.inner(*args, **kwargs)
        self.count(call)
        if not call.skip:
            self.remember(call, result)
        return result

    def opened(self, request: Request, args: Any, kwargs: Any) -> Call:
        """This call: its branch, its step (heun looks twice at a time), and whether it may be skipped at all."""
        look = self.at.look(args, kwargs)
        mine = request.state.setdefault((self, self.at.branch(look, request)), Branch())
        mine.begin((look.x_t.shape, look.x_t.dtype, look.x_t.device))
        now = float(look.t.flatten()[0])
        clock = request.state.setdefault((self, "clock"), [-1, math.nan])  # of all branches: guidance may skip one's
        if now != clock[1]:
            clock[0], clock[1] = clock[0] + 1, now
        mine.step, mine.time = clock[0], now
        free = bool(mine.past) and not kwargs.get("taps")
        if free and "warmup" in self.policy.fields:
            free = mine.step >= self.config.warmup and not self.at.last(look, mine.step, request)
        if free and "max_skips" in self.policy.fields and not self.config.interval:  # an interval says how many
            free = mine.skips < self.config.max_skips
        if free and self.config.total_skips:
            free = mine.total < self.config.total_skips
        return Call(mine, look.x_t, look.t, mine.step, now, free)

    def decide(self, call: Call) -> bool:
        """Whether to skip, one decision for the batch; the policy sees every call that has a past."""
        call.skip = False
        if not call.mine.past:
            return False
        error = self.policy.error(self.config, call)
        call.skip = call.free and error < self.limit
        if call.free and not call.skip and error < math.inf:
            with self.lock:
                self.nearest = min(self.nearest, error)
        return call.skip

    @property
    def limit(self) -> float:
        """The threshold; policies without one estimate 0 or infinity."""
        return 1.0 if self.config.threshold is None else self.config.threshold

    def count(self, call: Call) -> None:
        """Count a call that is over, or will not be made."""
        with self.lock:
            self.calls += 1
            self.reused += bool(call.skip)
        if call.skip:
            call.mine.skips += 1
            call.mine.total += 1

    def remember(self, call: Call, result: Any) -> None:
        """Keep what the policy looks back at, and start again from an error of 0."""
        mine, snapshot = call.mine, Snapshot(call.step, call.time, probe=call.probe, residuals=call.residuals)
        out = self.at.pred(result, call.x_t)
        if self.blocks is None:  # copies: the caller may write into what it gave and got
            snapshot.x_t, snapshot.t, snapshot.out = (v.detach().clone() for v in (call.x_t, call.t, out))
            snapshot.like = self.at.keep(result)
        if self.policy.after:
            self.policy.after(self.config, call, out)
        kept = [s for s in mine.past if s.time != call.time]  # heun may compute twice at a time
        mine.past = [*kept, snapshot][-self.policy.past(self.config) :]
        mine.error, mine.skips = 0.0, 0

    def predicted(self, call: Call) -> Tensor:
        """The prediction of a skipped call, of x_t's shape: a forecast, or what is held."""
        past = call.mine.past
        if self.policy.weights and (self.config.degree is not None or self.config.weights):
            outs = [s.out for s in past if s.out is not None]
            found = combined(self.policy.weights(self.config, call), outs)
            return found.clone() if found is outs[-1] else found  # the caller may write into it
        last = past[-1]
        assert last.out is not None and last.x_t is not None and last.t is not None
        return held(self.at, last.out, last.x_t, last.t, call.x_t, call.t)


def held(at: Host, out: Tensor, x_t: Tensor, t: Tensor, x_now: Tensor, now: Tensor) -> Tensor:
    """The prediction ``out`` at (x_t, t) held until (x_now, now), each [B, ...] and [B].

    EasyCache holds v - x, on rectified flow (there 10 % closer than holding v on a digit teacher). Where the scale of
    x_t differs from the prediction's that means nothing: what is held is then the pair (x0, eps).
    """
    kind, path = at.kind, at.path
    assert kind is not None and path is not None
    if kind == "velocity" and path.name == "rectified_flow":
        return out + (x_now - x_t)
    if kind in ("x0", "eps"):
        return out.clone()
    x0, eps = (path.convert(out, x_t, t, kind, want) for want in ("x0", "eps"))
    return path.target(x0, eps, now, kind).to(out.dtype)
