"""Which machine multiplies which numbers of ``Quantize``, and whose product it is: hasten's or torchao's."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from hasten.core.errors import ConfigError

FLOATS = ("fp8", "mxfp8", "nvfp4")
FOREIGN = (("fp8", "block"), ("mxfp8", "row"), ("nvfp4", "row"))  # dtype and scaling that only torchao multiplies
# dtype: the least CUDA capability, and what a linear's sides are multiples of on CUDA.
OWN = {"int8": ((8, 0), 8), "int8_static": ((8, 0), 8), "fp8": ((8, 9), 16)}
TORCHAO = OWN | {"int8_weights": ((8, 0), 8), "int4_weights": ((8, 0), 32), "mxfp8": ((10, 0), 32)}
TORCHAO |= {"nvfp4": ((10, 0), 16)}
ON_CPU = ("int8", "int8_weights")  # of torchao's


def by_torchao(how: Any) -> bool:
    """Whether the linears of a ``Quantize`` are torchao's."""
    fast = how.backend == "auto" and not how.emulate
    return how.backend == "torchao" or (fast and (how.dtype, how.scaling) in FOREIGN)


def multiple(how: Any) -> int:
    """What both sides of a linear are multiples of on CUDA."""
    if not by_torchao(how):
        return 1 if how.emulate or how.dtype not in OWN else OWN[how.dtype][1]
    wide = {"fp8": 128 if how.scaling == "block" else 16, "int4_weights": how.group}
    return wide.get(how.dtype, TORCHAO[how.dtype][1])


def takes(how: Any, weight: torch.Tensor) -> bool:
    """Whether the product takes a weight [out, in] of this size; torchao's NVFP4 divides by its largest number."""
    if by_torchao(how) and how.dtype == "nvfp4" and not weight.any():
        return False
    return not (weight.is_cuda and any(n % multiple(how) for n in weight.shape))


def refuse(how: Any, device: torch.device) -> None:
    """Raise ConfigError where the device has no product of a ``Quantize``'s type, or nobody wrote one."""
    what = "fp8 in blocks" if (how.dtype, how.scaling) == ("fp8", "block") else how.dtype
    hint = "emulate=True measures quality" if how.dtype in FLOATS else "leave Quantize out"
    if by_torchao(how):
        if find_spec("torchao") is None:
            raise ConfigError(f"Quantize: {what} by torchao needs that package: pip install 'hasten[torchao]'; {hint}.")
        if device.type == "cpu" and how.dtype in ON_CPU:
            return
        least, whose = TORCHAO[how.dtype][0], "torchao's "
    elif how.emulate or how.dtype.endswith("_weights"):
        return
    elif (how.dtype, how.scaling) in FOREIGN:
        raise ConfigError(f"Quantize: {what} has no fast product of hasten's own; leave backend out, or {hint}.")
    elif device.type == "cpu" and how.dtype != "fp8":
        return
    else:
        least, whose = OWN[how.dtype][0], ""
    if device.type != "cuda":
        raise ConfigError(f"Quantize: there is no {whose}{what} product on {device.type}; {hint}.")
    if torch.cuda.get_device_capability(device) < least:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"Quantize: {name} is below compute capability {least[0]}.{least[1]} for {what}; {hint}.")
