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
RESULTS = ROOT / "benchmarks" / "results"
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


@pytest.mark.parametrize("data", [d for d in gather.NOTES if (RESULTS / f"methods-{d}.json").exists()])
def test_no_number_of_the_page_is_typed_by_hand(data):
    result = json.loads((RESULTS / f"methods-{data}.json").read_text())
    assert gather.page(result) == gather.page_of(data).read_text()
    assert (ROOT / "docs" / f"methods-{data}.png").stat().st_size < 400_000


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


def test_a_method_of_one_step_alone_is_listed_last(folder):
    COLOURS["boot"] = (0, 90, 90)
    made(folder, "boot", {"1": 0.2})
    result = gather.gather(folder, "digits")
    assert gather.listed(result) == ["kd", "sid", "boot"]
    text = gather.page(result)
    assert [line.split("`")[1] for line in text.split("each cost")[1].splitlines() if "| 100 |" in line][-1] == "boot"
    assert gather.picture(result, folder).height == 6 * (gather.HIGH + 4) + 12


def test_longer_runs_stand_apart_with_their_budgets(folder, tmp_path_factory, monkeypatch):
    longer = tmp_path_factory.mktemp("longer")
    made(longer, "kd", {"4": 0.2, "1": 0.5}, forwards=10000)
    made(longer, "kd", {"4": 0.4}, seed=1, forwards=10000)
    made(longer, "sid", {"1": 0.2}, forwards=4000)
    other = tmp_path_factory.mktemp("other")
    made(other, "sid", {"1": 0.3}, forwards=4000, alone=True, guided=None, start=None)
    made(
        other,
        "kd",
        {"1": 0.5},
        forwards=4000,
        alone=True,
        guided=1.25,
        start="sid-0-1",
        before=500,
        set={"substeps": 9},
    )
    monkeypatch.setattr(gather, "DOCS", tmp_path_factory.mktemp("docs"))
    result = gather.write(folder, "clothes", [longer, other])
    text = gather.page_of("clothes").read_text()
    assert gather.page_of("clothes").name == "methods-clothes.md" and gather.page_of("digits").name == "methods.md"
    assert text.startswith("# The methods compared on clothes\n") and text == gather.page(result)
    part = text.split("## Longer runs, and others\n")[1].split("\n## ")[0]
    rows = [line for line in part.splitlines() if line.startswith("| `")]
    assert rows == [
        "| `kd` | 10,000 | 4 | 0.200, 0.400 | 1.00 | 1.15 | 0.900 | 9 |",
        "| `kd` | 10,000 | 1 | 0.500 | 1.50 | 1.6 | 0.900 | 9 |",
        "| `kd`, teacher guided 1.25, substeps 9, after `sid` | 4,500 | 1 | 0.500 | 1.50 | 1.6 | 0.900 | 9 |",
        "| `sid` | 4,000 | 1 | 0.200 | 0.75 | 1.6 | 0.900 | 9 |",
        "| `sid`, for this count alone | 4,000 | 1 | 0.300 | 1.00 | 1.6 | 0.900 | 9 |",
    ]
    assert "Longer runs" not in gather.page(gather.gather(folder, "digits"))


def test_runs_made_otherwise_are_kept_out_of_the_tables(folder):
    made(folder, "kd", {"4": 0.2}, seed=2, alone=True)
    with pytest.raises(ValueError, match="kd in .* was not made as the tables are; give its folder with --longer"):
        gather.gather(folder, "digits")


def test_learning_rates_of_another_comparison_are_said_to_be(folder):
    for file in folder.glob("sid-*.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"pilots": {}, "rates": "methods-toys.json"}))
    text = gather.page(gather.gather(folder, "clothes"))
    assert "That which `methods-toys.json` chose for the method" in text and "`kd` had pilots here" in text
    assert "pilot of 15 %" not in text


def test_small_learning_rates_are_not_rounded_away(folder):
    made(folder, "kd", {"4": 0.35, "1": 0.6})
    run = json.loads((folder / "kd-0.json").read_text())
    run["pilots"] = {"5e-05": 0.9, "0.001": 1.0}
    for row in run["steps"].values():
        row["lr"] = 5e-5
    (folder / "kd-0.json").write_text(json.dumps(run))
    result = gather.gather(folder, "digits")
    assert result["methods"]["kd"]["steps"]["4"]["lr"] == 5e-5 and "| 5e-05, not 0.001 |" in gather.page(result)


def test_longer_runs_that_are_not_there_or_failed_are_no_section(folder, tmp_path_factory):
    longer = tmp_path_factory.mktemp("longer")
    result = gather.gather(folder, "digits")
    with pytest.raises(ValueError, match="holds no runs"):
        gather.lengthened(longer, result)
    made(longer, "cd", {}, failed="Training diverged at step 3.")
    with pytest.raises(ValueError, match="cd-0.json failed: Training diverged"):
        gather.lengthened(longer, result)


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


def test_a_learning_rate_is_the_first_seeds_or_another_comparisons(benchmark, tmp_path):
    rates, first = tmp_path / "rates.json", tmp_path / "sid-0.json"
    rates.write_text(json.dumps({"methods": {"sid": {"steps": {"4": {"lr": 2e-4}}}, "cd": {"failed": "It diverged."}}}))
    assert benchmark["chosen"]("sid", None, first) is None
    assert benchmark["chosen"]("sid", rates, first) == 2e-4
    assert benchmark["chosen"]("cd", rates, first) is benchmark["chosen"]("kd", rates, first) is None
    first.write_text(json.dumps({"steps": {"1": {"lr": 1e-3}}}))
    assert benchmark["chosen"]("sid", rates, first) == 1e-3


def test_a_method_of_one_step_alone_is_asked_for_no_other(benchmark):
    from hasten.methods.boot import BOOT
    from hasten.methods.sid import SiD

    assert [n for n in (1, 2, 4) if benchmark["samples"](BOOT(), n)] == [1]
    assert [n for n in (1, 2, 4) if benchmark["samples"](SiD(), n)] == [1, 2, 4]
