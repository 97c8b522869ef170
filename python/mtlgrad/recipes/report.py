"""What came out: CSV files, a table, figures, and a sentence below."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from .. import plots
from ..metrics import delta_m
from .tasks import Task
from .training import Result

if TYPE_CHECKING:
    from .comparison import Comparison


def as_csv(rows: list[list[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def higher(tasks: Sequence[Task]) -> list[bool]:
    return [task.metric.higher_is_better for task in tasks]


def label(task: Task) -> str:
    metric: str = task.metric.name
    arrow = "↑" if higher([task])[0] else "↓"
    return f"{task.name}: {metric}{f' ({task.unit})' if task.unit else ''} {arrow}"


def baseline(chosen: Sequence[Result], tasks: Sequence[Task]) -> list[float] | None:
    """Return a task's metric of its nets alone, the mean over seeds, for each; None while one has none."""
    found = [[r.metrics[0] for r in chosen if r.job.task == task.name] for task in tasks]
    return [statistics.mean(values) for values in found] if all(found) else None


def score(values: Sequence[float], is_higher_better: Sequence[bool]) -> float:
    """Return what is less for better metrics: the mean of their logarithms, negative where more is better.

    Differences are mean relative changes, as Delta_m's are, and need no baseline. A metric that is NaN is left out.
    """
    known = [(value, up) for value, up in zip(values, is_higher_better, strict=True) if not math.isnan(value)]
    terms = [math.log(max(value, 1e-12)) * (-1 if up else 1) for value, up in known]
    return statistics.mean(terms) if terms else math.inf


def change(values: Sequence[float], base: Sequence[float], tasks: Sequence[Task]) -> float:
    """Return Delta_m in percent, of the tasks that have a base that is neither 0 nor NaN; NaN where a value is."""
    known = [i for i, number in enumerate(base) if number and not math.isnan(number)]
    if not known or any(math.isnan(values[i]) for i in known):
        return math.nan
    up = higher(tasks)
    return delta_m([values[i] for i in known], [base[i] for i in known], [up[i] for i in known])


def deltas(chosen: Sequence[Result], tasks: Sequence[Task]) -> dict[str, dict[int, float]]:
    """Return Delta_m in percent, method -> seed -> value; empty while there is nothing to compare with."""
    base, found = baseline(chosen, tasks), dict[str, dict[int, float]]()
    for r in chosen:
        if r.job.task is None and base is not None:
            found.setdefault(r.job.method, {})[r.job.seed] = change(r.metrics, base, tasks)
    return found


def results_csv(results: Sequence[Result], chosen: Sequence[Result], tasks: Sequence[Task]) -> str:
    """Write a row per method, learning rate, seed and task, on the test split, and Delta_m of those chosen."""
    head = "method,lr,seed,chosen,task,metric,higher_is_better,validation,test,step_ms"
    rows: list[list[object]] = [[*head.split(",")]]
    table = {task.name: task for task in tasks}
    for r in results:
        metrics = r.metrics or [math.nan] * len(r.tasks)
        last = r.history[-1]["metric"] if r.history else metrics
        is_chosen, ms = int(any(r is c for c in chosen)), round(r.step_ms, 3) if r.history else ""
        for name, value, validation in zip(r.tasks, metrics, last, strict=True):
            up = int(higher([table[name]])[0])
            metric: str = table[name].metric.name
            start = [_method(r), r.job.lr, r.job.seed, is_chosen]
            rows.append([*start, name, metric, up, validation, value, ms])
    for method, values in deltas(chosen, tasks).items():
        rate = next(r.job.lr for r in chosen if r.job.method == method)
        rows += [[method, rate, seed, 1, "all", "delta_m", 0, "", value, ""] for seed, value in values.items()]
    return as_csv(rows)


def _method(result: Result) -> str:
    return result.job.method if result.job.task is None else "single-task"


def history_csv(results: Sequence[Result]) -> str:
    """Write a row per method, learning rate, seed, epoch and task."""
    head = "method,lr,seed,epoch,task,train_loss,validation_loss,validation_metric,task_weight"
    rows: list[list[object]] = [[*head.split(",")]]
    for r in results:
        for epoch, line in enumerate(r.history, 1):
            share = line["share"] or [""] * len(r.tasks)
            columns = zip(r.tasks, line["train"], line["validation"], line["metric"], share, strict=True)
            start = [_method(r), r.job.lr, r.job.seed, epoch]
            rows += [[*start, *values] for values in columns]
    return as_csv(rows)


