"""Attention: every kernel against torch's, what is left to torch, undo, and what is refused."""

from __future__ import annotations

import importlib
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.core.errors import ConfigError
from hasten.speed import Attention, Cache, Cast, Compile, Quantize, kernels, speed_up
from hasten.speed import attention as layer
from hasten.speed.compile import _Code, cpp_compiler
from hasten.speed.int8 import Int8Linear
from hasten.speed.softmax import Call, chunked, emulated, error, native, torchs
from tests.test_speed import draw, inputs, relative, same, state, tiny

needs_native = pytest.mark.skipif(kernels.why_not() is not None, reason=f"native kernels: {kernels.why_not()}")
KERNELS = [
    pytest.param(native, marks=needs_native, id="native"),
    pytest.param(chunked(7), id="chunked 7"),
    pytest.param(chunked(1000), id="chunked 1000"),
]
#        batch, heads, kv_heads, L, S, D, E, mask
SHAPES = [
    (1, 2, 2, 64, 128, 64, 64, ""),
    (2, 3, 3, 77, 131, 40, 24, ""),
    (1, 1, 1, 1, 1, 8, 8, ""),
    (2, 2, 2, 100, 100, 128, 128, "causal"),
    (1, 2, 2, 90, 33, 16, 16, "causal"),
    (1, 2, 2, 33, 90, 16, 16, "causal"),
    (2, 3, 3, 50, 257, 72, 96, "keys"),
    (2, 2, 2, 70, 300, 32, 32, "scores"),
    (2, 2, 2, 40, 65, 32, 32, "heads"),
    (1, 2, 2, 20, 30, 8, 8, "queries"),
    (2, 4, 2, 66, 290, 64, 64, ""),
    (1, 6, 2, 40, 40, 24, 24, "keys"),
    (1, 1, 1, 70, 200, 256, 200, ""),
    (1, 2, 1, 300, 1100, 64, 64, ""),  # several blocks of queries and of keys
    (1, 1, 1, 600, 1060, 96, 40, "causal"),
    (1, 1, 1, 45, 1060, 224, 32, "scores"),
    (2, 1, 1, 33, 1, 64, 64, ""),  # one key
]


def made(shape: Any, dtype: torch.dtype = torch.bfloat16, size: float = 1.0, scale: float | None = None) -> Call:
    """Random arguments in the layout of a network: heads inside tokens."""
    B, H, Hk, L, S, D, E, mask = shape
    torch.manual_seed(0)
    sizes = ((L, H, D), (S, Hk, D), (S, Hk, E))
    q, k, v = (size * torch.randn(B, n, heads, d).to(dtype).transpose(1, 2) for n, heads, d in sizes)
    if mask == "keys":
        at: Tensor | None = torch.rand(B, 1, 1, S) > 0.3
        at[-1, ..., : S // 2] = False
        at[0] &= B == 1  # else a sample that sees nothing
    elif mask == "queries":
        at = torch.rand(L, 1) > 0.3
    else:
        at = {"scores": torch.randn(1, 1, L, S).to(dtype), "heads": torch.randn(B, H, 1, S).to(dtype)}.get(mask)
    return Call(q, k, v, at, 0.0, mask == "causal", scale, H != Hk)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_kernel_answers_what_torch_answers(kernel, shape):
    """Masks, causality, cross attention, grouped heads, odd lengths and channels; to bfloat16's rounding."""
    call = made(shape)
    got, want = kernel(call), torchs(call.wide())
    assert got.shape == want.shape and got.dtype == torch.bfloat16
    assert relative(got.float(), want) < 0.006
    if shape[-1] == "keys" and len(got) > 1:
        assert not got[0].any() and not want[0].any()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("size", "scale"), [(30.0, None), (1.0, 0.01), (1e-3, 3.0), (10.0, 1.0)])
