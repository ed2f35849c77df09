"""Guidance as a layer: what stands for the unconditional branch, by hand and against the model's own sampler."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from hasten.core.errors import ConfigError, UnsupportedModel
from hasten.core.method import Sampling, even
from hasten.core.sample import sample
from hasten.models.probe import record
from hasten.speed import Cache, Cast, Compile, Guidance, as_dict, from_dict, speed_up
from hasten.speed.host import host
from hasten.speed.transform import override
from tests.pipelines import FAMILIES
from tests.test_speed import inputs, tiny

STEPS = 6
TWO_CALLS = ("qwenimage", "wan")
BATCHED = {"dit": True, "sd15": False, "sdxl": False, "sd3": False, "z_image": True, "sana": False, "ltx": False,
           "cogvideox": False}  # whether the conditional half is the first  # fmt: skip
every_family = pytest.mark.parametrize("name", [*TWO_CALLS, *BATCHED])
some_families = pytest.mark.parametrize("name", ["qwenimage", "wan", "dit", "sdxl", "z_image"])
_made: dict[str, Any] = {}


def family(name: str) -> tuple[Any, dict[str, Any]]:
    """One pipeline a family, so that each is probed once: every transform leaves it as it was."""
    if name not in _made:
        _made[name] = FAMILIES[name]()
    return _made[name]


def latents(pipe: Any, call: dict[str, Any], steps: int = STEPS) -> Tensor:
    """The sample after a run's last step."""
    inner, seen = pipe.scheduler.step, []

    def step(*args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        seen.append((result[0] if isinstance(result, tuple) else result.prev_sample).clone())
        return result

    undo = override(pipe.scheduler, step, "step")
    pipe.set_progress_bar_config(disable=True)
    fresh = {k: list(v) if isinstance(v, list) else v for k, v in call.items()}  # some pipelines write into it
    try:
        pipe(**{"num_inference_steps": steps, "generator": torch.Generator().manual_seed(0), **fresh})
    finally:
        undo()
    return seen[-1]


def rows(thing: Any) -> Tensor:
    """What a network returned, one row a sample."""
    first = thing[0] if isinstance(thing, tuple) else next(iter(thing.values()))
    return torch.stack(list(first))


def by_hand(pipe: Any, name: str, call: dict[str, Any], change: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
    """The run in which both branches are always computed, then u becomes change(step, c, u)."""
    net = next(m for m in (getattr(pipe, k, None) for k in ("transformer", "unet")) if m is not None)
    calls: list[Tensor] = []

    def hook(module: Any, args: Any, output: Any) -> Any:
        out = rows(output)
        calls.append(out)
        if name in TWO_CALLS:
            if len(calls) % 2:
                return None
            out = change(len(calls) // 2 - 1, calls[-2], out)
        else:
            a, b = out.chunk(2)
            c, u = (a, b) if BATCHED[name] else (b, a)
            u = change(len(calls) - 1, c, u)
            out = torch.cat([c, u] if BATCHED[name] else [u, c])
        if not isinstance(output, tuple):
            return type(output)(out)
        return ((list(out) if isinstance(output[0], list) else out), *output[1:])

    handle = net.register_forward_hook(hook)
    try:
        return latents(pipe, call)
    finally:
        handle.remove()


def near(got: Tensor, want: Tensor, name: str) -> None:
    """Equal: bit for bit where a branch is a call of its own, to rounding where it is half of a batch."""
    if name in TWO_CALLS:
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def times(pipe: Any, call: dict[str, Any], at: Any) -> list[float]:
    """The path's times of the run's steps."""
    return [float(at.adapter.found.clock(s.t.double())) for s in record(pipe, call, STEPS).steps]


# --- pipelines ------------------------------------------------------------------------------------------------


@every_family
def test_outside_the_interval_the_unconditional_branch_is_the_conditional_one_and_not_computed(name):
    """Some steps in, some out: against a run that computes all and replaces u; undo leaves no trace."""
    pipe, call = family(name)
    before = latents(pipe, call)
    at = host(pipe, call)
    inside = [0.3 < t < 0.8 for t in times(pipe, call, at)]
    assert 0 < sum(inside) < STEPS
    path = at.adapter.path
    units = torch.linspace(0, 1, 2001, dtype=torch.float64)
    low, high = (float(units[(path.at(units) - v).abs().argmin()]) for v in (0.3, 0.8))
    want = by_hand(pipe, name, call, lambda i, c, u: u if inside[i] else c)
    up = speed_up(pipe, Guidance(interval=(low, high)), call=call)
    with up as fast:
        got = latents(fast, call)
    near(got, want, name)
    assert not torch.equal(got, before) and torch.equal(latents(pipe, call), before)
    counts, out = up.ledger()["guidance"], STEPS - sum(inside)
    assert counts["guided"] == STEPS and counts["skipped"] == out and counts["reused"] == 0
    assert counts["rows"] == 2 * STEPS - out
    assert counts["calls"] == (2 * STEPS - out if name in TWO_CALLS else STEPS)


@every_family
def test_an_interval_that_no_step_is_in_is_a_run_without_guidance(name):
    pipe, call = family(name)
    quiet = host(pipe, call).adapter.found.quiet
    want = latents(pipe, {**call, **quiet})
    with speed_up(pipe, Guidance(interval=(0.0, 1e-9)), call=call) as fast:
        near(latents(fast, call)[: len(want)], want, name)
        near(latents(fast, {**call, **quiet}), want, "wan")  # and a call without guidance is left alone


@some_families
def test_all_steps_inside_and_nothing_reused_is_bit_exact(name):
    pipe, call = family(name)
    want = latents(pipe, call)
    with pytest.raises(ConfigError, match="changes nothing"):
        speed_up(pipe, Guidance(), call=call)
    at = host(pipe, call)
    undo, close = Guidance().apply(at), at.opened()
    try:
        assert torch.equal(latents(pipe, call), want)
    finally:
        close()
        undo()


@some_families
def test_the_residual_of_the_last_computed_step_is_reused(name):
    pipe, call = family(name)
    held: dict[str, Tensor] = {}

    def change(i: int, c: Tensor, u: Tensor) -> Tensor:
        if i % 3 == 0:
            held["r"] = u - c
            return u
        return c + held["r"]

    want = by_hand(pipe, name, call, change)
    up = speed_up(pipe, Guidance(reuse=2), call=call)
    with up as fast:
        got = latents(fast, call)
        near(latents(fast, call), got, "wan")  # and the next request starts from nothing
    near(got, want, name)
    counts = up.ledger()["guidance"]
    assert counts["reused"] == counts["skipped"] == 2 * 4 and counts["rows"] == 2 * (2 * STEPS - 4)


@every_family
def test_a_scale_per_step_is_the_pipelines_own_guidance_at_that_scale(name):
    """One scale for all steps is the pipeline called with it; a scale for each part changes those steps alone."""
    pipe, call = family(name)
    (key,) = host(pipe, call).adapter.found.quiet
    shift = 1 if name == "z_image" else 0  # c + s (c - u)
    want = latents(pipe, {**call, key: 2.0 - shift})
    up = speed_up(pipe, Guidance(scales=(2.0,)), call=call)
    with up as fast:
        got = latents(fast, call)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    counts = up.ledger()["guidance"]
    assert counts["rescaled"] == counts["checked"] == STEPS and counts["skipped"] == 0
    w = call[key] + shift
    factors = [(1 - 1) / (w - 1), 0.5 / (w - 1), 2 / (w - 1)]
    want = by_hand(pipe, name, call, lambda i, c, u: c + factors[i // 2] * (u - c))
    up = speed_up(pipe, Guidance(scales=(1.0, 1.5, 3.0)), call=call)
    with up as fast:
        torch.testing.assert_close(latents(fast, call), want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    assert up.ledger()["guidance"]["skipped"] == 2


def test_a_pipeline_that_changes_its_scale_by_itself_is_found_out():
    pipe, call = family("cogvideox")
    with (
        pytest.raises(ConfigError, match="did not guide with the scale 6 that its call says"),
        speed_up(pipe, Guidance(scales=(2.0,)), call=call) as fast,
    ):
        latents(fast, {**call, "use_dynamic_cfg": True})


@pytest.mark.parametrize("name", ["sd15", "wan"])
def test_another_scale_or_batch_in_the_call_than_in_the_probe(name):
    """The scale is read from each call; two prompts are halved by rows, also where their latents are equal."""
    pipe, call = family(name)
    many = {**call, "prompt": ["a red bicycle", "a cat"], "negative_prompt": ["blurry", "dark"]}
    for one in (many, {**call, "guidance_scale": 3.5}):
        w = one["guidance_scale"]
        want = by_hand(pipe, name, one, lambda i, c, u, w=w: c + (u - c) / (w - 1))
        with speed_up(pipe, Guidance(scales=(2.0,)), call=call) as fast:
            torch.testing.assert_close(latents(fast, one), want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    same = torch.randn(1, *latents(pipe, call).shape[1:]).expand(2, *latents(pipe, call).shape[1:])
    off = {**many, "guidance_scale": 1.0, "latents": same}
    want = latents(pipe, off)
    with speed_up(pipe, Guidance(interval=(0.0, 1e-9)), call=call) as fast:
        assert torch.equal(latents(fast, off), want) and not torch.equal(want[0], want[1])
        near(latents(fast, {**many, "latents": same}), want, name)


def test_a_pipeline_that_leaves_guidance_out_of_some_steps_by_itself():
    """Z-Image's truncation: those calls are of B rows, which are no two halves."""
    pipe, call = family("z_image")
    many = {**call, "prompt": ["a red bicycle", "a cat"], "negative_prompt": ["blurry", "dark"], "cfg_truncation": 0.5}
    want = latents(pipe, {**many, "guidance_scale": 0.0})
    up = speed_up(pipe, Guidance(interval=(0.0, 1e-9)), call=call)
    with up as fast:
        near(latents(fast, many), want, "z_image")
    counts = up.ledger()["guidance"]
    assert 0 < counts["skipped"] == counts["guided"] < STEPS and counts["rows"] == 2 * STEPS


def test_true_guidance_of_a_model_with_embedded_guidance_is_two_calls():
    pipe, call = family("flux")
    true = {**call, "negative_prompt": "blurry", "true_cfg_scale": 3.0}
    want = latents(pipe, call)
    with speed_up(pipe, Guidance(interval=(0.0, 1e-9)), call=true) as fast:
        assert torch.equal(latents(fast, true), want)


def test_models_without_a_second_branch_are_refused():
    for name in ("flux", "flux2"):
        pipe, call = family(name)
        with pytest.raises(ConfigError, match="no unconditional branch in this call"):
            speed_up(pipe, Guidance(interval=(0.1, 0.8)), call=call)
    pipe, call = family("sd15")
    with pytest.raises(ConfigError, match="no unconditional branch in this call"):
        speed_up(pipe, Guidance(interval=(0.1, 0.8)), call={**call, "guidance_scale": 1.0})
    with pytest.raises(ConfigError, match="compile its decisions"):
        speed_up(pipe, Guidance(interval=(0.1, 0.8)), Compile("net", backend="eager"), call=call)


@pytest.mark.parametrize("name", ["wan", "sd15"])
def test_an_inert_guidance_is_an_error_with_the_reason(name):
    pipe, call = family(name)
    quiet = host(pipe, call).adapter.found.quiet
    for layer, said, words in [
        (Guidance(interval=(1e-6, 1.0)), {}, "were inside the interval"),
        (Guidance(interval=(0.1, 0.8)), quiet, "was guided; sample with a scale above 1"),
        (Guidance(reuse=3), {"num_inference_steps": 1}, "no residual was reused in 1 guided"),
        (Guidance(scales=(call["guidance_scale"],)), {}, "the scales are those"),
    ]:
        with pytest.raises(ConfigError, match=words), speed_up(pipe, layer, call=call) as fast:
            latents(fast, {"num_inference_steps": 4, **call, **said})


@pytest.mark.parametrize("name", ["wan", "sd3"])
def test_beside_a_cast_a_cache_and_compiled_blocks(name):
    """The cache is inside: it sees the calls that are made, of each branch or batch its own."""
    pipe, call = family(name)
    want = latents(pipe, call, 16)
    layers = (Guidance(interval=(0.3, 0.9)), Cache(threshold=1.0), Cast(), Compile(backend="eager"))
    up = speed_up(pipe, *layers, call=call)
    with up as fast:
        got = latents(fast, call, 16)
    assert float((got - want).norm() / want.norm()) < 0.5
    counts = up.ledger()
    assert list(counts) == ["cast", "cache", "guidance", "compile"]
    assert counts["cache"]["calls"] == counts["guidance"]["calls"]
    assert torch.equal(latents(pipe, call, 16), want)


def test_a_copy_of_the_scheduler_steps_itself():
    pipe, call = family("sd3")
    with speed_up(pipe, Guidance(scales=(2.0,)), call=call) as fast:
        other = copy.deepcopy(fast.scheduler)
        latents(fast, call)
        other.set_timesteps(3)
        before = fast.scheduler.step_index
        other.step(torch.zeros(1, 4, 8, 8), other.timesteps[0], torch.zeros(1, 4, 8, 8))
        assert other.step_index == 1 and fast.scheduler.step_index == before == STEPS
        assert type(other).__name__ == "FlowMatchEulerDiscreteScheduler"


def test_more_than_two_branches_are_refused(monkeypatch):
    from hasten.speed import halves

    pipe, call = FAMILIES["wan"]()
    found = halves.record

    def thrice(*args: Any, **kwargs: Any) -> Any:
        seen = found(*args, **kwargs)
        for step in seen.steps:
            step.looks += step.looks[:1]
        return seen

    monkeypatch.setattr(halves, "record", thrice)
    with pytest.raises(UnsupportedModel, match="3 samples for one"):
        speed_up(pipe, Guidance(reuse=1), call=call)


# --- native -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("two_calls", [False, True])
@pytest.mark.parametrize("rule", ["ode", "heun"])
def test_a_native_model_as_its_own_sampler_with_an_interval(rule, two_calls):
    net, (noise, cond, uncond) = tiny(), inputs()
    how = {"uncond": uncond, "two_calls": two_calls}
    sampling = Sampling(even(10), rule, cfg_scale=3.0)
    want = sample(net, noise, cond, sampling, interval=(0.25, 0.7), **how)
    up = speed_up(net, Guidance(interval=(0.25, 0.7)))
    with up as fast:
        assert torch.equal(sample(fast, noise, cond, sampling, **how), want)
    assert up.ledger()["guidance"]["skipped"] > 0
    assert not torch.equal(sample(net, noise, cond, sampling, **how), want)
    want = sample(net, noise, cond, sampling, interval=(0.5, 0.7), **how)
    with speed_up(net, Guidance(interval=(0.5, 0.7))) as fast:  # beside an interval of the sampler's own
        assert torch.equal(sample(fast, noise, cond, sampling, interval=(0.25, 1.0), **how), want)


@pytest.mark.parametrize("two_calls", [False, True])
def test_native_scales_and_reuse(two_calls):
    net, (noise, cond, uncond) = tiny(), inputs()
    how = {"uncond": uncond, "two_calls": two_calls}
    want = sample(net, noise, cond, Sampling(even(8), cfg_scale=1.7), **how)
    up = speed_up(net, Guidance(scales=(1.7,)))
    with up as fast:
        torch.testing.assert_close(sample(fast, noise, cond, Sampling(even(8), cfg_scale=4.0), **how), want)
    counts = []
    for n in (1, 3):
        up = speed_up(net, Guidance(reuse=n))
        with up as fast:
            sample(fast, noise, cond, Sampling(even(8), cfg_scale=2.0), **how)
        counts.append(up.ledger()["guidance"]["reused"])
    assert counts == [4, 6]
    with (
        pytest.raises(ConfigError, match="sample with a scale above 1"),
        speed_up(net, Guidance(interval=(0.1, 0.8))) as fast,
    ):
        sample(fast, noise, cond, Sampling(even(8)))


# --- the config -----------------------------------------------------------------------------------------------


def test_yaml_round_trip_and_bad_values():
    for layer in (Guidance((0.1, 0.8)), Guidance(reuse=2), Guidance(scales=(1.0, 4.5))):
        assert from_dict(yaml.safe_load(yaml.safe_dump(as_dict(layer)))) == layer
    for values, words in [
        ({"interval": (0.8, 0.1)}, "low < high"),
        ({"interval": (0.1, 0.2, 0.3)}, "low < high"),
        ({"interval": "all"}, "must be numbers"),
        ({"scales": ()}, "must be numbers"),
        ({"scales": (True,)}, "must be numbers"),
        ({"reuse": -1}, "whole number"),
        ({"reuse": 1.5}, "whole number"),
    ]:
        with pytest.raises(ConfigError, match=words):
            Guidance(**values)
