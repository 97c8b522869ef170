"""The methods that ``mtlgrad train`` compares, behind one small interface.

A training step is: ``views = w.through(features, targets)``, each head on its view, losses,
``w.backward(net, features, losses)``.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import EllipsisType
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from .. import ops
from ..jacobian import task_backward
from ..rules import IMTLG, MGDA, AlignedMTL, CAGrad, DualProj, FairGrad, GramRule, NashMTL, PCGrad, UPGrad
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
    #: The settings that are this method's, among those that not all have.
    options: ClassVar[tuple[str, ...]] = ()

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


class _Ruled(Weighting):
    """What both forms of a rule over the Gram matrix of the tasks' gradients share."""

    sums = False
    make: ClassVar[type[Any]]

    def __init__(self, tasks: tuple[Task, ...], net: MultiTaskNet, settings: Settings):
        super().__init__(tasks, net, settings)
        self.rule: GramRule = self.make(len(tasks), **{name: getattr(settings, name) for name in self.options})

    def shares(self, losses: Tensor) -> Tensor | None:
        """Negative where the rule's weights are; zeros if all of them are."""
        if self.rule.weights is None:
            return None
        weights = self.rule.weights.float().cpu()
        return weights / weights.abs().sum().clamp_min(1e-12)

    def system(self) -> tuple[float, int] | None:
        if not isinstance(self.rule, AlignedMTL):
            return None
        condition, rank = self.rule.condition_number, self.rule.rank
        return None if condition is None or rank is None else (float(condition), int(rank))

    def _once_more(self) -> GramRule:
        """A copy to merge with: the rule's record of the last backward, and what it has drawn, stay as they are."""
        rule = copy.deepcopy(self.rule)
        rule._draws = False  # nothing is sent to other ranks
        return rule


class _OnParameters(_Ruled):
    """A rule over the tasks' gradients on the backbone's parameters: one backward per task through the backbone."""

    averages = True  # as `task_backward` does

    def backward(self, net: MultiTaskNet, features: Tensor, losses: list[Tensor]) -> None:
        shared = list(net.backbone.parameters())
        task_backward(losses, shared, features=features)
        self.rule.merge(shared)

    def own_work(self, step: Step) -> Callable[[], object] | None:
        """All passes through the backbone but one, the Gram matrix, the rule and the weighted sum."""
        shared = list(step.net.backbone.parameters())
        incoming = at_features(self.tasks, step)
        with forked(step.features.device):  # dropout draws again
            features = step.net.features(*step.batch.inputs)

        def passed_back(gradient: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(features, shared, gradient, retain_graph=True)

        first, rule = passed_back(incoming[0]), self._once_more()

        def work() -> object:
            rows = [first, *(passed_back(gradient) for gradient in incoming[1:])]
            return rule._merge(ops.Stacked([torch.stack(column) for column in zip(*rows, strict=True)]))

        return work


class _AtFeatures(_Ruled):
    """A rule as a layer, over the gradients at the shared representation, in one ordinary backward."""

    def through(self, features: Tensor, targets: list[Tensor]) -> Sequence[Tensor]:
        return cast("Sequence[Tensor]", self.rule(features))

    def own_work(self, step: Step) -> Callable[[], object] | None:
        """The Gram matrix, the rule and the weighted sum."""
        rows, rule = list(at_features(self.tasks, step)), self._once_more()
        return lambda: rule._merge(rows)


def _forms(name: str, rule: type[GramRule], *options: str) -> list[type[Weighting]]:
    """NAME on the backbone's parameters, and NAME-ub (the upper bound of Aligned-MTL's and MGDA's papers) on features.

    `options` are settings that the rule takes under the same names.
    """
    return [
        type(rule.__name__ + form.__name__, (form,), {"name": name + suffix, "make": rule, "options": options})
        for form, suffix in ((_OnParameters, ""), (_AtFeatures, "-ub"))
    ]


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


_EVERY: list[type[Weighting]] = [
    *(Weighting, Uncertainty, LogSum),
    *_forms("aligned", AlignedMTL, "preference", "scale"),
    *_forms("upgrad", UPGrad, "preference"),
    *_forms("dualproj", DualProj, "preference"),
    *_forms("mgda", MGDA),
    *_forms("cagrad", CAGrad),
    *_forms("nash", NashMTL),
    *_forms("fairgrad", FairGrad),
    *_forms("imtl", IMTLG),
    *_forms("pcgrad", PCGrad),
    BayesAggregation,
]
METHODS = {w.name: w for w in _EVERY}
SUMS = tuple(name for name, method in METHODS.items() if method.sums)


def methods_with(option: str) -> tuple[str, ...]:
    """The names of those that take this setting."""
    return tuple(name for name, method in METHODS.items() if option in method.options)


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
