"""Compiled code is kept for a network: applied again it costs no compilation, and is never used for anything else."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.core.errors import ConfigError
from hasten.core.method import Sampling, even
from hasten.ledger import build
from hasten.models.dit import DiT, DiTConfig
from hasten.speed import Attention, Cache, Cast, Compile, Quantize, speed_up
from hasten.speed import compile as module
from hasten.speed.int8 import Int8Linear
from hasten.workload import Workload
from tests.test_speed import tiny

X = torch.linspace(-1, 1, 64).view(2, 32)


class Residual(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.linear, self.up = nn.Linear(width, width), nn.Linear(width, width)
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.up(self.linear(x).tanh())


class Chain(nn.Module):
    """The smallest network with blocks."""

    def __init__(self, count: int = 3):
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(count))

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def compilations(monkeypatch):
    """The names of the operators of every graph that was compiled."""
    torch.manual_seed(0)
    found: list[str] = []
    before = torch._dynamo.lookup_backend

    def spy(name: str) -> Any:
        def backend(graph: Any, inputs: Any) -> Any:
            found.append(graph.code)
            return before(name)(graph, inputs)

        return backend

    monkeypatch.setattr(torch._dynamo, "lookup_backend", spy)
    return found


def once(net: nn.Module, *layers: Any, x: Tensor = X) -> tuple[Tensor, dict[str, float]]:
    """The output under the layers, applied and taken off, and what Compile counted."""
    up = speed_up(net, *layers)
    with up as fast:
        out = fast(x, x, {})
    return out, up.ledger()["compile"]


@pytest.mark.parametrize("scope", ["blocks", "net"])
@pytest.mark.parametrize("layers", [(), (Quantize(min_side=32),)], ids=["alone", "quantized"])
def test_the_same_layers_again_compile_nothing(layers, scope, compilations):
    net, compiled = Chain(), Compile(scope=scope, backend="eager")
    with torch.no_grad():
        want, first = once(net, *layers, compiled)
        assert len(compilations) == 1
        for _ in range(3):
            got, again = once(net, *layers, compiled)
            assert torch.equal(got, want) and again == first == {"graphs": 1, "runs": 3 if scope == "blocks" else 1}
    assert len(compilations) == 1


def test_other_layers_underneath_compile_anew_and_stay_right(compilations):
    """Every one of them against a twin that nothing was compiled for before; then all again, without a compilation."""
    net, twin, compiled = Chain(), Chain(), Compile(backend="eager")
    twin.load_state_dict(net.state_dict())
    stacks = [
        (), (Quantize(min_side=32),), (Quantize("int8_weights", min_side=32),), (Cast(),),
        (Quantize(min_side=32), Cast()), (Quantize(min_side=32, skip_first=1),),
    ]  # fmt: skip
    with torch.no_grad():
        outs = [once(net, *layers, compiled)[0] for layers in stacks]
        made = len(compilations)
        for layers, out in zip(stacks, outs, strict=True):
            fresh = copy.deepcopy(twin)
            want = speed_up(fresh, *layers).__enter__()(X, X, {}) if layers else fresh(X, X, {})
            torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
            assert torch.equal(once(net, *layers, compiled)[0], out)
    assert made == len(compilations) == 5  # the last stack is made of the first's and the second's blocks
    assert len({out.double().sum().item() for out in outs}) == 6


def test_a_change_between_two_applications_is_seen(compilations):
    """New weights and another mode of the same network, a hook, an own forward: torch's guards overlook the hook."""
    net, compiled = Chain(), Compile(backend="eager")
    one, two, three = (block for block in net.blocks if isinstance(block, Residual))

    def more(module: nn.Module, args: Any, out: Any) -> Any:
        return out + 1

    def check() -> None:
        torch.testing.assert_close(once(net, compiled)[0], net(X, X, {}))

    with torch.no_grad():
        check()
        two.linear.weight.mul_(2)
        one.up.weight = nn.Parameter(one.up.weight * 3)
        check()
        assert len(compilations) == 1
        handle = two.up.register_forward_hook(more)
        check()
        before = three.linear.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
        check()
        handle.remove()
        before.remove()
        setattr(one.linear, "forward", lambda x: x * 3)  # noqa: B010 - a type checker minds
        check()
        del one.linear.forward
        check()
    assert len(compilations) == 4


def test_a_limit_used_up_by_earlier_applications_starts_anew(compilations, monkeypatch):
    """Within one application it still is an error."""
    monkeypatch.setattr(module, "SPARE", 0)
    net, compiled = Chain(2), Compile(backend="eager")
    kinds: list[tuple[Any, ...]] = [(), (Quantize(min_side=32),), (Cast(),), (Quantize(min_side=32), Cast())]
    with torch.no_grad():
        for layers in kinds:
            once(net, *layers, compiled)
        assert len(compilations) == 4
        shapes = [X, X[0], X[None], X[None, None]]
        with pytest.raises(ConfigError, match="2 graphs of one block are not enough"), speed_up(net, compiled) as fast:
            for x in shapes:
                fast(x, x, {})


def test_each_network_has_its_own_and_takes_it_along(compilations):
    one, two = Chain(), Chain()
    with torch.no_grad():
        for net in (one, two, one, two):
            torch.testing.assert_close(once(net, Compile(backend="eager"))[0], net(X, X, {}))
    assert len(compilations) == 2
    gone, held = weakref.ref(one), len(module._kept)
    with torch.no_grad():
        with speed_up(one, Quantize(min_side=32), Compile(backend="eager")) as fast:
            fast(X, X, {})
            weights = [weakref.ref(m) for m in one.modules() if isinstance(m, Int8Linear)]
        once(one, Compile(scope="net", backend="eager"))
    gc.collect()
    assert len(weights) == 6 and not any(ref() for ref in weights)
    del one, net, fast
    gc.collect()
    assert gone() is None and len(module._kept) == held - 1


def test_the_ledger_compiles_each_kind_of_block_once(compilations):
    """Every combination is entered for its samples and in every round for its times."""
    net = DiT(DiTConfig(size=(4, 4), width=32, depth=2, heads=2, classes=3))
    work = Workload(net, 4, sampling=Sampling(even(4)), batch=2)
    stack = (Quantize(min_side=32), Cache("schedule", mask="0010"), Compile(backend="eager"))
    book = build(work, stack, count=2, repeats=1, rounds=3)
    assert not any(line.refused for line in book.lines[1:])
    assert len(compilations) == 2


def test_attention_applied_again_under_compile_compiles_nothing(compilations):
    """What was traced names the attention layer that is applied now by a number, the same one each time."""
    net = tiny()
    x, t, label = torch.randn(2, 1, 4, 4), torch.full((2,), 0.5), {"label": torch.tensor([0, 1])}
    outs = []
    for _ in range(3):
        up = speed_up(net, Attention("chunked"), Compile(backend="eager"))
        with torch.no_grad(), up as fast:
            outs.append(fast(x, t, label))
        assert up.ledger()["attention"]["replaced"] > 0
    assert len(compilations) == 1 and all(torch.equal(out, outs[0]) for out in outs)
