"""The one training loop: a generator that yields after every iteration; everything else is the caller's loop body."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path as File
from typing import Any

import torch

from hasten.core.errors import ConfigError, Diverged, unknown
from hasten.core.method import Method
from hasten.distribute import average_gradients, begin, checkpoints, load_checkpoint, save_checkpoint, share, world
from hasten.role import FitConfig, Role, autocast, fingerprint, seed_all


@dataclass
class Step:
    """One finished iteration: ``index`` of ``total`` over all stages, the losses, and the run's state."""

    index: int
    total: int
    stage: int
    log: dict[str, float]
    roles: dict[str, Role]
    save: Callable[[], File | None]  # writes a checkpoint now, where there is an output folder

    @property
    def student(self) -> Any:
        """The average of the student's weights that is kept, at the first decay."""
        return self.roles["student"].emas[0]


def fit(
    method: Method,
    source: Any,
    teacher: Any,
    config: FitConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    out: File | str | None = None,
    resume: bool = True,
    start: Any = None,
) -> Iterator[Step]:
    """Train ``method`` on ``source`` from ``teacher``, yielding a :class:`Step` after every iteration.

    Every random number is a function of (seed, stage, iteration, turn, micro-step, rank), so a run killed at any step
    and resumed from ``out`` is bit-identical to an uninterrupted one. ``start`` is an earlier student to go on from.

    Raises:
        ConfigError: If the method needs data that the source has not, the batch does not divide, or start does not fit.
        Diverged: On a NaN or exploding loss or gradient, naming the step, the network and the last good checkpoint.
        CheckpointError: If ``out`` holds a truncated checkpoint or one of another run.
    """
    device, out, config = torch.device(device), File(out) if out else None, config or FitConfig()
    (rank, ranks), micro = world(), config.accumulate
    n, rest = divmod(config.batch, ranks * micro)
    if rest or not n:
        raise ConfigError(f"A batch of {config.batch} does not divide into {ranks} ranks of {micro} micro-steps.")
    stages = config.suited(method).stages(config.iterations)
    total, done = sum(length for _, length in stages), 0
    for stage, _ in stages:
        if stage.needs_data and not getattr(source, "has_data", True):
            raise ConfigError(f"{type(stage).__name__} needs data, and this source has conditions only; give data.")
    clone = config.cloner(teacher)
    share(teacher.to(device))
    origin = teacher
    finger = fingerprint(method, source, teacher, config, start) if out else {}
    tensors, meta = (load_checkpoint(out, finger) if out and resume else None) or ({}, {"stage": -1})
    trained = {k for stage, _ in stages for turn in stage.turns for k in turn.trains}
    for k in config.lrs.keys() - trained:
        raise unknown("network in fit.lrs", k, trained)
    for number, (stage, length) in enumerate(stages):
        here = number == meta["stage"]
        if here and number:  # the teacher of a later stage is the average of the stage before
            teacher.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("teacher/")})
        seed_all(config.seed, number, rank=0)  # new networks start equal on every rank
        kept = bool(number) and getattr(stage, "keeps_teacher", False)
        made = stage.networks(origin if kept else teacher, clone)
        nets = {k: net.to(device).requires_grad_(False) for k, net in made.items()}
        if kept:  # the teacher is still the first one, and the average is where the student starts
            nets["student"].load_state_dict(teacher.state_dict())
        if start is not None and not number:
            begin(nets, start)
        updates: dict[str, int] = {}  # how often each network will move in this stage
        for turn in stage.turns:
            updates |= {k: updates.get(k, 0) - (-length // turn.every) for k in turn.trains}
        roles = {k: Role(k, nets[k], config, n_k, k == "student") for k, n_k in updates.items()}
        if here:
            for role in roles.values():
                role.restore(tensors, meta["counts"][role.name])
        first = meta["index"] if here else length if number < meta["stage"] else 0
        done += first
        if done == total:  # a finished run yields its last step, so that its model can still be saved
            yield Step(done, total, number, {}, roles, lambda: None)
        for index in range(first, length):
            log: dict[str, float] = {}
            for k, turn in enumerate(stage.turns):
                if index % turn.every:
                    continue
                for role in roles.values():
                    role.learns(role.name in turn.trains)
                for m in range(micro):
                    generator = seed_all(config.seed, number, index, k, m, rank=rank)
                    batch = source.batch(n, generator, device)
                    with autocast(config.precision, device):
                        loss, parts = turn.loss(nets, batch, index)
                    check(float(loss.detach()), "loss", config, turn.trains, done, out)
                    (loss / micro).backward()
                    for name, value in parts.items():
                        log[name] = log.get(name, 0.0) + float(value) / micro
                for name in turn.trains:
                    average_gradients(roles[name].parameters)
                    log[f"grad/{name}"] = norm = roles[name].clip()
                    check(norm, "gradient norm", config, (name,), done, out)
                for name in turn.trains:  # only now, so that a bad step moves none of them
                    roles[name].update()
            done += 1
            save = partial(save_state, out, done, index + 1, number, teacher, roles, finger)
            if done % config.save_every == 0 or done == total:
                save()
            yield Step(done, total, number, log, roles, save)
        teacher = roles["student"].emas[0]


def save_state(
    out: File | None, done: int, index: int, number: int, teacher: Any, roles: dict[str, Role], finger: dict[str, Any]
) -> File | None:
    """Write a checkpoint after iteration ``index`` of stage ``number``; nothing without an output folder."""
    if out is None:
        return None
    state = {k: v for role in roles.values() for k, v in role.tensors().items()}
    state |= {f"teacher/{k}": v for k, v in teacher.state_dict().items()} if number else {}
    counts = {role.name: role.count for role in roles.values()}
    return save_checkpoint(out, done, state, {"stage": number, "index": index, "counts": counts, "fingerprint": finger})


def check(value: float, what: str, config: FitConfig, names: tuple[str, ...], step: int, out: File | None) -> None:
    """Raise Diverged where ``value`` is not finite or beyond ``config.explode``, ``step`` iterations being done."""
    if math.isfinite(value) and abs(value) <= config.explode:
        return
    good = checkpoints(out)[-1:] if out else []
    where = f"the last good checkpoint is {good[0]}" if good else "there is no checkpoint yet"
    raise Diverged(
        f"Training diverged at step {step + 1}: the {what} of {' and '.join(names)} is {value:g}; {where}. "
        "Lower its learning rate, clip harder, or use float32."
    )
