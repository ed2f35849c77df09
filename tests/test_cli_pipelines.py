"""The command line on diffusers pipelines: synthesize, distil, sample; bad input is one sentence, nothing written."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hasten import synthesize as synthesis
from hasten import workload
from hasten.pipelines import load_pipeline
from tests.commandline import plain_consoles, refused, run  # noqa: F401
from tests.pipelines import FAMILIES

SIZE = ("--call", "height=8", "--call", "width=8", "--call", "max_sequence_length=32")
PROMPTS = "a red bicycle\ntwo grey dogs\na cup\n"


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> File:
    """A folder with saved pipelines, and prompts and labels for them."""
    folder = tmp_path_factory.mktemp("pipelines")
    for family in ("sd3", "dit", "wan"):
        FAMILIES[family]()[0].save_pretrained(folder / family)
    (folder / "prompts.txt").write_text(PROMPTS)
    (folder / "labels.txt").write_text("1\n2\n3\n")
    (folder / "empty.txt").write_text("\n")
    (folder / "columns.csv").write_text("n,title\n1,a cup\n")
    (folder / "nothing").mkdir()
    return folder


@pytest.fixture(scope="module")
def student(there: File) -> File:
    """The output folder of a distillation with adapters."""
    out = there / "run"
    run(*distillation(there, out), "--lora-rank", "4", "--prompts", str(there / "prompts.txt"))
    return out


def distillation(there: File, out: File) -> tuple[str, ...]:
    """A command that still needs prompts or data."""
    args = ("distill", "--model", str(there / "sd3"), "--method", "dmd2", "--steps", "2", "--out", str(out), *SIZE)
    return (*args, "--iterations", "2", "--batch", "2", "--no-tensorboard", "--set", "fit.precision=float32")


def test_synthesize_goes_on_after_an_interrupt(there: File, tmp_path: File, monkeypatch: pytest.MonkeyPatch):
    args = ("synthesize", str(there / "dit"), "--prompts", str(there / "labels.txt"), "--count", "66", "--steps", "1")
    args = (*args, "--batch", "33", "--out")
    assert run(*args, str(tmp_path / "a")).stdout.strip() == str(tmp_path / "a")
    about = json.loads((tmp_path / "a" / "synthetic.json").read_text())
    assert (about["prompts"][:4], len(about["prompts"]), about["cfg_scale"]) == ([1, 2, 3, 1], 66, 4.0)
    drawn, calls = synthesis.drawn, iter(range(9))

    def interrupted(*given: Any) -> Any:  # Ctrl-C in the second shard
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return drawn(*given)

    with monkeypatch.context() as patch:
        patch.setattr(synthesis, "drawn", interrupted)
        assert "synthesis go on from their last checkpoint" in refused(*args, str(tmp_path / "b"), code=130)
    assert [f.name for f in (tmp_path / "b").glob("*.*")] in (
        ["unfinished.json", "latents-00000.safetensors"], ["latents-00000.safetensors", "unfinished.json"],
    )  # fmt: skip
    run(*args, str(tmp_path / "b"))
    for file in (tmp_path / "a").glob("latents-*"):
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()
    assert "its steps is 1, this run's is 3" in refused(*args, str(tmp_path / "b"), "--steps", "3")


def test_distill_leaves_a_plain_pipeline_and_its_adapters(student: File, there: File):
    about = json.loads((student / "model" / "hasten.json").read_text())
    assert about["steps"] == 2 and about["call"]["guidance_scale"] == 1.0
    assert (
        (student / "model" / "recipe.yaml").is_file()
        and (student / "lora").is_dir()
        and (student / "previews").is_dir()
    )
    before, after = (load_pipeline(str(f)).transformer.state_dict() for f in (there / "sd3", student / "model"))
    assert before.keys() == after.keys() and any(not v.equal(before[k]) for k, v in after.items())
    assert "## Measured" in (student / "model" / "README.md").read_text()
    again = run(*distillation(there, student), "--lora-rank", "4", "--prompts", str(there / "prompts.txt"))
    assert "was already complete" in again.stdout


def test_a_finished_run_writes_the_file_for_comfyui_that_it_lacks(student: File, there: File):
    args = (*distillation(there, student), "--lora-rank", "4", "--prompts", str(there / "prompts.txt"))
    args, file = (*args, "--format", "comfyui"), student / "comfyui.safetensors"
    (student / "model" / "recipe.yaml").unlink()  # as when writing that file failed
    assert not file.exists() and run(*args, "--no-measure").stdout.strip() == str(student / "model")
    assert "## Measured" not in (student / "model" / "README.md").read_text()
    assert "lora_A" in next(k for k in load_file(file) if "lora" in k) and (student / "model" / "recipe.yaml").is_file()
    assert "was already complete" in run(*args).stdout


def test_a_student_that_is_there_gets_a_licence_and_is_uploaded(
    student: File, there: File, monkeypatch: pytest.MonkeyPatch
):
    import huggingface_hub

    done: list[Any] = []

    class Hub:
        def create_repo(self, repo: str, exist_ok: bool) -> None:
            done.append(repo)

        def upload_folder(self, **how: Any) -> str:
            done.append(how["folder_path"])
            return "the-address"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    args = (*distillation(there, student), "--lora-rank", "4", "--prompts", str(there / "prompts.txt"))
    said = run(*args, "--licence", "openrail", "--push-to-hub", "me/fast")
    assert "Uploaded to the-address" in said.stderr and done == ["me/fast", str(student / "model")]
    for folder in ("model", "lora"):
        text = (student / folder / "README.md").read_text()
        assert "\nlicense: openrail\n" in text and "are under openrail." in text
        assert "distilled with dmd2 from `sd3`" in text and str(there) not in text


def test_distill_trains_on_synthetic_data(there: File, tmp_path: File, monkeypatch: pytest.MonkeyPatch):
    args = ("synthesize", str(there / "sd3"), "--prompts", str(there / "prompts.txt"), "--steps", "2", *SIZE)
    run(*args, "--out", str(tmp_path / "data"))
    monkeypatch.setattr("hasten.pipelines.PipelineJob.save", lambda job, step: job.out)  # exports are proven elsewhere
    out = tmp_path / "run"
    args = (
        "distill",
        "--model",
        str(there / "sd3"),
        "--method",
        "cm",
        "--steps",
        "1",
        "--data",
        str(tmp_path / "data"),
    )
    args = (*args, "--iterations", "2", "--batch", "2", "--no-tensorboard", "--out", str(out))
    assert "cm " in run(*args).stderr
    assert [f.name for f in (out / "checkpoints").iterdir()] == ["00000002"]


def test_sample_calls_a_student_as_it_wants_to_be_called(
    student: File, tmp_path: File, monkeypatch: pytest.MonkeyPatch
):
    seen: list[Any] = []
    inner = workload.picture

    def picture(pipe: Any, call: Any, steps: Any, seed: int, i: int) -> Any:
        before, step = len(seen), pipe.scheduler.step
        hook = pipe.transformer.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
        )
        made = inner(pipe, call, steps, seed, i)
        hook.remove()
        assert seen[before:] == [1, 1] and pipe.scheduler.step == step  # two steps, and no guidance in them
        return made

    monkeypatch.setattr(workload, "picture", picture)
    out = tmp_path / "grids" / "s.png"
    args = ("sample", str(student), "--prompts", str(student.parent / "prompts.txt"), "--count", "5")
    assert run(*args, "--out", str(out)).stdout.strip() == str(out)
    assert len(seen) == 10
    first = Image.open(out).tobytes()
    assert Image.open(out).size == (3 * 9 * 6 + 6, 2 * 9 * 6 + 6)  # 3 x 2 pictures of 8 pixels, enlarged
    run(*args, "--out", str(out))
    assert Image.open(out).tobytes() == first
    run(*args, "--out", str(out), "--seed", "1")
    assert Image.open(out).tobytes() != first
    monkeypatch.setattr(workload, "picture", inner)
    assert (
        "made for 2 steps, not 3"
        in run("sample", str(student), "--prompt", "a cup", "--steps", "3", "--out", str(out)).stderr
    )
    plain = ("sample", str(student), "--prompt", "a cup", "--out", str(out), "--call")
    assert "made for guidance_scale=1, not 7: it would be guided" in run(*plain, "guidance_scale=7").stderr
    assert "made for" not in run(*plain, "guidance_scale=1").stderr + run(*plain, "height=8").stderr


def test_sample_puts_adapters_onto_their_base(
    student: File, there: File, tmp_path: File, monkeypatch: pytest.MonkeyPatch
):
    """Of diffusers' own reader, which needs peft, only the call is looked at."""
    import diffusers

    seen: list[Any] = []
    kind: Any = getattr(diffusers, "StableDiffusion3Pipeline")  # noqa: B009
    monkeypatch.setattr(kind, "load_lora_weights", lambda pipe, place: seen.append((pipe, place)))
    monkeypatch.setattr(
        workload, "picture", lambda pipe, call, steps, *_: seen.append((pipe, steps)) or torch.zeros(1, 3, 8, 8)
    )
    run("sample", str(student / "lora"), "--prompt", "a cup", "--out", str(tmp_path / "s.png"))
    (pipe, place), (same, steps) = seen
    assert place == str(student / "lora") and same is pipe and steps == 2 and Image.open(tmp_path / "s.png").size
    assert pipe.scheduler.config.shift == load_pipeline(str(student / "model")).scheduler.config.shift
    assert load_pipeline(str(there / "sd3")).transformer.state_dict().keys() == pipe.transformer.state_dict().keys()
    (tmp_path / "lora").mkdir()
    about = json.loads((student / "lora" / "hasten.json").read_text())
    (tmp_path / "lora" / "hasten.json").write_text(json.dumps({**about, "base": str(tmp_path / "gone")}))
    assert "Cannot load the adapters" in refused("sample", str(tmp_path / "lora"), "--prompt", "x", "--out", "s.png")


