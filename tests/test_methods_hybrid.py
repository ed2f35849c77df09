"""The hybrids' critics and stages, and of each what its paper is known for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.core.denoiser import Batch, on_path
from hasten.core.errors import ConfigError
from hasten.core.generate import FewStep
from hasten.core.path import RECTIFIED_FLOW
from hasten.core.sample import sample
from hasten.core.tangent import unit_tangent
from hasten.core.times import Uniform
from hasten.distribute import clone
from hasten.fit import fit
from hasten.methods.hyper import HyperSD
from hasten.methods.rcm import RCM
from hasten.methods.sprint import Sprint
from hasten.methods.twinflow import TwinFlow
from hasten.models.dit import DiT, DiTConfig
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
    Toy,
    make_batch,
    shifted,
    toys,
    watched,
)
from tests.oracle import Gaussian, wide
from tests.proofs.common import ONE, Run, gradients
from tests.test_methods import _float64  # noqa: F401
from tests.test_methods_train import GAUSSIAN, error

every_path = pytest.mark.parametrize("where", PATHS)
PLAIN = FitConfig(iterations=1, batch=64, lr=0.02, schedule="cosine", ema=(0.9,), clip=10, precision="float32")

# --- critics --------------------------------------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize("method", [RCM(compare=ONE, generate=FewStep()), HyperSD(times=ONE, segments=0)], ids=str)
def test_the_fake_of_a_hybrid_learns_the_students_samples(method, where):
    """Weight 1/sin^2 t on the x0 error (rCM's code), t being an angle; the student is left alone."""
    nets = toys(where, "jump", truth=Gaussian(0.5 * MEAN, STD))
    nets["fake"].head = Affine(std=0.2)
    batch = make_batch(7, LAW)
    got, _ = method.critic(nets, batch, 0)
    path, (z, eps) = nets["fake"].path, batch.script
    end, angle = path.at(torch.ones(7)), torch.tensor(ONE.draws[0])
    t = path.time(angle)
    x = nets["student"].pairs(z * path.coeffs(wide(end, z))[1], end, {})[0].detach()
    a, s, _, _ = path.coeffs(wide(t, x))
    fake = nets["fake"].pairs(a * x + s * eps, t, {})[0]
    want = ((fake - x) ** 2 / torch.sin(wide(angle, x)) ** 2).mean()
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-4)
    torch.testing.assert_close(gradients(got, nets["fake"]), gradients(want, nets["fake"]), rtol=1e-4, atol=1e-6)
    assert float(gradients(got, nets["student"]).abs().max()) == 0


@every_path
def test_the_discriminator_of_sprint(where):
    """Hinge on the frozen teacher's features of noised samples and noised data; nothing but the heads learns."""
    nets, batch = toys(where, "jump", truth=Gaussian(0.5 * MEAN, STD)), make_batch(7, LAW)
    back = Angles((ONE.draws[0][::-1],))
    got, _ = Sprint(ONE, back, largest=0.0).critic(nets, batch, 0)
    path, (eps, first, second) = nets["teacher"].path, batch.script
    t = path.time(torch.tensor(ONE.draws[0]))
    a, s, _, _ = path.coeffs(wide(t, eps))
    x = nets["student"].pairs(a * batch.data + s * eps, t, {})[0].detach()
    t = t.flip(0)
    a, s, _, _ = path.coeffs(wide(t, eps))
    look = lambda x, noise: LAW.posterior(path, a * x + s * noise, t)[0].flatten(1) @ nets["disc"].w  # noqa: E731
    want = (1 + look(x, first)).clamp_min(0).mean() + (1 - look(batch.data, second)).clamp_min(0).mean()
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    torch.testing.assert_close(gradients(got, nets["disc"]), gradients(want, nets["disc"]), rtol=1e-4, atol=1e-6)
    assert float(gradients(got, nets["student"]).abs().max()) == 0


# --- a real network -------------------------------------------------------------------------------------------------

METHODS = {
    "rcm": RCM(cfg_scale=2.0, warmup=0),
    "sprint": Sprint(cfg_scale=2.0),
    "hyper": HyperSD(cfg_scale=2.0),
    "hyper_dmd": HyperSD(cfg_scale=2.0, segments=0),
    "twinflow": TwinFlow(cfg_scale=2.0),
}


