"""TeaCache's signal, block 0's modulated input, is found whatever was done to the model before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.core.errors import UnsupportedModel
from hasten.speed import Cast, Quantize, speed_up
from hasten.speed.cache import Cache, calibrate
from hasten.speed.caching.state import few
from tests.pipelines import FAMILIES
from tests.test_cache_pipelines import STEPS, run


def cached_once(net: Any) -> None:
    """diffusers' own cache on and off: its hooks are gone, but a ``forward`` stays on every block."""
    from diffusers.hooks.first_block_cache import FirstBlockCacheConfig

    net.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    net.disable_cache()
    assert "forward" in vars(net.transformer_blocks[0])


def metered(net: Any) -> None:
    """A hook on every linear, as a counter has."""
    for m in net.modules():
        if isinstance(m, torch.nn.Linear):
            m.register_forward_pre_hook(lambda m, args: None)


BEFORE: dict[str, tuple[Callable[[Any], None], tuple[Any, ...]]] = {
    "nothing": (lambda net: None, ()),
    "cached once": (cached_once, ()),
    "metered": (metered, ()),
    "fused": (lambda net: net.fuse_qkv_projections(), ()),
    "quantized": (lambda net: None, (Cast(), Quantize("int8", min_side=8))),
}


@pytest.mark.parametrize("name", BEFORE)
def test_flux_is_calibrated_and_cached(name):
    pipe, call = FAMILIES["flux"]()
    pipe.set_progress_bar_config(disable=True)
    change, layers = BEFORE[name]
    change(pipe.transformer)
    want = run(pipe, call)
    runs = [lambda p, seed=seed: run(p, call, seed) for seed in (1, 2)]
    found = calibrate(pipe, "teacache", runs, STEPS, *layers, call=call)
    up = speed_up(pipe, Cache("teacache", threshold=50.0, **found), *layers, call=call)
    with up as fast:
        run(fast, call)
    assert up.ledger()["cache"]["reused"] > 2
    assert torch.equal(run(pipe, call), want)


@pytest.mark.parametrize("name", ["nothing", "cached once"])
def test_the_signal_is_what_the_first_norm_makes(name, monkeypatch):
    """norm1's output, the input of attn.to_q; not the tokens before it, not the text's."""
    pipe, call = FAMILIES["flux"]()
    pipe.set_progress_bar_config(disable=True)
    BEFORE[name][0](pipe.transformer)
    from hasten.speed.caching.stack import Stack

    signals: list[Tensor] = []
    inner = Stack.modulated

    def modulated(self: Any, args: Any, kwargs: Any) -> Tensor:
        signals.append(inner(self, args, kwargs))
        return signals[-1]

    monkeypatch.setattr(Stack, "modulated", modulated)
    with speed_up(pipe, Cache("teacache", threshold=50.0, coefficients=(1.0,) * 5, steps=STEPS), call=call) as fast:
        seen: list[Tensor] = []
        block = pipe.transformer.transformer_blocks[0]
        hook = block.norm1.register_forward_hook(lambda m, args, out: seen.append(few(out[0]).clone()))
        run(fast, call)
        hook.remove()
    assert len(signals) == STEPS and all(any(torch.equal(s, v) for v in seen) for s in signals)


def test_under_hooks_that_still_act_it_is_refused():
    pipe, call = FAMILIES["flux"]()
    pipe.set_progress_bar_config(disable=True)
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    cache = Cache("teacache", threshold=50.0, coefficients=(1.0,) * 5, steps=STEPS)
    with pytest.raises(UnsupportedModel, match="library's hooks run it"), speed_up(pipe, cache, call=call) as fast:
        run(fast, call)
