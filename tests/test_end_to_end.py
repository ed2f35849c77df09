"""From a pipeline to a folder through the public call, one family of every kind; and adapters on a rounded backbone."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import hasten
from hasten import ConfigError, UnsupportedModel, export
from hasten import compared as compare
from hasten.captioned import load_captioned
from hasten.compared import compared
from hasten.core.denoiser import Batch
from hasten.core.method import Sampling, even
from hasten.distribute import clone
from hasten.encoded import Buckets
from hasten.fit import fit
from hasten.frozen import QuantizedLinear
from hasten.lora import LoRA, shared
from hasten.lorafile import linears, read_lora
from hasten.pipelines import Student, distill, host, prepare
from hasten.recipe import parse
from hasten.role import FitConfig
from tests.pipelines import FAMILIES
from tests.pipelines_more import MORE
from tests.test_diffusers import fixed_loss

PROMPTS = ["a red bicycle", "two grey dogs beside a long river", "tea"]
SHORT = FitConfig(iterations=2, batch=2, lr=1e-2, precision="float32")
KINDS = {  # what is special about each; steps, and whether adapters are trained
    "sd15": ("a UNet with a table, whose guidance a config entry turns off", 4, True),
    "dit": ("classes, and an output with its variance", 2, False),
    "flux2": ("guidance as an input", 1, True),
    "z_image": ("prompts as lists, and a time that runs the other way", 2, True),
    "wan": ("a video by a solver of flows", 4, False),
    "cogvideox": ("a video that predicts v", 1, True),
}


def prepared(family: str) -> tuple[Any, dict[str, Any], list[Any]]:
    """A tiny pipeline, how it is called, and three things to make."""
    pipe, call = FAMILIES[family]()
    call = {k: v for k, v in call.items() if k not in ("prompt", "class_labels")}
    return pipe, call, [1, 2, 3] if family == "dit" else PROMPTS


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, export.Written], dict[str, dict[str, Tensor]]]:
    """``distill`` and ``save_pretrained`` of every kind; all folders are loaded back in one fresh process, not six."""
    root, seen = tmp_path_factory.mktemp("students"), {}
    with pytest.MonkeyPatch.context() as patch:
        found: list[export.Written] = []
        patch.setattr(export, "verify", found.extend)
        for family, (_, steps, lora) in KINDS.items():
            pipe, call, subjects = prepared(family)
            student = distill(
                pipe, hasten.DMD2(gan_weight=0.0), steps=steps, prompts=subjects, call=call, fit=SHORT,
                lora_rank=2 if lora else None,
            )  # fmt: skip
            folder = student.save_pretrained(root / family)
            one = found.pop()
            seen[family] = replace(one, folder=folder, job={**one.job, "folder": str(folder)})
    return seen, dict(zip(seen, export.reloaded(list(seen.values())), strict=True))


@pytest.mark.parametrize("family", KINDS)
def test_a_distilled_student_is_the_same_in_a_fresh_process(saved: Any, family: str):
    written, seen = saved[0][family], saved[1][family]
    export.compare(written, seen)
    steps = KINDS[family][1]
    assert len(seen["times"]) == steps == export.read_about(written.folder)["steps"]
    assert f"**{steps} step" in (written.folder / "README.md").read_text() and (written.folder / "grid.png").is_file()


@pytest.mark.parametrize("family", KINDS)
def test_a_distilled_student_is_not_its_teacher(saved: Any, family: str):
    written = saved[0][family]
    pipe: Any = FAMILIES[family]()[0]
    name = "unet" if family == "sd15" else "transformer"
    teacher = dict(getattr(pipe, name).named_parameters())
    student = type(getattr(pipe, name)).from_pretrained(written.folder / name)
    moved = [k for k, v in teacher.items() if not torch.equal(v, student.get_parameter(k))]
    assert moved and all("weight" in k for k in moved) if KINDS[family][2] else len(moved) > len(teacher) / 2


@pytest.mark.parametrize("family", KINDS)
def test_the_card_has_the_recipe_and_what_was_measured_beside_the_teacher(saved: Any, family: str):
    text, steps = (saved[0][family].folder / "README.md").read_text(), KINDS[family][1]
    assert "## Recipe" in text and "  name: dmd2" in text and "iterations: 2" in text
    rows = [line.split(" | ") for line in text[text.index("## Measured") :].splitlines() if line.startswith("| ")]
    heads, student, teacher = rows[0], rows[2], rows[3]
    assert heads[1:4] == ["network calls", "seconds a request", "parameters"] and "PSNR" not in text
    own = {"sd15": 100, "dit": 100, "flux2": 50, "z_image": 100, "wan": 100, "cogvideox": 100}[family]
    assert student[0] == "| student" and student[1] == str(steps) and teacher[1] == str(own)
    assert 0 < float(student[2]) < float(teacher[2]) and student[3] == teacher[3] != "0"


def test_a_student_that_is_its_teacher_is_like_it_and_other_noise_is_not():
    pipe, call, prompts = prepared("sd3")
    there = host(pipe, prompts=prompts, call={**call, "guidance_scale": 1.0})
    there.restore()
    parts = dict(pipe.components)
    rows = compared(pipe, there.net, Sampling(even(28), "ode"), near=True)
    assert [row["network calls"] for row in rows[:2]] == [28, 28] and pipe.components == parts
    assert rows[0]["PSNR, dB"] > 35 > 20 > rows[2]["PSNR, dB"] and rows[0]["SSIM"] > 0.95 > rows[2]["SSIM"]


def test_a_guider_is_off_for_the_student_and_on_for_the_teacher_and_a_slow_teacher_is_asked_once(monkeypatch: Any):
    monkeypatch.setattr(compare, "LONG", 0.0)
    pipe, call = MORE["hunyuanvideo15"]()
    there = host(pipe, prompts=PROMPTS, call={k: v for k, v in call.items() if k != "prompt"})
    there.restore()
    student, teacher = compared(pipe, there.net, Sampling(even(2), "ode"), near=True)
    assert (student["network calls"], teacher["network calls"]) == (2, 100) and pipe.guider._enabled


def test_only_a_method_that_follows_the_teachers_path_is_likened_to_it(tmp_path: File):
    pipe, call, prompts = prepared("dit")
    student = distill(pipe, hasten.KD(), steps=2, prompts=prompts, call=call, fit=SHORT)
    assert "SSIM" in student.measure()[0] and student.measure(2) is student.measure()
    with pytest.raises(ConfigError, match="was trained for 2 steps, not 3; distil it with steps=3"):
        student.save_pretrained(tmp_path / "s", steps=3)


def test_boss_finds_the_times_of_a_pipeline_or_says_at_once_that_it_cannot_step_there(tmp_path: File):
    pipe, call, prompts = prepared("sd3")
    student = distill(pipe, hasten.BOSS(fine=12, count=4, substeps=1), steps=3, prompts=prompts, call=call, fit=SHORT)
    times = student.samplings[3].times
    assert times != hasten.even(3) and [round(12 * u, 6) % 1 for u in times] == [0] * 4
    student.save_pretrained(tmp_path / "s", measure=False)
    pipe, call, prompts = prepared("sdxl")
    settings: Any = {"prompts": prompts, "call": call, "fit": SHORT, "out": tmp_path / "no"}
    with pytest.raises(UnsupportedModel, match="No stock scheduler runs StableDiffusionXLPipeline at times"):
        distill(pipe, hasten.BOSS(), steps=4, **settings)
    assert not (tmp_path / "no" / "checkpoints").exists()


def test_captioned_pictures_of_two_sizes_are_encoded_once_and_trained_on(tmp_path: File):
    pipe, call, _ = prepared("sd3")
    call = {k: v for k, v in call.items() if k not in ("height", "width")}
    data, sizes = tmp_path / "data", [(8, 8), (8, 16)]
    data.mkdir()
    wide, texts = (False, True, False, True, False), ("tea", "a cup", "tea", "a red bicycle", "a dog")
    for i, (is_wide, text) in enumerate(zip(wide, texts, strict=True)):
        Image.new("RGB", (32 if is_wide else 16, 16), (40 * i, 200, 255 - 40 * i)).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(text)
    settings: dict[str, Any] = dict(data=data, call=call, sizes=sizes)
    there = host(pipe, work=tmp_path / "work", **settings)
    assert isinstance(there.source, Buckets) and [s.prompts for s in there.source.sources] == [3, 2]
    for source, size, mine in zip(there.source.sources, sizes, ([0, 2, 4], [1, 3]), strict=True):
        layout = there.layouts[source.shape]
        for row, i in enumerate(mine):
            want = layout.encode(pipe.vae, load_captioned(data).load(i, size)[None])
            assert torch.allclose(source.rows([row]).data, want, atol=1e-5)
    square = there.source.sources[0].rows([0, 1, 2]).cond
    assert all(torch.equal(v[0], v[1]) for v in square.values())  # "tea" twice
    assert any(not torch.equal(v[0], v[2]) for v in square.values())
    files = sorted((tmp_path / "work").rglob("latents-*"))
    before = [f.stat().st_mtime_ns for f in files]
    student = distill(
        prepared("sd3")[0], hasten.CM(from_teacher=True, cfg_scale=2.0), steps=1, out=tmp_path / "work",
        fit=replace(SHORT, iterations=3), **settings,
    )  # fmt: skip
    assert len(files) == 2 and [f.stat().st_mtime_ns for f in files] == before
    assert student.pictures(2).shape == (2, 3, 8, 8)


# --- a rounded backbone -----------------------------------------------------------------------------------------


def nbytes(*nets: nn.Module) -> int:
    """The bytes of all weights that networks hold, shared ones counted once."""
    each = {p.data_ptr(): p for net in nets for p in (*net.parameters(), *shared(net).values())}
    return sum(p.numel() * p.element_size() for p in each.values())


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_three_roles_on_a_rounded_backbone_are_small_and_learn(dtype: Any, tmp_path: File):
    pipe, call, prompts = prepared("sd3")
    before = nbytes(pipe.transformer)
    there = host(pipe, prompts=prompts, call=call, work=tmp_path, quantize_base=dtype)
    rounded = [m for m in pipe.transformer.modules() if isinstance(m, QuantizedLinear)]
    assert there.rounded and len(rounded) == len(there.rounded.paths) > 10
    full = sum(m.in_features * m.out_features * 4 for m in rounded)
    stored = sum(p.numel() * p.element_size() for m in rounded for p in (m.packed, m.scale))
    assert nbytes(pipe.transformer) == before - full + stored and stored < full / (3 if dtype == "int8" else 5)
    roles = [clone(there.net, lora=LoRA(2)) for _ in range(2)]
    assert nbytes(there.net, *roles) == nbytes(there.net) + sum(p.numel() * 4 for r in roles for p in r.parameters())

    batch = there.source.rows([0, 1, 2])  # type: ignore[union-attr]

    class Same:
        shape, has_data, classes, name = there.net.shape, False, 0, "one batch"

        def batch(self, n: int, generator: Any, device: Any = "cpu") -> Batch:
            return batch

    config = FitConfig(
        iterations=16, batch=3, lr=3e-3, precision="float32", clone="lora", lora_rank=4, ema=(0.0,),
        lrs={"student": 1e-9},
    )  # fmt: skip
    method, losses, frozen = hasten.DMD2(gan_weight=0.0, student_every=2), [], copy.deepcopy(there.net.state_dict())
    for step in fit(method, Same(), there.net, config):
        if step.index in (1, step.total):
            nets = {**{k: role.net for k, role in step.roles.items()}, "teacher": there.net}
            losses.append(fixed_loss(next(t for t in method.turns if "fake" in t.trains), nets, batch))
    assert losses[1] < losses[0]
    assert all(torch.equal(v, frozen[k]) for k, v in there.net.state_dict().items())


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Tensor], Student, File]:
    """A pipeline, its weights before, its student on an int4 backbone, and where that is."""
    out = tmp_path_factory.mktemp("rounded")
    pipe, call, prompts = prepared("sd3")
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    student = distill(
        pipe, hasten.DMD2(gan_weight=0.0), steps=2, prompts=prompts, call=call, lora_rank=2, quantize_base="int4",
        fit=SHORT, out=out / "run",
    )  # fmt: skip
    return pipe, before, student, out


def test_export_adds_adapters_to_the_weights_before_rounding_and_says_so(rounded: Any):
    pipe, before, student, out = rounded
    assert all(torch.equal(v, before[k]) for k, v in pipe.transformer.state_dict().items())  # training is over
    with pytest.raises(UnsupportedModel, match="Restore the backbone's own weights first"):
        export.export(pipe, student.net, student.samplings[2], out / "wrong")
    assert not (out / "wrong").exists()
    folder = student.save_pretrained(out / "model")
    adapters = student.save_pretrained(out / "lora", lora=True)
    assert all(torch.equal(v, before[k]) for k, v in pipe.transformer.state_dict().items())
    fused = type(pipe.transformer).from_pretrained(folder / "transformer").state_dict()
    tensors, _ = read_lora(adapters / export.LORA)
    paths = linears(student.net.net)
    assert len(tensors) == 2 * len(paths)
    assert sum(bool(v.any()) for k, v in tensors.items() if "lora_B" in k) > 0.8 * len(paths)
    for path, m in paths.items():
        down, up = (tensors[f"transformer.{path}.lora_{x}.weight"] for x in "AB")
        assert torch.equal(down, m.lora_A)
        assert torch.allclose(fused[f"{path}.weight"], before[f"{path}.weight"] + up @ down, atol=1e-6)
    assert torch.equal(fused["pos_embed.proj.weight"], before["pos_embed.proj.weight"])
    assert all("were trained on weights rounded to int4" in (f / "README.md").read_text() for f in (folder, adapters))


def test_a_run_of_another_rounding_is_another_run(rounded: Any):
    _, _, _, out = rounded
    pipe, call, prompts = prepared("sd3")
    settings: dict[str, Any] = dict(steps=2, prompts=prompts, call=call, lora_rank=2, fit=SHORT, out=out / "run")
    for dtype in ("int8", None):
        with pytest.raises(hasten.CheckpointError, match="another run, of another quantize_base: int4 there, "):
            distill(FAMILIES["sd3"]()[0], hasten.DMD2(gan_weight=0.0), quantize_base=dtype, **settings)
    distill(pipe, hasten.DMD2(gan_weight=0.0), quantize_base="int4", **settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"quantize_base": "int8"}, "rounds the frozen weights under adapters, and there are none; give lora_rank"),
        ({"quantize_base": "int3", "lora_rank": 2}, "Unknown rounding 'int3'; did you mean 'int"),
        ({"start": "runs/earlier"}, "start is for native networks; leave it out for a pipeline"),
    ],
)
def test_a_rounding_or_a_start_that_cannot_be_is_refused(settings: dict[str, Any], sentence: str, tmp_path: File):
    pipe, call, prompts = prepared("sd3")
    with pytest.raises(ConfigError, match=sentence):
        distill(pipe, hasten.DMD2(), prompts=prompts, call=call, out=tmp_path / "out", **settings)
    with pytest.raises(UnsupportedModel, match="DPO takes pairs of images for a native network"):
        distill(pipe, hasten.DPO(), data="prefs.safetensors", call=call, out=tmp_path / "out")
    with pytest.raises(UnsupportedModel, match="DPO takes pairs of images for a native network"):
        prepare(parse({"method": "dpo", "pipeline": "x", "data": "prefs.safetensors", "out": str(tmp_path / "out")}))
    with pytest.raises(ConfigError, match="a native network, not from a diffusers pipeline"):
        hasten.scored_pairs(pipe, Sampling(even(2)), lambda x, labels: x.mean((1, 2, 3)), 4)
    assert not (tmp_path / "out").exists()
    net = hasten.load("fashion-mnist")
    with pytest.raises(ConfigError, match="quantize_base is for diffusers pipelines"):
        distill(net, hasten.DMD2(), quantize_base="int8", lora_rank=2)
