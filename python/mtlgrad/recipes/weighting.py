"""The methods that ``mtlgrad train`` compares, behind one small interface.

A training step is: ``features = w.through(features, targets)``, heads, losses, ``w.total(losses).backward()``.
"""

from __future__ import annotations

import time
from typing import Any, cast

import torch
from torch import Tensor, nn

from .base import MultiTaskNet, Settings, Task


class Weighting(nn.Module):
    """The plain sum, and the defaults of the others."""

    name = "sum"

    def __init__(self, tasks: tuple[Task, ...], net: MultiTaskNet, settings: Settings):
        super().__init__()
        self.tasks = tasks

    def through(self, features: Tensor, targets: list[Tensor]) -> Tensor:
        """Stands between backbone and heads; [B, D] -> [B, D]."""
        return features

    def total(self, losses: list[Tensor]) -> Tensor:
        return torch.stack(losses).sum()

    def predict(self, net: MultiTaskNet, features: Tensor) -> list[Tensor]:
        return net.outputs(features)

    def start_epoch(self, epoch: int) -> None:
        """Called before the first step of epoch 0, 1, ..."""

    def end_epoch(self) -> None:
        """Called after the last step of an epoch."""

    @property
    def working(self) -> bool:
        """False while the method does nothing yet (warm-up): such steps say nothing about its cost."""
        return True

    def shares(self, losses: Tensor) -> Tensor | None:
        """How the tasks are weighed at the moment, [T], summing to one; None where there is nothing to say."""
        return torch.full((len(self.tasks),), 1.0 / len(self.tasks))

    def variance(self) -> Tensor | None:
        """[T, D] gradient variance of the last backward; None where the method has no such thing."""
        return None

    def own_work(self, features: Tensor, targets: list[Tensor], losses: list[Tensor]) -> None:
        """Does once more what the method adds to a step, and nothing else: it is timed. The sum adds nothing."""


class _OverLosses(Weighting):
    """Methods that are a formula over the losses; their own work is that formula, forth and back."""

    def own_work(self, features: Tensor, targets: list[Tensor], losses: list[Tensor]) -> None:
        leaves = [loss.detach().requires_grad_() for loss in losses]
        torch.autograd.grad(self.total(leaves), leaves)


class Uncertainty(_OverLosses):
    """Kendall et al., CVPR 2018: exp(-s) L + s / 2 per task (exp(-s) L / 2 for regression), s = log sigma^2 learned."""

    name = "uncertainty"
    factor: Tensor

    def __init__(self, tasks: tuple[Task, ...], net: MultiTaskNet, settings: Settings):
        super().__init__(tasks, net, settings)
        self.log_variance = nn.Parameter(torch.zeros(len(tasks)))
        self.register_buffer("factor", torch.tensor([0.5 if t.kind == "regression" else 1.0 for t in tasks]), False)

    def total(self, losses: list[Tensor]) -> Tensor:
        return (self._weights() * torch.stack(losses) + 0.5 * self.log_variance).sum()

    def _weights(self) -> Tensor:
        return self.factor * torch.exp(-self.log_variance)

    def shares(self, losses: Tensor) -> Tensor | None:
        weights = self._weights().detach().cpu()
        return weights / weights.sum()


class LogSum(_OverLosses):
    """The sum of the logarithms of the losses (the geometric mean's gradient): each task is weighed by 1 / loss."""

    name = "logsum"

    def total(self, losses: list[Tensor]) -> Tensor:
        # A loss of exactly zero would make the gradient infinite.
        return torch.stack(losses).clamp_min(1e-12).log().sum()

    def shares(self, losses: Tensor) -> Tensor | None:
        weights = 1.0 / losses.clamp_min(1e-12)
        return weights / weights.sum()


class BayesAggregation(Weighting):
    """BayesAgg-MTL, after `warmup` epochs of plain sum."""

    name = "bayesagg"
    refreshes: Tensor

    def __init__(self, tasks: tuple[Task, ...], net: MultiTaskNet, settings: Settings):
        super().__init__(tasks, net, settings)
        from .. import BayesAgg, Binary, Multiclass, Regression

        kinds = {"regression": Regression, "binary": Binary, "multiclass": Multiclass}
        power = dict(zip(kinds, (settings.power[0], settings.power[1], settings.power[1]), strict=True))
        heads = cast("list[nn.Linear]", list(net.heads))
        self.bayes = BayesAgg(
            [
                kinds[task.kind](head, gamma=settings.gamma, power=power[task.kind])
                for task, head in zip(tasks, heads, strict=True)
            ],
            covariance=settings.covariance,
        )
        self.warmup = settings.warmup
        self.watching = False  # whether this epoch's batches go through the layer
        self.register_buffer("refreshes", torch.zeros((), dtype=torch.int64))

    @property
    def working(self) -> bool:
        return int(self.refreshes) > 0

    def start_epoch(self, epoch: int) -> None:
        # The last epoch of the warm-up shows the layer the data for its first posterior; before, it is left out.
        self.watching = epoch >= self.warmup - 1

    def through(self, features: Tensor, targets: list[Tensor]) -> Tensor:
        return self.bayes(features, targets) if self.watching else features

    def total(self, losses: list[Tensor]) -> Tensor:
        return self.bayes.total(losses) if self.watching else super().total(losses)

    def end_epoch(self) -> None:
        if self.watching:
            self.bayes.refresh()
            self.refreshes += 1

    def predict(self, net: MultiTaskNet, features: Tensor) -> list[Tensor]:
        if not self.working:
            return net.outputs(features)
        return [output.reshape(len(features), -1) for output in self.bayes.predict(features)]

    def shares(self, losses: Tensor) -> Tensor | None:
        if not self.working:
            return super().shares(losses)
        weights = self.bayes.task_weights
        return None if weights is None else weights.detach().float().cpu()

    def variance(self) -> Tensor | None:
        variance = self.bayes.gradient_variance if self.working else None
        return None if variance is None else variance.detach().float().cpu()

    def own_work(self, features: Tensor, targets: list[Tensor], losses: list[Tensor]) -> None:
        self.bayes.aggregate(features.detach(), targets)


METHODS: dict[str, type[Weighting]] = {w.name: w for w in (Weighting, Uncertainty, LogSum, BayesAggregation)}


def timed(work: Any, device: torch.device) -> float:
    """Milliseconds that a call takes, the device's queue drained before and after."""
    drain = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    drain()
    start = time.perf_counter()
    work()
    drain()
    return 1e3 * (time.perf_counter() - start)
