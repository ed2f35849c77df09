"""A diffusers pipeline made fast: a student of it trained, and exported as a folder that plain diffusers loads."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from hasten import fit as training
from hasten import recipe, run
from hasten.core.errors import CheckpointError, ConfigError, UnsupportedModel, unknown
from hasten.core.method import Sampling
from hasten.distribute import checkpoints, world
from hasten.fit import Step
from hasten.frozen import TOP, Rounding
from hasten.hosted import Hosted, Size, Tell, host, note_saved, saved_step, silent
from hasten.lora import adapters, is_view, view
from hasten.methods.dpo import DPO
from hasten.models.diffusers import PipelineDenoiser
from hasten.models.load import load_pipeline
from hasten.names import defaults, row_of
from hasten.prompts import read_prompts
from hasten.recipe import Recipe
from hasten.role import FitConfig
from hasten.synthesize import guidable

COMFYUI = "comfyui.safetensors"


@dataclass(frozen=True)
class Student:
    """A distilled pipeline: its denoiser (with adapters, or full weights) and how it is sampled, by step count."""

    hosted: Hosted
    net: PipelineDenoiser
    samplings: Mapping[int, Sampling]
    about: Mapping[str, Any]
    near: bool = False  # whether it is meant to make what the teacher makes of the same noise
    measured: dict[int, Any] = field(default_factory=dict, repr=False)  # by step count, once it was

    def pictures(self, count: int = 16, steps: int | None = None, seed: int = 0) -> Tensor:
        """Images [count, 3, H, W] in [-1, 1] of the first prompts, in ``steps`` steps (the most it knows)."""
        return self.hosted.pictures(self.net, self.sampling(steps), count, seed)

    def sampling(self, steps: int | None = None) -> Sampling:
        """How it is sampled in ``steps`` steps (the most it knows). Raises ConfigError where it was not trained so."""
        if steps is not None and steps not in self.samplings:
            known = ", ".join(map(str, sorted(self.samplings)))
            raise ConfigError(f"This student was trained for {known} steps, not {steps}; distil it with steps={steps}.")
        return self.samplings[steps or max(self.samplings)]

    def measure(self, steps: int | None = None) -> list[dict[str, Any]]:
        """The card's rows of it and its teacher, measured once: see :func:`hasten.compared.compared`."""
        from hasten.compared import compared

        sampling = self.sampling(steps)
        count = len(sampling.times) - 1
        if count not in self.measured:
            self.measured[count] = compared(self.hosted.pipe, self.whole(), sampling, near=self.near)
        return self.measured[count]

    def _measured(self, steps: int | None) -> Any:
        try:
            return self.measure(steps)
        except (Exception, KeyboardInterrupt) as error:  # what was trained is worth more than what it costs
            why = next(iter(str(error).strip().splitlines()), type(error).__name__)
            said = "was interrupted" if isinstance(error, KeyboardInterrupt) else f"failed ({why})"
            warnings.warn(f"The measurement for the card {said}; the folder is written without it.", stacklevel=3)
            return None

    def whole(self) -> PipelineDenoiser:
        """The student on the pipeline's own weights, which come back with its encoders."""
        self.hosted.restore()
        if not self.hosted.rounded:
            return self.net
        twin = view(self.hosted.net, adapters(self.net))
        twin.load_state_dict(self.net.state_dict())
        return twin.requires_grad_(False).eval()

    def save_pretrained(
        self,
        folder: File | str,
        *,
        steps: int | None = None,
        lora: bool = False,
        push_to_hub: str | None = None,
        measure: bool = True,
    ) -> File:
        """Write an ordinary diffusers folder for ``steps`` steps (the most it knows), proven by loading it back.

        Adapters of a rounded backbone are written with, and fused into, the pipeline's own weights; the card says so.

        Args:
            lora: Write the adapters alone, as diffusers' ``load_lora_weights`` reads them.
            push_to_hub: Also upload it to this repository of the Hugging Face hub.
            measure: Time three requests of it and three of the teacher, for the card; see :meth:`measure`. Where that
                fails or is interrupted a warning says so, and the card is without it.

        Raises:
            ConfigError: If it was not trained for ``steps``, the folder cannot be written, or no stock scheduler
                samples as the student does.
        """
        from hasten.export import export
        from hasten.progress import mosaic

        sampling, net = self.sampling(steps), self.whole()
        about = {**self.about, "measured": self._measured(steps) if measure else None}
        grid = mosaic(self.hosted.pictures(net, sampling))
        return export(
            self.hosted.pipe, net, sampling, folder, about=about, grid=grid, lora=lora, push_to_hub=push_to_hub
        )

    def save_comfyui(self, file: File | str, *, lora: bool = False) -> File:
        """Write the network, or with ``lora`` its adapters, as one .safetensors file that ComfyUI reads.

        Raises:
            UnsupportedModel: If ComfyUI does not read diffusers' names of this network.
            ConfigError: If the file is no .safetensors, or adapters are asked of full weights.
        """
        from hasten.comfy import export_comfyui

        return export_comfyui(self.hosted.pipe, self.whole(), file, lora=lora)


