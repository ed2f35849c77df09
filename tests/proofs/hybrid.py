"""Hybrids of a trajectory and a distribution loss: rCM, SANA-Sprint, Hyper-SD, TwinFlow."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.core.generate import FewStep
from hasten.core.path import TRIG
from hasten.methods.hyper import HyperSD
from hasten.methods.rcm import RCM
from hasten.methods.sprint import Sprint
from hasten.methods.twinflow import TwinFlow
from tests.oracle import wide
from tests.proofs.common import ONE, B, Book, Case, Cost, N, Run, World, gap, mean, mean_u, native, rectified


def trig(w: World, eps: Tensor) -> tuple[Tensor, ...]:
    """(t, x_t, dx, cos t df/dt along the teacher, F with its graph); f = f* + sin t h, of which f* is constant."""
    t, x0 = torch.tensor(ONE.draws[0]), w.batch.data
    c, s = torch.cos(wide(t, x0)), torch.sin(wide(t, x0))
    x_t, head, none, d = c * x0 + s * eps, w.nets["student"].head, torch.zeros(N, 1, 1, 1), 1e-5
    ahead, behind = (
        torch.sin(wide(t + e, x0)) * head(w.real.flow_map(TRIG, x_t, t, t + e), wide(t + e, x0), none) for e in (d, -d)
    )
    hat, noise = w.nets["student"].pairs(*native(w, x_t, t), w.batch.cond)
    return t, x_t, w.real.velocity(TRIG, x_t, t), (c * (ahead - behind) / (2 * d)).detach(), c * noise - s * hat


def pulled(out: Tensor, g: Tensor) -> Tensor:
    """|F - sg(F + g/(|g| + 0.1))|^2 per sample, the norm Euclidean: its value, and -2 g/(|g| + 0.1) as its slope."""
    g = g / (g.pow(2).sum((1, 2, 3), keepdim=True).sqrt() + 0.1)
    return (g**2).sum((1, 2, 3)) - 2 * (g * (out - out.detach())).sum((1, 2, 3))


def samples(w: World, z: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The student's one-step samples of ``z``, their version noised with ``eps``, and t."""
    end, t = w.path.at(torch.ones(N)), w.path.time(torch.tensor(ONE.draws[0]))
    x = w.nets["student"].pairs(z * w.coeffs(end)[1], end, w.batch.cond)[0]
    a, s, _, _ = w.coeffs(t)
    return x, a * x + s * eps, t


