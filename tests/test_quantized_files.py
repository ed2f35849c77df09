"""Quantized networks as files: written, read bit for bit, refused where they belong to another network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hasten.core.errors import CheckpointError, ConfigError
from hasten.speed import Quantize, speed_up
from hasten.speed.calibrate import calibrate
from hasten.speed.saved import load_quantized, save_quantized
from tests.pipelines import FAMILIES
from tests.test_quantize import ALL, COND, draw, tiny


@pytest.mark.parametrize("fields", [f for f in ALL if "ranges" not in f], ids=str)
def test_a_quantized_network_is_saved_and_loaded_bit_for_bit(fields, tmp_path):
    net, file = tiny(), tmp_path / "q.safetensors"
    net.blocks[1].image.qkv = net.blocks[0].image.qkv  # a linear at two places
    calibration = calibrate(net, [COND], 3).save(tmp_path / "c.safetensors")
    with speed_up(net, Quantize(min_side=32, calibration=calibration, **fields)) as fast:
        want = draw(fast)
        save_quantized(fast, file)
    other = tiny()
    other.blocks[1].image.qkv = other.blocks[0].image.qkv
    loaded = load_quantized(other, file)
    assert loaded is other and torch.equal(draw(loaded), want)
    assert loaded.blocks[1].image.qkv is loaded.blocks[0].image.qkv and not isinstance(
        loaded.blocks[0].image.qkv, nn.Linear
    )


def test_a_pipelines_network_is_loaded_from_the_meta_device(tmp_path):
    pipe, call = FAMILIES["flux"]()
    pipe.set_progress_bar_config(disable=True)
    run = lambda p: p(**call, num_inference_steps=2, output_type="latent", generator=torch.manual_seed(0))[0]  # noqa: E731
    file = tmp_path / "q.safetensors"
    with speed_up(pipe, Quantize(min_side=8), call=call) as fast:
        want = run(fast)
        save_quantized(pipe.transformer, file)
    with torch.device("meta"):
        empty = type(pipe.transformer).from_config(pipe.transformer.config)
    pipe.transformer = load_quantized(empty.eval(), file)
    assert torch.equal(run(pipe), want)


def test_files_of_other_networks_are_refused_and_change_nothing(tmp_path):
    net, file = tiny(), tmp_path / "q.safetensors"
    with pytest.raises(ConfigError, match="no quantized linear"):
        save_quantized(net, file)
    with speed_up(net, Quantize(min_side=32)):
        save_quantized(net, file)
    for other in (tiny(width=64), tiny(depth=1)):
        want = draw(other)
        with pytest.raises(CheckpointError, match="another network"):
            load_quantized(other, file)
        assert torch.equal(draw(other), want)
    with pytest.raises(CheckpointError, match="holds a DiT, not a Linear"):
        load_quantized(nn.Linear(2, 2), file)
    with pytest.raises(CheckpointError, match="Cannot read"):
        load_quantized(net, tmp_path / "none")
