"""Flow maps: random targets, the one fact that tells each paper from the others, settings that are refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.core.denoiser import dropped
from hasten.core.errors import ConfigError
from hasten.core.path import EDM, RECTIFIED_FLOW, VP
from hasten.core.sample import sample
from hasten.core.times import LogitNormal, Uniform
from hasten.fit import fit
from hasten.methods.alphaflow import AlphaFlow
from hasten.methods.ayf import AYF
from hasten.methods.flowmap import FlowMap
from hasten.methods.meanflow import MeanFlow
from hasten.methods.shortcut import Shortcut
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
    shifted,
    toys,
    watched,
)  # fmt: skip
from tests.oracle import Gaussian, wide
from tests.proofs.common import ONE, TWO, gradients
from tests.test_methods import _float64  # noqa: F401
from tests.test_methods_mean import MIDDLE, studentised
from tests.training import network

every_path = pytest.mark.parametrize("where", PATHS)

# --- where the target is random -------------------------------------------------------------------------------------

RANDOM: dict[str, Any] = {
    "imf": MeanFlow(MIDDLE, False, same=0.5, own_tangent=True, earlier=None),
    "psd": Shortcut("uniform", times=MIDDLE, same=0.5, from_teacher=False),
    "alphaflow": AlphaFlow(MIDDLE, False, same=0.5, iterations=1, earlier=None),
}


@every_path
@pytest.mark.parametrize("name", RANDOM)
def test_the_mean_gradient_is_zero_at_the_truth(name, where):
    nets, case = toys(where, "map"), (RANDOM[name], "map", "loss", "student", 1)
    assert float(studentised(nets, case).abs().max()) < 4
    with torch.no_grad():
        nets["student"].head.weight[0, 0] = 0.3
    assert float(studentised(nets, case).abs().max()) > 6


# --- improved MeanFlow ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given(Scripted):
    """A batch whose noise is given."""

    eps: Tensor | None = None

    def noise(self) -> Tensor:
        assert self.eps is not None
        return self.eps


def moved_gradients(m: MeanFlow) -> tuple[Tensor, Tensor]:
    """How the gradient changes when x_t stays and eps - x0 moves by delta, and what it is where only v moves."""
    nets, batch = toys("rf", "map"), make_batch(7, LAW)
    nets["student"].head = Affine(std=0.3)
    both = torch.tan(torch.tensor(TWO.draws))
    both = both / (1 + both)
    t, r = both.amax(0), both.amin(0)
    delta, found = torch.randn(7, *SHAPE), []
    for size in (0.0, 1.0):
        TWO.count.clear()
        x0, eps = batch.data - size * wide(t, delta) * delta, LAW.mean + size * wide(1 - t, delta) * delta
        loss, _ = m.loss(nets, Given({}, {}, batch.shape, x0, eps=eps), 0)
        found.append(gradients(loss, nets["student"]))
    x_t = wide(1 - t, delta) * batch.data + wide(t, delta) * LAW.mean
    u = nets["student"](x_t, t, {}, r=r)
    return found[1] - found[0], gradients(-2 * (delta * u).sum((1, 2, 3)).mean(), nets["student"])


def test_improved_meanflow_regresses_a_function_of_x_t_on_the_velocity():
    """Given x_t, the gradient is 2 (V(x_t) - v) du: v enters through the target alone; MeanFlow's tangent holds it."""
    m = MeanFlow(TWO, False, same=0.0, own_tangent=True, power=0.0, earlier=None)
    got, want = moved_gradients(m)
    torch.testing.assert_close(got, want)
    got, want = moved_gradients(replace(m, own_tangent=False))
    assert float((got - want).abs().max()) > 0.05 * float(want.abs().max())


