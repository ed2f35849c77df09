"""A plan: a stack of transforms that was chosen for one model, signed, in a file that another model refuses."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import torch

from hasten.core.errors import CheckpointError, ConfigError
from hasten.core.request import Request
from hasten.measure.report import write
from hasten.speed.foreign import inner
from hasten.speed.host import Host, Look

FORMAT = "hasten-plan-1"
SAMPLED = 16  # values of every parameter that are part of the signature


def fingerprint(
    at: Host,
    steps: int | None = None,
    shape: tuple[int, ...] | None = None,
    guidance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a plan depends on: the network and its weights, the scheduler, the step count, a sample's shape, guidance.

    Weights are seen through their first values in bfloat16, so that a copy in another dtype is the same model and
    a fine-tuned or distilled one is not.

    Args:
        steps: Of the requests that the plan is for; None: any.
        shape: Of one sample as the network takes it; None: any.
        guidance: Of the requests, as :func:`guidance_of` says it; None: any.
    """
    digest = hashlib.sha256()
    for name, p in sorted(at.net.named_parameters()):
        digest.update(f"{name} {tuple(p.shape)}".encode())
        for part in inner(p):
            head = part.detach().reshape(-1)[:SAMPLED].to("cpu", torch.bfloat16).view(torch.int16)
            digest.update(head.numpy().tobytes())
    found: dict[str, Any] = {"model": type(at.net).__name__, "weights": digest.hexdigest()[:16]}
    if at.pipe is not None:
        config = {k: v for k, v in sorted(at.pipe.scheduler.config.items()) if not k.startswith("_")}
        config.pop("trained_betas", None)
        digest = hashlib.sha256(repr(config).encode())
        found["scheduler"] = f"{type(at.pipe.scheduler).__name__} {digest.hexdigest()[:8]}"
    asked = None if guidance is None else dict(guidance)
    return found | {"steps": steps, "shape": None if shape is None else list(shape), "guidance": asked}


def guidance_of(at: Host, call: Mapping[str, Any]) -> dict[str, Any]:
    """How a pipeline's call guides: the numbers among its arguments, given or default, that say so.

    With ``true_cfg_scale`` diffusers computes a second branch only for a negative prompt: whether there is one counts.
    """
    known = inspect.signature(type(at.pipe).__call__).parameters
    found = {
        name: call.get(name, p.default) for name, p in known.items() if "guidance" in name or "cfg" in name.split("_")
    }
    for name in at.adapter.found.quiet:  # a guider of its own has its scale on it, not among the arguments
        part, _, attribute = name.partition(".")
        found |= {name: getattr(getattr(at.pipe, part), attribute)} if attribute else {}
    said = {k: v for k, v in found.items() if isinstance(v, (bool, int, float))}
    if "true_cfg_scale" in known:
        said["negative prompt"] = any(k.startswith("negative") and v is not None for k, v in call.items())
    return said


