"""The families that a probe cannot learn, by the class name of a pipeline or of one of its components.

This is the only file of the adapter in which a family has a name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.errors import UnsupportedModel
from hasten.core.path import EDM, RECTIFIED_FLOW, Coeffs, Kind, Path, expand
from hasten.models.probe import walk

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Reading:
    """What holds for a family in place of what its probe would find; None where the probe is right.

    Args:
        network: The module that stands for the pipeline's own.
        path: Of the samples as they enter the network, preconditioned; ``kind`` what it predicts, up to a sign.
        clock: The path's time of the scheduler's.
        dial: What the network's time arguments follow affinely, at the path's time.
        given: What the pipeline hands its scheduler for a prediction of ``kind`` at (x_t [B, ...], t [B]).
    """

    network: nn.Module | None = None
    path: Path | None = None
    kind: Kind = "velocity"
    clock: Map | None = None
    dial: Map = lambda t: t
    given: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda pred, x, t: pred


def find(pipe: Any) -> Reading | None:
    """The entry for a pipeline: that of its own class, else that of a component's; None for almost all.

    Raises:
        UnsupportedModel: Where the entry says that the family cannot be used, and why.
    """
    for part in (pipe, *pipe.components.values()):
        if type(part).__name__ in TABLE:
            return TABLE[type(part).__name__](pipe)
    return None


# --- preconditioned networks ----------------------------------------------------------------------------------


def cosmos(pipe: Any) -> Reading:
    """Cosmos Predict 2 (Ali et al. 2025): x_0 + s eps times 1/(1 + s) is a rectified flow at t = s/(1 + s).

    The network sees that and t, and predicts its velocity; the pipeline makes x_0 of it, guides, and hands its
    scheduler (x_s - x_0)/s, the noise, at the scheduler's time 1000 s. The noisiest s is 80.
    """
    flow, count = RECTIFIED_FLOW, pipe.scheduler.config.num_train_timesteps
    levels = lambda u: EDM.at(u) / (1 + EDM.at(u))  # noqa: E731  # the scheduler's own spacing
    return Reading(
        path=replace(flow, t_max=EDM.t_max / (1 + EDM.t_max), from_unit=levels),
        clock=lambda t: t / (count + t),
        given=lambda pred, x, t: flow.convert(pred, x, t, "velocity", "eps"),
    )


def sprint(pipe: Any) -> Reading:
    """Sana-Sprint (Chen et al. 2025, section 3.2): a rectified flow inside, TrigFlow's angles outside.

    cos x_0 + sin eps over (cos + sin) is the rectified flow at t = sin/(cos + sin). The scheduler is handed
    TrigFlow's velocity cos eps - sin x_0, times the data's standard deviation.
    """
    flow, std = RECTIFIED_FLOW, pipe.scheduler.config.sigma_data

    def given(pred: Tensor, x: Tensor, t: Tensor) -> Tensor:
        v = flow.convert(pred, x, t, "velocity", "v")
        return v * expand(std / torch.hypot(1 - t, t), v)

    return Reading(path=flow, clock=lambda t: torch.sin(t) / (torch.sin(t) + torch.cos(t)), given=given)


def edm(pipe: Any) -> Reading:
    """Schedulers with EDM's preconditioning (Karras et al. 2022, table 1), as Playground 2.5's, whatever the network.

    The network sees (x_0 + s eps)/sqrt(s^2 + d^2) = cos(t)/d x_0 + sin(t) eps with tan t = s/d, d the data's standard
    deviation. "epsilon" is the negative of that path's velocity, "v_prediction" the velocity. The time is ln(s)/4.
    """
    config = pipe.scheduler.config
    std, top, sign = config.sigma_data, config.sigma_max, -1.0 if config.prediction_type == "epsilon" else 1.0

    def coeffs(t: Tensor) -> Coeffs:
        c, s = torch.cos(t), torch.sin(t)
        return c / std, s, -s / std, c

    path = Path(
        "preconditioned",
        coeffs,
        from_angle=lambda angle: torch.atan2(torch.sin(angle), std * torch.cos(angle)),
        t_max=math.atan(top / std),
        from_unit=lambda u: torch.atan(EDM.at(u) / std).clamp_max(math.atan(top / std)),
    )
    return Reading(
        path=path,
        clock=lambda t: torch.atan(torch.exp(4 * t) / std),
        dial=lambda t: torch.log(std * torch.tan(t).clamp_min(1e-9)) / 4,
        given=lambda pred, x, t: sign * pred,
    )


# --- two experts ----------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Two networks as one: samples at times (``timestep``, [B] or [B, L] a token) from ``boundary`` on go to ``high``,
    the others to ``low``, so that every sample of a batch reaches its own.
    """

    def __init__(self, high: nn.Module, low: nn.Module, boundary: float):
        super().__init__()
        self.high, self.low, self.boundary = high, low, boundary
        self._supports_gradient_checkpointing = bool(getattr(high, "_supports_gradient_checkpointing", False))
        self.order: Tensor | None = None  # of the last call: where each sample is among the experts' rows

    def forward(self, timestep: Tensor, **arguments: Any) -> Any:
        """What the experts return; of a mixed batch (prediction [B, ...],)."""
        own, n = {"timestep": timestep, **arguments}, len(timestep)
        above = timestep.reshape(n, -1).amax(1) >= self.boundary
        self.order = None
        if bool(above.all()):
            return self.high(**own)
        if not bool(above.any()):
            return self.low(**own)
        found = []
        for expert, rows in ((self.high, above), (self.low, ~above)):
            part = walk(own, lambda v, rows=rows: v[rows] if isinstance(v, Tensor) and v.ndim and len(v) == n else v)
            found.append(expert(**part)[0])
        self.order = torch.argsort(torch.argsort(~above, stable=True))
        return (self.gather(found),)

    def gather(self, parts: Sequence[Tensor]) -> Tensor:
        """The experts' rows of the last call, ``high``'s first, as one batch in the samples' order."""
        return parts[0] if self.order is None else torch.cat(list(parts))[self.order]

    def twins(self, name: str) -> list[nn.Module]:
        """The submodule of both experts that is ``name`` in one of them."""
        inner = name.split(".", 1)[1]
        return [self.high.get_submodule(inner), self.low.get_submodule(inner)]

    @property
    def is_gradient_checkpointing(self) -> bool:
        """As diffusers' models have it."""
        return bool(getattr(self.high, "is_gradient_checkpointing", False))

    def enable_gradient_checkpointing(self) -> None:
        """For both."""
        for expert in (self.high, self.low):
            expert.enable_gradient_checkpointing()  # type: ignore[operator]

    def disable_gradient_checkpointing(self) -> None:
        """For both."""
        for expert in (self.high, self.low):
            expert.disable_gradient_checkpointing()  # type: ignore[operator]


