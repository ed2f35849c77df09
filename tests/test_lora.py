"""Adapters on shared weights: gradients against three separate full networks, what is owned, saved and kept."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path as File
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import hasten
from hasten.core.denoiser import Batch
from hasten.core.errors import CheckpointError, ConfigError, UnsupportedModel
from hasten.core.path import EDM, RECTIFIED_FLOW, VP
from hasten.distribute import checkpoints, clone, load_adapter, load_model, save_adapter, save_model
from hasten.fit import fit
from hasten.lora import LoRA, LoRALinear, is_view, merge, shared, view
from hasten.methods.cm import CM
from hasten.methods.dmd2 import DMD2
from hasten.methods.meanflow import MeanFlow
from hasten.methods.progressive import Progressive
from hasten.methods.sid import SiD
from hasten.models.dit import DiT, DiTConfig
from hasten.names import method_class, methods, variations
from hasten.pairs import Preferences
from hasten.role import FitConfig
from tests.test_fit import bits, final, flip
from tests.training import images, network

SMALL = LoRA(3, 4.5)
CONFIG = FitConfig(
    iterations=5, batch=16, lr=1e-2, precision="float32", clone="lora", lora_rank=3, lora_alpha=4.5, save_every=2,
    ema=(0.9,),
)  # fmt: skip


@pytest.fixture
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def moved(net: Any, seed: int = 1) -> Any:
    """``net`` with random numbers in all that it owns: fresh adapters do nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.2, generator=generator)
    return net


