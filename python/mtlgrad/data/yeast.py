"""Yeast (Elisseeff and Weston): expression of 2,417 genes -> which of 14 groups of functions each has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..recipes.recipe import MultiTaskNet, Recipe, Tensors, linear_heads, random_split, standardised
from ..recipes.tasks import binary

FILE = Path(__file__).parent / "yeast.npz"


class Yeast(Recipe):
    """14 labels, 1.3 % to 75 % positive; a random split for each seed, 60 % training, 10 % validation."""

    name = "yeast"
    epochs = 30

    def __init__(self, seed: int):
        with np.load(FILE, allow_pickle=False) as file:
            inputs, labels = torch.from_numpy(file["inputs"]), torch.from_numpy(file["labels"]).float()
        self.tasks = [binary(f"function {number}") for number in range(1, labels.shape[1] + 1)]
        rows = random_split(len(inputs), 0.6, 0.1, seed)
        targets = {task.name: column for task, column in zip(self.tasks, labels.unbind(1), strict=True)}
        data = Tensors(standardised(inputs, rows[0]), targets)
        self.train, self.validation, self.test = (data.only(part) for part in rows)

    def model(self) -> nn.Module:
        backbone = nn.Sequential(nn.Linear(103, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        return MultiTaskNet(backbone, linear_heads(64, {task.name: 1 for task in self.tasks}))
