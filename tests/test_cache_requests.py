"""No cache carries anything from one request to another: aborted, reshaped, nested, interleaved."""

from __future__ import annotations

import copy
import threading
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.core.errors import ConfigError
from hasten.core.method import Sampling, even
from hasten.core.request import current, request
from hasten.core.sample import sample
from hasten.speed import speed_up
from tests.test_cache import STEPS, acting, deep, every_policy
from tests.test_speed import draw, inputs, relative


class Abort(Exception):
    pass


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("abort"), st.integers(1, STEPS - 1)),
        st.tuples(st.just("abort inside"), st.integers(1, 30)),
        st.tuples(st.just("batch"), st.integers(1, 7)),
        st.tuples(st.just("steps"), st.integers(1, 20)),
        st.tuples(st.just("outside"), st.integers(1, 3)),
        st.tuples(st.just("within"), st.integers(1, 3)),
    ),
    min_size=1,
    max_size=4,
)


def disturb(fast: Any, event: str, n: int, cond: dict[str, Tensor]) -> None:
    """Do to the network what must not reach the next request."""
    batch = n if event == "batch" else 4
    noise, cond = torch.randn(batch, 1, 4, 4), {"label": torch.arange(batch) % 3} if event == "batch" else cond
    if event == "outside":
        fast(noise, torch.full((4,), 0.5), cond)
        return
    if event == "within":
        with request(STEPS):
            for i in range(n):
                fast(noise, torch.full((4,), 1 - 0.1 * i), cond)
            draw(fast, noise, cond, STEPS)
        return
    left, target = n, fast if event == "abort" else fast.blocks[2]

    def stop(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Abort

    hook = target.register_forward_pre_hook(stop) if event.startswith("abort") else None
    with suppress(Abort, ConfigError):  # a plan refuses other step counts
        draw(fast, noise, cond, n if event == "steps" else STEPS)
    if hook:
        hook.remove()


@every_policy
@settings(max_examples=4, deadline=None, derandomize=True)
@given(events=EVENTS)
def test_no_request_reaches_the_next_one(policy, events):
    net, (noise, cond, _) = deep(), inputs()
    cache = acting(net, policy)
    with speed_up(copy.deepcopy(net), cache) as fresh:
        want = draw(fresh, noise, cond, STEPS)
    with speed_up(net, cache) as fast:
        for event, n in events:
            disturb(fast, event, n, cond)
            assert current() is None
        assert torch.equal(draw(fast, noise, cond, STEPS), want)


@every_policy
def test_interleaved_requests_are_bit_exact(policy):
    """Two threads take turns, call by call, on one network with samples of one shape."""
    net = deep()
    jobs = [inputs()[:2], inputs()[:2]]
    with speed_up(net, acting(net, policy)) as fast:
        want = [draw(fast, *job, STEPS) for job in jobs]
        barrier, inner, got = threading.Barrier(2, timeout=60), fast.forward, [torch.empty(0)] * 2

        def turns(*args: Any, **kwargs: Any) -> Any:
            barrier.wait()
            return inner(*args, **kwargs)

        fast.forward = turns

        def work(i: int) -> None:
            got[i] = draw(fast, *jobs[i], STEPS)

        threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        fast.forward = inner
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("policy", ["firstblock", "teacache", "regions"])
def test_a_batch_that_changes_midway_starts_again(policy):
    """Guidance in an interval doubles the batch there: nothing of another shape is used."""
    net, (noise, cond, uncond) = deep(), inputs()
    plan = Sampling(even(STEPS), cfg_scale=2.0)
    want = sample(net, noise, cond, plan, uncond=uncond, interval=(0.3, 0.7))
    with speed_up(net, acting(net, policy)) as fast:
        got = sample(fast, noise, cond, plan, uncond=uncond, interval=(0.3, 0.7))
    assert 0 < relative(got, want) < 0.3
