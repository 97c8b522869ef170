"""Benchmark of the `combine`, `align` and `rules` stems.

Whole Aligned-MTL aggregations (Gram matrix, alignment, weighted sum) of a matrix of gradients and of the parameters of
a ResNet-50, and each of their operations by itself.

The gradients have a part in common, and their lengths differ up to tenfold: full rank, condition numbers from 10 to 50.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import mtlgrad
from bench.harness import Case, Contender, Work, relative_error, replayed
from bench.peers import libmtl_loops
from bench.peers import torchjd_merge as torchjd
from mtlgrad import ops, reference
from mtlgrad.recipes.backbones import resnet50_shapes

# Largest error allowed, relative to the largest entry.
SUM = 1e-5  # summed in float32
ROUNDED = 4e-3  # to bfloat16
ONCE = 6e-8  # summed in float64, rounded once to float32
DOUBLE = 1e-9
EXACT = 1e-8  # of rules' weights

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


def gradients(tasks: int, columns: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randn(tasks, columns, generator=generator, device=device)
    rows += torch.randn(columns, generator=generator, device=device)
    rows *= torch.logspace(-0.5, 0.5, tasks, device=device)[:, None]
    return rows.to(dtype)


def flat(output: Tensor | Sequence[Tensor]) -> Tensor:
    return output.reshape(-1) if isinstance(output, Tensor) else torch.cat([part.reshape(-1) for part in output])


def aligned_sum(rows: Any) -> Any:
    """The whole aggregation in plain PyTorch."""
    return reference.combine(rows, reference.align(reference.gram(rows)).weights)


def exact_sum(rows: Sequence[Sequence[Tensor]], weights: Tensor | None = None) -> Tensor:
    """The same in float64, or the sum with these weights; [N]."""
    if weights is None:
        weights = reference.align(reference.gram(rows)).weights
    factors = weights.tolist()
    total = []
    for parts in zip(*rows, strict=True):
        total.append(torch.zeros_like(parts[0], dtype=torch.float64))
        for factor, part in zip(factors, parts, strict=True):
            total[-1].add_(part.double(), alpha=factor)
    return flat(total)


def work_of(
    contenders: dict[str, Contender], exact: Callable[[], Tensor], tasks: int, columns: int, size: int, steps: str
) -> Work:
    """`steps`: the operations, each of which reads T rows of `size` bytes an element once. T x T is left out."""
    expected = functools.cache(exact)
    values = {"gram": tasks, "dots": tasks + 1, "combine": tasks + 1}
    products = {"gram": tasks * (tasks + 1), "dots": 2 * tasks, "combine": 2 * tasks}
    listed = steps.split("+")
    return Work(
        contenders,
        lambda output: relative_error(flat(output), expected()),
        bytes=columns * size * sum(values[step] for step in listed),
        flops=columns * sum(products[step] for step in listed),
    )


# Whole aggregations --------------------------------------------------------------------------------------------------


def build_matrix(tasks: int, columns: int, device: torch.device, quick: bool, small: bool) -> Work:
    columns = min(columns, 1000) if small else columns
    rows = gradients(tasks, columns, device)
    kept = torch.empty_like(rows[0])
    contenders = {
        "mtlgrad": Contender(lambda: ops.merge(rows)[0], SUM),
        "mtlgrad out=": Contender(lambda: ops.merge(rows, out=kept)[0], SUM, "into memory that is there"),
    }
    if device.type == "cuda":
        call = replayed(lambda: ops.merge(rows)[0])
        contenders["mtlgrad graph"] = Contender(call, SUM, "CUDA graph", optional=True)
    contenders["reference"] = Contender(lambda: aligned_sum(rows), SUM)
    if not quick and device.type == "cpu" and tasks <= 8 and columns <= 1_000_000:  # unrolled, it compiles for minutes
        fused = torch.compile(aligned_sum, dynamic=False)
        contenders["compiled"] = Contender(lambda: fused(rows), SUM, "torch.compile of the reference", optional=True)
    contenders["torchjd"] = Contender(lambda: torchjd.aggregate(rows), SUM, torchjd.version(), **torchjd.OPTIONS)
    return work_of(contenders, lambda: exact_sum([[row] for row in rows]), tasks, columns, 4, "gram+combine")


def resnet50(rows: Callable[[int], Tensor], toy: bool, device: torch.device) -> tuple[list[Any], list[list[Tensor]]]:
    """A ResNet-50's parameters, whose ``.jac`` are ``rows`` of so many columns; and the same as a list a task."""
    shapes = [tuple(min(n, 8) for n in shape) if toy else shape for shape in resnet50_shapes()]
    sizes = [math.prod(shape) for shape in shapes]
    parameters: list[Any] = [nn.Parameter(torch.empty(shape, device=device)) for shape in shapes]
    every = rows(sum(sizes))
    for p, part in zip(parameters, every.split(sizes, dim=1), strict=True):
        p.jac = part.reshape(len(every), *p.shape)
    return parameters, [[p.jac[t] for p in parameters] for t in range(len(every))]


