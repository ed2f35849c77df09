"""What a cache costs where it never fires: every policy's forward over the uncached one, interleaved, medians.

python benchmarks/cache_overhead.py [--device cuda] [--side 16]

The network is the Flux-class transformer of 50 M parameters of benchmarks/adapter.py, called as its
pipeline calls it. Each policy has a network of its own that shares the parameters, and a request that stays open.
"""

from __future__ import annotations

import argparse
import contextvars
import copy
from dataclasses import replace
from typing import Any

import torch
from adapter import PROMPT, flux
from common import save

from hasten import keep_freed_memory
from hasten.core.request import request
from hasten.measure.clock import latency
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


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument(
        "--side", type=int, default=64, help="(side / 2)^2 image tokens; 16: about 50 ms"
    )
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
    applied, opened = {}, []
    at = host(pipe, call)  # known by now
    pipe.scheduler.set_timesteps(STEPS, mu=0.5)  # the probe set its own
    for name, cache in POLICIES.items():
        own = twin(at)
        cache.check(own, [cache])
        applied[name] = cache.apply(own)
        context = contextvars.copy_context()
        opened.append(request(STEPS))  # in a context of its own, where it stays the current one
        context.run(opened[-1].__enter__)
        inner = thunk(own.net)
        thunks[name] = lambda context=context, inner=inner: context.run(inner)
    thunks["bare again"] = thunk(pipe.transformer)
    times = latency(thunks, args.repeats, 3, args.device)
    counts = {name: a.counts() for name, a in applied.items()}
    assert all(c["reused"] == 0 and c["calls"] == args.repeats + 3 for c in counts.values()), counts
    base = times["bare"].p50
    rows = {name: round(times[name].p50 / base - 1, 4) for name in POLICIES}
    numbers = {
        "image tokens": (args.side // 2) ** 2,
        "ms of the bare forward": round(1e3 * base, 1),
        "overhead": rows,
        "noise: the bare forward again": round(times["bare again"].p50 / base - 1, 4),
        "bar": BAR,
        "met": max(rows.values()) <= BAR,
    }
    save("cache-overhead" if args.device == "cpu" else f"cache-overhead-{args.device}", numbers, 0, args.device)


if __name__ == "__main__":
    main()
