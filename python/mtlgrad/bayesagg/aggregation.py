"""From a batch to the [B, D] gradient that goes back: posterior, moments and weighted mean, task after task.

The moments of a task are accumulated in two [B, D] sums as soon as they are known, so that no [B, T, D] tensor exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..ops import hide_from_dynamo
from ..ops.moments import (
    Output,
    has_kernels,
    run_binary,
    run_multiclass,
    run_regression,
    run_sampled,
    run_weighted_mean,
)
from ..posterior.likelihoods import IGNORE, augment
from ..posterior.posteriors import Posterior
from .conditioning import ALL_ROWS, Conditioned, batch_posterior, condition, moments_of, uses_lemma
from .heads import Head

SMALLEST_VARIANCE = reference.moments.SMALLEST_VARIANCE


class Sampled(NamedTuple):
    """Weight samples of a head's batch posterior, in place of the posterior itself."""

    first: int
    last: int
    samples: Tensor  # [S, R, P]


Part = Conditioned | Sampled


class GlobalBatch(NamedTuple):
    """What a rank needs, beside its own, of all ranks' examples, which the batch posteriors are conditioned on."""

    features: Tensor | None  # [sum of B, D]; None where no head needs them
    targets: Sequence[Tensor | None]  # those of the heads that are conditioned by the matrix inversion lemma
    posteriors: Sequence[Posterior | None]  # those of the other heads
    rows: slice  # which are this rank's
    share: float  # W times this rank's examples over all


class Batch(NamedTuple):
    """Everything that the aggregate of one batch depends on. ``features`` are in float32 or float64."""

    features: Tensor  # [B, D]
    targets: Sequence[Tensor]
    heads: Sequence[Head]
    weights: Sequence[Tensor | None]  # of the heads, as they stood
    posteriors: Sequence[Posterior]  # full-data
    powers: Sequence[Tensor]  # float64 [T_head], on the device
    num_samples: int  # 0: exact moments
    seed: int
    name: str  # for errors
    summed: bool  # the mean of the tasks' gradients times how many tasks have a label, [B]
    global_batch: GlobalBatch | None = None  # None: one process

    def task_name(self, index: int) -> str:
        return f"{self.name}, heads[{index}] ({self.heads[index].likelihood})"

    def is_sampled(self, index: int) -> bool:
        return bool(self.num_samples) and self.heads[index].likelihood != "regression"


def sums_precision(batch: Batch, index: int, examples: int) -> bool:
    """Whether the head's batch posterior is made by summing a precision, of so many examples."""
    if batch.is_sampled(index) or not has_kernels(batch.features.device):
        return True
    return not uses_lemma(batch.posteriors[index], examples)


def own_posterior(batch: Batch, index: int, with_prior: bool = True) -> Posterior:
    """A head's batch posterior of this process's examples, in float64 for exact moments. See :func:`sums_precision`."""
    prior, weight, features = batch.posteriors[index], batch.weights[index], batch.features
    if prior.exact is not None and not batch.is_sampled(index):
        prior, features = prior.exact, features.double()
        weight = None if weight is None else weight.double()
    return batch_posterior(prior, features, batch.targets[index], weight, batch.task_name(index), with_prior)


def _posterior(batch: Batch, index: int) -> Posterior:
    known = None if batch.global_batch is None else batch.global_batch.posteriors[index]
    return own_posterior(batch, index) if known is None else known


def _parts(batch: Batch, index: int) -> Iterator[Part]:
    """A head's tasks, some at a time, with the batch posterior as their moments need it."""
    head, shared, features = batch.heads[index], batch.global_batch, batch.features
    if batch.is_sampled(index):
        generator = torch.Generator(features.device)
        generator.manual_seed((batch.seed * 1009 + index) % 2**63)
        yield Sampled(0, head.num_tasks, _posterior(batch, index).sample(batch.num_samples, generator))
        return
    targets, rows = batch.targets[index], ALL_ROWS
    if shared is not None:
        posterior, all_targets = shared.posteriors[index], shared.targets[index]
        if posterior is not None:
            yield from moments_of(posterior, features)
            return
        assert shared.features is not None
        assert all_targets is not None
        features, targets, rows = shared.features, all_targets, shared.rows
    hidden = augment(features, head.likelihood)
    prior, weight = batch.posteriors[index], batch.weights[index]
    yield from condition(prior, features, hidden, targets, weight, batch.task_name(index), rows)


def _run(batch: Batch, index: int, part: Part, out: Output) -> None:
    likelihood = batch.heads[index].likelihood
    features, targets = batch.features, batch.targets[index]
    if likelihood != "multiclass":
        targets = targets.to(features.dtype)[:, part.first : part.last]
    if isinstance(part, Sampled):
        run_sampled(features, targets, part.samples, out, likelihood)
    else:
        run: Any = {"regression": run_regression, "binary": run_binary, "multiclass": run_multiclass}[likelihood]
        run(features, targets, part.at, out)