@every_path
@pytest.mark.parametrize("same", [1.0, 0.25])
def test_own_guidance_has_its_fixed_point_at_u_plus_w_times_c_minus_u(same, where):
    """Data of the condition's law alone; the student is exact for the guided law and for the unconditional one."""
    path, kind = PATHS[where]
    other, w, n = Gaussian(-0.5 * MEAN.flip(-1) + 0.2, STD), 2.5, 96
    m = MeanFlow(MIDDLE, False, same=same, own_tangent=True, self_cfg_scale=w, drop=0.0, power=0.0, earlier=None)
    for scale, zero in ((w, True), (w + 1, False), (1.0, False)):
        net, each = Toy([shifted(LAW, other, scale), other], path, kind, "map"), []
        for _ in range(16):
            loss, _ = m.loss({"student": net}, make_batch(n, LAW, torch.zeros(n, dtype=torch.long)), 0)
            each.append(gradients(loss, net))
        g = torch.stack(each)
        size = float((g.mean(0) / (g.std(0) / 4 + 1e-6)).abs().max())
        assert size < 4 if zero else size > 6


def test_own_guidance_drops_its_share_of_conditions_everywhere():
    """A dropped sample is unconditional in the loss, in the tangent and in its own guidance, which is then none."""
    seen: list[Tensor] = []

    class Spy(Toy):
        def forward(self, x_t, t, cond, *, r=None, taps=()):
            seen.append(cond["label"])
            return super().forward(x_t, t, cond, r=r, taps=taps)

    net, n = Spy([LAW, LAW], RECTIFIED_FLOW, "velocity", "map"), 2000
    m = MeanFlow(from_teacher=False, same=0.0, own_tangent=True, self_cfg_scale=2.0, drop=0.3)
    m.loss({"student": net}, make_batch(n, LAW, torch.zeros(n, dtype=torch.long)), 0)
    own, free, tangent, trained = seen[0], seen[1], seen[2], seen[-1]
    assert float(own.double().mean()) == pytest.approx(0.3, abs=0.04) and bool((free == 1).all())
    assert torch.equal(own, tangent) and torch.equal(own, trained)
    with pytest.raises(ConfigError, match="have none"):
        m.loss({"student": net}, make_batch(4, LAW), 0)


def test_a_batch_drops_conditions_of_any_shape():
    batch = replace(make_batch(400, LAW), cond={"text": torch.ones(400, 3, 2)}, uncond={"text": torch.zeros(400, 3, 2)})
    kept = dropped(batch, 0.25)["text"].flatten(1)
    assert bool((kept == kept[:, :1]).all()) and float(kept.mean()) == pytest.approx(0.75, abs=0.08)


# --- shortcut models and PSD ----------------------------------------------------------------------------------------


class Steps(Toy):
    """u(x, t, r) of as many Euler steps of the exact velocity as there are finest hops of the own unit time in it."""

    levels = 3

    def forward(self, x_t: Tensor, t: Tensor, cond: Any, *, r: Tensor | None = None, taps: Any = ()) -> Any:
        assert r is not None
        fine, law = 2**self.levels, LAW
        first, last = (torch.round(self.path.t_max * time * fine).long() for time in (t, r))
        x = x_t
        for i in range(fine, 0, -1):
            step = (law.velocity(self.path, x, torch.full_like(t, i / fine)) / fine) * wide(first >= i, x).to(x)
            x = x - step * wide(last < i, x).to(x)
        gap = t - r
        mean = (x_t - x) / wide(torch.where(gap > 0, gap, torch.ones_like(gap)), x)
        return torch.where(wide(gap > 0, x) > 0, mean, law.velocity(self.path, x_t, t))


def test_a_one_step_shortcut_is_so_many_euler_steps():
    """The fixed point of halving down to 2^-levels is Euler with 2^levels steps, not the flow map (closed form 9)."""
    exact = toys("rf", "map")
    nets = {**exact, "student": Steps(LAW, RECTIFIED_FLOW, "velocity")}
    m, batch = Shortcut(levels=3, times=ONE, same=0.1), make_batch(60, LAW)
    assert float(m.loss(nets, batch, 0)[0]) < 1e-24
    assert float(m.loss(exact, batch, 0)[0].detach()) > 1e-5  # the finest half hops are Euler steps
    for other in (2, 4):
        assert float(replace(m, levels=other).loss(nets, batch, 0)[0]) > 1e-5
    noise = torch.randn(5, *SHAPE)
    x = noise
    for i in range(8, 0, -1):
        x = x - LAW.velocity(RECTIFIED_FLOW, x, i / 8) / 8
    torch.testing.assert_close(sample(nets["student"], noise, {}, m.sampling(1)), x)


