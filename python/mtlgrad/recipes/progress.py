"""What a user sees while a run goes on: bars, the table at its end, TensorBoard. Needs rich (extra `train`)."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .training import Result, Training

SHOW_EVERY = 10  # steps; reading a loss waits for the device


class _Bars(Progress):
    """Bars with the losses on a line of their own: beside the bars they would not fit 80 columns."""

    losses = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.losses, style="dim", no_wrap=True, overflow="ellipsis")


class Display:
    """On a terminal two bars, all trainings and the one at hand, and its losses; else a line a finished training."""

    def __init__(self, console: Console, trainings: int, epochs: int, done: int):
        self.console, self.trainings, self.epochs, self.live = console, trainings, epochs, console.is_terminal
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
        self.bars = _Bars(*columns, console=console, transient=True, disable=not self.live)
        self.whole = self.bars.add_task("all epochs", total=trainings * epochs, completed=done * epochs)
        self.bar: TaskID | None = None

    def start(self, number: int, training: Training) -> None:
        if self.bar is not None:
            self.bars.remove_task(self.bar)
        self.bars.update(self.whole, completed=number * self.epochs + training.epoch)
        self.steps, self.names = training.ticks, training.result.tasks
        title = f"[{number + 1}/{self.trainings}] {training.job.title}"
        self.bar = self.bars.add_task(title, total=self.steps * self.epochs, completed=training.epoch * self.steps)

    def step(self, epoch: int, step: int, losses: Tensor) -> None:
        if self.live and step % SHOW_EVERY == 0 and self.bar is not None:
            known = zip(self.names, losses.tolist(), strict=True)
            text = "  ".join(f"{name} {loss:.3f}" for name, loss in known if loss == loss)
            self.bars.losses = f"losses  {text}" if text else ""
            self.bars.update(self.bar, completed=epoch * self.steps + step + 1)

    def epoch_done(self, training: Training) -> None:
        self.bars.advance(self.whole)

    def done(self, number: int, result: Result) -> None:
        if not self.live:
            loss = "  ".join(f"{n} {v:.4f}" for n, v in zip(result.tasks, result.history[-1]["train"]))
            words = result.error or f"{result.job.title}: {result.step_ms:.2f} ms a step, training losses {loss}"
            say(self.console, f"[{number + 1}/{self.trainings}] {words}")


class Board:
    """A TensorBoard run a training, a point an epoch, in ``<run folder>/tensorboard``.

    All follows from a training's history: one that is continued begins with a new file of all its epochs so far, so
    points are neither lost nor there twice.
    """

    def __init__(self, folder: Path):
        self.folder = folder / "tensorboard"
        self.writer: Any = None

    def start(self, number: int, training: Training) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = self.folder / training.job.title.replace(",", "").replace(" ", "-")
        shutil.rmtree(path, ignore_errors=True)
        self.writer = SummaryWriter(str(path))
        for epoch in range(training.epoch):
            self._write(training.result, epoch)

    def step(self, epoch: int, step: int, losses: Tensor) -> None:
        pass

    def epoch_done(self, training: Training) -> None:
        self._write(training.result, training.epoch - 1)
        self.writer.flush()

    def done(self, number: int, result: Result) -> None:
        self.writer.close()

    def _write(self, result: Result, epoch: int) -> None:
        line = result.history[epoch]
        kinds = {"train": "train_loss", "validation": "validation_loss", "metric": "validation_metric"}
        numbers = {kind: line[key] for key, kind in kinds.items()} | {"weight": line["share"]}
        numbers |= {f"dominance_{layer}": shares for layer, shares in (line["dominance"] or {}).items()}
        for kind, values in numbers.items():
            for task, value in zip(result.tasks, values or ()):
                self.writer.add_scalar(f"{kind}/{task}", value, epoch + 1)


class Watchers:
    """Several, or none, in place of one."""

    def __init__(self, *watchers: Any):
        self.watchers = watchers

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: [getattr(watcher, name)(*arguments) for watcher in self.watchers]


def console_for_output() -> Console:
    """Return a terminal, or a file, which has no edge at which to break lines."""
    console = Console()
    return console if console.is_terminal else Console(width=1000)


def say(console: Console, text: str) -> None:
    """Print a line as it is: no markup, no colours for numbers, and no line break in a path."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def show_table(console: Console, cells: list[list[str]]) -> None:
    """Print cells, the header first: on a terminal too narrow for it one below another, each with the first column."""
    widths = [max(len(row[i]) for row in cells) + 3 for i in range(len(cells[0]))]  # with a line and two blanks
    first = 1
    while first < len(widths):
        count = 1
        while first + count < len(widths) and widths[0] + sum(widths[first : first + count + 1]) < console.width:
            count += 1
        table = Table(header_style="bold")
        for i in (0, *range(first, first + count)):
            table.add_column(cells[0][i], justify="left" if i == 0 else "right", no_wrap=i == 0, overflow="fold")
        for row in cells[1:]:
            table.add_row(row[0], *row[first : first + count])
        console.print(table)
        first += count
