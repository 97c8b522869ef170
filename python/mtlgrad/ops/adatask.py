"""One step of AdaTask's optimizers (Yang et al., AAAI 2023, arXiv 2211.15055): moments per task, one pass over memory.

``jacobians`` holds the T tasks' gradients of every parameter, as ``Parameter.jac`` does; every task t has moments of
its own, and a parameter moves by the sum of what torch.optim's optimizer of the same name would do for each task alone:

.. math:: \\theta \\leftarrow \\theta - \\eta \\sum_t w_t \\, \\frac{\\hat m_t}{\\sqrt{\\hat v_t} + \\epsilon}

for Adam; for RMSProp and AdaGrad with g_t in the place of m_t. Arguments that the three share:

Args:
    parameters: P tensors, float32, bfloat16 or float64, or complex: two reals an element; changed in place.
    jacobians: P tensors [T, *shape], typed like the parameter; T the same for all. Read only.
    moments (``exp_avgs``, ``square_avgs``, ...): P sequences of T tensors shaped like the parameter, float32 or
        bfloat16 (one of them for all; float64 for float64, complex for complex); changed in place.
    steps: P tensors [T] float32, how often each task's moments were updated; counted up here.
    task_weights: w, T numbers; ones if not given. They multiply the update: Adam undoes a factor on the gradient.
    weight_decay: added to each task's gradient times the parameter (Adam with ``decoupled``: taken off the parameter,
        once).
    maximize: goes up.
    present: [T] bool: tasks that take part. The others keep moments and step counts, and add nothing. None: all.
    squares: P tensors [T] float64, changed in place: AU, the exponentially decaying average, with ``square_decay``, of
        the squared updates of each task, summed over the parameter's elements.
    keys: P whole numbers: bfloat16 moments are rounded stochastically, without bias, with random bits that depend on
        key, task, step and element alone. None: to nearest.

Everything else is as in torch.optim; ``lr`` may be a tensor with one element, which the host does not read on CUDA.
Arithmetic is float32 (float64 for float64) and unrounded until it is stored. A pass reads T gradients, and reads and
writes moments and parameters, once: for Adam (5 T + 2) N elements. Parameters may lie in any dense order, channels_last
for one; what is not dense, or not in the parameter's order, is copied.

Errors: ``RuntimeError`` for shapes, dtypes and devices that do not fit. NaN and infinity are passed on.

Who takes many steps over the same tensors keeps a :class:`TaskStep`, which looks once at what does not change.
"""

from __future__ import annotations

import itertools
import weakref
from array import array
from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..reference.adatask import Lists, Rate
from ._native import _C, KERNELS, launch_place
from ._operation import Changed, Operation, hide_from_dynamo, is_eager, mark_written
from .checks import refuse, shape_of
from .rows import DTYPE_CODES, as_real, in_order_of, pointers, same_order, some_complex

__all__ = ["TaskStep", "adatask_adagrad", "adatask_adam", "adatask_rmsprop"]

#: What the moments of a parameter may be.
MOMENT_DTYPES = {
    torch.float32: (torch.float32, torch.bfloat16),
    torch.bfloat16: (torch.float32, torch.bfloat16),
    torch.float64: (torch.float64,),
}

# A thousand parameters of three tasks are ten thousand tensors: what is asked of each is asked without Python between.
_SHAPE, _DTYPE, _DEVICE, _LAYOUT = map(attrgetter, ("shape", "dtype", "device", "layout"))


# ---- the arguments of a step -----------------------------------------------------------------------------------------


class AdamMoments(NamedTuple):
    """Parameter after parameter, T tensors each."""

    exp_avgs: Changed
    exp_avg_sqs: Changed
    max_exp_avg_sqs: Changed  #: none: not amsgrad


class RMSpropMoments(NamedTuple):
    """Parameter after parameter, T tensors each; one buffer each."""

    square_avgs: Changed
    grad_avgs: Changed  #: none: not centered
    momentum_buffers: Changed  #: none: no momentum


