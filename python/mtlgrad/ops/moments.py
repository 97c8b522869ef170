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
from ..reference.moments import IGNORE, Covariance
from ._autograd import differentiable
from ._kernels import Sink, compute_dtype, kernels_for
from ._library import register
from .checks import (
    check_class_range,
    check_class_targets,
    check_finite,
    check_floating,
    check_not_empty,
    check_same_device,
    check_shape,
    shape_of,
)
from .moments_kernels import (
    binary_cross,
    class_spread,
    multiclass_cross,
    regression_cross,
    run_binary,
    run_multiclass,
    run_precision_mean,
    run_regression,
    run_sampled,
)

__all__ = ["binary_moments", "multiclass_moments", "precision_mean", "regression_moments", "sampled_moments"]

Moments = tuple[Tensor, Tensor]


def _fake_moments(features: Tensor, tasks: int, *others: Tensor) -> Moments:
    shape = (features.shape[0], tasks, features.shape[1])
    dtype = compute_dtype(features, *others)
    return features.new_empty(shape, dtype=dtype), features.new_empty(shape, dtype=dtype)


def _explain_nan(op: str, variance: Tensor, **tensors: Tensor) -> None:
    """Host only: a NaN in the result has a cause, and this says which."""
    if not bool(torch.isnan(variance.min() if variance.numel() else variance.sum())):
        return
    check_finite(op, **tensors)
    at = torch.nonzero(variance.isnan())[0].tolist()
    raise ValueError(
        f"{op}: covariance: expected a symmetric positive semi-definite matrix (and moments within range), found an "
        f"impossible or overflowing variance at [example, task, dimension] {at}"
    )


# ---- regression ------------------------------------------------------------------------------------------------------


def _check_regression(features: Tensor, targets: Tensor, mean: Tensor, covariance: Tensor) -> None:
    op = "regression_moments"
    check_shape(op, "features", features, ("B", "D"))
    batch, width = features.shape
    check_not_empty(op, "features", "example", batch)
    check_shape(op, "mean", mean, ("O", width))
    check_shape(op, "targets", targets, (batch, mean.shape[0]))
    outputs = (mean.shape[0],) if covariance.dim() == 3 else ()
    check_shape(op, "covariance", covariance, (*outputs, width, width))
    check_floating(op, features=features, targets=targets, mean=mean, covariance=covariance)
    check_same_device(op, "features", features=features, targets=targets, mean=mean, covariance=covariance)


def _regression_kernel(features: Tensor, targets: Tensor, mean: Tensor, covariance: Tensor) -> Moments:
    _check_regression(features, targets, mean, covariance)
    dtype = compute_dtype(features, targets, mean, covariance)
    features, targets, mean, covariance = (t.to(dtype) for t in (features, targets, mean, covariance))
    if kernels_for(features.device) is None:
        return reference.regression_moments(features, targets, mean, covariance)
    if features.device.type == "cpu":
        check_finite("regression_moments", features=features)
    cross, spread = regression_cross(features, covariance)
    sink = Sink.write(features, mean.shape[0])
    run_regression(features, targets, mean, cross, spread, sink)
    if features.device.type == "cpu":
        _explain_nan("regression_moments", sink.second, mean=mean, covariance=covariance)
    return sink.first, sink.second


def _regression_fake(features: Tensor, targets: Tensor, mean: Tensor, covariance: Tensor) -> Moments:
    _check_regression(features, targets, mean, covariance)
    return _fake_moments(features, mean.shape[0], targets, mean, covariance)


_regression_op = register(
    "regression_moments(Tensor features, Tensor targets, Tensor mean, Tensor covariance) -> (Tensor, Tensor)",
    _regression_kernel,
    _regression_fake,
)


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
    return differentiable(_regression_op, reference.regression_moments, features, targets, mean, covariance)


# ---- binary ----------------------------------------------------------------------------------------------------------


def _check_binary(features: Tensor, targets: Tensor, mean: Tensor, covariance: Tensor, nodes: int) -> None:
    op = "binary_moments"
    check_shape(op, "features", features, ("B", "D"))
    batch, width = features.shape
    check_not_empty(op, "features", "example", batch)
    check_shape(op, "mean", mean, ("O", width + 1))
    check_shape(op, "targets", targets, (batch, mean.shape[0]))
    square = (width + 1,) if covariance.dim() == 3 else ()
    check_shape(op, "covariance", covariance, (mean.shape[0], width + 1, *square))
    check_floating(op, features=features, targets=targets, mean=mean, covariance=covariance)
    check_same_device(op, "features", features=features, targets=targets, mean=mean, covariance=covariance)
    torch._check(3 <= nodes <= 512, lambda: f"{op}: nodes: expected 3 to 512, found {nodes}")


