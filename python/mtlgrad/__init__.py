"""mtlgrad: merges the gradients of several tasks that share one backbone."""

from . import distributed, metrics, ops, optim, posterior, reference
from .aligned import AlignedMTL
from .alphavil import AlphaVIL
from .bayesagg import BayesAgg, Binary, Multiclass, Regression
from .jacobian import task_backward
from .ops._native import build_info

__version__ = "0.1.0"

__all__ = [
    "AlignedMTL",
    "AlphaVIL",
    "BayesAgg",
    "Binary",
    "Multiclass",
    "Regression",
    "__version__",
    "build_info",
    "distributed",
    "metrics",
    "ops",
    "optim",
    "posterior",
    "reference",
    "task_backward",
]
