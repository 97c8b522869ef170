"""The operations themselves: checked tensor functions over the compiled kernels."""

from .moments import binary_moments, multiclass_moments, precision_mean, regression_moments, sampled_moments

__all__ = ["binary_moments", "multiclass_moments", "precision_mean", "regression_moments", "sampled_moments"]
