"""Backbones, written from their papers: inputs to features [B, D], on which one linear layer a task stands.

ResNets: He et al., arXiv 1512.03385. The encoder: Vaswani et al., arXiv 1706.03762, over patches of an image as in
Dosovitskiy et al., arXiv 2010.11929, with the normalisation before each part (Xiong et al., arXiv 2002.04745). Weights
are drawn at random, those of convolutions in ResNets as He et al., arXiv 1502.01852, the others by torch's defaults;
nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

WIDTH = 64  #: of a ResNet's first stage, as published
EXPANSION = 4  #: of a bottleneck's output over its inner width


def _convolved(inputs: int, outputs: int, size: int, stride: int) -> list[nn.Module]:
    """With the normalisation after it, which has the bias."""
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


class _Residual(nn.Module):
    """The input, with a 1 x 1 convolution where the shape changes, is added to what the path makes of it.

    [B, inputs, H, W] to [B, outputs, H / stride, W / stride].
    """

    def __init__(self, path: list[nn.Module], inputs: int, outputs: int, stride: int):
        super().__init__()
        self.path = nn.Sequential(*path)
        same = stride == 1 and inputs == outputs
        self.around = nn.Identity() if same else nn.Sequential(*_convolved(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return (self.path(x) + self.around(x)).relu_()


def _basic(inputs: int, width: int, stride: int) -> nn.Module:
    """Two 3 x 3 convolutions."""
    first = [*_convolved(inputs, width, 3, stride), nn.ReLU(inplace=True)]
    return _Residual([*first, *_convolved(width, width, 3, 1)], inputs, width, stride)


def _bottleneck(inputs: int, width: int, stride: int) -> nn.Module:
    """1 x 1, 3 x 3 and 1 x 1 convolutions; the stride is the middle one's (ResNet "v1.5")."""
    outputs = EXPANSION * width
    path = [*_convolved(inputs, width, 1, 1), nn.ReLU(inplace=True), *_convolved(width, width, 3, stride)]
    return _Residual([*path, nn.ReLU(inplace=True), *_convolved(width, outputs, 1, 1)], inputs, outputs, stride)


def _resnet(
    block: Callable[[int, int, int], nn.Module], expansion: int, blocks: Sequence[int], width: int
) -> nn.Sequential:
    layers = [*_convolved(3, width, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)]
    inputs = width
    for stage, count in enumerate(blocks):
        for number in range(count):
            layers.append(block(inputs, width << stage, 2 if stage > 0 and number == 0 else 1))
            inputs = expansion * (width << stage)
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in network.modules():
        if isinstance(module, nn.Conv2d):  # He et al., arXiv 1502.01852, equation 14
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def resnet18(width: int = WIDTH) -> nn.Sequential:
    """ResNet-18 without its classifier: images [B, 3, H, W] to features [B, 8 width]; 11.2 million parameters."""
    return _resnet(_basic, 1, (2, 2, 2, 2), width)


def resnet50(width: int = WIDTH) -> nn.Sequential:
    """ResNet-50 without its classifier: images [B, 3, H, W] to features [B, 32 width]; 23.5 million parameters."""
    return _resnet(_bottleneck, EXPANSION, (3, 4, 6, 3), width)


def resnet50_shapes(classes: int = 1000) -> list[tuple[int, ...]]:
    """Shapes of a ResNet-50's parameters in the order of its layers, the classifier last; without their memory."""
    with torch.device("meta"):
        network = nn.Sequential(resnet50(), nn.Linear(8 * EXPANSION * WIDTH, classes))
    return [tuple(p.shape) for p in network.parameters()]


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