def followed(w: World, z: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """The student's samples and DMD's normalised difference there."""
    x, x_t, t = samples(w, z, eps)
    return x, (gap(w, x_t, t) / mean((x - w.real.posterior(w.path, x_t, t)[0]).abs())).detach()


def rcm(w: World, m: RCM) -> Tensor:
    """In the warm-up at rho, sCM's g is -cos sqrt(1 - rho^2 sin^2) (F - dx) - rho cos sin x - JVP, and no DMD."""
    t, x_t, dx, slope, out = trig(w, w.batch.script[0])
    c, s = torch.cos(wide(t, x_t)), torch.sin(wide(t, x_t))
    rho = 0.375 if m.warmup else 1.0
    jvp = -slope - c**2 * (out - dx) - c * s * x_t
    g = (-c * torch.sqrt(1 - rho**2 * s**2) * (out - dx) - rho * c * s * x_t - jvp).detach()
    scm = m.scm_weight * pulled(out, g).mean()
    if m.warmup:
        return scm
    x, difference = followed(w, *w.batch.script[1:3])
    return scm + m.dmd_weight * (2 * x * difference).sum((1, 2, 3)).mean()


def sprint(w: World, m: Sprint) -> Tensor:
    """1/tan t in the weight; the GAN on the teacher's own (never guided) features of samples noised once more."""
    t, x_t, dx, slope, out = trig(w, w.batch.script[0])
    c = torch.cos(wide(t, x_t))
    rho, stable = 0.5 if m.warmup else 1.0, -(c**2) * (out - dx)
    place = w.nets["logvar"](t / (torch.pi / 2))
    error = pulled(out, (stable + rho * (slope - stable)).detach())
    scm = (torch.exp(-place) / torch.tan(t) * error + place).mean()
    eps, again = w.batch.script[1:3]
    at = w.path.at(torch.ones(N)) if m.largest else w.path.time(t)
    a, b, _, _ = w.coeffs(at)
    x = w.nets["student"].pairs(a * w.batch.data + b * eps, at, w.batch.cond)[0]
    a, b, _, _ = w.coeffs(w.path.time(t))
    tokens = w.nets["teacher"].laws[0].posterior(w.path, a * x + b * again, w.path.time(t))[0]
    return m.scm_weight * scm - m.gan_weight * (tokens.flatten(1) @ w.nets["disc"].w).mean()


def hyper(w: World, m: HyperSD) -> Tensor:
    """One DDIM step of the teacher by hand, then both points' DDIM hops to the end of their segment."""
    torch.manual_seed(5)
    i = torch.randint(1, m.solver_steps + 1, (N,))
    k = m.segments or 0
    e = torch.tensor([max(j for j in range(0, m.solver_steps, m.solver_steps // k) if j < n) for n in i.tolist()])
    t, s, e = (w.path.at(j / m.solver_steps) for j in (i, i - 1, e))
    (a, b, _, _), (a_s, b_s, _, _), (a_e, b_e, _, _) = w.coeffs(t), w.coeffs(s), w.coeffs(e)
    x_t = a * w.batch.data + b * w.batch.script[0]
    hat, noise = w.real.posterior(w.path, x_t, t)
    target = x_s = a_s * hat + b_s * noise
    inside = (s > e).reshape(-1, 1, 1, 1)
    assert inside.any() and not inside.all()
    safe = torch.where(s > e, s, t)
    hat, noise = w.nets["student"].pairs(x_s, safe, w.batch.cond)
    target = torch.where(inside, a_e * hat + b_e * noise, x_s).detach()
    hat, noise = w.nets["student"].pairs(x_t, t, w.batch.cond)
    return ((a_e * hat + b_e * noise - target) ** 2).mean()


def hyper_dmd(w: World, m: HyperSD) -> Tensor:
    x, difference = followed(w, *w.batch.script)
    return (x * difference).mean()


def weighed(error: Tensor) -> Tensor:
    """e / sqrt(e + c^2) with the root stopped, for a mean square e per sample."""
    return error / torch.sqrt(error.detach() + 1e-6)


def twinflow(w: World, m: TwinFlow) -> Tensor:
    """Sample by sample: 2 of one step, 2 near, 1 of any r, 2 of the twin, whose r is the noisiest time."""
    torch.manual_seed(5)
    share, x0 = torch.rand(N), w.batch.data
    end = float(rectified(w.path.angle(w.path.at(torch.tensor(1.0)))))
    drawn = rectified(torch.tensor(ONE.draws[0])).tolist()
    z, eps, again = w.batch.script

    def u(x: Tensor, t: float, r: float) -> Tensor:
        return mean_u(w, x, torch.tensor([t]), torch.tensor([r]))

    total = torch.zeros(())
    for n in range(N):
        t = end if n < 2 else drawn[n]
        part = "step" if n < 2 else "near" if n < 4 else "any" if n < 5 else "twin"
        x = x0[n : n + 1]
        if part == "twin":
            x = (end * z[n : n + 1] - end * u(end * z[n : n + 1], end, 0.0)).detach()
        x_t, v = (1 - t) * x + t * eps[n : n + 1], eps[n : n + 1] - x
        if part == "twin":
            total = total + weighed(((u(x_t, t, end) - v) ** 2).mean()) / N
            continue
        r = {"step": 0.0, "near": t - m.near * float(share[n]) * t, "any": t - float(share[n]) * t}[part]
        out, h = u(x_t, t, r), min(m.gap, t - r)
        y, passed, places = x_t - h * v, 0.0, [t - h + (r - t + h) * j / m.order for j in range(m.order + 1)]
        for now, then in zip(places, places[1:], strict=False):
            if now - then > 1e-9:
                hop = (now - then) * u(y, now, then)
                y, passed = y - hop, passed + hop
        rest = (((t - r) * out - passed) / h - v).clamp(-m.limit, m.limit).detach()
        height = torch.tan(torch.tensor((1 - t + r) * torch.pi / 2.5)) + 1
        total = total + height * weighed(((out - (out.detach() - rest)) ** 2).mean()) / N
        if part == "step":
            x, t = (x_t - t * out).detach(), drawn[n]
            x_t = (1 - t) * x + t * again[n : n + 1]
            pull = (u(x_t, t, end) - u(x_t, t, t)).clamp(-m.limit, m.limit).detach()
            total = total + m.match_weight * weighed(((out - (out.detach() - pull)) ** 2).mean()) / 2
    return total


CASES = {
    "rcm": Case(lambda g: RCM(ONE, ONE, FewStep(), g, dmd_weight=20.0, warmup=0), rcm, loss="student"),
    "rcm_warm": Case(lambda g: RCM(ONE, ONE, cfg_scale=g, warmup=8), rcm, loss="student", step=3, zero=False),
    "sprint": Case(lambda g: Sprint(ONE, ONE, 1.0, g, warmup=0, gan_weight=0.3), sprint, loss="student", zero=False),
    "sprint_warm": Case(lambda g: Sprint(ONE, ONE, 0.0, g, warmup=8), sprint, loss="student", step=3, zero=False),
    "hyper": Case(lambda g: HyperSD(4, 1, 8, g, segments=4), hyper, zero=False),
    "hyper_last": Case(lambda g: HyperSD(2, 1, 4, g, segments=1), hyper, zero=False),
    "hyper_dmd": Case(
        lambda g: HyperSD(cfg_scale=g, times=ONE, segments=0), hyper_dmd, loss="student", data=False, still=True
    ),
    "twinflow": Case(lambda g: TwinFlow(ONE, match_weight=0.5), twinflow, "map", zero=False, guide=False),
    "twinflow_cut": Case(
        lambda g: TwinFlow(ONE, limit=0.3, order=3, gap=0.1), twinflow, "map", zero=False, guide=False
    ),
}  # fmt: skip

RUNS = {
    "rcm": Run(RCM(generate=FewStep(), warmup=20, student_every=2), iterations=140),
    "sprint": Run(Sprint(warmup=20, gan_weight=0.02), iterations=70),
    "hyper": Run(HyperSD(4, 1, 16, dmd_share=0.0), iterations=300, factor=3.0),
    "twinflow_data": Run(TwinFlow(), iterations=250, lr=0.02, law=True, factor=2.5),
}

BOOKS = {
    "rcm": Book(RCM(), "fake student teacher", (("fake", 1), ("student", 5)), True, "renoise"),
    "sprint": Book(Sprint(), "disc logvar student teacher", (("student logvar", 1), ("disc", 1)), True, "renoise"),
    "hyper": Book(HyperSD(), "student teacher", staged=True),
    "hyper_dmd": Book(HyperSD(segments=0), "fake student teacher", (("fake", 1), ("student", 5)), staged=True),
    "twinflow": Book(TwinFlow(), "student", two_time=True),
}

COSTS: dict[str, Cost] = {
    "rcm_warm": (RCM(), "student", {"student": [(B, True), (B, False)], "teacher": [(B, False)]}),
    "rcm_guided": (
        RCM(generate=FewStep(), cfg_scale=2.0, warmup=0),
        "student",
        {"student": [(B, True), (B, False), (B, True)], "teacher": [(2 * B, False)] * 2, "fake": [(B, False)]},
    ),
    "rcm_critic": (RCM(generate=FewStep()), "critic", {"student": [(B, False)], "fake": [(B, True)]}),
    "sprint_student": (
        Sprint(),
        "student",
        {"student": [(B, True), (B, False), (B, True)], "teacher": [(B, False), (B, True)]},
    ),
    "sprint_critic": (Sprint(), "critic", {"student": [(B, False)], "teacher": [(B, True)] * 2}),
    "hyper": (HyperSD(), "loss", {"student": [(B, False), (B, True)], "teacher": [(B, False)]}),
    "hyper_dmd": (
        HyperSD(segments=0),
        "student",
        {"student": [(B, True)], "teacher": [(B, False)], "fake": [(B, False)]},
    ),
    "hyper_critic": (HyperSD(segments=0), "critic", {"student": [(B, False)], "fake": [(B, True)]}),
    "twinflow": (
        TwinFlow(),
        "loss",
        {"student": [(2, False), (B, True), (6, False), (6, False), (4, False)]},
    ),
}  # fmt: skip
