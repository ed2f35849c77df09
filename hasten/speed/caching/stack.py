"""Skipping the blocks between the first and the last ones: their streams pass, and what they added is added again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hasten.core.errors import UnsupportedModel
from hasten.speed.caching.blocks import Blocks, Held, filled, flat, given, sources, structure
from hasten.speed.caching.policies import combined
from hasten.speed.caching.state import Call, few


class Seen(Exception):
    """Carries a linear's input out of a block."""

    def __init__(self, value: Tensor):
        self.value = value


def is_linear(module: nn.Module) -> bool:
    """A layer that maps each token by itself: a linear, of whatever precision."""
    return isinstance(module, nn.Linear) or ("Linear" in type(module).__name__ and not list(module.children()))


def skeleton(module: nn.Module) -> Any:
    """A block that ends at its first linear of tokens: copies of its modules, not of its parameters.

    Copies, since threads share the block, and hooks on it would be traced by a compiler.
    """
    twin = copy.copy(module)
    twin.__dict__["_modules"] = {name: m and skeleton(m) for name, m in module._modules.items()}
    if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
        del twin.__dict__["forward"]  # diffusers leaves it there with a hook that it removed: it runs the original
    if is_linear(module):
        inner = module.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if x.ndim >= 3 and x.shape[-2] > 1:  # [B, L, D]; embeddings of the time are [B, D] or [B, 1, D]
                raise Seen(x)
            return inner(x, *args, **kwargs)

        twin.__dict__["forward"] = forward
    return twin


