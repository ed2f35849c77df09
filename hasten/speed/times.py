"""Sampling times of one's own in a pipeline: its scheduler steps through them, which is tried out before."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.core.errors import ConfigError, UnsupportedModel
from hasten.core.path import expand
from hasten.speed.host import Host, needs_denoiser, subclassed
from hasten.speed.transform import Applied, Transform, number

SLACK = 5e-3  # of alpha, from 1 at the data to 0 at the noise: the boundary terms of consistency schedulers stay below


@dataclass(frozen=True)
class Way:
    """One way to give a scheduler its times.

    Args:
        timesteps: The scheduler's times [n].
        sigmas: Its noise levels there [n], in its own convention; None where it has none.
        given: Through its own argument ``timesteps``; else they are written after it has set its own.
    """

    timesteps: Tensor
    sigmas: Tensor | None
    given: bool = False

    def set(self, scheduler: Any, own: Callable[..., Any]) -> None:
        """Set them on a scheduler that has just set its own by ``own``."""
        if self.given:
            own(scheduler, timesteps=self.timesteps.tolist(), device=scheduler.timesteps.device)
            return
        scheduler.timesteps = self.timesteps.to(scheduler.timesteps.device)
        if self.sigmas is not None:
            levels = self.sigmas.to(scheduler.sigmas)
            scheduler.sigmas = torch.cat([levels, scheduler.sigmas[len(levels) :]])


@dataclass(frozen=True)
class Times:
    """The steps of a pipeline at given times, such as :func:`hasten.learn_times` learns (LD3, AYS).

    Args:
        times: Unit times of the path, falling; one a step. A 0 at the end, as ``Sampling.times`` has, is no step: where
            the last one ends is the scheduler's own. On a path whose shift depends on the size, the probed call's.
    """

    times: tuple[float, ...]
    name: ClassVar[str] = "times"
    order: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if not isinstance(self.times, (list, tuple)) or not all(number(v) for v in self.times):
            raise ConfigError(f"Times: times must be numbers such as (1.0, 0.7, 0.3), not {self.times!r}.")
        object.__setattr__(self, "times", tuple(float(v) for v in self.times))
        used = self.steps
        if not used or any(a <= b for a, b in zip(used, used[1:], strict=False)) or not 0 < used[-1] <= used[0] <= 1:
            raise ConfigError(f"Times: times must fall, from at most 1 to above 0, not {self.times!r}.")

    @property
    def steps(self) -> tuple[float, ...]:
        """The times at which the network is called."""
        return self.times[:-1] if self.times and self.times[-1] == 0 else self.times

    def check(self, at: Host, stack: Sequence[Transform]) -> None:
        needs_denoiser("Times", at)
        if at.pipe is None:
            raise ConfigError(
                "Times: hasten's own models are sampled at the times of their Sampling; use "
                "sample(net, noise, cond, Sampling(times)) instead of this layer."
            )
        self.way(at)

    def way(self, at: Host) -> Way:
        """How the pipeline's scheduler takes them, the first way by which it lands on every one.

        Raises:
            UnsupportedModel: If there is none.
        """
        scheduler, found, n = at.pipe.scheduler, at.adapter.found, len(self.steps)
        name, path = type(scheduler).__name__, at.adapter.path
        times = path.at(torch.tensor(self.steps, dtype=torch.float64))
        dials = found.dial(times)
        if bool((found.clock(dials) - times).abs().max() > 1e-4) or bool(dials.min() < 0):
            raise UnsupportedModel(f"Times: {name} has no times {dials.tolist()} for the unit times {self.steps}.")
        own = type(scheduler).set_timesteps
        known = inspect.signature(own).parameters
        trial = fresh(at, n)
        if len(trial.timesteps) != n:
            raise UnsupportedModel(
                f"Times: {name} calls the network {len(trial.timesteps)} times in {n} steps, so a time for each step "
                "does not say when; take a scheduler with one call a step, such as DPMSolverMultistepScheduler."
            )
        whole = dials.round().clamp(0, float(found.dial(path.at(torch.tensor(1.0, dtype=torch.float64))).round()))
        ways = [Way(dials.float(), levels(at, trial, times))]
        if len(whole.unique()) == n:
            ways += [Way(whole.long(), None, given=True)] if "timesteps" in known else []
            ways += [Way(whole.long(), levels(at, trial, found.clock(whole)))]
        said = []
        for way in ways:
            trial = fresh(at, n)
            try:
                way.set(trial, own)
                miss = landing(at, trial, found.clock(way.timesteps.double()))
            except (TypeError, ValueError, IndexError, RuntimeError) as error:
                said.append(str(error).splitlines()[0])
                continue
            if miss <= SLACK:
                return way
            said.append(f"it lands off by {miss:.2g} in alpha")
        raise UnsupportedModel(
            f"Times: {name} does not step through times that are set ({'; '.join(dict.fromkeys(said))}); swap it, e.g. "
            "pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)."
        )

    def apply(self, at: Host) -> Applied:
        """Override the scheduler's ``set_timesteps``."""
        way, n = self.way(at), len(self.steps)
        own, count = type(at.pipe.scheduler).set_timesteps, {"requests": 0, "steps": 0, "moved": 0}

        def set_timesteps(scheduler: Any, *args: Any, **kwargs: Any) -> None:
            own(scheduler, *args, **kwargs)
            before = scheduler.timesteps
            if len(before) != n:
                raise ConfigError(f"Times: there are {n} times and the call asks for {len(before)} steps; ask for {n}.")
            way.set(scheduler, own)
            gap = (scheduler.timesteps.double().cpu() - before.double().cpu()).abs()
            count["requests"] += 1
            count["steps"] += n
            count["moved"] += int((gap > 1e-6 * before.max().item()).sum())

        def inert() -> str | None:
            if not count["requests"]:
                return "Times: the pipeline never set its scheduler's times; call it inside, or leave Times out."
            if not count["moved"]:
                return f"Times: {self.times} are those that the scheduler takes anyway; leave Times out."
            return None

        undo = subclassed(at.pipe.scheduler, "set_timesteps", set_timesteps)
        return Applied(undo, lambda: {k: float(v) for k, v in count.items()}, inert)


