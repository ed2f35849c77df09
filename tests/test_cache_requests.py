"""No layer carries anything from one request to another: aborted, reshaped, nested, interleaved."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
from hasten.speed import Cache, Guidance, Quantize, speed_up
from hasten.speed.calibrate import calibrate
from hasten.speed.host import host
from tests.pipelines import FAMILIES
from tests.test_cache import ACTS, STEPS, acting, deep, every_policy
from tests.test_speed import draw, inputs, relative

Job = tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]  # noise, conditions, no conditions
SCALE = 2.5
fuzzed = settings(max_examples=15, deadline=None, derandomize=True)
ORDER = st.tuples(st.just("turns"), st.lists(st.integers(0, 1), max_size=30))  # who makes the next call


class Abort(Exception):
    pass


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("abort"), st.integers(1, STEPS - 1)),
        st.tuples(st.just("abort inside"), st.integers(1, 30)),
        st.tuples(st.just("batch"), st.integers(1, 7)),
        st.tuples(st.just("steps"), st.integers(1, 20)),
        st.tuples(st.just("scale"), st.integers(1, 4)),
        st.tuples(st.just("outside"), st.integers(1, 3)),
        st.tuples(st.just("within"), st.integers(1, 3)),
        ORDER,
    ),
    min_size=1,
    max_size=4,
)


class Turns:
    """Two threads of which one runs at a time; who makes the next call of the network is said beforehand."""

    def __init__(self, order: Sequence[int], resumed: Callable[[int], None] = lambda me: None):
        self.order, self.now, self.alive, self.turned = list(order), 0, {0, 1}, threading.Condition()
        self.resumed, self.me, self.switches = resumed, threading.local(), 0

    def wait(self) -> None:
        assert self.turned.wait_for(lambda: self.now == self.me.id, timeout=60)
        self.resumed(self.me.id)

    def call(self) -> None:
        """Before every call of the network: let the other one go first, where it is its turn."""
        with self.turned:
            wanted = self.order.pop(0) if self.order else 1 - self.me.id
            self.switches += wanted != self.me.id and wanted in self.alive
            self.now = wanted if wanted in self.alive else self.me.id
            self.turned.notify_all()
            self.wait()

    def run(self, net: Any, jobs: Sequence[Callable[[], Any]]) -> list[Any]:
        """What two jobs return, their calls of ``net`` interleaved."""
        inner, own, got = net.forward, "forward" in vars(net), [None, None]

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.call()
            return inner(*args, **kwargs)

        def work(i: int) -> None:
            self.me.id = i
            try:
                with self.turned:
                    self.wait()
                got[i] = jobs[i]()
            finally:
                with self.turned:
                    self.alive.discard(i)
                    self.now = 1 - i
                    self.turned.notify_all()

        assert own
        net.forward = forward
        threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        net.forward = inner
        return got


# --- networks -------------------------------------------------------------------------------------------------

GUIDED: dict[str, tuple[Any, ...]] = {
    "reuse": (Guidance(reuse=2),),
    "interval": (Guidance(interval=(0.25, 0.75)),),
    "gate": (Guidance(scales=(3.0, 1.0, 2.0, 1.0)),),
    "reuse in an interval": (Guidance(interval=(0.1, 0.8), reuse=1),),
    "guidance over a cache": (Guidance(reuse=1), Cache("firstblock", threshold=0.5)),
}
RANGES = ("ranges", "ranges under guidance and a cache")
_ready: dict[str, tuple[Any, tuple[Any, ...], list[Job], list[Tensor]]] = {}


def asked(fast: Any, name: str, job: Job, steps: int = STEPS, scale: float | None = None) -> Tensor:
    """One request; two calls a step beside a cache, which starts again where a batch of both branches is halved."""
    noise, cond, uncond = job
    scale = (1.0 if name in ACTS or name == "ranges" else SCALE) if scale is None else scale
    more: dict[str, Any] = {} if scale == 1 else {"uncond": uncond, "two_calls": "cache" in name}
    return sample(fast, noise, cond, Sampling(even(steps), cfg_scale=scale), **more)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """By a name: a network, its layers, three requests, and each one's answer when nothing else was asked."""
    file = str(tmp_path_factory.mktemp("requests") / "calibration.safetensors")

    def made(name: str) -> Any:
        if name not in _ready:
            net = deep()
            torch.manual_seed(1)
            jobs = [inputs(4), inputs(4), inputs(3)]
            if name in RANGES:
                calibrate(net, [jobs[0][1]], Sampling(even(STEPS)), ranges=3).save(file)
                layers: tuple[Any, ...] = (Quantize("int8_static", 32, ranges=3, calibration=file),)
                layers += () if name == "ranges" else (Guidance(reuse=1), Cache("easycache", threshold=0.3))
            else:
                layers = GUIDED.get(name) or (acting(net, name),)
            wants = []
            for job in jobs:
                with speed_up(copy.deepcopy(net), *layers) as fresh:
                    wants.append(asked(fresh, name, job))
            _ready[name] = net, layers, jobs, wants
        return _ready[name]

    return made


