"""The methods as a person chooses between them: a list of what each needs and costs, and one with its settings."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

from hasten.names import METHODS, Row, method_class, methods
from hasten.recipe import as_dict

OTHERS = "from other packages"


def facts(row: Row) -> dict[str, str]:
    """What a row says, by the words with which it is shown; only what it says."""
    if not row.paper:  # a package's own, of which nothing is known here
        return {}
    shapes = {"one count": row.one_count, "the counts given": bool(row.steps), "any": not row.steps}
    found = {
        "data": row.data, "teacher": row.teacher, "trains beside it": row.networks,
        "trained for steps": next(k for k, yes in shapes.items() if yes),
        "networks in memory": str(row.memory), "forwards a step": row.forwards, "paper": row.paper,
    }  # fmt: skip
    return {k: v for k, v in found.items() if v}


def listing() -> Iterator[tuple[str, list[tuple[str, Row]]]]:
    """(group, its methods by name) in the order of the table, a class before its variations."""
    groups: dict[str, list[tuple[str, Row]]] = {}
    for name, row in methods().items():
        groups.setdefault(row.group if name in METHODS else OTHERS, []).append((name, row))
    for group, rows in groups.items():
        order: dict[str, list[tuple[str, Row]]] = {}
        for name, row in rows:
            order.setdefault(row.target, []).append((name, row))
        yield group, [pair for same in order.values() for pair in sorted(same, key=lambda p: bool(p[1].preset))]


def variation(row: Row) -> str:
    """What a variation changes, such as ``cm with from_teacher: True``; empty for a class with its own defaults."""
    if not row.preset:
        return ""
    base = next((name for name, other in methods().items() if other.target == row.target and not other.preset), "")
    changes = ", ".join(f"{key}: {shown(value)}" for key, value in row.preset)
    return f"{base or method_class_name(row)} with {changes}"


def method_class_name(row: Row) -> str:
    """The class of a row."""
    return row.target.rpartition(":")[2]


def shown(value: Any) -> str:
    """A setting as a recipe would have it, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {shown(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(shown, value)) + "]"
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def settings(name: str) -> dict[str, str]:
    """Every key that a recipe takes under ``method``, with its default; a variation's presets are in place."""
    row, cls = methods()[name], method_class(name)
    preset, found = dict(row.preset), {}
    for f in fields(cls):
        if not f.init:
            continue
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        found[f.name] = "required" if default is MISSING else shown(as_dict(default))
        if f.name in preset:
            found[f.name] = f"{shown(as_dict(preset[f.name]))} (here)"
    return found


def overview() -> str:
    """All methods, two lines each, by group, in the console's markup-free text."""
    lines = []
    for group, rows in listing():
        lines += ["", group.upper()]
        for name, row in rows:
            about = f"{row.about} = {variation(row)}" if row.preset else row.about
            lines += [f"  {name:16}{about}", " " * 18 + " · ".join(f"{k} {v}" for k, v in facts(row).items())]
    return "\n".join([*lines, "", "hasten methods NAME explains one; docs/choosing.md helps to choose."]).lstrip("\n")


def explained(name: str) -> str:
    """One method: what it is, what it needs, its settings, how to train it, and what to do when it goes wrong."""
    row, cls = methods()[name], method_class(name)
    lines = [f"{name}  {row.about}"]
    lines += [f"  = {variation(row)}"] if row.preset else []
    if name in METHODS:
        lines += [f"  {key:24}{value}" for key, value in facts(row).items()]
        if row.trouble:
            lines += ["", f"When it goes wrong: {row.trouble}"]
    lines += ["", "Settings (--set method.KEY=VALUE):"]
    lines += [f"  {key:24}{value}" for key, value in settings(name).items()]
    if name in METHODS:
        lines += ["", "Training, unless a recipe or an option says otherwise (--set fit.KEY=VALUE):"]
        lines += [f"  {key:24}{shown(value)}" for key, value in row.fit] or ["  as hasten.FitConfig has it"]
        lora = row.defaults(adapters=True)
        lines += [f"  {'lr of adapters':24}{lora['lr']:g} (LoRA on a large network)"]
        if "lrs" in lora:
            lines += [f"  {'lrs of adapters':24}{shown(lora['lrs'])}"]
    module = inspect.getdoc(inspect.getmodule(cls)) or ""
    return "\n".join([*lines, "", module, "", inspect.getdoc(cls) or ""])
