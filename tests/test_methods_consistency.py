"""Consistency models and their relatives: schedules, stages, orders, and what each paper is known for."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import scipy.stats
import torch

from hasten.core.errors import ConfigError
from hasten.core.path import EDM, RECTIFIED_FLOW, VP
from hasten.core.sample import sample
from hasten.core.times import LogNormal, LogStudentT, Uniform
from hasten.fit import fit
from hasten.methods.cm import CM
from hasten.methods.ctm import CTM
from hasten.methods.pcm import PCM
from hasten.methods.tcm import TCM
from hasten.models.dit import DiT, DiTConfig
from hasten.role import FitConfig
from tests.analytic import LAW, PATHS, SHAPE, Angles, LawSource, Toy, make_batch, toys, watched
from tests.oracle import Gaussian
from tests.proofs.common import gradients
from tests.test_methods import _float64  # noqa: F401
from tests.test_methods_mean import studentised
from tests.test_path import SD

every_path = pytest.mark.parametrize("where", PATHS)

# --- iCT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [RECTIFIED_FLOW, VP, EDM], ids=lambda p: p.name)
def test_ict_discretises_the_log_normal(path):
    """p(sigma_i) is proportional to erf((ln sigma_i+1 - m)/(sqrt 2 s)) - erf((ln sigma_i - m)/(sqrt 2 s))."""
    method, draws = CM(schedule="ict", double_every=100), 40_000
    torch.manual_seed(0)
    t, late, early = method.ends(path, LogNormal(-1.1, 2.0).draw(path, draws), 150)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    grid = [(low + i / 20 * (high - low)) ** 7 for i in range(21)]  # N(150) = 10 * 2^1 + 1
    z = [math.erf((math.log(sigma) + 1.1) / (math.sqrt(2) * 2.0)) for sigma in grid]
    for i in range(20):
        mine = (late - grid[i + 1]).abs() < 1e-4 * grid[i + 1]
        want = (z[i + 1] - z[i]) / (z[-1] - z[0])
        assert float(mine.double().mean()) == pytest.approx(want, abs=0.008)
        torch.testing.assert_close(early[mine], torch.full_like(early[mine], grid[i] if i else 0.0), rtol=1e-4, atol=0)
    a, s, _, _ = path.coeffs(t)
    torch.testing.assert_close(s / a, late, rtol=1e-4, atol=0)


def test_ict_doubles_its_grid_and_stops():
    method, t = CM(schedule="ict", double_every=100, doublings=3, intervals=5), EDM.at(torch.linspace(0, 1, 9001))
    for step, count in ((0, 5), (99, 5), (100, 10), (399, 40), (5000, 40)):
        assert len(set(method.ends(EDM, t, step)[1].tolist())) == count
    ((resolved, length),) = CM(schedule="ict", double_every=0).stages(1001)
    assert (resolved.double_every, length) == (1001 // 8, 1001)  # K' = K / (log2(s1/s0) + 1)


def test_ict_ends_where_the_path_ends():
    """Stable Diffusion's table ends at sigma/alpha = 14.6."""
    t, late, early = CM(schedule="ict").ends(SD, SD.at(torch.tensor([0.3, 0.999, 1.0])), 0)
    assert bool((early < late).all()) and float(late.max()) == pytest.approx(14.6, rel=0.01)
    a, s, _, _ = SD.coeffs(t)
    torch.testing.assert_close(s / a, late, rtol=1e-4, atol=0)


# --- PCM ------------------------------------------------------------------------------------------------------------


class Phased(Toy):
    """The exact phased consistency function: lands at the start of the phase of t, of ``phases`` on unit times."""

    phases = 2

    def forward(self, x_t: Any, t: Any, cond: Any, *, r: Any = None, taps: Any = ()) -> Any:
        edges = self.path.at(torch.arange(self.phases) / self.phases).to(t)
        at = torch.searchsorted(edges, t - 1e-9 * t) - 1
        return super().forward(x_t, t, cond, r=edges[at.clamp_min(0)], taps=taps)


