"""SiDA, LADD, ADD and moment matching: what each paper says that the equation suite does not reach."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.core.errors import ConfigError
from hasten.core.generate import noised_data
from hasten.core.heads import PixelFeatures, TokenHeads
from hasten.core.losses import hinge_critic, hinge_generator, r1
from hasten.core.path import EDM, RECTIFIED_FLOW, VP
from hasten.core.times import LogitNormal, Uniform
from hasten.distribute import clone
from hasten.fit import fit
from hasten.methods.add import ADD
from hasten.methods.ladd import LADD
from hasten.methods.moment import MomentMatching
from hasten.methods.sid import SiD
from hasten.models.dit import DiT, DiTConfig
from hasten.recipe import for_steps, parse
from hasten.role import FitConfig
from tests.analytic import LAW, MEAN, PATHS, SHAPE, STD, Affine, LawSource, Toy, make_batch, shifted, toys, watched
from tests.oracle import Gaussian, wide
from tests.proofs.adversarial import from_data
from tests.proofs.common import ONE, B, N, Run, World, gradients, mean, world
from tests.test_methods import _float64  # noqa: F401
from tests.test_methods_train import error

every_path = pytest.mark.parametrize("where", PATHS)


class PerDimension(nn.Module):
    """h: a number for each dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(SHAPE))

    def forward(self, x: Tensor, phi: Tensor, psi: Tensor) -> Tensor:
        return self.value.expand_as(x)


@dataclass(frozen=True)
class At:
    """The same time for every sample; on rectified flow a unit time."""

    u: float

    def draw(self, path: Any, n: int, device: Any = "cpu") -> Tensor:
        return path.at(torch.full((n,), self.u))


# --- losses and heads that they share -------------------------------------------------------------------------------


def test_the_hinge_losses():
    real, fake = torch.tensor([2.0, 0.25]), torch.tensor([-3.0, 0.5])
    assert float(hinge_critic(real, fake)) == pytest.approx(0.75 / 2 + 1.5 / 2)
    assert float(hinge_generator(fake)) == pytest.approx(1.25)


def test_the_best_hinge_discriminator_measures_the_total_variation():
    """Two normals d apart, D = sign of the log ratio: 2 - 2 TV with TV = 2 Phi(d/2) - 1; half as steep is worse."""
    torch.manual_seed(0)
    d, z = 1.4, torch.randn(400_000)
    real, fake = z + d / 2, z - d / 2
    want = 2 - 2 * math.erf(d / 2 / math.sqrt(2))
    assert float(hinge_critic(real.sign(), fake.sign())) == pytest.approx(want, abs=0.01)
    assert float(hinge_critic(real.sign() / 2, fake.sign() / 2)) > want + 0.1


def test_r1_of_a_linear_discriminator_is_its_squared_slope():
    w, x = torch.randn(5), torch.randn(6, 2, 5)
    leaves = [x.clone().requires_grad_(), (3 * x).requires_grad_()]
    slope = w.clone().requires_grad_()
    penalty = r1(leaves[0].mean(1) @ slope + 2 * (leaves[1].mean(1) @ slope), leaves)
    assert float(penalty.detach()) == pytest.approx(float(w.pow(2).sum() / 2 * (1 + 4)))
    torch.testing.assert_close(torch.autograd.grad(penalty, slope)[0], 5 * w)


def test_heads_and_tokens_apart_keep_their_own_hinge():
    heads = TokenHeads(4, 3, apart="tokens")
    features = [torch.randn(6, n, 4) for n in (5, 5, 2)]
    tokens = heads(features)
    assert tokens.shape == (6, 12)
    torch.testing.assert_close(tokens, torch.cat([h(f)[..., 0] for h, f in zip(heads.heads, features, strict=True)], 1))
    with pytest.raises(ConfigError, match="'', 'heads' or 'tokens', not True"):
        TokenHeads(4, 3, apart=True)  # pyright: ignore[reportArgumentType]
    heads.apart = "heads"
    torch.testing.assert_close(heads(features), torch.stack([t.mean(1) for t in tokens.split([5, 5, 2], 1)], 1))
    heads.apart = ""
    torch.testing.assert_close(heads(features), torch.stack([t.mean(1) for t in tokens.split([5, 5, 2], 1)]).mean(0))


