"""What is fused in a compiled graph: the kernels against their formulas, and the same numbers where nothing fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.core.errors import ConfigError
from hasten.speed import Cast, Compile, Quantize, kernels, speed_up
from hasten.speed.compile import cpp_compiler
from hasten.speed.fuse import fuse, fuse_linears, fuse_rotations
from hasten.speed.int8 import Int8Linear
from hasten.speed.rotate import rotate

int8 = pytest.mark.skipif(not kernels.int8_ready(), reason="the int8 kernel needs AMX")
avx512 = pytest.mark.skipif(kernels.why_not() is not None, reason=f"the kernels: {kernels.why_not()}")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """diffusers' ``apply_rotary_emb`` of adjacent channels, word for word."""
    real, imag = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    around = torch.stack([-imag, real], dim=-1).flatten(3)
    return (x.float() * cos + around.float() * sin).to(x.dtype)


# --- the kernels --------------------------------------------------------------------------------------------------


@int8
@DTYPES
@pytest.mark.parametrize(("rows", "widths"), [(1, (8,)), (37, (64, 128, 36)), (300, (192,)), (1100, (640, 64))])
def test_linears_together_are_the_linears_alone_bit_for_bit(rows, widths, dtype):
    """Parts of the input with strides of their own, outputs that do not fill a tile, several pieces of rows."""
    xs = [torch.randn(rows, n + 3).to(dtype)[:, :n] for n in widths]
    layers = [Int8Linear(nn.Linear(sum(widths), n)) for n in (33, 96, 5)]
    gelus = [False, True, False]
    lists = [[getattr(layer, k) for layer in layers] for k in ("packed", "scale", "bias")]
    got = torch.ops.hasten.int8_linears(xs, *lists, gelus)
    for out, layer, gelu in zip(got, layers, gelus, strict=True):
        want = torch.ops.hasten.int8_linear(torch.cat(xs, 1), layer.packed, layer.scale, layer.bias, gelu)
        assert torch.equal(out, want)


@avx512
@DTYPES
@pytest.mark.parametrize("dim", [2, 6, 16, 40, 128])
def test_the_rotation_is_its_formula(dim, dtype):
    """Two parts along the second dimension, the norm with a weight, without one, and no norm; strided input."""
    a, b = torch.randn(2, 3, 5, dim).to(dtype).transpose(1, 2), torch.randn(2, 4, 3, dim).to(dtype)
    cos, sin, weight = torch.randn(1, 9, 1, dim), torch.randn(1, 9, 1, dim), torch.rand(dim) + 0.5
    for eps, weights in ((1e-6, [weight, weight.to(dtype)]), (0.1, [None, None]), (None, [None, None])):
        normed = [x.float() if eps is None else F.rms_norm(x.float(), (dim,), None, eps) for x in (a, b)]
        normed = [x if w is None else x * w.float() for x, w in zip(normed, weights, strict=True)]
        got = rotate([a, b], weights, eps, cos, sin, 1)
        assert got.dtype == dtype and got.shape == (2, 9, 3, dim)
        assert relative(got, turned(torch.cat(normed, 1), cos, sin)) < (1e-6 if dtype == torch.float32 else 4e-3)


def test_operators_say_where_they_cannot_run(monkeypatch):
    monkeypatch.setattr(kernels, "why_not", lambda: "this CPU has no AVX-512 BF16")
    monkeypatch.setattr(kernels, "int8_ready", lambda: False)
    x = torch.randn(1, 2, 1, 8)
    with pytest.raises(ConfigError, match="does not run here, because this CPU has no AVX-512"):
        rotate([x], [None], None, x, x, 1)
    with pytest.raises(ConfigError, match="does not run here: this CPU has no AVX-512"):
        torch.ops.hasten.int8_linears([x[0, :, 0]], [x[0, :, 0].to(torch.int8)], [x[0, 0, 0]], [x[0, 0, 0]], [False])


# --- finding it in a graph ----------------------------------------------------------------------------------------