@every_path
def test_dyadic_hops_are_those_that_the_student_samples_with(where):
    """Every hop is one of ``even(2^level)`` on the student's own path, the last one included, each level as often."""
    own = PATHS[where][0]
    t, s, r, finest = Shortcut(levels=3).hops(own, own, 6000, torch.device("cpu"))
    assert bool((t > s).all() and (s > r).all())
    grid = own.at(torch.arange(9) / 8)
    place = [(time[:, None] - grid).abs().div(grid.clamp_min(1e-3)).min(1) for time in (t, s, r)]
    assert max(float(p.values.max()) for p in place) < 1e-6
    start, middle, end = (p.indices for p in place)
    assert torch.equal(start + end, 2 * middle) and torch.equal(finest, start - end == 2)
    for length in (2, 4, 8):
        some = start - end == length
        assert float(some.double().mean()) == pytest.approx(1 / 3, abs=0.03)
        assert sorted(set(start[some].tolist())) == list(range(length, 9, length))


def test_psd_splits_anywhere_or_in_the_middle():
    for split, low, high in (("middle", 0.4999, 0.5001), ("uniform", 0.01, 0.99)):
        t, s, r, finest = Shortcut(split).hops(VP, RECTIFIED_FLOW, 1000, torch.device("cpu"))
        share = (t - s) / (t - r)
        assert float(share.min()) >= low * (split == "middle") and float(share.max()) <= max(high, 1.0)
        assert float(share.mean()) == pytest.approx(0.5, abs=0.05) and not bool(finest.any())
        assert (float(share.std()) < 1e-6) == (split == "middle")


def test_hops_of_no_length_leave_no_nan():
    m = Shortcut("uniform", times=Angles(((0.5,),)), same=0.25)
    loss, _ = m.loss(toys("rf", "map"), make_batch(8, LAW), 0)
    assert float(loss.detach()) < 1e-20


# --- AlphaFlow ------------------------------------------------------------------------------------------------------


def test_alpha_falls_in_a_sigmoid_and_is_clamped():
    m = AlphaFlow(iterations=1000, begin=0.2, end=0.6)
    assert [m.alpha(k) for k in (0, 199, 200)] == [1.0] * 3 and [m.alpha(k) for k in (600, 601, 999)] == [0.0] * 3
    assert m.alpha(400) == pytest.approx(0.5)
    assert m.alpha(440) == pytest.approx(1 / (1 + 2.718281828459045**2.5)) and m.alpha(360) + m.alpha(
        440
    ) == pytest.approx(1)
    assert m.alpha(360) + m.alpha(440) == pytest.approx(1)
    # ln((1 - 0.005) / 0.005) / 25 = 0.2117 of 400 iterations from the middle
    assert [m.alpha(k) == 1 for k in (315, 316)] == [True, False]
    assert [m.alpha(k) == 0 for k in (484, 485)] == [False, True]
    constant = AlphaFlow(sharpness=0.0, end=0.5)
    assert constant.alpha(0) == constant.alpha(300) == 0.5 and constant.alpha(501) == 0
    early = AlphaFlow(sharpness=1.0, begin=0.5)
    assert early.alpha(499) == 1 and early.alpha(500) < 0.7


def test_alphaflow_learns_how_long_the_run_is():
    m = AlphaFlow()
    assert m.stages(17) == ((replace(m, iterations=17), 17),)
    bad: dict[str, Any]
    for bad in ({"begin": 0.5, "end": 0.5}, {"begin": -0.1}, {"end": 1.5}, {"iterations": 0}):
        with pytest.raises(ConfigError, match="AlphaFlow needs"):
            AlphaFlow(**bad)


