"""Offloading, layerwise casting, tiles: the same result while they work, no trace of them afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from hasten.core.errors import ConfigError, NotReversible, UnsupportedModel
from hasten.speed import (
    Cache,
    Cast,
    Compile,
    Guidance,
    LayerCast,
    Offload,
    Quantize,
    TileVAE,
    as_dict,
    from_dict,
    speed_up,
)
from hasten.speed.host import host
from tests.pipelines import FAMILIES
from tests.test_guidance_layer import latents
from tests.test_speed import draw, inputs, tiny

some_families = pytest.mark.parametrize("name", ["flux", "sd15", "wan"])


def modules(pipe: Any) -> dict[str, nn.Module]:
    return {k: v for k, v in pipe.components.items() if isinstance(v, nn.Module)}


def state(*roots: nn.Module) -> list[Any]:
    """Identity, place and bits of every tensor, and the attributes that hooks leave."""
    found: list[Any] = []
    for root in roots:
        for m in root.modules():
            found.append(
                [id(m), sorted(k for k in vars(m) if k in ("forward", "_diffusers_hook", "_hf_hook", "_old_forward"))]
            )
        every = [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
        found += [(k, id(p), p.device, p.dtype, p.detach().clone()) for k, p in every]
    return found


def unchanged(before: list[Any], after: list[Any]) -> bool:
    return len(before) == len(after) and all(
        a[:4] == b[:4] and torch.equal(a[4], b[4]) if isinstance(a, tuple) else a == b
        for a, b in zip(before, after, strict=True)
    )


def pictures(pipe: Any, call: dict[str, Any], **more: Any) -> Tensor:
    """What the pipeline returns, as numbers."""
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        **{**call, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np", **more}
    )
    return torch.as_tensor(out[0])


# --- offloading -----------------------------------------------------------------------------------------------


@some_families
def test_weights_wait_on_disk_and_come_back_bit_for_bit(name, tmp_path):
    pipe, call = FAMILIES[name]()
    net = host(pipe, call).net
    before, want = state(net), latents(pipe, call, 3)
    up = speed_up(pipe, Offload(disk=str(tmp_path)), call=call)
    with up as fast:
        assert torch.equal(latents(fast, call, 3), want)
        assert torch.equal(latents(fast, call, 3), want)
        files = list(tmp_path.glob("*/*.safetensors"))
        counts = up.ledger()["offload"]
        assert counts["loads"] == counts["groups"] * counts["calls"] > 0 and len(files) == counts["groups"] >= 2
        size = sum(f.stat().st_size for f in files)
        assert size >= sum(p.nbytes for p in net.parameters())
    assert unchanged(before, state(net)) and not list(tmp_path.iterdir())
    assert torch.equal(latents(pipe, call, 3), want)


def test_two_models_of_one_class_in_one_folder_keep_their_own_weights(tmp_path):
    """diffusers names its files after places in a model, and takes a file that is there for the right one."""
    first, second = tiny(), tiny()
    noise, cond, _ = inputs()
    wants = [draw(net, noise, cond) for net in (first, second)]
    layer = Offload(disk=str(tmp_path))
    with speed_up(first, layer) as a, speed_up(second, layer) as b:
        for net, want in ((a, wants[0]), (b, wants[1]), (a, wants[0])):
            assert torch.equal(draw(net, noise, cond), want)
    assert torch.equal(draw(second, noise, cond), wants[1])


@pytest.mark.parametrize("blocks", [1, 2])
def test_blocks_a_group(blocks, tmp_path):
    net, (noise, cond, _) = tiny(depth=4), inputs()
    before = state(net)
    up = speed_up(net, Offload(blocks=blocks, disk=str(tmp_path)))
    with up as fast:
        draw(fast, noise, cond)
    assert up.ledger()["offload"]["groups"] == 4 / blocks + 1  # and what is outside the blocks
    assert unchanged(before, state(net))


@pytest.mark.parametrize("level", ["group", "model", "sequential"])
def test_every_level_is_undone_to_the_same_parameters(level):
    """From the CPU to the CPU, which ``check`` refuses for its uselessness: the hooks are the same.

    That accelerate cannot run ``sequential`` so; there, what is undone is that no parameter has data any more.
    """
    pipe, call = FAMILIES["sd15"]()
    at = host(pipe, call)
    every = list(modules(pipe).values())
    before, want, attributes = state(*every), latents(pipe, call, 2), set(vars(pipe))
    applied = Offload(level, device="cpu").apply(at)
    assert applied.counts()["groups"] > 2 and applied.inert() is not None
    if level == "sequential":
        assert all(p.device.type == "meta" for p in at.net.parameters())
    else:
        assert torch.equal(latents(pipe, call, 2), want)
        assert applied.counts()["loads"] > 0 and applied.inert() is None
    applied()
    assert unchanged(before, state(*every)) and set(vars(pipe)) == attributes
    assert torch.equal(latents(pipe, call, 2), want)


def test_offloading_that_means_nothing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    net = tiny()
    for layers, words in [
        ((Offload(),), "from the CPU to the CPU"),
        ((Offload("model"),), "from the CPU to the CPU"),
        ((Offload("sequential", device="cuda"),), "is for pipelines"),
        ((Offload(disk=str(tmp_path)), Compile(backend="eager")), "leave Compile out"),
        ((LayerCast(), Compile(backend="eager")), "leave Compile out"),
        ((Offload(disk=str(tmp_path / "nowhere")),), "there is no folder"),
    ]:
        with pytest.raises(ConfigError, match=words):
            speed_up(net, *layers)
    pipe, call = FAMILIES["flux"]()
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    host(pipe, call)
    for layer in (Offload(disk=str(tmp_path)), LayerCast()):
        with pytest.raises(ConfigError, match="has hooks of diffusers"):
            speed_up(pipe, layer, call=call)
    with pytest.raises(ConfigError, match="no weights were moved"), speed_up(net, Offload(disk=str(tmp_path))):
        pass
    assert not list(tmp_path.iterdir())


# --- layerwise casting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "sd15", "wan", "native"])
def test_weights_are_stored_in_a_byte_and_come_back_bit_for_bit(name):
    if name == "native":
        net, (noise, cond, _), call = tiny(), inputs(), None
        model, run = net, lambda: draw(net, noise, cond)
    else:
        model, call = FAMILIES[name]()
        net, run = host(model, call).net, lambda: latents(model, call, 3)
    before, want = state(net), run()
    up = speed_up(model, LayerCast(), call=call)
    with up:
        stored = {p.dtype for p in net.parameters()}
        got = run()
        assert stored == {p.dtype for p in net.parameters()} and torch.float8_e4m3fn in stored
    counts = up.ledger()["layercast"]
    assert counts["tensors"] > 0 and counts["bytes"] < 0.75 * counts["of"] and counts["calls"] >= 3
    assert 0 < float((got - want).norm() / want.norm()) < 0.3
    assert unchanged(before, state(net)) and torch.equal(run(), want)


def test_layers_that_another_one_takes_all_of_are_refused_when_the_stack_is_built():
    """In Wan's blocks diffusers casts linears alone, and Quantize takes every one of them."""
    pipe, call = FAMILIES["wan"]()
    at = host(pipe, call)
    before = state(at.net)
    with pytest.raises(
        ConfigError, match="Quantize replaces every layer of WanTransformer3DModel that diffusers casts"
    ):
        speed_up(pipe, LayerCast(), Quantize(min_side=8), call=call)
    speed_up(pipe, LayerCast(), Quantize(min_side=8, skip_last=1), call=call)
    learnt = speed_up(pipe, LayerCast(), Quantize(min_side=8, smooth=0.5), call=call)  # it takes those that ran
    with pytest.raises(ConfigError, match="no layer that diffusers casts"), learnt:
        latents(pipe, call, 2)
    with speed_up(pipe, LayerCast(), call=call):
        latents(pipe, call, 2)
        cast = {
            n
            for n, m in at.net.named_modules()
            if any(p.dtype == torch.float8_e4m3fn for p in m._parameters.values() if p is not None)
        }
    assert LayerCast()._casts(at) == cast and unchanged(before, state(at.net))


