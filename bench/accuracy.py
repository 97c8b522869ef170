"""The accuracy study: what each method reaches on five data sets, at learning rates chosen on validation splits.

    python -m bench.accuracy run river yeast      # goes on where it was; hours for all five
    python -m bench.accuracy scale                # river's first loss times 10^k, under Adam and AdaTask; two minutes
    python -m bench.accuracy report               # writes docs/accuracy.md from bench/results/accuracy/*.csv

Of each contender every rate of ``RATES`` is tried on seed 0; the two with the best validation metrics are run on the
other seeds, and the better of them, by the mean over the seeds, counts. (The best of seed 0 alone is not always good on
others: on river the sum at 2e-2 has +83 +- 50.) Fixed weights are the best of ``DRAWS`` at the rate of the plain sum.
Tables are of the test split after the last epoch.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import mtlgrad
from bench.table import commit, processor
from mtlgrad.metrics import delta_m
from mtlgrad.recipes.alphavil import AlphaVILTraining
from mtlgrad.recipes.comparison import RATES, recipe_class
from mtlgrad.recipes.methods import ALPHAVIL
from mtlgrad.recipes.recipe import Recipe, TrainError
from mtlgrad.recipes.report import score
from mtlgrad.recipes.training import SINGLE, Job, Training

RESULTS = Path(__file__).parent / "results" / "accuracy"
SEEDS, DRAWS = 5, 8
FIXED = "fixed"  #: the sum with tuned weights
METHODS = (
    *("sum", "logsum", "uncertainty", FIXED, "bayesagg", "bayesagg-published"),
    *("aligned-ub", "aligned", "aligned-rmse-ub", "aligned-rmse"),
    *("aligned-ub-log", "aligned-log", "aligned-rmse-ub-log", "aligned-rmse-log"),
    *("adatask", "adatask-mean", "adatask-log", ALPHAVIL),
    *("upgrad-ub", "dualproj-ub", "mgda-ub", "cagrad-ub", "nash-ub", "fairgrad-ub", "imtl-ub", "pcgrad-ub"),
)
#: A data set -> the task that alphaVIL trains the others for.
TARGETS = {
    "river": "CHSI2",
    "yeast": "function 1",
    "clothing": "rating",
    "qm9": "homo",
    "multimnist": "left",
}
COLUMNS = (
    *("dataset", "method", "lr", "seed", "weights", "task", "metric", "higher_is_better", "validation", "test"),
    *("epochs", "step_ms", "seconds", "error", "date", "cpu", "torch", "mtlgrad", "commit"),
)
Row = dict[str, str]


class Study:
    """One data set: what is done, in a CSV, and what comes next."""

    def __init__(self, dataset: str, folder: Path | None = None):
        self.dataset, self.path = dataset, (folder or RESULTS) / f"{dataset}.csv"
        self.seeds = SEEDS
        self.rows: list[Row] = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))
        self.recipes: dict[int, Recipe] = {}

    def recipe(self, seed: int) -> Recipe:
        if seed not in self.recipes:
            self.recipes[seed] = recipe_class(self.dataset)(seed)
        return self.recipes[seed]

    def find(self, method: str, lr: float, seed: int, weights: str = "", task: str | None = None) -> list[Row]:
        """Return a training's rows, one a task; none if it has not run."""
        key = (method, f"{lr:g}", str(seed), weights)
        found = [row for row in self.rows if (row["method"], row["lr"], row["seed"], row["weights"]) == key]
        return found if task is None else [row for row in found if row["task"] == task]

    def train(self, method: str, lr: float, seed: int, weights: str = "", task: str | None = None) -> None:
        """Train, unless that is done, and write a row a task."""
        if self.find(method, lr, seed, weights, task):
            return
        start, recipe = time.perf_counter(), self.recipe(seed)
        job = Job("sum" if method == FIXED else method, seed, lr, task)
        preference = [float(word) for word in weights.split()] or None
        error, training = "", self.training(recipe, job, preference)
        try:
            while training.epoch < recipe.epochs:
                training.run_epoch(lambda *_: None)
            result = training.finish()
            validation, test = result.history[-1]["metric"], result.metrics
        except (TrainError, RuntimeError, ValueError) as failure:
            error, result = " ".join(str(failure).split()), training.result
            validation = test = [math.nan] * len(result.tasks)
        facts = {
            "dataset": self.dataset, "method": method, "lr": f"{lr:g}", "seed": seed, "weights": weights,
            "epochs": recipe.epochs, "step_ms": f"{result.step_ms:.2f}" if result.history else "",
            "seconds": f"{time.perf_counter() - start:.1f}", "error": error, "date": datetime.date.today().isoformat(),
            "cpu": processor(), "torch": torch.__version__, "mtlgrad": mtlgrad.__version__, "commit": commit(),
        }  # fmt: skip
        new = [
            {name: str(value) for name, value in (facts | own).items()}
            for own in (
                {
                    "task": own_task.name,
                    "metric": own_task.metric.name,
                    "higher_is_better": int(own_task.metric.higher_is_better),
                    "validation": repr(own_validation),
                    "test": repr(own_test),
                }
                for own_task, own_validation, own_test in zip(training.tasks, validation, test, strict=True)
            )
        ]
        self.rows += new
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerows(new)
        words = " ".join(filter(None, (method, task, weights)))
        print(f"{self.dataset}: {words}, lr {lr:g}, seed {seed}: {facts['seconds']} s {error}", flush=True)

    def training(self, recipe: Recipe, job: Job, preference: list[float] | None) -> Training:
        settings = recipe.epochs, recipe.batch_size, torch.device("cpu")
        if job.method == ALPHAVIL:
            return AlphaVILTraining(recipe, job, *settings, TARGETS[self.dataset])
        return Training(recipe, job, *settings, preference)

    def score(self, rows: list[Row]) -> float:
        """Return what is less for better validation metrics; of alphaVIL its target's."""
        if rows[0]["method"] == ALPHAVIL:
            rows = [row for row in rows if row["task"] == TARGETS[self.dataset]]
        if any(row["error"] for row in rows):
            return math.inf
        return score([float(row["validation"]) for row in rows], [row["higher_is_better"] == "1" for row in rows])

    def finalists(self, method: str, task: str | None = None) -> list[float]:
        """Return the two rates with the best validation metrics on seed 0."""
        return sorted(RATES, key=lambda lr: self.score(self.find(method, lr, 0, task=task)))[:2]

    def best_rate(self, method: str, task: str | None = None) -> float:
        """Return the better of them, by the mean over all seeds."""

        def mean(lr: float) -> float:
            found = [self.find(method, lr, seed, task=task) for seed in range(self.seeds)]
            return statistics.mean(self.score(rows) for rows in found)

        return min(self.finalists(method, task), key=mean)

    def is_done(self, method: str, task: str | None = None) -> bool:
        """Return whether a contender has every training that is compared."""
        return all(self.find(method, lr, 0, task=task) for lr in RATES) and all(
            self.find(method, lr, seed, task=task) for lr in self.finalists(method, task) for seed in range(self.seeds)
        )

    def has_baselines(self) -> bool:
        """Return whether there is enough to report: single-task nets, the sum and that of logarithms on all seeds."""
        tasks = dict.fromkeys(row["task"] for row in self.rows)
        needed = [*((SINGLE, task) for task in tasks), ("sum", None), ("logsum", None)]
        return bool(tasks) and all(self.is_done(method, task) for method, task in needed)

    def best_weights(self) -> str:
        lr = self.best_rate("sum")
        own = (row for row in self.rows if row["method"] == FIXED and row["seed"] == "0")
        tried = {row["weights"] for row in own if row["lr"] == f"{lr:g}"}
        return min(sorted(tried), key=lambda weights: self.score(self.find(FIXED, lr, 0, weights)))

    def run(self) -> None:
        """Train everything that is not yet done."""
        names = [task.name for task in self.recipe(0).tasks]
        for method, task in [*((SINGLE, name) for name in names), *((method, None) for method in METHODS)]:
            if method == FIXED:
                for weights in draws(len(names)):
                    self.train(FIXED, self.best_rate("sum"), 0, weights)
                for seed in range(1, SEEDS):
                    self.train(FIXED, self.best_rate("sum"), seed, self.best_weights())
                continue
            self.train_rates(method, task)

    def train_rates(self, method: str, task: str | None = None) -> None:
        """Train by one contender with every rate, and with the two best on every seed."""
        for lr in RATES:
            self.train(method, lr, 0, task=task)
        for lr in self.finalists(method, task):
            for seed in range(1, self.seeds):
                self.train(method, lr, seed, task=task)


