"""The methods that ``mtlgrad train`` compares, behind one small interface.

A training step is: ``views = w.through(features, targets)``, each head on its view, losses,
``w.backward(net, features, losses)``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import EllipsisType
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from .. import ops
from ..aligned import AlignedMTL
from ..jacobian import task_backward
from .base import MultiTaskNet, Settings, Task
from .parts import Batch
from .team import with_global_values


class Step(NamedTuple):
    """A step that was made, for a method to do its own part of it once more."""

    net: MultiTaskNet
    batch: Batch
    features: Tensor  #: [B, D], detached
    losses: list[Tensor]  #: detached


class Weighting(nn.Module):
    """The plain sum, and the defaults of the others."""

    name = "sum"
    #: Whether what is minimised is a sum of a term a task: then the tasks' gradients can be kept apart.
    sums: ClassVar[bool] = True
    #: Whether `backward` leaves means over the ranks, if there are several.
    averages: ClassVar[bool] = False

    def __init__(self, tasks: tuple[Task, ...], net: MultiTaskNet, settings: Settings):
        super().__init__()
        self.tasks = tasks

    def start_step(self, batch: Batch) -> None:
        """Called before a step."""

    def through(self, features: Tensor, targets: list[Tensor]) -> Sequence[Tensor]:
        """Stands between backbone and heads: [B, D] -> what each head gets, T times [B, D]."""
        return [features] * len(self.tasks)

    def formula(self, losses: Tensor, task: int | EllipsisType = ...) -> Tensor:
        """What is summed: of all tasks, [T] -> [T], or of one, [] -> []."""
        return losses

    def total(self, losses: list[Tensor]) -> Tensor:
        return self.formula(torch.stack(losses)).sum()

    def terms(self, losses: list[Tensor]) -> list[Tensor]:
        """The total's terms, one a task: each is computed from its own loss alone."""
        return [self.formula(loss, t) for t, loss in enumerate(losses)]

    def backward(self, net: MultiTaskNet, features: Tensor, losses: list[Tensor]) -> None:
        """Gives every parameter its gradient."""
        self.total(losses).backward()

    def predict(self, net: MultiTaskNet, features: Tensor) -> list[Tensor]:
        return net.outputs([features] * len(self.tasks))

    def start_epoch(self, epoch: int) -> None:
        """Called before the first step of epoch 0, 1, ..."""

    def end_epoch(self) -> None:
        """Called after the last step of an epoch."""

    @property
    def working(self) -> bool:
        """False while the method does nothing yet (warm-up): such steps say nothing about its cost."""
        return True

    def shares(self, losses: Tensor) -> Tensor | None:
        """How the tasks are weighed at the moment, [T], absolute values summing to one; None where nothing is known."""
        return torch.full((len(self.tasks),), 1.0 / len(self.tasks))

    def variance(self) -> Tensor | None:
        """[T, D] gradient variance of the last backward; None where the method has no such thing."""
        return None

    def system(self) -> tuple[float, int] | None:
        """Condition number and rank of the last backward's task gradients; None where the method has no such thing."""
        return None

    def own_work(self, step: Step) -> Callable[[], object] | None:
        """A call that does once more what the method adds to a step, and nothing else: it is timed. None if nothing."""
        return None


class _OverLosses(Weighting):
    """Methods that are a formula over the losses; their own work is that formula, forth and back."""

    def own_work(self, step: Step) -> Callable[[], object] | None:
        leaves = [loss.clone().requires_grad_() for loss in step.losses]
        return lambda: torch.autograd.grad(self.total(leaves), leaves)


