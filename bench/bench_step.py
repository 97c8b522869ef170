"""Benchmark of whole training steps: ``python -m bench.bench_step [--quick] [--only TEXT]``.

Forward and backward of a ResNet-18 with three heads: the sum of the losses, Aligned-MTL in its three forms, TorchJD.
"""

from __future__ import annotations

import sys

from bench import harness
from bench.step_cases import cases

if __name__ == "__main__":
    sys.exit(harness.main("step", cases))
