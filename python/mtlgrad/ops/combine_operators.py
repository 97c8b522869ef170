"""The ``mtlgrad::`` operators of the `combine` stem: checks, kernels, and the shapes-only version that is traced."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ._kernels import compiled_for, kernels_for, place
from ._library import register
from .checks import check_floating, check_shape, refuse, shape_of
from .rows import Group, check_rows, columns, empty_like_row, groups, in_order, row_like, unflatten


def _workspace(size: int, like: Tensor) -> Tensor:
    return torch.empty(size, dtype=torch.float64, device=like.device)


# ---- gram ------------------------------------------------------------------------------------------------------------


def gram_of(tables: list[Group], tasks: int, device: torch.device) -> Tensor:
    """[T, T] float64 of rows that are checked, on a device with kernels."""
    kernels = compiled_for(device)
    total = torch.zeros(tasks, tasks, dtype=torch.float64, device=device)
    for group in tables:
        workspace = _workspace(kernels.gram_workspace(tasks, columns(group)), total)
        kernels.gram(
            group.code, group.pointers, group.sizes, tasks, total.data_ptr(), workspace.data_ptr(), *place(device)
        )
    return total


def _gram(tensors: list[Tensor], tasks: int, stacked: bool) -> Tensor:
    check_rows("gram", tensors, tasks, stacked)
    device = tensors[0].device
    if kernels_for(device) is None:
        return reference.gram(unflatten(tensors, tasks, stacked))
    return gram_of(groups(tensors, tasks, stacked), tasks, device)


def _fake_gram(tensors: list[Tensor], tasks: int, stacked: bool) -> Tensor:
    check_rows("gram", tensors, tasks, stacked)
    return tensors[0].new_empty(tasks, tasks, dtype=torch.float64)


# ---- dots ------------------------------------------------------------------------------------------------------------


def check_row(op: str, name: str, parts: list[Tensor], tensors: list[Tensor], tasks: int, stacked: bool) -> None:
    """`parts` like a row, which `tensors` are known to hold."""
    check_like(op, name, parts, row_like(tensors, tasks, stacked), "a row")


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
    """`parts` like the tensors of `of`; `wider`: or float32 where those are bfloat16; `device`: there, not where those
    are."""
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


def _dots(tensors: list[Tensor], vector: list[Tensor], tasks: int, stacked: bool) -> Tensor:
    check_rows("dots", tensors, tasks, stacked)
    check_like("dots", "vector", vector, row_like(tensors, tasks, stacked), "a row", wider=True)
    device = tensors[0].device
    kernels = kernels_for(device)
    if kernels is None:
        return reference.dots(unflatten(tensors, tasks, stacked), vector)
    total = torch.zeros(tasks, dtype=torch.float64, device=device)
    for group in groups(tensors, tasks, stacked, vector):
        parts = in_order(vector, group)
        workspace = _workspace(kernels.dots_workspace(tasks, columns(group)), total)
        kernels.dots(
            group.code,
            group.other_code,
            group.pointers,
            group.sizes,
            tasks,
            [part.data_ptr() for part in parts],
            total.data_ptr(),
            workspace.data_ptr(),
            *place(device),
        )
    return total


def _fake_dots(tensors: list[Tensor], vector: list[Tensor], tasks: int, stacked: bool) -> Tensor:
    check_rows("dots", tensors, tasks, stacked)
    check_like("dots", "vector", vector, row_like(tensors, tasks, stacked), "a row", wider=True)
    return tensors[0].new_empty(tasks, dtype=torch.float64)


# ---- combine ---------------------------------------------------------------------------------------------------------


def _check_combine(tensors: list[Tensor], weights: Tensor, tasks: int, stacked: bool) -> None:
    check_rows("combine", tensors, tasks, stacked)
    check_shape("combine", "weights", weights, (tasks,))
    device = tensors[0].device
    if weights.device != device:
        refuse(f"combine: weights: expected device {device} like rows, found {weights.device}")


def combine_of(tables: list[Group], weights: Tensor, tasks: int, out: list[Tensor] | None) -> list[Tensor]:
    """The weighted sum of rows that are checked, on a device with kernels; in `out`, whose tensors are dense, or new
    tensors in the rows' element order. `weights` are float64 and contiguous."""
    found: dict[int, Tensor] = {}
    for group in tables:
        parts = [torch.empty_like(order) for order in group.orders] if out is None else _targets(out, group)
        compiled_for(weights.device).combine(
            group.code,
            group.pointers,
            group.sizes,
            tasks,
            weights.data_ptr(),
            list(map(Tensor.data_ptr, parts)),
            *place(weights.device),
        )
        found.update(zip(group.places, parts, strict=True))
    results = [found[p] for p in range(len(found))]
    return results if out is None else copy_into(out, results)


def _targets(out: list[Tensor], group: Group) -> list[Tensor]:
    """Where a kernel writes: an output in another element order than the rows is filled by a copy, afterwards."""
    return [
        out[p] if out[p].stride() == order.stride() else torch.empty_like(order, dtype=out[p].dtype)
        for p, order in zip(group.places, group.orders, strict=True)
    ]


def copy_into(out: list[Tensor], results: Sequence[Tensor]) -> list[Tensor]:
    for target, result in zip(out, results, strict=True):
        if target is not result:
            target.copy_(result)
        elif not target.is_inference():
            # A kernel has written it: autograd must know that what it may have saved for a backward is gone.
            torch.autograd.graph.increment_version(target)
    return out


