"""Trainings of `mtlgrad train` on the data that comes with the package: what each method reaches, not how fast.

Not among the stems that run when none is named: takes a quarter of an hour, and no idle machine.
"""

from __future__ import annotations

import csv
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.harness import BenchError, Options
from bench.table import Row

TIMEOUT_S = 3600


@dataclass
class Training:
    """One run of `mtlgrad train`; its rows are every metric on the test split over the seeds."""

    operation: str
    shape: str
    arguments: Sequence[str]

    @property
    def title(self) -> str:
        return f"{self.operation} {self.shape}"

    def rows(self, stem: str, options: Options, extra: Sequence[str]) -> list[Row]:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "mtlgrad", "train", *self.arguments, "--threads", "1", "--device", "cpu"]
            done = subprocess.run(
                [*command, "--out", folder, "--name", "run"],
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise BenchError(f"{self.title}: {reason}")
            found = summary(Path(folder, "run", "results.csv"))
        print(f"\n{self.title}   (mtlgrad train {' '.join(self.arguments)})")
        rows = []
        for (method, metric), values in found.items():
            spread = statistics.stdev(values) if len(values) > 1 else None
            row: Row = {"operation": self.operation, "shape": self.shape, "dtype": "float32", "contender": method}
            row |= {
                "note": f"mtlgrad train {' '.join(self.arguments)}",
                "runs": len(values),
                "metric": metric,
                "threads": 1,
            }
            row |= {"mean": f"{statistics.mean(values):.4f}", "sd": "" if spread is None else f"{spread:.4f}"}
            rows.append(row)
            print(f"  {method:<22}{metric:<28}{row['mean']:>12} ± {row['sd']}", flush=True)
        return rows


def summary(path: Path) -> dict[tuple[str, str], list[float]]:
    """Values over the seeds by method and by "task metric", of a run's results.csv."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            name = "delta_m" if row["metric"] == "delta_m" else f"{row['task']} {row['metric']}"
            found[row["method"], name].append(float(row["value"]))
    return dict(found)


def cases(quick: bool, device: torch.device) -> list[Training]:
    """The comparisons of the README, each with the arguments that anybody can repeat it with."""
    if quick:
        arguments = "--data river --compare sum aligned --seeds 1 --epochs 1"
        return [Training("train river", "1 epoch", arguments.split())]
    ours, river = "bayesagg aligned aligned-ub", "--data river --seeds 3"
    one = f"{river} --epochs 10 --method sum --optimizer"
    return [
        Training(operation, shape, arguments.split())
        for operation, shape, arguments in (
            ("train clothing", "scale=min", f"--data clothing --seeds 3 --compare sum {ours}"),
            ("train river", "scale=min", f"{river} --compare sum uncertainty logsum {ours}"),
            ("train river", "scale=rmse", f"{river} --compare aligned aligned-ub --scale rmse"),
            ("train river 10 epochs", "lr=1e-3", f"{one} adam adatask-adam adatask-rmsprop --lr 1e-3"),
            ("train river 10 epochs", "lr=8e-3", f"{one} adam --lr 8e-3"),
            (
                "train clothing for rating",
                "target=rating",
                "--data clothing --seeds 5 --compare sum alphavil diw --target rating",
            ),
        )
    ]
