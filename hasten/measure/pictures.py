"""The report's two pictures, as PNG: speed against quality, and samples of all stages from the same noise."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hasten.measure.report import Report

# Okabe & Ito's palette, which colour-blind readers can tell apart; each group also has its own marker.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "D", "^", "v", "P")
INK, SOFT, GRID = "#1f2933", "#616e7c", "#e4e7eb"


def blank(width: float, height: float) -> Any:
    """A figure that needs no display and leaves pyplot's state alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any) -> bytes:
    """The figure as a PNG file's bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", facecolor="white", metadata={"Software": None})
    return out.getvalue()


def pareto(report: Report) -> bytes:
    """Samples per second (right is faster) against Fréchet distance (low is better), both logarithmic, as PNG.

    The band is the noise floor; the line joins the stages that no other one beats in both.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = blank(9.2, 5.6)
    halo = [withStroke(linewidth=3, foreground="white", alpha=0.85)]
    ax = figure.add_axes((0.085, 0.115, 0.895, 0.795))
    stages = report.stages
    tiny = min((s.quality["fd"] for s in stages if s.quality["fd"] > 0), default=1.0)
    fd = [max(s.quality["fd"], tiny / 10) for s in stages]  # a logarithm has no place for 0
    rate = [s.rate for s in stages]
    floor = next(((k, v) for k, v in report.floor.items() if "fd" in v), None)
    levels = fd + ([max(floor[1]["fd"], tiny / 10)] if floor else [])
    low, high = min(levels) / 2.2, max(levels) * 2.6
    ax.set(xscale="log", yscale="log", xlim=(min(rate) / 1.7, max(rate) * 2.6), ylim=(low, high))
    if floor:
        name, numbers = floor
        bottom, top = (max(numbers.get(k, numbers["fd"]), low) for k in ("fd_low", "fd_high"))
        ax.axhspan(bottom, max(top, bottom * 1.02), color="#bcccdc", alpha=0.45, lw=0)
        ax.axhline(max(numbers["fd"], low), color="#829ab1", lw=1.2, ls=(0, (5, 3)))

    front, best = [], float("inf")
    for x, y in sorted(zip(rate, fd, strict=True), reverse=True):
        if y < best:
            front.append((x, y))
            best = y
    ax.plot(*zip(*front, strict=True), color="#9aa5b1", lw=1.4, zorder=1)

    groups = list(dict.fromkeys(s.group for s in stages))
    for s, x, y in zip(stages, rate, fd, strict=True):
        i = groups.index(s.group)
        colour = COLOURS[i % len(COLOURS)]
        bounds = (s.quality.get("fd_low"), s.quality.get("fd_high"))
        if bounds[0] is not None and bounds[1] is not None:
            ax.plot([x, x], [max(bounds[0], low), bounds[1]], color=colour, lw=1.3, alpha=0.6, zorder=2)
        ax.plot(x, y, MARKERS[i % len(MARKERS)], ms=8.5, color=colour, mec="white", mew=1.2, zorder=3)
    for i, group in enumerate(groups):
        ax.plot([], [], MARKERS[i % len(MARKERS)], ms=7.5, color=COLOURS[i % len(COLOURS)], mec="white", label=group)

    ax.set_xlabel(f"samples per second (batch of {stages[0].batch}), faster →", color=INK, fontsize=11)
    ax.set_ylabel("Fréchet distance, ↓ better", color=INK, fontsize=11)
    ax.grid(True, which="major", color=GRID, lw=0.9)
    ax.set_axisbelow(True)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.10g}"))
        axis.set_minor_formatter(NullFormatter())
    ax.tick_params(colors=SOFT, labelsize=9.5, length=0, which="both")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color("#cbd2d9")
    ax.legend(
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(groups), frameon=False, fontsize=10, labelcolor=INK,
        handletextpad=0.2, columnspacing=1.4, borderaxespad=0.2,
    )  # fmt: skip
    taken = []
    if floor:
        text = ax.text(
            0.008, max(floor[1]["fd"], low), f"noise floor: {floor[0]}", transform=ax.get_yaxis_transform(),
            color="#486581", fontsize=9, va="bottom", zorder=4, path_effects=halo,
        )  # fmt: skip
        taken.append(text.get_window_extent())
    _label(ax, [(s.name, x, y) for s, x, y in zip(stages, rate, fd, strict=True)], taken, halo)
    return png(figure)


