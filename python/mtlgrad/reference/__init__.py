"""The operations of ``mtlgrad.ops`` in plain PyTorch: the specification, and what runs where no kernel can."""

from .moments import binary_moments, multiclass_moments, precision_mean, regression_moments, sampled_moments

__all__ = ["binary_moments", "multiclass_moments", "precision_mean", "regression_moments", "sampled_moments"]
