"""Small modules, a loop and a logger for tests under Lightning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import mtlgrad
from mtlgrad.distributed import global_means
from mtlgrad.optim import AdaTaskAdam

Batch = tuple[Tensor, Tensor, Tensor]


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning's advice on these tiny runs, and what it calls in torch; any other warning stays an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
        for message in ("The 'train_dataloader' does not have many workers", "The number of training batches"):
            warnings.filterwarnings("ignore", message=message, category=PossibleUserWarning)
        yield


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.backbone = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 8))
            self.age, self.kind = nn.Linear(8, 1), nn.Linear(8, 3)

    def losses(self, for_age: Tensor, for_kind: Tensor, age: Tensor, kind: Tensor) -> dict[str, Tensor]:
        """Labels may be missing: NaN and -100."""
        known, named = ~age.isnan().squeeze(1), kind >= 0
        return global_means(
            {
                "age": (self.age(for_age) - age)[known].square(),
                "kind": F.cross_entropy(self.kind(for_kind)[named], kind[named], reduction="none"),
            }
        )

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Aligned(Model):
    def __init__(self) -> None:
        super().__init__()
        self.aligned = mtlgrad.AlignedMTL(2)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        return sum(self.losses(*self.aligned(self.backbone(batch[0])), *batch[1:]).values())  # type: ignore[return-value]


class Bayes(Model):
    def __init__(self) -> None:
        super().__init__()
        self.bayes = mtlgrad.BayesAgg([mtlgrad.Regression(self.age, gamma=0.1), mtlgrad.Multiclass(self.kind)])

    def training_step(self, batch: Batch, _: int) -> Tensor:
        features = self.bayes(self.backbone(batch[0]), batch[1:])
        return self.bayes.total(self.losses(features, features, *batch[1:]))

    def on_train_epoch_end(self) -> None:
        self.bayes.refresh()


class AdaTask(Model):
    automatic_optimization = False
    through_features = True

    def training_step(self, batch: Batch, _: int) -> None:
        shared, optimizer = list(self.backbone.parameters()), self.optimizers()
        optimizer.zero_grad()
        features = self.backbone(batch[0])
        losses = self.losses(features, features, *batch[1:])
        mtlgrad.task_backward(losses, shared, features=features if self.through_features else None)
        self.merge(shared)
        optimizer.step()

    def merge(self, shared: list[nn.Parameter]) -> None:
        pass

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": self.backbone[0].parameters(), "name": "first"},
            {"params": self.backbone[1:].parameters()},
            {"params": [*self.age.parameters(), *self.kind.parameters()]},
        ]
        return AdaTaskAdam(groups, num_tasks=2, lr=0.01)


class WholeGraph(AdaTask):
    through_features = False


class Merged(AdaTask):
    """Aligned-MTL on the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.aligned = mtlgrad.AlignedMTL(2)

    def merge(self, shared: list[nn.Parameter]) -> None:
        self.aligned.merge(shared)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def batches(sizes: list[int], seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in sizes:
        x = torch.randn(size, 6, generator=generator)
        found.append((x, x[:, :1] + x[:, 1:2], x[:, :3].argmax(1)))
    return found


class Kept(Logger):
    """What a logger is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, dict[str, float]]] = []

    name = version = "kept"  # type: ignore[assignment]

    def log_hyperparams(self, *_: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.seen.append((step, metrics))


class Shown(Callback):
    """What the module and its optimizers tell after every batch."""

    def __init__(self, read: Callable[[Any, Any], dict[str, Any]]):
        self.read, self.seen = read, []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.seen.append(self.read(trainer, module))


def trainer(*callbacks: Callback, logger: Any = False, **settings: Any) -> L.Trainer:
    given = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, **settings}
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return L.Trainer(logger=logger, callbacks=list(callbacks), **silent, **given)


def fit(module: Any, data: list[Batch], *callbacks: Callback, **settings: Any) -> Any:
    with quiet():
        trainer(*callbacks, **settings).fit(module, DataLoader(data, batch_size=None))  # type: ignore[arg-type]
    return module


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def values(trainer: Any, module: Any) -> dict[str, Any]:
    """All that the callback would log, by this file's own reading."""
    found = {}
    if isinstance(module, (Aligned, Merged)):
        tensors = module.aligned.weights, module.aligned.condition_number, module.aligned.rank
        found = {f"aligned/weight/{t}": float(w) for t, w in enumerate(tensors[0])}
        found |= {"aligned/condition_number": float(tensors[1]), "aligned/rank": float(tensors[2])}
    if isinstance(module, Bayes) and module.bayes.task_weights is not None:
        found = {f"bayes/task_weight/{t}": float(w) for t, w in enumerate(module.bayes.task_weights)}
    if isinstance(trainer.optimizers[0], AdaTaskAdam):
        shares = trainer.optimizers[0].dominance()
        for group, row in (("first", 0), ("1", 1)):
            found |= {f"AdaTaskAdam/{group}/dominance/{t}": float(shares[row, t]) for t in range(2)}
    return found
