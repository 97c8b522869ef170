"""Parameters that FSDP2 shards: every rank updates its own shards, and what is summed over elements is summed over all
ranks' shards."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.shards import is_sharded, like_sharded, local, shard_groups, sum_over


def check_layout(where: str, p: Tensor, jacobian: Tensor) -> None:
    """ValueError for .jac of which another part lies here than of its parameter."""
    if not is_sharded(p) and not is_sharded(jacobian):
        return
    if is_sharded(p) and is_sharded(jacobian):
        shard_groups(p)  # refuses what is neither sharded nor replicated
        found: Any = jacobian
        if (found.device_mesh, found.placements) == _layout_of_jacobian(p) and local(found).shape[1:] == local(p).shape:
            return
    raise ValueError(
        f"{where}: expected .jac sharded like the parameter, {_words(p)}, with the tasks in front, found "
        f"{_words(jacobian)}; task_backward leaves it so"
    )


def _layout_of_jacobian(p: Any) -> tuple[Any, tuple[Any, ...]]:
    from torch.distributed.tensor import Shard

    return p.device_mesh, tuple(Shard(q.dim + 1) if isinstance(q, Shard) else q for q in p.placements)


def _words(tensor: Any) -> str:
    return f"a DTensor {list(tensor.placements)}" if is_sharded(tensor) else "an ordinary tensor"


def only_row(p: Tensor, jacobian: Tensor) -> Tensor:
    """The gradient in .jac of one task."""
    return like_sharded(local(jacobian)[0], p) if is_sharded(p) else jacobian[0]


def key_of_shard(key: int, tensor: Tensor) -> int:
    """Of random bits: another for every shard of a parameter, the same for a shard's replicas, and the parameter's
    own for the first shard."""
    if not is_sharded(tensor):
        return key
    sharded: Any = tensor
    number = 0
    for d, placement in enumerate(sharded.placements):
        if placement.is_shard():
            number = number * sharded.device_mesh.size(d) + sharded.device_mesh.get_local_rank(d)
    return key + (number << 32)


class Totals:
    """Running sums over a parameter's elements, to which the ranks that hold its shards add a part each.

    The same numbers on all ranks, by one all-reduce for all parameters that lie on the same ranks. Bytes: those of the
    sums.
    """

    def __init__(self) -> None:
        self._parts: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = {}

    def part(self, p: Tensor, total: Tensor) -> Tensor:
        """What a kernel may update in the place of `total`: linear updates of all ranks' parts add up to that of it."""
        groups = shard_groups(p)
        if not groups:
            return total
        part = total / math.prod(map(dist.get_world_size, groups))
        self._parts.setdefault((groups, total.device), []).append((part, total))
        return part

    def add_up(self) -> None:
        for (groups, _), pairs in self._parts.items():
            sums = sum_over(torch.stack([part for part, _ in pairs]), groups)
            for (_, total), row in zip(pairs, sums, strict=True):
                total.copy_(row)
        self._parts.clear()
