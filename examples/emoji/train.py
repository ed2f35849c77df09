"""A small text-to-image model of real, captioned emoji, as a stock diffusers SD3 pipeline: something to make fast.

    python examples/emoji/train.py              # about an hour on one core; goes on where it was interrupted
    python examples/emoji/train.py --quick      # under two minutes, bad pictures

Writes ``teacher/`` (for ``DiffusionPipeline.from_pretrained``), ``judge.safetensors`` (for ``hasten.Judge.load``),
``train.txt`` and ``held_out.txt`` (captions), ``train.npz`` (what a student may learn from), ``report.json`` and
pictures into ``--out``. A tenth of the emoji is held out: neither model nor judge learns from it, and its distance to
the rest is the judge's floor.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils import logging as diffusers_logging
from model import TOKENS, CountedAttention, build, networks, tokenizer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

import hasten
from hasten.measure.files import read_tensors, write_tensors
from hasten.role import autocast

DATA = Path(os.environ.get("HASTEN_DATA", "../shared/data")) / "noto_emoji64.npz"
CPU = torch.device("cpu")
SHOWN = (
    "red apple", "grinning face", "runner, skin tone type-4, female sign", "rocket", "panda face", "hedgehog",
    "octopus", "clock face two oclock", "face with cowboy hat", "waving hand sign, skin tone type-5", "pizza", "crab",
)  # fmt: skip


def main() -> None:
    """Every stage in turn; a finished one is read back."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--data", type=Path, default=DATA, help="npz with images [N, 64, 64, 3] uint8 and captions [N]")
    parser.add_argument("--minutes-vae", type=float, default=12)
    parser.add_argument("--minutes", type=float, default=35, help="for the transformer and its text encoders")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="needs a C++ compiler")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    args = parser.parse_args()
    if args.quick:
        args.minutes_vae, args.minutes, args.compile = 0.2, 0.3, False
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    hasten.keep_freed_memory()
    for log in (diffusers_logging, transformers_logging):
        log.set_verbosity_error()  # the silent T5's prompt is cut on purpose
        log.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)

    (x, captions), (held_x, held_captions) = split(args.data)
    for name, lines in (("train", captions), ("held_out", held_captions)):
        (args.out / f"{name}.txt").write_text("\n".join(lines) + "\n")
    images = ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    np.savez_compressed(args.out / "train.npz", images=images, captions=np.array(captions))
    pipe = build(tokenizer(captions))
    report: dict[str, Any] = {"vae": train_vae(pipe.vae, x, args.minutes_vae, args.out)}
    show(torch.cat([held_x[:12], reconstructed(pipe.vae, held_x[:12])]), args.out / "vae.png")
    report["vae"]["held_out_l1"] = float((reconstructed(pipe.vae, held_x) - held_x).abs().mean())
    report["transformer"] = train_transformer(pipe, x, captions, args.minutes, args.out, args.compile)
    for part in (pipe.transformer, pipe.vae):
        part.half()  # half the file; diffusers reads it as float32, but transformers would keep the encoders' half
    pipe.save_pretrained(args.out / "teacher")
    pipe.to(torch.float32)
    report["parameters"] = {n: sum(p.numel() for p in m.parameters()) for n, m in networks(pipe).items()}
    report["same_in_a_fresh_process"] = check(pipe, args.out)
    report["quality"] = measure(pipe, x, held_x, held_captions, args.out, args.quick)
    (args.out / "report.json").write_text(json.dumps(report, indent=1))
    scales = (1.0, 2.5, 4.0)
    show(torch.cat([sample(pipe, SHOWN, scale, 4 if args.quick else 50) for scale in scales]), args.out / "teacher.png")
    print(json.dumps(report, indent=1))


# --- data -------------------------------------------------------------------------------------------------------------


