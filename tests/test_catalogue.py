"""The list of methods, one explained, and the training defaults that a method's row gives a recipe."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import pytest

from hasten import catalogue, names
from hasten.core.errors import ConfigError
from hasten.names import METHODS, Row
from hasten.recipe import assignment, override, parse
from hasten.role import FitConfig
from tests.commandline import plain_consoles, run  # noqa: F401
from tests.test_docs import ROOT, hasten_lines


def test_the_list_says_of_every_method_what_it_needs_and_costs():
    lines = run("methods").stdout.splitlines()
    groups = [line for line in lines if line and line == line.upper() and not line.startswith(" ")]
    assert groups == [g.upper() for g in dict.fromkeys(row.group for row in METHODS.values())]
    for name, row in METHODS.items():
        (at,) = [i for i, line in enumerate(lines) if line.split()[:1] == [name] and line.startswith("  " + name)]
        assert row.about in lines[at]
        for fact in (row.data, row.teacher, row.networks, f"networks in memory {row.memory}", row.forwards, row.paper):
            assert fact in lines[at + 1]
        assert ("= " in lines[at]) == bool(row.preset) and all(f"{key}: " in lines[at] for key, _ in row.preset)
        above = [line for line in lines[:at] if line in groups]
        assert above[-1] == row.group.upper()


def test_trained_steps_are_told_apart():
    said = {name: catalogue.facts(METHODS[name])["trained for steps"] for name in ("cm", "kd", "dmd2")}
    assert said == {"cm": "any", "kd": "one count", "dmd2": "the counts given"}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_explained_with_settings_training_and_remedy(name):
    text, row = run("methods", name).stdout, METHODS[name]
    assert row.trouble and row.trouble in text and f"{row.lora_lr:g} (LoRA" in text
    cls = names.method_class(name)
    for f in (f for f in fields(cls) if f.init):
        assert f"\n  {f.name} " in text
    for key, value in row.fit:
        assert f"  {key:24}{catalogue.shown(value)}\n" in text
    for key, value in row.preset:
        assert f"  {key:24}{catalogue.shown(catalogue.as_dict(value))} (here)\n" in text


def test_settings_are_as_a_recipe_has_them():
    assert catalogue.settings("dmd2")["times"] == "{name: uniform, low: 0.02, high: 0.98}"
    assert catalogue.settings("dmd2")["gan_weight"] == "null" and "needs_data" not in catalogue.settings("dpo")
    assert (catalogue.shown((0.5, True, "x")), catalogue.shown({"a": None})) == ("[0.5, True, x]", "{a: null}")


def test_a_variation_says_what_it_changes(monkeypatch: pytest.MonkeyPatch):
    row = Row("hasten.methods.cm:CM", "CD.", "yes", "yes", "none", "5", "Song", preset=(("from_teacher", True),))
    monkeypatch.setitem(METHODS, "my_cd", row)
    names.methods.cache_clear()
    try:
        assert catalogue.variation(row) == "cm with from_teacher: True" and catalogue.variation(METHODS["cm"]) == ""
        assert catalogue.settings("my_cd")["from_teacher"] == "True (here)"
        rows = [name for _, rows in catalogue.listing() for name, r in rows if r.target == row.target]
        assert rows.index("cm") < rows.index("my_cd")
    finally:
        names.methods.cache_clear()


def test_another_packages_method_is_listed_as_such(monkeypatch: pytest.MonkeyPatch):
    from importlib.metadata import EntryPoint

    entry = EntryPoint("mine", "hasten.methods.sid:SiD", "hasten.methods")
    monkeypatch.setattr(names, "entry_points", lambda group: [entry])
    names.methods.cache_clear()
    try:
        lines = run("methods").stdout.splitlines()
        assert lines[lines.index("FROM OTHER PACKAGES") + 1].split()[0] == "mine"
        text = run("methods", "mine").stdout
        assert "student_every" in text and "networks in memory" not in text and "lr of adapters" not in text
    finally:
        names.methods.cache_clear()


# --- training defaults ----------------------------------------------------------------------------------------------


def fit_of(name: str, fit: dict[str, Any] | None = None, *sets: str) -> FitConfig:
    """The training settings of a recipe for ``name``."""
    raw: dict[str, Any] = {"method": name, "teacher": "x", "data": "digits", "steps": [4 if name == "phased" else 1]}
    raw |= {} if fit is None else {"fit": fit}
    places = {(): "recipe"}
    for text in sets:
        override(raw, places, *assignment(text), f"--set {text}")
    return parse(raw, places).fit


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_takes_training_defaults_from_the_row(name):
    row, plain, found = dict(METHODS[name].fit), FitConfig(), fit_of(name)
    assert row.keys() <= {f.name for f in fields(FitConfig)}
    for f in fields(FitConfig):
        assert getattr(found, f.name) == row.get(f.name, getattr(plain, f.name))


def test_a_person_goes_before_a_recipe_before_the_row_before_the_rest():
    row = dict(METHODS["sid"].fit)
    assert row["lr"] == 3e-4 and row["batch"] == 128 and FitConfig().lr == 1e-3
    found = fit_of("sid", {"batch": 32, "ema": [0.5]}, "fit.ema=[0.25]", "fit.clip=2")
    assert (found.lr, found.batch, found.ema, found.clip) == (3e-4, 32, (0.25,), 2.0)
    assert found.betas == row["betas"] and found.iterations == FitConfig().iterations
    with pytest.raises(ConfigError, match="fit takes keys"):
        parse({"method": "sid", "teacher": "x", "fit": 3})


def test_the_command_line_trains_with_the_rows_defaults(tmp_path):
    from hasten.core.method import Sampling, even
    from hasten.distribute import save_model
    from hasten.recipe import load
    from tests.training import network

    save_model(network(), tmp_path / "t", {4: Sampling(even(4))})
    args = ("distill", "--method", "kd", "--teacher", str(tmp_path / "t"), "--steps", "2", "--no-tensorboard")
    run(*args, "--iterations", "1", "--batch", "4", "--set", "method.substeps=1", "--out", str(tmp_path / "o"))
    fit = load(tmp_path / "o" / "model" / "recipe.yaml").fit
    assert (fit.lr, fit.schedule, fit.batch) == (5e-4, "cosine", 4)


def guide() -> list[list[str]]:
    """The training commands of docs/choosing.md, in words."""
    lines = hasten_lines(ROOT / "docs" / "choosing.md")
    return [words for words in lines if words[0] in ("train", "distill")]


@pytest.mark.parametrize("words", guide(), ids=lambda words: " ".join(words[:3]))
def test_every_command_of_the_guide_makes_a_recipe(words):
    raw: dict[str, Any] = {"task": words[0]}
    places = {(): "guide"}
    for option, value in zip(words[1::2], words[2::2], strict=True):
        key = {"--set": value.split("=")[0], "--iterations": "fit.iterations"}.get(option, option[2:])
        plain = assignment(value)[1] if option == "--set" else value
        if option == "--steps":
            plain = [int(n) for n in value.split(",")]
        override(raw, places, "method.name" if key == "method" else key, plain, option)
    assert parse(raw, places).method.turns


def test_the_guide_names_methods_that_exist():
    text = (ROOT / "docs" / "choosing.md").read_text()
    table = text.split("## In a hurry")[1].split("## Minutes")[0]
    named = [word for row in table.splitlines() if row.startswith("| ") for word in re.findall(r"`(\w+)`", row)]
    assert len(named) > 10 and set(named) <= METHODS.keys() | {"cfg_scale"}
