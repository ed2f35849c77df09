"""A diffusers pipeline made fast: probed, its prompts encoded, its encoders freed, a student trained and exported."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from hasten import fit as training
from hasten import recipe, run
from hasten.captioned import Captions, encode_pictures, grouped, load_captioned
from hasten.core.errors import CheckpointError, ConfigError, UnsupportedModel, unknown
from hasten.core.method import Sampling
from hasten.core.sample import sample
from hasten.encoded import Buckets, Encoded
from hasten.fit import Step
from hasten.frozen import TOP, Rounded, Rounding, round_blocks
from hasten.lora import adapters, in_place, is_view, view
from hasten.models.diffusers import PipelineDenoiser
from hasten.models.encode import encode
from hasten.models.encoders import free, restore
from hasten.models.latents import Layout, layout
from hasten.models.load import load_pipeline
from hasten.models.schedulers import scheduler_for
from hasten.prompts import read_prompts, too_long
from hasten.recipe import Recipe
from hasten.role import FitConfig
from hasten.synthesize import describe, guidable, probed, subjects, synthetic

Size = tuple[int, int]  # (height, width) in pixels
Tell = Callable[[str, int, int], None]  # (what, done, wanted)
LORA = 64  # the default rank


def _silent(what: str, done: int, wanted: int) -> None:
    pass


@dataclass(frozen=True)
class Hosted:
    """A pipeline ready to be distilled: its denoiser, its encoded prompts, and what was freed and rounded of it."""

    pipe: Any
    net: PipelineDenoiser
    source: Encoded | Buckets
    layouts: Mapping[tuple[int, ...], Layout]
    freed: Any
    rounded: Rounded | None = None
    keep: Any = None  # the temporary folder in which all this lies, where there is no other

    def restore(self) -> None:
        """Bring back the pipeline's encoders, and its own weights where they were rounded."""
        restore(self.pipe, self.freed)
        if self.rounded:
            self.rounded.restore()

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