def _run_combine(
    tensors: list[Tensor], weights: Tensor, tasks: int, stacked: bool, out: list[Tensor] | None
) -> list[Tensor]:
    if kernels_for(tensors[0].device) is None:
        results = list(reference.combine(unflatten(tensors, tasks, stacked), weights))
        if out is None:
            out = [empty_like_row(part) for part in row_like(tensors, tasks, stacked)]
        return copy_into(out, results)
    return combine_of(groups(tensors, tasks, stacked), weights.to(torch.float64).contiguous(), tasks, out)


def _combine(tensors: list[Tensor], weights: Tensor, tasks: int, stacked: bool) -> list[Tensor]:
    _check_combine(tensors, weights, tasks, stacked)
    return _run_combine(tensors, weights, tasks, stacked, None)


def _fake_combine(tensors: list[Tensor], weights: Tensor, tasks: int, stacked: bool) -> list[Tensor]:
    _check_combine(tensors, weights, tasks, stacked)
    return [empty_like_row(part) for part in row_like(tensors, tasks, stacked)]


def _combine_into(tensors: list[Tensor], weights: Tensor, tasks: int, stacked: bool, out: list[Tensor]) -> None:
    _check_combine(tensors, weights, tasks, stacked)
    check_row("combine", "out", out, tensors, tasks, stacked)
    _run_combine(tensors, weights, tasks, stacked, out)


def _fake_combine_into(tensors: list[Tensor], weights: Tensor, tasks: int, stacked: bool, out: list[Tensor]) -> None:
    _check_combine(tensors, weights, tasks, stacked)
    check_row("combine", "out", out, tensors, tasks, stacked)


# ---- displace --------------------------------------------------------------------------------------------------------


def check_displace(
    tensors: list[Tensor], base: list[Tensor], weights: Tensor, tasks: int, stacked: bool, device: torch.device
) -> None:
    """`device`: where base and weights have to be."""
    check_rows("displace", tensors, tasks, stacked)
    check_like("displace", "base", base, row_like(tensors, tasks, stacked), "a row", wider=True, device=device)
    check_floating("displace", weights=weights)
    check_shape("displace", "weights", weights, (tasks,))
    if weights.device != device:
        refuse(f"displace: weights: expected device {device} like base, found {weights.device}")


def _run_displace(
    tensors: list[Tensor], base: list[Tensor], weights: Tensor, tasks: int, stacked: bool, out: list[Tensor]
) -> list[Tensor]:
    kernels = kernels_for(weights.device)
    if kernels is None:
        return copy_into(out, list(reference.displace(base, unflatten(tensors, tasks, stacked), weights)))
    weights = weights.to(torch.float64).contiguous()
    found: dict[int, Tensor] = {}
    for group in groups(tensors, tasks, stacked, base):
        origin, parts = in_order(base, group), _targets(out, group)
        kernels.displace(
            group.code,
            group.other_code,
            group.pointers,
            group.sizes,
            tasks,
            list(map(Tensor.data_ptr, origin)),
            weights.data_ptr(),
            list(map(Tensor.data_ptr, parts)),
            *place(weights.device),
        )
        found.update(zip(group.places, parts, strict=True))
    return copy_into(out, [found[p] for p in range(len(out))])


def _displace(tensors: list[Tensor], base: list[Tensor], weights: Tensor, tasks: int, stacked: bool) -> list[Tensor]:
    check_displace(tensors, base, weights, tasks, stacked, tensors[0].device)
    return _run_displace(tensors, base, weights, tasks, stacked, list(map(empty_like_row, base)))


def _fake_displace(
    tensors: list[Tensor], base: list[Tensor], weights: Tensor, tasks: int, stacked: bool
) -> list[Tensor]:
    check_displace(tensors, base, weights, tasks, stacked, tensors[0].device)
    return list(map(empty_like_row, base))


def _displace_into(
    tensors: list[Tensor], base: list[Tensor], weights: Tensor, tasks: int, stacked: bool, out: list[Tensor]
) -> None:
    _fake_displace_into(tensors, base, weights, tasks, stacked, out)
    _run_displace(tensors, base, weights, tasks, stacked, out)


def _fake_displace_into(
    tensors: list[Tensor], base: list[Tensor], weights: Tensor, tasks: int, stacked: bool, out: list[Tensor]
) -> None:
    check_displace(tensors, base, weights, tasks, stacked, tensors[0].device)
    check_like("displace", "out", out, base, "base")


gram_op = register("gram(Tensor[] rows, int tasks, bool stacked) -> Tensor", _gram, _fake_gram)
dots_op = register("dots(Tensor[] rows, Tensor[] vector, int tasks, bool stacked) -> Tensor", _dots, _fake_dots)
combine_op = register(
    "combine(Tensor[] rows, Tensor weights, int tasks, bool stacked) -> Tensor[]", _combine, _fake_combine
)
combine_into_op = register(
    "combine_into(Tensor[] rows, Tensor weights, int tasks, bool stacked, Tensor(a!)[] out) -> ()",
    _combine_into,
    _fake_combine_into,
)
displace_op = register(
    "displace(Tensor[] rows, Tensor[] base, Tensor weights, int tasks, bool stacked) -> Tensor[]",
    _displace,
    _fake_displace,
)
displace_into_op = register(
    "displace_into(Tensor[] rows, Tensor[] base, Tensor weights, int tasks, bool stacked, Tensor(a!)[] out) -> ()",
    _displace_into,
    _fake_displace_into,
)
