"""diffusers' attention backends: those of a CPU for real, the others' selection and refusals with made-up entries."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.core.errors import ConfigError
from hasten.speed import Attention, Cast, Compile, dispatched, speed_up
from hasten.speed import attention as layer
from hasten.speed.dispatched import kernel, refusal, why_not
from hasten.speed.softmax import Call, error, torchs
from tests.test_attention import SHAPES, Attends, Holds, half, made
from tests.test_speed import draw, inputs, relative, same, state, tiny

dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
REGISTRY = dispatch._AttentionBackendRegistry
REAL = ["native", "_native_math", "flex"]
ALL = sorted(name.value for name in REGISTRY._backends)
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def fake(monkeypatch: Any, name: str, function: Any, demands: Any = ()) -> None:
    """Put a function of one's own behind a name of diffusers', as if its package were installed."""
    monkeypatch.setitem(REGISTRY._backends, name, function)
    monkeypatch.setitem(REGISTRY._constraints, name, list(demands))
    monkeypatch.setattr(dispatch, "_check_attention_backend_requirements", lambda backend: None)


def exact(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
    """What a backend is: tokens before heads."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    given = {"attn_mask": given.pop("attn_mask", None), **given}
    return F.scaled_dot_product_attention(q, k, v, **given).transpose(1, 2)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_backend_answers_what_torch_answers_or_is_not_asked(name, shape):
    call = made(shape, torch.float32)
    if refusal(name, call):
        assert name == "flex" and (call.causal or call.mask is not None)
    else:
        assert error(kernel(name), call) < 1e-5


@pytest.mark.parametrize("name", REAL)
def test_it_acts_and_is_undone_bit_for_bit(name):
    net, (noise, cond, _) = tiny(), inputs()
    before, want = state(net), draw(net, noise, cond)
    up = speed_up(net, Attention(f"diffusers:{name}"))
    with up as fast:
        assert relative(draw(fast, noise, cond), want) < 1e-5
    counts = up.ledger()["attention"]
    assert counts["calls"] == counts["replaced"] == 40 and counts["error"] < 1e-5
    assert same(state(net), before) and torch.equal(draw(net, noise, cond), want)


@pytest.mark.parametrize("name", REAL)
def test_compiled_code_calls_it(name):
    net, (noise, cond, _) = tiny(), inputs()
    want = draw(net, noise, cond)
    up = speed_up(net, Attention(f"diffusers:{name}"), Compile(backend="eager"))
    with up as fast:
        torch.testing.assert_close(draw(fast, noise, cond), want, rtol=1e-4, atol=1e-4)
    assert up.ledger()["attention"]["replaced"] == 40 and up.ledger()["compile"]["graphs"] == 1


@pytest.mark.parametrize("name", ["native", "_native_math"])
@pytest.mark.parametrize("family", ["flux", "z_image"])
def test_pipelines(name, family):
    """diffusers' own functions call scaled_dot_product_attention themselves: that call must not come back to us."""
    pipe, call = importlib.import_module("tests.pipelines").FAMILIES[family]()
    seeded = lambda p: p(**call, num_inference_steps=2, output_type="latent",  # noqa: E731
                         generator=torch.Generator().manual_seed(0))[0]  # fmt: skip
    want = torch.as_tensor(seeded(pipe))
    up = speed_up(pipe, Attention(f"diffusers:{name}"), call=call)
    with up as fast:
        got = torch.as_tensor(seeded(fast))
    counts = up.ledger()["attention"]
    assert counts["replaced"] == counts["calls"] > 0
    assert relative(got, want) < 1e-4
    assert torch.equal(torch.as_tensor(seeded(pipe)), want)


# --- what a backend takes ---------------------------------------------------------------------------------------

PLAIN = made((2, 3, 3, 5, 5, 16, 16, ""), torch.float32)
BF16 = made((2, 3, 3, 5, 5, 16, 16, ""))
MASKED = replace(PLAIN, mask=torch.ones(5, 5, dtype=torch.bool))


