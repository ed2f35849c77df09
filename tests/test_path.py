"""Paths: conversions, derivatives, ends, angles, unit times, and DDPM tables."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.core.errors import ConfigError
from hasten.core.path import (
    EDM,
    KINDS,
    RECTIFIED_FLOW,
    TRIG,
    VP,
    VP_COSINE,
    Path,
    ddpm,
    edm,
    expand,
    named_path,
    vp,
)

BAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)  # SD's table
SD = ddpm(BAR)
PATHS = {"rf": RECTIFIED_FLOW, "trig": TRIG, "edm": EDM, "vp": VP, "vp_cosine": VP_COSINE, "sd": SD}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
every_pair = pytest.mark.parametrize(("src", "dst"), list(product(KINDS, KINDS)))


def angles(path: Path, low: float, high: float, n: int = 23) -> torch.Tensor:
    """Times at which the angle runs through [low, high], as far as the path goes."""
    end = float(path.angle(torch.tensor(path.t_max, dtype=torch.float64)))
    return path.time(torch.linspace(low, min(high, 0.999 * end), n, dtype=torch.float64))


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest norm-wise relative difference over the batch."""
    a, b = a.double().flatten(1), b.double().flatten(1)
    return float(((a - b).norm(dim=1) / b.norm(dim=1)).max())


@every_path
@every_pair
@pytest.mark.parametrize(
    ("dtype", "low", "high", "bound"), [(torch.float32, 0.25, 1.3, 1e-6), (torch.float64, 0.02, 1.55, 1e-12)]
)
def test_conversions_round_trip(path, src, dst, dtype, low, high, bound):
    t = angles(path, low, high).to(dtype)
    x0, eps = torch.randn(2, len(t), 16, dtype=dtype)
    x_t, pred = path.mix(x0, eps, t), path.target(x0, eps, t, src)
    there = path.convert(pred, x_t, t, src, dst)
    assert there.dtype == dtype
    assert off(path.convert(there, x_t, t, dst, src), pred) < bound


@every_path
@every_pair
def test_conversion_is_that_of_the_exact_pair(path, src, dst):
    t = angles(path, 0.02, 1.55)
    x0, eps = torch.randn(2, len(t), 16, dtype=torch.float64)
    a, s, da, ds = (c[:, None] for c in path.coeffs(t))
    exact = {"x0": x0, "eps": eps, "v": a * eps - s * x0, "velocity": da * x0 + ds * eps}
    assert off(path.mix(x0, eps, t), a * x0 + s * eps) < 1e-15
    assert off(path.target(x0, eps, t, src), exact[src]) < 1e-15
    assert off(path.convert(exact[src], a * x0 + s * eps, t, src, dst), exact[dst]) < 1e-11


@every_path
@every_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_are_finite_or_refused(path, src, dst, dtype):
    x0, eps = torch.randn(2, 1, 8, dtype=dtype)
    for t in (torch.zeros(1, dtype=dtype), torch.full((1,), path.t_max, dtype=dtype)):
        alpha, sigma, _, _ = path.coeffs(t)
        # x0 says nothing about the rest where x_t = x0, nor eps where x_t = eps.
        missing = (src == "x0" and float(sigma) == 0) or (src == "eps" and abs(float(alpha)) < 1e-7)
        x_t, pred = path.mix(x0, eps, t), path.target(x0, eps, t, src)
        if missing and src != dst:
            with pytest.raises(ConfigError, match="singular"):
                path.convert(pred, x_t, t, src, dst)
        else:
            assert path.convert(pred, x_t, t, src, dst).isfinite().all()
            assert all(c.isfinite().all() for c in path.coeffs(t))


