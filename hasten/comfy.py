"""A student as the one file that ComfyUI reads, where its names for the weights are diffusers' own or follow from them.

ComfyUI's loader turns diffusers' names of a few networks into its own ("Load Diffusion Model" and "Load LoRA"), so a
file under these names is all that it takes. It has no scheduler in it: steps, sampler and guidance are set there by
hand, as the card says.
"""

from __future__ import annotations

from pathlib import Path as File
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hasten.core.errors import ConfigError, UnsupportedModel
from hasten.export import trained
from hasten.lora import is_view
from hasten.lorafile import alpha_of, linears
from hasten.models.diffusers import PipelineDenoiser
from hasten.whole import whole_file

# Class of a network -> the prefix of its adapters' names; "lora_unet_" joins the parts of a name by "_" (kohya's form).
READS = {
    "UNet2DConditionModel": "lora_unet_",
    "SD3Transformer2DModel": "transformer.",
    "FluxTransformer2DModel": "transformer.",
    "AuraFlowTransformer2DModel": "transformer.",
    "PixArtTransformer2DModel": "transformer.",
}


def export_comfyui(pipe: Any, student: PipelineDenoiser, file: File | str, *, lora: bool = False) -> File:
    """Write the student's network, or with ``lora`` its adapters, to ``file``: for ComfyUI's models/diffusion_models or
    models/loras.

    Args:
        pipe: The pipeline; its text encoders and autoencoder are not in the file, as they are those of the teacher.

    Raises:
        UnsupportedModel: If ComfyUI does not read diffusers' names of this network.
        ConfigError: If the file is no .safetensors, or adapters are asked of full weights.
    """
    file, kind = File(file).expanduser(), type(student.net).__name__
    if kind not in READS:
        raise UnsupportedModel(
            f"ComfyUI is not known to read diffusers' names of {kind}, only those of {', '.join(READS)}; export a "
            "diffusers folder and convert it with ComfyUI's own tools."
        )
    if file.suffix != ".safetensors":
        raise ConfigError(f"ComfyUI reads .safetensors files; {file.name} would not be found there.")
    if lora and not is_view(student):
        raise ConfigError("The student has full weights and no adapters; leave lora out.")
    tensors = adapters_of(student.net, READS[kind]) if lora else dict(trained(pipe, student).net.state_dict())
    with whole_file(file) as partial:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial, {"format": "pt"})
    return file


def adapters_of(net: nn.Module, prefix: str) -> dict[str, Tensor]:
    """A view's adapters under the names that ComfyUI reads, each with its alpha."""
    found = {}
    for path, linear in linears(net).items():
        name = prefix + (path.replace(".", "_") if prefix.endswith("_") else path)
        down, up = ("lora_down", "lora_up") if prefix.endswith("_") else ("lora_A", "lora_B")
        found[f"{name}.{down}.weight"], found[f"{name}.{up}.weight"] = linear.lora_A, linear.lora_B
        found[f"{name}.alpha"] = torch.tensor(float(alpha_of(net)))
    return found
