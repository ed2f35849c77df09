"""Paths: x_t = alpha(t) x_0 + sigma(t) eps, and every prediction conversion from one 2x2 solve."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from hasten.core.errors import ConfigError, unknown

Kind = Literal["x0", "eps", "v", "velocity"]  # v = alpha eps - sigma x0; velocity = dx_t/dt
KINDS: tuple[str, ...] = get_args(Kind)
Coeffs = tuple[Tensor, Tensor, Tensor, Tensor]


def expand(t: Tensor, like: Tensor) -> Tensor:
    """View ``t`` ([], [B], or [B, F] per frame) so that it broadcasts against ``like`` [B, ...] or [B, C, F, ...]."""
    shape = t.shape if t.ndim < 2 else (t.shape[0], 1, *t.shape[1:])  # the channels come before the frames
    return t.reshape(*shape, *(1,) * (like.ndim - len(shape))) if t.ndim else t


@dataclass(frozen=True)
class Path:
    """The forward process x_t = alpha(t) x_0 + sigma(t) eps; t = 0 is data, t = t_max is noise.

    Args:
        name: Identifies the path in recipes and checkpoints.
        coeffs: Maps t (any shape, [0, t_max]) to (alpha, sigma, dalpha/dt, dsigma/dt) of t's shape.
        from_angle: Maps an angle atan2(sigma, alpha) in [0, pi/2] to t, not yet clamped.
        t_max: The noisiest time.
        from_unit: Maps u in [0, 1], the time that a person writes, to t. Linear unless given.
        args: What ``named_path`` needs to rebuild this path from a checkpoint.
    """

    name: str
    coeffs: Callable[[Tensor], Coeffs] = field(repr=False)
    from_angle: Callable[[Tensor], Tensor] = field(repr=False)
    t_max: float = 1.0
    from_unit: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    args: tuple[float, ...] = field(default=(), repr=False)

    def at(self, u: Tensor | float) -> Tensor:
        """Native time of the unit time ``u`` in [0, 1] (0 is data, 1 the noisiest)."""
        u = torch.as_tensor(u)
        return self.from_unit(u) if self.from_unit else u * self.t_max

    def angle(self, t: Tensor) -> Tensor:
        """atan2(sigma, alpha) in [0, pi/2], of t's shape."""
        alpha, sigma, _, _ = self.coeffs(t)
        return torch.atan2(sigma, alpha)

    def time(self, angle: Tensor) -> Tensor:
        """The native time of ``angle``, clamped to [0, t_max]; inverse of :meth:`angle`."""
        return self.from_angle(angle).clamp(0.0, self.t_max)

    def mix(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t [B, ...] of data and noise [B, ...] at t ([], [B], or [B, F] per frame)."""
        alpha, sigma, _, _ = self.coeffs(_wide(t))
        return expand(alpha, x0).to(x0.dtype) * x0 + expand(sigma, x0).to(x0.dtype) * eps

    def row(self, t: Tensor, kind: Kind | str) -> tuple[Tensor, Tensor]:
        """(c, d) such that a prediction of ``kind`` is c x0 + d eps. Raises ConfigError for an unknown kind."""
        return row_of(self.coeffs(_wide(t)), kind)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor, kind: Kind | str) -> Tensor:
        """What a network of ``kind`` should output at t: [B, ...]."""
        c, d = self.row(t, kind)
        return expand(c, x0).to(x0.dtype) * x0 + expand(d, x0).to(x0.dtype) * eps

    def convert(self, pred: Tensor, x_t: Tensor, t: Tensor, src: Kind | str, dst: Kind | str) -> Tensor:
        """``pred`` [B, ...] of kind ``src`` at (x_t, t) as kind ``dst``, without a detour through x0.

        Solves p [c d] + q [alpha sigma] = [c' d'] in float32 (float64 for float64 input) and returns
        p pred + q x_t in that precision.

        Raises:
            ConfigError: Where the answer does not exist: x0 to eps at sigma = 0, eps to x0 at alpha = 0.
        """
        if src == dst:
            return pred
        p, q = self.solve(t, src, dst)
        wide = torch.promote_types(pred.dtype, p.dtype)
        return expand(p, pred) * pred.to(wide) + expand(q, pred) * x_t.to(wide)

    def chord(self, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor, kind: Kind | str) -> Tensor:
        """The prediction of ``kind`` at (x_t, t) whose one ``ode`` step lands on x_s [B, ...] at s < t.

        It is the pair (x0, eps) that both points contain; on rectified flow its velocity is (x_t - x_s)/(t - s)
        (progressive distillation, Salimans & Ho 2022, appendix G, on any path).
        """
        alpha, sigma, _, _ = self.coeffs(_wide(t))
        alpha_s, sigma_s, _, _ = self.coeffs(_wide(s))
        p, q = solve2(alpha, sigma, alpha_s, sigma_s, *self.row(t, kind), f"two points to {kind} on {self.name!r}")
        return expand(p, x_s).to(x_s.dtype) * x_s + expand(q, x_t).to(x_t.dtype) * x_t

    def solve(self, t: Tensor, src: Kind | str, dst: Kind | str) -> tuple[Tensor, Tensor]:
        """The scalars (p, q) of :meth:`convert`, of t's shape."""
        alpha, sigma, _, _ = self.coeffs(_wide(t))
        (c, d), (c2, d2) = self.row(t, src), self.row(t, dst)
        return solve2(alpha, sigma, c, d, c2, d2, f"{src} to {dst} on the path {self.name!r}")


def row_of(coeffs: Coeffs, kind: Kind | str) -> tuple[Tensor, Tensor]:
    """:meth:`Path.row` where the path's coefficients are known already."""
    alpha, sigma, dalpha, dsigma = coeffs
    if kind == "x0":
        return torch.ones_like(alpha), torch.zeros_like(alpha)
    if kind == "eps":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if kind == "v":
        return -sigma, alpha
    if kind == "velocity":
        return dalpha, dsigma
    raise ConfigError(f"Unknown prediction kind {kind!r}; known: {', '.join(KINDS)}.")


def solve2(
    alpha: Tensor, sigma: Tensor, c: Tensor, d: Tensor, c2: Tensor, d2: Tensor, what: str
) -> tuple[Tensor, Tensor]:
    """(p, q) with p (c, d) + q (alpha, sigma) = (c2, d2); raises ConfigError where the system is singular."""
    det = alpha * d - sigma * c
    singular = det.abs() <= 1e-7 * torch.hypot(alpha, sigma) * torch.hypot(c, d)  # below one float32 rounding
    if not torch.compiler.is_compiling() and bool(singular.any()):
        raise ConfigError(
            f"Converting {what} is singular at this time: x_t does not contain the answer; "
            "keep t away from that end or use a network that predicts 'v' or 'velocity'."
        )
    return (alpha * d2 - sigma * c2) / det, (d * c2 - c * d2) / det


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


# --- the paths ------------------------------------------------------------------------------------------------


def _rf(t: Tensor) -> Coeffs:
    one = torch.ones_like(t)
    return 1 - t, t, -one, one


def _rf_from_angle(angle: Tensor) -> Tensor:
    s, c = torch.sin(angle), torch.cos(angle)
    return s / (s + c)


def rectified_flow(shift: float = 1.0) -> Path:
    """Rectified flow; unit times u map to t = s u / (1 + (s - 1) u) (Esser et al. 2024, eq. 23), so that even steps
    and time distributions lie where a model of high resolution wants them.

    Raises:
        ConfigError: For a shift that is not positive.
    """
    if shift == 1:
        return Path("rectified_flow", _rf, _rf_from_angle)
    if not 0 < shift < math.inf:
        raise ConfigError(f"A shift must be positive, not {shift}.")
    unit = lambda u: shift * u / (1 + (shift - 1) * u)  # noqa: E731
    return Path("rectified_flow", _rf, _rf_from_angle, from_unit=unit, args=(shift,))


RECTIFIED_FLOW = rectified_flow()


def _trig(t: Tensor) -> Coeffs:
    c, s = torch.cos(t), torch.sin(t)
    return c, s, -s, c


TRIG = Path("trig", _trig, lambda angle: angle, t_max=math.pi / 2)


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Path:
    """EDM (Karras et al. 2022): alpha = 1, sigma = t; unit times follow Karras' rho spacing (eq. 5), 0 maps to 0."""
    lo, hi = sigma_min ** (1 / rho), sigma_max ** (1 / rho)

    def unit(u: Tensor) -> Tensor:
        return torch.where(u > 0, (lo + u * (hi - lo)).pow(rho), torch.zeros_like(u))

    def coeffs(t: Tensor) -> Coeffs:
        return torch.ones_like(t), t, torch.zeros_like(t), torch.ones_like(t)

    def from_angle(angle: Tensor) -> Tensor:
        return torch.sin(angle) / torch.cos(angle).clamp_min(1e-30)  # float32's pi/2 has a negative tangent

    return Path("edm", coeffs, from_angle, sigma_max, unit, (sigma_min, sigma_max, rho))


EDM = edm()


def vp(beta_min: float = 0.1, beta_max: float = 20.0) -> Path:
    """Variance preserving with linear beta (Song et al. 2021, eq. 33): -log alpha = b0 t/2 + (b1 - b0) t^2/4."""
    slope = beta_max - beta_min

    def coeffs(t: Tensor) -> Coeffs:
        log_alpha = -0.25 * slope * t * t - 0.5 * beta_min * t
        alpha, dlog = torch.exp(log_alpha), -0.5 * (beta_min + slope * t)
        sigma = torch.sqrt(-torch.expm1(2 * log_alpha))
        # dsigma/dt ~ 1/sqrt(t) at t = 0: its value at t = 1e-5 keeps every conversion finite there.
        return alpha, sigma, alpha * dlog, -alpha * alpha * dlog / sigma.clamp_min(math.sqrt(beta_min * 1e-5))

    def from_angle(angle: Tensor) -> Tensor:
        small = -0.5 * torch.log1p(-torch.sin(angle).square().clamp_max(0.75))  # exact where cos rounds to 1
        nlog = torch.where(angle < 0.8, small, -torch.log(torch.cos(angle).clamp_min(1e-30)))  # a quadratic in t
        return 2 * nlog / (0.5 * beta_min + torch.sqrt(0.25 * beta_min**2 + slope * nlog))

    return Path("vp", coeffs, from_angle, args=(beta_min, beta_max))


VP = vp()


def _vp_cosine(offset: float = 0.008) -> Path:
    """Cosine schedule (Nichol & Dhariwal 2021, eq. 17), as an angle linear in t; ends before alpha = 0."""
    start = offset / (1 + offset) * math.pi / 2
    rate = math.pi / 2 - start
    norm = math.cos(start)

    def coeffs(t: Tensor) -> Coeffs:
        alpha = torch.cos(start + rate * t) / norm
        dalpha = -rate * torch.sin(start + rate * t) / norm
        # 1 - alpha^2 without cancellation: sin(a+b) sin(a-b) form of cos^2 start - cos^2 angle
        sigma = torch.sqrt(torch.sin(2 * start + rate * t) * torch.sin(rate * t)) / norm
        floor = math.sqrt(math.sin(2 * start + rate * 1e-5) * math.sin(rate * 1e-5)) / norm
        return alpha, sigma, dalpha, -alpha * dalpha / sigma.clamp_min(floor)

    def from_angle(angle: Tensor) -> Tensor:
        # acos(norm cos angle), with the sine from cos^2 + sin^2 = 1 so that small angles keep their digits
        c, s = torch.cos(angle) * norm, torch.sin(angle)
        return (torch.atan2(torch.sqrt(s * s + (torch.cos(angle) * math.sin(start)) ** 2), c) - start) / rate

    return Path("vp_cosine", coeffs, from_angle, t_max=0.995)


VP_COSINE = _vp_cosine()


def ddpm(alphas_cumprod: Sequence[float] | Tensor, name: str = "ddpm") -> Path:
    """A DDPM table as a continuous path: entry i sits at t = (i + 1)/T, log(sigma/alpha) is C1 between entries.

    Below the first entry, sigma/alpha falls smoothly to 0 at t = 0 (a cubic with the joint's value and slope).

    Args:
        alphas_cumprod: The table's T values of alpha^2, strictly falling, each in (0, 1).
    """
    bar = torch.as_tensor(alphas_cumprod, dtype=torch.float64).cpu()
    if bar.ndim != 1 or len(bar) < 3 or not bool((bar > 0).all() and (bar < 1).all() and (bar.diff() < 0).all()):
        raise ConfigError("alphas_cumprod must be at least 3 strictly falling values inside (0, 1).")
    count = len(bar)
    knots = 0.5 * torch.log((1 - bar) / bar)  # log(sigma / alpha), rising
    rise = knots.diff()
    slopes = torch.empty_like(knots)  # per unit of table index, centred: Catmull-Rom, C1
    slopes[1:-1] = (rise[1:] + rise[:-1]) / 2
    slopes[0], slopes[-1] = rise[0].clamp_max(3.0), rise[-1]  # above 4 the cubic below the first entry would turn back
    slopes[1:-1] = torch.minimum(slopes[1:-1], 2 * torch.minimum(rise[1:], rise[:-1]))  # strictly rising
    first = torch.exp(knots[0])  # sigma/alpha and its slope in t*T at the first entry
    first_slope = first * slopes[0]

    def ratio(t: Tensor) -> tuple[Tensor, Tensor]:
        """log(sigma/alpha) and its derivative in t, for t above the first entry; in t's precision."""
        where = t * count - 1
        i = where.detach().floor().clamp(0, count - 2).long()
        f = where - i
        k, m = knots.to(t), slopes.to(t)
        k0, k1, m0, m1 = k[i], k[i + 1], m[i], m[i + 1]
        a, b = 2 * (k0 - k1) + m0 + m1, 3 * (k1 - k0) - 2 * m0 - m1
        return ((a * f + b) * f + m0) * f + k0, ((3 * a * f + 2 * b) * f + m0) * count

    def coeffs(t: Tensor) -> Coeffs:
        lam, dlam = ratio(t.clamp_min(1 / count))
        rho, drho = torch.exp(lam), torch.exp(lam) * dlam
        s = t * count  # below the first entry: the cubic with rho(0) = 0, rho'(0) = rho(1) = r, rho'(1) = g
        r, g = first.to(t), first_slope.to(t)
        a, b = g - r, r - g
        low = ((a * s + b) * s + r) * s
        dlow = ((3 * a * s + 2 * b) * s + r) * count
        inside = t * count < 1
        rho, drho = torch.where(inside, low, rho), torch.where(inside, dlow, drho)
        alpha = torch.rsqrt(1 + rho * rho)
        return alpha, rho * alpha, -rho * drho * alpha**3, drho * alpha**3

    grid_t = torch.linspace(0, 1, max(16 * count, 4096) + 1, dtype=torch.float64)
    alpha_g, sigma_g, _, _ = coeffs(grid_t)
    grid_angle = torch.atan2(sigma_g, alpha_g)

    def from_angle(angle: Tensor) -> Tensor:
        g, t = grid_angle.to(angle.device), grid_t.to(angle.device)
        wide = angle.double()
        i = torch.searchsorted(g, wide.contiguous()).clamp(1, len(g) - 1)
        w = (wide - g[i - 1]) / (g[i] - g[i - 1])
        guess = t[i - 1] + w.clamp(0, 1) * (t[i] - t[i - 1])
        for _ in range(3):  # Newton on the angle; d angle/dt = (alpha sigma' - sigma alpha')/(alpha^2 + sigma^2)
            a, s, da, ds = coeffs(guess)
            guess = (guess - (torch.atan2(s, a) - wide) / (a * ds - s * da)).clamp(0, 1)
        return guess.to(angle.dtype)

    return Path(name, coeffs, from_angle, args=tuple(bar.tolist()))


_NAMED: dict[str, Callable[..., Path]] = {
    "rectified_flow": lambda *shift: rectified_flow(*shift) if shift else RECTIFIED_FLOW,
    "trig": lambda: TRIG,
    "edm": edm,
    "vp": vp,
    "vp_cosine": lambda: VP_COSINE,
    "ddpm": lambda *bar: ddpm(bar),
}


def named_path(name: str, args: Sequence[float] = ()) -> Path:
    """The path that a recipe or a checkpoint names. Raises ConfigError for an unknown name."""
    if name not in _NAMED:
        raise unknown("path", name, _NAMED)
    return _NAMED[name](*args)
