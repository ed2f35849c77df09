"""Flow maps: improved MeanFlow, shortcut models and PSD, AlphaFlow, Align Your Flow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hasten.core.path import RECTIFIED_FLOW
from hasten.core.times import LogitNormal, Uniform
from hasten.methods.alphaflow import AlphaFlow
from hasten.methods.ayf import AYF
from hasten.methods.meanflow import MeanFlow
from hasten.methods.shortcut import Shortcut
from tests.oracle import wide
from tests.proofs.common import ONE, TWO, B, Book, Case, Cost, N, Run, World, mean, mean_u, rectified

D = 1e-5  # of differences


def mixed(w: World, t: Tensor) -> Tensor:
    """x_t on the rectified flow."""
    return wide(1 - t, w.batch.data) * w.batch.data + wide(t, w.batch.data) * w.batch.script[0]


def two(k: int) -> tuple[Tensor, Tensor]:
    """t and r of TWO, the first k with r = t."""
    both = torch.tensor(TWO.draws)
    t, r = rectified(both.amax(0)), rectified(both.amin(0))
    return t, torch.cat([t[:k], r[k:]])


def velocity(w: World, m: MeanFlow | Shortcut | AlphaFlow, x_t: Tensor, t: Tensor) -> Tensor:
    """The teacher's, or eps - x0."""
    return w.real.velocity(RECTIFIED_FLOW, x_t, t) if m.from_teacher else w.batch.script[0] - w.batch.data


def imf(w: World, m: MeanFlow) -> Tensor:
    """|u + (t - r) sg(du/dt) - v|^2, du/dt by differences along the student's own velocity."""
    k = round(m.same * N)
    t, r = two(k)
    x_t = mixed(w, t)
    own = mean_u(w, x_t, t, t)
    du = (mean_u(w, x_t + D * own, t + D, r) - mean_u(w, x_t - D * own, t - D, r)).detach() / (2 * D)
    compound = mean_u(w, x_t, t, r) + wide(t - r, x_t) * torch.cat([torch.zeros_like(du[:k]), du[k:]])
    error = ((compound - velocity(w, m, x_t, t)) ** 2).sum((1, 2, 3))
    return ((error.detach() + m.floor) ** -m.power * error).mean()


def shortcut(w: World, m: Shortcut) -> Tensor:
    """The point that two shorter hops reach, by hand; the finest of them are Euler steps."""
    torch.manual_seed(5)
    torch.randn(w.batch.shape)
    k = round(m.same * N)
    n = N - k
    finest = torch.zeros(n, dtype=torch.bool)
    if m.split == "dyadic":
        level = torch.randint(0, m.levels, (n,))
        parts = 2**level
        place = (torch.rand(n) * parts).floor() / parts
        t, s, r = (rectified(w.path.angle(w.path.at(place + share / parts))) for share in (1.0, 0.5, 0.0))
        finest = level + 1 == m.levels
        now = torch.tensor(ONE.draws[0])[:k]
        assert 0 < finest.sum() < n and (place == 0).any()
    else:
        now, others = torch.tensor(TWO.draws[0])[:k], torch.tensor(TWO.draws)[:, :n]
        t, r = rectified(others.amax(0)), rectified(others.amin(0))
        s = 0.5 * (t + r) if m.split == "middle" else r + torch.rand(n) * (t - r)
    now = rectified(now)
    x = mixed(w, torch.cat([now, t]))
    v = velocity(w, m, x, torch.cat([now, t]))[:k]
    near, far = x[:k], x[k:]
    with torch.no_grad():
        x_s = far - wide(t - s, far) * mean_u(w, far, t, torch.where(finest, t, s))
        x_r = x_s - wide(s - r, far) * mean_u(w, x_s, s, torch.where(finest, s, r))
    errors = [mean_u(w, near, now, now) - v, mean_u(w, far, t, r) - (far - x_r) / wide(t - r, far)]
    return (torch.cat(errors) ** 2).mean()


