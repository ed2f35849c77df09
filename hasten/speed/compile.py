"""torch.compile of the blocks or of the whole network, with a check for what it needs and a count of what it did."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from hasten.core.errors import ConfigError
from hasten.speed.fuse import fuse
from hasten.speed.host import Host
from hasten.speed.transform import Applied, Transform, one_of, override

SPARE = 16  # kinds of graphs that one application may compile, beyond one for each block
KEPT = 64  # compiled forwards that a network keeps


def cpp_compiler() -> str | None:
    """The C++ compiler that inductor would call for CPU code: $CXX, else the platform's name; None without one."""
    default = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    return shutil.which(os.environ.get("CXX", default))


@dataclass(frozen=True)
class Compile:
    """Each block, or the whole network, as one graph.

    Blocks of one class share their code, so that a deep network compiles as fast as one block, and what stands
    around the blocks (a cache's decision) stays in Python. Compiling happens at the first call of each shape, and not
    again when the same layers are applied again to the same network.

    Args:
        scope: ``blocks`` or ``net``; ``net`` also covers the projections, and cannot go with a cache.
        backend: ``inductor``; ``aot_eager`` and ``eager`` trace without generating code, for finding faults.
    """

    scope: str = "blocks"
    backend: str = "inductor"
    name: ClassVar[str] = "compile"
    order: ClassVar[int] = 40

    def __post_init__(self) -> None:
        one_of("Compile", "scope", self.scope, ("blocks", "net"))
        one_of("Compile", "backend", self.backend, ("inductor", "aot_eager", "eager"))

    def check(self, at: Host, stack: Sequence[Transform]) -> None:
        if self.scope == "net" and any(t.name == "cache" for t in stack):
            raise ConfigError("Compile: scope 'net' would compile the cache's decisions; use 'blocks' beside Cache.")
        import torch._dynamo as dynamo

        if dynamo.config.disable:
            raise ConfigError(
                "Compile: torch.compile is switched off; unset TORCH_COMPILE_DISABLE, or leave Compile out."
            )
        on_cpu = any(p.device.type == "cpu" for p in at.net.parameters())
        if self.backend == "inductor" and on_cpu and cpp_compiler() is None:
            raise ConfigError(
                "Compile: there is no C++ compiler on this machine; install g++ or clang++, name it in CXX, "
                "or leave Compile out."
            )

    def apply(self, at: Host) -> Applied:
        """Route the forward of every block, or of the network, through compiled code."""
        count = {"graphs": 0, "runs": 0}
        undos: list[Callable[[], None]] = []
        modules = dict.fromkeys(at.blocks if self.scope == "blocks" else [at.net])
        code = _kept.setdefault(at.net, {}).setdefault(self, _Code(self.backend, len(modules)))
        code.begin(count)
        for module in modules:
            mine, cls = vars(module).get("forward"), type(module)
            # A cache's wrapper decides in Python and calls its ``inner``: only that is compiled.
            owner, name = (mine, "inner") if hasattr(mine, "inner") else (module, "forward")
            function = getattr(owner, name)
            own = getattr(function, "__func__", None) is cls.forward
            made = _bind(code.of(cls.forward, _hooks(module)), module) if own else code(function)
            undos.append(override(owner, made, name))

        def undo() -> None:
            for back in reversed(undos):
                back()

        def inert() -> str | None:
            if count["runs"]:
                return None
            return "Compile: no compiled code ran; call the network inside the block, or leave Compile out."

        return Applied(undo, lambda: {k: float(v) for k, v in count.items()}, inert)


class _Code:
    """torch.compile for one network: it counts, refuses to fall back to eager, and speaks one sentence.

    The code of a class lives as long as the network, so that the ledger and the tuner, which apply the same layers
    again and again, compile them once. Torch's guards tell whether what is under it is what was compiled; a limit
    that earlier applications have used up starts anew.
    """

    def __init__(self, backend: str, modules: int):
        self.name, self.limit = backend, SPARE + modules
        self.forwards: dict[Any, Callable[..., Any]] = {}
        self.begin({"graphs": 0, "runs": 0})

    def begin(self, count: dict[str, int]) -> None:
        """Count the different graphs that run, and their runs, into ``count`` from now on."""
        self.count = count
        self.ran: set[object] = set()

    def of(self, forward: Any, hooks: tuple[int, ...]) -> Callable[..., Any]:
        """The compiled forward of a class, under these hooks; the one of an earlier application where there was one."""
        key = (forward, hooks)
        code = self.forwards.pop(key, None) or self(forward)
        self.forwards[key] = code  # the newest last
        if len(self.forwards) > KEPT:  # hooks of the past, whose numbers never come again
            del self.forwards[next(iter(self.forwards))]
        return code

    def _backend(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        import torch._dynamo as dynamo

        fuse(graph)
        made: Any = dynamo.lookup_backend(self.name)(graph, inputs)
        key = object()

        def run(*args: Any) -> Any:
            if key not in self.ran:
                self.ran.add(key)
                self.count["graphs"] += 1
            self.count["runs"] += 1
            return made(*args)

        return run

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        # One graph or an error, never eager code behind one's back; a bucket of its own, so that networks that
        # share a class do not use up each other's limit of recompilations.
        apart: dict[str, Any] = {"isolate_recompiles": True, "recompile_limit": self.limit}

        def fresh() -> Callable[..., Any]:
            return torch.compile(function, backend=self._backend, fullgraph=True, **apart)

        fast, since = fresh(), self.count

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal fast, since
            try:
                try:
                    return fast(*args, **kwargs)
                except FailOnRecompileLimitHit:
                    if since is self.count:
                        raise
                    fast, since = fresh(), self.count  # it was full of what earlier applications had under it
                    return fast(*args, **kwargs)
            except FailOnRecompileLimitHit as error:
                raise ConfigError(
                    f"Compile: {self.limit} graphs of one block are not enough for the shapes of these calls; "
                    "use fewer shapes, or leave Compile out."
                ) from error
            except TorchDynamoException as error:
                first = str(error).strip().splitlines()[0]
                raise ConfigError(f"Compile: torch.compile failed ({first}); leave Compile out.") from error

        return call


_kept: WeakKeyDictionary[nn.Module, dict[Compile, _Code]] = WeakKeyDictionary()  # of every network that was compiled


def _hooks(module: nn.Module) -> tuple[int, ...]:
    """The numbers, which never repeat, of all hooks inside a module: torch's guards do not look at them."""
    inside = module.modules()
    return tuple(n for m in inside for hooks in (m._forward_pre_hooks, m._forward_hooks) for n in hooks)


def _bind(function: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(module, *args, **kwargs)
