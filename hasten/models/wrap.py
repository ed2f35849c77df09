"""A model that is no pipeline: any ``nn.Module`` that denoises, with its own arguments, times and data range."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.core.denoiser import Cond
from hasten.core.errors import ConfigError, UnsupportedModel, unknown
from hasten.core.path import KINDS, Coeffs, Kind, Path, ddpm, expand, named_path, solve2


class NoNull(Mapping[str, Tensor]):
    """The unconditional condition of a model that was given none: an error as soon as guidance reads it."""

    def __getitem__(self, key: str) -> Any:
        raise ConfigError("Guidance needs this model's unconditional condition; give null to wrap, or do not guide.")

    def __iter__(self) -> Any:
        return self[""]

    def __len__(self) -> int:
        return 1


class Wrapped(nn.Module):
    """``module`` as a denoiser on samples in [-1, 1], with the protocol of ``core.denoiser``, in eval mode.

    **Data range.** The module was trained on x0' = m x0 + c at x'_t = a x0' + s eps, on its own path (a, s). Its noise
    has unit variance whatever the size of its data. Subtracting a c and dividing by m gives, at the same t,

        x_t = (x'_t - a c) / m = a x0 + (s / m) eps,

    so on [-1, 1] it denoises on the path (a, s / m), tan(angle) = tan(angle') / m: scaling the data is a change of the
    noise level and nothing else (Chen 2023, "On the importance of noise scheduling for diffusion models"). No time
    moves, and x_t is x0 at t = 0. An output k x0' + e eps, less k c, is k m x0 + e eps: x0 and velocity are divided by
    m, eps stays, and v, of whose row (-sigma, alpha) only one part scales, takes one 2x2 solve with x_t.

    Args:
        module: Holds the weights. It is used as it is; a student's ``module`` is again of its class.
        path: The path that it was trained on, or its name; or else ``schedule``: a table of alphas_cumprod [T].
        kind: What it predicts.
        time: Its time argument as a function of the path's native t [B] float, or ``unit``: t itself; ``sigma_log``:
            log(sigma/alpha)/4, EDM's c_noise; on a table, whose entry i is at t = (i + 1)/T, ``continuous_index``:
            t T - 1, at least 0 (the default there), or ``index``: the nearest integer to it.
        call: How it is called: (module, x, time, cond) to anything; module(x, time, **cond) unless given.
        output: What it returns to a prediction [B, C, ...]. Unless given: a tensor, ``.sample`` or the first of a
            tuple; of 2 C channels the first C, for a learnt variance comes second (Nichol & Dhariwal 2021).
        shape: (C, H, W) or (C, F, H, W) of one sample, which training asks for.
        data_range: The (low, high) of its own data that stands for (-1, 1).
        classes: Classes of ``cond["label"]`` [B]; a source's null label, ``classes``, becomes that of ``null``.
        null: Conditions [B, ...] to the unconditional ones, or a dict of the latter for one sample.
        blocks: The repeated blocks or the name of their list; None is the ModuleList with the most parameters. A
            tap is the first tensor that a block returns: [B, L, D], or a map [B, D, ...].
        width: Of the taps; None is the largest D, found by a call on zeros. Smaller ones are padded with zeros.
        takes_r: Whether the module takes a second time as cond["r"], mapped as ``time`` is; without, r is left out.

    Raises:
        ConfigError: For settings that contradict each other or the module.
    """

    def __init__(
        self, module: nn.Module, *, path: Path | str | None = None, kind: Kind = "eps",
        time: str | Callable[[Tensor], Tensor] | None = None, schedule: Sequence[float] | Tensor | None = None,
        call: Callable[..., Any] | None = None, output: Callable[[Any], Tensor] | None = None,
        shape: Sequence[int] = (), data_range: tuple[float, float] = (-1.0, 1.0), classes: int = 0,
        null: Callable[[Cond], Cond] | Cond | None = None, blocks: str | Iterable[nn.Module] | None = None,
        width: int | None = None, takes_r: bool = False,
    ):  # fmt: skip
        super().__init__()
        if not isinstance(module, nn.Module):
            raise ConfigError(f"wrap takes an nn.Module that denoises, not {type(module).__name__}.")
        if (path is None) == (schedule is None):
            raise ConfigError("Give wrap either path, such as 'rectified_flow', or schedule=alphas_cumprod.")
        if kind not in KINDS:
            raise unknown("prediction kind", kind, KINDS)
        if not -torch.inf < data_range[0] < data_range[1] < torch.inf:
            raise ConfigError(f"data_range must be (low, high) with low below high, not {data_range}.")
        if shape and (len(shape) not in (3, 4) or min(shape) < 1):
            raise ConfigError(f"shape must be one sample's (C, H, W) or (C, F, H, W), not {tuple(shape)}.")
        named = path if path is None or isinstance(path, Path) else named_path(path)
        self.own = named or ddpm(() if schedule is None else schedule)
        self.kind: Kind = kind
        self.module, self.time, self.output = module, time_map(time, self.own), output
        self.call = call or (lambda module, x, time, cond: module(x, time, **cond))
        self.scale, self.shift = (data_range[1] - data_range[0]) / 2, (data_range[1] + data_range[0]) / 2  # m, c
        self.path = rescaled(self.own, self.scale)
        self.channels, self.size = shape[0] if shape else 0, tuple(shape[1:])
        self.classes, self.empty, self.second_time = classes, null, takes_r
        self.names, self.wide, self.recomputes = block_names(module, blocks), width, False
        self.eval()

    @property
    def blocks(self) -> list[nn.Module]:
        return [self.module.get_submodule(name) for name in self.names]  # by name: a LoRA view has blocks of its own

    @property
    def config(self) -> Wrapped:
        """Where channels, size, classes, second_time and width are found: here. Raises ConfigError without shape."""
        if not self.size:
            raise ConfigError("The shape of this model's samples is not known; give shape=(C, H, W) to wrap.")
        return self

    @property
    def width(self) -> int:
        """D of the taps. Raises UnsupportedModel without blocks, ConfigError if a call on zeros fails."""
        if not self.names:
            raise UnsupportedModel(f"{type(self.module).__name__} has no ModuleList to tap; give blocks to wrap.")
        if self.wide is None:
            like, shape, self.wide = next(self.module.parameters()), (1, self.config.channels, *self.size), 0
            cond = {"label": torch.zeros(1, dtype=torch.int64, device=like.device)} if self.classes else {}
            try:
                with torch.no_grad(), torch.random.fork_rng([like.device] if like.is_cuda else []):
                    t = self.path.at(0.5).to(like.device).expand(1)
                    _, found = self(like.new_zeros(shape), t, cond, taps=range(len(self.names)))
            except Exception as error:
                self.wide = None
                raise ConfigError(f"A call on zeros failed, so give width to wrap, D of the taps ({error}).") from error
            self.wide = max(tokens.shape[-1] for tokens in found)
        return self.wide

    @property
    def with_second_time(self) -> Callable[[], Wrapped]:
        """Makes a copy where the module takes r; where it does not there is no such attribute, so cloning refuses."""
        if not self.second_time:
            raise AttributeError("with_second_time")
        return partial(copy.deepcopy, self)

    @property
    def checkpointing(self) -> bool:
        return self.recomputes

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        """Turn the module's own gradient checkpointing on or off. Raises UnsupportedModel if it has none."""
        word = "enable" if on else "disable"
        names = (f"{word}_gradient_checkpointing", f"gradient_checkpointing_{word}")  # diffusers, transformers
        switch = next((getattr(self.module, name) for name in names if hasattr(self.module, name)), None)
        if switch is None:
            raise UnsupportedModel(f"{type(self.module).__name__} has no {names[0]}; checkpoint inside its forward.")
        switch()
        self.recomputes = on

    def null(self, cond: Cond) -> Cond:
        """The unconditional condition of cond's batch; without ``null``, one that raises ConfigError when read."""
        if not cond or self.empty is None:
            return NoNull() if cond else {}
        if callable(self.empty):
            return self.empty(cond)
        if self.empty.keys() != cond.keys():
            raise ConfigError(f"null holds {sorted(self.empty)}, but the conditions are {sorted(cond)}.")
        return {k: self.empty[k].to(v.device, v.dtype).expand_as(v) for k, v in cond.items()}

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, *, r: Tensor | None = None, taps: Sequence[int] = ()) -> Any:
        """Prediction of x_t's shape [B, C, (F,) H, W]; with taps, also the tokens [B, L, width] of those blocks."""
        if r is not None and not self.second_time:
            raise ConfigError("This model has no second time; if its module takes r, give takes_r=True to wrap.")
        if self.classes and "label" in cond:  # a source says "no class" by the label `classes`
            gone = cond["label"] >= self.classes
            if self.empty is not None or bool(gone.any()):
                cond = {**cond, "label": torch.where(gone, self.null(cond)["label"], cond["label"])}
        m, c, (alpha, sigma, _, _) = self.scale, self.shift, self.own.coeffs(t)
        x = x_t if (m, c) == (1, 0) else m * x_t + expand(c * alpha, x_t).to(x_t.dtype)
        found: dict[int, Tensor] = {}
        width = self.width if taps else 0
        with ExitStack() as hooks:
            for i in taps:
                hooks.callback(self.blocks[i].register_forward_hook(partial(keep, found, i)).remove)
            raw = self.call(self.module, x, self.time(t), {**cond} if r is None else {**cond, "r": self.time(r)})
        if found.keys() != set(taps):
            raise ConfigError(f"The blocks {sorted(set(taps) - found.keys())} were not called; give others to wrap.")
        out = self.output(raw) if self.output else first(raw, "The module", "output")
        if not self.output and out.shape[1:2] == (2 * x.shape[1],):
            out = out[:, : x.shape[1]]
        if out.shape != x.shape:
            raise ConfigError(f"The module returned {list(out.shape)} for x_t {list(x.shape)}; give output to wrap.")
        if (m, c) != (1, 0):
            k, e = self.own.row(t, self.kind)
            out = (out - expand(c * k, out).to(out.dtype)) / (m if self.kind in ("x0", "velocity") else 1)
            if self.kind == "v":
                p, q = solve2(alpha, sigma / m, m * k, e, -sigma / m, alpha, "v between data ranges")
                out = expand(p, out).to(out.dtype) * out + expand(q, out).to(out.dtype) * x_t
        return (out, [F.pad(found[i], (0, max(0, width - found[i].shape[-1]))) for i in sorted(found)]) if taps else out


wrap = Wrapped


def rescaled(path: Path, scale: float) -> Path:
    """The path (alpha, sigma / scale) of data that are 1 / scale times the size of those of ``path``, at equal t."""

    def coeffs(t: Tensor) -> Coeffs:
        alpha, sigma, dalpha, dsigma = path.coeffs(t)
        return alpha, sigma / scale, dalpha, dsigma / scale

    def from_angle(angle: Tensor) -> Tensor:
        return path.from_angle(torch.atan2(scale * torch.sin(angle), torch.cos(angle)))

    name = f"{path.name}/{scale!r}"  # another name: it is another path
    return path if scale == 1 else replace(path, name=name, coeffs=coeffs, from_angle=from_angle)


def time_map(time: str | Callable[[Tensor], Tensor] | None, path: Path) -> Callable[[Tensor], Tensor]:
    """The function that ``time`` names on a module's own path, as :class:`Wrapped` explains."""
    count = len(path.args) if path.name == "ddpm" else 0
    maps: dict[str, Callable[[Tensor], Tensor]] = {
        "unit": lambda t: t,
        "sigma_log": lambda t: torch.tan(path.angle(t)).clamp_min(1e-5).log() / 4,  # finite at t = 0
        "continuous_index": lambda t: (t * count - 1).clamp_min(0),
        "index": lambda t: (t * count).round().long().sub(1).clamp_min(0),
    }
    if callable(time):
        return time
    time = time or ("continuous_index" if count else "unit")
    if time not in maps:
        raise unknown("time", time, maps)
    if "index" in time and not count:
        raise ConfigError(f"time={time!r} counts the entries of a table; give schedule=alphas_cumprod, or a function.")
    return maps[time]


def block_names(module: nn.Module, blocks: str | Iterable[nn.Module] | None) -> tuple[str, ...]:
    """The names inside ``module`` of its repeated blocks. Raises ConfigError for blocks that it has not."""
    names = {id(m): n for n, m in module.named_modules()}
    lists: Any = {n: m for n, m in module.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m)}
    if isinstance(blocks, str) and blocks not in lists:
        raise unknown("list of blocks", blocks, lists)
    stacks = [m for m in lists.values() if isinstance(m, nn.ModuleList)]  # of equals the outermost comes first
    largest = max(stacks, key=lambda m: sum(p.numel() for p in m.parameters()), default=())
    chosen = list(largest if blocks is None else lists[blocks] if isinstance(blocks, str) else blocks)
    if any(id(block) not in names for block in chosen):
        raise ConfigError(f"blocks must be modules inside the {type(module).__name__}, or the name of a list in it.")
    return tuple(names[id(block)] for block in chosen)


def first(out: Any, who: str, option: str) -> Tensor:
    """``out``, its ``.sample`` or the first of a tuple, whichever is a tensor."""
    found = out[0] if isinstance(out, (tuple, list)) and out else out
    found = found if isinstance(found, Tensor) else getattr(out, "sample", None)
    if not isinstance(found, Tensor):
        raise ConfigError(f"{who} returned {type(out).__name__}, with no tensor first; give {option} to wrap.")
    return found


def keep(found: dict[int, Tensor], i: int, block: nn.Module, args: Any, out: Any) -> None:
    """A forward hook: the tokens [B, L, D] of block ``i``, a map's places being the tokens."""
    h = first(out, f"Block {i}", "other blocks")
    found[i] = h.flatten(2).transpose(1, 2) if h.ndim > 3 else h