def fresh(at: Host, n: int) -> Any:
    """A copy of the pipeline's scheduler, set to ``n`` steps; with the probed call's shift where it wants one."""
    scheduler, mu = copy.deepcopy(at.pipe.scheduler), {}
    if scheduler.config.get("use_dynamic_shifting", False):
        shift = torch.tensor((*at.adapter.path.args, 1.0)[0])
        linear = scheduler.config.get("time_shift_type") == "linear"
        mu = {"mu": float(shift if linear else shift.log())}
    scheduler.set_timesteps(n, **mu)
    return scheduler


def levels(at: Host, scheduler: Any, times: Tensor) -> Tensor | None:
    """The scheduler's noise levels at the path's ``times`` [n], in the convention that its own levels have.

    Raises:
        UnsupportedModel: If they are neither sigma nor sigma / alpha, nor 1 - sigma.
    """
    own = getattr(scheduler, "sigmas", None)
    n = len(scheduler.timesteps)
    if not isinstance(own, Tensor) or len(own) != n + 1:
        return None
    here = at.adapter.found.clock(scheduler.timesteps.double().cpu())
    for rule in (lambda a, s: s, lambda a, s: s / a, lambda a, s: 1 - s):
        seen, wanted = (rule(*at.adapter.path.coeffs(v)[:2]) for v in (here, times))
        if bool(((seen - own[:n].double().cpu()).abs() <= 1e-3 + 0.02 * seen.abs()).all()):
            return wanted
    raise UnsupportedModel(f"Times: {type(scheduler).__name__} has noise levels {own.tolist()} of no known convention.")


@torch.no_grad()
def landing(at: Host, scheduler: Any, times: Tensor) -> float:
    """How far from ``times`` [n] of the path the scheduler's steps land, at most: the error of alpha.

    The network is replaced by the truth about one x0. Any solver, of any order, deterministic or not, then carries
    alpha(t) x0 of it at time t; two runs that differ in x0 alone show it.
    """
    adapter = at.adapter
    path, found = adapter.path, adapter.found
    accepts = inspect.signature(scheduler.step).parameters
    seen: list[list[Tensor]] = []
    for x0 in (-0.2, 0.2):
        each, mine, draw = [], copy.deepcopy(scheduler), torch.Generator().manual_seed(0)
        data = torch.full((1, *adapter.shape), x0, dtype=torch.float64)
        x = path.mix(data, torch.randn(data.shape, generator=draw, dtype=torch.float64), times[:1])
        scale = getattr(mine, "scale_model_input", lambda x, t: x)
        x = x / scale(torch.ones_like(x), mine.timesteps[0])
        for i, timestep in enumerate(mine.timesteps):
            y, t = scale(x, timestep), times[i : i + 1]
            each.append(y)
            alpha, sigma, _, _ = (expand(v, y) for v in path.coeffs(t))
            truth = path.target(data, (y - alpha * data) / sigma, t, adapter.kind)
            drawn = {"generator": draw} if "generator" in accepts else {}
            x = mine.step(found.given(truth, y, t), timestep, x, **drawn, return_dict=False)[0]
        seen.append(each)
    share = torch.stack([(b - a).mean() / 0.4 for a, b in zip(*seen, strict=True)])
    return float((share - path.coeffs(times)[0]).abs().max())