@every_path
def test_the_exact_phased_function_solves_pcm_and_samples_the_flow(where):
    """Its residual is the local error of one teacher hop, O(hop^2); LCM's function does not solve it."""
    nets, losses = toys(where, "map"), []
    nets["student"] = Phased(LAW, *PATHS[where], "map")
    for hops in (32, 64):
        torch.manual_seed(0)
        losses.append(float(PCM(2, hops, huber=0.0).loss(nets, make_batch(4000, LAW), 0)[0].detach()))
    assert losses[0] / losses[1] == pytest.approx(4, rel=0.2)
    other = {**nets, "student": Toy(LAW, *PATHS[where], "jump")}
    assert float(PCM(2, 64, huber=0.0).loss(other, make_batch(4000, LAW), 0)[0].detach()) > 10 * losses[1]
    noise = torch.randn(50, *SHAPE)
    end = noise * nets["student"].path.coeffs(torch.tensor(nets["student"].path.t_max))[1]
    got = sample(nets["student"], noise, {}, PCM(2).sampling(2))
    torch.testing.assert_close(got, LAW.flow_map(nets["student"].path, end, nets["student"].path.t_max, 0.0))


# --- CTM ------------------------------------------------------------------------------------------------------------


@every_path
def test_the_exact_map_solves_soft_consistency_up_to_the_solver(where):
    """Heun's local error is O(h^3), so the squared error of one step falls as h^6."""
    errors = []
    for grid in (24, 48):
        torch.manual_seed(0)
        nets = toys(where, "map")
        value = CTM(grid, 1).consistency(nets, make_batch(3000, LAW)).detach()
        errors.append(float(value))
    assert errors[0] / errors[1] > 25 and errors[1] < 1e-4


@every_path
def test_the_student_of_ctm_is_the_denoiser_where_s_is_t(where):
    method = CTM(8, 1, times=Uniform(0.15, 0.9), noisy=Uniform(0.3, 0.9))
    for shift in (0.0, 0.3):
        nets = toys(where, "map")
        with torch.no_grad():
            nets["student"].head.weight[0, 0] = shift

        class Denoising:
            def loss(self, nets, batch, step):
                return method.denoising(nets, batch), {}

        z = float(studentised(nets, (Denoising(), "map", "loss", "student", 0)).abs().max())
        assert z < 4 if shift == 0 else z > 6


def test_ctm_solves_long_stretches_more_often_and_never_passes_u():
    nets, counts = toys("rf", "map"), [0, 0, 0]
    random.seed(1)
    torch.manual_seed(1)
    for _ in range(600):
        watched(nets["student"], nets["teacher"])
        CTM(4, 3).consistency(nets, make_batch(2, LAW))
        hops = len(nets["teacher"].log) // 2
        counts[hops - 1] += 1
        inner, last = nets["student"].log[0], nets["teacher"].log[-1]
        assert bool((inner.t == last.t).all()) and bool((inner.r <= inner.t).all())
        t, s = nets["student"].log[2].t, nets["student"].log[2].r
        torch.testing.assert_close(inner.t, (t - hops / 4).clamp_min(1e-3))
        torch.testing.assert_close(inner.r, s)
    assert [c / 600 for c in counts] == pytest.approx([1 / 6, 2 / 6, 3 / 6], abs=0.06)


def test_ctm_leaves_no_gradient_behind():
    """The gradient of the outer jump is taken inside the loss, for its input alone."""
    nets = toys("rf", "map")
    torch.nn.init.normal_(nets["student"].head.weight, std=0.3)
    random.seed(0)
    loss, _ = CTM(6, 2, dsm_weight=0.0).loss(nets, make_batch(64, LAW), 0)
    assert float(gradients(loss, nets["student"]).abs().max()) > 1e-3
    assert all(p.grad is None for p in nets["student"].parameters())


# --- TCM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [RECTIFIED_FLOW, VP, EDM], ids=lambda p: p.name)
@pytest.mark.parametrize(("std", "df"), [(0.2, 0.01), (1.5, 2.0)])
def test_log_student_t(path, std, df):
    times = LogStudentT(0.1, std, df, low=0.4, high=0.95)
    torch.manual_seed(0)
    t = times.draw(path, 20_000)
    a, s, _, _ = path.coeffs(torch.cat([t, path.at(torch.tensor([0.4, 0.95]))]))
    log = torch.log(s / a)
    low, high = log[-2:].tolist()
    drawn, law = log[:-2].numpy(), scipy.stats.t(df, 0.1, std)
    assert t.shape == (20_000,) and low - 1e-4 < drawn.min() and drawn.max() < high + 1e-4

    def cdf(x: Any) -> Any:
        return (law.cdf(x) - law.cdf(low)) / (law.cdf(high) - law.cdf(low))

    assert scipy.stats.kstest(drawn, cdf).statistic < 0.012


