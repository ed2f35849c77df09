"""Quantize by torchao: the numbers it shares with hasten's, layers, undo, refusals, folders that diffusers reads."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path as File
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.core.errors import ConfigError, NotReversible
from hasten.models.load import load_pipeline
from hasten.speed import Cache, Cast, Compile, LayerCast, Offload, Quantize, ao, products, speed_up
from hasten.speed.ao import TorchaoLinear, config, save_prequantized
from hasten.speed.foreign import assign, inner, quantizer
from hasten.speed.linears import FloatLinear, Int8WeightLinear
from hasten.speed.saved import save_quantized
from hasten.speed.swap import size
from tests.pipelines import FAMILIES
from tests.test_quantize import COND, draw, relative, tiny

ROOT = File(__file__).resolve().parent.parent
ON_CPU = ["int8", "int8_weights"]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def linear(into: int = 128, out: int = 96) -> nn.Linear:
    """Whose values bfloat16 holds."""
    made = nn.Linear(into, out).requires_grad_(False)
    for p in made.parameters():
        p.data = p.bfloat16().float()
    return made


def run(pipe: Any, call: dict[str, Any], steps: int = 3) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(**call, num_inference_steps=steps, output_type="latent", generator=generator)[0]


# --- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ON_CPU)
def test_int8_weights_are_those_of_hasten_within_a_step_of_the_grid(dtype):
    given = linear()
    ours, theirs = Int8WeightLinear(given).weights(), TorchaoLinear(given, torch.float32, config(dtype)).weights()
    steps = given.weight.abs().amax(1, keepdim=True) / 127
    assert ((ours - theirs).abs() <= 1.01 * steps).all() and not torch.equal(theirs, given.weight)


def test_int8_answers_what_its_rounded_numbers_say():
    given, x = linear(), torch.randn(20, 128)
    module = TorchaoLinear(given, torch.float32, config("int8"))
    scale = x.abs().amax(1, keepdim=True) / 127.5
    want = (x / scale).round().clamp(-128, 127) * scale @ module.weights().T + given.bias
    assert relative(module(x), want) < 1e-3 < relative(given(x), want)  # a tie may round either way
    only = TorchaoLinear(given, torch.float32, config("int8_weights"))
    torch.testing.assert_close(only(x), x @ only.weights().T + given.bias, atol=1e-5, rtol=1e-5)


def test_what_hasten_emulates_are_torchaos_numbers():
    """MXFP8 bit for bit; NVFP4 up to the order in which its two scales divide."""
    from torchao.prototype import mx_formats as mx

    given = linear()
    assert torch.equal(TorchaoLinear(given, torch.float32, slow()).weights(), FloatLinear(given, "mxfp8").weights())
    theirs = TorchaoLinear(given, torch.float32, mx.NVFP4WeightOnlyConfig()).weights()
    assert relative(theirs, FloatLinear(given, "nvfp4").weights()) < 2e-3 < relative(theirs, given.weight)


def test_configurations_are_torchaos_and_leave_the_process_alone():
    kinds = [("int8", "row"), ("int8_weights", "row"), ("int4_weights", "row"), ("mxfp8", "row"), ("nvfp4", "row")]
    made = [config(*kind) for kind in [*kinds, *(("fp8", scaling) for scaling in ("row", "tensor", "block"))]]
    assert len({type(each).__name__ for each in made}) == 6 and config("int4_weights", group=32).group_size == 32
    assert made[5].granularity != made[7].granularity != made[6].granularity
    assert not any(getattr(each, "set_inductor_config", False) for each in made)  # of the compiler, for all networks


# --- the layer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ON_CPU)
@pytest.mark.parametrize(
    "given", [{}, {"smooth": 0.5}, {"rank": 2}, {"smooth": "search", "rank": 2}, {"smooth": 0.5, "ranges": 2}], ids=str
)
def test_it_acts_and_is_undone_exactly(dtype, given, tmp_path):
    net = tiny()
    want = draw(net)
    file = hasten.calibrate(net, [COND], steps=4, ranges=given.get("ranges", 1)).save(tmp_path / "c.safetensors")
    up = speed_up(net, Quantize(dtype, 32, calibration=file, backend="torchao", **given))
    with up as fast:
        assert 0 < relative(draw(fast), want) < 0.05 and quantizer(fast) == "torchao"
        assert any(isinstance(m, TorchaoLinear) for m in fast.modules())
    assert up.ledger()["quantize"]["layers"] > 0 and torch.equal(draw(net), want)
    assert quantizer(net) is None


def test_the_backend_says_whose_linears_they_are():
    net = tiny()
    for backend, ours in (("auto", True), ("hasten", True), ("torchao", False)):
        with speed_up(net, Quantize("int8", 32, backend=backend)) as fast:
            draw(fast)
            assert ours is not any(isinstance(m, TorchaoLinear) for m in fast.modules())


def test_it_is_smaller_and_says_by_how_much():
    net = tiny(width=64)
    before = size(net)
    up = speed_up(net, Quantize("int8_weights", 32, backend="torchao", keep=False))
    with pytest.raises(NotReversible), up as fast:
        draw(fast)
        saved = up.ledger()["quantize"]["bytes_saved"]
        assert size(net) == before - saved
        linears = [m for m in net.modules() if isinstance(m, TorchaoLinear)]
        held = sum(v.nbytes for m in linears for p in m.parameters() for v in inner(p))
        assert saved > 0.6 * 4 * sum(m.in_features * m.out_features for m in linears) and 0 < held < saved


def test_the_worst_linears_are_kept_within_a_budget(tmp_path):
    net = tiny()
    file = hasten.calibrate(net, [COND], steps=4).save(tmp_path / "c.safetensors")
    up = speed_up(net, Quantize("int8", 32, calibration=file, max_error=0.001, backend="torchao"))
    with up as fast:
        draw(fast)
        found = up.ledger()["quantize"]
    assert found["error"] <= 0.001 and 0 < found["kept_sensitive"] < found["of"]


def test_it_stands_beside_other_layers():
    net = tiny()
    want = draw(net)
    for others, most in (
        ([Cast()], 0.03),
        ([Compile()], 0.02),
        ([Cache(threshold=0.5)], 0.3),
        ([Cache("regions")], 0.3),
    ):
        with speed_up(net, Quantize("int8", 32, backend="torchao"), *others) as fast:
            assert relative(draw(fast), want) < most
        assert torch.equal(draw(net), want)


def test_layerwise_casting_leaves_its_weights_and_biases_alone():
    pipe, call = FAMILIES["sd3"]()
    want = run(pipe, call)
    with speed_up(pipe, Quantize("int8", 8, backend="torchao"), LayerCast(), call=call) as fast:
        assert torch.isfinite(run(fast, call)).all()
        ours = [m for m in pipe.transformer.modules() if isinstance(m, TorchaoLinear)]
        assert ours and not any(p.dtype == torch.float8_e4m3fn for m in ours for p in m.parameters())
    assert torch.equal(run(pipe, call), want)


def test_offloading_it_to_disk_is_refused_before_anything_is_written(tmp_path):
    pipe, call = FAMILIES["sd3"]()
    with pytest.raises(ConfigError, match="diffusers writes no weights of torchao's to disk"):
        speed_up(pipe, Quantize("int8", 8, backend="torchao"), Offload(disk=str(tmp_path)), call=call)
    assert not list(tmp_path.iterdir())


def slow() -> Any:
    """MXFP8 that any machine multiplies."""
    from torchao.prototype import mx_formats as mx
    from torchao.quantization.quantize_.common import KernelPreference

    return mx.MXDynamicActivationMXWeightConfig(kernel_preference=KernelPreference.EMULATED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_part_of_a_sequence_is_taken_as_it_lies(dtype):
    """Attention of text and sample hands slices on, whose samples are apart in memory."""
    given, whole = linear(), torch.randn(2, 9, 128).to(dtype)
    module = TorchaoLinear(given, dtype, slow())
    across = torch.randn(128, 6).to(dtype).T
    assert torch.equal(module(across), module(across.contiguous()))
    out = module(whole[:, 4:])
    assert out.dtype == dtype and out.shape == (2, 5, 96)
    assert (
        torch.equal(out, module(whole[:, 4:].contiguous()))
        and relative(out.float(), given(whole[:, 4:].float())) < 0.06
    )


def linear_bias(module: TorchaoLinear) -> Tensor:
    assert module.bias is not None
    return module.bias.float()


def test_zeros_answer_zeros(monkeypatch):
    """NVFP4 divides by the largest number of a tensor: by torchao zeros alone become NaN, as by what stands for it."""
    module, none = TorchaoLinear(linear(), torch.float32, slow()), torch.zeros(3, 128)
    assert module.divides is False
    module.divides = True
    divided = SimpleNamespace(linear=lambda rows, weight: (rows / rows.abs().amax()) @ torch.ones(128, 96).bfloat16())
    monkeypatch.setattr(ao, "F", divided)
    assert module(none + 1).isfinite().all() and divided.linear(none.bfloat16(), None).isnan().all()
    assert torch.equal(module(none), linear_bias(module).expand(3, -1))
    net = tiny()
    assert products.takes(Quantize("nvfp4"), net.blocks[0].image.up.weight)
    assert not products.takes(Quantize("nvfp4"), torch.zeros(64, 64)) and products.takes(
        Quantize("int8"), torch.zeros(8, 8)
    )


def test_a_weight_is_given_other_values_part_by_part():
    one, other = (TorchaoLinear(linear(), torch.float32, config("int8")) for _ in range(2))
    assert not torch.equal(one.weights(), other.weights())
    assign(one.weight, other.weight.data)
    assert torch.equal(one.weights(), other.weights())
    plain = nn.Parameter(torch.zeros(2))
    assign(plain, torch.ones(2))
    assert plain.tolist() == [1, 1]


def test_what_is_quantized_already_stands_beside_both_layers():
    net = tiny()
    net.blocks[0].image.up.weight = TorchaoLinear(net.blocks[0].image.up, torch.float32, config("int8")).weight
    with speed_up(net, Quantize("int8", 32), LayerCast()) as fast:
        assert torch.isfinite(draw(fast)).all()


@pytest.mark.parametrize("family", ["sd3", "flux", "sdxl", "wan"])
def test_pipelines(family):
    pipe, call = FAMILIES[family]()
    want = run(pipe, call)
    with speed_up(pipe, Quantize("int8", 8, backend="torchao"), call=call) as fast:
        got = run(fast, call)
        with pytest.raises(ConfigError, match="weights of torchao"):
            save_quantized(pipe.unet if family == "sdxl" else pipe.transformer, "never.safetensors")
    assert not torch.equal(got, want) and torch.isfinite(got).all() and torch.equal(run(pipe, call), want)


def test_there_is_no_gradient():
    module = TorchaoLinear(linear(), torch.float32, config("int8"))
    with pytest.raises(ConfigError, match="no gradient"):
        module(torch.randn(3, 128, requires_grad=True))


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"dtype": "int4_weights", "backend": "torchao"},
            "no torchao's int4_weights product on cpu; leave",
        ),
        ({"dtype": "mxfp8"}, "no torchao's mxfp8 product on cpu; emulate=True measures quality"),
        ({"dtype": "fp8", "scaling": "block"}, "no torchao's fp8 in blocks product on cpu; emulate=True"),
        ({"dtype": "nvfp4", "backend": "hasten"}, "nvfp4 has no fast product of hasten's own; leave backend out"),
    ],
    ids=str,
)
def test_what_a_cpu_cannot_multiply_is_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        speed_up(tiny(), Quantize(min_side=32, **fields))


@pytest.mark.parametrize(
    ("fields", "able", "refused"),
    [
        ({"dtype": "int8"}, (8, 0), False),
        ({"dtype": "int8", "backend": "torchao"}, (7, 5), True),
        ({"dtype": "int8_weights"}, (7, 5), False),
        ({"dtype": "int4_weights", "backend": "torchao"}, (8, 0), False),
        ({"dtype": "fp8"}, (8, 6), True),
        ({"dtype": "fp8", "scaling": "block"}, (8, 9), False),
        ({"dtype": "mxfp8"}, (9, 0), True),
        ({"dtype": "nvfp4"}, (10, 0), False),
        ({"dtype": "nvfp4", "emulate": True}, (7, 5), False),
    ],
    ids=str,
)
def test_what_a_gpu_can_multiply_follows_from_its_capability(fields, able, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: able)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    if refused:
        with pytest.raises(ConfigError, match="A GPU is below compute capability"):
            products.refuse(Quantize(**fields), torch.device("cuda"))
    else:
        products.refuse(Quantize(**fields), torch.device("cuda"))


def test_sides_are_multiples_of_what_the_products_need():
    want = {("int8", "row"): 8, ("fp8", "row"): 16, ("fp8", "block"): 128, ("mxfp8", "row"): 32, ("nvfp4", "row"): 16}
    assert {k: products.multiple(Quantize(k[0], scaling=k[1])) for k in want} == want
    assert products.multiple(Quantize("int4_weights", group=128, backend="torchao")) == 128
    assert products.multiple(Quantize("int4_weights")) == products.multiple(Quantize("nvfp4", emulate=True)) == 1


def test_without_the_package_the_words_say_what_to_install(monkeypatch):
    monkeypatch.setattr(products, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"by torchao needs that package: pip install 'hasten\[torchao\]'"):
        speed_up(tiny(), Quantize("int8", 32, backend="torchao"))
    with speed_up(tiny(), Quantize("int8", 32)) as fast:
        draw(fast)


def test_a_weight_that_torchao_leaves_is_an_error():
    with pytest.raises(ConfigError, match="torchao does not round a linear of 96x96 so; name it in skip"):
        TorchaoLinear(linear(96), torch.float32, config("int4_weights", group=128))


# --- folders of diffusers -----------------------------------------------------------------------------------------

READ = """
import json, sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
call = json.loads(sys.argv[3])
out = pipe(**call, num_inference_steps=3, output_type="latent", generator=torch.Generator().manual_seed(0))[0]
torch.save(out, sys.argv[2])
assert "hasten" not in sys.modules
"""


@pytest.mark.parametrize(("family", "dtype"), [("sd3", "int8"), ("flux", "int8_weights"), ("sdxl", "int8")])
def test_a_folder_is_read_by_diffusers_alone_in_a_fresh_process(family, dtype, tmp_path):
    pipe, call = FAMILIES[family]()
    call = {k: v for k, v in call.items() if isinstance(v, (str, int, float))}
    folder, out = tmp_path / "pipe", tmp_path / "out.pt"
    name = "unet" if family == "sdxl" else "transformer"
    pipe.save_pretrained(folder)
    before = dict(getattr(pipe, name).config)
    with speed_up(pipe, Quantize(dtype, 8, backend="torchao"), call=call) as fast:
        want = run(fast, call)
        save_prequantized(getattr(pipe, name), folder / name)
    assert dict(getattr(pipe, name).config) == before and not hasattr(getattr(pipe, name), "hf_quantizer")
    assert json.loads((folder / name / "config.json").read_text())["quantization_config"]["quant_method"] == "torchao"
    assert not list(folder.rglob("*.bin"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", READ, str(folder), str(out), json.dumps(call)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(torch.load(out, weights_only=True), want, atol=1e-5, rtol=1e-5)
    again = load_pipeline(str(folder))
    assert quantizer(getattr(again, name)) == "torchao" and hasten.denoiser(again, call).blocks


def test_a_folder_of_shards_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    pipe, call = FAMILIES["sd3"]()
    folder = tmp_path / "transformer"
    pipe.transformer.save_pretrained(folder, max_shard_size="60KB")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert len(before) > 3
    import safetensors.torch as theirs

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with speed_up(pipe, Quantize("int8", 8, backend="torchao"), call=call) as fast:
        run(fast, call)
        with monkeypatch.context() as patch, pytest.raises(ConfigError, match="the disk is full"):
            patch.setattr(theirs, "save_file", full)
            save_prequantized(pipe.transformer, folder)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
        save_prequantized(pipe.transformer, folder)
    assert sorted(f.name for f in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    type(pipe.transformer).from_pretrained(folder, torch_dtype=torch.float32)


def test_formats_that_diffusers_cannot_run_in_the_networks_dtype_are_refused(tmp_path):
    pipe, _ = FAMILIES["sd3"]()
    pipe.transformer.transformer_blocks[0].attn.to_q = TorchaoLinear(linear(32, 32), torch.float32, slow())
    with pytest.raises(ConfigError, match="multiplies in bfloat16 and SD3Transformer2DModel is in torch.float32"):
        save_prequantized(pipe.transformer, tmp_path / "t")
    pipe.transformer.transformer_blocks[0].attn.to_q = shared = TorchaoLinear(
        linear(32, 32), torch.float32, config("int8")
    )
    pipe.transformer.transformer_blocks[0].attn.to_k = shared
    with pytest.raises(ConfigError, match="has a linear at two places"):
        save_prequantized(pipe.transformer, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_what_the_folder_cannot_hold_is_refused(tmp_path):
    pipe, call = FAMILIES["sd3"]()
    net, folder = pipe.transformer, tmp_path / "transformer"
    with pytest.raises(ConfigError, match="has no weights of torchao's; save it inside speed_up"):
        save_prequantized(net, folder)
    with pytest.raises(ConfigError, match="DiT is no diffusers model; write hasten's own with save_quantized"):
        save_prequantized(tiny(), folder)
    for layer in (Quantize("int8", 8), Quantize("int8", 8, backend="torchao", rank=2)):
        with speed_up(pipe, layer, call=call) as fast:
            run(fast, call)
            with pytest.raises(ConfigError, match="holds what diffusers' format cannot .*without smooth, rank and"):
                save_prequantized(net, folder)
    assert not folder.exists()


# --- on a GPU -----------------------------------------------------------------------------------------------------

GPU: list[dict[str, Any]] = [
    {"dtype": "int8"}, {"dtype": "int8_weights"}, {"dtype": "int4_weights"}, {"dtype": "fp8"},
    {"dtype": "fp8", "scaling": "tensor"}, {"dtype": "fp8", "scaling": "block"}, {"dtype": "mxfp8"}, {"dtype": "nvfp4"},
]  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", GPU, ids=str)
def test_on_a_gpu_it_is_its_emulation_or_refused(fields, dtype):
    net = tiny(width=256).cuda().to(dtype)
    x, t, cond = torch.randn(4, 1, 4, 4).cuda().to(dtype), torch.full((4,), 0.5).cuda(), {"label": COND["label"].cuda()}
    layer = Quantize(min_side=128, backend="torchao", **fields)
    with torch.no_grad():
        want = net(x, t, cond)
    try:
        products.refuse(layer, x.device)
    except ConfigError:
        with pytest.raises(ConfigError):
            speed_up(net, layer)
        return
    emulated: Any = {} if fields["dtype"].startswith("int") else {"emulate": True}
    with speed_up(net, Quantize(min_side=128, **fields, **emulated)) as fast, torch.no_grad():
        ours = fast(x, t, cond)
    with speed_up(net, layer) as fast, torch.no_grad():
        theirs = fast(x, t, cond)
    assert 0 < relative(theirs, want) < 0.3 and relative(theirs, ours) < relative(ours, want) + 0.01
    with torch.no_grad():
        assert torch.equal(net(x, t, cond), want)
