"""The training loop: exact resume after a kill, whose updates count, what a gradient reaches, and what is refused."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path as File
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import hasten
from hasten import distribute, names
from hasten.core.errors import CheckpointError, ConfigError, Diverged
from hasten.core.generate import FewStep
from hasten.core.path import RECTIFIED_FLOW, TRIG, rectified_flow
from hasten.data import Conditions
from hasten.distribute import checkpoints, clone, load_model
from hasten.fit import fit
from hasten.lora import LoRA
from hasten.methods.cm import CM
from hasten.methods.dmd2 import DMD2
from hasten.methods.flow import Flow
from hasten.methods.meanflow import MeanFlow
from hasten.methods.progressive import Progressive
from hasten.role import FitConfig, Role
from tests.training import BASE, DEATHS, SETTINGS, Cut, Fixed, gradients, images, network, start

ROOT = File(__file__).parent.parent


def bits(tensors: Any) -> dict[str, bytes]:
    """The bytes of every tensor, so that equal means bit-identical (NaN and -0 too)."""
    return {k: t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for k, t in tensors.items()}


def final(out: File) -> tuple[dict[str, bytes], Any]:
    """The newest checkpoint: the bytes of its tensors, and what it says beside them."""
    folder = checkpoints(out)[-1]
    return bits(load_file(folder / "state.safetensors")), json.loads((folder / "state.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, File]:
    """Uninterrupted runs of every setting."""
    outs = {name: tmp_path_factory.mktemp(name) for name in SETTINGS}
    for name, out in outs.items():
        steps = [step.index for step in start(name, out)]
        assert steps == list(range(1, SETTINGS[name][1].iterations + 1))
    return outs


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[File, dict[str, list[int]]]:
    """Every death of ``DEATHS`` and its resumption, each in a process of its own."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.training", "kill", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


# --- resume ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("death", DEATHS)
def test_a_killed_run_resumes_bit_identically(death, whole, killed):
    folder, ends = killed
    settings, _, _, first = DEATHS[death]
    assert ends[death] == [-9, 0]  # killed by SIGKILL, then finished
    assert json.loads((folder / death / "first.json").read_text()) == first  # it went on, not anew
    assert final(folder / death) == final(whole[settings])
    left = sorted(p.name for p in (folder / death / "checkpoints").iterdir())
    assert left == [p.name for p in checkpoints(whole[settings])] and len(left) == 2  # no leftovers


def test_a_checkpoint_holds_all_networks_averages_and_optimiser_states(whole):
    tensors, meta = final(whole["dmd2"])
    parts = {"/".join(k.split("/")[:2]) for k in tensors}
    assert parts == {f"{n}/{p}" for n in ("student", "fake", "disc") for p in ("net", "opt")} | {
        f"student/ema{i}" for i in range(3)
    }
    assert {k.split("/")[3] for k in tensors if k.startswith("fake/opt")} == {"step", "exp_avg", "exp_avg_sq"}
    assert meta["counts"] == {"student": 5, "fake": 9, "disc": 9}
    begun = bits(network().state_dict())
    for role in ("student/net", "student/ema0", "fake/net"):
        assert tensors[f"{role}/last.weight"] != begun["last.weight"]


def test_a_later_stage_learns_from_the_average_of_the_one_before(whole, tmp_path):
    tensors, meta = final(whole["progressive"])
    assert meta["stage"] == 1 and meta["counts"] == {"student": 4}
    average: dict[str, Tensor] = {}
    for step in start("progressive", tmp_path):
        if step.index == 4:
            average = dict(step.student.state_dict())
            break
    assert {k[8:]: v for k, v in tensors.items() if k.startswith("teacher/")} == bits(average)


def test_the_callers_teacher_is_left_as_it_is(whole):
    teacher = network()
    before = bits(teacher.state_dict())
    method, config = SETTINGS["progressive"]
    list(fit(method, images(), teacher, config, out=whole["progressive"]))
    assert bits(teacher.state_dict()) == before


