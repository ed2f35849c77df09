"""The attention kernels that diffusers dispatches to, as kernels of a :class:`hasten.speed.softmax.Call`.

diffusers (models/attention_dispatch.py) registers a function of q, k, v [B, L, H, D] by name, what it demands of them,
and which package it needs. Nothing of diffusers is imported before a name of its is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from threading import Lock
from typing import Any

import torch

from hasten.core.errors import ConfigError, unknown
from hasten.speed.softmax import Call, Kernel, named, per_head

PREFIX = "diffusers:"
# By device, what "auto" tries where it can run: torch's own and installed packages. Hub kernels would be downloaded.
AUTO = {
    "cuda": (
        "_native_cudnn", "_native_flash", "flash", "_flash_3", "_sage_qk_int8_pv_fp8_cuda",
        "_sage_qk_int8_pv_fp8_cuda_sm90", "xformers",
    ),
}  # fmt: skip
# Those that hand masks, causality and other sizes of v on to torch
TORCH = ("native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math")
ANYWHERE = ("native", "_native_flash", "_native_math", "flex")
ELSEWHERE = {"_native_npu": "npu", "_native_xla": "xla"}  # all others need CUDA
FLAGS = Lock()  # torch's choices of kernels are the process's: two calls at once would put each other's back
HALF = (torch.float16, torch.bfloat16)


def library() -> Any:
    """diffusers' module of attention backends; ConfigError where there is none."""
    try:
        from diffusers.models import attention_dispatch
    except ImportError as problem:
        fix = 'pip install "diffusers>=0.42,<0.43"'
        raise ConfigError(f"Attention: a backend {PREFIX}NAME needs diffusers; install it with {fix}.") from problem
    return attention_dispatch


def _clause(problem: Exception) -> str:
    """What diffusers says, for the inside of a sentence."""
    first, *more = " ".join(str(problem).split()).rstrip(".").split(". ")
    return "; ".join([first, *(s[:1].lower() + s[1:] for s in more)])


def unmet(name: str) -> str | None:
    """What this machine lacks for a backend, in diffusers' words; None where it lacks nothing."""
    diffusers = library()
    try:
        diffusers._check_attention_backend_requirements(diffusers.AttentionBackendName(name))
    except RuntimeError as problem:
        return _clause(problem)
    return None


def automatic(device: str) -> list[str]:
    """The backends that "auto" tries on this type of device; none without diffusers."""
    tried = AUTO.get(device, ())
    try:
        return [name for name in tried if name in library()._AttentionBackendRegistry._backends and not unmet(name)]
    except ConfigError:
        return []


def _mask(call: Call) -> torch.Tensor | None:
    """[B or 1, H or 1, L or 1, S]: of two dimensions, diffusers would read [B, S] where it can; torch never does."""
    if call.mask is None:
        return None
    mask = call.mask[(None,) * (4 - call.mask.ndim)]
    return mask.expand(*mask.shape[:3], call.k.shape[2])


def refusal(name: str, call: Call) -> str | None:
    """Why a backend cannot take this call, or would not answer what torch does; None where it takes it."""
    registry, q, k, v = library()._AttentionBackendRegistry, call.q, call.k, call.v
    taken = registry._supported_arg_names[name]
    if call.mask is not None and (name not in TORCH or name == "_native_flash"):
        return "it takes no mask as torch does"  # some read only which keys are seen, or add the booleans
    if call.causal and name not in TORCH:
        # flex forgets it; flash attention counts the diagonal from the last key
        if name == "flex" or "is_causal" not in taken or q.shape[2] != k.shape[2]:
            return "it is not causal as torch is"
    if call.scale is not None and "scale" not in taken:
        return "it takes no scale"
    if name not in (*TORCH, "flex") and q.shape[-1] != v.shape[-1]:
        return "its keys and values must have as many channels"
    if "sage" in name and (q.dtype not in HALF or q.shape[-1] > 128):
        return "q, k and v must be bfloat16 or float16, with at most 128 channels"
    arguments = {"query": q.transpose(1, 2), "key": k.transpose(1, 2), "value": v.transpose(1, 2)}
    try:
        for demand in registry._constraints[name]:
            demand(**arguments, attn_mask=_mask(call), is_causal=call.causal)
    except ValueError as problem:
        return _clause(problem)
    return None


def why_not(name: str, devices: Iterable[str], dtypes: Iterable[torch.dtype]) -> str | None:
    """Why a backend cannot run on a network on these devices, in these dtypes; None where it can.

    Raises:
        ConfigError: If diffusers has no such backend, or is not installed.
    """
    known = [n.value for n in library()._AttentionBackendRegistry._backends]
    if name not in known:
        raise unknown("backend of Attention", PREFIX + name, [PREFIX + n for n in known])
    if (reason := unmet(name)) is not None:
        return reason
    if not (devices := sorted(devices)):
        return None  # a network without parameters runs where its input is
    wanted = devices if name in ANYWHERE else [ELSEWHERE.get(name, "cuda")]
    on = [d for d in devices if d in wanted]
    if not on:
        want = repr(wanted[0])
        return f"it needs a device {want} and the network is on {', '.join(devices)}; move it there with .to({want})"

    def told(dtype: torch.dtype) -> str | None:
        x = torch.zeros(1, 1, 16, 64, dtype=dtype, device=on[0])
        return refusal(name, Call(x, x, x, None, 0.0, False, None, False))

    reasons = [told(dtype) for dtype in dtypes]
    if None in reasons or not reasons:
        return None
    return f"{reasons[0]}" + ("" if told(torch.bfloat16) else "; add Cast()")


def prepare(name: str) -> None:
    """Download what a hub backend runs; nothing for the others.

    Raises:
        ConfigError: If that fails.
    """
    diffusers = library()
    try:
        diffusers._maybe_download_kernel_for_backend(diffusers.AttentionBackendName(name))
    except Exception as problem:  # of the network, of the hub, of a binary for another torch
        said = f"its kernel could not be loaded from the hub ({_clause(problem)}); use 'auto' or another one"
        raise ConfigError(f"Attention: the backend {PREFIX + name!r} cannot run, because {said}.") from problem


def kernel(name: str) -> Kernel:
    """A backend as a kernel; whatever it raises becomes a ConfigError."""
    registry = library()._AttentionBackendRegistry
    function, taken = registry._backends[name], registry._supported_arg_names[name]

    def run(call: Call) -> torch.Tensor:
        k, v = call.k, call.v
        if "enable_gqa" not in taken:
            k, v = (per_head(x, call.q.shape[1]) for x in (k, v))
        if name == "sage_blackwell_hub":
            k = k.clone()  # it takes the mean away in place, from the caller's memory if k is contiguous
        given = {"attn_mask": _mask(call), "is_causal": call.causal, "scale": call.scale, "enable_gqa": call.gqa}
        q, k, v = (x.transpose(1, 2) for x in (call.q, k, v))
        with named(PREFIX + name, call), FLAGS if name in TORCH else nullcontext():
            out = function(query=q, key=k, value=v, **{n: x for n, x in given.items() if n in taken})
        return out.transpose(1, 2)

    return run
