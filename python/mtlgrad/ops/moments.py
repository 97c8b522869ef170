"""Means and variances of per-example gradients with respect to the shared features (BayesAgg-MTL, arXiv 2402.04005).

B examples, D features, P = D + 1 (a one is appended for the bias, last), O outputs, C classes, S samples, T tasks.

``*_moments`` take features [B, D] and targets: [B, O] with NaN where there is no label, or classes [B] int64, -100
likewise. They return (mean, variance) of the gradient of the *per-example* loss, [B, T, D] each, an output or a set of
classes being a task. Without a label the mean is 0, the variance infinite, and the weight in :func:`precision_mean` 0:
that takes the batch mean, once. Results are float32 unless a float64 tensor is given; float16 and bfloat16 are
converted on the way in. Derivatives are those of :mod:`mtlgrad.reference`: the same functions, with the equations.

Errors: ``RuntimeError`` for shapes, dtypes and devices, ``ValueError`` for options; on the CPU also ``ValueError`` for
values: NaN or infinite arguments, class indices out of range, covariances that are not positive semi-definite. On CUDA
values are not read back: such an argument gives NaN.

Each operation is GEMMs by torch, which make a :class:`BatchPosterior`, then a kernel, called by a function ``run_*``.
:class:`mtlgrad.BayesAgg` calls these itself, with batch posteriors whose covariance was never formed, and has them
accumulate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..reference.moments import IGNORE, Covariance
from ..reference.quadrature import NUM_POINTS, gauss_hermite, sobol_normal
from ._native import _C, KERNELS, launch_place
from ._operation import Operation
from .checks import check_class_range, check_finite, check_tensors, refuse, shape_of
from .rows import DTYPE_CODES

__all__ = ["binary_moments", "multiclass_moments", "precision_mean", "regression_moments", "sampled_moments"]

Moments = tuple[Tensor, Tensor]

STRUCTURES = ("full", "block", "kron")  #: of multiclass posteriors, as csrc/kernels.h numbers them
KINDS = ("binary", "multiclass")  #: of samples, likewise
SMALL = 256  # weights of an output; for more, on the host too, a library's GEMM and Cholesky are quicker
WORKSPACE_BYTES = 32 << 20  # of multiclass_moments on a device: enough examples in flight to fill it


# ---- what the operations share ---------------------------------------------------------------------------------------


class Output(NamedTuple):
    """Where a kernel leaves the moments of T tasks; see ``Output`` in csrc/kernels.h."""

    first: Tensor  #: mean [B, T, D], or numerator [B, D]
    second: Tensor  #: variance [B, T, D], or denominator [B, D]
    power: Tensor | None = None  #: [T] float64: numerator += scale lambda mean, denominator += lambda = variance^-power
    scale: Tensor | None = None  #: [T] float64, with the power

    def of(self, tasks: slice) -> Output:
        """Return the sums with the powers and scales of some of the tasks."""
        assert self.power is not None
        assert self.scale is not None
        return Output(self.first, self.second, self.power[tasks], self.scale[tasks])

    @staticmethod
    def new(features: Tensor, tasks: int, dtype: torch.dtype | None = None) -> Output:
        shape = (features.shape[0], tasks, features.shape[1])
        return Output(features.new_empty(shape, dtype=dtype), features.new_empty(shape, dtype=dtype))


class BatchPosterior(NamedTuple):
    """A posterior at the examples of a batch, in the shapes of csrc/kernels.h."""

    structure: str  #: "rows" (regression and binary: outputs apart), or one of STRUCTURES
    mean: Tensor
    cross_covariance: Tensor  #: of each weight with each example's logit
    variances: Tensor  #: (co)variances at each dimension
    classes: Tensor | None = None  #: [C, C], the class factor of a Kronecker covariance

    def each(self, change: Callable[[Tensor], Tensor]) -> BatchPosterior:
        return BatchPosterior(self.structure, *(None if t is None else change(t) for t in self[1:]))  # type: ignore[arg-type]

    @property
    def given(self) -> tuple[Any, ...]:
        """The tensors, contiguous, and sizes as ``OutputsPosterior`` or ``MulticlassPosterior`` of csrc/kernels.h."""
        if self.structure != "rows":
            return STRUCTURES.index(self.structure), *self[1:], self.mean.shape[0]
        strides = [0 if t.shape[0] == 1 else t.stride(0) for t in (self.cross_covariance, self.variances)]
        return *self[1:4], *strides, *self.mean.shape

    @property
    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """The mean, cross covariances and variances, those of classes as of structure "full"."""
        cross, variances = self.cross_covariance, self.variances
        if self.structure == "block":
            cross = torch.diag_embed(cross.movedim(0, -1), dim1=0, dim2=2)
            variances = torch.diag_embed(variances.T, dim1=0, dim2=1)
        elif self.structure == "kron":
            cross = torch.einsum("ck,bd->kbcd", self.classes, cross)
            variances = torch.einsum("ck,d->ckd", self.classes, variances)
        return self.mean, cross, variances


def has_kernels(device: torch.device) -> bool:
    return KERNELS.get(device.type) is not None


def _launch(name: str, like: Tensor, *arguments: Any) -> Any:
    """Call a kernel for the dtype and device of ``like``; tensors, contiguous, go as addresses, None as 0."""

    def wire(argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return argument.data_ptr()
        if isinstance(argument, tuple):
            return tuple(map(wire, argument))
        return 0 if argument is None else argument

    kernels = KERNELS.get(like.device.type)
    assert kernels is not None, f"no kernels for {like.device}"
    return getattr(kernels, name)(DTYPE_CODES[like.dtype], *map(wire, arguments), launch_place(like.device))


def _or_reference(refer: Callable[..., Moments], run: Callable[..., None]) -> Callable[..., None]:
    """Return ``run(features, targets, at, out, ...)``, which leaves the moments in ``out``, or, where no kernel was
    compiled for the device, does it with ``refer(features, targets, *at, ...)``."""

    def either(features: Tensor, targets: Tensor, at: Any, out: Output, *others: Any) -> None:
        if has_kernels(features.device):
            return run(features, targets, at, out, *others)
        mean, variance = refer(features, targets, *(at.dense if isinstance(at, BatchPosterior) else [at]), *others)
        if out.power is None:
            out.first.copy_(mean)
            out.second.copy_(variance)
        else:
            weight = variance.clamp(min=reference.moments.SMALLEST_VARIANCE) ** -out.power.to(variance)[:, None]
            weight = torch.where(variance < torch.inf, weight, 0.0)
            assert out.scale is not None
            out.first.add_((weight * mean * out.scale.to(mean)[:, None]).sum(1))
            out.second.add_(weight.sum(1))

    return either


def _run(name: str, features: Tensor, targets: Tensor, at: BatchPosterior, out: Output, *others: Any) -> None:
    """Call a kernel of moments; ``others`` are what it alone takes."""
    if features.numel() and not (features.stride(1) == 1 and features.stride(0) >= features.shape[1]):
        features = features.contiguous()  # else the rows are dense, however far apart
    rows, at = (features, features.stride(0), *features.shape), at.each(Tensor.contiguous)
    _launch(name, features, rows, targets.contiguous(), at.given, *others, tuple(out))


def _compute_dtype(*tensors: Any) -> torch.dtype:
    """Return float64 if any tensor is, else float32: half precision is storage only."""
    wide = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def _widened(*arguments: Any) -> list[Any]:
    """Return the arguments, those that are floating tensors in one dtype."""
    dtype = _compute_dtype(*arguments)
    return [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


def _declare(
    schema: str,
    check: Callable[..., None],
    at: Callable[..., Any],
    run: Callable[..., None],
    refer: Callable[..., Any],
    impossible: str = "covariance: expected a symmetric positive semi-definite matrix (and moments within range), "
    "found an impossible or overflowing variance",
) -> Operation:
    """Declare an operation of features, targets, more tensors and options: ``run`` gets features, targets,
    ``at(features, *more)``, an :class:`Output` and the options; ``refer`` the tensors, and the options by name."""
    op, _, listed = schema.rstrip(")").partition("(")
    names, count = [text.split()[1] for text in listed.split(", ")], listed.count("Tensor")

    def outputs(features: Tensor, targets: Tensor, *others: Any) -> list[Tensor]:
        tasks = targets.shape[1] if targets.dim() == 2 else 1
        return list(Output.new(features, tasks, _compute_dtype(features, targets, *others))[:2])

    def kernel(_: ModuleType, *arguments: Any) -> None:
        (features, targets, *more), options, out = _widened(*arguments[:count]), arguments[count:-1], arguments[-1]
        host, variance = features.device.type == "cpu", out[1]
        if host:  # where values can be looked at without waiting
            if not targets.is_floating_point():
                check_class_range(op, targets, more[0].shape[-2], IGNORE)  # of mean [C, P] or samples [S, C, P]
            check_finite(op, features=features)
        run(features, targets, at(features, *more), Output(*out), *options)
        if host and bool((variance.min() if variance.numel() else variance.sum()).isnan()):
            check_finite(op, **{name: tensor for name, tensor in zip(names[2:], more) if tensor is not None})
            place = torch.nonzero(variance.isnan())[0].tolist()
            raise ValueError(f"{op}: {impossible} at [example, task, dimension] {place}")

    def in_torch(*arguments: Any) -> Moments:
        return refer(*_widened(*arguments[:count]), **dict(zip(names[count:], arguments[count:])))

    schema += " -> (Tensor, Tensor)"
    return Operation(schema, check=check, outputs=outputs, kernel=kernel, reference=in_torch, differentiable=True)


# ---- regression ------------------------------------------------------------------------------------------------------


def regression_moments(features: Tensor, targets: Tensor, mean: Tensor, covariance: Tensor) -> Moments:
    """Find the moments of the gradient of (w.h - y)^2 for w ~ N(mean, covariance), in closed form.

    Args:
        features, targets: [B, D] and [B, O], NaN where there is no label.
        mean: [O, D], or [O, P] of heads with a bias, last.
        covariance: [D, D], shared by the outputs, or [O, D, D]; or P for D likewise; symmetric.

    Returns:
        Mean and variance, [B, O, D] each, float32, or float64 where a tensor is; without a label 0 and infinity.

    Raises:
        RuntimeError: shapes, dtypes, devices.
        ValueError: on the CPU: values that are not finite, a covariance that is not positive semi-definite.

    Source: arXiv 2402.04005, section 4 (Isserlis' theorem); DESIGN 4.1.
    """
    return _regression(features, targets, mean, covariance)


def regression_posterior(features: Tensor, mean: Tensor, covariance: Tensor) -> BatchPosterior:
    """Return cross covariance S h, [1 or O, B, D], and variances, [1 or O, D]; or P for D, of S h~."""
    covariance = covariance if covariance.dim() == 3 else covariance[None]
    if covariance.shape[-1] > features.shape[1]:
        return binary_posterior(features, mean, covariance)
    cross = torch.matmul(features, covariance.mT)
    return BatchPosterior("rows", mean, cross, covariance.diagonal(dim1=-2, dim2=-1))


run_regression = _or_reference(reference.moments.regression_at, partial(_run, "regression_moments"))


def _check_regression(features: Tensor, targets: Tensor, mean: Tensor, covariance: Tensor) -> None:
    size = "P" if mean.dim() == 2 and mean.shape[1] == features.shape[-1] + 1 else "D"
    first = {"features": (features, "B! D"), "mean": (mean, f"O {size}"), "targets": (targets, "B O")}
    shape = f"O {size} {size}" if covariance.dim() == 3 else f"{size} {size}"
    check_tensors("regression_moments", {}, **first, covariance=(covariance, shape))


_regression = _declare(
    "regression_moments(Tensor features, Tensor targets, Tensor mean, Tensor covariance)",
    *(_check_regression, regression_posterior, run_regression, reference.regression_moments),
)


# ---- binary ----------------------------------------------------------------------------------------------------------


def binary_moments(features: Tensor, targets: Tensor, mean: Tensor, covariance: Tensor, *, nodes: int = 32) -> Moments:
    """Find the moments of the gradient of binary cross entropy with logit w.h + b, (w, b) ~ N(mean, covariance).

    No weight is sampled: the logit's Gaussian is integrated by Gauss-Hermite quadrature.

    Args:
        features, targets: [B, D] and [B, O] of 0, 1 or between, NaN where there is no label.
        mean: [O, P], bias last.
        covariance: [O, P, P], symmetric, or [O, P], the diagonals of diagonal matrices.
        nodes: of the quadrature, 3 to 512.

    Returns:
        Mean and variance, [B, O, D] each, as :func:`regression_moments`.

    Raises:
        RuntimeError, ValueError: as :func:`regression_moments`; ``RuntimeError`` for ``nodes`` out of range.

    Source: arXiv 2402.04005, section 4; the conditional form is DESIGN 4.1.
    """
    return _binary(features, targets, mean, covariance, nodes)


def binary_posterior(features: Tensor, mean: Tensor, covariance: Tensor) -> BatchPosterior:
    """Return cross covariance S h~, [O, B, P], and variances, [O, P]; covariance [O, P, P], or [O, P] if diagonal."""
    width = features.shape[1]
    if covariance.dim() == 2:
        bias = covariance[:, None, width:].expand(-1, len(features), 1)
        return BatchPosterior("rows", mean, torch.cat([features * covariance[:, None, :width], bias], -1), covariance)
    # The appended one of h~ picks the bias's column.
    hidden = features.expand(covariance.shape[0], -1, -1)
    cross = torch.baddbmm(covariance[:, None, :, width], hidden, covariance[:, :, :width].mT)
    return BatchPosterior("rows", mean, cross, covariance.diagonal(dim1=-2, dim2=-1))


@lru_cache(maxsize=64)
def _hermite_on(nodes: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    return [t.to(device, dtype) for t in gauss_hermite(nodes)]


def _run_binary(features: Tensor, targets: Tensor, at: BatchPosterior, out: Output, nodes: int = 32) -> None:
    rule = _hermite_on(nodes, features.device, features.dtype)
    _run("binary_moments", features, targets, at, out, *rule, nodes)


run_binary = _or_reference(reference.moments.binary_at, _run_binary)


def _check_binary(features: Tensor, targets: Tensor, mean: Tensor, covariance: Tensor, nodes: int) -> None:
    first = {"features": (features, "B! D"), "mean": (mean, "O P"), "targets": (targets, "B O")}
    shape = "O P P" if covariance.dim() == 3 else "O P"
    check_tensors("binary_moments", {}, **first, covariance=(covariance, shape))
    if not 3 <= nodes <= 512:
        refuse(f"binary_moments: nodes: expected 3 to 512, found {nodes}")


_binary = _declare(
    "binary_moments(Tensor features, Tensor targets, Tensor mean, Tensor covariance, int nodes)",
    *(_check_binary, binary_posterior, run_binary, reference.binary_moments),
)


# ---- multiclass ------------------------------------------------------------------------------------------------------


def multiclass_moments(
    features: Tensor,
    targets: Tensor,
    mean: Tensor,
    covariance: Covariance,
    *,
    num_points: int = NUM_POINTS,
    seed: int = 0,
) -> Moments:
    """Find the moments of the gradient of softmax cross entropy for weights (W, b) jointly Gaussian over C classes.

    The C logits are integrated over quasi-random points, not the C x P weights.

    Args:
        features, targets: [B, D] and [B] int64, -100 where there is no label.
        mean: [C, P], bias last.
        covariance: [C*P, C*P], class-major, symmetric; or, for posteriors of less structure, [C, P, P] (one block per
            class), [C, P] (diagonal), or a pair ([C, C], [P, P]) (their Kronecker product).
        num_points, seed: scrambled Sobol points, and of the scrambling.

    Returns:
        Mean and variance, [B, 1, D] each, as :func:`regression_moments`.

    Raises:
        RuntimeError: shapes, dtypes, devices; ``num_points`` below 1.
        ValueError: as :func:`regression_moments`; on the CPU: classes out of range.

    Source: arXiv 2402.04005, section 4; the conditional form is DESIGN 4.1.
    """
    classes = None
    if isinstance(covariance, tuple):
        if len(covariance) != 2:
            found = len(covariance)
            raise ValueError(f"multiclass_moments: covariance: expected a tensor or a pair of tensors, found {found}")
        classes, covariance = covariance
    return _multiclass(features, targets, mean, covariance, classes, num_points, seed)


def multiclass_posterior(
    features: Tensor, mean: Tensor, covariance: Tensor, class_covariance: Tensor | None
) -> BatchPosterior:
    classes, size = mean.shape
    if class_covariance is not None:
        _, _, cross, variances, _ = binary_posterior(features, mean, covariance[None])
        return BatchPosterior("kron", mean, cross[0], variances[0], class_covariance)
    if covariance.dim() == 3 or covariance.shape[0] == classes:
        return binary_posterior(features, mean, covariance)._replace(structure="block")
    # Block k of rows, by symmetry the columns of class k: [P, C*P] for each k.
    rows = covariance.view(classes, size, -1)
    cross = torch.baddbmm(rows[:, size - 1 :], features.expand(classes, -1, -1), rows[:, : size - 1])
    return BatchPosterior("full", mean, cross.unflatten(2, (classes, size)), class_variances(covariance, classes))


def class_variances(covariance: Tensor, classes: int) -> Tensor:
    """Return the covariances between classes at each dimension, [C, C, P], of a [C*P, C*P] covariance."""
    size = covariance.shape[0] // classes
    return covariance.view(classes, size, classes, size).diagonal(dim1=1, dim2=3)


@lru_cache(maxsize=64)
def _sobol_on(num_points: int, dimension: int, seed: int, device: torch.device) -> Tensor:
    return sobol_normal(num_points, dimension, seed).to(device)


def _run_multiclass(
    features: Tensor, targets: Tensor, at: BatchPosterior, out: Output, num_points: int = NUM_POINTS, seed: int = 0
) -> None:
    classes, device = at.mean.shape[0], features.device
    slot, slots = _C.multiclass_workspace(STRUCTURES.index(at.structure), classes, num_points), launch_place(device)[0]
    if device.type == "cuda":
        slots = min(len(features), max(1, WORKSPACE_BYTES // (8 * slot)))
    workspace = torch.empty(slots * slot, dtype=torch.float64, device=device)
    points = _sobol_on(num_points, classes, seed, device)
    _run("multiclass_moments", features, targets, at, out, points, num_points, workspace, slots)


run_multiclass = _or_reference(reference.moments.multiclass_at, _run_multiclass)


def _check_multiclass(
    features: Tensor, targets: Tensor, mean: Tensor, covariance: Tensor, classes: Tensor | None, points: int, _: int
) -> None:
    op, sizes = "multiclass_moments", dict[str, int]()
    first = {"features": (features, "B! D"), "mean": (mean, "C! P")}
    check_tensors(op, sizes, **first, targets=(targets, "int64 B"))
    c, p = mean.shape
    shapes = {"N N": [c * p, c * p], "C P P": [c, p, p], "C P": [c, p]}
    fits = [form for form, shape in shapes.items() if shape == list(covariance.shape)]
    if classes is not None:
        more = {"covariance[0]": (classes, "C C"), "covariance[1]": (covariance, "P P")}
    elif fits:
        more = {"covariance": (covariance, fits[0])}
    else:
        full, block, diagonal = shapes.values()
        refuse(
            f"{op}: covariance: expected shape {full} (full, class-major), {block} (block), {diagonal} (diagonal) or a "
            f"pair ({[c, c]}, {[p, p]}) (Kronecker), found {shape_of(covariance)}"
        )
    check_tensors(op, sizes, **first, **more)
    if points < 1:
        refuse(f"{op}: num_points: expected at least 1, found {points}")


_multiclass = _declare(
    "multiclass_moments(Tensor features, Tensor targets, Tensor mean, Tensor covariance, Tensor? class_covariance, "
    "int num_points, int seed)",
    *(_check_multiclass, multiclass_posterior, run_multiclass),
    lambda features, targets, mean, s, classes, **options: reference.multiclass_moments(
        features, targets, mean, s if classes is None else (classes, s), **options
    ),
)


# ---- samples ---------------------------------------------------------------------------------------------------------


def sampled_moments(features: Tensor, targets: Tensor, samples: Tensor, *, kind: str) -> Moments:
    """Find the moments over weight samples, the published estimator.

    One pass over the samples, both moments in registers, deviations from the first sample's gradient summed, so that
    tight posteriors do not cancel; the [S, B, D] tensor of gradients never exists. The variance is that of the S
    samples (divided by S, as published).

    Args:
        features: [B, D].
        targets: binary [B, C], 0, 1 or between, NaN where there is no label; multiclass [B] int64, -100 likewise.
        samples: [S, C, P], bias last.
        kind: "binary" (C tasks) or "multiclass" (one task).

    Returns:
        Mean and variance, [B, C, D] each (binary) or [B, 1, D] each, as :func:`regression_moments`.

    Raises:
        RuntimeError: shapes, dtypes, devices.
        ValueError: another ``kind``; on the CPU: values that are not finite, classes out of range.

    Source: arXiv 2402.04005, section 4 (Monte Carlo moments).
    """
    if kind not in KINDS:
        raise ValueError(f'sampled_moments: kind: expected "binary" or "multiclass", found {kind!r}')
    return _sampled(features, targets, samples, kind)


def _run_sampled(features: Tensor, targets: Tensor, samples: Tensor, out: Output, kind: str) -> None:
    targets, samples = targets.contiguous(), samples.contiguous()
    (num_samples, classes, _), (batch, width) = samples.shape, features.shape
    if kind == "multiclass":  # [B, S, C]
        weights = samples.view(num_samples * classes, width + 1)
        logits = torch.addmm(weights[:, width], features, weights[:, :width].T)
    else:  # [C, B, S]
        by_class = samples.permute(1, 2, 0)
        logits = torch.baddbmm(by_class[:, width, None], features.expand(classes, -1, -1), by_class[:, :width])
    likelihood, sizes = KINDS.index(kind), (batch, num_samples, classes)
    _launch("sample_residuals", features, likelihood, logits, targets, *sizes)
    _launch("sampled_moments", features, likelihood, logits, samples, *sizes, width, tuple(out))


def _refer_sampled(features: Tensor, targets: Tensor, samples: Tensor, kind: str) -> Moments:
    return reference.sampled_moments(features, targets, samples, kind=kind)


run_sampled = _or_reference(_refer_sampled, _run_sampled)


def _check_sampled(features: Tensor, targets: Tensor, samples: Tensor, kind: str) -> None:
    first = {"features": (features, "B! D"), "samples": (samples, "S! C! P")}
    check_tensors("sampled_moments", {}, **first, targets=(targets, "B C" if kind == "binary" else "int64 B"))


_sampled = _declare(
    "sampled_moments(Tensor features, Tensor targets, Tensor samples, str kind)",
    *(_check_sampled, lambda features, samples: samples, run_sampled, reference.sampled_moments),
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
    """Average the tasks' gradients by inverse variance, dimension by dimension, over the batch size:
    sum_t lambda_t E_t / sum_t lambda_t / B with lambda_t = max(Var_t, 1e-8)^-power_t.

    Args:
        means, variances: [B, T, D] each; variances infinite where there is no label.
        power: one number or one per task, at least 0; 0 is the plain mean.

    Returns:
        [B, D]; 0 where no task has a label, and NaN where all weights leave the range of the dtype (in float32: a sum
        under 2^-100).

    Raises:
        RuntimeError: shapes, dtypes, devices.
        ValueError: a number or sequence ``power`` of another length, below 0 or not finite.

    Source: arXiv 2402.04005, equation 6 (power 1), and the published code (other powers); DESIGN 4.3.
    """
    tasks = means.shape[1] if means.dim() == 3 else 1  # another shape is the operation's to refuse
    return _precision_mean(means, variances, power_tensor("precision_mean", power, tasks, means.device))


def _precision_mean_kernel(_: ModuleType, means: Tensor, variances: Tensor, power: Tensor, out: list[Tensor]) -> None:
    given = [t.contiguous() for t in (*_widened(means, variances), power.to(torch.float64))]
    _launch("precision_mean", given[0], *given, *out, *means.shape)


_precision_mean = Operation(
    "precision_mean(Tensor means, Tensor variances, Tensor power) -> Tensor",
    check=lambda means, variances, power: check_tensors(
        "precision_mean", {}, means=(means, "B! T! D"), variances=(variances, "B T D"), power=(power, "T")
    ),
    outputs=lambda means, variances, power: [
        means.new_empty((means.shape[0], means.shape[2]), dtype=_compute_dtype(means, variances))
    ],
    kernel=_precision_mean_kernel,
    reference=lambda means, variances, power: reference.precision_mean(*_widened(means, variances), power),  # type: ignore[call-arg]
    differentiable=True,
)


#: numerator / denominator / B, zero where the denominator is: the end of what `run_*` accumulate.
run_weighted_mean = Operation(
    "weighted_mean(Tensor numerator, Tensor denominator) -> Tensor",
    check=lambda numerator, denominator: None,
    outputs=lambda numerator, denominator: [torch.empty_like(numerator)],
    kernel=lambda _, *sums: _launch("weighted_mean", sums[0], *sums[:2], *sums[2], *sums[0].shape),
    reference=lambda numerator, denominator: (
        torch.where(denominator == 0.0, 0.0, numerator / denominator) / len(numerator)
    ),
)


def condition_on_batch(cross: Tensor, gram: Tensor, curvature: Tensor, variances: Tensor) -> bool:
    """Turn cross covariances [R, B, W] and variances [R, W] of the prior into the batch posterior's, in place.

    On the host, contiguous, with curvatures above zero (see :mod:`mtlgrad.bayesagg.aggregation`). Returns False if a
    pivot is not positive: then both are spoilt.
    """
    addresses = [t.data_ptr() for t in (cross, gram, curvature, variances)]
    return _C.condition_on_batch(DTYPE_CODES[cross.dtype], *addresses, *cross.shape, launch_place(cross.device))


def invert_at(prior: Tensor, curvature: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the cross covariances H S, [R, B, W], and variances diag S, [R, W], for S the inverses of precisions, the
    sums of ``prior`` and ``curvature``, [R or 1, W, W] float64 each, in the dtype of ``hidden`` [B, W].

    None where a library's Cholesky does it better: on a device, for many weights, and where a pivot is not positive.
    """
    counts, (batch, width) = (prior.shape[0], curvature.shape[0]), hidden.shape
    if hidden.device.type != "cpu" or width > SMALL:
        return None
    rows, strides = max(counts), [0 if count == 1 else width * width for count in counts]
    given = [t.contiguous() for t in (prior, curvature, hidden)]
    found = hidden.new_empty(rows, batch, width), hidden.new_empty(rows, width)
    addresses = [t.data_ptr() for t in (*given, *found)]
    code, place = DTYPE_CODES[hidden.dtype], launch_place(hidden.device)
    return found if _C.condition_by_precision(code, *addresses, *strides, rows, batch, width, place) else None


def add_curvature(sums: Tensor, hidden: Tensor, curvature: Tensor | None) -> None:
    """Add H' diag(q_r) H to each of ``sums`` [R, W, W], in place, for curvatures q [R or 1, B] (None: one) and hidden
    [B, W]."""
    rows, width, _ = sums.shape
    curvature = None if curvature is None else curvature.expand(rows, -1).contiguous()
    if sums.device.type == "cpu" and sums.dtype == torch.float64 and width <= SMALL and sums.is_contiguous():
        hidden = hidden.contiguous()
        q = 0 if curvature is None else curvature.data_ptr()
        _C.add_curvature(hidden.data_ptr(), q, sums.data_ptr(), rows, hidden.shape[0], width, launch_place(sums.device))
        return
    for r, block in enumerate(sums):
        block.addmm_((hidden if curvature is None else hidden * curvature[r, :, None]).T, hidden)
