"""What every benchmark of this room shares: check, then time in turns, measure memory, write one CSV.

A benchmark is a list of `Case`s: one operation at one shape, with several contenders that compute it.

- **Checked first.** A contender's output is compared with a float64 reference before any timing. One that is wrong ends
  the run, and its case gets no row: a fast wrong number is no result. (An optional one is reported wrong, not timed. A
  peer that is known to be wrong is timed, and its row says how wrong.)
- **In turns.** Contenders run round robin, every other round backwards, so a slow moment of a shared machine hits all
  of them; medians and ratios within a run are to be trusted, absolute times less. The ceilings of the machine (copy
  bandwidth, float32 matrix rate) take their turns in the same rounds.
- **From memory.** Before each call a buffer larger than the last-level cache is written: in training, the backbone's
  passes lie between two calls.
- **Peak extra memory** is measured in a fresh process per contender; memory.py says how.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import memory
from bench.table import Row, report, rows_of


class BenchError(Exception):
    """Why a benchmark gave no result, in one line."""


@dataclass
class Contender:
    """One way to compute the operation.

    `bound` is the largest error allowed, or finds it out after the first call. `once`: so slow that after its checking
    call it is timed in one more, before the turns. `examples`: of all its trainings, where it is more than a step.
    `optional`: it may fail to run (a compiler is missing, say) or be wrong (compilers err); its row then says so.
    `tolerated`: timed even where it is wrong; its row says how wrong. `prepare` runs before each call, untimed.
    """

    call: Callable[[], Any]
    bound: float | Callable[[], float]
    note: str = ""
    once: bool = False
    optional: bool = False
    tolerated: bool = False
    prepare: Callable[[], None] = lambda: None
    examples: int | None = None


@dataclass
class Work:
    """A case's tensors: the contenders close over them. `error` compares an output with the float64 reference."""

    contenders: dict[str, Contender]
    error: Callable[[Any], float]
    bytes: float  #: compulsory traffic, inputs once and outputs once, by formula
    flops: float  #: arithmetic of the cheapest algorithm known, by formula
    examples: int | None = None  #: of a training step


@dataclass
class Case:
    """An operation at a shape; `build(small)` makes its tensors, at a toy size if `small` (for warming up)."""

    operation: str
    shape: str
    build: Callable[[bool], Work]
    dtype: str = "float32"
    memory: bool = True  #: whether to measure that too

    @property
    def title(self) -> str:
        return f"{self.operation} {self.shape}"

    def built(self, options: Options) -> Work:
        """The same at each call, with the contenders that are wanted."""
        torch.manual_seed(0)
        work = self.build(False)
        for name in [name for name in work.contenders if any(text in name for text in options.without)]:
            del work.contenders[name]
        return work

    def rows(self, stem: str, options: Options, extra: Sequence[str]) -> list[Row]:
        """Checks, times and measures; `stem` and `extra` are for memory's ``python -m bench STEM EXTRA...``."""
        work = self.built(options)
        results, copy_rate, gemm_rate = check_and_time(self, work, options, Clock(options.device, options.flush_bytes))
        if options.with_memory and self.memory:
            for name, result in results.items():
                if name.endswith(" graph"):
                    continue  # its memory was taken when it was captured
                if result.times and options.device.type == "cuda":
                    result.peak_mb = memory.on_cuda(work.contenders[name], options.device)
                elif result.times:
                    result.peak_mb = memory.in_fresh_process(stem, self.title, name, extra)
        report(self, work, results, copy_rate, gemm_rate)
        return rows_of(self, work, results, copy_rate, gemm_rate)


@dataclass
class Options:
    device: torch.device
    rounds: int = 40
    seconds: float = 4.0  #: per contender and case, about
    with_memory: bool = True
    flush_bytes: int = 128 << 20
    without: Sequence[str] = ()  #: texts in the names of contenders to leave out
    small: bool = False  #: toy sizes, also of what shows the machine's limits


