"""Writes the tables of docs/peers.md from results/, so that no number there is typed by hand.

python benchmarks/peers_docs.py
"""

from __future__ import annotations

import re
from typing import Any

from readme import HERE, read

LOWEST = 32.0  # dB; below, the peers' sweeps end before ours
PAGE = HERE.parent / "docs" / "peers.md"


def caching(numbers: dict[str, Any], what: str) -> str:
    """The best of either side at equal PSNR."""
    rows = ["| PSNR, dB | best peer | | best of hasten | | ratio (95 %) | network work left, peer over hasten |",
            "|--:|--:|---|--:|---|--:|--:|"]  # fmt: skip
    steps = numbers["model"]["steps"]
    for level, row in numbers["at equal PSNR"].get(what, {}).items():
        if float(level) < LOWEST:
            continue
        last = max(p[what] for p in numbers["points"] if f"{p['who']} {p['sweep']}" == row["best peer"])
        end = "≥ " if row["peer"] > last - 0.01 else ""  # the end of the peer's sweep: it might skip more
        low, high = row["interval"]
        rows.append(
            f"| {level} | {end}{row['peer']:.1f} | {row['best peer']} | {row['hasten']:.1f} | "
            f"{row['best of hasten'].removeprefix('hasten ')} | {row['ratio']:.2f} ({low:.2f}–{high:.2f}) | "
            f"{(steps - row['peer']) / (steps - row['hasten']):.2f} |"
        )
    return "\n".join(rows)


def points(numbers: dict[str, Any]) -> str:
    """Every configuration that was run on all prompts."""
    rows = ["| whose | sweep | setting | skipped | work saved | PSNR | of latents | time |",
            "|---|---|---|--:|--:|--:|--:|--:|"]  # fmt: skip
    for p in sorted(numbers["points"], key=lambda p: (p["who"], p["sweep"], p["skipped"])):
        rows.append(
            f"| {p['who']} | {p['sweep']} | {p['point']} | {p['skipped']:.1f} | {p['saved']:.1f} | {p['psnr']:.1f} | "
            f"{p['psnr_latents']:.1f} | {p['time']:.2f} |"
        )
    return "\n".join(rows)


def failures(numbers: dict[str, Any]) -> str:
    return "\n".join(f"- {k}: {v}" for k, v in numbers["failed"].items()) or "None."


def about(numbers: dict[str, Any]) -> str:
    model, machine = numbers["model"], numbers["machine"]
    found = ", ".join(f"{k} {v or 'not installed'}" for k, v in numbers["versions"].items())
    return (
        f"{len(model['captions'])} held-out captions ({model['prompts a request']} a request), "
        f"{model['steps']} steps, guidance {model['guidance']:g}, "
        f"{model['parameters'] / 1e6:.1f} M parameters. {found}, torch {machine['torch']}, {machine['cpu']}. "
        f"`{numbers['command']}`"
    )


def quality(numbers: dict[str, Any]) -> str:
    rows = ["| | relative output error | PSNR of pictures, dB |", "|---|--:|--:|"]
    for name, row in numbers["quality"]["rows"].items():
        said = f"{row['relative error']:.2%} | {row['PSNR']:.1f}" if "PSNR" in row else f"{row['failed']} | "
        rows.append(f"| {name} | {said} |")
    return "\n".join(rows)


def times(numbers: dict[str, Any]) -> str:
    """Forwards of benchmarks/stack.py, torchao's int8 among them."""
    found = numbers["forward, ms"]
    rows = ["| | median, ms | times float32 |", "|---|--:|--:|"]
    rows += [f"| {name} | {ms:.0f} | {found['float32, eager'] / ms:.2f} |" for name, ms in found.items()]
    return "\n".join(rows)


def main() -> None:
    """Put every table between its markers."""
    found, guided, bits = read("peers"), read("peers-cfg"), read("peers-quantize")
    tables = {
        "about": about(found), "skipped": caching(found, "skipped"), "saved": caching(found, "saved"),
        "cfg about": about(guided), "cfg skipped": caching(guided, "skipped"), "cfg saved": caching(guided, "saved"),
        "points": points(found), "failures": failures(found), "quality": quality(bits), "times": times(read("stack")),
    }  # fmt: skip
    text = PAGE.read_text()
    for name, table in tables.items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = mark.sub(lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
