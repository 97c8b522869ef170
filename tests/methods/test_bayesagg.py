"""BayesAgg against an independent float64 computation of the gradient that goes back into the backbone; what arrives
from above; statistics that decay; the noise of regressions."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from mtlgrad import BayesAgg, Binary, Multiclass, Regression, reference
from mtlgrad.posterior import binary_posterior, regression_posterior
from tests.support.bounds import all_near, assert_near, near, normal
from tests.support.nets import (
    GAMMAS,
    HEAD_WIDTH,
    KINDS,
    LAYERS,
    POSTERIORS,
    POWERS,
    HeadData,
    Problem,
    linear,
    mean_loss,
    posterior,
    problem,
    published_layer,
    published_regression,
    unpacked,
)
from tests.support.oracles import combined, dense_of, expected_gradient, isserlis, moments
from tests.support.ranks import Pool

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- forward, and the gradient before the first refresh --------------------------------------------------------------


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
        assert torch.equal(features.grad, plain.grad)


# ---- the aggregated gradient -----------------------------------------------------------------------------------------


# Fewer and more examples than weights.
@pytest.mark.parametrize(
    ("batch", "missing", "statistics"),
    [(1, 0.0, "stored"), (3, 0.3, "streaming"), (12, 0.0, "streaming"), (12, 0.3, "stored")],
)
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


@pytest.mark.parametrize(("kind", "structure"), [case for case in POSTERIORS if case[0] != "regression"])
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
            assert_near(mine.grad, theirs.grad, 1e-14)


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
    assert_near(by_storing.layer.posteriors[0].mean, stored.mean, 1e-10)
    assert_near(by_streaming.layer.posteriors[0].mean, streamed.mean, 1e-10)
    assert not torch.allclose(stored.mean, streamed.mean)


# ---- missing labels, and other ways to say the same ------------------------------------------------------------------


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
    fewer.layer._posteriors = [m.layer.posteriors[i] for i in (0, 2)]
    with torch.no_grad():
        for mine, theirs in zip(fewer.heads, (m.heads[0], m.heads[2])):
            mine.load_state_dict(theirs.state_dict())
    m.data[1].targets = torch.full_like(m.data[1].targets, torch.nan)
    assert state["number"] == 1
    assert_near(m.see(slice(0, 9)), fewer.see(slice(0, 9)), 1e-12)
    weights = m.layer.task_weights
    assert (weights[3:6] == 0).all()
    assert weights.sum().item() == pytest.approx(1.0)
    variances = m.layer.gradient_variance
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

        optimizer.step(closure)
        with torch.no_grad():
            head.weight.copy_(m.heads[0].weight)
            head.bias.copy_(m.heads[0].bias)
    warm_up = m.see()
    m.layer.refresh()
    found = m.see()
    assert (found - warm_up).norm() < 0.02 * warm_up.norm()


# ---- what the layer tells --------------------------------------------------------------------------------------------


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
    assert torch.equal(m.layer.task_weights, other.layer.task_weights)


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


# ---- what arrives from above: loss weights, penalties, other heads and losses ----------------------------------------


ROWS = slice(0, 15)


def ready(kinds: Sequence[str] = KINDS, **options: Any) -> Problem:
    m = problem(kinds, **options)
    m.see()
    m.layer.refresh()
    return m


def arrives(m: Problem, loss: Callable[[Tensor, list[Tensor]], Tensor], rows: slice = ROWS) -> Tensor:
    """The gradient that goes on, of a loss of the layer's output and the heads' plain losses."""
    features = m.data[0].features[rows].clone().requires_grad_()
    out = m.layer(features, m.targets(rows))
    loss(out, m.losses(out, rows)).backward()
    return features.grad


def expected(m: Problem, scales: Sequence[float], without: Sequence[int] = (), rows: slice = ROWS) -> Tensor:
    """sum_t lambda_t s_t E_t / sum_t lambda_t / B, from the explicit moments; ``scales`` one a head."""
    numerator = denominator = torch.zeros(())
    for i, (data, scale) in enumerate(zip(m.data, scales)):
        if i not in without:
            mean, variance = moments(data.rows(rows), data)
            weight = variance.clamp(min=1e-8) ** -POWERS[data.kind]
            numerator = numerator + (scale * weight * mean).sum(1)
            denominator = denominator + weight.sum(1)
    return (numerator / denominator / (rows.stop - rows.start)).to(m.data[0].features)


@pytest.mark.parametrize("weights", [(10.0, 0.1, 2.0), (0.0, 1.0, 1.0), (1.0, -1.0, 0.5), (1024.0,) * 3])
@pytest.mark.parametrize("by_total", [False, True])
def test_loss_weights(weights: Sequence[float], by_total: bool) -> None:
    m = ready()

    def loss(_: Tensor, losses: list[Tensor]) -> Tensor:
        weighted = [w * one for w, one in zip(weights, losses)]
        return m.layer.total(weighted) if by_total else torch.stack(weighted).sum()

    all_near(arrives(m, loss), expected(m, weights), 1e-6)
    repeated = [w for w, head in zip(weights, m.layer.heads) for _ in range(head.num_tasks)]
    by_task = torch.tensor(repeated, dtype=torch.float64)
    assert (m.layer.loss_weights - by_task).abs().max() <= 1e-9 * max(map(abs, weights))


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


@pytest.mark.parametrize("how", ["reversal", "detach", "hook"])
def test_between_the_layer_and_a_head(how: str) -> None:
    m = ready()
    change: Callable[[Tensor], Tensor] = Reverse.apply if how == "reversal" else Tensor.detach

    def loss(out: Tensor, losses: list[Tensor]) -> Tensor:
        if how == "hook":
            out.register_hook(lambda gradient: 3 * gradient)
            return torch.stack(losses).sum()
        return losses[0] + mean_loss(m.data[1].rows(ROWS), m.heads[1](change(out))) + losses[2]

    scales = {"reversal": (1.0, -1.0, 1.0), "detach": (1.0, 0.0, 1.0), "hook": (3.0, 3.0, 3.0)}[how]
    all_near(arrives(m, loss), expected(m, scales), 1e-8)


def test_means_of_the_labelled() -> None:
    m = ready(missing=0.4)

    def loss(out: Tensor, losses: list[Tensor]) -> Tensor:
        del losses
        total = torch.zeros(())
        for data, head in zip(m.data, m.heads):
            part = data.rows(ROWS)
            total = total + mean_loss(part, head(out)) * len(part.features) / part.labelled.sum()
        return total

    scales = [15 / int(data.rows(ROWS).labelled.sum()) for data in m.data]
    all_near(arrives(m, loss), expected(m, scales), 1e-8)


@pytest.mark.parametrize("by_total", [False, True])
def test_a_mean_over_the_outputs_is_the_published_loss_with_total(by_total: bool) -> None:
    m = ready(("regression",))
    found = arrives(m, lambda _, losses: m.layer.total([losses[0] / 3]) if by_total else losses[0] / 3)
    all_near(found, expected(m, [1.0 if by_total else 1 / 3]), 1e-8)


def test_a_scale_that_overflowed_goes_on() -> None:
    """For GradScaler to see, and to skip the step."""
    m = ready()
    found = arrives(m, lambda _, losses: torch.stack(losses).sum() * torch.inf)
    assert not found.isfinite().any()


@pytest.mark.parametrize("by_total", [False, True])
@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 1.0), (torch.float32, 2.0**16), (torch.float64, 1.0), (torch.float64, 0.25)]
)
def test_a_penalty_adds_its_own_gradient(dtype: torch.dtype, by_total: bool, scale: float) -> None:
    m = ready()
    for data, head in zip(m.data, m.heads):
        head.to(dtype)
        data.features = data.features.to(dtype)
        data.targets = data.targets if data.kind == "multiclass" else data.targets.to(dtype)

    def loss(strength: float) -> Callable[[Tensor, list[Tensor]], Tensor]:
        def added(out: Tensor, losses: list[Tensor]) -> Tensor:
            tasks = m.layer.total(losses) if by_total else torch.stack([one.to(dtype) for one in losses]).sum()
            return scale * (tasks + strength * out.square().mean())

        return added

    # Without total the scale is read beside the penalty's gradient: a weak one does not hide a power of two.
    for strength in (1e-3, 1e-2, 0.1, 10.0) if by_total else (1e-3, 1e-2):
        change = arrives(m, loss(strength)) - arrives(m, loss(0.0))
        features = m.data[0].features[ROWS]
        own = scale * strength * 2 * features / features.numel()
        leaf = features.clone().requires_grad_()
        (plain,) = torch.autograd.grad(scale * torch.stack(m.losses(leaf, ROWS)).sum(), leaf)
        error = 1e-5 * own.abs().max() + 4e-7 * plain.abs().max()  # float32 holds no more of their sum
        assert (change - own).abs().max() <= (error if dtype == torch.float32 else 1e-9 * scale)


def test_a_strong_penalty_without_total_does_not_vanish() -> None:
    m = ready(("regression", "binary"), reduction="sum")
    change = arrives(m, lambda out, losses: torch.stack(losses).sum() + 3 * out.square().mean())
    change = change - arrives(m, lambda _, losses: torch.stack(losses).sum())
    features = m.data[0].features[ROWS]
    all_near(change, 3 * 2 * features / features.numel(), 1e-8)


@pytest.mark.parametrize("by_total", [False, True])
def test_a_head_that_is_not_registered_adds_its_own_gradient(by_total: bool) -> None:
    m = ready(("binary", "multiclass"), examples=40)
    other = nn.Linear(4, 1, dtype=torch.float64)

    def loss(out: Tensor, losses: list[Tensor], strength: float) -> Tensor:
        tasks = m.layer.total(losses) if by_total else torch.stack(losses).sum()
        return tasks + strength * other(out).square().mean()

    change = arrives(m, lambda out, losses: loss(out, losses, 0.05)) - arrives(m, lambda o, ls: loss(o, ls, 0.0))
    features = m.data[0].features[ROWS].clone().requires_grad_()
    (own,) = torch.autograd.grad(0.05 * other(features).square().mean(), features)
    all_near(change, own, 1e-8 if by_total else 1e-6)


def test_a_second_layer_above() -> None:
    """What its heads send back through it is an addition to the first layer's."""
    below, above = ready(("regression",)), ready(("multiclass",), examples=40)
    block = nn.Sequential(nn.Linear(4, 4, dtype=torch.float64), nn.Tanh())
    data = above.data[0]
    data.features = below.data[0].features
    features = below.data[0].features[ROWS].clone().requires_grad_()
    out = below.layer(features, below.targets(ROWS))
    between = block(out)
    between.retain_grad()
    top = above.layer(between, above.targets(ROWS))
    (below.layer.total(below.losses(out, ROWS)) + mean_loss(data.rows(ROWS), above.heads[0](top))).backward()
    inputs = below.data[0].features[ROWS].clone().requires_grad_()
    (own,) = torch.autograd.grad(block(inputs), inputs, between.grad)
    all_near(features.grad, expected(below, [1.0]) + own, 1e-8)


