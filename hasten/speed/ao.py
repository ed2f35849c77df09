"""Linears that torchao rounds and multiplies, and networks with them written as diffusers' own quantized folders."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path as File
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hasten.core.errors import ConfigError
from hasten.speed.linears import KINDS, Branched, Ranged, without_gradient
from hasten.whole import whole_folder


@contextmanager
def quiet() -> Iterator[None]:
    """Without torchao's remarks, at its import, about compiled extensions that another chip would have."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def config(dtype: str, scaling: str = "row", group: int = 64) -> Any:
    """torchao's configuration of a type of ``Quantize``; none of them touches the settings of the whole process."""
    with quiet():
        from torchao import quantization as ao
        from torchao.prototype import mx_formats as mx
        from torchao.quantization.quantize_.workflows import Int4PackingFormat

    match dtype:
        case "int8":
            return ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
        case "int8_weights":
            return ao.Int8WeightOnlyConfig(set_inductor_config=False)
        case "int4_weights":  # the layout of torch's own kernel
            layout = Int4PackingFormat.TILE_PACKED_TO_4D
            return ao.Int4WeightOnlyConfig(group, False, int4_packing_format=layout)
        case "mxfp8":
            return mx.MXDynamicActivationMXWeightConfig()
        case "nvfp4":  # its Triton kernel is of a package that torchao does not bring
            return mx.NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=find_spec("mslk") is not None)
    block: Any = ao.PerBlock  # known by its lists, whatever its annotation says
    per: Any = {"row": ao.PerRow(), "tensor": ao.PerTensor(), "block": (block([1, 128]), block([128, 128]))}
    return ao.Float8DynamicActivationFloat8WeightConfig(granularity=per[scaling], set_inductor_config=False)


class TorchaoLinear(nn.Module):
    """A linear whose weight is a tensor of torchao's, in the numbers of ``how``; no nn.Linear, which others would cast.

    Args:
        linear: The original, which stays as it is.
        dtype: Of the weight where torchao lets it be chosen, for ``int8`` and ``int8_weights``; the others multiply in
            bfloat16.
        how: A configuration of torchao's, such as :func:`config` gives.

    Raises:
        ConfigError: If torchao leaves a weight of this shape as it is.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, how: Any):
        super().__init__()
        with quiet():
            from torchao.quantization import quantize_
        self.in_features, self.out_features, self.how = linear.in_features, linear.out_features, how
        self.wide, self.divides = free(how), "NVFP4Dynamic" in type(how).__name__
        dtype = dtype if self.wide else torch.bfloat16
        self.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)  # torchao puts another there
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
        quantize_(self, how, filter_fn=lambda module, name: module is self)
        if not hasattr(self.weight, "__tensor_flatten__"):
            raise ConfigError(
                f"Quantize: torchao does not round a linear of {self.in_features}x{self.out_features} so; name it in "
                "skip, or leave backend out."
            )

    def weights(self) -> Tensor:
        """The rounded weight [out, in] float32."""
        weight: Any = self.weight
        return weight.dequantize().float()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out] of the same dtype. Raises ConfigError where a gradient is asked for."""
        without_gradient(x)
        rows = x.reshape(-1, self.in_features).to(x.dtype if self.wide else torch.bfloat16).contiguous()
        y = F.linear(rows, self.weight)
        if self.divides:  # by the largest activation: zeros alone would answer NaN
            y = torch.where(rows.any(), y, 0.0)
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)


def free(how: Any) -> bool:
    """Whether a configuration of torchao's takes weights and activations of any floating type."""
    return type(how).__name__.startswith("Int8")


def save_prequantized(net: Any, folder: File | str) -> None:
    """Write a diffusers model with torchao's weights as the folder that diffusers itself loads: ``from_pretrained``.

    Args:
        net: ``pipe.transformer`` or ``pipe.unet`` inside ``speed_up(pipe, Quantize(..., backend="torchao"))``, without
            layers that change it in another way, or after it with ``keep=False``.
        folder: Of the model: the pipeline's own folder and ``transformer`` or ``unet``.

    Raises:
        ConfigError: If it is no diffusers model, nothing of it is torchao's, it has what diffusers' format cannot hold
            (smoothing, a low-rank branch, a linear at two places), or the folder cannot be written and stays as it was.
    """
    from diffusers.models.modeling_utils import ModelMixin

    if not isinstance(net, ModelMixin):
        raise ConfigError(f"{type(net).__name__} is no diffusers model; write hasten's own with save_quantized.")
    every = list(net.named_modules(remove_duplicate=False))
    ours = {name: m for name, m in every if isinstance(m, TorchaoLinear)}
    beside = [name for name, m in net.named_modules() if isinstance(m, (Branched, Ranged, *KINDS.values()))]
    if not ours or beside:
        raise ConfigError(
            f"{type(net).__name__} holds what diffusers' format cannot ({beside[0]}); quantize it with "
            "backend='torchao' and without smooth, rank and ranges."
            if beside
            else f"{type(net).__name__} has no weights of torchao's; save it inside speed_up with "
            "Quantize(..., backend='torchao')."
        )
    how = next(iter(ours.values())).how
    if not free(how) and net.dtype != torch.bfloat16:
        raise ConfigError(
            f"{type(how).__name__} multiplies in bfloat16 and {type(net).__name__} is in {net.dtype}, which diffusers "
            "does not convert; load it with torch_dtype=torch.bfloat16, then quantize and save it."
        )
    if len({id(m) for m in ours.values()}) < len(ours):
        raise ConfigError(f"{type(net).__name__} has a linear at two places, which diffusers' format cannot hold.")
    from diffusers.quantizers.quantization_config import TorchAoConfig
    from diffusers.quantizers.torchao.torchao_quantizer import TorchAoHfQuantizer

    # diffusers looks for these names anywhere in a parameter's
    plain = (name for name, m in net.named_modules() if isinstance(m, nn.Linear))
    rest = [name for name in plain if not any(f"{name}." in f"{other}." for other in ours)]
    about = TorchAoConfig(how, modules_to_not_convert=rest)
    before = {k: vars(net).get(k) for k in ("hf_quantizer", "_internal_dict")}
    try:
        vars(net)["hf_quantizer"] = quantizer = TorchAoHfQuantizer(about, pre_quantized=True)
        quantizer.validate_environment()
        net.register_to_config(quantization_config=about)
        with whole_folder(File(folder), "config.json") as partial:
            net.save_pretrained(partial)
    finally:
        for key, value in before.items():
            vars(net).pop(key, None) if value is None else vars(net).__setitem__(key, value)
