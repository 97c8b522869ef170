"""What saves memory: activation checkpointing around and inside every method, and micro-batches."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mtlgrad
from mtlgrad import AlignedMTL, BayesAgg, Binary, Multiclass, Regression
from tests.support.bounds import contents, near
from tests.support.nets import METHODS, PAIRS, Batch, Bayes, Case, Model, batch, epoch
from tests.support.oracles import procrustes

pytestmark = pytest.mark.usefixtures("one_thread")


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()  # reentrant ones are without gradients otherwise
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


def wrap(model: Model, where: str, reentrant: bool) -> None:
    if where == "backbone":
        model.backbone = Checkpointed(model.backbone, reentrant)  # type: ignore[assignment]
    else:
        model.heads = nn.ModuleList(Checkpointed(head, reentrant) for head in model.heads)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ---- activation checkpointing ----------------------------------------------------------------------------------------

#: Whose gradients are taken by autograd.grad on the way from the losses to the features.
BY_GRAD = [
    "aligned merge",
    "aligned weigh",
    *(name for name in METHODS if name in {f"adatask {rule}" for rule in PAIRS}),
]


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("where", ["backbone", "heads"])
@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_change_no_bit(method: str, where: str, reentrant: bool) -> None:
    """Backbone or heads; the layers are outside. Reentrant ones are refused, in torch's words, where heads are passed
    back by themselves; then nothing has changed."""
    trainers = [METHODS[method](Model()) for _ in range(2)]
    wrap(trainers[1].model, where, reentrant)
    for i in range(Bayes.warm_up + 2):
        if reentrant and where == "heads" and method in BY_GRAD:
            with pytest.raises(RuntimeError, match="use_reentrant=False"):
                trainers[1].backward(batch(seed=i))
            assert all(p.grad is None and not hasattr(p, "jac") for p in trainers[1].model.parameters())
            return
        for trainer in trainers:
            trainer.step(batch(seed=i))
    assert same(trainers[0].model, trainers[1].model)


@pytest.mark.parametrize(
    ("how", "times"),
    [("layer", 2), ("weigh features", 2), ("weigh parameters", 5), ("task_backward", 4), ("through features", 4)],
    ids=[
        "aligned layer",
        "aligned weigh",
        "aligned weigh parameters",
        "adatask whole graph",
        "adatask through features",
    ],
)
def test_how_often_a_checkpointed_backbone_runs(how: str, times: int) -> None:
    """Once, and again for each backward pass through it."""
    model, data, aligned, calls = Model(), batch(), AlignedMTL(3), []
    model.backbone.register_forward_pre_hook(lambda *_: calls.append(1))
    shared = model.shared
    features = checkpoint(model.backbone, data.x, use_reentrant=False)
    losses = model.losses(aligned(features) if how == "layer" else features, data.y)
    if how == "layer":
        torch.stack(losses).sum().backward()
    elif how.startswith("weigh"):
        weights = aligned.weigh(losses, features if how == "weigh features" else shared)
        (weights * torch.stack(losses)).sum().backward()
    else:
        mtlgrad.task_backward(losses, shared, features=features if how == "through features" else None)
    assert len(calls) == times


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("region", ["backbone and layer", "layer and heads", "all"])
def test_the_aligned_layer_inside(region: str, reentrant: bool) -> None:
    data, found = batch(), []
    for inside in (False, True):
        model, aligned = Model(), AlignedMTL(3)
        again = functools.partial(checkpoint, use_reentrant=reentrant) if inside else lambda f, *xs: f(*xs)
        x = data.x.clone().requires_grad_()
        if region == "all":
            losses = again(lambda x, m=model, a=aligned: tuple(m.losses(a(m.backbone(x)), data.y)), x)
        elif region == "layer and heads":
            losses = again(lambda z, m=model, a=aligned: tuple(m.losses(a(z), data.y)), model.backbone(x))
        else:
            losses = model.losses(again(lambda x, m=model, a=aligned: a(m.backbone(x)), x), data.y)
        torch.stack(list(losses)).sum().backward()
        found.append([*(p.grad for p in model.parameters()), aligned.weights])
    assert all(torch.equal(a, b) for a, b in zip(*found))  # type: ignore[arg-type]


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_bayesagg_inside_is_refused(reentrant: bool) -> None:
    """It would count the batch twice, or lose the scale of the loss."""
    trainer: Any = Bayes(Model())
    model, bayes = trainer.model, trainer.bayes
    for i in range(Bayes.warm_up):
        trainer.step(batch(seed=i))
    bayes.refresh()
    data = batch(seed=7)
    x = data.x.clone().requires_grad_()
    features = checkpoint(lambda x: bayes(model.backbone(x), data.y), x, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match=r"BayesAgg: expected .* outside .*checkpoint"):
        bayes.total(model.losses(features, data.y)).backward()


def checkpointed_case(reentrant: bool | None) -> Case:
    case = Case(dtype=torch.float64, norm=True)
    if reentrant is None:
        return case
    case.model.second = Checkpointed(case.model.second, reentrant)
    for name in ("size", "kind", "marks"):
        case.change(name, head=case.model.heads[name])
    return case


def test_alphavil_with_checkpoints() -> None:
    """In the search too, whose parameters are not the model's own."""
    ends = []
    for reentrant in (None, False):
        case = checkpointed_case(reentrant)
        found = epoch(case.vil(alpha_epochs=2))
        assert found.kept == "search"
        ends.append([found.alphas, *contents(case.model).values()])
    assert all(near(a, b, 1e-12) for a, b in zip(*ends, strict=True))
    with pytest.raises((RuntimeError, TypeError, ValueError), match="use_reentrant=False"):
        epoch(checkpointed_case(True).vil(alpha_epochs=2))


