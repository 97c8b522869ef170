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

Each operation is GEMMs by torch, which make a :class:`BatchPosterior`, then a kernel, called by a function ``run_*``.
:class:`mtlgrad.BayesAgg` calls these itself, with batch posteriors whose covariance was never formed, and has them
accumulate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..reference.moments import IGNORE, Covariance
from ..reference.quadrature import gauss_hermite, sobol_normal
from ._native import _C, KERNELS, launch_place
from ._operation import Operation
from .checks import (
    check_class_range,
    check_class_targets,
    check_finite,
    check_floating,
    check_not_empty,
    check_same_device,
    check_shape,
    refuse,
    shape_of,
)
from .rows import DTYPE_CODES

__all__ = ["binary_moments", "multiclass_moments", "precision_mean", "regression_moments", "sampled_moments"]

Moments = tuple[Tensor, Tensor]

STRUCTURES = ("full", "block", "kron")  #: of multiclass posteriors, as csrc/kernels.h numbers them
WORKSPACE_BYTES = 32 << 20  # of multiclass_moments on a device: enough examples in flight to fill it


class Output(NamedTuple):
    """Where a kernel leaves the moments of T tasks; see ``Output`` in csrc/kernels.h."""

    first: Tensor  #: mean [B, T, D], or numerator [B, D]
    second: Tensor  #: variance [B, T, D], or denominator [B, D]
    power: Tensor | None = None  #: [T] float64: numerator += lambda mean, denominator += lambda = variance^-power

    @staticmethod
    def like(features: Tensor, tasks: int) -> Output:
        shape = (features.shape[0], tasks, features.shape[1])
        return Output(features.new_empty(shape), features.new_empty(shape))

    @property
    def addresses(self) -> tuple[int, int, int]:
        return self.first.data_ptr(), self.second.data_ptr(), _address(self.power)


class BatchPosterior(NamedTuple):
    """A posterior at the examples of a batch, in the shapes of csrc/kernels.h."""

    structure: str  #: "rows" (regression and binary: outputs apart), or one of STRUCTURES
    mean: Tensor
    cross_covariance: Tensor  #: of each weight with each example's logit
    variances: Tensor  #: (co)variances at each dimension
    classes: Tensor | None = None  #: [C, C], the class factor of a Kronecker covariance

    def to(self, like: Tensor) -> BatchPosterior:
        moved = (None if t is None else t.to(like) for t in self[1:])
        return BatchPosterior(self.structure, *moved)  # type: ignore[arg-type]

    def contiguous(self) -> BatchPosterior:
        return BatchPosterior(self.structure, *(None if t is None else t.contiguous() for t in self[1:]))  # type: ignore[arg-type]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _kernels(tensor: Tensor) -> ModuleType:
    kernels = KERNELS.get(tensor.device.type)
    assert kernels is not None, f"no kernels for {tensor.device}"
    return kernels


def has_kernels(device: torch.device) -> bool:
    return KERNELS.get(device.type) is not None


