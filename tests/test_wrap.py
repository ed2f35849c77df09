"""Wrapped modules: ideal denoisers written in their own conventions, taps, guidance, LoRA, training, bad settings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hasten
from hasten.core.denoiser import guided, on_path, predict
from hasten.core.errors import ConfigError, UnsupportedModel
from hasten.core.method import Sampling, even
from hasten.core.path import EDM, RECTIFIED_FLOW, TRIG, Kind, ddpm
from hasten.core.sample import sample
from hasten.data import Images
from hasten.distribute import clone, save_model
from hasten.fit import fit
from hasten.lora import LoRA, merge, view
from hasten.methods.cm import CM
from hasten.methods.dmd2 import DMD2
from hasten.methods.flow import Flow
from hasten.methods.ladd import LADD
from hasten.methods.meanflow import MeanFlow
from hasten.models.wrap import wrap
from hasten.role import FitConfig
from tests.training import images as native_images
from tests.training import network as native_network

# --- ideal denoisers, with no help from hasten ----------------------------------------------------------------

T = 100
BAR = torch.linspace(0.999, 0.003, T, dtype=torch.float64)  # a table of alphas_cumprod
MEAN = torch.linspace(-0.6, 0.9, 6, dtype=torch.float64).reshape(1, 2, 3)  # of the data in [-1, 1]
STD = torch.linspace(0.3, 0.8, 6, dtype=torch.float64).reshape(1, 2, 3)


class Conventional(nn.Module):
    """E[. | x'_t] of Gaussian data in the module's own range, by the textbook formula, from its own time argument.

    Args:
        coeffs: The module's time argument [B] to (alpha, sigma, alpha', sigma') on its own path.
        kind: What it predicts.
        data_range: Where its data lie.
        pack: The prediction to what it returns.
    """

    def __init__(self, coeffs: Callable, kind: str, data_range=(-1.0, 1.0), pack: Callable = lambda out: out):
        super().__init__()
        m, c = (data_range[1] - data_range[0]) / 2, (data_range[1] + data_range[0]) / 2
        self.coeffs, self.kind, self.pack = coeffs, kind, pack
        self.mean, self.std = nn.Parameter(m * MEAN + c), nn.Parameter(m * STD)

    def forward(self, x: Tensor, time: Tensor) -> Any:
        a, s, da, ds = (v.view(-1, 1, 1, 1) for v in self.coeffs(time))
        mean, var = self.mean.to(x), self.std.to(x) ** 2
        centred = (x - a * mean) / (a * a * var + s * s)
        x0, eps = mean + a * var * centred, s * centred
        rows = {"x0": x0, "eps": eps, "v": a * eps - s * x0, "velocity": da * x0 + ds * eps}
        return self.pack(rows[self.kind])


def table(index: Tensor) -> tuple[Tensor, ...]:
    """Of entry ``index``, which must be one."""
    i = index.round().long()
    assert (index - i).abs().max() < 1e-4
    bar = BAR[i]
    return bar.sqrt(), (1 - bar).sqrt(), torch.full_like(bar, torch.nan), torch.full_like(bar, torch.nan)


def sigma(noise: Tensor) -> tuple[Tensor, ...]:
    """EDM's, of log(sigma)/4."""
    s = torch.exp(4 * noise)
    return torch.ones_like(s), s, torch.zeros_like(s), torch.ones_like(s)


def reverse(tau: Tensor) -> tuple[Tensor, ...]:
    """Flow's, of a time that is 0 at noise and 1000 at data."""
    t = 1 - tau / 1000
    return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)


def vp(t: Tensor) -> tuple[Tensor, ...]:
    """Song et al. 2021, eq. 33."""
    log = -0.25 * 19.9 * t * t - 0.05 * t
    a, dlog = log.exp(), -0.5 * 19.9 * t - 0.05
    s = (1 - a * a).sqrt()
    return a, s, a * dlog, -a * a * dlog / s


