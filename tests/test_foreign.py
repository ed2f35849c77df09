"""Weights that another package quantized: what works on them, and what is refused with the reason."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path as File
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import hasten
from hasten.core.errors import ConfigError
from hasten.models.load import load_pipeline, stored
from hasten.speed import Cache, Cast, Compile, Guidance, Quantize, speed_up
from hasten.speed.foreign import inner, packed, quantizer
from hasten.speed.host import host
from hasten.speed.plan import fingerprint
from hasten.speed.saved import save_quantized
from tests.pipelines import FAMILIES
from tests.test_speed import tiny


def wrapped(net: Any, *names: str) -> Any:
    """``net`` with the weights of linears whose path holds one of ``names`` in a type of another package's kind."""
    for path, module in net.named_modules():
        if type(module) is nn.Linear and any(name in path for name in names):
            module.weight = nn.Parameter(TwoTensor(module.weight.detach(), module.weight.detach().clone()))
    return net


# --- without the packages -----------------------------------------------------------------------------------------


def test_what_is_quantized_already_is_left():
    net = wrapped(tiny(), "blocks.0")
    assert quantizer(tiny()) is None and quantizer(net) == "torch"
    with speed_up(net, Quantize("int8", min_side=8)) as fast:
        assert type(next(m for m in fast.blocks[0].modules() if isinstance(m, nn.Linear)).weight) is TwoTensor
        assert not any(type(m) is nn.Linear and "attn" in n for n, m in fast.blocks[1].named_modules())
        with pytest.raises(ConfigError, match="DiT holds weights of torch, which are no part of hasten's format"):
            save_quantized(fast, "never.safetensors")
    assert not File("never.safetensors").exists()


def test_nothing_left_is_said():
    net = wrapped(tiny(), "blocks")
    with pytest.raises(ConfigError, match="torch has quantized every linear inside the blocks of DiT already; leave"):
        speed_up(net, Quantize("int8", min_side=8))
    with pytest.raises(ConfigError, match="calibrate looks at the linears .* torch has quantized them already"):
        hasten.calibrate(net, [{"label": torch.tensor([0])}], steps=2)


def test_a_plan_sees_the_numbers_inside():
    net = wrapped(tiny(), "blocks")
    one = fingerprint(host(net))
    assert one == fingerprint(host(net)) and one["weights"] != fingerprint(host(tiny()))["weights"]
    weight: Any = next(p for p in net.parameters() if type(p) is TwoTensor)
    assert [v.shape for v in inner(weight)] == 2 * [weight.shape]
    weight.b.view(-1)[0] += 1
    assert fingerprint(host(net))["weights"] != one["weights"]


def test_the_dtype_of_a_quantized_file_is_that_of_its_floats(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "transformer").mkdir()
    file = tmp_path / "transformer" / "model.safetensors"
    save_file({"w": torch.zeros(99, dtype=torch.int8), "s": torch.zeros(3, dtype=torch.bfloat16)}, file)
    assert stored(tmp_path, torch.device("cpu"))["transformer"] is torch.bfloat16
    save_file({"w": torch.zeros(99, dtype=torch.int8)}, file)
    assert "transformer" not in stored(tmp_path, torch.device("cpu"))


# --- with them ----------------------------------------------------------------------------------------------------

LAYERS = {
    "cache": Cache(threshold=0.5),
    "firstblock": Cache("firstblock", threshold=0.5),
    "taylor": Cache("taylor", interval=2),
    "guidance": Guidance(interval=(0.2, 0.8)),
}


def config(package: str, left: list[str] | None = None) -> Any:
    """diffusers' quantization_config for int8 weights."""
    from diffusers.quantizers.quantization_config import QuantoConfig, TorchAoConfig

    if package == "torchao":
        config = pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig()
        return TorchAoConfig(config, modules_to_not_convert=left)
    pytest.importorskip("optimum.quanto")
    return QuantoConfig(weights_dtype="int8", modules_to_not_convert=left)


def quantized(package: str, folder: File, dtype: torch.dtype = torch.float32, left: list[str] | None = None) -> File:
    """A folder of an SD3 pipeline whose transformer ``package`` quantized, written by diffusers alone."""
    pipe, _ = FAMILIES["sd3"]()
    pipe.to(dtype).save_pretrained(folder / "whole")
    load = partial(type(pipe.transformer).from_pretrained, folder / "whole", subfolder="transformer")
    pipe.transformer = load(quantization_config=config(package, left), torch_dtype=dtype)
    pipe.save_pretrained(folder / "int8")
    return folder / "int8"


