"""DualProj (arXiv 2406.16232; Lopez-Paz and Ranzato, NeurIPS 2017): the mean gradient made to conflict with none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .. import ops
from .gram_rule import GramRule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class DualProj(GramRule):
    r"""Project the weighed sum of the tasks' gradients onto their dual cone.

    .. math:: w = \arg\min \{v^T M v : v \ge p\}

    The update is the nearest to the mean gradient that has no negative product with any gradient.

    Degenerate systems: as :class:`UPGrad`; see :func:`mtlgrad.ops.dualproj`.

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
        ops.dualproj(gram, self._preference, out=out)