class Stack(Blocks):
    """Skips blocks ``first`` to ``n - last``; those before are the probe, those behind are always computed.

    A skipped block passes its streams on. The last of a run of blocks whose outputs are the next one's inputs, with
    nothing done in between, adds what the run added when it was last computed (or its extrapolation).
    """

    def __init__(self, engine: Any):
        super().__init__(engine)
        policy = engine.policy
        self.first = self.config.first if policy.first is None else policy.first
        self.until = len(self.at.blocks) - self.config.last
        self.skeleton: Any = skeleton(self.at.blocks[0]) if "coefficients" in policy.fields else None

    def begin(self, call: Call) -> None:
        """Decides behind the probe."""

    def around(self, call: Call, k: int, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Decide behind the probe; run and record a block, or return what stands for it."""
        self.in_order(call, k)
        if k == 0 and self.skeleton is not None:
            call.signal = self.modulated(args, kwargs)
        if k == self.first and self.first < self.until:
            self.engine.decide(call)
        middle = self.first <= k < self.until
        if call.skip and middle:
            return self.stand_in(call, k, given(args, kwargs))
        ins = given(args, kwargs)
        known = call.mine.blocks.get(k)
        wanted = range(len(ins)) if known is None else known[1]
        starts = {i: Held(ins[i]) for i in wanted if i is not None and isinstance(ins[i], Tensor)}
        out = inner(*args, **kwargs)
        if k < self.first:
            self.probe(call, k, ins, starts, out)
        elif middle:
            self.record(call, k, ins, starts, out)
        return out

    def modulated(self, args: Any, kwargs: Any) -> Tensor:
        """Block 0's modulated input: what its first linear of tokens is given."""
        try:
            self.skeleton(*args, **kwargs)
        except Seen as seen:
            return few(seen.value.detach()).clone()
        raise UnsupportedModel(
            f"Cache: {self.name(0)} has no linear of tokens, or another library's hooks run it, so teacache has no "
            "signal; use easycache."
        )

    # --- a computed call --------------------------------------------------------------------------------------

    def probe(self, call: Call, k: int, ins: list[Any], starts: dict[int, Held], out: Any) -> None:
        """After the last probe block: what the probe added to the sample's stream, on a few elements."""
        outs = flat(out)
        j = self.stream(k, outs)
        i = self.matched(call, k, ins, out, outs)[j]
        if i is None:
            raise self.refusal(k, outs[j])
        if k == 0:
            call.scratch["origin"] = starts.get(i) or Held(ins[i])
        if k < self.first - 1:
            return
        start = call.scratch["origin"].read(f"the input of {self.name(0)}")
        start = start if start.shape == outs[j].shape else ins[i]  # streams that were joined since
        call.feature = few(outs[j].detach()).clone()
        call.probe = call.feature - few(start.detach())

    def matched(self, call: Call, k: int, ins: list[Any], out: Any, outs: list[Tensor]) -> list[Any]:
        """Of every output of block k the position of the input that it continues; found once for each shape."""
        form = [(v.shape, v.stride()) for v in outs]
        known = call.mine.blocks.get(k)
        if known is None or known[0] != form:
            known = call.mine.blocks[k] = (form, sources(ins, outs, call.scratch.get("outs", [])), structure(out))
        call.scratch["outs"] = outs
        return known[1]

    def refusal(self, k: int, out: Tensor) -> UnsupportedModel:
        """Why block k cannot be skipped."""
        return UnsupportedModel(
            f"Cache: {self.name(k)} returns {list(out.shape)}, which continues none of its inputs, so its residual "
            "is not defined; use an output policy such as easycache, or deepcache on a UNet."
        )

    def record(self, call: Call, k: int, ins: list[Any], starts: dict[int, Held], out: Any) -> None:
        """Note how block k's outputs continue its inputs, and close the runs that did not go on."""
        outs, before = flat(out), call.scratch.get("run", {})
        match = self.matched(call, k, ins, out, outs)
        for j, i in enumerate(match):
            if i is None:
                raise self.refusal(k, outs[j])
        run: dict[tuple[int, int], tuple[Held, Held]] = {}
        for j, i in enumerate(match):
            origin = starts.get(i) or Held(ins[i])  # the second where the shapes have just changed
            for key, (start, end) in list(before.items()):
                if end.handed_on(origin):
                    origin = start
                    del before[key]
                    break
            run[k, j] = origin, Held(outs[j])
        self.close(call, before)
        call.scratch["run"] = run
        if k == self.until - 1:
            self.close(call, run)

    def close(self, call: Call, ended: dict[tuple[int, int], tuple[Held, Held]]) -> None:
        """What runs of blocks that ended have added to their streams."""
        for (k, j), (start, end) in ended.items():
            who = f"a stream of {self.name(k)}"
            call.residuals[k, j] = end.read(who) - start.read(who)

    def end(self, call: Call) -> None:
        """Refuse a network that did not run all its blocks."""
        if call.scratch.get("next", 0) < len(self.at.blocks):
            raise UnsupportedModel(
                f"Cache: {type(self.at.net).__name__} ran {call.scratch.get('next', 0)} of its {len(self.at.blocks)} "
                "blocks; use an output policy such as easycache."
            )
        call.scratch.clear()

    # --- a skipped one ----------------------------------------------------------------------------------------

    def stand_in(self, call: Call, k: int, ins: list[Any]) -> Any:
        """What block k would return."""
        form, match, like = call.mine.blocks[k]
        if k == self.first:
            weights = self.engine.policy.weights
            call.scratch["weights"] = weights(self.config, call) if weights else [1.0]
        outs = []
        for j, i in enumerate(match):
            shape, stride = form[j]
            if ins[i].shape != shape:
                raise UnsupportedModel(f"Cache: {self.name(k)} is given {list(ins[i].shape)} after {list(shape)}.")
            outs.append(ins[i])
            if (k, j) in call.mine.past[-1].residuals:
                residual = combined(call.scratch["weights"], [s.residuals[k, j] for s in call.mine.past])
                outs[j] = torch.empty_strided(shape, stride, dtype=ins[i].dtype, device=ins[i].device)
                torch.add(ins[i], residual, out=outs[j])  # laid out as before, or a compiled block compiles again
        return filled(like, outs)