def test_the_global_random_state_does_not_matter(whole, tmp_path):
    for _ in start("dmd2", tmp_path):
        torch.rand(3)  # what a loop body draws, such as a preview
    assert final(tmp_path) == final(whole["dmd2"])


def test_a_finished_run_yields_its_last_step_once_and_does_not_train(whole, monkeypatch):
    for name, out in whole.items():
        before = final(out)
        monkeypatch.setattr(Role, "update", None)
        steps = list(start(name, out))
        assert [(s.index, s.total) for s in steps] == [(SETTINGS[name][1].iterations,) * 2]
        assert final(out) == before
        kept = {k[13:]: v for k, v in before[0].items() if k.startswith("student/ema0/")}
        assert bits(steps[0].student.state_dict()) == kept


def test_without_resume_it_starts_anew_and_old_checkpoints_go(whole, tmp_path):
    shutil.copytree(whole["dmd2"], tmp_path, dirs_exist_ok=True)
    for step in start("dmd2", tmp_path, resume=False):
        if step.index == 4:
            break
    assert [p.name for p in checkpoints(tmp_path)] == ["00000002", "00000004"]
    assert next(iter(start("dmd2", tmp_path))).index == 5


def test_a_caller_saves_when_it_wants(tmp_path):
    for step in start("dmd2", tmp_path):
        if step.index == 5:
            assert step.save() == step.save() == checkpoints(tmp_path)[-1]
            break
    assert next(iter(start("dmd2", tmp_path))).index == 6


# --- checkpoints ----------------------------------------------------------------------------------------------


