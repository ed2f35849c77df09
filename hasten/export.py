"""A student as an ordinary diffusers folder, written whole or not at all and proven by loading it in a fresh process.

What diffusers stores of how a student is called is little: the scheduler's config holds its times, and the call's
defaults (steps, guidance) are code. Where a network or a pipeline has a switch by which the pipeline leaves guidance
alone, the folder has it on (:mod:`hasten.unguided`); elsewhere the card and ``hasten.json`` say what to call.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path as File
from typing import Any

from safetensors import safe_open
from torch import Tensor

from hasten import card, reload
from hasten.core.errors import CheckpointError, ConfigError, UnsupportedModel
from hasten.core.method import Sampling
from hasten.lora import in_place, is_view, merge
from hasten.lorafile import check_lora, write_lora
from hasten.models.candidates import placed
from hasten.models.diffusers import PipelineDenoiser
from hasten.models.schedulers import components, fit, limit
from hasten.qat import plain
from hasten.reload import LORA
from hasten.unguided import stored, switched, unguided
from hasten.whole import whole_folder
from hasten.whole import write as write_whole

FORMAT = "hasten-pipeline-1"
ABOUT, GRID = "hasten.json", "grid.png"
UNNAMED = ("model", "lora")  # folders that are called after their place in a run
RUN = "This folder was loaded back in a fresh process {}, and its times, latents and images were the student's."
UNRUN = "The adapters were read back and compared to the student's weights, but not run in a fresh process: {}."


@dataclass(frozen=True)
class Written:
    """A folder that was written, and what it has to show when it is loaded back.

    Args:
        job: What :mod:`hasten.reload` needs to load and run it; empty where this machine has not all that it takes.
        checked: What the card says of that: a sentence.
        seen: The times and images of the pipeline in memory, and the latents of hasten's own sampling.
        limit: The relative difference that is rounding.
    """

    folder: File
    job: dict[str, Any]
    checked: str
    seen: dict[str, Tensor]
    limit: float


def export(
    pipe: Any,
    student: PipelineDenoiser,
    sampling: Sampling,
    folder: File | str,
    *,
    about: Mapping[str, Any] | None = None,
    grid: Any = None,
    lora: bool = False,
    push_to_hub: str | None = None,
) -> File:
    """Write ``student`` as a diffusers folder that needs no hasten, after it was seen to sample as it does here.

    The folder is loaded in a fresh process with diffusers alone and run with its own call: its times must be those of
    ``sampling``, its latents those of :func:`hasten.core.sample.sample` and its images those of the pipeline in
    memory, within 1e-5 in float32 (rounding in smaller dtypes). Else nothing is left behind. Adapters alone are loaded
    so onto their base where that is on this machine, by peft or, where that is not installed, by hand; elsewhere a
    warning and the card say that they were only read back and compared to what was sampled.

    Args:
        pipe: The teacher's pipeline, whole; it is left as it is.
        student: Its denoiser with trained weights, or with adapters, which are fused.
        sampling: Unit times from 1 to 0, the rule, and the guidance from outside (1: it is inside the student).
        about: For the card: ``method``, ``recipe``, ``base``, ``license``, ``measured``; all may be missing.
        grid: A PIL picture of samples.
        lora: Write the adapters and the scheduler alone.
        push_to_hub: Also upload the folder to this repository of the Hugging Face hub.

    Raises:
        ConfigError: If the folder cannot be written (a full disk) or holds something else, if the call or the adapters
            cannot be stored, or if the upload fails; the folder stays then.
        UnsupportedModel: If no stock scheduler samples as the student does, or the folder that was loaded back differs.
    """
    folder = File(folder).expanduser()
    with whole_folder(folder, ABOUT) as partial:
        name = folder.absolute().parent.name if folder.name in UNNAMED else folder.name
        repo = {"name": push_to_hub.split("/")[-1], "place": push_to_hub} if push_to_hub else {"name": name}
        written = write(pipe, student, sampling, partial, **repo, about=about or {}, grid=grid, lora=lora)
        verify([written])
    if push_to_hub:
        upload(folder, push_to_hub)
    return folder


def write(
    pipe: Any,
    student: PipelineDenoiser,
    sampling: Sampling,
    folder: File,
    name: str,
    *,
    place: str = card.HERE,
    about: Mapping[str, Any],
    grid: Any = None,
    lora: bool = False,
) -> Written:
    """Write the folder's files, and run the pipeline in memory for what they have to show; see :func:`export`.

    Args:
        name: The card's title.
        place: Where the card's code finds the folder: its repository on the hub, or the folder itself.
    """
    net = trained(pipe, student)
    parts, base = components(pipe, net.net), about.get("base") or getattr(pipe.config, "_name_or_path", None)
    steps, guided, first = len(sampling.times) - 1, sampling.cfg_scale != 1, next(iter(parts))
    if lora:
        lacks = "the student has full weights" if not is_view(student) else ""
        lacks = lacks or ("" if hasattr(pipe, "load_lora_weights") else f"{type(pipe).__name__} loads none")
        lacks = lacks or (f"they belong to {' and '.join(parts)}" if len(parts) > 1 else "")
        if lacks:
            raise ConfigError(f"Adapters alone cannot be written, as {lacks}; write the whole pipeline.")
        write_lora(student.net, folder / LORA, first)
        check_lora(folder / LORA, first, getattr(pipe, first), parts[first])
    with placed(pipe, **parts):
        trial = fit(pipe, net, sampling)
        with placed(pipe, scheduler=trial.scheduler):
            off = {} if lora or guided or not student.found.quiet else unguided(pipe, net, steps)
            plain_call, inner = stored(pipe, trial.call)
            off |= inner if not lora else {}
            with switched(pipe, {**off, **inner}):
                if lora:
                    trial.scheduler.save_pretrained(folder / "scheduler")
                else:
                    pipe.save_pretrained(folder)
                seen, result = reload.watch(pipe, plain_call, steps, trial.seed)
            try:
                call = reload.pack(plain_call, folder)
            except TypeError as error:
                raise ConfigError(
                    f"The pipeline's call cannot be stored: {error}; probe it with plain values."
                ) from error
            given = card.arguments(pipe, plain_call, steps, guided, student.found.quiet)
            dtype, guidance = card.dtypes(pipe), card.guidance_of(pipe, plain_call)
            values = {
                "name": name, "pipeline": type(pipe).__name__, "steps": steps,
                "code": card.code(pipe, place, given, result, str(base or "BASE") if lora else None),
                "guidance": card.guidance_text(pipe, plain_call, student.found.quiet, guided, bool(off)),
                "scheduler": type(trial.scheduler).__name__, "times": [float(f"{t:.6g}") for t in trial.times],
                "error": f"{trial.error:.0e}", "start": f"{trial.start:.4f}" if abs(trial.start - 1) > 1e-4 else "",
                "grid": GRID if grid is not None else "",
            }  # fmt: skip
    described = {
        "format": FORMAT, "steps": steps, "sampling": asdict(sampling), "call": call, "guidance": guidance,
        "lora": lora, "base": base, "dtype": dtype, "times": trial.times, "error": trial.error, "start": trial.start,
        "tiled": card.tiled(pipe),
    }  # fmt: skip
    (folder / ABOUT).write_text(json.dumps(described, indent=1))
    job = {
        "folder": str(folder), "lora": None, "dtype": dtype, "call": call, "steps": steps, "seed": trial.seed,
        "device": str(next(net.parameters()).device), "tiled": described["tiled"],
    }  # fmt: skip
    checked = RUN.format("with diffusers alone")
    if lora:
        there, peft = base_in(base), bool(importlib.util.find_spec("peft"))
        more = {"lora": str(folder), "by_hand": not peft, "optional": there != str(base)}
        job = {**job, **more, "folder": there} if there else {}
        how = "with diffusers and peft" if peft else "with diffusers, its adapters added to the base's weights by hand"
        gone = f"its base {card.unplaced(base)} is not on this machine" if base else "no base is named"
        checked = RUN.format(how) if there else UNRUN.format(gone)
    about = {**about, "base": base} if base else about
    if grid is not None:
        grid.save(folder / GRID)
    (folder / "README.md").write_text(card.card({**values, "checked": checked}, about, lora))
    return Written(folder, job, checked, {**seen, "latents": trial.latents.float().cpu()}, limit(net))


def base_in(base: Any) -> str:
    """The folder of a base pipeline on this machine: itself, or that of the hub's cache; empty where there is none."""
    from huggingface_hub import try_to_load_from_cache

    if not base or File(base).is_dir() or not card.on_hub(str(base)):
        return str(base) if base and File(base).is_dir() else ""
    index = try_to_load_from_cache(str(base), "model_index.json")
    return str(File(index).parent) if isinstance(index, str) else ""


