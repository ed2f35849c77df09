"""Curricula fitted to a run: what counts iterations is a share of them, or a count that must end within them."""

from __future__ import annotations

from hasten.core.errors import ConfigError


def check_warmup(who: str, warmup: float) -> None:
    """Raise ConfigError unless ``warmup`` is a share below 1 or a whole number of iterations."""
    if not (0 <= warmup < 1 or (warmup >= 1 and float(warmup).is_integer())):
        raise ConfigError(
            f"{who}: warmup is a share of the run below 1, such as 0.2, or a whole number of iterations, not {warmup}."
        )


def warmup_of(who: str, warmup: float, iterations: int) -> int:
    """The iterations of a warm-up in a run of ``iterations``. Raises ConfigError for a count that outlasts it."""
    count = int(warmup * iterations) if warmup < 1 else int(warmup)
    if warmup >= 1 and count >= iterations:
        raise ConfigError(
            f"{who}: a warmup of {count} iterations outlasts the {iterations} of this run; "
            "give fewer, or a share of the run such as 0.2."
        )
    return count


def check_doublings(who: str, double_every: int, doublings: int) -> None:
    """Raise ConfigError for negative counts."""
    if double_every < 0 or doublings < 0:
        raise ConfigError(f"{who}: double_every and doublings must be at least 0.")


def doubling_of(who: str, double_every: int, doublings: int, iterations: int) -> int:
    """Iterations between doublings, at least 1: ``double_every``, or where that is 0 what spreads them over the run.

    The last doubling then has as long as the others. Raises ConfigError for a count that never doubles in the run.
    """
    if doublings and double_every >= iterations > 0:
        raise ConfigError(
            f"{who}: with double_every {double_every} nothing doubles within {iterations} iterations; "
            "give a smaller one, or 0 to spread the doublings over the run."
        )
    return double_every or max(1, iterations // (doublings + 1))


def doubled(step: int, double_every: int, doublings: int) -> int:
    """Doublings before ``step``; none where ``double_every`` is 0, for the run's length is not known yet."""
    return min(step // double_every, doublings) if double_every else 0
