"""Building, loading and calling ``kernels_*.cpp``: attention and the int8 linear for CPUs with AVX-512 BF16 or AMX.

The files are compiled once per machine, into the user's cache folder (``$XDG_CACHE_HOME/hasten``). Where that cannot
be, :func:`why_not` says why, and callers keep torch's own kernels.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from hasten.core.errors import ConfigError

SOURCES = [Path(__file__).with_name(f"kernels_{name}.cpp") for name in ("attention", "int8", "rotate")]
HEADER = Path(__file__).with_name("kernels.h")
AVX512 = {
    "avx512_f": "avx512f",
    "avx512_bw": "avx512bw",
    "avx512_dq": "avx512dq",
    "avx512_vl": "avx512vl",
    "avx512_bf16": "avx512bf16",
}  # what torch calls it, what the compiler calls it
AMX = {"amx_tile": "amx-tile", "amx_bf16": "amx-bf16", "amx_int8": "amx-int8"}
MAX_DIM = 256  # of a head
_build, _spare = Lock(), Lock()
_scratch: list[Tensor] = []  # buffers between calls: faulting fresh pages in costs as much as packing into them

Long = ctypes.c_int64


class _Attention(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "mask", "scratch")],
        *[(name, Long) for name in ("batch", "heads", "kv_heads", "queries", "keys", "dim", "dim_v")],
        *[(name, Long * 3) for name in ("qs", "ks", "vs", "os", "ms")],
        ("scale", ctypes.c_float), ("causal", ctypes.c_int32), ("wide", ctypes.c_int32),
    ]  # fmt: skip


class _Linear(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("x", "weight", "scale", "bias", "out", "scratch")],
        *[(name, Long) for name in ("rows", "inputs", "outputs", "stride")],
        ("wide", ctypes.c_int32), ("gelu", ctypes.c_int32),
    ]  # fmt: skip


def _has(*names: str) -> bool:
    found = torch.cpu.get_capabilities()
    return all(found.get(name, False) for name in names)


def _command() -> list[str]:
    """The compiler and its flags, named one by one: a cache folder that machines share serves each its own."""
    flags = [f"-m{name}" for name in (*AVX512.values(), *(AMX.values() if _has(*AMX) else ()))]
    compiler = shutil.which(os.environ.get("CXX", "g++")) or ""
    return [compiler, "-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC", "-mavx2", "-mfma", *flags]


@functools.cache
def why_not() -> str | None:
    """Why the kernels cannot run on this machine, in a few words; None where they can. Builds them at first."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "they are written for Linux on x86-64"
    if not _has(*AVX512):
        return "this CPU has no AVX-512 BF16"
    if not _command()[0]:
        return "there is no C++ compiler; install g++ or name one in CXX"
    try:
        library()
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return f"building them failed ({said[0] if said else error})"
    return None


@functools.cache
def int8_ready() -> bool:
    """Whether the int8 linear's kernel runs here: it needs AMX."""
    return _has(*AMX) and why_not() is None


@functools.cache
def library() -> Any:
    """The loaded kernels."""
    command = _command()
    text = b"".join(file.read_bytes() for file in (HEADER, *SOURCES))
    said = hashlib.sha256(text + "\0".join(command).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hasten"
    file = folder / f"kernels-{said}.so"
    with _build:
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=folder) as work:  # several processes may build at once
                made = Path(work) / "kernels.so"
                subprocess.run(
                    [*command, *map(str, SOURCES), "-o", str(made)], check=True, capture_output=True, text=True
                )
                os.replace(made, file)
    if _has(*AMX) and not torch.cpu._init_amx():
        raise OSError("the system grants no AMX state")
    loaded = ctypes.CDLL(str(file))
    loaded.hasten_attention_scratch.restype = Long
    if _has(*AMX):
        loaded.hasten_int8_linear_scratch.restype = Long
    return loaded


class Scratch:
    """A buffer of at least ``size`` bytes, taken from those of earlier calls."""

    def __init__(self, size: int):
        with _spare:
            old = _scratch.pop() if _scratch else None
        self.buffer = old if old is not None and old.numel() >= size else torch.empty(size, dtype=torch.uint8)

    def __enter__(self) -> int:
        return self.buffer.data_ptr()

    def __exit__(self, *_: Any) -> None:
        with _spare:
            if len(_scratch) < 2:
                _scratch.append(self.buffer)


