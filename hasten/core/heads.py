"""Discriminator heads on a denoiser's features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class TokenHeads(nn.Module):
    """One small head per tapped block; tokens [B, L, D] to one logit a sample, averaged over tokens and heads.

    Args:
        width: D of the features.
        taps: How many blocks are tapped.
        hidden: Width of each head's hidden layer.
    """

    def __init__(self, width: int, taps: int, hidden: int = 128):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 1))
            for _ in range(taps)
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits [B], positive for data."""
        return torch.stack([h(f).mean(dim=(1, 2)) for h, f in zip(self.heads, features, strict=True)]).mean(0)
