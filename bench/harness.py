"""What every benchmark of this room shares: check, then time in turns, measure memory, write one CSV.

A benchmark is a list of `Case`s: one operation at one shape, with several contenders that compute it.

- **Checked first.** A contender's output is compared with a float64 reference before any timing. One that is wrong ends
  the run, and its case gets no row: a fast wrong number is no result. (An optional one is reported wrong, not timed.)
- **In turns.** Contenders run round robin, so a slow moment of a shared machine hits all of them; medians and ratios
  within a run are to be trusted, absolute times less. The machine's ceilings (copy bandwidth, float32 matrix rate)
  take their turns in the same rounds.
- **From memory.** Before each call a buffer larger than the last-level cache is written: in training, the backbone's
  passes lie between two calls.
- **Peak extra memory** is measured in a fresh process per contender; memory.py says how.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import logging
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import memory

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (
    *("date", "machine", "cpu", "threads", "python", "torch", "commit", "device", "operation", "shape", "dtype"),
    *("contender", "median_ms", "p20_ms", "p80_ms", "bytes", "flops", "gb_per_s", "share_of_copy", "gflop_per_s"),
    *("share_of_gemm", "peak_extra_mb", "checked_error", "note"),
)
Row = dict[str, Any]  # by COLUMNS


class BenchError(Exception):
    """Why a benchmark gave no result, in one line."""


@dataclass
class Contender:
    """One way to compute the operation.

    `bound` is the largest error allowed. `once`: so slow that its checking call is also its only timed one.
    `optional`: it may fail to run (a compiler is missing, say) or be wrong (compilers err); its row then says so.
    """

    call: Callable[[], Any]
    bound: float
    note: str = ""
    once: bool = False
    optional: bool = False


@dataclass
class Work:
    """A case's tensors: the contenders close over them. `error` compares an output with the float64 reference."""

    contenders: dict[str, Contender]
    error: Callable[[Any], float]
    bytes: float  #: compulsory traffic, inputs once and outputs once, by formula
    flops: float  #: arithmetic of the cheapest algorithm known, by formula


@dataclass
class Case:
    """An operation at a shape; `build(small)` makes its tensors, at a toy size if `small` (for warming up)."""

    operation: str
    shape: str
    build: Callable[[bool], Work]
    dtype: str = "float32"

    @property
    def title(self) -> str:
        return f"{self.operation} {self.shape}"


@dataclass
class Options:
    device: torch.device
    rounds: int = 40
    seconds: float = 12.0  #: per contender and case, about
    with_memory: bool = True
    flush_bytes: int = 128 << 20


@dataclass
class Result:
    """What is known of one contender at the end: times in ms of each run, or why there are none."""

    times: list[float] = field(default_factory=list)
    error: float = math.nan
    peak_mb: float = math.nan
    note: str = ""


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


def ceilings(device: torch.device) -> tuple[dict[str, Callable[[], Any]], float, float]:
    """Calls that reach the machine's limits, with the bytes one copies and the operations the other makes."""
    cuda = device.type == "cuda"
    size, width = (1 << 28, 8192) if cuda else (1 << 24, 1536)  # floats: 1 GiB and 64 MiB, past any cache
    source, target = torch.ones(size, device=device), torch.empty(size, device=device)
    a, b = torch.randn(width, width, device=device), torch.randn(width, width, device=device)
    product = torch.empty(width, width, device=device)
    calls = {"copy": lambda: target.copy_(source), "gemm": lambda: torch.mm(a, b, out=product)}
    return calls, 8.0 * size, 2.0 * width**3


def turns(wanted: dict[str, int]) -> Iterator[str]:
    """Names in round-robin order, each as often as wanted and spread evenly over the rounds."""
    rounds = max(wanted.values(), default=0)
    for i in range(rounds):
        for name, runs in wanted.items():
            if (i + 1) * runs // rounds > i * runs // rounds:
                yield name


