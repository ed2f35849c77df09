"""Attention: every scaled_dot_product_attention of the network goes to the fastest kernel that is close enough."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hasten.core.errors import ConfigError
from hasten.speed import dispatched, kernels
from hasten.speed.dispatched import PREFIX
from hasten.speed.host import Host
from hasten.speed.softmax import Call, Kernel, chunked, emulated, error, native, no_sage, sage, seconds, torchs
from hasten.speed.transform import Applied, Transform, number, one_of, override, whole_number

BACKENDS = ("auto", "native", "chunked", "sage", "emulate_int8", "emulate_fp8", "emulate_fp4")
CHUNKS = (64, 256, 1024)  # queries at a time, tried by "auto" and by "chunked" without a chunk
GAIN = 1.05  # "auto" leaves torch's kernel unless another is this much faster


@dataclass
class Choice:
    """What one kind of call goes to, and what was measured of it."""

    name: str
    kernel: Kernel
    error: float = 0.0
    gain: float = 1.0


@dataclass
class Engine:
    """The choices of one sped-up network, and what it counted."""

    config: Attention
    chosen: dict[tuple[Any, ...], Choice] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)
    calls: int = 0
    replaced: int = 0
    refused: str = ""  # why a call did not fit diffusers' backend

    def __call__(self, call: Call) -> Tensor:
        choice = self.chosen.get(call.key)
        if choice is None:
            choice = self.chosen[call.key] = self.choose(call)
        with self.lock:
            self.calls += 1
            self.replaced += choice.kernel is not torchs
        return choice.kernel(call)

    def candidates(self, call: Call) -> dict[str, Kernel]:
        """The kernels that the backend allows and this call fits."""
        wanted, q = self.config.backend, call.q
        if not call.plain():
            return {}
        found: dict[str, Kernel] = {}
        fits = kernels.attention_takes(q, call.k, call.v, call.mask, call.scale)
        lossy = q.dtype == torch.bfloat16 or self.config.dtype == "bfloat16"
        if wanted in ("auto", "native") and lossy and fits and kernels.why_not() is None:
            found["native"] = native
        if (wanted == "auto" and q.device.type == "cpu") or wanted == "chunked":
            given = [self.config.chunk] if self.config.chunk else CHUNKS
            sizes = dict.fromkeys(min(c, q.shape[2]) for c in given)
            found |= {f"chunked {size}": chunked(size) for size in sizes}
        half = q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] in (64, 96, 128) == call.v.shape[-1]
        if wanted in ("auto", "sage") and half and q.is_cuda and call.mask is None and not no_sage():
            found["sage"] = sage
        if wanted.startswith("emulate"):
            found[wanted] = emulated(wanted.removeprefix("emulate_"))
        asked = [wanted.removeprefix(PREFIX)] if wanted.startswith(PREFIX) else []
        for name in dispatched.automatic(q.device.type) if wanted == "auto" else asked:
            reason = dispatched.refusal(name, call)
            if reason is None:
                found[PREFIX + name] = dispatched.kernel(name)
            self.refused = self.refused or reason or ""
        return found

    def measured(self, found: Mapping[str, Kernel], call: Call) -> dict[str, float]:
        """The errors of candidates; those that "auto" may take. What a kernel builds at its first run, it builds here.

        A kernel of another package that fails is none of them: torch's kernel is still there to answer.
        """
        errors: dict[str, float] = {}
        auto = self.config.backend == "auto"
        for name, kernel in found.items():
            try:
                # torch warns of every reason for which it lacks a kernel
                with warnings.catch_warnings(action="ignore") if auto else nullcontext():
                    errors[name] = error(kernel, call)
            except (ConfigError, torch.OutOfMemoryError):
                if not auto:
                    raise
        return {name: e for name, e in errors.items() if not auto or e <= self.config.max_error}

    def choose(self, call: Call) -> Choice:
        """The fastest candidate whose error is within the bound; torch's kernel where none is faster, or fits."""
        found, device, auto = self.candidates(call), call.q.device, self.config.backend == "auto"
        errors = self.measured(found, call)
        if not errors:
            return Choice("torch", torchs)
        runs = {"torch": torchs, **{name: found[name] for name in errors}}
        best = {name: seconds(lambda k=kernel: k(call), device) for name, kernel in runs.items()}
        slow = 2 * min(best[name] for name in errors)
        found = {name: found[name] for name in errors if best[name] <= slow}  # others are no match
        for _, name in itertools.product(range(2), ["torch", *found]):  # in turn: a busy moment hits all
            best[name] = min(best[name], seconds(lambda k=runs[name]: k(call), device))
        name = min(found, key=lambda n: best[n])
        gain = best["torch"] / best[name]
        if auto and gain < GAIN:
            return Choice("torch", torchs)
        return Choice(name, found[name], errors[name], gain)

    def counts(self) -> dict[str, float]:
        """Calls, those that torch's kernel did not answer, kinds of calls, the largest error and the smallest gain."""
        ours = [c for c in self.chosen.values() if c.kernel is not torchs]
        counted = {"calls": self.calls, "replaced": self.replaced, "shapes": len(self.chosen)}
        if ours:
            counted |= {"error": max(c.error for c in ours), "gain": min(c.gain for c in ours)}
        return {k: float(v) for k, v in counted.items()}

    def inert(self) -> str | None:
        """Why no call was replaced; None where one was."""
        if self.replaced:
            return None
        if not self.calls:
            return "Attention: no scaled_dot_product_attention was called; leave Attention out."
        if self.config.backend == "auto":
            return f"Attention: torch's kernel was the fastest for all {self.calls} calls; leave Attention out."
        why = f" ({self.refused})" if self.refused else ""
        return f"Attention: none of {self.calls} calls fits {self.config.backend!r}{why}; use 'auto' or leave it out."


