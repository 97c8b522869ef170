"""``mtlgrad train --tensorboard``: event files say what the tables say, however often the run was interrupted."""

import math
import os
import shutil
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import Silent, StopAt

from mtlgrad.cli import main
from mtlgrad.recipes.base import Job, Result, Settings
from mtlgrad.recipes.board import Board, values
from mtlgrad.recipes.clothing import Clothing
from mtlgrad.recipes.comparison import Comparison, Stop, Watchers
from mtlgrad.recipes.parts import Rows

EPOCHS = 3


@pytest.fixture(scope="module")
def small():
    """Every thirty-second row of the reviews."""
    torch.set_num_threads(1)
    recipe = Clothing(torch.device("cpu"))
    recipe.rows = Rows(*(rows[::32] for rows in (recipe.rows.train, recipe.rows.validation, recipe.rows.test)))
    return recipe


@pytest.fixture
def run(tmp_path, small, monkeypatch):
    monkeypatch.setattr("mtlgrad.recipes.comparison._recipe", lambda settings: small)

    def start(*methods, resume=None):
        if resume:
            return Comparison.resume(resume)
        settings = Settings(methods=methods, target="rating", seeds=1, epochs=EPOCHS, batch_size=100, tensorboard=True)
        return Comparison.start(settings, tmp_path / "runs", "x")

    return start


def board_of(comparison):
    return Board(comparison.folder.path, comparison.recipe.tasks, comparison.results)


def points(path):
    """training -> tag -> [(step, value)], as TensorBoard reads them, orphans too."""
    found = {}
    for name in sorted(os.listdir(path / "tensorboard")):
        events = EventAccumulator(str(path / "tensorboard" / name), purge_orphaned_data=False)
        events.Reload()
        tags = events.Tags()["scalars"]
        found[name] = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    return found


def assert_as_in_the_history(path, results):
    found = points(path)
    assert len(found) == len(results)
    for result, tags in zip(sorted(results, key=lambda r: order(r, found)), found.values(), strict=True):
        for tag, series in tags.items():
            assert [step for step, _ in series] == [1, 2, 3], tag
            for epoch, (_, value) in enumerate(series):
                expected = dict(values(result, epoch))[tag]
                assert value == pytest.approx(expected, rel=1e-6, nan_ok=True)


def order(result, found):
    name = f"{result.job.label if result.job.task is None else result.tasks[0] + '-alone'}-seed-0"
    return list(found).index(name)


def test_event_files_hold_what_the_history_holds(run):
    comparison = run("sum", "aligned-ub", "alphavil", "diw")
    assert comparison.run(Watchers(Silent(), board_of(comparison)), Stop())
    path = comparison.folder.path
    assert_as_in_the_history(path, comparison.results)
    found = points(path)
    assert sorted(found) == [
        "age-alone-seed-0", "aligned-ub-seed-0", "alphavil-seed-0", "department-alone-seed-0", "diw-seed-0",
        "rating-alone-seed-0", "recommended-alone-seed-0", "sum-seed-0",
    ]  # fmt: skip
    common = {"train_loss", "validation_loss", "validation_metric", "weight"}
    tasks = [task.name for task in comparison.recipe.tasks]
    per_task = {f"{kind}/{task}" for kind in common for task in tasks}
    dominance = {f"dominance_{layer}/{task}" for layer in ("words", "project") for task in tasks}
    weights = {f"task_weight/{task}" for task in tasks}
    assert found["sum-seed-0"].keys() == per_task | dominance
    assert found["aligned-ub-seed-0"].keys() == per_task | {"condition_number"}
    assert found["alphavil-seed-0"].keys() == per_task | weights | {f"alpha/{task}" for task in tasks}
    assert found["diw-seed-0"].keys() == per_task | dominance | weights
    assert found["age-alone-seed-0"].keys() == {f"{kind}/age" for kind in common}
    # The last of an epoch's rounds.
    alphavil = next(r for r in comparison.results if r.job.method == "alphavil")
    assert len(alphavil.rounds) == 2 * EPOCHS
    for epoch, (_, alpha) in enumerate(found["alphavil-seed-0"]["alpha/age"]):
        assert alpha == pytest.approx(alphavil.rounds[2 * epoch + 1]["alphas"][3], rel=1e-6)


@pytest.mark.parametrize("where", ["middle", "before the point", "after a training"])
def test_no_point_twice_and_none_lost(run, where):
    """Stopped between two steps; killed between an epoch's checkpoint and its points; between two trainings."""
    comparison, stop = run("sum"), Stop()
    board, path = board_of(comparison), comparison.folder.path

    class Killed(Silent):
        left = {"middle": 10**9, "before the point": 14, "after a training": 3}[where]

        def epoch_done(self, trainer):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    after = StopAt(stop, 30 if where == "middle" else -1)
    killed = Killed()
    watchers = (killed, board) if where == "before the point" else (board, killed)
    if where == "middle":
        assert not comparison.run(Watchers(after, *watchers), stop)
    else:
        with pytest.raises(KeyboardInterrupt):
            comparison.run(Watchers(*watchers), stop)
    comparison.folder.close()
    lost = path / "tensorboard" / "rating-alone-seed-0"
    if where == "middle":
        shutil.rmtree(lost)  # a user made room

    again = run(resume=path)
    assert again.run(Watchers(Silent(), board_of(again)), Stop())
    assert lost.exists()
    assert_as_in_the_history(path, again.results)


def test_what_is_not_known_is_left_out():
    line = {"epoch": 1, "train": [1.0], "validation": [2.0], "metric": [math.nan], "share": [1.0], "dominance": None}
    old = Result(Job("sum", 0), ["a"], [], [], [], [], [], history=[line])  # of a checkpoint without conditions
    assert [name for name, _ in values(old, 0)] == [
        "train_loss/a", "validation_loss/a", "validation_metric/a", "weight/a",
    ]  # fmt: skip


def test_a_missing_tensorboard_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main(["train", "--tensorboard"]) == 2
    err = capsys.readouterr().err
    assert err == "mtlgrad train: needs tensorboard, not found; pip install 'mtlgrad[tensorboard]'\n"
    assert os.listdir(tmp_path) == []


def test_the_option_stays_with_the_run(run, monkeypatch, capsys):
    monkeypatch.setattr("mtlgrad.recipes.figures.write", lambda *arguments: None)
    comparison = run("sum")
    assert comparison.run(Watchers(), Stop())
    comparison.folder.close()
    path = comparison.folder.path
    assert main(["train", "--resume", str(path)]) == 0  # what is missing is written
    assert_as_in_the_history(path, comparison.results)
    assert capsys.readouterr().err == ""