def test_dropped_originals_cannot_come_back():
    net, (noise, cond, _) = tiny(), inputs()
    with pytest.raises(NotReversible, match="keep=False"), speed_up(net, LayerCast(keep=False)) as fast:
        draw(fast, noise, cond)
    with pytest.raises(ConfigError, match="was not called"), speed_up(tiny(), LayerCast()):
        pass


def test_a_stack_of_all_of_them_leaves_no_trace(tmp_path):
    pipe, call = FAMILIES["sd15"]()
    net = host(pipe, call).net
    before, want = state(net), latents(pipe, call, 12)
    layers = (
        Quantize(min_side=8),
        Cast(),
        LayerCast(),
        Offload(disk=str(tmp_path)),
        Cache(threshold=1.0),
        Guidance((0.3, 0.9)),
    )
    up = speed_up(pipe, *layers, call=call)
    with up as fast:
        got = latents(fast, call, 12)
    assert list(up.ledger()) == ["quantize", "cast", "layercast", "offload", "cache", "guidance"]
    assert float((got - want).norm() / want.norm()) < 1
    assert unchanged(before, state(net)) and torch.equal(latents(pipe, call, 12), want)


# --- tiles ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "sd15", "sana", "wan", "cogvideox"])
def test_pictures_are_decoded_in_tiles(name):
    pipe, call = FAMILIES[name]()
    side = {"ltx": 128, "flux": 8, "sd15": 8}.get(name, 32)
    call = {**call, "height": 2 * side, "width": 2 * side}
    vae, want = pipe.vae, pictures(pipe, call)
    attributes = {k: v for k, v in vars(vae).items() if not k.startswith("_")}
    up = speed_up(pipe, TileVAE(tile=side, slice=False), call=call)
    with up as fast:
        got = pictures(fast, call)
    assert up.ledger()["tilevae"] == {"decodes": 1, "tiled": 1, "slices": 0}
    assert got.shape == want.shape and not torch.equal(got, want)
    assert {k: v for k, v in vars(vae).items() if not k.startswith("_")} == attributes
    assert torch.equal(pictures(pipe, call), want)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_a_batch_is_decoded_one_by_one(name):
    pipe, call = FAMILIES[name]()
    up = speed_up(pipe, TileVAE(tile=False), call=call)
    call = {**call, "num_images_per_prompt": 3}
    want = pictures(pipe, call)
    with up as fast:
        torch.testing.assert_close(pictures(fast, call), want)
    assert up.ledger()["tilevae"] == {"decodes": 1, "tiled": 0, "slices": 3}
    assert pipe.vae.use_slicing is False and torch.equal(pictures(pipe, call), want)


