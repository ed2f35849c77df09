"""Fitted weights of a planned cache: exact where the predictions span few directions, back on course after a drift."""

from __future__ import annotations

from pathlib import Path as File
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.core.errors import ConfigError
from hasten.core.method import Sampling, even
from hasten.core.path import EDM, RECTIFIED_FLOW, VP, Path
from hasten.core.sample import Hop, ode, sample
from hasten.costs import Trace, Watch
from hasten.fitted import fit_weights, fitted, pull
from hasten.speed import Cache, Guidance, speed_up
from hasten.speed.host import host
from hasten.speed.plan import Plan, fingerprint, load_stack
from hasten.tuner import Budget, Search
from hasten.workload import Workload
from tests.oracle import Gaussian, Ideal
from tests.pipelines import FAMILIES
from tests.test_speed import tiny


class Law(nn.Module):
    """The exact denoiser of one Gaussian: every prediction of a request is a noise + b, so that two span them all."""

    def __init__(self, path: Path, kind: Any):
        super().__init__()
        self.law, self.path, self.kind = Gaussian(0.4, 0.5), path, kind
        self.blocks = nn.ModuleList([nn.Identity()])

    def forward(self, x_t: Tensor, t: Tensor, cond: Any, *, r: Any = None, taps: Any = ()) -> Tensor:
        x0, eps = self.law.posterior(self.path, x_t, t)
        return self.path.target(x0, eps, t, self.kind)


def drawn(net: Any, steps: int, seed: int = 0, cfg_scale: float = 1.0) -> Tensor:
    noise = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    cond = {"label": torch.arange(16) % 3} if cfg_scale != 1 else {}
    uncond = {"label": torch.full((16,), 3)} if cfg_scale != 1 else None
    return sample(net, noise, cond, Sampling(even(steps), cfg_scale=cfg_scale), uncond=uncond)


def error(net: Any, cache: Cache, want: Tensor, seed: int = 1) -> float:
    with speed_up(net, cache):
        return float((drawn(net, len(cache.mask), seed) - want).abs().mean() / want.abs().mean())


@pytest.mark.parametrize(("path", "kind"), [(RECTIFIED_FLOW, "velocity"), (VP, "eps"), (VP, "v"), (EDM, "x0")])
def test_two_computed_steps_say_all_of_a_gaussian(path, kind):
    net, mask = Law(path, kind), "0011110111"
    found = fit_weights(net, mask, [lambda net: drawn(net, 10)])
    want = drawn(net, 10, seed=1)  # other noise than the calibration's
    lost, line = (error(net, Cache("schedule", **f), want) for f in (found, {"mask": mask, "degree": 1}))
    assert lost < 2e-3 and lost < line / 10, (lost, line)


@pytest.mark.parametrize(("path", "kind"), [(RECTIFIED_FLOW, "velocity"), (VP, "v")])
def test_a_drifted_sample_is_brought_back(path, kind):
    """One computed step cannot say what follows it; the next gap knows two, and what to make up for."""
    net = Law(path, kind)
    found = fit_weights(net, "0111110110", [lambda net: drawn(net, 10)])
    seen: list[Tensor] = []
    net.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    drawn(net, 10, seed=1)
    course, seen = seen, []
    with speed_up(net, Cache("schedule", **found)):
        drawn(net, 10, seed=1)
    drift, left = (float((seen[k] - course[k]).norm() / course[k].norm()) for k in (6, 9))
    assert drift > 1e-3 and left < drift / 10, (drift, left)


@pytest.mark.parametrize(("path", "kind"), [(RECTIFIED_FLOW, "velocity"), (VP, "eps"), (VP, "v"), (EDM, "x0")])
def test_the_pull_makes_two_courses_meet(path, kind):
    t, s = path.at(torch.tensor([0.6, 0.5], dtype=torch.float64)).split(1)
    here, there, pred = torch.randn(3, 1, 5, dtype=torch.float64)
    ends = [
        ode(Hop.between(path, kind, lambda x, t, v=v: v, None, x, t, s))
        for x, v in ((there, pred), (here, pred + pull(path, kind, t, s) * (there - here)))
    ]
    torch.testing.assert_close(*ends)
    assert pull(path, kind, t, s) != 0


def test_a_trained_like_network_loses_less_than_by_a_line():
    torch.manual_seed(0)
    net, mask = tiny(), "0001101110111101"
    calls = lambda net: drawn(net, 16, cfg_scale=2.0)  # noqa: E731
    found = fit_weights(net, mask, [calls])
    want = drawn(net, 16, seed=1, cfg_scale=2.0)

    def lost(cache: Cache) -> float:
        with speed_up(net, cache) as fast:
            return float((drawn(fast, 16, seed=1, cfg_scale=2.0) - want).square().mean())

    assert lost(Cache("schedule", **found)) < 0.5 * lost(Cache("schedule", mask=mask, degree=1))


class Classes(Ideal):
    """Exact denoisers of two classes and of their unconditional law."""

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return (nn.Identity(),)

    def null(self, cond: Any) -> dict[str, Tensor]:
        return {"label": torch.full_like(cond["label"], 2)}


