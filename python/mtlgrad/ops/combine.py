"""Gram matrix, weighted sum and dot products of the gradients of T tasks, each read once from where it lies.

``rows`` are the gradients: a tensor [T, ...], or a sequence of T rows, each a tensor or a sequence of tensors, one per
parameter (:class:`Stacked` takes them as ``Parameter.jac`` holds them). float32, float64, float16 and bfloat16, also
mixed from parameter to parameter; any sizes. Rows are copied only where their elements are not dense, or not in the
same order (channels_last is one) in all rows.

Sums that decide anything, :func:`gram` and :func:`dots`, are float64: products of float32 are exact there, and no
scale overflows or underflows. Their order depends on the sizes alone (on CUDA also on the rows'
alignment): the bits do not depend on threads or scheduling.

Errors: ``ValueError`` for rows that do not fit together, ``RuntimeError`` for shapes, dtypes and devices. NaN and
infinity are passed on; ``check_finite=True`` reads the result on the host and names the task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from torch import Tensor

from .. import reference
from ..reference.combine import Row, Rows
from ._autograd import differentiable
from .checks import check_gram
from .combine_operators import combine_into_op, combine_op, dots_op, gram_op
from .rows import Flat, Stacked, flatten, row_of, unflatten

__all__ = ["Stacked", "combine", "dots", "gram"]


def gram(rows: Rows | Stacked, *, check_finite: bool = False) -> Tensor:
    """M_ij = <row i, row j>.

    Args:
        rows: T rows of N elements in all.
        check_finite: reads the diagonal on the host and raises ``ValueError`` with the task's number if its gradient
            has NaN or infinity, or is too small for float32 to hold its digits.

    Returns:
        [T, T] float64, symmetric. A row with NaN or infinity makes its row and column NaN or infinite.

    Source: G'G of arXiv 2305.19000, section 3; differentiable (DESIGN 4.4).
    """
    flat = flatten("gram", rows)
    result: Tensor = differentiable(
        lambda *t: gram_op(list(t), flat.tasks, flat.stacked), lambda *t: reference.gram(_rows(t, flat)), *flat.tensors
    )
    if check_finite:
        check_gram("gram", result.detach(), lambda t: row_of(flat.tensors, flat.tasks, flat.stacked, t))
    return result


def dots(rows: Rows | Stacked, vector: Row) -> Tensor:
    """<row t, vector> for every task.

    Args:
        rows: T rows.
        vector: shaped and typed like a row, or float32 where the rows are bfloat16: a tensor, or a sequence of tensors.

    Returns:
        [T] float64.

    Source: the derivative of :func:`combine` in its weights; DESIGN 4.5.
    """
    flat = flatten("dots", rows)
    parts = [vector] if isinstance(vector, Tensor) else list(vector)
    cut = len(flat.tensors)
    result: Tensor = differentiable(
        lambda *t: dots_op(list(t[:cut]), list(t[cut:]), flat.tasks, flat.stacked),
        lambda *t: reference.dots(_rows(t[:cut], flat), t[cut:]),
        *flat.tensors,
        *parts,
    )
    return result


@overload
def combine(rows: Tensor | Sequence[Tensor], weights: Tensor, out: Row | None = None) -> Tensor: ...
@overload
def combine(rows: Stacked | Sequence[Sequence[Tensor]], weights: Tensor, out: Row | None = None) -> list[Tensor]: ...
def combine(rows: Rows | Stacked, weights: Tensor, out: Row | None = None) -> Tensor | list[Tensor]:
    """sum_t weights_t row_t: one read of every row, one write.

    Args:
        rows: T rows.
        weights: [T], any floating dtype, on the rows' device. A weight of zero does not hide NaN in its row.
        out: written in place if given: a tensor or tensors like a row, dense, each apart from the rows or exactly the
            tensor of one of them in its place. Not differentiable then.

    Returns:
        ``out``, or new tensors shaped and typed like a row (a list of tensors if rows are). Summed in float32 (float64
        for float64 rows) and rounded once.

    Source: G w of arXiv 2305.19000, section 3; DESIGN 4.4.
    """
    flat = flatten("combine", rows)
    if out is not None:
        parts = [out] if isinstance(out, Tensor) else list(out)
        combine_into_op(flat.tensors, weights.detach(), flat.tasks, flat.stacked, parts)
        return out if isinstance(out, Tensor) else parts
    results = differentiable(
        lambda *t: tuple(combine_op(list(t[1:]), t[0], flat.tasks, flat.stacked)),
        lambda *t: tuple(reference.combine(_rows(t[1:], flat), t[0])),
        weights,
        *flat.tensors,
    )
    return list(results) if flat.listed else results[0]


def _rows(tensors: Sequence[Tensor], flat: Flat) -> Rows:
    return unflatten(list(tensors), flat.tasks, flat.stacked)