def look(net: Any, r: float | None = None) -> Tensor:
    """What a network says at five times."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 1, 8, 8, generator=generator)
    t = net.path.at(torch.tensor([0.1, 0.3, 0.5, 0.8, 1.0]))
    with torch.no_grad():
        return net(x, t, {"label": torch.arange(5)}, r=None if r is None else net.path.at(torch.full((5,), r)))


def storages(*nets: nn.Module) -> set[int]:
    """Where the weights of networks lie, shared ones included."""
    return {p.untyped_storage().data_ptr() for net in nets for p in (*net.parameters(), *shared(net).values())}


# --- gradients ------------------------------------------------------------------------------------------------


def separate(nets: dict[str, Any]) -> dict[str, Any]:
    """Three full networks without an adapter that say the same, each with its own W + scale B A."""
    full = {}
    for name, net in nets.items():
        twin = copy.deepcopy(net) if not is_view(net) else DiT(net.config, net.path, net.kind)
        if is_view(net):
            found: dict[str, Tensor] = dict(shared(net))
            for path, m in net.named_modules():
                if isinstance(m, LoRALinear):
                    found[f"{path}.weight"] = m.weight + 1.5 * m.lora_B.detach() @ m.lora_A.detach()
            twin.load_state_dict(found)
        full[name] = twin.requires_grad_(False)
    return full


def chain_rule(net: Any, full: DiT) -> dict[str, Tensor]:
    """dA = s B^T dW and dB = s dW A^T for the gradient dW of a full network."""
    want = {}
    for path, m in net.named_modules():
        if isinstance(m, LoRALinear):
            linear: Any = full.get_submodule(path)
            grad = linear.weight.grad
            want[f"{path}.lora_A"], want[f"{path}.lora_B"] = 1.5 * m.lora_B.T @ grad, 1.5 * grad @ m.lora_A.T
    return want


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("where", [(RECTIFIED_FLOW, "velocity"), (VP, "eps"), (EDM, "v")], ids=["rf", "vp", "edm"])
@pytest.mark.parametrize(
    "method", [DMD2(gan_weight=0.3, critic_gan_weight=0.7, r1_weight=0.5, cfg_scale=2.0), SiD(cfg_scale=2.0)],
    ids=["dmd2", "sid"],
)  # fmt: skip
def test_gradients_are_those_of_three_separate_networks(method, where, checkpointing):
    torch.manual_seed(0)
    teacher = DiT(DiTConfig((4, 4), 1, 2, width=16, depth=2, heads=2, classes=3), *where)
    moved(teacher, 7)
    nets = method.networks(teacher, partial(clone, lora=SMALL))
    for seed, name in enumerate(("student", "fake")):
        moved(nets[name], seed)
    nets = {k: net.requires_grad_(False) for k, net in nets.items()}
    full = separate(nets)
    for k in ("student", "fake", "teacher"):
        nets[k].checkpointing = checkpointing
    label = torch.arange(6) % 3
    batch = Batch({"label": label}, {"label": torch.full_like(label, 3)}, (6, 1, 4, 4), torch.randn(6, 1, 4, 4))
    for turn in method.turns:
        for k in nets:
            for these in (nets, full):
                these[k].requires_grad_(k in turn.trains).zero_grad(set_to_none=True)
        losses = []
        for these in (nets, full):
            torch.manual_seed(5)
            loss = turn.loss(these, batch, 0)[0]
            losses.append(loss.detach())
            loss.backward()
        torch.testing.assert_close(*losses, rtol=1e-10, atol=0)
        for k, net in nets.items():
            got = {name: p.grad for name, p in net.named_parameters()}
            if k not in turn.trains:
                assert all(g is None for g in got.values())
                continue
            want = chain_rule(net, full[k]) if is_view(net) else {n: p.grad for n, p in full[k].named_parameters()}
            assert got.keys() == want.keys() and max(float(g.detach().abs().max()) for g in want.values()) > 1e-4
            for name, grad in want.items():
                torch.testing.assert_close(got[name], grad, rtol=1e-10, atol=1e-12)
        assert all(w.grad is None for net in nets.values() for w in shared(net).values())
        assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.usefixtures("_float64")
def test_whose_adapter_acts_is_no_state():
    """Nested calls, a graph that waits while others run, and a backward in another thread change nothing."""
    teacher = network().double()
    teacher.checkpointing = True
    a, b = (moved(clone(teacher, lora=SMALL), seed) for seed in (1, 2))
    x, t, cond = torch.randn(3, 1, 8, 8), torch.full((3,), 0.4), {"label": torch.arange(3)}

    def grads(between: Any, backward: Any) -> list[Tensor]:
        for net in (a, b):
            net.zero_grad(set_to_none=True)
        loss = b(a(x, t, cond) + a(b(x, t, cond), t, cond), t, cond).square().sum()
        between()
        backward(loss)
        return [p.grad.clone() for net in (a, b) for p in net.parameters() if p.grad is not None]

    def elsewhere(loss: Tensor) -> None:
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()

    for net in (a, b):
        net.checkpointing = False
    want = grads(lambda: None, lambda loss: loss.backward())
    for net in (a, b):
        net.checkpointing = True
    got = grads(lambda: [net(x, t, cond) for net in (a, b, teacher)], elsewhere)
    assert len(got) == len(want) == len([*a.parameters(), *b.parameters()])
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


# --- views ----------------------------------------------------------------------------------------------------


def test_a_view_starts_equal_and_owns_its_adapters_alone():
    teacher = network()
    before, flags = bits(teacher.state_dict()), [p.requires_grad for p in teacher.parameters()]
    twin = clone(teacher, lora=LoRA(3))
    assert type(twin) is DiT and (twin.path, twin.kind, twin.config) == (teacher.path, teacher.kind, teacher.config)
    assert bits({"out": look(twin)}) == bits({"out": look(teacher)})
    linears = [name for name, m in teacher.named_modules() if type(m) is nn.Linear]
    assert {k.rpartition(".")[0] for k, _ in twin.named_parameters()} == set(linears) and len(linears) == 10
    assert set(twin.state_dict()) == {f"{name}.lora_{x}" for name in linears for x in "AB"}
    assert {k: p.data_ptr() for k, p in shared(twin).items()} == {
        k: p.data_ptr() for k, p in teacher.named_parameters()
    }
    assert all(p.requires_grad for p in twin.parameters()) and twin.training
    twin.requires_grad_(True)
    assert not any(p.requires_grad for p in shared(twin).values())
    moved(twin)
    assert not torch.equal(look(twin), look(teacher))
    twin(torch.randn(2, 1, 8, 8), torch.ones(2), {"label": torch.arange(2)}).sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert bits(teacher.state_dict()) == before and flags == [p.requires_grad for p in teacher.parameters()]


def test_an_adapter_is_what_the_paper_says():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.SiLU(), nn.Linear(4, 2, bias=False))
    twin = view(net, LoRA(3, 12.0))
    first: Any = twin[0]
    assert first.lora_A.shape == (3, 5) and first.lora_B.shape == (4, 3) and not first.lora_B.any()
    assert 0.3 / 5**0.5 < float(first.lora_A.detach().abs().max()) <= 1 / 5**0.5
    moved(twin)
    x = torch.randn(7, 5)
    y = x
    for i in (0, 2):
        linear, adapter = net[i], twin[i]
        y = linear(y) + 4.0 * (y @ adapter.lora_A.T) @ adapter.lora_B.T
        y = nn.functional.silu(y) if i == 0 else y
    torch.testing.assert_close(twin(x), y)
    assert LoRA(8).scale == 1.0


def test_a_view_of_a_view_has_its_own_copy_of_the_adapters():
    teacher = network()
    one = moved(clone(teacher, lora=SMALL))
    two = clone(one)
    assert bits(two.state_dict()) == bits(one.state_dict()) and storages(one) & storages(two) == storages(teacher)
    before = look(one)
    moved(two, 9)
    assert torch.equal(look(one), before) and not torch.equal(look(two), before)


def test_no_weight_is_copied_on_the_way(monkeypatch):
    """Not even for a moment: that would be the peak."""
    teacher = network()
    copied: list[int] = []
    deepcopy = nn.Parameter.__deepcopy__

    def noted(self: Any, memo: Any) -> Any:
        copied.append(self.data_ptr())
        return deepcopy(self, memo)

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", noted)
    one = clone(teacher, lora=SMALL)
    assert not copied
    clone(one)
    merge(one)
    assert copied and not set(copied) & {p.data_ptr() for p in teacher.parameters()}


def test_a_linear_at_two_places_stays_one():
    linear = nn.Linear(4, 4)
    net = nn.Sequential(linear, nn.SiLU(), linear)
    twin = moved(view(net, SMALL))
    assert twin[0] is twin[2] and len(list(twin.parameters())) == 2
    plain = merge(twin)
    assert plain[0] is plain[2] and type(plain[0]) is nn.Linear
    x = torch.randn(3, 4)
    torch.testing.assert_close(plain(x), twin(x))


def test_a_network_without_linears_is_refused():
    with pytest.raises(UnsupportedModel, match="no nn.Linear"):
        clone(nn.LayerNorm(4), lora=SMALL)


@pytest.mark.parametrize("r", [0.0, 0.4, 1.0])
def test_a_second_time_is_owned_in_full_and_starts_without_effect(r):
    teacher = network()
    twin = clone(teacher, second_time=True, lora=SMALL)
    assert torch.equal(look(twin, r), look(teacher))
    own = {k for k in twin.state_dict() if k.startswith("span.")}
    assert own == {"span.up.weight", "span.up.bias", "span.down.weight", "span.down.bias"}
    assert storages(teacher) < storages(twin) and "lora_A" not in str(own)
    # A later stage: of a view with a second time, and of one without.
    moved(twin)
    again = clone(twin, second_time=True)
    assert torch.equal(look(again, r), look(twin, r)) and again.state_dict().keys() == twin.state_dict().keys()
    one = moved(clone(teacher, lora=SMALL))
    later = clone(one, second_time=True)
    assert torch.equal(look(later, r), look(one)) and storages(teacher) < storages(later)
    assert {k for k in later.state_dict() if "lora" not in k} == own


# --- training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", methods())
def test_every_method_trains_adapters(name):
    """Every trained copy of the teacher lies on the teacher's own weights, and learns; the teacher stays as it is."""
    needed = {"guidance": {"cfg_scale": 2.0}, "boss": {"at": (1.0, 0.7, 0.5, 0.2, 0.0)}}.get(name, {})
    method = method_class(name)(**variations(name), **needed)
    teacher = network()
    teacher.requires_grad_(False)
    before, last = bits(teacher.state_dict()), None
    config = replace(CONFIG, iterations=2 * len(method.stages(64)))
    x = images()
    source = Preferences(x.x, images(1).x, x.labels, 10) if name == "dpo" else x
    for step in fit(method, source, teacher, config):
        last = step
    assert last is not None and bits(teacher.state_dict()) == before
    views = [net for role in last.roles.values() for net in (role.net, *role.emas) if is_view(net)]
    assert is_view(last.student) and all(storages(net) > storages(teacher) for net in views)
    assert any("lora_B" in k and bool(v.any()) for k, v in last.student.state_dict().items())