class AdagradMoments(NamedTuple):
    """Parameter after parameter, T tensors each."""

    state_sums: Changed


class Adam(NamedTuple):
    beta1: float
    beta2: float
    decoupled: bool


class RMSprop(NamedTuple):
    alpha: float
    momentum: float


class Adagrad(NamedTuple):
    lr_decay: float


class StepSettings(NamedTuple):
    """What the three rules share."""

    lr: float
    lr_tensor: Tensor | None  #: [1] float64 on the parameters' device, in the place of `lr`
    eps: float
    weight_decay: float
    maximize: bool
    square_decay: float
    task_weights: list[float]
    present: Tensor | None
    keys: list[int] | None


class Step(NamedTuple):
    """All arguments of an operation."""

    parameters: list[Tensor]
    jacobians: list[Tensor]
    moments: AdamMoments | RMSpropMoments | AdagradMoments
    steps: list[Tensor]
    squares: list[Tensor]  #: none: AU is not asked for
    rule: Adam | RMSprop | Adagrad
    settings: StepSettings

    @property
    def tasks(self) -> int:
        """Return T."""
        return len(self.settings.task_weights)

    @property
    def tensors(self) -> tuple[list[Tensor], ...]:
        """Return all that is changed."""
        return (self.parameters, *self.moments, self.steps, self.squares)

    def real(self) -> Step:
        """Return the step on pairs of reals where parameters are complex."""
        if not some_complex(self.parameters):
            return self
        moments = type(self.moments)(*map(as_real, self.moments))
        jacobians = as_real(map(Tensor.resolve_conj, self.jacobians))
        return self._replace(parameters=as_real(self.parameters), jacobians=jacobians, moments=moments)

    def moment_dtypes(self) -> list[torch.dtype]:
        """Return a dtype for each parameter: that of a second moment, which all of its moments have."""
        squares = self.moments.exp_avg_sqs if isinstance(self.moments, AdamMoments) else self.moments[0]
        return list(map(_DTYPE, squares[:: self.tasks]))


# ---- the operations --------------------------------------------------------------------------------------------------


def adatask_adam(
    parameters: Sequence[Tensor],
    jacobians: Sequence[Tensor],
    exp_avgs: Lists,
    exp_avg_sqs: Lists,
    steps: Sequence[Tensor],
    *,
    max_exp_avg_sqs: Lists | None = None,
    lr: Rate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    decoupled: bool = False,
    **shared: Any,
) -> None:
    """Take a step of Adam with moments per task.

    Args:
        parameters, jacobians, steps: as in :mod:`mtlgrad.ops.adatask`, which also has what else may be given by name.
        exp_avgs, exp_avg_sqs: the moments, P sequences of T tensors each.
        max_exp_avg_sqs: likewise, for amsgrad.
        lr, betas, eps: as in torch.optim.Adam.
        decoupled: AdamW's weight decay.

    Raises:
        RuntimeError: shapes, dtypes, devices and numbers of tensors that do not fit.

    Source: arXiv 2211.15055, section 4, with the moments of torch.optim.Adam (DESIGN 4.5).
    """
    lists = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "max_exp_avg_sqs": max_exp_avg_sqs}
    _take_step(ADAM, parameters, jacobians, AdamMoments, lists, (), steps, Adam(*betas, decoupled), lr, eps, **shared)


