"""Students as stock diffusers folders: their times, their outputs in a fresh process, their card, what is refused."""

from __future__ import annotations

import copy
import errno
import importlib.util
import json
import re
import shutil
import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from hasten import DMD2, MeanFlow, card, export, reload
from hasten.comfy import export_comfyui
from hasten.core.errors import CheckpointError, ConfigError, UnsupportedModel
from hasten.core.method import Sampling, even
from hasten.lora import LoRA, LoRALinear, merge, view
from hasten.lorafile import check_lora, linears, read_lora, targets, write_lora
from hasten.models.candidates import TABLE, betas_of, fitted, placed
from hasten.models.diffusers import PipelineDenoiser, denoiser
from hasten.models.probe import networks
from hasten.models.schedulers import ONE_TIME, fit, scheduler_for
from hasten.names import method_class, methods
from hasten.recipe import as_dict, for_steps, parse
from hasten.whole import whole_file, whole_folder
from tests.pipelines import FAMILIES
from tests.pipelines_more import MORE

families = pytest.mark.parametrize("family", FAMILIES)
GUIDED = [f for f in FAMILIES if f not in ("flux", "flux2")]  # by classifier-free guidance
Made = tuple[Any, PipelineDenoiser, PipelineDenoiser]


@cache
def made(family: str) -> Made:
    """A tiny pipeline, its denoiser, and a student of it: a copy with other weights."""
    pipe, call = FAMILIES[family]()
    net = denoiser(pipe, call)
    return pipe, net, nudged(copy.deepcopy(net))


@torch.no_grad()
def nudged(net: PipelineDenoiser) -> PipelineDenoiser:
    """All that is trained in a network changed a little."""
    generator = torch.Generator().manual_seed(1)
    for p in net.net.parameters():
        p += 0.05 * p.abs().mean() * torch.randn(p.shape, generator=generator)
    return net.eval()


def adapted(family: str, lora: LoRA) -> Made:
    """The same with a student of adapters that do something."""
    pipe, net, _ = made(family)
    student = view(net, lora)
    with torch.no_grad():
        for p in student.net.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))))
    return pipe, net, student.eval()


# --- the scheduler ----------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("rule", ["ode", "renoise"])
def test_a_stock_scheduler_samples_as_the_student_does(family, steps, rule):
    pipe, _, student = made(family)
    before = dict(pipe.components)
    sampling = Sampling(even(steps), rule)
    with placed(pipe, **{name: student.net for name in before if before[name] in networks(pipe)}):
        trial = fit(pipe, student, sampling)
    assert type(trial.scheduler).__module__.startswith("diffusers.") and trial.error <= 1e-5
    want = [student.found.steps * float(student.path.at(u)) + student.found.offset for u in sampling.times[:-1]]
    assert trial.times == pytest.approx(want, abs=3e-4)
    assert trial.start == pytest.approx(1, abs=2.4e-3 if rule == "renoise" and steps > 1 else 1e-4)
    assert pipe.components == before


def test_the_teachers_weights_are_not_the_students():
    """The measurement sees another network."""
    pipe, _, student = made("sd3")
    with pytest.raises(UnsupportedModel, match="its latents differ by .*; the pipeline's network has other weights"):
        scheduler_for(pipe, student, Sampling(even(4)))


def test_times_that_no_table_has_are_refused_with_the_nearest():
    pipe, net, _ = made("sd15")
    says = r"at times \[999, 665.667, 332.333\].*nearest: .* at \[999, 666, 332\].*for 1, 2 or 4 even steps\.$"
    with pytest.raises(UnsupportedModel, match=says):
        fit(pipe, net, Sampling(even(3)))
    assert fit(pipe, net, Sampling((1.0, 0.667, 0.333, 0.0))).times == (999, 666, 332)  # whole entries of the table


def test_times_of_a_flow_that_no_shift_gives_are_refused():
    pipe, net, _ = made("sd3")
    uneven = Sampling((1.0, 0.9, 0.3, 0.25, 0.0))
    with pytest.raises(UnsupportedModel, match="No stock scheduler"):
        fit(pipe, net, uneven)
    late = Sampling((1.0, 0.6, 0.0))  # two steps: any second time will do
    assert fit(pipe, net, late).times[1] == pytest.approx(1000 * float(net.path.at(0.6)), abs=1e-3)


