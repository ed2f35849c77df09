"""Stock schedulers that may run a pipeline at a student's times, with the times that its own call would give them."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.core.errors import ConfigError
from hasten.core.method import Sampling
from hasten.models.diffusers import PipelineDenoiser
from hasten.models.probe import Call, Stop, quiet, run
from hasten.models.verify import KINDS

# Rule of hasten.core.sample -> (scheduler, what its config must say) in the order in which they are tried. The first
# table is for rectified flows, the second for DDPM tables.
FLOW: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "ode": [("FlowMatchEulerDiscreteScheduler", {}), ("FlowMapEulerDiscreteScheduler", {})],
    "renoise": [("FlowMatchLCMScheduler", {}), ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True})],
}
TABLE: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "ode": [
        ("EulerDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"solver_order": 1}),
        ("DDIMScheduler", {}),
    ],
    # LCM mixes x_t into x0 by a factor that falls with timestep_scaling: at 1e6 it is below one rounding of float32
    "renoise": [("LCMScheduler", {"timestep_scaling": 1e6})],
    "ancestral": [("EulerAncestralDiscreteScheduler", {})],
    "dpmpp_2m": [("DPMSolverMultistepScheduler", {"solver_order": 2})],
}
PLAIN = {  # trailing spacing starts at the last entry of the table and ends one step before data
    "timestep_spacing": "trailing", "clip_sample": False, "thresholding": False, "set_alpha_to_one": True,
    "final_sigmas_type": "zero", "algorithm_type": "dpmsolver++",
}  # fmt: skip
BETAS = ("beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr", "trained_betas")
NOT_THIS_ONE = (
    TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError, AssertionError, ArithmeticError,
)  # fmt: skip


@contextmanager
def placed(pipe: Any, **parts: Any) -> Iterator[None]:
    """The pipeline with other components, which are put back at the end."""
    before = {name: getattr(pipe, name) for name in parts}
    for name, part in parts.items():
        setattr(pipe, name, part)
    try:
        yield
    finally:
        for name, part in before.items():
            setattr(pipe, name, part)


def call_of(net: PipelineDenoiser, sampling: Sampling) -> dict[str, Any]:
    """How the pipeline is to be called for a student: without guidance where the student has it inside.

    Raises:
        ConfigError: If the student wants guidance of another strength than the call that was probed.
    """
    if sampling.cfg_scale == 1:
        return {**net.found.call, **net.found.quiet}
    if not math.isclose(sampling.cfg_scale, net.found.cfg_scale, rel_tol=1e-3):
        raise ConfigError(
            f"The student is to be sampled with guidance {sampling.cfg_scale:g}, but the pipeline was probed with a "
            f"call that guides by {net.found.cfg_scale:g}; probe it with the student's guidance."
        )
    return dict(net.found.call)


def wanted(net: PipelineDenoiser, sampling: Sampling) -> tuple[float, ...]:
    """The path's times at which the student is called."""
    return tuple(net.path.at(torch.tensor(sampling.times[:-1], dtype=torch.float64)).tolist())


def clocked(net: PipelineDenoiser, times: Sequence[float]) -> tuple[float, ...]:
    """Scheduler times as the path's."""
    return tuple(net.found.clock(torch.tensor(times, dtype=torch.float64)).tolist())


def candidates(pipe: Any, net: PipelineDenoiser, sampling: Sampling) -> Iterator[tuple[Any, tuple[float, ...] | None]]:
    """Schedulers that may do, each with the times at which the pipeline would step; None where it cannot set them."""
    import diffusers

    call, want, n = call_of(net, sampling), wanted(net, sampling), len(sampling.times) - 1
    tabled = net.path.name == "ddpm"
    rules = ["ode"] if n == 1 and sampling.rule in TABLE else []  # one step to data is the same by all of them
    own = functools.partial(type(pipe.scheduler).from_config, pipe.scheduler.config)
    yield own(), times_of(own, asked_of(pipe, own(), call, n))
    for name, config in [row for rule in (*rules, sampling.rule) for row in (TABLE if tabled else FLOW).get(rule, [])]:
        cls = getattr(diffusers, name)
        make = on_table(cls, pipe, net, config) if tabled else on_flow(cls, net, config)
        asked = asked_of(pipe, make(), call, n)
        yield make(), times_of(make, asked)
        if tabled or asked is None or n == 1:
            continue
        last = {"shift_terminal": want[-1]}
        given = asked[1].get("sigmas") is not None  # then an even grid to 1/n, which a shift alone makes right
        for fixed, free in ((({}, True), (last, False)) if given else ((last, False), ({}, True))) + ((last, True),):
            times = functools.partial(shifted, make, asked, fixed)
            hint = net.path.args[0] if net.path.args else 1.0
            shift = fitted(lambda s, times=times: clocked(net, times(s) or ()), want, hint) if free else 1.0
            yield make(**fixed, shift=shift), times(shift)


