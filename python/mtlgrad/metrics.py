"""Figures by which multi-task methods are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence


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
