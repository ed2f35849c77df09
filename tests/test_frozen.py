"""Frozen linears in int8 and int4: their grids, gradients through them, their bytes, and the way back."""

from __future__ import annotations

import copy
from pathlib import Path as File
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.core.errors import CheckpointError, UnsupportedModel
from hasten.frozen import QuantizedLinear, dequantize, pack, quantize, round_blocks, unpack
from hasten.lora import LoRA, LoRALinear, QuantizedLoRALinear, merge, view

dtypes = pytest.mark.parametrize("dtype", ["int8", "int4"])
SHAPES = [(8, 128), (5, 100), (3, 7), (4, 64)]


def linear(rows: int, columns: int, seed: int = 0, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(columns, rows, bias).requires_grad_(False)


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_weight_is_within_half_a_step_of_its_group(dtype: Any, shape: tuple[int, int]):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, shape[0])[:, None]
    packed, scale = quantize(weight, dtype)
    back = dequantize(packed, scale, shape[1], torch.float32)
    group = shape[1] if dtype == "int8" else min(64, shape[1] + shape[1] % 2)
    steps = scale.float().repeat_interleave(group, 1)[:, : shape[1]]
    largest = torch.stack([g.abs().amax(1) for g in weight.split(group, 1)], 1)
    top, near = (127, 1e-6) if dtype == "int8" else (7, 4e-3)  # bfloat16
    assert torch.allclose(scale.float(), largest / top, rtol=near)
    assert ((back - weight).abs() <= (0.5 + 1e-4 + near * top * (dtype == "int4")) * steps).all()
    assert (back - weight).abs().max() > 0
    again = quantize(back, dtype)
    assert torch.equal(dequantize(*again, shape[1], torch.float32), back)  # what is on the grid stays


def test_packing_and_unpacking_are_inverse():
    every = torch.stack(torch.meshgrid(torch.arange(-8, 8), torch.arange(-8, 8), indexing="ij"), -1).to(torch.int8)
    packed = pack(every)  # all 256 pairs
    assert packed.dtype == torch.uint8 and packed.shape == (16, 16, 1) and packed.unique().numel() == 256
    assert torch.equal(unpack(packed), every)
    assert int(packed[0, 1]) == 0 + (1 << 4)  # -8 below, -7 above


@dtypes
def test_zeros_stay_zeros(dtype: Any):
    weight = torch.zeros(2, 128)
    weight[0, 70] = -3.0
    back = dequantize(*quantize(weight, dtype), 128, torch.float32)
    assert back[1].count_nonzero() == 0 and back[0].count_nonzero() == 1 and back[0, 70] == pytest.approx(-3, rel=4e-3)


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_are_those_of_the_dequantized_linear(dtype: Any, shape: tuple[int, int]):
    plain = linear(*shape).double()
    small = QuantizedLinear(plain, dtype)
    assert small.weight.dtype == torch.float64
    x = torch.randn(2, 3, shape[1], dtype=torch.float64, requires_grad=True)
    mine, want = small(x), F.linear(x, small.weight, plain.bias)
    assert torch.allclose(mine, want, atol=1e-12) and not torch.allclose(mine, plain(x), atol=1e-6)
    g = torch.randn(mine.shape, dtype=torch.float64)
    (a,), (b,) = (torch.autograd.grad(y, x, g, create_graph=True) for y in (mine, want))
    assert torch.allclose(a, b, atol=1e-12)
    assert torch.autograd.gradcheck(small, (x,)) and torch.autograd.gradgradcheck(small, (x,))
    v = torch.randn_like(x)
    along = torch.func.jvp(small, (x.detach(),), (v,))[1]
    assert torch.allclose(along, F.linear(v, small.weight), atol=1e-12)
    assert all(p.grad is None and not p.requires_grad for p in small.parameters())


