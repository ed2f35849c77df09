"""Backward simulation, turns, stages, averages, sampling, and what a step costs."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.core.errors import ConfigError
from hasten.core.generate import FewStep
from hasten.core.method import even
from hasten.core.path import RECTIFIED_FLOW
from hasten.distribute import clone
from hasten.fit import fit
from hasten.methods.cm import CM
from hasten.methods.dmd2 import DMD2
from hasten.methods.flowmap import FlowMap
from hasten.methods.meanflow import MeanFlow
from hasten.methods.progressive import Progressive
from hasten.methods.scm import SCM
from hasten.role import FitConfig, Role
from tests.analytic import (
    LAW,
    PATHS,
    SHAPE,
    Affine,
    LawSource,
    Toy,
    make_batch,
    toys,
    watched,
)
from tests.oracle import wide
from tests.proofs import BOOKS, COSTS
from tests.proofs.common import B
from tests.test_methods import _float64  # noqa: F401

every_path = pytest.mark.parametrize("where", PATHS)

# --- backward simulation --------------------------------------------------------------------------------------------


@every_path
def test_backward_simulation_feeds_the_student_its_own_samples(where):
    net = Toy(LAW, *PATHS[where], "jump", Affine(std=0.3))
    watched(net)
    batch = make_batch(5, LAW)
    out = FewStep((4,), "last")(net, batch)
    path, calls = net.path, net.log
    assert [c.grad for c in calls] == [False, False, False, True] and out.requires_grad
    assert [float(c.t[0]) for c in calls] == pytest.approx([float(path.at(u)) for u in even(4)[:4]])
    torch.testing.assert_close(calls[0].x, batch.script[0] * path.coeffs(path.at(1.0))[1])
    for before, after, z in zip(calls, calls[1:], batch.script[1:], strict=False):
        a, s, _, _ = path.coeffs(wide(after.t, z))
        torch.testing.assert_close(after.x, a * net.pairs(before.x, before.t, {})[0] + s * z)
    torch.testing.assert_close(out, net.pairs(calls[-1].x, calls[-1].t, {})[0])


def test_every_exit_is_trained_and_python_decides():
    net = Toy(LAW, RECTIFIED_FLOW, "velocity", "jump")
    random.seed(0)
    lengths = []
    for _ in range(200):
        watched(net)
        FewStep((1, 4))(net, make_batch(1, LAW))
        assert [c.grad for c in net.log].count(True) == 1 and net.log[-1].grad
        lengths.append(len(net.log))
    share = [lengths.count(k) / 200 for k in (1, 2, 3, 4)]
    assert share == pytest.approx([0.625, 0.125, 0.125, 0.125], abs=0.08)
    bad: dict[str, Any]
    for bad in ({"steps": ()}, {"steps": (0,)}, {"exits": "first"}):
        with pytest.raises(ConfigError):
            FewStep(**bad)


# --- turns, stages, sampling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOOKS)
def test_books(name):
    book = BOOKS[name]
    method, teacher = book.method, Toy(LAW, RECTIFIED_FLOW, "velocity")
    nets = method.networks(teacher, clone)
    assert " ".join(sorted(nets)) == book.networks
    assert tuple((" ".join(t.trains), t.every) for t in method.turns) == book.turns
    assert nets["student"] is not teacher and nets.get("teacher", teacher) is teacher
    assert nets.get("fake") is not nets["student"] and all(p.requires_grad for p in nets["student"].parameters())
    assert method.needs_data == book.needs_data
    for steps in (1, 3):
        sampling = method.sampling(steps)
        want = (even(steps), book.rule, book.two_time, 1.0)
        assert (sampling.times, sampling.rule, sampling.two_time, sampling.cfg_scale) == want
    if not book.staged:
        ((stage, length),) = method.stages(17)
        counts = {k: getattr(stage, k) for k in ("warmup", "double_every") if hasattr(method, k)}
        assert stage == replace(method, **counts) and length == 17  # what they become: tests/test_curriculum.py


def test_taps_default_to_the_middle_and_the_last_block():
    net = Toy(LAW, RECTIFIED_FLOW, "velocity")
    assert DMD2().tapped(net) == (1,) and DMD2(taps=(0,)).tapped(net) == (0,)


def test_progressive_halves_and_shares_its_iterations():
    stages = Progressive(16, 2, cfg_scale=3.0).stages(100)
    assert [(m.steps, m.cfg_scale) for m, _ in stages] == [(8, 3.0), (4, None), (2, None)]
    assert sum(n for _, n in stages) == 100 and min(n for _, n in stages) >= 33
    for bad in ({"start": 12, "end": 5}, {"start": 12, "end": 4}, {"start": 4, "end": 4}, {"end": 0}):
        with pytest.raises(ConfigError, match="power of two"):
            Progressive(**bad)


def test_the_average_of_a_stage_teaches_the_next(monkeypatch):
    """Seen in fit: the second stage's teacher and the student's start are the first stage's average."""
    seen: list[Any] = []
    made = Progressive.networks

    def spy(self: Any, teacher: Any, clone: Any) -> Any:
        nets = made(self, teacher, clone)
        seen.append((nets["teacher"], nets["student"].head.weight.detach().clone()))
        return nets

    monkeypatch.setattr(Progressive, "networks", spy)
    config = FitConfig(iterations=6, batch=16, lr=0.05, precision="float32")
    averages = []
    for step in fit(Progressive(4, 1), LawSource(LAW, SHAPE), Toy(LAW, RECTIFIED_FLOW, "velocity"), config):
        averages.append((step.stage, step.student))
    assert [s for s, _ in averages] == [0, 0, 0, 1, 1, 1]
    assert seen[1][0] is averages[2][1]
    assert torch.equal(seen[1][1], averages[2][1].head.weight) and float(seen[1][1].abs().max()) > 0


