"""Aligned-MTL (Senushkin et al., CVPR 2023, arXiv 2305.19000): task gradients made orthogonal and equally long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..ops.align import SCALES, AlignResult, Scale, empty_result
from ..reference.align import EPS
from ..world.ranks import ALONE, World
from .gram_rule import Constant, GramRule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class AlignedMTL(GramRule):
    r"""Aligned-MTL in three forms, each around the same T x T alignment (:func:`mtlgrad.ops.align`).

    - ``z = aligned(features)``: a layer between backbone and heads (the paper's upper-bound form, of the gradient at
      the shared representation). One ordinary ``loss.backward()``.
    - :meth:`merge`: ``.jac`` of parameters (:func:`mtlgrad.task_backward`, or TorchJD) to ``.grad``.
    - :meth:`weigh`: task weights first, then one backward of the weighted sum, by whatever trainer.

    With G the tasks' gradients as columns, the update is G B p: B makes the columns of G B orthogonal and of one
    length, p is the preference. A positive factor common to all losses (a loss scale) goes through unchanged.

    Args:
        num_tasks: T.
        preference: p, [T], finite and not negative; ones if not given (as in the published code; 1/T in the paper's
            text differs from it by a factor T).
        scale: the length of the aligned gradients: the smallest singular value of G (``"min"``), the median one or
            their root mean square (``"rmse"``).
        scale_heads: multiplies each head's gradient by its task's weight too, as the published code can: give
            ``heads=`` to :meth:`merge`. :meth:`weigh` always does, for its weights go into the losses; the layer
            cannot, since the heads have their gradients before the weights exist.
        rtol: eigenvalues of the Gram matrix below rtol times the largest are taken for zero (default T x 1.2e-7).
        check_finite: raises ``ValueError`` naming the task whose gradient has NaN or infinity; this reads from the
            device. Without it the merged gradient is NaN.
        process_group: the ranks that train together; all, if not given and torch.distributed is initialised. The
            alignment is then that of the gradients of all ranks' examples, as one process would make it: the layer and
            ``weigh(losses, features)`` sum the ranks' Gram matrices, T x T numbers; ``merge`` needs nothing for
            ``.jac`` that :func:`mtlgrad.task_backward` left, which is the mean already.

    After each use, float64 (the rank int64), on the gradients' device, unread by the host (None before the first use,
    NaN between the layer's first forward and its backward; in a forward without gradients there is no use):

    Attributes:
        weights: [T], the tasks' weights B p.
        singular_values: [T], of G, descending.
        rank: []; below T where gradients are dependent or a task is absent. With ``scale="min"`` the update jumps when
            it changes.
        condition_number: [], the largest singular value over the smallest.

    Raises:
        ValueError: ``num_tasks`` below 1; an unknown ``scale``; a ``preference`` that is not as above, or all zero.
    """

    rtol = Constant()

    def __init__(
        self,
        num_tasks: int,
        preference: Tensor | Sequence[float] | None = None,
        scale: Scale = "min",
        scale_heads: bool = False,
        *,
        rtol: float | None = None,
        check_finite: bool = False,
        process_group: ProcessGroup | None = None,
    ):
        if scale not in SCALES:
            raise ValueError(f"AlignedMTL: scale: expected one of {', '.join(SCALES)}, found {scale!r}")
        super().__init__(num_tasks, None, check_finite=check_finite, process_group=process_group)
        self.scale: Scale = scale
        self.scale_heads = scale_heads
        self.rtol = num_tasks * EPS if rtol is None else rtol
        self._prefer(preference)

    def extra_repr(self) -> str:
        return f"num_tasks={self.num_tasks}, preference={self.preference}, scale={self.scale!r}"

    @property
    def singular_values(self) -> Tensor | None:
        return self._latest(self._result.singular_values)

    @property
    def rank(self) -> Tensor | None:
        return self._latest(self._result.rank)

    @property
    def condition_number(self) -> Tensor | None:
        return self._latest(self._result.condition_number)

    def _prepare(self, device: torch.device) -> None:
        super()._prepare(device)
        self._result: AlignResult = empty_result(self.num_tasks, device)
        self._weights = self._result.weights
        self._task_merge = ops.TaskMerge(self._result, self._preference)

    def _find(self, gram: Tensor, out: Tensor) -> None:
        ops.align(gram, self._preference, self.scale, self.rtol, out=self._result)

    def _merge(self, rows: list[Tensor] | ops.Stacked, world: World = ALONE) -> Any:
        """Merge in one call where there is one rank."""
        if world.size > 1:
            return super()._merge(rows, world)
        if isinstance(rows, list) and not self.check_finite:
            return self._task_merge(rows, self.scale, self.rtol)
        options: dict[str, Any] = {"check_finite": self.check_finite, "result": self._result}
        return ops.merge(rows, self._preference, self.scale, self.rtol, **options)[0]
