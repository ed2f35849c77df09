"""Step caches side by side: diffusers' own, cache-dit's and hasten's on one trained Flux pipeline, in one run.

    pip install cache-dit                       # in an environment of its own; hasten does not need it
    python benchmarks/peers.py runs/flux-emoji/teacher runs/emoji --guidance 1 --prompts 12

Every configuration draws the same held-out captions from the same noise, one prompt a request, prompts outside and
configurations inside. Counted is what was not computed: a step is skipped when at least half of the multiplications in
its blocks did not happen, and ``saved`` weighs every step by the share that did not. ``peers_quantize.py`` compares
quantizers; ``peers_front.py`` writes the tables of docs/peers.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from common import save
from peers_front import front, leading
from peers_plan import planned
from torch import Tensor, nn

from hasten import speed_up
from hasten.core.errors import HastenError
from hasten.speed import Cache
from hasten.speed.cache import calibrate

STEPS = 50
CALL: dict[str, Any] = {"height": 64, "width": 64, "max_sequence_length": 24}
Entry = tuple[str, str, str, Callable[[Any], Any]]  # whose, sweep, point, what switches it on and returns the undo


class Meter:
    """Counts, call by call of a transformer, the multiplications of the linears inside its blocks."""

    def __init__(self, net: nn.Module):
        self.calls: list[float] = []
        net.register_forward_pre_hook(lambda *_: self.calls.append(0.0))
        for name in ("transformer_blocks", "single_transformer_blocks"):
            for m in getattr(net, name).modules():
                if isinstance(m, nn.Linear):
                    m.register_forward_pre_hook(self.linear)

    def linear(self, module: Any, args: Any) -> None:
        self.calls[-1] += args[0].numel() * module.out_features

    def read(self) -> list[float]:
        """Of every call since the last reading."""
        calls, self.calls = self.calls, []
        return calls


class Requests:
    """The same prompts and noise for everybody, encoded and drawn once."""

    def __init__(self, pipe: Any, captions: list[str], guidance: float, seed: int = 1):
        self.pipe, self.captions, self.guidance = pipe, captions, guidance
        with torch.no_grad():
            self.words, self.pooled, _ = pipe.encode_prompt(captions, None, max_sequence_length=24)
            self.empty = pipe.encode_prompt([""], None, max_sequence_length=24)[:2]
        self.noise = torch.randn(len(captions), 64, 16, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.captions)

    def draw(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Latents [n, 64, 16] and images [n, 3, 64, 64] in [0, 1]."""
        n = len(self.captions[rows])
        guided: dict[str, Any] = {}
        if self.guidance > 1:
            guided = {
                "true_cfg_scale": self.guidance,
                "negative_prompt_embeds": self.empty[0].expand(n, -1, -1),
                "negative_pooled_prompt_embeds": self.empty[1].expand(n, -1),
            }
        latents = self.pipe(
            prompt_embeds=self.words[rows], pooled_prompt_embeds=self.pooled[rows], latents=self.noise[rows].clone(),
            num_inference_steps=STEPS, output_type="latent", **guided, **CALL,
        ).images  # fmt: skip
        vae = self.pipe.vae
        with torch.no_grad():
            z = self.pipe._unpack_latents(latents, 64, 64, self.pipe.vae_scale_factor)
            x = vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
        return latents, (x / 2 + 0.5).clamp(0, 1)


def psnr(got: Tensor, want: Tensor, span: float) -> float:
    """In dB, at most 100."""
    error = float((got.double() - want.double()).square().mean())
    return min(100.0, 10 * torch.tensor(span**2 / max(error, 1e-30)).log10().item())


# --- the peers --------------------------------------------------------------------------------------------------------


def of_diffusers(config: Any) -> Callable[[Any], Any]:
    def on(pipe: Any) -> Any:
        pipe.transformer.enable_cache(config)
        return pipe.transformer.disable_cache

    return on