@pytest.fixture(scope="module", params=["torchao", "quanto"])
def made(request, tmp_path_factory) -> tuple[str, Any, dict[str, Any]]:
    """(package, pipeline as ``load_pipeline`` has it, its call)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = load_pipeline(str(quantized(request.param, tmp_path_factory.mktemp(request.param))))
    pipe.set_progress_bar_config(disable=True)
    return request.param, pipe, FAMILIES["sd3"]()[1]


def drawn(pipe: Any, call: dict[str, Any], steps: int = 12) -> torch.Tensor:
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        return pipe(**call, num_inference_steps=steps, output_type="latent", generator=generator)[0]


def test_it_is_probed_and_known(made):
    package, pipe, call = made
    assert quantizer(pipe.transformer) == package
    net = hasten.denoiser(pipe, call)
    assert net.kind == "velocity" and len(net.blocks) == len(pipe.transformer.transformer_blocks)
    assert fingerprint(host(pipe, call)) == fingerprint(host(pipe, call))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_act_on_it_and_are_undone_exactly(made, name):
    _, pipe, call = made
    before = drawn(pipe, call)
    with speed_up(pipe, LAYERS[name], call=call) as fast:
        changed = drawn(fast, call)
    assert torch.isfinite(changed).all() and not torch.equal(changed, before)
    assert torch.equal(drawn(pipe, call), before)


def test_it_is_compiled(made):
    _, pipe, call = made
    before = drawn(pipe, call, 2)
    with speed_up(pipe, Compile(), call=call) as fast:
        torch.testing.assert_close(drawn(fast, call, 2), before, atol=1e-3, rtol=1e-3)
    assert torch.equal(drawn(pipe, call, 2), before)


def test_what_cannot_be_is_refused_and_changes_nothing(made, tmp_path):
    package, pipe, call = made
    before = drawn(pipe, call, 2)
    with pytest.raises(ConfigError, match=f"{package} has quantized every linear inside the blocks of SD3Transformer"):
        speed_up(pipe, Quantize("int8", min_side=8), call=call)
    with pytest.raises(ConfigError, match=f"holds weights of {package}"):
        save_quantized(pipe.transformer, tmp_path / "q.safetensors")
    with pytest.raises(ConfigError, match=f"{package} has quantized them already"):
        hasten.calibrate(pipe, ["a"], steps=2)
    if package == "quanto":
        with pytest.raises(ConfigError, match="Cast: quanto has quantized weights of this network to a type that"):
            speed_up(pipe, Cast(), call=call)
    else:
        with speed_up(pipe, Cast(), call=call) as fast:
            drawn(fast, call, 2)
    assert torch.equal(drawn(pipe, call, 2), before)


@pytest.mark.parametrize("package", ["torchao", "quanto"])
def test_quantize_acts_on_what_is_left_in_the_dtype_that_is_stored(package, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = load_pipeline(str(quantized(package, tmp_path, torch.bfloat16, ["to_q"])))
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.pos_embed.proj.weight.dtype == torch.bfloat16
    call = FAMILIES["sd3"]()[1]
    before = drawn(pipe, call, 2)
    up = speed_up(pipe, Quantize("int8", min_side=8), call=call)
    with up as fast:
        assert not torch.equal(drawn(fast, call, 2), before)
        found = up.ledger()["quantize"]
        assert found["layers"] == found["of"] == len(pipe.transformer.transformer_blocks)
        with pytest.raises(ConfigError, match=f"holds weights of {package}"):
            save_quantized(fast.transformer, tmp_path / "q.safetensors")
    assert torch.equal(drawn(pipe, call, 2), before)


def test_a_type_of_torchs_own_is_no_package_s_weight():
    """DTensor, say, whose parts hold a plain weight."""

    class Shard(torch.Tensor):
        def __tensor_flatten__(self) -> Any:
            return [], None

    weight = torch.ones(2).as_subclass(Shard)
    assert packed(weight)
    Shard.__module__ = "torch.distributed.tensor"
    assert not packed(weight)
