"""Numbers of eight and four bits with a scale per tile, as the tensor cores take them: FP8, MXFP8, NVFP4.

E4M3 (Micikevicius et al. 2022) has the values up to 448. E2M1 has 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives
(OCP Microscaling Formats 1.0, section 5.3.3). All is rounded to nearest, ties to even.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.core.packing import TINY, pack, unpack

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
TOP8, TOP4 = 448.0, 6.0
# (rows, columns) of a tile that shares a scale, 0 for all: of the weight [out, in], of the activations [tokens, in]
TILES = {
    "tensor": ((0, 0), (0, 0)),
    "row": ((1, 0), (1, 0)),
    "block": ((128, 128), (1, 128)),
    "mxfp8": ((1, 32), (1, 32)),
    "nvfp4": ((1, 16), (1, 16)),
}


class Tiled(NamedTuple):
    """A matrix [m, n] in few bits: v = values * scale * outer.

    ``values`` [m, n] is E4M3, or for NVFP4 two E2M1 codes a byte [m, ceil(n / 16) * 8]; ``scale`` [tiles down, tiles
    across] is float32, for MXFP8 E8M0, for NVFP4 E4M3; ``outer`` [] is float32, 1 but for NVFP4.
    """

    values: Tensor
    scale: Tensor
    outer: Tensor


def e2m1(v: Tensor) -> Tensor:
    """The nearest E2M1 value; beyond 6 is 6."""
    step = torch.exp2(torch.floor(torch.log2(v.abs().clamp(1.0, TOP4))) - 1)  # 1/2 below 2, 1 below 4, 2 from there
    return ((v / step).round() * step).clamp(-TOP4, TOP4)


def codes(v: Tensor) -> Tensor:
    """E2M1 values as their codes, 0 to 15 with the sign first, less 8: what :func:`hasten.core.packing.pack` takes."""
    size = v.abs()
    code = torch.where(size < 2, 2 * size, torch.where(size < 4, size + 2, size / 2 + 4))
    return (code + 8 * (v < 0)).to(torch.int8) - 8


def values(codes: Tensor) -> Tensor:
    """The inverse of :func:`codes`, float32."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=codes.device)
    return torch.cat([table, -table])[codes.int() + 8]


def tiles(v: Tensor, tile: tuple[int, int]) -> Tensor:
    """v [m, n], filled with zeros to whole tiles, as [tiles down, rows, tiles across, columns]."""
    (m, n), r, c = v.shape, tile[0] or len(v), tile[1] or v.shape[1]
    return F.pad(v, (0, -n % c, 0, -m % r)).view((m + -m % r) // r, r, (n + -n % c) // c, c)


def encode(v: Tensor, form: str, side: int = 1) -> Tiled:
    """A matrix [m, n] with the scales of ``form``, a key of TILES.

    FP8: s = max|v| / 448 of a tile. MXFP8: the least power of two that is not below it (Mishra et al. 2025), so that
    nothing saturates. NVFP4: outer = max|V| / (448 * 6) and s = E4M3(max|v| / 6 / outer) of a tile.

    Args:
        side: 0 for a weight, 1 for activations.
    """
    (m, n), t = v.shape, tiles(v.float(), TILES[form][side])
    high = t.abs().amax((1, 3), keepdim=True)
    outer = torch.ones((), device=v.device)
    if form == "nvfp4":
        outer = (high.amax() / (TOP8 * TOP4)).clamp_min(TINY)
        scale = (high / TOP4 / outer).clamp(max=TOP8).to(E4M3)
        whole = scale.float() * outer
        q = e2m1(torch.where(whole > 0, t / whole, 0.0)).flatten(2).flatten(0, 1)
        return Tiled(pack(codes(q[:m])), scale[:, 0, :, 0], outer)
    scale = (high / TOP8).clamp_min(TINY)
    if form == "mxfp8":
        part, exponent = torch.frexp(scale)
        scale = torch.exp2(torch.where(part > 0.5, exponent, exponent - 1).float())
    q = (t / scale).clamp(-TOP8, TOP8).flatten(2).flatten(0, 1)[:m, :n].to(E4M3)
    scale = scale[:, 0, :, 0]
    return Tiled(q, scale.to(E8M0) if form == "mxfp8" else scale, outer)


def decode(stored: Tiled, form: str, columns: int, side: int = 1) -> Tensor:
    """The matrix [m, columns] float32 that :func:`encode` stored."""
    q = values(unpack(stored.values)) if form == "nvfp4" else stored.values.float()
    t = tiles(q, TILES[form][side])
    return (t * (stored.scale.float() * stored.outer)[:, None, :, None]).flatten(2).flatten(0, 1)[: len(q), :columns]


def nearest(v: Tensor, form: str, side: int = 1) -> Tensor:
    """A matrix rounded to ``form``, float32: what a product of that type sees."""
    return decode(encode(v, form, side), form, v.shape[1], side)
