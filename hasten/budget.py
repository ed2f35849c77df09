"""What a person allows a faster model to lose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hasten.core.errors import ConfigError, unknown
from hasten.measure.perceptual import needs_weights

LOSSES = {
    "psnr": 'at least so many dB, such as "30"',
    "ssim": 'at least, from 0 to 1, such as "0.95"',
    "lpips": 'at most, such as "0.05"',
    "fd": 'at most so much worse, such as "5%"',
}
LEAST = ("psnr", "ssim")  # more is better
NONE: dict[str, float] = {"psnr": math.inf, "ssim": 1.0, "lpips": 0.0, "fd": 0.0, "fd_high": 0.0}  # lost


@dataclass(frozen=True)
class Budget:
    """The loss that a person allows.

    Args:
        limits: By metric. psnr (dB) and ssim are least values, lpips a largest one, against the samples of the same
            noise; fd is a share of the model's own (FD + floor), against real images, that the measured loss has to
            stay under by its own uncertainty (``fd_high``).
    """

    limits: Mapping[str, float]

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Budget:
        """From what a person writes, such as {"psnr": 30} or {"fd": "5%"}.

        Raises:
            ConfigError: For an unknown metric, a limit that is none, or LPIPS without its weights.
        """
        if not isinstance(raw, Mapping) or not raw:
            raise ConfigError(f'The budget is max_loss={{"psnr": 30}} or {{"fd": "5%"}}, not {raw!r}.')
        limits = {}
        for key, value in raw.items():
            if key not in LOSSES:
                raise unknown("loss", str(key), LOSSES)
            percent = isinstance(value, str) and value.strip().endswith("%")
            try:
                number = float(str(value).strip().rstrip("%")) / (100 if percent else 1)
            except ValueError:
                number = math.nan
            highest = 1.0 if key == "ssim" else math.inf
            if not math.isfinite(number) or not 0 <= number <= highest or (key == "fd") != percent:
                raise ConfigError(f"max_loss: {key} is {LOSSES[key]}, not {value!r}.")
            limits[key] = number
        if "lpips" in limits:
            needs_weights()
        return cls(limits)

    def read(self, loss: Mapping[str, float]) -> dict[str, float]:
        """What counts of a measured loss, so that less is better."""
        counted = {k: loss["fd_high" if k == "fd" else k] for k in self.limits}
        return {k: -v if k in LEAST else v for k, v in counted.items()}

    def holds(self, loss: Mapping[str, float]) -> bool:
        """Whether a measured loss is within the budget."""
        return all(v <= (-self.limits[k] if k in LEAST else self.limits[k]) for k, v in self.read(loss).items())

    def beats(self, one: Mapping[str, float], other: Mapping[str, float]) -> bool:
        """Whether a loss is nowhere worse than another."""
        mine, theirs = self.read(one), self.read(other)
        return all(mine[k] <= theirs[k] for k in self.limits)

    @property
    def judged(self) -> bool:
        """Whether it needs a judge."""
        return "fd" in self.limits


def said(loss: Mapping[str, float]) -> str:
    """A loss or a budget in words."""
    units = {"psnr": "PSNR {:.1f} dB", "ssim": "SSIM {:.3f}", "lpips": "LPIPS {:.3f}", "fd": "FD {:+.1%}"}
    units["fd_high"] = "at most {:+.1%}"
    return ", ".join(units[k].format(v) for k, v in loss.items() if k in units)
