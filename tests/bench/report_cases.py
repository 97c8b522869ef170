"""Small CSVs and READMEs that tests of the report share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import table
from bench.measured import Results, read_results

WHERE = {
    "date": "2026-01-02T03:04Z",
    "machine": "Linux x86_64, 2 cores, 8 GiB",
    "cpu": "Abacus 9000",
    "threads": "2",
    "device": "cpu",
    "python": "3.11.7",
    "torch": "2.13.0",
    "numpy": "2.0.0",
    "torchjd": "0.18.0",
    "mtlgrad": "0.1.0",
    "compiler": "g++ 12.2.0",
    "commit": "abc1234",
}
# 10 GB/s and 100 GFLOP/s: the floor of these is 1 ms of copying, or 0.2 of arithmetic.
WORK = {"bytes": 10_000_000, "flops": 20_000_000, "copy_gb_per_s": "10.00", "gemm_gflop_per_s": "100.00"}
TIMED = WORK | {"checked_error": "1.2e-07", "allowed_error": "1.0e-05", "runs": 20, "dtype": "float32"}


def row(operation: str, shape: str, contender: str, ms: float | None, ratio: float | None = 1.0, **more: Any) -> dict:
    times_of = {} if ms is None else {"median_ms": f"{ms:.4f}", "times_first": f"{ratio:.4f}"}
    return WHERE | TIMED | times_of | {"operation": operation, "shape": shape, "contender": contender} | more


def write(folder: Path, name: str, rows: list[dict]) -> Path:
    table.write_rows(folder / name, rows, keep=False)
    return folder / name


def measured(folder: Path, *rows: dict, name: str = "combine_cpu.csv") -> Results:
    write(folder, name, list(rows))
    return read_results(folder)


def readme(folder: Path, *names: str) -> Path:
    path = folder / "README.md"
    parts = [f"<!-- bench: {name} -->\nold\n<!-- /bench -->\n" for name in names]
    path.write_text("# A title\n\n" + "\nbetween\n\n".join(parts) + "\nafter\n")
    return path
