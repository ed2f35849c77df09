"""Small networks beside a denoiser: discriminator heads on its features, a learnt log variance of a loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from hasten.core.errors import ConfigError


class TokenHeads(nn.Module):
    """One small head per tapped block, on tokens [B, L, D].

    Args:
        width: D of the features.
        taps: How many blocks are tapped.
        hidden: Width of each head's hidden layer.
        apart: What has a logit of its own: the sample (``""``), every one of the ``heads``, or every token of each
            (``tokens``), as in StyleGAN-T (Sauer et al. 2023), on whose heads LADD and SANA-Sprint build. Averaged
            logits are a milder discriminator: one hinge or softplus for all of them.
    """

    def __init__(self, width: int, taps: int, hidden: int = 64, apart: Literal["", "heads", "tokens"] = ""):
        super().__init__()
        if apart not in ("", "heads", "tokens"):
            raise ConfigError(f"TokenHeads: apart is '', 'heads' or 'tokens', not {apart!r}.")
        self.apart = apart
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1))
            for _ in range(taps)
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits [B], of heads [B, taps], of tokens [B, taps * L]; positive for data."""
        logits = [h(f)[..., 0] for h, f in zip(self.heads, features, strict=True)]
        if self.apart == "tokens":
            return torch.cat(logits, dim=1)
        means = torch.stack([row.mean(1) for row in logits], dim=1)
        return means if self.apart == "heads" else means.mean(1)


class PixelFeatures(nn.Module):
    """A small convolutional network on pixels: tokens [B, L, width] at each of ``scales`` resolutions, halving.

    A group norm without weights ends every scale, so that its features cannot grow to evade a penalty on the heads.

    Args:
        channels: Channels of the samples [B, C, H, W] or [B, C, F, H, W]; frames are looked at one by one.
    """

    def __init__(self, channels: int, width: int = 64, scales: int = 3):
        super().__init__()
        self.width, self.scales = width, scales
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width if i else channels, width, 3, 2 if i else 1, 1),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, 1, 1),
                nn.GroupNorm(8, width, affine=False),
            )
            for i in range(scales)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        batch = len(x)
        h = x.movedim(1, 2).flatten(0, 1) if x.ndim == 5 else x
        features = []
        for conv in self.convs:
            h = conv(h)
            features.append(h.flatten(2).transpose(1, 2).reshape(batch, -1, self.width))
        return features


def known_blocks(net, taps: Sequence[int]) -> tuple[int, ...]:
    """``taps`` where ``net`` has these blocks. Raises ConfigError where it has not."""
    count = len(net.blocks)
    if not taps or min(taps) < 0 or max(taps) >= count:
        raise ConfigError(f"The network has blocks 0 to {count - 1} to read features from, not {tuple(taps)}.")
    return tuple(taps)


class LogVariance(nn.Module):
    """w(t) of the weighting exp(-w) loss + w (EDM2, Karras et al. 2024, eq. 14-16): starts at 0."""

    freqs: Tensor

    def __init__(self, bands: int = 16):
        super().__init__()
        self.register_buffer("freqs", torch.arange(bands) * math.pi, persistent=False)
        self.linear = nn.Linear(bands, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, place: Tensor) -> Tensor:
        """Log variance [B] at a time in [0, 1]."""
        return self.linear(torch.cos(place[:, None] * self.freqs.to(place)).to(self.linear.weight.dtype))[:, 0]
