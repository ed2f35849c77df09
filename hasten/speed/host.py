"""What a speed-up sees of a model, native or a pipeline's: its network, its blocks, how one call of it reads."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hasten.core.errors import ConfigError, UnsupportedModel
from hasten.core.path import Kind, Path
from hasten.core.request import Request, request
from hasten.models.probe import as_sample, tensors, walk

_probed: WeakKeyDictionary[Any, list[tuple[dict[str, Any], Any, Any]]] = WeakKeyDictionary()  # call, scheduler, adapter


@dataclass(frozen=True)
class Look:
    """One call of the network.

    Args:
        x_t: The sample [B, ...] as the network takes it, without what is joined to it.
        t: Its time on the path, [B].
        cond: Every other tensor among the arguments, in order: what tells the CFG branches apart.
    """

    x_t: Tensor
    t: Tensor
    cond: list[Tensor]


@dataclass
class Branches:
    """The conditions that one request has shown so far: one entry for each CFG branch."""

    seen: list[list[Tensor]] = field(default_factory=list)

    def index(self, cond: list[Tensor]) -> int:
        """Which branch has these conditions, by content; a new one where none has."""
        for i, old in enumerate(self.seen):
            if len(old) == len(cond) and all(a is b or same(a, b) for a, b in zip(old, cond, strict=True)):
                return i
        self.seen.append([v.detach().clone() for v in cond])  # the caller may write into them
        return len(self.seen) - 1


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in shape, dtype, device and every bit that counts."""
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and bool(torch.equal(a, b))


def changed(output: Any, change: Callable[[Any], Any]) -> Any:
    """What a network returned with ``change`` applied to its tensors, in the same container."""
    found = walk(output, change)
    return type(output)(**found) if isinstance(output, Mapping) else found


def visited(scheduler: Any) -> int:
    """How many times a scheduler visits; one that stands twice in a row, as Heun's do, counts once."""
    return len(torch.unique_consecutive(torch.as_tensor(scheduler.timesteps)))


