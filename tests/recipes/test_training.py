"""The methods in the loop are their formulas; a training resumes bit for bit; ranks come to what one process does."""

import io
import math
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mtlgrad import reference
from mtlgrad.recipes import RMSE, MultiTaskNet, Recipe, Tensors, linear_heads, regression
from mtlgrad.recipes.methods import METHODS, WITH_PREFERENCE, make
from mtlgrad.recipes.recipe import TrainError
from mtlgrad.recipes.training import features_of
from tests.recipes.small_recipe import CPU, Listed, Small, begun, quiet, trained

SOME = ("sum", "logsum", "uncertainty", "bayesagg", "bayesagg-published", "aligned", "aligned-ub-log", "pcgrad",
        "pcgrad-ub", "adatask", "adatask-mean", "adatask-rmsprop-log", "adatask-adagrad", "alphavil")  # fmt: skip


def on_disk(state):
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def untimed(training):
    history = [{k: v for k, v in line.items() if k != "step_ms"} for line in training.result.history]
    return history, training.finish().metrics, training.model.state_dict()


def assert_same(a, b, tolerance=0.0):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key], tolerance)
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y, tolerance)
    elif isinstance(a, (torch.Tensor, float)):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tolerance, atol=tolerance)
    else:
        assert a == b


# ---- formulas

PREFERENCE = (0.25, 3.0, 1.0)  # in float32 as they stand
#: Weights of a rule, of the Gram matrix.
RULES = {
    "aligned": lambda gram: reference.align(gram, torch.tensor(PREFERENCE)).weights,
    "aligned-rmse": lambda gram: reference.align(gram, torch.tensor(PREFERENCE), "rmse").weights,
    "upgrad": lambda gram: reference.upgrad(gram, torch.tensor(PREFERENCE)),
    "dualproj": lambda gram: reference.dualproj(gram, torch.tensor(PREFERENCE)),
    "mgda": reference.mgda,
    "cagrad": lambda gram: reference.cagrad(gram, 0.5),
    "nash": lambda gram: reference.fairgrad(gram, 1.0),
    "fairgrad": lambda gram: reference.fairgrad(gram, 2.0),
    "imtl": reference.imtlg,
    "pcgrad": lambda gram: reference.pcgrad(gram, 0, torch.tensor(0)),
}


def gradients(method, preference=None):
    """What a method leaves in the backbone, and what the tasks' gradients are: on it, and at the features."""
    recipe = Small()
    torch.manual_seed(0)
    model = recipe.model()
    made = make(method, recipe.tasks, model, 2, preference)
    inputs, targets = recipe.train[list(range(9))]
    features = features_of(model, inputs)
    views = made.views(features, targets)
    losses = [t.loss(model.heads[t.name](v), targets[t.name]) for t, v in zip(recipe.tasks, views, strict=True)]
    plain = [t.loss(model.heads[t.name](features), targets[t.name]) for t in recipe.tasks]
    shared = list(model.backbone.parameters())
    rows = [torch.autograd.grad(loss, [*shared, features], retain_graph=True) for loss in plain]
    made.backward(losses, features, model.backbone)
    return made, model, torch.stack(plain).detach(), rows, features_of(model, inputs)


@pytest.mark.parametrize("suffix", ["", "-ub", "-log", "-ub-log"])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_goes_along_its_weighed_sum(name, suffix):
    preference = PREFERENCE if name + suffix in WITH_PREFERENCE else None
    made, model, losses, rows, features = gradients(name + suffix, preference)
    factors = 1 / losses if suffix.endswith("log") else torch.ones(3).double()
    rows = [[factor * g for g in row] for factor, row in zip(factors, rows, strict=True)]
    at = [row[-1:] if "-ub" in suffix else row[:-1] for row in rows]
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in at])
    weights = RULES[name](flat @ flat.mT)
    expected = [sum(w * g for w, g in zip(weights, column, strict=True)) for column in zip(*at, strict=True)]
    shared = list(model.backbone.parameters())
    if "-ub" in suffix:
        expected = torch.autograd.grad(features, shared, expected[0])
    for p, gradient in zip(shared, expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-12)
        assert not hasattr(p, "jac")
    torch.testing.assert_close(made.share.double(), weights / weights.abs().sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["sum", "logsum", "uncertainty"])
