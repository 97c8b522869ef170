"""The methods that are compared, each as small as in a loop of one's own.

A step is ``views = method.views(features, targets)``, each head on its view, losses, ``method.backward(...)``, and a
step of ``method.optimizer(...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..bayesagg import BayesAgg, Binary, Multiclass, Regression
from ..jacobian import task_backward
from ..optim import AdaTaskAdagrad, AdaTaskAdam, AdaTaskRMSprop
from ..rules import IMTLG, MGDA, AlignedMTL, CAGrad, DualProj, FairGrad, GramRule, NashMTL, PCGrad, UPGrad
from ..world.ranks import world_of
from .recipe import TrainError
from .tasks import Task

Weights = Sequence[float] | None


class Method(nn.Module):
    """The sum of the losses: with a weight a task, with ``log`` of their logarithms; and what the others start from."""

    #: Whether it reads a gradient a task from ``Parameter.jac``, which `backward` leaves as the mean over the ranks;
    #: the others get along with one ordinary backward, and with DistributedDataParallel.
    per_task: ClassVar[bool] = False

    def __init__(self, tasks: Sequence[Task], model: nn.Module, weights: Weights = None, log: bool = False):
        super().__init__()
        self.tasks, self.log = tasks, log
        self.weights = [1.0] * len(tasks) if weights is None else list(weights)
        self.share: Tensor | None = None  #: of each task in the last step's weights, [T]; None where nothing is known

    def views(self, features: Tensor, targets: dict[str, Tensor]) -> Sequence[Tensor]:
        """Stand between backbone and heads: what each of T heads gets."""
        return [features] * len(self.tasks)

    def terms(self, losses: list[Tensor]) -> list[Tensor]:
        """Return what is summed, a term a task."""
        if self.log:
            # The gradient of the logarithm of the loss of the whole batch, the mean over the ranks.
            values = world_of(None).mean_(torch.stack(losses).detach()).clamp_min(1e-12)
            self._tell(values.reciprocal())
            losses = [loss / value for loss, value in zip(losses, values, strict=True)]
        else:
            self._tell(torch.tensor(self.weights))
        return [weight * loss for weight, loss in zip(self.weights, losses, strict=True)]

    def backward(self, losses: list[Tensor], features: Tensor, backbone: nn.Module) -> None:
        """Give every parameter its gradient."""
        torch.stack(self.terms(losses)).sum().backward()

    def predict(self, features: Tensor, outputs: list[Tensor]) -> list[Tensor]:
        """Return the outputs, or better ones."""
        return outputs

    def optimizer(self, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=lr, fused=True)

    def start_epoch(self, epoch: int) -> None:
        """Prepare for epoch 0, 1, ...: called before its first step."""

    def end_epoch(self) -> None:
        """Close an epoch: called after its last step."""

    def _tell(self, weights: Tensor | None) -> None:
        if weights is not None:
            self.share = (weights.detach() / weights.detach().abs().sum().clamp_min(1e-12)).float()


class Uncertainty(Method):
    """Kendall et al., CVPR 2018: exp(-s) L + s / 2 per task (exp(-s) L / 2 for regression), s = log sigma^2 learned."""

    factor: Tensor

    def __init__(self, tasks: Sequence[Task], model: nn.Module):
        super().__init__(tasks, model)
        self.log_variance = nn.Parameter(torch.zeros(len(tasks)))
        self.register_buffer("factor", torch.tensor([0.5 if t.kind == "regression" else 1.0 for t in tasks]), False)

    def terms(self, losses: list[Tensor]) -> list[Tensor]:
        weights = self.factor * torch.exp(-self.log_variance)
        self._tell(weights)
        return list((weights * torch.stack(losses) + 0.5 * self.log_variance).unbind())


class OnParameters(Method):
    """A rule over the tasks' gradients on the backbone's parameters: one backward a task through the backbone."""

    per_task = True

    def __init__(self, tasks: Sequence[Task], model: nn.Module, rule: Callable[[int], GramRule], log: bool = False):
        super().__init__(tasks, model, log=log)
        self.rule = rule(len(tasks))

    def backward(self, losses: list[Tensor], features: Tensor, backbone: nn.Module) -> None:
        shared = [p for p in backbone.parameters() if p.requires_grad]
        task_backward(self.terms(losses), shared, features=features)
        self.rule.merge(shared)
        self._tell(self.rule.weights)


class AtFeatures(Method):
    """A rule as a layer, over the gradients at the features: one ordinary backward."""

    def __init__(self, tasks: Sequence[Task], model: nn.Module, rule: Callable[[int], GramRule], log: bool = False):
        super().__init__(tasks, model, log=log)
        self.rule = rule(len(tasks))

    def views(self, features: Tensor, targets: dict[str, Tensor]) -> Sequence[Tensor]:
        return cast("Sequence[Tensor]", self.rule(features))

    def backward(self, losses: list[Tensor], features: Tensor, backbone: nn.Module) -> None:
        super().backward(losses, features, backbone)
        self._tell(self.rule.weights)


class BayesAggregation(Method):
    """BayesAgg-MTL after epochs of plain sum: half of all, at most four.

    ``options`` are those of the "regression" and "classification" heads and of the "layer", where not the defaults.
    """

    refreshes: Tensor

    def __init__(self, tasks: Sequence[Task], model: nn.Module, epochs: int, options: Mapping[str, dict[str, Any]]):
        super().__init__(tasks, model)
        regression, classification, layer = (options.get(k, {}) for k in ("regression", "classification", "layer"))
        likelihoods: dict[Any, Any] = {
            "regression": partial(Regression, **regression),
            "binary": partial(Binary, **classification),
            "multiclass": partial(Multiclass, **classification),
        }
        heads: Any = model.heads
        for task in tasks:
            if task.kind is None or not isinstance(heads[task.name], (nn.Linear, nn.Conv2d)):
                expected = "a linear head with squared error, binary or categorical cross entropy"
                raise TrainError(f"bayesagg: task {task.name!r}: expected {expected}; take another method")
        self.bayes = BayesAgg([likelihoods[t.kind](heads[t.name]) for t in tasks], **layer)
        self.warmup = max(1, min(4, epochs // 2))
        self.watching = False  # whether this epoch's batches go through the layer
        self.register_buffer("refreshes", torch.zeros((), dtype=torch.int64))

    def views(self, features: Tensor, targets: dict[str, Tensor]) -> Sequence[Tensor]:
        if self.watching:
            features = self.bayes(features, [targets[task.name] for task in self.tasks])
        return super().views(features, targets)

    def backward(self, losses: list[Tensor], features: Tensor, backbone: nn.Module) -> None:
        (self.bayes.total(losses) if self.watching else torch.stack(losses).sum()).backward()
        self._tell(self.bayes.task_weights if int(self.refreshes) else torch.ones(len(self.tasks)))

    def predict(self, features: Tensor, outputs: list[Tensor]) -> list[Tensor]:
        if not int(self.refreshes):
            return outputs
        return [p.reshape(o.shape) for p, o in zip(self.bayes.predict(features), outputs, strict=True)]

    def start_epoch(self, epoch: int) -> None:
        # The last epoch of the warm-up shows the layer the data for its first posterior; before, it is left out.
        self.watching = epoch >= self.warmup - 1

    def end_epoch(self) -> None:
        if self.watching:
            self.bayes.refresh()
            self.refreshes += 1


class AdaTask(Method):
    """The sum of the losses (of their logarithms), every task with moments of its own in the backbone."""

    per_task = True

    def __init__(self, tasks: Sequence[Task], model: nn.Module, rule: Any, mean: bool = False, log: bool = False):
        super().__init__(tasks, model, log=log)
        self.rule, self.task_weights = rule, [1.0 / len(tasks) if mean else 1.0] * len(tasks)

    def backward(self, losses: list[Tensor], features: Tensor, backbone: nn.Module) -> None:
        task_backward(self.terms(losses), (p for p in backbone.parameters() if p.requires_grad), features=features)

    def optimizer(self, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        return cast(
            "torch.optim.Optimizer",
            self.rule(parameters, lr=lr, num_tasks=len(self.tasks), task_weights=self.task_weights),
        )


_RULES: dict[str, tuple[Callable[..., GramRule], bool]] = {  # and whether it takes a preference
    "aligned": (AlignedMTL, True),
    "aligned-rmse": (partial(AlignedMTL, scale="rmse"), True),
    "upgrad": (UPGrad, True),
    "dualproj": (DualProj, True),
    "mgda": (MGDA, False),
    "cagrad": (CAGrad, False),
    "nash": (NashMTL, False),
    "fairgrad": (FairGrad, False),
    "imtl": (IMTLG, False),
    "pcgrad": (PCGrad, False),
}
_ADATASK = {
    "adatask": AdaTaskAdam,
    "adatask-mean": AdaTaskAdam,  # of the tasks' updates: as with a learning rate of 1 / T
    "adatask-rmsprop": AdaTaskRMSprop,
    "adatask-adagrad": AdaTaskAdagrad,
}
_PUBLISHED: dict[str, dict[str, Any]] = {
    "regression": {"gamma": 0.005, "power": 1.0, "noise": 1.0, "bias": False},
    "classification": {"gamma": 0.005, "power": 1.0},
    "layer": {"covariance": "full", "statistics": "stored", "reduction": "mean"},
}
#: What trains by itself, between the epochs: see alphavil.py.
ALPHAVIL = "alphavil"
_FORMS: dict[str, type[OnParameters | AtFeatures]] = {"": OnParameters, "-ub": AtFeatures}
METHODS = (
    *("sum", "logsum", "uncertainty", "bayesagg", "bayesagg-published"),
    *(name + form + log for name in _RULES for form in _FORMS for log in ("", "-log")),
    *(name + log for name in _ADATASK for log in ("", "-log")),
    ALPHAVIL,
)
#: Those that take weights for the tasks.
WITH_PREFERENCE = ("sum", *(n for n in METHODS if _RULES.get(n.removesuffix("-log").removesuffix("-ub"), (0, 0))[1]))


def make(name: str, tasks: Sequence[Task], model: nn.Module, epochs: int, preference: Weights = None) -> Method:
    """Make a method of METHODS for a fresh model; NAME-ub is a rule at the features, NAME-log one on log losses."""
    if name in ("sum", "logsum", ALPHAVIL):
        return Method(tasks, model, preference if name == "sum" else None, log=name == "logsum")
    if name == "uncertainty":
        return Uncertainty(tasks, model)
    if name.startswith("bayesagg"):
        return BayesAggregation(tasks, model, epochs, {} if name == "bayesagg" else _PUBLISHED)
    log, base = name.endswith("-log"), name.removesuffix("-log")
    if base in _ADATASK:
        return AdaTask(tasks, model, _ADATASK[base], mean=base.endswith("-mean"), log=log)
    form = "-ub" if base.endswith("-ub") else ""
    rule, weighs = _RULES[base.removesuffix("-ub")]
    kept = partial(rule, preference=preference) if weighs and preference is not None else rule
    return _FORMS[form](tasks, model, kept, log=log)


def default_lr(name: str) -> float:
    """Return the learning rate of a method, unless the user says otherwise."""
    return 1e-2 if name.startswith("adatask-adagrad") else 1e-3
