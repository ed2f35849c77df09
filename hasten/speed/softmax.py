"""The kernels that softmax attention can go to, torch's own among them, and how far each is from exact."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.core.errors import ConfigError
from hasten.speed import kernels
from hasten.speed.grids import E4M3, TOP4, TOP8, e2m1

ROWS = 64  # queries on which a kernel's error is measured
BLOCK, GROUP = 128, 16  # of SageAttention3: queries that share a mean, numbers that share a scale
Kernel = Callable[["Call"], Tensor]


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one scaled_dot_product_attention: q [B, H, L, D], k [B, Hk, S, D], v [B, Hk, S, E]."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    dropout: float
    causal: bool
    scale: float | None
    gqa: bool

    @property
    def key(self) -> tuple[Any, ...]:
        """What a choice holds for: everything but the values."""
        q, k, v, mask = self.q, self.k, self.v, self.mask
        about = [(x.dtype, tuple(x.shape), x.stride()) for x in (q, k, v)]
        seen = None if mask is None else (mask.dtype, tuple(mask.shape))
        return q.device, *about, seen, self.dropout, self.causal, self.scale, self.gqa

    @property
    def factor(self) -> float:
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale

    def plain(self) -> bool:
        """Without dropout, four-dimensional, on whole heads: what anything but torch's own kernel takes."""
        q, k, v = self.q, self.k, self.v
        whole = q.ndim == k.ndim == v.ndim == 4 and len(q) == len(k) == len(v) and k.shape[1] == v.shape[1] > 0
        heads = whole and (q.shape[1] % k.shape[1] == 0 if self.gqa else q.shape[1] == k.shape[1])
        both = self.causal and self.mask is not None  # which torch refuses itself
        return heads and min(*q.shape, *k.shape) > 0 and q.dtype == k.dtype == v.dtype and not self.dropout and not both

    def rows(self, which: slice) -> Call:
        """Some of the queries with what they see; not for a causal call."""
        mask = self.mask
        if mask is not None and mask.ndim > 1 and mask.shape[-2] > 1:
            mask = mask[..., which, :]
        return replace(self, q=self.q[:, :, which], mask=mask)

    def wide(self) -> Call:
        """The same in float32."""
        mask = self.mask
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        return replace(self, q=self.q.float(), k=self.k.float(), v=self.v.float(), mask=mask)


def torchs(call: Call) -> Tensor:
    """torch's own kernel."""
    return F.scaled_dot_product_attention(
        call.q, call.k, call.v, call.mask, call.dropout, call.causal, scale=call.scale, enable_gqa=call.gqa
    )


def native(call: Call) -> Tensor:
    """The kernel of ``kernels.py``."""
    return kernels.attention(call.q, call.k, call.v, call.mask, call.causal, call.scale)


@contextmanager
def named(backend: str, call: Call) -> Iterator[None]:
    """Whatever a kernel of another package raises on a call, as a ConfigError; but not the want of memory."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as problem:  # such a kernel may raise anything: its assertions, its compiler's errors
        said = " ".join(str(problem).split()).rstrip(".") or type(problem).__name__
        about = f"q {list(call.q.shape)} in {str(call.q.dtype).removeprefix('torch.')}"
        raise ConfigError(f"Attention: {backend!r} failed on {about} ({said}); use 'auto' or another one.") from problem


def per_head(x: Tensor, heads: int) -> Tensor:
    """k or v [B, Hk, S, D] repeated to the heads of q."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _probabilities(scores: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(scores + mask) of scores [B, H, L, S]; zeros for a query that sees no key, as torch has it."""
    if mask is None:
        return torch.softmax(scores, dim=-1)
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    top = scores.amax(dim=-1, keepdim=True)
    probs = torch.softmax(scores - top.clamp_min(torch.finfo(scores.dtype).min), dim=-1)
    return probs.masked_fill(top == -math.inf, 0)


