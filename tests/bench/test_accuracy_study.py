"""The accuracy study: which trainings it makes, that it goes on where it was, that the page is what its CSVs say."""

import csv
import math
import statistics

import pytest
import torch

from bench import accuracy, defaults
from mtlgrad.data.yeast import Yeast
from mtlgrad.metrics import delta_m
from mtlgrad.recipes.training import Job


class Few(Yeast):
    """Three labels that are not rare, few rows: a training takes a few milliseconds."""

    name, epochs = "", 1

    def __init__(self, seed):
        super().__init__(seed)
        self.tasks = self.tasks[2:5]
        self.train, self.validation, self.test = (
            part.only(slice(0, 200)) for part in (self.train, self.validation, self.test)
        )


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path)
    monkeypatch.setattr(accuracy, "METHODS", ("sum", "logsum", accuracy.FIXED, "aligned-ub", "alphavil"))
    monkeypatch.setattr(accuracy, "SEEDS", 3)
    monkeypatch.setattr(accuracy, "TARGETS", {"yeast": "function 4"})
    monkeypatch.setattr(accuracy, "recipe_class", lambda name: Few)
    made = accuracy.Study("yeast")
    made.run()
    return made


def test_the_trainings_and_what_is_made_of_them(study, tmp_path, monkeypatch, capsys):
    trainings = {tuple(row[name] for name in ("method", "lr", "seed", "weights")) for row in study.rows}
    for method in ("sum", "logsum", "aligned-ub", "alphavil"):
        assert len({t for t in trainings if t[0] == method}) == len(accuracy.RATES) + 2 * 2
    fixed = [t for t in trainings if t[0] == accuracy.FIXED]
    assert len([t for t in fixed if t[2] == "0"]) == accuracy.DRAWS
    assert {t[3] for t in fixed if t[2] != "0"} == {study.best_weights()}

    again = accuracy.Study("yeast")
    assert again.rows == study.rows
    capsys.readouterr()
    again.run()
    assert capsys.readouterr().out == ""  # nothing was left to do

    # Rates and Delta_m by the rows themselves.
    def values(method, lr, seed, column):
        rows = [row for row in study.rows if (row["method"], row["lr"], row["seed"]) == (method, f"{lr:g}", str(seed))]
        return [float(row[column]) for row in rows]

    found = accuracy.Found(study)
    base = []
    for task in found.tasks:
        rows = [row for row in study.rows if row["method"] == accuracy.SINGLE and row["task"] == task]
        first = sorted((-float(r["validation"]), r["lr"]) for r in rows if r["seed"] == "0")[:2]
        best = max(
            (statistics.mean(math.log(float(r["validation"])) for r in rows if r["lr"] == lr), lr) for _, lr in first
        )[1]
        base.append(statistics.mean(float(row["test"]) for row in rows if row["lr"] == best))
    assert found.base == pytest.approx(base)
    column = next(c for c in found.columns if c.method == "aligned-ub")
    for seed, delta in enumerate(column.delta):
        assert delta == pytest.approx(delta_m(values("aligned-ub", column.lr, seed, "test"), base, [True] * 3))

    monkeypatch.setattr(accuracy, "T95", 4.303)
    accuracy.report(tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    for words in ("## yeast", "Aligned-MTL", "sum of logarithms", "alphaVIL trains for one task, function 4 (AUC)"):
        assert words in page


def test_a_study_that_was_stopped_is_not_reported_before_its_baselines_are_there(study):
    for drop in ("sum", "logsum", accuracy.SINGLE):
        part = accuracy.Study("yeast")
        part.rows = [row for row in part.rows if row["method"] != drop or row["seed"] != "2"]
        assert not part.has_baselines()
    part.rows = [row for row in study.rows if row["method"] != "aligned-ub" or row["seed"] != "2"]
    assert part.has_baselines()
    assert "aligned-ub" not in [column.method for column in accuracy.Found(part).columns]


@pytest.mark.slow
def test_the_variants_of_bayesagg(study, tmp_path, monkeypatch):
    monkeypatch.setattr(defaults, "FOLDER", tmp_path / "bayesagg")
    monkeypatch.setattr(defaults, "DATASETS", ("yeast",))
    names = ("regression: unit noise", "classification: gamma 1", "moving, half-life 20")
    monkeypatch.setattr(defaults, "VARIANTS", {name: defaults.VARIANTS[name] for name in names})
    study.train_rates("bayesagg")
    variants = defaults.Variants("yeast")
    variants.run()
    assert {row["method"] for row in variants.rows} == set(names[1:])  # yeast has no regression
    made = defaults.Variant(Few(0), Job(names[1], 0, 1e-3), 2, 32, torch.device("cpu"))
    assert {head.gamma for head in made.method.bayes.heads} == {1.0}
    found = {line.split(" | ")[0].strip("| "): line for line in defaults.table().splitlines()}
    assert found["regression: unit noise"].endswith("|  |")
    lr = variants.best_rate(names[1])
    delta = [accuracy.Found(study).delta(variants.find(names[1], lr, seed)) for seed in range(3)]
    assert f"{statistics.mean(delta):+.1f} ± {statistics.stdev(delta):.1f}" in found[names[1]]


@pytest.mark.slow
def test_the_page_is_what_the_csvs_say(tmp_path):
    accuracy.report(tmp_path / "accuracy.md")
    page = accuracy.Path(accuracy.__file__).parent.parent / "docs" / "accuracy.md"
    assert page.read_text() == (tmp_path / "accuracy.md").read_text()
    for path in accuracy.RESULTS.glob("*.csv"):
        with path.open(newline="") as file:
            assert tuple(next(csv.reader(file))) == accuracy.COLUMNS
