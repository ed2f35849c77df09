"""Small runs to kill, to resume and to spread over ranks; as a script, what must happen in a process of its own.

``python -m tests.training kill FOLDER`` lets each of ``DEATHS`` happen to a forked run, which kills itself, and resumes
it; ``python -m tests.training rank FOLDER`` is one rank under torchrun.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from hasten import distribute
from hasten.core.denoiser import Batch
from hasten.core.generate import FewStep
from hasten.core.method import Sampling, Turn, even
from hasten.data import Images
from hasten.distribute import world
from hasten.fit import Step, fit
from hasten.methods.dmd2 import DMD2
from hasten.methods.progressive import Progressive
from hasten.models.dit import DiT, DiTConfig
from hasten.role import FitConfig, Role


def network(seed: int = 0, width: int = 32, **config: Any) -> DiT:
    """A DiT with random weights everywhere: a fresh one is zero at its end, and nothing would reach its inside."""
    net = DiT(DiTConfig(width=width, depth=1, heads=2, classes=10, **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.1, generator=generator)
    return net


def images(seed: int = 0) -> Images:
    """64 images of noise, 10 classes."""
    generator = torch.Generator().manual_seed(seed)
    return Images(torch.rand(64, 1, 8, 8, generator=generator) * 2 - 1, torch.arange(64) % 10, 10)


BASE = FitConfig(
    batch=16, accumulate=2, lr=2e-3, lrs={"fake": 5e-3}, schedule="cosine", warmup=3, ema=(0.9, 0.99, 0.5),
    weight_decay=0.01, precision="float32", save_every=2,
    iterations=9,
)  # fmt: skip
SETTINGS: dict[str, tuple[Any, FitConfig]] = {
    "dmd2": (DMD2(FewStep((1, 2)), gan_weight=0.01, r1_weight=0.1, student_every=2), BASE),
    "progressive": (Progressive(start=4), FitConfig(**{**vars(BASE), "lrs": {}, "iterations": 8, "save_every": 3})),
}


def start(name: str, out: File | None = None, **options: Any) -> Iterator[Step]:
    """The run of ``SETTINGS[name]`` in ``out``."""
    method, config = SETTINGS[name]
    return fit(method, images(), network(), config, out=out, **options)


# --- a method without randomness ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fixed:
    """Denoises data at t = 1/2 with noise 0: its gradient is a mean over samples and nothing else.

    Args:
        fail: What goes wrong from iteration ``at`` on: ``loss`` or ``gradient`` of the last network that is trained.
        value: What it becomes.
        rivals: Networks trained in the same turn as the student, before it.
    """

    fail: str = ""
    at: int = 0
    value: float = float("nan")
    rivals: tuple[str, ...] = ()
    needs_data: bool = field(default=True, init=False, repr=False)

    def networks(self, teacher: Any, clone: Callable[..., Any]) -> dict[str, Any]:
        return {**{k: clone(teacher) for k in (*self.rivals, "student")}, "teacher": teacher}

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn((*self.rivals, "student"), self.loss),)

    def stages(self, iterations: int) -> tuple[tuple[Fixed, int], ...]:
        return ((self, iterations),)

    def sampling(self, steps: int) -> Sampling:
        return Sampling(even(steps))

    def loss(self, nets: Any, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean squared error, with the failure that was asked for."""
        x, t = batch.data, torch.full((len(batch.data),), 0.5)
        parts = [(nets[k](x / 2, t, batch.cond) + x).square().mean() for k in (*self.rivals, "student")]
        loss = torch.stack(parts).sum()
        if self.fail and step >= self.at:
            weight = nets["student"].last.weight.sum()
            if self.fail == "loss":
                return loss + weight * self.value, {}
            weight.register_hook(lambda grad: grad * self.value)
            loss = loss + weight - weight.detach()
        return loss, {"fixed": loss.detach()}


@dataclass
class Cut:
    """The same 16 images in every iteration, cut into as many pieces as there are ranks and micro-steps."""

    data: Images = field(default_factory=images)
    shape: tuple[int, ...] = (1, 8, 8)
    seen: list[int] = field(default_factory=list)

    def batch(self, n: int, generator: torch.Generator, device: Any = "cpu") -> Batch:
        """The next ``n``."""
        rank, ranks = world()
        at = (rank + ranks * len(self.seen)) * n % 16
        self.seen.append(at)
        labels = torch.arange(at, at + n) % 10
        return Batch({"label": labels}, {}, (n, *self.shape), self.data.x[at : at + n])


@contextmanager
def gradients() -> Iterator[list[tuple[str, Tensor]]]:
    """(network, flat gradient) of every update, before it is clipped."""
    found: list[tuple[str, Tensor]] = []
    original = Role.clip

    def clip(self: Role) -> float:
        found.append((self.name, torch.cat([p.grad.flatten().clone() for p in self.parameters if p.grad is not None])))
        return original(self)

    Role.clip = clip
    try:
        yield found
    finally:
        Role.clip = original


# --- what happens in a process of its own ---------------------------------------------------------------------