def check_and_time(case: Case, work: Work, options: Options, clock: Clock) -> tuple[dict[str, Result], float, float]:
    """Results by contender, and the copy bandwidth (GB/s) and matrix rate (GFLOP/s) of the same minutes."""
    results: dict[str, Result] = {}
    wanted: dict[str, int] = {}
    for name, contender in work.contenders.items():
        result = results[name] = Result(note=contender.note)
        try:
            spent, output = clock(contender.call)
        except Exception as error:
            if not contender.optional:
                raise BenchError(f"{case.title}: {name} failed: {error}") from error
            result.note = f"failed: {first_line(error)}"
            continue
        result.error = work.error(output)
        del output
        if not result.error <= contender.bound:
            wrong = f"its error is {result.error:.2e}, {contender.bound:.0e} is allowed"
            if not contender.optional:
                raise BenchError(f"{case.title}: {name} is wrong, so nothing was timed: {wrong}")
            result.note = f"wrong, not timed: {wrong}"
            continue
        if contender.once:
            result.times.append(spent)
        else:
            again, _ = clock(contender.call)  # the first call may have compiled something
            quickest = max(min(spent, again), 1e-3)
            wanted[name] = max(3, min(options.rounds, int(1e3 * options.seconds / quickest)))

    calls, copied, multiplied = ceilings(options.device)
    limits: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for name in turns(wanted | {name: min(10, options.rounds) for name in calls}):
        if name in calls:
            limits[name].append(clock(calls[name], flush=False)[0])
        else:
            results[name].times.append(clock(work.contenders[name].call)[0])
    copy_rate = copied / np.median(limits["copy"]) / 1e6
    gemm_rate = multiplied / np.median(limits["gemm"]) / 1e6
    return results, float(copy_rate), float(gemm_rate)


# Rows ----------------------------------------------------------------------------------------------------------------


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:120]


def processor() -> str:
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match.group(1) if match else platform.processor() or platform.machine()


def commit() -> str:
    """The short hash, with a + where the work tree differs from it; "none" without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "none"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def facts(device: torch.device) -> dict[str, Any]:
    """The columns that are the same in all rows of a run."""
    try:
        installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        installed = math.nan
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {installed:.0f} GiB",
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "device": device_name(device),
    }


def rows_of(case: Case, work: Work, results: dict[str, Result], copy_rate: float, gemm_rate: float) -> list[Row]:
    """One row a contender. Rates count the formula's bytes and operations, whatever a contender really does."""
    rows = []
    for name, result in results.items():
        row: dict[str, Any] = {"operation": case.operation, "shape": case.shape, "dtype": case.dtype, "contender": name}
        row |= {"bytes": int(work.bytes), "flops": int(work.flops), "checked_error": f"{result.error:.1e}"}
        row |= {"peak_extra_mb": f"{result.peak_mb:.1f}", "note": result.note}
        if result.times:
            p20, median, p80 = np.percentile(result.times, [20, 50, 80])
            bandwidth, rate = work.bytes / median / 1e6, work.flops / median / 1e6
            row |= {"median_ms": f"{median:.4f}", "p20_ms": f"{p20:.4f}", "p80_ms": f"{p80:.4f}"}
            row |= {"gb_per_s": f"{bandwidth:.2f}", "share_of_copy": f"{bandwidth / copy_rate:.4f}"}
            row |= {"gflop_per_s": f"{rate:.2f}", "share_of_gemm": f"{rate / gemm_rate:.4f}"}
            row["note"] = "; ".join(filter(None, [result.note, f"{len(result.times)} runs"]))
        rows.append(row)
    limits = {"operation": "ceiling", "shape": case.title, "dtype": "float32"}
    rows.append(limits | {"contender": "copy", "gb_per_s": f"{copy_rate:.2f}", "note": "bytes read plus written"})
    rows.append(limits | {"contender": "gemm", "gflop_per_s": f"{gemm_rate:.2f}", "note": "float32 torch.mm"})
    return rows


def write_rows(path: Path, rows: Sequence[Row], keep: bool) -> None:
    """Writes beside the target, then renames, so a reader never sees half a file. `keep`: other cases' rows stay."""
    rows = list(rows)
    if keep and path.exists():
        with path.open(newline="") as file:
            ran = {(row["operation"], row["shape"]) for row in rows}
            old = [row for row in csv.DictReader(file) if (row["operation"], row["shape"]) not in ran]
        rows = old + rows
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


