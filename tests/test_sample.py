"""Samplers against the closed-form flow map of a mixture: order, marginal law, cost, guidance, requests."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.core.errors import ConfigError
from hasten.core.method import Sampling, even
from hasten.core.path import EDM, KINDS, RECTIFIED_FLOW, TRIG, VP, VP_COSINE, Kind, Path
from hasten.core.request import current, request
from hasten.core.sample import RULES, nfe, sample, step_once
from tests.oracle import Gaussian, Ideal, Mixture, ks_distance
from tests.test_path import SD

LAW = Mixture([-1.0, 0.8], [0.5, 0.4], [0.4, 0.6])
PATHS = {"rf": RECTIFIED_FLOW, "trig": TRIG, "edm": EDM, "vp": VP, "vp_cosine": VP_COSINE, "sd": SD}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
# eps cannot give x0 where alpha = 0; x0, v and velocity can start from pure noise.
KIND: dict[str, Kind] = {"rf": "velocity", "trig": "v", "edm": "x0", "vp": "eps", "vp_cosine": "v", "sd": "eps"}


def kind_of(path: Path) -> Kind:
    return next(KIND[name] for name, p in PATHS.items() if p is path)


def truth(path: Path, noise: Tensor, law: Any = LAW) -> Tensor:
    """X(t_max -> 0) of the sampler's own start."""
    end = torch.tensor(path.t_max, dtype=torch.float64)
    return law.flow_map(path, noise * path.coeffs(end)[1], path.t_max, 0.0)


def spread(high: float, low: float, steps: int) -> tuple[float, ...]:
    return tuple(high - (high - low) * i / steps for i in range(steps + 1))


def slope(net: Ideal, noise: Tensor, want: Tensor, rule: str, high: float, low: float) -> tuple[float, float]:
    """(order, error) of a rule from ``high`` to ``low``: the slope of log error over log N from 48 to 96 steps."""
    errors = []
    for steps in (48, 96):
        got = sample(net, noise, {}, Sampling(spread(high, low, steps), rule))
        errors.append(float((got - want).pow(2).mean().sqrt()))
    return math.log2(errors[0] / errors[1]), errors[1]


