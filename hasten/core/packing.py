"""Integers of half a byte, two in one, and weights on symmetric grids with a scale for each group of inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny  # keeps the scale of zeros positive


def pack(q: Tensor) -> Tensor:
    """int8 values of -8 to 7 [..., 2n] as uint8 [..., n], the first of two in the low half."""
    q = (q + 8).to(torch.uint8)
    return q[..., ::2] | q[..., 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack`: int8 [..., 2n]."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2).to(torch.int8) - 8


def to_groups(weight: Tensor, group: int, top: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A weight [out, in] as q s with q = round(w / s) of -top to top and s = max|w| / top for each group of inputs.

    Args:
        group: Inputs that share a scale; the last group is filled with zeros.
        dtype: Of the scales. The grid is that of the scales as they are stored.

    Returns:
        q [out, ceil(in / group) * group] int8 and s [out, ceil(in / group)].
    """
    rows, columns = weight.shape
    w = F.pad(weight.detach().float(), (0, -columns % group)).view(rows, -1, group)
    scale = (w.abs().amax(-1) / top).clamp_min(TINY).to(dtype)
    return (w / scale.float()[..., None]).round().clamp(-top, top).flatten(1).to(torch.int8), scale


def from_groups(q: Tensor, scale: Tensor, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [out, columns] that :func:`to_groups` stored, multiplied in float32 and rounded to ``dtype`` once."""
    w = q.view(len(q), scale.shape[1], -1) * scale.float()[..., None]
    return w.flatten(1)[:, :columns].to(dtype)