def draws(tasks: int) -> Iterator[str]:
    """Yield weights to try: equal ones, then log-normal ones, a factor of e being common; they sum to T."""
    yield " ".join(["1.000"] * tasks)
    generator = torch.Generator().manual_seed(7)
    for _ in range(DRAWS - 1):
        weights = torch.randn(tasks, generator=generator).exp()
        yield " ".join(f"{w:.3f}" for w in (weights * tasks / weights.sum()).tolist())


# ---- what the scale of a loss does

SCALES = RESULTS.parent / "defaults" / "scale_river.csv"
POWERS = range(-3, 4)


def scale(epochs: int = 10, seeds: int = 3) -> None:
    """Train on river with its first task's loss times 10^k, and write every task's error."""
    rows = []
    for method in ("sum", "adatask"):
        for power in POWERS:
            for seed in range(seeds):
                recipe = recipe_class("river")(seed)
                first, *others = recipe.tasks
                recipe.tasks = [dataclasses.replace(first, loss=times(10.0**power, first.loss)), *others]
                device, job = torch.device("cpu"), Job(method, seed, 3e-3)
                training = Training(recipe, job, epochs, recipe.batch_size, device)
                while training.epoch < epochs:
                    training.run_epoch(lambda *_: None)
                errors = training.finish().metrics
                rows += [(method, power, seed, t.name, repr(e)) for t, e in zip(recipe.tasks, errors, strict=True)]
    with SCALES.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("method", "power", "seed", "task", "MAE"), *rows])


