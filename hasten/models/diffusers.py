"""ANY diffusers pipeline as a Denoiser, learnt by watching three steps and verified by replaying another run.

No family is named here; the few that a probe cannot learn are in ``exceptions.py``.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.denoiser import Cond
from hasten.core.errors import ConfigError, UnsupportedModel, unknown
from hasten.core.path import Kind, Path, rectified_flow
from hasten.models.exceptions import Reading, find
from hasten.models.probe import Call, as_sample, networks, record, walk, without_guidance
from hasten.models.refuse import one_each, refusing
from hasten.models.taps import Taps, blocks_of
from hasten.models.template import Time, check_frames, conditions, fill, find_latent, find_times, learn, moved
from hasten.models.verify import error_of, guidance, path_of, replay, shift_of


@dataclass(frozen=True)
class Config:
    """What the rest of hasten reads of a network's shape: a sample is [channels, *size], taps are [B, L, width]."""

    channels: int
    size: tuple[int, ...]
    width: int
    classes: int = 0


@dataclass(frozen=True)
class Found:
    """What the probe of a pipeline found.

    Args:
        call: How the pipeline was called, and ``quiet`` what turns its classifier-free guidance off.
        subject: The argument that says what to make: ``prompt``, or ``class_labels``.
        latent: The denoiser's argument that is the sample; ``times`` those that follow the time.
        sign: Of the network's output as a prediction of its kind.
        steps: Scheduler times per path time: t_scheduler = steps t + offset. Negative where they rise to the data.
        shift: Of the scheduler's noise levels against its times, where they are not the same.
        blocks: The names of the blocks that process the sample, and which of the streams that leave each is its own.
        odd: The table's entry for the family, for almost all families None.
        cfg_scale: The guidance that the call applied, in the convention u + w (c - u); 1 where none.
        error: Largest relative error of the replayed run.
    """

    call: dict[str, Any]
    quiet: dict[str, Any]
    subject: str
    latent: str
    times: tuple[str, ...]
    sign: float
    steps: float
    offset: float
    cfg_scale: float = 1.0
    error: float = 0.0
    shift: float = 1.0
    blocks: Mapping[str, int] = field(default_factory=dict, repr=False)
    odd: Reading | None = field(default=None, repr=False)

    def clock(self, t: Tensor) -> Tensor:
        """The path's time of a scheduler's time."""
        if self.odd and self.odd.clock:
            return self.odd.clock(t)
        return rectified_flow(self.shift).at((t - self.offset) / self.steps)

    def dial(self, t: Tensor) -> Tensor:
        """What the network's time arguments follow affinely, at the path's time: the scheduler's time, as a rule."""
        if self.odd and self.odd.clock:
            return self.odd.dial(t)
        return self.steps * rectified_flow(1 / self.shift).at(t) + self.offset

    def given(self, pred: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """What the scheduler is given for a prediction at (x [B, ...], t [B])."""
        pred = pred if self.steps > 0 else -pred  # a velocity in times that run the other way
        return self.odd.given(pred, x, t) if self.odd else pred


class PipelineDenoiser(nn.Module):
    """The denoiser of a diffusers pipeline, with the protocol of ``core.denoiser``; made by :func:`denoiser`.

    Samples are as the scheduler sees them (packed where the pipeline packs them). Conditions are what the pipeline
    hands its denoiser, by argument name (``encoder_hidden_states``, ``added_cond_kwargs.text_embeds``), each [B, ...].

    Args:
        net: The pipeline's own network; its parameters are shared, not copied.
        nodes: The template of its call for samples of one shape.
        found: What the probe found.
        uncond: The unconditional condition, each [1, ...]; None where the pipeline has none.
    """

    def __init__(self, net: nn.Module, path: Path, kind: Kind, nodes: dict[str, Any], found: Found, config: Config):
        super().__init__()
        self.net, self.path, self.found, self.config = net, path, found, config
        self.kind: Kind = kind
        self.templates: dict[tuple[int, ...], dict[str, Any]] = {(config.channels, *config.size): nodes}
        self.called = dict(nodes)  # the template of the pipeline's own call, whatever prompts are encoded for later
        self.captured = weights_dtype(net)
        self.uncond: dict[str, Tensor] | None = None
        self.probed: dict[str, Tensor] | None = None  # the same as the pipeline's own call had it, not yet padded

    @property
    def shape(self) -> tuple[int, ...]:
        """One sample, without the batch."""
        return (self.config.channels, *self.config.size)

    @property
    def blocks(self) -> list[nn.Module]:
        """The network's repeated blocks that process the sample, in the order of its modules."""
        return [self.net.get_submodule(name) for name in self.found.blocks]

    @property
    def second_time(self) -> bool:
        """Whether the network takes a second time r."""
        return any(isinstance(v, Time) and v.next for v in self.templates[self.shape].values())

    @property
    def with_second_time(self) -> Callable[[], PipelineDenoiser]:
        """A copy of this network, where it has a second time of its own; else there is no such attribute."""
        if not self.second_time:
            raise AttributeError("with_second_time")
        return lambda: copy.deepcopy(self)

    @property
    def checkpointing(self) -> bool:
        """Whether activations are computed again in the backward pass; set it to turn that on."""
        return bool(getattr(self.net, "is_gradient_checkpointing", False))

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        """Turn it on or off. Raises UnsupportedModel where diffusers has none for the network."""
        if on and not getattr(self.net, "_supports_gradient_checkpointing", False):
            raise UnsupportedModel(f"{type(self.net).__name__} has no gradient checkpointing; leave it off.")
        if hasattr(self.net, "enable_gradient_checkpointing"):
            switch: Any = self.net.enable_gradient_checkpointing if on else self.net.disable_gradient_checkpointing
            switch()

    def train(self, mode: bool = True) -> PipelineDenoiser:
        """Train mode for the adapter alone: its network's own dropout (of labels, say) stays off."""
        self.training = mode
        self.net.eval()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> PipelineDenoiser:
        super()._apply(fn, recurse)
        device = next(self.net.parameters()).device
        self.templates = {shape: moved(nodes, device) for shape, nodes in self.templates.items()}
        self.called = moved(self.called, device)
        return self

    def null(self, cond: Cond) -> dict[str, Tensor]:
        """The unconditional condition for cond's samples.

        Raises:
            ConfigError: If the pipeline's call had none.
        """
        if self.uncond is None:
            raise ConfigError(
                "This pipeline was called without classifier-free guidance, so it has no unconditional condition; "
                "give the call a negative_prompt and a guidance scale above 1, or cfg_scale 1."
            )
        found = {k: v.to(cond[k].device) for k, v in self.uncond.items() if k in cond}
        joined = self.templates[self.shape][self.found.latent].name  # every sample keeps its own picture
        return {k: cond[k] if k == joined else v.expand(len(cond[k]), *v.shape[1:]) for k, v in found.items()}

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, *, r: Tensor | None = None, taps: Sequence[int] = ()) -> Any:
        """Prediction of x_t's shape [B, ...]; with taps, also the tokens [B, L, width] after those blocks.

        Args:
            t: [B]; of a video [B, F], a time a frame, where the network takes its time by tokens. ``r`` likewise.
        """
        nodes = self.templates.get(tuple(x_t.shape[1:]))
        if nodes is None:
            known = ", ".join(map(str, self.templates))
            raise ConfigError(
                f"This denoiser was shown samples of {known}, not {tuple(x_t.shape[1:])}; show it a call."
            )
        if r is not None and not self.second_time:
            raise ConfigError("This network has no second time r; choose a method with one time.")
        for times in (v for v in (t, r) if v is not None and v.ndim > 1):
            check_frames(nodes, x_t, times, type(self.net).__name__)
        found, dtype = self.found, weights_dtype(self.net)
        start, end = (found.dial(v.double()) for v in (t, t if r is None else r))
        arguments = {
            k: fill(node, x_t, end if isinstance(node, Time) and node.next else start, cond)
            for k, node in nodes.items()
        }
        arguments = walk(arguments, lambda v: v.to(dtype) if isinstance(v, Tensor) and v.dtype == self.captured else v)
        names = list(found.blocks)
        with Taps(self.net, {names[i]: found.blocks[names[i]] for i in taps}) as features:
            output = self.net(**arguments)
        pred = found.sign * as_sample(output, x_t)
        return (pred, features.tokens(self.config.width)) if taps else pred


