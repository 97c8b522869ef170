"""Benchmark of the `moments` stem: ``python -m bench.bench_moments [--quick] [--only TEXT]``.

Three whole aggregations at the published shapes (posterior of the batch, moments, mean over tasks, with the full-data
posterior as prior) and each operation by itself, against the eager reference, torch.compile of it and a literal
transcription of the published estimator.
"""

from __future__ import annotations

import sys

from bench import harness
from bench.moments_cases import cases

if __name__ == "__main__":
    sys.exit(harness.main("moments", cases))
