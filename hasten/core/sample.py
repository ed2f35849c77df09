"""Samplers: a loop over times and a step rule. A rule is a function of one hop from t to the earlier s."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hasten.core.denoiser import Cond, Denoiser, guided, per_sample
from hasten.core.errors import ConfigError, unknown
from hasten.core.method import Sampling
from hasten.core.path import Coeffs, Path, expand, row_of, solve2
from hasten.core.request import request


@dataclass
class Hop:
    """One step as a rule sees it: ``look(x, t)`` calls the network and returns its own prediction.

    ``here`` and ``there`` are the path's (alpha, sigma, alpha', sigma') at t and at s.
    """

    path: Path
    kind: Any
    look: Callable[[Tensor, Tensor], Tensor]
    noise: Callable[[], Tensor]
    x: Tensor
    t: Tensor
    s: Tensor
    here: Coeffs
    there: Coeffs
    past: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (log(alpha/sigma), x0) of earlier steps

    @classmethod
    def between(cls, path: Path, kind: Any, look: Any, noise: Any, x: Tensor, t: Tensor, s: Tensor) -> Hop:
        """The hop from t to s, each [] or [B]."""
        return cls(path, kind, look, noise, x, t, s, path.coeffs(t), path.coeffs(s))

    def to(self, pred: Tensor, x: Tensor, at: Coeffs, alpha: Tensor, sigma: Tensor) -> Tensor:
        """alpha x0 + sigma eps of the pair (x0, eps) that ``pred`` at (x, coefficients at) stands for: one solve."""
        p, q = solve2(at[0], at[1], *row_of(at, self.kind), alpha, sigma, f"{self.kind} at the sampler's time")
        return expand(p, x).to(x.dtype) * pred.to(x.dtype) + expand(q, x).to(x.dtype) * x


def ode(hop: Hop) -> Tensor:
    """x_s = alpha_s x0 + sigma_s eps: DDIM (Song et al. 2021) on any path, Euler on rectified flow. Order 1."""
    return hop.to(hop.look(hop.x, hop.t), hop.x, hop.here, hop.there[0], hop.there[1])


def heun(hop: Hop) -> Tensor:
    """The trapezoidal rule on dx/dt, one ``ode`` step into sigma = 0 (Karras et al. 2022, algorithm 1). Order 2."""
    pred = hop.look(hop.x, hop.t)
    alpha, sigma, dalpha, dsigma = hop.there
    x_s = hop.to(pred, hop.x, hop.here, alpha, sigma)
    if bool((sigma == 0).all()):
        return x_s
    here = hop.to(pred, hop.x, hop.here, hop.here[2], hop.here[3])
    there = hop.to(hop.look(x_s, hop.s), x_s, hop.there, dalpha, dsigma)
    return hop.x + expand(hop.s - hop.t, hop.x).to(hop.x.dtype) * 0.5 * (here + there)


def dpmpp_2m(hop: Hop) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): x0 extrapolated linearly in log(alpha/sigma). Order 2."""
    (alpha, sigma, _, _), (alpha_s, sigma_s, _, _) = hop.here, hop.there
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    x0 = best = hop.to(hop.look(hop.x, hop.t), hop.x, hop.here, one, zero)
    lam = torch.log((alpha / sigma).clamp_min(0))  # float32's cos(pi/2) is negative
    if hop.past and bool((sigma_s > 0).all()):
        lam_l, x0_last = hop.past[-1]
        half = 0.5 * (torch.log(alpha_s / sigma_s) - lam) / (lam - lam_l)  # 1/(2r); 0 after a step from alpha = 0
        best = torch.lerp(x0, x0_last, -expand(half, x0).to(x0))
    hop.past.append((lam, x0))
    ratio = sigma_s / sigma
    return expand(ratio, hop.x).to(hop.x.dtype) * hop.x + expand(alpha_s - alpha * ratio, best).to(best.dtype) * best


def ancestral(hop: Hop) -> Tensor:
    """DDPM's posterior step (Ho et al. 2020; DDIM with eta = 1, Song et al. 2021, eq. 16) on any path: stochastic."""
    (alpha, sigma, _, _), (alpha_s, sigma_s, _, _) = hop.here, hop.there
    keep = (alpha * sigma_s / (alpha_s * sigma)) ** 2
    fresh = sigma_s * torch.sqrt((1 - keep).clamp_min(0))
    mean = hop.to(hop.look(hop.x, hop.t), hop.x, hop.here, alpha_s, sigma_s * torch.sqrt(keep))
    return mean + expand(fresh, mean).to(mean.dtype) * hop.noise()


