"""A pipeline in a run: whole after every end, its folder of one run only, saved for each of its step counts."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import hasten
from hasten import ConfigError, cli, export, hosted, pipelines, recipe
from hasten.fit import fit
from hasten.frozen import QuantizedLinear
from hasten.models.encoders import free
from hasten.pipelines import distill, host
from hasten.whole import write
from tests.pipeline_parts import awake
from tests.pipelines import FAMILIES
from tests.test_end_to_end import SHORT, prepared


def test_other_pictures_with_the_same_captions_are_encoded_anew(tmp_path: File):
    pipe, call, _ = prepared("sd3")

    def latents(colour: str, name: str = "a.png") -> tuple[Tensor, int]:
        (tmp_path / "data").mkdir(exist_ok=True)
        for old in (tmp_path / "data").iterdir():
            old.unlink()
        Image.new("RGB", (8, 8), colour).save(tmp_path / "data" / name)
        (tmp_path / "data" / name).with_suffix(".txt").write_text("a plain picture")
        told: list[Any] = []
        there = host(pipe, data=tmp_path / "data", call=call, work=tmp_path / "work", tell=lambda *v: told.append(v))
        there.restore()
        assert told[0] == ("reading pictures", 0, 1) and told[1] == ("reading pictures", 1, 1)
        return there.source.rows([0]).data, len(list((tmp_path / "work").rglob("latents-*")))  # type: ignore[union-attr]

    red, one = latents("red")
    again, same = latents("red", "b.png")
    blue, two = latents("blue")
    assert torch.equal(red, again) and not torch.allclose(red, blue, atol=0.1) and (one, same, two) == (1, 1, 2)


def test_a_finished_run_of_several_step_counts_is_saved_for_each(tmp_path: File):
    prepared("sd3")[0].save_pretrained(tmp_path / "sd3")
    call = {k: v for k, v in FAMILIES["sd3"]()[1].items() if k != "prompt"}
    (tmp_path / "prompts.txt").write_text("a cup\n")
    raw = {
        "method": {"name": "dmd2", "gan_weight": 0.0}, "pipeline": str(tmp_path / "sd3"), "steps": [1, 2],
        "prompts": str(tmp_path / "prompts.txt"), "call": call, "out": str(tmp_path / "run"), "device": "cpu",
        "fit": {"iterations": 2, "batch": 2, "clone": "lora", "lora_rank": 2, "precision": "float32"},
    }  # fmt: skip
    job = pipelines.prepare(recipe.parse(raw))
    steps = fit(job.recipe.method, job.source, job.net, job.recipe.fit, out=job.out)
    next(steps).save()
    job.out.joinpath("model").mkdir()
    recipe.save(job.recipe, job.out / "model" / "recipe.yaml")
    with pytest.raises(hasten.CheckpointError, match="holds no finished run of hasten distill"):
        pipelines.finished(job.out)
    (step,) = steps
    job.out.joinpath("model", "recipe.yaml").unlink()
    job.out.joinpath("model").rmdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "verify", lambda written: None)
        with pytest.warns(UserWarning, match=r"run/model samples in 2 steps; for 1: .*finished\('.*/run'\).*steps=1"):
            job.save(step)
        assert job.saved(step) and not job.saved(replace(step, index=1))
        (job.out / "lora").rename(job.out / "away")
        assert not job.saved(step)
        folder = pipelines.finished(tmp_path / "run").save_pretrained(tmp_path / "one", steps=1, measure=False)
    assert export.read_about(folder)["steps"] == 1 and "## Measured" not in (folder / "README.md").read_text()
    both = [load_file(f / "transformer" / "diffusion_pytorch_model.safetensors") for f in (folder, job.out / "model")]
    assert all(torch.equal(v, both[1][k]) for k, v in both[0].items())


@pytest.mark.parametrize(
    "error", [ValueError("no such thing\nand more"), torch.OutOfMemoryError(), KeyboardInterrupt()]
)
def test_a_measurement_that_fails_costs_the_card_its_table_alone(
    error: BaseException, tmp_path: File, monkeypatch: pytest.MonkeyPatch
):
    def fails(*args: Any, **kwargs: Any) -> None:
        raise error

    pipe, call, prompts = prepared("dit")
    student = distill(pipe, hasten.DMD2(gan_weight=0.0), steps=2, prompts=prompts, call=call, fit=SHORT)
    monkeypatch.setattr("hasten.compared.request", fails)
    monkeypatch.setattr(export, "verify", lambda written: None)
    why = {"ValueError": r"failed \(no such thing\);", "KeyboardInterrupt": "was interrupted;"}
    with pytest.warns(UserWarning, match=why.get(type(error).__name__, r"failed \(OutOfMemoryError\);")):
        folder = student.save_pretrained(tmp_path / "s")
    assert "## Measured" not in (folder / "README.md").read_text() and pipe.transformer is not student.net.net
    with pytest.raises(type(error)):
        student.measure()


def test_under_torchrun_the_first_rank_writes(tmp_path: File, monkeypatch: pytest.MonkeyPatch):
    pipe, call, prompts = prepared("sd3")
    for module in (hosted, pipelines):
        monkeypatch.setattr(module, "world", lambda: (1, 2))
    there = host(pipe, prompts=prompts, call=call, work=tmp_path)
    assert {f.name.split("-")[0] for f in tmp_path.iterdir()} == {"conditions", "rank1"}
    (tmp_path / "encoders").mkdir()  # the first rank's, which is still reading them
    wanted: Any = recipe.parse({"method": "dmd2", "pipeline": "sd3", "prompts": "prompts.txt", "steps": [1]})
    job = pipelines.PipelineJob(wanted, there, torch.device("cpu"), tmp_path)
    step: Any = None  # nothing of it is looked at
    assert job.save(step) == tmp_path / "model" and not (tmp_path / "model").exists()
    assert (tmp_path / "encoders").is_dir() and not (tmp_path / "rank1-encoders").exists()
    monkeypatch.setattr("hasten.distribute.world", lambda: (1, 2))
    monkeypatch.setattr(export, "publish", lambda *args: pytest.fail("every rank uploads"))
    cli._publish(tmp_path, "mit", "me/fast")


def test_two_ranks_write_the_same_file_at_once(tmp_path: File, monkeypatch: pytest.MonkeyPatch):
    def second(place: File) -> None:
        place.write_text("whole")
        with monkeypatch.context() as patch:
            patch.setenv("RANK", "1")
            write(tmp_path / "a", lambda other: other.write_text("whole"))

    monkeypatch.setenv("RANK", "0")
    write(tmp_path / "a", second)
    assert [f.name for f in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "whole"


def test_a_folder_of_another_run_is_refused_in_words_before_anything_is_written(tmp_path: File):
    out = tmp_path / "run"

    def go(
        prompts: Any = ("a cup", "tea"), seed: int | None = None, data: Any = None, family: str = "sd3", **call: Any
    ) -> None:
        pipe, own, _ = prepared(family)
        if seed is not None:
            awake(pipe, seed)
        method = hasten.DMD2(gan_weight=0.0) if data is None else hasten.CM(from_teacher=True, cfg_scale=2.0)
        distill(
            pipe, method, steps=1, prompts=None if data else list(prompts), data=data, call={**own, **call}, out=out,
            fit=SHORT,
        )  # fmt: skip

    go()
    files = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a cup")
    cases: dict[str, dict[str, Any]] = {
        "of other prompts: 2, first 'a cup' there, 1, first 'tea' here": {"prompts": ("tea",)},
        "of other prompts; choose another": {"prompts": ("a cup", "a pot")},
        "of another model: StableDiffusion3Pipeline there, FluxPipeline here": {"family": "flux"},
        "of another model; choose another": {"seed": 1},
        "of another call: {'guidance_scale': 5.0} there, {'guidance_scale': 3.0} here": {"guidance_scale": 3.0},
        "of other prompts: 2, first 'a cup' there, 1, first 'a cup' here": {"data": tmp_path},
    }
    for sentence, changes in cases.items():
        with pytest.raises(hasten.CheckpointError, match=f"belongs to another run, {re.escape(sentence)}"):
            go(**changes)
    assert files == {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    go()  # the same run, which is complete


def test_other_pictures_are_another_run(tmp_path: File):
    for colour in ("red", "blue"):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "a.png")
        (tmp_path / "a.txt").write_text("a cup")
        pipe, call, _ = prepared("sd3")
        settings: dict[str, Any] = dict(steps=1, data=tmp_path, call=call, fit=SHORT, out=tmp_path / ".run")
        method = hasten.CM(from_teacher=True, cfg_scale=2.0)
        if colour == "red":
            distill(pipe, method, **settings)
    with pytest.raises(hasten.CheckpointError, match=r"of other data \(pictures or samples\); choose another"):
        distill(pipe, method, **settings)  # pyright: ignore[reportPossiblyUnboundVariable]


# --- the pipeline is whole again -----------------------------------------------------------------------------------


def state(pipe: Any) -> dict[str, Tensor]:
    """Every tensor of every component, copied."""
    parts = {k: m for k, m in pipe.components.items() if isinstance(m, nn.Module)}
    return {f"{k}.{name}": v.clone() for k, m in parts.items() for name, v in m.state_dict().items()}


def gradients(pipe: Any) -> list[bool]:
    return [p.requires_grad for p in pipe.transformer.parameters()]


@pytest.mark.parametrize("how", ["interrupted", "diverged", "no room", "done"])
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_the_pipeline_is_whole_after_any_end_and_can_be_distilled_again(
    how: str, dtype: Any, tmp_path: File, monkeypatch: pytest.MonkeyPatch
):
    pipe, call, prompts = prepared("sd3")
    settings: dict[str, Any] = dict(steps=2, prompts=prompts, call=call, lora_rank=2, fit=SHORT, quantize_base=dtype)
    before, asked, inner = state(pipe), gradients(pipe), hosted.restore
    assert all(asked)
    trained: list[int] = []

    def tell(what: str, done: int, wanted: int) -> None:
        if what == "training":
            trained.append(done)
            assert pipe.text_encoder is None and pipe.text_encoder_3 is None
            assert any(isinstance(m, QuantizedLinear) for m in pipe.transformer.modules()) == bool(dtype)
            if how == "interrupted":
                raise KeyboardInterrupt
            if how == "diverged":
                raise hasten.Diverged("The loss is infinite.")

    def crowded(pipe: Any, freed: list[Any]) -> None:  # a device on which the last encoder has no room
        if freed[0].name == "text_encoder_3" and freed[0].device.type == "meta":
            raise torch.OutOfMemoryError
        inner(pipe, [replace(k, device=torch.device("cpu")) for k in freed])

    if how == "no room":
        monkeypatch.setattr(hosted, "free", lambda *a: [replace(k, device=torch.device("meta")) for k in free(*a)])
        monkeypatch.setattr(hosted, "restore", crowded)
    ends = {"interrupted": KeyboardInterrupt, "diverged": hasten.Diverged}
    if how in ends:
        with pytest.raises(ends[how]):
            distill(pipe, hasten.DMD2(gan_weight=0.0), tell=tell, **settings)
    elif how == "no room":
        with pytest.warns(UserWarning, match="no room for text_encoder_3 on meta; it is on the CPU"):
            distill(pipe, hasten.DMD2(gan_weight=0.0), tell=tell, **settings)
    else:
        distill(pipe, hasten.DMD2(gan_weight=0.0), tell=tell, **settings)
    monkeypatch.undo()
    assert trained and gradients(pipe) == asked
    after = state(pipe)
    assert after.keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in after.items())
    how = "done"
    student = distill(pipe, hasten.DMD2(gan_weight=0.0), tell=tell, out=tmp_path / "again", **settings)
    after = state(pipe)
    assert all(torch.equal(v, before[k]) for k, v in after.items()) and not (tmp_path / "again" / "encoders").exists()
    assert student.pictures(1).isfinite().all()


def test_a_rounding_that_fails_leaves_the_encoders(tmp_path: File, monkeypatch: pytest.MonkeyPatch):
    pipe, call, prompts = prepared("sd3")
    before = state(pipe)

    def full(*args: Any) -> None:
        raise ConfigError("The disk is full.")

    monkeypatch.setattr(hosted, "round_blocks", full)
    with pytest.raises(ConfigError, match="disk is full"):
        host(pipe, prompts=prompts, call=call, work=tmp_path, quantize_base="int8")
    after = state(pipe)
    assert after.keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in after.items())
