"""The state of one sampling request: created by ``sample``, seen by caches, gone when the request ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Request:
    """What belongs to one request: its step count, the CFG branch now running, and what speed-ups remember.

    ``scale`` is that of the guidance that the running call is part of, ``paired`` whether the call computes both
    branches, the conditional rows first. ``guidance`` is what the whole request was asked for, where ``sample`` opened
    it.
    """

    steps: int
    branch: str = "cond"
    scale: float = 1.0
    paired: bool = False
    guidance: dict[str, Any] | None = None
    state: dict[Any, Any] = field(default_factory=dict)


_current: ContextVar[Request | None] = ContextVar("hasten_request", default=None)


def current() -> Request | None:
    """The request that runs now in this thread or task, or None outside ``sample``."""
    return _current.get()


@contextmanager
def request(steps: int) -> Iterator[Request]:
    """Open a request of ``steps`` steps; its state dies with the block, also when it is aborted."""
    mine = Request(steps)
    token = _current.set(mine)
    try:
        yield mine
    finally:
        _current.reset(token)


@contextmanager
def branch(name: str) -> Iterator[None]:
    """Mark the network calls inside as belonging to the CFG branch ``name``."""
    mine = _current.get()
    if mine is None:
        yield
        return
    before, mine.branch = mine.branch, name
    try:
        yield
    finally:
        mine.branch = before


@contextmanager
def guiding(scale: float, paired: bool) -> Iterator[None]:
    """Mark the network calls inside as part of guidance of this scale; ``paired``: both branches in each."""
    mine = _current.get()
    if mine is None:
        yield
        return
    before = mine.scale, mine.paired
    mine.scale, mine.paired = scale, paired
    try:
        yield
    finally:
        mine.scale, mine.paired = before
