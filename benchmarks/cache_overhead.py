"""What a cache costs where it never fires: every policy's forward over the uncached one, interleaved, medians.

python benchmarks/cache_overhead.py [--device cuda] [--side 16]

The network is the Flux-class transformer of 50 M parameters of benchmarks/adapter.py, called as its
pipeline calls it. Each policy has a network of its own that shares the parameters, and a request that stays open.
"""

from __future__ import annotations

import argparse
import contextvars
import copy
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from adapter import PROMPT, flux
from common import save

from hasten import keep_freed_memory
from hasten.core.request import request
from hasten.measure.clock import synchronise
from hasten.models.encode import one
from hasten.models.template import fill
from hasten.speed.cache import Cache
from hasten.speed.host import Host, host

STEPS = 400
POLICIES: dict[str, Cache] = {
    "easycache": Cache(threshold=1e-12),
    "taylor": Cache("taylor", threshold=1e-12, degree=2),
    "schedule": Cache("schedule", mask="0" * STEPS),
    "magcache": Cache("magcache", threshold=1e-12, ratios=(2.0,) * STEPS),
    "teacache": Cache("teacache", threshold=1e-12, coefficients=(0, 0, 0, 1, 1), steps=STEPS),
    "firstblock": Cache("firstblock", threshold=1e-12),
    "dual": Cache("dual", threshold=1e-12, first=2, last=2, degree=1),
    "dicache": Cache("dicache", threshold=1e-12),
    "regions": Cache("regions", interval=1),
}
BAR = 0.015


def twin(at: Host) -> Host:
    """The host with a network of its own that shares the parameters."""
    net = copy.deepcopy(at.net, {id(p): p for p in (*at.net.parameters(), *at.net.buffers())})
    return replace(at, net=net, blocks=[net.get_submodule(name) for name in at.names])


def measured(thunks: dict[str, Any], repeats: int, device: str) -> tuple[dict[str, list[float]], ...]:
    """Wall-clock and CPU seconds of every call, interleaved, in an order that turns; three rounds are not counted.

    On a machine that others use, the time that this process computed says more than the time that passed.
    """
    wall, work = ({name: [] for name in thunks} for _ in range(2))
    names = list(thunks)
    for index in range(3 + repeats):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            synchronise(device)
            start, used = time.perf_counter(), time.process_time()
            thunks[name]()
            synchronise(device)
            if index >= 3:
                wall[name].append(time.perf_counter() - start)
                work[name].append(time.process_time() - used)
    return wall, work


def overhead(times: dict[str, list[float]]) -> dict[str, float]:
    """Medians over the bare call's, less 1; ``bare again`` is the noise."""
    base = statistics.median(times["bare"])
    return {name: round(statistics.median(v) / base - 1, 4) for name, v in times.items() if name != "bare"}


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--side", type=int, default=64, help="(side / 2)^2 image tokens; 16: about 50 ms")
    args = parser.parse_args()
    keep_freed_memory()
    pipe, call = flux(side=args.side)
    pipe.to(args.device)
    net = host(pipe, call).adapter
    cond = {k: v.to(args.device) for k, v in one(pipe, net, PROMPT).items()}
    torch.manual_seed(0)
    samples = [torch.randn(1, *net.shape, device=args.device) for _ in range(4)]
    calls = [
        {k: fill(node, samples[i % 4], net.found.dial(torch.tensor([1 - i / 500.0]).to(args.device).double()), cond)
         for k, node in net.templates[net.shape].items()}
        for i in range(STEPS)
    ]  # fmt: skip

    def thunk(module: Any) -> Any:
        rest = iter(calls)

        def run() -> None:
            with torch.no_grad():
                module(**next(rest))

        return run

    thunks: dict[str, Any] = {"bare": thunk(pipe.transformer)}
    applied, opened, contexts = {}, [], []
    at = host(pipe, call)  # known by now
    pipe.scheduler.set_timesteps(STEPS, mu=0.5)  # the probe set its own
    for name, cache in POLICIES.items():
        own = twin(at)
        cache.check(own, [cache])
        applied[name] = cache.apply(own)
        context = contextvars.copy_context()
        contexts.append(context)
        opened.append(request(STEPS))  # in a context of its own, where it stays the current one
        context.run(opened[-1].__enter__)
        inner = thunk(own.net)
        thunks[name] = lambda context=context, inner=inner: context.run(inner)
    thunks["bare again"] = thunk(pipe.transformer)
    wall, work = measured(thunks, args.repeats, args.device)
    for context, one_ in zip(contexts, opened, strict=True):
        context.run(one_.__exit__, None, None, None)
    counts = {name: a.counts() for name, a in applied.items()}
    assert all(c["reused"] == 0 and c["calls"] == args.repeats + 3 for c in counts.values()), counts
    numbers = {
        "image tokens": (args.side // 2) ** 2,
        "ms of the bare forward": round(1e3 * statistics.median(wall["bare"]), 1),
        "overhead": overhead(wall),
        "overhead in the process's CPU time": overhead(work),
        "bar": BAR,
    }
    clock = overhead(work if args.device == "cpu" else wall)
    numbers["met"] = max(v for name, v in clock.items() if name in POLICIES) <= BAR
    parts = ["cache-overhead", *(["small"] if args.side < 64 else []), *([args.device] if args.device != "cpu" else [])]
    save("-".join(parts), numbers, 0, args.device)


if __name__ == "__main__":
    main()