def test_pixel_features_halve_their_resolution_and_cannot_grow():
    net = PixelFeatures(2, width=16)
    maps = net(torch.randn(3, 2, 8, 8))
    assert [tuple(f.shape) for f in maps] == [(3, 64, 16), (3, 16, 16), (3, 4, 16)]
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(10)
    assert all(float(f.detach().pow(2).mean()) == pytest.approx(1, abs=0.01) for f in net(torch.randn(3, 2, 8, 8)))
    video = torch.randn(3, 2, 5, 8, 8)
    torch.testing.assert_close(net(video)[1][:, 16:32], net(video[:, :, 1])[1])


# --- the student's input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "want"), [((1, 2, 4), (7 / 12, 1 / 12, 3 / 12, 1 / 12)), ((4,), (1 / 4,) * 4)])
def test_the_student_sees_noised_data_at_its_sampling_times(steps, want):
    net = Toy(LAW, VP, "v")
    watched(net)
    n = 6000
    batch = make_batch(n, LAW)
    out = noised_data(net, batch, steps)
    (call,) = net.log
    times = [float(VP.at(torch.tensor(u))) for u in (1.0, 0.75, 0.5, 0.25)]
    assert sorted(set(call.t.tolist())) == pytest.approx(times[::-1])
    assert [float((call.t - t).abs().lt(1e-9).double().mean()) for t in times] == pytest.approx(want, abs=0.03)
    a, s, _, _ = VP.coeffs(wide(call.t, out))
    torch.testing.assert_close(call.x, a * batch.data + s * batch.script[0])
    assert out.requires_grad
    torch.testing.assert_close(out, net.pairs(call.x, call.t, {})[0])


def test_a_recipe_sets_the_steps_and_the_variation():
    raw: dict[str, Any] = {"teacher": "x", "data": "digits"}
    assert parse({**raw, "method": "ladd", "steps": [2, 4]}).method.steps == (2, 4)
    assert for_steps(ADD(), (1, 3)) == ADD((1, 3)) and parse({**raw, "method": "moment", "steps": 4}).method.steps == 4
    with pytest.raises(ConfigError, match="moment trains for one step count"):
        parse({**raw, "method": "moment", "steps": [2, 4]})
    sida = parse({**raw, "method": "sida", "steps": [1]}).method
    assert sida == SiD(alpha=1.0, gan_weight=1e-4) and sida.needs_data
    with pytest.raises(ConfigError, match="features cannot be set in a recipe"):
        parse({**raw, "method": {"name": "add", "features": "dino"}})


@pytest.mark.parametrize("steps", [(), (0,), (2, -1)])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(ConfigError, match="at least 1"):
        LADD(steps).student(toys("rf", "jump"), make_batch(2, LAW), 0)
    with pytest.raises(ConfigError, match="at least 1"):
        MomentMatching(0)


@pytest.mark.parametrize("method", [SiD(alpha=1.0, gan_weight=1e-4), LADD(), ADD(), MomentMatching()])
def test_data_are_asked_for(method):
    with pytest.raises(ConfigError, match="needs data"):
        list(fit(method, LawSource(None), Toy(LAW, RECTIFIED_FLOW, "velocity"), FitConfig(iterations=1, batch=2)))


def test_features_of_blocks_that_are_not_there_are_refused():
    net = Toy(LAW, RECTIFIED_FLOW, "velocity")
    assert LADD().tapped(net) == (0, 1) and LADD(taps=(1,)).tapped(net) == (1,)
    for taps in ((2,), (-1, 0), ()):
        with pytest.raises(ConfigError, match="blocks 0 to 1"):
            LADD(taps=taps).networks(net, clone)
    with pytest.raises(ConfigError, match="blocks 0 to 1 .*not .2,"):
        SiD(gan_weight=1.0, tap=2).student(toys("rf", "jump"), make_batch(2, LAW), 0)


