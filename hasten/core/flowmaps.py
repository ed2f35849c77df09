"""What the flow-map methods share: two times, a part of the conditions, the velocity that a map follows."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.core.denoiser import Cond, guided, on_path
from hasten.core.method import Nets
from hasten.core.path import RECTIFIED_FLOW, Path
from hasten.core.times import Times


def two_times(
    times: Times, path: Path, n: int, device: torch.device | str = "cpu", earlier: Times | None = None
) -> tuple[Tensor, Tensor]:
    """t and r [n], the larger and the smaller of two draws, the second of which is ``earlier``'s where it is given."""
    a, b = (law.draw(path, n, device) for law in (times, earlier or times))
    return torch.maximum(a, b), torch.minimum(a, b)


def part(cond: Cond, rows: slice) -> dict[str, Tensor]:
    """The conditions of some of the samples."""
    return {name: c[rows] for name, c in cond.items()}


@torch.no_grad()
def teacher_velocity(nets: Nets, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, cfg_scale: float | None) -> Tensor:
    """dx/dt [B, ...] of the (guided) teacher at x_t, t of the rectified flow, on whatever path it was trained."""
    teacher = on_path(nets["teacher"], RECTIFIED_FLOW, "velocity")
    return guided(teacher, x_t, t, cond, uncond, cfg_scale, "velocity")
