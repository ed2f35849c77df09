"""DMD's family: f-divergences, the pairs of DMD, the times of decoupled DMD, and score matching within intervals."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.core.denoiser import predict
from hasten.core.divergences import DIVERGENCES, density_weight
from hasten.core.errors import ConfigError
from hasten.core.intervals import interval_denoising, reach
from hasten.core.path import RECTIFIED_FLOW
from hasten.core.times import Uniform
from hasten.data import digits
from hasten.distribute import clone
from hasten.fit import fit
from hasten.methods.decoupled import Decoupled
from hasten.methods.dmd2 import DMD2
from hasten.methods.phased import Phased
from hasten.methods.tdm import TDM
from hasten.models.dit import DiT, DiTConfig
from hasten.role import FitConfig
from tests.analytic import (
    LAW,
    PATHS,
    SHAPE,
    Affine,
    Angles,
    Scripted,
    Toy,
    make_batch,
    toys,
    watched,
    without_data,
)
from tests.oracle import Gaussian, Mixture, wide
from tests.proofs.common import ONE, gradients
from tests.test_methods import _float64  # noqa: F401

every_path = pytest.mark.parametrize("where", PATHS)

# --- f-distill ------------------------------------------------------------------------------------------------------

# f of D_f(real || fake) = E_fake f(r), r = p_real / p_fake.
F: dict[str, Any] = {
    "reverse_kl": lambda r: -r.log(),
    "forward_kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "squared_hellinger": lambda r: 1 - r.sqrt(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "softened_reverse_kl": lambda r: (r + 1) * ((r + 1) / r).log(),
    "neyman": lambda r: (1 - r) ** 2 / r,
    "pearson": lambda r: (r - 1) ** 2,
}


@pytest.mark.parametrize("name", F)
def test_the_weight_is_the_second_derivative_of_the_divergence(name):
    r = torch.linspace(0.1, 20, 50).requires_grad_()
    first = torch.autograd.grad(F[name](r).sum(), r, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), r)[0]
    torch.testing.assert_close(DIVERGENCES[name](r.detach()), (r**2 * second).detach(), rtol=1e-9, atol=1e-9)
    assert set(F) == set(DIVERGENCES)


@pytest.mark.parametrize("name", F)
def test_weighted_score_differences_are_the_divergence_s_gradient(name):
    """f-distill's theorem: E_fake h(r) (score of fake - score of real) dx/dm = d D_f(real || fake)/dm, integrated."""
    x = torch.linspace(-12, 12, 24001)
    step, real = x[1] - x[0], torch.distributions.Normal(0.4, 1.1)

    def divergence(m: Tensor) -> Tensor:
        q = torch.distributions.Normal(m, 1.0).log_prob(x)
        keep = q > -45  # where r is not infinite
        return (q[keep].exp() * F[name]((real.log_prob(x) - q)[keep].exp())).sum() * step

    m = torch.tensor(0.1, requires_grad=True)
    want = torch.autograd.grad(divergence(m), m)[0]
    q = torch.distributions.Normal(0.1, 1.0).log_prob(x)
    h = DIVERGENCES[name]((real.log_prob(x) - q).exp())
    inside = x.abs() < 9
    got = (q.exp() * h * (-(x - 0.1) + (x - 0.4) / 1.21))[inside].sum() * step
    assert float(got) == pytest.approx(float(want), rel=2e-3)


def test_ratios_are_clipped_and_centred_in_their_interval_of_time():
    logits = torch.tensor([50.0, -50.0, 0.0, 1.0, 1.0])
    place = torch.tensor([0.05, 0.09, 0.5, 0.99, 1.0])  # the first two, the third, and the last two belong together
    r = torch.tensor([20 / 10.05, 0.1 / 10.05, 1.0, 1.0, 1.0])
    for name in ("forward_kl", "js"):
        h = r if name == "forward_kl" else r / (1 + r)
        torch.testing.assert_close(density_weight(name, logits, place, 10), h / h.mean())
    assert not density_weight("js", logits.requires_grad_(), place, 10).requires_grad
    low = density_weight("js", logits.detach().to(torch.bfloat16), place.float(), 10)
    assert low.dtype == torch.float32 and float(low.mean()) == pytest.approx(1, rel=1e-5)