@pytest.mark.parametrize(
    "method",
    [SiD(gan_weight=0.1, cfg_scale=2.0), LADD(r1_weight=0.1), ADD(cfg_scale=2.0), MomentMatching(2, cfg_scale=2.0)],
)
@pytest.mark.parametrize("kind", ["x0", "v"])
def test_they_train_a_network_in_bfloat16(method, kind):
    """The real network with conditions and guidance under autocast: every trained network has finite gradients."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    net = DiT(DiTConfig(size=(4, 4), width=16, depth=2, heads=2, classes=2), EDM if kind == "x0" else VP, kind)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    nets = method.networks(net, clone)
    label = torch.tensor([0, 1, 1])
    batch = replace(make_batch(3, Gaussian(0.0, 0.5), label, (1, 4, 4)), uncond={"label": label * 0 + 2})
    batch = replace(batch, x0=batch.data.float())
    for turn in method.turns:
        with torch.autocast("cpu", torch.bfloat16):
            loss, log = turn.loss(nets, batch, 0)
        assert loss.dtype == torch.float32 and loss.ndim == 0 and all(not v.requires_grad for v in log.values())
        for name in turn.trains:
            g = gradients(loss, nets[name])
            assert bool(g.isfinite().all()) and float(g.abs().max()) > 0


# --- SiDA -----------------------------------------------------------------------------------------------------------


def test_the_discriminator_of_sida_has_no_weights_of_its_own():
    """Its networks are SiD's; training the critic moves the first half of fake alone by the adversarial term."""
    net = DiT(DiTConfig(width=32, depth=4, heads=2))
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    method = SiD(alpha=1.0, gan_weight=1e-4)
    nets = method.networks(net, clone)
    assert nets.keys() == SiD().networks(net, clone).keys()
    x = torch.randn(2, 1, 8, 8)
    _, logits = method.judged(nets["fake"], x, torch.full((2,), 0.5), {})
    assert logits.shape == (2, 16)
    moved = torch.autograd.grad(logits.sum(), list(nets["fake"].blocks.parameters()), allow_unused=True)
    names = [k for (k, _), g in zip(nets["fake"].blocks.named_parameters(), moved, strict=True) if g is not None]
    assert {k.split(".")[0] for k in names} == {"0", "1"}
    _, features = net(x, torch.full((2,), 0.5), {}, taps=(2,))
    torch.testing.assert_close(
        replace(method, tap=2).judged(net, x, torch.full((2,), 0.5), {})[1], features[0].mean(-1)
    )


def test_a_logit_beyond_ten_pulls_no_more():
    class Sure(Toy):
        def forward(self, x_t, t, cond, *, r=None, taps=()):
            out = super().forward(x_t, t, cond, r=r, taps=taps)
            return (out[0], [f - 50 for f in out[1]]) if taps else out

    w = world("rf", "jump", "gaussian", 0.3, None)
    w.nets["fake"] = Sure(w.fake, *PATHS["rf"])
    grads = []
    for weight in (0.0, 5.0):
        torch.manual_seed(1)
        loss, _ = SiD(times=ONE, gan_weight=weight).student(w.nets, make_batch(N, LAW), 0)
        grads.append(gradients(loss, w.nets["student"]))
    torch.testing.assert_close(*grads)


# --- LADD -----------------------------------------------------------------------------------------------------------


@every_path
def test_discriminator_times_shift_what_ladd_judges(where):
    """Pulling x through E[x0 | x_t] has the gain a^2 s^2/V: at noisy times dimensions with a small s are lost.

    Coarse structure (s = 1) and fine texture (s = 0.1); the student is moved by a constant in each of them.
    """
    coarse = torch.tensor([[[1.0, 1.0, 1.0], [0.1, 0.1, 0.1]]])
    law, (path, kind) = Gaussian(0.0, coarse), PATHS[where]
    share = []
    for centre in (-1.0, 1.0):
        nets = {**toys(where, "jump", law, law), "student": Toy(law, path, kind, "jump", PerDimension())}
        nets["disc"].w.data.fill_(1.0)
        torch.manual_seed(0)
        batch, method = make_batch(4000, law), LADD((1,), LogitNormal(centre, 1.0))
        watched(nets["teacher"])
        loss, _ = method.student(nets, batch, 0)
        pull = -gradients(loss, nets["student"]).reshape(2, 3).mean(1)
        a, s, _, _ = path.coeffs(wide(nets["teacher"].log[0].t, batch.data))
        gain = (a**2 * coarse**2 / (a**2 * coarse**2 + s**2)).mean((0, 3))[0]
        share.append(float(pull[1] / pull[0]))
        assert share[-1] == pytest.approx(float(gain[1] / gain[0]), rel=1e-4)
    assert share[1] < 0.6 * share[0]
    assert LADD().times == LogitNormal(1.0, 1.0)  # the paper's: structure first


