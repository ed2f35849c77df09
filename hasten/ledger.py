"""What each layer of a stack gains and costs: every layer alone, every pair, every prefix, measured side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.core.errors import ConfigError, HastenError
from hasten.core.request import current
from hasten.measure.clock import peak_memory, summary, synchronise
from hasten.measure.perceptual import fidelity
from hasten.speed.host import Host
from hasten.speed.transform import Applied, SpeedUp, Transform, once, override, speed_up
from hasten.workload import Workload

GAIN = 1.03  # a smaller gain is not told from noise
FIGHT, HELP = 0.93, 1.07  # measured speed-up of a pair over the product of both


@dataclass
class Line:
    """One combination of layers, measured.

    Args:
        layers: Their names, in the order in which they apply; empty for the baseline.
        p50, p95: Seconds of a request.
        memory: Peak bytes that a request adds to the weights, as ``clock.peak_memory`` measures them.
        counts: What every layer counted, over the quality run.
        trajectory: psnr and ssim (and lpips where its weights are at hand) to the baseline's samples of the same noise.
        quality: The judge's numbers, where there is a judge; of samples paired with the baseline's, ``fd_more``, the
            share by which FD + floor is above its, with two standard errors around it (``_low``, ``_high``).
        refused: Why the combination could not be built or did nothing; no number is there then.
    """

    layers: tuple[str, ...]
    p50: float = math.nan
    p95: float = math.nan
    memory: int = 0
    counts: dict[str, dict[str, float]] = field(default_factory=dict)
    trajectory: dict[str, float] = field(default_factory=dict)
    quality: dict[str, float] = field(default_factory=dict)
    refused: str = ""

    @property
    def name(self) -> str:
        return " + ".join(self.layers) or "baseline"


@dataclass(frozen=True)
class Nudge:
    """Flips the last bit of every number of the network's first input: the smallest change there can be."""

    name: ClassVar[str] = "nudge"
    order: ClassVar[int] = 5

    def check(self, at: Host, stack: Sequence[Transform]) -> None:
        """Anything can be nudged."""

    def apply(self, at: Host) -> Applied:
        """Change the sample that the first call of every request sees."""
        inner, count = at.net.forward, [0]
        latent = "x_t" if at.adapter is None else at.adapter.found.latent

        def up(v: Any) -> Any:
            return torch.nextafter(v, torch.full_like(v, math.inf)) if isinstance(v, Tensor) else [up(w) for w in v]

        def forward(*args: Any, **kwargs: Any) -> Any:
            mine, given = current(), at.arguments(args, kwargs)
            if mine is not None and (self, "done") not in mine.state:
                mine.state[self, "done"] = True
                given[latent] = up(given[latent])
                count[0] += 1
            return inner(**given)

        return Applied(override(at.net, forward), lambda: {"requests": float(count[0])}, lambda: None)


def combinations_of(stack: Sequence[Transform]) -> list[tuple[Transform, ...]]:
    """The baseline, every layer alone, every pair, every prefix; each once, small ones first."""
    ordered = sorted(stack, key=lambda t: t.order)
    prefixes = [tuple(ordered[:n]) for n in range(3, len(ordered) + 1)]
    return [(), *((t,) for t in ordered), *combinations(ordered, 2), *prefixes]