def short(out: File) -> Any:
    """Four iterations with checkpoints after the second and the fourth."""
    return fit(Flow(), images(), network(), replace(BASE, iterations=4, lrs={}), out=out)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Any:
    """What :func:`short` comes to."""
    out = tmp_path_factory.mktemp("short")
    list(short(out))
    return final(out)


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_in_rust(*_: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("failure", [full, full_in_rust, interrupt])
@pytest.mark.parametrize("place", ["save_file", "sync", "replace"])
def test_the_last_good_checkpoint_survives_a_full_disk(place, failure, undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        with pytest.raises((OSError, KeyboardInterrupt)) as caught:
            for step in short(tmp_path):
                if step.index == 3:
                    where = distribute.os if place == "replace" else distribute
                    patch.setattr(where, place, failure)
    if failure is not interrupt and not (failure is full_in_rust and place != "save_file"):
        assert caught.value.errno == errno.ENOSPC  # type: ignore[attr-defined]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["00000002"]  # nothing half-written
    assert [step.index for step in short(tmp_path)] == [3, 4]
    assert final(tmp_path) == undisturbed


def truncate(file: File) -> None:
    os.truncate(file, file.stat().st_size * 2 // 3)


def flip(file: File) -> None:
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)


def count_up(file: File) -> None:
    text = file.read_text()
    assert '"index": 9' in text
    file.write_text(text.replace('"index": 9', '"index": 8'))


DAMAGE = {
    "truncated weights": ("state.safetensors", truncate),
    "no weights": ("state.safetensors", File.unlink),
    "empty weights": ("state.safetensors", lambda f: f.write_bytes(b"")),
    "a bit of the weights": ("state.safetensors", flip),
    "truncated description": ("state.json", truncate),
    "a digit of the description": ("state.json", count_up),
    "no description": ("state.json", File.unlink),
    "another description": ("state.json", lambda f: f.write_text("[]")),
    "no text": ("state.json", lambda f: f.write_bytes(b"\xff\xfe\x00")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_in_one_sentence(damage, whole, tmp_path):
    shutil.copytree(whole["dmd2"], tmp_path, dirs_exist_ok=True)
    name, harm = DAMAGE[damage]
    newest = checkpoints(tmp_path)[-1]
    harm(newest / name)
    with pytest.raises(CheckpointError) as caught:
        next(start("dmd2", tmp_path))
    assert str(newest) in str(caught.value) and "\n" not in str(caught.value)
    shutil.rmtree(newest)  # what the message advises
    assert next(start("dmd2", tmp_path)).index == 9


METHOD = SETTINGS["dmd2"][0]
FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "another method": ("method", {"method": Flow()}),
    "another setting of the method": ("method", {"method": replace(METHOD, student_every=3)}),
    "another learning rate": ("fit.lr", {"config": replace(BASE, lr=1e-4)}),
    "another seed": ("fit.seed", {"config": replace(BASE, seed=1)}),
    "another length": ("fit.iterations", {"config": replace(BASE, iterations=10)}),
    "another teacher": ("teacher", {"teacher": network(1)}),
    "a wider teacher": ("teacher", {"teacher": network(0, 48)}),
    "other data of the same name": ("data", {"source": images(1)}),
    "other labels": ("data", {"source": replace(images(), labels=images().labels.flip(0))}),  # type: ignore
    "no data": ("data", {"method": replace(METHOD, gan_weight=None), "source": Conditions((1, 8, 8), 10)}),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_foreign_checkpoint_is_refused_in_one_sentence(what, whole):
    key, other = FOREIGN[what]
    run: dict[str, Any] = {"method": METHOD, "source": images(), "teacher": network(), "config": BASE} | other
    with pytest.raises(CheckpointError, match=f"belongs to another run: its {key} is") as caught:
        next(fit(**run, out=whole["dmd2"]))
    assert "\n" not in str(caught.value)


def test_how_often_it_saves_may_change(whole):
    method, config = SETTINGS["dmd2"]
    assert next(fit(method, images(), network(), replace(config, save_every=5), out=whole["dmd2"])).index == 9


def test_no_pickles(whole):
    for out in whole.values():
        assert {p.suffix for p in out.rglob("*") if p.is_file()} == {".safetensors", ".json"}
    for name in ("fit", "role", "distribute", "run"):
        text = (ROOT / "hasten" / f"{name}.py").read_text()
        assert not any(word in text for word in ("torch.save(", "torch.load(", "import pickle"))


@pytest.mark.parametrize("name", names.METHODS)
def test_a_method_is_described_the_same_in_every_process(name):
    assert " at 0x" not in repr(names.method_class(name)())


# --- whose updates count --------------------------------------------------------------------------------------


def test_averages_and_schedules_follow_their_own_networks_updates(tmp_path):
    config = replace(BASE, schedule="linear", iterations=8)
    method = replace(METHOD, student_every=3)  # the student moves at 1, 4 and 7
    averages: list[list[Tensor]] = []
    before: dict[str, bytes] = {}
    moved, rates = [], {"student": [], "fake": [], "disc": []}
    for step in fit(method, images(), network(), config):
        role = step.roles["student"]
        now = bits(role.net.state_dict())
        if not averages:  # they start as the teacher
            averages = [[p.clone() for p in network().parameters()] for _ in config.ema]
        if now != before:
            moved.append(step.index)
            n = len(moved)
            for decay, average in zip(config.ema, averages, strict=True):
                d = min(decay, (1 + n) / (10 + n))
                for a, p in zip(average, role.parameters, strict=True):
                    a.copy_(d * a + (1 - d) * p.detach())
        before = now
        for average, ema in zip(averages, role.emas, strict=True):
            for a, p in zip(average, ema.parameters(), strict=True):
                torch.testing.assert_close(p, a, rtol=1e-5, atol=1e-6)
        for name, found in rates.items():
            found.append((step.roles[name].count, step.roles[name].opt.param_groups[0]["lr"]))
    assert moved == [1, 4, 7]
    assert [n for n, _ in rates["student"]] == [1, 1, 1, 2, 2, 2, 3, 3]
    assert [n for n, _ in rates["fake"]] == [n for n, _ in rates["disc"]] == list(range(1, 9))
    for name, total, lr in (("student", 3, 2e-3), ("fake", 8, 5e-3), ("disc", 8, 2e-3)):
        for n, rate in rates[name]:
            assert rate == pytest.approx(lr * min(1, n / 3) * (1 - (n - 1) / total))


def test_decays_differ_and_the_first_is_the_one_kept():
    *_, last = fit(Flow(), images(), network(), FitConfig(iterations=12, batch=8, ema=(0.1, 0.4), precision="float32"))
    emas = last.roles["student"].emas
    assert last.student is emas[0]
    net: Any = last.roles["student"].net
    gaps = [float((e.last.weight - net.last.weight).detach().norm()) for e in emas]
    assert 0 < gaps[0] < gaps[1]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "rsqrt"])
def test_schedules_stay_positive_and_start_full(schedule):
    rates = [
        s.roles["student"].opt.param_groups[0]["lr"]
        for s in fit(
            Fixed(), Cut(), network(), FitConfig(iterations=10, batch=16, lr=1e-4, schedule=schedule, ema=(0,))
        )
    ]
    assert rates[0] == 1e-4 and min(rates) > 0
    assert rates == sorted(rates, reverse=True)
    shape = {"linear": 0.1, "cosine": 0.5 * (1 + math.cos(0.9 * math.pi)), "rsqrt": (9 / 2) ** -0.5, "constant": 1}
    assert rates[-1] == pytest.approx(1e-4 * shape[schedule])


# --- gradients ------------------------------------------------------------------------------------------------


def test_accumulated_micro_steps_are_one_big_batch():
    found: dict[int, Tensor] = {}
    losses = {}
    for micro in (1, 2, 4):
        with gradients() as grads:
            steps = list(
                fit(Fixed(), Cut(), network(), FitConfig(iterations=1, batch=16, accumulate=micro, precision="float32"))
            )
        assert len(grads) == 1
        found[micro], losses[micro] = grads[0][1], steps[0].log["fixed"]
    assert float(found[1].norm()) > 1e-3
    for micro in (2, 4):
        torch.testing.assert_close(found[micro], found[1], rtol=1e-4, atol=1e-7)
        assert losses[micro] == pytest.approx(losses[1], rel=1e-5)


def test_gradients_reach_the_networks_of_their_turn_alone():
    reached: list[tuple[str, set[str]]] = []
    open_to: list[set[str]] = []
    every: dict[str, Any] = {}

    class Spied(DMD2):
        def networks(self, teacher, clone):
            every.update(super().networks(teacher, clone))
            return every

        def critic(self, nets, batch, step):
            open_to.append({k for k, n in every.items() if any(p.requires_grad for p in n.parameters())})
            return super().critic(nets, batch, step)

        def student(self, nets, batch, step):
            open_to.append({k for k, n in every.items() if any(p.requires_grad for p in n.parameters())})
            return super().student(nets, batch, step)

    original = Role.update

    def update(self: Role) -> None:
        reached.append((self.name, {k for k, n in every.items() if any(p.grad is not None for p in n.parameters())}))
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Role, "update", update)
        config = replace(BASE, iterations=2, accumulate=1)
        list(fit(Spied(FewStep((2,)), gan_weight=0.1, student_every=1), images(), network(), config))
    turns = [("fake", {"fake", "disc"}), ("disc", {"disc"}), ("student", {"student"})]  # zeroed as they are used
    assert reached == turns * 2
    assert open_to == [{"fake", "disc"}, {"student"}] * 2


def test_the_norm_is_clipped_per_network():
    scaled: dict[str, list[float]] = {}
    original = Role.update

    def update(self: Role) -> None:
        norms = [float(p.grad.norm()) for p in self.parameters if p.grad is not None]
        scaled.setdefault(self.name, []).append(math.hypot(*norms))
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Role, "update", update)
        steps = list(fit(METHOD, images(), network(), replace(BASE, clip=0.03)))
    for name, norms in scaled.items():
        logged = [s.log[f"grad/{name}"] for s in steps if f"grad/{name}" in s.log]
        assert norms == pytest.approx([min(0.03, n) for n in logged], rel=1e-3)
    assert {k: len(v) for k, v in scaled.items()} == {"student": 5, "fake": 9, "disc": 9}
    assert any(math.isclose(n, 0.03, rel_tol=1e-3) for norms in scaled.values() for n in norms)


