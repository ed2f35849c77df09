"""What a speed-up is, and ``speed_up``: apply several in their order, prove that each acted, undo them exactly."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol
from weakref import WeakSet

import torch
from torch import nn

from hasten.core.errors import ConfigError, NotReversible, unknown
from hasten.core.request import current
from hasten.speed.freed import trim
from hasten.speed.host import Host, host, visited
from hasten.speed.plan import Plan

_active: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True)
class Applied:
    """What one transform did to one network; calling it undoes it, bit for bit.

    Args:
        undo: Changes the network back; raises NotReversible where the originals were dropped.
        counts: What happened so far, such as ``{"calls": 50, "reused": 12, "hit_rate": 0.24}``.
        inert: Why it did nothing and what to do about it, in one sentence; None where it acted.
    """

    undo: Callable[[], None]
    counts: Callable[[], dict[str, float]]
    inert: Callable[[], str | None]

    def __call__(self) -> None:
        self.undo()


class Transform(Protocol):
    """A frozen config with plain fields; :func:`speed_up` applies it.

    ``order``: times 3 < quantization 10 < cast 12 (so that weights are rounded once) < layerwise casting 14 <
    offloading 16 < attention 20 < cache 30 < guidance 35 (which may skip a branch that the cache would answer) <
    compile 40 < the VAE's tiles 50.
    """

    name: ClassVar[str]
    order: ClassVar[int]

    def check(self, at: Host, stack: Sequence[Transform]) -> None:
        """Raise ConfigError where it cannot work on this model, or beside the others; change nothing."""
        ...

    def apply(self, at: Host) -> Applied:
        """Change the model in place. The result is the function that changes it back."""
        ...


def override(module: Any, function: Callable[..., Any], name: str = "forward") -> Callable[[], None]:
    """Give one module (not its class) another method; the result puts the former one back."""
    before = vars(module).get(name)
    setattr(module, name, function)

    def undo() -> None:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)

    return undo


def number(value: Any) -> bool:
    """Whether this is a finite real number; True and False are none."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and abs(value) <= sys.float_info.max


def whole_number(value: Any, least: int) -> bool:
    """Whether this is a whole number from ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def switch(transform: str, field: str, value: Any) -> None:
    """Raise ConfigError for a value that is neither True nor False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{transform}: {field} must be True or False, not {value!r}.")


def one_of(transform: str, field: str, value: Any, known: Sequence[str]) -> None:
    """Raise ConfigError for a value that is not among the known ones, with the nearest."""
    if not isinstance(value, str):
        raise ConfigError(f"{transform}: {field} must be one of {', '.join(map(repr, known))}, not {value!r}.")
    if value not in known:
        raise unknown(f"{field} of {transform}", str(value), known)


def once(stack: Sequence[Any]) -> None:
    """Refuse two layers of one name: only one of them could be told from the other in a ledger, and undone."""
    names = [t.name for t in stack]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"A stack has one layer of a name; {name} is there {names.count(name)} times, keep one.")


def same_keep(stack: Sequence[Any]) -> None:
    """Refuse to drop the originals of one transform and not of another: half an undo is a broken network."""
    keeps = {t.name: t.keep for t in stack if hasattr(t, "keep")}
    if len(set(keeps.values())) > 1:
        said = ", ".join(f"{name}: keep={keep}" for name, keep in keeps.items())
        raise ConfigError(f"All transforms of weights must agree on keep, not {said}.")


def known_steps(at: Host, stack: Sequence[Any], plan: Plan | None) -> int | None:
    """How many times a request will visit, where the plan, times of the stack or the pipeline's call say so."""
    for t in stack:
        if t.name == "times":
            return len(t.steps)
    made_for = None if plan is None else plan.fingerprint.get("steps")
    if at.pipe is None:
        return made_for
    own = [len(v) for k in ("timesteps", "sigmas") if (v := at.call.get(k)) is not None]
    asked: Any = made_for or at.call.get("num_inference_steps")
    if own or not whole_number(asked, 1):
        return own[0] if own else None
    from hasten.speed.times import fresh

    try:
        return visited(fresh(at, asked))  # some schedulers visit more times than the steps they are asked for
    except (TypeError, ValueError, RuntimeError):  # it wants more than a count: the first request will say
        return None


def busy(modules: Iterable[Any]) -> None:
    """Raise ConfigError where one of a model's modules is sped up already."""
    if any(isinstance(m, nn.Module) and m in _active for m in modules):
        raise ConfigError("This network is sped up already; put all transforms into one speed_up call.")


