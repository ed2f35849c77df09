"""Every method on equal terms: one teacher, one budget of network forwards, judged at 1, 2 and 4 steps.

    python benchmarks/methods.py [--data digits|fashion-mnist] [--methods sid flowmap ...] [--seeds 0 1 2]
    python benchmarks/methods.py --write

Each (method, seed) is one file under --out, so an interrupted run goes on where it stopped, and one method can be run
alone. ``--write`` gathers what is there into results/methods-DATA.json and docs/methods.md.

The budget is counted in forwards of one batch: the floating-point operations of an iteration (counted by torch, both
passes, all networks) over those of one forward of the teacher at the same batch.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import save
from gather import write
from torch.utils.flop_counter import FlopCounterMode

from hasten import FitConfig, Judge, Sampling, even, keep_freed_memory, load_data, load_model, nfe, save_model
from hasten.core.errors import HastenError
from hasten.demo import patch_for
from hasten.fit import fit
from hasten.measure import clock
from hasten.measure.features import Features, classifier
from hasten.methods.flow import Flow
from hasten.models.dit import DiT
from hasten.names import METHODS, method_class, variations
from hasten.progress import draw
from hasten.recipe import dit_config, for_steps
from hasten.stages import SPLIT, Plan

STEPS = (1, 2, 4)
SKIPPED = {"flow", "dpo", "guidance"}  # no distillation to few steps
DEFAULT = {"lr": 1e-3, "ema": (0.99,), "batch": 256, "schedule": "linear", "warmup": 20}


def main() -> None:
    """Run what is missing, or write what is there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="digits", help="digits, or the folder of a teacher with its judge")
    parser.add_argument("--methods", nargs="+", default=[m for m in METHODS if m not in SKIPPED])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--forwards", type=int, default=4000, help="the budget, in forwards of 256 samples")
    parser.add_argument("--count", type=int, default=5000, help="samples judged")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="runs/methods")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    keep_freed_memory()
    out = Path(args.out) / Path(args.data).name
    if args.write:
        save(f"methods-{Path(args.data).name}", write(out, Path(args.data).name), 0, args.device)
        return
    teacher, source, judge = prepare(args.data, out, torch.device(args.device))
    baseline(teacher, judge, out / "teacher.json", args.count)
    for seed in args.seeds:
        for name in args.methods:
            file = out / f"{name}-{seed}.json"
            if not file.exists():
                print(f"{name}, seed {seed}", flush=True)
                file.write_text(json.dumps(distil(name, seed, teacher, source, judge, args), indent=1) + "\n")


def prepare(data: str, out: Path, device: torch.device) -> tuple[Any, Any, Judge]:
    """(teacher, training data, judge), made once and kept in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    images = load_data(data)
    train, held_out, rest = images.split(SPLIT, seed=0)
    file, folder = out / "features.safetensors", out / "teacher"
    if not file.exists():
        classifier(rest.x, rest.labels, images.classes, seed=0, iterations=Plan().features).save(file)
    judge = Judge(Features.load(file, device), train.x, train.labels, held_out.x, held_out.labels)
    if not (folder / "model.json").exists():
        plan = Plan()
        torch.manual_seed(0)
        shape = {"width": plan.width, "depth": plan.depth, "heads": plan.width // 32, "patch": patch_for(images.shape)}
        net = DiT(dit_config(shape, images.shape, images.classes))
        config = FitConfig(plan.teacher, lr=2e-3, schedule="linear", warmup=50, ema=(0.995,), precision="float32")
        *_, last = fit(Flow(), train, net, config, device=device)
        save_model(last.student, folder)
    return load_model(folder, device), train, judge


def look(net: Any, sampling: Sampling, judge: Judge, count: int, seed: int = 0) -> dict[str, Any]:
    """Quality, network evaluations and the median time of a batch of one way to sample."""
    images, labels = draw(net, sampling, count, seed=seed)
    device = next(net.parameters()).device
    took = clock.latency({"it": lambda: draw(net, sampling, 125, seed=seed, batch=125)}, 5, 1, device)["it"].p50
    return {"nfe": nfe(sampling), "ms of 125": 1e3 * took, **judge(images, labels, interval=True)}


def baseline(teacher: Any, judge: Judge, file: Path, count: int) -> None:
    """The teacher at 1, 2, 4, 8 and 50 steps, guided at 50, another seed of it, and the floor."""
    if file.exists():
        return
    plans = {f"teacher, {n} steps": Sampling(even(n)) for n in (50, 8, 4, 2, 1)}
    plans |= {f"teacher, 50 steps, guided {w:g}": Sampling(even(50), cfg_scale=w) for w in (1.25, 1.5, 2.0)}
    rows = {name: look(teacher, sampling, judge, count) for name, sampling in plans.items()}
    rows["teacher, 50 steps, another seed"] = look(teacher, Sampling(even(50)), judge, count, seed=1)
    file.write_text(json.dumps({"floor": judge.floor, "halves": judge.floor_halves, "rows": rows}, indent=1) + "\n")


def distil(name: str, seed: int, teacher: Any, source: Any, judge: Judge, args: argparse.Namespace) -> dict[str, Any]:
    """One method with the whole budget; a method that trains for one step count gets it once for each."""
    row = METHODS[name]
    config = FitConfig(**{**DEFAULT, **dict(row.fit), "seed": seed})
    plain = method_class(name)(**variations(name))
    found: dict[str, Any] = {"method": name, "seed": seed, "forwards": args.forwards, "steps": {}}
    for steps in [(n,) for n in STEPS] if row.one_count else [STEPS]:
        method = for_steps(plain, steps)
        try:
            cost = forwards(method, source, teacher, config)
            iterations = max(50, round(args.forwards * 256 / config.batch / cost))
            started = time.perf_counter()
            *_, last = fit(method, source, teacher, replace(config, iterations=iterations), device=args.device)
        except HastenError as error:
            found["failed"] = str(error)
            return found
        run = {
            "iterations": last.total,
            "forwards an iteration": round(cost, 2),
            "batch": config.batch,
            "lr": config.lr,
        }
        run["seconds"] = round(time.perf_counter() - started, 1)
        student = last.student.eval()
        for n in steps:
            found["steps"][str(n)] = {**look(student, method.sampling(n), judge, args.count), **run}
            fd, recall = (found["steps"][str(n)][k] for k in ("fd", "recall"))
            print(f"  {n} steps: FD {fd:.3f}, recall {recall:.3f}", flush=True)
    return found


def forwards(method: Any, source: Any, teacher: Any, config: FitConfig) -> float:
    """Floating-point operations of an iteration, averaged over the turns' period, over those of one forward."""
    device = next(teacher.parameters()).device
    batch = source.batch(config.batch, torch.Generator().manual_seed(0), device)
    one, many = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with torch.no_grad(), one:
        teacher(batch.data, torch.full((config.batch,), 0.5, device=device), batch.cond)
    period = math.lcm(*(turn.every for turn in method.turns))
    rounds = period * -(-6 // period)  # several, as roll-outs have random lengths
    steps = fit(method, source, teacher, replace(config, iterations=max(rounds, 100)), device=device)
    with many:
        for _ in range(rounds):
            next(steps)
    return many.get_total_flops() / rounds / one.get_total_flops()


if __name__ == "__main__":
    main()
