"""The accuracy study: what each method reaches on five data sets, at learning rates chosen on validation splits.

    python -m bench.accuracy run river yeast      # goes on where it was; hours for all five
    python -m bench.accuracy report               # writes docs/accuracy.md from bench/results/accuracy/*.csv

Of each contender every rate of ``RATES`` is tried on seed 0; the one with the best validation metrics (for several tasks
Delta_m against the single-task nets') is then run on the other seeds. Fixed weights are the best of ``DRAWS`` at the
rate of the plain sum. What counts is the test split after the last epoch.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import mtlgrad
from bench.table import commit, processor
from mtlgrad.metrics import delta_m
from mtlgrad.recipes.alphavil import AlphaVILTraining
from mtlgrad.recipes.comparison import RATES, recipe_class
from mtlgrad.recipes.methods import ALPHAVIL
from mtlgrad.recipes.recipe import Recipe, TrainError
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

    def __init__(self, dataset: str):
        self.dataset, self.path = dataset, RESULTS / f"{dataset}.csv"
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
        key = {"method": method, "lr": f"{lr:g}", "seed": str(seed), "weights": weights}
        key |= {} if task is None else {"task": task}
        return [row for row in self.rows if all(row[name] == value for name, value in key.items())]

    def train(self, method: str, lr: float, seed: int, weights: str = "", task: str | None = None) -> None:
        """Train, unless that is done, and write a row a task."""
        if self.find(method, lr, seed, weights, task):
            return
        start, recipe = time.perf_counter(), self.recipe(seed)
        job = Job("sum" if method == FIXED else method, seed, lr, task)
        preference = [float(word) for word in weights.split()] or None
        device = torch.device("cpu")
        error = ""
        training: Training
        if method == ALPHAVIL:
            target = TARGETS[self.dataset]
            training = AlphaVILTraining(recipe, job, recipe.epochs, recipe.batch_size, device, target)
        else:
            training = Training(recipe, job, recipe.epochs, recipe.batch_size, device, preference)
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
        RESULTS.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerows(new)
        print(f"{self.dataset}: {method}{f' {task}' if task else ''}, lr {lr:g}, seed {seed}{f', {weights}' if weights else ''}: "
              f"{facts['seconds']} s {error}", flush=True)  # fmt: skip

    def score(self, rows: list[Row]) -> float:
        """Return what is better the less it is: Delta_m on the validation split, in percent."""
        values = [float(row["validation"]) for row in rows]
        higher = [row["higher_is_better"] == "1" for row in rows]
        if rows[0]["method"] == SINGLE:
            return math.inf if math.isnan(values[0]) else -values[0] if higher[0] else values[0]
        found = delta_m(values, [float(self.single(row["task"], 0)["validation"]) for row in rows], higher)
        if rows[0]["method"] == ALPHAVIL:  # by its target alone
            at = [row["task"] for row in rows].index(TARGETS[self.dataset])
            found = -values[at] if higher[at] else values[at]
        return math.inf if math.isnan(found) else found

    def single(self, task: str, seed: int) -> Row:
        return self.find(SINGLE, self.best_rate(SINGLE, task), seed, task=task)[0]

    def best_rate(self, method: str, task: str | None = None) -> float:
        return min(RATES, key=lambda lr: self.score(self.find(method, lr, 0, task=task)))

    def best_weights(self) -> str:
        tried = {row["weights"] for row in self.rows if row["method"] == FIXED and row["seed"] == "0"}
        lr = self.best_rate("sum")
        return min(sorted(tried), key=lambda weights: self.score(self.find(FIXED, lr, 0, weights)))

    def run(self) -> None:
        """Train everything that is not yet done."""
        names = [task.name for task in self.recipe(0).tasks]
        for name in names:
            for lr in RATES:
                self.train(SINGLE, lr, 0, task=name)
            for seed in range(1, SEEDS):
                self.train(SINGLE, self.best_rate(SINGLE, name), seed, task=name)
        for method in METHODS:
            if method == FIXED:
                for weights in draws(len(names)):
                    self.train(FIXED, self.best_rate("sum"), 0, weights)
                for seed in range(1, SEEDS):
                    self.train(FIXED, self.best_rate("sum"), seed, self.best_weights())
                continue
            for lr in RATES:
                self.train(method, lr, 0)
            for seed in range(1, SEEDS):
                self.train(method, self.best_rate(method), seed)


def draws(tasks: int) -> Iterator[str]:
    """Yield weights to try: log-normal, a factor of e in either direction being common; they sum to T."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(DRAWS):
        weights = torch.randn(tasks, generator=generator).exp()
        yield " ".join(f"{w:.3f}" for w in (weights * tasks / weights.sum()).tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("datasets", nargs="+", choices=TARGETS)
    commands.add_parser("report")
    given = parser.parse_args()
    if given.command == "run":
        torch.set_num_threads(1)
        for dataset in given.datasets:
            Study(dataset).run()
    else:
        from bench.accuracy_report import write

        write()


if __name__ == "__main__":
    main()
