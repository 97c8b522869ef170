"""Training with Hugging Face Accelerate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.nn import functional as F

import mtlgrad
from mtlgrad.distributed import global_means
from mtlgrad.optim import AdaTaskAdam, clip_task_grad_norm_, unscale_jac_
from tests.support.nets import Model
from tests.support.ranks import Pool, rank_variables

Batch = tuple[Tensor, Tensor, Tensor]


@contextmanager
def accelerated(**settings: Any) -> Iterator[Accelerator]:
    """What Accelerate keeps for the process, and sets in its environment, ends with it."""
    with mock.patch.dict(os.environ):
        try:
            yield Accelerator(cpu=True, **settings)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


class Prepared(Model):
    """With a layer; what comes out are the heads' outputs and the features."""

    def __init__(self, method: str) -> None:
        super().__init__(
            lambda: nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 8)), heads=(1, 3)
        )
        self.method = method
        age, kind = self.heads
        if method == "aligned":
            self.layer = mtlgrad.AlignedMTL(2)
        elif method == "bayes":
            self.layer = mtlgrad.BayesAgg([mtlgrad.Regression(age), mtlgrad.Multiclass(kind)])

    def forward(self, x: Tensor, age: Tensor, kind: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = views = self.backbone(x)
        if self.method == "aligned":
            views = self.layer(features)
        elif self.method == "bayes":
            views = self.layer(features, [age, kind])
        for_age, for_kind = views if isinstance(views, tuple) else (views, views)
        return self.heads[0](for_age), self.heads[1](for_kind), features

    def optimizer(self) -> torch.optim.Optimizer:
        if self.method == "adatask":
            return AdaTaskAdam(self.parameters(), num_tasks=2, lr=0.01)
        return torch.optim.SGD(self.parameters(), lr=0.1)


def losses_of(outputs: tuple[Tensor, ...], age: Tensor, kind: Tensor) -> list[Tensor]:
    """Labels may be missing: NaN and -100."""
    known, named = ~age.isnan().squeeze(1), kind >= 0
    # .float(): as Accelerate makes outputs under mixed precision
    for_age, for_kind = (output.float() for output in outputs[:2])
    kinds = F.cross_entropy(for_kind[named], kind[named], reduction="none")
    return global_means([(for_age - age)[known].square(), kinds])


def batches(sizes: list[int], seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in sizes:
        x = torch.randn(size, 6, generator=generator)
        found.append((x, x[:, :1] + x[:, 1:2], x[:, :3].argmax(1)))
    return found


def train(accelerator: Accelerator, model: Any, optimizer: Any, data: list[Batch]) -> None:
    """As the guide has it."""
    inner = accelerator.unwrap_model(model)
    for batch in data:
        with accelerator.accumulate(model):
            if inner.method == "adatask":
                with accelerator.no_sync(model):
                    losses = losses_of(model(*batch), *batch[1:])
                    losses = [loss / accelerator.gradient_accumulation_steps for loss in losses]
                    mtlgrad.task_backward(losses, shared=inner.backbone.parameters())
            else:
                losses = losses_of(model(*batch), *batch[1:])
                accelerator.backward(inner.layer.total(losses) if inner.method == "bayes" else sum(losses))
            optimizer.step()
            optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def fit(method: str, data: list[Batch], epochs: int = 1, **settings: Any) -> dict[str, Tensor]:
    with accelerated(**settings) as accelerator:
        plain = Prepared(method)
        model, optimizer = accelerator.prepare(plain, plain.optimizer())
        for _ in range(epochs):
            train(accelerator, model, optimizer, data)
            if method == "bayes":
                plain.layer.refresh()
        return weights(plain)


def plainly(method: str, data: list[Batch], epochs: int, accumulate: int, dtype: torch.dtype | None) -> Any:
    """The loop that Accelerate stands for."""
    model = Prepared(method)
    optimizer = model.optimizer()
    for _ in range(epochs):
        for start in range(0, len(data), accumulate):
            for batch in data[start : start + accumulate]:
                with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                    outputs = model(*batch)
                losses = losses_of(outputs, *batch[1:])
                if method == "adatask":
                    losses = [loss / accumulate for loss in losses]
                    mtlgrad.task_backward(losses, shared=model.backbone.parameters())
                else:
                    total = model.layer.total(losses) if method == "bayes" else torch.stack(losses).sum()
                    (total / accumulate).backward()
            optimizer.step()
            optimizer.zero_grad()
        if method == "bayes":
            model.layer.refresh()
    return weights(model)


@pytest.mark.parametrize("method", ["aligned", "bayes", "adatask"])
def test_training_in_bf16_equals_a_plain_loop(method: str) -> None:
    """In float32, and with a checkpoint in the middle: test_trainers.py."""
    data = batches([8, 8, 6, 4])
    found = fit(method, data, 2, gradient_accumulation_steps=2, mixed_precision="bf16")
    torch.testing.assert_close(found, plainly(method, data, 2, 2, torch.bfloat16), rtol=1e-6, atol=1e-7)
    exact = plainly(method, data, 2, 2, None)
    assert any(not torch.equal(found[name], exact[name]) for name in exact)


# Rank 1 has one example in the second batch, and no label of the first task in the third.
COUNTS = [(8, 8), (7, 1), (4, 6), (5, 5)]


def whole() -> list[Batch]:
    found = batches([sum(counts) for counts in COUNTS])
    found[2][1][COUNTS[2][0] :] = float("nan")
    return found


def under_ddp() -> dict[str, dict[str, Tensor]]:
    rank = torch.distributed.get_rank()
    start = [0 if rank == 0 else counts[0] for counts in COUNTS]
    data: Any = [
        tuple(values[first : first + counts[rank]] for values in batch)
        for first, counts, batch in zip(start, COUNTS, whole())
    ]
    with mock.patch.dict(os.environ, rank_variables(rank, 2, 0)):
        return {method: fit(method, data, gradient_accumulation_steps=2) for method in ("aligned", "adatask")}


@pytest.mark.slow
def test_two_ranks_equal_one_process(two_ranks: Pool) -> None:
    for every in two_ranks(under_ddp):
        for method, found in every.items():
            for name, value in fit(method, whole(), gradient_accumulation_steps=2).items():
                assert (found[name] - value).abs().max() <= 1e-6 * value.abs().max(), (method, name)


def jacobian(factor: float = 1.0) -> tuple[nn.Parameter, Tensor]:
    p = nn.Parameter(torch.ones(3))
    gradients = factor * torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.25, -4.0]])
    p.jac = gradients
    return p, gradients