def adatask_rmsprop(
    parameters: Sequence[Tensor],
    jacobians: Sequence[Tensor],
    square_avgs: Lists,
    steps: Sequence[Tensor],
    *,
    grad_avgs: Lists | None = None,
    momentum_buffers: Sequence[Tensor] | None = None,
    lr: Rate = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    momentum: float = 0.0,
    **shared: Any,
) -> None:
    """Take a step of RMSProp with a second moment per task.

    Args:
        parameters, jacobians, steps: as in :mod:`mtlgrad.ops.adatask`, which also has what else may be given by name.
        square_avgs: the moments, P sequences of T tensors.
        grad_avgs: likewise, for ``centered``.
        momentum_buffers: P tensors, typed like the moments: momentum is linear in the updates, so one buffer holds the
            sum of all tasks'. AU then counts updates before the momentum.
        lr, alpha, eps, momentum: as in torch.optim.RMSprop.

    Raises:
        RuntimeError: as :func:`adatask_adam`; momentum without buffers.

    Source: arXiv 2211.15055, section 4, with the moments of torch.optim.RMSprop (DESIGN 4.5).
    """
    lists, buffers = {"square_avgs": square_avgs, "grad_avgs": grad_avgs}, [list(momentum_buffers or ())]
    rule = RMSprop(alpha, momentum)
    _take_step(RMSPROP, parameters, jacobians, RMSpropMoments, lists, buffers, steps, rule, lr, eps, **shared)


def adatask_adagrad(
    parameters: Sequence[Tensor],
    jacobians: Sequence[Tensor],
    state_sums: Lists,
    steps: Sequence[Tensor],
    *,
    lr: Rate = 1e-2,
    lr_decay: float = 0.0,
    eps: float = 1e-10,
    **shared: Any,
) -> None:
    """Take a step of AdaGrad with a sum of squared gradients per task.

    Args:
        parameters, jacobians, steps: as in :mod:`mtlgrad.ops.adatask`, which also has what else may be given by name.
        state_sums: the sums, P sequences of T tensors.
        lr, lr_decay, eps: as in torch.optim.Adagrad.

    Raises:
        RuntimeError: as :func:`adatask_adam`.

    Source: arXiv 2211.15055, section 4, with the state of torch.optim.Adagrad (DESIGN 4.5).
    """
    lists, rule = {"state_sums": state_sums}, Adagrad(lr_decay)
    _take_step(ADAGRAD, parameters, jacobians, AdagradMoments, lists, (), steps, rule, lr, eps, **shared)


def _take_step(
    operation: Operation,
    parameters: Sequence[Tensor],
    jacobians: Sequence[Tensor],
    moments: Any,
    per_task: dict[str, Any],
    buffers: Sequence[list[Tensor]],
    steps: Sequence[Tensor],
    rule: Any,
    lr: Rate,
    eps: float,
    squares: Sequence[Tensor] | None = None,
    **shared: Any,
) -> None:
    op, first = operation.name, jacobians[0] if jacobians else None
    if first is not None and (first.dim() == 0 or first.shape[0] == 0):
        refuse(f"{op}: jacobians: expected [T, *shape] with at least one task, found {shape_of(first)}")
    tasks = 1 if first is None else first.shape[0]
    for name, lists in per_task.items():
        for p, row in enumerate(lists or ()):
            if len(row) != tasks:
                refuse(f"{op}: {name}: expected {tasks} tensors, one a task, for parameter {p}, found {len(row)}")
    flat = [list(itertools.chain.from_iterable(lists or ())) for lists in per_task.values()]
    settings = step_settings(op, tasks, lr, eps, **shared)
    if parameters:
        gradients, counts, averages = list(jacobians), list(steps), list(squares or ())
        step = Step(list(parameters), gradients, moments(*flat, *buffers), counts, averages, rule, settings)
        operation(*step.real())