def test_learning_rates_are_per_network():
    def moves(**lrs: float) -> dict[str, float]:
        config = replace(BASE, lrs=lrs, warmup=0, iterations=1, weight_decay=0.0, clip=1e9)
        (step,) = fit(METHOD, images(), network(), config)
        start = list(network().parameters())
        return {
            k: max(float((a - b).detach().abs().max()) for a, b in zip(step.roles[k].parameters, start, strict=True))
            for k in ("student", "fake")
        }

    # Adam's first step is the learning rate itself, up to its epsilon
    assert moves() == pytest.approx({"student": 2e-3, "fake": 2e-3}, rel=0.02)
    assert moves(fake=1e-2) == pytest.approx({"student": 2e-3, "fake": 1e-2}, rel=0.02)


# --- precision ------------------------------------------------------------------------------------------------


def test_masters_and_averages_stay_float32_under_bfloat16():
    seen = set()

    def note(module: Any, _: Any, out: Any) -> None:
        if isinstance(module, torch.nn.Linear):
            seen.add(out.dtype)

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        steps = list(fit(METHOD, images(), network(), replace(BASE, precision="bfloat16")))
    finally:
        hook.remove()
    assert seen == {torch.bfloat16}
    for role in steps[-1].roles.values():
        assert {t.dtype for t in role.tensors().values()} == {torch.float32}
    # an average with decay 0.9 near 1 needs the digits that bfloat16 has not
    ema = steps[-1].student.last.weight
    assert not torch.equal(ema, ema.bfloat16().float())
    assert all(math.isfinite(v) for s in steps for v in s.log.values())


