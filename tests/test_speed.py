"""Every transform: YAML round trip, bit-exact undo, proof that it acted, request isolation; what is refused."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from itertools import combinations
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from hasten.core.errors import ConfigError, NotReversible, UnsupportedModel
from hasten.core.method import Sampling, even
from hasten.core.path import EDM, RECTIFIED_FLOW, TRIG, VP
from hasten.core.request import current, request
from hasten.core.sample import nfe, sample
from hasten.models.dit import DiT, DiTConfig
from hasten.speed import TRANSFORMS, Cache, Cast, Compile, Quantize, as_dict, from_dict, speed_up
from hasten.speed.host import host
from hasten.speed.int8 import Int8Linear
from tests.oracle import Ideal, Mixture

STEPS = 20
LAYERS: dict[str, Any] = {
    "quantize": Quantize(min_side=32),
    "cast": Cast(),
    "cache": Cache(threshold=0.2),
    "compile": Compile(backend="eager"),
    "compile_net": Compile(scope="net", backend="eager"),
}
STACKS: list[tuple[str, ...]] = [
    *((a,) for a in LAYERS),
    *(
        (a, b)
        for a, b in combinations(LAYERS, 2)
        if (a, b) not in [("cache", "compile_net"), ("compile", "compile_net")]
    ),
    ("quantize", "cast", "cache", "compile"),
]
every_stack = pytest.mark.parametrize("names", STACKS, ids=["+".join(s) for s in STACKS])


def tiny(**fields: Any) -> Any:
    """A network that is no zero at its start, whose linears qualify for int8 at min_side=32."""
    net = DiT(DiTConfig(**{"size": (4, 4), "width": 32, "depth": 2, "heads": 2, "classes": 3, **fields}))
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "modulation" in name or name.startswith("last"):
                p.normal_(std=0.1)
    return net


def inputs(batch: int = 4) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    label = torch.arange(batch) % 3
    return torch.randn(batch, 1, 4, 4), {"label": label}, {"label": torch.full_like(label, 3)}


def draw(net: Any, noise: Tensor, cond: dict[str, Tensor], steps: int = STEPS, **kwargs: Any) -> Tensor:
    return sample(net, noise, cond, Sampling(even(steps)), **kwargs)


def state(net: nn.Module) -> dict[str, tuple[int, int, Tensor]]:
    """Identity, address and bits of every parameter and buffer."""
    everything = [*net.named_parameters(), *net.named_buffers()]
    return {name: (id(p), p.data_ptr(), p.detach().clone()) for name, p in everything}


def same(a: dict[str, tuple[int, int, Tensor]], b: dict[str, tuple[int, int, Tensor]]) -> bool:
    return a.keys() == b.keys() and all(
        a[k][:2] == b[k][:2] and a[k][2].dtype == b[k][2].dtype and torch.equal(a[k][2], b[k][2]) for k in a
    )


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


# --- all of them ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transform",
    [*LAYERS.values(), Quantize(min_side=64, keep=False), Cache("easycache", threshold=0.07, warmup=3, max_skips=2)],
    ids=repr,
)
def test_yaml_round_trip(transform):
    text = yaml.safe_dump(as_dict(transform))
    assert from_dict(yaml.safe_load(text)) == transform
    assert type(transform) is TRANSFORMS[yaml.safe_load(text)["name"]]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "cachee"}, "did you mean 'cache'"),
        ({"name": "cache", "treshold": 0.1}, "did you mean 'threshold'"),
        ({"name": "cache", "threshold": 0}, "above 0"),
        ({"name": "cache", "threshold": "0.1"}, "must be a number"),
        ({"name": "cache", "warmup": 1}, "warmup must be a whole number from 2"),
        ({"name": "cache", "policy": "easycach"}, "did you mean 'easycache'"),
        ({"name": "cast", "dtype": "bfloat"}, "did you mean 'bfloat16'"),
        ({"name": "quantize", "dtype": "int9"}, "did you mean 'int8'"),
        ({"name": "quantize", "min_side": 0}, "min_side must be"),
        ({"name": "compile", "scope": "block"}, "did you mean 'blocks'"),
        ({"threshold": 0.1}, "needs a name"),
    ],
    ids=str,
)
def test_bad_configs_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        from_dict(values)


@every_stack
def test_undo_is_bit_exact_and_each_layer_acts(names):
    """Given in reverse, applied in canonical order; the output changes inside unless only code was traced."""
    net, (noise, cond, _) = tiny(depth=1 if "compile_net" in names else 2), inputs()
    half = torch.tensor(0.5).expand(4)  # strided as in sample, for the compiler tells strides apart
    net.embed.weight.grad = torch.ones_like(net.embed.weight)
    before, want = state(net), draw(net, noise, cond)
    up = speed_up(net, *[LAYERS[n] for n in reversed(names)])
    with up as fast:
        got = draw(fast, noise, cond)
        assert got.dtype == want.dtype and not got.requires_grad
        direct = fast(noise, half, cond)
        assert direct.dtype == torch.float32 and not direct.requires_grad
    assert same(state(net), before)
    assert torch.equal(draw(net, noise, cond), want)
    assert "forward" not in vars(net) and not any("forward" in vars(b) for b in net.blocks)
    assert net.embed.weight.grad is not None and net.embed.weight.grad.dtype == torch.float32
    assert net(noise, half, cond).requires_grad
    if all(n.startswith("compile") for n in names):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    else:
        assert not torch.equal(got, want) and relative(got, want) < 0.1
    ledger, order = up.ledger(), ["quantize", "cast", "cache", "compile"]
    assert list(ledger) == [n for n in order if n in {LAYERS[m].name for m in names}]
    for counts in ledger.values():
        assert all(n > 0 for n in counts.values()), ledger


def test_undo_after_an_error_inside_and_a_half_applied_stack():
    net, (noise, cond, _) = tiny(), inputs()
    before, want = state(net), draw(net, noise, cond)
    with pytest.raises(ZeroDivisionError), speed_up(net, *[LAYERS[n] for n in STACKS[-1]]):
        raise ZeroDivisionError  # and the layers that never acted do not hide it
    assert same(state(net), before)

    class Breaks(Compile):
        def apply(self, at):
            raise MemoryError

    with pytest.raises(MemoryError), speed_up(net, LAYERS["quantize"], LAYERS["cast"], Breaks(backend="eager")):
        pass
    assert same(state(net), before) and torch.equal(draw(net, noise, cond), want)
    with speed_up(net, LAYERS["quantize"]):  # nothing is left that would refuse the next one
        pass


def test_combinations_that_cannot_work_are_refused_before_anything_changes():
    net = tiny()
    before = state(net)
    for transforms, words in [
        ((Cast(), Cast()), "2 times"),
        ((Cache(threshold=0.1), Cache(threshold=0.2)), "2 times"),
        ((Cache(), Compile(scope="net", backend="eager")), "cache's decisions"),
        ((Cast(keep=False), Quantize(min_side=32)), "agree on keep"),
        ((), "nothing to do"),
        (("int8",), "takes transforms"),
        ((Cast,), "takes transforms"),
    ]:
        with pytest.raises(ConfigError, match=words):
            speed_up(net, *transforms)
    with pytest.raises(UnsupportedModel, match="blocks"):
        speed_up(nn.Linear(2, 2), Cast())
    with (
        speed_up(net, Cast()),
        pytest.raises(ConfigError, match="sped up already"),
        speed_up(net, Quantize(min_side=32)),
    ):
        pass
    assert same(state(net), before)


# --- cast and quantize ----------------------------------------------------------------------------------------


def test_cast_halves_the_weights_and_keeps_times():
    net, (noise, cond, _) = tiny(), inputs()
    want = net(noise, torch.full((4,), 0.5), cond).detach()
    seen = []
    net.time.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with speed_up(net, Cast()) as fast:
        assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
        out, features = fast(noise, torch.full((4,), 0.5), cond, taps=(0,))
    assert seen == [torch.float32] and out.dtype == features[0].dtype == torch.float32
    assert 0 < relative(out, want) < 0.02
    with pytest.raises(ConfigError, match="already"):
        speed_up(tiny().to(torch.bfloat16), Cast())

    class Sees(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(2, 2)])

        def forward(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
            seen.extend([x_t.dtype, t.dtype, cond["text"].dtype, cond["label"].dtype])
            return self.blocks[0](x_t)

    seen.clear()
    with speed_up(Sees(), Cast()) as fast:
        x = torch.zeros(1, 2, dtype=torch.float64)
        assert fast(x, x[0], {"text": x.float(), "label": torch.zeros(1, dtype=torch.int64)}).dtype == torch.float64
    assert seen == [torch.bfloat16, torch.float64, torch.bfloat16, torch.int64]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_linear_is_close_even_with_outlier_tokens_and_channels(bias, dtype):
    """Scales per token and per channel: one huge row of x or of the weight costs the others nothing."""
    linear = nn.Linear(96, 40, bias=bias)
    with torch.no_grad():
        linear.weight[3] *= 1000
    x = torch.randn(2, 9, 96)
    x[1, 4] *= 1000
    x[0, 0] = 0
    with torch.no_grad():
        want, got = linear(x), Int8Linear(linear)(x.to(dtype))
    assert got.dtype == dtype and got.shape == want.shape
    got, want = got.float().flatten(0, 1), want.flatten(0, 1)  # token 13 and channel 3 are the outliers
    tokens = [relative(got[i, 4:], want[i, 4:]) for i in range(1, 18)]
    channels = [relative(got[:13, i], want[:13, i]) for i in range(40)]
    assert max(tokens) < 0.03 and max(channels) < 0.03, (tokens, channels)
    exact = torch.zeros(40) if linear.bias is None else linear.bias
    torch.testing.assert_close(got[0], exact.detach(), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(("rows", "inside", "outside"), [(1, 8, 8), (5, 33, 7), (40, 96, 64)])
def test_int8_linear_is_its_formula(rows, inside, outside):
    """round(v 127 / max|v|) on both sides, in float64; odd shapes and single rows too."""
    linear, x = nn.Linear(inside, outside), torch.randn(rows, inside)

    def rounded(v: Tensor) -> Tensor:
        step = v.abs().amax(dim=1, keepdim=True).double() / 127
        return (v.double() / step).round() * step

    with torch.no_grad():
        want = rounded(x) @ rounded(linear.weight).T + linear.bias.double()
        torch.testing.assert_close(Int8Linear(linear)(x).double(), want, rtol=1e-5, atol=1e-5)


def test_quantize_chooses_the_blocks_and_leaves_modulation():
    net = tiny(text_dim=8)
    up = speed_up(net, Quantize(min_side=32))
    with up:
        small = {name for name, m in net.named_modules() if isinstance(m, Int8Linear)}
    streams = [f"blocks.{i}.{stream}" for i in (0, 1) for stream in ("image", "text")]
    assert small == {f"{s}.{layer}" for s in streams for layer in ("qkv", "out", "up", "down")}
    counts = up.ledger()["quantize"]
    assert (counts["layers"], counts["of"]) == (16, 20) and 0 < counts["share"] < 1 and counts["bytes_saved"] > 0
    with pytest.raises(ConfigError, match=r"largest, blocks\.\d\.image\.\w+, is 32x\d+ and min_side is 512"):
        speed_up(tiny(), Quantize())


def test_a_linear_at_two_places_is_quantized_once():
    net, (noise, cond, _) = tiny(), inputs()
    first, second = net.blocks[0], net.blocks[1]
    assert isinstance(first, nn.Module)
    second.get_submodule("image").qkv = first.get_submodule("image.qkv")
    want = draw(net, noise, cond)
    up = speed_up(net, Quantize(min_side=32))
    with up as fast:
        assert first.get_submodule("image.qkv") is second.get_submodule("image.qkv")
        assert relative(draw(fast, noise, cond), want) < 0.1
    assert up.ledger()["quantize"]["layers"] == 7
    assert torch.equal(draw(net, noise, cond), want)


def test_int8_has_no_gradient_and_says_so():
    net, (noise, cond, _) = tiny(), inputs()
    undo = Quantize(min_side=32).apply(host(net))
    with pytest.raises(ConfigError, match="no gradient"):
        net(noise, torch.full((4,), 0.5), cond)
    undo()
    net(noise, torch.full((4,), 0.5), cond).sum().backward()


@pytest.mark.parametrize("names", [("quantize",), ("cast",), ("quantize", "cast"), ("quantize", "cast", "cache")])
def test_keep_false_drops_the_originals(names):
    """Nobody holds the originals any more, and what is left still runs."""
    net, (noise, cond, _) = tiny(), inputs()
    lost = [StorageWeakRef(b.image.qkv.weight.untyped_storage()) for b in net.blocks] if "quantize" in names else []
    lost += [StorageWeakRef(net.embed.weight.untyped_storage())] if "cast" in names else []
    want = draw(net, noise, cond)
    size = sum(t.numel() * t.element_size() for t in [*net.parameters(), *net.buffers()])
    give = {"quantize": Quantize(min_side=32, keep=False), "cast": Cast(keep=False), "cache": LAYERS["cache"]}
    with pytest.raises(NotReversible, match="keep=False"), speed_up(net, *[give[n] for n in names]) as fast:
        gc.collect()
        assert all(storage.expired() for storage in lost)
        left = sum(t.numel() * t.element_size() for t in [*net.parameters(), *net.buffers()])
        assert left < 0.75 * size
        draw(fast, noise, cond)
    assert 0 < relative(draw(net, noise, cond), want) < 0.1  # changed for good, and still at work


# --- cache ----------------------------------------------------------------------------------------------------


class Counted(nn.Module):
    """A denoiser that counts its computed calls; the times of each are in ``times``."""

    def __init__(self, net: Any):
        super().__init__()
        self.net, self.path, self.kind = net, net.path, net.kind
        self.blocks = nn.ModuleList([nn.Identity()])
        self.times: list[float] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: Any, **kwargs: Any) -> Any:
        self.times.append(float(t.flatten()[0]))
        return self.net(x_t, t, cond, **kwargs)


LAW = Mixture([-1.0, 0.8], [0.3, 0.2], [0.4, 0.6])


def ideal(path=RECTIFIED_FLOW, kind: Any = "velocity") -> Any:
    return Counted(Ideal(LAW, path, kind))


def test_a_skip_is_a_call_that_is_not_made_and_the_ends_are_computed():
    net, noise = ideal(), torch.randn(64, 1)
    want = draw(net, noise, {}, 50)
    net.times.clear()
    up = speed_up(net, Cache(threshold=0.1, warmup=3, max_skips=2))
    with up as fast:
        got = draw(fast, noise, {}, 50)
    counts = up.ledger()["cache"]
    assert counts["calls"] == 50 and counts["reused"] == 50 - len(net.times) > 5
    assert counts["hit_rate"] == counts["reused"] / 50
    steps = [round((1 - t) * 50) for t in net.times]
    assert steps[:3] == [0, 1, 2] and steps[-1] == 49
    assert max(b - a for a, b in zip(steps, steps[1:], strict=False)) == 3  # two in a row, no more
    assert 0 < relative(got, want) < 0.05


@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.4])
def test_the_threshold_orders_hits_and_error(threshold):
    """The rule by hand: A += k d_in / |out| from the times and states of the run itself."""
    net, noise = ideal(), torch.randn(64, 1)
    calls: list[tuple[Tensor, Tensor]] = []
    up = speed_up(net, Cache(threshold=threshold, max_skips=99))
    with up as fast:
        inner = fast.forward

        def spy(x_t: Tensor, t: Tensor, cond: Any, **kwargs: Any) -> Tensor:
            out = inner(x_t, t, cond, **kwargs)
            calls.append((x_t.clone(), out.clone()))
            return out

        fast.forward = spy
        draw(fast, noise, {}, 50)
        fast.forward = inner
    mean = lambda v: float(v.abs().mean())  # noqa: E731
    want, rate, last, error = [], None, calls[0], 0.0
    for i, (x, out) in enumerate(calls):
        if i and rate is not None:
            error += rate * mean(x - calls[i - 1][0]) / mean(last[1])
        if rate is not None and 2 <= i < 49 and error < threshold:
            continue
        want.append(i)
        if i:
            rate = mean(out - last[1]) / mean(x - last[0])
        last, error = (x, out), 0.0
    assert [round((1 - t) * 50) for t in net.times] == want
    assert up.ledger()["cache"]["reused"] == 50 - len(want) > 0


@pytest.mark.parametrize(
    ("path", "kind"),
    [(RECTIFIED_FLOW, "x0"), (RECTIFIED_FLOW, "eps"), (TRIG, "v"), (TRIG, "velocity"), (VP, "v"), (VP, "velocity"),
     (EDM, "x0")],
    ids=lambda p: getattr(p, "name", p),
)  # fmt: skip
def test_a_reused_prediction_is_the_held_pair_in_every_kind(path, kind):
    """Data at one point: x0 and eps are constant along a trajectory, so that reusing them costs nothing."""
    net: Any = Counted(Ideal(Mixture([0.7], [1e-3], [1.0]), path, kind))
    noise = torch.randn(16, 1, dtype=torch.float64)
    times = tuple(0.95 - 0.045 * i for i in range(20))
    want = sample(net, noise, {}, Sampling(times))
    net.times.clear()
    with speed_up(net, Cache(threshold=1e6)) as fast:
        got = sample(fast, noise, {}, Sampling(times))
    assert len(net.times) < 10
    torch.testing.assert_close(got, want, rtol=0, atol=5e-3)


def test_a_reused_velocity_on_rectified_flow_moves_with_the_sample():
    net, x = ideal(), torch.linspace(-2, 2, 8)[:, None]
    with speed_up(net, Cache(threshold=1e6)) as fast, request(10):
        outs = [fast(x * s, torch.full((8,), t), {}) for s, t in ((1.0, 0.9), (1.1, 0.8), (1.3, 0.7))]
    assert len(net.times) == 2
    torch.testing.assert_close(outs[2], outs[1] + 0.2 * x)


def test_what_the_caller_writes_into_its_tensors_does_not_reach_the_cache():
    clean, dirty = [], []
    for outs, write in ((clean, False), (dirty, True)):
        net, x = ideal(), torch.linspace(-2, 2, 8)[:, None]
        with speed_up(net, Cache(threshold=0.1)) as fast, request(30):
            for i in range(30):
                mine = x * (1 + 0.01 * i)
                out = fast(mine, torch.full((8,), 0.9 - 0.02 * i), {})
                outs.append(out.clone())
                if write:
                    out.fill_(7.0)
                    mine.fill_(7.0)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


@torch.no_grad()
def test_taps_are_always_computed():
    net, (noise, cond, _) = tiny(), inputs()
    calls = [(noise * (1 - i / 20), torch.full((4,), 1 - i / 10), cond) for i in range(10)]
    want = [net(*call, taps=(0, 1)) for call in calls]
    with speed_up(net, Cache(threshold=1e6)) as fast:
        draw(fast, noise, cond)
        with request(10):
            got = [fast(*call, taps=(0, 1)) for call in calls]
    for (out, features), (out2, features2) in zip(got, want, strict=True):
        assert torch.equal(out, out2) and all(torch.equal(a, b) for a, b in zip(features, features2, strict=True))


@pytest.mark.parametrize(("rule", "two_calls"), [("ode", False), ("ode", True), ("heun", False), ("heun", True)])
def test_guidance_and_heun(rule, two_calls):
    """The branches do not mix, and heun's two looks at a time are one step."""
    net, (noise, cond, uncond) = tiny(), inputs()
    sampling = Sampling(even(STEPS), rule, cfg_scale=3.0)
    want = sample(net, noise, cond, sampling, uncond=uncond, two_calls=two_calls)
    up = speed_up(net, Cache(threshold=0.2))
    with up as fast:
        got = sample(fast, noise, cond, sampling, uncond=uncond, two_calls=two_calls)
        whole = up.ledger()["cache"]
        sample(fast, noise, cond, sampling, uncond=uncond, two_calls=two_calls, interval=(0.3, 0.7))
    assert whole["calls"] == nfe(sampling) // (1 if two_calls else 2) and whole["reused"] > 0
    assert relative(got, want) < 0.1


