"""speed_up on every fixture pipeline: each layer and each legal pair acts and comes off bit for bit."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hasten.core.errors import ConfigError, UnsupportedModel
from hasten.models.probe import as_sample
from hasten.speed import Attention, Cache, Cast, Compile, Guidance, Quantize, speed_up
from hasten.speed.host import host
from tests.pipelines import FAMILIES

STEPS = 6
LAYERS: dict[str, Any] = {
    "quantize": Quantize(min_side=8),
    "cast": Cast(),
    "cache": Cache("schedule", mask="001010"),
    "guidance": Guidance(reuse=1),
    "attention": Attention("chunked", chunk=3),
    "compile": Compile(backend="eager"),
}
GUIDED = {"dit", "sd15", "sdxl", "sd3", "qwenimage", "z_image", "sana", "wan", "ltx", "cogvideox"}


def drawn(pipe: Any, call: dict[str, Any]) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    made = pipe(**call, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), output_type="pt")[0]
    return torch.as_tensor(np.asarray(made)) if not isinstance(made, Tensor) else made


def weights(net: Any) -> dict[str, tuple[int, Tensor]]:
    everything = [*net.named_parameters(), *net.named_buffers()]
    return {k: (id(v), v.detach().clone()) for k, v in everything}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_and_every_pair_acts_and_comes_off(name):
    pipe, call = FAMILIES[name]()
    call = {k: v for k, v in call.items() if k != "num_inference_steps"}
    at, own = host(pipe, call), type(pipe)
    layers = {k: v for k, v in LAYERS.items() if k != "guidance" or at.adapter.found.cfg_scale != 1}
    assert ("guidance" in layers) == (name in GUIDED)
    want, before, keys = drawn(pipe, call), weights(at.net), set(vars(at.net))
    for names in [*((k,) for k in layers), *combinations(layers, 2)]:
        try:
            up = speed_up(pipe, *(layers[k] for k in names), call=call)
        except UnsupportedModel as error:
            raise AssertionError(names) from error
        with up as fast:
            assert fast is pipe and isinstance(fast, own)
            got = drawn(fast, call)
            assert not up.idle(), (names, up.idle())
        assert got.shape == want.shape and bool(got.isfinite().all())
        if set(names) - {"compile", "attention"}:
            assert not torch.equal(got, want), names  # it acted
        assert type(pipe) is own and set(vars(at.net)) == keys, names
        assert torch.equal(drawn(pipe, call), want), names
        after = weights(at.net)
        assert after.keys() == before.keys(), names
        assert all(after[k][0] == before[k][0] and torch.equal(after[k][1], before[k][1]) for k in before), names


def test_a_pipeline_is_probed_once():
    pipe, call = FAMILIES["sd3"]()
    call = {k: v for k, v in call.items() if k != "num_inference_steps"}
    assert host(pipe, call).adapter is host(pipe, call).adapter
    assert host(pipe, {**call, "prompt": "another"}).adapter is not host(pipe, call).adapter
    first = host(pipe, call).adapter
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=7.0)
    assert host(pipe, call).adapter.path.args != first.path.args  # another scheduler, another path
    with (
        speed_up(pipe, Cast(), call=call) as fast,
        pytest.raises(ConfigError, match="sped up already"),
        speed_up(fast, Quantize(min_side=8), call={**call, "prompt": "another"}),
    ):
        pass
    drawn(pipe, call)


def test_what_is_no_model_is_refused():
    with pytest.raises(UnsupportedModel, match="a denoiser with blocks, or a diffusers pipeline; Linear has none"):
        speed_up(torch.nn.Linear(2, 2), Cast())
    with pytest.raises(UnsupportedModel, match="dict is neither"):
        speed_up({}, Cast())


def test_branches_are_told_apart_by_their_conditions():
    """Two calls a step: what is held for one branch never answers the other."""
    pipe, call = FAMILIES["qwenimage"]()
    call = {k: v for k, v in call.items() if k != "num_inference_steps"}
    seen: list[tuple[float, bytes]] = []
    at = host(pipe, call)
    inner = at.net.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        look = at.look(args, kwargs)
        seen.append((float(look.t[0]), look.cond[0].numpy().tobytes()))
        return inner(*args, **kwargs)

    at.net.forward = spy
    try:
        with speed_up(pipe, Cache("schedule", mask="001010"), call=call) as fast:
            drawn(fast, call)
    finally:
        del at.net.forward
    assert len(seen) == 2 * (STEPS - 2) and len({c for _, c in seen}) == 2
    for now in {t for t, _ in seen}:
        assert len({c for t, c in seen if t == now}) == 2


@pytest.mark.parametrize("name", ["z_image", "dit", "sd3"])
def test_a_prediction_is_read_with_its_sign_and_written_back(name):
    pipe, call = FAMILIES[name]()
    call = {k: v for k, v in call.items() if k != "num_inference_steps"}
    at, seen = host(pipe, call), []
    inner = at.net.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        found = inner(*args, **kwargs)
        seen.append((at.look(args, kwargs).x_t, found))
        return found

    at.net.forward = spy
    try:
        drawn(pipe, call)
    finally:
        del at.net.forward
    x_t, found = seen[0]
    pred, back = at.pred(found, x_t), at.output(at.pred(found, x_t), x_t, found)
    raw = as_sample(found, x_t)
    assert (at.adapter.found.sign == -1) == (name == "z_image")
    assert torch.equal(pred, at.adapter.found.sign * raw) and torch.equal(as_sample(back, x_t), raw)


def test_copies_of_a_sped_up_pipelines_class_keep_its_name():
    pipe, call = FAMILIES["sd3"]()
    with speed_up(pipe, Cast(), call={k: v for k, v in call.items() if k != "num_inference_steps"}) as fast:
        assert type(fast).__name__ == "StableDiffusion3Pipeline" and type(fast).__module__.startswith("diffusers.")
        drawn(fast, {k: v for k, v in call.items() if k != "num_inference_steps"})