def test_weighted_sums_are_their_formulas(name):
    made, model, losses, rows, _ = gradients(name, (2.0, 0.5, 1.0) if name == "sum" else None)
    weights = {"sum": torch.tensor([2.0, 0.5, 1.0]), "logsum": 1 / losses, "uncertainty": torch.tensor([0.5, 1.0, 1.0])}
    for p, column in zip(model.backbone.parameters(), zip(*(row[:-1] for row in rows), strict=True), strict=True):
        expected = sum(w * g for w, g in zip(weights[name].double(), column, strict=True))
        torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(made.share.double(), (weights[name] / weights[name].sum()).double())
    if name == "uncertainty":  # d/ds of exp(-s) L f + s / 2
        torch.testing.assert_close(made.log_variance.grad.double(), 0.5 - made.factor.double() * losses)


def test_adatask_mean_moves_a_task_th_as_far():
    both = [begun(name, epochs=1) for name in ("adatask", "adatask-mean")]
    start = [p.clone() for p in both[0].model.backbone.parameters()]
    for training in both:
        inputs, targets = training.recipe.train[list(range(8))]
        features, outputs = training.net(inputs, targets)
        training.method.backward(training.losses(outputs, targets), features, training.model.backbone)
        training.optimizer.step()
    for p, q, before in zip(*(t.model.backbone.parameters() for t in both), start, strict=True):
        torch.testing.assert_close(3 * (q - before), p - before)


@pytest.mark.parametrize(("method", "moves"), [("adatask", False), ("sum", True)])
@pytest.mark.parametrize("k", [-3, -2, -1, 1, 2, 3])
def test_a_loss_times_a_power_of_ten_moves_adam_and_not_adatask(method, moves, k):
    """What is left of 0.09 to 0.2 is eps: 9e-4 at k = -3, 1e-6 from k = 1 on."""

    class Scaled(Small):
        def __init__(self, seed=0):
            super().__init__(seed)
            first = self.tasks[0]
            self.tasks[0] = type(first)("a", lambda o, t: 10.0**k * first.loss(o, t), first.metric)

    plain, scaled = trained(method, epochs=5), trained(method, recipe=Scaled(), epochs=5)
    pairs = zip(plain.model.backbone.parameters(), scaled.model.backbone.parameters(), strict=True)
    difference = max(float((p - q).detach().abs().max()) for p, q in pairs)
    assert (difference > 0.05) if moves else (difference < 2e-3)


# ---- the loop


@pytest.mark.parametrize("method", [m for m in METHODS if m != "alphavil"])
def test_every_method_learns_something(method):
    training = begun(method, epochs=4)
    before = sum(training.evaluate(training.recipe.train)[1])
    while training.epoch < 4:
        training.run_epoch(quiet)
    assert sum(training.evaluate(training.recipe.train)[1]) < before - 0.05
    assert all(math.isfinite(value) for value in training.finish().metrics)


def test_alphavil_helps_its_target():
    training = begun("alphavil", epochs=4)
    before = training.evaluate(training.recipe.validation)[1][0]
    while training.epoch < 4:
        training.run_epoch(quiet)
    assert training.result.history[-1]["validation"][0] < before
    assert training.vil.rounds == 8


def test_alphavil_turns_from_a_task_of_noise():
    class Noisy(Small):
        rows = 200

        def __init__(self, seed=0):
            super().__init__(seed)
            draw = torch.Generator().manual_seed(99)
            noise = torch.randn(len(self.train), generator=draw, dtype=torch.float64)
            self.train = Tensors(self.train.inputs, {**self.train.targets, "b": 0.5 + 0.5 * noise.sign()})

    weights = trained("alphavil", recipe=Noisy(), epochs=4).vil.task_weights
    assert weights[1] < weights[0]


@pytest.mark.parametrize("method", SOME)
def test_resuming_repeats_an_uninterrupted_run_bit_for_bit(method):
    whole = trained(method, epochs=4)
    first = begun(method, epochs=4)
    for _ in range(3):
        first.run_epoch(quiet)
    second = begun(method, epochs=4, seed=0)
    torch.manual_seed(123)
    second.load_state_dict(on_disk(first.state_dict()))
    second.run_epoch(quiet)
    assert_same(untimed(second), untimed(whole))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_ordinary_dataset_gives_what_one_of_tensors_gives(workers):
    recipe = Listed()
    recipe.workers = workers
    assert_same(untimed(trained("sum", recipe=recipe)), untimed(trained("sum")))


