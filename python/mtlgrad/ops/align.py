"""The T x T part of Aligned-MTL (arXiv 2305.19000): the alignment of the gradients from their Gram matrix.

Errors: ``RuntimeError`` for shapes, dtypes and devices, ``ValueError`` for options.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from .. import reference
from ..reference.align import EPS, AlignResult, Scale
from ._native import KERNELS, launch_place
from ._operation import Operation, hide_from_dynamo, is_eager, mark_written
from .checks import check_floating, check_gram, check_same_device, check_shape, refuse, shape_of
from .combine import add_gram, write_combination
from .rows import COMPLEX, DTYPE_CODES, AnyRows, Row, Rows, Stacked, as_real, pointers

__all__ = ["SCALES", "AlignResult", "Scale", "TaskMerge", "align", "empty_result", "merge"]

SCALES: tuple[Scale, ...] = get_args(Scale)
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
        check_finite: reads the matrix on the host: ``ValueError`` with the task's number if its norm is not finite.
        out: written in place if given, e.g. the result of an earlier call for as many tasks.

    Returns:
        ``out`` or a new :class:`AlignResult`, float64 (the rank int64) on the Gram matrix's device; nothing was read by
        the host. If anything in ``gram`` is not finite, everything is NaN, and the rank -1. A task whose gradient is
        zero gets the weight zero; if all are, the weights are the preference. Not differentiable.

    Raises:
        RuntimeError: shapes, dtypes, devices.
        ValueError: an unknown ``scale``, or ``rtol`` out of [0, 1).

    With ``scale="min"`` the update jumps when the smallest eigenvalue crosses the tolerance (by up to 1 / sqrt(rtol)):
    watch the rank.

    Source: arXiv 2305.19000, section 4, algorithm 1; DESIGN 4.4.
    """
    gram, tasks = gram.detach(), gram.shape[0] if gram.dim() else 0
    options = Options.of("align", preference, scale, rtol, tasks, gram)
    if check_finite:
        check_gram("align", gram)
    if out is None:
        return AlignResult(*_align(gram, options))
    _align.into(list(out), gram, options)
    return out


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

    Raises:
        RuntimeError, ValueError: as :func:`gram` and :func:`align`.

    Source: arXiv 2305.19000, algorithm 1; DESIGN 4.4.
    """
    own, listed = Rows.of("merge", rows)
    options = Options.of("merge", preference, scale, rtol, own.tasks, own.tensors[0])
    if out is None and result is None:
        found = _merge(own, options, check_finite)
        merged, result = own.given_back(found[:-FIELDS]), AlignResult(*found[-FIELDS:])
    else:
        if out is not None:
            merged = [out] if isinstance(out, Tensor) else list(out)
        else:  # Dynamo cannot ask how gradients lie that are still to come
            merged = own.given_back(own.empty_row() if own.stacked else list(map(torch.empty_like, own.like())))
        result = AlignResult(*_new_result(own.tasks, own.tensors[0].device)) if result is None else result
        _merge.into([*as_real(merged), *result], own, options, check_finite)
    return (merged if listed else merged[0]), result


class TaskMerge:
    """Merge T gradients of one tensor again and again, as :func:`merge`.

    What follows from their shapes is looked at once, and again when they have others.

    Args:
        result: written in every call.
        preference: p, [T] float64; None: ones.
    """

    def __init__(self, result: AlignResult, preference: Tensor | None):
        self.result, self.preference = result, preference
        self._known: Any = None  #: what all that follows was made for
        self._code, self._sizes, self._workspace, self._options = 0, array("q"), 0, (0, 0.0)

    def __call__(self, rows: list[Tensor], scale: Scale, rtol: float | None) -> Tensor:
        known = None
        if is_eager(rows) and all(map(Tensor.is_contiguous, rows)):
            known = scale, rtol, [(row.shape, row.dtype, row.device) for row in rows]
            if known == self._known:
                return self._run(rows)
        merged, _ = merge(rows, self.preference, scale, rtol, result=self.result)
        if known is not None:
            self._known = known if self._learn(rows, scale, rtol) else None
        return merged  # type: ignore[return-value]

    def _learn(self, rows: list[Tensor], scale: Scale, rtol: float | None) -> bool:
        """Return whether a kernel can work on such rows, which :func:`merge` took."""
        first, tasks = rows[0], len(rows)
        kernels, by = KERNELS.get(first.device.type), Options.of("merge", self.preference, scale, rtol, tasks, first)
        if kernels is None or tasks > MAX_TASKS or first.dtype in COMPLEX:
            return False
        self._code, self._sizes = DTYPE_CODES[first.dtype], array("q", [first.numel()])
        self._workspace, self._options = kernels.merge_workspace(tasks, first.numel()), by.given()[1][1:]
        return True

    @hide_from_dynamo
    def _run(self, rows: list[Tensor]) -> Tensor:
        first, preference = rows[0], self.preference
        merged, kernels = torch.empty_like(first), KERNELS[first.device.type]
        workspace = torch.empty(self._workspace, dtype=torch.float64, device=first.device)
        table, to = (pointers(rows), None, self._sizes, len(rows)), tuple(map(Tensor.data_ptr, self.result))
        by, where = (0 if preference is None else preference.data_ptr(), *self._options), launch_place(first.device)
        kernels.merge(self._code, table, *by, to, pointers([merged]), workspace.data_ptr(), where)  # type: ignore[union-attr]
        mark_written(self.result)
        return merged


class Options(NamedTuple):
    """What both operations take beside the gradients."""

    preference: Tensor | None
    scale: Scale
    rtol: float

    @staticmethod
    def of(op: str, preference: Preference, scale: Scale, rtol: float | None, tasks: int, like: Tensor) -> Options:
        if scale not in SCALES:
            raise ValueError(f"{op}: scale: expected one of {', '.join(SCALES)}, found {scale!r}")
        if rtol is None:
            rtol = tasks * EPS
        elif not 0.0 <= rtol < 1.0:
            raise ValueError(f"{op}: rtol: expected a number from 0 to below 1, found {rtol}")
        if isinstance(preference, Tensor):
            preference = preference.detach()
        elif preference is not None:
            preference = torch.tensor(preference, dtype=torch.float64, device=like.device)
        return Options(preference, scale, rtol)

    def check(self, op: str, tasks: int, like: Tensor) -> None:
        if self.preference is not None:
            check_floating(op, preference=self.preference)
            check_shape(op, "preference", self.preference, (tasks,))
            check_same_device(op, "gram", gram=like, preference=self.preference)

    def given(self) -> tuple[Tensor | None, tuple[int, int, float]]:
        """Return the arguments of a kernel, and what their address needs alive."""
        kept = None if self.preference is None else self.preference.to(torch.float64).contiguous()
        return kept, (0 if kept is None else kept.data_ptr(), SCALES.index(self.scale), self.rtol)


# ---- align -----------------------------------------------------------------------------------------------------------


_DTYPES = [torch.float64, torch.float64, torch.int64, torch.float64, torch.float64]


def _new_result(tasks: int, device: torch.device) -> list[Tensor]:
    weights = torch.empty(tasks, dtype=torch.float64, device=device)
    rank = torch.empty((), dtype=torch.int64, device=device)
    return [weights, weights.new_empty(tasks), rank, weights.new_empty(()), weights.new_empty(tasks, tasks)]


def empty_result(tasks: int, device: torch.device) -> AlignResult:
    """Make a result for ``out=`` of :func:`align` to write to: NaN, and rank -1."""
    filled = (torch.full_like(t, torch.nan if t.is_floating_point() else -1) for t in _new_result(tasks, device))
    return AlignResult(*filled)


def _check(gram: Tensor, options: Options) -> None:
    check_floating("align", gram=gram)
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
        refuse(f"align: gram: expected shape [T, T] with T > 0, found {shape_of(gram)}")
    options.check("align", len(gram), gram)


def _check_result(op: str, out: Sequence[Tensor], tasks: int, device: torch.device) -> None:
    shapes = [(tasks,), (tasks,), (), (), (tasks, tasks)]
    fits = (
        [t.shape for t in out] == shapes and [t.dtype for t in out] == _DTYPES and all(map(Tensor.is_contiguous, out))
    )
    if fits and {t.device for t in out} == {device}:
        return
    for name, dims, tensor in zip(AlignResult._fields, (1, 1, 0, 0, 2), out, strict=True):
        shape, dtype = (tasks,) * dims, torch.int64 if name == "rank" else torch.float64
        if tensor.shape != shape:
            check_shape(op, f"out.{name}", tensor, shape)
        if tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
            found = f"found {tensor.dtype} on {tensor.device}"
            refuse(f"{op}: out.{name}: expected contiguous {dtype} on {device}, {found}")


def _write_alignment(
    kernels: ModuleType, gram: Tensor, options: Options, out: Sequence[Tensor], where: tuple[int, int, int]
) -> None:
    """``gram`` is float64 and contiguous."""
    tasks = gram.shape[0]
    if tasks > MAX_TASKS:
        for target, value in zip(out, reference.align(gram, *options), strict=True):
            target.copy_(value)
        return
    _kept, given = options.given()
    workspace = gram.new_empty(kernels.align_workspace(tasks))
    fields = tuple(map(Tensor.data_ptr, out))
    kernels.align(gram.data_ptr(), *given, tasks, fields, workspace.data_ptr(), where)


_align = Operation(
    "align(Tensor gram, Options options) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    structs=[Options],
    check=_check,
    outputs=lambda gram, options: _new_result(len(gram), gram.device),
    check_out=lambda out, gram, options: _check_result("align", out, len(gram), gram.device),
    kernel=lambda kernels, gram, options, out: _write_alignment(
        kernels, gram.to(torch.float64).contiguous(), options, out, launch_place(gram.device)
    ),
    reference=lambda gram, options: reference.align(gram, *options),
)


# ---- merge: gram, align and combine on one table of pointers ---------------------------------------------------------


def _check_merge(rows: Rows, options: Options, check_finite: bool) -> None:
    rows.check("merge")
    if options.preference is not None:
        options.check("merge", rows.tasks, rows.tensors[0])


def _check_merged(out: list[Tensor], rows: Rows, *_: object) -> None:
    rows.check_like_row("merge", "out", out[:-FIELDS])
    _check_result("merge", out[-FIELDS:], rows.tasks, rows.tensors[0].device)


def _merge_kernel(kernels: ModuleType, rows: Rows, options: Options, check_finite: bool, out: list[Tensor]) -> None:
    groups, device, result = rows.groups(), rows.tensors[0].device, out[-FIELDS:]
    where = launch_place(device)
    if len(groups) == 1 and rows.tasks <= MAX_TASKS and not check_finite:  # the usual: one call
        [group] = groups
        _kept, given = options.given()
        size = kernels.merge_workspace(rows.tasks, group.columns)
        workspace, fields = torch.empty(size, dtype=torch.float64, device=device), tuple(map(Tensor.data_ptr, result))
        to = group.code, group.table, *given, fields
        group.write_to(out, lambda targets: kernels.merge(*to, targets, workspace.data_ptr(), where))
        return
    gram = torch.zeros(rows.tasks, rows.tasks, dtype=torch.float64, device=device)
    add_gram(kernels, groups, gram, where)
    if check_finite:
        check_gram("merge", gram, rows.row)
    _write_alignment(kernels, gram, options, result, where)
    write_combination(kernels, groups, result[0], out, where)


def _merge_reference(rows: Rows, options: Options, check_finite: bool) -> list[Tensor]:
    listed = rows.listed()
    gram = reference.gram(listed)
    if check_finite:
        check_gram("merge", gram, rows.row)
    result = reference.align(gram, *options)
    return [*reference.combine(listed, result.weights), *result]


_merge = Operation(
    "merge(Rows rows, Options options, bool check_finite) -> Tensor[]",
    structs=[Rows, Options],
    check=_check_merge,
    outputs=lambda rows, *_: [*rows.empty_row(), *_new_result(rows.tasks, rows.tensors[0].device)],
    check_out=_check_merged,
    kernel=_merge_kernel,
    reference=_merge_reference,
)
