"""The layer in checkpoints and copies, and what it refuses."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mtlgrad import BayesAgg, Binary, Multiclass, Regression
from mtlgrad.posterior import Posterior
from tests.support.nets import (
    HEAD_WIDTH,
    KINDS,
    Model,
    head_data,
    linear,
    mean_loss,
    unpacked,
)

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES, BATCH, EPOCHS = 24, 6, 3
STEPS = EXAMPLES // BATCH


class BayesNet(Model):
    """With the data, and the layer between."""

    def __init__(self, **options: Any):
        data = [
            head_data(kind, EXAMPLES, HEAD_WIDTH, seed=i, missing=0.2).to(torch.float32) for i, kind in enumerate(KINDS)
        ]
        super().__init__(
            lambda: nn.Sequential(nn.Linear(HEAD_WIDTH, 8), nn.Tanh(), nn.Linear(8, HEAD_WIDTH)),
            heads=[linear(one) for one in data],
        )
        torch.manual_seed(0)
        self.data = data
        regression, binary, multiclass = self.heads
        self.layer = BayesAgg([Regression(regression), Binary(binary), Multiclass(multiclass)], **options)

    def loss(self, rows: Any) -> Tensor:
        batches = [data.rows(rows) for data in self.data]
        features = self.layer(self.backbone(batches[0].features), [batch.targets for batch in batches])
        return self.layer.total([mean_loss(batch, head(features)) for batch, head in zip(batches, self.heads)])


def new(**options: Any) -> tuple[BayesNet, torch.optim.Optimizer]:
    net = BayesNet(**options)
    return net, torch.optim.Adam(net.parameters(), lr=0.02)


def train(net: BayesNet, optimizer: torch.optim.Optimizer, first: int = 0, last: int = EPOCHS * STEPS) -> list[Tensor]:
    """Steps [first, last) of the run, refresh after each epoch; all parameters at the end."""
    for step in range(first, last):
        at = BATCH * (step % STEPS)
        optimizer.zero_grad()
        net.loss(slice(at, at + BATCH)).backward()
        optimizer.step()
        if step % STEPS == STEPS - 1:
            net.layer.refresh()
    return [p.detach().clone() for p in net.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


OPTIONS = [
    {"moments": moments, "statistics": statistics, "covariance": covariance, "num_samples": 32}
    for moments, covariance in (("exact", "full"), ("exact", "kron"), ("sampled", "block"), ("sampled", "diag"))
    for statistics in ("stored", "streaming", "moving")
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: f"{o['moments']}-{o['covariance']}-{o['statistics']}")
def test_a_resumed_run_is_the_uninterrupted_run(options: dict[str, Any]) -> None:
    """To the bit, from a file, at every step of the first two epochs."""
    net, optimizer = new(**options)
    whole = train(net, optimizer)
    for stop in range(2 * STEPS + 1):
        net, optimizer = new(**options)
        train(net, optimizer, 0, stop)
        file = io.BytesIO()
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        net, optimizer = new(**options)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        assert same(train(net, optimizer, stop), whole), stop


SMALL = [2, 1, 3, 2, 9, 4, 1, 2]  # examples in a batch: fewer than weights, but for one; the last waits for others


def small_batches(net: BayesNet, first: int = 0, last: int = len(SMALL)) -> Iterator[slice]:
    """The rows of one batch after the other, between which the heads move."""
    for step in range(first, last):
        at = sum(SMALL[:step])
        with torch.no_grad():
            for i, p in enumerate(net.heads.parameters()):
                p.add_(0.05 * torch.sin(torch.arange(p.numel()) + step + i).view_as(p))
        yield slice(at, at + SMALL[step])


def contents(posteriors: Sequence[Posterior]) -> list[Tensor]:
    parts = [(p.mean, *(p.precision if isinstance(p.precision, tuple) else [p.precision])) for p in posteriors]
    return [part for some in parts for part in some]


def refreshed(net: BayesNet) -> list[Tensor]:
    net.layer.refresh()
    assert net.layer.posteriors is not None
    return contents(net.layer.posteriors)


@pytest.mark.parametrize("covariance", ["full", "block", "diag"])  # a Kronecker mean depends on what came first
def test_batches_of_few_examples(covariance: str) -> None:
    """They are added to the statistics several at a time: all are in the posterior, at the weights that they met, as
    in one that is updated batch by batch; a run that stops anywhere goes on to the same bits."""
    net, other = BayesNet(covariance=covariance), BayesNet(covariance=covariance)
    expected = [full_data.empty(full_data.anchor()) for full_data in other.layer._full_data]
    for rows, same_rows in zip(small_batches(net), small_batches(other), strict=True):
        net.loss(rows).backward()
        features = other.backbone(other.data[0].rows(same_rows).features).detach().double()
        for head, posterior, data in zip(other.layer.heads, expected, other.data, strict=True):
            at = None if head.likelihood.is_exact else head.weight(features)
            posterior.add(features, data.rows(same_rows).targets, at)
    for posterior in expected:
        posterior.add_prior()
    whole = refreshed(net)
    torch.testing.assert_close(whole, contents(expected), rtol=1e-9, atol=1e-9)
    for stop in range(1, len(SMALL)):
        net, again = BayesNet(covariance=covariance), BayesNet(covariance=covariance)
        for rows in small_batches(net, 0, stop):
            net.loss(rows).backward()
        again.load_state_dict(copy.deepcopy(net.state_dict()))
        for rows in small_batches(again, stop):
            again.loss(rows).backward()
        assert same(refreshed(again), whole)


def test_the_run_depends_on_what_is_saved() -> None:
    """The test above could not fail if the layer did nothing: without its state the run is another."""
    net, optimizer = new()
    whole = train(net, optimizer)
    for stop in (1, STEPS):
        net, optimizer = new()
        train(net, optimizer, 0, stop)
        net.layer = BayesAgg(net.layer.heads)
        assert not same(train(net, optimizer, stop), whole)


@pytest.mark.parametrize("statistics", ["stored", "streaming", "moving"])
@pytest.mark.parametrize("stop", [2, STEPS + 2])
def test_a_state_in_memory_is_a_snapshot(statistics: str, stop: int) -> None:
    """Neither training on nor loading it twice may change it."""
    net, optimizer = new(statistics=statistics)
    train(net, optimizer, 0, stop)
    state, parameters = net.layer.state_dict(), copy.deepcopy(net.state_dict())
    moments = copy.deepcopy(optimizer.state_dict())
    whole = train(net, optimizer, stop)
    for _ in range(2):
        net.load_state_dict(parameters)
        net.layer.load_state_dict(state)
        optimizer.load_state_dict(copy.deepcopy(moments))
        assert same(train(net, optimizer, stop), whole)


def test_stored_statistics_keep_copies() -> None:
    """Features may be a view of something large, and labels a buffer that the next batch overwrites."""
    net = BayesNet(statistics="stored")
    sequence = torch.randn(EXAMPLES, 50, HEAD_WIDTH, requires_grad=True)
    targets = [data.targets.clone() for data in net.data]
    net.layer(sequence[:, 0], targets)
    state = unpacked(net.layer.get_extra_state())
    for target in targets:
        target.zero_()
    for part, data in zip(state["full_data"], net.data):
        assert part["features"][0].untyped_storage().nbytes() == EXAMPLES * HEAD_WIDTH * 4
        assert torch.equal(part["targets"][0].nan_to_num(), data.targets.nan_to_num())


def test_copies_of_a_model_train_alike_and_apart() -> None:
    net, optimizer = new()
    train(net, optimizer, 0, STEPS + 1)
    twin = copy.deepcopy(net)
    assert [head.layers[0] for head in twin.layer.heads] == list(twin.heads)
    twin_optimizer = torch.optim.Adam(twin.parameters(), lr=0.02)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    apart = train(twin, twin_optimizer, STEPS + 1)
    assert same(train(net, optimizer, STEPS + 1), apart)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    features = net.data[0].features
    targets = [data.targets for data in net.data]
    assert torch.equal(loaded.layer.aggregate(features, targets), net.layer.aggregate(features, targets))


def test_layer_adds_no_parameters() -> None:
    net = BayesNet()
    assert list(net.layer.parameters()) == []
    assert not net.layer.state_dict()
    net.layer(net.data[0].features.clone().requires_grad_(), [data.targets for data in net.data])
    assert set(net.layer.state_dict()) == {"_extra_state"}


def test_a_state_is_tensors_and_may_be_missing() -> None:
    """What averages of a model, savers of tensors and older checkpoints want of it."""
    net, optimizer = new()
    train(net, optimizer, 0, STEPS)
    before = net.layer.aggregate(net.data[0].features, [data.targets for data in net.data])
    state = net.state_dict()
    for value in state.values():
        assert isinstance(value.numpy(), np.ndarray)
        if value.dtype.is_floating_point:
            value.mul_(1.0)
    without = {name: value for name, value in state.items() if "layer" not in name}
    net.load_state_dict(without)
    assert torch.equal(net.layer.aggregate(net.data[0].features, [data.targets for data in net.data]), before)


def test_a_model_in_another_dtype_follows() -> None:
    net, optimizer = new()
    train(net, optimizer, 0, STEPS)
    features, targets = net.data[0].features, [data.targets for data in net.data]
    narrow = net.layer.aggregate(features, targets)
    net.double()
    wide = net.layer.aggregate(features.double(), targets)
    assert wide.dtype == torch.float64
    assert (wide - narrow).abs().max() < 1e-5 * wide.abs().max()
    assert torch.equal(net.layer.aggregate(features, targets), narrow)


@pytest.mark.filterwarnings("ignore")  # of torch.compile, about its own look at autograd functions
def test_compiled_model_trains_like_the_plain_one() -> None:
    """Graph breaks are allowed; wrong numbers are not."""
    net, optimizer = new()
    plain = train(net, optimizer, 0, STEPS + 2)
    net, optimizer = new()
    net.loss = torch.compile(net.loss, backend="eager")  # type: ignore[method-assign]
    assert same(train(net, optimizer, 0, STEPS + 2), plain)
