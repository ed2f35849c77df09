"""The commands ledger, speed and tune: what they do and refuse, and what an interrupt or a full device leaves."""

from __future__ import annotations

import json
import shlex
from pathlib import Path as File
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from hasten.core.errors import ConfigError
from hasten.core.method import Sampling, even
from hasten.distribute import save_model
from hasten.ledger import build, with_layers
from hasten.speed import Cast, Guidance
from hasten.speed.plan import Plan
from hasten.workload import Workload, picture
from tests.commandline import plain_consoles, refused, run  # noqa: F401
from tests.pipelines import FAMILIES
from tests.test_speed import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> File:
    """A saved network and a stack file."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("ledger")
    save_model(tiny(), place / "model", {16: Sampling(even(16))})
    (place / "stack.yaml").write_text(yaml.safe_dump([{"name": "cast"}, {"name": "cache", "threshold": 0.3}]))
    return place


@pytest.fixture(scope="module")
def classy(tmp_path_factory: pytest.TempPathFactory) -> File:
    """A saved pipeline that takes class labels, and files of them."""
    place = tmp_path_factory.mktemp("classy")
    FAMILIES["dit"]()[0].save_pretrained(place / "pipe")
    (place / "labels.txt").write_text("1\n2\n")
    (place / "words.txt").write_text("a cup\n")
    (place / "stack.yaml").write_text(yaml.safe_dump([{"name": "cast"}]))
    return place


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--call", "num_inference_steps=7", "--steps", "3"), "num_inference_steps=7, beside 3 steps; leave it out"),
        (("--call", "num_inference_steps=0", "--steps", "3"), "num_inference_steps=0, beside 3 steps"),
        (("--call", "output_type=latent", "--steps", "3"), "output_type is set by hasten, for pictures as numbers"),
        (("--call", "generator=1", "--steps", "3"), "generator is set by hasten"),
        (("--prompts", "words.txt", "--steps", "3"), "takes class labels, whole numbers, not"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_a_pipelines_bad_options_get_one_sentence(args, words, classy, tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(classy)
    assert words in refused("ledger", "pipe", "--stack", "stack.yaml", *args, "--out", str(tmp_path / "led"))


def test_class_labels_are_read_from_a_file(classy, tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(classy)
    out = ("--count", "2", "--repeats", "1", "--out", str(tmp_path / "s.png"))
    run("speed", "pipe", "--stack", "stack.yaml", "--prompts", "labels.txt", "--steps", "3", *out)
    assert (tmp_path / "s.png").is_file()


def test_an_output_that_is_a_folder_is_refused_before_anything_is_measured(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Workload, "samples", lambda *_: pytest.fail("samples were made"))
    stack = ("--stack", str(folder / "stack.yaml"), "--steps", "16")
    for name, command in {"s.png": ("speed",), "plan.yaml": ("tune", "--max-loss", "psnr=20")}.items():
        (tmp_path / name).mkdir()
        said = refused(*command, str(folder / "model"), *stack, "--out", str(tmp_path / name))
        assert f"{name}' is a folder; name a file in it" in said


def test_speed_needs_no_way_back(folder, tmp_path):
    (tmp_path / "dropped.yaml").write_text(yaml.safe_dump([{"name": "cast", "keep": False}]))
    out = ("--steps", "16", "--count", "2", "--repeats", "1", "--out", str(tmp_path / "s.png"))
    run("speed", str(folder / "model"), "--stack", str(tmp_path / "dropped.yaml"), *out)
    assert (tmp_path / "s.png").is_file()
    (tmp_path / "idle.yaml").write_text(
        yaml.safe_dump([{"name": "cast", "keep": False}, {"name": "cache", "threshold": 1e-12}])
    )
    args = ("speed", str(folder / "model"), "--stack", str(tmp_path / "idle.yaml"), *out)
    assert "calls were reused at threshold 1e-12" in refused(*args)


def test_the_folder_that_one_stands_in_is_a_model(folder, tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder / "model")
    scale = ("--stack", str(folder / "stack.yaml"), "--cfg-scale", "nan", "--out", str(tmp_path / "led"))
    assert "--cfg-scale must be a finite number, not nan" in refused("ledger", ".", *scale)


def test_whole_rounds_outlive_an_interrupt(folder, tmp_path, monkeypatch: pytest.MonkeyPatch):
    count, request = [0], Workload.request

    def interrupted(self: Workload) -> None:
        count[0] += 1
        if count[0] > stop:
            raise KeyboardInterrupt
        request(self)

    monkeypatch.setattr(Workload, "request", interrupted)
    monkeypatch.setattr("hasten.ledger.peak_memory", lambda *_: SimpleNamespace(bytes=0))
    (tmp_path / "stack.yaml").write_text(yaml.safe_dump([{"name": "cast"}]))
    args = ("ledger", str(folder / "model"), "--stack", str(tmp_path / "stack.yaml"), "--steps", "4", "--count", "1")
    out = ("--repeats", "1", "--rounds", "5", "--out", str(tmp_path / "led"))
    stop = 9  # a round has two requests for the model and two under cast
    assert "holds what was whole by then, 2 of 5 rounds" in run(*args, *out).stderr
    text = json.loads((tmp_path / "led" / "ledger.json").read_text())
    assert text["about"]["command"] == shlex.join(["hasten", *args, *out]) and text["about"]["seed"] == 0
    assert "--rounds 5" in (tmp_path / "led" / "ledger.html").read_text()
    assert text["about"]["rounds"] == 2 and text["lines"][1]["gain"] > 0
    stop, count[0] = 3, 0
    refused(*args, *out, code=130)


def test_a_combination_without_room_leaves_the_rest(monkeypatch: pytest.MonkeyPatch):
    def full(layers: Any, *rest: Any, **more: Any) -> Any:
        if [t.name for t in layers] == ["cast"]:
            raise torch.OutOfMemoryError
        return with_layers(layers, *rest, **more)

    monkeypatch.setattr("hasten.ledger.with_layers", full)
    work = Workload(tiny(), 8, sampling=Sampling(even(8), cfg_scale=2.0), batch=4)
    got = build(work, [Cast(), Guidance(reuse=2)], count=2, repeats=1, rounds=1)
    assert [x.refused for x in got.lines] == ["", "The device has not the memory for it.", "", ""]


def test_a_picture_is_numbers():
    pipe, call = FAMILIES["dit"]()
    with pytest.raises(ConfigError, match="output_type is set by hasten"):
        picture(pipe, {**call, "output_type": "pil"}, 2, 0, 0)


def test_the_commands_run_one_after_the_other(folder, tmp_path):
    model, stack = str(folder / "model"), str(folder / "stack.yaml")
    said = run(
        "ledger", model, "--stack", stack, "--steps", "16", "--count", "4", "--repeats", "1", "--rounds", "1",
        "--out", str(tmp_path / "led"), "--batch", "2",
    ).stdout  # fmt: skip
    assert "cast + cache" in said and (tmp_path / "led" / "ledger.html").is_file()
    plan, whole = tmp_path / "plan.yaml", tmp_path / "whole.yaml"
    tuning = ("tune", model, "--max-loss", "psnr=20", "--steps", "16", "--calls", "4", "--out", str(plan))
    assert "leave cache out" in refused(*tuning, "--stack", stack)
    whole.write_text(yaml.safe_dump([{"name": "cast"}]))
    said = run(*tuning, "--stack", str(whole), "--batch", "4").stdout
    assert "times as fast" in said and "on held-out requests" in said
    assert Plan.load(plan).measured["budget"] == {"psnr": 20.0}
    said = run("speed", model, "--plan", str(plan), "--count", "2", "--out", str(tmp_path / "s.png")).stdout
    assert "times as fast" in said and (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
    run("speed", model, "--stack", stack, "--steps", "16", "--count", "2", "--out", str(tmp_path / "t.png"))
    said = refused("speed", model, "--plan", str(plan), "--steps", "12", "--out", str(tmp_path / "u.png"))
    assert "12" in said and not (tmp_path / "u.png").exists()


def test_speed_refuses_what_cannot_be_before_it_samples(folder, tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Workload, "samples", lambda *_: pytest.fail("samples were made"))
    model, out = str(folder / "model"), ("--out", str(tmp_path / "s.png"))
    plan = tmp_path / "plan.yaml"
    Plan((Cast(),), {"steps": 16, "guidance": {"cfg_scale": 1.0}}).save(plan)
    assert "for 16 steps, not 12" in refused("speed", model, "--plan", str(plan), "--steps", "12", *out)
    assert "for cfg_scale 1.0, not 2.0" in refused("speed", model, "--plan", str(plan), "--cfg-scale", "2", *out)
    assert "of 4 could be skipped" in refused(
        "speed", model, "--stack", str(folder / "stack.yaml"), "--steps", "4", *out
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("ledger", "MODEL", "--stack", "nowhere.yaml"), "There is no file nowhere.yaml"),
        (("ledger", "MODEL", "--stack", "STACK", "--count", "0"), "--count must be at least 1"),
        (("speed", "MODEL"), "Give one of --plan and --stack"),
        (("speed", "MODEL", "--stack", "STACK", "--out", "x.jpg"), "--out of speed is a .png file"),
        (("speed", "MODEL", "--stack", "STACK", "--prompts", "p.txt", "--cfg-scale", "2"), "--cfg-scale is for"),
        (("tune", "MODEL", "--max-loss", "psnr"), "--max-loss takes key=value"),
        (("tune", "MODEL", "--max-loss", "psrn=3"), "did you mean 'psnr'"),
        (("tune", "MODEL", "--max-loss", "fd=5%"), "needs real images"),
        (("tune", "MODEL", "--max-loss", "psnr=30", "--out", "plan.json"), "a .yaml file"),
        (("tune", "MODEL", "--max-loss", "psnr=30", "--data", "digits", "--judge", "j"), "one of --data and --judge"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_bad_options_get_one_sentence(args: tuple[str, ...], words: str, folder: File):
    places = {"MODEL": str(folder / "model"), "STACK": str(folder / "stack.yaml")}
    assert words in refused(*(places.get(a, a) for a in args))
