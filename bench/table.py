"""The rows of a run: what a CSV holds, and the same for people."""

from __future__ import annotations

import csv
import datetime
import math
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from bench.harness import Case, Result, Work

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (
    *("date", "machine", "cpu", "threads", "python", "torch", "commit", "device", "operation", "shape", "dtype"),
    *("contender", "median_ms", "p20_ms", "p80_ms", "bytes", "flops", "gb_per_s", "share_of_copy", "gflop_per_s"),
    *("share_of_gemm", "peak_extra_mb", "checked_error", "note", "times_first"),
)
Row = dict[str, Any]  # by COLUMNS


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


def times_first(result: Result, first: Result) -> float:
    """How many times as long as the first contender: the median, over the rounds that both ran in, of their ratio.

    Neighbours in time see the same machine, so this is steadier than the ratio of two medians."""
    shared = sorted(result.times.keys() & first.times.keys())
    if not shared:
        return result.median / first.median
    return float(np.median([result.times[i] / first.times[i] for i in shared]))


def rows_of(case: Case, work: Work, results: dict[str, Result], copy_rate: float, gemm_rate: float) -> list[Row]:
    """One row a contender. Rates count the formula's bytes and operations, whatever a contender really does."""
    rows = []
    first = next(iter(results.values()))
    for name, result in results.items():
        row: dict[str, Any] = {"operation": case.operation, "shape": case.shape, "dtype": case.dtype, "contender": name}
        row |= {"bytes": int(work.bytes), "flops": int(work.flops), "checked_error": f"{result.error:.1e}"}
        row |= {"peak_extra_mb": f"{result.peak_mb:.1f}", "note": result.note}
        if result.times:
            p20, median, p80 = np.percentile(list(result.times.values()), [20, 50, 80])
            bandwidth, rate = work.bytes / median / 1e6, work.flops / median / 1e6
            row |= {"median_ms": f"{median:.4f}", "p20_ms": f"{p20:.4f}", "p80_ms": f"{p80:.4f}"}
            row |= {"gb_per_s": f"{bandwidth:.2f}", "share_of_copy": f"{bandwidth / copy_rate:.4f}"}
            row |= {"gflop_per_s": f"{rate:.2f}", "share_of_gemm": f"{rate / gemm_rate:.4f}"}
            row["note"] = "; ".join(filter(None, [result.note, f"{len(result.times)} runs"]))
            row["times_first"] = f"{times_first(result, first):.4f}"
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


def report(case: Case, work: Work, results: dict[str, Result], copy_rate: float, gemm_rate: float) -> None:
    """A table for people: times, how many times the floor they are, and how many times the first contender's time and
    memory. The floor is what the formula's bytes take at copy speed, or its operations at the matrix rate."""
    first = next(iter(results.values()))
    copying, computing = work.bytes / copy_rate / 1e6, work.flops / gemm_rate / 1e6
    floor = max(copying, computing)
    rate = f"{copy_rate:.1f} GB/s of a copy" if floor == copying else f"{gemm_rate:.0f} GFLOP/s of a matrix product"
    print(f"\n{case.title}   ({work.bytes / 1e6:.4g} MB, {work.flops / 1e9:.3g} GFLOP: {floor:.3g} ms at {rate})")
    print(
        f"  {'contender':<22}{'ms':>12}{'x floor':>10}{'x first':>10}{'extra MB':>11}{'x first':>9}{'error':>10}  note"
    )
    for name, result in results.items():
        larger = result.peak_mb / first.peak_mb if first.peak_mb else math.nan
        print(
            f"  {name:<22}{result.median:>12.4g}{result.median / floor:>10.2f}{times_first(result, first):>10.3f}"
            f"{result.peak_mb:>11.1f}{larger:>9.1f}{result.error:>10.1e}  {result.note}",
            flush=True,
        )
