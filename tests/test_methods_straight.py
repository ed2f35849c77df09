"""Reflow, BOOT, guidance distillation and IMM: what each paper is known for, and what the equation suite leaves out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.core.bellman import best_times
from hasten.core.denoiser import Batch
from hasten.core.errors import ConfigError
from hasten.core.generate import trajectory
from hasten.core.method import Sampling, even
from hasten.core.path import RECTIFIED_FLOW, VP
from hasten.core.sample import sample
from hasten.core.times import Uniform
from hasten.distribute import clone
from hasten.fit import fit
from hasten.methods.boot import BOOT
from hasten.methods.boss import BOSS
from hasten.methods.guidance import GuidanceDistillation
from hasten.methods.imm import IMM, mmd
from hasten.methods.reflow import Reflow
from hasten.recipe import parse
from hasten.role import FitConfig
from hasten.run import settled
from tests.analytic import (
    LAW,
    MEAN,
    PATHS,
    SHAPE,
    STD,
    Affine,
    Angles,
    LawSource,
    Toy,
    make_batch,
    shifted,
    toys,
    watched,
    without_data,
)
from tests.oracle import Gaussian, Mixture, wide
from tests.proofs.common import gradients
from tests.test_methods import _float64  # noqa: F401

every_path = pytest.mark.parametrize("where", PATHS)


# --- Reflow ---------------------------------------------------------------------------------------------------------


class Straight(Toy):
    """In every window the velocity of lines x0 = shift + gain eps: what Reflow of a Gaussian must learn."""

    def along(self, m: Reflow) -> Straight:
        """The lines that ``m.substeps`` Euler steps couple: they are affine per dimension, so two points tell them."""
        tops, shifts, gains = [], [], []
        for k in range(m.windows):
            times = [self.path.at(1 - (k + j / m.substeps) / m.windows) for j in range(m.substeps + 1)]
            (a, b, _, _), (a2, b2, _, _) = (self.path.coeffs(times[j]) for j in (0, -1))
            lines = []
            for z in (-1.0, 1.0):
                x = start = torch.full((1, *SHAPE), z)
                for here, there in zip(times, times[1:], strict=False):
                    hat, noise = LAW.posterior(self.path, x, here)
                    c, d, _, _ = self.path.coeffs(there)
                    x = c * hat + d * noise
                det = a * b2 - b * a2
                lines.append(((b2 * start - b * x) / det, (a * x - a2 * start) / det))
            (x0, eps), (x0_, eps_) = lines
            gains.append((x0_ - x0) / (eps_ - eps))
            shifts.append(x0 - gains[-1] * eps)
            tops.append(torch.atan2(b, a))
        self.tops, self.shifts, self.gains = torch.stack(tops), torch.cat(shifts), torch.cat(gains)
        return self

    def pair(self, law: Any, x: Tensor, t: Tensor, r: Tensor | None) -> tuple[Tensor, Tensor]:
        a, s, _, _ = self.path.coeffs(wide(t, x))
        phi = torch.atan2(s, a)
        window = (phi.flatten()[:, None] <= self.tops + 1e-7).sum(-1) - 1  # tops fall; an edge opens the window below
        shift, gain = self.shifts[window], self.gains[window]
        eps = (x - a * shift) / (a * gain + s)
        h = self.head(x / torch.hypot(a, s), phi, torch.zeros_like(phi))
        return shift + gain * eps + torch.sin(phi) * h, eps - torch.cos(phi) * h


@every_path
@pytest.mark.parametrize("m", [Reflow(1, 5), Reflow(3, 2)], ids=["reflow", "perflow"])
def test_reflow_of_a_gaussian_makes_one_euler_step_a_window_exact(m, where):
    """Facts, closed form 9: the learnt field has zero gradient, and few or many steps land where the teacher's do."""
    nets = {**toys(where, "posterior"), "student": Straight(LAW, *PATHS[where]).along(m)}
    batch, fine = make_batch(64, LAW), m.windows * m.substeps
    loss, _ = m.loss(nets, batch, 0)
    assert float(loss.detach()) < 1e-12 and float(gradients(loss, nets["student"]).abs().max()) < 1e-6
    noise = batch.noise()
    want = sample(nets["teacher"], noise, {}, Sampling(even(fine)))
    assert float((want - sample(nets["teacher"], noise, {}, m.sampling(m.windows))).abs().max()) > 0.1
    for steps in (m.windows, 7 * m.windows):
        torch.testing.assert_close(sample(nets["student"], noise, {}, m.sampling(steps)), want, rtol=1e-5, atol=1e-6)


