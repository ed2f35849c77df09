"""How a linear is rounded, against closed forms: grids, modules, smoothing, searches, the low-rank branch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.core.errors import ConfigError
from hasten.core.packing import from_groups, pack, to_groups, unpack
from hasten.speed import Quantize
from hasten.speed.grids import codes, e2m1, nearest, values
from hasten.speed.linears import (
    Branched,
    FloatLinear,
    Int4WeightLinear,
    Int8Linear,
    Int8WeightLinear,
    StaticInt8Linear,
    describe,
    rebuild,
    weights,
)
from hasten.speed.rounding import Stats, awq, error, low_rank, one, plain, smoothquant

FORMS = ("tensor", "row", "block", "mxfp8", "nvfp4")
LINEARS = (Int8Linear, Int8WeightLinear, StaticInt8Linear, Int4WeightLinear, FloatLinear)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def linear(into: int = 96, out: int = 40, bias: bool = True) -> nn.Linear:
    return nn.Linear(into, out, bias).requires_grad_(False)


def stats(rows: Tensor) -> Stats:
    return Stats(rows.abs().amax(0)[None], rows.abs().mean(0)[None], rows, torch.zeros(len(rows), dtype=torch.int64))


def outliers(rows: int = 64, into: int = 96) -> Tensor:
    """Activations of which a few channels are large, as those of transformers are."""
    x = torch.randn(rows, into)
    x[:, ::24] *= 40
    return x


# --- grids ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 2), (3, 64), (2, 5, 10)])
def test_unpacking_is_the_inverse_of_packing(shape):
    q = torch.randint(-8, 8, shape, dtype=torch.int8)
    assert pack(q).shape == (*shape[:-1], shape[-1] // 2) and pack(q).dtype == torch.uint8
    assert torch.equal(unpack(pack(q)), q)
    assert torch.equal(pack(torch.tensor([[-8, 7]], dtype=torch.int8)), torch.tensor([[0xF0]], dtype=torch.uint8))
    assert torch.equal(codes(values(q)[values(q) != 0]), q[values(q) != 0])  # a negative zero is a zero


@pytest.mark.parametrize(("columns", "group", "top"), [(64, 64, 7), (96, 64, 7), (50, 50, 127), (7, 32, 7)])
def test_groups_hold_the_nearest_multiples_of_their_scale(columns, group, top):
    w = torch.randn(5, columns)
    q, scale = to_groups(w, group, top)
    back = from_groups(q, scale, columns)
    for row, start in itertools.product(range(5), range(0, columns, group)):
        part, step = w[row, start : start + group], w[row, start : start + group].abs().max() / top
        torch.testing.assert_close(back[row, start : start + group], (part / step).round() * step)
    assert torch.equal(from_groups(*to_groups(back, group, top), columns).sign(), back.sign())
    assert torch.equal(from_groups(*to_groups(torch.zeros(2, 8), 4, 7), 8), torch.zeros(2, 8))


E4M3_TABLE = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
E2M1_TABLE = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def brute(v: Tensor, table: Tensor) -> Tensor:
    """The nearest of the table's entries, whose index is the code; of two as near, the one with the even code."""
    distance = (v.abs().double().reshape(-1, 1) - table).abs()
    tie = distance == distance.amin(1, keepdim=True)
    even_first = torch.arange(len(table)) % 2 + torch.where(tie, 0, 2)
    return (table[even_first.argmin(1)].view(v.shape) * v.sign().double()).float()


def test_rounding_to_e2m1_is_the_nearest_of_its_sixteen_values():
    v = torch.cat([torch.linspace(-8, 8, 4097), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 1e-9])])
    assert torch.equal(e2m1(v), brute(v, E2M1_TABLE))
    assert e2m1(torch.tensor(100.0)) == 6
    assert torch.equal(values(codes(e2m1(v))), e2m1(v))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", [0, 1])
def test_a_matrix_is_rounded_to_the_nearest_of_a_table_with_the_scale_of_its_tile(form, side):
    """By hand, tile by tile, in float64; sizes that no tile divides, a tile of zeros and one that is tiny."""
    v = torch.randn(130, 150) * torch.logspace(-3, 3, 150)
    v[:, :32], v[3] = 0, v[3] * 1e-6
    got = nearest(v, form, side)
    tile = {"tensor": (130, 150), "row": (1, 150), "block": (1 if side else 128, 128), "mxfp8": (1, 32)}
    down, across = tile.get(form, (1, 16))
    table = E2M1_TABLE if form == "nvfp4" else E4M3_TABLE[:127]
    outer = v.abs().max() / (448 * 6)
    for i, j in itertools.product(range(0, 130, down), range(0, 150, across)):
        part = v[i : i + down, j : j + across]
        scale = part.abs().max() / 448
        if form == "mxfp8":
            scale = 2 ** torch.ceil(torch.log2(scale.double())).float()
        if form == "nvfp4":
            scale = brute(part.abs().max() / 6 / outer, E4M3_TABLE[:127]) * outer
        want = brute(part / scale, table) * scale if scale > 1e-12 else torch.zeros_like(part)
        torch.testing.assert_close(got[i : i + down, j : j + across], want, rtol=1e-6, atol=0)


