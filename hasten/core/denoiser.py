"""What every method, sampler and speed-up sees of a model, and the few ways to call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hasten.core.path import Kind, Path, expand, solve2
from hasten.core.request import branch, guiding

Cond = Mapping[str, Tensor]  # e.g. {"label": [B]}, {"text": [B, L, D]}, {"field": [B, C, H, W]}


class Denoiser(Protocol):
    """``net(x_t, t, cond)`` with its ``path``, the ``kind`` of its prediction, and its repeated ``blocks``.

    ``x_t`` is [B, C, H, W] or [B, C, F, H, W], ``t`` [B] in the path's native time, ``r`` [B] the second,
    earlier time of a two-time network. The call returns a prediction of x_t's shape, or with ``taps``
    (indices of blocks) the pair (prediction, [image tokens [B, L, D] after each tapped block]).
    """

    path: Path
    kind: Kind

    @property
    def blocks(self) -> Sequence[nn.Module]: ...

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Cond, *, r: Tensor | None = None, taps: Sequence[int] = ()
    ) -> Any: ...


@dataclass(frozen=True)
class Batch:
    """One batch: ``x0`` [B, ...] in about [-1, 1] or None without data, conditions, and the samples' shape."""

    cond: Cond
    uncond: Cond
    shape: tuple[int, ...]  # [B, C, H, W]
    x0: Tensor | None = None
    device: torch.device = torch.device("cpu")
    pairs: Tensor | None = None  # [B, n + 1, ...]: a teacher's trajectory at n + 1 unit times, noise first
    at: tuple[float, ...] = ()  # those times; none are even ones

    @property
    def data(self) -> Tensor:
        """``x0``, for methods that declare that they need it."""
        assert self.x0 is not None, "a method read data that it did not declare with needs_data"
        return self.x0

    def noise(self) -> Tensor:
        """Fresh standard normal noise of the batch's shape; the loop has seeded torch for this micro-step."""
        return torch.randn(self.shape, device=self.device)


def dropped(batch: Batch, share: float) -> Cond:
    """The batch's conditions, a random ``share`` of the samples getting the unconditional one instead.

    A batch that has none, as of a model whose guidance is embedded, keeps its own.
    """
    if not share or not batch.cond or not batch.uncond:
        return batch.cond
    gone = torch.rand(batch.shape[0], device=batch.device) < share
    return {k: torch.where(gone.view(-1, *(1,) * (c.ndim - 1)), batch.uncond[k], c) for k, c in batch.cond.items()}


def per_sample(t: Tensor | float, x: Tensor) -> Tensor:
    """``t`` as a tensor [B] on x's device (float64 for float64 samples, else float32)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    t = torch.as_tensor(t, device=x.device).to(dtype)
    return t.expand(len(x)) if t.ndim == 0 else t


def predict(
    net: Denoiser,
    x_t: Tensor,
    t: Tensor | float,
    cond: Cond,
    kind: Kind = "x0",
    *,
    r: Tensor | float | None = None,
    taps: Sequence[int] = (),
) -> Any:
    """The network's prediction as ``kind`` [B, ...]; with ``taps`` the pair (prediction, features)."""
    t = per_sample(t, x_t)
    r = None if r is None else per_sample(r, x_t)
    out = net(x_t, t, cond, r=r, taps=taps) if taps else net(x_t, t, cond, r=r)
    pred, features = out if taps else (out, None)
    pred = net.path.convert(pred, x_t, t, net.kind, kind)
    return (pred, features) if taps else pred