def filled(parameters: Sequence[Any], fill: Callable[[], object], **options: Any) -> Contender:
    """What makes ``.grad`` of ``.jac``, which stays from call to call; ``.grad`` is None before each."""

    def clear() -> None:
        for p in parameters:
            p.grad = None

    def call() -> list[Tensor]:
        fill()
        return [p.grad for p in parameters]

    return Contender(call, SUM, prepare=clear, **options)


def build_parameters(tasks: int, device: torch.device, quick: bool, small: bool) -> Work:
    parameters, listed = resnet50(lambda columns: gradients(tasks, columns, device), small or quick, device)
    stacked = ops.Stacked([p.jac for p in parameters])
    module = mtlgrad.AlignedMTL(tasks)

    contenders = {
        "mtlgrad merge": filled(parameters, lambda: module.merge(parameters, retain_jac=True)),
        "mtlgrad stacked": Contender(lambda: ops.merge(stacked)[0], SUM),
        "mtlgrad lists": Contender(lambda: ops.merge(listed)[0], SUM),
        "reference": Contender(lambda: aligned_sum(listed), SUM),
    }

    def loop() -> None:
        libmtl_loops.write_back(libmtl_loops.aligned(libmtl_loops.in_rows(listed, tasks, parameters)), parameters)

    contenders["libmtl"] = filled(
        parameters, loop, note="copied into [T, N], float32 Gram matrix, copied back", tolerated=True
    )
    for name, per_tensor in ("torchjd", False), ("torchjd per tensor", True):
        fill = functools.partial(torchjd.to_grad, parameters, per_tensor, retain=True)
        note = f"{torchjd.version()}, jac_to_grad" + ", optimize_gramian_computation" * per_tensor
        contenders[name] = filled(parameters, fill, note=note, **torchjd.OPTIONS)
    return work_of(contenders, lambda: exact_sum(listed), tasks, sum(p.numel() for p in parameters), 4, "gram+combine")


# Each operation by itself --------------------------------------------------------------------------------------------


def uneven(total: int, count: int) -> list[int]:
    """`count` sizes that add up to `total`, the largest many thousand times the smallest where there are many."""
    shares = torch.arange(1, count + 1, dtype=torch.float64) ** -1.5
    sizes = (shares / shares.sum() * total).long().clamp_min(1)
    sizes[0] += total - sizes.sum()
    return sizes[torch.randperm(count, generator=torch.Generator().manual_seed(0))].tolist()


def plain(operation: str, rows: Any, other: Any) -> Tensor:
    """What is written without a package: everything into one matrix, then one product."""
    matrix = rows if isinstance(rows, Tensor) else torch.stack([flat(row) for row in rows])
    if operation == "gram":
        return matrix @ matrix.mT
    return matrix @ flat(other) if operation == "dots" else other.to(matrix.dtype) @ matrix


