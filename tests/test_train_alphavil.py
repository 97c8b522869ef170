"""``mtlgrad train --method alphavil | diw``: trainings in rounds, with one task as the target."""

import math
import os
import random
import struct
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from rich.console import Console
from test_train import Silent, StopAt, assert_same, lines, on_disk, quiet

from mtlgrad import plots
from mtlgrad.cli import main
from mtlgrad.recipes import figures, report, rounds
from mtlgrad.recipes.base import Interrupted, Job, Result, Settings, TrainError
from mtlgrad.recipes.clothing import Clothing
from mtlgrad.recipes.comparison import Comparison, Stop
from mtlgrad.recipes.parts import Rows
from mtlgrad.recipes.progress import LiveProgress
from mtlgrad.recipes.river import River
from mtlgrad.recipes.rounds import ROUNDS, training
from mtlgrad.recipes.training import Trainer


@pytest.fixture(scope="module")
def small():
    """Every sixteenth row of the reviews; dropout."""
    torch.set_num_threads(1)
    recipe = Clothing(torch.device("cpu"))
    recipe.rows = Rows(*(rows[::16] for rows in (recipe.rows.train, recipe.rows.validation, recipe.rows.test)))
    return recipe


@pytest.fixture(scope="module")
def river():
    torch.set_num_threads(1)
    return River(torch.device("cpu"))


@pytest.fixture
def run(tmp_path, small, monkeypatch):
    """Starts or resumes comparisons on the small recipe in tmp_path."""
    monkeypatch.setattr("mtlgrad.recipes.comparison._recipe", lambda settings: small)

    def start(settings=None, name=None, resume=None):
        return Comparison.resume(resume) if resume else Comparison.start(settings, tmp_path / "runs", name)

    return start


@pytest.fixture
def wide(monkeypatch):
    """Several development batches, although there is little data, and a search that stands their noise."""
    monkeypatch.setattr(rounds, "DEVELOPMENT_ROWS", 50)
    monkeypatch.setattr(rounds, "make_alpha_optimizer", partial(torch.optim.SGD, lr=0.1))


#: 990 training rows: ten batches an epoch, in four rounds of two or three.
SHORT = Settings(methods=("alphavil",), target="rating", seeds=1, epochs=3, batch_size=100, subset=0.25, alpha_epochs=2)
STILL = partial(torch.optim.SGD, lr=1e-9)  #: a search that gets nowhere


def begun(recipe, method, settings=SHORT, seed=0):
    return training(recipe, Job(method, seed), settings)


# ---- a round


def test_a_round_is_a_part_of_each_tasks_own_order_at_the_rate_of_the_schedule(small, wide, monkeypatch):
    seen, rates, optimizers = {}, {}, []

    class Recorded(torch.optim.SGD):
        def step(self, closure=None):
            rates[len(optimizers)].append(self.param_groups[0]["lr"])
            return super().step(closure)

    def make(parameters, lr):
        optimizers.append(Recorded(parameters, lr))
        rates[len(optimizers)] = []
        return optimizers[-1]

    def watched(task, output, target, divisor):
        if trainer.net.training:
            seen.setdefault(task.name, []).append(target)
        return original(task, output, target, divisor)

    original = rounds.task_loss
    monkeypatch.setattr(rounds, "make_optimizer", make)
    monkeypatch.setattr(rounds, "task_loss", watched)
    trainer = begun(small, "alphavil")
    orders = []
    for _ in range(2):
        seen.clear()
        trainer.run_epoch(quiet)
        orders.append({name: torch.cat(batches) for name, batches in seen.items()})
    every = trainer.split.shuffled(0).targets
    for t, task in enumerate(small.tasks):
        for epoch in range(2):
            assert torch.equal(orders[epoch][task.name].sort().values, every[t].sort().values)
            assert torch.equal(orders[epoch][task.name], trainer.split.shuffled(epoch, 1 + t).targets[t])
            others = [trainer.split.shuffled(epoch, d).targets[t] for d in range(5) if d != 1 + t]
            assert not any(torch.equal(orders[epoch][task.name], other) for other in others)
    # A fresh optimizer for each of four tasks in each of four rounds and two epochs; all tasks at the same rates.
    assert len(optimizers) == 4 * 4 * 2
    for task in range(4):
        made = [lr for i in range(task, len(optimizers), 4) for lr in rates[i + 1]]
        assert made == [trainer.rate(number) for number in range(20)]
    assert [len(rates[i]) for i in (1, 5, 9, 13)] == [2, 3, 2, 3]
    assert [p for p in optimizers[1].param_groups[0]["params"] if p is trainer.net.heads[0].weight] == []


