"""Parameters moved along the rows of T tasks, with a derivative in the weights, also from rows kept on the host."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, overload

import torch
from torch import Tensor

from .. import reference
from ._native import launch_place
from ._operation import Operation
from .checks import check_floating, check_shape, refuse
from .combine import dots_of
from .rows import AnyRows, Row, Rows, Stacked, check_like, empty_like_row, pointers

__all__ = ["displace"]

STAGED_BYTES = 64 << 20  #: of rows that lie elsewhere, on base's device at a time: enough for full speed


@overload
def displace(base: Tensor, rows: AnyRows | Stacked, weights: Tensor, out: Row | None = None) -> Tensor: ...
@overload
def displace(
    base: Sequence[Tensor], rows: AnyRows | Stacked, weights: Tensor, out: Row | None = None
) -> list[Tensor]: ...
def displace(base: Row, rows: AnyRows | Stacked, weights: Tensor, out: Row | None = None) -> Tensor | list[Tensor]:
    """Return base + sum_t weights_t row_t: one read of base and of every row, one write.

    Args:
        base: shaped like a row: a tensor, or a sequence of tensors, one per parameter, all on one device.
        rows: T rows, as in :func:`mtlgrad.ops.combine`, of base's dtypes, or bfloat16 where base is float32. They may
            all lie on another device (pinned host memory for one): see below.
        weights: [T], any floating dtype, on base's device. A weight of zero does not hide NaN in its row.
        out: written in place if given: a tensor or tensors like base, dense, each apart from the rows, and either
            apart from base or exactly base's tensor in its place. Not differentiable then.

    Returns:
        ``out``, or new tensors shaped and typed like base (a list of tensors if base is a sequence). Summed in float64
        in the order base, row 0, row 1, ..., and rounded once (half precision by way of float32, as torch converts).
        Products of float32 weights and rows are exact: with weights of one the result is exactly the rounded sum.

    Derivatives: in the weights (:func:`mtlgrad.ops.dots` of rows and gradient, whose parameters without a gradient are
    not read), in base and in the rows; twice differentiable.

    Rows on another device than base are copied there, and freed again, in chunks of whole parameters: those that
    follow one another while their T rows are at most ``STAGED_BYTES`` (64 MiB) together, one parameter at least. No
    more of the rows than one chunk is on base's device at any time, in the derivative neither; it is at most 64 MiB,
    or the T rows of the largest parameter. Such rows must not require a gradient, and have no second derivative.

    Errors: ``ValueError`` for rows that do not fit together, ``RuntimeError`` for shapes, dtypes and devices.

    Source: theta + sum_t alpha_t delta_t of arXiv 2405.07769; DESIGN 4.5.
    """
    own, _ = Rows.of("displace", rows)
    parts = [base] if isinstance(base, Tensor) else list(base)
    if out is not None:
        targets = [out] if isinstance(out, Tensor) else list(out)
        with torch.no_grad():
            _write(parts, own, weights, targets)
        return out if isinstance(out, Tensor) else targets
    wanted = [t.requires_grad for t in (weights, *parts, *own.tensors)]
    if torch.is_grad_enabled() and any(wanted):
        results = _Displace.apply(own._replace(tensors=[]), len(parts), weights, *parts, *own.tensors)
    else:
        results = _new(parts, own, weights)
    return results[0] if isinstance(base, Tensor) else list(results)


class _Displace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, form: Rows, count: int, weights: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        parts, rows = list(tensors[:count]), form._replace(tensors=list(tensors[count:]))
        ctx.form, ctx.count, ctx.streamed = form, count, _streams(parts, rows.tensors)
        rows_wanted = any(ctx.needs_input_grad[3 + count :])
        if ctx.streamed and rows_wanted:
            message = (
                f"displace: rows: expected none that requires a gradient on another device than base "
                f"({parts[0].device}), found them on {rows.tensors[0].device}"
            )
            refuse(message)
        # The rows only where they are needed: they may be written over before a backward that is not about the weights.
        ctx.save_for_backward(weights, *(rows.tensors if ctx.needs_input_grad[2] or rows_wanted else ()))
        ctx.set_materialize_grads(False)
        return tuple(_new(parts, rows, weights))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        weights, *tensors = ctx.saved_tensors
        rows, places = ctx.form._replace(tensors=tensors), [p for p, g in enumerate(gradients) if g is not None]
        # Embeddings may give sparse ones.
        gradients = tuple(g.to_dense() if g is not None and g.is_sparse else g for g in gradients)
        given = [g for g in gradients if g is not None]
        for_weights = None
        if ctx.needs_input_grad[2] and places:
            for_weights = _dots(rows, places, given, ctx.streamed).to(weights.dtype)
        wanted = ctx.needs_input_grad[3 + ctx.count :]
        for_rows: list[Tensor | None] = [None] * len(wanted)
        for i, needed in enumerate(wanted):
            gradient = gradients[i % ctx.count]
            if needed and gradient is not None:
                for_rows[i] = _for_row(weights, gradient, tensors[i], None if rows.stacked else i // ctx.count)
        return None, None, for_weights, *gradients, *for_rows


def _for_row(weights: Tensor, gradient: Tensor, row: Tensor, task: int | None) -> Tensor:
    """Return the gradient of a row's tensor; of all rows' where they are stacked."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    weight = weights.view(-1, *[1] * gradient.dim()) if task is None else weights[task]
    return (weight.to(dtype) * gradient.to(dtype)).to(row.dtype)


