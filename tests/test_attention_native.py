"""The C++ attention kernel: its bound on the scores, its blocks, its threads, and its build without AMX."""

from __future__ import annotations

import pytest
import torch

from hasten.speed import kernels
from hasten.speed.softmax import Call, native, torchs
from tests.test_attention import SHAPES, made
from tests.test_speed import relative

pytestmark = pytest.mark.skipif(kernels.why_not() is not None, reason=f"native kernels: {kernels.why_not()}")


@pytest.mark.parametrize("size", [1.0, 60.0])
def test_scores_that_a_bound_covers_and_scores_that_rise(size):
    """Queries 0 .. 31 are small enough to need no shift; the others' must follow keys that grow over two blocks."""
    call = made((1, 2, 2, 96, 1100, 64, 64, ""))
    q = (call.q * torch.where(torch.arange(96) < 32, 1e-2, size)[:, None]).bfloat16()
    k = (call.k * torch.linspace(1e-3, 2, 1100)[:, None]).bfloat16()
    call = Call(q, k, call.v, None, 0.0, False, None, False)
    assert relative(native(call).float(), torchs(call.wide())) < 0.004
    for mask in (torch.zeros(1, 1100), 200 * torch.randn(1, 1100)):  # a mask takes the bound away
        masked = Call(q, k, call.v, mask, 0.0, False, None, False)
        assert relative(native(masked).float(), torchs(masked.wide())) < 0.004


def test_what_is_not_a_number_stays_in_its_row():
    for size in (1.0, 100.0):
        call = made((1, 1, 1, 70, 90, 32, 32, ""), size=size)
        call.q[0, 0, 40, 3] = torch.nan
        got = native(call)
        assert got[0, 0, 40].isnan().all() and got.isnan().sum() == 32


@pytest.mark.skipif(not kernels._has(*kernels.AMX), reason="the kernels have no AMX to do without")
def test_native_without_amx(monkeypatch):
    """The same kernel as machines with AVX-512 BF16 alone build it."""
    has = kernels._has
    monkeypatch.setattr(kernels, "_has", lambda *names: not set(names) & set(kernels.AMX) and has(*names))
    kernels.library.cache_clear()
    try:
        assert "-mamx-bf16" not in kernels._command()
        for shape in SHAPES:
            call = made(shape)
            assert relative(native(call).float(), torchs(call.wide())) < 0.006
    finally:
        kernels.library.cache_clear()


def test_native_takes_strided_and_float32_tensors():
    call = made((2, 3, 3, 45, 77, 24, 24, "heads"), torch.float32)
    assert relative(native(call), torchs(call)) < 0.006 and native(call).dtype == torch.float32
    wide = torch.randn(2, 3, 45, 3 * 24).bfloat16()
    q, k, v = wide.chunk(3, dim=-1)
    packed = Call(q, k, v, None, 0.0, False, None, False)
    assert relative(native(packed).float(), torchs(packed.wide())) < 0.006
    assert not kernels.attention_takes(q.mT, k.mT, v.mT, None, None)  # channels apart
    assert not kernels.attention_takes(q.half(), k.half(), v.half(), None, None)


def test_native_is_the_same_for_any_number_of_threads():
    call, before = made((2, 3, 3, 330, 590, 64, 64, "causal")), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = native(call)
        torch.set_num_threads(3)
        assert torch.equal(native(call), one)
    finally:
        torch.set_num_threads(before)