def test_forward_divergences_listen_to_samples_that_data_explain():
    """Against reverse KL, the paper's less mode-seeking divergences weigh up samples where data are dense."""
    logits, place = torch.tensor([-1.0, 1.0]), torch.tensor([0.5, 0.5])
    spread = {k: density_weight(k, logits, place, 1) for k in DIVERGENCES}
    assert all(w[1] > w[0] for k, w in spread.items() if k in ("forward_kl", "js", "squared_hellinger", "jeffreys"))
    assert all(w[1] < w[0] for k, w in spread.items() if k in ("neyman", "softened_reverse_kl"))
    torch.testing.assert_close(spread["reverse_kl"], torch.ones(2))


def test_f_distill_needs_the_discriminator_and_data():
    with pytest.raises(ConfigError, match="reads the discriminator"):
        DMD2(divergence="js", gan_weight=0)
    with pytest.raises(ConfigError, match="did you mean 'js'"):
        DMD2(divergence="jss")
    with pytest.raises(ConfigError, match="Unknown weight"):
        DMD2(weight="klx")
    assert DMD2(divergence="js").needs_data and not DMD2().needs_data
    with pytest.raises(ConfigError, match="needs data"):
        DMD2(divergence="js").student(toys("rf", "jump"), without_data(make_batch(4, LAW)), 0)


def test_a_short_real_run_weighs_its_samples_differently():
    """As soon as the discriminator knows something; the log tells how far the weights are from 1."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    teacher, logs = DiT(DiTConfig(size=(8, 8), channels=1, classes=10, width=32, depth=2, heads=2)), {}
    config = FitConfig(iterations=26, batch=32, lr=1e-2, precision="float32")
    for name in ("js", "reverse_kl"):
        steps = list(fit(DMD2(divergence=name), digits(), teacher, config))
        logs[name] = [step.log["spread"] for step in steps if "spread" in step.log]
    assert len(logs["js"]) == 6 and logs["js"][-1] > 0.1 and not logs["reverse_kl"]


# --- DMD's pairs, Diff-Instruct's gradient --------------------------------------------------------------------------


def test_dmd_regresses_on_the_pairs_of_the_batch():
    nets, batch = toys("rf", "jump"), without_data(make_batch(5, LAW))
    ends = torch.randn(5, 3, *SHAPE)
    watched(nets["teacher"])
    plain, paired = DMD2(times=ONE, gan_weight=0), DMD2(times=ONE, gan_weight=0, regression=0.25)
    losses = []
    for method in (plain, paired):
        ONE.count.clear()
        torch.manual_seed(0)
        losses.append(method.student(nets, replace(batch, pairs=ends) if method.regression else batch, 0)[0])
    z, x0 = ends[:, 0], ends[:, -1]
    want = 0.25 * ((nets["student"].pairs(z, torch.ones(5), {})[0] - x0) ** 2).mean()
    torch.testing.assert_close(losses[1] - losses[0], want, rtol=1e-4, atol=1e-6)
    assert len(nets["teacher"].log) == 2  # none of them for the pairs
    with pytest.raises(ConfigError, match="set regression"):
        plain.student(nets, replace(batch, pairs=ends), 0)


@every_path
def test_the_integral_kl_gradient_is_that_of_gaussians(where):
    """d_m KL(fake_t || real_t) = a^2 (m - mu) / V_r: Diff-Instruct's gradient is exact, with the exact fake."""
    nets = toys(where, "posterior", truth=LAW)
    path, mine = nets["student"].path, Gaussian(LAW.mean + 0.3, LAW.std, learn=True)

    class Student(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.law, self.path, self.kind = mine, path, "x0"

        def forward(self, x, t, cond, *, r=None):
            return mine.flow_map(path, x, t, 0.0)

    nets |= {"student": Student(), "fake": Toy(Gaussian(LAW.mean + 0.3, LAW.std), *PATHS[where])}
    torch.manual_seed(0)
    method = DMD2(times=Angles(((0.7,),)), gan_weight=0, weight="kl")
    loss, _ = method.student(nets, without_data(make_batch(4000, LAW)), 0)
    got = torch.autograd.grad(loss, mine.mean)[0] * LAW.mean.numel()
    a, s, _, _ = path.coeffs(path.time(torch.tensor(0.7)))
    want = a**2 * 0.3 / (a**2 * LAW.std**2 + s**2)
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.0)


