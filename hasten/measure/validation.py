"""The denoising loss on held-out data per bin of time: it predicts quality before a single sample is drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.core.denoiser import Cond, Denoiser, predict
from hasten.core.errors import ConfigError
from hasten.core.path import Kind


@torch.no_grad()
def loss_per_time(
    net: Denoiser,
    images: Tensor,
    cond: Cond,
    bins: int = 8,
    seed: int = 0,
    *,
    kind: Kind | None = None,
    batch: int = 500,
) -> list[tuple[float, float, float]]:
    """Mean squared denoising error of held-out images [N, ...] in each of ``bins`` equal bins of unit time.

    Every image is noised once per bin, with the same noise in all bins and times spread evenly over the bin, so the
    numbers are a pure function of (weights, images, seed) and differences between checkpoints are not chance.

    Args:
        cond: Conditions of the images, each [N, ...].
        kind: What the error is measured in; None is the network's own kind, its training loss.
        batch: Images per network call.

    Returns:
        (u_low, u_high, loss) from data (0) to noise (1).

    Raises:
        ConfigError: Without images or bins.
    """
    if not len(images) or bins < 1:
        raise ConfigError(f"The loss per time needs at least one image and one bin; found {len(images)} and {bins}.")
    kind = kind or net.kind
    generator = torch.Generator().manual_seed(seed)
    eps = torch.randn(images.shape, generator=generator).to(images)
    place = (torch.randperm(len(images), generator=generator) + 0.5) / len(images)  # in (0, 1): one stratum each
    found = []
    for i in range(bins):
        t = net.path.at((i + place) / bins).to(images.device)
        total = 0.0
        for at in torch.arange(len(images)).split(batch):
            x0, e, t_at = images[at], eps[at], t[at.to(t.device)]
            pred = predict(net, net.path.mix(x0, e, t_at), t_at, {k: v[at.to(v.device)] for k, v in cond.items()}, kind)
            error = pred.float() - net.path.target(x0, e, t_at, kind).float()
            total += float(error.square().flatten(1).mean(1).sum())
        found.append((i / bins, (i + 1) / bins, total / len(images)))
    return found