def trained(pipe: Any, student: PipelineDenoiser) -> PipelineDenoiser:
    """The student with plain weights in the pipeline's own dtypes, adapters fused, sharing nothing with it.

    Raises:
        UnsupportedModel: If weights are quantized in place, which diffusers cannot save.
    """
    if odd := in_place(student.net):
        raise UnsupportedModel(
            f"The student's {odd} is quantized in place, which diffusers cannot save; export plain weights, and let "
            "from_pretrained quantize them by its quantization_config."
        )
    net = plain(merge(student) if is_view(student) else copy.deepcopy(student)).requires_grad_(False).eval()
    net.templates = {**net.templates, net.shape: dict(net.called)}  # training's is for the longest of its prompts
    for name, part in components(pipe, net.net).items():
        dtypes = {k: p.dtype for k, p in getattr(pipe, name).named_parameters() if p.is_floating_point()}
        for key, p in part.named_parameters():
            p.data = p.data.to(dtypes.get(key, p.dtype))
    return net


# --- the proof --------------------------------------------------------------------------------------------------


def verify(written: Sequence[Written]) -> None:
    """Load folders back in one fresh process with diffusers alone, run them, and compare what they do.

    Adapters whose base is not on this machine are not run: a warning and their card say so.

    Raises:
        UnsupportedModel: If one cannot be loaded, or differs in its times, latents or images, with what and how much.
    """
    runs = iter(reloaded([w for w in written if w.job]))
    for w in written:
        seen = next(runs) if w.job else ""
        if not isinstance(seen, str):
            compare(w, seen)
            continue
        said = UNRUN.format("its base is not whole on this machine") if seen else w.checked
        file = w.folder / "README.md"
        file.write_text(file.read_text().replace(w.checked, said))
        warnings.warn(f"{said} {seen}".strip(), stacklevel=outside())


