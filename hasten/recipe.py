"""Recipes: one run, one YAML file, read into plain dataclasses."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path as File
from typing import Any, Literal

import torch
import yaml

from hasten.core.errors import ConfigError, unknown
from hasten.core.path import Kind, named_path
from hasten.models.dit import DiT, DiTConfig
from hasten.names import TABLES, method_class, methods, name_of, row_of, variations
from hasten.role import FitConfig

Places = dict[tuple[str, ...], str]  # where each key was written, for messages


@dataclass(frozen=True)
class Recipe:
    """One run.

    Args:
        method: A method of ``METHODS`` with its hyper-parameters.
        task: ``train`` makes a teacher from data, ``distill`` a fast student.
        data: What :func:`hasten.data.load` takes; None for methods that need none.
        teacher: Folder of the model to distil, or to start from. None, where the method allows it: from scratch.
        start: Folder of an earlier student of that teacher, from which the student starts instead.
        pipeline: Instead of a teacher, a diffusers pipeline: the folder or hub id of one.
        prompts: What :func:`hasten.prompts.read_prompts` takes, for a pipeline; with data, their captions are taken.
        call: How a pipeline is called: height, width, guidance_scale, negative_prompt ...
        sizes: Several (height, width) in pixels for a pipeline to train for.
        quantize_base: ``int8`` or ``int4`` rounds a pipeline's frozen weights while adapters are trained on them.
        format: ``comfyui`` also writes a pipeline's student as the one file that ComfyUI reads.
        measure: Time a pipeline's student beside the pipeline, for its card.
        model: Fields of :class:`DiTConfig` for a new network; size, channels and classes come from the data.
        path: Name of the path that a new network is trained on, and ``kind`` what it predicts.
        steps: Sampling step counts that the student is trained for, and that are saved with it.
        fit: How to train; what a recipe leaves out is what the method's row suits it with.
        pairs: Trajectories that the teacher makes before training (kd, boss, dmd, reflow); 0 makes them on the fly.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
    """

    method: Any
    task: Literal["train", "distill"] = "distill"
    data: str | None = None
    teacher: str | None = None
    start: str | None = None
    pipeline: str | None = None
    prompts: str | None = None
    call: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = ()
    quantize_base: Literal["int8", "int4"] | None = None
    format: Literal["diffusers", "comfyui"] = "diffusers"
    measure: bool = True
    model: dict[str, Any] = field(default_factory=dict)
    path: str = "rectified_flow"
    kind: Kind = "velocity"
    steps: tuple[int, ...] = (1, 2, 4)
    pairs: int = 0
    fit: FitConfig = field(default_factory=FitConfig)
    out: str = "hasten-run"
    device: str = "auto"

    def network(self, shape: Sequence[int], classes: int) -> DiT:
        """A new network for samples of ``shape`` (C, H, W): ``model`` decides what the data leave open."""
        return DiT(dit_config(self.model, shape, classes), named_path(self.path), self.kind)


def dit_config(model: Mapping[str, Any], shape: Sequence[int], classes: int) -> DiTConfig:
    """DiTConfig of ``model``'s fields for data of ``shape`` (C, H, W); patch 2, or 1 where a side is odd.

    Raises:
        ConfigError: If ``model`` contradicts the data.
    """
    size = tuple(shape[1:])
    known = {"size": size, "channels": shape[0], "classes": classes}
    for key, value in known.items():
        if key in model and model[key] != value:
            raise ConfigError(f"model.{key} is {model[key]}, but the data have {value}; leave it out.")
    return DiTConfig(**{"patch": 1 if any(n % 2 for n in size) else 2, **model, **known})


def for_steps(method: Any, steps: Sequence[int]) -> Any:
    """``method`` trained for these sampling step counts, where they shape its training.

    Raises:
        ConfigError: If it trains for one step count and several are given.
    """
    row = row_of(method)
    if not row.steps:
        return method
    if not row.one_count:
        now, many = getattr(method, row.steps), tuple(steps)
        return replace(method, **{row.steps: many if isinstance(now, tuple) else replace(now, steps=many)})
    if len(steps) != 1:
        raise ConfigError(f"{name_of(method)} trains for one step count; give one, not {_listed(steps)}.")
    return replace(method, **{row.steps: steps[0]})


def pick_device(name: str = "auto") -> torch.device:
    """The device of a name; ``auto`` is cuda where there is one, else cpu.

    Raises:
        ConfigError: If this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind not in there or (index and not index.isdigit()):
        raise unknown("device", name, ("auto", *there))
    if int(index or 0) >= there[kind]:
        have = [k for k, n in there.items() if n]
        raise ConfigError(f"The device {name!r} is not on this machine; use {' or '.join(have)}, or auto.")
    return torch.device(name)


