"""Benchmark of the host's part: the time of a call with one thread and tensors so small that arithmetic is little.

`host_us` is, on the CPU, the thread's processor time, which other work on the machine disturbs least. On CUDA, where
backward passes have a thread of their own, it is by the clock, the device not waited for; `median_ms` there is the
device's time of the call, after work that lasts until the host is done.

The first contender, which the others' time is compared with, is torch's fused Adam over as many parameters, or the
same passes without the layer, or ours.
"""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import mtlgrad
from bench import bench_adatask, bench_combine, bench_moments
from bench.harness import Case, Clock, Contender, Options, Result, Work, check_and_time, relative_error
from bench.peers import torchjd_merge as torchjd
from bench.step_problem import loss_of
from bench.table import Row, known, times_first
from mtlgrad import ops
from mtlgrad.recipes.backbones import resnet50_shapes

BURST = 10  # calls of one contender in a row; the first warms up what the others left cold
BUSY = 100  # passes over the clock's buffer before the device is timed
NET = bench_moments.Shape("small", (("regression", 2), ("binary", 1), ("multiclass", 6)), 64)
UNITS = {"host_us": " us", "times_first": " times the first", "median_ms": " ms of the device"}


class HostClock(Clock):
    def run(self, contender: Contender) -> tuple[float, Any]:
        """(milliseconds of a burst's median call, what the last one returned)."""
        cuda, spent = self.device.type == "cuda", []
        clock = time.perf_counter if cuda else time.thread_time
        for _ in range(BURST):
            contender.prepare()
            if cuda:
                torch.cuda.synchronize(self.device)  # a full queue would hold up the host
            start = clock()
            value = contender.call()
            spent.append(1e3 * (clock() - start))
        return statistics.median(spent[1:]), value

    def on_device(self, contender: Contender) -> float:
        """Milliseconds of the median call, by the device's clock."""
        spent = []
        for _ in range(BURST):
            contender.prepare()
            for _ in range(BUSY):
                self.buffer.add_(1.0)
            spent.append(self(contender.call)[0])
        return statistics.median(spent[1:])


@dataclass
class HostCase(Case):
    parameters: int = 0  #: of an optimizer, whose note tells the time of each

    def rows(self, stem: str, options: Options, extra: Sequence[str]) -> list[Row]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            work, clock = self.built(options), HostClock(options.device, options.flush_bytes)
            # The machine's ceilings are in no row here: as little of them as there is.
            fewer = replace(options, seconds=options.seconds / BURST, small=True)
            results, _, _ = check_and_time(self, work, fewer, clock)
            rows = [self.row(name, result, next(iter(results.values()))) for name, result in results.items()]
            for row, contender in zip(rows, work.contenders.values(), strict=True):
                if options.device.type == "cuda" and row["runs"]:
                    row["median_ms"] = f"{clock.on_device(contender):.4f}"
        finally:
            torch.set_num_threads(threads)
        print(f"\n{self.title}")
        for row in rows:
            figures = "".join(f"{row[name]:>12}{unit}" for name, unit in UNITS.items() if name in row)
            print(f"  {row['contender']:<22}{figures}  {row['note']}", flush=True)
        return rows

    def row(self, name: str, result: Result, first: Result) -> Row:
        row: Row = {"operation": self.operation, "shape": self.shape, "dtype": self.dtype, "contender": name}
        row |= {"note": result.note, "threads": 1, "runs": len(result.times)}
        row |= {"checked_error": known(result.error, ".1e"), "allowed_error": known(result.allowed, ".1e")}
        for percentile, suffix in (50, ""), (20, "_p20"), (80, "_p80"):
            if result.times:
                row[f"host_us{suffix}"] = f"{1e3 * np.percentile(list(result.times.values()), percentile):.2f}"
                row[f"times_first{suffix}"] = known(times_first(result, first, percentile), ".4f")
        if result.times and self.parameters:
            row["note"] += f"; {1e3 * result.median / self.parameters:.3g} us a parameter"
        return row


def build_step(rule: str, shapes: Sequence[tuple[int, ...]], tasks: int, device: torch.device, small: bool) -> Work:
    def problem(name: str, count: int) -> bench_adatask.Problem:
        return bench_adatask.Problem(name, shapes, count, (torch.float32, torch.float32), False, device)

    def contender(whose: bench_adatask.Problem, optimizer: torch.optim.Optimizer, note: str) -> Contender:
        return whose.contender(lambda: (optimizer.step(), whose)[1], note)

    ours, theirs = problem(rule, tasks), problem("adam", 1)  # AdaTask's Adam of one task is Adam
    fused = torch.optim.Adam(theirs.parameters, fused=True)
    for i, p in enumerate(theirs.parameters):
        p.grad = p.jac[0]
        fused.state[p] = {name: lists[i][0] for name, lists in theirs.moments.items()} | {"step": theirs.steps[i][0]}
    contenders = {
        "torch fused adam": contender(theirs, fused, "torch.optim.Adam(fused=True).step, one gradient"),
        "mtlgrad": contender(ours, ours.optimizer(), f"{ours.rule.optimizer.__name__}.step"),
    }
    return Work(contenders, lambda whose: whose.error(), bytes=0, flops=0)


def build_stacked(count: int, tasks: int, device: torch.device, small: bool) -> Work:
    tensors = [part.contiguous() for part in bench_combine.gradients(tasks, 4 * count, device).split(4, dim=1)]
    peer, note = lambda: torchjd.aggregate(torch.cat(tensors, 1)), f"{torchjd.version()}; concatenated"
    contenders = {
        "mtlgrad": Contender(lambda: ops.merge(ops.Stacked(tensors))[0], bench_combine.SUM),
        "torchjd": Contender(peer, bench_combine.SUM, note, **torchjd.OPTIONS),
    }
    rows = [[tensor[t] for tensor in tensors] for t in range(tasks)]
    return bench_combine.work_of(contenders, lambda: bench_combine.exact_sum(rows), tasks, 4 * count, 4, "gram+combine")


