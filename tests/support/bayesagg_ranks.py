"""Batches in the parts of several ranks, and training on them as one process and as ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import mtlgrad
from mtlgrad import BayesAgg
from mtlgrad.world.ranks import world_of
from tests.support.bayesagg_cases import LAYERS, mean_loss, published_layer
from tests.support.posterior_cases import Data, make
from tests.support.ranks import Pool, by_rank

WIDTH = 12
KINDS = LAYERS
UNLABELLED = {"regression": math.nan, "binary": math.nan, "multiclass": -100}


def dataset(examples: int, width: int = WIDTH, missing: float = 0.1) -> list[Data]:
    data = [make(kind, examples, width, seed=i, missing=missing) for i, kind in enumerate(KINDS)]
    for other in data[1:]:
        other.features = data[0].features
    return [d.to(torch.float32) for d in data]


class Net(nn.Module):
    """A backbone, a head of each kind, and the layer between."""

    def __init__(self, data: Sequence[Data], noise: float | str = 1.0, bias: bool = False, **options: Any):
        super().__init__()
        torch.manual_seed(0)
        width = data[0].features.shape[1]
        self.backbone = nn.Sequential(nn.Linear(width, 10), nn.Tanh(), nn.Linear(10, width))
        self.heads = nn.ModuleList([nn.Linear(width, len(d.weight)) for d in data])
        powers = {"regression": 0.5, "binary": 1.0, "multiclass": 0.7}
        more: dict[str, dict[str, Any]] = {"regression": {"noise": noise, "bias": bias}}
        listed = [
            KINDS[d.kind](head, gamma=0.3, power=powers[d.kind], **more.get(d.kind, {}))
            for d, head in zip(data, self.heads)
        ]
        self.layer = published_layer(listed, **options)

    def forward(self, inputs: Tensor, targets: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        features = self.backbone(inputs)
        if features.requires_grad:
            features.retain_grad()
        out = self.layer(features, targets)
        return features, [head(out) for head in self.heads]


def values_of(data: Sequence[Data], outputs: Sequence[Tensor]) -> list[Tensor]:
    """The losses of each head's labelled examples."""
    found = []
    for d, z in zip(data, outputs):
        there = d.labelled
        if d.kind == "multiclass":
            found.append(functional.cross_entropy(z[there], d.targets[there], reduction="none"))
        elif d.kind == "binary":
            found.append(functional.binary_cross_entropy_with_logits(z[there], d.targets[there], reduction="none"))
        else:
            found.append((z[there] - d.targets[there]).square())
    return found


Step = tuple[list[int], dict[int, list[str]]]  # rank -> examples; rank -> kinds without any label there


def parts_of(data: Sequence[Data], at: int, counts: Sequence[int], without: dict[int, list[str]]) -> list[list[Data]]:
    """The ranks' parts of the batch that starts at an example."""
    whole = [d.rows(slice(at, at + sum(counts))) for d in data]
    parts = []
    for rank, rows in enumerate(by_rank(range(sum(counts)), counts)):
        part = [d.rows(list(rows)) for d in whole]
        for d in part:
            if d.kind in without.get(rank, []):
                d.targets = torch.full_like(d.targets, UNLABELLED[d.kind])
        parts.append(part)
    return parts


def joined(parts: Sequence[Sequence[Data]]) -> list[Data]:
    return [
        Data(same[0].kind, torch.cat([d.features for d in same]), torch.cat([d.targets for d in same]), same[0].weight)
        for same in zip(*parts)
    ]


def dataset_for(plan: Sequence[Step | None], width: int = WIDTH) -> list[Data]:
    return dataset(sum(sum(step[0]) for step in plan if step), width)


