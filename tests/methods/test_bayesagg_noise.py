"""The variance of regression targets that BayesAgg assumes or estimates, and what it does to the aggregate."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtlgrad import BayesAgg, Binary, Regression
from tests.support.bounds import all_near, near, normal
from tests.support.nets import GAMMAS, published_layer, published_regression
from tests.support.oracles import combined, isserlis
from tests.support.ranks import Pool

pytestmark = pytest.mark.usefixtures("one_thread")
GAMMA = GAMMAS["regression"]


def problem(examples: int = 60, missing: bool = False, width: int = 4) -> tuple[Tensor, Tensor]:
    """Three outputs with noise of very different sizes."""
    features, weight = normal(1, examples, width), normal(2, 3, width)
    targets = features @ weight.T + normal(3, examples, 3) * torch.tensor([0.05, 0.5, 2.0], dtype=torch.float64)
    if missing:
        targets[::3, 1] = torch.nan
        targets[1::4, 2] = torch.nan
    return features, targets


def layer(noise: float | str, **options: Any) -> BayesAgg:
    head = nn.Linear(4, 3, dtype=torch.float64)
    return published_layer([Regression(head, gamma=GAMMA, power=0.5, noise=noise, bias=False)], **options)


def see(bayes: BayesAgg, features: Tensor, *targets: Tensor) -> None:
    bayes(features.clone().requires_grad_(), list(targets))


def exact_noise(features: Tensor, targets: Tensor) -> Tensor:
    """One output at a time, from the examples that have its label."""
    found = []
    for y in targets.T:
        there = y.isfinite()
        h, y = features[there], y[there]
        precision = h.T @ h + torch.eye(h.shape[1], dtype=h.dtype) / GAMMA
        mean = torch.linalg.solve(precision, h.T @ y)
        parameters = (torch.linalg.inv(precision) @ h.T @ h).trace()
        found.append((y - h @ mean).square().sum() / (len(y) - parameters))
    return torch.stack(found)


def expected(features: Tensor, targets: Tensor, noise: Tensor, batch: int, first: Tensor | None = None) -> Tensor:
    """Of the first examples: the moments of the gradient of (w.h - y)^2 / noise, prior N(0, gamma noise I)."""
    means, variances = [], []
    for o, q in enumerate(noise):
        y = targets[:, o]
        both = torch.cat([features, features[:batch]]), torch.cat([y, y[:batch]])
        h, y = (t[both[1].isfinite()] for t in both)
        precision = (h.T @ h + torch.eye(h.shape[1], dtype=h.dtype) / GAMMA) / q
        mean, covariance = torch.linalg.solve(precision, h.T @ y / q), torch.linalg.inv(precision)
        pairs = [isserlis(g, t, mean, covariance) for g, t in zip(features[:batch], targets[:batch, o].nan_to_num())]
        missing = targets[:batch, o].isnan()[:, None]
        means.append(torch.stack([e for e, _ in pairs]).masked_fill(missing, 0.0) / q)
        variances.append(torch.stack([v for _, v in pairs]).masked_fill(missing, torch.inf) / q**2)
    deviation = (noise if first is None else first).sqrt()
    balance = deviation.sum() / (1.0 / deviation).sum()
    return balance * combined([(torch.stack(means, 1), torch.stack(variances, 1))], [0.5])


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("statistics", ["stored", "streaming"])
@pytest.mark.parametrize("batch", [3, 30])  # fewer examples than weights, and more
def test_estimated(statistics: str, missing: bool, batch: int) -> None:
    features, targets = problem(missing=missing)
    bayes = layer("estimated", statistics=statistics)
    assert bayes.noise is None
    for rows in (slice(0, 20), slice(20, 60)):
        see(bayes, features[rows], targets[rows])
    bayes.refresh()
    noise = exact_noise(features, targets)
    assert bayes.noise is not None
    all_near(bayes.noise, noise, 1e-10)
    assert (noise.sqrt() / torch.tensor([0.05, 0.5, 2.0]) - 1.0).abs().max() < 0.5  # the prior draws small ones away
    found = bayes.aggregate(features[:batch], [targets[:batch]])
    all_near(found, expected(features, targets, noise, batch), 1e-8)


@pytest.mark.parametrize("noise", [0.04, 9.0])
def test_given(noise: float) -> None:
    features, targets = problem()
    bayes = layer(noise)
    see(bayes, features, targets)
    bayes.refresh()
    assert bayes.noise is not None
    all_near(bayes.noise, torch.full((3,), noise, dtype=torch.float64), 1e-12)
    all_near(bayes.aggregate(features[:5], [targets[:5]]), expected(features, targets, bayes.noise, 5), 1e-8)


def test_the_backward_sends_back_the_aggregate_and_the_step_after_knows_new_noise() -> None:
    features, targets = problem()
    bayes, first = layer("estimated"), None
    for factor in (1.0, 7.0):  # the second epoch's targets are larger
        see(bayes, features, factor * targets)
        bayes.refresh()
        assert bayes.noise is not None
        first = bayes.noise if first is None else first
        all_near(bayes.noise, factor**2 * exact_noise(features, targets), 1e-10)
        leaf = features[:6].clone().requires_grad_()
        loss = (bayes.heads[0].predict(bayes(leaf, [factor * targets[:6]])) - factor * targets[:6]).square().sum() / 6
        loss.backward()
        assert leaf.grad is not None
        all_near(leaf.grad, expected(features, factor * targets, bayes.noise, 6, first), 1e-8)
        for full_data in bayes._full_data:
            full_data.end_epoch()


def test_units_do_not_matter() -> None:
    """Of targets in millimetres or metres the aggregate is the same but for the unit of the squared error."""
    features, targets = problem()
    found = []
    for unit in (1.0, 1000.0):
        bayes = layer("estimated")
        see(bayes, features, targets * unit)
        bayes.refresh()
        found.append(bayes.aggregate(features[:7], [targets[:7] * unit]) / unit**2)
    all_near(found[0], found[1], 1e-9)


def test_beside_other_heads_float32_and_published() -> None:
    features, targets = problem()
    heads = [nn.Linear(4, 3), nn.Linear(4, 2)]
    marks = (normal(9, 60, 2) > 0.0).float()

    def aggregate(noise: float | str, wide: bool) -> tuple[Tensor, Tensor]:
        own = [copy.deepcopy(head).double() if wide else head for head in heads]
        bayes = published_layer([Regression(own[0], noise=noise, bias=False), Binary(own[1])])
        given = [t if wide else t.float() for t in (features, targets)]
        see(bayes, given[0], given[1], marks.to(given[0]))
        bayes.refresh()
        assert bayes.noise is not None
        return bayes.aggregate(given[0][:9], [given[1][:9], marks[:9].to(given[0])]), bayes.noise

    for noise in ("estimated", 0.3, 1.0):
        (narrow, shown), (wide, _) = aggregate(noise, False), aggregate(noise, True)
        assert narrow.dtype == torch.float32
        assert near(narrow.double(), wide, 1e-4)
        assert shown[3:].isnan().all()
        assert shown[:3].isfinite().all()
    published = published_layer([published_regression(heads[0]), Binary(heads[1])])
    assert "noise=1.0" in repr(published)
    see(published, features.float(), targets.float(), marks)
    published.refresh()
    one, _ = aggregate(1.0, False)
    assert torch.equal(published.aggregate(features[:9].float(), [targets[:9].float(), marks[:9]]), one)


def test_a_floor_and_targets_that_tell_nothing() -> None:
    features, targets = problem()
    targets = torch.stack([features @ normal(5, 4), torch.zeros(60).double(), targets[:, 2]], 1)
    bayes = BayesAgg([Regression(nn.Linear(4, 3).double(), gamma=1e9, bias=False)])
    see(bayes, features, targets)
    bayes.refresh()
    assert bayes.noise is not None
    all_near([bayes.noise[0]], [1e-6 * targets[:, 0].square().mean()], 1e-6)
    assert bayes.noise[1] == 1.0
    assert bayes.aggregate(features[:5], [targets[:5]]).isfinite().all()
    # Fewer labels than weights, and none at all.
    few = torch.full((60, 3), torch.nan, dtype=torch.float64)
    few[:2, 0], few[:30, 1] = 1.5, normal(6, 30)
    bayes = layer("estimated")
    see(bayes, features, few)
    bayes.refresh()
    assert bayes.noise is not None
    assert bayes.noise[2] == 1.0
    assert (bayes.noise > 0.0).all()
    assert bayes.aggregate(features[:5], [few[:5]]).isfinite().all()


@pytest.mark.parametrize("statistics", ["stored", "streaming"])
def test_state(statistics: str) -> None:
    """Saved in the middle of an epoch, after one."""
    features, targets = problem(missing=True)
    bayes, resumed = (layer("estimated", statistics=statistics) for _ in range(2))
    see(bayes, features, targets)
    bayes.refresh()
    see(bayes, features[:25], targets[:25])
    resumed.load_state_dict(bayes.state_dict())
    for one in (bayes, resumed):
        see(one, features[25:50], 3.0 * targets[25:50])
    batch = features[:6], [targets[:6]]
    assert torch.equal(bayes.aggregate(*batch), resumed.aggregate(*batch))
    bayes.refresh()
    resumed.refresh()
    assert torch.equal(bayes.noise, resumed.noise)  # type: ignore[arg-type]
    assert torch.equal(bayes.aggregate(*batch), resumed.aggregate(*batch))
    with pytest.raises(ValueError, match=r"expected a state of regression 4 -> 3, covariance.*noise estimated"):
        layer(1.0, statistics=statistics).load_state_dict(bayes.state_dict())


@pytest.mark.parametrize("noise", [0.0, -1.0, float("nan"), float("inf"), "unit", None, [1.0]])
def test_refused(noise: Any) -> None:
    with pytest.raises(ValueError, match=r'Regression: noise: expected "estimated" or a finite variance above 0'):
        Regression(nn.Linear(4, 3), noise=noise)


def on_ranks(statistics: str, missing: bool, size: int, rank: int | None) -> list[Tensor]:
    """Uneven parts of three batches, the second refresh's after a rank had nothing."""
    rank = dist.get_rank() if rank is None else rank
    features, targets = problem(missing=missing)
    bayes, found = layer("estimated", statistics=statistics), []
    with torch.no_grad():
        for p in bayes.heads[0].layers[0].parameters():
            p.fill_(0.1)
    cuts = {2: [0, 13, 60], 4: [0, 1, 20, 33, 60]}[size]
    own = slice(0, 60) if rank < 0 else slice(cuts[rank], cuts[rank + 1])
    for epoch in range(2):
        if rank < 0 or epoch == 0 or rank == 1:
            known, bayes._posteriors = bayes._posteriors, None
            rows = own if epoch == 0 else slice(cuts[1], cuts[2])
            see(bayes, features[rows], (1.0 + epoch) * targets[rows])
            bayes._posteriors = known
        bayes.refresh()
        assert bayes.noise is not None
        batch = (
            slice(0, 7) if rank < 0 else slice(0, 2) if rank == 0 else slice(2, 7) if rank == size - 1 else slice(2, 2)
        )
        if size == 2:
            found += [bayes.noise, bayes.aggregate(features[batch], [targets[batch]])]
        else:
            found += [bayes.noise]
    return found


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("statistics", ["stored", "streaming"])
def test_two_ranks_equal_one_process(two_ranks: Pool, statistics: str, missing: bool) -> None:
    expected = on_ranks(statistics, missing, 2, -1)
    parts = two_ranks(on_ranks, statistics, missing, 2, None)
    for i in (0, 2):
        for part in parts:
            all_near(part[i], expected[i], 1e-9)
    for i in (1, 3):  # each rank's rows, times the number of ranks, which average
        for part, rows in zip(parts, expected[i].split((2, 5))):
            all_near(part[i], 2.0 * rows, 1e-9)


def test_four_ranks_equal_one_process(four_ranks: Pool) -> None:
    expected = on_ranks("streaming", True, 4, -1)
    for part in four_ranks(on_ranks, "streaming", True, 4, None):
        for one, other in zip(part, expected, strict=True):
            all_near(one, other, 1e-9)
