"""Who trains together, and what they exchange: collectives on process groups of this package's own.

These have the members of the user's groups. The collectives of a backward pass may then fall between DDP's buckets,
which are not in step with them from rank to rank.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops import define_operator

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BUCKET_BYTES = 25 << 20  # as DDP's: long enough for the bandwidth, short enough to overlap

# All weakly: destroy_process_group() then ends the threads of ours, too, and not the interpreter's exit.
_given: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_own: dict[str, tuple[Any, str]] = {}  # by the name of the user's group: a reference to that group, our group's name
_by_name: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def _sum(values: Tensor, group: str) -> None:
    dist.all_reduce(values, group=_by_name[group])


# An operator: opaque to torch.compile, so that the layers trace with fullgraph=True.
_sum_op = define_operator("sum_over_ranks_(Tensor(a!) values, str group) -> ()", _sum, lambda values, group: None)


class World(NamedTuple):
    """The ranks that train together. Constants alone, so that it may appear where torch.compile traces.

    In a world of one, :data:`ALONE`, every collective returns at once what it was given.
    """

    name: str  #: of the group of this package's own
    size: int
    rank: int  #: this process's, in the group

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> Any:
        return _by_name[self.name]

    def control_device(self, like: torch.device) -> torch.device:
        """Return where numbers that the host reads travel: on the host, where the group can, so no device waits."""
        on_host = self.size == 1 or "cpu:" in dist.distributed_c10d.get_backend_config(self.group)
        return torch.device("cpu") if on_host else like

    def sum_(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place. Bytes: those of `values`."""
        if self.size > 1:
            _sum_op(values, self.name)
        return values

    def mean_(self, values: Tensor) -> Tensor:
        """Average over the ranks, in place. Bytes: those of `values`."""
        return self.sum_(values).div_(self.size) if self.size > 1 else values

    def max_(self, values: Tensor) -> Tensor:
        """Take the largest of all ranks, element by element, in place. Bytes: those of `values`."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the ranks' rows, [n_r, ...] each, one after the other, [sum n_r, ...].

        Bytes: W max(n_r) rows; shorter ones are padded.
        """
        if self.size == 1:
            return rows
        longest = max(counts)
        mine = rows.new_zeros(longest, *rows.shape[1:])
        mine[: len(rows)] = rows
        every = rows.new_empty(self.size, longest, *rows.shape[1:])
        dist.all_gather(list(every), mine, group=self.group)
        return torch.cat([part[:count] for part, count in zip(every, counts)])

    def gather_numbers(self, numbers: Sequence[int], device: torch.device) -> list[list[int]]:
        """Return every rank's numbers, read by the host. Bytes: 8 each and rank."""
        if self.size == 1:
            return [list(numbers)]
        mine = torch.tensor(list(numbers), dtype=torch.int64, device=self.control_device(device))
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine, group=self.group)
        return [row.tolist() for row in torch.stack(every).cpu()]

    def average_(self, tensors: Iterable[Tensor]) -> None:
        """Average over the ranks, in place. Bytes: those of the tensors."""
        averaging = Averaging(self)
        averaging.add(tensors)
        averaging.wait()

    def average_present(self, values: Sequence[Tensor | None], leaves: Sequence[Tensor]) -> list[Tensor | None]:
        """Average the leaves' gradients `values` over the ranks, in place; where some ranks have none, it counts as
        zero. Those of other leaves than parameters (inputs) are each rank's own, and stay.

        Bytes: those of the values, and 8 a parameter.
        """
        found = list(values)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, nn.Parameter)]
        if self.size == 1 or not places:
            return found
        for i in places:
            if (value := found[i]) is not None and value.layout != torch.strided:
                found[i] = value.to_dense()  # what is sparse here may be dense, or missing, elsewhere
        where = self.control_device(leaves[places[0]].device)
        has = torch.tensor([found[i] is not None for i in places], dtype=torch.int64, device=where)
        counts = self.sum_(has).tolist()
        for i, count in zip(places, counts, strict=True):
            if found[i] is None and count:
                found[i] = torch.zeros_like(leaves[i])
        self.average_([value for i in places if (value := found[i]) is not None])
        return found

    @torch.no_grad()
    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Make ``.grad`` its mean over the ranks: :meth:`average_present`."""
        if self.size == 1:
            return
        found = self.average_present([p.grad for p in parameters], parameters)
        for p, gradient in zip(parameters, found, strict=True):
            p.grad = gradient


ALONE = World("", 1, 0)


class Averaging:
    """Means over the ranks, in place, in buckets that travel while the caller goes on; complete after :meth:`wait`.

    All ranks must add tensors of the same shapes and dtypes in the same order. Bytes: those of the tensors.
    """

    def __init__(self, world: World):
        self._world = world
        self._pending: list[tuple[Any, Tensor, list[Tensor]]] = []

    def add(self, tensors: Iterable[Tensor]) -> None:
        if self._world.size == 1:
            return
        bucket: list[Tensor] = []
        size = 0
        for tensor in tensors:
            own = tensor.numel() * tensor.element_size()
            alike = not bucket or (bucket[0].dtype, bucket[0].device) == (tensor.dtype, tensor.device)
            if bucket and (size + own > BUCKET_BYTES or not alike):
                self._send(bucket)
                bucket, size = [], 0
            bucket.append(tensor)
            size += own
        if bucket:
            self._send(bucket)

    def _send(self, bucket: list[Tensor]) -> None:
        single = len(bucket) == 1 and bucket[0].is_contiguous()
        flat = bucket[0] if single else torch.cat([tensor.reshape(-1) for tensor in bucket])
        flat.div_(self._world.size)  # before the sum, as DDP does: half precision must not overflow
        work = dist.all_reduce(flat, group=self._world.group, async_op=True)
        self._pending.append((work, flat, [] if single else bucket))

    def wait(self) -> None:
        for work, flat, bucket in self._pending:
            work.wait()
            if bucket:
                parts = flat.split([tensor.numel() for tensor in bucket])
                for tensor, part in zip(bucket, parts, strict=True):
                    tensor.copy_(part.view(tensor.shape))
        self._pending.clear()


# ---- process groups --------------------------------------------------------------------------------------------------


def name_of(op: str, process_group: ProcessGroup | None) -> str | None:
    """Return what modules keep of a ``process_group`` argument: they are copied and pickled, groups cannot be."""
    if process_group is None:
        return None
    if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        found = type(process_group).__name__
        if isinstance(process_group, int):
            found = "that of ranks outside it (torch.distributed.new_group returns it to them)"
        raise TypeError(f"{op}: process_group: expected a torch.distributed process group, found {found}")
    _given[process_group.group_name] = process_group
    return str(process_group.group_name)


def world_of(name: str | None) -> World:
    """Return the world of the group with this name (:func:`name_of`), None: of all ranks; :data:`ALONE` where there is
    but one rank, or torch.distributed was not initialised.

    All members must call it the first time (for it makes the group), as they do when they take the same steps.
    """
    group = user_group(name)
    if group is None:
        return ALONE
    known = _own.get(group.group_name)
    if known is None or known[0]() is not group:
        own = _twin(group)
        known = _own[group.group_name] = (weakref.ref(group), str(own.group_name))
        _by_name[known[1]] = own
    own = _by_name[known[1]]
    return World(known[1], own.size(), own.rank())  # ours has its members in order, which the user's need not have


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo, which takes seconds.
world_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def user_group(name: str | None) -> Any:
    """Return the user's group itself; None: there is but one rank. A rank may ask alone."""
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
