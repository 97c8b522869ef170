"""The T x T part of Aligned-MTL (Senushkin et al., CVPR 2023, arXiv 2305.19000): alignment weights from the Gram matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from .. import reference
from ..reference.align import EPS, AlignResult, Scale
from ._kernels import kernels_for, place
from ._library import register
from .checks import check_floating, check_shape, shape_of
from .combine import check_gram

__all__ = ["AlignResult", "Scale", "align"]

SCALES: tuple[str, ...] = get_args(Scale)
MAX_TASKS = 64  #: of the kernel (csrc/kernels.h); torch.linalg.eigh beyond


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
        ``out`` or a new :class:`AlignResult`, float64 (the rank int64) on the Gram matrix's device; nothing was read by the host. If
        anything in ``gram`` is not finite, everything is NaN, and the rank -1. A task whose gradient is zero gets the
        weight zero; if all are, the weights are the preference. Not differentiable.

    With ``scale="min"`` the update jumps when the smallest eigenvalue crosses the tolerance (by up to 1 / sqrt(rtol)):
    watch the rank.

    Errors: ``RuntimeError`` for shapes, dtypes and devices, ``ValueError`` for options.

    Source: arXiv 2305.19000, section 4, algorithm 1; DESIGN 4.4.
    """
    if scale not in SCALES:
        raise ValueError(f"align: scale: expected one of {', '.join(SCALES)}, found {scale!r}")
    tasks = gram.shape[0] if gram.dim() else 0
    if rtol is None:
        rtol = tasks * EPS
    elif not 0.0 <= rtol < 1.0:
        raise ValueError(f"align: rtol: expected a number from 0 to below 1, found {rtol}")
    if preference is None:
        preference = gram.new_ones(tasks, dtype=torch.float64)
    elif not isinstance(preference, Tensor):
        preference = torch.tensor(preference, dtype=torch.float64, device=gram.device)
    gram, preference = gram.detach(), preference.detach()
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


def _check(gram: Tensor, preference: Tensor) -> int:
    check_floating("align", gram=gram, preference=preference)
    torch._check(
        gram.dim() == 2 and gram.shape[0] == gram.shape[1] and gram.shape[0] > 0,
        lambda: f"align: gram: expected shape [T, T] with T > 0, found {shape_of(gram)}",
    )
    check_shape("align", "preference", preference, (gram.shape[0],))
    torch._check(
        preference.device == gram.device,
        lambda: f"align: preference: expected device {gram.device} like gram, found {preference.device}",
    )
    return gram.shape[0]


def _run(gram: Tensor, preference: Tensor, scale: str, rtol: float, out: AlignResult) -> None:
    tasks = _check(gram, preference)
    kernels = kernels_for(gram.device)
    if kernels is None or tasks > MAX_TASKS:
        for target, value in zip(out, reference.align(gram, preference, scale, rtol), strict=True):  # type: ignore[arg-type]
            target.copy_(value)
        return
    gram = gram.to(torch.float64).contiguous()
    preference = preference.to(torch.float64).contiguous()
    workspace = gram.new_empty(kernels.align_workspace(tasks))
    kernels.align(
        gram.data_ptr(),
        preference.data_ptr(),
        SCALES.index(scale),
        rtol,
        tasks,
        *(output.data_ptr() for output in out),
        workspace.data_ptr(),
        *place(gram.device),
    )


def _new(gram: Tensor) -> AlignResult:
    tasks = gram.shape[0]
    kind = {"dtype": torch.float64, "device": gram.device}
    return AlignResult(
        weights=torch.empty(tasks, **kind),
        singular_values=torch.empty(tasks, **kind),
        rank=torch.empty((), dtype=torch.int64, device=gram.device),
        condition_number=torch.empty((), **kind),
        transform=torch.empty(tasks, tasks, **kind),
    )


def _align(gram: Tensor, preference: Tensor, scale: str, rtol: float) -> tuple[Tensor, ...]:
    _check(gram, preference)
    out = _new(gram)
    _run(gram, preference, scale, rtol, out)
    return tuple(out)


def _fake_align(gram: Tensor, preference: Tensor, scale: str, rtol: float) -> tuple[Tensor, ...]:
    _check(gram, preference)
    return tuple(_new(gram))


def _check_into(gram: Tensor, preference: Tensor, out: tuple[Tensor, ...]) -> None:
    tasks = _check(gram, preference)
    shapes = ((tasks,), (tasks,), (), (), (tasks, tasks))
    for name, tensor, shape in zip(AlignResult._fields, out, shapes, strict=True):
        check_shape("align", f"out.{name}", tensor, shape)
        dtype = torch.int64 if name == "rank" else torch.float64
        fits = tensor.dtype == dtype and tensor.device == gram.device and tensor.is_contiguous()
        message = (
            f"align: out.{name}: expected contiguous {dtype} on {gram.device}, found {tensor.dtype} on {tensor.device}"
        )
        torch._check(fits, lambda message=message: message)


def _align_into(gram: Tensor, preference: Tensor, scale: str, rtol: float, *out: Tensor) -> None:
    _check_into(gram, preference, out)
    _run(gram, preference, scale, rtol, AlignResult(*out))


def _fake_align_into(gram: Tensor, preference: Tensor, scale: str, rtol: float, *out: Tensor) -> None:
    _check_into(gram, preference, out)


align_op = register(
    "align(Tensor gram, Tensor preference, str scale, float rtol) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _align,
    _fake_align,
)
align_into_op = register(
    "align_into(Tensor gram, Tensor preference, str scale, float rtol, Tensor(a!) weights, Tensor(b!) singular_values, "
    "Tensor(c!) rank, Tensor(d!) condition_number, Tensor(e!) transform) -> ()",
    _align_into,
    _fake_align_into,
)