def test_step_counts_that_a_pipeline_cannot_be_called_in_are_refused_and_only_others_advised():
    """Mochi's own times need two steps, and no scheduler makes four of them even."""
    pipe, call = MORE["mochi"]()
    net = denoiser(pipe, call)
    says = r"at times \[0\].*\(its own call of so many steps ends in ZeroDivisionError.*\);.* for 2 even steps\.$"
    with pytest.raises(UnsupportedModel, match=says):
        fit(pipe, net, Sampling(even(1)))
    with pytest.raises(UnsupportedModel, match=r"\(nearest: .* for 2 even steps\.$"):
        fit(pipe, net, Sampling(even(4)))
    assert fit(pipe, net, Sampling(even(2))).error <= 1e-5


def test_a_method_of_two_times_is_refused_by_a_network_of_one_in_the_first_words():
    pipe, net, _ = made("sd3")
    two = MeanFlow().sampling(2)
    with pytest.raises(UnsupportedModel, match="^The network of StableDiffusion3Pipeline has no second time r.*dmd2"):
        fit(pipe, net, two)
    assert two.two_time
    for name in ONE_TIME:
        method = for_steps(method_class(name)(**dict(methods()[name].preset)), (2,))
        assert not method.sampling(2).two_time and fit(pipe, net, method.sampling(2)).error <= 1e-5


@pytest.mark.parametrize(("rule", "ways"), [("heun", "1 even step, or for 2 or 4"), ("spiral", "1, 2 or 4")])
def test_rules_that_no_scheduler_has_are_refused(rule, ways):
    pipe, net, _ = made("sd3")
    with pytest.raises(UnsupportedModel, match=f"by the rule '{rule}'.* for {ways} even steps by a .* by 'ode'"):
        fit(pipe, net, Sampling(even(2), rule))


@pytest.mark.parametrize("rule", ["ancestral", "dpmpp_2m"])
def test_other_rules_of_tables_are_exact_too(rule):
    pipe, net, _ = made("sd15")
    trial = fit(pipe, net, Sampling(even(4), rule))
    assert type(trial.scheduler).__name__ == TABLE[rule][0][0] and trial.error <= 1e-5


def test_guidance_from_outside_is_the_pipelines_own():
    pipe, net, _ = made("sd15")
    trial = fit(pipe, net, Sampling(even(2), cfg_scale=net.found.cfg_scale))
    assert trial.call["guidance_scale"] == net.found.cfg_scale == 6 and trial.error <= 1e-5
    with pytest.raises(ConfigError, match="guidance 2, but the pipeline was probed with a call that guides by 6"):
        fit(pipe, net, Sampling(even(2), cfg_scale=2.0))


def test_betas_give_the_very_table():
    bar = torch.linspace(0.9999, 0.001, 1000, dtype=torch.float64).square().clamp_min(2.0**-24)
    product = torch.cumprod(1 - torch.tensor(betas_of(bar)), 0)
    plain = torch.cumprod(1 - (1 - bar[1:] / bar[:-1]).float(), 0).double() * bar[0]
    mine, naive = (float((b / bar[1:] - 1).abs().max()) for b in (product[1:].double(), plain))
    assert mine <= 1.5e-7 < 2 * mine < naive  # what the roundings add up to otherwise


def test_the_shift_is_the_shortest_that_does():
    grid = torch.tensor([1.0, 0.75, 0.5, 0.25])
    times = lambda shift: (shift * grid / (1 + (shift - 1) * grid)).tolist()  # noqa: E731
    assert fitted(times, times(2.7), 1.0) == 2.7
    assert fitted(times, times(1.583), 1.583) == 1.583


# --- the folder -------------------------------------------------------------------------------------------------


