"""The int8 linear: int8 weights with a scale per output channel, int8 activations with a dynamic scale per token."""

from __future__ import annotations

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
