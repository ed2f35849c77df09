"""What a network's linears see while it samples: the statistics that quantization rests on, signed, in a file."""

from __future__ import annotations

import json
import random
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hasten.core.denoiser import Batch
from hasten.core.errors import CheckpointError, ConfigError
from hasten.core.method import Sampling, even
from hasten.core.sample import sample
from hasten.models.probe import kept
from hasten.speed.foreign import quantizer
from hasten.speed.host import Host, host
from hasten.speed.linears import places
from hasten.speed.plan import fingerprint
from hasten.speed.rounding import Stats
from hasten.speed.saved import plain, unplain
from hasten.speed.transform import override
from hasten.whole import write

FORMAT = "hasten-calibration-1"
PARTS = ("high", "mean", "rows", "when")
PER_CALL = 16  # rows of a linear's input that one call may give to the sample
_own: WeakKeyDictionary[Any, tuple[Any, Calibration]] = WeakKeyDictionary()  # by network, the last of its own


@dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics of the linears in a network's blocks over whole sampling runs; made by :func:`calibrate`.

    Args:
        fingerprint: Of the network and its scheduler, as :func:`hasten.speed.plan.fingerprint` has it.
        edges: Path times between the ranges, rising; one fewer than there are ranges.
        times: Every path time that was visited, rising.
        linears: Statistics by path; linears that never ran are not there.
        calls: A random sample of the network's calls, its arguments by name.
    """

    fingerprint: dict[str, Any]
    edges: tuple[float, ...]
    times: tuple[float, ...]
    linears: dict[str, Stats]
    calls: list[dict[str, Any]]

    @property
    def ranges(self) -> int:
        """Ranges of times."""
        return len(self.edges) + 1

    def save(self, file: File | str) -> str:
        """Write safetensors and return the file's name, for ``Quantize(calibration=...)``.

        Raises:
            ConfigError: If it cannot be written, or a call has an argument that is no plain value; calibrate with
                ``calls=0`` then.
        """
        tensors: dict[str, Tensor] = {}
        for name, stats in self.linears.items():
            for part in PARTS:
                tensors[f"linear:{name}:{part}"] = getattr(stats, part).contiguous().clone()
        about = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "edges": self.edges,
            "times": self.times,
            "linears": {name: stats.tokens for name, stats in self.linears.items()},
            "calls": [plain(call, tensors) for call in self.calls],
        }
        write(file, lambda partial: save_file(tensors, partial, metadata={"hasten": json.dumps(about)}))
        return str(file)

    @classmethod
    def load(cls, file: File | str) -> Calibration:
        """Read what :meth:`save` wrote. Raises CheckpointError where it cannot be read or is something else."""
        about = header(file)
        with safe_open(file, "pt") as opened:
            read = lambda name: opened.get_tensor(name)  # noqa: E731
            linears = {
                name: Stats(*(read(f"linear:{name}:{part}") for part in PARTS), tokens=tokens)
                for name, tokens in about["linears"].items()
            }
            calls = [unplain(call, read) for call in about["calls"]]
        return cls(about["fingerprint"], tuple(about["edges"]), tuple(about["times"]), linears, calls)


def header(file: File | str) -> dict[str, Any]:
    """What a calibration's file says of itself, without its tensors. Raises CheckpointError as ``load`` does."""
    try:
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {}).get("hasten", "{}"))
    except Exception as error:  # safetensors and the file system raise several types
        raise CheckpointError(
            f"Cannot read the calibration {file}: {error}; write one with hasten.calibrate(model, prompts).save(file)."
        ) from error
    if about.get("format") != FORMAT:
        raise CheckpointError(f"{file} is no calibration; write one with hasten.calibrate(model, prompts).save(file).")
    return about


def matches(about: Mapping[str, Any], at: Host, file: File | str) -> None:
    """Raise CheckpointError for a calibration of another network, of other weights or with another scheduler."""
    now, then = fingerprint(at), about["fingerprint"]
    for key in ("model", "weights", "scheduler"):
        if now.get(key) != then.get(key):
            raise CheckpointError(
                f"{file} was calibrated with another {key} ({then.get(key)}, here {now.get(key)}); calibrate this "
                "model as it will run."
            )


