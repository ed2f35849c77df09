"""What a pipeline does when it runs: every call of its denoiser and every step of its scheduler, recorded."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.errors import UnsupportedModel

Call = Mapping[str, Any]  # how the user calls the pipeline: prompt, height, guidance_scale ...


class Stop(Exception):
    """Ends a pipeline's call as soon as it has shown what was asked of it."""


@dataclass
class Look:
    """One call of a network: its arguments by name, and what it returned."""

    module: nn.Module
    arguments: dict[str, Any]
    output: Any = None


@dataclass
class Step:
    """One ``scheduler.step(output, t, sample) -> after``, and the calls of networks since the one before."""

    looks: list[Look]
    output: Tensor
    t: Tensor
    sample: Tensor
    after: Tensor


@dataclass
class Record:
    """A run: its scheduler steps, and the calls of networks after the last one."""

    steps: list[Step] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    mu: float | None = None  # the size-dependent shift with which the pipeline set its scheduler's times


def walk(thing: Any, change: Callable[[Any], Any]) -> Any:
    """``thing`` with ``change`` applied to all that is no dict, list or tuple."""
    if isinstance(thing, Mapping):
        return {k: walk(v, change) for k, v in thing.items()}
    if isinstance(thing, (list, tuple)):
        return type(thing)(walk(v, change) for v in thing)
    return change(thing)


def tensors(thing: Any) -> Iterator[Tensor]:
    """All tensors inside ``thing``, in order."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, Mapping):
        for v in thing.values():
            yield from tensors(v)
    elif isinstance(thing, (list, tuple)):
        for v in thing:
            yield from tensors(v)


def kept(thing: Any) -> Any:
    """A copy that the pipeline cannot change any more."""
    return walk(thing, lambda v: v.detach().clone() if isinstance(v, Tensor) else v)


def networks(pipe: Any) -> list[nn.Module]:
    """The pipeline's networks that take a time: its denoisers, whatever their names."""
    found = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
    found = [m for m in found if any(p == "t" or "time" in p for p in inspect.signature(m.forward).parameters)]
    return [m for m in found if not hasattr(m, "decode")]


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """No progress bars of the pipeline's own; its hooks are let go at the end, also of a call that was stopped."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**({"disable": False} | before))
        pipe.maybe_free_model_hooks()


def record(pipe: Any, call: Call, steps: int, *, stop: int | None = None, seed: int = 0) -> Record:
    """Run ``pipe(**call)`` in ``steps`` steps and write down what happens.

    Args:
        stop: End after so many scheduler steps; 0 ends at the denoiser's first call, before it computes. None: after
            the last step, before anything is decoded.

    Raises:
        UnsupportedModel: If the pipeline has no denoiser, no scheduler, or never steps.
    """
    seen, scheduler = Record(), getattr(pipe, "scheduler", None)
    modules = networks(pipe)
    if scheduler is None or not modules:
        have = ", ".join(pipe.components) or "nothing"
        raise UnsupportedModel(
            f"{type(pipe).__name__} has no {'scheduler' if modules else 'denoiser'} (it has {have}); "
            "wrap its network with hasten.wrap instead."
        )

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        spread = dict(bound.pop("kwargs", {}))
        seen.looks.append(Look(module, kept({**bound, **spread})))
        if stop == 0:
            raise Stop

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        found = output if isinstance(output, (tuple, list, Tensor)) else tuple(output.values())
        next(look for look in reversed(seen.looks) if look.module is module).output = kept(found)

    inner = scheduler.step

    def step(model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        if not seen.looks:
            raise UnsupportedModel(
                f"{type(pipe).__name__} steps its scheduler more often than it calls its denoiser; wrap its network "
                "with hasten.wrap instead."
            )
        at = [kept(v) for v in (model_output, torch.as_tensor(timestep), sample)]
        result = inner(model_output, timestep, sample, *args, **kwargs)
        moved = result[0] if isinstance(result, tuple) else result.prev_sample
        seen.steps.append(Step(seen.looks, at[0], at[1], at[2], kept(moved)))
        seen.looks = []
        if len(seen.steps) == (stop or len(scheduler.timesteps)):
            raise Stop
        return result

    set_times = scheduler.set_timesteps

    def times(*args: Any, **kwargs: Any) -> None:
        seen.mu = kwargs.get("mu", seen.mu)
        set_times(*args, **kwargs)

    hooks = [m.register_forward_pre_hook(before, with_kwargs=True) for m in modules]
    hooks += [m.register_forward_hook(after, with_kwargs=True) for m in modules]
    scheduler.step, scheduler.set_timesteps = step, functools.wraps(set_times)(times)
    try:
        with quiet(pipe), torch.no_grad():
            run(pipe, call, steps, seed)
    finally:
        del scheduler.step, scheduler.set_timesteps
        for hook in hooks:
            hook.remove()
    if stop != 0 and not seen.steps:
        raise UnsupportedModel(f"{type(pipe).__name__} never called its scheduler's step; wrap its network instead.")
    return seen


def run(pipe: Any, call: Call, steps: int, seed: int = 0) -> Any:
    """``pipe(**call)`` in ``steps`` steps from a seed; None where it was stopped.

    A key of the call such as "guider._enabled" is an attribute of a component, set for this run.
    """
    known = inspect.signature(pipe.__call__).parameters
    fixed = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed)}
    fresh = walk(call, lambda v: v)  # some pipelines write their templates into the very list of prompts
    inner = [(getattr(pipe, k.split(".")[0]), k.split(".")[1], fresh.pop(k)) for k in call if "." in k]
    before = [getattr(part, name) for part, name, _ in inner]
    for part, name, value in inner:
        setattr(part, name, value)
    try:
        return pipe(**fresh, **{k: v for k, v in fixed.items() if k in known and k not in call})
    except Stop:
        return None
    finally:
        for (part, name, _), value in zip(inner, before, strict=True):
            setattr(part, name, value)


def guidance_arguments(pipe: Any) -> list[str]:
    """The call's arguments that set a guidance scale."""
    names = inspect.signature(pipe.__call__).parameters
    return [n for n in names if n.endswith(("guidance_scale", "cfg_scale"))]


