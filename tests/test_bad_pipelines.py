"""Pipelines, calls and disks that cannot work: one sentence each, before anything is trained or written."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path as File
from typing import Any

import pytest
import torch
from torch import nn

import hasten
from hasten import ConfigError, UnsupportedModel
from hasten.models.load import load_pipeline
from hasten.pipelines import distill, host
from hasten.role import FitConfig
from hasten.synthesize import synthesize
from tests.pipelines import FAMILIES

SHORT = FitConfig(iterations=1, batch=1, precision="float32")


def made(family: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """A tiny pipeline and its call, changed, without what it is to make."""
    pipe, call = FAMILIES[family]()
    return pipe, {k: v for k, v in {**call, **changes}.items() if k not in ("prompt", "class_labels")}


@pytest.mark.parametrize(
    ("family", "changes"),
    [("flux", {}), ("sd3", {"guidance_scale": 1.0}), ("qwenimage", {"negative_prompt": None})],
    ids=["embedded guidance", "guidance off", "no negative prompt"],
)
@pytest.mark.parametrize("method", [hasten.DMD2(gan_weight=0.0, cfg_scale=3.0), hasten.SiD(cfg_scale=3.0)], ids=repr)
def test_guidance_without_an_unconditional_condition(family: str, changes: Any, method: Any, tmp_path: File):
    pipe, call = made(family, **changes)
    with pytest.raises(ConfigError, match="cfg_scale of 3 needs an unconditional condition.*a negative_prompt where"):
        distill(pipe, method, steps=2, prompts=["tea"], call=call, fit=SHORT, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_call_without_a_negative_prompt_is_guided_by_the_empty_text(tmp_path: File):
    plain, empty = (
        host(pipe, prompts=["tea"], call=call, work=tmp_path / str(i)).net
        for i, (pipe, call) in enumerate(made("sd3", negative_prompt=text) for text in (None, ""))
    )
    assert plain.found.cfg_scale == 5 and plain.uncond and empty.uncond
    assert all(torch.equal(v, empty.uncond[k]) for k, v in plain.uncond.items())


def test_a_prompt_that_is_too_long_is_warned_of_once_with_the_count():
    pipe, call = made("sd3")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distill(
            pipe, hasten.DMD2(gan_weight=0.0), steps=2, prompts=["tea", "a red bicycle " * 60, "a cup " * 90],
            call=call, lora_rank=1, fit=SHORT,
        )  # fmt: skip
    (said,) = (w for w in caught if "longer than" in str(w.message))
    assert str(said.message).startswith("2 of 3 prompts are longer than 77 tokens") and said.filename == __file__


class Rounded(torch.Tensor):
    """As quantization in place leaves weights."""


def test_a_network_that_was_quantized_in_place(tmp_path: File):
    pipe, call = made("sd3")
    pipe.transformer.proj_out.weight = nn.Parameter(pipe.transformer.proj_out.weight.data.as_subclass(Rounded), False)
    with pytest.raises(UnsupportedModel, match="proj_out.weight is quantized in place.*load it plain.*quantize_base"):
        distill(pipe, hasten.DMD2(gan_weight=0.0), prompts=["tea"], call=call, fit=SHORT, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("GatedRepoError", "it is gated: accept its terms on its page and log in"),
        ("RepositoryNotFoundError", "the hub has none of that name, or it is private"),
        ("OfflineModeIsEnabled", "it is not in the local cache, and the hub is switched off"),
        ("TransportError", "it is not in the local cache, and the hub cannot be reached"),
        ("LocalEntryNotFoundError", "it is not in the local cache, and the hub cannot be reached"),
    ],
)
@pytest.mark.parametrize("hidden", [False, True], ids=["plain", "behind diffusers' own"])
def test_a_hub_id_that_is_gated_missing_or_out_of_reach(kind: str, sentence: str, hidden: bool, monkeypatch: Any):
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from huggingface_hub import errors

    def download(*_: Any, **__: Any) -> Any:
        cls: Any = getattr(errors, kind, None) or type(kind, (Exception,), {})  # or of the library below it
        error = cls.__new__(cls, "4xx Client Error.\n\nMore on it.")  # the hub's own are made from its replies
        if not hidden:
            raise error
        raise OSError("Cannot load model a/b: see the stacktrace above.") from error

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    with pytest.raises(ConfigError, match=f"^Cannot load the pipeline 'a/b': {sentence}") as caught:
        load_pipeline("a/b")
    assert "\n" not in str(caught.value)


def test_another_error_of_a_folder_is_told_in_its_first_line(tmp_path: File):
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline", "_diffusers_version": "0.1"}')
    with pytest.raises(ConfigError, match="^Cannot load the pipeline '.*: .*NoSuchPipeline.*") as caught:
        load_pipeline(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("quantize_base", [None, "int8"])
def test_a_disk_that_fills_while_prompts_or_weights_are_kept(quantize_base: Any, tmp_path: File, monkeypatch: Any):
    from safetensors import SafetensorError

    from hasten import whole

    pipe, call = made("flux")
    save, file = whole.save_file, "backbone" if quantize_base else "conditions"

    def full(tensors: Any, place: File) -> None:
        if file in place.name:
            place.write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(tensors, place)

    monkeypatch.setattr(whole, "save_file", full)
    with pytest.raises(ConfigError, match=f"Cannot write .*{file}.*the disk is full; nothing was left there"):
        host(pipe, prompts=["tea"], call=call, work=tmp_path, quantize_base=quantize_base)
    assert not [f for f in tmp_path.rglob("*") if file in f.name and f.is_file()]
    assert all(type(m).__name__ != "QuantizedLinear" for m in pipe.transformer.modules())


def test_what_the_pipeline_refuses_is_one_sentence_and_a_defect_stays_one(monkeypatch: pytest.MonkeyPatch):
    pipe, call = FAMILIES["sd3"]()
    before = pipe.scheduler
    for given in ({"height": 32}, {"call": {**call, "height": 32}}):  # larger than its position table
        with pytest.raises(ConfigError, match="^StableDiffusion3Pipeline refuses this call: .*cannot be greater"):
            hasten.denoiser(pipe, **given)
    with pytest.raises(ConfigError, match="refuses this call: .*cannot be greater"):
        hasten.speed_up(pipe, hasten.Guidance(interval=(0.1, 0.8)), call={**call, "height": 32}).__enter__()
    assert hasten.denoiser(pipe, call).found.call["height"] == call["height"] and pipe.scheduler is before

    def broken(*args: Any) -> None:
        raise ValueError("a defect")

    for place in ("error_of", "kept"):  # outside of the pipeline's call, and in a hook of ours inside of it
        with monkeypatch.context() as patch:
            patch.setattr(f"hasten.models.{'diffusers' if place == 'error_of' else 'probe'}.{place}", broken)
            with pytest.raises(ValueError, match="^a defect$"):
                hasten.denoiser(pipe, call)

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError

    pipe.text_encoder.register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        hasten.denoiser(pipe, call)


def test_a_pipeline_without_a_file_refuses_and_a_gpus_error_is_no_refusal(monkeypatch: pytest.MonkeyPatch):
    pipe, call = FAMILIES["sd3"]()
    source = """
