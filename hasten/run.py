"""From a recipe to what the training loop takes, and from its last step to a model folder."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import json
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import torch
import torch.distributed as dist

from hasten import fit as training
from hasten import recipe
from hasten.core.errors import CheckpointError, ConfigError
from hasten.data import Conditions, Images
from hasten.distribute import (
    alike,
    digest_of,
    load_model,
    read_folder,
    recover,
    save_adapter,
    save_model,
    world,
    write_folder,
)
from hasten.fit import Step
from hasten.lora import is_view, merge
from hasten.methods.flow import Flow
from hasten.models.dit import DiT, DiTConfig
from hasten.names import defaults
from hasten.pairs import Pairs, Preferences, load, make_pairs
from hasten.recipe import Recipe
from hasten.role import FitConfig
from hasten.whole import write

ZOO = File(__file__).parent / "zoo"  # models that hasten carries, each with the judge of its data


@dataclass(frozen=True)
class Job:
    """A recipe with everything that it names loaded and checked."""

    recipe: Recipe
    source: Any
    net: Any  # the teacher, or a new network
    device: torch.device
    out: File
    start: Any = None  # an earlier student, from which this one starts

    def preview(self, student: Any) -> torch.Tensor:
        """Images of a student at the most steps it is trained for, always from the same noise."""
        from hasten.progress import draw

        steps = max(self.recipe.steps)
        student.eval()
        return draw(student, self.recipe.method.sampling(steps), 64, labels=_rows(student.config.classes))[0]

    def saved(self, step: Step) -> bool:
        """Whether all that :meth:`save` writes of this step is there."""
        folder, adapter = self.out / "model", self.out / "adapter"
        recover(folder)
        if not (folder / "recipe.yaml").is_file() or (is_view(step.student) and not adapter.is_dir()):
            return False
        try:
            return json.loads((folder / "model.json").read_text())["extra"]["iterations"] == step.index
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def save(self, step: Step) -> File:
        """Write the student's averaged weights, how to sample it, and the recipe; returns the folder.

        Adapters are merged into the weights there, and written alone to ``out``/adapter.
        """
        folder = self.out / "model"
        samplings = {n: self.recipe.method.sampling(n) for n in self.recipe.steps}
        about = {"recipe": recipe.as_dict(self.recipe), "iterations": step.index, "of": step.total}
        if world()[0] == 0:
            save_model(step.student, folder, samplings, about)
            if is_view(step.student):
                save_adapter(step.student, self.out / "adapter")
            recipe.save(self.recipe, folder / "recipe.yaml")
        return folder


def _rows(classes: int) -> torch.Tensor | None:
    return (torch.arange(64) // 8) % classes if classes else None  # one class a row


def prepare(wanted: Recipe) -> Job:
    """Load and check all that a recipe names, the output folder last, so that a refused run leaves nothing behind.

    Raises:
        ConfigError: For a device, data or a folder that cannot be used, or data or a start that do not fit the teacher.
        CheckpointError: If the teacher's folder holds no model.
    """
    device = pick(wanted.device)
    net = load_model(find_model(wanted.teacher), device) if wanted.teacher else None
    source: Any = load(wanted.data) if wanted.data else None
    if net is None:
        if source is None:
            raise ConfigError("There is neither a teacher nor data; give at least one of them.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(wanted.fit.seed)
            net = wanted.network(source.shape, source.classes).to(device)
    elif source is None:
        source = Conditions.of(net)
    else:
        source = matched(source, net)
    start = network(wanted.start, device) if wanted.start else None
    if start is not None:
        alike(net, start)
    return Job(wanted, source, net, device, writable(wanted.out), start)


def settled(
    method: Any, teacher: Any, source: Any = None, *, device: Any = None, batch: int = 25, out: File | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Any:  # fmt: skip
    """``method`` with what it has to learn of its teacher before it trains, as BOSS its times; most are ready.

    Under torchrun all ranks take the first one's.

    Args:
        teacher: A denoiser.
        source: Where conditions come from; None draws the classes of a native network.
        device: None is the teacher's own.
        batch: Samples at a time.
        out: Folder that keeps what was found, for a run that goes on.
        tell: Called with (done, all).
    """
    if getattr(method, "ready", True):
        return method
    device = next(teacher.parameters()).device if device is None else device
    source = Conditions.of(teacher) if source is None else source
    asked = {"method": repr(method), "teacher": digest_of(teacher.parameters())}
    file = out / "settled.json" if out else None
    kept: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):  # none yet, or damaged: it is found again
        kept = json.loads(file.read_text()) if file else {}
    if {k: kept.get(k) for k in asked} == asked:
        found = {k: tuple(v) if isinstance(v, list) else v for k, v in kept["found"].items()}
        ready = [dataclasses.replace(method, **found)]
    else:
        ready = [method.settled(teacher, source, device, batch=batch, tell=tell)]
    if world()[1] > 1:
        dist.broadcast_object_list(ready)
    if file and world()[0] == 0:
        mine, theirs = dataclasses.asdict(method), dataclasses.asdict(ready[0])
        found = {k: v for k, v in theirs.items() if v != mine[k]}
        write(file, lambda f: f.write_text(json.dumps(asked | {"found": found})))
    return ready[0]


def pick(name: str) -> torch.device:
    """:func:`hasten.recipe.pick_device`; under torchrun, ``auto`` and ``cuda`` are this rank's own GPU."""
    device = recipe.pick_device(name)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def find_model(folder: str | File) -> File:
    """The model folder at ``folder``, under it where a run left one, or of a name in :func:`zoo`.

    Raises:
        CheckpointError: Where there is none.
    """
    folder = ZOO / folder if str(folder) in zoo() else File(folder).expanduser()
    for place in (folder, folder / "model"):
        recover(place)
        if (place / "model.json").is_file():
            return place
    what = "holds no model" if folder.is_dir() else "is no folder"
    raise CheckpointError(
        f"{str(folder)!r} {what}; give the output folder of hasten train or distill, or one of {', '.join(zoo())}."
    )


