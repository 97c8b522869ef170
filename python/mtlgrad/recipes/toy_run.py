"""The command ``mtlgrad toy``: runs the landscape of `toy`, shows where the methods end, writes figure and table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from .. import plots
from ..ops.align import Scale
from . import toy
from .comparison import Interrupted
from .folder import NewFolder
from .progress import console_for_output, say, show_table
from .recipe import TrainError
from .report import as_csv

RECORD_EVERY = 50  # steps
WIDTH = 11.0  # the contours reach from -11 to 11


def run(
    methods: Sequence[str],
    preference: tuple[float, float],
    steps: int,
    lr: float,
    scale: Scale,
    out: Path,
    name: str | None,
    stop: Callable[[], bool],
) -> Path:
    """Return the folder, with toy.png and results.csv. Raise Interrupted on the way when asked to stop."""
    torch.set_num_threads(1)
    console = console_for_output()
    chosen = toy.methods(preference, methods)
    with NewFolder(out, name, "toy") as folder:
        own = f" scale {scale}," if "aligned" in methods else ""
        say(console, f"toy: {steps} steps of Adam, learning rate {lr:g},{own} five starts")
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("steps", total=steps)

            def watch(step: int) -> None:
                if stop():
                    raise Interrupted
                progress.update(bar, completed=step)

            paths = toy.descend(chosen, steps, lr, scale, RECORD_EVERY, watch)
        if not paths[-1].isfinite().all():
            raise TrainError(f"argument --lr: expected one at which the descents stay finite, found {lr:g}; lower it")
        ends = toy.outcomes(chosen, paths[-1])
        (folder.work / "toy.png").write_bytes(_figure(chosen, paths.double()))
        (folder.work / "results.csv").write_text(as_csv(_rows(ends)))
        path = folder.publish()
    goals = {"its optimum": [m for m in chosen if m.goal], "the Pareto front": [m for m in chosen if not m.goal]}
    goals = {goal: some for goal, some in goals.items() if some}
    show_table(console, [["method", "start", "losses", f"distance to {' or '.join(goals)}", "reached"], *_cells(ends)])
    for goal, some in goals.items():
        counts = [sum(e.reached for e in ends if e.method is method) for method in some]
        reached = "; ".join(f"{method.name}: {count}" for method, count in zip(some, counts, strict=True))
        say(
            console,
            f"{goal} (within {toy.REACHED}, in loss space) reached from, of {len(toy.STARTS)} starts: {reached}",
        )
    say(console, f"toy.png, results.csv: {path}")
    return path


def _figure(chosen: list[toy.Method], paths: Tensor) -> bytes:
    axis = torch.linspace(-WIDTH, WIDTH, 301, dtype=torch.float64)
    b, a = torch.meshgrid(axis, axis, indexing="ij")
    surface = toy.losses(torch.stack([a, b], -1))
    front = toy.pareto_front()
    descents = []
    for i, method in enumerate(chosen):
        path, height = paths[:, i], surface @ torch.tensor(method.preference, dtype=torch.float64)
        goal = None if method.goal is None else toy.optimum(method.goal)
        goals = None if goal is None else toy.losses(goal)
        descents.append(plots.Descent(method.name, height, path, toy.losses(path), goal, goals))
    return plots.landscape(axis, descents, front, toy.losses(front))


def _cells(ends: list[toy.Outcome]) -> list[list[str]]:
    some_aim = any(e.method.goal for e in ends)
    return [
        [
            e.method.name,
            "({:g}, {:g})".format(*e.start),
            "{:.3f}, {:.3f}".format(*e.losses),
            f"{e.distance:.4f}" + (" (front)" if e.method.goal is None and some_aim else ""),
            "yes" if e.reached else "no",
        ]
        for e in ends
    ]


def _rows(ends: list[toy.Outcome]) -> list[list[object]]:
    head = "method,weight_1,weight_2,start_1,start_2,end_1,end_2,loss_1,loss_2,distance,reached"
    return [
        [*head.split(",")],
        *(
            [e.method.name, *(e.method.goal or ("", "")), *e.start, *e.point, *e.losses, e.distance, int(e.reached)]
            for e in ends
        ),
    ]