ON_TABLE = torch.tensor([1, 7, 50, 93, T], dtype=torch.float64) / T
ANY = torch.tensor([0.01, 0.2, 0.55, 0.9, 1.0], dtype=torch.float64)
NEGATED: dict[str, Any] = {
    "path": "rectified_flow", "kind": "velocity", "time": lambda t: 1000 * (1 - t), "output": lambda out: -out.sample,
}  # fmt: skip
# name: (the module's own coefficients and kind, what it returns, wrap's options, native times, native t to its own)
CASES: dict[str, Any] = {
    "ddpm index": (
        table, "eps", lambda e: e, {"schedule": BAR.tolist(), "time": "index"}, ON_TABLE, lambda t: t * T - 1,
    ),
    "ddpm float index, learnt variance": (
        table, "eps", lambda e: (torch.cat([e, e + 7], 1),), {"schedule": BAR}, ON_TABLE, lambda t: t * T - 1,
    ),
    "ddpm v": (table, "v", lambda v: v, {"schedule": BAR, "kind": "v"}, ON_TABLE, lambda t: t * T - 1),
    "ddpm x0": (table, "x0", lambda x: x, {"path": ddpm(BAR), "kind": "x0"}, ON_TABLE, lambda t: t * T - 1),
    "edm c_noise": (
        sigma, "x0", lambda x: x, {"path": EDM, "kind": "x0", "time": "sigma_log"},
        torch.tensor([0.002, 0.1, 1.0, 9.0, 80.0], dtype=torch.float64), lambda t: t.log() / 4,
    ),
    "vp velocity": (vp, "velocity", lambda v: v, {"path": "vp", "kind": "velocity"}, ANY, lambda t: t),
    "reversed and negated flow": (
        reverse, "velocity", lambda v: SimpleNamespace(sample=-v), NEGATED, ANY, lambda t: 1000 * (1 - t),
    ),
}  # fmt: skip
RANGES = [(-1.0, 1.0), (0.0, 1.0), (-2.0, 4.0)]
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_range = pytest.mark.parametrize("data_range", RANGES, ids=str)


def conventional(case: Any, data_range: tuple[float, float]) -> tuple[Any, Callable]:
    """The wrapped ideal denoiser, and (alpha, sigma) [B, 1, 1, 1] at its native times for data in [-1, 1]."""
    coeffs, kind, pack, options, _, own_time = case
    net = wrap(Conventional(coeffs, kind, data_range, pack), data_range=data_range, **options)

    def level(t: Tensor) -> tuple[Tensor, Tensor]:
        a, s, _, _ = coeffs(own_time(t))
        return a.view(-1, 1, 1, 1), s.view(-1, 1, 1, 1) / ((data_range[1] - data_range[0]) / 2)

    return net, level


@every_range
@every_case
def test_x0_is_that_of_the_ideal_denoiser_in_our_range(case, data_range):
    net, level = conventional(case, data_range)
    t = case[4]
    a, s = level(t)
    x_t = (a * MEAN + s * torch.randn(len(t), 1, 2, 3, dtype=torch.float64)).requires_grad_()
    gain = a * STD**2 / (a * a * STD**2 + s * s)
    out = predict(net, x_t, t, {}, "x0")
    torch.testing.assert_close(out, MEAN + gain * (x_t - a * MEAN), rtol=1e-9, atol=1e-9)
    (slope,) = torch.autograd.grad(out.sum(), x_t)
    torch.testing.assert_close(slope, gain.expand_as(slope), rtol=1e-9, atol=1e-9)


