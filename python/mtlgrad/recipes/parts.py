"""Recipes, and their data as a training sees it: splits, parts of them, batches, metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..world.ranks import ALONE, World
from .base import MultiTaskNet, Task
from .team import slices


class Inputs(Protocol):
    """The inputs of R rows, in a given order."""

    def __len__(self) -> int:
        """R."""

    def batches(self, slices: Sequence[tuple[int, int]]) -> Iterator[tuple[Tensor, ...]]:
        """What the backbone takes, of each slice of the rows: from and to."""


@dataclass(frozen=True)
class Table:
    """R rows of numbers."""

    values: Tensor  #: [R, ...] float32

    def __len__(self) -> int:
        return len(self.values)

    def batches(self, slices: Sequence[tuple[int, int]]) -> Iterator[tuple[Tensor]]:
        for start, end in slices:
            yield (self.values[start:end],)


class Batch(NamedTuple):
    """Rows to take a step on: all there are for it, or this rank's."""

    inputs: tuple[Tensor, ...]  #: the backbone's
    targets: list[Tensor]
    rows: int  #: on all ranks together
    own: int  #: of these this rank has
    world: World = ALONE

    @property
    def divisor(self) -> float | None:
        """What the sums of losses are divided by, so that their mean over the ranks is the mean over the rows."""
        return None if self.world.size == 1 else self.rows / self.world.size

    @property
    def padding(self) -> float:
        """How many rows the ranks have, those without labels too, for each that there is: 1.0 but for tiny batches."""
        return max(self.rows, self.world.size) / self.rows


@dataclass(frozen=True)
class Part:
    """R rows in a given order, with their targets."""

    inputs: Inputs
    targets: list[Tensor]  #: per task [R], float32 or (multiclass) int64

    def __len__(self) -> int:
        return len(self.inputs)

    def batches(self, size: int, world: World = ALONE) -> Iterator[Batch]:
        """Batches of `size` rows each, the last one shorter, or this rank's part of each; targets are slices.

        A rank without a part of the last one has its first row, without labels: no method has to do with nothing.
        """
        starts = range(0, len(self), size)
        own = slices(len(self), size, world)
        rows = [(a, b) if a < b else (first, first + 1) for first, (a, b) in zip(starts, own, strict=True)]
        for first, (a, b), inputs in zip(starts, own, self.inputs.batches(rows), strict=True):
            targets = [y[a:b] if a < b else _unlabelled(y) for y in self.targets]
            yield Batch(inputs, targets, min(size, len(self) - first), b - a, world)

    def only(self, task: int) -> Part:
        """The same rows with the targets of one task."""
        return replace(self, targets=[self.targets[task]])


def _unlabelled(targets: Tensor) -> Tensor:
    return targets.new_full((1,), float("nan") if targets.is_floating_point() else -100)


@dataclass(frozen=True)
class Rows:
    """Which rows of a data set are for what, each [R] int64."""

    train: Tensor
    validation: Tensor
    test: Tensor


class Split:
    """A recipe's data for one seed. Regression targets are standardised by the training rows.

    So the tasks' losses start near one another; metrics are in the label's own unit again.

    Args:
        labels: per task all rows' labels, [N].
        inputs: packs the inputs of the rows [R] in the order given.
    """

    def __init__(
        self,
        seed: int,
        rows: Rows,
        tasks: Sequence[Task],
        labels: Sequence[Tensor],
        inputs: Callable[[Tensor], Inputs],
        device: torch.device,
    ):
        self.seed, self.rows, self.device, self._inputs = seed, rows, device, inputs
        self.unit: dict[str, float] = {}  #: per regression task what a standardised error of one is in the label's unit
        self._targets = []
        for task, values in zip(tasks, labels, strict=True):
            if task.kind == "regression":
                mean, std = values[rows.train].mean(), values[rows.train].std()
                self.unit[task.name] = float(std)
                values = (values - mean) / std
            self._targets.append(values)
        self.validation = self._part(rows.validation)
        self.test = self._part(rows.test)

    def _part(self, rows: Tensor) -> Part:
        return Part(self._inputs(rows), [y[rows].to(self.device) for y in self._targets])

    def shuffled(self, epoch: int, draw: int = 0, rows: slice = slice(None)) -> Part:
        """The training rows, or some `rows` of them, in the order of this seed, epoch and draw.

        No state to keep, so resuming needs none.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        for _ in range(draw + 1):
            order = torch.randperm(len(self.rows.train), generator=generator)
        return self._part(self.rows.train[order[rows]])

    def metric(self, task: Task, output: Tensor, target: Tensor) -> float:
        """The task's metric on a whole part: output [R, O], target [R]; regression errors in the label's own unit."""
        if task.kind == "multiclass":
            return float((output.argmax(1) == target).double().mean())
        if task.kind == "binary":
            return auc(output.squeeze(1), target)
        error = (output.squeeze(1) - target).double() * self.unit[task.name]
        return float(error.abs().mean() if task.metric == "MAE" else error.square().mean().sqrt())


class Recipe(ABC):
    """Tasks, data and net."""

    name: ClassVar[str]
    tasks: ClassVar[tuple[Task, ...]]
    epochs: ClassVar[int]  #: unless the user says otherwise
    width: ClassVar[int] = 64  #: D, of the shared representation

    def __init__(self, device: torch.device):
        self.device = device

    @abstractmethod
    def split(self, seed: int) -> Split:
        """The data for all trainings of a seed, single-task nets included."""

    @abstractmethod
    def backbone(self) -> nn.Module:
        """A fresh backbone, from a batch's inputs to [B, D]."""

    @abstractmethod
    def layers(self, backbone: nn.Module) -> dict[str, list[nn.Parameter]]:
        """The backbone's layers, the one next to the inputs first: a name for people -> its parameters."""

    def net(self, tasks: Sequence[Task]) -> MultiTaskNet:
        """A fresh net for these tasks, drawn from the global generator: a seed gives every method the same start."""
        backbone = self.backbone()
        # Regression heads have no bias: BayesAgg's regression posterior has none, and the targets average 0.
        heads = [nn.Linear(self.width, task.outputs, bias=task.kind != "regression") for task in tasks]
        return MultiTaskNet(backbone, heads).to(self.device)


def auc(score: Tensor, target: Tensor) -> float:
    """Area under the ROC curve: how often a positive outranks a negative, ties counting half; [R] both."""
    positive, negative = score[target > 0.5], score[target <= 0.5].sort().values
    if not len(positive) or not len(negative):
        return float("nan")
    below = torch.searchsorted(negative, positive) + torch.searchsorted(negative, positive, right=True)
    return float(below.double().mean() / 2 / len(negative))