# --- YAML -----------------------------------------------------------------------------------------------------


def load(file: File | str) -> Recipe:
    """The recipe in a YAML file. Raises ConfigError in one sentence, with the line of what cannot be read."""
    return parse(*read(file))


def save(recipe: Recipe, file: File | str) -> None:
    """Write ``recipe`` with every field spelled out, so that later defaults cannot change it."""
    File(file).write_text(yaml.safe_dump(as_dict(recipe), sort_keys=False), encoding="utf-8")


def as_dict(thing: Any) -> Any:
    """Plain values that :func:`parse` reads back to an equal recipe."""
    if is_dataclass(thing) and not isinstance(thing, type):
        plain = {f.name: as_dict(getattr(thing, f.name)) for f in fields(thing) if f.init}
        return plain if isinstance(thing, (Recipe, FitConfig)) else {"name": name_of(thing), **plain}
    if isinstance(thing, Mapping):
        return {k: as_dict(v) for k, v in thing.items()}
    return [as_dict(v) for v in thing] if isinstance(thing, (tuple, list)) else thing


def read(file: File | str) -> tuple[dict[str, Any], Places]:
    """A YAML file as plain values, and the line of every key. Raises ConfigError where it cannot be read."""
    file = File(file)
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"Cannot read the recipe {str(file)!r}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it is no text"
        raise ConfigError(f"{file.name}{line}: this is not valid YAML ({problem}).") from error
    places: Places = {(): file.name}
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{file.name}: a recipe consists of 'key: value' lines, and this has none.")
    return _plain(node, (), file.name, places), places


def _plain(node: yaml.Node, at: tuple[str, ...], name: str, places: Places) -> Any:
    """A YAML node as plain values; a key that is written twice is refused, where YAML would keep the last."""
    if isinstance(node, yaml.MappingNode):
        result = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), f"{name}, line {key_node.start_mark.line + 1}"
            if key in result:
                raise ConfigError(f"{line}: the key {key!r} is there twice; keep one.")
            places[(*at, key)] = line
            result[key] = _plain(value_node, (*at, key), name, places)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, at, name, places) for child in node.value]
    return yaml.safe_load(yaml.serialize(node))


def override(raw: dict[str, Any], places: Places, key: str, value: Any, option: str) -> None:
    """Set the dotted ``key`` (``fit.lr``) in plain values; messages about it will name ``option``."""
    *parents, last = key.split(".")
    here: dict[str, Any] = raw
    for i, parent in enumerate(parents):
        inner = here.get(parent) or {}
        inner = {"name": inner} if isinstance(inner, str) else inner
        if not isinstance(inner, dict):
            raise ConfigError(f"{option}: {'.'.join(parents[: i + 1])} holds no keys.")
        here[parent] = inner
        here = inner
    here[last] = value
    places[tuple(key.split("."))] = option


