"""Tensors in, pointers out: how the operations of this package call the compiled kernels.

A kernel gets raw pointers, sizes and a place to run: a thread count on the host, a stream and a device index on CUDA.
The stream is read at every call and never kept: a CUDA graph capture changes it.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ._native import _C

DTYPE_CODES = {torch.float32: 0, torch.float64: 3}


# By device type; tests of the CUDA sources without a GPU put their emulated kernels in place of the host's.
KERNELS: dict[str, ModuleType | None] = {"cpu": _C.cpu, "cuda": _C.cuda if _C.cuda_compiled else None}


def kernels_for(device: torch.device) -> ModuleType | None:
    """The compiled kernels that can work on this device's memory; None where there are none (then: the reference)."""
    return KERNELS.get(device.type)


def compiled_for(device: torch.device) -> ModuleType:
    """The same where there must be some: callers have sent other devices to the reference."""
    kernels = kernels_for(device)
    assert kernels is not None, f"no kernels for {device}"
    return kernels


def place(device: torch.device) -> tuple[int, int, int]:
    """(threads, stream, device index)."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return 1, torch._C._cuda_getCurrentRawStream(index), index
    return torch.get_num_threads(), 0, 0


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, else float32: half precision is storage only."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def dense_rows(tensor: Tensor) -> Tensor:
    """A matrix whose rows are dense; the stride between rows may be anything that does not overlap them."""
    usable = tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1]
    return tensor if usable or tensor.numel() == 0 else tensor.contiguous()


class Sink(NamedTuple):
    """Where a kernel leaves the moments of T tasks: see ``Sink`` in csrc/kernels.h."""

    fold: bool
    first: Tensor  # mean [B, T, D], or numerator [B, D]
    second: Tensor  # variance [B, T, D], or denominator [B, D]
    power: Tensor | None  # [T] float64, when folding

    @staticmethod
    def write(like: Tensor, tasks: int) -> Sink:
        shape = (like.shape[0], tasks, like.shape[1])
        return Sink(False, like.new_empty(shape), like.new_empty(shape), None)

    def arguments(self) -> tuple[bool, int, int, int]:
        power = 0 if self.power is None else self.power.data_ptr()
        return self.fold, self.first.data_ptr(), self.second.data_ptr(), power
