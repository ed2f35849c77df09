"""Token-wise caching: the blocks' linears are computed for the tokens that changed most, attention for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hasten.core.errors import UnsupportedModel
from hasten.speed.caching.blocks import Blocks, Held, flat, given, sources
from hasten.speed.caching.stack import is_linear
from hasten.speed.caching.state import Call
from hasten.speed.transform import override


class Tokens(Blocks):
    """In a partial call every linear of the blocks is given the chosen tokens; the others keep its last result.

    So a stale token still has keys and values that the fresh ones attend to (ToCa, Zou et al. 2025; RAS, Liu et
    al. 2025). Chosen are those of a block's input that moved most since each was last computed: a token that waits
    gathers change. Text beside the sample is always computed.
    """

    def __init__(self, engine: Any):
        super().__init__(engine)
        self.linears = [
            (k, name, m) for k, b in enumerate(self.at.blocks) for name, m in b.named_modules() if name and is_linear(m)
        ]

    def install(self) -> list[Callable[[], None]]:
        """Wrap the blocks and the linears inside them."""
        undos = super().install()
        for k, name, m in {id(m): (k, name, m) for k, name, m in self.linears}.values():
            undos.append(override(m, self.wrapper((k, name), m)))
        return undos

    def around(self, call: Call, k: Any, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Choose tokens where a call is partial, and run the block or its linear."""
        if isinstance(k, tuple):
            return self.linear(call, k, inner, args[0], *args[1:], **kwargs)
        self.in_order(call, k)
        ins = given(args, kwargs)
        call.scratch["block"], call.scratch["made"] = k, {}
        if call.skip:
            self.choose(call, k, ins[call.mine.blocks[k]])
        out = inner(*args, **kwargs)
        if not call.skip:
            self.record(call, k, ins, flat(out), call.scratch["made"])
        del call.scratch["block"]
        return out

    def record(self, call: Call, k: int, ins: list[Any], outs: list[Tensor], made: dict[Any, Any]) -> None:
        """Keep the sample's tokens that came in, and what the linears made of as many tokens."""
        match = sources(ins, outs, [])
        j = self.stream(k, outs)
        i = match[j]
        if i is None or ins[i].ndim != 3:
            raise UnsupportedModel(
                f"Cache: {self.name(k)} does not pass the sample's tokens [B, L, D] on, so regions cannot choose any; "
                "use another policy."
            )
        x, store = ins[i], call.mine.blocks
        if any(v.ndim == 3 and v.shape[1] == x.shape[1] for m, v in enumerate(outs) if m != j):
            raise UnsupportedModel(
                f"Cache: text and sample have {x.shape[1]} tokens each in {self.name(k)}, so regions cannot tell them "
                "apart; use another policy."
            )
        store[k] = i
        store[k, "tokens"] = x.detach().clone()
        fit = {key: v for key, v in made.items() if v and v.value.ndim == 3 and v.value.shape[:2] == x.shape[:2]}
        for key in [key for key in store if isinstance(key, tuple) and key[0] == k and key[1] != "tokens"]:
            del store[key]
        store.update(fit)
        call.scratch["fit"] = call.scratch.get("fit", 0) + len(fit)

    def choose(self, call: Call, k: int, x: Tensor) -> None:
        """The rows of the share of x [B, L, D]'s tokens that moved most since they were computed."""
        kept = call.mine.blocks[k, "tokens"]
        count = max(1, round(self.config.share * x.shape[1]))
        moved = (x - kept).abs().mean(-1)
        before, chosen = call.scratch.get("moved"), None
        if before is not None and before[0].shape == moved.shape:
            chosen = before[1]  # one choice for all blocks of these tokens
        if chosen is None:
            best = moved.topk(count, dim=1).indices.sort(dim=1).values
            chosen = (best + x.shape[1] * torch.arange(len(x), device=x.device)[:, None]).flatten()
            call.scratch["moved"] = moved, chosen
        flatten = kept.flatten(0, 1)
        call.mine.blocks[k, "tokens"] = flatten.index_copy(0, chosen, x.flatten(0, 1)[chosen]).view_as(x)
        call.scratch["chosen"] = chosen

    def linear(self, call: Call, key: Any, inner: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A linear of x [B, L, D], for the chosen tokens where it has a last result for all."""
        if call.scratch.get("block") != key[0]:  # a linear that several blocks share belongs to none
            return inner(x, *args, **kwargs)
        held, made = call.mine.blocks.get(key), call.scratch["made"]
        if not call.skip or held is None or x.shape[:-1] != held.value.shape[:-1]:
            out = inner(x, *args, **kwargs)
            made[key] = None if key in made else Held(out)  # one that runs twice has no last result
            return out
        chosen = call.scratch["chosen"]
        part = inner(x.reshape(-1, x.shape[-1])[chosen], *args, **kwargs)
        before = held.read(f"what {key[1]} of {self.name(key[0])} returns")
        out = before.flatten(0, 1).index_copy(0, chosen, part).view_as(before)
        call.mine.blocks[key] = Held(out)
        return out

    def end(self, call: Call) -> None:
        """Refuse a network in which no linear takes the sample's tokens alone."""
        if not call.skip and not call.scratch.get("fit"):
            raise UnsupportedModel(
                f"Cache: no linear in the blocks of {type(self.at.net).__name__} takes the sample's tokens alone, so "
                "regions has nothing to leave out; use another policy."
            )
        call.scratch.clear()