def zoo() -> list[str]:
    """The names of the models that hasten carries."""
    return sorted(f.parent.name for f in ZOO.glob("*/model.json"))


def network(name: str | File, device: torch.device | str = "cpu") -> Any:
    """The network in a model folder, or of a name in :func:`zoo`, in eval mode. Raises as :func:`find_model` does."""
    return load_model(find_model(name), device)


def matched(source: Any, net: Any) -> Any:
    """``source`` as ``net`` takes it: no labels where it knows no classes, else its number of classes."""
    config = net.config
    shape = (config.channels, *config.size)
    if source.shape != shape:
        raise ConfigError(f"The model makes samples of shape {shape}, but {source.name} holds {source.shape}.")
    if not config.classes:
        return dataclasses.replace(source, labels=None)
    if source.labels is None:
        raise ConfigError(f"The model is conditioned on {config.classes} classes, but {source.name} has no labels.")
    return dataclasses.replace(source, classes=config.classes)  # refuses labels out of range


def writable(folder: str | File) -> File:
    """``folder``, made where it is missing. Raises ConfigError where nothing can be written to it."""
    folder = File(folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 4096)
    except OSError as error:
        raise ConfigError(f"Cannot write to {str(folder)!r}: {reason(error)}; choose another --out.") from error
    return folder


def reason(error: OSError) -> str:
    """An OSError in words, without its number."""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return "the disk is full"
    return (error.strerror or str(error)).lower()