# --- the run ------------------------------------------------------------------------------------------------------


@dataclass
class Watch:
    """What is gathered of one linear while it runs; ``high``, ``total`` and ``count`` by time."""

    generator: torch.Generator
    size: int
    high: dict[float, Tensor] = field(default_factory=dict)
    total: dict[float, Tensor] = field(default_factory=dict)
    count: dict[float, int] = field(default_factory=dict)
    rows: Tensor | None = None
    when: list[float] = field(default_factory=list)
    keys: Tensor | None = None
    tokens: bool = False

    def see(self, x: Tensor, t: float, samples: int) -> None:
        """One input [..., in] at time t of a call with so many samples."""
        rows = x.detach().reshape(-1, x.shape[-1])
        size = rows.abs().float()
        high, total = size.amax(0).cpu(), size.sum(0).cpu()
        self.high[t] = torch.maximum(self.high[t], high) if t in self.high else high
        self.total[t] = self.total.get(t, 0) + total
        self.count[t] = self.count.get(t, 0) + len(rows)
        self.tokens = self.tokens or len(rows) > samples
        few = torch.randperm(len(rows), generator=self.generator)[:PER_CALL]
        keys = torch.rand(len(few), generator=self.generator)  # the rows with the smallest keys are a fair sample
        picked = rows[few.to(rows.device)].cpu()
        if self.rows is not None and self.keys is not None:
            picked, keys = torch.cat([self.rows, picked]), torch.cat([self.keys, keys])
        when = [*self.when, *[t] * len(few)]
        best = keys.argsort()[: self.size]
        self.rows, self.keys, self.when = picked[best], keys[best], [when[i] for i in best.tolist()]

    def stats(self, edges: Sequence[float]) -> Stats:
        """By range. A range in which the linear never ran has the statistics of all."""
        assert self.rows is not None
        high, mean = [], []
        for i in range(len(edges) + 1):
            mine = [t for t in self.high if bisect_right(edges, t) == i] or list(self.high)
            high.append(torch.stack([self.high[t] for t in mine]).amax(0))
            mean.append(sum((self.total[t] for t in mine), torch.zeros(())) / sum(self.count[t] for t in mine))
        when = torch.tensor([bisect_right(edges, t) for t in self.when])
        return Stats(torch.stack(high), torch.stack(mean), self.rows, when, self.tokens)


