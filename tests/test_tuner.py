"""The tuner: its programme against brute force, its costs against a network whose errors are known, its budget."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import hasten
from hasten.core.errors import CheckpointError, ConfigError
from hasten.core.method import Sampling, even
from hasten.core.path import EDM, RECTIFIED_FLOW, VP
from hasten.core.sample import Hop, ode, sample
from hasten.costs import LONGEST, Gram, Steps, Trace, Watch, moved, moves, plans, refined
from hasten.ledger import with_layers
from hasten.speed import Cache, Cast, Guidance, Quantize, speed_up
from hasten.speed.calibrate import calibrate
from hasten.speed.host import host
from hasten.speed.plan import Plan, fingerprint, load_stack
from hasten.tuner import Budget, Point, Search, front, tune
from hasten.workload import Workload, picture
from tests.pipelines import FAMILIES
from tests.test_speed import tiny

N = 7


def random_trace(guided: bool, seed: int = 0) -> Trace:
    """A request of N steps, whose predictions are random walks in 5 dimensions."""
    walk = torch.randn(2, N, 1, 5, generator=torch.Generator().manual_seed(seed)).cumsum(1)
    t = [torch.tensor([1 - (k / N) ** 1.5]) for k in range(N)]
    return Trace(list(walk[0]), t, list(walk[0]), list(walk[1]) if guided else [], 3.0 if guided else 1.0)


def gaps_of(modes: str, trace: Trace, feel: torch.Tensor) -> list[torch.Tensor]:
    """The error that each gap of a plan leaves, from its letters and the predictions themselves, without products."""
    found, computed = [], [k for k, m in enumerate(modes) if m.isupper()]
    for n, i in enumerate(computed):
        end = computed[n + 1] if n + 1 < len(computed) else len(modes)
        said = trace.cond if modes[i] == "A" else [trace.whole(k) for k in range(N)]
        error = torch.zeros(1, 5, dtype=torch.float64)
        for k in range(i, end):
            made = said[i].double()
            if n:
                before = computed[n - 1]
                slope = (said[i] - said[before]).double() / float(trace.t[i] - trace.t[before])
                made = made + slope * float(trace.t[k] - trace.t[i])
            error += float(feel[k]) * (made - trace.whole(k).double())
        found.append(error)
    return found


def loss_of(modes: str, trace: Trace, feel: torch.Tensor) -> float:
    """The loss of a plan whose gaps are independent."""
    return sum(float(error.square().mean()) for error in gaps_of(modes, trace, feel))


def refined_loss_of(modes: str, trace: Trace, feel: torch.Tensor) -> float:
    """The mean of that and of the square of the sum."""
    gaps = gaps_of(modes, trace, feel)
    return 0.5 * loss_of(modes, trace, feel) + 0.5 * float(torch.stack(gaps).sum(0).square().mean())


@pytest.mark.parametrize("guided", [False, True])
def test_the_programme_finds_what_trying_every_plan_finds(guided):
    trace, feel = random_trace(guided), torch.linspace(0.3, 2.0, N, dtype=torch.float64)
    cost = {"F": 2 if guided else 1, "A": 1}
    best: dict[int, float] = {}
    for letters in itertools.product("FAh" if guided else "Fh", repeat=N - 1):
        modes = "F"
        for letter in letters:  # h: forecast after the computed step before
            modes += letter if letter != "h" else ("f" if modes[-1] in "Ff" else "a")
        units = sum(cost.get(m, 0) for m in modes)
        best[units] = min(best.get(units, math.inf), loss_of(modes, trace, feel))
    got = plans(Gram.of([trace]), feel, warmup=1)
    assert len(got) > 3
    for plan in got:
        assert plan.loss == pytest.approx(best[plan.units], rel=1e-5, abs=1e-9)
        assert plan.loss == pytest.approx(loss_of(plan.modes, trace, feel), rel=1e-5, abs=1e-9)
        assert plan.units == sum(cost.get(m, 0) for m in plan.modes) and len(plan.modes) == N
    for units, loss in best.items():  # a plan that was dropped is beaten by one that is kept
        assert any(p.units <= units and p.loss <= loss + 1e-6 for p in got)
    assert [p.units for p in got] == sorted((p.units for p in got), reverse=True)
    assert [p.loss for p in got] == sorted(p.loss for p in got)


@pytest.mark.parametrize("guided", [False, True])
def test_a_refined_plan_has_no_better_neighbour(guided):
    feel, better = torch.linspace(0.3, 2.0, N, dtype=torch.float64), 0
    traces = [random_trace(guided, seed) for seed in range(6)]
    for trace, plan in ((t, p) for t in traces for p in plans(Gram.of([t]), feel, warmup=1)):
        got = refined(Gram.of([trace]), feel, plan, warmup=1)
        assert got.units == plan.units and sorted(m for m in got.modes if m.isupper()) == sorted(
            m for m in plan.modes if m.isupper()
        )
        least = refined_loss_of(got.modes, trace, feel)
        assert got.modes[0] == plan.modes[0] and least <= refined_loss_of(plan.modes, trace, feel)
        better += least < refined_loss_of(plan.modes, trace, feel)
        for j, k in itertools.product(range(1, N), repeat=2):
            if got.modes[j].isupper() and got.modes[k].islower() and abs(j - k) <= 4:
                tried = moved(got.modes, j, k)
                assert refined_loss_of(tried, trace, feel) >= 0.998 * least, (got.modes, tried)
    assert better  # or the search would not be shown to do anything


def test_refining_keeps_the_warm_up_and_ends_where_nothing_changes():
    feel = torch.ones(N).double()
    still = Gram(torch.ones(N, N).double(), tuple(1 - k / N for k in range(N)))  # rounding makes errors below 0
    for plan in plans(still, feel):
        assert refined(still, feel, plan).loss == pytest.approx(0.0, abs=1e-12)
    assert float(still.square(torch.linspace(-1, 1, N).double())) >= 0
    for trace in (random_trace(True, seed) for seed in range(6)):
        found = Gram.of([trace])
        for plan in plans(found, feel, warmup=3):
            got = refined(found, feel, plan, warmup=3)
            assert got.modes[:3] == "FFF"
            assert got.loss == pytest.approx(refined_loss_of(got.modes, trace, feel), rel=1e-4, abs=1e-9)


def test_a_moved_step_takes_its_letter_along():
    assert moved("FfAaFf", 2, 3) == "FffAFf" and moved("FfAaFf", 4, 1) == "FFAaaa" and moved("FFff", 1, 3) == "FffF"


def test_a_plan_is_a_mask_and_scales():
    plan = Steps("FfAaF", 5, 0.1)
    (cache,), (guidance,) = plan.cache(), plan.guidance(3.0)
    assert cache == Cache("schedule", mask=(False, True, False, True, False), degree=1)
    assert guidance == Guidance(scales=(3.0, 3.0, 1.0, 1.0, 3.0))
    assert (
        Steps("FFF", 6, 0.0).cache() == Steps("FFF", 6, 0.0).guidance(3.0) == Steps("FFf", 4, 0.0).guidance(1.0) == []
    )
    fitted = ((), (), ((0, -1.0), (1, 2.0)))
    assert Steps("FFf", 4, 0.0).cache(fitted) == [Cache("schedule", mask="001", weights=fitted)]


def test_a_programme_keeps_no_plan_that_costs_more_and_loses_as_much():
    still = Gram(torch.ones(2 * N, 2 * N).double(), tuple(1 - k / N for k in range(N)), 3.0)  # nothing ever changes
    (only,) = plans(still, torch.ones(N).double(), warmup=1)
    assert only.units == 2 and only.modes == "F" + "f" * (N - 1)
    long = Gram(torch.ones(30, 30).double(), tuple(1 - k / 15 for k in range(15)), 3.0)
    runs = re.split("[FA]", plans(long, torch.ones(15).double())[-1].modes)
    assert 0 < max(len(run) for run in runs) <= LONGEST


def test_warm_up_steps_are_computed_and_guided():
    for plan in plans(Gram.of([random_trace(True)]), torch.ones(N).double(), warmup=3):
        assert plan.modes.startswith("FF") and plan.modes[2] == "F"
    assert any(p.modes[1] != "F" for p in plans(Gram.of([random_trace(True)]), torch.ones(N).double(), warmup=1))


@pytest.mark.parametrize(("path", "kind"), [(RECTIFIED_FLOW, "velocity"), (VP, "eps"), (EDM, "x0")])
def test_a_step_moves_the_sample_as_the_sampler_does(path, kind):
    """An error of 1 in one prediction, and the samples that the sampler itself makes of it, one step later."""
    trace = Trace(t=[t[None] for t in path.at(torch.tensor(even(6)[:-1], dtype=torch.float64))])
    got = moves(trace, path, kind)
    for k, t in enumerate(trace.t):
        s = trace.t[k + 1] if k < 5 else torch.zeros(1, dtype=torch.float64)
        hop = [Hop.between(path, kind, lambda x, t, v=v: torch.full_like(x, v), None, torch.ones(1, 1).double(), t, s)
               for v in (0.0, 1.0)]  # fmt: skip
        assert float(got[k]) == pytest.approx(abs(float(ode(hop[1]) - ode(hop[0]))), rel=1e-6)


# --- what is watched ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("two_calls", [False, True])
def test_a_trace_is_what_the_network_said(two_calls):
    net, noise, label = tiny(), torch.randn(3, 1, 4, 4), torch.tensor([0, 1, 2])
    cond, uncond, watch = {"label": label}, {"label": torch.full_like(label, 3)}, Watch()
    plan = Sampling(even(6), cfg_scale=2.5)
    with speed_up(net, watch) as fast:
        sample(fast, noise, cond, plan, uncond=uncond, two_calls=two_calls)
    (trace,) = watch.traces
    assert len(trace.cond) == len(trace.uncond) == len(trace.x) == 6 and trace.scale == 2.5
    torch.testing.assert_close(trace.x[0], noise)
    for k in (0, 3):
        with torch.no_grad():
            torch.testing.assert_close(trace.cond[k], net(trace.x[k], trace.t[k], cond), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(trace.uncond[k], net(trace.x[k], trace.t[k], uncond), rtol=1e-4, atol=1e-5)
    step = trace.x[0] + (trace.t[1] - trace.t[0]).view(-1, 1, 1, 1) * trace.whole(0)
    torch.testing.assert_close(trace.x[1], step, rtol=1e-4, atol=1e-5)


def test_products_are_mean_products_over_requests():
    a, b = random_trace(True, 1), random_trace(True, 2)
    got = Gram.of([a, b])
    want = sum((t.whole(2) * t.cond[4]).mean() for t in (a, b)) / 2
    assert float(got.products[2, N + 4]) == pytest.approx(float(want), rel=1e-5) and got.guided and got.scale == 3.0
    change = torch.zeros(2 * N, dtype=torch.float64)
    change[1], change[0] = 1.0, -1.0
    assert float(got.square(change)) == pytest.approx(
        float(sum((t.whole(1) - t.whole(0)).square().mean() for t in (a, b)) / 2), rel=1e-5
    )
    assert not Gram.of([random_trace(False)]).guided


@pytest.mark.parametrize("name", ["sd3", "qwenimage", "dit"])
def test_pipelines_are_watched_with_both_branches(name):
    pipe, call = FAMILIES[name]()
    steps = {k: v for k, v in call.items() if k != "num_inference_steps"}
    work, watch = Workload(pipe, 5, steps), Watch()
    made = with_layers([watch], work, lambda: work.samples(2)[0])
    torch.testing.assert_close(made, work.samples(2)[0])
    assert len(watch.traces) == 2 and len(watch.traces[0].cond) == 5
    two = work.host.adapter.found.cfg_scale != 1
    assert len(watch.traces[0].uncond) == (5 if two else 0) and (watch.traces[0].scale != 1) == two


# --- the budget -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({}, "The budget is max_loss="),
        (0.05, "not 0.05"),
        ({"psrn": 30}, "did you mean 'psnr'"),
        ({"psnr": "much"}, "at least so many dB"),
        ({"fd": 0.05}, '"5%"'),
        ({"ssim": "5%"}, "ssim is at least, from 0 to 1"),
        ({"ssim": 95}, "from 0 to 1"),
        ({"lpips": -1}, "at most"),
        ({"lpips": 0.05}, "LPIPS needs torchvision"),
    ],
    ids=str,
)
def test_a_budget_that_is_none_is_refused(raw, words):
    with pytest.raises(ConfigError, match=words):
        Budget.of(raw)


def test_a_budget_holds_on_the_right_side():
    budget = Budget.of({"psnr": 30, "fd": "5%"})
    assert budget.holds({"psnr": 30.0, "fd_high": 0.05}) and budget.holds({"psnr": math.inf, "fd_high": -0.1})
    assert not budget.holds({"psnr": 29.9, "fd_high": 0.0}) and not budget.holds({"psnr": 40, "fd_high": 0.051})
    assert not budget.holds({"psnr": 40, "fd": 0.02, "fd_high": 0.06}), "an estimate alone promises nothing"
    assert Budget({"lpips": 0.1}).holds({"lpips": 0.1}) and not Budget({"lpips": 0.1}).holds({"lpips": 0.11})


def test_the_front_has_what_nothing_beats():
    points = [Point([], {"ssim": s}, t) for s, t in ((1.0, 9.0), (0.9, 5.0), (0.8, 6.0), (0.5, 1.0))]
    assert [p.seconds for p in front(points, Budget({"ssim": 0.7}))] == [1.0, 5.0, 9.0]
    losses = ((50, 0.01, 5.0), (49, 0.02, 6.0), (40, 0.0, 7.0))
    points = [Point([], {"psnr": p, "fd_high": fd, "ssim": 0.5 + t / 100}, t) for p, fd, t in losses]
    assert [p.seconds for p in front(points, Budget({"psnr": 30, "fd": 0.05}))] == [5.0, 7.0]
    assert [p.seconds for p in front(points, Budget({"psnr": 30}))] == [5.0]


@pytest.fixture(scope="module")
def tuned() -> tuple[Any, Plan]:
    torch.manual_seed(0)
    net = tiny()
    sampling = Sampling(even(16), cfg_scale=2.0)
    return net, tune(net, max_loss={"psnr": 22}, sampling=sampling, calls=8, layers=[Cast()], batch=8)


def test_the_tuner_keeps_its_promise_on_held_out_noise(tuned):
    net, plan = tuned
    assert plan.measured["held_out"]["psnr"] >= 22 and plan.measured["loss"]["psnr"] >= 22
    skipped = next(t for t in plan.transforms if t.name == "cache")
    assert sum(skipped.mask) >= 4
    work = Workload(net, 16, sampling=Sampling(even(16), cfg_scale=2.0))
    base, _ = work.samples(8, seed=5)
    made, _ = with_layers([plan], work, lambda: work.samples(8, seed=5))
    assert float((made - base).square().mean()) < 4 * 10 ** (-1.9)
    points = plan.measured["front"]
    assert {p["steps"] for p in points} >= {""} and len(points) >= 3 and points[-1]["within"]
    assert all(p["within"] == (p["loss"]["psnr"] == "inf" or p["loss"]["psnr"] >= 22) for p in points)
    assert plan.fingerprint["shape"] == [1, 4, 4] and plan.measured["floor"]["psnr"] > 60


class Told:
    """A judge whose shares are told, with an error of 1 %: nothing is worse at all, the rest by what the mse says."""

    def paired(self, own: Tensor, each: int) -> Any:
        assert each == 1
        return lambda other: (float((own - other).square().mean()) * 10, 0.01)


def test_a_budget_in_fd_holds_with_its_uncertainty(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hasten.tuner.JUDGED", 8)
    judge: Any = Told()
    sampling = Sampling(even(16), cfg_scale=2.0)
    plan = tune(tiny(), max_loss={"fd": "6%"}, sampling=sampling, calls=8, layers=[], batch=8, judge=judge)
    for found in (plan.measured["loss"], plan.measured["held_out"]):
        assert found["fd_high"] == pytest.approx(found["fd"] + 1.645 * 0.01, abs=2e-5) and found["fd_high"] <= 0.06
    said: list[str] = []
    with pytest.raises(ConfigError, match="Nothing faster"):
        tune(tiny(), max_loss={"fd": "1%"}, sampling=sampling, calls=8, layers=[], judge=judge, tell=said.append)


def test_bisection_ends_at_the_last_plan_within_the_budget():
    torch.manual_seed(0)
    work, budget = Workload(tiny(), 16, sampling=Sampling(even(16), cfg_scale=2.0)), Budget.of({"psnr": 35})
    search = Search(work, budget, 6, lambda text: None)
    good = search.steps([])
    assert good and all(budget.holds(p.loss) for p in good)
    modes = [plan.modes for plan in search.choices]
    last = modes.index(good[-1].modes)
    assert 0 < last < len(modes) - 1
    assert not budget.holds(search.seen.loss(search.layers_of(search.choices[last + 1], []), budget.limits))


def test_a_budget_that_nothing_meets_is_refused_with_reasons():
    net = tiny()
    with pytest.raises(ConfigError, match=r"Nothing faster.*cast: its loss is over the budget"):
        tune(net, max_loss={"psnr": 90}, sampling=Sampling(even(6)), calls=2, layers=[Cast()])
    with pytest.raises(ConfigError, match=r"asks for PSNR 250.0 dB, and a flipped last bit .* makes PSNR 1\d\d"):
        tune(net, max_loss={"psnr": 250}, sampling=Sampling(even(6)), calls=2, layers=[Cast()])


def searched(psnr: float, calls: int = 6) -> Search:
    torch.manual_seed(0)
    work = Workload(tiny(), 16, sampling=Sampling(even(16), cfg_scale=2.0))
    return Search(work, Budget.of({"psnr": psnr}), calls, lambda text: None)


def test_what_is_slower_than_the_model_is_no_plan():
    search = searched(10)
    search.points = [Point([], {"psnr": math.inf}, 1.0), Point([Cast()], {"psnr": 40.0}, 1.1)]
    with pytest.raises(ConfigError, match="Nothing faster"):
        search.verified([])
    search.points[1].seconds = 0.9
    assert search.verified([])[0] is search.points[1]


def test_quantization_over_the_budget_keeps_its_worst_linears():
    layer, search = Quantize(min_side=8), searched(10)
    rough = search.point([layer])
    search.budget = Budget.of({"psnr": rough.loss["psnr"] + 0.01})
    finer, found = search.finer([], layer, rough)
    learnt = calibrate(search.work.model, [lambda model: search.few()], calls=0)
    worst = layer.worst_first(search.work.host, learnt)
    assert search.budget.holds(found.loss) and tuple(worst[: len(finer.skip)]) == finer.skip
    assert 0 < len(finer.skip) <= len(worst) / 2
    search.budget = Budget.of({"psnr": 89})
    finer, found = search.finer([], layer, rough)
    assert not search.budget.holds(found.loss) and len(finer.skip) == math.ceil(len(worst) / 2)
    search.whole_layers([layer])
    assert "over the budget" in search.left_out["quantize"]
    own = worst[-1:]
    finer, _ = search.finer([], replace(layer, skip=own), rough)
    assert finer.skip[0] == own[0] and len(finer.skip) > 1


def test_gentler_plans_are_tried_without_guidance_too(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    search = Search(Workload(tiny(), 16, sampling=Sampling(even(16))), Budget.of({"psnr": 20}), 4, lambda text: None)
    search.steps([])
    best = min(filter(search.good, search.points[1:]), key=lambda p: p.seconds)
    held_out, tried = search.held_out.loss, []

    def fails_once(layers: Any, wanted: Any) -> dict[str, float]:
        tried.append(layers)
        return {"psnr": 0.0} if len(tried) == 1 else held_out(layers, wanted)

    monkeypatch.setattr(search.held_out, "loss", fails_once)
    made, _ = search.verified([])
    computed = [p.modes.count("F") for p in (best, made)]
    assert search.verified_points == len(tried) >= 2 and computed[1] > computed[0]


def test_held_out_prompts_are_other_prompts(monkeypatch: pytest.MonkeyPatch):
    pipe, call = FAMILIES["dit"]()
    seen: dict[int, set[Any]] = {0: set(), 1: set()}

    def noted(pipe: Any, given: Any, steps: Any, seed: int, i: int) -> Any:
        seen[seed].update(given["class_labels"])
        return picture(pipe, given, steps, seed, i)

    monkeypatch.setattr("hasten.workload.picture", noted)
    work = Workload(pipe, 4, {k: v for k, v in call.items() if k != "class_labels"}, (1, 2, 3, 4, 5))
    search = Search(work, Budget.of({"psnr": 10}), 3, lambda text: None)
    assert seen == {0: {1, 3, 5}, 1: {2, 4}}
    assert search.held_out.loss([], {}) == {"psnr": math.inf, "ssim": 1.0}


def test_what_tune_needs_is_said():
    with pytest.raises(ConfigError, match="sampling="):
        tune(tiny(), max_loss={"psnr": 30})
    with pytest.raises(ConfigError, match="needs real images"):
        tune(tiny(), max_loss={"fd": "5%"}, sampling=Sampling(even(4)))
    with pytest.raises(ConfigError, match="calls of 500 or more, not 20"):
        judge: Any = object()
        tune(tiny(), max_loss={"fd": "5%"}, sampling=Sampling(even(4)), judge=judge)
    for name, value in (("calls", 0), ("calls", 1.5), ("calls", "20"), ("steps", 0), ("batch", 0)):
        wrong: Any = {name: value}
        with pytest.raises(ConfigError, match=f"tune: {name} must be a whole number"):
            tune(tiny(), max_loss={"psnr": 30}, sampling=Sampling(even(4)), **wrong)
    with pytest.raises(ConfigError, match="leave cache and guidance out"):
        layers = [Cache(), Cast(), Guidance(reuse=2)]
        tune(tiny(), max_loss={"psnr": 30}, sampling=Sampling(even(4)), layers=layers)


# --- plans ----------------------------------------------------------------------------------------------------


def test_a_plan_comes_back_from_its_file(tuned, tmp_path):
    _, plan = tuned
    plan.save(tmp_path / "deep" / "plan.yaml")
    again = Plan.load(tmp_path / "deep" / "plan.yaml")
    assert again.transforms == plan.transforms and again.fingerprint == plan.fingerprint
    assert again.measured["loss"] == plan.measured["loss"] and [*(tmp_path / "deep").iterdir()] == [
        tmp_path / "deep" / "plan.yaml"
    ]
    assert load_stack(tmp_path / "deep" / "plan.yaml") == plan.transforms


def test_a_plan_refuses_another_model_other_steps_and_another_shape(tuned):
    net, plan = tuned
    noise, cond = torch.randn(2, 1, 4, 4), {"label": torch.tensor([0, 1])}
    torch.manual_seed(1)
    with pytest.raises(ConfigError, match=r"made for weights .* tune again"):
        speed_up(tiny(), plan)
    with pytest.raises(ConfigError, match="made for model UNet, and this one has DiT"):
        speed_up(net, replace(plan, fingerprint={**plan.fingerprint, "model": "UNet"}))
    with (
        pytest.raises(ConfigError, match="made for 16 steps, not 12"),
        speed_up(net, replace(plan, transforms=(Cast(),))) as fast,
    ):
        sample(fast, noise, cond, Sampling(even(12)))
    shaped = replace(plan, transforms=(Cast(),), fingerprint={**plan.fingerprint, "shape": [1, 8, 8]})
    with pytest.raises(ConfigError, match=r"samples of \(1, 8, 8\), not \(1, 4, 4\)"), speed_up(net, shaped) as fast:
        sample(fast, noise, cond, Sampling(even(16)))


def test_the_fingerprint_sees_training_and_not_dtype_or_copies():
    net = tiny()
    one = fingerprint(host(net))
    assert one == fingerprint(host(net)) and one["steps"] is None
    with torch.no_grad():
        other = tiny()
        other.load_state_dict(net.state_dict())
        assert fingerprint(host(other)) == one
        assert fingerprint(host(other.bfloat16())) == one
        next(p for n, p in net.named_parameters() if "blocks" in n and p.ndim == 2).view(-1)[0] += 0.1
    assert fingerprint(host(net))["weights"] != one["weights"]


def test_a_pipelines_plan_names_its_scheduler():
    pipe, call = FAMILIES["sd3"]()
    steps = {k: v for k, v in call.items() if k != "num_inference_steps"}
    at = host(pipe, steps)
    plan = Plan((Quantize(min_side=8),), fingerprint(at, 4))
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=2.0)
    with pytest.raises(ConfigError, match=r"made for scheduler FlowMatchEuler.* tune again"):
        speed_up(pipe, plan, call=steps)


def test_plans_stand_alone(tuned):
    net, plan = tuned
    with pytest.raises(ConfigError, match="without other transforms"):
        speed_up(net, plan, Cast())
    with pytest.raises(ConfigError, match="one plan"):
        speed_up(net, plan, plan)


@pytest.mark.parametrize(
    ("text", "words", "error"),
    [
        ("stack: [", "no valid YAML", CheckpointError),
        ("just words", "holds no stack", CheckpointError),
        ("[]", "no transforms under 'stack'", ConfigError),
        ("[quantize]", "a transform is a mapping", ConfigError),
        ("- {name: quantise}", "did you mean 'quantize'", ConfigError),
        ("format: other\nstack: [{name: cast}]", "is no plan", CheckpointError),
        ("- {name: cast}", "is no plan", CheckpointError),
    ],
    ids=["broken", "words", "empty", "item", "name", "format", "stack"],
)
def test_files_that_are_no_plan_are_refused(text, words, error, tmp_path):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(error, match=words):
        Plan.load(tmp_path / "p.yaml") if "no plan" in words else load_stack(tmp_path / "p.yaml")
    with pytest.raises(CheckpointError, match="There is no file"):
        Plan.load(tmp_path / "missing.yaml")


def test_a_stack_file_is_a_list(tmp_path):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump([{"name": "cast"}, {"name": "quantize", "min_side": 32}]))
    assert load_stack(tmp_path / "s.yaml") == (Cast(), Quantize(min_side=32))
    assert hasten.Plan is Plan
