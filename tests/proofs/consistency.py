"""iCT, phased and latent consistency, consistency trajectories, truncated consistency: worked out from the laws."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import torch
from torch import Tensor

from hasten.core.path import RECTIFIED_FLOW
from hasten.methods.cm import CM
from hasten.methods.ctm import CTM
from hasten.methods.pcm import PCM
from hasten.methods.tcm import TCM
from tests.analytic import Angles
from tests.oracle import wide
from tests.proofs.common import ONE, B, Book, Case, Cost, N, Run, World, mean_u, rectified

NOISY = Angles(((0.7, 1.2, 0.9, 0.5),))


def ict(w: World, m: CM) -> Tensor:
    """Neighbours on Karras' grid of s0 2^s + 1 points, data below the second (Song & Dhariwal 2024, table 1)."""
    (eps,), x0 = w.batch.script, w.batch.data
    count = 1 * 2**2 + 1  # twice doubled at step 2500
    grid = [(0.002 ** (1 / 7) + i / (count - 1) * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7 for i in range(count)]
    grid[0] = 0.0
    upper = [next(i for i in range(1, count) if grid[i] >= math.tan(angle)) for angle in ONE.draws[0]]
    late, early = (torch.tensor([grid[i - back] for i in upper]) for back in (0, 1))
    t, r = w.path.time(torch.atan(late)), w.path.time(torch.atan(early))
    (a, s, _, _), (a_r, s_r, _, _) = w.coeffs(t), w.coeffs(r)
    x_t, x_r = a * x0 + s * eps, a_r * x0 + s_r * eps
    if m.from_teacher:
        hat, noise = w.real.posterior(w.path, x_t, t)
        x_r = a_r * hat + s_r * noise
    assert 0.0 in early and early.max() > 1
    net, c = w.nets["student"], 0.1 * 6**0.5
    target = net.pairs(x_r, r.clamp_min(1e-6), w.batch.cond)[0].detach()
    target = torch.where(wide(early, x0) > 0, target, x_r)
    square = ((net.pairs(x_t, t, w.batch.cond)[0] - target) ** 2).sum((1, 2, 3))
    return ((torch.sqrt(square + c**2) - c) / (late - early)).mean()


def pcm(w: World, m: PCM) -> Tensor:
    """One DDIM hop of the teacher, then the student to the start of the phase; at the first hop the teacher alone."""
    torch.manual_seed(5)
    i = torch.randint(1, m.phases * m.hops + 1, (N,))
    x0, eps, cond = w.batch.data, w.batch.script[0], w.batch.cond
    first = torch.div(i - 1, m.hops, rounding_mode="floor") * m.hops  # grid point at which the phase starts
    t, r, start = (w.path.at(j / (m.phases * m.hops)) for j in (i, i - 1, first))
    (a, s, _, _), (a_r, s_r, _, _), (a_s, s_s, _, _) = w.coeffs(t), w.coeffs(r), w.coeffs(start)
    x_t = a * x0 + s * eps
    hat, noise = w.real.posterior(w.path, x_t, t)
    x_r = a_r * hat + s_r * noise
    ahead, behind = w.nets["student"].pairs(x_t, t, cond), w.nets["student"].pairs(x_r, r.clamp_min(1e-6), cond)
    target = torch.where(wide((i - 1 == first).double(), x0) > 0, x_r, a_s * behind[0] + s_s * behind[1]).detach()
    assert 0 < int((i - 1 == first).sum()) < N and len(set(first.tolist())) == m.phases
    error = a_s * ahead[0] + s_s * ahead[1] - target
    return (torch.sqrt(error**2 + m.huber**2) - m.huber).mean()


def ctm(w: World, m: CTM) -> Tensor:
    """Jumps x + (s - t) u on rectified flow, Heun's solver by hand, the outer jump a frozen copy; then denoising."""
    random.seed(3)
    counts = list(range(1, m.solver + 1))
    hops = random.choices(counts, weights=counts)[0]
    torch.manual_seed(5)
    i = torch.randint(hops, m.grid + 1, (N,))
    k = (torch.rand(N) * (i - hops + 1)).long()
    x0, (eps, other) = w.batch.data, w.batch.script
    frozen = World({"student": copy.deepcopy(w.nets["student"]).requires_grad_(False)}, w.real, None, w.batch, w.path)

    def at(j: Tensor) -> Tensor:
        return rectified(w.path.angle(w.path.at(j / m.grid)))

    def jump(w: World, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return x + wide(s - t, x) * mean_u(w, x, t.clamp_min(1e-3), s)

    t, s, none = at(i), at(k), torch.zeros(N)
    x_t = wide(1 - t, x0) * x0 + wide(t, x0) * eps
    x, u = x_t, t
    for j in range(hops):
        new = at(i - j - 1).clamp_min(1e-3)
        v = w.real.velocity(RECTIFIED_FLOW, x, u)
        after = w.real.velocity(RECTIFIED_FLOW, x + wide(new - u, x) * v, new)
        x, u = x + wide(new - u, x) * (v + after) / 2, new
    target = jump(frozen, jump(frozen, x, u, s), s, none)
    soft = ((jump(frozen, jump(w, x_t, t, s), s, none) - target) ** 2).mean()
    t = w.path.time(torch.tensor(ONE.draws[0][:3] + NOISY.draws[0]))
    a, s, _, _ = w.coeffs(t)
    x_t = a * x0 + s * other
    truth = x0 if m.cfg_scale is None else w.real.posterior(w.path, x_t, t)[0]
    error = (w.nets["student"].pairs(x_t, t, w.batch.cond, r=t)[0] - truth) ** 2
    return soft + m.dsm_weight * (torch.clamp((a / s) ** 2, max=1000) + 1).mul(error).mean()


def tcm(w: World, m: TCM) -> Tensor:
    """In stage 2: three samples at t', the teacher's target below t', the means of both parts apart."""
    (eps,), x0 = w.batch.script, w.batch.data
    edge = w.path.at(torch.tensor(m.transition))
    t, k = w.path.time(torch.tensor(ONE.draws[0])), 0
    if m.stage == 2:
        t, k = torch.maximum(t, edge), 3
        t[:k] = edge
    a, s, _, _ = w.coeffs(t)
    ratio = (s / a).flatten()
    # two doublings: at step 2500 of stage 1, at any of stage 2
    later = (ratio * (1 - 0.5**3 * (1 + 8 / (1 + torch.exp(ratio))))).clamp_min(0)
    r = w.path.time(torch.atan(later))
    a_r, s_r, _, _ = w.coeffs(r)
    x_t, x_r = a * x0 + s * eps, a_r * x0 + s_r * eps
    target = w.nets["student"].pairs(x_r, r, w.batch.cond)[0].detach()
    if m.stage == 2:
        assert 3 < int((r < edge).sum()) < N
        target = torch.where(wide(r, x0) < edge, w.real.posterior(w.path, x_r, r)[0], target)
    square, c = ((w.nets["student"].pairs(x_t, t, w.batch.cond)[0] - target) ** 2).sum((1, 2, 3)), 0.1 * 6**0.5
    each = (torch.sqrt(square + c**2) - c) / (ratio - later)
    return each.mean() if m.stage == 1 else each[k:].mean() + 0.3 * each[:k].mean()


def seeded(g: float | None, solver: int) -> CTM:
    """The count of solver steps is the first number after this seed."""
    random.seed(3)
    return CTM(6, solver, g, dsm_weight=0.7, times=ONE, noisy=NOISY)


CT = {"double_every": 1000, "doublings": 2, "huber": 0.1}
GRID: dict[str, Any] = {"intervals": 1, "double_every": 1000, "huber": 0.1}
CASES = {
    "ict": Case(lambda g: CM(ONE, schedule="ict", **GRID), ict, step=2500, zero=False, guide=False),
    "ict_cd": Case(lambda g: CM(ONE, True, g, "ict", **GRID), ict, step=2500, zero=False),
    "pcm": Case(lambda g: PCM(2, 3, g, 0.1), pcm, "posterior", zero=False),
    "lcm": Case(lambda g: PCM(1, 4, g, 0.1), pcm, zero=False),
    "ctm": Case(lambda g: seeded(g, 3), ctm, "map", zero=False),
    "ctm_one": Case(lambda g: seeded(g, 1), ctm, "map", zero=False),
    "tcm": Case(lambda g: TCM(ONE, **CT), tcm, step=2500, zero=False, guide=False),
    "tcm_late": Case(
        lambda g: TCM(late=ONE, transition=0.5, boundary=3 / N, boundary_weight=0.3, stage=2, **CT),
        tcm,
        zero=False,
        guide=False,
    ),
}

RUNS = {
    "ict_data": Run(CM(schedule="ict", double_every=0, doublings=5)),
    "pcm": Run(PCM(2, 8), steps=2, factor=3.0, mixture=1.5),
    "lcm": Run(PCM(1, 24)),
    "ctm": Run(CTM(8, 3), iterations=120, factor=3.0),
    "tcm_data": Run(TCM(double_every=25, doublings=5), iterations=300),
}

BOOKS = {
    "ict": Book(CM(schedule="ict"), "student", rule="renoise"),
    "pcm": Book(PCM(), "student teacher"),
    "lcm": Book(PCM(1, 50), "student teacher", rule="renoise"),
    "ctm": Book(CTM(), "student teacher", two_time=True),
}

COSTS: dict[str, Cost] = {
    "ict": (CM(schedule="ict"), "loss", {"student": [(B, False), (B, True)]}),
    "pcm": (PCM(), "loss", {"student": [(B, False), (B, True)], "teacher": [(B, False)]}),
    "ctm": (CTM(18, 1), "loss", {"student": [(B, False)] * 2 + [(B, True)] * 3, "teacher": [(B, False)] * 2}),
    "ctm_guided": (
        CTM(18, 1, 2.0),
        "loss",
        {"student": [(B, False)] * 2 + [(B, True)] * 3, "teacher": [(2 * B, False)] * 3},
    ),
    "tcm": (TCM(), "loss", {"student": [(B, False), (B, True)]}),
    "tcm_late": (TCM(stage=2), "loss", {"student": [(B, False), (B, True)], "teacher": [(B, False)]}),
}
