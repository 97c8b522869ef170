"""What DistributedDataParallel does around this package: buckets, no_sync, torch.compile, checkpointing."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import mtlgrad
from tests.support.bounds import assert_near
from tests.support.ranks import Pool, cut_batch, joined_batch, labelled_batches, labelled_losses, labelled_net


class Deep(nn.Module):
    """Layers in two places, and parameters between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(6, 12), nn.Tanh())
        self.branches = nn.ModuleList([nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(2)])
        self.heads = nn.ModuleList([nn.Linear(12, 1) for _ in range(4)])
        self.lower, self.upper = mtlgrad.AlignedMTL(2), nn.ModuleList([mtlgrad.AlignedMTL(2) for _ in range(2)])

    def forward(self, x: Tensor, order: list[int]) -> Tensor:
        views = self.lower(self.first(x))
        inner = [view for i in (0, 1) for view in self.upper[i](self.branches[i](views[i]))]
        return torch.stack([self.heads[i](inner[i]).square().mean() for i in order]).sum()


def interleaved(find_unused: bool) -> list[Tensor]:
    """Ranks whose backward passes come to the heads, and so to DDP's buckets, in different orders."""
    alone = not dist.is_initialized()
    net = Deep()
    model = net if alone else DistributedDataParallel(net, bucket_cap_mb=1e-4, find_unused_parameters=find_unused)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(5)
    for _ in range(10):
        x = torch.randn(4, 6, generator=generator)
        rank = 0 if alone else dist.get_rank()
        mine = x if alone else x[2 * rank : 2 * rank + 2]
        optimizer.zero_grad()
        model(mine, [0, 1, 2, 3] if rank == 0 else [3, 2, 1, 0]).backward()
        optimizer.step()
    return list(net.state_dict().values())


@pytest.mark.parametrize("find_unused", [False, True])
def test_layers_between_buckets(two_ranks: Pool, find_unused: bool) -> None:
    expected = torch.cat([value.flatten() for value in interleaved(False)])
    for found in two_ranks(interleaved, find_unused):
        assert_near(torch.cat([value.flatten() for value in found]), expected)


def without_no_sync(form: str) -> list[Tensor] | str:
    """A mistake: DDP synchronises the first pass, and waits for the rest. Never a wrong gradient, unseen."""
    net = labelled_net()
    model = DistributedDataParallel(net)
    part = cut_batch(labelled_batches(1, 8)[0], [2, 3])[dist.get_rank()]
    shared = list(net.backbone.parameters())
    try:
        z = model(part.x)
        mtlgrad.task_backward(labelled_losses(net, [z, z, z], part), shared, features=z if form == "features" else None)
        found = [p.jac for p in shared]  # type: ignore[attr-defined]
        model(part.x)
    except RuntimeError as error:
        return str(error)
    return found


@pytest.mark.parametrize("form", ["features", "whole"])
def test_without_no_sync(two_ranks: Pool, form: str) -> None:
    batch = joined_batch(cut_batch(labelled_batches(1, 8)[0], [2, 3]))
    net = labelled_net()
    z = net(batch.x)
    mtlgrad.task_backward(labelled_losses(net, [z, z, z], batch), net.backbone.parameters())
    for found in two_ranks(without_no_sync, form):
        if isinstance(found, str):
            assert "reduction in the prior iteration" in found or "marked as ready twice" in found
            continue
        for p, value in zip(net.backbone.parameters(), found, strict=True):
            assert_near(value, p.jac)  # type: ignore[attr-defined]


def step(kind: str) -> dict[str, Tensor]:
    alone = not dist.is_initialized()
    parts = cut_batch(labelled_batches(1, 11)[0], [5, 3])
    batch = joined_batch(parts) if alone else parts[dist.get_rank()]
    net, aligned = labelled_net(), mtlgrad.AlignedMTL(3)
    backbone = net.backbone if alone else DistributedDataParallel(net.backbone)

    def heads(z: Tensor) -> list[Tensor]:
        views = aligned(z)
        return [head(view) for head, view in zip(net.heads, views)]

    compiled = torch.compile(heads, backend="aot_eager", fullgraph=True) if kind == "compile" else heads

    def loss(x: Tensor) -> Tensor:
        outputs = compiled(backbone(x))
        return torch.stack([output.square().sum() for output in outputs]).sum() * (1 if alone else 2)

    x = batch.x.requires_grad_()
    (checkpoint(loss, x, use_reentrant=False) if kind == "checkpoint" else loss(x)).backward()
    assert aligned.weights is not None
    return {
        "gradient": torch.cat([p.grad.flatten() for p in net.backbone.parameters() if p.grad is not None]),
        "weights": aligned.weights,
    }


@pytest.mark.parametrize("kind", ["compile", "checkpoint"])
def test_layer(two_ranks: Pool, kind: str) -> None:
    expected = step("eager")
    for found in two_ranks(step, kind):
        for name, value in expected.items():
            assert_near(found[name], value)