@every_path
def test_derivatives(path):
    t = angles(path, 0.02, 1.55, 41)
    h = 1e-6 * t
    alpha, sigma, dalpha, dsigma = path.coeffs(t)
    up, down = path.coeffs(t + h), path.coeffs(t - h)
    for value, slope, i in ((alpha, dalpha, 0), (sigma, dsigma, 1)):
        exact = torch.func.jvp(lambda t, i=i: path.coeffs(t)[i], (t,), (torch.ones_like(t),))[1]
        torch.testing.assert_close(slope, exact, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(slope, (up[i] - down[i]) / (2 * h), rtol=1e-4, atol=1e-4 * float(slope.abs().max()))
        assert value.shape == t.shape


@every_path
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_from_angle_inverts(path, dtype, bound):
    end = float(path.angle(torch.tensor(path.t_max, dtype=torch.float64)))
    angle = torch.cat([torch.tensor([1e-3, 0.003, 0.01, 0.02]), torch.linspace(0.05, 0.9999 * end, 60)]).to(dtype)
    back = path.angle(path.time(angle))
    assert float(((back - angle) / angle).abs().max()) < bound  # relative: small angles keep their digits
    ends = path.time(torch.tensor([0.0, math.pi / 2], dtype=dtype))
    assert float(ends[0]) == pytest.approx(0, abs=1e-7)
    assert float(ends[1]) == pytest.approx(path.t_max, rel=1e-6)


@every_path
def test_from_angle_has_the_right_derivative(path):
    angle = angles(path, 0.05, 1.5)
    angle = path.angle(angle)
    slope = torch.func.jvp(path.time, (angle,), (torch.ones_like(angle),))[1]
    a, s, da, ds = path.coeffs(path.time(angle))
    torch.testing.assert_close(slope, (a * a + s * s) / (a * ds - s * da), rtol=1e-7, atol=1e-9)
    angle.requires_grad_()
    (grad,) = torch.autograd.grad(path.time(angle).sum(), angle)
    torch.testing.assert_close(grad, slope, rtol=1e-7, atol=1e-9)


@every_path
def test_unit_times(path):
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    t = path.at(u)
    assert float(t[0]) == 0 and float(t[-1]) == pytest.approx(path.t_max, rel=1e-12)
    assert bool((t.diff() > 0).all()) and bool((path.angle(t).diff() > 0).all())
    if path.name == "edm":  # Karras et al. 2022, eq. 5
        root = 0.002 ** (1 / 7) + 0.3 * (80 ** (1 / 7) - 0.002 ** (1 / 7))
        assert float(path.at(0.3)) == pytest.approx(root**7, rel=1e-5)
    else:
        torch.testing.assert_close(t, u * path.t_max)


@given(st.floats(1e-3, 1.57), st.sampled_from(sorted(PATHS)))
def test_angle_and_time_are_inverse_everywhere(angle, name):
    path = PATHS[name]
    end = float(path.angle(torch.tensor(path.t_max, dtype=torch.float64)))
    back = float(path.angle(path.time(torch.tensor(angle, dtype=torch.float64))))
    assert back == pytest.approx(min(angle, end), rel=1e-10)


def test_variance_preserving_paths_preserve_variance():
    for path in (TRIG, VP, VP_COSINE, SD):
        alpha, sigma, _, _ = path.coeffs(torch.linspace(0, path.t_max, 999, dtype=torch.float64))
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(999, dtype=torch.float64), rtol=1e-12, atol=0)


