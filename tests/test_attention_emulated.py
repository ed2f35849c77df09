"""What SageAttention3's four bits would answer: closed forms, its smoothing, and its place among the formats."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hasten.speed import Attention, speed_up
from hasten.speed.softmax import Call, _fp4, emulated, error, torchs
from tests.test_attention import SHAPES, made
from tests.test_speed import draw, inputs, relative, tiny

FOUR = emulated("fp4")
GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def call_of(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Call:
    return Call(q, k, v, None, 0.0, False, scale, False)


def dyadic(*shape: int, seed: int = 0) -> Tensor:
    """Multiples of 1/64 below 2: means over powers of two are exact, and so are sums with larger numbers."""
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed)) / 64


def test_four_bits_by_hand():
    """A group's scale is its largest value over 6, in E4M3: 13 / 6 becomes 2.25; an odd group is not filled up."""
    x = torch.tensor([13.0, 2.0, -0.5, *[0.0] * 13, 3.0, 1.6])
    assert _fp4(x).tolist() == [13.5, 2.25, 0.0, *[0.0] * 13, 3.0, 1.5]
    assert not _fp4(torch.zeros(2, 16)).any()
    assert _fp4(torch.full((16,), 1e-6)).eq(0).all()  # below half of E4M3's smallest scale
    assert _fp4(torch.full((16,), 1e5)).eq(448 * 6).all()


def on_grid(keys: int = 64) -> Call:
    """All that is rounded is on the grid: q and k have no mean, and exp(s - max) is 1, 1/2 or 1/4."""
    q, k = torch.zeros(1, 1, 256, 16), torch.zeros(1, 1, keys, 16)
    q[..., 0] = torch.tensor([6.0, -6.0]).repeat(128)
    k[..., 0] = torch.tensor([3.0, 0.0, -3.0, 0.0]).repeat(keys // 4)
    v = GRID[torch.randint(8, (1, 1, keys, 24), generator=torch.Generator().manual_seed(0))]
    v[:, :, ::16] = 6.0  # so that every group's scale is 1
    return call_of(q, k, v, scale=math.log(2) / 18)


def test_it_is_exact_where_all_values_are_on_the_grid():
    call = on_grid()
    torch.testing.assert_close(FOUR(call), torchs(call), rtol=1e-6, atol=1e-6)
    off = replace(call, v=call.v + 0.01)
    assert error(FOUR, off) > 1e-4  # else the equality above says nothing


def test_the_mean_of_the_keys_changes_no_bit():
    q, k, v = (dyadic(2, 2, 128, 32, seed=i) for i in range(3))
    shift = 64 * dyadic(2, 2, 1, 32, seed=3)
    assert torch.equal(FOUR(call_of(q, k, v)), FOUR(call_of(q, k + shift, v)))


def test_the_mean_of_a_block_of_queries_is_kept_exact():
    """An outlying channel of q that all keys answer alike would take the bits of the fifteen beside it."""
    q, k, v = (dyadic(1, 2, 256, 32, seed=i) for i in range(3))
    k[..., 0] = 1.0
    out = q.clone()
    out[:, :, :128, 0] += 64.0
    out[:, :, 128:, 0] -= 32.0  # each block has its own mean
    assert torch.equal(FOUR(call_of(out, k, v)), FOUR(call_of(q, k, v)))


def test_the_mean_of_the_queries_is_added_back():
    """Queries that are all alike are nothing but their mean: only the probabilities and v are rounded."""
    q, k = dyadic(1, 1, 1, 32).expand(1, 1, 200, 32), dyadic(1, 1, 64, 32, seed=1)
    call = call_of(q, k, 6 * torch.eye(64)[None, None], scale=0.1)
    got, want = FOUR(call), torchs(call)
    assert relative(got, want) < 0.1
    torch.testing.assert_close(got.amax(-1), want.amax(-1), rtol=1e-5, atol=0)  # 448 * 6 is on the grid


def test_small_probabilities_keep_their_bits():
    """One key takes nearly all: without the second level the others' scales would be below E4M3's normal numbers."""
    q, k = torch.ones(1, 1, 1, 16), torch.zeros(1, 1, 128, 16)
    k[:, :, 0] = 12 * math.log(2) / 16  # exp(s - max) of the others: 2 ** -12
    call = call_of(q, k, 6 * torch.eye(128)[None, None], scale=1.0)
    got, want = FOUR(call)[0, 0, 0], torchs(call)[0, 0, 0]
    torch.testing.assert_close(got[16:], want[16:], rtol=1e-5, atol=0)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=0)
    assert not got[1:16].any()  # the same group


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_kind_of_call(shape):
    """Masks, causality, cross attention, grouped heads and odd sizes; a query that sees nothing gets zeros."""
    call = made(shape, torch.float32)
    got, want = FOUR(call), torchs(call)
    assert got.shape == want.shape and got.dtype == want.dtype
    assert relative(got, want) < 0.25
    assert torch.equal(got.abs().amax(-1) == 0, want.abs().amax(-1) == 0)


def test_fewer_bits_are_further_away():
    call = made((1, 4, 4, 256, 512, 64, 64, ""), torch.float32)
    int8, fp8, fp4 = (error(emulated(form), call) for form in ("int8", "fp8", "fp4"))
    assert int8 < fp8 < fp4 / 2 and fp4 < 0.25


def test_it_acts_in_a_network():
    net, (noise, cond, _) = tiny(), inputs()
    want = draw(net, noise, cond)
    up = speed_up(net, Attention("emulate_fp4"))
    with up as fast:
        got = draw(fast, noise, cond)
    assert up.ledger()["attention"]["replaced"] == 40
    assert 1e-4 < relative(got, want) < 0.2
