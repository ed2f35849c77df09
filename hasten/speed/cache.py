"""Step caching: a network call whose answer would hardly differ from the last computed one is not made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.core.errors import ConfigError
from hasten.core.request import current
from hasten.speed.host import Host, needs_denoiser
from hasten.speed.transform import Applied, Transform, one_of, override

FEW = 4  # at most this many steps: a few-step student, every step of which differs from the last


@dataclass
class Branch:
    """What one request remembers of one CFG branch."""

    step: int = -1
    time: float = math.nan
    latest: Tensor | None = None  # x_t of the latest call, computed or not
    x_t: Tensor | None = None  # x_t, t and output of the last computed call
    t: Tensor | None = None
    out: Tensor | None = None
    rate: float = math.nan  # k / mean|out|: relative change of the output per mean change of the input
    error: float = 0.0
    skips: int = 0  # in a row
    like: Any = None  # what a pipeline's network returned, in its own form

    def fits(self, x_t: Tensor) -> bool:
        """Whether what is remembered is of x_t's shape and kind; guidance intervals change the batch midway."""
        old = self.x_t
        return old is not None and (old.shape, old.dtype, old.device) == (x_t.shape, x_t.dtype, x_t.device)


class Engine:
    """The cache of one network: counts here, everything else in the request, keyed by this object and the branch."""

    def __init__(self, config: Cache, at: Host):
        self.config, self.at, self.inner = config, at, at.net.forward
        self.lock = Lock()  # several threads may sample through one network
        self.calls = self.reused = self.outside = 0
        self.nearest = math.inf  # smallest estimated error at which a call was computed for the threshold's sake

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        request = current()
        if request is None:
            with self.lock:
                self.outside += 1
            return self.inner(*args, **kwargs)
        self.config.fits(self.at.steps(request))
        look = self.at.look(args, kwargs)
        mine = request.state.setdefault((self, self.at.branch(look, request)), Branch())
        now = float(look.t.flatten()[0])
        if now != mine.time:  # heun looks twice at a time
            mine.step, mine.time = mine.step + 1, now
        last = self.at.last(look, mine.step, request)
        reuse = self.decide(mine, look.x_t, last) and not kwargs.get("taps")
        with self.lock:
            self.calls += 1
            self.reused += reuse
        if reuse:
            mine.skips += 1
            mine.latest = look.x_t.detach().clone()
            return self.at.output(self.held(mine, look.x_t, look.t), look.x_t, mine.like)
        result = self.inner(*args, **kwargs)
        self.remember(mine, look.x_t, look.t, self.at.pred(result, look.x_t))
        mine.like = self.at.keep(result)
        return result

    def decide(self, mine: Branch, x_t: Tensor, last: bool) -> bool:
        """EasyCache (Zhou et al. 2025): A += k d_in / |out|, reuse while A < threshold; one decision for the batch."""
        if not mine.fits(x_t) or math.isnan(mine.rate):
            return False
        assert mine.latest is not None
        mine.error += mine.rate * float((x_t - mine.latest).abs().mean())
        if mine.step < self.config.warmup or last or mine.skips >= self.config.max_skips:
            return False
        if not mine.error < self.config.threshold:
            with self.lock:
                self.nearest = min(self.nearest, mine.error)
            return False
        return True

    def remember(self, mine: Branch, x_t: Tensor, t: Tensor, out: Tensor) -> None:
        """Measure k = d_out / d_in between the last two computed calls, and start again from A = 0."""
        x_t, t, out = (v.detach().clone() for v in (x_t, t, out))  # the caller may write into them
        if mine.fits(x_t):
            assert mine.x_t is not None and mine.out is not None
            moves = torch.stack([(x_t - mine.x_t).abs().mean(), (out - mine.out).abs().mean(), out.abs().mean()])
            d_in, d_out, size = moves.tolist()
            if d_in > 0 and size > 0:
                mine.rate = d_out / d_in / size
        else:
            mine.rate = math.nan
        mine.latest = mine.x_t = x_t
        mine.t, mine.out, mine.error, mine.skips = t, out, 0.0, 0

    def held(self, mine: Branch, x_t: Tensor, t: Tensor) -> Tensor:
        """The reused prediction at (x_t, t), of x_t's shape.

        EasyCache holds v - x, on rectified flow (there 10 % closer than holding v on a digit teacher). Where the
        scale of x_t differs from the prediction's that means nothing: what is held is then the pair (x0, eps).
        """
        assert mine.out is not None and mine.x_t is not None and mine.t is not None
        kind, path = self.at.kind, self.at.path
        assert kind is not None and path is not None
        if kind == "velocity" and path.name == "rectified_flow":
            return mine.out + (x_t - mine.x_t)
        if kind in ("x0", "eps"):
            return mine.out.clone()
        x0, eps = (path.convert(mine.out, mine.x_t, mine.t, kind, want) for want in ("x0", "eps"))
        return path.target(x0, eps, t, kind).to(mine.out.dtype)