class Rope(nn.Module):
    """Query and key of a joint attention: norms, a concatenation of two streams, a rotation."""

    def __init__(self, join: int | None = 1, eps: float | None = 1e-6, shared: bool = False, write: bool = False):
        super().__init__()
        self.q, self.added = nn.RMSNorm(16, eps), nn.RMSNorm(16, eps)
        self.q.weight.data.uniform_(0.5, 1.5)
        self.join, self.shared, self.write = join, shared, write

    def forward(self, x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Any:
        q = self.q(x)
        if self.join is not None:
            q = torch.cat([self.added(y), q], dim=self.join)
        if self.write:
            x.mul_(2)
        out = turned(q, cos, sin)
        return (out, q) if self.shared else out


def graph_of(net: nn.Module, *args: Tensor) -> tuple[Any, Any, dict[str, int]]:
    """What the fused graph and the network give, and how often each operator of ours is in the graph."""
    found: dict[str, int] = {}

    def backend(graph: Any, inputs: Any) -> Any:
        fuse(graph)
        for node in graph.graph.nodes:
            name = str(node.target)
            if name.startswith("hasten."):
                found[name.split(".")[1]] = found.get(name.split(".")[1], 0) + 1
            elif getattr(node.target, "__name__", "") in ("rms_norm", "cat", "stack"):
                found[node.target.__name__] = found.get(node.target.__name__, 0) + 1
        return graph.forward

    torch._dynamo.reset()
    got = torch.compile(net, backend=backend, fullgraph=True)(*(v.clone() for v in args))
    return got, net(*(v.clone() for v in args)), found


ALL, BARE = {"rotate": 1}, {"rotate": 1, "rms_norm": 2, "cat": 1}


@avx512
@pytest.mark.parametrize(
    ("net", "found"),
    [
        (Rope(), ALL),
        (Rope(None), ALL),
        (Rope(eps=None), {"rotate": 1, "rms_norm": 2}),  # eps would depend on the dtype
        (Rope(shared=True), BARE),  # somebody else reads the norms: they stay for him
        (Rope(write=True), BARE),  # the norms' input is no longer what it was
    ],
    ids=["joint", "one stream", "no eps", "shared", "written"],
)
def test_a_rotation_is_found_with_what_belongs_to_it(net, found):
    x, y, cos = torch.randn(2, 6, 3, 16), torch.randn(2, 4, 3, 16), torch.randn(1, 10 if net.join else 6, 1, 16)
    got, want, seen = graph_of(net, x, y, cos, cos.flip(1))
    assert seen == found
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


class Joined(nn.Module):
    def __init__(self, named: bool = False):
        super().__init__()
        self.named = named

    def forward(self, x: Tensor, y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return turned(torch.cat(tensors=[y, x], dim=1) if self.named else torch.cat([y, x], 1), cos, sin)


@avx512
@pytest.mark.parametrize(("one", "two"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_streams_of_two_dtypes_are_joined_by_torch(one, two):
    """torch.cat promotes them; a kernel that read one as the other would leave its memory."""
    x, y, cos = torch.randn(2, 6, 3, 16, dtype=one), torch.randn(2, 4, 3, 16, dtype=two), torch.randn(1, 10, 1, 16)
    got, want, seen = graph_of(Joined(), x, y, cos, cos.flip(1))
    assert seen.get("cat") == 1
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    with pytest.raises(ConfigError, match="of one dtype"):
        rotate([x, y], [None, None], None, cos, cos, 1)


@avx512
def test_a_concatenation_called_by_name_stays():
    x, y, cos = torch.randn(2, 6, 3, 16), torch.randn(2, 4, 3, 16), torch.randn(1, 10, 1, 16)
    got, want, _ = graph_of(Joined(named=True), x, y, cos, cos.flip(1))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    real, imag = x.reshape(*x.shape[:-1], 2, -1).unbind(-2)
    return (x.float() * cos + torch.cat([-imag, real], dim=-1).float() * sin).to(x.dtype)


def reflected(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    real, imag = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return (x.float() * cos + torch.stack([imag, -real], dim=-1).flatten(3).float() * sin).to(x.dtype)


def swapped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    real, imag = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return (x.float() * cos + torch.stack([-real, imag], dim=-1).flatten(3).float() * sin).to(x.dtype)


def absolute(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    real, imag = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return (x.float() * cos + torch.stack([imag.abs(), real], dim=-1).flatten(3).float() * sin).to(x.dtype)


def other_way(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs that are not adjacent: every second of the transposed channels."""
    real, imag = x.transpose(1, 2).reshape(x.shape[0], x.shape[1], x.shape[2], -1, 2).unbind(-1)
    return (x.float() * cos + torch.stack([-imag, real], dim=-1).flatten(3).float() * sin).to(x.dtype)


@pytest.mark.parametrize(
    ("form", "wide"),
    [*((form, True) for form in (halves, reflected, swapped, absolute, other_way)), (turned, False)],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_what_only_looks_like_a_rotation_stays(form, wide):
    class Net(nn.Module):
        def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return form(x, cos, sin)

    x, cos = torch.randn(2, 6, 6, 16), torch.randn(1, 6, 1, 16, dtype=torch.float32 if wide else torch.float64)
    got, want, seen = graph_of(Net(), x, cos, cos.flip(1))
    assert "rotate" not in seen
    torch.testing.assert_close(got, want)


class Heads(nn.Module):
    """Linears of one input: three of them, one behind a write, one of a concatenation."""

    def __init__(self, split: int = 64, write: bool = False, shared: bool = False, late: bool = False):
        super().__init__()
        self.a, self.b, self.c = (Int8Linear(nn.Linear(64, n)) for n in (32, 48, 64))
        self.out, self.split, self.write = Int8Linear(nn.Linear(128, 8)), split, write
        self.shared, self.late = shared, late

    def forward(self, x: Tensor) -> Any:
        a, b = self.a(x), F.gelu(self.b(x), approximate="tanh")
        if self.write:
            x.mul_(2)
        c = self.c(x)
        rest = torch.cat([a, b, c], -1)[..., : 128 - self.split]
        joined = torch.cat([c[..., : self.split], rest], dim=-1)
        if self.late:
            c.mul_(2)
        return (self.out(joined), joined) if self.shared else self.out(joined)


@int8
@DTYPES
@pytest.mark.parametrize(
    ("fields", "calls", "alone", "cats"),
    [
        ({}, 2, 0, 1),
        ({"split": 32}, 1, 1, 2),  # the second part would not begin at a tile
        ({"shared": True}, 1, 1, 2),  # somebody else reads the concatenation
        ({"late": True}, 1, 1, 2),  # a part is no longer what was put together
        ({"write": True}, 2, 1, 1),  # what c reads is not what a and b read
    ],
    ids=str,
)
def test_linears_of_one_input_round_it_once(fields, calls, alone, cats, dtype):
    x = torch.randn(2, 9, 64).to(dtype)
    got, want, seen = graph_of(Heads(**fields), x)
    assert (seen.get("int8_linears", 0), seen.get("int8_linear", 0), seen["cat"]) == (calls, alone, cats)
    rtol, atol = (1e-3, 1e-4) if dtype == torch.float32 else (0.05, 0.02)
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def test_a_graph_without_any_of_it_is_left_alone():
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([-x, x], -1).sum(-1) + torch.cat([x, x], -1)[..., :4]

    def backend(graph: Any, inputs: Any) -> Any:
        before = graph.code
        assert fuse(graph) == fuse_linears(graph) == fuse_rotations(graph) == 0 and graph.code == before
        return graph.forward

    x = torch.randn(3, 4)
    assert torch.equal(torch.compile(Plain(), backend=backend)(x), Plain()(x))


# --- the whole way ------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A block as Flux's single ones are: everything above at once."""

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int = 64):
        super().__init__()
        self.q, self.k, self.v, self.up = (nn.Linear(width, n) for n in (width, width, width, 2 * width))
        self.out, self.norm = nn.Linear(3 * width, width), nn.RMSNorm(16, 1e-6)
        angle = torch.rand(1, 5, 1, 16)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 16)) for layer in (self.q, self.k, self.v))
        q, k = (turned(self.norm(y), self.cos.float(), self.sin.float()) for y in (q, k))
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2, 3)
        return x + self.out(torch.cat([y, F.gelu(self.up(x), approximate="tanh")], dim=-1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_fused_stack_is_the_stack_and_comes_off_bit_for_bit(backend):
    """Against the same layers without Compile; with inductor too, whose strides are its own."""
    if backend == "inductor" and cpp_compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    net, x = Net(), torch.randn(2, 5, 64)
    want = net(x, x, {})
    with speed_up(net, Quantize(min_side=32), Cast()) as plain:
        small = plain(x, x, {})
    with speed_up(net, Quantize(min_side=32), Cast(), Compile(backend=backend)) as fast:
        got = fast(x, x, {})
    assert relative(got, small) < 0.01 and 0 < relative(got, want) < 0.03
    assert torch.equal(net(x, x, {}), want)
