"""The published BayesAgg-MTL estimator, transcribed: the peer to time and the formulas to test against.

Source: Achituve et al., "Bayesian Uncertainty for Gradient Aggregation in Multi-Task Learning", ICML 2024
(arXiv 2402.04005), and the computation that its authors published with it. The code is ours; what is kept is which
tensors are formed, in which order, and with which library calls, because that is what costs time and memory:

- regression forms E[ww'], E[ww'h w'] and E[ww'hh'ww'] as full [B, O, D, D] tensors and keeps only their diagonals;
- classification holds the gradient of every weight sample, [S, B, O, D], and takes E[g^2] - E[g]^2;
- the Laplace posterior forms Jacobians [B, C, C*P], inverts the precision against the identity, and factors the
  result a second time to sample from it;
- the full-data posterior is kept as a distribution, so its precision is rebuilt from the covariance's factor (once: the
  distribution caches it).

Two departures, both in this peer's favour. Intermediates live in small functions and are freed when these return; the
published code holds all of them until the end of a step (about 14 tensors of shape [B, O, D, D]). The losses of the
sampled weights, which only feed a log line there, are not computed.

B batch, D features, P = D + 1 (bias last), O outputs, C classes, S samples. All functions take float32 or float64.
Random numbers come from torch's global generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import MultivariateNormal

Kind = Literal["regression", "binary", "multiclass"]

VARIANCE_FLOOR = 1e-8
CURVATURE_CHUNK = 10_000  # examples per term of the Gauss-Newton sum; the Jacobians of all of them exist regardless


@dataclass
class Group:
    """Heads of one kind: `outputs` regressions or binary tasks, or one multiclass task with `outputs` classes.

    `weight` is [outputs, P], bias last; regression has none, its posterior does not depend on the head.
    """

    kind: Kind
    outputs: int
    weight: Tensor | None = None
    gamma: float = 0.005
    power: float = 1.0


def safe_cholesky(matrix: Tensor, attempts: int = 25) -> Tensor:
    """Lower factor of [..., N, N]; where a matrix is not positive definite, an absolute jitter grows tenfold a try."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    jitter = 1e-9 if matrix.dtype == torch.float64 else 1e-7
    added = torch.zeros(matrix.shape[:-2], dtype=matrix.dtype, device=matrix.device)
    for _ in range(attempts):
        if not failed.any():
            return factor
        added = torch.where(failed > 0, jitter, added)
        factor, failed = torch.linalg.cholesky_ex(matrix + torch.diag_embed(added[..., None].expand(matrix.shape[:-1])))
        jitter *= 10
    raise ValueError("matrix is not positive definite, also with jitter")