def test_tiles_that_did_nothing_or_cannot_be_are_refused():
    pipe, call = FAMILIES["sd15"]()
    with (
        pytest.raises(ConfigError, match="larger than a tile or of more than one"),
        speed_up(pipe, TileVAE(), call=call) as fast,
    ):
        pictures(fast, call)
    with pytest.raises(ConfigError, match="nothing was decoded"), speed_up(pipe, TileVAE(), call=call) as fast:
        fast(**call, num_inference_steps=1, output_type="latent")
    with pytest.raises(ConfigError, match="has no VAE"):
        speed_up(tiny(), TileVAE())
    wan, call = FAMILIES["wan"]()
    with pytest.raises(ConfigError, match="multiple of 32 pixels for AutoencoderKLWan, not 48"):
        speed_up(wan, TileVAE(tile=48), call=call)
    pipe.vae = nn.Identity()
    with pytest.raises(UnsupportedModel, match="does not decode in tiles"):
        TileVAE().check(host(pipe, FAMILIES["sd15"]()[1]), [])


def test_yaml_round_trip_and_bad_values():
    for layer in (
        Offload("sequential"),
        Offload(blocks=3, disk="/x"),
        LayerCast("float8_e5m2"),
        TileVAE(256, slice=False),
    ):
        assert from_dict(yaml.safe_load(yaml.safe_dump(as_dict(layer)))) == layer
    for made, words in [
        (lambda: Offload("groups"), "did you mean 'group'"),
        (lambda: Offload(blocks=0), "whole number from 1"),
        (lambda: Offload("model", disk="/x"), "level 'group' alone"),
        (lambda: LayerCast("float8"), "did you mean"),
        (lambda: TileVAE(4), "pixels such as 512"),
        (lambda: TileVAE(False, slice=False), "nothing to do"),
    ]:
        with pytest.raises(ConfigError, match=words):
            made()
