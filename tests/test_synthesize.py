"""Synthetic data: the teacher's own samples, the same bits after an interrupt, refused where they do not belong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path as File
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hasten.core.errors import CheckpointError, ConfigError
from hasten.methods.cm import CM
from hasten.models.diffusers import denoiser, of
from hasten.models.probe import record
from hasten.pipelines import distill, host
from hasten.role import FitConfig
from hasten.synthesize import describe, noise_of, synthesize
from tests.pipelines import FAMILIES

PROMPTS = ["a red bicycle", "two grey dogs", "a cup"]
SMALL: dict[str, Any] = dict(steps=2, batch=2, shard=4, precision="float32")


def made(family: str) -> tuple[Any, dict[str, Any]]:
    """A tiny pipeline, and its call without what it is to make."""
    pipe, call = FAMILIES[family]()
    return pipe, {k: v for k, v in call.items() if k not in ("prompt", "class_labels")}


def latents(folder: File) -> Tensor:
    """All samples of a synthesis."""
    return torch.cat([load_file(f)["x0"] for f in sorted(folder.glob("latents-*.safetensors"))])


@pytest.mark.parametrize("family", ["sd3", "sd15", "ltx"])
def test_samples_are_what_the_pipeline_itself_makes_of_the_same_noise(family: str, tmp_path: File):
    """Its solver is of first order. Another prompt is 0.5 to 1.2 away, a guidance 30 % lower 0.15 to 0.3.

    DDIM hops over 1000 // steps times, so that it is only right where the steps divide 1000.
    """
    pipe, call = made(family)
    if family == "sd15":  # as it is, it stops visiting times at 945 of 1000
        changes = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
    folder = synthesize(pipe, PROMPTS[:2], tmp_path, call=call, steps=50, precision="float32")
    net, errors = denoiser(pipe, call), []
    sigma = net.path.coeffs(net.path.at(torch.tensor(1.0)))[1]
    for i, x in enumerate(latents(folder)):
        asked = {**of(call, "prompt", [PROMPTS[i]]), "latents": sigma * noise_of(0, i, net.shape)[None]}
        own = record(pipe, asked, 50).steps[-1].after[0]
        errors.append(float((own - x).norm() / own.norm()))
    assert max(errors) < 0.12, errors


@pytest.fixture
def pipe_and_call() -> Iterator[tuple[Any, dict[str, Any]]]:
    """One pipeline with text encoders."""
    yield made("sd3")


def test_an_interrupted_synthesis_goes_on_with_the_same_bits(pipe_and_call: Any, tmp_path: File):
    pipe, call = pipe_and_call
    whole = synthesize(pipe, PROMPTS, tmp_path / "a", count=7, call=call, **SMALL)
    names = sorted(f.name for f in whole.iterdir() if f.is_file())
    assert names == ["latents-00000.safetensors", "latents-00001.safetensors", "synthetic.json"]
    assert latents(whole).shape == (7, *denoiser(pipe, call).shape)
    before = {k: v.clone() for k, v in pipe.text_encoder.state_dict().items()}
    seen: list[Any] = []

    def stop(what: str, done: int, total: int) -> None:
        if what == "sampling":
            assert pipe.text_encoder is None and pipe.text_encoder_3 is None and total == 7
            if done == 6:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(pipe, PROMPTS, tmp_path / "b", count=7, call=call, tell=stop, **SMALL)
    files = sorted(f.name for f in (tmp_path / "b").iterdir() if f.is_file())
    assert files == ["latents-00000.safetensors", "unfinished.json"]
    assert all(v.equal(before[k]) for k, v in pipe.text_encoder.state_dict().items())
    with pytest.raises(CheckpointError, match="is unfinished; the same synthesis goes on"):
        describe(tmp_path / "b", pipe)
    with pytest.raises(CheckpointError, match="is unfinished"):
        host(pipe, data=tmp_path / "b", work=tmp_path / "w")
    first = (tmp_path / "b" / "latents-00000.safetensors").stat().st_mtime_ns
    synthesize(pipe, PROMPTS, tmp_path / "b", count=7, call=call, tell=lambda *said: seen.append(said), **SMALL)
    assert (tmp_path / "b" / "latents-00000.safetensors").stat().st_mtime_ns == first
    assert [done for what, done, _ in seen if what == "sampling"] == [4, 6, 7, 7]
    for name in names:
        assert (tmp_path / "b" / name).read_bytes() == (whole / name).read_bytes()
    synthesize(pipe, PROMPTS, tmp_path / "b", count=7, call=call, **SMALL)  # nothing is left to do
    assert (tmp_path / "b" / "latents-00000.safetensors").stat().st_mtime_ns == first


def test_noise_follows_seed_and_number_alone(tmp_path: File):
    pipe, call = made("dit")
    a = latents(synthesize(pipe, [1, 2, 3], tmp_path / "a", count=5, call=call, **SMALL))
    b = latents(synthesize(pipe, [1, 2, 3], tmp_path / "b", call=call, **{**SMALL, "batch": 3, "shard": 1}))
    other = latents(synthesize(pipe, [1, 2, 3], tmp_path / "c", call=call, seed=1, **SMALL))
    assert len(a) == 5 and len(b) == 3
    torch.testing.assert_close(a[:3], b, rtol=1e-4, atol=1e-4)
    assert (a[:3] - other).abs().mean() > 0.1 and (a[0] - a[3]).abs().mean() > 0.1  # one label, two noises
    assert json.loads((tmp_path / "a" / "synthetic.json").read_text())["prompts"] == [1, 2, 3, 1, 2]


def test_another_run_is_refused_by_name(tmp_path: File):
    pipe, call = made("dit")
    synthesize(pipe, [1, 2], tmp_path, call=call, **SMALL)
    before = latents(tmp_path)

    def refused(prompts: Any = (1, 2), **changes: Any) -> str:
        with pytest.raises(CheckpointError, match="belongs to another run") as error:
            synthesize(pipe, list(prompts), tmp_path, **{"call": call, **SMALL, **changes})
        return str(error.value)

    assert "steps is 2, this run's is 3" in refused(steps=3)
    assert "cfg_scale is 4.0, this run's is 2.0" in refused(cfg_scale=2)
    assert "seed is 0, this run's is 9" in refused(seed=9)
    assert "its prompts is not the same" in refused(prompts=(1, 3))
    assert "its call is not the same" in refused(call={**call, "guidance_scale": 3.0})
    with torch.no_grad():
        next(pipe.transformer.parameters()).mul_(1.5)
    assert "its network is not the same" in refused()
    with pytest.raises(CheckpointError, match="made by another pipeline.*its network"):
        describe(tmp_path, pipe)
    assert latents(tmp_path).equal(before)
    (tmp_path / "synthetic.json").unlink()
    with pytest.raises(CheckpointError, match="unknown origin"):
        synthesize(pipe, [1, 2], tmp_path, call=call, **SMALL)
    with pytest.raises(CheckpointError, match="holds no synthetic data"):
        describe(tmp_path, pipe)
    (tmp_path / "synthetic.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        describe(tmp_path, pipe)


def test_guidance_is_the_calls_own_unless_it_is_given(tmp_path: File):
    pipe, call = made("dit")
    own, four, none = (
        latents(synthesize(pipe, [1, 2], tmp_path / name, call=call, cfg_scale=scale, **SMALL))
        for name, scale in {"own": None, "four": 4.0, "none": 1.0}.items()
    )
    assert own.equal(four) and not own.equal(none)


@pytest.mark.parametrize("family", ["sd3", "dit"])
def test_a_method_that_needs_data_trains_on_it(family: str, tmp_path: File):
    pipe, call = made(family)
    prompts = PROMPTS if family == "sd3" else [1, 2, 3]
    folder = synthesize(pipe, prompts, tmp_path / "data", count=5, call=call, **SMALL)
    student = distill(
        pipe, CM(from_teacher=True, cfg_scale=2.0), steps=1, data=folder, fit=FitConfig(iterations=2, batch=4),
        out=tmp_path / "run",
    )  # fmt: skip
    source = student.hosted.source
    batch = source.rows([4, 0])
    assert source.has_data and source.prompts == 5 and batch.data.equal(latents(folder)[[4, 0]])
    assert all(v.equal(source.rows([1, 0]).cond[k]) for k, v in batch.cond.items())  # sample 4 is of prompt 1
    assert any(not v.equal(source.rows([2, 0]).cond[k]) for k, v in batch.cond.items())
    (shard,) = folder.glob("conditions-*/conditions-*.safetensors")
    assert {len(v) for v in load_file(shard).values()} == {3}  # each prompt is stored once
    start, end = (torch.cat([p.flatten() for p in net.parameters()]) for net in (student.hosted.net, student.net))
    assert not start.equal(end)
    assert not list((tmp_path / "run").glob("conditions-*"))  # the synthesis has encoded them


@pytest.mark.parametrize("extra", [{"prompts": PROMPTS}, {"call": {"height": 8}}, {"sizes": [(8, 8)]}])
def test_synthetic_data_bring_prompts_and_call(extra: dict[str, Any], tmp_path: File):
    pipe, call = made("dit")
    folder = synthesize(pipe, [1], tmp_path, call=call, **SMALL)
    with pytest.raises(ConfigError, match=f"a call of its own; leave {next(iter(extra))} out"):
        host(pipe, data=str(folder), **extra)


def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path: File):
    pipe, call = made("flux")
    out = tmp_path / "out"
    for name in ("steps", "count", "batch", "shard"):
        with pytest.raises(ConfigError, match=f"{name} of a synthesis must be at least 1"):
            synthesize(pipe, PROMPTS, out, **{"call": call, **SMALL, name: 0})
    with pytest.raises(ConfigError, match="cfg_scale of 3 needs an unconditional"):
        synthesize(pipe, PROMPTS, out, call=call, cfg_scale=3.0, **SMALL)
    with pytest.raises(ConfigError, match="kept as JSON"):
        synthesize(pipe, PROMPTS, out, call={"latents": torch.zeros(1)}, **SMALL)
    with pytest.raises(ConfigError, match="no prompt in the list"):
        synthesize(pipe, [], out, call=call, **SMALL)
    with pytest.raises(ConfigError, match="Unknown argument .* did you mean 'height'"):
        synthesize(pipe, PROMPTS, out, call={"hight": 8}, **SMALL)
    with pytest.raises(ConfigError, match="FluxPipeline refuses this call: .*max_sequence_length"):
        synthesize(pipe, PROMPTS, out, call={**call, "max_sequence_length": 9999}, **SMALL)
    pipe, call = made("dit")
    with pytest.raises(ConfigError, match="takes class labels, whole numbers"):
        synthesize(pipe, ["a cup"], out, call=call, **SMALL)
    assert not out.exists()


@pytest.mark.parametrize("shard", ["latents-00001.safetensors", "conditions-*/conditions-00000.safetensors"])
@pytest.mark.parametrize("how", ["gone", "truncated"])
def test_a_shard_that_is_gone_or_truncated_is_made_again(shard: str, how: str, tmp_path: File):
    pipe, call = made("dit")
    settings = {**SMALL, "shard": 2}
    folder = synthesize(pipe, [1, 2, 3], tmp_path, count=5, call=call, **settings)
    (file,) = folder.glob(shard)
    whole, kept = file.read_bytes(), (folder / "latents-00000.safetensors").stat().st_mtime_ns
    file.unlink() if how == "gone" else file.write_bytes(whole[:-9])
    said: list[Any] = []
    synthesize(pipe, [1, 2, 3], folder, count=5, call=call, tell=lambda *a: said.append(a), **settings)
    assert file.read_bytes() == whole and (folder / "latents-00000.safetensors").stat().st_mtime_ns == kept
    assert (folder / "synthetic.json").is_file() and said[-1] == ("sampling", 5, 5)
    assert host(pipe, data=folder, work=tmp_path / "work").source.rows([4]).data.shape[0] == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["model_index.json", "hasten.json", "checkpoints"])
def test_the_folder_of_a_model_takes_no_samples(name: str, tmp_path: File):
    pipe, call = made("dit")
    (tmp_path / name).mkdir() if name == "checkpoints" else (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=rf"holds a model or a run \({name}\); choose another output folder"):
        synthesize(pipe, [1], tmp_path, call=call, **SMALL)
    assert len(list(tmp_path.iterdir())) == 1
