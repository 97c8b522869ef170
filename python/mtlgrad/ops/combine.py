"""Gram matrix, weighted sum and dot products of the gradients of T tasks, each read once from where it lies.

``rows`` are the gradients: a tensor [T, ...], or a sequence of T rows, each a tensor or a sequence of tensors, one per
parameter (:class:`Stacked` takes them as ``Parameter.jac`` holds them). float32, float64, float16 and bfloat16, also
mixed from parameter to parameter, and complex64 and complex128, which count as pairs of reals, as in torch.optim; any
sizes. Rows are copied only where their elements are not dense, or not in the
same order (channels_last is one) in all rows.

Sums that decide anything, :func:`gram` and :func:`dots`, are float64: products of float32 are exact there, and no
scale overflows or underflows. Their order depends on the sizes alone (on CUDA also on the rows'
alignment): the bits do not depend on threads or scheduling.

Errors: ``ValueError`` for rows that do not fit together, ``RuntimeError`` for shapes, dtypes and devices. NaN and
infinity are passed on; ``check_finite=True`` reads the result on the host and names the task.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import overload

import torch
from torch import Tensor

from .. import reference
from ._native import launch_place
from ._operation import Operation
from .checks import check_gram, check_shape, refuse
from .rows import AnyRows, Group, Row, Rows, Stacked, as_real, pointers

__all__ = ["Stacked", "combine", "dots", "gram"]


# ---- gram ------------------------------------------------------------------------------------------------------------


def gram(rows: AnyRows | Stacked, *, check_finite: bool = False) -> Tensor:
    """Return M_ij = <row i, row j>.

    Args:
        rows: T rows: a tensor [T, ...], T tensors, T sequences of tensors, or :class:`Stacked`.
        check_finite: reads the diagonal on the host and raises ``ValueError`` with the task's number if its gradient
            has NaN or infinity, or is too small for float32 to hold its digits.

    Returns:
        [T, T] float64, symmetric. A row with NaN or infinity makes its row and column NaN or infinite.

    Raises:
        RuntimeError: shapes, dtypes, devices.
        ValueError: rows that do not fit together.

    Source: G'G of arXiv 2305.19000, section 3; differentiable (DESIGN 4.4).
    """
    own, _ = Rows.of("gram", rows)
    result: Tensor = _gram(own)
    if check_finite:
        check_gram("gram", result.detach(), own.row)
    return result


def add_gram(kernels: ModuleType, groups: Sequence[Group], total: Tensor, where: tuple[int, int, int]) -> None:
    """Add the rows' products to ``total``, [T, T] float64."""
    workspace = total.new_empty(max([kernels.gram_workspace(total.shape[0], group.columns) for group in groups]))
    for group in groups:
        kernels.gram(group.code, group.table, total.data_ptr(), workspace.data_ptr(), where)


_gram = Operation(
    "gram(Rows rows) -> Tensor",
    structs=[Rows],
    check=lambda rows: rows.check("gram"),
    outputs=lambda rows: [rows.tensors[0].new_empty(rows.tasks, rows.tasks, dtype=torch.float64)],
    kernel=lambda kernels, rows, out: add_gram(kernels, rows.groups(), out[0].zero_(), launch_place(out[0].device)),
    reference=lambda rows: reference.gram(rows.listed()),
    differentiable=True,
)


# ---- dots ------------------------------------------------------------------------------------------------------------


def dots(rows: AnyRows | Stacked, vector: Row) -> Tensor:
    """Return <row t, vector> for every task.

    Args:
        rows: T rows, as in :func:`gram`.
        vector: shaped and typed like a row, or float32 where the rows are bfloat16: a tensor, or a sequence of tensors.

    Returns:
        [T] float64.

    Raises:
        RuntimeError, ValueError: as :func:`gram`.

    Source: the derivative of :func:`combine` in its weights; DESIGN 4.5.
    """
    own, _ = Rows.of("dots", rows)
    result: Tensor = dots_of(own, as_real([vector] if isinstance(vector, Tensor) else vector))
    return result


