"""alpha's descent on the target's development loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..world.ranks import ALONE, World
from .buffers import Buffers
from .checks import check_counts
from .deltas import Deltas
from .tasks import Task, check_checkpoints, check_gradient, checked_loss

MakeOptimizer = Callable[[list[Any]], torch.optim.Optimizer]

MODEL = "model"


class _Evaluated(nn.Module):
    """The model under a loss, as one module: `functional_call` then swaps parameters wherever the loss calls it."""

    def __init__(self, model: nn.Module, task: Task, name: str):
        super().__init__()
        self.add_module(MODEL, model)
        self.task, self.name = task, name

    def forward(self, batch: Any) -> Tensor:
        return checked_loss(self.name, self.task.loss(self.get_submodule(MODEL), batch))


class _Derived(_Evaluated):
    """Its loss, and the derivative in alpha: inside, since checkpoints compute parts of the model once more then, and
    must find the same parameters."""

    def forward(self, batch: Any, alphas: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        loss = super().forward(batch)
        check_gradient(self.name, loss)
        check_checkpoints(self.name, loss)
        (gradient,) = torch.autograd.grad(loss, alphas, allow_unused=True)
        return loss.detach(), gradient


class Search:
    """The target's development loss at theta + sum_t alpha_t delta_t, and the descent on it.

    The model's parameters and buffers are read and never written; it is in evaluation mode meanwhile, so that the loss
    is a function of alpha alone.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        name: str,
        buffers: Buffers,
        make_optimizer: MakeOptimizer,
        clip: tuple[float, float] | None,
    ):
        self.model, self.task, self.name, self.buffers, self.clip = model, task, name, buffers, clip
        self.make_optimizer = make_optimizer
        self.evaluated, self.derived = _Evaluated(model, task, name), _Derived(model, task, name)
        self.alphas = torch.empty(0, device="cpu")
        self.absent: list[int] = []
        self.optimizer: torch.optim.Optimizer | None = None

    def begin(self, tasks: int, absent: Sequence[int], device: torch.device) -> None:
        """alpha = 1 for all; tasks in `absent` take no part, and keep it."""
        self.absent = list(absent)
        self.alphas = torch.ones(tasks, dtype=torch.float64, device=device).requires_grad_()
        self.optimizer = made("alpha_optimizer", self.make_optimizer, [self.alphas])

    def loss(self, deltas: Deltas | None, world: World = ALONE) -> float:
        """Return the development loss at alpha, or (no deltas) at the model as it is; the mean over the ranks."""
        with evaluation_mode(self.model), torch.no_grad():
            buffers = self._buffers(merged=deltas is not None)
            parameters = self._renormed() if deltas is None else self._parameters(deltas)
            losses = [
                functional_call(self.evaluated, {**parameters, **buffers}, (batch,)).double()
                for batch in self._batches(world)
            ]
            return float(world.mean_(torch.stack(losses).mean()))

    def epoch(self, deltas: Deltas, world: World = ALONE) -> bool:
        """Take a step of alpha a batch. Return False where alpha came to NaN or infinity.

        All ranks take the same steps, each on its part of a batch.
        """
        optimizer = self.optimizer
        assert optimizer is not None
        with evaluation_mode(self.model):
            buffers = self._buffers(merged=True)
            for batch in self._batches(world):
                optimizer.step(partial(self._derive, deltas, buffers, batch, world))  # type: ignore[arg-type]
                optimizer.zero_grad()
                with torch.no_grad():
                    if self.clip is not None:
                        self.alphas.clamp_(*self.clip)
                    # What weight decay, say, has made of them.
                    self.alphas[self.absent] = 1.0
        world.mean_(self.alphas.detach())  # their last digits, too, whatever machines the ranks are on
        return bool(self.alphas.isfinite().all())

    def _derive(self, deltas: Deltas, buffers: dict[str, Tensor], batch: Any, world: World) -> Tensor:
        """Return a batch's loss; its gradient in alpha goes to ``alphas.grad``. Means over the ranks, both."""
        with torch.enable_grad():
            stand_ins = {**self._parameters(deltas), **buffers}
            loss, self.alphas.grad = functional_call(self.derived, stand_ins, (batch, self.alphas))
        if self.alphas.grad is None:
            raise TypeError(
                f"AlphaVIL: tasks: {self.name!r}: loss: expected one that takes its parameters from the model it is "
                "given, found one that does not depend on alpha; it keeps parameters or another model of its own"
            )
        means = world.mean_(torch.cat([self.alphas.grad, loss.to(self.alphas).reshape(1)]))
        self.alphas.grad.copy_(means[:-1])
        return means[-1]

    def _renormed(self) -> dict[str, Tensor]:
        """Copy the embeddings that a forward scales down in place, in evaluation mode, too."""
        kinds = (nn.Embedding, nn.EmbeddingBag)
        modules = [(n, m) for n, m in self.model.named_modules() if isinstance(m, kinds) and m.max_norm is not None]
        return {f"{MODEL}.{n}.weight" if n else f"{MODEL}.weight": m.weight.detach().clone() for n, m in modules}

    def _parameters(self, deltas: Deltas) -> dict[str, Tensor]:
        return {f"{MODEL}.{name}": p for name, p in deltas.displaced(self.alphas, self.absent).items()}

    def _buffers(self, *, merged: bool) -> dict[str, Tensor]:
        """Copy the buffers, since some (counters, caches) are written in evaluation mode, too."""
        found = self.buffers.copy()
        if merged:
            found.update((name, b.clone()) for name, b in self.buffers.merged.items())
        return {f"{MODEL}.{name}": b for name, b in found.items()}

    def _batches(self, world: World) -> Iterator[Any]:
        assert self.task.dev is not None
        check_counts(self.name, "dev", self.task.dev, 1.0, world, self.alphas.device)
        empty = True
        for batch in self.task.dev:
            empty = False
            yield batch
        if empty:
            raise ValueError(f"AlphaVIL: tasks: {self.name!r}: dev: expected at least one batch, found none")

    def state_dict(self) -> dict[str, Any]:
        """Return a copy: what a stage that fails goes back to."""
        optimizer = None if self.optimizer is None else copy.deepcopy(self.optimizer.state_dict())
        return {"alphas": self.alphas.detach().clone(), "absent": list(self.absent), "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        if state["optimizer"] is None:
            self.alphas, self.absent, self.optimizer = torch.empty(0, device="cpu"), [], None
            return
        self.begin(len(state["alphas"]), state["absent"], device)
        assert self.optimizer is not None
        with torch.no_grad():
            self.alphas.copy_(state["alphas"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module's own mode is put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Train a model in evaluation mode as a whole; in one that is in training mode, what is frozen stays so."""
    modes = {module: module.training for module in model.modules()}
    if not model.training:
        model.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def made(name: str, make: MakeOptimizer, parameters: list[Any]) -> torch.optim.Optimizer:
    optimizer = make(parameters)
    if not isinstance(optimizer, torch.optim.Optimizer):
        found = type(optimizer).__name__
        raise TypeError(f"AlphaVIL: {name}: expected a function that returns a torch.optim.Optimizer, found {found}")
    return optimizer
