"""The report of a stack of speed-ups: every stage's speed beside its quality, as a page, a file and a table."""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

from torch import Tensor

from hasten.core.errors import ConfigError

Numbers = dict[str, float]

# key, heading, format, whether lower (-1) or higher (+1) is better
QUALITY = (
    ("fd", "FD", "three digits", -1),
    ("kd", "KD", "{:.2g}", -1),
    ("sw", "SW", "{:.3f}", -1),
    ("precision", "precision", "{:.3f}", 1),
    ("recall", "recall", "{:.3f}", 1),
    ("coverage", "coverage", "{:.3f}", 1),
    ("coverage_worst", "worst class", "{:.3f}", 1),
    ("accuracy", "accuracy", "{:.3f}", 1),
)
TRAJECTORY = (("psnr", "PSNR dB", "{:.1f}", 1), ("ssim", "SSIM", "{:.3f}", 1))


@dataclass
class Stage:
    """One stage of a stack: how fast AND how good.

    Args:
        name: Short, for labels.
        what: One sentence: what was done.
        steps: Sampling steps.
        nfe: Network evaluations per sample, counted.
        quality: The judge's numbers; ``fd`` must be among them.
        p50: Median seconds of one batch.
        p95: 95th percentile of the same.
        cfg_scale: Guidance scale; 1 is unguided.
        trajectory: ``psnr`` and ``ssim`` to the baseline from the same noise, where that means anything.
        batch: Samples in the timed batch.
        peak_memory: Bytes.
        seconds: What making it took.
        verdict: What to think of it, in a sentence.
        group: Stages of one group share a colour: "teacher", "trajectory", "distribution", "layer", ...
        samples: Images [N, C, H, W] in [-1, 1], from the same noise in every stage; kept out of the JSON.

    Raises:
        ConfigError: Without a quality number, or with a latency that is not positive.
    """

    name: str
    what: str
    steps: int
    nfe: float
    quality: Numbers
    p50: float
    p95: float
    cfg_scale: float = 1.0
    trajectory: Numbers | None = None
    batch: int = 1
    peak_memory: int | None = None
    seconds: float = 0.0
    verdict: str = ""
    group: str = "student"
    samples: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not math.isfinite(self.quality.get("fd", math.nan)):
            raise ConfigError(
                f"The stage {self.name!r} has no quality number; judge its samples ('fd') before reporting."
            )
        if not 0 < self.p50 <= self.p95:
            raise ConfigError(f"The stage {self.name!r} needs 0 < p50 <= p95 seconds, not {self.p50} and {self.p95}.")

    @property
    def rate(self) -> float:
        """Samples per second at the median."""
        return self.batch / self.p50

    def as_dict(self) -> dict[str, Any]:
        """Everything but the samples, as JSON can hold it."""
        shallow = {k: v for k, v in vars(self).items() if k != "samples"}
        return jsonable(shallow)


