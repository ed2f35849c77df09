"""What quantized linears, attention and compilation gain on a CPU, side by side: the stack, attention, the int8 linear.

python benchmarks/stack.py [--repeats 9] [--threads 2]

The network is a Flux-class transformer of 50 M parameters with random weights, 1,024 image and 64 text tokens, batch 1.
Its variants take turns, call by call, in one process; every number is a median. Errors are relative to float32.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from common import save
from torch import Tensor, nn

from hasten import Attention, Cast, Compile, Quantize, keep_freed_memory, speed_up
from hasten.measure.clock import latency
from hasten.speed import kernels
from hasten.speed.int8 import Int8Linear

TOKENS, TEXT = 1024, 64
STACKS: dict[str, tuple[Any, ...]] = {
    "float32, eager": (),
    "bfloat16, torch.compile": (),
    "bfloat16, compiled": (Cast(), Compile()),
    "int8, compiled": (Quantize("int8"), Cast(), Compile()),
    "int8 of torchao, compiled": (Quantize("int8", backend="torchao"), Cast(), Compile()),
    "bfloat16, attention, compiled": (Cast(), Attention(), Compile()),
    "int8, attention, compiled": (Quantize("int8"), Cast(), Attention(), Compile()),
    "int8, attention, compiled, float32 elsewhere": (Quantize("int8"), Attention(dtype="bfloat16"), Compile()),
    "int8 of torchao, attention, compiled": (Quantize("int8", backend="torchao"), Cast(), Attention(), Compile()),
}
BARS = {
    "stack over float32 eager": 4.0,
    "stack over bfloat16 torch.compile": 1.7,
    "attention, 12 heads x 1088 x 64": 2.0,
    "attention, 24 heads x 4608 x 128": 2.0,
    "int8 linear 1024 x 768 x 3072 over bfloat16": 1.6,
}
ERRORS = {"W8A8 alone": 0.008, "attention alone": 0.006, "stack": 0.012}


class Flux(nn.Module):
    """diffusers' Flux transformer on fixed conditions, with the blocks that ``speed_up`` looks for."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

        torch.manual_seed(0)
        self.net = FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=2, num_single_layers=8, attention_head_dim=64,
            num_attention_heads=8, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(16, 24, 24),
            guidance_embeds=True,
        ).eval()  # fmt: skip
        self.register_buffer("text", torch.randn(1, TEXT, 32))
        self.register_buffer("pooled", torch.randn(1, 32))
        rows = torch.arange(TOKENS**0.5)
        self.register_buffer("img_ids", torch.cartesian_prod(torch.zeros(1), rows, rows))
        self.register_buffer("txt_ids", torch.zeros(TEXT, 3))

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.net.transformer_blocks, *self.net.single_transformer_blocks]

    def forward(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        return self.net(
            hidden_states=x_t, timestep=t, guidance=torch.full_like(t, 4.0), img_ids=self.img_ids,
            txt_ids=self.txt_ids, encoder_hidden_states=self.text.to(x_t.dtype),
            pooled_projections=self.pooled.to(x_t.dtype), return_dict=False,
        )[0]  # fmt: skip


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def forwards(repeats: int) -> tuple[dict[str, float], dict[str, float], dict[str, Any]]:
    """Median seconds of each stack's forward, its error, and what its layers counted."""
    base = Flux()
    x, t = torch.randn(1, TOKENS, 16), torch.tensor([0.5])  # 500 is exact in bfloat16: its rounding is no layer's
    ups = {name: speed_up(copy.deepcopy(base), *layers) if layers else None for name, layers in STACKS.items()}
    nets: dict[str, Any] = {name: up.__enter__() if up else base for name, up in ups.items()}
    half = copy.deepcopy(base).bfloat16()
    for block in half.blocks:
        block.compile()
    nets["bfloat16, torch.compile"] = lambda x, t, cond: half(x.bfloat16(), t, cond).float()
    outs = {name: net(x, t, {}) for name, net in nets.items()}  # compiles, and chooses attention's kernels
    times = latency({name: lambda net=net: net(x, t, {}) for name, net in nets.items()}, repeats, 2)
    errors = {name: relative(out, outs["float32, eager"]) for name, out in outs.items()}
    for name, layers in {
        "W8A8 alone": (Quantize("int8"),),
        "forward with attention alone": (Attention(dtype="bfloat16"),),
    }.items():
        with speed_up(copy.deepcopy(base), *layers) as alone:
            errors[name] = relative(alone(x, t, {}), outs["float32, eager"])
    counts = {name: up.ledger() for name, up in ups.items() if up}
    for up in ups.values():
        if up:
            up.__exit__(None, None, None)
    return {name: found.p50 for name, found in times.items()}, errors, counts


def attention(heads: int, tokens: int, dim: int, repeats: int) -> dict[str, Any]:
    """Every kernel against torch's, in a network's layout."""
    from hasten.speed.softmax import Call, chunked, error, native, torchs

    q, k, v = (torch.randn(1, tokens, heads, dim).bfloat16().transpose(1, 2) for _ in range(3))
    call = Call(q, k, v, None, 0.0, False, None, False)
    runs = {"torch": torchs}
    if tokens < 2048:  # far from either at more
        runs["chunks of 256"] = chunked(256)
    if kernels.why_not() is None:
        runs["native"] = native
    times = latency({name: lambda run=run: run(call) for name, run in runs.items()}, repeats, 1)
    return {
        "ms": {name: round(1e3 * found.p50, 2) for name, found in times.items()},
        "error": {name: round(error(run, call), 5) for name, run in runs.items()},
        "gain": round(times["torch"].p50 / min(found.p50 for name, found in times.items() if name != "torch"), 2),
    }


def linear(repeats: int) -> dict[str, Any]:
    """bfloat16's linear against the int8 one, the rounding of the activations included."""
    exact = nn.Linear(768, 3072)
    x = torch.randn(1024, 768).bfloat16()
    half, small, plain = copy.deepcopy(exact).bfloat16(), Int8Linear(exact), Int8Linear(exact)
    plain.fused = False
    compiled = torch.compile(plain.forward)
    runs = {"bfloat16": half, "int8": small, "int8, torch._int_mm compiled": compiled}
    times = latency({name: lambda run=run: run(x) for name, run in runs.items()}, repeats, 3)
    return {
        "ms": {name: round(1e3 * found.p50, 2) for name, found in times.items()},
        "error": round(relative(small(x), F.linear(x.float(), exact.weight, exact.bias)), 5),
        "gain": round(times["bfloat16"].p50 / times["int8"].p50, 2),
    }


@torch.no_grad()
def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    kernels.why_not()  # builds them
    seconds, errors, counts = forwards(args.repeats)
    stack = seconds["int8, attention, compiled"]
    small = attention(12, 1088, 64, 3 * args.repeats)
    large = attention(24, 4608, 128, max(3, args.repeats // 3))
    product = linear(5 * args.repeats)
    gains = dict(zip(BARS, (
        seconds["float32, eager"] / stack, seconds["bfloat16, torch.compile"] / stack,
        small["gain"], large["gain"], product["gain"],
    ), strict=True))  # fmt: skip
    errors["stack"] = errors["int8, attention, compiled"]
    errors["attention alone"] = max(found["error"].get("native", 0.0) for found in (small, large))  # not the forward's
    numbers = {
        "parameters": sum(p.numel() for p in Flux().parameters()),
        "settings": {"threads": args.threads, "repeats": args.repeats, "tokens": TOKENS + TEXT,
                     "native kernels": kernels.why_not() or "yes", "AMX": kernels.int8_ready()},
        "forward, ms": {name: round(1e3 * s, 1) for name, s in seconds.items()},
        "error of the forward": {name: round(e, 5) for name, e in errors.items()},
        "layers": counts,
        "attention, 12 heads x 1088 x 64": small,
        "attention, 24 heads x 4608 x 128": large,
        "int8 linear 1024 x 768 x 3072": product,
        "bars": {
            **{name: {"gain": round(gains[name], 2), "bar": bar, "met": gains[name] >= bar}
               for name, bar in BARS.items()},
            **{f"error, {name}": {"error": round(errors[name], 5), "bar": bar, "met": errors[name] <= bar}
               for name, bar in ERRORS.items()},
        },
    }  # fmt: skip
    save("stack", numbers, 0)


if __name__ == "__main__":
    main()
