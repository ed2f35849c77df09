"""Load exported folders in a fresh process with diffusers alone, run them, and write down what they did.

This file imports nothing of hasten: ``python -P reload.py JOBS.json`` is what somebody does who has only the folder.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from torch import Tensor

LORA, METADATA = (
    "pytorch_lora_weights.safetensors",
    "lora_adapter_metadata",
)  # a file of adapters, peft's settings in it
MISSING = "missing"
Seen = dict[str, Tensor]  # "times" [n], "latents" [B, ...] after the last step, "images" as the pipeline returns them


def watch(pipe: Any, call: Mapping[str, Any], steps: int, seed: int) -> tuple[Seen, str]:
    """What ``pipe(**call, num_inference_steps=steps)`` does from a seed of torch's own generator.

    Returns:
        What was seen, and the name of the output: ``images`` or ``frames``.
    """
    times: list[float] = []
    latents: list[Tensor] = []
    known, inner = inspect.signature(pipe.__call__).parameters, pipe.scheduler.step

    @functools.wraps(inner)  # pipelines look at the signature
    def step(*args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        times.append(float(inspect.signature(inner).bind(*args, **kwargs).arguments["timestep"]))
        latents[:] = [result[0] if isinstance(result, tuple) else result.prev_sample]
        return result

    fresh = {k: list(v) if isinstance(v, list) else v for k, v in call.items()}  # some write templates into the prompts
    extra = {"generator": torch.default_generator, "output_type": "np"}
    pipe.scheduler.step = step
    pipe.set_progress_bar_config(disable=True)
    try:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            out = pipe(**fresh, num_inference_steps=steps, **{k: v for k, v in extra.items() if k in known})
    finally:
        del pipe.scheduler.step
    name, value = next(iter(out.items()))
    images = torch.as_tensor(np.stack([np.asarray(v) for v in value])).float()
    seen = {"times": torch.tensor(times, dtype=torch.float64), "latents": latents[-1].float().cpu(), "images": images}
    return seen, name


def pack(value: Any, folder: File) -> Any:
    """``value`` as JSON, its pictures as files in ``folder``. Raises TypeError for what is neither."""
    if isinstance(value, Mapping):
        return {k: pack(v, folder) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [pack(v, folder) for v in value]
    if callable(getattr(value, "save", None)) and hasattr(value, "getpixel"):
        name = f"picture-{len(list(folder.glob('picture-*.png')))}.png"
        value.save(folder / name)
        return {"picture": name}
    json.dumps(value)
    return value


def unpack(value: Any, folder: File) -> Any:
    """The inverse of :func:`pack`."""
    if isinstance(value, dict) and value.keys() == {"picture"}:
        from PIL import Image

        return Image.open(folder / value["picture"])
    if isinstance(value, dict):
        return {k: unpack(v, folder) for k, v in value.items()}
    return [unpack(v, folder) for v in value] if isinstance(value, list) else value


def load(job: Mapping[str, Any]) -> Any:
    """The pipeline in ``folder``, with the adapters and the scheduler in ``lora`` where there is one."""
    return finished(job, base(job))


def base(job: Mapping[str, Any]) -> Any:
    """The pipeline in ``folder``, as diffusers loads it."""
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    dtype = {name: getattr(torch, dtype) for name, dtype in job["dtype"].items()}
    return DiffusionPipeline.from_pretrained(job["folder"], dtype=dtype)


def finished(job: Mapping[str, Any], pipe: Any) -> Any:
    """``pipe`` with what else a job names: adapters and their scheduler, tiles, a device."""
    import diffusers

    if job["lora"]:
        if job.get("by_hand"):
            add_adapters(pipe, File(job["lora"]) / LORA)
        else:
            pipe.load_lora_weights(job["lora"])
        config = json.loads((File(job["lora"]) / "scheduler" / "scheduler_config.json").read_text())
        pipe.scheduler = getattr(diffusers, config["_class_name"]).from_pretrained(job["lora"], subfolder="scheduler")
    for name in job["tiled"]:
        getattr(pipe, name).enable_tiling()
    return pipe.to(job["device"])


@torch.no_grad()
def add_adapters(pipe: Any, file: File) -> None:
    """Add the adapters of a file to the weights of ``pipe``, as peft would apply them."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        settings = json.loads(opened.metadata()[METADATA])
        for key in (k for k in opened.keys() if k.endswith(".lora_A.weight")):
            name, path = key.removesuffix(".lora_A.weight").split(".", 1)
            down, up = opened.get_tensor(key), opened.get_tensor(key.replace("lora_A", "lora_B"))
            added = settings[f"{name}.lora_alpha"] / settings[f"{name}.r"] * up @ down
            weight = getattr(pipe, name).get_submodule(path).weight
            weight.copy_((weight.to(added.dtype) + added).to(weight.dtype))


def main(file: str) -> None:
    """Do the jobs of a file: a list of folder, dtypes, call, steps, seed, device and the file for what was seen.

    A job that is ``optional`` has a folder that this machine may not hold whole; the reason takes the place of what
    was seen.
    """
    from safetensors.torch import save_file

    for job in json.loads(File(file).read_text()):
        try:
            pipe = base(job)
        except Exception as error:  # diffusers and the hub raise a dozen types for what is missing
            if not job.get("optional"):
                raise
            save_file({}, job["seen"], {MISSING: (str(error).splitlines() or ["no message"])[0]})
            continue
        call = unpack(job["call"], File(job["lora"] or job["folder"]))
        seen, _ = watch(finished(job, pipe), call, job["steps"], job["seed"])
        save_file({k: v.contiguous() for k, v in seen.items()}, job["seen"])


if __name__ == "__main__":
    assert "hasten" not in sys.modules
    main(sys.argv[1])