def step_settings(
    op: str,
    tasks: int,
    lr: Rate,
    eps: float,
    weight_decay: float = 0.0,
    maximize: bool = False,
    task_weights: Sequence[float] | None = None,
    present: Tensor | None = None,
    square_decay: float = 0.99,
    keys: Sequence[int] | None = None,
) -> StepSettings:
    """Make the settings of a :class:`Step`.

    Args:
        op: the operation's name, for errors.
        tasks: T.
        lr, eps, weight_decay, maximize, task_weights, present, square_decay, keys: as of the operations.

    Returns:
        The settings; an ``lr`` on a device is not read.

    Raises:
        RuntimeError: another number of ``task_weights`` than tasks, or an ``lr`` of several elements.
    """
    if task_weights is not None and len(task_weights) != tasks:
        refuse(f"{op}: task_weights: expected {tasks} numbers, one a task, found {len(task_weights)}")
    weights = [1.0] * tasks if task_weights is None else [float(w) for w in task_weights]
    number, on_device = 0.0, None
    if not isinstance(lr, Tensor):
        number = float(lr)
    elif lr.numel() != 1:
        refuse(f"{op}: lr: expected a number or a tensor with one, found shape {shape_of(lr)}")
    elif lr.device.type == "cpu" and not torch.compiler.is_compiling():
        number = float(lr)
    else:  # the host must not wait for it
        on_device = lr.detach().to(torch.float64).reshape(1)
    listed = None if keys is None else list(keys)
    return StepSettings(number, on_device, eps, weight_decay, maximize, square_decay, weights, present, listed)


# ---- what does not fit -----------------------------------------------------------------------------------------------


