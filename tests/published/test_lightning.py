"""Training under Lightning: what a plain loop gives, on one rank and on two; the callback that logs."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader

import mtlgrad
from mtlgrad import rules
from mtlgrad.distributed import global_means
from mtlgrad.interop.lightning import MultiTaskMonitor
from mtlgrad.optim import AdaTaskAdam, clip_task_grad_norm_
from tests.support.ranks import Pool, rank_variables

Batch = tuple[Tensor, Tensor, Tensor]


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning's advice on these tiny runs, and what it calls in torch; any other warning stays an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
        for message in ("The 'train_dataloader' does not have many workers", "The number of training batches"):
            warnings.filterwarnings("ignore", message=message, category=PossibleUserWarning)
        yield


class LitModel(L.LightningModule):
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


class Aligned(LitModel):
    def __init__(self) -> None:
        super().__init__()
        self.aligned = mtlgrad.AlignedMTL(2)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        return sum(self.losses(*self.aligned(self.backbone(batch[0])), *batch[1:]).values())


class Bayes(LitModel):
    def __init__(self) -> None:
        super().__init__()
        self.bayes = mtlgrad.BayesAgg([mtlgrad.Regression(self.age, gamma=0.1), mtlgrad.Multiclass(self.kind)])

    def training_step(self, batch: Batch, _: int) -> Tensor:
        features = self.bayes(self.backbone(batch[0]), batch[1:])
        return self.bayes.total(self.losses(features, features, *batch[1:]))

    def on_train_epoch_end(self) -> None:
        self.bayes.refresh()


class AdaTask(LitModel):
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

    name = version = "kept"

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
        trainer(*callbacks, **settings).fit(module, DataLoader(data, batch_size=None))
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


def plainly(module: Any, data: list[Batch], epochs: int = 1, accumulate: int = 1) -> Any:
    """The loop that Lightning stands for."""
    optimizer = module.configure_optimizers()
    for _ in range(epochs):
        for start in range(0, len(data), accumulate):
            optimizer.zero_grad()
            for batch in data[start : start + accumulate]:
                if isinstance(module, AdaTask):
                    features = module.backbone(batch[0])
                    losses = module.losses(features, features, *batch[1:])
                    mtlgrad.task_backward(losses, list(module.backbone.parameters()))
                    module.merge(list(module.backbone.parameters()))
                else:
                    (module.training_step(batch, 0) / accumulate).backward()
            optimizer.step()
        module.on_train_epoch_end()
    return module


@pytest.mark.parametrize(("kind", "accumulate"), [(Aligned, 1), (Aligned, 2), (Bayes, 1), (AdaTask, 1), (Merged, 1)])
def test_training_equals_a_plain_loop(kind: type[LitModel], accumulate: int) -> None:
    """With a checkpoint in the middle: test_trainers.py."""
    data = batches([8, 8, 8, 4])
    settings = {"accumulate_grad_batches": accumulate} if accumulate > 1 else {}
    found = fit(kind(), data, max_epochs=2, **settings)
    expected = plainly(kind(), data, epochs=2, accumulate=accumulate)
    torch.testing.assert_close(weights(found), weights(expected), rtol=1e-6, atol=1e-7)


def test_the_scale_of_fp16_and_its_overflow() -> None:
    class Strong(AdaTask):
        def losses(self, *arguments: Tensor) -> dict[str, Tensor]:
            return {name: 30.0 * loss for name, loss in super().losses(*arguments).items()}

        def on_before_optimizer_step(self, _: Any) -> None:
            clip_task_grad_norm_(self.backbone.parameters(), 0.05)  # of what is no longer scaled

    class Scaled(Strong):
        def losses(self, *arguments: Tensor) -> dict[str, Tensor]:
            scaler = self.trainer.precision_plugin.scaler
            return {name: scaler.scale(loss) for name, loss in super().losses(*arguments).items()}

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    precision.precision = "bf16-mixed"  # autocast to what the CPU is quick with; the scaler stays
    data, module = batches([8] * 10), Scaled()
    shown = Shown(lambda *_: {"scale": scaler.get_scale(), **weights(module)})
    fit(module, data, shown, plugins=[precision])
    skipped = [told["scale"] < 2.0 ** (127 - step) for step, told in enumerate(shown.seen)].index(False)
    assert 1 <= skipped <= 8
    before = {"scale": 2.0 ** (127 - skipped), **weights(Scaled())}
    torch.testing.assert_close(shown.seen[skipped - 1], before, rtol=0.0, atol=0.0)
    expected = weights(fit(Strong(), data[skipped:], precision="bf16-mixed"))
    torch.testing.assert_close(weights(module), expected, rtol=1e-6, atol=0.0)


# Rank 1 has one example in the second batch, and no label of the first task in the third.
COUNTS = [(8, 8), (7, 1), (4, 6)]


def whole() -> list[Batch]:
    found = batches([sum(counts) for counts in COUNTS])
    found[2][1][COUNTS[2][0] :] = float("nan")
    return found


class Reduced(Callback):
    """Counts the buckets that DDP itself averages."""

    count = 0

    def on_train_start(self, trainer: Any, _: Any) -> None:
        def hook(_, bucket):  # torch reads the annotations
            self.count += 1
            return torch.distributed.algorithms.ddp_comm_hooks.default_hooks.allreduce_hook(None, bucket)

        trainer.strategy.model.register_comm_hook(None, hook)


class Watched(MultiTaskMonitor):
    count = 0

    def _values(self, *arguments: Any) -> Any:
        self.count += 1
        return super()._values(*arguments)


class Whole(Callback):
    """Parameters after training, put together from their shards."""

    def on_train_end(self, _: Any, module: Any) -> None:
        self.found = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in weights(module).items()}


def on_a_rank(kind: type[LitModel], sharded: bool) -> tuple[dict[str, Tensor], int, list[Any], list[Any]]:
    class Sharded(kind):
        def configure_model(self) -> None:
            for part in (self.backbone, self.age, self.kind) if sharded else ():
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    rank = torch.distributed.get_rank()
    start = [0 if rank == 0 else counts[0] for counts in COUNTS]
    data: list[Any] = [
        tuple(values[first : first + counts[rank]] for values in batch)
        for first, counts, batch in zip(start, COUNTS, whole())
    ]
    launched = {**rank_variables(rank, 2, 0), "TORCHELASTIC_RUN_ID": "pool", "GROUP_RANK": "0"}
    logger, shown, monitor, reduced, at_end = Kept(), Shown(values), Watched(every_n_steps=1), Reduced(), Whole()
    callbacks = [shown, monitor, at_end, *[reduced] * (not sharded)]
    with mock.patch.dict(os.environ, launched):
        strategy: Any = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if sharded else "ddp"
        settings: Any = {"strategy": strategy, "devices": 2, "use_distributed_sampler": False, "max_epochs": 2}
        fit(Sharded(), data, *callbacks, logger=logger, **settings)
    assert monitor.count == len(shown.seen)  # on every rank, for what it reads may take collectives
    return at_end.found, reduced.count, logger.seen, shown.seen


ON_RANKS: list[tuple[type[LitModel], bool]] = [
    *((kind, False) for kind in (Aligned, Bayes, AdaTask, WholeGraph, Merged)),
    *((kind, True) for kind in (Aligned, WholeGraph)),
]


def each_on_a_rank() -> list[tuple[dict[str, Tensor], int, list[Any], list[Any]]]:
    return [on_a_rank(*case) for case in ON_RANKS]


@pytest.mark.slow
def test_two_ranks_equal_one_process(two_ranks: Pool) -> None:
    for (kind, sharded), *ranks in zip(ON_RANKS, *two_ranks(each_on_a_rank), strict=True):
        shown = Shown(values)
        expected = weights(fit(kind(), whole(), shown, max_epochs=2))
        for rank, (found, buckets, logged, told) in enumerate(ranks):
            for name, value in expected.items():
                assert (found[name] - value).abs().max() <= 1e-6 * value.abs().max(), (kind, sharded, name)
            # task_backward has averaged already
            assert (buckets > 0) == (kind in (Aligned, Bayes) and not sharded)
            for own, one in zip(told, [] if kind is Bayes else shown.seen):  # BayesAgg tells of its rank's examples
                assert own == pytest.approx(one, rel=1e-5)
            assert logged == ([(step, one) for step, one in enumerate(told) if one] if rank == 0 else [])


# ---- the callback that logs ------------------------------------------------------------------------------------------


class Ruled(LitModel):
    """Every rule, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        kinds: list[Any] = [getattr(rules, name) for name in rules.__all__ if name != "GramRule"]
        self.rules = nn.ModuleDict({kind.__name__: kind(2) for kind in kinds})
        self.rules["own"] = mtlgrad.GramRule(2, lambda gram: gram.diagonal())
        self.unused = mtlgrad.MGDA(2)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        features = self.backbone(batch[0])
        losses = self.losses(features, features, *batch[1:])
        for rule in self.rules.values():
            rule.weigh(losses, features)
        return torch.stack(list(losses.values())).sum()


