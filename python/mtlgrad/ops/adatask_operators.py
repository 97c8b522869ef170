"""The ``mtlgrad::adatask`` operator: kernels, and the version without effect that is traced."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._kernels import kernels_for, place
from ._library import register
from .adatask_checks import ADAM, RMSPROP, Step, check
from .checks import refuse
from .rows import DTYPE_CODES


def _adatask(*arguments: Any) -> None:
    step = Step(*arguments)
    check(step)
    kernels = kernels_for(step.parameters[0].device)
    if kernels is None or len(step.weights) > kernels.adatask_max_tasks:
        _by_reference(step)
        return
    groups: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for p, parameter in enumerate(step.parameters):
        groups.setdefault((parameter.dtype, step.second[p * len(step.weights)].dtype), []).append(p)
    launches = [_Launch(step, places) for places in groups.values()]  # all, before the first changes anything
    if step.present is None:
        torch._foreach_add_(step.steps, 1.0)
    else:
        torch._foreach_add_(step.steps, [step.present.to(torch.float32)] * len(step.steps))
    for launch in launches:
        launch.run(kernels)
    if not step.parameters[0].is_inference():
        # Autograd must know that what it may have saved for a backward is gone.
        for parameter in step.parameters:
            torch.autograd.graph.increment_version(parameter)


def _same_order(tensor: Tensor, order: Tensor) -> bool:
    return tensor.stride() == order.stride() or (tensor.is_contiguous() and order.is_contiguous())


class _Launch:
    """The parameters of one dtype, with moments of one dtype, as a kernel takes them.

    These are pointers to dense tensors in one element order for each parameter; what is not is copied, and back.
    """

    def __init__(self, step: Step, places: list[int]):
        tasks = len(step.weights)
        self.step, self.places = step, places
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.kept: list[Tensor] = []
        parameters, jacobians = [step.parameters[p] for p in places], [step.jacobians[p] for p in places]
        buffers = [step.buffers[p] for p in places] if step.buffers else []
        per_task = (step.first, step.second, step.largest)
        moments = [[m[p * tasks + t] for p in places for t in range(tasks)] if m else [] for m in per_task]
        self.sizes = list(map(Tensor.numel, parameters))
        if all(map(Tensor.is_contiguous, itertools.chain(parameters, jacobians, buffers, *moments))):
            self.rows = [pointer for jacobian in jacobians for pointer in _row_pointers(jacobian)]
            self.changed = [list(map(Tensor.data_ptr, tensors)) for tensors in (parameters, *moments, buffers)]
            return
        # empty_like keeps the strides of what is dense, in whatever order, and of nothing else.
        orders = [p if p.is_contiguous() or _same_order(o := torch.empty_like(p), p) else o for p in parameters]
        self.rows = [pointer for j, order in zip(jacobians, orders) for pointer in self._rows(j, order)]
        self.changed = [self._pointers([p], order) for p, order in zip(parameters, orders)]
        self.changed = [list(itertools.chain(*self.changed)), [], [], [], []]
        for table, tensors in zip(self.changed[1:], (*moments, buffers)):
            each = len(tensors) // len(places)
            for i, order in enumerate(orders):
                table += self._pointers(tensors[i * each : (i + 1) * each], order)

    def _pointers(self, tensors: Sequence[Tensor], order: Tensor) -> list[int]:
        pointers = []
        for tensor in tensors:
            if not _same_order(tensor, order):
                if any(apart == 0 and size > 1 for apart, size in zip(tensor.stride(), tensor.shape)):
                    refuse(
                        f"{self.step.name}: expected parameters and moments with memory for every element, found an "
                        "expanded tensor; use .clone()"
                    )
                self.copies.append((tensor, torch.empty_like(order, dtype=tensor.dtype).copy_(tensor)))
                tensor = self.copies[-1][1]
            pointers.append(tensor.data_ptr())
        return pointers

    def _rows(self, jacobian: Tensor, order: Tensor) -> list[int]:
        if _same_order(jacobian[0], order):
            return _row_pointers(jacobian)
        rows = [torch.empty_like(order).copy_(row) for row in jacobian]
        self.kept += rows
        return [row.data_ptr() for row in rows]

    def run(self, kernels: ModuleType) -> None:
        step, places, tasks = self.step, self.places, len(self.step.weights)
        device = step.parameters[0].device
        size = kernels.adatask_workspace(tasks, len(places), sum(self.sizes)) if step.squares else 0
        workspace = torch.empty(size, dtype=torch.float64, device=device)
        kernels.adatask(
            DTYPE_CODES[step.parameters[places[0]].dtype],
            DTYPE_CODES[step.second[places[0] * tasks].dtype],
            step.rule,
            step.numbers,
            [*step.flags, step.keys is not None],
            step.weights,
            0 if step.lr is None else step.lr.data_ptr(),
            self.sizes,
            self.changed[0],
            self.rows,
            *self.changed[1:],
            [step.steps[p].data_ptr() for p in places],
            [step.squares[p].data_ptr() for p in places] if step.squares else [],
            [0 if step.keys is None else step.keys[p] for p in places],
            0 if step.present is None else step.present.data_ptr(),
            workspace.data_ptr(),
            *place(device),
        )
        for tensor, copy in self.copies:
            tensor.copy_(copy)


def _row_pointers(jacobian: Tensor) -> list[int]:
    start, apart = jacobian.data_ptr(), jacobian.stride(0) * jacobian.element_size()
    return [start + t * apart for t in range(jacobian.shape[0])]


def _by_reference(step: Step) -> None:
    tasks = len(step.weights)

    def lists(tensors: list[Tensor]) -> Any:
        return [tensors[i : i + tasks] for i in range(0, len(tensors), tasks)] if tensors else None

    lr, first_decay, second_decay, eps, weight_decay, lr_decay, square_decay = step.numbers
    common: dict[str, Any] = {
        "lr": lr if step.lr is None else step.lr[0],
        "eps": eps,
        "weight_decay": weight_decay,
        "maximize": step.flags[2],
        "task_weights": step.weights,
        "present": step.present,
        "squares": step.squares or None,
        "square_decay": square_decay,
        "keys": step.keys,
    }
    if step.rule == ADAM:
        reference.adatask_adam(
            step.parameters,
            step.jacobians,
            lists(step.first),
            lists(step.second),
            step.steps,
            max_exp_avg_sqs=lists(step.largest),
            betas=(first_decay, second_decay),
            decoupled=step.flags[1],
            **common,
        )
    elif step.rule == RMSPROP:
        reference.adatask_rmsprop(
            step.parameters,
            step.jacobians,
            lists(step.second),
            step.steps,
            grad_avgs=lists(step.first),
            momentum_buffers=step.buffers or None,
            alpha=second_decay,
            momentum=first_decay,
            **common,
        )
    else:
        sums = lists(step.second)
        reference.adatask_adagrad(step.parameters, step.jacobians, sums, step.steps, lr_decay=lr_decay, **common)


def _adatask_fake(*arguments: Any) -> None:
    step = Step(*arguments)
    check(step)


adatask_op = register(
    "adatask(Tensor(a!)[] parameters, Tensor[] jacobians, Tensor(b!)[] first, Tensor(c!)[] second, "
    "Tensor(d!)[] largest, Tensor(e!)[] buffers, Tensor(f!)[] steps, Tensor(g!)[] squares, Tensor? present, "
    "Tensor? lr, int rule, float[] numbers, bool[] flags, float[] weights, int[]? keys) -> ()",
    _adatask,
    _adatask_fake,
)
