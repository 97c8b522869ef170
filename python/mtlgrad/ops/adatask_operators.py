"""The ``mtlgrad::adatask`` operator: checks, kernels, and the version without effect that is traced."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ._kernels import kernels_for, place
from ._library import register
from .checks import refuse, shape_of
from .rows import DTYPE_CODES, dense, in_order_of

ADAM, RMSPROP, ADAGRAD = 0, 1, 2

#: What the moments of a parameter may be.
MOMENT_DTYPES = {
    torch.float32: (torch.float32, torch.bfloat16),
    torch.bfloat16: (torch.float32, torch.bfloat16),
    torch.float64: (torch.float64,),
}


class _Step(NamedTuple):
    """The arguments of the operator; moments parameter after parameter, each T or, for the buffers, one."""

    parameters: list[Tensor]
    jacobians: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    largest: list[Tensor]
    buffers: list[Tensor]
    steps: list[Tensor]
    squares: list[Tensor]
    present: Tensor | None
    lr: Tensor | None  #: [1] float64, in the place of numbers[0]
    rule: int
    numbers: list[float]  #: lr, first decay (momentum), second decay, eps, weight decay, lr decay, square decay
    flags: list[bool]  #: amsgrad or centered, decoupled, maximize
    weights: list[float]
    keys: list[int] | None

    @property
    def name(self) -> str:
        return ("adatask_adam", "adatask_rmsprop", "adatask_adagrad")[self.rule]

    def moments(self) -> dict[str, list[Tensor]]:
        """By the names that users give them; empty lists are what is not there."""
        if self.rule == ADAM:
            return {"exp_avgs": self.first, "exp_avg_sqs": self.second, "max_exp_avg_sqs": self.largest}
        if self.rule == RMSPROP:
            return {"square_avgs": self.second, "grad_avgs": self.first, "momentum_buffers": self.buffers}
        return {"state_sums": self.second}


def _check(step: _Step) -> None:
    op, parameters, tasks = step.name, step.parameters, len(step.weights)
    lists = {"jacobians": step.jacobians, **step.moments(), "steps": step.steps, "squares": step.squares}
    if step.keys is not None and len(step.keys) != len(parameters):
        refuse(f"{op}: keys: expected {len(parameters)}, one a parameter, found {len(step.keys)}")
    optional = ("grad_avgs", "max_exp_avg_sqs", "momentum_buffers", "squares")
    for name, tensors in lists.items():
        per_task = name not in ("jacobians", "steps", "squares", "momentum_buffers")
        expected = len(parameters) * (tasks if per_task else 1)
        if len(tensors) != expected and (tensors or name not in optional):
            each = f" for {len(parameters)} parameters and {tasks} tasks" if per_task else ", one a parameter"
            refuse(f"{op}: {name}: expected {expected} tensors{each}, found {len(tensors)}")
    for name, tensors in lists.items():
        if tensors:
            _check_list(step, name, tensors, len(tensors) // len(parameters))
    if step.present is not None:
        _check_small(op, "present", step.present, [tasks], torch.bool, parameters[0].device)


def _check_list(step: _Step, name: str, tensors: list[Tensor], each: int) -> None:
    parameters, tasks = step.parameters, len(step.weights)
    device = parameters[0].device
    for p, parameter in enumerate(parameters):
        shape, dtype = list(parameter.shape), parameter.dtype
        for tensor in tensors[p * each : (p + 1) * each]:
            if name in ("steps", "squares"):
                expected = torch.float32 if name == "steps" else torch.float64
                _check_small(step.name, f"{name}[{p}]", tensor, [tasks], expected, device)
                continue
            wanted = [tasks, *shape] if name == "jacobians" else shape
            if list(tensor.shape) != wanted:
                refuse(f"{step.name}: {name}: expected shape {wanted} for parameter {p}, found {shape_of(tensor)}")
            if name == "jacobians":
                fits = tensor.dtype == dtype and dtype in MOMENT_DTYPES
            else:
                fits = tensor.dtype in MOMENT_DTYPES.get(dtype, ()) and tensor.dtype == step.second[p * tasks].dtype
            if not fits:
                _refuse_type(step, name, p, tensor)
            if tensor.device != device or parameter.device != device:
                found = tensor.device if tensor.device != device else parameter.device
                refuse(f"{step.name}: {name}: expected all on {device}, found {found} for parameter {p}")
            if tensor.layout != torch.strided:
                refuse(f"{step.name}: {name}: expected a dense tensor for parameter {p}, found {tensor.layout}")


def _refuse_type(step: _Step, name: str, p: int, tensor: Tensor) -> None:
    dtype = step.parameters[p].dtype
    if dtype not in MOMENT_DTYPES:
        refuse(
            f"{step.name}: parameters: expected float32, bfloat16 or float64, found {dtype} in parameter {p}; keep "
            "float32 parameters and use autocast"
        )
    if name == "jacobians":
        refuse(f"{step.name}: {name}: expected {dtype} like parameter {p}, found {tensor.dtype}")
    allowed = " or ".join(str(d) for d in MOMENT_DTYPES[dtype])
    refuse(f"{step.name}: {name}: expected {allowed}, alike for parameter {p}, found {tensor.dtype}")


def _check_small(
    op: str, name: str, tensor: Tensor, shape: list[int], dtype: torch.dtype, device: torch.device
) -> None:
    if list(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
        found = f"{shape_of(tensor)} {tensor.dtype} on {tensor.device}"
        refuse(f"{op}: {name}: expected {shape} {dtype} on {device}, found {found}")


def _adatask(*arguments: Any) -> None:
    step = _Step(*arguments)
    if not step.parameters:
        return
    _check(step)
    if not step.weights:
        return
    kernels = kernels_for(step.parameters[0].device)
    if kernels is None:
        _by_reference(step)
        return
    if step.present is None:
        torch._foreach_add_(step.steps, 1.0)
    else:
        torch._foreach_add_(step.steps, [step.present.to(torch.float32)] * len(step.steps))
    groups: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for p, parameter in enumerate(step.parameters):
        groups.setdefault((parameter.dtype, step.second[p * len(step.weights)].dtype), []).append(p)
    for places in groups.values():
        _run(kernels, step, places)


class _Pointers:
    """Pointers to tensors in one element order per parameter; what has another is copied, and back at the end."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.back: list[tuple[Tensor, Tensor]] = []

    def order(self, parameter: Tensor) -> Tensor:
        if dense(parameter):
            return parameter
        copy = parameter.contiguous()
        self.back.append((parameter, copy))
        return copy

    def changed(self, tensors: Sequence[Tensor], order: Tensor) -> list[int]:
        pointers = []
        for tensor in tensors:
            same = in_order_of(tensor, order)
            if same is not tensor:
                self.back.append((tensor, same))
            pointers.append(same.data_ptr())
        return pointers

    def rows(self, jacobian: Tensor, order: Tensor) -> list[int]:
        first = jacobian[0]
        if first.stride() == order.stride() or (first.is_contiguous() and order.is_contiguous()):
            start, apart = jacobian.data_ptr(), jacobian.stride(0) * jacobian.element_size()
            return [start + t * apart for t in range(len(jacobian))]
        copies = [in_order_of(row, order) for row in jacobian]
        self.kept += copies
        return [copy.data_ptr() for copy in copies]

    def copy_back(self) -> None:
        for tensor, copy in self.back:
            tensor.copy_(copy)


