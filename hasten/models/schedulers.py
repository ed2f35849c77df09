"""The stock diffusers scheduler that runs a pipeline at a student's own times, found by search and by measurement.

A scheduler's config cannot hold a list of times, and what ``num_inference_steps=n`` means differs from pipeline to
pipeline: without ``sigmas`` FlowMatchEuler ends its four steps at time 1 of 1000, which wastes one. So candidates are
set by the pipeline's own call, their shift is fitted, and the pipeline is run under them: a candidate is taken when
its times are the student's but for rounding, and its final latents those of :func:`hasten.core.sample.sample` from
the same start and noise at the very same times (one rounding of a time can show in a network that is sharp in it).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hasten.core.denoiser import Cond
from hasten.core.errors import UnsupportedModel
from hasten.core.method import Sampling, even
from hasten.core.sample import sample
from hasten.models.candidates import NOT_THIS_ONE, asked_of, call_of, candidates, clocked, placed, wanted
from hasten.models.diffusers import PipelineDenoiser
from hasten.models.probe import Call, Look, Record, networks, predictions, record, walk
from hasten.models.template import conditions, find_latent

NEAR = 3e-7  # of the path's time: what a few roundings of float32 leave
COUNTS = (1, 2, 4)  # steps that are tried where a student's own cannot be had
ONE_TIME = ("dmd2", "sid", "cm", "lcm", "hyper")  # methods whose students are told one time
START = 0.01  # how far the size of the first sample may be from the student's; see Trial


@dataclass(frozen=True)
class Trial:
    """What a run of the pipeline under a scheduler showed.

    Args:
        scheduler: As it was before the run.
        call: How the pipeline was called, without steps and generator.
        times: The scheduler times at which it stepped.
        latents: What hasten's own sampling makes of the same start and noise, [1, ...].
        error: max|a - b| / max|b| of the pipeline's final latents a to those, b.
        start: Size of the pipeline's first sample relative to the student's sigma times unit noise. Schedulers of
            DDPM tables that scale nothing start at unit size instead of sigma at the last entry, 0.998 in SD 1.5.
        seed: Of torch's own generator, with which the run can be repeated.
    """

    scheduler: Any
    call: dict[str, Any]
    times: tuple[float, ...]
    latents: Tensor
    error: float
    start: float
    seed: int = 0


class Draws(TorchFunctionMode):
    """Keeps what ``torch.randn`` returns, or returns what was kept."""

    def __init__(self, kept: list[Tensor] | None = None) -> None:
        super().__init__()
        self.kept, self.replay = kept or [], kept is not None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.randn:
            return func(*args, **(kwargs or {}))
        if self.replay:
            return self.kept.pop(0).double()
        self.kept.append(func(*args, **(kwargs or {})))
        return self.kept[-1]


def components(pipe: Any, net: nn.Module) -> dict[str, nn.Module]:
    """The pipeline's components that a student's network replaces, by name: one, or a pair of experts child by child.

    Raises:
        UnsupportedModel: If its denoisers are of other classes than the network.
    """
    mine = {k: m for k, m in pipe.components.items() if any(m is n for n in networks(pipe))}
    for parts in ([net], list(net.children())):
        if [type(m) for m in mine.values()] == [type(m) for m in parts]:
            return dict(zip(mine, parts, strict=True))
    have = " and ".join(f"{k} ({type(m).__name__})" for k, m in mine.items()) or "no denoiser"
    raise UnsupportedModel(
        f"{type(pipe).__name__} has {have}, and the student is a {type(net).__name__}; give the pipeline from which it "
        "was made."
    )


def scheduler_for(pipe: Any, net: PipelineDenoiser, sampling: Sampling) -> Any:
    """A stock scheduler with which ``pipe(**call, num_inference_steps=n)`` runs at the student's times by its rule.

    Args:
        pipe: The pipeline, with the student's network in its place.
        net: The student as hasten sees it, the same weights.
        sampling: Unit times from 1 to 0 and the rule.

    Raises:
        UnsupportedModel: If no scheduler agrees within 1e-5 in float32 (rounding in smaller dtypes), with what is
            nearest and what to do.
    """
    return fit(pipe, net, sampling).scheduler


def fit(pipe: Any, net: PipelineDenoiser, sampling: Sampling) -> Trial:
    """The trial of the scheduler that :func:`scheduler_for` returns."""
    if sampling.two_time and not net.second_time:
        raise UnsupportedModel(
            f"The network of {type(pipe).__name__} has no second time r, and the method's student is told both ends of "
            f"a step; choose a method with one time, such as {', '.join(ONE_TIME)}."
        )
    found = search(pipe, net, sampling)
    if isinstance(found, Trial):
        return found
    where = shown([net.found.steps * t + net.found.offset for t in wanted(net, sampling)])
    raise UnsupportedModel(
        f"No stock scheduler runs {type(pipe).__name__} at times {where} by the rule {sampling.rule!r}"
        + (f" ({'nearest: ' * (min(found)[0] < math.inf)}{min(found)[1]})" if found else "")
        + f"; {remedy(pipe, net, sampling, any(far == 0 for far, _ in found))}."
    )


def search(pipe: Any, net: PipelineDenoiser, sampling: Sampling) -> Trial | list[tuple[float, str]]:
    """The trial of the first scheduler that agrees, else how far each was off in its times (0: only in its latents)."""
    call, want = call_of(net, sampling), wanted(net, sampling)
    near: list[tuple[float, str]] = []
    spare: Trial | None = None
    for scheduler, times in candidates(pipe, net, sampling):
        name = type(scheduler).__name__
        if times is None or off(net, times, want) > NEAR:
            near += [] if times is None else [(off(net, times, want), f"{name} steps at {shown(times)}")]
            continue
        try:
            trial = attempt(pipe, net, scheduler, sampling, call)
        except NOT_THIS_ONE as error:
            near.append((NEAR, f"{name} fails: {error}"))
            continue
        if not trial.error <= limit(net) or abs(trial.start - 1) > START:
            near.append((0.0, f"{name} has the times, but its latents differ by {trial.error:.1e}"))
        elif abs(trial.start - 1) <= 1e-5:
            return trial
        else:
            spare = spare or trial
    if not near and not spare:  # the pipeline itself cannot be called so
        why: list[str] = []
        asked_of(pipe, type(pipe.scheduler).from_config(pipe.scheduler.config), call, len(want), why)
        near += [(math.inf, f"its own call of so many steps ends in {error}") for error in why]
    return spare or near


def remedy(pipe: Any, net: PipelineDenoiser, sampling: Sampling, timed: bool) -> str:
    """What to do where no scheduler samples as a student does: step counts and rules only that were seen to work.

    Args:
        timed: A scheduler has its times.
    """
    ways: dict[int, str] = {}  # by step count, the method's own rule first
    for rule in dict.fromkeys((sampling.rule, "ode", "renoise")):
        for n in COUNTS:
            if n not in ways and isinstance(search(pipe, net, replace(sampling, times=even(n), rule=rule)), Trial):
                ways[n] = rule
    told = []
    for rule in dict.fromkeys(ways.values()):
        first, *rest = (str(n) for n in reversed(COUNTS) if ways.get(n) == rule)
        counts = f"{', '.join(reversed(rest))} or {first}" if rest else first
        by = "" if rule == sampling.rule else f" by a method that samples by {rule!r}"
        told.append(f"for {counts} even step{'s' if counts != '1' else ''}{by}")
    every = ", ".join(map(str, COUNTS))
    if told:
        return f"train the student {', or '.join(told)}"
    odd = "the pipeline's network has other weights than the student, or it changes samples between two steps"
    return odd if timed else f"there is none for {every} even steps either"


def unit(net: PipelineDenoiser, t: float) -> float:
    """The unit time of the path's time t, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        mid = 0.5 * (low + high)
        low, high = (mid, high) if float(net.path.at(torch.tensor(mid, dtype=torch.float64))) < t else (low, mid)
    return high


