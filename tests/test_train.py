"""The recipe, its training loop, and what a run leaves on disk."""

import errno
import io
import math
import os
import struct

import pytest
import torch
from rich.console import Console

from mtlgrad import plots, reference
from mtlgrad.recipes import figures, folder, progress, report
from mtlgrad.recipes.base import Interrupted, Job, MultiTaskNet, Result, Settings, Task, TrainError
from mtlgrad.recipes.clothing import Clothing, Texts
from mtlgrad.recipes.comparison import Comparison, Stop, jobs_of
from mtlgrad.recipes.folder import RunFolder
from mtlgrad.recipes.parts import Part, Rows, auc
from mtlgrad.recipes.river import River, standardised
from mtlgrad.recipes.training import Trainer
from mtlgrad.recipes.weighting import METHODS, methods_with

ALIGNED = methods_with("scale")
#: The rules over the Gram matrix, by the name of the form on parameters; NAME-ub is on features.
RULES = [name for name in METHODS if f"{name}-ub" in METHODS]
#: All, but of most rules one form: a step of both is below.
EVERY_METHOD = [m for m in METHODS if m in (*ALIGNED, "pcgrad") or m.removesuffix("-ub") not in RULES]
EVERY_METHOD += [name + ("" if i % 2 else "-ub") for i, name in enumerate(RULES) if name != "aligned"]


@pytest.fixture(scope="module")
def recipe():
    torch.set_num_threads(1)
    return Clothing(torch.device("cpu"))


@pytest.fixture(scope="module")
def small():
    """The recipe on an eighth of its training rows: an epoch takes a few hundredths of a second."""
    recipe = Clothing(torch.device("cpu"))
    recipe.rows = Rows(recipe.rows.train[::8], recipe.rows.validation, recipe.rows.test)
    return recipe


@pytest.fixture(scope="module")
def river():
    torch.set_num_threads(1)
    return River(torch.device("cpu"))


@pytest.fixture(params=["clothing", "river"])
def either(request, small, river):
    return {"clothing": small, "river": river}[request.param]


SHORT = Settings(methods=("sum",), seeds=1, epochs=3, batch_size=200, warmup=1)


def quiet(epoch, step, losses):
    pass


class Silent:
    def start(self, number, trainer):
        pass

    def step(self, epoch, step, losses):
        pass

    def epoch_done(self, trainer):
        pass

    def done(self, number, result):
        pass