def renoise(hop: Hop) -> Tensor:
    """x_s = alpha_s x0 + sigma_s z with fresh z: multistep consistency sampling (Song et al. 2023, algorithm 1)."""
    one = torch.ones_like(hop.here[0])
    x0 = hop.to(hop.look(hop.x, hop.t), hop.x, hop.here, one, torch.zeros_like(one))
    alpha, sigma, _, _ = hop.there
    if bool((sigma == 0).all()):
        return x0
    return expand(alpha, x0).to(x0.dtype) * x0 + expand(sigma, x0).to(x0.dtype) * hop.noise()


RULES: dict[str, Callable[[Hop], Tensor]] = {
    "ode": ode,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "ancestral": ancestral,
    "renoise": renoise,
}


@torch.no_grad()
def sample(
    net: Denoiser,
    noise: Tensor,
    cond: Cond,
    sampling: Sampling,
    *,
    uncond: Cond | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    two_calls: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """x0 [B, ...] from standard normal ``noise`` [B, ...], by ``sampling``'s times and rule.

    Args:
        uncond: The unconditional condition; needed for a guidance scale other than 1.
        generator: Draws the noise of stochastic rules.

    Raises:
        ConfigError: For an unknown rule, times that do not fall, or guidance without ``uncond``.
    """
    if sampling.rule not in RULES:
        raise unknown("step rule", sampling.rule, RULES)
    unit = sampling.times
    if len(unit) < 2 or any(a <= b for a, b in zip(unit, unit[1:], strict=False)) or not 0 <= unit[-1] < unit[0] <= 1:
        raise ConfigError(f"Sampling times must fall from at most 1 to at least 0, not {unit}.")
    if sampling.cfg_scale != 1 and uncond is None:
        raise ConfigError(f"Guidance of {sampling.cfg_scale} needs an unconditional condition; give uncond or scale 1.")
    rule, path = RULES[sampling.rule], net.path
    dtype = torch.float64 if noise.dtype == torch.float64 else torch.float32
    times = path.at(torch.tensor(unit, dtype=dtype))  # on the CPU: scalars of a device would be kernels, and waits
    marks = list(zip(*(c.unbind() for c in path.coeffs(times)), strict=True))

    def fresh() -> Tensor:
        return torch.randn(noise.shape, generator=generator, device=noise.device, dtype=noise.dtype)

    x = noise * marks[0][1].to(noise.dtype)
    past: list[tuple[Tensor, Tensor]] = []
    with request(len(unit) - 1) as mine:
        mine.guidance = {"cfg_scale": sampling.cfg_scale}
        if sampling.cfg_scale != 1 and tuple(interval) != (0.0, 1.0):
            mine.guidance["interval"] = tuple(interval)
        for t, s, here, there in zip(times[:-1], times[1:], marks[:-1], marks[1:], strict=True):
            r = s if sampling.two_time else None

            def look(x: Tensor, t: Tensor, r: Tensor | None = r) -> Tensor:
                return guided(
                    net, x, t, cond, uncond or {}, sampling.cfg_scale, net.kind,
                    interval=interval, two_calls=two_calls, r=r,
                )  # fmt: skip

            x = rule(Hop(path, net.kind, look, fresh, x, t, s, here, there, past))
    return x


def nfe(sampling: Sampling) -> int:
    """Network evaluations per sample: steps, doubled by guidance; heun's last step costs one call."""
    steps = len(sampling.times) - 1
    calls = 2 * steps - (sampling.times[-1] == 0) if sampling.rule == "heun" else steps
    return calls * (2 if sampling.cfg_scale != 1 else 1)


def step_once(net: Denoiser, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond, r: Any = None) -> Tensor:
    """One ``ode`` step of each sample from its t [B] to its s [B], with the network's graph."""
    t, s = per_sample(t, x), per_sample(s, x)
    look = lambda x, t: guided(net, x, t, cond, {}, None, net.kind, r=r)  # noqa: E731
    return ode(Hop.between(net.path, net.kind, look, lambda: x, x, t, s))