def weights_dtype(net: nn.Module) -> torch.dtype:
    """Of the first layer's weight; a view's adapters are float32, whatever its weights are."""
    layers = (m for m in net.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)))
    return next(vars(m).get("dtype") or m.weight.dtype for m in layers)  # a rounded one computes its weight


# --- the probe ------------------------------------------------------------------------------------------------


@refusing
def denoiser(pipe: Any, call: Call | None = None, **more: Any) -> PipelineDenoiser:
    """The denoiser of a ``DiffusionPipeline``, its path and kind learnt from three steps of the pipeline's own run.

    Args:
        pipe: Any diffusers pipeline, of a family that may never have been seen; it is left as it is.
        call: How it is called: prompt, height, width, num_frames, guidance_scale, negative_prompt, image ... (also
            as keyword arguments). What is left out is the pipeline's own default. Of several images of a prompt
            (``num_images_per_prompt``) one is watched: a denoiser takes a batch of any size.

    Raises:
        ConfigError: If the pipeline refuses the call, with its reason.
        UnsupportedModel: If the pipeline cannot be learnt, or a replayed run differs by more than rounding, with what
            was found.
    """
    subject, call = asked(pipe, one_each({**(call or {}), **more}))
    odd = find(pipe)
    quiet = without_guidance(pipe, call, 1)
    run = record(pipe, {**call, **quiet}, 8 if half_precision(pipe) else 3)  # rounding hides a map from a few points
    looks = [step.looks[-1] for step in run.steps]
    name, latent, x = find_latent(looks[0], run.steps[0].sample)
    own = (odd.path, odd.kind, 1.0, 0.0) if odd and odd.path else None
    path, kind, steps, offset = own or path_of(pipe.scheduler, run.mu)
    if not own and run.steps[0].t < run.steps[-1].t:  # the scheduler's times rise to the data
        steps, offset = -steps, offset + steps
    found = Found(call, quiet, subject, name, (), 1.0, steps, offset, odd=odd and replace(odd, network=None))
    if not own and path.name == "rectified_flow":
        found = replace(found, shift=shift_of(pipe.scheduler, path, found, run))
    dials = [float(found.dial(found.clock(step.t.double()))) for step in run.steps]
    times = find_times(looks, dials, name)
    if not times:
        raise UnsupportedModel(f"No argument of {type(looks[0].module).__name__} follows the scheduler's time.")
    nodes = {**template(pipe, {**call, **quiet}, subject, {name, *times}), name: latent, **times}
    module = odd.network if odd and odd.network else looks[0].module
    net = PipelineDenoiser(module, path, kind, nodes, found, Config(x.shape[1], tuple(x.shape[2:]), 0))
    errors = [error_of(net, run, 1.0), error_of(net, run, -1.0)]
    net.found = replace(found, times=tuple(times), sign=1.0 if errors[0] <= errors[1] else -1.0)
    cond = {k: torch.cat([v, v]) for k, v in conditions(nodes, looks[0]).items()}
    x, t = torch.cat([x, x]), path.at(torch.tensor([0.99, 0.01], device=x.device))  # both experts, where there are two
    net.found = replace(net.found, blocks=blocks_of(module, [lambda: net(x, t, cond), lambda: net(-x, t, cond)]))
    with torch.no_grad():
        tapped = net(x, t, cond, taps=range(len(net.found.blocks)))[1] if net.found.blocks else []
    net.config = replace(net.config, width=max((v.shape[-1] for v in tapped), default=0))
    net.probed, scale = guidance(pipe, net) if quiet else (None, 1.0)
    net.uncond = net.probed
    error = replay(pipe, net)
    net.found = replace(net.found, cfg_scale=scale, error=error)
    return net.eval()