def test_a_net_for_one_task_trains_its_own_head_alone():
    training = trained("single", task="b")
    start = begun("single", task="b").model.state_dict()
    moved = {name for name, value in training.model.state_dict().items() if not torch.equal(value, start[name])}
    assert moved == {"backbone.0.weight", "backbone.0.bias", "backbone.2.weight", "backbone.2.bias",
                     "heads.b.weight", "heads.b.bias"}  # fmt: skip
    assert training.result.tasks == ["b"]
    assert len(training.finish().metrics) == 1


@pytest.mark.parametrize("method", ["sum", "aligned", "aligned-ub", "adatask", "uncertainty"])
def test_what_a_recipe_froze_stays_frozen(method):
    class Frozen(Small):
        def model(self):
            net = super().model()
            net.backbone[0].requires_grad_(False)
            net.heads["a"].weight.requires_grad_(False)
            return net

    start, end = begun(method, recipe=Frozen()).model.state_dict(), trained(method, recipe=Frozen()).model.state_dict()
    still = {name for name, value in end.items() if torch.equal(value, start[name])}
    assert still == {"backbone.0.weight", "backbone.0.bias", "heads.a.weight"}


def test_inputs_may_be_a_tuple_or_a_dict():
    class Parts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(6, 4)

        def forward(self, left, right):
            return self.layer(torch.cat([left, right], 1))

    class Two(Small):
        form = tuple

        def __init__(self, seed=0):
            super().__init__(seed)
            for name in ("train", "validation", "test"):
                part = getattr(self, name)
                items = [((x[:2], x[2:]), y) for x, y in (part[i] for i in range(len(part)))]
                named = [({"right": x[1], "left": x[0]}, y) for x, y in items]
                setattr(self, name, named if self.form is dict else items)

        def model(self):
            return MultiTaskNet(Parts(), linear_heads(4, {"a": 1, "b": 1, "c": 3})).double()

    first = trained("aligned", recipe=Two())
    Two.form = dict
    assert_same(untimed(first), untimed(trained("aligned", recipe=Two())))


def test_errors_are_in_the_labels_unit():
    training = trained("sum")
    inputs, targets = training.recipe.test[list(range(len(training.recipe.test)))]
    features = features_of(training.model, inputs)
    error = training.model.heads["a"](features)[:, 0] - targets["a"]
    assert training.finish().metrics[0] == pytest.approx(3.0 * float(error.detach().square().mean().sqrt()))


def test_regressions_are_predicted_by_the_posterior():
    training = trained("bayesagg")
    features = features_of(training.model, training.recipe.test[list(range(10))][0]).detach()
    outputs = [head(features) for head in training.model.heads.values()]
    better = training.method.predict(features, outputs)
    assert torch.equal(better[1], outputs[1])
    assert not torch.equal(better[0], outputs[0])
    torch.testing.assert_close(better[0], training.method.bayes.predict(features)[0].reshape(-1, 1))


def test_a_diverging_training_says_so():
    with pytest.raises(TrainError, match=r"^the loss of a became (inf|nan) in epoch 1; lower --lr$"):
        trained("sum", lr=1e200)


def test_bayesagg_refuses_a_head_that_is_not_linear():
    class Deep(Small):
        def model(self):
            net = super().model()
            net.heads["a"] = torch.nn.Sequential(torch.nn.Linear(4, 1)).double()
            return net

    with pytest.raises(TrainError, match=r"^bayesagg: task 'a': expected a linear head with squared error"):
        begun("bayesagg", recipe=Deep())


def test_a_model_without_a_head_and_a_loss_that_is_no_scalar_are_refused():
    class Headless(Small):
        def model(self):
            return MultiTaskNet(torch.nn.Linear(6, 4), linear_heads(4, {"a": 1, "c": 3})).double()

    with pytest.raises(
        TrainError, match=r"^Headless.model: expected .backbone, and .heads by task, found no head for b$"
    ):
        begun("sum", recipe=Headless())

    class Unreduced(Small):
        def __init__(self, seed=0):
            super().__init__(seed)
            self.tasks[1] = type(self.tasks[1])("b", lambda o, t: (o[:, 0] - t) ** 2, self.tasks[1].metric)

    with pytest.raises(TrainError, match=r"^task 'b': expected a loss that is a scalar, found shape \[8\]$"):
        trained("sum", recipe=Unreduced())