@dataclass
class Ledger:
    """All lines, and the floors against which their losses mean something.

    Args:
        lines: The first is the baseline.
        floor: ``last bit``: the baseline against itself with the last bit of its first input flipped.
        quality_floor: Real held-out images under the same judge; empty without one.
        seed_floor: The judge's numbers of the baseline with another seed.
    """

    lines: list[Line]
    floor: dict[str, float]
    quality_floor: dict[str, float] = field(default_factory=dict)
    seed_floor: dict[str, float] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def line(self, *layers: str) -> Line | None:
        """The line of these layers, whatever their order."""
        return next((x for x in self.lines if set(x.layers) == set(layers)), None)

    def gain(self, line: Line) -> float:
        """How many times faster than the baseline, by the medians."""
        return self.lines[0].p50 / line.p50

    def marginal(self, line: Line) -> float | None:
        """The gain of the last layer of a prefix over the prefix without it; None where that was not measured."""
        before = self.line(*line.layers[:-1]) if line.layers else None
        return None if before is None or line.refused or before.refused else before.p50 / line.p50

    def interaction(self, line: Line) -> float | None:
        """The measured speed-up over the product of its layers' own: below 1 they fight, above 1 they help."""
        alone = [self.line(name) for name in line.layers]
        if len(line.layers) < 2 or line.refused or any(x is None or x.refused for x in alone):
            return None
        return self.gain(line) / math.prod(self.gain(x) for x in alone if x is not None)

    def extra_loss(self, line: Line) -> float | None:
        """Mean squared error to the baseline, less the sum of its layers' own; images in [-1, 1]."""
        alone = [self.line(name) for name in line.layers]
        if len(line.layers) < 2 or line.refused or any(x is None or x.refused for x in alone):
            return None
        return error_of(line) - sum(error_of(x) for x in alone if x is not None)

    def verdict(self, line: Line) -> str:
        """What a person should know of the line, in words."""
        if line.refused:
            return line.refused
        if not line.layers:
            return "what everything is compared with"
        gain, pair = self.gain(line), self.interaction(line)
        said = f"{gain:.2f} times as fast" if gain >= GAIN else f"gains nothing measurable ({gain:.2f} times)"
        said = f"makes it slower ({gain:.2f} times as fast)" if gain < 1 / GAIN else said
        if pair is not None and not FIGHT <= pair <= HELP:
            expected = gain / pair
            said += f", where {expected:.2f} times was expected: these {'fight' if pair < 1 else 'help each other'}"
        return f"{said}; {self.cost(line)}"

    def cost(self, line: Line) -> str:
        """The loss in words, against the floors."""
        same, floor = line.trajectory.get("psnr", math.inf), self.floor.get("psnr", math.inf)
        if same == math.inf or same >= floor - 1:
            return "it changes the samples no more than a flipped last bit does"
        said = f"PSNR {same:.1f} dB to the baseline (a flipped last bit: {floor:.1f})"
        if line.quality and self.lines[0].quality:
            low, high = line.quality["fd_more_low"], line.quality["fd_more_high"]
            said += (
                f", FD {line.quality['fd']:.3f} against {self.lines[0].quality['fd']:.3f} ({low:+.1%} to {high:+.1%}"
            )
            said += f" of FD + floor): {'it costs quality' if low > 0 else self.beside_fd(line)}"
        return said

    def beside_fd(self, line: Line) -> str:
        """Where FD shows no loss: KD and recall that are worse by more than another seed changes the baseline's."""
        found = []
        for key, name, sign in (("kd", "KD", 1), ("recall", "recall", -1)):
            if key not in self.seed_floor:
                continue
            own, mine = self.lines[0].quality[key], line.quality[key]
            noise = abs(self.seed_floor[key] - own)
            if sign * (mine - own) > noise:
                found.append(f"{name} {mine:.4f} against {own:.4f} (another seed changes it by {noise:.4f})")
        return f"nothing in FD, but {' and '.join(found)}" if found else "nothing measurable in distribution"


def error_of(line: Line) -> float:
    """Mean squared error to the baseline, from PSNR over a range of 2."""
    return 4 * 10 ** (-line.trajectory.get("psnr", math.inf) / 10)


