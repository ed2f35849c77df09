"""Times learnt for pipelines: from prompts to the layer ``Times`` and its stack file, and what cannot be learnt."""

from __future__ import annotations

from pathlib import Path as File
from typing import Any

import pytest
import torch
import yaml

import hasten
from hasten import schedule
from hasten.core.errors import ConfigError, UnsupportedModel
from hasten.core.method import even
from hasten.encoded import Encoded
from hasten.models.encode import encode
from hasten.schedule import Learnt, learn, learn_for, learn_times
from hasten.speed import Times
from hasten.speed.host import host
from hasten.speed.plan import load_stack
from tests.commandline import plain_consoles, refused, run  # noqa: F401
from tests.pipelines import FAMILIES, diffusers
from tests.test_guidance_layer import latents

PROMPTS = ["a cup", "two grey dogs", "a rather long prompt about a red bicycle in the rain"]
QUICK: dict[str, Any] = {"iterations": 8, "count": 12, "batch": 6, "reference_steps": 12}


def solver(name: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline with DPM-Solver++(2M)."""
    pipe, call = FAMILIES[name]()
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe, call


@pytest.mark.parametrize(
    ("name", "rule", "scale"), [("wan", "dpmpp_2m", 5.0), ("sdxl", "ode", 5.0), ("dit", "dpmpp_2m", 4.0)]
)
def test_a_pipeline_learns_times_that_its_layer_takes(name, rule, scale):
    pipe, call = solver(name) if name == "dit" else FAMILIES[name]()
    before, parts = latents(pipe, call, 3), set(pipe.components)
    found = learn_for(pipe, 3, prompts=[1, 2] if name == "dit" else PROMPTS, call=call, **QUICK)
    assert (found.sampling.rule, found.sampling.cfg_scale) == (rule, scale)
    assert found.learnt < found.even and found.sampling.times != pytest.approx(even(3), abs=0.01)
    assert all(getattr(pipe, part) is not None for part in parts if pipe.components[part] is not None)
    up = hasten.speed_up(pipe, hasten.Times(found.sampling.times), call=call)
    with up as fast:
        changed = latents(fast, call, 3)
    assert up.ledger()["times"]["moved"] > 0 and not torch.equal(changed, before)
    assert torch.equal(latents(pipe, call, 3), before)


def test_the_encoders_are_gone_while_times_are_learnt_and_come_back(monkeypatch: pytest.MonkeyPatch):
    pipe, call = FAMILIES["sd3"]()
    weights = {k: v.clone() for k, v in pipe.text_encoder_3.state_dict().items()}
    asked: list[dict[str, Any]] = []

    def stopped(net: Any, steps: int, **options: Any) -> Learnt:
        assert pipe.text_encoder is None and pipe.text_encoder_3 is None
        asked.append({**options, "prompts": options["source"].prompts, "steps": steps})
        raise KeyboardInterrupt

    monkeypatch.setattr(schedule, "learn", stopped)
    for more in ({}, {"seed": 7, "cfg_scale": 2.0, "rule": "heun", "device": "cpu"}):
        with pytest.raises(KeyboardInterrupt):
            learn_for(pipe, 4, prompts=[f"cup {i}" for i in range(9)], call=call, count=2, batch=1, **more)
        assert all(v.equal(weights[k]) for k, v in pipe.text_encoder_3.state_dict().items())
    assert (asked[0]["prompts"], asked[0]["steps"], asked[0]["count"], asked[0]["batch"]) == (6, 4, 2, 1)
    assert (asked[0]["rule"], asked[0]["cfg_scale"]) == ("ode", 5.0)
    assert (asked[1]["rule"], asked[1]["cfg_scale"], asked[1]["seed"]) == ("heun", 2.0, 7)


def test_encoding_longer_prompts_leaves_what_the_layers_read(monkeypatch: pytest.MonkeyPatch):
    pipe, call = FAMILIES["qwenimage"]()
    adapter, nets = host(pipe, call).adapter, []
    template, uncond = adapter.templates[adapter.shape], adapter.uncond
    monkeypatch.setattr(schedule, "learn", lambda net, steps, **options: nets.append(net))
    learn_for(pipe, 3, prompts=PROMPTS, call=call, **QUICK)
    assert adapter.templates[adapter.shape] is template and adapter.uncond is uncond
    assert nets[0].templates[adapter.shape] is not template and nets[0].uncond is not uncond
    assert nets[0].net is adapter.net


def test_a_denoiser_learns_from_a_source_of_encoded_prompts(tmp_path: File):
    pipe, call = FAMILIES["flux"]()
    net = hasten.denoiser(pipe, call)
    source = Encoded(encode(pipe, net, PROMPTS, tmp_path), net.shape)
    found = learn(net, 3, source=source, **QUICK)
    assert found.learnt < found.even and learn_times(net, 3, source=source, **QUICK) == found.sampling
    assert learn_times(pipe, 3, prompts=PROMPTS, call=call, **QUICK) == found.sampling
    with pytest.raises(ConfigError, match="the pipeline itself with prompts, or give a source"):
        learn_times(net, 3, **QUICK)
    for given, word in (({"prompts": PROMPTS}, "prompts"), ({"call": call}, "call")):
        with pytest.raises(ConfigError, match=f"^{word} is for a diffusers pipeline, not for PipelineDenoiser"):
            learn_times(net, 3, **given, **QUICK)


def test_parts_hold_every_sample_once():
    noise = torch.arange(5.0).view(5, 1)
    goal = schedule.Goal(noise, {"label": torch.arange(5)}, {}, noise + 10)
    parts = goal.parts(2)
    assert [len(part.noise) for part in parts] == [2, 2, 1]
    assert torch.cat([part.cond["label"] for part in parts]).tolist() == list(range(5))
    assert torch.equal(torch.cat([part.x0 for part in parts]), goal.x0)


def test_how_many_go_at_a_time_does_not_change_what_is_reported():
    pipe, call = FAMILIES["flux"]()
    found = [
        learn_for(pipe, 2, prompts=PROMPTS, call=call, iterations=1, count=5, batch=b, reference_steps=4).even
        for b in (5, 2)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def heun() -> tuple[Any, dict[str, Any]]:
    pipe, call = FAMILIES["sdxl"]()
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe, call


REFUSED: dict[str, tuple[Any, dict[str, Any], type, str]] = {
    "prompts": (FAMILIES["sd3"], {"prompts": None}, ConfigError, "StableDiffusion3Pipeline are learnt on prompts"),
    "even": (FAMILIES["dit"], {"prompts": [1]}, UnsupportedModel, "DDIMScheduler does not step through times"),
    "heun": (heun, {}, UnsupportedModel, "HeunDiscreteScheduler calls the network"),
    "guidance": (FAMILIES["flux"], {"cfg_scale": 3.0}, ConfigError, "no classifier-free guidance"),
    "steps": (FAMILIES["sd3"], {"steps": 1}, ConfigError, "take at least 2"),
    "several": (FAMILIES["sd3"], {"call": {"num_images_per_prompt": 2}}, ConfigError, "every prompt gets one sample"),
    "empty": (FAMILIES["sd3"], {"prompts": []}, ConfigError, "There is no prompt"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_learnt_is_refused_before_anything_is(case, monkeypatch: pytest.MonkeyPatch):
    made, given, kind, words = REFUSED[case]
    pipe, call = made()
    for name in ("encode", "free", "learn"):
        monkeypatch.setattr(schedule, name, lambda *args, **kwargs: pytest.fail("it went on"))
    with pytest.raises(kind, match=words) as caught:
        learn_for(pipe, **{"steps": 3, "prompts": PROMPTS, **given, "call": {**call, **given.get("call", {})}})
    assert "\n" not in str(caught.value)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> File:
    """A folder with saved pipelines and prompts."""
    folder = tmp_path_factory.mktemp("pipelines")
    for family in ("flux", "dit"):
        FAMILIES[family]()[0].save_pretrained(folder / family)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "labels.txt").write_text("1\n2\n")
    return folder


SIZE = ("--call", "height=8", "--call", "width=8", "--call", "max_sequence_length=32")


def test_hasten_times_writes_a_stack_that_hasten_speed_takes(there: File, tmp_path: File):
    model, file = str(there / "flux"), tmp_path / "new" / "times.yaml"
    quick = ("--steps", "3", "--iterations", "16", "--count", "16", "--batch", "8")
    made = run("times", model, *SIZE, "--prompts", str(there / "prompts.txt"), *quick, "--out", str(file))
    first, last = made.stdout.splitlines()
    numbers = [float(u) for u in first.split(",")]
    assert last == str(file) and len(numbers) == 4 and (numbers[0], numbers[-1]) == (1.0, 0.0)
    assert yaml.safe_load(file.read_text()) == [{"name": "times", "times": pytest.approx(numbers, abs=1e-4)}]
    (layer,) = load_stack(file)
    assert isinstance(layer, Times) and layer.steps == pytest.approx(numbers[:-1], abs=1e-4)
    assert numbers != pytest.approx(even(3), abs=0.01) and "distance to many steps" in made.stderr
    said = run(
        "speed", model, *SIZE, "--prompts", str(there / "prompts.txt"), "--steps", "3", "--stack", str(file),
        "--count", "1", "--repeats", "1", "--out", str(tmp_path / "s.png"),
    )  # fmt: skip
    assert "times: requests" in said.stderr and (tmp_path / "s.png").is_file()


def test_hasten_times_refuses_a_pipeline_in_one_sentence(there: File, tmp_path: File, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    model, prompts = str(there / "flux"), ("--prompts", str(there / "prompts.txt"), "--iterations", "1", "--count", "1")
    assert "give --prompts a file of them" in refused("times", model)
    assert "guide a pipeline with --call" in refused("times", model, *prompts, "--cfg-scale", "2")
    assert ".yaml file, not 't.json'" in refused("times", model, *prompts, "--out", "t.json")
    assert "one step count, not '2,4'" in refused("times", model, *prompts, "--steps", "2,4")
    assert "--batch must be at least 1" in refused("times", model, *prompts, "--batch", "0")
    assert "did you mean 'ld3'" in refused("times", model, *prompts, "--objective", "ld4")
    said = refused("times", str(there / "dit"), "--prompts", str(there / "labels.txt"))
    assert "DDIMScheduler does not step through times that are set" in said
    assert not list(tmp_path.iterdir())