def test_tcm_has_two_stages_and_samples_above_the_transition(monkeypatch):
    method = TCM(transition=0.4, first=0.25)
    assert [(m.stage, n) for m, n in method.stages(40)] == [(1, 10), (2, 30)]
    assert method.sampling(1).times == (1.0, 0.0) and method.sampling(2).times == pytest.approx((1.0, 0.4, 0.0))
    assert method.sampling(3).times == pytest.approx((1.0, 0.7, 0.4, 0.0)) and method.sampling(3).rule == "renoise"
    assert float(EDM.at(0.4)) == pytest.approx(1.0, abs=0.05)  # the paper's t' and the middle of its two steps
    seen: list[Any] = []
    made = TCM.networks

    def spy(self: Any, teacher: Any, clone: Any) -> Any:
        nets = made(self, teacher, clone)
        seen.append((self.stage, nets, nets["student"].head.weight.detach().clone()))
        return nets

    monkeypatch.setattr(TCM, "networks", spy)
    config, averages = FitConfig(iterations=6, batch=16, lr=0.05, precision="float32"), []
    teacher = Toy(LAW, RECTIFIED_FLOW, "velocity")
    for step in fit(TCM(double_every=1), LawSource(LAW, SHAPE), teacher, config):
        averages.append(step.student)
    (one, first, _), (two, second, start) = seen
    assert (one, two) == (1, 2) and "teacher" not in first and second["teacher"] is averages[2]
    assert torch.equal(start, averages[2].head.weight) and float(start.abs().max()) > 0


def test_tcm_spreads_its_doublings_over_the_first_stage():
    """At 0, as CM's; a run with it used to divide by zero."""
    (first, _), (second, _) = TCM(double_every=0, doublings=3, first=0.25).stages(64)
    assert first.double_every == 4 and second.stage == 2
    assert [(m.double_every, n) for m, n in TCM(double_every=0).stages(4)][0] == (1, 2)  # fewer than doublings
    config = FitConfig(iterations=6, batch=8, lr=0.01, precision="float32")
    source, teacher = LawSource(LAW, SHAPE), Toy(LAW, RECTIFIED_FLOW, "velocity")
    logs = [step.log for step in fit(TCM(double_every=0, doublings=2), source, teacher, config)]
    assert len(logs) == 6 and all(math.isfinite(v) for log in logs for v in log.values())


@pytest.mark.parametrize(("n", "share"), [(1, 0.01), (1, 0.99), (4, 0.25), (8, 0.01), (3, 0.999)])
def test_an_empty_boundary_and_an_empty_rest_are_finite(n, share):
    random.seed(0)
    nets = toys("rf", "posterior")
    loss, log = TCM(stage=2, boundary=share).loss(nets, make_batch(n, LAW), 0)
    assert math.isfinite(float(loss.detach())) and all(math.isfinite(float(v)) for v in log.values())
    assert bool(gradients(loss, nets["student"]).isfinite().all())


def test_small_batches_meet_the_boundary_as_often():
    random.seed(0)
    counts = [TCM(stage=2).draw(RECTIFIED_FLOW, n, torch.device("cpu"))[1] for n in (1, 3) for _ in range(2000)]
    assert sum(counts[:2000]) / 2000 == pytest.approx(0.25, abs=0.04)
    assert sum(counts[2000:]) / 6000 == pytest.approx(0.25, abs=0.02)


