"""The demo with several seeds, held against the project's bars: quality, speed-ups and time of each run.

    python benchmarks/demo_seeds.py [--seeds 0 1 2] [--out FOLDER]

A folder that holds a finished demo is read, not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import save


def main() -> None:
    """Run, compare, save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", default="runs/demo-seeds")
    args = parser.parse_args()
    runs = {seed: run(seed, Path(args.out) / f"seed-{seed}") for seed in args.seeds}
    bars: dict[str, list[bool]] = {}
    for found in runs.values():
        for name, met in found["bars"].items():
            bars.setdefault(name, []).append(met)
    fds = {
        name: [found["fd"][name] for found in runs.values()]
        for name in next(iter(runs.values()))["fd"]
        if all(name in found["fd"] for found in runs.values())
    }
    summary = {n: {"mean": round(statistics.mean(v), 3), "low": min(v), "high": max(v)} for n, v in fds.items()}
    save("demo-seeds", {"fd over seeds": summary, "bars met, by seed": bars, "runs": runs}, args.seeds[0])


def run(seed: int, folder: Path) -> dict[str, Any]:
    """One demo; its numbers and which bars they meet."""
    if not (folder / "report.json").exists():
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "hasten", "demo", "--seed", str(seed), "--out", str(folder)], check=True)
        (folder / "seconds.txt").write_text(f"{time.perf_counter() - start:.1f}")
    report = json.loads((folder / "report.json").read_text())
    seconds = float((folder / "seconds.txt").read_text()) if (folder / "seconds.txt").exists() else None
    stages = {s["name"]: s for s in report["stages"]}
    floor = report["floor"]["held-out real images"]["fd"]
    fd = {name: round(s["quality"]["fd"], 3) for name, s in stages.items()}
    teachers = [s for s in report["stages"] if s["name"] in report["baselines"]]
    teacher = min(s["quality"]["fd"] for s in teachers)
    best = {n: min(students(report, n), key=lambda s: s["quality"]["fd"]) for n in (1, 2, 4)}
    ratio = {n: [best[n]["speedup"][t["name"]] for t in teachers] for n in best}
    bars = {
        "teacher: FD <= floor": teacher <= floor,
        "4 steps: FD <= 1.5 teacher + floor/2": best[4]["quality"]["fd"] <= 1.5 * teacher + floor / 2,
        "4 steps: recall >= 0.85": best[4]["quality"]["recall"] >= 0.85,
        "4 steps: better than the teacher's 8": best[4]["quality"]["fd"] < stages["teacher, 8 steps"]["quality"]["fd"],
        "1 step: FD <= teacher's at 4 / 2 + floor/2":
            best[1]["quality"]["fd"] <= stages["teacher, 4 steps"]["quality"]["fd"] / 2 + floor / 2,
        "1 step: recall >= 0.75": best[1]["quality"]["recall"] >= 0.75,
        "4 steps: >= 10x unguided, >= 20x guided": ratio[4][0] >= 10 and ratio[4][-1] >= 20,
        "1 step: >= 35x unguided, >= 70x guided": ratio[1][0] >= 35 and ratio[1][-1] >= 70,
        "at most 8 minutes": seconds is not None and seconds <= 480,
    }  # fmt: skip
    recall = {n: round(s["quality"]["recall"], 3) for n, s in best.items()}
    rounded = {n: [round(r, 1) for r in v] for n, v in ratio.items()}
    about = {"seconds": seconds, "floor": round(floor, 3), "fd": fd, "recall of the best": recall}
    return {**about, "best": {n: s["name"] for n, s in best.items()}, "speed-up of the best": rounded, "bars": bars}


def students(report: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """The distilled stages of one step count."""
    return [s for s in report["stages"] if s["group"] in ("trajectory", "distribution") and s["steps"] == steps]


if __name__ == "__main__":
    main()