def build(
    work: Workload,
    stack: Sequence[Transform],
    *,
    count: int = 16,
    repeats: int = 5,
    rounds: int = 3,
    tell: Callable[[str], None] = lambda text: None,
) -> Ledger:
    """Measure every combination of ``stack`` on ``work``.

    Samples are made once for each combination. Times are taken in ``rounds``, every round visiting all combinations
    once with one request to warm up and ``repeats`` that count, so that a machine that slows down slows them all.
    Ctrl-C ends them; the whole rounds before it are kept, and ``about["rounds"]`` says how many.

    Args:
        count: Samples that are compared, and judged where there is a judge.

    Raises:
        ConfigError: For two layers of one name, a layer that cannot be undone, or where no combination could be built.
    """
    once(stack)
    dropped = [t.name for t in stack if getattr(t, "keep", True) is False]
    if dropped:
        raise ConfigError(f"The ledger takes every layer off again: set keep: true for {', '.join(dropped)}.")
    at, sets = work.host, combinations_of(stack)
    lines = [Line(tuple(t.name for t in layers)) for layers in sets]
    for line, layers in zip(lines[1:], sets[1:], strict=True):  # before anything is measured
        try:
            built(layers, work)
        except HastenError as error:
            line.refused = str(error)
    some_left(lines)
    device = next(at.net.parameters()).device
    base, _ = work.samples(count)
    beside = work.judge.paired(base, len(base) // count) if work.judge is not None else None
    with speed_up(work.model, Nudge(), call=work.shown):
        floor = fidelity(base, work.samples(count)[0])
    book = Ledger([], floor)
    if work.judge is not None:
        book.quality_floor = work.judge.best_floor
        book.seed_floor = work.judge(*work.samples(count, seed=1))
    for line, layers in zip(lines, sets, strict=True):
        if line.refused:
            continue
        tell(f"samples: {line.name}")
        try:
            observe(line, layers, work, base, count, device, beside if layers else None)
        except HastenError as error:
            line.refused = str(error)
        except torch.OutOfMemoryError:  # of one combination, which says nothing of the others
            line.refused = "The device has not the memory for it."
    book.lines = lines
    some_left(lines)
    times: dict[int, list[float]] = {i: [] for i, x in enumerate(lines) if not x.refused}
    done = 0
    try:
        while done < rounds:
            taken = []
            for i in times:
                tell(f"round {done + 1} of {rounds}: {lines[i].name}")
                taken.append(with_layers(sets[i], work, lambda: clocked(work.request, repeats, device)))
            for seconds, more in zip(times.values(), taken, strict=True):
                seconds += more
            done += 1
    except KeyboardInterrupt:
        if not done:
            raise
    for i, taken in times.items():
        found = summary(taken)
        lines[i].p50, lines[i].p95 = found.p50, found.p95
    book.about = {"count": count, "steps": work.steps, "rounds": done, "repeats": repeats, "seed": 0}  # of samples
    return book


def some_left(lines: Sequence[Line]) -> None:
    """Raise ConfigError where every combination was refused."""
    if all(x.refused for x in lines[1:]):
        raise ConfigError(f"No layer of this stack could be measured: {lines[1].refused}")


def observe(
    line: Line, layers: Sequence[Transform], work: Workload, base: Tensor, count: int, device: torch.device,
    beside: Callable[[Tensor], tuple[float, float]] | None,
) -> None:  # fmt: skip
    """Samples, losses, counts and memory of one combination. Raises where it cannot work or did nothing."""

    def look() -> None:
        images, labels = work.samples(count)
        line.trajectory = fidelity(base, images)
        if work.judge is not None:
            line.quality = work.judge(images, labels, interval=True)
            if beside:
                more, error = beside(images)
                line.quality |= {"fd_more": more, "fd_more_low": more - 2 * error, "fd_more_high": more + 2 * error}
        line.memory = peak_memory(work.request, device).bytes

    line.counts = with_layers(layers, work, look, counts=True)


def built(layers: Sequence[Any], work: Workload) -> SpeedUp:
    """The layers, or a plan, as ``speed_up`` has them; nothing is changed yet.

    Raises:
        HastenError: Where they cannot work on the model, together, or in the workload's steps.
    """
    up = speed_up(work.model, *layers, call=work.shown)
    if up.plan is not None:
        up.plan.suits(work.steps, work.guidance)
    steps = None if work.sampling is None else work.steps  # of a pipeline, speed_up knows them by its call
    for reaches in (getattr(t, "reaches", None) for t in up.transforms):
        if steps is not None and reaches is not None:
            reaches(steps)
    return up


def with_layers(layers: Sequence[Transform], work: Workload, do: Callable[[], Any], counts: bool = False) -> Any:
    """``do()`` under the layers; with ``counts`` what they counted instead of its result."""
    if not layers:
        found = do()
        return {} if counts else found
    up = built(layers, work)
    with up:
        found = do()
        said = up.ledger()
    return said if counts else found


def clocked(thunk: Callable[[], Any], repeats: int, device: torch.device) -> list[float]:
    """Seconds of ``repeats`` calls, after one that does not count."""
    times = []
    for i in range(repeats + 1):
        synchronise(device)
        started = time.perf_counter()
        thunk()
        synchronise(device)
        if i:
            times.append(time.perf_counter() - started)
    return times
