"""The whole job on real images: train a teacher, distil it two ways, add what else applies, measure every stage."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path as File
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from hasten import data as datasets
from hasten.core.errors import ConfigError
from hasten.core.generate import FewStep
from hasten.core.method import Sampling, even
from hasten.core.sample import sample
from hasten.data import Images
from hasten.distribute import clone, load_model
from hasten.fit import fit
from hasten.measure import clock, quality
from hasten.measure.diagnose import diagnose, texture
from hasten.measure.features import Features, classifier
from hasten.measure.report import Report, Stage
from hasten.measure.validation import loss_per_time
from hasten.methods.flow import Flow
from hasten.methods.flowmap import FlowMap
from hasten.methods.sid import SiD
from hasten.models.dit import DiT
from hasten.progress import draw, estimate, watch, write
from hasten.recipe import Recipe, dit_config
from hasten.role import FitConfig
from hasten.run import Job
from hasten.speed import Cache, Cast, Compile, Quantize, Transform, speed_up

SPLIT = (1000 / 1797, 397 / 1797, 400 / 1797)  # reference and training set, floor, feature network; always the same
STEPS = (1, 2, 4)
MANY = 50
WAYS = {"trajectory": FlowMap(), "distribution": SiD(generate=FewStep(STEPS))}
SHARES = {"teacher": 0.3, "trajectory": 0.4, "distribution": 0.3}  # of the time for training, under --minutes
CACHE = 0.05  # the step cache's threshold
KEPT = 256  # samples of every stage that are kept, for pictures and trajectory metrics


@dataclass(frozen=True)
class Plan:
    """How much of everything: sizes, iterations, samples."""

    width: int = 128
    depth: int = 4
    teacher: int = 700
    trajectory: int = 350
    distribution: int = 500
    judged: int = 5000
    scales: tuple[float, ...] = (1.25, 1.5, 2.0)
    timed: int = 128
    repeats: int = 7


QUICK = Plan(width=64, depth=2, teacher=150, trajectory=40, distribution=60, judged=500, scales=(1.5,), repeats=3)


def patch_for(shape: tuple[int, ...]) -> int:
    """The smallest patch that divides both sides and leaves at most 64 tokens; digits get 2 x 2 patches of 4 pixels."""
    h, w = shape[-2:]
    fits = [p for p in range(4, min(h, w) + 1) if h % p == 0 and w % p == 0 and (h // p) * (w // p) <= 64]
    return fits[0] if fits else 1


@dataclass
class Row:
    """A stage of the table before it is measured: a network and how it is sampled."""

    name: str
    what: str
    net: Any
    sampling: Sampling
    group: str


@dataclass
class Demo:
    """One run of the demo: its folder remembers all that is finished, so the same command goes on from there."""

    plan: Plan
    out: File
    settings: dict[str, Any]
    device: torch.device
    console: Console
    train: Images = field(init=False)
    judge: quality.Judge = field(init=False)
    held_out: Images = field(init=False)
    shown: dict[str, Any] = field(init=False)
    state: dict[str, Any] = field(default_factory=lambda: {"judged": {}, "iterations": {}, "findings": {}})

    def __post_init__(self) -> None:
        file = self.out / "work" / "state.json"
        if file.exists():
            self.state = json.loads(file.read_text())
            if self.state["settings"] != self.settings:
                raise ConfigError(f"{self.out} holds a demo with other settings; choose another --out or delete it.")
        self.state["settings"] = self.settings
        self.remember()

    def remember(self) -> None:
        """Write the state, whole or not at all."""
        write(self.out / "work" / "state.json", lambda f: f.write_text(json.dumps(self.state, indent=1)))

    def say(self, text: str) -> None:
        """One line of progress."""
        self.console.print(text, highlight=False)

    # --- the data and its judge -------------------------------------------------------------------------------

    def prepare(self, images: Images) -> None:
        """Split the data, and train the features in which everything is judged on a part that no model sees."""
        self.train, self.held_out, rest = images.split(SPLIT, seed=0)
        file = self.out / "work" / "features.safetensors"
        if file.exists():
            features = Features.load(file)
        else:
            self.say(f"Training the judge's features on {len(rest)} images that no model sees")
            features = classifier(rest.x, rest.labels, images.classes, seed=0)
            features.save(file)
        features.to(self.device)
        self.judge = quality.Judge(features, self.train.x, self.train.labels, self.held_out.x, self.held_out.labels)
        self.shown = {"features": features.name, "split": [len(self.train), len(self.held_out), len(rest)]}

    # --- training ---------------------------------------------------------------------------------------------

    def model(self, name: str, method: Any, net: Callable[[], Any], fit_config: FitConfig) -> Any:
        """Train ``method`` from ``net`` into ``out/name``, or load what is there; returns the network."""
        folder = self.out / name
        if not (folder / "model" / "model.json").exists():
            config = replace(fit_config, iterations=self.length(name, method, net, fit_config))
            task = "train" if name == "teacher" else "distill"
            steps = (MANY,) if name == "teacher" else STEPS
            teacher = None if name == "teacher" else str(self.out / "teacher")
            net_now = net()
            about = Recipe(
                method, task=task, data=self.settings["data"], teacher=teacher, steps=steps, fit=config, out=str(folder),
                model={k: getattr(net_now.config, k) for k in ("patch", "width", "depth", "heads")},
            )  # fmt: skip
            job = Job(about, self.train, net_now, self.device, folder)
            started, history = time.perf_counter(), []
            step = watch(
                fit(method, self.train, job.net, config, device=self.device, out=folder),
                title=f"{name}: {type(method).__name__}", out=folder, preview=job.preview, previews=4,
                history=history, console=self.console,
            )  # fmt: skip
            if step is None:  # killed between its last checkpoint and its model
                shutil.rmtree(folder / "checkpoints")
                return self.model(name, method, net, fit_config)
            job.save(step)
            spent = self.state.setdefault("seconds", {})
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - started
            self.state.setdefault("history", {})[name] = history[-200:]
            self.remember()
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return load_model(folder / "model", self.device)

    def length(self, name: str, method: Any, net: Callable[[], Any], config: FitConfig) -> int:
        """Iterations of a training: the plan's, or what fits into its share of --minutes; decided once."""
        if name not in self.state["iterations"]:
            minutes, iterations = self.settings["minutes"], getattr(self.plan, name)
            if minutes:
                share = SHARES[name]
                guess = estimate(method, self.train, net(), replace(config, iterations=iterations), device=self.device)
                iterations = max(20, int(60 * minutes * share / guess.step_seconds))
            self.state["iterations"][name] = iterations
            self.remember()
        return self.state["iterations"][name]

    # --- measuring --------------------------------------------------------------------------------------------

    def judged(
        self, name: str, net: Any, sampling: Sampling, count: int | None = None, seed: int = 0
    ) -> dict[str, Any]:
        """Quality, counted network evaluations and kept samples of a stage; measured once, then remembered."""
        file = self.out / "work" / "samples" / f"{name.replace(' ', '-').replace(',', '')}.pt"
        if name not in self.state["judged"] or not file.exists():
            started, count = time.perf_counter(), count or self.plan.judged
            with self.console.status(f"measuring {name}"), clock.count_calls(net) as calls:
                images, labels = draw(net, sampling, count, seed=1000 * self.settings["seed"] + seed)
            numbers = self.judge(images, labels, interval=True)
            write(file, lambda f: torch.save(images[:KEPT].clone(), f))
            self.state["judged"][name] = {
                "quality": numbers, "nfe": calls.nfe(count), "texture": texture(images),
                "seconds": time.perf_counter() - started,
            }  # fmt: skip
            self.remember()
            low, high = numbers["fd_low"], numbers["fd_high"]
            self.say(f"  {name}: FD {numbers['fd']:.3f} ({low:.3f} to {high:.3f}), recall {numbers['recall']:.3f}")
        kept = torch.load(file, weights_only=True)
        return {**self.state["judged"][name], "samples": kept}

    def best_scale(self, teacher: Any) -> float:
        """The guidance scale above 1 with the lowest FD on a fifth of the samples in 16 steps."""
        found = {}
        for scale in self.plan.scales:
            sampling = Sampling(even(16), "dpmpp_2m", cfg_scale=scale)
            found[scale] = self.judged(f"scale {scale:g}", teacher, sampling, max(500, self.plan.judged // 5))
        return min(found, key=lambda s: found[s]["quality"]["fd"])

    def floors(self, base: Row) -> dict[str, dict[str, float]]:
        """What every number is read against: real against real, and the baseline against itself."""
        found = {"held-out real images": self.judge.floor, "two halves of the real images": self.judge.floor_halves}
        mine = self.judged(base.name, base.net, base.sampling)["samples"]
        other = self.judged("baseline, another seed", base.net, base.sampling, seed=1)
        found["baseline, another seed"] = {**other["quality"], **quality.trajectory(mine, other["samples"])}
        if "last bit" not in self.state["judged"]:
            noise = torch.randn((KEPT, *self.train.shape), generator=self.generator())
            flipped = self.redraw(base, quality.flip_last_bit(noise))
            self.state["judged"]["last bit"] = quality.trajectory(self.redraw(base, noise), flipped)
            self.remember()
        found["baseline, last bit of the noise flipped"] = self.state["judged"]["last bit"]
        return found

    def generator(self) -> torch.Generator:
        """The seed from which every stage's noise is drawn."""
        return torch.Generator().manual_seed(1000 * self.settings["seed"])

    def redraw(self, row: Row, noise: Tensor) -> Tensor:
        """Samples [N, C, H, W] of a row from given noise."""
        classes = row.net.config.classes
        cond = {"label": torch.arange(len(noise), device=self.device) % classes} if classes else {}
        return sample(row.net, noise.to(self.device), cond, row.sampling, uncond=row.net.null(cond)).cpu()

    def timed(self, row: Row) -> Callable[[], Tensor]:
        """A call that draws one batch of a row, for the clock."""
        noise = torch.randn((self.plan.timed, *self.train.shape), generator=self.generator())
        return lambda: self.redraw(row, noise)

    # --- layers -----------------------------------------------------------------------------------------------

    def layers(self, best: Row, baseline: Row, stack: ExitStack) -> list[tuple[Row, str]]:
        """What else applies, one layer at a time on top of the layers that gained: (row, verdict).

        A layer stays on when it is at least 3 % faster and its FD is not above the upper end of the student's own.
        """
        made, kept, current = [], [], best
        trials: list[tuple[Row, Transform]] = [
            (best, Quantize("int8", min_side=32)), (best, Cast("bfloat16")), (best, Compile()),
            (baseline, Cache("easycache", threshold=CACHE)),
        ]  # fmt: skip
        for row, layer in trials:
            here = current if row is best else row
            on = [*kept, layer] if row is best else [layer]
            name = " + ".join([row.name, *(t.name for t in on)])
            try:
                fast = stack.enter_context(speed_up(clone(row.net).eval().requires_grad_(False), *on))
                mine = Row(name, f"{layer.name} on {here.name}.", fast, row.sampling, "layer")
                with self.console.status(f"timing {name}"):
                    times = clock.latency({"with": self.timed(mine), "without": self.timed(here)}, 5, 2, self.device)
                numbers = self.judged(name, fast, row.sampling)["quality"]
            except ConfigError as error:
                self.state["findings"][layer.name] = f"{layer.name} was left out: {error}"
                self.say(self.state["findings"][layer.name])
                continue
            gain = times["without"].p50 / times["with"].p50
            before = self.judged(here.name, here.net, here.sampling)["quality"]
            harm = numbers["fd"] > before["fd_high"]
            quality_said = f"FD {before['fd']:.3f} becomes {numbers['fd']:.3f}"
            if gain < 1.03:
                verdict = f"{layer.name} gains nothing at this size ({gain:.2f}x); {quality_said}; it is left off."
            elif harm:
                verdict = f"{layer.name} gains {gain:.2f}x but costs quality ({quality_said}); it is left off."
            else:
                verdict = f"{layer.name} gains {gain:.2f}x, and {quality_said}."
                if row is best:
                    kept, current = on, mine
            self.say(f"  {verdict}")
            made.append((mine, verdict))
        return made


def run(
    *, quick: bool = False, data: str = "digits", out: File | str = "hasten-demo", seed: int = 0, device: str = "cpu",
    minutes: float | None = None, console: Console | None = None,
) -> Report | None:  # fmt: skip
    """Run or resume the demo into ``out``; returns the report, or None where it is finished already.

    Args:
        quick: Everything in under a minute, with weaker models.
        data: What :func:`hasten.data.load` takes.
        minutes: Time to spend on training; the plan's iterations without.

    Raises:
        ConfigError: If ``out`` holds a demo with other settings, or the data cannot be used.
    """
    out, console, started = File(out), console or Console(stderr=True), time.perf_counter()
    settings = {"quick": quick, "data": data, "seed": seed, "device": device, "minutes": minutes}
    images = datasets.load(data)
    demo = Demo(QUICK if quick else Plan(), out, settings, torch.device(device), console)
    if (out / "report.html").exists() and (out / "report.json").exists():
        console.print(f"{out} is finished: open {out / 'report.html'}, or choose another --out to run anew.")
        return None
    demo.prepare(images)
    rows = train_and_list(demo, images)
    spent = {"teacher": 0.0, **demo.state.get("seconds", {})}
    console.print("Measuring quality", highlight=False)
    for row in rows:
        demo.judged(row.name, row.net, row.sampling)
    floors = demo.floors(rows[0])
    four = [r for r in rows if r.group in WAYS and len(r.sampling.times) == 5]
    best = min(four, key=lambda r: demo.state["judged"][r.name]["quality"]["fd"])
    with ExitStack() as stack:
        console.print("Adding layers, one at a time", highlight=False)
        layers = demo.layers(best, rows[0], stack)
        verdicts = {row.name: verdict for row, verdict in layers}
        rows += [row for row, _ in layers]
        with console.status("timing every stage, interleaved"):
            calls = {row.name: demo.timed(row) for row in rows}
            times = clock.latency(calls, demo.plan.repeats, 1, demo.device)
            memory = {name: clock.peak_memory(call, demo.device) for name, call in calls.items()}
    mine = demo.judged(rows[0].name, rows[0].net, rows[0].sampling)["samples"]
    stages = []
    for row in rows:
        seen = demo.judged(row.name, row.net, row.sampling)
        stages.append(
            Stage(
                row.name, row.what, len(row.sampling.times) - 1, seen["nfe"], seen["quality"], times[row.name].p50,
                times[row.name].p95, row.sampling.cfg_scale, quality.trajectory(mine, seen["samples"]),
                demo.plan.timed, memory[row.name].bytes, spent.get(row.group, 0.0), verdicts.get(row.name, ""),
                row.group, seen["samples"],
            )
        )  # fmt: skip
    settings |= demo.shown | {
        "iterations": demo.state["iterations"], "samples judged": demo.plan.judged,
        "validation loss by unit time": loss_per_time(rows[0].net, demo.held_out.x, condition(demo.held_out)),
        "peak memory": memory[rows[0].name].how, "command": command(settings), "seconds": time.perf_counter() - started,
    }  # fmt: skip
    report = Report(
        f"hasten demo on {images.name}", stages, floors, settings, clock.machine(demo.device),
        tuple(r.name for r in rows if len(r.sampling.times) == MANY + 1 and r.group == "teacher"), demo.train.x[:KEPT],
        findings(demo, rows, stages),
    )  # fmt: skip
    report.save(out)
    console.print(report.table())
    for sentence in report.findings:
        console.print(f"- {sentence}", highlight=False)
    console.print(f"Open {out / 'report.html'}", highlight=False)
    return report


def train_and_list(demo: Demo, images: Images) -> list[Row]:
    """Train the teacher and both students, or load them, and list the stages to measure."""
    plan, seed = demo.plan, demo.settings["seed"]
    shape = {"width": plan.width, "depth": plan.depth, "heads": plan.width // 32, "patch": patch_for(images.shape)}

    def fresh() -> DiT:
        torch.manual_seed(seed)
        return DiT(dit_config(shape, images.shape, images.classes))

    base = FitConfig(lr=2e-3, schedule="linear", warmup=50, ema=(0.995,), seed=seed, save_every=100)
    teacher = demo.model("teacher", Flow(), fresh, base)
    rows = [Row(f"teacher, {MANY} steps", "The teacher as it is, unguided.", teacher, Sampling(even(MANY)), "teacher")]
    if images.classes:
        scale = demo.best_scale(teacher)
        what = f"With classifier-free guidance at its best scale above 1, {scale:g}."
        guided = Sampling(even(MANY), cfg_scale=scale)
        rows.append(Row(f"teacher, {MANY} steps, guided", what, teacher, guided, "teacher"))
    for n in (8, 4, 2, 1):
        what = f"The teacher in {n} steps, untrained for it."
        rows.append(Row(f"teacher, {n} steps", what, teacher, Sampling(even(n)), "teacher, few steps"))
    configs = {
        "trajectory": replace(base, lr=1e-3, ema=(0.99,), warmup=20),
        "distribution": replace(base, lr=5e-4, batch=128, betas=(0.0, 0.99), ema=(0.98,), warmup=20),
    }
    for name, method in WAYS.items():
        student = demo.model(name, method, lambda: teacher, configs[name])
        for n in STEPS:
            what = f"{type(method).__name__} student in {n} of its own steps."
            rows.append(Row(f"{name}, {n} step{'s' * (n > 1)}", what, student, method.sampling(n), name))
    return rows


def findings(demo: Demo, rows: list[Row], stages: list[Stage]) -> list[str]:
    """The sentences at the top of the report: what was gained at which cost, and what is wrong."""
    base, real = stages[0], texture(demo.train.x)
    floor = demo.judge.floor["fd"]
    said = []
    for n in STEPS[::-1]:
        ours = [s for s in stages if s.group in WAYS and s.steps == n]
        s = min(ours, key=lambda s: s.quality["fd"])
        said.append(
            f"{s.name}: {base.p50 / s.p50:.0f}x faster than {base.name}, at FD {s.quality['fd']:.3f} against "
            f"{base.quality['fd']:.3f} (floor of real images {floor:.3f}) and recall {s.quality['recall']:.2f} against "
            f"{base.quality['recall']:.2f}."
        )
    said += [s.verdict for s in stages if s.verdict] + list(demo.state["findings"].values())
    for row in rows:
        if row.group in WAYS and len(row.sampling.times) - 1 == STEPS[-1]:
            seen, history = demo.state["judged"][row.name], demo.state["history"].get(row.group, [])
            wrong = diagnose(history, seen["quality"], base.quality, seen["texture"], real)
            said += [f"{row.name}: {sentence}" for sentence in wrong]
    return said


def condition(images: Images) -> dict[str, Tensor]:
    """The conditions of a whole set."""
    return {} if images.labels is None else {"label": images.labels}


def command(settings: dict[str, Any]) -> str:
    """The command line that runs this again."""
    given = {k: v for k, v in settings.items() if k in ("data", "seed", "device", "minutes") and v is not None}
    options = [f"--{k} {v}" for k, v in given.items()]
    return " ".join(["hasten demo", *(["--quick"] if settings["quick"] else []), *options])
