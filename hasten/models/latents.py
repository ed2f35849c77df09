"""Latents to pixels and back for ANY pipeline, learnt from its own runs; its encoders let go and read again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from itertools import count
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.errors import ConfigError, UnsupportedModel
from hasten.models.probe import Call, Stop, kept, quiet, run, walk

FAR = 1024.0  # a latent at which z = scale x + shift shows the scale to its last bit, in half precision too


@dataclass(frozen=True, eq=False)
class Layout:
    """How samples of one shape become the autoencoder's input: z_i = scale_i x_order(i) + shift_i.

    Args:
        shape: One sample, as the scheduler and the adapter see it: packed where the pipeline packs.
        inner: The same sample as the autoencoder takes it.
        pixels: One image (3, H, W), or one video (3, F, H, W).
        order, scale, shift: [N] each, N the numbers of a sample; ``order`` a permutation.
        still: The autoencoder is one of videos and the pipeline one of images, which are its single frames.
        turned: The decoder returns frames before channels.
        arguments: What decode takes besides z, by position and by name.
        raised: The precision in which the autoencoder works where the pipeline lifts it; else None.
    """

    shape: tuple[int, ...]
    inner: tuple[int, ...]
    pixels: tuple[int, ...]
    order: Tensor
    scale: Tensor
    shift: Tensor
    still: bool = False
    turned: bool = False
    arguments: Any = ((), {})
    raised: torch.dtype | None = None

    def to_vae(self, x: Tensor) -> Tensor:
        """z [B, *inner] of samples x [B, *shape]. Raises ConfigError for another shape."""
        check("Samples", x, self.shape)
        order, scale, shift = (v.to(x.device) for v in (self.order, self.scale, self.shift))
        return (x.flatten(1)[:, order] * scale + shift).view(-1, *self.inner)

    def from_vae(self, z: Tensor) -> Tensor:
        """x [B, *shape] of z [B, *inner]: the inverse of `to_vae`. Raises ConfigError for another shape."""
        check("The autoencoder's latents", z, self.inner)
        order, scale, shift = (v.to(z.device) for v in (self.order, self.scale, self.shift))
        return ((z.flatten(1) - shift) / scale)[:, order.argsort()].view(-1, *self.shape)

    @torch.no_grad()
    def decode(self, vae: Any, x: Tensor) -> Tensor:
        """Images [B, *pixels] in [-1, 1] of samples x [B, *shape], one by one; in tiles after vae.enable_tiling()."""
        with lifted(vae, self.raised) as like:
            args, named = walk(self.arguments, lambda v: v.to(like["device"]) if isinstance(v, Tensor) else v)
            images = torch.cat([vae.decode(z[None].to(**like), *args, **named)[0] for z in self.to_vae(x)])
        images = images.transpose(1, 2) if self.turned else images
        return (images[:, :, 0] if self.still else images).clamp(-1, 1)

    @torch.no_grad()
    def encode(self, vae: Any, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Samples x [B, *shape] of images [B, *pixels] in [-1, 1], one by one.

        Args:
            generator: Draws from the encoder's distribution; None takes its mode.

        Raises:
            ConfigError: For images of another size, or of bytes.
        """
        check("Images", images, self.pixels)
        if not images.is_floating_point():
            raise ConfigError(f"Images to encode are floats in [-1, 1], not {images.dtype}; give images / 127.5 - 1.")
        rows = []
        with lifted(vae, self.raised) as like:
            for image in images.unsqueeze(2) if self.still else images:
                found = vae.encode(image[None].to(**like))[0]
                if not isinstance(found, Tensor):
                    found = found.mode() if generator is None else found.sample(generator)
                rows.append(self.from_vae(found.to(self.scale.dtype)))
        return torch.cat(rows)


