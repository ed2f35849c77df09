"""Switches by which a pipeline leaves guidance alone whatever its call says, where diffusers has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hasten.core.errors import ConfigError
from hasten.models.candidates import placed
from hasten.models.diffusers import PipelineDenoiser
from hasten.models.probe import record, rows
from hasten.models.schedulers import components

WIDTH = 256  # of a guidance embedding, as latent consistency models have it


def unguided(pipe: Any, net: PipelineDenoiser, steps: int) -> dict[str, Any]:
    """Components and config entries with which the pipeline does not guide; empty where it has no such switch.

    Pipelines of UNets do not guide a network with a guidance embedding (``time_cond_proj_dim``), and one of zeros
    changes no number; others have ``is_distilled`` in their config. A switch is taken if it was seen to work.
    """
    tries: list[dict[str, Any]] = []
    for name, part in components(pipe, net.net).items():
        if getattr(part, "config", {}).get("time_cond_proj_dim", 0) is None:
            tries.append({name: embedded(part)})
    if pipe.config.get("is_distilled") is False:
        tries.append({"is_distilled": True})
    for changes in tries:
        with switched(pipe, changes):
            first = record(pipe, net.found.call, steps, stop=1).steps[0]
        if rows(first) == 1:
            return changes
    return {}


def embedded(part: nn.Module) -> nn.Module:
    """The same network with a guidance embedding of zeros."""
    cls: Any = type(part)
    own: Any = {k: v for k, v in part.config.items() if not k.startswith("_")}  # type: ignore[union-attr]
    twin = cls.from_config({**own, "time_cond_proj_dim": WIDTH})
    state, like = part.state_dict(), next(part.parameters())
    new = {k: torch.zeros_like(v) for k, v in twin.state_dict().items() if k not in state}
    twin.load_state_dict({**state, **new})
    return twin.to(like.device, like.dtype).requires_grad_(False).eval()


def stored(pipe: Any, call: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The call without what sets a component's attribute ("guider._enabled"), and the components that have it set.

    Raises:
        ConfigError: If a component's config does not hold the attribute.
    """
    changes = {}
    for key in (k for k in call if "." in k):
        name, attribute = key.split(".", 1)
        part, entry = getattr(pipe, name), attribute.lstrip("_")
        if entry not in getattr(part, "config", {}):
            raise ConfigError(f"The call sets {key}, which {type(part).__name__} does not save; call it without.")
        own = {k: v for k, v in part.config.items() if not k.startswith("_")}
        changes[name] = type(part).from_config({**own, entry: call[key]})
    return {k: v for k, v in call.items() if "." not in k}, changes


@contextmanager
def switched(pipe: Any, changes: Mapping[str, Any]) -> Iterator[None]:
    """The pipeline with other components and config entries, which are put back at the end."""
    parts = {k: v for k, v in changes.items() if k in pipe.components}
    flags = {k: v for k, v in changes.items() if k not in parts}
    before = {k: pipe.config[k] for k in flags}
    pipe.register_to_config(**flags)
    try:
        with placed(pipe, **parts):
            yield
    finally:
        pipe.register_to_config(**before)