def on_flow(cls: Any, net: PipelineDenoiser, config: Mapping[str, Any]) -> Callable[..., Any]:
    """``make(shift=…, shift_terminal=…)``: schedulers of a flow; what a class does not know is left out."""
    known = inspect.signature(cls.__init__).parameters
    count, rising = int(abs(net.found.steps)), net.found.steps < 0  # times that rise to the data
    base = {
        "num_train_timesteps": count,
        "invert_sigmas": rising,
        "shift": 1.0,
        "use_dynamic_shifting": False,
        **config,
    }
    return lambda **more: cls(**{k: v for k, v in {**base, **more}.items() if k in known})


def on_table(cls: Any, pipe: Any, net: PipelineDenoiser, config: Mapping[str, Any]) -> Callable[..., Any]:
    """``make()``: a scheduler on the very table of net's path, by its betas where the class has no rule for them."""
    known, bar = inspect.signature(cls.__init__).parameters, torch.tensor(net.path.args, dtype=torch.float64)
    kind = next(k for k, v in KINDS.items() if v == net.kind)
    base = {**PLAIN, "num_train_timesteps": len(bar), "original_inference_steps": len(bar), "prediction_type": kind}
    base = {k: v for k, v in {**base, **config}.items() if k in known}
    named = {k: pipe.scheduler.config[k] for k in BETAS if k in known and k in pipe.scheduler.config}
    with_names = cls(**base, **named)
    # within what one rounding of the table's 1 - alpha^2 changes, so that a zero at its end counts as one
    same = torch.allclose(with_names.alphas_cumprod.double(), bar, rtol=2e-6, atol=0)
    return lambda: cls(**base, **(named if same else {"trained_betas": betas_of(bar)}))


def betas_of(bar: Tensor) -> list[float]:
    """float32 betas whose product of 1 - beta (summed up in float64, as torch.cumprod does) is ``bar`` [T]: each makes
    up for the roundings before."""
    betas, product = [], 1.0
    for value in bar.tolist():
        beta = torch.tensor(1 - value / product, dtype=torch.float32)
        product *= float(1 - beta)
        betas.append(float(beta))
    return betas


def asked_of(pipe: Any, scheduler: Any, call: Call, steps: int, why: list[str] | None = None) -> tuple[Any, Any] | None:
    """The arguments with which the pipeline's call sets the times of ``scheduler``; None where it cannot, for the
    reason that goes into ``why``."""
    seen: list[tuple[Any, Any]] = []
    inner = scheduler.set_timesteps

    @functools.wraps(inner)  # pipelines look at the signature
    def spy(*args: Any, **kwargs: Any) -> None:
        seen.append((args, kwargs))
        raise Stop

    scheduler.set_timesteps = spy
    with placed(pipe, scheduler=scheduler), quiet(pipe), torch.no_grad():
        try:
            run(pipe, call, steps)
        except NOT_THIS_ONE as error:
            if why is not None:
                why.append(f"{type(error).__name__}: {error}")
            return None
    return seen[0] if seen else None


def times_of(make: Callable[..., Any], asked: tuple[Any, Any] | None, **config: Any) -> tuple[float, ...] | None:
    """The times of a scheduler that is set as the pipeline sets it; None where it refuses."""
    if asked is None:
        return None
    try:
        scheduler = make(**config)
        with np.errstate(invalid="ignore"):  # a last time that one step cannot have
            scheduler.set_timesteps(*asked[0], **asked[1])
    except NOT_THIS_ONE:
        return None
    return tuple(float(t) for t in scheduler.timesteps)


def shifted(make: Callable[..., Any], asked: tuple[Any, Any], fixed: Mapping[str, Any], shift: float) -> Any:
    """:func:`times_of` as a function of the shift."""
    return times_of(make, asked, **fixed, shift=shift)


def fitted(times: Callable[[float], Sequence[float]], want: Sequence[float], hint: float) -> float:
    """The shift at which the second time is the wanted one, by bisection: times rise with the shift.

    Times are float32, so that a range of shifts will do: ``hint`` if it does, else the shortest decimal number near
    the range's middle.
    """
    first = times(hint)
    if len(first) != len(want):
        return 1.0
    if max(abs(a - b) for a, b in zip(first, want, strict=True)) <= 1.2e-7:
        return hint
    edges = []
    for goal in (want[1] * (1 - 4e-8), want[1] * (1 + 4e-8)):
        low, high = math.log(1e-3), math.log(1e3)
        for _ in range(50):
            mid = 0.5 * (low + high)
            low, high = (mid, high) if times(math.exp(mid))[1] < goal else (low, mid)
        edges.append(math.exp(high))
    middle, half = 0.5 * (edges[0] + edges[1]), 0.25 * (edges[1] - edges[0])
    short = (float(f"{middle:.{digits}g}") for digits in range(1, 17))
    return next(s for s in (*short, middle) if abs(s - middle) <= half or s == middle)
