"""One mutation of the sources, and short ways to list many."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """``old`` in ``file`` becomes ``new``; ``tests`` are pytest arguments that must then fail."""

    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]


def method(name: str, *rows: tuple[str, str, str], also: str = "") -> list[Mutation]:
    """Mutations of one method: the tests that name it, the likeliest to fail first."""
    words = also or name
    tests = ("tests/test_methods_turns.py", "tests/test_methods.py", "tests/test_methods_mean.py", "-k", words)
    return [Mutation(f"hasten/methods/{name}.py", *row, tests) for row in rows]


def core(name: str, tests: str, *rows: tuple[str, str, str]) -> list[Mutation]:
    """Mutations of one file below the methods."""
    files, _, words = tests.partition(" -k ")
    chosen = (*files.split(), "-k", words) if words else tuple(files.split())
    return [Mutation(f"hasten/{name}.py", *row, chosen) for row in rows]