def test_heun_looks_twice_at_a_time_and_that_is_one_step():
    """Counting calls as steps would take the second half of the run for its end, and compute all of it."""
    net = ideal()
    with speed_up(net, Cache(threshold=1e6)) as fast:
        sample(fast, torch.randn(64, 1), {}, Sampling(even(50), "heun"))
    late = [t for t in net.times if 0.04 < t < 0.5]
    assert 0 < len(late) < 15 and net.times[-1] == pytest.approx(0.02)


def test_a_guidance_interval_that_changes_the_batch_starts_again():
    net, (noise, cond, uncond) = Counted(tiny()), inputs()
    with speed_up(net, Cache(threshold=1e6, max_skips=99)) as fast:
        draw(fast, noise, cond, 30)
        plain = len(net.times)
        net.times.clear()
        sampling = Sampling(even(30), cfg_scale=2.0)
        sample(fast, noise, cond, sampling, uncond=uncond, interval=(0.3, 0.7))
    assert plain == 3  # warm-up and the last
    assert len(net.times) == 3 + 2 * 2  # and two at each change of shape, for k needs two


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_few_steps_are_refused(steps):
    net, (noise, cond, _) = tiny(), inputs()
    with pytest.raises(ConfigError, match=f"request of {steps} steps leaves nothing"), speed_up(net, Cache()) as fast:
        draw(fast, noise, cond, steps)
    with pytest.raises(ConfigError, match="more than 10 steps"), speed_up(net, Cache(warmup=9)) as fast:
        draw(fast, noise, cond, 10)