def _binary_kernel(features: Tensor, targets: Tensor, mean: Tensor, covariance: Tensor, nodes: int) -> Moments:
    _check_binary(features, targets, mean, covariance, nodes)
    dtype = compute_dtype(features, targets, mean, covariance)
    features, targets, mean, covariance = (t.to(dtype) for t in (features, targets, mean, covariance))
    if kernels_for(features.device) is None:
        return reference.binary_moments(features, targets, mean, covariance, nodes=nodes)
    if features.device.type == "cpu":
        check_finite("binary_moments", features=features)
    cross, spread = binary_cross(features, covariance)
    sink = Sink.write(features, mean.shape[0])
    run_binary(features, targets, mean, cross, spread, sink, nodes)
    if features.device.type == "cpu":
        _explain_nan("binary_moments", sink.second, mean=mean, covariance=covariance)
    return sink.first, sink.second


def _binary_fake(features: Tensor, targets: Tensor, mean: Tensor, covariance: Tensor, nodes: int) -> Moments:
    _check_binary(features, targets, mean, covariance, nodes)
    return _fake_moments(features, mean.shape[0], targets, mean, covariance)


_binary_op = register(
    "binary_moments(Tensor features, Tensor targets, Tensor mean, Tensor covariance, int nodes) -> (Tensor, Tensor)",
    _binary_kernel,
    _binary_fake,
)


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
        lambda *t: _binary_op(*t, nodes),
        lambda *t: reference.binary_moments(*t, nodes=nodes),
        features,
        targets,
        mean,
        covariance,
    )


# ---- multiclass ------------------------------------------------------------------------------------------------------


def _check_multiclass(
    features: Tensor,
    targets: Tensor,
    mean: Tensor,
    covariance: Tensor,
    class_covariance: Tensor | None,
    num_points: int,
) -> None:
    op = "multiclass_moments"
    check_shape(op, "features", features, ("B", "D"))
    batch, width = features.shape
    check_not_empty(op, "features", "example", batch)
    check_shape(op, "mean", mean, ("C", width + 1))
    check_not_empty(op, "mean", "class", mean.shape[0])
    check_shape(op, "targets", targets, (batch,))
    check_class_targets(op, targets)
    classes, size = mean.shape
    tensors = {"features": features, "targets": targets, "mean": mean, "covariance": covariance}
    if class_covariance is not None:
        check_shape(op, "covariance[0]", class_covariance, (classes, classes))
        check_shape(op, "covariance[1]", covariance, (size, size))
        check_floating(op, class_covariance=class_covariance)
        tensors["class_covariance"] = class_covariance
    else:
        allowed = ((classes * size, classes * size), (classes, size, size), (classes, size))
        torch._check(
            tuple(covariance.shape) in allowed,
            lambda: (
                f"{op}: covariance: expected shape [{classes * size}, {classes * size}] (full, class-major), "
                f"[{classes}, {size}, {size}] (block), [{classes}, {size}] (diagonal) or a pair "
                f"([{classes}, {classes}], [{size}, {size}]) (Kronecker), found {shape_of(covariance)}"
            ),
        )
    check_floating(op, features=features, mean=mean, covariance=covariance)
    check_same_device(op, "features", **tensors)
    torch._check(num_points >= 1, lambda: f"{op}: num_points: expected at least 1, found {num_points}")


def _multiclass_kernel(
    features: Tensor,
    targets: Tensor,
    mean: Tensor,
    covariance: Tensor,
    class_covariance: Tensor | None,
    num_points: int,
    seed: int,
) -> Moments:
    _check_multiclass(features, targets, mean, covariance, class_covariance, num_points)
    dtype = compute_dtype(features, mean, covariance)
    features, mean, covariance = (t.to(dtype) for t in (features, mean, covariance))
    structured: Covariance = covariance
    if class_covariance is not None:
        structured = (class_covariance.to(dtype), covariance)
    on_host = features.device.type == "cpu"
    if on_host:
        check_class_range("multiclass_moments", targets, mean.shape[0], IGNORE)
        check_finite("multiclass_moments", features=features)
    if kernels_for(features.device) is None:
        return reference.multiclass_moments(features, targets, mean, structured, num_points=num_points, seed=seed)
    sink = Sink.write(features, 1)
    structure, cross = multiclass_cross(features, structured, mean.shape[0])
    spread, class_factor = class_spread(structured, mean.shape[0])
    run_multiclass(features, targets, mean, structure, cross, spread, class_factor, sink, num_points, seed)
    if on_host:
        _explain_nan("multiclass_moments", sink.second, mean=mean, covariance=covariance)
    return sink.first, sink.second


def _multiclass_fake(
    features: Tensor,
    targets: Tensor,
    mean: Tensor,
    covariance: Tensor,
    class_covariance: Tensor | None,
    num_points: int,
    seed: int,
) -> Moments:
    _check_multiclass(features, targets, mean, covariance, class_covariance, num_points)
    return _fake_moments(features, 1, mean, covariance)