RUNS: dict[str, Any] = {
    "dmd2": DMD2(gan_weight=0.1, student_every=2), "meanflow": MeanFlow(), "progressive": Progressive(start=4),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_resumes_bit_identically_from_adapters_alone(name, tmp_path):
    config = replace(CONFIG, iterations=8)
    list(fit(RUNS[name], images(), network(), config, out=tmp_path / "whole"))
    for step in fit(RUNS[name], images(), network(), config, out=tmp_path / "stopped"):
        if step.index == 7:
            break
    list(fit(RUNS[name], images(), network(), config, out=tmp_path / "stopped"))
    assert final(tmp_path / "stopped") == final(tmp_path / "whole")
    tensors = final(tmp_path / "whole")[0]
    kept = {k.rpartition(".")[2] for k in tensors if "/opt/" not in k and "disc/" not in k and "span" not in k}
    assert kept == {"lora_A", "lora_B"}  # and no weight of the backbone
    assert any(k.startswith("teacher/") for k in tensors) == (name == "progressive")


def test_the_average_of_a_stage_teaches_the_next(monkeypatch):
    seen: list[tuple[Any, Any]] = []
    made = Progressive.networks

    def spy(self: Any, teacher: Any, clone: Any) -> Any:
        nets = made(self, teacher, clone)
        seen.append((teacher, copy.deepcopy(nets["student"].state_dict())))
        return nets

    monkeypatch.setattr(Progressive, "networks", spy)
    teacher = network()
    averages = [
        (step.student, copy.deepcopy(step.student.state_dict()))
        for step in fit(Progressive(start=4), images(), teacher, CONFIG)
    ]
    assert seen[0][0] is teacher and seen[1][0] is averages[1][0]
    assert bits(seen[1][1]) == bits(averages[1][1]) and is_view(seen[1][0])
    assert storages(averages[-1][0]) > storages(teacher)


def test_training_a_two_time_student_after_a_one_time_one():
    """A stage that adds r to the adapters of the stage before."""

    class Two(CM):
        def stages(self, iterations: int) -> Any:
            return (CM(from_teacher=True), 3), (MeanFlow(), 3)

    *_, last = fit(Two(), images(), network(), CONFIG)
    assert last.stage == 1 and last.student.config.second_time and is_view(last.student)


def test_what_is_held_in_memory():
    """Weights, gradients, averages and optimiser states of a step of DMD2: one backbone, and a little more."""
    teacher = network(width=128)
    *_, last = fit(DMD2(gan_weight=0.1), images(), teacher, replace(CONFIG, lora_rank=2, iterations=2))
    held: dict[int, int] = {}

    def hold(t: Any) -> None:
        if isinstance(t, Tensor):
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()

    for role in last.roles.values():
        for net in (role.net, *role.emas, teacher):
            for t in (*net.parameters(), *net.buffers(), *shared(net).values()):
                hold(t)
                hold(t.grad)
        for state in role.opt.state.values():
            for t in state.values():
                hold(t)
    assert sum(held.values()) < 1.5 * sum(p.numel() * 4 for p in teacher.parameters())


def test_small_weights_have_float32_adapters_that_learn():
    teacher = network().to(torch.bfloat16)
    before = bits(teacher.state_dict())
    config = replace(CONFIG, precision="bfloat16", lr=1e-4, iterations=4, ema=(0.9999,))
    averages = []
    for step in fit(DMD2(gan_weight=0.1, student_every=1), images(), teacher, config):
        averages.append(torch.cat([p.flatten() for p in step.student.parameters()]).clone())
        assert {p.dtype for p in step.student.parameters()} == {torch.float32}
    assert bits(teacher.state_dict()) == before and not torch.equal(averages[0], averages[-1])
    plain = merge(moved(clone(teacher, lora=SMALL)))
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}