_engines: dict[int, Engine] = {}  # those applied now: an operator's arguments are numbers


@torch.library.custom_op("hasten::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, scale: float | None,
    gqa: bool, engine: int,
) -> Tensor:  # fmt: skip
    with torch._C.DisableTorchFunction():  # or the mode below would see its own kernels' calls
        out = _engines[engine](Call(q, k, v, mask, dropout, causal, scale, gqa))
    return out.transpose(1, 2).contiguous().transpose(1, 2) if out.ndim == 4 else out.contiguous()


@_attention.register_fake
def _(q, k, v, mask, dropout, causal, scale, gqa, engine):  # [B, H, L, E] whose memory is [B, L, H, E]
    if q.ndim != 4:
        return q.new_empty(*q.shape[:-1], v.shape[-1])
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)


def _named(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    return query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa


class _Routed(TorchFunctionMode):
    """Inside it, in this thread, scaled_dot_product_attention is the engine's. Compilers trace through it."""

    def __init__(self, engine: int):
        super().__init__()
        self.engine = engine

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.unflatten:  # its super() is beyond the compiler
            func = torch.unflatten
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = _named(*args, **(kwargs or {}))
        if torch.is_grad_enabled() and (given[0].requires_grad or given[1].requires_grad or given[2].requires_grad):
            raise ConfigError("Attention has no gradient; call the sped-up network under torch.no_grad().")
        return torch.ops.hasten.attention(*given, self.engine)


@dataclass(frozen=True)
class Attention:
    """Exact softmax attention by the fastest kernel per device, dtype and shape, chosen at the first call of each.

    ``auto`` times torch's kernel, the one of ``kernels.py`` (Linux, AVX-512 BF16 or AMX, a C++ compiler), plain
    products in chunks of queries (CPU), and on CUDA cuDNN's and torch's flash kernels and what is installed of
    SageAttention, flash attention and xformers. Calls that a backend does not take (dropout, other ranks) go to torch's
    kernel and are counted.

    Args:
        backend: ``auto``; ``native``, ``chunked`` or ``sage``, whatever they cost; ``diffusers:NAME`` for a backend of
            diffusers' attention dispatch, such as ``diffusers:_flash_3_hub`` (one of the hub is downloaded when it is
            applied); ``emulate_int8``, ``emulate_fp8`` and ``emulate_fp4`` give a low-precision kernel's answers
            anywhere, slowly.
        dtype: ``bfloat16`` lets float32 networks attend in bfloat16 on the native kernel; "" keeps their precision.
        max_error: ``auto`` takes no kernel with a larger relative error, against float32 on the call's own input.
        chunk: Queries at a time of ``chunked``; 0 measures some.
    """

    backend: str = "auto"
    dtype: str = ""
    max_error: float = 0.006
    chunk: int = 0
    name: ClassVar[str] = "attention"
    order: ClassVar[int] = 20

    def __post_init__(self) -> None:
        if not (isinstance(self.backend, str) and self.backend.startswith(PREFIX)):  # check() asks diffusers
            one_of("Attention", "backend", self.backend, (*BACKENDS, PREFIX + "NAME"))
        one_of("Attention", "dtype", self.dtype, ("", "bfloat16"))
        if not whole_number(self.chunk, 0):
            raise ConfigError(f"Attention: chunk must be a whole number from 0, not {self.chunk!r}.")
        if not number(self.max_error) or self.max_error <= 0:
            raise ConfigError(f"Attention: max_error must be a number above 0, not {self.max_error!r}.")

    def check(self, at: Host, stack: Sequence[Transform]) -> None:
        """Raise ConfigError for a backend that this machine or this network's dtype cannot have."""
        found = {(p.device.type, p.dtype) for p in at.net.parameters() if p.is_floating_point()}
        reason = {"native": kernels.why_not, "sage": no_sage}.get(self.backend, lambda: None)()
        if self.backend == "native" and not reason and not any(device == "cpu" for device, _ in found):
            reason = "the network is not on the CPU"
        if self.backend == "native" and not reason and self.dtype != "bfloat16":
            if not any(t.name == "cast" for t in stack) and not any(d == torch.bfloat16 for _, d in found):
                reason = 'the network is not in bfloat16; add Cast(), or say Attention("native", dtype="bfloat16")'
        if self.backend.startswith(PREFIX):
            devices, dtypes = {d for d, _ in found}, {d for _, d in found}
            for t in stack:
                devices |= {"cuda"} if t.name == "offload" and torch.cuda.is_available() else set()
                dtypes = {torch.bfloat16} if t.name == "cast" else dtypes
            reason = dispatched.why_not(self.backend.removeprefix(PREFIX), devices, dtypes)
        if reason:
            raise ConfigError(f"Attention: the backend {self.backend!r} cannot run, because {reason}.")

    def apply(self, at: Host) -> Applied:
        """Route the attention inside the network's forward."""
        if self.backend.startswith(PREFIX):
            dispatched.prepare(self.backend.removeprefix(PREFIX))
        number = next(n for n in itertools.count() if n not in _engines)  # the lowest: compiled code names it
        engine = Engine(self)
        _engines[number], mode, inner = engine, _Routed(number), at.net.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with mode:
                return inner(*args, **kwargs)

        restore = override(at.net, forward)

        def undo() -> None:
            restore()
            del _engines[number]
            kernels.free()

        return Applied(undo, engine.counts, engine.inert)