class Uncertainty(_OverLosses):
    """Kendall et al., CVPR 2018: exp(-s) L + s / 2 per task (exp(-s) L / 2 for regression), s = log sigma^2 learned."""

    name = "uncertainty"
    factor: Tensor

    def __init__(self, tasks: tuple[Task, ...], net: MultiTaskNet, settings: Settings):
        super().__init__(tasks, net, settings)
        self.log_variance = nn.Parameter(torch.zeros(len(tasks)))
        self.register_buffer("factor", torch.tensor([0.5 if t.kind == "regression" else 1.0 for t in tasks]), False)

    def formula(self, losses: Tensor, task: int | EllipsisType = ...) -> Tensor:
        return self._weights()[task] * losses + 0.5 * self.log_variance[task]

    def _weights(self) -> Tensor:
        return self.factor * torch.exp(-self.log_variance)

    def shares(self, losses: Tensor) -> Tensor | None:
        weights = self._weights().detach().cpu()
        return weights / weights.sum()


class LogSum(_OverLosses):
    """The sum of the logarithms of the losses (the geometric mean's gradient): each task is weighed by 1 / loss."""

    name = "logsum"

    def formula(self, losses: Tensor, task: int | EllipsisType = ...) -> Tensor:
        # A loss of exactly zero would make the gradient infinite.
        return losses.clamp_min(1e-12).log()

    def shares(self, losses: Tensor) -> Tensor | None:
        weights = 1.0 / losses.clamp_min(1e-12)
        return weights / weights.sum()


class _Alignment(Weighting):
    """What both forms of Aligned-MTL share."""

    sums = False

    def __init__(self, tasks: tuple[Task, ...], net: MultiTaskNet, settings: Settings):
        super().__init__(tasks, net, settings)
        self.aligned = AlignedMTL(len(tasks), settings.preference, settings.scale)

    def shares(self, losses: Tensor) -> Tensor | None:
        """Negative where alignment turns the update against a task's gradient, for the good of the others."""
        if self.aligned.weights is None:
            return None
        weights = self.aligned.weights.float().cpu()
        return weights / weights.abs().sum()

    def system(self) -> tuple[float, int] | None:
        condition, rank = self.aligned.condition_number, self.aligned.rank
        return None if condition is None or rank is None else (float(condition), int(rank))

    def _merged(self, rows: Sequence[Any]) -> object:
        """As in `AlignedMTL`, whose record of the last backward stays as it is."""
        return ops.merge(rows, self.aligned.preference, self.aligned.scale)


