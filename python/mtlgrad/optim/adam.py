"""AdaTask with Adam and AdamW."""

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


class _Adam(TaskOptimizer):
    operation, moments = adatask.ADAM, adatask.AdamMoments
    fields = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    decoupled = False

    def _names(self, group: dict[str, Any]) -> list[str]:
        return ["exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * bool(group["amsgrad"])]

    def _rule(self, group: dict[str, Any]) -> adatask.Adam:
        decoupled = self.decoupled or group.get("decoupled_weight_decay", False)
        beta1, beta2 = map(float, group["betas"])
        return adatask.Adam(beta1, beta2, decoupled)


class AdaTaskAdam(_Adam, torch.optim.Adam):
    r"""Adam with first and second moments of each task's own: no task's gradients set the step size of another's.

    .. math:: m_t \leftarrow \beta_1 m_t + (1 - \beta_1) g_t, \quad v_t \leftarrow \beta_2 v_t + (1 - \beta_2) g_t^2,
        \quad \theta \leftarrow \theta - \eta \sum_t w_t \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon}

    (Yang et al., AAAI 2023, arXiv 2211.15055, section 4.) Parameters with ``.jac`` [T, *shape]
    (:func:`mtlgrad.task_backward`, or TorchJD) take this rule, in one pass over memory; all others, such as heads, and
    all if T = 1, take torch.optim.Adam's own, bit for bit. It is a ``torch.optim.Adam``: schedulers, hooks, closures,
    GradScaler and checkpoints work as with that.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, foreach, maximize, capturable: as in torch.optim.Adam
            (``foreach``: for ordinary parameters). ``weight_decay`` is added to each task's gradient.
        num_tasks: T.
        task_weights: w, T numbers from 0, on the update; ones if not given. (A factor on a loss hardly matters to
            Adam.)
        missing: a task whose ``.jac`` is zero in all parameters is missing from the step. ``"decay"``: nothing special,
            its moments decay, and its momentum still moves the parameters. ``"still"``: its moments and step count stay
            as they are, and it adds nothing; T gradients are read once more to find out.
        moments_dtype: ``"float32"`` or ``"bfloat16"``, also of ordinary parameters' moments (which this package's
            kernels then update, where it is not the parameter's dtype); None is float32. float64 parameters have
            float64 moments.
        stochastic_rounding: bfloat16 moments are rounded up or down at random, without bias. Rounded to nearest, an
            average with beta2 above 0.998 would never fall again.
        dominance_decay: of the averages behind :meth:`dominance`, which cost no pass over memory; None: none.
        check_finite: ``ValueError`` for NaN or infinity in a gradient, naming the task, before anything is changed;
            reads T gradients once more, and waits for the device.
        max_norm: what gradients are clipped to in each step: every task's over all parameters with ``.jac``
            (:func:`clip_task_grad_norm_`), and the others' together (``torch.nn.utils.clip_grad_norm_``). For trainers
            that clip by themselves, which see ``.grad`` alone: tell them not to.
        process_group: the ranks that train together; all, if not given and torch.distributed is initialised.
            ``step`` refuses ``.jac`` that is not their mean (:func:`mtlgrad.task_backward` leaves it so; for others'
            there is :func:`mtlgrad.distributed.average_jacobians`): parameters would drift apart, unseen.

    Everything but ``num_tasks``, ``max_norm`` and ``process_group`` may differ from group to group.

    Parameters that ``fully_shard`` shards: every rank updates its shards, and moments are sharded like the parameter.
    Where that is asked for, one all-reduce of T float64 a parameter (``dominance_decay``) and of T a group each
    (``missing="still"``, ``check_finite``) makes the sums those of all shards. Random bits follow from the place in
    the shard and its number: a run that goes on with another number of ranks has others.

    State per parameter with ``.jac``: ``exp_avg_0`` ... ``exp_avg_{T-1}``, ``exp_avg_sq_0`` ... (amsgrad:
    ``max_exp_avg_sq_0`` ...), each like the parameter; ``step`` [T] and ``update_square`` [T].

    Raises:
        ValueError: a setting out of its range; in ``step``, ``.jac`` that does not fit T or its parameter, or a
            parameter that comes with ``.jac`` once and with ``.grad`` alone another time.
    """

    ordinary = torch.optim.Adam

    def __init__(
        self,
        params: Any,
        lr: Rate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
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
        rule = (lr, betas, eps, weight_decay, amsgrad)
        super().__init__(params, *rule, task_options=options, process_group=process_group, **flags)


class AdaTaskAdamW(_Adam, torch.optim.AdamW):
    """:class:`AdaTaskAdam` with decoupled weight decay: ``lr * weight_decay`` times a parameter is taken off it, once.

    The ordinary rule is torch.optim.AdamW's; the state is that of :class:`AdaTaskAdam`.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, num_tasks, task_weights, missing, moments_dtype,
            stochastic_rounding, dominance_decay, check_finite, max_norm, process_group: as in :class:`AdaTaskAdam`.

    Raises:
        ValueError: as :class:`AdaTaskAdam`.
    """

    ordinary = torch.optim.AdamW
    decoupled = True

    def __init__(
        self,
        params: Any,
        lr: Rate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
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
        rule = (lr, betas, eps, weight_decay, amsgrad)
        super().__init__(params, *rule, task_options=options, process_group=process_group, **flags)