@contextmanager
def aborted(module: Any, n: int) -> Iterator[None]:
    """What runs inside ends in the ``n``-th call of the module, where there are so many."""
    left = itertools.count(1)

    def stop(*_: Any) -> None:
        if next(left) == n:
            raise Abort

    hook = module.register_forward_pre_hook(stop)
    try:
        with suppress(Abort):
            yield
    finally:
        hook.remove()


def disturb(fast: Any, event: str, n: Any, name: str, jobs: Sequence[Job], wants: Sequence[Tensor]) -> None:
    """Do to the network what must not reach the next request."""
    noise, cond, _ = jobs[0]
    if event == "outside":
        fast(noise, torch.full((4,), 0.5), cond)
    elif event == "within":
        with request(STEPS):
            for i in range(n):
                fast(noise, torch.full((4,), 1 - 0.1 * i), cond)
            asked(fast, name, jobs[0])
    elif event == "turns":
        other = 1 + len(n) % 2  # of the same shape, or of another
        got = Turns(n).run(fast, [lambda i=i: asked(fast, name, jobs[i]) for i in (0, other)])
        assert torch.equal(got[0], wants[0]) and torch.equal(got[1], wants[other])
    elif event == "scale":
        asked(fast, name, jobs[0], scale=float(n))
    elif event == "batch":
        asked(fast, name, inputs(n))
    elif event == "steps":
        with suppress(ConfigError):  # a plan refuses other step counts
            asked(fast, name, jobs[0], n)
    else:
        with aborted(fast if event == "abort" else fast.blocks[2], n):
            asked(fast, name, jobs[0])


def unreached(name: str, made: Any, events: Sequence[tuple[str, Any]]) -> None:
    net, layers, jobs, wants = made
    with speed_up(net, *layers) as fast:
        asked(fast, name, jobs[1])  # every layer acts, whatever follows
        for event, n in events:
            disturb(fast, event, n, name, jobs, wants)
            assert current() is None
        assert torch.equal(asked(fast, name, jobs[0]), wants[0])


@every_policy
@fuzzed
@given(events=EVENTS)
def test_no_request_reaches_the_next_one(ready, policy, events):
    unreached(policy, ready(policy), events)


@pytest.mark.parametrize("name", [*GUIDED, *RANGES])
@fuzzed
@given(events=EVENTS)
def test_no_request_reaches_the_next_one_under_guidance_and_ranges(ready, name, events):
    unreached(name, ready(name), events)


def test_turns_are_taken_call_by_call(ready):
    """What the fuzz relies on: the calls of two requests do alternate, and both are made in full."""
    net, layers, jobs, wants = ready("easycache")
    with speed_up(net, *layers) as fast:
        turns = Turns([])
        got = turns.run(fast, [lambda i=i: asked(fast, "easycache", jobs[i]) for i in (0, 1)])
    assert turns.switches == 2 * STEPS and all(torch.equal(a, b) for a, b in zip(got, wants[:2], strict=True))


# --- a pipeline -----------------------------------------------------------------------------------------------

