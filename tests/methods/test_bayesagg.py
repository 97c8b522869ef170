"""The layer against an independent float64 computation of the gradient that goes back into the backbone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mtlgrad import Binary, reference
from mtlgrad.posterior import binary_posterior, regression_posterior
from tests.support.bounds import assert_near
from tests.support.nets import (
    GAMMAS,
    HEAD_WIDTH,
    KINDS,
    LAYERS,
    POWERS,
    mean_loss,
    posterior,
    problem,
    published_layer,
    unpacked,
)
from tests.support.oracles import combined, expected_gradient, moments

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- forward, and the gradient before the first refresh


def test_forward_is_the_identity() -> None:
    m = problem()
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        features = m.data[0].features.to(dtype).requires_grad_()
        out = m.layer(features, m.targets())
        assert torch.equal(out, features)
        assert out.dtype == dtype
        assert out.data_ptr() == features.data_ptr()  # no copy
    # It is a view of its input, so autograd refuses what would change both.
    with pytest.raises(RuntimeError, match="view and is being modified inplace"):
        functional.relu(m.layer(features, m.targets()), inplace=True)


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_warm_up_is_plain_summation_to_the_bit(missing: float) -> None:
    m = problem(missing=missing)
    with_layer = m.see(slice(0, 8))
    features = m.data[0].features[:8].clone().requires_grad_()
    torch.stack(m.losses(features, slice(0, 8))).sum().backward()
    assert features.grad is not None
    assert torch.equal(with_layer, features.grad)


@pytest.mark.parametrize("how", ["eval", "no_grad", "frozen"])
def test_where_nothing_trains_the_layer_is_absent(how: str) -> None:
    m = problem()
    m.see()
    m.layer.refresh()
    before = unpacked(m.layer.get_extra_state())
    features = m.data[0].features.clone().requires_grad_(how != "frozen")
    m.layer.train(how != "eval")
    with torch.set_grad_enabled(how != "no_grad"):
        out = m.layer(features)
        assert out is features
        total = m.layer.total(m.losses(out))
    after = unpacked(m.layer.get_extra_state())
    assert [part["counts"][0] for part in after["full_data"]] == [0, 0, 0]
    assert before["number"] == after["number"]
    if how == "eval":
        total.backward()
        plain = m.data[0].features.clone().requires_grad_()
        torch.stack(m.losses(plain)).sum().backward()
        assert torch.equal(features.grad, plain.grad)  # type: ignore[arg-type]


# ---- the aggregated gradient


@pytest.mark.parametrize("statistics", ["stored", "streaming"])
@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("batch", [1, 3, 12])  # fewer and more examples than weights
@pytest.mark.parametrize(
    ("kinds", "structure"),
    [
        (("regression",), "full"),
        (("binary",), "full"),
        (("binary",), "diag"),
        *[(("multiclass",), structure) for structure in ("full", "block", "kron", "diag")],
        (KINDS, "full"),
        (("binary", "multiclass", "binary", "regression"), "diag"),
        (("regression", "regression"), "kron"),
    ],
)
def test_backbone_gradient(kinds: tuple[str, ...], structure: str, batch: int, missing: float, statistics: str) -> None:
    m = problem(kinds, missing=missing, covariance=structure, statistics=statistics)
    for rows in (slice(0, 7), slice(7, 30), slice(30, 40)):
        m.see(rows)
    m.layer.refresh()
    rows = slice(5, 5 + batch)
    assert_near(m.see(rows), expected_gradient(m, rows, structure), 1e-8)


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
@pytest.mark.parametrize("structure", ["full", "block", "kron", "diag"])
def test_sampled_moments_are_the_estimator_on_samples_of_the_posterior(kind: str, structure: str) -> None:
    m = problem((kind,), covariance=structure, moments="sampled", num_samples=20_000)
    m.see()
    m.layer.refresh()
    rows = slice(0, 5)
    data = m.data[0]
    batch, prior = data.rows(rows), posterior(data, structure, gamma=GAMMAS[kind])
    law = posterior(batch, structure, prior=prior)
    samples = law.sample(20_000, torch.Generator().manual_seed(1))
    mean, variance = reference.sampled_moments(batch.features, batch.targets, samples, kind=kind)
    # Two independent estimates: six standard errors of their difference, and what 2 % on the weights can do to the mean
    # of the tasks' gradients.
    tolerance = 6 * (2 * variance.amax() / 20_000).sqrt() + 0.05 * mean.abs().amax()
    assert (5 * m.aggregate(rows) - 5 * combined([(mean, variance)], [POWERS[kind]])).abs().max() < tolerance


def test_sampled_moments_follow_seed_and_pass() -> None:
    def gradients(seed: int) -> list[Tensor]:
        m = problem(("binary", "multiclass"), moments="sampled", num_samples=64, seed=seed)
        m.see()
        m.layer.refresh()
        return [m.see(slice(0, 4)) for _ in range(2)]

    one, same, other = gradients(1), gradients(1), gradients(2**62 + 3)
    assert torch.equal(one[0], same[0])
    assert torch.equal(one[1], same[1])
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], other[0])


def test_heads_get_their_ordinary_gradients() -> None:
    m = problem()
    m.see()
    m.layer.refresh()
    for head in m.heads:
        head.zero_grad()
    m.see(slice(0, 9))
    for data, head in zip(m.data, m.heads):
        alone = copy.deepcopy(head)
        alone.zero_grad()
        mean_loss(data.rows(slice(0, 9)), alone(data.features[:9])).backward()
        for mine, theirs in zip(head.parameters(), alone.parameters()):
            assert_near(mine.grad, theirs.grad, 1e-14)  # type: ignore[arg-type]


def test_statistics_are_of_one_epoch() -> None:
    """refresh() starts anew: what was seen before the last one is forgotten."""
    m = problem()
    m.see(slice(0, 25))
    m.layer.refresh()
    m.see(slice(25, 40))
    m.layer.refresh()
    late = problem()
    late.see(slice(25, 40))
    late.layer.refresh()
    assert torch.equal(m.aggregate(), late.aggregate())


def test_streaming_expands_where_each_batch_met_the_weights() -> None:
    by_streaming, by_storing = (problem(("binary",), statistics=s) for s in ("streaming", "stored"))
    for m in (by_streaming, by_storing):
        m.see(slice(0, 20))
        first = m.data[0].weight.clone()
        with torch.no_grad():
            m.heads[0].weight.add_(0.5)
        m.see(slice(20, 40))
        m.layer.refresh()
    head, data = by_storing.heads[0], by_storing.data[0]
    last = torch.cat([head.weight, head.bias[:, None]], 1).detach()
    stored = binary_posterior(data.features, data.targets, last, gamma=GAMMAS["binary"])
    batches = [data.rows(slice(0, 20)), data.rows(slice(20, 40))]
    streamed = binary_posterior(batches[0].features, batches[0].targets, first, gamma=GAMMAS["binary"])
    streamed.update(batches[1].features, batches[1].targets, last)
    assert by_storing.layer.posteriors is not None
    assert by_streaming.layer.posteriors is not None
    assert_near(by_storing.layer.posteriors[0].mean, stored.mean, 1e-10)
    assert_near(by_streaming.layer.posteriors[0].mean, streamed.mean, 1e-10)
    assert not torch.allclose(stored.mean, streamed.mean)


# ---- missing labels, and other ways to say the same


def test_a_missing_label_is_a_task_that_is_not_there() -> None:
    """Each example's gradient is that of its labelled tasks; B counts all examples; without a label it is zero."""
    m = problem(missing=0.4)
    for data in m.data:
        data.targets[3] = -100 if data.kind == "multiclass" else torch.nan
    m.see()
    m.layer.refresh()
    found = m.see()
    assert (found[3] == 0).all()
    assert torch.equal(found, m.aggregate())
    # Rows without a label of a task change nothing for the others: leave them out of the batch.
    keep = torch.tensor([i for i in range(40) if i != 3])
    assert_near(m.aggregate(keep) * 39, found[keep] * 40, 1e-10)


