"""The figures of a finished run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import plots
from .base import Result, Settings, Task
from .folder import Files
from .report import of_method


def write(results: Sequence[Result], settings: Settings, tasks: Sequence[Task], folder: Files) -> None:
    """loss_curves.png, task_weights.png; where known, dominance.png, alphavil.png (alphavil, diw) and (bayesagg)
    gradient_uncertainty.png.
    """
    names = [t.name for t in tasks]
    runs = {label: of_method(results, label) for label in settings.labels}

    def curves(key: str) -> plots.Curves:
        """Means over seeds: method -> [epochs][tasks]."""
        return {
            method: torch.tensor([[line[key] for line in r.history] for r in found]).mean(0).tolist()
            for method, found in runs.items()
        }

    folder.write("loss_curves.png", plots.loss_curves(names, curves("train"), curves("validation")))
    folder.write("task_weights.png", plots.task_weights(names, curves("share")))
    known = {label: found for label, found in runs.items() if found[0].history[0]["dominance"] is not None}
    if known:
        layers = list(next(iter(known.values()))[0].history[0]["dominance"])
        shares = {label: _shares(found, layers) for label, found in known.items()}
        folder.write("dominance.png", plots.dominance(names, layers, shares))
    rounds = {label: [r.rounds for r in found] for label, found in runs.items() if found[0].rounds}
    if rounds:
        weights = {label: [[r["weights"] for r in seed] for seed in seeds] for label, seeds in rounds.items()}
        alphas = {
            label: [[r["alphas"] for r in seed if r["alphas"] is not None] for seed in seeds]
            for label, seeds in rounds.items()
            if seeds[0][0]["alphas"] is not None
        }
        folder.write("alphavil.png", plots.alphas(names, settings.target, alphas, weights))
    # Seeds number the dimensions differently: a mean over them would say nothing, so the first seed stands alone.
    variance = next((r.variance for r in results if r.variance is not None), None)
    if variance is not None:
        folder.write("gradient_uncertainty.png", plots.uncertainty_map(names, variance))


def _shares(runs: Sequence[Result], layers: Sequence[str]) -> list[list[list[float]]]:
    """[epochs][layers][tasks], means over seeds."""
    lines = [[[line["dominance"][layer] for layer in layers] for line in r.history] for r in runs]
    mean: list[list[list[float]]] = torch.tensor(lines).mean(0).tolist()
    return mean
