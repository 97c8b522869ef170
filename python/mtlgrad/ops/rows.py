"""The gradients of T tasks over P tensors, as operations and kernels take them: nothing concatenated or copied.

Users give ``rows``: a tensor [T, ...], or a sequence of T rows, each a tensor or a sequence of tensors, one per
parameter; or :class:`Stacked`. Operations take :class:`Rows`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..reference.combine import Row
from ..reference.combine import Rows as AnyRows
from .checks import check_floating, refuse, shape_of

__all__ = ["AnyRows", "Group", "Row", "Rows", "Stacked"]

# A thousand parameters of eight tasks are 8,000 tensors: what is asked of each is asked without Python in between.
_SHAPE, _DTYPE, _DEVICE, _FIRST = attrgetter("shape"), attrgetter("dtype"), attrgetter("device"), itemgetter(0)

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
COMPLEX = frozenset((torch.complex64, torch.complex128))


def some_complex(tensors: Sequence[Tensor]) -> bool:
    if torch.compiler.is_compiling():  # Dynamo knows no attrgetter
        return any([tensor.is_complex() for tensor in tensors])  # noqa: C419
    return not COMPLEX.isdisjoint(map(_DTYPE, tensors))


def as_real(tensors: Iterable[Tensor]) -> list[Tensor]:
    """View complex tensors as pairs of reals, [..., 2], as torch.optim takes them; all others as they are."""
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]


class Stacked(NamedTuple):
    """Rows given as ``Parameter.jac`` holds them: per parameter one tensor [T, *shape]."""

    tensors: Sequence[Tensor]


def pointers(tensors: Iterable[Tensor]) -> array[int]:
    """Return a table of addresses, as a kernel reads it."""
    return array("Q", list(map(Tensor.data_ptr, tensors)))


def dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def same_order(tensor: Tensor, like: Tensor) -> bool:
    return tensor.stride() == like.stride() or (tensor.is_contiguous() and like.is_contiguous())


def in_order_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return `tensor` with the element order of `like`, which is dense; a copy only where it has another."""
    return tensor if same_order(tensor, like) else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def empty_like_row(part: Tensor, device: torch.device | None = None) -> Tensor:
    """Allocate a result, in the element order that `Rows.groups` takes for rows like `part`."""
    order = torch.preserve_format if dense(part) else torch.contiguous_format
    return torch.empty_like(part, device=device, memory_format=order)