@pytest.mark.parametrize("taps", [None, (0, 1)])
def test_ladd_has_a_hinge_for_every_token_of_every_head(taps):
    nets = toys("rf", "jump")
    method = LADD((2,), taps=taps)
    nets["disc"] = method.networks(nets["teacher"], clone)["disc"]
    with torch.no_grad():
        for p in nets["disc"].parameters():
            p.normal_()
    seen: list[Tensor] = []
    nets["disc"].register_forward_hook(lambda m, i, out: seen.append(out))
    loss, _ = method.critic(nets, make_batch(B, LAW), 0)
    generated, real = seen[0].chunk(2)
    batch = make_batch(B, LAW)
    tokens = method.features(nets["teacher"], batch.data, torch.full((B,), 0.5), batch.cond)[0].shape[1]
    assert seen[0].shape == (2 * B, 2 * tokens)
    want = (1 - real).clamp_min(0).mean() + (1 + generated).clamp_min(0).mean()
    assert float(loss.detach()) == pytest.approx(float(want.detach()))


# --- ADD ------------------------------------------------------------------------------------------------------------


class Pixels(nn.Module):
    """The pixels themselves, where LinearDisc looks for them."""

    width, scales = 2, 1

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [torch.stack([torch.zeros_like(x), self.gain * x], -1).flatten(1, -2)]


def add_world(where: str, law: str, scale: float | None) -> World:
    w = world(where, "jump", law, 0.3, scale)
    w.nets["features"] = Pixels()
    torch.manual_seed(5)
    return w


@every_path
@pytest.mark.parametrize(("law", "scale"), [("gaussian", None), ("mixture", None), ("gaussian", 2.5)])
def test_add_is_a_linear_gan_and_score_distillation(law, scale, where):
    """-mean w . x + 2.5 c |x - sg D(x_t)|^2, c the cosine of the angle: alpha_t on VP, however a path is scaled."""
    w = add_world(where, law, scale)
    m = ADD(times=ONE, cfg_scale=scale)
    assert (m.steps, m.distill_weight, m.r1_weight) == ((4,), 2.5, 1e-5)  # the paper's
    got, log = m.student(w.nets, w.batch, 0)
    x, t = from_data(w, (4,)), w.path.time(torch.tensor(ONE.draws[0]))
    a, s, _, _ = w.coeffs(t)
    target = w.real.posterior(w.path, a * x + s * w.batch.script[1], t)[0].detach()
    c = wide(torch.cos(torch.tensor(ONE.draws[0])), x)
    if where == "vp":
        torch.testing.assert_close(c, a)
    distill = (c * (x - target) ** 2).mean()
    want = -(x.flatten(1) @ w.nets["disc"].w).mean() + 2.5 * distill
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    assert float(log["distill"]) == pytest.approx(float(distill.detach()), rel=1e-5)
    torch.testing.assert_close(
        gradients(got, w.nets["student"]), gradients(want, w.nets["student"]), rtol=1e-5, atol=1e-6
    )


@every_path
def test_the_critic_of_add(where):
    """Hinge on clean pixels; R1 on what the heads read is |w|^2, and does not train the features."""
    w = add_world(where, "gaussian", None)
    m = ADD(times=ONE, r1_weight=0.3)
    got, _ = m.critic(w.nets, w.batch, 0)
    x, disc, gain = from_data(w, (4,)).detach(), w.nets["disc"], w.nets["features"].gain
    real, generated = gain * w.batch.data.flatten(1) @ disc.w, gain * x.flatten(1) @ disc.w
    want = (1 - real).clamp_min(0).mean() + (1 + generated).clamp_min(0).mean()
    want = want + 0.3 * disc.w.pow(2).sum()
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-6)
    for name in ("disc", "features", "student"):
        torch.testing.assert_close(gradients(got, w.nets[name]), gradients(want, w.nets[name]))
    torch.manual_seed(5)
    plain, _ = replace(m, r1_weight=0.0).critic(w.nets, w.batch, 0)
    assert float((got - plain).detach()) == pytest.approx(0.3 * float(disc.w.detach().pow(2).sum()))


