"""From a batch to the [B, D] gradient that goes back: posterior, moments and weighted mean, task after task.

The moments of a task are accumulated in two [B, D] sums as soon as they are known, so that no [B, T, D] tensor exists.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import hide_from_dynamo
from ..ops.moments import BatchPosterior, Output, run_weighted_mean
from ..posterior.posteriors import Posterior
from ..reference.moments import SMALLEST_VARIANCE
from .conditioning import batch_posterior, condition, moments_of, uses_lemma
from .heads import Head, Outputs

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
        return self.is_sampled(index) or not uses_lemma(self.posteriors[index], examples)

    def own_posterior(self, index: int, with_prior: bool = True) -> Posterior:
        """A head's batch posterior of this process's examples, in float64 for exact moments."""
        prior = self.posteriors[index]
        if prior.exact is not None and not self.is_sampled(index):
            prior = prior.exact
        return batch_posterior(prior, self.outputs, index, self.task_name(index), with_prior)


def _parts(batch: Batch, index: int) -> Iterator[Part]:
    """A head's tasks, some at a time, with the batch posterior as their moments need it."""
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