@dataclass(frozen=True)
class PipelineJob:
    """A recipe with its pipeline hosted, as ``hasten distill`` takes it; see :class:`hasten.run.Job`."""

    recipe: Recipe
    hosted: Hosted
    device: torch.device
    out: File
    start: None = None

    @property
    def source(self) -> Any:
        return self.hosted.source

    @property
    def net(self) -> PipelineDenoiser:
        return self.hosted.net

    def preview(self, student: Any) -> Tensor:
        """Images of a student at the most steps it is trained for, always from the same noise."""
        return self.hosted.pictures(student.eval(), self.recipe.method.sampling(max(self.recipe.steps)))

    def saved(self, step: Step) -> bool:
        """Whether all that :meth:`save` writes of this step is there."""
        from hasten.export import ABOUT

        files = [self.out / "model" / "model_index.json", self.out / "model" / "recipe.yaml"]
        files += [self.out / "lora" / ABOUT] * is_view(step.student)
        files += [self.out / COMFYUI] * (self.recipe.format == "comfyui")
        return saved_step(self.out) == step.index and all(file.is_file() for file in files)

    def save(self, step: Step) -> File:
        """Write the student's averaged weights as a diffusers folder, and the recipe; returns the folder.

        Adapters are fused into it, and written alone to ``out``/lora. Under torchrun the first rank writes.
        """
        folder = self.out / "model"
        if world()[0] > 0:
            self.hosted.restore()  # which clears what it had put aside
            return folder
        student = self.student(step)
        student.save_pretrained(folder, measure=self.recipe.measure)
        if is_view(step.student):
            student.save_pretrained(self.out / "lora", lora=True, measure=bool(student.measured))
        recipe.save(self.recipe, folder / "recipe.yaml")
        if self.recipe.format == "comfyui":
            student.save_comfyui(self.out / COMFYUI, lora=is_view(step.student))
        note_saved(self.out, step.index)
        if len(self.recipe.steps) > 1:
            *fewer, most = sorted(self.recipe.steps)
            warnings.warn(
                f"{folder} samples in {most} steps; for {' or '.join(map(str, fewer))}: "
                f"hasten.pipelines.finished({str(self.out)!r}).save_pretrained(FOLDER, steps={fewer[-1]}).",
                stacklevel=2,
            )
        return folder

    def student(self, step: Step) -> Student:
        """The student of a step."""
        about = {
            "recipe": recipe.as_dict(self.recipe), "iterations": step.index, "rounded": self.recipe.quantize_base,
        }  # fmt: skip
        samplings = {n: self.recipe.method.sampling(n) for n in self.recipe.steps}
        near = row_of(self.recipe.method).group == "trajectory"
        return Student(self.hosted, step.student.eval(), samplings, about, near)


def prepare(wanted: Recipe) -> PipelineJob:
    """Load the pipeline of a recipe, encode its prompts, and free its encoders; bars say how far it is.

    Raises:
        ConfigError: For a pipeline, prompts, data or a folder that cannot be used.
        UnsupportedModel: If the pipeline cannot be learnt.
    """
    from rich.progress import Progress

    trainable(wanted.method)
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

        def ways(net: PipelineDenoiser) -> list[Sampling]:
            if wanted.format == "comfyui":
                convertible(net)
            return tried(wanted.method, net, wanted.steps)

        there = host(
            pipe, prompts=wanted.prompts, data=wanted.data, call=wanted.call, sizes=wanted.sizes, device=device,
            work=out, ways=ways, quantize_base=wanted.quantize_base, tell=tell,
        )  # fmt: skip
    return PipelineJob(replace(wanted, method=suited(wanted.method, there.net, wanted.steps)), there, device, out)


def finished(out: File | str) -> Student:
    """The student of a finished run of ``hasten distill``, to be saved for any of the step counts it was trained for.

    Raises:
        CheckpointError: If ``out`` holds no finished run.
        ConfigError: If the pipeline, prompts or data of its recipe are gone.
    """
    out = File(out).expanduser()
    file, found = out / "model" / "recipe.yaml", checkpoints(out)
    wanted = recipe.load(file) if file.is_file() else None
    total = sum(length for _, length in wanted.method.stages(wanted.fit.iterations)) if wanted else None
    if wanted is None or not found or int(found[-1].name) != total:
        raise CheckpointError(f"{out} holds no finished run of hasten distill; the command that began it goes on.")
    job = prepare(replace(wanted, out=str(out)))
    fit = training.fit(job.recipe.method, job.source, job.net, job.recipe.fit, device=job.device, out=out)
    student = job.student(next(fit))
    job.hosted.restore()
    return student


def trainable(method: Any) -> None:
    """Raise UnsupportedModel for a method that no pipeline's data serve."""
    if isinstance(method, DPO):
        raise UnsupportedModel(
            "DPO takes pairs of images for a native network; for a pipeline, train a preference with diffusers' own "
            "example, and distil the pipeline that it leaves."
        )