@pytest.mark.parametrize(
    ("name", "call", "words"),
    [
        ("native", PLAIN, None),
        ("native", MASKED, None),
        ("native", replace(PLAIN, causal=True, q=PLAIN.q[:, :, :2]), None),
        ("_native_flash", PLAIN, "must be either bfloat16 or float16$"),
        ("_native_flash", BF16, None),
        ("_native_flash", replace(BF16, mask=MASKED.mask), "no mask"),
        ("_native_cudnn", replace(BF16, mask=MASKED.mask), None),
        ("flash", BF16, None),
        ("flash", replace(BF16, causal=True), None),
        ("flash", replace(BF16, mask=MASKED.mask), "no mask"),
        ("flash_varlen", replace(BF16, mask=MASKED.mask), "no mask"),  # it would ask which keys anyone sees
        ("xformers", MASKED, "no mask"),  # it would add the booleans
        ("flash", replace(BF16, causal=True, q=BF16.q[:, :, :2]), "not causal as torch"),  # another diagonal
        ("flex", replace(PLAIN, causal=True), "not causal as torch"),  # it forgets it
        ("_native_npu", replace(BF16, causal=True), "not causal as torch"),
        ("_native_xla", replace(PLAIN, scale=0.5), "no scale"),
        ("flash", replace(BF16, v=BF16.v[..., :8]), "as many channels"),
        ("flex", replace(PLAIN, v=PLAIN.v[..., :8]), None),
        ("_sage_qk_int8_pv_fp8_cuda", PLAIN, "bfloat16 or float16, with at most 128"),
        ("_sage_qk_int8_pv_fp8_cuda", made((1, 1, 1, 2, 2, 160, 160, "")), "with at most 128"),
        ("_sage_qk_int8_pv_fp8_cuda", BF16, "on a CUDA device$"),
        ("sage_blackwell_hub", BF16, "on a CUDA device$"),
    ],
)
def test_what_a_backend_takes(name, call, words):
    reason = refusal(name, call)
    assert reason is None if words is None else re.search(words, reason or "")


def test_what_does_not_fit_goes_to_torch_and_is_counted(monkeypatch):
    x = torch.randn(2, 3, 5, 8)
    mask = torch.rand(5, 5) > 0.3
    net = Holds(Attends(), Attends(attn_mask=mask), Attends(scale=0.3)).requires_grad_(False)
    want = net(x)
    fake(monkeypatch, "xformers", exact)
    monkeypatch.setattr(dispatched, "ANYWHERE", ("xformers",))
    up = speed_up(net, Attention("diffusers:xformers"))
    with up as fast:
        torch.testing.assert_close(fast(x), want)
    assert (up.ledger()["attention"]["calls"], up.ledger()["attention"]["replaced"]) == (3, 2)
    only = Holds(Attends(attn_mask=mask))
    with pytest.raises(ConfigError, match=r"none of 1 calls fits 'diffusers:xformers' \(it takes no mask as torch"):
        with speed_up(only, Attention("diffusers:xformers")) as fast:
            fast(x)


