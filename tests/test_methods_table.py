"""The comparison of the methods: the page is what its JSON says, and the benchmark treats all methods alike."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import gather
from hasten.names import METHODS
from hasten.role import FitConfig

ROOT = Path(__file__).parent.parent
COLOURS = {"teacher": (9, 9, 9), "sid": (200, 0, 0), "kd": (0, 0, 200), "cd": (0, 200, 0)}


def quality(fd: float) -> dict[str, float]:
    return {
        "fd": fd,
        "fd_low": fd / 2,
        "fd_high": 2 * fd,
        "kd": 0.001,
        "precision": 0.8,
        "recall": 0.9,
        "coverage": 0.7,
    }


def made(folder: Path, name: str, fds: dict[str, float], seed: int = 0, **more: Any) -> None:
    """What benchmarks/methods.py leaves for one method: its numbers, and a row of samples a step count."""
    run = {"iterations": 100, "batch": 256, "lr": 1e-3, "seconds": 9.0, "forwards an iteration": 5.0, "nfe": 1}
    steps = {n: quality(fd) | run for n, fd in fds.items()}
    about = {"method": name, "seed": seed, "forwards": 1000, "pilots": {"0.0005": 1.0, "0.001": 0.9}, "steps": steps}
    (folder / f"{name}-{seed}.json").write_text(json.dumps(about | more))
    if steps:
        sheet = Image.new("RGB", (4 * gather.SHOWN, 4 * len(steps)))
        for i, n in enumerate(steps):  # a colour that tells the row's step count
            sheet.paste((*COLOURS[name][:2], COLOURS[name][2] + int(n)), (0, 4 * i, 4 * gather.SHOWN, 4 * i + 4))
        sheet.save(folder / f"{name}-{seed}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = {f"teacher, {n} steps": quality(fd) for n, fd in ((50, 0.3), (8, 0.4), (4, 0.6), (2, 1.0), (1, 3.0))}
    rows |= {"teacher, 50 steps, another seed": quality(0.1), "teacher, 50 steps, guided 1.5": quality(0.5)}
    (tmp_path / "teacher.json").write_text(json.dumps({"floor": quality(0.1), "halves": quality(0.2), "rows": rows}))
    Image.new("RGB", (4 * gather.SHOWN, 16), COLOURS["teacher"]).save(tmp_path / "teacher.png")
    made(tmp_path, "sid", {"1": 0.5, "2": 0.4, "4": 0.38})
    made(tmp_path, "sid", {"1": 0.7, "2": 0.4, "4": 0.34}, seed=1)
    made(tmp_path, "kd", {"4": 0.35, "1": 0.6})
    made(tmp_path, "cd", {}, failed="Training diverged at step 3.")
    return tmp_path


def test_no_number_of_the_page_is_typed_by_hand():
    result = json.loads((ROOT / "benchmarks" / "results" / "methods-digits.json").read_text())
    assert gather.page(result) == (ROOT / "docs" / "methods.md").read_text()
    assert (ROOT / "docs" / "methods-digits.png").stat().st_size < 400_000


def test_a_ratio_holds_distance_and_floor_against_the_best_teacher_at_50_steps(folder):
    result = gather.gather(folder, "digits")
    assert result["best teacher"] == 0.3 and result["forwards"] == 1000
    sid = result["methods"]["sid"]["steps"]
    assert sid["4"]["ratio"] == pytest.approx((0.38 + 0.1) / (0.3 + 0.1))
    assert sid["4"]["fd"] == 0.38 and sid["4"]["fd by seed"] == {"0": 0.38, "1": 0.34}
    assert result["methods"]["cd"] == {"failed": "Training diverged at step 3."}
    assert set(result["missing"]) == set(METHODS) - set(gather.LEFT_OUT) - {"sid", "kd", "cd"}


def test_the_page_lists_the_best_first_and_says_which_bar_each_meets(folder):
    result = gather.gather(folder, "digits")
    text = gather.page(result)
    four, two, one = (text.split(f"## {head}\n")[1].split("\n## ")[0] for head in ("4 steps", "2 steps", "1 step"))
    assert [line.split("`")[1] for line in four.splitlines() if line.startswith("| `")] == ["kd", "sid"]
    assert "| `kd` | 0.350 (0.175–0.700) | 1.12 | yes |" in four and "| 1.20 | no |" in four
    assert "`kd`" not in two and "`sid`" in two
    assert "| `sid` | 0.500 (0.250–1.000) | 1.50 | yes |" in one and "| 1.75 | no |" in one
    assert "| *teacher, 1 step* | 3.000" in one and "floor* | 0.100" in one
    assert "| `sid` | 1 | 0.500, 0.700 | 1.75 |" in text and "0.001, not 0.0005" in text
    assert "- `cd` failed: Training diverged at step 3." in text and "Not run yet: `scm`" in text


def test_runs_of_different_budgets_are_not_compared(folder):
    made(folder, "kd", {"4": 0.3}, seed=1, forwards=4000)
    with pytest.raises(ValueError, match=r"budgets \[1000, 4000\]"):
        gather.gather(folder, "digits")


def test_the_picture_shows_every_method_at_its_step_counts(folder):
    sheet = gather.picture(gather.gather(folder, "digits"), folder)
    row, part = gather.HIGH + 4, gather.SHOWN * (gather.HIGH + 1) + gather.GAP

    def colour(line: int, column: int, sample: int = 0) -> Any:
        x = gather.LEFT + column * part + sample * (gather.HIGH + 1)
        return sheet.getpixel((x + 5, (line + 1) * row + 6 + gather.HIGH // 2))

    white = (255, 255, 255)
    assert [colour(0, i) for i in range(3)] == [COLOURS["teacher"], white, white]  # at 50 steps
    assert [colour(1, i, 9) for i in range(3)] == 3 * [COLOURS["teacher"]]
    assert [colour(2, i) for i in range(3)] == [(0, 0, 201), white, (0, 0, 204)]  # kd, best at 4
    assert [colour(3, i, 9) for i in range(3)] == [(200, 0, 1), (200, 0, 2), (200, 0, 4)]  # sid
    assert sheet.height == 5 * row + 12  # a headline, the teacher twice, two methods


@pytest.fixture
def benchmark(monkeypatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return runpy.run_path(str(ROOT / "benchmarks" / "methods.py"))


def test_another_learning_rate_is_every_networks_in_proportion(benchmark):
    config = benchmark["at_rate"](FitConfig(lr=5e-4, lrs={"student": 1e-4}), 1e-3)
    assert config.lr == 1e-3 and config.lrs == pytest.approx({"student": 2e-4})