def assignment(text: str, option: str = "--set", such: str = "method.gan_weight=0.003") -> tuple[str, Any]:
    """(key, value) of the ``key=value`` of an option; the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{option} takes key=value, such as {such}, not {text!r}.")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{option} {text}: the value is not valid YAML.") from error


# --- plain values to dataclasses ------------------------------------------------------------------------------


def parse(raw: Mapping[str, Any], places: Places | None = None) -> Recipe:
    """The recipe of plain values.

    Where they are not spelled out, ``steps`` set the field that the method's row names, ``from_teacher`` is whether
    there is a teacher, and keys of ``fit`` are those of the method's row, else :class:`FitConfig`'s.

    Raises:
        ConfigError: For unknown keys and names (with the nearest), wrong types, and values that cannot work.
    """
    places, raw = places or {(): "recipe"}, dict(raw)
    _known(Recipe, raw, (), places)
    train = raw.get("task") == "train"
    _pipeline(raw, train, places)
    _start(raw, train, places)
    if raw.get("method") is None and not train:
        raise ConfigError(f"{_where(places, ())}: method is missing; one of {', '.join(methods())}.")
    raw["method"] = raw.get("method") or "flow"
    name, _ = _named(raw["method"], ("method",), places)
    one_count = name in methods() and methods()[name].one_count
    raw.setdefault("steps", [50] if train else [4] if one_count else [1, 2, 4])
    if not isinstance(raw["steps"], (list, tuple)):
        raw["steps"] = [raw["steps"]]
    raw["steps"] = _typed(tuple[int, ...], raw["steps"], ("steps",), places)
    if not raw["steps"] or min(raw["steps"]) < 1:
        raise ConfigError(f"{_where(places, ('steps',))}: steps must be at least 1, not {_listed(raw['steps'])}.")
    if name in methods() and isinstance(raw.get("fit", {}), Mapping):
        row, mine = methods()[name], dict(raw.get("fit", {}))
        raw["fit"] = row.defaults(mine.get("clone") == "lora", mine.get("lr")) | mine
    recipe = _make(Recipe, raw, (), places)
    try:
        named_path(recipe.path)
    except ConfigError as error:
        raise ConfigError(f"{_where(places, ('path',))}: {error}") from error
    try:
        for n in recipe.steps:  # a student that cannot be sampled so is refused now, not when it is saved
            recipe.method.sampling(n)
    except ConfigError as error:
        raise ConfigError(f"{_where(places, ('steps',))}: {error}") from error
    wanted = hasattr(recipe.method, "substeps") and getattr(recipe.method, "regression", True)
    if recipe.pairs < 0 or (recipe.pairs and not wanted):
        raise ConfigError(f"{_where(places, ('pairs',))}: 0 or more pairs are made, for kd, boss, dmd and reflow.")
    return recipe


def _pipeline(raw: Mapping[str, Any], train: bool, places: Places) -> None:
    """Refuse what only makes sense with a pipeline, or not with one."""
    if not raw.get("pipeline"):
        for key in ("prompts", "call", "sizes", "quantize_base", "format", "measure"):
            if raw.get(key) not in (None, "diffusers", True, {}, [], ()):
                raise ConfigError(f"{_where(places, (key,))}: {key} is for a diffusers pipeline; give pipeline.")
        return
    if train or raw.get("teacher"):
        what = "a pipeline is distilled, not trained" if train else "give a pipeline or a teacher, not both"
        raise ConfigError(f"{_where(places, ('pipeline',))}: {what}.")
    if not raw.get("prompts") and not raw.get("data"):
        raise ConfigError(f"{_where(places, ('pipeline',))}: a pipeline needs prompts, or data with captions.")
    if raw.get("quantize_base") and dict(raw.get("fit") or {}).get("clone") != "lora":
        where = _where(places, ("quantize_base",))
        raise ConfigError(f"{where}: quantize_base rounds the frozen weights under adapters; give fit.lora_rank.")


def _start(raw: Mapping[str, Any], train: bool, places: Places) -> None:
    lora = isinstance(raw.get("fit"), Mapping) and raw["fit"].get("clone") == "lora"
    for wrong, what in (
        (train, "hasten train starts from its teacher; give it as teacher"),
        (raw.get("pipeline"), "start is for native models; leave it out for a pipeline"),
        (not raw.get("teacher"), "start is an earlier student of a teacher; give that teacher, too"),
        (lora, "adapters start on the teacher's own weights; drop it"),
    ):
        if raw.get("start") and wrong:
            raise ConfigError(f"{_where(places, ('start',))}: {what}.")


def _method(value: Any, raw: Mapping[str, Any], at: tuple[str, ...], places: Places) -> Any:
    """The method of a recipe, with what it takes from the recipe's steps, teacher and data."""
    name, rest = _named(value, at, places)
    try:
        cls, row = method_class(name), methods()[name]
    except ConfigError as error:
        raise ConfigError(f"{_where(places, at)}: {error}") from error
    rest = as_dict(variations(name)) | rest
    steps, teacher = raw["steps"], raw.get("teacher") or raw.get("pipeline")
    if row.steps == "generate":
        rest.setdefault("generate", {"name": "few_step", "steps": list(steps)})
    elif row.steps and row.steps not in rest:
        if row.one_count and len(steps) != 1:
            where = _where(places, ("steps",))
            raise ConfigError(f"{where}: {name} trains for one step count; give one, not {_listed(steps)}.")
        rest[row.steps] = steps[0] if row.one_count else list(steps)
    if not teacher and any(f.name == "from_teacher" for f in fields(cls)):
        rest.setdefault("from_teacher", False)
    method = _make(cls, rest, at, places)
    if not teacher and getattr(method, "from_teacher", row.teacher == "yes"):
        raise ConfigError(f"{_where(places, at)}: {name} needs a teacher; give the folder of a trained model.")
    if not raw.get("data") and method.needs_data:
        raise ConfigError(f"{_where(places, at)}: {name}, as it is set, needs data; give data.")
    return method


