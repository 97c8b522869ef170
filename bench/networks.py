"""The networks that benchmarks train, or take the parameters' shapes from (He et al., arXiv 1512.03385)."""

from __future__ import annotations

from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512)
RESNET50_BLOCKS = (3, 4, 6, 3)
EXPANSION = 4  #: of a bottleneck block's output over its inner width


def resnet50_shapes(classes: int = 1000) -> list[tuple[int, ...]]:
    """Shapes of the 161 parameters of a ResNet-50 in the order of its layers: 25,557,032 elements."""
    shapes: list[tuple[int, ...]] = []

    def convolution(inputs: int, outputs: int, size: int) -> None:
        """With the scale and shift of the normalisation after it."""
        shapes.extend([(outputs, inputs, size, size), (outputs,), (outputs,)])

    convolution(3, WIDTHS[0], 7)
    inputs = WIDTHS[0]
    for width, blocks in zip(WIDTHS, RESNET50_BLOCKS, strict=True):
        outputs = EXPANSION * width
        for block in range(blocks):
            convolution(inputs, width, 1)
            convolution(width, width, 3)
            convolution(width, outputs, 1)
            if block == 0:
                convolution(inputs, outputs, 1)
            inputs = outputs
    return [*shapes, (classes, inputs), (classes,)]


def convolved(inputs: int, outputs: int, size: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


class Block(nn.Module):
    """Two 3 x 3 convolutions around which the input goes too."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.path = nn.Sequential(
            *convolved(inputs, outputs, 3, stride), nn.ReLU(inplace=True), *convolved(outputs, outputs, 3, 1)
        )
        same = stride == 1 and inputs == outputs
        self.around = nn.Identity() if same else nn.Sequential(*convolved(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return (self.path(x) + self.around(x)).relu_()


def resnet18(width: int = WIDTHS[0]) -> nn.Sequential:
    """Images [B, 3, H, W] to features [B, 8 width]."""
    layers = [*convolved(3, width, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)]
    inputs = width
    for stage in range(4):
        outputs = width << stage
        layers += [Block(inputs, outputs, 1 if stage == 0 else 2), Block(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
