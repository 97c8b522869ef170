"""The gradients of T tasks as the kernels take them: tables of pointers, nothing concatenated or copied.

Users give ``rows``: a tensor [T, ...], or a sequence of T rows, each a tensor or a sequence of tensors, one per
parameter. The operators take a flat list of tensors: one [T, ...] per parameter (``stacked``), or every row's tensors,
row after row.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.combine import Row, Rows
from .checks import check_floating, refuse, shape_of

# A thousand parameters of eight tasks are 8,000 tensors: what is asked of each is asked without Python in between.
_SHAPE, _DTYPE, _DEVICE = attrgetter("shape"), attrgetter("dtype"), attrgetter("device")

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


class Stacked(NamedTuple):
    """Rows given as ``Parameter.jac`` holds them: per parameter one tensor [T, *shape]."""

    tensors: Sequence[Tensor]


class Flat(NamedTuple):
    """Rows as the operators take them."""

    tensors: list[Tensor]
    tasks: int
    stacked: bool
    listed: bool  #: whether a row is a list of tensors, and not one


def flatten(op: str, rows: Rows | Stacked) -> Flat:
    """Checks what the operators cannot see any more: how the rows were put together."""
    if isinstance(rows, Stacked):
        tensors = list(rows.tensors)
        _check(op, len(tensors) > 0, "at least one tensor [T, ...]", "none")
        _check(op, tensors[0].dim() > 0, "tensors [T, ...]", f"shape {shape_of(tensors[0])}")
        return Flat(tensors, tensors[0].shape[0], stacked=True, listed=True)
    if isinstance(rows, Tensor):
        _check(op, rows.dim() >= 1, "a tensor [T, ...] or a sequence of rows", f"shape {shape_of(rows)}")
        _check(op, rows.shape[0] > 0, "at least one row", f"shape {shape_of(rows)}")
        return Flat([rows], rows.shape[0], stacked=True, listed=False)
    listed = list(rows)
    _check(op, len(listed) > 0, "at least one row", "none")
    single = isinstance(listed[0], Tensor)
    _check(op, all(isinstance(r, Tensor) == single for r in listed), "all rows tensors, or all lists", "both")
    parts = [[row] if isinstance(row, Tensor) else list(row) for row in listed]
    _check(op, len(parts[0]) > 0, "at least one tensor a row", "none")
    for t, row in enumerate(parts):
        _check(op, len(row) == len(parts[0]), f"{len(parts[0])} tensors in row {t}, as in row 0", f"{len(row)}")
        if all([isinstance(part, Tensor) for part in row]):  # noqa: C419 (a list is faster)
            continue
        for p, part in enumerate(row):
            if not isinstance(part, Tensor):
                expected = f"a tensor as rows[{t}]{'' if single else f'[{p}]'} (zeros where a task does not reach)"
                _check(op, False, expected, type(part).__name__)
    return Flat([part for row in parts for part in row], len(parts), stacked=False, listed=not single)


def unflatten(tensors: list[Tensor], tasks: int, stacked: bool) -> Rows:
    """The rows again, as the reference takes them."""
    if stacked:
        return [[tensor[t] for tensor in tensors] for t in range(tasks)]
    count = len(tensors) // tasks
    return [tensors[t * count : (t + 1) * count] for t in range(tasks)]


def row_of(tensors: list[Tensor], tasks: int, stacked: bool, task: int) -> list[Tensor]:
    """One of the rows."""
    count = len(tensors) // tasks
    return [tensor[task] for tensor in tensors] if stacked else tensors[task * count : (task + 1) * count]


def of_parameters(tensors: list[Tensor], tasks: int, stacked: bool, places: Sequence[int]) -> list[Tensor]:
    """The rows of these parameters alone."""
    if stacked:
        return [tensors[p] for p in places]
    count = len(tensors) // tasks
    return [tensors[t * count + p] for t in range(tasks) for p in places]


def row_like(tensors: list[Tensor], tasks: int, stacked: bool) -> list[Tensor]:
    """Tensors with the shapes of one row, for their shapes alone."""
    return [tensor[0] for tensor in tensors] if stacked else tensors[: len(tensors) // tasks]


def _check(op: str, fits: bool, expected: str, found: str) -> None:
    if not fits:
        raise ValueError(f"{op}: rows: expected {expected}, found {found}")


def check_rows(op: str, tensors: list[Tensor], tasks: int, stacked: bool) -> None:
    """Shapes, dtypes and devices: every row like the first."""
    count = len(tensors) if stacked else len(tensors) // tasks
    shapes, dtypes = list(map(_SHAPE, tensors)), list(map(_DTYPE, tensors))
    # What is true of nearly all calls is found out at once; only the rest is worth a loop that can name the tensor.
    fits = len(set(map(_DEVICE, tensors))) == 1 and DTYPE_CODES.keys() >= set(dtypes)
    if stacked:
        fits = fits and all(len(shape) > 0 and shape[0] == tasks for shape in shapes)
    else:
        fits = fits and shapes == shapes[:count] * tasks and dtypes == dtypes[:count] * tasks
    if not fits:
        _explain(op, tensors, tasks, stacked, count)


def _explain(op: str, tensors: list[Tensor], tasks: int, stacked: bool, count: int) -> None:
    for i, tensor in enumerate(tensors):
        check_floating(op, rows=tensor)
        if tensor.device != tensors[0].device:
            refuse(f"{op}: rows: expected all on {tensors[0].device}, found {tensor.device}")
        if stacked:
            if tensor.dim() == 0 or tensor.shape[0] != tasks:
                found = f"found shape {shape_of(tensor)} in tensor {i}"
                refuse(f"{op}: rows: expected {tasks} rows in every tensor, {found}")
            continue
        like = tensors[i % count]
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            row, part = divmod(i, count)
            message = (
                f"{op}: rows: expected {shape_of(like)} {like.dtype} in row {row}, tensor {part}, as in row 0, "
                f"found {shape_of(tensor)} {tensor.dtype}"
            )
            refuse(message)


def dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def in_order_of(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` with the element order of `like`, which is dense; a copy only where it has another."""
    if tensor.stride() == like.stride() or (tensor.is_contiguous() and like.is_contiguous()):
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def empty_like_row(part: Tensor, device: torch.device | None = None) -> Tensor:
    """Memory for a result, in the element order that `groups` takes for rows like `part`."""
    order = torch.preserve_format if dense(part) else torch.contiguous_format
    return torch.empty_like(part, device=device, memory_format=order)