def mag_ratios(learn: Requests) -> list[float]:
    """MagCache's ratios, by its own calibration, averaged over all training prompts: more than its authors take."""
    from diffusers import MagCacheConfig

    net, found = learn.pipe.transformer, []
    for i in range(len(learn)):
        net.enable_cache(MagCacheConfig(num_inference_steps=STEPS, calibrate=True))
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            learn.draw(slice(i, i + 1))
        net.disable_cache()
        line = next(line for line in said.getvalue().splitlines() if line.startswith("[") and "Mag" not in line)
        found.append(torch.tensor([float(v) for v in line.strip("[]").split(",")]))
    return torch.stack(found).mean(0).tolist()


def diffusers_sweep(learn: Requests) -> Iterator[Entry]:
    from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

    for threshold in (0.02, 0.04, 0.07, 0.12, 0.2, 0.35):
        config = FirstBlockCacheConfig(threshold=threshold)
        yield "diffusers", "FirstBlockCache", str(threshold), of_diffusers(config)
    for lite in (False, True):
        for order in (0, 1, 2) if lite else (1,):
            for interval in (2, 3, 5, 7, 10) if lite else (3, 7):
                config = TaylorSeerCacheConfig(
                    cache_interval=interval, max_order=order, use_lite_mode=lite, taylor_factors_dtype=torch.float32
                )
                name = f"TaylorSeer{' lite' if lite else ''}, order {order}"
                yield "diffusers", name, f"interval {interval}", of_diffusers(config)
    if learn.guidance == 1:  # its calibration prints one branch only
        ratios = mag_ratios(learn)
        for most, kept in ((3, 0.2), (8, 0.1)):
            for threshold in (0.02, 0.06, 0.15, 0.35):
                config = MagCacheConfig(
                    threshold=threshold, max_skip_steps=most, retention_ratio=kept, num_inference_steps=STEPS,
                    mag_ratios=ratios,
                )  # fmt: skip
                yield "diffusers", f"MagCache, K {most}, kept {kept}", str(threshold), of_diffusers(config)


def of_cache_dit(calibrator: Any = None, **fields: Any) -> Callable[[Any], Any]:
    def on(pipe: Any) -> Any:
        import cache_dit

        cache_dit.enable_cache(
            pipe, cache_config=cache_dit.DBCacheConfig(**fields), calibrator_config=calibrator and calibrator()
        )
        return lambda: cache_dit.disable_cache(pipe)

    return on


def cache_dit_sweep() -> Iterator[Entry]:
    import cache_dit

    forecasts: dict[str, Any] = {
        "": None,
        " + TaylorSeer 1": lambda: cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1),
        " + TaylorSeer 2": lambda: cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=2),
        " + DMD": lambda: cache_dit.DMDCalibratorConfig(),
    }
    for threshold in (0.08, 0.24):  # every other field as it comes
        yield "cache-dit", "default", str(threshold), of_cache_dit(residual_diff_threshold=threshold)
    for first, last in ((1, 0), (2, 0), (1, 1)):
        for name, forecast in forecasts.items():
            if forecast and (first, last) != (1, 0):
                continue
            for warmup, most in ((8, -1), (4, -1)) if not forecast and last == 0 < 2 - first else ((4, -1),):
                for threshold in (0.02, 0.06, 0.12, 0.25):
                    on = of_cache_dit(
                        forecast, Fn_compute_blocks=first, Bn_compute_blocks=last, max_warmup_steps=warmup,
                        max_continuous_cached_steps=most, residual_diff_threshold=threshold,
                    )  # fmt: skip
                    yield "cache-dit", f"F{first}B{last}{name}, warm-up {warmup}, run {most}", str(threshold), on
    masks = {p: cache_dit.steps_mask(total_steps=STEPS, mask_policy=p) for p in ("slow", "fast", "ultra")}
    masks |= {
        f"every {k}": [int(i < 4 or (i - 3) % k == 0 or i == STEPS - 1) for i in range(STEPS)] for k in (2, 3, 4, 6)
    }
    for name, forecast in forecasts.items():
        for mask, steps in masks.items():
            on = of_cache_dit(
                forecast, Fn_compute_blocks=1, Bn_compute_blocks=0, steps_computation_mask=list(steps),
                steps_computation_policy="static", num_inference_steps=STEPS,
            )  # fmt: skip
            yield "cache-dit", f"step mask{name}", mask, on


# --- ours -------------------------------------------------------------------------------------------------------------