def attempt(pipe: Any, net: PipelineDenoiser, scheduler: Any, sampling: Sampling, call: Call, seed: int = 0) -> Trial:
    """Run the pipeline under a scheduler, and hasten's own sampling from its start with its noise."""
    fresh = type(scheduler).from_config(scheduler.config)
    draws, inner, begun = Draws(), scheduler.step, []

    def step(*args: Any, **kwargs: Any) -> Any:
        if not begun:
            draws.kept.clear()  # what was drawn before is the start
        begun.append(True)
        return inner(*args, **kwargs)

    scheduler.step = step
    with torch.random.fork_rng(), draws, placed(pipe, scheduler=scheduler):
        torch.manual_seed(seed)
        seen = record(pipe, {**call, **stream(pipe)}, len(sampling.times) - 1)
    times, first = tuple(float(s.t) for s in seen.steps), seen.steps[0]
    if off(net, times, wanted(net, sampling)) > NEAR:
        raise ValueError(f"it stepped at {shown(times)}")
    x = find_latent(single_look(first.looks[-1], len(first.sample)), first.sample)[2][:1].double()
    sigma = float(net.path.coeffs(net.path.at(torch.tensor(sampling.times[0], dtype=torch.float64)))[1])
    z = first.sample[:1].double() / float(getattr(scheduler, "init_noise_sigma", 1.0))
    start = float((x * z).sum() / z.square().sum()) / sigma
    cond, uncond = given(pipe, net, seen, sampling)
    same = replace(sampling, times=(*(unit(net, t) for t in clocked(net, times)), sampling.times[-1]))
    with Draws(draws.kept):
        latents = sample(net, x / sigma, cond, same, uncond=uncond)
    theirs = seen.steps[-1].after[:1].double()
    error = float((theirs - latents).abs().max() / latents.abs().max())
    return Trial(fresh, dict(call), times, latents, error, start, seed)