def test_distilled_and_saved_networks_are_plain(tmp_path):
    teacher = network()
    student = hasten.distill(teacher, DMD2(), steps=1, fit=replace(CONFIG, iterations=2))
    assert not is_view(student) and type(student.embed) is nn.Linear and not storages(student) & storages(teacher)
    twin = moved(clone(teacher, lora=SMALL))
    save_model(twin, tmp_path / "model")
    found = load_model(tmp_path / "model")
    plain = merge(twin)
    assert (
        bits(found.state_dict()) == bits(plain.state_dict())
        and found.state_dict().keys() == teacher.state_dict().keys()
    )
    torch.testing.assert_close(look(found), look(twin), rtol=1e-4, atol=1e-5)
    assert not storages(plain) & storages(twin) and plain is merge(plain)
    frozen = moved(clone(teacher, second_time=True, lora=SMALL)).requires_grad_(False)
    assert all(p.requires_grad for p in merge(frozen).parameters())


# --- files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second_time", [False, True])
def test_adapters_come_back_on_the_same_weights(second_time, tmp_path):
    teacher = network()
    twin = moved(clone(teacher, second_time, SMALL))
    save_adapter(twin, tmp_path / "a")
    again = load_adapter(teacher, tmp_path / "a")
    r = 0.2 if second_time else None
    assert torch.equal(look(again, r), look(twin, r)) and not again.training
    assert storages(again) > storages(teacher) and not any(p.requires_grad for p in again.parameters())
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == ["adapter_config.json", "adapter_model.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())  # as peft reads it
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 4.5)
    assert len(config["target_modules"]) == 10 and config["modules_to_save"] == (["span"] if second_time else None)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert torch.equal(tensors["base_model.model.embed.lora_A.weight"], twin.embed.lora_A)
    assert len(tensors) == len(list(twin.parameters())) and ("base_model.model.span.up.bias" in tensors) == second_time


