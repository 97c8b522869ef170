"""Benchmark of training steps: forward and backward of a ResNet-18 (BatchNorm, in training) with three heads.

A contender returns the form of its gradient and the backbone's gradients. The same form is computed task by task for
comparison: the network in float32, what merges the tasks in float64.

- ``sum``: of the losses;
- ``features``: Aligned-MTL of the gradients at the features, passed on through the backbone once;
- ``parameters``: Aligned-MTL of the gradients at the backbone's parameters, each passed back by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mtlgrad
from bench.harness import Case, Contender, Work, relative_error
from bench.networks import resnet18
from bench.peers import torchjd_aligned as torchjd
from mtlgrad import reference

Output = tuple[str, list[Tensor]]
OUTPUTS = (1, 10, 5)  # a regression, a class of ten, five binary labels in one task

# Largest difference allowed, relative to the largest entry. Passes that differ in the last bit of what enters them may
# differ by more where they leave.
ROUNDING = 1e-5
SEPARATE = 1e-4  # gradients of single tasks at the parameters, whose rounding the alignment amplifies


class Problem:
    """One network and batch, the same for all contenders."""

    def __init__(self, batch: int, size: int, width: int, device: torch.device):
        torch.manual_seed(0)
        self.backbone = resnet18(width).to(device)
        self.heads = nn.ModuleList(nn.Linear(8 * width, outputs) for outputs in OUTPUTS).to(device)
        self.parameters = list(self.backbone.parameters())
        self.images = torch.randn(batch, 3, size, size, device=device)
        self.values = torch.randn(batch, 1, device=device)
        self.classes = torch.randint(0, OUTPUTS[1], (batch,), device=device)
        self.labels = torch.randint(0, 2, (batch, OUTPUTS[2]), device=device).float()

    def losses(self, features: Sequence[Tensor]) -> list[Tensor]:
        """One a task, each head on its features."""
        value, logits, binary = (head(f) for head, f in zip(self.heads, features, strict=True))
        return [
            F.mse_loss(value, self.values),
            F.cross_entropy(logits, self.classes),
            F.binary_cross_entropy_with_logits(binary, self.labels),
        ]

    def start(self) -> tuple[Tensor, list[Tensor]]:
        features = self.backbone(self.images)
        return features, self.losses([features] * len(OUTPUTS))

    def clear(self) -> None:
        for p in (*self.parameters, *self.heads.parameters()):
            p.grad = None
            if hasattr(p, "jac"):
                del p.jac

    def step(self, form: str, backward: Callable[[], None], bound: float, note: str = "", **options: Any) -> Contender:
        def call() -> Output:
            backward()
            return form, [p.grad for p in self.parameters]

        return Contender(call, bound, note, prepare=self.clear, **options)

    def contenders(self) -> dict[str, Contender]:
        aligned = mtlgrad.AlignedMTL(len(OUTPUTS))

        def plain() -> None:
            torch.stack(self.start()[1]).sum().backward()

        def layer() -> None:
            torch.stack(self.losses(aligned(self.backbone(self.images)))).sum().backward()

        def weigh() -> None:
            features, losses = self.start()
            (aligned.weigh(losses, features) * torch.stack(losses)).sum().backward()

        def merge() -> None:
            features, losses = self.start()
            mtlgrad.task_backward(losses, self.parameters, features=features)
            aligned.merge(self.parameters)

        def peer() -> None:
            features, losses = self.start()
            torchjd.backward(losses, features)
            torchjd.to_grad(self.parameters, per_tensor=False, retain=False)

        return {
            "plain": self.step("sum", plain, ROUNDING, "sum of the losses"),
            "mtlgrad layer": self.step("features", layer, ROUNDING, "gradients at the features"),
            "mtlgrad weigh": self.step("features", weigh, ROUNDING, "gradients at the features"),
            "mtlgrad merge": self.step("parameters", merge, SEPARATE, "gradients at the parameters, task_backward"),
            "torchjd": self.step(
                "parameters",
                peer,
                SEPARATE,
                f"gradients at the parameters, {torchjd.version()}, mtl_backward",
                **torchjd.OPTIONS,
            ),
        }

    def expected(self, form: str) -> list[Tensor]:
        """The backbone's gradients, task by task."""
        self.clear()
        features, losses = self.start()
        arrived = [torch.autograd.grad(loss, features, retain_graph=True)[0].double() for loss in losses]
        if form != "parameters":
            weights = torch.ones(len(losses)) if form == "sum" else reference.align(reference.gram(arrived)).weights
            merged = sum(w * gradient for w, gradient in zip(weights.tolist(), arrived, strict=True))
            return list(torch.autograd.grad(features, self.parameters, merged.to(features.dtype)))
        rows = [
            [part.double() for part in torch.autograd.grad(features, self.parameters, g.float(), retain_graph=True)]
            for g in arrived
        ]
        return reference.combine(rows, reference.align(reference.gram(rows)).weights)

    def flops(self) -> int:
        with FlopCounterMode(display=False) as counter:
            torch.stack(self.start()[1]).sum().backward()
        return counter.get_total_flops()


def build(batch: int, size: int, width: int, device: torch.device, quick: bool, small: bool) -> Work:
    problem = Problem(4, 32, 8, device) if small else Problem(batch, size, width, device)

    @functools.cache
    def expected(form: str) -> Tensor:
        return torch.cat([gradient.reshape(-1) for gradient in problem.expected(form)])

    def error(output: Output) -> float:
        form, gradients = output
        found = torch.cat([gradient.reshape(-1) for gradient in gradients])
        return relative_error(found, expected(form))

    weights = sum(p.numel() for p in problem.parameters)
    size_in_bytes = problem.images.element_size() * (2 * weights + problem.images.numel())  # images, weights; gradients
    return Work(problem.contenders(), error, bytes=size_in_bytes, flops=problem.flops())


def cases(quick: bool, device: torch.device) -> list[Case]:
    shapes = [(4, 32, 8)] if quick else [(32, 64, 64)] + [(128, 224, 64)] * (device.type == "cuda")
    return [
        Case(
            "step resnet-18",
            f"B={batch} 3x{size}x{size} width {width}, 3 heads",
            functools.partial(build, batch, size, width, device, quick),
        )
        for batch, size, width in shapes
    ]