def test_threads_leave_torchs_choice_of_kernels_as_it_was():
    """Some of diffusers' backends switch the process's kernels for a call: two at once would put each other's back."""
    cuda, inside, most = torch.backends.cuda, [], []

    def slowly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return query

    flags = lambda: (cuda.flash_sdp_enabled(), cuda.math_sdp_enabled(), cuda.mem_efficient_sdp_enabled())  # noqa: E731
    before, x = flags(), torch.randn(1, 2, 8, 16).bfloat16()
    call = Call(x, x, x, None, 0.0, False, None, False)
    run = kernel("_native_flash")
    registry = dispatched.library()._AttentionBackendRegistry
    kept = registry._backends["_native_math"], registry._supported_arg_names["_native_math"]
    try:
        registry._backends["_native_math"] = slowly
        registry._supported_arg_names["_native_math"] = {"query", "key", "value"}
        other = kernel("_native_math")
        threads = [threading.Thread(target=lambda: [(run(call), other(call)) for _ in range(20)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        registry._backends["_native_math"], registry._supported_arg_names["_native_math"] = kept
    assert max(most) == 1 and len(most) == 80 and flags() == before


def test_heads_are_repeated_for_a_backend_without_groups(monkeypatch):
    seen: list[Any] = []

    def counting(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.append((key.shape, key.data_ptr()))
        return exact(query, key, value)

    monkeypatch.setattr(REGISTRY, "_supported_arg_names", {**REGISTRY._supported_arg_names, "flash": {"query"}})
    fake(monkeypatch, "flash", counting)
    call = made((1, 6, 2, 9, 9, 8, 8, ""), torch.float32)
    assert error(kernel("flash"), call) < 1e-5 and seen[0][0] == (1, 9, 6, 8)


def test_a_mask_of_two_dimensions_is_queries_by_keys():
    """diffusers reads [B, S] where it could be; torch never does."""
    call = replace(PLAIN, q=PLAIN.q[:, :, :2], mask=torch.tensor([[True] * 5, [True, False, False, False, True]]))
    assert error(kernel("native"), call) < 1e-6  # two queries, two samples


def test_the_keys_outlive_a_kernel_that_writes_on_them(monkeypatch):
    def writing(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
        out = exact(query, key, value)
        key.sub_(key.mean(1, keepdim=True))
        return out

    fake(monkeypatch, "sage_blackwell_hub", writing)
    call = replace(PLAIN, k=PLAIN.k.contiguous())
    before = call.k.clone()
    assert error(kernel("sage_blackwell_hub"), call) < 1e-5 and torch.equal(call.k, before)


# --- refused ----------------------------------------------------------------------------------------------------


def test_backends_that_cannot_run_are_refused(monkeypatch):
    for name, words in [
        ("flsh", "did you mean 'diffusers:flash'"),
        ("", "Unknown backend of Attention 'diffusers:'"),
        ("_native_cudnn", r"it needs a device 'cuda' and the network is on cpu; move it there with .to\('cuda'\)\.$"),
        ("_native_flash", r"must be either bfloat16 or float16; add Cast\(\)\.$"),
    ]:
        with pytest.raises(ConfigError, match=words):
            speed_up(tiny(), Attention(f"diffusers:{name}"))
    speed_up(tiny(), Attention("diffusers:_native_flash"), Cast())
    speed_up(tiny().bfloat16(), Attention("diffusers:_native_flash"))
    with pytest.raises(ConfigError, match="did you mean 'diffusers:NAME'"):
        Attention("diffuser:flash")
    monkeypatch.setattr(dispatch, "_CAN_USE_FLASH_ATTN", False)
    monkeypatch.setattr(dispatch, "is_kernels_available", lambda: False)
    for name, words in [("flash", "please install `flash-attn>=2"), ("_flash_3_hub", "`pip install kernels`")]:
        with pytest.raises(ConfigError, match=rf"'diffusers:{name}' cannot run, because .*{words}[^\n]*\.$"):
            speed_up(tiny(), Attention(f"diffusers:{name}"))


def test_the_device_is_the_one_of_the_backend(monkeypatch):
    float32 = {torch.float32}
    fake(monkeypatch, "_native_npu", exact)
    assert "needs a device 'npu' and the network is on cpu" in str(why_not("_native_npu", {"cpu"}, float32))
    assert why_not("native", {"meta"}, float32) is None and why_not("native", set(), set()) is None
    assert why_not("native", {"cpu"}, {torch.float32, torch.bfloat16}) is None
    assert why_not("_native_flash", {"cpu"}, {torch.float32, torch.bfloat16}) is None
    assert "Cast" not in str(why_not("_native_cudnn", {"cpu"}, float32))


def test_without_diffusers_the_fix_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.models", None)
    with pytest.raises(ConfigError, match=r'needs diffusers; install it with pip install "diffusers>='):
        speed_up(tiny(), Attention("diffusers:native"))
    monkeypatch.setitem(dispatched.AUTO, "cpu", ("native",))
    assert dispatched.automatic("cpu") == []


def test_a_kernel_of_the_hub_is_fetched_when_applied(monkeypatch):
    fetched: list[str] = []
    fake(monkeypatch, "flash_hub", exact)
    monkeypatch.setattr(dispatched, "ANYWHERE", ("flash_hub",))
    monkeypatch.setattr(dispatch, "_maybe_download_kernel_for_backend", lambda b: fetched.append(b.value))
    net, (noise, cond, _) = tiny(), inputs()
    up = speed_up(net, Attention("diffusers:flash_hub"))
    assert not fetched  # nothing happens before the block
    with up as fast:
        fast(noise, half, cond)
    assert fetched == ["flash_hub"]

    def offline(backend: Any) -> None:
        raise OSError("No route.\nTry again later.")

    monkeypatch.setattr(dispatch, "_maybe_download_kernel_for_backend", offline)
    with pytest.raises(ConfigError, match=r"from the hub \(No route; try again later\); use 'auto'"):
        speed_up(net, Attention("diffusers:flash_hub")).__enter__()
    assert "forward" not in vars(net) and not layer._engines


def test_a_kernel_that_fails_is_one_sentence(monkeypatch):
    def failing(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
        raise problem

    fake(monkeypatch, "native", failing)
    net, (noise, cond, _) = tiny(), inputs()
    problem: Exception = AssertionError("unsupported\nhead_dim.")
    with pytest.raises(ConfigError) as caught, speed_up(net, Attention("diffusers:native")) as fast:
        fast(noise, half, cond)
    said = str(caught.value)
    assert said.startswith("Attention: 'diffusers:native' failed on q [4, 2, 4, 16] in float32 (unsupported head_dim);")
    assert said.count(". ") == 0 and "\n" not in said
    problem = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError), speed_up(net, Attention("diffusers:native")) as fast:
        fast(noise, half, cond)
    assert "forward" not in vars(net) and not layer._engines


# --- auto -------------------------------------------------------------------------------------------------------


def test_auto_tries_what_is_here_and_nothing_of_the_hub(monkeypatch):
    for names in dispatched.AUTO.values():
        assert set(names) <= set(ALL) and not [n for n in names if n.endswith("hub")]
    assert dispatched.automatic("cpu") == []
    monkeypatch.setattr(dispatch, "_CAN_USE_FLASH_ATTN", True)
    for lacking in ("_CAN_USE_FLASH_ATTN_3", "_CAN_USE_SAGE_ATTN", "_CAN_USE_XFORMERS_ATTN"):
        monkeypatch.setattr(dispatch, lacking, False)
    assert dispatched.automatic("cuda") == ["_native_cudnn", "_native_flash", "flash"]
    monkeypatch.delitem(REGISTRY._backends, "_native_flash")  # another release of diffusers
    assert dispatched.automatic("cuda") == ["_native_cudnn", "flash"]


def test_auto_takes_the_fastest_that_works(monkeypatch):
    """Four made-up kernels: the fastest raises, one lacks memory, the next is wrong; the last is right, and slow."""
    asked: list[str] = []

    def entry(name: str) -> Any:
        def run(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
            asked.append(name)
            if name == "flash":
                raise RuntimeError("no kernel image")
            if name == "_flash_3":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return exact(query, key, value, **given) * (1.5 if name == "xformers" else 1.0)

        return run

    speed = {"flash": 0.1, "_flash_3": 0.2, "xformers": 0.5, "native": 1.0, "torch": 2.0}
    for name in ("flash", "_flash_3", "xformers", "native"):
        fake(monkeypatch, name, entry(name))
    monkeypatch.setitem(dispatched.AUTO, "cpu", ("flash", "_flash_3", "xformers", "native"))

    def timed(run: Any, device: Any) -> float:
        asked.clear()
        run()
        return speed[asked[0] if asked else "torch"]

    monkeypatch.setattr(layer, "seconds", timed)
    monkeypatch.setattr(layer, "CHUNKS", ())
    net, (noise, cond, _) = tiny(), inputs()
    want = draw(net, noise, cond)
    up = speed_up(net, Attention())
    with up as fast:
        got = draw(fast, noise, cond)
        choice = next(iter(next(iter(layer._engines.values())).chosen.values()))
        assert choice.name == "diffusers:native" and choice.gain == 2.0
    assert relative(got, want) < 1e-5 and up.ledger()["attention"]["replaced"] == 40
    del speed["native"]  # it is not even timed
    monkeypatch.setitem(dispatched.AUTO, "cpu", ("flash", "_flash_3"))
    with pytest.raises(ConfigError, match="torch's kernel was the fastest"), speed_up(net, Attention()) as fast:
        assert torch.equal(draw(fast, noise, cond), want)


def test_a_name_of_diffusers_is_looked_up_late():
    """Neither hasten nor an Attention of such a name loads diffusers; checking it does."""
    code = (
        "import sys, hasten; hasten.Attention('diffusers:flash'); import hasten.speed.dispatched;"
        "assert 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torchs_kernel_is_the_measure():
    assert error(torchs, PLAIN) == 0.0
    assert isinstance(PLAIN, Call)
