"""Data cut into the ranks' parts, for the tests of AlphaVIL on several ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mtlgrad.distributed import global_means
from tests.support.alphavil_cases import Batch, Case, hushed, values
from tests.support.ranks import by_rank

#: How many rows of each batch a rank has: none, nearly as many as others, one.
TRAIN = {2: [(16, 0), (9, 7), (15, 1)], 4: [(7, 5, 4, 0), (5, 4, 4, 3), (13, 1, 1, 1)]}
DEV = {2: [(20, 12), (31, 1)], 4: [(8, 8, 8, 8), (20, 10, 1, 1)]}
TASKS = ("size", "kind", "marks")


def place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def unlabelled(batch: Batch, rows: int) -> Batch:
    """The first `rows` are without labels."""
    y = batch.y.clone()
    y[:rows] = -1 if y.dtype == torch.int64 else math.nan
    return batch._replace(y=y)


class Means:
    """A task's loss over the labelled rows of all ranks; a rank without any takes part all the same."""

    def __init__(self, task: str, process_group: Any = None):
        self.task, self.process_group = task, process_group

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        row = batch.y if batch.y.dim() == 1 else batch.y[:, 0]
        has = row >= 0 if row.dtype == torch.int64 else ~row.isnan()
        out, y = model.heads[self.task](model(batch.x)[has]), batch.y[has]
        if self.task == "size":
            each = F.mse_loss(out.squeeze(1), y, reduction="none")
        elif self.task == "kind":
            each = F.cross_entropy(out, y, reduction="none")
        else:
            each = F.binary_cross_entropy_with_logits(out, y, reduction="none")
        return global_means([each], process_group=self.process_group)[0]


def part(batches: Any, cuts: Iterable[tuple[int, ...]], rank: int) -> list[Batch]:
    return [Batch(b.number, by_rank(b.x, cut)[rank], by_rank(b.y, cut)[rank]) for b, cut in zip(batches, cuts)]


def parted(
    rank: int, size: int, seed: int = 0, *, disagree: bool = False, process_group: Any = None, **net: Any
) -> Case:
    """Three tasks; in batch 1, task "kind" has no labels on rank 0, nor the target in development batch 0 (2 ranks: its
    labels are those of rows 20 to 31). `disagree`: ranks but the first would have the target become worse."""
    case = Case(seed=seed, count=3, **net)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        case.model.norm = nn.LayerNorm(8)
        nn.init.normal_(case.model.norm.weight, 1.0, 0.2)
    for name, task in list(case.tasks.items()):
        train: Any = list(task.train)
        if name == "kind":
            train[1] = unlabelled(train[1], 9)
        dev: Any = None if task.dev is None else list(task.dev)
        if dev is not None:
            dev[0] = unlabelled(dev[0], 20)
            if disagree:
                dev[1].y[20:] *= -0.3
        if size > 1:
            train = part(train, TRAIN[size], rank)
            dev = None if dev is None else part(dev, DEV[size], rank)
        case.change(name, train=train, dev=dev, loss=Means(name, process_group))
    return case


def two_rounds(case: Case, **options: Any) -> dict[str, Any]:
    vil, losses, said = case.vil(**options), [], []
    with hushed():
        for _ in range(2):
            losses += [stage.loss for stage in vil.stages()]
            assert vil.last is not None
            losses += [*vil.last.losses, *vil.last.searched, vil.last.before, vil.last.start, vil.last.after]
            said += [vil.last.kept, vil.last.sat_out]
    numbers = {"losses": torch.tensor(losses), "weights": vil.task_weights, "alphas": vil.alphas}
    return {**numbers, "moved": vil.alphas - 1, "said": said, **values(case.model)}
