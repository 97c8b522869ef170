"""One training: epochs, evaluation, and a state from which it continues bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .base import Job, Part, Result, Settings, TrainError, task_loss
from .clothing import Clothing
from .weighting import METHODS, timed

TIME_EVERY = 20  # steps: enough for a steady median, and the extra work that is timed stays a small part of the run
EVALUATION_ROWS = 4096

Watch = Callable[[int, int, Tensor], None]  # epoch, step, per-task losses [T], the mean over the epoch so far


class Trainer:
    """Trains one net with one method. Everything follows from the job, the settings and the loaded state."""

    def __init__(self, recipe: Clothing, job: Job, settings: Settings):
        self.recipe, self.job, self.settings = recipe, job, settings
        self.tasks = recipe.tasks if job.task is None else (recipe.tasks[job.task],)
        torch.manual_seed(job.seed)
        self.net = recipe.net(self.tasks)
        self.weighting = METHODS[job.method](self.tasks, self.net, settings).to(recipe.device)
        parameters = [*self.net.parameters(), *self.weighting.parameters()]
        # fused: one pass over the embeddings instead of ten, a quarter of the step.
        self.optimizer = torch.optim.Adam(parameters, lr=settings.lr, fused=True)
        self.steps = math.ceil(len(recipe.train_rows) / settings.batch_size)
        self.epoch = 0
        self.result = Result(job, [t.name for t in self.tasks], [], [], [], [], [])

    def run_epoch(self, watch: Watch) -> None:
        """One epoch and its line of history. An exception out of `watch` leaves a trainer that must be thrown away."""
        start = time.perf_counter()
        self.net.train()
        self.weighting.start_epoch(self.epoch)
        part = self._targets(self.recipe.shuffled(self.job.seed, self.epoch))
        total = torch.zeros(len(self.tasks), device=self.recipe.device)
        shares: list[Tensor] = []
        variances: list[Tensor] = []
        seen = 0
        for i, batch in enumerate(part.batches(self.settings.batch_size)):
            rows = len(batch[1]) - 1
            total += rows * self._step(self.epoch * self.steps + i, batch, shares, variances)
            seen += rows
            watch(self.epoch, i, total / seen)
        self._end_epoch(total / seen, shares, variances, start)

    def _step(self, step: int, batch: Any, shares: list[Tensor], variances: list[Tensor]) -> Tensor:
        tokens, offsets, targets = batch
        # The cosine schedule as a formula of the step: nothing to restore when resuming.
        lr = self.settings.lr * 0.5 * (1.0 + math.cos(math.pi * step / (self.steps * self.settings.epochs)))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        kept: list[Any] = []

        def work() -> None:
            features = self.weighting.through(self.net.features(tokens, offsets), targets)
            outputs = self.net.outputs(features)
            losses = [task_loss(t, o, y) for t, o, y in zip(self.tasks, outputs, targets, strict=True)]
            self.optimizer.zero_grad()
            self.weighting.total(losses).backward()
            self.optimizer.step()
            kept.extend((features.detach(), losses))

        # The last of every 20 steps, for the first of an epoch sets things up.
        timing = step % self.steps % TIME_EVERY == min(TIME_EVERY, self.steps) - 1
        if not timing or not self.weighting.working:
            work()
        else:
            milliseconds = timed(work, self.recipe.device)
            features, losses = kept
            current = torch.stack(losses).detach().cpu()
            share, variance = self.weighting.shares(current), self.weighting.variance()
            own = timed(lambda: self.weighting.own_work(features, targets, losses), self.recipe.device)
            self.result.step_ms.append(milliseconds)
            self.result.own_ms.append(own)
            shares += [share] if share is not None else []
            variances += [variance] if variance is not None else []
        return torch.stack(kept[1]).detach()

    def _end_epoch(self, train: Tensor, shares: list[Tensor], variances: list[Tensor], start: float) -> None:
        between = timed(self.weighting.end_epoch, self.recipe.device)
        if self.weighting.working:
            self.result.epoch_ms.append(between / self.steps)
        train_losses = train.tolist()
        for task, loss in zip(self.tasks, train_losses, strict=True):
            if not math.isfinite(loss):
                title, lr = self.job.title(self.recipe.tasks), self.settings.lr
                raise TrainError(
                    f"{title}: the loss of {task.name} became {loss} in epoch {self.epoch + 1}; lower --lr, now {lr:g}"
                )
        metrics, losses = self.evaluate(self.recipe.validation)
        # In a warm-up no step is timed, and the sum is what runs.
        share = torch.stack(shares).mean(0) if shares else torch.full((len(self.tasks),), 1.0 / len(self.tasks))
        if variances:
            self.result.variance = torch.stack(variances).mean(0)
        self.epoch += 1
        self.result.history.append(
            {
                "epoch": self.epoch,
                "train": train_losses,
                "validation": losses,
                "metric": metrics,
                "share": share.tolist(),
                "seconds": time.perf_counter() - start,
            }
        )

    def _targets(self, part: Part) -> Part:
        """A single-task net sees its own targets alone."""
        if self.job.task is None:
            return part
        return Part(part.tokens, part.offsets, [part.targets[self.job.task]])

    @torch.no_grad()
    def evaluate(self, part: Part) -> tuple[list[float], list[float]]:
        """Per task: the metric and the loss on a whole split."""
        self.net.eval()
        part = self._targets(part)
        chunks = []
        for tokens, offsets, _ in part.batches(EVALUATION_ROWS):
            chunks.append(self.weighting.predict(self.net, self.net.features(tokens, offsets)))
        outputs = [torch.cat(column) for column in zip(*chunks, strict=True)]
        triples = list(zip(self.tasks, outputs, part.targets, strict=True))
        return [self.recipe.metric(*t) for t in triples], [float(task_loss(*t)) for t in triples]

    def finish(self) -> Result:
        """The result on the test split, once every epoch is done."""
        self.result.metrics, self.result.losses = self.evaluate(self.recipe.test)
        return self.result

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, lists and dicts alone: `torch.load(..., weights_only=True)` reads it."""
        cuda = [torch.cuda.get_rng_state(self.recipe.device)] if self.recipe.device.type == "cuda" else []
        return {
            "epoch": self.epoch,
            "net": self.net.state_dict(),
            "weighting": self.weighting.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": [torch.get_rng_state(), *cuda],
            "result": self.result.to_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.weighting.load_state_dict(state["weighting"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"][0])
        if self.recipe.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng"][1], self.recipe.device)
        self.epoch = state["epoch"]
        self.result = Result.from_dict(state["result"])
