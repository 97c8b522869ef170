"""What each kind of head contributes to a posterior: the gradient and curvature of its loss in the last layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..ops.checks import check_class_range, check_finite, check_tensors

Likelihood = Literal["regression", "binary", "multiclass"]
IGNORE = -100


class Terms(NamedTuple):
    """Of one batch, at given weights; rows without a label are zero throughout."""

    residual: Tensor  # [B, R], derivative of the loss in the logits (regression: of half the squared error)
    curvature: Tensor | None  # [B, R], diagonal of Q; None: one everywhere
    probability: Tensor  # [B, C], multiclass only: Q = diag(p) - p p'
    labelled: Tensor  # [B], multiclass only

    def gradient(self, hidden: Tensor) -> Tensor:
        """Of the loss, summed over the batch, [R, W]."""
        return self.residual.T @ hidden

    def curved(self, logits: Tensor) -> Tensor:
        """Q_b logits_b for every example, [B, R], with the diagonal of Q alone."""
        return logits if self.curvature is None else logits * self.curvature

    def jointly_curved(self, logits: Tensor) -> Tensor:
        """Q_b logits_b with all of Q; multiclass only."""
        p = self.probability
        return p * logits - p * (p * logits).sum(1, keepdim=True)

    def diagonal(self, hidden: Tensor) -> Tensor:
        """The diagonal of sum_b J_b' Q_b J_b, [R, W]; classification only."""
        assert self.curvature is not None
        return self.curvature.T @ hidden**2


def augment(features: Tensor, likelihood: Likelihood) -> Tensor:
    """Classification heads have a bias: a one is appended. Regression posteriors have none, as published."""
    return features if likelihood == "regression" else functional.pad(features, (0, 1), value=1.0)


def check_batch(
    op: str,
    likelihood: Likelihood,
    features: Tensor,
    targets: Tensor,
    weight_shape: Sequence[int] | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Shapes, dtypes, devices and, on the CPU, values. Returns the targets with their column of outputs.

    ``weight_shape`` is the posterior's [R, W] where that is known, ``weight`` where to expand."""
    needed: dict[str, object] = {"features": features, "targets": targets}
    if weight is not None or (weight_shape is None and likelihood != "regression"):
        needed["weight"] = weight
    for name, tensor in needed.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{op}: {name}: expected a tensor, found {type(tensor).__name__}")
    outputs, targets_like = ("C", "int64 B") if likelihood == "multiclass" else ("O", "B O!")
    sizes = {}
    if weight_shape is not None:
        sizes = {outputs: weight_shape[0], "D": weight_shape[1] - (likelihood != "regression")}
    if likelihood != "multiclass" and targets.dim() == 1:
        targets = targets[:, None]
    weights = {} if weight is None else {"weight": (weight, f"{outputs}! P")}
    check_tensors(op, sizes, features=(features, "B! D!"), **weights, targets=(targets, targets_like))
    if features.device.type == "cpu":
        check_finite(op, features=features)
        if weight is not None:
            check_finite(op, weight=weight)
        _check_target_values(op, likelihood, targets, sizes[outputs])
    return targets


def _check_target_values(op: str, likelihood: Likelihood, targets: Tensor, outputs: int) -> None:
    """Reads values: host tensors only."""
    if likelihood == "multiclass":
        check_class_range(op, targets, outputs, IGNORE)
        return
    outside = targets.isinf() if likelihood == "regression" else (targets < 0) | (targets > 1)
    if bool(outside.any()):
        at = torch.nonzero(outside)[0].tolist()
        expected = "finite values" if likelihood == "regression" else "values from 0 to 1"
        raise ValueError(
            f"{op}: targets: expected {expected}, or NaN for no label, found {targets[tuple(at)].item():g} at {at}"
        )


def terms_of(likelihood: Likelihood, hidden: Tensor, targets: Tensor, weight: Tensor) -> Terms:
    """``hidden`` [B, W] is :func:`augment` of the features, ``weight`` [R, W]."""
    logits = hidden @ weight.T
    nothing = hidden.new_empty(0)
    if likelihood == "multiclass":
        labelled = targets != IGNORE
        probability = torch.softmax(logits, 1) * labelled[:, None]
        onehot = functional.one_hot(targets.masked_fill(~labelled, 0), weight.shape[0]) * labelled[:, None]
        return Terms(probability - onehot, probability * (1 - probability), probability, labelled)
    targets = (targets[:, None] if targets.dim() == 1 else targets).to(hidden)
    missing = targets.isnan()
    if likelihood == "regression":
        return Terms((logits - targets).masked_fill(missing, 0.0), _shared_curvature(missing, hidden), nothing, nothing)
    p = torch.sigmoid(logits)
    return Terms((p - targets).masked_fill(missing, 0.0), (p * (1 - p)).masked_fill(missing, 0.0), nothing, nothing)


def _shared_curvature(missing: Tensor, hidden: Tensor) -> Tensor | None:
    """Regression: [B, O], or [B, 1] where every example has all labels or none, or None where nothing is missing: the
    outputs then share one precision. Reads the device, except while a CUDA graph is captured; an example whose labels
    are missing in part is then NaN for all, since the number of matrices cannot depend on the data."""
    if hidden.is_cuda and torch.cuda.is_current_stream_capturing():
        some, every = missing.any(1, keepdim=True), missing.all(1, keepdim=True)
        return torch.where(some & ~every, torch.nan, (~every).to(hidden))
    if not bool(missing.any()):
        return None
    if bool((missing == missing[:, :1]).all()):
        return (~missing[:, :1]).to(hidden)
    return (~missing).to(hidden)
