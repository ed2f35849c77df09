"""Quantization-aware training: a student that already runs on the rounded numbers it will be served with."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hasten.speed.host import host
from hasten.speed.int8 import TINY
from hasten.speed.quantize import Quantize


def rounded(x: Tensor) -> Tensor:
    """``x`` [..., n] on the int8 grid of its last dimension, s = max|x| / 127, with the gradient of the identity.

    The straight-through estimator (Bengio et al. 2013): the largest entry sets the grid, so nothing is clipped.
    """
    scale = x.detach().abs().amax(dim=-1, keepdim=True).float().clamp_min(TINY) / 127
    return x + ((x.detach() / scale).round() * scale - x.detach()).to(x.dtype)


class RoundedLinear(nn.Linear):
    """W8A8 as ``hasten.speed.Quantize`` computes it, with a gradient: a scale per weight row, one per token."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(rounded(input), rounded(self.weight), self.bias)


def round_linears(net: nn.Module, dtype: str, min_side: int) -> None:
    """Let those linears of ``net`` that ``Quantize(dtype, min_side)`` will replace compute with rounded numbers.

    Parameters stay the same objects under the same names.

    Raises:
        ConfigError, UnsupportedModel: As Quantize does, where no linear qualifies.
    """
    quantize = Quantize(dtype, min_side)
    at = host(net)
    quantize.check(at, ())
    for parent, name, linear in quantize._chosen(at):
        parent._modules[name] = _as(RoundedLinear, linear)


def plain(net: Any) -> Any:
    """``net`` itself, its linears without rounding again."""
    for parent in net.modules():
        for name, child in parent._modules.items():
            if isinstance(child, RoundedLinear):
                parent._modules[name] = _as(nn.Linear, child)
    return net


def _as(cls: type[nn.Linear], linear: nn.Linear) -> nn.Linear:
    twin = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    twin.weight, twin.bias = linear.weight, linear.bias
    return twin.train(linear.training)