def on_disk(state):
    """What comes back from a file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def trained(trainer):
    """Everything that must repeat, timings left out."""
    state = trainer.state_dict()
    history = [{k: v for k, v in line.items() if k != "seconds"} for line in trainer.result.history]
    test = trainer.evaluate(trainer.split.test)
    return state["net"], state["weighting"], state["optimizer"], state["rng"], history, test


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


# ---- pieces


def test_auc_against_every_pair():
    score = torch.randn(60).mul(3).round()  # many ties
    target = (torch.rand(60) < 0.3).float()
    positive, negative = score[target == 1], score[target == 0]
    wins = (positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative).double()
    assert auc(score, target) == pytest.approx(float(wins.mean()), abs=1e-12)
    assert math.isnan(auc(score, torch.zeros(60)))


@pytest.mark.parametrize("size", [1, 3, 7, 8, 100])
def test_batches_are_the_rows_in_order(size):
    lengths = [2, 1, 4, 3, 1, 2, 5]
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    part = Part(Texts(torch.arange(18), offsets), [torch.arange(7.0)])
    texts, targets = [], []
    for (tokens, bounds), (y,), rows, own, _ in part.batches(size):
        assert rows == own == len(y)
        assert bounds[0] == 0
        assert bounds[-1] == len(tokens)
        assert len(y) == len(bounds) - 1 <= size
        texts += [tokens[bounds[i] : bounds[i + 1]].tolist() for i in range(len(y))]
        targets += y.tolist()
    assert texts == [list(range(offsets[i], offsets[i + 1])) for i in range(7)]
    assert targets == list(range(7))


def test_shuffled_depends_on_seed_and_epoch_alone(recipe):
    a, b = recipe.split(1).shuffled(0), recipe.split(1).shuffled(0)
    assert torch.equal(a.inputs.tokens, b.inputs.tokens)
    assert len(a) == len(recipe.rows.train)
    assert not torch.equal(a.targets[3], recipe.split(1).shuffled(1).targets[3])
    assert not torch.equal(a.targets[3], recipe.split(2).shuffled(0).targets[3])
    assert a.targets[0].mean().abs() < 1e-5
    assert abs(a.targets[0].std() - 1) < 1e-4


def test_weightings_are_their_formulas(small):
    losses = [torch.tensor(v, requires_grad=True) for v in (0.5, 0.2, 1.5, 0.9)]

    def gradient(name):
        weighting = METHODS[name](small.tasks, None, SHORT)
        return torch.stack(torch.autograd.grad(weighting.total(losses), losses)), weighting

    assert gradient("sum")[0].tolist() == [1.0] * 4
    weights, weighting = gradient("logsum")
    values = torch.stack(losses).detach()
    assert torch.allclose(weights, 1 / values)
    assert torch.allclose(weighting.shares(values), weights / weights.sum())
    weights, weighting = gradient("uncertainty")  # at the start: half for regression
    assert torch.allclose(weights, torch.tensor([0.5, 1.0, 1.0, 0.5]))
    # The minimum over s of exp(-s) L f + s / 2 is at exp(s) = 2 f L.
    best = torch.log(2 * weighting.factor * values).requires_grad_()
    total = (weighting.factor * torch.exp(-best) * values + 0.5 * best).sum()
    assert torch.autograd.grad(total, best)[0].abs().max() < 1e-6


# ---- the river's splits


def test_river_splits_are_disjoint_random_and_of_a_seed(river):
    a, b = river.split(0).rows, river.split(1).rows
    for rows in (a, b):
        assert [len(part) for part in (rows.train, rows.validation, rows.test)] == [5475, 912, 2738]
        every = torch.cat([rows.train, rows.validation, rows.test])
        assert torch.equal(every.sort().values, torch.arange(9125))
    assert torch.equal(a.test, river.split(0).rows.test)
    shared = torch.isin(a.test, b.test).float().mean()
    assert 0.25 < shared < 0.35  # of two independent draws of 30 %


def test_single_task_nets_and_methods_of_a_seed_see_one_split(river):
    alone, all_of_them = (Trainer(river, Job("sum", 1, task), SHORT).split for task in (2, None))
    assert torch.equal(alone.test.inputs.values, all_of_them.test.inputs.values)
    assert torch.equal(alone.shuffled(4).targets[2], all_of_them.shuffled(4).targets[2])


def test_only_training_rows_decide_how_missing_values_are_filled_and_scaled():
    values = torch.randn(60, 3) * torch.tensor([1.0, 20.0, 300.0]) + 50
    values[torch.rand(60, 3) < 0.2] = torch.nan
    train = torch.randperm(60)[:40]
    out = standardised(values, train)
    assert (out[values.isnan()] == 0).all()  # the column's training mean
    assert torch.allclose(out[train].mean(0), torch.zeros(3), atol=1e-5)
    assert torch.allclose(out[train].std(0), torch.ones(3))
    others = torch.ones(60, dtype=torch.bool)
    others[train] = False
    leaky = values.clone()
    leaky[others] = 1e6
    assert torch.equal(standardised(leaky, train)[train], out[train])


def test_river_errors_are_in_the_units_of_the_flows(river):
    split = river.split(0)
    part, task = split.test, river.tasks[0]
    error = split.metric(task, torch.zeros(len(part), 1), part.targets[0])
    flow = river.data.targets[:, 0].double()
    assert error == pytest.approx(float((flow[split.rows.test] - flow[split.rows.train].mean()).abs().mean()))


# ---- Aligned-MTL in a training


def tiny(seed=0):
    """Two regressions and a classification on a float64 net, and a batch."""
    torch.manual_seed(seed)
    tasks = (*(Task(name, "regression", 1, "RMSE", False) for name in "ab"), Task("c", "multiclass", 4, "", True))
    backbone = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 6))
    net = MultiTaskNet(backbone, [torch.nn.Linear(6, task.outputs) for task in tasks]).double()
    x = torch.randn(9, 5, dtype=torch.float64)
    targets = [torch.randn(9).double(), 100 * torch.randn(9).double(), torch.randint(0, 4, (9,))]
    return tasks, net, x, targets


def by_svd(gradients, preference, scale):
    """s U V' p of the paper's algorithm 1; gradients are [N, T]."""
    u, singular, v = torch.linalg.svd(gradients, full_matrices=False)
    length = singular.square().mean().sqrt() if scale == "rmse" else singular.min()
    return length * u @ v @ torch.tensor(preference, dtype=torch.float64)


@pytest.mark.parametrize("scale", ["min", "rmse"])
@pytest.mark.parametrize("preference", [(1.0, 1.0, 1.0), (0.2, 3.0, 1.0)])
@pytest.mark.parametrize("method", ALIGNED)
def test_aligned_gradients_are_the_papers(method, preference, scale):
    tasks, net, x, targets = tiny()
    weighting = METHODS[method](tasks, net, Settings(preference=preference, scale=scale))
    shared = list(net.backbone.parameters())
    features = net.features(x)
    views = weighting.through(features, targets)
    losses = net.losses(tasks, views, targets)
    heads = torch.autograd.grad(losses, list(net.heads.parameters()), retain_graph=True)
    at = shared if method == "aligned" else [features]
    every = net.losses(tasks, [features] * 3, targets)
    columns = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, at, retain_graph=True)]) for loss in every]
    expected = by_svd(torch.stack(columns, 1), preference, scale)
    if method == "aligned":
        expected = [
            part.view_as(p) for part, p in zip(expected.split([p.numel() for p in shared]), shared, strict=True)
        ]
    else:
        expected = torch.autograd.grad(features, shared, expected.view_as(features), retain_graph=True)

    weighting.backward(net, features, losses)
    for p, gradient in zip(shared, expected, strict=True):
        assert torch.allclose(p.grad, gradient, rtol=1e-9, atol=1e-12)
        assert not hasattr(p, "jac")
    for p, gradient in zip(net.heads.parameters(), heads, strict=True):
        assert torch.allclose(p.grad, gradient, rtol=1e-12)
    assert float(weighting.shares(torch.stack(losses)).abs().sum()) == pytest.approx(1.0)
    assert weighting.system()[1] == 3


PREFERENCE = (0.25, 3.0, 1.0)  # in float32 as they stand
#: Of the Gram matrix in the n-th step.
WEIGHTS = {
    "upgrad": lambda gram, n: reference.upgrad(gram, torch.tensor(PREFERENCE)),
    "dualproj": lambda gram, n: reference.dualproj(gram, torch.tensor(PREFERENCE)),
    "mgda": lambda gram, n: reference.mgda(gram),
    "cagrad": lambda gram, n: reference.cagrad(gram, 0.5),
    "nash": lambda gram, n: reference.fairgrad(gram, 1.0),
    "fairgrad": lambda gram, n: reference.fairgrad(gram, 2.0),
    "imtl": lambda gram, n: reference.imtlg(gram),
    "pcgrad": lambda gram, n: reference.pcgrad(gram, 0, torch.tensor(n)),
}


@pytest.mark.parametrize("form", ["", "-ub"])
@pytest.mark.parametrize("name", [name for name in RULES if name != "aligned"])
def test_steps_of_a_rule_go_along_its_weighed_sum(name, form):
    tasks, net, x, targets = tiny()
    net.heads[1].load_state_dict(net.heads[0].state_dict())
    targets[1] = -3 * targets[0]  # gradients in conflict
    weighting = METHODS[name + form](tasks, net, Settings(preference=PREFERENCE))
    shared = list(net.backbone.parameters())
    for n in range(3):
        features = net.features(x)
        losses = net.losses(tasks, weighting.through(features, targets), targets)
        at = [features] if form else shared
        every = net.losses(tasks, [features] * 3, targets)
        rows = [torch.autograd.grad(loss, at, retain_graph=True) for loss in every]
        flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        gram = flat @ flat.mT
        assert gram[0, 1] < 0.0
        weights = WEIGHTS[name](gram, n)
        expected = [sum(w * g for w, g in zip(weights, column)) for column in zip(*rows, strict=True)]
        if form:
            expected = torch.autograd.grad(features, shared, expected[0], retain_graph=True)
        for p in shared:
            p.grad = None
        weighting.backward(net, features, losses)
        for p, gradient in zip(shared, expected, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-12)
        shares = weighting.shares(torch.stack(losses))
        torch.testing.assert_close(shares, (weights / weights.abs().sum()).float())
        assert weighting.system() is None


def test_weights_that_are_all_zero_are_no_shares():
    tasks, net, *_ = tiny()
    weighting = METHODS["imtl-ub"](tasks, net, SHORT)
    first, second, _ = weighting.through(torch.ones(2, 6, requires_grad=True), [])
    (first - second).sum().backward()  # opposites, on which no update projects equally
    assert weighting.shares(torch.ones(3)).tolist() == [0.0] * 3


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_timing_a_method_leaves_the_training_as_it_is(either, method, monkeypatch):
    """The work that is done once more for its time changes neither weights nor what the method reports."""

    def run(every):
        monkeypatch.setattr("mtlgrad.recipes.training.TIME_EVERY", every)
        trainer = Trainer(either, Job(method, 0), SHORT)
        for _ in range(2):
            trainer.run_epoch(quiet)
        return trainer, trained(trainer)[:4]

    (plain, before), (timed, after) = run(10**9), run(1)
    assert len(timed.result.own_ms) > len(plain.result.own_ms)
    assert_same(before, after)


# ---- one training


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_learns(recipe, method):
    settings = Settings(epochs=2, warmup=1)
    trainer = Trainer(recipe, Job(method, 0), settings)
    for _ in range(2):
        trainer.run_epoch(quiet)
    result = trainer.finish()
    rating, recommended, department, age = result.metrics
    assert rating < 0.85
    assert recommended > 0.92
    assert department > 0.6
    assert age < 12.2
    assert len(result.step_ms) == len(result.own_ms) > 0
    for line in result.history:
        assert sum(abs(share) for share in line["share"]) <= 1 + 1e-4
        assert method.startswith(("aligned", "imtl")) or sum(line["share"]) == pytest.approx(1.0, abs=1e-4)
    assert len(result.condition) == len(result.rank) == (len(result.step_ms) if method in ALIGNED else 0)
    if method == "bayesagg":
        assert result.variance.shape == (4, recipe.width)
        assert (result.variance >= 0).all()
    else:
        assert result.variance is None


@pytest.mark.parametrize("method", EVERY_METHOD)
@pytest.mark.parametrize("killed_after", [1, 2])
def test_resuming_repeats_an_uninterrupted_run_bit_for_bit(either, method, killed_after):
    whole = Trainer(either, Job(method, 3), SHORT)
    for _ in range(3):
        whole.run_epoch(quiet)

    first = Trainer(either, Job(method, 3), SHORT)
    for _ in range(killed_after):
        first.run_epoch(quiet)
    state = on_disk(first.state_dict())

    def kill(epoch, step, losses):
        if step == 4:
            raise Interrupted

    with pytest.raises(Interrupted):  # in the middle of the next epoch
        first.run_epoch(kill)
    torch.manual_seed(999)  # another process's generator
    second = Trainer(either, Job(method, 3), SHORT)
    second.load_state_dict(state)
    while second.epoch < 3:
        second.run_epoch(quiet)
    assert_same(trained(whole), trained(second))


def test_single_task_net_has_one_head_and_its_own_target(small):
    trainer = Trainer(small, Job("sum", 0, task=2), SHORT)
    trainer.run_epoch(quiet)
    assert len(trainer.net.heads) == 1
    assert trainer.net.heads[0].out_features == 6
    assert len(trainer.finish().metrics) == 1
    assert trainer.result.tasks == ["department"]


def test_a_diverging_training_says_so(small):
    trainer = Trainer(small, Job("sum", 0), Settings(lr=1e30, batch_size=200))
    with pytest.raises(TrainError, match=r"sum, seed 0: the loss of \w+ became \w+ in epoch 1; lower --lr, now 1e\+30"):
        trainer.run_epoch(quiet)


# ---- a run on disk


@pytest.fixture
def run(tmp_path, small, monkeypatch):
    """Starts or resumes comparisons on the small recipe in tmp_path."""
    monkeypatch.setattr("mtlgrad.recipes.comparison._recipe", lambda settings: small)

    def start(settings=SHORT, name=None, resume=None):
        return Comparison.resume(resume) if resume else Comparison.start(settings, tmp_path / "runs", name)

    return start


class StopAt(Silent):
    """Asks to stop at the n-th step of the run."""

    def __init__(self, stop, after):
        self.stop, self.left = stop, after

    def step(self, epoch, step, losses):
        self.left -= 1
        self.stop.requested = self.stop.requested or self.left == 0


def lines(path, drop=0):
    rows = [line.split(",") for line in path.read_text().splitlines()]
    return [row[: len(row) - drop] for row in rows]


@pytest.mark.parametrize("after", [3, 14, 35, 150])
def test_stopped_and_resumed_run_equals_an_uninterrupted_one(run, after):
    settings = Settings(methods=("sum", "uncertainty"), seeds=1, epochs=3, batch_size=200)
    whole = run(settings, "whole")
    assert whole.run(Silent(), Stop())

    stopped, stop = run(settings, "stopped"), Stop()
    assert not stopped.run(StopAt(stop, after), stop)
    path = stopped.folder.path
    assert {"checkpoint.pt", "history.csv", "results.csv"} <= set(os.listdir(path))
    stopped.folder.close()
    assert run(resume=path).run(Silent(), Stop())
    for name, timing in (("results.csv", 0), ("history.csv", 1)):
        assert lines(path / name, timing) == lines(whole.folder.path / name, timing)
    for method in settings.methods:
        a, b = (torch.load(p / f"model-{method}-0.pt", weights_only=True) for p in (path, whole.folder.path))
        assert_same(a, b)


def test_csv_has_a_row_per_method_seed_and_task(run):
    settings = Settings(methods=("sum", "logsum"), seeds=2, epochs=1, batch_size=400)
    comparison = run(settings, "csv")
    comparison.run(Silent(), Stop())
    rows = lines(comparison.folder.path / "results.csv")
    assert rows[0] == ["method", "seed", "task", "metric", "value", "higher_is_better", "test_loss"]
    names = {t.name for t in comparison.recipe.tasks}
    for method in ("single-task", "sum", "logsum"):
        for seed in ("0", "1"):
            assert {r[2] for r in rows if r[:2] == [method, seed]} - {"all"} == names
    assert len(lines(comparison.folder.path / "history.csv")) == 1 + 2 * 4 * 3
    single = next(c for c in report.summaries(comparison.results, settings.methods, comparison.recipe.tasks))
    assert single.method == "single-task"
    assert all(len(m) == 2 for m in single.metrics)
    figures.write(comparison.results, settings, comparison.recipe.tasks, comparison.folder)
    for name in ("loss_curves.png", "task_weights.png"):
        assert (comparison.folder.path / name).read_bytes().startswith(b"\x89PNG")
    assert not [f for f in os.listdir(comparison.folder.path) if f.startswith(".")]


def test_delta_m_in_the_table_is_against_the_mean_of_the_single_task_nets():
    tasks = (Task("a", "regression", 1, "RMSE", False), Task("b", "binary", 1, "AUC", True))

    def result(job, metrics):
        names = [t.name for t in tasks] if job.task is None else [tasks[job.task].name]
        return Result(job, names, metrics, metrics, [4.0, 6.0, 5.0], [1.0, 2.0, 90.0], [0.5])

    results = [result(Job("sum", s, 0), [v]) for s, v in enumerate((1.0, 3.0))]
    results += [result(Job("sum", s, 1), [0.5]) for s in range(2)]
    results += [result(Job("bayesagg", 0), [2.2, 0.5]), result(Job("bayesagg", 1), [2.0, 0.55])]
    column = report.summaries(results, ["bayesagg"], tasks)[1]
    assert column.delta == pytest.approx([5.0, -5.0])
    assert (column.step_ms, column.own_ms) == (5.5, 2.5)
    cells = report.rows([column], tasks)
    assert [row[1] for row in cells[1:]] == [
        "2.1000 ± 0.1414", "0.5250 ± 0.0354", "+0.00 ± 7.07", "5.50", "2.50 (45 %)",
    ]  # fmt: skip


def test_a_table_of_almost_nothing(small):
    tasks = small.tasks
    assert report.summaries([], ["sum"], tasks) == []
    one = Result(Job("sum", 0, 0), ["rating"], [0.7], [0.4], [], [], [])
    cells = report.rows(report.summaries([one], ["sum"], tasks), tasks)
    assert [row[1] for row in cells] == ["single-task", "0.7000", *["-"] * 6]


def test_the_condition_of_the_gradients_is_told_per_method():
    def result(method, condition, rank):
        return Result(Job(method, 0), ["a", "b"], [], [], [], [], [], condition=condition, rank=rank)

    results = [result("sum", [], []), result("aligned", [2.0, 9.0], [2, 2]), result("aligned", [400.0, 9.5], [1, 2])]
    assert report.systems(results, ["sum", "aligned"], 2) == [
        "aligned: condition number of the task gradients 9.25 (median); "
        "rank below 2, where the min scale jumps, in 25.0 % of 4 timed steps"
    ]


def test_figures_of_eight_tasks_have_four_panels_a_row():
    names = [f"task {i}" for i in range(8)]
    curves = {"aligned": [[0.3, -0.1] * 4] * 3, "sum": [[0.125] * 8] * 3}
    for image in (plots.task_weights(names, curves), plots.loss_curves(names, curves, curves)):
        assert image.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", image[16:24])
        assert 1200 < width < 1600
        assert width > 1.5 * height


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_table_breaks_between_columns_not_in_numbers(width, monkeypatch):
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=True, color_system=None)
    cells = [["", *"abcdefg"], ["CHSI2: RMSE", *(f"{i}.123 ± 0.456" for i in range(7))]]
    progress.show_table(console, cells)
    text = stream.getvalue()
    assert all(cell in text for cell in cells[1])
    assert max(len(line) for line in text.splitlines()) <= width


def test_two_runs_of_one_second_get_two_folders(run):
    a, b = run(), run()
    assert a.folder.path != b.folder.path
    assert a.folder.path.parent == b.folder.path.parent
    run(name="mine")
    with pytest.raises(TrainError, match=r"argument --name: expected a new name, found .*mine; take another, or"):
        run(name="mine")


def test_one_run_is_not_continued_twice_at_once(run):
    path = run(name="busy").folder
    with pytest.raises(TrainError, match="busy is being written by another process"):
        run(resume=path.path)


def test_a_failing_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    where = RunFolder.create(tmp_path, "x", "clothing", {})
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
        RunFolder.create(tmp_path / "new" / "deep", None, "clothing", {})
    assert os.listdir(tmp_path) == ["x"]


def test_a_run_that_fails_at_once_leaves_no_folder(run, tmp_path):
    comparison = run(Settings(methods=("sum",), seeds=1, epochs=1, lr=1e30, batch_size=200))
    with pytest.raises(TrainError, match="lower --lr"):
        comparison.run(Silent(), Stop())
    assert os.listdir(tmp_path) == []


def test_a_run_that_fails_late_keeps_what_was_done(run, monkeypatch):
    comparison = run(name="late")

    def fail(trainer):
        raise RuntimeError("the matrix\n  is singular")

    monkeypatch.setattr(Trainer, "finish", fail)
    words = r"^rating alone, seed 0: the matrix is singular; what was done is saved: --resume "
    with pytest.raises(TrainError, match=words):
        comparison.run(Silent(), Stop())
    assert os.listdir(comparison.folder.path) == ["checkpoint.pt"]


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "other", "old"])
def test_a_damaged_checkpoint_is_named(run, damage):
    before = run(name="hurt").folder
    before.close()
    path = before.path
    file = path / "checkpoint.pt"
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
    with pytest.raises(TrainError, match=r"argument --resume: expected .*found .*hurt.checkpoint.pt.*start anew"):
        run(resume=path)


def test_jobs_complete_a_seed_before_the_next(small):
    jobs = jobs_of(Settings(methods=("sum", "bayesagg"), seeds=2), small)
    assert [j.seed for j in jobs] == [0] * 6 + [1] * 6
    assert [j.task for j in jobs[:6]] == [0, 1, 2, 3, None, None]
