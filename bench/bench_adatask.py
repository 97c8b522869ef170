"""Benchmark of the `adatask` stem: whole steps of AdaTask's optimizers, whose moments have seen a few steps before.

All contenders of a case share the gradients, the parameters and the moments, which are put back before each call: each
call makes the same step. An error is the largest difference, of the parameters' change and of the moments after it,
from a float64 step, relative to the tensor's largest entry, over all tensors. Where bfloat16 is stored, it is counted
in roundings: times 2^-16, the ratio of the two types' precision.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.bench_combine import gradients, uneven
from bench.harness import Case, Contender, Work, relative_error, replayed
from bench.peers import adatask_published as published
from mtlgrad import ops, optim, reference
from mtlgrad.recipes.backbones import resnet50_shapes

STEPS = 4.0  # made before
ROUNDING = 2.0**-22  # of float32, allowed on top of twice the eager step's error
COMPILED = 8  # tasks at most, of one tensor: unrolled, a ResNet-50's 161 with 3 tasks compile for over 5 minutes


class Rule(NamedTuple):
    """An optimizer; every rule runs with torch.optim's defaults."""

    optimizer: type[optim.AdaTaskAdam] | type[optim.AdaTaskRMSprop] | type[optim.AdaTaskAdagrad]
    moments: tuple[str, ...]  #: in its state
    arithmetic: int  #: operations per element and task
    fused: bool  #: torch.optim has a fused step of its own


RULES = {
    "adam": Rule(optim.AdaTaskAdam, ("exp_avg", "exp_avg_sq"), 14, True),
    "rmsprop": Rule(optim.AdaTaskRMSprop, ("square_avg",), 9, False),
    "adagrad": Rule(optim.AdaTaskAdagrad, ("sum",), 8, True),
}