@pytest.mark.parametrize("teacher", [True, False])
def test_alphaflow_becomes_meanflow(teacher):
    """The error over alpha^2 has MeanFlow's gradient as alpha goes to 0, with a difference of first order in alpha."""
    nets, batch = toys("rf", "map"), make_batch(7, LAW)
    nets["student"].head = Affine(std=0.3)
    half = AlphaFlow(TWO, teacher, same=0.0, power=1.0, floor=1e9, earlier=None, clamp=0.0, iterations=1000)

    def gradient(m: Any, step: int) -> Tensor:
        TWO.count.clear()
        torch.manual_seed(4)
        return gradients(m.loss(nets, batch, step)[0], nets["student"])

    want = gradient(MeanFlow(TWO, teacher, same=0.0, power=0.0, earlier=None), 0) / 6  # over 6 pixels, not averaged
    torch.testing.assert_close(gradient(replace(half, clamp=0.4), 700) * 1e9, want)
    far = []
    for step in (684, 712):
        alpha = half.alpha(step)
        far.append(float((gradient(half, step) * 1e9 / alpha**2 - want).norm()) / alpha)
    assert alpha < 0.006 and far[0] == pytest.approx(far[1], rel=0.1) and far[0] > 0.01 * float(want.norm())


# --- Align Your Flow ------------------------------------------------------------------------------------------------


@every_path
def test_align_your_flow_is_flow_matching_at_r_equal_t_and_before_its_warm_up(where):
    nets = toys(where, "map")
    nets["student"].head = Affine(std=0.3)
    path = nets["student"].path
    for m, rest in ((AYF(Angles(((1e-3,),)), warmup=0, ceiling=1.0), 0.02), (AYF(ONE, warmup=10**9), 1e-6)):
        torch.manual_seed(3)
        batch = make_batch(200, LAW)
        out, g = m.tangent(nets, batch, 0)
        ONE.count.clear()
        watched(nets["teacher"])
        torch.manual_seed(3)
        make_batch(200, LAW)
        m.tangent(nets, batch, 0)
        x, t = nets["teacher"].log[0].x, nets["teacher"].log[0].t
        a, s, _, _ = path.coeffs(wide(t, x))
        v = LAW.velocity(RECTIFIED_FLOW, x / (a + s), (s / (a + s)).flatten())
        assert float((g - (out.detach() - v)).abs().max()) < rest < 0.05 * float(g.abs().max())


def test_align_your_flow_draws_the_gap_and_then_the_place():
    """t - r is that of ``gaps``, and r uniform in what is left of the covered times."""
    nets = toys("edm", "map")
    watched(nets["student"])
    AYF(LogitNormal(-0.8, 1.0)).loss(nets, make_batch(4000, LAW), 0)
    call = nets["student"].log[0]
    t, r = (EDM.angle(time).tan() / (1 + EDM.angle(time).tan()) for time in (call.t, call.r))
    gap, end = t - r, 80 / 81
    assert float(gap.min()) > 0 and float(t.max()) <= end + 1e-6 and float(r.min()) >= 0
    assert float((r / (end - gap)).mean()) == pytest.approx(0.5, abs=0.02)
    assert float(torch.logit(gap / end).median()) == pytest.approx(-0.8, abs=0.1)


# --- all of them ----------------------------------------------------------------------------------------------------

MANY: dict[str, Any] = {
    "imf": MeanFlow(Uniform(), same=0.25, own_tangent=True, earlier=None),
    "shortcut": Shortcut(same=0.5),
    "psd": Shortcut("uniform", same=0.5),
    "alphaflow": AlphaFlow(Uniform(), end=0.6, same=0.25, earlier=None),
    "ayf": AYF(LogitNormal(0.5, 1.0), warmup=20),
}