@dataclass
class Result:
    """What is known of one contender at the end: times in ms by round, or why there are none."""

    times: dict[int, float] = field(default_factory=dict)
    error: float = math.nan
    allowed: float = math.nan
    peak_mb: float = math.nan
    note: str = ""

    @property
    def median(self) -> float:
        return float(np.median(list(self.times.values()))) if self.times else math.nan


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest difference over the largest reference entry; NaN and infinity count as infinitely wrong."""
    difference = (value.detach().to(reference) - reference).abs().max().item()
    return difference / reference.abs().max().item() if math.isfinite(difference) else math.inf


# Timing --------------------------------------------------------------------------------------------------------------


class Clock:
    """Times single calls on a device, after the caches were flushed."""

    def __init__(self, device: torch.device, flush_bytes: int):
        self.device = device
        self.buffer = torch.empty(flush_bytes // 4, device=device)

    def run(self, contender: Contender) -> tuple[float, Any]:
        contender.prepare()
        return self(contender.call)

    def __call__(self, call: Callable[[], Any], flush: bool = True) -> tuple[float, Any]:
        """(milliseconds, what the call returned). On CUDA by events, while the host runs ahead behind the flush."""
        if flush:
            self.buffer.add_(1.0)
        if self.device.type != "cuda":
            start = time.perf_counter()
            value = call()
            return 1e3 * (time.perf_counter() - start), value
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        value = call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end), value


def ceilings(device: torch.device, small: bool) -> tuple[dict[str, Callable[[], Any]], float, float]:
    """Calls that reach the machine's limits, with the bytes one copies and the operations the other makes."""
    cuda = device.type == "cuda"
    size, width = (1 << 28, 8192) if cuda else (1 << 24, 1536)  # floats: 1 GiB and 64 MiB, past any cache
    if small:
        size, width = 1 << 18, 256
    source, target = torch.ones(size, device=device), torch.empty(size, device=device)
    a, b = torch.randn(width, width, device=device), torch.randn(width, width, device=device)
    product = torch.empty(width, width, device=device)
    calls = {"copy": lambda: target.copy_(source), "gemm": lambda: torch.mm(a, b, out=product)}
    return calls, 8.0 * size, 2.0 * width**3


def turns(wanted: dict[str, int]) -> Iterator[tuple[int, str]]:
    """(round, name), each name as often as wanted and spread evenly over the rounds; every other round backwards."""
    rounds = max(wanted.values(), default=0)
    for i in range(rounds):
        present = [name for name, runs in wanted.items() if (i + 1) * runs // rounds > i * runs // rounds]
        for name in present if i % 2 == 0 else reversed(present):
            yield i, name


def check_and_time(case: Case, work: Work, options: Options, clock: Clock) -> tuple[dict[str, Result], float, float]:
    """Results by contender, and the copy bandwidth (GB/s) and matrix rate (GFLOP/s) of the same minutes."""
    results: dict[str, Result] = {}
    wanted: dict[str, int] = {}
    for name, contender in work.contenders.items():
        result = results[name] = Result(note=contender.note)
        try:
            spent, output = clock.run(contender)
        except Exception as error:
            if not contender.optional:
                raise BenchError(f"{case.title}: {name} failed: {error}") from error
            result.note = f"failed: {first_line(error)}"
            continue
        result.error = work.error(output)
        del output
        result.allowed = contender.bound() if callable(contender.bound) else contender.bound
        if not result.error <= result.allowed:
            wrong = f"its error is {result.error:.2e}, {result.allowed:.0e} is allowed"
            if contender.tolerated:
                result.note = "; ".join(filter(None, [result.note, f"wrong: {wrong}"]))
            elif contender.optional:
                result.note = f"wrong, not timed: {wrong}"
                continue
            else:
                raise BenchError(f"{case.title}: {name} is wrong, so nothing was timed: {wrong}")
        again, _ = clock.run(contender)  # the first call may have compiled something, or made what it keeps
        if contender.once:
            result.times[-1] = again
        else:
            if again < 1e3 * options.seconds:  # torch.compile makes some things anew when they change
                again = min(again, clock.run(contender)[0])
            quickest = max(min(spent, again), 1e-3)
            wanted[name] = max(3, min(options.rounds, int(1e3 * options.seconds / quickest)))

    calls, copied, multiplied = ceilings(options.device, options.small)
    limits: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for i, name in turns(wanted | {name: min(10, options.rounds) for name in calls}):
        if name in calls:
            limits[name].append(clock(calls[name], flush=False)[0])
        else:
            results[name].times[i] = clock.run(work.contenders[name])[0]
    copy_rate = copied / np.median(limits["copy"]) / 1e6
    gemm_rate = multiplied / np.median(limits["gemm"]) / 1e6
    return results, float(copy_rate), float(gemm_rate)


def replayed(call: Callable[[], Any], restore: Callable[[], None] = lambda: None) -> Callable[[], Any]:
    """The same call as a CUDA graph, captured when it first runs; `restore` undoes the call before that."""
    kept: dict[str, Any] = {}

    def replay() -> Any:
        if not kept:
            call()
            torch.cuda.synchronize()
            kept["graph"] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(kept["graph"]):
                kept["out"] = call()
            restore()
        kept["graph"].replay()
        return kept["out"]

    return replay


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:120]
