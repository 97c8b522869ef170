"""The ``mtlgrad::`` operators of the `moments` stem: checks, kernels, and the shapes-only version that is traced."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..reference.moments import IGNORE, Covariance
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


regression_op = register(
    "regression_moments(Tensor features, Tensor targets, Tensor mean, Tensor covariance) -> (Tensor, Tensor)",
    _regression_kernel,
    _regression_fake,
)


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


binary_op = register(
    "binary_moments(Tensor features, Tensor targets, Tensor mean, Tensor covariance, int nodes) -> (Tensor, Tensor)",
    _binary_kernel,
    _binary_fake,
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


multiclass_op = register(
    "multiclass_moments(Tensor features, Tensor targets, Tensor mean, Tensor covariance, Tensor? class_covariance, "
    "int num_points, int seed) -> (Tensor, Tensor)",
    _multiclass_kernel,
    _multiclass_fake,
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


sampled_op = register(
    "sampled_moments(Tensor features, Tensor targets, Tensor samples, str kind) -> (Tensor, Tensor)",
    _sampled_kernel,
    _sampled_fake,
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


precision_mean_op = register(
    "precision_mean(Tensor means, Tensor variances, Tensor power) -> Tensor",
    _precision_mean_kernel,
    _precision_mean_fake,
)