@pytest.mark.parametrize("name", MANY)
def test_a_flow_map_serves_every_number_of_steps(name):
    """More steps do not hurt, which tells a flow map from a consistency model (Sabour et al. 2025, section 3.1)."""
    torch.manual_seed(0)
    law = Gaussian(0.6, 0.45)
    teacher = Toy(law, RECTIFIED_FLOW, "velocity", head=Affine(3))
    config = FitConfig(250, 64, lr=0.05, schedule="cosine", ema=(0.9,), clip=10, precision="float32")
    *_, last = fit(MANY[name], LawSource(law), teacher, config)
    noise = torch.randn(256, 1, 1, 4)
    want = law.flow_map(RECTIFIED_FLOW, noise, 1.0, 0.0)

    def error(net: Any, steps: int, two_time: bool) -> float:
        sampling = replace(MANY[name].sampling(steps), two_time=two_time)
        return float((sample(net, noise, {}, sampling) - want).pow(2).mean().sqrt())

    steps = (1, 2, 4, 8)
    found, euler = ([error(net, n, net is not teacher) for n in steps] for net in (last.student, teacher))
    assert all(a < b / 1.5 for a, b in zip(found, euler, strict=True)) and found[3] < found[0] / 2


EXACT: dict[str, Any] = {
    "imf": MeanFlow(TWO, same=0.3, own_tangent=True, earlier=None),
    "psd": Shortcut("uniform", times=TWO, same=0.4),
    "alphaflow": AlphaFlow(TWO, same=0.3, iterations=1, earlier=None),
    "ayf": AYF(ONE, warmup=0, ceiling=1.0),
}


@pytest.mark.parametrize("name", EXACT)
def test_every_sample_keeps_its_own_condition(name):
    """Two laws, in turn: the loss of the truth is zero, and of a student with the labels swapped it is not."""
    laws, labels = [LAW, Gaussian(1.5, 0.3)], torch.arange(7) % 2
    teacher = Toy(laws, RECTIFIED_FLOW, "velocity")
    for student, zero in ((laws, True), (laws[::-1], False)):
        for script in (ONE, TWO):
            script.count.clear()
        nets = {"student": Toy(student, RECTIFIED_FLOW, "velocity", "map"), "teacher": teacher}
        batch = Scripted({"label": labels}, {"label": 0 * labels}, (7, *SHAPE), torch.randn(7, *SHAPE))
        loss, _ = EXACT[name].loss(nets, batch, 1)
        assert (float(loss.detach()) < 1e-9) == zero


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MANY)
def test_a_real_network_with_guidance_and_autocast(name, precision):
    """float32 parameters, class conditions, a guided teacher; the second time learns."""
    torch.set_default_dtype(torch.float32)
    teacher = network()
    student = network(second_time=True)
    labels = torch.arange(8) % 10
    batch = Scripted({"label": labels}, {"label": torch.full_like(labels, 10)}, (8, 1, 8, 8), torch.randn(8, 1, 8, 8))
    for step in (0, 150, 999):
        with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
            m = replace(MANY[name], cfg_scale=2.0)
            loss, _ = m.loss({"student": student, "teacher": teacher}, batch, step)
        assert bool(torch.isfinite(gradients(loss, student)).all()) and float(gradients(loss, student).abs().max()) > 0


@pytest.mark.parametrize("method", [MeanFlow, Shortcut, AlphaFlow, FlowMap])
def test_guidance_without_a_teacher_is_refused(method):
    with pytest.raises(ConfigError, match="guides a teacher"):
        method(from_teacher=False, cfg_scale=2.0)


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (MeanFlow, {"self_cfg_scale": 2.0, "own_tangent": True}, "without a teacher"),
    (MeanFlow, {"self_cfg_scale": 2.0, "from_teacher": False}, "own_tangent"),
    (MeanFlow, {"self_cfg_scale": 0.5, "own_tangent": True, "from_teacher": False}, "at least 1"),
    (Shortcut, {"split": "thirds"}, "thirds"),
    (Shortcut, {"levels": 0}, "at least 1"),
    (Shortcut, {"same": 0.0}, "same"),
    (Shortcut, {"same": 1.0}, "same"),
    (AYF, {"ceiling": 0.0}, "ceiling"),
    (AYF, {"ceiling": 1.1}, "ceiling"),
]


@pytest.mark.parametrize(("method", "setting", "match"), BAD)
def test_a_bad_setting_is_refused(method, setting, match):
    with pytest.raises(ConfigError, match=match):
        method(**setting)