def split(file: Path) -> tuple[tuple[Tensor, list[str]], tuple[Tensor, list[str]]]:
    """(images [N, 3, 64, 64] in [-1, 1], captions) to train on, and a fixed tenth held out."""
    raw = np.load(file, allow_pickle=False)
    x, captions = hasten.from_arrays(raw["images"]).x, [str(c) for c in raw["captions"]]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).tolist()
    held, rest = order[: len(x) // 10], order[len(x) // 10 :]
    return (x[rest], [captions[i] for i in rest]), (x[held], [captions[i] for i in held])


# --- training ---------------------------------------------------------------------------------------------------------


def fit(
    net: nn.Module, loss: Callable[[Tensor, torch.Generator], Tensor], count: int, batch: int, rate: float,
    minutes: float, file: Path, average: float = 0.999,
) -> dict[str, float]:  # fmt: skip
    """AdamW whose rate falls linearly to zero over ``minutes`` of processor time; leaves the moving average in ``net``.

    ``loss`` takes indices [batch] below ``count``, every one once an epoch, and the step's own random generator.
    The state is written into ``file`` every three minutes and at the end, and read from there.
    """
    params, form = dict(net.named_parameters()), "emoji-checkpoint-1"
    opt = torch.optim.AdamW(params.values(), rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = {k: p.detach().clone() for k, p in params.items()}
    step, spent, mean, saved = 0, 0.0, 0.0, 0.0
    if file.is_file():
        found, about = read_tensors(file, form, "training state")
        step, spent, mean = about["step"], about["seconds"], about["loss"]
        saved = spent
        with torch.no_grad():
            for k, p in params.items():
                p.copy_(found[f"net/{k}"])
                ema[k].copy_(found[f"ema/{k}"])
                opt.state[p] = {s: found[f"{s}/{k}"] for s in ("step", "exp_avg", "exp_avg_sq")}

    def save() -> None:
        tensors = {f"net/{k}": p for k, p in params.items()} | {f"ema/{k}": e for k, e in ema.items()}
        for k, p in params.items():
            tensors |= {f"{s}/{k}": v for s, v in opt.state[p].items()}
        about = {"format": form, "step": step, "seconds": spent, "loss": mean}
        write_tensors(file, {k: v.contiguous() for k, v in tensors.items()}, about)

    net.train()
    epoch = count // batch
    while (left := 1 - spent / (60 * minutes)) > 0:
        start = time.process_time()  # other programs on the machine cost no training
        for group in opt.param_groups:
            group["lr"] = rate * left * min(1, (step + 1) / 100)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(step // epoch))
        pick = order[step % epoch * batch :][:batch]
        with autocast("auto", CPU):
            value = loss(pick, torch.Generator().manual_seed(2**32 + step))
        opt.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(params.values(), 1.0)
        opt.step()
        step += 1
        with torch.no_grad():
            share = 1 - min(average, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(ema.values()), list(params.values()), share)
        mean += (float(value.detach()) - mean) / min(step, 200)
        spent += min((time.process_time() - start) / torch.get_num_threads(), 5.0)  # a compilation is not training
        if step % 100 == 0:
            print(f"{file.stem}: step {step}, {spent / 60:.1f} min, loss {mean:.4f}", flush=True)
        if spent - saved > 180:
            saved = spent
            save()
    if spent > saved:
        save()
    with torch.no_grad():
        for k, p in params.items():
            p.copy_(ema[k])
    net.eval().requires_grad_(False)
    return {"steps": step, "epochs": round(step / epoch, 1), "minutes": round(spent / 60, 1), "loss": mean}


class ContiguousNorm(nn.GroupNorm):
    """Group norm whose backward, dear on channels-last memory, runs on contiguous memory."""

    def forward(self, input: Tensor) -> Tensor:
        y = F.group_norm(input.contiguous(), self.num_groups, self.weight, self.bias, self.eps)
        return y.contiguous(memory_format=torch.channels_last)


def train_vae(vae: Any, x: Tensor, minutes: float, out: Path, batch: int = 16, kl: float = 1e-4) -> dict[str, float]:
    """L1 and L2, the hue's twice, and a little KL; latents are shifted and scaled to mean 0 and deviation 1."""
    norms = [m for m in vae.modules() if isinstance(m, nn.GroupNorm)]
    for m in norms:
        m.__class__ = ContiguousNorm
    vae.to(memory_format=torch.channels_last)

    def loss(pick: Tensor, generator: torch.Generator) -> Tensor:
        images = x[pick].contiguous(memory_format=torch.channels_last)
        latent = vae.encode(images).latent_dist
        again = vae.decode(latent.sample(generator)).sample.float()
        error = again - images
        colour = error - error.mean(1, keepdim=True)  # under L1 alone green and purple stay grey for long
        nats = latent.kl().mean() / latent.mean[0].numel()
        return error.abs().mean() + error.square().mean() + colour.abs().mean() + kl * nats

    log = fit(vae, loss, len(x), batch, 1e-3, minutes, out / "checkpoints" / "vae.safetensors", 0.99)
    for m in norms:
        m.__class__ = nn.GroupNorm
    vae.to(memory_format=torch.contiguous_format)
    latents = encoded(vae, x)
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=1 / float(latents.std()))
    return log | {"shift_factor": vae.config.shift_factor, "scaling_factor": vae.config.scaling_factor}


@torch.no_grad()
def encoded(vae: Any, x: Tensor) -> Tensor:
    """Latent means [N, 4, 16, 16], not yet shifted and scaled."""
    with autocast("auto", CPU):
        return torch.cat([vae.encode(part).latent_dist.mode().float() for part in x.split(32)])


@torch.no_grad()
def reconstructed(vae: Any, x: Tensor) -> Tensor:
    """Images [N, 3, 64, 64] through the autoencoder and back."""
    return torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in x.split(32)]).clamp(-1, 1)


