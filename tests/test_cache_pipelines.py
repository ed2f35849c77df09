"""Every cache policy on every family of pipelines: it acts and is undone bit for bit, or says why it cannot."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hasten.core.errors import ConfigError, UnsupportedModel
from hasten.speed import Cache, Compile, Times, speed_up
from hasten.speed.cache import POLICIES, calibrate
from hasten.speed.host import host
from hasten.speed.plan import Plan, fingerprint
from tests.pipelines import FAMILIES, diffusers
from tests.test_cache import deep

STEPS = 8
CALIBRATED = ("teacache", "magcache")
BLOCKS = ("teacache", "firstblock", "dual", "dicache")
CACHES: dict[str, dict[str, Any]] = {
    "easycache": {"threshold": 50.0},
    "taylor": {"interval": 3},
    "schedule": {"mask": "00110110"},
    "magcache": {"threshold": 50.0},
    "teacache": {"threshold": 50.0},
    "firstblock": {"threshold": 50.0},
    "dual": {"threshold": 50.0, "degree": 1},
    "dicache": {"threshold": 50.0},
    "deepcache": {"interval": 3},
    "regions": {"interval": 3, "share": 0.5},
}
NEVER: dict[str, dict[str, Any]] = {
    "schedule": {"mask": "0" * STEPS},
    "taylor": {"interval": 1},
    "deepcache": {"interval": 1},
    "regions": {"interval": 1},
}
REFUSED: dict[tuple[str, str], str] = {
    **{(f, "teacache"): "no linear of tokens" for f in ("sd15", "sdxl")},
    **{(f, p): "continues none of its inputs" for f in ("sd15", "sdxl") for p in BLOCKS if p != "teacache"},
    **{(f, "regions"): "does not pass the sample's tokens" for f in ("sd15", "sdxl")},
    ("cogvideox", "regions"): "takes the sample's tokens alone",
    **{(f, "deepcache"): "needs a UNet" for f in ("flux", "flux2", "z_image")},
    **{(f, "deepcache"): "leave none inside"
       for f in ("dit", "sd3", "qwenimage", "sana", "wan", "ltx", "cogvideox")},
}  # fmt: skip


def run(pipe: Any, call: dict[str, Any], seed: int = 0) -> Tensor:
    """The latents of one request."""
    generator = torch.Generator().manual_seed(seed)
    fixed = {"num_inference_steps": STEPS, "generator": generator, "output_type": "latent"}
    return torch.as_tensor(np.array(pipe(**{**call, **fixed})[0]))


@lru_cache(2)
def made(family: str) -> tuple[Any, dict[str, Any], Tensor]:
    """A pipeline, its call, and the uncached latents."""
    pipe, call = FAMILIES[family]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, call, run(pipe, call)


def numbers(pipe: Any, call: dict[str, Any], policy: str) -> dict[str, Any]:
    if policy not in CALIBRATED:
        return {}
    runs = [lambda p, seed=seed: run(p, call, seed) for seed in (1, 2)]
    return calibrate(pipe, policy, runs, STEPS, call=call)


@pytest.mark.parametrize("policy", list(CACHES))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_policy_acts_on_a_family_or_says_why_it_cannot(family, policy):
    pipe, call, want = made(family)
    if (family, policy) in REFUSED:
        with pytest.raises(UnsupportedModel, match=REFUSED[family, policy]):
            cache = Cache(policy, **CACHES[policy], **numbers(pipe, call, policy))
            with speed_up(pipe, cache, call=call) as fast:
                run(fast, call)
        assert torch.equal(run(pipe, call), want)
        return
    found = numbers(pipe, call, policy)
    up = speed_up(pipe, Cache(policy, **CACHES[policy], **found), call=call)
    with up as fast:
        got = run(fast, call)
        assert torch.equal(run(fast, call), got)  # nothing is left of the first request
    net = up.host.net
    counts = up.ledger()["cache"]
    assert 0.3 <= counts["hit_rate"] < 0.8
    assert bool(got.isfinite().all()) and not torch.equal(got, want)
    assert not any("forward" in vars(m) for m in net.modules())
    never = Cache(policy, **NEVER.get(policy, {"threshold": 1e-12}), **found)
    with pytest.raises(ConfigError, match="Cache: 0 of"), speed_up(pipe, never, call=call) as fast:
        assert torch.equal(run(fast, call), want)
    assert torch.equal(run(pipe, call), want)


def test_every_policy_is_tried():
    assert set(CACHES) == set(POLICIES)


def seen(module: nn.Module, calls: list[str], name: str) -> Any:
    return module.register_forward_hook(lambda *_: calls.append(name))


def test_deepcache_runs_the_outer_blocks_alone():
    """On a skip the inner blocks and the one in the middle do no work at all."""
    pipe, call, _ = made("sd15")
    unet, calls = pipe.unet, []
    parts = {"outer": unet.down_blocks[0].resnets[0], "inner": unet.down_blocks[1].resnets[0],
             "middle": unet.mid_block.resnets[0], "up": unet.up_blocks[0].resnets[0],
             "last": unet.up_blocks[1].resnets[0]}  # fmt: skip
    hooks = [seen(m, calls, name) for name, m in parts.items()]
    up = speed_up(pipe, Cache("deepcache", interval=3), call=call)
    with up as fast:
        calls.clear()
        run(fast, call)
    for hook in hooks:
        hook.remove()
    reused = up.ledger()["cache"]["reused"]
    assert reused > 0
    counts = {name: calls.count(name) for name in parts}
    computed = STEPS - reused
    assert counts == {"outer": STEPS, "last": STEPS, "inner": computed, "middle": computed, "up": computed}


@pytest.mark.parametrize(
    ("family", "cache", "always"),
    [
        ("flux", Cache("dual", threshold=50.0, first=1, last=1), 2),
        ("sd15", Cache("deepcache", interval=3), 2),
    ],
    ids=lambda v: getattr(v, "policy", v),
)
def test_a_skip_compiles_nothing(family, cache, always):
    """As many graphs as without a cache: what a skip hands to the blocks behind it is laid out as ever."""
    pipe, call, _ = made(family)
    torch._dynamo.reset()  # what it has learnt of shapes that vary would make the second run's graphs fewer
    alone = speed_up(pipe, Compile(backend="eager"), call=call)
    with alone as fast:
        run(fast, call)
    torch._dynamo.reset()
    up = speed_up(pipe, cache, Compile(backend="eager"), call=call)
    with up as fast:
        run(fast, call)
        found = up.ledger()
    reused = found["cache"]["reused"]
    assert found["compile"]["graphs"] == alone.ledger()["compile"]["graphs"] and reused > 0
    assert found["compile"]["runs"] == len(up.host.blocks) * (STEPS - reused) + always * reused


@pytest.mark.parametrize(
    ("layers", "more", "words"),
    [
        ((Cache(),), {"num_inference_steps": 4}, "at most 1 of 4 could be skipped"),
        ((Cache(warmup=9),), {"num_inference_steps": 10}, "at most 0 of 10 could be skipped"),
        ((Cache("taylor", interval=1),), {"num_inference_steps": 10}, "at most 0 of 10 steps"),
        ((Cache("schedule", mask="0000"),), {"num_inference_steps": 4}, "at most 0 of 4 steps.* the mask skips none"),
        ((Cache("schedule", mask="0011010"),), {"num_inference_steps": 8}, "requests of 7 steps, not 8; plan it again"),
        ((Cache("magcache", ratios=(1.0,) * 7),), {"num_inference_steps": 8}, "of 7 steps, not 8; calibrate again"),
        ((Times((1.0, 0.7, 0.3)), Cache()), {}, "at most 0 of 3 could be skipped"),
        ((Cache(),), {"sigmas": [1.0, 0.7, 0.5, 0.3]}, "at most 1 of 4 could be skipped"),
    ],
    ids=str,
)
def test_too_few_steps_are_refused_before_the_first_request(layers, more, words):
    pipe, call, _ = made("sd3")
    with pytest.raises(ConfigError, match=words):
        speed_up(pipe, *layers, call={**call, **more})


@pytest.mark.parametrize("asked", [4, 5, 20])
def test_a_request_that_is_refused_beforehand_is_the_one_that_is_refused_later(asked):
    """Heun's rule looks twice at a time: what counts are the times that the scheduler visits."""
    pipe, call, _ = made("sd3")
    own, later = pipe.scheduler, ""
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler.from_config(own.config, shift=3.0)
    try:
        with speed_up(pipe, Cache(threshold=50.0, max_skips=2), call=call) as fast:
            fast(**call, num_inference_steps=asked, output_type="latent")
    except ConfigError as error:
        later = str(error)
    try:
        speed_up(pipe, Cache(threshold=50.0, max_skips=2), call={**call, "num_inference_steps": asked})
        assert not later
    except ConfigError as error:
        assert later == str(error)
    finally:
        pipe.scheduler = own


def test_steps_that_the_call_does_not_say_are_left_to_the_request():
    pipe, call, want = made("sd3")
    for more in ({}, {"num_inference_steps": STEPS}):
        with speed_up(pipe, Cache("schedule", mask="00110110"), call={**call, **more}) as fast:
            assert not torch.equal(run(fast, call), want)
        assert torch.equal(run(pipe, call), want)


def test_a_plan_says_its_steps_beforehand():
    net = deep()
    for steps, words in ((4, "at most 1 of 4"), (3, "at most 0 of 3")):
        with pytest.raises(ConfigError, match=words):
            speed_up(net, Plan((Cache(),), fingerprint(host(net), steps)))
    speed_up(net, Plan((Cache(),), fingerprint(host(net))))  # of any steps
    speed_up(net, Plan((Cache(),), fingerprint(host(net), 12)))


@pytest.mark.parametrize("call", ["text", 5, [1], {"height": 8}.items()])
def test_a_call_is_a_mapping(call):
    pipe, _, _ = made("sd3")
    with pytest.raises(ConfigError, match="call is how the pipeline will be called"):
        speed_up(pipe, Cache(), call=call)