def run(plan: Sequence[Step | None], options: dict[str, Any], width: int, rank: int | None) -> dict[str, list[Any]]:
    """Trains through the plan, None being a refresh, as one rank of DDP or, without one, as one process."""
    data = dataset_for(plan, width)
    net: Any = Net(data, **options)
    layer = net.layer
    if rank is not None:
        net = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    gradients, at = [], 0
    for step in plan:
        if step is None:
            layer.refresh()
            continue
        parts = parts_of(data, at, *step)
        at += sum(step[0])
        batch = joined(parts) if rank is None else parts[rank]
        optimizer.zero_grad()
        features, outputs = net(batch[0].features, [d.targets for d in batch])
        losses = (
            mtlgrad.distributed.global_means(values_of(batch, outputs))
            if rank is not None
            else [v.sum() / max(v.numel(), 1) for v in values_of(batch, outputs)]
        )
        (layer.total(losses) * 0.5).backward()
        optimizer.step()
        gradients.append(features.grad)
    state = layer.posteriors
    return {
        "features": gradients,
        "parameters": [p.detach().clone() for p in net.parameters()],
        "means": [] if state is None else [p.mean for p in state],
        "covariances": [] if state is None else [m for p in state for m in listed_of(p.covariance())],
    }


def listed_of(matrix: Any) -> list[Tensor]:
    return list(matrix) if isinstance(matrix, tuple) else [matrix]


def as_rank(plan: Sequence[Step | None], options: dict[str, Any], width: int) -> dict[str, list[Any]]:
    return run(plan, options, width, dist.get_rank())


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert error <= tolerance, f"error {float(error):.3g}"


def compare(plan: Sequence[Step | None], options: dict[str, Any], width: int, ranks: Pool, tolerance: float) -> None:
    alone = run(plan, options, width, None)
    together = ranks(as_rank, plan, options, width)
    steps = [step for step in plan if step]
    for step, expected, *found in zip(steps, alone["features"], *(one["features"] for one in together)):
        for rank, (part, mine) in enumerate(zip(by_rank(expected, step[0]), found)):
            # Losses that are averaged over the ranks: gradients at a rank's own features are W times as large.
            error = (mine / ranks.size - part).abs().max() / expected.abs().max()
            assert error <= tolerance, f"rank {rank}: error {float(error):.3g}"
    for name in ("parameters", "means", "covariances"):
        for rank in together:
            for found, expected in zip(rank[name], alone[name], strict=True):
                near(found, expected, tolerance)
        for mine, other in zip(together[0][name], together[1][name]):
            assert torch.equal(mine, other)


def layers(data: Sequence[Data], **options: Any) -> tuple[list[nn.Linear], BayesAgg]:
    heads = []
    for d in data:
        head = nn.Linear(d.features.shape[1], len(d.weight), dtype=d.features.dtype)
        with torch.no_grad():
            rows = d.weight.to(d.features)
            head.weight.copy_(rows[:, : d.features.shape[1]])
            head.bias.fill_(0.3)
        heads.append(head)
    return heads, published_layer([KINDS[d.kind](head, gamma=0.3) for d, head in zip(data, heads)], **options)


def see(layer: BayesAgg, batch: Sequence[Data], dtype: torch.dtype | None = None) -> Tensor:
    features = batch[0].features.to(dtype).clone().requires_grad_()
    out = layer(features, [d.targets for d in batch])
    world = world_of(layer._group)
    share = len(features) * world.size / float(world.sum_(torch.tensor([float(len(features))])))
    losses = []
    for d, head in zip(batch, layer.heads):
        linear = head.layers[0]
        assert isinstance(linear, nn.Linear)
        losses.append(share * mean_loss(d, linear(out.to(linear.weight))))
    layer.total(losses).backward()
    assert features.grad is not None
    return features.grad


def see_quietly(layer: BayesAgg, batch: Sequence[Data]) -> None:
    """A pass for the full-data posterior alone, as in the warm-up."""
    known, layer._posteriors = layer._posteriors, None
    layer(batch[0].features.clone().requires_grad_(), [d.targets for d in batch])
    layer._posteriors = known


def rows_agree(counts: list[list[int]], alone: list[Tensor], together: list[list[Tensor]], tolerance: float) -> None:
    for sizes, expected, *found in zip(counts[1:], alone, *together):
        for part, mine in zip(by_rank(expected, sizes), found):
            near(mine / len(sizes), part, tolerance * float(expected.abs().max() / part.abs().max()))