def _label(ax: Any, points: Sequence[tuple[str, float, float]], taken: list[Any], halo: list[Any]) -> None:
    """Write each name beside its point, at the nearest place that covers no point, no other name and no edge."""
    from matplotlib.transforms import Bbox

    figure = ax.figure
    renderer, scale = figure.canvas.get_renderer(), figure.dpi / 72
    frame = ax.get_window_extent(renderer)
    spots = [ax.transData.transform((x, y)) for _, x, y in points]
    dots = [Bbox.from_bounds(px - 6 * scale, py - 6 * scale, 12 * scale, 12 * scale) for px, py in spots]
    sides = [(1, 0, "left"), (0, 1, "center"), (0, -1, "center"), (-1, 0, "right")]
    sides += [(1, 1, "left"), (1, -1, "left"), (-1, 1, "right"), (-1, -1, "right")]
    places = [
        ((dx * (12 if dy else distance), dy * distance), align, distance)
        for distance in (10, 18, 30, 44, 60, 80)
        for dx, dy, align in sides
    ]
    for (name, x, y), dot in zip(points, dots, strict=True):
        text = ax.annotate(
            name, (x, y), (0, 0), textcoords="offset points", va="center", fontsize=9, color=INK, zorder=5,
            path_effects=halo,
        )  # fmt: skip

        def put(place: tuple[tuple[float, float], str, int], text: Any = text) -> Any:
            text.set(position=place[0], ha=place[1])
            return text.get_window_extent(renderer)

        def price(place: tuple[tuple[float, float], str, int], put: Any = put, dot: Any = dot) -> float:
            box = put(place)
            hits = sum(box.overlaps(other) for other in (*taken, *(d for d in dots if d is not dot)))
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
            return 1000 * hits + 2000 * outside + place[2]

        best = min(places, key=price)
        taken.append(put(best))
        if best[2] > 18:  # a name that had to move away gets a thin line to its point
            ax.annotate(
                "", (x, y), best[0], textcoords="offset points", zorder=2,
                arrowprops={"arrowstyle": "-", "color": "#9aa5b1", "lw": 0.7, "shrinkA": 0, "shrinkB": 5},
            )  # fmt: skip


def pixels(images: Tensor) -> Tensor:
    """Images [N, C, H, W] in [-1, 1] as [N, H, W, 3] uint8; a channel count other than 3 shows its first channel."""
    x = images.detach().cpu().float()
    x = x if x.shape[1] == 3 else x[:, :1].expand(-1, 3, -1, -1)
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def grid(rows: Sequence[tuple[str, Tensor]], columns: int = 16) -> bytes:
    """One row of images per caption, equal columns from equal noise, as PNG. Images [N, C, H, W] in [-1, 1]."""
    columns = min(columns, *(len(images) for _, images in rows), len(rows[0][1]))
    _, _, h, w = rows[0][1].shape
    zoom = max(1, round(90 / w))  # whole pixels, so that tiny images stay sharp
    h, w, gap = h * zoom, w * zoom, 8
    canvas = torch.full((len(rows) * (h + 2 * gap) - 2 * gap, columns * (w + gap) - gap, 3), 255, dtype=torch.uint8)
    for i, (_, images) in enumerate(rows):
        large = pixels(images[:columns]).repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
        for j, image in enumerate(large):
            top, left = i * (h + 2 * gap), j * (w + gap)
            canvas[top : top + h, left : left + w] = image
    tall, wide = canvas.shape[:2]
    margin, rim = 2.3, 0.1  # inches: captions on the left, a rim elsewhere
    dpi = 160
    width, height = margin + wide / dpi + rim, tall / dpi + 2 * rim
    figure = blank(width, height)
    figure.figimage(canvas.numpy(), xo=round(margin * dpi), yo=round(rim * dpi), origin="upper")
    for i, (caption, _) in enumerate(rows):
        middle = (rim + (tall - i * (h + 2 * gap) - h / 2) / dpi) / height
        head, _, rest = caption.partition("\n")
        step = 0.075 / height if rest else 0
        x = (margin - 0.14) / width
        figure.text(x, middle + step, head, ha="right", va="center", fontsize=8.5, color=INK)
        figure.text(x, middle - step, rest, ha="right", va="center", fontsize=7.2, color=SOFT)
    return png(figure)