def chunked(chunk: int) -> Kernel:
    """Plain products and a softmax, ``chunk`` queries at a time: the scores stay in the cache."""

    def run(call: Call) -> Tensor:
        q, heads = call.q, call.q.shape[1]
        k, v = per_head(call.k, heads), per_head(call.v, heads)
        kt, keys, parts = k.mT, torch.arange(k.shape[2], device=q.device), []
        for first in range(0, q.shape[2], chunk):
            last = min(first + chunk, q.shape[2])
            part = call.rows(slice(first, last))
            mask = keys <= torch.arange(first, last, device=q.device)[:, None] if call.causal else part.mask
            scores = (part.q @ kt).float() * call.factor
            parts.append(_probabilities(scores, mask).to(q.dtype) @ v)
        return torch.cat(parts, dim=2)

    return run


def sage(call: Call) -> Tensor:
    """SageAttention: int8 q k^T with smoothed k, fp8 or fp16 products with v."""
    heads = call.q.shape[1]
    k, v = per_head(call.k, heads), per_head(call.v, heads)
    with named("sage", call):
        from sageattention import sageattn  # pyright: ignore[reportMissingImports]

        return sageattn(call.q, k, v, tensor_layout="HND", is_causal=call.causal, sm_scale=call.factor)


def _round(x: Tensor, form: str) -> Tensor:
    """x [..., D] rounded to int8 or float8 (e4m3) with a scale per row, as float32."""
    top = 127.0 if form == "int8" else 448.0
    scale = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / top
    return (x / scale).round() * scale if form == "int8" else (x / scale).to(torch.float8_e4m3fn).float() * scale


def _fp4(x: Tensor) -> Tensor:
    """x [..., D] rounded to E2M1 with an E4M3 scale, max|x| / 6, per 16 of D."""
    groups = F.pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    scale = (groups.abs().amax(dim=-1, keepdim=True) / TOP4).clamp(max=TOP8).to(E4M3).float()
    rounded = e2m1(torch.where(scale > 0, groups / scale, 0.0)) * scale
    return rounded.flatten(-2)[..., : x.shape[-1]]


def emulated(form: str) -> Kernel:
    """What a low-precision kernel would answer, in float32: for its quality, not its speed.

    SageAttention (Zhang et al. 2025): k minus its mean over the sequence, which the softmax does not see, then q and k
    rounded; ``fp8`` also rounds the probabilities and v. ``fp4``, SageAttention3 (Zhang et al. 2025, arXiv 2505.11594):
    all four in NVFP4 without a scale per tensor, v along the sequence. The mean of 128 queries at a time is kept apart,
    its products with k exact; a row of exp(s - max) is first scaled to at most 448 * 6, so that its scales use all of
    E4M3's range.
    """

    def run(call: Call) -> Tensor:
        heads, mask = call.q.shape[1], call.mask
        q, k, v = (x.float() for x in (call.q, per_head(call.k, heads), per_head(call.v, heads)))
        k = k - k.mean(dim=2, keepdim=True)
        if form == "fp4":
            mean = torch.cat([x.mean(dim=2, keepdim=True).expand_as(x) for x in q.split(BLOCK, dim=2)], dim=2)
            scores = (_fp4(q - mean) @ _fp4(k).mT + mean @ k.mT) * call.factor
            v = _fp4(v.mT).mT
        else:
            scores = _round(q, form) @ _round(k, form).mT * call.factor
            v = _round(v.mT, form).mT if form == "fp8" else v
        if call.causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        probs = _probabilities(scores, mask)
        if form == "fp8":
            probs = _round(probs, form)
        elif form == "fp4":
            level = probs.amax(dim=-1, keepdim=True).clamp_min(1e-12) / (TOP8 * TOP4)
            probs = _fp4(probs / level) * level
        return (probs @ v).to(call.q.dtype)

    return run


def error(kernel: Kernel, call: Call) -> float:
    """|kernel - exact| / |exact|, exact by torch in float32, on some of the queries if they stand alone."""
    got, few = kernel(call), slice(None, None, max(1, call.q.shape[2] // ROWS))
    if not call.causal:
        call, got = call.rows(few), got[:, :, few]
    want = torchs(call.wide())
    return float((got.float() - want).norm() / want.norm().clamp_min(1e-30))


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Of one run."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def no_sage() -> str | None:
    """Why SageAttention cannot run here; None where it can."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return "it needs a CUDA device of compute capability 8.0"
    return None if find_spec("sageattention") else "the package sageattention is not installed"
