"""What a pipeline's run says of its path and its guidance, and whether the adapter replays another run exactly."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hasten.core.errors import UnsupportedModel
from hasten.core.path import Kind, Path, ddpm, rectified_flow
from hasten.models.probe import Record, as_sample, predictions, record
from hasten.models.template import close, conditions, find_latent, single

if TYPE_CHECKING:
    from hasten.models.diffusers import Found, PipelineDenoiser

KINDS: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def path_of(scheduler: Any, mu: float | None = None) -> tuple[Path, Kind, float, float]:
    """A scheduler's path and prediction kind, and (steps, offset) with t_scheduler = steps t + offset.

    Args:
        mu: The shift, or its logarithm, that the pipeline gave it for the samples' size.
    """
    config = scheduler.config
    count = float(config.get("num_train_timesteps", 1000))
    kind = KINDS.get(config.get("prediction_type", ""))
    table = getattr(scheduler, "alphas_cumprod", None)
    if kind and table is not None and not config.get("use_flow_sigmas", False):
        return ddpm(table.double().clamp_min(2.0**-40)), kind, count, -1.0  # entry i sits at (i + 1) / T
    if kind is None or config.get("use_flow_sigmas", False):
        shift = config.get("flow_shift") or config.get("shift") or 1.0
        if config.get("use_dynamic_shifting", False) and mu is not None:
            shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
        return rectified_flow(float(f"{shift:.4g}")), "velocity", count, 0.0
    raise UnsupportedModel(f"{type(scheduler).__name__} has neither a table alphas_cumprod nor flow sigmas.")


def shift_of(scheduler: Any, path: Path, found: Found, run: Record) -> float:
    """1 where the scheduler's noise levels are its times, the path's shift where they are its shifted times.

    Raises:
        UnsupportedModel: If they are neither.
    """
    times = torch.stack([found.clock(step.t.double()) for step in run.steps])
    levels = torch.as_tensor(getattr(scheduler, "sigmas", times)).to(times)[: len(times)]
    levels = levels if found.steps > 0 else 1 - levels
    for shift, own in ((1.0, times), (*(path.args or (1.0,)), path.at(times))):
        if bool((own - levels).abs().max() < 0.01):
            return shift
    raise UnsupportedModel(
        f"{type(scheduler).__name__} has noise levels {levels.tolist()} at times {times.tolist()}: neither equal nor "
        "shifted; wrap the network with hasten.wrap instead."
    )


def error_of(net: PipelineDenoiser, run: Record, sign: float = 1.0) -> float:
    """The largest max|a - b| / max|b| of a run, b what the scheduler was given, a that of sign times the prediction."""
    found, errors = net.found, []
    times = [*(found.clock(step.t.double()) for step in run.steps), torch.tensor(0.0)]
    for step, start, end in zip(run.steps, times, times[1:], strict=False):
        _, _, x = find_latent(step.looks[-1], step.sample)
        t, r = start.expand(len(x)), end.to(start).expand(len(x))
        with torch.no_grad():
            pred = net(x, t, conditions(net.templates[net.shape], step.looks[-1]), r=r if net.second_time else None)
            pred = found.given(sign * pred, x, t)
        truth = as_sample(step.output, x)
        errors.append(float((pred - truth).abs().max() / truth.abs().max().clamp_min(1e-12)))
    return max(errors)


def replay(pipe: Any, net: PipelineDenoiser) -> float:
    """The largest error over a run with another number of steps and, where the scheduler has one, another shift.

    Two points always fit an affine map, so only this run shows whether the time map is one.

    Raises:
        UnsupportedModel: If it is more than rounding.
    """
    before, config = pipe.scheduler, pipe.scheduler.config
    moved = {k: config[k] * 1.5 for k in ("shift", "flow_shift", "base_shift", "max_shift") if config.get(k)}
    pipe.scheduler = type(before).from_config(config, **moved)
    try:
        run = record(pipe, {**net.found.call, **net.found.quiet}, 5, seed=1)
    finally:
        pipe.scheduler = before
    error = error_of(net, run)
    limit = 1e-4 if net.captured in (torch.float32, torch.float64) else 8 * torch.finfo(net.captured).eps
    if not error <= limit:
        raise UnsupportedModel(
            f"{type(pipe).__name__} was learnt as {net.kind} on the path {net.path.name} with {net.found}, but a "
            f"replayed run of 5 steps differs by {error:.1e} (limit {limit:.0e}); wrap its network instead."
        )
    return error


def guidance(pipe: Any, net: PipelineDenoiser) -> tuple[dict[str, Tensor] | None, float]:
    """The unconditional condition of the guided call, and its scale w in u + w (c - u)."""
    found, nodes = net.found, net.templates[net.shape]
    first = record(pipe, {**found.call, **found.quiet}, 2, stop=1).steps[0]
    alone = first.looks[-1]
    mine = conditions(nodes, alone)
    step = record(pipe, found.call, 2, stop=1).steps[0]
    parts = []
    for look in step.looks:
        cond = conditions(nodes, look)
        parts += [(single(cond, i), row) for i, row in enumerate(predictions(look.output))]
    same = [p.keys() == mine.keys() and all(torch.equal(p[k], mine[k]) for k in p) for p, _ in parts]
    others = [p for p, equal in zip(parts, same, strict=True) if not equal]
    if not any(same) or not others:
        return None, 1.0
    (uncond, u), (_, c) = others[0], parts[same.index(True)]
    x, t = find_latent(alone, first.sample)[2].double(), found.clock(step.t.double()).expand(1)
    u, c, out = (as_sample(v[None], x).double() for v in (u, c, step.output[:1]))
    u, c = (found.given(found.sign * v, x, t) for v in (u, c))
    scale = float(((out - u) * (c - u)).sum() / (c - u).square().sum())
    if close(out, u + scale * (c - u), 1e-3):
        return uncond, float(f"{scale:.4g}")
    named = [found.call.get(k) for k in found.quiet]  # the pipeline rescales what it guides: take what the call says
    known = inspect.signature(pipe.__call__).parameters
    defaults = [known[k].default for k in found.quiet if k in known]
    return uncond, float(next((v for v in (*named, *defaults) if isinstance(v, (int, float))), 1.0))
