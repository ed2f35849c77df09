"""Learnt sampling times: gradients through the sampler, the best times of a Gaussian known exactly, and the command."""

from __future__ import annotations

import json
import math
from itertools import combinations, pairwise
from pathlib import Path as File
from typing import Any

import pytest
import torch

from hasten.core.bellman import best_times, cheapest, local_errors
from hasten.core.denoiser import Batch, guided
from hasten.core.errors import ConfigError
from hasten.core.method import Sampling, even
from hasten.core.sample import sample
from hasten.distribute import CheckpointError, add_sampling, load_model, read_samplings, save_model
from hasten.schedule import FLOOR, Goal, klub, learn, learn_times, nearer, through, unit_times
from tests.analytic import PATHS, LawSource, shifted
from tests.commandline import plain_consoles, refused, run  # noqa: F401
from tests.oracle import Gaussian, Ideal, Mixture
from tests.test_methods import _float64  # noqa: F401
from tests.training import network

every_path = pytest.mark.parametrize("where", PATHS)
LAW = Gaussian(0.4, 0.5)
OTHER = Gaussian(-0.3, 0.5)
MIXTURE = Mixture([-0.8, 0.7], [0.25, 0.3], [0.4, 0.6])


def distance(net: Ideal, law: Any, sampling: Sampling, labelled: bool = False) -> float:
    """Mean squared distance of the samples to the exact flow map from the same noise."""
    noise = torch.randn(2000, 1, 1, 4, generator=torch.Generator().manual_seed(11))
    cond = {"label": torch.zeros(2000, dtype=torch.long)} if labelled else {}
    got = sample(net, noise, cond, sampling, uncond=net.null(cond))
    end = torch.tensor(net.path.t_max)
    return float((got - law.flow_map(net.path, noise * net.path.coeffs(end)[1], end, 0.0)).pow(2).mean())


def ratios(where: str, sampling: Sampling) -> torch.Tensor:
    """sigma / alpha at every time."""
    path = PATHS[where][0]
    a, s, _, _ = path.coeffs(path.at(torch.tensor(sampling.times)))
    return s / a


@every_path
@pytest.mark.parametrize("steps", [3, 4])
def test_ld3_finds_the_best_times_of_a_gaussian(steps, where):
    """One DDIM step scales the deviation by cos(d) cos(phi_t)/cos(phi_s) with s tan(phi) = sigma/alpha, so the error
    of K steps is that of prod cos(d_i): even phi are best, on every path (the tangent law that AYS derives too)."""
    net = Ideal(LAW, *PATHS[where])
    found = learn(net, steps, source=LawSource(None), iterations=80, batch=16)
    phi = torch.atan(ratios(where, found.sampling) / 0.5)
    gaps = -phi.diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(steps), rtol=0.01, atol=0.0)
    assert found.sampling.rule == "ode" and (found.sampling.times[0], found.sampling.times[-1]) == (1.0, 0.0)
    even_error, error = (distance(net, LAW, s) for s in (Sampling(even(steps)), found.sampling))
    assert error < 0.95 * even_error and found.learnt < found.even
    # From noise of variance sigma^2, K steps end with 1 - prod cos(d_i) of the exact deviation missing.
    a, s, _, _ = net.path.coeffs(net.path.at(1.0))
    exact = 0.25 * s**2 / (0.25 * a**2 + s**2)
    assert error == pytest.approx(float(exact * (1 - torch.cos(gaps).prod()) ** 2), rel=0.05)


@pytest.mark.parametrize("rule", ["ode", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [3, 4])
@every_path
def test_learnt_times_beat_even_ones_on_a_mixture(steps, rule, where):
    net = Ideal(MIXTURE, *PATHS[where])
    found = learn(net, steps, rule=rule, source=LawSource(None), iterations=80, batch=16)
    assert distance(net, MIXTURE, found.sampling) < 0.9 * distance(net, MIXTURE, Sampling(even(steps), rule))


@every_path
def test_guided_times_are_those_of_the_guided_model(where):
    """Guidance of equal covariances is a Gaussian again, whose even angles are best; its samples are guided too."""
    net, source = Ideal([LAW, OTHER], *PATHS[where]), LawSource(None, labelled=True)
    found = learn(net, 4, source=source, cfg_scale=2.0, iterations=80, batch=16)
    assert found.sampling.cfg_scale == 2.0
    gaps = -torch.atan(ratios(where, found.sampling) / 0.5).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(4), rtol=0.01, atol=0.0)
    truth = shifted(LAW, OTHER, 2.0)
    errors = [distance(net, truth, s, True) for s in (Sampling(even(4), cfg_scale=2.0), found.sampling)]
    assert errors[1] < 0.95 * errors[0]
    assert (found.even, found.learnt) == pytest.approx(errors, rel=0.2)  # the many steps were guided as well
    assert distance(net, truth, Sampling(found.sampling.times), True) > 2 * errors[1]  # unguided samples are elsewhere