def build_operation(
    operation: str,
    tasks: int,
    columns: int,
    tensors: int,
    dtype: torch.dtype,
    device: torch.device,
    quick: bool,
    small: bool,
) -> Work:
    columns = min(columns, 5000) if small else columns
    every = gradients(tasks + 1, columns, device, dtype)
    rows: Any = every[:tasks]
    other: Any = every[tasks]
    if tensors > 1:
        sizes = uneven(columns, tensors)
        rows = [[part.clone() for part in row.split(sizes)] for row in rows]
        other = [part.clone() for part in other.split(sizes)]
    if operation == "combine":
        other = torch.linspace(0.5, 1.5, tasks, dtype=torch.float64, device=device)
    listed = [[row] for row in rows] if tensors == 1 else rows
    arguments = (rows,) if operation == "gram" else (rows, other)
    half = dtype != torch.float32
    bound = DOUBLE if operation != "combine" else ROUNDED if half else SUM
    ours, eager = getattr(ops, operation), getattr(reference, operation)
    contenders = {"mtlgrad": Contender(lambda: ours(*arguments), bound)}
    if operation == "combine":
        kept = torch.empty_like(rows[0]) if tensors == 1 else [torch.empty_like(part) for part in rows[0]]
        call = lambda: ours(*arguments, out=kept)  # noqa: E731
        contenders["mtlgrad out="] = Contender(call, bound, "into memory that is there")
    contenders["reference"] = Contender(lambda: eager(*arguments), bound)
    if not quick and operation == "combine" and tensors <= 10:
        fused = torch.compile(eager, dynamic=False)
        contenders["compiled"] = Contender(
            lambda: fused(*arguments), bound, "torch.compile of the reference", optional=True
        )
    note = "concatenated; " * (tensors > 1) + f"one product in {str(dtype).removeprefix('torch.')}"
    single = ROUNDED if half else SUM
    contenders["torch"] = Contender(lambda: plain(operation, rows, other), single, note, tolerated=True)

    def exact() -> Tensor:
        if operation == "combine":
            return exact_sum(listed, other)
        found = reference.gram(listed) if operation == "gram" else reference.dots(rows, other)
        return flat(found)

    return work_of(contenders, exact, tasks, columns, dtype.itemsize, operation)


def build_displace(
    tasks: int, columns: int, dtype: torch.dtype, device: torch.device, quick: bool, small: bool
) -> Work:
    """float32 parameters moved along rows of `dtype`."""
    columns = min(columns, 5000) if small else columns
    rows = gradients(tasks, columns, device, dtype)
    base = gradients(1, columns, device)[0]
    weights = torch.linspace(0.5, 1.5, tasks, device=device)
    factors, kept = weights.tolist(), torch.empty_like(base)

    def loop() -> Tensor:
        result = base
        for weight, row in zip(weights, rows):
            result = result + weight * row
        return result

    def chain() -> Tensor:
        result = torch.add(base, rows[0], alpha=factors[0], out=kept)
        for factor, row in zip(factors[1:], rows[1:]):
            result.add_(row, alpha=factor)
        return result

    contenders = {
        "mtlgrad": Contender(lambda: ops.displace(base, rows, weights), ONCE),
        "mtlgrad out=": Contender(
            lambda: ops.displace(base, rows, weights, out=kept), ONCE, "into memory that is there"
        ),
        "reference": Contender(lambda: reference.displace(base, rows, weights), ONCE),
    }
    if not quick:
        fused = torch.compile(reference.displace, dynamic=False)
        contenders["compiled"] = Contender(
            lambda: fused(base, rows, weights), ONCE, "torch.compile of the reference", optional=True
        )
    bound = SUM if dtype == torch.float32 else ROUNDED
    contenders["torch"] = Contender(loop, bound, "base + w * row, row by row")
    contenders["torch add"] = Contender(chain, SUM, "torch.add(alpha=), row by row, in place, weights on the host")

    @functools.cache
    def exact() -> Tensor:
        return base.double() + exact_sum([[row] for row in rows], weights)

    return Work(
        contenders,
        lambda output: relative_error(output, exact()),
        bytes=columns * (tasks * dtype.itemsize + 2 * 4),
        flops=2 * tasks * columns,
    )


def build_align(tasks: int, device: torch.device, quick: bool, small: bool) -> Work:
    gram = reference.gram(gradients(tasks, 4096, device))
    contenders = {"mtlgrad": Contender(lambda: ops.align(gram).weights, DOUBLE)}
    if device.type == "cuda":
        call = replayed(lambda: ops.align(gram).weights)
        contenders["mtlgrad graph"] = Contender(call, DOUBLE, "CUDA graph", optional=True)
    contenders["reference"] = Contender(lambda: reference.align(gram).weights, DOUBLE)
    if not quick:
        fused = torch.compile(reference.align, dynamic=False)
        call = lambda: fused(gram).weights  # noqa: E731
        contenders["compiled"] = Contender(call, DOUBLE, "torch.compile of the reference", optional=True)
    contenders["torchjd"] = Contender(lambda: torchjd.weights(gram), DOUBLE, torchjd.version(), **torchjd.OPTIONS)

    @functools.cache
    def exact() -> Tensor:
        return reference.align(gram.cpu()).weights.to(device)

    values = 2 * tasks * tasks + 3 * tasks + 2  # the Gram matrix and the preference in, the alignment out
    return Work(
        contenders,
        lambda output: relative_error(output, exact()),
        bytes=8 * values,
        flops=11 * tasks**3,  # tridiagonal form, QL with vectors, one product
    )


