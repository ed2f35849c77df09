"""DPO: its equation from closed forms, what a preference does to a Gaussian, and where pairs come from."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path as File
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hasten import data, pairs
from hasten.core.denoiser import Batch, dropped
from hasten.core.errors import ConfigError
from hasten.core.method import Sampling, even
from hasten.core.sample import sample
from hasten.distribute import clone, load_model, read_samplings, save_model
from hasten.fit import fit
from hasten.methods.dpo import DPO
from hasten.pairs import Preferences, scored_pairs
from hasten.role import FitConfig
from hasten.run import matched
from tests.analytic import PATHS, Affine, Toy, watched
from tests.oracle import Gaussian, wide
from tests.proofs.common import ONE, N, World, gradients, world
from tests.test_methods import _float64  # noqa: F401
from tests.training import network

every_path = pytest.mark.parametrize("where", PATHS)


def paired(w: World, seed: int = 3) -> Any:
    """The world's batch with a pair of draws of its law per sample."""
    law = w.nets["teacher"].laws[0]
    both = law.draw((N, 2, 1, 2, 3), torch.Generator().manual_seed(seed)).to(torch.get_default_dtype())
    return replace(w.batch, pairs=both, script=[])


def margin(w: World, batch: Any, beta: float) -> Tensor:
    """beta/2 times how much more the student's error falls on the preferred than on the rejected: [N], by hand."""
    (eps,), t = batch.script, w.path.time(torch.tensor(ONE.draws[0]))
    a, s, da, ds = w.coeffs(t)
    c, d = {"velocity": (da, ds), "eps": (0.0, 1.0), "x0": (1.0, 0.0)}[w.nets["student"].kind]
    gains = []
    for x0 in batch.pairs.unbind(1):
        x_t, errors = a * x0 + s * eps, []
        hat, noise = w.real.posterior(w.path, x_t, t)
        h = w.nets["student"].head(x_t / torch.hypot(a, s), *(wide(angle, x_t) for angle in (w.path.angle(t), t * 0)))
        for x, e in ((hat, noise), (hat + s / torch.hypot(a, s) * h, noise - a / torch.hypot(a, s) * h)):
            errors.append(((c * (x - x0) + d * (e - eps)) ** 2).mean((1, 2, 3)))
        gains.append(errors[0] - errors[1])
    return 0.5 * beta * (gains[0] - gains[1])


@every_path
@pytest.mark.parametrize(("law", "labelled"), [("gaussian", False), ("mixture", False), ("gaussian", True)])
def test_dpo_gradient_is_that_of_the_equation(law, labelled, where):
    ONE.count.clear()
    w = world(where, "posterior", law, 0.3, 1.0 if labelled else None)
    batch, method = paired(w), DPO(3.0, ONE, drop=0.0)
    got, log = method.loss(w.nets, batch, 0)
    z = margin(w, batch, 3.0)
    want = torch.log1p(torch.exp(-z)).mean()
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    mine, theirs = gradients(got, w.nets["student"]), gradients(want, w.nets["student"])
    torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-6)
    assert float(theirs.abs().max()) > 1e-3
    assert float(log["agrees"]) == pytest.approx(float((z > 0).double().mean()))


@every_path
def test_dpo_of_the_teacher_itself_is_log_two_and_pulls_apart(where):
    """At student = teacher the margin is 0: the loss is log 2, and its gradient is -margin'/2."""
    ONE.count.clear()
    w = world(where, "posterior", "gaussian", 0.0, None)
    batch = paired(w)
    loss, log = DPO(5.0, ONE, drop=0.0).loss(w.nets, batch, 0)
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-6) and float(log["agrees"]) == 0
    want = gradients(-0.5 * margin(w, batch, 5.0).mean(), w.nets["student"])
    torch.testing.assert_close(gradients(loss, w.nets["student"]), want, rtol=2e-5, atol=1e-6)