def convertible(net: PipelineDenoiser) -> None:
    """Raise UnsupportedModel for a network that ComfyUI cannot read, before it is trained."""
    from hasten.comfy import READS

    if (kind := type(net.net).__name__) not in READS:
        raise UnsupportedModel(
            f"ComfyUI is not known to read diffusers' names of {kind}, only those of {', '.join(READS)}; leave the "
            "format out, and convert the diffusers folder with ComfyUI's own tools."
        )


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


def tried(method: Any, net: PipelineDenoiser, steps: Sequence[int]) -> list[Sampling]:
    """How a student will be sampled; uneven times stand for those that are found only once the prompts are encoded."""
    method = suited(method, net, steps)
    made = [method.sampling(n) for n in steps]
    return made if getattr(method, "ready", True) else [replace(s, times=tuple(u**1.5 for u in s.times)) for s in made]


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
    start: Any = None,
    tell: Tell = silent,
) -> Any:
    """The student that ``method`` makes of ``teacher`` for ``steps`` sampling steps.

    Args:
        teacher: A diffusers pipeline, or a native network; it is left as it is. A pipeline's encoders are out of
            memory while the student trains, and back at the end, also of a run that failed or was interrupted.
        method: Such as ``hasten.DMD2()``; a ``cfg_scale`` of None is the pipeline's own default.
        prompts: A file or list of prompts, for a pipeline; a native network draws its classes.
        data: For a native network a :class:`hasten.Source`; for a pipeline a folder of captioned pictures or of
            ``hasten synthesize``. None for methods that need none.
        lora_rank: Train adapters of this rank, on one frozen backbone that all networks share.
        quantize_base: ``int8`` or ``int4`` rounds that backbone's blocks while they train, of a pipeline; its own
            weights wait in ``out``, and it is they that are exported.
        call: How a pipeline is called: height, width, guidance_scale, negative_prompt ...
        sizes: Several (height, width) in pixels to train for.
        fit: Training length and everything else about training; None is what suits the method, or its adapters.
        out: Folder for conditions and checkpoints, which a second call resumes from.
        start: An earlier student of a native network, from which this one starts.

    Returns:
        A :class:`Student` with ``save_pretrained`` for a pipeline, a network in eval mode for a network.

    Raises:
        ConfigError: If the method needs data and has none, or cannot train for these steps.
        UnsupportedModel: If the pipeline cannot be learnt.
        Diverged: On a NaN or exploding loss.
    """
    fit = fit or FitConfig(**defaults(method, lora_rank is not None))
    if lora_rank is not None:
        fit = replace(fit, clone="lora", lora_rank=lora_rank)
    if not hasattr(teacher, "components"):
        given = {"prompts": prompts, "call": call, "sizes": sizes, "quantize_base": quantize_base}
        extra = [k for k, v in given.items() if v]
        if extra:
            raise ConfigError(f"{extra[0]} is for diffusers pipelines; this teacher is a {type(teacher).__name__}.")
        return run.distill(teacher, method, steps=steps, data=data, fit=fit, device=device, out=out, start=start)
    if start is not None:
        raise ConfigError("start is for native networks; leave it out for a pipeline.")
    trainable(method)
    if quantize_base and quantize_base not in TOP:
        raise unknown("rounding", quantize_base, TOP)
    if quantize_base and fit.clone != "lora":
        raise ConfigError("quantize_base rounds the frozen weights under adapters, and there are none; give lora_rank.")
    wanted, device = (steps,) if isinstance(steps, int) else tuple(steps), run.pick(str(device))
    ways = lambda net: tried(method, net, wanted)  # noqa: E731
    there = host(
        teacher, prompts=prompts, data=data, call=call, sizes=sizes, device=device, work=out, ways=ways,
        quantize_base=quantize_base, tell=tell,
    )  # fmt: skip
    try:
        method = run.settled(
            suited(method, there.net, wanted), there.net, there.source, device=device, batch=fit.batch,
            out=File(out) if out else None, tell=lambda done, total: tell("finding times", done, total),
        )  # fmt: skip
        last = None
        for last in training.fit(method, there.source, there.net, fit, device=device, out=out):
            tell("training", last.index, last.total)
        if last is None:
            raise CheckpointError("This run is already complete; load its model, or choose another out.")
        texts, made = (str(v) if isinstance(v, (str, File)) else None for v in (prompts, data))
        written = Recipe(
            method, pipeline=getattr(teacher, "name_or_path", None), prompts=texts, data=made,
            call=printable(call or {}), sizes=tuple(sizes), quantize_base=quantize_base, steps=wanted, fit=fit,
            out=str(out or ""), device=str(device),
        )  # fmt: skip
        about = {"recipe": recipe.as_dict(written), "iterations": last.total, "rounded": quantize_base}
        net = last.student.eval()
        del last  # the other networks and the optimizers leave memory before the encoders come back
    finally:
        there.restore()
    near = row_of(method).group == "trajectory"
    return Student(there, net, {n: method.sampling(n) for n in wanted}, about, near)


def printable(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call for a recipe: a picture in it is only named."""
    plain = (str, int, float, bool, list, tuple, dict, type(None))
    return {k: v if isinstance(v, plain) else type(v).__name__ for k, v in call.items()}
