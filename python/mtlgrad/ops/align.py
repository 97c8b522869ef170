"""The T x T part of Aligned-MTL (arXiv 2305.19000): the alignment of the gradients from their Gram matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.align import EPS, AlignResult, Scale
from ..reference.combine import Row, Rows
from .align_operators import SCALES, align_into_op, align_op, merge_op
from .checks import check_gram
from .rows import Stacked, flatten, row_like

__all__ = ["SCALES", "AlignResult", "Scale", "align", "empty_result", "merge"]


def align(
    gram: Tensor,
    preference: Tensor | Sequence[float] | None = None,
    scale: Scale = "min",
    rtol: float | None = None,
    *,
    check_finite: bool = False,
    out: AlignResult | None = None,
) -> AlignResult:
    r"""Makes the condition number of the gradients' system one, then weighs the tasks by a preference.

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
    preference, rtol = _options("align", preference, scale, rtol, tasks, gram)
    gram = gram.detach()
    if check_finite:
        check_gram("align", gram)
    if out is None:
        return AlignResult(*align_op(gram, preference, scale, rtol))
    align_into_op(gram, preference, scale, rtol, *out)
    return out


def empty_result(tasks: int, device: torch.device) -> AlignResult:
    """Where :func:`align` can write: NaN, and rank -1."""
    return AlignResult(
        weights=torch.full((tasks,), torch.nan, dtype=torch.float64, device=device),
        singular_values=torch.full((tasks,), torch.nan, dtype=torch.float64, device=device),
        rank=torch.full((), -1, device=device),
        condition_number=torch.full((), torch.nan, dtype=torch.float64, device=device),
        transform=torch.full((tasks, tasks), torch.nan, dtype=torch.float64, device=device),
    )


def merge(
    rows: Rows | Stacked,
    preference: Tensor | Sequence[float] | None = None,
    scale: Scale = "min",
    rtol: float | None = None,
    *,
    check_finite: bool = False,
    out: Row | None = None,
    result: AlignResult | None = None,
) -> tuple[Tensor | list[Tensor], AlignResult]:
    """:func:`gram`, :func:`align` and :func:`combine` in one: the aligned gradient of T task gradients.

    Args:
        rows: as in :func:`gram`.
        preference, scale, rtol, check_finite: as in :func:`align`.
        out, result: written in place if given, as ``out`` of :func:`combine` and of :func:`align`.

    Returns:
        The gradient, shaped and typed like a row, and the alignment. Not differentiable.

    Source: arXiv 2305.19000, algorithm 1; DESIGN 4.4.
    """
    flat = flatten("merge", rows)
    first = flat.tensors[0]
    preference, rtol = _options("merge", preference, scale, rtol, flat.tasks, first)
    if result is None:
        result = empty_result(flat.tasks, first.device)
    if out is None:
        merged = [torch.empty_like(part) for part in row_like(flat.tensors, flat.tasks, flat.stacked)]
    else:
        merged = [out] if isinstance(out, Tensor) else list(out)
    with torch.no_grad():
        merge_op(flat.tensors, flat.tasks, flat.stacked, preference, scale, rtol, check_finite, merged, *result)
    return (merged if flat.listed else merged[0]), result


def _options(
    op: str, preference: Tensor | Sequence[float] | None, scale: str, rtol: float | None, tasks: int, like: Tensor
) -> tuple[Tensor, float]:
    if scale not in SCALES:
        raise ValueError(f"{op}: scale: expected one of {', '.join(SCALES)}, found {scale!r}")
    if rtol is None:
        rtol = tasks * EPS
    elif not 0.0 <= rtol < 1.0:
        raise ValueError(f"{op}: rtol: expected a number from 0 to below 1, found {rtol}")
    if preference is None:
        return like.new_ones(tasks, dtype=torch.float64), rtol
    if not isinstance(preference, Tensor):
        return torch.tensor(preference, dtype=torch.float64, device=like.device), rtol
    return preference.detach(), rtol