class Count:
    """How many samples the denoiser sees in a call of a pipeline."""

    def __init__(self, pipe: Any):
        self.samples, self.calls = 0, 0
        for net in networks(pipe):
            net.register_forward_hook(self.hook, with_kwargs=True)

    def hook(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else next(iter(output.values()))
        self.samples, self.calls = self.samples + len(first), self.calls + 1


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of every family, with steps and rules in turn, one of bfloat16; loaded back in one fresh process."""
    root = tmp_path_factory.mktemp("students")
    cases, found = [(n, rule) for n in (4, 2, 1) for rule in ("ode", "renoise")], {}
    for i, family in enumerate(FAMILIES):
        pipe, _, student = made(family)
        (root / family).mkdir()
        steps, rule = cases[i % len(cases)]
        found[family] = export.write(pipe, student, Sampling(even(steps), rule), root / family, family, about={})
    pipe, call = FAMILIES["sd3"]()
    net = denoiser(pipe.to(torch.bfloat16), call)
    student = nudged(copy.deepcopy(net).float())  # trained in float32, as clones of half-precision weights are
    (root / "half").mkdir()
    found["half"] = export.write(pipe, student, Sampling(even(2)), root / "half", "half", about={})
    found["broken"] = broken(root / "broken")
    runs = export.reloaded(list(found.values()))
    return root, found, dict(zip(found, runs, strict=True))


def broken(folder: Any) -> export.Written:
    """A folder whose scheduler has other times than the student."""
    pipe, _, student = made("sd3")
    folder.mkdir()
    one = export.write(pipe, student, Sampling(even(4)), folder, "broken", about={})
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "shift": 1.7}))
    return one


@pytest.mark.parametrize("name", [*FAMILIES, "half"])
def test_every_family_is_the_same_in_a_fresh_process(written, name):
    root, found, seen = written
    one = found[name]
    export.compare(one, seen[name])
    assert one.job["folder"] == str(root / name) and one.job["device"] == "cpu"
    assert len(seen[name]["times"]) == one.job["steps"] and seen[name]["latents"].abs().max() > 0.1
    assert one.limit == (1e-5 if name != "half" else 8 * torch.finfo(torch.bfloat16).eps)
    assert one.job["dtype"] == {"default": "bfloat16" if name == "half" else "float32"}
    assert seen[name]["images"].std() > 1e-3


def test_a_scheduler_with_other_times_is_refused(written):
    with pytest.raises(UnsupportedModel, match=r"broken was loaded back in a fresh process and its times.*, not \[1"):
        export.compare(written[1]["broken"], written[2]["broken"])


@families
def test_the_cards_code_runs_and_does_not_guide_again(written, family, monkeypatch):
    root, found, _ = written
    monkeypatch.chdir(root / family)
    text = (root / family / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S)
    assert code and "hasten" not in code[1]
    load, call = re.split(r"^(?=image = |video = )", code[1], flags=re.M)
    space: dict[str, Any] = {}
    exec(load, space)  # noqa: S102
    space["pipe"].set_progress_bar_config(disable=True)
    count, steps = Count(space["pipe"]), found[family].job["steps"]
    exec(call, space)  # noqa: S102
    assert (count.calls, count.samples) == (steps, steps)
    assert f"**{steps} step" in text and f"num_inference_steps={steps}" in code[1]
    assert ("Guidance is inside the weights" in text) == (family in GUIDED)
    assert ("keep it" in text and "guidance_scale=" in code[1]) == (family not in GUIDED)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_the_config_keeps_a_pipeline_from_guiding_where_it_can(written, family):
    root, found, _ = written
    job = found[family].job
    pipe = reload.load(job)
    count, default = Count(pipe), {"guidance_scale": 7.5}
    seen, _ = reload.watch(pipe, {**job["call"], **default}, job["steps"], job["seed"])
    same = torch.allclose(seen["latents"], found[family].seen["latents"], atol=1e-5)
    switched = family != "sd3"  # which has no switch
    assert (count.samples == job["steps"], same) == (switched, switched)
    assert made(family)[0].components.keys() == pipe.components.keys()
    if switched:
        assert made(family)[0].unet.config.time_cond_proj_dim is None  # the teacher's is as it was
        assert "configuration keeps the pipeline" in (root / family / "README.md").read_text()


def test_what_the_folder_says_of_itself(written):
    root, *_ = written
    about = export.read_about(root / "flux")
    assert about["sampling"].times == even(about["steps"]) and about["guidance"]["guidance_scale"] == 3.5
    assert about["call"]["prompt"] == ["a red bicycle"] and not about["lora"]
    with pytest.raises(CheckpointError, match="is no exported student"):
        export.read_about(root)


@pytest.mark.parametrize("what", ["times", "latents", "images"])
def test_a_difference_is_named(written, what):
    one = written[1]["flux"]
    export.compare(one, one.seen)
    other = {**one.seen, what: one.seen[what] * (1 + 3e-5 * (10 if what == "images" else 1))}
    with pytest.raises(UnsupportedModel, match=f"flux was loaded back in a fresh process and its {what} differ by 3"):
        export.compare(one, other)


def test_export_with_adapters_grid_and_card(tmp_path):
    pipe, net, student = adapted("flux", LoRA(4, alpha=8))
    before = {k: v.clone() for k, v in net.net.state_dict().items()}
    about = {
        "method": as_dict(DMD2(gan_weight=0.1)), "recipe": {"steps": [4]}, "base": "some/teacher",
        "license": "apache-2.0", "measured": [{"steps": 4, "FD": 12.3456}, {"steps": 50, "FD": 11.0}],
    }  # fmt: skip
    grid = Image.new("RGB", (8, 8))
    folder = export.export(pipe, student, Sampling(even(4)), tmp_path / "out", about=about, grid=grid)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    text = (folder / "README.md").read_text()
    for part in ("distilled with dmd2 from `some/teacher`", "| 4 | 12.35 |", "- 4", "![Samples", "apache-2.0"):
        assert part in text
    assert "loaded back in a fresh process with diffusers alone" in text and text.split("\n# ")[1].startswith("out\n")
    assert "base_model_relation: finetune" in text and (folder / "grid.png").is_file()
    loaded = type(pipe).from_pretrained(folder)
    fused = merge(student).net.state_dict()
    assert all(torch.equal(v, fused[k]) for k, v in loaded.transformer.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in net.net.state_dict().items())
    assert pipe.transformer is net.net


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), UnsupportedModel("differs")])
def test_a_full_disk_or_an_interrupt_leaves_what_was_there(tmp_path, monkeypatch, error):
    pipe, _, student = made("sd3")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / export.ABOUT).write_text("earlier")

    def stop(_: Any) -> None:
        assert (tmp_path / ".out.partial" / "model_index.json").is_file()
        raise error

    monkeypatch.setattr(export, "verify", stop)
    with pytest.raises(
        (ConfigError, KeyboardInterrupt, UnsupportedModel), match="the disk is full; nothing|^$|differs"
    ):
        export.export(pipe, student, Sampling(even(1)), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / export.ABOUT).read_text() == "earlier"


def test_safetensors_errors_are_explained_too(tmp_path):
    from safetensors import SafetensorError

    with pytest.raises(ConfigError, match="the disk is full"), whole_file(tmp_path / "a.safetensors") as partial:
        partial.write_text("half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError, match="header"), whole_file(tmp_path / "a.safetensors"):
        raise SafetensorError("a wrong header")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_kept(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("")
    with (
        pytest.raises(ConfigError, match="photos is not empty and has no mark, so"),
        whole_folder(tmp_path / "photos", "mark"),
    ):
        pass
    assert (tmp_path / "photos" / "cat.png").exists()


def test_what_cannot_be_stored_is_refused(tmp_path):
    pipe, net, student = made("sd3")
    odd = copy.deepcopy(student)
    odd.found = replace(odd.found, call={**odd.found.call, "joint_attention_kwargs": {"scale": {1.0}}})
    with pytest.raises(ConfigError, match="call cannot be stored"):
        export.write(pipe, odd, Sampling(even(1)), tmp_path, "x", about={})
    with pytest.raises(UnsupportedModel, match="StableDiffusion3Pipeline has transformer .* the student is a Flux"):
        export.trained(pipe, made("flux")[2])

    class Rounded(torch.Tensor):
        """As quantization in place leaves weights."""

    odd = copy.deepcopy(student)
    odd.net.proj_out.weight = nn.Parameter(odd.net.proj_out.weight.data.as_subclass(Rounded))  # type: ignore
    with pytest.raises(UnsupportedModel, match="proj_out.weight is quantized in place.*quantization_config"):
        export.trained(pipe, odd)


def test_pictures_of_a_call_are_kept_beside_it(tmp_path):
    call = {"image": Image.new("RGB", (4, 4), (9, 8, 7)), "sizes": (1, 2), "prompt": ["a"]}
    packed = json.loads(json.dumps(reload.pack(call, tmp_path)))
    back = reload.unpack(packed, tmp_path)
    assert back["image"].getpixel((0, 0)) == (9, 8, 7) and back["sizes"] == [1, 2] and back["prompt"] == ["a"]


def test_the_upload_and_its_failure(tmp_path, monkeypatch):
    import huggingface_hub

    done: list[Any] = []

    class Hub:
        def create_repo(self, repo: str, exist_ok: bool) -> None:
            if repo == "gated/one":
                raise RuntimeError("403 Forbidden.\nmore")
            done.append((repo, exist_ok))

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str, ignore_patterns: Any) -> str:
            assert ignore_patterns == ["recipe.yaml"]  # which has paths of this machine
            done.append((repo_id, folder_path))
            return "address"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(export, "verify", lambda written: None)
    pipe, _, student = made("sd3")
    folder = export.export(pipe, student, Sampling(even(1)), tmp_path / "model", push_to_hub="me/student")
    assert "\n# student\n" in (folder / "README.md").read_text()
    assert done == [("me/student", True), ("me/student", str(folder))]
    assert 'from_pretrained("me/student")' in (folder / "README.md").read_text()
    folder = export.export(pipe, student, Sampling(even(1)), tmp_path / "model")  # as a run calls it
    assert f"\n# {tmp_path.name}\n" in (folder / "README.md").read_text()
    with pytest.raises(ConfigError, match="model is whole, but could not be uploaded to 'gated/one': 403 Forbidden"):
        export.upload(folder, "gated/one")


# --- adapters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd15", "flux", "wan"])
def test_adapters_alone(tmp_path, family):
    """Of a base that is not here: they are written, and a warning and the card say what was not seen."""
    pipe, net, student = adapted(family, LoRA(4, alpha=6))
    name = "unet" if family == "sd15" else "transformer"
    with pytest.warns(UserWarning, match="not run in a fresh process: its base some/teacher is not on this machine"):
        folder = export.export(
            pipe, student, Sampling(even(2)), tmp_path / "out", about={"base": "some/teacher"}, lora=True
        )
    tensors, settings = read_lora(folder / export.LORA)
    assert (settings[f"{name}.r"], settings[f"{name}.lora_alpha"]) == (4, 6)
    found = linears(student.net)
    assert tensors.keys() == {f"{name}.{path}.lora_{x}.weight" for path in found for x in "AB"}
    path, linear = next(iter(found.items()))
    assert torch.equal(tensors[f"{name}.{path}.lora_A.weight"], linear.lora_A) and linear.lora_A.shape[0] == 4
    text = (folder / "README.md").read_text()
    assert "load_lora_weights" in text and "base_model_relation: adapter" in text and 'subfolder="scheduler"' in text
    assert "but not run in a fresh process: its base some/teacher is not on" in text and "loaded back" not in text
    assert not (folder / "model_index.json").exists() and (folder / "scheduler" / "scheduler_config.json").is_file()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """sd3 saved whole; with other weights; and as the hub's cache has it, whole and without its network."""
    root = tmp_path_factory.mktemp("bases")
    pipe, _, student = made("sd3")
    pipe.save_pretrained(root / "base")
    with placed(pipe, transformer=student.net):
        pipe.save_pretrained(root / "other")
    for name in ("whole", "part"):
        cached = root / "hub" / f"models--some--{name}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("abc")
        shutil.copytree(root / "base", cached / "snapshots" / "abc")
    shutil.rmtree(root / "hub" / "models--some--part" / "snapshots" / "abc" / "transformer")
    return root


def by_hand(monkeypatch: Any, bases: Any, peft: bool = False) -> None:
    """A machine with a hub's cache, and without peft, unless it is there and wanted."""
    import huggingface_hub

    inner = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "peft" and not peft else inner(n, *a))
    monkeypatch.setenv("HF_HUB_CACHE", str(bases / "hub"))  # for the fresh process
    look = huggingface_hub.try_to_load_from_cache
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a: look(*a, cache_dir=bases / "hub"))