# --- decoupled DMD --------------------------------------------------------------------------------------------------


def world_of_two(n: int = 6) -> tuple[dict[str, Any], Any]:
    """Networks with labels 0 and 1 (unconditional), and a batch of label 0."""
    laws = [LAW, Gaussian(-LAW.mean, LAW.std)]
    nets = {k: Toy(laws, RECTIFIED_FLOW, "velocity", "jump" if k == "student" else "posterior")
            for k in ("student", "teacher", "fake")}  # fmt: skip
    return nets, without_data(make_batch(n, LAW, torch.zeros(n, dtype=torch.long)))


def test_augmentation_stays_below_the_exit_and_matching_does_not():
    """Decoupled-Hybrid: tau_CA is noise that is still there at the exit hop, tau_DM all of it."""
    nets, batch = world_of_two(400)
    method = Decoupled(cfg_scale=3.0)
    seen: dict[float, Tensor] = {}
    for exits, steps in (("last", 4), ("any", 1)):
        method = replace(method, generate=replace(method.generate, steps=(steps,), exits=exits))
        watched(nets["student"], nets["teacher"])
        method.student(nets, batch, 0)
        exit_at = float(nets["student"].log[-1].t[0])
        t, t_ca, again = nets["teacher"].log[0].t.chunk(3)
        assert torch.equal(t_ca, again) and float(t.max()) > 0.9 and float(t.min()) < 0.1
        seen[exit_at] = t_ca
    assert sorted(seen) == [0.25, 1.0]
    assert 0.2 < float(seen[0.25].max()) <= 0.25 and float(seen[1.0].max()) > 0.9


class Echo(Scripted):
    """The student's noise, then one noise for ever: DM and CA meet at one x_t."""

    def noise(self) -> Tensor:
        self.script.append(torch.randn(self.shape) if len(self.script) < 2 else self.script[1])
        return self.script[-1]


def test_matching_and_augmentation_are_the_guided_gradient_where_they_meet():
    """Eq. 6: at one x_t, DM + CA is fake minus the guided teacher, over mean|x - conditional|."""
    nets, plain = world_of_two()
    wrong = Gaussian(LAW.mean + 0.1, 1.2 * LAW.std)
    nets["fake"] = Toy(wrong, RECTIFIED_FLOW, "velocity")
    batch = Echo(plain.cond, plain.uncond, plain.shape)
    at = Angles(((0.2, 0.5, 0.7, 0.9, 1.1, 1.3),))
    loss, _ = Decoupled(times=at, augment_times=at, cfg_scale=3.5).student(nets, batch, 0)
    x = nets["student"].pairs(batch.script[0], torch.ones(6), batch.cond)[0]
    t = RECTIFIED_FLOW.time(torch.tensor(at.draws[0]))
    x_t = RECTIFIED_FLOW.mix(x, batch.script[1], t)
    cond, uncond = (law.posterior(RECTIFIED_FLOW, x_t, t)[0] for law in nets["teacher"].laws)
    fake = wrong.posterior(RECTIFIED_FLOW, x_t, t)[0]
    gradient = (fake - (uncond + 3.5 * (cond - uncond))) / (x - cond).abs().mean((1, 2, 3), keepdim=True)
    want = (x * gradient.detach()).mean()
    torch.testing.assert_close(gradients(loss, nets["student"]), gradients(want, nets["student"]))


def test_augmentation_needs_conditions():
    nets = toys("rf", "jump")
    with pytest.raises(ConfigError, match="give labels"):
        Decoupled(cfg_scale=2.0).student(nets, without_data(make_batch(4, LAW)), 0)


@every_path
def test_decoupled_is_still_where_the_student_is_the_teacher(where):
    nets = toys(where, "jump")
    loss, _ = Decoupled(times=ONE).student(nets, without_data(make_batch(7, LAW)), 0)
    assert float(gradients(loss, nets["student"]).abs().max()) < 2e-6


# --- score matching within intervals, phases and segments -----------------------------------------------------------