@every_path
def test_reflow_reads_a_pairs_source_in_its_first_round_only(where):
    nets, m = toys(where, "posterior"), Reflow(2, 3)
    data = without_data(make_batch(9, LAW))
    points = trajectory(nets["teacher"], data, 2, 3, None)
    watched(nets["teacher"])
    batch = Batch({}, {}, data.shape, pairs=points)
    torch.manual_seed(3)
    loss, _ = m.loss(nets, batch, 0)
    torch.manual_seed(3)
    hop = torch.randint(0, 2, (9,))
    path, rows, z = nets["student"].path, torch.arange(9), torch.rand(9)
    (a, b, _, _), (a2, b2, _, _) = (path.coeffs(wide(path.at(1 - (hop + i) / 2), points[:, 0])) for i in (0, 1))
    x_t, x_s = points[rows, hop], points[rows, hop + 1]
    det = a * b2 - b * a2
    x0, eps = (b2 * x_t - b * x_s) / det, (a * x_s - a2 * x_t) / det
    tau = b2 / (a2 + b2) + wide(z, x0) * (b / (a + b) - b2 / (a2 + b2))
    t = path.time(torch.atan2(tau, 1 - tau)).flatten()
    point = (1 - tau) * x0 + tau * eps
    (c, d, _, _) = path.coeffs(wide(t, x0))
    hat, noise = nets["student"].pairs(point * (c + d), t, {})
    want = ((noise - hat) - (eps - x0)).pow(2).mean()
    assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    assert not nets["teacher"].log and m.steps == 2
    later = replace(m, done=1)
    later.loss(nets, batch, 0)
    assert len(nets["teacher"].log) == 6  # its own trajectories from noise: 2 windows of 3 steps
    with pytest.raises(ConfigError, match="3 windows need pairs of as many hops, not of 2"):
        Reflow(3, 3).loss(nets, batch, 0)


@every_path
def test_windows_start_from_noised_data_where_there_is_some(where):
    nets, m = toys(where, "posterior"), Reflow(2, 1)
    watched(nets["teacher"])
    batch = make_batch(40, Gaussian(30.0, 0.1))
    torch.manual_seed(3)
    m.loss(nets, batch, 0)
    (call,), path = nets["teacher"].log, nets["teacher"].path
    torch.manual_seed(3)
    torch.testing.assert_close(call.t, path.at(1 - torch.randint(0, 2, (40,)) / 2))
    a, s, _, _ = path.coeffs(wide(call.t, call.x))
    torch.testing.assert_close(call.x, a * batch.data + s * batch.script[0])
    assert [len(c.x) for c in nets["teacher"].log] == [40]
    nets["teacher"].log.clear()
    Reflow(1, 1).loss(nets, batch, 0)  # one window starts from pure noise, with data or without
    end = path.at(torch.ones(40))
    torch.testing.assert_close(nets["teacher"].log[0].x, batch.script[-1] * path.coeffs(wide(end, batch.data))[1])


def test_reflow_repeats_in_rounds_and_guides_the_first():
    stages = Reflow(1, 4, rounds=3, cfg_scale=2.5).stages(100)
    assert [(m.done, m.cfg_scale, n) for m, n in stages] == [(0, 2.5, 33), (1, None, 33), (2, None, 34)]
    teacher = Toy(LAW, RECTIFIED_FLOW, "velocity")
    config = FitConfig(iterations=2, batch=4, precision="float32")
    assert [s.stage for s in fit(Reflow(1, 2, rounds=2), LawSource(None, SHAPE), teacher, config)] == [0, 1]


