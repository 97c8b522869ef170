"""Benchmark of whole training steps: forward, backward and optimizer of backbone and heads (Adam, torch's default), for
three networks with 3 heads (a regression, a class of ten, five binary labels in one task) and with 20 (binary tasks).

Where a gradient a task takes seconds, contenders that make one are timed once.

Parameters and moments are put back before each call, untimed, so all contenders make the same step, and how the
parameters change is checked; step_problem.py says what is right for each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mtlgrad
from bench.harness import Case, Contender, Work
from bench.peers import adatask_published, bayesagg_published, libmtl_loops
from bench.peers import torchjd_merge as torchjd
from bench.step_alphavil import alphavil
from bench.step_problem import BETAS, EPS, LR, POWER, STEPS, Problem, Shape
from mtlgrad.posterior.posteriors import DEFAULT_GAMMA

# Largest difference of the parameters' change allowed, relative to the largest change. Passes that differ in the last
# bit of what enters them differ by more where they leave: by 1e-5 in a ResNet-50.
ROUNDING = 1e-4
POINTS = 2e-3  # 128 points for a softmax: the layer integrates over other coordinates than the reference does
SAMPLES = 1024
MONTE_CARLO = 4 / SAMPLES**0.5  # some five times what so many samples leave


def sum_of(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(losses)).sum()


def ours(problem: Problem) -> dict[str, Contender]:
    tasks = len(problem.kinds)
    aligned = mtlgrad.AlignedMTL(tasks)

    def layer() -> None:
        sum_of(problem.losses(aligned(problem.model.backbone(problem.images)))).backward()

    def weigh() -> None:
        features, losses = problem.start()
        (aligned.weigh(losses, features) * torch.stack(losses)).sum().backward()

    def merge() -> None:
        features, losses = problem.start()
        mtlgrad.task_backward(losses, problem.shared, features=features)
        aligned.merge(problem.shared)

    def adatask() -> str:
        features, losses = problem.start()
        mtlgrad.task_backward(losses, problem.shared, features=features)
        problem.adatask.step()
        return "adatask"

    return {
        "mtlgrad aligned layer": step(problem, "features", layer, ROUNDING, "gradients at the features"),
        "mtlgrad aligned weigh": step(problem, "weighed", weigh, ROUNDING, "gradients at the features, weights first"),
        "mtlgrad aligned merge": step(
            problem,
            "parameters",
            merge,
            ROUNDING,
            "gradients at the parameters, task_backward",
            once=problem.slow,
        ),
        "mtlgrad bayesagg": bayesagg(problem),
        "mtlgrad adatask": Contender(
            adatask,
            ROUNDING,
            "task_backward, AdaTaskAdam.step",
            once=problem.slow,
            prepare=lambda: problem.prepare(problem.adatask),
        ),
    }


def step(
    problem: Problem, form: str, backward: Callable[[], None], bound: float, note: str = "", **options: Any
) -> Contender:
    """`backward` leaves gradients for Adam."""

    def call() -> str:
        backward()
        problem.adam.step()
        return form

    options = {"prepare": lambda: problem.prepare(problem.adam)} | options
    return Contender(call, bound, note, **options)


def bayesagg(problem: Problem) -> Contender:
    groups = problem.groups()
    makers: dict[str, Callable[..., Any]] = {
        "regression": functools.partial(mtlgrad.Regression, noise=1.0, bias=False),
        "binary": mtlgrad.Binary,
        "multiclass": mtlgrad.Multiclass,
    }
    registered = [makers[kind](heads, gamma=DEFAULT_GAMMA) for kind, heads, _ in groups]
    layer = mtlgrad.BayesAgg(registered, statistics="stored", reduction="mean")
    targets = [target for _, _, target in groups]

    def prepare() -> None:
        if layer.posteriors is None:
            problem.restore()
            layer(problem.model.backbone(problem.images).detach().requires_grad_(), targets)
            layer.refresh()
        for full_data in layer._full_data:  # the epoch so far, which would grow from call to call
            full_data.end_epoch()
        problem.prepare(problem.adam)

    def backward() -> None:
        features = layer(problem.model.backbone(problem.images), targets)
        layer.total(problem.losses([features] * len(problem.kinds))).backward()

    several = any(kind == "multiclass" for kind, _ in problem.kinds)
    note = "exact moments, without refresh()" + ", a covariance for each class" * several
    return step(problem, "bayesagg", backward, POINTS if several else ROUNDING, note, prepare=prepare)


def peers(problem: Problem) -> dict[str, Contender]:
    def jacobians() -> None:
        features, losses = problem.start()
        torchjd.backward(losses, features)

    def aligned(per_tensor: bool) -> None:
        jacobians()
        torchjd.to_grad(problem.shared, per_tensor, retain=False)

    def upgrad() -> None:
        jacobians()
        torchjd.upgrad_to_grad(problem.shared)

    def loop() -> None:
        libmtl_loops.aligned_backward(problem.start()[1], problem.shared, problem.own)

    def adatask() -> str:
        """The moments are those of our optimizer's state. Heads have Adam: the backbone has no ``.grad`` then."""
        losses = problem.start()[1]
        gradients: list[list[Tensor]] = [[] for _ in problem.shared]
        for t, loss in enumerate(losses):
            loss.backward(retain_graph=t + 1 < len(losses))
            for row, p in zip(gradients, problem.shared, strict=True):
                assert p.grad is not None
                row.append(p.grad.clone())
                p.grad = None
        state = [problem.adatask.state[p] for p in problem.shared]
        first, second = [
            [[own[f"{name}_{t}"] for t in range(len(losses))] for own in state] for name in ("exp_avg", "exp_avg_sq")
        ]
        with torch.no_grad():
            adatask_published.adam(problem.shared, gradients, first, second, int(STEPS) + 1, LR, BETAS, EPS)
        problem.adam.step()
        return "adatask"

    options = torchjd.OPTIONS | {"once": problem.slow}
    found = {
        "torchjd aligned merge": step(
            problem,
            "parameters",
            functools.partial(aligned, per_tensor=False),
            ROUNDING,
            f"{torchjd.version()}, mtl_backward",
            **options,
        ),
        "torchjd aligned per tensor": step(
            problem,
            "parameters",
            functools.partial(aligned, per_tensor=True),
            ROUNDING,
            f"{torchjd.version()}, mtl_backward, optimize_gramian_computation",
            **options,
        ),
        "torchjd upgrad": step(problem, "upgrad", upgrad, ROUNDING, f"{torchjd.version()}, mtl_backward", **options),
        "libmtl aligned merge": step(
            problem,
            "parameters",
            loop,
            ROUNDING,
            "a backward a task, copied into [T, N]",
            once=problem.slow,
            tolerated=True,
        ),
        "published adatask": Contender(
            adatask,
            ROUNDING,
            "transcription: a backward a task, cloned",
            once=problem.slow,
            prepare=lambda: problem.prepare(problem.adam, problem.adatask),
            tolerated=True,
        ),
    }
    if problem.shape.literal:
        found["published bayesagg"] = published_bayesagg(problem)
    return found