def test_a_task_without_labels_in_the_batch() -> None:
    m, fewer = problem(), problem(("regression", "multiclass"))
    fewer.data = [m.data[0], m.data[2]]
    for part in (m, fewer):
        part.see()
        part.layer.refresh()
    # The same heads and posteriors for the two that stay, by their states.
    state = unpacked(m.layer.get_extra_state())
    fewer.layer._posteriors = [m.layer.posteriors[i] for i in (0, 2)]  # type: ignore[index]
    with torch.no_grad():
        for mine, theirs in zip(fewer.heads, (m.heads[0], m.heads[2])):
            mine.load_state_dict(theirs.state_dict())
    m.data[1].targets = torch.full_like(m.data[1].targets, torch.nan)
    assert state["number"] == 1
    assert_near(m.see(slice(0, 9)), fewer.see(slice(0, 9)), 1e-12)
    weights = m.layer.task_weights
    assert weights is not None
    assert (weights[3:6] == 0).all()
    assert weights.sum().item() == pytest.approx(1.0)
    variances = m.layer.gradient_variance
    assert variances is not None
    assert variances[3:6].isnan().all()
    assert variances[[0, 1, 2, 6]].isfinite().all()


def test_a_batch_without_any_label_has_no_gradient() -> None:
    m = problem()
    m.see()
    m.layer.refresh()
    for data in m.data:
        data.targets = torch.full_like(data.targets, -100 if data.kind == "multiclass" else torch.nan)
    assert (m.aggregate() == 0).all()