def test_under_autocast() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(20, 64), nn.ReLU())
    age, kind, flag = nn.Linear(64, 1), nn.Linear(64, 5), nn.Linear(64, 2)
    layer = BayesAgg([Regression(age, power=0.3), Multiclass(kind), Binary(flag)], covariance="kron")
    x, y, c = torch.randn(128, 20), torch.randn(128, 1), torch.randint(0, 5, (128,))
    b = (torch.rand(128, 2) > 0.5).float()

    def gradient(strength: float, weights: Sequence[float] = (1.0, 1.0, 1.0)) -> Tensor:
        backbone.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            z = layer(backbone(x), [y, c, b])
            losses = [
                functional.mse_loss(age(z).float(), y),
                functional.cross_entropy(kind(z).float(), c),
                2 * functional.binary_cross_entropy_with_logits(flag(z).float(), b),
            ]
        tasks = layer.total([w * one for w, one in zip(weights, losses)])
        (tasks + strength * z.float().square().mean()).backward()
        grad = backbone[0].weight.grad
        assert isinstance(grad, Tensor)
        return grad.clone()

    gradient(0.0)
    layer.refresh()
    features = backbone(x)
    (own,) = torch.autograd.grad(10 * features.square().mean(), backbone[0].weight)
    assert (gradient(10.0) - gradient(0.0) - own).norm() < 0.02 * own.norm()
    gradient(0.0, (10.0, 0.1, 2.0))
    wanted = torch.tensor([10.0, 0.1, 2.0, 2.0]).double()
    assert ((layer.loss_weights - wanted).abs() <= 0.02 * wanted + 0.01).all()