def with_pairs(job: Job, tell: Callable[[int, int], None] = lambda done, total: None) -> Job:
    """``job`` on trajectories that its teacher makes now, or made before: they are kept in ``out``/pairs.

    Args:
        tell: Called with (made, wanted) after every batch.

    Raises:
        CheckpointError: If the kept trajectories are of another teacher or of other settings.
    """
    method, count = job.recipe.method, job.recipe.pairs
    teacher = find_model(job.recipe.teacher or "")
    about: dict[str, Any] = {
        "count": count, "steps": method.steps, "substeps": method.substeps, "cfg_scale": method.cfg_scale,
        "seed": job.recipe.fit.seed, "teacher": read_folder(teacher, "model")[1]["sha256"],
    }  # fmt: skip
    at = tuple(getattr(method, "at", ()))
    about["at"] = list(at)
    folder, classes = job.out / "pairs", job.net.config.classes
    if (folder / "pairs.json").is_file():
        tensors, found = read_folder(folder, "pairs")
        found.setdefault("at", [])  # as all were before times could be uneven
        if {k: found.get(k) for k in about} != about:
            raise CheckpointError(f"{folder} holds trajectories of another teacher or of other settings; delete it.")
        pairs = Pairs(tensors["trajectories"], tensors.get("labels"), classes, f"{count} pairs", at)
        return dataclasses.replace(job, source=pairs)
    pairs = None
    for pairs in make_pairs(
        job.net, count, method.steps, method.substeps, method.cfg_scale, at=at, seed=about["seed"], device=job.device
    ):
        tell(len(pairs.trajectories), count)
    assert pairs is not None
    tensors = {"trajectories": pairs.trajectories} | ({} if pairs.labels is None else {"labels": pairs.labels})
    if world()[0] == 0:
        write_folder(folder, tensors, about, "pairs")
    return dataclasses.replace(job, source=dataclasses.replace(pairs, name=f"{count} pairs"))


def distill(
    teacher: Any,
    method: Any,
    *,
    steps: int | Sequence[int] = (1, 2, 4),
    data: Any = None,
    fit: FitConfig | None = None,
    device: torch.device | str = "cpu",
    out: File | str | None = None,
    start: Any = None,
) -> Any:
    """The student that ``method`` makes of ``teacher`` for ``steps`` sampling steps: a network in eval mode.

    Args:
        teacher: A native network; it is left as it is.
        method: Such as ``hasten.DMD2()``; ``steps`` set the step counts that it trains for.
        data: A :class:`hasten.Source`, or None for methods that need none.
        fit: Training length and everything else about training; None is what suits the method.
        out: Folder for checkpoints, which a second call resumes from.
        start: An earlier student of ``teacher``, from which this one starts.

    Raises:
        ConfigError: If the method needs data and has none, cannot train for these steps, or has to be
            :func:`settled` first; or start is no student of such a teacher.
        Diverged: On a NaN or exploding loss.
    """
    device = pick(str(device))
    if data is None:
        source = Conditions.of(teacher)
    else:
        source = matched(data, teacher) if isinstance(data, (Images, Preferences)) else data
    wanted = (steps,) if isinstance(steps, int) else tuple(steps)
    method = recipe.for_steps(method, wanted)
    if not getattr(method, "ready", True):
        name = type(method).__name__
        raise ConfigError(
            f"{name} learns of its teacher first: take method = hasten.settled({name}(steps={wanted[0]}), teacher), "
            f"distil that, and sample with method.sampling({wanted[0]})."
        )
    fit = fit or FitConfig(**defaults(method))
    return _last(training.fit(method, source, copy.deepcopy(teacher), fit, device=device, out=out, start=start))


def train(
    data: Any,
    method: Any = None,
    *,
    model: DiTConfig | None = None,
    fit: FitConfig | None = None,
    device: torch.device | str = "cpu",
    out: File | str | None = None,
) -> Any:
    """A new network trained on ``data`` (a :class:`hasten.Source`), by flow matching unless ``method``."""
    config, device = model or recipe.dit_config({}, data.shape, data.classes), pick(str(device))
    method = method or Flow()
    fit = fit or FitConfig(**defaults(method))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fit.seed)
        net = DiT(config)
    return _last(training.fit(method, data, net, fit, device=device, out=out))


def _last(steps: Iterator[Step]) -> Any:
    last = deque(steps, maxlen=1)
    if not last:
        raise CheckpointError("This run is already complete; load its model, or choose another out.")
    return merge(last[0].student).eval()


def step_counts(text: str) -> list[int]:
    """The step counts of ``1,2,4``. Raises ConfigError for anything but positive whole numbers."""
    return whole_numbers(text, "--steps", 1)


def whole_numbers(text: str, option: str, low: int, high: int | None = None) -> list[int]:
    """The numbers of ``1,2,4``, each from ``low`` to ``high``."""
    try:
        found: Sequence[int] = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} takes whole numbers such as 4 or 1,2,4, not {text!r}.") from error
    bad = [n for n in found if n < low or (high is not None and n > high)]
    if bad:
        limit = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ConfigError(f"{option} takes numbers {limit}, not {bad[0]}.")
    return list(found)