def of_hasten(fields: dict[str, Any]) -> Callable[[Any], Any]:
    def on(pipe: Any) -> Any:
        up = speed_up(pipe, Cache(**fields), call={**CALL, "prompt": "red apple"})
        up.__enter__()

        def undo() -> None:
            with contextlib.suppress(HastenError):  # an inert threshold is a point of the sweep
                up.__exit__(None, None, None)

        return undo

    return on


def refused(error: HastenError) -> Callable[[Any], Any]:
    def on(pipe: Any) -> Any:
        raise error

    return on


def hasten_sweep(learn: Requests) -> Iterator[Entry]:
    """Every policy that works on a transformer; what must be calibrated or planned is so on ``learn``'s prompts."""

    def gated(name: str, thresholds: tuple[float, ...], **fields: Any) -> Iterator[Entry]:
        for threshold in thresholds:
            yield "hasten", name, str(threshold), of_hasten({**fields, "threshold": threshold})

    yield from gated("easycache", (0.02, 0.04, 0.08, 0.16), policy="easycache")
    yield from gated("easycache, run 10", (0.06, 0.12, 0.3), policy="easycache", warmup=3, max_skips=10)
    for degree in (1, 2):
        fields = {"policy": "taylor", "degree": degree, "warmup": 3, "max_skips": 10}
        yield from gated(f"taylor {degree}, gated", (0.04, 0.1, 0.25, 0.5), **fields)
        for n in (2, 3, 5, 7):
            fields = {"policy": "taylor", "degree": degree, "interval": n, "warmup": 3}
            yield "hasten", f"taylor {degree}, interval", str(n), of_hasten(fields)
        fields = {"policy": "firstblock", "degree": degree, "warmup": 3, "max_skips": 10}
        yield from gated(f"firstblock, degree {degree}", (0.03, 0.08, 0.2), **fields)
    yield from gated("firstblock", (0.03, 0.08, 0.2), policy="firstblock")
    yield from gated("dual, first 2", (0.05, 0.15), policy="dual", first=2, degree=1, max_skips=10)
    yield from gated("dicache", (0.03, 0.1, 0.2), policy="dicache")
    one = lambda pipe, i: learn.draw(slice(i, i + 1))  # noqa: E731
    runs = [lambda pipe, i=i: one(pipe, i) for i in range(len(learn))]
    for policy, thresholds in (("magcache", (0.03, 0.1, 0.3)), ("teacache", (0.03, 0.1, 0.3))):
        try:
            found = calibrate(learn.pipe, policy, runs, STEPS, call={**CALL, "prompt": "red apple"})
        except HastenError as error:
            yield "hasten", policy, "calibration", refused(error)
            continue
        yield from gated(policy, thresholds, policy=policy, **found)
    for name, point, fields in planned(learn, STEPS, {**CALL, "prompt": "red apple"}):
        yield "hasten", name, point, of_hasten(fields)


# --- running ----------------------------------------------------------------------------------------------------------


def run(requests: Requests, entries: list[Entry], meter: Meter, batch: int, write: Callable[[Any, Any], None]) -> None:
    """Every entry on every prompt; ``write`` is given the records, one an entry, and the failures after each."""
    records: dict[tuple[str, str, str], dict[str, Any]] = {}
    failed: dict[str, str] = {}
    for i in range(0, len(requests), batch):
        rows = slice(i, i + batch)
        meter.read()
        start = time.perf_counter()
        want = requests.draw(rows)
        plain, full = time.perf_counter() - start, meter.read()
        spans = [float(z.max() - z.min()) for z in want[0]]
        for who, sweep, point, on in entries:
            key = (who, sweep, point)
            if str(key) in failed:
                continue
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    undo = on(requests.pipe)
                    meter.read()  # hasten's probe
                    try:
                        start = time.perf_counter()
                        got = requests.draw(rows)
                        spent = time.perf_counter() - start
                    finally:
                        undo()
            except Exception as error:  # a peer's failure is a result
                failed[str(key)] = f"{type(error).__name__}: {str(error)[:200]}"
                print(key, failed[str(key)], flush=True)
                meter.read()
                continue
            calls = meter.read()
            assert len(calls) == len(full), (key, len(calls), len(full))
            record = records.setdefault(key, {"who": who, "sweep": sweep, "point": point, "each": []})
            share = len(calls) / STEPS
            about = {
                "skipped": sum(a < 0.5 * b for a, b in zip(calls, full, strict=True)) / share,
                "saved": sum(1 - a / b for a, b in zip(calls, full, strict=True)) / share,
                "time": spent / plain,
            }
            for z, x, z0, x0, span in zip(*got, *want, spans, strict=True):
                record["each"].append({**about, "psnr": psnr(x, x0, 1.0), "psnr_latents": psnr(z, z0, span)})
        again = requests.draw(rows)
        assert torch.equal(again[0], want[0]), "a cache left something behind"
        print(f"prompt {min(i + batch, len(requests))} of {len(requests)}: {len(records)} configurations", flush=True)
        averaged(records)
        write(list(records.values()), failed)