def test_large_and_small_scores(kernel, size, scale):
    """Scores in the thousands must not overflow, nor must the shift lose the keys that come late and are larger.

    Chunks round the scores to bfloat16, which shows where they are large: "auto" measures that.
    """
    call = made((1, 2, 2, 60, 600, 32, 32, ""), size=size, scale=scale)
    ramp = torch.linspace(0.1, 3, 600).view(1, 1, -1, 1)
    call = Call(call.q, (call.k * ramp).bfloat16(), call.v, None, 0.0, False, scale, False)
    assert kernel(call).isfinite().all()
    assert relative(kernel(call).float(), torchs(call.wide())) < (0.01 if kernel is native else 0.1)


def test_emulation_rounds_as_much_as_its_format_and_not_more():
    """A mean in k changes nothing, since it is taken out; without the rounding the answer would be exact."""
    call = made((1, 2, 2, 64, 200, 64, 64, ""), torch.float32)
    int8, fp8 = (error(emulated(form), call) for form in ("int8", "fp8"))
    assert 1e-3 < int8 < 0.02 and int8 < fp8 < 0.1
    moved = Call(call.q, call.k + 30.0, call.v, None, 0.0, False, None, False)
    assert error(emulated("int8"), moved) < 2 * int8


# --- the layer ------------------------------------------------------------------------------------------------

FORCED = Attention("chunked", chunk=5)
half = torch.tensor(0.5).expand(4)


def test_undo_is_bit_exact_and_the_calls_are_counted():
    net, (noise, cond, _) = tiny(), inputs()
    before, want = state(net), draw(net, noise, cond)
    up = speed_up(net, FORCED)
    with up as fast:
        got = draw(fast, noise, cond)
    assert relative(got, want) < 1e-5
    counts = up.ledger()["attention"]
    assert counts["calls"] == counts["replaced"] == 2 * 20 and counts["shapes"] == 1 and counts["error"] < 1e-5
    assert same(state(net), before) and torch.equal(draw(net, noise, cond), want)
    assert "forward" not in vars(net) and not layer._engines


@pytest.mark.parametrize("scope", ["blocks", "net"])
def test_compiled_code_keeps_the_route(scope):
    """One graph for all blocks, the kernel inside it; the whole network as one graph too."""
    net, (noise, cond, _) = tiny(), inputs()
    want = draw(net, noise, cond)
    up = speed_up(net, FORCED, Compile(scope=scope, backend="eager"))
    with up as fast:
        got = draw(fast, noise, cond)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert up.ledger()["attention"]["replaced"] == 40
    assert up.ledger()["compile"]["graphs"] == 1


def test_inductor_compiles_around_the_kernels():
    """The whole stack, generated; against the same stack uncompiled."""
    if cpp_compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    net, (noise, cond, _) = tiny(width=64, depth=1), inputs()
    stack = (Quantize(min_side=32), Cast(), FORCED)
    with speed_up(net, *stack) as plain:
        want = plain(noise, half, cond)
    up = speed_up(net, *stack, Compile())
    with up as fast:
        got = fast(noise, half, cond)
    assert up.ledger()["attention"]["replaced"] == 1
    assert relative(got, want) < 0.02


@pytest.mark.parametrize("family", ["flux", "sd15", "z_image", "wan", "sana"])
def test_pipelines_of_many_families(family):
    """Inside diffusers' own processors, with and without masks, under compilation and a cache; undone to the bit."""
    pytest.importorskip("diffusers")
    pipe, call = importlib.import_module("tests.pipelines").FAMILIES[family]()
    seeded = lambda p: p(**call, num_inference_steps=2, output_type="latent",  # noqa: E731
                         generator=torch.Generator().manual_seed(0))[0]  # fmt: skip
    want = seeded(pipe)
    up = speed_up(pipe, FORCED, Compile(backend="eager"), call=call)
    with up as fast:
        got = seeded(fast)
    counts = up.ledger()["attention"]
    assert counts["replaced"] == counts["calls"] > 0
    torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(want), rtol=1e-3, atol=1e-3)
    assert torch.equal(torch.as_tensor(seeded(pipe)), torch.as_tensor(want))


