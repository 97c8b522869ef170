"""Benchmark of the `adatask` stem: ``python -m bench.bench_adatask [--quick] [--only TEXT]``.

Whole steps of AdaTask's optimizers, of one large tensor and of the parameters of a ResNet-50, against the published
step, torch.optim's own steps task by task, the eager reference, and torch.compile of it.
"""

from __future__ import annotations

import sys

from bench import harness
from bench.adatask_cases import cases

if __name__ == "__main__":
    sys.exit(harness.main("adatask", cases))