@every_path
def test_dpo_sees_only_beta_times_the_shift(where):
    """The paper's beta is the tie to the reference: a shift of half the size counts the same under twice the beta,
    because both of a pair share time and noise, so that whatever is quadratic in the shift cancels."""
    losses = []
    for k in (1.0, 2.0):
        ONE.count.clear()
        w = world(where, "posterior", "gaussian", 0.3, None)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            head = w.nets["student"].head.weight
            head.copy_(torch.randn(head.shape, generator=generator, dtype=head.dtype) / k)
            head[1] = 0  # a shift, the same at every x_t
        torch.manual_seed(5)
        losses.append(float(DPO(4.0 * k, ONE, drop=0.0).loss(w.nets, paired(w), 0)[0].detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and abs(losses[0] - math.log(2)) > 1e-3


@every_path
def test_dpo_costs_two_forwards_of_both_with_one_noise_and_one_time(where):
    w = world(where, "posterior", "gaussian", 0.3, None)
    watched(w.nets["student"], w.nets["teacher"])
    batch = paired(w)
    DPO(drop=0.0).loss(w.nets, batch, 0)
    (mine,), (theirs,) = w.nets["student"].log, w.nets["teacher"].log
    assert (mine.n, mine.grad, theirs.n, theirs.grad) == (2 * N, True, 2 * N, False)
    assert torch.equal(mine.x, theirs.x) and torch.equal(mine.t[:N], mine.t[N:]) and torch.equal(mine.t, theirs.t)
    a, s, _, _ = w.coeffs(mine.t[:N])
    torch.testing.assert_close(mine.x[:N] - mine.x[N:], a * (batch.pairs[:, 0] - batch.pairs[:, 1]))
    torch.testing.assert_close(mine.x[:N], a * batch.pairs[:, 0] + s * batch.script[0])


@every_path
def test_dpo_of_a_distilled_model_looks_at_its_own_times_only(where):
    path = PATHS[where][0]
    drawn = DPO(steps=4).draw(path, 400, torch.device("cpu"))
    want = path.at(torch.tensor(even(4)[:4]))
    assert sorted(set(drawn.tolist())) == pytest.approx(sorted(want.tolist()))
    assert (DPO(rule="renoise").sampling(4).rule, DPO().sampling(4)) == ("renoise", Sampling(even(4)))
    assert len(set(DPO().draw(path, 400, torch.device("cpu")).tolist())) > 300


@dataclass
class Judged:
    """Pairs of Gaussian samples, the one with the larger sum of the first two dimensions preferred; some misjudged."""

    sign: float = 1.0
    wrong: float = 0.25
    shape: tuple[int, ...] = (1, 1, 4)
    name: ClassVar[str] = "judged"

    def batch(self, n: int, generator: torch.Generator, device: Any = "cpu") -> Batch:
        both = LAW.draw((n, 2, *self.shape), generator).to(torch.get_default_dtype())
        score = self.sign * both[..., :2].sum((2, 3, 4))
        first = (score[:, 0] > score[:, 1]) ^ (torch.rand(n, generator=generator) < self.wrong)
        pair = torch.where(first.view(-1, 1, 1, 1, 1), both, both.flip(1))
        return Batch({}, {}, (n, *self.shape), x0=pair[:, 0], pairs=pair)


LAW = Gaussian(0.2, 0.5)


class PerDimension(Affine):
    """A shift of every dimension, the same at all times."""

    def __init__(self):
        super().__init__(0)
        self.weight = torch.nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor, phi: Tensor, psi: Tensor) -> Tensor:
        return torch.sin(phi) * torch.cos(phi) * self.weight


def moved(method: DPO, source: Judged, where: str) -> Tensor:
    """How far training moves the mean of every dimension of the samples: [4]."""
    torch.manual_seed(0)
    teacher = Toy(LAW, *PATHS[where], head=PerDimension())
    config = FitConfig(200, 64, lr=0.1, schedule="cosine", ema=(0.9,), clip=1e3, precision="float32")
    *_, last = fit(method, source, teacher, config)
    noise = torch.randn(64, 1, 1, 4, generator=torch.Generator().manual_seed(1))
    before, after = (sample(net, noise, {}, Sampling(even(16))) for net in (teacher, last.student))
    return (after - before).mean((0, 1, 2))


@every_path
def test_dpo_moves_the_mean_towards_what_is_preferred_and_less_so_with_a_larger_beta(where):
    near = moved(DPO(16.0), Judged(), where)
    far = moved(DPO(8.0), Judged(), where)
    away = moved(DPO(16.0), Judged(sign=-1.0), where)
    assert float(near[:2].min()) > 0.03 and float(away[:2].max()) < -0.03
    assert float(near[2:].abs().max()) < 0.4 * float(near[:2].mean())  # what is not judged stays
    assert float(far[:2].mean() / near[:2].mean()) == pytest.approx(2, rel=0.25)  # the shift is proportional to 1/beta


def test_dropped_conditions_are_a_share_and_the_null():
    label = torch.zeros(4000, dtype=torch.long)
    batch = Batch({"label": label}, {"label": label + 9}, (4000, 1, 2, 2))
    got = dropped(batch, 0.3)["label"]
    assert set(got.tolist()) == {0, 9} and float((got == 9).double().mean()) == pytest.approx(0.3, abs=0.03)
    assert dropped(batch, 0.0) is batch.cond and dropped(Batch({}, {}, (3, 1, 2, 2)), 0.3) == {}


def test_dpo_drops_a_condition_for_both_of_a_pair_and_for_the_teacher():
    w = world("rf", "posterior", "gaussian", 0.3, 1.0)
    batch, seen = paired(w), []
    for net in (w.nets["student"], w.nets["teacher"]):
        net.register_forward_pre_hook(lambda _, args: seen.append(args[2]["label"]))
    DPO(drop=0.5).loss(w.nets, batch, 0)
    assert len(seen) == 2 and torch.equal(seen[0], seen[1]) and torch.equal(seen[0][:N], seen[0][N:])
    assert set(seen[0].tolist()) == {0, 1}


def test_dpo_refuses_what_cannot_work():
    bad: dict[str, Any]
    for bad in ({"beta": 0.0}, {"steps": -1}, {"drop": 1.0}):
        with pytest.raises(ConfigError, match="DPO needs beta"):
            DPO(**bad)
    with pytest.raises(ConfigError, match="did you mean 'renoise'"):
        DPO(rule="renois")
    with pytest.raises(ConfigError, match="two-time"):
        DPO().networks(clone(network(), second_time=True), clone)
    w = world("rf", "posterior", "gaussian", 0.3, None)
    for pair in (None, torch.zeros(N, 3, 1, 2, 3)):
        with pytest.raises(ConfigError, match=r"\(preferred, rejected\) pairs"):
            DPO().loss(w.nets, replace(w.batch, pairs=pair), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dpo_runs_in_both_precisions_and_under_autocast(dtype):
    torch.set_default_dtype(dtype)
    net = network().to(dtype)
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(6, 2, 1, 8, 8, generator=generator, dtype=dtype)
    label = torch.arange(6)
    batch = Batch({"label": label}, {"label": label * 0 + 10}, (6, 1, 8, 8), pairs=both)
    method = DPO(20.0)
    nets = method.networks(net, clone)
    plain = []
    for low in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss, _ = method.loss(nets, batch, 0)
        loss.backward()
        plain.append(float(loss.detach()))
    assert plain == pytest.approx([math.log(2)] * 2, abs=2e-3)
    assert all(bool(torch.isfinite(p.grad).all()) for p in nets["student"].parameters() if p.grad is not None)


# --- where pairs come from ----------------------------------------------------------------------------------------


@pytest.fixture
def plain():
    torch.set_default_dtype(torch.float32)


def light(x: Tensor, labels: Tensor | None) -> Tensor:
    """The mean of a picture: darker is better for odd labels."""
    sign = 1.0 if labels is None else 1 - 2.0 * (labels % 2)
    return sign * x.mean((1, 2, 3))


def test_scored_pairs_are_ordered_by_the_score_of_their_condition(plain):
    net, sampling = network().eval(), Sampling(even(2), cfg_scale=1.5)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    made = scored_pairs(net, sampling, light, 40, seed=4, batch=16)
    assert torch.equal(state, torch.get_rng_state())
    assert len(made) == 40 and made.classes == 10 and made.labels is not None and len(set(made.labels.tolist())) > 5
    assert bool((light(made.preferred, made.labels) > light(made.rejected, made.labels)).all())
    again = scored_pairs(net, sampling, light, 40, seed=4, batch=16)
    other = scored_pairs(net, sampling, light, 40, seed=5, batch=16)
    assert torch.equal(made.preferred, again.preferred) and not torch.equal(made.preferred, other.preferred)
    assert float(made.preferred.abs().max()) <= 1 and not torch.equal(made.preferred[0], made.preferred[1])


def test_scored_pairs_are_the_models_samples_under_their_labels(plain):
    """Each of a pair is what ``sample`` makes of its noise, its label and the guidance that was asked for."""
    net: Any = network().eval()
    calls = []

    def spy(x: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        calls.append((x, labels))
        return torch.arange(len(x)).float()

    made = scored_pairs(net, Sampling(even(3), cfg_scale=2.0), spy, 6, seed=2)
    (x, labels), generator = calls[0], torch.Generator().manual_seed(2)
    drawn = torch.randint(10, (6,), generator=generator)
    noise = torch.randn((12, 1, 8, 8), generator=generator)
    assert torch.equal(labels, torch.cat([drawn, drawn])) and made.labels is not None
    assert torch.equal(made.labels, drawn)
    cond = {"label": labels}
    want = sample(net, noise, cond, Sampling(even(3), cfg_scale=2.0), uncond=net.null(cond)).clamp(-1, 1)
    torch.testing.assert_close(x, want)
    assert torch.equal(made.preferred, x[6:]) and torch.equal(made.rejected, x[:6])


def test_ties_are_left_out_and_bad_scores_are_refused(plain):
    net, sampling = network().eval(), Sampling(even(1))
    some = scored_pairs(net, sampling, lambda x, _: (x.mean((1, 2, 3)) > 0).float(), 40)
    assert 0 < len(some) < 40 and float(some.preferred.mean((1, 2, 3)).min()) > 0
    for score, message in (
        (lambda x, _: torch.zeros(len(x)), "equal for both"),
        (lambda x, _: x.mean(), "one finite number per image"),
        (lambda x, _: x.mean((1, 2, 3)) / 0, "one finite number per image"),
    ):
        with pytest.raises(ConfigError, match=message):
            scored_pairs(net, sampling, score, 4)
    with pytest.raises(ConfigError, match="positive counts"):
        scored_pairs(net, sampling, light, 0)


def some(labels: bool = True) -> Preferences:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 9, 1, 8, 8, generator=generator) * 2 - 1
    return Preferences(x[0], x[1], torch.arange(9) if labels else None)


@pytest.mark.parametrize("labels", [True, False])
def test_preferences_are_written_and_read_back(labels, plain, tmp_path: File):
    made = some(labels)
    made.save(tmp_path / "p.safetensors")
    numbers: dict[str, Any] = {} if made.labels is None else {"labels": made.labels.numpy()}
    levels = [((x + 1) * 127.5).round().byte().numpy() for x in (made.preferred, made.rejected)]
    np.savez(tmp_path / "p.npz", preferred=levels[0], rejected=levels[1], **numbers)
    for name, close in (("p.safetensors", 0.0), ("p.npz", 0.005)):
        back = pairs.load(str(tmp_path / name))
        assert isinstance(back, Preferences) and (back.classes, back.shape) == (9 if labels else 0, (1, 8, 8))
        assert (back.preferred - made.preferred).abs().max() <= close
        assert (back.rejected - made.rejected).abs().max() <= close
        batch = back.batch(5, torch.Generator().manual_seed(1))
        assert batch.pairs is not None and batch.pairs.shape == (5, 2, 1, 8, 8)
        assert torch.equal(batch.data, batch.pairs[:, 0]) and set(batch.cond) == ({"label"} if labels else set())
        for x, y in zip(*batch.pairs.unbind(1), strict=True):
            row = int((back.preferred - x).abs().flatten(1).sum(1).argmin())
            assert torch.equal(back.rejected[row], y)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.npz", "p.safetensors"]


def test_other_data_are_read_as_before_and_bad_files_are_told(plain, tmp_path: File):
    assert isinstance(pairs.load("digits"), data.Images)
    np.savez(tmp_path / "images.npz", images=np.zeros((3, 8, 8), np.uint8))
    assert isinstance(pairs.load(str(tmp_path / "images.npz")), data.Images)
    x = torch.zeros(2, 1, 8, 8)
    save_file({"preferred": x}, tmp_path / "half.safetensors")
    save_file({"preferred": x, "rejected": x[:1].clone()}, tmp_path / "uneven.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"oops")
    (tmp_path / "torn.npz").write_bytes(b"oops")
    for name, message in (
        ("half.safetensors", "holds no 'rejected'"),
        ("uneven.safetensors", "but rejected is"),
        ("torn.safetensors", "Cannot read torn.safetensors"),
        ("torn.npz", "Cannot read torn.npz"),
        ("gone.safetensors", "no such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            pairs.load(str(tmp_path / name))
    with pytest.raises(ConfigError, match="one of each"):
        Preferences(x, x[:1])
    with pytest.raises(ConfigError, match="range from"):
        Preferences(x, x + 2)
    with pytest.raises(ConfigError, match="not as 'p.npz'"):
        some().save(tmp_path / "p.npz")
    assert not (tmp_path / "p.npz").exists()


def test_preferences_fit_a_model_as_images_do(plain):
    net: Any = SimpleNamespace(config=SimpleNamespace(channels=1, size=(8, 8), classes=10))
    assert matched(some(), net).classes == 10
    with pytest.raises(ConfigError, match="has no labels"):
        matched(some(False), net)


def test_dpo_and_plain_methods_train_on_a_file_of_preferences(plain, tmp_path: File):
    from tests.commandline import run

    save_model(network(), tmp_path / "teacher", {4: Sampling(even(4))})
    some().save(tmp_path / "p.safetensors")
    args = ("--teacher", str(tmp_path / "teacher"), "--data", str(tmp_path / "p.safetensors"), "--batch", "4")
    args = (*args, "--iterations", "2", "--no-tensorboard", "--steps", "4")
    run("distill", "--method", "dpo", *args, "--set", "method.rule=renoise", "--out", str(tmp_path / "a"))
    assert read_samplings(tmp_path / "a" / "model")[4].rule == "renoise"
    before, after = (load_model(tmp_path / f).state_dict() for f in ("teacher", "a/model"))
    assert any(not torch.equal(before[k], after[k]) for k in before)
    run("train", "--method", "flow", *args, "--out", str(tmp_path / "b"))  # on what is preferred alone
    result = run(*("distill", "--method", "dpo", *args[:2], "--data", "digits", *args[4:]), "--out",
                 str(tmp_path / "c"), code=2)  # fmt: skip
    assert "(preferred, rejected) pairs" in result.stderr