def test_adapters_are_run_on_their_base_without_peft(tmp_path, monkeypatch, bases):
    """On a folder, on the hub's cache; refused on other weights; said where the cache lacks a part of the base."""
    by_hand(monkeypatch, bases)
    pipe, _, student = adapted("sd3", LoRA(4, alpha=6))
    wheres, written = (str(bases / "base"), "some/whole", str(bases / "other"), "some/part"), []
    for i, where in enumerate(wheres):
        (tmp_path / str(i)).mkdir()
        about = {"base": where}
        written.append(export.write(pipe, student, Sampling(even(2)), tmp_path / str(i), "x", about=about, lora=True))
    runs = export.reloaded(written)
    monkeypatch.setattr(export, "reloaded", lambda some: [runs[written.index(w)] for w in some])
    export.verify(written[:2])
    for one, where, name in zip(written, wheres, ("base", "some/whole"), strict=False):
        text, about = (one.folder / "README.md").read_text(), export.read_about(one.folder)
        assert "loaded back in a fresh process with diffusers, its adapters added to the base's weights by hand" in text
        assert front(text).get("base_model") == (None if name == "base" else name)
        assert about["base"] == where and str(bases) not in text
        assert f'from_pretrained("{name}")' in text and ("# the folder of the base model" in text) == (name == "base")
        assert 'load_lora_weights(".")  # this folder' in text
    with pytest.raises(UnsupportedModel, match="its latents differ"):
        export.verify(written[2:3])
    with pytest.warns(UserWarning, match="but not run in a fresh process: its base is not whole on .*no file named"):
        export.verify(written[3:])
    text = (written[3].folder / "README.md").read_text()
    assert "not run in a fresh process: its base is not whole" in text and "loaded back" not in text
    assert str(bases) not in text


