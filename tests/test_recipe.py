"""Recipes: every one in recipes/ is read, what is written reads back equal, and every slip is told with its place."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path as File
from typing import Any

import pytest
import torch

import hasten
from hasten import names, run
from hasten.core.errors import ConfigError
from hasten.recipe import Recipe, assignment, dit_config, for_steps, load, override, parse, pick_device, save
from hasten.role import FitConfig
from tests.training import images, network

ROOT = File(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_there_is_a_recipe_for_every_method_and_a_row_for_every_file():
    assert {names.name_of(load(file).method) for file in RECIPES} == {
        name for name, row in names.METHODS.items() if not row.preset
    }
    files = {f"hasten.methods.{p.stem}" for p in (ROOT / "hasten" / "methods").glob("[a-z]*.py")}
    assert {row.target.split(":")[0] for row in names.METHODS.values()} == files


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_a_recipe_loads_and_survives_a_round_trip(file: File, tmp_path: File):
    recipe = load(file)
    assert recipe.method.turns and recipe.method.stages(recipe.fit.iterations)
    assert all(recipe.method.sampling(n).times[-1] == 0 for n in recipe.steps)
    save(recipe, tmp_path / "again.yaml")
    assert load(tmp_path / "again.yaml") == recipe


TEXTS = {
    "method: dmd3": "line 1: Unknown method 'dmd3'; did you mean 'dmd'?",
    "teacher: x\nmethod:\n  name: dmd2\n  gan_wieght: 1": "line 4: Unknown key in method: 'gan_wieght'; did you mean",
    "method: flow\ndata: digits\nfit: {iteratons: 3}": "line 3: Unknown key in fit: 'iteratons'; did you mean",
    "method: flow\ndta: digits": "line 2: Unknown key 'dta'; did you mean 'data'?",
    "method: flow\ndata: digits\nfit:\n  lr: fast": "line 4: fit.lr is 'fast', but it should be a valid number",
    "method: flow\ndata: digits\nfit: {iterations: true}": "line 3: fit.iterations cannot be true.",
    "method: flow\ndata: digits\nfit: {lr: -1}": "line 3: fit.lr must be positive",
    "method: flow\ndata: digits\nfit: 3": "line 3: fit takes keys (iterations",
    "method: {name: flow, times: unifrm}\ndata: digits": "line 1: Unknown times 'unifrm'; did you mean 'uniform'?",
    "method: {name: flow, times: {name: uniform, low: 2}}\ndata: digits": "line 1: Uniform times need",
    "method: flow\ndata: digits\npath: recified_flow": "line 3: Unknown path 'recified_flow'; did you mean",
    "method: flow\ndata: digits\nkind: vel": "line 3: kind is 'vel', but it should be 'x0'",
    "method: flow\ndata: digits\nsteps: 0": "line 3: steps must be at least 1, not 0.",
    "method: flow\ndata: digits\nsteps: [1, x]": "line 3: steps is 'x'",
    "method: flow\ndata: digits\nmodel: {widht: 3}": "line 3: Unknown key in model: 'widht'; did you mean 'width'?",
    "method: flow\ndata: digits\npairs: 5": "line 3: 0 or more pairs are made, for kd",
    "method: flow": "line 1: flow, as it is set, needs data",
    "method: sid": "line 1: sid needs a teacher",
    "method: {name: meanflow, from_teacher: true}\ndata: digits": "line 1: meanflow needs a teacher",
    "teacher: x\nmethod: kd\nsteps: [1, 2]": "line 3: kd trains for one step count; give one, not 1, 2.",
    "data: digits": "method is missing",
    "methd: flow": "line 1: Unknown key 'methd'; did you mean 'method'?",
    "method: 3": "line 1: method takes a name",
    "method: flow\nmethod: kd": "line 2: the key 'method' is there twice",
    "- a\n- b": "'key: value' lines",
    "": "'key: value' lines",
    "method: [": "line 1: this is not valid YAML",
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_slip_is_told_with_its_line(text: str, tmp_path: File):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "r.yaml")
    assert str(error.value).startswith("r.yaml") and TEXTS[text] in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_recipe_is_refused(tmp_path: File):
    with pytest.raises(ConfigError, match="no.yaml.*No such file"):
        load(tmp_path / "no.yaml")


def test_defaults_follow_task_method_and_teacher():
    train = parse({"task": "train", "data": "digits"})
    assert (names.name_of(train.method), train.steps) == ("flow", (50,))
    assert parse({"method": "meanflow", "data": "digits"}).method.from_teacher is False
    assert parse({"method": "meanflow", "data": "digits", "teacher": "x"}).method.from_teacher is True
    assert parse({"method": "kd", "teacher": "x"}).method.steps == 4
    assert parse({"method": "progressive", "teacher": "x", "data": "digits", "steps": 2}).method.end == 2
    assert parse({"method": "dmd2", "teacher": "x", "steps": [2, 4]}).method.generate.steps == (2, 4)
    fit = {"lr": "1e-3", "ema": [0.9, 0.99], "lrs": {"fake": 1}}
    want = FitConfig(**dict(names.METHODS["sid"].fit) | {"lr": 1e-3, "ema": (0.9, 0.99), "lrs": {"fake": 1.0}})
    assert parse({"method": "sid", "teacher": "x", "fit": fit}).fit == want


def test_overrides_reach_into_names():
    raw: dict[str, Any] = {"method": "dmd2", "teacher": "x"}
    places = {(): "command line"}
    for text in ("method.gan_weight=0", "fit.iterations=7", "method.times={name: uniform, low: 0.1}"):
        override(raw, places, *assignment(text), f"--set {text}")
    recipe = parse(raw, places)
    assert (recipe.method.gan_weight, recipe.fit.iterations, recipe.method.times.low) == (0, 7, 0.1)
    override(raw, places, "method.gan=1", None, "--set method.gan=1")
    with pytest.raises(ConfigError, match="--set method.gan=1: Unknown key"):
        parse(raw, places)
    for text in ("gan_weight", "=3", "a=["):
        with pytest.raises(ConfigError, match="--set"):
            assignment(text)
    with pytest.raises(ConfigError, match="fit holds no keys"):
        override({"fit": 3}, {}, "fit.lr", 1, "--lr")


def test_for_steps_is_what_a_recipe_does():
    assert for_steps(hasten.DMD2(), (1, 4)).generate.steps == (1, 4)
    assert for_steps(hasten.KD(), (2,)).steps == 2
    assert for_steps(hasten.MeanFlow(), (1, 2)) == hasten.MeanFlow()
    assert for_steps(hasten.PCM(phases=1, hops=50), (1, 2)) == hasten.PCM(phases=1, hops=50)  # it is lcm
    with pytest.raises(ConfigError, match="progressive trains for one step count"):
        for_steps(hasten.Progressive(), (1, 2))


def test_adapters_take_the_rows_own_learning_rate():
    raw = {"method": "sid", "teacher": "x"}
    row = names.METHODS["sid"]
    assert parse(raw).fit.lr == dict(row.fit)["lr"] != row.lora_lr
    assert parse({**raw, "fit": {"clone": "lora"}}).fit.lr == row.lora_lr
    assert parse({**raw, "fit": {"clone": "lora", "lr": 3e-5}}).fit.lr == 3e-5


def test_another_learning_rate_is_every_networks_in_proportion():
    raw = {"method": "tdm", "teacher": "x"}
    assert parse(raw).fit.lrs == pytest.approx({"student": parse(raw).fit.lr / 5})
    for fit in ({"clone": "lora"}, {"lr": 1e-3}, {"clone": "lora", "lr": 1e-3}):
        got = parse({**raw, "fit": fit}).fit
        assert got.lr == fit.get("lr", names.METHODS["tdm"].lora_lr)
        assert got.lrs == pytest.approx({"student": got.lr / 5})
    assert parse({**raw, "fit": {"lr": 1e-3, "lrs": {"fake": 3e-3}}}).fit.lrs == {"fake": 3e-3}


@pytest.mark.parametrize("adapters", [False, True])
def test_from_python_the_rows_settings_suit_the_method_too(adapters: bool):
    got = FitConfig(**names.defaults(hasten.TDM(), adapters), clone="lora" if adapters else "full")
    raw = {"method": "tdm", "teacher": "x"} | ({"fit": {"clone": "lora"}} if adapters else {})
    assert got == parse(raw).fit != FitConfig()
    assert names.defaults(hasten.DMD2(divergence="js")) == names.METHODS["f_distill"].defaults()
    assert names.defaults(object()) == {}


def test_distill_and_train_take_them(monkeypatch: pytest.MonkeyPatch):
    seen: list[FitConfig] = []
    monkeypatch.setattr("hasten.run.training.fit", lambda *args, **_: seen.append(args[3]) or iter(()))
    monkeypatch.setattr("hasten.run._last", list)
    net, data = network(), images()
    hasten.distill(net, hasten.LADD(), data=data)
    hasten.distill(net, hasten.LADD(), data=data, lora_rank=4)
    hasten.distill(net, hasten.LADD(), data=data, fit=FitConfig(lr=3e-3))
    hasten.train(data)
    run.distill(net, hasten.LADD(), data=data)
    row = names.METHODS["ladd"]
    assert seen[0] == FitConfig(**row.defaults())
    assert seen[1] == FitConfig(**row.defaults(adapters=True), clone="lora", lora_rank=4)
    assert seen[2] == FitConfig(lr=3e-3) and seen[3] == FitConfig(**names.METHODS["flow"].defaults())
    assert seen[4] == seen[0]


def test_the_network_takes_its_shape_from_the_data():
    recipe = Recipe(hasten.Flow(), model={"width": 16, "depth": 1, "heads": 2}, path="edm", kind="v")
    net = recipe.network((3, 6, 4), 5)
    assert (net.config.size, net.config.channels, net.config.classes, net.path.name) == ((6, 4), 3, 5, "edm")
    assert dit_config({}, (1, 7, 7), 0).patch == 1
    with pytest.raises(ConfigError, match="model.classes is 3, but the data have 5"):
        dit_config({"classes": 3}, (1, 8, 8), 5)


def test_another_package_adds_a_method(monkeypatch: pytest.MonkeyPatch):
    entries = [
        importlib.metadata.EntryPoint(name, value, "hasten.methods")
        for name, value in (("mine", "hasten.methods.sid:SiD"), ("broken", "nowhere:X"), ("sid", "nowhere:X"))
    ]
    monkeypatch.setattr(names, "entry_points", lambda group: entries)
    names.methods.cache_clear()
    try:
        assert parse({"method": "mine", "teacher": "x"}).method == hasten.SiD()
        assert names.method_class("sid") is hasten.SiD  # ours win
        with pytest.raises(ConfigError, match="'broken' cannot be loaded"):
            parse({"method": "broken"})
    finally:
        names.methods.cache_clear()


def test_a_method_of_another_package_is_one_file_and_one_line(tmp_path: File, monkeypatch: pytest.MonkeyPatch):
    """The guide's own method as an installed package: what it says of itself is what recipes do."""
    guide = (ROOT / "docs" / "adding-a-method.md").read_text()
    code = [part.split("```")[0] for part in guide.split("```python\n")[1:]]
    (tmp_path / "echoes.py").write_text("\n".join(text for text in code if "class Echo" in text))
    about = tmp_path / "echoes-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: echoes\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[hasten.methods]\necho = echoes:Echo\necho_at = echoes:EchoAt\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    names.methods.cache_clear()
    try:
        raw = {"method": "echo_at", "teacher": "x", "data": "digits", "steps": [2]}
        got = parse(raw)
        assert got.method.count == 2 and got.fit.lr == 3e-4 and for_steps(got.method, (8,)).count == 8
        assert parse(raw | {"fit": {"clone": "lora"}}).fit.lr == 3e-5
        with pytest.raises(ConfigError, match="echo_at trains for one step count; give one, not 1, 2"):
            parse(raw | {"steps": [1, 2]})
        with pytest.raises(ConfigError, match="echo_at needs a teacher"):
            parse(raw | {"teacher": None})
        assert parse({**raw, "method": "echo", "steps": [1, 2], "teacher": None}).fit == FitConfig()
        student = hasten.distill(network(), got.method, steps=2, data=images(), fit=FitConfig(2, batch=8))
        assert type(student) is hasten.DiT
        monkeypatch.setattr(importlib.import_module("echoes").EchoAt, "row", {"step": "count"})
        names.methods.cache_clear()
        with pytest.raises(ConfigError, match="field in the row of echoes:EchoAt 'step'; did you mean 'steps'"):
            names.methods()
    finally:
        names.methods.cache_clear()


def test_a_device_that_is_not_there_is_refused():
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="did you mean 'cuda'"):
        pick_device("cda")
    if not torch.cuda.is_available():
        assert pick_device("auto").type == "cpu"
        with pytest.raises(ConfigError, match="'cuda' is not on this machine; use cpu"):
            pick_device("cuda")


def test_a_nameless_thing_has_no_recipe():
    with pytest.raises(ConfigError, match="object has no name in a recipe"):
        names.name_of(object())


@pytest.mark.parametrize("name", hasten.__all__)
def test_every_public_name_is_there(name: str):
    assert getattr(hasten, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        hasten.__getattr__("nope")
