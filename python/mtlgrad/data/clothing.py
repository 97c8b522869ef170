"""Women's clothing reviews: one text, four labels of three kinds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .splits import rows_of

_FILE = Path(__file__).with_name("clothing_reviews.npz")


@dataclass(frozen=True)
class ClothingReviews:
    """N = 22,628 reviews (CC0: "Women's E-Commerce Clothing Reviews"); K = 1,255,234 tokens in all.

    The texts are packed: review i is ``tokens[offsets[i]:offsets[i + 1]]``, its word ids in ascending order. That is
    the layout ``nn.EmbeddingBag(..., include_last_offset=True)`` reads.
    """

    tokens: Tensor  #: [K] int64, indices into `vocabulary`
    offsets: Tensor  #: [N + 1] int64, the first 0, the last K
    rating: Tensor  #: [N] float32, 1 to 5 stars
    recommended: Tensor  #: [N] float32, 0 or 1 (82 % are 1)
    department: Tensor  #: [N] int64, indices into `departments`
    age: Tensor  #: [N] float32, the reviewer's age in years, 18 to 99
    split: Tensor  #: [N] int64, 0 train, 1 validation, 2 test: fixed, so that figures compare
    vocabulary: tuple[str, ...]  #: 2,000 words
    departments: tuple[str, ...]  #: 6 names

    def rows(self, split: str) -> Tensor:
        """The row numbers of a split ("train", "validation" or "test"), ascending, int64."""
        return rows_of(self.split, split)

    def pack(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The texts of the rows [R] in the order given: tokens [K'] and offsets [R + 1], both int64.

        Packing a whole shuffled epoch at once (10 ms) turns every batch into two slices.
        """
        starts, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        offsets = torch.zeros(len(rows) + 1, dtype=torch.int64)
        torch.cumsum(lengths, 0, out=offsets[1:])
        shift = torch.repeat_interleave(starts - offsets[:-1], lengths)
        return self.tokens[shift + torch.arange(len(shift))], offsets


def load_clothing() -> ClothingReviews:
    """Reads the file that ships with the package (about 20 ms); everything is on the CPU."""
    with np.load(_FILE, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    offsets = np.concatenate([[0], np.cumsum(arrays["lengths"], dtype=np.int64)])

    def tensor(name: str, dtype: type) -> Tensor:
        return torch.from_numpy(arrays[name].astype(dtype))

    return ClothingReviews(
        tokens=tensor("tokens", np.int64),
        offsets=torch.from_numpy(offsets),
        rating=tensor("rating", np.float32),
        recommended=tensor("recommended", np.float32),
        department=tensor("department", np.int64),
        age=tensor("age", np.float32),
        split=tensor("split", np.int64),
        vocabulary=tuple(arrays["vocabulary"].tolist()),
        departments=tuple(arrays["departments"].tolist()),
    )