def averaged(records: dict[Any, dict[str, Any]]) -> None:
    """Means over the prompts, in place."""
    for found in records.values():
        for k in found["each"][0]:
            found[k] = round(sum(e[k] for e in found["each"]) / len(found["each"]), 3)


def versions() -> dict[str, str | None]:
    """Of the peers; None for one that is not installed."""
    found: dict[str, str | None] = dict.fromkeys(("diffusers", "cache-dit", "torchao", "nvidia-modelopt"))
    for name in found:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def shown(options: str) -> None:
    """Let results say the command with the paths of the example's README."""
    sys.argv[1:] = ["runs/flux-emoji/teacher", "runs/emoji", *options.split()]


def quiet() -> None:
    """No progress bars and no log lines of the peers."""
    from diffusers.utils import logging as of_diffusers_logging

    of_diffusers_logging.set_verbosity_error()
    of_diffusers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("teacher", type=Path, help="teacher/ of examples/flux_emoji/train.py")
    parser.add_argument("emoji", type=Path, help="the --out of examples/emoji/train.py")
    parser.add_argument("--guidance", type=float, default=1.0, help="true guidance above 1: two calls a step")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--batch", type=int, default=1, help="prompts a request; one decision is for all of them")
    parser.add_argument("--screen", type=Path, help="an earlier result, of one prompt: only its leading sweeps are run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="peers")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quiet()
    screen = " --screen benchmarks/results/peers-screen.json" if args.screen else ""
    shown(f"--guidance {args.guidance:g} --prompts {args.prompts} --batch {args.batch}{screen}")
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(args.teacher, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    captions = (args.emoji / "held_out.txt").read_text().splitlines()[: args.prompts]
    requests, meter = Requests(pipe, captions, args.guidance), Meter(pipe.transformer)
    learn = Requests(pipe, (args.emoji / "train.txt").read_text().splitlines()[:4], args.guidance, seed=2)
    entries = [*diffusers_sweep(learn), *hasten_sweep(learn)]
    if versions()["cache-dit"]:
        entries += cache_dit_sweep()
    if args.screen:
        keep = leading(json.loads(args.screen.read_text())["points"])
        entries = [e for e in entries if f"{e[0]} {e[1]}" in keep or e[1].startswith("schedule")]
        print(", ".join(sorted(keep)))
    print(f"{len(entries)} configurations", flush=True)
    about = {"parameters": sum(p.numel() for p in pipe.transformer.parameters()), "steps": STEPS,
             "guidance": args.guidance, "prompts a request": args.batch}  # fmt: skip

    def write(records: list[dict[str, Any]], failed: dict[str, str]) -> None:
        most = max(len(r["each"]) for r in records)
        whole = [r for r in records if len(r["each"]) == most]
        numbers = {
            "model": {**about, "captions": captions[:most]}, "versions": versions(),
            "at equal PSNR": front(whole), "at equal PSNR of latents": front(whole, "psnr_latents"),
            "failed": failed,
            "points": [{k: v for k, v in r.items() if k != "each"} | {"prompts": len(r["each"])} for r in records],
        }  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            save(args.name, numbers, 1)

    run(requests, entries, meter, args.batch, write)


if __name__ == "__main__":
    main()
