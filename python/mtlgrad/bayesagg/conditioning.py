"""The posterior of one batch, given the full-data posterior as prior, as far as the moments of its gradients need it.

At the batch's examples the moments depend on the mean, on the cross covariance S h of each weight with each example's
logit, and on the diagonal of S. With fewer examples than weights these follow from the prior's covariance without any
matrix of the weights being factorised (the matrix inversion lemma): for one output, curvatures q, K = H S0, G = K H'::

    M = I + sqrt(q) G sqrt(q) = L L',   R = L^-1 sqrt(q) K,   W = L^-1 sqrt(q) G
    S H' = (K - W' R)',   diag S = diag S0 - colsum R^2

which costs two GEMMs and a B x B Cholesky in place of a P x P one with its inverse, and keeps the prior's accuracy: the
prior's covariance was made once, in float64. With more examples than weights the precision is summed and factorised.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..posterior.likelihoods import Terms, terms_of
from ..posterior.cholesky import checked_cholesky
from ..ops.moments_kernels import binary_cross, class_spread, multiclass_cross, regression_cross
from ..posterior.posteriors import BlockPosterior, JointPosterior, Posterior, empty_posterior

CHUNK_BYTES = 16 << 20  # on a device, of [outputs, B, W] at a time; on the host outputs go one by one


class Conditioned(NamedTuple):
    """The batch posterior of rows [first, last); shapes as the kernels want them (csrc/kernels.h)."""

    first: int
    last: int
    mean: Tensor  # [last - first, W]
    structure: str  # "rows" (regression, binary), or multiclass "full", "block", "kron"
    cross: Tensor
    spread: Tensor
    class_factor: Tensor | None


def batch_posterior(prior: Posterior, features: Tensor, targets: Tensor, weight: Tensor | None) -> Posterior:
    """The batch posterior as an object, with its precision: for sampling, and where the lemma does not pay."""
    anchor = prior.mean if weight is None else weight
    return empty_posterior(prior.likelihood, anchor, prior, prior.gamma, prior.structure).add(features, targets)


def condition(
    prior: Posterior, features: Tensor, hidden: Tensor, targets: Tensor, weight: Tensor | None, name: str
) -> Iterator[Conditioned]:
    """The batch posterior, a few rows at a time; all rows in one piece where the likelihood couples them.

    Args:
        prior: the full-data posterior, in the dtype and on the device of the features.
        features: [B, D]; ``hidden`` is :func:`mtlgrad.posterior.likelihoods.augment` of them, [B, W].
        weight: [R, W], where to expand (classification); None for regression.
        name: of the task and the batch, for errors.
    """
    anchor = prior.mean if weight is None else weight
    batch, width = hidden.shape
    if isinstance(prior, JointPosterior):
        if batch * (anchor.shape[0] - 1) < anchor.numel():
            yield _condition_joint(prior, hidden, terms_of("multiclass", hidden, targets, anchor), anchor, name)
            return
    elif isinstance(prior, BlockPosterior) and batch < width:
        terms = terms_of(prior.likelihood, hidden, targets, anchor)
        yield from _condition_blocks(prior, hidden, terms, anchor, name)
        return
    posterior = batch_posterior(prior, features, targets, weight)
    mean, covariance = posterior.mean, posterior.covariance()
    if prior.likelihood == "multiclass":
        structure, cross = multiclass_cross(features, covariance, mean.shape[0])
        yield Conditioned(0, len(mean), mean, structure, cross, *class_spread(covariance, mean.shape[0]))
    elif prior.likelihood == "binary":
        for o in range(len(mean)):
            cross, spread = binary_cross(features, covariance[o : o + 1])
            yield Conditioned(o, o + 1, mean[o : o + 1], "rows", cross, spread, None)
    elif covariance.dim() == 2:
        yield Conditioned(0, len(mean), mean, "rows", *regression_cross(features, covariance), None)
    else:
        for o in range(len(mean)):
            cross, spread = regression_cross(features, covariance[o])
            yield Conditioned(o, o + 1, mean[o : o + 1], "rows", cross, spread, None)


def _condition_blocks(
    prior: BlockPosterior, hidden: Tensor, terms: Terms, anchor: Tensor, name: str
) -> Iterator[Conditioned]:
    blocks = prior.covariance()
    blocks = blocks[None] if blocks.dim() == 2 else blocks
    batch, width = hidden.shape
    rows = anchor.shape[0]
    shared = blocks.shape[0] == 1 and (terms.curvature is None or terms.curvature.shape[1] == 1)
    if shared:
        chunk = rows
    elif hidden.is_cuda:
        chunk = max(1, CHUNK_BYTES // (batch * width * hidden.element_size()))
    else:
        chunk = 1
    together = prior.likelihood == "multiclass"  # block structure: the classes meet in one softmax
    parts = []
    for first in range(0, rows, chunk):
        last = min(first + chunk, rows)
        covariance = blocks if shared else blocks.expand(rows, -1, -1)[first:last]
        curvature = None
        if terms.curvature is not None:
            curvature = terms.curvature.T if shared else terms.curvature.T.expand(rows, -1)[first:last]
        drift = anchor[first:last] - prior.mean[first:last]
        mean, cross, spread = _condition_rows(
            covariance, hidden, curvature, terms.gradient[first:last], anchor[first:last], drift, name
        )
        if together:
            parts.append((mean, cross, spread))
        else:
            yield Conditioned(first, last, mean, "rows", cross, spread, None)
    if together:
        mean, cross, spread = (torch.cat(part) for part in zip(*parts))
        yield Conditioned(0, rows, mean, "block", cross, spread, None)


def _condition_rows(
    covariance: Tensor,
    hidden: Tensor,
    curvature: Tensor | None,
    gradient: Tensor,
    anchor: Tensor,
    drift: Tensor,
    name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """covariance [r, W, W], curvature [r, B] (None: one), gradient, anchor and drift from the prior's mean [n, W], n = r
    or, with one covariance for all, any; returns mean [n, W], cross [r, B, W], spread [r, W]."""
    k = torch.matmul(hidden, covariance)
    g = torch.matmul(k, hidden.T)
    if curvature is None:
        weighted_k, weighted_g, m = k, g, g
    else:
        root = curvature.sqrt()[..., None]
        weighted_k, weighted_g = root * k, root * g
        m = weighted_g * root.mT
    m = m.clone() if curvature is None else m
    m.diagonal(dim1=-2, dim2=-1).add_(1.0)
    factor = checked_cholesky(m, name)
    r = torch.linalg.solve_triangular(factor, weighted_k, upper=False)
    if curvature is None:
        cross = torch.linalg.solve_triangular(factor.mT, r, upper=True)
    else:
        w = torch.linalg.solve_triangular(factor, weighted_g, upper=False)
        cross = torch.baddbmm(k, w.mT, r, alpha=-1.0)
    spread = covariance.diagonal(dim1=-2, dim2=-1) - r.square().sum(-2)
    # precision^-1 (gradient + prior precision drift) = x - R' L^-1 sqrt(q) H x with x = S0 gradient + drift
    if covariance.shape[0] == 1:
        x = gradient @ covariance[0] + drift
        along = hidden @ x.T if curvature is None else root[0] * (hidden @ x.T)
        step = x - torch.linalg.solve_triangular(factor[0], along, upper=False).T @ r[0]
    else:
        x = torch.einsum("ow,owv->ov", gradient, covariance) + drift
        along = torch.matmul(hidden, x[..., None])
        along = along if curvature is None else root * along
        step = x - torch.matmul(r.mT, torch.linalg.solve_triangular(factor, along, upper=False))[..., 0]
    return anchor - step, cross, spread


def softmax_curvature_factor(probability: Tensor) -> Tensor:
    """F [B, C, C - 1] with F F' = diag(p) - p p', lower trapezoidal, without cancellation: with the tail sums
    t_j = p_j + ... + p_C, F_jj = sqrt(p_j t_{j+1} / t_j) and F_ij = -p_i / t_{j+1} F_jj (Tanabe and Sagae, 1992)."""
    classes = probability.shape[1]
    tail = probability.flip(1).cumsum(1).flip(1)
    head, rest = tail[:, :-1], tail[:, 1:]
    safe = rest.clamp(min=torch.finfo(rest.dtype).tiny)
    diagonal = (probability[:, :-1] * rest / head.clamp(min=torch.finfo(rest.dtype).tiny)).sqrt()
    below = -(probability[:, :, None] / safe[:, None, :]) * diagonal[:, None, :]
    factor = below.tril(-1)
    factor.diagonal(dim1=1, dim2=2).copy_(diagonal)
    return factor[:, :classes]


def _condition_joint(
    prior: JointPosterior, hidden: Tensor, terms: Terms, anchor: Tensor, name: str
) -> Conditioned:
    """As for the rows, with C - 1 pseudo-examples for every example: the factor of its C x C curvature."""
    classes, width = anchor.shape
    batch, rank = hidden.shape[0], classes - 1
    covariance = prior.covariance()
    features = hidden[:, :-1]
    _, k = multiclass_cross(features, covariance, classes)  # [C(k), B, C*P]: S J'
    f = softmax_curvature_factor(terms.probability)
    # the pseudo-examples' rows of S J' F: [B, rank, C*P]
    weighted_k = torch.einsum("kbp,bkr->brp", k, f).reshape(batch * rank, classes * width)
    # F' J S J', [B*rank, C(c), B]: with the other side's factor it is M
    weighted_g = torch.matmul(weighted_k.view(-1, classes, width), hidden.T)
    m = torch.einsum("xcb,bcr->xbr", weighted_g, f).reshape(batch * rank, batch * rank)
    m.diagonal().add_(1.0)
    factor = checked_cholesky(m, name)
    r = torch.linalg.solve_triangular(factor, weighted_k, upper=False)
    w = torch.linalg.solve_triangular(factor, weighted_g.reshape(batch * rank, -1), upper=False)
    # [C(k), B, C*P] again: S J' - R' W for every (k, b)
    cross = torch.addmm(k.reshape(-1, classes * width), w.view(-1, classes, batch).flatten(1).T, r, alpha=-1.0)
    halves = r.view(-1, classes, width)
    spread, _ = class_spread(covariance, classes)
    spread = spread - torch.einsum("xcd,xkd->ckd", halves, halves)
    x = (covariance @ terms.gradient.flatten()) + (anchor - prior.mean).flatten()
    along = torch.einsum("bc,bcr->br", hidden @ x.view(classes, width).T, f).reshape(-1, 1)
    step = x - (torch.linalg.solve_triangular(factor, along, upper=False).T @ r)[0]
    mean = anchor - step.view_as(anchor)
    return Conditioned(0, classes, mean, "full", cross.view(classes, batch, classes, width), spread, None)