def test_adapters_of_other_weights_are_refused(tmp_path):
    twin = moved(clone(network(), lora=SMALL))
    save_adapter(twin, tmp_path / "a")
    with pytest.raises(CheckpointError, match="belong to other weights"):
        load_adapter(network(5), tmp_path / "a")
    student = load_adapter(network(5), tmp_path / "a", moved=True)  # such as a preference of the teacher's
    plain, base = merge(student).state_dict(), network(5).state_dict()
    theirs, teacher = merge(twin).state_dict(), network().state_dict()
    for k in base:  # the same update of every weight
        torch.testing.assert_close(plain[k] - base[k], theirs[k] - teacher[k], rtol=1e-4, atol=1e-6)
    assert not torch.equal(plain["embed.weight"], base["embed.weight"])
    with pytest.raises(CheckpointError, match="no adapters for this network"):
        load_adapter(network(width=64), tmp_path / "a")
    with pytest.raises(ConfigError, match="no adapters; save_model"):
        save_adapter(network(), tmp_path / "b")
    save_model(network(), tmp_path / "m")
    with pytest.raises(CheckpointError, match="holds no adapter_model.safetensors with adapter_model.json"):
        load_adapter(network(), tmp_path / "m")
    flip(tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="checksum differs|truncated"):
        load_adapter(network(), tmp_path / "a")


def test_a_recipe_with_adapters_saves_both(tmp_path):
    from hasten.recipe import parse
    from hasten.run import Job

    recipe = parse({
        "method": "meanflow", "teacher": "t", "data": "digits", "out": str(tmp_path),
        "fit": {"clone": "lora", "lora_rank": 3, "lora_alpha": 4.5, "iterations": 2, "batch": 16},
    })  # fmt: skip
    teacher = network()
    *_, last = fit(recipe.method, images(), teacher, recipe.fit, out=tmp_path)
    Job(recipe, images(), teacher, torch.device("cpu"), tmp_path).save(last)
    student, adapter = load_model(tmp_path / "model"), load_adapter(teacher, tmp_path / "adapter")
    torch.testing.assert_close(look(student, 0.3), look(adapter, 0.3), rtol=1e-4, atol=1e-5)
    assert bits(adapter.state_dict()) == bits(last.student.state_dict())


# --- settings -------------------------------------------------------------------------------------------------


def test_settings_are_checked():
    bad: dict[str, Any]
    for bad in (
        {"clone": "lra"}, {"lora_rank": 8}, {"lora_alpha": 2.0}, {"clone": "lora", "lora_rank": 0},
        {"clone": "lora", "lora_alpha": 0.0},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="clone|lora"):
            FitConfig(**bad)
    assert FitConfig(clone="lora").lora_rank == 64
    made: Any = CONFIG.cloner(network())(network())
    assert made.embed.lora == SMALL
    for config in (CONFIG, FitConfig(iterations=2, batch=16)):
        with pytest.raises(ConfigError, match="merge"):
            next(fit(DMD2(), images(), clone(network(), lora=SMALL), config))


def test_a_checkpoint_of_other_adapters_is_of_another_run(tmp_path: File):
    list(fit(CM(), images(), network(), CONFIG, out=tmp_path))
    assert checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="lora_alpha is 4.5|lora_alpha is '4.5'"):
        next(fit(CM(), images(), network(), replace(CONFIG, lora_alpha=3.0), out=tmp_path))
