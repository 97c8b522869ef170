"""River flow (RF1 of Mulan): past flows at eight sites of the Mississippi network -> those 48 hours ahead."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..recipes.recipe import (
    MultiTaskNet,
    Recipe,
    Tensors,
    linear_heads,
    random_split,
    standardised,
    standardised_labels,
)
from ..recipes.tasks import regression

FILE = Path(__file__).parent / "river_flow.npz"


class River(Recipe):
    """9,125 hourly rows of 64 flows, some missing; a random split for each seed, 60 % training, 10 % validation.

    Neighbouring hours resemble one another and fall on both sides of such a split: it measures how well a method fits
    eight tasks at once, not how well floods are foreseen. The metric is the mean absolute error, since gauges fail: ten
    of the 2,738 test rows make up to 100 % of a site's squared error, and a root mean square of mere chance.
    """

    name = "river"
    epochs = 40

    def __init__(self, seed: int):
        with np.load(FILE, allow_pickle=False) as file:
            inputs, flows = torch.from_numpy(file["inputs"]), torch.from_numpy(file["targets"])
            sites = [name.partition("_")[0] for name in file["target_names"].tolist()]
        rows = random_split(len(inputs), 0.6, 0.1, seed)
        self.tasks, targets = [], {}
        for site, values in zip(sites, flows.unbind(1), strict=True):
            targets[site], scale = standardised_labels(values, rows[0])
            self.tasks.append(regression(site, scale=scale, digits=3))
        data = Tensors(standardised(inputs, rows[0]), targets)
        self.train, self.validation, self.test = (data.only(part) for part in rows)

    def model(self) -> nn.Module:
        backbone = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        return MultiTaskNet(backbone, linear_heads(64, {task.name: 1 for task in self.tasks}))