def guided(
    net: Denoiser,
    x_t: Tensor,
    t: Tensor | float,
    cond: Cond,
    uncond: Cond,
    cfg_scale: float | None,
    kind: Kind = "x0",
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    two_calls: bool = False,
    r: Tensor | float | None = None,
) -> Tensor:
    """Classifier-free guidance u + w (c - u) (Ho & Salimans 2022, in the convention where w = 1 is unguided).

    Args:
        cfg_scale: w; None or 1 calls the conditional network alone.
        interval: Unit times [lo, hi] inside which guidance acts (Kynkaanniemi et al. 2024); outside, w = 1.
        two_calls: Two calls of B instead of one of 2B: half the peak memory.
    """
    t = per_sample(t, x_t)
    if cfg_scale is None or cfg_scale == 1:
        return predict(net, x_t, t, cond, kind, r=r)
    w = torch.full_like(t, cfg_scale)
    if interval != (0.0, 1.0):
        lo, hi = (net.path.at(u).to(t) for u in interval)
        w = torch.where((t >= lo) & (t <= hi), w, torch.ones_like(w))
        if bool((w == 1).all()):
            return predict(net, x_t, t, cond, kind, r=r)
    if two_calls:
        with guiding(cfg_scale, paired=False):
            c = predict(net, x_t, t, cond, kind, r=r)
            with branch("uncond"):
                u = predict(net, x_t, t, uncond, kind, r=r)
    else:
        twice = {k: torch.cat([cond[k], uncond[k]]) for k in cond}
        r2 = None if r is None else torch.cat([per_sample(r, x_t)] * 2)
        with guiding(cfg_scale, paired=True):
            c, u = predict(net, torch.cat([x_t, x_t]), torch.cat([t, t]), twice, kind, r=r2).chunk(2)
    return u + expand(w, u).to(u.dtype) * (c - u)  # affine in the prediction, so the same in every kind


def on_path(net: Any, path: Path, kind: Kind) -> Any:
    """``net`` as a denoiser of ``kind`` on ``path``: itself where it is one already, else :class:`OnPath`."""
    return (
        net
        if net.path.name == path.name and net.path.args == path.args and net.kind == kind
        else OnPath(net, path, kind)
    )


@lru_cache(maxsize=32)
def covered(path: Path, own: Path) -> Path:
    """``path`` ended where ``own`` ends; its unit times [0, 1] are stretched over what is left."""
    end = own.angle(torch.tensor(own.t_max, dtype=torch.float64))
    t_max = min(path.t_max, float(path.time(end)))
    if t_max == path.t_max:
        return path
    # The unit time at which the path must end, so that distinct unit times stay distinct (on EDM this is Karras'
    # spacing with the smaller sigma_max).
    low, high = 0.0, 1.0
    for _ in range(60):
        mid = 0.5 * (low + high)
        low, high = (mid, high) if float(path.at(torch.tensor(mid, dtype=torch.float64))) < t_max else (low, mid)
    return replace(path, t_max=t_max, from_unit=lambda u: path.at(u * high).clamp_max(t_max))


class OnPath(nn.Module):
    """A denoiser seen on another path: same signal-to-noise angle, one solve from its kind to the new one.

    Times (and the second time r) are mapped by the angle atan2(sigma, alpha); the new path ends where the
    network's own does, so that no time outside what it was trained on can be drawn.

    Args:
        net: The denoiser; its parameters are shared, not copied.
        path: The path on which it is to be seen.
        kind: What the view predicts.
    """

    def __init__(self, net: Any, path: Path, kind: Kind = "v"):
        super().__init__()
        self.net = net
        self.path = covered(path, net.path)
        self.kind: Kind = kind

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.net.blocks

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, *, r: Tensor | None = None, taps: Sequence[int] = ()) -> Any:
        own, new = self.net.path, self.path
        wide = t if t.dtype == torch.float64 else t.float()
        t_own = own.time(new.angle(wide))
        r_own = None if r is None else own.time(new.angle(r.to(wide)))
        alpha, sigma, _, _ = own.coeffs(t_own)
        alpha2, sigma2, _, _ = new.coeffs(wide)
        scale = torch.hypot(alpha, sigma) / torch.hypot(alpha2, sigma2)
        x_own = (expand(scale, x_t) * x_t.to(torch.promote_types(x_t.dtype, scale.dtype))).to(x_t.dtype)
        out = self.net(x_own, t_own, cond, r=r_own, taps=taps) if taps else self.net(x_own, t_own, cond, r=r_own)
        pred, features = out if taps else (out, None)
        c, d = own.row(t_own, self.net.kind)
        c2, d2 = new.row(wide, self.kind)
        # In x_t's own scale: the row of x_t is (alpha, sigma) = scale (alpha2, sigma2).
        p, q = solve2(alpha, sigma, c, d, c2, d2, f"{self.net.kind} to {self.kind} between paths")
        pred = expand(p, x_t) * pred.to(p.dtype) + expand(q * scale, x_t) * x_t.to(p.dtype)
        return (pred, features) if taps else pred