def predictions(output: Any) -> list[Tensor]:
    """What a denoiser returned as tensors of single samples, each [C, ...]."""
    first = output[0] if isinstance(output, tuple) else output
    return list(first)  # a tensor [B, ...] or a list of B


def rows(step: Step) -> int:
    """How many samples the denoisers saw in a step, over all their calls."""
    return sum(len(predictions(look.output)) for look in step.looks)


def without_guidance(pipe: Any, call: Call, count: int) -> dict[str, Any]:
    """Arguments that turn classifier-free guidance off; none where the call has none (embedded, or scale 1).

    Args:
        count: How many samples the call makes.

    Raises:
        UnsupportedModel: If it cannot be turned off.
    """
    names = guidance_arguments(pipe)
    guiders = {f"{k}._enabled": False for k, v in pipe.components.items() if hasattr(v, "_enabled")}
    tries = [{}, *({n: v} for v in (1.0, 0.0) for n in names), *({n: v for n in names} for v in (1.0, 0.0)), guiders]
    found = 0
    for extra in tries:
        first = record(pipe, {**call, **extra}, 2, stop=1).steps[0]
        found = rows(first)
        if found == count:
            return extra
    raise UnsupportedModel(
        f"{type(pipe).__name__} sees {found} samples for {count}, at any of {', '.join(names) or 'no guidance scale'}; "
        "give the call's arguments that turn its guidance off."
    )


# --- the network's blocks -------------------------------------------------------------------------------------


def as_sample(output: Any, x: Tensor) -> Tensor:
    """A denoiser's output as a tensor of x's shape; what exceeds it (learned variances, joined tokens) is cut off."""
    rows = predictions(output if isinstance(output, (Tensor, tuple, list)) else tuple(output.values()))
    pred = torch.stack(rows)
    if pred.ndim == x.ndim:
        for d in range(1, x.ndim):
            if pred.shape[d] > x.shape[d]:
                pred = pred.narrow(d, 0, x.shape[d])
    if pred.numel() != x.numel():
        raise UnsupportedModel(f"The denoiser returns {list(pred.shape)} for samples of {list(x.shape)}.")
    return pred.reshape(x.shape)
