"""The figures of a finished run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import plots
from .base import Result, Settings, Task
from .folder import RunFolder


def write(results: Sequence[Result], settings: Settings, tasks: Sequence[Task], folder: RunFolder) -> None:
    """loss_curves.png, task_weights.png and, for bayesagg past its warm-up, gradient_uncertainty.png."""
    names = [t.name for t in tasks]
    runs = {m: [r for r in results if r.job.task is None and r.job.method == m] for m in settings.methods}

    def curves(key: str) -> plots.Curves:
        """Means over seeds: method -> [epochs][tasks]."""
        return {
            method: torch.tensor([[line[key] for line in r.history] for r in found]).mean(0).tolist()
            for method, found in runs.items()
        }

    folder.write("loss_curves.png", plots.loss_curves(names, curves("train"), curves("validation")))
    folder.write("task_weights.png", plots.task_weights(names, curves("share")))
    # Seeds number the dimensions differently: a mean over them would say nothing, so the first seed stands alone.
    variance = next((r.variance for r in results if r.variance is not None), None)
    if variance is not None:
        folder.write("gradient_uncertainty.png", plots.uncertainty_map(names, variance))