def test_adapters_load_with_peft(tmp_path):
    pytest.importorskip("peft")
    for family in ("sd15", "sd3", "flux", "wan"):
        pipe, call = FAMILIES[family]()
        base, _, student = adapted(family, LoRA(4, alpha=6))
        about = {"base": "x"}
        if family == "sd3":  # in the fresh process too
            pipe.save_pretrained(tmp_path / "base")
            about = {"base": str(tmp_path / "base")}
        with warnings.catch_warnings(record=True) as caught:
            folder = export.export(base, student, Sampling(even(2)), tmp_path / family, about=about, lora=True)
        assert ("fresh process with diffusers and peft" in (folder / "README.md").read_text()) == (family == "sd3")
        assert any("not run in a fresh" in str(w.message) for w in caught) == (family != "sd3")
        about = export.read_about(folder)
        pipe.load_lora_weights(str(folder))
        pipe.scheduler = type(fitted_scheduler(folder)).from_config(fitted_scheduler(folder).config)
        seen, _ = reload.watch(pipe, about["call"], 2, 0)
        net = export.trained(base, student)
        with placed(base, **{k: net.net for k, m in base.components.items() if m in networks(base)}):
            trial = fit(base, net, Sampling(even(2)))
        assert torch.allclose(seen["latents"], trial.latents.float(), atol=1e-5 * float(trial.latents.abs().max()))