def test_the_scale_of_fp16_and_its_overflow() -> None:
    with accelerated():
        expected, _ = jacobian()
        AdaTaskAdam([expected], num_tasks=2).step()
        p, gradients = jacobian(1024.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = AcceleratedOptimizer(AdaTaskAdam([p], num_tasks=2), device_placement=True, scaler=scaler)
        scaler.scale(torch.ones(()))  # what accelerator.backward does with the loss
        optimizer.step()
        assert not optimizer.step_was_skipped
        torch.testing.assert_close(p, expected, rtol=1e-6, atol=0.0)
        gradients[1, 2] = torch.inf
        before = p.detach().clone()
        optimizer.step()
        assert optimizer.step_was_skipped
        assert torch.equal(p, before)
        assert scaler.get_scale() == 512.0
        optimizer.zero_grad()
        assert not hasattr(p, "jac")
        assert optimizer.optimizer.dominance().shape == (1, 2)


def test_an_overflow_after_unscaling() -> None:
    """What accelerator.unscale_gradients does sees no .jac; its overflow skips the step all the same."""
    with accelerated():
        p, gradients = jacobian(1024.0)
        gradients[1, 2] = torch.inf
        before = p.detach().clone()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = AcceleratedOptimizer(AdaTaskAdam([p], num_tasks=2), device_placement=True, scaler=scaler)
        scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer.optimizer)
        unscale_jac_(scaler, optimizer)
        clip_task_grad_norm_([p], 0.1)
        optimizer.step()
        assert optimizer.step_was_skipped
        assert torch.equal(p, before)
        assert scaler.get_scale() == 512.0


def test_clipping_is_of_grad_alone() -> None:
    with accelerated() as accelerator:
        p, gradients = jacobian()
        before = gradients.clone()
        accelerator.clip_grad_norm_([p], 0.1)
        assert torch.equal(p.jac, before)
        clip_task_grad_norm_([p], 0.1)
        torch.testing.assert_close(p.jac.norm(dim=1), torch.full((2,), 0.1))


def test_features_that_were_made_float32_are_refused() -> None:
    with accelerated(mixed_precision="bf16") as accelerator:
        model = accelerator.prepare(Prepared("adatask"))
        [batch] = batches([4])
        outputs = model(*batch)
        losses, shared = losses_of(outputs, *batch[1:]), model.backbone.parameters()
        with pytest.raises(ValueError, match="through the features alone, found 6 reached past them"):
            mtlgrad.task_backward(losses, shared=shared, features=outputs[2])
