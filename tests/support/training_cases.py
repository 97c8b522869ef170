"""Nets with normalisation layers and tasks of three kinds, and a training step of every method, as users write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mtlgrad
from mtlgrad import AlignedMTL, BayesAgg, Binary, Multiclass, Regression
from tests.conftest import HAS_GPU
from tests.support.optim_cases import PAIRS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_GPU, reason="no usable GPU"))]
WIDTH = 8
TASKS = ("size", "marks", "kind")


class Batch(NamedTuple):
    x: Tensor
    y: list[Tensor]  #: a value, two marks and one of three classes


class LayerNorm(nn.Sequential):
    shape = (6,)

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, WIDTH), nn.LayerNorm(WIDTH))


class BatchNorm(nn.Sequential):
    shape = (2, 6, 6)

    def __init__(self) -> None:
        first, second = nn.Conv2d(2, 8, 3, bias=False), nn.Conv2d(8, WIDTH, 3, bias=False)
        norms = nn.BatchNorm2d(8), nn.BatchNorm2d(WIDTH)
        super().__init__(first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU(), nn.Flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(2)  # type: ignore[no-any-return]


class Transformer(nn.Module):
    shape = (4, 6)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, WIDTH)
        self.encode = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(self.embed(x)).mean(1)  # type: ignore[no-any-return]


BACKBONES: dict[str, type[Any]] = {"layer norm": LayerNorm, "batch norm": BatchNorm, "transformer": Transformer}


class Model(nn.Module):
    """A backbone to [B, WIDTH], and three linear heads."""

    factors = (1.0, 1.0, 1.0)  #: of the losses

    def __init__(self, backbone: str = "layer norm", seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.backbone = BACKBONES[backbone]()
            self.heads = nn.ModuleList(nn.Linear(WIDTH, outputs) for outputs in (1, 2, 3))

    @property
    def shared(self) -> list[nn.Parameter]:
        return list(self.backbone.parameters())

    def losses(self, views: Tensor | Sequence[Tensor], y: Sequence[Tensor]) -> list[Tensor]:
        """Batch means, as BayesAgg has them, from one view for all heads or one for each."""
        views = [views] * 3 if isinstance(views, Tensor) else views
        size, marks, kind = (head(view).float() for head, view in zip(self.heads, views))
        losses = [
            (size - y[0]).square().sum(1).mean(),
            F.binary_cross_entropy_with_logits(marks, y[1], reduction="none").sum(1).mean(),
            F.cross_entropy(kind, y[2]),
        ]
        return [factor * loss for factor, loss in zip(self.factors, losses)]


def batch(backbone: str = "layer norm", seed: int = 0, size: int = 32, device: str = "cpu") -> Batch:
    """Two hidden numbers an example, which are all that its labels need, in some noise."""
    generator, shape = torch.Generator().manual_seed(seed), BACKBONES[backbone].shape
    hidden = torch.randn(size, 2, generator=generator)
    x = 0.3 * torch.randn(size, *shape, generator=generator)
    x.movedim(1 if backbone == "batch norm" else -1, -1)[..., :2] += hidden.view(size, *[1] * (len(shape) - 1), 2)
    value = hidden.sum(1, keepdim=True).tanh()
    kind = torch.bucketize(hidden[:, 0] - hidden[:, 1], torch.tensor([-0.5, 0.5]))
    return Batch(x.to(device), [y.to(device) for y in (value, (hidden > 0.0).float(), kind)])


Autocast = Callable[[], Any]


def autocast(device: str, dtype: torch.dtype | None) -> Autocast:
    return nullcontext if dtype is None else lambda: torch.autocast(device, dtype)


class Trainer:
    """One step of a method under mixed precision: `forward` alone is under autocast."""

    def __init__(self, model: Model, mixed: Autocast = nullcontext, scaler: Any = None, **settings: Any):
        self.model, self.mixed = model, mixed
        self.scaler = torch.amp.GradScaler("cpu", enabled=False) if scaler is None else scaler
        self.optimizer = self.make(**settings)

    def make(self, lr: float = 0.02) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), lr=lr)

    def step(self, data: Batch) -> list[Tensor]:
        self.optimizer.zero_grad()
        losses = self.backward(data)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return [loss.detach() for loss in losses]

    def backward(self, data: Batch) -> list[Tensor]:
        raise NotImplementedError


class Sum(Trainer):
    def backward(self, data: Batch) -> list[Tensor]:
        with self.mixed():
            losses = self.model.losses(self.model.backbone(data.x), data.y)
        self.scaler.scale(torch.stack(losses).sum()).backward()
        return losses


class Layer(Trainer):
    def make(self, **settings: Any) -> torch.optim.Optimizer:
        self.aligned = AlignedMTL(3).to(next(self.model.parameters()).device)
        return super().make(**settings)

    def backward(self, data: Batch) -> list[Tensor]:
        with self.mixed():
            losses = self.model.losses(self.aligned(self.model.backbone(data.x)), data.y)
        self.scaler.scale(torch.stack(losses).sum()).backward()
        return losses


class Merge(Layer):
    def backward(self, data: Batch) -> list[Tensor]:
        with self.mixed():
            features = self.model.backbone(data.x)
            losses = self.model.losses(features, data.y)
        mtlgrad.task_backward([self.scaler.scale(loss) for loss in losses], self.model.shared, features=features)
        self.aligned.merge(self.model.shared)
        return losses


class Weigh(Layer):
    def backward(self, data: Batch) -> list[Tensor]:
        with self.mixed():
            features = self.model.backbone(data.x)
            losses = self.model.losses(features, data.y)
        scaled = [self.scaler.scale(loss) for loss in losses]
        (self.aligned.weigh(scaled, features) * torch.stack(scaled)).sum().backward()
        return losses


class Bayes(Trainer):
    """The first `warm_up` steps are plain summation; then an epoch is as long as that."""

    warm_up = 4

    def make(self, **settings: Any) -> torch.optim.Optimizer:
        size, marks, kind = self.model.heads
        self.bayes, self.steps = BayesAgg([Regression(size), Binary(marks), Multiclass(kind)]), 0
        return super().make(**settings)

    def backward(self, data: Batch) -> list[Tensor]:
        if self.steps and self.steps % self.warm_up == 0:
            self.bayes.refresh()
        self.steps += 1
        with self.mixed():
            features = self.bayes(self.model.backbone(data.x), data.y)
            losses = self.model.losses(features, data.y)
            total = self.bayes.total(losses)
        self.scaler.scale(total).backward()
        return losses


class AdaTask(Trainer):
    rule, through = "adam", True

    def make(self, lr: float | None = None, **settings: Any) -> torch.optim.Optimizer:
        lr = (0.005 if self.rule == "rmsprop" else 0.02) if lr is None else lr  # RMSprop's first steps are long
        made: torch.optim.Optimizer = PAIRS[self.rule][0](self.model.parameters(), num_tasks=3, lr=lr, **settings)
        return made

    def backward(self, data: Batch) -> list[Tensor]:
        with self.mixed():
            features = self.model.backbone(data.x)
            losses = self.model.losses(features, data.y)
        scaled = [self.scaler.scale(loss) for loss in losses]
        mtlgrad.task_backward(scaled, self.model.shared, features=features if self.through else None)
        return losses


def adatask(rule: str, through: bool) -> type[Trainer]:
    return type(f"AdaTask_{rule}", (AdaTask,), {"rule": rule, "through": through})


METHODS: dict[str, type[Trainer]] = {
    "aligned layer": Layer,
    "aligned merge": Merge,
    "aligned weigh": Weigh,
    "bayesagg": Bayes,
    **{f"{rule} through features": adatask(rule, True) for rule in PAIRS},
    **{f"{rule} whole graph": adatask(rule, False) for rule in ("adam", "rmsprop")},
}
