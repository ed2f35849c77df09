"""The names that recipes and the command line use: methods, training times, generators."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from hasten.core.errors import ConfigError, unknown
from hasten.core.generate import FewStep
from hasten.core.times import LogitNormal, LogNormal, LogStudentT, Times, Uniform
from hasten.rows import METHODS, Row

TIMES: dict[str, type] = {
    "uniform": Uniform, "logit_normal": LogitNormal, "log_normal": LogNormal, "log_student_t": LogStudentT,
}  # fmt: skip
GENERATE: dict[str, type] = {"few_step": FewStep}
TABLES: dict[Any, dict[str, type]] = {Times: TIMES, FewStep: GENERATE}  # by the type of the field that names one


def variations(name: str) -> dict[str, Any]:
    """The fields that a name presets."""
    return dict(methods()[name].preset)


@cache
def methods() -> dict[str, Row]:
    """``METHODS`` and what other packages add under the entry-point group ``hasten.methods``; ours win."""
    return METHODS | {e.name: _foreign(e) for e in entry_points(group="hasten.methods") if e.name not in METHODS}


def _foreign(entry: Any) -> Row:
    """The row of another package's method: what its class says of itself in ``row``, a mapping of Row's fields."""
    row = Row(entry.value, f"From the package {entry.dist.name if entry.dist else entry.value}.", "", "", "", "", "")
    try:
        said = getattr(entry.load(), "row", {})
    except Exception:  # said when the method is asked for, which others need not wait for
        return row
    if wrong := set(said) - set(Row._fields):
        raise unknown(f"field in the row of {entry.value}", min(wrong), Row._fields)
    return row._replace(**said)


def method_class(name: str) -> type:
    """The class of a method's name. Raises ConfigError for an unknown one, with the nearest."""
    if name not in methods():
        raise unknown("method", name, methods())
    module, _, cls = methods()[name].target.partition(":")
    try:
        return getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"The method {name!r} cannot be loaded: {error}.") from error


def row_of(method: Any) -> Row:
    """The row that describes a method best: of the variations that it is, the one with most presets."""
    cls, best = type(method), methods()[name_of(method)]
    for row in methods().values():
        same = row.target == f"{cls.__module__}:{cls.__qualname__}"
        if same and len(row.preset) > len(best.preset) and all(getattr(method, k) == v for k, v in row.preset):
            best = row
    return best


def defaults(method: Any, adapters: bool = False) -> dict[str, Any]:
    """Keys of FitConfig that suit ``method``: those of its row, none for a class without a name."""
    named = any(row.target == f"{type(method).__module__}:{type(method).__qualname__}" for row in methods().values())
    return row_of(method).defaults(adapters) if named else {}


def name_of(thing: Any) -> str:
    """The name of a method, of training times or of a generator. Raises ConfigError where it has none."""
    cls = type(thing)
    target = f"{cls.__module__}:{cls.__qualname__}"
    rows = {name: row.target == target and not row.preset for name, row in methods().items()}
    tables = {name: entry is cls for table in TABLES.values() for name, entry in table.items()}
    for name, same in {**rows, **tables}.items():
        if same:
            return name
    raise ConfigError(f"{cls.__name__} has no name in a recipe; add a row to METHODS or an entry point.")
