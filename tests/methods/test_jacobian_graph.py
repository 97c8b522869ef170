"""task_backward and the graph: what it frees, errors on the way, hooks, checkpoints, autocast, sparse gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtlgrad import task_backward
from tests.methods.test_jacobian import BOTH, assert_equal, jacobians, run, wanted
from tests.support.bounds import gradients
from tests.support.nets import Net, inputs
from tests.support.oracles import jacobian


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

    p = net.shared[0] if where == "shared" else net.heads[1][0].weight  # type: ignore[index]
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
    net.heads[0][0].weight.register_hook(lambda g: seen.append("head"))  # type: ignore[index]

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
def test_checkpointed_backbone(through: bool) -> None:
    net, x = Net(), inputs()
    rows, heads = wanted(net, x)
    features = checkpoint(net.backbone, x, use_reentrant=False)
    losses = net.from_features(features)
    task_backward(losses, net.shared, features=features if through else None)
    assert_equal(jacobians(net.shared), rows)
    assert_equal(gradients(net.heads.parameters()), heads)


@BOTH
def test_checkpointed_heads(through: bool) -> None:
    net, x = Net(), inputs()
    rows, heads = wanted(net, x)
    features = net.backbone(x)
    losses = [
        10.0**-t * (checkpoint(head, features, use_reentrant=False) - t).square().mean()
        for t, head in enumerate(net.heads)
    ]
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
    assert int(backbone[1].num_batches_tracked) == 1  # type: ignore[arg-type]


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