def times(factor: float, loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda output, target: factor * loss(output, target)


def scale_section() -> str:
    """Write how far the errors are from those of k = 0, the first task's and the others'."""
    with SCALES.open(newline="") as file:
        found = {
            (r["method"], int(r["power"]), int(r["seed"]), r["task"]): float(r["MAE"]) for r in csv.DictReader(file)
        }
    tasks, seeds = list(dict.fromkeys(key[3] for key in found)), sorted({key[2] for key in found})

    def cell(method: str, power: int, which: Sequence[str]) -> str:
        changes = [
            100 * statistics.mean(found[method, power, s, t] / found[method, 0, s, t] - 1 for t in which) for s in seeds
        ]
        return f"{statistics.mean(changes):+.1f} ± {statistics.stdev(changes):.1f}"

    head = ["k", "Adam: the task", "Adam: the others", "AdaTask: the task", "AdaTask: the others"]
    sides = [(method, which) for method in ("sum", "adatask") for which in (tasks[:1], tasks[1:])]
    rows = [[str(power), *(cell(method, power, which) for method, which in sides)] for power in POWERS if power]
    return SCALE_HEAD.format(seeds=len(seeds)) + f"\n{markdown([head, *rows])}\n"


SCALE_HEAD = """## One loss times 10^k

River, the first task's loss times 10^k, the plain sum under Adam and under AdaTask: change of the test errors against
k = 0 in percent, {seeds} seeds, 10 epochs, learning rate 3e-3.
"""


# ---- the report

#: What a contender is, for readers of the tables.
NAMES = {
    "sum": "sum",
    "logsum": "sum of logarithms",
    "uncertainty": "uncertainty weighting",
    FIXED: "fixed weights, tuned",
    "bayesagg": "**BayesAgg**",
    "bayesagg-published": "BayesAgg as published",
    "adatask": "**AdaTask** (Adam)",
    "adatask-mean": "AdaTask, mean of updates",
    "adatask-log": "AdaTask, logarithms",
    ALPHAVIL: "**alphaVIL**",
}
WORDS = {"aligned": "**Aligned-MTL**", "upgrad": "UPGrad", "dualproj": "DualProj", "mgda": "MGDA", "cagrad": "CAGrad",
         "nash": "Nash-MTL", "fairgrad": "FairGrad", "imtl": "IMTL-G", "pcgrad": "PCGrad"}  # fmt: skip
T95 = 2.776  #: Student's, two-sided, of 5 seeds
OURS = ("bayesagg", "aligned", "adatask")
BASELINES = ("sum", "logsum", "uncertainty", FIXED)


def name_of(method: str) -> str:
    if method in NAMES:
        return NAMES[method]
    first, *rest = method.split("-")
    forms = {"ub": "layer", "log": "logarithms", "rmse": "scale rmse"}
    return ", ".join([WORDS[first], *(forms[word] for word in rest)])


class Column(NamedTuple):
    """A contender's test results at its best rate."""

    method: str
    lr: float
    delta: list[float]  #: Delta_m in percent, a seed each
    step_ms: float


class Found:
    """What a data set's CSV says."""

    def __init__(self, study: Study):
        self.study = study
        self.tasks = list(dict.fromkeys(row["task"] for row in study.rows))
        first = {row["task"]: row for row in study.rows}
        self.higher = [first[task]["higher_is_better"] == "1" for task in self.tasks]
        self.metrics = [first[task]["metric"] for task in self.tasks]
        self.alone = {task: [float(r["test"]) for r in self._single(task)] for task in self.tasks}
        self.base = [statistics.mean(self.alone[task]) for task in self.tasks]
        self.columns = [column for method in METHODS if (column := self._column(method)) is not None]

    def _single(self, task: str) -> list[Row]:
        lr = self.study.best_rate(SINGLE, task)
        return [row for seed in range(SEEDS) for row in self.study.find(SINGLE, lr, seed, task=task)]

    def runs(self, method: str) -> list[list[Row]]:
        """Return the rows of each seed at the best rate; none where the study is not done."""
        rate_of = "sum" if method == FIXED else method
        if not self.study.is_done(rate_of):
            return []
        lr, weights = self.study.best_rate(rate_of), self._weights(method)
        found = [self.study.find(method, lr, seed, weights) for seed in range(SEEDS)]
        return found if all(found) else []

    def _weights(self, method: str) -> str:
        known = method == FIXED and self.study.find(FIXED, self.study.best_rate("sum"), 0, next(draws(len(self.tasks))))
        return self.study.best_weights() if known else ""

    def _column(self, method: str) -> Column | None:
        runs = self.runs(method)
        if not runs:
            return None
        delta = [self.delta(rows) for rows in runs]
        times = [float(row["step_ms"]) for rows in runs for row in rows[:1]]
        return Column(method, float(runs[0][0]["lr"]), delta, statistics.median(times))

    def delta(self, rows: list[Row]) -> float:
        """Return Delta_m of one training, in percent."""
        return delta_m([float(row["test"]) for row in rows], self.base, self.higher)

    def values(self, method: str, task: str) -> list[float]:
        return [float(row["test"]) for rows in self.runs(method) for row in rows if row["task"] == task]

    def best(self, among: Sequence[str]) -> Column | None:
        listed = [c for c in self.columns if c.method in among]
        return min(listed, key=lambda c: statistics.mean(c.delta), default=None)


def difference(column: Column, other: Column) -> tuple[float, float]:
    """Return the mean of the paired differences over the seeds, and half of its 95 % interval."""
    differences = [a - b for a, b in zip(column.delta, other.delta, strict=True)]
    return statistics.mean(differences), T95 * statistics.stdev(differences) / math.sqrt(SEEDS)


def spread(values: Sequence[float], form: str) -> str:
    deviation = form.lstrip("+").replace("4g", "2g")
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{deviation}}"