@dataclass(frozen=True, eq=False)
class Host:
    """A native denoiser, or the denoiser inside a diffusers pipeline.

    Args:
        net: The module whose ``forward`` predicts: ``net(x_t, t, cond)``, or the pipeline's own network.
        blocks: Its repeated blocks, in order.
        path: Of its samples; None for a module that is no denoiser.
        kind: What it predicts.
        pipe: The pipeline; None for a native denoiser.
        adapter: What :func:`hasten.denoiser` learnt of the pipeline.
        streams: Of each block, which of the streams [B, L, D] that leave it is the sample's.
        call: How the pipeline was called for its probe.
    """

    net: Any
    blocks: Sequence[nn.Module]
    path: Path | None = None
    kind: Kind | None = None
    pipe: Any = None
    adapter: Any = None
    streams: Sequence[int] = ()
    call: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def names(self) -> list[str]:
        """Of the blocks, inside ``net``."""
        found = {m: name for name, m in self.net.named_modules()}
        return [found.get(block, f"blocks.{i}") for i, block in enumerate(self.blocks)]

    @functools.cached_property
    def positions(self) -> tuple[str, ...]:
        """The names of the network's positional arguments."""
        return tuple(inspect.signature(type(self.net).forward).parameters)[1:]

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments by name."""
        return {**dict(zip(self.positions, args, strict=False)), **kwargs}

    @property
    def timed(self) -> tuple[str, ...]:
        """The arguments that are times, which keep their precision."""
        return self.adapter.found.times if self.adapter else ("t", "r")

    def look(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Look:
        """What one call asks of the network."""
        found = self.arguments(args, kwargs)
        if self.adapter is None:
            cond = list(tensors(found.get("cond")))
            return Look(found["x_t"], found["t"], cond)
        adapter, about = self.adapter, self.adapter.found
        nodes = adapter.templates[adapter.shape]
        value, node = found.pop(about.latent), nodes[about.latent]
        whole = torch.stack(list(value)) if isinstance(value, (list, tuple)) else value
        x_t = whole if node.name is None else whole.narrow(node.dim, 0, self.own(node, whole))
        first = next(k for k in about.times if not nodes[k].next)
        times = {k: found.pop(k) for k in about.times}
        value, time = torch.as_tensor(times[first]).double(), nodes[first]
        value = value[:, :1] if value.ndim > 1 else value  # the first token's, where each has its own
        slope, offset = (v.to(value.device).reshape(-1)[0] for v in (time.slope, time.offset))
        t = about.clock(((value - offset) / slope).reshape(-1)).float()
        rest = whole.shape[node.dim] - x_t.shape[node.dim]
        joined = [whole.narrow(node.dim, x_t.shape[node.dim], rest)] if rest else []
        return Look(x_t, t.expand(len(x_t)), [*joined, *tensors(found)])

    def own(self, node: Any, whole: Tensor) -> int:
        """How much of dimension ``node.dim`` of the network's sample is the sample; the rest is joined to it."""
        if node.dim == 1 and whole.ndim > 3:
            return int(node.shape[0])  # channels are joined: their number does not depend on the picture's size
        if tuple(whole.shape[2:]) == tuple(node.shape[1:]) and whole.shape[1] > node.shape[0]:
            return int(node.shape[0])
        raise UnsupportedModel("Tokens joined to the sample cannot be told from it at another size; show it this call.")

    def pred(self, output: Any, x_t: Tensor) -> Tensor:
        """The prediction in what the network returned: x_t's shape, of ``kind`` on ``path``."""
        if self.adapter is None:
            return output[0] if isinstance(output, tuple) else output
        return self.adapter.found.sign * as_sample(output, x_t)

    def keep(self, output: Any) -> Any:
        """A copy of what the network returned that nobody can change; None for a native network, whose is ``pred``."""
        if self.adapter is None:
            return None
        return changed(output, lambda v: v.detach().clone() if isinstance(v, Tensor) else v)

    def output(self, pred: Tensor, x_t: Tensor, like: Any) -> Any:
        """What the network would return for ``pred``; learned variances and whatever else are those of ``like``."""
        if self.adapter is None:
            return pred
        named = isinstance(like, Mapping)
        first = like if isinstance(like, Tensor) else next(iter(like.values() if named else like))
        listed = not isinstance(first, Tensor)
        whole = torch.stack(list(first)) if listed else first.clone()
        part = whole
        if part.ndim == x_t.ndim:
            for d in range(1, x_t.ndim):
                part = part.narrow(d, 0, min(part.shape[d], x_t.shape[d]))
        part.copy_((self.adapter.found.sign * pred).reshape(part.shape))
        made = list(whole) if listed else whole
        if isinstance(like, Tensor):
            return made
        return type(like)(**{**like, next(iter(like)): made}) if named else type(like)([made, *like[1:]])

    def cast(self, args: Sequence[Any], kwargs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """The call's arguments, floating tensors as ``dtype``; times, labels and masks stay."""
        to = lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v  # noqa: E731
        return {k: v if k in self.timed else walk(v, to) for k, v in self.arguments(args, kwargs).items()}

    # --- requests ---------------------------------------------------------------------------------------------

    def steps(self, mine: Request) -> int:
        """How many times the request visits; one that Heun's rule looks at twice counts once."""
        return mine.steps if self.pipe is None else visited(self.pipe.scheduler)

    def asked(self, mine: Request) -> int:
        """The steps that the request was asked for; some schedulers visit more times."""
        call = mine.state.get("call")
        if self.pipe is None or call is None or any(call.get(k) is not None for k in ("timesteps", "sigmas")):
            return self.steps(mine)
        usual = inspect.signature(type(self.pipe).__call__).parameters.get("num_inference_steps")
        found = call.get("num_inference_steps", usual.default if usual else None)
        return found if isinstance(found, int) else self.steps(mine)

    def last(self, look: Look, step: int, mine: Request) -> bool:
        """Whether this call belongs to the request's last step."""
        if self.pipe is None:
            return step >= mine.steps - 1
        end = self.adapter.found.clock(self.pipe.scheduler.timesteps[-1:].double())
        return bool((look.t[:1].double().cpu() - end.cpu()).abs() < 1e-5)

    def branch(self, look: Look, mine: Request) -> Any:
        """The CFG branch that a call belongs to: named by ``guided``, else told by its conditions."""
        if self.pipe is None:
            return mine.branch
        return mine.state.setdefault((self, "branches"), Branches()).index(look.cond)

    def opened(self) -> Callable[[], None]:
        """Make every call of the pipeline a request of its own, whose state has the call's arguments by name."""
        if self.pipe is None:
            return lambda: None
        own = type(self.pipe).__call__

        def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            with request(0) as mine:
                mine.state["call"] = inspect.signature(own).bind(pipe, *args, **kwargs).arguments
                return own(pipe, *args, **kwargs)

        return subclassed(self.pipe, "__call__", call)


def subclassed(thing: Any, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Give one object another method, through a subclass with its class's own name; the result undoes that.

    Where an attribute of the object would not do: Python looks ``__call__`` up on the class, and a copy of the object
    would have a method that works on the original.
    """
    own = type(thing)
    said = {k: getattr(own, k) for k in ("__module__", "__doc__", "__qualname__")}
    thing.__class__ = type(own.__name__, (own,), {name: functools.wraps(getattr(own, name))(method), **said})

    def undo() -> None:
        thing.__class__ = own

    return undo


def host(model: Any, call: Mapping[str, Any] | None = None) -> Host:
    """``model`` as a speed-up sees it: a denoiser, or a diffusers pipeline, which is probed once.

    Args:
        call: How a pipeline is called (prompt, height, width ...), for its probe; left out is its own default.

    Raises:
        ConfigError: For a call that is none, or one of a model that is no pipeline.
        UnsupportedModel: If it is neither, has no blocks, or its probe fails.
    """
    if call is not None and not isinstance(call, Mapping):
        raise ConfigError(f'call is how the pipeline will be called, such as {{"height": 512}}, not {call!r}.')
    said = f"speed_up takes a denoiser with blocks, or a diffusers pipeline; {type(model).__name__}"
    if isinstance(model, nn.Module):
        blocks: Any = getattr(model, "blocks", ())
        if not len(blocks):
            raise UnsupportedModel(f"{said} has none.")
        if call:
            raise ConfigError(
                f"call is for pipelines: {', '.join(map(str, call))} would do nothing for {type(model).__name__}; "
                "leave call out, and say how it is sampled: sample(net, noise, cond, Sampling(times, cfg_scale=4))."
            )
        return Host(model, blocks, getattr(model, "path", None), getattr(model, "kind", None))
    if not hasattr(model, "components") or not hasattr(model, "scheduler"):
        raise UnsupportedModel(f"{said} is neither.")
    call = dict(call or {})
    shown = {k: v for k, v in call.items() if k != "num_inference_steps"}  # the probe runs in steps of its own choice
    known = _probed.setdefault(model, [])
    parts = list(model.components.values())
    scheduler = model.scheduler
    adapter = next((a for asked, at, a in known if asked == shown and at is scheduler and a.net in parts), None)
    if adapter is None:
        from hasten.models.diffusers import denoiser

        adapter = denoiser(model, shown)
        known.append((shown, scheduler, adapter))
    if adapter.net not in parts:
        raise UnsupportedModel(
            f"{type(model).__name__} has several denoisers in turn, which cannot be sped up as one; "
            "use hasten.denoiser(pipe) with hasten's own sample."
        )
    if not adapter.found.blocks:
        raise UnsupportedModel(f"No repeated blocks were found in {type(adapter.net).__name__}.")
    streams = list(adapter.found.blocks.values())
    return Host(adapter.net, adapter.blocks, adapter.path, adapter.kind, model, adapter, streams, call)


def skeleton(net: nn.Module) -> Any:
    """A copy of a network without its numbers, on the meta device, to try on it what changes modules."""
    empty = {id(v): torch.empty_like(v, device="meta") for v in net.buffers()}
    for p in net.parameters():  # of another package's type: a plain one
        empty[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), False)
    return copy.deepcopy(net, empty)


def needs_denoiser(who: str, at: Host) -> None:
    """Raise ConfigError for a module that has no path and kind."""
    if at.path is None or at.kind is None:
        raise ConfigError(f"{who}: {type(at.net).__name__} is no denoiser; give it a path and a kind.")
