"""A pipeline made ready to be distilled, its prompts encoded and its encoders freed; and made whole again."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from hasten import clips, run
from hasten.captioned import Captions, content, encode_pictures, grouped, load_captioned
from hasten.core.errors import CheckpointError, ConfigError, UnsupportedModel
from hasten.core.method import Sampling
from hasten.core.sample import sample
from hasten.distribute import checkpoints, digest, seal, world
from hasten.encoded import Buckets, Encoded
from hasten.frozen import Rounded, Rounding, round_blocks
from hasten.lora import in_place
from hasten.models.diffusers import PipelineDenoiser, denoiser
from hasten.models.encode import encode, spelled
from hasten.models.encoders import Kept, free, restore
from hasten.models.latents import Layout, layout
from hasten.models.refuse import several
from hasten.models.schedulers import scheduler_for
from hasten.prompts import too_long
from hasten.synthesize import DONE, describe, identity, read, subjects, synthetic
from hasten.whole import write

Size = tuple[int, int]  # (height, width) in pixels
Tell = Callable[[str, int, int], None]  # (what, done, wanted)
THIS = "run.json"  # in a run's folder: what it is a run of, and of which step its student is saved
OTHER = {
    "model": "another model", "prompts": "other prompts", "data": "other data (pictures or samples)",
    "call": "another call", "quantize_base": "another quantize_base",
}  # fmt: skip


def silent(what: str, done: int, wanted: int) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Hosted:
    """A pipeline ready to be distilled: its denoiser, its encoded prompts, and what was freed and rounded of it."""

    pipe: Any
    net: PipelineDenoiser
    source: Encoded | Buckets
    layouts: Mapping[tuple[int, ...], Layout]
    freed: list[Kept]
    rounded: Rounded | None = None
    learns: frozenset[str] = frozenset()  # the network's parameters that required gradients
    work: File | None = None
    keep: Any = None  # the temporary folder in which all this lies, where there is no other

    def restore(self) -> None:
        """Bring back the pipeline's encoders, and its own weights where they were rounded; once is enough.

        An encoder for which the device has no room any more waits on the CPU, with a warning.
        """
        while self.freed:
            try:
                restore(self.pipe, self.freed[:1])
            except torch.OutOfMemoryError:
                name = self.freed[0].name
                warnings.warn(f"There is no room for {name} on {self.freed[0].device}; it is on the CPU.", stacklevel=2)
                restore(self.pipe, [replace(self.freed[0], device=torch.device("cpu"))])
            del self.freed[0]
        if self.work:  # what another run would take for a home of its own
            shutil.rmtree(self.work / own("encoders"), ignore_errors=True)
        if self.rounded:
            self.rounded.restore()
        for name, p in self.net.net.named_parameters():
            p.requires_grad_(name in self.learns)

    def pictures(self, net: Any, sampling: Sampling, count: int = 16, seed: int = 0) -> Tensor:
        """Images [count, 3, H, W] in [-1, 1] of the first prompts; of a video its middle frame."""
        first = self.source.sources[0] if isinstance(self.source, Buckets) else self.source
        device, index = next(self.net.parameters()).device, [i % first.prompts for i in range(count)]
        found = []
        for start in range(0, count, 4):
            batch = first.rows(index[start : start + 4], device)
            noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(seed + start)).to(device)
            uncond = batch.uncond if sampling.cfg_scale != 1 else None
            x = sample(net, noise, batch.cond, sampling, uncond=uncond)
            images = self.layouts[first.shape].decode(self.pipe.vae, x).float().cpu()
            found.append(images[:, :, images.shape[2] // 2] if images.ndim == 5 else images)
        return torch.cat(found)


def host(
    pipe: Any,
    *,
    prompts: Any = None,
    data: Any = None,
    call: Mapping[str, Any] | None = None,
    sizes: Sequence[Size] = (),
    device: torch.device | str = "cpu",
    work: File | str | None = None,
    ways: Callable[[PipelineDenoiser], Sequence[Sampling]] | None = None,
    quantize_base: Rounding | None = None,
    tell: Tell = silent,
) -> Hosted:
    """Probe ``pipe``, encode its prompts (and data), free its encoders, and round its network.

    Args:
        prompts: What ``read_prompts`` takes, or class labels; with data their captions are taken.
        data: Captioned pictures (what ``load_captioned`` takes), or the folder of ``hasten synthesize``.
        call: How the pipeline is called: height, width, guidance_scale, negative_prompt ...
        sizes: (height, width) in pixels of several buckets; none: the call's own.
        work: Folder for conditions and latents; what is there is taken. None is a temporary one.
        ways: How a student of this denoiser will be sampled; each is tried now.
        quantize_base: ``int8`` or ``int4``: the linears in the network's blocks are rounded, for adapters.

    Raises:
        CheckpointError: If ``work`` holds checkpoints of another model, prompts, data, call or rounding.
        ConfigError: For neither prompts nor data, or both, or a call for several images of a prompt.
        UnsupportedModel: If the pipeline cannot be learnt, or no stock scheduler samples in one of the ``ways``, so
            that the student could not be exported.
    """
    several(call or {})
    keep = None if work else tempfile.TemporaryDirectory()
    work = File(work or keep.name)  # type: ignore[union-attr]
    pipe.to(device)
    made = synthetic(data)
    if made is not None:
        if prompts is not None or call or sizes:
            given = "prompts" if prompts is not None else "call" if call else "sizes"
            raise ConfigError(f"{made} was synthesized with prompts and a call of its own; leave {given} out.")
        prompts, call = describe(made, pipe)
        data = None
    pictures = data if isinstance(data, Captions) or data is None else load_captioned(data)
    if (prompts is None) == (pictures is None):
        raise ConfigError("Give either prompts or data with captions; the prompts of data are their captions.")
    nets: list[PipelineDenoiser] = []
    layouts: dict[tuple[int, ...], Layout] = {}
    for size in sizes or (None,):
        at = {} if size is None else {"height": size[0], "width": size[1]}
        nets.append(denoiser(pipe, {**(call or {}), **at}))
        layouts[nets[-1].shape] = layout(pipe, nets[-1])
    frames = next(iter(layouts.values())).pixels[1:-2]
    for i in range(len(pictures)) if pictures is not None and frames else ():
        tell("counting frames", i, len(pictures))  # type: ignore[arg-type]
        clips.start(pictures.length(i), frames[0], getattr(pictures.pictures[i], "name", f"number {i}"))  # type: ignore[union-attr]
    if odd := in_place(nets[0].net):
        raise UnsupportedModel(
            f"The pipeline's {odd} is quantized in place, which diffusers cannot save; load it plain, round it with "
            "quantize_base while adapters train, or let from_pretrained quantize the student."
        )
    for sampling in ways(nets[0]) if ways else ():
        scheduler_for(pipe, nets[0], sampling)
    pixels = [(layouts[net.shape].pixels[-2], layouts[net.shape].pixels[-1]) for net in nets]
    groups = grouped(pictures, pixels) if pictures is not None else [None] * len(nets)
    texts = subjects(prompts, nets[0]) if prompts is not None else []
    if nets[0].found.subject == "prompt":
        too_long([t for k, t in pipe.components.items() if "tokenizer" in k], texts or list(pictures.captions), 4)  # type: ignore[union-attr]
    keys = []
    for group in groups:
        reading = partial(tell, "reading pictures")
        keys.append("" if group is None else content(pictures, group, reading))  # type: ignore[arg-type]
    data_hash = digest(made / DONE) if made else "".join(keys)
    this = about_run(pipe, texts or pictures.captions, data_hash, [net.found.call for net in nets], quantize_base)  # type: ignore[union-attr]
    same_run(work, this)
    work = run.writable(work)  # only now, so that a refused run leaves nothing behind
    if not checkpoints(work) and world()[0] == 0:
        write(work / THIS, lambda file: file.write_text(json.dumps(this, indent=1)))
    sources = []
    for net, group, key in zip(nets, groups, keys, strict=True):
        mine = texts if group is None else [pictures.captions[i] for i in group]  # type: ignore[union-attr]
        if not mine:
            continue
        folder = encode(pipe, net, mine, made or work, tell=lambda done, total: tell("encoding prompts", done, total))
        latents = made
        if group is not None:
            assert pictures is not None
            done, place = partial(tell, "encoding pictures"), folder / f"pictures-{key[:12]}"
            latents = encode_pictures(pipe.vae, layouts[net.shape], pictures, group, place, done)
        sources.append(Encoded(folder, net.shape, latents))
    first = nets[0]
    for net in nets[1:]:
        first.templates |= net.templates
    source = sources[0] if len(sources) == 1 else Buckets(tuple(sources))
    learns = frozenset(name for name, p in first.net.named_parameters() if p.requires_grad)
    there = Hosted(pipe, first, source, layouts, free(pipe, work / own("encoders")), None, learns, work, keep)
    try:
        if quantize_base:
            rounded = round_blocks(first.net, list(first.found.blocks), quantize_base, work / "backbone.safetensors")
            there = replace(there, rounded=rounded)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    except BaseException:
        there.restore()
        raise
    return there


def own(name: str) -> str:
    """The name of a rank's own file or folder: one rank must not remove what another still reads."""
    return f"rank{world()[0]}-{name}" if world()[0] else name


