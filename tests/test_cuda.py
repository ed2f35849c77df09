"""What only a CUDA device can show; skipped where there is none. benchmarks/gpu.sh runs it."""

from __future__ import annotations

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
from hasten.speed import speed_up

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
