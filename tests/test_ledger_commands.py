"""What ledger, speed and tune are given that cannot be, and what an interrupt or a full device leaves of a ledger."""

from __future__ import annotations

import json
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