# ---- gradient accumulation -------------------------------------------------------------------------------------------

SIZES = (5, 20, 7)


def parts(data: Batch) -> list[tuple[float, Batch]]:
    """Micro-batches of several sizes, each with its share of the examples."""
    total = sum(SIZES)
    xs, ys = data.x.split(SIZES), zip(*(y.split(SIZES) for y in data.y))
    return [(size / total, Batch(x, list(y))) for size, x, y in zip(SIZES, xs, ys)]


def accumulate(model: Model, data: Batch, through: bool = True) -> None:
    for share, part in parts(data):
        features = model.backbone(part.x)
        losses = [share * loss for loss in model.losses(features, part.y)]
        mtlgrad.task_backward(losses, model.shared, features=features if through else None)


@pytest.mark.parametrize("method", ["aligned merge", *(name for name in METHODS if "Ada" in METHODS[name].__name__)])
def test_accumulated_jacobians_are_those_of_the_whole_batch(method: str) -> None:
    """Aligned.merge and AdaTask see what one large batch would have left; heads too."""
    trainers: list[Any] = [METHODS[method](Model()) for _ in range(2)]
    for i in range(3):
        data = batch(seed=i)
        trainers[0].step(data)
        trainers[1].optimizer.zero_grad()
        accumulate(trainers[1].model, data, getattr(trainers[1], "through", True))
        if method == "aligned merge":
            trainers[1].aligned.merge(trainers[1].model.shared)
            assert near(trainers[1].aligned.weights, trainers[0].aligned.weights, 1e-3)
        trainers[1].optimizer.step()
    pairs = zip(trainers[0].model.parameters(), trainers[1].model.parameters())
    assert all(near(p.detach(), q.detach(), 1e-3) for p, q in pairs)


def rows_at_features(model: Model, data: Batch) -> tuple[Tensor, Tensor]:
    features = model.backbone(data.x)
    rows = [torch.autograd.grad(loss, features, retain_graph=True)[0] for loss in model.losses(features, data.y)]
    return features, torch.stack(rows)