@pytest.mark.parametrize("method", [replace(METHOD, student_every=1, generate=FewStep((4,), "last")), CM()], ids=repr)
def test_bfloat16_gradients_reach_every_weight(method):
    """A network that runs without and then with a graph under autocast must not reuse casts made without one."""
    found = {}
    for precision in ("float32", "bfloat16"):
        with gradients() as grads:
            list(fit(method, images(), network(), FitConfig(iterations=1, batch=16, precision=precision)))
        found[precision] = dict(grads)["student"]
    assert found["float32"].shape == found["bfloat16"].shape
    assert float(torch.cosine_similarity(*found.values(), dim=0)) > 0.98


def test_autocast_is_off_for_float32():
    seen = set()

    class Seen(Fixed):
        def loss(self, nets, batch, step):
            seen.add(torch.is_autocast_enabled("cpu"))
            return super().loss(nets, batch, step)

    for precision, want in (("float32", {False}), ("bfloat16", {True})):
        seen.clear()
        list(fit(Seen(), Cut(), network(), FitConfig(iterations=1, batch=16, precision=precision)))
        assert seen == want


# --- what stops a run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e9, -1e9])
@pytest.mark.parametrize("fail", ["loss", "gradient"])
def test_a_diverging_run_stops_before_it_moves(fail, value, tmp_path):
    method = Fixed(fail, 4, value, rivals=("fake",))
    config = FitConfig(iterations=9, batch=16, save_every=2, precision="float32")
    kept, index, roles = {}, 0, {}
    with pytest.raises(Diverged) as caught:
        for step in fit(method, images(), network(), config, out=tmp_path):
            roles, index = step.roles, step.index
            kept = {k: bits(r.tensors()) for k, r in roles.items()}
    assert index == 4 and kept == {k: bits(r.tensors()) for k, r in roles.items()}
    said = str(caught.value)
    assert "at step 5:" in said and "student" in said and str(tmp_path / "checkpoints" / "00000004") in said
    assert ("gradient norm of student" if fail == "gradient" else "loss of fake and student") in said
    kept_there = load_file(checkpoints(tmp_path)[-1] / "state.safetensors")
    assert all(bool(t.isfinite().all()) for t in kept_there.values())


