"""Runs of ``mtlgrad train``: which trainings, at which rates, what is told; stopped, resumed, damaged, refused."""

import csv
import errno
import io
import math
import os
import struct

import pytest
import torch
from rich.console import Console
from torch import nn

from mtlgrad import plots
from mtlgrad.metrics import delta_m
from mtlgrad.recipes import Tensors, comparison, folder, regression, report, standardised_labels
from mtlgrad.recipes.comparison import Comparison, Settings, recipe_class
from mtlgrad.recipes.folder import RunFolder
from mtlgrad.recipes.progress import Board, Watchers, show_table
from mtlgrad.recipes.recipe import TrainError
from mtlgrad.recipes.training import SINGLE, Job, Result, Training
from tests.recipes.small_recipe import Small

DEFAULT = {
    "recipe": "small", "methods": ("sum", "aligned-ub"), "seeds": 2, "epochs": 2, "batch_size": 8, "rates": (1e-2,),
    "preference": None, "target": None, "device": "cpu", "threads": 1, "tensorboard": False,
}  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Starts or resumes comparisons on the small recipe in tmp_path."""
    monkeypatch.setattr(comparison, "recipe_class", lambda name: Small)

    def start(name="x", resume=None, **settings):
        if resume:
            return Comparison.resume(resume)
        return Comparison.start(Settings(**{**DEFAULT, **settings}), tmp_path / "runs", name)

    return start


def never():
    return False


def rows_of(path, leave=("step_ms",)):
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in leave} for row in csv.DictReader(file)]


# ---- which trainings


def test_a_seed_is_complete_before_the_next_and_rates_are_tried_on_the_first(run, monkeypatch):
    made = []

    def score(self, result):
        return abs(result.job.lr - (3e-3 if result.job.task is None else 2e-2))

    monkeypatch.setattr(Comparison, "_score", score)
    monkeypatch.setattr(Training, "run_epoch", lambda self, watch: self.result.history.append({"metric": [1.0]}))
    monkeypatch.setattr(Comparison, "write_tables", lambda self: None)
    at_hand = run(rates=(1e-3, 3e-3, 2e-2))
    watcher = Watchers()
    watcher.done = lambda number, result: made.append(result.job)
    assert at_hand.run(watcher, never)
    tried = [(c, lr) for c in ("a alone", "b alone", "c alone", "sum", "aligned-ub") for lr in (1e-3, 3e-3, 2e-2)]
    assert [(job.contender, job.lr) for job in made if job.seed == 0] == tried
    rest = [(f"{name} alone", lr) for name in "abc" for lr in (2e-2, 3e-3)]
    rest += [(method, lr) for method in ("sum", "aligned-ub") for lr in (3e-3, 1e-3)]
    assert [(job.contender, job.lr) for job in made[len(tried) :]] == rest
    assert {job.seed for job in made[len(tried) :]} == {1}
    assert at_hand.total == len(made)


def test_of_the_two_best_rates_of_seed_0_the_best_over_the_seeds_is_taken(run):
    at_hand = run(rates=(1e-3, 1e-2, 1e-1), seeds=3)
    assert at_hand.run(Watchers(), never)
    last = {(r.job.contender, r.job.lr, r.job.seed): r.history[-1]["metric"] for r in at_hand.results}

    def score(contender, lr, seed):
        up = {"a alone": [-1], "b alone": [1], "c alone": [1]}.get(contender, [-1, 1, 1])
        return sum(sign * math.log(value) for sign, value in zip(up, last[contender, lr, seed], strict=True))

    chosen = {r.job.contender: r.job.lr for r in at_hand.chosen()}
    for contender in at_hand.contenders:
        ranked = sorted((1e-3, 1e-2, 1e-1), key=lambda lr: -score(contender, lr, 0))
        assert {(c, lr) for c, lr, seed in last if c == contender and seed} == {(contender, lr) for lr in ranked[:2]}
        best = max(ranked[:2], key=lambda lr: sum(score(contender, lr, seed) for seed in range(3)))
        assert chosen[contender] == best
    assert len(at_hand.chosen()) == 15


def test_scores_are_relative_changes_and_leave_out_what_has_no_metric():
    assert report.score([2.0, 0.5], [False, True]) == pytest.approx((math.log(2.0) - math.log(0.5)) / 2)
    assert report.score([math.nan, 3.0], [True, False]) == pytest.approx(math.log(3.0))
    assert report.score([math.nan], [True]) == math.inf
    # The better of two by Delta_m is the better by their scores, whatever the baseline.
    for base in ([1.0, 1.0], [3.0, 0.2]):
        first, second = [1.01, 0.9], [0.99, 0.9]
        assert delta_m(second, base, [False, True]) < delta_m(first, base, [False, True])
        assert report.score(second, [False, True]) < report.score(first, [False, True])


def test_a_rate_that_diverges_is_out_and_all_that_diverge_are_an_error(run):
    at_hand = run(rates=(1e-2, 1e200), seeds=1)
    assert at_hand.run(Watchers(), never)
    assert {r.job.lr for r in at_hand.chosen()} == {1e-2}
    errors = [r.error for r in at_hand.results if r.error]
    assert len(errors) == 5
    assert errors[0].startswith("a alone, seed 0, lr 1e+200: the loss of a became ")
    with pytest.raises(
        TrainError, match=r"^a alone: no learning rate of 1e\+200, 1e\+201 worked; what was done is sav"
    ):
        run("y", rates=(1e200, 1e201)).run(Watchers(), never)


# ---- what is told


def result(method, seed, metrics, task=None, names="ab", lr=1e-2):
    line = {"metric": metrics, "train": metrics, "validation": metrics, "share": None, "step_ms": 5.0}
    return Result(Job(method, seed, lr, task), [task] if task else list(names), [line | {"dominance": None}], metrics)


@pytest.fixture
def told(run, monkeypatch):
    """A comparison of results made up: task a is better the less, b the more."""

    def make(deltas, seeds=2):
        at_hand = run(seeds=seeds, methods=tuple(deltas))
        at_hand.tasks, at_hand.names = at_hand.tasks[:2], ["a", "b"]
        at_hand.contenders = ["a alone", "b alone", *deltas]
        at_hand.results = [
            result(SINGLE, s, [v], "a") for s, v in zip(range(seeds), (1.0, 3.0, 2.0) if seeds > 1 else (2.0,))
        ]
        at_hand.results += [result(SINGLE, s, [0.5], "b") for s in range(seeds)]
        for method, values in deltas.items():
            at_hand.results += [result(method, s, [2.0 * (1 + v / 50), 0.5]) for s, v in enumerate(values)]
        return at_hand

    return make


def test_delta_m_is_against_the_mean_of_the_single_task_nets(told):
    at_hand = told({"sum": [5.0, -5.0]})
    assert report.deltas(at_hand.chosen(), at_hand.tasks)["sum"] == pytest.approx({0: 5.0, 1: -5.0})
    cells = report.table(at_hand)
    assert cells[0] == ["method", "a: RMSE ↓", "b: AUC ↑", "Δm %, + is worse ↓", "lr", "ms a step"]
    assert cells[1][:3] == ["single-task", "2.0000 ± 1.4142", "0.5000 ± 0.0000"]
    assert cells[2] == ["sum", "2.0000 ± 0.2828", "0.5000 ± 0.0000", "+0.00 ± 7.07", "0.01", "5.00"]
    rows = list(csv.DictReader(io.StringIO(report.results_csv(at_hand.results, at_hand.chosen(), at_hand.tasks))))
    assert len(rows) == 4 + 4 + 2
    assert [float(row["test"]) for row in rows if row["metric"] == "delta_m"] == pytest.approx([5.0, -5.0])


@pytest.mark.parametrize(
    ("deltas", "words"),
    [
        ({"sum": [5.0]}, "sum: 5.0 % worse than single-task nets; one learning rate for all says little: --tune-lr"),
        (
            {"sum": [5.0], "logsum": [-2.0]},
            "logsum is best here: 2.0 % better than single-task nets; one seed, so that",
        ),
        ({"sum": [5.0, 5.1], "logsum": [-2.0, -2.1]}, "logsum is best here: 2.1 % better than single-task nets; one l"),
        (
            {"sum": [5.0, 6.0, 5.5], "logsum": [1.0, 3.0, 2.0], "mgda": [2.5, 1.0, 3.0]},
            "% worse than single-task nets; level with it: mgda (95 %, paired over 3 seeds, which tell little apart)",
        ),
        (
            {"sum": [1.0, 2.0], "logsum": [2.0, 1.0]},
            "; no other differs by more than chance (95 %, paired over 2 seeds",
        ),
        ({"sum": [math.nan]}, None),
    ],
)
def test_the_headline_says_what_came_out_and_what_is_chance(told, deltas, words):
    found = report.headline(told(deltas, seeds=len(next(iter(deltas.values())))))
    assert found is words if words is None else words in found


def test_tables_and_figures_of_a_run(run):
    at_hand = run(methods=("sum", "adatask"), seeds=1)
    at_hand.run(Watchers(), never)
    path = at_hand.folder.path
    rows = rows_of(path / "results.csv")
    assert {(r["method"], r["task"]) for r in rows} == {
        *(("single-task", task) for task in "abc"),
        *((method, task) for method in ("sum", "adatask") for task in ("a", "b", "c", "all")),
    }
    history = rows_of(path / "history.csv")
    assert len(history) == 2 * (3 + 2 * 3)
    assert all(float(row["task_weight"]) == pytest.approx(1 / 3) for row in history if row["method"] == "sum")
    figures = report.figures(at_hand)
    assert set(figures) == {"loss_curves.png", "task_weights.png", "dominance.png"}
    assert all(image.startswith(b"\x89PNG") for image in figures.values())
    assert not [name for name in os.listdir(path) if name.startswith(".")]


def test_a_run_of_nothing_yet(run):
    at_hand = run()
    assert report.headline(at_hand) is None
    assert [row[1] for row in report.table(at_hand)[1:]] == ["-"]
    at_hand.write_tables()
    assert rows_of(at_hand.folder.path / "results.csv") == []


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_table_breaks_between_columns_not_in_numbers(width):
    stream = io.StringIO()
    cells = [["", *"abcdefg"], ["CHSI2: RMSE", *(f"{i}.123 ± 0.456" for i in range(7))]]
    show_table(Console(file=stream, width=width, force_terminal=True, color_system=None), cells)
    text = stream.getvalue()
    assert all(cell in text for cell in cells[1])
    assert max(len(line) for line in text.splitlines()) <= width


@pytest.mark.parametrize(
    ("runs", "layers", "tasks"),
    [(1, 2, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((3, 2, 10), (1, 20, 10), (1, 1, 4)))],
)
def test_figures_grow_with_what_they_show(runs, layers, tasks):
    names, draw = [f"task {t}" for t in range(tasks)], torch.Generator().manual_seed(0)
    shares = {f"run {r}": torch.rand(4, layers, tasks, generator=draw).softmax(-1).tolist() for r in range(runs)}
    shares["run 0"][0][-1] = [math.nan] * tasks
    image = plots.dominance(names, [f"layer {i}" for i in range(layers)], shares)
    width, height = struct.unpack(">II", image[16:24])
    assert 600 < width < 1400
    assert 150 * runs * -(-layers // 5) < height < 330 * runs * -(-layers // 5) + 100
    curves = {"aligned": [[0.3] * tasks] * 3, "sum": [[-0.125] * tasks] * 3}
    for image in (plots.task_weights(names, curves), plots.loss_curves(names, curves, curves)):
        assert image.startswith(b"\x89PNG")


def test_tensorboard_has_each_epoch_once_however_often_the_run_was_interrupted(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    at_hand = run(methods=("adatask",), seeds=1, epochs=3, tensorboard=True)
    steps = iter(range(10**6))
    assert not at_hand.run(Watchers(Board(at_hand.folder.path)), lambda: next(steps) > 61)
    at_hand.folder.close()
    again = run(resume=at_hand.folder.path)
    assert again.run(Watchers(Board(again.folder.path)), never)
    for r in again.results:
        path = again.folder.path / "tensorboard" / r.job.title.replace(",", "").replace(" ", "-")
        events = EventAccumulator(str(path), purge_orphaned_data=False)
        events.Reload()
        for i, task in enumerate(r.tasks):
            points = events.Scalars(f"validation_loss/{task}")
            assert [(p.step, p.value) for p in points] == [
                (epoch, pytest.approx(line["validation"][i])) for epoch, line in enumerate(r.history, 1)
            ]
    assert "dominance_backbone.0/a" in events.Tags()["scalars"]


# ---- stopped, resumed, damaged


@pytest.mark.parametrize("after", [30, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 47, 75))])
def test_stopped_and_resumed_run_equals_an_uninterrupted_one(run, after):
    whole = run("whole", methods=("sum", "bayesagg"), seeds=1, rates=(1e-3, 1e-2))
    assert whole.run(Watchers(), never)
    stopped, steps = run("stopped", methods=("sum", "bayesagg"), seeds=1, rates=(1e-3, 1e-2)), iter(range(10**6))
    assert not stopped.run(Watchers(), lambda: next(steps) >= after)
    path = stopped.folder.path
    assert {"checkpoint.pt", "history.csv", "results.csv"} == set(os.listdir(path))
    stopped.folder.close()
    assert run(resume=path / "checkpoint.pt" if after == 3 else path).run(Watchers(), never)
    for name in ("results.csv", "history.csv"):
        assert rows_of(path / name) == rows_of(whole.folder.path / name)


def test_two_runs_of_one_second_get_two_folders(run):
    a, b = run(None), run(None)
    assert a.folder.path != b.folder.path
    assert a.folder.path.parent == b.folder.path.parent
    run("mine")
    with pytest.raises(TrainError, match=r"argument --name: expected a new name, found .*mine; take another, or"):
        run("mine")


def test_one_run_is_not_continued_twice_at_once(run):
    path = run("busy").folder
    with pytest.raises(TrainError, match="busy is being written by another process"):
        run(resume=path.path)


def test_a_failing_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    where = RunFolder.create(tmp_path, "x", "small", {})
    where.write("a.csv", "old")

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folder.os, "replace", full)
    with pytest.raises(TrainError, match=r"cannot write .*a.csv: No space left on device; make room there"):
        where.write("a.csv", "new")
    assert sorted(os.listdir(where.path)) == ["a.csv", "checkpoint.pt"]
    assert (where.path / "a.csv").read_text() == "old"
    # Before anything was finished, a run that cannot be written takes its folders with it.
    with pytest.raises(TrainError, match=r"argument --out: .*No space left on device; choose another"):
        RunFolder.create(tmp_path / "new" / "deep", None, "small", {})
    assert os.listdir(tmp_path) == ["x"]


def test_a_run_that_fails_at_once_leaves_no_folder(run, tmp_path):
    with pytest.raises(TrainError, match="lower --lr"):
        run(rates=(1e200,)).run(Watchers(), never)
    assert os.listdir(tmp_path) == []


def test_a_run_that_fails_late_keeps_what_was_done(run, monkeypatch):
    at_hand = run("late")

    def fail(training):
        raise RuntimeError("the matrix\n  is singular")

    monkeypatch.setattr(Training, "finish", fail)
    words = r"^a alone, seed 0, lr 0.01: the matrix is singular; what was done is saved: --resume "
    with pytest.raises(TrainError, match=words):
        at_hand.run(Watchers(), never)
    assert os.listdir(at_hand.folder.path) == ["checkpoint.pt"]


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "other", "old"])
def test_a_damaged_checkpoint_is_named(run, damage):
    before = run("hurt").folder
    before.close()
    file = before.path / "checkpoint.pt"
    data = file.read_bytes()
    if damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "noise":
        file.write_bytes(os.urandom(500))
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "other":
        torch.save({"net": torch.zeros(3)}, file)
    else:
        torch.save({"format": folder.FORMAT, "settings": {"colour": "red"}, "done": [], "current": None}, file)
    with pytest.raises(TrainError, match=r"argument --resume: expected .*found .*hurt.*start anew"):
        run(resume=before.path)


# ---- recipes of one's own

GOOD = "from mtlgrad.recipes import *\nimport torch\nclass R(Recipe):\n def __init__(self, seed):\n  "
FULL = "self.tasks = [binary('a')]; d = Tensors(torch.ones(9, 2), {'a': torch.ones(9)}); "


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "expected one class derived from mtlgrad.recipes.Recipe in .*mine.py, found none"),
        (GOOD + "pass\nclass S(R): pass", "expected one class derived .*, found R, S"),
        (GOOD + "pass", "R.__init__: expected it to set self.tasks, found it unset"),
        (GOOD + FULL, "R.__init__: expected it to set self.train, found it unset"),
        (
            GOOD + FULL + "self.tasks *= 2; self.train = self.validation = self.test = d",
            r"expected different names, at",
        ),
        (
            GOOD + FULL + "self.train = self.validation = d; self.test = []",
            "R.test: expected a Dataset with items and a",
        ),
        (GOOD + FULL + "self.train = self.validation = self.test = iter([])", "R.train: expected a Dataset with items"),
        (
            GOOD + FULL + "self.train = self.validation = self.test = [1]",
            r"R.train: expected items \(inputs, targets\)",
        ),
        (
            GOOD + FULL + "d.targets = {'b': d.targets['a']}; self.train = self.validation = self.test = d",
            "R.train: expected a target a task, found none for a",
        ),
    ],
)
def test_a_recipe_that_lacks_something_is_refused_in_one_line(tmp_path, text, words):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(TrainError, match=words):
        comparison.checked(recipe_class(str(tmp_path / "mine.py"))(0))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "lake",
            r"--recipe: expected one of chestxray, .*, river, .*, a file.py or package.module:Class, found 'lake'",
        ),
        ("nowhere.py", r"expected a file, found none at nowhere.py; `mtlgrad recipe > my_recipe.py` makes one"),
        ("no.such:Class", "argument --recipe: no.such:Class: No module named 'no'"),
        (
            "tests.recipes.small_recipe:Other",
            "expected one class derived .* in tests.recipes.small_recipe, found Small, Listed",
        ),
    ],
)
def test_a_recipe_that_is_not_there(name, words):
    with pytest.raises(TrainError, match=words):
        recipe_class(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"a": nn.Linear(4, 2)},
            r"task 'a': expected a number for each label, \[8\], found outputs \[8, 2\] \(outputs ",
        ),
        (
            {"c": nn.Linear(4, 2)},
            r"task 'c': Target 2 is out of bounds. \(outputs .*; classes count from 0, and -100 is no",
        ),
        ({"b": nn.Linear(3, 1)}, r"task 'b': mat1 and mat2 shapes cannot be multiplied"),
        (nn.Linear(5, 4), "model: backbone: mat1 and mat2 shapes cannot be multiplied"),
        (
            nn.Linear(6, 4).double().requires_grad_(False).float(),
            "model: backbone: mat1 and mat2 must have the same dtype",
        ),
    ],
)
def test_what_does_not_fit_is_said_by_task_before_any_training(run, monkeypatch, change, words):
    plain = Small.model

    def model(self):
        net = plain(self)
        if isinstance(change, dict):
            net.heads.update({name: head.double() for name, head in change.items()})
        else:
            net.backbone = change if "dtype" in words else change.double()
        return net

    monkeypatch.setattr(Small, "model", model)
    with pytest.raises(TrainError, match=words):
        run().run(Watchers(), never)


@pytest.mark.parametrize("where", ["inputs", "targets"])
def test_nan_in_the_first_batch_is_not_put_down_to_the_learning_rate(run, monkeypatch, where):
    plain = Small.__init__

    def init(self, seed=0):
        plain(self, seed)
        if where == "inputs":
            self.train.inputs[:, 2] = math.nan
        else:
            self.train.targets["a"][:] = math.nan
            first = self.tasks[0]
            self.tasks[0] = type(first)("a", lambda o, t: (o[:, 0] - t).square().mean(), first.metric)

    monkeypatch.setattr(Small, "__init__", init)
    words = "task 'a': expected a finite loss of the first batch, found nan; NaN in the inputs, or in labels"
    with pytest.raises(TrainError, match=words):
        run().run(Watchers(), never)


def test_a_method_that_does_not_take_a_task_is_refused_before_any_training(run, monkeypatch, tmp_path):
    plain = Small.model

    def model(self):
        net = plain(self)
        net.heads["a"] = nn.Sequential(nn.Linear(4, 1)).double()
        return net

    monkeypatch.setattr(Small, "model", model)
    with pytest.raises(TrainError, match="bayesagg: task 'a': expected a linear head"):
        run(methods=("sum", "bayesagg")).run(Watchers(), never)
    assert os.listdir(tmp_path) == []


def test_labels_that_are_missing_stay_missing(run):
    values = torch.tensor([1.0, math.nan, 3.0, 8.0, math.nan])
    labels, scale = standardised_labels(values, torch.tensor([0, 1, 2]))
    assert scale == pytest.approx(2**0.5)
    assert labels.isnan().tolist() == [False, True, False, False, True]
    torch.testing.assert_close(labels[[0, 2, 3]] * scale + 2.0, values[[0, 2, 3]])
    for bad in ([math.nan] * 3, [2.0, 2.0, math.nan], [2.0, math.nan, math.nan]):
        with pytest.raises(TrainError, match="expected labels that differ in the training rows"):
            standardised_labels(torch.tensor(bad), torch.arange(3))
    with pytest.raises(ValueError, match="task 'a': scale: expected a finite number above 0, found nan"):
        regression("a", scale=math.nan)


@pytest.mark.parametrize(("targets", "words"), [([1, 2, 3], "found list"), (torch.ones(2), "found 2 rows")])
def test_rows_that_do_not_match_are_refused(targets, words):
    with pytest.raises(TrainError, match=f"^Tensors: a: expected a tensor of 3 rows, {words}$"):
        Tensors(torch.ones(3, 2), {"a": targets})


def test_a_preference_is_not_a_single_task_nets(run):
    at_hand = run(methods=("sum", "aligned-ub"), preference=(1.0, 2.0, 0.5), seeds=1)
    assert at_hand.run(Watchers(), never)
    share = next(r for r in at_hand.results if r.job.method == "sum").history[-1]["share"]
    assert share == pytest.approx([1 / 3.5, 2 / 3.5, 0.5 / 3.5])


def test_a_recipe_that_was_changed_is_not_resumed(run, tmp_path):
    (tmp_path / "mine.py").write_text("1")
    at_hand = run(recipe=str(tmp_path / "mine.py"), digest=comparison.digest(str(tmp_path / "mine.py")))
    at_hand.folder.close()
    run(resume=at_hand.folder.path).folder.close()
    (tmp_path / "mine.py").write_text("2")
    with pytest.raises(TrainError, match=r"mine\.py has changed since the run began; start anew"):
        run(resume=at_hand.folder.path)


def test_recipes_of_a_file_and_of_a_module(tmp_path):
    (tmp_path / "mine.py").write_text(GOOD + FULL + "self.train = self.validation = self.test = d")
    assert recipe_class(str(tmp_path / "mine.py")).__name__ == "R"
    assert recipe_class("tests.recipes.small_recipe:Small") is Small