@pytest.mark.parametrize("autocast", [False, True])
@every_path
@pytest.mark.parametrize("name", METHODS)
def test_a_hybrid_trains_a_dit(name, where, autocast):
    """Conditions and guidance, every turn, in float32 and under autocast: what it trains gets a finite gradient."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    teacher = DiT(DiTConfig(size=(4, 4), width=16, depth=2, heads=2, classes=3), *PATHS[where])
    for p in teacher.parameters():
        nn.init.normal_(p, std=0.1)
    nets = METHODS[name].networks(teacher.requires_grad_(False), clone)
    assert nets["student"].config.second_time == (name == "twinflow")
    label = torch.tensor([0, 1, 2, 0, 1, 2])
    x0 = torch.randn(6, 1, 4, 4)
    batch = Batch({"label": label}, {"label": torch.full_like(label, 3)}, tuple(x0.shape), x0=x0)
    for turn in METHODS[name].turns:
        for net in nets.values():
            net.requires_grad_(False)
        params = [p for k in turn.trains for p in nets[k].requires_grad_(True).parameters()]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, log = turn.loss(nets, batch, 5000)
        grads = [g for g in torch.autograd.grad(loss, params, allow_unused=True) if g is not None]
        assert all(bool(g.isfinite().all()) for g in grads) and any(float(g.abs().max()) > 0 for g in grads)
        assert all(bool(v.isfinite()) for v in log.values())


# --- rCM ------------------------------------------------------------------------------------------------------------


def test_rcm_rolls_out_one_to_four_steps_and_trains_the_last():
    nets, counts = toys("rf", "jump"), []
    for _ in range(120):
        watched(nets["student"])
        RCM().matching(nets, make_batch(2, LAW))
        assert [c.grad for c in nets["student"].log] == [False] * (len(nets["student"].log) - 1) + [True]
        counts.append(len(nets["student"].log))
    assert [counts.count(k) / 120 for k in (1, 2, 3, 4)] == pytest.approx([0.25] * 4, abs=0.12)


def test_rcm_matches_distributions_only_after_the_warm_up():
    nets = toys("rf", "jump")
    watched(nets["fake"])
    assert "dmd" not in RCM(warmup=5).student(nets, make_batch(4, LAW), 4)[1] and not nets["fake"].log
    assert "dmd" in RCM(warmup=5).student(nets, make_batch(4, LAW), 5)[1] and nets["fake"].log


@pytest.mark.parametrize("shape", [(1, 2, 3), (1, 60, 60)])
@pytest.mark.parametrize("method", [RCM, Sprint])
def test_the_consistency_loss_is_below_one_however_wrong_the_student_is(method, shape):
    """The Euclidean norm of the tangent, summed over the dimensions: |g|^2 < 1, so that any D weighs as much."""
    law, method = Gaussian(0.3, 0.5), method(times=Angles(((torch.pi / 4,),)), warmup=0)  # Sprint's 1/tan t is 1 there
    student, teacher = (Toy(law, RECTIFIED_FLOW, "velocity", "jump", Affine(std=s)) for s in (50.0, 0.0))
    nets = {"student": student, "teacher": teacher, "logvar": torch.zeros_like}
    assert 0.9 < float(method.consistency(nets, make_batch(7, law, shape=shape), 0).detach()) < 1
    g = torch.full((2, *shape), 0.1)
    torch.testing.assert_close(unit_tangent(g, 0.2), g / (0.1 * g[0].numel() ** 0.5 + 0.2))


def test_one_loss_alone_is_no_rcm():
    bad: dict[str, Any]
    for bad in ({"scm_weight": 0.0}, {"dmd_weight": 0.0}):
        with pytest.raises(ConfigError, match="scm or dmd2"):
            RCM(**bad)


# --- SANA-Sprint ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_sprint_judges_half_of_its_samples_from_the_largest_time(share):
    nets = toys("edm", "jump")
    watched(nets["student"])
    Sprint(largest=share).generated(nets["student"], make_batch(1000, LAW))
    assert float((nets["student"].log[0].t == 80.0).double().mean()) == pytest.approx(share, abs=0.06)


def test_sprint_trains_heads_and_no_copy_of_the_teacher():
    teacher = Toy(LAW, RECTIFIED_FLOW, "velocity", head=Affine(std=0.1))
    before = [p.clone() for p in teacher.parameters()]
    config = replace(PLAIN, iterations=3, batch=8)
    *_, last = fit(Sprint(), LawSource(LAW, SHAPE), teacher, config)
    assert Sprint().networks(teacher, clone)["disc"].apart == "tokens"  # as in the authors' code
    assert sorted(last.roles) == ["disc", "logvar", "student"] and not hasattr(last.roles["disc"].net, "path")
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    assert all(p.grad is None for p in teacher.parameters())


def test_sprints_taps_are_spread_over_the_depth():
    class Deep(Toy):
        @property
        def blocks(self) -> Any:
            return [nn.Identity()] * 20

    assert Sprint().tapped(Deep(LAW, RECTIFIED_FLOW, "velocity")) == (4, 9, 14, 19)
    assert Sprint().tapped(Toy(LAW, RECTIFIED_FLOW, "velocity")) == (0, 1)
    assert Sprint(taps=(3,)).tapped(Deep(LAW, RECTIFIED_FLOW, "velocity")) == (3,)


def test_sprint_refuses_settings_that_cannot_work():
    bad: dict[str, Any]
    for bad in ({"gan_weight": 0.0}, {"largest": 1.5}):
        with pytest.raises(ConfigError):
            Sprint(**bad)


# --- Hyper-SD -------------------------------------------------------------------------------------------------------


def test_hyper_halves_its_segments_and_matches_distributions_at_the_end():
    stages = HyperSD(cfg_scale=3.0).stages(100)
    assert [m.segments for m, _ in stages] == [8, 4, 2, 1, 0] and stages[-1][1] == 25
    assert sum(n for _, n in stages) == 100 and {m.cfg_scale for m, _ in stages} == {3.0}
    assert [m.segments for m, _ in HyperSD(8, 2).stages(90)] == [8, 4, 2]
    assert [n for _, n in HyperSD(2, 1, dmd_share=0.5).stages(40)] == [10, 10, 20]
    assert [m.segments for m, _ in HyperSD(4, 1, dmd_share=0.0).stages(9)] == [4, 2, 1]
    bad: dict[str, Any]
    for bad in ({"start": 6, "end": 4}, {"end": 16}, {"end": 0}, {"solver_steps": 8}, {"solver_steps": 60},
                {"end": 2, "dmd_share": 0.1}, {"dmd_share": 1.0}):  # fmt: skip
        with pytest.raises(ConfigError, match="HyperSD"):
            HyperSD(**bad)


def test_a_target_stays_in_its_segment():
    """The student is asked below t, at s and never below the end of t's segment."""
    for k in (1, 2, 4):
        nets = toys("rf", "posterior")
        watched(nets["student"], nets["teacher"])
        HyperSD(4, 1, 16, segments=k).loss(nets, make_batch(200, LAW), 0)
        (below, here), t = nets["student"].log, nets["teacher"].log[0].t
        torch.testing.assert_close(here.t, t)
        # where t is the first point of its segment, the teacher's step ends it and the student is asked nothing new
        first = torch.isclose((16 * t) % (16 / k), torch.ones_like(t)) | torch.tensor(k == 16)
        torch.testing.assert_close(below.t, torch.where(first, t, t - 1 / 16))


