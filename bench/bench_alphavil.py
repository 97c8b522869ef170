"""Benchmark of alphaVIL's search: one step of alpha on a ResNet-18, beside a forward and backward of the same network.

All are in evaluation mode, as the search is. The first contender, the network's own forward and backward, gives the
gradients of the parameters; the others the T derivatives in alpha at theta + sum_t alpha_t delta_t.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import Case, Contender, Work, relative_error
from mtlgrad.alphavil import Task
from mtlgrad.alphavil.buffers import Buffers
from mtlgrad.alphavil.deltas import Deltas, groups_of
from mtlgrad.alphavil.search import Search
from mtlgrad.recipes.backbones import resnet18

Output = tuple[str, list[Tensor]]
ROUNDING = 1e-4  # of a float32 network's gradients, relative to the largest entry


class Problem:
    """A network, a batch, and T deltas a thousandth of the parameters' size."""

    def __init__(self, tasks: int, batch: int, size: int, width: int, device: torch.device):
        torch.manual_seed(0)
        self.model = nn.Sequential(resnet18(width), nn.Linear(8 * width, 10)).to(device)
        self.names, self.parameters = zip(*self.model.named_parameters(), strict=True)
        self.images = torch.randn(batch, 3, size, size, device=device)
        self.classes = torch.randint(0, 10, (batch,), device=device)
        self.model(self.images)  # BatchNorm's statistics
        self.model.eval()
        tasks_by_name = {str(t): Task([], self.loss, [self.batch]) for t in range(tasks)}
        self.deltas = Deltas(groups_of(self.model, tasks_by_name, 0, "own"), "parameters")
        theta = self.deltas.copy_parameters()
        for t in range(tasks):
            with torch.no_grad():
                for p in self.parameters:
                    p.add_(torch.randn_like(p), alpha=1e-3 * float(p.abs().mean()))
            self.deltas.take(t, theta)
            self.deltas.put_back(theta)
        make = functools.partial(torch.optim.SGD, lr=0.0)
        self.search = Search(self.model, tasks_by_name["0"], "0", Buffers(self.model, "target"), make, None)
        self.search.begin(tasks, [], device)

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return self.images, self.classes

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def rows(self) -> list[list[Tensor]]:
        return self.deltas.rows[0]

    def plain(self) -> Output:
        return "parameters", list(torch.autograd.grad(self.loss(self.model, self.batch), self.parameters))

    def step(self) -> Output:
        """An epoch of the search over a development set of one batch, the optimizer's step with it."""
        found: list[Tensor] = []
        optimizer = self.search.optimizer
        assert optimizer is not None

        def keep(*_: Any) -> None:
            assert self.search.alphas.grad is not None
            found.append(self.search.alphas.grad.clone())

        hook = optimizer.register_step_post_hook(keep)
        self.search.epoch(self.deltas)
        hook.remove()
        return "alphas", found

    def eager(self) -> Output:
        """theta + sum_t alpha_t delta_t by torch's own operations."""
        alphas = torch.ones(len(self.rows()), device=self.images.device).requires_grad_()
        moved = {
            name: p.detach() + sum(a * d for a, d in zip(alphas, column, strict=True))
            for name, p, column in zip(self.names, self.parameters, zip(*self.rows(), strict=True), strict=True)
        }
        loss = F.cross_entropy(functional_call(self.model, moved, (self.images,)), self.classes)
        return "alphas", list(torch.autograd.grad(loss, alphas))

    def expected(self, form: str) -> Tensor:
        if form == "parameters":
            return torch.cat([g.double().reshape(-1) for g in self.plain()[1]])
        columns = list(zip(*self.rows(), strict=True))
        leaves = {
            name: (p.detach().double() + sum(d.double() for d in column)).to(p.dtype).requires_grad_()
            for name, p, column in zip(self.names, self.parameters, columns, strict=True)
        }
        loss = F.cross_entropy(functional_call(self.model, leaves, (self.images,)), self.classes)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        return torch.stack(
            [
                torch.stack([(g.double() * d.double()).sum() for g, d in zip(gradients, row, strict=True)]).sum()
                for row in self.rows()
            ]
        )


def build(tasks: int, batch: int, size: int, width: int, device: torch.device, small: bool) -> Work:
    problem = Problem(tasks, 4, 32, 8, device) if small else Problem(tasks, batch, size, width, device)

    @functools.cache
    def expected(form: str) -> Tensor:
        return problem.expected(form)

    def error(output: Output) -> float:
        form, values = output
        return relative_error(torch.cat([value.double().reshape(-1) for value in values]), expected(form))

    def contender(call: Callable[[], Output], note: str, **options: Any) -> Contender:
        return Contender(call, ROUNDING, note, **options)

    with FlopCounterMode(display=False) as counter:
        problem.plain()
    count = sum(p.numel() for p in problem.parameters)
    return Work(
        {
            "forward, backward": contender(problem.plain, "of the network alone"),
            "mtlgrad alpha step": contender(problem.step, "Search.epoch of one batch"),
            # It rounds theta after every task, which the network's passes amplify.
            "torch alpha step": contender(
                problem.eager, "theta + sum_t alpha_t delta_t by torch's operations", tolerated=True
            ),
        },
        error,
        bytes=2 * tasks * count * problem.images.element_size(),  # the floor: T deltas, read twice
        flops=counter.get_total_flops(),
    )


def cases(quick: bool, device: torch.device) -> list[Case]:
    shapes = [(3, 4, 32, 8)] if quick else [(3, 32, 64, 64), (8, 32, 64, 64), (20, 32, 64, 64)]
    return [
        Case(
            "alpha step resnet-18",
            f"T={tasks} B={batch} 3x{size}x{size} width {width}",
            functools.partial(build, tasks, batch, size, width, device),
        )
        for tasks, batch, size, width in shapes
    ]
