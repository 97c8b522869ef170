"""Means and variances of per-example gradients with respect to the shared features, given last-layer posteriors.

BayesAgg-MTL (Achituve et al., ICML 2024, arXiv 2402.04005). Written beside the equations, differentiable, for float32
and float64; :mod:`mtlgrad.ops` documents arguments and results, whose signatures are the same.

B examples, D features, P = D + 1 (a one is appended for the bias, last), O outputs, C classes, S samples, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .quadrature import NUM_POINTS, gauss_hermite, sobol_normal

IGNORE = -100  # class target without a label, as in torch.nn.functional.cross_entropy
SMALLEST_VARIANCE = 1e-8

# What multiclass_moments takes as covariance: [C*P, C*P], [C, P, P], [C, P], or the pair ([C, C], [P, P]).
Covariance = Tensor | tuple[Tensor, Tensor]


def _augment(features: Tensor) -> Tensor:
    return functional.pad(features, (0, 1), value=1.0)


def _without_label(mean: Tensor, variance: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
    """Where there is no label there is no gradient: mean 0, variance infinite, weight 0 in :func:`precision_mean`."""
    return mean.masked_fill(missing, 0.0), variance.masked_fill(missing, torch.inf)


def _dense(covariance: Tensor) -> Tensor:
    return torch.diag_embed(covariance) if covariance.dim() == 2 else covariance


def _cross(features: Tensor, covariance: Tensor) -> Tensor:
    """Return S h, [O or 1, B, W], of covariances [O, W, W] or [W, W]."""
    return torch.einsum("ode,be->obd", covariance if covariance.dim() == 3 else covariance[None], features)


def regression_moments(features: Tensor, targets: Tensor, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Find the moments by the equations of :func:`regression_at`.

    Args:
        features, targets, mean, covariance: as in :func:`mtlgrad.ops.regression_moments`.

    Returns:
        Mean and variance, [B, O, D] each.
    """
    hidden = features if mean.shape[1] == features.shape[1] else _augment(features)
    variances = covariance.diagonal(dim1=-2, dim2=-1)
    return regression_at(features, targets, mean, _cross(hidden, covariance), variances)


