"""How fast: latencies taken in turns, peak memory, and network evaluations that are counted, not claimed."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import torch
from torch import nn

from hasten.core.errors import ConfigError

Thunk = Callable[[], Any]


@dataclass(frozen=True)
class Latency:
    """Median and 95th percentile of one call, and every time, in seconds."""

    p50: float
    p95: float
    times: tuple[float, ...]


def synchronise(device: torch.device | str) -> None:
    """Wait until the device has done what was asked of it; nothing to do on the CPU."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def latency(
    thunks: Mapping[str, Thunk], repeats: int = 10, warmup: int = 2, device: torch.device | str = "cpu"
) -> dict[str, Latency]:
    """Time the calls interleaved (A B C A B C ...), so that a machine that slows down slows all of them alike.

    Args:
        thunks: Calls by name.
        repeats: Timed rounds.
        warmup: Rounds before, which are not counted: compilation, caches, allocators.
        device: Synchronised before every clock reading.

    Raises:
        ConfigError: Without a repeat.
    """
    if repeats < 1:
        raise ConfigError(f"A latency needs at least one repeat, not {repeats}.")
    times: dict[str, list[float]] = {name: [] for name in thunks}
    for index in range(warmup + repeats):
        for name, thunk in thunks.items():
            synchronise(device)
            start = time.perf_counter()
            thunk()
            synchronise(device)
            if index >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: summary(values) for name, values in times.items()}


def summary(times: list[float]) -> Latency:
    """Median and 95th percentile of seconds."""
    p50, p95 = (
        torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
    )
    return Latency(p50, p95, tuple(times))


@dataclass(frozen=True)
class Memory:
    """A peak in bytes, and how it was measured."""

    bytes: int
    how: str


def peak_memory(thunk: Thunk, device: torch.device | str = "cpu", every: float = 0.001) -> Memory:
    """The peak memory of one call.

    On CUDA the allocator's maximum during the call, weights included. Elsewhere how far the process's resident memory
    grew above what it was before, read by a thread every ``every`` seconds; freed pages are handed back first, as the
    C library otherwise serves the call from pages of an earlier one and nothing seems to grow.
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        thunk()
        torch.cuda.synchronize(device)
        return Memory(torch.cuda.max_memory_allocated(device), "peak allocated on the device, weights included")
    import psutil

    _trim()
    process, stop = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not stop.wait(every):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        result = thunk()  # held until the last reading, as a caller would hold it
        synchronise(device)
        peak = max(peak, process.memory_info().rss)
        del result
    finally:
        stop.set()
        watcher.join()
    return Memory(peak - before, f"growth of the process's resident memory, read every {every * 1e3:g} ms")


def _trim() -> None:
    """Hand freed heap pages back to the system, where the C library can (glibc)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@dataclass
class Calls:
    """Counts of a network's evaluations: ``calls`` of its forward, ``rows`` of all their batches together."""

    calls: int = 0
    rows: int = 0

    def nfe(self, samples: int) -> float:
        """Network evaluations per sample when ``samples`` were made: a guided call of 2B rows counts as two."""
        return self.rows / samples


@contextmanager
def count_calls(net: nn.Module) -> Iterator[Calls]:
    """Count the evaluations of ``net`` inside the block, by a forward hook that is removed after it."""
    calls = Calls()

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else kwargs["x_t"]
        calls.calls += 1
        calls.rows += len(x)

    handle = net.register_forward_hook(count, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What the numbers were measured on: processor, memory, versions, device; no host name and no paths."""
    import psutil

    device = torch.device(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def _cpu() -> str:
    table = File("/proc/cpuinfo")
    if table.is_file():
        for line in table.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