def focal(logits: Tensor, targets: Tensor) -> Tensor:
    plain = functional.cross_entropy(logits, targets, reduction="none")
    return ((1 - (-plain).exp()) ** 2 * plain).mean()


OTHER_LOSSES: dict[str, tuple[int, Callable[[Tensor, Tensor], Tensor]]] = {
    "huber": (0, lambda z, y: functional.huber_loss(z, y, delta=0.3, reduction="sum") / len(y)),
    "smoothing": (2, lambda z, y: functional.cross_entropy(z, y, label_smoothing=0.2)),
    "class weights": (2, lambda z, y: functional.cross_entropy(z, y, weight=torch.tensor([3.0, 1.0, 0.2]).double())),
    "focal": (2, focal),
    "positive weight": (
        1,
        lambda z, y: (
            functional.binary_cross_entropy_with_logits(z, y, pos_weight=torch.tensor(5.0).double(), reduction="sum")
            / len(y)
        ),
    ),
}


WIDE = 20


def wide(width: int = WIDE, **options: Any) -> tuple[Tensor, list[Tensor], list[nn.Linear], BayesAgg]:
    """More features than rows of weights."""
    torch.manual_seed(1)
    features = torch.randn(40, width).double()
    heads = [nn.Linear(width, 3).double() for _ in range(3)]
    targets = [torch.randn(40, 3).double(), (torch.rand(40, 3) > 0.5).double(), torch.randint(0, 3, (40,))]
    registered = [published_regression(heads[0], power=0.5), Binary(heads[1]), Multiclass(heads[2])]
    layer = published_layer(registered, **options)
    layer(features.clone().requires_grad_(), targets)
    layer.refresh()
    return features, targets, heads, layer


PLAIN: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda z, y: (z - y).square().sum() / len(y),
    lambda z, y: functional.binary_cross_entropy_with_logits(z, y, reduction="sum") / len(y),
    functional.cross_entropy,
]