_multiclass_op = register(
    "multiclass_moments(Tensor features, Tensor targets, Tensor mean, Tensor covariance, Tensor? class_covariance, "
    "int num_points, int seed) -> (Tensor, Tensor)",
    _multiclass_kernel,
    _multiclass_fake,
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
            lambda f, m, a, s: _multiclass_op(f, targets, m, s, a, num_points, seed),
            lambda f, m, a, s: reference.multiclass_moments(f, targets, m, (a, s), num_points=num_points, seed=seed),
            features,
            mean,
            classes,
            size,
        )
    return differentiable(
        lambda f, m, s: _multiclass_op(f, targets, m, s, None, num_points, seed),
        lambda f, m, s: reference.multiclass_moments(f, targets, m, s, num_points=num_points, seed=seed),
        features,
        mean,
        covariance,
    )


# ---- samples ---------------------------------------------------------------------------------------------------------


def _check_sampled(features: Tensor, targets: Tensor, samples: Tensor, kind: str) -> None:
    op = "sampled_moments"
    check_shape(op, "features", features, ("B", "D"))
    batch, width = features.shape
    check_not_empty(op, "features", "example", batch)
    check_shape(op, "samples", samples, ("S", "C", width + 1))
    check_not_empty(op, "samples", "sample", samples.shape[0])
    check_not_empty(op, "samples", "class or output", samples.shape[1])
    check_floating(op, features=features, samples=samples)
    if kind == "binary":
        check_shape(op, "targets", targets, (batch, samples.shape[1]))
        check_floating(op, targets=targets)
    else:
        check_shape(op, "targets", targets, (batch,))
        check_class_targets(op, targets)
    check_same_device(op, "features", features=features, targets=targets, samples=samples)


def _sampled_kernel(features: Tensor, targets: Tensor, samples: Tensor, kind: str) -> Moments:
    _check_sampled(features, targets, samples, kind)
    binary = kind == "binary"
    dtype = compute_dtype(features, samples, *([targets] if binary else []))
    features, samples = features.to(dtype), samples.to(dtype)
    targets = targets.to(dtype) if binary else targets
    on_host = features.device.type == "cpu"
    if on_host:
        check_finite("sampled_moments", features=features)
        if not binary:
            check_class_range("sampled_moments", targets, samples.shape[1], IGNORE)
    if kernels_for(features.device) is None:
        return reference.sampled_moments(features, targets, samples, kind=kind)
    sink = Sink.write(features, samples.shape[1] if binary else 1)
    run_sampled(features, targets, samples, kind, sink)
    if on_host and sink.second.numel() and bool(sink.second.min().isnan()):
        check_finite("sampled_moments", samples=samples)
        raise ValueError(
            "sampled_moments: samples: expected gradients within range, found one whose variance overflows"
        )
    return sink.first, sink.second


def _sampled_fake(features: Tensor, targets: Tensor, samples: Tensor, kind: str) -> Moments:
    _check_sampled(features, targets, samples, kind)
    others = (samples, targets) if kind == "binary" else (samples,)
    return _fake_moments(features, samples.shape[1] if kind == "binary" else 1, *others)


_sampled_op = register(
    "sampled_moments(Tensor features, Tensor targets, Tensor samples, str kind) -> (Tensor, Tensor)",
    _sampled_kernel,
    _sampled_fake,
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
            lambda f, y, w: _sampled_op(f, y, w, kind),
            lambda f, y, w: reference.sampled_moments(f, y, w, kind=kind),
            features,
            targets,
            samples,
        )
    return differentiable(
        lambda f, w: _sampled_op(f, targets, w, kind),
        lambda f, w: reference.sampled_moments(f, targets, w, kind=kind),
        features,
        samples,
    )


# ---- aggregation -----------------------------------------------------------------------------------------------------


def _check_precision_mean(means: Tensor, variances: Tensor, power: Tensor) -> None:
    op = "precision_mean"
    check_shape(op, "means", means, ("B", "T", "D"))
    check_not_empty(op, "means", "example", means.shape[0])
    check_not_empty(op, "means", "task", means.shape[1])
    check_shape(op, "variances", variances, tuple(means.shape))
    check_shape(op, "power", power, (means.shape[1],))
    check_floating(op, means=means, variances=variances)
    check_same_device(op, "means", means=means, variances=variances, power=power)


def _precision_mean_kernel(means: Tensor, variances: Tensor, power: Tensor) -> Tensor:
    _check_precision_mean(means, variances, power)
    dtype = compute_dtype(means, variances)
    means, variances = means.to(dtype).contiguous(), variances.to(dtype).contiguous()
    if kernels_for(means.device) is None:
        return reference.precision_mean(means, variances, power)
    out = means.new_empty(means.shape[0], means.shape[2])
    run_precision_mean(means, variances, power.to(torch.float64).contiguous(), out)
    return out


def _precision_mean_fake(means: Tensor, variances: Tensor, power: Tensor) -> Tensor:
    _check_precision_mean(means, variances, power)
    return means.new_empty((means.shape[0], means.shape[2]), dtype=compute_dtype(means, variances))


_precision_mean_op = register(
    "precision_mean(Tensor means, Tensor variances, Tensor power) -> Tensor",
    _precision_mean_kernel,
    _precision_mean_fake,
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
        lambda e, v: _precision_mean_op(e, v, exponent),
        lambda e, v: reference.precision_mean(e, v, exponent),
        means,
        variances,
    )
