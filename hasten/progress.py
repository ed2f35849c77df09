"""Around the training loop: an estimate before it starts; bars, previews, logs and a time limit while it runs."""

from __future__ import annotations

import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from hasten.core.errors import ConfigError
from hasten.core.method import Method, Sampling
from hasten.core.sample import sample
from hasten.distribute import checkpoints, world
from hasten.fit import Step, fit
from hasten.measure.clock import synchronise
from hasten.role import FitConfig
from hasten.whole import write


@dataclass(frozen=True)
class Estimate:
    """What a run will take on this machine: seconds, and bytes."""

    iterations: int  # that are left
    step_seconds: float
    state: int  # weights, gradients, optimiser, averages
    peak: int  # what the process grew by, or what the device's allocator peaked at, while it was tried
    free: int

    @property
    def seconds(self) -> float:
        """For all that is left."""
        return self.iterations * self.step_seconds

    def __str__(self) -> str:
        peak = max(self.state, self.peak)
        tight = "" if peak < 0.8 * self.free else "; this is tight: lower the batch or accumulate"
        return (
            f"about {duration(self.seconds)} for {self.iterations} iterations of {1000 * self.step_seconds:.0f} ms, "
            f"{size(peak)} of memory ({size(self.state)} of it weights, gradients, optimiser and averages), "
            f"{size(self.free)} free{tight}"
        )


def estimate(
    method: Method,
    source: Any,
    teacher: Any,
    config: FitConfig,
    *,
    device: torch.device | str = "cpu",
    out: File | str | None = None,
    budget: float = 3.0,
) -> Estimate:
    """Time real steps of a throwaway run on a copy: a warm-up, then one period of the turns or ``budget`` seconds.

    Raises:
        ConfigError: If not even one step fits into memory; and whatever ``fit`` raises.
    """
    device = torch.device(device)
    period = max(turn.every for turn in method.stages(config.iterations)[0][0].turns)
    before = _used(device)
    times, start, peak, state, total = [], time.perf_counter(), 0, 0, 0
    steps = fit(method, source, teacher if config.clone == "lora" else copy.deepcopy(teacher), config, device=device)
    try:
        began = start
        for step in steps:
            synchronise(device)
            now = time.perf_counter()
            times.append(now - began)
            peak, total = max(peak, _used(device) - before), step.total
            state = state or _state(step) + _bytes(teacher)
            if len(times) > period or (now - start > budget and world()[1] == 1):  # ranks must stop together
                break
            began = time.perf_counter()
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"Not one step of batch {config.batch} fits into memory; lower it or accumulate.") from error
    finally:
        steps.close()  # type: ignore[attr-defined]
    timed = times[1:] or times
    done = int(checkpoints(File(out))[-1].name) if out and checkpoints(File(out)) else 0
    return Estimate(max(0, total - done), sum(timed) / max(1, len(timed)), state, peak, _free(device))