def test_reflow_refuses_what_cannot_work():
    for bad in (Reflow(4).sampling, Reflow(3).sampling):
        with pytest.raises(ConfigError, match="windows are sampled in a multiple of"):
            bad(2)
    assert Reflow(4).sampling(8).times == even(8)
    settings: dict[str, Any]
    for settings in ({"windows": 0}, {"substeps": 0}, {"rounds": 0}):
        with pytest.raises(ConfigError, match="at least one window"):
            Reflow(**settings)


# --- BOSS -----------------------------------------------------------------------------------------------------------


@every_path
def test_boss_takes_the_times_that_stray_least(where):
    """Found once, the same every time, guided or not, and nearer to the teacher's fine steps than even ones."""
    source, teacher = LawSource(LAW, SHAPE, labelled=True), Toy([Mixture(), Gaussian(2.0, STD)], *PATHS[where])
    found = []
    for scale in (None, 4.0):
        m, state = BOSS(3, cfg_scale=scale, fine=40, count=30), torch.get_rng_state()
        found.append(m.settled(teacher, source))
        assert found[-1] == m.settled(teacher, source) and not m.ready and found[-1].ready
        assert found[-1].settled(teacher, source) is found[-1] and torch.equal(state, torch.get_rng_state())
        assert found[-1].at == best_times(teacher, source, 3, 40, 30, 25, scale, "cpu")
        assert found[-1] == replace(m, at=found[-1].at) and found[-1].sampling(3) == Sampling(found[-1].at)
    assert found[0].at != found[1].at
    noise, label = torch.randn(500, *SHAPE), {"label": torch.zeros(500, dtype=torch.long)}
    fine, ours, plain = (sample(teacher, noise, label, Sampling(u)) for u in (even(200), found[0].at, even(3)))
    far, before = (float((fine - s).pow(2).mean()) for s in (ours, plain))
    assert far < 0.9 * before


def test_boss_needs_no_search_for_one_step_or_for_all():
    assert BOSS(1).settled(None, None).at == even(1) and BOSS(5, fine=5).settled(None, None).at == even(5)


@every_path
def test_boss_is_trained_where_it_is_called_and_nowhere_else(where):
    nets, m = toys(where, "posterior"), BOSS(3, (1.0, 0.7, 0.2, 0.0), 2)
    watched(nets["student"])
    points = trajectory(nets["teacher"], without_data(make_batch(40, LAW)), 3, 2, None, m.at)
    m.loss(nets, Batch({}, {}, (40, *SHAPE), pairs=points, at=m.at), 0)
    (call,) = nets["student"].log
    torch.testing.assert_close(call.t.unique(), nets["student"].path.at(torch.tensor([0.2, 0.7, 1.0])))
    torch.testing.assert_close(call.x[call.t == call.t.max()], points[:, 0][call.t == call.t.max()])


def test_a_trajectory_is_kept_at_the_times_given():
    net = Toy(LAW, VP, "eps")
    watched(net)
    points = trajectory(net, make_batch(4, LAW), 2, 2, None, (1.0, 0.6, 0.0))
    assert points.shape == (4, 3, *SHAPE)
    assert [float(c.t[0]) for c in net.log] == pytest.approx([1.0, 0.8, 0.6, 0.3])
    torch.testing.assert_close(points[:, 1], net.log[2].x)


