"""River flow: past flows at eight sites -> shared representation -> the flow at each site, 48 hours ahead."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data import load_river
from .base import Task
from .parts import Recipe, Rows, Split, Table

SITES = ("CHSI2", "NASI2", "EADM7", "SCLM7", "CLKM7", "VALI2", "NAPM7", "DLDI4")


class River(Recipe):
    """A random split for each seed, 60 % training, 10 % validation, 30 % test.

    Neighbouring hours resemble one another and fall on both sides of such a split: it measures how well a method fits
    eight tasks at once, not how well floods are foreseen. The metric is the mean absolute error, since gauges fail: ten
    of the 2,738 test rows make up to 100 % of a site's squared error, and a root mean square of mere chance.
    """

    name = "river"
    epochs = 40
    tasks = tuple(Task(site, "regression", 1, "MAE", False, digits=3) for site in SITES)

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.data = load_river()

    def split(self, seed: int) -> Split:
        count = len(self.data.inputs)
        # Another stream than those of the training rows' order.
        order = torch.randperm(count, generator=torch.Generator().manual_seed(2_000_000_000 + seed))
        train, validation = count * 6 // 10, count // 10
        rows = Rows(*order.tensor_split([train, train + validation]))
        inputs = standardised(self.data.inputs, rows.train).to(self.device)
        labels = list(self.data.targets.unbind(1))
        return Split(seed, rows, self.tasks, labels, lambda chosen: Table(inputs[chosen.to(self.device)]), self.device)

    def backbone(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(self.data.inputs.shape[1], 128), nn.ReLU(), nn.Linear(128, self.width), nn.ReLU()
        )

    def layers(self, backbone: nn.Module) -> dict[str, list[nn.Parameter]]:
        linear = (module for module in backbone.children() if isinstance(module, nn.Linear))
        return {f"linear {i}": list(module.parameters()) for i, module in enumerate(linear, 1)}


def standardised(values: Tensor, train: Tensor) -> Tensor:
    """[N, F], mean 0 and deviation 1 over the training rows; what is missing (NaN) gets its column's mean there: 0."""
    mean = values[train].nanmean(0)
    filled = torch.where(values.isnan(), mean, values)
    return (filled - mean) / filled[train].std(0)