@every_range
@every_case
def test_every_kind_is_on_the_path_of_our_range(case, data_range):
    """alpha x0 + sigma eps = x_t with the path's own numbers, and the ideal pair in every kind and view."""
    net, level = conventional(case, data_range)
    t = case[4][1:-1]
    a, s = level(t)
    x_t = torch.randn(len(t), 1, 2, 3, dtype=torch.float64)
    alpha, sigma_, dalpha, dsigma = (v.view(-1, 1, 1, 1) for v in net.path.coeffs(t))
    torch.testing.assert_close((alpha, sigma_), (a, s), rtol=1e-9, atol=1e-9)
    centred = (x_t - a * MEAN) / (a * a * STD**2 + s * s)
    x0, eps = MEAN + a * STD**2 * centred, s * centred
    wanted: dict[Kind, Tensor] = {"eps": eps, "v": a * eps - s * x0, "velocity": dalpha * x0 + dsigma * eps}
    for kind, want in wanted.items():
        torch.testing.assert_close(predict(net, x_t, t, {}, kind), want, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(net.path.time(net.path.angle(t)), t, rtol=1e-8, atol=1e-8)
    h = 1e-6
    for i in (0, 1):
        moved = (net.path.coeffs(t + h)[i] - net.path.coeffs(t - h)[i]) / (2 * h)
        torch.testing.assert_close(net.path.coeffs(t)[i + 2], moved, rtol=1e-4, atol=1e-4)
    angle, scale = net.path.angle(t), torch.hypot(a, s)
    seen = predict(on_path(net, TRIG, "v"), x_t / scale, angle, {}, "x0") if "index" not in case[3].values() else x0
    torch.testing.assert_close(seen, x0, rtol=1e-6, atol=1e-6)


@every_range
@every_case
def test_samples_are_the_gaussian(case, data_range):
    """Against the flow map of the Gaussian, which maps every noise to its own sample."""
    net, level = conventional(case, data_range)
    times = tuple(1 - i / T for i in range(T)) + (0.0,)
    noise = torch.randn(8, 1, 2, 3, dtype=torch.float64)
    a, s = level(case[4][-1:])
    want = MEAN + STD * (s * noise - a * MEAN) / torch.sqrt(a * a * STD**2 + s * s)
    # A single wrong time, sign or scale costs far more than the error of 100 steps.
    torch.testing.assert_close(sample(net, noise, {}, Sampling(times, "heun")), want, rtol=0, atol=4e-2)


def test_range_and_weights_are_learnt_in_the_modules_own_coordinates():
    module = Conventional(lambda t: (1 - t, t, -torch.ones_like(t), torch.ones_like(t)), "velocity", (0.0, 1.0))
    net = wrap(module, path="rectified_flow", kind="velocity", data_range=(0.0, 1.0), shape=(1, 2, 3))
    with torch.no_grad():
        module.mean.fill_(0.5)
        module.std.fill_(0.1)
    x = (MEAN / 2 + 0.2 * torch.randn(4000, 1, 2, 3)).clamp(-1, 1).float()
    config = FitConfig(iterations=150, batch=256, lr=2e-2, precision="float32", ema=(0.9,))
    *_, last = fit(Flow(), Images(x), net, config)
    learnt = last.student.module
    torch.testing.assert_close(learnt.mean, (x.double().mean(0) + 1) / 2, rtol=0, atol=0.04)
    torch.testing.assert_close(learnt.std.abs(), x.double().std(0) / 2, rtol=0, atol=0.04)


# --- a network -------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Returns a tuple, as many do; its width is its own."""

    def __init__(self, before: int, width: int):
        super().__init__()
        self.conv, self.time = nn.Conv2d(before, width, 3, 1, 1), nn.Linear(8, width)

    def forward(self, h: Tensor, c: Tensor) -> tuple[Tensor, str]:
        return F.silu(self.conv(h) + self.time(c)[:, :, None, None]), "and more"


class Net(nn.Module):
    """An eps network with its own names: ``step`` first, classes as ``y`` (10 is none), a second time ``until``."""

    def __init__(self, widths: tuple[int, ...] = (12, 8, 16)):
        super().__init__()
        self.small = nn.ModuleList([nn.Linear(3, 8)])
        self.layers = nn.ModuleList(Block(a, b) for a, b in zip((1, *widths), widths, strict=False))
        self.label = nn.Embedding(11, 8)
        self.last = nn.Conv2d(widths[-1], 1, 3, 1, 1)
        self.seen: list[Any] = []

    def forward(self, step: Tensor, h: Tensor, y: Tensor, until: Tensor | None = None) -> Tensor:
        self.seen.append((step.detach(), None if until is None else until.detach(), y))
        gap = torch.zeros_like(step) if until is None else step - until
        c = self.small[0](torch.stack([step / T, gap / T, torch.ones_like(step)], -1).to(h)) + self.label(y)
        for layer in self.layers:
            h, _ = layer(h, c)
        return self.last(h)


def calling(module: nn.Module, x: Tensor, time: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """How a :class:`Net` is called."""
    return module(time, x, cond["label"], until=cond.get("r"))


NULL = {"label": torch.tensor(10)}


def network(**options: Any) -> Any:
    """A wrapped :class:`Net` of random weights on 4x4 images."""
    return wrap(Net(), **{"schedule": BAR, "call": calling, "shape": (1, 4, 4), "classes": 10, "null": NULL, **options})


def data(n: int = 64) -> Images:
    return Images(torch.rand(n, 1, 4, 4) * 2 - 1, torch.arange(n) % 10, 10)


def inputs(n: int = 3) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return torch.randn(n, 1, 4, 4), torch.linspace(0.1, 0.9, n), {"label": torch.arange(n)}


def test_blocks_are_the_largest_list_and_taps_are_what_they_return():
    net, (x, t, cond) = network(), inputs()
    assert net.names == ("layers.0", "layers.1", "layers.2") and net.config.width == 16
    outside: list[Tensor] = []
    handles = [b.register_forward_hook(lambda *hook: outside.append(hook[2][0])) for b in net.module.layers]
    pred, tokens = net(x, t, cond, taps=(2, 1))
    [handle.remove() for handle in handles]
    assert net(x, t, cond).equal(pred) and [tuple(f.shape) for f in tokens] == [(3, 16, 16)] * 2
    assert tokens[0][..., :8].equal(outside[1].flatten(2).mT) and not tokens[0][..., 8:].any()
    assert tokens[1].equal(outside[2].flatten(2).mT)
    assert not any(block._forward_hooks for block in net.blocks)  # nothing stays behind
    tokens[1].sum().backward()
    assert net.module.layers[0].conv.weight.grad is not None and net.module.last.weight.grad is None


def test_blocks_can_be_named_or_given():
    module = Net()
    for chosen in ("layers", list(module.layers), module.layers):
        assert wrap(module, path="edm", blocks=chosen).names == ("layers.0", "layers.1", "layers.2")
    assert wrap(module, path="edm", blocks=[module.last]).names == ("last",)
    assert wrap(module, path="edm", width=5).width == 5
    with pytest.raises(ConfigError, match="did you mean 'layers'"):
        wrap(module, path="edm", blocks="layer")
    with pytest.raises(ConfigError, match="inside the Net"):
        wrap(module, path="edm", blocks=[nn.Linear(2, 2)])


def test_tokens_stay_and_maps_are_flattened():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            h = x.flatten(2).mT
            for layer in self.layers:
                h = layer(h)
            return h.mT.reshape(x.shape)

    net = wrap(Tokens(), path="edm", shape=(4, 2, 3))
    x = torch.randn(2, 4, 2, 3)
    pred, (tokens,) = net(x, torch.ones(2), {}, taps=(1,))
    assert tokens.equal(pred.flatten(2).mT) and net.config.width == 4


def test_the_look_for_the_width_leaves_no_trace():
    module = Net().train()
    module.layers[0].register_forward_pre_hook(lambda *_: None if torch.rand(1) else None)  # draws, as a dropout does
    net = network_of(module)
    assert not module.training and not module.layers[0].training
    before = torch.get_rng_state()
    assert net.config.width == 16 and torch.get_rng_state().equal(before)
    with pytest.raises(ConfigError, match="give width to wrap"):  # noqa: PT012
        assert wrap(Net(), schedule=BAR, shape=(1, 4, 4)).config.width  # not called as a Net is
    with pytest.raises(UnsupportedModel, match="no ModuleList"):
        assert wrap(nn.Linear(2, 2), path="edm", shape=(1, 4, 4)).config.width


def test_guidance_needs_null_and_takes_it():
    x, t, cond = inputs()
    net, (none, c) = network(), (torch.full((3,), 10), cond["label"])
    want = [net.module((t * T - 1), x, y) for y in (c, none)]
    torch.testing.assert_close(guided(net, x, t, cond, net.null(cond), 3.0, "eps"), want[1] + 3 * (want[0] - want[1]))
    fancy = network(null=lambda cond: {"label": cond["label"] * 0 + 10})
    assert fancy.null(cond)["label"].equal(none) and net.null({}) == {}
    bare = network(null=None)
    sampling = Sampling(even(2), "ode")
    assert sample(bare, x, cond, sampling, uncond=bare.null(cond)).shape == x.shape  # nobody guides
    for two_calls in (False, True):
        with pytest.raises(ConfigError, match="give null to wrap"):
            guided(bare, x, t, cond, bare.null(cond), 3.0, two_calls=two_calls)
    with pytest.raises(ConfigError, match="give null to wrap"):
        bare(x, t, {"label": torch.tensor([0, 1, 10])})  # as a source says it
    with pytest.raises(ConfigError, match=r"null holds \['label'\], but the conditions are \['text'\]"):
        net.null({"text": x})


def test_a_sources_null_label_becomes_the_modules_own():
    x, t, _ = inputs()
    net = network(classes=9, null={"label": torch.tensor(0)})
    net(x, t, {"label": torch.tensor([4, 9, 8])})
    assert net.module.seen[-1][2].tolist() == [4, 0, 8]
    plain = network(classes=0, null=None)
    plain(x, t, {"label": torch.tensor([4, 9, 8])})
    assert plain.module.seen[-1][2].tolist() == [4, 9, 8]


def test_times_reach_the_module_as_it_counts_them():
    x, _, cond = inputs()
    t = torch.tensor([0.001, 0.504, 1.0])
    for time, want in {"index": [0, 49, 99], "continuous_index": [0, 49.4, 99], "unit": t.tolist()}.items():
        net = network(time=time)
        net(x, t, cond)
        torch.testing.assert_close(net.module.seen[-1][0].double(), torch.tensor(want).double(), rtol=0, atol=1e-4)
        assert net.module.seen[-1][0].is_floating_point() == (time != "index")
    noisy = wrap(nn.Identity(), path="edm", time="sigma_log")
    assert noisy.time(torch.tensor([0.0, 1.0, 80.0])).isfinite().all()


def test_a_second_time_only_where_the_module_takes_it():
    x, t, cond = inputs()
    with pytest.raises(UnsupportedModel, match="cannot take a second time r"):
        clone(network(), second_time=True)
    with pytest.raises(ConfigError, match="takes_r=True"):
        network()(x, t, cond, r=t / 2)
    net = network(takes_r=True)
    twin = clone(net, second_time=True)
    assert twin(x, t, cond).equal(net(x, t, cond)) and twin.module is not net.module and twin.config.second_time
    assert not twin(x, t, cond, r=t / 2).allclose(net(x, t, cond))
    torch.testing.assert_close(twin.module.seen[-1][1], (t / 2) * T - 1)
    student = hasten.distill(net, MeanFlow(), steps=1, data=data(), fit=FitConfig(iterations=2, batch=8))
    assert student(x, t, cond, r=t / 2).isfinite().all()


def test_copies_share_nothing_and_views_share_the_weights():
    x, t, cond = inputs()
    net = network()
    twin = copy.deepcopy(net)
    assert twin.blocks[0] is twin.module.layers[0] and twin.blocks[0] is not net.blocks[0]
    lora = view(net, LoRA(2))
    assert lora(x, t, cond).equal(net(x, t, cond)) and lora.blocks[0] is not net.blocks[0]
    assert 0 < sum(p.numel() for p in lora.parameters()) < sum(p.numel() for p in net.parameters())
    with torch.no_grad():
        [p.normal_() for p in lora.parameters()]
    plain = merge(lora)
    assert not lora(x, t, cond).allclose(net(x, t, cond))
    torch.testing.assert_close(plain(x, t, cond), lora(x, t, cond))
    fresh = Net()
    fresh.load_state_dict(plain.module.state_dict())  # the module's own file format still fits
    assert network_of(fresh)(x, t, cond).equal(plain(x, t, cond))
    lora(x, t, cond, taps=(2,))[1][0].sum().backward()
    assert all(p.grad is None for p in net.parameters())
    assert any(p.grad is not None and p.grad.any() for p in lora.parameters())


def network_of(module: nn.Module) -> Any:
    return wrap(module, schedule=BAR, call=calling, shape=(1, 4, 4), classes=10, null=NULL)


METHODS = {
    "cm": CM(from_teacher=True, cfg_scale=2.0),
    "dmd2": DMD2(gan_weight=0.01, cfg_scale=2.0, student_every=2),
    "ladd": LADD(),
}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("data_range", [(-1.0, 1.0), (0.0, 1.0)], ids=str)
def test_methods_train_a_wrapped_module(method, lora, data_range, tmp_path):
    teacher = network(data_range=data_range)
    before = copy.deepcopy(teacher.state_dict())
    options: Any = {"clone": "lora", "lora_rank": 2} if lora else {}
    config = FitConfig(iterations=4, batch=8, lr=1e-2, precision="float32", ema=(0.5,), **options)
    student = hasten.distill(teacher, method, steps=1, data=data(), fit=config, out=tmp_path)
    assert type(student.module) is Net and student.module.state_dict().keys() == teacher.module.state_dict().keys()
    after = student.state_dict()
    assert all(v.equal(before[k]) for k, v in teacher.state_dict().items())
    moved = [k for k, v in after.items() if not v.equal(before[k])]
    assert all(v.isfinite().all() for v in after.values())
    assert {f"module.layers.{i}.time.weight" for i in range(3)} <= set(moved)
    assert lora or "module.last.weight" in moved
    x, _, cond = inputs()
    assert sample(student, x, cond, method.sampling(1)).isfinite().all()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_training_a_wrapped_dit_is_training_the_dit(method, lora):
    """Bit for bit, with guidance, taps and adapters: the wrapper adds nothing of its own."""
    dit = native_network(width=16)
    call = lambda module, x, time, cond: module(x, time, cond)  # noqa: E731
    net = wrap(dit, path=RECTIFIED_FLOW, kind="velocity", call=call, shape=(1, 8, 8), classes=10, null=NULL)
    options: Any = {"clone": "lora", "lora_rank": 2} if lora else {}
    config = FitConfig(iterations=3, batch=8, lr=1e-2, precision="float32", ema=(0.5,), **options)
    ours, own = (hasten.distill(n, method, steps=1, data=native_images(), fit=config) for n in (net, dit))
    start, end = dit.state_dict(), own.state_dict()
    assert all(v.equal(end[k]) for k, v in ours.module.state_dict().items())
    assert any(not v.equal(start[k]) for k, v in end.items())


def test_a_cache_holds_a_wrapped_module_too():
    net, (x, _, cond) = network(), inputs()
    with hasten.speed_up(net, hasten.Cache(threshold=5.0)) as fast:
        assert sample(fast, x, cond, Sampling(even(12), "ode")).isfinite().all()
    calls = len(net.module.seen)
    assert 2 <= calls < 12


# --- diffusers' own ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet() -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=4,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_unet_samples_as_diffusers_own_ddim(unet, prediction):
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler: Any = DDIMScheduler(timestep_spacing="trailing", clip_sample=False, prediction_type=prediction)
    scheduler.set_timesteps(10)
    x = noise = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    net = wrap(unet, schedule=scheduler.alphas_cumprod, kind="eps" if prediction == "epsilon" else "v")
    start = noise / net.path.coeffs(torch.tensor(1.0))[1]  # diffusers starts from plain noise
    torch.testing.assert_close(sample(net, start, {}, Sampling(even(10), "ode")), x, rtol=1e-3, atol=1e-3)


def test_gradient_checkpointing_is_the_modules_own(unet):
    net = wrap(copy.deepcopy(unet), schedule=BAR, shape=(1, 8, 8))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.8])

    def gradients() -> list[Tensor]:
        net.zero_grad()
        pred, tokens = net.train()(x, t, {}, taps=(0, 1))
        (pred.square().mean() + sum(f.square().mean() for f in tokens)).backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    plain = gradients()
    net.checkpointing = True
    assert net.checkpointing and any(getattr(m, "gradient_checkpointing", False) for m in net.modules())
    torch.testing.assert_close(gradients(), plain)
    net.checkpointing = False
    assert not any(getattr(m, "gradient_checkpointing", False) for m in net.modules())
    with pytest.raises(UnsupportedModel, match="Net has no enable_gradient_checkpointing"):
        network().checkpointing = True