def _check_dots(rows: Rows, vector: list[Tensor]) -> None:
    rows.check("dots")
    rows.check_like_row("dots", "vector", vector, wider=True)


def _dots_kernel(kernels: ModuleType, rows: Rows, vector: list[Tensor], out: list[Tensor]) -> None:
    total, where = out[0].zero_(), launch_place(out[0].device)
    for group in rows.groups(vector):
        parts = group.in_order(vector)
        workspace = total.new_empty(kernels.dots_workspace(rows.tasks, group.columns))
        addresses = (pointers(parts), total.data_ptr(), workspace.data_ptr())
        kernels.dots(group.code, group.other_code, group.table, *addresses, where)


dots_of = Operation(
    "dots(Rows rows, Tensor[] vector) -> Tensor",
    structs=[Rows],
    check=_check_dots,
    outputs=lambda rows, vector: [rows.tensors[0].new_empty(rows.tasks, dtype=torch.float64)],
    kernel=_dots_kernel,
    reference=lambda rows, vector: reference.dots(rows.listed(), vector),
    differentiable=True,
)


# ---- combine ---------------------------------------------------------------------------------------------------------


@overload
def combine(rows: Tensor | Sequence[Tensor], weights: Tensor, out: Row | None = None) -> Tensor: ...
@overload
def combine(rows: Stacked | Sequence[Sequence[Tensor]], weights: Tensor, out: Row | None = None) -> list[Tensor]: ...
def combine(rows: AnyRows | Stacked, weights: Tensor, out: Row | None = None) -> Tensor | list[Tensor]:
    """Return sum_t weights_t row_t: one read of every row, one write.

    Args:
        rows: T rows, as in :func:`gram`.
        weights: [T], any floating dtype, on the rows' device. A weight of zero does not hide NaN in its row.
        out: written in place if given: a tensor or tensors like a row, dense, each apart from the rows or exactly the
            tensor of one of them in its place. Not differentiable then.

    Returns:
        ``out``, or new tensors shaped and typed like a row (a list of tensors if rows are). Summed in float32 (float64
        for float64 rows) and rounded once.

    Raises:
        RuntimeError, ValueError: as :func:`gram`.

    Source: G w of arXiv 2305.19000, section 3; DESIGN 4.4.
    """
    own, listed = Rows.of("combine", rows)
    if out is not None:
        parts = [out] if isinstance(out, Tensor) else list(out)
        _combine.into(as_real(parts), own, weights.detach())
        return out if isinstance(out, Tensor) else parts
    results = own.given_back(_combine(own, weights))
    return results if listed else results[0]


def write_combination(
    kernels: ModuleType, groups: Sequence[Group], weights: Tensor, out: Sequence[Tensor], where: tuple[int, int, int]
) -> None:
    """Write the weighted sum of the rows to ``out``; ``weights`` are float64 and contiguous."""
    for group in groups:
        given = group.code, group.table, weights.data_ptr()
        group.write_to(out, lambda targets: kernels.combine(*given, targets, where))  # noqa: B023


def _check_combine(rows: Rows, weights: Tensor) -> None:
    rows.check("combine")
    check_shape("combine", "weights", weights, (rows.tasks,))
    if weights.device != rows.tensors[0].device:
        refuse(f"combine: weights: expected device {rows.tensors[0].device} like rows, found {weights.device}")


_combine = Operation(
    "combine(Rows rows, Tensor weights) -> Tensor[]",
    structs=[Rows],
    check=_check_combine,
    outputs=lambda rows, weights: rows.empty_row(),
    check_out=lambda out, rows, weights: rows.check_like_row("combine", "out", out),
    kernel=lambda kernels, rows, weights, out: write_combination(
        kernels, rows.groups(), weights.to(torch.float64).contiguous(), out, launch_place(weights.device)
    ),
    reference=lambda rows, weights: reference.combine(rows.listed(), weights),
    differentiable=True,
)
