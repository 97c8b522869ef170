"""The ``mtlgrad::`` operators of the `align` stem: checks, kernels, and the shapes-only version that is traced."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from .. import reference
from ..reference.align import AlignResult, Scale
from ._kernels import kernels_for, place
from ._library import register
from .checks import check_floating, check_gram, check_shape, refuse, shape_of
from .combine_operators import check_row, combine_of, copy_into, gram_of
from .rows import check_rows, groups, row_of, unflatten

SCALES: tuple[str, ...] = get_args(Scale)
MAX_TASKS = 64  #: of the kernel (csrc/kernels.h); torch.linalg.eigh beyond


def _check(gram: Tensor, preference: Tensor) -> int:
    check_floating("align", gram=gram, preference=preference)
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
        refuse(f"align: gram: expected shape [T, T] with T > 0, found {shape_of(gram)}")
    check_shape("align", "preference", preference, (gram.shape[0],))
    if preference.device != gram.device:
        refuse(f"align: preference: expected device {gram.device} like gram, found {preference.device}")
    return gram.shape[0]


def _run(gram: Tensor, preference: Tensor, scale: str, rtol: float, out: AlignResult) -> None:
    tasks = gram.shape[0]
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
    return AlignResult(
        weights=gram.new_empty(tasks, dtype=torch.float64),
        singular_values=gram.new_empty(tasks, dtype=torch.float64),
        rank=gram.new_empty((), dtype=torch.int64),
        condition_number=gram.new_empty((), dtype=torch.float64),
        transform=gram.new_empty(tasks, tasks, dtype=torch.float64),
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
        if tensor.dtype != dtype or tensor.device != gram.device or not tensor.is_contiguous():
            found = f"found {tensor.dtype} on {tensor.device}"
            refuse(f"align: out.{name}: expected contiguous {dtype} on {gram.device}, {found}")


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


# ---- merge: gram, align and combine on one table of pointers ---------------------------------------------------------


def _check_merge(tensors: list[Tensor], tasks: int, stacked: bool, preference: Tensor, out: list[Tensor]) -> None:
    check_rows("merge", tensors, tasks, stacked)
    check_row("merge", "out", out, tensors, tasks, stacked)
    check_shape("merge", "preference", preference, (tasks,))


def _merge(
    tensors: list[Tensor],
    tasks: int,
    stacked: bool,
    preference: Tensor,
    scale: str,
    rtol: float,
    check_finite: bool,
    out: list[Tensor],
    *result: Tensor,
) -> None:
    _check_merge(tensors, tasks, stacked, preference, out)
    device, alignment = tensors[0].device, AlignResult(*result)
    if kernels_for(device) is None:
        rows = unflatten(tensors, tasks, stacked)
        gram = reference.gram(rows)
    else:
        tables = groups(tensors, tasks, stacked)
        gram = gram_of(tables, tasks, device)
    _check_into(gram, preference, result)
    if check_finite:
        check_gram("merge", gram, lambda t: row_of(tensors, tasks, stacked, t))
    _run(gram, preference, scale, rtol, alignment)
    if kernels_for(device) is None:
        copy_into(out, list(reference.combine(rows, alignment.weights)))
    else:
        combine_of(tables, alignment.weights, tasks, out)


def _fake_merge(
    tensors: list[Tensor],
    tasks: int,
    stacked: bool,
    preference: Tensor,
    scale: str,
    rtol: float,
    check_finite: bool,
    out: list[Tensor],
    *result: Tensor,
) -> None:
    _check_merge(tensors, tasks, stacked, preference, out)


merge_op = register(
    "merge(Tensor[] rows, int tasks, bool stacked, Tensor preference, str scale, float rtol, bool check_finite, "
    "Tensor(a!)[] out, Tensor(b!) weights, Tensor(c!) singular_values, Tensor(d!) rank, Tensor(e!) condition_number, "
    "Tensor(f!) transform) -> ()",
    _merge,
    _fake_merge,
)