def die() -> None:
    """SIGKILL: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def dying(function: Callable[..., Any], call: int, before: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """``function``, but its ``call``-th call does ``before`` instead and dies."""
    calls = iter(range(1, 1 << 30))

    def wrapped(*args: Any, **keywords: Any) -> Any:
        if next(calls) == call:
            if before:
                before(*args, **keywords)
            die()
        return function(*args, **keywords)

    return wrapped


def half(tensors: dict[str, Tensor], file: File) -> None:
    """The first half of a file, as a process leaves it that is killed while it writes."""
    save_file(tensors, file)
    os.truncate(file, file.stat().st_size // 2)


# name: (settings, where it dies, at which call of that, the first iteration that the resumed run yields)
DEATHS: dict[str, tuple[str, str, int, int]] = {
    "before the first checkpoint": ("dmd2", "step", 1, 1),
    "right after a checkpoint": ("dmd2", "step", 4, 5),
    "between micro-steps of the second turn": ("dmd2", "batch", 14, 5),
    "half of the weights written": ("dmd2", "save_file", 2, 3),
    "whole but not yet renamed": ("dmd2", "rename", 2, 3),
    "renamed but the oldest not yet dropped": ("dmd2", "drop", 3, 7),
    "at the first step of the second stage": ("progressive", "step", 5, 4),
    "in the second stage": ("progressive", "step", 7, 7),
    "half of a checkpoint of the second stage": ("progressive", "save_file", 3, 7),
}


def run_to_death(name: str, out: File) -> None:
    """Start the run that ``DEATHS[name]`` describes; it does not come back."""
    settings, place, call, _ = DEATHS[name]
    if place == "save_file":
        distribute.save_file = dying(save_file, call, half)
    elif place == "rename":
        distribute.os.replace = dying(os.replace, call)
    elif place == "drop":
        rmtree = dying(distribute.shutil.rmtree, 1)
        distribute.shutil.rmtree = lambda path, **_: rmtree(path) if os.path.basename(str(path))[0] == "0" else None
    elif place == "batch":
        batch = dying(Images.batch, call)
        setattr(Images, "batch", lambda self, *args: batch(self, *args))  # noqa: B010
    for step in start(settings, out):
        if place == "step" and step.index == call:
            die()


def forked(work: Callable[[], Any]) -> int:
    """The exit status of ``work`` in a process of its own, negative for a signal."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def resume(name: str, out: File) -> None:
    """Go on to the end, and note which iteration came first."""
    first, *_ = (step.index for step in start(DEATHS[name][0], out))
    (out / "first.json").write_text(json.dumps(first))


def kill(folder: File) -> None:
    """Let every death happen, resume each, and print {name: how the first process ended, and the second}.

    Nothing runs backward in this process: a fork must not inherit autograd's threads.
    """
    import torch._dynamo  # noqa: F401  # seconds, which the first optimiser of every fork would pay

    ends: dict[str, list[int]] = {}
    for name in DEATHS:
        out = folder / name
        ends[name] = [forked(lambda: run_to_death(name, out)), forked(lambda: resume(name, out))]  # noqa: B023

    def overwrite() -> None:
        distribute.save_model(network(1), folder / "model")
        distribute.os.replace = dying(os.replace, 2)
        distribute.save_model(network(2), folder / "model")

    ends["model"] = [forked(overwrite)]
    print(json.dumps(ends))


def rank(folder: File) -> None:
    """What one of two ranks trains: gradients of one batch cut in two; then a run, stopped and resumed."""
    dist.init_process_group("gloo")
    me = dist.get_rank()
    source = Cut()
    found: dict[str, Tensor] = {}
    config = FitConfig(iterations=2, batch=16, precision="float32", lr=1e-3)
    with gradients() as grads:
        *_, last = fit(Fixed(), source, network(seed=me), config)  # ranks that disagree start from the first one's
    found |= {f"fixed/{k}": v for k, v in last.roles["student"].net.state_dict().items()}
    found |= {f"gradient/{i}": g for i, (_, g) in enumerate(grads)}
    found["seen"] = torch.tensor(source.seen)

    drawn: list[Tensor] = []
    draw = Images.batch

    def noted(self: Images, *args: Any) -> Batch:
        batch = draw(self, *args)
        drawn.append(batch.data.clone())
        return batch

    setattr(Images, "batch", noted)  # noqa: B010
    *_, last = start("dmd2", folder / "whole")
    found["drawn"] = torch.stack(drawn[1:])  # the first one is looked at to tell data apart, the same on every rank
    found |= last.roles["student"].tensors() | last.roles["fake"].tensors() | last.roles["disc"].tensors()
    for step in start("dmd2", folder / "stopped"):
        if step.index == 5:
            break
    dist.barrier()
    for step in start("dmd2", folder / "stopped"):
        last = step
    found |= {f"again/{k}": v for role in last.roles.values() for k, v in role.tensors().items()}
    found["noise"] = torch.randn(4)
    save_file(copy.deepcopy(found), folder / f"rank{me}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"kill": kill, "rank": rank}[sys.argv[1]](File(sys.argv[2]))
