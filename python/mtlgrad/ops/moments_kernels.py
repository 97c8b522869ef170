"""The `moments` kernels on tensors that are already checked and of one dtype: posterior quantities in, moments out.

The ``*_cross`` functions are the GEMMs, which torch does well: covariances between each weight and each example's
logit. What is left, and what the kernels fuse, needs no covariance matrix: the cross covariance, the diagonal
(``spread``) and the mean. ``run_*`` call a kernel, which writes moments or folds them (see ``Sink``).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..reference.moments import Covariance
from ..reference.quadrature import gauss_hermite, sobol_normal
from ._kernels import DTYPE_CODES, Sink, compiled_for, dense_rows, place
from ._native import _C

STRUCTURE_CODES = {"full": 0, "block": 1, "kron": 2}
WORKSPACE_BYTES = 32 << 20  # of multiclass_moments on a device: enough examples in flight to fill it


@lru_cache(maxsize=64)
def _hermite_on(nodes: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    u, weight = gauss_hermite(nodes)
    return u.to(device, dtype), weight.to(device, dtype)


@lru_cache(maxsize=64)
def _sobol_on(num_points: int, dimension: int, seed: int, device: torch.device) -> Tensor:
    return sobol_normal(num_points, dimension, seed).to(device)


# ---- cross covariances -----------------------------------------------------------------------------------------------


def regression_cross(features: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """S h, [1 or O, B, D], and the diagonals, [1 or O, D]."""
    covariance = covariance if covariance.dim() == 3 else covariance[None]
    cross = torch.matmul(features, covariance.mT)
    return cross, covariance.diagonal(dim1=-2, dim2=-1).contiguous()


def binary_cross(features: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """S h~, [O, B, P], and the diagonals, [O, P]; covariance [O, P, P], or [O, P] if diagonal."""
    width = features.shape[1]
    if covariance.dim() == 2:
        cross = torch.cat(
            [features * covariance[:, None, :width], covariance[:, None, width:].expand(-1, len(features), 1)], -1
        )
        return cross, covariance.contiguous()
    # The appended one of h~ picks the bias's column.
    hidden = features.expand(covariance.shape[0], -1, -1)
    cross = torch.baddbmm(covariance[:, None, :, width], hidden, covariance[:, :, :width].mT)
    return cross, covariance.diagonal(dim1=-2, dim2=-1).contiguous()


def multiclass_cross(features: Tensor, covariance: Covariance, classes: int) -> tuple[str, Tensor]:
    """The structure's name and its cross covariance: see ``MulticlassPosterior`` in csrc/kernels.h."""
    if isinstance(covariance, tuple):
        return "kron", binary_cross(features, covariance[1][None])[0][0]
    if covariance.dim() == 3 or covariance.shape[0] == classes:
        return "block", binary_cross(features, covariance)[0]
    width = features.shape[1]
    # Block k of rows, by symmetry the columns of class k: [P, C*P] for each k.
    rows = covariance.view(classes, width + 1, -1)
    hidden = features.expand(classes, -1, -1)
    return "full", torch.baddbmm(rows[:, width:], hidden, rows[:, :width])


def class_spread(covariance: Covariance, classes: int) -> tuple[Tensor, Tensor | None]:
    """The (co)variances at each dimension, and the class factor of a Kronecker covariance."""
    if isinstance(covariance, tuple):
        return covariance[1].diagonal().contiguous(), covariance[0].contiguous()
    if covariance.dim() == 3:
        return covariance.diagonal(dim1=-2, dim2=-1).contiguous(), None
    if covariance.shape[0] == classes:
        return covariance.contiguous(), None
    size = covariance.shape[0] // classes
    blocks = covariance.view(classes, size, classes, size)
    return blocks.diagonal(dim1=1, dim2=3).contiguous(), None


# ---- kernels ---------------------------------------------------------------------------------------------------------


def _feature_arguments(features: Tensor) -> tuple[int, int, int, int, int]:
    return DTYPE_CODES[features.dtype], features.data_ptr(), features.stride(0), features.shape[0], features.shape[1]


def run_regression(features: Tensor, targets: Tensor, mean: Tensor, cross: Tensor, spread: Tensor, sink: Sink) -> None:
    features, targets, mean, cross = dense_rows(features), targets.contiguous(), mean.contiguous(), cross.contiguous()
    spread = spread.contiguous()
    compiled_for(features.device).regression_moments(
        *_feature_arguments(features),
        targets.data_ptr(),
        mean.data_ptr(),
        cross.data_ptr(),
        0 if cross.shape[0] == 1 else cross.stride(0),
        spread.data_ptr(),
        0 if spread.shape[0] == 1 else spread.stride(0),
        mean.shape[0],
        *sink.arguments(),
        *place(features.device),
    )


