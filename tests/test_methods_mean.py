"""Methods whose target is random, critics and GANs, and what the equation suite does not reach."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.core.denoiser import Batch
from hasten.core.errors import ConfigError
from hasten.core.generate import trajectory
from hasten.core.losses import dmd_gradient
from hasten.core.path import EDM, RECTIFIED_FLOW, VP
from hasten.core.times import Uniform
from hasten.fit import fit
from hasten.methods.alphaflow import AlphaFlow
from hasten.methods.cm import CM
from hasten.methods.dmd2 import DMD2
from hasten.methods.flow import Flow
from hasten.methods.flowmap import FlowMap
from hasten.methods.kd import KD
from hasten.methods.meanflow import MeanFlow
from hasten.methods.scm import SCM
from hasten.methods.sid import SiD
from hasten.role import FitConfig
from tests.analytic import (
    LAW,
    MEAN,
    PATHS,
    SHAPE,
    STD,
    Affine,
    Angles,
    LawSource,
    Scripted,
    Toy,
    make_batch,
    toys,
    watched,
    without_data,
)
from tests.oracle import Gaussian, wide
from tests.proofs.common import ONE, gradients
from tests.test_methods import _float64  # noqa: F401

every_path = pytest.mark.parametrize("where", PATHS)
MIDDLE = Uniform(0.15, 0.9)

# --- (a) where the target is random: |mean| under 4 standard errors -------------------------------------------------

RANDOM: dict[str, tuple[Any, str, str, str, int]] = {  # method, base, loss, network, step
    "flow": (Flow(MIDDLE, 0.0), "posterior", "loss", "student", 0),
    "sct": (SCM(MIDDLE, False, warmup=0), "jump", "loss", "student", 0),
    "ct": (CM(MIDDLE, double_every=1, doublings=14, huber=1.0), "jump", "loss", "student", 20),
    "meanflow": (MeanFlow(MIDDLE, False, same=0.5, earlier=None), "map", "loss", "student", 0),
    "flowmap": (FlowMap(MIDDLE, from_teacher=False, ends=0.2), "map", "loss", "student", 0),
    "dmd2": (DMD2(times=MIDDLE, gan_weight=0), "jump", "critic", "fake", 0),
    "sid": (SiD(times=MIDDLE), "jump", "critic", "fake", 0),
}


def studentised(nets: dict[str, Any], case: tuple[Any, str, str, str, int], batches: int = 16) -> Tensor:
    """Mean over standard error of the gradient, per parameter, from independent batches."""
    method, _, loss, name, step = case
    each = []
    for _ in range(batches):
        value, _ = getattr(method, loss)(nets, make_batch(96, LAW), step)
        each.append(gradients(value, nets[name]))
    g = torch.stack(each)
    return g.mean(0) / (g.std(0) / batches**0.5 + 1e-6)


@every_path
@pytest.mark.parametrize("name", RANDOM)
def test_the_mean_gradient_is_zero_at_the_truth(name, where):
    nets = toys(where, RANDOM[name][1])
    assert float(studentised(nets, RANDOM[name]).abs().max()) < 4
    student = nets["student"] if RANDOM[name][3] == "student" else nets["fake"]
    with torch.no_grad():
        student.head.weight[0, 0] = 0.3  # and it is seen when it is not
    assert float(studentised(nets, RANDOM[name]).abs().max()) > 6


MET = {"meanflow": MeanFlow(), "imf": MeanFlow(own_tangent=True, same=0.5), "alphaflow": AlphaFlow()}


@pytest.mark.parametrize("name", MET)
def test_mean_velocities_meet_the_gap_of_one_step(name):
    """u(x_1, 1, 0) is the one-step sample. Two draws of LogitNormal(-0.4, 1) leave such gaps a chance of 3e-4."""
    torch.manual_seed(0)
    nets, method = toys("rf", "map"), MET[name]
    watched(nets["student"])
    method.loss(nets, make_batch(4000, LAW), 0)
    last = nets["student"].log[-1]
    assert float(((last.t > 0.9) & (last.r < 0.1)).double().mean()) > 0.014 and bool((last.r <= last.t).all())
    assert float((last.r == last.t).double().mean()) == pytest.approx(method.same, abs=1e-3)


def test_no_second_law_draws_both_times_from_the_first():
    torch.manual_seed(0)
    for make in (MeanFlow, AlphaFlow):
        nets = toys("rf", "map")
        watched(nets["student"])
        make(times=Uniform(0.3, 0.4), earlier=None).loss(nets, make_batch(64, LAW), 0)
        assert 0.29 < float(nets["student"].log[-1].r.min()) and float(nets["student"].log[-1].t.max()) < 0.41


def test_consistency_distillation_is_first_order_in_the_gap():
    """CD's error is one Euler step over the gap; halving the gap leaves the gradient of the weighted loss O(gap)."""
    sizes = []
    for doublings in (5, 6, 7):
        method = CM(ONE, True, double_every=1, doublings=doublings, huber=1.0)
        nets = toys("rf", "jump")
        torch.manual_seed(1)
        loss, _ = method.loss(nets, make_batch(70, LAW), 99)
        sizes.append(float(gradients(loss, nets["student"]).norm()))
    assert sizes[0] / sizes[1] == pytest.approx(2, rel=0.25) and sizes[1] / sizes[2] == pytest.approx(2, rel=0.25)


