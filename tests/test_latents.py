"""Latents to pixels: what a layout decodes is the pipeline's own picture, and freed encoders come back bit for bit."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from hasten.core.errors import CheckpointError, ConfigError, UnsupportedModel
from hasten.models.diffusers import denoiser
from hasten.models.encoders import free, restore
from hasten.models.latents import Layout, layout
from hasten.models.probe import networks, record
from tests.pipeline_parts import transformers
from tests.pipelines import FAMILIES

every = pytest.mark.parametrize("name", FAMILIES)


@cache
def learnt(name: str) -> tuple[Any, dict[str, Any], Any, Layout]:
    """A family's pipeline, its call, its adapter and the layout of its samples."""
    pipe, call = FAMILIES[name]()
    net = denoiser(pipe, call)
    return pipe, call, net, layout(pipe, net)


def draw(pipe: Any, call: dict[str, Any]) -> Tensor:
    """The pipeline's own images in [0, 1] after two steps, [B, 3, H, W] or [B, F, 3, H, W]."""
    seeded = torch.Generator().manual_seed(0)
    return pipe(**call, num_inference_steps=2, output_type="pt", generator=seeded)[0]


def samples(made: Layout, count: int = 2) -> Tensor:
    """Random samples."""
    return torch.randn(count, *made.shape)


def as_given(images: Tensor) -> Tensor:
    """Images [B, 3, (F,) H, W] in [-1, 1] the way pipelines give them."""
    return (images if images.ndim == 4 else images.transpose(1, 2)) / 2 + 0.5


@every
def test_decodes_to_the_pipelines_own_images(name: str):
    pipe, call, _, made = learnt(name)
    own = draw(pipe, call)
    last = record(pipe, call, 2).steps[-1].after[:1]  # of a guided batch the first
    inside = (own > 0) & (own < 1)
    assert inside.float().mean() > 0.3 and own[inside].std() > 0.02  # or the comparison would prove nothing
    images = made.decode(pipe.vae, last)
    assert images.shape == (1, *made.pixels) and images.abs().max() <= 1
    assert (as_given(images) - own).abs().max() <= 1e-5
    wrong = replace(made, scale=made.scale * 1.05), replace(made, shift=made.shift + 0.1)
    wrong += (replace(made, order=made.order.roll(1)),)
    assert all((as_given(w.decode(pipe.vae, last)) - own).abs().max() > 1e-3 for w in wrong)


@every
def test_the_way_back_is_the_inverse(name: str):
    _, _, net, made = learnt(name)
    x = samples(made)
    z = made.to_vae(x)
    assert made.shape == net.shape and z.shape == (2, *made.inner)
    assert made.order.unique().numel() == made.order.numel() == x[0].numel()
    assert (made.from_vae(z) - x).abs().max() <= 1e-6
    one = torch.zeros_like(x[:1])  # a single number moves a single number
    one.view(-1)[3] = 1
    assert int((made.to_vae(one) != made.to_vae(0 * one)).sum()) == 1


@every
def test_images_become_samples(name: str):
    pipe, _, _, made = learnt(name)
    images = torch.rand(2, *made.pixels) * 2 - 1
    x = made.encode(pipe.vae, images)
    assert x.shape == (2, *made.shape) and x.isfinite().all() and x.std() > 1e-3
    assert not x.requires_grad and torch.equal(x, made.encode(pipe.vae, images))
    assert torch.allclose(x[1:], made.encode(pipe.vae, images[1:]))
    assert made.decode(pipe.vae, x).shape == images.shape
    drawn = made.encode(pipe.vae, images, torch.Generator().manual_seed(3))
    assert torch.equal(drawn, made.encode(pipe.vae, images, torch.Generator().manual_seed(3)))
    with torch.no_grad():
        has_distribution = hasattr(
            pipe.vae.encode(images[:1].unsqueeze(2) if made.still else images[:1]), "latent_dist"
        )
    assert torch.equal(drawn, x) != has_distribution


def test_encoded_as_the_published_formulas_say():
    pipe, _, _, made = learnt("sd3")
    images = torch.rand(1, *made.pixels) * 2 - 1
    with torch.no_grad():
        z = pipe.vae.encode(images).latent_dist.mode()
    assert torch.allclose(made.encode(pipe.vae, images), (z - 0.0609) * 1.5035, atol=1e-6)
    pipe, _, _, made = learnt("wan")
    video = torch.rand(1, *made.pixels) * 2 - 1
    with torch.no_grad():
        z = pipe.vae.encode(video).latent_dist.mode()
    mean, std = (torch.tensor(pipe.vae.config[k]).view(1, -1, 1, 1, 1) for k in ("latents_mean", "latents_std"))
    assert torch.allclose(made.encode(pipe.vae, video), (z - mean) / std, atol=1e-5)
    pipe, _, _, made = learnt("flux")
    x = torch.randn(1, *made.shape)
    unpacked = pipe._unpack_latents(x, 8, 8, pipe.vae_scale_factor)
    assert torch.allclose(made.to_vae(x), unpacked / 1.5035 + 0.0609, atol=1e-6)