def train_transformer(
    pipe: Any, x: Tensor, captions: list[str], minutes: float, out: Path, fast: bool, batch: int = 32, drop: float = 0.1
) -> dict[str, float]:
    """Flow matching with logit-normal times (Esser et al. 2024), transformer and text encoders together."""
    vae = pipe.vae.config
    latents = (encoded(pipe.vae, x) - vae.shift_factor) * vae.scaling_factor

    def tokens(lines: list[str]) -> Tensor:
        return pipe.tokenizer(lines, padding="max_length", max_length=TOKENS, truncation=True,
                              return_tensors="pt").input_ids  # fmt: skip

    ids, empty = tokens(captions), tokens([""])
    stock = pipe.transformer.attn_processors
    attention = CountedAttention(latents.shape[-1] ** 2 // 4 + TOKENS + 1)
    pipe.transformer.set_attn_processor(attention)
    net = nn.ModuleDict({n: m for n, m in networks(pipe).items() if n != "vae"})
    velocity = torch.compile(pipe.transformer) if fast else pipe.transformer

    def loss(pick: Tensor, generator: torch.Generator) -> Tensor:
        x0 = latents[pick]
        eps = torch.randn(x0.shape, generator=generator)
        t = torch.randn(len(x0), generator=generator).sigmoid()
        dropped = torch.rand(len(x0), 1, generator=generator) < drop
        attention.count(2 ** int(torch.randint(9, (), generator=generator)))  # any max_sequence_length up to 256
        words = torch.where(dropped, empty, ids[pick])
        found = [e(words, output_hidden_states=True) for e in (pipe.text_encoder, pipe.text_encoder_2)]
        context = F.pad(torch.cat([f.hidden_states[-2] for f in found], -1), (0, 0, 0, 1))
        pooled = torch.cat([f.text_embeds for f in found], -1)
        x_t = torch.lerp(x0, eps, t[:, None, None, None])
        return F.mse_loss(velocity(x_t, context, pooled, 1000 * t, return_dict=False)[0].float(), eps - x0)

    log = fit(net, loss, len(x), batch, 1e-3, minutes, out / "checkpoints" / "transformer.safetensors")
    pipe.transformer.set_attn_processor(stock)
    return log


# --- looking ----------------------------------------------------------------------------------------------------------


def sample(pipe: Any, prompts: Any, scale: float, steps: int, seed: int = 0) -> Tensor:
    """Images [N, 3, 64, 64] in [-1, 1] of the pipeline itself, in batches of 32."""
    made, generator = [], torch.Generator().manual_seed(seed)
    for start in range(0, len(prompts), 32):
        with autocast("auto", CPU):
            made.append(pipe(
                list(prompts[start : start + 32]), guidance_scale=scale, num_inference_steps=steps,
                max_sequence_length=1, generator=generator, output_type="pt",
            ).images.float())  # fmt: skip
    return torch.cat(made) * 2 - 1


def measure(pipe: Any, x: Tensor, held_x: Tensor, captions: list[str], out: Path, quick: bool) -> dict[str, Any]:
    """Quality at several guidance scales for the held-out captions, in features that no reference image trained.

    ``found`` is the share of samples whose caption's own emoji is among the ten of the held-out ones that are
    nearest in these features; ``l1`` the samples' mean distance to their caption's emoji, in pixel values.
    """
    learn, reference = x[: len(x) // 3], x[len(x) // 3 :]
    features = hasten.classifier(learn, None, 0, seed=0, iterations=20 if quick else 1500)
    judge = hasten.Judge(features, reference, held_out=held_x)
    judge.save(out / "judge.safetensors")
    count = 16 if quick else len(captions)
    real, numbers = features(held_x), {"floor": judge.floor}
    for scale in (2.5,) if quick else (1.0, 1.5, 2.5, 4.0):
        made = sample(pipe, captions[:count], scale, 4 if quick else 28)
        near = torch.cdist(features(made), real).topk(10, largest=False).indices
        numbers[f"guidance {scale}"] = judge(made, interval=True) | {
            "found": float((near == torch.arange(count)[:, None]).any(1).float().mean()),
            "l1": float((made - held_x[:count]).abs().mean()),
        }
        print(f"guidance {scale}: {numbers[f'guidance {scale}']}", flush=True)
    return numbers


FRESH = """
import sys, torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
folder, threads, file = sys.argv[1:]
torch.set_num_threads(int(threads))
pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
call = dict(prompt="red apple", num_inference_steps=4, output_type="pt")
save_file({"x": pipe(**call, generator=torch.Generator().manual_seed(0)).images}, file)
"""


def check(pipe: Any, out: Path) -> float:
    """Largest difference of pixels, in [0, 1], between this pipeline and the saved one in a fresh process."""
    file = out / "again.safetensors"
    arguments = [str(out / "teacher"), str(torch.get_num_threads()), str(file)]
    subprocess.run([sys.executable, "-c", FRESH, *arguments], check=True, capture_output=True)
    again = load_file(file)["x"]
    file.unlink()
    call = {"prompt": "red apple", "num_inference_steps": 4, "output_type": "pt"}
    return float((again - pipe(**call, generator=torch.Generator().manual_seed(0)).images).abs().max())


def show(x: Tensor, file: Path, columns: int = 12) -> None:
    """Images [N, 3, H, W] in [-1, 1] as one PNG with ``columns`` a row."""
    from PIL import Image

    rows = [torch.cat(list(row), -1) for row in x.clamp(-1, 1).split(columns)]
    grid = ((torch.cat(rows, -2).permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    Image.fromarray(grid).save(file)


if __name__ == "__main__":
    main()