@dataclass(frozen=True)
class Student:
    """A distilled pipeline: its denoiser (with adapters, or full weights) and how it is sampled, by step count."""

    hosted: Hosted
    net: PipelineDenoiser
    samplings: Mapping[int, Sampling]
    about: Mapping[str, Any]

    def pictures(self, count: int = 16, steps: int | None = None, seed: int = 0) -> Tensor:
        """Images [count, 3, H, W] in [-1, 1] of the first prompts, in ``steps`` steps (the most it knows)."""
        return self.hosted.pictures(self.net, self.samplings[steps or max(self.samplings)], count, seed)

    def whole(self) -> PipelineDenoiser:
        """The student on the pipeline's own weights, which come back with its encoders."""
        self.hosted.restore()
        if not self.hosted.rounded:
            return self.net
        twin = view(self.hosted.net, adapters(self.net))
        twin.load_state_dict(self.net.state_dict())
        return twin.requires_grad_(False).eval()

    def save_pretrained(
        self, folder: File | str, *, steps: int | None = None, lora: bool = False, push_to_hub: str | None = None
    ) -> File:
        """Write an ordinary diffusers folder for ``steps`` steps (the most it knows), proven by loading it back.

        Adapters of a rounded backbone are written with, and fused into, the pipeline's own weights; the card says so.

        Args:
            lora: Write the adapters alone, as diffusers' ``load_lora_weights`` reads them.
            push_to_hub: Also upload it to this repository of the Hugging Face hub.

        Raises:
            ConfigError: If the folder cannot be written, or no stock scheduler samples as the student does.
        """
        from hasten.export import export
        from hasten.progress import mosaic

        sampling = self.samplings[steps or max(self.samplings)]
        net = self.whole()
        grid = mosaic(self.hosted.pictures(net, sampling))
        return export(
            self.hosted.pipe, net, sampling, folder, about=dict(self.about), grid=grid, lora=lora,
            push_to_hub=push_to_hub,
        )  # fmt: skip

    def save_comfyui(self, file: File | str, *, lora: bool = False) -> File:
        """Write the network, or with ``lora`` its adapters, as one .safetensors file that ComfyUI reads.

        Raises:
            UnsupportedModel: If ComfyUI does not read diffusers' names of this network.
            ConfigError: If the file is no .safetensors, or adapters are asked of full weights.
        """
        from hasten.comfy import export_comfyui

        return export_comfyui(self.hosted.pipe, self.whole(), file, lora=lora)


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
    tell: Tell = _silent,
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
        ConfigError: For neither prompts nor data, or both.
        UnsupportedModel: If the pipeline cannot be learnt, or no stock scheduler samples in one of the ``ways``, so
            that the student could not be exported.
    """
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
        nets.append(probed(pipe, {**(call or {}), **at}))
        layouts[nets[-1].shape] = layout(pipe, nets[-1])
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
    work = run.writable(work)  # only now, so that a refused run leaves nothing behind
    sources = []
    for net, group in zip(nets, groups, strict=True):
        mine = texts if group is None else [pictures.captions[i] for i in group]  # type: ignore[union-attr]
        if not mine:
            continue
        folder = encode(pipe, net, mine, made or work, tell=lambda done, total: tell("encoding prompts", done, total))
        latents = made
        if group is not None:
            assert pictures is not None
            done = partial(tell, "encoding pictures")
            latents = encode_pictures(pipe.vae, layouts[net.shape], pictures, group, folder, done)
        sources.append(Encoded(folder, net.shape, latents))
    first = nets[0]
    for net in nets[1:]:
        first.templates |= net.templates
    source = sources[0] if len(sources) == 1 else Buckets(tuple(sources))
    freed, rounded = free(pipe, work / "encoders"), None
    if quantize_base:
        rounded = round_blocks(first.net, list(first.found.blocks), quantize_base, work / "backbone.safetensors")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return Hosted(pipe, first, source, layouts, freed, rounded, keep)


@dataclass(frozen=True)
class PipelineJob:
    """A recipe with its pipeline hosted, as ``hasten distill`` takes it; see :class:`hasten.run.Job`."""

    recipe: Recipe
    hosted: Hosted
    device: torch.device
    out: File

    @property
    def source(self) -> Any:
        return self.hosted.source

    @property
    def net(self) -> PipelineDenoiser:
        return self.hosted.net

    def preview(self, student: Any) -> Tensor:
        """Images of a student at the most steps it is trained for, always from the same noise."""
        return self.hosted.pictures(student.eval(), self.recipe.method.sampling(max(self.recipe.steps)))

    def save(self, step: Step) -> File:
        """Write the student's averaged weights as a diffusers folder, and the recipe; returns the folder.

        Adapters are fused into it, and written alone to ``out``/lora.
        """
        student = self.student(step)
        folder = student.save_pretrained(self.out / "model")
        if is_view(step.student):
            student.save_pretrained(self.out / "lora", lora=True)
        if self.recipe.format == "comfyui":
            student.save_comfyui(self.out / "comfyui.safetensors", lora=is_view(step.student))
        recipe.save(self.recipe, folder / "recipe.yaml")
        return folder

    def student(self, step: Step) -> Student:
        """The student of a step."""
        about = {
            "recipe": recipe.as_dict(self.recipe), "iterations": step.index, "rounded": self.recipe.quantize_base,
        }  # fmt: skip
        samplings = {n: self.recipe.method.sampling(n) for n in self.recipe.steps}
        return Student(self.hosted, step.student.eval(), samplings, about)


def prepare(wanted: Recipe) -> PipelineJob:
    """Load the pipeline of a recipe, encode its prompts, and free its encoders; bars say how far it is.

    Raises:
        ConfigError: For a pipeline, prompts, data or a folder that cannot be used.
        UnsupportedModel: If the pipeline cannot be learnt.
    """
    from rich.progress import Progress

    device, out = run.pick(wanted.device), File(wanted.out).expanduser()
    if wanted.prompts and wanted.data:
        raise ConfigError("Give either prompts or data: the prompts of data are their captions; leave prompts out.")
    if wanted.prompts:
        read_prompts(wanted.prompts)  # what is wrong with them is said before the pipeline is loaded
    pipe = load_pipeline(wanted.pipeline or "", device)
    with Progress(transient=True) as progress:
        bars: dict[str, Any] = {}

        def tell(what: str, done: int, total: int) -> None:
            bars.setdefault(what, progress.add_task(what, total=total) if what not in bars else None)
            progress.update(bars[what], completed=done)

        there = host(
            pipe, prompts=wanted.prompts, data=wanted.data, call=wanted.call, sizes=wanted.sizes, device=device,
            work=out, ways=lambda net: [suited(wanted.method, net, wanted.steps).sampling(n) for n in wanted.steps],
            quantize_base=wanted.quantize_base, tell=tell,
        )  # fmt: skip
    return PipelineJob(replace(wanted, method=suited(wanted.method, there.net, wanted.steps)), there, device, out)


def suited(method: Any, net: PipelineDenoiser, steps: Sequence[int]) -> Any:
    """``method`` for these step counts, guided as the pipeline is by default where its ``cfg_scale`` is left open.

    Raises:
        ConfigError: If it guides and the pipeline has no unconditional condition, or cannot train for these steps.
    """
    method = recipe.for_steps(method, steps)
    guides = getattr(method, "from_teacher", True)  # else it learns from data alone
    if net.uncond is not None and guides and getattr(method, "cfg_scale", 1.0) is None:
        method = replace(method, cfg_scale=net.found.cfg_scale)
    for name in ("cfg_scale", "self_cfg_scale"):
        guidable(net, getattr(method, name, None))
    return method


def distill(
    teacher: Any,
    method: Any,
    *,
    steps: int | Sequence[int] = (1, 2, 4),
    prompts: Any = None,
    data: Any = None,
    lora_rank: int | None = None,
    quantize_base: Rounding | None = None,
    call: Mapping[str, Any] | None = None,
    sizes: Sequence[Size] = (),
    fit: FitConfig | None = None,
    device: torch.device | str = "cpu",
    out: File | str | None = None,
    tell: Tell = _silent,
) -> Any:
    """The student that ``method`` makes of ``teacher`` for ``steps`` sampling steps.

    Args:
        teacher: A diffusers pipeline, or a native network; it is left as it is, but a pipeline's encoders wait
            outside its memory until the student is saved.
        method: Such as ``hasten.DMD2()``; a ``cfg_scale`` of None is the pipeline's own default.
        prompts: A file or list of prompts, for a pipeline; a native network draws its classes.
        data: For a native network a :class:`hasten.Source`; for a pipeline a folder of captioned pictures or of
            ``hasten synthesize``. None for methods that need none.
        lora_rank: Train adapters of this rank, on one frozen backbone that all networks share.
        quantize_base: ``int8`` or ``int4`` rounds that backbone's blocks while they train, of a pipeline; its own
            weights wait in ``out``, and it is they that are exported.
        call: How a pipeline is called: height, width, guidance_scale, negative_prompt ...
        sizes: Several (height, width) in pixels to train for.
        fit: Training length and everything else about training.
        out: Folder for conditions and checkpoints, which a second call resumes from.

    Returns:
        A :class:`Student` with ``save_pretrained`` for a pipeline, a network in eval mode for a network.

    Raises:
        ConfigError: If the method needs data and has none, or cannot train for these steps.
        UnsupportedModel: If the pipeline cannot be learnt.
        Diverged: On a NaN or exploding loss.
    """
    fit = fit or FitConfig()
    if lora_rank is not None:
        fit = replace(fit, clone="lora", lora_rank=lora_rank)
    if not hasattr(teacher, "components"):
        given = {"prompts": prompts, "call": call, "sizes": sizes, "quantize_base": quantize_base}
        extra = [k for k, v in given.items() if v]
        if extra:
            raise ConfigError(f"{extra[0]} is for diffusers pipelines; this teacher is a {type(teacher).__name__}.")
        return run.distill(teacher, method, steps=steps, data=data, fit=fit, device=device, out=out)
    if quantize_base and quantize_base not in TOP:
        raise unknown("rounding", quantize_base, TOP)
    if quantize_base and fit.clone != "lora":
        raise ConfigError("quantize_base rounds the frozen weights under adapters, and there are none; give lora_rank.")
    wanted = (steps,) if isinstance(steps, int) else tuple(steps)
    ways = lambda net: [suited(method, net, wanted).sampling(n) for n in wanted]  # noqa: E731
    there = host(
        teacher, prompts=prompts, data=data, call=call, sizes=sizes, device=device, work=out, ways=ways,
        quantize_base=quantize_base, tell=tell,
    )  # fmt: skip
    method = suited(method, there.net, wanted)
    last = None
    for last in training.fit(method, there.source, there.net, fit, device=device, out=out):
        tell("training", last.index, last.total)
    if last is None:
        raise CheckpointError("This run is already complete; load its model, or choose another out.")
    about = {
        "method": recipe.as_dict(method), "fit": recipe.as_dict(fit), "iterations": last.total,
        "rounded": quantize_base,
    }  # fmt: skip
    return Student(there, last.student.eval(), {n: method.sampling(n) for n in wanted}, about)
