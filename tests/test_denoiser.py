"""predict, guided and OnPath against exact denoisers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from hasten.core.denoiser import Batch, OnPath, dropped, guided, on_path, per_sample, predict
from hasten.core.errors import ConfigError
from hasten.core.path import EDM, KINDS, RECTIFIED_FLOW, TRIG, VP, VP_COSINE, Kind, Path
from hasten.core.request import current, request
from hasten.core.sample import step_once
from tests.oracle import Gaussian, Ideal, Mixture, consistency, mean_velocity, wide
from tests.test_path import SD

LAW = Mixture()
PATHS = {"rf": RECTIFIED_FLOW, "trig": TRIG, "edm": EDM, "vp": VP, "vp_cosine": VP_COSINE, "sd": SD}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


def noised(path: Path, law: Any, t: Tensor, dims: int = 6) -> Tensor:
    """Exact samples of x_t, float64 [B, dims]."""
    return path.mix(law.draw((len(t), dims)), torch.randn(len(t), dims, dtype=torch.float64), t)


def at_angles(path: Path, *angles: float) -> Tensor:
    return path.time(torch.tensor(angles, dtype=torch.float64))


@every_path
@pytest.mark.parametrize("kind", KINDS)
def test_predict_converts_to_every_kind(path, kind):
    t = at_angles(path, 0.1, 0.7, 1.4)
    x_t = noised(path, LAW, t)
    x0, eps = LAW.posterior(path, x_t, t)
    for dst in get_args(Kind):
        want = path.target(x0, eps, t, dst)
        torch.testing.assert_close(predict(Ideal(LAW, path, kind), x_t, t, {}, dst), want, rtol=1e-9, atol=1e-9)
    pred, features = predict(Ideal(LAW, path, kind), x_t[:, :, None], t, {}, "x0", taps=(0, 2))
    torch.testing.assert_close(pred[..., 0], x0, rtol=1e-9, atol=1e-9)
    assert len(features) == 2


def test_times_may_be_numbers_and_keep_their_precision():
    x = torch.randn(3, 2, dtype=torch.float64)
    assert (
        per_sample(0.1, x).tolist() == pytest.approx([0.1] * 3, rel=1e-7) and per_sample(0.1, x).dtype == torch.float64
    )
    assert per_sample(torch.tensor([1, 2, 3]), x.half()).dtype == torch.float32
    torch.testing.assert_close(
        predict(Ideal(LAW, TRIG), x, torch.full((3,), 0.5, dtype=torch.float64), {}),
        predict(Ideal(LAW, TRIG), x, 0.5, {}),
    )


# --- guidance -------------------------------------------------------------------------------------------------

CLASSES = [Gaussian(-1.0, 0.4), Gaussian(1.5, 0.4), Gaussian(0.2, 0.4)]  # the last is the unconditional law


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 7.5])
def test_guidance_of_equal_covariances_is_a_shifted_gaussian(kind, scale):
    """u + w (c - u) of N(m_u, s^2), N(m_c, s^2) is the denoiser of N(m_u + w (m_c - m_u), s^2) (fact 8)."""
    t = at_angles(RECTIFIED_FLOW, 0.2, 0.8, 1.3, 0.5)
    label = torch.tensor([0, 1, 1, 0])
    net = Ideal(CLASSES, RECTIFIED_FLOW, kind)
    x_t = torch.randn(4, 5, dtype=torch.float64)
    mean = 0.2 + scale * (torch.tensor([-1.0, 1.5, 1.5, -1.0], dtype=torch.float64) - 0.2)
    want = Gaussian(mean[:, None], 0.4).posterior(RECTIFIED_FLOW, x_t, t)[0]
    cond = {"label": label}
    for two_calls, calls in ((False, [8]), (True, [4, 4])):
        net.calls.clear()
        got = guided(net, x_t, t, cond, net.null(cond), scale, two_calls=two_calls)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        assert net.calls == calls


@pytest.mark.parametrize("scale", [None, 1, 1.0])
def test_a_scale_of_one_calls_only_the_conditional_network(scale):
    net, x = Ideal(CLASSES, VP), torch.randn(2, 3, dtype=torch.float64)
    cond = {"label": torch.tensor([0, 1])}
    torch.testing.assert_close(guided(net, x, 0.5, cond, net.null(cond), scale), predict(net, x, 0.5, cond))
    assert net.calls == [2, 2]


@pytest.mark.parametrize("path", [RECTIFIED_FLOW, EDM], ids=lambda p: p.name)
def test_interval_guidance_acts_only_inside_unit_times(path):
    net, cond = Ideal(CLASSES, path), {"label": torch.tensor([0, 1, 1])}
    x, null = torch.randn(3, 4, dtype=torch.float64), net.null(cond)

    def run(u: list[float], **options) -> Tensor:
        net.calls.clear()
        t = path.at(torch.tensor(u, dtype=torch.float64))
        return guided(net, x, t, cond, null, 3.0, interval=(0.3, 0.7), **options)

    t_all = path.at(torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64))
    plain, full = (guided(net, x, t_all, cond, null, w) for w in (1.0, 3.0))
    mixed = run([0.2, 0.5, 0.9])
    torch.testing.assert_close(mixed, torch.stack([plain[0], full[1], plain[2]]))
    assert net.calls == [6]
    assert run([0.2, 0.29, 0.75]) is not None and net.calls == [3]  # nobody inside: the conditional network alone
    assert run([0.31, 0.5, 0.69], two_calls=True) is not None and net.calls == [3, 3]


def test_two_calls_tell_the_request_which_branch_runs():
    seen: list[str] = []

    class Spy(Ideal):
        def forward(self, *args, **kwargs):
            now = current()
            seen.append(now.branch if now else "none")
            return super().forward(*args, **kwargs)

    net, cond = Spy(CLASSES, VP), {"label": torch.tensor([0])}
    x = torch.randn(1, 2, dtype=torch.float64)
    with request(1):
        guided(net, x, 0.5, cond, net.null(cond), 2.0, two_calls=True)
        guided(net, x, 0.5, cond, net.null(cond), 2.0)
    guided(net, x, 0.5, cond, net.null(cond), 2.0, two_calls=True)
    assert seen == ["cond", "uncond", "cond", "none", "none"]


def test_guidance_passes_the_second_time_to_both_halves():
    net, cond = Ideal(CLASSES, RECTIFIED_FLOW, "velocity"), {"label": torch.tensor([0, 1])}
    x, t, r = (
        torch.randn(2, 3, dtype=torch.float64),
        torch.tensor([0.9, 0.8]).double(),
        torch.tensor([0.1, 0.3]).double(),
    )
    one = guided(net, x, t, cond, net.null(cond), 2.0, "velocity", r=r)
    two = guided(net, x, t, cond, net.null(cond), 2.0, "velocity", r=r, two_calls=True)
    torch.testing.assert_close(one, two)
    half = [predict(net, x, t, c, "velocity", r=r) for c in (cond, net.null(cond))]
    torch.testing.assert_close(one, half[1] + 2 * (half[0] - half[1]))


# --- OnPath ---------------------------------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize("new", [RECTIFIED_FLOW, TRIG, EDM, VP], ids=lambda p: p.name)
@pytest.mark.parametrize("kind", ["x0", "eps", "velocity"])
def test_a_view_is_the_exact_denoiser_of_its_path(path, new, kind):
    """The posterior given x_t depends on the path through the angle alone, so a view predicts what the law says."""
    for dst in get_args(Kind):
        view = OnPath(Ideal(LAW, path, kind), new, dst)
        end = float(view.path.angle(torch.tensor(view.path.t_max, dtype=torch.float64)))
        t = at_angles(view.path, 0.05, 0.6, 1.2, 0.99 * end)
        x_t = noised(new, LAW, t)
        want = new.target(*LAW.posterior(new, x_t, t), t, dst)
        torch.testing.assert_close(view(x_t, t, {}), want, rtol=1e-7, atol=1e-7)


@every_path
@pytest.mark.parametrize("new", [RECTIFIED_FLOW, TRIG], ids=lambda p: p.name)
def test_the_pair_of_a_two_time_prediction_is_invariant(path, new):
    """One ode step of a view lands on the flow map of its own path, r being mapped by angle too."""
    net = Ideal(LAW, path, "velocity")
    view = OnPath(net, new, "v")
    t, r = at_angles(view.path, 0.4, 1.0, 1.45, 1.2), at_angles(view.path, 0.1, 0.5, 0.02, 1.19)
    x_t = noised(new, LAW, t)
    torch.testing.assert_close(step_once(view, x_t, t, r, {}, r=r), LAW.flow_map(new, x_t, t, r), rtol=1e-7, atol=1e-7)
    t_own, r_own = net.draws[-1]
    assert r_own is not None
    torch.testing.assert_close(path.angle(t_own), new.angle(t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(path.angle(r_own), new.angle(r), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", [VP, EDM, VP_COSINE, SD], ids=lambda p: p.name)
def test_a_view_ends_where_its_network_ends(path):
    view = OnPath(Ideal(LAW, path, "eps"), TRIG)
    end = float(path.angle(torch.tensor(path.t_max, dtype=torch.float64)))
    assert view.path.t_max == pytest.approx(end, rel=1e-12) and view.path.t_max < math.pi / 2 - 1e-3
    u = torch.linspace(0, 1, 401, dtype=torch.float64)
    t = view.path.at(u)
    assert float(t[-1]) == pytest.approx(end, rel=1e-12)
    assert bool((t.diff() > 0).all())  # no two unit times fall together: a sampler's step would be empty
    assert float(view.path.time(torch.tensor(1.57))) == pytest.approx(end, rel=1e-6)
    assert OnPath(Ideal(LAW, RECTIFIED_FLOW), TRIG).path.t_max == math.pi / 2


def test_a_view_on_edm_has_karras_times_up_to_the_networks_noise():
    view = OnPath(Ideal(LAW, SD, "eps"), EDM)
    alpha, sigma, _, _ = SD.coeffs(torch.tensor(1.0, dtype=torch.float64))
    lo, hi = 0.002 ** (1 / 7), float(sigma / alpha) ** (1 / 7)
    for u in (0.1, 0.5, 1.0):
        got = float(view.path.at(torch.tensor(u, dtype=torch.float64)))
        assert got == pytest.approx((lo + u * (hi - lo)) ** 7, rel=1e-9)


class Bf16(torch.nn.Module):
    """Predicts what it was told, rounded to bfloat16 as the output of a network under autocast is."""

    def __init__(self, path: Path, kind: Kind, x0: Tensor, eps: Tensor):
        super().__init__()
        self.path, self.x0, self.eps = path, x0, eps
        self.kind: Kind = kind

    def forward(self, x_t: Tensor, t: Tensor, cond, *, r=None, taps=()):
        assert t.dtype == torch.float32  # a bf16 time would be off by 0.4 %
        return self.path.target(self.x0, self.eps, t.double(), self.kind).bfloat16()


@pytest.mark.parametrize(
    ("path", "kind"), [(RECTIFIED_FLOW, "velocity"), (VP, "velocity"), (VP, "v"), (SD, "v"), (SD, "eps")]
)
@pytest.mark.parametrize("angle", [0.02, 0.03, 0.1, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bf16_view_stays_within_two_percent(path, kind, angle, dtype):
    """Through a bf16 x0 the answer would be off by 0.2 at an angle of 0.02: its rounding is divided by sigma."""
    if kind == "eps" and angle > 1.2:
        return  # x0 = (x_t - sigma eps)/alpha: there the prediction itself lacks the digits, whatever the solve
    x0, eps = torch.randn(2, 4, 400, dtype=torch.float64)
    t = torch.full((4,), angle, dtype=torch.float64)
    want = math.cos(angle) * eps - math.sin(angle) * x0
    x_t = math.cos(angle) * x0 + math.sin(angle) * eps
    got = OnPath(Bf16(path, kind, x0, eps), TRIG)(x_t.to(dtype), t.float(), {})
    assert got.dtype == torch.float32
    assert float((got.double() - want).norm() / want.norm()) < 0.02


def test_a_view_is_differentiable_in_both_modes():
    net = Ideal(Mixture(), VP, "eps")
    view = OnPath(net, TRIG)
    t = torch.tensor([0.3, 1.2], dtype=torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64)
    dx, dt = torch.randn_like(x), torch.tensor([1.0, -0.5], dtype=torch.float64)
    f = lambda x, t: view(x, t, {})  # noqa: E731
    exact = torch.func.jvp(f, (x, t), (dx, dt))[1]
    h = 1e-5
    torch.testing.assert_close(
        exact, (f(x + h * dx, t + h * dt) - f(x - h * dx, t - h * dt)) / (2 * h), rtol=1e-6, atol=1e-7
    )
    x.requires_grad_()
    (grad,) = torch.autograd.grad(f(x, t).sum(), x)
    assert grad.isfinite().all() and float(grad.abs().sum()) > 0


def test_a_view_returns_features_and_blocks_and_refuses_what_is_singular():
    net = Ideal(LAW, RECTIFIED_FLOW, "x0")
    view = OnPath(net, TRIG, "v")
    pred, features = view(torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([0.5, 1.0]).double(), {}, taps=(1,))
    assert pred.shape == (2, 3, 4) and len(features) == 1 and view.blocks == net.blocks
    with pytest.raises(ConfigError, match="singular"):
        view(torch.randn(1, 3, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), {})


def test_on_path_leaves_a_network_alone_that_is_there_already():
    net = Ideal(LAW, VP, "eps")
    assert on_path(net, VP, "eps") is net
    assert isinstance(on_path(net, VP, "v"), OnPath) and isinstance(on_path(net, TRIG, "eps"), OnPath)
    assert isinstance(on_path(net, replace(VP, args=(0.2, 15.0)), "eps"), OnPath)


def test_a_batch_without_data_says_so():
    batch = Batch({}, {}, (2, 1, 4, 4))
    assert batch.noise().shape == (2, 1, 4, 4)
    with pytest.raises(AssertionError, match="needs_data"):
        _ = batch.data


@pytest.mark.parametrize("path", [RECTIFIED_FLOW, VP, EDM], ids=lambda p: p.name)
def test_the_oracles_agree_with_each_other(path):
    """A mixture of one is the Gaussian; a flow map solves dX/dr = velocity; the score is Tweedie's."""
    one, gauss = Mixture([0.3], [0.5], [1.0]), Gaussian(0.3, 0.5)
    t, r = at_angles(path, 1.3, 0.9, 1.1), at_angles(path, 0.2, 0.8, 0.05)
    x = noised(path, gauss, t)
    for name in ("velocity", "score", "cdf"):
        torch.testing.assert_close(getattr(one, name)(path, x, t), getattr(gauss, name)(path, x, t))
    torch.testing.assert_close(one.flow_map(path, x, t, r), gauss.flow_map(path, x, t, r), rtol=1e-9, atol=1e-9)
    a, s, _, _ = (c[:, None] for c in path.coeffs(t))
    for law in (LAW, gauss):
        x0, eps = law.posterior(path, x, t)
        torch.testing.assert_close(a * x0 + s * eps, x)  # E[x_t | x_t]
        torch.testing.assert_close(law.score(path, x, t), -eps / s)
        move = torch.func.jvp(lambda r, law=law: law.flow_map(path, x, t, r), (r,), (torch.ones_like(r),))[1]
        torch.testing.assert_close(move, law.velocity(path, law.flow_map(path, x, t, r), r), rtol=1e-6, atol=1e-6)
    u = mean_velocity(LAW, path, x, t, r)
    torch.testing.assert_close(x - wide(t - r, x) * u, LAW.flow_map(path, x, t, r))
    torch.testing.assert_close(
        consistency(LAW, path, LAW.flow_map(path, x, t, r), r), consistency(LAW, path, x, t), rtol=1e-8, atol=1e-8
    )


def test_conditions_are_dropped_only_where_there_is_an_unconditional_one():
    cond = {"text": torch.ones(64, 2, 3)}
    batch = Batch(cond, {"text": torch.zeros(64, 2, 3)}, (64, 1))
    torch.manual_seed(0)
    rows = dropped(batch, 0.5)["text"].amax((1, 2))
    assert set(rows.tolist()) == {0.0, 1.0} and 16 < float(rows.sum()) < 48
    assert dropped(replace(batch, uncond={}), 0.5) is cond
    assert dropped(batch, 0.0) is cond
