"""A small Flux pipeline of real, captioned emoji: a stock FluxPipeline, so that what caching costs can be seen.

    python examples/flux_emoji/train.py runs/emoji --out runs/flux-emoji     # a few minutes on one core

Makes a ``FluxTransformer2DModel`` from the SD3 transformer of ``examples/emoji/train.py`` and fine-tunes it on the
same emoji, with that pipeline's autoencoder and text encoder frozen. Writes ``teacher/`` (for
``DiffusionPipeline.from_pretrained``), ``teacher.png`` and ``report.json``; goes on where it was interrupted.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import argparse
import copy
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent / "emoji"))  # before this folder, which has a train.py too

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from train import CPU, SHOWN, encoded, fit, show
from transformers import CLIPTextModel
from transformers.utils import logging as transformers_logging

import hasten
from hasten.role import autocast

TOKENS = 24  # of a prompt: the longest of 98 % of the captions
CALL: dict[str, Any] = {"height": 64, "width": 64, "max_sequence_length": TOKENS}


def main() -> None:
    """Build, train, save, look."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("emoji", type=Path, help="the --out of examples/emoji/train.py")
    parser.add_argument("--out", type=Path, default=Path("runs/flux-emoji"))
    parser.add_argument("--minutes", type=float, default=10, help="of processor time")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="needs a C++ compiler")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    hasten.keep_freed_memory()
    for log in (diffusers_logging, transformers_logging):
        log.set_verbosity_error()
        log.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    raw = np.load(args.emoji / "train.npz", allow_pickle=False)
    x, captions = hasten.from_arrays(raw["images"]).x, [str(c) for c in raw["captions"]]
    pipe = build(DiffusionPipeline.from_pretrained(args.emoji / "teacher", dtype=torch.float32), captions)
    report: dict[str, Any] = {"transformer": train(pipe, x, captions, args.minutes, args.out, args.compile)}
    report["parameters"] = {n: sum(p.numel() for p in m.parameters()) for n, m in networks(pipe).items()}
    pipe.save_pretrained(args.out / "teacher")
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    show(torch.cat([sample(pipe, SHOWN, scale) for scale in (1.0, 2.5)]), args.out / "teacher.png")
    print(json.dumps(report, indent=1))


