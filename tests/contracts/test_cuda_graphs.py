"""Steps captured in CUDA graphs take the steps that eager ones take. They need a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mtlgrad
from mtlgrad import AlignedMTL
from tests.conftest import HAS_GPU
from tests.support.bounds import near
from tests.support.nets import METHODS, PAIRS, Batch, Bayes, Model, batch

pytestmark = pytest.mark.skipif(not HAS_GPU, reason="no usable GPU")
#: Adagrad has no capturable step for heads.
CAPTURABLE = ["adam", "adamw", "rmsprop"]


def static(data: Batch) -> Batch:
    return Batch(data.x.clone(), [y.clone() for y in data.y])


def fill(place: Batch, data: Batch) -> None:
    place.x.copy_(data.x)
    for to, value in zip(place.y, data.y):
        to.copy_(value)


def captured(step: Callable[[Batch], None], place: Batch) -> torch.cuda.CUDAGraph:
    """Three warm-up steps on another stream, then the capture, as torch's documentation has it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(place)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(place)
    return graph


def stepper(method: str, model: Model, optimizer: torch.optim.Optimizer, aligned: AlignedMTL) -> Callable[..., None]:
    def step(data: Batch) -> None:
        optimizer.zero_grad()  # inside the graph: .grad and .jac are its own memory
        features = model.backbone(data.x)
        if method == "layer":
            torch.stack(model.losses(aligned(features), data.y)).sum().backward()
        elif method == "weigh":
            losses = model.losses(features, data.y)
            (aligned.weigh(losses, features) * torch.stack(losses)).sum().backward()
        else:
            mtlgrad.task_backward(model.losses(features, data.y), model.shared, features=features)
        if method == "merge":
            aligned.merge(model.shared)
        optimizer.step()

    return step


def optimizer_of(method: str, model: Model) -> torch.optim.Optimizer:
    if method in PAIRS:
        made: Any = PAIRS[method][0](model.parameters(), num_tasks=3, lr=0.01, capturable=True)
    else:
        made = torch.optim.Adam(model.parameters(), lr=0.01, capturable=True)
    return made  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["layer", "merge", "weigh", *CAPTURABLE])
def test_whole_steps(method: str) -> None:
    """Backward, alignment, optimizer: all of it, replayed on batches that are copied into place."""
    models = [Model().cuda() for _ in range(2)]
    aligned = [AlignedMTL(3).cuda() for _ in range(2)]
    optimizers = [optimizer_of(method, model) for model in models]
    steps = [stepper(method, *parts) for parts in zip(models, optimizers, aligned)]
    place = static(batch(device="cuda"))
    graph = captured(steps[1], place)
    for _ in range(3):  # what the warm-up has done
        steps[0](place)
    for i in range(5):
        data = batch(seed=10 + i, device="cuda")
        steps[0](data)
        fill(place, data)
        graph.replay()
        if method in ("layer", "merge", "weigh"):
            assert near(aligned[1].weights, aligned[0].weights, 1e-4)  # type: ignore[arg-type]
            assert int(aligned[1].rank) == 3  # type: ignore[arg-type]
        pairs = zip(models[1].parameters(), models[0].parameters(), strict=True)
        assert all(near(a.detach(), b.detach(), 1e-4) for a, b in pairs)
    if method in CAPTURABLE:
        shares = [optimizer.dominance() for optimizer in optimizers]  # type: ignore[attr-defined]
        assert near(shares[1], shares[0], 1e-4)


@pytest.mark.parametrize("method", ["aligned layer", "bayesagg", "aligned merge", "adam through features"])
def test_graphed_parts(method: str) -> None:
    """torch.cuda.make_graphed_callables of the backbone, everything else outside. task_backward goes through it T
    times, with retain_graph."""
    trainers = [METHODS[method](Model().cuda()) for _ in range(2)]
    model = trainers[1].model
    # A copy: its first steps move nothing of the model's.
    example = batch(device="cuda").x
    model.backbone = torch.cuda.make_graphed_callables(model.backbone, (example.clone(),))
    for i in range(Bayes.warm_up + 3):
        data = batch(seed=i, device="cuda")
        for trainer in trainers:
            trainer.step(data)
    pairs = zip(model.parameters(), trainers[0].model.parameters(), strict=True)
    assert all(near(a.detach(), b.detach(), 1e-4) for a, b in pairs)


def test_bayesagg_is_not_captured() -> None:
    """Its statistics are kept by Python, which a replay does not run."""
    trainer: Any = Bayes(Model().cuda())
    place = static(batch(device="cuda"))
    trainer.step(place)
    model, before = trainer.model, copy.deepcopy(trainer.model.state_dict())

    def losses() -> Tensor:
        features = trainer.bayes(model.backbone(place.x), place.y)
        return trainer.bayes.total(model.losses(features, place.y))  # type: ignore[no-any-return]

    refused = pytest.raises(RuntimeError, match=r"BayesAgg: expected .*make_graphed_callables")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        losses()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
