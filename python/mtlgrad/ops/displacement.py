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
from .checks import check_floating, check_same_device, check_shape, refuse
from .combine import dots_of
from .rows import AnyRows, Row, Rows, Stacked, as_real, check_like, empty_like_row, pointers

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
            all lie on another device, such as pinned host memory.
        weights: [T], any floating dtype, on base's device. A weight of zero does not hide NaN in its row.
        out: written in place if given: a tensor or tensors like base, dense, each apart from the rows, and either
            apart from base or exactly base's tensor in its place. Not differentiable then.

    Returns:
        ``out``, or new tensors shaped and typed like base (a list of tensors if base is a sequence). Summed in float64
        in the order base, row 0, row 1, ..., and rounded once (half precision by way of float32, as torch converts).
        Products of float32 weights and rows are exact: with weights of one the result is exactly the rounded sum.

    Derivatives: in the weights (:func:`mtlgrad.ops.dots` of rows and gradient, whose parameters without a gradient are
    not read), in base and in the rows; twice differentiable.

    Rows on another device than base are copied there, forwards and backwards, in chunks of whole parameters, one chunk
    at a time: at most ``STAGED_BYTES`` (64 MiB), or the T rows of one parameter that has more. Such rows must not
    require a gradient, and have no second derivative.

    Raises:
        RuntimeError: shapes, dtypes, devices.
        ValueError: rows that do not fit together.

    Source: theta + sum_t alpha_t delta_t of arXiv 2405.07769; DESIGN 4.5.
    """
    own, _ = Rows.of("displace", rows)
    parts = as_real([base] if isinstance(base, Tensor) else base)
    wanted = [t.requires_grad for t in (weights, *parts, *own.tensors)]
    if out is None and torch.is_grad_enabled() and any(wanted):
        results = list(_Displace.apply(Rows([], own.tasks, own.stacked), len(parts), weights, *parts, *own.tensors))
    else:
        targets = None if out is None else as_real([out] if isinstance(out, Tensor) else out)
        with torch.no_grad():
            results = _displaced(own, parts, weights, targets)
    if out is not None:
        return out if isinstance(out, Tensor) else list(out)
    results = own.given_back(results)
    return results[0] if isinstance(base, Tensor) else results


class _Displace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, form: Rows, count: int, weights: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        parts, rows = list(tensors[:count]), Rows(list(tensors[count:]), form.tasks, form.stacked)
        ctx.form, ctx.count, ctx.streamed = form, count, _streams(parts, rows.tensors)
        rows_wanted = any(ctx.needs_input_grad[3 + count :])
        if ctx.streamed and rows_wanted:
            refuse(
                f"displace: rows: expected none that requires a gradient on another device than base "
                f"({parts[0].device}), found them on {rows.tensors[0].device}"
            )
        # The rows only where they are needed: they may be written over before a backward that is not about the weights.
        ctx.save_for_backward(weights, *(rows.tensors if ctx.needs_input_grad[2] or rows_wanted else ()))
        ctx.set_materialize_grads(False)
        return tuple(_displaced(rows, parts, weights))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        weights, *tensors = ctx.saved_tensors
        rows = Rows(tensors, ctx.form.tasks, ctx.form.stacked)
        # Embeddings may give sparse ones.
        gradients = tuple(g.to_dense() if g is not None and g.is_sparse else g for g in gradients)
        given = {p: gradient for p, gradient in enumerate(gradients) if gradient is not None}
        for_weights = None
        if ctx.needs_input_grad[2] and given:
            for_weights = _dots(rows, given, ctx.streamed).to(weights.dtype)
        for_rows: list[Tensor | None] = [None] * len(ctx.needs_input_grad[3 + ctx.count :])
        for i, row in enumerate(tensors):
            task, p = divmod(i, ctx.count)
            if ctx.needs_input_grad[3 + ctx.count + i] and p in given:
                weight = weights.view(-1, *[1] * given[p].dim()) if rows.stacked else weights[task]
                dtype = torch.promote_types(given[p].dtype, torch.float32)
                for_rows[i] = (weight.to(dtype) * given[p].to(dtype)).to(row.dtype)
        return None, None, for_weights, *gradients, *for_rows


def _check(rows: Rows, base: list[Tensor], weights: Tensor, device: torch.device | None = None) -> None:
    """`device`: where base and weights have to be; the rows' if not given."""
    rows.check("displace")
    check_like("displace", "base", base, rows.like(), "a row", wider=True, device=device)
    check_floating("displace", weights=weights)
    check_shape("displace", "weights", weights, (rows.tasks,))
    check_same_device("displace", "base", base=base[0], weights=weights)


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
    starts, total = [0], 0
    for i, size in enumerate(sizes):
        if i > starts[-1] and total + size > most:
            starts.append(i)
            total = 0
        total += size
    return [range(*ends) for ends in zip(starts, [*starts[1:], len(sizes)], strict=True)]


def _chunks(rows: Rows, places: Sequence[int]) -> list[Sequence[int]]:
    like = rows.like()
    sizes = [rows.tasks * like[p].numel() * like[p].element_size() for p in places]
    return [places[chunk.start : chunk.stop] for chunk in chunks(sizes, STAGED_BYTES)]


def _staged(rows: Rows, places: Sequence[int], device: torch.device) -> Rows:
    """Copy some parameters' rows, in the element order in which the operations copy them no more.

    The copies are under way when this returns: what is next on the device's stream comes after them. The host, which
    has no stream, waits.
    """
    listed = rows.of_parameters(places).listed()
    pairs = [(part, like) for row in listed for part, like in zip(row, listed[0], strict=True)]
    wait = device.type == "cpu"
    copies = [empty_like_row(like, device).copy_(part, non_blocking=not wait) for part, like in pairs]
    return Rows(copies, rows.tasks, stacked=False)


# A chunk is freed before the next is made: no name holds it, the call that uses it does.


def _displaced(rows: Rows, parts: list[Tensor], weights: Tensor, out: list[Tensor] | None = None) -> list[Tensor]:
    """Return `out`, written, or new tensors."""
    if not _streams(parts, rows.tensors):
        if out is None:
            return list(displace_op(rows, parts, weights))
        displace_op.into(out, rows, parts, weights)
        return out
    device, targets = parts[0].device, list(map(empty_like_row, parts)) if out is None else out
    _check(rows, parts, weights, device)  # all, before the first is written
    check_like("displace", "out", targets, parts, "base")
    for places in _chunks(rows, range(len(parts))):
        to, base = ([tensors[p] for p in places] for tensors in (targets, parts))
        displace_op.into(to, _staged(rows, places, device), base, weights)
    return targets


def _dots(rows: Rows, vector: dict[int, Tensor], streamed: bool) -> Tensor:
    """Return <row t, vector> over the parameters that the vector has, [T] float64."""
    if not streamed:
        return dots_of(rows.of_parameters(list(vector)), list(vector.values()))
    device = next(iter(vector.values())).device
    if torch.is_grad_enabled():
        refuse(
            f"displace: rows: expected rows on base's device ({device}) for a derivative that is differentiated again, "
            f"found them on {rows.tensors[0].device}"
        )
    total = torch.zeros(rows.tasks, dtype=torch.float64, device=device)
    for places in _chunks(rows, list(vector)):
        total += dots_of(_staged(rows, places, device), [vector[p] for p in places])
    return total
