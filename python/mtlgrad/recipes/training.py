"""One training: the loop, its evaluation, and a state from which it continues bit for bit."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, DistributedSampler, Sampler, SequentialSampler

from ..world.ranks import world_of
from .methods import Method, make
from .recipe import Recipe, TrainError
from .tasks import Task

LOOK_EVERY = 20  #: steps, at the method's weights
SINGLE = "single"  #: a method's name for nets of one task each

#: Epoch, step of it, the tasks' losses [T]: called before each step, may raise to stop.
Watch = Callable[[int, int, Tensor], None]


@dataclass(frozen=True)
class Job:
    """One training: a method on all tasks, or a net for one of them."""

    method: str
    seed: int
    lr: float
    task: str | None = None

    @property
    def contender(self) -> str:
        return self.method if self.task is None else f"{self.task} alone"

    @property
    def title(self) -> str:
        return f"{self.contender}, seed {self.seed}, lr {self.lr:g}"


@dataclass
class Result:
    """What a training leaves behind; numbers alone, a value a task in each list."""

    job: Job
    tasks: list[str]
    history: list[dict[str, Any]] = field(default_factory=list)  #: an entry an epoch
    metrics: list[float] = field(default_factory=list)  #: on the test split, once all epochs are done
    error: str = ""  #: what ended it early; then there are no metrics

    @property
    def step_ms(self) -> float:
        """Return the median over the epochs of the time of a step, of loading its batch and of the epoch's end."""
        return sorted(line["step_ms"] for line in self.history)[len(self.history) // 2]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Result:
        return Result(**{**values, "job": Job(**values["job"])})


class _Net(nn.Module):
    """Backbone, method and heads as one forward, as DistributedDataParallel wants it."""

    def __init__(self, model: nn.Module, method: Method):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, inputs: Any, targets: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        features = features_of(self.model, inputs)
        views = self.method.views(features, targets)
        heads: Any = self.model.heads
        return features, [heads[task.name](view) for task, view in zip(self.method.tasks, views, strict=True)]


def features_of(model: nn.Module, inputs: Any) -> Tensor:
    backbone: Any = model.backbone
    if isinstance(inputs, Mapping):
        return backbone(**inputs)
    return backbone(*inputs) if isinstance(inputs, (tuple, list)) else backbone(inputs)


def moved(values: Any, device: torch.device) -> Any:
    """Bring a batch to the device, whatever its form."""
    if isinstance(values, Tensor):
        return values.to(device, non_blocking=True)
    if isinstance(values, Mapping):
        return {name: moved(value, device) for name, value in values.items()}
    return [moved(value, device) for value in values] if isinstance(values, (tuple, list)) else values


class Training:
    """One net and one method. All follows from the arguments and the loaded state; the batch is that of all ranks."""

    def __init__(
        self,
        recipe: Recipe,
        job: Job,
        epochs: int,
        batch_size: int,
        device: torch.device,
        preference: Sequence[float] | None = None,
    ):
        self.recipe, self.job, self.epochs, self.device = recipe, job, epochs, device
        self.tasks: list[Task] = [t for t in recipe.tasks if job.task in (None, t.name)]
        self.world = world_of(None)
        self.batch_size = max(1, batch_size // self.world.size)
        torch.manual_seed(job.seed)
        self.model = recipe.model().to(device)
        heads: Any = getattr(self.model, "heads", {})
        missing = [task.name for task in recipe.tasks if task.name not in heads]
        if missing or not hasattr(self.model, "backbone"):
            found = f"no head for {', '.join(missing)}" if missing else "no backbone"
            raise TrainError(f"{type(recipe).__name__}.model: expected .backbone, and .heads by task, found {found}")
        for name in heads:
            if all(task.name != name for task in self.tasks):
                heads[name].requires_grad_(False)
        self.method = self.make_method(preference if job.task is None else None).to(device)
        self.result = Result(job, [task.name for task in self.tasks])
        rows: Any = recipe.train
        size, rank = self.world.size, self.world.rank
        self.sampler: DistributedSampler[int] = DistributedSampler(rows, size, rank, seed=job.seed * 1_000_003)
        self.loader = recipe.loader(recipe.train, self.sampler, self.batch_size)
        self.steps = len(self.loader)
        self.ticks = self.steps  #: calls of `watch` in an epoch, at most
        self.net = _Net(self.model, self.method)
        self.begin()

    def make_method(self, preference: Sequence[float] | None) -> Method:
        name = "sum" if self.job.method == SINGLE else self.job.method
        return make(name, self.tasks, self.model, self.epochs, preference)

    def begin(self) -> None:
        """Make what moves the model."""
        parameters = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = self.method.optimizer(parameters, self.job.lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.decay)
        self.forward: nn.Module = self.net
        if self.world.size > 1 and not self.method.per_task:
            self.forward = DistributedDataParallel(self.net, [self.device] if self.device.type == "cuda" else None)

    def decay(self, step: int) -> float:
        """Return the cosine schedule's factor."""
        return 0.5 * (1.0 + math.cos(math.pi * step / (self.steps * self.epochs)))

    @property
    def epoch(self) -> int:
        return len(self.result.history)

    def run_epoch(self, watch: Watch) -> None:
        """Run an epoch, and add its entry to the history. An exception leaves a training that must be thrown away."""
        self.seed_epoch()
        start = time.perf_counter()
        train, share = self.train_epoch(watch)
        seconds = time.perf_counter() - start
        for task, loss in zip(self.tasks, train, strict=True):
            if not math.isfinite(loss):
                raise TrainError(f"the loss of {task.name} became {loss} in epoch {self.epoch + 1}; lower --lr")
        metrics, losses = self.evaluate(self.recipe.validation)
        line: dict[str, Any] = {"train": train, "validation": losses, "metric": metrics, "share": share}
        line |= {"step_ms": 1e3 * seconds / self.steps, "dominance": self.dominance()}
        self.result.history.append(line)

    def seed_epoch(self) -> None:
        """Draw what follows (order, dropout, augmentation) from seed, epoch and rank: resuming restores nothing."""
        seed = (self.job.seed * 1_000_003 + self.epoch) * 4096 + self.world.rank
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        self.sampler.set_epoch(self.epoch)
        if self.loader.generator is not None:
            self.loader.generator.manual_seed(seed)

    def train_epoch(self, watch: Watch) -> tuple[list[float], list[float] | None]:
        """Return the losses, means over the epoch, and each task's share of the weights."""
        self.method.start_epoch(self.epoch)
        self.net.train()
        total, shares = torch.zeros(len(self.tasks), dtype=torch.float64, device=self.device), []
        for step, (inputs, targets) in enumerate(self.loader):
            watch(self.epoch, step, total / max(step, 1))
            targets = moved(targets, self.device)
            features, outputs = self.forward(moved(inputs, self.device), targets)
            losses = self.losses(outputs, targets)
            self.optimizer.zero_grad()
            self.method.backward(losses, features, self.model.backbone)  # type: ignore[arg-type]
            self.optimizer.step()
            self.schedule.step()
            total += torch.stack(losses).detach()
            if step % LOOK_EVERY == 0 and self.method.share is not None:
                shares.append(self.method.share.cpu())
        self.method.end_epoch()
        if self.world.size > 1:
            for buffer in self.model.buffers():  # DistributedDataParallel has done so where it was
                dist.broadcast(buffer, 0)
        means = self.world.mean_(total / self.steps).tolist()
        return means, self.world.mean_(torch.stack(shares).mean(0)).tolist() if shares else None

    def losses(self, outputs: Sequence[Tensor], targets: dict[str, Tensor]) -> list[Tensor]:
        losses = [task.loss(output, targets[task.name]) for task, output in zip(self.tasks, outputs, strict=True)]
        for task, loss in zip(self.tasks, losses, strict=True):
            if loss.dim():
                raise TrainError(f"task {task.name!r}: expected a loss that is a scalar, found shape {[*loss.shape]}")
        return losses

    def dominance(self) -> dict[str, list[float]] | None:
        """Return each layer's shares of the tasks in its squared updates, of the optimizers that keep count."""
        if not hasattr(self.optimizer, "dominance"):
            return None
        backbone: Any = self.model.backbone
        layers: dict[str, list[Any]] = {}
        for name, layer in backbone.named_children():
            if parameters := [p for p in layer.parameters() if p.requires_grad]:
                layers[f"backbone.{name}"] = parameters
        shares: Tensor = self.optimizer.dominance(layers)
        return dict(zip(layers, shares.tolist(), strict=True))

    def batches(self, data: Dataset[Any]) -> Iterator[tuple[Any, dict[str, Tensor]]]:
        """Yield a split whole, in its order, on every rank: nothing has to travel for a metric."""
        sampler: Sampler[int] = SequentialSampler(data)  # type: ignore[arg-type]
        for inputs, targets in self.recipe.loader(data, sampler, self.recipe.evaluation_batch_size):
            yield moved(inputs, self.device), moved(targets, self.device)

    @torch.no_grad()
    def evaluate(self, data: Dataset[Any]) -> tuple[list[float], list[float]]:
        """Return the tasks' metrics and losses on a whole split; losses are means over the batches."""
        self.net.eval()
        metrics = [task.metric() for task in self.tasks]
        total, count = torch.zeros(len(self.tasks), dtype=torch.float64, device=self.device), 0
        for inputs, targets in self.batches(data):
            features = features_of(self.model, inputs)
            heads: Any = self.model.heads
            outputs = self.method.predict(features, [heads[task.name](features) for task in self.tasks])
            total += torch.stack(self.losses(outputs, targets))
            count += 1
            for task, metric, output in zip(self.tasks, metrics, outputs, strict=True):
                metric.update(output, targets[task.name])
        values = [task.scale * metric.value() for task, metric in zip(self.tasks, metrics, strict=True)]
        return values, (total / max(count, 1)).tolist()

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers, strings, lists and dicts alone: ``torch.load(..., weights_only=True)`` reads it."""
        return {"net": self.net.state_dict(), "result": self.result.to_dict(), **self.moving_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.load_moving_state(state)
        self.result = Result.from_dict(state["result"])

    def moving_state(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "schedule": {"last_epoch": self.schedule.last_epoch}}

    def load_moving_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.last_epoch = state["schedule"]["last_epoch"]

    def finish(self) -> Result:
        """Return the result, with the test split's metrics, once every epoch is done."""
        self.result.metrics, _ = self.evaluate(self.recipe.test)
        return self.result
