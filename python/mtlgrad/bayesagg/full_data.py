"""What one head has seen in an epoch, for its full-data posterior."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..posterior.posteriors import Posterior, empty_posterior, posterior_from_state
from .heads import Head

STATISTICS = ("stored", "streaming")
ROWS = 8192  # of stored features in float64 at a time


class FullData:
    """``stored``: the features and targets themselves, as published; ``streaming``: sums, in a posterior that is
    updated batch by batch and expanded at the weights that each batch met. Both end in float64."""

    def __init__(self, head: Head, structure: str, statistics: str):
        self.head = head
        self.structure = structure
        self.statistics = statistics
        self.features: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.running: Posterior | None = None
        self.count = 0

    def clear(self) -> None:
        self.features, self.targets, self.running, self.count = [], [], None, 0

    @property
    def device(self) -> torch.device:
        """A checkpoint's features may have been mapped elsewhere than those that came since."""
        if self.running is not None:
            return self.running.anchor.device
        return self.features[-1].device if self.features else self.head.layers[0].weight.device

    def add(self, features: Tensor, targets: Tensor, weight: Tensor | None) -> None:
        """A batch that was checked, and the head's weights in float64 (``streaming``). ``stored`` keeps the tensors,
        which the caller must leave as they are."""
        self.count += features.shape[0]
        if self.statistics == "stored":
            self.features.append(features)
            self.targets.append(targets)
            return
        features = features.double()
        if self.running is None:
            self.running = self._start(features, weight)
        elif self.running.anchor.device != features.device:  # resumed from a checkpoint that was mapped elsewhere
            self.running = posterior_from_state(self.running.state(), features)
        self.running.add(features, targets, weight)

    def posterior(self) -> Posterior:
        """A new one, or that of streaming itself, to be copied by those who change it."""
        if self.running is not None:
            return self.running
        device = self.device
        features = torch.cat([rows.to(device) for rows in self.features])
        targets = torch.cat([labels.to(device) for labels in self.targets])
        posterior = self.empty()
        for rows, labels in zip(features.split(ROWS), targets.split(ROWS)):
            posterior.add(rows.double(), labels)
        return posterior

    def empty(self) -> Posterior:
        """Of no data, at the weights as they stand."""
        like = torch.empty(0, dtype=torch.float64, device=self.device)
        return self._start(like, self.head.weight(like))

    def _start(self, like: Tensor, weight: Tensor | None) -> Posterior:
        anchor = like.new_zeros(self.head.outputs, self.head.width) if weight is None else weight.double()
        return self.empty_at(anchor)

    def empty_at(self, anchor: Tensor) -> Posterior:
        return empty_posterior(self.head.likelihood, anchor, None, self.head.gamma, self.structure)

    def state(self) -> dict[str, Any]:
        return {
            "features": list(self.features),
            "targets": list(self.targets),
            "running": None if self.running is None else self.running.state(),
            "count": self.count,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.features, self.targets, self.count = list(state["features"]), list(state["targets"]), state["count"]
        self.running = None if state["running"] is None else posterior_from_state(state["running"])