class Attends(nn.Module):
    """A block that calls attention with the arguments given."""

    def __init__(self, **given: Any):
        super().__init__()
        self.linear, self.given = nn.Linear(8, 8), given

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return F.scaled_dot_product_attention(x, x, value=x, **self.given)


class Holds(nn.Module):
    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@torch.no_grad()
def test_what_a_backend_does_not_take_goes_to_torch_and_is_counted():
    net, x = Holds(Attends(), Attends(dropout_p=0.5), Attends(scale=0.3)), torch.randn(2, 3, 9, 8)
    up = speed_up(net, FORCED)
    with up as fast:
        torch.manual_seed(0)
        got = fast(x)
    torch.manual_seed(0)
    torch.testing.assert_close(got, net(x))
    assert (up.ledger()["attention"]["calls"], up.ledger()["attention"]["replaced"]) == (3, 2)
    three = Holds(Attends())
    with pytest.raises(ConfigError, match="none of 1 calls fits 'chunked'"), speed_up(three, FORCED) as fast:
        torch.testing.assert_close(fast(x[0]), three.blocks[0](x[0]))  # [H, L, D]: torch's kernel takes it


def test_auto_takes_the_fastest_within_the_bound(monkeypatch):
    """Times are made up here; the choice, its bound and the sentence of a choice that is always torch's are real."""
    net, (noise, cond, _) = tiny(), inputs()
    speed = {"torch": 3.0, "chunked 4": 1.0, "native": 2.0}
    wrong: dict[str, float] = {}
    order: list[str] = []

    def timed(run: Any, device: Any) -> float:
        run()
        return speed[order.pop(0)]

    def choose(self: Any, call: Call) -> Any:
        order[:] = ["torch", *[n for n in ("native", "chunked 4") if n in self.candidates(call)]] * 3
        return choosing(self, call)

    choosing = layer.Engine.choose
    monkeypatch.setattr(layer, "seconds", timed)
    monkeypatch.setattr(layer.Engine, "choose", choose)
    up = speed_up(net, Attention())
    with up as fast:
        fast(noise, half, cond)
    assert up.ledger()["attention"]["gain"] == 3.0
    speed["chunked 4"] = 2.9
    with pytest.raises(ConfigError, match="torch's kernel was the fastest for all 2 calls"):
        with speed_up(net, Attention()) as fast:
            fast(noise, half, cond)
    speed["chunked 4"] = 1.0
    monkeypatch.setattr(layer, "error", lambda kernel, call: wrong.get("error", 0.1))
    with pytest.raises(ConfigError, match="torch's kernel was the fastest"):
        with speed_up(net, Attention(max_error=0.05)) as fast:
            order.clear()
            fast(noise, half, cond)


def test_another_thread_is_not_routed():
    net, (noise, cond, _) = tiny(), inputs()
    seen: list[float] = []

    def forward(*args: Any) -> Any:
        x = torch.randn(1, 2, 4, 8)
        thread = threading.Thread(target=F.scaled_dot_product_attention, args=(x, x, x))
        thread.start()
        thread.join()
        seen.append(up.ledger()["attention"]["calls"])
        return inner(*args)

    inner, net.blocks[0].forward = net.blocks[0].forward, forward
    up = speed_up(net, FORCED)
    with up as fast:
        fast(noise, half, cond)
    assert seen == [0]


def test_a_gradient_is_refused():
    net, (noise, cond, _) = tiny(), inputs()
    with speed_up(net, FORCED) as fast:
        fast(noise, half, cond)
        inner = Attention("chunked").apply(layer_host(net))
        with torch.enable_grad(), pytest.raises(ConfigError, match="no gradient"):
            x = torch.randn(1, 2, 300, 8, requires_grad=True)
            with layer._Routed(next(iter(layer._engines))):
                F.scaled_dot_product_attention(x, x, x)
        inner()


