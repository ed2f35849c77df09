"""The arguments of a denoiser's call as a template: what is the sample, the time, the condition, and what is fixed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hasten.core.denoiser import Cond
from hasten.core.errors import ConfigError, UnsupportedModel
from hasten.models.probe import Look, walk

SIZE = ".size"  # cond[name + SIZE]: how many entries of cond[name] [B, L, ...] count, where samples differ in L


@dataclass(frozen=True)
class Fixed:
    """The same value in every call."""

    value: Any


@dataclass(frozen=True)
class Each:
    """One tensor [1, ...] for every sample, or with ``listed`` a list with ``value`` for every sample."""

    value: Any
    listed: bool = False


@dataclass(frozen=True)
class Rows:
    """cond[name] [B, ...], or None where there is none: a mask that hides nothing is often left out.

    With ``listed`` it is a list of B tensors, whose first sizes are cond[name + SIZE]. The network takes the samples
    at dimension ``dim``.
    """

    name: str
    listed: bool = False
    dim: int = 0


@dataclass(frozen=True)
class Latent:
    """The sample, in the shape in which the network takes it.

    Args:
        shape: One sample's shape as the network takes it, without what is joined to it.
        dim: The dimension at which cond[name] is joined to it: channels of an image to edit, tokens of a reference.
        name: Of that condition; None where nothing is joined.
        listed: A list of B tensors instead of one.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    dim: int = 1
    name: str | None = None
    listed: bool = False


