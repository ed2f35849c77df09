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
from hasten.speed import (
    Attention,
    Cache,
    Cast,
    Compile,
    Guidance,
    LayerCast,
    Offload,
    Quantize,
    TileVAE,
    Times,
    speed_up,
)
from hasten.speed.compile import cpp_compiler
from hasten.speed.host import host
from tests.pipelines import FAMILIES

STEPS = 6
PLAIN = (bool, int, float, str, type(None))
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


def traces(pipe: Any) -> list[Any]:
    """Everything that a layer changes: classes and attributes of the pipeline's parts, tensors by place and bits."""
    parts = {k: v for k, v in pipe.components.items() if isinstance(v, torch.nn.Module)}
    every = {f"{k}.{n}": m for k, part in parts.items() for n, m in part.named_modules()}
    plain = {k: {a: v for a, v in vars(m).items() if isinstance(v, PLAIN)} for k, m in every.items()}
    hooks = {k: (len(m._forward_hooks), len(m._forward_pre_hooks), *sorted(vars(m))) for k, m in every.items()}
    return [type(pipe), set(vars(pipe)), {k: type(v) for k, v in pipe.components.items()}, plain, hooks]


def acts_and_comes_off(
    pipe: Any, call: dict[str, Any], want: Tensor, layers: dict[str, Any], more: dict[str, Any] | None = None
) -> None:
    """Sample with some layers and again without them; ``more`` is for these requests alone, not for the probe."""
    names, own, net = tuple(layers), type(pipe), host(pipe, call).net
    before, left = weights(net), traces(pipe)
    try:
        up = speed_up(pipe, *layers.values(), call=call)
    except UnsupportedModel as error:
        raise AssertionError(names) from error
    with up as fast:
        assert fast is pipe and isinstance(fast, own)
        got = drawn(fast, {**call, **(more or {})})
        assert not up.idle(), (names, up.idle())
    assert got.shape == want.shape and bool(got.isfinite().all())
    if set(names) - {"compile", "attention", "offload", "tilevae"}:  # exact ones
        assert not torch.equal(got, want), names  # it acted
    assert traces(pipe) == left, names
    assert torch.equal(drawn(pipe, {**call, **(more or {})}), want), names
    after = weights(net)
    assert after.keys() == before.keys(), names
    assert all(after[k][0] == before[k][0] and torch.equal(after[k][1], before[k][1]) for k in before), names


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_and_every_pair_acts_and_comes_off(name):
    pipe, call = FAMILIES[name]()
    call = {k: v for k, v in call.items() if k != "num_inference_steps"}
    at = host(pipe, call)
    layers = {k: v for k, v in LAYERS.items() if k != "guidance" or at.adapter.found.cfg_scale != 1}
    assert ("guidance" in layers) == (name in GUIDED)
    want = drawn(pipe, call)
    for names in [*((k,) for k in layers), *combinations(layers, 2)]:
        acts_and_comes_off(pipe, call, want, {k: layers[k] for k in names})


OTHERS: dict[str, tuple[TileVAE, dict[str, Any], dict[str, str]]] = {  # tiles, requests of two, what it lacks
    "sdxl": (TileVAE(tile=8), {"num_images_per_prompt": 2}, {}),
    "wan": (TileVAE(tile=32), {"num_videos_per_prompt": 2}, {}),
    "dit": (TileVAE(tile=False), {"class_labels": [1, 2]}, {"times": "does not step", "offload": "in groups"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_layer_and_its_pairs_act_and_come_off(name, tmp_path):
    """The layers that need more than a network: a scheduler that takes times, a folder, a VAE."""
    pipe, call = FAMILIES[name]()
    call = {k: v for k, v in call.items() if k != "num_inference_steps"}
    tiles, two, lacks = OTHERS[name]
    want = drawn(pipe, {**call, **two})
    times, offload = Times((1.0, 0.93, 0.7, 0.41, 0.2, 0.05)), Offload(disk=str(tmp_path))
    more: dict[str, Any] = {"times": times, "offload": offload, "layercast": LayerCast(), "tilevae": tiles}
    for layer, words in lacks.items():
        with pytest.raises(UnsupportedModel, match=words), speed_up(pipe, more.pop(layer), call=call):
            pass
    layers, count = {**LAYERS, **more}, 0
    for names in [*((k,) for k in more), *(pair for pair in combinations(layers, 2) if set(pair) & set(more))]:
        if "compile" in names and {"offload", "layercast"} & set(names):
            with pytest.raises(ConfigError, match="leave Compile out"):
                speed_up(pipe, *(layers[k] for k in names), call=call)
            continue
        if name == "wan" and names == ("quantize", "layercast"):  # every layer that diffusers would cast is int8
            with pytest.raises(ConfigError, match="Quantize replaces every layer"):
                speed_up(pipe, *(layers[k] for k in names), call=call)
            assert torch.equal(drawn(pipe, {**call, **two}), want)
            continue
        acts_and_comes_off(pipe, call, want, {k: layers[k] for k in names}, two)
        assert not list(tmp_path.iterdir()), names
        count += 1
    assert count >= 10


@pytest.mark.skipif(cpp_compiler() is None, reason="inductor needs a C++ compiler")
def test_code_of_inductor_acts_and_comes_off_beside_a_cache():
    pipe, call = FAMILIES["flux"]()
    call = {k: v for k, v in call.items() if k != "num_inference_steps"}
    layers = {"cache": LAYERS["cache"], "compile": Compile(backend="inductor")}
    acts_and_comes_off(pipe, call, drawn(pipe, call), layers)


def test_a_pipeline_is_probed_once():
    pipe, call = FAMILIES["sd3"]()
    call = {k: v for k, v in call.items() if k != "num_inference_steps"}
    assert host(pipe, call).adapter is host(pipe, {**call, "num_inference_steps": 50}).adapter
    assert host(pipe, {**call, "num_inference_steps": 50}).call["num_inference_steps"] == 50
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
