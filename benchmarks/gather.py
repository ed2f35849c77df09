"""Gathers the files of benchmarks/methods.py into one result, its page under docs/ and its picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from hasten.names import METHODS

DOCS = Path(__file__).parent.parent / "docs"
LEFT_OUT = {
    "flow": "trains teachers",
    "guidance": "keeps the number of steps",
    "dpo": "needs preferences",
    "cm": "is `cd` with a teacher and `ect` without one",
}
BARS = {4: 1.15, 1: 1.6}  # ratios to the best teacher that a good student stays under, by steps
KEPT = ("fd", "fd_low", "fd_high", "kd", "precision", "recall", "coverage", "nfe", "iterations", "seconds", "batch",
        "lr", "forwards an iteration", "ms of 125")  # fmt: skip
OTHERWISE = ("guided", "start", "alone", "set")  # settings of runs that are not for the tables
BESIDE = {  # rows of the teacher, by steps
    4: ("teacher, 50 steps", "teacher, 50 steps, another seed", "teacher, 8 steps", "teacher, 4 steps"),
    2: ("teacher, 50 steps", "teacher, 2 steps"),
    1: ("teacher, 50 steps", "teacher, 1 steps"),
}
SHOWN = 10  # samples of every step count in the picture
HIGH, LEFT, RIGHT, GAP, INK = 24, 140, 120, 14, "#1f2933"  # its pixels: a sample, names, ratios, between parts


def write(folder: Path, data: str, longer: Sequence[Path] = ()) -> dict[str, Any]:
    """Everything under ``folder``, and runs made otherwise under ``longer``; also writes the page and its picture."""
    result = gather(folder, data)
    if longer:
        result["longer"] = [run for place in longer for run in lengthened(place, result)]
    page_of(data).write_text(page(result))
    picture(result, folder).quantize(128).save(DOCS / f"methods-{data}.png", optimize=True)
    return result


def page_of(data: str) -> Path:
    """Where the page of a comparison is: docs/methods.md for digits, else with the data in its name."""
    return DOCS / ("methods.md" if data == "digits" else f"methods-{data}.md")


def lengthened(folder: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every run under ``folder``, whatever its settings, with its ratios to the best teacher of ``result``.

    Raises:
        ValueError: If there is none, or one failed.
    """
    floor, best, found = result["floor"]["fd"], result["best teacher"], []
    files = sorted(folder.glob("*-*.json"))
    if not files:
        raise ValueError(f"{folder} holds no runs.")
    for file in files:
        run = json.loads(file.read_text())
        if "failed" in run:
            raise ValueError(f"{file} failed: {run['failed']} Delete it, or run it again.")
        for n, row in run.get("steps", {}).items():
            about = {"method": run["method"], "seed": run["seed"], "forwards": run["forwards"] + run.get("before", 0)}
            about |= {k: run[k] for k in OTHERWISE if run.get(k)}
            found.append({**about, "steps": int(n), "ratio": tidy(over(row["fd"], floor, best)), **tidied(row)})
    return found


def gather(folder: Path, data: str) -> dict[str, Any]:
    """All runs under ``folder``: numbers of the first seed, the distances of all, and ratios to the best teacher.

    Raises:
        ValueError: If there is no run, the runs had different budgets, or one was guided, started or for one count.
    """
    base = json.loads((folder / "teacher.json").read_text())
    runs = [json.loads(file.read_text()) for file in sorted(folder.glob("*-*.json"))]
    if other := [run["method"] for run in runs if any(run.get(k) for k in OTHERWISE)]:
        raise ValueError(f"{other[0]} in {folder} was not made as the tables are; give its folder with --longer.")
    budgets = {run["forwards"] for run in runs}
    if len(budgets) != 1:
        raise ValueError(f"{folder} holds runs with the budgets {sorted(budgets)}; they are compared at one budget.")
    floor = base["floor"]["fd"]
    best = min(row["fd"] for name, row in base["rows"].items() if " 50 steps" in name and "another" not in name)
    found: dict[str, Any] = {}
    for run in sorted(runs, key=lambda r: (r["method"], r["seed"])):
        name = run["method"]
        if "failed" in run:
            found.setdefault(name, {"failed": run["failed"]})
            continue
        if name not in found or "failed" in found[name]:
            steps = {n: tidied(row) for n, row in run["steps"].items()}
            found[name] = {k: run[k] for k in ("pilots", "rates") if run.get(k) is not None} | {"steps": steps}
        for n, row in run["steps"].items():
            mine = found[name]["steps"][n]
            mine.setdefault("fd by seed", {})[str(run["seed"])] = tidy(row["fd"])
            mine.setdefault("ratio", tidy(over(row["fd"], floor, best)))
    missing = [name for name in METHODS if name not in found and name not in LEFT_OUT]
    return {"data": data, "forwards": budgets.pop(), "floor": base["floor"], "halves": base["halves"],
            "teacher": base["rows"], "best teacher": best, "methods": found, "missing": missing}  # fmt: skip