# --- Flow, KD, SiD: what the equation suite does not reach ----------------------------------------------------------


def test_flow_drops_its_share_of_conditions():
    other = Gaussian(-1.0, 0.2)

    class Spy(Toy):
        def forward(self, x_t, t, cond, *, r=None, taps=()):
            seen.append(cond["label"])
            return super().forward(x_t, t, cond, r=r, taps=taps)

    for drop, share in ((0.0, 0.0), (1.0, 1.0), (0.3, 0.3)):
        seen: list[Tensor] = []
        net, labels = Spy([LAW, other], RECTIFIED_FLOW, "velocity"), torch.zeros(2000, dtype=torch.long)
        Flow(drop=drop).loss({"student": net}, make_batch(2000, LAW, labels), 0)
        assert float(seen[0].double().mean()) == pytest.approx(share, abs=0.04)


def test_flow_trains_unconditional_data():
    loss, log = Flow().loss(toys("rf", "posterior"), make_batch(8, LAW), 0)
    assert float(log["flow"]) == pytest.approx(float(loss.detach()))


@every_path
def test_kd_reads_a_pairs_source(where):
    """Trajectories given in the batch are used as they are, and the teacher is not called."""
    nets, m = toys(where, "posterior"), KD(2, 3)
    watched(nets["teacher"])
    data = without_data(make_batch(9, LAW))
    points = trajectory(nets["teacher"], data, 2, 3, None)
    nets["teacher"].log.clear()
    batch = Batch({}, {}, data.shape, pairs=points)
    torch.manual_seed(3)
    hop = torch.randint(0, 2, (9,))
    torch.manual_seed(3)
    loss, _ = m.loss(nets, batch, 0)
    path, rows = nets["student"].path, torch.arange(9)
    t, s = path.at(1 - hop / 2), path.at(1 - (hop + 1) / 2)
    (a, b, _, _), (a2, b2, _, _) = path.coeffs(wide(t, points[:, 0])), path.coeffs(wide(s, points[:, 0]))
    target = (points[rows, hop + 1] - b2 / b * points[rows, hop]) / (a2 - b2 / b * a)
    want = (nets["student"].pairs(points[rows, hop], t, {})[0] - target).pow(2).mean()
    assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    assert not nets["teacher"].log


