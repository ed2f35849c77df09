"""DeepCache (Ma et al. 2024): a UNet's outer blocks are computed, its inner ones keep what they returned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hasten.core.errors import UnsupportedModel
from hasten.models.probe import tensors
from hasten.speed.caching.blocks import Blocks, Held, filled, flat, structure
from hasten.speed.caching.state import Call
from hasten.speed.transform import override


class Deep(Blocks):
    """Computes the ``first`` blocks down and as many up; between them nothing runs.

    The outer blocks down feed those up through skip connections, so that fresh detail reaches the output.
    """

    def __init__(self, engine: Any):
        super().__init__(engine)
        self.until = len(self.at.blocks) - self.config.first

    def install(self) -> list[Callable[[], None]]:
        """Wrap the blocks and, beside them, the network's other parts, among which is the one in the middle."""
        inside = {id(m) for b in self.at.blocks for m in b.modules()}
        others = {
            name: m
            for name, m in self.at.net.named_children()
            if not any(id(part) in inside for part in m.modules()) and any(True for _ in m.parameters())
        }
        return [*super().install(), *(override(m, self.wrapper(name, m)) for name, m in others.items())]

    def around(self, call: Call, k: Any, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run an outer block; return what an inner one, or the one in the middle, returned last."""
        block = isinstance(k, int)
        if block:
            self.in_order(call, k)
        at = call.scratch.get("next", 0)  # how many blocks have begun
        deep = self.config.first < at <= self.until if block else self.config.first < at < self.until
        if call.skip and deep:
            like, held = call.mine.blocks[k]
            return filled(like, [v.read(f"what {k if not block else self.name(k)} returns") for v in held])
        if block and not call.skip:
            self.connected(call, k, args, kwargs)
        out = inner(*args, **kwargs)
        if deep:
            call.scratch[k] = structure(out), [Held(v) for v in flat(out)]
        elif block and k < self.config.first:
            call.scratch.setdefault("outer", []).extend(flat(out))
        return out

    def connected(self, call: Call, k: int, args: Any, kwargs: Any) -> None:
        """Note whether an outer block up takes what an outer one down returned."""
        if k >= self.until:
            fresh = call.scratch.get("outer", [])
            if any(a is b for a in tensors([args, kwargs]) for b in fresh):
                call.scratch["connected"] = True

    def end(self, call: Call) -> None:
        """Keep what the inner blocks returned; refuse a network that is no UNet."""
        if not call.skip:
            if call.scratch.get("next", 0) < len(self.at.blocks) or not call.scratch.get("connected"):
                raise UnsupportedModel(
                    f"Cache: deepcache needs a UNet, whose last blocks take what the first {self.config.first} "
                    f"returned; those of {type(self.at.net).__name__} do not: use firstblock or dual."
                )
            call.mine.blocks = {k: v for k, v in call.scratch.items() if isinstance(v, tuple)}
        call.scratch.clear()