class Group(NamedTuple):
    """The parameters of one dtype, as a kernel takes them."""

    code: int
    other_code: int  #: of the dtype of what goes with the rows
    pointers: list[int]  #: of parameter p's row t at p * tasks + t
    sizes: list[int]
    orders: list[Tensor]  #: per parameter a tensor of a row's shape and element order
    places: list[int]  #: which parameters these are
    kept: list[Tensor]  #: what the pointers need alive


def groups(tensors: list[Tensor], tasks: int, stacked: bool, others: Sequence[Tensor] = ()) -> list[Group]:
    """Pointer tables per dtype, and per dtype of `others`, which go with the rows: one tensor per parameter, if any.
    Rows that are not dense, or not all in one element order, are copied."""
    count = len(tensors) if stacked else len(tensors) // tasks
    places: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for p, other in enumerate(others or tensors[:count]):
        places.setdefault((tensors[p].dtype, other.dtype), []).append(p)
    make = _stacked_group if stacked else _listed_group
    return [make(tensors, tasks, count, chosen, DTYPE_CODES[other]) for (_, other), chosen in places.items()]


def _stacked_group(tensors: list[Tensor], tasks: int, count: int, places: list[int], other_code: int) -> Group:
    kept = [tensors[p] for p in places]
    orders = [tensor[0] for tensor in kept]
    for i, order in enumerate(orders):
        if not dense(order):
            kept[i] = kept[i].contiguous()
            orders[i] = kept[i][0]
    pointers: list[int] = []
    for tensor in kept:
        start, step = tensor.data_ptr(), tensor.stride(0) * tensor.element_size()
        pointers += [start + t * step for t in range(tasks)]
    code, sizes = DTYPE_CODES[kept[0].dtype], [order.numel() for order in orders]
    return Group(code, other_code, pointers, sizes, orders, places, kept)


def _listed_group(tensors: list[Tensor], tasks: int, count: int, places: list[int], other_code: int) -> Group:
    orders = [tensors[p] for p in places]
    kept = [tensors[t * count + p] for p in places for t in range(tasks)]
    if not all(map(Tensor.is_contiguous, kept)):
        orders = [order if dense(order) else order.contiguous() for order in orders]
        kept = [in_order_of(tensor, orders[i // tasks]) for i, tensor in enumerate(kept)]
    pointers = list(map(Tensor.data_ptr, kept))
    code, sizes = DTYPE_CODES[orders[0].dtype], [order.numel() for order in orders]
    return Group(code, other_code, pointers, sizes, orders, places, kept)


def columns(group: Group) -> int:
    return sum(group.sizes)


def in_order(tensors: Sequence[Tensor], group: Group) -> list[Tensor]:
    """One row-like list of tensors (a vector, an output) in the element orders of the group's rows."""
    return [in_order_of(tensors[p], order) for p, order in zip(group.places, group.orders, strict=True)]


__all__ = ["Row", "Rows", "Stacked"]
