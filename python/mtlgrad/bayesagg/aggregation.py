"""From a batch to the [B, D] gradient that goes back: posterior, moments and weighted mean, task after task.

The moments of a task are accumulated in two [B, D] sums as soon as they are known, so that no [B, T, D] tensor exists.

The posterior of a batch is made, with the full-data posterior as prior, as far as the moments need it: at the batch's
examples these depend on the mean, on the cross covariance S h of each weight with each example's logit, and on the
diagonal of S. With fewer examples than weights these follow from the prior's covariance without any
matrix of the weights being factorised (the matrix inversion lemma): for one output, curvatures q, K = H S0, G = K H'::

    M = I + sqrt(q) G sqrt(q) = L L',   R = L^-1 sqrt(q) K,   Y = L'^-1 R
    S H' = (Y / sqrt(q))',   diag S = diag S0 - colsum R^2,   mean = m0 + S H' (q (H (w - m0)) - r)

with m0 the prior's mean and r the derivatives of the losses in the logits at w (regression: the last factor is
y - H m0). This costs two GEMMs and a B x B Cholesky in place of a P x P one with its inverse, and keeps the prior's
accuracy: the prior's covariance was made once, in float64. A row of Y is as small as its sqrt(q), so dividing by that
loses nothing; where q is zero, a number takes its place that is nothing beside the one in M. With more examples than
weights the precision is summed and factorised, in float64.

What is subtracted from the prior's covariance is nearly all of it where the prior knows next to nothing of the batch's
directions: in float32 about 1e-7 trace(M) of the result is lost. Beyond LARGEST_TRACE the computation starts again from
the prior in float64.

Of a multiclass covariance only the contrasts between classes are used, which give the same moments.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import hide_from_dynamo
from ..ops.moments import (
    BatchPosterior,
    Output,
    class_variances,
    condition_on_batch,
    invert_at,
    multiclass_posterior,
    run_weighted_mean,
)
from ..posterior.cholesky import checked_cholesky
from ..posterior.posteriors import BlockPosterior, JointPosterior, Posterior, contrasts_of, empty_posterior
from ..reference.moments import SMALLEST_VARIANCE
from .heads import Head, Outputs

LARGEST_TRACE = 4e3  # of M in float32; an ordinary batch has about one an example
ALL_ROWS = slice(None)
CHUNK_BYTES = 16 << 20  # on a device, of [outputs, B, W] at a time; on the host an even quarter of many outputs


class Conditioned(NamedTuple):
    """The batch posterior of rows [first, last)."""

    first: int
    last: int
    at: BatchPosterior

    def to(self, like: Tensor) -> Conditioned:
        return self._replace(at=self.at.each(lambda tensor: tensor.to(like)))


def _wants_float64(trace: Tensor, summands: Tensor, prior: Posterior, m: Tensor) -> bool:
    """``summands``: about how large what adds up to trace(M) is before it cancels. Reads the device, except while a
    CUDA graph is captured: there ``m``, or what M is made of, becomes NaN."""
    if prior.exact is None:
        return False
    too_large = torch.maximum(trace, summands) > LARGEST_TRACE
    if m.is_cuda and torch.cuda.is_current_stream_capturing():
        m.masked_fill_(too_large[..., None, None], torch.nan)
        return False
    return bool(too_large.any())


def batch_posterior(
    prior: Posterior, outputs: Outputs, index: int, name: str | None = None, with_prior: bool = True
) -> Posterior:
    """Make the batch posterior as an object, in the prior's dtype, with its precision: for sampling, for structures
    without the lemma, and for several ranks. Without the prior it is what a rank has to add to it."""
    # Deviations from the prior's mean lose fewer digits than those from the weights, but a Kronecker precision is not
    # the sum of the prior's and the batch's, so there the anchor counts (DESIGN 4.2: the weights).
    weight = outputs.weights[index].to(prior.anchor)
    anchor = weight if prior.structure == "kron" else prior.mean
    posterior = empty_posterior(prior.likelihood, anchor, prior, prior.gamma, prior.structure)
    posterior.name = name or posterior.name
    if not with_prior:
        posterior.scale(0.0)
    return posterior.add_terms(outputs.hidden_of(index).to(prior.anchor), outputs.terms[index].to(prior.anchor), weight)


def condition(
    prior: Posterior, outputs: Outputs, index: int, name: str, rows: slice = ALL_ROWS
) -> Iterator[Conditioned]:
    """Yield the batch posterior, a few rows at a time; all rows in one piece where the likelihood couples them.

    Args:
        prior: the full-data posterior, in the dtype of the moments.
        outputs: the batch, of which the head is number ``index``.
        name: of the task and the batch, for errors.
        rows: of the examples, those whose cross covariances are wanted.
    """
    if isinstance(prior, BlockPosterior):
        yield from _condition_blocks(prior, outputs, index, name, rows)
    elif isinstance(prior, JointPosterior):
        by_lemma = prior.uses_lemma(len(outputs.hidden))
        yield from (_condition_joint if by_lemma else _invert_joint)(prior, outputs, index, name, rows)
    else:
        posterior = batch_posterior(prior.exact or prior, outputs, index, name)
        yield from moments_of(posterior, outputs.hidden[rows, :-1], prior.anchor)


def moments_of(posterior: Posterior, features: Tensor, like: Tensor) -> Iterator[Conditioned]:
    """Yield a batch posterior at some of the batch's examples; computed in its dtype, returned in that of ``like``."""
    for part in posterior.likelihood.at(features.to(posterior.anchor), posterior.mean, posterior.contrasts):
        yield Conditioned(*part).to(like)


