"""The operations themselves: checked tensor functions over the compiled kernels."""

from ._operation import Operation, define_operator, hide_from_dynamo
from .adatask import Step, TaskStep, adatask_adagrad, adatask_adam, adatask_rmsprop, step_settings
from .align import AlignResult, TaskMerge, align, merge
from .combine import Stacked, combine, dots, gram
from .displacement import displace
from .moments import binary_moments, multiclass_moments, precision_mean, regression_moments, sampled_moments

__all__ = [
    "AlignResult",
    "Operation",
    "Stacked",
    "Step",
    "TaskMerge",
    "TaskStep",
    "adatask_adagrad",
    "adatask_adam",
    "adatask_rmsprop",
    "align",
    "binary_moments",
    "combine",
    "define_operator",
    "displace",
    "dots",
    "gram",
    "hide_from_dynamo",
    "merge",
    "multiclass_moments",
    "precision_mean",
    "regression_moments",
    "sampled_moments",
    "step_settings",
]
