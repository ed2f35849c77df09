"""Wrong values in the fields of the transforms: a ConfigError that names the field, or a value as it is declared."""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import yaml

from hasten.core.errors import ConfigError
from hasten.speed import TRANSFORMS, Cache, Guidance, Offload, TileVAE, Times, as_dict, from_dict
from hasten.speed.cache import POLICIES

NEEDED: dict[str, dict[str, Any]] = {"times": {"times": (1.0, 0.5)}}
CACHES: dict[str, dict[str, Any]] = {
    "schedule": {"mask": "0101"},
    "magcache": {"ratios": (1.0, 1.1)},
    "teacache": {"coefficients": (1.0,) * 5, "steps": 20},
}
BASES: list[tuple[str, dict[str, Any]]] = [
    *((name, NEEDED.get(name, {})) for name in TRANSFORMS if name != "cache"),
    *(("cache", {"policy": policy, **CACHES.get(policy, {})}) for policy in POLICIES),
    ("tilevae", {"tile": 64}),
]
WRONG: list[Any] = [
    5, -1, 0, 1, 0.5, 2.0, 10**400, "x", "", None, [], {}, (), [None], [[]], [5], [True], ["x"], [{}], {"a": 1},
    float("nan"), float("inf"), float("-inf"), [float("nan")], [float("inf")], [10**400], True, False, b"01", object(),
    np.array([1.0, 2.0]), np.float32(0.5),
]  # fmt: skip
PLACES = [
    pytest.param(name, base, f.name, id="-".join([name, *map(str, base.values()), f.name]))
    for name, base in BASES
    for f in fields(TRANSFORMS[name])
]


def is_a(value: Any, hint: Any) -> bool:
    """Whether a value is of a declared type; an int is a float, True is no number."""
    made, args = typing.get_origin(hint), typing.get_args(hint)
    if made in (types.UnionType, typing.Union):
        return any(is_a(value, a) for a in args)
    if made is tuple:
        if not isinstance(value, tuple):
            return False
        each = args[:1] * len(value) if args[1:] == (...,) else args
        return len(value) == len(each) and all(is_a(v, a) for v, a in zip(value, each, strict=True))
    if made in (Sequence, list):
        return isinstance(value, (tuple, list)) and all(is_a(v, args[0]) for v in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is hint or (hint is type(None) and value is None)


@pytest.mark.parametrize(("name", "base", "field"), PLACES)
def test_a_wrong_value_is_one_sentence_and_a_right_one_comes_back_from_its_file(name, base, field):
    cls = TRANSFORMS[name]
    hints = typing.get_type_hints(cls)
    assert is_a(getattr(cls(**base), field), hints[field])
    for value in WRONG:
        try:
            made = cls(**{**base, field: value})
        except ConfigError as error:
            said = str(error)
            assert "\n" not in said and (field in said or cls.__name__ in said or name in said), (value, said)
            with pytest.raises(ConfigError):
                from_dict({"name": name, **base, field: value})
            continue
        assert is_a(getattr(made, field), hints[field]), (value, made)
        assert hash(made) is not None
        assert from_dict(as_dict(made)) == made == from_dict(yaml.safe_load(yaml.safe_dump(as_dict(made)))), value


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: from_dict(yaml.safe_load("{name: cache, policy: schedule, mask: 0011010}")), "mask is .*its quotes"),
        (lambda: Cache("schedule", mask=5), "mask is one bool a step, or text of 0 and 1"),  # type: ignore[arg-type]
        (lambda: Cache("schedule", mask={}), "mask is one bool a step"),  # type: ignore[arg-type]
        (lambda: Cache("magcache", ratios=None), "ratios must be the finite numbers"),  # type: ignore[arg-type]
        (lambda: Cache(threshold=float("inf")), "threshold must be a number above 0, such as 0.05, not inf"),
        (lambda: Cache("taylor", degree=1.0), "degree must be 0, 1 or 2, not 1.0"),  # type: ignore[arg-type]
        (lambda: Cache("schedule", mask="01", weights=[[], [(0.5, 1.0)]]), "weights must be rows"),  # type: ignore[arg-type]
        (lambda: Guidance(interval=None), r"interval must be numbers such as \(0.1, 0.8\), not None"),  # type: ignore[arg-type]
        (lambda: Guidance(reuse=True), "reuse must be a whole number"),
        (lambda: TileVAE(slice="no"), "slice must be True or False, not 'no'"),  # type: ignore[arg-type]
        (lambda: Offload(disk=5), "disk must be text"),  # type: ignore[arg-type]
        (lambda: Offload(device="tpu9000"), "no device 'tpu9000'"),
        (lambda: from_dict({"name": "cast", "keep": "no"}), "keep must be True or False, not 'no'"),
        (lambda: from_dict({"name": "layercast", "keep": 1}), "keep must be True or False, not 1"),
        (lambda: from_dict({"name": "compile", "scope": 5}), "scope must be one of 'blocks', 'net', not 5"),
        (lambda: from_dict({"name": "times"}), "'times' needs times"),
        (lambda: Times([float("nan")]), "numbers such as"),  # type: ignore[arg-type]
        (lambda: from_dict({"name": ["cast"]}), "Unknown transform"),
        (lambda: from_dict([1]), "a mapping such as"),  # type: ignore[arg-type]
    ],
)
def test_what_it_should_be_is_said(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_a_folder_is_plain_text_in_a_plan(tmp_path):
    assert as_dict(Offload(disk=tmp_path))["disk"] == str(tmp_path)


def test_numbers_of_a_model_are_plain_in_a_plan():
    made = Guidance(scales=tuple(np.linspace(1, 2, 3)))
    assert from_dict(yaml.safe_load(yaml.safe_dump(as_dict(made)))) == made
