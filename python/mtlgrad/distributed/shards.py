"""Tensors that FSDP2 (``fully_shard``) shards: what lies here, and who has the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor, as the parameters of a module under ``fully_shard`` are. Costs an import of
    torch.distributed.tensor only where there is one."""
    return type(tensor).__name__ == "DTensor" or hasattr(tensor, "_local_tensor")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor itself."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def like_sharded(values: Tensor, like: Tensor, rows: int | None = None) -> Tensor:
    """A DTensor of this rank's `values`, laid out as `like`; with `rows` as that many of them, [rows, *shape]."""
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(like, DTensor)
    placements, shape, stride = like.placements, like.shape, like.stride()
    if rows is not None:
        placements = tuple(Shard(p.dim + 1) if isinstance(p, Shard) else p for p in placements)
        shape, stride = torch.Size((rows, *shape)), (like.numel(), *stride)
    return DTensor.from_local(values, like.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def shard_groups(tensor: Tensor) -> tuple[Any, ...]:
    """The process groups over which a DTensor's parts add up to the whole; none for other tensors.

    Refuses what is neither sharded nor replicated.
    """
    if not is_sharded(tensor):
        return ()
    from torch.distributed.tensor import DTensor, Replicate, Shard

    assert isinstance(tensor, DTensor)
    mesh = tensor.device_mesh
    for placement in tensor.placements:
        if not isinstance(placement, (Shard, Replicate)):
            raise ValueError(f"expected DTensors that are sharded or replicated, found {placement}")
    return tuple(
        mesh.get_group(d) for d, p in enumerate(tensor.placements) if isinstance(p, Shard) and mesh.size(d) > 1
    )


def by_groups(tensors: Iterable[Tensor]) -> dict[tuple[Any, ...], list[int]]:
    """Which of the tensors add up over which groups: their numbers, by :func:`shard_groups`."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for i, tensor in enumerate(tensors):
        found.setdefault(shard_groups(tensor), []).append(i)
    return found


def sum_over(values: Tensor, groups: Sequence[Any]) -> Tensor:
    """The sum over the ranks of these groups, in place."""
    for group in groups:
        dist.all_reduce(values, group=group)
    return values