@every
def test_decodes_without_encoders_and_gets_them_back(name: str, tmp_path: Path):
    pipe, call = FAMILIES[name]()
    net = denoiser(pipe, call)
    made, own = layout(pipe, net), draw(pipe, call)
    x = samples(made, 1)
    images = made.decode(pipe.vae, x)
    encoders = [k for k, m in pipe.components.items() if isinstance(m, nn.Module) and "encoder" in k]
    states = {k: {n: v.clone() for n, v in getattr(pipe, k).state_dict().items()} for k in encoders}
    gone = free(pipe, tmp_path)
    assert [k.name for k in gone] == encoders and all(getattr(pipe, k) is None for k in encoders)
    assert len(networks(pipe)) == 1 and not list(tmp_path.rglob("*.bin"))
    assert torch.equal(made.decode(pipe.vae, x), images)
    if encoders:
        with pytest.raises(ConfigError, match="learn layouts before free"):
            layout(pipe, net)
    restore(pipe, gone)
    for k, state in states.items():
        now = getattr(pipe, k).state_dict()
        assert now.keys() == state.keys() and all(torch.equal(now[n], v) for n, v in state.items())
    assert torch.equal(draw(pipe, call), own)


def test_freed_memory_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pipe, _ = FAMILIES["sd15"]()
    shape = dict(hidden_size=32, intermediate_size=32, num_attention_heads=4, num_hidden_layers=1)
    config = transformers.CLIPTextConfig(vocab_size=800_000, **shape)
    pipe.register_modules(text_encoder=transformers.CLIPTextModel(config))
    alive = [weakref.ref(p) for p in pipe.text_encoder.parameters()]
    assert sum(p.numel() for p in pipe.text_encoder.parameters()) * 4 > 100e6
    gc.collect()
    before = psutil.Process().memory_info().rss
    left: list[Any] = []
    collect = gc.collect

    def look() -> int:
        found = collect()
        left.extend(ref for ref in alive if ref() is not None)
        return found

    monkeypatch.setattr(gc, "collect", look)
    free(pipe, tmp_path)
    assert not left and not any(ref() is not None for ref in alive)  # before the device's cache is emptied, too
    assert before - psutil.Process().memory_info().rss > 80e6


def test_what_came_from_a_folder_is_read_from_there(tmp_path: Path):
    FAMILIES["sd3"]()[0].save_pretrained(tmp_path / "model")
    pipe = type(learnt("sd3")[0]).from_pretrained(tmp_path / "model")
    before = {k: v.clone() for k, v in pipe.text_encoder_2.state_dict().items()}
    gone = free(pipe, tmp_path / "unused")
    assert len(gone) == 3 and not (tmp_path / "unused").exists()
    restore(pipe, gone)
    assert all(torch.equal(pipe.text_encoder_2.state_dict()[k], v) for k, v in before.items())
    half = pipe.to(torch.bfloat16)
    gone = free(half)
    restore(half, gone)
    assert half.text_encoder.dtype == half.text_encoder_3.dtype == torch.bfloat16


def test_what_was_cast_as_a_whole_comes_back_as_it_was(tmp_path: Path):
    pipe, call = FAMILIES["z_image"]()
    pipe.text_encoder.to(torch.bfloat16).to(torch.float32)  # rounds the frequencies too, which no file holds
    own = draw(pipe, call)
    restore(pipe, free(pipe, tmp_path))
    assert torch.equal(draw(pipe, call), own)


def test_changed_or_lost_encoders_are_not_put_back(tmp_path: Path):
    FAMILIES["sd3"]()[0].save_pretrained(tmp_path / "model")
    pipe = type(learnt("sd3")[0]).from_pretrained(tmp_path / "model")
    with torch.no_grad():
        next(pipe.text_encoder_2.parameters()).view(-1)[0] += 1e-3
    gone = free(pipe)
    with pytest.raises(CheckpointError, match="text_encoder_2 .* is not what was freed"):
        restore(pipe, gone)
    (tmp_path / "model" / "text_encoder").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="text_encoder cannot be read again"):
        restore(pipe, gone)


def test_nothing_is_lost_for_want_of_a_folder():
    pipe, _ = FAMILIES["sd3"]()
    with pytest.raises(ConfigError, match="give free a folder"):
        free(pipe)
    assert pipe.text_encoder is not None and pipe.text_encoder_3 is not None
    pipe._all_hooks = [object()]
    with pytest.raises(ConfigError, match="remove_all_hooks"):
        free(pipe, "unused")
    assert pipe.text_encoder is not None


@pytest.mark.parametrize("name", ["flux", "wan", "ltx", "sana"])
def test_half_precision_learns_the_same_order(name: str):
    _, _, net, full = learnt(name)
    pipe, _ = FAMILIES[name]()
    pipe.to(torch.bfloat16)
    made = layout(pipe, SimpleNamespace(found=net.found, captured=torch.bfloat16))
    assert torch.equal(made.order, full.order)
    assert torch.allclose(made.scale, full.scale, rtol=2**-7) and torch.allclose(made.shift, full.shift, atol=2**-7)
    assert made.decode(pipe.vae, samples(made)).dtype == torch.bfloat16