@dataclass(frozen=True)
class Plan:
    """Transforms with the fingerprint of what they were chosen for; give it to ``speed_up`` in their place.

    Args:
        transforms: As ``speed_up`` takes them.
        fingerprint: Of :func:`fingerprint`; each entry that is not None must match.
        measured: What the choice rested on: losses, times, the front, the machine.
    """

    transforms: tuple[Any, ...]
    fingerprint: dict[str, Any]
    measured: dict[str, Any] = field(default_factory=dict)

    def save(self, file: File | str) -> None:
        """Write YAML, whole or not at all. Raises ConfigError where the place cannot be written."""
        import yaml

        from hasten.speed import as_dict

        file = File(file)
        about = {"fingerprint": self.fingerprint, "stack": [as_dict(t) for t in self.transforms]}
        text = yaml.safe_dump(
            {"format": FORMAT, **about, "measured": self.measured}, sort_keys=False, default_flow_style=None, width=110
        )
        text += f"signature: '{signature(yaml.safe_load(text))}'\n"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write(file, text.encode())
        except OSError as error:
            raise ConfigError(f"The plan could not be written to {file}: {error.strerror}.") from error

    @classmethod
    def load(cls, file: File | str) -> Plan:
        """The plan that :meth:`save` wrote.

        Raises:
            CheckpointError: For a missing, foreign or changed file.
            ConfigError: For a transform that this version does not know.
        """
        raw = read(file)
        if raw.get("format") != FORMAT or not isinstance(raw.get("fingerprint"), dict):
            raise CheckpointError(f"{file} is no plan; make one with `hasten tune`, or give a stack with --stack.")
        for key, kind in (("steps", int), ("shape", list), ("guidance", dict)):
            value = raw["fingerprint"].get(key)
            if value is not None and (type(value) is not kind or value == 0):
                raise CheckpointError(f"{file} was changed: its {key} cannot be {value!r}; make it again.")
        if raw.pop("signature", None) != signature(raw):
            raise CheckpointError(
                f"{file} was changed since it was written, so that what it measured is not of this stack; tune again, "
                "or give the layers alone as a stack."
            )
        return cls(stack_of(raw, file), raw["fingerprint"], raw.get("measured") or {})

    def check(self, at: Host) -> None:
        """Raise ConfigError where the model or its scheduler is not the plan's."""
        mine = fingerprint(at)
        for key in ("model", "weights", "scheduler"):
            want, have = self.fingerprint.get(key), mine.get(key)
            if want is not None and want != have:
                raise ConfigError(
                    f"The plan was made for {key} {want}, and this one has {have}; tune again for this model."
                )

    def suits(self, found: int, mine: Mapping[str, Any]) -> None:
        """Raise ConfigError for requests of other steps, or guided in another way, than the plan's."""
        steps, guided = self.fingerprint.get("steps"), self.fingerprint.get("guidance")
        if steps is not None and found != steps:
            raise ConfigError(f"The plan was made for {steps} steps, not {found}; ask for {steps}, or tune again.")
        if guided is None:
            return
        for key in {**guided, **mine}:
            if (want := guided.get(key)) != (have := mine.get(key)):
                raise ConfigError(f"The plan was made for {key} {want}, not {have}; ask for {want}, or tune again.")

    def fits(self, at: Host, look: Look, request: Request) -> None:
        """Raise ConfigError for a request of other steps, another shape or other guidance than the plan's."""
        shape = self.fingerprint.get("shape")
        if shape is not None and list(look.x_t.shape[1:]) != list(shape):
            raise ConfigError(
                f"The plan was made for samples of {tuple(shape)}, not {tuple(look.x_t.shape[1:])}; tune again."
            )
        if at.pipe is None:
            mine = request.guidance or {"cfg_scale": request.scale}
        elif "call" in request.state:
            mine = guidance_of(at, request.state["call"])
        else:  # the pipeline's network called by hand, in a request of its own: nothing says how it is guided
            mine = self.fingerprint.get("guidance") or {}
        self.suits(at.asked(request), mine)


def signature(raw: Mapping[str, Any]) -> str:
    """Of the values of a plan's file: what was verified is to be what runs."""
    return hashlib.blake2b(json.dumps(raw, sort_keys=True).encode(), digest_size=8).hexdigest()


def read(file: File | str) -> dict[str, Any]:
    """A YAML file that holds a mapping, or a list, which becomes {"stack": list}.

    Raises:
        CheckpointError: If it is missing, no YAML, or neither.
    """
    import yaml

    file = File(file)
    if not file.is_file():
        raise CheckpointError(f"There is no file {file}.")
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # no UTF-8 or 5,000 digits, 3,000 brackets
        raise CheckpointError(f"{file} is no valid YAML.") from error
    raw = {"stack": raw} if isinstance(raw, list) else raw
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} holds no stack: a list of transforms such as '- {{name: quantize}}'.")
    return raw


def stack_of(raw: dict[str, Any], file: File | str) -> tuple[Any, ...]:
    """The transforms under ``stack``. Raises ConfigError for what is none, unknown or misspelt."""
    from hasten.speed import from_dict

    stack = raw.get("stack")
    if not isinstance(stack, list) or not stack:
        raise ConfigError(f"{file} has no transforms under 'stack': write a list such as '- {{name: quantize}}'.")
    for item in stack:
        if not isinstance(item, dict):
            raise ConfigError(f"{file}: a transform is a mapping such as {{name: quantize}}, not {item!r}.")
    return tuple(from_dict(item) for item in stack)


def load_stack(file: File | str) -> tuple[Any, ...]:
    """The transforms of a stack file or a plan, without the plan's conditions."""
    return stack_of(read(file), file)
