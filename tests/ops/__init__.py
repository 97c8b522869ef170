"""Tests of operations: a file a stem, and test_contract.py for what all of them have."""

from mtlgrad.ops import _native


def emulated() -> bool:
    """Whether CUDA kernels run on the host, a thread of theirs after the other: for them sizes stay small."""
    return _native.KERNELS["cpu"] is not _native._C.cpu
