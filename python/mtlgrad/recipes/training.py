"""One training: epochs, evaluation, and a state from which it continues bit for bit."""

from __future__ import annotations

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..world.ranks import world_of
from .base import Job, Result, Settings, TrainError, task_loss
from .optimizers import RATES, updates
from .parts import Batch, Part, Recipe
from .team import seed_epoch
from .weighting import METHODS, Step, Weighting, batch_losses, timed

TIME_EVERY = 20  # steps: enough for a steady median, and the extra work that is timed stays a small part of the run
EVALUATION_ROWS = 4096

#: Epoch, tick of `ticks` in it, per-task losses [T]: the mean over the epoch so far, NaN where there is none yet.
Watch = Callable[[int, int, Tensor], None]


class Training(ABC):
    """One net and one method, whatever moves the net. All follows from the job, the settings and the loaded state."""

    def __init__(self, recipe: Recipe, job: Job, settings: Settings):
        self.recipe, self.job, self.settings = recipe, job, settings
        self.tasks = recipe.tasks if job.task is None else (recipe.tasks[job.task],)
        self.split = recipe.split(job.seed)
        torch.manual_seed(job.seed)
        self.net = recipe.net(self.tasks)
        self.weighting = self.method()(self.tasks, self.net, settings).to(recipe.device)
        self.world = world_of(None)
        self.lr = RATES[job.optimizer] if settings.lr is None else settings.lr
        self.steps = math.ceil(len(self.split.rows.train) / settings.batch_size)  #: batches of an epoch, for each task
        self.ticks = self.steps  #: how often an epoch calls `watch`
        self.epoch = 0
        self.result = Result(job, [t.name for t in self.tasks], [], [], [], [], [])

    def method(self) -> type[Weighting]:
        return METHODS[self.job.method]

    @abstractmethod
    def run_epoch(self, watch: Watch) -> None:
        """One epoch and its line of history. An exception out of `watch` leaves a training that must be thrown away."""

    def rate(self, number: int) -> float:
        """The cosine schedule as a formula of the step: nothing to restore when resuming."""
        return self.lr * 0.5 * (1.0 + math.cos(math.pi * number / (self.steps * self.settings.epochs)))

    def record(
        self,
        train: Tensor,
        share: Tensor,
        dominance: dict[str, list[float]] | None,
        start: float,
        condition: float | None = None,
    ) -> None:
        """The line of history of an epoch that began at `start`."""
        train_losses = train.tolist()
        for task, loss in zip(self.tasks, train_losses, strict=True):
            if not math.isfinite(loss):
                raise TrainError(
                    f"{self.job.title(self.recipe.tasks)}: the loss of {task.name} became {loss} in epoch "
                    f"{self.epoch + 1}; lower --lr, now {self.lr:g}"
                )
        metrics, losses = self.evaluate(self.split.validation)
        self.epoch += 1
        self.result.history.append(
            {
                "epoch": self.epoch,
                "train": train_losses,
                "validation": losses,
                "metric": metrics,
                "share": share.tolist(),
                "dominance": dominance,
                "condition": condition,
                "seconds": time.perf_counter() - start,
            }
        )

    def _own(self, part: Part) -> Part:
        """A single-task net sees its own targets alone."""
        return part if self.job.task is None else part.only(self.job.task)

    @torch.no_grad()
    def evaluate(self, part: Part) -> tuple[list[float], list[float]]:
        """Per task: the metric and the loss on a whole split."""
        self.net.eval()
        part = self._own(part)
        chunks = [
            self.weighting.predict(self.net, self.net.features(*batch.inputs))
            for batch in part.batches(EVALUATION_ROWS)
        ]
        outputs = [torch.cat(column) for column in zip(*chunks, strict=True)]
        triples = list(zip(self.tasks, outputs, part.targets, strict=True))
        return [self.split.metric(*t) for t in triples], [float(task_loss(*t)) for t in triples]

    def finish(self) -> Result:
        """The result on the test split, once every epoch is done."""
        self.result.metrics, self.result.losses = self.evaluate(self.split.test)
        return self.result

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, lists and dicts alone: `torch.load(..., weights_only=True)` reads it."""
        cuda = [torch.cuda.get_rng_state(self.recipe.device)] if self.recipe.device.type == "cuda" else []
        return {
            "epoch": self.epoch,
            "net": self.net.state_dict(),
            "weighting": self.weighting.state_dict(),
            "rng": [torch.get_rng_state(), *cuda],
            "result": self.result.to_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.weighting.load_state_dict(state["weighting"])
        torch.set_rng_state(state["rng"][0])
        if self.recipe.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng"][1], self.recipe.device)
        self.epoch = state["epoch"]
        self.result = Result.from_dict(state["result"])


class Trainer(Training):
    """A method that is a weighting of the tasks in every step."""

    def __init__(self, recipe: Recipe, job: Job, settings: Settings):
        super().__init__(recipe, job, settings)
        self.updates = updates(job.optimizer, self.weighting, self.net, self.lr, TIME_EVERY)
        self.layers = recipe.layers(self.net.backbone)

    def begin_epoch(self, watch: Watch) -> None:
        self.weighting.start_epoch(self.epoch)

    def run_epoch(self, watch: Watch) -> None:
        start = time.perf_counter()
        seed_epoch(self.job.seed, self.epoch, self.world)
        before = timed(lambda: self.begin_epoch(watch), self.recipe.device)
        self.net.train()
        part = self._own(self.split.shuffled(self.epoch))
        total = torch.zeros(len(self.tasks), device=self.recipe.device)
        shares: list[Tensor] = []
        variances: list[Tensor] = []
        seen, looked = 0, len(self.result.condition)
        for i, batch in enumerate(part.batches(self.settings.batch_size, self.world)):
            total += batch.rows * self._step(self.epoch * self.steps + i, batch, shares, variances)
            seen += batch.rows
            watch(self.epoch, self.ticks - self.steps + i, total / seen)
        between = before + timed(self.weighting.end_epoch, self.recipe.device)
        if self.weighting.working:
            self.result.epoch_ms.append(between / self.steps)
        if variances:
            self.result.variance = torch.stack(variances).mean(0)
        # In a warm-up no step is timed, and the sum is what runs.
        share = torch.stack(shares).mean(0) if shares else torch.full((len(self.tasks),), 1.0 / len(self.tasks))
        conditions = self.result.condition[looked:]
        condition = statistics.median(conditions) if conditions else None
        self.record(total / seen, share, self.updates.dominance(self.layers), start, condition)

    def _step(self, number: int, batch: Batch, shares: list[Tensor], variances: list[Tensor]) -> Tensor:
        """The losses [T], of the whole batch."""
        optimizer = self.updates.optimizer
        for group in optimizer.param_groups:
            group["lr"] = self.rate(number)
        made: list[Step] = []

        def work() -> None:
            self.weighting.start_step(batch)
            features = self.net.features(*batch.inputs)
            views = self.weighting.through(features, batch.targets)
            losses = batch_losses(self.net, self.tasks, views, batch)
            optimizer.zero_grad()
            self.updates.backward(features, losses)
            optimizer.step()
            made.append(Step(self.net, batch, features.detach(), [loss.detach() for loss in losses]))

        # The last of every 20 steps, for the first of an epoch sets things up.
        timing = number % self.steps % TIME_EVERY == min(TIME_EVERY, self.steps) - 1
        if not timing or not self.weighting.working:
            work()
        else:
            jacobians = self.updates.foresee(batch)
            self.result.step_ms.append(timed(work, self.recipe.device))
            self.updates.observe(jacobians)
            self._look(made[0], shares, variances)
        return torch.stack(made[0].losses)

    def _look(self, step: Step, shares: list[Tensor], variances: list[Tensor]) -> None:
        """What the method did in a step, and how long its own part takes."""
        share, variance = self.weighting.shares(torch.stack(step.losses).cpu()), self.weighting.variance()
        shares += [share] if share is not None else []
        variances += [variance] if variance is not None else []
        system = self.weighting.system()
        if system is not None:
            self.result.condition.append(system[0])
            self.result.rank.append(system[1])
        own = self.weighting.own_work(step)
        ms = 0.0 if own is None else timed(own, self.recipe.device)
        self.result.own_ms.append(ms + self.updates.own_ms(step))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **self.updates.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.updates.load_state_dict(state)
