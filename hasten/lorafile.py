"""A student's adapters in one file: peft's keys as diffusers reads them, with the alpha that its own writer drops."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path as File
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hasten.core.errors import UnsupportedModel
from hasten.lora import LoRALinear, adapters
from hasten.reload import METADATA


def linears(net: nn.Module) -> dict[str, LoRALinear]:
    """The adapted linears of a view by name; one at two places counts once."""
    return {path: m for path, m in net.named_modules() if isinstance(m, LoRALinear)}


def write_lora(net: nn.Module, file: File, name: str) -> None:
    """Adapters as diffusers' ``load_lora_weights`` reads them: ``NAME.MODULE.lora_A.weight``, settings in the metadata.

    Args:
        net: The view.
        name: The pipeline's component to which they belong.
    """
    found, lora = linears(net), adapters(net)
    tensors = {
        f"{name}.{path}.{key}.weight": getattr(linear, key).detach().cpu().contiguous()
        for path, linear in found.items()
        for key in ("lora_A", "lora_B")
    }
    settings = {
        "r": lora.rank, "lora_alpha": alpha_of(net), "lora_dropout": 0.0, "bias": "none",
        "target_modules": targets(net, found),
    }  # fmt: skip
    packed = json.dumps({f"{name}.{k}": v for k, v in settings.items()}, indent=2, sort_keys=True)
    save_file(tensors, file, {"format": "pt", METADATA: packed})


def alpha_of(net: nn.Module) -> int | float:
    """The view's alpha, a whole number where it is one."""
    lora = adapters(net)
    alpha = lora.scale * lora.rank
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha


def targets(net: nn.Module, found: Mapping[str, Any]) -> list[str] | str:
    """The adapted modules for peft, which takes a name for all that end in it: where others do, a pattern."""
    others = [path for path, _ in net.named_modules() if path not in found]
    clear = not any(other.endswith("." + path) for other in others for path in found)
    return sorted(found) if clear else "|".join(re.escape(path) for path in sorted(found))


def read_lora(file: File) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and peft's settings of a file."""
    with safe_open(file, "pt") as opened:
        tensors = {k: opened.get_tensor(k) for k in opened.keys()}
        return tensors, json.loads((opened.metadata() or {}).get(METADATA, "{}"))


@torch.no_grad()
def check_lora(file: File, name: str, base: nn.Module, fused: nn.Module) -> None:
    """See that the file's adapters on ``base`` are the ``fused`` weights that were sampled.

    Raises:
        UnsupportedModel: If they differ by more than rounding, with where.
    """
    (tensors, settings), weights = read_lora(file), dict(fused.named_parameters())
    scale = settings[f"{name}.lora_alpha"] / settings[f"{name}.r"]
    for key in (k for k in tensors if k.endswith(".lora_A.weight")):
        path = key.removeprefix(f"{name}.").removesuffix(".lora_A.weight")
        down, up = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        plain, want = base.get_parameter(f"{path}.weight").cpu(), weights[f"{path}.weight"].cpu()
        added = (plain.to(down.dtype) + scale * up @ down).to(want.dtype)
        error = float((added - want).abs().max() / want.abs().max())
        if not error <= 4 * torch.finfo(want.dtype).eps:
            raise UnsupportedModel(
                f"{file.name} does not give the student's weights: {path} differs by {error:.1e}; its adapters belong "
                "to other weights than this pipeline's."
            )
