"""Steps skipped at equal PSNR: the best of each side's sweeps, interpolated, with an interval over the prompts."""

from __future__ import annotations

from typing import Any

import numpy as np

LEVELS = (45, 40, 37, 35, 32, 30, 27, 25, 22, 20)  # dB
BAR = 1.25


def at_level(points: np.ndarray, level: float) -> float:
    """Most steps skipped at ``level`` dB or better by one sweep [N, (PSNR, skipped)].

    Between two points that follow each other in PSNR the count is linear; outside of the sweep nothing is assumed.
    """
    points = points[np.argsort(-points[:, 0], kind="stable")]
    best = max((s for p, s in points if p >= level), default=0.0)
    for (p, s), (q, r) in zip(points[:-1], points[1:], strict=True):
        if p >= level > q and r > s:
            best = max(best, s + (r - s) * (p - level) / (p - q))
    return float(best)


def best(records: list[dict[str, Any]], rows: np.ndarray, count: str, level: float, metric: str) -> tuple[float, str]:
    """(steps, the sweep) of the best sweep among ``records``, seen on the prompts ``rows``."""
    sweeps: dict[str, list[tuple[float, float]]] = {}
    for r in records:
        mean = [np.mean([r["each"][i][k] for i in rows]) for k in (metric, count)]
        sweeps.setdefault(f"{r['who']} {r['sweep']}", []).append((float(mean[0]), float(mean[1])))
    found = {name: at_level(np.array(points), level) for name, points in sweeps.items()}
    name = max(found, key=lambda k: found[k], default="")
    return found.get(name, 0.0), name if found.get(name, 0.0) > 0 else "none"


def front(records: list[dict[str, Any]], metric: str = "psnr", resamples: int = 100) -> dict[str, Any]:
    """For skipped steps and saved work, at each level: the best peer's, ours, and the ratio with a 95 % interval."""
    count = min((len(r["each"]) for r in records), default=0)
    peers = [r for r in records if r["who"] != "hasten"]
    ours = [r for r in records if r["who"] == "hasten"]
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, count, count) for _ in range(resamples)]
    table: dict[str, Any] = {"bar": BAR}
    for what in ("skipped", "saved"):
        for level in LEVELS:
            (theirs, whose), (mine, which) = (
                best(side, np.arange(count), what, level, metric) for side in (peers, ours)
            )
            if not theirs or not mine:
                continue
            ratios = [
                best(ours, rows, what, level, metric)[0] / max(best(peers, rows, what, level, metric)[0], 0.5)
                for rows in draws
            ]
            low, high = np.quantile(ratios, (0.025, 0.975))
            table.setdefault(what, {})[str(level)] = {
                "peer": round(theirs, 2), "best peer": whose, "hasten": round(mine, 2), "best of hasten": which,
                "ratio": round(mine / theirs, 3), "interval": [round(float(low), 3), round(float(high), 3)],
                "met": mine / theirs >= BAR,
            }  # fmt: skip
    return table


def leading(points: list[dict[str, Any]], share: float = 0.95) -> set[str]:
    """The sweeps that come near (``share`` of its steps) the best of their own side at some level, by either count."""
    keep: set[str] = set()
    for mine in ([p for p in points if p["who"] == "hasten"], [p for p in points if p["who"] != "hasten"]):
        sweeps: dict[str, list[dict[str, Any]]] = {}
        for p in mine:
            sweeps.setdefault(f"{p['who']} {p['sweep']}", []).append(p)
        for what in ("skipped", "saved"):
            for level in LEVELS:
                found = {n: at_level(np.array([(p["psnr"], p[what]) for p in ps]), level) for n, ps in sweeps.items()}
                top = max(found.values())
                keep |= {n for n, v in found.items() if top > 0 and v >= share * top}
    return keep
