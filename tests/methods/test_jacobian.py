"""task_backward: rows of .jac against one autograd.grad a task, and all else that a backward must leave right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtlgrad import task_backward
from tests.support.bounds import gradients, normal
from tests.support.nets import Net, inputs
from tests.support.oracles import jacobian

BOTH = pytest.mark.parametrize("through", [False, True], ids=["whole graph", "features"])


def jacobians(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.jac for p in parameters]


def assert_equal(got: list[Any], want: list[Any], exact: bool = False) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want):
        if b is None:
            assert a is None
        elif exact:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def run(net: Net, x: Tensor, through: bool, **options: Any) -> None:
    features = net.backbone(x)
    task_backward(net.from_features(features), net.shared, features=features if through else None, **options)


def wanted(net: Net, x: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
    """.jac of the shared parameters, .grad of the heads, by plain autograd on a copy."""
    net = copy.deepcopy(net)
    for p in net.parameters():
        p.grad = None
        if hasattr(p, "jac"):
            del p.jac
    losses = net.from_features(net.backbone(x))
    rows = jacobian(losses, net.shared)
    sum(losses).backward()
    return rows, gradients(net.heads.parameters())


@BOTH
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_rows_are_the_tasks_gradients(tasks: int, through: bool) -> None:
    net, x = Net(tasks), inputs()
    rows, heads = wanted(net, x)
    run(net, x, through)
    assert_equal(jacobians(net.shared), rows)
    assert_equal(gradients(net.heads.parameters()), heads)
    assert all(p.grad is None for p in net.shared)
    for p in net.shared:
        assert p.jac.shape == (tasks, *p.shape)
        assert not p.jac.requires_grad
        assert type(p.jac) is Tensor


@BOTH
def test_accumulates_and_leaves_the_rest(through: bool) -> None:
    """Micro-batches add up, in .jac and in the heads' .grad; .grad of shared parameters is what it was."""
    net, x, y = Net(), inputs(seed=1), inputs(seed=2)
    (rows_x, heads_x), (rows_y, heads_y) = wanted(net, x), wanted(net, y)
    before = [normal(7, *p.shape).float() for p in net.shared]
    for p, g in zip(net.shared, before):
        p.grad = g
    run(net, x, through)
    held = jacobians(net.shared), [p.grad for p in net.heads.parameters()]
    run(net, y, through)
    assert_equal(jacobians(net.shared), [a + b for a, b in zip(rows_x, rows_y)])
    assert_equal(gradients(net.heads.parameters()), [a + b for a, b in zip(heads_x, heads_y)])
    for p, g in zip(net.shared, before):
        assert p.grad is g
    assert_equal(before, [normal(7, *p.shape).float() for p in net.shared], exact=True)
    # Tensors that others may hold on to (buckets, graphs) stay the same.
    assert all(a is b for a, b in zip(jacobians(net.shared), held[0]))
    assert all(p.grad is b for p, b in zip(net.heads.parameters(), held[1]))


@pytest.mark.parametrize(
    "cut", [("tanh",), ("linear",), ("relu", "linear"), ("tanh", "relu", "linear")], ids=lambda names: "-".join(names)
)
@pytest.mark.parametrize("separate", [False, True])
def test_several_features(cut: tuple[str, ...], separate: bool) -> None:
    """Whatever made them, used by all losses or by one each; nothing that is needed again is freed."""
    torch.manual_seed(3)
    stem = nn.Linear(6, 8)
    ends = {"tanh": nn.Tanh(), "linear": nn.Linear(8, 8), "relu": nn.ReLU()}
    heads = [nn.Linear(8, 1) for _ in range(3)]
    x, shared = inputs(), [*stem.parameters(), *(p for name in cut for p in ends[name].parameters())]

    def losses(features: list[Tensor]) -> list[Tensor]:
        used = [[features[t % len(features)]] if separate else features for t in range(3)]
        return [sum((head(z) - t).square().mean() for z in zs) for t, (head, zs) in enumerate(zip(heads, used))]

    def features() -> list[Tensor]:
        h = stem(x)
        return [ends[name](h) for name in cut]

    want = jacobian(losses(features()), shared)
    zs = features()
    task_backward(losses(zs), shared, features=zs)
    assert_equal(jacobians(shared), want)
    for p in shared:
        del p.jac
    zs = features()
    task_backward(losses(zs), shared, features=[*zs, zs[0]])  # given twice, counted once
    assert_equal(jacobians(shared), want)
    assert all(z.grad_fn is not None and not z.is_leaf for z in zs)


