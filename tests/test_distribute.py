"""Model folders, copies of networks, and training on two ranks."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path as File
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hasten import distribute
from hasten.core.errors import CheckpointError, ConfigError, UnsupportedModel
from hasten.core.method import Sampling, even
from hasten.core.path import EDM, RECTIFIED_FLOW, TRIG, VP, VP_COSINE, Path, ddpm, edm, vp
from hasten.distribute import checkpoints, clone, load_model, read_extra, read_folder, read_samplings, save_model
from hasten.fit import fit
from hasten.models.dit import DiT
from hasten.role import FitConfig
from tests.test_fit import bits, flip, truncate
from tests.training import Cut, Fixed, gradients, network, start

ROOT = File(__file__).parent.parent
TABLE = ddpm(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0))
PATHS: dict[str, tuple[Path, Any]] = {
    "rectified_flow": (RECTIFIED_FLOW, "velocity"), "trig": (TRIG, "v"), "edm": (EDM, "v"),
    "another edm": (edm(0.01, 50.0, 5.0), "x0"), "vp": (VP, "eps"), "another vp": (vp(0.2, 12.0), "eps"),
    "vp_cosine": (VP_COSINE, "v"), "ddpm": (TABLE, "eps"),
}  # fmt: skip


def on(path: Path, kind: Any = "velocity", **config: Any) -> DiT:
    """The random network on ``path``."""
    net = network(**config)
    net.path, net.kind = path, kind
    return net


def look(net: DiT, **r: torch.Tensor) -> torch.Tensor:
    """What a network says at five times."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 1, 8, 8, generator=generator)
    with torch.no_grad():
        return net(x, net.path.at(torch.tensor([0.1, 0.3, 0.5, 0.8, 1.0])), {"label": torch.arange(5)}, **r)