def test_divergence_before_the_first_checkpoint_says_so():
    with pytest.raises(Diverged, match="at step 1: .* there is no checkpoint yet"):
        list(fit(Fixed("loss"), images(), network(), FitConfig(iterations=2, batch=16)))


def test_a_run_that_cannot_work_is_refused():
    config = FitConfig(iterations=2, batch=16)
    nothing = Conditions((1, 8, 8), 10)
    for method in (Flow(), Progressive(start=4), replace(METHOD, gan_weight=0.1)):
        with pytest.raises(ConfigError, match=f"{type(method).__name__} needs data"):
            next(fit(method, nothing, network(), config))
    assert len(list(fit(DMD2(), nothing, network(), config))) == 2  # no data, no GAN
    for batch, micro in ((15, 2), (2, 4), (16, 3)):
        with pytest.raises(ConfigError, match=f"batch of {batch} does not divide into 1 ranks of {micro} micro"):
            next(fit(Flow(), images(), network(), replace(config, batch=batch, accumulate=micro)))
    with pytest.raises(ConfigError, match="fit.lrs 'fak'; did you mean 'fake'"):
        next(fit(METHOD, images(), network(), replace(config, lrs={"fak": 1e-4})))


def test_a_later_stage_that_needs_data_is_refused_at_the_start():
    class Two(DMD2):
        def stages(self, iterations) -> Any:
            return (DMD2(), iterations), (Flow(), iterations)

    with pytest.raises(ConfigError, match="Flow needs data"):
        next(fit(Two(), Conditions((1, 8, 8), 10), network(), FitConfig(iterations=1, batch=16)))


BAD = {
    "iterations": 0, "batch": 0, "accumulate": -1, "lr": 0.0, "clip": math.nan, "save_every": 0, "warmup": -1,
    "optimizer": "adamv", "schedule": "cosin", "precision": "fp16", "ema": (),
}  # fmt: skip


@pytest.mark.parametrize("key", BAD)
def test_settings_are_checked(key):
    with pytest.raises(ConfigError, match=key):
        FitConfig(**{key: BAD[key]})
    with pytest.raises(ConfigError, match="ema"):
        FitConfig(ema=(0.9, 1.0))


def test_a_model_killed_between_its_two_renames_is_still_there(killed):
    folder, ends = killed
    assert ends["model"] == [-9] and not (folder / "model").exists()
    found = load_model(folder / "model")
    assert bits(found.state_dict()) == bits(network(1).state_dict())
    assert not list(folder.glob(".model.old"))


# --- from an earlier student ----------------------------------------------------------------------------------


def one_update(method: Any, **run: Any) -> Any:
    """The last step of a single update with a learning rate so small that weights stay what they were."""
    *_, last = fit(method, images(), network(), FitConfig(1, batch=8, lr=1e-30, ema=(0.0,)), **run)
    return last


def test_a_student_starts_from_an_earlier_one_and_the_others_from_the_teacher():
    earlier, seen = network(5), {}

    class Watched(DMD2):
        def student(self, nets, batch, step):
            seen.update({k: bits(net.state_dict()) for k, net in nets.items()})
            return super().student(nets, batch, step)

    last = one_update(Watched(generate=FewStep(steps=(2,)), gan_weight=0.0, student_every=1), start=earlier)
    assert seen["student"] == bits(earlier.state_dict()) == bits(last.student.state_dict())
    assert seen["fake"] == seen["teacher"] == bits(network().state_dict())


def test_a_second_time_that_the_earlier_student_lacks_acts_on_nothing_at_first():
    earlier = network(5).eval()
    student = one_update(MeanFlow(), start=earlier).student.eval()
    x, t, label = torch.randn(3, 1, 8, 8), torch.tensor([0.2, 0.5, 0.9]), {"label": torch.tensor([1, 2, 3])}
    assert torch.equal(student(x, t, label, r=t / 2), earlier(x, t, label))


