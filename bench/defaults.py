"""How BayesAgg's defaults were chosen: one option changed at a time, in the trainings of the accuracy study.

    python -m bench.defaults run river yeast      # goes on where it was; half an hour for all four
    python -m bench.defaults report               # writes the table into docs/methods/bayesagg.md

Rates are chosen on validation splits, as there; by three seeds. The default's own rows are the study's.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.accuracy import RESULTS, Found, Study, markdown, name_of
from mtlgrad.recipes.methods import BayesAggregation, Method, Weights
from mtlgrad.recipes.recipe import Recipe
from mtlgrad.recipes.training import Job, Training

FOLDER = RESULTS.parent / "defaults" / "bayesagg"
PAGE = Path(__file__).parent.parent / "docs" / "methods" / "bayesagg.md"
START, END = "<!-- defaults -->\n", "<!-- end of defaults -->\n"
DATASETS = ("river", "qm9", "clothing", "yeast")
SEEDS = 3
DEFAULT = "bayesagg"
#: What is changed -> options of BayesAggregation.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "regression: gamma 0.1": {"regression": {"gamma": 0.1}},
    "regression: unit noise": {"regression": {"noise": 1.0}},
    "regression: power 0.2": {"regression": {"power": 0.2}},
    "classification: gamma 1": {"classification": {"gamma": 1.0}},
    "classification: full covariance": {"layer": {"covariance": "full"}},
    "moving, half-life 20": {"layer": {"statistics": "moving", "half_life": 20.0}},
}


class Variant(Training):
    """A training by the variant of BayesAgg that the job's method names."""

    def make_method(self, preference: Weights) -> Method:
        return BayesAggregation(self.tasks, self.model, self.epochs, VARIANTS[self.job.method])


class Variants(Study):
    """The variants on one data set that differ from the default there."""

    def __init__(self, dataset: str):
        super().__init__(dataset, FOLDER)
        self.seeds = SEEDS

    def training(self, recipe: Recipe, job: Job, preference: list[float] | None) -> Training:
        return Variant(recipe, job, recipe.epochs, recipe.batch_size, torch.device("cpu"))

    def run(self) -> None:
        kinds = {"regression" if task.kind == "regression" else "classification" for task in self.recipe(0).tasks}
        for name in VARIANTS:
            of, _, changed = name.partition(": ")
            if not changed or of in kinds:
                self.train_rates(name)


def table() -> str:
    """Write what each variant reaches, and the study's baselines on the same seeds."""
    rows: list[list[str]] = []
    found = {dataset: Found(Study(dataset)) for dataset in DATASETS}
    for name in ("sum", "logsum", "uncertainty", "bayesagg-published", DEFAULT, *VARIANTS):
        cells = []
        for dataset in DATASETS:
            study = Variants(dataset) if name in VARIANTS else Study(dataset)
            if not study.is_done(name):
                cells.append("")
                continue
            runs = [study.find(name, study.best_rate(name), seed) for seed in range(SEEDS)]
            values = [found[dataset].delta(rows) for rows in runs]
            cells.append(f"{statistics.mean(values):+.1f} ± {statistics.stdev(values):.1f}")
        rows.append([name if name in VARIANTS else name_of(name), *cells])
    return markdown([["", *DATASETS], *rows])


def report() -> None:
    page = PAGE.read_text()
    before, rest = page.split(START)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{START}\n{table()}\n\n{END}{after}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.defaults", description=__doc__)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("datasets", nargs="*", metavar="DATASET", help=f"of {', '.join(DATASETS)}")
    args = parser.parse_args(arguments)
    if args.command == "report":
        return report()
    torch.set_num_threads(1)
    for dataset in args.datasets or DATASETS:
        Variants(dataset).run()


if __name__ == "__main__":
    main()
