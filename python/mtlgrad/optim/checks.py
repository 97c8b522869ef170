"""What a step refuses: gradients that do not fit, or, where a group asks for it, are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..world.shards import check_layout, local, shard_groups, sum_over

if TYPE_CHECKING:
    from .plan import StepPlan

_SHAPE, _DTYPE, _DEVICE, _LAYOUT = map(attrgetter, ("shape", "dtype", "device", "layout"))

TASK_DTYPES = {torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.complex128}

Pairs = Sequence[tuple[dict[str, Any], "StepPlan"]]  # the groups and what a step does with them
Place = tuple[torch.device, tuple[Any, ...]]  # where tensors lie, and which ranks have the rest of them


def all_fit(parameters: Sequence[Tensor], jacobians: Sequence[Any], tasks: int) -> bool:
    """Whether :func:`check_jacobian` would refuse none, found out fast; False where it is to look itself."""
    return (
        set(map(type, jacobians)) <= {Tensor}
        and set(map(type, parameters)) <= {Tensor, torch.nn.Parameter}
        and list(map(_SHAPE, jacobians)) == [(tasks, *shape) for shape in map(_SHAPE, parameters)]
        and (dtypes := list(map(_DTYPE, jacobians))) == list(map(_DTYPE, parameters))
        and set(dtypes) <= TASK_DTYPES
        and list(map(_DEVICE, jacobians)) == list(map(_DEVICE, parameters))
        and set(map(_LAYOUT, jacobians)) <= {torch.strided}
    )


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
    if tasks > 1 and p.dtype not in TASK_DTYPES:
        raise ValueError(
            f"{where}: expected float32, bfloat16, float64, complex64 or complex128, found {p.dtype}; keep float32 "
            "parameters and use autocast"
        )
    if jacobian.layout != torch.strided:
        raise ValueError(f"{where}: expected a dense .jac, found {jacobian.layout}; use .to_dense()")
    check_layout(where, p, jacobian)


def _place(p: Tensor) -> Place:
    return p.device, shard_groups(p)


def _marks(rows: list[Tensor]) -> Tensor:
    """[T] float64: zero if all of a task's gradients are, NaN if one is not finite, else one. Marks may be added."""
    if {row.dtype for row in rows}.isdisjoint((torch.float64, torch.complex128)):
        sizes = ops.gram(ops.Stacked(rows)).diagonal()
    else:
        # Squares of float64 may overflow or underflow.
        largest = [row.reshape(len(row), -1).abs().amax(1).double() for row in rows if row.numel()]
        zero = torch.zeros(len(rows[0]), dtype=torch.float64, device=rows[0].device)
        sizes = torch.stack([zero, *largest]).amax(0)
    return sizes.ne(0.0).double().where(sizes.isfinite(), torch.nan)


def _task_marks(plans: Sequence[StepPlan]) -> list[dict[torch.device, Tensor]]:
    """For each plan and device marks [T], of all ranks' shards: one all-reduce of T float64 a plan."""
    parts: dict[Place, list[tuple[int, Tensor]]] = {}
    for i, plan in enumerate(plans):
        rows: dict[Place, list[Tensor]] = {}
        for p, jacobian in zip(plan.tasks.parameters, plan.tasks.jacobians):
            rows.setdefault(_place(p), []).append(local(jacobian))
        for place, some in rows.items():
            parts.setdefault(place, []).append((i, _marks(some)))
    found: list[dict[torch.device, Tensor]] = [{} for _ in plans]
    for (device, groups), marks in parts.items():
        summed = sum_over(torch.stack([mark for _, mark in marks]), groups)
        for (i, _), row in zip(marks, summed, strict=True):
            found[i][device] = found[i][device] + row if device in found[i] else row
    return found


def _bad(gradients: Sequence[tuple[Tensor, Tensor]]) -> list[bool]:
    """Which of the parameters' gradients are not finite, anywhere."""
    parts: dict[Place, list[tuple[int, Tensor]]] = {}
    for i, (p, gradient) in enumerate(gradients):
        bad = local(gradient).to_dense().isfinite().logical_not().any().double()
        parts.setdefault(_place(p), []).append((i, bad))
    found = [False] * len(gradients)
    for (_, groups), flags in parts.items():
        summed = sum_over(torch.stack([flag for _, flag in flags]), groups).tolist()
        for (i, _), count in zip(flags, summed, strict=True):
            found[i] = count > 0.0
    return found


def check_gradients(name: str, pairs: Pairs) -> None:
    """ValueError that names the task, or the parameter, for NaN and infinity, on all ranks that hold shards alike.
    Reads from the devices."""
    checked = [number for number, (group, _) in enumerate(pairs) if group["check_finite"]]
    marks = _task_marks([pairs[number][1] for number in checked])
    for number, sizes in zip(checked, marks, strict=True):
        group, plan = pairs[number]
        for mark in sizes.values():
            finite = mark.isfinite().tolist()
            if not all(finite):
                raise ValueError(
                    f"{name}.step: group {number}: expected finite gradients, found NaN or infinity in .jac of task "
                    f"{finite.index(False)}; look at its loss, or skip the step (torch.amp.GradScaler does)"
                )
        gradients = [*plan.ordinary, *zip(plan.single.parameters, plan.single.jacobians)]
        bad = _bad(gradients)
        if any(bad):
            places = {p: i for i, p in enumerate(group["params"])}
            raise ValueError(
                f"{name}.step: parameter {places[gradients[bad.index(True)][0]]} of group {number}: expected a finite "
                ".grad, found NaN or infinity"
            )


def present_tasks(pairs: Pairs) -> dict[torch.device, Tensor]:
    """[T] bool on each device: the tasks whose gradients are not zero throughout; nothing if no group asks for it."""
    if not any(group["missing"] == "still" and plan.tasks.keys for group, plan in pairs):
        return {}
    found = [
        (device, mark != 0.0) for sizes in _task_marks([plan for _, plan in pairs]) for device, mark in sizes.items()
    ]
    return {device: torch.stack([present.to(device) for _, present in found]).any(0) for device, _ in found}