def test_whatever_draws_in_the_main_process_is_seeded():
    class Noisy(Listed):
        def __init__(self, seed=0):
            super().__init__(seed)
            plain = self.train

            class Augmented(torch.utils.data.Dataset):
                def __len__(self):
                    return len(plain)

                def __getitem__(self, i):
                    inputs, targets = plain[i]
                    return inputs + torch.rand(()) + random.random() + np.random.rand(), targets  # noqa: NPY002

            self.train = Augmented()

    whole = trained("sum", recipe=Noisy(), epochs=3)
    first = begun("sum", recipe=Noisy(), epochs=3)
    for _ in range(2):
        first.run_epoch(quiet)
    second = begun("sum", recipe=Noisy(), epochs=3)
    second.load_state_dict(on_disk(first.state_dict()))
    second.run_epoch(quiet)
    assert_same(untimed(second), untimed(whole))


def test_a_dense_recipe_needs_nothing_of_the_trainer():
    """Two tasks on generated images, an encoder and decoders."""

    class Images(Recipe):
        epochs, batch_size, evaluation_batch_size = 3, 8, 5

        def __init__(self, seed=0):
            draw = torch.Generator().manual_seed(seed)
            images = torch.rand(40, 3, 16, 16, generator=draw)
            self.tasks = [regression("grey"), type(regression("x"))("edges", torch.nn.functional.l1_loss, RMSE)]
            edges = (images[..., 1:, :] - images[..., :-1, :]).mean(1, keepdim=True)
            data = Tensors(images, {"grey": images.mean(1), "edges": torch.nn.functional.pad(edges, (0, 0, 0, 1))})
            self.train, self.validation, self.test = (data.only(p) for p in torch.arange(40).split([24, 8, 8]))

        def model(self):
            encoder = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.nn.ReLU())
            return MultiTaskNet(
                encoder, {name: torch.nn.ConvTranspose2d(8, 1, 4, 2, padding=1) for name in ("grey", "edges")}
            )

    for method in ("sum", "aligned", "aligned-ub", "upgrad-ub-log", "adatask", "uncertainty"):
        training = trained(method, recipe=Images(), epochs=3)
        losses = [sum(line["train"]) for line in training.result.history]
        assert losses[-1] < losses[0]


# ---- ranks


def on_ranks(method, rows, task=None):
    class Sized(Small):
        pass

    Sized.rows = rows
    # LBFGS magnifies: 1e-15 in the parameters are 6e-13 after an epoch of alphaVIL, and 2e-3 after two.
    training = trained(method, recipe=Sized(), task=task, epochs=1 if method == "alphavil" else 2)
    history = untimed(training)
    return history, training.method.state_dict() if method == "pcgrad" else {}


RANKED = (
    "sum",
    "logsum",
    "uncertainty",
    "bayesagg",
    "aligned",
    "aligned-log",
    "upgrad-ub",
    "pcgrad",
    "adatask",
    "alphavil",
)


@pytest.mark.parametrize("method", RANKED)
def test_two_ranks_come_to_what_one_process_does(two_ranks, method):
    alone = on_ranks(method, 48)
    for found in two_ranks(on_ranks, method, 48):
        assert_same(found, alone, 1e-6)  # losses' weights are float32


@pytest.mark.parametrize("method", ["sum", "aligned-ub", "adatask-log", "bayesagg"])
def test_ranks_stay_alike_with_batches_that_are_not(two_ranks, method):
    first, second = two_ranks(on_ranks, method, 45)
    assert_same(first, second)


def test_a_net_alone_on_two_ranks(two_ranks):
    alone = on_ranks("single", 48, "b")
    for found in two_ranks(on_ranks, "single", 48, "b"):
        assert_same(found, alone, 1e-8)


def test_the_loader_is_torchs():
    training = begun("sum", recipe=Listed())
    assert type(training.loader) is DataLoader
    assert training.device == CPU
