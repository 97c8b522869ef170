"""One step of AdaTask's optimizers (arXiv 2211.15055), in plain PyTorch.

Every task t has moments of its own for every parameter; with g_t its gradient, the parameter moves by the sum of what
torch.optim's optimizer of the same name would do for each task alone:

- Adam: m_t <- b1 m_t + (1 - b1) g_t, v_t <- b2 v_t + (1 - b2) g_t^2,
  theta <- theta - lr sum_t w_t mhat_t / (sqrt(vhat_t) + eps)
- RMSProp: v_t <- a v_t + (1 - a) g_t^2, theta <- theta - lr sum_t w_t g_t / (sqrt(v_t) + eps)
- AdaGrad: v_t <- v_t + g_t^2, theta <- theta - lr / (1 + (k - 1) lr_decay) sum_t w_t g_t / (sqrt(v_t) + eps)

See :mod:`mtlgrad.ops.adatask` for the arguments. All lists are per parameter; everything is changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Lists = Sequence[Sequence[Tensor]]  # per parameter T tensors like it
Rate = float | Tensor

_MASK = 0xFFFFFFFF


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
    """Take a step, as :func:`mtlgrad.ops.adatask_adam`.

    Args:
        parameters, jacobians, exp_avgs, exp_avg_sqs, steps, max_exp_avg_sqs, lr, betas, eps, weight_decay, decoupled,
            maximize, task_weights, present, squares, square_decay, keys: as there.
    """
    for p, parameter in enumerate(parameters):
        step = _Step(parameter, jacobians[p], steps[p], present, task_weights, None if keys is None else keys[p])
        theta = step.wide(parameter)
        total = torch.zeros_like(theta)
        for t, weight in step.tasks():
            g = _gradient(step.wide(jacobians[p][t]), theta, 0.0 if decoupled else weight_decay, maximize)
            m = step.wide(exp_avgs[p][t]).lerp(g, 1.0 - betas[0])
            v = (step.wide(exp_avg_sqs[p][t]) * betas[1]).addcmul(g, g, value=1.0 - betas[1])
            step.store(exp_avgs[p][t], m, t)
            step.store(exp_avg_sqs[p][t], v, t, upper=True)
            if max_exp_avg_sqs is not None:
                v = torch.maximum(step.wide(max_exp_avg_sqs[p][t]), v)
                step.store(max_exp_avg_sqs[p][t], v, t, upper=True)
            count = steps[p][t].double()
            denominator = v.sqrt() / (1.0 - betas[1] ** count).sqrt() + eps
            update = m * (-lr * weight / (1.0 - betas[0] ** count)) / denominator
            total += update
            step.add_square(t, update)
        keep = 1.0 - lr * weight_decay if decoupled else 1.0
        parameter.copy_(theta * keep + total)
        step.finish(None if squares is None else squares[p], square_decay)


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
    """Take a step, as :func:`mtlgrad.ops.adatask_rmsprop`.

    Args:
        parameters, jacobians, square_avgs, steps, grad_avgs, momentum_buffers, lr, alpha, eps, weight_decay, momentum,
            maximize, task_weights, present, squares, square_decay, keys: as there.
    """
    for p, parameter in enumerate(parameters):
        step = _Step(parameter, jacobians[p], steps[p], present, task_weights, None if keys is None else keys[p])
        theta = step.wide(parameter)
        total = torch.zeros_like(theta)
        for t, weight in step.tasks():
            g = _gradient(step.wide(jacobians[p][t]), theta, weight_decay, maximize)
            v = (step.wide(square_avgs[p][t]) * alpha).addcmul(g, g, value=1.0 - alpha)
            step.store(square_avgs[p][t], v, t, upper=True)
            if grad_avgs is not None:
                mean = step.wide(grad_avgs[p][t]).lerp(g, 1.0 - alpha)
                step.store(grad_avgs[p][t], mean, t)
                v = v.addcmul(mean, mean, value=-1.0).clamp_min(0.0)  # below zero by rounding alone
            direction = weight * g / (v.sqrt() + eps)
            total += direction
            step.add_square(t, lr * direction)
        if momentum_buffers is not None:
            total += step.wide(momentum_buffers[p]) * momentum
            step.store(momentum_buffers[p], total, len(jacobians[p]))
        parameter.copy_(theta - lr * total)
        step.finish(None if squares is None else squares[p], square_decay)


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
    """Take a step, as :func:`mtlgrad.ops.adatask_adagrad`.

    Args:
        parameters, jacobians, state_sums, steps, lr, lr_decay, eps, weight_decay, maximize, task_weights, present,
            squares, square_decay, keys: as there.
    """
    for p, parameter in enumerate(parameters):
        step = _Step(parameter, jacobians[p], steps[p], present, task_weights, None if keys is None else keys[p])
        theta = step.wide(parameter)
        total = torch.zeros_like(theta)
        for t, weight in step.tasks():
            g = _gradient(step.wide(jacobians[p][t]), theta, weight_decay, maximize)
            v = step.wide(state_sums[p][t]).addcmul(g, g)
            step.store(state_sums[p][t], v, t, upper=True)
            rate = lr / (1.0 + (steps[p][t].double() - 1.0) * lr_decay)
            update = g * (-rate * weight) / (v.sqrt() + eps)
            total += update
            step.add_square(t, update)
        parameter.copy_(theta + total)
        step.finish(None if squares is None else squares[p], square_decay)


def _gradient(gradient: Tensor, theta: Tensor, weight_decay: float, maximize: bool) -> Tensor:
    gradient = -gradient if maximize else gradient
    return gradient + weight_decay * theta if weight_decay else gradient


class _Step:
    """What the three have in common for one parameter: counting steps, rounding, and the average squared updates."""

    def __init__(
        self,
        parameter: Tensor,
        jacobian: Tensor,
        steps: Tensor,
        present: Tensor | None,
        weights: Sequence[float] | None,
        key: int | None,
    ):
        self.dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        self.weights = [1.0] * len(jacobian) if weights is None else weights
        self.present = None if present is None else present.tolist()
        steps += 1.0 if present is None else present.to(steps.dtype)
        self.sums = torch.zeros(len(jacobian), dtype=torch.float64, device=parameter.device)
        self.random = None if key is None else _random_bits(parameter, key, steps)

    def tasks(self) -> Iterator[tuple[int, float]]:
        """Those that take part, with their weights."""
        for t, weight in enumerate(self.weights):
            if self.present is None or self.present[t]:
                yield t, weight

    def wide(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype)

    def add_square(self, task: int, update: Tensor) -> None:
        self.sums[task] = update.double().square().sum()

    def finish(self, squares: Tensor | None, decay: float) -> None:
        if squares is not None:
            squares.mul_(decay).add_(self.sums, alpha=1.0 - decay)

    def store(self, moment: Tensor, value: Tensor, stream: int, *, upper: bool = False) -> None:
        if self.random is None or moment.dtype != torch.bfloat16:
            moment.copy_(value)
            return
        bits = self.random(stream)
        moment.copy_(round_stochastically(value, bits >> 16 if upper else bits & 0xFFFF))


def round_stochastically(value: Tensor, bits: Tensor) -> Tensor:
    """float32 to bfloat16, up or down with the probabilities that make it unbiased; bits int64 in [0, 2^16)."""
    rounded = ((value.view(torch.int32).long() & _MASK) + bits) & 0xFFFF0000
    as_int = torch.where(rounded >= 1 << 31, rounded - (1 << 32), rounded).int()
    return torch.where(value.isnan(), value, as_int.view(torch.float32)).to(torch.bfloat16)


def _random_bits(parameter: Tensor, key: int, steps: Tensor) -> Callable[[int], Tensor]:
    """stream -> 32 bits for every element, as csrc/math/adatask.h makes them; elements are counted as they lie."""
    count = parameter.numel()
    index = torch.empty_like(parameter, dtype=torch.int64)
    torch.as_strided(index, (count,), (1,)).copy_(torch.arange(count, device=parameter.device))
    base = _hash(_hash(0, key >> 32 & _MASK), key & _MASK)
    counts = [*steps.tolist(), float(steps.double().sum())]

    def bits(stream: int) -> Tensor:
        seed = _hash(_hash(base, stream), int(counts[stream]))
        x = (index * 0x9E3779B9 + seed) & _MASK
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
        x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
        return x ^ (x >> 16)

    return bits


def _hash(stream: int, index: int) -> int:
    x = (index * 0x9E3779B9 + stream) & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