@dataclass(frozen=True)
class Time:
    """slope t + offset, t being the scheduler's time; [1] for a time a sample, [1, L] for one a token.

    With ``next``, t is the time at which the step ends: the second time of a two-time network. With ``early``, the
    pipeline rounds t itself to ``dtype`` before it maps it, which in bfloat16 is another time.
    """

    slope: Tensor
    offset: Tensor
    dtype: torch.dtype
    next: bool = False
    early: bool = False

    def __call__(self, t: Tensor) -> Tensor:
        """The argument at scheduler times t [B], or [B, F], each for L / F tokens in a row (`check_frames`)."""
        wide = (t.to(self.dtype) if self.early else t).double()
        frames = wide.ndim == 2
        wide = wide.repeat_interleave(self.slope.shape[1] // wide.shape[1], 1) if frames else wide
        wide = wide if frames else wide.view(len(t), *(1,) * (self.slope.ndim - 1))
        return (self.slope * wide + self.offset).to(self.dtype)


def check_frames(nodes: Mapping[str, Any], x: Tensor, t: Tensor, who: str) -> None:
    """Refuse times t [B, F] that the network ``who`` cannot take for samples x [B, C, F, H, W].

    Its tokens are those of one frame after the other, in square patches of one frame: L p^2 = F H W.

    Raises:
        ConfigError: If its time is one a sample, t is of another shape, or a token is of several frames.
    """
    times = [node for node in nodes.values() if isinstance(node, Time)]
    if any(node.slope.ndim != 2 for node in times):
        raise ConfigError(f"{who} takes one time for a whole sample; give t as [B], not {list(t.shape)}.")
    frames = x.shape[2] if x.ndim == 5 else 0
    if not frames or t.shape != (len(x), frames):
        want = f"[{len(x)}] or, a time a frame, [{len(x)}, {frames}]" if frames else f"[{len(x)}]"
        raise ConfigError(f"For samples {list(x.shape)} give t as {want}, not {list(t.shape)}.")
    for node in times:
        area, tokens = x.shape[3] * x.shape[4], node.slope.shape[1]
        patch = math.isqrt(frames * area // tokens)
        if tokens * patch**2 != frames * area:
            raise ConfigError(f"{who} has {tokens} tokens for {frames} frames, none of one frame; give t as [B].")


def learn(name: str, one: Any, two: Any, other: Any) -> Any:
    """The node of an argument, from three calls: with a prompt, with it twice, and with another one and it.

    Raises:
        UnsupportedModel: If the argument depends on the number of samples in a way that cannot be told.
    """
    if one is None and isinstance(other, Tensor):
        return Rows(name)
    if isinstance(one, Tensor):
        if one.ndim and two.shape == (2 * len(one), *one.shape[1:]):
            return Each(one) if torch.equal(two, other) else Rows(name)
        for d in range(1, one.ndim):
            if two.shape == (*one.shape[:d], 2, *one.shape[d + 1 :]) and one.shape[d] == 1:
                return Rows(name, dim=d)
        if one.shape == two.shape and torch.equal(one, two):
            return Fixed(one)
        raise UnsupportedModel(
            f"The denoiser's argument {name} is {list(one.shape)} for one sample and {list(two.shape)} for two; "
            "wrap the network with hasten.wrap and say how it is called."
        )
    if isinstance(one, Mapping):
        return {k: learn(f"{name}.{k}", v, two[k], other[k]) for k, v in one.items()}
    if isinstance(one, (list, tuple)):
        if len(two) == 2 * len(one) == 2:
            if isinstance(one[0], Tensor):
                same = all(torch.equal(a, b) for a, b in zip(two, other, strict=True) if a.shape == b.shape)
                same = same and all(a.shape == b.shape for a, b in zip(two, other, strict=True))
                return Each(one[0], listed=True) if same else Rows(name, listed=True)
            return Each(one[0], listed=True)
        return type(one)(learn(f"{name}.{i}", *parts) for i, parts in enumerate(zip(one, two, other, strict=True)))
    return Fixed(one)


def fill(node: Any, x: Tensor, t: Tensor, cond: Cond) -> Any:
    """The argument of ``node`` for samples x [B, ...] at scheduler times t [B] or [B, F] under cond."""
    n = len(x)
    match node:
        case Fixed(value):
            return value
        case Each(value, listed):
            return [value] * n if listed else value.expand(n, *value.shape[1:]).contiguous()  # some view it
        case Rows(name, listed, dim):
            if not listed:
                return cond[name].movedim(0, dim) if dim else cond.get(name)
            return [row[:k] for row, k in zip(cond[name], cond[name + SIZE].tolist(), strict=True)]
        case Latent(shape, dtype, dim, name, listed):
            own = x.reshape(n, *shape).to(dtype)
            own = own if name is None else torch.cat([own, cond[name].to(own)], dim)
            return list(own) if listed else own
        case Time():
            return node(t)
        case Mapping():
            return {k: fill(v, x, t, cond) for k, v in node.items()}
        case list() | tuple():
            return type(node)(fill(v, x, t, cond) for v in node)
    raise TypeError(f"{node!r} is no node of a template")


def moved(node: Any, device: torch.device) -> Any:
    """The template with its tensors on ``device``."""
    there = lambda v: walk(v, lambda w: w.to(device) if isinstance(w, Tensor) else w)  # noqa: E731
    match node:
        case Fixed(value):
            return Fixed(there(value))
        case Each(value, listed):
            return Each(there(value), listed)
        case Time(slope, offset, _):
            return replace(node, slope=slope.to(device), offset=offset.to(device))
        case Mapping():
            return {k: moved(v, device) for k, v in node.items()}
        case list() | tuple():
            return type(node)(moved(v, device) for v in node)
    return node


def extract(node: Any, value: Any, cond: dict[str, Tensor]) -> None:
    """Put the conditions that a recorded argument holds into ``cond``: the inverse of :func:`fill`."""
    match node:
        case Rows(name, False, dim):
            if value is not None:
                cond[name] = value.movedim(dim, 0)
        case Rows(name, True):
            sizes = torch.tensor([len(v) for v in value], device=value[0].device)
            cond[name] = torch.nn.utils.rnn.pad_sequence(list(value), batch_first=True)
            cond[name + SIZE] = sizes
        case Latent(shape, _, dim, str() as name, listed):
            whole = torch.stack(list(value)) if listed else value
            cond[name] = whole.narrow(dim, shape[dim - 1], whole.shape[dim] - shape[dim - 1])
        case Mapping():
            for k, v in node.items():
                extract(v, value[k], cond)
        case list() | tuple():
            for inner, v in zip(node, value, strict=True):
                extract(inner, v, cond)


def conditions(nodes: Mapping[str, Any], look: Look) -> dict[str, Tensor]:
    """All conditions of a recorded call, by name, each [B, ...]."""
    cond: dict[str, Tensor] = {}
    for name, node in nodes.items():
        extract(node, look.arguments[name], cond)
    return cond


def single(cond: Cond, i: int) -> dict[str, Tensor]:
    """The conditions of sample i, each [1, ...], without padding."""
    found = {k: v[i : i + 1] for k, v in cond.items()}
    return {k: v[:, : int(found[k + SIZE])] if k + SIZE in found else v for k, v in found.items()}


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """max|a - b| within ``tolerance`` of max|b|."""
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max())


def find_latent(look: Look, sample: Tensor) -> tuple[str, Latent, Tensor]:
    """Which argument the scheduler's ``sample`` [B, ...] is, up to a factor, with the sample as it came in.

    Raises:
        UnsupportedModel: If it is none of them.
    """
    for name, value in look.arguments.items():
        listed = isinstance(value, (list, tuple)) and bool(value) and all(isinstance(v, Tensor) for v in value)
        if listed and len({v.shape for v in value}) != 1:
            continue
        v = torch.stack(list(value)) if listed else value
        if not isinstance(v, Tensor) or v.ndim < 3 or len(v) != len(sample) or not v.is_floating_point():
            continue
        own, dim = v, 1
        if v.numel() != sample.numel():
            wider = [d for d in range(v.ndim) if v.ndim == sample.ndim and v.shape[d] > sample.shape[d]]
            if len(wider) != 1:
                continue
            dim = wider[0]
            own = v.narrow(dim, 0, sample.shape[dim])
        if own.numel() != sample.numel():
            continue
        wide, other = own.double().flatten(), sample.double().flatten()
        factor = (wide @ other) / (other @ other)
        if factor > 0 and close(wide, factor * other, 4 * torch.finfo(v.dtype).eps):
            joined = None if own is v else f"{name}.joined"
            return name, Latent(tuple(own.shape[1:]), v.dtype, dim, joined, listed), own.reshape(sample.shape)
    shapes = {k: list(v.shape) for k, v in look.arguments.items() if isinstance(v, Tensor)}
    raise UnsupportedModel(
        f"None of the denoiser's arguments ({shapes}) holds the scheduler's sample {list(sample.shape)}; "
        "wrap the network with hasten.wrap and say how it is called."
    )


def find_times(looks: Sequence[Look], t: Sequence[float], skip: str) -> dict[str, Time]:
    """The arguments that change from one step to the next, each as an affine map of the scheduler's time.

    Args:
        looks: The denoiser's calls of two steps or more, at the scheduler's times t.
        skip: The argument that is the sample.
    """
    found, first, second = {}, looks[0], looks[1]
    for name, a in first.arguments.items():
        if name == skip or not isinstance(a, (Tensor, float, int)) or isinstance(a, bool):
            continue
        dtype = a.dtype if isinstance(a, Tensor) and a.is_floating_point() else torch.float32
        seen = [torch.as_tensor(look.arguments[name]).detach().cpu().double() for look in looks]
        if len({v.shape for v in seen}) > 1 or seen[0].ndim > 2 or torch.equal(seen[0], seen[1]):
            continue
        values = torch.stack([v.reshape(1) if v.ndim == 0 else v[0].reshape(-1) for v in seen])
        found[name] = fitted(values, torch.tensor(t, dtype=torch.float64), dtype, tokens=seen[0].ndim == 2)
    for name in list(found):  # a second time is at the first step what the first time is at the second
        for other in found.keys() - {name}:
            a, b = (torch.as_tensor(v).double() for v in (first.arguments[name], second.arguments[other]))
            if not found[other].next and a.shape == b.shape and close(a, b, 1e-5):
                found[name] = replace(found[other], next=True)
    return found


def fitted(seen: Tensor, t: Tensor, dtype: torch.dtype, tokens: bool = False) -> Time:
    """The affine map through the first and the last of values ``seen`` [N, L], rounded to ``dtype``, at times t [N].

    Of the exact fit and of those of one to three significant digits, what gives all values back best; the roundest of
    equals: 0.00099998 is 1/1000.

    Args:
        tokens: The argument has a value for each of L tokens, [B, L]; else [B].
    """
    exact, best = (seen[0] - seen[-1]) / (t[0] - t[-1]), []
    for digits in (1, 2, 3, None):
        slope = exact if digits is None else rounded(exact, digits)
        offset = seen[0] - slope * t[0]
        small = 4 * torch.finfo(dtype).eps * seen.abs().max()
        offset = torch.where((offset - rounded(offset, 1)).abs() <= small, rounded(offset, 1), offset)
        offset = torch.where(offset.abs() <= small, torch.zeros_like(offset), offset)
        shape = (1, -1) if tokens else (-1,)
        best += [Time(slope.view(shape), offset.view(shape), dtype, early=early) for early in (False, True)]
    return min(best, key=lambda time: float((time(t).double().view_as(seen) - seen).abs().max()))


def rounded(x: Tensor, digits: int) -> Tensor:
    """``x`` at so many significant digits."""
    last = 10.0 ** (torch.floor(torch.log10(x.abs().clamp_min(1e-30))) - digits + 1)
    return torch.round(x / last) * last