def test_an_autoencoder_that_the_pipeline_lifts_is_lifted():
    _, _, net, full = learnt("sdxl")
    pipe, _ = FAMILIES["sdxl"]()
    pipe.vae.post_quant_conv = nn.Conv2d(4, 4, 1)  # the pipeline reads its precision
    pipe.to(torch.float16)
    made = layout(pipe, SimpleNamespace(found=net.found, captured=torch.float16))
    assert pipe.vae.config.force_upcast and made.raised == torch.float32 and full.raised is None
    x = samples(made)
    images = made.decode(pipe.vae, x)
    assert images.dtype == torch.float32 and pipe.vae.dtype == torch.float16
    assert made.encode(pipe.vae, images).isfinite().all() and pipe.vae.dtype == torch.float16
    assert torch.equal(images, replace(made, raised=None).decode(pipe.vae.float(), x))


def test_another_size_has_another_layout():
    pipe, _, net, made = learnt("flux")
    wide = layout(pipe, net, width=16)
    assert wide.pixels == (3, 8, 16) and wide.shape == (32, 16) and wide.inner == (4, 8, 16)
    with pytest.raises(ConfigError, match=r"Samples are \[B, 32, 16\] here, not \[2, 16, 16\]"):
        wide.decode(pipe.vae, samples(made))
    with pytest.raises(ConfigError, match="Images are"):
        wide.encode(pipe.vae, torch.zeros(1, 3, 8, 8))
    with pytest.raises(ConfigError, match="floats in"):
        wide.encode(pipe.vae, torch.zeros(1, 3, 8, 16, dtype=torch.uint8))
    pipe, _, net, _ = learnt("wan")
    assert layout(pipe, net, num_frames=5).pixels == (3, 5, 16, 16)


@pytest.mark.parametrize("name", ["sd15", "wan"])
def test_the_pipeline_is_left_as_it_was_and_its_denoiser_computes_two_steps(name: str):
    pipe, call, net, made = learnt(name)
    own, calls = draw(pipe, call), []
    hook = next(m for m in net.net.modules() if isinstance(m, nn.Linear)).register_forward_hook(
        lambda *a: calls.append(0)
    )
    again = layout(pipe, net)
    hook.remove()
    assert len(calls) == 2 and torch.equal(again.order, made.order) and torch.equal(again.scale, made.scale)
    assert "step" not in vars(pipe.scheduler) and "decode" not in vars(pipe.vae)
    assert not any("forward" in vars(m) for m in pipe.components.values() if isinstance(m, nn.Module))
    assert torch.equal(draw(pipe, call), own)


def test_what_is_no_layout_is_refused(monkeypatch: pytest.MonkeyPatch):
    pipe, _, net, _ = learnt("flux")
    unpack = type(pipe)._unpack_latents
    for bend in (
        lambda z: z.tanh(),
        lambda z: z + z.flip(-1),
        lambda z: z[..., :1].expand_as(z),
        lambda z: z[..., :-1],
    ):
        with monkeypatch.context() as patch, pytest.raises(UnsupportedModel, match="does more to its latents"):
            patch.setattr(pipe, "_unpack_latents", lambda *a, bend=bend: bend(unpack(*a)), raising=False)
            layout(pipe, net)
    show = pipe.image_processor.postprocess
    for bend in (lambda v: v.flip(-1), lambda v: v[..., 1:]):
        with monkeypatch.context() as patch, pytest.raises(UnsupportedModel, match="changes its images"):
            patch.setattr(pipe.image_processor, "postprocess", lambda v, bend=bend, **k: bend(show(v, **k)))
            layout(pipe, net)


def test_a_decoder_with_a_time_gets_it_and_noise_in_its_input_is_refused(monkeypatch: pytest.MonkeyPatch):
    pipe, _, net, plain = learnt("ltx")
    assert plain.arguments[0] == (None,)
    times, decode = [], pipe.vae.decode
    with monkeypatch.context() as patch:
        patch.setitem(vars(pipe.vae.config), "timestep_conditioning", True)
        patch.setattr(pipe.vae, "decode", lambda z, t, **k: times.append(t) or decode(z, None, **k))
        made = layout(pipe, net, decode_timestep=0.25, decode_noise_scale=0.0)
        assert made.arguments[0][0].tolist() == [0.25] and made.decode(pipe.vae, samples(made)).isfinite().all()
        assert [float(t) for t in times] == [0.25] * 3 and torch.equal(made.order, plain.order)
        with pytest.raises(UnsupportedModel, match="does more to its latents"):
            layout(pipe, net, decode_timestep=0.25, decode_noise_scale=0.5)


def test_a_pipeline_without_autoencoder_is_refused():
    pipe, _, net, _ = learnt("dit")
    bare = SimpleNamespace(components={k: v for k, v in pipe.components.items() if k != "vae"})
    with pytest.raises(UnsupportedModel, match="has no autoencoder"):
        layout(bare, net)
