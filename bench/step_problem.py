"""What the benchmark of training steps trains: a network with its heads, a batch, an optimizer in the middle of a
training, and what each step has to come to.

Every step moves the parameters of backbone and heads; that change is what is checked. Its form says which one it is:

- ``sum``: Adam on the gradient of the sum of the losses;
- ``features``: on Aligned-MTL's of the gradients at the features, passed on through the backbone once; ``weighed``: the
  heads' gradients are weighed, too;
- ``parameters``: on Aligned-MTL's of the gradients at the backbone's parameters; ``upgrad``: on UPGrad's of these;
- ``adatask``: AdaTask's Adam on these;
- ``bayesagg``: Adam on BayesAgg's gradient at the features, passed on through the backbone once.

The network's passes are float32 and in the heads task by task; what merges the tasks, and the optimizers, are float64.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.bench_combine import exact_sum
from bench.encoder import Encoder
from bench.peers.bayesagg_published import Kind
from bench.peers.torchjd_merge import RIDGE
from mtlgrad import optim, posterior, reference
from mtlgrad.recipes.backbones import resnet18, resnet50

POWER = 0.05  # BayesAgg's exponent, the layer's default
LR, BETAS, EPS = 1e-2, (0.9, 0.999), 1e-8
STEPS = 10_000.0  # made before: Adam's corrections are over
SLOW = 300_000_000  # gradients of single tasks, all together: beyond it a step is timed once

HEADS: dict[int, tuple[tuple[Kind, int], ...]] = {
    3: (("regression", 1), ("multiclass", 10), ("binary", 5)),
    20: (("binary", 1),) * 20,
}


@dataclass(frozen=True)
class Shape:
    network: str
    tasks: int
    batch: int
    size: tuple[int, int]  #: of the images, or 8 times that of the transformer's grid of tokens
    width: int  #: of a ResNet's first stage, or of the transformer
    layers: int = 0  #: of the transformer
    literal: bool = False  #: with the published BayesAgg, which forms the square of a head's weights several times

    @property
    def text(self) -> str:
        depth = f"{self.layers} layers " * bool(self.layers)
        return f"B={self.batch} 3x{self.size[0]}x{self.size[1]} {depth}width {self.width}, {self.tasks} heads"

    @property
    def features(self) -> int:
        return self.width * {"resnet-18": 8, "resnet-50": 32, "transformer": 1}[self.network]

    def toy(self) -> Shape:
        width = 32 if self.network == "transformer" else 4
        return replace(self, batch=8, size=(32, 32), width=width, layers=min(self.layers, 2))

    def backbone(self) -> nn.Module:
        if self.network == "transformer":
            return Encoder(self.width, self.layers, self.size[0] * self.size[1] // 64)
        return {"resnet-18": resnet18, "resnet-50": resnet50}[self.network](self.width)


class Network(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.backbone = shape.backbone()
        self.heads = nn.ModuleList(nn.Linear(shape.features, outputs) for _, outputs in HEADS[shape.tasks])


def loss_of(kind: str, output: Tensor, target: Tensor) -> Tensor:
    if kind == "regression":
        return F.mse_loss(output, target)
    return (
        F.cross_entropy(output, target) if kind == "multiclass" else F.binary_cross_entropy_with_logits(output, target)
    )


class Problem:
    """One network and batch, the same for all contenders."""

    def __init__(self, shape: Shape, device: torch.device):
        torch.manual_seed(0)
        self.shape, self.kinds = shape, HEADS[shape.tasks]
        self.model = Network(shape).to(device)
        self.shared = list(self.model.backbone.parameters())
        self.own = list(self.model.heads.parameters())
        self.every = [*self.shared, *self.own]
        self.buffers = list(self.model.buffers())
        self.images = torch.randn(shape.batch, 3, *shape.size, device=device)
        self.targets = [self.target(kind, outputs).to(device) for kind, outputs in self.kinds]
        self.begin = [p.detach().clone() for p in self.every]
        self.begin_buffers = [buffer.clone() for buffer in self.buffers]
        self.adam = torch.optim.Adam(self.every, lr=LR, betas=BETAS, eps=EPS)
        for p in self.every:
            moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            self.adam.state[p] = {"step": torch.tensor(STEPS), **moments}

    def target(self, kind: str, outputs: int) -> Tensor:
        if kind == "regression":
            return torch.randn(self.shape.batch, outputs)
        if kind == "multiclass":
            return torch.randint(0, outputs, (self.shape.batch,))
        return torch.randint(0, 2, (self.shape.batch, outputs)).float()

    def losses(self, features: Sequence[Tensor]) -> list[Tensor]:
        """One a task, each head on its features."""
        heads = zip(self.model.heads, features, self.kinds, self.targets, strict=True)
        return [loss_of(kind, head(h), target) for head, h, (kind, _), target in heads]

    def start(self) -> tuple[Tensor, list[Tensor]]:
        features = self.model.backbone(self.images)
        return features, self.losses([features] * len(self.kinds))

    # ---- the state that every step begins with ----

    @functools.cached_property
    def scale(self) -> float:
        """The root mean square of the gradient."""
        self.restore()
        gradients = torch.autograd.grad(torch.stack(self.start()[1]).sum(), self.every)
        self.restore()
        return float(sum(g.double().square().sum() for g in gradients) / sum(g.numel() for g in gradients)) ** 0.5

    @functools.cached_property
    def adatask(self) -> optim.AdaTaskAdam:
        found = optim.AdaTaskAdam(self.every, LR, BETAS, EPS, num_tasks=len(self.kinds))
        found.init_state(self.shared)
        return found

    @torch.no_grad()
    def restore(self) -> None:
        """Parameters and buffers as at first, without gradients."""
        for tensor, first in zip([*self.every, *self.buffers], [*self.begin, *self.begin_buffers], strict=True):
            tensor.copy_(first)
        for p in self.every:
            p.grad = None
            if hasattr(p, "jac"):
                del p.jac

    def prepare(self, *optimizers: torch.optim.Optimizer) -> None:
        """Moments are the same number everywhere: sqrt(v), of the size of the gradient, and m half of that."""
        self.restore()
        for optimizer in optimizers:
            for state in optimizer.state.values():
                for name, value in state.items():
                    if name == "step":
                        value.fill_(STEPS)
                    elif name.startswith("exp_avg"):
                        value.fill_(self.scale**2 if "sq" in name else 0.5 * self.scale)

    @property
    def slow(self) -> bool:
        """Whether a gradient a task takes seconds and gigabytes: a ResNet-50 with 20 heads, on the host."""
        return self.images.device.type == "cpu" and len(self.kinds) * sum(p.numel() for p in self.shared) > SLOW

    # ---- BayesAgg ----

    def groups(self) -> list[tuple[Kind, list[Any], Tensor]]:
        """(kind, its heads, targets): binary tasks that lie side by side are one group."""
        heads = list(self.model.heads)
        if len(set(self.kinds)) == 1:
            return [(self.kinds[0][0], heads, torch.cat(self.targets, 1))]
        return [(kind, [head], target) for (kind, _), head, target in zip(self.kinds, heads, self.targets, strict=True)]

    # ---- what is right ----

    def error(self, form: str) -> float:
        """Of the parameters' change since the start."""
        after = [p.detach().clone() for p in self.every]  # what is right is found by further passes
        return self.difference(after, self.exact[form])

    def difference(self, after: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
        """The largest over the largest of the exact change; NaN and infinity count as infinitely wrong."""
        worst, largest = 0.0, 0.0
        for p, begin, change in zip(after, self.begin, exact, strict=True):
            off = (p.double() - begin.double() - change).abs()
            worst = max(worst, float(torch.nan_to_num(off, nan=torch.inf).max()))
            largest = max(largest, float(change.abs().max()))
        return worst / largest

    @functools.cached_property
    def exact(self) -> dict[str, list[Tensor]]:
        """The changes of all parameters by form, float32 where their rounding does not matter any more."""
        found: dict[str, list[Tensor]] = {}
        scale = self.scale
        self.restore()
        features, losses = self.start()
        head_gradients = torch.autograd.grad(torch.stack(losses).sum(), self.own, retain_graph=True)
        arrived = [torch.autograd.grad(loss, features, retain_graph=True)[0] for loss in losses]
        heads = [adam(g, scale) for g in head_gradients]

        def passed_on(gradient: Tensor) -> list[Tensor]:
            passed = torch.autograd.grad(features, self.shared, gradient.to(features.dtype), retain_graph=True)
            return [adam(g, scale) for g in passed]

        weights = reference.align(reference.gram(arrived)).weights.tolist()
        wide = torch.stack([g.double() for g in arrived])
        found["sum"] = passed_on(wide.sum(0)) + heads
        found["features"] = passed_on(torch.einsum("t,tbd->bd", wide.new_tensor(weights), wide)) + heads
        doubled = [w for w in weights for _ in ("weight", "bias")]
        weighed = [adam(w * g.double(), scale) for w, g in zip(doubled, head_gradients, strict=True)]
        found["weighed"] = found["features"][: len(self.shared)] + weighed
        found["bayesagg"] = passed_on(bayesagg(self, features.detach(), "block")) + heads
        if self.shape.literal:
            found["bayesagg full"] = passed_on(bayesagg(self, features.detach(), "full")) + heads
        rows = [torch.autograd.grad(features, self.shared, g, retain_graph=True) for g in arrived]
        gram = reference.gram(rows)
        for form, merging in ("parameters", reference.align(gram).weights), ("upgrad", upgrad(gram)):
            merged = exact_sum(rows, merging).split([p.numel() for p in self.shared])
            found[form] = [adam(g, scale).view_as(p) for g, p in zip(merged, self.shared, strict=True)] + heads
        moved = [torch.zeros_like(p, dtype=torch.float64) for p in self.shared]
        for row in rows:
            for total, gradient in zip(moved, row, strict=True):
                total += adam(gradient, scale)
        found["adatask"] = [total.float() for total in moved] + heads
        self.restore()
        return found


def adam(gradient: Tensor, scale: float) -> Tensor:
    """The change by one step of Adam, from moments as :meth:`Problem.prepare` leaves them."""
    g, count = gradient.double(), STEPS + 1
    m = BETAS[0] * 0.5 * scale + (1 - BETAS[0]) * g
    v = BETAS[1] * scale**2 + (1 - BETAS[1]) * g.square()
    corrected = (v / (1 - BETAS[1] ** count)).sqrt() + EPS
    return (-LR * (m / (1 - BETAS[0] ** count)) / corrected).float()


def upgrad(gram: Tensor) -> Tensor:
    """UPGrad's weights [T] (Quinton and Rey, arXiv 2406.16232, proposition 1), with TorchJD's ridge: the sum over t of
    the v that minimises v'Gv with v >= e_t / T.

    With v = e_t / T + x this is a linear complementarity problem, x >= 0, y = Gx + G e_t / T >= 0, x.y = 0, which
    Murty's principal pivoting of the least index ends in finitely many steps, G being positive definite.
    """
    tasks = len(gram)
    one = torch.eye(tasks, dtype=gram.dtype, device=gram.device)
    matrix = gram / gram.trace() + RIDGE * one
    total = torch.zeros_like(gram[0])
    for bound in one / tasks:
        q, free = matrix @ bound, torch.zeros(tasks, dtype=torch.bool, device=gram.device)
        while True:
            x = torch.zeros_like(q)
            x[free] = torch.linalg.solve(matrix[free][:, free], -q[free])
            wrong = torch.where(free, x, matrix @ x + q) < -1e-14
            if not wrong.any():
                break
            free[wrong.nonzero()[0]] ^= True
        total += bound + x
    return total


def bayesagg(problem: Problem, features: Tensor, covariance: str) -> Tensor:
    """The gradient at the features, [B, D], in float64; the data set is this batch alone."""
    wide, means, variances = features.double(), [], []
    for kind, heads, target in problem.groups():
        arguments: list[Any] = [wide, target if kind == "multiclass" else target.double()]
        options: dict[str, Any] = {}
        make = getattr(posterior, f"{kind}_posterior")
        if kind != "regression":
            weight = torch.cat([torch.cat([head.weight, head.bias[:, None]], 1) for head in heads])
            arguments.append(weight.detach().double())
            options["structure"] = covariance if kind == "multiclass" else "full"
        prior = make(*arguments, **options)
        after = make(*arguments, prior=prior, **options)
        moments = getattr(reference, f"{kind}_moments")
        mean, variance = moments(*arguments[:2], after.mean, after.covariance())
        means.append(mean)
        variances.append(variance)
    mean, variance = torch.cat(means, 1), torch.cat(variances, 1)
    return reference.precision_mean(mean, variance, [POWER] * mean.shape[1])