def fitted_scheduler(folder: Any) -> Any:
    """The scheduler that was exported beside adapters."""
    import diffusers

    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return getattr(diffusers, config["_class_name"]).from_config(config)


def test_adapters_of_other_weights_or_a_lost_alpha_are_refused(tmp_path):
    pipe, net, student = adapted("sd3", LoRA(4, alpha=6))
    file, fused = tmp_path / "a.safetensors", merge(student).net
    write_lora(student.net, file, "transformer")
    check_lora(file, "transformer", net.net, fused)
    with pytest.raises(UnsupportedModel, match="does not give the student's weights"):
        check_lora(file, "transformer", made("sd3")[2].net, fused)
    for module in student.net.modules():
        if isinstance(module, LoRALinear):
            module.lora = LoRA(4, alpha=4)
    write_lora(student.net, file, "transformer")
    with pytest.raises(UnsupportedModel, match="does not give the student's weights"):
        check_lora(file, "transformer", net.net, fused)


def test_names_that_others_end_in_become_a_pattern():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.block = nn.Linear(2, 2), nn.ModuleDict({"out": nn.Conv2d(2, 2, 1)})

    assert targets(Net(), {"out": None}) == "out" and targets(nn.Sequential(nn.Linear(2, 2)), {"0": None}) == ["0"]


