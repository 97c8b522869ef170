"""IMTL-G (Liu et al., ICLR 2021): the update that projects equally on all gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .. import ops
from .gram_rule import GramRule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class IMTLG(GramRule):
    r"""Find the update whose projections on all gradients' directions are equal.

    .. math:: M a = k \sqrt{\mathrm{diag} M}, \qquad 1^T a = 1

    Weights may be negative, and with them k: the update then turns against every task, as published.

    Degenerate systems: gradients that depend on one another have the least-squares solution of least norm, so that
    duplicates share; opposites, which only zero projects on equally, have zeros; a zero gradient has the weight 0; see
    :func:`mtlgrad.ops.imtlg`.

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
        ops.imtlg(gram, out=out)
