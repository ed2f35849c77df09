"""Quantization-aware training: the same rounding as the quantized network, and a gradient straight through it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from hasten.core.errors import ConfigError
from hasten.distribute import checkpoints, clone
from hasten.fit import fit
from hasten.methods.dmd2 import DMD2
from hasten.methods.flow import Flow
from hasten.methods.progressive import Progressive
from hasten.methods.scm import SCM
from hasten.qat import RoundedLinear, plain, round_linears, rounded
from hasten.role import FitConfig
from hasten.speed import Quantize, speed_up
from hasten.speed.host import host
from hasten.speed.int8 import Int8Linear
from tests.test_fit import bits, final
from tests.training import images, network

CONFIG = FitConfig(iterations=4, batch=16, lr=1e-2, precision="float32", qat="int8", qat_min_side=32, save_every=2)


def test_the_rounding_is_that_of_the_int8_linear():
    torch.manual_seed(0)
    linear = nn.Linear(40, 24)
    net = nn.ModuleDict({"a": linear})
    net.blocks = nn.ModuleList([net["a"]])  # type: ignore[assignment]
    x = torch.randn(3, 5, 40) * torch.logspace(-3, 2, 5)[:, None]  # every token has its own scale
    small = Int8Linear(linear)
    twin = RoundedLinear(40, 24)
    twin.load_state_dict(linear.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(twin(x), small(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rounded(linear.weight), small.packed * small.scale[:, None])
        assert float((twin(x) - linear(x)).abs().max()) > 1e-3  # and it is not nothing
        assert torch.equal(rounded(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_the_gradient_goes_straight_through():
    torch.manual_seed(0)
    twin = RoundedLinear(6, 4).double()
    x, g = torch.randn(5, 6, dtype=torch.float64, requires_grad=True), torch.randn(5, 4, dtype=torch.float64)
    twin(x).backward(g)
    with torch.no_grad():
        torch.testing.assert_close(x.grad, g @ rounded(twin.weight), rtol=1e-12, atol=0)
        torch.testing.assert_close(twin.weight.grad, g.T @ rounded(x), rtol=1e-12, atol=0)
        torch.testing.assert_close(twin.bias.grad, g.sum(0), rtol=1e-12, atol=0)
    y = torch.randn(5, requires_grad=True)
    rounded(y).backward(torch.arange(5.0))
    assert torch.equal(y.grad, torch.arange(5.0))  # pyright: ignore[reportArgumentType]


def test_those_linears_are_rounded_that_will_be_quantized():
    net, same = network(), network()
    before = {k: id(p) for k, p in net.named_parameters()}
    round_linears(net, "int8", 32)
    chosen = {k for k, m in net.named_modules() if isinstance(m, RoundedLinear)}
    Quantize(min_side=32).apply(host(same))
    assert chosen == {k for k, m in same.named_modules() if isinstance(m, Int8Linear)} and len(chosen) == 4
    assert {k: id(p) for k, p in net.named_parameters()} == before
    assert list(net.state_dict()) == list(network().state_dict())
    assert clone(net).state_dict().keys() == net.state_dict().keys()
    assert not any(isinstance(m, RoundedLinear) for m in clone(net).modules())
    assert any(isinstance(m, RoundedLinear) for m in net.modules())
    assert plain(net) is net and not any(isinstance(m, RoundedLinear) for m in net.modules())


@pytest.mark.parametrize("method", [Flow(), DMD2(gan_weight=0.1), Progressive(start=4)], ids=lambda m: type(m).__name__)
def test_quantizing_what_was_trained_changes_nothing_but_the_last_bits(method, tmp_path):
    teacher = network()
    before = bits(teacher.state_dict())
    *_, last = fit(method, images(), teacher, CONFIG, out=tmp_path)
    assert bits(teacher.state_dict()) == before
    student, net = last.student, last.roles["student"].net
    for name, role in last.roles.items():
        assert any(isinstance(m, RoundedLinear) for m in role.net.modules()) == (name == "student")
    assert not any(isinstance(m, RoundedLinear) for m in student.modules())
    x, t, cond = torch.randn(6, 1, 8, 8), torch.linspace(0.1, 1, 6), {"label": torch.arange(6)}
    trained = clone(net)  # the raw weights, without rounding
    with torch.no_grad():
        seen, unrounded = net(x, t, cond), trained(x, t, cond)
    with speed_up(trained, Quantize(min_side=32)) as fast:
        served = fast(x, t, cond)
    error, change = float((served - seen).norm()), float((unrounded - seen).norm())
    # A token at the edge of two steps may fall to either side: not the last bit, yet far less than the rounding.
    assert error < 0.1 * change and change > 1e-4 * float(seen.norm())


def test_a_derivative_on_the_grid_is_not_a_difference_of_rounded_numbers():
    seen = []

    class Watched(SCM):
        def loss(self, nets, batch, step):
            seen.append(self.jvp_mode)
            return super().loss(nets, batch, step)

    for config, method in ((CONFIG, Watched()), (replace(CONFIG, qat=None, qat_min_side=512), Watched()),
                           (CONFIG, Watched(jvp_mode="central"))):  # fmt: skip
        next(fit(method, images(), network(), config))
    assert seen == ["exact", "auto", "central"]


def test_a_stopped_run_resumes_bit_identically(tmp_path):
    list(fit(Progressive(start=4), images(), network(), CONFIG, out=tmp_path / "whole"))
    for step in fit(Progressive(start=4), images(), network(), CONFIG, out=tmp_path / "stopped"):
        if step.index == 3:
            break
    list(fit(Progressive(start=4), images(), network(), CONFIG, out=tmp_path / "stopped"))
    assert checkpoints(tmp_path / "stopped") and final(tmp_path / "stopped") == final(tmp_path / "whole")


def test_training_with_rounding_serves_better_than_rounding_after_it():
    """On weights that one outlier per row makes coarse, the student learns around the grid."""
    teacher = network()
    with torch.no_grad():
        for block in teacher.blocks:
            stream: Any = block.image
            for linear in (stream.qkv, stream.out, stream.up, stream.down):
                linear.weight[:, 0] *= 60
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(64, 1, 8, 8, generator=generator), torch.rand(64, generator=generator)
    cond = {"label": torch.arange(64) % 10}
    with torch.no_grad():
        want = teacher(x, t, cond)
    config = replace(CONFIG, iterations=100, lr=1e-3, schedule="cosine")
    *_, last = fit(Follow(), images(), copy.deepcopy(teacher), config)
    served = []
    for net in (teacher, last.student):
        with speed_up(net, Quantize(min_side=32)) as fast:
            served.append(float((fast(x, t, cond) - want).square().mean()))
    assert served[1] < 0.3 * served[0]


class Follow(Flow):
    """Regress on the teacher's own predictions: without rounding there is nothing to learn."""

    def networks(self, teacher: Any, clone: Any) -> Any:
        return {"student": clone(teacher), "teacher": teacher}

    def loss(self, nets: Any, batch: Any, step: int) -> Any:
        x, t = batch.noise(), torch.rand(len(batch.data))
        with torch.no_grad():
            want = nets["teacher"](x, t, batch.cond)
        return (nets["student"](x, t, batch.cond) - want).square().mean(), {}


def test_settings_are_checked():
    for bad, word in (
        ({"qat": "int4"}, "qat"), ({"qat": "int8", "clone": "lora"}, "adapters"), ({"qat_min_side": 64}, "_min_side"),
    ):  # fmt: skip
        config: dict[str, Any] = bad
        with pytest.raises(ConfigError, match=word):
            FitConfig(**config)
    with pytest.raises(ConfigError, match="none of 5 linears qualifies"):
        next(fit(Flow(), images(), network(), replace(CONFIG, qat_min_side=512)))
