"""Cache policies: against closed forms and their rules by hand, on native networks; calibration, plans, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from hasten.core.errors import ConfigError
from hasten.core.method import Sampling, even
from hasten.core.path import RECTIFIED_FLOW
from hasten.core.sample import sample
from hasten.speed import Cache, Cast, Compile, Quantize, as_dict, from_dict, speed_up
from hasten.speed.cache import POLICIES, calibrate
from hasten.speed.caching.policies import forecast
from hasten.speed.caching.state import FEW, change, few
from tests.test_speed import draw, inputs, relative, same, state, tiny

STEPS = 12
ACTS: dict[str, dict[str, Any]] = {
    "easycache": {"threshold": 0.3},
    "taylor": {"interval": 3},
    "schedule": {"mask": "001101101010"},
    "magcache": {"threshold": 0.3},
    "teacache": {"threshold": 0.3},
    "firstblock": {"threshold": 0.5, "degree": 1},
    "dual": {"threshold": 0.5, "first": 1, "last": 1},
    "dicache": {"threshold": 0.9, "first": 2},
    "regions": {"interval": 3, "share": 0.3},
}
NEVER: dict[str, dict[str, Any]] = {
    "schedule": {"mask": "0" * STEPS},
    "taylor": {"interval": 1},
    "regions": {"interval": 1},
    "magcache": {"threshold": 1e-12},
    "dual": {"threshold": 1e-12, "first": 2, "last": 1},
}
every_policy = pytest.mark.parametrize("policy", list(ACTS))


def deep(**fields: Any) -> Any:
    torch.manual_seed(0)
    return tiny(depth=4, **fields)


def numbers(net: Any, policy: str, *others: Any, cond: Any = None) -> dict[str, Any]:
    """What a policy has to know of ``net`` beforehand, from two runs."""
    if policy not in ("teacache", "magcache"):
        return {}
    cond = inputs()[1] if cond is None else cond
    runs = [lambda fast, x=x: draw(fast, x, cond, STEPS) for x in torch.randn(2, 4, 1, 4, 4)]
    return calibrate(net, policy, runs, STEPS, *others)


def acting(net: Any, policy: str) -> Cache:
    return Cache(policy, **ACTS[policy], **numbers(net, policy))


# --- every policy ---------------------------------------------------------------------------------------------


@every_policy
@pytest.mark.parametrize("text", [False, True], ids=["image", "image and text"])
def test_a_policy_acts_and_its_undo_is_bit_exact(policy, text):
    net, (noise, cond, _) = deep(text_dim=8 if text else 0), inputs()
    if text:
        cond = {**cond, "text": torch.randn(4, 3, 8)}
    extra = numbers(net, policy, cond=cond)
    before, want = state(net), draw(net, noise, cond, STEPS)
    up = speed_up(net, Cache(policy, **ACTS[policy], **extra))
    with up as fast:
        got = draw(fast, noise, cond, STEPS)
        again = draw(fast, noise, cond, STEPS)
    counts = up.ledger()["cache"]
    assert counts["calls"] == 2 * STEPS and 0 < counts["hit_rate"] < 0.8
    assert torch.equal(got, again) and not torch.equal(got, want) and relative(got, want) < 0.3
    assert same(state(net), before) and torch.equal(draw(net, noise, cond, STEPS), want)
    assert not any("forward" in vars(m) for m in net.modules())


@every_policy
@pytest.mark.parametrize("two_calls", [False, True])
def test_where_it_never_fires_the_run_is_the_uncached_one_bit_for_bit(policy, two_calls):
    net, (noise, cond, uncond) = deep(), inputs()
    plan = Sampling(even(STEPS), cfg_scale=2.0)
    want, got = sample(net, noise, cond, plan, uncond=uncond, two_calls=two_calls), None
    cache = Cache(policy, **NEVER.get(policy, {"threshold": 1e-12}), **numbers(net, policy))
    with pytest.raises(ConfigError, match="Cache: 0 of"), speed_up(net, cache) as fast:
        got = sample(fast, noise, cond, plan, uncond=uncond, two_calls=two_calls)
    assert got is not None and torch.equal(got, want)


@every_policy
def test_a_policy_survives_yaml(policy):
    cache = acting(deep(), policy)
    assert from_dict(yaml.safe_load(yaml.safe_dump(as_dict(cache)))) == cache


@pytest.mark.parametrize("policy", [p for p in ACTS if p != "regions"])
def test_a_skip_does_not_compile_again_and_runs_only_what_it_must(policy):
    net, (noise, cond, _) = deep(), inputs()
    cache = acting(net, policy)
    up = speed_up(net, Compile(backend="eager"), cache)
    with up as fast:
        draw(fast, noise, cond, STEPS)
        first = up.ledger()
        draw(fast, noise, cond, STEPS)
        second = up.ledger()
    always = {"dual": 2, "dicache": 2, "firstblock": 1}.get(policy, 0)
    reused = first["cache"]["reused"]
    assert first["compile"]["graphs"] == second["compile"]["graphs"] == 1
    assert first["compile"]["runs"] == 4 * (STEPS - reused) + always * reused and reused > 0
    assert not any("forward" in vars(m) for m in net.modules())


def test_regions_and_compile_are_refused_together():
    with pytest.raises(ConfigError, match="chooses tokens inside the blocks"):
        speed_up(deep(), Cache("regions"), Compile(backend="eager"))


@pytest.mark.parametrize("policy", ["firstblock", "dual", "dicache", "teacache", "regions"])
def test_policies_inside_the_network_go_with_quantize_and_cast(policy):
    net, (noise, cond, _) = deep(), inputs()
    others = (Quantize(min_side=32), Cast())
    found = numbers(net, policy)
    if found:
        assert numbers(net, policy, *others) != found  # the quantized model is another one
    want = draw(net, noise, cond, STEPS)
    up = speed_up(net, *others, Cache(policy, **ACTS[policy], **found))
    with up as fast:
        got = draw(fast, noise, cond, STEPS)
    assert up.ledger()["cache"]["reused"] > 0 and relative(got, want) < 0.3
    assert torch.equal(draw(net, noise, cond, STEPS), want)


# --- closed forms ---------------------------------------------------------------------------------------------


class InTime(nn.Module):
    """A velocity that is a polynomial in time, whatever the sample is."""

    path, kind = RECTIFIED_FLOW, "velocity"

    def __init__(self, *powers: float):
        super().__init__()
        self.powers, self.blocks, self.calls = powers, nn.ModuleList([nn.Identity()]), 0
        self.times: list[float] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: Any, r: Any = None) -> Tensor:
        self.calls += 1
        self.times.append(float(t.flatten()[0]))
        value = sum(a * t[:, None] ** i for i, a in enumerate(self.powers))
        return value * torch.ones_like(x_t)


@pytest.mark.parametrize(
    ("cache", "powers"),
    [
        (Cache("taylor", interval=4, degree=0), (0.7,)),
        (Cache("taylor", interval=4, degree=1), (0.7, -1.3)),
        (Cache("taylor", interval=4, degree=2), (0.7, -1.3)),
        (Cache("taylor", threshold=1e6, degree=1), (0.7, -1.3)),
        (Cache("schedule", mask="001101110111", degree=0), (0.7,)),
        (Cache("schedule", mask="001101110111", degree=1), (0.7, -1.3)),
    ],
    ids=lambda v: f"{v.policy} {v.degree} {v.interval}" if isinstance(v, Cache) else "",
)
def test_a_forecast_is_exact_for_a_network_of_its_degree(cache, powers):
    net, noise = InTime(*powers), torch.randn(3, 2, dtype=torch.float64)
    want = draw(net, noise, {}, STEPS)
    net.calls = 0
    up = speed_up(net, cache)
    with up as fast:
        got = draw(fast, noise, {}, STEPS)
    assert net.calls == STEPS - up.ledger()["cache"]["reused"] <= 7
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_a_forecast_of_too_low_a_degree_is_not_exact():
    net, noise = InTime(0.7, -1.3), torch.randn(3, 2, dtype=torch.float64)
    want = draw(net, noise, {}, STEPS)
    with speed_up(net, Cache("taylor", interval=4, degree=0)) as fast:
        assert (draw(fast, noise, {}, STEPS) - want).abs().max() > 1e-2


def test_the_forecast_is_taylors_with_differences_for_derivatives():
    times, values, now = [0.5, 0.7, 1.0], [3.0, 2.0, 5.0], 0.3
    d1, before = (3.0 - 2.0) / (0.5 - 0.7), (2.0 - 5.0) / (0.7 - 1.0)
    d2 = (d1 - before) / (0.5 - 0.7)
    want = {0: 3.0, 1: 3.0 + d1 * -0.2, 2: 3.0 + d1 * -0.2 + d2 * 0.02}
    for degree, value in want.items():
        weights = forecast(times, now, degree)
        assert sum(w * v for w, v in zip(weights, values, strict=False)) == pytest.approx(value)
    assert forecast(times[:1], now, 2) == [1.0]


def test_magcache_multiplies_its_ratios():
    """E += |1 - R|, R the product since the last computed step, by hand."""
    net, noise, ratios = InTime(1.0), torch.randn(3, 2), (1.0, *(0.9, 0.91, 0.9, 0.92, 1.1, 1.1) * 2)[:STEPS]
    up = speed_up(net, Cache("magcache", threshold=0.25, ratios=ratios, max_skips=3))
    with up as fast:
        draw(fast, noise, {}, STEPS)
    want, error, product, run = [], 0.0, 1.0, 0
    for step in range(STEPS):
        product *= ratios[step]
        error += abs(1 - product)
        if 2 <= step < STEPS - 1 and run < 3 and error < 0.25:
            run += 1
        else:
            want.append(step)
            error, product, run = 0.0, 1.0, 0
    assert [round((1 - t) * STEPS) for t in net.times] == want
    assert up.ledger()["cache"]["reused"] == STEPS - len(want) > 2


# --- calibration, plans, refusals -----------------------------------------------------------------------------


def test_magcaches_ratios_are_those_of_the_predictions():
    net = InTime(1.0, 2.0)
    found = calibrate(net, "magcache", [lambda fast: draw(fast, torch.randn(3, 2), {}, STEPS)], STEPS)
    sizes = [3 - 2 * i / STEPS for i in range(STEPS)]
    assert found["ratios"] == pytest.approx([1.0, *(b / a for a, b in zip(sizes, sizes[1:], strict=False))], rel=1e-4)
    assert all(type(v) is float for v in found["ratios"])


def test_teacaches_polynomial_is_the_least_squares_fit_of_the_changes():
    """The pairs (d of block 0's modulated input, d of the prediction), collected with hooks of the test's own."""
    net, (noise, cond, _) = deep(), inputs()
    noises, pairs, runs = [noise, torch.randn_like(noise)], [], []
    for x in noises:
        signals: list[Tensor] = []
        outs: list[Tensor] = []
        hooks = [
            net.blocks[0].image.qkv.register_forward_pre_hook(lambda m, args, to=signals: to.append(args[0].clone())),
            net.register_forward_hook(lambda m, args, out, to=outs: to.append(out.clone())),
        ]
        draw(net, x, cond, STEPS)
        for hook in hooks:
            hook.remove()
        now = zip(signals[1:], signals, outs[1:], outs, strict=False)
        pairs += [(change(a, b), change(c, d)) for a, b, c, d in now]
        runs.append(lambda fast, x=x: draw(fast, x, cond, STEPS))
    found = calibrate(net, "teacache", runs, STEPS)
    d_in, d_out = np.array(pairs).T
    want = np.polyval(np.polyfit(d_in, d_out, 4), d_in)
    assert found["steps"] == STEPS and len(found["coefficients"]) == 5
    np.testing.assert_allclose(np.polyval(found["coefficients"], d_in), want, atol=1e-3 * d_out.mean())
    assert ((want - d_out) ** 2).sum() < ((d_out.mean() - d_out) ** 2).sum()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"policy": "teacache"}, r'needs coefficients of this very model.*calibrate\(model, "teacache", runs, steps\)'),
        ({"policy": "teacache", "coefficients": (1.0,) * 5}, "needs coefficients"),
        ({"policy": "magcache"}, r'needs a ratio.*calibrate\(model, "magcache"'),
        ({"policy": "magcache", "ratios": (1.0, float("nan"))}, "finite numbers"),
        ({"policy": "schedule"}, "needs a mask"),
        ({"policy": "schedule", "mask": "10"}, "needs a mask"),
        ({"policy": "schedule", "mask": "0x"}, "text of 0 and 1"),
        ({"policy": "schedule", "mask": "01", "warmup": 3}, "warmup does nothing for schedule"),
        ({"policy": "easycache", "degree": 1}, "degree does nothing for easycache"),
        ({"policy": "firstblock", "first": 2}, "first does nothing for firstblock"),
        ({"policy": "deepcache", "threshold": 0.1}, "threshold does nothing for deepcache"),
        ({"policy": "taylor", "degree": 3}, "degree must be 0, 1 or 2"),
        ({"policy": "deepcache", "interval": 0}, "interval must be a whole number from 1"),
        ({"policy": "regions", "share": 1.0}, "between 0 and 1"),
        ({"policy": "dual", "last": -1}, "last must be a whole number from 0"),
    ],
    ids=str,
)
def test_bad_configs_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        Cache(**values)


@pytest.mark.parametrize("policy", ["schedule", "magcache", "teacache"])
def test_a_plan_is_for_its_step_count(policy):
    net, (noise, cond, _) = deep(), inputs()
    with pytest.raises(ConfigError, match=f"requests of {STEPS} steps, not 20; .* again"):
        with speed_up(net, acting(net, policy)) as fast:
            draw(fast, noise, cond, 20)


def test_a_calibration_needs_runs_of_its_step_count_and_points_enough():
    net, (noise, cond, _) = deep(), inputs()
    with pytest.raises(ConfigError, match="took 9 steps, not 12"):
        calibrate(net, "magcache", [lambda fast: draw(fast, noise, cond, 9)], 12)
    with pytest.raises(ConfigError, match="too few"):
        calibrate(net, "teacache", [lambda fast: draw(fast, noise, cond, 5)], 5)
    with pytest.raises(ConfigError, match="in no request"):
        calibrate(net, "magcache", [lambda fast: None], 5)
    with pytest.raises(ConfigError, match="needs runs"):
        calibrate(net, "magcache", [], 5)
    with pytest.raises(ConfigError, match="policy of calibrate"):
        calibrate(net, "easycache", [lambda fast: None], 5)


@pytest.mark.parametrize(
    ("cache", "steps", "most"), [(Cache(), 4, 1), (Cache(warmup=5), 6, 0), (Cache("taylor", interval=2), 4, 1)]
)
def test_a_short_request_is_refused_with_what_could_be_skipped_at_most(cache, steps, most):
    net, (noise, cond, _) = deep(), inputs()
    with pytest.raises(ConfigError, match=f"at most {most} of {steps} could be skipped"), speed_up(net, cache) as fast:
        draw(fast, noise, cond, steps)


@pytest.mark.parametrize(
    "cache",
    [Cache(threshold=1e6), Cache("dual", threshold=1e6, total_skips=3), Cache("taylor", interval=3),
     Cache("firstblock", threshold=1e6, max_skips=1, warmup=5), Cache("schedule", mask="001101101010")],
    ids=lambda c: c.policy,
)  # fmt: skip
def test_the_ceiling_is_what_a_threshold_without_limit_reaches(cache):
    net, (noise, cond, _) = deep(), inputs()
    up = speed_up(net, cache)
    with up as fast:
        draw(fast, noise, cond, STEPS)
    reused = up.ledger()["cache"]["reused"]
    assert reused == cache.ceiling(STEPS) if cache.policy != "taylor" else 0 < reused <= cache.ceiling(STEPS)


def test_an_interval_is_not_cut_short_by_the_cap_on_skips():
    net, (noise, cond, _) = deep(), inputs()
    up = speed_up(net, Cache("taylor", interval=8))
    with up as fast:
        draw(fast, noise, cond, 20)
    assert up.ledger()["cache"]["reused"] == 15  # computed: 0, 1, 9, 17 and the last


@pytest.mark.parametrize("policy", ["firstblock", "dual", "dicache", "teacache", "magcache"])
def test_an_inert_threshold_is_named_with_one_that_acts(policy):
    net, (noise, cond, _) = deep(), inputs()
    found = numbers(net, policy)
    with pytest.raises(ConfigError, match=r"at threshold 1e-12; the smallest estimated change was") as caught:
        with speed_up(net, Cache(policy, threshold=1e-12, **found)) as fast:
            draw(fast, noise, cond, STEPS)
    named = float(str(caught.value).split("was ")[1].split(",")[0])
    with speed_up(net, Cache(policy, threshold=1.1 * named, **found)) as fast:
        draw(fast, noise, cond, STEPS)


def test_means_are_taken_of_few_elements_and_those_stand_for_all():
    assert few(torch.arange(12.0).view(3, 4)).numel() == 12
    torch.manual_seed(0)
    big = torch.randn(2, 1024, 512) * torch.linspace(0.1, 3, 512)  # channels of very different size
    picked = few(big)
    assert FEW / 2 < picked.numel() < 2 * FEW
    assert float(picked.abs().mean()) == pytest.approx(float(big.abs().mean()), rel=0.02)
    assert change(torch.ones(3), torch.zeros(3)) == float("inf") and change(torch.zeros(3), torch.zeros(3)) == 0


def test_every_policy_is_tested():
    assert set(ACTS) | {"deepcache"} == set(POLICIES)
