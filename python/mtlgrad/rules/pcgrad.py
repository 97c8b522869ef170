"""PCGrad (Yu et al., NeurIPS 2020, arXiv 2001.06782): gradients lose their parts against one another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from .gram_rule import GramRule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class PCGrad(GramRule):
    r"""Take from every gradient its part against each of the others, in a random order, and add them up.

    For each i, from v = g_i: for every other j, in a new order at each use, where :math:`\langle v, g_j \rangle < 0`,
    :math:`v \leftarrow v - \langle v, g_j \rangle g_j / |g_j|^2`. Without conflicts the update is the sum.

    The orders follow from ``seed`` and the number of uses, ``draws``, a buffer: a resumed run repeats them. Of several
    ranks, the first one's count on all.

    Degenerate systems: opposites and zero gradients add nothing; no solution is looked for, so there is always one.

    Layer, :meth:`merge` and :meth:`weigh`: as :class:`GramRule`.

    Args:
        num_tasks: T.
        seed: of the orders.
        check_finite, process_group: as in :class:`GramRule`.

    Raises:
        ValueError: ``num_tasks`` below 1.
    """

    _draws = True

    def __init__(
        self,
        num_tasks: int,
        seed: int = 0,
        *,
        check_finite: bool = False,
        process_group: ProcessGroup | None = None,
    ):
        super().__init__(num_tasks, None, check_finite=check_finite, process_group=process_group)
        self.seed = seed
        self.draws: Tensor
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        return f"num_tasks={self.num_tasks}, seed={self.seed}"

    def _prepare(self, device: torch.device) -> None:
        super()._prepare(device)
        draws = self._buffers.get("draws")
        if draws is not None and draws.device != device:
            self.draws = torch.zeros_like(draws, device=device) if draws.is_meta else draws.to(device)

    def _find(self, gram: Tensor, out: Tensor) -> None:
        ops.pcgrad(gram, self.seed, self.draws, out=out)
        self.draws.add_(1)