class SpeedUp:
    """The context manager of :func:`speed_up`; ``ledger`` says what every transform did, during and after."""

    def __init__(self, at: Host, transforms: Sequence[Transform], plan: Plan | None = None):
        self.host, self.transforms, self.plan = at, tuple(transforms), plan
        self._applied: list[Applied] = []
        self._stack = ExitStack()

    def ledger(self) -> dict[str, dict[str, float]]:
        """Counts by transform name, in the order in which they were applied."""
        return {t.name: a.counts() for t, a in zip(self.transforms, self._applied, strict=False)}

    def idle(self) -> list[str]:
        """Why transforms have done nothing so far, a sentence each; empty where all acted."""
        return [reason for a in self._applied if (reason := a.inert())]

    def __enter__(self) -> Any:
        net = self.host.net
        busy([net])
        self._applied = []
        try:
            for transform in self.transforms:
                applied = transform.apply(self.host)
                self._stack.callback(applied)
                self._applied.append(applied)
        except BaseException:
            with suppress(NotReversible):  # what went wrong matters more
                self._stack.close()
            raise
        if any(getattr(t, "keep", True) is False for t in self.transforms):
            trim()  # what was dropped is to be free, and not only within this process
        inner = net.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            mine = current()
            if self.plan is not None and mine is not None and (self, "fits") not in mine.state:
                self.plan.fits(self.host, self.host.look(args, kwargs), mine)
                mine.state[self, "fits"] = True
            with torch.no_grad():  # rounded weights and reused outputs have no gradient that means anything
                return inner(*args, **kwargs)

        self._stack.callback(override(net, forward))
        self._stack.callback(self.host.opened())
        _active.add(net)
        return net if self.host.pipe is None else self.host.pipe

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        _active.discard(self.host.net)
        reasons = self.idle()
        if kind is not None:
            with suppress(NotReversible):  # the error inside the block is the one to see
                self._stack.close()
            return
        self._stack.close()
        if reasons:
            raise ConfigError(" ".join(reasons))


def speed_up(model: Any, *transforms: Transform | Plan, call: Mapping[str, Any] | None = None) -> SpeedUp:
    """A context manager that yields ``model``, accelerated in place, and changes it back at the end.

    The call stays the same; it runs without gradients. Transforms are applied in their canonical order, whatever
    the order given, and undone last-in, first-out: afterwards the parameters are the same objects with the same
    bits and the output is bit-identical to before. A speed-up that did nothing is an error when the block ends.

    Args:
        model: A diffusers pipeline of any family (probed once, by a few short runs), or a denoiser: an nn.Module
            with ``blocks``.
        transforms: At most one of each kind; or a :class:`Plan`, which brings its own and must be this model's.
        call: How the pipeline will be called (prompt, height, width, guidance_scale ...), for its probe; a denoiser
            has none, its settings are those of ``sample``.

    Raises:
        UnsupportedModel: If ``model`` is neither, has no blocks, or cannot be probed.
        ConfigError: For transforms that cannot work on this model, on this machine, together or in the steps that
            ``call`` asks for (``num_inference_steps``; left out, the first request says), for a call of a denoiser,
            for a network that is sped up already, and at the end for a transform that never acted, with the reason.
        NotReversible: At the end, if the originals were dropped (``keep=False``); the network stays changed.
    """
    if not transforms:
        raise ConfigError('speed_up was given nothing to do; add a transform such as Quantize("int8").')
    plans = [t for t in transforms if isinstance(t, Plan)]
    if len(plans) > 1:
        raise ConfigError("speed_up takes one plan; the second could not be what was measured.")
    if plans and len(transforms) > 1:
        raise ConfigError("A plan is complete: what it was measured for holds without other transforms; tune again.")
    given: list[Any] = list(plans[0].transforms if plans else transforms)
    for t in given:
        if isinstance(t, type) or not hasattr(t, "apply") or not hasattr(t, "order"):
            raise ConfigError(f'speed_up takes transforms such as Quantize("int8"), not {t!r}.')
    once(given)
    stack = sorted(given, key=lambda t: t.order)
    same_keep(stack)
    parts = model.components.values() if hasattr(model, "components") else (model,)
    busy(parts)
    at = host(model, call)
    for plan in plans:
        plan.check(at)
    for t in stack:
        t.check(at, stack)
    steps = known_steps(at, stack, plans[0] if plans else None)
    for t in stack:
        if steps is not None and hasattr(t, "reaches"):
            t.reaches(steps)
    return SpeedUp(at, stack, plans[0] if plans else None)
