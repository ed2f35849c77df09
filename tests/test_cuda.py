"""What only a CUDA device can show; skipped where there is none. benchmarks/gpu.sh runs it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hasten import (
    DMD2,
    SCM,
    Attention,
    Cache,
    Cast,
    Compile,
    DiT,
    DiTConfig,
    FitConfig,
    Flow,
    Quantize,
    digits,
    even,
    sample,
)
from hasten.core.method import Sampling
from hasten.fit import fit
from hasten.speed import dispatched, speed_up
from hasten.speed.attention import Engine
from hasten.speed.softmax import error
from tests.test_attention import SHAPES, made

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def net() -> DiT:
    """A small network with weights that are not zero, on the device."""
    torch.manual_seed(0)
    made = DiT(DiTConfig(width=128, depth=2, heads=4, patch=2, classes=10))
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return made.cuda().eval().requires_grad_(False)


def draw(model: DiT, rule: str = "ode") -> torch.Tensor:
    """Sixteen samples from fixed noise."""
    noise = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()).device)
    cond = {"label": torch.arange(16, device=noise.device) % 10}
    generator = torch.Generator(noise.device).manual_seed(0)
    return sample(model, noise, cond, Sampling(even(6), rule), generator=generator)


@pytest.mark.parametrize("rule", ["ode", "heun", "dpmpp_2m"])
def test_sampling_agrees_with_the_cpu(rule: str) -> None:
    model = net()
    here = draw(model, rule).cpu()
    torch.testing.assert_close(here, draw(model.cpu(), rule), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("method", [Flow(), DMD2(student_every=2), SCM(warmup=5)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_resumes_bit_identically(method, precision, tmp_path) -> None:
    config = FitConfig(iterations=8, batch=32, precision=precision, save_every=4)
    whole = [s for s in fit(method, digits(), net(), config, device="cuda")][-1]
    steps = fit(method, digits(), net(), config, device="cuda", out=tmp_path)
    for step in steps:
        if step.index == 5:
            break
    resumed = [s for s in fit(method, digits(), net(), config, device="cuda", out=tmp_path)][-1]
    for a, b in zip(whole.student.parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "transform",
    [
        Cast("bfloat16"), Quantize("int8", min_side=64), Quantize("int8_weights", min_side=64),
        Quantize("int4_weights", min_side=64), Attention("chunked"), Cache("schedule", mask="001010"), Compile(),
    ],
    ids=repr,
)  # fmt: skip
def test_layers_act_and_undo_exactly(transform) -> None:
    model = net()
    before = draw(model)
    with speed_up(model, transform) as fast:
        during = draw(fast)
    assert (during - before).norm() / before.norm() < 0.1
    assert torch.equal(draw(model), before)


def on_device(shape, dtype: torch.dtype):
    """The call of the same shape whose tensors are on the device."""
    call = made(shape, dtype)
    mask = None if call.mask is None else call.mask.cuda()
    return replace(call, q=call.q.cuda(), k=call.k.cuda(), v=call.v.cuda(), mask=mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 8, 8, 1024, 1024, 64, 64, "")], ids=str)
def test_auto_takes_a_close_kernel_and_survives_the_others(shape, dtype) -> None:
    """Whatever raises on a kind of call is no candidate for it; what is chosen keeps the bound."""
    config, call = Attention(), on_device(shape, dtype)
    choice = Engine(config).choose(call)
    assert choice.error <= config.max_error
    assert choice.kernel(call).shape == (*call.q.shape[:3], shape[6])


@pytest.mark.parametrize("name", dispatched.AUTO["cuda"])
def test_kernels_that_diffusers_dispatches_to(name) -> None:
    pytest.importorskip("diffusers")
    if name not in dispatched.automatic("cuda"):
        pytest.skip(dispatched.unmet(name) or f"diffusers has no {name}")
    call = on_device((2, 8, 8, 512, 512, 64, 64, ""), torch.bfloat16)
    if reason := dispatched.refusal(name, call):
        pytest.skip(reason)
    assert error(dispatched.kernel(name), call) < (0.006 if "native" in name else 0.1)
    model = net()
    with speed_up(model, Cast("bfloat16")) as fast:
        want = draw(fast)
    up = speed_up(model, Cast("bfloat16"), Attention(f"diffusers:{name}"))
    with up as fast:
        got = draw(fast)
    assert up.ledger()["attention"]["replaced"] > 0
    assert (got - want).norm() / want.norm() < 0.1
