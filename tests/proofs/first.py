"""The nine methods of the main job: their equations, worked out from the laws alone."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.core.path import RECTIFIED_FLOW, TRIG
from hasten.core.times import Uniform
from hasten.methods.cm import CM
from hasten.methods.dmd2 import DMD2
from hasten.methods.flow import Flow
from hasten.methods.flowmap import FlowMap
from hasten.methods.kd import KD
from hasten.methods.meanflow import MeanFlow
from hasten.methods.progressive import Progressive
from hasten.methods.scm import SCM
from hasten.methods.sid import SiD
from tests.oracle import wide
from tests.proofs.common import (
    ONE,
    TWO,
    B,
    Book,
    Case,
    Cost,
    N,
    Run,
    World,
    gap,
    mean,
    mean_u,
    native,
    one_step,
    rectified,
)  # fmt: skip


def flow(w: World, m: Flow) -> Tensor:
    (eps,), x0, t = w.batch.script, w.batch.data, w.path.time(torch.tensor(ONE.draws[0]))
    a, s, da, ds = w.coeffs(t)
    c, d = {"velocity": (da, ds), "eps": (0.0, 1.0), "x0": (1.0, 0.0)}[w.nets["student"].kind]
    hat, noise = w.nets["student"].pairs(a * x0 + s * eps, t, w.batch.cond)
    return ((c * hat + d * noise - (c * x0 + d * eps)) ** 2).mean()


def dmd2(w: World, m: DMD2) -> Tensor:
    x, x_t, t = one_step(w)
    real = w.real.posterior(w.path, x_t, t)[0]
    return (x * (gap(w, x_t, t) / mean((x - real).abs())).detach()).mean()


def dmd2_gan(w: World, m: DMD2) -> Tensor:
    x, x_t, t = one_step(w)
    logit = w.fake.posterior(w.path, x_t, t)[0].flatten(1) @ w.nets["disc"].w
    return dmd2(w, m) + 0.7 * torch.log1p(torch.exp(-logit)).mean()


def sid(w: World, m: SiD) -> Tensor:
    x, x_t, t = one_step(w)
    real, difference = w.real.posterior(w.path, x_t, t)[0], -gap(w, x_t, t)
    return (difference * ((real - x) - m.alpha * difference) / mean((x - real).abs()).detach()).mean()


def scm(w: World, m: SCM) -> Tensor:
    """f = f* + sin t h and df*/dt = 0 along the teacher, so g = cos t d(sin t h)/dt; F = F* - h."""
    t, x0, eps = torch.tensor(ONE.draws[0]), w.batch.data, w.batch.script[0]
    c, s = torch.cos(wide(t, x0)), torch.sin(wide(t, x0))
    x_t = c * x0 + s * eps
    head, none = w.nets["student"].head, torch.zeros(N, 1, 1, 1)
    d = 1e-5
    if m.from_teacher:
        dx = w.real.velocity(TRIG, x_t, t)
        h = [
            torch.sin(wide(t + e, x0)) * head(w.real.flow_map(TRIG, x_t, t, t + e), wide(t + e, x0), none)
            for e in (d, -d)
        ]
        slope = (h[0] - h[1]) / (2 * d)
    else:
        dx = c * eps - s * x0
        f = [w.real.flow_map(TRIG, x_t + e * dx, t + e, 0.0)
             + torch.sin(wide(t + e, x0)) * head(x_t + e * dx, wide(t + e, x0), none) for e in (d, -d)]  # fmt: skip
        slope = (f[0] - f[1]) / (2 * d)
    rho = 0.5 if m.warmup else 1.0
    hat, noise = w.nets["student"].pairs(*native(w, x_t, t), w.batch.cond)
    out = c * noise - s * hat
    stable = -(c**2) * (out - dx)
    g = (stable + rho * (c * slope - stable)).detach()
    step = g / (mean(g**2).sqrt() + m.tangent_c)
    place = w.nets["logvar"](t / (torch.pi / 2))
    error = mean(step**2)[:, 0, 0, 0]  # |F - sg(F + step)|^2 with gradient -2 step dF
    pull = mean(-2 * step * (out - out.detach()))[:, 0, 0, 0]
    return (torch.exp(-place) * (error + pull) + place).mean()


def cm(w: World, m: CM) -> Tensor:
    (eps,), x0, t = w.batch.script, w.batch.data, w.path.time(torch.tensor(ONE.draws[0]))
    a, s, _, _ = w.coeffs(t)
    ratio = torch.tan(torch.tensor(ONE.draws[0]))
    closer = {1000: 0.5**3, 5000: 0.5, 100: 0.5**4}[m.double_every]  # q^-(s+1) at step 2500, s at most 3
    later = (ratio * (1 - closer * (1 + 8 / (1 + torch.exp(ratio))))).clamp_min(0)
    r = w.path.time(torch.atan(later))
    a_r, s_r, _, _ = w.coeffs(r)
    x_t, x_r = a * x0 + s * eps, a_r * x0 + s_r * eps
    if m.from_teacher:
        hat, noise = w.real.posterior(w.path, x_t, t)
        x_r = a_r * hat + s_r * noise
    net = w.nets["student"]
    target = torch.where(wide(later, x0) > 0, net.pairs(x_r, r, w.batch.cond)[0], x_r).detach()
    square = ((net.pairs(x_t, t, w.batch.cond)[0] - target) ** 2).sum((1, 2, 3))
    c = m.huber * 6**0.5
    assert bool((later == 0).any()) == (closer == 0.5) and bool((later > 0).any())
    return ((torch.sqrt(square + c**2) - c) / (ratio - later)).mean()


def meanflow(w: World, m: MeanFlow) -> Tensor:
    """Target u = v - (t - r) du/dt with r held, the derivative by differences; the first ``same`` have r = t."""
    x0, eps, both = w.batch.data, w.batch.script[0], torch.tensor(TWO.draws)
    t, r = rectified(both.amax(0)), rectified(both.amin(0))
    k, d = round(m.same * N), 1e-5
    r = torch.cat([t[:k], r[k:]])
    x_t = wide(1 - t, x0) * x0 + wide(t, x0) * eps
    v = w.real.velocity(RECTIFIED_FLOW, x_t, t) if m.from_teacher else eps - x0
    du = (mean_u(w, x_t + d * v, t + d, r) - mean_u(w, x_t - d * v, t - d, r)) / (2 * d)
    du[:k] = 0
    error = ((mean_u(w, x_t, t, r) - (v - wide(t - r, x0) * du).detach()) ** 2).sum((1, 2, 3))
    return ((error.detach() + m.floor) ** -m.power * error).mean()


def flowmap(w: World, m: FlowMap) -> Tensor:
    """|d_r X - sg(v(X, r))|^2 with X = x_t + (r - t) u; the derivative in r by differences, with its graph."""
    x0, eps, both = w.batch.data, w.batch.script[0], torch.tensor(TWO.draws)
    t, r = rectified(both.amax(0)), rectified(both.amin(0))
    k, same, d = round(m.ends * N), 0 if m.from_teacher else round(m.same * N), 1e-5
    t[:k], r[: k // 2] = rectified(w.path.angle(w.path.at(torch.tensor(1.0)))), 1e-3
    r[N - same :] = t[N - same :]
    x_t = wide(1 - t, x0) * x0 + wide(t, x0) * eps

    def end(r: Tensor) -> Tensor:
        return x_t + wide(r - t, x0) * mean_u(w, x_t, t, r)

    with torch.no_grad():
        v = w.real.velocity(RECTIFIED_FLOW, end(r), r) if m.from_teacher else mean_u(w, end(r), r, r)
        v[N - same :] = (eps - x0)[N - same :]
    slope = (end(r + d) - end(r - d)) / (2 * d)
    slope = torch.cat([slope[: N - same], mean_u(w, x_t, t, t)[N - same :]])  # at r = t, d_r X is u itself
    error = ((slope - v) ** 2).sum((1, 2, 3))
    return ((error.detach() + m.floor) ** -m.power * error).mean()


def progressive(w: World, m: Progressive) -> Tensor:
    """Two DDIM steps by hand, then x~ = (z'' - (s''/s) z) / (a'' - (s''/s) a) (Salimans & Ho 2022, appendix G)."""
    torch.manual_seed(5)
    i = torch.randint(1, m.steps + 1, (N,))
    x0, eps = w.batch.data, w.batch.script[0]
    t, mid, end = (w.path.at((i - back) / m.steps) for back in (0.0, 0.5, 1.0))
    a, s, _, _ = w.coeffs(t)
    z = x_t = a * x0 + s * eps
    for here, there in ((t, mid), (mid, end)):
        hat, noise = w.real.posterior(w.path, z, here)
        z = w.coeffs(there)[0] * hat + w.coeffs(there)[1] * noise
    a2, s2, _, _ = w.coeffs(end)
    target = (z - s2 / s * x_t) / (a2 - s2 / s * a)
    weight = torch.maximum(a**2 / s**2, torch.ones_like(a))
    return (weight * (w.nets["student"].pairs(x_t, t, w.batch.cond)[0] - target) ** 2).mean()


def kd(w: World, m: KD) -> Tensor:
    """DDIM with 3 substeps a hop by hand from the batch's first noise, then the chord of a random hop."""
    times = [w.path.at(torch.full((N,), 1 - i / 6)) for i in range(7)]
    points = [w.batch.script[0] * w.coeffs(times[0])[1]]
    for here, there in zip(times, times[1:], strict=False):
        hat, noise = w.real.posterior(w.path, points[-1], here)
        points.append(w.coeffs(there)[0] * hat + w.coeffs(there)[1] * noise)
    torch.manual_seed(5)
    torch.randn(w.batch.shape)
    hop = torch.randint(0, 2, (N,))
    loss = torch.zeros(())
    for n, i in enumerate(hop.tolist()):
        t, end = times[3 * i], times[3 * i + 3]
        (a, s, _, _), (a2, s2, _, _) = w.coeffs(t), w.coeffs(end)
        z, z2 = points[3 * i], points[3 * i + 3]
        target = (z2 - s2 / s * z) / (a2 - s2 / s * a)
        loss = loss + ((w.nets["student"].pairs(z, t, w.batch.cond)[0] - target) ** 2)[n].mean() / N
    assert len(set(hop.tolist())) == 2
    return loss


