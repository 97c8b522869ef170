"""``.jac`` under data parallelism: whether ranks may average theirs, and whether it is the mean yet.

The mark is the group whose mean it is, and the tensor's version: what others write into it (TorchJD adds up in place)
is a rank's own again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .alike import check_same, first_unlike
from .ranks import World, user_group
from .shards import is_sharded

ALIKE = 1e-3  #: relative; the same training leaves other last digits on another kind of machine


def mark_averaged(jacobians: Iterable[Tensor], name: str | None) -> None:
    """Mark them as the mean over the group with this name, as :func:`.ranks.name_of` has it."""
    group = user_group(name)
    for jacobian in jacobians:
        if group is not None and not is_sharded(jacobian):
            jacobian._averaged = (group.group_name, jacobian._version)  # type: ignore[attr-defined]


@contextmanager
def still_averaged(jacobians: Sequence[Tensor]) -> Iterator[None]:
    """Keep the marks: what is written inside is the same on all ranks, or a factor that is."""
    marked: list[Any] = [j for j in jacobians if getattr(j, "_averaged", (None, -1))[1] == j._version]
    yield
    for jacobian in marked:
        jacobian._averaged = (jacobian._averaged[0], jacobian._version)


def is_averaged(jacobian: Tensor, name: str | None) -> bool:
    """Return whether it is the mean over the group with this name. FSDP2 has averaged what it shards."""
    group = user_group(name)
    if group is None or is_sharded(jacobian):
        return True
    return bool(getattr(jacobian, "_averaged", None) == (group.group_name, jacobian._version))


def check_averaged(op: str, jacobians: Sequence[Tensor], name: str | None) -> None:
    """Refuse a rank's own: each would take a step of its own, and the parameters drift apart, unseen. Makes no group: a
    rank that comes here alone gets the error, too."""
    group = user_group(name)
    if group is not None and not all(is_averaged(jacobian, name) for jacobian in jacobians):
        raise RuntimeError(
            f"{op}: expected .jac that is the mean over the {group.size()} ranks, found this rank's own; call "
            "mtlgrad.distributed.average_jacobians(parameters) first (task_backward does so itself), or give "
            "process_group= the ranks that train together"
        )


def check_reached(
    op: str, names: Sequence[str], present: Sequence[bool], leaves: Sequence[Tensor], world: World, like: Tensor
) -> None:
    """Refuse ranks whose losses reach other heads, for which they would wait.

    Args:
        names, present: of the tasks, and whether this rank has a loss for them.
        leaves: what the losses reach beside the shared parameters, of which `like` is one.
    """
    if world.size == 1:
        return
    heads = [leaf for leaf in leaves if isinstance(leaf, nn.Parameter)]
    tasks = ", ".join(name for name, has_loss in zip(names, present, strict=True) if has_loss)
    shapes = " ".join("x".join(map(str, p.shape)) or "1" for p in heads)
    hint = (
        "where a task has no labels give a loss of zero that is computed from its head "
        "(mtlgrad.distributed.global_means makes it)"
    )
    found = f"{tasks or 'none'} ({len(heads)} parameters of heads: {shapes})"
    check_same(op, "tasks with a loss", found, hint, world, like.device)
    # Not of what fully_shard has freed for now.
    known = [p for p in heads if not is_sharded(p) and (p.untyped_storage().size() or not p.numel())]
    if first_unlike(known, ALIKE, world):
        raise RuntimeError(
            f"{op}: losses: expected to reach the same heads in the same order on all ranks, found others of the same "
            "shapes, or parameters that have drifted apart; start from the same parameters, and let every rank compute "
            "all heads"
        )
