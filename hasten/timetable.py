"""The command ``times``: when few steps should look at a model of hasten's own, or at a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as File
from typing import Annotated, Any

import typer

from hasten.accelerate import Call, Device, Model, Prompts, sampled, writable_file
from hasten.commands import assignments, at_least_one, pipeline_in
from hasten.console import err_console, note, out_console, quietly
from hasten.core.errors import ConfigError


def times(
    model: Model,
    steps: Annotated[str, typer.Option("--steps", help="Sampling steps.")] = "4",
    rule: Annotated[str | None, typer.Option("--rule", help="Step rule; default: the model's own.")] = None,
    objective: Annotated[str, typer.Option("--objective", help="ld3, bellman, or ays (stochastic rules too).")] = "ld3",
    cfg_scale: Annotated[float | None, typer.Option("--cfg-scale", help="Guidance; 1 is none.")] = None,
    prompts: Prompts = None, call: Call = None,
    iterations: Annotated[int, typer.Option("--iterations", help="Training length; bellman has none.")] = 300,
    count: Annotated[int | None, typer.Option("--count", help="Noises; default 128, a pipeline's 32.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Noises at a time; default 32, a pipeline's 4.")] = None,
    out: Annotated[
        File | None,
        typer.Option("--out", help="Write a .json there and leave the model alone; a pipeline's .yaml is a stack."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same times.")] = 0,
    device: Device = "auto",
) -> None:  # fmt: skip
    """Learn when few steps should look at a model, in minutes; its weights stay as they are."""
    from rich.progress import Progress

    at_least_one(count=count, batch=batch)
    with Progress(console=err_console) as progress:
        bars: list[Any] = []

        def tell(done: int, total: int) -> None:
            bars.extend([] if bars else [progress.add_task("learning times", total=total)])
            progress.update(bars[0], completed=done)

        options: dict[str, Any] = {
            "objective": objective, "iterations": iterations, "seed": seed,
            "tell": tell,
        }  # fmt: skip
        options |= {k: v for k, v in {"rule": rule, "count": count, "batch": batch}.items() if v is not None}
        if prompts is not None or call or pipeline_in(model):
            found, save = _of_pipeline(model, steps, prompts, call, cfg_scale, out, device, options)
        else:
            found, save = _of_model(model, steps, cfg_scale, out, device, options)
    what = "AYS' bound" if objective == "ays" else "distance to many steps"
    note(f"{what}, on noise that was not learnt from: {found.even:.4g} at even times, {found.learnt:.4g} at these")
    out_console.print(", ".join(f"{u:.4f}" for u in found.sampling.times), soft_wrap=True)
    if found.learnt >= found.even:
        note("Even times are as good, so nothing is written.")
    else:
        save()


def _of_model(
    model: str, steps: str, cfg_scale: float | None, out: File | None, device: str, options: dict[str, Any]
) -> tuple[Any, Any]:
    """What was learnt for a model of hasten's own, and the function that writes it."""
    import json
    from dataclasses import asdict

    from hasten.distribute import add_sampling
    from hasten.run import find_model, pick
    from hasten.schedule import learn
    from hasten.whole import write

    if out is not None and out.suffix.lower() != ".json":
        raise ConfigError(f"--out of times is a .json file, not {str(out)!r}.")
    net, sampling = sampled(model, steps, cfg_scale, device)
    file = None if out is None else writable_file(out)
    how = {"rule": sampling.rule, "cfg_scale": sampling.cfg_scale, "two_time": sampling.two_time, **options}
    found = learn(net, len(sampling.times) - 1, device=pick(device), **how)

    def save() -> None:
        if file is None:
            add_sampling(find_model(model), found.sampling)
        else:
            write(file, lambda f: f.write_text(json.dumps(asdict(found.sampling), indent=1)))

    return found, save


def _of_pipeline(
    model: str, steps: str, prompts: str | None, call: Sequence[str] | None, cfg_scale: float | None,
    out: File | None, device: str, options: dict[str, Any],
) -> tuple[Any, Any]:  # fmt: skip
    """What was learnt for a pipeline, and the function that writes it as a stack of the layer ``Times``."""
    import yaml

    from hasten.pipelines import load_pipeline
    from hasten.prompts import read_prompts
    from hasten.run import pick, whole_numbers
    from hasten.schedule import learn_for
    from hasten.speed import Times, as_dict
    from hasten.whole import write

    file = out or File("times.yaml")
    if file.suffix.lower() not in (".yaml", ".yml"):
        raise ConfigError(f"--out of a pipeline's times is a .yaml file, not {str(file)!r}.")
    if cfg_scale is not None:
        raise ConfigError("--cfg-scale is for hasten's own models; guide a pipeline with --call guidance_scale=4.")
    if prompts is None:
        raise ConfigError("A pipeline's times are learnt on prompts, or class labels; give --prompts a file of them.")
    counts = whole_numbers(steps, "--steps", 1)
    if len(counts) != 1:
        raise ConfigError(f"Give one step count, not {steps!r}.")
    texts, arguments, place = read_prompts(prompts), assignments(call), pick(device)
    pipe = load_pipeline(str(pipeline_in(model) or model), place).to(place)
    file = writable_file(file)
    found = quietly(lambda: learn_for(pipe, counts[0], prompts=texts, call=arguments, **options))

    def save() -> None:
        stack = [as_dict(Times(found.sampling.times))]
        write(file, lambda f: f.write_text(yaml.safe_dump(stack, sort_keys=False)))
        out_console.print(str(file), soft_wrap=True)

    return found, save
