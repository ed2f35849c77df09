"""The errors a person can cause, each with one sentence: what was found, what was expected, how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HastenError(Exception):
    """Base of every error that hasten raises on purpose; the command line prints its message and exits with 2."""


class ConfigError(HastenError, ValueError):
    """A setting, an option or an input that cannot work."""


class UnsupportedModel(HastenError, TypeError):
    """A model lacks what a method or a speed-up needs."""


class NotReversible(HastenError, RuntimeError):
    """A transform's undo was asked for after its originals were dropped."""


class Diverged(HastenError, RuntimeError):
    """A loss or gradient became NaN, infinite or exploded during training."""


class CheckpointError(HastenError, ValueError):
    """A checkpoint is missing, truncated, or of another model."""


def unknown(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """ConfigError for an unknown name, with the nearest known one as a suggestion."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}."
    return ConfigError(f"Unknown {what} {name!r}; {hint}")