def experts(pipe: Any) -> Reading | None:
    """Wan 2.2 A14B: ``transformer`` for times from ``boundary_ratio`` on, ``transformer_2`` below it."""
    high, low, ratio = pipe.transformer, pipe.transformer_2, pipe.config.boundary_ratio
    if ratio is None:
        return None
    if high is None or low is None:
        raise UnsupportedModel(f"{type(pipe).__name__} has a boundary_ratio but one expert only; load both.")
    return Reading(network=Experts(high, low, ratio * pipe.scheduler.config.num_train_timesteps))


# --- refused, with the reason ---------------------------------------------------------------------------------


def sound(pipe: Any) -> Reading:
    """LTX-2: the audio latent has a scheduler of its own, copied inside the pipeline's call."""
    raise UnsupportedModel(
        f"{type(pipe).__name__} denoises a video and its sound together, and a hasten sample is one tensor; "
        "wrap its transformer with hasten.wrap on both latents, flattened and joined."
    )


def first_frame(pipe: Any) -> Reading:
    """LTX-Video from an image: the network sees frames that the scheduler does not."""
    raise UnsupportedModel(
        f"{type(pipe).__name__} hands its scheduler the frames behind the first one only, unpacked, while its network "
        "takes all of them as tokens; use the text-to-video pipeline of the same weights."
    )


TABLE: dict[str, Callable[[Any], Reading | None]] = {
    "Cosmos2TextToImagePipeline": cosmos,
    "SanaSprintPipeline": sprint,
    "EDMEulerScheduler": edm,
    "EDMDPMSolverMultistepScheduler": edm,
    "WanPipeline": experts,
    "WanImageToVideoPipeline": experts,
    "LTX2VideoTransformer3DModel": sound,
    "LTXImageToVideoPipeline": first_frame,
}
