"""AdaTask with RMSProp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..ops import adatask
from ..reference.adatask import Rate
from .base import TaskOptimizer
from .options import TaskOptions

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class AdaTaskRMSprop(TaskOptimizer, torch.optim.RMSprop):
    r"""RMSProp with a second moment of each task's own.

    .. math:: v_t \leftarrow \alpha v_t + (1 - \alpha) g_t^2,
        \quad \theta \leftarrow \theta - \eta \sum_t w_t \frac{g_t}{\sqrt{v_t} + \epsilon}

    (Yang et al., AAAI 2023, arXiv 2211.15055, section 4.) With ``centered`` the square of each task's average gradient
    is taken off v_t. ``momentum`` is linear in the updates, so that one buffer holds the sum of all tasks'; what
    :meth:`dominance` counts are the updates that go into it.

    Args:
        params, lr, alpha, eps, weight_decay, momentum, centered, capturable, foreach, maximize: as in
            torch.optim.RMSprop; ``weight_decay`` is added to each task's gradient.
        num_tasks, task_weights, missing, moments_dtype, stochastic_rounding, dominance_decay, check_finite, max_norm,
            process_group: as in :class:`mtlgrad.optim.AdaTaskAdam`, which also says which parameters take which rule.

    State per parameter with ``.jac``: ``square_avg_0`` ... ``square_avg_{T-1}`` (centered: ``grad_avg_0`` ...) and
    ``momentum_buffer``, each like the parameter; ``step`` [T] and ``update_square`` [T].

    Raises:
        ValueError: as :class:`mtlgrad.optim.AdaTaskAdam`.
    """

    ordinary = torch.optim.RMSprop
    operation, moments = adatask.RMSPROP, adatask.RMSpropMoments
    fields = ("square_avg", "grad_avg", "momentum_buffer")
    shared_fields = ("momentum_buffer",)

    def __init__(
        self,
        params: Any,
        lr: Rate = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        num_tasks: int,
        task_weights: Sequence[float] | None = None,
        missing: str = "decay",
        moments_dtype: str | torch.dtype | None = None,
        stochastic_rounding: bool = True,
        dominance_decay: float | None = 0.99,
        check_finite: bool = False,
        max_norm: float | None = None,
        process_group: ProcessGroup | None = None,
        **flags: Any,
    ):
        options = TaskOptions(
            num_tasks,
            task_weights,
            missing,
            moments_dtype,
            stochastic_rounding,
            dominance_decay,
            check_finite,
            max_norm,
        )
        rule = (lr, alpha, eps, weight_decay, momentum, centered)
        super().__init__(params, *rule, task_options=options, process_group=process_group, **flags)

    def _names(self, group: dict[str, Any]) -> list[str]:
        momentum = ["momentum_buffer"] * bool(group["momentum"] > 0.0)
        return ["square_avg", *["grad_avg"] * bool(group["centered"]), *momentum]

    def _rule(self, group: dict[str, Any]) -> adatask.RMSprop:
        return adatask.RMSprop(float(group["alpha"]), float(group["momentum"]))