@every_path
@pytest.mark.parametrize("law", [LAW, Mixture()], ids=["gaussian", "mixture"])
def test_score_matching_within_an_interval_has_its_minimum_at_the_truth(law: Any, where):
    """Phased DMD's eq. 11: regression from x_s alone ends at E[x0 | x_t], whatever s is; the naive target does not."""
    path, kind = PATHS[where]
    s, t = path.at(torch.full((40000,), 0.4)), path.at(torch.full((40000,), 0.55))
    torch.manual_seed(0)
    x0, e, z = (law.draw((40000, *SHAPE)), torch.randn(40000, *SHAPE), torch.randn(40000, *SHAPE))
    x_s = path.mix(x0, e, s)
    head = Affine()
    net = Toy(law, path, kind, "posterior", head)
    for wrong, ratio in ((0.0, 4.0), (0.2, 0.0)):
        with torch.no_grad():
            head.weight[0, 0] = wrong
        each = torch.stack([
            gradients(interval_denoising(net, x_s[i::40], s[i::40], t[i::40], z[i::40], {}), net) for i in range(40)
        ])  # fmt: skip
        score = (each.mean(0) / (each.std(0) / 40**0.5 + 1e-9)).abs().max()
        assert float(score) < ratio if ratio else float(score) > 10


@every_path
def test_the_interval_loss_is_the_paper_s_on_rectified_flow(where):
    """Eq. 13 by hand: min(1/b^2, 10) |b v - ((a_s^2 s_t + a_t s_s^2)/a_s^2 eps - b/a_s x_s)|^2 with a = 1 - t."""
    path, kind = PATHS[where]
    n = 5
    u_s = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.8])
    s, t = path.at(u_s), path.at(u_s + 0.15)
    x_s, z = torch.randn(n, *SHAPE) * 2, torch.randn(n, *SHAPE)
    net = Toy(LAW, path, kind, "posterior", Affine(std=0.3))
    total = torch.zeros(())
    for i in range(n):  # every sample on rectified flow, at the angles of its own times
        (a_s, s_s, _, _), (a_t, s_t, _, _) = path.coeffs(s[i]), path.coeffs(t[i])
        xs, rs, rt = x_s[i] / (a_s + s_s), s_s / (a_s + s_s), s_t / (a_t + s_t)
        b = torch.sqrt(rt**2 - ((1 - rt) / (1 - rs) * rs) ** 2)
        x = (1 - rt) / (1 - rs) * xs + b * z[i]
        x0, eps = net.pairs((x * (a_t + s_t))[None], t[i : i + 1], {})
        goal = ((1 - rs) ** 2 * rt + (1 - rt) * rs**2) / (1 - rs) ** 2 * z[i] - b / (1 - rs) * xs
        one = torch.minimum(1 / b**2, torch.tensor(10.0)) * ((b * (eps - x0)[0] - goal) ** 2).mean()
        total = total + one * (1 - rs) ** 2 / ((1 - rs) ** 2 + rs**2) / n
    torch.testing.assert_close(interval_denoising(net, x_s, s, t, z, {}), total, rtol=1e-8, atol=1e-10)


@every_path
def test_the_student_reaches_the_end_of_its_stretch_by_ode_steps(where):
    net = Toy(LAW, *PATHS[where], "map", Affine(std=0.2))
    path, ends = net.path, set()
    random.seed(0)
    for _ in range(12):
        watched(net)
        batch = make_batch(3, LAW)
        x0, x_s, start, end = reach(net, batch, 4, 2)
        hop = len(net.log) - 1
        assert [c.grad for c in net.log] == [False] * hop + [True] and x0.requires_grad and not x_s.requires_grad
        assert (start, end) == ((1.0, 0.5), (0.75, 0.5), (0.5, 0.0), (0.25, 0.0))[hop]
        last = net.log[-1]
        torch.testing.assert_close(last.t, path.at(torch.full((3,), start)))
        hat, eps = net.pairs(last.x, last.t, {})
        a, s, _, _ = path.coeffs(path.at(torch.tensor(end)))
        torch.testing.assert_close(x_s, (a * hat + s * eps).detach())
        torch.testing.assert_close(x0, hat)
        if hop:
            first = net.log[0]
            a, s, _, _ = path.coeffs(wide(net.log[1].t, first.x))
            hat, eps = net.pairs(first.x, first.t, {})
            torch.testing.assert_close(net.log[1].x, a * hat + s * eps)
        ends.add(hop)
    assert ends == {0, 1, 2, 3}