def test_an_inert_cache_is_an_error_that_names_a_threshold_that_acts():
    net, (noise, cond, _) = tiny(), inputs()
    with pytest.raises(ConfigError, match=r"0 of 20 calls were reused at threshold 1e-09; .* was") as caught:
        with speed_up(net, Cache(threshold=1e-9)) as fast:
            draw(fast, noise, cond)
    assert "estimated change" in str(caught.value)
    named = float(str(caught.value).split("was ")[1].split(",")[0])
    assert named < 0.1
    with speed_up(net, Cache(threshold=1.1 * named)) as fast:
        draw(fast, noise, cond)
    with pytest.raises(ConfigError, match=r"not called inside a request \(1 calls outside\)"):
        with speed_up(net, Cache()) as fast:
            fast(noise, torch.full((4,), 0.5), cond)


# --- requests -------------------------------------------------------------------------------------------------


class Abort(Exception):
    pass


def test_aborted_reshaped_and_outside_calls_leave_the_next_request_bit_exact():
    net, (noise, cond, _) = tiny(), inputs()
    with speed_up(net, Cache(threshold=0.2)) as fast:
        want = draw(fast, noise, cond)
        inner, seen = fast.forward, []

        def aborts(*args: Any, **kwargs: Any) -> Any:
            seen.append(1)
            if len(seen) == 9:
                raise Abort
            return inner(*args, **kwargs)

        fast.forward = aborts
        with pytest.raises(Abort):
            draw(fast, noise, cond)
        fast.forward = inner
        assert current() is None
        assert torch.equal(draw(fast, noise, cond), want)
        draw(fast, *inputs(7)[:2], STEPS)
        assert torch.equal(draw(fast, noise, cond), want)
        fast(noise, torch.full((4,), 0.5), cond)
        assert torch.equal(draw(fast, noise, cond), want)
        with request(STEPS):  # a request inside another
            fast(noise, torch.full((4,), 1.0), cond)
            assert torch.equal(draw(fast, noise, cond), want)


