"""Quantizers side by side: torchao, modelopt's fake quantization and hasten, on the same linears of the same model.

    pip install torchao nvidia-modelopt         # in an environment of its own; hasten does not need them
    python benchmarks/peers_quantize.py runs/flux-emoji/teacher runs/emoji [--compiled]

Error: of the trained Flux pipeline, the network's relative output error over recorded calls of held-out captions, and
the PSNR of pictures to the unquantized ones. Time: of one call of the 50 M Flux-class network of ``adapter.py``,
untrained, 1,056 tokens, in turns.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from adapter import flux
from common import save
from peers import CALL, Requests, psnr, quiet, shown, versions
from torch import Tensor, nn

from hasten import speed_up
from hasten.measure.clock import latency
from hasten.speed import Cast, Compile, Quantize
from hasten.speed.calibrate import calibrate
from hasten.speed.host import host

Change = Callable[[Any, dict[str, Any], ExitStack], None]  # changes the pipeline, called as it is


def chosen(pipe: Any, call: dict[str, Any], side: int) -> set[nn.Module]:
    """The linears that hasten quantizes: for everybody the same."""
    return {linear for _, _, linear in Quantize(min_side=side)._chosen(host(pipe, call))}


def of_torchao(config: str, side: int | None) -> Change:
    """``side`` None: all linears, its default."""

    def change(pipe: Any, call: dict[str, Any], stack: ExitStack) -> None:
        from torchao import quantization

        picked = None if side is None else chosen(pipe, call, side)
        test = lambda m, _: isinstance(m, nn.Linear) and (picked is None or m in picked)  # noqa: E731
        quantization.quantize_(pipe.transformer, getattr(quantization, config)(), filter_fn=test)

    return change


def of_modelopt(name: str, side: int, calls: list[dict[str, Any]] | None) -> Change:
    """Calibrated on ``calls``; None: on the call that is timed."""

    def change(pipe: Any, call: dict[str, Any], stack: ExitStack) -> None:
        import modelopt.torch.quantization as mtq

        picked = chosen(pipe, call, side)
        left = [n for n, m in pipe.transformer.named_modules() if isinstance(m, nn.Linear) and m not in picked]
        inputs = calls or [captured(pipe, call)]

        def loop(net: Any) -> None:
            with torch.no_grad():
                for one in inputs:
                    net(**one)

        mtq.quantize(pipe.transformer, getattr(mtq, name), loop)
        for n in left:
            mtq.disable_quantizer(pipe.transformer, f"{n}.*")

    return change


def of_hasten(*transforms: Any) -> Change:
    def change(pipe: Any, call: dict[str, Any], stack: ExitStack) -> None:
        stack.enter_context(speed_up(pipe, *transforms, call=call))

    return change


def captured(pipe: Any, call: dict[str, Any], steps: int = 1) -> dict[str, Any]:
    """The arguments of the network's first call."""
    seen: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
    pipe(**call, num_inference_steps=steps, output_type="latent")
    hook.remove()
    return seen[0]


def record(requests: Requests, every: int = 5) -> list[dict[str, Any]]:
    """The arguments of every fifth call."""
    seen: list[dict[str, Any]] = []
    keep = lambda m, a, k: seen.append({n: v.clone() if isinstance(v, Tensor) else v for n, v in k.items()})  # noqa: E731
    hook = requests.pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    requests.draw(slice(None))
    hook.remove()
    return seen[::every]


def outputs(net: Any, calls: list[dict[str, Any]]) -> Tensor:
    with torch.no_grad():
        return torch.stack([net(**one)[0].float() for one in calls])