def test_only_the_boundary_holds_a_collapsed_student():
    """A constant at t >= t' is self-consistent (section 3 of the paper): where r > t' its loss is 0."""

    class Constant(Toy):
        def pairs(self, x: Any, t: Any, cond: Any, r: Any = None) -> Any:
            a, s, _, _ = self.path.coeffs(t.reshape(-1, 1, 1, 1))
            return 0.3 + 0 * x, (x - a * 0.3) / s

    nets = {"student": Constant(LAW, RECTIFIED_FLOW, "velocity"), "teacher": Toy(LAW, RECTIFIED_FLOW, "velocity")}
    late = Angles(((1.0, 1.1, 1.2, 1.3),))  # above t' = 0.4 by more than the gap
    _, log = TCM(late=late, stage=2, boundary=0.5).loss(nets, make_batch(64, LAW), 0)
    assert float(log["tcm"]) == pytest.approx(0, abs=1e-6) and float(log["boundary"]) > 1


def test_the_boundary_holds_at_a_high_learning_rate():
    """With the paper's weight of 0.1 and such a rate the loss at t' ends above 2: more steps make samples worse."""
    config = FitConfig(300, batch=64, lr=0.15, optimizer="radam", schedule="linear", ema=(0.9,), precision="float32")
    source, teacher = LawSource(LAW, SHAPE), Toy(LAW, RECTIFIED_FLOW, "velocity")
    logs = [step.log["boundary"] for step in fit(TCM(double_every=0), source, teacher, config)]
    assert sum(logs[-100:]) / 100 < 1.9


# --- all of them ----------------------------------------------------------------------------------------------------

METHODS: dict[str, Any] = {
    "ict": CM(schedule="ict", intervals=3),
    "ict_cd": CM(from_teacher=True, schedule="ict", intervals=3),
    "pcm": PCM(2, 3),
    "lcm": PCM(1, 3),
    "ctm": CTM(3, 3),
    "tcm": TCM(),
    "tcm_late": TCM(stage=2),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "velocity"])
@pytest.mark.parametrize("path", [RECTIFIED_FLOW, VP, EDM], ids=lambda p: p.name)
@pytest.mark.parametrize("half", [False, True])
def test_every_kind_in_single_precision_and_under_autocast(name, kind, path, half):
    if path is RECTIFIED_FLOW and kind == "eps" and name in ("pcm", "lcm", "ctm"):
        pytest.skip("at t = 1 of rectified flow noise holds no data: the conversion is refused")
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    law = Gaussian(0.2, 0.5)
    teacher, student = (Toy(law, path, kind) for _ in range(2))
    random.seed(0)
    batch = make_batch(24, law)
    batch = replace(batch, x0=batch.data.float())
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss, _ = METHODS[name].loss({"student": student, "teacher": teacher}, batch, 0)
    got = gradients(loss, student)
    assert loss.dtype == torch.float32 and bool(loss.isfinite()) and bool(got.isfinite().all())


@pytest.mark.parametrize("name", METHODS)
def test_trains_a_transformer_with_guidance(name):
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    net = DiT(DiTConfig(size=(4, 4), channels=1, patch=2, width=16, depth=1, heads=2, classes=1))

    method = replace(METHODS[name], cfg_scale=2.0) if name in ("ict_cd", "pcm", "lcm", "ctm") else METHODS[name]
    source = LawSource(Gaussian(0.2, 0.5), (1, 4, 4), labelled=True)
    config = FitConfig(iterations=4, batch=8, precision="float32")
    logs = [step.log for step in fit(method, source, net, config)]
    assert len(logs) == 4 and all(math.isfinite(v) for log in logs for v in log.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CM(schedule="ecm"), "did you mean 'ect'"),  # pyright: ignore[reportArgumentType]
        (lambda: CM(schedule="ict", intervals=0), "intervals must be at least 1"),
        (lambda: CM(double_every=-1), "double_every"),
        (lambda: PCM(phases=0), "at least one phase"),
        (lambda: PCM(hops=0), "one hop"),
        (lambda: CTM(solver=0), "solver"),
        (lambda: CTM(grid=4, solver=5), "solver 5 and grid 4"),
        (lambda: TCM(transition=1.0), "between 0 and 1"),
        (lambda: TCM(boundary=0.0), "between 0 and 1"),
        (lambda: TCM(double_every=-1), "at least 0"),
        (lambda: LogStudentT(low=0.5, high=0.5), "LogStudentT"),
        (lambda: LogStudentT(df=0), "LogStudentT"),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
