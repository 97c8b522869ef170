"""The operations in plain PyTorch, beside the papers' equations: the specification, and what runs without kernels."""

from .adatask import adatask_adagrad, adatask_adam, adatask_rmsprop
from .align import align
from .combine import combine, displace, dots, gram
from .moments import binary_moments, multiclass_moments, precision_mean, regression_moments, sampled_moments
from .rules import cagrad, dualproj, fairgrad, imtlg, mgda, pcgrad, upgrad

__all__ = [
    "adatask_adagrad",
    "adatask_adam",
    "adatask_rmsprop",
    "align",
    "binary_moments",
    "cagrad",
    "combine",
    "displace",
    "dots",
    "dualproj",
    "fairgrad",
    "gram",
    "imtlg",
    "mgda",
    "multiclass_moments",
    "pcgrad",
    "precision_mean",
    "regression_moments",
    "sampled_moments",
    "upgrad",
]
