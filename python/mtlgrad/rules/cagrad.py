"""CAGrad (Liu et al., NeurIPS 2021, arXiv 2110.14048): near the mean gradient, best for the worst task."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from .gram_rule import Constant, GramRule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class CAGrad(GramRule):
    r"""Find the update near the mean gradient that is best for the task it is worst for.

    .. math:: d = \arg\max \{\min_t \langle g_t, d \rangle : |d - g_0| \le c |g_0|\}, \qquad
        g_0 = \frac1T \sum_t g_t

    as algorithm 1 of the paper has it, without the published code's factor of 1 / (1 + c^2).

    Degenerate systems: where no such d is better than g_0 for all (Pareto stationary), or g_0 is zero, d is g_0; see
    :func:`mtlgrad.ops.cagrad`.

    Layer, :meth:`merge` and :meth:`weigh`: as :class:`GramRule`.

    Args:
        num_tasks: T.
        c: from 0 (the mean gradient); below 1 for convergence to a minimum of the mean loss. The paper's 0.2 to 0.5.
        check_finite, process_group: as in :class:`GramRule`.

    Raises:
        ValueError: ``num_tasks`` below 1; ``c`` below 0 or not finite.
    """

    c = Constant()

    def __init__(
        self,
        num_tasks: int,
        c: float = 0.5,
        *,
        check_finite: bool = False,
        process_group: ProcessGroup | None = None,
    ):
        super().__init__(num_tasks, None, check_finite=check_finite, process_group=process_group)
        ops.cagrad(torch.ones(1, 1, device="cpu"), c)  # refuses what c cannot be
        self.c = c

    def extra_repr(self) -> str:
        return f"num_tasks={self.num_tasks}, c={self.c}"

    def _find(self, gram: Tensor, out: Tensor) -> None:
        ops.cagrad(gram, self.c, out=out)