def _tasks_of(head: Head, part: Part) -> slice:
    return slice(0, 1) if head.likelihood == "multiclass" else slice(part.first, part.last)


def _by_reference(batch: Batch, index: int, out: Output) -> None:
    """Where no kernel was compiled for the device: all of a head's tasks at once, in plain PyTorch."""
    likelihood, targets = batch.heads[index].likelihood, batch.targets[index]
    compute: Callable[..., tuple[Tensor, Tensor]]
    given: tuple[Any, ...]
    if batch.is_sampled(index):
        part = next(_parts(batch, index))
        assert isinstance(part, Sampled)
        compute, given = partial(reference.sampled_moments, kind=likelihood), (part.samples,)
    else:
        posterior = _posterior(batch, index)
        compute, given = getattr(reference, f"{likelihood}_moments"), (posterior.mean, posterior.covariance())
    features = batch.features.to(given[0].dtype)
    mean, variance = compute(features, targets if likelihood == "multiclass" else targets.to(features.dtype), *given)
    if out.power is None:
        out.first.copy_(mean)
        out.second.copy_(variance)
    else:
        weight = variance.clamp(min=SMALLEST_VARIANCE) ** -out.power.to(variance)[:, None]
        weight = torch.where(variance < torch.inf, weight, 0.0)
        out.first.add_((weight * mean).sum(1))
        out.second.add_(weight.sum(1))


def _moments(batch: Batch, index: int, out_of: Callable[[slice], Output]) -> Iterator[tuple[slice, Output]]:
    """Have the moments of a head's tasks left in ``out_of(tasks)``; yield the tasks, some at a time, when they are."""
    head = batch.heads[index]
    if not has_kernels(batch.features.device):
        tasks = slice(0, head.num_tasks)
        out = out_of(tasks)
        _by_reference(batch, index, out)
        yield tasks, out
        return
    for part in _parts(batch, index):
        tasks = _tasks_of(head, part)
        out = out_of(tasks)
        _run(batch, index, part, out)
        yield tasks, out


def _accumulate(batch: Batch) -> tuple[Tensor, Tensor]:
    numerator, denominator = torch.zeros_like(batch.features), torch.zeros_like(batch.features)
    for index, powers in enumerate(batch.powers):
        for _ in _moments(batch, index, lambda tasks: Output(numerator, denominator, powers[tasks])):  # noqa: B023
            pass
    return numerator, denominator


def _labels(batch: Batch) -> Tensor:
    """How many tasks have a label, [B]."""
    classes = [target != IGNORE for target in batch.targets if target.dim() == 1]
    values = [~target.isnan() for target in batch.targets if target.dim() == 2]
    return torch.cat([*values, *(there[:, None] for there in classes)], 1).sum(1)


@torch.no_grad()
@hide_from_dynamo
def aggregate(batch: Batch) -> Tensor:
    """The inverse-variance weighted mean of the tasks' gradients, or that times the number of tasks, divided by B,
    [B, D]; with several ranks by all their examples, times the number of ranks, whose gradients will be averaged."""
    with torch.autocast(batch.features.device.type, enabled=False):
        result = run_weighted_mean(*_accumulate(batch))
        if batch.summed:
            result *= _labels(batch)[:, None].to(result.dtype)
        if batch.global_batch is not None and batch.global_batch.share != 1.0:
            result *= batch.global_batch.share
    return result


@torch.no_grad()
@hide_from_dynamo
def diagnose(batch: Batch) -> tuple[Tensor, Tensor]:
    """Each task's share of the weights, averaged over examples and dimensions, [T]; and the variance of its gradient,
    averaged over the examples that have its label, [T, D]. Computes the moments once more, one task at a time."""
    shares, variances = [], []
    with torch.autocast(batch.features.device.type, enabled=False):
        _, denominator = _accumulate(batch)
        for index, powers in enumerate(batch.powers):
            for tasks, out in _moments(
                batch, index, lambda tasks: Output.new(batch.features, tasks.stop - tasks.start)
            ):
                variance, power = out.second, powers[tasks]
                labelled = variance < torch.inf
                weight = variance.clamp(min=SMALLEST_VARIANCE) ** -power.to(variance)[:, None]
                share = torch.where(labelled, weight, 0.0) / denominator[:, None]
                shares.append(share.nanmean(0).mean(-1))  # 0 / 0: an example without any label
                total = torch.where(labelled, variance, 0.0).sum(0)
                variances.append(total / labelled.sum(0))
    return torch.cat(shares), torch.cat(variances)
