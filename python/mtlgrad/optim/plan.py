"""Which parameters take which rule in a step, and what torch.optim's part of it is to see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..jacobian import as_gradients


class Own(NamedTuple):
    """A parameter that this package's kernels update, and its gradients [T, *shape]."""

    parameter: Tensor
    jacobian: Tensor
    key: int  #: its number among all parameters, for random bits


class Plan(NamedTuple):
    """What a step does with the parameters of a group."""

    tasks: list[Own]  #: with moments per task
    single: list[Own]  #: T = 1: with one set of moments, of another dtype than the parameter's
    ordinary: list[tuple[Tensor, Tensor]]  #: left to torch.optim, with their gradients


def gradients_of(plans: Sequence[Plan]) -> Any:
    """What torch.optim is to see as ``.grad``: that of its own parameters, and none of the others."""
    wanted: dict[Tensor, Tensor | None] = {}
    for plan in plans:
        wanted |= {own.parameter: None for own in (*plan.tasks, *plan.single)}
        wanted |= dict(plan.ordinary)
    return as_gradients(wanted)


@contextmanager
def standing_still(groups: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Settings with which a step of torch.optim on zero gradients changes no parameter, and leaves moments as new."""
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