def run_binary(
    features: Tensor, targets: Tensor, mean: Tensor, cross: Tensor, spread: Tensor, sink: Sink, nodes: int = 32
) -> None:
    features, targets, mean, cross = dense_rows(features), targets.contiguous(), mean.contiguous(), cross.contiguous()
    spread = spread.contiguous()
    u, weight = _hermite_on(nodes, features.device, features.dtype)
    compiled_for(features.device).binary_moments(
        *_feature_arguments(features),
        targets.data_ptr(),
        mean.data_ptr(),
        cross.data_ptr(),
        spread.data_ptr(),
        u.data_ptr(),
        weight.data_ptr(),
        nodes,
        mean.shape[0],
        *sink.arguments(),
        *place(features.device),
    )


def run_multiclass(
    features: Tensor,
    targets: Tensor,
    mean: Tensor,
    structure: str,
    cross: Tensor,
    spread: Tensor,
    class_factor: Tensor | None,
    sink: Sink,
    num_points: int = 256,
    seed: int = 0,
) -> None:
    features, targets, mean, cross = dense_rows(features), targets.contiguous(), mean.contiguous(), cross.contiguous()
    spread = spread.contiguous()
    classes, code = mean.shape[0], STRUCTURE_CODES[structure]
    points = _sobol_on(num_points, classes, seed, features.device)
    where = place(features.device)
    slot = _C.multiclass_workspace(code, classes, num_points)
    slots = where[0]
    if features.device.type == "cuda":
        slots = min(features.shape[0], max(1, WORKSPACE_BYTES // (8 * slot)))
    workspace = torch.empty(slots * slot, dtype=torch.float64, device=features.device)
    compiled_for(features.device).multiclass_moments(
        *_feature_arguments(features),
        targets.data_ptr(),
        code,
        mean.data_ptr(),
        cross.data_ptr(),
        spread.data_ptr(),
        0 if class_factor is None else class_factor.data_ptr(),
        classes,
        points.data_ptr(),
        num_points,
        workspace.data_ptr(),
        slots,
        *sink.arguments(),
        *where,
    )


def run_sampled(features: Tensor, targets: Tensor, samples: Tensor, kind: str, sink: Sink) -> None:
    targets, samples = targets.contiguous(), samples.contiguous()
    num_samples, classes, _ = samples.shape
    batch, width = features.shape
    multiclass = kind == "multiclass"
    if multiclass:  # [B, S, C]
        weights = samples.view(num_samples * classes, width + 1)
        logits = torch.addmm(weights[:, width], features, weights[:, :width].T)
    else:  # [C, B, S]
        by_class = samples.permute(1, 2, 0)
        logits = torch.baddbmm(by_class[:, width, None], features.expand(classes, -1, -1), by_class[:, :width])
    kernels, where, code = compiled_for(features.device), place(features.device), DTYPE_CODES[features.dtype]
    kernels.sample_residuals(
        code, multiclass, logits.data_ptr(), targets.data_ptr(), batch, num_samples, classes, *where
    )
    kernels.sampled_moments(
        code,
        multiclass,
        logits.data_ptr(),
        samples.data_ptr(),
        batch,
        num_samples,
        classes,
        width,
        *sink.arguments(),
        *where,
    )


def condition_on_batch(cross: Tensor, gram: Tensor, curvature: Tensor, spread: Tensor) -> bool:
    """In place, on the host, contiguous: cross [R, B, W] and spread [R, W] of the prior become the batch posterior's
    (see :mod:`mtlgrad.bayesagg.conditioning`), with curvatures above zero. False if a pivot is not positive: then both
    are spoilt."""
    ok: bool = _C.condition_on_batch(
        DTYPE_CODES[cross.dtype],
        cross.data_ptr(),
        gram.data_ptr(),
        curvature.data_ptr(),
        spread.data_ptr(),
        *cross.shape,
        torch.get_num_threads(),
    )
    return ok


def run_precision_mean(means: Tensor, variances: Tensor, power: Tensor, out: Tensor) -> None:
    compiled_for(means.device).precision_mean(
        DTYPE_CODES[means.dtype],
        means.data_ptr(),
        variances.data_ptr(),
        power.data_ptr(),
        out.data_ptr(),
        *means.shape,
        *place(means.device),
    )


def run_weighted_mean(numerator: Tensor, denominator: Tensor) -> Tensor:
    out = torch.empty_like(numerator)
    compiled_for(out.device).weighted_mean(
        DTYPE_CODES[out.dtype],
        numerator.data_ptr(),
        denominator.data_ptr(),
        out.data_ptr(),
        *out.shape,
        *place(out.device),
    )
    return out
