"""The two halves of a batched guided call: which is the conditional one, its arguments alone, and outputs joined."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hasten.core.errors import UnsupportedModel
from hasten.models.probe import predictions, record, tensors, walk
from hasten.models.template import Each, Fixed, Latent, Rows, Time, close, conditions, single
from hasten.speed.host import Host

_layouts: WeakKeyDictionary[Any, Layout] = WeakKeyDictionary()  # of adapters: a layout costs a step of the pipeline


@dataclass(frozen=True)
class Layout:
    """How a pipeline asks for its two branches.

    Args:
        batched: One call of 2B rows; else two calls of B rows, the conditional one first.
        cond_first: Whether the first half of the rows is the conditional one.
    """

    batched: bool
    cond_first: bool


def zipped(change: Callable[..., Any], *things: Any) -> Any:
    """Outputs of one structure as one: ``change`` applied to the tensors at each place."""
    first = things[0]
    if isinstance(first, Tensor):
        return change(*things)
    if isinstance(first, Mapping):
        made = {k: zipped(change, *(v[k] for v in things)) for k in first}
        return type(first)(**made) if type(first) is not dict else made
    if isinstance(first, (list, tuple)):
        return type(first)(zipped(change, *parts) for parts in zip(*things, strict=True))
    return first


def copied(output: Any) -> Any:
    """A copy that nobody else can change."""
    return zipped(lambda v: v.detach().clone(), output)


def by_rows(change: Callable[..., Any], *outputs: Any) -> Any:
    """``change`` applied to what holds one row a sample: a tensor [B, ...], or a list of B of them."""
    first = outputs[0]
    if isinstance(first, (Tensor, list)):
        return change(*outputs)
    if isinstance(first, Mapping):
        made = {k: by_rows(change, *(v[k] for v in outputs)) for k in first}
        return type(first)(**made) if type(first) is not dict else made
    if isinstance(first, tuple):
        return tuple(by_rows(change, *parts) for parts in zip(*outputs, strict=True))
    return first


def joined(first: Any, second: Any) -> Any:
    """Two outputs of B rows as one of 2B."""
    return by_rows(lambda a, b: torch.cat([a, b]) if isinstance(a, Tensor) else [*a, *b], first, second)


def parts(output: Any, layout: Layout) -> tuple[Any, Any]:
    """An output of 2B rows as (conditional, unconditional), B rows each."""
    first, second = (by_rows(lambda v, h=h: v[h * (len(v) // 2) :][: len(v) // 2], output) for h in (0, 1))
    return (first, second) if layout.cond_first else (second, first)


def whole(cond: Any, uncond: Any, layout: Layout) -> Any:
    """The inverse of :func:`parts`."""
    return joined(cond, uncond) if layout.cond_first else joined(uncond, cond)


def alone(at: Host, found: Mapping[str, Any], layout: Layout, rows: int) -> dict[str, Any]:
    """The arguments of a call of ``rows`` = 2B rows for its conditional half alone, by the pipeline's template.

    Raises:
        UnsupportedModel: For tensors in an argument that held none when the pipeline was probed.
    """
    start, count = (0 if layout.cond_first else rows // 2), rows // 2

    def cut(value: Any, dim: int = 0) -> Any:
        if isinstance(value, (list, tuple)):
            return value[start : start + count] if len(value) == rows else value
        if isinstance(value, Tensor) and value.ndim > dim and value.shape[dim] == rows:
            return value.narrow(dim, start, count)
        return value

    def half(name: str, node: Any, value: Any) -> Any:
        match node:
            case Rows(_, listed, dim):
                return cut(value, 0 if listed else dim)
            case Each() | Latent() | Time():
                return cut(value)
            case Mapping():
                return {k: half(f"{name}.{k}", node.get(k), v) for k, v in value.items()}
            case list() | tuple():
                return type(value)(half(name, n, v) for n, v in zip(node, value, strict=True))
            case Fixed(fixed) if any(True for _ in tensors(fixed)):
                return value
        if any(True for _ in tensors(value)):
            raise UnsupportedModel(
                f"Guidance: the network's argument {name} was empty when the pipeline was probed, so its rows cannot "
                "be told apart; give speed_up the call as you will make it: call=dict(prompt=..., ...)."
            )
        return value

    if at.adapter is None:  # hasten's own: every tensor has its samples first
        return walk(dict(found), cut)
    nodes = at.adapter.called
    return {k: half(k, nodes.get(k), v) for k, v in found.items()}


def layout_of(at: Host) -> Layout:
    """How the pipeline of ``at`` asks for its two branches: learnt from one guided step, and tried on it.

    Raises:
        UnsupportedModel: If a step is neither one call of both branches nor two calls, the conditional one first.
    """
    adapter = at.adapter
    if adapter in _layouts:
        return _layouts[adapter]
    found, nodes, name = adapter.found, adapter.called, type(at.pipe).__name__
    quiet = record(at.pipe, {**found.call, **found.quiet}, 2, stop=1).steps[0].looks[-1]
    mine = conditions(nodes, quiet)
    looks = record(at.pipe, found.call, 2, stop=1).steps[0].looks
    seen = [(look, i) for look in looks for i in range(len(predictions(look.output)))]
    conds = [single(conditions(nodes, look), i) for look, i in seen]
    own = [c.keys() == mine.keys() and all(torch.equal(c[k], mine[k]) for k in c) for c in conds]
    if len(own) != 2 or own[0] == own[1]:
        raise UnsupportedModel(
            f"Guidance: a step of {name} shows its network {len(own)} samples for one, {sum(own)} of them the "
            "conditional one; it takes pipelines with one conditional and one unconditional branch."
        )
    layout = Layout(len(looks) == 1, own[0])
    if not layout.batched and not layout.cond_first:
        raise UnsupportedModel(
            f"Guidance: {name} asks for the unconditional branch before the conditional one, which is not known then."
        )
    if layout.batched:
        look = looks[0]
        with torch.no_grad():
            got = at.net(**alone(at, look.arguments, layout, 2))
        want, _ = parts(look.output, layout)
        a, b = (torch.stack([v.float() for v in predictions(_tuple(v))]) for v in (got, want))
        eps = torch.finfo(adapter.captured).eps
        if not close(a, b, max(1e-4, 8 * eps)):
            raise UnsupportedModel(
                f"Guidance: the conditional half of a batch of {name} computed alone differs by "
                f"{float((a - b).abs().max() / b.abs().max()):.1e}; its samples depend on each other."
            )
    return _layouts.setdefault(adapter, layout)


def _tuple(output: Any) -> Any:
    return tuple(output.values()) if isinstance(output, Mapping) else output