def test_interleaved_requests_are_bit_exact():
    """Two threads take turns, call by call, on one network with different samples of one shape."""
    net = tiny()
    jobs = [inputs()[:2], inputs()[:2]]
    up = speed_up(net, Cache(threshold=0.2))
    with up as fast:
        want = [draw(fast, *job) for job in jobs]
        alone = up.ledger()["cache"]
        barrier, inner, got = threading.Barrier(2, timeout=20), fast.forward, [torch.empty(0)] * 2

        def turns(*args: Any, **kwargs: Any) -> Any:
            barrier.wait()
            return inner(*args, **kwargs)

        fast.forward = turns

        def work(i: int) -> None:
            got[i] = draw(fast, *jobs[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        fast.forward = inner
        both = up.ledger()["cache"]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert both["reused"] == 2 * alone["reused"] > 0 and both["calls"] == 2 * alone["calls"]


def test_state_dies_with_the_request():
    net, (noise, cond, _) = tiny(), inputs()
    with speed_up(net, Cache(threshold=0.2)) as fast:
        draw(fast, noise, cond)
        with request(STEPS) as mine:
            fast(noise, torch.full((4,), 1.0), cond)
            branch = next(v for v in mine.state.values() if hasattr(v, "past"))
            held = weakref.ref(branch.past[-1].out)
        del mine, branch
        gc.collect()
        assert held() is None


# --- compile --------------------------------------------------------------------------------------------------


def test_blocks_share_one_graph_and_cache_hits_do_not_compile_again():
    net, (noise, cond, _) = tiny(depth=6), inputs()
    up = speed_up(net, Compile(backend="eager"), Cache(threshold=0.2))
    with up as fast:
        draw(fast, noise, cond)
        first = up.ledger()
        draw(fast, noise, cond)
        second = up.ledger()
    assert first["compile"]["graphs"] == second["compile"]["graphs"] == 1
    assert 0 < first["cache"]["reused"] and first["compile"]["runs"] == 6 * (STEPS - first["cache"]["reused"])


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear, self.gain = nn.Linear(width, width), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.linear(x).tanh()


class Chain(nn.Module):
    """The smallest network with blocks."""

    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_many_compiled_networks_do_not_exhaust_a_shared_limit():
    """Twenty of one class, more than the limit asked for, and than torch's own."""
    nets = [Chain(Residual(i)) for i in range(1, 21)]
    ups = [speed_up(net, Compile(backend="eager")) for net in nets]
    for i, (up, net) in enumerate(zip(ups, nets, strict=True)):
        x = torch.randn(2, i + 1)
        want = net(x, x, {}).detach()
        with up as fast:
            torch.testing.assert_close(fast(x, x, {}), want)
        assert up.ledger()["compile"] == {"graphs": 1, "runs": 1}


def test_compile_that_did_nothing_is_an_error():
    net = tiny()
    with pytest.raises(ConfigError, match="no compiled code ran"), speed_up(net, Compile(backend="eager")):
        pass
    with torch._dynamo.config.patch(disable=True), pytest.raises(ConfigError, match="switched off"):
        speed_up(net, Compile(backend="eager"))


def test_a_block_that_cannot_be_one_graph_is_refused():
    class Breaks(nn.Module):
        def forward(self, x: Tensor, *rest: Any) -> Any:
            if x.sum() > 0:
                x = x + 1
            return x, None

    net, (noise, cond, _) = tiny(), inputs()
    net.blocks[0] = Breaks()
    with (
        pytest.raises(ConfigError, match="Compile: torch.compile failed"),
        speed_up(net, Compile(backend="eager")) as fast,
    ):
        draw(fast, noise, cond)
    draw(net, noise, cond)


def test_without_a_compiler_the_sentence_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler"):
        speed_up(tiny(), Compile())
    speed_up(tiny(), Compile(backend="eager"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler"):
        speed_up(tiny(), Compile())


def test_inductor_compiles_an_int8_bf16_block():
    """The one real compilation of this file: one block of the whole stack, against the same stack uncompiled."""
    from hasten.speed.compile import cpp_compiler

    if cpp_compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    net, x = Chain(Residual(32)), torch.randn(4, 32)
    twin = copy.deepcopy(net)
    with speed_up(twin, Quantize(min_side=32), Cast()) as plain:
        want = plain(x, x, {})
    up = speed_up(net, Quantize(min_side=32), Cast(), Compile())
    with up as fast:
        got = fast(x, x, {})
    assert up.ledger()["compile"] == {"graphs": 1, "runs": 1}
    assert relative(got, want) < 0.02