def test_a_trajectory_is_kept_at_even_unit_times():
    net = Toy(LAW, VP, "eps")
    watched(net)
    points = trajectory(net, make_batch(4, LAW), 2, 5, None)
    assert points.shape == (4, 3, *SHAPE) and not points.requires_grad
    assert [float(c.t[0]) for c in net.log] == pytest.approx([1 - i / 10 for i in range(10)])
    finer = trajectory(net, make_batch(4, LAW), 1, 400, None)
    torch.testing.assert_close(finer[:, 1], LAW.flow_map(VP, finer[:, 0], 1.0, 0.0), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("alpha", [1.2, 1.0, 0.5])
def test_sid_with_an_exact_fake_is_one_minus_alpha_fisher(alpha):
    """E L = (1 - alpha) E|D_r - D_f|^2; with many dimensions the normaliser is a constant."""
    real, fake, shape = Gaussian(1.0, 0.5), Gaussian(-0.2, 0.8), (1, 50, 50)
    nets = {
        "student": Toy(fake, EDM, "x0", "jump"),
        "fake": Toy(fake, EDM, "x0"),
        "teacher": Toy(real, EDM, "x0"),
    }
    batch = without_data(make_batch(40, real, shape=shape))
    loss, _ = SiD(times=Angles(((0.7,),)), alpha=alpha).student(nets, batch, 0)
    t = EDM.time(torch.tensor(0.7))
    x = fake.draw((40, *shape))
    x_t = x + t * torch.randn_like(x)
    d_r, d_f = real.posterior(EDM, x_t, t)[0], fake.posterior(EDM, x_t, t)[0]
    want = (1 - alpha) * (d_r - d_f).pow(2).mean() / (x - d_r).abs().mean()
    assert float(loss.detach()) == pytest.approx(float(want), abs=0.01)


def test_the_distribution_gradient_is_that_of_the_kl():
    """a^2/sigma^2 (D_f - D_r) pushed through the sample is d_m KL = a^2 (m - mu)/V_r and d_sf KL (closed form 5)."""
    mu, s, m, sf, path = 0.4, 0.5, -0.3, 0.9, RECTIFIED_FLOW
    real, fake, t = Gaussian(mu, s), Gaussian(m, sf), torch.tensor(0.35)
    a, b, _, _ = path.coeffs(t)
    z = torch.randn(400_000, 1, 1, 1)
    x_t = a * (m + sf * z) + b * torch.randn_like(z)
    d_r, d_f = real.posterior(path, x_t, t)[0], fake.posterior(path, x_t, t)[0]
    x = d_r + 1  # a normaliser of one
    grad = a**2 / b**2 * dmd_gradient(d_r, d_f, x)
    v_r, v_f = a**2 * s**2 + b**2, a**2 * sf**2 + b**2
    assert float(grad.mean()) == pytest.approx(float(a**2 * (m - mu) / v_r), rel=0.03)
    assert float((grad * z).mean()) == pytest.approx(float(a**2 * sf * (1 / v_r - 1 / v_f)), rel=0.03)


# --- critics ------------------------------------------------------------------------------------------------------


def critic_case(where: str, m: Any, data: bool = True) -> tuple[dict[str, Any], Tensor, Tensor, Scripted]:
    """(nets, loss of the critic, what it should be, batch); fake has learnt something."""
    nets = toys(where, "jump", truth=Gaussian(0.5 * MEAN, STD))
    nets["fake"].head = Affine(std=0.2)
    batch = make_batch(7, LAW)
    batch = batch if data else without_data(batch)
    got, _ = m.critic(nets, batch, 0)
    path, noise = nets["fake"].path, batch.script
    end, t = path.at(torch.ones(7)), path.time(torch.tensor(ONE.draws[0]))
    x = nets["student"].pairs(noise[0] * path.coeffs(wide(end, noise[0]))[1], end, {})[0].detach()
    a, s, _, _ = path.coeffs(wide(t, x))
    fake = nets["fake"].pairs(a * x + s * noise[1], t, {})[0]
    want = (((a / s) ** 2).clamp(max=1e3) + 1).mul((fake - x) ** 2).mean()
    if data and isinstance(m, DMD2) and m.gan_weight:
        look = lambda x: nets["fake"].pairs(x, t, {})[0].flatten(1) @ nets["disc"].w  # noqa: E731
        real_t = a * batch.data + s * noise[2]
        real = look(real_t)
        adversarial = (
            torch.log1p(torch.exp(-real)).mean() + torch.log1p(torch.exp(fake.flatten(1) @ nets["disc"].w)).mean()
        )
        want = want + m.critic_gan_weight * adversarial
        if m.r1_weight:
            want = want + m.r1_weight * (real - look(real_t + m.r1_noise * noise[3])).pow(2).mean()
    return nets, got, want, batch


CRITICS = {
    "sid": (SiD(times=ONE), False),
    "dmd2": (DMD2(times=ONE, gan_weight=0), False),
    "dmd2_no_data": (DMD2(times=ONE), False),
    "gan": (DMD2(times=ONE, gan_weight=0.5, critic_gan_weight=0.3), True),
    "r1": (DMD2(times=ONE, gan_weight=0.5, critic_gan_weight=0.3, r1_weight=0.4, r1_noise=0.2), True),
}


@every_path
@pytest.mark.parametrize("name", CRITICS)
def test_the_critic(name, where):
    """Denoising weighted with sigma^-2 + 1; the GAN and R1 on noised real data at the same t, R1 on the noisy input."""
    nets, got, want, _ = critic_case(where, *CRITICS[name])
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-4)
    for net in ("fake", "disc"):
        torch.testing.assert_close(gradients(got, nets[net]), gradients(want, nets[net]), rtol=1e-4, atol=1e-6)
    assert float(gradients(got, nets["student"]).abs().max()) == 0


