"""Everything at once: a 4-step student, int8, fast attention, compiled, against 50 guided steps in the default dtype.

    python benchmarks/whole_stack.py [--trained TEACHER_RUN STUDENT]

Latency: the Flux-class transformer of 50 M parameters in the test suite's tiny pipeline, 1,024 image tokens, untrained:
its pictures mean nothing, its times do. Quality: the same stack on the trained emoji student of examples/emoji
(--trained: the --out of its train.py, and the exported student), beside the teacher's many steps in its report.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "emoji"))

import torch
from adapter import flux
from common import save
from diffusers.utils import logging as diffusers_logging

from hasten import Attention, Cast, Compile, Judge, Quantize, keep_freed_memory, speed_up
from hasten.ledger import clocked
from hasten.measure.clock import summary


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trained", nargs=2, type=Path, metavar=("TEACHER_RUN", "STUDENT"))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--many", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    keep_freed_memory()
    diffusers_logging.set_verbosity_error()
    numbers: dict[str, Any] = {"latency": speed(args.many, args.steps, args.repeats)}
    numbers["bar"] = {"at least": 100.0, "met": numbers["latency"]["ratio"] >= 100}
    if args.trained:
        numbers["quality"] = quality(*args.trained, args.steps)
        ratio = numbers["quality"]["FD + floor over the teacher's"]
        numbers["quality bar"] = {"at most": 1.15, "met": ratio <= 1.15}
    save("whole-stack", numbers, 0)


def layers(min_side: int) -> list[Any]:
    """The stack."""
    return [Quantize("int8", min_side=min_side), Cast(), Attention(), Compile()]


def speed(many: int, steps: int, repeats: int) -> dict[str, Any]:
    """Seconds of a request: ``many`` guided steps in float32, and ``steps`` unguided ones under the stack."""
    pipe, call = flux()
    pipe.set_progress_bar_config(disable=True)
    call = {k: v for k, v in call.items() if k != "num_inference_steps"}
    guided = {**call, "negative_prompt": "", "true_cfg_scale": 4.0}
    device = torch.device("cpu")

    def run(asked: dict[str, Any], n: int) -> None:
        pipe(**asked, num_inference_steps=n, generator=torch.Generator().manual_seed(0), output_type="pt")

    calls = {"many": 0}
    handle = pipe.transformer.register_forward_hook(lambda *a: calls.update(many=calls["many"] + 1))
    run(guided, many)
    handle.remove()
    slow: list[float] = []
    quick: list[float] = []
    with speed_up(pipe, *layers(512), call=call):
        run(call, steps)  # compiles
    for _ in range(2):  # before, between and after, in one process
        slow += clocked(lambda: run(guided, many), 1, device)
        with speed_up(pipe, *layers(512), call=call):
            quick += clocked(lambda: run(call, steps), repeats, device)
    before, after = summary(slow).p50, summary(quick).p50
    return {
        "network calls": {"before": calls["many"], "after": steps}, "seconds before": slow, "seconds after": quick,
        "p50 before": before, "p50 after": after, "ratio": round(before / after, 1),
        "note": "the network is untrained; both include the text encoders and the decoder",
    }  # fmt: skip


def quality(teacher: Path, student: Path, steps: int) -> dict[str, Any]:
    """The judge's numbers of the trained student without and with the stack, beside the teacher's."""
    from diffusers import DiffusionPipeline
    from train import sample

    known = json.loads((Path(__file__).parent.parent / "examples" / "emoji" / "report.json").read_text())
    captions = (teacher / "held_out.txt").read_text().splitlines()
    judge = Judge.load(teacher / "judge.safetensors")
    pipe = DiffusionPipeline.from_pretrained(student, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    plain = judge(sample(pipe, captions, 1.0, steps), interval=True)
    call = {"prompt": captions[0], "guidance_scale": 1.0, "height": 64, "width": 64}
    with speed_up(pipe, *layers(64), call=call) as fast:
        stacked = judge(sample(fast, captions, 1.0, steps), interval=True)
    name = next(
        k for k in known["quality"] if k.startswith("teacher") and known["FD + floor over the teacher's"][k] == 1
    )
    best, floor = known["quality"][name]["fd"], judge.floor["fd"]
    return {
        name: known["quality"][name], f"student, {steps} steps": plain, f"student, {steps} steps, the stack": stacked,
        "floor": judge.floor, "samples": len(captions),
        "FD + floor over the teacher's": round((stacked["fd"] + floor) / (best + floor), 3),
    }  # fmt: skip


if __name__ == "__main__":
    main()
