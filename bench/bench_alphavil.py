"""Benchmark of alphaVIL's search: ``python -m bench.bench_alphavil [--quick] [--only TEXT]``.

One step of alpha on a ResNet-18, relative to a forward and backward of the network; "bytes" are those of the T deltas
read twice.
"""

from __future__ import annotations

import sys

from bench import harness
from bench.alphavil_cases import cases

if __name__ == "__main__":
    sys.exit(harness.main("alphavil", cases))
