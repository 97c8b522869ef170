"""A Lightning callback that logs what the methods of this package tell of the tasks. Made for ``lightning`` 2.6."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..bayesagg import BayesAgg
from ..optim.base import TaskOptimizer
from ..rules import AlignedMTL, GramRule

try:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback
except ModuleNotFoundError as error:
    if error.name != "lightning":
        raise
    raise ImportError(f"{__name__}: expected the package lightning, found none; pip install lightning") from None

__all__ = ["MultiTaskMonitor"]


class MultiTaskMonitor(Callback):
    """Log, every n-th step, the latest values of all the module's layers and the trainer's optimizers of this package.

    ====================  ========================================================================================
    :class:`.GramRule`    ``{name}/weight/{task}``: of :class:`.AlignedMTL`, :class:`.UPGrad` and all other rules
    :class:`.AlignedMTL`  also ``{name}/condition_number``, ``{name}/rank``
    :class:`.BayesAgg`    ``{name}/task_weight/{task}``, once there is a full-data posterior
    AdaTask optimizers    ``{class}/dominance/{task}``; with several parameter groups, for each that is updated per
                          task, ``{class}/{group}/dominance/{task}``, the group's ``"name"`` or number
    ====================  ========================================================================================

    The name is the attribute's, as in ``named_modules()``. The step is that of ``self.log``; a second optimizer of the
    same class is ``{class}-1``.

    Args:
        every_n_steps: the trainer's ``log_every_n_steps`` if not given. In between nothing is computed or read.
        task_names: one a task, in order, for all layers and optimizers alike; numbers if not given.

    Raises:
        ValueError: ``every_n_steps`` below 1. When training starts: the trainer has no logger; there is nothing to log;
            a layer or an optimizer has another number of tasks than ``task_names``.

    All ranks compute the values, which may take collectives (:meth:`.BayesAgg.task_weights` takes about two
    aggregations); rank zero reads them from the device, in one piece, and logs them to every logger.
    """

    def __init__(self, every_n_steps: int | None = None, task_names: Sequence[str] | None = None):
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"MultiTaskMonitor: every_n_steps: expected at least 1, found {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.task_names = None if task_names is None else list(task_names)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is something to log, and where.

        Args:
            trainer, pl_module: Lightning's.

        Raises:
            ValueError: as the class says.
        """
        if not trainer.loggers:
            raise ValueError(
                "MultiTaskMonitor: trainer: expected a logger, found none; leave logger=False out, or this callback"
            )
        found = [*_layers(pl_module), *_optimizers(trainer)]
        if not found:
            raise ValueError(
                "MultiTaskMonitor: pl_module: expected a rule (AlignedMTL, UPGrad, ...) or a BayesAgg among its "
                "modules, or an AdaTask optimizer with dominance_decay, found none; leave this callback out"
            )
        for name, source in found:
            if self.task_names is not None and len(self.task_names) != _tasks(source):
                raise ValueError(
                    f"MultiTaskMonitor: task_names: expected {_tasks(source)}, the tasks of {name}, found "
                    f"{len(self.task_names)}"
                )

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log, after every n-th step.

        Args:
            trainer, pl_module: Lightning's.
        """
        # Lightning's own count, for the axis of self.log: global_step counts every optimizer of manual optimisation.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        accumulating = pl_module.automatic_optimization and trainer.fit_loop._should_accumulate()
        if accumulating or not self._every(trainer) or (step + 1) % self._every(trainer):
            return
        values = dict(self._values(trainer, pl_module))
        if not values or not trainer.is_global_zero:
            return
        device = next(iter(values.values())).device
        numbers = torch.stack([value.to(device, torch.float64) for value in values.values()]).tolist()
        metrics = dict(zip(values, numbers, strict=True))
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def _every(self, trainer: Trainer) -> int:
        # Set by the trainer's logger connector, where mypy does not look; 0 means never.
        return trainer.log_every_n_steps if self.every_n_steps is None else self.every_n_steps  # type: ignore[attr-defined]

    def _values(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[tuple[str, Tensor]]:
        """Scalars, on the device."""
        for name, layer in _layers(pl_module):
            if isinstance(layer, BayesAgg):
                yield from self._per_task(f"{name}/task_weight", layer.task_weights)
                continue
            yield from self._per_task(f"{name}/weight", layer.weights)
            if not isinstance(layer, AlignedMTL):
                continue
            for what, value in (("condition_number", layer.condition_number), ("rank", layer.rank)):
                if value is not None:
                    yield f"{name}/{what}", value
        for name, optimizer in _optimizers(trainer):
            groups = optimizer.param_groups
            # By the state, which is on the host, for a row of NaN would have to be read.
            updated = [any("update_square" in optimizer.state.get(p, ()) for p in group["params"]) for group in groups]
            for number, (group, row) in enumerate(zip(groups, optimizer.dominance())):
                if updated[number]:
                    within = f"/{group.get('name', number)}" if len(groups) > 1 else ""
                    yield from self._per_task(f"{name}{within}/dominance", row)

    def _per_task(self, name: str, values: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        if values is not None:
            for t, value in enumerate(values):
                yield f"{name}/{t if self.task_names is None else self.task_names[t]}", value


def _layers(module: nn.Module) -> list[tuple[str, GramRule | BayesAgg]]:
    named = [(name.replace("_orig_mod.", ""), layer) for name, layer in module.named_modules()]
    return [(name, layer) for name, layer in named if isinstance(layer, (GramRule, BayesAgg))]


def _optimizers(trainer: Trainer) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    seen: dict[str, int] = {}
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, TaskOptimizer):
            name = type(optimizer).__name__
            number = seen[name] = seen.get(name, -1) + 1
            if all(group["dominance_decay"] is not None for group in optimizer.param_groups):
                found.append((f"{name}-{number}" if number else name, optimizer))
    return found


def _tasks(source: Any) -> int:
    return int(source.param_groups[0]["num_tasks"] if isinstance(source, TaskOptimizer) else source.num_tasks)
