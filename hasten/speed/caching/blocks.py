"""A cache inside the network: wrappers around its blocks that decide in Python, outside whatever compiles them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hasten.core.errors import UnsupportedModel
from hasten.core.request import Request, current
from hasten.models.probe import tensors, walk
from hasten.speed.caching.state import Call
from hasten.speed.transform import override

if TYPE_CHECKING:
    from hasten.speed.caching.engine import Engine

SLOT = object()  # stands for a tensor in the structure of what a block returns


class Held:
    """A reference to a tensor that must not change, which is checked when it is read."""

    def __init__(self, v: Tensor):
        self.value = v.detach()
        self.version = None if v.is_inference() else v._version  # inference tensors do not count their changes

    def read(self, who: str) -> Tensor:
        """The tensor. Raises UnsupportedModel where it was written into since."""
        if self.version is not None and self.value._version != self.version:
            raise UnsupportedModel(f"Cache: {who} is changed in place by the network; use an output policy.")
        return self.value

    def handed_on(self, other: Held) -> bool:
        """Whether ``other`` is this very tensor, unchanged since."""
        mine, its = self.value, other.value
        return mine.data_ptr() == its.data_ptr() and mine.shape == its.shape and self.version == other.version


def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """A block's arguments, in order."""
    return [*args, *kwargs.values()]


def structure(out: Any) -> Any:
    """What a block returned, with SLOT for its tensors."""
    return walk(out, lambda v: SLOT if isinstance(v, Tensor) else v)


def filled(like: Any, values: list[Tensor]) -> Any:
    """The inverse of :func:`structure`."""
    rest = iter(values)
    return walk(like, lambda v: next(rest) if v is SLOT else v)


def sources(ins: list[Any], outs: list[Tensor], before: list[Tensor]) -> list[int | None]:
    """Of every output the position of the input that it continues; None where there is none.

    It has the output's shape. Of several, it is one that left the block before, and the most similar, for blocks
    add to their streams.
    """
    found: list[int | None] = []
    for out in outs:
        fit = [i for i, v in enumerate(ins) if isinstance(v, Tensor) and v.shape == out.shape and v.dtype == out.dtype]
        linked = [i for i in fit if any(ins[i] is v for v in before)]
        fit = [i for i in (linked or fit) if i not in found]
        if len(fit) > 1:
            near = {i: float(torch.cosine_similarity(ins[i].flatten(), out.flatten(), 0)) for i in fit}
            fit.sort(key=lambda i: -near[i])
        found.append(fit[0] if fit else None)
    return found


class Blocks(ABC):
    """Wrappers around the blocks of one engine's network; ``around`` is what a subclass does at each.

    A wrapper is a function with an attribute ``inner``, the forward that it calls: Compile compiles that, so that no
    decision is traced and a hit does not compile again.
    """

    def __init__(self, engine: Engine):
        self.engine, self.at, self.config = engine, engine.at, engine.config
        self.key = (engine, "call")

    def install(self) -> list[Callable[[], None]]:
        """Wrap every block."""
        return [override(b, self.wrapper(k, b)) for k, b in enumerate(self.at.blocks)]

    def wrapper(self, k: Any, module: nn.Module) -> Callable[..., Any]:
        """The forward of a module that asks :meth:`around` while a call of the network is under way."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            call, inner = self.now(), getattr(forward, "inner")  # noqa: B009 - set below, and by Compile
            return inner(*args, **kwargs) if call is None else self.around(call, k, inner, args, kwargs)

        setattr(forward, "inner", module.forward)  # noqa: B010 - a function's attribute
        return forward

    def now(self) -> Call | None:
        """The call of the network that runs now in this thread."""
        request = current()
        return request.state.get(self.key) if request else None

    @contextmanager
    def during(self, request: Request, call: Call) -> Iterator[None]:
        """Let the blocks know of the call while it runs."""
        self.begin(call)
        request.state[self.key] = call
        try:
            yield
        finally:
            del request.state[self.key]
        self.end(call)

    def begin(self, call: Call) -> None:
        """Before the network runs: those without a probe decide here."""
        self.engine.decide(call)

    @abstractmethod
    def around(self, call: Call, k: Any, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What happens at block k, whose forward is ``inner``."""

    @abstractmethod
    def end(self, call: Call) -> None:
        """After the network ran."""

    def name(self, k: int) -> str:
        """Of block k, inside the network."""
        return self.at.names[k]

    def in_order(self, call: Call, k: int) -> None:
        """Raise UnsupportedModel where blocks do not run one after the other, each once."""
        if k != call.scratch.get("next", 0):
            raise UnsupportedModel(
                f"Cache: {self.name(k)} runs again or out of order in {type(self.at.net).__name__}; use an output "
                "policy such as easycache."
            )
        call.scratch["next"] = k + 1

    def stream(self, k: int, outs: list[Tensor]) -> int:
        """Which of block k's outputs is the sample's stream."""
        wanted = self.at.streams[k] if self.at.streams else 0
        return [j for j, v in enumerate(outs) if v.ndim >= 3][wanted]


def flat(out: Any) -> list[Tensor]:
    """The tensors in what a block returned, in order."""
    return list(tensors(out))
