"""What a cache counts and forgets: which steps it computes, what another shape leaves, what a caller may write into."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.core.request import branch, request
from hasten.speed import Cache, speed_up
from hasten.speed.cache import calibrate
from hasten.speed.caching.policies import combined
from hasten.speed.caching.state import Branch, Snapshot
from tests.test_cache_blocks import Adds, Chain, states

MANY = 1e9  # a threshold that never stops a skip


def chain() -> Chain:
    torch.manual_seed(0)
    return Chain(Adds(), Adds(), Adds())


def request_of(net: Any, xs: list[Tensor], times: list[float], steps: int, twice: bool = False) -> list[list[int]]:
    """For every call of a request the blocks that ran; ``twice`` calls each step as two branches."""
    seen = []
    with torch.no_grad(), request(steps):
        for x, t in zip(xs, times, strict=True):
            for name in ("cond", "uncond") if twice else ("cond",):
                before = [b.calls for b in net.blocks]
                with branch(name):
                    net(x if name == "cond" else -x, torch.full((len(x),), t), {})
                seen.append([b.calls - n for b, n in zip(net.blocks, before, strict=True)])
    return seen


STEP = [1 - i / 12 for i in range(12)]
COMPUTED = {
    "easycache": (Cache(threshold=MANY, warmup=3, max_skips=2), "111001001001"),
    "taylor": (Cache("taylor", degree=2, interval=3, warmup=2), "111001001001"),
    "schedule": (Cache("schedule", mask="001101101010"), "110010010101"),
    "firstblock": (Cache("firstblock", threshold=MANY, warmup=2, max_skips=3), "110001000101"),
    "dual": (Cache("dual", threshold=MANY, warmup=2, max_skips=3, total_skips=4, first=1), "110001011111"),
    "dicache": (Cache("dicache", threshold=MANY, warmup=4, max_skips=1), "111101010101"),
    "magcache": (Cache("magcache", threshold=MANY, max_skips=1, ratios=(1.0,) * 12), "110101010101"),
}


@pytest.mark.parametrize("twice", [False, True], ids=["one branch", "two branches"])
@pytest.mark.parametrize("name", COMPUTED)
def test_the_warm_up_the_runs_and_the_last_step_are_counted_to_the_step(name, twice):
    cache, want = COMPUTED[name]
    net = chain()
    up = speed_up(net, cache)
    with up as fast:
        seen = request_of(fast, states(12), STEP, 12, twice)
    last = [str(row[-1]) for row in seen]  # the last block runs where a call is computed
    branches = [last[::2], last[1::2]] if twice else [last]
    assert ["".join(b) for b in branches] == [want] * len(branches)
    counts = up.ledger()["cache"]
    assert counts["calls"] == len(seen) and counts["reused"] == last.count("0")


def test_branches_do_not_share_what_is_held():
    """Of two branches of opposite samples each skip continues its own last prediction."""
    net, xs = chain(), states(8)
    got: dict[str, list[Tensor]] = {"cond": [], "uncond": []}
    with speed_up(net, Cache("schedule", mask="01000000")) as fast, torch.no_grad(), request(8):
        for x, t in zip(xs, STEP, strict=False):
            for name, sign in (("cond", 1), ("uncond", -1)):
                with branch(name):
                    got[name].append(fast(sign * x, torch.full((len(x),), t), {}).clone())
    for name, sign in (("cond", 1), ("uncond", -1)):  # v - x is held on rectified flow
        torch.testing.assert_close(got[name][1], got[name][0] + sign * (xs[1] - xs[0]))


def test_another_form_forgets_all_but_the_step():
    mine = Branch()
    mine.begin("small")
    mine.step, mine.past, mine.blocks = 3, [Snapshot(2, 0.5)], {0: "known"}
    mine.error, mine.rate, mine.latest, mine.skips, mine.total = 0.3, 2.0, torch.ones(1), 2, 4
    mine.begin("small")
    assert mine.past and mine.blocks and mine.skips == 2
    mine.begin("large")
    assert (mine.past, mine.blocks, mine.error, mine.latest, mine.skips) == ([], {}, 0.0, None, 0)
    assert math.isnan(mine.rate) and (mine.step, mine.total) == (3, 4)  # the cap is on the whole request


def test_a_calibration_starts_again_where_the_batch_changes():
    net = chain()

    def run(fast: Any) -> None:
        xs = states(12)
        request_of(fast, [x if i < 6 else x[:1] for i, x in enumerate(xs)], STEP, 12)

    found = calibrate(net, "magcache", [run, lambda fast: request_of(fast, states(12), STEP, 12)], 12)
    assert len(found["ratios"]) == 12 and all(math.isfinite(v) for v in found["ratios"])


def test_a_block_called_by_itself_is_no_part_of_the_last_call():
    net, xs = chain(), states(4)
    with speed_up(net, Cache("firstblock", threshold=MANY)) as fast, torch.no_grad(), request(12):
        for x, t in zip(xs, STEP, strict=False):
            fast(x, torch.full((len(x),), t), {})
        want = xs[0] + fast.blocks[1].linear(xs[0]).tanh()
        torch.testing.assert_close(fast.blocks[1](xs[0]), want)  # after a skipped call, too


@pytest.mark.parametrize(
    "cache", [Cache(threshold=MANY), Cache("taylor", degree=1, interval=3)], ids=lambda c: c.policy
)
def test_the_caller_may_write_into_what_it_gave_and_got(cache):
    results = []
    for careless in (False, True):
        got, buffer = [], torch.empty_like(states(1)[0])
        with speed_up(chain(), cache) as fast, torch.no_grad(), request(12):
            for x, t in zip(states(12), STEP, strict=True):
                times = torch.full((len(x),), t)
                out = fast(buffer.copy_(x) if careless else x, times, {})
                got.append(out.clone())
                if careless:
                    out.zero_()
                    times.zero_()
        results.append(torch.stack(got))
    assert torch.equal(*results)


def test_a_second_look_at_a_time_takes_the_place_of_the_first():
    """heun calls twice at a time: a forecast over both would divide by no time at all."""
    net, xs = chain(), states(12)
    times = [STEP[i // 2] for i in range(12)]
    with speed_up(net, Cache("taylor", degree=1, interval=2)) as fast, torch.no_grad(), request(12):
        got = [fast(x, torch.full((len(x),), t), {}).clone() for x, t in zip(xs, times, strict=True)]
    assert all(bool(v.isfinite().all()) for v in got)


def test_a_batch_that_shrinks_midway_is_computed_again():
    net, xs = chain(), [x if i < 4 else x[:1] for i, x in enumerate(states(12))]
    with speed_up(net, Cache(threshold=MANY)) as fast:
        seen = request_of(fast, xs, STEP, 12)
    # twice: EasyCache's rate is that between two computed calls
    assert "".join(str(row[-1]) for row in seen) == "110011000011"


def test_teacache_adds_up_the_changes_from_step_to_step():
    """A signal that goes to and fro changes at every step, however near it stays to the last computed one."""
    a = torch.ones(2, 5, 6)
    xs = [a, a, *[v * a for v in (1.1, 1.0)] * 5]  # changes of 0.1 and 0.0909: the third is above 0.25
    net = chain()
    with speed_up(net, Cache("teacache", threshold=0.25, coefficients=(0, 0, 0, 1, 0), steps=12)) as fast:
        seen = request_of(fast, xs, STEP, 12)
    assert "".join(str(row[-1]) for row in seen) == "110010010011"


class Hourglass(Chain):
    """Two blocks down and two up, the last of which takes what the first returned."""

    def forward(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        first = self.blocks[0](x_t)
        return self.blocks[3](self.blocks[2](self.blocks[1](first)), first) + first


def test_deepcache_holds_what_the_inner_blocks_returned_last():
    torch.manual_seed(0)
    net, xs = Hourglass(*(Adds() for _ in range(4))), states(12)
    blocks: list[Any] = [*net.blocks]
    down, inside, deeper, up = blocks
    held: list[Tensor] = []
    with speed_up(net, Cache("deepcache", interval=2, warmup=2)) as fast, torch.no_grad(), request(12):
        for i, (x, t) in enumerate(zip(xs, STEP, strict=True)):
            before = inside.calls
            got = fast(x, torch.full((len(x),), t), {})
            ran, first = inside.calls > before, x + down.linear(x).tanh()
            assert ran == (i in (0, 1, 3, 5, 7, 9, 11))
            inner = first if ran else held[-1]
            for block in (inside, deeper) if ran else ():
                inner = inner + block.linear(inner).tanh()
            held.append(inner)
            torch.testing.assert_close(got, inner + up.linear(inner).tanh() + first)


class Both(Adds):
    """A block of two streams."""

    def forward(self, x: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), side + self.linear(side).tanh()


class TwoStreams(Chain):
    def forward(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        x, side = x_t, cond["text"]
        for block in self.blocks:
            x, side = block(x, side)
        return x + side.mean(1, keepdim=True)


def test_text_of_another_length_is_learnt_at_a_computed_step():
    torch.manual_seed(0)
    net, texts = TwoStreams(Both(), Both(), Both()), [torch.randn(2, n, 6) for n in (3, 7)]
    cache = Cache("firstblock", threshold=MANY, warmup=2, max_skips=2)  # computes 0, 1, 4, 7, 10, 11
    up = speed_up(net, cache)
    with up as fast, torch.no_grad(), request(12):
        for i, (x, t) in enumerate(zip(states(12), STEP, strict=True)):
            assert fast(x, torch.full((2,), t), {"text": texts[i >= 4]}).shape == x.shape
    assert up.ledger()["cache"]["reused"] == 6


def test_a_forecast_keeps_the_dtype_and_its_precision():
    past = [torch.randn(8, dtype=torch.float64) for _ in range(3)]
    want = 3 * past[2] - 3 * past[1] + past[0]
    assert torch.equal(combined([3.0, -3.0, 1.0], past), want)
    half = [v.bfloat16() for v in past]
    got, exact = (
        combined([30.0, -29.5, 0.5], half),
        30 * half[2].float() - 29.5 * half[1].float() + 0.5 * half[0].float(),
    )
    assert got.dtype == torch.bfloat16 and torch.equal(got, exact.bfloat16())
