"""The published step of AdaTask (Yang et al., AAAI 2023, arXiv 2211.15055), a literal transcription: our own words.

For each shared parameter and, within it, each task, the moments and then the parameter are updated by the tensor
operations of torch.optim's plain loop, so that each of them passes over memory. The published code has Adam alone; its
RMSProp and AdaGrad are written here in the same way. Two departures, both in this peer's favour: gradients come as T
tensors a parameter (the published code clones them from ``.grad`` after each task's backward pass), and the step count
is one number instead of one a parameter.

`by_torch` does the same by T calls of torch.optim's own steps over all parameters, foreach or fused: a fairer peer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.adagrad import adagrad as torch_adagrad
from torch.optim.adam import adam as torch_adam
from torch.optim.rmsprop import rmsprop as torch_rmsprop

STEPS: dict[str, Any] = {"adam": torch_adam, "rmsprop": torch_rmsprop, "adagrad": torch_adagrad}
Lists = Sequence[Sequence[Tensor]]


# In the order of the published loops: lists have T tensors a parameter.


def adam(
    parameters: Sequence[Tensor],
    gradients: Lists,
    exp_avgs: Lists,
    exp_avg_sqs: Lists,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    """`step` counts this one, from 1."""
    b1, b2 = betas
    for p, parameter in enumerate(parameters):
        for t, gradient in enumerate(gradients[p]):
            correction1, correction2 = 1 - b1**step, 1 - b2**step
            exp_avgs[p][t].mul_(b1).add_(gradient, alpha=1 - b1)
            exp_avg_sqs[p][t].mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
            denominator = (exp_avg_sqs[p][t].sqrt() / math.sqrt(correction2)).add_(eps)
            parameter.addcdiv_(exp_avgs[p][t], denominator, value=-lr / correction1)


def rmsprop(
    parameters: Sequence[Tensor],
    gradients: Lists,
    square_avgs: Lists,
    step: int,
    lr: float = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
) -> None:
    for p, parameter in enumerate(parameters):
        for t, gradient in enumerate(gradients[p]):
            square_avgs[p][t].mul_(alpha).addcmul_(gradient, gradient, value=1 - alpha)
            parameter.addcdiv_(gradient, square_avgs[p][t].sqrt().add_(eps), value=-lr)


def adagrad(
    parameters: Sequence[Tensor], gradients: Lists, sums: Lists, step: int, lr: float = 1e-2, eps: float = 1e-10
) -> None:
    for p, parameter in enumerate(parameters):
        for t, gradient in enumerate(gradients[p]):
            sums[p][t].addcmul_(gradient, gradient, value=1)
            parameter.addcdiv_(gradient, sums[p][t].sqrt().add_(eps), value=-lr)


def by_torch(
    rule: str, parameters: list[Tensor], gradients: Lists, moments: Sequence[Lists], steps: Lists, **form: bool
) -> None:
    """The same, task after task; `gradients`, each of `moments`, and `steps` have P tensors a task."""
    options: dict[str, Any] = {"weight_decay": 0.0, "maximize": False, **form}
    for t, (rows, counts) in enumerate(zip(gradients, steps, strict=True)):
        own = [list(moment[t]) for moment in moments]
        start = (parameters, list(rows), *own)
        if rule == "adam":
            rates: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
            STEPS[rule](*start, [], list(counts), amsgrad=False, **rates, **options)
        elif rule == "rmsprop":
            rates = {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "momentum": 0.0}
            STEPS[rule](*start, [], [], list(counts), centered=False, **rates, **options)
        else:
            STEPS[rule](*start, list(counts), lr=1e-2, lr_decay=0.0, eps=1e-10, **options)