def layer_host(net: Any) -> Any:
    from hasten.speed.host import host

    return host(net)


def test_bad_settings_and_backends_that_cannot_run_are_refused(monkeypatch):
    for given, words in [
        ({"backend": "nativ"}, "did you mean 'native'"),
        ({"dtype": "float16"}, "dtype of Attention"),
        ({"chunk": -1}, "chunk must be"),
        ({"max_error": 0}, "max_error must be"),
    ]:
        with pytest.raises(ConfigError, match=words):
            Attention(**given)
    with pytest.raises(ConfigError, match="'sage' cannot run, because"):
        speed_up(tiny(), Attention("sage"))
    monkeypatch.setattr(kernels, "why_not", lambda: None)
    with pytest.raises(ConfigError, match=r"not in bfloat16; add Cast\(\)"):
        speed_up(tiny(), Attention("native"))
    speed_up(tiny(), Attention("native"), Cast())
    monkeypatch.setattr(kernels, "why_not", lambda: "there is no C++ compiler; install g++ or name one in CXX")
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler"):
        speed_up(tiny(), Attention("native"), Cast())


@needs_native
def test_native_in_the_whole_stack_beside_a_cache():
    net, (noise, cond, _) = tiny(), inputs()
    before, want = state(net), draw(net, noise, cond)
    stack = (Quantize(min_side=32), Cast(), Attention("native"), Cache(threshold=0.2), Compile(backend="eager"))
    up = speed_up(net, *stack)
    with up as fast:
        assert relative(draw(fast, noise, cond), want) < 0.1
    assert up.ledger()["attention"]["replaced"] > 0
    assert same(state(net), before) and torch.equal(draw(net, noise, cond), want)


@pytest.mark.skipif(not kernels.int8_ready(), reason="the int8 kernel needs AMX")
@pytest.mark.parametrize(("rows", "inside", "outside"), [(1, 8, 8), (5, 36, 7), (300, 100, 77), (33, 128, 640)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_int8_kernel_is_the_int8_formula(rows, inside, outside, dtype):
    """Against the same layer through torch._int_mm; rows and columns that do not fill a tile."""
    layer, x = Int8Linear(nn.Linear(inside, outside)), torch.randn(2, rows, inside).to(dtype)
    with torch.no_grad():
        got, layer.fused = layer(x), False
        want = layer(x)
    assert got.dtype == dtype and got.shape == want.shape
    assert relative(got.float(), want.float()) < (1e-4 if dtype == torch.float32 else 4e-3)


class Gelu(nn.Module):
    def __init__(self, linear: nn.Module, form: str):
        super().__init__()
        self.linear, self.form = linear, form

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.linear(x), approximate=self.form)


@pytest.mark.parametrize("form", ["tanh", "none"])
@pytest.mark.parametrize("small", [True, False])
def test_a_gelu_is_rewritten_into_the_same_function(form, small):
    """Inside the int8 kernel where there is one; only the tanh form, and no matter how large the input is."""
    linear: nn.Module = Int8Linear(nn.Linear(32, 48)) if small else nn.Identity()
    net = Gelu(linear, form)
    graphs: list[str] = []
    call = _Code("eager", 1)(net.forward)
    before = torch._dynamo.lookup_backend
    x = torch.randn(2, 9, 32) * torch.logspace(-3, 2, 9)[:, None]

    def spy(name: str) -> Any:
        def eager(graph: Any, inputs: Any) -> Any:
            graphs.append(graph.code)
            return before("eager")(graph, inputs)

        return eager

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._dynamo, "lookup_backend", spy)
        torch.testing.assert_close(call(x), net(x), rtol=1e-3, atol=1e-4)
    assert ("gelu" in graphs[0]) == (form == "none")
    assert ("sigmoid" in graphs[0]) == (form == "tanh" and not (small and getattr(linear, "fused", False)))