@dtypes
@pytest.mark.parametrize("twice", [False, True], ids=["once", "gradient of a gradient"])
def test_no_dequantized_weight_is_kept_for_the_backward_pass(dtype: Any, twice: bool):
    small = QuantizedLinear(linear(256, 256), dtype)
    held: list[Tensor] = []

    def keep(v: Tensor) -> Tensor:
        held.append(v)
        return v

    x = torch.randn(1, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
        y = small(x)
        if twice:
            torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert held and not any(v.is_floating_point() and v.numel() >= 256 * 256 for v in held)


@dtypes
def test_autocast_is_followed_as_a_linear_follows_it(dtype: Any):
    plain = linear(64, 64)
    small, x = QuantizedLinear(plain, dtype), torch.randn(4, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = small(x)
        assert y.dtype == plain(x).dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert torch.allclose(x.grad, small.weight.sum(0).expand(4, 64), atol=0.1)


@dtypes
def test_a_view_shares_the_packed_weight_and_trains_its_adapters_alone(dtype: Any):
    net: Any = nn.Sequential(linear(64, 64), nn.SiLU(), linear(64, 64, 1, bias=False))
    for i in (0, 2):
        net[i] = QuantizedLinear(net[i], dtype)
    one, two = view(net, LoRA(2)), view(net, LoRA(2))
    x = torch.randn(5, 64)
    assert torch.equal(one(x), net(x)) and isinstance(one[0], QuantizedLoRALinear)
    assert one[0].packed.data_ptr() == two[0].packed.data_ptr() == net[0].packed.data_ptr()
    assert {n.split(".")[1] for n, _ in one.named_parameters()} == {"lora_A", "lora_B"}
    again = view(one)
    nn.init.normal_(one[0].lora_B)
    assert not torch.equal(one(x), net(x)) and torch.equal(two(x), net(x)) and torch.equal(again(x), net(x))
    one(x).square().sum().backward()
    assert all(p.grad is not None for p in one.parameters()) and all(p.grad is None for p in net.parameters())
    assert torch.allclose(one[0](x), x @ (one[0].weight + one[0].lora_B @ one[0].lora_A).T + one[0].bias, atol=1e-4)
    with pytest.raises(UnsupportedModel, match="are not merged into weights that are rounded"):
        merge(one)


class Net(nn.Module):
    """A network with blocks, an embedder outside of them, and one linear at two places."""

    blocks: Any
    blocks2: Any

    def __init__(self) -> None:
        super().__init__()
        self.embed = linear(64, 64)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": linear(128, 64, i), "norm": nn.LayerNorm(64)}) for i in (1, 2))
        self.blocks[0]["same"] = self.blocks[1]["same"] = linear(64, 64, 3)
        self.blocks2 = nn.ModuleDict({"other": linear(64, 64, 4)})


BLOCKS = ["blocks.0", "blocks.1"]


@dtypes
def test_a_network_is_rounded_and_comes_back_bit_for_bit(dtype: Any, tmp_path: File):
    net = Net().bfloat16()
    before, norm = copy.deepcopy(net.state_dict()), net.blocks[0]["norm"]
    kept = round_blocks(net, BLOCKS, dtype, tmp_path / "w" / "weights.safetensors")
    assert {p for paths in kept.paths for p in paths} == {f"blocks.{i}.{k}" for i in (0, 1) for k in ("up", "same")}
    assert net.blocks[0]["same"] is net.blocks[1]["same"] and isinstance(net.blocks[0]["same"], QuantizedLinear)
    assert type(net.embed) is nn.Linear and type(net.blocks2["other"]) is nn.Linear and net.blocks[0]["norm"] is norm
    kept.restore()
    kept.restore()  # once is enough
    assert type(net.blocks[0]["up"]) is nn.Linear
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert net.blocks[0]["same"] is net.blocks[1]["same"] and net.state_dict().keys() == before.keys()


def size(net: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in net.parameters())


@dtypes
def test_the_bytes_of_a_backbone(dtype: Any, tmp_path: File):
    net = nn.ModuleDict({"block": nn.Sequential(*(linear(256, 256, i, bias=False) for i in range(4)))}).bfloat16()
    before, storages = size(net), {p.data_ptr(): p for p in net.parameters()}
    round_blocks(net, ["block"], dtype, tmp_path / "w.safetensors")
    scales = 4 * 256 * (4 if dtype == "int8" else 2 * 4)
    assert size(net) == before / (2 if dtype == "int8" else 4) + scales
    assert not any(p.data_ptr() in storages for p in net.parameters())


def test_a_file_that_is_gone_or_another_is_refused(tmp_path: File):
    net, file = Net(), tmp_path / "weights.safetensors"
    kept = round_blocks(net, BLOCKS, "int8", file)
    other = round_blocks(Net(), BLOCKS, "int8", tmp_path / "other.safetensors")
    with torch.no_grad():
        twin = Net()
        twin.blocks[0]["up"].weight.add_(1)
    round_blocks(twin, BLOCKS, "int8", other.file)
    file.write_bytes(other.file.read_bytes())
    with pytest.raises(CheckpointError, match="does not hold the weights that were rounded"):
        kept.restore()
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read from"):
        kept.restore()
    assert isinstance(net.blocks[0]["up"], QuantizedLinear)


def test_nothing_to_round_is_refused(tmp_path: File):
    with pytest.raises(UnsupportedModel, match="Net has no nn.Linear in its blocks to round"):
        round_blocks(Net(), ["embed"], "int8", tmp_path / "weights.safetensors")
    assert not list(tmp_path.iterdir())


def test_adapters_of_plain_linears_are_as_before():
    assert type(view(nn.Sequential(linear(4, 4)), LoRA(1))[0]) is LoRALinear
