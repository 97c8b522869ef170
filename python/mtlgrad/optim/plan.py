"""Which parameters take which rule in a step, and what torch.optim's part of it is to see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..jacobian import as_gradients


class TaskParameters(NamedTuple):
    """Parameters that this package's kernels update."""

    parameters: list[Tensor]
    jacobians: list[Tensor]  #: their gradients [T, *shape]
    keys: list[int]  #: their numbers among all parameters, for random bits

    def by_device(self) -> list[TaskParameters]:
        devices = [p.device for p in self.parameters]
        if len(set(devices)) <= 1:
            return [self] * bool(devices)
        places = {device: [i for i, other in enumerate(devices) if other == device] for device in devices}
        return [TaskParameters(*([own[i] for i in some] for own in self)) for some in places.values()]  # type: ignore[arg-type]


class StepPlan(NamedTuple):
    """What a step does with the parameters of a group."""

    tasks: TaskParameters  #: with moments per task
    single: TaskParameters  #: T = 1: with one set of moments, of another dtype than the parameter's
    ordinary: list[tuple[Tensor, Tensor]]  #: left to torch.optim, with their gradients


def gradients_of(plans: Sequence[StepPlan]) -> Any:
    """Show torch.optim as ``.grad`` that of its own parameters, and none of the others."""
    wanted: dict[Tensor, Tensor | None] = {}
    for plan in plans:
        wanted |= {p: None for p in (*plan.tasks.parameters, *plan.single.parameters) if p.grad is not None}
        wanted |= dict(plan.ordinary)
    return as_gradients(wanted)


@contextmanager
def standing_still(groups: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Choose settings with which a step of torch.optim on zero gradients moves no parameter and leaves moments new."""
    # maximize: a gradient of -0.0 would change the sign of a parameter that is zero.
    still = {"weight_decay": 0.0, "eps": 1.0, "maximize": False}
    kept = [{name: group[name] for name in ("lr", *still)} for group in groups]
    for group in groups:
        lr = group["lr"]
        group.update(lr=torch.zeros_like(lr) if isinstance(lr, Tensor) else 0.0, **still)
    try:
        yield
    finally:
        for group, settings in zip(groups, kept, strict=True):
            group.update(settings)