class Aligned(_Alignment):
    """Aligned-MTL of the tasks' gradients on the backbone's parameters: one backward per task through the backbone."""

    name = "aligned"
    averages = True  # as `task_backward` does

    def backward(self, net: MultiTaskNet, features: Tensor, losses: list[Tensor]) -> None:
        shared = list(net.backbone.parameters())
        task_backward(losses, shared, features=features)
        self.aligned.merge(shared)

    def own_work(self, step: Step) -> Callable[[], object] | None:
        """All passes through the backbone but one, the Gram matrix, the alignment and the weighted sum."""
        shared = list(step.net.backbone.parameters())
        incoming = at_features(self.tasks, step)
        with forked(step.features.device):  # dropout draws again
            features = step.net.features(*step.batch.inputs)

        def passed_back(gradient: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(features, shared, gradient, retain_graph=True)

        first = passed_back(incoming[0])
        return lambda: self._merged([first, *(passed_back(gradient) for gradient in incoming[1:])])


class AlignedAtFeatures(_Alignment):
    """Aligned-MTL's upper-bound form, a layer: the gradients at the shared representation, in one ordinary backward."""

    name = "aligned-ub"

    def through(self, features: Tensor, targets: list[Tensor]) -> Sequence[Tensor]:
        return cast("Sequence[Tensor]", self.aligned(features))

    def own_work(self, step: Step) -> Callable[[], object] | None:
        """The Gram matrix, the alignment and the weighted sum."""
        rows = at_features(self.tasks, step)
        return lambda: self._merged(rows)


class BayesAggregation(Weighting):
    """BayesAgg-MTL, after `warmup` epochs of plain sum."""

    name = "bayesagg"
    sums = False
    refreshes: Tensor

    def __init__(self, tasks: tuple[Task, ...], net: MultiTaskNet, settings: Settings):
        super().__init__(tasks, net, settings)
        from .. import BayesAgg, Binary, Multiclass, Regression

        kinds = {"regression": Regression, "binary": Binary, "multiclass": Multiclass}
        power = dict(zip(kinds, (settings.power[0], settings.power[1], settings.power[1]), strict=True))
        heads = cast("list[nn.Linear]", list(net.heads))
        self.bayes = BayesAgg(
            [
                kinds[task.kind](head, gamma=settings.gamma, power=power[task.kind])
                for task, head in zip(tasks, heads, strict=True)
            ],
            covariance=settings.covariance,
        )
        self.warmup = settings.warmup
        self.batch: Batch | None = None  # at hand
        self.watching = False  # whether this epoch's batches go through the layer
        self.register_buffer("refreshes", torch.zeros((), dtype=torch.int64))

    @property
    def working(self) -> bool:
        return int(self.refreshes) > 0

    def start_epoch(self, epoch: int) -> None:
        # The last epoch of the warm-up shows the layer the data for its first posterior; before, it is left out.
        self.watching = epoch >= self.warmup - 1

    def start_step(self, batch: Batch) -> None:
        self.batch = batch

    def through(self, features: Tensor, targets: list[Tensor]) -> Sequence[Tensor]:
        return super().through(self.bayes(features, targets) if self.watching else features, targets)

    def total(self, losses: list[Tensor]) -> Tensor:
        return self.bayes.total(losses) if self.watching else super().total(losses)

    def end_epoch(self) -> None:
        if self.watching:
            self.bayes.refresh()
            self.refreshes += 1

    def predict(self, net: MultiTaskNet, features: Tensor) -> list[Tensor]:
        if not self.working:
            return super().predict(net, features)
        return [output.reshape(len(features), -1) for output in self.bayes.predict(features)]

    def shares(self, losses: Tensor) -> Tensor | None:
        if not self.working:
            return super().shares(losses)
        weights = self.bayes.task_weights
        return None if weights is None else self._of_all_ranks(weights)

    def variance(self) -> Tensor | None:
        variance = self.bayes.gradient_variance if self.working else None
        return None if variance is None else self._of_all_ranks(variance)

    def _of_all_ranks(self, mean: Tensor) -> Tensor:
        """The mean over all ranks' rows, from that over this rank's."""
        mean, batch = mean.detach().float(), self.batch
        if batch is not None and batch.world.size > 1:
            own = mean * batch.own if batch.own else torch.zeros_like(mean)  # NaN of none
            mean = batch.world.sum_(own) / batch.rows
        return mean.cpu()

    def own_work(self, step: Step) -> Callable[[], object] | None:
        return lambda: self.bayes.aggregate(step.features, step.batch.targets)


METHODS: dict[str, type[Weighting]] = {
    w.name: w for w in (Weighting, Uncertainty, LogSum, Aligned, AlignedAtFeatures, BayesAggregation)
}
ALIGNED = tuple(name for name, method in METHODS.items() if issubclass(method, _Alignment))
SUMS = tuple(name for name, method in METHODS.items() if method.sums)


def batch_losses(net: MultiTaskNet, tasks: Sequence[Task], views: Sequence[Tensor], batch: Batch) -> list[Tensor]:
    """Per task the loss of the whole batch, whose gradients' mean over the ranks is the loss's gradient."""
    return with_global_values(net.losses(tasks, views, batch.targets, batch.divisor), batch.world)


def at_features(tasks: Sequence[Task], step: Step) -> tuple[Tensor, ...]:
    """Per task the gradient at the features, those of this rank's rows."""
    views = [step.features.clone().requires_grad_() for _ in tasks]
    return torch.autograd.grad(step.net.losses(tasks, views, step.batch.targets, step.batch.divisor), views)


def forked(device: torch.device) -> AbstractContextManager[None]:
    """What is drawn inside leaves the generators as they are."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def timed(work: Any, device: torch.device) -> float:
    """Milliseconds that a call takes, the device's queue drained before and after."""
    drain = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    drain()
    start = time.perf_counter()
    work()
    drain()
    return 1e3 * (time.perf_counter() - start)
