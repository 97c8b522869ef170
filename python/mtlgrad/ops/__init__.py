"""The operations themselves: checked tensor functions over the compiled kernels."""

from .adatask import adatask_adagrad, adatask_adam, adatask_rmsprop
from .align import AlignResult, align, merge
from .combine import Stacked, combine, dots, gram
from .combine_displace import displace
from .moments import binary_moments, multiclass_moments, precision_mean, regression_moments, sampled_moments

__all__ = [
    "AlignResult",
    "Stacked",
    "adatask_adagrad",
    "adatask_adam",
    "adatask_rmsprop",
    "align",
    "binary_moments",
    "combine",
    "displace",
    "dots",
    "gram",
    "merge",
    "multiclass_moments",
    "precision_mean",
    "regression_moments",
    "sampled_moments",
]
