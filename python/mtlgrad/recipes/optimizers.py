"""The optimizers that ``mtlgrad train`` offers, and each task's share of the updates under them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..jacobian import task_backward
from ..metrics import Dominance
from ..optim import AdaTaskAdagrad, AdaTaskAdam, AdaTaskRMSprop
from ..world.ranks import world_of
from .base import ADAM, MultiTaskNet
from .parts import Batch
from .weighting import Step, Weighting, at_features, batch_losses, forked, timed

ADATASK: dict[str, type[AdaTaskAdam | AdaTaskRMSprop | AdaTaskAdagrad]] = {
    "adatask-adam": AdaTaskAdam,
    "adatask-rmsprop": AdaTaskRMSprop,
    "adatask-adagrad": AdaTaskAdagrad,
}
OPTIMIZERS = (ADAM, *ADATASK)
#: Learning rates, unless the user says otherwise.
RATES = {ADAM: 1e-3, "adatask-adam": 1e-3, "adatask-rmsprop": 1e-3, "adatask-adagrad": 1e-2}
DECAY = 0.99  #: a step, of the average squared updates behind the shares


class Updates:
    """Adam on the merged gradient: what every method can have.

    Its shares are an estimate, made at one step of `every`; there are none where the method's total is no sum of terms,
    or with one task.
    """

    def __init__(self, weighting: Weighting, net: MultiTaskNet, lr: float, every: int):
        self.weighting, self.net = weighting, net
        self.parameters = [*net.parameters(), *weighting.parameters()]
        self.optimizer = self.make(self.parameters, lr)
        self.estimate = self.watch(every)

    def make(self, parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        # fused: one pass over the embeddings instead of ten, a quarter of the step.
        return torch.optim.Adam(parameters, lr=lr, fused=True)

    def watch(self, every: int) -> Dominance | None:
        tasks = len(self.weighting.tasks)
        return Dominance(self.optimizer, tasks, DECAY**every) if self.weighting.sums and tasks > 1 else None

    def backward(self, features: Tensor, losses: list[Tensor]) -> None:
        """Gives every parameter what the optimizer's step reads."""
        self.weighting.backward(self.net, features, losses)
        if not self.weighting.averages:
            world_of(None).average_gradients(self.parameters)

    def foresee(self, batch: Batch) -> dict[Tensor, Tensor] | None:
        """The tasks' gradients in the step to come, on a graph of their own; None where nobody wants them."""
        if self.estimate is None:
            return None
        shared = list(self.net.backbone.parameters())
        with forked(batch.targets[0].device):  # dropout draws what the step will draw
            features = self.net.features(*batch.inputs)
        views = [features] * len(batch.targets)
        terms = self.weighting.terms(batch_losses(self.net, self.weighting.tasks, views, batch))
        rows = [torch.autograd.grad(term, shared, retain_graph=True) for term in terms]
        columns = [torch.stack(column) for column in zip(*rows, strict=True)]
        batch.world.average_(columns)
        return dict(zip(shared, columns, strict=True))

    def observe(self, jacobians: dict[Tensor, Tensor] | None) -> None:
        """Takes in what `foresee` saw, once the step is made."""
        if self.estimate is not None:
            self.estimate.update(jacobians)

    def dominance(self, layers: dict[str, list[nn.Parameter]]) -> dict[str, list[float]] | None:
        """Layer -> the tasks' shares of the squared updates so far."""
        return None if self.estimate is None else _by_layer(layers, self.estimate.shares(layers))

    def own_ms(self, step: Step) -> float:
        """What the optimizer adds to a step of Adam, in milliseconds."""
        return 0.0

    def state_dict(self) -> dict[str, Any]:
        estimate = {} if self.estimate is None else self.estimate.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "estimate": estimate}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.estimate is not None:
            self.estimate.load_state_dict(state["estimate"])


class TaskUpdates(Updates):
    """AdaTask: a gradient a task for the backbone, ordinary ones for heads and what the method itself learns."""

    def __init__(self, weighting: Weighting, net: MultiTaskNet, lr: float, every: int, name: str):
        self.name = name
        super().__init__(weighting, net, lr, every)
        self.copies: list[tuple[list[Tensor], torch.optim.Optimizer]] = []

    def make(self, parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        return ADATASK[self.name](parameters, lr=lr, num_tasks=len(self.weighting.tasks), dominance_decay=DECAY)

    def watch(self, every: int) -> Dominance | None:
        return None  # the optimizer keeps count itself

    def backward(self, features: Tensor, losses: list[Tensor]) -> None:
        task_backward(self.weighting.terms(losses), self.net.backbone.parameters(), features=features)

    def dominance(self, layers: dict[str, list[nn.Parameter]]) -> dict[str, list[float]] | None:
        return _by_layer(layers, cast("Any", self.optimizer).dominance(layers))

    def own_ms(self, step: Step) -> float:
        """The passes through the backbone after the first, and what the step takes beyond one of Adam.

        Both optimizers step on copies of all parameters, with the gradients of the step that was made.
        """
        shared = list(self.net.backbone.parameters())
        incoming = at_features(self.weighting.tasks, step)
        with forked(step.features.device):
            features = self.net.features(*step.batch.inputs)

        def passes() -> None:
            for gradient in incoming[1:]:
                torch.autograd.grad(features, shared, gradient, retain_graph=True)

        mine, adams = (timed(work, step.features.device) for work in self._steps())
        return timed(passes, step.features.device) + mine - adams

    def _steps(self) -> list[Callable[[], object]]:
        originals = [p for group in self.optimizer.param_groups for p in group["params"]]
        first = not self.copies
        for make in (self.make, super().make) if first else ():
            copies: list[Tensor] = [p.detach().clone().requires_grad_() for p in originals]
            self.copies.append((copies, make(copies, lr=1e-6)))
        for (copies, optimizer), apart in zip(self.copies, (True, False), strict=True):
            for p, copy in zip(originals, copies, strict=True):
                if not hasattr(p, "jac"):
                    copy.grad = p.grad
                elif apart:
                    copy.jac = p.jac  # type: ignore[attr-defined]
                else:
                    copy.grad = p.jac.sum(0)
            if first:
                optimizer.step()  # sets up its state
        return [optimizer.step for _, optimizer in self.copies]


def updates(optimizer: str, weighting: Weighting, net: MultiTaskNet, lr: float, every: int) -> Updates:
    """The optimizer of a training; `every`: the steps from one look at the shares to the next."""
    if optimizer == ADAM:
        return Updates(weighting, net, lr, every)
    return TaskUpdates(weighting, net, lr, every, optimizer)


def _by_layer(layers: dict[str, list[nn.Parameter]], shares: Tensor) -> dict[str, list[float]]:
    return dict(zip(layers, shares.tolist(), strict=True))
