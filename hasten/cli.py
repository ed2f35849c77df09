"""The command line. Nothing heavy is imported before a command runs, so that --help answers at once."""

from __future__ import annotations

import os
import re
from pathlib import Path as File
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from hasten import accelerate, commands, timetable
from hasten.allocator import keep_freed_memory
from hasten.console import Commands, err_console, note, out_console, quietly
from hasten.core.errors import ConfigError

if TYPE_CHECKING:
    from hasten.run import Job

app = typer.Typer(
    cls=Commands, name="hasten", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)  # fmt: skip


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        out_console.print(version("hasten"))
        raise typer.Exit()


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; works anywhere.")] = False,
) -> None:
    """Makes diffusion and flow models fast, and measures what every layer gained and what it cost."""
    keep_freed_memory()


Data = Annotated[
    str | None, typer.Option("--data", help="digits, .npz, .npy, a folder of images, or a dataset's name.")
]
Out = Annotated[str | None, typer.Option("--out", help="Output folder; a run that is there is resumed.")]
RecipeFile = Annotated[File | None, typer.Option("--recipe", help="A YAML file; other options override it.")]
Steps = Annotated[str | None, typer.Option("--steps", help="Sampling steps, such as 4 or 1,2,4.")]
Iterations = Annotated[int | None, typer.Option("--iterations", help="Training length.")]
Lr = Annotated[float | None, typer.Option("--lr", help="Learning rate.")]
BatchSize = Annotated[int | None, typer.Option("--batch", help="Samples per update.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Same seed, same run.")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")]
Minutes = Annotated[float | None, typer.Option("--minutes", help="Stop at a checkpoint after so many minutes.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Any key of the recipe, such as method.gan_weight=0.")]
Board = Annotated[bool | None, typer.Option("--tensorboard/--no-tensorboard", help="Default: where installed.")]
Wandb = Annotated[bool, typer.Option("--wandb", help="Log to Weights & Biases.")]
Model = Annotated[str, typer.Argument(help="Folder of a model, or the output folder of train or distill.")]


@app.command()
def train(
    data: Data = None, out: Out = None, recipe: RecipeFile = None, method: str | None = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="Start from this model instead.")] = None,
    steps: Steps = None, iterations: Iterations = None, lr: Lr = None, batch: BatchSize = None, seed: Seed = None,
    device: Device = None, minutes: Minutes = None, set_: Set = None, tensorboard: Board = None, wandb: Wandb = False,
) -> None:  # fmt: skip
    """Train a model from data, by flow matching unless --method says otherwise."""
    options = {
        "task": "train", "method": method, "data": data, "teacher": teacher, "steps": steps, "out": out,
        "device": device, "fit.iterations": iterations, "fit.lr": lr, "fit.batch": batch, "fit.seed": seed,
    }  # fmt: skip
    _train(recipe, options, set_ or [], minutes, tensorboard, wandb)


@app.command()
def distill(
    method: Annotated[str | None, typer.Option("--method", help="See `hasten methods`.")] = None,
    steps: Steps = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="Folder of the model to make fast.")] = None,
    start: Annotated[str | None, typer.Option("--start", help="An earlier student of it, to go on from.")] = None,
    data: Data = None, out: Out = None, recipe: RecipeFile = None, iterations: Iterations = None, lr: Lr = None,
    batch: BatchSize = None, seed: Seed = None, device: Device = None, minutes: Minutes = None, set_: Set = None,
    tensorboard: Board = None, wandb: Wandb = False,
    model: Annotated[str | None, typer.Option("--model", help="A diffusers pipeline: folder or hub id.")] = None,
    prompts: Annotated[str | None, typer.Option("--prompts", help="For a pipeline: .txt, .csv, .jsonl ...")] = None,
    lora_rank: Annotated[int | None, typer.Option("--lora-rank", help="Train adapters of this rank.")] = None,
    quantize_base: Annotated[str | None, typer.Option(help="int8, int4: rounded weights under adapters.")] = None,
    format_: Annotated[str | None, typer.Option("--format", help="comfyui: also write the file it reads.")] = None,
    push_to_hub: Annotated[str | None, typer.Option(help="Upload a pipeline's student to this repository.")] = None,
    measure: Annotated[bool | None, typer.Option("--measure/--no-measure", help="For a pipeline's card.")] = None,
    licence: Annotated[str | None, typer.Option(help="Of a pipeline's student, for its card; such as mit.")] = None,
    call: commands.Call = None,
) -> None:  # fmt: skip
    """Distil a model, or a diffusers pipeline, to a few steps."""
    options = {
        "task": "distill", "method": method, "data": data, "teacher": teacher, "start": start, "steps": steps,
        "out": out,
        "device": device, "fit.iterations": iterations, "fit.lr": lr, "fit.batch": batch, "fit.seed": seed,
        "pipeline": model, "prompts": prompts, "format": format_, "fit.lora_rank": lora_rank,
        "fit.clone": None if lora_rank is None else "lora", "quantize_base": quantize_base, "measure": measure,
    }  # fmt: skip
    options |= {f"call.{k}": v for k, v in commands.assignments(call).items()}
    _train(recipe, options, set_ or [], minutes, tensorboard, wandb, licence, push_to_hub)