def test_boss_refuses_what_cannot_work():
    nets = toys("rf", "posterior")
    with pytest.raises(ConfigError, match=r"no times yet; train method = hasten.settled\(method, teacher\)"):
        BOSS(3).loss(nets, without_data(make_batch(4, LAW)), 0)
    for m in (BOSS(2, (1.0, 0.3, 0.0)), BOSS(2)):
        with pytest.raises(ConfigError, match="trained at the times of 2 steps; ask for those, not for 4"):
            m.sampling(4)
    points = trajectory(nets["teacher"], without_data(make_batch(4, LAW)), 2, 2, None)
    for at, hops in (((), 2), ((1.0, 0.4, 0.0), 2), ((1.0, 0.3, 0.0), 1)):
        with pytest.raises(ConfigError, match="BOSS needs pairs at its own 3 times; make_pairs takes them as at"):
            batch = Batch({}, {}, (4, *SHAPE), pairs=points[:, : hops + 1], at=at)
            BOSS(2, (1.0, 0.3, 0.0)).loss(nets, batch, 0)
    with pytest.raises(ConfigError, match="A trajectory of 3 hops has 4 times, not 3"):
        trajectory(nets["teacher"], without_data(make_batch(4, LAW)), 3, 2, None, (1.0, 0.3, 0.0))
    for bad in (
        (1.0, 0.5, 0.0),
        (1.0, 0.5, 0.5, 0.0),
        (1.0, 0.2, 0.6, 0.0),
        (0.9, 0.5, 0.2, 0.0),
        (1.0, 0.5, 0.2, 0.1),
    ):
        with pytest.raises(ConfigError, match="BOSS' 3 steps need 4 times falling from 1 to 0; without at"):
            BOSS(3, bad)
    settings: dict[str, Any]
    for settings in ({"steps": 0}, {"substeps": 0}, {"count": 0}, {"steps": 5, "fine": 4}):
        with pytest.raises(ConfigError, match="BOSS needs positive steps"):
            BOSS(**settings)


def test_boss_books():
    m, teacher = BOSS(3), Toy(LAW, VP, "eps")
    nets = m.networks(teacher, clone)
    assert sorted(nets) == ["student", "teacher"] and nets["teacher"] is teacher and nets["student"] is not teacher
    assert not m.needs_data and m.stages(17) == ((m, 17),) and m.sampling(3) == Sampling(even(3))
    assert [(t.trains, t.every) for t in m.turns] == [(("student",), 1)]


def test_what_boss_settled_is_kept_for_a_run_that_goes_on(tmp_path, monkeypatch):
    teacher, source = Toy(LAW, *PATHS["vp"], head=Affine()), LawSource(None, SHAPE)
    m, told = BOSS(3, fine=12, count=4), []
    found = settled(m, teacher, source, out=tmp_path, batch=3, tell=lambda *done: told.append(done))
    assert found == settled(m, teacher, source, batch=3) and told == [(3, 4), (4, 4)]
    assert settled(Reflow(), None) == Reflow() and settled(found, None) is found
    calls: list[BOSS] = []
    monkeypatch.setattr(BOSS, "settled", lambda self, *rest, **more: calls.append(self) or found)
    assert settled(m, teacher, source, out=tmp_path) == found and not calls
    settled(replace(m, count=5), teacher, source, out=tmp_path)  # another search, and another teacher
    settled(replace(m, count=5), Toy(LAW, *PATHS["vp"], head=Affine(std=0.1)), source, out=tmp_path)
    assert [c.count for c in calls] == [5, 5]
    (tmp_path / "settled.json").write_text("{")  # damaged by hand
    assert settled(m, teacher, source, out=tmp_path) == found and len(calls) == 3


# --- BOOT -----------------------------------------------------------------------------------------------------------


@every_path
def test_boot_shows_its_student_nothing_but_noise(where):
    """Data-free, and the teacher looks at the student's own points of the trajectory, never at noised samples."""
    nets, batch = toys(where, "map"), without_data(make_batch(50, LAW))
    watched(nets["student"], nets["teacher"])
    BOOT(0.1).loss(nets, batch, 0)
    path, calls = nets["student"].path, nets["student"].log
    end = path.at(torch.ones(50))
    x_1 = batch.script[0] * path.coeffs(wide(end, batch.script[0]))[1]
    for call in calls:
        assert torch.equal(call.t, end) and torch.equal(call.x, x_1)
    looked = nets["teacher"].log[0]
    torch.testing.assert_close(looked.t, calls[0].r)
    torch.testing.assert_close(looked.x, LAW.flow_map(path, x_1, end, looked.t), rtol=1e-4, atol=1e-5)
    assert len(batch.script) == 1


