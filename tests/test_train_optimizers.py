"""``mtlgrad train --optimizer``: AdaTask's optimizers in the recipes, and the shares of updates that a run records."""

import os
import random
import struct

import pytest
import torch
from test_train import SHORT, Silent, StopAt, assert_same, lines, on_disk, quiet, tiny, trained

from mtlgrad import plots
from mtlgrad.recipes import figures, report
from mtlgrad.recipes.base import Interrupted, Job, Settings
from mtlgrad.recipes.clothing import Clothing
from mtlgrad.recipes.comparison import Comparison, Stop, jobs_of
from mtlgrad.recipes.optimizers import ADATASK, RATES
from mtlgrad.recipes.parts import Rows
from mtlgrad.recipes.river import River
from mtlgrad.recipes.training import Trainer
from mtlgrad.recipes.weighting import METHODS, SUMS


@pytest.fixture(scope="module")
def small():
    """Every sixteenth training row; dropout, and two layers."""
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

    def start(settings, name):
        return Comparison.start(settings, tmp_path / "runs", name)

    return start


# ---- one step


@pytest.mark.parametrize("method", SUMS)
def test_terms_add_up_and_are_of_their_own_loss_alone(method):
    tasks, net, _, _ = tiny()
    weighting = METHODS[method](tasks, net, Settings()).double()
    for p in weighting.parameters():
        torch.nn.init.normal_(p)
    losses = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.5, 2.0, 1.5)]
    terms = weighting.terms(losses)
    torch.testing.assert_close(torch.stack(terms).sum(), weighting.total(losses))
    expected = torch.autograd.grad(weighting.total(losses), losses)
    for t, term in enumerate(terms):
        found = torch.autograd.grad(term, losses, allow_unused=True, retain_graph=True)
        torch.testing.assert_close(found[t], expected[t])
        assert [g is None for g in found] == [s != t for s in range(3)]


def test_methods_that_merge_are_no_sums():
    assert SUMS == ("sum", "uncertainty", "logsum")


@pytest.mark.parametrize("name", ADATASK)
@pytest.mark.parametrize("method", SUMS)
def test_the_backbone_gets_a_gradient_a_task_and_all_else_the_sums(small, method, name):
    """Against autograd on the same step: rows are the terms' gradients, heads and log variances get the total's."""
    trainer = Trainer(small, Job(method, 0, optimizer=name), SHORT)
    assert isinstance(trainer.updates.optimizer, ADATASK[name])
    assert all(group["lr"] == RATES[name] for group in trainer.updates.optimizer.param_groups)
    net, weighting = trainer.net.eval(), trainer.weighting
    inputs, targets, *_ = next(iter(trainer.split.validation.batches(64)))
    shared = list(net.backbone.parameters())
    others = [*net.heads.parameters(), *weighting.parameters()]
    features = net.features(*inputs)
    losses = net.losses(small.tasks, [features] * 4, targets)
    rows = [torch.autograd.grad(term, shared, retain_graph=True) for term in weighting.terms(losses)]
    rest = torch.autograd.grad(weighting.total(losses), others, retain_graph=True)
    before = [p.detach().clone() for p in [*shared, *others]]
    trainer.updates.backward(features, losses)
    for i, p in enumerate(shared):
        torch.testing.assert_close(p.jac, torch.stack([row[i] for row in rows]))
    for p, gradient in zip(others, rest, strict=True):
        torch.testing.assert_close(p.grad, gradient)
        assert not hasattr(p, "jac")
    trainer.updates.optimizer.step()
    assert not any(torch.equal(b, p) for b, p in zip(before, [*shared, *others], strict=True))


@pytest.mark.parametrize("method", SUMS)
def test_adams_shares_are_of_the_gradients_of_the_step_itself(either, method, monkeypatch):
    """Dropout included: what was seen before the step adds up to the gradient that the step made."""
    monkeypatch.setattr("mtlgrad.recipes.training.TIME_EVERY", 1)
    trainer = Trainer(either, Job(method, 0), SHORT)
    observe, seen = trainer.updates.observe, []

    def check(jacobians):
        for p in trainer.net.backbone.parameters():
            torch.testing.assert_close(jacobians[p].sum(0), p.grad, rtol=1e-3, atol=1e-5 * float(p.grad.abs().max()))
        seen.append(len(jacobians))
        observe(jacobians)

    monkeypatch.setattr(trainer.updates, "observe", check)
    trainer.run_epoch(quiet)
    assert seen == [4] * trainer.steps


@pytest.fixture(params=["clothing", "river"])
def either(request, small, river):
    return {"clothing": small, "river": river}[request.param]


# ---- one training