def test_features_of_one_operation() -> None:
    """chunk has several outputs: edges are told apart by their number."""
    torch.manual_seed(4)
    stem, heads, x = nn.Linear(6, 8), [nn.Linear(4, 1), nn.Linear(4, 1)], inputs()

    def run(cut: bool) -> list[Tensor]:
        zs = stem(x).tanh().chunk(2, -1)
        losses = [head(z).square().mean() for head, z in zip(heads, zs)]
        if not cut:
            return jacobian(losses, list(stem.parameters()))
        task_backward(losses, stem.parameters(), features=zs)
        return jacobians(list(stem.parameters()))

    assert_equal(run(True), run(False))
    z, other = stem(x).chunk(2, -1)
    losses = [heads[0](z).mean(), heads[1](other).mean()]
    with pytest.raises(ValueError, match="task 1 to reach the shared parameters through the features alone"):
        task_backward(losses, stem.parameters(), features=z)


# ---- absent tasks, parts of the net ----------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("kind", "absent"), [("none", [0]), ("constant", [1, 2]), ("detached", [2]), ("none", [0, 1, 2])], ids=str
)
def test_absent_tasks_have_zeros(kind: str, absent: list[int], through: bool) -> None:
    net, x = Net(), inputs()
    rows, heads = wanted(net, x)
    make: dict[str, Callable[[Tensor], Any]] = {
        "none": lambda loss: None,
        "constant": lambda loss: torch.tensor(3.0),
        "detached": lambda loss: loss.detach(),
    }
    features = net.backbone(x)
    losses = [make[kind](loss) if t in absent else loss for t, loss in enumerate(net.from_features(features))]
    task_backward(losses, net.shared, features=features if through else None)
    for got, want in zip(jacobians(net.shared), rows):
        for t in range(3):
            assert_equal([got[t]], [torch.zeros_like(want[t]) if t in absent else want[t]])
    each = len(heads) // 3
    expected = [None if i // each in absent else g for i, g in enumerate(heads)]
    assert_equal(gradients(net.heads.parameters()), expected)
    first = [j.clone() for j in jacobians(net.shared)]
    task_backward([None, None, None], net.shared)  # nothing at all: nothing changes
    assert_equal(jacobians(net.shared), first, exact=True)


@BOTH
def test_batches_without_labels(through: bool) -> None:
    """Every label missing: the gradient is zero; that of a mean of nothing is what autograd says."""
    torch.manual_seed(5)
    stem, heads, x = nn.Linear(6, 4), [nn.Linear(4, 3), nn.Linear(4, 1)], inputs()
    z = stem(x).tanh()
    none = torch.zeros(16, dtype=torch.bool)
    classes = nn.functional.cross_entropy(heads[0](z), torch.full((16,), -100), reduction="sum")
    regression = (heads[1](z)[none] - 1.0).square().sum()
    whole = heads[1](z).square().mean()
    task_backward([classes, regression, whole], stem.parameters(), features=z if through else None, retain_graph=True)
    for p in stem.parameters():
        assert (p.jac[:2] == 0).all()
        assert p.jac[2].abs().max() > 0
    z = stem(x).tanh()
    for p in stem.parameters():
        del p.jac
    means = [
        nn.functional.cross_entropy(heads[0](z), torch.full((16,), -100)),
        nn.functional.mse_loss(heads[1](z)[none], torch.zeros(0, 1)),
    ]
    assert all(loss.isnan() for loss in means)
    want = jacobian(means, list(stem.parameters()))
    task_backward(means, stem.parameters(), features=z if through else None)
    for p, rows in zip(stem.parameters(), want):
        torch.testing.assert_close(p.jac, rows, equal_nan=True)


def test_parameters_that_some_tasks_reach() -> None:
    torch.manual_seed(6)
    common, own, unused = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    shared = [*common.parameters(), *own.parameters()]
    h = common(inputs())
    losses = {"a": h.tanh().mean(), "b": own(h).tanh().mean()}
    want = jacobian(losses.values(), shared)
    task_backward(losses, [*shared, *unused.parameters()])
    assert_equal(jacobians(shared), want)
    assert (own.weight.jac[0] == 0).all()
    assert not any(hasattr(p, "jac") for p in unused.parameters())


def test_frozen_parameters_are_left_out() -> None:
    net, x = Net(), inputs()
    frozen = net.backbone[2]
    frozen.requires_grad_(False)
    want = jacobian(net.from_features(net.backbone(x)), [p for p in net.shared if p.requires_grad])
    run(net, x, True)
    assert_equal([p.jac for p in net.shared if p.requires_grad], want)
    assert not any(hasattr(p, "jac") or p.grad is not None for p in frozen.parameters())


@BOTH
def test_one_head_for_two_tasks(through: bool) -> None:
    torch.manual_seed(7)
    stem, head, x = nn.Linear(6, 4), nn.Linear(4, 2), inputs()

    def losses(z: Tensor) -> list[Tensor]:
        out = head(z).tanh()  # one graph, which both losses go through
        return [out[:, 0].square().mean(), out[:, 1].mean(), head(z).mean()]

    shared = list(stem.parameters())
    parts = losses(stem(x).tanh())
    want, heads = jacobian(parts, shared), jacobian(parts, list(head.parameters()))
    z = stem(x).tanh()
    task_backward(losses(z), shared, features=z if through else None)
    assert_equal(jacobians(shared), want)
    assert_equal(gradients(head.parameters()), [h.sum(0) for h in heads])


@BOTH
def test_gradients_of_heads_are_not_one_tensor(through: bool) -> None:
    """The same numbers arrive at both terms of a sum, in one tensor; the next batch must not be added twice."""
    torch.manual_seed(8)
    stem, x = nn.Linear(6, 4), inputs()
    a, b = (nn.Parameter(torch.zeros(16, 4)) for _ in range(2))
    for batch in (1.0, 2.0):
        z = stem(x).tanh()
        task_backward([(z + (a + b)).square().mean()], stem.parameters(), features=z if through else None)
        want = 2 * batch * z.detach() / z.numel()
        assert_equal(gradients([a, b]), [want, want])


# ---- the graph: what is freed, errors on the way, hooks, checkpoints, autocast, sparse gradients ---------------------


@BOTH
def test_the_graph_is_freed_unless_it_is_retained(through: bool) -> None:
    net, x = Net(), inputs()
    rows, _ = wanted(net, x)
    features = net.backbone(x)
    losses = net.from_features(features)
    options: dict[str, Any] = {"features": features} if through else {}
    task_backward(losses, net.shared, retain_graph=True, **options)
    task_backward(losses, net.shared, **options)
    assert_equal(jacobians(net.shared), [2 * r for r in rows])
    before = [*jacobians(net.shared), *gradients(net.heads.parameters())]
    copies = [b.clone() for b in before if b is not None]
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        task_backward(losses, net.shared, **options)
    assert_equal([*jacobians(net.shared), *gradients(net.heads.parameters())], copies, exact=True)


@BOTH
@pytest.mark.parametrize("where", ["shared", "head"])
@pytest.mark.parametrize("first", [False, True], ids=["with .grad", "first"])
def test_an_error_on_the_way_leaves_everything_as_it_was(where: str, first: bool, through: bool) -> None:
    net, x = Net(), inputs()
    if not first:
        run(net, x, through)
        for p in net.shared:
            p.grad = torch.ones_like(p)
    before = [(p.grad, copy.deepcopy(p.grad), copy.deepcopy(getattr(p, "jac", None))) for p in net.parameters()]
    calls = []

    def hook(gradient: Tensor) -> None:
        calls.append(gradient)
        if len(calls) == (2 if where == "shared" else 1):
            raise ArithmeticError("from a hook")

    p = net.shared[0] if where == "shared" else net.heads[1][0].weight
    p.register_hook(hook)
    with pytest.raises(ArithmeticError, match="from a hook"):
        run(net, x, through)
    for p, (same, grad, jac) in zip(net.parameters(), before):
        assert p.grad is same
        assert_equal([p.grad, getattr(p, "jac", None)], [grad, jac], exact=True)


@BOTH
def test_hooks_run_once_a_task(through: bool) -> None:
    """On parameters and on the features themselves: one that scales must not scale twice."""
    net, x = Net(), inputs()
    seen: list[str] = []
    net.shared[0].register_hook(lambda g: seen.append("shared"))
    net.heads[0][0].weight.register_hook(lambda g: seen.append("head"))

    def losses() -> tuple[list[Tensor], Tensor]:
        features = net.backbone(x)
        features.register_hook(lambda g: (seen.append("features"), 0.25 * g)[1])
        return net.from_features(features), features

    want = jacobian(losses()[0], net.shared)
    seen.clear()
    parts, features = losses()
    task_backward(parts, net.shared, features=features if through else None, retain_graph=True)
    assert_equal(jacobians(net.shared), want)
    assert {name: seen.count(name) for name in set(seen)} == {"shared": 3, "head": 1, "features": 3}
    features.sum().backward()  # they are back in their place
    assert seen.count("features") == 4


@BOTH
@pytest.mark.parametrize("part", ["backbone", "heads"])
def test_checkpoints(part: str, through: bool) -> None:
    net, x = Net(), inputs()
    rows, heads = wanted(net, x)
    if part == "backbone":
        features = checkpoint(net.backbone, x, use_reentrant=False)
        losses = net.from_features(features)
    else:
        features = net.backbone(x)
        outs = [checkpoint(head, features, use_reentrant=False) for head in net.heads]
        losses = [10.0**-t * (out - t).square().mean() for t, out in enumerate(outs)]
    task_backward(losses, net.shared, features=features if through else None)
    assert_equal(jacobians(net.shared), rows)
    assert_equal(gradients(net.heads.parameters()), heads)


@BOTH
def test_batch_norm_and_dropout(through: bool) -> None:
    """One forward: T backwards see the same masks, and the running statistics move once."""
    torch.manual_seed(8)
    backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 5))
    net, x = Net(backbone=backbone), inputs()
    torch.manual_seed(9)
    rows, heads = wanted(net, x)
    torch.manual_seed(9)
    run(net, x, through)
    assert_equal(jacobians(net.shared), rows)
    assert_equal(gradients(net.heads.parameters()), heads)
    assert int(backbone[1].num_batches_tracked) == 1


@BOTH
def test_autocast(through: bool) -> None:
    net, x = Net(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        features = net.backbone(x)
        losses = net.from_features(features)
    want = jacobian(losses, net.shared)
    task_backward(losses, net.shared, features=features if through else None)
    assert_equal(jacobians(net.shared), want, exact=True)
    assert {j.dtype for j in jacobians(net.shared)} == {torch.float32}


def test_sparse_gradients() -> None:
    """nn.Embedding(sparse=True): .jac is dense, whatever .grad would be."""
    table = nn.Embedding(10, 3, sparse=True)

    def losses() -> list[Tensor]:
        return [table(torch.tensor([1, 2])).sum(), table(torch.tensor([2, 2, 3])).square().sum()]

    want = [row.to_dense() for row in (torch.autograd.grad(loss, table.weight)[0] for loss in losses())]
    task_backward(losses(), table.parameters())
    assert_equal([table.weight.jac], [torch.stack(want)])
