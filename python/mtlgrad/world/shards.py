"""Tensors that FSDP2 (``fully_shard``) shards: what lies here, who has the rest, and where none can be had.

Every rank updates its own shards; what is summed over elements is summed over all ranks' shards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .ranks import World


def is_sharded(tensor: object) -> bool:
    """Return whether it is a DTensor, as the parameters of a module under ``fully_shard`` are. Costs an import of
    torch.distributed.tensor only where there is one."""
    return type(tensor).__name__ == "DTensor" or hasattr(tensor, "_local_tensor")


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, sharing its memory; any other tensor itself."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def full(tensor: Tensor) -> Tensor:
    """Return all values of a tensor; of a DTensor they are gathered from the ranks, all of which must ask."""
    return (tensor.full_tensor() if is_sharded(tensor) else tensor).detach()  # type: ignore[attr-defined]


def like_sharded(values: Tensor, like: Tensor, rows: int | None = None) -> Tensor:
    """Make a DTensor of this rank's `values`, laid out as `like`; with `rows` as that many of them, [rows, *shape]."""
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    placements, shape, stride = like.placements, like.shape, like.stride()
    if rows is not None:
        placements = _placements_of_rows(like)
        shape, stride = torch.Size((rows, *shape)), (like.numel(), *stride)
    return DTensor.from_local(values, like.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def shard_groups(tensor: Tensor) -> tuple[Any, ...]:
    """Return the process groups over which a DTensor's parts add up to the full one; none for other tensors.

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
    """Return which tensors add up over which groups: their numbers, by :func:`shard_groups`."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for i, tensor in enumerate(tensors):
        found.setdefault(shard_groups(tensor), []).append(i)
    return found


def sum_over(values: Tensor, groups: Sequence[Any]) -> Tensor:
    """Sum over the ranks of these groups, in place."""
    for group in groups:
        dist.all_reduce(values, group=group)
    return values


def check_layout(where: str, p: Tensor, jacobian: Tensor) -> None:
    """Refuse .jac of which another part lies here than of its parameter."""
    if not is_sharded(p) and not is_sharded(jacobian):
        return
    if is_sharded(p) and is_sharded(jacobian):
        own, found = cast("Any", p), cast("Any", jacobian)
        shard_groups(p)  # refuses what is neither sharded nor replicated
        placed = found.device_mesh == own.device_mesh and found.placements == _placements_of_rows(p)
        if placed and local(found).shape[1:] == local(p).shape:
            return
    raise ValueError(
        f"{where}: expected .jac sharded like the parameter, {_words(p)}, with the tasks in front, found "
        f"{_words(jacobian)}; task_backward leaves it so"
    )


def _placements_of_rows(p: Any) -> tuple[Any, ...]:
    """Return where [rows, *shape] lie of what lies as `p`."""
    from torch.distributed.tensor import Shard

    return tuple(Shard(q.dim + 1) if isinstance(q, Shard) else q for q in p.placements)


def _words(tensor: Any) -> str:
    return f"a DTensor {list(tensor.placements)}" if is_sharded(tensor) else "an ordinary tensor"


def only_row(p: Tensor, jacobian: Tensor) -> Tensor:
    """Return the gradient in .jac of one task."""
    return like_sharded(local(jacobian)[0], p) if is_sharded(p) else jacobian[0]


def key_of_shard(key: int, tensor: Tensor) -> int:
    """Return a key of random bits: another for every shard of a parameter, the same for a shard's replicas, and the
    parameter's own for the first shard."""
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
        """Return what a kernel may update in the place of `total`: linear updates of all parts add up to that of it."""
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


# ---- what task_backward cannot have of shards ------------------------------------------------------------------------


def check_kept(op: str, lost: Iterable[Tensor]) -> None:
    """Refuse parameters that were listed inside a forward: from the moment a module is computed FSDP2 has others in the
    place of its shards, takes their gradients away and frees them. They would seem to be zero."""
    if found := sum(bool(p.numel()) and not is_sharded(p) and not p.untyped_storage().size() for p in lost):
        raise ValueError(
            f"{op}: shared: expected parameters that keep their gradients, found {found} that fully_shard put in "
            "the place of its shards for a while; make the list before the model is called: "
            "shared = list(backbone.parameters())"
        )


def check_synchronised(op: str, silent: bool, leaves: Iterable[Tensor]) -> None:
    """Refuse passes without synchronisation: FSDP2 leaves gradients with what it put in the place of the shards, whose
    memory is mostly freed by now; the shards' own would seem to be zero."""
    if silent or any(t.grad is not None and t.numel() and not t.untyped_storage().size() for t in leaves):
        raise RuntimeError(
            f"{op}: shared: expected shards whose gradients are synchronised in every pass, found some without; leave "
            "set_requires_gradient_sync(False) and accelerator.no_sync out: micro-batches add up in .jac as they are"
        )


def check_no_shards(op: str, nodes: Iterable[Any], world: World) -> None:
    """Refuse nodes of a graph, behind the heads' losses, that are those of a module under ``fully_shard``."""
    if world.size > 1 and any(node.name().startswith("RegisterPostBackwardFunction") for node in nodes):
        raise ValueError(
            f"{op}: features: expected none, since a head is sharded (fully_shard), found some; FSDP2 averages "
            "gradients in whole backward passes alone; leave features out"
        )
