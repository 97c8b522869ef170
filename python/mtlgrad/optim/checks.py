"""What a step refuses: gradients that do not fit, or, where a group asks for it, are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops

if TYPE_CHECKING:
    from .base import Plan

Pairs = Sequence[tuple[dict[str, Any], "Plan"]]  # the groups and what a step does with them


def check_jacobian(where: str, p: Tensor, jacobian: Tensor, tasks: int) -> None:
    if not isinstance(jacobian, Tensor) or jacobian.shape != (tasks, *p.shape):
        found = list(jacobian.shape) if isinstance(jacobian, Tensor) else type(jacobian).__name__
        raise ValueError(
            f"{where}: expected .jac of shape {[tasks, *p.shape]}, one row for each of num_tasks={tasks}, found {found}"
            "; clear it with zero_grad(), or make the optimizer with as many tasks as there are losses"
        )
    for what in ("device", "dtype"):
        if getattr(jacobian, what) != getattr(p, what):
            raise ValueError(
                f"{where}: expected .jac on the parameter's {what}, {getattr(p, what)}, found {getattr(jacobian, what)}"
            )
    if tasks > 1 and p.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(
            f"{where}: expected float32, bfloat16 or float64, found {p.dtype}; keep float32 parameters and use autocast"
        )
    if jacobian.layout != torch.strided:
        raise ValueError(f"{where}: expected a dense .jac, found {jacobian.layout}; use .to_dense()")


def _sizes(plan: Plan, device: torch.device) -> Tensor:
    """[T] float64, zero if all of a task's gradients on a device are, infinite or NaN if one is."""
    rows = [own.jacobian for own in plan.tasks if own.parameter.device == device]
    if all(row.dtype != torch.float64 for row in rows):
        return ops.gram(ops.Stacked(rows)).diagonal()
    # Squares of float64 may overflow or underflow.
    largest = [row.reshape(len(row), -1).abs().amax(1).double() for row in rows if row.numel()]
    return torch.stack([torch.zeros(len(rows[0]), dtype=torch.float64, device=device), *largest]).amax(0)


def _devices(plan: Plan) -> list[torch.device]:
    return list(dict.fromkeys(own.parameter.device for own in plan.tasks))


def check_gradients(name: str, pairs: Pairs) -> None:
    """ValueError that names the task, or the parameter, for NaN and infinity. Reads from the devices."""
    for number, (group, plan) in enumerate(pairs):
        if not group["check_finite"]:
            continue
        for device in _devices(plan):
            finite = _sizes(plan, device).isfinite().tolist()
            if not all(finite):
                raise ValueError(
                    f"{name}.step: group {number}: expected finite gradients, found NaN or infinity in .jac of task "
                    f"{finite.index(False)}; look at its loss, or skip the step (torch.amp.GradScaler does)"
                )
        places = {p: i for i, p in enumerate(group["params"])}
        for p, gradient in [*plan.ordinary, *((own.parameter, own.jacobian) for own in plan.single)]:
            if not bool(gradient.to_dense().isfinite().all()):
                raise ValueError(
                    f"{name}.step: parameter {places[p]} of group {number}: expected a finite .grad, found NaN or "
                    "infinity"
                )


def present_tasks(pairs: Pairs) -> dict[torch.device, Tensor]:
    """[T] bool on each device: the tasks whose gradients are not zero throughout; nothing if no group asks for it."""
    if not any(group["missing"] == "still" and plan.tasks for group, plan in pairs):
        return {}
    places = [(plan, device) for _, plan in pairs for device in _devices(plan)]
    found = [_sizes(plan, device) != 0.0 for plan, device in places]
    return {device: torch.stack([f.to(device) for f in found]).any(0) for _, device in places}
