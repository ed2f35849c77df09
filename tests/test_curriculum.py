"""Curricula end within the run by default, short or long; counts stay possible, and what cannot end is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten import recipe
from hasten.core.curriculum import doubled, warmup_of
from hasten.core.errors import ConfigError
from hasten.core.generate import FewStep
from hasten.core.path import RECTIFIED_FLOW
from hasten.fit import fit
from hasten.methods.ayf import AYF
from hasten.methods.cm import CM
from hasten.methods.rcm import RCM
from hasten.methods.scm import SCM
from hasten.methods.sprint import Sprint
from hasten.methods.tcm import TCM
from hasten.names import METHODS, method_class, variations
from hasten.role import FitConfig
from tests.analytic import LAW, SHAPE, LawSource, Toy

ROOT = Path(__file__).parent.parent
WARM: list[Any] = [SCM, AYF, RCM, Sprint]


@pytest.mark.parametrize("iterations", [40, 200, 2000, 100_000])
@pytest.mark.parametrize("name", METHODS)
def test_every_curriculum_ends_within_the_run(name, iterations):
    stage: Any
    stage, length = method_class(name)(**variations(name)).stages(iterations)[0]
    if hasattr(stage, "warmup"):
        assert stage.warmup == iterations // 5
    if hasattr(stage, "double_every"):
        assert doubled(length - 1, stage.double_every, stage.doublings) == stage.doublings
        assert length - stage.double_every * stage.doublings >= stage.double_every  # the last has its share, too


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("digits-*.yaml")), ids=lambda f: f.stem)
def test_every_recipe_ends_its_curriculum(file):
    made = recipe.load(file)
    stage: Any
    for stage, length in made.method.stages(made.fit.iterations):
        assert getattr(stage, "warmup", 0) < length / 2
        if getattr(stage, "stage", 1) == 1 and hasattr(stage, "double_every"):
            assert doubled(length - 1, stage.double_every, stage.doublings) == stage.doublings


@pytest.mark.parametrize(("share", "iterations", "want"), [(0.9, 4, 3), (0.6, 1, 0), (0.95, 9, 8), (0, 0, 0)])
def test_a_share_always_leaves_something_of_the_run(share, iterations, want):
    assert warmup_of("it", share, iterations) == want


@pytest.mark.parametrize("cls", WARM)
def test_a_count_of_iterations_stays_what_it_is(cls):
    stage: Any
    ((stage, _),) = cls(warmup=30).stages(2000)
    assert stage.warmup == 30 and stage.stages(2000)[0][0] == stage
    assert [cls(warmup=w).stages(10)[0][0].warmup for w in (0, 0.04, 0.5, 1, 9)] == [0, 0, 5, 1, 9]
    assert CM(double_every=250).stages(2000)[0][0].double_every == 250


@pytest.mark.parametrize("cls", WARM)
@pytest.mark.parametrize("warmup", [-0.1, -1, 1.5, float("nan"), float("inf")])
def test_a_warmup_that_is_neither_is_refused(cls, warmup):
    with pytest.raises(ConfigError, match=f"{cls.__name__}: warmup is a share of the run below 1, such as 0.2"):
        cls(warmup=warmup)


@pytest.mark.parametrize("cls", WARM)
def test_a_warmup_that_outlasts_the_run_is_refused(cls):
    with pytest.raises(ConfigError, match=f"{cls.__name__}: a warmup of 1000 iterations outlasts the 1000 of this run"):
        cls(warmup=1000).stages(1000)
    with pytest.raises(ConfigError, match="outlasts"):
        list(fit(cls(warmup=6), LawSource(LAW, SHAPE), Toy(LAW, RECTIFIED_FLOW, "velocity"), FitConfig(iterations=4)))


def test_doublings_that_never_come_are_refused():
    with pytest.raises(ConfigError, match="CM: with double_every 1000 nothing doubles within 1000 iterations"):
        CM(double_every=1000).stages(1000)
    assert CM(double_every=1000).stages(1001)[0][0].double_every == 1000
    with pytest.raises(ConfigError, match="TCM: with double_every 500 nothing doubles within 500 iterations"):
        TCM(double_every=500).stages(1000)  # its first stage is half of the run
    assert CM(double_every=1000, doublings=0).stages(10)[0][0].double_every == 1000  # there is none to come


@pytest.mark.parametrize("field", ["double_every", "doublings"])
@pytest.mark.parametrize("cls", [CM, TCM])
def test_negative_counts_of_doublings_are_refused(cls, field):
    with pytest.raises(ConfigError, match=f"{cls.__name__}: double_every and doublings must be at least 0"):
        cls(**{field: -1})


def test_a_recipe_takes_shares_and_counts():
    for warmup in (0.4, 300, 0):
        raw = {"data": "digits", "teacher": "there", "method": {"name": "scm", "warmup": warmup}}
        assert recipe.parse(raw).method.warmup == warmup  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="warmup is a share"):
        recipe.parse({**raw, "method": {"name": "scm", "warmup": 1.5}})


def test_a_run_that_goes_on_keeps_its_curriculum(tmp_path):
    """DMD begins after rCM's warm-up, half of ten iterations: at the same one, and with the same losses."""
    method = RCM(generate=FewStep((1,)), warmup=0.5, student_every=1)
    config = FitConfig(iterations=10, batch=8, precision="float32", save_every=1)

    def run(out: Path, stop: int = 10) -> list[dict[str, float]]:
        torch.manual_seed(0)  # of the teacher
        teacher, logs = Toy(LAW, RECTIFIED_FLOW, "velocity"), []
        for step in fit(method, LawSource(LAW, SHAPE), teacher, config, out=out):
            logs.append(step.log)
            if step.index == stop:
                break
        return logs

    whole = run(tmp_path / "whole")
    assert ["dmd" in log for log in whole] == 5 * [False] + 5 * [True]
    for stop in (3, 7):
        out = tmp_path / str(stop)
        assert run(out, stop) + run(out) == whole


def test_a_loss_without_a_run_stays_at_its_first_gap():
    """A method that nobody told its run's length does not divide by it."""
    nets = {"student": Toy(LAW, RECTIFIED_FLOW, "velocity")}
    batch = LawSource(LAW, SHAPE).batch(8, torch.Generator().manual_seed(0), "cpu")
    for method in (CM(), TCM()):
        losses = []
        for step, asked in ((5000, method), (5000, replace(method, double_every=10**6)), (0, method)):
            torch.manual_seed(0)
            losses.append(float(asked.loss(nets, batch, step)[0].detach()))
        assert losses[0] == losses[1] == losses[2]
