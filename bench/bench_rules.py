"""Benchmark of the `rules` stem: task weights from a Gram matrix, and whole merges of a ResNet-50's gradients.

The gradients have a part in common, and their lengths differ up to tenfold; some of them conflict.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import mtlgrad
from bench.bench_combine import SUM, exact_sum, flat, gradients
from bench.harness import Case, Contender, Work, relative_error, replayed
from bench.peers import torchjd_merge as torchjd
from mtlgrad import ops, reference
from mtlgrad.recipes.backbones import resnet50_shapes

EXACT = 1e-8
Rule = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Callable[[int], mtlgrad.GramRule] | None]
#: The operation, its reference, and the module that merges.
RULES: dict[str, Rule] = {
    "upgrad": (ops.upgrad, reference.upgrad, mtlgrad.UPGrad),
    "dualproj": (ops.dualproj, reference.dualproj, None),
    "mgda": (ops.mgda, reference.mgda, mtlgrad.MGDA),
    "cagrad": (ops.cagrad, reference.cagrad, mtlgrad.CAGrad),
    "nash": (ops.fairgrad, reference.fairgrad, mtlgrad.NashMTL),
    "fairgrad": (lambda m: ops.fairgrad(m, 2.0, False), lambda m: reference.fairgrad(m, 2.0, False), None),
    "imtlg": (ops.imtlg, reference.imtlg, None),
}


def build_weights(name: str, tasks: int, device: torch.device, quick: bool, small: bool) -> Work:
    ours, eager, _ = RULES[name]
    rows = gradients(tasks, 256, device).double()
    gram = reference.gram(rows - 0.7 * rows.mean(0))
    contenders = {"mtlgrad": Contender(lambda: ours(gram), EXACT)}
    if device.type == "cuda":
        contenders["mtlgrad graph"] = Contender(replayed(lambda: ours(gram)), EXACT, "CUDA graph", optional=True)
    contenders["reference"] = Contender(lambda: eager(gram), EXACT)
    peer = functools.cache(lambda: torchjd.weighting(name, tasks))
    contenders["torchjd"] = Contender(lambda: peer()(gram), EXACT, torchjd.version(), **torchjd.OPTIONS)
    exact = functools.cache(lambda: eager(gram.cpu()).to(device))
    size = 8 * tasks * (tasks + 1)
    return Work(contenders, lambda output: relative_error(output, exact()), bytes=size, flops=tasks**3)


def build_merge(name: str, tasks: int, device: torch.device, quick: bool, small: bool) -> Work:
    """``.jac`` of all parameters, which stays from call to call; ``.grad`` is None before each."""
    shapes = [tuple(min(n, 8) for n in shape) if small or quick else shape for shape in resnet50_shapes()]
    sizes = [math.prod(shape) for shape in shapes]
    parameters: list[Any] = [nn.Parameter(torch.empty(shape, device=device)) for shape in shapes]
    rows = gradients(tasks, sum(sizes), device)
    rows -= 0.7 * rows.mean(0)
    for p, part in zip(parameters, rows.split(sizes, dim=1), strict=True):
        p.jac = part.reshape(tasks, *p.shape)
    listed = [[p.jac[t] for p in parameters] for t in range(tasks)]
    _, eager, make = RULES[name]
    assert make is not None
    rule = make(tasks)

    def clear() -> None:
        for p in parameters:
            p.grad = None

    def filled(fill: Callable[[], object], **options: Any) -> Contender:
        def call() -> list[Tensor]:
            fill()
            return [p.grad for p in parameters]

        return Contender(call, SUM, prepare=clear, **options)

    peer = functools.cache(lambda: torchjd.aggregator_of(name, tasks))
    contenders = {
        "mtlgrad merge": filled(lambda: rule.merge(parameters, retain_jac=True)),
        "torchjd": filled(
            lambda: torchjd.merge_by(peer(), parameters), note=f"{torchjd.version()}, jac_to_grad", **torchjd.OPTIONS
        ),
    }
    exact = functools.cache(lambda: exact_sum(listed, eager(reference.gram(listed))))
    columns = sum(sizes)
    return Work(
        contenders,
        lambda output: relative_error(flat(output), exact()),
        bytes=columns * 4 * (2 * tasks + 1),
        flops=columns * tasks * (tasks + 3),
    )


def cases(quick: bool, device: torch.device) -> list[Case]:
    found = []
    for name, (_, _, make) in RULES.items():
        for tasks in (3,) if quick else (3, 8, 20, 40):
            build = functools.partial(build_weights, name, tasks, device, quick)
            found.append(Case(name, f"T={tasks}", build, dtype="float64", memory=False))
        if make is not None:
            build = functools.partial(build_merge, name, 3, device, quick)
            found.append(Case(f"{name} resnet-50", "T=3 161 parameters", build, memory=False))
    return found