CASES = {
    "flow": Case(lambda g: Flow(ONE, 0.0), flow, "posterior", zero=False, guide=False),
    "dmd2": Case(lambda g: DMD2(times=ONE, cfg_scale=g, gan_weight=0), dmd2, loss="student", data=False, still=True),
    "dmd2_gan": Case(lambda g: DMD2(times=ONE, cfg_scale=g, gan_weight=0.7), dmd2_gan, loss="student", zero=False),
    "sid": Case(lambda g: SiD(times=ONE, cfg_scale=g), sid, loss="student", data=False, still=True),
    "sida": Case(lambda g: SiD(times=ONE, cfg_scale=g, alpha=1.0), sid, loss="student", data=False, still=True),
    "scm": Case(lambda g: SCM(ONE, cfg_scale=g, warmup=0), scm),
    "scm_warm": Case(lambda g: SCM(ONE, cfg_scale=g, warmup=8), scm, step=3, zero=False),
    "sct": Case(lambda g: SCM(ONE, from_teacher=False, warmup=0), scm, zero=False, guide=False),
    "cd": Case(lambda g: CM(ONE, True, g, double_every=1000, huber=0.1), cm, step=2500, zero=False),
    "cd_start": Case(lambda g: CM(ONE, True, g, double_every=5000, huber=0.1), cm, step=2500, zero=False),
    "ct": Case(lambda g: CM(ONE, double_every=1000, huber=0.1), cm, step=2500, zero=False, guide=False),
    "ct_end": Case(lambda g: CM(ONE, double_every=100, doublings=3), cm, step=2500, zero=False, guide=False),
    "meanflow": Case(lambda g: MeanFlow(TWO, cfg_scale=g, same=0.3, earlier=None), meanflow, "map"),
    "meanflow_p": Case(
        lambda g: MeanFlow(TWO, cfg_scale=g, same=0.0, power=0.75, floor=0.1, earlier=None), meanflow, "map"
    ),
    "meanflow_data": Case(
        lambda g: MeanFlow(TWO, False, same=0.3, power=1.0, earlier=None), meanflow, "map", zero=False, guide=False
    ),
    "flowmap": Case(lambda g: FlowMap(TWO, cfg_scale=g, ends=0.6), flowmap, "map"),
    "flowmap_data": Case(lambda g: FlowMap(TWO, from_teacher=False, ends=0.3), flowmap, "map", zero=False, guide=False),
    "progressive": Case(lambda g: Progressive(8, 1, g, steps=4), progressive, "posterior", zero=False),
    "kd": Case(lambda g: KD(2, 3, g), kd, "posterior", zero=False, data=False),
}  # fmt: skip