@pytest.mark.parametrize("family, why", [("dit", "DiTPipeline loads none"), ("sd3", "the student has full weights")])
def test_adapters_that_cannot_be_written_alone(tmp_path, family, why):
    pipe, _, student = adapted("dit", LoRA(2)) if family == "dit" else made("sd3")
    with pytest.raises(ConfigError, match=why):
        export.export(pipe, student, Sampling(even(1)), tmp_path / "out", lora=True)
    assert not list(tmp_path.iterdir())


# --- ComfyUI ----------------------------------------------------------------------------------------------------


def test_comfyui_adapters_of_a_unet_are_read_by_diffusers_reader_of_that_form(tmp_path):
    pipe, _, student = adapted("sd15", LoRA(4, alpha=6))
    file = export_comfyui(pipe, student, tmp_path / "lora.safetensors", lora=True)
    state, alphas = type(pipe).lora_state_dict(str(file), unet_config=pipe.unet.config)
    found = linears(student.net)
    attention = {path for path in found if ".attn" in path}
    assert attention and len(set(alphas.values())) == 1 and next(iter(alphas.values())) == 6
    ends = ("lora_A.weight", "lora.down.weight", "lora_linear_layer.down.weight")
    down = sorted((v for k, v in state.items() if k.endswith(ends)), key=lambda v: float(v.sum()))
    assert len(down) == len(found)
    mine = sorted((m.lora_A for m in found.values()), key=lambda v: float(v.detach().sum()))
    assert all(torch.equal(a, b) for a, b in zip(down, mine, strict=True))


def test_comfyui_files_have_diffusers_names(tmp_path):
    from safetensors.torch import load_file

    pipe, _, student = adapted("flux", LoRA(4, alpha=6))
    lora = load_file(export_comfyui(pipe, student, tmp_path / "lora.safetensors", lora=True))
    name = "transformer.transformer_blocks.0.attn.to_q"
    assert lora[f"{name}.alpha"] == 6 and lora[f"{name}.lora_A.weight"].shape[0] == 4
    whole = load_file(export_comfyui(pipe, student, tmp_path / "whole.safetensors"))
    fused = merge(student).net.state_dict()
    assert whole.keys() == fused.keys() and all(torch.equal(whole[k], fused[k]) for k in fused)


def test_comfyui_refusals(tmp_path):
    pipe, _, student = made("cogvideox")
    with pytest.raises(UnsupportedModel, match="ComfyUI is not known to read diffusers' names of CogVideoX"):
        export_comfyui(pipe, student, tmp_path / "a.safetensors")
    pipe, _, student = made("sd3")
    with pytest.raises(ConfigError, match="reads .safetensors files"):
        export_comfyui(pipe, student, tmp_path / "a.ckpt")
    with pytest.raises(ConfigError, match="no adapters"):
        export_comfyui(pipe, student, tmp_path / "a.safetensors", lora=True)
    assert not list(tmp_path.iterdir())


# --- the card ---------------------------------------------------------------------------------------------------