# --- modules --------------------------------------------------------------------------------------------------


def made(into: int = 96, out: int = 64) -> list[Any]:
    base = linear(into, out)
    low = (torch.randn(3, into), torch.randn(out, 3))
    return [
        Int8Linear(base), Int8WeightLinear(base), StaticInt8Linear(base, 4.0), Int4WeightLinear(base, 32),
        *(FloatLinear(base, form) for form in FORMS), FloatLinear(base, "row", fast=True),
        Branched(Int8Linear(base), torch.rand(into)), Branched(Int4WeightLinear(base), None, *low),
    ]  # fmt: skip


@pytest.mark.parametrize("index", range(12))
def test_a_file_of_tensors_and_plain_values_is_the_same_module(index):
    small, x = made()[index], torch.randn(2, 5, 96)
    twin = rebuild(describe(small))
    assert all(v.is_meta for v in twin.buffers())
    twin.load_state_dict(small.state_dict(), assign=True)
    assert type(twin) is type(small) and torch.equal(twin(x), small(x)) and small(x).shape == (2, 5, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cls", LINEARS)
def test_every_module_is_near_its_linear_and_says_that_it_has_no_gradient(cls, bias, dtype):
    base, x = linear(bias=bias), torch.randn(2, 7, 96)
    small = cls(base, float(x.abs().max())) if cls is StaticInt8Linear else cls(base)
    got = small(x.to(dtype))
    assert got.dtype == dtype and got.shape == (2, 7, 40)
    assert relative(got.float(), base(x)) < (0.12 if cls is Int4WeightLinear else 0.05)
    assert not hasattr(small, "weight") and not list(small.parameters())
    with pytest.raises(ConfigError, match="no gradient"):
        small(x.requires_grad_())


@pytest.mark.parametrize("form", FORMS)
def test_a_float_linear_is_the_product_of_the_rounded_sides(form):
    base, x = linear(), outliers(9)
    want = nearest(x, form).double() @ nearest(base.weight, form, 0).double().T + base.bias.double()
    torch.testing.assert_close(FloatLinear(base, form)(x).double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights(FloatLinear(base, form)), nearest(base.weight, form, 0))


@pytest.mark.parametrize("form", ["tensor", "row"])
def test_the_fast_fp8_product_is_the_emulated_one_to_bfloat16(form):
    base, x = linear(64, 48), outliers(10, 64)
    fast, slow = FloatLinear(base, form, fast=True)(x[None]), FloatLinear(base, form)(x[None])
    assert 0 < relative(fast, slow) < 0.004 < relative(slow, base(x[None]))


@pytest.mark.parametrize("group", [32, 64])
def test_weight_only_linears_multiply_plain_activations(group):
    base, x = linear(), outliers(6)
    four, eight = Int4WeightLinear(base, group), Int8WeightLinear(base)
    for small in (four, eight):
        torch.testing.assert_close(small(x), x @ weights(small).T + base.bias, rtol=1e-4, atol=1e-4)
    assert four.packed.nbytes == 40 * -(-96 // group) * group // 2
    assert relative(weights(eight), base.weight) < 0.01 < relative(weights(four), base.weight) < 0.12


def test_static_and_dynamic_scales_agree_on_the_calibration_data():
    """Where all tokens have the same maximum the two are the same numbers; what is larger later is clipped."""
    base, x = linear(), torch.randn(30, 96)
    x = x / x.abs().amax(1, keepdim=True) * 3
    static = one(base, Quantize("int8_static", calibration="-"), stats(x))
    assert isinstance(static, StaticInt8Linear)
    torch.testing.assert_close(static(x), Int8Linear(base)(x))
    torch.testing.assert_close(static(4 * x[:1]), static((4 * x[:1]).clamp(-3, 3)))
    uneven = x * torch.linspace(0.5, 1, 30)[:, None]
    static = one(base, Quantize("int8_static", calibration="-"), stats(uneven))
    assert relative(static(uneven), Int8Linear(base)(uneven)) < 0.02


# --- smoothing, searches, low rank ----------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_smoothing_leaves_the_product_and_moves_the_outliers_into_the_weight(alpha):
    base, x = linear().double(), outliers().double()
    x[:, 5] = 0
    s = smoothquant(x.abs().amax(0), base.weight, alpha).double()
    high, column = x.abs().amax(0), base.weight.abs().amax(0)
    keep = torch.arange(96) != 5
    torch.testing.assert_close(s[keep], (high**alpha / column ** (1 - alpha))[keep], rtol=1e-5, atol=0)
    assert s[5] == 1
    smooth = Branched(plain(base.weight * s, base.bias), 1 / s)
    torch.testing.assert_close(smooth(x), base(x), rtol=1e-12, atol=1e-12)
    x, base = x.float(), base.float()
    found = one(base, Quantize("int8", smooth=alpha, calibration="-"), stats(x))
    assert isinstance(found, Branched) and found.shrink is not None
    torch.testing.assert_close(1 / found.shrink, s.float())
    if alpha == 0.5:
        assert error(found, base, x) < 0.2 * error(Int8Linear(base), base, x)


@pytest.mark.parametrize("dtype", ["int8", "fp8", "nvfp4", "int8_static"])
def test_the_search_for_alpha_is_never_worse_than_any_alpha_or_none(dtype):
    base, x = linear(), outliers()
    given: dict[str, Any] = {"calibration": "-", **({"emulate": True} if dtype in ("fp8", "nvfp4") else {})}
    found = error(one(base, Quantize(dtype, smooth="search", **given), stats(x)), base, x)
    others = [error(one(base, Quantize(dtype, smooth=a, **given), stats(x)), base, x) for a in (0.0, 0.25, 0.5, 1.0)]
    assert found <= min([*others, error(one(base, Quantize(dtype, **given), stats(x)), base, x)])
    assert found < 0.9 * max(others)


@pytest.mark.parametrize("seed", range(4))
def test_awq_is_never_worse_than_rounding_to_nearest_on_its_objective(seed):
    torch.manual_seed(seed)
    base, plain_rows = linear(128, 32), torch.randn(80, 128)
    how = Quantize("int4_weights", smooth="search", calibration="-")

    def objective(rows: Tensor, s: Tensor) -> float:
        rounded = from_groups(*to_groups(base.weight * s, 64, 7, torch.bfloat16), 128)
        return float(((rows / s) @ rounded.T - rows @ base.weight.T).square().sum())

    for rows, strict in ((plain_rows, 1.0), (outliers(80, 128), 0.7)):
        small = one(base, how, stats(rows))
        got = float((small(rows) - base(rows)).square().sum())
        mean = rows.abs().mean(0)
        grid = [objective(rows, mean ** (i / 20) / (mean ** (i / 20)).max().mul((mean ** (i / 20)).min()).sqrt())
                for i in range(20)]  # fmt: skip
        assert got <= strict * objective(rows, torch.ones(128)) * (1 + 1e-4)
        assert got == pytest.approx(min(grid), rel=2e-2)
    torch.testing.assert_close(awq(plain_rows.abs().mean(0), 0.0), torch.ones(128))
    torch.testing.assert_close(awq(torch.tensor([1.0, 4.0, 16.0]), 0.5), torch.tensor([0.5, 1.0, 2.0]))


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_residual_of_svdquant_falls_monotonically(rank):
    w = torch.randn(48, 64) + 3 * torch.randn(48, 2) @ torch.randn(2, 64)
    rounded = lambda v: from_groups(*to_groups(v, 32, 7), 64)  # noqa: E731
    up, down, residuals = low_rank(w, rank, rounded)
    assert len(residuals) > 2 and all(b < a for a, b in itertools.pairwise(residuals))
    rest = w - up @ down
    assert residuals[0] == pytest.approx(float((w - rounded(w)).norm() / w.norm()), rel=1e-5)
    assert residuals[-1] == pytest.approx(float((rest - rounded(rest)).norm() / w.norm()), rel=1e-4)
    assert torch.linalg.matrix_rank(up @ down) <= rank and up.shape == (48, rank) and down.shape == (rank, 64)
    small = one(plain(w, None), Quantize("int4_weights", rank=rank, group=32), None)
    assert isinstance(small, Branched)
    assert relative(small(torch.eye(64)).T, w) == pytest.approx(residuals[-1], rel=0.05)


def test_a_large_matrix_takes_the_randomized_svd_and_leaves_the_random_state():
    w = torch.randn(300, 300) + 5 * torch.randn(300, 2) @ torch.randn(2, 300)
    before = torch.get_rng_state()
    up, down, residuals = low_rank(w, 2, lambda v: from_groups(*to_groups(v, 64, 7), 300))
    assert (
        torch.equal(torch.get_rng_state(), before) and torch.equal(up, low_rank(w, 2, lambda v: v.round())[0]) is False
    )
    left, size, right = torch.linalg.svd(w)
    assert residuals[-1] < 0.5 * residuals[0]
    assert relative(up @ down, left[:, :2] * size[:2] @ right[:2]) < 0.1
    up, down, residuals = low_rank(w, 2, lambda v: v)  # nothing to gain where nothing is lost
    assert not up.any() and residuals == [0.0]


def test_smoothing_and_a_branch_together_are_better_than_either():
    base, x = linear(128, 96), outliers(64, 128)
    with torch.no_grad():
        base.weight += 0.3 * torch.randn(96, 2) @ torch.randn(2, 128)
    tried: dict[tuple[Any, int], float] = {}
    for smooth, rank in itertools.product((None, 0.5), (0, 4)):
        how = Quantize("nvfp4", smooth=smooth, rank=rank, calibration="-", emulate=True)
        tried[smooth, rank] = error(one(base, how, stats(x)), base, x)
    assert tried[0.5, 4] < min(tried[None, 4], tried[0.5, 0]) < tried[None, 0]
