"""Sampling times in pipelines: what the network sees, where the steps land, and which schedulers cannot."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from hasten.core.errors import ConfigError, UnsupportedModel
from hasten.core.method import Sampling
from hasten.core.sample import sample
from hasten.models.probe import record
from hasten.models.template import conditions
from hasten.speed import Cast, Times, as_dict, from_dict, speed_up
from hasten.speed.host import host
from hasten.speed.times import landing
from hasten.speed.transform import override
from tests.pipelines import FAMILIES, diffusers
from tests.test_guidance_layer import family, latents
from tests.test_speed import tiny

UNIT = (1.0, 0.93, 0.6, 0.41, 0.05)
NATIVE = ("sdxl", "sd3", "flux", "qwenimage", "z_image", "sana", "wan", "ltx")
# What the network is called with at a time t of its path, by family.
SEEN = {
    "sdxl": ("timestep", lambda t: 1000 * t - 1),
    "sd3": ("timestep", lambda t: 1000 * t),
    "flux": ("timestep", lambda t: t),
    "qwenimage": ("timestep", lambda t: t),
    "z_image": ("t", lambda t: 1 - t),
    "sana": ("timestep", lambda t: 1000 * t),
    "wan": ("timestep", lambda t: 1000 * t),
    "ltx": ("timestep", lambda t: 1000 * t),
}
SHIFT = {"sdxl": 1.0, "sd3": 3.0, "z_image": 3.0, "sana": 3.0, "wan": 3.0}


def swapped(name: str, scheduler: str, **config: Any) -> tuple[Any, dict[str, Any]]:
    """A pipeline with another scheduler."""
    pipe, call = FAMILIES[name]()
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **config)
    return pipe, call


def watched(at: Any, call: dict[str, Any], name: str) -> tuple[list[float], Tensor, Tensor]:
    """What the network is called with as its time, the sample before the first step, and after the last."""
    seen, first, pipe = [], [], at.pipe
    inner = pipe.scheduler.step

    def look(module: Any, args: Any, kwargs: Any) -> None:
        value = at.arguments(args, kwargs)[name]
        seen.append(float(value.flatten()[0]))

    def step(out: Any, t: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        first.append(x.clone())
        return inner(out, t, x, *args, **kwargs)

    hook, undo = at.net.register_forward_pre_hook(look, with_kwargs=True), override(pipe.scheduler, step, "step")
    try:
        last = latents(pipe, call, len(UNIT))
    finally:
        hook.remove()
        undo()
    return seen, first[0], last


@pytest.mark.parametrize("name", NATIVE)
def test_the_network_sees_these_times(name):
    pipe, call = family(name)
    at = host(pipe, call)
    before = latents(pipe, call, len(UNIT))
    up = speed_up(pipe, Times((*UNIT, 0.0)), call=call)
    with up:
        seen, _, last = watched(at, call, SEEN[name][0])
        again = watched(at, call, SEEN[name][0])
    shift = SHIFT.get(name, (*at.adapter.path.args, 1.0)[0])
    want = [SEEN[name][1](shift * u / (1 + (shift - 1) * u)) for u in UNIT]
    once = list(dict.fromkeys(seen))  # two calls under guidance
    assert once == pytest.approx(want, rel=1e-5, abs=1e-4)
    assert up.ledger()["times"] == {"requests": 2, "steps": 10, "moved": pytest.approx(10, abs=4)}
    assert again[0] == seen and torch.equal(again[2], last) and not torch.equal(last, before)
    assert torch.equal(latents(pipe, call, len(UNIT)), before)
    assert type(pipe.scheduler) is getattr(diffusers, type(pipe.scheduler).__name__)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "z_image"])
def test_the_steps_are_those_of_hastens_own_sampler_at_these_times(name):
    """An Euler scheduler from the same noise without guidance: where it lands is where Sampling(times) does."""
    pipe, call = family(name)
    at = host(pipe, call)
    adapter = at.adapter
    call = {**call, **adapter.found.quiet}
    cond = conditions(adapter.called, record(pipe, call, 2, stop=1).steps[0].looks[-1])
    with speed_up(pipe, Times(UNIT), call=family(name)[1]):
        _, first, got = watched(at, call, SEEN[name][0])
    sigma = adapter.path.coeffs(adapter.path.at(torch.tensor(UNIT[0])))[1]
    if name == "sdxl":  # its samples are scaled by 1 / alpha
        first = first * adapter.path.coeffs(adapter.path.at(torch.tensor(UNIT[0])))[0]
    want = sample(adapter, first / sigma, cond, Sampling((*UNIT, 0.0), "ode"))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "LCMScheduler", "TCDScheduler"])
def test_a_scheduler_of_whole_times_takes_the_nearest(scheduler):
    pipe, call = swapped("sd15", scheduler)
    at = host(pipe, call)
    with speed_up(pipe, Times(UNIT), call=call):
        seen, *_ = watched(at, call, "timestep")
    assert list(dict.fromkeys(seen)) == [999, 929, 599, 409, 49]


@pytest.mark.parametrize(
    ("name", "scheduler", "config"),
    [
        ("sd15", "DPMSolverMultistepScheduler", {}),
        ("sd15", "EulerAncestralDiscreteScheduler", {}),
        ("sd15", "LMSDiscreteScheduler", {}),
        ("sd3", "FlowMatchLCMScheduler", {}),
        ("sd3", "UniPCMultistepScheduler",
         {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}),
    ],
)  # fmt: skip
def test_solvers_of_any_order_and_stochastic_ones_step_through_them(name, scheduler, config):
    pipe, call = swapped(name, scheduler, **config)
    shift = 3.0 if name == "sd3" else 1.0
    want = [1000 * shift * u / (1 + (shift - 1) * u) - (name == "sd15") for u in UNIT]
    at = host(pipe, call)
    with speed_up(pipe, Times(UNIT), call=call):
        seen, *_ = watched(at, call, "timestep")
    assert list(dict.fromkeys(seen)) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "scheduler", "config", "words"),
    [
        ("sd15", "DDIMScheduler", {}, "lands off by"),
        ("cogvideox", "CogVideoXDDIMScheduler", {}, "lands off by"),
        ("sd15", "HeunDiscreteScheduler", {}, "calls the network 9 times in 5 steps"),
        ("sd15", "PNDMScheduler", {"skip_prk_steps": True}, "calls the network 6 times in 5 steps"),
    ],
)
def test_schedulers_that_would_land_elsewhere_are_refused(name, scheduler, config, words):
    pipe, call = swapped(name, scheduler, **config)
    host(pipe, call)
    before = copy.deepcopy(vars(pipe.scheduler)).keys()
    with pytest.raises(UnsupportedModel, match=words):
        speed_up(pipe, Times(UNIT), call=call)
    assert vars(pipe.scheduler).keys() == before


def test_the_trial_sees_a_scheduler_that_steps_elsewhere():
    """Its own times pass; the same steps said to be at other times do not."""
    pipe, call = family("sd3")
    at = host(pipe, call)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(5)
    times = at.adapter.found.clock(scheduler.timesteps.double())
    assert landing(at, scheduler, times) < 1e-5
    assert landing(at, scheduler, times * torch.tensor([1, 1, 0.95, 1, 1])) > 0.01


def test_another_number_of_steps_is_refused_with_the_right_one():
    pipe, call = family("flux")
    with speed_up(pipe, Times(UNIT), call=call) as fast:
        latents(fast, call, 5)
        with pytest.raises(ConfigError, match="5 times and the call asks for 4 steps; ask for 5"):
            latents(fast, call, 4)


def test_times_that_change_nothing_are_an_error():
    pipe, call = family("sd3")
    own = copy.deepcopy(pipe.scheduler)
    own.set_timesteps(4)
    t = own.timesteps.double() / 1000
    unit = tuple((t / (3 - 2 * t)).tolist())  # the inverse of the shift
    with pytest.raises(ConfigError, match="takes anyway"), speed_up(pipe, Times(unit), call=call) as fast:
        latents(fast, call, 4)
    with pytest.raises(ConfigError, match="never set its scheduler's times"), speed_up(pipe, Times(UNIT), call=call):
        pass


def test_beside_another_layer_and_a_copied_scheduler():
    pipe, call = family("sd3")
    with speed_up(pipe, Times(UNIT), Cast(), call=call) as fast:
        latents(fast, call, 5)
        twin = copy.deepcopy(fast.scheduler)
        held = fast.scheduler.timesteps
        twin.set_timesteps(5)
        assert torch.equal(twin.timesteps, held) and fast.scheduler.timesteps is held


def test_native_models_and_bad_times_are_refused():
    with pytest.raises(ConfigError, match=r"Sampling\(times\)"):
        speed_up(tiny(), Times(UNIT))
    for times in ((), (0.0,), (0.5, 0.5), (0.2, 0.4), (1.2, 0.3), (0.5, -0.1), "1.0", (True, 0.5)):
        with pytest.raises(ConfigError, match="times must"):
            Times(times)  # pyright: ignore[reportArgumentType]
    assert from_dict(yaml.safe_load(yaml.safe_dump(as_dict(Times(UNIT))))) == Times(UNIT)
