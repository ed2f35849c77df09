"""When a few steps should look at a model, by dynamic programming: BOSS (Nguyen, Nguyen & Nguyen 2024), section 3."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hasten.core.denoiser import Batch, guided
from hasten.core.errors import ConfigError
from hasten.core.method import even
from hasten.core.sample import Hop, ode


@torch.no_grad()
def local_errors(net: Any, batch: Batch, fine: int, cfg_scale: float | None) -> Tensor:
    """c[j, k] = mean|x_k - (one ``ode`` step from x_j)|^2 of a trajectory in ``fine`` even steps: [fine + 1, fine + 1].

    It is computed for j < k, where a sampler can step; the rest is infinite.
    """
    path, times = net.path, net.path.at(torch.tensor(even(fine), device=batch.device))
    points, looks = [batch.noise() * path.coeffs(times[0])[1]], []

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
    """
    last = len(cost) - 1
    if not 1 <= steps <= last:
        raise ConfigError(f"{steps} steps cannot be chosen out of {last}; take more fine ones.")
    value, choices = cost[:, last], []
    for _ in range(steps - 1):
        value, choice = (cost + value).min(1)
        choices.append(choice)
    found = [0]
    for choice in reversed(choices):
        found.append(int(choice[found[-1]]))
    return [*found, last]


def measured(
    net: Any, source: Any, fine: int, count: int, batch: int, cfg_scale: float | None, seed: int, device: Any
) -> Tensor:
    """:func:`local_errors` over ``count`` samples, ``batch`` at a time; the global random state is left alone."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(fine + 1, fine + 1, dtype=torch.float64)
    for start in range(0, count, batch):
        n = min(batch, count - start)
        made = source.batch(n, generator, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            total += local_errors(net, made, fine, cfg_scale) * (n / count)
    return total


def chosen(indices: Sequence[int], fine: int) -> tuple[float, ...]:
    """The unit times of ``indices`` among ``fine`` even steps, from 1 to 0."""
    return tuple(even(fine)[i] for i in indices)