PIPELINE: dict[str, tuple[Any, ...]] = {
    "sd3": (Cache("easycache", threshold=50.0, max_skips=2), Guidance(reuse=1)),  # both branches in one call
    "qwenimage": (Cache("firstblock", threshold=50.0), Guidance(interval=(0.2, 0.9))),  # two calls
}
MANY = 8
EVENTS_OF_PIPELINES = st.lists(
    st.one_of(
        st.tuples(st.just("abort"), st.integers(1, MANY)),
        st.tuples(st.just("abort inside"), st.integers(1, MANY)),
        st.tuples(st.just("batch"), st.integers(2, 3)),
        st.tuples(st.just("steps"), st.integers(5, 12)),
        st.tuples(st.just("unguided"), st.integers(1, 1)),
        st.tuples(st.just("outside"), st.integers(1, 3)),
        ORDER,
    ),
    min_size=1,
    max_size=3,
)
_pipes: dict[str, Any] = {}


def of_pipeline(pipe: Any, call: dict[str, Any], seed: int = 0, **more: Any) -> Tensor:
    """The latents of one request."""
    fixed = {"num_inference_steps": MANY, "output_type": "latent", "generator": torch.Generator().manual_seed(seed)}
    return pipe(**{**call, **fixed, **more})[0]


def a_pipeline(family: str) -> Any:
    """A pipeline, its call, two requests, each one's answer when nothing else was asked, one call of its network."""
    if family not in _pipes:
        pipe, call = FAMILIES[family]()
        pipe.set_progress_bar_config(disable=True)
        net, seen = host(pipe, call).net, []
        hook = net.register_forward_pre_hook(lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
        of_pipeline(pipe, call)
        hook.remove()
        jobs, wants = [{}, {"seed": 1, "prompt": "two grey dogs", "num_inference_steps": 10}], []
        for job in jobs:
            with speed_up(pipe, *PIPELINE[family], call=call) as fast:
                wants.append(of_pipeline(fast, call, **job))
        _pipes[family] = pipe, call, net, jobs, wants, seen[0]
    return _pipes[family]


@pytest.mark.parametrize("family", PIPELINE)
@fuzzed
@given(events=EVENTS_OF_PIPELINES)
def test_no_request_of_a_pipeline_reaches_the_next_one(family, events):
    pipe, call, net, jobs, wants, seen = a_pipeline(family)
    layers = PIPELINE[family]

    def in_turns(order: Sequence[int]) -> None:
        """Each request has a scheduler of its own, as those of two pipelines that share a network have."""
        own = pipe.scheduler
        each = [copy.deepcopy(own), copy.deepcopy(own)]

        def resumed(me: int) -> None:
            pipe.scheduler = each[me]

        both = [lambda job=job: of_pipeline(pipe, call, **job) for job in jobs]
        got = Turns(order, resumed).run(net, both)
        pipe.scheduler = own
        assert all(torch.equal(a, b) for a, b in zip(got, wants, strict=True))

    with speed_up(pipe, *layers, call=call) as fast:
        of_pipeline(fast, call, seed=2)
        for event, n in events:
            if event == "outside":
                plain = [net(*seen[0], **seen[1])[0] for _ in range(n)]
                assert all(torch.equal(v, plain[0]) for v in plain)
            elif event == "turns":
                in_turns(n)
            elif event == "unguided":
                scale = "true_cfg_scale" if family == "qwenimage" else "guidance_scale"
                of_pipeline(fast, {**call, scale: 1.0})
            elif event == "batch":
                two = {k: [call[k]] * n for k in ("prompt", "negative_prompt")}
                of_pipeline(fast, call, **two)
            elif event == "steps":
                of_pipeline(fast, call, num_inference_steps=n)
            else:
                with aborted(net if event == "abort" else host(pipe, call).blocks[1], n):
                    of_pipeline(fast, call)
            assert current() is None
        assert torch.equal(of_pipeline(fast, call, **jobs[0]), wants[0])


# --- threads --------------------------------------------------------------------------------------------------


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