def _condition_blocks(
    prior: BlockPosterior, outputs: Outputs, index: int, name: str, wanted: slice, start: int = 0
) -> Iterator[Conditioned]:
    terms, wide = outputs.terms[index], outputs.hidden_of(index)
    hidden, curvature = outputs.hidden_of(index, prior.anchor), terms.curvature
    (batch, width), rows = hidden.shape, prior.mean.shape[0]
    by_lemma, exact, covariance = prior.uses_lemma(batch), prior.exact or prior, prior.covariance()
    assert isinstance(exact, BlockPosterior)
    innovation = terms.innovation(wide @ exact.mean.double().T).T.to(hidden)
    shared = prior.blocks.shape[0] == 1 and (curvature is None or curvature.shape[1] == 1)
    together = prior.likelihood.is_joint  # block structure: the classes meet in one softmax
    if hidden.is_cuda and not shared:
        chunk = max(1, CHUNK_BYTES // (batch * width * hidden.element_size()))
    else:
        chunk = rows if shared or together or rows < 8 else rows // 8 * 2
    parts = []
    for first in range(start, rows, chunk):
        last = min(first + chunk, rows)
        some = slice(0, 1) if shared else slice(first, last)
        key = id(covariance), id(curvature)
        found = outputs.conditioned.get(key) if shared else None
        if found is None and by_lemma:
            q = None if curvature is None else curvature.T.to(hidden).expand(1 if shared else rows, -1)[some]
            blocks = covariance.view(-1, width, width).expand(rows, -1, -1)[some]
            found = _condition_rows(prior, blocks, hidden, q, name)
            if found is None:
                rest = _condition_blocks(exact, outputs, index, name, wanted, 0 if together else first)
                yield from (part.to(hidden) for part in rest)
                return
        elif found is None:
            sums = exact.blocks, outputs.curvature(index, exact)
            before, seen = (x if x.shape[0] in (1, last - first) else x[some] for x in sums if x is not None)
            found = _invert_rows(before, seen, hidden, wide, name)
        cross, variances = found
        if shared:  # one product for all rows, not one each
            outputs.conditioned[key] = found
            mean = torch.addmm(prior.mean, innovation, cross[0])
        else:
            mean = torch.baddbmm(prior.mean[some, None], innovation[some, None], cross)[:, 0]
        cross = cross if wanted == ALL_ROWS else cross[:, wanted]
        if together and last - first < rows:
            parts.append((mean, cross, variances))
        else:
            yield Conditioned(first, last, BatchPosterior("block" if together else "rows", mean, cross, variances))
    if parts:
        yield Conditioned(0, rows, BatchPosterior("block", *(torch.cat(part) for part in zip(*parts))))


def _invert_rows(prior: Tensor, curvature: Tensor, hidden: Tensor, wide: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return cross covariances [r, B, W] and variances [r, W], in the dtype of ``hidden``, of a precision's two parts
    [r or 1, W, W] in float64; ``wide`` is ``hidden`` in float64."""
    found = invert_at(prior, curvature, hidden)
    if found is not None:
        return found
    covariance = torch.cholesky_inverse(checked_cholesky(prior + curvature, name))
    return torch.matmul(wide, covariance).to(hidden), covariance.diagonal(dim1=-2, dim2=-1).to(hidden)


def _condition_rows(
    prior: Posterior, covariance: Tensor, hidden: Tensor, curvature: Tensor | None, name: str
) -> tuple[Tensor, Tensor] | None:
    """Return cross covariances [r, B, W] and variances [r, W]; None where that wants float64.

    covariance is [r, W, W], curvature [r, B] (None: one).
    """
    k = torch.matmul(hidden, covariance)
    g = torch.matmul(k, hidden.T)
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    ones = curvature is None
    if curvature is None:
        curvature = hidden.new_ones(1, 1).expand(len(covariance), len(hidden))
    curvature = curvature.clamp(min=torch.finfo(hidden.dtype).tiny ** 0.75)
    summands = (curvature @ hidden.square() * diagonal).sum(-1)
    trace = len(hidden) + (curvature * g.diagonal(dim1=-2, dim2=-1)).sum(-1)
    if _wants_float64(trace, summands, prior, g):
        return None
    if hidden.device.type == "cpu" and covariance.shape[0] > 1:
        # Many small matrices, one to a thread: several times quicker than as many calls of LAPACK. What fails there
        # fails again below, which has words for it.
        variances = diagonal.contiguous()
        if condition_on_batch(k, g, curvature.contiguous(), variances):
            return k, variances
        k = torch.matmul(hidden, covariance)
    root = curvature.sqrt()[..., None]
    m = g if ones else g * root * root.mT
    m.diagonal(dim1=-2, dim2=-1).add_(1.0)
    factor = checked_cholesky(m, name)
    r = torch.linalg.solve_triangular(factor, k if ones else root * k, upper=False)
    y = torch.linalg.solve_triangular(factor.mT, r, upper=True)
    return y if ones else y / root, diagonal - r.square().sum(-2)


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
    prior: JointPosterior, outputs: Outputs, index: int, name: str, wanted: slice
) -> Iterator[Conditioned]:
    """As for the rows, with C - 1 pseudo-examples for every example: the factor of its C x C curvature."""
    terms, wide = outputs.terms[index], outputs.hidden_of(index)
    assert terms.probability is not None
    innovation = terms.innovation(wide @ (prior.exact or prior).mean.double().T, jointly=True).to(prior.anchor)
    hidden = outputs.hidden_of(index, prior.anchor)
    classes, width = prior.mean.shape
    batch, rank = hidden.shape[0], classes - 1
    covariance = prior.contrasts
    k = hidden @ covariance.view(classes, width, -1)  # [C(k), B, C*P]: S J', its block k of rows being that of columns
    f = softmax_curvature_factor(terms.probability.to(hidden))
    # F' J S, a row for each pseudo-example (b, r); batched products of dense operands, where einsum would copy each
    weighted_k = torch.bmm(f.mT, k.transpose(0, 1)).view(batch * rank, classes * width)
    # J S J' F, [B, B*rank, C]: with the other side's factor it is M
    weighted_g = torch.mm(hidden, weighted_k.view(-1, width).T).view(batch, batch * rank, classes)
    m = torch.bmm(weighted_g, f).transpose(0, 1).reshape(batch * rank, batch * rank)
    m.diagonal().add_(1.0)
    summands = (terms.diagonal(wide) * covariance.diagonal().view_as(prior.mean)).sum()
    if _wants_float64(m.diagonal().sum(), summands, prior, m):
        exact = prior.exact
        assert isinstance(exact, JointPosterior)
        rest = _condition_joint(exact, outputs, index, name, wanted)
        yield from (part.to(hidden) for part in rest)
        return
    factor = checked_cholesky(m, name)
    r = torch.linalg.solve_triangular(factor, weighted_k, upper=False)
    del m, weighted_k  # these matrices are all the memory an aggregation takes
    w = torch.linalg.solve_triangular(factor, weighted_g.permute(1, 2, 0).flatten(1), upper=False)
    # [C(k), B, C*P] again: S J' - R' W for every (k, b)
    k.view(-1, classes * width).addmm_(w.T, r, alpha=-1.0)
    halves = r.view(-1, classes, width)
    variances = class_variances(covariance, classes) - torch.einsum("xcd,xkd->ckd", halves, halves)
    mean = prior.mean + (innovation.T.reshape(1, -1) @ k.view(classes * batch, -1)).view_as(prior.mean)
    cross = k.view(classes, batch, classes, width)[:, wanted]
    yield Conditioned(0, classes, BatchPosterior("full", mean, cross, variances))


def _invert_joint(
    prior: JointPosterior, outputs: Outputs, index: int, name: str, wanted: slice
) -> Iterator[Conditioned]:
    """For many examples: the precision is summed. The mean, too, is that of the contrasts."""
    exact, wide = prior.exact or prior, outputs.hidden_of(index)
    assert isinstance(exact, JointPosterior)
    curvature = outputs.curvature(index, exact)
    assert curvature is not None
    covariance = contrasts_of(exact.joint + curvature, len(exact.mean), name)
    innovation = outputs.terms[index].innovation(wide @ exact.mean.T, jointly=True)
    mean = exact.mean + (covariance @ (innovation.T @ wide).flatten()).view_as(exact.mean)
    at = multiclass_posterior(wide[wanted, :-1], mean, covariance, None)
    yield Conditioned(0, len(mean), at).to(prior.anchor)


# ---- the gradient ----------------------------------------------------------------------------------------------------

#: The batch posterior, or weight samples [S, R, P] of it, of rows [first, last).
Part = tuple[int, int, BatchPosterior | Tensor]


class GlobalBatch(NamedTuple):
    """What a rank needs, beside its own, of all ranks' examples, which the batch posteriors are conditioned on."""

    outputs: Outputs | None  # of the heads that are conditioned by the matrix inversion lemma, for all examples
    posteriors: Sequence[Posterior | None]  # those of the other heads; None: the next one of the outputs
    rows: slice  # which are this rank's
    share: float  # W times this rank's examples over all


class Batch(NamedTuple):
    """Everything that the aggregate of one batch depends on. ``features`` are in float32 or float64."""

    features: Tensor  # [B, D]
    targets: Sequence[Tensor]
    heads: Sequence[Head]
    outputs: Outputs
    posteriors: Sequence[Posterior]  # full-data
    deviations: Sequence[Tensor | None]  # [O], of regression targets' noise; None: one
    powers: Sequence[Tensor]  # float64 [T_head], on the device
    balance: float  # what all gradients are multiplied by, as each is divided by its noise
    num_samples: int  # 0: exact moments
    seed: int
    name: str  # for errors
    summed: bool  # the mean of the tasks' gradients times how many tasks have a label, [B]
    global_batch: GlobalBatch | None = None  # None: one process

    @property
    def share(self) -> float:
        return 1.0 if self.global_batch is None else self.global_batch.share

    def task_name(self, index: int) -> str:
        return f"{self.name}, heads[{index}] ({self.heads[index].likelihood})"

    def is_sampled(self, index: int) -> bool:
        return bool(self.num_samples) and not self.heads[index].likelihood.is_exact

    def sums_precision(self, index: int, examples: int) -> bool:
        """Whether the head's batch posterior is made by summing a precision, of so many examples."""
        return self.is_sampled(index) or not self.posteriors[index].uses_lemma(examples)

    def own_posterior(self, index: int, with_prior: bool = True) -> Posterior:
        """Make a head's batch posterior of this process's examples, in float64 for exact moments."""
        prior = self.posteriors[index]
        if prior.exact is not None and not self.is_sampled(index):
            prior = prior.exact
        return batch_posterior(prior, self.outputs, index, self.task_name(index), with_prior)


def _parts(batch: Batch, index: int) -> Iterator[Part]:
    """Yield a head's tasks, some at a time, with the batch posterior as their moments need it."""
    shared, features = batch.global_batch, batch.features
    known = None if shared is None else shared.posteriors[index]
    if batch.is_sampled(index):
        generator = torch.Generator(features.device)
        generator.manual_seed((batch.seed * 1009 + index) % 2**63)
        posterior = batch.own_posterior(index) if known is None else known
        yield 0, batch.heads[index].outputs, posterior.sample(batch.num_samples, generator)
    elif known is not None:
        yield from moments_of(known, features, features)
    elif shared is not None:
        assert shared.outputs is not None
        at = shared.posteriors[:index].count(None)
        yield from condition(batch.posteriors[index], shared.outputs, at, batch.task_name(index), shared.rows)
    else:
        yield from condition(batch.posteriors[index], batch.outputs, index, batch.task_name(index))


def _moments(batch: Batch, index: int, sums: Output | None = None) -> Iterator[tuple[slice, Output]]:
    """Add the moments of a head's tasks to ``sums``, or leave them in new tensors; yield the tasks, some at a time."""
    likelihood, targets, deviation = batch.heads[index].likelihood, batch.targets[index], batch.deviations[index]
    for first, last, at in _parts(batch, index):
        tasks = slice(0, 1) if likelihood.is_joint else slice(first, last)
        out = sums or Output.new(batch.features, tasks.stop - tasks.start)
        some, by = targets, deviation
        if tasks.stop - tasks.start < batch.heads[index].num_tasks:
            some, by = targets[:, tasks], None if deviation is None else deviation[tasks]
            if sums is not None:
                out = sums.of(tasks)
        if by is not None and isinstance(at, BatchPosterior):  # in units whose noise is one
            some, at = some / by, at._replace(mean=at.mean / by[:, None])
        likelihood.moments(batch.features, some, at, out)
        yield tasks, out


def _accumulate(batch: Batch, scales: Tensor, without: Collection[int]) -> tuple[Tensor, Tensor]:
    """Return the sums over the tasks of lambda_t s_t E_t and of lambda_t, [B, D] each."""
    numerator, denominator = torch.zeros_like(batch.features), torch.zeros_like(batch.features)
    sizes = [head.num_tasks for head in batch.heads]
    for index, (power, scale) in enumerate(zip(batch.powers, scales.split(sizes))):
        if index not in without:
            for _ in _moments(batch, index, Output(numerator, denominator, power, scale)):
                pass
    return numerator, denominator


@torch.no_grad()
@hide_from_dynamo
def aggregate(batch: Batch, scales: Tensor | None = None, without: Collection[int] = ()) -> Tensor:
    """Return the inverse-variance weighted mean of the tasks' gradients, or that times the number of tasks, divided by
    B, [B, D].

    Args:
        scales: float64 [T], what each task's loss was multiplied by. None: one; with several ranks, this rank's share
            of the mean over all ranks' examples, times the number of ranks, whose gradients will be averaged.
        without: heads to leave out.
    """
    if scales is None:
        tasks = sum(head.num_tasks for head in batch.heads)
        scales = torch.full((tasks,), batch.share, dtype=torch.float64, device=batch.features.device)
    result = run_weighted_mean(*_accumulate(batch, scales * batch.balance, without))
    if batch.summed:  # times the number of tasks that have a label
        counts = [terms.labels for index, terms in enumerate(batch.outputs.terms) if index not in without]
        result *= sum(n[:, None].to(result) if isinstance(n, Tensor) else n for n in counts)
    return result


@torch.no_grad()
@hide_from_dynamo
def diagnose(batch: Batch) -> tuple[Tensor, Tensor]:
    """Each task's share of the weights, averaged over examples and dimensions, [T]; and the variance of its gradient,
    averaged over the examples that have its label, [T, D]. Computes the moments once more, one task at a time."""
    shares, variances = [], []
    with torch.autocast(batch.features.device.type, enabled=False):
        ones = batch.features.new_ones(sum(head.num_tasks for head in batch.heads), dtype=torch.float64)
        _, denominator = _accumulate(batch, ones, ())
        for index, powers in enumerate(batch.powers):
            for tasks, out in _moments(batch, index):
                variance, power = out.second, powers[tasks]
                labelled = variance < torch.inf
                weight = variance.clamp(min=SMALLEST_VARIANCE) ** -power.to(variance)[:, None]
                share = torch.where(labelled, weight, 0.0) / denominator[:, None]
                shares.append(share.nanmean(0).mean(-1))  # 0 / 0: an example without any label
                total = torch.where(labelled, variance, 0.0).sum(0)
                variances.append(total / labelled.sum(0))
    return torch.cat(shares), torch.cat(variances)
