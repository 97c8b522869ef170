"""Clipping of the tasks' gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..arguments import parameter_list
from ..world.jacobians import check_averaged, still_averaged
from ..world.ranks import name_of
from ..world.shards import by_groups, local, sum_over
from .amp import clipping

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@torch.no_grad()
def clip_task_grad_norm_(
    parameters: Iterable[Tensor],
    max_norm: float,
    *,
    error_if_nonfinite: bool = False,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    r"""Clip each task's gradient over all parameters together: ``.jac[t]`` is multiplied by

    .. math:: \min\bigl(1, \frac{\text{max\_norm}}{\|g_t\|_2 + 10^{-6}}\bigr)

    as ``torch.nn.utils.clip_grad_norm_`` does with ``.grad``, which is left alone here. Norms of parameters that
    ``fully_shard`` shards are those of all ranks' shards: one all-reduce of T float64.

    Args:
        parameters: those without ``.jac`` are left out.
        max_norm: the longest that a task's gradient may be; infinity to learn the norms alone.
        error_if_nonfinite: refuses NaN and infinity, which reads from the device.
        process_group: the ranks that train together; all, if not given.

    Returns:
        [T] float64, the norms before clipping, on the device of the gradients; summed in float64.

    Raises:
        RuntimeError: ``.jac`` is not the mean over the ranks; with ``error_if_nonfinite`` a norm is NaN or infinite: it
            names the task.
        ValueError: ``max_norm`` below 0, or no parameter has ``.jac``.
    """
    if not max_norm >= 0.0:
        raise ValueError(f"clip_task_grad_norm_: max_norm: expected a number from 0, found {max_norm}")
    listed = parameter_list("clip_task_grad_norm_", "parameters", parameters)
    wanted = [p for p in listed if getattr(p, "jac", None) is not None]
    if not wanted:
        raise ValueError(
            "clip_task_grad_norm_: parameters: expected at least one with .jac, found none; call task_backward first"
        )
    jacobians: list[Tensor] = [p.jac for p in wanted]  # type: ignore[attr-defined]
    check_averaged("clip_task_grad_norm_", jacobians, name_of("clip_task_grad_norm_", process_group))
    return clip_rows(wanted, max_norm, error_if_nonfinite)


def clip_rows(wanted: Sequence[Any], max_norm: float, error_if_nonfinite: bool = False) -> Tensor:
    """:func:`clip_task_grad_norm_` of parameters that have ``.jac``, which is the mean over the ranks."""
    jacobians: list[Tensor] = [p.jac for p in wanted]
    rows = [local(jacobian) for jacobian in jacobians]
    squares = [
        sum_over(ops.gram(ops.Stacked([rows[i] for i in places])).diagonal().contiguous(), groups)
        for groups, places in by_groups(wanted).items()
    ]
    norms = torch.stack(squares).sum(0).sqrt()
    if error_if_nonfinite and not all(finite := norms.isfinite().tolist()):
        raise RuntimeError(
            f"clip_task_grad_norm_: expected finite gradients, found a norm of {float(norms[finite.index(False)])} in "
            f"task {finite.index(False)}; leave error_if_nonfinite out to clip all the same"
        )
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    with still_averaged(jacobians), clipping(jacobians):
        for row in rows:
            row.mul_(factors.to(row.dtype).view(-1, *[1] * (row.dim() - 1)))
    return norms