def alphaflow(alpha: float) -> Callable[[World, AlphaFlow], Tensor]:
    """Its equation at one place of the curriculum."""

    def want(w: World, m: AlphaFlow) -> Tensor:
        k = round(m.same * N)
        t, r = two(k)
        x_t = mixed(w, t)
        v = velocity(w, m, x_t, t)
        s = alpha * r + (1 - alpha) * t
        with torch.no_grad():
            if alpha:
                target = alpha * v + (1 - alpha) * mean_u(w, x_t - wide(t - s, v) * v, s, r)
            else:
                ends = [mean_u(w, x_t + e * v, t + e, r) for e in (D, -D)]
                target = v - wide(t - r, v) * (ends[0] - ends[1]) / (2 * D)
        target = torch.cat([v[:k], target[k:]])
        error = ((mean_u(w, x_t, t, r) - target) ** 2).mean((1, 2, 3))
        weight = torch.tensor([1.0] * k + [alpha or 1.0] * (N - k))
        return (weight * error / (error.detach() + m.floor) ** m.power).mean()

    return want


def ayf(rho: float) -> Callable[[World, AYF], Tensor]:
    """g = (1 - rho) (F - v) - rho dX/dt with X = x - (t - r) F, its derivative along the teacher by differences."""

    def want(w: World, m: AYF) -> Tensor:
        torch.manual_seed(5)
        torch.randn(w.batch.shape)
        gap, end = rectified(torch.tensor(ONE.draws[0])), rectified(w.path.angle(w.path.at(torch.tensor(1.0))))
        r = torch.rand(N) * (end - gap)
        t = r + gap
        x_t = mixed(w, t)
        v = w.real.velocity(RECTIFIED_FLOW, x_t, t)
        ends = [x_t + e * v - wide(gap + e, v) * mean_u(w, x_t + e * v, t + e, r) for e in (D, -D)]
        out = mean_u(w, x_t, t, r)
        g = ((1 - rho) * (out - v) - rho * (ends[0] - ends[1]) / (2 * D)).detach()
        step = g / (mean(g**2).sqrt() + m.tangent_c)
        return (step**2 + 2 * step * (out - out.detach())).mean()  # |F - sg(F - step)|^2 with gradient 2 step dF

    return want


CASES = {
    "imf": Case(lambda g: MeanFlow(TWO, cfg_scale=g, same=0.3, own_tangent=True, earlier=None), imf, "map"),
    "imf_plain": Case(
        lambda g: MeanFlow(TWO, cfg_scale=g, same=0.0, own_tangent=True, power=0.0, earlier=None), imf, "map"
    ),
    "imf_data": Case(
        lambda g: MeanFlow(TWO, False, same=0.5, own_tangent=True, power=0.75, earlier=None),
        imf, "map", zero=False, guide=False,
    ),
    "shortcut": Case(lambda g: Shortcut(levels=2, times=ONE, same=0.3, cfg_scale=g), shortcut, "map", zero=False),
    "shortcut_data": Case(
        lambda g: Shortcut(levels=3, times=ONE, same=0.3, from_teacher=False), shortcut, "map", zero=False, guide=False
    ),
    "psd": Case(lambda g: Shortcut("uniform", times=TWO, same=0.4, cfg_scale=g), shortcut, "map"),
    "psd_middle": Case(lambda g: Shortcut("middle", times=TWO, same=0.3, cfg_scale=g), shortcut, "map"),
    "psd_data": Case(
        lambda g: Shortcut("uniform", times=TWO, same=0.3, from_teacher=False),
        shortcut, "map", zero=False, guide=False,
    ),
    "alphaflow_begin": Case(
        lambda g: AlphaFlow(TWO, cfg_scale=g, same=0.3, earlier=None), alphaflow(1.0), "map", zero=False
    ),
    "alphaflow": Case(
        lambda g: AlphaFlow(TWO, cfg_scale=g, same=0.3, power=1.0, earlier=None),
        alphaflow(0.2689414213699951), "map", step=540, zero=False,
    ),
    "alphaflow_end": Case(
        lambda g: AlphaFlow(TWO, cfg_scale=g, same=0.3, earlier=None), alphaflow(0.0), "map", step=999
    ),
    "alphaflow_data": Case(
        lambda g: AlphaFlow(
            TWO, False, begin=0.2, end=0.8, same=0.5, sharpness=10.0, floor=0.1, iterations=100, earlier=None
        ),
        alphaflow(0.8411308951190849), "map", step=40, zero=False, guide=False,
    ),
    "ayf": Case(lambda g: AYF(ONE, g, warmup=0, ceiling=1.0), ayf(1.0), "map"),
    "ayf_warm": Case(lambda g: AYF(ONE, g, warmup=8), ayf(0.5), "map", step=3, zero=False),
    "ayf_late": Case(lambda g: AYF(ONE, g, warmup=8, tangent_c=0.3), ayf(0.99), "map", step=90, zero=False),
}  # fmt: skip

