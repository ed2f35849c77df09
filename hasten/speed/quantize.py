"""Quantization of the linears inside the blocks: which of them, in which numbers, within which error of the network."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from hasten.core.errors import ConfigError, NotReversible, UnsupportedModel, unknown
from hasten.speed.budget import distance, fewest, outputs
from hasten.speed.calibrate import Calibration, header, matches, own_calibration
from hasten.speed.foreign import quantizer
from hasten.speed.host import Host
from hasten.speed.linears import places
from hasten.speed.products import FLOATS, multiple, refuse, takes
from hasten.speed.rounding import small
from hasten.speed.swap import Swap, back, harm, ranged, saving
from hasten.speed.transform import Applied, Transform, number, one_of, switch, whole_number

DTYPES = ("int8", "int8_static", "int8_weights", "int4_weights", "fp8", "mxfp8", "nvfp4")
LEFT = re.compile(r"modulation|norm|adaln|emb|_mod$", re.IGNORECASE)  # in a name: inputs without tokens, little work


@dataclass(frozen=True)
class Quantize:
    """Linears inside the blocks in few bits; projections, embedders and modulation (adaLN) stay as they are.

    Args:
        dtype: ``int8``: W8A8, a scale per weight row and per token. ``int8_static``: one activation scale from a
            calibration. ``int8_weights`` and ``int4_weights``: activations as they are (memory, not speed). ``fp8``:
            W8A8 in E4M3. ``mxfp8`` and ``nvfp4``: emulated.
        min_side: Both sides of a linear must have at least this many features; below about 512 the rounding of
            the activations costs more than the product saves.
        keep: Keep the originals (on the CPU) for the undo; False drops them, which makes the model small, and
            undo raises NotReversible.
        smooth: None; the alpha in [0, 1] of SmoothQuant's s_j = max|X_j|^alpha / max|W_j|^(1 - alpha); or ``search``:
            per linear, the factors with the least output error on the calibration's rows, of SmoothQuant's for
            alpha = 0, 0.05 ... 1, or for ``*_weights`` of AWQ's, or none.
        ranges: Ranges of times with smoothing and scales of their own. Each has weights of its own in memory.
        rank: Of a branch in full precision for what rounds badly (SVDQuant); 0 for none.
        group: Inputs that share a scale in ``int4_weights``: 32, 64 or 128.
        scaling: Of ``fp8``, the scale is that of a ``row`` (of a token), of the whole ``tensor``, or of a ``block``:
            128 x 128 weights, 1 x 128 activations.
        emulate: The same numbers by float32 products, slowly, so that quality can be measured anywhere.
        backend: Whose linears: ``hasten``, ``torchao`` (its package; no ``int8_static``), or ``auto``: torchao's for
            ``fp8`` in blocks, ``mxfp8`` and ``nvfp4``, which hasten only emulates, and hasten's for the others.
        max_error: Keep the linears with the worst output error as they are until the network's own relative error
            on the calibration's calls is at most this.
        calibration: A file of :func:`hasten.calibrate`, for ``int8_static``, smooth and max_error. Without one a
            pipeline is calibrated when the stack is applied, by one run of ``speed_up``'s own call; a native
            denoiser is refused.
        skip: Names of linears inside the network that stay as they are, such as ``blocks.0.mlp.2``.
        skip_first: Blocks at the start that stay as they are, and ``skip_last`` at the end.
    """

    dtype: str = "int8"
    min_side: int = 512
    keep: bool = True
    smooth: float | str | None = None
    ranges: int = 1
    rank: int = 0
    group: int = 64
    scaling: str = "row"
    emulate: bool = False
    backend: str = "auto"
    max_error: float | None = None
    calibration: str | None = None
    skip: Sequence[str] = ()
    skip_first: int = 0
    skip_last: int = 0
    name: ClassVar[str] = "quantize"
    order: ClassVar[int] = 10

    def __post_init__(self) -> None:
        one_of("Quantize", "dtype", self.dtype, DTYPES)
        one_of("Quantize", "scaling", self.scaling, ("row", "tensor", "block"))
        one_of("Quantize", "backend", self.backend, ("auto", "hasten", "torchao"))
        for field in ("keep", "emulate"):
            switch("Quantize", field, getattr(self, field))
        whole = {"min_side": 1, "ranges": 1, "rank": 0, "skip_first": 0, "skip_last": 0}
        for field, least in whole.items():
            if not whole_number(value := getattr(self, field), least):
                unit = " of features" if field == "min_side" else ""
                raise ConfigError(f"Quantize: {field} must be a whole number{unit} from {least}, not {value!r}.")
        smooth: Any = self.smooth
        if not (smooth in (None, "search") if isinstance(smooth, str | None) else number(smooth) and 0 <= smooth <= 1):
            raise ConfigError(f"Quantize: smooth must be None, a number from 0 to 1 or 'search', not {self.smooth!r}.")
        if self.max_error is not None and not (number(self.max_error) and self.max_error > 0):
            raise ConfigError(f"Quantize: max_error must be a number above 0 such as 0.01, not {self.max_error!r}.")
        if not whole_number(self.group, 32) or self.group not in (32, 64, 128):
            raise ConfigError(f"Quantize: group must be 32, 64 or 128, not {self.group!r}.")
        if isinstance(self.calibration, os.PathLike):
            object.__setattr__(self, "calibration", os.fspath(self.calibration))
        elif not (self.calibration is None or (isinstance(self.calibration, str) and self.calibration)):
            raise ConfigError(f"Quantize: calibration is a file of hasten.calibrate, not {self.calibration!r}.")
        if not isinstance(self.skip, (list, tuple)) or not all(isinstance(name, str) for name in self.skip):
            raise ConfigError(f"Quantize: skip must be a list of names of linears, not {self.skip!r}.")
        object.__setattr__(self, "skip", tuple(self.skip))
        for field, usual, owners in (
            ("group", 64, ("int4_weights",)), ("scaling", "row", ("fp8",)), ("emulate", False, FLOATS),
        ):  # fmt: skip
            if getattr(self, field) != usual and self.dtype not in owners:
                raise ConfigError(f"Quantize: {field} is for {' and '.join(owners)}, not for {self.dtype}.")
        if self.backend == "torchao" and (self.emulate or self.dtype == "int8_static"):
            said = "emulate" if self.emulate else self.dtype
            raise ConfigError(f"Quantize: {said} is hasten's own; leave it or backend='torchao' out.")
        if self.ranges > 1 and self.smooth is None and self.dtype != "int8_static":
            raise ConfigError("Quantize: ranges change smoothing and static scales; set smooth, or leave ranges out.")

    @property
    def _needs(self) -> str:
        """The first setting that needs a calibration; empty where none does."""
        said = f"smooth={self.smooth!r}" if self.smooth is not None else f"max_error={self.max_error!r}"
        known = self.smooth is not None or self.max_error is not None
        return said if known else "dtype='int8_static'" if self.dtype == "int8_static" else ""

    # --- which ------------------------------------------------------------------------------------------------

    def _chosen(self, at: Host, seen: Mapping[str, bool] | None = None) -> list[tuple[nn.Module, str, nn.Linear]]:
        """Places to quantize: large enough, no modulation, and on CUDA in the multiples that its products need.

        Args:
            seen: Of a calibration, by the names of the linears that ran: whether they ran on tokens.
        """
        first, last = self.skip_first, len(at.names) - self.skip_last
        within = tuple(f"{name}." for name in at.names[first : max(first, last)])
        names = {id(linear): path for path, _, _, linear in reversed(list(places(at)))}  # shared: the first place's
        skipped = {id(linear) for path, _, _, linear in places(at) if path in self.skip}
        return [
            (parent, name, linear)
            for path, parent, name, linear in places(at)
            if f"{path}.".startswith(within)
            and not _modulates(path)
            and id(linear) not in skipped
            and (seen is None or seen.get(names[id(linear)], False))
            and min(linear.weight.shape) >= self.min_side
            and takes(self, linear.weight)
        ]

    def check(self, at: Host, stack: Sequence[Transform]) -> None:
        found = [(path, linear) for path, _, _, linear in places(at)]
        if not found and (owner := quantizer(at.net)):
            raise ConfigError(
                f"Quantize: {owner} has quantized every linear inside the blocks of {type(at.net).__name__} already; "
                "leave Quantize out, or load the original weights."
            )
        if not found:
            raise UnsupportedModel(f"Quantize: no nn.Linear inside the blocks of {type(at.net).__name__}.")
        if missing := [name for name in self.skip if name not in dict(found)]:
            raise unknown(f"linear inside the blocks of {type(at.net).__name__}", missing[0], dict(found))
        if self._needs and not self.calibration and at.pipe is None:
            raise ConfigError(
                f"Quantize: {self._needs} needs a calibration; give "
                "calibration=hasten.calibrate(model, runs).save('calibration.safetensors')."
            )
        for device in {linear.weight.device for _, linear in found}:
            refuse(self, device)
        seen = None
        if self.calibration:
            about = header(self.calibration)
            seen = about["linears"]
            matches(about, at, self.calibration)
            if self.ranges not in (1, len(about["edges"]) + 1):
                raise ConfigError(
                    f"Quantize: ranges={self.ranges}, but {self.calibration} has {len(about['edges']) + 1}; calibrate "
                    f"with ranges={self.ranges}."
                )
            if self.max_error is not None and not about["calls"]:
                raise ConfigError(f"Quantize: {self.calibration} holds no calls for max_error; calibrate with calls.")
        if self.ranges > 1 and any(t.name == "compile" for t in stack):
            raise ConfigError("Compiled code cannot change weights with the time; use ranges=1, or leave Compile out.")
        if not self._chosen(at, seen):
            fit = [(path, linear) for path, linear in found if not _modulates(path)] or found
            path, big = max(fit, key=lambda item: min(item[1].weight.shape))
            raise ConfigError(
                f"Quantize: none of {len(found)} linears qualifies; the largest, {path}, is "
                f"{big.in_features}x{big.out_features} and min_side is {self.min_side} "
                f"(CUDA also needs multiples of {multiple(self)}); lower min_side or leave Quantize out."
            )
        self._learnt(at)  # a file that cannot be read, and what Times would not let run once it is applied

    # --- how --------------------------------------------------------------------------------------------------

    def apply(self, at: Host) -> Applied:
        """Replace the chosen linears of the network in place."""
        learnt = self._learnt(at)
        seen = {name: stats.tokens for name, stats in learnt.linears.items()} if learnt else None
        chosen, total = self._chosen(at, seen), len({id(linear) for _, _, _, linear in places(at)})
        size = sum(p.numel() for p in at.net.parameters())
        swaps = self._swaps(at, chosen)
        del chosen
        budget: dict[str, float] = {}
        saved = numbers = 0
        backs: list[Callable[[], None]] = []
        want = outputs(at, learnt.calls) if learnt and self.max_error is not None else []
        if learnt and self.ranges > 1:
            backs.append(ranged(at, learnt.edges))
        try:
            for swap in swaps:
                stats = learnt.linears[swap.path] if learnt else None
                swap.module = small(swap.linear, self, stats).train(swap.linear.training)
                swap.put(swap.module)
                if not self.keep and not want:
                    saved, numbers = saved + saving(swap), numbers + swap.linear.weight.numel()
                    swap.linear = None  # gone before the next one is made
            if learnt and want:
                budget = self._within(at, swaps, learnt, want)
        except BaseException:
            for swap in swaps:
                if swap.linear is not None:
                    swap.put(swap.linear)
            for each in backs:
                each()
            raise
        swaps = [swap for swap in swaps if swap.module is not swap.linear]
        if self.keep or want:
            saved, numbers = sum(map(saving, swaps)), sum(s.linear.weight.numel() for s in swaps)
        if self.keep:
            backs += [back(swap) for swap in swaps]
        count = {"layers": float(len(swaps)), "of": float(total), "share": numbers / size, "bytes_saved": float(saved)}
        made = len(swaps)
        del swaps

        def undo() -> None:
            if not self.keep:
                raise NotReversible("Quantize dropped the original weights (keep=False); load the model again.")
            for each in reversed(backs):
                each()

        def inert() -> str | None:
            return None if made else "Quantize: no linear qualified; lower min_side or leave Quantize out."

        return Applied(undo, lambda: count | budget, inert)

    def _learnt(self, at: Host) -> Calibration | None:
        """The calibration, read or made; None where nothing needs one and none is given."""
        if self.calibration:
            return Calibration.load(self.calibration)
        return own_calibration(at, self.ranges, 32 if self.max_error is not None else 0) if self._needs else None

    def worst_first(self, at: Host, learnt: Calibration) -> list[str]:
        """The linears that it rounds, by their output error on a calibration's rows: names for ``skip``."""
        swaps = self._swaps(at, self._chosen(at, {name: stats.tokens for name, stats in learnt.linears.items()}))
        for swap in swaps:
            swap.module = small(swap.linear, self, learnt.linears[swap.path])
        return [swap.path for swap in ranked(swaps, learnt)]

    def _swaps(self, at: Host, chosen: Sequence[tuple[nn.Module, str, nn.Linear]]) -> list[Swap]:
        """One for each linear; one at two places stays one."""
        paths: dict[int, str] = {}
        for path, _, _, linear in places(at):
            paths.setdefault(id(linear), path)
        made: dict[int, Swap] = {}
        for parent, name, linear in chosen:
            made.setdefault(id(linear), Swap(paths[id(linear)], linear, linear, [])).places.append((parent, name))
        return list(made.values())

    def _within(self, at: Host, swaps: list[Swap], learnt: Calibration, want: list[Any]) -> dict[str, float]:
        """Put the worst linears back until the network's error is within ``max_error``; raises where none is left."""
        worst = ranked(swaps, learnt)

        def measure(kept: int) -> float:
            for i, swap in enumerate(worst):
                swap.put(swap.linear if i < kept else swap.module)
            return distance(outputs(at, learnt.calls), want)

        assert self.max_error is not None
        kept, found = fewest(len(worst), measure, self.max_error)
        for swap in worst[:kept]:
            swap.module = swap.linear
        return {"kept_sensitive": float(kept), "error": found}


def ranked(swaps: Sequence[Swap], learnt: Calibration) -> list[Swap]:
    """The worst first."""
    return sorted(swaps, key=lambda swap: -harm(swap, learnt.linears[swap.path]))


def _modulates(path: str) -> bool:
    return any(LEFT.search(part) for part in path.split("."))
