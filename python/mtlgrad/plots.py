"""Figures of a run as PNG bytes. matplotlib (extra `train`) is imported when a figure is drawn, not before.

The figures are drawn on Agg without pyplot: no display, no global state, safe beside a user's own figures.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curves = dict[str, list[list[float]]]  # method -> per epoch, per task
Shares = dict[str, list[list[list[float]]]]  # method -> per epoch, per layer, per task


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # No creation date, no version: equal runs give equal files.
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _panels(tasks: Sequence[str], curves: Curves, label: str, draw: Any, *, same_scale: bool = False) -> bytes:
    """One panel a task, at most four in a row; one line a method."""
    columns = min(len(tasks), 4)
    rows = -(-len(tasks) // columns)
    figure = _figure(3.2 * columns, 3.2 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=same_scale)
    for axis in grid.flat[len(tasks) :]:
        axis.remove()
    for i, (task, axis) in enumerate(zip(tasks, grid.flat)):
        for k, (method, epochs) in enumerate(curves.items()):
            draw(axis, i, method, range(1, len(epochs) + 1), [line[i] for line in epochs], f"C{k}")
        axis.set_title(task)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if i + columns >= len(tasks):
            axis.set_xlabel("epoch")
    for row in grid:
        row[0].set_ylabel(label)
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), fontsize="small")
    return _png(figure)


def loss_curves(tasks: Sequence[str], train: Curves, validation: Curves) -> bytes:
    """Draw, per task and method, validation loss (solid) and training loss (dotted) over the epochs.

    Args:
        tasks: their names, a panel each.
        train, validation: method -> ``[epochs][tasks]``, means over seeds. Losses more than twenty-fold apart get a
            logarithmic axis.

    Returns:
        A PNG.
    """
    columns = zip(*(line for curves in (train, validation) for epochs in curves.values() for line in epochs))
    ranges = [(min(values), max(values)) for values in columns]

    def draw(axis: Any, i: int, method: str, epochs: range, values: list[float], colour: str) -> None:
        axis.plot(epochs, values, color=colour, label=method)
        axis.plot(epochs, [line[i] for line in train[method]], color=colour, linestyle=":")
        if ranges[i][1] > 20 * ranges[i][0] > 0:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")

    return _panels(tasks, validation, "loss: validation —, training ···", draw)


def task_weights(tasks: Sequence[str], shares: Curves) -> bytes:
    """Draw, per task and method, the task's share of all weights over the epochs.

    Args:
        tasks: their names, a panel each.
        shares: method -> ``[epochs][tasks]``, means over seeds.

    Returns:
        A PNG.
    """
    every = [share for epochs in shares.values() for line in epochs for share in line]
    low, high = min(0.0, *every), max(every)
    margin = 0.05 * (high - low)

    def draw(axis: Any, i: int, method: str, epochs: range, values: list[float], colour: str) -> None:
        axis.plot(epochs, values, color=colour, label=method, marker="." if len(values) == 1 else None)
        axis.set_ylim(low and low - margin, high + margin)

    return _panels(tasks, shares, "share of the weights", draw, same_scale=True)


def dominance(tasks: Sequence[str], layers: Sequence[str], shares: Shares) -> bytes:
    """Draw who moves the shared parameters: per method and layer, each task's share of the squared updates by epoch.

    A panel a layer, at most five in a row; a block of rows a method; dashed, the share that all tasks would have if
    none dominated.

    Args:
        tasks, layers: their names.
        shares: method -> ``[epochs][layers][tasks]``, as ``optimizer.dominance(layers)`` of :mod:`mtlgrad.optim`, or
            ``shares(layers)`` of :class:`mtlgrad.metrics.Dominance`, had them after each epoch.

    Returns:
        A PNG.
    """
    columns = min(len(layers), 5)
    rows = -(-len(layers) // columns)
    figure = _figure(max(2.3 * columns, 6.4), 0.5 + len(shares) * (1.9 * rows + 0.4))
    finite = [s for epochs in shares.values() for line in epochs for layer in line for s in layer if math.isfinite(s)]
    high = min(1.02, 1.1 * max(finite, default=1.0))
    handles: dict[str, Any] = {}
    for block, (method, epochs) in zip(
        figure.subfigures(len(shares), 1, squeeze=False).flat, shares.items(), strict=True
    ):
        block.suptitle(method)
        grid = block.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axis in grid.flat[len(layers) :]:
            axis.remove()
        for i, (layer, axis) in enumerate(zip(layers, grid.flat)):
            for t, task in enumerate(tasks):
                values, marker = [line[i][t] for line in epochs], "." if len(epochs) == 1 else None
                (handles[task],) = axis.plot(range(1, len(epochs) + 1), values, color=f"C{t}", marker=marker)
            axis.axhline(1 / len(tasks), color="black", linestyle="--", linewidth=0.8)
            axis.set_title(layer, fontsize="small")
            axis.set_ylim(0.0, high)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
            if i + columns >= len(layers):
                axis.set_xlabel("epoch")
                axis.tick_params(labelbottom=True)
        for row in grid:
            row[0].set_ylabel("share of updates")
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=min(len(tasks), 5), fontsize="small")
    return _png(figure)


@dataclass(frozen=True)
class Descent:
    """What one method did on a landscape of two parameters and two losses, from S starts in R records."""

    title: str
    height: Tensor  #: [n, n] what the contours show, at (axis[j], axis[i]) of `landscape`
    path: Tensor  #: [R, S, 2] parameters
    losses: Tensor  #: [R, S, 2]
    goal: Tensor | None  #: [2] the parameters it should reach; None if any on the front will do
    goal_losses: Tensor | None  #: [2]


def landscape(axis: Tensor, descents: Sequence[Descent], front: Tensor, front_losses: Tensor) -> bytes:
    """Draw a column a method, at most five beside each other: above the parameters with contours, below the losses; the
    Pareto front in both.

    Args:
        axis: [n], the coordinates of the contours' grid.
        descents: one a method.
        front, front_losses: [P, 2] each, parameters and losses of the Pareto front.

    Returns:
        A PNG.
    """
    blocks = -(-len(descents) // 5)
    columns = -(-len(descents) // blocks)
    figure = _figure(3.6 * columns, 7.2 * blocks)
    grid = figure.subplots(2 * blocks, columns, squeeze=False, sharex="row", sharey="row")
    handles: dict[str, Any] = {}
    for k, descent in enumerate(descents):
        above, below = grid[2 * (k // columns) : 2 * (k // columns) + 2, k % columns]
        above.contour(axis.numpy(), axis.numpy(), descent.height.numpy(), levels=18, cmap="Greys", linewidths=0.6)
        for place, paths, line, goal in (
            (above, descent.path, front, descent.goal),
            (below, descent.losses, front_losses, descent.goal_losses),
        ):
            place.plot(*line.T.numpy(), color="black", linewidth=3, alpha=0.4, label="Pareto front")
            for i in range(paths.shape[1]):
                place.plot(*paths[:, i].T.numpy(), color=f"C{i}", linewidth=1.3, alpha=0.9)
                place.plot(*paths[0, i].tolist(), "o", color=f"C{i}", markersize=5, label="start" if i == 0 else None)
                place.plot(*paths[-1, i].tolist(), "X", color=f"C{i}", markersize=8, label="end" if i == 0 else None)
            if goal is not None:
                place.plot(*goal.tolist(), "*", color="black", markersize=13, markerfacecolor="none", label="optimum")
        above.set_title(descent.title, fontsize="medium")
        above.set_xlabel("parameter 1")
        below.set_xlabel("loss 1")
        below.grid(alpha=0.3)
        for handle, name in zip(*below.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    for row in range(0, 2 * blocks, 2):
        grid[row, 0].set_ylabel("parameter 2")
        grid[row + 1, 0].set_ylabel("loss 2")
    for unused in grid[-2:, len(descents) - columns * (blocks - 1) :].flat:
        unused.remove()
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles), fontsize="small")
    return _png(figure)