def spread(values: Sequence[float], form: str) -> str:
    """Return mean and, from two seeds on, standard deviation."""
    if not values:
        return "-"
    mean = format(np.mean(values), form)
    return f"{mean} ± {format(np.std(values, ddof=1), form.lstrip('+'))}" if len(values) > 1 else mean


def table(comparison: Comparison) -> list[list[str]]:
    """Return the cells, the header first: a row a contender, a column a task, then Delta_m, rate and time."""
    tasks, chosen = comparison.tasks, comparison.chosen()
    cells = [["method", *(label(task) for task in tasks), "Δm %, + is worse ↓", "lr", "ms a step"]]
    alone = [[r.metrics[0] for r in chosen if r.job.task == task.name] for task in tasks]
    own = "each its own" if len(comparison.settings.rates) > 1 else ""
    cells.append(["single-task", *(spread(v, f".{t.digits}f") for v, t in zip(alone, tasks)), "-", own, ""])
    found = deltas(chosen, tasks)
    for method in comparison.settings.methods:
        runs = [r for r in chosen if r.job.method == method]
        if runs:
            columns = zip(*(r.metrics for r in runs), strict=True)
            numbers = [spread(values, f".{task.digits}f") for values, task in zip(columns, tasks)]
            time = f"{statistics.median(r.step_ms for r in runs):.2f}"
            delta = spread([*found.get(method, {}).values()], "+.2f")
            cells.append([method, *numbers, delta, f"{runs[0].job.lr:g}", time])
    return cells


#: Two-sided 95 % points of Student's t, by degrees of freedom.
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def headline(comparison: Comparison) -> str | None:
    """Say in words what came out: the best by Delta_m, and what is level with it (paired over the seeds, 95 %)."""
    found = deltas(comparison.chosen(), comparison.tasks)
    found = {method: values for method, values in found.items() if not any(map(math.isnan, values.values()))}
    if not found:
        return None
    ranked = sorted(found, key=lambda method: statistics.mean(found[method].values()))
    best, level = ranked[0], []
    for other in ranked[1:]:
        seeds = found[best].keys() & found[other].keys()
        differences = [found[other][seed] - found[best][seed] for seed in seeds]
        if len(differences) > 1:
            width = _T95[min(len(differences) - 1, len(_T95)) - 1] * statistics.stdev(differences)
            if statistics.mean(differences) <= width / math.sqrt(len(differences)):
                level.append(other)
    value, count = statistics.mean(found[best].values()), len(found[best])
    words = f"{best}{' is best here' if len(ranked) > 1 else ''}: "
    words += f"{abs(value):.1f} % {'worse' if value > 0 else 'better'} than single-task nets"
    if count == 1 and len(ranked) > 1:
        words += "; one seed, so that nothing is said about chance"
    elif level:
        every = len(level) == len(ranked) - 1
        words += "; no other differs by more than chance" if every else f"; level with it: {', '.join(level)}"
        words += f" (95 %, paired over {count} seeds{', which tell little apart' if count < 4 else ''})"
    if len(comparison.settings.rates) < 2:
        words += "; one learning rate for all says little: --tune-lr"
    return words


def figures(comparison: Comparison) -> dict[str, bytes]:
    """Draw loss_curves.png, task_weights.png and, where an optimizer keeps count, dominance.png."""
    runs: dict[str, list[Result]] = {}
    for r in comparison.chosen():
        if r.job.task is None:
            runs.setdefault(r.job.method, []).append(r)

    def curves(key: str) -> plots.Curves:
        """Return means over seeds: method -> [epochs][tasks]."""
        known = {m: found for m, found in runs.items() if found[0].history[-1][key] is not None}
        return {
            m: torch.tensor([[line[key] for line in r.history] for r in found]).mean(0).tolist()
            for m, found in known.items()
        }

    drawn = {
        "loss_curves.png": plots.loss_curves(comparison.names, curves("train"), curves("validation")),
        "task_weights.png": plots.task_weights(comparison.names, curves("share")),
    }
    shares = {
        m: [[*line["dominance"].values()] for line in found[0].history]
        for m, found in runs.items()
        if found[0].history[0]["dominance"] is not None
    }
    if shares:
        layers = list(runs[next(iter(shares))][0].history[0]["dominance"])
        drawn["dominance.png"] = plots.dominance(comparison.names, layers, shares)
    return drawn