def _features(features: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Return rows that are dense, however far apart; and the same as a kernel takes them."""
    if features.numel() and not (features.stride(1) == 1 and features.stride(0) >= features.shape[1]):
        features = features.contiguous()
    return features, (features.data_ptr(), features.stride(0), features.shape[0], features.shape[1])


# ---- what the operations share ---------------------------------------------------------------------------------------


def _compute_dtype(*tensors: Any) -> torch.dtype:
    """float64 if any tensor is, else float32: half precision is storage only."""
    wide = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def _widened(*arguments: Any) -> list[Any]:
    """Return the arguments, those that are floating tensors in one dtype."""
    dtype = _compute_dtype(*arguments)
    return [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


def _check_features(op: str, features: Tensor) -> tuple[int, int]:
    check_shape(op, "features", features, ("B", "D"))
    check_not_empty(op, "features", "example", features.shape[0])
    return features.shape[0], features.shape[1]


def _check_kinds(op: str, targets: Tensor | None = None, **floating: Tensor) -> None:
    """Dtypes and devices; ``targets`` are those of classes."""
    check_floating(op, **floating)
    check_same_device(op, "features", **floating, **({} if targets is None else {"targets": targets}))


def _declare(
    schema: str,
    check: Callable[..., None],
    run: Callable[..., None],
    refer: Callable[..., Any],
    tasks: Callable[..., int],
    impossible: str = "covariance: expected a symmetric positive semi-definite matrix (and moments within range), "
    "found an impossible or overflowing variance",
) -> Operation:
    """Declare an operation of the moments; ``run`` gets its arguments in one dtype, then an :class:`Output`."""
    op = schema.partition("(")[0]

    def outputs(features: Tensor, *others: Any) -> list[Tensor]:
        like = features.new_empty(0, dtype=_compute_dtype(features, *others))
        shape = (features.shape[0], tasks(*others), features.shape[1])
        return [like.new_empty(shape), like.new_empty(shape)]

    def kernel(_: ModuleType, *arguments: Any) -> None:
        (features, targets, *others), out = _widened(*arguments[:-1]), arguments[-1]
        host, variance = features.device.type == "cpu", out[1]
        if host:  # where values can be looked at without waiting
            if not targets.is_floating_point():
                classes = others[0].shape[-2]  # of mean [C, P] or samples [S, C, P]
                check_class_range(op, targets, classes, IGNORE)
            check_finite(op, features=features)
        run(features, targets, *others, Output(*out))
        if host and bool((variance.min() if variance.numel() else variance.sum()).isnan()):
            check_finite(op, **{name: t for name, t in zip(names[2:], others) if isinstance(t, Tensor)})
            at = torch.nonzero(variance.isnan())[0].tolist()
            raise ValueError(f"{op}: {impossible} at [example, task, dimension] {at}")

    names = [text.split()[1] for text in schema.partition("(")[2].partition(")")[0].split(", ")]
    return Operation(
        schema + " -> (Tensor, Tensor)",
        check=check,
        outputs=outputs,
        kernel=kernel,
        reference=lambda *arguments: refer(*_widened(*arguments)),
        differentiable=True,
    )


# ---- regression ------------------------------------------------------------------------------------------------------


def regression_moments(features: Tensor, targets: Tensor, mean: Tensor, covariance: Tensor) -> Moments:
    """Return the moments of the gradient of (w.h - y)^2 for w ~ N(mean, covariance), in closed form.

    Args:
        features: [B, D].
        targets: [B, O]; NaN where there is no label.
        mean: [O, D].
        covariance: [D, D], shared by the outputs, or [O, D, D]; symmetric.

    Returns:
        mean and variance of the gradient, [B, O, D] each.

    Source: arXiv 2402.04005, section 4 (Isserlis' theorem); DESIGN 4.1.
    """
    result: Moments = _regression(features, targets, mean, covariance)
    return result


def regression_posterior(features: Tensor, mean: Tensor, covariance: Tensor) -> BatchPosterior:
    """Cross covariance S h, [1 or O, B, D], and variances, [1 or O, D]."""
    covariance = covariance if covariance.dim() == 3 else covariance[None]
    cross = torch.matmul(features, covariance.mT)
    return BatchPosterior("rows", mean, cross, covariance.diagonal(dim1=-2, dim2=-1))


def run_regression(features: Tensor, targets: Tensor, at: BatchPosterior, out: Output) -> None:
    (features, given), targets, (_, mean, cross, variances, _) = (
        _features(features),
        targets.contiguous(),
        at.contiguous(),
    )
    _kernels(features).regression_moments(
        DTYPE_CODES[features.dtype],
        given,
        targets.data_ptr(),
        mean.data_ptr(),
        cross.data_ptr(),
        0 if cross.shape[0] == 1 else cross.stride(0),
        variances.data_ptr(),
        0 if variances.shape[0] == 1 else variances.stride(0),
        mean.shape[0],
        out.addresses,
        launch_place(features.device),
    )


def _check_regression(features: Tensor, targets: Tensor, mean: Tensor, covariance: Tensor) -> None:
    op = "regression_moments"
    batch, width = _check_features(op, features)
    check_shape(op, "mean", mean, ("O", width))
    check_shape(op, "targets", targets, (batch, mean.shape[0]))
    outputs = (mean.shape[0],) if covariance.dim() == 3 else ()
    check_shape(op, "covariance", covariance, (*outputs, width, width))
    _check_kinds(op, features=features, targets=targets, mean=mean, covariance=covariance)


_regression = _declare(
    "regression_moments(Tensor features, Tensor targets, Tensor mean, Tensor covariance)",
    _check_regression,
    lambda features, targets, mean, s, out: run_regression(
        features, targets, regression_posterior(features, mean, s), out
    ),
    reference.regression_moments,
    tasks=lambda targets, mean, _: mean.shape[0],
)


# ---- binary ----------------------------------------------------------------------------------------------------------


def binary_moments(features: Tensor, targets: Tensor, mean: Tensor, covariance: Tensor, *, nodes: int = 32) -> Moments:
    """Return the moments of the gradient of binary cross entropy with logit w.h + b, (w, b) ~ N(mean, covariance).

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
    result: Moments = _binary(features, targets, mean, covariance, nodes)
    return result


def binary_posterior(features: Tensor, mean: Tensor, covariance: Tensor) -> BatchPosterior:
    """Cross covariance S h~, [O, B, P], and variances, [O, P]; covariance [O, P, P], or [O, P] if diagonal."""
    width = features.shape[1]
    if covariance.dim() == 2:
        bias = covariance[:, None, width:].expand(-1, len(features), 1)
        return BatchPosterior("rows", mean, torch.cat([features * covariance[:, None, :width], bias], -1), covariance)
    # The appended one of h~ picks the bias's column.
    hidden = features.expand(covariance.shape[0], -1, -1)
    cross = torch.baddbmm(covariance[:, None, :, width], hidden, covariance[:, :, :width].mT)
    return BatchPosterior("rows", mean, cross, covariance.diagonal(dim1=-2, dim2=-1))


@lru_cache(maxsize=64)
def _hermite_on(nodes: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    u, weight = gauss_hermite(nodes)
    return u.to(device, dtype), weight.to(device, dtype)


def run_binary(features: Tensor, targets: Tensor, at: BatchPosterior, out: Output, nodes: int = 32) -> None:
    (features, given), targets, at = _features(features), targets.contiguous(), at.contiguous()
    rule = _hermite_on(nodes, features.device, features.dtype)
    addresses = [t.data_ptr() for t in (targets, at.mean, at.cross_covariance, at.variances, *rule)]
    common = (nodes, at.mean.shape[0], out.addresses, launch_place(features.device))
    _kernels(features).binary_moments(DTYPE_CODES[features.dtype], given, *addresses, *common)


def _check_binary(features: Tensor, targets: Tensor, mean: Tensor, covariance: Tensor, nodes: int) -> None:
    op = "binary_moments"
    batch, width = _check_features(op, features)
    check_shape(op, "mean", mean, ("O", width + 1))
    check_shape(op, "targets", targets, (batch, mean.shape[0]))
    square = (width + 1,) if covariance.dim() == 3 else ()
    check_shape(op, "covariance", covariance, (mean.shape[0], width + 1, *square))
    _check_kinds(op, features=features, targets=targets, mean=mean, covariance=covariance)
    if not 3 <= nodes <= 512:
        refuse(f"{op}: nodes: expected 3 to 512, found {nodes}")


_binary = _declare(
    "binary_moments(Tensor features, Tensor targets, Tensor mean, Tensor covariance, int nodes)",
    _check_binary,
    lambda features, targets, mean, s, nodes, out: run_binary(
        features, targets, binary_posterior(features, mean, s), out, nodes
    ),
    lambda *arguments: reference.binary_moments(*arguments[:-1], nodes=arguments[-1]),
    tasks=lambda targets, mean, *_: mean.shape[0],
)


# ---- multiclass ------------------------------------------------------------------------------------------------------


def multiclass_moments(
    features: Tensor, targets: Tensor, mean: Tensor, covariance: Covariance, *, num_points: int = 256, seed: int = 0
) -> Moments:
    """Return the moments of the gradient of softmax cross entropy for weights (W, b) jointly Gaussian over C classes.

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
    classes = None
    if isinstance(covariance, tuple):
        if len(covariance) != 2:
            raise ValueError(
                f"multiclass_moments: covariance: expected a tensor or a pair of tensors, found {len(covariance)}"
            )
        classes, covariance = covariance
    result: Moments = _multiclass(features, targets, mean, covariance, classes, num_points, seed)
    return result


def multiclass_posterior(features: Tensor, mean: Tensor, covariance: Covariance) -> BatchPosterior:
    classes, size = mean.shape
    if isinstance(covariance, tuple):
        _, _, cross, variances, _ = binary_posterior(features, mean, covariance[1][None])
        return BatchPosterior("kron", mean, cross[0], variances[0], covariance[0])
    if covariance.dim() == 3 or covariance.shape[0] == classes:
        return binary_posterior(features, mean, covariance)._replace(structure="block")
    # Block k of rows, by symmetry the columns of class k: [P, C*P] for each k.
    rows = covariance.view(classes, size, -1)
    cross = torch.baddbmm(rows[:, size - 1 :], features.expand(classes, -1, -1), rows[:, : size - 1])
    return BatchPosterior("full", mean, cross, class_variances(covariance, classes))


def class_variances(covariance: Tensor, classes: int) -> Tensor:
    """Return the covariances between classes at each dimension, [C, C, P], of a [C*P, C*P] covariance."""
    size = covariance.shape[0] // classes
    return covariance.view(classes, size, classes, size).diagonal(dim1=1, dim2=3)


@lru_cache(maxsize=64)
def _sobol_on(num_points: int, dimension: int, seed: int, device: torch.device) -> Tensor:
    return sobol_normal(num_points, dimension, seed).to(device)


def run_multiclass(
    features: Tensor, targets: Tensor, at: BatchPosterior, out: Output, num_points: int = 256, seed: int = 0
) -> None:
    (features, given), targets, at = _features(features), targets.contiguous(), at.contiguous()
    classes, structure, where = at.mean.shape[0], STRUCTURES.index(at.structure), launch_place(features.device)
    points = _sobol_on(num_points, classes, seed, features.device)
    slot, slots = _C.multiclass_workspace(structure, classes, num_points), where[0]
    if features.device.type == "cuda":
        slots = min(features.shape[0], max(1, WORKSPACE_BYTES // (8 * slot)))
    workspace = torch.empty(slots * slot, dtype=torch.float64, device=features.device)
    _kernels(features).multiclass_moments(
        DTYPE_CODES[features.dtype],
        given,
        targets.data_ptr(),
        (structure, *map(_address, at[1:]), classes),
        points.data_ptr(),
        num_points,
        workspace.data_ptr(),
        slots,
        out.addresses,
        where,
    )


def _check_multiclass(
    features: Tensor,
    targets: Tensor,
    mean: Tensor,
    covariance: Tensor,
    class_covariance: Tensor | None,
    num_points: int,
    seed: int,
) -> None:
    op = "multiclass_moments"
    batch, width = _check_features(op, features)
    check_shape(op, "mean", mean, ("C", width + 1))
    check_not_empty(op, "mean", "class", mean.shape[0])
    check_shape(op, "targets", targets, (batch,))
    check_class_targets(op, targets)
    classes, size = mean.shape
    floating = {"mean": mean, "covariance": covariance}
    if class_covariance is not None:
        check_shape(op, "covariance[0]", class_covariance, (classes, classes))
        check_shape(op, "covariance[1]", covariance, (size, size))
        floating["class_covariance"] = class_covariance
    elif tuple(covariance.shape) not in ((classes * size, classes * size), (classes, size, size), (classes, size)):
        refuse(
            f"{op}: covariance: expected shape [{classes * size}, {classes * size}] (full, class-major), "
            f"[{classes}, {size}, {size}] (block), [{classes}, {size}] (diagonal) or a pair "
            f"([{classes}, {classes}], [{size}, {size}]) (Kronecker), found {shape_of(covariance)}"
        )
    _check_kinds(op, targets, features=features, **floating)
    if num_points < 1:
        refuse(f"{op}: num_points: expected at least 1, found {num_points}")


def _structured(covariance: Tensor, class_covariance: Tensor | None) -> Covariance:
    return covariance if class_covariance is None else (class_covariance, covariance)


_multiclass = _declare(
    "multiclass_moments(Tensor features, Tensor targets, Tensor mean, Tensor covariance, Tensor? class_covariance, "
    "int num_points, int seed)",
    _check_multiclass,
    lambda features, targets, mean, s, classes, num_points, seed, out: run_multiclass(
        features, targets, multiclass_posterior(features, mean, _structured(s, classes)), out, num_points, seed
    ),
    lambda features, targets, mean, s, classes, num_points, seed: reference.multiclass_moments(
        features, targets, mean, _structured(s, classes), num_points=num_points, seed=seed
    ),
    tasks=lambda *_: 1,
)


# ---- samples ---------------------------------------------------------------------------------------------------------


def sampled_moments(features: Tensor, targets: Tensor, samples: Tensor, *, kind: str) -> Moments:
    """Return the moments over weight samples: the published estimator for ``kind="binary"`` and ``"multiclass"``.

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
    result: Moments = _sampled(features, targets, samples, kind)
    return result


def run_sampled(features: Tensor, targets: Tensor, samples: Tensor, kind: str, out: Output) -> None:
    targets, samples = targets.contiguous(), samples.contiguous()
    num_samples, classes, _ = samples.shape
    batch, width = features.shape
    likelihood = ("binary", "multiclass").index(kind)
    if kind == "multiclass":  # [B, S, C]
        weights = samples.view(num_samples * classes, width + 1)
        logits = torch.addmm(weights[:, width], features, weights[:, :width].T)
    else:  # [C, B, S]
        by_class = samples.permute(1, 2, 0)
        logits = torch.baddbmm(by_class[:, width, None], features.expand(classes, -1, -1), by_class[:, :width])
    kernels, where = _kernels(features), launch_place(features.device)
    common, sizes = (DTYPE_CODES[features.dtype], likelihood, logits.data_ptr()), (batch, num_samples, classes)
    kernels.sample_residuals(*common, targets.data_ptr(), *sizes, where)
    kernels.sampled_moments(*common, samples.data_ptr(), *sizes, width, out.addresses, where)


def _check_sampled(features: Tensor, targets: Tensor, samples: Tensor, kind: str) -> None:
    op = "sampled_moments"
    batch, width = _check_features(op, features)
    check_shape(op, "samples", samples, ("S", "C", width + 1))
    check_not_empty(op, "samples", "sample", samples.shape[0])
    check_not_empty(op, "samples", "class or output", samples.shape[1])
    if kind == "binary":
        check_shape(op, "targets", targets, (batch, samples.shape[1]))
        _check_kinds(op, features=features, samples=samples, targets=targets)
    else:
        check_shape(op, "targets", targets, (batch,))
        check_class_targets(op, targets)
        _check_kinds(op, targets, features=features, samples=samples)


_sampled = _declare(
    "sampled_moments(Tensor features, Tensor targets, Tensor samples, str kind)",
    _check_sampled,
    run_sampled,
    lambda features, targets, samples, kind: reference.sampled_moments(features, targets, samples, kind=kind),
    tasks=lambda targets, samples, kind: samples.shape[1] if kind == "binary" else 1,
    impossible="samples: expected gradients within range, found one whose variance overflows",
)


# ---- aggregation -----------------------------------------------------------------------------------------------------


def power_tensor(op: str, power: float | Sequence[float] | Tensor, tasks: int, device: torch.device) -> Tensor:
    """Return one exponent per task, float64 [T]."""
    if isinstance(power, Tensor):
        return power.to(device, torch.float64).expand(tasks) if power.dim() == 0 else power.to(device, torch.float64)
    values = [float(power)] * tasks if isinstance(power, (int, float)) else [float(p) for p in power]
    if len(values) != tasks:
        raise ValueError(f"{op}: power: expected one number or one per task ({tasks}), found {len(values)}")
    if not all(0 <= p < float("inf") for p in values):
        raise ValueError(f"{op}: power: expected finite numbers of at least 0, found {values}")
    return torch.tensor(values, dtype=torch.float64, device=device)


def precision_mean(means: Tensor, variances: Tensor, power: float | Sequence[float] | Tensor = 1.0) -> Tensor:
    """Return the mean of the tasks' gradients by inverse variance, dimension by dimension, over the batch size:
    sum_t lambda_t E_t / sum_t lambda_t / B with lambda_t = max(Var_t, 1e-8)^-power_t.

    Args:
        means: [B, T, D].
        variances: [B, T, D]; infinite where there is no label. Where no task has one the result is 0.
        power: one number or one per task, at least 0; 0 is the plain mean.

    Returns:
        [B, D]. NaN where all weights leave the range of the dtype (in float32: a sum under 2^-100).

    Source: arXiv 2402.04005, equation 6 (power 1), and the published code (other powers); DESIGN 4.3.
    """
    tasks = means.shape[1] if means.dim() == 3 else 1  # another shape is the operation's to refuse
    result: Tensor = _precision_mean(means, variances, power_tensor("precision_mean", power, tasks, means.device))
    return result


def _check_precision_mean(means: Tensor, variances: Tensor, power: Tensor) -> None:
    op = "precision_mean"
    check_shape(op, "means", means, ("B", "T", "D"))
    check_not_empty(op, "means", "example", means.shape[0])
    check_not_empty(op, "means", "task", means.shape[1])
    check_shape(op, "variances", variances, tuple(means.shape))
    check_shape(op, "power", power, (means.shape[1],))
    check_floating(op, means=means, variances=variances)
    check_same_device(op, "means", means=means, variances=variances, power=power)


def _precision_mean_kernel(
    kernels: ModuleType, means: Tensor, variances: Tensor, power: Tensor, out: list[Tensor]
) -> None:
    means, variances = (t.contiguous() for t in _widened(means, variances))
    power = power.to(torch.float64).contiguous()
    addresses = (means.data_ptr(), variances.data_ptr(), power.data_ptr(), out[0].data_ptr())
    kernels.precision_mean(DTYPE_CODES[means.dtype], *addresses, *means.shape, launch_place(means.device))


_precision_mean = Operation(
    "precision_mean(Tensor means, Tensor variances, Tensor power) -> Tensor",
    check=_check_precision_mean,
    outputs=lambda means, variances, power: [
        means.new_empty((means.shape[0], means.shape[2]), dtype=_compute_dtype(means, variances))
    ],
    kernel=_precision_mean_kernel,
    reference=lambda means, variances, power: reference.precision_mean(*_widened(means, variances), power),
    differentiable=True,
)


def run_weighted_mean(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return numerator / denominator / B, zero where the denominator is: the end of what `run_*` accumulate."""
    out = torch.empty_like(numerator)
    addresses = (numerator.data_ptr(), denominator.data_ptr(), out.data_ptr())
    _kernels(out).weighted_mean(DTYPE_CODES[out.dtype], *addresses, *out.shape, launch_place(out.device))
    return out


def condition_on_batch(cross: Tensor, gram: Tensor, curvature: Tensor, variances: Tensor) -> bool:
    """Turn cross covariances [R, B, W] and variances [R, W] of the prior into the batch posterior's, in place.

    On the host, contiguous, with curvatures above zero (see :mod:`mtlgrad.bayesagg.conditioning`). Returns False if a
    pivot is not positive: then both are spoilt.
    """
    ok: bool = _C.condition_on_batch(
        DTYPE_CODES[cross.dtype],
        cross.data_ptr(),
        gram.data_ptr(),
        curvature.data_ptr(),
        variances.data_ptr(),
        *cross.shape,
        launch_place(cross.device),
    )
    return ok