def _run(kernels: ModuleType, step: _Step, places: list[int]) -> None:
    """The parameters of one dtype, with moments of one dtype."""
    tasks, device = len(step.weights), step.parameters[0].device
    pointers = _Pointers()
    parameters: list[int] = []
    rows: list[int] = []
    tables: list[list[int]] = [[], [], []]
    buffers: list[int] = []
    for p in places:
        order = pointers.order(step.parameters[p])
        parameters.append(order.data_ptr())
        rows += pointers.rows(step.jacobians[p], order)
        for table, moments in zip(tables, (step.first, step.second, step.largest)):
            table += pointers.changed(moments[p * tasks : (p + 1) * tasks], order)
        buffers += pointers.changed(step.buffers[p : p + 1], order)
    sizes = [step.parameters[p].numel() for p in places]
    size = kernels.adatask_workspace(tasks, len(places), sum(sizes)) if step.squares else 0
    workspace = torch.empty(size, dtype=torch.float64, device=device)
    kernels.adatask(
        DTYPE_CODES[step.parameters[places[0]].dtype],
        DTYPE_CODES[step.second[places[0] * tasks].dtype],
        step.rule,
        step.numbers,
        [*step.flags, step.keys is not None],
        step.weights,
        0 if step.lr is None else step.lr.data_ptr(),
        sizes,
        parameters,
        rows,
        *tables,
        buffers,
        [step.steps[p].data_ptr() for p in places],
        [step.squares[p].data_ptr() for p in places] if step.squares else [],
        [0 if step.keys is None else step.keys[p] for p in places],
        0 if step.present is None else step.present.data_ptr(),
        workspace.data_ptr(),
        *place(device),
    )
    pointers.copy_back()


def _by_reference(step: _Step) -> None:
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
    step = _Step(*arguments)
    if step.parameters:
        _check(step)


adatask_op = register(
    "adatask(Tensor(a!)[] parameters, Tensor[] jacobians, Tensor(b!)[] first, Tensor(c!)[] second, "
    "Tensor(d!)[] largest, Tensor(e!)[] buffers, Tensor(f!)[] steps, Tensor(g!)[] squares, Tensor? present, "
    "Tensor? lr, int rule, float[] numbers, bool[] flags, float[] weights, int[]? keys) -> ()",
    _adatask,
    _adatask_fake,
)
