"""torch.compile of the blocks or of the whole network, with a check for what it needs and a count of what it did."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from hasten.core.errors import ConfigError
from hasten.speed.fuse import fuse
from hasten.speed.host import Host
from hasten.speed.transform import Applied, Transform, one_of, override


def cpp_compiler() -> str | None:
    """The C++ compiler that inductor would call for CPU code: $CXX, else the platform's name; None without one."""
    default = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    return shutil.which(os.environ.get("CXX", default))


@dataclass(frozen=True)
class Compile:
    """Each block, or the whole network, as one graph.

    Blocks of one class share their code, so that a deep network compiles as fast as one block, and what stands
    around the blocks (a cache's decision) stays in Python. Compiling happens at the first call of each shape.

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
        modules = list(at.blocks) if self.scope == "blocks" else [at.net]
        compile_ = self._compiler(count, len(modules))
        shared: dict[Any, Callable[..., Any]] = {}
        for module in dict.fromkeys(modules):
            mine, cls = vars(module).get("forward"), type(module)
            # A cache's wrapper decides in Python and calls its ``inner``: only that is compiled.
            owner, name = (mine, "inner") if hasattr(mine, "inner") else (module, "forward")
            function = getattr(owner, name)
            if getattr(function, "__func__", None) is not cls.forward:
                undos.append(override(owner, compile_(function), name))
                continue
            if cls not in shared:
                shared[cls] = compile_(cls.forward)
            undos.append(override(owner, _bind(shared[cls], module), name))

        def undo() -> None:
            for back in reversed(undos):
                back()

        def inert() -> str | None:
            if count["runs"]:
                return None
            return "Compile: no compiled code ran; call the network inside the block, or leave Compile out."

        return Applied(undo, lambda: {k: float(v) for k, v in count.items()}, inert)

    def _compiler(self, count: dict[str, int], modules: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """A torch.compile that counts graphs and their runs, refuses to fall back to eager, and speaks one sentence."""
        import torch._dynamo as dynamo
        from torch._dynamo.exc import TorchDynamoException

        def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
            fuse(graph)
            made: Any = dynamo.lookup_backend(self.backend)(graph, inputs)
            count["graphs"] += 1

            def run(*args: Any) -> Any:
                count["runs"] += 1
                return made(*args)

            return run

        apart: dict[str, Any] = {"isolate_recompiles": True, "recompile_limit": 16 + modules}

        def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
            # One graph or an error, never eager code behind one's back; a bucket of its own, so that networks that
            # share a class do not use up each other's limit of recompilations.
            fast = torch.compile(function, backend=backend, fullgraph=True, **apart)

            def call(*args: Any, **kwargs: Any) -> Any:
                try:
                    return fast(*args, **kwargs)
                except TorchDynamoException as error:
                    first = str(error).strip().splitlines()[0]
                    raise ConfigError(f"Compile: torch.compile failed ({first}); leave Compile out.") from error

            return call

        return compiled


def _bind(function: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(module, *args, **kwargs)