def half_precision(pipe: Any) -> bool:
    """Whether its denoisers compute in less than float32."""
    return any(weights_dtype(net) in (torch.float16, torch.bfloat16) for net in networks(pipe))


def asked(pipe: Any, call: Call) -> tuple[str, dict[str, Any]]:
    """The argument that says what to make, and the call with a list of one of it."""
    known = inspect.signature(pipe.__call__).parameters
    wrong = [k for k in call if k not in known]
    if wrong:
        raise unknown(f"argument of {type(pipe).__name__}'s call", wrong[0], known)
    subject = next((k for k in ("prompt", "class_labels") if k in known), None)
    if subject is None:
        raise UnsupportedModel(f"{type(pipe).__name__} takes no prompt and no class_labels; use hasten.wrap instead.")
    value = call.get(subject) or ("a photo of a red bicycle" if subject == "prompt" else 1)
    value = list(value)[:1] if isinstance(value, (list, tuple)) else [value]
    return subject, of(call, subject, value)


def of(call: Call, subject: str, values: Sequence[Any]) -> dict[str, Any]:
    """``call`` for several subjects; its other texts are repeated for each, as pipelines want lists beside lists."""
    texts = {k: v for k, v in call.items() if re.fullmatch(r"(negative_)?prompt(_\d+)?", k) and v is not None}
    many = {k: [v[0] if isinstance(v, list) else v] * len(values) for k, v in texts.items()}
    return {**call, **many, subject: list(values)}


def template(pipe: Any, call: Call, subject: str, skip: set[str]) -> dict[str, Any]:
    """The arguments of the denoiser's call but for ``skip``, from calls with a prompt, it twice, another one and it.

    The other prompt is shorter and in quotation marks, as some encoders see only what is to be written; in that call
    pictures are inverted.
    """
    value = call[subject][0]
    other = f'"{value[: len(value) // 2]}"' if isinstance(value, str) else int(value == 0)
    calls = [of(call, subject, v) for v in ([value], [value, value], [other, value])]
    calls[2] |= {k: v.point(lambda p: 255 - p) for k, v in call.items() if hasattr(v, "getbands")}
    one, two, three = (record(pipe, c, 2, stop=0).looks[-1].arguments for c in calls)
    return {k: learn(k, v, two[k], three[k]) for k, v in one.items() if k not in skip}