def test_tables_of_the_card():
    assert card.table(None) == "" and card.table({"FD": 1.23456}) == "| FD |\n| --- |\n| 1.235 |"
    assert card.table([{"a": 1}, {"b": "x"}]).splitlines()[2:] == ["| 1 |  |", "|  | x |"]


def front(text: str) -> dict[str, Any]:
    """A card's metadata."""
    return yaml.safe_load(text.split("---")[1])


def test_the_card_of_a_run_says_its_method_and_no_places(tmp_path):
    """What the command line and ``distill`` hand it: a recipe's dictionaries, with paths of this machine."""
    (tmp_path / "prompts.txt").write_text("a cup")
    (tmp_path / "sd3").mkdir()
    raw = {
        "task": "distill", "method": "dmd2", "steps": [2], "pipeline": str(tmp_path / "sd3"), "out": "../runs/first",
        "prompts": str(tmp_path / "prompts.txt"), "call": {"negative_prompt": "and/or /etc"},
    }  # fmt: skip
    recipe = as_dict(parse(raw, {(): "command line"}))
    for about in ({"recipe": recipe}, {"method": recipe["method"]}):
        text = card.card(VALUES, {**about, "base": str(tmp_path / "sd3")}, lora=False)
        assert "**2 steps**, distilled with dmd2 from `sd3` by hasten." in text and "derived from `sd3`" in text
        assert "base_model" not in front(text) and str(tmp_path) not in text
    text = card.card(VALUES, {"recipe": recipe, "base": "some/sd3"}, lora=False)
    assert front(text)["base_model"] == "some/sd3" and front(text)["base_model_relation"] == "finetune"
    shown = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    assert (shown["pipeline"], shown["prompts"], shown["out"]) == ("sd3", "prompts.txt", "first")
    assert shown["call"] == {"negative_prompt": "and/or /etc"} and shown["method"] == recipe["method"]


VALUES = dict.fromkeys(
    ("name", "pipeline", "code", "guidance", "scheduler", "times", "error", "start", "grid", "checked"), ""
) | {"steps": 2}


def test_a_licence_is_named_before_or_after():
    text = card.card(VALUES, {"base": "some/teacher"}, lora=False)
    assert text.endswith("These weights are derived from `some/teacher`; its licence holds for them.\n")
    named = card.licensed(text, "mit")
    assert named == card.card(VALUES, {"base": "some/teacher", "license": "mit"}, lora=False)
    assert front(named) == front(text) | {"license": "mit"} and "license" not in front(text)
    assert named.endswith("These weights are derived from `some/teacher` and are under mit.\n")
    assert card.licensed(named, r"my own \1") == card.licensed(text, r"my own \1")


def test_what_the_cards_say_of_guidance():
    say = lambda family, call, quiet: card.guidance_text(made(family)[0], call, quiet, False, False)  # noqa: E731
    silent = say("sd3", {"guidance_scale": 1.0}, {"guidance_scale": 1.0})
    assert silent.startswith(
        "Guidance is inside the weights: `guidance_scale=1` keeps the pipeline from adding its own."
    )
    assert "Its default would" in silent and "skip_layer" not in silent
    assert say("flux", {"guidance_scale": 3.5}, {}).endswith("was trained at `guidance_scale=3.5`; keep it.")
    none = say("sd3", {"guidance_scale": 1.0, "skip_layer_guidance_scale": 0.0}, {})
    assert none.startswith("The student was trained without guidance, which is `guidance_scale=1` and")
    assert "`pipe.guider._enabled = False`" in say("sd3", {}, {"guider._enabled": False})
    given = card.arguments(made("sd3")[0], {"guidance_scale": 1.0}, 2, False, {"guidance_scale": 1.0})
    assert given == {"num_inference_steps": 2, "guidance_scale": 1.0}


def test_reload_imports_nothing_of_hasten():
    source = importlib.util.find_spec("hasten.reload")
    assert source and source.origin
    text = open(source.origin).read()
    assert not re.search(r"^\s*(from|import) hasten", text, re.M) and shutil.which("python")
