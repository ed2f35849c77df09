"""Options of ledger, speed and tune that cannot be: refused before anything is loaded or measured."""

from __future__ import annotations

from pathlib import Path as File
from typing import Any

import pytest
import torch
import yaml

import hasten
from hasten import accelerate, distribute, pipelines
from hasten.core.errors import ConfigError, HastenError
from hasten.core.method import Sampling, even
from hasten.distribute import save_model
from hasten.speed import Cache, Cast, speed_up
from hasten.speed.cache import calibrate
from hasten.speed.host import host
from hasten.speed.plan import FORMAT, Plan, fingerprint
from hasten.workload import Workload
from tests.commandline import plain_consoles, refused  # noqa: F401
from tests.pipelines import FAMILIES
from tests.test_speed import tiny

CACHE = {"name": "cache"}
CHANGED: dict[str, Any] = {"steps": "four", "shape": 8, "guidance": "none"}
STACKS: dict[str, Any] = {
    "one": [{"name": "cast"}],
    "two": [CACHE, {"name": "cast"}, {**CACHE, "policy": "firstblock"}],
    "unquoted": "- {name: cache, policy: schedule, mask: 0011010}",
    "huge": f"- {{name: cache, interval: {'9' * 5000}}}",
    "deep": "[" * 3000,
    **{key: {"format": FORMAT, "fingerprint": {key: value}, "stack": [CACHE]} for key, value in CHANGED.items()},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> File:
    """A saved network, stack files, a plan with two caches, prompts."""
    torch.manual_seed(0)
    place, net = tmp_path_factory.mktemp("accelerate"), tiny()
    save_model(net, place / "own" / "model", {16: Sampling(even(16))})
    for name, stack in STACKS.items():
        (place / f"{name}.yaml").write_text(stack if isinstance(stack, str) else yaml.safe_dump(stack))
    Plan((Cache(), Cache("firstblock")), fingerprint(host(net), 16)).save(place / "plan.yaml")
    (place / "prompts.txt").write_text("a red bicycle\n")
    return place


BAD: dict[str, tuple[str, str]] = {
    "two of a name": ("ledger OWN --stack F/two.yaml", "one layer of a name; cache is there 2 times"),
    "two of a name to run": ("speed OWN --stack F/two.yaml --out F/s.png", "cache is there 2 times"),
    "two of a name in a plan": ("speed OWN --plan F/plan.yaml --out F/s.png", "cache is there 2 times"),
    "a number without end": ("ledger OWN --stack F/huge.yaml", "huge.yaml is no valid YAML"),
    "brackets without end": ("ledger OWN --stack F/deep.yaml", "deep.yaml is no valid YAML"),
    "steps of a changed plan": ("speed OWN --plan F/steps.yaml", "steps.yaml was changed: its steps cannot be 'four'"),
    "a shape of a changed plan": ("speed OWN --plan F/shape.yaml", "was changed: its shape cannot be 8"),
    "guidance of a changed plan": ("speed OWN --plan F/guidance.yaml", "was changed: its guidance cannot be 'none'"),
    "prompts without a name": (
        "tune OWN --max-loss psnr=30 --prompts= --out F/p.yaml", "--prompts is for pipelines, and 'OWN' is a model of",
    ),
    "an unquoted mask": ("ledger OWN --stack F/unquoted.yaml", "YAML takes for a number without its quotes"),
    "prompts for a folder": (
        "ledger OWN --stack F/one.yaml --prompts F/prompts.txt", "--prompts is for pipelines, and 'OWN' is a model of",
    ),
    "a call for a folder": (
        "speed OWN --stack F/one.yaml --call height=8 --out F/s.png", "--call is for pipelines, and 'OWN' is a model",
    ),
    "prompts for a bundled model": (
        "tune fashion-mnist --max-loss psnr=30 --prompts F/prompts.txt --out F/p.yaml",
        "--prompts is for pipelines, and 'fashion-mnist' is a model of hasten's own",
    ),
    "a call for a bundled model": (
        "ledger fashion-mnist --stack F/one.yaml --call height=8", "--call is for pipelines, and 'fashion-mnist'",
    ),
    "a limit twice": (
        "tune OWN --max-loss psnr=25 --max-loss psnr=60 --out F/p.yaml",
        "--max-loss psnr is given twice, as 25 and as 60; give it once",
    ),
    "an argument twice": (
        "ledger nowhere --stack F/one.yaml --call height=8 --call height=16", "--call height is given twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_options_that_cannot_be_get_one_sentence(case: str, folder: File, monkeypatch: pytest.MonkeyPatch):
    def loaded(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"{args} was loaded before the options were read")

    monkeypatch.setattr(pipelines, "load_pipeline", loaded)
    monkeypatch.setattr(distribute, "load_model", loaded)
    text, words = BAD[case]
    own = str(folder / "own")
    args = [own if a == "OWN" else a.replace("F/", f"{folder}/") for a in text.split()]
    assert words.replace("OWN", own) in refused(*args)


def test_a_hub_id_is_a_pipeline_and_a_folder_that_is_not_there_is_none(folder, monkeypatch):
    asked: list[str] = []

    def load(name: str, device: Any = "cpu") -> Any:
        asked.append(name)
        return FAMILIES["sd3"]()[0]

    monkeypatch.setattr(pipelines, "load_pipeline", load)
    monkeypatch.chdir(folder)
    found = accelerate.workload("someone/a-model.5", 4, None, None, None, None, None, 1, "cpu")
    assert asked == ["someone/a-model.5"] and found.steps == 4 and found.sampling is None
    for name in ("own/typo", "typo", "./typo/model"):
        with pytest.raises(HastenError, match="typo"):
            accelerate.workload(name, 4, None, None, None, None, None, 1, "cpu")
    assert len(asked) == 1


def test_different_keys_are_all_taken():
    assert accelerate.assignments(["height=8", "width=16"]) == {"height": 8, "width": 16}
    assert accelerate.assignments(None) == {}


SETTINGS = {"guidance_scale": 4.0}
IGNORED: dict[str, Any] = {
    "speed_up": lambda net: speed_up(net, Cast(), call=SETTINGS),
    "calibrate": lambda net: hasten.calibrate(net, [{"label": torch.tensor([0])}], 4, call=SETTINGS),
    "of a cache": lambda net: calibrate(net, "magcache", [lambda fast: None], 8, call=SETTINGS),
    "fit_weights": lambda net: hasten.fit_weights(net, "0010", [lambda fast: None], call=SETTINGS),
    "tune": lambda net: hasten.tune(net, max_loss={"psnr": 20}, sampling=Sampling(even(4)), call=SETTINGS),
    "prompts": lambda net: hasten.tune(net, ["a cup"], max_loss={"psnr": 20}, sampling=Sampling(even(4))),
    "a ledger": lambda net: Workload(net, 4, SETTINGS, sampling=Sampling(even(4))),
}


@pytest.mark.parametrize("case", IGNORED)
def test_a_call_that_would_do_nothing_is_refused(case: str):
    net = tiny()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ConfigError, match="would do nothing.*leave (it|call) out, and say .*how"):
        IGNORED[case](net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    speed_up(net, Cast(), call={})


def test_settings_of_the_other_kind_of_model_are_refused():
    pipe, _ = FAMILIES["dit"]()
    with pytest.raises(ConfigError, match="sampling is for native models; call says how DiTPipeline is called"):
        hasten.tune(pipe, max_loss={"psnr": 20}, sampling=Sampling(even(4)))
    with pytest.raises(ConfigError, match="sampling has 4 steps, not 9; leave steps out"):
        hasten.tune(tiny(), max_loss={"psnr": 20}, sampling=Sampling(even(4)), steps=9)
    for what in (pipe, tiny()):
        with pytest.raises(ConfigError, match="call is how the pipeline will be called"):
            hasten.calibrate(what, [{}], call="height=8")  # type: ignore[arg-type]


def test_speed_up_says_it_too():
    with pytest.raises(ConfigError, match="one layer of a name; cache is there 2 times, keep one"):
        speed_up(tiny(), Cache(), Cast(), Cache("firstblock"))
