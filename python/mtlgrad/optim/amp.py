"""``torch.amp.GradScaler`` and ``.jac``."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


class _WithJacobians:
    """An optimizer as GradScaler looks at it, with every ``.jac`` as the gradient of one parameter more."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        carriers = [
            _carrier(p.jac)
            for group in optimizer.param_groups
            for p in group["params"]
            if getattr(p, "jac", None) is not None
        ]
        self.param_groups = [*optimizer.param_groups, {"params": carriers}]


def _carrier(jacobian: Tensor) -> Tensor:
    """A tensor whose gradient the Jacobian is; it shares its memory."""
    carrier = jacobian.detach()
    carrier.grad = jacobian
    return carrier


@functools.cache
def reach_jacobians() -> None:
    """Makes ``GradScaler.unscale_``, and with it ``step``, see ``.jac`` of this package's optimizers: their infinities
    skip the step, and they are divided by the scale.

    torch has no hook for it, so the method that walks over an optimizer's gradients is wrapped, once, when the first
    optimizer of this package is made; other optimizers are passed on as they are.
    """
    from .base import TaskOptimizer

    original = torch.amp.GradScaler._unscale_grads_

    @functools.wraps(original)
    def unscale(self: Any, optimizer: torch.optim.Optimizer, *arguments: Any, **settings: Any) -> Any:
        seen = _WithJacobians(optimizer) if isinstance(optimizer, TaskOptimizer) else optimizer
        return original(self, seen, *arguments, **settings)  # type: ignore[arg-type]

    torch.amp.GradScaler._unscale_grads_ = unscale  # type: ignore[method-assign]