@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_another_loss_goes_on_as_it_is_and_is_named_once(name: str) -> None:
    features, targets, heads, layer = wide()
    index, other = OTHER_LOSSES[name]
    losses = list(PLAIN)
    losses[index] = other

    def gradient(chosen: Sequence[Callable[[Tensor, Tensor], Tensor]], rows: slice = ROWS) -> Tensor:
        leaf = features[rows].clone().requires_grad_()
        out = layer(leaf, [t[rows] for t in targets], count=False)
        layer.total([f(head(out), t[rows]) for f, head, t in zip(chosen, heads, targets)]).backward()
        return leaf.grad

    kind = layer.heads[index].likelihood
    words = rf"heads\[{index}\] \({kind}\): expected the gradient of its plain loss, found that of another loss"
    with pytest.warns(UserWarning, match=words) as caught:
        first = gradient(losses)
    assert len(caught) == 1
    all_near(gradient(losses), first, 1e-12)  # and without another warning
    # The others' aggregate, and the head's own gradient.
    others = [i for i in range(3) if i != index]
    alone = published_layer([layer.heads[i] for i in others])
    alone(features.clone().requires_grad_(), [targets[i] for i in others])
    alone.refresh()
    leaf = features[ROWS].clone().requires_grad_()
    (own,) = torch.autograd.grad(other(heads[index](leaf), targets[index][ROWS]), leaf)
    all_near(first, alone.aggregate(features[ROWS], [targets[i][ROWS] for i in others]) + own, 1e-8)
    weights = torch.cat([torch.full((h.num_tasks,), float(i != index)) for i, h in enumerate(layer.heads)]).double()
    all_near(layer.loss_weights, weights, 1e-8)


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("how", ["replaced", "adapted"])
def test_another_layer_is_named(index: int, how: str) -> None:
    features, targets, heads, layer = wide()
    other = nn.Linear(WIDE, 3).double()
    used = list[Callable[[Tensor], Tensor]](heads)
    used[index] = other if how == "replaced" else lambda x: heads[index](x) + other(x)
    leaf = features.clone().requires_grad_()
    out = layer(leaf, targets)
    words = rf"heads\[{index}\] .* found that of another layer; .*register the one that is used"
    with pytest.warns(UserWarning, match=words) as caught:
        torch.stack([f(z(out), t) for f, z, t in zip(PLAIN, used, targets)]).sum().backward()
    assert len(caught) == 1
    leaf_plain = features.clone().requires_grad_()
    (own,) = torch.autograd.grad(PLAIN[index](used[index](leaf_plain), targets[index]), leaf_plain)
    left = leaf.grad - own  # the others' aggregate, up to a scale that the other layer's gradient tilts
    assert left.norm() < 3 * own.norm()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    weights=st.tuples(*[st.sampled_from([0.0, 1.0, 0.01, 30.0, -1.0])] * 3),
    examples=st.sampled_from([1, 2, 7, 40]),
    penalty=st.sampled_from([0.0, 0.0, 0.01, 0.1, 10.0]),
    width=st.sampled_from([6, 10, WIDE]),
    by_total=st.booleans(),
    relu=st.booleans(),
    single=st.booleans(),
)
def test_plain_losses_are_never_taken_for_others(
    weights: tuple[float, float, float],
    examples: int,
    penalty: float,
    width: int,
    by_total: bool,
    relu: bool,
    single: bool,
) -> None:
    features, targets, heads, layer = wide(width)
    features = features.relu() if relu else features
    if single:
        features, heads = features.float(), [head.float() for head in heads]
        targets = [targets[0].float(), targets[1].float(), targets[2]]
    leaf = features[:examples].clone().requires_grad_()
    out = layer(leaf, [t[:examples] for t in targets])
    losses = [w * f(head(out), t[:examples]) for w, f, head, t in zip(weights, PLAIN, heads, targets)]
    tasks = layer.total(losses) if by_total else torch.stack(losses).sum()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (tasks + penalty * out.square().mean()).backward()
    assert leaf.grad.isfinite().all()


# ---- passes, and what is refused -------------------------------------------------------------------------------------


def test_a_pass_that_does_not_count() -> None:
    once, twice = problem(), problem()
    for m in (once, twice):
        for rows in (slice(0, 20), slice(20, 40)):
            arrives(m, lambda _, losses: torch.stack(losses).sum(), rows)
            if m is twice:
                features = m.data[0].features[rows].clone().requires_grad_()
                m.layer(features, m.targets(rows), count=False)
        m.layer.refresh()
    for a, b in zip(once.layer.posteriors or [], twice.layer.posteriors or [], strict=True):
        assert torch.equal(a.mean, b.mean)


