"""A student beside its teacher, for its card: what a request costs each on this machine, and how near they are."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.core.method import Sampling
from hasten.export import trained
from hasten.measure.clock import machine
from hasten.measure.quality import trajectory
from hasten.models.candidates import placed
from hasten.models.diffusers import PipelineDenoiser
from hasten.models.probe import networks, quiet, walk
from hasten.models.schedulers import components, fit
from hasten.unguided import stored, switched

REQUESTS = 3  # of each
LONG = 60.0  # seconds of the teacher's request after which one of each is enough


def compared(
    pipe: Any, student: PipelineDenoiser, sampling: Sampling, *, near: bool, requests: int = REQUESTS
) -> list[dict[str, Any]]:
    """Rows about the student and its teacher, from ``requests`` requests of each in turn, with the same noise.

    The teacher runs as the pipeline does by its defaults, its number of steps included. Seconds are medians, of
    whole requests of one sample: encoders, network and decoder. PSNR and SSIM are between the two samples of the
    same noise; beside them, as what is no likeness, between the teacher's own samples of different noise. Where the
    teacher's first request takes more than :data:`LONG` seconds it stays at one of each, and without that last row.

    Args:
        pipe: Whole; it is left as it is.
        near: Whether the student is meant to make what the teacher makes of the same noise.
    """
    net = trained(pipe, student)
    parts, call = components(pipe, net.net), dict(student.found.call)
    where = described(machine(next(net.parameters()).device))
    with placed(pipe, **parts):
        trial = fit(pipe, net, sampling)
    plain, inner = stored(pipe, trial.call)
    seen: dict[str, list[tuple[float, int, Tensor]]] = {"student": [], "teacher": []}
    for seed in range(requests):
        steps = {"num_inference_steps": len(sampling.times) - 1}
        with placed(pipe, **parts, scheduler=trial.scheduler), switched(pipe, inner):
            seen["student"].append(request(pipe, {**plain, **steps}, student.found.latent, seed))
        seen["teacher"].append(request(pipe, call, student.found.latent, seed))
        if seen["teacher"][-1][0] > LONG:
            break
    networks_of = {"student": [net.net], "teacher": networks(pipe)}
    rows: list[dict[str, Any]] = []
    for name, some in seen.items():
        size = sum(p.numel() for part in networks_of[name] for p in part.parameters())
        rows.append({
            "": name, "network calls": some[0][1], "seconds a request": median(s for s, _, _ in some),
            "parameters": f"{size:,}", "machine": where,
        })  # fmt: skip
    if near:
        own, made = (torch.cat([images for _, _, images in seen[k]]) for k in ("teacher", "student"))
        rows[0] |= likeness(own, made)
        if (count := len(seen["teacher"])) > 1:
            rows.append({"": "teacher, other noise", **likeness(own, own.roll(len(own) // count, 0))})
    return rows


def request(pipe: Any, call: Mapping[str, Any], latent: str, seed: int) -> tuple[float, int, Tensor]:
    """Seconds, network calls of one sample, and images [B, 3, H, W] in [-1, 1] (of videos their frames)."""
    known = inspect.signature(pipe.__call__).parameters
    extra = {"generator": torch.Generator().manual_seed(seed), "output_type": "np"}
    given = walk({**call, **{k: v for k, v in extra.items() if k in known}}, lambda v: v)
    with quiet(pipe), counted(networks(pipe), latent) as calls, torch.no_grad():
        wait()
        start = time.perf_counter()
        out = pipe(**given)
        wait()
        seconds = time.perf_counter() - start
    found = np.stack([np.asarray(v) for v in next(iter(out.values()))])
    images = torch.as_tensor(found).float() / (255 if found.dtype == np.uint8 else 1)
    return seconds, sum(calls), images.reshape(-1, *images.shape[-3:]).permute(0, 3, 1, 2) * 2 - 1


@contextmanager
def counted(nets: list[nn.Module], latent: str) -> Iterator[list[int]]:
    """How many samples every call of these networks gets: two, where guidance is one call of both conditions."""
    calls: list[int] = []

    def note(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(net.forward).bind(*args, **kwargs).arguments
        calls.append(len({**bound, **bound.get("kwargs", {})}[latent]))

    hooks = [net.register_forward_pre_hook(note, with_kwargs=True) for net in nets]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def likeness(own: Tensor, made: Tensor) -> dict[str, float]:
    """PSNR and SSIM of images to the teacher's."""
    found = trajectory(own, made)
    return {"PSNR, dB": found["psnr"], "SSIM": found["ssim"]}


def described(where: Mapping[str, Any]) -> str:
    """A machine in a few words."""
    threads = where["threads"]
    words = f"{where['cpu']}, {threads} thread{'s' * (threads > 1)}"
    return words if where["device"] == "cpu" else f"{where['device']}, {where['cpu']}"


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
