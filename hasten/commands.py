"""The command line's part for diffusers pipelines: ``synthesize``, and what ``sample`` does with a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path as File
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.console import err_console, note, out_console, quietly
from hasten.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

ABOUT = "hasten.json"  # what an export says about its student
Call = Annotated[list[str] | None, typer.Option("--call", help="How a pipeline is called, such as height=512.")]


def synthesize(
    model: Annotated[str, typer.Argument(help="A diffusers pipeline: folder or hub id.")],
    prompts: Annotated[str, typer.Option("--prompts", help=".txt, .csv, .tsv, .jsonl, .json or a dataset's name.")],
    out: Annotated[File, typer.Option("--out", help="Output folder; a synthesis that is there goes on.")],
    count: Annotated[int | None, typer.Option("--count", help="Samples; prompts are taken in turn.")] = None,
    steps: Annotated[int, typer.Option("--steps", help="Sampling steps.")] = 50,
    cfg_scale: Annotated[float | None, typer.Option("--cfg-scale", help="Guidance; default: the call's own.")] = None,
    call: Call = None,
    batch: Annotated[int, typer.Option("--batch", help="Samples at a time.")] = 4,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same noise.")] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:  # fmt: skip
    """Make the guided samples of a diffusers pipeline once, as data for methods that need some."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from hasten.pipelines import load_pipeline
    from hasten.prompts import read_prompts
    from hasten.run import pick
    from hasten.synthesize import synthesize as make

    place, arguments, texts = pick(device), assignments(call), read_prompts(prompts)
    at_least_one(count=count, steps=steps, batch=batch)
    pipe = load_pipeline(model, place)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err_console) as progress:
        bars: dict[str, Any] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in bars:  # what an earlier run made takes no time, so it must not count as speed
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], completed=done)

        folder = quietly(lambda: make(
            pipe, texts, out, steps=steps, count=count, cfg_scale=cfg_scale, call=arguments, batch=batch, seed=seed,
            device=place, whole=False, tell=tell,
        ))  # fmt: skip
    out_console.print(str(folder), soft_wrap=True)


def assignments(texts: Sequence[str] | None, option: str = "--call", such: str = "height=512") -> dict[str, Any]:
    """The arguments of several ``--call key=value``, each value read as YAML.

    Raises:
        ConfigError: For one that is none, and for a key that is given twice.
    """
    from hasten.recipe import assignment

    found: dict[str, Any] = {}
    for text in texts or ():
        key, value = assignment(text, option, such)
        if key in found:
            raise ConfigError(f"{option} {key} is given twice, as {found[key]!r} and as {value!r}; give it once.")
        found[key] = value
    return found


def at_least_one(**options: int | None) -> None:
    """Raise ConfigError for an option below 1."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise ConfigError(f"--{name} must be at least 1, not {value}.")


def pipeline_in(model: str) -> File | None:
    """The folder of a pipeline, or of exported adapters, at ``model`` or under it where a run left one; else None."""
    places = [File(model).expanduser(), File(model).expanduser() / "model"]
    return next((p for p in places if any((p / name).is_file() for name in ("model_index.json", ABOUT))), None)


def draw(
    model: str, *, prompt: str | None, prompts: str | None, labels: str | None, call: Sequence[str] | None,
    steps: str | None, count: int | None, out: File, cfg_scale: float | None, seed: int, device: str,
) -> None:  # fmt: skip
    """Pictures of a pipeline: called as the ``hasten.json`` in its folder says, else by its own defaults."""
    from rich.progress import Progress

    from hasten.models.diffusers import of
    from hasten.pipelines import load_pipeline
    from hasten.run import pick, whole_numbers, writable
    from hasten.whole import write
    from hasten.workload import picture

    if out.suffix.lower() not in (".png", ".gif"):
        raise ConfigError(f"--out of a pipeline's samples is a .png or .gif file, not {str(out)!r}.")
    if cfg_scale is not None:
        raise ConfigError("--cfg-scale is for hasten's own models; guide a pipeline with --call guidance_scale=4.")
    numbers = None if steps is None else whole_numbers(steps, "--steps", 1)
    if numbers is not None and len(numbers) != 1:
        raise ConfigError(f"Give one step count, not {steps!r}.")
    at_least_one(count=count)
    asked, place, folder = _asked(prompt, prompts, labels), pick(device), pipeline_in(model)
    known, arguments = described(folder), assignments(call)
    many = numbers[0] if numbers else known.get("steps")
    if numbers and known.get("steps") not in (None, many):
        note(f"Note: this pipeline was made for {known['steps']} steps, not {many}.")
    pipe = (
        with_adapters(folder, known, place)
        if folder and known.get("lora")
        else load_pipeline(str(folder or model), place)
    )
    for name in known.get("tiled", ()):
        getattr(pipe, name).enable_tiling()
    pipe.to(place)
    total = count or len(asked)
    with Progress(console=err_console, transient=True) as progress:
        bar = progress.add_task("sampling", total=total)
        made = []
        for i in range(total):
            subject, value = asked[i % len(asked)]
            given = of({**known.get("call", {}), **arguments}, subject, [value])
            made.append(picture(pipe, given, many, seed, i))
            progress.update(bar, completed=i + 1)
    writable(out.parent)
    write(out, lambda file: save(made, file, out.suffix.lower()))
    out_console.print(str(out), soft_wrap=True)


def _asked(prompt: str | None, prompts: str | None, labels: str | None) -> list[tuple[str, Any]]:
    """What the samples show, one after the other: (argument of the call, value)."""
    from hasten.prompts import read_prompts
    from hasten.run import whole_numbers

    given = [k for k, v in {"--prompt": prompt, "--prompts": prompts, "--labels": labels}.items() if v is not None]
    if len(given) != 1:
        raise ConfigError(
            f"A pipeline takes one of --prompt, --prompts and --labels, not {' and '.join(given) or 'none'}."
        )
    if labels is not None:
        return [("class_labels", n) for n in whole_numbers(labels, "--labels", 0)]
    return [("prompt", text) for text in ([prompt] if prompt is not None else read_prompts(prompts or ""))]


def described(folder: File | None) -> dict[str, Any]:
    """How the student in ``folder`` is called: its steps and arguments; empty for any other pipeline."""
    if folder is None or not (folder / ABOUT).is_file():
        return {}
    from hasten.export import read_about

    return read_about(folder)


def with_adapters(folder: File, known: Mapping[str, Any], device: Any) -> Any:
    """The base pipeline of exported adapters, with them and their scheduler."""
    from hasten import reload

    base = known.get("base")
    if not base:
        raise ConfigError(f"{folder} does not say which pipeline its adapters belong to; give the whole pipeline.")
    try:
        given = {"folder": base, "lora": str(folder), "dtype": known["dtype"], "tiled": known["tiled"]}
        return reload.load({**given, "device": str(device), "by_hand": find_spec("peft") is None})
    except Exception as error:  # diffusers and the hub raise a dozen types for what is missing
        why = (str(error).splitlines() or ["?"])[0].rstrip(".")
        raise ConfigError(f"Cannot load the adapters in {str(folder)!r} onto {base!r}: {why}.") from error


def save(made: Sequence[Tensor], file: File, suffix: str) -> None:
    """A grid of samples [F, 3, H, W]: a .gif moves, a .png shows the middle frames."""
    import torch

    from hasten.progress import mosaic

    count = len(made[0])
    if suffix == ".gif":
        frames = [mosaic(torch.stack([x[f] for x in made])) for f in range(count)]
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=80, loop=0)
    else:
        mosaic(torch.stack([x[count // 2] for x in made])).save(file, "PNG")
