"""mtlgrad: merges the gradients of several tasks that share one backbone."""

from . import distributed, metrics, ops, optim, posterior, reference
from .alphavil import AlphaVIL
from .bayesagg import BayesAgg, Binary, Multiclass, Regression
from .jacobian import task_backward
from .ops._native import build_info
from .rules import (
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    DualProj,
    FairGrad,
    GramRule,
    NashMTL,
    PCGrad,
    UPGrad,
)

__version__ = "0.1.0"

__all__ = [
    "IMTLG",
    "MGDA",
    "AlignedMTL",
    "AlphaVIL",
    "BayesAgg",
    "Binary",
    "CAGrad",
    "DualProj",
    "FairGrad",
    "GramRule",
    "Multiclass",
    "NashMTL",
    "PCGrad",
    "Regression",
    "UPGrad",
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