@every_path
@pytest.mark.parametrize(("rule", "order"), [("ode", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_deterministic_rules_have_their_order(path, rule, order):
    """Where the coefficients are smooth: on VP sigma^2 is linear in t at data, and a last step into it has order 1."""
    noise = torch.linspace(-2.5, 2.5, 21, dtype=torch.float64)[:, None]
    high, low = (path.at(torch.tensor(u, dtype=torch.float64)) for u in (0.9, 0.2))
    want = LAW.flow_map(path, noise * path.coeffs(high)[1], high, low)
    got, error = slope(Ideal(LAW, path, kind_of(path)), noise, want, rule, 0.9, 0.2)
    assert got == pytest.approx(order, abs=0.25), error
    assert error < (0.05 if order == 1 else 2e-3)


@pytest.mark.parametrize("path", [RECTIFIED_FLOW, TRIG, EDM], ids=lambda p: p.name)
@pytest.mark.parametrize(("rule", "order"), [("ode", 1), ("heun", 2)])
def test_the_order_holds_from_pure_noise_to_data(path, rule, order):
    noise = torch.linspace(-2.5, 2.5, 21, dtype=torch.float64)[:, None]
    got, error = slope(Ideal(LAW, path, kind_of(path)), noise, truth(path, noise), rule, 1.0, 0.0)
    assert got == pytest.approx(order, abs=0.25), error
    assert error < (0.05 if order == 1 else 3e-3)


@every_path
@pytest.mark.parametrize("rule", ["ancestral", "renoise"])
def test_stochastic_rules_have_the_marginal_law(path, rule):
    """Ancestral steps reach the law as N grows; renoise with a perfect consistency function has it at any N."""
    n = 10_000
    net = Ideal(LAW, path, kind_of(path), jump=rule == "renoise")
    steps = 4 if rule == "renoise" else 100
    noise = torch.randn(n // 100, 100, dtype=torch.float64)
    x = sample(net, noise, {}, Sampling(even(steps), rule))
    # 1.95/sqrt(n) is Kolmogorov's 0.1 % point; ancestral has its own O(1/N), and VP does not quite end in pure noise.
    allowed = 1.95 / math.sqrt(n) + (0.012 if rule == "ancestral" else 0.004)
    assert ks_distance(x, LAW, path) < allowed
    assert float(x.mean()) == pytest.approx(float(LAW.mean), abs=0.035)
    assert float(x.std()) == pytest.approx(float(LAW.std), abs=0.05 if rule == "ancestral" else 0.025)
    other = sample(net, noise, {}, Sampling(even(steps), rule))
    assert float((other - x).abs().mean()) > 0.01  # fresh noise, not a function of the start


def test_ancestral_on_a_gaussian_gets_the_variance_right():
    """For N(0, 1) data the variance after every step has a closed form that ``keep`` and ``fresh`` both enter."""
    net = Ideal(Gaussian(0.0, 1.0), TRIG, "v")
    noise = torch.randn(400, 100, dtype=torch.float64)
    x = sample(net, noise, {}, Sampling(even(5), "ancestral"))
    var = 1.0
    times = [math.pi / 2 * u for u in even(5)]
    for t, s in zip(times, times[1:], strict=False):  # x_s = cos s E[x0] + sin s sqrt(k) E[eps] + fresh, E from x_t
        keep = (math.cos(t) * math.sin(s) / (math.cos(s) * math.sin(t))) ** 2
        gain = math.cos(s) * math.cos(t) + math.sin(s) * math.sqrt(keep) * math.sin(t)
        var = gain**2 * var + math.sin(s) ** 2 * (1 - keep)
    assert float(x.var()) == pytest.approx(var, rel=0.03)


@pytest.mark.parametrize("rule", RULES)
@every_path
def test_every_rule_runs_in_float32_from_noise_to_data(path, rule):
    noise = torch.linspace(-2, 2, 21)[:, None]
    x = sample(Ideal(LAW, path, kind_of(path)), noise, {}, Sampling(even(40), rule))
    assert x.dtype == torch.float32 and x.isfinite().all()
    if rule in ("heun", "dpmpp_2m"):
        assert float((x - truth(path, noise.double())).abs().max()) < 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["ode", "heun", "dpmpp_2m"])
def test_the_kind_of_prediction_does_not_matter(kind, rule):
    noise = torch.randn(8, 3, dtype=torch.float64)
    ways = [sample(Ideal(LAW, VP, k), noise, {}, Sampling(even(9), rule)) for k in ("v", kind)]
    torch.testing.assert_close(*ways, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("path", [RECTIFIED_FLOW, VP, TRIG], ids=lambda p: p.name)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_two_time_sampling_with_the_flow_map_is_exact(path, steps):
    noise = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)[:, None]
    net = Ideal(LAW, path, "v")
    got = sample(net, noise, {}, Sampling(even(steps), "ode", two_time=True))
    torch.testing.assert_close(got, truth(path, noise), rtol=1e-6, atol=1e-6)
    r = [float(r[0]) for _, r in net.draws if r is not None]
    assert r == pytest.approx([float(path.at(u)) for u in even(steps)[1:]], abs=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("times", [even(1), even(2), even(7), (1.0, 0.4, 0.05)])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_nfe_is_what_is_called(rule, times, scale):
    net = Ideal([Gaussian(-1.0), Gaussian(1.0)], RECTIFIED_FLOW, "velocity")
    sampling, cond = Sampling(times, rule, cfg_scale=scale), {"label": torch.zeros(3, dtype=torch.long)}
    noise = torch.randn(3, 2, dtype=torch.float64)
    outs = []
    for two_calls in (False, True):
        net.calls.clear()
        gen = torch.Generator().manual_seed(1)
        outs.append(sample(net, noise, cond, sampling, uncond=net.null(cond), two_calls=two_calls, generator=gen))
        assert sum(net.calls) == 3 * nfe(sampling)
    torch.testing.assert_close(*outs)


def test_guided_sampling_of_equal_covariances_lands_on_the_shifted_gaussian():
    laws, w = [Gaussian(1.0, 0.3), Gaussian(-0.2, 0.3)], 2.5
    net, cond = Ideal(laws, RECTIFIED_FLOW, "velocity"), {"label": torch.zeros(41, dtype=torch.long)}
    noise = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)[:, None]
    got = sample(net, noise, cond, Sampling(even(200), "heun", cfg_scale=w), uncond=net.null(cond))
    want = truth(RECTIFIED_FLOW, noise, Gaussian(-0.2 + w * 1.2, 0.3))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_interval_guidance_calls_the_unconditional_network_only_inside():
    net = Ideal([Gaussian(1.0, 0.3), Gaussian(-0.2, 0.3)], EDM, "x0")
    cond = {"label": torch.zeros(2, dtype=torch.long)}
    noise = torch.randn(2, 1, dtype=torch.float64)
    sample(net, noise, cond, Sampling(even(10), cfg_scale=2.0), uncond=net.null(cond), interval=(0.25, 0.75))
    assert net.calls == [2, 2, 2, 4, 4, 4, 4, 4, 2, 2]  # u = 1, 0.9, 0.8 | 0.7 ... 0.3 | 0.2, 0.1


def test_a_start_below_full_noise_and_an_end_above_data():
    """Fewer times are a part of the trajectory: the start has that time's noise, the end is x at the last time."""
    net = Ideal(LAW, VP, "v")
    noise = torch.randn(64, 1, dtype=torch.float64)
    x = sample(net, noise, {}, Sampling((0.8, 0.3), "ode", two_time=True))
    start, end = (torch.tensor(u, dtype=torch.float64) for u in (0.8, 0.3))
    torch.testing.assert_close(x, LAW.flow_map(VP, noise * VP.coeffs(start)[1], start, end), rtol=1e-6, atol=1e-6)


def test_a_generator_fixes_the_noise_of_stochastic_rules():
    net, noise = Ideal(LAW, VP, "v"), torch.randn(4, 2)
    draw = lambda seed: sample(  # noqa: E731
        net, noise, {}, Sampling(even(4), "renoise"), generator=torch.Generator().manual_seed(seed)
    )
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_one_ode_step_of_each_sample_from_its_own_time_carries_a_graph():
    law = Gaussian(0.3, 0.5, learn=True)
    net = Ideal(law, RECTIFIED_FLOW, "velocity")
    x = torch.randn(3, 4, dtype=torch.float64)
    t, s = torch.tensor([0.9, 0.5, 0.2]).double(), torch.tensor([0.1, 0.4, 0.0]).double()
    out = step_once(net, x, t, s, {}, r=s)
    torch.testing.assert_close(out, law.flow_map(RECTIFIED_FLOW, x, t, s))
    out.sum().backward()
    assert law.mean.grad is not None and float(law.mean.grad.abs()) > 0
    euler = step_once(net, x, t, s, {})
    torch.testing.assert_close(euler, x + (s - t)[:, None] * law.velocity(RECTIFIED_FLOW, x, t))


# --- requests -------------------------------------------------------------------------------------------------


class Remembers(Ideal):
    """Like a cache: keeps its own state in the request, and can fail at one call."""

    fail_at: int | None = None

    def forward(self, *args, **kwargs):
        now = current()
        assert now is not None and now.steps == 5
        count = now.state["calls"] = now.state.get("calls", 0) + 1
        self.seen = count
        if count == self.fail_at:
            raise KeyboardInterrupt
        return super().forward(*args, **kwargs)


def test_request_state_dies_with_an_aborted_request():
    net, noise = Remembers(LAW, VP, "v"), torch.randn(2, 2, dtype=torch.float64)
    first = sample(net, noise, {}, Sampling(even(5)))
    net.fail_at = 3
    with pytest.raises(KeyboardInterrupt):
        sample(net, noise, {}, Sampling(even(5)))
    assert current() is None
    net.fail_at = None
    assert torch.equal(sample(net, noise, {}, Sampling(even(5))), first) and net.seen == 5


def test_requests_nest():
    with request(1) as outer:
        outer.state["x"] = 1
        with request(2) as inner:
            assert current() is inner and inner.state == {}
        assert current() is outer and outer.state == {"x": 1}
    assert current() is None


def test_sampling_keeps_no_graph():
    net = Ideal(Gaussian(0.3, 0.5, learn=True), VP, "v")
    assert not sample(net, torch.randn(2, 2), {}, Sampling(even(2))).requires_grad


@pytest.mark.parametrize("times", [(1.0,), (1.0, 1.0, 0.0), (0.5, 0.8), (1.2, 0.0), (1.0, -0.1), ()])
def test_times_that_do_not_fall_are_refused(times):
    with pytest.raises(ConfigError, match="must fall"):
        sample(Ideal(LAW, VP), torch.randn(1, 1), {}, Sampling(times))


def test_unknown_rules_and_guidance_without_a_null_condition_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'heun'"):
        sample(Ideal(LAW, VP), torch.randn(1, 1), {}, Sampling(even(1), "huen"))
    with pytest.raises(ConfigError, match="unconditional"):
        sample(Ideal(LAW, VP), torch.randn(1, 1), {}, Sampling(even(1), cfg_scale=2.0))


def test_even():
    assert even(4) == (1, 0.75, 0.5, 0.25, 0) and even(1) == (1, 0)
