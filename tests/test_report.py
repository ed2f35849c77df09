"""The report: a stage without quality is an error, the page is self-contained, the JSON round-trips."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from PIL import Image
from rich.console import Console

from hasten.core.errors import ConfigError
from hasten.measure.pictures import pixels
from hasten.measure.report import Report, Stage, show


def stage(name: str, fd: float, p50: float, **more) -> Stage:
    quality = {"fd": fd, "fd_low": 0.9 * fd, "fd_high": 1.1 * fd, "recall": 0.9, "precision": 0.8, "kd": -0.001}
    return Stage(name, f"What {name} is.", 4, 4, quality, p50, 1.1 * p50, batch=64, **more)


@pytest.fixture
def report() -> Report:
    images = torch.rand(6, 1, 8, 8) * 2 - 1
    stages = [
        stage("teacher 50", 0.5, 2.0, samples=images, trajectory={"psnr": math.inf, "ssim": 1.0}, group="teacher"),
        stage("student <4>", 0.7, 0.1, samples=images, verdict="Good & fast.", peak_memory=5 << 20, seconds=90.0),
    ]
    floor = {"held-out real images": {"fd": 0.4, "fd_low": 0.2, "fd_high": 0.6}, "another seed": {"psnr": 8.0}}
    return Report("A run", stages, floor, {"seed": 3, "command": "hasten demo"}, {"cpu": "a processor"}, real=images)


def test_a_stage_without_a_quality_number_is_an_error():
    for quality in ({}, {"recall": 0.9}, {"fd": math.nan}):
        with pytest.raises(ConfigError, match="no quality number"):
            Stage("fast", "Fast.", 1, 1, quality, 0.1, 0.2)
    with pytest.raises(ConfigError, match="p50"):
        Stage("fast", "Fast.", 1, 1, {"fd": 1.0}, 0.0, 0.2)


def test_speedups_are_computed_from_what_was_measured(report: Report):
    assert report.speedups(report.stages[1]) == {"teacher 50": pytest.approx(20)}
    twice = Stage("batch of 128", "The same speed in larger batches.", 4, 4, {"fd": 1.0}, 4.0, 4.0, batch=128)
    assert report.speedups(twice) == {"teacher 50": pytest.approx(1)}


def test_the_report_is_written_and_nothing_else(report: Report, tmp_path):
    out = tmp_path / "new" / "folder"
    report.save(out)
    report.save(out)  # over the old one
    assert sorted(f.name for f in out.iterdir()) == ["pareto.png", "report.html", "report.json", "samples.png"]
    for name in ("pareto.png", "samples.png"):
        with Image.open(out / name) as picture:
            assert picture.format == "PNG" and min(picture.size) > 100


def test_the_page_is_self_contained_and_escaped(report: Report, tmp_path):
    report.save(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import", re.sub(r"base64,[A-Za-z0-9+/=]+", "", page))
    assert page.count("data:image/png;base64,") == 2
    assert "student &lt;4&gt;" in page and "student <4>" not in page and "Good &amp; fast." in page
    for text in ("hasten demo", "a processor", "held-out real images", "another seed", "20.0", "0.700", "∞", "1.5 min"):
        assert text in page or text.replace("1.5 min", "90 s") in page, text


def test_json_round_trips(report: Report, tmp_path):
    report.save(tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())
    assert found == report.as_dict()
    assert found["stages"][1]["quality"]["fd"] == 0.7 and found["stages"][1]["speedup"]["teacher 50"] == 20
    assert found["stages"][0]["trajectory"]["psnr"] == "inf" and "samples" not in found["stages"][0]
    assert found["settings"]["seed"] == 3 and found["floor"]["another seed"]["psnr"] == 8


def test_samples_show_the_right_pixels(report: Report, tmp_path):
    assert pixels(torch.tensor([-1.0, 0.0, 1.0, 9.0]).view(1, 1, 2, 2))[0, ..., 0].tolist() == [[0, 128], [255, 255]]
    colour = torch.zeros(1, 3, 1, 1)
    colour[0, 0] = 1
    assert pixels(colour)[0, 0, 0].tolist() == [255, 128, 128]
    black, white = -torch.ones(6, 1, 8, 8), torch.ones(6, 1, 8, 8)
    report.real, report.stages[0].samples, report.stages[1].samples = black, black, white
    report.save(tmp_path)
    with Image.open(tmp_path / "samples.png") as picture:
        x = picture.size[0] - 60  # inside the last column
        rows = [picture.convert("L").getpixel((x, int(picture.size[1] * f))) for f in (0.17, 0.5, 0.83)]
    assert rows == [0, 0, 255]


def test_a_report_refuses_doubles_and_strange_baselines(report: Report):
    with pytest.raises(ConfigError, match="different names"):
        Report("t", [report.stages[0], report.stages[0]], {}, {}, {})
    with pytest.raises(ConfigError, match="'nobody' is not among"):
        Report("t", report.stages, {}, {}, {}, baselines=("nobody",))


def test_an_unwritable_folder_is_one_sentence(report: Report, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="could not be written"):
        report.save(tmp_path / "file")


def test_the_terminal_table(report: Report):
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table())
    text = console.export_text()
    for part in ("teacher 50", "student <4>", "0.700", "100.0", "20.0", "floor: held-out real images"):
        assert part in text
    assert "another seed" not in text  # it has no distance


def test_numbers_as_text():
    assert [show(v, "three digits") for v in (0.5, 12.345, 123.4, 5000.0)] == ["0.500", "12.3", "123", "5,000"]
    assert show(None, "{}") == "" and show(math.inf, "{:.1f}") == "∞" and show(-0.5, "{:.1f}") == "−0.5"
