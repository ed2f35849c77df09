"""When a few steps should look at a model, by dynamic programming: BOSS (Nguyen, Nguyen & Nguyen 2024), section 3."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hasten.core.denoiser import Batch, guided
from hasten.core.errors import ConfigError
from hasten.core.method import even
from hasten.core.sample import Hop, ode


@torch.no_grad()
def local_errors(net: Any, batch: Batch, noise: Tensor, fine: int, cfg_scale: float | None) -> Tensor:
    """c[j, k] = mean|x_k - (one ``ode`` step from x_j)|^2 on the trajectory of ``noise`` [B, ...] in ``fine`` steps.

    float64 [fine + 1, fine + 1], computed for j < k, where a sampler can step; the rest is infinite. All points and
    predictions of the trajectory are in memory at once.
    """
    path, times = net.path, net.path.at(torch.tensor(even(fine), device=batch.device))
    points, looks = [noise * path.coeffs(times[0])[1]], []

    def hop(j: int, k: int) -> Tensor:
        return ode(Hop.between(path, net.kind, lambda x, t: looks[j], batch.noise, points[j], times[j], times[k]))

    for j in range(fine):
        looks.append(guided(net, points[j], times[j], batch.cond, batch.uncond, cfg_scale, net.kind))
        points.append(hop(j, j + 1))
    found = torch.full((fine + 1, fine + 1), math.inf, dtype=torch.float64)
    for j in range(fine):
        rest = range(j + 1, fine + 1)
        found[j, j + 1 :] = torch.stack([(hop(j, k) - points[k]).float().pow(2).mean() for k in rest]).cpu()
    return found


def cheapest(cost: Tensor, steps: int) -> list[int]:
    """The ``steps`` + 1 rising indices from the first to the last of ``cost`` [N + 1, N + 1] whose hops cost least.

    V_1(j) = c(j, N), V_m(j) = min_k c(j, k) + V_(m-1)(k): exact, in ``steps`` N^2 additions.

    Raises:
        ConfigError: For more steps than there are, or a cost that is not finite above the diagonal.
    """
    last = len(cost) - 1
    if not 1 <= steps <= last:
        raise ConfigError(f"{steps} steps cannot be chosen out of {last}; take more fine ones.")
    if not bool(torch.isfinite(cost[torch.ones_like(cost).triu(1) > 0]).all()):
        raise ConfigError("The teacher's own trajectory is not finite; use float32, or a lower cfg_scale.")
    value, choices = cost[:, last], []
    for _ in range(steps - 1):
        value, choice = (cost + value).min(1)
        choices.append(choice)
    found = [0]
    for choice in reversed(choices):
        found.append(int(choice[found[-1]]))
    return [*found, last]


def best_times(
    net: Any, source: Any, steps: int, fine: int, count: int, batch: int, cfg_scale: float | None, device: Any,
    seed: int = 0, tell: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, ...]:  # fmt: skip
    """The unit times, from 1 to 0, of those ``steps`` out of ``fine`` even ones whose local errors sum to the least.

    Args:
        count: Samples that the errors are averaged over, ``batch`` at a time.
        seed: Of conditions and noise, which are drawn on the CPU: the same on every device.
        tell: Called with (done, count) after every batch.

    Raises:
        ConfigError: As :func:`cheapest`.
    """
    generator, total = torch.Generator().manual_seed(seed), torch.zeros(fine + 1, fine + 1, dtype=torch.float64)
    for start in range(0, count, batch):
        n = min(batch, count - start)
        made = source.batch(n, generator, device)
        noise = torch.randn(made.shape, generator=generator, dtype=torch.get_default_dtype()).to(device)
        total += local_errors(net, made, noise, fine, cfg_scale) * (n / count)
        tell(start + n, count)
    return tuple(even(fine)[i] for i in cheapest(total, steps))