def report(case: Case, work: Work, results: dict[str, Result], gemm_rate: float) -> None:
    """A table for people: times, and how many times slower and larger than the first contender each one is."""
    first = next(iter(results.values()))
    floor = f"{work.flops / 1e9:.3g} GFLOP at least: {work.flops / gemm_rate / 1e6:.3g} ms at the matrix rate"
    print(f"\n{case.title}   ({floor})")
    print(f"  {'contender':<22}{'ms':>12}{'slower':>10}{'extra MB':>11}{'larger':>9}{'error':>10}  note")
    for name, result in results.items():
        median = float(np.median(result.times)) if result.times else math.nan
        slower = median / float(np.median(first.times)) if first.times else math.nan
        larger = result.peak_mb / first.peak_mb if first.peak_mb else math.nan
        print(
            f"  {name:<22}{median:>12.3f}{slower:>9.1f}x{result.peak_mb:>11.1f}{larger:>8.1f}x{result.error:>10.1e}"
            f"  {result.note}",
            flush=True,
        )


# Running -------------------------------------------------------------------------------------------------------------


def run_case(case: Case, module: str, options: Options, extra: Sequence[str]) -> list[Row]:
    work = case.build(False)
    results, copy_rate, gemm_rate = check_and_time(case, work, options, Clock(options.device, options.flush_bytes))
    if options.with_memory:
        for name, result in results.items():
            if result.times and options.device.type == "cuda":
                result.peak_mb = memory.on_cuda(work.contenders[name].call, options.device)
            elif result.times:
                result.peak_mb = memory.in_fresh_process(module, case.title, name, extra)
    report(case, work, results, gemm_rate)
    return rows_of(case, work, results, copy_rate, gemm_rate)


def arguments(stem: str, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m bench.bench_{stem}", description=f"benchmark of the {stem} stem")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    parser.add_argument("--quick", action="store_true", help="toy shapes, a few rounds, no memory: does it run?")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--rounds", type=int, help="runs per contender at most")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory measurements")
    parser.add_argument("--results", type=Path, help="folder for the CSV (bench/results; with --quick none is written)")
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "CONTENDER"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(stem: str, cases: Callable[[bool, torch.device], list[Case]], argv: Sequence[str] | None = None) -> int:
    """The command line of ``bench_STEM``; `cases(quick, device)` lists what there is to run. Returns the exit code."""
    args = arguments(stem, argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch._logging.set_logs(dynamo=logging.CRITICAL, inductor=logging.CRITICAL)  # type: ignore[attr-defined]
    warnings.filterwarnings("ignore", module="torch")
    device = torch.device(args.device)
    every = cases(args.quick, device)
    if args.memory_of:
        title, name = args.memory_of
        print(memory.measure(next(case for case in every if case.title == title), name))
        return 0
    chosen = [case for case in every if not args.only or any(text in case.title for text in args.only)]
    if not chosen:
        print(f"bench_{stem}: --only matches none of: {'; '.join(case.title for case in every)}", file=sys.stderr)
        return 2
    options = Options(device, with_memory=not (args.no_memory or args.quick))
    if device.type == "cuda":
        options.flush_bytes = 512 << 20
    if args.quick:
        options.rounds, options.seconds, options.flush_bytes = 3, 0.2, 1 << 20
    options.rounds = args.rounds or options.rounds
    extra = ["--device", args.device, "--threads", str(args.threads), *(["--quick"] if args.quick else [])]

    shared = facts(device)
    folder = args.results or (None if args.quick else ROOT / "bench" / "results")
    path = None if folder is None else folder / f"{stem}_{slug(shared['device'])}.csv"
    rows: list[Row] = []
    try:
        for case in chosen:
            rows += [shared | row for row in run_case(case, f"bench.bench_{stem}", options, extra)]
            if path is not None:  # after each case: a run that is cut short keeps what it has
                write_rows(path, rows, keep=bool(args.only))
    except BenchError as error:
        print(f"bench_{stem}: {error}", file=sys.stderr)
        return 1
    if path is not None:
        print(f"\nwritten: {path}")
    return 0
