"""The commands about speed-ups without training: ledger, tune and speed."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path as File
from typing import Annotated, Any, cast

import typer

from hasten.commands import assignments, at_least_one, pipeline_in
from hasten.console import err_console, note, out_console
from hasten.core.errors import CheckpointError, ConfigError

Model = Annotated[str, typer.Argument(help="A folder of hasten's, or a diffusers pipeline: folder or hub id.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Sampling steps; default 50, a pipeline's own.")]
Prompts = Annotated[str | None, typer.Option("--prompts", help="For a pipeline: .txt, .csv, .jsonl ...")]
Call = Annotated[list[str] | None, typer.Option("--call", help="Argument of a pipeline's call, such as height=512.")]
Scale = Annotated[float | None, typer.Option("--cfg-scale", help="Guidance of a model of hasten's; 1 is none.")]
Data = Annotated[str | None, typer.Option("--data", help="Real images: FD, KD and recall beside PSNR and SSIM.")]
JudgeFile = Annotated[File | None, typer.Option("--judge", help="A saved judge, in place of --data.")]
Batch = Annotated[int, typer.Option("--batch", help="Samples of a timed request of a model of hasten's.")]
Device = Annotated[str, typer.Option("--device")]


def ledger(
    context: typer.Context,
    model: Model,
    stack: Annotated[File, typer.Option("--stack", help="YAML: a list of transforms, or a plan.")],
    steps: Steps = None, prompts: Prompts = None, call: Call = None, cfg_scale: Scale = None, data: Data = None,
    judge: JudgeFile = None, batch: Batch = 1,
    count: Annotated[int, typer.Option("--count", help="Samples to compare.")] = 16,
    repeats: Annotated[int, typer.Option("--repeats", help="Timed requests of a round.")] = 3,
    rounds: Annotated[int, typer.Option("--rounds", help="Rounds over all combinations.")] = 3,
    out: Annotated[str, typer.Option("--out", help="Folder for ledger.json, .html and .png.")] = "hasten-ledger",
    device: Device = "auto",
) -> None:  # fmt: skip
    """What every layer of a stack gains and costs: alone, in pairs, and on top of the others."""
    from hasten import ledger_page
    from hasten.ledger import build
    from hasten.run import writable
    from hasten.speed.plan import load_stack
    from hasten.speed.transform import once

    at_least_one(count=count, repeats=repeats, rounds=rounds, batch=batch)
    layers = load_stack(stack)
    once(layers)
    work = workload(model, steps, prompts, call, cfg_scale, data, judge, batch, device)
    folder = writable(out)
    with err_console.status("measuring") as status:
        book = build(work, layers, count=count, repeats=repeats, rounds=rounds, tell=status.update)
    if (whole := book.about["rounds"]) < rounds:
        note(f"Interrupted: the ledger holds what was whole by then, {whole} of {rounds} rounds.")
    book.about["command"] = shlex.join(["hasten", *cast(Any, context.find_root().command).given])
    title = f"{File(model).absolute().name}: {' + '.join(t.name for t in sorted(layers, key=lambda t: t.order))}"
    ledger_page.save(book, folder, title, next(work.host.net.parameters()).device)
    out_console.print(ledger_page.table(book, title))
    for line in book.lines[1:]:
        out_console.print(f"{line.name}: {book.verdict(line)}.".replace("..", "."), soft_wrap=True)
    out_console.print(str(folder / "ledger.html"), soft_wrap=True)


def speed(
    model: Model,
    plan: Annotated[File | None, typer.Option("--plan", help="A plan of `hasten tune`.")] = None,
    stack: Annotated[File | None, typer.Option("--stack", help="YAML: a list of transforms.")] = None,
    steps: Steps = None, prompts: Prompts = None, call: Call = None, cfg_scale: Scale = None, batch: Batch = 1,
    count: Annotated[int, typer.Option("--count", help="Samples to make, with and without.")] = 8,
    repeats: Annotated[int, typer.Option("--repeats", help="Timed requests, with and without.")] = 3,
    out: Annotated[File, typer.Option("--out", help="A .png: above without, below with.")] = File("speed.png"),
    device: Device = "auto",
) -> None:  # fmt: skip
    """Run a model under a plan or a stack: how much faster it is, and the samples beside its own."""
    import torch

    from hasten.core.errors import NotReversible
    from hasten.ledger import built, clocked
    from hasten.measure.clock import summary
    from hasten.measure.quality import trajectory
    from hasten.progress import mosaic
    from hasten.speed.plan import Plan, load_stack
    from hasten.speed.transform import once
    from hasten.whole import write

    at_least_one(count=count, repeats=repeats, batch=batch)
    if (plan is None) == (stack is None):
        raise ConfigError("Give one of --plan and --stack.")
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out of speed is a .png file, not {str(out)!r}.")
    layers: Sequence[Any] = [Plan.load(plan)] if plan else load_stack(stack or File())
    once(layers[0].transforms if plan else layers)
    made_for = layers[0].fingerprint.get("steps") if plan else None
    work = workload(model, steps or made_for, prompts, call, cfg_scale, None, None, batch, device)
    out = writable_file(out)
    up = built(layers, work)  # what cannot work is said before the model's own samples are made
    place = next(work.host.net.parameters()).device

    def both() -> tuple[Any, list[float]]:
        return work.samples(count)[0], clocked(work.request, repeats, place)

    with err_console.status("without"):
        made = [both()]
    with err_console.status("with"), suppress(NotReversible), up:  # nothing is asked of the model after that
        made.append(both())
    (plain, slow), (fast, quick) = made
    if idle := up.idle():
        raise ConfigError(" ".join(idle))
    rows = min(count, len(plain), 8)
    write(out, lambda file: mosaic(torch.cat([plain[:rows], fast[:rows]]), columns=rows).save(file, "PNG"))
    same = trajectory(plain, fast)
    for name, numbers in up.ledger().items():
        note(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in numbers.items()))
    before, after = summary(slow).p50, summary(quick).p50
    out_console.print(
        f"{1e3 * before:.1f} ms became {1e3 * after:.1f} ms ({before / after:.2f} times as fast), "
        f"PSNR {same['psnr']:.1f} dB and SSIM {same['ssim']:.3f} to the model's own samples: {out}", soft_wrap=True,
    )  # fmt: skip


def tune(
    model: Model,
    max_loss: Annotated[list[str], typer.Option("--max-loss", help='psnr=30, ssim=0.95, lpips=0.05 or fd=5%.')],
    steps: Steps = None, prompts: Prompts = None, call: Call = None, cfg_scale: Scale = None, data: Data = None,
    judge: JudgeFile = None, batch: Batch = 1,
    calls: Annotated[int, typer.Option("--calls", help="Requests that every candidate is compared on.")] = 20,
    stack: Annotated[File | None, typer.Option("--stack", help="YAML: the layers to try, in place of all.")] = None,
    out: Annotated[File, typer.Option("--out", help="The plan, a .yaml file.")] = File("plan.yaml"),
    device: Device = "auto",
) -> None:  # fmt: skip
    """Find the fastest stack whose loss stays within a budget, verified on held-out requests; writes a plan."""
    from hasten.speed.plan import load_stack
    from hasten.tuner import Budget, found_for, said

    at_least_one(calls=calls, batch=batch)
    if out.suffix.lower() not in (".yaml", ".yml"):
        raise ConfigError(f"--out of tune is a .yaml file, not {str(out)!r}.")
    budget = Budget.of(assignments(max_loss, "--max-loss", "psnr=30"))
    layers = load_stack(stack) if stack else None
    work = workload(model, steps, prompts, call, cfg_scale, data, judge, batch, device)
    out = writable_file(out)
    with err_console.status("tuning") as status:
        plan = found_for(work, budget, calls, layers, status.update)
    plan.save(out)
    for name, why in plan.measured["left_out"].items():
        note(f"{name} was left out: {why}")
    out_console.print(front_of(plan))
    chosen, gain = " + ".join(t.name for t in plan.transforms), plan.measured["gain"]
    loss = {k: float(v) for k, v in plan.measured["held_out"].items()}
    out_console.print(f"{chosen}: {gain:.2f} times as fast, {said(loss)} on held-out requests: {out}", soft_wrap=True)


def front_of(plan: Any) -> Any:
    """A table of what no other measured stack beats in both time and loss, fastest first."""
    from rich.table import Table

    from hasten.tuner import said

    found = Table(title="The front: nothing measured is both faster and nearer")
    for column in ("stack", "times as fast", "loss", "within the budget"):
        found.add_column(column, justify="right" if column == "times as fast" else "left")
    points = plan.measured["front"]
    slowest = max(p["seconds"] for p in points)  # the model as it is, which nothing beats in loss
    for p in points:
        loss = said({k: float(v) for k, v in p["loss"].items() if k in plan.measured["budget"]})
        row = " + ".join(p["layers"]) or "the model as it is", f"{slowest / p['seconds']:.2f}"
        found.add_row(*row, loss, "yes" if p["within"] else "no")
    return found


def writable_file(out: File) -> File:
    """``out``, its folder made where it is missing. Raises ConfigError where no file can be written there."""
    from hasten.run import writable

    out = out.expanduser()
    if out.is_dir():
        raise ConfigError(f"--out {str(out)!r} is a folder; name a file in it.")
    writable(out.parent)
    return out


def workload(
    model: str, steps: int | None, prompts: str | None, call: Sequence[str] | None, cfg_scale: float | None,
    data: str | None, judge: File | None, batch: int, device: str,
) -> Any:  # fmt: skip
    """What the options ask of a model.

    Raises:
        ConfigError: For options that do not fit the model.
    """
    from hasten.measure.judge import Judge
    from hasten.run import pick
    from hasten.workload import Workload, own_steps

    at_least_one(steps=steps)
    if data and judge:
        raise ConfigError("Give one of --data and --judge.")
    saved = None if judge is None else Judge.load(judge)
    folder = pipeline_in(model)
    if folder is None and (prompts is not None or call) and own(model):
        raise ConfigError(
            f"{'--call' if prompts is None else '--prompts'} is for pipelines, and {model!r} is a model of hasten's "
            "own, which --cfg-scale is for; leave it out."
        )
    if folder or prompts is not None or call or of_hub(model):
        if cfg_scale is not None:
            raise ConfigError("--cfg-scale is for hasten's own models; guide a pipeline with --call guidance_scale=4.")
        if data:
            raise ConfigError("--data is for hasten's own models; give a pipeline a saved --judge.")
        from hasten.models.diffusers import asked
        from hasten.pipelines import load_pipeline
        from hasten.prompts import read_prompts
        from hasten.synthesize import classes

        arguments = assignments(call)
        about: list[Any] = [] if prompts is None else read_prompts(prompts)
        pipe = load_pipeline(str(folder or model), pick(device))
        pipe.to(pick(device))
        if asked(pipe, arguments)[0] != "prompt":
            about = classes(about)
        return Workload(pipe, steps or own_steps(pipe), arguments, about, judge=saved)
    net, sampling = sampled(model, str(steps or 50), cfg_scale, device)
    saved = saved or (judge_of(data, net)[1] if data else None)
    return Workload(net.eval(), len(sampling.times) - 1, sampling=sampling, batch=batch, judge=saved)


def of_hub(model: str) -> bool:
    """Whether this is written as a hub id, OWNER/NAME, and names nothing here: a folder OWNER speaks against it."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model)) and not File(model).parent.exists() and not own(model)