RUNS = {
    "flow": Run(Flow(Uniform()), wrong=True, steps=100, iterations=150, mixture=1.5),
    "dmd2": Run(DMD2(gan_weight=0, student_every=2), iterations=400, law=True, mixture=1.8),
    "sid": Run(SiD(), iterations=400, lr=0.02, law=True, factor=2.2),
    "scm": Run(SCM(warmup=20), iterations=100),
    "sct": Run(SCM(from_teacher=False, warmup=20), iterations=120),
    "ct": Run(CM(double_every=40, doublings=5)),
    "cd": Run(CM(from_teacher=True, double_every=40, doublings=5)),
    "meanflow": Run(MeanFlow(Uniform(), same=0.25, earlier=None), iterations=120, factor=2.0),
    "meanflow_data": Run(MeanFlow(Uniform(), False, same=0.5, earlier=None), iterations=160, factor=1.8),
    "flowmap": Run(FlowMap(power=0.0), iterations=100),
    "flowmap_data": Run(FlowMap(from_teacher=False, jvp_mode="central"), iterations=200, factor=1.6),
    "progressive": Run(Progressive(16, 1), iterations=300, factor=2.5),
    "kd": Run(KD(1, 10), iterations=150),
}

BOOKS = {
    "flow": Book(Flow(), "student"),
    "dmd2": Book(DMD2(), "disc fake student teacher", (("fake disc", 1), ("student", 5)), False, "renoise"),
    "dmd2_plain": Book(DMD2(gan_weight=0), "fake student teacher", (("fake", 1), ("student", 5)), False, "renoise"),
    "sid": Book(SiD(), "fake student teacher", (("fake", 1), ("student", 2)), False, "renoise"),
    "scm": Book(SCM(), "logvar student teacher", (("student logvar", 1),), rule="renoise"),
    "ct": Book(CM(), "student", rule="renoise"),
    "cd": Book(CM(from_teacher=True), "student teacher", rule="renoise"),
    "meanflow": Book(MeanFlow(), "student teacher", two_time=True),
    "flowmap": Book(FlowMap(), "student teacher", two_time=True),
    "progressive": Book(Progressive(), "student teacher", staged=True),
    "kd": Book(KD(), "student teacher", needs_data=False),
}

