"""The arguments of a step of AdaTask's optimizers, and what is wrong with them in words."""

from __future__ import annotations

import itertools
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import refuse, shape_of

ADAM, RMSPROP, ADAGRAD = 0, 1, 2

#: What the moments of a parameter may be.
MOMENT_DTYPES = {
    torch.float32: (torch.float32, torch.bfloat16),
    torch.bfloat16: (torch.float32, torch.bfloat16),
    torch.float64: (torch.float64,),
}

_SHAPE, _DTYPE, _DEVICE, _LAYOUT = map(attrgetter, ("shape", "dtype", "device", "layout"))

# One a parameter, of T numbers: name and dtype.
_SMALL = {"steps": torch.float32, "squares": torch.float64}


class Step(NamedTuple):
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


def check(step: Step) -> None:
    """Raises RuntimeError before anything is changed."""
    op, parameters, tasks = step.name, step.parameters, len(step.weights)
    lists = {"jacobians": step.jacobians, **step.moments(), "steps": step.steps, "squares": step.squares}
    if step.keys is not None and len(step.keys) != len(parameters):
        refuse(f"{op}: keys: expected {len(parameters)}, one a parameter, found {len(step.keys)}")
    optional = ("grad_avgs", "max_exp_avg_sqs", "momentum_buffers", "squares")
    for name, tensors in lists.items():
        per_task = name not in ("jacobians", "momentum_buffers", *_SMALL)
        expected = len(parameters) * (tasks if per_task else 1)
        if len(tensors) != expected and (tensors or name not in optional):
            each = f" for {len(parameters)} parameters and {tasks} tasks" if per_task else ", one a parameter"
            refuse(f"{op}: {name}: expected {expected} tensors{each}, found {len(tensors)}")
    if step.rule == RMSPROP and step.numbers[1] and not step.buffers:
        refuse(f"{op}: momentum_buffers: expected one a parameter for momentum={step.numbers[1]}, found none")
    device = parameters[0].device
    if step.lr is not None and step.lr.device != device:
        refuse(f"{op}: lr: expected a tensor on {device} like the parameters, found {step.lr.device}")
    if step.present is not None:
        _check_small(op, "present", step.present, tasks, torch.bool, device)
    if not _fit(step, lists):
        for name, tensors in lists.items():
            if tensors:
                _explain(step, name, tensors, len(tensors) // len(parameters))


def _fit(step: Step, lists: dict[str, list[Tensor]]) -> bool:
    """Whether tensors fit together, found out fast: a thousand parameters of three tasks are ten thousand tensors."""
    tasks = len(step.weights)
    shapes, dtypes = list(map(_SHAPE, step.parameters)), list(map(_DTYPE, step.parameters))
    second = list(map(_DTYPE, step.second[::tasks]))
    if any(moment not in MOMENT_DTYPES.get(dtype, ()) for dtype, moment in set(zip(dtypes, second))):
        return False
    for name, tensors in lists.items():
        if not tensors:
            continue
        found = list(map(_SHAPE, tensors)), list(map(_DTYPE, tensors))
        if name in _SMALL:
            fits = all(shape == (tasks,) for shape in found[0]) and set(found[1]) == {_SMALL[name]}
            fits = fits and all(map(Tensor.is_contiguous, tensors))
        elif name == "jacobians":
            fits = found == ([(tasks, *shape) for shape in shapes], dtypes)
        else:
            each = range(len(tensors) // len(shapes))
            fits = found == ([s for s in shapes for _ in each], [d for d in second for _ in each])
        if not fits or set(map(_LAYOUT, tensors)) != {torch.strided}:
            return False
    return len(set(map(_DEVICE, itertools.chain(step.parameters, *lists.values())))) == 1


def _explain(step: Step, name: str, tensors: list[Tensor], each: int) -> None:
    parameters, tasks = step.parameters, len(step.weights)
    device = parameters[0].device
    for p, parameter in enumerate(parameters):
        shape, dtype = list(parameter.shape), parameter.dtype
        for tensor in tensors[p * each : (p + 1) * each]:
            if name in _SMALL:
                _check_small(step.name, f"{name}[{p}]", tensor, tasks, _SMALL[name], device)
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


def _refuse_type(step: Step, name: str, p: int, tensor: Tensor) -> None:
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


def _check_small(op: str, name: str, tensor: Tensor, tasks: int, dtype: torch.dtype, device: torch.device) -> None:
    # Kernels take its address and no stride.
    fits = tensor.layout == torch.strided and tensor.is_contiguous()
    if not fits or list(tensor.shape) != [tasks] or tensor.dtype != dtype or tensor.device != device:
        found = f"{shape_of(tensor)} {tensor.dtype} on {tensor.device}" + ", not contiguous" * (not fits)
        refuse(f"{op}: {name}: expected [{tasks}] {dtype} on {device}, contiguous, found {found}")