# Other rules ---------------------------------------------------------------------------------------------------------


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
    def conflicting(columns: int) -> Tensor:
        rows = gradients(tasks, columns, device)
        return rows - 0.7 * rows.mean(0)

    parameters, listed = resnet50(conflicting, small or quick, device)
    _, eager, make = RULES[name]
    assert make is not None
    rule, peer = make(tasks), functools.cache(lambda: torchjd.aggregator_of(name, tasks))
    note = f"{torchjd.version()}, jac_to_grad"
    contenders = {
        "mtlgrad merge": filled(parameters, lambda: rule.merge(parameters, retain_jac=True)),
        "torchjd": filled(parameters, lambda: torchjd.merge_by(peer(), parameters), note=note, **torchjd.OPTIONS),
    }
    columns = sum(p.numel() for p in parameters)
    return work_of(
        contenders, lambda: exact_sum(listed, eager(reference.gram(listed))), tasks, columns, 4, "gram+combine"
    )


def cases(quick: bool, device: torch.device) -> list[Case]:
    """All there is to run, whole aggregations first."""
    found = []

    def add(operation: str, shape: str, build: Callable[..., Work], *arguments: Any, **options: Any) -> None:
        found.append(Case(operation, shape, functools.partial(build, *arguments, device, quick), **options))

    sizes = (20_000,) if quick else (1_000_000, 10_000_000)
    most = (3,) if quick else (2, 3, 8, 20)
    for columns in sizes:
        for tasks in most:
            add("aligned matrix", f"T={tasks} N={columns:.0e}", build_matrix, tasks, columns)
    for tasks, columns in () if quick else ((3, 10_000), (3, 100_000), (40, 1_000_000)):  # how the cost grows
        add("aligned matrix", f"T={tasks} N={columns:.0e}", build_matrix, tasks, columns, memory=False)
    for tasks in most[:3]:
        add("aligned resnet-50", f"T={tasks} 161 parameters", build_parameters, tasks)
    for operation in "gram", "combine", "dots":
        for tasks, tensors, dtype in (
            *((tasks, 1, torch.float32) for tasks in most),
            *((3, tensors, torch.float32) for tensors in (10, 100 if quick else 1000)),
            *((tasks, 1, torch.bfloat16) for tasks in ((3,) if quick else (3, 8))),
        ):
            name = str(dtype).removeprefix("torch.")
            text = f"T={tasks} N={sizes[-1]:.0e}" + f" in {tensors} tensors" * (tensors > 1)
            text += f" {name}" * (dtype != torch.float32)
            size = (operation, tasks, sizes[-1], tensors, dtype)
            add(operation, text, build_operation, *size, dtype=name, memory=False)
    for tasks, dtype in (
        *((tasks, torch.float32) for tasks in most),
        *((tasks, torch.bfloat16) for tasks in ((3,) if quick else (3, 8))),
    ):
        name = str(dtype).removeprefix("torch.")
        text = f"T={tasks} N={sizes[-1]:.0e}" + f" {name} rows" * (dtype != torch.float32)
        add("displace", text, build_displace, tasks, sizes[-1], dtype, dtype=name, memory=False)
    for tasks in (3,) if quick else (2, 8, 20, 64):
        add("align", f"T={tasks}", build_align, tasks, dtype="float64", memory=False)
    for name, (_, _, make) in RULES.items():
        for tasks in (3,) if quick else (3, 8, 20, 40):
            add(name, f"T={tasks}", build_weights, name, tasks, dtype="float64", memory=False)
        if make is not None:
            add(f"aligned resnet-50 by {name}", "T=3 161 parameters", build_merge, name, 3, memory=False)
    return found
