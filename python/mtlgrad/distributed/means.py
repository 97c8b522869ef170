"""Losses whose average over the ranks is the mean over all ranks' examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from .collectives import sum_
from .groups import name_of, ranks_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@overload
def global_means(values: Sequence[Tensor], *, process_group: ProcessGroup | None = None) -> list[Tensor]: ...
@overload
def global_means(values: Mapping[Any, Tensor], *, process_group: ProcessGroup | None = None) -> dict[Any, Tensor]: ...
def global_means(
    values: Sequence[Tensor] | Mapping[Any, Tensor], *, process_group: ProcessGroup | None = None
) -> list[Tensor] | dict[Any, Tensor]:
    r"""Each task's loss on this rank, such that its average over the ranks is the mean over the examples of all ranks:

    .. math:: \ell_t = \frac{W}{\sum_r n_{t,r}} \sum_i \text{values}_{t,i}

    Distributed training averages gradients over the ranks. With ordinary batch means that is the gradient of the mean
    over all examples only if every rank has as many of them: not in an uneven last batch, nor where labels are missing.

    Args:
        values: per task the losses of this rank's labelled examples, any shape (``reduction="none"``). A task without
            any here is an empty tensor that was computed from its head, ``head(z)[mask]``: its loss is then zero, but
            the head takes part, as DDP wants.
        process_group: the ranks; all, if not given. On one process: the plain means (zero of nothing).

    Returns:
        One scalar a task, as ``values`` has them. One all-reduce of T float64 counts; nothing is read by the host.
    """
    listed = list(values.values()) if isinstance(values, Mapping) else list(values)
    if not listed:
        raise ValueError("global_means: values: expected at least one tensor, found none")
    for t, value in enumerate(listed):
        if not isinstance(value, Tensor):
            raise TypeError(f"global_means: values: expected tensors, found {type(value).__name__} for task {t}")
    ranks = ranks_of(name_of("global_means", process_group))
    sizes = [value.numel() for value in listed]
    if ranks is None:
        means = [value.sum() / max(size, 1) for value, size in zip(listed, sizes)]
    else:
        counts = sum_(torch.tensor(sizes, dtype=torch.float64, device=listed[0].device), ranks)
        factors = ranks.size / counts.clamp(min=1.0)
        means = [value.sum() * factor.to(value.dtype) for value, factor in zip(listed, factors)]
    return dict(zip(values, means)) if isinstance(values, Mapping) else means