@pytest.mark.parametrize("kind", [Aligned, Bayes, AdaTask])
def test_what_is_logged_is_what_the_module_tells(kind: type[LitModel]) -> None:
    logger, shown = Kept(), Shown(values)
    fit(kind(), batches([8] * 7), MultiTaskMonitor(every_n_steps=2), shown, logger=logger, max_epochs=2)
    expected = [(step, told) for step, told in enumerate(shown.seen) if step % 2 == 1 and told]
    assert logger.seen == expected
    assert len(expected) == (4 if kind is Bayes else 7)  # BayesAgg has weights from the second epoch on


def test_every_rule_logs_its_weights_and_alignment_alone_more() -> None:
    logger = Kept()
    module = fit(Ruled(), batches([8]), MultiTaskMonitor(1, ["age", "kind"]), logger=logger)
    [(_, metrics)] = logger.seen
    expected = {
        f"rules.{name}/weight/{task}": float(rule.weights[t])
        for name, rule in module.rules.items()
        for t, task in enumerate(("age", "kind"))
    }
    assert len(expected) == 2 * 10
    aligned = module.rules["AlignedMTL"]
    expected["rules.AlignedMTL/condition_number"] = float(aligned.condition_number)
    expected["rules.AlignedMTL/rank"] = 2.0
    assert metrics == expected