def _train(
    file: File | None, options: dict[str, Any], sets: list[str], minutes: float | None, board: bool | None, wandb: bool,
    licence: str | None = None, repo: str | None = None,
) -> None:  # fmt: skip
    from hasten.fit import fit
    from hasten.measure.diagnose import diagnose
    from hasten.progress import duration, estimate, watch
    from hasten.run import prepare, with_pairs

    _join_ranks()
    wanted = _recipe(file, options, sets)
    if minutes is not None and minutes <= 0:
        raise ConfigError(f"--minutes must be positive, not {minutes:g}.")
    if (licence or repo) and not wanted.pipeline:
        raise ConfigError("--push-to-hub and --licence are for the student of a diffusers pipeline; give --model.")
    if repo and not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ConfigError(f"--push-to-hub takes a repository of the hub such as me/student, not {repo!r}.")
    if wanted.pipeline:
        from hasten.pipelines import prepare
    job: Any = quietly(prepare, wanted)
    if not getattr(job.recipe.method, "ready", True):
        job = _settle(job)
    wanted = job.recipe
    if wanted.pairs:
        job = _make_pairs(job, with_pairs)
    method, net, config = wanted.method, job.net, wanted.fit
    note(f"{type(method).__name__} on {getattr(job.source, 'name', 'noise')}, {job.device}, into {job.out}")
    guess = estimate(method, job.source, net, config, device=job.device, out=job.out)
    limit = f"; stops after {minutes:g} min" if minutes and guess.seconds > 60 * minutes else ""
    if guess.iterations:
        note(f"Estimate: {guess}{limit}")
    history: list[Any] = []
    step = watch(
        fit(method, job.source, net, config, device=job.device, out=job.out, start=job.start),
        title=wanted.task, out=job.out, minutes=minutes, preview=job.preview, tensorboard=board, wandb=wandb,
        history=history, console=err_console,
    )  # fmt: skip
    if step is None:
        raise ConfigError(f"{job.out} holds a run with nothing left to do; choose another --out.")
    if not history and job.saved(step):
        out_console.print(f"{job.out} was already complete; choose another --out to train anew.", soft_wrap=True)
        _publish(job.out, licence, repo)
        return
    folder = quietly(job.save, step)
    for sentence in diagnose(history, {}):
        note(sentence)
    if step.index < step.total:
        rest = duration((step.total - step.index) * guess.step_seconds)
        note(f"Stopped at {step.index} of {step.total} iterations; the same command goes on from here ({rest} left).")
    out_console.print(str(folder), soft_wrap=True)
    _publish(job.out, licence, repo)


def _publish(out: File, licence: str | None, repo: str | None) -> None:
    from hasten.distribute import world

    if (licence or repo) and world()[0] == 0:
        from hasten.export import publish

        if address := publish(out, licence, repo):
            note(f"Uploaded to {address}")


