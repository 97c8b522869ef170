"""Methods that train every task by itself, to learn what that is worth to one of them: alphaVIL and diw.

What they go by, the target's development loss, is that of the validation split: for them it is no fresh data any more.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn

from .. import alphavil
from .base import Job, MultiTaskNet, Round, Settings, Task, task_loss
from .parts import Batch, Recipe
from .team import seed_epoch
from .training import Trainer, Training, Watch
from .weighting import Weighting

#: alphaVIL's learning rate, unless the user says otherwise.
RATE = 1e-3
#: Steps on alphaVIL's deltas and on diw's trials: of parameters, a fresh one for each task and round.
make_optimizer = partial(torch.optim.Adam, fused=True)
#: Steps on alpha: a few numbers and a loss without noise, for which a line search with curvature is made.
make_alpha_optimizer = partial(torch.optim.LBFGS, lr=1.0, max_iter=10, line_search_fn="strong_wolfe")
#: Rows of alphaVIL's development batches, at most: so that LBFGS sees one loss, all of them where memory allows it.
DEVELOPMENT_ROWS = 8192


@dataclass(frozen=True)
class _Anew:
    """Batches that every pass makes anew."""

    make: Callable[[], Iterator[Batch]]

    def __iter__(self) -> Iterator[Batch]:
        return self.make()


class AlphaVILTraining(Training):
    """:class:`mtlgrad.AlphaVIL`: the rounds of an epoch, taken together, show each task every training row once."""

    def __init__(self, recipe: Recipe, job: Job, settings: Settings):
        super().__init__(recipe, job, settings)
        if settings.lr is None:
            self.lr = RATE
        rounds = min(self.steps, max(1, round(1 / settings.subset)))
        self.bounds = [self.steps * i // rounds for i in range(rounds + 1)]  #: batches where the rounds begin and end
        self.target = self.result.tasks.index(settings.target or "")
        rows = len(self.split.validation)
        self.development = list(self.split.validation.batches(-(-rows // -(-rows // DEVELOPMENT_ROWS)), self.world))
        # A search looks at them before it, at its start, and twice an epoch, to step and to judge.
        self.looks = (2 + 2 * settings.alpha_epochs) * len(self.development)
        self.ticks = len(self.tasks) * self.steps + rounds * self.looks
        self.tick = 0
        self.sums, self.counts = torch.zeros(2, len(self.tasks), dtype=torch.float64)  # of this epoch's training losses
        self.optimizer: torch.optim.Optimizer | None = None
        tasks = {
            task.name: alphavil.Task(
                train=_Anew(partial(self._batches, t)),
                loss=partial(self._loss, t),
                dev=_Anew(self._look) if t == self.target else None,
                head=head,
            )
            for t, (task, head) in enumerate(zip(self.tasks, self.net.heads, strict=True))
        }
        self.vil = alphavil.AlphaVIL(
            self.net,
            tasks,
            self.target,
            make_optimizer=self._optimizer,
            alpha_optimizer=make_alpha_optimizer,
            alpha_epochs=settings.alpha_epochs,
            subset=self.steps,  # all that `_batches` has for a round
            # The other tasks' heads keep up with what their own trainings make of them, and can go on being judged.
            include_heads="none",
        )

    def method(self) -> type[Weighting]:
        return Weighting  # the outputs are those of the heads

    def _optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        self.optimizer = make_optimizer(parameters, lr=self.lr)
        return self.optimizer

    def _loss(self, t: int, net: nn.Module, batch: Any) -> Tensor:
        output = self.net.heads[t](self.net.features(*batch.inputs))
        return task_loss(self.tasks[t], output, batch.targets[t], batch.divisor)

    def _batches(self, t: int) -> Iterator[Batch]:
        """A round's part of the epoch's order, which each task has its own of."""
        size, i = self.settings.batch_size, self.vil.rounds % (len(self.bounds) - 1)
        part = self.split.shuffled(self.epoch, 1 + t, slice(size * self.bounds[i], size * self.bounds[i + 1]))
        for number, batch in enumerate(part.batches(size, self.world), self.epoch * self.steps + self.bounds[i]):
            self._tell()
            assert self.optimizer is not None
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(number)
            yield batch

    def _look(self) -> Iterator[Batch]:
        for batch in self.development:
            self._tell()
            yield batch

    def _tell(self) -> None:
        self.watch(self.epoch, self.tick, self.sums / self.counts)
        self.tick += 1

    def run_epoch(self, watch: Watch) -> None:
        start = time.perf_counter()
        self.watch = watch
        seed_epoch(self.job.seed, self.epoch, self.world)
        self.sums.zero_()
        self.counts.zero_()
        shares = []
        with warnings.catch_warnings():
            # The rounds' records say the same; report.py counts them.
            warnings.filterwarnings("ignore", "AlphaVIL: ", RuntimeWarning)
            for i, (first, last) in enumerate(pairwise(self.bounds)):
                # A search that ended early leaves out ticks.
                self.tick = len(self.tasks) * first + i * self.looks
                weights = self.vil.task_weights.abs()
                shares.append(weights / weights.sum().clamp_min(1e-12))
                self._round(last - first)
        self.record(self.sums / self.counts, torch.stack(shares).mean(0), None, start)

    def _round(self, batches: int) -> None:
        seconds = {True: 0.0, False: 0.0}
        last = time.perf_counter()
        for stage in self.vil.stages():  # each ends by reading a number off the device
            now = time.perf_counter()
            seconds[stage.kind == "train"] += now - last
            last = now
        # A step is a batch of every task, as with the other methods.
        self.result.step_ms.append(1e3 * seconds[True] / batches)
        self.result.epoch_ms.append(1e3 * seconds[False] / batches)
        done = self.vil.last
        assert done is not None
        sat_out = [t in done.sat_out for t in range(len(self.tasks))]
        for t, loss in enumerate(done.losses):
            if not sat_out[t]:
                self.sums[t] += batches * loss
                self.counts[t] += batches
        self.result.rounds.append(
            Round(
                alphas=done.alphas.tolist(),
                weights=self.vil.task_weights.tolist(),
                sat_out=sat_out,
                kept=done.kept,
                before=done.before,
                after=[done.after] * len(self.tasks),
            )
        )

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "alphavil": self.vil.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.vil.load_state_dict(state["alphavil"])


class Discriminative(Weighting):
    """sum_t w_t L_t, the weights those of :class:`DiscriminativeTraining`."""

    name = "diw"
    weights: Tensor

    def __init__(self, tasks: tuple[Task, ...], net: MultiTaskNet, settings: Settings):
        super().__init__(tasks, net, settings)
        self.register_buffer("weights", torch.ones(len(tasks)))

    def formula(self, losses: Tensor, task: int | EllipsisType = ...) -> Tensor:
        return self.weights[task] * losses

    def shares(self, losses: Tensor) -> Tensor | None:
        weights = self.weights.cpu()
        return weights / weights.sum().clamp_min(1e-12)


class DiscriminativeTraining(Trainer):
    """Discriminative importance weighting, as we read it.

    The alphaVIL paper compares itself with a baseline of this name. Its definition could not be verified here, so the
    rule is our own: before each epoch every task, the target too, is trained by itself, from the same parameters, on a
    sampled part of its data. With the target's development loss l before that, and l_t after it,

        w_t <- max(0, w_t + (l - l_t) / l),    w_t = 1 at first.

    Then the parameters are put back, and the epoch trains all tasks on sum_t w_t L_t. The target's weight is learned as
    the others' are; it tends to grow fastest, since nothing lowers its loss like its own training. A task whose trial
    comes to NaN or infinity keeps its weight.
    """

    weighting: Discriminative

    def __init__(self, recipe: Recipe, job: Job, settings: Settings):
        super().__init__(recipe, job, settings)
        self.target = self.result.tasks.index(settings.target or "")
        self.tried = max(1, round(self.steps * settings.subset))  #: batches of a trial
        self.ticks = self.steps + len(self.tasks) * self.tried

    def method(self) -> type[Weighting]:
        return Discriminative

    def begin_epoch(self, watch: Watch) -> None:
        super().begin_epoch(watch)
        start = {name: value.clone() for name, value in self.net.state_dict().items()}
        before = self._development_loss()
        after = []
        for t in range(len(self.tasks)):
            self._try(t, watch)
            after.append(self._development_loss())
            self.net.load_state_dict(start)
        gains = (before - torch.tensor(after)) / before
        weights, finite = self.weighting.weights, gains.isfinite()
        weights += torch.where(finite, gains, 0.0).to(weights)
        weights.clamp_min_(0.0)
        self.result.rounds.append(
            Round(
                alphas=None,
                weights=weights.tolist(),
                sat_out=(~finite).tolist(),
                kept=None,
                before=before,
                after=after,
            )
        )

    def _try(self, t: int, watch: Watch) -> None:
        size, unknown = self.settings.batch_size, torch.full((len(self.tasks),), torch.nan)
        head = self.net.heads[t]
        trained = [*self.net.backbone.parameters(), *head.parameters()]
        optimizer = make_optimizer(trained, lr=self.lr)
        self.net.train()
        part = self.split.shuffled(self.epoch, 1 + t, slice(size * self.tried))
        for i, batch in enumerate(part.batches(size, self.world)):
            watch(self.epoch, t * self.tried + i, unknown)
            for group in optimizer.param_groups:
                group["lr"] = self.rate(self.epoch * self.steps + i)
            optimizer.zero_grad()
            output = head(self.net.features(*batch.inputs))
            task_loss(self.tasks[t], output, batch.targets[t], batch.divisor).backward()
            self.world.average_gradients(trained)
            optimizer.step()

    def _development_loss(self) -> float:
        return self.evaluate(self.split.validation)[1][self.target]


ROUNDS: dict[str, type[Training]] = {"alphavil": AlphaVILTraining, "diw": DiscriminativeTraining}


def training(recipe: Recipe, job: Job, settings: Settings) -> Training:
    return ROUNDS.get(job.method, Trainer)(recipe, job, settings)