def test_score_distillation_alone_pulls_to_the_mean():
    """E over the noise of x - D(x_t) is (s^2/V_t)(x - mu) with s the noise: it rests at the law's mean, not at the law.

    That is why ADD needs its discriminator: the same gradient with a fake would be zero on the law itself.
    """
    path, t = RECTIFIED_FLOW, torch.tensor(0.6)
    a, s, _, _ = path.coeffs(t)
    nets = {**toys("rf", "jump"), "student": Toy(LAW, *PATHS["rf"], "jump", PerDimension())}
    method = ADD((1,), times=At(0.6), distill_weight=1.0)
    z = torch.randn(1, *SHAPE)
    batch = make_batch(40_000, LAW)
    x = (MEAN + STD * z).requires_grad_()
    loss = method.distilled(nets["teacher"], x.expand(40_000, *SHAPE), batch)
    got = torch.autograd.grad(loss, x)[0]
    v = a**2 * STD**2 + s**2
    want = 2 / x[0].numel() * torch.cos(path.angle(t)) * s**2 / v * (x - MEAN)
    torch.testing.assert_close(got, want.detach(), rtol=0.05, atol=2e-3)


def test_add_calls_its_networks_so_often():
    nets = {**toys("rf", "jump"), "features": Pixels()}
    for loss, want in (
        ("student", {"student": [(B, True)], "teacher": [(B, False)]}),
        ("critic", {"student": [(B, False)]}),
    ):
        watched(nets["student"], nets["teacher"])
        getattr(ADD(), loss)(nets, make_batch(B, LAW), 0)
        assert {k: [(c.n, c.grad) for c in nets[k].log] for k in ("student", "teacher") if nets[k].log} == want


def test_given_features_stay_frozen_and_need_their_sizes():
    net = Toy(LAW, RECTIFIED_FLOW, "velocity")
    own = Pixels()
    method = ADD(features=own)
    nets = method.networks(net, clone)
    assert nets["features"] is own and [t.trains for t in method.turns] == [("disc",), ("student",)]
    assert len(nets["disc"].heads) == 1 and nets["disc"].heads[0][1].in_features == 2
    before = own.gain.detach().clone()
    config = FitConfig(iterations=3, batch=8, lr=0.1, precision="float32")
    *_, last = fit(method, LawSource(LAW, SHAPE), net, config)
    assert torch.equal(own.gain, before) and set(last.roles) == {"disc", "student"}
    with pytest.raises(ConfigError, match="attributes width and scales"):
        ADD(features=nn.Identity())


# --- moment matching ------------------------------------------------------------------------------------------------


class Moments:
    """Of a student x~ = mu + b (z_t - a_t mu) on data N(mu, sd^2), where z_t, x~ and z_s are jointly normal.

    z_s - a_s mu = k (z_t - a_t mu) + noise, its variance ``var``; E[x~ | z_s] = mu + slope (z_s - a_s mu).
    """

    def __init__(self, path: Any, t: Tensor, s: Tensor, b: Tensor):
        (a_t, s_t, _, _), (a_s, s_s, _, _) = path.coeffs(t), path.coeffs(s)
        ratio, v_t = a_t / a_s, a_t**2 * STD**2 + s_t**2
        added = s_t**2 - ratio**2 * s_s**2
        k = ratio * s_s**2 / s_t**2 + a_s * added / s_t**2 * b
        self.var = k**2 * v_t + added * s_s**2 / s_t**2
        self.slope = k * b * v_t / self.var


def resting(path: Any, t: Tensor, s: Tensor, want: Tensor) -> Tensor:
    """The b of a student for which E[x~ | z_s] has the slope ``want``, by bisection."""
    low, high = torch.zeros_like(STD), 20 * torch.ones_like(STD)
    for _ in range(60):
        b = (low + high) / 2
        small = Moments(path, t, s, b).slope < want
        low, high = torch.where(small, b, low), torch.where(small, high, b)
    return low