#: Every method, and every optimizer.
PAIRS = list(zip(SUMS, ADATASK, strict=True))


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_learns(small, method, name):
    trainer = Trainer(small, Job(method, 0, optimizer=name), Settings(epochs=3, batch_size=32))
    for _ in range(3):
        trainer.run_epoch(quiet)
    first, last = trainer.result.history[0], trainer.result.history[-1]
    assert sum(last["train"]) < 0.9 * sum(first["train"])
    assert trainer.finish().metrics[1] > 0.8  # the AUC
    assert len(trainer.result.step_ms) == len(trainer.result.own_ms) > 0


@pytest.mark.parametrize("name", ["adam", *ADATASK])
def test_history_has_shares_of_every_layer(either, name):
    trainer = Trainer(either, Job("sum", 0, optimizer=name), SHORT)
    layers = either.layers(trainer.net.backbone)
    assert {p for layer in layers.values() for p in layer} == set(trainer.net.backbone.parameters())
    trainer.run_epoch(quiet)
    shares = trainer.result.history[0]["dominance"]
    assert list(shares) == {"clothing": ["words", "project"], "river": ["linear 1", "linear 2"]}[either.name]
    for values in shares.values():
        assert len(values) == len(either.tasks)
        assert sum(values) == pytest.approx(1.0)
        assert min(values) > 0.0
    if name != "adam":
        assert torch.tensor(list(shares.values())).equal(trainer.updates.optimizer.dominance(layers).float())


@pytest.mark.parametrize("job", [Job("bayesagg", 0), Job("aligned", 0), Job("aligned-ub", 0), Job("sum", 0, 2)])
def test_no_shares_where_nothing_is_kept_apart(small, job):
    trainer = Trainer(small, job, SHORT)
    trainer.run_epoch(quiet)
    assert trainer.result.history[0]["dominance"] is None
    assert trainer.state_dict()["estimate"] == {}


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_timing_an_optimizer_leaves_the_training_as_it_is(small, method, name, monkeypatch):
    def epochs(every):
        monkeypatch.setattr("mtlgrad.recipes.training.TIME_EVERY", every)
        trainer = Trainer(small, Job(method, 0, optimizer=name), SHORT)
        for _ in range(2):
            trainer.run_epoch(quiet)
        line = trainer.result.history[-1]
        return trainer.result.own_ms, [*trained(trainer)[:4], line["dominance"], line["train"]]

    (few, before), (many, after) = epochs(10**9), epochs(1)
    assert len(many) > len(few)
    assert_same(before, after)


@pytest.mark.parametrize(("method", "name"), [*PAIRS, ("uncertainty", "adatask-adam")])
def test_resuming_repeats_an_uninterrupted_run_bit_for_bit(either, method, name):
    job = Job(method, 3, optimizer=name)
    whole = Trainer(either, job, SHORT)
    for _ in range(3):
        whole.run_epoch(quiet)

    first = Trainer(either, job, SHORT)
    first.run_epoch(quiet)
    state, last = on_disk(first.state_dict()), random.randrange(first.steps)

    def kill(epoch, step, losses):
        if step == last:
            raise Interrupted

    with pytest.raises(Interrupted):  # in the next epoch
        first.run_epoch(kill)
    torch.manual_seed(999)  # another process's generator
    second = Trainer(either, job, SHORT)
    second.load_state_dict(state)
    while second.epoch < 3:
        second.run_epoch(quiet)
    assert_same(trained(whole), trained(second))


# ---- a run on disk

BOTH = Settings(methods=("sum", "logsum"), optimizers=("adam", "adatask-adam"), seeds=2, epochs=2, batch_size=200)
LABELS = ["sum", "sum + adatask-adam", "logsum", "logsum + adatask-adam"]


def test_every_method_is_trained_with_every_optimizer_and_single_task_nets_with_adam(small):
    jobs = jobs_of(BOTH, small)
    assert BOTH.labels == LABELS
    assert [job.label for job in jobs] == 2 * (["sum"] * 4 + LABELS)
    assert {job.optimizer for job in jobs if job.task is not None} == {"adam"}
    assert jobs[5].title(small.tasks) == "sum + adatask-adam, seed 0"
    assert jobs[0].title(small.tasks) == "rating alone, seed 0"


