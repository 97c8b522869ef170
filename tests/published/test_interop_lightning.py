"""The callback that logs, under Lightning, what the methods tell."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlgrad
from mtlgrad import rules
from mtlgrad.interop.lightning import MultiTaskMonitor
from mtlgrad.optim import AdaTaskAdam
from tests.published.test_lightning import AdaTask, Aligned, Batch, Bayes, Kept, LitModel, Shown, batches, fit, values


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

    monitor.on_train_batch_end = watched  # type: ignore[method-assign]
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
    class Trains(module):  # type: ignore[misc, valid-type]
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
