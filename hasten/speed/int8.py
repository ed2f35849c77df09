"""The int8 linear: int8 weights with a scale per output channel, int8 activations with a dynamic scale per token."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.core.errors import ConfigError
from hasten.speed import kernels

TINY = 1e-12  # keeps the scale of a zero row or channel positive


class Int8Linear(nn.Module):
    """y = s_x s_w (q_x q_w^T) + b with q = round(v / s), s = max|v| / 127: symmetric, one s_x a token, one s_w a row.

    The int32 product is exact up to 133,000 inputs: ``torch._int_mm``, or on a CPU with AMX a kernel that rounds,
    multiplies and scales at once (``kernels.py``). There is no ``weight``, so that code that
    asks for its dtype fails and does not cast activations to int8.
    """

    packed: Tensor  # [out, in] int8
    scale: Tensor  # [out] float32
    bias: Tensor  # [out] float32

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp_min(TINY) / 127
        bias = torch.zeros_like(scale) if linear.bias is None else linear.bias.detach().float().clone()
        self.register_buffer("packed", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.fused = linear.in_features % 4 == 0 and kernels.int8_ready()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out] of the same dtype. Raises ConfigError where a gradient is asked for."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise ConfigError("An int8 layer has no gradient; call the quantized network under torch.no_grad().")
        rows = x.reshape(-1, x.shape[-1])
        if self.fused and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16):
            return torch.ops.hasten.int8_linear(rows, self.packed, self.scale, self.bias).unflatten(0, x.shape[:-1])
        s_x = rows.abs().amax(dim=1, keepdim=True).float().clamp_min(TINY) / 127
        q = (rows / s_x).round_().to(torch.int8)
        few = x.is_cuda and len(q) <= 16  # cuBLAS wants more than 16 rows
        product = torch.ops.aten._int_mm(F.pad(q, (0, 0, 0, 17 - len(q))) if few else q, self.packed.t())
        product = product[: len(q)] if few else product
        y = torch.addcmul(self.bias, product.float().mul_(s_x), self.scale)
        return y.to(x.dtype).unflatten(0, x.shape[:-1]) if x.ndim != 2 else y.to(x.dtype)


# --- several at once ----------------------------------------------------------------------------------------------

Long, Pointer = ctypes.c_int64, ctypes.c_void_p


class _Source(ctypes.Structure):
    _fields_ = [("x", Pointer), ("inputs", Long), ("stride", Long)]


class _Target(ctypes.Structure):
    _fields_ = [*[(name, Pointer) for name in ("weight", "scale", "bias", "out")], ("outputs", Long), ("gelu", Long)]


class _Linears(ctypes.Structure):
    _fields_ = [
        *[(name, Pointer) for name in ("sources", "targets", "scratch")],
        *[(name, Long) for name in ("n_sources", "n_targets", "rows", "wide")],
    ]


@torch.library.custom_op("hasten::int8_linears", mutates_args=())
def int8_linears(
    xs: Sequence[Tensor], weights: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor],
    gelus: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Int8 linears of one input, which is rounded once: what ``hasten::int8_linear`` gives for each, bit for bit.

    Args:
        xs: Parts of the input, [N, in_i] bfloat16 or float32, side by side; every in_i but the last is a multiple of
            64, and their sum a multiple of 4.
        weights: For each linear, [out, in] int8, ``scales`` and ``biases`` [out] float32.
        gelus: For each linear, whether that activation, in its tanh form, follows.

    Returns:
        For each linear, [N, out] of the parts' dtype.
    """
    if not kernels.int8_ready():
        raise ConfigError(f"The int8 linear's kernel does not run here: {kernels.why_not() or 'this CPU has no AMX'}.")
    xs = [x if x.stride(-1) == 1 else x.contiguous() for x in xs]
    # The lists keep what is made contiguous alive for as long as the kernel reads it.
    own = [
        (w.contiguous(), s.float().contiguous(), b.float().contiguous())
        for w, s, b in zip(weights, scales, biases, strict=True)
    ]
    outs = [xs[0].new_empty(len(xs[0]), len(w)) for w, _, _ in own]
    sources = (_Source * len(xs))(*((x.data_ptr(), x.shape[1], x.stride(0)) for x in xs))
    targets = (_Target * len(own))(
        *(
            (w.data_ptr(), s.data_ptr(), b.data_ptr(), out.data_ptr(), len(w), gelu)
            for (w, s, b), out, gelu in zip(own, outs, gelus, strict=True)
        )
    )
    said = _Linears(ctypes.addressof(sources), ctypes.addressof(targets), None, len(xs), len(own), len(xs[0]))
    said.wide = xs[0].dtype == torch.float32
    library, threads = kernels.library(), torch.get_num_threads()
    library.hasten_int8_linears_scratch.restype = Long
    with kernels.Scratch(library.hasten_int8_linears_scratch(ctypes.byref(said), threads)) as said.scratch:
        library.hasten_int8_linears(ctypes.byref(said), threads)
    return outs


@int8_linears.register_fake
def _(xs, weights, scales, biases, gelus):
    return [xs[0].new_empty(xs[0].shape[0], w.shape[0]) for w in weights]
