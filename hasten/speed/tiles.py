"""Pictures decoded in tiles and one by one, through the pipeline's own VAE."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hasten.core.errors import ConfigError, UnsupportedModel
from hasten.speed.host import Host
from hasten.speed.transform import Applied, Transform, override, switch

PLAIN = (bool, int, float, str, tuple, type(None))


@dataclass(frozen=True)
class TileVAE:
    """A pipeline's VAE decodes in overlapping tiles, and a batch one by one: the peak of memory after the last step.

    Args:
        tile: Pixels of a tile's side; True for the VAE's own, False for none.
        slice: One picture of a batch at a time.
    """

    tile: int | bool = True
    slice: bool = True
    name: ClassVar[str] = "tilevae"
    order: ClassVar[int] = 50

    def __post_init__(self) -> None:
        if not isinstance(self.tile, int) or (not isinstance(self.tile, bool) and self.tile < 8):
            raise ConfigError(f"TileVAE: tile must be True, False, or pixels such as 512, not {self.tile!r}.")
        switch("TileVAE", "slice", self.slice)
        if not self.tile and not self.slice:
            raise ConfigError("TileVAE: neither tiles nor slices is nothing to do; leave TileVAE out.")

    def check(self, at: Host, stack: Sequence[Transform]) -> None:
        vae = getattr(at.pipe, "vae", None)
        if vae is None:
            raise ConfigError(f"TileVAE: {type(at.pipe or at.net).__name__} has no VAE; leave TileVAE out.")
        for wanted, flag, method in (
            (self.tile, "use_tiling", "tiled_decode"),
            (self.slice, "use_slicing", "_decode"),
        ):
            if wanted and not (hasattr(vae, flag) and hasattr(vae, method)):
                what = "tiles" if flag == "use_tiling" else "slices"
                raise UnsupportedModel(f"TileVAE: {type(vae).__name__} does not decode in {what}; leave them out.")
        if self._side % (4 * self._ratio(vae)):  # else tiles that overlap by a quarter do not end on a latent pixel
            raise ConfigError(
                f"TileVAE: the side of a tile must be a multiple of {4 * self._ratio(vae)} pixels for "
                f"{type(vae).__name__}, not {self._side}."
            )

    @property
    def _side(self) -> int:
        return 0 if isinstance(self.tile, bool) else self.tile

    def _ratio(self, vae: Any) -> int:
        """Pixels of a latent pixel's side."""
        if getattr(vae, "tile_latent_min_size", None):
            return round(vae.tile_sample_min_size / vae.tile_latent_min_size)
        found = getattr(vae, "spatial_compression_ratio", None)
        return int(found or 2 ** (len(vae.config.block_out_channels) - 1))

    def apply(self, at: Host) -> Applied:
        """Switch them on, and count the tiled decodes and the slices."""
        vae, count = at.pipe.vae, {"decodes": 0, "tiled": 0, "slices": 0}
        plain = {k: v for k, v in vars(vae).items() if isinstance(v, PLAIN)}
        if self.tile:
            self._tiled(vae)
        if self.slice:
            vae.enable_slicing()
        undos, inside = [], {"parts": 0}

        def counted(name: str, key: str) -> None:
            inner = getattr(vae, name)

            def method(*args: Any, **kwargs: Any) -> Any:
                (inside if key == "parts" else count)[key] += 1
                return inner(*args, **kwargs)

            undos.append(override(vae, method, name))

        if self.tile:
            counted("tiled_decode", "tiled")
        if self.slice:
            counted("_decode", "parts")
        decode = vae.decode

        def whole(*args: Any, **kwargs: Any) -> Any:
            count["decodes"] += 1
            inside["parts"] = 0
            found = decode(*args, **kwargs)
            count["slices"] += inside["parts"] if inside["parts"] > 1 else 0
            return found

        undos.append(override(vae, whole, "decode"))

        def undo() -> None:
            for back in reversed(undos):
                back()
            for key in [k for k, v in vars(vae).items() if isinstance(v, PLAIN) and k not in plain]:
                delattr(vae, key)
            for key, value in plain.items():
                setattr(vae, key, value)

        def inert() -> str | None:
            if count["tiled"] or count["slices"]:
                return None
            if not count["decodes"]:
                return "TileVAE: nothing was decoded; ask the pipeline for pictures, or leave TileVAE out."
            return (
                f"TileVAE: none of {count['decodes']} decodes was larger than a tile or of more than one picture; "
                "take a smaller tile, or leave TileVAE out."
            )

        return Applied(undo, lambda: {k: float(v) for k, v in count.items()}, inert)

    def _tiled(self, vae: Any) -> None:
        """Switch tiles on; a tile of n pixels overlaps the next by a quarter, as diffusers' own do."""
        side = self._side
        known = inspect.signature(vae.enable_tiling).parameters
        sizes = {k: side for k in known if k in {f"tile_sample_min_{d}" for d in ("height", "width", "size")}}
        steps = {k: side * 3 // 4 for k in known if k in {f"tile_sample_stride_{d}" for d in ("height", "width")}}
        steps |= {k: 0.25 for k in known if k.startswith("tile_overlap_factor")}
        if not side:
            vae.enable_tiling()
            return
        if sizes:
            vae.enable_tiling(**sizes, **steps)
            return
        if not hasattr(vae, "tile_sample_min_size"):
            raise UnsupportedModel(f"TileVAE: {type(vae).__name__} takes no size of a tile; use tile=True.")
        ratio = self._ratio(vae)
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = side, side // ratio
