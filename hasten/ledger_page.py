"""A ledger as JSON, a self-contained HTML page, a plot and a table in the terminal."""

from __future__ import annotations

import json
from pathlib import Path as File
from typing import Any

from hasten.core.errors import ConfigError
from hasten.ledger import Ledger
from hasten.measure.clock import machine
from hasten.measure.pictures import COLOURS, INK, SOFT, blank, png
from hasten.measure.report import inline, jsonable, write

FORMAT = "hasten-ledger-1"


def as_dict(book: Ledger) -> dict[str, Any]:
    """What ledger.json holds: every line with its gain, interaction and verdict, floors, machine."""
    lines = []
    for line in book.lines:
        numbers = {k: v for k, v in vars(line).items() if k != "layers"}
        derived: dict[str, Any] = {"verdict": book.verdict(line)}
        if not line.refused:
            derived |= {"gain": book.gain(line), "marginal": book.marginal(line)}
            derived |= {"interaction": book.interaction(line), "extra_loss": book.extra_loss(line)}
        lines.append({"name": line.name, "layers": list(line.layers), **numbers, **derived})
    floors = {"last_bit": book.floor, "quality": book.quality_floor, "another_seed": book.seed_floor}
    return jsonable({"format": FORMAT, "lines": lines, "floors": floors, "about": book.about})


def plot(book: Ledger) -> bytes:
    """A bar for every line: milliseconds at the median with p95, and its loss beside it, as PNG."""
    shown = [x for x in book.lines if not x.refused]
    figure = blank(9.2, 1.1 + 0.34 * len(shown))
    ax = figure.add_axes((0.28, 0.9 / (1.1 + 0.34 * len(shown)), 0.5, 1 - 1.2 / (1.1 + 0.34 * len(shown))))
    values = [1e3 * x.p50 for x in shown]
    whiskers = [[0.0] * len(shown), [1e3 * (x.p95 - x.p50) for x in shown]]
    colours = [SOFT if not x.layers else COLOURS[0] if len(x.layers) == 1 else COLOURS[2] for x in shown]
    ax.barh(range(len(shown)), values, xerr=whiskers, color=colours, height=0.66, error_kw={"ecolor": INK, "lw": 0.9})
    ax.set_yticks(range(len(shown)), [x.name for x in shown], fontsize=8.5, color=INK)
    ax.invert_yaxis()
    ax.set_xlabel("ms of a request (median; whisker: p95)", color=SOFT, fontsize=9)
    for i, line in enumerate(shown):
        loss = line.trajectory.get("psnr")
        fd = f"  FD {line.quality['fd']:.3g}" if line.quality else ""
        right = f"{book.gain(line):.2f}x" + (f"  {loss:.0f} dB" if loss is not None and loss < 200 else "") + fd
        ax.annotate(right, (1.01, i), xycoords=("axes fraction", "data"), va="center", fontsize=8.5, color=INK)
    ax.spines[["top", "right"]].set_visible(False)
    return png(figure)


def page(book: Ledger, title: str) -> str:
    """The HTML page with its plot inside."""
    import jinja2

    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(File(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return env.get_template("ledger.html.j2").render(book=book, title=title, plot=inline(plot(book)), share=share)


def share(counts: dict[str, dict[str, float]]) -> str:
    """Of a line's counts what says that its layers acted: hit rates and shares quantized."""
    said = []
    for name, numbers in counts.items():
        if "hit_rate" in numbers:
            said.append(f"{name} {numbers['hit_rate']:.0%} hits")
        elif "of" in numbers and "layers" in numbers:
            said.append(f"{name} {numbers['layers']:.0f} of {numbers['of']:.0f} linears")
        elif numbers:
            key, value = next(iter(numbers.items()))
            said.append(f"{name} {value:.0f} {key}")
    return "; ".join(said)


def save(book: Ledger, folder: File | str, title: str, device: Any = "cpu") -> None:
    """Write ledger.json, ledger.html and ledger.png, each whole or not at all.

    Raises:
        ConfigError: If the folder cannot be written.
    """
    folder = File(folder)
    about = {"title": title, **as_dict(book), "machine": machine(device)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "ledger.png", plot(book))
        write(folder / "ledger.html", page(book, title).encode())
        write(folder / "ledger.json", json.dumps(about, indent=1, allow_nan=False, ensure_ascii=False).encode())
    except OSError as error:
        raise ConfigError(f"The ledger could not be written to {folder}: {error.strerror}.") from error


def table(book: Ledger, title: str) -> Any:
    """A rich Table for the terminal."""
    from rich.table import Table

    judged = any(x.quality for x in book.lines)
    found = Table(title=title)
    for column in ("layers", "ms", "p95", "gain", "interaction", "extra MSE", "PSNR dB", *(["FD"] if judged else [])):
        found.add_column(column, justify="left" if column == "layers" else "right")
    for line in book.lines:
        if line.refused:
            found.add_row(line.name, "refused")
            continue
        pair, extra = book.interaction(line), book.extra_loss(line)
        psnr = line.trajectory.get("psnr", float("inf"))
        fd = [f"{line.quality['fd']:.3f}" if line.quality else ""] if judged else []
        found.add_row(
            line.name, f"{1e3 * line.p50:.1f}", f"{1e3 * line.p95:.1f}", f"{book.gain(line):.2f}x",
            "" if pair is None else f"{pair:.2f}", "" if extra is None else f"{extra:+.1e}", f"{psnr:.1f}", *fd,
        )  # fmt: skip
    return found
