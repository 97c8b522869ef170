"""MGDA (Désidéri, 2012; Sener and Koltun, NeurIPS 2018, arXiv 1810.04650): the shortest convex combination."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .. import ops
from .gram_rule import GramRule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MGDA(GramRule):
    r"""Find the shortest convex combination of the tasks' gradients.

    .. math:: w = \arg\min \{w^T M w : w \ge 0, 1^T w = 1\}

    The update has the same product with every gradient that has a weight, and no smaller one with the others; the task
    with the shortest gradient counts most. On features (the layer) it is MGDA-UB of arXiv 1810.04650.

    Degenerate systems: with zero gradients, these tasks share the weight and the update is zero; duplicates share
    theirs; of opposites, the update is zero; see :func:`mtlgrad.ops.mgda`.

    Layer, :meth:`merge` and :meth:`weigh`: as :class:`GramRule`.

    Args:
        num_tasks: T.
        check_finite, process_group: as in :class:`GramRule`.

    Raises:
        ValueError: ``num_tasks`` below 1.
    """

    def __init__(
        self,
        num_tasks: int,
        *,
        check_finite: bool = False,
        process_group: ProcessGroup | None = None,
    ):
        super().__init__(num_tasks, None, check_finite=check_finite, process_group=process_group)

    def _find(self, gram: Tensor, out: Tensor) -> None:
        ops.mgda(gram, out=out)