def over(fd: float, floor: float, best: float) -> float:
    """FD + floor over that of the best teacher, the measure of the bars."""
    return (fd + floor) / (best + floor)


def tidied(row: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run's row; a learning rate as it is, being too small for four digits after the point."""
    return {k: row[k] if k == "lr" else tidy(row[k]) for k in KEPT if k in row}


def tidy(value: float) -> float:
    """Four digits after the point."""
    return round(value, 4)


def ranked(result: dict[str, Any], steps: int) -> list[str]:
    """The methods that have samples at so many steps, best first."""
    there = {n: m["steps"][str(steps)] for n, m in result["methods"].items() if str(steps) in m.get("steps", {})}
    return sorted(there, key=lambda name: there[name]["ratio"])


def listed(result: dict[str, Any]) -> list[str]:
    """All methods that have samples, best at 4 steps first; after them those that have none there."""
    return list(dict.fromkeys(name for n in (4, 2, 1) for name in ranked(result, n)))


# --- the page -------------------------------------------------------------------------------------------------


def page(result: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    floor, best, data = result["floor"], result["best teacher"], result["data"]
    lines = [
        "# The methods compared" + ("" if data == "digits" else f" on {data}"),
        "",
        f"Every method distils the same teacher of {data} with the same budget, and is judged by the same "
        "samples. `benchmarks/methods.py` runs it, and writes this page from its JSON under `benchmarks/results/`.",
        "",
        f"![Samples of every method from the same noise](methods-{data}.png)",
        "",
        *how(result),
        "",
        *NOTES.get(data, []),
    ]
    for n in (4, 2, 1):
        head = [f"up to {BARS[n]:g}"] if n in BARS else []
        lines += ["", f"## {'1 step' if n == 1 else f'{n} steps'}", ""]
        lines.append(f"| | {' | '.join(['FD (interval)', 'ratio', *head])} | KD | precision | recall | coverage |")
        lines.append("|---|" + "--:|" * (6 + len(head)))
        rows = []
        for name in BESIDE[n]:
            row = result["teacher"][name]
            ratio = over(row["fd"], floor["fd"], best)
            rows.append((f"*{name.replace(' 1 steps', ' 1 step')}*", {**row, "ratio": ratio}, False))
        rows.append(("*held-out real images: the floor*", floor, False))
        rows += [(f"`{name}`", result["methods"][name]["steps"][str(n)], True) for name in ranked(result, n)]
        for name, row, judged in rows:
            ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
            met = [("yes" if row["ratio"] <= BARS[n] else "no") if judged else ""] if n in BARS else []
            cells = [name, f"{row['fd']:.3f} ({row['fd_low']:.3f}–{row['fd_high']:.3f})", ratio, *met]
            cells += [f"{row['kd']:.4f}", *(f"{row[k]:.3f}" for k in ("precision", "recall", "coverage"))]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [*seeds(result), *longer(result), *cost(result), *absent(result)]
    return "\n".join(lines).rstrip() + "\n"


def how(result: dict[str, Any]) -> list[str]:
    """How it was measured."""
    taken = sorted({m["rates"] for m in result["methods"].values() if m.get("rates")})
    rate = (
        "A pilot of 15 % of the budget with the rate of the method's row (`hasten methods NAME`) and one with 1e-3; "
        "the lower geometric mean of FD + floor has the whole budget, from the start."
    )
    if taken:
        rate = f"That which `{'`, `'.join(taken)}` chose for the method, by pilots on its data."
        alone = [name for name, m in result["methods"].items() if m.get("pilots")]
        rate += f" {', '.join(f'`{n}`' for n in alone)} had pilots here." if alone else ""
    return [
        "## How it was measured",
        "",
        f"- **Budget.** {result['forwards']:,} forwards of 256 samples, counted by torch in floating-point operations "
        "over all networks and both passes, relative to one forward of the teacher. A method that trains for one step "
        "count has the budget for 4 steps and again for 1. Every row is one training with seed 0.",
        f"- **Learning rate.** {rate} Nothing else is tuned.",
        "- **What counts iterations is fitted to the run**: a warm-up of the method takes a fifth of it, and all "
        "doublings of a consistency model's grid happen within it. With fewer than 100 iterations the batch is halved.",
        f"- **Judge.** 5,000 samples. FD + floor is held against that of the best teacher at 50 steps (FD "
        f"{result['best teacher']:.3f}, floor {result['floor']['fd']:.3f}); the ratio of a good student is at most "
        f"{BARS[4]} at 4 steps and {BARS[1]} at 1. Differences within the bootstrap intervals are no order.",
    ]


DIGITS = [  # about the run under results/; to be read again when it is repeated
    "## What to read from it",
    "",
    "- **This is the order of a short run.** The budget is one to three hundred iterations on 8×8 images; papers train "
    "far longer. It says which method gets somewhere at once, not which one ends best, and many neighbours in the "
    "tables differ by less than their intervals.",
    "- **TwinFlow leads at one step and CTM at four**, each with one training for all step counts. Moment "
    "matching, TDM and phased DMD are trained for one step count at a time and so have the budget once for each. "
    "Near the bar the order is noise.",
    "- **LADD is slow**: nothing but a discriminator that starts from nothing teaches its student, and it needs most "
    "updates. With a student that learned half as fast as the heads it got worse than the untrained teacher; now they "
    "learn 40 times as fast as it does, and every token has a hinge of its own ([log](log.md)). The paper's times are "
    "for large latents: around one half it did better on images so small.",
    "- **BOOT makes its samples in one step** and is in that table alone.",
    "- **MeanFlow, iMF and AlphaFlow meet the gap of one step only since their laws of t and r are those of the "
    "authors' CIFAR-10 runs**; with two draws of LogitNormal(-0.4, 1) they were no better there than the untrained "
    "teacher, and better at 4 steps ([log](log.md)). At this length they still fall short of their papers at one step.",
    "- **DMD2, f-distill, SiD and SiDA are worst at 4 steps**, where one expects them to be best. One student serves "
    "three step counts here, of which 4 steps probably get too few updates; methods of their kind that are trained for "
    "one count at a time do well at both, which speaks for that. f-distill's weights act, but its discriminator is too "
    "weak after so few updates to set it apart from DMD2.",
    "- **SANA-Sprint and TCM at one step** are far from their papers at the higher rate, which their pilots chose; at "
    "their rows' own rates exploratory runs were better ([log](log.md)).",
    "- **Curricula decide more than rates for consistency models.** With counts for long runs (a doubling or a "
    "warm-up in 1000 iterations), consistency models end before their curriculum has begun and stay far off; at the "
    "same learning rate with a curriculum fitted to the run, as it is by default now, they are near the leaders at 2 "
    "steps. No JSON backs this yet: it was seen while the benchmark was made.",
    "- **The pilots are short**, and so lean to the larger rate; where both did well, the choice is a coin's.",
    "- **The teacher is below the floor** because the reference is its training set, which students of data have seen, "
    "too: a distance to it also rewards memory ([measuring](measuring.md)).",
]


FASHION = [  # the same
    "## What to read from it",
    "",
    "- **This is the start of a run.** The budget is a twelfth of what the teacher's own training cost, one hundred to "
    "two hundred iterations on 28×28 images. It says which method gets somewhere at once.",
    "- **Nothing meets the bars in it.** At 4 steps PSD, moment matching, IMM and progressive distillation come "
    "nearest, within each other's intervals; at 1 step moment matching does, with a training for that count alone.",
    "- **SiD for 1 step alone meets the bar with ten times the forwards**, recall as well, with both seeds. In the "
    "table it serves three step counts at once and is far behind; for one alone, with the table's budget, it is ahead "
    "of every row at 1 step, and at 4 twice as near as there, though no better than alone at 1.",
    "- **At 4 steps progressive distillation comes to the bar and stays just outside**, from 64 steps of the teacher "
    "guided at 1.25: three seeds are alike, and 4,000 forwards no nearer than 3,000. Only its first stage is guided, "
    "so guidance costs next to nothing there.",
    "- **TDM after it is no gain over seeds.** The first seed came within the bar, the other two moved away from it: "
    "one seed would have told a story.",
    "- **More forwards are not enough by themselves.** CTM gains nothing at 4 steps after a fifth of them "
    "(`methods-fashion-pilot.json`), and moment matching of the guided teacher is worse at 4 steps with ten times the "
    "forwards than unguided with the table's. Of moment matching at 1 step only FD, recall and cost were kept.",
    "- **Guidance at 1.25** brings the teacher's distance down within its interval; the ratios are to that.",
    "- **The order is not that of [digits](methods.md)**: TwinFlow, ahead there at 1 step, is behind here, and so are "
    "flow maps. The learning rates are those that suited digits, which is part of it.",
    "- **The teacher is far from its floor** ([log](log.md)), so a student of data can be nearer to them than it is.",
]
NOTES = {"digits": DIGITS, "fashion-mnist": FASHION}


def longer(result: dict[str, Any]) -> list[str]:
    """Runs made otherwise: every method's distances by seed, and the mean ratio beside the bar."""
    if not result.get("longer"):
        return []
    lines = ["", "## Longer runs, and others", "", "The same with more forwards, or with what is said.", ""]
    lines += ["| | forwards | steps | FD by seed | mean ratio | up to | recall | seconds |",
              "|---|--:|--:|---|--:|--:|--:|--:|"]  # fmt: skip
    groups: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
    for run in result["longer"]:
        groups.setdefault((-run["steps"], -run["forwards"], called(run)), []).append(run)
    for (n, forwards, name), runs in sorted(groups.items()):
        mean = {k: sum(run[k] for run in runs) / len(runs) for k in ("ratio", "recall", "seconds")}
        fds, bar = ", ".join(f"{run['fd']:.3f}" for run in runs), f"{BARS[-n]:g}" if -n in BARS else ""
        cells = [name, f"{-forwards:,}", f"{-n}", fds, f"{mean['ratio']:.2f}", bar, f"{mean['recall']:.3f}"]
        lines.append(f"| {' | '.join(cells)} | {mean['seconds']:.0f} |")
    return lines


def called(run: dict[str, Any]) -> str:
    """A run's method, and what was other than in the tables."""
    said = [f"`{run['method']}`"]
    said += ["for this count alone"] if run.get("alone") and not METHODS[run["method"]].one_count else []
    said += [f"teacher guided {run['guided']:g}"] if run.get("guided") else []
    said += [f"{k} {v}" for k, v in run.get("set", {}).items()]
    said += [f"after `{run['start'].split('-')[0]}`"] if run.get("start") else []
    return ", ".join(said)


def seeds(result: dict[str, Any]) -> list[str]:
    """The methods that were trained with several seeds."""
    lines = ["", "## Over seeds", "", "| | steps | FD by seed | mean ratio |", "|---|--:|---|--:|"]
    floor, best, before = result["floor"]["fd"], result["best teacher"], len(lines)
    for n in (4, 2, 1):
        for name in ranked(result, n):
            fds = result["methods"][name]["steps"][str(n)]["fd by seed"]
            if len(fds) > 1:
                mean = over(sum(fds.values()) / len(fds), floor, best)
                lines.append(f"| `{name}` | {n} | {', '.join(f'{v:.3f}' for v in fds.values())} | {mean:.2f} |")
    return lines if len(lines) > before else []


def cost(result: dict[str, Any]) -> list[str]:
    """What each run cost, and the learning rate that it had."""
    lines = [
        "",
        "## What each cost",
        "",
        "Seconds are of one busy CPU core, and tell little beyond their magnitude.",
        "",
    ]
    lines.append("| | iterations | batch | forwards an iteration | seconds | networks | learning rate | paper |")
    lines.append("|---|--:|--:|--:|--:|--:|---|---|")
    for name in listed(result):
        method = result["methods"][name]
        row = method["steps"].get("4") or next(iter(method["steps"].values()))
        other = [r for r in method["pilots"] if float(r) != row["lr"]]
        cells = [f"`{name}`", f"{row['iterations']}", f"{row['batch']}", f"{row['forwards an iteration']:.1f}"]
        cells += [f"{row['seconds']:.0f}", f"{METHODS[name].memory}"]
        cells += [f"{row['lr']:g}" + (f", not {other[0]}" if other else ""), METHODS[name].paper]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def absent(result: dict[str, Any]) -> list[str]:
    """What is not in the tables, and why."""
    lines = ["", "## Not in the tables", ""]
    lines += [f"- `{name}` {why}." for name, why in LEFT_OUT.items()]
    lines += [f"- `{name}` failed: {m['failed']}" for name, m in result["methods"].items() if "failed" in m]
    if result["missing"]:
        lines.append(f"- Not run yet: {', '.join(f'`{name}`' for name in result['missing'])}.")
    return lines


# --- the picture ----------------------------------------------------------------------------------------------


def picture(result: dict[str, Any], folder: Path) -> Image.Image:
    """A row per method: samples of seed 0 at 1, 2 and 4 steps from the same noise, and its ratios; the teacher above.

    Every method's PNG under ``folder`` has a strip of SHOWN samples for each of its step counts, in their order.
    """
    methods = result["methods"]
    sheets = {"teacher": (Image.open(folder / "teacher.png"), ["1", "2", "4", "50"])}
    sheets |= {n: (Image.open(folder / f"{n}-0.png"), list(methods[n]["steps"])) for n in listed(result)}
    lines = [("teacher, 50 steps", "teacher", ("50", "", "")), *((name, name, ("1", "2", "4")) for name in sheets)]
    sheet, order = sheets["teacher"]
    w, h = sheet.width // SHOWN, sheet.height // len(order)
    zoom = max(1, round(HIGH / h))
    wide, high = SHOWN * (w * zoom + 1) + GAP, h * zoom + 4
    canvas = Image.new("RGB", (LEFT + 3 * wide + RIGHT, (len(lines) + 1) * high + 12), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for i, text in enumerate(("1 step", "2 steps", "4 steps", "ratio at 4, at 1")):
        draw.text((LEFT + i * wide, 6), text, INK, font)
    for row, (text, name, columns) in enumerate(lines):
        top, (sheet, order) = (row + 1) * high + 6, sheets[name]
        draw.text((8, top + high // 2 - 10), text, INK, font)
        for i, n in enumerate(columns):
            for j in range(SHOWN if n in order else 0):
                at = order.index(n) * h
                one = sheet.crop((j * w, at, (j + 1) * w, at + h)).resize(
                    (w * zoom, h * zoom), Image.Resampling.NEAREST
                )
                canvas.paste(one, (LEFT + i * wide + j * (w * zoom + 1), top))
        steps = methods[name]["steps"] if name in methods else {}
        told = ",  ".join(f"{steps[n]['ratio']:.2f}" for n in ("4", "1") if n in steps)
        draw.text((LEFT + 3 * wide, top + high // 2 - 10), told, INK, font)
    return canvas
