"""LPIPS, where its weights are at hand: they are never downloaded here."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path as File

import torch
from torch import Tensor

from hasten.core.errors import ConfigError
from hasten.measure.quality import trajectory


def at_hand() -> bool:
    """Whether torchvision is installed and AlexNet's weights are in torch's hub folder."""
    folder = File(torch.hub.get_dir()) / "checkpoints"
    return find_spec("torchvision") is not None and any(folder.glob("alexnet-owt-*.pth"))


def needs_weights() -> None:
    """Raise ConfigError where LPIPS cannot be measured."""
    if not at_hand():
        raise ConfigError(
            "LPIPS needs torchvision and AlexNet's weights in torch's hub folder, and nothing is downloaded here; "
            "put them there, or give the budget in psnr, ssim or fd."
        )


def lpips(baseline: Tensor, other: Tensor) -> float:
    """Mean LPIPS (Zhang et al. 2018, AlexNet) of images [N, C, H, W] in [-1, 1]; grey ones count as three channels.

    Raises:
        ConfigError: If its weights are not at hand.
    """
    needs_weights()
    from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity as distance

    a, b = (x.clamp(-1, 1).expand(-1, 3, -1, -1) if x.shape[1] == 1 else x.clamp(-1, 1) for x in (baseline, other))
    pairs = zip(a.split(16), b.split(16), strict=True)
    return float(sum(distance(p, q, "alex", reduction="sum") for p, q in pairs)) / len(a)


def fidelity(baseline: Tensor, other: Tensor) -> dict[str, float]:
    """``psnr`` and ``ssim`` of images of the same noise, and ``lpips`` where its weights are at hand.

    Raises:
        ConfigError: For different shapes or NaN.
    """
    return trajectory(baseline, other) | ({"lpips": lpips(baseline, other)} if at_hand() else {})