def published_bayesagg(problem: Problem) -> Contender:
    kept: list[Any] = []

    def groups() -> list[bayesagg_published.Group]:
        """With the heads as they stand."""
        found = []
        for kind, heads, _ in problem.groups():
            weight = torch.cat([torch.cat([head.weight, head.bias[:, None]], 1) for head in heads]).detach()
            weight_or_none = None if kind == "regression" else weight
            found.append(bayesagg_published.Group(kind, len(weight), weight_or_none, power=POWER))
        return found

    targets = [target for _, _, target in problem.groups()]

    def prepare() -> None:
        torch.manual_seed(0)
        if not kept:
            problem.restore()
            with torch.no_grad():
                features = problem.model.backbone(problem.images)
                kept.extend(bayesagg_published.full_data_posteriors(groups(), features, targets))
        problem.prepare(problem.adam)

    def backward() -> None:
        features = problem.model.backbone(problem.images)
        leaf = features.detach().requires_grad_()
        sum_of(problem.losses([leaf] * len(problem.kinds))).backward()
        gradient = bayesagg_published.published_step(groups(), leaf.detach(), targets, kept, num_samples=SAMPLES)
        features.backward(gradient)

    note = f"transcription, {SAMPLES} samples"
    return step(problem, "bayesagg full", backward, MONTE_CARLO, note, prepare=prepare, once=True, tolerated=True)


def contenders(problem: Problem) -> dict[str, Contender]:
    def plain() -> None:
        sum_of(problem.start()[1]).backward()

    found = {"plain": step(problem, "sum", plain, ROUNDING, "sum of the losses"), **ours(problem)}
    if len(problem.kinds) == 3:
        found["mtlgrad alphavil round"] = alphavil(problem)
    return found | peers(problem)


def build(shape: Shape, device: torch.device, small: bool) -> Work:
    problem = Problem(shape.toy() if small else shape, device)
    # Only attention written out in products is counted on every device.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        sum_of(problem.start()[1]).backward()
    problem.restore()
    count = sum(p.numel() for p in problem.every)
    # Images and weights in, gradients out; Adam reads the gradient, and reads and writes parameter and two moments.
    moved = problem.images.element_size() * (problem.images.numel() + (2 + 7) * count)
    flops = counter.get_total_flops() + 14 * count

    def error(output: str | Callable[[], float]) -> float:
        return output() if callable(output) else problem.error(output)

    return Work(contenders(problem), error, moved, flops, examples=problem.shape.batch)


def cases(quick: bool, device: torch.device) -> list[Case]:
    if device.type == "cuda":
        shapes = [
            shape
            for tasks in (3, 20)
            for shape in (
                Shape("resnet-50", tasks, 128, (224, 224), 64),
                Shape("resnet-18", tasks, 128, (224, 224), 64, literal=tasks == 3),
                Shape("transformer", tasks, 64, (64, 128), 768, 12, tasks == 3),
            )
        ]
    else:
        shapes = [
            Shape("resnet-18", 3, 32, (64, 64), 64),
            Shape("resnet-50", 3, 16, (64, 64), 64),
            Shape("transformer", 3, 32, (64, 64), 256, 4, literal=True),
            Shape("resnet-18", 20, 32, (32, 32), 64),
            Shape("resnet-50", 20, 16, (32, 32), 64),
            Shape("transformer", 20, 32, (32, 32), 256, 4),
        ]
    return [
        Case(
            f"step {shape.network}",
            shape.text,
            functools.partial(build, shape, device),
            memory=device.type == "cuda" or shape.tasks == 3,
        )
        for shape in ([shape.toy() for shape in shapes[:4]] if quick else shapes)
    ]