def test_steps_are_those_of_self_log() -> None:
    class Logs(Aligned):
        def training_step(self, batch: Batch, number: int) -> Tensor:
            loss = super().training_step(batch, number)
            self.log("loss", loss)
            return loss

    logger = Kept()
    settings: Any = {"accumulate_grad_batches": 2, "log_every_n_steps": 2, "max_epochs": 2, "logger": logger}
    fit(Logs(), batches([8] * 9), MultiTaskMonitor(), **settings)
    assert [step for step, found in logger.seen if "loss" in found] == [1, 3, 5, 7, 9]
    assert [step for step, found in logger.seen if "aligned/rank" in found] == [1, 3, 5, 7, 9]


def test_nothing_is_computed_or_read_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"diagnose": 0, "dominance": 0, "tolist": 0}

    def count(owner: Any, name: str, key: str, patch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any) -> Any:
            calls[key] += 1
            return original(*arguments)

        patch.setattr(owner, name, call)

    class Both(AdaTask):
        def __init__(self) -> None:
            super().__init__()
            self.bayes = mtlgrad.BayesAgg([mtlgrad.Regression(self.age), mtlgrad.Multiclass(self.kind)])

        def training_step(self, batch: Batch, number: int) -> None:
            features = self.bayes(self.backbone(batch[0]), batch[1:])
            self.bayes.total(self.losses(features, features, *batch[1:])).backward()
            super().training_step(batch, number)

        def on_train_epoch_end(self) -> None:
            self.bayes.refresh()

    logger = Kept()
    monitor = MultiTaskMonitor(every_n_steps=4)
    end = monitor.on_train_batch_end

    def watched(*arguments: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            count(Tensor, "tolist", "tolist", patch)
            end(*arguments)

    monitor.on_train_batch_end = watched
    count(mtlgrad.BayesAgg, "_diagnose", "diagnose", monkeypatch)
    count(AdaTaskAdam, "dominance", "dominance", monkeypatch)
    fit(Both(), batches([8] * 6), monitor, logger=logger, max_epochs=2)
    assert [step for step, _ in logger.seen] == [3, 7, 11]
    # BayesAgg has no weights at step 3
    assert calls == {"diagnose": 2, "dominance": 3, "tolist": 3}


def test_names() -> None:
    class Two(AdaTask):
        """An optimizer without groups, two of one class, one that records nothing, and a compiled part."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.compile(nn.ModuleDict({"align": mtlgrad.AlignedMTL(2)}), backend="eager")

        def training_step(self, batch: Batch, _: int) -> None:
            features = self.backbone(batch[0])
            losses = self.losses(features, features, *batch[1:])
            self.inner.get_submodule("align").weigh(losses, features)
            mtlgrad.task_backward(losses, shared=self.backbone.parameters())
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            return [
                AdaTaskAdam(self.backbone[0].parameters(), num_tasks=2),
                AdaTaskAdam([*self.backbone[1].parameters(), *self.age.parameters()], num_tasks=2),
                AdaTaskAdam(self.backbone[3].parameters(), num_tasks=2, dominance_decay=None),
                torch.optim.SGD(self.kind.parameters(), lr=0.1),
            ]

    logger = Kept()
    fit(Two(), batches([8]), MultiTaskMonitor(1, ["age", "kind"]), logger=logger)
    [(step, metrics)] = logger.seen
    assert step == 0
    names = [
        f"{name}/{task}" for name in ("AdaTaskAdam/dominance", "AdaTaskAdam-1/dominance") for task in ("age", "kind")
    ]
    align = ["inner.align/weight/age", "inner.align/weight/kind", "inner.align/condition_number", "inner.align/rank"]
    assert sorted(metrics) == sorted([*align, *names])


@pytest.mark.parametrize(
    ("monitor", "module", "message"),
    [
        ({"task_names": ["age"]}, Aligned, "task_names: expected 2, the tasks of aligned, found 1"),
        ({"task_names": ["age"]}, Bayes, "task_names: expected 2, the tasks of bayes, found 1"),
        ({"task_names": ["a", "b", "c"]}, AdaTask, "task_names: expected 2, the tasks of AdaTaskAdam, found 3"),
        (
            {},
            LitModel,
            r"pl_module: expected a rule \(AlignedMTL, UPGrad, ...\) or a BayesAgg among its modules, or an Ada",
        ),
        ({"task_names": ["age"]}, Ruled, "task_names: expected 2, the tasks of rules.IMTLG, found 1"),
        ({"every_n_steps": 0}, Aligned, "every_n_steps: expected at least 1, found 0"),
    ],
)
def test_refused(monitor: dict[str, Any], module: type[LitModel], message: str) -> None:
    class Trains(module):
        def training_step(self, *_: Any) -> Any:
            raise AssertionError("training began")

    with pytest.raises(ValueError, match=f"MultiTaskMonitor: {message}"):
        fit(Trains(), batches([8]), MultiTaskMonitor(**monitor), logger=Kept())


def test_without_a_logger() -> None:
    with pytest.raises(ValueError, match="MultiTaskMonitor: trainer: expected a logger, found none"):
        fit(Aligned(), batches([8]), MultiTaskMonitor())


def test_without_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mtlgrad.interop.lightning")
    for name in [name for name in sys.modules if name.split(".")[0] == "lightning"]:
        monkeypatch.delitem(sys.modules, name)

    class Absent:
        def find_spec(self, name: str, *_: Any) -> None:
            if name.split(".")[0] == "lightning":
                raise ModuleNotFoundError(f"No module named {name!r}", name="lightning")

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(ImportError, match="expected the package lightning, found none; pip install lightning"):
        importlib.import_module("mtlgrad.interop.lightning")