@every_path
def test_boot_is_first_order_in_its_gap(where):
    """At the exact flow map only the teacher's one DDIM step is wrong: the residual halves with the gap."""
    losses = []
    for gap in (0.02, 0.01, 0.005):
        torch.manual_seed(1)
        _, log = BOOT(gap).loss(toys(where, "map"), without_data(make_batch(400, LAW)), 0)
        losses.append(float(log["boot"]))
    assert losses[0] / losses[1] == pytest.approx(4, rel=0.3) and losses[1] / losses[2] == pytest.approx(4, rel=0.3)


@every_path
def test_boot_starts_at_the_teachers_first_look(where):
    """The boundary alone: y at the noisiest time is the teacher's x0 there, guided or not."""
    for scale in (None, 2.5):
        path, kind = PATHS[where]
        other = Gaussian(-0.5 * MEAN, STD)
        real = LAW if scale is None else shifted(LAW, other, scale)
        nets = {
            "student": Toy([real, real], path, kind, "map"),
            "teacher": Toy([LAW, other], path, kind).requires_grad_(False),
        }
        _, log = BOOT(cfg_scale=scale).loss(nets, without_data(make_batch(9, LAW, torch.zeros(9, dtype=torch.long))), 0)
        assert float(log["boundary"]) < 1e-9


def test_boot_books():
    m, teacher = BOOT(), Toy(LAW, VP, "eps")
    asked: list[bool] = []

    def copy(net: Any, second_time: bool = False) -> Any:
        asked.append(second_time)
        return clone(net, second_time)

    nets = m.networks(teacher, copy)
    assert asked == [True]
    assert sorted(nets) == ["student", "teacher"] and nets["teacher"] is teacher and nets["student"] is not teacher
    assert not m.needs_data and m.stages(17) == ((m, 17),)
    assert [(t.trains, t.every) for t in m.turns] == [(("student",), 1)]
    assert m.sampling(1) == Sampling((1.0, 0.0), "ode", two_time=True)
    with pytest.raises(ConfigError, match="one step; ask for 1, not 4"):
        m.sampling(4)
    settings: dict[str, Any]
    for settings in ({"gap": 0.0}, {"gap": 1.0}, {"boundary": 0.0}):
        with pytest.raises(ConfigError, match="BOOT's"):
            BOOT(**settings)


def test_a_recipe_refuses_step_counts_before_it_trains():
    assert parse({"method": "boot", "teacher": "x", "steps": 1}).steps == (1,)
    with pytest.raises(ConfigError, match="steps: BOOT makes its samples in one step|recipe: BOOT makes"):
        parse({"method": "boot", "teacher": "x"})
    assert parse({"method": "perflow", "teacher": "x", "steps": 8}).method == Reflow(8, 8)
    with pytest.raises(ConfigError, match="a multiple of 4 steps, not 6"):
        parse({"method": {"name": "reflow", "windows": 4}, "teacher": "x", "steps": [4, 6]})
    assert parse({"method": {"name": "reflow", "windows": 4}, "teacher": "x", "steps": 4, "pairs": 5}).method.steps == 4


# --- guidance distillation ------------------------------------------------------------------------------------------


