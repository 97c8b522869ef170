"""AdaTask with AdaGrad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops import adatask
from ..reference.adatask import Rate
from .base import TaskOptimizer
from .options import TaskOptions

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class AdaTaskAdagrad(TaskOptimizer, torch.optim.Adagrad):
    r"""AdaGrad with a sum of squared gradients of each task's own.

    .. math:: v_t \leftarrow v_t + g_t^2,
        \quad \theta \leftarrow \theta - \frac{\eta}{1 + (k - 1) \eta_d} \sum_t w_t \frac{g_t}{\sqrt{v_t} + \epsilon}

    at step k (Yang et al., AAAI 2023, arXiv 2211.15055, section 4), with :math:`\eta_d` ``lr_decay``.

    Args:
        params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, foreach, maximize: as in
            torch.optim.Adagrad; ``weight_decay`` is added to each task's gradient, every task's sum begins with
            ``initial_accumulator_value``.
        num_tasks, task_weights, missing, moments_dtype, stochastic_rounding, dominance_decay, check_finite, max_norm,
            process_group: as in :class:`mtlgrad.optim.AdaTaskAdam`, which also says which parameters take which rule.

    State per parameter with ``.jac``: ``sum_0`` ... ``sum_{T-1}``, each like the parameter; ``step`` [T] and
    ``update_square`` [T]. Unlike torch.optim.Adagrad's it is made at a parameter's first step.

    Raises:
        ValueError: as :class:`mtlgrad.optim.AdaTaskAdam`.
    """

    ordinary = torch.optim.Adagrad
    operation, moments, fields = adatask.ADAGRAD, adatask.AdagradMoments, ("sum",)
    takes_sparse = True

    def __init__(
        self,
        params: Any,
        lr: Rate = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
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
        rule = (lr, lr_decay, weight_decay, initial_accumulator_value, eps)
        super().__init__(params, *rule, task_options=options, process_group=process_group, **flags)
        # Which parameters come with .jac is not known yet; torch.optim.Adagrad has made one sum for each.
        self.state.clear()

    def share_memory(self) -> None:
        """Move the state to shared memory, as in torch.optim.

        Raises:
            RuntimeError: before the first step, when there is none.
        """
        if not self.state:
            raise RuntimeError("AdaTaskAdagrad.share_memory: expected state, found none: it is made at the first step")
        for state in self.state.values():
            for tensor in state.values():
                tensor.share_memory_()

    def _names(self, group: dict[str, Any]) -> list[str]:
        return ["sum"]

    def _start(self, group: dict[str, Any]) -> float:
        return float(group["initial_accumulator_value"])

    def _before_ordinary(self, group: dict[str, Any], p: Tensor) -> None:
        super()._before_ordinary(group, p)
        if not self.state[p]:
            self.state[p]["step"] = torch.tensor(0.0)
            self._make_state(group, [p], None)

    def _rule(self, group: dict[str, Any]) -> adatask.Adagrad:
        return adatask.Adagrad(float(group["lr_decay"]))
