"""What is wrong with a student, in sentences: collapse, blur, oscillation, a fake network that lags behind."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Numbers = Mapping[str, float]


def texture(images: Tensor) -> dict[str, float]:
    """``variance`` over samples (mean over pixels) and ``high_frequency`` energy of images [N, C, H, W].

    The energy is the mean squared amplitude above half the Nyquist frequency along either axis.
    """
    x = images.detach().cpu().float()
    power = torch.fft.rfft2(x, norm="ortho").abs().square()
    rows = torch.fft.fftfreq(x.shape[-2]).abs()[:, None]
    columns = torch.fft.rfftfreq(x.shape[-1])[None]
    high = (rows >= 0.25) | (columns >= 0.25)
    return {"variance": float(x.var(0).mean()), "high_frequency": float(power[..., high].mean())}


def diagnose(
    history: Sequence[Numbers],
    quality: Numbers,
    teacher: Numbers | None = None,
    look: Numbers | None = None,
    real: Numbers | None = None,
) -> list[str]:
    """One sentence for each thing that is wrong with a student, with what to change; empty when nothing is.

    Args:
        history: The log of every training step, oldest first: losses by name and ``grad/<network>``.
        quality: What the judge found for the student.
        teacher: What it found for the teacher; without, 0.8 stands for its recall, precision and coverage.
        look: :func:`texture` of the student's samples.
        real: :func:`texture` of the reference.
    """
    best = {"precision": 0.8, "recall": 0.8, "coverage_worst": 0.8, **(teacher or {})}
    return [*_collapse(quality, best), *_blur(quality, best, look, real), *_gradients(history), *_lag(history)]


def _collapse(quality: Numbers, best: Numbers) -> list[str]:
    found = []
    recall, worst = quality.get("recall", 1.0), quality.get("coverage_worst", 1.0)
    if recall < 0.5 * best["recall"]:
        found.append(
            f"Collapsed: recall {recall:.2f} is under half of the teacher's {best['recall']:.2f}, so the student makes "
            "only part of what the teacher makes; give the fake network more turns (student_every), lower the "
            "student's learning rate, or lower the guidance scale it is distilled at."
        )
    if worst < 0.5 * best["coverage_worst"]:
        found.append(
            f"A class is missing: the worst class is covered to {worst:.0%}, the teacher covers every class to "
            f"{best['coverage_worst']:.0%}; check that conditions reach the student and train longer, or start from "
            "a student distilled by trajectory."
        )
    return found


def _blur(quality: Numbers, best: Numbers, look: Numbers | None, real: Numbers | None) -> list[str]:
    if look is None or real is None:
        return []
    precise = quality.get("precision", 0.0) >= 0.9 * best["precision"]
    narrow = quality.get("recall", 1.0) < 0.8 * best["recall"]
    spread, edges = (look[k] / max(real[k], 1e-12) for k in ("variance", "high_frequency"))
    if not (precise and narrow and (spread < 0.85 or edges < 0.7)):
        return []
    return [
        f"Blurred: precision {quality['precision']:.2f} is high but recall only {quality['recall']:.2f}, with "
        f"{spread:.0%} of the data's variance and {edges:.0%} of its high-frequency energy; the student averages over "
        "what it cannot reach in its steps, so give it more steps, add distribution matching or a GAN term, or train "
        "longer."
    ]


def _series(history: Sequence[Numbers], name: str) -> list[float]:
    return [step[name] for step in history if name in step]


def _gradients(history: Sequence[Numbers]) -> list[str]:
    found = []
    for name in sorted({k for step in history for k in step if k.startswith("grad/")}):
        norms = _series(history, name)
        late = norms[len(norms) // 2 :]
        windows = [late[i : i + 20] for i in range(0, len(late) - 19, 20)]  # local, so that a trend is no oscillation
        bursts = sum(v > 5 * statistics.median(w) for w in windows for v in w)
        share = bursts / max(20 * len(windows), 1)
        if share >= 0.03:
            found.append(
                f"Oscillates: the gradient norm of {name[5:]} is over 5 times its usual size in {share:.0%} of "
                "the steps of the second half of training; lower its learning rate or clip harder."
            )
    return found


def _lag(history: Sequence[Numbers]) -> list[str]:
    """The fake network's loss falls while it follows the student; rising for good, it no longer does."""
    fake, moves = _series(history, "fake"), _series(history, "grad/student")
    if len(fake) < 40 or len(moves) < 20:
        return []
    quarter = len(fake) // 4
    lowest = min(statistics.median(fake[i * quarter : (i + 1) * quarter]) for i in range(3))
    last = statistics.median(fake[-quarter:])
    moving = statistics.median(moves[-len(moves) // 4 :]) > 0.5 * statistics.median(moves)
    if last < 1.25 * lowest or not moving:
        return []
    return [
        f"The fake network lags: its loss rose by {last / max(lowest, 1e-12) - 1:.0%} while the student kept moving, "
        "so the student follows a stale score; give the fake more turns per student step (student_every) or a higher "
        "learning rate."
    ]
