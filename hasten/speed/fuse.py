"""Rewriting a traced graph for the CPU before it is compiled.

A GELU goes into the int8 linear, or loses its tanh; int8 linears of one input round it once, and read the parts of a
concatenation where they are; a rotary embedding with its norm becomes one kernel.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.speed import int8, kernels, rotate
from hasten.speed.matching import called, example, only, other, prune, views, writes

OURS = (torch.ops.hasten.int8_linear, torch.ops.hasten.int8_linear.default)
MANY, ROTATE = int8.int8_linears._opoverload, rotate.rotate._opoverload
FLOATS = (torch.bfloat16, torch.float32)


def fuse(graph: Any) -> int:
    """Rewrite what this module knows in an fx.GraphModule; returns how many times something was found."""
    found = fuse_gelus(graph) + fuse_linears(graph) + fuse_rotations(graph)
    if found:
        graph.graph.lint()
        graph.recompile()
    return found


# --- GELU ---------------------------------------------------------------------------------------------------------


def fuse_gelus(graph: Any) -> int:
    """Rewrite every GELU of tanh form on the CPU; returns how many.

    After an int8 linear that nobody else reads, its kernel applies the activation. Elsewhere x sigmoid(2 z) takes the
    place of x (1 + tanh z) / 2: the same function (Hendrycks & Gimpel 2016), with one exponential, where vectorised
    tanh costs as much as the linears around it.
    """
    found = [n for n in graph.graph.nodes if n.op == "call_function" and n.target is F.gelu and _fits(n)]
    for node in found:
        source = node.args[0]
        linear = source.args[0] if views(source) and len(source.users) == 1 else source
        if linear.target in OURS and len(linear.users) == 1 and len(linear.args) == 4:
            linear.args = (*linear.args, True)
            node.replace_all_uses_with(source)
        else:
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(_sigmoid_form(graph.graph, source))
        graph.graph.erase_node(node)
    return len(found)


def _fits(node: Any) -> bool:
    seen = node.meta.get("example_value")
    form = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
    return form == "tanh" and bool(node.args) and isinstance(seen, Tensor) and seen.device.type == "cpu"


def _sigmoid_form(graph: Any, x: Any) -> Any:
    """x sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)."""
    call, scale = graph.call_function, 2 * math.sqrt(2 / math.pi)
    cubic = call(operator.add, (call(operator.mul, (call(operator.mul, (x, x)), 0.044715 * scale)), scale))
    return call(operator.mul, (x, call(torch.sigmoid, (call(operator.mul, (x, cubic)),))))


# --- int8 linears -------------------------------------------------------------------------------------------------


def fuse_linears(graph: Any) -> int:
    """One call for the int8 linears that read the same rows, or the parts of a concatenation; returns how many calls.

    A concatenation that nobody else reads is not made: the rounding reads its parts, where tiles begin with them.
    """
    place, written = {node: i for i, node in enumerate(graph.graph.nodes)}, writes(graph.graph)
    groups: dict[Any, list[Any]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target in OURS:
            rows = node.args[0]
            source = (rows.args[0], *rows.args[1:]) if called(rows, "reshape") and not rows.kwargs else (rows,)
            groups.setdefault((written[node], source), []).append(node)
    made, call = 0, graph.graph.call_function
    for (when, (source, *shape)), found in groups.items():
        first = found[0]
        found = [n for n in found if all(place[arg] < place[first] for arg in n.args[1:4])]
        rows = {n.args[0] for n in found}
        alone = set(source.users) == rows and all(set(r.users) <= set(found) for r in rows)
        parts = _parts(source, shape) if alone and written[source] == when else []
        if len(found) < 2 and not parts:
            continue
        with graph.graph.inserting_before(first):
            xs = [graph.graph.call_method("flatten", (part, 0, -2)) for part in parts] or [first.args[0]]
            weights, scales, biases = ([n.args[i] for n in found] for i in (1, 2, 3))
            outs = call(MANY, (xs, weights, scales, biases, [len(n.args) > 4 and bool(n.args[4]) for n in found]))
            for i, node in enumerate(found):
                node.replace_all_uses_with(call(operator.getitem, (outs, i)))
        prune(graph.graph, found)
        made += 1
    return made


def _parts(node: Any, shape: Sequence[Any]) -> list[Any]:
    """What a concatenation of channels, reshaped to rows, puts together at whole tiles; empty for anything else."""
    whole = example(node)
    if not called(node, "cat") or not node.args or whole.ndim < 2 or tuple(shape) != (-1, whole.shape[-1]):
        return []
    parts = list(node.args[0])
    along = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    seen = [example(part) for part in parts]
    sizes = [v.shape[-1] if v.ndim == whole.ndim and v.dtype == whole.dtype else None for v in seen]
    fits = along % whole.ndim == whole.ndim - 1 and all(isinstance(n, int) and n % 64 == 0 for n in sizes[:-1])
    return parts if fits and sizes[-1] is not None else []


# --- rotary embedding ---------------------------------------------------------------------------------------------


def fuse_rotations(graph: Any) -> int:
    """Let the kernel take each rotary embedding of the CPU, with its norms; returns how many.

    What is found is diffusers' ``apply_rotary_emb`` with real numbers and adjacent channels, which inductor does not
    vectorise.
    """
    if kernels.why_not() is not None:
        return 0
    found = [match for n in graph.graph.nodes if called(n, "stack") and (match := _rotation(n)) is not None]
    written = writes(graph.graph)
    for match in found:
        _rotate(graph.graph, written, *match)
    return len(found)


def _rotation(stack: Any) -> tuple[Any, Any, Any, Any] | None:
    """x, cos, sin and the last node of (x.float() cos + stack((-x1, x0)).flatten(3).float() sin).to(x.dtype)."""
    parts = stack.args[0] if stack.args else ()
    along = stack.kwargs.get("dim", stack.args[1] if len(stack.args) > 1 else 0)
    if along != -1 or len(parts) != 2 or not called(parts[0], "neg"):
        return None
    odd, even = parts[0].args[0], parts[1]
    if not (called(odd, "getitem") and called(even, "getitem") and (odd.args[1], even.args[1]) == (1, 0)):
        return None
    pairs = odd.args[0]
    if even.args[0] is not pairs or not called(pairs, "unbind") or pairs.args[1:] != (-1,) or not views(pairs.args[0]):
        return None
    x = pairs.args[0].args[0]
    seen, split = example(x), example(pairs.args[0]).shape
    if seen.ndim != 4 or split[:3] != seen.shape[:3] or split[3:] != (seen.shape[3] // 2, 2) or seen.shape[3] % 2:
        return None
    flat = only(stack, "flatten")
    wide = only(flat, "float") if flat is not None and flat.args[1:] == (3,) else None
    turned = only(wide, "mul")
    total = only(turned, "add")
    straight, sin, last = other(total, turned), other(turned, wide), only(total, "to")
    if not called(straight, "mul") or only(straight, "add") is not total or last is None:
        return None
    own = next((v for v in straight.args if called(v, "float") and v.args[0] is x), None)
    cos, out = other(straight, own), example(last)
    angles = [example(angle) for angle in (cos, sin)]
    fits = (
        own is not None
        and seen.device.type == "cpu"
        and seen.dtype in FLOATS
        and (out.shape, out.dtype) == (seen.shape, seen.dtype)
        and all(a.device.type == "cpu" and a.dtype == torch.float32 and a.ndim == 4 for a in angles)
        and all(a.shape[3] == seen.shape[3] for a in angles)
    )
    return (x, cos, sin, last) if fits else None


def _rotate(graph: Any, written: dict[Any, int], x: Any, cos: Any, sin: Any, last: Any) -> None:
    """Put the operator in the place of ``last``; it reads what a cat and norms before it read, if nothing changed."""
    parts, at, eps = [x], 0, None
    now = lambda node: written[node] == written[last]  # noqa: E731
    joined = list(x.args[0]) if called(x, "cat") and x.args and now(x) else []
    along = x.kwargs.get("dim", x.args[1] if len(x.args) > 1 else 0) % 4 if joined else 3
    # torch.cat promotes parts of several dtypes, and lets empty ones of one dimension be among them
    if along < 3 and all((example(p).dtype, example(p).ndim) == (example(x).dtype, 4) for p in joined):
        parts, at = joined, along
    norms = [_norm(part) if now(part) else None for part in parts]
    weights: list[Any] = [None] * len(parts)
    if None not in norms and len({norm[2] for norm in norms if norm}) == 1:
        parts, weights, (eps, *_) = (list(v) for v in zip(*[norm for norm in norms if norm], strict=True))
    with graph.inserting_before(last):
        last.replace_all_uses_with(graph.call_function(ROTATE, (parts, weights, eps, cos, sin, at)))
    prune(graph, [last])


def _norm(node: Any) -> tuple[Any, Any, float] | None:
    """Input, weight and eps of a root mean square norm over the channels of each head; None for anything else."""
    if not called(node, "rms_norm") or node.kwargs or len(node.args) != 4:
        return None
    x, over, weight, eps = node.args
    usual = weight is None or example(weight).dtype in FLOATS
    fits = usual and tuple(over) == tuple(example(x).shape[3:]) and isinstance(eps, float)
    return (x, weight, eps) if fits and example(x).dtype == example(node).dtype else None
