"""What a diffusers pipeline costs inside hasten: the adapter's overhead, LoRA's memory, what freeing encoders frees.

python benchmarks/adapter.py [--device cuda]

The network is a Flux-class transformer of 50 M parameters with random weights, 1,024 image tokens, in the test suite's
tiny pipeline. Memory is measured in a process of its own for each run, from before the pipeline is made.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from common import save

from hasten import DMD2, FitConfig, Flow, denoiser, keep_freed_memory
from hasten.core.denoiser import Batch
from hasten.fit import fit
from hasten.measure.clock import latency, peak_memory
from hasten.models.encode import one
from hasten.models.template import fill

PROMPT = "a red bicycle"
RUNS: dict[str, Any] = {
    "fine-tune, adapters": Flow(),
    "DMD2, adapters": DMD2(gan_weight=0.0),
    "DMD2 with GAN, adapters": DMD2(gan_weight=3e-3),
}


def flux(double: int = 2, single: int = 8, side: int = 64) -> tuple[Any, dict[str, Any]]:
    """The tiny pipeline with a larger transformer: width 512, (side / 2)^2 image tokens."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    from tests.pipelines import FAMILIES

    pipe, call = FAMILIES["flux"]()
    torch.manual_seed(0)
    pipe.register_modules(
        transformer=FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=double, num_single_layers=single, attention_head_dim=64,
            num_attention_heads=8, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(16, 24, 24),
            guidance_embeds=True,
        ).eval()
    )  # fmt: skip
    return pipe, {**call, "height": side, "width": side}


class Prompt:
    """One prompt and random latents."""

    has_data, classes, name = True, 0, "one prompt"

    def __init__(self, pipe: Any, net: Any):
        self.shape, self.cond = net.shape, one(pipe, net, PROMPT)
        self.x0 = torch.randn(1, *net.shape)

    def batch(self, n: int, generator: Any, device: Any = "cpu") -> Batch:
        cond = {k: v.to(device).expand(n, *v.shape[1:]) for k, v in self.cond.items()}
        return Batch(cond, {}, (n, *self.shape), self.x0.to(device).expand(n, *self.shape), torch.device(device))


def train(name: str, args: argparse.Namespace, small: bool = False) -> None:
    """Two iterations: all turns of the method, and the optimisers' states."""
    pipe, call = flux(1, 1, 8) if small else flux()
    net = denoiser(pipe, call)
    net.to(args.device)
    net.checkpointing = True
    config = FitConfig(iterations=2, batch=args.batch, precision="float32", clone="lora", lora_rank=args.rank)
    for _ in fit(RUNS[name], Prompt(pipe, net), net, config, device=args.device):
        pass


def overhead(args: argparse.Namespace) -> dict[str, Any]:
    """The adapter's forward against its network's own, with the same arguments made beforehand; interleaved."""
    pipe, call = flux()
    net = denoiser(pipe, call).to(args.device)
    cond = {k: v.to(args.device) for k, v in one(pipe, net, PROMPT).items()}
    x, t = torch.randn(1, *net.shape, device=args.device), torch.tensor([0.7], device=args.device)
    dial = net.found.dial(t.double())
    arguments = {k: fill(node, x, dial, cond) for k, node in net.templates[net.shape].items()}

    def bare() -> None:
        with torch.no_grad():
            net.net(**arguments)

    def adapted() -> None:
        with torch.no_grad():
            net(x, t, cond)

    times = latency({"bare": bare, "adapted": adapted, "bare again": bare}, args.repeats, 3, args.device)
    base = times["bare"].p50
    return {
        "ms of the bare call": round(1e3 * base, 2),
        "overhead": round(times["adapted"].p50 / base - 1, 4),
        "noise: the bare call again": round(times["bare again"].p50 / base - 1, 4),
        "bar": 0.01,
        "met": times["adapted"].p50 / base - 1 <= 0.01,
    }


def freed() -> dict[str, Any]:
    """Resident memory before and after the encoders are freed, one of them a T5 encoder of 300 MB."""
    import psutil
    from transformers import T5Config, T5EncoderModel

    from hasten.pipelines import host

    process = psutil.Process()
    pipe, call = flux(1, 1, 8)
    config = T5Config(vocab_size=128, d_model=32, d_kv=64, d_ff=16384, num_layers=32, num_heads=32, dropout_rate=0.0)
    pipe.register_modules(text_encoder_2=T5EncoderModel(config).eval())
    size = sum(p.numel() * 4 for p in pipe.text_encoder_2.parameters()) / 2**20
    before = process.memory_info().rss / 2**20
    with tempfile.TemporaryDirectory() as folder:
        host(pipe, prompts=[PROMPT], call=call, work=folder)
        after = process.memory_info().rss / 2**20
    return {
        "the encoder, MiB": round(size, 1),
        "resident before encoding, MiB": round(before, 1),
        "resident when training starts, MiB": round(after, 1),
        "freed": round((before - after) / size, 3),
    }


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--only", choices=(*RUNS, "freed"), help="measure one and print it")
    args = parser.parse_args()
    if args.only == "freed":
        print(json.dumps(freed()))
        return
    if args.only:
        train(args.only, args, small=True)
        found = peak_memory(lambda: train(args.only, args), args.device)
        print(json.dumps({"mib": found.bytes / 2**20, "how": found.how}))
        return

    def alone(name: str) -> dict[str, Any]:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        return json.loads(done.stdout.splitlines()[-1])

    keep_freed_memory()
    memory = {name: alone(name) for name in RUNS}
    peaks = {name: round(m["mib"], 1) for name, m in memory.items()}
    over = {name: round(v / peaks["fine-tune, adapters"], 3) for name, v in peaks.items()}
    pipe, _ = flux()
    numbers = {
        "parameters": sum(p.numel() for p in pipe.transformer.parameters()),
        "settings": {"batch": args.batch, "rank": args.rank, "checkpointing": True,
                     "how": memory["DMD2, adapters"]["how"]},
        "peak, MiB": peaks,
        "peak over that of fine-tuning one adapter": over,
        "bar of DMD2 with GAN": 1.6,
        "met": over["DMD2 with GAN, adapters"] <= 1.6,
        "overhead of the adapter": overhead(args),
        "encoders freed": alone("freed"),
    }  # fmt: skip
    save("adapter" if args.device == "cpu" else f"adapter-{args.device}", numbers, 0, args.device)


if __name__ == "__main__":
    main()