@pytest.mark.parametrize("there_is_peft", [True, False])
def test_adapters_on_their_base_sample_as_the_whole_student(
    student: File, tmp_path: File, monkeypatch: pytest.MonkeyPatch, there_is_peft: bool
):
    if there_is_peft:
        pytest.importorskip("peft")
    monkeypatch.setattr("hasten.commands.find_spec", lambda name: object() if there_is_peft else None)
    for kind in ("lora", "model"):
        run("sample", str(student / kind), "--prompt", "a cup", "--out", str(tmp_path / f"{kind}.png"))
    lora, whole = (np.asarray(Image.open(tmp_path / f"{k}.png"), dtype=float) for k in ("lora", "model"))
    assert lora.std() > 1 and abs(lora - whole).max() <= 2


def test_sample_shows_any_pipeline_and_videos_move(there: File, tmp_path: File):
    run("sample", str(there / "dit"), "--labels", "1,2,3", "--steps", "1", "--out", str(tmp_path / "a.png"))
    assert Image.open(tmp_path / "a.png").size[0] > Image.open(tmp_path / "a.png").size[1] / 2
    video = (
        "sample",
        str(there / "wan"),
        "--prompt",
        "a cup",
        "--steps",
        "1",
        "--call",
        "height=16",
        "--call",
        "width=16",
    )
    video = (*video, "--call", "num_frames=9", "--call", "max_sequence_length=32", "--count", "2", "--out")
    run(*video, str(tmp_path / "v.gif"))
    moving: Any = Image.open(tmp_path / "v.gif")
    assert moving.n_frames == 9
    run(*video, str(tmp_path / "v.png"))
    still = Image.open(tmp_path / "v.png")
    moving.seek(4)
    near = torch.tensor(list(moving.convert("RGB").tobytes())) - torch.tensor(list(still.convert("RGB").tobytes()))
    assert moving.size == still.size and near.float().abs().mean() < 10  # the middle frame, but for GIF's palette


