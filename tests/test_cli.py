"""The command line: what it makes, and for every bad input one sentence, exit code 2 and no traceback."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path as File
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from hasten import accelerate, cli, console, progress
from hasten.core.errors import ConfigError
from hasten.core.method import even
from hasten.distribute import load_model, read_extra, read_samplings
from hasten.fit import Step, fit
from hasten.methods import boss
from hasten.methods.boss import BOSS
from hasten.methods.flow import Flow
from hasten.pairs import make_pairs
from hasten.recipe import load as load_recipe
from hasten.run import distill, find_model, settled, train
from tests.commandline import plain_consoles, refused, run  # noqa: F401

TINY = ("--set", "model.width=16", "--set", "model.depth=1", "--set", "model.heads=2", "--batch", "8")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> File:
    """The output folder of a tiny training run."""
    out = tmp_path_factory.mktemp("runs") / "teacher"
    run("train", "--data", "digits", "--iterations", "6", "--steps", "4,8", "--out", str(out), *TINY)
    return out


def test_train_leaves_model_recipe_previews_and_logs(teacher: File):
    net = load_model(teacher / "model")
    assert (net.config.width, net.config.classes, net.config.size) == (16, 10, (8, 8))
    assert sorted(read_samplings(teacher / "model")) == [4, 8]
    assert load_recipe(teacher / "model" / "recipe.yaml").fit.iterations == 6
    assert read_extra(teacher / "model")["recipe"]["method"]["name"] == "flow"
    shown = sorted((teacher / "previews").iterdir())
    assert len(shown) == 6
    with Image.open(shown[-1]) as picture:
        assert picture.width > 8 * 48
    assert list((teacher / "tensorboard").iterdir())


def test_distill_runs_resumes_and_repeats(teacher: File, tmp_path: File):
    args = ("distill", "--method", "dmd2", "--teacher", str(teacher), "--data", "digits", "--steps", "1,2", *TINY[-2:])
    args = (*args, "--iterations", "7", "--set", "method.gan_weight=0", "--no-tensorboard")
    result = run(*args, "--out", str(tmp_path / "a"))
    assert "Estimate: about" in result.stderr and result.stdout.strip() == str(tmp_path / "a" / "model")
    assert read_samplings(tmp_path / "a" / "model")[2].rule == "renoise"
    assert "already complete" in run(*args, "--out", str(tmp_path / "a")).stdout
    shutil.rmtree(tmp_path / "a" / "model")
    run(*args, "--out", str(tmp_path / "a"))  # killed between its last checkpoint and its model
    assert read_samplings(tmp_path / "a" / "model")[2].rule == "renoise"

    stopped = run(*args, "--out", str(tmp_path / "b"), "--minutes", "1e-9")
    assert "Stopped at 1 of 7 iterations; the same command goes on" in stopped.stderr
    shutil.copytree(tmp_path / "b" / "model", tmp_path / "early")
    run(*args, "--out", str(tmp_path / "b"))
    shutil.rmtree(tmp_path / "b" / "model")
    (tmp_path / "early").rename(tmp_path / "b" / "model")  # as if its last model could not be written
    assert "already complete" not in run(*args, "--out", str(tmp_path / "b")).stdout
    assert read_extra(tmp_path / "b" / "model")["iterations"] == 7
    run(*args, "--out", str(tmp_path / "c"))
    b, c = (load_model(tmp_path / name / "model").state_dict() for name in "bc")
    assert all(b[k].equal(c[k]) for k in c)


def test_distill_goes_on_from_an_earlier_student(teacher: File, tmp_path: File):
    args = ("distill", "--teacher", str(teacher), "--data", "digits", "--batch", "8", "--no-tensorboard")
    run(*args, "--method", "pcm", "--steps", "2", "--iterations", "2", "--lr", "0.1", "--out", str(tmp_path / "a"))
    still = ("--iterations", "1", "--lr", "1e-30", "--set", "fit.ema=[0]", "--set", "method.gan_weight=0")
    for name, more in (("b", ("--start", str(tmp_path / "a"))), ("c", ())):
        run(*args, "--method", "dmd2", "--steps", "2", *still, *more, "--out", str(tmp_path / name))
    a, b, c, t = (load_model(f / "model").state_dict() for f in (*(tmp_path / n for n in "abc"), teacher))
    assert all(torch.equal(a[k], b[k]) and torch.equal(c[k], t[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)
    assert load_recipe(tmp_path / "b" / "model" / "recipe.yaml").start == str(tmp_path / "a")


def test_kd_makes_its_pairs_once_and_needs_no_data(teacher: File, tmp_path: File, monkeypatch: pytest.MonkeyPatch):
    args = ("distill", "--method", "kd", "--teacher", str(teacher), "--steps", "2", "--set", "pairs=12", *TINY[-2:])
    args = (*args, "--set", "method.substeps=2", "--out", str(tmp_path), "--no-tensorboard")
    run(*args, "--iterations", "2")
    shutil.rmtree(tmp_path / "checkpoints")
    monkeypatch.setattr("hasten.run.make_pairs", None)  # they are read back
    run(*args, "--iterations", "2")
    assert "of other settings; delete it" in refused(*args, "--iterations", "2", "--seed", "1")


def test_boss_finds_its_times_trains_between_them_and_saves_them(
    teacher: File, tmp_path: File, monkeypatch: pytest.MonkeyPatch
):
    args = ("distill", "--method", "boss", "--teacher", str(teacher), "--steps", "2", "--iterations", "2")
    args = (*args, "--set", "method.fine=12", "--set", "method.count=4", "--set", "method.substeps=2", *TINY[-2:])
    run(*args, "--out", str(tmp_path / "a"), "--no-tensorboard", "--set", "pairs=6")
    found = read_samplings(tmp_path / "a" / "model")[2].times
    want = settled(BOSS(2, fine=12, count=4), load_model(find_model(teacher))).at
    assert found == want == load_recipe(tmp_path / "a" / "model" / "recipe.yaml").method.at
    kept = load_file(tmp_path / "a" / "pairs" / "pairs.safetensors")["trajectories"]
    assert json.loads((tmp_path / "a" / "pairs" / "pairs.json").read_text())["at"] == list(want) and kept.shape[1] == 3
    *_, again = make_pairs(load_model(find_model(teacher)), 6, 2, 2, at=want)
    assert torch.equal(kept, again.trajectories) and want != even(2)
    monkeypatch.setattr(boss, "best_times", None)  # they are read back
    assert "already complete" in run(*args, "--out", str(tmp_path / "a"), "--no-tensorboard", "--set", "pairs=6").stdout
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    same = ("--iterations", "2", "--set", "method.substeps=2", "--set", "pairs=6", "--no-tensorboard", *TINY[-2:])
    kd = ("distill", "--method", "kd", "--teacher", str(teacher), "--steps", "2", *same, "--out", str(tmp_path / "a"))
    assert "of other settings; delete it" in refused(*kd)  # at even times
    monkeypatch.setattr(BOSS, "settled", lambda self, *rest: self)  # times that are given are not looked for
    run(*args, "--out", str(tmp_path / "b"), "--no-tensorboard", "--set", "method.at=[1.0, 0.25, 0.0]")
    assert read_samplings(tmp_path / "b" / "model")[2].times == (1.0, 0.25, 0.0)


def test_in_python_boss_is_settled_first(teacher: File):
    from hasten import FitConfig

    net = load_model(find_model(teacher))
    with pytest.raises(ConfigError, match=r"method = hasten.settled\(BOSS\(steps=2\), teacher\).*method.sampling\(2\)"):
        distill(net, BOSS(), steps=2)
    method = settled(BOSS(2, substeps=1, fine=8, count=2), net)
    student = distill(net, method, steps=2, fit=FitConfig(2, 4, precision="float32"))
    assert len(method.sampling(2).times) == 3 and not student.training
    with pytest.raises(ConfigError, match="4 steps need 5 times falling from 1 to 0; without at they are found"):
        distill(net, method, steps=4)


def test_a_recipe_is_overridden_by_options(tmp_path: File):
    text = "task: train\ndata: digits\nmodel: {width: 16, depth: 1, heads: 2}\nfit: {iterations: 900, batch: 8}\n"
    (tmp_path / "r.yaml").write_text(text)
    args = ("--recipe", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "o"), "--no-tensorboard")
    run("train", *args, "--iterations", "2", "--steps", "2", "--lr", "0.01")
    fitted = load_recipe(tmp_path / "o" / "model" / "recipe.yaml").fit
    assert (fitted.iterations, fitted.batch, fitted.lr) == (2, 8, 0.01)
    assert "r.yaml is a recipe for `hasten train`, not distill" in refused("distill", *args)


def test_sample_writes_a_picture_or_arrays(teacher: File, tmp_path: File):
    run("sample", str(teacher), "--steps", "4", "--count", "10", "--out", str(tmp_path / "s.png"))
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.size[0] % 6 == 0
    for name in ("a", "b"):
        out = str(tmp_path / f"{name}.npz")
        run("sample", str(teacher), "--steps", "8", "--count", "5", "--labels", "3,1", "--cfg-scale", "2", "--out", out)
    a, b = (np.load(tmp_path / f"{n}.npz") for n in "ab")
    assert a["images"].shape == (5, 1, 8, 8) and (a["images"] == b["images"]).all()
    assert a["labels"].tolist() == [3, 1, 3, 1, 3]
    odd = run("sample", str(teacher), "--steps", "3", "--out", str(tmp_path / "s.png"))
    assert "made for 4, 8 steps" in odd.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz", "s.png"]


def test_measure_prints_quality_beside_the_floor(teacher: File, monkeypatch: pytest.MonkeyPatch):
    from hasten.measure import features

    monkeypatch.setattr(features, "classifier", functools.partial(features.classifier, iterations=10))
    args = ("measure", str(teacher), "--data", "digits", "--steps", "4", "--count", "40")
    found = json.loads(run(*args, "--json").stdout)
    assert found["nfe"] == 4 and found["quality"]["fd"] > found["floor"]["fd"] > 0
    table = run(*args).stdout
    assert "recall" in table and "floor (real images)" in table


def test_methods_are_listed():
    table = run("methods").stdout
    assert all(name in table for name in ("flow", "dmd2", "kd", "Lu & Song 2025"))
    one = run("methods", "sid").stdout
    assert "Zhou" in one and "student_every" in one
    assert "did you mean 'sid'" in refused("methods", "sidd")


def test_version_and_help_import_nothing_heavy():
    code = (
        "import sys\nfrom hasten.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'sklearn', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "distill" in done.stdout and "measure" in done.stdout


def bad_npz(folder: File, **arrays: np.ndarray) -> str:
    """A data file."""
    np.savez(folder / "bad.npz", **arrays)  # type: ignore[arg-type]
    return str(folder / "bad.npz")


IMAGES = np.zeros((20, 8, 8), np.uint8)
BAD: dict[str, tuple[str, str]] = {
    "a method's typo": ("distill --method dmd22 --teacher T --out O", "did you mean 'dmd2'"),
    "no method": ("distill --teacher T --out O", "method is missing"),
    "no teacher": ("distill --method sid --out O", "sid needs a teacher"),
    "a key's typo": ("distill --method dmd2 --teacher T --set method.gan_wieght=1", "did you mean 'gan_weight'"),
    "no steps": ("distill --method dmd2 --teacher T --steps 0 --out O", "--steps takes numbers at least 1, not 0"),
    "words for steps": ("distill --method dmd2 --teacher T --steps four --out O", "whole numbers"),
    "no device": ("distill --method dmd2 --teacher T --device mps:7 --out O", "'mps:7' is not on this machine"),
    "no such device": ("sample T --device gpu", "Unknown device 'gpu'"),
    "no model": ("distill --method dmd2 --teacher D --out O", "holds no model"),
    "nowhere": ("sample nowhere", "'nowhere' is no folder"),
    "a start that is no model": ("distill --method sid --teacher T --start D --out O", "holds no model"),
    "a start beside no teacher": ("distill --method ect --data digits --start T --out O", "give that teacher, too"),
    "a start of train": ("train --data digits --set start=T --out O", "give it as teacher"),
    "a start of a pipeline": (
        "distill --method sid --model P --prompts p.txt --start T --out O",
        "leave it out for a pip",
    ),
    "a start of adapters": (
        "distill --method sid --teacher T --start T --lora-rank 2 --out O",
        "teacher's own weights",
    ),
    "no data": ("distill --method scm --teacher T --out O", "needs data"),
    "missing data": ("train --data gone.npz --out O", "no such file"),
    "an option's typo": ("distill --methd dmd2", "--method"),
    "a missing argument": ("sample", "Missing argument 'model'"),
    "no command": ("distil", "distill"),
    "an option's type": ("train --data digits --lr fast --out O", "lr"),
    "negative": ("train --data digits --iterations=-3 --out O", "iterations must be positive"),
    "no minutes": ("train --data digits --minutes 0 --out O", "--minutes must be positive"),
    "a missing recipe": ("train --recipe gone.yaml", "gone.yaml"),
    "foreign labels": ("sample T --labels 0,10 --out O/s.png", "from 0 to 9, not 10"),
    "no samples": ("sample T --count 0 --out O/s.png", "--count must be at least 1"),
    "a foreign suffix": ("sample T --out O/s.tiff", ".png or .npz"),
    "too few to judge": ("measure T --data digits --count 3", "at least 8"),
    "demo without time": ("demo --minutes -1", "--minutes must be positive"),
    "demo without device": ("demo --device cuda:99", "'cuda:99' is not on this machine"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case: str, teacher: File, tmp_path: File):
    text, message = BAD[case]
    names = {"T": str(teacher), "O": str(tmp_path / "out"), "D": str(tmp_path)}
    args = [names.get(a, a.replace("O/", f"{tmp_path}/out/")) for a in text.split()]
    assert message in refused(*args)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.full((9, 8, 8), np.nan)}, "NaN"),
        ({"x": np.zeros((9, 8, 9), np.uint8), "y": np.arange(9)}, "samples of shape (1, 8, 8)"),
        ({"x": IMAGES, "y": np.arange(20)}, "out of range; labels are 0 to 9"),
        ({"x": IMAGES}, "has no labels"),
    ],
)
def test_data_that_do_not_fit_are_one_sentence(arrays: dict, message: str, teacher: File, tmp_path: File):
    args = ("distill", "--method", "dmd2", "--teacher", str(teacher), "--data", bad_npz(tmp_path, **arrays))
    assert message in refused(*args, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_truncated_and_a_foreign_checkpoint_are_one_sentence(teacher: File, tmp_path: File):
    shutil.copytree(teacher / "model", tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert str(tmp_path / "m") in refused("sample", str(tmp_path / "m"), "--out", str(tmp_path / "s.png"))
    other = refused("train", "--data", "digits", "--iterations", "9", "--out", str(teacher), *TINY)
    assert "belongs to another run" in other


def test_an_unwritable_and_a_full_folder_are_one_sentence(teacher: File, tmp_path: File, monkeypatch: Any):
    (tmp_path / "file").write_text("")
    for args in (("train", "--data", "digits"), ("demo", "--quick")):
        assert "Cannot write to" in refused(*args, "--out", str(tmp_path / "file" / "out"))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "state.safetensors")

    monkeypatch.setattr("hasten.distribute.save_file", full)
    args = ("train", "--data", "digits", "--iterations", "2", "--out", str(tmp_path / "o"), "--steps", "2", *TINY)
    assert "the disk is full" in refused(*args)
    assert not list((tmp_path / "o").rglob("*.safetensors"))

    monkeypatch.setattr(Image.Image, "save", full)
    assert "the disk is full" in refused("sample", str(teacher), "--out", str(tmp_path / "s.png"))
    assert not (tmp_path / "s.png").exists()


def test_the_demo_is_called_with_its_options(tmp_path: File, monkeypatch: pytest.MonkeyPatch):
    given: dict[str, Any] = {}
    fake = SimpleNamespace(run=lambda **options: given.update(options))
    monkeypatch.setitem(sys.modules, "hasten.demo", fake)  # type: ignore[arg-type]
    monkeypatch.setattr("hasten.demo", fake, raising=False)
    run(
        "demo",
        "--quick",
        "--data",
        "digits",
        "--out",
        str(tmp_path),
        "--seed",
        "3",
        "--device",
        "cpu",
        "--minutes",
        "2",
    )
    want = {"quick": True, "data": "digits", "out": str(tmp_path), "seed": 3, "device": "cpu", "minutes": 2.0}
    assert given == {**want, "teacher": None}
    run("demo", "--teacher", "fashion-mnist", "--out", str(tmp_path))
    assert given["teacher"] == "fashion-mnist"
    assert "leave out --data" in refused("demo", "--teacher", "fashion-mnist", "--data", "digits")


def test_an_interrupt_saves_and_exits_with_130(tmp_path: File, monkeypatch: pytest.MonkeyPatch):
    args = ("train", "--data", "digits", "--iterations", "6", "--steps", "2", "--out", str(tmp_path), *TINY)
    draw = progress.draw
    count = iter(range(10))

    def interrupted(*a: Any, **k: Any) -> Any:  # Ctrl-C while the third preview is drawn
        if next(count) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(*a, **k)

    monkeypatch.setattr(progress, "draw", interrupted)
    assert "go on from their last checkpoint with the same command" in refused(*args, code=130)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["00000003"]
    run(*args)
    assert read_extra(tmp_path / "model")["iterations"] == 6


def test_debug_shows_the_traceback_and_a_defect_is_named(monkeypatch: pytest.MonkeyPatch):
    result = CliRunner().invoke(cli.app, ["sample", "nowhere", "--debug"])
    assert type(result.exception).__name__ == "CheckpointError"

    def broken(*_: Any) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(accelerate, "sampled", broken)
    assert "defect of hasten (KeyError: 'oops')" in refused("sample", "x", code=1)
    assert console.tell(torch.OutOfMemoryError("CUDA out of memory")) == 2


def steps(count: int) -> Iterator[Step]:
    """A loop without training."""
    for i in range(1, count + 1):
        yield Step(i, count, 0, {"loss": float(i), "grad/student": 1.0}, {}, lambda: None)


def test_watch_returns_the_last_step_and_keeps_the_log():
    history: list[Any] = []
    quiet = Console(quiet=True)
    last = progress.watch(steps(5), history=history, console=quiet)
    assert last is not None and last.index == 5 and [h["loss"] for h in history] == [1, 2, 3, 4, 5]
    assert progress.watch(steps(0), console=quiet) is None
    stopped = progress.watch(steps(5), minutes=0.0, console=quiet)
    assert stopped is not None and stopped.index == 1


def test_missing_loggers_are_refused(tmp_path: File, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="TensorBoard is not installed"):
        progress.watch(steps(2), out=tmp_path, tensorboard=True)
    assert progress.watch(steps(2), out=tmp_path, console=Console(quiet=True)) is not None
    with pytest.raises(ConfigError, match="W&B is not installed"):
        progress.watch(steps(2), wandb=True)


def test_the_estimate_leaves_the_run_alone(teacher: File):
    from hasten.data import digits
    from hasten.role import FitConfig

    net, config = load_model(teacher / "model"), FitConfig(iterations=50, batch=4)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    guess = progress.estimate(Flow(), digits(), net, config, out=teacher)
    assert guess.iterations == 44 and guess.step_seconds > 0  # six are behind the checkpoint in that folder
    floats = sum(p.numel() for p in net.parameters())
    assert 6 * 4 * floats <= guess.state <= 6.5 * 4 * floats  # weights, gradients, two moments, average, teacher
    assert all(v.equal(before[k]) for k, v in net.state_dict().items())
    assert "iterations of" in str(guess)
    assert (progress.duration(600), progress.duration(7200), progress.size(2**31)) == ("10 min", "2.0 h", "2.0 GiB")


def test_python_says_train_and_distill_too(teacher: File):
    from hasten import KD, DiTConfig, FitConfig, digits

    config = FitConfig(iterations=2, batch=4)
    net = train(digits(), model=DiTConfig(width=16, depth=1, heads=2, classes=10), fit=config)
    student = distill(net, KD(substeps=2), steps=2, fit=config)
    again = distill(net, KD(substeps=2), steps=2, fit=config)
    assert all(a.equal(b) for a, b in zip(student.parameters(), again.parameters(), strict=True))
    with pytest.raises(ConfigError, match="needs data"):
        next(fit(Flow(), SimpleNamespace(has_data=False, shape=(1, 8, 8)), net, config))
