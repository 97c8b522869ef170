"""The collectives that this package uses, all on its own groups (:mod:`.groups`)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops import define_operator
from .groups import Ranks, control_device, group_named, group_of

BUCKET_BYTES = 25 << 20  # as DDP's: long enough for the bandwidth, short enough to overlap


def _sum(values: Tensor, group: str) -> None:
    dist.all_reduce(values, group=group_named(group))


# An operator: opaque to torch.compile, so that the layers trace with fullgraph=True.
_sum_op = define_operator("sum_over_ranks_(Tensor(a!) values, str group) -> ()", _sum, lambda values, group: None)


def sum_(values: Tensor, ranks: Ranks) -> Tensor:
    """The sum over the ranks, in place. Bytes: those of `values`."""
    _sum_op(values, ranks.name)
    return values


def gather_rows(rows: Tensor, counts: Sequence[int], ranks: Ranks) -> Tensor:
    """The ranks' rows, [n_r, ...] each, one after the other, [sum n_r, ...].

    Bytes: W max(n_r) rows; shorter ones are padded.
    """
    longest = max(counts)
    mine = rows.new_zeros(longest, *rows.shape[1:])
    mine[: len(rows)] = rows
    every = rows.new_empty(ranks.size, longest, *rows.shape[1:])
    dist.all_gather(list(every), mine, group=group_of(ranks))
    return torch.cat([part[:count] for part, count in zip(every, counts)])


def gather_numbers(numbers: Sequence[int], ranks: Ranks, device: torch.device) -> list[list[int]]:
    """Every rank's numbers, read by the host. Bytes: 8 each and rank."""
    where = control_device(ranks, device)
    mine = torch.tensor(list(numbers), dtype=torch.int64, device=where)
    every = [torch.empty_like(mine) for _ in range(ranks.size)]
    dist.all_gather(every, mine, group=group_of(ranks))
    return [row.tolist() for row in torch.stack(every).cpu()]


def check_same(op: str, what: str, found: str, hint: str, ranks: Ranks, device: torch.device) -> None:
    """Raises on all ranks alike if `found` is not the same on all. Bytes: 8 a rank."""
    digest = int.from_bytes(hashlib.blake2b(found.encode(), digest_size=8).digest(), "little", signed=True)
    digests = [row[0] for row in gather_numbers([digest], ranks, device)]
    if len(set(digests)) == 1:
        return
    every: list[Any] = [None] * ranks.size
    dist.all_gather_object(every, found, group=group_of(ranks))
    other = next(r for r, text in enumerate(every) if text != every[0])
    raise RuntimeError(
        f"{op}: expected the same {what} on all ranks, found {every[0]} on rank 0 and {every[other]} on rank {other}; "
        f"{hint}"
    )


def norm_bounds(tensors: Sequence[Tensor], ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The least and the largest of the ranks' norms, for each of the tensors; as many on all ranks. Bytes: 16 each."""
    device = tensors[0].device
    norms = torch.stack([_norm(tensor.detach()).to(device) for tensor in tensors])
    bounds = torch.cat([-norms, norms])
    dist.all_reduce(bounds, dist.ReduceOp.MAX, group=group_of(ranks))
    return -bounds[: len(tensors)], bounds[len(tensors) :]


def _norm(value: Tensor) -> Tensor:
    if value.is_complex():
        value = torch.view_as_real(value)
    if not value.is_floating_point():
        value = value.double()
    return torch.linalg.vector_norm(value, dtype=torch.float64)


class Averaging:
    """Means over the ranks, in place, in buckets that travel while the caller goes on; complete after :meth:`wait`.

    All ranks must add tensors of the same shapes and dtypes in the same order. Bytes: those of the tensors.
    """

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self._pending: list[tuple[Any, Tensor, list[Tensor]]] = []

    def add(self, tensors: Sequence[Tensor]) -> None:
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
        alone = len(bucket) == 1 and bucket[0].is_contiguous()
        flat = bucket[0] if alone else torch.cat([tensor.reshape(-1) for tensor in bucket])
        flat.div_(self._ranks.size)  # before the sum, as DDP does: half precision must not overflow
        work = dist.all_reduce(flat, group=group_of(self._ranks), async_op=True)
        self._pending.append((work, flat, [] if alone else bucket))

    def wait(self) -> None:
        for work, flat, bucket in self._pending:
            work.wait()
            if bucket:
                parts = flat.split([tensor.numel() for tensor in bucket])
                for tensor, part in zip(bucket, parts, strict=True):
                    tensor.copy_(part.view(tensor.shape))
        self._pending.clear()


def average_present(values: Sequence[Tensor | None], like: Sequence[Tensor], ranks: Ranks) -> list[Tensor | None]:
    """Means over the ranks, in place; where only some ranks have a value, the others' counts as zero.

    Values go with the tensors `like`, the same on all ranks. Bytes: those of the values, and 8 each.
    """
    if not like:
        return []
    # What is sparse here may be dense, or missing, elsewhere.
    values = [value if value is None or value.layout == torch.strided else value.to_dense() for value in values]
    has = torch.tensor([value is not None for value in values], dtype=torch.int64)
    where = control_device(ranks, like[0].device)
    counts = sum_(has.to(where), ranks).tolist()
    found = [
        torch.zeros_like(tensor) if value is None and count else value
        for value, tensor, count in zip(values, like, counts, strict=True)
    ]
    averaging = Averaging(ranks)
    averaging.add([value for value in found if value is not None])
    averaging.wait()
    return found


@torch.no_grad()
def average_gradients(parameters: Sequence[Tensor], ranks: Ranks) -> None:
    """``.grad`` becomes its mean over the ranks: :func:`average_present`."""
    for p, gradient in zip(parameters, average_present([p.grad for p in parameters], parameters, ranks), strict=True):
        p.grad = gradient
