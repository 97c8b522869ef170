"""alphaVIL in the comparison: rounds in which every task trains by itself, weighed by what that is worth to one.

What it goes by, the target's development loss, is that of the validation split: to it that is no fresh data any more.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import alphavil
from .recipe import Recipe
from .training import Job, Training, Watch, features_of, moved

#: Rounds of an epoch; each task trains on as large a part of the batches in each.
ROUNDS = 2
#: Steps on alpha: a few numbers and a loss without noise, for which a line search with curvature is made.
make_alpha_optimizer = partial(torch.optim.LBFGS, lr=1.0, max_iter=10, line_search_fn="strong_wolfe")


@dataclass(frozen=True)
class _Anew:
    """Batches that every pass makes anew."""

    make: Callable[[], Iterator[Any]]

    def __iter__(self) -> Iterator[Any]:
        return self.make()


class AlphaVILTraining(Training):
    """:class:`mtlgrad.AlphaVIL`: the rounds of an epoch, taken together, show each task every training row once."""

    def __init__(self, recipe: Recipe, job: Job, epochs: int, batch_size: int, device: torch.device, target: str):
        self.target = target
        super().__init__(recipe, job, epochs, batch_size, device)

    def begin(self) -> None:
        self.rounds = min(ROUNDS, self.steps)
        self.bounds = [self.steps * i // self.rounds for i in range(self.rounds + 1)]
        self.ticks = len(self.tasks) * self.steps
        self.done = 0  # batches of this epoch
        tasks = {
            task.name: alphavil.Task(
                train=_Anew(partial(self._train_batches, number)),
                loss=partial(self._loss, number),
                dev=_Anew(self._development_batches) if task.name == self.target else None,
                head=self.model.heads[task.name],  # type: ignore[index]
            )
            for number, task in enumerate(self.tasks)
        }
        self.vil = alphavil.AlphaVIL(
            self.model,
            tasks,
            self.target,
            make_optimizer=self._make_optimizer,
            alpha_optimizer=make_alpha_optimizer,
            alpha_epochs=1,
            subset=self.steps,  # all that `_train_batches` has for a round
            # The other tasks' heads keep up with what their own trainings make of them, and can go on being judged.
            include_heads="none",
        )

    def _make_optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        self.optimizer = torch.optim.Adam(parameters, lr=self.job.lr, fused=True)
        return self.optimizer

    def _loss(self, number: int, model: nn.Module, batch: tuple[Any, dict[str, Tensor]]) -> Tensor:
        task, (inputs, targets) = self.tasks[number], batch
        heads: Any = self.model.heads
        return task.loss(heads[task.name](features_of(self.model, inputs)), targets[task.name])

    def _train_batches(self, number: int) -> Iterator[Any]:
        """Yield a round's part of the epoch's order, which each task has its own of."""
        part = self.vil.rounds % self.rounds
        self.sampler.set_epoch(self.epoch * (len(self.tasks) + 1) + 1 + number)
        for step, (inputs, targets) in enumerate(self.loader):
            if step >= self.bounds[part + 1]:
                return
            if step < self.bounds[part]:
                continue
            self.watch(self.epoch, self.done, torch.full((len(self.tasks),), torch.nan))
            self.done += 1
            for group in self.optimizer.param_groups:
                group["lr"] = self.job.lr * self.decay(self.epoch * self.steps + step)
            yield moved(inputs, self.device), moved(targets, self.device)

    def _development_batches(self) -> Iterator[Any]:
        """Yield the validation split, every rank the whole of it."""
        for batch in self.batches(self.recipe.validation):
            self.watch(self.epoch, self.done, torch.full((len(self.tasks),), torch.nan))
            yield batch

    def train_epoch(self, watch: Watch) -> tuple[list[float], list[float] | None]:
        self.watch, self.done = watch, 0
        sums, counts = torch.zeros(2, len(self.tasks), dtype=torch.float64)
        shares = []
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "AlphaVIL: ", RuntimeWarning)  # alphas tell the same
            for _ in range(self.rounds):
                weights = self.vil.task_weights.abs()
                shares.append(weights / weights.sum().clamp_min(1e-12))
                self.vil.epoch()
                assert self.vil.last is not None
                for number, loss in enumerate(self.vil.last.losses):
                    if number not in self.vil.last.sat_out:
                        sums[number] += loss
                        counts[number] += 1
        return (sums / counts).tolist(), torch.stack(shares).mean(0).tolist()

    def moving_state(self) -> dict[str, Any]:
        return {"alphavil": self.vil.state_dict()}

    def load_moving_state(self, state: dict[str, Any]) -> None:
        self.vil.load_state_dict(state["alphavil"])