def networks(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's parts by name."""
    return {n: getattr(pipe, n) for n in ("vae", "transformer", "text_encoder", "text_encoder_2")}


def build(emoji: Any, captions: list[str]) -> Any:
    """A FluxPipeline around the SD3 pipeline's parts: 16x16x4 latents, 64 image tokens of 16 channels.

    Where Flux has T5, there is CLIP without its last layer: the tokens' features that the SD3 transformer read.
    """
    pooled = CLIPTextModel(emoji.text_encoder.config)
    pooled.load_state_dict(emoji.text_encoder.text_model.state_dict())
    config = copy.deepcopy(pooled.config)
    config.num_hidden_layers -= 1
    words = CLIPTextModel(config)
    words.load_state_dict({k: v for k, v in pooled.state_dict().items() if k in words.state_dict()})
    old, width = emoji.transformer.config, config.hidden_size
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=old.num_layers + 1, num_single_layers=2,
        attention_head_dim=old.attention_head_dim, num_attention_heads=old.num_attention_heads,
        joint_attention_dim=width, pooled_projection_dim=width, guidance_embeds=False, axes_dims_rope=(36, 6, 6),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)  # as FLUX.1-dev's
    pipe = FluxPipeline(
        scheduler=scheduler, vae=emoji.vae, text_encoder=pooled, tokenizer=emoji.tokenizer, text_encoder_2=words,
        tokenizer_2=emoji.tokenizer, transformer=transformer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        part.eval().requires_grad_(False)
    convert(emoji, pipe, captions)
    return pipe


@torch.no_grad()
def convert(emoji: Any, pipe: Any, captions: list[str]) -> None:
    """Start from the SD3 transformer: Flux's double blocks are its blocks, one later, but for the positions.

    What reads the text is refitted to Flux's encoders by least squares over the captions. The single blocks begin as
    the identity (adaLN-zero). The first double block is new: :func:`place` teaches it the positions.
    """
    old, new = emoji.transformer, pipe.transformer
    later = re.compile(r"(?<=transformer_blocks\.)\d+")
    found = {later.sub(lambda m: str(int(m[0]) + 1), k): v for k, v in old.state_dict().items()}
    last, width = f"transformer_blocks.{old.config.num_layers}.", old.inner_dim
    patch = found.pop("pos_embed.proj.weight")  # [D, c, p, q], and a packed token is (c, p, q)
    found |= {"x_embedder.weight": patch.flatten(1), "x_embedder.bias": found.pop("pos_embed.proj.bias")}
    for k in ("proj_out.weight", "proj_out.bias"):  # rows (p, q, c)
        found[k] = found[k].unflatten(0, (2, 2, -1)).movedim(2, 0).flatten(0, 2)
    for k in ("weight", "bias"):  # the last block's text takes part in attention and goes no further
        scale, shift = found[f"{last}norm1_context.linear.{k}"].chunk(2)
        rest = torch.zeros(4 * width, *scale.shape[1:])
        found[f"{last}norm1_context.linear.{k}"] = torch.cat([shift, scale, rest])
    theirs, ours = [], []
    for start in range(0, min(len(captions), 1024), 64):
        lines = captions[start : start + 64]
        theirs.append(emoji.encode_prompt(lines, None, None, do_classifier_free_guidance=False, max_sequence_length=1))
        ours.append(pipe.encode_prompt(lines, None, max_sequence_length=TOKENS))
    words = torch.cat([v[0][:, :TOKENS] for v in theirs]).flatten(0, 1)
    pooled = torch.cat([v[2] for v in theirs])
    refits = (("context_embedder", 0, words), ("time_text_embed.text_embedder.linear_1", 1, pooled))
    for name, index, target in refits:
        x = torch.cat([v[index] for v in ours]).flatten(0, -2)
        x = torch.cat([x, torch.ones(len(x), 1)], 1)
        want = target @ found[f"{name}.weight"].T + found[f"{name}.bias"]
        fit_ = torch.linalg.lstsq(x, want, driver="gelsd").solution.T
        found[f"{name}.weight"], found[f"{name}.bias"] = fit_[:, :-1].contiguous(), fit_[:, -1].contiguous()
    for k, v in new.state_dict().items():
        if "single_transformer_blocks" in k and ".norm.linear" in k:
            found[k] = torch.zeros_like(v)
    new.load_state_dict({**new.state_dict(), **{k: v for k, v in found.items() if k != "pos_embed.pos_embed"}})
    place(pipe, old.pos_embed.cropped_pos_embed(16, 16)[0])


@torch.enable_grad()
def place(pipe: Any, positions: Tensor, steps: int = 600) -> None:
    """Teach the first block to add ``positions`` [64, D] to its tokens, whatever these are.

    SD3 adds an absolute position to every token; Flux only turns queries and keys by theirs. All text stands at
    position 0, so how far an image token attends to it tells where that token is, and the MLP makes the rest of it.
    The block begins blind to its input (a modulation with scale -1) and passes the text on (gates of 0).
    """
    net, block = pipe.transformer, pipe.transformer.transformer_blocks[0]
    width = positions.shape[1]
    with torch.no_grad():
        for norm, gates in ((block.norm1, 1.0), (block.norm1_context, 0.0)):
            norm.linear.weight.zero_()
            shift, scale, gate, *mlp = norm.linear.bias.view(6, width)
            shift.normal_()
            scale.fill_(-1.0)
            gate.fill_(gates)
            for row, value in zip(mlp, (0.0, 0.0, gates), strict=True):
                row.fill_(value)
    learnt = [p for n, p in block.named_parameters() if not n.startswith(("norm", "ff_context", "attn.to_add_out"))]
    opt = torch.optim.AdamW(learnt, 2e-3, weight_decay=0.0)
    rotary = net.pos_embed(
        torch.cat([torch.zeros(TOKENS, 3), pipe._prepare_latent_image_ids(1, 8, 8, CPU, torch.float32)])
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in opt.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        with torch.no_grad():
            x = net.x_embedder(1.2 * torch.randn(4, len(positions), 16, generator=generator))
            temb, text = torch.randn(4, width, generator=generator), torch.randn(4, TOKENS, width, generator=generator)
        found = block(hidden_states=x, encoder_hidden_states=text, temb=temb, image_rotary_emb=rotary)[1]
        loss = F.mse_loss(found - x, positions.expand_as(x))
        opt.zero_grad()
        loss.backward()
        opt.step()
        if step % 100 == 99:
            print(
                f"positions: step {step + 1}, error {float(loss.detach() / positions.var()):.4f} of their variance",
                flush=True,
            )


def train(
    pipe: Any, x: Tensor, captions: list[str], minutes: float, out: Path, fast: bool, batch: int = 16, drop: float = 0.1
) -> dict[str, float]:
    """Flow matching with logit-normal times (Esser et al. 2024) on latents and prompts encoded once."""
    vae = pipe.vae.config
    latents = (encoded(pipe.vae, x) - vae.shift_factor) * vae.scaling_factor
    n, c, h, w = latents.shape
    latents = pipe._pack_latents(latents, n, c, h, w)
    place = pipe._prepare_latent_image_ids(n, h // 2, w // 2, CPU, torch.float32)
    words, pooled = prompts(pipe, [*captions, ""])
    net = pipe.transformer
    if fast:
        net.compile_repeated_blocks()  # two graphs, however deep the network

    def loss(pick: Tensor, generator: torch.Generator) -> Tensor:
        x0 = latents[pick]
        eps = torch.randn(x0.shape, generator=generator)
        t = torch.randn(len(x0), generator=generator).sigmoid()
        dropped = torch.rand(len(x0), generator=generator) < drop
        line = torch.where(dropped, len(captions), pick)
        x_t = torch.lerp(x0, eps, t[:, None, None])
        found = net(
            hidden_states=x_t, encoder_hidden_states=words[line], pooled_projections=pooled[line], timestep=t,
            img_ids=place, txt_ids=torch.zeros(TOKENS, 3), return_dict=False,
        )[0]  # fmt: skip
        return F.mse_loss(found.float(), eps - x0)

    file = out / "checkpoints" / "transformer.safetensors"
    file.parent.mkdir(exist_ok=True)
    log = fit(net, loss, len(x), batch, 3e-4, minutes, file, 0.99)
    for module in net.modules():
        module._compiled_call_impl = None
    return log


@torch.no_grad()
def prompts(pipe: Any, lines: list[str]) -> tuple[Tensor, Tensor]:
    """The pipeline's own encodings [N, TOKENS, D] and [N, D]."""
    found = [
        pipe.encode_prompt(lines[i : i + 64], None, max_sequence_length=TOKENS)[:2] for i in range(0, len(lines), 64)
    ]
    return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])


def sample(pipe: Any, lines: Any, scale: float, steps: int = 50, seed: int = 0) -> Tensor:
    """Images [N, 3, 64, 64] in [-1, 1] in batches of 32; a ``scale`` above 1 is true guidance, two calls a step."""
    made, generator = [], torch.Generator().manual_seed(seed)
    for start in range(0, len(lines), 32):
        part = list(lines[start : start + 32])
        guided = {"negative_prompt": [""] * len(part), "true_cfg_scale": scale} if scale > 1 else {}
        with autocast("auto", CPU):
            made.append(pipe(
                part, num_inference_steps=steps, generator=generator, output_type="pt", **guided, **CALL,
            ).images.float())  # fmt: skip
    return torch.cat(made) * 2 - 1


if __name__ == "__main__":
    main()