@every_path
@pytest.mark.parametrize("rule", ["ode", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_gradient_in_the_times_is_that_of_differences(scale, rule, where):
    net = Ideal([MIXTURE, Mixture([0.5, -0.2], [0.3, 0.4], [0.5, 0.5])], *PATHS[where])
    label = torch.zeros(5, dtype=torch.long)
    cond, uncond = {"label": label}, {"label": label + 1}
    noise = torch.randn(5, 1, 1, 4, generator=torch.Generator().manual_seed(2))
    weights = torch.randn(5, 1, 1, 4, generator=torch.Generator().manual_seed(3))

    def value(theta: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return (weights * through(net, noise, cond, uncond, unit_times(theta), rule, scale)).sum()

    theta = torch.tensor([0.3, -0.2, 0.4, 0.1], requires_grad=True)
    noise.requires_grad_(True)
    got, at_noise = torch.autograd.grad(value(theta, noise), [theta, noise])
    with torch.no_grad():
        for i in range(4):
            step = 1e-6 * torch.eye(4)[i]
            want = (value(theta + step, noise) - value(theta - step, noise)) / 2e-6
            assert float(got[i]) == pytest.approx(float(want), rel=1e-4, abs=1e-7)
        direction = torch.randn(noise.shape, generator=torch.Generator().manual_seed(4))
        want = (value(theta, noise + 1e-6 * direction) - value(theta, noise - 1e-6 * direction)) / 2e-6
        assert float((at_noise * direction).sum()) == pytest.approx(float(want), rel=1e-4)
    assert float(got.abs().max()) > 1e-3


@pytest.mark.parametrize("two_time", [False, True])
@pytest.mark.parametrize("rule", ["ode", "heun", "dpmpp_2m"])
@every_path
def test_the_differentiable_loop_is_the_sampler(rule, where, two_time):
    net = Ideal([MIXTURE, LAW], *PATHS[where])
    cond = {"label": torch.zeros(6, dtype=torch.long)}
    noise = torch.randn(6, 1, 1, 4)
    times = unit_times(torch.tensor([0.3, -0.5, 0.1]))
    sampling = Sampling(tuple(float(u) for u in times), rule, two_time, 1.5)
    assert sampling.times[0] == 1 and sampling.times[-1] == 0 and list(sampling.times) == sorted(sampling.times)[::-1]
    got = through(net, noise, cond, net.null(cond), times, rule, 1.5, two_time)
    torch.testing.assert_close(got, sample(net, noise, cond, sampling, uncond=net.null(cond)))


def test_even_times_are_what_learning_starts_from():
    assert [float(u) for u in unit_times(torch.zeros(4, dtype=torch.float64))] == pytest.approx(list(even(4)))


def test_a_perfect_flow_map_keeps_its_even_times():
    """Every hop is exact, so there is nothing to learn: the two-time network is asked with r, and even times stay."""
    net = Ideal(LAW, *PATHS["rf"])
    found = learn(net, 3, source=LawSource(None), two_time=True, iterations=4, reference_steps=8)
    assert found.even < 1e-20 and found.sampling.two_time and found.sampling.times == pytest.approx(even(3), abs=0.2)
    assert all(r is not None for _, r in net.draws)


# --- LD3's moved noise ----------------------------------------------------------------------------------------------


def test_noises_move_down_the_gradient_and_stay_in_their_ball():
    away = torch.randn(6, 1, 2, 2)
    shift = torch.zeros(6, 1, 2, 2)
    first = nearer(shift, away, 0.2)
    torch.testing.assert_close(first, -0.1 * away / away.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
    for _ in range(5):
        shift = nearer(shift, away, 0.2)
    torch.testing.assert_close(shift.flatten(1).norm(dim=1), torch.full((6,), 0.2))
    assert float((shift * away).flatten(1).sum(1).max()) < 0
    assert torch.equal(nearer(shift * 0, away, 0.0), shift * 0)


def test_moved_noise_changes_what_is_learnt_and_the_report_is_on_unmoved_noise(monkeypatch):
    net, seen = Ideal(MIXTURE, *PATHS["rf"]), []
    import hasten.schedule as schedule

    original = schedule.through

    def spy(net: Any, noise: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append((noise.requires_grad, noise.detach().clone()))
        return original(net, noise, *rest)

    monkeypatch.setattr(schedule, "through", spy)
    found = {}
    for radius in (0.0, 2.0):
        seen.clear()
        found[radius] = learn(net, 3, source=LawSource(None), iterations=10, count=8, batch=8, radius=radius)
        assert [moves for moves, _ in seen].count(True) == (10 if radius else 0)
        norms = [float((x - seen[0][1]).flatten(1).norm(dim=1).min()) for _, x in seen[-2:]]
        assert seen[-2][1].equal(seen[-1][1]) and min(norms) > 0  # fresh noise, the same for even and learnt times
        assert found[radius].even == pytest.approx(found[0.0].even)
    assert found[0.0].sampling != found[2.0].sampling


# --- AYS ------------------------------------------------------------------------------------------------------------


@every_path
def test_ays_bound_is_that_of_a_gaussian(where):
    """E|D_v - D_i|^2 is how much the posterior variance c/(1 + c SNR) falls, so each stretch of the bound is
    [(1 + c SNR')/(1 + c SNR) - 1 - log of the ratio]/2."""
    net, path = Ideal(LAW, *PATHS[where]), PATHS[where][0]
    x0 = LAW.draw((20000, 1, 1, 1), torch.Generator().manual_seed(1))
    times = unit_times(torch.tensor([1.2, 0.4, 0.0]))
    goal = Goal(x0, {}, {}, x0)
    got = float(klub(net, goal, times, 1.0, torch.Generator().manual_seed(2)))
    snr = [float((path.coeffs(path.at(u))[0] / path.coeffs(path.at(u))[1]) ** 2) for u in times[:-1]] + [FLOOR**-2]
    grow = [(1 + 0.25 * b) / (1 + 0.25 * a) for a, b in zip(snr, snr[1:], strict=False)]
    assert got == pytest.approx(sum(0.5 * (g - 1 - math.log(g)) for g in grow), rel=0.03)


@pytest.mark.parametrize(("where", "scale"), [("rf", 2.0), ("vp", None), ("edm", None)])
def test_ays_finds_the_best_times_of_a_gaussian(where, scale):
    """The sum of (1 + c SNR')/(1 + c SNR) at a fixed product is least where all are equal: even log(1 + c SNR)."""
    net = Ideal([LAW, OTHER], *PATHS[where])
    found = learn(
        net, 3, source=LawSource(None, labelled=True), objective="ays", rule="ancestral", iterations=200, count=256,
        batch=128, cfg_scale=scale,
    )  # fmt: skip
    snr = ratios(where, found.sampling) ** -2
    snr[-1] = FLOOR**-2
    gaps = torch.log(1 + 0.25 * snr).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(3), rtol=0.12, atol=0.0)
    assert found.learnt < 0.5 * found.even and found.sampling.rule == "ancestral"


def test_ays_gradient_is_that_of_differences():
    net = Ideal(MIXTURE, *PATHS["rf"])
    x0 = MIXTURE.draw((64, 1, 1, 4), torch.Generator().manual_seed(1))
    goal = Goal(x0, {}, {}, x0)

    def value(theta: torch.Tensor) -> torch.Tensor:
        return klub(net, goal, unit_times(theta), 1.0, torch.Generator().manual_seed(2))

    theta = torch.tensor([0.3, -0.2, 0.4], requires_grad=True)
    (got,) = torch.autograd.grad(value(theta), theta)
    with torch.no_grad():
        for i in range(3):
            step = 1e-6 * torch.eye(3)[i]
            want = float((value(theta + step) - value(theta - step)) / 2e-6)
            assert float(got[i]) == pytest.approx(want, rel=1e-3)


# --- by dynamic programming -----------------------------------------------------------------------------------------


@every_path
def test_the_errors_of_single_hops_are_those_of_a_gaussian(where):
    """A hop from phi to psi, s tan(phi) = sigma/alpha, scales the deviation by cos(phi - psi) of what is exact."""
    net, fine, noise = Ideal(LAW, *PATHS[where]), 6, torch.randn(4000, 1, 1, 4)
    got = local_errors(net, Batch({}, {}, (4000, 1, 1, 4)), noise, fine, None)
    a, s, _, _ = net.path.coeffs(net.path.at(torch.tensor(even(fine))))
    phi, wide = torch.atan2(s, 0.5 * a), torch.hypot(0.5 * a, s)
    factor = torch.cos(phi[:, None] - phi[None]) * wide[None] / wide[:, None]
    size = [torch.tensor(1.0)]
    for j in range(fine):
        size.append(size[-1] * factor[j, j + 1])
    start = s[0] ** 2 + (0.4 * a[0]) ** 2
    for j in range(fine + 1):
        for k in range(fine + 1):
            if k <= j:
                assert math.isinf(float(got[j, k]))
            else:
                want = float(start * (size[k] - size[j] * factor[j, k]) ** 2)
                assert float(got[j, k]) == pytest.approx(want, rel=0.05, abs=1e-9)


def test_the_cheapest_way_is_the_cheapest_of_all_ways():
    cost = torch.rand(8, 8, dtype=torch.float64).triu(1)
    cost[cost == 0] = math.inf
    price = lambda way: float(sum(cost[j, k] for j, k in pairwise(way)))  # noqa: E731
    for steps in range(1, 8):
        ways = [(0, *inner, 7) for inner in combinations(range(1, 7), steps - 1)]
        assert tuple(cheapest(cost, steps)) == min(ways, key=price)
    for steps in (0, 8):
        with pytest.raises(ConfigError, match=f"{steps} steps cannot be chosen out of 7"):
            cheapest(cost, steps)
    cost[2, 5] = math.nan
    with pytest.raises(ConfigError, match="trajectory is not finite; use float32, or a lower cfg_scale"):
        cheapest(cost, 3)


def test_the_best_times_are_those_of_all_samples_each_counted_once():
    net, source, told = Ideal(MIXTURE, *PATHS["rf"]), LawSource(None), []
    found = best_times(net, source, 3, 12, 50, 20, None, "cpu", 4, lambda *done: told.append(done))
    generator, parts = torch.Generator().manual_seed(4), []
    for n in (20, 20, 10):
        made = source.batch(n, generator, torch.device("cpu"))
        noise = torch.randn(made.shape, generator=generator)
        parts += [n / 50 * local_errors(net, made, noise, 12, None)]
    assert found == tuple(even(12)[i] for i in cheapest(sum(parts[1:], parts[0]), 3))
    assert told == [(20, 50), (40, 50), (50, 50)]


@every_path
@pytest.mark.parametrize("steps", [3, 4])
def test_bellmans_times_beat_even_ones_on_a_mixture(steps, where):
    net = Ideal(MIXTURE, *PATHS[where])
    found = learn(net, steps, objective="bellman", source=LawSource(None), count=200, batch=100)
    grid = [u * (66 if steps == 3 else 64) for u in found.sampling.times]
    assert grid == pytest.approx([round(g) for g in grid]) and found.sampling.rule == "ode"
    even_error, error = (distance(net, MIXTURE, s) for s in (Sampling(even(steps)), found.sampling))
    assert error < 0.9 * even_error and found.learnt < 0.9 * found.even


def test_even_times_stay_where_what_bellman_says_is_no_better_in_the_end():
    """N(0, 1) in two steps: the errors of the hops sum to less at uneven times, the end is further off."""
    found = learn(Ideal(Gaussian(0.0, 1.0), *PATHS["rf"]), 2, objective="bellman", source=LawSource(None))
    assert found.sampling.times == pytest.approx(even(2)) and found.learnt == found.even


def test_bellmans_trajectories_are_guided_and_a_seed_repeats():
    net = Ideal([MIXTURE, OTHER], *PATHS["rf"])

    class Whole:
        """The guided network as one that needs no guidance."""

        path, kind = net.path, net.kind

        def __call__(self, x: torch.Tensor, t: torch.Tensor, cond: Any, *, r: Any = None) -> torch.Tensor:
            return guided(net, x, t, cond, net.null(cond), 5.0, net.kind)

    options: Any = {"source": LawSource(LAW, labelled=True), "count": 50, "batch": 20, "objective": "bellman"}
    state = torch.get_rng_state()
    found, again, plain = (learn(net, 3, cfg_scale=w, **options) for w in (5.0, 5.0, None))
    assert torch.equal(state, torch.get_rng_state())
    alone = learn(Whole(), 3, **options)
    assert found == again and (found.sampling.cfg_scale, plain.sampling.cfg_scale) == (5.0, 1.0)
    assert found.sampling.times == alone.sampling.times != plain.sampling.times


# --- what a person gives and gets -----------------------------------------------------------------------------------


def test_weights_and_random_state_are_left_alone_and_a_seed_repeats():
    torch.set_default_dtype(torch.float32)
    net = network()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    options: Any = {"iterations": 3, "count": 4, "batch": 2, "reference_steps": 6}
    found = [learn_times(net, 3, seed=s, **options) for s in (0, 0, 1)]
    assert found[0] == found[1] and torch.equal(state, torch.get_rng_state())
    assert all(v.equal(before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "objective": ({"objective": "ld4"}, "did you mean 'ld3'"),
    "rule": ({"rule": "hein"}, "did you mean 'heun'"),
    "random": ({"rule": "ancestral"}, "cannot be learnt by ld3"),
    "order": ({"rule": "heun", "objective": "bellman"}, "cannot be learnt by bellman: it takes ode"),
    "renoise": ({"rule": "renoise", "objective": "ays"}, "cannot be learnt by ays"),
    "one": ({"steps": 1}, "take at least 2"),
    "reference": ({"reference_steps": 4}, "more than 4 steps"),
    "iterations": ({"iterations": 0}, "positive"),
    "count": ({"count": 0}, "positive"),
    "two": ({"two_time": True, "rule": "heun"}, "two-time"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused(case):
    options, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        learn(Ideal(LAW, *PATHS["rf"]), **{"steps": 4, "source": LawSource(None), **options})


@pytest.fixture
def model(tmp_path: File) -> File:
    """A tiny model in a folder with a recipe beside it."""
    torch.set_default_dtype(torch.float32)
    save_model(network(), tmp_path / "m", {8: Sampling(even(8), "ode", False, 1.5)}, {"iterations": 7})
    (tmp_path / "m" / "recipe.yaml").write_text("kept: true\n")
    return tmp_path / "m"


def test_a_sampling_is_added_to_a_model_and_nothing_else_changes(model: File):
    weights = load_model(model).state_dict()
    new = Sampling((1.0, 0.7, 0.2, 0.0), "heun", False, 2.0)
    add_sampling(model, new)
    assert read_samplings(model) == {8: Sampling(even(8), "ode", False, 1.5), 3: new}
    add_sampling(model, Sampling((1.0, 0.6, 0.2, 0.0)))
    assert read_samplings(model)[3].times[1] == 0.6
    assert all(v.equal(weights[k]) for k, v in load_model(model).state_dict().items())
    assert sorted(p.name for p in model.iterdir()) == ["model.json", "model.safetensors", "recipe.yaml"]
    with pytest.raises(CheckpointError):
        add_sampling(model.parent / "nowhere", new)


def test_hasten_times_writes_what_it_learnt(model: File, tmp_path: File):
    args = ("times", str(model), "--steps", "3", "--iterations", "12")
    result = run(*args, "--out", str(tmp_path / "t.json"))
    numbers = [float(u) for u in result.stdout.split(",")]
    assert numbers[0] == 1 and numbers[-1] == 0 and len(numbers) == 4 and numbers == sorted(numbers)[::-1]
    wrote = json.loads((tmp_path / "t.json").read_text())
    assert (wrote["cfg_scale"], wrote["rule"]) == (1.5, "ode") and wrote["times"] == pytest.approx(numbers, abs=1e-4)
    assert sorted(read_samplings(model)) == [8]
    told = result.stderr.replace("\n", " ")
    assert "distance to many steps, on noise that was not learnt from:" in told
    run(*args, "--rule", "heun", "--cfg-scale", "1", "--objective", "ays")
    kept = read_samplings(model)
    assert sorted(kept) == [3, 8] and (kept[3].rule, kept[3].cfg_scale) == ("heun", 1.0)
    assert kept[3].times != pytest.approx(even(3), abs=1e-3)
    run("sample", str(model), "--steps", "3", "--count", "4", "--out", str(tmp_path / "s.png"))
    told = run(*args[:4], "--rule", "ode", "--objective", "bellman", "--out", str(tmp_path / "b.json"))
    assert "distance to many steps, on noise that was not learnt from:" in told.stderr.replace("\n", " ")


def test_hasten_times_refuses_in_one_sentence(model: File, tmp_path: File):
    assert ".json file" in refused("times", str(model), "--out", str(tmp_path / "t.txt"))
    assert "cannot be learnt" in refused("times", str(model), "--rule", "renoise")
    assert "at least 2" in refused("times", str(model), "--steps", "1")
    assert "did you mean 'ld3'" in refused("times", str(model), "--objective", "ld4")
