"""Women's clothing reviews (CC0): a text -> rating, recommended, department, the reviewer's age."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..recipes.recipe import MultiTaskNet, Recipe, linear_heads, standardised_labels
from ..recipes.tasks import RMSE, binary, multiclass, regression

FILE = Path(__file__).parent / "clothing_reviews.npz"


class Texts(Dataset[Any]):
    """Texts, packed: row i's words are ``tokens[offsets[i]:offsets[i + 1]]``. A batch is packed likewise."""

    takes_lists = True

    def __init__(self, tokens: Tensor, offsets: Tensor, targets: dict[str, Tensor], rows: Tensor):
        self.tokens, self.offsets, self.targets, self.rows = tokens, offsets, targets, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: Any) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
        rows = self.rows[torch.as_tensor(chosen).reshape(-1)]
        starts, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        where = torch.repeat_interleave(starts - offsets[:-1], lengths) + torch.arange(int(offsets[-1]))
        return (self.tokens[where], offsets), {name: values[rows] for name, values in self.targets.items()}


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
    """22,628 reviews of a vocabulary of 2,000 words; the data set's own split, whatever the seed."""

    name = "clothing"
    epochs = 8

    def __init__(self, seed: int):
        with np.load(FILE, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        self.words = len(arrays["vocabulary"])
        split = torch.from_numpy(arrays["split"].astype(np.int64))
        rows = [(split == number).nonzero()[:, 0] for number in range(3)]
        numbers = {n: torch.from_numpy(arrays[n].astype(np.float32)) for n in ("rating", "recommended", "age")}
        targets = {"department": torch.from_numpy(arrays["department"].astype(np.int64)), **numbers}
        scale = {}
        for name in ("rating", "age"):
            targets[name], scale[name] = standardised_labels(targets[name], rows[0])
        self.tasks = [
            regression("rating", RMSE, scale=scale["rating"], unit="stars"),
            binary("recommended"),
            multiclass("department"),
            regression("age", RMSE, scale=scale["age"], unit="years", digits=2),
        ]
        tokens = torch.from_numpy(arrays["tokens"].astype(np.int64))
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(arrays["lengths"], dtype=np.int64)]))
        self.train, self.validation, self.test = (Texts(tokens, offsets, targets, part) for part in rows)

    def model(self) -> nn.Module:
        outputs = {"rating": 1, "recommended": 1, "department": 6, "age": 1}
        return MultiTaskNet(TextBackbone(self.words, 128, 64), linear_heads(64, outputs))
