"""Data-parallel training with torch.distributed: what users need beside the methods' ``process_group=``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from .world.alike import check_same
from .world.jacobians import mark_averaged
from .world.ranks import name_of, world_of
from .world.shards import is_sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["average_jacobians", "global_means"]


@torch.no_grad()
def average_jacobians(parameters: Iterable[Tensor], *, process_group: ProcessGroup | None = None) -> None:
    """Average ``.jac`` over the ranks, in place, before it is clipped, unscaled or merged: that of others, such as
    TorchJD. :func:`mtlgrad.task_backward` averages its own.

    Args:
        parameters: the same on all ranks; those without ``.jac``, or with shards (FSDP2), are left out.
        process_group: the ranks; all, if not given. Nothing happens on one process.

    Raises:
        RuntimeError: ranks have ``.jac`` on other parameters.
        TypeError: ``process_group`` is no process group.
        ValueError: several ranks, and no parameter has ``.jac`` that is no shard.
    """
    name = name_of("average_jacobians", process_group)
    world = world_of(name)
    if world.size == 1:
        return
    found = [(i, getattr(p, "jac", None)) for i, p in enumerate(parameters)]
    places = [(i, jacobian) for i, jacobian in found if jacobian is not None and not is_sharded(jacobian)]
    if not places:
        raise ValueError(
            "average_jacobians: parameters: expected at least one with .jac that is no shard, found none; call "
            "the backward that makes it first"
        )
    shapes = ", ".join(f"{i}: {list(jacobian.shape)}" for i, jacobian in places)
    hint = "give all ranks the same parameters, and a loss to every task"
    check_same("average_jacobians", "parameters with .jac", shapes, hint, world, places[0][1].device)
    jacobians = [jacobian for _, jacobian in places]
    world.average_(jacobians)
    mark_averaged(jacobians, name)


@overload
def global_means(values: Sequence[Tensor], *, process_group: ProcessGroup | None = None) -> list[Tensor]: ...
@overload
def global_means(values: Mapping[Any, Tensor], *, process_group: ProcessGroup | None = None) -> dict[Any, Tensor]: ...
def global_means(
    values: Sequence[Tensor] | Mapping[Any, Tensor], *, process_group: ProcessGroup | None = None
) -> list[Tensor] | dict[Any, Tensor]:
    r"""Return each task's loss on this rank, such that its average over the ranks is the mean over all ranks' examples:

    .. math:: \ell_t = \frac{W}{\sum_r n_{t,r}} \sum_i \text{values}_{t,i}

    Distributed training averages gradients over the ranks. With ordinary batch means that is the gradient of the mean
    over all examples only if every rank has as many of them: not in an uneven last batch, nor where labels are missing.

    Args:
        values: per task the losses of this rank's labelled examples, any shape (``reduction="none"``). A task without
            any here is an empty tensor that was computed from its head, ``head(z)[mask]``: its loss is then zero, but
            the head takes part, as DDP wants.
        process_group: the ranks; all, if not given. On one process: the plain means (zero of nothing).

    Returns:
        One scalar a task, as ``values`` has them. One all-reduce of T float64 counts; nothing is read by the host.

    Raises:
        TypeError: a value is no tensor, or ``process_group`` no process group.
        ValueError: there are no values.
    """
    listed = list(values.values()) if isinstance(values, Mapping) else list(values)
    if not listed:
        raise ValueError("global_means: values: expected at least one tensor, found none")
    for t, value in enumerate(listed):
        if not isinstance(value, Tensor):
            raise TypeError(f"global_means: values: expected tensors, found {type(value).__name__} for task {t}")
    world = world_of(name_of("global_means", process_group))
    sizes = [value.numel() for value in listed]
    if world.size == 1:
        means = [value.sum() / max(size, 1) for value, size in zip(listed, sizes)]
    else:
        counts = world.sum_(torch.tensor(sizes, dtype=torch.float64, device=listed[0].device))
        factors = world.size / counts.clamp(min=1.0)
        means = [value.sum() * factor.to(value.dtype) for value, factor in zip(listed, factors)]
    return dict(zip(values, means)) if isinstance(values, Mapping) else means