@every_path
@pytest.mark.parametrize("factor", [1.0, 0.6])
def test_the_student_of_moment_matching_rests_where_the_moments_agree(factor, where, monkeypatch):
    """The auxiliary model rests half-way between E[x~ | z_s] and the teacher; the student where these two agree.

    All in closed form for a linear student at one t and s: with the right slope its gradient is zero though its x~ is
    no sample of the posterior, with another slope it is pushed by half of the violated moment.
    """
    (path, kind), k, n = PATHS[where], 4, 20_000
    s, t = path.at(torch.tensor(0.4)), path.at(torch.tensor(0.4 + 0.7 / k))
    a, sigma, _, _ = path.coeffs(s)
    real = a * STD**2 / (a**2 * STD**2 + sigma**2)  # E[x | z_s] = mu + real (z_s - a mu)
    b = factor * resting(path, t, s, real)
    moments = Moments(path, t, s, b)

    class Linear(Toy):
        slope = b

        def pairs(self, x, t, cond, r=None):
            a, sigma, _, _ = self.path.coeffs(wide(t, x))
            x0 = MEAN + (self.slope + self.head.value) * (x - a * MEAN)
            return x0, (x - a * x0) / sigma

    nets: dict[str, Any] = {name: Linear(LAW, path, kind, head=PerDimension()) for name in ("student", "fake")}
    nets["teacher"], nets["fake"].slope = Toy(LAW, path, kind), (moments.slope + real) / 2
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.7))
    method = MomentMatching(k, times=At(0.4), snr_max=1e9)
    torch.manual_seed(3)
    _, z_s, at = method.hop(nets, make_batch(n, LAW))
    assert not z_s.requires_grad and torch.equal(at, s.expand(n))
    torch.testing.assert_close(z_s.var(0), moments.var, rtol=0.05, atol=0)
    weight = a**2 / sigma**2 + 1
    critic = gradients(method.critic(nets, make_batch(n, LAW), 0)[0], nets["fake"])
    alone = 2 * weight * (real * moments.var).max() / 6  # what the gradient of one of the two targets measures
    assert float(critic.abs().max()) < 0.03 * float(alone)
    student = gradients(method.student(nets, make_batch(n, LAW), 0)[0], nets["student"])
    gap = (moments.slope - real) / 2
    with_t = moments.slope * moments.var / b  # E (z_s - a_s mu) (z_t - a_t mu), from E (z_s - a_s mu)(x~ - mu)
    want = (weight * gap * with_t / 6).flatten()
    torch.testing.assert_close(student, want, rtol=0.05, atol=1e-9)
    assert (float(want.abs().max()) < 1e-9) == (factor == 1.0)


def test_moment_matching_keeps_times_inside_and_hops_forward():
    nets = toys("rf", "jump")
    for times in (Uniform(0.0, 1.0), LogitNormal(8.0, 4.0), LogitNormal(-8.0, 4.0)):
        watched(nets["student"])
        x, z_s, s = MomentMatching(2, times=times).hop(nets, make_batch(500, LAW))
        t = nets["student"].log[0].t
        assert bool((t > s).all()) and float((t - s).max()) <= 0.5 + 1e-9 and float(t.max()) <= 1
        assert float(s.min()) >= 1e-3 and float(s.max()) <= 0.999
        assert bool(z_s.isfinite().all())
    late = [float((nets["student"].log[0].t - s).mean())]
    assert late[0] == pytest.approx(0.25, abs=0.05)
    assert mean(x).shape == (500, 1, 1, 1)


# --- training in the real loop ----------------------------------------------------------------------------------------

CLEAN = Uniform(0.02, 0.6)
TRAINED = {
    "ladd": (LADD((1,), CLEAN, r1_weight=1.0), 0.01, {}, 350),
    "add": (ADD((1,), Uniform(0.02, 0.3), distill_weight=0.1), 0.01, {"disc": 0.003, "features": 0.003}, 100),
    "moment": (MomentMatching(1), 0.02, {}, 400),
    "moment_guided": (MomentMatching(1, cfg_scale=2.0), 0.02, {}, 400),
}


@pytest.mark.parametrize("name", TRAINED)
def test_one_step_trains_to_the_law(name):
    """From E[x0], which the teacher predicts from pure noise, to a normal law; guided to the shifted one.

    Adam without momentum and an average of the weights, as for every GAN; the distance is Wasserstein's.
    """
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    method, lr, lrs, iterations = TRAINED[name]
    law, other = Gaussian(0.6, 0.45), Gaussian(-0.3, 0.45)
    guided = name == "moment_guided"
    laws, truth = ([law, other], shifted(law, other, 2.0)) if guided else (law, law)
    teacher = Toy(laws, RECTIFIED_FLOW, "velocity", "posterior", Affine(3))
    config = FitConfig(iterations, 64, lr=lr, lrs=lrs, betas=(0.0, 0.99), ema=(0.98,), clip=10, precision="float32")
    run = Run(method, law=True)
    *_, last = fit(method, LawSource(law, labelled=guided), teacher, config)
    assert error(last.student, run, truth) < error(teacher, run, truth) / 3