def test_a_call_a_task() -> None:
    """Each task with inputs of its own: the others have no labels there."""
    m = ready(("regression", "multiclass"))
    for index in range(2):
        features = m.data[0].features[ROWS].clone().requires_grad_()
        targets: list[Tensor | None] = [None, None]
        targets[index] = m.targets(ROWS)[index]
        out = m.layer(features, targets)
        m.losses(out, ROWS)[index].backward()
        alone = Problem([m.data[index]], [m.heads[index]], m.layer)
        all_near(features.grad, expected(alone, [1.0]), 1e-8)


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4), (1, 7)])
def test_positions_are_examples(shape: tuple[int, ...]) -> None:
    """[B, L, D] and [B, D, H, W], whose padding has no labels."""
    torch.manual_seed(0)
    count = torch.Size(shape).numel()
    heads = [nn.Linear(4, 2).double(), nn.Linear(4, 1).double(), nn.Linear(4, 3).double()]
    conv = nn.Conv2d(4, 3, 1).double()
    if len(shape) == 3:
        with torch.no_grad():
            conv.weight.copy_(heads[2].weight[:, :, None, None])
            conv.bias.copy_(heads[2].bias)
    last = conv if len(shape) == 3 else heads[2]
    flat = BayesAgg([Regression(heads[0], power=0.5), Binary(heads[1]), Multiclass(heads[2])])
    deep = BayesAgg([Regression(heads[0], power=0.5), Binary(heads[1]), Multiclass(last)])
    features = torch.randn(count, 4).double()
    targets = [torch.randn(count, 2).double(), (torch.rand(count, 1) > 0.5).double(), torch.randint(0, 3, (count,))]
    targets[0][0], targets[1][1], targets[2][2] = torch.nan, torch.nan, -100

    def folded(x: Tensor) -> Tensor:
        x = x.reshape(*shape, *x.shape[1:])
        return x.movedim(-1, 1) if len(shape) == 3 and x.dim() == 4 else x

    def gradient(layer: BayesAgg, fold: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = fold(features).clone().requires_grad_()
        given = [
            fold(targets[0]),
            fold(targets[1])[:, 0] if fold is not folded else targets[1].reshape(shape),
            fold(targets[2]),
        ]
        out = layer(leaf, given)
        assert out.shape == leaf.shape
        rows = out.movedim(1, -1) if out.dim() == 4 else out
        rows = rows.reshape(-1, 4)
        there = [t.isfinite() for t in targets[:2]]
        losses = [
            (heads[0](rows) - targets[0])[there[0]].square().sum() / count,
            functional.binary_cross_entropy_with_logits(heads[1](rows)[there[1]], targets[1][there[1]], reduction="sum")
            / count,
            functional.cross_entropy(heads[2](rows), targets[2], reduction="sum") / count,
        ]
        layer.total(losses).backward()
        return leaf.grad

    for layer, fold in ((flat, lambda x: x), (deep, folded)):
        gradient(layer, fold)
        layer.refresh()
    all_near(gradient(deep, folded), folded(gradient(flat, lambda x: x)), 1e-12)


def test_layers_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Regression: layers: expected weights, found a LazyLinear .*run a forward"):
        Regression(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"expected nn.Linear or a convolution of 1 x 1, found Conv2d"):
        Multiclass(nn.Conv2d(4, 3, 3))


class Adapted(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 0.5 * input[..., :3]


def test_a_forward_of_another_kind_is_refused() -> None:
    words = r"expected a forward of x W' \+ b, found a Adapted with another one; merge the adapter"
    with pytest.raises(ValueError, match=words):
        Multiclass(Adapted(4, 3))
    plain = nn.Linear(4, 3)
    head = Multiclass(plain)
    layer = BayesAgg([head])

    def epoch() -> None:
        layer(torch.randn(5, 4).requires_grad_(), [torch.tensor([0, 1, 2, 0, 1])])
        layer.refresh()

    epoch()
    plain.register_forward_hook(lambda module, inputs, out: 2 * out)  # since
    with pytest.raises(ValueError, match=r"BayesAgg: heads\[0\]: layers: expected a forward of x W' \+ b"):
        epoch()


@pytest.mark.parametrize(
    ("head", "targets", "words"),
    [
        (Regression, torch.tensor([[1], [2]]), r"expected float32, .* found torch.int64; use targets.float\(\)"),
        (Binary, torch.tensor([[True], [False]]), r"expected float32, .* found torch.bool; use targets.float\(\)"),
        (Multiclass, torch.tensor([[0.3, 0.7], [0.5, 0.5]]), r"of soft labels there is no posterior .*argmax\(1\)"),
        (Multiclass, torch.tensor([1, 0], dtype=torch.int32), r"expected int64 .* use targets.long\(\)"),
    ],
)
def test_targets_of_another_kind(head: Any, targets: Tensor, words: str) -> None:
    outputs = 2 if head is Multiclass else 1
    layer = BayesAgg([head(nn.Linear(4, outputs))])
    with pytest.raises(RuntimeError, match=words):
        layer(torch.randn(2, 4).requires_grad_(), [targets])


@pytest.mark.parametrize("how", ["evaluation mode", "no_grad", "a frozen backbone"])
def test_an_epoch_that_left_nothing_says_why(how: str) -> None:
    m = problem()
    features = m.data[0].features.clone().requires_grad_(how != "a frozen backbone")
    m.layer.train(how != "evaluation mode")
    with torch.set_grad_enabled(how != "no_grad"):
        for _ in range(3):
            m.layer(features, m.targets())
    with pytest.raises(RuntimeError, match=rf"found none, but calls of the layer: 3 .*{how}"):
        m.layer.refresh()


def test_never_refreshing_is_told_once() -> None:
    m = problem()
    for epoch in range(4):
        m.layer.train()
        m.see()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            m.layer.eval()
        assert len(caught) == (epoch == 1)


@pytest.mark.parametrize("gamma", [1.0, 100.0])
def test_logits_in_the_hundreds_with_a_weak_prior(gamma: float) -> None:
    torch.manual_seed(0)
    head = nn.Linear(8, 2)
    features = 10 * torch.randn(64, 8)
    with torch.no_grad():
        head.weight.mul_(100)
    targets = (head(features).detach() > 0).float()
    targets[:3] = 1 - targets[:3]
    layer = BayesAgg([Binary(head, gamma=gamma)])
    for _ in range(2):
        leaf = features.clone().requires_grad_()
        functional.binary_cross_entropy_with_logits(head(layer(leaf, [targets])), targets).backward()
        layer.refresh()
    assert leaf.grad.isfinite().all()


# ---- statistics that decay as training goes on, without refresh() ----------------------------------------------------


BATCHES = [slice(i, i + 5) for i in range(0, 40, 5)]


def passed(m: Problem, rows: slice) -> Tensor:
    features = m.data[0].features[rows].clone().requires_grad_()
    torch.stack(m.losses(m.layer(features, m.targets(rows)), rows)).sum().backward()
    return features.grad


def expected_precision(m: Problem, index: int, decay: float, batches: int, factor: float) -> Tensor:
    """Prior and curvatures of the batches, the last of weight one, times ``factor``; dense."""
    data, head = m.data[index], m.layer.heads[index]
    hidden = data.features
    if data.kind != "regression":
        hidden = torch.cat([hidden, torch.ones(len(hidden), 1).double()], 1)
    rows, width = head.outputs, hidden.shape[1]
    total = torch.eye(rows * width).double() / GAMMAS[data.kind]
    for i, batch in enumerate(BATCHES[:batches]):
        weight = factor * decay ** (batches - 1 - i)
        for h in hidden[batch]:
            if data.kind == "regression":
                q = torch.eye(rows).double()
            else:
                z = m.heads[index].weight @ h[:-1] + m.heads[index].bias
                p = torch.sigmoid(z) if data.kind == "binary" else torch.softmax(z, 0)
                q = torch.diag(p * (1 - p)) if data.kind == "binary" else torch.diag(p) - torch.outer(p, p)
            total = total + weight * torch.kron(q, torch.outer(h, h)).detach()
    return total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half_life", [2.0, 3.5])
def test_sums_that_decay(kind: str, half_life: float) -> None:
    m = problem((kind,), statistics="moving", half_life=half_life)
    for i, rows in enumerate(BATCHES):
        passed(m, rows)
        # After half_life batches, and then after every fourth of it, of the batches before.
        first = 3 if half_life == 2.0 else 5
        assert (m.layer.posteriors is not None) == (i + 1 >= first)
    found = dense_of(m.layer.posteriors[0], m.layer.posteriors[0].precision)
    all_near(found, expected_precision(m, 0, 0.5 ** (1 / half_life), len(BATCHES) - 1, 1.0), 1e-10)


def test_refresh_tells_how_many_examples_an_epoch_has() -> None:
    m = problem(("regression",), statistics="moving", half_life=2.0)
    for rows in BATCHES:
        passed(m, rows)
    m.layer.refresh()
    decay = 0.5**0.5
    weight = 5 * sum(decay**i for i in range(len(BATCHES)))
    found = dense_of(m.layer.posteriors[0], m.layer.posteriors[0].precision)
    all_near(found, expected_precision(m, 0, decay, len(BATCHES), 40 / weight), 1e-10)
    passed(m, BATCHES[0])  # and goes on with them
    assert m.layer._full_data[0].weight == pytest.approx(decay * weight + 5)


def test_memory_does_not_grow() -> None:
    def size(m: Problem) -> int:
        return len(m.layer.state_dict()["_extra_state"])

    m = problem(statistics="moving", half_life=2.0)
    for rows in BATCHES:
        passed(m, rows)
    before = size(m)
    for rows in BATCHES * 2:
        passed(m, rows)
    assert size(m) <= before + 64


def test_a_long_half_life_is_streaming() -> None:
    moving = problem(statistics="moving", half_life=1e9)
    streaming = problem(statistics="streaming")
    for m in (moving, streaming):
        for rows in BATCHES:
            passed(m, rows)
        m.layer.refresh()
    all_near(moving.aggregate(slice(0, 9)), streaming.aggregate(slice(0, 9)), 1e-6)


def test_the_noise_of_sums_that_decay() -> None:
    m = problem(("regression",))
    layer = BayesAgg([Regression(m.heads[0], gamma=1e6, bias=False)], statistics="moving", half_life=2.0)
    data = m.data[0]
    for rows in BATCHES:
        features = data.features[rows].clone().requires_grad_()
        m.layer(features, m.targets(rows))
        layer(features, m.targets(rows))
    layer.refresh()
    weight = torch.cat([torch.full((5,), 0.5 ** ((len(BATCHES) - 1 - i) / 2)) for i in range(len(BATCHES))]).double()
    weight = weight * 40 / weight.sum()
    root = weight.sqrt()[:, None]
    solution = torch.linalg.lstsq(root * data.features, root * data.targets).solution
    residuals = (weight[:, None] * (data.targets - data.features @ solution).square()).sum(0)
    all_near(layer.noise, residuals / (40 - data.features.shape[1]), 1e-5)


@pytest.mark.parametrize("half_life", [0, -1.0, "long"])
def test_half_lives_that_are_refused(half_life: Any) -> None:
    with pytest.raises(ValueError, match="BayesAgg: half_life: expected a number of batches above 0, found"):
        BayesAgg(problem().layer.heads, statistics="moving", half_life=half_life)


# ---- the variance of regression targets, assumed or estimated --------------------------------------------------------


def noisy(examples: int = 60, missing: bool = False, width: int = 4) -> tuple[Tensor, Tensor]:
    """Three outputs with noise of very different sizes."""
    features, weight = normal(1, examples, width), normal(2, 3, width)
    targets = features @ weight.T + normal(3, examples, 3) * torch.tensor([0.05, 0.5, 2.0], dtype=torch.float64)
    if missing:
        targets[::3, 1] = torch.nan
        targets[1::4, 2] = torch.nan
    return features, targets


def noisy_layer(noise: float | str, **options: Any) -> BayesAgg:
    head = nn.Linear(4, 3, dtype=torch.float64)
    return published_layer(
        [Regression(head, gamma=GAMMAS["regression"], power=0.5, noise=noise, bias=False)], **options
    )


def see(bayes: BayesAgg, features: Tensor, *targets: Tensor) -> None:
    bayes(features.clone().requires_grad_(), list(targets))


def exact_noise(features: Tensor, targets: Tensor) -> Tensor:
    """One output at a time, from the examples that have its label."""
    found = []
    for y in targets.T:
        there = y.isfinite()
        h, y = features[there], y[there]
        precision = h.T @ h + torch.eye(h.shape[1], dtype=h.dtype) / GAMMAS["regression"]
        mean = torch.linalg.solve(precision, h.T @ y)
        parameters = (torch.linalg.inv(precision) @ h.T @ h).trace()
        found.append((y - h @ mean).square().sum() / (len(y) - parameters))
    return torch.stack(found)


def expected_of_noise(
    features: Tensor, targets: Tensor, noise: Tensor, batch: int, first: Tensor | None = None
) -> Tensor:
    """Of the first examples: the moments of the gradient of (w.h - y)^2 / noise, prior N(0, gamma noise I)."""
    means, variances = [], []
    for o, q in enumerate(noise):
        y = targets[:, o]
        both = torch.cat([features, features[:batch]]), torch.cat([y, y[:batch]])
        h, y = (t[both[1].isfinite()] for t in both)
        precision = (h.T @ h + torch.eye(h.shape[1], dtype=h.dtype) / GAMMAS["regression"]) / q
        mean, covariance = torch.linalg.solve(precision, h.T @ y / q), torch.linalg.inv(precision)
        pairs = [isserlis(g, t, mean, covariance) for g, t in zip(features[:batch], targets[:batch, o].nan_to_num())]
        missing = targets[:batch, o].isnan()[:, None]
        means.append(torch.stack([e for e, _ in pairs]).masked_fill(missing, 0.0) / q)
        variances.append(torch.stack([v for _, v in pairs]).masked_fill(missing, torch.inf) / q**2)
    deviation = (noise if first is None else first).sqrt()
    balance = deviation.sum() / (1.0 / deviation).sum()
    return balance * combined([(torch.stack(means, 1), torch.stack(variances, 1))], [0.5])


# Fewer examples than weights, and more.
@pytest.mark.parametrize(
    ("statistics", "missing", "batch"),
    [("stored", False, 3), ("stored", True, 30), ("streaming", False, 30), ("streaming", True, 3)],
)
def test_estimated_noise(statistics: str, missing: bool, batch: int) -> None:
    features, targets = noisy(missing=missing)
    bayes = noisy_layer("estimated", statistics=statistics)
    assert bayes.noise is None
    for rows in (slice(0, 20), slice(20, 60)):
        see(bayes, features[rows], targets[rows])
    bayes.refresh()
    noise = exact_noise(features, targets)
    all_near(bayes.noise, noise, 1e-10)
    assert (noise.sqrt() / torch.tensor([0.05, 0.5, 2.0]) - 1.0).abs().max() < 0.5  # the prior draws small ones away
    found = bayes.aggregate(features[:batch], [targets[:batch]])
    all_near(found, expected_of_noise(features, targets, noise, batch), 1e-8)


@pytest.mark.parametrize("noise", [0.04, 9.0])
def test_given_noise(noise: float) -> None:
    features, targets = noisy()
    bayes = noisy_layer(noise)
    see(bayes, features, targets)
    bayes.refresh()
    all_near(bayes.noise, torch.full((3,), noise, dtype=torch.float64), 1e-12)
    all_near(bayes.aggregate(features[:5], [targets[:5]]), expected_of_noise(features, targets, bayes.noise, 5), 1e-8)


def test_the_backward_sends_back_the_aggregate_and_the_step_after_knows_new_noise() -> None:
    features, targets = noisy()
    bayes, first = noisy_layer("estimated"), None
    for factor in (1.0, 7.0):  # the second epoch's targets are larger
        see(bayes, features, factor * targets)
        bayes.refresh()
        first = bayes.noise if first is None else first
        all_near(bayes.noise, factor**2 * exact_noise(features, targets), 1e-10)
        leaf = features[:6].clone().requires_grad_()
        loss = (bayes.heads[0].predict(bayes(leaf, [factor * targets[:6]])) - factor * targets[:6]).square().sum() / 6
        loss.backward()
        all_near(leaf.grad, expected_of_noise(features, factor * targets, bayes.noise, 6, first), 1e-8)
        for full_data in bayes._full_data:
            full_data.end_epoch()


def test_units_of_targets_do_not_matter() -> None:
    """Of targets in millimetres or metres the aggregate is the same but for the unit of the squared error."""
    features, targets = noisy()
    found = []
    for unit in (1.0, 1000.0):
        bayes = noisy_layer("estimated")
        see(bayes, features, targets * unit)
        bayes.refresh()
        found.append(bayes.aggregate(features[:7], [targets[:7] * unit]) / unit**2)
    all_near(found[0], found[1], 1e-9)


def test_beside_other_heads_float32_and_published() -> None:
    features, targets = noisy()
    heads = [nn.Linear(4, 3), nn.Linear(4, 2)]
    marks = (normal(9, 60, 2) > 0.0).float()

    def aggregate(noise: float | str, wide: bool) -> tuple[Tensor, Tensor]:
        own = [copy.deepcopy(head).double() if wide else head for head in heads]
        bayes = published_layer([Regression(own[0], noise=noise, bias=False), Binary(own[1])])
        given = [t if wide else t.float() for t in (features, targets)]
        see(bayes, given[0], given[1], marks.to(given[0]))
        bayes.refresh()
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
    features, targets = noisy()
    targets = torch.stack([features @ normal(5, 4), torch.zeros(60).double(), targets[:, 2]], 1)
    bayes = BayesAgg([Regression(nn.Linear(4, 3).double(), gamma=1e9, bias=False)])
    see(bayes, features, targets)
    bayes.refresh()
    all_near([bayes.noise[0]], [1e-6 * targets[:, 0].square().mean()], 1e-6)
    assert bayes.noise[1] == 1.0
    assert bayes.aggregate(features[:5], [targets[:5]]).isfinite().all()
    # Fewer labels than weights, and none at all.
    few = torch.full((60, 3), torch.nan, dtype=torch.float64)
    few[:2, 0], few[:30, 1] = 1.5, normal(6, 30)
    bayes = noisy_layer("estimated")
    see(bayes, features, few)
    bayes.refresh()
    assert bayes.noise[2] == 1.0
    assert (bayes.noise > 0.0).all()
    assert bayes.aggregate(features[:5], [few[:5]]).isfinite().all()


@pytest.mark.parametrize("statistics", ["stored", "streaming"])
def test_state_of_the_noise(statistics: str) -> None:
    """Saved in the middle of an epoch, after one."""
    features, targets = noisy(missing=True)
    bayes, resumed = (noisy_layer("estimated", statistics=statistics) for _ in range(2))
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
    assert torch.equal(bayes.noise, resumed.noise)
    assert torch.equal(bayes.aggregate(*batch), resumed.aggregate(*batch))
    with pytest.raises(ValueError, match=r"expected a state of regression 4 -> 3, covariance.*noise estimated"):
        noisy_layer(1.0, statistics=statistics).load_state_dict(bayes.state_dict())


@pytest.mark.parametrize("noise", [0.0, -1.0, float("nan"), float("inf"), "unit", None, [1.0]])
def test_noise_that_is_refused(noise: Any) -> None:
    with pytest.raises(ValueError, match=r'Regression: noise: expected "estimated" or a finite variance above 0'):
        Regression(nn.Linear(4, 3), noise=noise)


def on_ranks(statistics: str, missing: bool, size: int, rank: int) -> list[Tensor]:
    """Uneven parts of three batches, the second refresh's after a rank had nothing. Rank -1: one process."""
    features, targets = noisy(missing=missing)
    bayes, found = noisy_layer("estimated", statistics=statistics), []
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
        batch = (
            slice(0, 7) if rank < 0 else slice(0, 2) if rank == 0 else slice(2, 7) if rank == size - 1 else slice(2, 2)
        )
        if size == 2:
            found += [bayes.noise, bayes.aggregate(features[batch], [targets[batch]])]
        else:
            found += [bayes.noise]
    return found


NOISE_ON_RANKS = [(statistics, missing) for statistics in ("stored", "streaming") for missing in (False, True)]


def each_on_ranks(size: int) -> list[list[Tensor]]:
    rank = dist.get_rank() if dist.is_initialized() else -1
    return [on_ranks(*case, size, rank) for case in NOISE_ON_RANKS]


def test_two_ranks_equal_one_process(two_ranks: Pool) -> None:
    """Noise and aggregates: each rank's rows, times the number of ranks, which average."""
    expected, parts = each_on_ranks(2), two_ranks(each_on_ranks, 2)
    for case, want in enumerate(expected):
        for rank, part in enumerate(parts):
            found = part[case]
            all_near([found[0], found[2]], [want[0], want[2]], 1e-9)
            for i in (1, 3):
                all_near(found[i], 2.0 * want[i].split((2, 5))[rank], 1e-9)


@pytest.mark.slow
def test_four_ranks_equal_one_process(four_ranks: Pool) -> None:
    expected = each_on_ranks(4)
    for part in four_ranks(each_on_ranks, 4):
        for found, want in zip(part, expected, strict=True):
            all_near(found, want, 1e-9)


# ---- symmetries ------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None, derandomize=True)
@given(draw=st.data())
def test_order_of_tasks_and_examples(draw: Any) -> None:
    heads = draw.draw(st.permutations(range(3)))
    examples = torch.tensor(draw.draw(st.permutations(range(10))))
    m = problem(missing=0.2)
    moved = Problem(
        [m.data[i] for i in heads], [m.heads[i] for i in heads], published_layer([m.layer.heads[i] for i in heads])
    )
    for part in (m, moved):
        part.see()
        part.layer.refresh()
    plain, permuted = m.see(slice(0, 10)), moved.see(examples)
    # Sums in another order.
    assert_near(permuted, plain[examples], 1e-11)
    tasks = [range(0, 3), range(3, 6), range(6, 7)]
    order = [t for i in heads for t in tasks[i]]
    assert_near(moved.layer.task_weights, m.layer.task_weights[order], 1e-11)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(kind=st.sampled_from(KINDS), copies=st.integers(2, 4))
def test_a_task_repeated_with_its_weights_is_the_task(kind: str, copies: int) -> None:
    m = problem((kind,))
    many = Problem(m.data * copies, m.heads * copies, published_layer(list(m.layer.heads) * copies))
    for part in (m, many):
        part.see()
        part.layer.refresh()
    assert_near(many.aggregate(), m.aggregate(), 1e-12)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(power=st.floats(0.0, 3.0))
def test_equal_variances_average_plainly(power: float) -> None:
    """Tasks that differ in the sign of weights and targets alone have one variance and opposite residuals."""
    m = problem(("regression",))
    data, head = m.data[0], m.heads[0]
    mirrored = linear(HeadData(data.kind, data.features, -data.targets, -data.weight))
    layer = published_layer([published_regression(head, 0.4, power), published_regression(mirrored, 0.4, power)])
    features = data.features.clone().requires_grad_()
    targets = [data.targets, -data.targets]
    layer(features, targets)
    layer.refresh()
    # (-w).h - (-y) = -(w.h - y), and times -w: the same gradient.
    alone = published_layer([published_regression(head, 0.4, power)])
    alone(features, targets[:1])
    alone.refresh()
    assert_near(layer.aggregate(features, targets), alone.aggregate(features, targets[:1]), 1e-11)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(scale=st.sampled_from([2.0**-6, 0.5, 2.0]))
def test_units_of_the_features(scale: float) -> None:
    """Features times s and gamma over s^2 leave predictions alone and divide gradients by s. (Units of the targets do
    not scale: the noise has unit variance. Nor do variances under 1e-8, the published floor.)"""
    m = problem(("regression",))
    data = m.data[0]
    plain, moved = (published_layer([published_regression(m.heads[0], gamma, 0.5)]) for gamma in (0.4, 0.4 / scale**2))
    for layer, factor in ((plain, 1.0), (moved, scale)):
        layer((data.features * factor).requires_grad_(), m.targets())
        layer.refresh()
    assert_near(
        moved.aggregate(data.features * scale, m.targets()) * scale, plain.aggregate(data.features, m.targets()), 1e-10
    )
