"""Every method's gradient against its closed form, on rectified-flow, VP and EDM teachers, plain and guided.

The student is the exact answer plus a small learnt part h; with h = 0 every gradient is zero at the truth, with
h != 0 it equals what the paper's equation gives, worked out here from the laws alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.core.heads import LogVariance
from hasten.core.path import RECTIFIED_FLOW, TRIG
from hasten.methods.cm import CM
from hasten.methods.dmd2 import DMD2
from hasten.methods.flow import Flow
from hasten.methods.flowmap import FlowMap
from hasten.methods.kd import KD
from hasten.methods.meanflow import MeanFlow
from hasten.methods.progressive import Progressive
from hasten.methods.scm import SCM
from hasten.methods.sid import SiD
from tests.analytic import (
    MEAN,
    PATHS,
    STD,
    Affine,
    Angles,
    LinearDisc,
    Scripted,
    Toy,
    make_batch,
    shifted,
    without_data,
)
from tests.oracle import Gaussian, Mixture, mean_velocity, wide

N = 7
ONE = Angles(((0.15, 0.4, 0.6, 0.9, 1.1, 1.3, 1.45),))
TWO = Angles((ONE.draws[0], (0.05, 0.7, 0.2, 0.3, 1.2, 0.9, 0.5)))
every_path = pytest.mark.parametrize("where", PATHS)


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@dataclass
class World:
    """Networks and laws of one comparison: ``real`` is the law that the (guided) teacher follows."""

    nets: dict[str, Any]
    real: Any
    fake: Any
    batch: Scripted
    path: Any

    def coeffs(self, t: Tensor) -> tuple[Tensor, ...]:
        return self.path.coeffs(wide(t, self.batch.data))


def world(where: str, base: str, law: str, std: float, scale: float | None) -> World:
    """A teacher of ``law``, a student that is the truth (guided with ``scale``) plus h of size ``std``."""
    path, kind = PATHS[where]
    cond: Any = Gaussian(MEAN, STD) if law == "gaussian" else Mixture()
    real, laws, labels = cond, [cond], None
    if scale is not None:
        other = Gaussian(-0.5 * MEAN.flip(-1) + 0.2, STD)
        real, laws, labels = shifted(cond, other, scale), [cond, other], torch.zeros(N, dtype=torch.long)
    fake: Any = real
    if std and law == "gaussian":
        fake = Gaussian(0.5 * MEAN + 0.3, 1.3 * STD)
    # The fake's unconditional law is far off: guiding the fake would show.
    nets = {
        "teacher": Toy(laws, path, kind).requires_grad_(False),
        "student": Toy([real] * len(laws), path, kind, base, Affine(std=std)),
        "fake": Toy([fake, Gaussian(3.0, 0.1)][: len(laws)], path, kind, head=Affine()),
        "logvar": LogVariance(),
        "disc": LinearDisc(),
    }
    return World(nets, real, fake, make_batch(N, cond, labels), path)


def gradients(loss: Tensor, net: torch.nn.Module) -> Tensor:
    """The flat gradient; parameters that the loss does not see count as zero."""
    params = list(net.parameters())
    grads = torch.autograd.grad(loss, params, allow_unused=True, retain_graph=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(params, grads, strict=True)]
    )


def mean(x: Tensor) -> Tensor:
    """Over all of a sample's dimensions, kept."""
    return x.mean((1, 2, 3), keepdim=True)


# --- what each paper's equation says, as a scalar with the right gradient ----------------------------------------


def flow(w: World, m: Flow) -> Tensor:
    (eps,), x0, t = w.batch.script, w.batch.data, w.path.time(torch.tensor(ONE.draws[0]))
    a, s, da, ds = w.coeffs(t)
    c, d = {"velocity": (da, ds), "eps": (0.0, 1.0), "x0": (1.0, 0.0)}[w.nets["student"].kind]
    hat, noise = w.nets["student"].pairs(a * x0 + s * eps, t, w.batch.cond)
    return ((c * hat + d * noise - (c * x0 + d * eps)) ** 2).mean()


def one_step(w: World) -> tuple[Tensor, Tensor, Tensor]:
    """The student's sample from pure noise, its noised version and t."""
    end = w.path.at(torch.ones(N))
    x = w.nets["student"].pairs(w.batch.script[0] * w.coeffs(end)[1], end, w.batch.cond)[0]
    t = w.path.time(torch.tensor(ONE.draws[0]))
    a, s, _, _ = w.coeffs(t)
    return x, a * x + s * w.batch.script[1], t


def gap(w: World, x_t: Tensor, t: Tensor) -> Tensor:
    """D_f - D_r = (sigma^2 / a) [(x - a mu)/V_r - (x - a m)/V_f] (facts, closed form 5); mixtures: zero."""
    if isinstance(w.real, Mixture):
        return torch.zeros_like(x_t)
    a, s, _, _ = w.coeffs(t)
    r, f = w.real, w.fake
    v_r, v_f = a**2 * r.std**2 + s**2, a**2 * f.std**2 + s**2
    return s**2 / a * ((x_t - a * r.mean) / v_r - (x_t - a * f.mean) / v_f)


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


