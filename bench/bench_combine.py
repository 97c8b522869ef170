"""Benchmark of the `combine` and `align` stems: ``python -m bench.bench_combine [--quick] [--only TEXT]``.

Whole Aligned-MTL aggregations (Gram matrix, alignment, weighted sum) of a matrix of gradients and of the parameters of
a ResNet-50, then each operation by itself, against the eager reference, torch.compile of it and TorchJD.
"""

from __future__ import annotations

import sys

from bench import harness
from bench.combine_cases import cases

if __name__ == "__main__":
    sys.exit(harness.main("combine", cases))