def test_published_values():
    """Numbers worked out from the papers' formulas, not by this code."""
    t = torch.tensor(0.5, dtype=torch.float64)
    assert float(VP.coeffs(t)[0]) == pytest.approx(math.exp(-0.25 * 0.25 * 19.9 - 0.5 * 0.5 * 0.1), rel=1e-12)
    want = math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
    assert float(VP_COSINE.coeffs(t)[0]) == pytest.approx(want, rel=1e-12)
    assert [float(c) for c in RECTIFIED_FLOW.coeffs(t)] == [0.5, 0.5, -1, 1]
    assert [float(c) for c in EDM.coeffs(t)] == [1, 0.5, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ddpm_hits_its_table(dtype):
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    alpha, sigma, _, _ = SD.coeffs(t.to(dtype))
    bound = 1e-13 if dtype == torch.float64 else 3e-5
    torch.testing.assert_close(alpha.double(), BAR.sqrt(), rtol=bound, atol=0)
    torch.testing.assert_close(sigma.double(), (1 - BAR).sqrt(), rtol=bound, atol=0)


def test_ddpm_is_smooth_at_every_entry_and_falls_to_data():
    t = (torch.arange(999, dtype=torch.float64) + 1) / 1000  # the first is the joint with the part below the table
    h = 1e-9
    for before, after in zip(SD.coeffs(t - h), SD.coeffs(t + h), strict=True):
        torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-6)
    fine = torch.linspace(0, 1, 40_001, dtype=torch.float64)
    alpha, sigma, dalpha, dsigma = SD.coeffs(fine)
    assert bool((alpha.diff() < 0).all()) and bool((sigma.diff() > 0).all())
    assert bool((dalpha <= 0).all()) and bool((dsigma > 0).all())
    assert (float(alpha[0]), float(sigma[0])) == (1, 0)


@given(st.lists(st.floats(0.02, 0.98), min_size=3, max_size=12))
def test_any_falling_table_makes_a_monotone_path(ratios):
    path = ddpm(torch.cumprod(torch.tensor(ratios, dtype=torch.float64), 0))
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    assert bool((path.angle(t).diff() > 0).all())
    torch.testing.assert_close(path.time(path.angle(t)), t, rtol=0, atol=1e-7)


@pytest.mark.parametrize("bar", [[0.9, 0.5], [0.9, 0.95, 0.5], [1.0, 0.5, 0.2], [0.9, 0.5, 0.0], [[0.9, 0.5, 0.2]]])
def test_ddpm_refuses_what_is_no_table(bar):
    with pytest.raises(ConfigError, match="falling"):
        ddpm(torch.tensor(bar))


def test_times_per_frame_broadcast_over_channels():
    x0, eps = torch.randn(2, 2, 3, 3, 4, 4)  # as many frames as channels: a wrong axis would not fail by its shape
    t = torch.rand(2, 3)
    mixed = RECTIFIED_FLOW.mix(x0, eps, t)
    for frame in range(3):
        torch.testing.assert_close(
            mixed[:, :, frame], RECTIFIED_FLOW.mix(x0[:, :, frame], eps[:, :, frame], t[:, frame])
        )
    assert expand(torch.tensor(0.5), x0).shape == ()


def test_half_precision_converts_in_float32():
    t = torch.tensor([0.03])
    x0, eps = torch.randn(2, 1, 64)
    x_t, pred = TRIG.mix(x0, eps, t), TRIG.target(x0, eps, t, "v")
    out = TRIG.convert(pred.bfloat16(), x_t.bfloat16(), t, "v", "eps")
    assert out.dtype == torch.float32
    assert off(out, eps) < 0.02
    assert VP.solve(t.half(), "eps", "v")[0].dtype == torch.float32  # VP's exponent would lose its digits in half


@pytest.mark.parametrize("path", [*list(PATHS.values()), edm(0.01, 50.0, 5.0), vp(0.2, 15.0)], ids=lambda p: p.name)
def test_a_name_and_numbers_rebuild_a_path(path):
    twin = named_path(path.name, path.args)
    t = path.at(torch.linspace(0, 1, 20, dtype=torch.float64))
    assert twin.t_max == path.t_max
    for a, b in zip(twin.coeffs(t), path.coeffs(t), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(twin.at(torch.linspace(0, 1, 20, dtype=torch.float64)), t, rtol=0, atol=0)


def test_unknown_names():
    with pytest.raises(ConfigError, match="did you mean 'rectified_flow'"):
        named_path("rectifiedflow")
    with pytest.raises(ConfigError, match="velocity"):
        RECTIFIED_FLOW.row(torch.tensor(0.5), "veloc")
