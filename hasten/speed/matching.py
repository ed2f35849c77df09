"""Reading an fx graph as dynamo traces it: what a node calls, who reads it, what was written into before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

IN_PLACE = ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")


def name_of(node: Any) -> str:
    """Of the function or method that a node calls; empty for other nodes and plain values."""
    if not getattr(node, "op", "").startswith("call_"):
        return ""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def called(node: Any, name: str) -> bool:
    """Whether a node calls a function or a method of this name."""
    return name_of(node) == name


def views(node: Any) -> bool:
    """Whether a node gives its first argument another shape, in the same order."""
    return name_of(node) in ("unflatten", "view", "reshape")


def only(node: Any, name: str) -> Any:
    """The one user of a node where it calls ``name``; None otherwise, and for None."""
    user = next(iter(node.users), None) if node is not None and len(node.users) == 1 else None
    return user if called(user, name) else None


def other(pair: Any, node: Any) -> Any:
    """The second of a call's two arguments, whichever of them ``node`` is; None for other calls."""
    if pair is None or len(pair.args) != 2 or pair.kwargs:
        return None
    return pair.args[1] if pair.args[0] is node else pair.args[0]


def example(node: Any) -> Tensor:
    """What dynamo knows of a node's result; for anything but a tensor, an empty one on the meta device."""
    found = node.meta.get("example_value") if hasattr(node, "meta") else None
    return found if isinstance(found, Tensor) else torch.empty(0, device="meta")


def prune(graph: Any, nodes: Sequence[Any]) -> None:
    """Erase nodes that nobody reads any more, and what only they read."""
    for node in nodes:
        if not node._erased and node.op.startswith("call_") and not node.users:
            inputs = node.all_input_nodes
            graph.erase_node(node)
            prune(graph, inputs)


def writes(graph: Any) -> dict[Any, int]:
    """For every node, how many before it write into a tensor: what two of them read is the same where these agree."""
    count, found = 0, {}
    for node in graph.nodes:
        found[node] = count
        name = name_of(node).split(".")[0]
        method = name.endswith("_") and not name.endswith("__")
        count += method or name in IN_PLACE or "out" in node.kwargs or bool(node.kwargs.get("inplace"))
    return found