class Problem:
    """Parameters, T gradients each, and moments in the middle of a training."""

    def __init__(
        self,
        rule: str,
        shapes: Sequence[tuple[int, ...]],
        tasks: int,
        dtypes: tuple[torch.dtype, torch.dtype],
        stochastic: bool,
        device: torch.device,
    ):
        """`dtypes`: of the parameters and of the moments."""
        self.name, self.rule, self.tasks, self.device = rule, RULES[rule], tasks, device
        self.dtypes, self.stochastic = dtypes, stochastic
        sizes = [math.prod(shape) for shape in shapes]
        rows = gradients(tasks, sum(sizes), device)
        # So small that rounding them hides little of how they change.
        base = torch.randn(sum(sizes), generator=torch.Generator(device).manual_seed(1), device=device) * 1e-3
        self.parameters: list[Any] = []  # nn.Parameter with .jac
        for shape, part, start in zip(shapes, rows.split(sizes, dim=1), base.split(sizes), strict=True):
            p: Any = nn.Parameter(start.reshape(shape).to(dtypes[0], copy=True))
            p.jac = part.reshape(tasks, *shape).to(dtypes[0], copy=True)
            self.parameters.append(p)
        self.bare = [p.detach() for p in self.parameters]
        self.jacobians = [p.jac for p in self.parameters]
        self.moments = {
            name: [[self.moment(name, row) for row in jacobian] for jacobian in self.jacobians]
            for name in self.rule.moments
        }
        self.steps = [torch.full((tasks,), STEPS, device=device) for _ in shapes]
        self.changing = [*self.bare, *(m for lists in self.moments.values() for row in lists for m in row)]
        self.start = [tensor.clone() for tensor in self.changing]

    def moment(self, name: str, gradient: Tensor) -> Tensor:
        """Of the gradients' size, far from zero where a square."""
        other = gradient.flatten().flip(0).reshape(gradient.shape).float()
        if name != "exp_avg":
            other = 0.5 * other.square() + 0.5 * other.square().mean()
        return (0.5 * other).to(self.dtypes[1])

    def restore(self) -> None:
        torch._foreach_copy_(self.changing, self.start)
        for step in self.steps:
            step.fill_(STEPS)

    # ---- what is right ----

    @functools.cached_property
    def exact(self) -> list[Tensor]:
        """The parameters' changes and the moments after the step, in float64, as `changing` lists them."""
        changes: list[Tensor] = []
        moments: dict[str, list[Tensor]] = {name: [] for name in self.rule.moments}
        begun = iter(self.start[len(self.bare) :])
        started = {name: [[next(begun) for _ in range(self.tasks)] for _ in self.bare] for name in self.rule.moments}
        for p, before in enumerate(self.start[: len(self.bare)]):
            own = {name: [m.double() for m in lists[p]] for name, lists in started.items()}
            # From zero, with gradients of their own dtype: no rule here reads the parameter.
            change = torch.zeros_like(before, dtype=torch.float64)
            step = [torch.full((self.tasks,), STEPS, device=self.device)]
            for t in range(self.tasks):  # one after another: the changes add up, and T gradients in float64 are many
                row = self.jacobians[p][t : t + 1].double()
                self.refer([change], [row], [[[m[t]]] for m in own.values()], [step[0][t : t + 1]])
            changes.append(change)
            for name, tensors in own.items():
                moments[name] += tensors
        return [*changes, *(m for tensors in moments.values() for m in tensors)]

    def error(self, _: Any = None) -> float:
        worst = 0.0
        for i, (value, before, exact) in enumerate(zip(self.changing, self.start, self.exact, strict=True)):
            found = value.double()
            if i < len(self.bare):
                found -= before
            part = relative_error(found, exact)
            worst = max(worst, part if value.dtype == torch.float32 else part * 2.0**-16)
        return worst

    @functools.cached_property
    def eager_error(self) -> float:
        self.restore()
        self.refer(self.bare, self.jacobians, list(self.moments.values()), self.steps)
        return self.error()

    def bound(self) -> float:
        return 2.0 * self.eager_error + ROUNDING

    # ---- the contenders ----

    def operation(self, module: Any) -> Callable[..., None]:
        found: Callable[..., None] = getattr(module, f"adatask_{self.name}")
        return found

    def refer(self, parameters: Any, jacobians: Any, moments: Sequence[Any], steps: Any, **options: Any) -> None:
        self.operation(reference)(parameters, jacobians, *moments, steps, **options)

    def optimizer(self, **options: Any) -> torch.optim.Optimizer:
        """With the state of this problem."""
        found = self.rule.optimizer(
            self.parameters,
            num_tasks=self.tasks,
            moments_dtype=self.dtypes[1],
            stochastic_rounding=self.stochastic,
            **options,
        )
        for p, parameter in enumerate(self.parameters):
            state = found.state[parameter]
            state["step"] = self.steps[p]
            for name, lists in self.moments.items():
                state |= {f"{name}_{t}": moment for t, moment in enumerate(lists[p])}
        return found

    def contender(self, call: Callable[[], Any], note: str = "", **options: Any) -> Contender:
        return Contender(torch.no_grad()(call), self.bound, note, prepare=self.restore, **options)

    def ours(self) -> dict[str, Contender]:
        step = self.optimizer().step
        keys = range(len(self.bare)) if self.stochastic else None
        arguments = (self.bare, self.jacobians, *self.moments.values(), self.steps)
        operation = self.operation(ops)
        found = {
            "mtlgrad": self.contender(step, f"{self.rule.optimizer.__name__}.step"),
            "mtlgrad op": self.contender(lambda: operation(*arguments, keys=keys), f"ops.adatask_{self.name}"),
        }
        if self.device.type == "cuda":
            captured = replayed(self.optimizer(capturable=True).step, self.restore)
            found["mtlgrad graph"] = self.contender(captured, "capturable=True, CUDA graph", optional=True)
        return found

    def peers(self, compiled: bool) -> dict[str, Contender]:
        if self.stochastic:  # no other step rounds so; the reference's random bits take a minute
            return {}
        gradients = [list(jacobian) for jacobian in self.jacobians]
        lists = list(self.moments.values())
        by_task = [[[row[t] for row in moment] for t in range(self.tasks)] for moment in (gradients, *lists)]
        transcription = getattr(published, self.name)

        def literal(step: Callable[..., None]) -> Callable[[], None]:
            count = itertools.count(int(STEPS) + 1)  # goes on: what is compiled must not depend on it
            return lambda: step(self.bare, gradients, *lists, next(count))

        # They round the parameters T times, which is more than is allowed to ours.
        doubtful = {"optional": True, "tolerated": True}
        found = {"published": self.contender(literal(transcription), "transcription, the step alone", tolerated=True)}
        device = torch.device("cpu")
        forms = ["foreach", *["fused"] * self.rule.fused]
        for form in forms if self.dtypes[0] == self.dtypes[1] else ():  # torch's steps know no other moments
            if form == "fused":
                device = self.device  # where it wants to find the steps
            counted = [[torch.tensor(STEPS, device=device) for _ in self.bare] for _ in range(self.tasks)]
            step = functools.partial(published.by_torch, self.name, self.bare, by_task[0], by_task[1:], counted)
            call = functools.partial(step, **{form: True})
            note = f"T calls of torch.optim's own step, {form}"
            found[f"torch {form}"] = self.contender(call, note, **doubtful)
        eager = self.operation(reference)
        arguments = (self.bare, self.jacobians, *lists, self.steps)
        slow = self.tasks * sum(p.numel() for p in self.bare) > 100_000_000
        found["reference"] = self.contender(lambda: eager(*arguments), once=slow and self.device.type == "cpu")
        if compiled:
            torch.compiler.reset()  # of an earlier case's shapes: there is a limit to recompiling
            fused = torch.compile(eager, dynamic=False)
            note = "torch.compile of the reference"
            found["compiled"] = self.contender(lambda: fused(*arguments), note, optional=True)
            note = "torch.compile of the published step"
            found["compiled published"] = self.contender(literal(torch.compile(transcription)), note, **doubtful)
        return found