def calibrate(
    model: Any,
    runs: Sequence[Any],
    steps: int | Sampling = 25,
    *,
    ranges: int = 1,
    call: Mapping[str, Any] | None = None,
    rows: int = 128,
    calls: int = 32,
    seed: int = 0,
) -> Calibration:
    """Sample with a model, as it will be used, and write down what the linears in its blocks see.

    Args:
        model: A diffusers pipeline or a native denoiser, not yet quantized.
        runs: One each: for a pipeline a prompt (or class label), or the arguments of its call; for a native denoiser
            its conditions, each [B, ...], or a ``Batch``; for either a function of the model that runs it.
        steps: Of each run, best as many as will be used; a native denoiser also takes a ``Sampling``.
        ranges: Ranges of times with statistics of their own, each with as many of the visited times.
        call: How a pipeline is called, for what the runs leave out.
        rows: Of every linear's input that are kept, for the searches.
        calls: Of the network that are kept, for ``Quantize(max_error=...)``.

    Raises:
        ConfigError: Without runs, for a run that is none of these, and for more ranges than there were times.
        UnsupportedModel: As ``speed_up``.
    """
    if isinstance(runs, (str, Mapping)) or not len(runs):
        raise ConfigError("calibrate needs a list of runs: prompts or calls of a pipeline, conditions of a denoiser.")
    at = host(model, call)
    watches: dict[nn.Module, tuple[str, Watch]] = {}
    generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    for path, _, _, linear in places(at):
        watches.setdefault(linear, (path, Watch(generator, rows)))
    if not watches:
        why = f"{owner} has quantized them already" if (owner := quantizer(at.net)) else "it has none"
        raise ConfigError(f"calibrate looks at the linears inside the blocks of {type(at.net).__name__}; {why}.")
    seen: list[dict[str, Any]] = []
    now, count = [0.0, 1], 0
    inner = at.net.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        look = at.look(args, kwargs)
        now[:] = round(float(look.t.reshape(-1)[0]), 6), len(look.x_t)
        count += 1
        place = len(seen) if len(seen) < calls else chance.randrange(count)
        if place < calls:
            seen[place : place + 1] = [kept(at.arguments(args, kwargs))]
        return inner(*args, **kwargs)

    def watched(watch: Watch) -> Callable[[Any, Any], None]:
        return lambda module, args: watch.see(args[0], float(now[0]), int(now[1]))

    with ExitStack() as stack, torch.no_grad():
        stack.callback(override(at.net, forward))
        for linear, (_, watch) in watches.items():
            stack.callback(linear.register_forward_pre_hook(watched(watch)).remove)
        for i, one in enumerate(runs):
            play(at, one, steps, call or {}, seed + i)
    found = {path: watch for path, watch in watches.values() if watch.rows is not None}
    times = sorted({t for watch in found.values() for t in watch.high})
    if not times or len(times) < ranges:
        raise ConfigError(f"The runs visited {len(times)} times, too few for {ranges} ranges; raise steps.")
    ends = [len(times) * i // ranges for i in range(1, ranges)]
    edges = tuple((times[i - 1] + times[i]) / 2 for i in ends)
    linears = {path: watch.stats(edges) for path, watch in found.items()}
    return Calibration(fingerprint(at), edges, tuple(times), linears, seen)


def own_calibration(at: Host, ranges: int, calls: int) -> Calibration:
    """A pipeline's calibration by one run of its own call, in its steps or 25; made once for a network as it is.

    Args:
        ranges, calls: As in :func:`calibrate`.
    """
    key = (repr(sorted(fingerprint(at).items())), repr(at.call), ranges, calls)
    known = _own.get(at.net)
    if known is None or known[0] != key:
        steps = at.call.get("num_inference_steps") or 25
        known = _own[at.net] = (key, calibrate(at.pipe, [{}], steps, ranges=ranges, call=at.call, calls=calls))
    return known[1]


def play(at: Host, one: Any, steps: int | Sampling, call: Mapping[str, Any], seed: int) -> None:
    """Sample once, from noise of ``seed``."""
    device = next(at.net.parameters()).device
    if callable(one):
        one(at.net if at.pipe is None else at.pipe)
    elif at.pipe is not None:
        pipeline(at, one, steps, call, seed)
    elif isinstance(one, (Batch, Mapping)):
        cond, uncond = (one.cond, one.uncond) if isinstance(one, Batch) else (one, None)
        shape = one.shape if isinstance(one, Batch) else native_shape(at, one)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
        sampling = steps if isinstance(steps, Sampling) else Sampling(even(steps))
        sample(at.net, noise, cond, sampling, uncond=uncond or None)
    else:
        raise ConfigError(f"A run of {type(at.net).__name__} is its conditions or a Batch, not {one!r}.")


def native_shape(at: Host, cond: Mapping[str, Tensor]) -> tuple[int, ...]:
    """[B, C, H, W] of samples with these conditions."""
    config = getattr(at.net, "config", None)
    if config is None or not cond:
        raise ConfigError(f"The shape of {type(at.net).__name__}'s samples is not known; give runs as Batch.")
    return (len(next(iter(cond.values()))), config.channels, *config.size)


def pipeline(at: Host, one: Any, steps: int | Sampling, call: Mapping[str, Any], seed: int) -> None:
    """Call the pipeline, without a picture at the end where it can."""
    import inspect

    from hasten.models.diffusers import asked
    from hasten.models.probe import quiet

    if not isinstance(steps, int):
        raise ConfigError("A pipeline is calibrated with a number of steps.")
    given = dict(one) if isinstance(one, Mapping) else {at.adapter.found.subject: one}
    _, whole = asked(at.pipe, {**call, **given})
    known = inspect.signature(at.pipe.__call__).parameters
    more = {"generator": torch.Generator().manual_seed(seed), "output_type": "latent"}
    with quiet(at.pipe):
        at.pipe(**{"num_inference_steps": steps, **{k: v for k, v in more.items() if k in known}, **whole})
