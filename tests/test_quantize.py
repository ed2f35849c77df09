"""Quantized networks: calibration, which linears, budgets, undo in every family and dtype, memory, files, refusals."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from hasten.core.denoiser import Batch
from hasten.core.errors import CheckpointError, ConfigError, NotReversible
from hasten.core.method import Sampling, even
from hasten.core.sample import sample
from hasten.models.dit import DiT, DiTConfig
from hasten.speed import Cache, Compile, Guidance, Quantize, Times, as_dict, from_dict, speed_up
from hasten.speed import quantize as module
from hasten.speed.calibrate import Calibration, calibrate
from hasten.speed.host import host
from hasten.speed.linears import (
    RANGE,
    Int8Linear,
    Ranged,
    places,
)
from hasten.speed.saved import save_quantized
from tests.pipelines import FAMILIES


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def tiny(**fields: Any) -> Any:
    net = DiT(DiTConfig(**{"size": (4, 4), "width": 32, "depth": 2, "heads": 2, "classes": 3, **fields}))
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "modulation" in name or name.startswith("last"):
                p.normal_(std=0.1)
    return net


COND = {"label": torch.arange(4) % 3}


def draw(net: Any, steps: int = 6, seed: int = 0) -> Tensor:
    noise = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return sample(net, noise, COND, Sampling(even(steps)))


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


# --- calibration ----------------------------------------------------------------------------------------------


def test_a_calibration_is_what_the_linears_saw(tmp_path):
    net, seen = tiny(), []
    handle = net.blocks[1].image.up.register_forward_pre_hook(
        lambda m, args: seen.append(args[0].flatten(0, 1).clone())
    )
    found = calibrate(net, [COND, COND], 6, ranges=2, rows=50)
    handle.remove()
    whole = found.linears["blocks.1.image.up"]
    assert len(seen) == 12 and len(found.times) == 6 and len(found.calls) == 12
    early = [torch.cat([v for i, v in enumerate(seen) if (i % 6 < 3) == first]) for first in (False, True)]
    torch.testing.assert_close(whole.high, torch.stack([v.abs().amax(0) for v in early]))
    torch.testing.assert_close(whole.mean, torch.stack([v.abs().mean(0) for v in early]))
    assert found.edges == (pytest.approx(7 / 12),) and whole.rows.shape == (50, 32)
    everything = torch.cat(seen)
    for row, when in zip(whole.rows, whole.when, strict=True):
        assert (everything == row).all(1).any() and (early[int(when)] == row).all(1).any()
    assert set(whole.when.tolist()) == {0, 1}
    assert not found.linears["blocks.0.image.modulation"].tokens and whole.tokens
    assert "forward" not in vars(net) and not net.blocks[1].image.up._forward_pre_hooks
    back = Calibration.load(found.save(tmp_path / "c.safetensors"))
    assert back.fingerprint == found.fingerprint and back.edges == found.edges and back.times == found.times
    for name, mine in found.linears.items():
        assert all(
            torch.equal(getattr(mine, k), getattr(back.linears[name], k)) for k in ("high", "mean", "rows", "when")
        )
    for mine, other in zip(found.calls, back.calls, strict=True):
        assert torch.equal(net(**mine), net(**other))


def test_runs_are_conditions_batches_or_functions():
    net = tiny()
    batch = Batch(COND, {"label": torch.full((4,), 3)}, (4, 1, 4, 4))
    guided = calibrate(net, [batch], Sampling(even(5), cfg_scale=2.0))
    drawn = calibrate(net, [lambda model: draw(model, 5)])
    assert len(guided.times) == len(drawn.times) == 5 and guided.linears.keys() == drawn.linears.keys()
    assert {len(call["x_t"]) for call in guided.calls} == {8}
    for runs, words in (([], "list of runs"), ("a bicycle", "list of runs"), (["a bicycle"], "is its conditions")):
        with pytest.raises(ConfigError, match=words):
            calibrate(net, runs)
    with pytest.raises(ConfigError, match="visited 3 times, too few for 4 ranges"):
        calibrate(net, [COND], 3, ranges=4)


def test_a_calibration_of_another_network_is_refused(tmp_path):
    net, file = tiny(), str(tmp_path / "c.safetensors")
    how = Quantize("int8_static", 32, calibration=calibrate(net, [COND], 4).save(file))
    with speed_up(net, how):
        pass
    for other in (tiny(), tiny(width=64)):
        with pytest.raises(CheckpointError, match="calibrated with another weights"):
            speed_up(other, how)
    with pytest.raises(ConfigError, match="ranges=3, but .* has 1"):
        speed_up(net, Quantize("int8_static", 32, calibration=file, ranges=3))
    calibrate(net, [COND], 4, calls=0).save(file)
    with pytest.raises(ConfigError, match="holds no calls"):
        speed_up(net, Quantize("int8", 32, calibration=file, max_error=0.1))
    with pytest.raises(CheckpointError, match="Cannot read the calibration"):
        speed_up(net, Quantize("int8_static", 32, calibration=str(tmp_path / "none")))
    with speed_up(net, Quantize(min_side=32)):
        save_quantized(net, file)
    with pytest.raises(CheckpointError, match="is no calibration"):
        speed_up(net, how)


def test_a_linear_without_tokens_is_left_whatever_its_name(tmp_path):
    class Renamed(nn.Module):
        def __init__(self, net: Any):
            super().__init__()
            self.inner, self.path, self.kind, self.config = net, net.path, net.kind, net.config
            for block in net.blocks:
                block.image.mix = block.image.modulation
                del block.image.modulation
                block.image.modulation = lambda c, mix=block.image.mix: mix(c)
            self.blocks = net.blocks

        def forward(self, x_t: Tensor, t: Tensor, cond: Any, **kwargs: Any) -> Tensor:
            return self.inner(x_t, t, cond, **kwargs)

    net = Renamed(tiny())
    file = calibrate(net, [COND], 3).save(tmp_path / "c.safetensors")
    for calibration, layers in ((None, 10), (file, 8)):
        up = speed_up(net, Quantize(min_side=32, calibration=calibration))
        with up as fast:
            draw(fast)
        assert up.ledger()["quantize"]["layers"] == layers


# --- the transform --------------------------------------------------------------------------------------------

ALL = [
    {"dtype": "int8"}, {"dtype": "int8_static"}, {"dtype": "int8_weights"}, {"dtype": "int4_weights", "group": 32},
    {"dtype": "fp8", "emulate": True}, {"dtype": "fp8", "emulate": True, "scaling": "block"},
    {"dtype": "fp8", "emulate": True, "scaling": "tensor"}, {"dtype": "mxfp8", "emulate": True},
    {"dtype": "nvfp4", "emulate": True}, {"dtype": "int8", "smooth": 0.5},
    {"dtype": "int8", "smooth": 0.5, "ranges": 2},
    {"dtype": "int4_weights", "smooth": "search", "rank": 2}, {"dtype": "int8_static", "ranges": 2, "rank": 1},
]  # fmt: skip
NEEDS = {"int8_static"}


@pytest.mark.parametrize(
    ("family", "stacks"), [("dit", ALL), ("flux", ALL[1::4]), ("wan", ALL[2::4]), ("z_image", ALL[3::4])]
)
def test_undo_is_bit_exact_in_every_dtype_and_family(family, stacks, tmp_path):
    pipe, call = FAMILIES[family]()
    pipe.set_progress_bar_config(disable=True)
    file = str(tmp_path / "c.safetensors")
    subject = call.get("prompt", 1)
    found = calibrate(pipe, [subject, {"guidance_scale": 2.0}], 3, ranges=2, call=call, rows=16)
    assert found.save(file) == file and len(found.times) == 3

    def run(p: Any) -> Tensor:
        return torch.as_tensor(p(**call, num_inference_steps=2, output_type="np", generator=torch.manual_seed(0))[0])

    at = host(pipe, call)
    before, want = [(id(p), p.data_ptr()) for p in at.net.parameters()], run(pipe)
    for fields in stacks:
        calibration = file if "smooth" in fields or fields["dtype"] in NEEDS else None
        how = Quantize(min_side=8, calibration=calibration, **fields)
        up = speed_up(pipe, how, call=call)
        with up as fast:
            got = run(fast)
        counts = up.ledger()["quantize"]
        assert counts["layers"] > 0 and 0 < counts["share"] < 1 and relative(got, want) < 0.6
        assert not torch.equal(got, want) and torch.equal(run(pipe), want), how
        assert [(id(p), p.data_ptr()) for p in at.net.parameters()] == before
        assert "forward" not in vars(at.net)


@pytest.mark.parametrize("fields", [f for f in ALL if "ranges" not in f], ids=str)
def test_every_dtype_compiles_into_one_graph_a_block(fields, tmp_path):
    net = tiny()
    how = Quantize(min_side=32, calibration=calibrate(net, [COND], 3).save(tmp_path / "c.safetensors"), **fields)
    with speed_up(net, how) as fast:
        want = draw(fast)
    up = speed_up(net, how, Compile(backend="eager"))
    with up as fast:
        assert relative(draw(fast), want) < 1e-4
    assert up.ledger()["compile"]["graphs"] == 1


def test_modulation_under_its_other_names_stays_as_it_is():
    pipe, call = FAMILIES["flux"]()
    with speed_up(pipe, Quantize(min_side=8), call=call):
        left = {name for name, m in pipe.transformer.named_modules() if isinstance(m, nn.Linear) and "blocks" in name}
    assert left and all("norm" in name for name in left)


@pytest.mark.parametrize(("first", "last", "blocks"), [(0, 0, {0, 1, 2}), (1, 0, {1, 2}), (0, 2, {0}), (1, 1, {1})])
def test_blocks_at_the_ends_can_be_left(first, last, blocks):
    net = tiny(depth=3)
    with speed_up(net, Quantize(min_side=32, skip_first=first, skip_last=last)):
        assert {i for i, b in enumerate(net.blocks) if any(isinstance(m, Int8Linear) for m in b.modules())} == blocks
    with pytest.raises(ConfigError, match="none of 15 linears qualifies"):
        speed_up(net, Quantize(min_side=32, skip_first=2, skip_last=2))


def test_each_range_of_times_runs_its_own_weights(tmp_path):
    net, x, seen = tiny(), torch.randn(4, 1, 4, 4), []
    file = calibrate(net, [COND], 8, ranges=2).save(tmp_path / "c.safetensors")
    edge = Calibration.load(file).edges[0]
    how = Quantize("int8_static", 32, ranges=2, calibration=file)
    with speed_up(net, how) as fast:
        layer: Any = net.blocks[0].image.up
        assert isinstance(layer, Ranged) and layer.parts[0].step != layer.parts[1].step
        for i, part in enumerate(layer.parts):
            part.register_forward_pre_hook(lambda m, args, i=i: seen.append(i))
        for t in (edge - 0.01, edge + 0.01, 0.99, 0.01):
            fast(x, torch.full((4,), t), COND)
        with pytest.raises(ConfigError, match="different ranges"):
            fast(x, torch.linspace(0, 1, 4), COND)
        assert RANGE.get() == 0
        with pytest.raises(ConfigError, match="cannot be saved"):
            save_quantized(net, tmp_path / "q.safetensors")
    assert seen == [0, 1, 1, 0]
    with pytest.raises(ConfigError, match="cannot change weights with the time"):
        speed_up(net, how, Compile(backend="eager"))


def test_the_worst_linear_is_kept_until_the_error_is_within_the_budget(tmp_path):
    net = tiny(depth=3)
    with torch.no_grad():  # one input is so large that the others of every token round to nothing, and is not used
        net.blocks[1].image.up.bias[0], net.blocks[1].image.down.weight[:, 0] = 300, 0
    want, file = draw(net), calibrate(net, [COND], 20).save(tmp_path / "c.safetensors")
    errors = {}
    for budget in (10.0, 0.03, 0.004):
        up = speed_up(net, Quantize("int8", 32, max_error=budget, calibration=file))
        with up:
            kept = [n for n, m in net.named_modules() if type(m) is nn.Linear and "blocks" in n and "modul" not in n]
            calls = Calibration.load(file).calls
            with torch.no_grad():
                mine = torch.cat([net(**c) for c in calls])
        with torch.no_grad():
            exact = torch.cat([net(**c) for c in calls])
        counts = up.ledger()["quantize"]
        errors[budget] = counts["error"]
        assert counts["error"] == pytest.approx(relative(mine, exact), rel=1e-3) and counts["error"] <= budget
        assert counts["kept_sensitive"] == len(kept) and counts["layers"] == 12 - len(kept)
        assert (not kept) if budget == 10 else "blocks.1.image.down" in kept
        assert budget != 0.03 or len(kept) == 1
    assert errors[10.0] > 0.03 and torch.equal(draw(net), want)
    file = calibrate(net, [COND], 20, ranges=2).save(file)
    up = speed_up(net, Quantize("int8", 32, smooth=0.5, ranges=2, max_error=0.03, calibration=file))
    with up, torch.no_grad():
        mine = torch.cat([net(**c) for c in Calibration.load(file).calls])
    assert up.ledger()["quantize"]["error"] == pytest.approx(relative(mine, exact), rel=1e-3)
    assert "forward" not in vars(net)
    with pytest.raises(ConfigError, match="no layer can be rounded within max_error=1e-09"):
        with speed_up(net, Quantize("int8", 32, max_error=1e-9, calibration=file)):
            pass
    assert torch.equal(draw(net), want)


@pytest.mark.parametrize(
    ("fields", "share"),
    [({"dtype": "int8"}, 0.29), ({"dtype": "int4_weights"}, 0.17), ({"dtype": "nvfp4", "emulate": True}, 0.19),
     ({"dtype": "fp8", "emulate": True}, 0.29), ({"dtype": "mxfp8", "emulate": True}, 0.31)],
    ids=lambda v: v["dtype"] if isinstance(v, dict) else "",
)  # fmt: skip
def test_keep_false_frees_each_linear_before_the_next_is_made(fields, share, monkeypatch):
    net = tiny(width=128)
    chosen = [m for _, m in net.named_modules() if type(m) is nn.Linear and min(m.weight.shape) >= 128]
    linears = [m for m in chosen if m.out_features != 6 * 128 and m.in_features != 64]
    linears = [m for m in linears if any(m in list(b.modules()) for b in net.blocks)]
    refs = [StorageWeakRef(m.weight.untyped_storage()) for m in linears]
    size = sum(m.weight.nbytes + m.bias.nbytes for m in linears)
    whole = sum(v.nbytes for v in [*net.parameters(), *net.buffers()])
    del chosen, linears
    gone, inner = [], module.small
    monkeypatch.setattr(module, "small", lambda *args: (gone.append(sum(r.expired() for r in refs)), inner(*args))[1])
    up = speed_up(net, Quantize(min_side=128, keep=False, **fields))
    with pytest.raises(NotReversible, match="keep=False"), up:
        gc.collect()
        assert all(ref.expired() for ref in refs) and gone == list(range(8))
        left = sum(v.nbytes for v in [*net.parameters(), *net.buffers()])
        assert up.ledger()["quantize"]["bytes_saved"] == whole - left > (1 - share) * size
    draw(net)


# --- calibrated on the way, and skipped -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [{"smooth": 0.5}, {"dtype": "int8_static", "smooth": "search", "ranges": 2}], ids=str
)
def test_a_pipeline_is_calibrated_by_its_own_call(fields: dict[str, Any], tmp_path):
    pipe, call = FAMILIES["sd3"]()
    file = calibrate(pipe, [{}], call=call, ranges=fields.get("ranges", 1)).save(tmp_path / "c.safetensors")

    def latents() -> Tensor:
        fixed = {"generator": torch.Generator().manual_seed(1), "output_type": "latent", "num_inference_steps": 3}
        return pipe(**call, **fixed)[0]

    seen, plain = [], latents()
    for given in (None, file):
        with speed_up(pipe, Quantize(min_side=8, calibration=given, **fields), call=call):
            seen.append(latents())
    assert torch.equal(*seen) and torch.equal(latents(), plain) and not torch.equal(seen[0], plain)


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"smooth": 0.5}, r"smooth=0\.5"), ({"dtype": "int8_static"}, "static"), ({"max_error": 0.1}, r"max_error=0\.1")],
    ids=str,
)
def test_a_native_denoiser_needs_its_calibration(fields: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words + r".* needs a calibration; give calibration=hasten\.calibrate"):
        speed_up(tiny(), Quantize(min_side=8, **fields))


def test_a_calibration_of_its_own_is_made_once_and_before_times(monkeypatch: pytest.MonkeyPatch):
    pipe, call = FAMILIES["sd3"]()
    made = []
    monkeypatch.setattr("hasten.speed.calibrate.calibrate", lambda *a, **k: made.append(k) or calibrate(*a, **k))
    for _ in range(2):
        with speed_up(pipe, Times((1.0, 0.7, 0.3)), Quantize(min_side=8, smooth=0.5), call=call) as fast:
            fast(**call, num_inference_steps=3, output_type="latent")
    assert len(made) == 1 and made[0]["calls"] == 0
    with torch.no_grad():
        next(pipe.transformer.parameters()).add_(0.01)
    with speed_up(
        pipe, Quantize(min_side=8, smooth=0.5, max_error=0.9), call={**call, "num_inference_steps": 4}
    ) as fast:
        fast(**call, num_inference_steps=4, output_type="latent")
    assert len(made) == 2 and made[1]["calls"] == 32, "other weights are calibrated again"


def test_a_stack_of_four_layers_needs_no_preparation():
    pipe, call = FAMILIES["sd3"]()
    fixed = {"num_inference_steps": 12, "output_type": "latent"}
    layers = [Quantize("int8", 8, smooth=0.5), Cache("easycache", threshold=0.5), Guidance(interval=(0.1, 0.8))]
    up = speed_up(pipe, *layers, Compile(backend="eager"), call=call)
    with up as fast:
        fast(**call, **fixed)
        said = up.ledger()
    assert said["quantize"]["layers"] > 0 and said["cache"]["reused"] > 0
    assert said["guidance"] and said["compile"], said


def test_skipped_linears_stay():
    net = tiny()
    chosen = [path for path, _, _, _ in places(host(net)) if "modulation" not in path]
    with speed_up(net, Quantize(min_side=8)) as fast:
        rounded = {name for name, m in fast.named_modules() if isinstance(m, Int8Linear)}
        draw(fast)
    with speed_up(net, Quantize(min_side=8, skip=chosen[:2])) as fast:
        left = {name for name, m in fast.named_modules() if isinstance(m, Int8Linear)}
        draw(fast)
    assert rounded - left == set(chosen[:2])
    with pytest.raises(ConfigError, match="did you mean"):
        speed_up(net, Quantize(min_side=8, skip=[chosen[0] + "x"]))
    assert from_dict(as_dict(Quantize(skip=chosen[:2]))) == Quantize(skip=tuple(chosen[:2]))


# --- what is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dtype": "int4"}, "did you mean"),
        ({"smooth": 1.5}, "from 0 to 1 or 'search'"),
        ({"smooth": "serch"}, "or 'search'"),
        ({"keep": "no"}, "keep must be True or False"),
        ({"skip": "blocks.0"}, "skip must be a list of names"),
        ({"max_error": 0}, "above 0"),
        ({"ranges": 2}, "ranges change smoothing"),
        ({"ranges": 0}, "ranges must be a whole number from 1"),
        ({"rank": -1}, "rank must be"),
        ({"group": 48, "dtype": "int4_weights"}, "32, 64 or 128"),
        ({"group": 128}, "group is for int4_weights, not for int8"),
        ({"scaling": "block"}, "scaling is for fp8"),
        ({"scaling": "rows", "dtype": "fp8"}, "did you mean 'row'"),
        ({"emulate": True}, "emulate is for fp8 and mxfp8 and nvfp4"),
        ({"skip_first": True}, "skip_first must be"),
        ({"backend": "torcha"}, "did you mean 'torchao'"),
        ({"dtype": "int8_static", "backend": "torchao"}, "int8_static is hasten's own"),
        ({"dtype": "fp8", "emulate": True, "backend": "torchao"}, "emulate is hasten's own"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        Quantize(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"dtype": "fp8"}, "no fp8 product on cpu"), ({"dtype": "fp8", "scaling": "block"}, "fp8 in blocks product"),
     ({"dtype": "nvfp4"}, "no torchao's nvfp4 product"), ({"dtype": "mxfp8"}, "emulate=True measures quality")],
    ids=str,
)  # fmt: skip
def test_what_this_machine_cannot_multiply_is_refused_but_emulated(fields, words):
    net = tiny()
    with pytest.raises(ConfigError, match=words):
        speed_up(net, Quantize(min_side=32, **fields))
    want = draw(net)
    with speed_up(net, Quantize(min_side=32, emulate=True, **fields)) as fast:
        assert 0 < relative(draw(fast), want) < 0.2


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with fp8"
)
@pytest.mark.parametrize("scaling", ["row", "tensor"])
def test_fp8_on_a_gpu_is_its_emulation(scaling):
    net = tiny(width=64).cuda()
    x, t, cond = torch.randn(4, 1, 4, 4).cuda(), torch.full((4,), 0.5).cuda(), {"label": COND["label"].cuda()}
    outs = []
    for emulate in (False, True):
        with speed_up(net, Quantize("fp8", 64, scaling=scaling, emulate=emulate)) as fast:
            outs.append(fast(x, t, cond))
    assert relative(outs[0], outs[1]) < 0.02
