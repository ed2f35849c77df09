"""Reflow and PeRFlow, BOOT, guidance distillation and inductive moment matching, from the laws alone."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.methods.boot import BOOT
from hasten.methods.boss import BOSS
from hasten.methods.guidance import GuidanceDistillation
from hasten.methods.imm import IMM
from hasten.methods.reflow import Reflow
from tests.analytic import Angles
from tests.oracle import wide
from tests.proofs.common import ONE, B, Book, Case, Cost, N, Run, World, native, rectified


def euler(w: World, x: Tensor, times: list[Tensor]) -> Tensor:
    """DDIM by hand with the (guided) teacher's posterior, through ``times`` [N] each."""
    for here, there in zip(times, times[1:], strict=False):
        hat, noise = w.real.posterior(w.path, x, here)
        a, s, _, _ = w.coeffs(there)
        x = a * hat + s * noise
    return x


def line(w: World, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """|velocity - (eps - x0)|^2 at a uniform rectified-flow time, (x0, eps) solving both ends by Cramer's rule."""
    (a, b, _, _), (a2, b2, _, _) = w.coeffs(t), w.coeffs(s)
    det = a * b2 - b * a2
    x0, eps = (b2 * x_t - b * x_s) / det, (a * x_s - a2 * x_t) / det
    top, low = rectified(w.path.angle(t)), rectified(w.path.angle(s))
    tau = low + torch.rand(N) * (top - low)
    point = wide(1 - tau, x0) * x0 + wide(tau, x0) * eps
    phi = torch.atan2(tau, 1 - tau)
    hat, noise = w.nets["student"].pairs(
        *native(w, point / torch.hypot(1 - wide(tau, x0), wide(tau, x0)), phi), w.batch.cond
    )
    return (((noise - hat) - (eps - x0)) ** 2).mean()


def reflow(w: World, m: Reflow) -> Tensor:
    """From pure noise to data in 3 steps, one window."""
    torch.manual_seed(5)
    torch.randn(w.batch.shape)
    torch.randint(0, 1, (N,))
    times = [w.path.at(torch.full((N,), 1 - i / 3)) for i in range(4)]
    x = w.batch.script[0] * w.coeffs(times[0])[1]
    return line(w, x, euler(w, x, times), times[0], times[-1])


def perflow(w: World, m: Reflow) -> Tensor:
    """From noised data at the top of a random one of 3 windows, 2 steps."""
    torch.manual_seed(5)
    i = torch.randint(0, 3, (N,))
    torch.randn(w.batch.shape)
    assert len(set(i.tolist())) == 3
    times = [w.path.at(1 - (2 * i + j) / 6) for j in range(3)]
    a, s, _, _ = w.coeffs(times[0])
    x = a * w.batch.data + s * w.batch.script[0]
    return line(w, x, euler(w, x, times), times[0], times[-1])


def boss(w: World, m: BOSS) -> Tensor:
    """From a random one of 3 uneven times, 2 steps by hand to each; the velocity between the ends, where it starts."""
    torch.manual_seed(5)
    torch.randn(w.batch.shape)
    i, edges = torch.randint(0, 3, (N,)), [1.0, 0.7, 0.2, 0.0]
    assert len(set(i.tolist())) == 3
    units = [u for t, s in zip(edges, edges[1:], strict=False) for u in (t, (t + s) / 2)] + [0.0]
    times = [w.path.at(torch.full((N,), u)) for u in units]
    points = [w.batch.script[0] * w.coeffs(times[0])[1]]
    for here, there in zip(times, times[1:], strict=False):
        points.append(euler(w, points[-1], [here, there]))
    ends, marks, rows = torch.stack(points[::2], 1), torch.stack(times[::2], 1), torch.arange(N)
    x_t, x_s, t, s = ends[rows, i], ends[rows, i + 1], marks[rows, i], marks[rows, i + 1]
    (a, b, _, _), (a2, b2, _, _) = w.coeffs(t), w.coeffs(s)
    u, u2 = b / (a + b), b2 / (a2 + b2)
    mean_velocity = (x_t / (a + b) - x_s / (a2 + b2)) / (u - u2)  # on rectified flow, by the scale of each end
    hat, noise = w.nets["student"].pairs(x_t, t, w.batch.cond)
    return (((noise - hat) - mean_velocity) ** 2).mean()


def boot(w: World, m: BOOT) -> Tensor:
    """The student's X(1->t), one DDIM step by hand to s, and the x0 at pure noise whose step lands there."""
    torch.manual_seed(5)
    later, end = 0.9 * torch.rand(N), w.path.at(torch.ones(N))
    t, s = w.path.at(later + 0.1), w.path.at(later)
    (a, b, _, _), (a2, b2, _, _), (a1, b1, _, _) = w.coeffs(t), w.coeffs(s), w.coeffs(end)
    x_1, net, cond = w.batch.script[0] * b1, w.nets["student"], w.batch.cond
    hat, noise = net.pairs(x_1, end, cond, t)
    x_t = (a * hat + b * noise).detach()
    x_s = euler(w, x_t, [t, s])
    signal = (b1 * x_s - b2 * x_1) / (a2 * b1 - b2 * a1)
    weight = (b * (a2 * b1 - b2 * a1) / (b1 * (b * a2 - b2 * a))) ** 2  # (signal - y_t) / (1 - rho) is f - y_t
    start = w.real.posterior(w.path, x_1, end)[0]
    error = (weight * (net.pairs(x_1, end, cond, s)[0] - signal) ** 2).mean()
    return error + m.boundary * ((net.pairs(x_1, end, cond, end)[0] - start) ** 2).mean()


def guidance(w: World, m: GuidanceDistillation) -> Tensor:
    t = w.path.time(torch.tensor(ONE.draws[0]))
    a, s, da, ds = w.coeffs(t)
    c, d = {"velocity": (da, ds), "eps": (0.0, 1.0), "x0": (1.0, 0.0)}[w.nets["student"].kind]
    x_t = a * w.batch.data + s * w.batch.script[0]
    hat, noise = w.nets["student"].pairs(x_t, t, w.batch.cond)
    hat2, noise2 = w.real.posterior(w.path, x_t, t)
    return ((c * (hat - hat2) + d * (noise - noise2)) ** 2).mean()


def imm(w: World, m: IMM) -> Tensor:
    """One group of all 7 samples; every pair of particles in turn."""
    torch.manual_seed(5)
    torch.randn(w.batch.shape)
    t = rectified(torch.tensor(m.times.draws[0]))  # pyright: ignore[reportAttributeAccessIssue]
    s = t * torch.rand(1)
    eta = t / (1 - t) - 10 / 2**m.k
    r = torch.maximum(s, eta / (1 + eta))
    assert bool(((s < r) & (r < t)).all())

    def hop(u: Tensor) -> Tensor:
        point = (1 - u) * w.batch.data + u * w.batch.script[0]
        x, at = native(w, point / torch.hypot(1 - u, u), torch.atan2(u, 1 - u).expand(N))
        land = w.path.time(torch.atan2(s, 1 - s)).expand(N)
        hat, noise = w.nets["student"].pairs(x, at, w.batch.cond, land)
        return ((1 - s) * hat + s * noise).flatten(1)

    ahead, behind = hop(t), hop(r).detach()
    total = torch.zeros(())
    for i in range(N):
        for j in range(N):
            for sign, x, y in ((1, ahead[i], ahead[j]), (-2, ahead[i], behind[j]), (1, behind[i], behind[j])):
                far = ((x - y) ** 2).sum()
                far = far.sqrt() if float(far.detach()) > 0 else torch.zeros(())
                total = total + sign * torch.exp(-far / (6 * (t - s)))[0] / N**2
    snr = ((1 - t) / t) ** 2
    weight = 0.5 / (1 + snr / torch.e**m.b) * (2 / (t * (1 - t))) * (1 - t) ** m.a / ((1 - t) ** 2 + t**2)
    return weight[0] * total


SOME = Angles(((0.9,),))
CASES = {
    "reflow": Case(lambda g: Reflow(1, 3, cfg_scale=g), reflow, "posterior", zero=False, data=False),
    "perflow": Case(lambda g: Reflow(3, 2, cfg_scale=g), perflow, "posterior", zero=False),
    "boss": Case(lambda g: BOSS(3, (1.0, 0.7, 0.2, 0.0), 2, g), boss, "posterior", zero=False, data=False),
    "boot": Case(lambda g: BOOT(0.1, 0.7, g), boot, "map", zero=False, data=False),
    # Without conditions a teacher guided with any scale is the teacher itself.
    "guidance": Case(lambda g: GuidanceDistillation(g or 2.0, ONE), guidance, "posterior"),
    "imm": Case(lambda g: IMM(SOME, 7, 5, 10.0, a=2, b=3.0), imm, "map", zero=False, guide=False),
}

RUNS = {
    "reflow": Run(Reflow(1, 16), iterations=120, factor=3.0),
    "boss": Run(BOSS(2, (1.0, 0.6, 0.0)), 2, iterations=120, factor=3.0),
    "boot": Run(BOOT(), iterations=200, factor=2.5),
    "imm_data": Run(IMM(particles=16, k=8), iterations=200, law=True),
}

BOOKS = {
    "reflow": Book(Reflow(), "student teacher", needs_data=False),
    "guidance": Book(GuidanceDistillation(2.0), "student teacher"),
    "imm": Book(IMM(), "student", two_time=True),
}

COSTS: dict[str, Cost] = {
    "reflow": (Reflow(1, 3), "loss", {"student": [(B, True)], "teacher": [(B, False)] * 3}),
    "perflow": (Reflow(4, 2), "loss", {"student": [(B, True)], "teacher": [(B, False)] * 2}),
    "boss": (
        BOSS(2, (1.0, 0.3, 0.0), 3),
        "loss",
        {"student": [(B, True)], "teacher": [(B, False)] * 6},
    ),
    "boot": (BOOT(), "loss", {"student": [(B, False), (B, True), (B, True)], "teacher": [(B, False)] * 2}),
    "guidance_guided": (
        GuidanceDistillation(2.0),
        "loss",
        {"student": [(B, True)], "teacher": [(2 * B, False)]},
    ),
    "imm": (IMM(), "loss", {"student": [(B, True), (B, False)]}),
}  # fmt: skip
