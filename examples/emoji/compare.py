"""The teacher and its few-step student side by side: quality over the floor, time, and pictures from the same noise.

    python examples/emoji/compare.py runs/emoji runs/emoji-4step/model --steps 4

Both are run by plain diffusers, the student as its ``hasten.json`` says. Writes ``report.json`` and ``student.png``
beside this file.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import yaml
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from train import SHOWN, sample, show

import hasten
from hasten.measure.clock import machine

HERE = Path(__file__).parent


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("teacher", type=Path, help="the --out of train.py")
    parser.add_argument("student", type=Path, help="a folder that hasten exported")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--scale", type=float, default=1.0, help="the teacher's guidance that was distilled")
    parser.add_argument("--many", type=int, default=28, help="the teacher's own steps")
    args = parser.parse_args()
    torch.set_num_threads(1)
    diffusers_logging.set_verbosity_error()  # the silent T5's prompt is cut on purpose
    captions = (args.teacher / "held_out.txt").read_text().splitlines()
    pipes: dict[str, Any] = {}
    for name, folder in (("teacher", args.teacher / "teacher"), ("student", args.student)):
        pipes[name] = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        pipes[name].set_progress_bar_config(disable=True)
    runs = {
        f"teacher, {args.many} steps": ("teacher", args.scale, args.many),
        f"teacher, {args.steps} steps": ("teacher", args.scale, args.steps),
        f"student, {args.steps} steps": ("student", 1.0, args.steps),
    }
    judge = hasten.Judge.load(args.teacher / "judge.safetensors")
    quality, pictures = {}, []
    for name, (who, scale, steps) in runs.items():
        quality[name] = judge(sample(pipes[who], captions, scale, steps), interval=True)
        pictures.append(sample(pipes[who], SHOWN, scale, steps, seed=1))
        print(f"{name}: {quality[name]}", flush=True)
    calls = {name: lambda run=run: sample(pipes[run[0]], SHOWN[:4], run[1], run[2]) for name, run in runs.items()}
    times = hasten.latency(calls, 5, 1, "cpu")
    show(torch.cat(pictures), HERE / "student.png", len(SHOWN))
    about = json.loads((args.teacher / "report.json").read_text())
    best, floor = quality[f"teacher, {args.many} steps"]["fd"], judge.floor["fd"]
    numbers = {
        "machine": machine("cpu"), "seed": 0, "samples": len(captions), "training": about, "floor": judge.floor,
        "command": f"python examples/emoji/compare.py TEACHER STUDENT --steps {args.steps} --scale {args.scale}",
        "recipe": yaml.safe_load((args.student / "recipe.yaml").read_text()),
        "iterations": max((int(f.name) for f in (args.student.parent / "checkpoints").glob("[0-9]*")), default=None),
        "quality": quality, "ms of 4 pictures": {k: round(1e3 * v.p50, 1) for k, v in times.items()},
        "FD + floor over the teacher's": {k: round((v["fd"] + floor) / (best + floor), 3) for k, v in quality.items()},
    }  # fmt: skip
    (HERE / "report.json").write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