def covariance_factor(precision: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(factor of the precision, covariance, factor of the covariance): invert against the identity, factor again."""
    precision_factor = safe_cholesky(precision)
    identity = torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
    covariance = torch.cholesky_solve(identity, precision_factor)
    return precision_factor, covariance, safe_cholesky(covariance)


# Posteriors ----------------------------------------------------------------------------------------------------------


def regression_posterior(
    features: Tensor, targets: Tensor, prior_mean: Tensor, prior_precision: Tensor
) -> MultivariateNormal:
    """Linear regression with unit noise and no bias (paper, section 4.1).

    features [B, D], targets [B, O], prior_mean [O, D], prior_precision [D, D] -> O Gaussians over D weights.
    """
    precision = prior_precision + features.t() @ features
    _, covariance, factor = covariance_factor(precision)
    evidence = (prior_precision.unsqueeze(0) @ prior_mean.unsqueeze(-1)).squeeze(-1) + (features.t() @ targets).t()
    mean = (covariance.unsqueeze(0) @ evidence.unsqueeze(-1)).squeeze(-1)
    return MultivariateNormal(loc=mean, scale_tril=factor.unsqueeze(0))


def _head_gradient(features: Tensor, targets: Tensor, weight: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Logits [B, C] and the gradient of the batch's summed loss with respect to the head, [C, P], by autograd."""
    matrix = weight[:, :-1].clone().requires_grad_()
    bias = weight[:, -1].clone().requires_grad_()
    with torch.enable_grad():
        logits = F.linear(features, matrix, bias)
        if kind == "multiclass":
            loss = F.cross_entropy(logits, targets, reduction="none").sum()
        else:
            loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum()
        matrix_grad, bias_grad = torch.autograd.grad(loss, [matrix, bias])
    return logits.detach(), torch.cat((matrix_grad, bias_grad[:, None]), dim=1)


def _jacobians(features: Tensor, outputs: int) -> Tensor:
    """d logits / d weights for each example, [B, C, C*P]: C copies of the same row, the rest zeros."""
    extended = torch.cat((features, torch.ones_like(features[:, :1])), dim=1)
    identity = torch.eye(outputs, dtype=features.dtype, device=features.device).expand(len(features), -1, -1)
    return torch.einsum("bp,bcj->bcjp", extended, identity).reshape(len(features), outputs, -1)


def _logit_curvature(logits: Tensor, kind: Kind) -> Tensor:
    """Second derivative of the loss with respect to the logits, [B, C, C]; binary tasks have no mixed terms."""
    probabilities = torch.softmax(logits, dim=-1) if kind == "multiclass" else torch.sigmoid(logits)
    curvature = torch.diag_embed(probabilities) - torch.einsum("bc,bk->bck", probabilities, probabilities)
    if kind == "binary":
        curvature = torch.diag_embed(curvature.diagonal(dim1=-2, dim2=-1))
    return curvature


def classification_posterior(
    features: Tensor, targets: Tensor, weight: Tensor, prior_mean: Tensor, prior_precision: Tensor, *, kind: Kind
) -> MultivariateNormal:
    """Laplace's approximation with the generalised Gauss-Newton matrix around the head as trained (section 4.2).

    features [B, D]; targets [B, O] float (binary) or [B] int64 (multiclass); weight [C, P]; prior_mean [C*P];
    prior_precision [C*P, C*P] -> one Gaussian over all C*P weights, class-major, also for independent binary tasks.
    """
    logits, loss_gradient = _head_gradient(features, targets, weight, kind)
    curvature = _logit_curvature(logits, kind)
    jacobians = _jacobians(features, weight.shape[0])
    gradient = loss_gradient.flatten() + prior_precision @ (weight.flatten() - prior_mean)

    gauss_newton = torch.zeros_like(prior_precision)
    for start in range(0, len(features), CURVATURE_CHUNK):
        part = jacobians[start : start + CURVATURE_CHUNK]
        gauss_newton += torch.einsum("bcp,bck,bkq->pq", part, curvature[start : start + CURVATURE_CHUNK], part)

    precision_factor, _, factor = covariance_factor(gauss_newton + prior_precision)
    step = torch.cholesky_solve(gradient[:, None], precision_factor).squeeze(-1)
    return MultivariateNormal(loc=weight.flatten() - step, scale_tril=factor)


def full_data_posterior(group: Group, features: Tensor, targets: Tensor) -> MultivariateNormal:
    """The group's posterior given all the data, from the prior N(0, gamma I)."""
    if group.kind == "regression":
        dim = features.shape[1]
        prior_precision = torch.eye(dim).to(features) / group.gamma
        return regression_posterior(features, targets, features.new_zeros(group.outputs, dim), prior_precision)
    assert group.weight is not None
    size = group.weight.numel()
    prior_precision = torch.eye(size).to(features) / group.gamma
    prior_mean = features.new_zeros(size)
    return classification_posterior(features, targets, group.weight, prior_mean, prior_precision, kind=group.kind)


def full_data_posteriors(
    groups: Sequence[Group], features: Tensor, targets: Sequence[Tensor]
) -> list[MultivariateNormal]:
    """The priors of every batch of an epoch: features [N, D] of the whole data set, one target tensor per group."""
    return [full_data_posterior(group, features, target) for group, target in zip(groups, targets, strict=True)]


def batch_posterior(group: Group, features: Tensor, targets: Tensor, prior: MultivariateNormal) -> MultivariateNormal:
    """The group's posterior given a batch, with the full-data posterior as prior."""
    precision = prior.precision_matrix
    if group.kind == "regression":
        return regression_posterior(features, targets, prior.mean, precision[0])
    assert group.weight is not None
    return classification_posterior(features, targets, group.weight, prior.mean, precision, kind=group.kind)


# Moments -------------------------------------------------------------------------------------------------------------


def _third_moment(features: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """E[(w.h) w w'] as [B, O, D, D]; Isserlis with S + mm' and S - mm'."""
    outer = torch.einsum("od,oe->ode", mean, mean)
    second = covariance + outer
    mean_features = torch.einsum("od,be->obde", mean, features).permute(1, 0, 2, 3)
    right = torch.einsum("bode,oef->bodf", mean_features, second)
    left = torch.einsum("ode,bofe->bodf", second, mean_features)
    rest = torch.einsum("bd,od,oef->boef", features, mean, covariance - outer)
    return right + left + rest


def _fourth_moment(features: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """E[(w.h)^2 w w'] = E[w w'hh'w w'] as [B, O, D, D]."""
    outer = torch.einsum("od,oe->ode", mean, mean)
    second, difference = covariance + outer, covariance - outer
    squares = torch.einsum("bd,be->bde", features, features)
    symmetric = squares + squares.permute(0, 2, 1)
    sandwich = torch.einsum("ode,bef,ofg->bodg", second, symmetric, second)
    del symmetric
    along_mean = torch.einsum("od,bde,oe,ofg->bofg", mean, squares, mean, difference)
    product = torch.einsum("bdf,ofe->bode", squares, covariance)
    trace = product.diagonal(dim1=-2, dim2=-1).sum(-1)
    del squares, product
    by_trace = torch.einsum("bo,ode->bode", trace, second)
    return sandwich + along_mean + by_trace


def _gradient_second_moment(features: Tensor, targets: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """E[g g'] as [B, O, D, D], g = 2 (w.h - y) w."""
    second = covariance + torch.einsum("od,oe->ode", mean, mean)
    third = _third_moment(features, mean, covariance)
    cross = torch.einsum("bo,bode->bode", targets, third)
    del third
    fourth = _fourth_moment(features, mean, covariance)
    return 4 * (torch.einsum("bo,ode->bode", targets**2, second) - 2 * cross + fourth)


def regression_moments(features: Tensor, targets: Tensor, posterior: MultivariateNormal) -> tuple[Tensor, Tensor]:
    """Closed-form moments of the gradient at the features (section 4.1 and its appendix), before the floor.

    features [B, D], targets [B, O], O Gaussians over D weights -> mean and variance, each [B, O, D].
    """
    mean, covariance = posterior.mean, posterior.covariance_matrix
    weighted = torch.einsum("ode,bd->boe", covariance + torch.einsum("od,oe->ode", mean, mean), features)
    gradient_mean = 2 * (weighted - torch.einsum("bo,od->bod", targets, mean))
    gradient_second = _gradient_second_moment(features, targets, mean, covariance)
    gradient_second = gradient_second - torch.einsum("bod,boe->bode", gradient_mean, gradient_mean)
    return gradient_mean, gradient_second.diagonal(dim1=-2, dim2=-1)


def draw_weights(posterior: MultivariateNormal, outputs: int, num_samples: int, *, kind: Kind) -> Tensor:
    """Weight samples [S, C, P] of a classification posterior over C*P weights.

    Binary: the diagonal blocks of the joint covariance are cut out and factored once more, one Gaussian per task.
    """
    if kind == "multiclass":
        return posterior.rsample((num_samples,)).view(num_samples, outputs, -1)
    size = posterior.event_shape[0] // outputs
    joint = posterior.covariance_matrix
    blocks = torch.stack([joint[i : i + size, i : i + size] for i in range(0, outputs * size, size)])
    per_task = MultivariateNormal(loc=posterior.mean.view(outputs, size), scale_tril=safe_cholesky(blocks))
    return per_task.rsample((num_samples,))


def sampled_moments(features: Tensor, targets: Tensor, samples: Tensor, *, kind: Kind) -> tuple[Tensor, Tensor]:
    """Monte Carlo moments of the gradient at the features (section 4.2), before the floor.

    features [B, D]; targets [B, O] (binary) or [B] (multiclass); samples [S, C, P] -> mean and variance, each
    [B, O, D] or [B, 1, D]. Holds the gradients of all samples, [S, B, C, D].
    """
    weights, biases = samples[..., :-1], samples[..., -1]
    logits = torch.einsum("bd,scd->sbc", features, weights) + biases[:, None, :]
    if kind == "multiclass":
        labels = targets.unsqueeze(0).repeat(samples.shape[0], 1)
        residual = torch.softmax(logits, dim=-1) - F.one_hot(labels, num_classes=samples.shape[1])
        gradients = torch.einsum("scd,sbc->sbcd", weights, residual).sum(dim=-2, keepdim=True)
    else:
        residual = torch.sigmoid(logits) - targets.unsqueeze(0).repeat(samples.shape[0], 1, 1)
        gradients = torch.einsum("scd,sbc->sbcd", weights, residual)
    mean = gradients.mean(0)
    return mean, (gradients**2).mean(0) - mean**2


# One step ------------------------------------------------------------------------------------------------------------


def aggregate(means: Sequence[Tensor], variances: Sequence[Tensor], powers: Sequence[float]) -> Tensor:
    """Inverse-variance mean over tasks divided by B (section 3); one [B, T_i, D] pair and one power per group.

    Variances are floored at 1e-8 and raised to the group's power.
    """
    floored = [variance.clamp(min=VARIANCE_FLOOR) ** power for variance, power in zip(variances, powers, strict=True)]
    mean, variance = torch.cat(list(means), dim=1), torch.cat(floored, dim=1)
    precision = 1 / variance
    total = 1 / precision.sum(dim=1)
    return total * (precision * mean).sum(dim=1) / len(mean)


def published_step(
    groups: Sequence[Group],
    features: Tensor,
    targets: Sequence[Tensor],
    priors: Sequence[MultivariateNormal],
    *,
    num_samples: int = 1024,
) -> Tensor:
    """One aggregation, [B, D]: the batch's posterior and moments for each group, then the mean over all tasks."""
    means, variances = [], []
    for group, target, prior in zip(groups, targets, priors, strict=True):
        posterior = batch_posterior(group, features, target, prior)
        if group.kind == "regression":
            mean, variance = regression_moments(features, target, posterior)
        else:
            samples = draw_weights(posterior, group.outputs, num_samples, kind=group.kind)
            mean, variance = sampled_moments(features, target, samples, kind=group.kind)
        means.append(mean)
        variances.append(variance)
    return aggregate(means, variances, [group.power for group in groups])
