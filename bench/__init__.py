"""Benchmarks: ``python -m bench.bench_NAME`` in the repository's root; see README.md beside this file."""
