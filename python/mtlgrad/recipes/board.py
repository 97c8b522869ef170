"""TensorBoard: a run for each training, a point for each epoch. Needs tensorboard, which the extra of this name brings.

What is written follows from a training's history, so a training that is continued begins with a new file that holds
all its epochs so far: points are neither lost nor there twice, however the last process ended.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from .base import Job, Result, Task
from .training import Training

FOLDER = "tensorboard"


class Board:
    """Watches trainings, and writes to ``<run folder>/tensorboard/<training>``."""

    def __init__(self, folder: Path, tasks: Sequence[Task], finished: Sequence[Result]):
        self.folder, self.tasks = folder / FOLDER, tasks
        self.writer: SummaryWriter | None = None
        self.written = 0  #: epochs of the training at hand
        for result in finished:
            if not (self.folder / self._name(result.job)).exists():
                self._begin(result)
        self._end()

    def start(self, number: int, trainer: Training) -> None:
        self._begin(trainer.result)

    def step(self, epoch: int, step: int, losses: Tensor) -> None:
        pass

    def epoch_done(self, trainer: Training) -> None:
        self._write(trainer.result)

    def done(self, number: int, result: Result) -> None:
        self._end()

    def _name(self, job: Job) -> str:
        return "-".join(job.title(self.tasks).replace(",", "").replace("+", "").split())

    def _begin(self, result: Result) -> None:
        self._end()
        path = self.folder / self._name(result.job)
        shutil.rmtree(path, ignore_errors=True)
        self.writer, self.written = SummaryWriter(str(path)), 0
        self._write(result)

    def _write(self, result: Result) -> None:
        assert self.writer is not None
        for epoch in range(self.written, len(result.history)):
            for name, value in values(result, epoch):
                self.writer.add_scalar(name, value, result.history[epoch]["epoch"])
        self.written = len(result.history)
        self.writer.flush()

    def _end(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


def values(result: Result, epoch: int) -> Iterator[tuple[str, float]]:
    """What is known of an epoch (from 0), by name."""
    line = result.history[epoch]
    kinds = {"train": "train_loss", "validation": "validation_loss", "metric": "validation_metric", "share": "weight"}
    for key, kind in kinds.items():
        yield from _per_task(kind, result.tasks, line[key])
    for layer, shares in (line["dominance"] or {}).items():
        yield from _per_task(f"dominance_{layer}", result.tasks, shares)
    if line.get("condition") is not None:
        yield "condition_number", line["condition"]
    if result.rounds:
        # The last of the epoch; every epoch has as many.
        last: Any = result.rounds[len(result.rounds) // len(result.history) * (epoch + 1) - 1]
        yield from _per_task("task_weight", result.tasks, last["weights"])
        if last["alphas"] is not None:
            yield from _per_task("alpha", result.tasks, last["alphas"])


def _per_task(kind: str, tasks: Sequence[str], numbers: Sequence[float]) -> Iterator[tuple[str, float]]:
    for task, number in zip(tasks, numbers, strict=True):
        yield f"{kind}/{task}", number