@pytest.mark.parametrize(("method", "nested"), [(Phased(4, 2), True), (Phased(4), True), (TDM(4), False)])
@pytest.mark.parametrize("loss", ["student", "critic"])
def test_times_lie_in_the_nested_interval_or_in_the_segment(method, nested, loss):
    """Phased DMD compares on (s, 1), TDM on (s, u) alone; only the phased fake is told s."""
    nets = toys("rf", "jump")
    random.seed(1)
    below: set[float] = set()
    phase = getattr(method, "phases", None) or method.steps
    for _ in range(16):
        watched(*(nets[k] for k in ("student", "fake", "teacher")))
        getattr(method, loss)(nets, without_data(make_batch(300, LAW)), 0)
        call = nets["fake"].log[0]
        start = float(nets["student"].log[-1].t[0])
        end = (-(-start * phase // 1) - 1) / phase
        top = 1.0 if nested else start
        width = top - end
        assert end + 0.01 * width < float(call.t.min()) < end + 0.1 * width
        assert top - 0.1 * width < float(call.t.max()) < top
        assert (call.r is None) is not nested and (not nested or torch.equal(call.r, torch.full((300,), end)))
        below.add(end)
    assert below == {i / phase for i in range(phase)}


def test_tdm_s_pseudo_huber_bounds_the_gradient():
    nets = toys("rf", "jump", truth=Gaussian(LAW.mean + 2.0, LAW.std))
    sizes = {}
    for c in (0.0, 1e-9):
        random.seed(0)
        torch.manual_seed(0)
        x = nets["student"]
        loss, _ = TDM(1, Uniform(0.3, 0.6), huber=c).student(nets, without_data(make_batch(5, LAW)), 0)
        sizes[c] = gradients(loss, x)
    assert float(sizes[0.0].norm()) != pytest.approx(float(sizes[1e-9].norm()), rel=0.01)
    with pytest.raises(ConfigError, match="huber of at least 0"):
        TDM(huber=-1.0)
    with pytest.raises(ConfigError, match="steps of at least 1"):
        TDM(0)


def test_phases_divide_the_steps():
    for steps, phases in ((4, 3), (0, 1), (4, 0)):
        with pytest.raises(ConfigError, match="divide into phases"):
            Phased(steps, phases)


# --- on a real network ----------------------------------------------------------------------------------------------

METHODS = {
    "f_distill": DMD2(divergence="js"),
    "dmd": DMD2(gan_weight=0, regression=0.25, substeps=2),
    "diff_instruct": DMD2(gan_weight=0, weight="x0"),
    "decoupled": Decoupled(cfg_scale=2.0),
    "phased": Phased(2, 2, cfg_scale=2.0),
    "tdm": TDM(2, cfg_scale=2.0),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_it_runs_on_a_transformer_in_both_precisions(name, low):
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    config = DiTConfig(size=(4, 4), channels=1, classes=2, width=16, depth=2, heads=2, patch=2)
    method, teacher = METHODS[name], DiT(config, RECTIFIED_FLOW, "velocity").requires_grad_(False)
    nets = method.networks(teacher, clone)
    labels = torch.zeros(4, dtype=torch.long)
    batch = replace(make_batch(4, Gaussian(), labels, shape=(1, 4, 4)), uncond={"label": labels + 2})
    batch = replace(batch, x0=batch.data.float() if method.needs_data else None)
    for turn in method.turns:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss, _ = turn.loss(nets, batch, 0)
        loss.backward()
        assert loss.dtype == torch.float32 and bool(torch.isfinite(loss))
        for role in turn.trains:
            grads = [p.grad for p in nets[role].parameters() if p.grad is not None]
            assert grads and all(bool(torch.isfinite(g).all()) for g in grads)
    x0 = predict(nets["student"], torch.randn(4, 1, 4, 4), 1.0, batch.cond)
    assert bool(torch.isfinite(x0).all())