def _check(
    rows: Rows, base: list[Tensor], weights: Tensor, out: list[Tensor] | None = None, device: torch.device | None = None
) -> None:
    """`device`: where base and weights have to be; the rows' if not given."""
    device = rows.tensors[0].device if device is None else device
    rows.check("displace")
    check_like("displace", "base", base, rows.like(), "a row", wider=True, device=device)
    check_floating("displace", weights=weights)
    check_shape("displace", "weights", weights, (rows.tasks,))
    if weights.device != device:
        refuse(f"displace: weights: expected device {device} like base, found {weights.device}")
    if out is not None:
        check_like("displace", "out", out, base, "base")


def _kernel(kernels: ModuleType, rows: Rows, base: list[Tensor], weights: Tensor, out: list[Tensor]) -> None:
    weights, where = weights.to(torch.float64).contiguous(), launch_place(weights.device)
    for group in rows.groups(base):
        origin = group.in_order(base)
        types, given = (group.code, group.other_code), (group.table, pointers(origin), weights.data_ptr())
        group.write_to(out, lambda targets: kernels.add_weighted(*types, *given, targets, where))  # noqa: B023


displace_op = Operation(
    "displace(Rows rows, Tensor[] base, Tensor weights) -> Tensor[]",
    structs=[Rows],
    check=_check,
    outputs=lambda rows, base, weights: list(map(empty_like_row, base)),
    check_out=lambda out, rows, base, weights: check_like("displace", "out", out, base, "base"),
    kernel=_kernel,
    reference=lambda rows, base, weights: reference.displace(base, rows.listed(), weights),
)


# ---- rows on another device ------------------------------------------------------------------------------------------


def _streams(parts: list[Tensor], tensors: list[Tensor]) -> bool:
    return len(parts) > 0 and parts[0].device != tensors[0].device


def chunks(sizes: Sequence[int], most: int) -> list[range]:
    """Return consecutive numbers whose sizes are at most `most` together, or one number alone."""
    found, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > most:
            found.append(range(start, i))
            start, total = i, 0
        total += size
    return [*found, range(start, len(sizes))]


def _chunks(rows: Rows, places: Sequence[int]) -> list[list[int]]:
    like = rows.like()
    sizes = [rows.tasks * like[p].numel() * like[p].element_size() for p in places]
    return [[places[i] for i in chunk] for chunk in chunks(sizes, STAGED_BYTES)]


def _staged(rows: Rows, places: Sequence[int], device: torch.device) -> list[Tensor]:
    """Copy some parameters' rows, row after row, in the element order in which the operations copy them no more.

    The copies are under way when this returns: what is next on the device's stream comes after them. The host, which
    has no stream, waits.
    """
    listed = rows.listed()
    return [
        empty_like_row(listed[0][p], device).copy_(row[p], non_blocking=device.type != "cpu")
        for row in listed
        for p in places
    ]


# A chunk is freed before the next is made: no name holds it, the call that uses it does.


def _new(parts: list[Tensor], rows: Rows, weights: Tensor) -> list[Tensor]:
    if not _streams(parts, rows.tensors):
        return list(displace_op(rows, parts, weights))
    device = parts[0].device
    _check(rows, parts, weights, device=device)
    results = []
    for places in _chunks(rows, range(len(parts))):
        chosen = [parts[p] for p in places]
        results += displace_op(Rows(_staged(rows, places, device), rows.tasks, False), chosen, weights)
    return results


def _write(parts: list[Tensor], rows: Rows, weights: Tensor, out: list[Tensor]) -> None:
    if not _streams(parts, rows.tensors):
        displace_op.into(out, rows, parts, weights)
        return
    device = parts[0].device
    _check(rows, parts, weights, out, device)  # all, before the first is written
    for places in _chunks(rows, range(len(parts))):
        chosen, targets = [parts[p] for p in places], [out[p] for p in places]
        displace_op.into(targets, Rows(_staged(rows, places, device), rows.tasks, False), chosen, weights)


def _dots(rows: Rows, places: list[int], gradients: list[Tensor], streamed: bool) -> Tensor:
    """Return <row t, gradients> over some parameters, [T] float64."""
    if not streamed:
        total: Tensor = dots_of(rows.of_parameters(places), gradients)
        return total
    device = gradients[0].device
    if torch.is_grad_enabled():
        message = (
            f"displace: rows: expected rows on base's device ({device}) for a derivative that is differentiated again, "
            f"found them on {rows.tensors[0].device}"
        )
        refuse(message)
    total = torch.zeros(rows.tasks, dtype=torch.float64, device=device)
    given = dict(zip(places, gradients, strict=True))
    for chunk in _chunks(rows, places):
        total += dots_of(Rows(_staged(rows, chunk, device), rows.tasks, False), [given[p] for p in chunk])
    return total