@every_path
def test_r1_of_a_linear_discriminator_is_its_squared_slope(where):
    """a^2 |k w|^2 for D(x_t) = w . (k x_t + b), whatever the path does to clean data."""
    m = DMD2(times=Angles(((0.9,),)), gan_weight=1.0, critic_gan_weight=0.0, r1_weight=1.0, r1_noise=0.1)
    nets, n = toys(where, "jump"), 20_000
    batch = make_batch(n, LAW)
    torch.manual_seed(2)
    with_r1, _ = m.critic(nets, batch, 0)
    torch.manual_seed(2)
    without, _ = replace(m, r1_weight=0.0).critic(nets, batch, 0)
    path = nets["fake"].path
    a, s, _, _ = path.coeffs(path.time(torch.tensor(0.9)))
    slope = a * STD**2 / (a**2 * STD**2 + s**2)
    want = 0.01 * (slope.flatten() * nets["disc"].w).pow(2).sum()
    assert float((with_r1 - without).detach()) == pytest.approx(float(want.detach()), rel=0.05)


def test_gan_weight_none_is_on_exactly_with_data():
    m, batch = DMD2(times=ONE), make_batch(7, LAW)
    nets = toys("rf", "jump")
    assert m.gan(batch) == 3e-3 and m.gan(without_data(batch)) == 0 and not m.needs_data
    assert (
        float(m.student(nets, batch, 0)[1]["gan"]) > 0 and float(m.student(nets, without_data(batch), 0)[1]["gan"]) == 0
    )
    assert DMD2(gan_weight=0).gan(batch) == 0 and DMD2(gan_weight=0.2).gan(batch) == 0.2
    assert DMD2(gan_weight=0.2).needs_data and not DMD2(gan_weight=0).needs_data
    for turn in DMD2(gan_weight=0.2).turns:
        with pytest.raises(ConfigError, match="gan_weight needs data"):
            turn.loss(nets, without_data(batch), 0)
    with pytest.raises(ConfigError, match="needs data"):
        list(fit(DMD2(gan_weight=0.2), LawSource(None), nets["teacher"], FitConfig(iterations=1, batch=2)))


@pytest.mark.parametrize("teacher", [False, True])
def test_consistency_takes_the_data_itself_at_r_zero(teacher):
    """A network that predicts x0 need not be the identity at sigma = 0: there the target is x_r, not its output."""

    class Loose(Toy):
        def forward(self, x_t, t, cond, *, r=None, taps=()):
            out = super().forward(x_t, t, cond, r=r, taps=taps)
            return torch.where(wide(t, x_t) > 0, out, out + 5)

    losses = []
    for kind in (Toy, Loose):
        nets = {**toys("edm", "jump"), "student": kind(LAW, EDM, "x0", "jump")}
        torch.manual_seed(4)
        losses.append(float(CM(ONE, teacher, double_every=5000).loss(nets, make_batch(21, LAW), 0)[0].detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
