"""Rotary embedding of adjacent channels, and the norm of each head before it, as one operator for the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.core.errors import ConfigError
from hasten.speed import kernels

Long = ctypes.c_int64


class _Rotate(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("x", "weight", "out", "cos", "sin")],
        ("size", Long * 3), ("dim", Long), *[(name, Long * 3) for name in ("xs", "os", "cs", "ss")],
        ("eps", ctypes.c_float), *[(name, ctypes.c_int32) for name in ("norm", "wide", "wide_weight")],
    ]  # fmt: skip


@torch.library.custom_op("hasten::rotate", mutates_args=())
def rotate(
    xs: Sequence[Tensor], weights: Sequence[Tensor | None], eps: float | None, cos: Tensor, sin: Tensor, at: int
) -> Tensor:
    """x cos + (-x1, x0, -x3, x2 ...) sin, computed in float32, of x the parts put together along a dimension.

    Args:
        xs: The parts, [A, B, C, D] bfloat16 or float32 on the CPU; D is even.
        weights: For each part, [D] of the root mean square norm over its channels, or None.
        eps: Of that norm; None for no norm.
        cos: float32, of four dimensions, and broadcasts to the result; ``sin`` likewise.
        at: The dimension, 0, 1 or 2.

    Returns:
        [A, B, C, D] of the parts' dtype.
    """
    if (reason := kernels.why_not()) is not None:
        raise ConfigError(f"The rotation's kernel does not run here, because {reason}.")
    if len({(x.dtype, x.ndim) for x in xs}) > 1:
        raise ConfigError("The rotation joins tensors of one dtype and as many dimensions.")
    shape = list(xs[0].shape)
    shape[at] = sum(x.shape[at] for x in xs)
    whole, start = xs[0].new_empty(shape), 0
    cos, sin = (v if v.stride(-1) == 1 else v.contiguous() for v in (cos, sin))
    cos, sin = cos.expand(shape), sin.expand(shape)
    run, threads = kernels.library().hasten_rotate, torch.get_num_threads()
    for x, weight in zip(xs, weights, strict=True):
        x, size = x if x.stride(-1) == 1 else x.contiguous(), x.shape[at]
        out, c, s = (v.narrow(at, start, size) if len(xs) > 1 else v for v in (whole, cos, sin))
        start += size
        said = _Rotate(x.data_ptr(), weight.data_ptr() if weight is not None else None, out.data_ptr())
        said.cos, said.sin, said.size, said.dim = c.data_ptr(), s.data_ptr(), (Long * 3)(*x.shape[:3]), x.shape[3]
        for name, v in (("xs", x), ("os", out), ("cs", c), ("ss", s)):
            setattr(said, name, (Long * 3)(*v.stride()[:3]))
        said.eps, said.norm, said.wide = eps or 0.0, eps is not None, x.dtype == torch.float32
        said.wide_weight = weight is not None and weight.dtype == torch.float32
        run(ctypes.byref(said), threads)
    return whole


@rotate.register_fake
def _(xs, weights, eps, cos, sin, at):
    shape = list(xs[0].shape)
    shape[at] = sum(x.shape[at] for x in xs)
    return xs[0].new_empty(shape)
