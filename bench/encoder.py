"""A transformer for the benchmarks of whole steps.

Vaswani et al., arXiv 1706.03762, over patches of an image as in Dosovitskiy et al., arXiv 2010.11929, with the
normalisation before each part (Xiong et al., arXiv 2002.04745); torch's default weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Encoder(nn.Module):
    """A transformer's encoder over an image's patches: images [B, 3, H, W] to features [B, width], the tokens' mean.

    Patches do not overlap, their positions are learned, every layer has its normalisation first, GELU and an inner
    width of 4 width.

    Args:
        width: D.
        layers: how many.
        tokens: H W / patch^2.
        patch: side of a patch.
        heads: of the attention (width / 64 if not given, as published, but at least 2).
        dropout: in every layer.

    Raises:
        ValueError: an image of another number of patches.
    """

    def __init__(
        self, width: int, layers: int, tokens: int, patch: int = 8, heads: int | None = None, dropout: float = 0.0
    ):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width))
        layer = nn.TransformerEncoderLayer(
            width,
            max(2, width // 64) if heads is None else heads,
            4 * width,
            dropout,
            "gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).mT  # [B, tokens, width]
        if tokens.shape[1] != len(self.positions):
            raise ValueError(
                f"Encoder: images: expected {len(self.positions)} patches, found {tokens.shape[1]} in images "
                f"{list(images.shape)}; tokens= is their number"
            )
        return self.layers(tokens + self.positions).mean(1)