def test_several_layers_are_one_layer() -> None:
    one = problem(("binary",))
    several = problem(("binary",))
    several.heads = []
    for row in one.data[0].weight:
        head = nn.Linear(HEAD_WIDTH, 1, dtype=torch.float64)
        with torch.no_grad():
            head.weight.copy_(row[None, :HEAD_WIDTH])
            head.bias.copy_(row[HEAD_WIDTH:])
        several.heads.append(head)
    options: dict[str, Any] = {"gamma": GAMMAS["binary"], "power": POWERS["binary"]}
    for layers in (several.heads, nn.ModuleList(several.heads)):
        layer = published_layer([Binary(layers, **options)])
        features = one.data[0].features.clone().requires_grad_()
        layer(features, one.targets())
        layer.refresh()
        one.see()
        one.layer.refresh()
        assert torch.equal(layer.aggregate(features, one.targets()), one.aggregate())


@pytest.mark.parametrize("kind", ["regression", "binary"])
def test_power_of_each_output(kind: str) -> None:
    powers = [0.0, 1.0, 2.0]
    m = problem((kind,))
    m.layer = published_layer([LAYERS[kind](m.heads[0], gamma=GAMMAS[kind], power=powers)])
    m.see()
    m.layer.refresh()
    mean, variance = moments(m.data[0], m.data[0])
    parts = [(mean[:, t : t + 1], variance[:, t : t + 1]) for t in range(3)]
    assert_near(m.aggregate(), combined(parts, powers), 1e-8)


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_the_sum_is_the_mean_times_the_tasks_that_have_a_label(missing: float) -> None:
    m, summed = (problem(missing=missing, reduction=reduction) for reduction in ("mean", "sum"))
    for one in (m, summed):
        one.see()
        one.layer.refresh()
    labels = torch.stack(
        [
            there
            for d in m.data
            for there in ((d.targets != -100)[None] if d.kind == "multiclass" else ~d.targets.isnan().T)
        ]
    )
    assert len(labels) == m.layer.num_tasks
    assert_near(summed.aggregate(), m.aggregate() * labels.sum(0)[:, None], 1e-12)
    assert_near(summed.see(), m.see() * labels.sum(0)[:, None], 1e-12)