@dataclass
class Report:
    """All stages of one run.

    Args:
        title: The page's heading.
        stages: The first is the baseline unless ``baselines`` names others.
        floor: Noise floors by name, e.g. {"held-out real images": judge.floor}; the first with ``fd`` is the plot's
            band.
        settings: Seed, command, data and whatever else is needed to run it again.
        machine: ``clock.machine()``.
        baselines: Names of the stages that speed-ups are given over.
        real: Real images [N, C, H, W], the first row of the grid.
        findings: Sentences for the top of the page.

    Raises:
        ConfigError: Without stages, with two of one name, or for a baseline that is no stage.
    """

    title: str
    stages: list[Stage]
    floor: dict[str, Numbers]
    settings: dict[str, Any]
    machine: dict[str, Any]
    baselines: tuple[str, ...] = ()
    real: Tensor | None = field(default=None, repr=False, compare=False)
    findings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = [s.name for s in self.stages]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"A report needs stages of different names; found {names}.")
        self.baselines = tuple(self.baselines) or (names[0],)
        for name in self.baselines:
            if name not in names:
                raise ConfigError(f"The baseline {name!r} is not among the stages: {', '.join(names)}.")

    def speedups(self, stage: Stage) -> Numbers:
        """Batches per second over each baseline's."""
        by_name = {s.name: s for s in self.stages}
        return {name: stage.rate / by_name[name].rate for name in self.baselines}

    def as_dict(self) -> dict[str, Any]:
        """What report.json holds."""
        return {
            "format": "hasten-report-1",
            "title": self.title,
            "findings": self.findings,
            "stages": [{**s.as_dict(), "speedup": jsonable(self.speedups(s))} for s in self.stages],
            "baselines": list(self.baselines),
            "floor": jsonable(self.floor),
            "settings": jsonable(self.settings),
            "machine": jsonable(self.machine),
        }

    def save(self, folder: File | str) -> None:
        """Write report.json, report.html (self-contained), pareto.png and samples.png, each whole or not at all.

        Raises:
            ConfigError: If the folder cannot be written.
        """
        from hasten.measure import pictures

        folder = File(folder)
        pareto = pictures.pareto(self)
        rows = [(_caption(s), s.samples) for s in self.stages if s.samples is not None]
        rows = ([("real images", self.real)] if self.real is not None else []) + rows
        grid = pictures.grid(rows) if rows else None
        page = self.html(pareto, grid)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / "pareto.png", pareto)
            if grid is not None:
                write(folder / "samples.png", grid)
            write(folder / "report.html", page.encode())
            text = json.dumps(self.as_dict(), indent=1, allow_nan=False, ensure_ascii=False)
            write(folder / "report.json", text.encode())
        except OSError as error:
            raise ConfigError(f"The report could not be written to {folder}: {error.strerror}.") from error

    def html(self, pareto: bytes, grid: bytes | None) -> str:
        """The page, with both pictures (PNG) inside it."""
        import jinja2

        env = jinja2.Environment(
            loader=jinja2.FileSystemLoader(File(__file__).parent),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        quality = [q for q in QUALITY if any(q[0] in s.quality for s in self.stages)]
        trajectory = [q for q in TRAJECTORY if any(s.trajectory and q[0] in s.trajectory for s in self.stages)]
        return env.get_template("report.html.j2").render(
            report=self,
            pareto=inline(pareto),
            grid=inline(grid) if grid else None,
            quality=quality,
            trajectory=trajectory,
            best={q[0]: _best(self.stages, q[0], q[3]) for q in quality},
            show=show,
            seconds=seconds,
            memory=lambda b: "" if b is None else f"{b / 2**20:,.0f}",
        )

    def table(self) -> Any:
        """A rich Table for the terminal: what a person looks at first; the page holds the rest."""
        from rich.table import Table

        columns = [q for q in QUALITY if q[0] in ("fd", "recall")]
        columns = [q for q in columns if any(q[0] in s.quality for s in self.stages)]
        table = Table(title=self.title, title_justify="left", header_style="bold", row_styles=["", "dim"])
        table.add_column("stage", overflow="fold")
        for heading in ("NFE", *(q[1] for q in columns), f"ms / {self.stages[0].batch}"):
            table.add_column(heading, justify="right", no_wrap=True)
        for number in range(1, len(self.baselines) + 1):
            table.add_column(f"×{number}", justify="right", no_wrap=True)
        table.caption = ", ".join(f"×{i}: speed over {name}" for i, name in enumerate(self.baselines, 1))
        for s in self.stages:
            speed = [f"{v:.1f}" for v in self.speedups(s).values()]
            numbers = [show(s.quality.get(k), f) for k, _, f, _ in columns]
            table.add_row(s.name, f"{s.nfe:.3g}", *numbers, f"{s.p50 * 1e3:.1f}", *speed)
        table.add_section()
        for name, numbers in self.floor.items():
            if "fd" in numbers:
                blank = [""] * (1 + len(self.baselines))
                table.add_row(f"floor: {name}", "", *(show(numbers.get(k), f) for k, _, f, _ in columns), *blank)
        return table


def show(value: float | None, form: str) -> str:
    """A number as text: nothing where there is none, a sign for infinity."""
    if value is None or math.isnan(value):
        return ""
    if form == "three digits" and math.isfinite(value):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"
    return "∞" if math.isinf(value) else form.format(value).replace("-", "−")


def seconds(value: float) -> str:
    """A duration as text."""
    return f"{value:.0f} s" if value < 120 else f"{value / 60:.1f} min"


def _caption(stage: Stage) -> str:
    return f"{stage.name}\n{stage.nfe:.3g} NFE · FD {show(stage.quality['fd'], 'three digits')}"


def _best(stages: list[Stage], key: str, sign: int) -> float | None:
    pick: Callable[..., float] = max if sign > 0 else min
    return pick((s.quality[key] for s in stages if key in s.quality), default=None)


def inline(png: bytes) -> str:
    """A picture as the address that a page can hold."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def write(file: File, content: bytes) -> None:
    """Write a file whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def jsonable(value: Any) -> Any:
    """``value`` in JSON's types; an infinite PSNR (equal images) becomes the word, as JSON has no infinity."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, Tensor):
        return jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
