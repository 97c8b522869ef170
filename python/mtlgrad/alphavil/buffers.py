"""The model's buffers (BatchNorm's statistics) through a round: what the tasks' trainings made of them, as one copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..world.ranks import World


class Buffers:
    """A buffer becomes the mean over the tasks whose training changed it; one that holds no floats the largest.

    So a head's statistics are those of its own task, the shared ones an even mixture with variances that stay positive,
    whatever alpha is, and a counter of batches goes on counting.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.merged: dict[str, Tensor] = {}
        self.count: dict[str, int] = {}

    def copy(self) -> dict[str, Tensor]:
        return {name: b.detach().clone() for name, b in self.model.named_buffers()}

    @torch.no_grad()
    def put_back(self, before: dict[str, Tensor]) -> None:
        for name, b in self.model.named_buffers():
            b.copy_(before[name])

    @torch.no_grad()
    def changed(self, before: dict[str, Tensor], world: World) -> dict[str, Tensor]:
        """Return what a task's training made of the buffers that it changed on any rank, by name: their mean over the
        ranks, the largest where they hold no floats.

        Bytes: 8 a buffer of the model; those of the changed floats; 8 an element of other changed ones.
        """
        named = [(name, b.detach()) for name, b in self.model.named_buffers()]
        if not named:
            return {}
        here = torch.tensor([not torch.equal(b, before[name]) for name, b in named], dtype=torch.int64)
        counts = world.sum_(here.to(world.control_device(named[0][1].device))).tolist()
        found = {name: b.clone() for (name, b), count in zip(named, counts, strict=True) if count}
        world.average_(b for b in found.values() if _averages(b))
        others = [b for b in found.values() if not _averages(b)]
        if others:
            flat = world.max_(torch.cat([b.reshape(-1).to(others[0].device, torch.int64) for b in others]))
            for b, part in zip(others, flat.split([b.numel() for b in others]), strict=True):
                b.copy_(part.view(b.shape))
        return found

    @torch.no_grad()
    def take(self, changed: dict[str, Tensor]) -> None:
        for name, b in changed.items():
            self.count[name] = self.count.get(name, 0) + 1
            if name not in self.merged:
                self.merged[name] = b.clone()
            elif _averages(b):
                self.merged[name] += (b - self.merged[name]) / self.count[name]
            else:
                self.merged[name] = torch.maximum(self.merged[name], b)

    def clear(self) -> None:
        self.merged, self.count = {}, {}

    @torch.no_grad()
    def move(self) -> None:
        for name, b in self.model.named_buffers():
            if name in self.merged:
                b.copy_(self.merged[name])

    def state_dict(self) -> dict[str, Any]:
        return {"merged": self.merged, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = dict(self.model.named_buffers())
        self.merged = {name: value.to(own[name].device, copy=True) for name, value in state["merged"].items()}
        self.count = dict(state["count"])


def _averages(b: Tensor) -> bool:
    return b.is_floating_point() or b.is_complex()


def finite(buffers: dict[str, Tensor], before: dict[str, Tensor]) -> bool:
    """Whether nothing that was finite has become NaN or infinity; masks of attention hold infinity from the start."""
    return all(bool((b.isfinite() | ~before[name].isfinite()).all()) for name, b in buffers.items() if _averages(b))
