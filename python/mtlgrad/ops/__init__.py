"""The operations themselves: checked tensor functions over the compiled kernels."""

from ._operation import Operation, define_operator, hide_from_dynamo
from .adatask import Step, TaskStep, adatask_adagrad, adatask_adam, adatask_rmsprop, step_settings
from .align import AlignResult, TaskMerge, align, merge
from .combine import Stacked, combine, dots, gram
from .displacement import displace
from .moments import binary_moments, multiclass_moments, precision_mean, regression_moments, sampled_moments
from .rules import cagrad, dualproj, fairgrad, imtlg, mgda, pcgrad, upgrad

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
    "cagrad",
    "combine",
    "define_operator",
    "displace",
    "dots",
    "dualproj",
    "fairgrad",
    "gram",
    "hide_from_dynamo",
    "imtlg",
    "merge",
    "mgda",
    "multiclass_moments",
    "pcgrad",
    "precision_mean",
    "regression_moments",
    "sampled_moments",
    "step_settings",
    "upgrad",
]