def _make(cls: type, raw: Any, at: tuple[str, ...], places: Places) -> Any:
    """An instance of the dataclass ``cls`` from plain values."""
    values = _fields(cls, raw, at, places)
    missing = [f.name for f in fields(cls) if f.init and f.name not in values and _required(f)]
    if missing:
        raise ConfigError(f"{_where(places, at)}: {'.'.join((*at, missing[0]))} is missing.")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{_where(places, at)}: {error}") from error


def _required(f: Any) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


def _fields(cls: type, raw: Any, at: tuple[str, ...], places: Places) -> dict[str, Any]:
    """Validated values for fields of the dataclass ``cls``; nested dataclasses are built."""
    _known(cls, raw, at, places)
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in raw.items():
        here = (*at, str(key))
        if cls is Recipe and key == "method":
            values[key] = _method(value, raw, here, places)
        elif cls is Recipe and key == "model":
            values[key] = _fields(DiTConfig, value, here, places)
        else:
            values[key] = _value(hints[key], value, here, places)
    return values


def _known(cls: type, raw: Any, at: tuple[str, ...], places: Places) -> None:
    """Refuse anything but keys of the dataclass ``cls``, before a value is looked at: a slip is often a typo."""
    known = [f.name for f in fields(cls) if f.init]
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{_where(places, at)}: {'.'.join(at)} takes keys ({', '.join(known)}), not {raw!r}.")
    for key in raw:
        if key not in known:
            what = f"key in {'.'.join(at)}:" if at else "key"
            raise ConfigError(f"{_where(places, (*at, str(key)))}: {unknown(what, str(key), known)}")


def _value(hint: Any, value: Any, at: tuple[str, ...], places: Places) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if option in TABLES:
            name, rest = _named(value, at, places)
            if name not in TABLES[option]:
                raise ConfigError(f"{_where(places, at)}: {unknown(at[-1], name, TABLES[option])}")
            return _make(TABLES[option][name], rest, at, places)
        if is_dataclass(option) and isinstance(option, type):
            return _make(option, value, at, places)
    return _typed(hint, value, at, places)


def _typed(hint: Any, value: Any, at: tuple[str, ...], places: Places) -> Any:
    """``value`` as the type ``hint``, checked by pydantic, which also turns YAML's lists into tuples."""
    from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

    key = ".".join(at)
    if isinstance(value, bool) and "bool" not in getattr(hint, "__name__", str(hint)):  # else true is read as 1
        raise ConfigError(f"{_where(places, at)}: {key} cannot be {str(value).lower()}.")
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        problem = (first["msg"][0].lower() + first["msg"][1:]).replace("input should", "it should")
        raise ConfigError(f"{_where(places, at)}: {key} is {first['input']!r}, but {problem}.") from error
    except PydanticSchemaGenerationError as error:
        raise ConfigError(f"{_where(places, at)}: {key} cannot be set in a recipe, only in Python.") from error


def _named(value: Any, at: tuple[str, ...], places: Places) -> tuple[str, dict[str, Any]]:
    """(name, the other keys) of ``name`` or of ``{name: ..., key: ...}``."""
    rest = {"name": value} if isinstance(value, str) else value
    if not isinstance(rest, Mapping) or not isinstance(rest.get("name"), str):
        raise ConfigError(f"{_where(places, at)}: {'.'.join(at)} takes a name, or keys with a name, not {value!r}.")
    return rest["name"], {k: v for k, v in rest.items() if k != "name"}


def _where(places: Places, at: tuple[str, ...]) -> str:
    """What the person wrote that is nearest to the key ``at``."""
    while at not in places and at:
        at = at[:-1]
    return places.get(at, "recipe")


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values)) or "none"