def _used(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def _bytes(net: Any) -> int:
    return sum(p.numel() * p.element_size() for p in net.parameters())


def _state(step: Step) -> int:
    """Bytes of what is trained: weights, gradients, what the optimiser keeps, averages."""
    total = 0
    for role in step.roles.values():
        kept = (v for s in role.opt.state.values() for v in s.values() if isinstance(v, Tensor))
        total += 2 * _bytes(role.net) + sum(v.numel() * v.element_size() for v in kept)
        total += sum(_bytes(ema) for ema in role.emas)
    return total


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes as a person says them."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.{0 if count > 2**24 else 1}f} MiB"


# --- samples and pictures -------------------------------------------------------------------------------------


def draw(
    net: Any, sampling: Sampling, count: int, *, labels: Tensor | None = None, seed: int = 0, batch: int = 500
) -> tuple[Tensor, Tensor | None]:
    """``count`` samples [N, C, H, W] of a native network on the CPU, and their labels [N].

    The noise is a function of the seed alone: the same on every device, and for every network of one shape.

    Args:
        labels: Classes [N]; None cycles through all classes.
    """
    config, device = net.config, next(net.parameters()).device
    if labels is None and config.classes:
        labels = torch.arange(count) % config.classes
    noise = torch.randn((count, config.channels, *config.size), generator=torch.Generator().manual_seed(seed))
    fresh = torch.Generator(device).manual_seed(seed + 1)  # for the rules that renoise
    parts = []
    for at in torch.arange(count).split(batch):
        cond = {} if labels is None else {"label": labels[at].to(device)}
        x = sample(net, noise[at].to(device), cond, sampling, uncond=net.null(cond), generator=fresh)
        parts.append(x.cpu())
    return torch.cat(parts), labels


def mosaic(images: Tensor, columns: int = 0) -> Any:
    """Images [N, C, H, W] in [-1, 1] as one PIL picture; tiny ones are enlarged by whole factors."""
    from PIL import Image

    from hasten.measure.pictures import pixels

    count, _, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows, zoom = math.ceil(count / columns), max(1, 48 // max(h, w))
    sheet = torch.full((rows * (h + 1) + 1, columns * (w + 1) + 1, 3), 255, dtype=torch.uint8)
    for i, picture in enumerate(pixels(images)):
        y, x = (i // columns) * (h + 1) + 1, (i % columns) * (w + 1) + 1
        sheet[y : y + h, x : x + w] = picture
    result = Image.fromarray(sheet.numpy())
    return result.resize((result.width * zoom, result.height * zoom), Image.Resampling.NEAREST)


# --- while it trains ------------------------------------------------------------------------------------------


def watch(
    steps: Iterator[Step],
    *,
    title: str = "training",
    out: File | str | None = None,
    minutes: float | None = None,
    preview: Callable[[Any], Tensor] | None = None,
    previews: int = 10,
    tensorboard: bool | None = None,
    wandb: bool = False,
    history: list[Mapping[str, float]] | None = None,
    console: Console | None = None,
) -> Step | None:
    """Run the loop to its end and return its last step; None where there was nothing left to do.

    Ctrl-C lets the running step finish, saves a checkpoint and then interrupts; a second one interrupts at once.

    Args:
        out: Folder of ``previews/`` and ``tensorboard/``; without, neither is written.
        minutes: Save a checkpoint and stop after so long.
        preview: Images [N, C, H, W] of the student, drawn ``previews`` times over the run.
        tensorboard: None writes where it is installed.
        history: Receives the log of every step.
        console: Where to show progress.

    Raises:
        ConfigError: If TensorBoard or W&B is asked for and not installed, or ``minutes`` on several ranks.
        KeyboardInterrupt: After Ctrl-C.
    """
    out, console = File(out) if out else None, console or Console(stderr=True)
    rank, ranks = world()
    if minutes is not None and ranks > 1:
        raise ConfigError("--minutes needs one process: ranks that stop at different steps wait for each other.")
    loggers = _loggers(out, tensorboard, wandb) if rank == 0 else []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    step, smooth = None, {}
    with (
        Progress(*columns, TextColumn("{task.fields[losses]}"), console=console, disable=rank > 0) as progress,
        _gentle_interrupt(ranks == 1) as interrupted,
    ):
        bar = progress.add_task(title, total=None, losses="")
        try:
            for step in steps:
                if history is not None and step.log:  # a finished run yields its last step with an empty log
                    history.append(step.log)
                for name, value in step.log.items():
                    smooth[name] = value if name not in smooth else 0.95 * smooth[name] + 0.05 * value
                losses = "  ".join(f"{k} {v:.4g}" for k, v in smooth.items() if not k.startswith("grad/"))
                progress.update(bar, total=step.total, completed=step.index, losses=losses)
                every, last = max(1, step.total // max(1, previews)), step.index == step.total
                picture = None
                if preview and out and rank == 0 and (step.index % every == 0 or last):
                    picture = mosaic(preview(step.student))
                    write(out / "previews" / f"{step.index:06d}.png", lambda f, p=picture: p.save(f, "PNG"))
                for log in loggers:
                    log(step, picture)
                if (step.index % every == 0 or last) and not console.is_terminal and rank == 0:
                    console.print(f"{title}: {step.index}/{step.total}  {losses}", highlight=False)
                if interrupted.is_set():
                    step.save()
                    raise KeyboardInterrupt
                if deadline and time.monotonic() > deadline and not last:
                    step.save()
                    break
            if interrupted.is_set():
                raise KeyboardInterrupt
        finally:
            for log in loggers:
                log(None, None)
    return step


Logger = Callable[[Step | None, Any], None]  # called with None at the end


def _loggers(out: File | None, tensorboard: bool | None, wandb: bool) -> list[Logger]:
    loggers: list[Logger] = []
    if out is not None and tensorboard is not False:
        try:
            from torch.utils.tensorboard import SummaryWriter

            loggers.append(_tensorboard(SummaryWriter, out))
        except ImportError as error:
            if tensorboard:
                raise ConfigError(
                    "TensorBoard is not installed; pip install tensorboard or drop --tensorboard."
                ) from error
    if wandb:
        try:
            import wandb as hub  # type: ignore[import-not-found]
        except ImportError as error:
            raise ConfigError("W&B is not installed; pip install wandb or drop --wandb.") from error
        loggers.append(_wandb(hub, out))
    return loggers


def _tensorboard(make: Any, out: File) -> Logger:
    opened: list[Any] = []

    def log(step: Step | None, picture: Any) -> None:
        if step is None:
            for writer in opened:
                writer.close()
            return
        if not opened:  # what an interrupted run logged beyond its checkpoint is dropped
            opened.append(make(str(out / "tensorboard"), purge_step=step.index))
        for name, value in step.log.items():
            opened[0].add_scalar(name if "/" in name else f"loss/{name}", value, step.index)
        if picture is not None:
            import numpy as np

            opened[0].add_image("samples", np.asarray(picture), step.index, dataformats="HWC")

    return log


def _wandb(hub: Any, out: File | None) -> Logger:
    run = hub.init(project="hasten", name=out.name if out else None, dir=str(out) if out else None)

    def log(step: Step | None, picture: Any) -> None:
        if step is None:
            run.finish()
        else:
            run.log({**step.log, **({"samples": hub.Image(picture)} if picture is not None else {})}, step=step.index)

    return log


@contextmanager
def _gentle_interrupt(wanted: bool) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event; in other threads, where Python allows no handler, change nothing."""
    event = threading.Event()
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def first(*_: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, first)
    try:
        yield event
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGINT, before)
