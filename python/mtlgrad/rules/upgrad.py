"""UPGrad (Quinton and Rey, arXiv 2406.16232): each gradient made to conflict with none, then their mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .. import ops
from .gram_rule import GramRule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class UPGrad(GramRule):
    r"""Weigh the projections of every task's gradient onto the dual cone of all gradients.

    .. math:: w = \sum_i p_i \arg\min \{v^T M v : v \ge e_i\}

    The update has no negative product with any gradient, and grows with each gradient's length. Without conflicts it is
    the mean gradient.

    Degenerate systems: where gradients depend on one another several weights have one update, of which these are about
    the smallest; opposites add up to nothing; a zero gradient has its preference as weight; see
    :func:`mtlgrad.ops.upgrad`.

    Layer, :meth:`merge` and :meth:`weigh`: as :class:`GramRule`.

    Args:
        num_tasks: T.
        preference: p, [T], finite and not negative; 1/T each if not given.
        check_finite, process_group: as in :class:`GramRule`.

    Raises:
        ValueError: ``num_tasks`` below 1; a ``preference`` that is not as above, or all zero.
    """

    def __init__(
        self,
        num_tasks: int,
        preference: Tensor | Sequence[float] | None = None,
        *,
        check_finite: bool = False,
        process_group: ProcessGroup | None = None,
    ):
        super().__init__(num_tasks, None, check_finite=check_finite, process_group=process_group)
        self._prefer(preference)

    def extra_repr(self) -> str:
        return f"num_tasks={self.num_tasks}, preference={self.preference}"

    def _find(self, gram: Tensor, out: Tensor) -> None:
        ops.upgrad(gram, self._preference, out=out)