BAD: dict[str, tuple[str, str]] = {
    "no pipeline": ("distill --model N --method dmd2 --prompts P --out O", "holds no model_index.json"),
    "no such pipeline": (
        "distill --model nobody/nothing --method dmd2 --prompts P --out O",
        "Cannot load the pipeline",
    ),
    "no prompts inside": ("distill --model S --method dmd2 --prompts E --out O", "empty.txt is empty"),
    "no prompts": ("distill --model S --method dmd2 --out O", "needs prompts, or data with captions"),
    "missing prompts": ("distill --model S --method dmd2 --prompts gone.txt --out O", "no file 'gone.txt'"),
    "both": ("distill --model S --method dmd2 --prompts P --data N --out O", "Give either prompts or data"),
    "needs data": ("distill --model S --method cm --prompts P --out O", "needs data; give data"),
    "two models": ("distill --model S --teacher N --method dmd2 --prompts P --out O", "not both"),
    "prompts for none": (
        "distill --teacher N --method dmd2 --prompts P --out O",
        "prompts is for a diffusers pipeline",
    ),
    "no call": ("distill --model S --method dmd2 --prompts P --call height --out O", "--call takes key=value"),
    "a call's typo": ("distill --model S --method dmd2 --prompts P --call hight=8 --out O", "did you mean 'height'"),
    "a refused call": (
        "distill --model S --method dmd2 --prompts P --call max_sequence_length=999 --out O",
        "refuses this call",
    ),
    "no file for comfyui": (
        "distill --model W --method dmd2 --steps 2 --prompts P --call height=16 --call width=16 --call num_frames=5 "
        "--call max_sequence_length=32 --format comfyui --out O",
        "names of WanTransformer3DModel, only those of",
    ),
    "a file for a model": ("distill --model x.safetensors --method dmd2 --prompts P --out O", "names a single file"),
    "a column of no name": ("distill --model S --method dmd2 --prompts C --out O", "as in columns.csv:title"),
    "samples into a model": ("synthesize D --prompts L --out D", "holds a model or a run (model_index.json)"),
    "too large a call": (
        "distill --model S --method dmd2 --prompts P --call height=32 --call width=32 --out O",
        "StableDiffusion3Pipeline refuses this call: Height (32) cannot be greater than",
    ),
    "a word for a number": (
        "distill --model S --method dmd2 --prompts P --call height=abc --out O",
        "height of StableDiffusion3Pipeline's call is a number, not 'abc'",
    ),
    "rounded without adapters": (
        "distill --model S --method dmd2 --prompts P --quantize-base int8 --out O",
        "--quantize-base: quantize_base rounds the frozen weights under adapters; give fit.lora_rank",
    ),
    "an unknown rounding": (
        "distill --model S --method dmd2 --prompts P --lora-rank 2 --quantize-base int5 --out O",
        "--quantize-base: quantize_base is 'int5', but it should be 'int8' or 'int4'",
    ),
    "rounded without a pipeline": (
        "distill --teacher N --method dmd2 --lora-rank 2 --quantize-base int8 --out O",
        "quantize_base is for a diffusers pipeline",
    ),
    "a network to upload": (
        "distill --teacher N --method dmd2 --push-to-hub me/fast --out O",
        "for the student of a diffusers pipeline",
    ),
    "no repository": (
        "distill --model S --method dmd2 --prompts P --push-to-hub fast --out O",
        "takes a repository of the hub such as me/student, not 'fast'",
    ),
    "synthesize nothing": ("synthesize N --prompts P --out O", "holds no model_index.json"),
    "synthesize of nothing": ("synthesize S --prompts E --out O", "empty.txt is empty"),
    "no samples": ("synthesize S --prompts P --count 0 --out O", "--count must be at least 1, not 0"),
    "no steps": ("synthesize S --prompts P --steps 0 --out O", "--steps must be at least 1, not 0"),
    "no output": ("synthesize S --prompts P", "--out"),
    "words for labels": ("synthesize D --prompts P --out O", "class labels, whole numbers"),
    "nothing to show": ("sample S --out O/s.png", "one of --prompt, --prompts and --labels, not none"),
    "too much to show": ("sample S --prompt x --labels 1 --out O/s.png", "not --prompt and --labels"),
    "an array": ("sample S --prompt x --out O/s.npz", ".png or .gif"),
    "a native option": ("sample S --prompt x --cfg-scale 3 --out O/s.png", "--call guidance_scale=4"),
    "no pictures": ("sample S --prompt x --count 0 --out O/s.png", "--count must be at least 1"),
    "a prompt for no pipeline": ("sample N --prompt x --out O/s.png", "holds no model_index.json"),
    "an unknown argument": ("sample S --prompt x --call hight=8 --out O/s.png", "did you mean 'height'"),
    "labels for prompts": ("sample S --labels 1 --out O/s.png", "Unknown argument"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case: str, there: File, tmp_path: File):
    text, message = BAD[case]
    names = {"S": "sd3", "D": "dit", "W": "wan", "N": "nothing", "P": "prompts.txt", "E": "empty.txt"}
    names |= {"C": "columns.csv", "L": "labels.txt"}
    places = {k: str(there / v) for k, v in names.items()} | {"O": str(tmp_path / "out")}
    args = [places.get(a, a.replace("O/", f"{tmp_path}/out/")) for a in text.split()]
    assert message in refused(*args)
    assert not (tmp_path / "out").exists()
