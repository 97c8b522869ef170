"""Which ranks train together, and the process groups that this package communicates on.

Collectives run on a group of this package's own with the same members: those of a backward pass may then fall between
DDP's buckets, which are not in step with them from rank to rank.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Ranks(NamedTuple):
    """Who trains together. Constants alone, so that it may appear where torch.compile traces."""

    name: str  #: of the group of this package's own, for :func:`group_of`
    size: int
    rank: int  #: this process's, in the group


# All weakly: destroy_process_group() then ends the threads of ours, too, and not the interpreter's exit.
_given: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_own: dict[str, tuple[Any, str]] = {}  # by the name of the user's group: a reference to that group, our group's name
_by_name: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def name_of(op: str, process_group: ProcessGroup | None) -> str | None:
    """What modules keep of a ``process_group`` argument: modules are copied and pickled, groups cannot be."""
    if process_group is None:
        return None
    if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        found = type(process_group).__name__
        if isinstance(process_group, int):
            found = "that of ranks outside it (torch.distributed.new_group returns it to them)"
        raise TypeError(f"{op}: process_group: expected a torch.distributed process group, found {found}")
    _given[process_group.group_name] = process_group
    return str(process_group.group_name)


def ranks_of(name: str | None) -> Ranks | None:
    """The ranks of the group with this name (:func:`name_of`), None: of all; None where there is but one rank, or
    torch.distributed was not initialised.

    All members must call it the first time (for it makes the group), as they do when they take the same steps.
    """
    group = group_of_user(name)
    if group is None:
        return None
    known = _own.get(group.group_name)
    if known is None or known[0]() is not group:
        own = _twin(group)
        known = _own[group.group_name] = (weakref.ref(group), str(own.group_name))
        _by_name[known[1]] = own
    own = _by_name[known[1]]
    return Ranks(known[1], own.size(), own.rank())  # ours has its members in order, which the user's need not have


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo, which takes seconds.
ranks_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def group_of_user(name: str | None) -> Any:
    """The user's group itself; None: there is but one rank. A rank may ask alone."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = dist.group.WORLD if name is None else _given.get(name)
    if group is None:
        raise RuntimeError(
            f"process_group: expected a group that still exists, found {name!r}, which was destroyed or belongs to "
            "another process; make the module with one of this process"
        )
    return None if group.size() == 1 else group


def _twin(group: Any) -> Any:
    if group is not dist.group.WORLD and getattr(dist.group.WORLD, "bound_device_id", None) is not None:
        raise RuntimeError(
            "process_group: expected all ranks, or init_process_group without device_id, found a part of them and a "
            "device_id: NCCL would split the communicator of all ranks, and wait for those outside; leave device_id out"
        )
    # Without the barrier of all ranks that new_group otherwise needs: members are the only ones to come here.
    return dist.new_group(
        dist.get_process_group_ranks(group),
        timeout=_timeout(group),
        backend=dist.distributed_c10d.get_backend_config(group),
        use_local_synchronization=True,
        group_desc="mtlgrad",
    )


def _timeout(group: Any) -> Any:
    """new_group would take the default, and a rank that dies be noticed half an hour later."""
    config = dist.distributed_c10d.get_backend_config(group)  # say, "cpu:gloo,cuda:nccl"
    device = torch.device(config.split(":")[0])
    return getattr(group._get_backend(device).options, "_timeout", None)


def group_named(name: str) -> Any:
    return _by_name[name]


def group_of(ranks: Ranks) -> Any:
    return _by_name[ranks.name]


def control_device(ranks: Ranks, like: torch.device) -> torch.device:
    """Where numbers that the host reads at once travel: on the host, where the group can, so that no device waits."""
    config = dist.distributed_c10d.get_backend_config(group_of(ranks))
    return torch.device("cpu") if "cpu:" in config else like