# --- bad settings -----------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "neither": ({}, "either path"),
    "both": ({"path": "vp", "schedule": BAR}, "either path"),
    "path": ({"path": "vpp"}, "did you mean 'vp'"),
    "kind": ({"path": "vp", "kind": "epsilon"}, "did you mean 'eps'"),
    "time": ({"path": "vp", "time": "units"}, "did you mean 'unit'"),
    "index": ({"path": "vp", "time": "index"}, "schedule=alphas_cumprod"),
    "table": ({"schedule": [0.1, 0.5, 0.9]}, "strictly falling"),
    "range": ({"path": "vp", "data_range": (1.0, 0.0)}, "low below high"),
    "infinite": ({"path": "vp", "data_range": (0.0, float("inf"))}, "low below high"),
    "shape": ({"path": "vp", "shape": (8, 8)}, r"\(C, H, W\)"),
}


@pytest.mark.parametrize("options, message", WRONG.values(), ids=WRONG)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        wrap(Net(), **options)


def test_wrong_modules_and_outputs_are_refused():
    x, t, cond = inputs()
    with pytest.raises(ConfigError, match="not str"):
        wrap("a model", path="vp")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"give shape=\(C, H, W\)"):
        hasten.distill(wrap(Net(), path="vp"), DMD2(gan_weight=0), steps=1)
    with pytest.raises(ConfigError, match="returned dict, .* give output"):
        wrap(Net(), path="vp", call=lambda *a: {"x": x})(x, t, {})
    with pytest.raises(ConfigError, match=r"returned \[3, 1, 2, 4\] for x_t \[3, 1, 4, 4\]"):
        wrap(Net(), path="vp", call=lambda *a: x[:, :, :2])(x, t, {})
    net = wrap(Net(), path="vp", call=lambda *a: x, width=4)
    with pytest.raises(ConfigError, match=r"\[1\] were not called"):
        net(x, t, {}, taps=(1,))


def test_rectified_flow_is_not_taken_for_itself_in_another_range():
    net = wrap(nn.Identity(), path=RECTIFIED_FLOW, kind="velocity", data_range=(0.0, 1.0))
    assert on_path(net, RECTIFIED_FLOW, "velocity") is not net
    same = wrap(nn.Identity(), path=RECTIFIED_FLOW, kind="velocity", data_range=(0.0, 2.0))
    assert on_path(same, RECTIFIED_FLOW, "velocity") is same and same.path is RECTIFIED_FLOW


def test_a_wrapped_network_is_not_saved_as_a_native_one(tmp_path: Any) -> None:
    module = torch.nn.Conv2d(1, 1, 3, padding=1)
    net = wrap(module, path="rectified_flow", kind="velocity", call=lambda m, x, t, c: m(x), shape=(1, 8, 8))
    with pytest.raises(ConfigError, match="save a wrapped module by its own class"):
        save_model(net, tmp_path / "m")
    assert not (tmp_path / "m").exists()