def test_parts_of_an_order_are_slices_of_it(small):
    split = small.split(2)
    whole = split.shuffled(5, 3)
    assert not torch.equal(whole.targets[3], split.shuffled(5).targets[3])
    assert torch.equal(split.shuffled(5, 3, slice(200, 300)).targets[3], whole.targets[3][200:300])


@pytest.mark.parametrize(("subset", "batches", "count"), [(1.0, 10, 1), (0.3, 10, 3), (0.1, 10, 10), (0.01, 10, 10)])
def test_rounds_share_an_epochs_batches(small, subset, batches, count):
    bounds = begun(small, "alphavil", replace(SHORT, subset=subset)).bounds
    assert (len(bounds) - 1, bounds[0], bounds[-1]) == (count, 0, batches)
    assert {later - first for first, later in pairwise(bounds)} <= {batches // count, batches // count + 1}


@pytest.mark.parametrize("method", ROUNDS)
def test_ticks_count_what_an_epoch_does(small, wide, method):
    trainer, ticks = begun(small, method), []
    trainer.run_epoch(lambda epoch, tick, losses: ticks.append((epoch, tick, losses.clone())))
    assert [tick for _, tick, _ in ticks] == list(range(trainer.ticks))
    assert {epoch for epoch, _, _ in ticks} == {0}
    assert ticks[0][2].isnan().all()
    assert torch.isfinite(ticks[-1][2]).all()
    if method == "alphavil":  # two or three development batches, looked at six times a round
        assert trainer.ticks == 4 * 10 + 4 * 6 * len(trainer.development)
        assert len({batch.rows for batch in trainer.development}) <= 2
        assert sum(batch.rows for batch in trainer.development) == len(small.rows.validation)


def test_alphavil_records_what_its_rounds_did(small, wide):
    trainer = begun(small, "alphavil")
    for _ in range(2):
        trainer.run_epoch(quiet)
    result, vil = trainer.finish(), trainer.vil
    assert len(result.rounds) == vil.rounds == 8
    weights = torch.ones(4, dtype=torch.float64)
    for r in result.rounds:
        if r["kept"] != "none":
            weights = weights + (torch.tensor(r["alphas"], dtype=torch.float64) - 1.0)
            assert max(r["after"]) <= r["before"]
        assert r["weights"] == weights.tolist()
        assert r["sat_out"] == [False] * 4
    assert vil.task_weights.tolist() == weights.tolist()
    before = torch.tensor([[1.0] * 4, *(r["weights"] for r in result.rounds[4:7])], dtype=torch.float64)
    before[0] = torch.tensor(result.rounds[3]["weights"])
    share = (before.abs() / before.abs().sum(1, keepdim=True)).mean(0)
    assert result.history[1]["share"] == pytest.approx(share.tolist())
    assert len(result.step_ms) == len(result.epoch_ms) == 8
    assert result.own_ms == []
    assert all(line["dominance"] is None for line in result.history)


@pytest.mark.parametrize("method", ROUNDS)
def test_learns(small, method):
    trainer = begun(small, method, replace(SHORT, epochs=4, batch_size=32))
    for _ in range(4):
        trainer.run_epoch(quiet)
    first, last = trainer.result.history[0], trainer.result.history[-1]
    assert last["validation"][0] < 0.95 * first["validation"][0]
    assert sum(last["share"]) == pytest.approx(1.0)
    assert len(trainer.finish().metrics) == 4


@pytest.mark.parametrize("method", ROUNDS)
def test_a_task_whose_training_fails_sits_out(small, method, monkeypatch):
    original = rounds.task_loss

    def failing(task, output, target, divisor):
        return original(task, output, target, divisor) * (
            math.nan if task.name == "age" and trainer.net.training else 1.0
        )

    monkeypatch.setattr(rounds, "task_loss", failing)  # no part of diw's ordinary epoch
    trainer = begun(small, method)
    if method == "diw":
        trainer.run_epoch(quiet)
    else:
        with pytest.raises(TrainError, match="alphavil, seed 0: the loss of age became nan in epoch 1; lower --lr"):
            trainer.run_epoch(quiet)
    assert trainer.result.rounds
    for r in trainer.result.rounds:
        assert r["sat_out"] == [False, False, False, True]
        assert r["weights"][3] == 1.0
    assert all(p.isfinite().all() for p in trainer.net.parameters())


def test_a_round_in_which_nothing_moves_is_recorded_and_makes_no_noise(small, monkeypatch):
    monkeypatch.setattr(rounds, "make_alpha_optimizer", STILL)
    trainer = begun(small, "alphavil", replace(SHORT, lr=100.0))
    before = [p.detach().clone() for p in trainer.net.parameters()]
    trainer.run_epoch(quiet)  # pytest makes warnings errors
    assert {r["kept"] for r in trainer.result.rounds} == {"none"}
    assert_same(before, [p.detach() for p in trainer.net.parameters()])
    assert trainer.result.rounds[0]["alphas"] == [0.0] * 4


# ---- diw


def test_diw_moves_weights_by_what_each_trial_did_to_the_target(small, monkeypatch):
    trainer = begun(small, "diw")
    start = {name: value.clone() for name, value in trainer.net.state_dict().items()}
    losses, at = [], []

    def loss():
        at.append({name: value.clone() for name, value in trainer.net.state_dict().items()})
        losses.append((2.0, 1.5, 2.5, 6.1, math.inf)[len(losses)])
        return losses[-1]

    monkeypatch.setattr(trainer, "_development_loss", loss)
    trainer.begin_epoch(quiet)
    assert trainer.weighting.weights.tolist() == [1.25, 0.75, 0.0, 1.0]
    (r,) = trainer.result.rounds
    assert (r["before"], r["after"], r["sat_out"]) == (2.0, losses[1:], [False, False, False, True])
    assert (r["weights"], r["alphas"], r["kept"]) == ([1.25, 0.75, 0.0, 1.0], None, None)
    assert_same(start, at[0])
    assert_same(start, trainer.net.state_dict())  # put back
    for t, after in enumerate(at[1:]):
        moved = {name for name in start if not torch.equal(start[name], after[name])}
        assert {name for name in moved if name.startswith("heads")} == {n for n in start if n.startswith(f"heads.{t}.")}
        assert "backbone.words.weight" in moved
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert trainer.weighting.formula(values).tolist() == [1.25, 1.5, 0.0, 4.0]
    assert trainer.weighting.shares(values).tolist() == pytest.approx([1.25 / 3, 0.25, 0.0, 1 / 3])


def test_diw_with_weights_of_one_is_the_sum(small, monkeypatch):
    monkeypatch.setattr(rounds.DiscriminativeTraining, "_try", lambda self, t, watch: None)
    a = begun(small, "diw")
    a.run_epoch(quiet)
    b = Trainer(small, Job("sum", 0), SHORT)
    b.run_epoch(quiet)
    assert_same(a.net.state_dict(), b.net.state_dict())
    assert a.result.history[0]["dominance"] == b.result.history[0]["dominance"]


# ---- resuming


def repeatable(trainer):
    """Everything that must repeat, timings left out."""
    state = trainer.state_dict()
    history = [{k: v for k, v in line.items() if k != "seconds"} for line in trainer.result.history]
    method = [state.get("alphavil"), state["weighting"], state.get("optimizer"), state["rng"]]
    return state["net"], method, history, trainer.result.rounds, trainer.evaluate(trainer.split.test)


@pytest.mark.parametrize("data", ["clothing", "river"])
@pytest.mark.parametrize("method", ROUNDS)
def test_resuming_repeats_an_uninterrupted_run_bit_for_bit(small, river, method, data, wide):
    recipe = {"clothing": small, "river": river}[data]
    settings = replace(SHORT, target=recipe.tasks[1].name, epochs=2, batch_size=100 if data == "clothing" else 1000)
    whole = begun(recipe, method, settings, seed=3)
    for _ in range(2):
        whole.run_epoch(quiet)

    first = begun(recipe, method, settings, seed=3)
    first.run_epoch(quiet)
    state, last = on_disk(first.state_dict()), random.randrange(first.ticks)

    def kill(epoch, tick, losses):
        if tick >= last:
            raise Interrupted

    with pytest.raises(Interrupted):
        first.run_epoch(kill)
    torch.manual_seed(999)  # another process's generator
    second = begun(recipe, method, settings, seed=3)
    second.load_state_dict(state)
    second.run_epoch(quiet)
    assert_same(repeatable(whole), repeatable(second))


def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(run):
    settings = replace(SHORT, methods=("alphavil", "diw"), epochs=2)
    whole = run(settings, "whole")
    assert whole.run(Silent(), Stop())
    both = [begun(whole.recipe, method, settings) for method in settings.methods]
    alone = 4 * 2 * both[0].steps
    # Past alphavil's first epoch; with the search's early ends there may be fewer ticks than at most.
    after = random.randrange(alone + both[0].ticks + 1, alone + 2 * 4 * both[0].steps)
    stopped, stop = run(settings, "stopped"), Stop()
    assert not stopped.run(StopAt(stop, after), stop), after
    path = stopped.folder.path
    epochs = {tuple(row[:3]) for row in lines(path / "alphavil.csv")[1:]}
    assert epochs == {("alphavil", "0", str(number)) for number in range(1, 5)}, after
    stopped.folder.close()
    assert run(resume=path).run(Silent(), Stop())
    for name, timing in (("results.csv", 0), ("history.csv", 1), ("alphavil.csv", 0)):
        assert lines(path / name, timing) == lines(whole.folder.path / name, timing), after
    for method in settings.methods:
        assert_same(*(torch.load(p / f"model-{method}-0.pt", weights_only=True) for p in (path, whole.folder.path)))


def test_a_checkpoint_from_before_there_were_targets_goes_on(run):
    settings = Settings(methods=("sum",), seeds=1, epochs=1, batch_size=400)
    comparison, stop = run(settings, "old"), Stop()
    assert not comparison.run(StopAt(stop, 9), stop)
    path = comparison.folder.path / "checkpoint.pt"
    comparison.folder.close()
    state = torch.load(path, weights_only=True)
    for name in ("target", "subset", "alpha_epochs"):
        del state["settings"][name]
    assert state["done"]
    for result in state["done"]:
        del result["rounds"]
    torch.save(state, path)
    assert run(resume=path).run(Silent(), Stop())


# ---- a run on disk


def test_a_run_tells_its_rounds(run, monkeypatch):
    settings = replace(SHORT, methods=("sum", "alphavil", "diw"), seeds=2, epochs=2)
    comparison = run(settings, "both")
    assert comparison.run(Silent(), Stop())
    path, tasks = comparison.folder.path, comparison.recipe.tasks
    rows = lines(path / "alphavil.csv")
    head = "method,seed,round,task,alpha,task_weight,sat_out,kept,dev_loss_before,dev_loss_after"
    assert ",".join(rows[0]) == head
    assert [row[:4] for row in rows[1:]] == [
        [method, str(seed), str(number), task.name]
        for seed in range(2)
        for method, count in (("alphavil", 8), ("diw", 2))
        for number in range(1, count + 1)
        for task in tasks
    ]
    for row in rows[1:]:
        assert (row[4] == "", row[7] == "") == (row[0] == "diw",) * 2
    (line,) = (r.rounds[4] for r in comparison.results if r.job == Job("alphavil", 1))
    (found,) = (row[4:] for row in rows if row[:4] == ["alphavil", "1", "5", "department"])
    expected = [line["alphas"][2], line["weights"][2], 0, line["kept"], line["before"], line["after"][2]]
    assert found == [str(value) for value in expected]

    columns = report.summaries(comparison.results, settings.labels, tasks)
    cells = report.rows(columns, tasks, settings.target)
    assert cells[1][0] == "rating (target): RMSE (stars) ↓"
    assert cells[2][0] == "recommended: AUC ↑"
    assert [cell == "-" for cell in cells[-2][1:]] == [True, False, False, False]  # a step
    assert [cell == "-" for cell in cells[-1][1:]] == [True, True, True, False]  # what alphavil adds is not known

    drawn = []
    monkeypatch.setattr(plots, "alphas", lambda *arguments: drawn.extend(arguments) or b"")
    figures.write(comparison.results, settings, tasks, comparison.folder)
    names, target, alphas, weights = drawn
    assert (names, target, list(alphas), list(weights)) == (
        [t.name for t in tasks], "rating", ["alphavil"], ["alphavil", "diw"],
    )  # fmt: skip
    assert torch.tensor(alphas["alphavil"]).shape == torch.tensor(weights["alphavil"]).shape == (2, 8, 4)
    assert torch.tensor(weights["diw"]).shape == (2, 2, 4)
    assert alphas["alphavil"][1][4] == line["alphas"]
    monkeypatch.undo()
    figures.write(comparison.results, settings, tasks, comparison.folder)
    assert (path / "alphavil.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_rounds_has_no_such_files(run):
    settings = Settings(methods=("sum",), seeds=1, epochs=1, batch_size=400)
    comparison = run(settings, "sum")
    assert comparison.run(Silent(), Stop())
    figures.write(comparison.results, settings, comparison.recipe.tasks, comparison.folder)
    assert not [name for name in os.listdir(comparison.folder.path) if name.startswith("alphavil")]


def test_what_rounds_came_to_is_one_line_a_method():
    def result(method, kept, absent=(), ms=((1.0, 3.0), (4.0, 12.0))):
        rounds = [
            {"alphas": None, "weights": [], "sat_out": [i in absent, False], "kept": k, "before": 1.0, "after": []}
            for i, k in enumerate(kept)
        ]
        return Result(Job(method, 0), ["a", "b"], [], [], list(ms[0]), [], list(ms[1]), rounds=rounds)

    found = [
        result("alphavil", ["search", "none", "start"], [0, 2]),
        result("alphavil", ["search", "none", "search"]),
        result("diw", [None, None]),
        result("sum", []),
    ]
    assert report.searches(found, ["sum", "alphavil", "diw", "logsum"]) == [
        "alphavil: 80 % of the time went into the search for alpha; "
        "in 2 of 6 rounds no alpha lowered the development loss, and nothing moved; "
        "in 1 of 6 rounds the search found none better than alpha = 1, which was kept; "
        "take more --alpha-epochs; "
        "a sat out 2 of 6 rounds, where its training came to NaN or infinity; lower --lr"
    ]
    assert report.searches([result("diw", [None, None], [1])], ["diw"]) == [
        "diw: a sat out 1 of 2 rounds, where its training came to NaN or infinity; lower --lr"
    ]


@pytest.mark.parametrize(("tasks", "seeds", "count", "panels"), [(4, 1, 80, 3), (10, 3, 1, 2), (2, 2, 5, 1)])
def test_the_figure_has_a_panel_for_alphas_and_one_for_weights(tasks, seeds, count, panels):
    torch.manual_seed(0)
    weights = {f"method {i}": torch.rand(seeds, count, tasks).tolist() for i in range(-(-panels // 2))}
    alphas = {"method 0": weights["method 0"]} if panels > 1 else {}
    names = [f"task {t}" for t in range(tasks)]
    image = plots.alphas(names, names[-1], alphas, weights)
    assert image.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", image[16:24])
    assert 400 * panels < width < 500 * panels + 100
    assert 300 < height < 450


def test_tasks_without_a_loss_yet_are_a_dash_in_the_progress(small):
    trainer = begun(small, "alphavil")
    progress = LiveProgress(Console(quiet=True), SHORT, [trainer.job], small.tasks, 0)
    progress.start(0, trainer)
    progress.step(0, 10, torch.tensor([0.5, math.nan, 1.25, math.nan]))
    assert progress.progress.losses == "losses  rating 0.500  recommended -  department 1.250  age -"
    assert progress.progress.tasks[1].total == 3 * trainer.ticks


# ---- the command line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            "--method alphavil",
            "argument --target: expected one of rating, recommended, department, age with alphavil, found none",
        ),
        (
            "--data river --compare sum diw alphavil --target rating",
            "NAPM7, DLDI4 with diw, alphavil, found 'rating'",
        ),
        ("--method sum --target rating", "argument --target: expected with alphavil or diw, found sum; drop it"),
        ("--target rating", "argument --target: expected with alphavil or diw, found bayesagg; drop it"),
        ("--method sum --subset 0.5", "argument --subset: expected with alphavil or diw, found sum; drop it"),
        (
            "--method diw --target rating --alpha-epochs 1",
            "argument --alpha-epochs: expected with alphavil, found diw; drop it",
        ),
        ("--subset 1.5", "argument --subset: expected a number above 0 and up to 1, found '1.5'"),
        ("--subset 0", "argument --subset: expected a number above 0 and up to 1, found '0'"),
        ("--alpha-epochs 0", "argument --alpha-epochs: expected a whole number from 1 to 10000, found '0'"),
        (
            "--compare sum alphavil --target age --optimizer adatask-adam",
            "argument --optimizer: expected adam with alphavil, which train one task at a time and leave nothing to "
            "keep apart, found adatask-adam; take methods among sum, uncertainty, logsum",
        ),
        ("--resume . --target age", "takes its settings from the run, found --target as well; drop it"),
    ],
)
def test_bad_input_is_one_line_exit_2_and_no_folder(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["train", *arguments.split()])
    except SystemExit as stop:  # argparse's way out
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert words in err
    assert err.startswith("mtlgrad")
    assert err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_the_command_trains_towards_a_target(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mtlgrad.recipes.comparison._recipe", lambda settings: small)
    monkeypatch.setattr(rounds, "make_alpha_optimizer", STILL)
    train = partial(main, ["train", "--compare", "sum", "alphavil", "diw", "--target", "rating", "--subset", "0.5",
                           "--alpha-epochs", "1", "--lr", "0.5", "--seeds", "1", "--epochs", "1",
                           "--batch-size", "400", "--name", "x"])  # fmt: skip
    assert train() == 0
    out, err = capsys.readouterr()
    assert err == ""
    for words in ("rating (target): RMSE", "recommended: AUC", "alphavil: ", "the search for alpha; in 2 of 2 rounds"):
        assert words in out
    assert {"alphavil.csv", "alphavil.png", "model-alphavil-0.pt", "model-diw-0.pt"} <= set(os.listdir("runs/x"))
