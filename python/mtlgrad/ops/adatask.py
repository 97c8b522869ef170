"""One step of AdaTask's optimizers (Yang et al., AAAI 2023, arXiv 2211.15055): moments per task, one pass over memory.

``jacobians`` holds the T tasks' gradients of every parameter, as ``Parameter.jac`` does; every task t has moments of
its own, and a parameter moves by the sum of what torch.optim's optimizer of the same name would do for each task alone:

.. math:: \\theta \\leftarrow \\theta - \\eta \\sum_t w_t \\, \\frac{\\hat m_t}{\\sqrt{\\hat v_t} + \\epsilon}

for Adam; for RMSProp and AdaGrad with g_t in the place of m_t. Arguments that the three share:

Args:
    parameters: P tensors, float32, bfloat16 or float64; changed in place.
    jacobians: P tensors [T, *shape], typed like the parameter; T the same for all. Read only.
    moments (``exp_avgs``, ``square_avgs``, ...): P sequences of T tensors shaped like the parameter, float32 or
        bfloat16 (one of them for all; float64 for float64); changed in place.
    steps: P tensors [T] float32, how often each task's moments were updated; counted up here.
    task_weights: w, T numbers; ones if not given. They multiply the update: Adam undoes a factor on the gradient.
    weight_decay: added to each task's gradient times the parameter (Adam with ``decoupled``: taken off the parameter,
        once).
    maximize: goes up.
    present: [T] bool: tasks that take part. The others keep moments and step counts, and add nothing. None: all.
    squares: P tensors [T] float64, changed in place: AU, the exponentially decaying average, with ``square_decay``, of
        the squared updates of each task, summed over the parameter's elements.
    keys: P whole numbers: bfloat16 moments are rounded stochastically, without bias, with random bits that depend on
        key, task, step and element alone. None: to nearest.

Everything else is as in torch.optim; ``lr`` may be a tensor with one element, which the host does not read on CUDA.
Arithmetic is float32 (float64 for float64) and unrounded until it is stored. A pass reads T gradients, and reads and
writes moments and parameters, once: for Adam (5 T + 2) N elements. Parameters may lie in any dense order, channels_last
for one; what is not dense, or not in the parameter's order, is copied.

Errors: ``RuntimeError`` for shapes, dtypes and devices that do not fit. NaN and infinity are passed on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.adatask import Lists, Rate
from .adatask_checks import ADAGRAD, ADAM, RMSPROP
from .adatask_operators import adatask_op
from .checks import refuse, shape_of

__all__ = ["adatask_adagrad", "adatask_adam", "adatask_rmsprop"]


def adatask_adam(
    parameters: Sequence[Tensor],
    jacobians: Sequence[Tensor],
    exp_avgs: Lists,
    exp_avg_sqs: Lists,
    steps: Sequence[Tensor],
    *,
    max_exp_avg_sqs: Lists | None = None,
    lr: Rate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
    task_weights: Sequence[float] | None = None,
    present: Tensor | None = None,
    squares: Sequence[Tensor] | None = None,
    square_decay: float = 0.99,
    keys: Sequence[int] | None = None,
) -> None:
    """Adam (``decoupled``: AdamW; ``max_exp_avg_sqs``: amsgrad) with moments per task; see above for the arguments.

    Source: arXiv 2211.15055, section 4, with the moments of torch.optim.Adam (DESIGN 4.5).
    """
    op, tasks = "adatask_adam", _tasks("adatask_adam", parameters, jacobians)
    rate, on_device = _rate(op, lr)
    _call(
        list(parameters),
        list(jacobians),
        _flat(op, "exp_avgs", exp_avgs, tasks),
        _flat(op, "exp_avg_sqs", exp_avg_sqs, tasks),
        _flat(op, "max_exp_avg_sqs", max_exp_avg_sqs, tasks),
        [],
        list(steps),
        _list(squares),
        present,
        on_device,
        ADAM,
        [rate, *betas, eps, weight_decay, 0.0, square_decay],
        [max_exp_avg_sqs is not None, decoupled, maximize],
        _weights(op, task_weights, tasks),
        None if keys is None else list(keys),
    )


def adatask_rmsprop(
    parameters: Sequence[Tensor],
    jacobians: Sequence[Tensor],
    square_avgs: Lists,
    steps: Sequence[Tensor],
    *,
    grad_avgs: Lists | None = None,
    momentum_buffers: Sequence[Tensor] | None = None,
    lr: Rate = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    maximize: bool = False,
    task_weights: Sequence[float] | None = None,
    present: Tensor | None = None,
    squares: Sequence[Tensor] | None = None,
    square_decay: float = 0.99,
    keys: Sequence[int] | None = None,
) -> None:
    """RMSProp with a second moment per task; see above for the arguments.

    ``grad_avgs`` (``centered``) are per task, too. ``momentum_buffers`` are P tensors, typed like the moments: momentum
    is linear in the updates, so one buffer holds the sum of all tasks'. AU then counts updates before the momentum.

    Source: arXiv 2211.15055, section 4, with the moments of torch.optim.RMSprop (DESIGN 4.5).
    """
    op, tasks = "adatask_rmsprop", _tasks("adatask_rmsprop", parameters, jacobians)
    rate, on_device = _rate(op, lr)
    _call(
        list(parameters),
        list(jacobians),
        _flat(op, "grad_avgs", grad_avgs, tasks),
        _flat(op, "square_avgs", square_avgs, tasks),
        [],
        _list(momentum_buffers),
        list(steps),
        _list(squares),
        present,
        on_device,
        RMSPROP,
        [rate, momentum, alpha, eps, weight_decay, 0.0, square_decay],
        [grad_avgs is not None, False, maximize],
        _weights(op, task_weights, tasks),
        None if keys is None else list(keys),
    )


def adatask_adagrad(
    parameters: Sequence[Tensor],
    jacobians: Sequence[Tensor],
    state_sums: Lists,
    steps: Sequence[Tensor],
    *,
    lr: Rate = 1e-2,
    lr_decay: float = 0.0,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    maximize: bool = False,
    task_weights: Sequence[float] | None = None,
    present: Tensor | None = None,
    squares: Sequence[Tensor] | None = None,
    square_decay: float = 0.99,
    keys: Sequence[int] | None = None,
) -> None:
    """AdaGrad with a sum of squared gradients per task; see above for the arguments.

    Source: arXiv 2211.15055, section 4, with the state of torch.optim.Adagrad (DESIGN 4.5).
    """
    op, tasks = "adatask_adagrad", _tasks("adatask_adagrad", parameters, jacobians)
    rate, on_device = _rate(op, lr)
    _call(
        list(parameters),
        list(jacobians),
        [],
        _flat(op, "state_sums", state_sums, tasks),
        [],
        [],
        list(steps),
        _list(squares),
        present,
        on_device,
        ADAGRAD,
        [rate, 0.0, 0.0, eps, weight_decay, lr_decay, square_decay],
        [False, False, maximize],
        _weights(op, task_weights, tasks),
        None if keys is None else list(keys),
    )


def _call(parameters: list[Tensor], *arguments: object) -> None:
    if parameters:
        adatask_op(parameters, *arguments)


def _tasks(op: str, parameters: Sequence[Tensor], jacobians: Sequence[Tensor]) -> int:
    """T, and what the operator would not be asked about."""
    _check_dense(op, "parameters", parameters)
    _check_dense(op, "jacobians", jacobians)
    if not jacobians:
        return 1
    if jacobians[0].dim() == 0 or jacobians[0].shape[0] == 0:
        refuse(f"{op}: jacobians: expected [T, *shape] with at least one task, found {shape_of(jacobians[0])}")
    return jacobians[0].shape[0]


def _check_dense(op: str, name: str, tensors: Sequence[Tensor], each: int = 1) -> None:
    for i, tensor in enumerate(tensors):
        if tensor.layout != torch.strided:
            refuse(f"{op}: {name}: expected a dense tensor for parameter {i // each}, found {tensor.layout}")


def _flat(op: str, name: str, lists: Lists | None, tasks: int) -> list[Tensor]:
    for p, row in enumerate(lists or ()):
        if len(row) != tasks:
            refuse(f"{op}: {name}: expected {tasks} tensors, one a task, for parameter {p}, found {len(row)}")
    tensors = [] if lists is None else [tensor for row in lists for tensor in row]
    _check_dense(op, name, tensors, tasks)
    return tensors


def _list(tensors: Sequence[Tensor] | None) -> list[Tensor]:
    return [] if tensors is None else list(tensors)


def _rate(op: str, lr: Rate) -> tuple[float, Tensor | None]:
    """A number, or a tensor that the host must not wait for."""
    if not isinstance(lr, Tensor):
        return float(lr), None
    if lr.numel() != 1:
        refuse(f"{op}: lr: expected a number or a tensor with one, found shape {shape_of(lr)}")
    if lr.device.type == "cpu" and not torch.compiler.is_compiling():
        return float(lr), None
    return 0.0, lr.detach().to(torch.float64).reshape(1)


def _weights(op: str, weights: Sequence[float] | None, tasks: int) -> list[float]:
    if weights is not None and len(weights) != tasks:
        refuse(f"{op}: task_weights: expected {tasks} numbers, one a task, found {len(weights)}")
    return [1.0] * tasks if weights is None else [float(w) for w in weights]
