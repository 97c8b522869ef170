"""torch.compile of backbone, heads and step around every method: the same numbers, few graphs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

import mtlgrad
from mtlgrad import AlignedMTL
from tests.support.bounds import near
from tests.support.nets import METHODS, Batch, Layer, Model, autocast, batch

# Dynamo and inductor themselves use what torch deprecates.
pytestmark = [
    pytest.mark.usefixtures("one_thread", "fresh"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
SIZES = (32, 5, 17, 3)
#: The optimizers are not in the compiled part, so one of AdaTask's stands for all.
WAYS = ["aligned layer", "aligned weigh", "bayesagg", "adam through features"]


@pytest.fixture
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    # What inductor's backward may free early, and T backwards need.
    with torch._functorch.config.patch(donated_buffer=False):
        yield
    torch.compiler.reset()


class Counting:
    """A backend that runs graphs as they are, forward and backward apart, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return aot_eager(graph, inputs)


def same(a: nn.Module, b: nn.Module, tolerance: float = 1e-5) -> bool:
    return all(near(p.detach(), q.detach(), tolerance) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def compiled(model: Model, **options: Any) -> None:
    """Its parts on their own; the parameters stay the model's."""
    model.backbone = torch.compile(model.backbone, fullgraph=True, **options)
    model.heads = nn.ModuleList(torch.compile(head, fullgraph=True, **options) for head in model.heads)  # type: ignore[misc]


@pytest.mark.parametrize("method", WAYS)
def test_backbone_and_heads(method: str) -> None:
    """Four parts, four graphs, each compiled once."""
    backend = Counting()
    trainers = [METHODS[method](Model()) for _ in range(2)]  # BayesAgg is given the plain heads, that have the weights
    compiled(trainers[1].model, backend=backend)
    for i in range(6):
        shown = [trainer.step(batch(seed=i)) for trainer in trainers]
        assert all(near(a, b, 1e-5) for a, b in zip(*shown))
    assert same(trainers[1].model, trainers[0].model)
    assert backend.graphs == 4


def test_inductor() -> None:
    """Its backward run once a task."""
    trainers = [METHODS["aligned merge"](Model()) for _ in range(2)]
    trainers[1].model.backbone = torch.compile(trainers[1].model.backbone, fullgraph=True)
    for i in range(4):
        for trainer in trainers:
            trainer.step(batch(seed=i))
    assert same(trainers[1].model, trainers[0].model)


def test_buffers_that_a_compiled_backward_gives_away() -> None:
    """torch's default for whoever makes one backward: several are refused in torch's words, nothing has changed, and
    the message names the setting that helps. One backward, of the layer, needs no setting."""
    model, data = Model(), batch()
    backbone = torch.compile(model.backbone, backend="inductor")
    aligned = AlignedMTL(3)
    with torch._functorch.config.patch(donated_buffer=True):
        torch.stack(model.losses(aligned(backbone(data.x)), data.y)).sum().backward()
        before = [copy.deepcopy(p.grad) for p in model.parameters()]
        features = backbone(data.x)
        with pytest.raises(RuntimeError, match=r"retain_graph=False.*config\.donated_buffer=False"):
            mtlgrad.task_backward(model.losses(features, data.y), model.shared, features=features)
    assert not any(hasattr(p, "jac") for p in model.shared)
    for p, grad in zip(model.parameters(), before, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, grad)


def test_the_whole_step_is_one_graph() -> None:
    """Losses under autocast and backward, the layer inside, fullgraph; only the optimizer is outside."""
    backend = Counting()
    plain, other = (Layer(Model(), autocast("cpu", torch.bfloat16)) for _ in range(2))
    model, aligned = other.model, other.aligned

    def losses_and_backward(x: Tensor, y: list[Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            losses = model.losses(aligned(model.backbone(x)), y)
        torch.stack(losses).sum().backward()
        return [loss.detach() for loss in losses]

    step = torch.compile(losses_and_backward, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        for i in range(4):
            data = batch(seed=i)
            other.optimizer.zero_grad()
            found = step(data.x, data.y)
            other.optimizer.step()
            assert all(near(a, b, 1e-3) for a, b in zip(found, plain.step(data)))
            assert near(aligned.weights, plain.aligned.weights, 1e-3)
    assert same(model, plain.model, 1e-3)
    assert backend.graphs <= 2


def test_batches_of_several_sizes() -> None:
    """Backbone, layer, heads and losses as one graph for the first size, and one or two for all that follow."""
    backend = Counting()
    plain, other = (Layer(Model()) for _ in range(2))
    model, aligned = other.model, other.aligned

    @torch.compile(fullgraph=True, backend=backend)
    def losses(x: Tensor, y: list[Tensor]) -> list[Tensor]:
        return model.losses(aligned(model.backbone(x)), y)

    for i, size in enumerate(SIZES):
        data = batch(seed=i, size=size)
        other.optimizer.zero_grad()
        torch.stack(losses(data.x, data.y)).sum().backward()
        other.optimizer.step()
        plain.step(data)
    assert same(model, plain.model)
    assert backend.graphs <= 3


def test_features_out_of_the_graph_of_the_losses() -> None:
    """They are its outputs side by side, so that no loss depends on them: said, not taken for a zero gradient."""
    model, data = Model(), batch()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def forward(data: Batch) -> tuple[Tensor, list[Tensor]]:
        features = model.backbone(data.x)
        return features, model.losses(features, data.y)

    features, losses = forward(data)
    with pytest.raises(ValueError, match=r"task_backward: features: expected .* leave features out"):
        mtlgrad.task_backward(losses, model.shared, features=features)
    with pytest.raises(ValueError, match=r"AlignedMTL\.weigh: shared: expected"):
        AlignedMTL(3).weigh(losses, features)
    assert int((AlignedMTL(3).weigh(losses, model.shared) != 1.0).sum()) == 3