class Mine(Base):
    def __call__(self, *args, **kwargs):
        if error := getattr(self.vae, "error", None):
            raise error
        return super().__call__(*args, **kwargs)
"""
    known: dict[str, Any] = {"Base": type(pipe), "__name__": "typed"}  # in no file, as at the prompt
    exec(compile(source, "<string>", "exec"), known)
    known["Mine"].__call__.__signature__ = inspect.signature(type(pipe).__call__)
    mine = known["Mine"](**pipe.components)
    with pytest.raises(ConfigError, match="^Mine refuses this call: .*cannot be greater"):
        hasten.denoiser(mine, {**call, "height": 32})
    mine.vae.error = ValueError("no such thing")
    with pytest.raises(ConfigError, match="^Mine refuses this call: no such thing"):
        hasten.denoiser(mine, call)
    for error in (torch.AcceleratorError("an illegal memory access"), RuntimeError("CUDA error: out of luck")):
        mine.vae.error = error
        with pytest.raises(type(error)) as caught:
            hasten.denoiser(mine, call)
        assert caught.value is error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is the device")
def test_a_device_that_is_not_there_is_refused(tmp_path: File):
    pipe, call = made("dit")
    with pytest.raises(ConfigError, match="device 'cuda' is not on this machine; use cpu, or auto"):
        distill(pipe, hasten.DMD2(), prompts=[1], call=call, device="cuda")
    with pytest.raises(ConfigError, match="device 'cuda:1' is not on this machine"):
        distill(hasten.load("fashion-mnist"), hasten.DMD2(), device=torch.device("cuda:1"))
    with pytest.raises(ConfigError, match="Unknown device 'gpu'"):
        synthesize(pipe, [1], tmp_path / "out", call=call, device="gpu")
    assert not (tmp_path / "out").exists()


def test_a_single_file_is_no_pipeline(tmp_path: File):
    for name in ("sd.safetensors", str(tmp_path / "sd.ckpt")):
        with pytest.raises(ConfigError, match="names a single file, and a pipeline is a folder.*from_single_file"):
            load_pipeline(name)


def test_several_images_of_a_prompt_are_refused_where_each_gets_one_sample(tmp_path: File):
    pipe, call = made("sdxl", num_images_per_prompt=2)
    with pytest.raises(ConfigError, match="^num_images_per_prompt=2 would do nothing.*leave it out of the call"):
        synthesize(pipe, ["tea"], tmp_path / "out", call=call)
    with pytest.raises(ConfigError, match="^num_images_per_prompt=2 would do nothing"):
        distill(pipe, hasten.DMD2(gan_weight=0.0), prompts=["tea"], call=call, fit=SHORT, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