def test_distill_starts_from_an_earlier_student():
    config = FitConfig(1, batch=8, lr=1e-30, ema=(0.0,))
    student = hasten.distill(network(), DMD2(gan_weight=0.0), steps=1, fit=config, start=network(5))
    assert bits(student.state_dict()) == bits(network(5).state_dict())


def test_a_second_time_that_the_earlier_student_has_is_kept():
    earlier = network(5, second_time=True)
    assert bits(one_update(MeanFlow(), start=earlier).student.state_dict()) == bits(earlier.state_dict())


def test_only_the_first_stage_starts_from_the_earlier_student():
    seen = []

    class Watched(Progressive):
        def loss(self, nets, batch, step):
            seen.append(bits(nets["student"].state_dict()))
            return super().loss(nets, batch, step)

    config = FitConfig(2, batch=8, lr=1e-2, ema=(0.0,))
    steps = fit(Watched(4, 1), images(), network(), config, start=network(5))
    after_the_first = bits(next(steps).student.state_dict())
    next(steps)
    assert seen == [bits(network(5).state_dict()), after_the_first]


def test_a_run_from_an_earlier_student_resumes_and_is_another_run(tmp_path):
    run = {"method": METHOD, "source": images(), "teacher": network(), "config": replace(BASE, iterations=6)}
    *_, straight = fit(**run, start=network(5))
    for step in fit(**run, start=network(5), out=tmp_path):
        if step.index == 3:
            step.save()
            break
    *_, resumed = fit(**run, start=network(5), out=tmp_path)
    assert bits(resumed.student.state_dict()) == bits(straight.student.state_dict())
    with pytest.raises(CheckpointError, match="another run: its start is"):
        next(fit(**run, start=network(6), out=tmp_path))
    with pytest.raises(CheckpointError, match="another run: its start is"):
        next(fit(**run, out=tmp_path))


def on(net: Any, path: Any, kind: Any) -> Any:
    """``net`` as if it had been trained on another path, or to predict something else."""
    net.path, net.kind = path, kind
    return net


STARTS = {
    "another path": (
        {"start": on(network(), TRIG, "velocity")},
        "start predicts velocity on trig, the teacher velocity",
    ),
    "another kind": (
        {"start": on(network(), RECTIFIED_FLOW, "x0")},
        "start predicts x0 on rectified_flow, the teacher",
    ),
    "another shift": (
        {"start": on(network(), rectified_flow(3.0), "velocity")},
        r"on rectified_flow\(3.0,\), the teach",
    ),
    "another size": ({"start": network(size=(16, 16))}, "start is another network than the teacher"),
    "an adapted one": ({"start": clone(network(), lora=LoRA(2))}, r"give hasten.merge\(start\)"),
    "a folder": ({"start": "runs/first"}, "start is a network, such as hasten.load"),
    "nothing": ({"start": ""}, "start is a network, such as hasten.load"),
    "no teacher beside it": (
        {"start": network(), "method": Flow(), "config": replace(BASE, lrs={})},
        "learns from no teacher; give start as its teacher",
    ),
    "another width": ({"start": network(0, 48)}, "start is another network than the teacher"),
    "a second time": ({"start": network().with_second_time()}, "a second time r, which this method's student has not"),
    "adapters": ({"start": network(), "config": replace(BASE, clone="lora")}, "Adapters start on the teacher's own"),
}


@pytest.mark.parametrize("what", STARTS)
def test_a_start_that_cannot_be_is_refused_in_one_sentence(what):
    other, said = STARTS[what]
    run: dict[str, Any] = {"method": METHOD, "source": images(), "teacher": network(), "config": BASE} | other
    with pytest.raises(ConfigError, match=said) as caught:
        next(fit(**run))
    assert "\n" not in str(caught.value)