# --- model folders --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATHS)
def test_a_model_comes_back_as_it_was(name, tmp_path):
    path, kind = PATHS[name]
    net = on(path, kind, second_time=name == "vp")
    samplings = {1: Sampling((1.0, 0.0)), 4: Sampling(even(4), "renoise", name == "vp", 1.5)}
    save_model(net, tmp_path / "m", samplings, {"iterations": 7})
    again = load_model(tmp_path / "m")
    assert (again.kind, again.config) == (net.kind, net.config)
    assert (again.path.name, again.path.args, again.path.t_max) == (path.name, path.args, path.t_max)
    assert not again.training and bits(again.state_dict()) == bits(net.state_dict())
    assert bits({"out": look(again)}) == bits({"out": look(net)})
    t = path.at(torch.linspace(0, 1, 50, dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(again.path.coeffs(t), path.coeffs(t), strict=True))
    assert torch.equal(again.path.time(path.angle(t)), path.time(path.angle(t)))
    assert read_samplings(tmp_path / "m") == samplings
    assert read_extra(tmp_path / "m") == {"iterations": 7}
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["m", "model.json", "model.safetensors"]


def test_a_path_that_no_file_can_name_is_refused_when_saving(tmp_path):
    with pytest.raises(ConfigError, match="Unknown path 'sd15'"):
        save_model(on(ddpm([0.9, 0.5, 0.1], "sd15")), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def reseal(folder: File, change: Any) -> None:
    """Change a model's description and its checksum with it, as another program would write it."""
    meta = json.loads((folder / "model.json").read_text())
    meta.pop("self")
    meta = change(meta) or meta
    (folder / "model.json").write_text(json.dumps({**meta, "self": distribute.seal(meta)}))


def stranger(folder: File) -> None:
    (folder / "model.json").write_text('{"_class_name": "FluxTransformer2DModel"}')


def other_weights(folder: File) -> None:
    save_file({"weight": torch.zeros(3)}, folder / "model.safetensors")
    digest = distribute.digest(folder / "model.safetensors")
    reseal(folder, lambda meta: meta.update(sha256=digest))


HARM: dict[str, Any] = {
    "truncated weights": lambda f: truncate(f / "model.safetensors"),
    "a flipped bit": lambda f: flip(f / "model.safetensors"),
    "a truncated description": lambda f: truncate(f / "model.json"),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "no description": lambda f: (f / "model.json").unlink(),
    "another program's model": stranger,
    "weights of another model": other_weights,
    "another path": lambda f: reseal(f, lambda m: m["path"].update(name="cosmos")),
    "an unknown field": lambda f: reseal(f, lambda m: m["config"].update(experts=8)),
    "nothing described": lambda f: reseal(f, lambda m: {"sha256": m["sha256"]}),
    "an impossible size": lambda f: reseal(f, lambda m: m["config"].update(size=[8, 9])),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_foreign_or_damaged_model_is_refused_in_one_sentence(harm, tmp_path):
    save_model(network(), tmp_path / "m")
    HARM[harm](tmp_path / "m")
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path / "m")
    assert "\n" not in str(caught.value) and str(tmp_path / "m") in str(caught.value)
    if harm == "nothing described":
        for read in (read_samplings, read_extra):
            with pytest.raises(CheckpointError):
                read(tmp_path / "m")


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no model.safetensors"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no model.safetensors"):
        load_model(tmp_path / "empty")


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=["full", "interrupt"])
def test_a_failed_overwrite_leaves_the_old_model(call, error, tmp_path, monkeypatch):
    save_model(network(1), tmp_path / "m")
    replace, calls = os.replace, []

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) == call:
            raise error
        replace(*args)

    monkeypatch.setattr(distribute.os, "replace", failing)
    with pytest.raises(type(error)):
        save_model(network(2), tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    assert bits(load_model(tmp_path / "m").state_dict()) == bits(network(1).state_dict())
    save_model(network(2), tmp_path / "m")
    assert bits(load_model(tmp_path / "m").state_dict()) == bits(network(2).state_dict())


def test_what_a_dead_process_left_is_swept_away_and_does_no_harm(tmp_path):
    save_model(network(1), tmp_path / "m")
    (tmp_path / ".m.partial").mkdir()
    (tmp_path / ".m.partial" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".m.old").mkdir()  # killed after the second rename: the new one is in place
    assert bits(load_model(tmp_path / "m").state_dict()) == bits(network(1).state_dict())
    save_model(network(2), tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


# --- copies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATHS)
def test_a_second_time_changes_nothing_at_the_start(name):
    path, kind = PATHS[name]
    net = on(path, kind)
    twin = clone(net, second_time=True)
    want = look(net)
    for u in (0.0, 0.1, 0.49, 0.8, 1.0):
        assert torch.equal(look(twin, r=path.at(torch.full((5,), u))), want)
    assert torch.equal(look(twin), want)
    assert all(p.requires_grad for p in twin.parameters()) and twin.training
    assert (twin.path, twin.kind) == (path, kind)
    r, t = path.at(torch.full((2,), 0.2)), path.at(torch.full((2,), 0.9))
    cond = {"label": torch.zeros(2, dtype=torch.long)}
    twin(torch.randn(2, 1, 8, 8), t, cond, r=r).square().sum().backward()
    assert twin.span is not None and float(twin.span.down.weight.grad.norm()) > 0  # and yet it learns


def test_a_clone_shares_nothing():
    net = network()
    twin = clone(net)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(1)
    assert bits(net.state_dict()) == bits(network().state_dict())
    with pytest.raises(UnsupportedModel, match="Linear cannot take a second time"):
        clone(torch.nn.Linear(1, 1), second_time=True)


# --- two ranks ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> tuple[File, list[dict[str, torch.Tensor]]]:
    """What two processes under torchrun trained."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command += ["-m", "tests.training", "rank", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, [load_file(folder / f"rank{i}.safetensors") for i in (0, 1)]


def test_two_ranks_end_alike_and_data_differ(ranks):
    _, (a, b) = ranks
    drawn = {"drawn", "seen", "noise"}
    assert bits({k: v for k, v in a.items() if k not in drawn}) == bits({k: v for k, v in b.items() if k not in drawn})
    assert {k.split("/")[0] for k in a} >= {"student", "fake", "disc", "fixed", "again"}
    assert len(a["drawn"]) > 20 and all(not torch.equal(x, y) for x, y in zip(a["drawn"], b["drawn"], strict=True))
    assert not torch.equal(a["noise"], b["noise"])


def test_two_ranks_are_one_process_with_the_whole_batch(ranks):
    _, (a, b) = ranks
    assert (a["seen"].tolist(), b["seen"].tolist()) == ([0, 0], [8, 8])  # each saw its half
    config = FitConfig(iterations=2, batch=16, precision="float32", lr=1e-3)
    for micro in (1, 2):
        with gradients() as grads:
            *_, last = fit(Fixed(), Cut(), network(), FitConfig(**{**vars(config), "accumulate": micro}))
        assert len(grads) == 2
        for i, (_, gradient) in enumerate(grads):
            torch.testing.assert_close(a[f"gradient/{i}"], gradient, rtol=1e-3, atol=1e-6)
        for k, v in last.roles["student"].net.state_dict().items():
            assert float((a[f"fixed/{k}"] - v).abs().mean()) < 1e-5  # two steps move a weight by 2e-3


def test_two_ranks_stop_and_resume_bit_identically(ranks):
    folder, (a, _) = ranks
    again = {k[6:]: v for k, v in a.items() if k.startswith("again/")}
    assert len(again) > 100 and bits(again) == bits({k: a[k] for k in again})
    for name in ("whole", "stopped"):
        kept = checkpoints(folder / name)
        assert [p.name for p in kept] == ["00000008", "00000009"]  # written once, by rank 0: no leftovers, all whole
        assert [p.name for p in sorted((folder / name / "checkpoints").iterdir())] == [p.name for p in kept]
        assert bits(read_folder(kept[-1], "state")[0]) == bits(again)


def test_one_rank_does_not_go_on_from_two(ranks):
    folder, _ = ranks
    with pytest.raises(CheckpointError, match="another run: its ranks is 2, this run's is 1"):
        next(start("dmd2", folder / "whole"))
