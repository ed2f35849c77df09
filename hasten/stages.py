"""Stages of the demo: trained and measured once, remembered in its folder, so that an interrupted run goes on."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from hasten.core.errors import ConfigError
from hasten.core.method import Sampling, even
from hasten.core.sample import sample
from hasten.data import Images
from hasten.data import load as load_data
from hasten.distribute import clone, load_model
from hasten.fit import fit
from hasten.measure import clock, quality
from hasten.measure.diagnose import texture
from hasten.measure.features import Features, classifier
from hasten.measure.judge import Judge
from hasten.progress import draw, estimate, watch
from hasten.recipe import Recipe
from hasten.role import FitConfig
from hasten.run import Job, matched
from hasten.speed import Cache, Cast, Compile, Quantize, Transform, speed_up
from hasten.whole import write

SPLIT = (1000 / 1797, 397 / 1797, 400 / 1797)  # reference and training set, floor, feature network; always the same
STEPS = (1, 2, 4)
MANY = 50
KEPT = 256  # samples of every stage that are kept, for pictures and trajectory metrics
SHARES = {"teacher": 0.3, "trajectory": 0.4, "distribution": 0.3}  # of the time for training, under --minutes
CACHE = 0.05  # the step cache's threshold


@dataclass(frozen=True)
class Plan:
    """How much of everything: sizes, iterations, samples."""

    width: int = 128
    depth: int = 3
    teacher: int = 600
    trajectory: int = 180
    distribution: int = 300
    judged: int = 5000
    scales: tuple[float, ...] = (1.25, 1.5)
    timed: int = 125
    repeats: int = 4
    features: int = 400
    batch: int = 256
    synthetic: int = 0  # samples of a pretrained teacher that stand for its data


QUICK = Plan(
    width=64, depth=1, teacher=80, trajectory=16, distribution=24, judged=240, scales=(1.5,), timed=40, repeats=2,
    features=60,
)  # fmt: skip

PRETRAINED = Plan(trajectory=120, distribution=160, judged=1000, scales=(1.5,), timed=25, repeats=3, batch=64,
                  synthetic=2000)  # fmt: skip


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
    judge: Judge = field(init=False)
    held_out: Images = field(init=False)
    real: Images = field(init=False)  # for pictures
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

    @property
    def synthetic(self) -> File:
        """Samples of a pretrained teacher, as data that ``hasten distill`` takes too."""
        return self.out / "work" / "synthetic.npz"

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
            features = classifier(rest.x, rest.labels, images.classes, seed=0, iterations=self.plan.features)
            features.save(file)
        features.to(self.device)
        self.judge = Judge(features, self.train.x, self.train.labels, self.held_out.x, self.held_out.labels)
        self.real = self.train
        self.shown = {"features": features.name, "split": [len(self.train), len(self.held_out), len(rest)]}

    def adopt(self, folder: File) -> Any:
        """Start from the model in ``folder`` and the judge beside it; its own samples stand for the data.

        Raises:
            CheckpointError: If the folder holds no judge.
        """
        self.judge, teacher = Judge.load(folder / "judge.safetensors"), load_model(folder, self.device)
        self.judge.features.to(self.device)
        config = teacher.config
        if not self.synthetic.exists():
            self.say(f"Drawing {self.plan.synthetic} samples of the teacher, which stand for its data")
            with self.console.status("drawing"):
                x, labels = draw(teacher, Sampling(even(MANY)), self.plan.synthetic, seed=77)
            arrays: dict[str, Any] = {} if labels is None else {"labels": labels.numpy()}
            arrays["images"] = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1).numpy()
            write(self.synthetic, lambda f: np.savez_compressed(f, **arrays))
        self.train = replace(matched(load_data(str(self.synthetic)), teacher), name=f"samples of {folder.name}")
        self.real = self.held_out = Images(self.judge.shown, self.judge.shown_labels, config.classes, "real images")
        self.shown = {"features": self.judge.features.name, "synthetic": len(self.train)}
        return teacher

    # --- training ---------------------------------------------------------------------------------------------

    def model(self, name: str, method: Any, net: Callable[[], Any], fit_config: FitConfig) -> Any:
        """Train ``method`` from ``net`` into ``out/name``, or load what is there; returns the network."""
        folder = self.out / name
        if not (folder / "model" / "model.json").exists():
            config = replace(fit_config, iterations=self.length(name, method, net, fit_config))
            task = "train" if name == "teacher" else "distill"
            steps = (MANY,) if name == "teacher" else STEPS
            teacher = None if name == "teacher" else self.settings["teacher"] or str(self.out / "teacher")
            net_now = net()
            about = Recipe(
                method, task=task, data=self.settings["data"] or str(self.synthetic), teacher=teacher, steps=steps,
                fit=config, out=str(folder),
                model={k: getattr(net_now.config, k) for k in ("patch", "width", "depth", "heads")},
            )  # fmt: skip
            job = Job(about, self.train, net_now, self.device, folder)
            started, history = time.perf_counter(), []
            step = watch(
                fit(method, self.train, job.net, config, device=self.device, out=folder),
                title=f"{name}: {type(method).__name__}", out=folder, preview=job.preview, previews=4,
                history=history, console=self.console,
            )  # fmt: skip
            assert step is not None  # a finished run still yields its last step
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
        file = self.out / "work" / "samples" / f"{name.replace(' ', '-').replace(',', '')}.safetensors"
        if name not in self.state["judged"] or not file.exists():
            started, count = time.perf_counter(), count or self.plan.judged
            with self.console.status(f"measuring {name}"), clock.count_calls(net) as calls:
                images, labels = draw(
                    net, sampling, count, seed=1000 * self.settings["seed"] + seed, batch=self.plan.timed
                )
            numbers = self.judge(images, labels, interval=True)
            write(file, lambda f: save_file({"samples": images[:KEPT].contiguous()}, f))
            self.state["judged"][name] = {
                "quality": numbers, "nfe": calls.nfe(count), "texture": texture(images),
                "seconds": time.perf_counter() - started,
            }  # fmt: skip
            self.remember()
            low, high = numbers["fd_low"], numbers["fd_high"]
            self.say(f"  {name}: FD {numbers['fd']:.3f} ({low:.3f} to {high:.3f}), recall {numbers['recall']:.3f}")
        kept = load_file(file)["samples"]
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

    def fewer(self, row: Row, cached: str) -> tuple[Row, str]:
        """As many plain steps as the cached run computes: (row, verdict)."""
        seen = self.state["judged"][cached]
        n = max(1, round(seen["nfe"]))
        plain = Row(f"{row.name.split(',')[0]}, {n} steps", f"As many evaluations as {cached}.", row.net,
                    Sampling(even(n)), "layer")  # fmt: skip
        fd, ours = self.judged(plain.name, plain.net, plain.sampling)["quality"]["fd"], seen["quality"]["fd"]
        better = (
            "the cache is the better use of them" if ours < fd else "plain steps do as well, so the cache is no gain"
        )
        return plain, f"{n} plain steps have FD {fd:.3f} where {cached} has {ours:.3f}: {better}."

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
                context = speed_up(clone(row.net).eval().requires_grad_(False), *on)
                fast = context.__enter__()
                stack.callback(undo, context)
                mine = Row(name, f"{layer.name} on {here.name}.", fast, row.sampling, "layer")
                with self.console.status(f"timing {name}"):
                    times = clock.latency(
                        {"with": self.timed(mine), "without": self.timed(here)}, self.plan.repeats, 1, self.device
                    )
                numbers = self.judged(name, fast, row.sampling)["quality"]
                if context.idle():
                    raise ConfigError(" ".join(context.idle()))
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
            counts = context.ledger()[layer.name]
            if "hit_rate" in counts:  # the hook counts the calls that the cache answered too
                verdict += f" It answered {counts['hit_rate']:.0%} of the calls without computing."
                self.state["judged"][name]["nfe"] = (len(row.sampling.times) - 1) * (1 - counts["hit_rate"])
                self.remember()
                made.append(self.fewer(row, name))  # what the same evaluations buy without a cache
            made.append((mine, verdict))
        return made


def undo(context: Any) -> None:
    """Leave a speed-up; that it did nothing has been reported by then."""
    with suppress(ConfigError):
        context.__exit__(None, None, None)