def outside() -> int:
    """How many calls above its caller hasten was called: a warning's ``stacklevel``."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("hasten."):
        level, frame = level + 1, frame.f_back
    return level


def reloaded(written: Sequence[Written]) -> list[Any]:
    """What folders do in one fresh process with diffusers alone; the reason where an optional base cannot be loaded.

    Raises:
        UnsupportedModel: If another cannot be loaded or run.
    """
    if not written:
        return []
    with tempfile.TemporaryDirectory() as place:
        files = [File(place) / f"{i}.safetensors" for i in range(len(written))]
        jobs = File(place) / "jobs.json"
        jobs.write_text(json.dumps([{**w.job, "seen": str(f)} for w, f in zip(written, files, strict=True)]))
        command = [sys.executable, "-P", str(reload.__file__), str(jobs)]
        done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UnsupportedModel(f"diffusers alone cannot load or run what was written: {last}")
        found: list[Any] = []
        for file in files:
            with safe_open(file, "pt") as opened:
                why = (opened.metadata() or {}).get(reload.MISSING)
                found.append(why or {k: opened.get_tensor(k) for k in opened.keys()})
        return found


def compare(written: Written, seen: Mapping[str, Tensor]) -> None:
    """Raise UnsupportedModel if a loaded pipeline did something else than the one in memory."""
    for what, near in (("times", 1e-6), ("latents", written.limit), ("images", 10 * written.limit)):
        a, b = seen[what].double(), written.seen[what].double()
        error = float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) if a.shape == b.shape else float("inf")
        if not error <= near:
            values = f" ({a.tolist()}, not {b.tolist()})" if what == "times" else ""
            raise UnsupportedModel(
                f"{written.folder.name} was loaded back in a fresh process and its {what} differ by {error:.1e} (limit "
                f"{near:.0e}){values}, so it was not kept; one of its components does not save all that it is."
            )


# --- files ------------------------------------------------------------------------------------------------------


def read_about(folder: File | str) -> dict[str, Any]:
    """How the student in ``folder`` is called: ``steps``, ``sampling``, ``call`` and ``guidance``, as exported.

    Raises:
        CheckpointError: If it holds no exported student.
    """
    file = File(folder) / ABOUT
    try:
        about = json.loads(file.read_text())
        times = tuple(about["sampling"]["times"])
        call = reload.unpack(about["call"], File(folder))
        assert about["format"] == FORMAT
        return {**about, "sampling": Sampling(**{**about["sampling"], "times": times}), "call": call}
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise CheckpointError(f"{folder} is no exported student of this version ({type(error).__name__}).") from error


def publish(out: File, licence: str | None, repo: str | None) -> str:
    """Name the licence of a run's students on their cards, and upload the whole pipeline; returns its address."""
    for file in (out / name / "README.md" for name in UNNAMED if licence and (out / name / ABOUT).is_file()):
        text = card.licensed(file.read_text(), licence or "")
        write_whole(file, lambda place, text=text: place.write_text(text))
    return upload(out / "model", repo) if repo else ""


def upload(folder: File, repo: str) -> str:
    """Upload a folder to a repository of the Hugging Face hub, which is made if it is missing; returns its address.

    A ``recipe.yaml`` in it, with paths of this machine, stays here: the card has the recipe without them.

    Raises:
        ConfigError: If the hub refuses or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, exist_ok=True)
        said = {"commit_message": "A few-step student", "ignore_patterns": ["recipe.yaml"]}
        return str(api.upload_folder(repo_id=repo, folder_path=str(folder), **said))
    except Exception as error:  # the hub raises a dozen types for what is missing, gated or offline
        why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(f"{folder} is whole, but could not be uploaded to {repo!r}: {why}.") from error
