"""speed_up on every fixture pipeline: each layer and each legal pair acts and comes off bit for bit."""

from __future__ import annotations

import copy
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
    call = copy.deepcopy(call)  # Z-Image writes its chat template into a list of prompts that it is given
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


SOLVES = {"times": "does not step through times"}  # DDIM of diffusers, which looks its tables up at whole times
LACKS = {"dit": {**SOLVES, "offload": "in groups"}, "sd15": SOLVES, "cogvideox": SOLVES}
WHOLE = {"wan"}  # every layer that diffusers would cast is int8
# Pixels of a tile; the pictures of the other families fit into one, and there the slices act.
SIDES = {"sd15": 8, "sdxl": 8, "z_image": 8, "sana": 8, "qwenimage": 16, "ltx": 16}


def of_two(name: str, call: dict[str, Any]) -> dict[str, Any]:
    """What makes a request one of two samples, which are decoded one by one."""
    if name == "dit":
        return {"class_labels": [1, 2]}
    negative = {"negative_prompt": [call["negative_prompt"]] * 2} if "negative_prompt" in call else {}
    return {"prompt": [call["prompt"], "two dogs"], **negative}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_other_layer_and_its_pairs_act_and_come_off(name, tmp_path):
    """The layers that need more than a network: a scheduler that takes times, a folder, a VAE.

    Left out is what needs an accelerator: Offload's levels "model" and "sequential".
    """
    pipe, call = FAMILIES[name]()
    call = {k: v for k, v in call.items() if k != "num_inference_steps"}
    two = of_two(name, call)
    want = drawn(pipe, {**call, **two})
    assert len(want) == 2
    times, offload = Times((1.0, 0.93, 0.7, 0.41, 0.2, 0.05)), Offload(disk=str(tmp_path))
    more: dict[str, Any] = {"times": times, "offload": offload, "layercast": LayerCast()}
    more["tilevae"] = TileVAE(tile=SIDES.get(name, 32))

    def refused(layers: list[Any], error: type[Exception], words: str) -> None:
        left = traces(pipe)
        with pytest.raises(error, match=words), speed_up(pipe, *layers, call=call):
            pass
        assert traces(pipe) == left and torch.equal(drawn(pipe, {**call, **two}), want)

    for layer, words in LACKS.get(name, {}).items():
        refused([more.pop(layer)], UnsupportedModel, words)
    layers, count = {**LAYERS, **more}, 0
    if name not in GUIDED:
        del layers["guidance"]
    for names in [*((k,) for k in more), *(pair for pair in combinations(layers, 2) if set(pair) & set(more))]:
        chosen = {k: layers[k] for k in names}
        if "compile" in names and {"offload", "layercast"} & set(names):
            refused([*chosen.values()], ConfigError, "leave Compile out")
            continue
        if name in WHOLE and names == ("quantize", "layercast"):
            refused([*chosen.values()], ConfigError, "Quantize replaces every layer")
            continue
        acts_and_comes_off(pipe, call, want, chosen, two)
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