RUNS = {
    "imf": Run(MeanFlow(Uniform(), same=0.25, own_tangent=True, earlier=None), iterations=120, factor=2.0),
    "imf_data": Run(MeanFlow(Uniform(), False, same=0.5, own_tangent=True, earlier=None), iterations=160, factor=1.8),
    "shortcut": Run(Shortcut(same=0.5), iterations=200, factor=2.0),
    "shortcut_data": Run(Shortcut(same=0.5, from_teacher=False), iterations=200, factor=1.8),
    "psd": Run(Shortcut("uniform", same=0.5), iterations=200, factor=2.0),
    "psd_middle": Run(Shortcut("middle", same=0.5), iterations=200, factor=2.0),
    "alphaflow": Run(AlphaFlow(Uniform(), end=0.6, same=0.25, earlier=None), iterations=160, factor=2.0),
    "ayf": Run(AYF(LogitNormal(0.5, 1.0), warmup=20), iterations=150, factor=2.0),
}

BOOKS = {
    "imf": Book(MeanFlow(own_tangent=True), "student teacher", two_time=True),
    "imf_data": Book(MeanFlow(from_teacher=False, own_tangent=True), "student", two_time=True),
    "shortcut": Book(Shortcut(), "student teacher", two_time=True),
    "shortcut_data": Book(Shortcut(from_teacher=False), "student", two_time=True),
    "alphaflow": Book(AlphaFlow(), "student teacher", two_time=True, staged=True),
    "alphaflow_data": Book(AlphaFlow(from_teacher=False), "student", two_time=True, staged=True),
    "ayf": Book(AYF(), "student teacher", two_time=True),
}

COSTS: dict[str, Cost] = {
    "imf": (
        MeanFlow(same=0.5, own_tangent=True),
        "loss",
        {"student": [(B // 2, False), (B // 2, False), (B, True)], "teacher": [(B, False)]},
    ),
    "imf_data": (
        MeanFlow(from_teacher=False, same=0.5, own_tangent=True),
        "loss",
        {"student": [(B // 2, False), (B // 2, False), (B, True)]},
    ),
    "shortcut": (
        Shortcut(),
        "loss",
        {"student": [(B // 4, False), (B // 4, False), (B, True)], "teacher": [(3 * B // 4, False)]},
    ),
    "psd_guided": (
        Shortcut("uniform", same=0.5, cfg_scale=2.0),
        "loss",
        {"student": [(B // 2, False), (B // 2, False), (B, True)], "teacher": [(B, False)]},
    ),
    "alphaflow_begin": (AlphaFlow(), "loss", {"student": [(B, True)], "teacher": [(B, False)]}),
    "alphaflow_middle": (
        AlphaFlow(iterations=1, begin=0.0, end=1.0, sharpness=0.0),
        "loss",
        {"student": [(B // 2, False), (B, True)], "teacher": [(B, False)]},
    ),
    "ayf": (AYF(), "loss", {"student": [(B, True), (B, False)], "teacher": [(B, False)]}),
}
