"""What each way of rounding costs a trained pipeline in quality: of the network's output, and of whole images.

``python benchmarks/quantize_quality.py EMOJI`` takes the folder that ``examples/emoji/train.py`` wrote. The calibration
sees other captions than the measurement. No time is measured: the network is small and half the types are emulated.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from common import save
from torch import Tensor

from hasten.measure.quality import psnr
from hasten.models.load import load_pipeline
from hasten.speed import Cast, Quantize, speed_up
from hasten.speed.budget import distance, outputs
from hasten.speed.calibrate import calibrate
from hasten.speed.host import host

STEPS = 28
SIDE = 192  # the width of the emoji transformer: all linears of its blocks but modulation


def images(pipe: Any, prompts: list[str], call: dict[str, Any], flip: bool = False) -> Tensor:
    """[N, 3, 64, 64] in [-1, 1] from fixed noise; with ``flip``, one number of it is the next float32."""
    size = pipe.transformer.config.sample_size
    noise = torch.randn(len(prompts), 4, size, size, generator=torch.Generator().manual_seed(0))
    if flip:
        noise[:, 0, 0, 0] = torch.nextafter(noise[:, 0, 0, 0], torch.tensor(torch.inf))
    made = pipe(prompts, **call, latents=noise, num_inference_steps=STEPS, output_type="pt")
    return made.images.float() * 2 - 1


def rows(file: str) -> dict[str, Any]:
    """The stacks that are compared, by name."""
    known: dict[str, dict[str, Any]] = {
        "int8": {},
        "int8, smooth 0.5": {"smooth": 0.5},
        "int8, smooth searched": {"smooth": "search"},
        "int8, rank 16": {"rank": 16},
        "int8_static": {"dtype": "int8_static"},
        "int8_static, smooth 0.5": {"dtype": "int8_static", "smooth": 0.5},
        "int8_static, smooth 0.5, 4 ranges": {"dtype": "int8_static", "smooth": 0.5, "ranges": 4},
        "int8_weights": {"dtype": "int8_weights"},
        "fp8, tensor": {"dtype": "fp8", "scaling": "tensor", "emulate": True},
        "fp8, row": {"dtype": "fp8", "emulate": True},
        "fp8, block": {"dtype": "fp8", "scaling": "block", "emulate": True},
        "mxfp8": {"dtype": "mxfp8", "emulate": True},
        "int4_weights": {"dtype": "int4_weights"},
        "int4_weights, AWQ": {"dtype": "int4_weights", "smooth": "search"},
        "int4_weights, AWQ, rank 16": {"dtype": "int4_weights", "smooth": "search", "rank": 16},
        "nvfp4": {"dtype": "nvfp4", "emulate": True},
        "nvfp4, smooth searched": {"dtype": "nvfp4", "smooth": "search", "emulate": True},
        "nvfp4, smooth searched, rank 16": {"dtype": "nvfp4", "smooth": "search", "rank": 16, "emulate": True},
        "nvfp4, error within 3 %": {"dtype": "nvfp4", "max_error": 0.03, "emulate": True},
    }
    made = {name: Quantize(min_side=SIDE, calibration=file, **fields) for name, fields in known.items()}
    return {"bfloat16": Cast(), **made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("emoji", type=Path)
    parser.add_argument("--scale", type=float, default=3.0, help="guidance")
    parser.add_argument("--prompts", type=int, default=4, help="that are drawn")
    parser.add_argument("--learnt", type=int, default=12, help="others, that calibrate")
    args = parser.parse_args()
    diffusers.logging.set_verbosity_error()  # captions are one token for this encoder, and it warns of the rest
    pipe = load_pipeline(str(args.emoji / "teacher"))
    pipe.set_progress_bar_config(disable=True)
    captions = (args.emoji / "held_out.txt").read_text().splitlines()
    shown, learnt = captions[: args.prompts], captions[args.prompts :][: args.learnt]
    call = {"guidance_scale": args.scale, "max_sequence_length": 1}
    probe = {"prompt": shown[0], **call}
    want = images(pipe, shown, call)
    numbers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = calibrate(pipe, learnt, STEPS, ranges=4, call=call, rows=256).save(Path(folder) / "calibration")
        calls = calibrate(pipe, shown[:2], STEPS, call=call, calls=40, rows=1, seed=100).calls
        at = host(pipe, call)
        exact = outputs(at, calls)
        for name, transform in rows(file).items():
            up = speed_up(pipe, transform, call=probe)
            with up as fast:
                error = distance(outputs(at, calls), exact)
                made = images(fast, shown, call)
            counts = {k: v for k, v in next(iter(up.ledger().values())).items() if k in ("share", "kept_sensitive")}
            numbers[name] = {"error": round(error, 5), "psnr": round(psnr(made, want), 2)} | counts
            print(name, numbers[name], flush=True)
    floor = psnr(images(pipe, shown, call, flip=True), want)
    about = {"steps": STEPS, "guidance": args.scale, "images": len(shown), "calibrated on": len(learnt)}
    about["psnr with one number of the noise changed by its last bit"] = round(floor, 2)
    save("quantize-quality", {"about": about, "rows": numbers}, seed=0)


if __name__ == "__main__":
    main()