def markdown(cells: Sequence[Sequence[str]]) -> str:
    rows = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([rows[0], "|" + " --- |" * len(cells[0]), *rows[1:]])


def section(dataset: str, found: Found) -> str:
    """Write a data set's part: what came out in a sentence, then the table, the best first."""
    by_method = {column.method: column for column in found.columns}
    ranked = sorted((c for c in found.columns if c.method != ALPHAVIL), key=lambda c: statistics.mean(c.delta))
    cells = [["method", "Δm %", "against sum", "against logarithms", "lr", "ms a step"]]
    for column in ranked:
        cell = [name_of(column.method), spread(column.delta, "+.2f")]
        for baseline in ("sum", "logsum"):
            mean, half = difference(column, by_method[baseline])
            cell.append("-" if column.method == baseline else f"{mean:+.2f} ± {half:.2f}" + " =" * (abs(mean) <= half))
        cells.append([*cell, f"{column.lr:g}", f"{column.step_ms:.1f}"])
    text = f"## {dataset}\n\n{sentence(found)}\n\n{markdown(cells)}\n"
    if len(found.tasks) <= 4:
        head = [f"{t}: {m} {'↑' if up else '↓'}" for t, m, up in zip(found.tasks, found.metrics, found.higher)]
        rows = [["method", *head], ["single-task", *(spread(found.alone[t], ".4g") for t in found.tasks)]]
        rows += [[name_of(c.method), *(spread(found.values(c.method, t), ".4g") for t in found.tasks)] for c in ranked]
        text += f"\n{markdown(rows)}\n"
    if ALPHAVIL in by_method:
        target = TARGETS[dataset]
        at = found.metrics[found.tasks.index(target)]
        words = [("alone", found.alone[target]), *((name_of(m), found.values(m, target)) for m in (ALPHAVIL, "sum"))]
        listed = ", ".join(f"{name} {spread(values, '.4g')}" for name, values in words)
        text += f"\nalphaVIL trains for one task, {target} ({at}): {listed}.\n"
    if missing := [name_of(method).replace("**", "") for method in METHODS if method not in by_method]:
        text += f"\nNot yet run on all seeds: {'; '.join(missing)}.\n"
    return text