class Group(NamedTuple):
    """The parameters of one dtype, as a kernel takes them."""

    code: int
    other_code: int  #: of the dtype of what goes with the rows
    table: tuple[array[int], array[int] | int | None, array[int], int]  #: `Rows` of csrc/bindings.cpp
    places: Sequence[int]  #: which parameters these are
    orders: list[Tensor] | None  #: per parameter a tensor of a row's shape and element order; None: all contiguous
    kept: list[Tensor]  #: what the pointers need alive

    @property
    def columns(self) -> int:
        _, apart, sizes, tasks = self.table
        return sum(sizes) // tasks if isinstance(apart, int) else sum(sizes)

    def in_order(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return a vector's tensors, one per parameter of all groups, in the element orders of this group's rows."""
        if self.orders is None:
            return [tensors[p].contiguous() for p in self.places]
        return [in_order_of(tensors[p], order) for p, order in zip(self.places, self.orders, strict=True)]

    def write_to(self, out: Sequence[Tensor], kernel: Any) -> None:
        """Call ``kernel(pointers)``; an output in another element order than the rows is filled by a copy, after it."""
        targets = [out[p] for p in self.places]
        parts = targets
        if self.orders is None:
            if not all(map(Tensor.is_contiguous, targets)):
                parts = [t if t.is_contiguous() else t.new_empty(t.shape) for t in targets]
        else:
            parts = [
                target if target.stride() == order.stride() else torch.empty_like(order, dtype=target.dtype)
                for target, order in zip(targets, self.orders, strict=True)
            ]
        kernel(pointers(parts))
        for target, part in zip(targets, parts) if parts is not targets else ():
            if target is not part:
                with torch.no_grad():
                    target.copy_(part)


class Rows:
    """T gradients over P tensors: one [T, ...] per parameter (``stacked``), or every row's tensors, row after row."""

    tensors: list[Tensor]
    tasks: int
    stacked: bool

    def __init__(self, tensors: list[Tensor], tasks: int, stacked: bool):
        self.tensors, self.tasks, self.stacked = tensors, tasks, stacked
        self.parameters = len(tensors) if stacked else len(tensors) // tasks  #: P
        self._complex: list[bool] = []  # which parameters were, before :meth:`_real`; empty: none

    def __iter__(self) -> Iterator[Any]:
        return iter((self.tensors, self.tasks, self.stacked))

    # Checks, allocations and tables ask for these, each of all tensors.

    @cached_property
    def shapes(self) -> list[torch.Size]:
        return list(map(_SHAPE, self.tensors))

    @cached_property
    def dtypes(self) -> list[torch.dtype]:
        return list(map(_DTYPE, self.tensors))

    @cached_property
    def contiguous(self) -> bool:
        return all(map(Tensor.is_contiguous, self.tensors))

    @staticmethod
    def of(op: str, rows: AnyRows | Stacked) -> tuple[Rows, bool]:
        """Return the rows, complex ones as pairs of reals, and whether one is a list of tensors; refuse what `check`
        cannot see any more."""
        own, listed = Rows._of(op, rows)
        return own._real() if some_complex(own.tensors) else own, listed

    def _real(self) -> Rows:
        own = Rows(as_real(map(Tensor.resolve_conj, self.tensors)), self.tasks, self.stacked)
        own._complex = [dtype in COMPLEX for dtype in self.dtypes[: self.parameters]]
        return own

    def given_back(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return a result shaped like a row, complex where the rows were."""
        if not self._complex:
            return list(parts)
        return [torch.view_as_complex(part) if was else part for part, was in zip(parts, self._complex, strict=True)]

    @staticmethod
    def _of(op: str, rows: AnyRows | Stacked) -> tuple[Rows, bool]:
        if isinstance(rows, Stacked):
            tensors = list(rows.tensors)
            if not tensors:
                _refuse(op, "at least one tensor [T, ...]", "none")
            if not tensors[0].shape or tensors[0].shape[0] == 0:
                _refuse(op, "tensors [T, ...] with T > 0", f"shape {shape_of(tensors[0])}")
            return Rows(tensors, tensors[0].shape[0], stacked=True), True
        if isinstance(rows, Tensor):
            if rows.dim() == 0:
                _refuse(op, "a tensor [T, ...] or a sequence of rows", f"shape {shape_of(rows)}")
            if rows.shape[0] == 0:
                _refuse(op, "at least one row", f"shape {shape_of(rows)}")
            return Rows([rows], rows.shape[0], stacked=True), False
        listed: list[Any] = list(rows)
        if not listed:
            _refuse(op, "at least one row", "none")
        single = [isinstance(row, Tensor) for row in listed]
        if all(single):
            return Rows(listed, len(listed), stacked=False), False
        if any(single):
            _refuse(op, "all rows tensors, or all lists", "both")
        parts = [list(row) for row in listed]
        if not parts[0]:
            _refuse(op, "at least one tensor a row", "none")
        for t, row in enumerate(parts):
            if len(row) != len(parts[0]):
                _refuse(op, f"{len(parts[0])} tensors in row {t}, as in row 0", f"{len(row)}")
            if all([isinstance(part, Tensor) for part in row]):  # noqa: C419 (a list is faster)
                continue
            for p, part in enumerate(row):
                if not isinstance(part, Tensor):
                    expected = f"a tensor as rows[{t}][{p}] (zeros where a task does not reach)"
                    _refuse(op, expected, type(part).__name__)
        return Rows([part for row in parts for part in row], len(parts), stacked=False), True

    def row(self, task: int) -> list[Tensor]:
        if self.stacked:
            return [tensor[task] for tensor in self.tensors]
        return self.tensors[task * self.parameters : (task + 1) * self.parameters]

    def listed(self) -> list[list[Tensor]]:
        """Return all rows, as the reference takes them."""
        return [self.row(t) for t in range(self.tasks)]

    def like(self) -> list[Tensor]:
        """Return tensors with the shapes and dtypes of one row, for these alone."""
        return self.row(0)

    def empty_row(self) -> list[Tensor]:
        """Allocate a result like a row."""
        if not self.stacked or not self.contiguous:
            return list(map(empty_like_row, self.like()))
        if self.parameters == 1 or type(self.tensors[0]) is not Tensor:  # traced sizes have no hash
            return [tensor.new_empty(shape[1:]) for tensor, shape in zip(self.tensors, self.shapes)]
        # To make one like another takes half the time of a shape's way to torch.
        keys: Any = self.shapes if len(set(self.dtypes)) == 1 else list(zip(self.shapes, self.dtypes))
        alike = {key: tensor.new_empty(tensor.shape[1:]) for key, tensor in dict(zip(keys, self.tensors)).items()}
        return list(map(torch.empty_like, map(alike.__getitem__, keys)))

    def of_parameters(self, places: Sequence[int]) -> Rows:
        """Return the rows of these parameters alone."""
        starts = [0] if self.stacked else [t * self.parameters for t in range(self.tasks)]
        return Rows([self.tensors[start + p] for start in starts for p in places], self.tasks, self.stacked)

    # ---- checks ----

    def check(self, op: str) -> None:
        """Refuse shapes, dtypes and devices of which not every row is like the first."""
        shapes, dtypes = self.shapes, self.dtypes
        # What is true of nearly all calls is found out at once; only the rest is worth a loop that can name the tensor.
        fits = len(set(map(_DEVICE, self.tensors))) == 1 and DTYPE_CODES.keys() >= set(dtypes)
        if self.stacked:
            fits = fits and all(shapes) and list(map(_FIRST, shapes)) == [self.tasks] * len(shapes)
        else:
            count = self.parameters
            fits = fits and shapes == shapes[:count] * self.tasks and dtypes == dtypes[:count] * self.tasks
        if not fits:
            self._explain(op)

    def _explain(self, op: str) -> None:
        for i, tensor in enumerate(self.tensors):
            check_floating(op, rows=tensor)
            if tensor.device != self.tensors[0].device:
                refuse(f"{op}: rows: expected all on {self.tensors[0].device}, found {tensor.device}")
            if self.stacked:
                if tensor.dim() == 0 or tensor.shape[0] != self.tasks:
                    found = f"found shape {shape_of(tensor)} in tensor {i}"
                    refuse(f"{op}: rows: expected {self.tasks} rows in every tensor, {found}")
                continue
            row, part = divmod(i, self.parameters)
            like = self.tensors[part]
            if tensor.shape != like.shape or tensor.dtype != like.dtype:
                message = (
                    f"{op}: rows: expected {shape_of(like)} {like.dtype} in row {row}, tensor {part}, as in row 0, "
                    f"found {shape_of(tensor)} {tensor.dtype}"
                )
                refuse(message)

    def check_like_row(self, op: str, name: str, parts: list[Tensor], *, wider: bool = False) -> None:
        """Refuse `parts` that are not like a row."""
        shapes = self.shapes[: self.parameters]
        shapes = [shape[1:] for shape in shapes] if self.stacked else shapes
        fits = list(map(_SHAPE, parts)) == shapes and list(map(_DTYPE, parts)) == self.dtypes[: self.parameters]
        if not fits or set(map(_DEVICE, parts)) != {self.tensors[0].device}:
            check_like(op, name, parts, self.like(), "a row", wider=wider)

    # ---- for the kernels ----

    def groups(self, others: Sequence[Tensor] = ()) -> list[Group]:
        """Return tables per dtype, and per dtype of `others`, which go with the rows: one tensor per parameter, if any.
        Rows that are not dense, or not all in one element order, are copied."""
        make = self._stacked_group if self.stacked else self._listed_group
        dtypes = self.dtypes[: self.parameters]
        pairs = list(zip(dtypes, map(_DTYPE, others))) if others else dtypes
        if len(set(pairs)) == 1:
            return [make(range(self.parameters), others[0].dtype if others else dtypes[0])]
        places: dict[Any, list[int]] = {}
        for p, pair in enumerate(pairs):
            places.setdefault(pair, []).append(p)
        return [make(chosen, (others or self.tensors)[chosen[0]].dtype) for chosen in places.values()]

    def _stacked_group(self, places: Sequence[int], other: torch.dtype) -> Group:
        kept = [self.tensors[p] for p in places]
        code, apart, orders = DTYPE_CODES[kept[0].dtype], None, None
        if self.contiguous:
            sizes = array("q", list(map(Tensor.numel, kept)))
        else:
            orders = [tensor[0] for tensor in kept]
            for i, order in enumerate(orders):
                if not dense(order):
                    kept[i] = kept[i].contiguous()
                    orders[i] = kept[i][0]
            sizes = array("q", map(Tensor.numel, orders))
            apart = array("q", [tensor.element_size() * tensor.stride(0) for tensor in kept])
        table = (pointers(kept), kept[0].element_size() if apart is None else apart, sizes, self.tasks)
        return Group(code, DTYPE_CODES[other], table, places, orders, kept)

    def _listed_group(self, places: Sequence[int], other: torch.dtype) -> Group:
        first, count = [self.tensors[p] for p in places], self.parameters
        kept, orders = [self.tensors[t * count + p] for p in places for t in range(self.tasks)], None
        if not self.contiguous:
            orders = [order if dense(order) else order.contiguous() for order in first]
            kept = [in_order_of(tensor, orders[i // self.tasks]) for i, tensor in enumerate(kept)]
        table = (pointers(kept), None, array("q", map(Tensor.numel, first)), self.tasks)
        return Group(DTYPE_CODES[first[0].dtype], DTYPE_CODES[other], table, places, orders, kept)


def _refuse(op: str, expected: str, found: str) -> NoReturn:
    raise ValueError(f"{op}: rows: expected {expected}, found {found}")


def check_like(
    op: str,
    name: str,
    parts: list[Tensor],
    like: list[Tensor],
    of: str,
    *,
    wider: bool = False,
    device: torch.device | None = None,
) -> None:
    """Refuse `parts` that are not like the tensors of `of`; `wider`: or float32 where those are bfloat16; `device`:
    there, not where those are."""
    if len(parts) != len(like):
        refuse(f"{op}: {name}: expected {len(like)} tensors, found {len(parts)}")
    for p, (part, one) in enumerate(zip(parts, like, strict=True)):
        dtypes = (one.dtype, torch.float32) if wider and one.dtype == torch.bfloat16 else (one.dtype,)
        where = one.device if device is None else device
        if part.shape != one.shape or part.dtype not in dtypes or part.device != where:
            message = (
                f"{op}: {name}: expected {shape_of(one)} {' or '.join(map(str, dtypes))} on {where}, like tensor {p} "
                f"of {of}, found {shape_of(part)} {part.dtype} on {part.device}"
            )
            refuse(message)
