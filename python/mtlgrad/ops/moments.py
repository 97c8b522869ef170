"""Means and variances of per-example gradients with respect to the shared features (BayesAgg-MTL, arXiv 2402.04005).

The moments are those of the gradient of the *per-example* loss; the batch mean is taken once, at the end, by
:func:`precision_mean`. B examples, D features, P = D + 1 (a one is appended for the bias, last), O outputs, C classes,
S samples, T tasks.

All functions return float32 unless given a float64 tensor; float16 and bfloat16 are converted on the way in. A missing
label (NaN, or -100 for classes) has no gradient: mean 0, variance infinite, and no weight in :func:`precision_mean`.
Derivatives, where wanted, are those of :mod:`mtlgrad.reference`, which has the same functions with the equations.

Errors: ``RuntimeError`` for shapes, dtypes and devices, ``ValueError`` for options; on the CPU also ``ValueError`` for
values: NaN or infinite arguments, class indices out of range, covariances that are not positive semi-definite. On CUDA
values are not read back: such an argument gives NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..reference.moments import Covariance
from ._autograd import differentiable
from .moments_operators import Moments, binary_op, multiclass_op, precision_mean_op, regression_op, sampled_op

__all__ = ["binary_moments", "multiclass_moments", "precision_mean", "regression_moments", "sampled_moments"]


def regression_moments(features: Tensor, targets: Tensor, mean: Tensor, covariance: Tensor) -> Moments:
    """Moments of the gradient of (w.h - y)^2 for w ~ N(mean, covariance), in closed form.

    Args:
        features: [B, D].
        targets: [B, O]; NaN where there is no label.
        mean: [O, D].
        covariance: [D, D], shared by the outputs, or [O, D, D]; symmetric.

    Returns:
        mean and variance of the gradient, [B, O, D] each.

    Source: arXiv 2402.04005, section 4 (Isserlis' theorem); DESIGN 4.1.
    """
    return differentiable(regression_op, reference.regression_moments, features, targets, mean, covariance)


def binary_moments(features: Tensor, targets: Tensor, mean: Tensor, covariance: Tensor, *, nodes: int = 32) -> Moments:
    """Moments of the gradient of binary cross entropy with logit w.h + b for (w, b) ~ N(mean, covariance), per output.

    No weight is sampled: the logit is one-dimensional, and its Gaussian is integrated by Gauss-Hermite quadrature.

    Args:
        features: [B, D].
        targets: [B, O], 0, 1 or between; NaN where there is no label.
        mean: [O, P], bias last.
        covariance: [O, P, P], symmetric, or [O, P], the diagonals of diagonal matrices.
        nodes: of the quadrature, 3 to 512.

    Returns:
        mean and variance of the gradient, [B, O, D] each.

    Source: arXiv 2402.04005, section 4; the conditional form is DESIGN 4.1.
    """
    return differentiable(
        lambda *t: binary_op(*t, nodes),
        lambda *t: reference.binary_moments(*t, nodes=nodes),
        features,
        targets,
        mean,
        covariance,
    )


def multiclass_moments(
    features: Tensor,
    targets: Tensor,
    mean: Tensor,
    covariance: Covariance,
    *,
    num_points: int = 256,
    seed: int = 0,
) -> Moments:
    """Moments of the gradient of softmax cross entropy for weights (W, b) jointly Gaussian over C classes.

    The C logits are integrated over quasi-random points, not the C x P weights: see :mod:`mtlgrad.reference`.

    Args:
        features: [B, D].
        targets: [B] int64; -100 where there is no label.
        mean: [C, P], bias last.
        covariance: [C*P, C*P], class-major, symmetric; or, for posteriors of less structure, [C, P, P] (one block per
            class), [C, P] (diagonal), or a pair ([C, C], [P, P]) (their Kronecker product).
        num_points: scrambled Sobol points.
        seed: of the scrambling.

    Returns:
        mean and variance of the gradient, [B, 1, D] each: the classes are one task.

    Source: arXiv 2402.04005, section 4; the conditional form is DESIGN 4.1.
    """
    if isinstance(covariance, tuple):
        if len(covariance) != 2:
            raise ValueError(
                f"multiclass_moments: covariance: expected a tensor or a pair of tensors, found {len(covariance)}"
            )
        classes, size = covariance
        return differentiable(
            lambda f, m, a, s: multiclass_op(f, targets, m, s, a, num_points, seed),
            lambda f, m, a, s: reference.multiclass_moments(f, targets, m, (a, s), num_points=num_points, seed=seed),
            features,
            mean,
            classes,
            size,
        )
    return differentiable(
        lambda f, m, s: multiclass_op(f, targets, m, s, None, num_points, seed),
        lambda f, m, s: reference.multiclass_moments(f, targets, m, s, num_points=num_points, seed=seed),
        features,
        mean,
        covariance,
    )


def sampled_moments(features: Tensor, targets: Tensor, samples: Tensor, *, kind: str) -> Moments:
    """Moments over weight samples: the published estimator for ``kind="binary"`` and ``kind="multiclass"``.

    One pass over the samples, both moments in registers, deviations from the first sample's gradient summed, so that
    tight posteriors do not cancel; the [S, B, D] tensor of gradients never exists. The variance is that of the S
    samples (divided by S, as published).

    Args:
        features: [B, D].
        targets: binary [B, C], 0, 1 or between, NaN where there is no label; multiclass [B] int64, -100 likewise.
        samples: [S, C, P], bias last.
        kind: "binary" (C tasks) or "multiclass" (one task).

    Returns:
        mean and variance of the gradient: binary [B, C, D] each, multiclass [B, 1, D] each.

    Source: arXiv 2402.04005, section 4 (Monte Carlo moments).
    """
    if kind not in ("binary", "multiclass"):
        raise ValueError(f'sampled_moments: kind: expected "binary" or "multiclass", found {kind!r}')
    if kind == "binary":
        return differentiable(
            lambda f, y, w: sampled_op(f, y, w, kind),
            lambda f, y, w: reference.sampled_moments(f, y, w, kind=kind),
            features,
            targets,
            samples,
        )
    return differentiable(
        lambda f, w: sampled_op(f, targets, w, kind),
        lambda f, w: reference.sampled_moments(f, targets, w, kind=kind),
        features,
        samples,
    )


def power_tensor(op: str, power: float | Sequence[float] | Tensor, tasks: int, device: torch.device) -> Tensor:
    """One exponent per task, float64 [T]."""
    if isinstance(power, Tensor):
        return power.to(device, torch.float64).expand(tasks) if power.dim() == 0 else power.to(device, torch.float64)
    values = [float(power)] * tasks if isinstance(power, (int, float)) else [float(p) for p in power]
    if len(values) != tasks:
        raise ValueError(f"{op}: power: expected one number or one per task ({tasks}), found {len(values)}")
    if not all(0 <= p < float("inf") for p in values):
        raise ValueError(f"{op}: power: expected finite numbers of at least 0, found {values}")
    return torch.tensor(values, dtype=torch.float64, device=device)


def precision_mean(means: Tensor, variances: Tensor, power: float | Sequence[float] | Tensor = 1.0) -> Tensor:
    """The mean of the tasks' gradients by inverse variance, dimension by dimension, over the batch size:
    sum_t lambda_t E_t / sum_t lambda_t / B with lambda_t = max(Var_t, 1e-8)^-power_t.

    Args:
        means: [B, T, D].
        variances: [B, T, D]; infinite where there is no label. Where no task has one the result is 0.
        power: one number or one per task, at least 0; 0 is the plain mean.

    Returns:
        [B, D]. NaN where all weights leave the range of the dtype (in float32: a sum under 2^-100).

    Source: arXiv 2402.04005, equation 6 (power 1), and the published code (other powers); DESIGN 4.3.
    """
    tasks = means.shape[1] if means.dim() == 3 else 1  # another shape is the operator's to refuse
    exponent = power_tensor("precision_mean", power, tasks, means.device)
    return differentiable(
        lambda e, v: precision_mean_op(e, v, exponent),
        lambda e, v: reference.precision_mean(e, v, exponent),
        means,
        variances,
    )
