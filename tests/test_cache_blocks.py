"""Cache policies that act inside the network, against hand computations; what they cannot skip in is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.core.errors import ConfigError, UnsupportedModel
from hasten.core.path import RECTIFIED_FLOW
from hasten.core.request import request
from hasten.speed import Cache, speed_up
from hasten.speed.caching.state import change
from tests.test_cache import STEPS, deep
from tests.test_speed import draw, inputs


class Adds(nn.Module):
    """x + tanh(x W), and a side input that decides nothing."""

    def __init__(self, width: int = 6, linear: type = nn.Linear):
        super().__init__()
        self.linear, self.calls = linear(width, width), 0

    def forward(self, x: Tensor, side: Tensor | None = None) -> Tensor:
        self.calls += 1
        return x + self.linear(x).tanh()


class Chain(nn.Module):
    path, kind = RECTIFIED_FLOW, "velocity"

    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        x = x_t
        for block in self.blocks:
            x = block(x, -x)
        return 2 * x


def states(count: int = 8, shape: tuple[int, ...] = (2, 5, 6)) -> list[Tensor]:
    torch.manual_seed(1)
    start, move = torch.randn(shape), torch.randn(shape)
    return [start + 0.02 * i * move for i in range(count)]


@torch.no_grad()
def outputs(net: Any, cache: Cache, xs: list[Tensor]) -> tuple[list[Tensor], dict[str, float]]:
    """What a request returns for the samples xs, one a step; the last two steps are left out."""
    up = speed_up(net, cache)
    with up as fast, request(len(xs) + 2):
        got = [fast(x, torch.full((len(x),), 1 - 0.1 * i), {}) for i, x in enumerate(xs)]
    return got, up.ledger()["cache"]


@torch.no_grad()
def test_firstblock_by_hand():
    """Skip while the first block's residual is near that of the last computed call; add the others' residual to it."""
    torch.manual_seed(0)
    net, xs, threshold = Chain(Adds(), Adds(), Adds()), states(), 0.03
    got, counts = outputs(copy.deepcopy(net), Cache("firstblock", threshold=threshold, max_skips=99), xs)
    want, computed, last = [], [], None
    for i, x in enumerate(xs):
        y = net.blocks[0](x)
        if i >= 2 and last is not None and change(y - x, last[0]) < threshold:
            want.append(2 * (y + last[1]))
            continue
        z = net.blocks[2](net.blocks[1](y))
        last = y - x, z - y
        computed.append(i)
        want.append(2 * z)
    assert counts["reused"] == len(xs) - len(computed) and 3 <= len(computed) < len(xs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_dicache_by_hand():
    """A += d(y); the residual is r_2 + g (r_1 - r_2), g from the probe's residuals and within [1, 1.5]."""
    torch.manual_seed(0)
    net, xs, gains = Chain(Adds(), Adds(), Adds()), states(), []
    got, counts = outputs(copy.deepcopy(net), Cache("dicache", threshold=0.045, max_skips=99), xs)
    want, past, error, before = [], [], 0.0, None
    for i, x in enumerate(xs):
        y = net.blocks[0](x)
        error += 0 if before is None else change(y, before)
        before = y
        if i >= 2 and error < 0.045:
            (p2, r2), (p1, r1) = past[-2:]
            gains.append(min(max(float((y - x - p2).abs().mean() / (p1 - p2).abs().mean()), 1.0), 1.5))
            want.append(2 * (y + r2 + gains[-1] * (r1 - r2)))
            continue
        z, error = net.blocks[2](net.blocks[1](y)), 0.0
        past.append((y - x, z - y))
        want.append(2 * z)
    assert counts["reused"] == len(gains) >= 2 and max(gains) > 1
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_dual_recomputes_its_ends_and_obeys_its_caps():
    torch.manual_seed(0)
    net, xs = Chain(*(Adds() for _ in range(5))), states(10)
    cache = Cache("dual", threshold=1e6, first=2, last=1, max_skips=3, total_skips=4)
    got, counts = outputs(net, cache, xs)
    assert counts["reused"] == 4
    assert [b.calls for b in net.blocks] == [10, 10, 6, 6, 10]
    y = net.blocks[1](net.blocks[0](xs[1]))  # the last computed call before the first skip
    residual = net.blocks[3](net.blocks[2](y)) - y
    now = net.blocks[1](net.blocks[0](xs[2])) + residual
    torch.testing.assert_close(got[2], 2 * net.blocks[4](now), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_dual_without_a_block_between_is_the_uncached_network_and_says_so():
    net, xs = Chain(Adds(), Adds(), Adds()), states()
    want = [net(x, x, {}) for x in xs]
    got: list[Tensor] = []
    with pytest.raises(ConfigError, match="first=2 and last=1 are all 3 blocks"):
        with speed_up(net, Cache("dual", first=2, last=1, threshold=1e6)) as fast, request(10):
            got += [fast(x, torch.full((2,), 1 - 0.1 * i), {}) for i, x in enumerate(xs)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with pytest.raises(ConfigError, match="has 3 blocks"):
        speed_up(net, Cache("dual", first=3, last=1))
    with pytest.raises(ConfigError, match="has 1 blocks"):
        speed_up(Chain(Adds()), Cache("firstblock"))


class Joins(Chain):
    """Streams that are joined between the blocks: the run of blocks ends there, and another one begins."""

    def forward(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        x = self.blocks[1](self.blocks[0](x_t))
        x = torch.cat([x, x[:, :2]], dim=1)
        return self.blocks[3](self.blocks[2](x))[:, : x_t.shape[1]]


class Strided(Adds):
    """Returns its stream transposed in memory, and writes down how what comes in is laid out."""

    def __init__(self) -> None:
        super().__init__()
        self.strides: set[tuple[int, ...]] = set()

    def forward(self, x: Tensor, side: Tensor | None = None) -> Tensor:
        self.strides.add(x.stride())
        return super().forward(x).transpose(1, 2).contiguous().transpose(1, 2)


@torch.no_grad()
def test_a_skip_hands_on_a_stream_laid_out_as_ever():
    """A compiled block would compile again for other strides."""
    net = Chain(Adds(), Strided(), Strided())
    _, counts = outputs(net, Cache("dual", threshold=1e6, first=1, last=1), states(5))
    assert counts["reused"] == 3
    last: Any = net.blocks[2]
    assert last.strides == {(30, 1, 5)}


@torch.no_grad()
def test_what_happens_between_the_blocks_happens_in_a_skip_too():
    torch.manual_seed(0)
    net, xs = Joins(*(Adds() for _ in range(4))), states(4)
    got, counts = outputs(copy.deepcopy(net), Cache("firstblock", threshold=1e6), xs)
    b = net.blocks
    y = b[0](xs[1])
    r1 = b[1](y) - y
    z = torch.cat([y + r1, (y + r1)[:, :2]], dim=1)
    r2 = b[3](b[2](z)) - z
    now = b[0](xs[3]) + r1
    want = (torch.cat([now, now[:, :2]], dim=1) + r2)[:, :5]
    assert counts["reused"] == 2
    torch.testing.assert_close(got[3], want, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_teacaches_signal_is_the_modulated_input():
    net, (noise, cond, _) = deep(), inputs()
    seen: list[Tensor] = []
    hook = net.blocks[0].image.qkv.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    draw(net, noise, cond, STEPS)
    hook.remove()
    error, want, run = 0.0, 0, 0
    for i in range(1, STEPS):
        error += 2.0 * change(seen[i], seen[i - 1])
        if 2 <= i < STEPS - 1 and run < 4 and error < 0.3:
            want, run = want + 1, run + 1
        else:
            error, run = 0.0, 0
    assert len(seen) == STEPS
    up = speed_up(net, Cache("teacache", threshold=0.3, coefficients=(0, 0, 0, 2.0, 0), steps=STEPS))
    with up as fast:
        draw(fast, noise, cond, STEPS)
    assert abs(up.ledger()["cache"]["reused"] - want) <= 1 and want > 1  # the skips move the trajectory a little


class Noted(nn.Linear):
    """A linear that writes down how many rows it maps."""

    rows: int = 0

    def forward(self, input: Tensor) -> Tensor:
        self.rows += input.numel() // input.shape[-1]
        return super().forward(input)


@torch.no_grad()
def test_regions_recompute_the_tokens_that_moved_and_are_exact_for_them():
    """Blocks without attention: what moved is recomputed, what did not is still right."""
    torch.manual_seed(0)
    net = Chain(Adds(linear=Noted), Adds(linear=Noted))
    xs = [torch.randn(2, 5, 6)] * 2
    for token in (3, 0, 3):
        x = xs[-1].clone()
        x[0, token] += 1
        x[1, 4 - token] += 1
        xs.append(x)
    want = [net(x, x, {}) for x in xs]
    linear: Any = net.blocks[0].get_submodule("linear")
    linear.rows = 0
    got, counts = outputs(net, Cache("regions", interval=9, share=0.2), xs)
    assert counts["reused"] == 3 and linear.rows == 2 * 10 + 3 * 2
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_regions_of_all_tokens_are_the_uncached_network():
    net, (noise, cond, _) = deep(), inputs()
    want = draw(net, noise, cond, STEPS)
    with speed_up(net, Cache("regions", interval=3, share=0.99)) as fast:
        torch.testing.assert_close(draw(fast, noise, cond, STEPS), want, rtol=1e-4, atol=1e-5)


class InPlace(Adds):
    def forward(self, x: Tensor, side: Tensor | None = None) -> Tensor:
        y = x + self.linear(x).tanh()
        x.mul_(0)
        return y


class Grows(Adds):
    def forward(self, x: Tensor, side: Tensor | None = None) -> Tensor:
        return torch.cat([x, x], dim=1)


class Twice(Chain):
    def forward(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        return self.blocks[1](self.blocks[0](self.blocks[1](self.blocks[0](x_t))))


class Half(Chain):
    def forward(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        return self.blocks[0](x_t)


@pytest.mark.parametrize(
    ("net", "cache", "words"),
    [
        (Chain(Adds(), InPlace(), Adds()), Cache("firstblock"), "changed in place"),
        (Chain(Adds(), Grows(), Adds()), Cache("firstblock"), "continues none of its inputs"),
        (Twice(Adds(), Adds()), Cache("firstblock"), "runs again or out of order"),
        (Half(Adds(), Adds()), Cache("firstblock"), "ran 1 of its 2 blocks"),
        (Chain(Adds(), Adds(), Adds()), Cache("deepcache"), "needs a UNet"),
        (Chain(Adds(), Adds()), Cache("deepcache"), "none inside"),
        (Chain(Adds(), Grows()), Cache("regions"), "does not pass the sample's tokens"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_network_that_a_policy_cannot_skip_in_is_refused(net, cache, words):
    with pytest.raises(UnsupportedModel, match=words), speed_up(net, cache) as fast, request(10):
        fast(torch.randn(2, 5, 6), torch.ones(2), {})