def stages_of(method: Any, monkeypatch: Any, iterations: int, teacher: Any) -> list[Any]:
    """(networks, the student's weights at the start, its average at the end) of each stage."""
    seen, made = [], type(method).loss

    def spy(self: Any, nets: Any, batch: Any, step: int) -> Any:
        if not seen or seen[-1][0] is not nets:
            seen.append((nets, nets["student"].head.weight.detach().clone(), []))
        return made(self, nets, batch, step)

    monkeypatch.setattr(type(method), "loss", spy)
    for step in fit(method, LawSource(LAW, SHAPE), teacher, replace(PLAIN, iterations=iterations, batch=8)):
        seen[-1][2].append(step.student.head.weight.detach().clone())
    return seen


def test_every_stage_has_the_original_teacher_and_starts_from_the_last_average(monkeypatch):
    teacher: Any = Toy(LAW, RECTIFIED_FLOW, "velocity", head=Affine(std=0.1))
    original = teacher.head.weight.detach().clone()
    one, two, three = stages_of(HyperSD(4, 1, dmd_share=0.0), monkeypatch, 12, teacher)
    assert all(nets["teacher"] is teacher for nets, _, _ in (one, two, three))
    assert torch.equal(teacher.head.weight, original) and torch.equal(one[1], original)
    for before, after in ((one, two), (two, three)):
        assert torch.equal(after[1], before[2][-1]) and not torch.equal(before[2][-1], before[1])


