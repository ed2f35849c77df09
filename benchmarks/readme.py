"""Writes the tables of the README from the JSON files under results/, so that no number there is typed by hand.

python benchmarks/readme.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def read(name: str) -> dict:
    """One result."""
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def demo_table() -> str:
    """Every stage of the demo: speed beside quality, and the floors."""
    report = read("demo")
    unguided, guided = report["baselines"]
    head = f"| stage | evaluations | FD | recall | ms / {report['stages'][0]['batch']} | × 50 steps | × guided |"
    rows = [head, "|---|--:|--:|--:|--:|--:|--:|"]
    for s in report["stages"]:
        q, speed = s["quality"], s["speedup"]
        rows.append(
            f"| {s['name']} | {s['nfe']:.0f} | {q['fd']:.2f} ({q['fd_low']:.2f}–{q['fd_high']:.2f}) "
            f"| {q['recall']:.2f} | {s['p50'] * 1e3:.0f} | {speed[unguided]:.1f} | {speed[guided]:.1f} |"
        )
    for name in ("held-out real images", "baseline, another seed"):
        q = report["floor"][name]
        spread = f"{q['fd']:.2f} ({q['fd_low']:.2f}–{q['fd_high']:.2f})"
        rows.append(f"| *floor: {name}* | | {spread} | {q['recall']:.2f} | | | |")
    m, s = report["machine"], report["settings"]
    rows.append("")
    rows.append(
        f"`{s['command']}` on {m['cpu']}, {m['cores']} cores, torch {m['torch']}: {s['seconds'] / 60:.1f} minutes. "
        f"FD is the Fréchet distance of {s['samples judged']:,} samples to the {s['split'][0]:,} training images in "
        "the features of a small classifier, which is trained on other images; in brackets its bootstrap interval."
    )
    return "\n".join(rows)


def seeds_table() -> str:
    """The spread of the main stages over sampling seeds."""
    found = read("sampling-seeds")
    head = f"over {len(found['seeds'])} sampling seeds of {found['count']:,}"
    rows = [f"| {head} | FD, mean (range) | recall, mean (range) |", "|---|--:|--:|"]
    for name, row in found["stages"].items():
        cells = [f"{row[k]['mean']:.2f} ({row[k]['low']:.2f}–{row[k]['high']:.2f})" for k in ("fd", "recall")]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def forwards_table() -> str:
    """What a training step costs."""
    found = read("forwards")
    rows = ["| a training step of | forwards of its network |", "|---|--:|"]
    rows += [f"| {name} | {row['forwards']:.1f} |" for name, row in found["steps"].items()]
    s = found["settings"]
    rows += ["", f"Medians of {s['repeats']}, interleaved; batch {s['batch']}, width {s['width']}, depth {s['depth']}; "
             "loss, backward, clipping, optimiser and averages over one forward without a graph."]  # fmt: skip
    return "\n".join(rows)


def filled(text: str) -> str:
    """The README with every table between its markers made anew."""
    for name, make in {"demo": demo_table, "seeds": seeds_table, "forwards": forwards_table}.items():
        pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = pattern.sub(lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text)
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
