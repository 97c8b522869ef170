"""ResNets without their classifier (He et al., arXiv 1512.03385): images to features [B, D].

Weights are drawn at random, those of convolutions as He et al., arXiv 1502.01852; nothing is downloaded.
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
