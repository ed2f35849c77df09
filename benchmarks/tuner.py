"""The tuner on a trained model: FD within 5 % of the teacher's 50 guided steps, verified on noise it has not seen.

python benchmarks/tuner.py [--teacher fashion-mnist] [--scale 1.25] [--calls 500] [--verify 2000]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from common import save

from hasten import Judge, Sampling, even, keep_freed_memory, load, tune
from hasten.ledger import clocked, with_layers
from hasten.measure.clock import summary
from hasten.run import find_model
from hasten.workload import Workload


def main() -> None:
    """Tune, verify, save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--teacher", default="fashion-mnist")
    parser.add_argument("--scale", type=float, default=1.25)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--calls", type=int, default=1000, help="samples of each candidate")
    parser.add_argument("--verify", type=int, default=2000, help="samples of the last comparison, other noise")
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    keep_freed_memory()
    net = load(args.teacher).eval()
    judge = Judge.load(find_model(args.teacher) / "judge.safetensors")
    sampling, started = Sampling(even(args.steps), cfg_scale=args.scale), time.time()
    plan = tune(
        net, max_loss={"fd": "5%"}, sampling=sampling, judge=judge, calls=args.calls, batch=args.batch,
        tell=lambda text: print(f"{time.time() - started:6.0f} s  {text}", flush=True),
    )  # fmt: skip
    took = time.time() - started
    work = Workload(net, args.steps, sampling=sampling, batch=args.batch, judge=judge)
    device = next(net.parameters()).device

    def drawn() -> tuple[Any, dict[str, float]]:
        images, labels = work.samples(args.verify, seed=7)
        return images, judge(images, labels, interval=True)

    (images, own), slow, quick = drawn(), [], []
    others, tuned = with_layers([plan], work, drawn)
    share, error = judge.paired(images)(others)
    for _ in range(3):
        slow += clocked(work.request, 2, device)
        quick += with_layers([plan], work, lambda: clocked(work.request, 2, device))
    floor = judge.best_floor["fd"]
    ratio, gain = (tuned["fd"] + floor) / (own["fd"] + floor), summary(slow).p50 / summary(quick).p50
    save(
        "tuner",
        {
            "teacher": args.teacher, "cfg_scale": args.scale, "steps": args.steps, "seconds of tuning": round(took),
            "layers": [t.name for t in plan.transforms], "measured": plan.measured, "samples": args.verify,
            "the model's own": own, "tuned": tuned, "floor": floor, "FD + floor over the model's own": round(ratio, 4),
            "paired, without the bias of few samples": {"share": round(share, 4), "standard error": round(error, 4)},
            "seconds": {"before": slow, "after": quick}, "gain": round(gain, 2), "batch": args.batch,
            "bars": {"gain at least 3": gain >= 3, "FD within 5 %": ratio <= 1.05},
        },
        7,
    )  # fmt: skip


if __name__ == "__main__":
    main()
