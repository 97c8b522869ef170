"""What a task is: a loss to train on and a metric to judge by. Three kinds are ready; write your own beside them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

Kind = Literal["regression", "binary", "multiclass"]


class Metric(ABC):
    """A number for a whole split, of batches that come one by one."""

    name: ClassVar[str]
    higher_is_better: ClassVar[bool] = False

    @abstractmethod
    def update(self, output: Tensor, target: Tensor) -> None:
        """Take in a batch.

        Args:
            output: what the head gives.
            target: the labels.
        """

    @abstractmethod
    def value(self) -> float:
        """Return the number; NaN where nothing was labelled."""


class Mean(Metric):
    """The mean over what is labelled of :meth:`of`; a label is missing where that is NaN."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    @abstractmethod
    def of(self, output: Tensor, target: Tensor) -> Tensor:
        """Compute a number for each label.

        Args:
            output, target: as in :meth:`update`.

        Returns:
            Any shape; NaN where a label is missing.
        """

    def update(self, output: Tensor, target: Tensor) -> None:
        values = self.of(output, target).double()
        labelled = ~values.isnan()
        self.sum += float(values[labelled].sum())
        self.count += int(labelled.sum())

    def value(self) -> float:
        return self.sum / self.count if self.count else math.nan


class MAE(Mean):
    """Mean absolute error."""

    name = "MAE"

    def of(self, output: Tensor, target: Tensor) -> Tensor:
        return (output.reshape(target.shape) - target).abs()


class RMSE(Mean):
    """Root mean squared error."""

    name = "RMSE"

    def of(self, output: Tensor, target: Tensor) -> Tensor:
        return (output.reshape(target.shape) - target).double().square()

    def value(self) -> float:
        return math.sqrt(super().value())


class Accuracy(Mean):
    """How much is classified right: classes along the output's second dimension; -100 is no label."""

    name, higher_is_better = "accuracy", True

    def of(self, output: Tensor, target: Tensor) -> Tensor:
        return (output.argmax(1) == target).double().masked_fill(target == -100, math.nan)


class AUC(Metric):
    """Area under the ROC curve: how often a positive outranks a negative, ties counting half."""

    name, higher_is_better = "AUC", True

    def __init__(self) -> None:
        self.scores: list[Tensor] = []
        self.labels: list[Tensor] = []

    def update(self, output: Tensor, target: Tensor) -> None:
        self.scores.append(output.reshape(target.shape).flatten().cpu())
        self.labels.append(target.flatten().cpu())

    def value(self) -> float:
        if not self.labels:
            return math.nan
        scores, labels = torch.cat(self.scores), torch.cat(self.labels)
        positive, negative = scores[labels > 0.5], scores[labels <= 0.5].sort().values
        if not len(positive) or not len(negative):
            return math.nan
        below = torch.searchsorted(negative, positive) + torch.searchsorted(negative, positive, right=True)
        return float(below.double().mean() / 2 / len(negative))


class MeanIoU(Metric):
    """Intersection over union, the mean over the classes that occur in labels or outputs; -100 is no label."""

    name, higher_is_better = "mIoU", True

    def __init__(self) -> None:
        self.counts: Tensor | None = None  # [C, C] of label and output

    def update(self, output: Tensor, target: Tensor) -> None:
        classes, labelled = output.shape[1], target != -100
        pairs = target[labelled] * classes + output.argmax(1)[labelled]
        counts = torch.bincount(pairs, minlength=classes**2).view(classes, classes).cpu()
        self.counts = counts if self.counts is None else self.counts + counts

    def value(self) -> float:
        if self.counts is None:
            return math.nan
        both, either = self.counts.diagonal(), self.counts.sum(0) + self.counts.sum(1) - self.counts.diagonal()
        return float((both[either > 0].double() / either[either > 0]).mean())


@dataclass(frozen=True)
class Task:
    """One head's task. Its loss gets a head's output and the labels of a batch, those that are missing, too.

    Raises:
        ValueError: a ``scale`` that is not above 0, or not finite.
    """

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]  #: output, target -> a scalar: the mean over what is labelled
    metric: type[Metric]
    kind: Kind | None = None  #: which likelihood BayesAgg takes the loss for; None: it has none
    scale: float = 1.0  #: what a metric of one is in `unit`
    unit: str = ""
    digits: int = 4  #: of the metric, behind the point

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"task {self.name!r}: scale: expected a finite number above 0, found {self.scale}")


def regression(name: str, metric: type[Metric] = MAE, *, scale: float = 1.0, unit: str = "", digits: int = 4) -> Task:
    """Make a task of squared errors; outputs of the targets' number of elements, NaN is no label.

    Args:
        name: of the task.
        metric: a class.
        scale: the deviation that the labels were divided by, so that errors are told in their own unit.
        unit: that unit.
        digits: of the metric, behind the point.

    Returns:
        The task.

    Raises:
        ValueError: as :class:`Task`.
    """
    return Task(name, squared_error, metric, "regression", scale, unit, digits)


def binary(name: str, metric: type[Metric] = AUC) -> Task:
    """Make a task of labels 0 and 1, float; outputs are logits, NaN is no label.

    Args:
        name: of the task.
        metric: a class.

    Returns:
        The task.
    """
    return Task(name, binary_cross_entropy, metric, "binary")


def multiclass(name: str, metric: type[Metric] = Accuracy) -> Task:
    """Make a task of classes, int64; outputs [B, C, ...] are logits, -100 is no label.

    Args:
        name: of the task.
        metric: a class.

    Returns:
        The task.
    """
    return Task(name, cross_entropy, metric, "multiclass")


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Average the squared errors over what is labelled.

    Args:
        output: of as many elements as ``target``.
        target: NaN is no label.

    Returns:
        A scalar; zero without a label.

    Raises:
        ValueError: another number of elements.
    """
    return _labelled_mean((_like(output, target) - target.nan_to_num()).square(), target.isnan())


def absolute_error(output: Tensor, target: Tensor) -> Tensor:
    """Average the absolute errors over what is labelled.

    Args:
        output, target: as in :func:`squared_error`.

    Returns:
        A scalar; zero without a label.

    Raises:
        ValueError: as :func:`squared_error`.
    """
    return _labelled_mean((_like(output, target) - target.nan_to_num()).abs(), target.isnan())


def binary_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    labels = target.nan_to_num().to(output.dtype)
    losses = functional.binary_cross_entropy_with_logits(_like(output, target), labels, reduction="none")
    return _labelled_mean(losses, target.isnan())


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return _labelled_mean(functional.cross_entropy(output, target.long(), reduction="none"), target == -100)


def _like(output: Tensor, target: Tensor) -> Tensor:
    if output.numel() != target.numel():
        raise ValueError(f"expected a number for each label, {[*target.shape]}, found outputs {[*output.shape]}")
    return output.reshape(target.shape)


def _labelled_mean(values: Tensor, missing: Tensor) -> Tensor:
    """Zero, and not NaN, for a batch without a label: its gradient is zero then, too."""
    return values.masked_fill(missing, 0.0).sum() / (~missing).sum().clamp_min(1)
