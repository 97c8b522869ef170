"""The rules over the Gram matrix and task_backward on several ranks equal one process with the concatenated batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mtlgrad
from tests.support.bounds import assert_near
from tests.support.ranks import (
    RULES,
    WIDTH,
    Labelled,
    Pool,
    counted,
    cut_batch,
    joined_batch,
    labelled_batches,
    labelled_losses,
    labelled_net,
    shown,
)

FORMS = ["layer", "merge", "merge features", "weigh", "weigh features"]
CUTS = {
    2: [([5, 3], {}), ([1, 7], {0: 0}), ([4, 4], {1: 1})],
    4: [([2, 1, 3, 2], {}), ([1, 4, 2, 1], {0: 0, 2: 2}), ([2, 2, 2, 2], {3: 1})],
}


def gradients(form: str, parts: list[Labelled], rule: str) -> dict[str, Tensor]:
    """What a step leaves; of one process if torch.distributed was not initialised."""
    alone = not dist.is_initialized()
    batch = joined_batch(parts) if alone else parts[dist.get_rank()]
    net = labelled_net()
    aligned = RULES[rule]()
    model = net if alone else DistributedDataParallel(net)
    shared = list(net.backbone.parameters())
    if form.startswith("merge"):
        with torch.enable_grad() if alone else model.no_sync():
            z = model(batch.x)
            given = z if "features" in form else None
            mtlgrad.task_backward(labelled_losses(net, [z, z, z], batch), shared, features=given)
        aligned.merge(shared)
    elif form.startswith("weigh"):
        z = model(batch.x)
        values = labelled_losses(net, [z, z, z], batch)
        weights = aligned.weigh(values, z if "features" in form else shared)
        (weights * torch.stack(values)).sum().backward()
    else:
        z = model(batch.x)
        torch.stack(labelled_losses(net, list(aligned(z)), batch)).sum().backward()
    # One vector each: an entry's error is measured by the largest of all, also in a bias whose gradient nearly cancels.
    parts_of = {"backbone": net.backbone, "heads": net.heads}
    found = {name: torch.cat([p.grad.flatten() for p in m.parameters()]) for name, m in parts_of.items()}  # type: ignore[union-attr]
    return {**found, **shown(aligned)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [2, 4])
def test_equal_to_one_process(form: str, size: int, two_ranks: Pool, four_ranks: Pool) -> None:
    pool = two_ranks if size == 2 else four_ranks
    for counts, absent in CUTS[size]:
        parts = cut_batch(labelled_batches(1, 11, seed=len(absent))[0], counts, absent)
        for rule in RULES:
            expected = gradients(form, parts, rule)
            for found in pool(gradients, form, parts, rule):
                for name, value in expected.items():
                    assert_near(found[name], value)


def accumulated() -> list[Tensor]:
    """Two micro-batches on a net that another method's gradients are left in; then as one process would have it."""
    rank = dist.get_rank() if dist.is_initialized() else None
    net = labelled_net()
    for p in net.parameters():
        p.grad = torch.full_like(p, 0.5)
    for batch in labelled_batches(2, 8):
        parts = cut_batch(batch, [2, len(batch.x) - 2])
        part = joined_batch(parts) if rank is None else parts[rank]
        z = net(part.x)
        mtlgrad.task_backward(labelled_losses(net, [z, z, z], part), net.backbone.parameters())
    return [*(p.jac for p in net.backbone.parameters()), *(p.grad for p in net.parameters())]  # type: ignore[misc]


def test_micro_batches_accumulate(two_ranks: Pool) -> None:
    expected = accumulated()
    for found in two_ranks(accumulated):
        for value, other in zip(found, expected, strict=True):
            assert_near(value, other)


def unequal(kind: str) -> None:
    net = labelled_net()
    z = net(torch.randn(4, 6))
    values: list[Tensor | None] = [net.heads[t](z).mean() for t in range(3)]
    if dist.get_rank() == 1:
        values[1] = None if kind == "none" else torch.zeros(())
    with pytest.raises(RuntimeError) as caught:
        mtlgrad.task_backward(values, net.backbone.parameters(), features=z if kind == "features" else None)
    message = str(caught.value)
    assert "task_backward: expected the same tasks with a loss on all ranks, found task 0, task 1, task 2" in message
    assert "task 0, task 2" in message
    assert "on rank 1" in message
    assert "global_means" in message
    assert not any(hasattr(p, "jac") for p in net.parameters())
    assert all(p.grad is None for p in net.parameters())


