"""Rewriting a traced graph for the CPU before it is compiled: a GELU goes into the int8 linear, or loses its tanh."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

VIEWS = ("unflatten", torch.unflatten, torch.Tensor.unflatten, "view", "reshape")


def fuse(graph: Any) -> int:
    """Rewrite every GELU of tanh form on the CPU in an fx.GraphModule; returns how many.

    After an int8 linear that nobody else reads, its kernel applies the activation. Elsewhere x sigmoid(2 z) takes the
    place of x (1 + tanh z) / 2: the same function (Hendrycks & Gimpel 2016), with one exponential, where vectorised
    tanh costs as much as the linears around it.
    """
    found = [n for n in graph.graph.nodes if n.op == "call_function" and n.target is F.gelu and _fits(n)]
    for node in found:
        source = node.args[0]
        linear = source.args[0] if source.target in VIEWS and len(source.users) == 1 else source
        ours = torch.ops.hasten.int8_linear
        if linear.target in (ours, ours.default) and len(linear.users) == 1 and len(linear.args) == 4:
            linear.args = (*linear.args, True)
            node.replace_all_uses_with(source)
        else:
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(_sigmoid_form(graph.graph, source))
        graph.graph.erase_node(node)
    if found:
        graph.graph.lint()
        graph.recompile()
    return len(found)


def _fits(node: Any) -> bool:
    example = node.meta.get("example_value")
    form = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
    return form == "tanh" and bool(node.args) and isinstance(example, Tensor) and example.device.type == "cpu"


def _sigmoid_form(graph: Any, x: Any) -> Any:
    """x sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)."""
    call, scale = graph.call_function, 2 * math.sqrt(2 / math.pi)
    cubic = call(operator.add, (call(operator.mul, (call(operator.mul, (x, x)), 0.044715 * scale)), scale))
    return call(operator.mul, (x, call(torch.sigmoid, (call(operator.mul, (x, cubic)),))))