def through(
    leaf: Tensor,
    bound: float,
    forms: Mapping[str, tuple[Callable[[Tensor], None], Tensor, str]],
    clear: Callable[[], None] = lambda: None,
) -> Work:
    """`forms`: what runs forward and backward from the leaf times one, the gradient that should arrive, a note."""

    def prepare() -> None:
        leaf.grad = None
        clear()

    def contender(run: Callable[[Tensor], None], expected: Tensor, note: str) -> Contender:
        def call() -> tuple[Any, Tensor]:
            run(leaf * 1.0)
            return leaf.grad, expected

        return Contender(call, bound, note, prepare=prepare)

    contenders = {name: contender(*form) for name, form in forms.items()}
    return Work(contenders, lambda output: relative_error(*output), bytes=0, flops=0)


def build_layer(device: torch.device, small: bool) -> Work:
    fixed = list(bench_combine.gradients(3, 32 * 64, device).reshape(3, 32, 64))
    aligned = mtlgrad.AlignedMTL(3).to(device)

    def plain(features: Tensor) -> None:
        torch.autograd.backward([features.view_as(features) for _ in fixed], fixed)

    def ours(features: Tensor) -> None:
        torch.autograd.backward(aligned(features), fixed)

    merged = bench_combine.exact_sum([[g] for g in fixed]).view(32, 64)
    forms = {
        "plain": (plain, torch.stack(fixed).double().sum(0), "T views of leaf times 1, backward of fixed gradients"),
        "mtlgrad": (ours, merged, "AlignedMTL of leaf times 1, backward of fixed gradients"),
    }
    return through(torch.randn(32, 64, device=device).requires_grad_(), bench_combine.SUM, forms)


def build_bayesagg(net: bench_moments.Shape, device: torch.device, small: bool) -> Work:
    data = bench_moments.make_data(net, device)
    double = data.to(torch.float64)
    bayes = bench_moments.layer(data, "exact")
    linears: list[nn.Module] = [head.layers[0] for head in bayes.heads]
    features, targets = data.batch()

    def losses(linears: Sequence[nn.Module], features: Tensor, targets: Sequence[Tensor]) -> list[Tensor]:
        heads = zip(net.heads, linears, targets, strict=True)
        return [loss_of(kind, linear(features), target) for (kind, _), linear, target in heads]

    def plain(features: Tensor) -> None:
        torch.stack(losses(linears, features, targets)).sum().backward()

    def ours(features: Tensor) -> None:
        bayes.total(losses(linears, bayes(features, targets), targets)).backward()

    def clear() -> None:
        for full_data in bayes._full_data:  # the epoch so far, which would grow from call to call
            full_data.end_epoch()
        for linear in linears:
            linear.zero_grad()

    wide, labels = double.batch()
    precise = [copy.deepcopy(linear).double() for linear in linears]
    total = torch.stack(losses(precise, wide.requires_grad_(), labels)).sum()
    forms = {
        "plain": (plain, torch.autograd.grad(total, wide)[0], "heads on leaf times 1, losses, backward"),
        "mtlgrad": (ours, bench_moments.eager(double)(), "the same with BayesAgg and its total()"),
    }
    return through(features.clone().requires_grad_(), bench_moments.POINTS, forms, clear)


def cases(quick: bool, device: torch.device) -> list[Case]:
    """All there is to run, optimizers first."""
    found: list[Case] = []

    def add(operation: str, shape: str, build: Callable[..., Work], *arguments: Any, **options: Any) -> None:
        found.append(HostCase(f"host {operation}", shape, functools.partial(build, *arguments), **options))

    def step(rule: str, tasks: int, shapes: Sequence[tuple[int, ...]], what: str) -> None:
        text = f"T={tasks} {what}{len(shapes)} parameters"
        add(f"adatask {rule}", text, build_step, rule, shapes, tasks, device, parameters=len(shapes))

    tiny = [(4,)] * (16 if quick else 1000)
    for shapes in tiny[:161], tiny:
        for tasks in (3,) if quick else (2, 3, 8):
            step("adam", tasks, shapes, "")
    for rule in "rmsprop", "adagrad":
        step(rule, 3, tiny[:161], "")
    if device.type == "cuda":  # a step whose time on the device is no trifle
        for tasks in 2, 3, 8:
            step("adam", tasks, tiny if quick else resnet50_shapes(), "resnet-50, ")
    add("aligned layer", "T=3 B=32 D=64", build_layer, device)
    net = bench_moments.toy(NET) if quick else NET
    add("bayesagg layer", net.text, build_bayesagg, net, device)
    # From here on the builders of other stems, with little in their tensors and nothing compiled.
    add("merge", "T=3 N=1000", bench_combine.build_matrix, 3, 1000, device, True)
    add("merge", "T=8 161 tensors", build_stacked, 161, 8, device)
    for operation in "gram", "combine", "dots":
        add(operation, "T=3 N=64", bench_combine.build_operation, operation, 3, 64, 1, torch.float32, device, True)
    add("displace", "T=3 N=64", bench_combine.build_displace, 3, 64, torch.float32, device, True)
    add("align", "T=3", bench_combine.build_align, 3, device, True, dtype="float64")
    for operation, size in bench_moments.OPERATIONS:
        size = {key: min(value, 16) for key, value in size.items()}
        text = " ".join(f"{key}={value}" for key, value in size.items())
        add(operation, text, bench_moments.build_operation, operation, size, device, True)
    return list({case.title: case for case in found}.values())  # tiny sizes coincide
