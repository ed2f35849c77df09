"""Distributions of training times: moments in the variable in which each is defined, on every path."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hasten.core.denoiser import OnPath
from hasten.core.errors import ConfigError
from hasten.core.path import EDM, RECTIFIED_FLOW, TRIG, VP, VP_COSINE, Path
from hasten.core.times import LogitNormal, LogNormal, Uniform
from tests.oracle import Gaussian, Ideal
from tests.test_path import SD

PATHS = {"rf": RECTIFIED_FLOW, "trig": TRIG, "edm": EDM, "vp": VP, "vp_cosine": VP_COSINE, "sd": SD}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
N = 40_000


def unit(path: Path, t: Tensor) -> Tensor:
    """The unit times of native ones, worked out here and not by the path."""
    if path.name != "edm":
        return t.double() / path.t_max
    lo, hi = 0.002 ** (1 / 7), 80 ** (1 / 7)
    return (t.double() ** (1 / 7) - lo) / (hi - lo)


@every_path
def test_uniform(path):
    t = Uniform(0.02, 0.98).draw(path, N)
    u = unit(path, t)
    assert t.shape == (N,) and t.dtype == torch.float32
    assert 0.02 - 1e-5 <= float(u.min()) < 0.0215 and 0.9785 < float(u.max()) <= 0.98 + 1e-5
    assert float(u.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(u.var()) == pytest.approx(0.96**2 / 12, rel=0.03)


@every_path
@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (-0.4, 1.0, 1.0), (0.5, 0.7, 3.0)])
def test_logit_normal(path, mean, std, shift):
    """The shift s u/(1 + (s - 1) u) adds log s to the logit."""
    u = unit(path, LogitNormal(mean, std, shift).draw(path, N)).clamp(1e-6, 1 - 1e-6)
    logit = torch.log(u / (1 - u))
    assert float(logit.mean()) == pytest.approx(mean + math.log(shift), abs=0.02)
    assert float(logit.std()) == pytest.approx(std, rel=0.02)


@every_path
@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (-1.0, 1.4), (-1.1, 2.0)])
def test_log_normal(path, mean, std):
    t = LogNormal(mean, std).draw(path, N).double()
    alpha, sigma, _, _ = path.coeffs(t)
    log = torch.log(sigma / alpha)
    low, middle, high = torch.quantile(log, torch.tensor([0.1587, 0.5, 0.8413], dtype=torch.float64))
    assert float(middle) == pytest.approx(mean, abs=0.03)
    assert float(high - low) / 2 == pytest.approx(std, rel=0.03)
    assert float(t.min()) > 0 and float(t.max()) <= path.t_max * (1 + 1e-6)


@every_path
def test_extreme_noise_is_the_end_and_never_data(path):
    """float32's pi/2 has a negative tangent: on EDM the noisiest draws once came out as clean data."""
    t = LogNormal(40.0, 1.0).draw(path, 100)
    assert float(t.min()) == pytest.approx(path.t_max, rel=1e-6)


@pytest.mark.parametrize("path", [VP, EDM, SD], ids=lambda p: p.name)
@pytest.mark.parametrize(
    "times", [Uniform(), LogitNormal(2.0, 2.0), LogNormal(2.0, 2.0)], ids=lambda t: type(t).__name__
)
def test_a_view_draws_only_times_its_network_knows(path, times):
    view = OnPath(Ideal(Gaussian(), path, "eps"), TRIG)
    t = times.draw(view.path, 4000)
    assert float(t.max()) <= view.path.t_max * (1 + 1e-6) and float(t.min()) >= 0
    assert float(path.time(t).max()) <= path.t_max


def test_draws_follow_the_seed():
    draw = lambda: LogitNormal().draw(RECTIFIED_FLOW, 5)  # noqa: E731
    first = draw()
    assert not torch.equal(draw(), first)
    torch.manual_seed(0)
    assert torch.equal(draw(), first)


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.7, 0.2), (-0.1, 1.0), (0.0, 1.1)])
def test_an_empty_range_is_refused(low, high):
    with pytest.raises(ConfigError, match="low < high"):
        Uniform(low, high)
