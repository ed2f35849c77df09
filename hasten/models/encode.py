"""Conditions of many prompts, encoded once by the pipeline itself and kept on disk, so that encoders can be freed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path as File
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from hasten.core.errors import ConfigError, UnsupportedModel
from hasten.models.diffusers import PipelineDenoiser, of, template
from hasten.models.probe import Call, networks, record, walk
from hasten.models.template import SIZE, Latent, Time, conditions, single
from hasten.whole import write, write_tensors

SHARD = 256  # prompts a file
FORMAT = "hasten-conditions-1"


def encode(
    pipe: Any,
    net: PipelineDenoiser,
    prompts: Sequence[Any],
    folder: File | str,
    *,
    shard: int = SHARD,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> File:
    """Encode every prompt as the pipeline does when it is called, and write the conditions as safetensors shards.

    A prompt that is there several times is encoded and stored once. What is whole on disk is not encoded again: an
    interrupted run goes on at its last whole shard. Where the length of a
    condition follows the prompt's, each prompt is encoded beside the longest one, so that the pipeline itself pads
    and masks it.

    Args:
        net: Its template is learnt anew for the longest prompt, and its ``uncond`` padded likewise.
        prompts: Texts, or class labels for a class-conditional pipeline.
        folder: Holds a folder for every (pipeline, call, prompts), so another model never reads them.
        tell: Called with (encoded, wanted) after every prompt, of the different ones.

    Returns:
        The folder: ``conditions-00000.safetensors`` ... with [n, ...] of each condition, ``uncond.safetensors`` with
        [1, ...] where the pipeline is guided, and ``conditions.json`` with the row of every prompt in them.

    Raises:
        ConfigError: For no prompts.
        UnsupportedModel: If the unconditional condition cannot be padded as the others are.
    """
    if not len(prompts):
        raise ConfigError("There are no prompts to encode; give at least one.")
    about = {"format": FORMAT, "pipeline": fingerprint(pipe), "call": spelled(net.found.call), "shape": list(net.shape)}
    key = hashlib.sha256(json.dumps([about, list(prompts)]).encode()).hexdigest()[:12]
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    order, prompts = [place[prompt] for prompt in prompts], list(place)
    folder = File(folder) / f"conditions-{key}"
    done = folder / "conditions.json"
    if done.is_file():
        longest = json.loads(done.read_text())["longest"]
    else:
        folder.mkdir(parents=True, exist_ok=True)
        longest = longest_of(pipe, net, prompts)
    if longest is not None:
        net.templates[net.shape] = relearnt(pipe, net, longest)
    for i, start in enumerate(range(0, len(prompts), shard)):
        some, file = prompts[start : start + shard], folder / f"conditions-{i:05d}.safetensors"
        if rows_in(file) != len(some):
            rows = []
            for prompt in some:
                rows.append(one(pipe, net, prompt, longest))
                tell(start + len(rows), len(prompts))
            write_tensors(file, stacked(rows))
        tell(start + len(some), len(prompts))
    if net.probed is not None:
        if rows_in(folder / "uncond.safetensors") != 1:
            write_tensors(folder / "uncond.safetensors", unconditional(pipe, net, longest))
        net.uncond = load_file(folder / "uncond.safetensors")
    found = {**about, "shard": shard, "longest": longest, "rows": order}
    write(done, lambda file: file.write_text(json.dumps(found)))
    return folder


def spelled(call: Call) -> str:
    """A call in words that are the same in another process: a picture is the hash of its content."""
    return repr(walk(call, lambda v: hashlib.sha256(v.tobytes()).hexdigest() if hasattr(v, "getbands") else v))


def rows_in(file: File) -> int:
    """How many rows a shard has; 0 where it is missing or cannot be read, so that it is made again."""
    try:
        with safe_open(file, "pt") as shard:
            return min((shard.get_slice(name).get_shape()[0] for name in shard.keys()), default=0)
    except (SafetensorError, OSError):
        return 0


def fingerprint(pipe: Any) -> str:
    """SHA-256 of the pipeline's class and of the first weights of every encoder, in hexadecimal."""
    found = hashlib.sha256(type(pipe).__name__.encode())
    for name, module in sorted(pipe.components.items()):
        if isinstance(module, nn.Module) and module not in networks(pipe):
            found.update(name.encode())
            for p in module.parameters():
                found.update(p.detach().flatten()[:16].double().cpu().numpy().tobytes())
    return found.hexdigest()


def one(pipe: Any, net: PipelineDenoiser, prompt: Any, longest: Any = None) -> dict[str, Tensor]:
    """The conditions of one prompt, each [1, ...]; padded to those of ``longest``, which may be None.

    A shorter one goes along too, because a mask that hides nothing is often left out.
    """
    values = [prompt] if longest is None else [prompt, longest, longest[: len(longest) // 2]]
    call = of({**net.found.call, **net.found.quiet}, net.found.subject, values)
    return single(conditions(net.templates[net.shape], record(pipe, call, 2, stop=0).looks[-1]), 0)


def longest_of(pipe: Any, net: PipelineDenoiser, prompts: Sequence[Any]) -> Any:
    """The prompt with the longest conditions, the negative one included; None where their size is always the same."""

    def size(prompt: Any) -> int:
        found = one(pipe, net, prompt)
        return sum(v.numel() for k, v in found.items() if k + SIZE not in found)  # lists are padded by us

    value = net.found.call[net.found.subject][0]
    if not isinstance(value, str) or size(value) == size(value[: len(value) // 2]):
        return None
    return max([*prompts, value, *negative(net)], key=size)


def negative(net: PipelineDenoiser) -> list[str]:
    """The call's negative prompt as a list of one; the empty text where it has none."""
    text = net.found.call.get("negative_prompt") or ""
    return [text[0] if isinstance(text, list) else text]


def relearnt(pipe: Any, net: PipelineDenoiser, longest: Any) -> dict[str, Any]:
    """The template for conditions of the longest prompt's size: token positions, say, follow it."""
    kept = {k: v for k, v in net.templates[net.shape].items() if isinstance(v, (Latent, Time))}
    call = of({**net.found.call, **net.found.quiet}, net.found.subject, [longest])
    return {**template(pipe, call, net.found.subject, set(kept)), **kept}


def unconditional(pipe: Any, net: PipelineDenoiser, longest: Any) -> dict[str, Tensor]:
    """The unconditional condition, padded to the longest prompt's size."""
    assert net.probed is not None
    if longest is None:
        return net.probed
    alone = one(pipe, net, negative(net)[0])
    if alone.keys() != net.probed.keys() or any(not torch.equal(v, net.probed[k]) for k, v in alone.items()):
        raise UnsupportedModel(
            f"{type(pipe).__name__} makes its unconditional condition in another way than by encoding the negative "
            "prompt, and of another length; give cfg_scale 1, or prompts of one length."
        )
    return one(pipe, net, negative(net)[0], longest)


def stacked(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Conditions of single samples as [n, ...]; those of listed arguments are padded with zeros to the longest."""
    lists = {k for k in rows[0] if k + SIZE in rows[0]}
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        k: pad([row[k][0] for row in rows], batch_first=True) if k in lists else torch.cat([row[k] for row in rows])
        for k in rows[0]
    }
