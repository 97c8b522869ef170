"""Gaussian posteriors over the weights of last layers."""

from .posteriors import Posterior, binary_posterior, multiclass_posterior, regression_posterior

__all__ = ["Posterior", "binary_posterior", "multiclass_posterior", "regression_posterior"]
