# ruff: noqa: E501
"""Mutations of the curricula that are fitted to a run."""

from __future__ import annotations

from mutant import core

MUTANTS = [
    *core(
        "core/curriculum",
        "tests/test_curriculum.py tests/test_methods.py -k curricul or run or ct or cd",
        ("min(step // double_every, doublings)", "step // double_every", "doubles for ever"),
        ("int(warmup * iterations) if warmup < 1 else", "int(warmup * 1000) if warmup < 1 else", "a share of another run"),
        ("if warmup < 1 else int(warmup)", "if warmup <= 1 else int(warmup)", "one iteration is the whole run"),
        ("if warmup >= 1 and count >= iterations:", "if warmup >= 1 and count > iterations:", "a warm-up to the very end"),
        ("double_every >= iterations > 0", "double_every > iterations > 0", "a doubling after the end"),
        ("iterations // (doublings + 1)", "iterations // max(doublings, 1)", "the last doubling has no time"),
    ),
]  # fmt: skip