def test_a_run_names_its_optimizers_everywhere(run, monkeypatch):
    comparison = run(BOTH, "both")
    assert comparison.run(Silent(), Stop())
    path, tasks = comparison.folder.path, [task.name for task in comparison.recipe.tasks]
    for name in ("results.csv", "history.csv"):
        assert {row[0] for row in lines(path / name)[1:]} == {"single-task", *LABELS}
    rows = lines(path / "dominance.csv")
    assert rows[0] == ["method", "seed", "epoch", "layer", "task", "share"]
    assert [row[:5] for row in rows[1:]] == [
        [label, str(seed), str(epoch), layer, task]
        for seed in range(2)
        for label in LABELS
        for epoch in (1, 2)
        for layer in ("words", "project")
        for task in tasks
    ]
    recorded = comparison.results[5].history[1]["dominance"]["project"]
    found = [float(r[5]) for r in rows if r[:4] == ["sum + adatask-adam", "0", "2", "project"]]
    assert found == recorded
    columns = report.summaries(comparison.results, BOTH.labels, comparison.recipe.tasks)
    assert [column.method for column in columns] == ["single-task", *LABELS]
    assert all(len(column.delta) == 2 for column in columns[1:])
    cells = report.rows(columns, comparison.recipe.tasks)[-1]
    assert [cell == "-" for cell in cells[1:]] == [True, True, False, False, False]

    figures.write(comparison.results, BOTH, comparison.recipe.tasks, comparison.folder)
    assert (path / "dominance.png").read_bytes().startswith(b"\x89PNG")
    a, b = (torch.load(path / f"model-sum{o}-1.pt", weights_only=True) for o in ("", "-adatask-adam"))
    assert (a["optimizer"], b["optimizer"]) == ("adam", "adatask-adam")
    assert not torch.equal(a["net"]["heads.0.weight"], b["net"]["heads.0.weight"])

    drawn = {}
    monkeypatch.setattr(plots, "dominance", lambda tasks, layers, shares: drawn.update(shares, layers=layers) or b"")
    figures.write(comparison.results, BOTH, comparison.recipe.tasks, comparison.folder)
    assert drawn.pop("layers") == ["words", "project"]
    assert list(drawn) == LABELS
    for label in LABELS:
        runs = [r for r in comparison.results if r.job.label == label and r.job.task is None]
        assert len(runs) == 2
        mean = sum(r.history[1]["dominance"]["words"][3] for r in runs) / 2
        assert drawn[label][1][0][3] == pytest.approx(mean)


def test_a_run_that_keeps_nothing_apart_has_no_dominance(run):
    settings = Settings(methods=("aligned-ub",), seeds=1, epochs=1, batch_size=400)
    comparison = run(settings, "merged")
    assert comparison.run(Silent(), Stop())
    figures.write(comparison.results, settings, comparison.recipe.tasks, comparison.folder)
    assert not {"dominance.csv", "dominance.png"} & set(os.listdir(comparison.folder.path))


def test_stopped_and_resumed_run_equals_an_uninterrupted_one(run):
    settings = Settings(methods=("sum",), optimizers=("adam", *ADATASK), seeds=1, epochs=2, batch_size=200)
    whole = run(settings, "whole")
    assert whole.run(Silent(), Stop())
    stopped, stop = run(settings, "stopped"), Stop()
    steps = Trainer(whole.recipe, Job("sum", 0), settings).steps
    after = random.randrange(4 * 2 * steps, 8 * 2 * steps - 1)  # past the single-task nets
    assert not stopped.run(StopAt(stop, after), stop), after
    path = stopped.folder.path
    stopped.folder.close()
    assert Comparison.resume(path).run(Silent(), Stop())
    for name, timing in (("results.csv", 0), ("history.csv", 1), ("dominance.csv", 0)):
        assert lines(path / name, timing) == lines(whole.folder.path / name, timing), after
    for name in ("sum", *(f"sum-{optimizer}" for optimizer in ADATASK)):
        assert_same(*(torch.load(p / f"model-{name}-0.pt", weights_only=True) for p in (path, whole.folder.path)))


# ---- the figure


def some_shares(runs, epochs, layers, tasks):
    torch.manual_seed(0)
    return {f"run {r}": torch.rand(epochs, layers, tasks).softmax(-1).tolist() for r in range(runs)}


@pytest.mark.parametrize(("runs", "layers", "tasks"), [(1, 2, 2), (3, 2, 10), (1, 20, 10), (2, 7, 3), (1, 1, 4)])
def test_the_figure_grows_with_layers_and_runs(runs, layers, tasks):
    shares = some_shares(runs, 4, layers, tasks)
    image = plots.dominance([f"task {t}" for t in range(tasks)], [f"layer {i}" for i in range(layers)], shares)
    assert image.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", image[16:24])
    assert 600 < width < 1400
    rows = runs * -(-layers // 5)
    assert 150 * rows < height < 330 * rows + 100


def test_the_figure_of_one_epoch_and_of_shares_that_are_not_numbers():
    shares = some_shares(1, 1, 2, 3)
    shares["run 0"][0][1] = [float("nan")] * 3
    assert plots.dominance(["a", "b", "c"], ["x", "y"], shares).startswith(b"\x89PNG")