def check(what: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ConfigError where x is not [B, *shape]."""
    if tuple(x.shape[1:]) != shape:
        size = ", ".join(map(str, shape))
        raise ConfigError(f"{what} are [B, {size}] here, not {list(x.shape)}; learn a layout(pipe, net) of their size.")


@contextmanager
def lifted(vae: nn.Module, dtype: torch.dtype | None = None) -> Iterator[dict[str, Any]]:
    """The autoencoder in ``dtype`` for a while (None: as it is), with the device and dtype that its input needs."""
    before = next(vae.parameters()).dtype
    if dtype is not None:
        vae.to(dtype)
    try:
        yield {"device": next(vae.parameters()).device, "dtype": dtype or before}
    finally:
        if next(vae.parameters()).dtype != before:
            vae.to(before)


def decoders(pipe: Any) -> dict[str, Any]:
    """The pipeline's networks that decode, by name; the one called ``vae`` first."""
    found = {k: m for k, m in pipe.components.items() if isinstance(m, nn.Module) and hasattr(m, "decode")}
    return dict(sorted(found.items(), key=lambda item: item[0] != "vae"))


def see(
    pipe: Any, vae: Any, call: Call, answers: dict[Any, Any], x: Tensor | None = None, through: bool = False
) -> Any:
    """What the decoder is given in a run whose scheduler steps all return x [*shape] (None: their own results).

    Args:
        answers: What networks returned, by module and count of calls: they compute in the first run only.
        through: Also what the decoder and the pipeline return, with another seed.
    """
    seen, decode = SimpleNamespace(z=None), vae.decode

    def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        result = type(scheduler).step(scheduler, *args, **kwargs)
        if scheduler is not pipe.scheduler:  # a copy that the pipeline made, for a second latent
            return result
        first = seen.sample = result[0]

        def ours(v: Any) -> Any:  # the estimate of x0 beside it too, which some pipelines decode
            if x is None or not isinstance(v, Tensor) or v.shape != first.shape:
                return v
            return x.to(v.device).expand(v.shape)

        if isinstance(result, Mapping):
            return type(result)(**{k: ours(v) for k, v in result.items()})
        return tuple(map(ours, result))

    def look(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        named = {k: v for k, v in kwargs.items() if not isinstance(v, torch.Generator)}
        seen.z, seen.dtype, seen.arguments = kept(z), next(vae.parameters()).dtype, kept((args, named))
        if not through:
            raise Stop
        result = decode(z.to(seen.dtype), *args, **kwargs)
        seen.decoded = kept(result[0])
        return result

    def again(module: nn.Module) -> Any:
        forward, counter = module.forward, count()

        @wraps(forward)
        def remembered(*args: Any, **kwargs: Any) -> Any:
            at = (module, next(counter))
            if at not in answers:
                answers[at] = forward(*args, **kwargs)
            return answers[at]

        return remembered

    others = [m for m in pipe.components.values() if isinstance(m, nn.Module) and m is not vae]
    bound = MethodType(step, pipe.scheduler)  # a deep copy of the scheduler binds its own
    ours = [(pipe.scheduler, "step", bound), (vae, "decode", look), *((m, "forward", again(m)) for m in others)]
    with ExitStack() as stack, quiet(pipe), torch.no_grad(), lifted(vae):
        for thing, name, value in ours:
            mine = vars(thing)
            stack.callback(*((mine.update, {name: mine[name]}) if name in mine else (mine.pop, name)))
            mine[name] = value
        seen.result = run(pipe, call, 2, seed=int(through))
    return seen


def layout(pipe: Any, net: Any, **size: Any) -> Layout:
    """The layout of the samples of ``net``, the adapter of ``pipe``, learnt from runs of the pipeline.

    Latents of our choice take the place of the scheduler's: zeros show the shift, large numbers the scale, and the
    digits of every number's index the permutation. A run with random ones, another seed and the decoder verifies.

    Args:
        size: Arguments of the call that differ from the adapter's: height, width, num_frames.

    Raises:
        UnsupportedModel: If the pipeline has no autoencoder, or does more to its latents than reorder, scale and
            shift them, or more to its images than map [-1, 1] to [0, 1].
        ConfigError: If the pipeline cannot run, because its encoders were freed.
    """
    who, vae = type(pipe).__name__, next(iter(decoders(pipe).values()), None)
    if vae is None:
        raise UnsupportedModel(f"{who} has no autoencoder (it has {', '.join(pipe.components)}): no latents to decode.")
    call, answers = {**net.found.call, **net.found.quiet, **size, "output_type": "pt"}, {}
    try:
        first = see(pipe, vae, call, answers)
    except (AttributeError, TypeError) as error:
        gone = [k for k, v in pipe.components.items() if v is None and "encoder" in k]
        if not gone or "NoneType" not in str(error):
            raise
        raise ConfigError(f"{who} cannot run without {', '.join(gone)}; learn layouts before free.") from error
    refused = f"{who} does more to its latents before decoding than reorder, scale and shift them"
    if first.z is None or len(first.z) != len(first.sample) or first.z.numel() != first.sample.numel():
        given = "nothing" if first.z is None else list(first.z.shape)
        raise UnsupportedModel(
            f"{refused}: of {list(first.sample.shape)} the decoder gets {given}; decode them yourself."
        )
    shape, own = first.sample.shape[1:], next(vae.parameters()).dtype
    eps = max(torch.finfo(d).eps for d in (net.captured, own, first.sample.dtype, first.z.dtype))
    zero = torch.zeros(shape, dtype=torch.promote_types(first.sample.dtype, torch.float32))
    index = torch.arange(zero.numel())

    def sent(x: Tensor) -> Tensor:
        return see(pipe, vae, call, answers, x.view(shape)).z[0].flatten().to(zero)

    shift = sent(zero)
    scale = (sent(zero + FAR) - shift) / FAR
    base, order, place = int(1 / (16 * eps)), torch.zeros_like(index), 1
    while place < len(index):  # in as many digits as the precision needs
        digit = (sent((index // place % base).to(zero)) - shift) / scale
        order, place = order + place * digit.nan_to_num(-1).round().long(), place * base
    if not torch.equal(order.sort().values, index):
        raise UnsupportedModel(f"{refused}; decode its samples yourself.")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(zero)
    last = see(pipe, vae, call, answers, x, through=True)
    image, theirs = last.decoded, torch.stack(list(last.result[0]))
    still = image.ndim == 5 and theirs.ndim == 4
    turned = image.ndim == 5 and image.shape[1] != 3
    image = image.transpose(1, 2) if turned else image
    image = image[:, :, 0] if still else image
    made = Layout(tuple(shape), tuple(first.z.shape[1:]), tuple(image.shape[1:]), order, scale, shift, still, turned,
                  first.arguments, None if first.dtype == own else first.dtype)  # fmt: skip
    error = float((made.to_vae(x[None]) - last.z[:1].to(zero)).abs().max() / last.z.abs().max())
    if not error <= 16 * eps:
        raise UnsupportedModel(f"{refused} (an error of {error:.1e} remains); decode its samples yourself.")
    mine = (image if image.ndim == 4 else image.transpose(1, 2)) / 2 + 0.5
    same = mine.shape == theirs.shape and (mine.clamp(0, 1) - theirs).abs().max() <= max(16 * eps, 1 / 255)  # or bytes
    if not same and theirs.any():  # black is a safety checker's doing
        raise UnsupportedModel(
            f"{who} changes its images after decoding, {list(mine.shape)} to {list(theirs.shape)}; give a height and "
            "width that it need not change."
        )
    return made
