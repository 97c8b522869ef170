"""``.jac`` under data parallelism: whether it is the mean over the ranks yet.

The mark is the group whose mean it is, and the tensor's version: what others write into it (TorchJD adds up in place)
is a rank's own again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .collectives import Averaging, check_same
from .groups import group_of_user, name_of, ranks_of
from .shards import is_sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@torch.no_grad()
def average_jacobians(parameters: Iterable[Tensor], *, process_group: ProcessGroup | None = None) -> None:
    """``.jac`` becomes its mean over the ranks, in place: for what others than :func:`mtlgrad.task_backward` (which
    does so itself) left there, such as TorchJD. Before it is clipped, unscaled or merged.

    Args:
        parameters: the same on all ranks; those without ``.jac``, or with shards (FSDP2), are left out.
        process_group: the ranks; all, if not given. Nothing happens on one process.

    Raises:
        RuntimeError: ranks have ``.jac`` on other parameters.
    """
    name = name_of("average_jacobians", process_group)
    ranks = ranks_of(name)
    if ranks is None:
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
    check_same("average_jacobians", "parameters with .jac", shapes, hint, ranks, places[0][1].device)
    jacobians = [jacobian for _, jacobian in places]
    averaging = Averaging(ranks)
    averaging.add(jacobians)
    averaging.wait()
    mark_averaged(jacobians, name)


def mark_averaged(jacobians: Iterable[Tensor], name: str | None) -> None:
    """``name``: of the group, as :func:`.groups.name_of` has it."""
    group = group_of_user(name)
    for jacobian in jacobians:
        if group is not None and not is_sharded(jacobian):
            jacobian._averaged = (group.group_name, jacobian._version)  # type: ignore[attr-defined]


@contextmanager
def still_averaged(jacobians: Sequence[Tensor]) -> Iterator[None]:
    """What is written inside is the same on all ranks, or a factor that is."""
    plain = [jacobian for jacobian in jacobians if not is_sharded(jacobian)]
    marks = [getattr(jacobian, "_averaged", None) for jacobian in plain]
    good = [mark is not None and mark[1] == jacobian._version for mark, jacobian in zip(marks, plain)]
    yield
    for jacobian, mark, valid in zip(plain, marks, good):
        if mark is not None and valid:
            jacobian._averaged = (mark[0], jacobian._version)  # type: ignore[attr-defined]


def is_averaged(jacobian: Tensor, name: str | None) -> bool:
    """Whether it is the mean over the group with this name. FSDP2 has averaged what it shards."""
    group = group_of_user(name)
    if group is None or is_sharded(jacobian):
        return True
    return bool(getattr(jacobian, "_averaged", None) == (group.group_name, jacobian._version))


def check_averaged(op: str, jacobians: Sequence[Tensor], name: str | None) -> None:
    """Each rank would take a step of its own, and the parameters drift apart, unseen. Makes no group: a rank that comes
    here alone is told, too."""
    group = group_of_user(name)
    if group is not None and not all(is_averaged(jacobian, name) for jacobian in jacobians):
        raise RuntimeError(
            f"{op}: expected .jac that is the mean over the {group.size()} ranks, found this rank's own; call "
            "mtlgrad.distributed.average_jacobians(parameters) first (task_backward does so itself), or give "
            "process_group= the ranks that train together"
        )
