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
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import mtlgrad

if TYPE_CHECKING:
    from bench.harness import Case, Result, Work

ROOT = Path(__file__).resolve().parent.parent
# All files of results/ have these. An empty field: does not apply, or was not measured (the note says why).
COLUMNS = (
    # where: the same in all rows of a run; `commit` ends in + where the work tree, results aside, differs from it
    *("date", "machine", "cpu", "threads", "device", "driver", "python", "torch", "numpy", "torchjd", "mtlgrad"),
    *("compiler", "commit"),
    # what
    *("operation", "shape", "dtype", "contender", "note"),
    # checked against float64 first: the largest difference over the largest entry, and what was allowed
    *("checked_error", "allowed_error"),
    # time of a call; `times_first`: over that of the case's first contender, median and 20th and 80th percentile of the
    # ratios within rounds
    *("runs", "median_ms", "p20_ms", "p80_ms", "times_first", "times_first_p20", "times_first_p80"),
    # compulsory traffic and cheapest arithmetic by formula, and what the machine does at best in the same minutes
    *("bytes", "flops", "copy_gb_per_s", "gemm_gflop_per_s", "gb_per_s", "share_of_copy", "gflop_per_s"),
    *("share_of_gemm", "peak_extra_mb"),
    # training steps: throughput, and the part of the step that is more than the first contender's
    *("examples_per_s", "method_share"),
    # host: the host's time of a call in microseconds, with one thread and tiny tensors, which times_first then compares
    # (`median_ms` is the device's, if it has a time of its own). Files from before it was measured end before these.
    *("host_us", "host_us_p20", "host_us_p80"),
)
Row = dict[str, Any]  # by COLUMNS


def processor() -> str:
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match.group(1) if match else platform.processor() or platform.machine()


def commit() -> str:
    """The short hash, with a + where the work tree (but for results) differs from it. Without git what MTLGRAD_COMMIT
    says, or "none", which no report takes."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (
            "+" if git("status", "--porcelain", "--", ".", ":!bench/results") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("MTLGRAD_COMMIT", "none")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def driver(device: torch.device) -> str:
    """CUDA's runtime and NVIDIA's driver; empty on the CPU."""
    if device.type != "cuda":
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        found = "unknown"
    return f"CUDA {torch.version.cuda}, driver {found}"


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def facts(device: torch.device) -> dict[str, Any]:
    """The columns that are the same in all rows of a run."""
    try:
        installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        installed = math.nan
    info = mtlgrad.build_info()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {installed:.0f} GiB",
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "device": device_name(device),
        "driver": driver(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "torchjd": version("torchjd"),
        "mtlgrad": mtlgrad.__version__,
        "compiler": ", ".join(filter(None, [info["compiler"], info["nvcc"] and f"nvcc {info['nvcc']}"])),
        "commit": commit(),
    }


def times_first(result: Result, first: Result, percentile: float = 50) -> float:
    """How many times as long as the first contender: the median, over the rounds that both ran in, of their ratio.

    Neighbours in time see the same machine, so this is steadier than the ratio of two medians. Where there is no such
    round it is that, and other percentiles are NaN."""
    shared = sorted(result.times.keys() & first.times.keys())
    if not shared:
        return result.median / first.median if percentile == 50 else math.nan
    return float(np.percentile([result.times[i] / first.times[i] for i in shared], percentile))


def rows_of(case: Case, work: Work, results: dict[str, Result], copy_rate: float, gemm_rate: float) -> list[Row]:
    """One row a contender. Rates count the formula's bytes and operations, whatever a contender really does."""
    rows = []
    first = next(iter(results.values()))
    for name, result in results.items():
        row: dict[str, Any] = {"operation": case.operation, "shape": case.shape, "dtype": case.dtype, "contender": name}
        row |= {"bytes": int(work.bytes), "flops": int(work.flops), "note": result.note}
        row |= {"copy_gb_per_s": f"{copy_rate:.2f}", "gemm_gflop_per_s": f"{gemm_rate:.2f}"}
        row |= {"checked_error": known(result.error, ".1e"), "allowed_error": known(result.allowed, ".1e")}
        row["peak_extra_mb"] = known(result.peak_mb, ".1f")
        row["runs"] = len(result.times)
        if result.times:
            p20, median, p80 = np.percentile(list(result.times.values()), [20, 50, 80])
            bandwidth, rate = work.bytes / median / 1e6, work.flops / median / 1e6
            row |= {"median_ms": f"{median:.4f}", "p20_ms": f"{p20:.4f}", "p80_ms": f"{p80:.4f}"}
            row |= {"gb_per_s": f"{bandwidth:.2f}", "share_of_copy": f"{bandwidth / copy_rate:.4f}"}
            row |= {"gflop_per_s": f"{rate:.2f}", "share_of_gemm": f"{rate / gemm_rate:.4f}"}
            ratio = times_first(result, first)
            row["times_first"] = known(ratio, ".4f")
            for percentile in 20, 80:
                row[f"times_first_p{percentile}"] = known(times_first(result, first, percentile), ".4f")
            examples = work.contenders[name].examples
            if examples or work.examples:
                row["examples_per_s"] = f"{1e3 * (examples or work.examples or 0) / median:.2f}"
                row["method_share"] = "" if examples else known(1.0 - 1.0 / ratio, ".4f")
        rows.append(row)
    return rows


def known(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else ""


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
