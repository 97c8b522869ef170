"""The layer in checkpoints and copies, and what it refuses."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
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
    HeadData,
    Model,
    head_data,
    linear,
    mean_loss,
    packed,
    problem,
    published_layer,
    published_regression,
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


# ---- what the layer refuses


def lin(width: int = HEAD_WIDTH, outputs: int = 3, **options: Any) -> nn.Linear:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of empty layers
        return nn.Linear(width, outputs, dtype=torch.float64, **options)


def fresh(**changes: Any) -> Any:
    """Calls a new layer of three heads on a batch, some of it changed."""
    m = problem()
    features, targets = m.data[0].features[:5].clone(), m.targets(slice(0, 5))
    features = changes.get("features", lambda x: x)(features).requires_grad_()
    targets = changes.get("targets", lambda x: x)(targets)
    return m.layer(features, targets)


def replaced(index: int, change: Callable[[Tensor], Any]) -> Callable[[list[Tensor]], list[Any]]:
    return lambda targets: [change(t) if i == index else t for i, t in enumerate(targets)]


def put(at: Any, value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed[at] = value
        return changed

    return change


def with_state(change: Callable[[dict[str, Any]], None]) -> None:
    m = problem()
    m.see()
    state = m.layer.state_dict()
    inside = unpacked(state["_extra_state"])
    change(inside)
    state["_extra_state"] = packed(inside)
    problem().layer.load_state_dict(state)


def other_heads(layer: BayesAgg) -> None:
    m = problem()
    m.see()
    layer.load_state_dict(m.layer.state_dict())


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no heads": (lambda: BayesAgg([]), r"BayesAgg: heads: expected at least one head, found none"),
    "one head": (
        lambda: BayesAgg(Regression(lin())),  # type: ignore[arg-type]
        r"BayesAgg: heads: expected a sequence of heads, found Regression",
    ),
    "a bare layer": (
        lambda: BayesAgg([lin()]),  # type: ignore[list-item]
        r"BayesAgg: heads\[0\]: expected Regression, Binary or Multiclass, found Linear",
    ),
    "heads of different widths": (
        lambda: BayesAgg([Regression(lin()), Binary(lin(5))]),
        r"BayesAgg: heads: expected one width of the features for all, found \[4, 5\]",
    ),
    "moments": (
        lambda: BayesAgg([Regression(lin())], moments="precise"),
        r"BayesAgg: moments: expected one of exact, sampled, found 'precise'",
    ),
    "covariance": (
        lambda: BayesAgg([Regression(lin())], covariance="banded"),
        r"BayesAgg: covariance: expected one of full, block, kron, diag, found 'banded'",
    ),
    "statistics": (
        lambda: BayesAgg([Regression(lin())], statistics="none"),
        r"BayesAgg: statistics: expected one of stored, streaming, moving, found 'none'",
    ),
    "num_samples": (
        lambda: BayesAgg([Regression(lin())], num_samples=1),
        r"BayesAgg: num_samples: expected at least 2, found 1",
    ),
    "seed": (
        lambda: BayesAgg([Regression(lin())], seed=0.5),  # type: ignore[arg-type]
        r"BayesAgg: seed: expected an integer, found 0.5",
    ),
    "a head of no layer": (lambda: Binary([]), r"Binary: layers: expected at least one nn.Linear, found none"),
    "a head of None": (lambda: Binary(None), r"Binary: layers: expected nn.Linear, found NoneType"),  # type: ignore[arg-type]
    "a head of another module": (
        lambda: Multiclass(nn.Sequential(lin())),  # type: ignore[arg-type]
        r"Multiclass: layers: expected nn.Linear, found Sequential",
    ),
    "layers of different widths": (
        lambda: Binary([lin(), lin(6)]),
        r"Binary: layers: expected one number of input features, found \[4, 6\]",
    ),
    "a classifier without a bias": (
        lambda: Multiclass(lin(bias=False)),
        r"Multiclass: layers: expected a bias, .* found bias=False",
    ),
    "no output": (
        lambda: Regression(lin(outputs=0)),
        r"Regression: layers: expected at least one feature and one output, found Linear\(.*out_features=0",
    ),
    "gamma": (lambda: Binary(lin(), gamma=-0.1), r"gamma: expected a finite prior variance above 0, found -0.1"),
    "negative power": (lambda: Binary(lin(), power=-1.0), r"Binary: power: expected finite numbers of at least 0"),
    "powers of other outputs": (
        lambda: Regression(lin(), power=torch.ones(2)),
        r"Regression: power: expected one number or one per task \(3\), found 2",
    ),
    "powers of classes": (
        lambda: Multiclass(lin(), power=[1.0, 1.0, 1.0]),
        r"Multiclass: power: expected one number or one per task \(1\), found 3",
    ),
    "no targets": (
        lambda: fresh(targets=lambda t: None),
        r"BayesAgg: targets: expected a sequence of 3, .* found none",
    ),
    "targets as one tensor": (
        lambda: fresh(targets=lambda t: t[0]),
        r"BayesAgg: targets: expected a sequence of 3, one per head, found one tensor",
    ),
    "too few targets": (
        lambda: fresh(targets=lambda t: t[:2]),
        r"BayesAgg: targets: expected a sequence of 3, .* found 2",
    ),
    "a target that is a list": (
        lambda: fresh(targets=replaced(1, Tensor.tolist)),
        r"BayesAgg: heads\[1\]: targets: expected a tensor, found list",
    ),
    "a target on another device": (
        lambda: fresh(targets=replaced(0, lambda t: t.to("meta"))),
        r"BayesAgg: heads\[0\]: targets: expected device cpu like features, found meta",
    ),
    "a target of another batch": (
        lambda: fresh(targets=replaced(2, lambda t: t[:3])),
        r"BayesAgg: heads\[2\]: targets: expected shape \[5\], found \[3\]",
    ),
    "a target of other outputs": (
        lambda: fresh(targets=replaced(1, lambda t: t[:, :2])),
        r"BayesAgg: heads\[1\]: targets: expected shape \[5, 3\], found \[5, 2\]",
    ),
    "a class out of range": (
        lambda: fresh(targets=replaced(2, put(4, 3))),
        r"BayesAgg: heads\[2\]: targets: expected class indices from 0 to 2, .* found 3 at example 4",
    ),
    "a label that is no probability": (
        lambda: fresh(targets=replaced(1, put((0, 0), -1.0))),
        r"BayesAgg: heads\[1\]: targets: expected values from 0 to 1, .* found -1 at \[0, 0\]",
    ),
    "class targets as floats": (
        lambda: fresh(targets=replaced(2, Tensor.double)),
        r"BayesAgg: heads\[2\]: targets: expected int64 class indices, found torch.float64",
    ),
    "features of another width": (
        lambda: fresh(features=lambda x: x[:, :3]),
        r"BayesAgg: features: expected shape \[B, 4\], .* found \[5, 3\]",
    ),
    "features of three dimensions": (
        lambda: fresh(features=lambda x: x[None]),
        r"BayesAgg: heads\[0\]: targets: expected shape \[1, 5\] like the features, or 3 numbers at each, found",
    ),
    "no example": (
        lambda: fresh(features=lambda x: x[:0], targets=lambda t: [x[:0] for x in t]),
        r"BayesAgg: heads\[0\]: features: expected at least one example, found none",
    ),
    "NaN features": (
        lambda: fresh(features=put((1, 2), torch.nan)),
        r"BayesAgg: heads\[0\]: features: expected finite values, found nan at \[1, 2\]",
    ),
    "features on another device": (
        lambda: fresh(features=lambda x: x.to("meta")),
        r"BayesAgg: heads\[0\]: the head's weight: expected device meta like features, found cpu",
    ),
    "no losses": (lambda: problem().layer.total([]), r"BayesAgg.total: losses: expected at least one, found none"),
    "losses as one tensor": (
        lambda: problem().layer.total(torch.ones(3)),
        r"BayesAgg.total: losses: expected a sequence or a dict, found Tensor",
    ),
    "a loss that is a number": (
        lambda: problem().layer.total([torch.ones(()), 1.0]),  # type: ignore[list-item]
        r"BayesAgg.total: losses: expected scalar tensors, found float at 1",
    ),
    "a loss that is no scalar": (
        lambda: problem().layer.total([torch.ones(2)]),
        r"BayesAgg.total: losses: expected scalars .*found shape \[2\] at 0",
    ),
    "refresh without batches": (
        lambda: problem().layer.refresh(),
        r"BayesAgg.refresh: expected at least one training batch since the last refresh, found none",
    ),
    "aggregate before refresh": (
        lambda: problem().aggregate(),
        r"BayesAgg.aggregate: expected a full-data posterior, found none; call refresh\(\) first",
    ),
    "a state of other heads": (
        lambda: other_heads(BayesAgg([Regression(lin()), Binary(lin())])),
        r"BayesAgg.load_state_dict: expected a state of regression 4 -> 3, noise estimated, bias, binary 4 -> 3, "
        r"covariance block.* "
        r"found one of regression 4 -> 3, binary 4 -> 3, multiclass 4 -> 3",
    ),
    "a state of heads in another order": (
        lambda: other_heads(BayesAgg([Binary(lin()), Regression(lin()), Multiclass(lin())])),
        r"BayesAgg.load_state_dict: expected a state of binary 4 -> 3, regression 4 -> 3",
    ),
    "a state of other statistics": (
        lambda: other_heads(problem(statistics="streaming").layer),
        r"BayesAgg.load_state_dict: expected .*statistics streaming; found one of .*statistics stored",
    ),
    "a state of another covariance": (
        lambda: other_heads(problem(covariance="diag").layer),
        r"BayesAgg.load_state_dict: expected .*covariance diag.*; found one of .*covariance full",
    ),
    "a state of the future": (
        lambda: with_state(lambda state: state.update(version=7)),
        r"BayesAgg.load_state_dict: expected version 3, found 7",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_one_line_that_names_argument_expected_and_found(name: str) -> None:
    call, words = REFUSED[name]
    with pytest.raises((RuntimeError, ValueError), match=words) as error:
        call()
    assert "\n" not in str(error.value)


def test_nan_that_appears_in_a_head_is_named_with_its_batch() -> None:
    m = problem()
    m.see()
    m.layer.refresh()
    with torch.no_grad():
        m.heads[1].weight[2, 0] = torch.nan
    with pytest.raises(ValueError, match=r"BayesAgg: batch 2.*NaN"):
        m.see()


def test_a_posterior_that_cannot_be_had_is_named_at_refresh() -> None:
    m = problem()
    m.see()
    state = unpacked(m.layer.get_extra_state())
    state["full_data"][0]["features"] = [torch.full((40, HEAD_WIDTH), 1e200, dtype=torch.float64)]  # squares overflow
    m.layer.set_extra_state(packed(state))
    with pytest.raises(ValueError, match=r"BayesAgg.refresh: heads\[0\] \(regression\): expected a finite"):
        m.layer.refresh()
    assert m.layer.posteriors is None


@pytest.mark.parametrize("batch", [3, 20])
def test_moments_out_of_range_name_the_batch(batch: int) -> None:
    data = head_data("regression", 20, HEAD_WIDTH)
    layer = published_layer([published_regression(linear(data).float(), gamma=0.1)])
    features = data.features.float().requires_grad_()
    layer(features, [data.targets])
    layer.refresh()
    with pytest.raises(ValueError, match=r"BayesAgg: batch 1: expected finite moments of the gradients, found NaN at"):
        layer.aggregate(features.detach()[:batch] * 1e37, [data.targets[:batch]])


def test_one_example_and_one_dimension() -> None:
    for kind, head in (("regression", Regression), ("binary", Binary), ("multiclass", Multiclass)):
        data: HeadData = head_data(kind, 1, 1, outputs=1)
        layer = BayesAgg([head(nn.Linear(1, 1, dtype=torch.float64))])
        features = data.features.clone().requires_grad_()
        layer(features, [data.targets])
        layer.refresh()
        found = layer.aggregate(features, [data.targets])
        assert found.shape == (1, 1)
        # A single class has no gradient at all.
        assert bool(found.isfinite().all())
        assert bool((found == 0).all()) == (kind == "multiclass")