@every_path
def test_guidance_is_built_into_one_call(where):
    """Two guided calls a step become one: the trained student alone samples N(mu_u + w (mu_c - mu_u), s^2)."""
    cond, other = Gaussian(0.6, 0.45), Gaussian(-0.3, 0.45)
    teacher = Toy([cond, other], *PATHS[where], head=Affine(3))
    config = FitConfig(150, 64, lr=0.05, schedule="cosine", ema=(0.9,), clip=10, precision="float32")
    m = GuidanceDistillation(2.0, Uniform(0.01, 1.0))
    torch.manual_seed(0)
    *_, last = fit(m, LawSource(cond, labelled=True), teacher, config)
    label = {"label": torch.zeros(256, dtype=torch.long)}
    noise = torch.randn(256, 1, 1, 4)
    watched(last.student)
    got = sample(last.student, noise, label, m.sampling(24))
    assert len(last.student.log) == 24 and {c.n for c in last.student.log} == {256}
    twice = Sampling(even(24), cfg_scale=2.0)
    want = sample(
        Toy([cond, other], *PATHS[where]), noise, label, twice, uncond={"label": torch.ones_like(label["label"])}
    )
    plain = sample(Toy([cond, other], *PATHS[where]), noise, label, Sampling(even(24)))
    assert float((got - want).pow(2).mean().sqrt()) < float((plain - want).pow(2).mean().sqrt()) / 5


def test_guidance_distillation_wants_a_scale():
    with pytest.raises(ConfigError, match="needs cfg_scale"):
        GuidanceDistillation().networks(Toy(LAW, VP, "eps"), clone)
    with pytest.raises(ConfigError, match="nothing to distil"):
        GuidanceDistillation(1.0)


# --- IMM ------------------------------------------------------------------------------------------------------------


def test_the_gradient_of_mmd():
    """d/dx_i = 2/M^2 sum_j [k(x_i, y_j) (x_i - y_j)/|x_i - y_j| - k(x_i, x_j) (x_i - x_j)/|x_i - x_j|] / width."""
    x, y, width = torch.randn(3, 4, 5).requires_grad_(), torch.randn(3, 4, 5), torch.tensor([0.5, 2.0, 7.0])
    got = torch.autograd.grad(mmd(x, y, width).sum(), x)[0]
    want = torch.zeros_like(got)
    with torch.no_grad():
        for g in range(3):
            for i in range(4):
                for sign, others in ((1, y[g]), (-1, x[g])):
                    for other in others:
                        d = x[g, i] - other
                        far = d.norm()
                        if far > 0:
                            want[g, i] += sign * 2 / 16 * torch.exp(-far / width[g]) * d / far / width[g]
    torch.testing.assert_close(got, want)
    assert float(mmd(y, y, width).abs().max()) < 1e-7 and float(mmd(x.detach(), y, width).min()) > 0


def test_particles_repel_and_one_does_not():
    """Why IMM keeps apart what consistency models may collapse: two equal targets pull, the other particle pushes."""
    x = torch.tensor([[[0.3], [0.1]]]).requires_grad_()
    y, width = torch.tensor([[[5.0], [-5.0]]]), torch.tensor([0.5])
    pushed = torch.autograd.grad(mmd(x, y, width).sum(), x)[0].flatten()
    assert pushed[0] < 0 < pushed[1]  # descent parts them
    alone = x[:, :1].detach().requires_grad_()
    pulled = torch.autograd.grad(mmd(alone, torch.tensor([[[0.1]]]), width).sum(), alone)[0]
    assert float(pulled) == pytest.approx(2 / 0.5 * float(torch.exp(torch.tensor(-0.2 / 0.5))))  # towards its target


@every_path
def test_one_particle_is_a_consistency_model(where):
    """With M = 1 the loss is 2 w(t) (1 - k(x, y)): how far two answers on one trajectory are apart."""
    nets = toys(where, "map", truth=Gaussian(0.7 * MEAN, 0.9 * STD))
    batch, m = make_batch(20, LAW), IMM(Angles(((0.9, 0.4, 1.3),)), 1, 8)
    torch.manual_seed(4)
    got, _ = m.loss(nets, batch, 0)
    torch.manual_seed(4)
    torch.randn(batch.shape)
    t = torch.tan(torch.tensor([0.9, 0.4, 1.3] * 7)[:20])
    t = t / (1 + t)
    s = t * torch.rand(20)
    eta = (t / (1 - t) - 160 / 2**8).clamp_min(0)
    r = torch.maximum(s, eta / (1 + eta))
    assert bool((r > s).any()) and bool((r == s).any())
    law, ends = Gaussian(0.7 * MEAN, 0.9 * STD), []
    for u in (t, r):
        x = wide(1 - u, batch.data) * batch.data + wide(u, batch.data) * batch.script[0]
        ends.append(law.flow_map(RECTIFIED_FLOW, x, u, s))
    far = (ends[0] - ends[1]).flatten(1).norm(dim=1)
    weight = torch.sigmoid(5 - 2 * torch.log((1 - t) / t)) / (t * (1 - t)) * (1 - t) / ((1 - t) ** 2 + t**2)
    want = (weight * 2 * (1 - torch.exp(-far / (6 * (t - s))))).mean()
    assert float(got.detach()) == pytest.approx(float(want), rel=1e-4)


