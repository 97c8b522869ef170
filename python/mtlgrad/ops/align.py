"""The T x T part of Aligned-MTL (arXiv 2305.19000): the alignment of the gradients from their Gram matrix."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor

from .. import reference
from ..reference.align import EPS, AlignResult, Scale
from ._native import launch_place
from ._operation import Operation
from .checks import check_floating, check_gram, check_shape, refuse, shape_of
from .combine import add_gram, write_combination
from .rows import AnyRows, Row, Rows, Stacked

__all__ = ["SCALES", "AlignResult", "Scale", "align", "empty_result", "merge"]

SCALES: tuple[str, ...] = get_args(Scale)
MAX_TASKS = 64  #: of the kernel (csrc/kernels.h); torch.linalg.eigh beyond
FIELDS = len(AlignResult._fields)

Preference = Tensor | Sequence[float] | None


def align(
    gram: Tensor,
    preference: Preference = None,
    scale: Scale = "min",
    rtol: float | None = None,
    *,
    check_finite: bool = False,
    out: AlignResult | None = None,
) -> AlignResult:
    r"""Make the condition number of the gradients' system one, then weigh the tasks by a preference.

    With l_i, v_i the eigenpairs of the Gram matrix and R the number of l_i above rtol times the largest,

    .. math:: B = s \sum_{i \le R} v_i v_i^T / \sqrt{l_i}, \qquad \text{weights} = B\, p .

    Args:
        gram: [T, T], symmetric positive semi-definite (the upper triangle is read), any floating dtype.
        preference: [T], p; ones if not given (the published code; the paper's text has 1/T).
        scale: what the aligned gradients' common length s is: the smallest singular value kept (``"min"``), the median
            one (the lower of two) or their root mean square (``"rmse"``).
        rtol: relative to the largest *eigenvalue*; T x 1.2e-7 if not given, the published rule in float32.
        check_finite: reads the diagonal on the host and raises ``ValueError`` with the task's number if it is NaN or
            infinite.
        out: written in place if given, e.g. the result of an earlier call for as many tasks.

    Returns:
        ``out`` or a new :class:`AlignResult`, float64 (the rank int64) on the Gram matrix's device; nothing was read by
        the host. If anything in ``gram`` is not finite, everything is NaN, and the rank -1. A task whose gradient is
        zero gets the weight zero; if all are, the weights are the preference. Not differentiable.

    With ``scale="min"`` the update jumps when the smallest eigenvalue crosses the tolerance (by up to 1 / sqrt(rtol)):
    watch the rank.

    Errors: ``RuntimeError`` for shapes, dtypes and devices, ``ValueError`` for options.

    Source: arXiv 2305.19000, section 4, algorithm 1; DESIGN 4.4.
    """
    tasks = gram.shape[0] if gram.dim() else 0
    gram, options = gram.detach(), _options("align", preference, scale, rtol, tasks, gram)
    if check_finite:
        check_gram("align", gram)
    if out is None:
        return AlignResult(*_align(gram, *options))
    _align.into(list(out), gram, *options)
    return out


def empty_result(tasks: int, device: torch.device) -> AlignResult:
    """Make a result for ``out=`` of :func:`align` to write to: NaN, and rank -1."""
    filled = (torch.full_like(t, torch.nan if t.is_floating_point() else -1) for t in _new_result(tasks, device))
    return AlignResult(*filled)


def merge(
    rows: AnyRows | Stacked,
    preference: Preference = None,
    scale: Scale = "min",
    rtol: float | None = None,
    *,
    check_finite: bool = False,
    out: Row | None = None,
    result: AlignResult | None = None,
) -> tuple[Tensor | list[Tensor], AlignResult]:
    """Return the aligned gradient of T task gradients: :func:`gram`, :func:`align` and :func:`combine` in one.

    Args:
        rows: as in :func:`gram`.
        preference, scale, rtol, check_finite: as in :func:`align`.
        out, result: written in place if given, as ``out`` of :func:`combine` and of :func:`align`.

    Returns:
        The gradient, shaped and typed like a row, and the alignment. Not differentiable.

    Source: arXiv 2305.19000, algorithm 1; DESIGN 4.4.
    """
    own, listed = Rows.of("merge", rows)
    options = _options("merge", preference, scale, rtol, own.tasks, own.tensors[0])
    with torch.no_grad():
        if out is None and result is None:
            found = _merge(own, *options, check_finite)
            merged, result = found[:-FIELDS], AlignResult(*found[-FIELDS:])
        else:
            merged = own.empty_row() if out is None else [out] if isinstance(out, Tensor) else list(out)
            result = AlignResult(*_new_result(own.tasks, own.tensors[0].device)) if result is None else result
            _merge.into([*merged, *result], own, *options, check_finite)
    return (merged if listed else merged[0]), result


def _options(
    op: str, preference: Preference, scale: str, rtol: float | None, tasks: int, like: Tensor
) -> tuple[Tensor | None, str, float]:
    if scale not in SCALES:
        raise ValueError(f"{op}: scale: expected one of {', '.join(SCALES)}, found {scale!r}")
    if rtol is None:
        rtol = tasks * EPS
    elif not 0.0 <= rtol < 1.0:
        raise ValueError(f"{op}: rtol: expected a number from 0 to below 1, found {rtol}")
    if preference is None:
        return None, scale, rtol
    if not isinstance(preference, Tensor):
        return torch.tensor(preference, dtype=torch.float64, device=like.device), scale, rtol
    return preference.detach(), scale, rtol


# ---- align -----------------------------------------------------------------------------------------------------------


def _new_result(tasks: int, device: torch.device) -> list[Tensor]:
    weights = torch.empty(tasks, dtype=torch.float64, device=device)
    rank = torch.empty((), dtype=torch.int64, device=device)
    return [weights, weights.new_empty(tasks), rank, weights.new_empty(()), weights.new_empty(tasks, tasks)]


def _check(gram: Tensor, preference: Tensor | None, scale: str, rtol: float) -> None:
    check_floating("align", gram=gram)
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
        refuse(f"align: gram: expected shape [T, T] with T > 0, found {shape_of(gram)}")
    if preference is not None:
        _check_preference("align", preference, len(gram), gram.device)


def _check_preference(op: str, preference: Tensor, tasks: int, device: torch.device) -> None:
    check_floating(op, preference=preference)
    check_shape(op, "preference", preference, (tasks,))
    if preference.device != device:
        refuse(f"{op}: preference: expected device {device} like gram, found {preference.device}")


_RESULT_DTYPES = [torch.int64 if name == "rank" else torch.float64 for name in AlignResult._fields]


def _check_result(op: str, out: Sequence[Tensor], tasks: int, device: torch.device) -> None:
    shapes = [(tasks,), (tasks,), (), (), (tasks, tasks)]
    if (
        [tensor.shape for tensor in out] == shapes
        and [tensor.dtype for tensor in out] == _RESULT_DTYPES
        and {tensor.device for tensor in out} == {device}
        and all(map(Tensor.is_contiguous, out))
    ):
        return
    for name, tensor, shape, dtype in zip(AlignResult._fields, out, shapes, _RESULT_DTYPES, strict=True):
        check_shape(op, f"out.{name}", tensor, shape)
        if tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
            found = f"found {tensor.dtype} on {tensor.device}"
            refuse(f"{op}: out.{name}: expected contiguous {dtype} on {device}, {found}")


def _run(
    kernels: ModuleType,
    gram: Tensor,
    preference: Tensor | None,
    scale: str,
    rtol: float,
    out: Sequence[Tensor],
    where: tuple[int, int, int],
) -> Any:
    """``gram`` is float64 and contiguous."""
    tasks = gram.shape[0]
    if tasks > MAX_TASKS:
        return NotImplemented
    if preference is not None:
        preference = preference.to(torch.float64).contiguous()
    workspace = gram.new_empty(kernels.align_workspace(tasks))
    given = gram.data_ptr(), 0 if preference is None else preference.data_ptr(), SCALES.index(scale), rtol, tasks
    kernels.align(*given, tuple(map(Tensor.data_ptr, out)), workspace.data_ptr(), where)
    return None


_align = Operation(
    "align(Tensor gram, Tensor? preference, str scale, float rtol) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=_check,
    outputs=lambda gram, *_: _new_result(len(gram), gram.device),
    check_out=lambda out, gram, *_: _check_result("align", out, len(gram), gram.device),
    kernel=lambda kernels, gram, *options_and_out: _run(
        kernels, gram.to(torch.float64).contiguous(), *options_and_out, launch_place(gram.device)
    ),
    reference=reference.align,
)


# ---- merge: gram, align and combine on one table of pointers ---------------------------------------------------------


def _check_merge(rows: Rows, preference: Tensor | None, scale: str, rtol: float, check_finite: bool) -> None:
    rows.check("merge")
    if preference is not None:
        _check_preference("merge", preference, rows.tasks, rows.tensors[0].device)


def _check_merged(out: list[Tensor], rows: Rows, *_: object) -> None:
    rows.check_like_row("merge", "out", out[:-FIELDS])
    _check_result("merge", out[-FIELDS:], rows.tasks, rows.tensors[0].device)


def _merge_kernel(
    kernels: ModuleType,
    rows: Rows,
    preference: Tensor | None,
    scale: str,
    rtol: float,
    check_finite: bool,
    out: list[Tensor],
) -> Any:
    groups, device, result = rows.groups(), rows.tensors[0].device, out[-FIELDS:]
    gram, where = torch.zeros(rows.tasks, rows.tasks, dtype=torch.float64, device=device), launch_place(device)
    add_gram(kernels, groups, gram, where)
    if check_finite:
        check_gram("merge", gram, rows.row)
    if _run(kernels, gram, preference, scale, rtol, result, where) is NotImplemented:
        for target, value in zip(result, reference.align(gram, preference, scale, rtol), strict=True):  # type: ignore[arg-type]
            target.copy_(value)
    write_combination(kernels, groups, result[0], out, where)
    return None


def _merge_reference(
    rows: Rows, preference: Tensor | None, scale: Scale, rtol: float, check_finite: bool
) -> list[Tensor]:
    listed = rows.listed()
    gram = reference.gram(listed)
    if check_finite:
        check_gram("merge", gram, rows.row)
    result = reference.align(gram, preference, scale, rtol)
    return [*reference.combine(listed, result.weights), *result]


_merge = Operation(
    "merge(Rows rows, Tensor? preference, str scale, float rtol, bool check_finite) -> Tensor[]",
    structs=[Rows],
    check=_check_merge,
    outputs=lambda rows, *_: [*rows.empty_row(), *_new_result(rows.tasks, rows.tensors[0].device)],
    check_out=_check_merged,
    kernel=_merge_kernel,
    reference=_merge_reference,
)
