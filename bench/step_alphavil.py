"""A round of alphaVIL as a contender among the training steps: T trainings of one batch each from the same parameters,
a step of alpha on one batch of development data, and what judges the alphas."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import mtlgrad
from bench.harness import Contender, relative_error
from bench.step_problem import Problem, loss_of
from mtlgrad.alphavil import Task

TARGET = 1
LR = 1e-5
ALPHA_LR = 1.0
SEARCHED = 3 * 2.0**-24 / LR  # parameters near one are rounded to float32 on the way to each delta, and where they move


class Vil:
    """On its problem's batch, for training and for development."""

    def __init__(self, problem: Problem):
        self.problem = problem
        tasks = []
        for t, head in enumerate(problem.model.heads):
            loss = functools.partial(self.loss, t)
            tasks.append(Task([problem.images], loss, [problem.images] if t == TARGET else None, head))
        adam = functools.partial(torch.optim.Adam, lr=LR, eps=problem.scale)
        search = functools.partial(torch.optim.SGD, lr=ALPHA_LR)
        self.method = mtlgrad.AlphaVIL(
            problem.model, tasks, TARGET, make_optimizer=adam, alpha_optimizer=search, alpha_epochs=1
        )
        self.buffers: list[Tensor] = []

    def loss(self, t: int, model: nn.Module, images: Tensor) -> Tensor:
        head: Any = model.get_submodule(f"heads.{t}")
        features = model.get_submodule("backbone")(images)
        return loss_of(self.problem.kinds[t][0], head(features), self.problem.targets[t])

    @torch.no_grad()
    def prepare(self) -> None:
        """With the batch's own statistics in BatchNorm: those of its first step would be far from what was trained."""
        problem = self.problem
        problem.restore()
        if not self.buffers:
            norms = [module for module in problem.model.modules() if isinstance(module, nn.BatchNorm2d)]
            for norm in norms:
                norm.momentum = 1.0
            problem.model.backbone(problem.images)
            for norm in norms:
                norm.momentum = 0.1
            self.buffers = [buffer.clone() for buffer in problem.buffers]
        for buffer, begin in zip(problem.buffers, self.buffers, strict=True):
            buffer.copy_(begin)
        self.method.task_weights = [1.0] * len(problem.kinds)

    def call(self) -> Callable[[], float]:
        self.method.epoch()
        return self.error

    def trained(self, gradient: Tensor) -> Tensor:
        """Adam's first step; its eps keeps it from blowing up what rounding leaves of a gradient that is zero."""
        return -LR * gradient / (gradient.abs() + self.problem.scale)

    @functools.cached_property
    def exact(self) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """alpha [T], and the change of all parameters with the search's alphas kept or those of the start.

        delta_t is Adam's first step on the backbone and on task t's head; alpha_t = 1 - lr_alpha <g, delta_t>, with the
        gradient g of the development loss where all deltas are added.
        """
        problem, parameters = self.problem, self.problem.every
        self.prepare()
        deltas = []
        for t in range(len(problem.kinds)):
            loss = self.loss(t, problem.model, problem.images)
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
            deltas.append([self.trained(g.double()) for g in gradients])
        self.prepare()
        problem.model.backbone(problem.images)  # a training's mark on the buffers, the same for all tasks
        with torch.no_grad():
            for p, column in zip(parameters, zip(*deltas, strict=True), strict=True):
                p.copy_(p.double() + sum(column))
        problem.model.eval()
        loss = self.loss(TARGET, problem.model, problem.images)
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        problem.model.train()
        slopes = [sum(float((g.double() * d).sum()) for g, d in zip(gradients, row, strict=True)) for row in deltas]
        alphas = 1.0 - ALPHA_LR * torch.tensor(slopes, dtype=torch.float64)
        kept = {"search": alphas.tolist(), "start": [1.0] * len(alphas)}
        columns = list(zip(*deltas, strict=True))
        return alphas, {
            name: [sum(a * delta for a, delta in zip(factors, column, strict=True)).float() for column in columns]
            for name, factors in kept.items()
        }

    def error(self) -> float:
        """Of the alphas' way from 1 and of the parameters' change, the larger; infinite if nothing was kept."""
        problem, last = self.problem, self.method.last
        after = [p.detach().clone() for p in problem.every]
        found = self.method._search.alphas.detach().clone()
        alphas, changes = self.exact
        if last is None or last.kept not in changes:
            return math.inf
        return max(relative_error(found - 1.0, alphas - 1.0), problem.difference(after, changes[last.kept]))


def alphavil(problem: Problem) -> Contender:
    vil = Vil(problem)
    note = f"a round: {len(problem.kinds)} trainings and a search, each of one batch; Adam"
    examples = len(problem.kinds) * problem.shape.batch
    return Contender(vil.call, SEARCHED, note, prepare=vil.prepare, examples=examples)
