"""Clothing reviews: bag of words -> shared representation -> rating, recommended, department, age."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data import load_clothing
from .base import Settings, Task
from .parts import Recipe, Rows, Split


@dataclass(frozen=True)
class Texts:
    """R texts, packed: row i's tokens are ``tokens[offsets[i]:offsets[i + 1]]``."""

    tokens: Tensor  #: [K] int64
    offsets: Tensor  #: [R + 1] int64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def batches(self, slices: Sequence[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (tokens, offsets); the tokens are slices."""
        where = torch.tensor(slices, dtype=torch.int64, device=self.offsets.device)
        for (start, end), (first, last) in zip(slices, self.offsets[where].tolist(), strict=True):
            yield self.tokens[first:last], self.offsets[start : end + 1] - first


class TextBackbone(nn.Module):
    """Sum of word embeddings -> ReLU -> dropout -> linear -> ReLU: a 128-64 perceptron over word counts.

    tokens [K] int64, offsets [B + 1] int64 -> [B, 64]. The sum over a bag is a sparse matrix product, so the first
    layer costs what the words that occur cost, not 2,000 inputs. Without dropout the nets learn the training texts by
    heart, the single-task nets most: the comparison would then show regularisation, not methods.
    """

    def __init__(self, words: int, hidden: int, width: int):
        super().__init__()
        self.words = nn.EmbeddingBag(words, hidden, mode="sum", include_last_offset=True)
        # The start of nn.Linear(words, hidden), which this layer is; EmbeddingBag's own, N(0, 1), is far too wide.
        nn.init.uniform_(self.words.weight, -(words**-0.5), words**-0.5)
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.dropout = nn.Dropout(0.5)
        self.project = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        hidden = self.dropout(torch.relu(self.words(tokens, offsets) + self.bias))
        return torch.relu(self.project(hidden))


class Clothing(Recipe):
    """The data set's own split, whatever the seed."""

    name = "clothing"
    epochs = Settings.epochs
    tasks = (
        Task("rating", "regression", 1, "RMSE", False, "stars"),
        Task("recommended", "binary", 1, "AUC", True),
        Task("department", "multiclass", 6, "accuracy", True),
        Task("age", "regression", 1, "RMSE", False, "years", digits=2),
    )

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.data = load_clothing()
        self.rows = Rows(*(self.data.rows(name) for name in ("train", "validation", "test")))

    def split(self, seed: int) -> Split:
        labels = [getattr(self.data, task.name) for task in self.tasks]
        return Split(seed, self.rows, self.tasks, labels, self._texts, self.device)

    def _texts(self, rows: Tensor) -> Texts:
        tokens, offsets = self.data.pack(rows)
        return Texts(tokens.to(self.device), offsets.to(self.device))

    def backbone(self) -> nn.Module:
        return TextBackbone(len(self.data.vocabulary), 128, self.width)

    def layers(self, backbone: nn.Module) -> dict[str, list[nn.Parameter]]:
        assert isinstance(backbone, TextBackbone)
        return {"words": [*backbone.words.parameters(), backbone.bias], "project": [*backbone.project.parameters()]}
