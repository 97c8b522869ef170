"""Training under Lightning: what a plain loop gives, on one rank and on two."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

import mtlgrad
from mtlgrad.interop.lightning import MultiTaskMonitor
from mtlgrad.optim import clip_task_grad_norm_
from tests.support.lightning_cases import (
    AdaTask,
    Aligned,
    Batch,
    Bayes,
    Kept,
    Merged,
    Model,
    Shown,
    WholeGraph,
    batches,
    fit,
    quiet,
    trainer,
    values,
    weights,
)
from tests.support.ranks import Pool, environment


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


@pytest.mark.parametrize(
    ("kind", "accumulate"), [(Aligned, 1), (Aligned, 2), (Bayes, 1), (Bayes, 2), (AdaTask, 1), (Merged, 1)]
)
def test_training_equals_a_plain_loop(kind: type[Model], accumulate: int) -> None:
    data = batches([8, 8, 8, 4])
    settings = {"accumulate_grad_batches": accumulate} if accumulate > 1 else {}
    found = fit(kind(), data, max_epochs=2, **settings)
    expected = plainly(kind(), data, epochs=2, accumulate=accumulate)
    torch.testing.assert_close(weights(found), weights(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [Aligned, Bayes, AdaTask])
def test_a_checkpoint_resumes(kind: type[Model], tmp_path: Path) -> None:
    data = batches([8, 8, 4])
    expected = fit(kind(), data, max_epochs=2)
    with quiet():
        first = trainer(max_epochs=1)
        first.fit(kind(), DataLoader(data, batch_size=None))  # type: ignore[arg-type]
        first.save_checkpoint(tmp_path / "state.ckpt")
        found = kind()
        trainer(max_epochs=2).fit(found, DataLoader(data, batch_size=None), ckpt_path=tmp_path / "state.ckpt")  # type: ignore[arg-type]
    torch.testing.assert_close(weights(found), weights(expected), rtol=1e-6, atol=0.0)


def test_the_scale_of_fp16_and_its_overflow() -> None:
    class Strong(AdaTask):
        def losses(self, *arguments: Tensor) -> dict[str, Tensor]:
            return {name: 30.0 * loss for name, loss in super().losses(*arguments).items()}

        def on_before_optimizer_step(self, _: Any) -> None:
            clip_task_grad_norm_(self.backbone.parameters(), 0.05)  # of what is no longer scaled

    class Scaled(Strong):
        def losses(self, *arguments: Tensor) -> dict[str, Tensor]:
            scaler = self.trainer.precision_plugin.scaler  # type: ignore[attr-defined]
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
        def hook(_, bucket):  # type: ignore[no-untyped-def]  # torch reads the annotations
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


def on_a_rank(kind: type[Model], sharded: bool) -> tuple[dict[str, Tensor], int, list[Any], list[Any]]:
    class Sharded(kind):  # type: ignore[misc, valid-type]
        def configure_model(self) -> None:
            for part in (self.backbone, self.age, self.kind) if sharded else ():
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    rank = torch.distributed.get_rank()
    start = [0 if rank == 0 else counts[0] for counts in COUNTS]
    data: list[Any] = [
        tuple(values[first : first + counts[rank]] for values in batch)
        for first, counts, batch in zip(start, COUNTS, whole())
    ]
    launched = {**environment(rank, 2, 0), "TORCHELASTIC_RUN_ID": "pool", "GROUP_RANK": "0"}
    logger, shown, monitor, reduced, at_end = Kept(), Shown(values), Watched(every_n_steps=1), Reduced(), Whole()
    callbacks = [shown, monitor, at_end, *[reduced] * (not sharded)]
    with mock.patch.dict(os.environ, launched):
        strategy: Any = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if sharded else "ddp"
        settings: Any = {"strategy": strategy, "devices": 2, "use_distributed_sampler": False, "max_epochs": 2}
        fit(Sharded(), data, *callbacks, logger=logger, **settings)
    assert monitor.count == len(shown.seen)  # on every rank, for what it reads may take collectives
    return at_end.found, reduced.count, logger.seen, shown.seen


@pytest.mark.parametrize(
    ("kind", "sharded"),
    [(kind, False) for kind in (Aligned, Bayes, AdaTask, WholeGraph, Merged)] + [(Aligned, True), (WholeGraph, True)],
)
def test_two_ranks_equal_one_process(kind: type[Model], sharded: bool, two_ranks: Pool) -> None:
    shown = Shown(values)
    expected = weights(fit(kind(), whole(), shown, max_epochs=2))
    for rank, (found, buckets, logged, told) in enumerate(two_ranks(on_a_rank, kind, sharded)):
        for name, value in expected.items():
            assert (found[name] - value).abs().max() <= 1e-6 * value.abs().max(), name
        # task_backward has averaged already
        assert (buckets > 0) == (kind in (Aligned, Bayes) and not sharded)
        for own, one in zip(told, [] if kind is Bayes else shown.seen):  # BayesAgg tells of its rank's examples
            assert own == pytest.approx(one, rel=1e-5)
        assert logged == ([(step, one) for step, one in enumerate(told) if one] if rank == 0 else [])