def native(w: World, x: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """A point of the trigonometric path on the student's own."""
    t = w.path.time(angle)
    a, s, _, _ = w.coeffs(t)
    return x * torch.hypot(a, s), t


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


def rectified(phi: Tensor) -> Tensor:
    """The rectified-flow time of an angle."""
    return torch.tan(phi) / (1 + torch.tan(phi))


def mean_u(w: World, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """The student's u(x, t, r) on rectified flow: the exact one (the velocity at r = t) and eps - x0 of its h."""
    a, still = 1 - wide(t, x), (r == t).reshape(-1, 1, 1, 1)
    phi, psi = torch.atan2(wide(t, x), a), torch.atan2(wide(r, x), 1 - wide(r, x))
    h = w.nets["student"].head(x / torch.hypot(a, wide(t, x)), phi, psi)
    exact = mean_velocity(w.real, RECTIFIED_FLOW, x, t, torch.where(r == t, r - 0.01, r))
    exact = torch.where(still, w.real.velocity(RECTIFIED_FLOW, x, t), exact)
    return exact - (torch.sin(phi) + torch.cos(phi)) * h


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


@dataclass(frozen=True)
class Case:
    """One method as it is compared: ``make(cfg_scale)``, what it should be, and what the student's exact part is."""

    make: Callable[[float | None], Any]
    want: Callable[[World, Any], Tensor]
    base: str = "jump"
    loss: str = "loss"
    step: int = 0
    zero: bool = True  # the gradient at the truth is zero for every sample
    guide: bool = True
    data: bool = True


CASES = {
    "flow": Case(lambda g: Flow(ONE, 0.0), flow, "posterior", zero=False, guide=False),
    "dmd2": Case(lambda g: DMD2(times=ONE, cfg_scale=g, gan_weight=0), dmd2, loss="student", data=False),
    "dmd2_gan": Case(lambda g: DMD2(times=ONE, cfg_scale=g, gan_weight=0.7), dmd2_gan, loss="student", zero=False),
    "sid": Case(lambda g: SiD(times=ONE, cfg_scale=g), sid, loss="student", data=False),
    "sida": Case(lambda g: SiD(times=ONE, cfg_scale=g, alpha=1.0), sid, loss="student", data=False),
    "scm": Case(lambda g: SCM(ONE, cfg_scale=g, warmup=0), scm),
    "scm_warm": Case(lambda g: SCM(ONE, cfg_scale=g, warmup=8), scm, step=3, zero=False),
    "sct": Case(lambda g: SCM(ONE, from_teacher=False, warmup=0), scm, zero=False, guide=False),
    "cd": Case(lambda g: CM(ONE, True, cfg_scale=g, huber=0.1), cm, step=2500, zero=False),
    "cd_start": Case(lambda g: CM(ONE, True, g, double_every=5000, huber=0.1), cm, step=2500, zero=False),
    "ct": Case(lambda g: CM(ONE, huber=0.1), cm, step=2500, zero=False, guide=False),
    "ct_end": Case(lambda g: CM(ONE, double_every=100, doublings=3), cm, step=2500, zero=False, guide=False),
    "meanflow": Case(lambda g: MeanFlow(TWO, cfg_scale=g, same=0.3), meanflow, "map"),
    "meanflow_p": Case(lambda g: MeanFlow(TWO, cfg_scale=g, same=0.0, power=0.75, floor=0.1), meanflow, "map"),
    "meanflow_data": Case(lambda g: MeanFlow(TWO, False, same=0.3), meanflow, "map", zero=False, guide=False),
    "flowmap": Case(lambda g: FlowMap(TWO, cfg_scale=g, ends=0.6), flowmap, "map"),
    "flowmap_data": Case(lambda g: FlowMap(TWO, from_teacher=False, ends=0.3), flowmap, "map", zero=False, guide=False),
    "progressive": Case(lambda g: Progressive(8, 1, g, steps=4), progressive, "posterior", zero=False),
    "kd": Case(lambda g: KD(2, 3, g), kd, "posterior", zero=False, data=False),
}  # fmt: skip


def compare(case: Case, where: str, law: str, std: float, scale: float | None) -> tuple[Tensor, Tensor, World]:
    """(gradient of the method, gradient of its equation)."""
    for script in (ONE, TWO):
        script.count.clear()
    w = world(where, case.base, law, std, scale)
    if std:  # a log variance that has learnt something
        torch.nn.init.normal_(w.nets["logvar"].linear.weight, std=0.1)
    method = case.make(scale)
    torch.manual_seed(5)
    batch = w.batch if case.data else without_data(w.batch)
    got, _ = getattr(method, case.loss)(w.nets, batch, case.step)
    w.batch.script[:] = batch.script
    want = case.want(w, method)
    roles = [w.nets["student"]] + ([w.nets["logvar"]] if isinstance(method, SCM) else [])
    if case.loss == "loss":
        assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-4, abs=1e-6)
    return torch.cat([gradients(got, n) for n in roles]), torch.cat([gradients(want, n) for n in roles]), w


@every_path
@pytest.mark.parametrize("law", ["gaussian", "mixture"])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_the_equation(name, law, where):
    got, want, _ = compare(CASES[name], where, law, 0.3, None)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6 * (1 + float(want.abs().max())))
    assert float(want.abs().max()) > 1e-3 or (law == "mixture" and name in ("dmd2", "sid", "sida"))


@every_path
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.guide])
def test_the_guided_gradient_is_that_of_the_shifted_gaussian(name, where):
    """Equal covariances: a teacher guided with w is exactly N(mu_u + w (mu_c - mu_u), s^2); the fake is not guided."""
    got, want, _ = compare(CASES[name], where, "gaussian", 0.3, 2.5)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6 * (1 + float(want.abs().max())))


@every_path
@pytest.mark.parametrize(("law", "scale"), [("gaussian", None), ("mixture", None), ("gaussian", 2.5)])
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.zero])
def test_the_gradient_is_zero_at_the_truth(name, law, scale, where):
    got, _, _ = compare(CASES[name], where, law, 0.0, scale)
    assert float(got[:8].abs().max()) < 2e-6