def test_ranks_agree_on_absent_tasks(two_ranks: Pool) -> None:
    for kind in ("none", "constant", "features"):
        two_ranks(unequal, kind)


def everywhere_absent() -> list[Tensor]:
    torch.manual_seed(3)
    net, aligned = labelled_net(), mtlgrad.AlignedMTL(3)
    z = net(torch.randn(4, 6))
    mtlgrad.task_backward([net.heads[0](z).mean(), None, net.heads[2](z).mean()], net.backbone.parameters())
    aligned.merge(net.backbone.parameters())
    assert aligned.weights is not None
    assert net.heads[1].weight.grad is None
    return [aligned.weights, *(p.grad for p in net.backbone.parameters() if p.grad is not None)]


def test_a_task_that_no_rank_has(two_ranks: Pool) -> None:
    expected = everywhere_absent()
    for found in two_ranks(everywhere_absent):
        for value, other in zip(found, expected, strict=True):
            assert_near(value, other)


class Part(nn.Module):
    """Reaches its second half on one rank only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always, self.sometimes = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        x = self.always(x)
        return torch.cat([x, self.sometimes(x)]) if both else torch.cat([x, x])


def partly_reached_head() -> None:
    net = Part()
    z = net(torch.ones(2, 3), both=dist.get_rank() == 0)
    with pytest.raises(RuntimeError, match=r"expected the same tasks with a loss on all ranks"):
        mtlgrad.task_backward([z.sum(), z.square().sum()], net.always.parameters())


def test_a_head_that_one_rank_does_not_reach_is_refused(two_ranks: Pool) -> None:
    two_ranks(partly_reached_head)


def partly_reached_shared() -> Tensor:
    net = Part()
    z = net(torch.full((2, 3), 1.0 + dist.get_rank()), both=dist.get_rank() == 0)
    mtlgrad.task_backward([z.sum(), z.square().sum()], net.parameters())
    return net.sometimes.weight.jac  # type: ignore[return-value]


def test_a_shared_parameter_that_one_rank_does_not_reach_is_zero_there(two_ranks: Pool) -> None:
    net = Part()
    z = net(torch.ones(2, 3), both=True)
    mtlgrad.task_backward([z.sum(), z.square().sum()], net.parameters())
    for found in two_ranks(partly_reached_shared):
        torch.testing.assert_close(found, net.sometimes.weight.jac / 2)  # type: ignore[operator]


def not_finite() -> None:
    aligned = mtlgrad.AlignedMTL(2, check_finite=True)
    z = torch.ones(3, 2, requires_grad=True)
    first, second = aligned(z)
    factor = torch.nan if dist.get_rank() == 0 else 1.0
    with pytest.raises(ValueError, match=r"task 1"):
        (first.sum() + factor * second.square().sum()).backward()


def test_not_finite_on_one_rank_is_an_error_on_all(two_ranks: Pool) -> None:
    two_ranks(not_finite)


def communication(form: str) -> dict[str, int]:
    net, aligned = labelled_net(), mtlgrad.AlignedMTL(3)
    mtlgrad.world.ranks.world_of(None)  # what makes the group is not a step's communication
    batch = labelled_batches(1, 11)[0]
    shared = list(net.backbone.parameters())
    z = net(batch.x)
    values = labelled_losses(net, [z, z, z], batch)
    views = aligned(z)
    with counted() as found:
        if form == "merge":
            mtlgrad.task_backward(values, shared)
            aligned.merge(shared)
        elif form == "layer":
            torch.stack([view.sum() for view in views]).sum().backward()
        else:
            aligned.weigh(values, z if form == "weigh features" else shared)
    return found


def test_communication(two_ranks: Pool) -> None:
    """docs/guide/ddp.md: the bytes that a rank gives to each collective."""
    net, tasks = labelled_net(), 3
    backbone = list(net.backbone.parameters())
    shared = sum(p.numel() for p in backbone)
    heads = list(net.heads.parameters())
    other = sum(p.numel() for p in heads)
    expected = {
        "layer": {"all_reduce": 8 * tasks**2},
        "weigh features": {"all_reduce": 8 * tasks**2},
        "weigh": {"all_reduce": 4 * tasks * shared},
        "merge": {"all_reduce": 4 * (tasks * shared + other + len(backbone)) + 24 * len(heads), "all_gather": 8},
    }
    assert net.heads[0].in_features == WIDTH
    for form, size in expected.items():
        assert two_ranks(communication, form) == [size, size], form


def sparse_head() -> Tensor:
    torch.manual_seed(0)
    table, backbone = nn.Embedding(5, 3, sparse=True), nn.Linear(3, 3)
    rank = dist.get_rank() if dist.is_initialized() else None
    rows = torch.tensor([0, 1, 1, 4]) if rank is None else torch.tensor([[0, 1], [1, 4]])[rank]
    z = backbone(torch.ones(len(rows), 3))
    mtlgrad.task_backward([(z * table(rows)).mean(), z.square().mean()], backbone.parameters())
    assert table.weight.grad is not None
    return table.weight.grad.to_dense()


def test_sparse_gradients_of_heads(two_ranks: Pool) -> None:
    for found in two_ranks(sparse_head):
        assert_near(found, sparse_head())


def other_heads() -> None:
    torch.manual_seed(0)
    backbone, heads = nn.Linear(3, 3), nn.ModuleList([nn.Linear(3, 1) for _ in range(2)])
    z = backbone(torch.ones(2, 3))
    head = heads[dist.get_rank()]
    for features in (None, z):
        with pytest.raises(RuntimeError, match=r"task_backward: losses: expected to reach the same heads in the same"):
            mtlgrad.task_backward(
                [head(z).mean(), z.mean()], backbone.parameters(), features=features, retain_graph=True
            )
    assert all(p.grad is None for p in [*backbone.parameters(), *heads.parameters()])


def test_other_heads_of_the_same_shapes_are_refused(two_ranks: Pool) -> None:
    two_ranks(other_heads)


def inputs_gradient(counts: list[int]) -> Tensor:
    torch.manual_seed(0)
    backbone, head = nn.Linear(3, 3), nn.Linear(3, 1)
    x = torch.randn(counts[dist.get_rank()], 3).requires_grad_()
    z = backbone(x)
    mtlgrad.task_backward([head(z).mean(), z.square().mean()], backbone.parameters())
    together = torch.autograd.grad([head(backbone(x)).mean() + backbone(x).square().mean()], x)[0]
    torch.testing.assert_close(x.grad, together)
    return x.grad  # type: ignore[return-value]


def test_gradients_of_inputs_are_each_ranks_own(two_ranks: Pool) -> None:
    two_ranks(inputs_gradient, [2, 2])
    two_ranks(inputs_gradient, [1, 3])


class Nothing(torch.autograd.Function):
    """Uses a parameter, and has no gradient for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def no_gradient() -> None:
    backbone, unused = nn.Linear(3, 3), nn.Parameter(torch.ones(2))
    z = Nothing.apply(backbone(torch.ones(2, 3)), unused)
    mtlgrad.task_backward([z.mean(), z.square().mean()], [*backbone.parameters(), unused])
    assert not hasattr(unused, "jac")


def test_a_parameter_without_a_gradient_gets_no_jac(two_ranks: Pool) -> None:
    two_ranks(no_gradient)


def dropped_layers() -> tuple[list[bool], Tensor]:
    """On rank 1 alone the loss passes through the second layer, and through the third on none."""
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])
    rank = dist.get_rank() if dist.is_initialized() else None
    x = torch.arange(12.0).view(4, 3) / 10
    parts = {0: x[:2], 1: x[2:], None: x}
    z = layers[0](parts[rank])
    if rank == 1:
        z = layers[1](z)
    elif rank is None:
        z = torch.cat([z[:2], layers[1](z[2:])])
    mtlgrad.task_backward([z.square().mean(), z.sin().mean()], layers.parameters())
    return [hasattr(p, "jac") for p in layers.parameters()], layers[1].weight.jac  # type: ignore[return-value]


def test_a_layer_that_one_rank_leaves_out(two_ranks: Pool) -> None:
    there, jacobian = dropped_layers()
    assert there == [True] * 4 + [False] * 2
    for found, of_rank in two_ranks(dropped_layers):
        assert found == there
        assert_near(of_rank, jacobian)
