"""What came out: CSV files, a table, and lines below it."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..metrics import delta_m
from .base import Result, Task

SINGLE = "single-task"


def method_of(result: Result) -> str:
    return result.job.label if result.job.task is None else SINGLE


def of_method(results: Sequence[Result], method: str) -> list[Result]:
    """Those on all tasks, by the method's label."""
    return [r for r in results if r.job.task is None and r.job.label == method]


def as_csv(rows: list[list[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def results_csv(results: Sequence[Result], tasks: Sequence[Task]) -> str:
    """One row per method, seed and task, on the test split; then one with Delta_m per method and seed."""
    rows: list[list[object]] = [["method", "seed", "task", "metric", "value", "higher_is_better", "test_loss"]]
    table = {t.name: t for t in tasks}
    for result in results:
        for name, value, loss in zip(result.tasks, result.metrics, result.losses, strict=True):
            task = table[name]
            rows.append(
                [method_of(result), result.job.seed, name, task.metric, value, int(task.higher_is_better), loss]
            )
    base = baseline(results, tasks)
    if base is not None:
        joint = [r for r in results if r.job.task is None]
        rows += [[r.job.label, r.job.seed, "all", "delta_m", change(r, base, tasks), 0, ""] for r in joint]
    return as_csv(rows)


def history_csv(results: Sequence[Result]) -> str:
    """One row per method, seed, epoch and task."""
    values = ("train", "validation", "metric", "share")
    head = "method,seed,epoch,task,train_loss,validation_loss,validation_metric,task_weight,seconds"
    rows: list[list[object]] = [[*head.split(",")]]
    for result in results:
        for line in result.history:
            start, seconds = [method_of(result), result.job.seed, line["epoch"]], round(line["seconds"], 4)
            rows += [[*start, task, *(line[v][i] for v in values), seconds] for i, task in enumerate(result.tasks)]
    return as_csv(rows)


def dominance_csv(results: Sequence[Result]) -> str | None:
    """One row per method, seed, epoch, layer and task; None if no training knows of any."""
    rows: list[list[object]] = [["method", "seed", "epoch", "layer", "task", "share"]]
    for result in results:
        for line in result.history:
            start = [method_of(result), result.job.seed, line["epoch"]]
            for layer, shares in (line["dominance"] or {}).items():
                rows += [[*start, layer, task, share] for task, share in zip(result.tasks, shares, strict=True)]
    return as_csv(rows) if len(rows) > 1 else None


def rounds_csv(results: Sequence[Result]) -> str | None:
    """One row per method, seed, round and task; None if no training has rounds. Weights are those after the round."""
    head = "method,seed,round,task,alpha,task_weight,sat_out,kept,dev_loss_before,dev_loss_after"
    rows: list[list[object]] = [[*head.split(",")]]
    for result in results:
        for number, r in enumerate(result.rounds, 1):
            for i, task in enumerate(result.tasks):
                alpha = "" if r["alphas"] is None else r["alphas"][i]
                own = [alpha, r["weights"][i], int(r["sat_out"][i]), r["kept"] or "", r["before"], r["after"][i]]
                rows.append([method_of(result), result.job.seed, number, task, *own])
    return as_csv(rows) if len(rows) > 1 else None


def baseline(results: Sequence[Result], tasks: Sequence[Task]) -> list[float] | None:
    """Per task the mean over seeds of the single-task nets' metrics; None while a task has none yet."""
    found: list[list[float]] = [[r.metrics[0] for r in results if r.job.task == i] for i in range(len(tasks))]
    return [statistics.mean(values) for values in found] if all(found) else None


def change(result: Result, base: Sequence[float], tasks: Sequence[Task]) -> float:
    return delta_m(result.metrics, base, [t.higher_is_better for t in tasks])


@dataclass(frozen=True)
class Summary:
    """One column of the table: a method over its seeds. Lists hold one number a seed."""

    method: str
    metrics: list[list[float]]  #: per task
    delta: list[float]
    step_ms: float | None  #: median wall time of a step, what the method did between epochs included
    own_ms: float | None  #: what of that is the method's own work


def summaries(results: Sequence[Result], methods: Sequence[str], tasks: Sequence[Task]) -> list[Summary]:
    """The single-task nets, then the methods in the order asked for; what has no finished training is left out."""
    base = baseline(results, tasks)
    columns = []
    single = [[r.metrics[0] for r in results if r.job.task == i] for i in range(len(tasks))]
    if any(single):
        columns.append(Summary(SINGLE, single, [], None, None))
    for method in methods:
        runs = of_method(results, method)
        if not runs:
            continue
        metrics = [list(column) for column in zip(*(r.metrics for r in runs), strict=True)]
        delta = [change(r, base, tasks) for r in runs] if base is not None else []
        columns.append(Summary(method, metrics, delta, *_times(runs)))
    return columns


def _times(runs: Sequence[Result]) -> tuple[float | None, float | None]:
    steps = [x for r in runs for x in r.step_ms]
    if not steps:
        return None, None
    # Medians: on a busy machine single steps take ten times as long.
    between = statistics.median([x for r in runs for x in r.epoch_ms])
    own = [x for r in runs for x in r.own_ms]
    return statistics.median(steps) + between, statistics.median(own) + between if own else None


def spread(values: Sequence[float], form: str) -> str:
    """Mean and, from two seeds on, standard deviation over seeds."""
    if not values:
        return "-"
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form.lstrip('+'))}" if len(values) > 1 else mean


def rows(columns: Sequence[Summary], tasks: Sequence[Task], target: str | None = None) -> list[list[str]]:
    """The table's cells, the header first: a row a task, the target marked, then Delta_m and the times."""
    cells = [["", *(c.method for c in columns)]]
    for i, task in enumerate(tasks):
        unit = f" ({task.unit})" if task.unit else ""
        form = f".{task.digits}f"
        name = f"{task.name} (target)" if task.name == target else task.name
        label = f"{name}: {task.metric}{unit} {'↑' if task.higher_is_better else '↓'}"
        cells.append([label, *(spread(c.metrics[i], form) for c in columns)])
    cells.append(["Δm %, + is worse ↓", *(spread(c.delta, "+.2f") for c in columns)])
    cells.append(["ms a step", *("-" if c.step_ms is None else f"{c.step_ms:.2f}" for c in columns)])
    own = []
    for c in columns:
        if c.own_ms is None or c.step_ms is None or c.method == "sum":
            own.append("-")
        else:
            own.append(f"{c.own_ms:.2f} ({100 * c.own_ms / c.step_ms:.0f} %)")
    return [*cells, ["  the method's own", *own]]


def systems(results: Sequence[Result], methods: Sequence[str], tasks: int) -> list[str]:
    """A line for each method that looked at the tasks' gradients: how well conditioned they were, and of what rank."""
    lines = []
    for method in methods:
        runs = of_method(results, method)
        conditions, ranks = [c for r in runs for c in r.condition], [k for r in runs for k in r.rank]
        if conditions:
            low = 100 * sum(rank < tasks for rank in ranks) / len(ranks)
            lines.append(
                f"{method}: condition number of the task gradients {statistics.median(conditions):.3g} (median); "
                f"rank below {tasks}, where the min scale jumps, in {low:.1f} % of {len(ranks)} timed steps"
            )
    return lines


def searches(results: Sequence[Result], methods: Sequence[str]) -> list[str]:
    """A line for each method with rounds: what the search for alpha took, and in how many rounds it was in vain."""
    lines = []
    for method in methods:
        runs = of_method(results, method)
        rounds = [r for run in runs for r in run.rounds]
        kept, said, of = [r["kept"] for r in rounds], [], f"of {len(rounds)} rounds"
        if any(kept):
            search = sum(sum(run.epoch_ms) for run in runs)
            steps = sum(sum(run.step_ms) for run in runs)
            said.append(f"{100 * search / (search + steps):.0f} % of the time went into the search for alpha")
        if vain := kept.count("none"):
            said.append(f"in {vain} {of} no alpha lowered the development loss, and nothing moved")
        if ones := kept.count("start"):
            hint = "take more --alpha-epochs"
            said.append(f"in {ones} {of} the search found none better than alpha = 1, which was kept; {hint}")
        for i, task in enumerate(runs[0].tasks if rounds else []):
            if absent := sum(r["sat_out"][i] for r in rounds):
                said.append(f"{task} sat out {absent} {of}, where its training came to NaN or infinity; lower --lr")
        if said:
            lines.append(f"{method}: {'; '.join(said)}")
    return lines
