"""The models of a finished demo, judged with several sampling seeds: how much of a difference is the seed.

python benchmarks/sampling_seeds.py [--demo hasten-demo] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from common import save

from hasten import Judge, Sampling, even, load_data, load_model, read_samplings
from hasten.measure.features import Features
from hasten.progress import draw
from hasten.stages import MANY, SPLIT


def main() -> None:
    """Draw, judge, save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--demo", default="hasten-demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--count", type=int, default=5000)
    args = parser.parse_args()
    folder = Path(args.demo)
    settings = json.loads((folder / "work" / "state.json").read_text())["settings"]
    train, held_out, _ = load_data(settings["data"]).split(SPLIT, seed=0)
    features = Features.load(folder / "work" / "features.safetensors")
    judge = Judge(features, train.x, train.labels, held_out.x, held_out.labels)
    plans = {f"teacher, {n} steps": ("teacher", Sampling(even(n))) for n in (MANY, 8, 4)}
    for name in ("trajectory", "distribution"):
        for n, sampling in sorted(read_samplings(folder / name / "model").items()):
            plans[f"{name}, {n} step{'s' * (n > 1)}"] = (name, sampling)
    rows = {}
    for name, (model, sampling) in plans.items():
        net = load_model(folder / model / "model")
        found = [judge(*draw(net, sampling, args.count, seed=1000 * s + 7)) for s in args.seeds]
        row = {}
        for key in ("fd", "recall"):
            values = [q[key] for q in found]
            row[key] = {"mean": statistics.mean(values), "low": min(values), "high": max(values)}
        rows[name] = {k: {kk: round(vv, 4) for kk, vv in v.items()} for k, v in row.items()}
    numbers = {"count": args.count, "seeds": args.seeds, "floor": judge.floor, "demo": settings, "stages": rows}
    save("sampling-seeds", numbers, args.seeds[0])


if __name__ == "__main__":
    main()