def _recipe(file: File | None, options: dict[str, Any], sets: list[str]) -> Any:
    """The recipe of a file, of options and of --set, each overriding the one before."""
    from hasten import recipe
    from hasten.run import step_counts

    raw, places = recipe.read(file) if file else ({}, {(): "command line"})
    if file and raw.get("task", options["task"]) != options["task"]:
        raise ConfigError(f"{file.name} is a recipe for `hasten {raw['task']}`, not {options['task']}.")
    for key, value in options.items():
        if value is not None:
            value = step_counts(value) if key == "steps" else value
            key = "method.name" if key == "method" and isinstance(raw.get("method"), dict) else key
            said = {"method.name": "method", "pipeline": "model"}.get(key, key.split(".")[-1].replace("_", "-"))
            recipe.override(raw, places, key, value, f"--{said}")
    for text in sets:
        key, value = recipe.assignment(text)
        recipe.override(raw, places, key, value, f"--set {text}")
    return recipe.parse(raw, places)


def _settle(job: Any) -> Any:
    from dataclasses import replace

    from rich.progress import Progress

    from hasten.run import settled

    with Progress(console=err_console) as progress:
        bar = progress.add_task("finding times", total=None)
        method = settled(
            job.recipe.method, job.net, job.source, device=job.device, batch=job.recipe.fit.batch, out=job.out,
            tell=lambda done, total: progress.update(bar, completed=done, total=total),
        )  # fmt: skip
    return replace(job, recipe=replace(job.recipe, method=method))


def _make_pairs(job: Job, with_pairs: Any) -> Job:
    from rich.progress import Progress

    with Progress(console=err_console) as progress:
        bar = progress.add_task("making pairs", total=job.recipe.pairs)
        return with_pairs(job, lambda done, total: progress.update(bar, completed=done))


