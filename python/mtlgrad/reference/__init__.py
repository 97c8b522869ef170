"""The operations in plain PyTorch, beside the papers' equations: the specification, and what runs without kernels."""

from .adatask import adatask_adagrad, adatask_adam, adatask_rmsprop
from .align import align
from .combine import combine, displace, dots, gram
from .moments import binary_moments, multiclass_moments, precision_mean, regression_moments, sampled_moments

__all__ = [
    "adatask_adagrad",
    "adatask_adam",
    "adatask_rmsprop",
    "align",
    "binary_moments",
    "combine",
    "displace",
    "dots",
    "gram",
    "multiclass_moments",
    "precision_mean",
    "regression_moments",
    "sampled_moments",
]