def single_look(look: Look, count: int) -> Look:
    """The first ``count`` samples of a call that guides in one batch of twice as many."""
    many = len(predictions(look.output))
    cut = lambda v: v[:count] if isinstance(v, Tensor) and v.ndim and len(v) == many else v  # noqa: E731
    return replace(look, arguments=walk(look.arguments, cut)) if many > count else look


def stream(pipe: Any) -> dict[str, Any]:
    """The argument that makes a pipeline draw from torch's own generator, as schedulers do that are given none."""
    known = inspect.signature(pipe.__call__).parameters
    return {"generator": torch.default_generator} if "generator" in known else {}


def given(pipe: Any, net: PipelineDenoiser, seen: Record, sampling: Sampling) -> tuple[Cond, Cond | None]:
    """The condition of a recorded run, and the unconditional one where the student is guided."""
    nodes = net.templates[net.shape]
    if sampling.cfg_scale == 1:
        return conditions(nodes, seen.steps[0].looks[-1]), None
    alone = record(pipe, {**net.found.call, **net.found.quiet}, len(sampling.times) - 1, stop=0).looks[-1]
    cond = conditions(nodes, alone)
    return cond, net.null(cond)


def limit(net: PipelineDenoiser) -> float:
    """The largest difference that is rounding: 1e-5 in float32."""
    return 1e-5 if net.captured in (torch.float32, torch.float64) else 8 * torch.finfo(net.captured).eps


def off(net: PipelineDenoiser, times: Sequence[float], want: Sequence[float]) -> float:
    """The largest difference of scheduler times to the path's wanted ones; infinite where they cannot be compared."""
    if len(times) != len(want) or not all(map(math.isfinite, times)):
        return math.inf
    return max(abs(a - b) for a, b in zip(clocked(net, times), want, strict=True))


def shown(times: Sequence[float]) -> str:
    """Times for a message."""
    return "[" + ", ".join(f"{t:.6g}" for t in times) + "]"