def sentence(found: Found) -> str:
    """Say which baseline is best, and whether one of our methods is level with it or ahead."""
    baseline = found.best(BASELINES)
    mine = found.best([m for m in METHODS if m.split("-")[0] in OURS and m != "bayesagg-published"])
    if baseline is None or mine is None:
        return "The study of this set has only begun."
    mean, half = difference(mine, baseline)
    word = "level with" if abs(mean) <= half else "ahead of" if mean < 0 else "behind"
    return (
        f"Of the four methods of this package {name_of(mine.method).replace('**', '')} comes out best "
        f"({spread(mine.delta, '+.2f')}), {word} the best baseline, {name_of(baseline.method)} "
        f"({spread(baseline.delta, '+.2f')}): a difference of {mean:+.2f} ± {half:.2f}."
    )


def report(path: Path) -> None:
    """Write the page from the CSVs."""
    studies = {name: study for name in TARGETS if (study := Study(name)).has_baselines()}
    first = next(iter(studies.values())).rows[0]
    commits = sorted({row["commit"] for study in studies.values() for row in study.rows})
    text = HEAD.format(
        count=len(studies),
        torch=first["torch"],
        cpu=first["cpu"],
        commits=", ".join(commits),
        rates=", ".join(map(str, RATES)),
    )
    parts = [section(name, Found(study)) for name, study in studies.items()]
    path.write_text("\n".join([text, *parts, scale_section()]))


HEAD = """# Accuracy

<!-- Made by `python -m bench.accuracy report` from bench/results/accuracy/*.csv. -->

Every method on {count} data sets, each at its own learning rate of {rates}: the two best by the
validation metrics of seed 0 are run on all seeds, and the better one by their mean counts. Test split after the last
epoch; mean ± standard deviation over 5 seeds (initial weights, order of the data; for river, yeast and QM9 also the
split). Δm is the mean relative change of the tasks' metrics against nets for one task each, whose learning rates were
chosen likewise; in percent, + is worse. "Against" are paired differences of Δm over the seeds and half of their 95 %
interval; = where it contains 0. "Layer" is the form at the shared features (one backward); without it a rule is on the
backbone's parameters (a backward a task). "Logarithms": on the losses' logarithms. Fixed weights are the best of 8 on
the validation split, equal ones among them. Adam with a cosine schedule, small nets: `mtlgrad train`, and one file a
data set in `python/mtlgrad/data/`. torch {torch}, {cpu}, one thread of a busy machine (so times are rough),
commits {commits}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("datasets", nargs="+", choices=TARGETS)
    commands.add_parser("scale")
    commands.add_parser("report")
    given = parser.parse_args()
    if given.command == "run":
        torch.set_num_threads(1)
        for dataset in given.datasets:
            Study(dataset).run()
    elif given.command == "scale":
        torch.set_num_threads(1)
        scale()
    else:
        report(Path(__file__).parent.parent / "docs" / "accuracy.md")


if __name__ == "__main__":
    main()
