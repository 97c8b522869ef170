"""FairGrad (Ban and Ji, ICML 2024, arXiv 2402.15638): the tasks' gains made alpha-fair."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from .gram_rule import Constant, GramRule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class FairGrad(GramRule):
    r"""Balance the tasks' gains by alpha-fairness.

    .. math:: M a = a^{-1/\alpha}, \qquad a > 0


    Degenerate systems: a zero gradient has the weight 0; where a convex combination of the others is zero (Pareto
    stationary; opposites) the weights are that combination's and the update is zero; see :func:`mtlgrad.ops.fairgrad`.

    Layer, :meth:`merge` and :meth:`weigh`: as :class:`GramRule`.

    Args:
        num_tasks: T.
        alpha: above 0; 1 is :class:`NashMTL` (proportional fairness), 2 what the paper takes for most data, towards 0
            the sum of the losses, towards infinity the gain of the task that gains least.
        normalize: divides M by its Frobenius norm first: then the weights do not depend on the losses' common scale,
            and that of a ``GradScaler`` goes through unchanged. Without, the weights are those of the published code,
            the same but for a factor: the update's length does not follow the gradients', and a loss scale must be
            taken off before.
        check_finite, process_group: as in :class:`GramRule`.

    Raises:
        ValueError: ``num_tasks`` below 1; ``alpha`` not above 0 or not finite.
    """

    alpha = Constant()

    def __init__(
        self,
        num_tasks: int,
        alpha: float = 2.0,
        normalize: bool = True,
        *,
        check_finite: bool = False,
        process_group: ProcessGroup | None = None,
    ):
        super().__init__(num_tasks, None, check_finite=check_finite, process_group=process_group)
        ops.fairgrad(torch.ones(1, 1, device="cpu"), alpha)  # refuses what alpha cannot be
        self.alpha, self.normalize = alpha, normalize

    def extra_repr(self) -> str:
        return f"num_tasks={self.num_tasks}, alpha={self.alpha}, normalize={self.normalize}"

    def _find(self, gram: Tensor, out: Tensor) -> None:
        ops.fairgrad(gram, self.alpha, self.normalize, out=out)