def own(model: str) -> bool:
    """Whether this is a model of hasten's own: a folder, or the name of one that it carries."""
    from hasten.run import find_model

    try:
        return bool(find_model(model))
    except CheckpointError:
        return False


def judge_of(data: str, net: Any) -> tuple[Any, Any]:
    """(source, judge) of real images: disjoint parts for the judge's features, its reference and its floor."""
    from hasten.console import quietly
    from hasten.data import load
    from hasten.measure.features import classifier
    from hasten.measure.judge import Judge
    from hasten.run import matched

    source = matched(quietly(load, data), net)
    learn, reference, held_out = source.split((0.25, 0.5, 0.25), seed=0)
    features = classifier(learn.x, learn.labels, source.classes, seed=0).to(next(net.parameters()).device)
    return source, Judge(features, reference.x, reference.labels, held_out.x, held_out.labels)


def sampled(model: str, steps: str, cfg_scale: float | None, device: str) -> tuple[Any, Any]:
    """The network of a folder and how to sample it in ``steps`` steps.

    Raises:
        ConfigError: If the folder does not say how its model is sampled.
    """
    from dataclasses import replace

    from hasten.core.method import even
    from hasten.distribute import load_model, read_samplings
    from hasten.run import find_model, pick, whole_numbers

    counts = whole_numbers(steps, "--steps", 1)
    if len(counts) != 1:
        raise ConfigError(f"Give one step count, not {steps!r}.")
    folder, place = find_model(model), pick(device)
    saved = read_samplings(folder)
    if not saved:
        raise ConfigError(f"{folder} does not say how to sample its model; train or distil it again.")
    sampling = saved.get(counts[0])
    if sampling is None:
        known = ", ".join(map(str, sorted(saved)))
        note(f"Note: this model was made for {known} steps; {counts[0]} even ones are taken.")
        sampling = replace(next(iter(saved.values())), times=even(counts[0]))
    if cfg_scale is not None:
        if not math.isfinite(cfg_scale):
            raise ConfigError(f"--cfg-scale must be a finite number, not {cfg_scale}.")
        sampling = replace(sampling, cfg_scale=cfg_scale)
    return load_model(folder, place), sampling