@dataclass(frozen=True)
class Cache:
    """Reuses the last computed prediction while the estimated change since then stays under ``threshold``.

    State belongs to one request (:func:`hasten.core.request.request`, which ``sample`` opens) and one CFG branch,
    and dies with it; outside a request every call is computed. The last step is always computed.

    Args:
        policy: ``easycache``: the change of the output is k times that of the input, with k measured as it runs.
        threshold: Largest accumulated relative change of the output before it is computed again.
        warmup: Steps computed at the start; at least 2, for k needs two.
        max_skips: Most calls reused in a row.
    """

    policy: str = "easycache"
    threshold: float = 0.05
    warmup: int = 2
    max_skips: int = 4
    name: ClassVar[str] = "cache"
    order: ClassVar[int] = 30

    def __post_init__(self) -> None:
        one_of("Cache", "policy", self.policy, ("easycache",))
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)) or not self.threshold > 0:
            raise ConfigError(f"Cache: threshold must be a number above 0, such as 0.05, not {self.threshold!r}.")
        for key, low in (("warmup", 2), ("max_skips", 1)):
            if not isinstance(getattr(self, key), int) or getattr(self, key) < low:
                raise ConfigError(f"Cache: {key} must be a whole number from {low}, not {getattr(self, key)!r}.")

    def check(self, at: Host, stack: Sequence[Transform]) -> None:
        needs_denoiser("Cache", at)

    def fits(self, steps: int) -> None:
        """Raise ConfigError for a request in which no step could be skipped."""
        if steps <= max(FEW, self.warmup + 1):
            raise ConfigError(
                f"Cache: a request of {steps} steps leaves nothing to reuse (the first {self.warmup} and "
                f"the last are computed, and up to {FEW} none resembles another); leave Cache out, or take more than "
                f"{max(FEW, self.warmup + 1)} steps."
            )

    def apply(self, at: Host) -> Applied:
        """Put the cache in front of the network's ``forward``."""
        engine = Engine(self, at)

        def inert() -> str | None:
            if engine.reused:
                return None
            if not engine.calls:
                return (
                    f"Cache: the network was not called inside a request ({engine.outside} calls outside); "
                    "sample with hasten's sample, or open request(steps) around the calls."
                )
            hint = (
                f"the smallest estimated change was {engine.nearest:.2g}, so raise threshold above it"
                if engine.nearest < math.inf
                else "each was in the warm-up, the last, with taps or of another shape, so take more steps"
            )
            said = f"Cache: 0 of {engine.calls} calls were reused at threshold {self.threshold}"
            return f"{said}; {hint}, or leave Cache out."

        def counts() -> dict[str, float]:
            return {
                "calls": engine.calls,
                "reused": engine.reused,
                "hit_rate": engine.reused / max(engine.calls, 1),
            }

        return Applied(override(at.net, engine.forward), counts, inert)