def build(
    rule: str,
    shapes: Sequence[tuple[int, ...]],
    tasks: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    stochastic: bool,
    device: torch.device,
    compiled: bool,
    small: bool,
) -> Work:
    if small:
        shapes = [tuple(min(n, 1000 if len(shape) == 1 else 8) for n in shape) for shape in shapes]
    problem = Problem(rule, shapes, tasks, dtypes, stochastic, device)
    elements = sum(math.prod(shape) for shape in shapes)
    values = [1, 2 * len(problem.rule.moments)]  # gradients; moments, read and written
    sizes = [dtype.itemsize for dtype in dtypes]
    return Work(
        problem.ours() | problem.peers(compiled),
        problem.error,
        bytes=elements * (2 * sizes[0] + tasks * (values[0] * sizes[0] + values[1] * sizes[1])),
        flops=elements * tasks * problem.rule.arithmetic,
    )


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cases(quick: bool, device: torch.device) -> list[Case]:
    """All there is to run, Adam first."""
    found: list[Case] = []
    plain = (torch.float32, torch.float32)
    sizes = (20_000,) if quick else (1_000_000, 10_000_000)
    resnet = [tuple(min(n, 8) for n in shape) if quick else shape for shape in resnet50_shapes()]

    def add(
        rule: str,
        text: str,
        shapes: Sequence[tuple[int, ...]],
        tasks: int,
        dtypes: tuple[torch.dtype, torch.dtype] = plain,
        stochastic: bool = False,
        memory: bool = False,
    ) -> None:
        compiled = not quick and dtypes == plain and tasks * len(shapes) <= COMPILED
        settings = (rule, shapes, tasks, dtypes, stochastic, device, compiled)
        name = "/".join(dict.fromkeys(short(dtype) for dtype in dtypes))
        shape = f"T={tasks} {text}"
        found.append(Case(f"adatask {rule}", shape, functools.partial(build, *settings), f"{name}", memory=memory))

    single, most = [(sizes[-1],)], f"N={sizes[-1]:.0e}"
    for tasks in (3,) if quick else (2, 3, 8, 20):
        add("adam", most, single, tasks, memory=tasks == 3)
    if not quick:
        for size in 10_000, 100_000, sizes[0]:
            add("adam", f"N={size:.0e}", [(size,)], 3)
        if device.type == "cuda":
            add("adam", "N=1e+08", [(100_000_000,)], 3)
    for tasks in (3,) if quick else (2, 3, 8):
        add("adam", "resnet-50, 161 parameters", resnet, tasks, memory=tasks == 3)
    many = 100 if quick else 1000
    add("adam", f"{most} in {many} tensors", [(n,) for n in uneven(sizes[-1], many)], 3)
    for rule in "rmsprop", "adagrad":
        add(rule, most, single, 3)
    half = torch.bfloat16
    add("adam", f"{most} bfloat16, float32 moments", single, 3, (half, torch.float32))
    add("adam", f"{most} bfloat16 moments, nearest", single, 3, (torch.float32, half))
    add("adam", f"{most} bfloat16 moments, stochastic", single, 3, (torch.float32, half), stochastic=True)
    return found
