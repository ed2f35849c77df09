"""What a model is asked to do while it is measured: the same prompts, noise and steps, again and again."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hasten.core.errors import ConfigError, HastenError, unknown
from hasten.core.method import Sampling
from hasten.measure.judge import Judge
from hasten.models.diffusers import asked, of
from hasten.progress import draw
from hasten.speed.host import Host, host
from hasten.speed.plan import guidance_of


def picture(pipe: Any, call: Mapping[str, Any], steps: int | None, seed: int, i: int) -> Tensor:
    """Sample ``i`` of a pipeline, [F, 3, H, W] in [-1, 1] with one frame where it is an image.

    Raises:
        ConfigError: For arguments that the pipeline's call has not, or that it refuses.
    """
    known = inspect.signature(pipe.__call__).parameters
    if wrong := [k for k in call if k not in known]:
        raise unknown(f"argument of {type(pipe).__name__}'s call", wrong[0], known)
    ours(call)
    key = int.from_bytes(hashlib.blake2b(repr(("sample", seed, i)).encode(), digest_size=8).digest(), "little") >> 1
    fixed = {"generator": torch.Generator().manual_seed(key), "output_type": "pt"}
    fixed |= {} if steps is None else {"num_inference_steps": steps}
    pipe.set_progress_bar_config(disable=True)
    try:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(key)  # schedulers that renoise are often not handed the generator
            found = pipe(**{**fixed, **call})[0]
    except HastenError:  # a layer's own refusal, which is a ValueError too
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{type(pipe).__name__} refuses this call: {(str(error).splitlines() or ['?'])[0]}"
        ) from error
    x = found if isinstance(found, Tensor) else torch.stack(list(found))
    return (x if x.ndim == 4 else x[0]).float().cpu().clamp(0, 1) * 2 - 1


def ours(call: Mapping[str, Any]) -> None:
    """Raise ConfigError for an argument that is set here."""
    for name, wanted in (("output_type", "pt"), ("generator", None)):
        if call.get(name, wanted) != wanted:
            raise ConfigError(
                f"{name} is set by hasten, for pictures as numbers that repeat; leave it out of the call."
            )


@dataclass(frozen=True, eq=False)
class Workload:
    """Requests to a model that are the same every time.

    Args:
        model: A diffusers pipeline, or a native denoiser.
        steps: Sampling steps of a request.
        call: Arguments of a pipeline's call, guidance scale and size among them.
        subjects: A pipeline's prompts (or classes), used in turn; empty: the probe's own.
        sampling: How a native denoiser is sampled.
        batch: Samples of a timed request of a native denoiser.
        judge: Judges samples against real images; None: only trajectories are compared.
    """

    model: Any
    steps: int
    call: Mapping[str, Any] = field(default_factory=dict)
    subjects: Sequence[Any] = ()
    sampling: Sampling | None = None
    batch: int = 1
    judge: Judge | None = None

    def __post_init__(self) -> None:
        ours(self.call)
        native = not hasattr(self.model, "components")
        if native and self.sampling is None:
            raise ConfigError("A native model needs sampling=Sampling(...): how it is sampled.")
        if not native and self.sampling is not None:
            raise ConfigError(f"sampling is for native models; call says how {type(self.model).__name__} is called.")
        if (steps := self.call.get("num_inference_steps", self.steps)) != self.steps:
            raise ConfigError(
                f"The call says num_inference_steps={steps!r}, beside {self.steps} steps; leave it out of the call and "
                "give the steps alone (--steps)."
            )
        for name in ("call", "subjects"):
            if native and getattr(self, name):
                raise ConfigError(
                    f"{'prompts' if name == 'subjects' else name} would do nothing: {type(self.model).__name__} is no "
                    "pipeline; leave it out, and say with sampling how it is sampled."
                )

    @property
    def shown(self) -> dict[str, Any] | None:
        """The call of a pipeline with its steps and the first of its subjects, as ``speed_up`` takes it; else None."""
        if self.sampling is not None:
            return None
        first = {self.subject: self.subjects[0]} if self.subjects else {}
        return {"num_inference_steps": self.steps, **self.call, **first}

    @property
    def subject(self) -> str:
        """The argument that says what a pipeline is to make."""
        return asked(self.model, dict(self.call))[0]

    @property
    def host(self) -> Host:
        """The model as speed-ups see it."""
        return host(self.model, self.shown)

    @property
    def guidance(self) -> dict[str, Any]:
        """How the requests are guided, as a plan's fingerprint has it."""
        return {"cfg_scale": self.sampling.cfg_scale} if self.sampling else guidance_of(self.host, self.call)

    def samples(self, count: int, seed: int = 0, start: int = 0) -> tuple[Tensor, Tensor | None]:
        """(images [N, C, H, W] in [-1, 1], their classes [N] or None); a video counts as its frames.

        Args:
            start: The first subject: others than those of a calibration are held out.
        """
        if self.sampling is not None:
            net = self.model
            labels = torch.arange(start, start + count) % net.config.classes if net.config.classes else None
            images, made = draw(net, self.sampling, count, labels=labels, seed=seed)
            return images.clamp(-1, 1), made
        subject, call = asked(self.model, dict(self.call))
        about = list(self.subjects) or call[subject]
        parts = []
        for i in range(start, start + count):
            given = of(dict(self.call), subject, [about[i % len(about)]])
            parts.append(picture(self.model, given, self.steps, seed, i))
        return torch.cat(parts), None

    def request(self) -> None:
        """One request, for the clock."""
        self.samples(self.batch, seed=0)


def own_steps(pipe: Any) -> int:
    """The steps that a pipeline takes where nobody says; 50 where it does not say either."""
    default = inspect.signature(pipe.__call__).parameters.get("num_inference_steps") if callable(pipe) else None
    return default.default if default and isinstance(default.default, int) else 50
