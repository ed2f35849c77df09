"""Directional derivatives of networks, losses with a given gradient, reductions over a sample's dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Mode = Literal["exact", "central"]


def mean_dims(x: Tensor) -> Tensor:
    """Mean over all dimensions but the batch, kept: [B, 1, ...]."""
    return x.mean(dim=tuple(range(1, x.ndim)), keepdim=True)


def sum_dims(x: Tensor) -> Tensor:
    """Sum over all dimensions but the batch: [B]."""
    return x.flatten(1).sum(1)


def surrogate(x: Tensor, grad: Tensor) -> Tensor:
    """A scalar whose gradient with respect to ``x`` [B, ...] is exactly ``grad`` / x.numel(), that of a mean."""
    return (x * grad.detach()).mean()


def jvp(
    f: Callable[..., Tensor],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor],
    mode: Mode = "exact",
    step: float = 5e-3,
    graph: bool = False,
) -> tuple[Tensor, Tensor]:
    """f(primals), with its graph, and the derivative of f along ``tangents``, without one unless asked for.

    Args:
        mode: ``exact`` is forward-mode AD under math attention (fused attention has no forward mode);
            ``central`` is (f(p + h v) - f(p - h v)) / 2h, for networks under checkpointing, compilation or
            sharding, where ``torch.func.jvp`` fails. Its error is O(h^2) plus rounding / h.
        step: h of the central difference.
        graph: Keep the derivative's own graph, so that a loss can be differentiated through it.
    """
    if mode == "exact":
        with sdpa_kernel(SDPBackend.MATH):
            out, tangent = torch.func.jvp(f, tuple(primals), tuple(tangents))[:2]
        return out, tangent if graph else tangent.detach()
    with torch.set_grad_enabled(graph and torch.is_grad_enabled()):
        ahead = f(*(p + step * v for p, v in zip(primals, tangents, strict=True)))
        behind = f(*(p - step * v for p, v in zip(primals, tangents, strict=True)))
    return f(*primals), (ahead - behind) / (2 * step)
