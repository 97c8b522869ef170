"""A small problem of three tasks, whole or cut into the ranks' parts, for tests of data parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import mtlgrad
from mtlgrad.distributed import global_means
from tests.support.ranks import by_rank

WIDTH, CLASSES = 12, 4


def own_draw(gram: Tensor) -> Tensor:
    """A weighting that differs from rank to rank, where it is asked."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return gram.diagonal().rsqrt() * (1 + rank)


RULES: dict[str, Callable[[], mtlgrad.GramRule]] = {
    "min": lambda: mtlgrad.AlignedMTL(3, [1.0, 2.0, 0.5]),
    "rmse": lambda: mtlgrad.AlignedMTL(3, [1.0, 2.0, 0.5], scale="rmse"),
    "upgrad": lambda: mtlgrad.UPGrad(3, [1.0, 2.0, 0.5]),
    "dualproj": lambda: mtlgrad.DualProj(3),
    "mgda": lambda: mtlgrad.MGDA(3),
    "cagrad": lambda: mtlgrad.CAGrad(3),
    "nash": lambda: mtlgrad.NashMTL(3),
    "fairgrad": lambda: mtlgrad.FairGrad(3),
    "imtlg": lambda: mtlgrad.IMTLG(3),
    "pcgrad": lambda: mtlgrad.PCGrad(3, seed=dist.get_rank() if dist.is_initialized() else 0),
    "of one's own": lambda: mtlgrad.GramRule(3, own_draw),
}


def shown(rule: mtlgrad.GramRule) -> dict[str, Tensor]:
    """What a rule tells of its latest use."""
    values = {"weights": rule.weights, "singular values": getattr(rule, "singular_values", None)}
    return {name: value for name, value in values.items() if value is not None}


class Batch(NamedTuple):
    x: Tensor  # [B, 6]
    level: Tensor  # [B], NaN: no label
    kind: Tensor  # [B], -100: no label
    flags: Tensor  # [B, 2], NaN: no label


class Net(nn.Module):
    """A backbone with LayerNorm and three heads."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, WIDTH), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(WIDTH, 1), nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, 2)])
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)


def batches(count: int, rows: int, seed: int = 1) -> list[Batch]:
    """Some labels are missing at random; the last batch is shorter."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        n = rows if i < count - 1 else max(rows - 3, 1)
        x = torch.randn(n, 6, generator=generator)
        level = torch.where(torch.rand(n, generator=generator) < 0.2, torch.nan, x[:, 0] + 0.3 * x[:, 1] ** 2)
        kind = torch.where(torch.rand(n, generator=generator) < 0.2, -100, (x[:, 1] > 0).long() + 2 * (x[:, 2] > 0))
        flags = torch.stack([(x[:, 3] > 0), (x[:, 4] + x[:, 5] > 0)], 1).float()
        flags[torch.rand(n, 2, generator=generator) < 0.2] = torch.nan
        found.append(Batch(x, level, kind, flags))
    return found


def cut(batch: Batch, counts: list[int], absent: dict[int, int] | None = None) -> list[Batch]:
    """The ranks' parts of a batch; `absent` says which task (0, 1, 2) has no label at all on which rank."""
    parts = [Batch(*row) for row in zip(*(by_rank(column, counts) for column in batch))]
    for rank, task in (absent or {}).items():
        value = -100 if task == 1 else torch.nan
        columns = list(parts[rank])
        columns[task + 1] = torch.full_like(columns[task + 1], value)
        parts[rank] = Batch(*columns)
    return parts


def whole(parts: list[Batch]) -> Batch:
    return Batch(*(torch.cat(column) for column in zip(*parts)))


def losses(net: Net, views: list[Tensor], batch: Batch) -> list[Tensor]:
    """Means over the labelled examples of all ranks; a task without any here is an empty tensor of its head."""
    level = net.heads[0](views[0])[:, 0]
    kind = net.heads[1](views[1])
    flags = net.heads[2](views[2])
    has_level, has_kind, has_flags = ~batch.level.isnan(), batch.kind != -100, ~batch.flags.isnan()
    return global_means(
        [
            (level[has_level] - batch.level[has_level].to(level)) ** 2,
            functional.cross_entropy(kind[has_kind], batch.kind[has_kind], reduction="none"),
            functional.binary_cross_entropy_with_logits(
                flags[has_flags], batch.flags[has_flags].to(flags), reduction="none"
            ),
        ]
    )


def assert_near(found: Tensor, expected: Tensor, bound: float = 1e-6) -> None:
    """Relative in the maximum norm."""
    assert found.shape == expected.shape
    assert not bool(expected.isnan().any())
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
    assert error <= bound, f"relative error {float(error):.2e}"
