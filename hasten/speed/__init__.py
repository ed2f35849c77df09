"""Speed-ups without training: casting, quantization, attention, caching, compilation, ``speed_up`` to stack them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

from hasten.core.errors import ConfigError, unknown
from hasten.speed.attention import Attention
from hasten.speed.cache import Cache
from hasten.speed.cast import Cast
from hasten.speed.compile import Compile
from hasten.speed.guidance import Guidance
from hasten.speed.memory import LayerCast, Offload
from hasten.speed.quantize import Quantize
from hasten.speed.tiles import TileVAE
from hasten.speed.times import Times
from hasten.speed.transform import Applied, SpeedUp, Transform, speed_up

TRANSFORMS: dict[str, type] = {
    cls.name: cls for cls in (Times, Quantize, Cast, LayerCast, Offload, Attention, Cache, Guidance, Compile, TileVAE)
}


def as_dict(transform: Any) -> dict[str, Any]:
    """Plain values, with ``name`` first, that :func:`from_dict` reads back to an equal transform."""
    return {"name": transform.name, **asdict(transform)}


def from_dict(values: Mapping[str, Any]) -> Any:
    """The transform of plain values. Raises ConfigError for unknown names, unknown keys and bad values."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"A transform is a mapping such as {{name: quantize}}, not {values!r}.")
    values = dict(values)
    name = values.pop("name", None)
    if name is None:
        raise ConfigError(f"A transform needs a name; one of {', '.join(TRANSFORMS)}.")
    if not isinstance(name, str) or name not in TRANSFORMS:
        raise unknown("transform", str(name), TRANSFORMS)
    known = [f.name for f in fields(TRANSFORMS[name])]
    for f in fields(TRANSFORMS[name]):
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"A transform {name!r} needs {f.name}.")
    for key in values:
        if key not in known:
            raise unknown(f"key of {name}", str(key), known)
    return TRANSFORMS[name](**values)


__all__ = [
    "TRANSFORMS", "Applied", "Attention", "Cache", "Cast", "Compile", "Guidance", "LayerCast", "Offload", "Quantize",
    "SpeedUp", "TileVAE", "Times", "Transform", "as_dict", "from_dict", "speed_up",
]  # fmt: skip