def free() -> None:
    """Let go of the buffers kept between calls."""
    with _spare:
        _scratch.clear()


def attention_takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> bool:
    """Whether the attention kernel takes these: [B, H, L, D] on the CPU, whose channels lie next to each other."""
    return (
        all(x.device.type == "cpu" and x.ndim == 4 and x.dtype == q.dtype and x.stride(-1) == 1 for x in (q, k, v))
        and q.dtype in (torch.bfloat16, torch.float32)
        and 0 < max(q.shape[-1], v.shape[-1]) <= MAX_DIM
        and min(*q.shape, *k.shape) > 0
        and q.shape[1] % k.shape[1] == 0
        and k.shape[:3] == v.shape[:3]
        and q.shape[0] == k.shape[0]
        and (scale is None or scale > 0)
        and (mask is None or mask.ndim <= 4)
    )


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scale: float | None = None
) -> Tensor:
    """softmax(scale q k^T + mask) v, computed in bfloat16 with float32 sums: torch's meaning of every argument.

    Args:
        q: [B, heads, L, D] bfloat16 or float32, any strides with channels next to each other.
        k: [B, kv_heads, S, D]; heads is a multiple of kv_heads.
        v: [B, kv_heads, S, E].
        mask: Broadcasts to [B, heads, L, S]; boolean (True counts) or added to the scores.
        causal: Query i sees keys up to i.
        scale: Of the scores; D^-1/2 if None.

    Returns:
        [B, heads, L, E] of q's dtype, whose memory is [B, L, heads, E].
    """
    (B, H, L, D), S, E = q.shape, k.shape[2], v.shape[3]
    out = q.new_empty(B, L, H, E).transpose(1, 2)
    seen, strides = 0, (0, 0, 0)
    if mask is not None:
        added = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else mask.float()
        if added.ndim == 0 or added.shape[-1] != S or added.stride(-1) != 1:
            added = added.expand(*added.shape[:-1], S).contiguous()
        mask = added.expand(B, H, L, S)
        seen, strides = mask.data_ptr(), mask.stride()[:3]
    said = _Attention(  # at once: field by field is slower
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), seen, None, B, H, k.shape[1], L, S, D, E,
        q.stride()[:3], k.stride()[:3], v.stride()[:3], out.stride()[:3], strides,
        D**-0.5 if scale is None else scale, causal, q.dtype == torch.float32,
    )  # fmt: skip
    kernels = library()
    with Scratch(kernels.hasten_attention_scratch(ctypes.byref(said))) as said.scratch:
        kernels.hasten_attention(ctypes.byref(said), torch.get_num_threads())
    return out


@torch.library.custom_op("hasten::int8_linear", mutates_args=())
def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, gelu: bool = False) -> Tensor:
    """The int8 linear with a dynamic scale per row: an operator, so that compilers see one.

    Args:
        x: [N, in] bfloat16 or float32.
        weight: [out, in] int8; in is a multiple of 4.
        scale: [out] float32, of the weight's rows.
        bias: [out] float32.
        gelu: Apply that activation, in its tanh form, to the result.

    Returns:
        [N, out] of x's dtype.
    """
    if not int8_ready():
        raise ConfigError(f"The int8 linear's kernel does not run here: {why_not() or 'this CPU has no AMX'}.")
    rows, inputs = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    weight, scale, bias = weight.contiguous(), scale.float().contiguous(), bias.float().contiguous()
    out = x.new_empty(rows, len(weight))
    said = _Linear(x.data_ptr(), weight.data_ptr(), scale.data_ptr(), bias.data_ptr(), out.data_ptr())
    said.rows, said.inputs, said.outputs, said.stride = rows, inputs, len(weight), x.stride(0)
    said.wide, said.gelu = x.dtype == torch.float32, gelu
    kernels, threads = library(), torch.get_num_threads()
    with Scratch(kernels.hasten_int8_linear_scratch(ctypes.byref(said), threads)) as said.scratch:
        kernels.hasten_int8_linear(ctypes.byref(said), threads)
    return out


@int8_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, gelu: bool = False) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