def _join_ranks() -> None:
    """Under torchrun, join the other processes; only the first one speaks."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group()
    out_console.quiet = err_console.quiet = dist.get_rank() > 0


for command in (commands.synthesize, accelerate.speed, accelerate.tune, accelerate.ledger):
    app.command()(command)


@app.command()
def sample(
    model: Model,
    steps: Annotated[str | None, typer.Option("--steps", help="Default 4; a pipeline's own.")] = None,
    count: Annotated[int | None, typer.Option("--count", help="Default 64; for a pipeline one per prompt.")] = None,
    out: Annotated[File, typer.Option("--out", help=".png; .npz of a model; .gif of a video.")] = File("samples.png"),
    cfg_scale: Annotated[float | None, typer.Option("--cfg-scale", help="Guidance; 1 is none.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same noise.")] = 0,
    labels: Annotated[str | None, typer.Option("--labels", help="Classes in turn, such as 0,1,2.")] = None,
    device: Annotated[str, typer.Option("--device")] = "auto",
    prompt: Annotated[str | None, typer.Option("--prompt", help="For a diffusers pipeline.")] = None,
    prompts: Annotated[str | None, typer.Option("--prompts", help="For a pipeline: .txt, .csv, .jsonl ...")] = None,
    call: commands.Call = None,
) -> None:  # fmt: skip
    """Draw samples from a model, or from a diffusers pipeline."""
    if prompt is not None or prompts is not None or call or commands.pipeline_in(model):
        _guided_again(model, call)
        return commands.draw(**locals())
    import torch

    from hasten.progress import draw, mosaic
    from hasten.run import whole_numbers, writable
    from hasten.whole import write

    if out.suffix.lower() not in (".png", ".npz"):
        raise ConfigError(f"--out of sample is a .png or .npz file, not {str(out)!r}.")
    count = 64 if count is None else count
    if count < 1:
        raise ConfigError(f"--count must be at least 1, not {count}.")
    net, sampling = accelerate.sampled(model, steps or "4", cfg_scale, device)
    classes = net.config.classes
    chosen = None
    if labels is not None:
        if not classes:
            raise ConfigError("This model knows no classes; leave --labels out.")
        wanted = whole_numbers(labels, "--labels", 0, classes - 1)
        chosen = torch.tensor([wanted[i % len(wanted)] for i in range(count)])
    writable(out.parent)
    images, made = draw(net, sampling, count, labels=chosen, seed=seed)
    if out.suffix.lower() == ".png":
        write(out, lambda file: mosaic(images).save(file, "PNG"))
    else:
        arrays = {"images": images.clamp(-1, 1).numpy()} | ({} if made is None else {"labels": made.numpy()})
        write(out, lambda file: _savez(file, arrays))
    out_console.print(str(out), soft_wrap=True)


def _guided_again(model: str, call: list[str] | None) -> None:
    """A note where a call guides a student otherwise than it was made for."""
    made = commands.described(commands.pipeline_in(model)).get("guidance", {})
    for key, value in commands.assignments(call).items():
        if key in made and value != made[key]:
            why = "it would be guided a second time, or at a strength that it was not trained for."
            note(f"Note: this student was made for {key}={made[key]:g}, not {value}: {why}")


def _savez(file: File, arrays: dict[str, Any]) -> None:
    import numpy as np

    with file.open("wb") as handle:  # a handle, because savez adds .npz to a name
        np.savez(handle, **arrays)


@app.command()
def measure(
    model: Model,
    data: Annotated[str, typer.Option("--data", help="Real images; best such that the model has not seen.")],
    steps: Annotated[str, typer.Option("--steps", help="Sampling steps.")] = "4",
    count: Annotated[int, typer.Option("--count", help="Samples to judge.")] = 5000,
    cfg_scale: Annotated[float | None, typer.Option("--cfg-scale", help="Guidance; 1 is none.")] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    device: Annotated[str, typer.Option("--device")] = "auto",
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:  # fmt: skip
    """Judge a model against real images, beside the floor: other real images, judged alike."""
    import json

    from hasten.core.sample import nfe
    from hasten.progress import draw

    if count < 8:
        raise ConfigError(f"--count must be at least 8 for a quality number, not {count}.")
    net, sampling = accelerate.sampled(model, steps, cfg_scale, device)
    source, judge = accelerate.judge_of(data, net)
    images, labels = draw(net, sampling, count, seed=seed)
    found: dict[str, Any] = {
        "model": model, "data": source.name, "steps": len(sampling.times) - 1, "nfe": nfe(sampling),
        "cfg_scale": sampling.cfg_scale, "count": count, "seed": seed, "features": judge.features.name,
        "quality": judge(images, labels, interval=True), "floor": judge.floor,
    }  # fmt: skip
    if json_:
        typer.echo(json.dumps(found, indent=1))
        return
    from rich.table import Table

    table = Table(title=f"{model}: {found['nfe']} network evaluations, {count} samples against {source.name}")
    for column in ("", "model", "floor (real images)"):
        table.add_column(column, justify="left" if not column else "right")
    for name, value in found["quality"].items():
        table.add_row(name, f"{value:.4g}", f"{judge.floor[name]:.4g}" if name in judge.floor else "")
    out_console.print(table)
    out_console.print(f"Features: {judge.features.name}.", soft_wrap=True)


app.command(name="times")(timetable.times)


@app.command(name="methods")
def list_methods(name: Annotated[str | None, typer.Argument(help="One method, with its settings.")] = None) -> None:
    """List the methods: what each is for, what it needs and costs; or one with its settings and remedies."""
    from hasten.catalogue import explained, overview
    from hasten.core.errors import unknown
    from hasten.names import methods

    if name is not None and name not in methods():
        raise unknown("method", name, methods())
    out_console.print(escape(overview() if name is None else explained(name)), soft_wrap=True)


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="All of it in under a minute, with weaker models.")] = False,
    data: Annotated[str | None, typer.Option("--data", help="digits, .npz, .npy, a folder, a dataset's name.")] = None,
    out: Annotated[str, typer.Option("--out")] = "hasten-demo",
    seed: Annotated[int, typer.Option("--seed")] = 0,
    device: Annotated[str, typer.Option("--device")] = "auto",
    minutes: Annotated[float | None, typer.Option("--minutes", help="Time to spend on training.")] = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="A pretrained model, such as fashion-mnist.")] = None,
) -> None:  # fmt: skip
    """The whole job on real images: train, distil, accelerate, and measure every layer."""
    if minutes is not None and minutes <= 0:
        raise ConfigError(f"--minutes must be positive, not {minutes:g}.")
    if data and teacher:
        raise ConfigError("A pretrained --teacher brings the statistics of its own data; leave out --data.")
    from hasten import demo as whole_job
    from hasten.run import pick, writable

    place = pick(device)
    writable(out)
    options = {"data": data or "digits", "teacher": teacher, "device": str(place), "minutes": minutes}
    quietly(lambda: whole_job.run(quick=quick, out=out, seed=seed, **options))


def main() -> None:
    """The entry point of the ``hasten`` command."""
    app()


if __name__ == "__main__":
    main()
