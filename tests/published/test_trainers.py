"""Twenty steps under other people's trainers, with clipping, micro-batches, averaged weights and a save and load in the
middle, equal a plain loop: a small BERT with two heads, in transformers.Trainer, Lightning and Accelerate."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel, BertPreTrainedModel, Trainer, TrainerCallback, TrainingArguments

import mtlgrad
from mtlgrad.optim import AdaTaskAdam, clip_task_grad_norm_
from tests.published.test_lightning import quiet

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = ["bayes", *(pytest.param(name, marks=pytest.mark.slow) for name in ("aligned", "moving")), "adatask"]
every_method = pytest.mark.parametrize("method", METHODS)
STEPS, EPOCH, MICRO, CLIP, DECAY, LR = 20, 10, 2, 0.5, 0.9, 1e-3  # steps in all and in an epoch, batches in a step
Batch = dict[str, Tensor]
Weights = dict[str, Tensor]


class Config(BertConfig):
    def __init__(self, method: str = "aligned", **options: Any) -> None:
        super().__init__(**options)
        self.method = method


class Bert(BertPreTrainedModel):
    """Two heads on the pooled output: a number, NaN where unknown, and one of three kinds."""

    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.age, self.kind = nn.Linear(config.hidden_size, 1), nn.Linear(config.hidden_size, 3)
        if config.method == "aligned":
            self.layer = mtlgrad.AlignedMTL(2)
        elif config.method in ("bayes", "moving"):
            heads = [mtlgrad.Regression(self.age), mtlgrad.Multiclass(self.kind)]
            statistics = "moving" if config.method == "moving" else "streaming"
            self.layer = mtlgrad.BayesAgg(heads, statistics=statistics)
        self.post_init()

    def losses(self, input_ids: Tensor, age: Tensor, kind: Tensor) -> dict[str, Tensor]:
        features = self.bert(input_ids).pooler_output
        views = [features] * 2
        if self.config.method == "aligned":
            views = self.layer(features)
        elif self.config.method != "adatask":
            views = [self.layer(features, [age, kind])] * 2
        known = ~age.isnan()
        return {
            "age": 20.0 * F.mse_loss(self.age(views[0])[known], age[known]),
            "kind": F.cross_entropy(self.kind(views[1]), kind),
        }

    def forward(self, input_ids: Tensor, age: Tensor, kind: Tensor) -> dict[str, Any]:
        losses = self.losses(input_ids, age, kind)
        return {"loss": losses["age"] + losses["kind"], "losses": losses}

    def optimizer(self, **options: Any) -> torch.optim.Optimizer:
        if self.config.method == "adatask":
            return AdaTaskAdam(self.parameters(), lr=LR, num_tasks=2, **options)
        return torch.optim.Adam(self.parameters(), lr=LR)

    def task_backward(self, batch: Batch) -> Tensor:
        losses = {name: loss / MICRO for name, loss in self.losses(**batch).items()}
        mtlgrad.task_backward(losses, self.bert.parameters())
        return torch.stack([loss.detach() for loss in losses.values()]).sum()


def model_of(method: str) -> Bert:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Bert(Config(method, vocab_size=50, max_position_embeddings=12, **sizes, **dropout))


def examples() -> list[Batch]:
    """One epoch's."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(50, (8 * MICRO * EPOCH, 12), generator=generator)
    age = ids[:, :3].float().mean(1, keepdim=True) / 50.0
    age[::7] = torch.nan
    return [{"input_ids": i, "age": a, "kind": k} for i, a, k in zip(ids, age, ids[:, 3] % 3)]


def loader() -> DataLoader[Batch]:
    return DataLoader(examples(), batch_size=8)


def weights(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def averaging(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))