def _check(op: str, *arguments: Any) -> None:
    """Refuse what does not fit, before anything is changed."""
    step = Step(*arguments)
    parameters, tasks, keys, named = step.parameters, step.tasks, step.settings.keys, step.moments._asdict()
    count, device = len(parameters), parameters[0].device
    if keys is not None and len(keys) != count:
        refuse(f"{op}: keys: expected {count}, one a parameter, found {len(keys)}")
    for name, tensors in {"jacobians": step.jacobians, **named, "steps": step.steps, "squares": step.squares}.items():
        per_task = name in named and name != "momentum_buffers"
        expected = count * tasks if per_task else count
        optional = name in ("max_exp_avg_sqs", "grad_avgs", "momentum_buffers", "squares")
        if len(tensors) != expected and (tensors or not optional):
            each = f" for {count} parameters and {tasks} tasks" if per_task else ", one a parameter"
            refuse(f"{op}: {name}: expected {expected} tensors{each}, found {len(tensors)}")
    if isinstance(step.rule, RMSprop) and step.rule.momentum and not named["momentum_buffers"]:
        refuse(f"{op}: momentum_buffers: expected one a parameter for momentum={step.rule.momentum}, found none")
    _check_settings(op, device, step.settings)
    shapes, own = list(map(_SHAPE, parameters)), list(map(_DTYPE, parameters))
    for p, dtype in enumerate(own):
        if dtype not in MOMENT_DTYPES:
            found = f"found {dtype} in parameter {p}; keep float32 parameters and use autocast"
            refuse(f"{op}: parameters: expected float32, bfloat16 or float64, {found}")
    _check_like(op, "parameters", parameters, shapes, own, own, device)
    _check_like(op, "jacobians", step.jacobians, [(tasks, *shape) for shape in shapes], own, own, device)
    for name, tensors in named.items():
        repeat = range(len(tensors) // count)
        dtypes = [d if d in MOMENT_DTYPES[p] else None for d, p in zip(step.moment_dtypes(), own) for _ in repeat]
        _check_like(op, name, tensors, [shape for shape in shapes for _ in repeat], dtypes, own, device)
    for name, tensors, dtype in (("steps", step.steps, torch.float32), ("squares", step.squares, torch.float64)):
        for p, tensor in enumerate(tensors):
            _check_small(op, f"{name}[{p}]", tensor, tasks, dtype, device)


def _check_settings(op: str, device: torch.device, settings: StepSettings) -> None:
    if settings.lr_tensor is not None and settings.lr_tensor.device != device:
        refuse(f"{op}: lr: expected a tensor on {device} like the parameters, found {settings.lr_tensor.device}")
    if settings.present is not None:
        _check_small(op, "present", settings.present, len(settings.task_weights), torch.bool, device)


def _check_like(
    op: str, name: str, tensors: list[Tensor], shapes: Any, dtypes: Any, own: list[torch.dtype], device: torch.device
) -> None:
    """`own`: the parameters' dtypes."""
    fits = list(map(_SHAPE, tensors)) == shapes and list(map(_DTYPE, tensors)) == dtypes
    if fits and set(map(_DEVICE, tensors)) <= {device} and set(map(_LAYOUT, tensors)) <= {torch.strided}:
        return
    for i, tensor in enumerate(tensors):
        p, found = i * len(own) // len(tensors), tensor.dtype
        if list(tensor.shape) != list(shapes[i]):
            refuse(f"{op}: {name}: expected shape {list(shapes[i])} for parameter {p}, found {shape_of(tensor)}")
        if found != dtypes[i]:
            allowed = " or ".join(map(str, MOMENT_DTYPES[own[p]])) + f", alike for parameter {p}"
            allowed = f"{own[p]} like parameter {p}" if name == "jacobians" else allowed
            refuse(f"{op}: {name}: expected {allowed}, found {found}")
        if tensor.device != device:
            refuse(f"{op}: {name}: expected all on {device}, found {tensor.device} for parameter {p}")
        if tensor.layout != torch.strided:
            refuse(f"{op}: {name}: expected a dense tensor for parameter {p}, found {tensor.layout}")


def _check_small(op: str, name: str, tensor: Tensor, tasks: int, dtype: torch.dtype, device: torch.device) -> None:
    # Kernels take its address and no stride.
    fits = tensor.layout == torch.strided and tensor.is_contiguous()
    if not fits or tensor.shape != (tasks,) or tensor.dtype != dtype or tensor.device != device:
        found = f"{shape_of(tensor)} {tensor.dtype} on {tensor.device}" + ", not contiguous" * (not fits)
        refuse(f"{op}: {name}: expected [{tasks}] {dtype} on {device}, contiguous, found {found}")


# ---- the kernels -----------------------------------------------------------------------------------------------------


def _in_order(op: str, step: Step) -> tuple[Step, list[tuple[Tensor, Tensor]]]:
    """Return the step over tensors that are dense and in one element order for each parameter, as kernels take them;
    and pairs of a tensor that is not and its copy, which is to be copied back."""
    if all(map(Tensor.is_contiguous, itertools.chain(step.parameters, *step.moments))):
        return step, []
    # empty_like keeps the strides of what is dense, in whatever order, and of nothing else.
    orders = [p if p.is_contiguous() or same_order(o := torch.empty_like(p), p) else o for p in step.parameters]
    copies: list[tuple[Tensor, Tensor]] = []

    def ordered(tensors: list[Tensor]) -> list[Tensor]:
        found = [in_order_of(tensor, orders[i * len(orders) // len(tensors)]) for i, tensor in enumerate(tensors)]
        pairs = [(tensor, copy) for tensor, copy in zip(tensors, found) if copy is not tensor]
        for tensor, _ in pairs:
            if any(apart == 0 and size > 1 for apart, size in zip(tensor.stride(), tensor.shape)):
                refuse(
                    f"{op}: expected parameters and moments with memory for every element, found an expanded tensor; "
                    "use .clone()"
                )
        copies.extend(pairs)
        return found

    moments = type(step.moments)(*map(ordered, step.moments))
    return step._replace(parameters=ordered(step.parameters), moments=moments), copies


class _Launch:
    """The parameters of one dtype, with moments of one dtype, as a kernel takes them; all but the tensors."""

    def __init__(self, op: str, step: Step, places: Sequence[int], moment_dtype: torch.dtype):
        self.op, self.tasks, self.places, self.whole = op, step.tasks, places, len(places) == len(step.parameters)
        own = self._own(step.parameters)
        self.codes = DTYPE_CODES[own[0].dtype], DTYPE_CODES[moment_dtype]
        self.sizes = array("q", map(Tensor.numel, own))
        self.apart = array("q", [size * own[0].element_size() for size in self.sizes])
        keys = step.settings.keys
        self.keys = None if keys is None else array("q", [keys[p] for p in places])

    def _own(self, of_all: Any, each: int = 1) -> Any:
        return of_all if self.whole else [of_all[p * each + t] for p in self.places for t in range(each)]

    def _rows(self, step: Step) -> tuple[Any, list[Tensor]]:
        """Return the gradients' table, and what its pointers need alive."""
        kept, orders, apart = self._own(step.jacobians), self._own(step.parameters), self.apart
        if not all(map(Tensor.is_contiguous, kept)) or not all(map(Tensor.is_contiguous, orders)):
            kept = [j if same_order(j[0], order) else _stacked_like(j, order) for j, order in zip(kept, orders)]
            apart = array("q", [j.stride(0) * j.element_size() for j in kept])
        return (pointers(kept), apart, self.sizes, self.tasks), kept

    def run(self, kernels: ModuleType, tables: Sequence[array[int]], step: Step) -> None:
        own = [array("Q", self._own(table, len(table) // len(step.parameters))) or None for table in tables]
        (parameters, *moments, steps, squares), (rows, kept), by = own, self._rows(step), step.settings
        device = kept[0].device
        size = kernels.adatask_workspace(self.tasks, len(self.places), sum(self.sizes)) if squares else 0
        workspace = torch.empty(size, dtype=torch.float64, device=device)
        lr = 0 if by.lr_tensor is None else by.lr_tensor.data_ptr()
        weights, present = array("d", by.task_weights), 0 if by.present is None else by.present.data_ptr()
        stochastic = self.keys is not None
        settings = (by.lr, lr, by.eps, by.weight_decay, by.maximize, stochastic, by.square_decay, weights, present)
        moved = (rows, (parameters, steps, squares, self.keys), tuple(moments), tuple(step.rule), settings)
        kernel = getattr(kernels, self.op.removeprefix("adatask_"))
        kernel(*self.codes, *moved, workspace.data_ptr(), launch_place(device))


def _stacked_like(jacobian: Tensor, order: Tensor) -> Tensor:
    rows = jacobian.new_empty_strided((len(jacobian), *order.shape), (order.numel(), *order.stride()))
    return rows.copy_(jacobian)


def _launches(op: str, step: Step) -> list[_Launch]:
    groups: dict[Any, list[int]] = {}
    for p, pair in enumerate(zip(map(_DTYPE, step.parameters), step.moment_dtypes())):
        groups.setdefault(pair, []).append(p)
    return [_Launch(op, step, places, moment) for (_, moment), places in groups.items()]


def _tables(op: str, step: Step) -> list[array[int]]:
    """Read the addresses of all that is changed."""
    tables = list(map(pointers, step.tensors))
    for table, tensors in zip(tables, step.tensors):
        if 0 in table and any(t.numel() and not t.data_ptr() for t in tensors):
            refuse(f"{op}: expected tensors with memory, found one whose storage was freed")
    return tables


def _run(kernels: ModuleType, launches: Sequence[_Launch], tables: Sequence[array[int]], step: Step) -> None:
    present = step.settings.present
    if step.steps[0].device.type == "cpu":
        _C.count_steps(tables[-2], len(step.steps), step.tasks, 0 if present is None else present.data_ptr())
        mark_written(step.steps)
    else:
        torch._foreach_add_(step.steps, 1.0 if present is None else [present.to(torch.float32)] * len(step.steps))
    for launch in launches:
        launch.run(kernels, tables, step)


def _kernel(op: str, kernels: ModuleType, *arguments: Any) -> Any:
    given = Step(*arguments[:-1])
    if given.tasks > kernels.adatask_max_tasks:
        return NotImplemented
    step, copies = _in_order(op, given)
    _run(kernels, _launches(op, step), _tables(op, step), step)
    for tensor, copy in copies:
        tensor.copy_(copy)
    mark_written(given.parameters)
    return None


def _refer(function: Any, *arguments: Any) -> None:
    step = Step(*arguments)

    def lists(name: str, tensors: list[Tensor]) -> Any:
        if not tensors or name == "momentum_buffers":
            return tensors or None
        return [tensors[i : i + step.tasks] for i in range(0, len(tensors), step.tasks)]

    options = step.settings._asdict() | step.rule._asdict()
    lr = options.pop("lr_tensor")
    if isinstance(step.rule, Adam):
        options["betas"] = options.pop("beta1"), options.pop("beta2")
    if lr is not None:
        options["lr"] = lr[0]
    moments = {name: lists(name, tensors) for name, tensors in step.moments._asdict().items()}
    function(step.parameters, step.jacobians, **moments, steps=step.steps, squares=step.squares or None, **options)


def _declare(op: str, moments: type, rule: type) -> Operation:
    return Operation(
        f"{op}(Changed parameters, Tensor[] jacobians, {moments.__name__} moments, Changed steps, Changed squares, "
        f"{rule.__name__} rule, StepSettings settings) -> ()",
        structs=[moments, rule, StepSettings],
        check=partial(_check, op),
        kernel=partial(_kernel, op),
        reference=partial(_refer, getattr(reference, op)),
    )


ADAM = _declare("adatask_adam", AdamMoments, Adam)
RMSPROP = _declare("adatask_rmsprop", RMSpropMoments, RMSprop)
ADAGRAD = _declare("adatask_adagrad", AdagradMoments, Adagrad)


# ---- many steps over the same tensors --------------------------------------------------------------------------------


class TaskStep:
    """Take steps over the same parameters and moments, again and again.

    What follows from them is looked at once, and again when one of them has died, is another, has moved, or lies
    otherwise. It keeps none of them alive, and uses no address that it has not read from its tensor in the same step.

    Args:
        operation: ``ADAM``, ``RMSPROP`` or ``ADAGRAD`` of :mod:`mtlgrad.ops.adatask`.
    """

    def __init__(self, operation: Operation):
        self.operation = operation
        self._known: list[Any] = []  #: of the tensors that all that follows was made for; empty: of none
        self._watched: list[weakref.ref[Tensor]] = []  #: until one dies, an identity is that of one of these
        self._launches: list[_Launch] = []
        self._expected: list[Any] = []  #: the jacobians' shapes, dtypes and devices

    def __call__(self, step: Step) -> None:
        step = step.real()
        kernels = KERNELS.get(step.parameters[0].device.type)
        if kernels is None or not is_eager(step.jacobians) or not self._fits(kernels, step):
            self.operation(*step)
            return
        _check_settings(self.operation.name, step.parameters[0].device, step.settings)
        self._run(kernels, step)

    @hide_from_dynamo
    def _run(self, kernels: ModuleType, step: Step) -> None:
        _run(kernels, self._launches, self._known[-1], step)
        mark_written(step.parameters)

    def _fits(self, kernels: ModuleType, step: Step) -> bool:
        """Whether a kernel can work on the tensors themselves; the operation knows what to do with all others."""
        op, parameters, tensors = self.operation.name, step.parameters, step.tensors
        lie = all(map(Tensor.is_contiguous, parameters)) or list(map(Tensor.stride, parameters))
        known: list[Any] = [step.tasks, step.settings.keys, lie, list(map(Tensor.numel, parameters))]
        known += [[list(map(id, some)) for some in tensors], _tables(op, step)]
        if known != self._known:
            self._forget()
            every = list(itertools.chain(*tensors))
            if step.tasks > kernels.adatask_max_tasks or not is_eager(every):
                return False
            _check(op, *step)
            if _in_order(op, step)[1]:
                return False
            self._launches = _launches(op, step)
            shapes = [(step.tasks, *shape) for shape in map(_SHAPE, parameters)]
            self._expected = [shapes, list(map(_DTYPE, parameters)), list(map(_DEVICE, parameters))]
            self._watched, self._known = [weakref.ref(tensor, self._forget) for tensor in every], known
        found = [list(map(what, step.jacobians)) for what in (_SHAPE, _DTYPE, _DEVICE)]
        return found == self._expected and set(map(_LAYOUT, step.jacobians)) == {torch.strided}

    def _forget(self, _: object = None) -> None:
        self._known, self._watched = [], []