COSTS: dict[str, Cost] = {
    "flow": (Flow(), "loss", {"student": [(B, True)]}),
    "dmd2_student": (
        DMD2(gan_weight=0),
        "student",
        {"student": [(B, True)], "teacher": [(B, False)], "fake": [(B, False)]},
    ),
    "dmd2_guided": (
        DMD2(gan_weight=0, cfg_scale=2.0),
        "student",
        {"student": [(B, True)], "teacher": [(2 * B, False)], "fake": [(B, False)]},
    ),
    "dmd2_student_gan": (
        DMD2(gan_weight=1.0),
        "student",
        {"student": [(B, True)], "teacher": [(B, False)], "fake": [(B, True)]},
    ),
    "dmd2_critic": (DMD2(gan_weight=0), "critic", {"student": [(B, False)], "fake": [(B, True)]}),
    "dmd2_critic_gan": (DMD2(gan_weight=1.0), "critic", {"student": [(B, False)], "fake": [(2 * B, True)]}),
    "sid_student": (SiD(), "student", {"student": [(B, True)], "teacher": [(B, True)], "fake": [(B, True)]}),
    "sid_critic": (SiD(), "critic", {"student": [(B, False)], "fake": [(B, True)]}),
    "scm": (SCM(), "loss", {"student": [(B, True), (B, False)], "teacher": [(B, False)]}),
    "ct": (CM(), "loss", {"student": [(B, False), (B, True)]}),
    "cd": (CM(from_teacher=True), "loss", {"student": [(B, False), (B, True)], "teacher": [(B, False)]}),
    "meanflow": (MeanFlow(same=0.75), "loss", {"student": [(B // 4, False), (B, True)], "teacher": [(B, False)]}),
    "flowmap": (FlowMap(), "loss", {"student": [(B, True)], "teacher": [(B, False)]}),
    "progressive": (Progressive(), "loss", {"student": [(B, True)], "teacher": [(B, False)] * 2}),
    "kd": (KD(2, 3), "loss", {"student": [(B, True)], "teacher": [(B, False)] * 6}),
}  # fmt: skip