@pytest.mark.parametrize("form", ["layer", "weigh"])
def test_aligned_layers_align_each_micro_batch(form: str) -> None:
    """The sum of the micro-batches' aligned gradients, each by its own weights; not the whole batch's, which is what
    merge makes of accumulated .jac."""
    model, data, aligned = Model(), batch(), AlignedMTL(3)
    want = [torch.zeros_like(p) for p in model.shared]
    for share, part in parts(data):
        features, rows = rows_at_features(model, part)
        update = share * procrustes(rows.flatten(1)).update
        pieces = torch.autograd.grad(features, model.shared, update.view_as(features).float())
        want = [w + piece for w, piece in zip(want, pieces)]
    for share, part in parts(data):
        features = model.backbone(part.x)
        losses = model.losses(aligned(features) if form == "layer" else features, part.y)
        weights = torch.ones(3) if form == "layer" else aligned.weigh(losses, features)
        (share * weights * torch.stack(losses)).sum().backward()
    got = [p.grad for p in model.shared]
    assert all(near(g, w, 1e-4, 1e-6) for g, w in zip(got, want))  # type: ignore[arg-type]
    features, rows = rows_at_features(model, data)
    update = procrustes(rows.flatten(1)).update.view_as(features).float()
    whole = torch.autograd.grad(features, model.shared, update)
    assert not all(near(g, w, 1e-2) for g, w in zip(got, whole))  # type: ignore[arg-type]


def bayes_of(model: Model, **options: Any) -> BayesAgg:
    size, marks, kind = model.heads
    return BayesAgg([Regression(size), Binary(marks), Multiclass(kind)], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("statistics", ["stored", "streaming"])
def test_bayesagg_takes_each_micro_batch_as_a_batch(statistics: str) -> None:
    """Through total(), times its share. The posteriors at refresh() are those of the whole batch, whatever the parts;
    so is what the first epoch, plain summation, sends back."""
    model, data = Model(), batch()
    layers = [bayes_of(model, statistics=statistics) for _ in range(2)]
    grads = []
    for layer, pieces in zip(layers, ([(1.0, data)], parts(data))):
        model.zero_grad()
        for share, part in pieces:
            features = layer(model.backbone(part.x), part.y)
            (layer.total(model.losses(features, part.y)) * share).backward()
        layer.refresh()
        grads.append([p.grad for p in model.parameters()])
    assert all(near(a, b, 1e-5, 1e-6) for a, b in zip(*grads))  # type: ignore[arg-type]
    for one, several in zip(layers[0].posteriors or [], layers[1].posteriors or [], strict=True):
        assert near(one.mean, several.mean, 1e-6)
        assert near(one.covariance(), several.covariance(), 1e-6)  # type: ignore[arg-type]
    model.zero_grad()
    want = [torch.zeros_like(p) for p in model.shared]
    for share, part in parts(data):
        features = layers[1](model.backbone(part.x), part.y)
        (layers[1].total(model.losses(features, part.y)) * share).backward()
        z = model.backbone(part.x)
        pieces = torch.autograd.grad(z, model.shared, share * layers[1].aggregate(z, part.y))
        want = [w + piece for w, piece in zip(want, pieces)]
    assert all(near(p.grad, w, 1e-5, 1e-7) for p, w in zip(model.shared, want))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["aligned layer", "bayesagg"])
def test_micro_batches_under_a_scaler(method: str) -> None:
    """One scale for all of a step's micro-batches; what it and the division leave is what there is without a scaler."""
    found = []
    for scaled in (False, True):
        scaler: Any = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        trainer: Any = METHODS[method](Model())
        for i in range(Bayes.warm_up + 3):
            trainer.optimizer.zero_grad()
            if method == "bayesagg" and i == Bayes.warm_up:
                trainer.bayes.refresh()
            for k in range(4):
                data = batch(seed=10 * i + k)
                features = trainer.model.backbone(data.x)
                if method == "bayesagg":
                    features = trainer.bayes(features, data.y)
                    total = trainer.bayes.total(trainer.model.losses(features, data.y))
                else:
                    total = torch.stack(trainer.model.losses(trainer.aligned(features), data.y)).sum()
                scaler.scale(total / 4).backward()
            scaler.step(trainer.optimizer)
            scaler.update()
        found.append(list(trainer.model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*found))