def test_turns_leave_other_networks_alone_and_averages_follow_the_student(monkeypatch):
    """At every update only the roles of that turn have gradients; the average moves exactly when the student does."""
    stray: list[str] = []
    update = Role.update

    def spy(self: Role) -> Any:
        own = {id(p) for p in self.parameters}
        others = [p for net in watch for p in net.parameters() if id(p) not in own]
        if self.name == "student":
            stray.extend("gradient" for p in others if p.grad is not None)
        return update(self)

    watch: list[Any] = []
    made = DMD2.networks

    def networks(self: Any, teacher: Any, clone: Any) -> Any:
        nets = made(self, teacher, clone)
        watch.extend(nets.values())
        return nets

    monkeypatch.setattr(Role, "update", spy)
    monkeypatch.setattr(DMD2, "networks", networks)
    method = DMD2(gan_weight=0.1, student_every=3)
    config = FitConfig(iterations=7, batch=8, lr=0.01, precision="float32")
    state: list[list[Tensor]] = []
    teacher = Toy(LAW, RECTIFIED_FLOW, "velocity")
    for step in fit(method, LawSource(LAW, SHAPE), teacher, config):
        roles = step.roles
        nets = (roles["student"].net, step.student, roles["fake"].net, roles["disc"].net, teacher)
        state.append([torch.cat([p.detach().flatten() for p in net.parameters()]) for net in nets])
        assert {n: r.count for n, r in roles.items()} == {
            "student": step.index // 3 + (step.index % 3 > 0), "fake": step.index, "disc": step.index,
        }  # fmt: skip
    moved = [[not torch.equal(a, b) for a, b in zip(x, y, strict=True)] for x, y in zip(state, state[1:], strict=False)]
    student = [False, False, True, False, False, True]
    assert moved == [[s, s, True, True, False] for s in student]
    assert not stray and all(p.grad is None for p in teacher.parameters())


# --- what a step costs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COSTS)
def test_a_step_costs_so_many_network_calls(name):
    method, loss, want = COSTS[name]
    nets = toys("rf", "jump")
    if "guided" in name:
        nets = {k: Toy([LAW, LAW], RECTIFIED_FLOW, "velocity") for k in ("student", "teacher", "fake")}
    watched(nets["student"], nets["teacher"], nets["fake"])
    batch = make_batch(B, LAW, torch.zeros(B, dtype=torch.long) if "guided" in name else None)
    getattr(method, loss)(nets, batch, 0)
    got = {k: [(c.n, c.grad) for c in nets[k].log] for k in ("student", "teacher", "fake") if nets[k].log}
    assert got == want


@pytest.mark.parametrize("method", [MeanFlow, SCM, CM, FlowMap])
def test_guidance_without_a_teacher_is_refused(method):
    with pytest.raises(ConfigError, match="guides a teacher"):
        method(from_teacher=False, cfg_scale=2.0)