def test_an_unguided_gap_is_forecast_from_unguided_steps():
    """They span the guided ones of a Gaussian too, so that even the drift of the unguided step is made up for."""
    net = Classes([Gaussian(m, s) for m, s in ((0.6, 0.5), (0.6, 0.5), (0.1, 0.8))], RECTIFIED_FLOW, "velocity")
    modes, guidance = "FFAAaaFFff", Guidance(scales=(2.0, 2.0, *(1.0,) * 4, *(2.0,) * 4))

    def request(seed: int, *layers: Any) -> tuple[Tensor, list[Trace]]:
        watch, noise = Watch(), torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
        cond = {"label": torch.arange(8) % 2}
        with speed_up(net, *layers, watch) as fast:
            made = sample(fast, noise, cond, Sampling(even(10), cfg_scale=2.0), uncond=net.null(cond))
        return made, watch.traces

    rows = fitted(modes, request(0)[1], lambda layers: request(0, *layers)[1], net.path, net.kind, [guidance])
    for k, (mode, row) in enumerate(zip(modes, rows, strict=True)):
        assert [i for i, _ in row] == {"a": [3, 2], "f": [7, 6]}.get(mode, []), k
    cache = Cache("schedule", mask=tuple(m in "fa" for m in modes), weights=rows)
    line = Cache("schedule", mask=cache.mask, degree=1)
    want = request(1)[0]
    lost, by_line = (float((request(1, c, guidance)[0] - want).abs().mean()) for c in (cache, line))
    assert lost < 5e-3 and lost < by_line / 10, (lost, by_line)


def test_the_tuner_fits_a_plan_once():
    torch.manual_seed(0)
    search = Search(
        Workload(tiny(), 12, sampling=Sampling(even(12), cfg_scale=2.0)), Budget.of({"psnr": 20}), 4, lambda text: None
    )
    found = search.steps([])
    assert found and all(layer.weights for point in found for layer in point.layers if layer.name == "cache")
    plan = next(p for p in search.choices if "f" in p.modes and "a" in p.modes)
    assert search.layers_of(plan, []) is search.layers_of(plan, [])


def test_a_branch_that_missed_the_steps_is_computed():
    """Guidance that begins midway makes another batch, whose past holds none of the steps that the weights name."""
    torch.manual_seed(0)
    row = ((0, -1.0), (1, 2.0))
    net, cache = tiny(), Cache("schedule", mask="00111111", weights=((), (), *(row,) * 6))
    up = speed_up(net, cache)
    cond, uncond = {"label": torch.tensor([0, 1])}, {"label": torch.full((2,), 3)}
    with up as fast:
        plan = Sampling(even(8), cfg_scale=2.0)
        made = sample(fast, torch.randn(2, 1, 4, 4), cond, plan, uncond=uncond, interval=(0.0, 0.6))
    unguided = sum(t > 0.6 for t in plan.times[:-1])
    assert torch.isfinite(made).all() and up.ledger()["cache"]["reused"] == unguided - 2 > 0


def test_weights_travel_in_a_plan(tmp_path: File):
    net = tiny()
    found = fit_weights(net, "00110101", [lambda net: drawn(net, 8, cfg_scale=2.0)])
    plan = Plan((Cache("schedule", **found),), fingerprint(host(net), 8))
    plan.save(tmp_path / "plan.yaml")
    assert load_stack(tmp_path / "plan.yaml") == plan.transforms == Plan.load(tmp_path / "plan.yaml").transforms


def test_a_pipeline_takes_fitted_weights():
    pipe, call = FAMILIES["flux"]()
    pipe.set_progress_bar_config(disable=True)

    def run(pipe: Any, seed: int = 0) -> Tensor:
        noise = torch.Generator().manual_seed(seed)
        return pipe(**call, num_inference_steps=8, generator=noise, output_type="latent").images

    found = fit_weights(pipe, "00110111", [run], call=call)
    want = run(pipe, 1)

    def lost(cache: Cache) -> float:
        with speed_up(pipe, cache, call=call) as fast:
            return float((run(fast, 1) - want).square().mean())

    assert lost(Cache("schedule", **found)) < lost(Cache("schedule", mask=found["mask"], degree=1))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mask": "001", "weights": ((), (), ())}, "for every step that the mask skips and no other"),
        ({"mask": "001", "weights": ((), ((0, 1.0),), ((0, 1.0),))}, "for every step that the mask skips and no other"),
        ({"mask": "0101", "weights": ((), ((0, 1.0),), (), ((1, 1.0),))}, "an earlier computed step"),
        ({"mask": "001", "weights": ((), (), ((1, 1.0),)), "degree": 1}, "need no degree"),
        ({"mask": "001", "weights": ((), (), ((1, float("nan")),))}, "rows of"),
        ({"mask": "001", "weights": ((), (), (1, 2))}, "rows of"),
    ],
)
def test_weights_that_are_none_are_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        Cache("schedule", **fields)


def test_runs_that_do_not_repeat_or_are_of_other_steps_are_refused():
    net, seeds = tiny(), iter(range(99))
    with pytest.raises(ConfigError, match="the same sample every time"):
        fit_weights(net, "00110111", [lambda net: drawn(net, 8, seed=next(seeds), cfg_scale=2.0)])
    with pytest.raises(ConfigError, match="took 8 steps, and the mask has 5"):
        fit_weights(net, "00110", [lambda net: drawn(net, 8, cfg_scale=2.0)])
    for none in ([], lambda net: None):
        with pytest.raises(ConfigError, match="needs runs"):
            fit_weights(net, "0011", none)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no run called the network in a request"):
        fit_weights(net, "0011", [lambda net: None])

    def stochastic(net: Any) -> None:
        noise, plan = torch.ones(4, 1, 4, 4), Sampling(even(8), "ancestral")
        sample(
            net,
            noise,
            {"label": torch.zeros(4, dtype=torch.long)},
            plan,
            generator=torch.Generator().manual_seed(next(seeds)),
        )

    with pytest.raises(ConfigError, match="fix all its noise"):
        fit_weights(net, "00110111", [stochastic])


def test_a_module_that_is_no_denoiser_is_refused():
    net = nn.Module()
    net.blocks = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(ConfigError, match="fit_weights: Module is no denoiser"):
        fit_weights(net, "001", [lambda net: None])
