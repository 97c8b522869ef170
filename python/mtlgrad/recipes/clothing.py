"""Clothing reviews: bag of words -> shared representation -> rating, recommended, department, age."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data import load_clothing
from .base import MultiTaskNet, Part, Task


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


class Clothing:
    """The recipe: tasks, splits (packed once), the net, and the metrics."""

    name = "clothing"
    width = 64
    tasks = (
        Task("rating", "regression", 1, "RMSE", False, "stars"),
        Task("recommended", "binary", 1, "AUC", True),
        Task("department", "multiclass", 6, "accuracy", True),
        Task("age", "regression", 1, "RMSE", False, "years"),
    )

    def __init__(self, device: torch.device):
        self.data = load_clothing()
        self.device = device
        self.train_rows = self.data.rows("train")
        # Regression targets are standardised by the training rows, so that the tasks' losses start near one another.
        self.scale = {}
        targets = []
        for task in self.tasks:
            values = getattr(self.data, task.name)
            if task.kind == "regression":
                mean, std = values[self.train_rows].mean(), values[self.train_rows].std()
                self.scale[task.name] = float(std)
                values = (values - mean) / std
            targets.append(values)
        self.targets = targets
        self.validation = self._part(self.data.rows("validation"))
        self.test = self._part(self.data.rows("test"))

    def _part(self, rows: Tensor) -> Part:
        tokens, offsets = self.data.pack(rows)
        move = self.device
        return Part(tokens.to(move), offsets.to(move), [y[rows].to(move) for y in self.targets])

    def shuffled(self, seed: int, epoch: int) -> Part:
        """The training rows in the order of this seed and epoch: no state to keep, so resuming needs none."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train_rows), generator=generator)
        return self._part(self.train_rows[order])

    def net(self, tasks: tuple[Task, ...]) -> MultiTaskNet:
        """A fresh net for these tasks, drawn from the global generator: a seed gives every method the same start."""
        backbone = TextBackbone(len(self.data.vocabulary), 128, self.width)
        # Regression heads have no bias: BayesAgg's regression posterior has none, and the targets average 0.
        heads = [nn.Linear(self.width, task.outputs, bias=task.kind != "regression") for task in tasks]
        return MultiTaskNet(backbone, heads).to(self.device)

    def metric(self, task: Task, output: Tensor, target: Tensor) -> float:
        """The task's metric on a whole split: output [R, O], target [R]; regression errors in the label's own unit."""
        if task.kind == "multiclass":
            return float((output.argmax(1) == target).double().mean())
        if task.kind == "binary":
            return auc(output.squeeze(1), target)
        return float(((output.squeeze(1) - target).double() ** 2).mean().sqrt()) * self.scale[task.name]


def auc(score: Tensor, target: Tensor) -> float:
    """Area under the ROC curve: how often a positive outranks a negative, ties counting half; [R] both."""
    positive, negative = score[target > 0.5], score[target <= 0.5].sort().values
    if not len(positive) or not len(negative):
        return float("nan")
    below = torch.searchsorted(negative, positive) + torch.searchsorted(negative, positive, right=True)
    return float(below.double().mean() / 2 / len(negative))


RECIPES = {Clothing.name: Clothing}