def regression_at(
    features: Tensor, targets: Tensor, mean: Tensor, cross: Tensor, variances: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss (w.h - y)^2, w ~ N(m, S); with c = S h, v = h.c, r = m.h - y::

    E[g_d] = 2 (m_d r + c_d)
    Var[g_d] = 4 (m_d^2 v + 2 m_d r c_d + S_dd r^2 + S_dd v + c_d^2)

    at the D features; with a bias, w~ and h~ for w and h. ``cross`` is S h, [O or 1, B, W], ``variances`` S_dd.
    """
    missing, width = targets.isnan(), features.shape[1]
    h, y, m = features, targets.masked_fill(missing, 0.0), mean
    if mean.shape[1] > width:
        h = _augment(h)
    c = cross.transpose(0, 1)
    v = torch.einsum("bod,bd->bo", c, h)[..., None]
    r = (torch.einsum("od,bd->bo", m, h) - y)[..., None]
    m, c, s_dd = m[:, :width], c[..., :width], variances[..., :width]
    expectation = 2 * (m * r + c)
    variance = 4 * (m**2 * v + 2 * m * r * c + s_dd * r**2 + s_dd * v + c**2)
    return _without_label(expectation, variance, missing[..., None])


def binary_moments(
    features: Tensor, targets: Tensor, mean: Tensor, covariance: Tensor, *, nodes: int = 32
) -> tuple[Tensor, Tensor]:
    """Find the moments by the equations of :func:`binary_at`.

    Args:
        features, targets, mean, covariance, nodes: as in :func:`mtlgrad.ops.binary_moments`.

    Returns:
        Mean and variance, [B, O, D] each.
    """
    covariance = _dense(covariance)
    variances = covariance.diagonal(dim1=-2, dim2=-1)
    return binary_at(features, targets, mean, _cross(_augment(features), covariance), variances, nodes)


def binary_at(
    features: Tensor, targets: Tensor, mean: Tensor, cross: Tensor, variances: Tensor, nodes: int = 32
) -> tuple[Tensor, Tensor]:
    """Binary cross entropy with logit z = w~.h~, w~ ~ N(m, S). z is Gaussian, and w given z is Gaussian::

    z = mu + sqrt(v) u,  w_d | u ~ N(m_d + k_d u, S_dd - k_d^2),  k = S h~ / sqrt(v)
    E[g_d] = m_d E[r] + k_d E[r u]
    Var[g_d] = m_d^2 Var[r] + 2 m_d k_d Cov[r, r u] + k_d^2 Var[r u] + E[r^2] (S_dd - k_d^2)

    with r(u) = sigmoid(z) - y and the expectations over u by Gauss-Hermite quadrature, centred before squaring.
    ``cross`` is S h~, [O, B, P], ``variances`` S_dd, [O, P].
    """
    missing = targets.isnan()
    h, y = _augment(features), targets.masked_fill(missing, 0.0)
    c = cross.transpose(0, 1)
    v = torch.einsum("bop,bp->bo", c, h)[..., None]
    none = v == 0  # no variance along h~: k = 0 too
    deviation = v.masked_fill(none, 1.0).sqrt()
    k = (c / deviation).masked_fill(none, 0.0)[..., :-1]
    mu = torch.einsum("op,bp->bo", mean, h)[..., None]

    u, weight = (x.to(h) for x in gauss_hermite(nodes))
    r = torch.sigmoid(mu + deviation.masked_fill(none, 0.0) * u) - y[..., None]

    def expect(x: Tensor) -> Tensor:
        return (weight * x).sum(-1, keepdim=True)

    r_centred, ru_centred = r - expect(r), r * u - expect(r * u)
    m, s_dd = mean[:, :-1], variances[:, :-1]
    expectation = m * expect(r) + k * expect(r * u)
    variance = (
        m**2 * expect(r_centred**2)
        + 2 * m * k * expect(r_centred * ru_centred)
        + k**2 * expect(ru_centred**2)
        + expect(r**2) * (s_dd - k**2)
    )
    return _without_label(expectation, variance, missing[..., None])


def dense_multiclass_covariance(covariance: Covariance, classes: int) -> Tensor:
    """Any of the structures as the full class-major [C*P, C*P] matrix."""
    if isinstance(covariance, tuple):
        return torch.kron(*covariance)
    if covariance.dim() == 3:
        return torch.block_diag(*covariance)
    if covariance.shape[0] == classes:
        return covariance.flatten().diag()
    return covariance


def _semidefinite_cholesky(v: Tensor) -> Tensor:
    """Lower factor of [B, C, C]; zero columns in directions without variance, NaN for a negative one."""
    tolerance = 1e-6 if v.dtype == torch.float32 else 1e-13
    columns: list[Tensor] = []
    for j in range(v.shape[-1]):
        rest = v[..., j]
        for column in columns:
            rest = rest - column * column[..., j, None]
        diagonal = v[..., j, j].abs()
        pivot = rest[..., j]
        none = (pivot.abs() <= tolerance * diagonal)[..., None]
        root = pivot[..., None].masked_fill(none, 1.0).sqrt()
        column = torch.where(none, 0.0, rest / root)
        columns.append(torch.cat([torch.zeros_like(column[..., :j]), column[..., j:]], -1))
    return torch.stack(columns, -1)


def multiclass_moments(
    features: Tensor,
    targets: Tensor,
    mean: Tensor,
    covariance: Covariance,
    *,
    num_points: int = NUM_POINTS,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Find the moments by the equations of :func:`multiclass_at`.

    Args:
        features, targets, mean, covariance, num_points, seed: as in :func:`mtlgrad.ops.multiclass_moments`.

    Returns:
        Mean and variance, [B, 1, D] each.
    """
    classes, augmented = mean.shape
    s = dense_multiclass_covariance(covariance, classes).reshape(classes, augmented, classes, augmented)
    cross = torch.einsum("cdke,be->kbcd", s, _augment(features))
    return multiclass_at(features, targets, mean, cross, s.diagonal(dim1=1, dim2=3), num_points, seed)


def multiclass_at(
    features: Tensor,
    targets: Tensor,
    mean: Tensor,
    cross: Tensor,
    variances: Tensor,
    num_points: int = NUM_POINTS,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Cross entropy over C classes, w~ [C, P] jointly Gaussian. The C logits are integrated over, not the weights::

    z = mu + L u,  L L' = V,  V_ck = h~.S_ck h~
    K_cd,k = (S_ck h~)_d,  k_cd = L^-1 K_cd,:
    g_d | u has mean sum_c r_c (m_cd + k_cd.u) and variance r' (S_d - k_d k_d') r

    with r = softmax(z) - onehot(y); the average over u is over scrambled Sobol points, centred before squaring.
    ``cross`` is K, [C(k), B, C, P], ``variances`` S_d, [C, C, P].
    """
    classes = len(mean)
    missing = targets == IGNORE
    h = _augment(features)
    cross = cross.permute(1, 2, 3, 0)
    factor = _semidefinite_cholesky(torch.einsum("bcdk,bd->bck", cross, h))
    # k = L^-1 K by forward substitution, skipping directions without variance
    k: list[Tensor] = []
    for j in range(classes):
        rest = cross[..., j]
        for i in range(j):
            rest = rest - factor[:, j, i, None, None] * k[i]
        pivot = factor[:, j, j, None, None]
        k.append(torch.where(pivot == 0, 0.0, rest / pivot.masked_fill(pivot == 0, 1.0)))
    k_cd = torch.stack(k, -1)[:, :, :-1]  # [B, C, D, C]

    u = sobol_normal(num_points, classes, seed).to(h)
    mu = h @ mean.T
    z = mu[:, None] + torch.einsum("bck,sk->bsc", factor, u)
    r = torch.softmax(z, -1) - _labels(targets, h, classes)[:, None]
    conditional = torch.einsum("bsc,cd->bsd", r, mean[:, :-1])
    for j in range(classes):
        conditional = conditional + torch.einsum("bsc,s,bcd->bsd", r, u[:, j], k_cd[..., j])
    s_d = variances[..., :-1]  # [C, C, D]
    residual = s_d - torch.einsum("bcdj,bkdj->bckd", k_cd, k_cd)
    products = torch.einsum("bsc,bsk->bck", r, r) / num_points
    expectation = conditional.mean(1, keepdim=True)
    variance = ((conditional - expectation) ** 2).mean(1, keepdim=True)
    variance = variance + torch.einsum("bck,bckd->bd", products, residual)[:, None]
    return _without_label(expectation, variance, missing[:, None, None])


def sampled_moments(features: Tensor, targets: Tensor, samples: Tensor, *, kind: str) -> tuple[Tensor, Tensor]:
    """Find the moments over S weight samples, the published estimator, of the gradient sum_c r_c w_cd (multiclass), or
    of r_c w_cd for every output (binary). Forms the [S, B, C, D] tensor that the kernels never hold.

    Args:
        features, targets, samples, kind: as in :func:`mtlgrad.ops.sampled_moments`.

    Returns:
        Mean and variance, [B, C, D] each (binary) or [B, 1, D] each.
    """
    h = _augment(features)
    z = torch.einsum("bp,scp->sbc", h, samples)
    if kind == "binary":
        missing = targets.isnan()
        r = torch.sigmoid(z) - targets.masked_fill(missing, 0.0)
        g = torch.einsum("sbc,scd->sbcd", r, samples[..., :-1])
    else:
        missing = (targets == IGNORE)[:, None]
        r = torch.softmax(z, -1) - _labels(targets, h, samples.shape[1])
        g = torch.einsum("sbc,scd->sbd", r, samples[..., :-1])[:, :, None]
    return _without_label(g.mean(0), ((g - g.mean(0)) ** 2).mean(0), missing[..., None])


def _labels(targets: Tensor, like: Tensor, classes: int) -> Tensor:
    """[B, C], one where the class is the target; where there is none: zeros."""
    return (targets[:, None] == torch.arange(classes, device=targets.device)).to(like)


def precision_mean(means: Tensor, variances: Tensor, power: float | Sequence[float] | Tensor = 1.0) -> Tensor:
    """Compute sum_t lambda_t E_t / sum_t lambda_t / B with lambda_t = max(Var_t, 1e-8)^-power_t (DESIGN 4.3).

    Args:
        means, variances, power: as in :func:`mtlgrad.ops.precision_mean`.

    Returns:
        [B, D]; 0 where no task has a label.
    """
    exponent = torch.as_tensor(power, dtype=means.dtype, device=means.device).expand(means.shape[1])
    missing = variances == torch.inf
    weight = variances.masked_fill(missing, 1.0).clamp(min=SMALLEST_VARIANCE) ** -exponent[:, None]
    weight = weight.masked_fill(missing, 0.0)
    total = weight.sum(1)
    mean = (weight * means).sum(1) / total.masked_fill(total == 0, 1.0)
    return mean / means.shape[0]
