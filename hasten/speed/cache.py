"""Step caching: what would hardly differ from the last computed call, or from a forecast, is not computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from hasten.core.errors import ConfigError, UnsupportedModel
from hasten.speed.caching.calibrate import calibrate
from hasten.speed.caching.engine import Engine
from hasten.speed.caching.policies import POLICIES, Policy
from hasten.speed.host import Host, needs_denoiser
from hasten.speed.transform import Applied, Transform, number, one_of, whole_number

FEW = 4  # at most this many steps: a few-step student, every step of which differs from the last

__all__ = ["FEW", "POLICIES", "Cache", "calibrate"]


@dataclass(frozen=True)
class Cache:
    """Skips what the policy estimates to have hardly changed; docs/caching.md compares the policies.

    State belongs to one request (:func:`hasten.core.request.request`, which ``sample`` opens) and one CFG branch,
    and dies with it; outside a request every call is computed. But for ``schedule``, the last step is computed too.

    Args:
        policy: A skip makes no call at all: ``easycache`` (online, the default), ``taylor`` (forecast), ``schedule``
            (planned), ``magcache`` (calibrated). It leaves out all blocks, or those behind the first ones:
            ``teacache`` (calibrated), ``firstblock``, ``dual``, ``dicache``; the inner blocks of a UNet:
            ``deepcache``; some of the tokens: ``regions``.
        threshold: Largest estimated relative change; None is the policy's own default.
        warmup: Steps computed at the start; at least 2, for an estimate needs two.
        max_skips: Most calls skipped in a row, where no ``interval`` says it; ``total_skips`` in a request's branch
            (``dual``; 0: no cap).
        degree: Of the forecast in time, 0 to 2: of the prediction (``taylor``; ``schedule``, where None holds it as
            ``easycache`` does) or of the blocks' residual (``firstblock``, ``dual``).
        interval: Compute every n-th step; 0 leaves ``taylor`` to the threshold.
        mask: One character a step, or one bool: ``1`` is a skip (``schedule``).
        weights: Of :func:`hasten.fit_weights`: for every step the (computed step, weight) pairs whose sum
            stands for a skipped one, in place of ``degree`` (``schedule``).
        ratios: Of :func:`calibrate`, one a step (``magcache``).
        coefficients: Of :func:`calibrate`, of a polynomial, highest power first, for requests of ``steps`` steps
            (``teacache``).
        first: Blocks computed at every step (``dual``, ``dicache``: the probe; ``deepcache``: at either end).
        last: Blocks computed at every step at the end (``dual``).
        share: Of the tokens, computed between full steps (``regions``).
    """

    policy: str = "easycache"
    threshold: float | None = None
    warmup: int = 2
    max_skips: int = 4
    total_skips: int = 0
    degree: int | None = None
    interval: int | None = None
    mask: tuple[bool, ...] | str = ()
    weights: tuple[tuple[tuple[int, float], ...], ...] = ()
    ratios: tuple[float, ...] = ()
    coefficients: tuple[float, ...] = ()
    steps: int = 0
    first: int = 1
    last: int = 0
    share: float = 0.3
    name: ClassVar[str] = "cache"
    order: ClassVar[int] = 30

    def __post_init__(self) -> None:
        one_of("Cache", "policy", self.policy, tuple(POLICIES))
        for key in ("mask", "weights", "ratios", "coefficients"):
            self._set(key, self._listed(key, getattr(self, key)))
        usual = self._defaults()
        for f in fields(self):
            value, known = getattr(self, f.name), (f.default, usual.get(f.name, f.default))
            said = all(type(value) is not type(v) or value != v for v in known)
            if said and f.name not in ("policy", *self.about.fields):
                raise ConfigError(f"Cache: {f.name} does nothing for {self.policy}; leave it out.")
        for key, value in usual.items():
            if key in self.about.fields and getattr(self, key) is None:
                self._set(key, value)
        self._check_numbers()
        self._check_plans()

    @property
    def about(self) -> Policy:
        """The policy."""
        return POLICIES[self.policy]

    def _set(self, key: str, value: Any) -> None:
        object.__setattr__(self, key, value)

    def _defaults(self) -> dict[str, Any]:
        degree = {"taylor": 1, "firstblock": 0, "dual": 0}.get(self.policy)
        interval = {"taylor": 0, "deepcache": 3, "regions": 4}.get(self.policy)
        return {"threshold": self.about.threshold, "degree": degree, "interval": interval}

    def _listed(self, key: str, value: Any) -> tuple[Any, ...]:
        """A tuple of plain values; a mask may be text."""
        if key == "mask":
            if not isinstance(value, (str, list, tuple)):
                raise ConfigError(
                    f"Cache: mask is one bool a step, or text of 0 and 1 such as '0011', which YAML takes for a number "
                    f"without its quotes, not {value!r}."
                )
            given = [{"0": False, "1": True}.get(v, v) for v in value] if isinstance(value, str) else list(value)
            if not all(isinstance(v, bool) for v in given):
                raise ConfigError(f"Cache: mask is one bool a step, or text of 0 and 1 such as '0011', not {value!r}.")
            return tuple(given)
        if key == "weights":
            return weighed(value)
        if not isinstance(value, (list, tuple)) or not all(number(v) for v in value):
            raise ConfigError(f"Cache: {key} must be the finite numbers of calibrate, not {value!r}.")
        return tuple(float(v) for v in value)

    def _check_numbers(self) -> None:
        t = self.threshold
        if t is not None and (not number(t) or t <= 0):
            raise ConfigError(f"Cache: threshold must be a number above 0, such as 0.05, not {t!r}.")
        lows = {"warmup": 2, "max_skips": 1, "total_skips": 0, "steps": 0, "last": 0, "first": 1}
        lows["interval"] = 0 if self.policy == "taylor" else 1
        for key, low in lows.items():
            value = getattr(self, key)
            if not (whole_number(value, low) or (key == "interval" and value is None)):
                raise ConfigError(f"Cache: {key} must be a whole number from {low}, not {value!r}.")
        if self.degree is not None and not (whole_number(self.degree, 0) and self.degree <= 2):
            raise ConfigError(f"Cache: degree must be 0, 1 or 2, not {self.degree!r}.")
        if not number(self.share) or not 0 < self.share < 1:
            raise ConfigError(f"Cache: share must be a number between 0 and 1, not {self.share!r}.")

    def _check_plans(self) -> None:
        if self.policy == "schedule" and (not self.mask or self.mask[0]):
            raise ConfigError("Cache: schedule needs a mask with one entry a step, the first of them 0 (computed).")
        if self.weights:
            known = len(self.weights) == len(self.mask) and all(
                all(0 <= i < k and not self.mask[i] for i, _ in row) and bool(row) == bool(self.mask[k])
                for k, row in enumerate(self.weights)
            )
            if not known or self.degree is not None:
                raise ConfigError(
                    "Cache: weights hold pairs of an earlier computed step and its weight for every step that the mask "
                    "skips and no other, and need no degree; take those of hasten.fit_weights."
                )
        many = {"magcache": (self.ratios, "a ratio for every step"), "teacache": (self.coefficients, "coefficients")}
        have, want = many.get(self.policy, ((1.0,), ""))
        if not have or (self.policy == "teacache" and (len(have) != 5 or not self.steps)):
            raise ConfigError(
                f'Cache: {self.policy} needs {want} of this very model; take Cache("{self.policy}", '
                f'**hasten.speed.cache.calibrate(model, "{self.policy}", runs, steps)).'
            )

    def check(self, at: Host, stack: Sequence[Transform]) -> None:
        needs_denoiser("Cache", at)
        blocks, level = len(at.blocks), self.about.level
        if level == "stack" and self.policy != "teacache" and self.first + self.last > blocks - (self.last == 0):
            raise ConfigError(
                f"Cache: {type(at.net).__name__} has {blocks} blocks, of which first={self.first} and "
                f"last={self.last} leave none to skip; lower them."
            )
        if level == "deep" and 2 * self.first >= blocks:
            raise UnsupportedModel(
                f"Cache: {type(at.net).__name__} has {blocks} blocks, of which first={self.first} at either end leave "
                "none inside; lower first, or use another policy."
            )
        if level == "tokens" and any(t.name == "compile" for t in stack):
            raise ConfigError("Cache: regions chooses tokens inside the blocks, which Compile would trace; keep one.")

    def ceiling(self, steps: int) -> int:
        """How many of a branch's steps can be skipped at most: by the warm-up, the last step, intervals and caps."""
        if self.policy == "schedule":
            return sum(bool(v) for v in self.mask)
        longest = self.interval - 1 if self.interval else self.max_skips
        free, found, run = range(self.warmup, steps - 1), 0, 0
        for _ in free:
            run = run + 1 if run < longest else 0
            found += run > 0
        return min(found, self.total_skips or found)

    def fits(self, steps: int) -> None:
        """Raise ConfigError for a request in which no step could be skipped, or of another plan's step count."""
        plans = {"schedule": len(self.mask), "magcache": len(self.ratios), "teacache": self.steps}
        known = plans.get(self.policy, steps)
        if known != steps:
            again = "plan it again" if self.policy == "schedule" else "calibrate again"
            raise ConfigError(f"Cache: this {self.policy} is for requests of {known} steps, not {steps}; {again}.")
        if self.policy != "schedule" and steps <= max(FEW, self.warmup + 1):
            raise ConfigError(
                f"Cache: a request of {steps} steps leaves nothing to reuse (the first {self.warmup} and "
                f"the last are computed, so at most {self.ceiling(steps)} of {steps} could be skipped, and up to {FEW} "
                f"none resembles another); leave Cache out, or take more than {max(FEW, self.warmup + 1)} steps."
            )

    def reaches(self, steps: int) -> None:
        """As :meth:`fits`, before any request: also refused where intervals and masks leave no step to skip."""
        self.fits(steps)
        if not self.ceiling(steps):
            raise ConfigError(
                f"Cache: at most 0 of {steps} steps could be skipped: the mask skips none, or the interval computes "
                "every one; plan another, or leave Cache out."
            )

    def apply(self, at: Host) -> Applied:
        """Put the cache in front of the network's ``forward`` and, where the policy looks inside, of its blocks'."""
        engine = Engine(self, self.about, at)

        def inert() -> str | None:
            return None if engine.reused else self._why(engine, len(at.blocks))

        def counts() -> dict[str, float]:
            return {
                "calls": engine.calls,
                "reused": engine.reused,
                "hit_rate": engine.reused / max(engine.calls, 1),
            }

        return Applied(engine.install(), counts, inert)

    def _why(self, engine: Engine, blocks: int) -> str:
        """Why nothing was skipped, and what would change that."""
        if not engine.calls:
            return (
                f"Cache: the network was not called inside a request ({engine.outside} calls outside); "
                "sample with hasten's sample, or open request(steps) around the calls."
            )
        said = f"Cache: 0 of {engine.calls} calls were reused"
        if self.policy == "schedule":
            return f"{said}: the mask skips no step; leave Cache out."
        if self.interval == 1:
            return f"{said}: an interval of 1 computes every step; raise it, or leave Cache out."
        if self.about.level == "stack" and self.policy != "teacache" and self.first + self.last >= blocks:
            return f"{said}: first={self.first} and last={self.last} are all {blocks} blocks; lower them."
        hint = (
            f"the smallest estimated change was {engine.nearest:.2g}, so raise threshold above it"
            if engine.nearest < math.inf
            else "each was in the warm-up, the last, with taps or of another shape, so take more steps"
        )
        at = f" at threshold {self.threshold}" if self.threshold is not None and not self.interval else ""
        return f"{said}{at}; {hint}, or leave Cache out."


def weighed(value: Any) -> tuple[tuple[tuple[int, float], ...], ...]:
    """Rows of (step, weight) as tuples of plain numbers.

    Raises:
        ConfigError: For anything else.
    """
    listed = lambda v: isinstance(v, (list, tuple))  # noqa: E731
    pair = lambda v: listed(v) and len(v) == 2 and whole_number(v[0], 0) and number(v[1])  # noqa: E731
    if not listed(value) or not all(listed(row) and all(pair(v) for v in row) for row in value):
        raise ConfigError(f"Cache: weights must be rows of (step, weight) pairs, one row a step, not {value!r}.")
    return tuple(tuple((i, float(w)) for i, w in row) for row in value)
