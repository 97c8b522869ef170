"""``.jac`` under data parallelism: whether it is the mean over the ranks yet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .collectives import Averaging
from .groups import Ranks, name_of, ranks_of
from .shards import is_sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@torch.no_grad()
def average_jacobians(parameters: Iterable[Tensor], *, process_group: ProcessGroup | None = None) -> None:
    """``.jac`` becomes its mean over the ranks, in place: for what others than :func:`mtlgrad.task_backward` (which
    does so itself) left there, such as TorchJD.

    Args:
        parameters: the same on all ranks; those without ``.jac`` are left out.
        process_group: the ranks; all, if not given. Nothing happens on one process.
    """
    ranks = ranks_of(name_of("average_jacobians", process_group))
    if ranks is None:
        return
    found = [getattr(p, "jac", None) for p in parameters]
    jacobians = [jacobian for jacobian in found if jacobian is not None and not is_averaged(jacobian)]
    averaging = Averaging(ranks)
    averaging.add(jacobians)
    averaging.wait()
    mark_averaged(jacobians)


def mark_averaged(jacobians: Iterable[Tensor]) -> None:
    for jacobian in jacobians:
        jacobian._averaged = True  # type: ignore[attr-defined]


def is_averaged(jacobian: Tensor) -> bool:
    """FSDP2 has averaged what it shards."""
    return is_sharded(jacobian) or getattr(jacobian, "_averaged", False)


def check_averaged(op: str, jacobians: Sequence[Tensor], ranks: Ranks | int | None) -> None:
    """Each rank would take a step of its own, and the parameters drift apart, unseen."""
    size = ranks.size if isinstance(ranks, Ranks) else ranks or 1
    if size > 1 and not all(map(is_averaged, jacobians)):
        raise RuntimeError(
            f"{op}: expected .jac that is the mean over the {size} ranks, found this rank's own; call "
            "mtlgrad.distributed.average_jacobians(parameters) first (task_backward does so itself), or give "
            "process_group= the ranks that train together"
        )