def test_a_later_stage_resumes_bit_for_bit(tmp_path):
    def weights(out: Any, stop: int | None) -> Tensor:
        torch.manual_seed(3)
        teacher = Toy(LAW, RECTIFIED_FLOW, "velocity", head=Affine(std=0.1))
        config, last = replace(PLAIN, iterations=8, batch=8, save_every=1, lrs={"fake": 0.1}), None
        for last in fit(HyperSD(2, 1, student_every=1), LawSource(LAW, SHAPE), teacher, config, out=out):
            if last.index == stop:
                break
        assert last is not None
        return last.student.head.weight.detach().clone()

    whole = weights(tmp_path / "whole", None)
    for stop in (4, 7):  # in the second stage of consistency, and in distribution matching
        weights(tmp_path / str(stop), stop)
        assert torch.equal(weights(tmp_path / str(stop), None), whole)


def test_two_segments_are_two_steps_of_the_teachers_trajectory():
    torch.manual_seed(0)
    teacher = Toy(GAUSSIAN, RECTIFIED_FLOW, "velocity", "posterior", Affine(3))
    method = HyperSD(2, 2, 32)
    run = Run(method, steps=2)
    before = error(teacher, run, GAUSSIAN)
    *_, last = fit(method, LawSource(GAUSSIAN), teacher, replace(PLAIN, iterations=150, lr=0.05))
    assert error(last.student, run, GAUSSIAN) < before / 3


@every_path
def test_distribution_matching_removes_what_the_solver_left(where):
    """Four teacher steps end at another law; the last stage compares with the original teacher's score."""
    torch.manual_seed(0)
    teacher = Toy(GAUSSIAN, *PATHS[where], "posterior", Affine(3))
    method = HyperSD(1, 1, 4, dmd_share=0.7, student_every=3)
    run, errors = Run(method, law=True), []
    config = replace(PLAIN, iterations=320, lr=0.005, lrs={"fake": 0.05})
    for step in fit(method, LawSource(GAUSSIAN), teacher, config):
        if step.index in (96, step.total):
            errors.append(error(step.student, run, GAUSSIAN))
    assert errors[1] < 0.6 * errors[0]


# --- TwinFlow -------------------------------------------------------------------------------------------------------


class Twins(Toy):
    """u(x, t, r): at r > t the velocity of ``own``, else that of the base."""

    own = Gaussian(0.5 * MEAN + 0.3, 1.3 * STD)

    def pair(self, law: Any, x: Tensor, t: Tensor, r: Tensor | None) -> tuple[Tensor, Tensor]:
        x0, eps = law.posterior(self.path, x, t)
        twin = (wide(t if r is None else r, x) > wide(t, x) + 1e-9).expand_as(x)
        other = self.own.posterior(self.path, x, t)
        return torch.where(twin, other[0], x0), torch.where(twin, other[1], eps)


@every_path
def test_twinflow_rectifies_by_minus_dmds_difference_over_t(where):
    """u_fake - u_real = -(D_fake - D_real)/t on rectified flow, and as a sample is x_1 - u, it moves to the data."""
    net = on_path(Twins(LAW, *PATHS[where]), RECTIFIED_FLOW, "velocity")
    method, batch = TwinFlow(ONE, limit=100.0), make_batch(7, LAW)
    x, end = Twins.own.draw((7, *SHAPE)), net.path.at(torch.ones(7))
    got = method.difference(net, x, end, batch)
    t = torch.tan(torch.tensor(ONE.draws[0]))
    t = wide(t / (1 + t), x)
    x_t = (1 - t) * x + t * batch.script[0]
    v_r, v_f = (1 - t) ** 2 * STD**2 + t**2, (1 - t) ** 2 * Twins.own.std**2 + t**2
    gap = t**2 / (1 - t) * ((x_t - (1 - t) * MEAN) / v_r - (x_t - (1 - t) * Twins.own.mean) / v_f)
    torch.testing.assert_close(got, -gap / t, rtol=1e-4, atol=1e-5)
    z = Twins.own.draw((4000, *SHAPE))
    many, ends = make_batch(4000, LAW), net.path.at(torch.ones(4000))
    step = TwinFlow(Uniform(0.1, 0.9), limit=100.0).difference(net, z, ends, many).mean(0)
    assert float((step * (MEAN - Twins.own.mean)).sum()) > 0.2