def quality(teacher: Path, emoji: Path, prompts: int, side: int = 128) -> dict[str, Any]:
    """Errors on the trained model; the width of its blocks is 192, so linears from 128 are taken."""
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(teacher, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    call = {**CALL, "prompt": "red apple"}
    requests = Requests(pipe, (emoji / "held_out.txt").read_text().splitlines()[:prompts], 1.0)
    learn = Requests(pipe, (emoji / "train.txt").read_text().splitlines()[:8], 1.0, seed=2)
    calls, learnt = record(requests), record(learn)
    want, (_, images) = outputs(pipe.transformer, calls), requests.draw(slice(None))
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/calibration.safetensors"
        calibrate(pipe, [lambda p: learn.draw(slice(0, 4))], 50, call=call).save(file)
        q = lambda **fields: of_hasten(Quantize(min_side=side, **fields))  # noqa: E731
        runs: dict[str, Change] = {
            "torchao int8 dynamic": of_torchao("Int8DynamicActivationInt8WeightConfig", side),
            "torchao int8 dynamic, all linears": of_torchao("Int8DynamicActivationInt8WeightConfig", None),
            "torchao int8 weight-only": of_torchao("Int8WeightOnlyConfig", side),
            "modelopt INT8 SmoothQuant": of_modelopt("INT8_SMOOTHQUANT_CFG", side, learnt),
            "modelopt FP8": of_modelopt("FP8_DEFAULT_CFG", side, learnt),
            "hasten int8": q(),
            "hasten int8, smooth search": q(smooth="search", calibration=file),
            "hasten int8_weights": q(dtype="int8_weights"),
            "hasten int4_weights, search": q(dtype="int4_weights", smooth="search", calibration=file),
            "hasten fp8, row": q(dtype="fp8", emulate=True),
            "hasten fp8, tensor": q(dtype="fp8", emulate=True, scaling="tensor"),
            "bfloat16": of_hasten(Cast()),
        }
        found: dict[str, Any] = {}
        original = pipe.transformer
        for name, change in runs.items():
            pipe.register_modules(transformer=copy.deepcopy(original))
            try:
                with ExitStack() as stack:
                    change(pipe, call, stack)
                    got = outputs(pipe.transformer, calls)
                    made = requests.draw(slice(None))[1]
            except Exception as error:  # that one cannot run here is a result
                found[name] = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
                print(name, found[name], flush=True)
                continue
            found[name] = {
                "relative error": round(float((got - want).norm() / want.norm()), 5),
                "PSNR": round(sum(psnr(a, b, 1.0) for a, b in zip(made, images, strict=True)) / len(made), 2),
            }
            print(name, found[name], flush=True)
        pipe.register_modules(transformer=original)
    return {"calls": len(calls), "prompts": prompts, "linears from": side, "rows": found}


def regional(change: Change | None) -> Change:
    """``change`` and diffusers' compilation of the repeated blocks."""

    def both(pipe: Any, call: dict[str, Any], stack: ExitStack) -> None:
        if change:
            change(pipe, call, stack)
        pipe.transformer.compile_repeated_blocks(fullgraph=True)

    return both


def times(repeats: int, compiled: bool) -> dict[str, Any]:
    """Latency of one call of the large untrained network, in turns."""
    dynamic, only = "Int8DynamicActivationInt8WeightConfig", "Int8WeightOnlyConfig"
    runs: dict[str, tuple[torch.dtype, Change | None]] = {
        "float32": (torch.float32, None),
        "bfloat16": (torch.bfloat16, None),
        "torchao int8 dynamic": (torch.bfloat16, of_torchao(dynamic, 512)),
        "torchao int8 weight-only": (torch.bfloat16, of_torchao(only, 512)),
        "hasten int8 + cast": (torch.float32, of_hasten(Quantize(), Cast())),
        "modelopt INT8 SmoothQuant (fake)": (torch.float32, of_modelopt("INT8_SMOOTHQUANT_CFG", 512, None)),
    }
    if compiled:
        runs |= {
            "bfloat16, compiled": (torch.bfloat16, regional(None)),
            "torchao int8 dynamic, compiled": (torch.bfloat16, regional(of_torchao(dynamic, 512))),
            "hasten int8 + cast, compiled": (torch.float32, of_hasten(Quantize(), Cast(), Compile())),
        }
    thunks, failed = {}, {}
    with ExitStack() as stack:
        for name, (dtype, change) in runs.items():
            pipe, call = flux()
            pipe.set_progress_bar_config(disable=True)
            inputs = captured(pipe, call)
            host(pipe, call)  # probed while all of it is float32
            pipe.transformer.to(dtype)
            cast = {
                k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() and k not in ("timestep", "guidance")
                else v for k, v in inputs.items()
            }  # fmt: skip

            def thunk(net: Any = pipe.transformer, cast: Any = cast) -> None:
                with torch.no_grad():
                    net(**cast)

            try:
                if change:
                    change(pipe, call, stack)
                thunk()
                thunks[name] = thunk
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
            print(name, failed.get(name, "ready"), flush=True)
        found = latency(thunks, repeats, 1)
    base = found["float32"].p50
    rows = {n: {"ms": round(1e3 * v.p50, 1), "best ms": round(1e3 * min(v.times), 1), "times": round(base / v.p50, 2)}
            for n, v in found.items()}  # fmt: skip
    return {"repeats": repeats, "rows": rows, "failed": failed}


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("teacher", type=Path)
    parser.add_argument("emoji", type=Path)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quiet()
    shown(f"--prompts {args.prompts} --repeats {args.repeats}" + " --compiled" * args.compiled)
    numbers = {"versions": versions(), "quality": quality(args.teacher, args.emoji, args.prompts)}
    save("peers-quantize", numbers, 1)
    save("peers-quantize", {**numbers, "latency": times(args.repeats, args.compiled)}, 1)


if __name__ == "__main__":
    main()
