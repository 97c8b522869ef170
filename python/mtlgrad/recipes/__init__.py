"""A trainer that compares methods on a recipe: one file with tasks, data and a model. ``mtlgrad train`` runs it."""

from .recipe import MultiTaskNet, Recipe, Tensors, linear_heads, random_split, standardised, standardised_labels
from .tasks import (
    AUC,
    MAE,
    RMSE,
    Accuracy,
    Mean,
    MeanIoU,
    Metric,
    Task,
    absolute_error,
    binary,
    multiclass,
    regression,
    squared_error,
)

__all__ = [
    "AUC",
    "MAE",
    "RMSE",
    "Accuracy",
    "Mean",
    "MeanIoU",
    "Metric",
    "MultiTaskNet",
    "Recipe",
    "Task",
    "Tensors",
    "absolute_error",
    "binary",
    "linear_heads",
    "multiclass",
    "random_split",
    "regression",
    "squared_error",
    "standardised",
    "standardised_labels",
]