@every_path
def test_the_mean_gradient_of_imm_is_zero_at_the_truth(where):
    """Within 4 standard errors; and it is seen when the student is wrong."""

    def studentised(nets: dict[str, Any]) -> Tensor:
        m = IMM(Uniform(0.2, 0.9), 4, 14)
        g = torch.stack([gradients(m.loss(nets, make_batch(192, LAW), 0)[0], nets["student"]) for _ in range(24)])
        return g.mean(0) / (g.std(0) / 24**0.5 + 1e-6)

    torch.manual_seed(0)
    nets = toys(where, "map")
    assert float(studentised(nets).abs().max()) < 4
    with torch.no_grad():
        nets["student"].head.weight[0, 0] = 0.3
    assert float(studentised(nets).abs().max()) > 6


def test_r_is_a_constant_decrement_of_eta():
    m = IMM(k=12, gap=1e-4)
    t = torch.tensor([0.5, 0.9, 0.5, 0.02, 0.994])
    s = torch.tensor([0.1, 0.0, 0.499, 0.0, 0.5])
    r = m.earlier(t, s)
    step = 160 / 4096
    assert (t[:2] / (1 - t[:2]) - r[:2] / (1 - r[:2])).tolist() == pytest.approx([step, step])
    assert float(r[2]) == 0.499 and float(r[3]) == 0.0  # never earlier than s
    assert float(t[4] - r[4]) == pytest.approx(1e-4)  # where the decrement is below the gap
    grid = torch.linspace(0.002, 0.998, 200)
    assert bool((m.earlier(grid, 0.5 * grid) < grid).all())


def test_a_group_shares_its_times_and_a_batch_divides_into_groups():
    nets = toys("rf", "map")
    watched(nets["student"])
    IMM(particles=4).loss(nets, make_batch(12, LAW), 0)
    ahead, behind = nets["student"].log
    assert ahead.grad and not behind.grad and torch.equal(ahead.r, behind.r)
    for times in (ahead.t, ahead.r, behind.t):
        assert [len(set(group)) for group in times.reshape(3, 4).tolist()] == [1, 1, 1] and len(times.unique()) == 3
    with pytest.raises(ConfigError, match="10 samples do not divide into groups of 4"):
        IMM().loss(nets, make_batch(10, LAW), 0)
    settings: dict[str, Any]
    for settings in ({"particles": 0}, {"gap": 0.0}, {"gap": 0.1}):
        with pytest.raises(ConfigError, match="IMM"):
            IMM(**settings)


def test_imm_drops_the_same_conditions_on_both_sides():
    seen: list[Tensor] = []

    class Spy(Toy):
        def forward(self, x_t, t, cond, *, r=None, taps=()):
            seen.append(cond["label"])
            return super().forward(x_t, t, cond, r=r, taps=taps)

    net, labels = (
        Spy([LAW, Gaussian(-1.0, 0.2)], RECTIFIED_FLOW, "velocity", "map"),
        torch.zeros(2000, dtype=torch.long),
    )
    IMM(drop=0.3).loss({"student": net}, make_batch(2000, LAW, labels), 0)
    assert torch.equal(seen[0], seen[1]) and float(seen[0].double().mean()) == pytest.approx(0.3, abs=0.04)