class OwnHead(Toy):
    """The learnt part acts on label 0 alone, so that the unconditional prediction stays what it was."""

    def pairs(self, x: Tensor, t: Tensor, cond: Any, r: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x0, eps = super().pairs(x, t, cond, r)
        other: Any = self.laws[1]
        plain = other.posterior(self.path, x, t)
        un = (cond["label"] == 1).reshape(-1, 1, 1, 1)
        return torch.where(un, plain[0], x0), torch.where(un, plain[1], eps)


def test_twinflow_guides_itself_to_the_guided_law():
    """u = v + (1 - 1/w)(u - u_u) has the fixed point u_u + w (v - u_u): the shifted Gaussian, without a teacher."""
    torch.manual_seed(0)
    other = Gaussian(-0.3, 0.45)
    truth = shifted(GAUSSIAN, other, 2.0)
    teacher = OwnHead([GAUSSIAN, other], *PATHS["edm"], "posterior", Affine(3))
    method = TwinFlow(cfg_scale=2.0)
    run = Run(method, law=True)
    before = error(teacher, run, truth)
    *_, last = fit(method, LawSource(GAUSSIAN, labelled=True), teacher, replace(PLAIN, iterations=240))
    assert error(last.student, run, truth) < before / 3
    assert error(last.student, run, GAUSSIAN) > before / 3


def test_the_twin_leads_to_the_networks_own_samples():
    """One network learns two flows: at r = 1 the velocity is that of its one-step samples, not of the data."""
    torch.manual_seed(0)
    teacher: Any = Toy(GAUSSIAN, RECTIFIED_FLOW, "velocity", "posterior", Affine(3))
    with torch.no_grad():
        teacher.head.weight[0, 0] = 0.8  # the first samples are far from the data
    method = TwinFlow(match_weight=0.0)
    *_, last = fit(method, LawSource(GAUSSIAN), teacher, replace(PLAIN, iterations=250))
    net: Any = last.student
    z = torch.randn(4000, 1, 1, 4)
    x = sample(net, z, {}, method.sampling(1))
    own = Gaussian(float(x.mean()), float(x.std()))
    x_t, t, end = 0.5 * x + 0.5 * torch.randn_like(x), torch.full((4000,), 0.5), torch.ones(4000)
    twin = net(x_t, t, {}, r=end)
    assert float((twin - own.velocity(RECTIFIED_FLOW, x_t, t)).pow(2).mean().sqrt()) < 0.15
    assert sum(len(list(r.net.parameters())) for r in last.roles.values()) == 1 and list(last.roles) == ["student"]


def test_twinflow_takes_any_number_of_steps():
    torch.manual_seed(0)
    teacher = Toy(GAUSSIAN, RECTIFIED_FLOW, "velocity", "posterior", Affine(3))
    method = TwinFlow()
    *_, last = fit(method, LawSource(GAUSSIAN), teacher, replace(PLAIN, iterations=250))
    for steps in (1, 2, 4):
        run = Run(method, steps, law=True)
        assert error(last.student, run, GAUSSIAN) < 0.15
    assert error(teacher, Run(method, 1, law=True), GAUSSIAN) > 0.4


def test_twinflow_refuses_what_cannot_work():
    nets = {"student": clone(Toy(LAW, RECTIFIED_FLOW, "velocity"), second_time=True)}
    with pytest.raises(ConfigError, match="four parts"):
        TwinFlow().loss(nets, make_batch(3, LAW), 0)
    assert TwinFlow().loss(nets, make_batch(4, LAW), 0)[0].requires_grad
    bad: dict[str, Any]
    for bad in ({"order": 0}, {"gap": 0.0}, {"cfg_scale": 0.5}):
        with pytest.raises(ConfigError, match="TwinFlow"):
            TwinFlow(**bad)