@functools.cache
def plainly(method: str) -> tuple[Weights, Weights]:
    """Return the weights, and their average, after all steps in one go."""
    model = model_of(method)
    optimizer, average = model.optimizer(), averaging(model)
    for _ in range(STEPS // EPOCH):
        data = list(loader())
        for first in range(0, len(data), MICRO):
            for batch in data[first : first + MICRO]:
                if method == "adatask":
                    model.task_backward(batch)
                else:
                    (model(**batch)["loss"] / MICRO).backward()
            if method == "adatask":
                clip_task_grad_norm_(model.bert.parameters(), CLIP)
                nn.utils.clip_grad_norm_([*model.age.parameters(), *model.kind.parameters()], CLIP)
            else:
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
        if method == "bayes":
            model.layer.refresh()
    return weights(model), weights(average.module)


def assert_same(found: Weights, expected: Weights) -> None:
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-6 * value.abs().max().clamp(min=0.1), name


class Refresh(TrainerCallback):
    def on_epoch_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        if model.config.method == "bayes":
            model.layer.refresh()


# ---- transformers ----------------------------------------------------------------------------------------------------


class AdaTaskTrainer(Trainer):
    def training_step(self, model: nn.Module, inputs: Batch, *_: Any) -> Tensor:
        model.train()
        return self.accelerator.unwrap_model(model).task_backward(self._prepare_inputs(inputs))


class Average(TrainerCallback):
    def __init__(self, average: AveragedModel) -> None:
        self.average = average

    def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.average.update_parameters(model)


def trainer_of(model: Bert, folder: Path, steps: int, average: AveragedModel) -> Trainer:
    per_task = model.config.method == "adatask"
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=MICRO,
        max_grad_norm=0.0 if per_task else CLIP,
        lr_scheduler_type="constant",
        label_names=["age", "kind"],
        save_steps=STEPS // 2 - 3,  # in the middle of an epoch
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    make = AdaTaskTrainer if per_task else Trainer
    optimizers = (model.optimizer(max_norm=CLIP) if per_task else model.optimizer(), None)
    callbacks = [Refresh(), Average(average)]
    trainer = make(model, arguments, train_dataset=examples(), optimizers=optimizers, callbacks=callbacks)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(examples())  # as the plain loop
    return trainer


@pytest.mark.slow
@every_method
def test_transformers(method: str, tmp_path: Path) -> None:
    model = model_of(method)
    average = averaging(model)
    middle = STEPS // 2 - 3
    trainer_of(model, tmp_path, middle, average).train()
    again = model_of(method)
    trainer_of(again, tmp_path, STEPS, average).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{middle}"))
    expected, mean = plainly(method)
    assert_same(weights(again), expected)
    assert_same(weights(average.module), mean)


# ---- Lightning -------------------------------------------------------------------------------------------------------


class Module(L.LightningModule):
    def __init__(self, method: str) -> None:
        super().__init__()
        self.model = model_of(method)
        self.automatic_optimization = method != "adatask"

    def training_step(self, batch: Batch, number: int) -> Any:
        if self.automatic_optimization:
            return self.model(**batch)["loss"]
        self.model.task_backward(batch)
        if number % MICRO == MICRO - 1:
            optimizer: Any = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()
        return None

    def on_train_epoch_end(self) -> None:
        if self.model.config.method == "bayes":
            self.model.layer.refresh()

    def configure_optimizers(self) -> Any:
        return self.model.optimizer(**{} if self.automatic_optimization else {"max_norm": CLIP})


def fit(module: Module, folder: Path, epochs: int, resume: Path | None = None) -> Path:
    """Return the last epoch's checkpoint."""
    options = {"accumulate_grad_batches": MICRO, "gradient_clip_val": CLIP} if module.automatic_optimization else {}
    saving = ModelCheckpoint(folder, save_on_train_epoch_end=True)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[EMAWeightAveraging(decay=DECAY), saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, loader(), ckpt_path=resume)
    return Path(saving.best_model_path)


@every_method
def test_lightning(method: str, tmp_path: Path) -> None:
    with quiet():
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        middle = fit(Module(method), tmp_path, 1)
        end = torch.load(fit(Module(method), tmp_path, STEPS // EPOCH, middle))
    expected, mean = plainly(method)
    assert_same({name: end["current_model_state"][f"model.{name}"] for name in expected}, expected)
    assert_same({name: end["state_dict"][f"model.{name}"] for name in expected}, mean)


# ---- Accelerate ------------------------------------------------------------------------------------------------------


@contextmanager
def accelerated() -> Iterator[Accelerator]:
    with mock.patch.dict(os.environ):
        try:
            yield Accelerator(cpu=True, gradient_accumulation_steps=MICRO)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


@every_method
def test_accelerate(method: str, tmp_path: Path) -> None:
    for resume in (False, True):
        with accelerated() as accelerator:
            plain = model_of(method)
            average = averaging(plain)
            options = {"max_norm": CLIP} if method == "adatask" else {}
            model, optimizer, data = accelerator.prepare(plain, plain.optimizer(**options), loader())
            accelerator.register_for_checkpointing(average)
            if resume:
                accelerator.load_state(tmp_path)
            for batch in data:
                with accelerator.accumulate(model):
                    if method == "adatask":
                        plain.task_backward(batch)
                    else:
                        accelerator.backward(model(**batch)["loss"])
                        if accelerator.sync_gradients:
                            accelerator.clip_grad_norm_(model.parameters(), CLIP)
                    optimizer.step()
                    optimizer.zero_grad()
                    if accelerator.sync_gradients:
                        average.update_parameters(plain)
            if method == "bayes":
                plain.layer.refresh()
            accelerator.save_state(tmp_path)
    expected, mean = plainly(method)
    assert_same(weights(plain), expected)
    assert_same(weights(average.module), mean)


# ---- a folder with a model -------------------------------------------------------------------------------------------


@every_method
def test_a_model_from_a_folder_goes_on_as_it_was(method: str, tmp_path: Path) -> None:
    """``from_pretrained`` makes models without memory, and fills them."""
    model = model_of(method)
    for step in range(2):
        for batch in loader():
            model.task_backward(batch) if method == "adatask" else model(**batch)["loss"].backward()
        if step == 0 and method == "bayes":
            model.layer.refresh()
        if step == 0:
            model.save_pretrained(tmp_path)
            for p in model.bert.parameters():
                p.__dict__.pop("jac", None)
            model.zero_grad()
    again = Bert.from_pretrained(tmp_path)
    again.train()
    for batch in loader():
        again.task_backward(batch) if method == "adatask" else again(**batch)["loss"].backward()
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
        found = (p.jac, q.jac) if hasattr(p, "jac") else (p.grad, q.grad)
        torch.testing.assert_close(*found, msg=lambda text: f"{name}: {text}")  # noqa: B023
