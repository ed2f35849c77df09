"""Closed forms on Gaussian and mixture data (facts: V = alpha^2 s^2 + sigma^2), independent of the code under test.

A *law* is the distribution of every dimension of x0, the dimensions being independent given nothing: a mixture has
its own posterior in each of them, so that X(t -> r) = F_r^-1(F_t(x)) holds per dimension. Laws only read a path's
four numbers; they never call its conversions. Give float64 for exact answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.path import Kind, Path


def wide(t: Tensor | float, x: Tensor) -> Tensor:
    """A time ([], [B]) in x's dtype, viewed to broadcast against x [B, ...]."""
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim)) if t.ndim else t


class Gaussian(nn.Module):
    """x0 ~ N(mean, std^2) in every dimension; ``mean`` and ``std`` broadcast against one sample.

    With ``learn`` they are parameters, so that a network built on this law can be trained or differentiated.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Any = 0.0, std: Any = 1.0, *, learn: bool = False):
        super().__init__()
        for name, value in (("mean", mean), ("std", std)):
            value = torch.as_tensor(value, dtype=torch.float64)
            if learn:
                self.register_parameter(name, nn.Parameter(value.clone()))
            else:
                self.register_buffer(name, value)

    def draw(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """Exact samples of x0: float64 ``shape`` (the first dimension is the batch)."""
        return self.mean + self.std * torch.randn(*shape, dtype=torch.float64, generator=generator)

    def posterior(self, path: Path, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """(E[x0 | x_t], E[eps | x_t]); both finite at both ends."""
        a, s, _, _ = path.coeffs(wide(t, x))
        mean, std = self.mean.to(x), self.std.to(x)
        centred = (x - a * mean) / (a * a * std * std + s * s)
        return mean + a * std * std * centred, s * centred

    def score(self, path: Path, x: Tensor, t: Tensor | float) -> Tensor:
        """d/dx log p_t(x) = -(x - a mean) / V."""
        a, s, _, _ = path.coeffs(wide(t, x))
        return -(x - a * self.mean.to(x)) / (a * a * self.std.to(x) ** 2 + s * s)

    def velocity(self, path: Path, x: Tensor, t: Tensor | float) -> Tensor:
        """dx_t/dt of the probability flow: a' mean + V'/(2V) (x - a mean)."""
        a, s, da, ds = path.coeffs(wide(t, x))
        mean, std = self.mean.to(x), self.std.to(x)
        return da * mean + (a * da * std**2 + s * ds) / (a * a * std**2 + s * s) * (x - a * mean)

    def flow_map(self, path: Path, x: Tensor, t: Tensor | float, r: Tensor | float) -> Tensor:
        """X(t -> r) = a_r mean + sqrt(V_r / V_t) (x - a_t mean)."""
        a, s, _, _ = path.coeffs(wide(t, x))
        a2, s2, _, _ = path.coeffs(wide(r, x))
        mean, std = self.mean.to(x), self.std.to(x)
        ratio = torch.sqrt((a2 * a2 * std**2 + s2 * s2) / (a * a * std**2 + s * s))
        return a2 * mean + ratio * (x - a * mean)

    def cdf(self, path: Path, x: Tensor, t: Tensor | float) -> Tensor:
        """F_t(x) of every dimension."""
        a, s, _, _ = path.coeffs(wide(t, x))
        std = torch.sqrt(a * a * self.std.to(x) ** 2 + s * s)
        return torch.special.ndtr((x - a * self.mean.to(x)) / std)


class Mixture(nn.Module):
    """x0 ~ sum_k weights_k N(means_k, stds_k^2) in every dimension, independently. K = len(means)."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    def __init__(
        self,
        means: Sequence[float] = (-1.0, 0.7),
        stds: Sequence[float] = (0.35, 0.2),
        weights: Sequence[float] = (0.4, 0.6),
    ):
        super().__init__()
        self.register_buffer("means", torch.tensor(means, dtype=torch.float64))
        self.register_buffer("stds", torch.tensor(stds, dtype=torch.float64))
        w = torch.tensor(weights, dtype=torch.float64)
        self.register_buffer("weights", w / w.sum())

    @property
    def mean(self) -> Tensor:
        """E[x0]."""
        return (self.weights * self.means).sum()

    @property
    def std(self) -> Tensor:
        """The standard deviation of x0."""
        return torch.sqrt((self.weights * (self.stds**2 + self.means**2)).sum() - self.mean**2)

    def draw(self, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """Exact samples of x0: float64 ``shape``."""
        count = math.prod(shape)
        k = torch.multinomial(self.weights, count, replacement=True, generator=generator).reshape(*shape)
        return self.means[k] + self.stds[k] * torch.randn(*shape, dtype=torch.float64, generator=generator)

    def _parts(self, path: Path, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        a, s, _, _ = (c[..., None] for c in path.coeffs(wide(t, x)))
        means, stds = self.means.to(x), self.stds.to(x)
        var = a * a * stds**2 + s * s
        centred = x[..., None] - a * means
        logp = torch.log(self.weights.to(x)) - 0.5 * torch.log(2 * math.pi * var) - 0.5 * centred**2 / var
        return a, s, var, centred, logp

    def posterior(self, path: Path, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """(E[x0 | x_t], E[eps | x_t]); both finite at both ends."""
        a, s, var, centred, logp = self._parts(path, x, t)
        resp = torch.softmax(logp, dim=-1)
        x0 = self.means.to(x) + a * self.stds.to(x) ** 2 / var * centred
        return (resp * x0).sum(-1), (resp * s / var * centred).sum(-1)

    def score(self, path: Path, x: Tensor, t: Tensor | float) -> Tensor:
        """d/dx log p_t(x)."""
        _, _, var, centred, logp = self._parts(path, x, t)
        return -(torch.softmax(logp, dim=-1) * centred / var).sum(-1)

    def velocity(self, path: Path, x: Tensor, t: Tensor | float) -> Tensor:
        """dx_t/dt = a' E[x0 | x_t] + s' E[eps | x_t]."""
        _, _, da, ds = path.coeffs(wide(t, x))
        x0, eps = self.posterior(path, x, t)
        return da * x0 + ds * eps

    def cdf(self, path: Path, x: Tensor, t: Tensor | float) -> Tensor:
        """F_t(x) of every dimension."""
        _, _, var, centred, _ = self._parts(path, x, t)
        return (self.weights.to(x) * torch.special.ndtr(centred / torch.sqrt(var))).sum(-1)

    def flow_map(self, path: Path, x: Tensor, t: Tensor | float, r: Tensor | float) -> Tensor:
        """X(t -> r) = F_r^-1(F_t(x)), by bisection and one differentiable Newton step (exact first derivatives)."""
        level = self.cdf(path, x, t)
        with torch.no_grad():
            a, s, _, _ = path.coeffs(wide(r, x.detach()))
            reach = 9 * torch.sqrt(a * a * self.stds.max().to(x) ** 2 + s * s)
            low, high = a * self.means.min().to(x) - reach, a * self.means.max().to(x) + reach
            low, high = low.expand_as(x), high.expand_as(x)
            for _ in range(60):
                mid = 0.5 * (low + high)
                below = self.cdf(path, mid, r) < level.detach()
                low, high = torch.where(below, mid, low), torch.where(below, high, mid)
            y = (0.5 * (low + high)).detach()
        density = torch.exp(self._parts(path, y, r)[-1]).sum(-1)
        return y - (self.cdf(path, y, r) - level) / density


def consistency(law: Any, path: Path, x: Tensor, t: Tensor | float) -> Tensor:
    """X(t -> 0), the point of data at the end of x's trajectory."""
    return law.flow_map(path, x, t, 0.0)


def mean_velocity(law: Any, path: Path, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """(x - X(t -> r)) / (t - r): MeanFlow's u, for r < t."""
    return (x - law.flow_map(path, x, t, r)) / (wide(t, x) - wide(r, x))


class Ideal(nn.Module):
    """The exact denoiser (the ``Denoiser`` protocol) of one law, or of one per class, the last being unconditional.

    Args:
        laws: One law, or a sequence of them read by ``cond["label"]`` [B].
        path, kind: Where and what it predicts.
        jump: Predict the pair whose ``ode`` step lands on X(t -> 0) even without r: a perfect consistency function.

    With ``r`` it is the perfect two-time network: the pair (x0, eps) whose ``ode`` step lands on X(t -> r).
    ``calls`` lists the batch size of every call. ``draws`` lists (t, r) of every call.
    """

    def __init__(self, laws: Any, path: Path, kind: Kind = "x0", *, jump: bool = False):
        super().__init__()
        self.laws = nn.ModuleList([laws] if isinstance(laws, nn.Module) else laws)
        self.path, self.jump = path, jump
        self.kind: Kind = kind
        self.calls: list[int] = []
        self.draws: list[tuple[Tensor, Tensor | None]] = []

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return []

    def null(self, cond: Any) -> dict[str, Tensor]:
        """The label of the last law."""
        return {k: torch.full_like(v, len(self.laws) - 1) for k, v in cond.items()}

    def pair(self, law: Any, x: Tensor, t: Tensor, r: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x0, eps) of one law at (x, t)."""
        if r is None and not self.jump:
            return law.posterior(self.path, x, t)
        r = torch.zeros_like(t) if r is None else r
        a, s, _, _ = self.path.coeffs(wide(t, x))
        a2, s2, _, _ = self.path.coeffs(wide(r, x))
        end, det = law.flow_map(self.path, x, t, r), a * s2 - s * a2
        still = (det == 0).expand_as(x)  # r = t: the limit is the instantaneous prediction
        det = torch.where(det == 0, torch.ones_like(det), det)
        x0, eps = law.posterior(self.path, x, t)
        return torch.where(still, x0, (s2 * x - s * end) / det), torch.where(still, eps, (a * end - a2 * x) / det)

    def forward(self, x_t: Tensor, t: Tensor, cond: Any, *, r: Tensor | None = None, taps: Sequence[int] = ()) -> Any:
        self.calls.append(len(x_t))
        self.draws.append((t.detach(), None if r is None else r.detach()))
        pairs = [self.pair(law, x_t, t.to(x_t), None if r is None else r.to(x_t)) for law in self.laws]
        if len(pairs) == 1:
            x0, eps = pairs[0]
        else:
            every = torch.arange(len(x_t), device=x_t.device)
            x0, eps = (torch.stack(both)[cond["label"], every] for both in zip(*pairs, strict=True))
        _, _, da, ds = self.path.coeffs(wide(t, x_t))
        a, s, _, _ = self.path.coeffs(wide(t, x_t))
        rows = {"x0": (1.0, 0.0), "eps": (0.0, 1.0), "v": (-s, a), "velocity": (da, ds)}
        c, d = rows[self.kind]
        out = c * x0 + d * eps
        return (out, [out.flatten(2).transpose(1, 2)] * len(taps)) if taps else out


def ks_distance(samples: Tensor, law: Any, path: Path) -> float:
    """Kolmogorov-Smirnov distance of all of ``samples`` (pooled dimensions of one law) to the law of x0."""
    x = samples.double().flatten().sort().values
    level, n = law.cdf(path, x, 0.0), len(x)
    grid = torch.arange(n, dtype=torch.float64) / n
    return float(torch.maximum((level - grid).abs(), (level - grid - 1 / n).abs()).max())