# --- one folder, one run ------------------------------------------------------------------------------------------


def about_run(
    pipe: Any, texts: Sequence[Any], data: str, calls: Sequence[Mapping[str, Any]], rounding: str | None
) -> dict[str, Any]:
    """What must be the same for a folder to belong to a run: for each what it is in words, and what tells it apart."""
    known, home = identity(pipe), getattr(pipe, "name_or_path", "") or ""
    first = str(texts[0]) if len(str(texts[0])) < 40 else f"{str(texts[0])[:40]} ..."
    return {
        "model": [f"{type(pipe).__name__} {home}".strip(), known["pipeline"], known["network"]],
        "prompts": [f"{len(texts)}, first {first!r}", seal({"texts": list(texts)})],
        "data": ["", data],
        "call": [{k: spelled({k: v}) for k, v in call.items()} for call in calls],
        "quantize_base": [str(rounding), str(rounding)],
    }


def same_run(work: File, this: Mapping[str, Any]) -> None:
    """Raise CheckpointError, in words, where ``work`` holds checkpoints of a run that is not ``this`` one."""
    if not checkpoints(work) or not (work / THIS).is_file():
        return
    found = read(work / THIS)
    for key, mine in this.items():
        theirs = found.get(key) or [""]
        if key == "call":
            pairs: list[Any] = [(a, b) for a, b in zip_longest(theirs, mine, fillvalue={}) if a != b]
            names = [next(k for k in {**a, **b} if a.get(k) != b.get(k)) for a, b in pairs]
            words = [(a.get(k, "its default"), b.get(k, "its default")) for k, (a, b) in zip(names, pairs, strict=True)]
        else:
            words = [(theirs[0], mine[0])] if theirs[1:] != mine[1:] else []
        if words:
            there, here = words[0]
            said = f": {there} there, {here} here" if there != here else ""
            raise CheckpointError(
                f"{work} belongs to another run, of {OTHER[key]}{said}; choose another output folder, or delete it to "
                "start anew."
            )


def saved_step(work: File) -> int | None:
    """The step whose student was saved whole in ``work``; None for none."""
    return read(work / THIS).get("saved") if (work / THIS).is_file() else None


def note_saved(work: File, step: int) -> None:
    """Note in ``work`` that the student of this step was saved whole; a run that begins anew forgets it."""
    if (work / THIS).is_file():
        this = {**read(work / THIS), "saved": step}
        write(work / THIS, lambda file: file.write_text(json.dumps(this, indent=1)))
