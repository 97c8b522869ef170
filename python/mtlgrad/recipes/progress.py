"""What a user sees while a run goes on, and the table at its end. Needs rich, which the extra `train` installs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .base import Job, Result, Settings, Task
from .training import Training

SHOW_EVERY = 10  # steps; reading a loss waits for the device


def _title(number: int, count: int, job: Job, tasks: Sequence[Task]) -> str:
    return f"[{number + 1}/{count}] {job.title(tasks)}"


class _Bars(Progress):
    """Bars with the losses on a line of their own: beside the bars they would not fit 80 columns."""

    losses = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.losses, style="dim", no_wrap=True, overflow="ellipsis")


class LiveProgress:
    """Two bars on a terminal, the whole run in epochs and the training at hand, and its losses per task."""

    def __init__(self, console: Console, settings: Settings, jobs: Sequence[Job], tasks: Sequence[Task], done: int):
        self.jobs, self.tasks, self.settings = jobs, tasks, settings
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
        self.progress = _Bars(*columns, console=console, transient=True)
        epochs = settings.epochs
        self.whole = self.progress.add_task("all epochs", total=len(jobs) * epochs, completed=done * epochs)
        self.bar: TaskID | None = None

    def __enter__(self) -> LiveProgress:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def start(self, number: int, trainer: Training) -> None:
        job, self.steps = trainer.job, trainer.ticks
        if self.bar is not None:
            self.progress.remove_task(self.bar)
        self.progress.update(self.whole, completed=number * self.settings.epochs + trainer.epoch)
        title, total = _title(number, len(self.jobs), job, self.tasks), self.steps * self.settings.epochs
        self.bar = self.progress.add_task(title, total=total, completed=trainer.epoch * self.steps)
        self.names = [t.name for t in trainer.tasks]

    def step(self, epoch: int, step: int, losses: Tensor) -> None:
        if step % SHOW_EVERY == 0 and self.bar is not None:
            numbers = ["-" if math.isnan(loss) else f"{loss:.3f}" for loss in losses.tolist()]
            text = "  ".join(f"{name} {number}" for name, number in zip(self.names, numbers, strict=True))
            self.progress.losses = f"losses  {text}"
            self.progress.update(self.bar, completed=epoch * self.steps + step + 1)

    def epoch_done(self, trainer: Training) -> None:
        self.progress.advance(self.whole)

    def done(self, number: int, result: Result) -> None:
        pass


class LineProgress:
    """Without a terminal: one line a finished training."""

    def __init__(self, console: Console, jobs: Sequence[Job], tasks: Sequence[Task]):
        self.console, self.jobs, self.tasks = console, jobs, tasks

    def __enter__(self) -> LineProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def start(self, number: int, trainer: Training) -> None:
        pass

    def step(self, epoch: int, step: int, losses: Tensor) -> None:
        pass

    def epoch_done(self, trainer: Training) -> None:
        pass

    def done(self, number: int, result: Result) -> None:
        title = _title(number, len(self.jobs), result.job, self.tasks)
        losses = "  ".join(f"{n} {loss:.4f}" for n, loss in zip(result.tasks, result.history[-1]["train"], strict=True))
        seconds = sum(line["seconds"] for line in result.history)
        say(self.console, f"{title}: {seconds:.1f} s, training losses {losses}")


def console_for_output() -> Console:
    """A terminal, or a file, which has no edge at which to break lines."""
    console = Console()
    return console if console.is_terminal else Console(width=1000)


def say(console: Console, text: str) -> None:
    """A line as it is: no markup, no colours for numbers, and no line break in a path."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def show_table(console: Console, cells: list[list[str]]) -> None:
    """The table of `report.rows`: on a terminal too narrow for it one below another, each with the first column."""
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
