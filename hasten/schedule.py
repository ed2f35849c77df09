"""Learns when a few sampling steps look at a model, which is left as it is.

LD3 (Tong et al. 2025) and AYS (Sabour et al. 2024) optimise the K gaps between unit times by gradient. ``ld3``
differentiates through the sampler: K steps should end where many steps from the same noise end. ``ays`` differentiates
a bound on the KL divergence of the K-step stochastic sampler, two network calls a step and no roll-out. What they find
for Gaussian data N(., s^2) is known exactly: ``ld3`` with the rule ``ode`` spaces arctan(sigma / (s alpha)) evenly,
``ays`` spaces log(1 + (s alpha / sigma)^2) evenly. ``bellman`` (BOSS, Nguyen et al. 2024) chooses K of many steps so
that the errors of single hops, each from a point of the many, sum to the least, and is blind to how errors travel; so
its one candidate is judged as ``ld3``'s are.
A diffusers pipeline takes them by the layer ``Times``, so one whose scheduler cannot is refused before anything is
learnt.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from hasten.core.bellman import best_times
from hasten.core.calculus import sum_dims
from hasten.core.denoiser import Cond, guided
from hasten.core.errors import ConfigError, unknown
from hasten.core.method import Sampling, even
from hasten.core.path import expand
from hasten.core.sample import RULES, Hop, sample
from hasten.data import Conditions
from hasten.encoded import Encoded
from hasten.models.diffusers import PipelineDenoiser
from hasten.models.encode import encode
from hasten.models.encoders import free, restore
from hasten.models.refuse import several
from hasten.prompts import too_long
from hasten.speed.host import host
from hasten.speed.times import Times
from hasten.synthesize import guidable, subjects

OBJECTIVES = {
    "ld3": ("ode", "heun", "dpmpp_2m"), "ays": ("ode", "heun", "dpmpp_2m", "ancestral"), "bellman": ("ode",),
}  # fmt: skip
FLOOR = 0.03  # sigma/alpha that stands for 0 in AYS' bound, which diverges there; Stable Diffusion's smallest is 0.0292
RATE = 0.1  # of Adam, on the logarithms of the gaps


@dataclass(frozen=True)
class Learnt:
    """How to sample, and the objective on fresh noise for even times and for the learnt ones: smaller is better."""

    sampling: Sampling
    even: float
    learnt: float


@dataclass(frozen=True)
class Goal:
    """Standard normal ``noise`` [N, ...] with its conditions, and ``x0``, where many steps take it."""

    noise: Tensor
    cond: Cond
    uncond: Cond
    x0: Tensor

    def rows(self, index: Tensor) -> Goal:
        """The samples at ``index``."""
        cond, uncond = ({k: c[index] for k, c in part.items()} for part in (self.cond, self.uncond))
        return Goal(self.noise[index], cond, uncond, self.x0[index])

    def parts(self, size: int) -> list[Goal]:
        """All samples, at most ``size`` at a time."""
        return [self.rows(index) for index in torch.arange(len(self.noise)).split(size)]


def learn_times(
    net: Any, steps: int, *, prompts: Any = None, call: Mapping[str, Any] | None = None, **options: Any
) -> Sampling:
    """The best times of ``steps`` sampling steps: :func:`learn`, or :func:`learn_for`, without their numbers.

    Args:
        net: A denoiser, or a diffusers pipeline, which ``prompts`` and ``call`` are for.

    Raises:
        ConfigError: As those, and for prompts or a call of what is no pipeline.
    """
    if hasattr(net, "components"):
        return learn_for(net, steps, prompts=prompts, call=call, **options).sampling
    if prompts is not None or call:
        raise ConfigError(
            f"{'call' if prompts is None else 'prompts'} is for a diffusers pipeline, not for {type(net).__name__}; "
            "give learn_times the pipeline itself."
        )
    return learn(net, steps, **options).sampling


def learn_for(
    pipe: Any,
    steps: int,
    *,
    prompts: Any = None,
    call: Mapping[str, Any] | None = None,
    rule: str | None = None,
    objective: str = "ld3",
    iterations: int = 200,
    cfg_scale: float | None = None,
    two_time: bool = False,
    reference_steps: int = 64,
    count: int = 32,
    batch: int = 4,
    **options: Any,
) -> Learnt:
    """:func:`learn` for a diffusers pipeline, to be applied as ``Times(learnt.sampling.times)``.

    The pipeline encodes the prompts itself; its encoders are out of memory while the times are learnt, and back then.

    Args:
        prompts: What ``read_prompts`` takes, or class labels for a class-conditional pipeline. The first 3 ``count``.
        call: How the pipeline is called: height, width, guidance_scale, negative_prompt ...
        rule: The step rule that is most like its scheduler; None is ``dpmpp_2m`` for a solver of a higher order and
            ``ode`` for any other. For a stochastic one give ``ancestral`` and the objective ``ays``.
        cfg_scale: None is the guidance that the call applies.
        options: The others of :func:`learn`.

    Raises:
        ConfigError: As :func:`learn`, and for no prompts or a guidance that the call has not.
        UnsupportedModel: If the pipeline cannot be learnt, or its scheduler cannot step through given times.
    """
    if prompts is None:
        raise ConfigError(
            f"The times of {type(pipe).__name__} are learnt on prompts, or class labels where it takes those; give "
            "some as a list or a file."
        )
    if rule is None:
        rule = "dpmpp_2m" if pipe.scheduler.config.get("solver_order", 1) > 1 else "ode"
    _check(steps, rule, objective, iterations, reference_steps, min(count, batch), two_time)
    several(call or {})
    at = host(pipe, call)
    Times(tuple(u**1.5 for u in even(steps))).check(at, ())  # a scheduler that keeps its own steps lands on even ones
    net = copy.copy(at.adapter)  # encoding changes its templates and its unconditional condition
    net.templates = dict(net.templates)
    scale = net.found.cfg_scale if cfg_scale is None else cfg_scale
    guidable(net, scale)
    texts = subjects(prompts, net)[: 3 * count]
    if net.found.subject == "prompt":
        too_long([v for k, v in pipe.components.items() if "tokenizer" in k], texts, stacklevel=3)
    with tempfile.TemporaryDirectory() as work:
        source = Encoded(encode(pipe, net, texts, work), net.shape)
        freed = free(pipe, File(work) / "encoders")
        try:
            return learn(
                net, steps, rule=rule, source=source, objective=objective, iterations=iterations, cfg_scale=scale,
                two_time=two_time, reference_steps=reference_steps, count=count, batch=batch,
                **{"device": next(net.parameters()).device, **options},
            )  # fmt: skip
        finally:
            restore(pipe, freed)


def learn(
    net: Any,
    steps: int,
    *,
    rule: str = "ode",
    source: Any = None,
    objective: str = "ld3",
    iterations: int = 200,
    cfg_scale: float | None = None,
    two_time: bool = False,
    reference_steps: int = 64,
    count: int = 128,
    batch: int = 32,
    radius: float | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Learnt:
    """Learn the times of ``steps`` steps; even ones are kept where nothing better is found on held-out noise.

    Args:
        net: Any denoiser; its weights neither change nor collect gradients.
        rule: The step rule that will sample.
        source: Where conditions come from; None draws the classes of a native network uniformly. A pipeline's denoiser
            needs one, such as :class:`hasten.encoded.Encoded`; :func:`learn_for` makes it of prompts.
        objective: ``ld3``, for deterministic rules, ``ays``, or ``bellman`` for ``ode``, which needs no iterations.
        cfg_scale: Guidance, of the few steps as of the many. None is unguided.
        two_time: Whether the network takes the next time as r.
        reference_steps: Even steps of the reference: DPM-Solver++(2M), or hops of a two-time network; those that
            ``bellman`` chooses from.
        count: Noises to learn from; as many again choose the best iteration, and as many again are reported on.
        batch: Noises at a time, in an iteration and in all else.
        radius: How far each of LD3's noises may move towards what K steps can reach; None is the paper's
            0.001 dimensions / steps^2, 0 leaves them.
        tell: Called with (iterations done, all).

    Raises:
        ConfigError: For one step, unknown names, or a rule that the objective cannot be learnt for.
    """
    _check(steps, rule, objective, iterations, reference_steps, min(count, batch), two_time)
    sampling = Sampling(even(reference_steps), "ode" if two_time else "dpmpp_2m", two_time, _scale(cfg_scale))
    if source is None:
        if isinstance(net, PipelineDenoiser):
            raise ConfigError(
                "A pipeline's denoiser draws no conditions of its own; give learn_times the pipeline itself with "
                "prompts, or give a source."
            )
        source = Conditions.of(net)
    generator = torch.Generator().manual_seed(seed)
    train, judge, fresh = (_goal(net, source, sampling, count, batch, generator, device) for _ in range(3))
    reach = 0.001 * train.noise[0].numel() / steps**2 if radius is None else radius
    shift = torch.zeros_like(train.noise)

    def value(theta: Tensor, goal: Goal, draws: torch.Generator, moved: Tensor | None = None) -> Tensor:
        times = unit_times(theta)
        if objective == "ays":
            return klub(net, goal, times, _scale(cfg_scale), draws)
        noise = goal.noise if moved is None else goal.noise + moved
        x = through(net, noise, goal.cond, goal.uncond, times, rule, _scale(cfg_scale), two_time)
        return (x - goal.x0).float().pow(2).mean()

    @torch.no_grad()
    def judged(theta: Tensor, goal: Goal) -> float:
        common = torch.Generator().manual_seed(seed)  # the same draws for every candidate
        return sum(float(value(theta, part, common)) * len(part.noise) for part in goal.parts(batch)) / count

    theta = torch.zeros(steps, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theta], RATE, betas=(0.8, 0.95))
    best, found = judged(theta, judge), theta.detach().clone()
    if objective == "bellman":  # one candidate, without training
        fine = -(-reference_steps // steps) * steps  # so that even times are among the choices
        grid = best_times(net, source, steps, fine, count, batch, cfg_scale, device, seed, tell)
        chosen = torch.tensor([t - s for t, s in pairwise(grid)], dtype=torch.float64).log()
        found, iterations = (chosen if judged(chosen, judge) < best else found), 0
    for i in range(iterations):
        index = torch.randperm(count, generator=generator)[:batch]
        moved = shift[index].requires_grad_(objective == "ld3" and reach > 0)
        loss = value(theta, train.rows(index), generator, moved)
        theta.grad, *away = torch.autograd.grad(loss, [theta, moved] if moved.requires_grad else [theta])
        if away:
            shift[index] = nearer(shift[index], away[0], reach)
        optimizer.param_groups[0]["lr"] = RATE * (1 - i / iterations)
        optimizer.step()
        if (i + 1) % max(1, iterations // 20) == 0 or i + 1 == iterations:
            now = judged(theta, judge)
            if now < best:
                best, found = now, theta.detach().clone()
        tell(i + 1, iterations)
    times = tuple(float(u) for u in unit_times(found))
    result = Sampling(times, rule, two_time, _scale(cfg_scale))
    return Learnt(result, judged(torch.zeros_like(found), fresh), judged(found, fresh))


def _check(steps: int, rule: str, objective: str, iterations: int, many: int, least: int, two_time: bool) -> None:
    if objective not in OBJECTIVES:
        raise unknown("objective", objective, OBJECTIVES)
    if rule not in RULES:
        raise unknown("step rule", rule, RULES)
    if rule not in OBJECTIVES[objective]:
        raise ConfigError(
            f"The times of {rule!r} cannot be learnt by {objective}: it takes {', '.join(OBJECTIVES[objective])}."
        )
    if two_time and (objective, rule) != ("ld3", "ode"):
        raise ConfigError("A two-time network hops by the rule 'ode', whose times are learnt by ld3.")
    if steps < 2:
        raise ConfigError(f"{steps} step has no time to learn between noise and data; take at least 2.")
    if many <= steps:
        raise ConfigError(f"The reference needs more than {steps} steps, not {many}.")
    if min(iterations, least) < 1:
        raise ConfigError("Learning times needs positive iterations, counts and batches.")


def _scale(cfg_scale: float | None) -> float:
    return 1.0 if cfg_scale is None else cfg_scale


def _goal(
    net: Any, source: Any, many: Sampling, count: int, batch: int, generator: torch.Generator, device: Any
) -> Goal:
    made = source.batch(count, generator, device)
    noise = torch.randn(made.shape, generator=generator, dtype=torch.get_default_dtype()).to(device)
    goal = Goal(noise, made.cond, made.uncond, noise)
    x0 = [sample(net, part.noise, part.cond, many, uncond=part.uncond) for part in goal.parts(batch)]
    return replace(goal, x0=torch.cat(x0))


def unit_times(theta: Tensor) -> list[Tensor]:
    """K + 1 unit times from 1 to 0 whose K gaps are softmax(theta) [K], so that they always fall."""
    inner = 1 - torch.softmax(theta, 0).cumsum(0)[:-1]
    return [theta.new_ones(()), *inner.unbind(), theta.new_zeros(())]


def through(
    net: Any, noise: Tensor, cond: Cond, uncond: Cond, times: Sequence[Tensor], rule: str, cfg_scale: float,
    two_time: bool = False,
) -> Tensor:  # fmt: skip
    """:func:`hasten.core.sample.sample` with graphs to the unit ``times``, each a scalar tensor, and to the noise."""
    path = net.path
    at = [path.at(u) for u in times]  # one by one: the ends need no gradient, and on VP have none
    marks = [path.coeffs(t) for t in at]
    x, past = noise * marks[0][1].to(noise.dtype), []
    for i, (t, s) in enumerate(zip(at, at[1:], strict=False)):
        r = s if two_time else None

        def look(x: Tensor, t: Tensor, r: Tensor | None = r) -> Tensor:
            return guided(net, x, t, cond, uncond, cfg_scale, net.kind, r=r)

        x = RULES[rule](Hop(path, net.kind, look, lambda: noise, x, t, s, marks[i], marks[i + 1], past))
    return x


def nearer(shift: Tensor, away: Tensor, radius: float) -> Tensor:
    """Moves of noises [B, ...] half a radius down the gradient ``away``, projected to ``radius`` around 0 (LD3)."""
    norm = expand(sum_dims(away.pow(2)).sqrt().clamp_min(1e-30), away)
    moved = shift - 0.5 * radius * away / norm
    return moved * (radius / expand(sum_dims(moved.pow(2)).sqrt(), moved).clamp_min(1e-30)).clamp_max(1)


def klub(net: Any, goal: Goal, times: Sequence[Tensor], cfg_scale: float, draws: torch.Generator) -> Tensor:
    """AYS' bound per dimension: 1/2 sum_i int E|D(x_v) - D(x_i)|^2 d SNR(v), v from t_i to t_(i+1) (theorem 3.1).

    x_v noises the reference's x0, x_i is x_v noised further to t_i, and the last stretch ends at sigma/alpha ``FLOOR``.
    """
    path, x0 = net.path, goal.x0
    snr = [(c[0] / c[1]).pow(2) for c in (path.coeffs(path.at(u)) for u in times[:-1])]
    snr.append(torch.full_like(snr[0], FLOOR**-2))

    def normal() -> Tensor:
        return torch.randn(x0.shape, generator=draws, dtype=x0.dtype).to(x0.device)

    def look(x: Tensor, t: Tensor) -> Tensor:
        return guided(net, x, t, goal.cond, goal.uncond, cfg_scale, "x0")

    total = x0.new_zeros(())
    for u, low, high in zip(times, snr, snr[1:], strict=False):
        where = low + (high - low) * torch.rand(len(x0), generator=draws, dtype=low.dtype).clamp(1e-6, 1)
        t, v = path.at(u), path.time(torch.atan(where.rsqrt())).to(x0.device)
        (a, s, _, _), (a_v, s_v, _, _) = path.coeffs(t), path.coeffs(v)
        x_v = path.mix(x0, normal(), v)
        keep, fresh = a / a_v, (s.pow(2) - (a / a_v * s_v).pow(2)).clamp_min(1e-12).sqrt()
        x_t = expand(keep, x0).to(x0.dtype) * x_v + expand(fresh, x0).to(x0.dtype) * normal()
        gap = (look(x_v, v) - look(x_t, t)).pow(2).mean()
        total = total + 0.5 * ((high - low).clamp_min(0) * gap).to(total.dtype)
    return total
