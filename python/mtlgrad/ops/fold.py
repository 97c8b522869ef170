"""The fused path: kernels that fold one task's moments into [B, D] sums. For :class:`mtlgrad.BayesAgg`; no checks."""

from __future__ import annotations

import torch
from torch import Tensor

from ._kernels import Sink, kernels_for
from .moments_kernels import run_binary, run_multiclass, run_regression, run_sampled
from .moments_kernels import run_weighted_mean as weighted_mean

__all__ = [
    "Sink",
    "folding",
    "has_kernels",
    "run_binary",
    "run_multiclass",
    "run_regression",
    "run_sampled",
    "weighted_mean",
]


def has_kernels(device: torch.device) -> bool:
    return kernels_for(device) is not None


def folding(numerator: Tensor, denominator: Tensor, power: Tensor) -> Sink:
    """numerator += lambda mean, denominator += lambda, lambda = variance^-power; power float64 [T] on the device."""
    return Sink(True, numerator, denominator, power)