@pytest.mark.parametrize("kind", ["regression", "binary"])
def test_one_size_in_the_warm_up_and_after(kind: str) -> None:
    """Equal weights and a posterior that is certain of the heads' own weights: plain summation of the gradients."""
    m = problem((kind,), examples=4000)
    head = copy.deepcopy(m.heads[0])
    m.layer = published_layer([LAYERS[kind](head, gamma=1e6, power=0.0)], reduction="sum")
    if kind == "regression":
        solution = torch.linalg.lstsq(m.data[0].features, m.data[0].targets).solution.T
        with torch.no_grad():
            m.heads[0].weight.copy_(solution)
            m.heads[0].bias.zero_()
        head.load_state_dict(m.heads[0].state_dict())
    else:
        optimizer = torch.optim.LBFGS(m.heads[0].parameters(), max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = mean_loss(m.data[0], m.heads[0](m.data[0].features))
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        with torch.no_grad():
            head.weight.copy_(m.heads[0].weight)
            head.bias.copy_(m.heads[0].bias)
    warm_up = m.see()
    m.layer.refresh()
    found = m.see()
    assert (found - warm_up).norm() < 0.02 * warm_up.norm()


# ---- what the layer tells


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("moments_of", ["exact", "sampled"])
def test_task_weights_and_gradient_variance(missing: float, moments_of: str) -> None:
    m = problem(missing=missing, moments=moments_of, num_samples=20_000)
    if missing:
        for data in m.data:  # an example without any label has no shares
            data.targets[3] = -100 if data.kind == "multiclass" else torch.nan
    assert m.layer.task_weights is None
    assert m.layer.gradient_variance is None
    m.see()
    m.layer.refresh()
    m.see()
    weights, variances = m.layer.task_weights, m.layer.gradient_variance
    assert weights is not None
    assert variances is not None
    parts = [moments(data, data) for data in m.data]
    powers = [POWERS[data.kind] for data in m.data]
    variance = torch.cat([v for _, v in parts], 1)  # [B, T, D]
    power = torch.tensor([p for (_, v), p in zip(parts, powers) for _ in range(v.shape[1])], dtype=torch.float64)
    weight = torch.where(variance < torch.inf, variance.clamp(min=1e-8) ** -power[:, None], 0.0)
    share = weight / weight.sum(1, keepdim=True)
    some = ~share.isnan().any(-1).any(-1)  # examples with a label
    labelled = variance < torch.inf
    # 20,000 samples: 1 % of a variance.
    tolerance = 1e-8 if moments_of == "exact" else 0.05
    assert_near(weights, share[some].mean((0, 2)), tolerance)
    assert_near(variances, torch.where(labelled, variance, 0.0).sum(0) / labelled.sum(0), tolerance)
    assert weights.sum().item() == pytest.approx(1.0)
    assert weights.shape == (7,)


def test_what_the_layer_tells_is_of_the_step_that_was_made() -> None:
    m = problem()
    m.see()
    m.layer.refresh()
    m.see(slice(0, 8))
    other = problem()
    other.see()
    other.layer.refresh()
    other.see(slice(0, 8))
    with torch.no_grad():  # the optimizer's step, before anyone reads
        for head in m.heads:
            head.weight.add_(1.0)
    assert torch.equal(m.layer.task_weights, other.layer.task_weights)  # type: ignore[arg-type]


def test_predict() -> None:
    m = problem()
    features = m.data[0].features
    before = m.layer.predict(features)
    for found, head in zip(before, m.heads):
        assert torch.equal(found, head(features).detach())
    m.see()
    m.layer.refresh()
    after = m.layer.predict(features)
    data = m.data[0]
    law = regression_posterior(data.features, data.targets, gamma=GAMMAS["regression"])
    assert_near(after[0], features @ law.mean.T, 1e-10)
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[2], before[2])
    assert [o.dtype for o in m.layer.predict(features.double())] == [torch.float64] * 3
