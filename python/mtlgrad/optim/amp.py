"""``torch.amp.GradScaler`` and ``.jac``."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..world.jacobians import still_averaged
from ..world.shards import is_sharded, local, shard_groups, sum_over

_METHOD = "_unscale_grads_"


class _WithJacobians:
    """An optimizer as GradScaler looks at it: every ``.jac`` is the gradient of one parameter more, and shards are
    ordinary tensors (torch's own operation takes DTensors alone, or none)."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.groups: dict[tuple[Any, ...], None] = {}  #: which ranks hold the shards
        seen = [p for group in optimizer.param_groups for p in group["params"]]
        self.param_groups = [{"params": [own for p in seen for own in self._owners(p)]}]

    def _owners(self, p: Tensor) -> Iterator[Tensor]:
        jacobian = getattr(p, "jac", None)
        if jacobian is not None:
            yield _carrier(local(jacobian))
        if not is_sharded(p):
            yield p
            return
        self.groups[shard_groups(p)] = None
        if p.grad is not None:
            yield _carrier(local(p.grad))


def _carrier(gradient: Tensor) -> Tensor:
    """A tensor whose gradient this is; it shares its memory."""
    carrier = gradient.detach()
    carrier.grad = gradient
    return carrier


@functools.cache
def reach_jacobians() -> None:
    """Makes ``GradScaler.unscale_``, and with it ``step``, see ``.jac`` of this package's optimizers: their infinities
    skip the step, on all ranks that hold shards alike, and they are divided by the scale.

    torch has no hook for it, so the method that walks over an optimizer's gradients is wrapped, once, when the first
    optimizer of this package is made, also in subclasses with one of their own (ShardedGradScaler), made before or
    later; other optimizers are passed on as they are.
    """
    kinds: list[Any] = [torch.amp.GradScaler]
    for kind in kinds:
        _wrap(kind)
        kinds += kind.__subclasses__()

    def made(kind: type[Any], /, **settings: Any) -> None:
        super(torch.amp.GradScaler, kind).__init_subclass__(**settings)
        _wrap(kind)

    torch.amp.GradScaler.__init_subclass__ = classmethod(made)  # type: ignore[assignment]


def _wrap(kind: Any) -> None:
    from .base import TaskOptimizer

    original = vars(kind).get(_METHOD)
    if original is None:
        return

    @functools.wraps(original)
    def unscale(self: Any, optimizer: Any, *arguments: Any, **settings: Any) -> Any:
        if not isinstance(optimizer, TaskOptimizer):
            return original(self, optimizer, *arguments, **settings)
        # Before: ranks that looked for infinities in what is their own would not skip the same steps.
        optimizer._check_averaged("step (GradScaler.unscale_)")
        seen = _WithJacobians(optimizer)
        with still_averaged(optimizer._jacobians()):
            found = original(self, seen, *arguments, **settings)
        for groups in seen.groups:
            for infinite in found.values():
                sum_over(infinite, groups).clamp_(max=1.0)
        return found

    setattr(kind, _METHOD, unscale)
