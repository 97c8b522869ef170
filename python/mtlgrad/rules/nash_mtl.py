"""Nash-MTL (Navon et al., ICML 2022, arXiv 2202.01017): the tasks bargain over the update."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .. import ops
from .gram_rule import GramRule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class NashMTL(GramRule):
    r"""Find the Nash bargaining solution, which multiplies the tasks' gains.

    .. math:: M a = 1 / a, \qquad a > 0

    All tasks gain in proportion to what they could: the update is the same, in direction, whatever the losses' scales.
    Exact at every step, where the published code iterates.

    Degenerate systems: a zero gradient has the weight 0; where a convex combination of the others is zero (Pareto
    stationary; opposites) the weights are that combination's and the update is zero; see :func:`mtlgrad.ops.fairgrad`.

    Layer, :meth:`merge` and :meth:`weigh`: as :class:`GramRule`.

    Args:
        num_tasks: T.
        normalize: divides M by its Frobenius norm first, as the published code does: then the weights do not depend
            on the losses' common scale, and that of a ``GradScaler`` goes through unchanged. Without, the weights are
            those of equation 2, the same but for a factor: the update's length does not follow the gradients', and a
            loss scale must be taken off before.
        check_finite, process_group: as in :class:`GramRule`.

    Raises:
        ValueError: ``num_tasks`` below 1.
    """

    def __init__(
        self,
        num_tasks: int,
        normalize: bool = True,
        *,
        check_finite: bool = False,
        process_group: ProcessGroup | None = None,
    ):
        super().__init__(num_tasks, None, check_finite=check_finite, process_group=process_group)
        self.normalize = normalize

    def extra_repr(self) -> str:
        return f"num_tasks={self.num_tasks}, normalize={self.normalize}"

    def _find(self, gram: Tensor, out: Tensor) -> None:
        ops.fairgrad(gram, 1.0, self.normalize, out=out)
