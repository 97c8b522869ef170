"""Figures by which multi-task methods, and the gradients they meet, are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .ops.rows import Rows


def delta_m(metrics: Sequence[float], baseline: Sequence[float], higher_is_better: Sequence[bool]) -> float:
    """The average relative change per task against a baseline, usually single-task nets, in percent; **+ is worse**.

    .. math::
        \\Delta_m = \\frac{100}{K} \\sum_{k=1}^{K} (-1)^{\\delta_k} \\frac{M_{m,k} - M_{b,k}}{M_{b,k}}

    with :math:`\\delta_k = 1` where a higher metric is better, else 0 (Maninis et al., "Attentive Single-Tasking of
    Multiple Tasks", CVPR 2019, with the sign that multi-task papers, BayesAgg-MTL and Aligned-MTL among them, print).

    Args:
        metrics: the method's metrics, one a task (or several a task, each its own entry), length K >= 1.
        baseline: the baseline's metrics, same order, none of them zero.
        higher_is_better: for each entry True (accuracy) or False (error).

    Returns:
        The change in percent: -1.0 means one percent better than the baseline on average.

    Raises:
        ValueError: lengths differ or are 0, an entry is not finite, or a baseline is zero.
    """
    if not len(metrics) == len(baseline) == len(higher_is_better) or not len(metrics):
        raise ValueError(
            "delta_m: metrics, baseline and higher_is_better must have one entry a task, "
            f"found {len(metrics)}, {len(baseline)} and {len(higher_is_better)}"
        )
    total = 0.0
    for k, (ours, base, higher) in enumerate(zip(metrics, baseline, higher_is_better, strict=True)):
        ours, base = float(ours), float(base)
        if not math.isfinite(ours) or not math.isfinite(base):
            raise ValueError(f"delta_m: entry {k} must be finite, found {ours} against the baseline {base}")
        if base == 0.0:
            raise ValueError(f"delta_m: baseline[{k}] must not be 0: no change is relative to it; leave the task out")
        change = (ours - base) / base
        total += -change if higher else change
    return 100.0 * total / len(metrics)


def mean_rank(metrics: Sequence[Sequence[float]] | Tensor, higher_is_better: Sequence[bool]) -> list[float]:
    """Every method's rank among the methods (1 is best), averaged over the metrics; **- is better**.

    .. math:: \\mathrm{MR}_m = \\frac{1}{K} \\sum_{k=1}^{K} \\Bigl(\\tfrac12 + \\tfrac12 \\#\\{j : M_j = M_m\\}
        + \\#\\{j : M_j \\text{ better than } M_m\\}\\Bigr)

    with M the k-th metric of every method: equal values share the average of their ranks. The column MR of the tables
    of Nash-MTL (Navon et al., ICML 2022, arXiv 2202.01017) and Aligned-MTL (arXiv 2305.19000).

    Args:
        metrics: one row a method, each with K >= 1 metrics. Infinite ones (a run that diverged) are ranked as such.
        higher_is_better: for each metric True (accuracy) or False (error).

    Returns:
        One average rank a method, from 1 to the number of methods.

    Raises:
        ValueError: no method, no metric, rows of other lengths than ``higher_is_better``, or NaN.
    """
    count = len(higher_is_better)
    table = [[float(value) for value in row] for row in metrics]
    if not table or not count:
        raise ValueError(
            "mean_rank: metrics: expected at least one method and one metric, "
            f"found {len(table)} methods and {count} entries in higher_is_better"
        )
    for m, row in enumerate(table):
        if len(row) != count:
            raise ValueError(
                f"mean_rank: metrics: expected {count} of every method, as in higher_is_better, "
                f"found {len(row)} of method {m}"
            )
        for k, value in enumerate(row):
            if math.isnan(value):
                raise ValueError(
                    f"mean_rank: metrics: expected numbers, found NaN in metric {k} of method {m}; leave the metric or "
                    "the method out, or give the worst value there is (infinity, for an error)"
                )
    totals = [0.0] * len(table)
    for k, higher in enumerate(higher_is_better):
        costs = [-row[k] if higher else row[k] for row in table]
        for m, cost in enumerate(costs):
            totals[m] += sum(other < cost for other in costs) + (1 + costs.count(cost)) / 2
    return [total / count for total in totals]


class GradientStatistics(NamedTuple):
    """How the gradients of T tasks lie to one another: float64, on their device."""

    condition_number: Tensor  #: []: the largest singular value over the smallest; infinite if that is 0, NaN if all are
    singular_values: Tensor  #: [T], of the matrix of gradients, descending
    cosine: Tensor  #: [T, T]: of the angle between two gradients; negative where they conflict
    magnitude_similarity: Tensor  #: [T, T]: 1 for gradients of one length, towards 0 the more one outweighs the other
    norms: Tensor  #: [T], Euclidean


@torch.no_grad()
def gradient_statistics(rows: Rows | ops.Stacked) -> GradientStatistics:
    r"""Conditioning, conflict and dominance among the gradients of T tasks: each is read once, the host reads nothing.

    With g_i the gradients, and G the matrix whose columns they are,

    .. math:: \kappa = \frac{\sigma_{\max}(G)}{\sigma_{\min}(G)}, \qquad
        \cos_{ij} = \frac{\langle g_i, g_j \rangle}{\|g_i\| \|g_j\|}, \qquad
        \Phi_{ij} = \frac{2 \|g_i\| \|g_j\|}{\|g_i\|^2 + \|g_j\|^2} .

    The condition number is the stability criterion of Aligned-MTL (arXiv 2305.19000), as
    :func:`mtlgrad.ops.align` has it; cosine and magnitude similarity :math:`\Phi` are definitions 1 and 2 of PCGrad (Yu
    et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, arXiv 2001.06782). All but norms and singular
    values are unchanged when all gradients are multiplied by one positive number.

    Args:
        rows: T rows, as in :func:`mtlgrad.ops.gram`: a tensor [T, ...], T lists of tensors, or
            ``ops.Stacked([p.jac for p in parameters])``. float32, float64, float16 or bfloat16.

    Returns:
        :class:`GradientStatistics`. They come from the Gram matrix, so that a condition number above some 1e7 says no
        more than that the gradients are dependent.

        A gradient of zero has no direction: its cosines are NaN, with itself too; its magnitude similarity is 0 with
        others, and NaN with another zero. NaN or infinity in a gradient makes its own row and column of both matrices
        NaN, its norm NaN or infinite, and condition number and singular values NaN.

    Errors: as :func:`mtlgrad.ops.gram`.
    """
    gram = ops.gram(rows)
    spectrum = ops.align(gram)
    squares = gram.diagonal()
    norms = squares.sqrt()
    products = norms[:, None] * norms
    return GradientStatistics(
        condition_number=spectrum.condition_number,
        singular_values=spectrum.singular_values,
        cosine=(gram / products).clamp(-1.0, 1.0),
        magnitude_similarity=(2.0 * products / (squares[:, None] + squares)).clamp(max=1.0),
        norms=norms,
    )
