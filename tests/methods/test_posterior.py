"""Last-layer posteriors against independent formulas: derivatives by autograd, least squares, explicit sums."""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtlgrad.posterior import Posterior, binary_posterior, multiclass_posterior, regression_posterior
from mtlgrad.posterior.posteriors import posterior_from_state
from tests.support.bounds import assert_near
from tests.support.nets import GAMMA, KINDS, POSTERIORS, HeadData, head_data, posterior
from tests.support.oracles import dense_of, kron_precision, kron_terms, structured

pytestmark = pytest.mark.usefixtures("one_thread")

every_case = pytest.mark.parametrize(("kind", "structure"), POSTERIORS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def tensors(law: Posterior) -> list[Tensor]:
    """All that a posterior says, for comparisons to the bit."""
    found: list[Tensor] = [law.mean]
    for value in (law.precision, law.covariance(), law.contrasts):
        found += value if isinstance(value, tuple) else [value]
    return [*found, law.sample(3, torch.Generator().manual_seed(0))]


def same_bits(one: Posterior, other: Posterior) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def same(one: Posterior, other: Posterior, tolerance: float = 1e-10) -> None:
    """The same law, which the two may hold in different shapes."""
    assert_near(one.mean, other.mean, tolerance)
    assert_near(dense_of(one, one.precision), dense_of(other, other.precision), tolerance)


def prior_precision(data: HeadData) -> Tensor:
    return torch.eye(data.weight.numel(), dtype=torch.float64) / GAMMA


# ---- the formulas


@every_kind
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_full_posterior_is_the_quadratic_of_the_loss(kind: str, missing: float) -> None:
    data = head_data(kind, missing=missing)
    law = posterior(data)
    at = data.weight  # regression: the loss is quadratic, any point gives the same answer
    precision = data.hessian(at) + prior_precision(data)
    assert_near(dense_of(law, law.precision), precision, 1e-10)
    downhill = data.gradient(at).flatten() + at.flatten() / GAMMA
    assert_near(law.mean.flatten(), at.flatten() - torch.linalg.solve(precision, downhill), 1e-10)


@every_kind
def test_prior_adds_its_own_quadratic(kind: str) -> None:
    before, data = head_data(kind, seed=1), head_data(kind, examples=7)
    prior = posterior(before)
    law = posterior(data, prior=prior)
    at, tight = data.weight, dense_of(prior, prior.precision)
    precision = data.hessian(at) + tight
    assert_near(dense_of(law, law.precision), precision, 1e-10)
    downhill = data.gradient(at).flatten() + tight @ (at - prior.mean).flatten()
    assert_near(law.mean.flatten(), at.flatten() - torch.linalg.solve(precision, downhill), 1e-10)


@pytest.mark.parametrize("gamma", [1e-3, 1e3])
@pytest.mark.parametrize("examples", [3, 40])  # fewer and more than weights
def test_regression_is_ridge_regression(gamma: float, examples: int) -> None:
    data = head_data("regression", examples=examples, width=5)
    law = regression_posterior(data.features, data.targets, gamma=gamma)
    shrinkage = torch.eye(5, dtype=torch.float64) / gamma**0.5
    rows = torch.cat([data.features, shrinkage])
    goal = torch.cat([data.targets, torch.zeros(5, 3, dtype=torch.float64)])
    # A QR factorisation of the rows knows nothing of normal equations, whose condition number is up to 1e6 here.
    assert_near(law.mean, torch.linalg.lstsq(rows, goal).solution.T, 1e-9)
    r = torch.linalg.qr(rows).R
    assert_near(law.covariance(), torch.linalg.inv(r.T @ r), 1e-9)


@pytest.mark.parametrize(("kind", "structure"), [case for case in POSTERIORS if case[1] in ("block", "diag")])
def test_block_and_diagonal_keep_that_much_of_the_full_precision(kind: str, structure: str) -> None:
    data = head_data(kind, missing=0.2)
    law, full = posterior(data, structure), posterior(data)
    rows = len(data.weight)
    precision = structured(dense_of(full, full.precision), structure, rows)
    assert torch.equal(dense_of(law, law.precision) == 0, precision == 0)
    assert_near(dense_of(law, law.precision), precision, 1e-10)
    downhill = data.gradient(data.weight).flatten() + data.weight.flatten() / GAMMA
    assert_near(law.mean.flatten(), data.weight.flatten() - torch.linalg.solve(precision, downhill), 1e-10)


def test_block_and_kron_are_full_for_binary_tasks() -> None:
    data = head_data("binary")
    assert same_bits(posterior(data, "block"), posterior(data))
    assert same_bits(posterior(data, "kron"), posterior(data))


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_kronecker_factors_and_their_damping(missing: float) -> None:
    data = head_data("multiclass", missing=missing)
    law = posterior(data, "kron")
    classes, features = kron_precision(*kron_terms(data, data.weight))
    assert_near(law.precision[0], classes, 1e-10)
    assert_near(law.precision[1], features, 1e-10)
    precision = torch.kron(classes, features)
    downhill = data.gradient(data.weight).flatten() + data.weight.flatten() / GAMMA
    assert_near(law.mean.flatten(), data.weight.flatten() - torch.linalg.solve(precision, downhill), 1e-10)


def test_kronecker_of_one_example_is_exact_but_for_the_damping() -> None:
    data = head_data("multiclass", examples=1)
    law = multiclass_posterior(data.features, data.targets, data.weight, gamma=1e9, structure="kron")
    # The damping's cross terms are about (1 / gamma)^(1/2) = 3e-5 of the whole.
    assert_near(torch.kron(*law.precision), data.hessian(data.weight), 1e-3)


def test_kronecker_without_any_curvature_is_the_prior() -> None:
    """Saturated logits have p (1 - p) = 0, and so has a single class: the damping must not divide by it."""
    data = head_data("multiclass", examples=5)
    data.targets[:] = 0
    data.weight[0, -1] += 2000.0
    saturated = posterior(data, "kron")
    single = multiclass_posterior(data.features, data.targets, data.weight[:1], gamma=GAMMA, structure="kron")
    for law in (saturated, single):
        # The sum of h~ h~' is still there, outweighed 1e8 times.
        precision = dense_of(law, law.precision)
        assert_near(precision, torch.eye(len(precision), dtype=torch.float64) / GAMMA, 1e-6)
        # Nothing was learnt: what is left of the weights, up to 2,000, is the damping's share.
        assert law.mean.abs().max() < 1e-3


# ---- batch after batch


@every_case
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_batches_add_up_to_one(kind: str, structure: str, missing: float) -> None:
    data = head_data(kind, missing=missing)
    bounds = [0, 1, 2, 9, 30]
    law = posterior(data.rows(slice(0, 1)), structure)
    assert law.mean.isfinite().all()  # read in between: the next batch must not meet it cached
    law.covariance()
    for first, last in pairwise(bounds[1:]):
        batch = data.rows(slice(first, last))
        assert law.update(batch.features, batch.targets) is law
    same(law, posterior(data, structure))


LABELS = {"all": [], "rows": [(1, 0), (1, 1), (1, 2), (4, 0), (4, 1), (4, 2)], "some": [(0, 0), (1, 2), (3, 2)]}


@pytest.mark.parametrize("orders", [(a, b, a) for a in LABELS for b in LABELS])
@pytest.mark.parametrize("chained", [False, True])
def test_regression_outputs_part_ways_only_where_labels_do(orders: tuple[str, ...], chained: bool) -> None:
    """Labels missing for no example, for whole examples, and for single outputs, in any order: every output's posterior
    is that of its own labelled examples."""
    data = head_data("regression", examples=18)
    batches = [data.rows(slice(6 * i, 6 * i + 6)) for i in range(3)]
    for batch, order in zip(batches, orders):
        for at in LABELS[order]:
            batch.targets[at] = torch.nan
    law = posterior(batches[0])
    for batch in batches[1:]:
        if chained:
            law = posterior(batch, prior=law)
        else:
            law.update(batch.features, batch.targets)
    shared = law.precision.dim() == 2
    assert shared == ("some" not in orders)
    for output in range(3):
        there = data.labelled[:, output]
        alone = regression_posterior(data.features[there], data.targets[there, output], gamma=GAMMA)
        assert_near(law.mean[output], alone.mean[0], 1e-10)
        assert_near(law.precision if shared else law.precision[output], alone.precision, 1e-10)
        assert_near(law.covariance() if shared else law.covariance()[output], alone.covariance(), 1e-10)


@every_case
def test_a_batch_without_labels_changes_nothing(kind: str, structure: str) -> None:
    data = head_data(kind)
    law = posterior(data, structure)
    unlabelled = torch.full_like(data.targets, -100 if kind == "multiclass" else torch.nan)
    same(posterior(data, structure).update(data.features, unlabelled), law, 1e-14)
    same(posterior(HeadData(kind, data.features, unlabelled, data.weight), structure, prior=law), law)
    nothing = posterior(HeadData(kind, data.features, unlabelled, data.weight), structure)
    assert_near(dense_of(nothing, nothing.precision), prior_precision(data), 1e-14)
    assert nothing.mean.abs().max() < 1e-12


@every_case
def test_posterior_as_prior_equals_the_joint_data(kind: str, structure: str) -> None:
    data = head_data(kind, missing=0.2)
    first, second = data.rows(slice(0, 20)), data.rows(slice(20, 30))
    chained = posterior(second, structure, prior=posterior(first, structure))
    same(chained, posterior(data, structure))


@pytest.mark.parametrize(("kind", "structure"), [case for case in POSTERIORS if case[0] != "regression"])
def test_batches_expanded_at_different_weights_add_their_quadratics(kind: str, structure: str) -> None:
    data = head_data(kind, missing=0.2)
    batches = [data.rows(slice(0, 10)), data.rows(slice(10, 30))]
    weights = [data.weight, data.weight + 0.5 * head_data(kind, seed=5).weight]
    law = posterior(batches[0], structure)
    law.update(batches[1].features, batches[1].targets, weights[1])
    rows = len(data.weight)
    if structure == "kron":  # not a sum: the factors are summed, and the mean depends on the first weights
        terms = [kron_terms(batch, at) for batch, at in zip(batches, weights)]
        precision = torch.kron(*kron_precision(*(sum(part) for part in zip(*terms))))
        curvatures = [b.hessian(at) for b, at in zip(batches, weights)]
    else:
        curvatures = [structured(b.hessian(at), structure, rows) for b, at in zip(batches, weights)]
        precision = sum(curvatures) + prior_precision(data)
    assert_near(dense_of(law, law.precision), precision, 1e-10)
    residual = prior_precision(data) @ weights[0].flatten()
    for batch, at, curvature in zip(batches, weights, curvatures):
        residual = residual + batch.gradient(at).flatten() + curvature @ (weights[0] - at).flatten()
    assert_near(law.mean.flatten(), weights[0].flatten() - torch.linalg.solve(precision, residual), 1e-10)
    if structure != "kron":  # a sum of quadratics has no first one
        swapped = posterior(HeadData(kind, batches[1].features, batches[1].targets, weights[1]), structure)
        same(swapped.update(batches[0].features, batches[0].targets, weights[0]), law)


# ---- covariance, samples, contrasts


@every_case
def test_covariance_is_the_inverse_of_the_precision(kind: str, structure: str) -> None:
    law = posterior(head_data(kind, missing=0.3), structure)
    precision, covariance = dense_of(law, law.precision), dense_of(law, law.covariance())
    assert_near(precision @ covariance, torch.eye(len(precision), dtype=torch.float64), 1e-10)
    shapes = [[m.shape for m in (x if isinstance(x, tuple) else (x,))] for x in (law.precision, law.covariance())]
    assert shapes[0] == shapes[1]


@every_case
def test_contrasts_keep_the_law_of_differences_between_classes(kind: str, structure: str) -> None:
    law = posterior(head_data(kind), structure)
    covariance, contrasts = dense_of(law, law.covariance()), dense_of(law, law.contrasts)
    if kind != "multiclass" or structure in ("block", "diag"):
        assert torch.equal(covariance, contrasts)
        return
    rows, width = law.mean.shape
    centring = torch.eye(rows, dtype=torch.float64) - 1 / rows
    onto = torch.kron(centring, torch.eye(width, dtype=torch.float64))
    assert_near(onto @ contrasts @ onto, onto @ covariance @ onto, 1e-10)
    # What all classes share has variance gamma (full) in the posterior, and no more than the prior's in the contrasts.
    together = torch.kron(torch.ones(rows, 1, dtype=torch.float64), torch.eye(width, dtype=torch.float64)) / rows**0.5
    assert (together.T @ contrasts @ together).trace() < 0.5 * (together.T @ covariance @ together).trace()


@every_case
def test_samples_have_the_posterior_s_moments(kind: str, structure: str) -> None:
    data, count = head_data(kind, width=2), 20_000
    data.features[:, 1] += 2.0 * data.features[:, 0]  # the directions of the spread are not those of the weights
    law = posterior(data, structure)
    samples = law.sample(count, torch.Generator().manual_seed(0))
    assert samples.shape == (count, *law.mean.shape)
    deviations = (samples - law.mean).flatten(1)
    covariance = dense_of(law, law.covariance())
    variance = covariance.diagonal()
    # Six standard errors: none of the 90 entries is out by chance.
    assert (deviations.mean(0).abs() <= 6 * (variance / count).sqrt()).all()
    spread = ((torch.outer(variance, variance) + covariance**2) / count).sqrt()
    assert ((deviations.T @ deviations / count - covariance).abs() <= 6 * spread).all()


@every_case
def test_samples_are_the_generator_s(kind: str, structure: str) -> None:
    law = posterior(head_data(kind), structure)
    state = torch.get_rng_state()
    one, again, other = (law.sample(4, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    torch.manual_seed(3)
    by_default = law.sample(4)
    torch.manual_seed(3)
    assert torch.equal(by_default, law.sample(4))


# ---- dtypes


@every_case
def test_float32_agrees_with_float64(kind: str, structure: str) -> None:
    data = head_data(kind, missing=0.2)
    narrow, wide = posterior(data.to(torch.float32), structure), posterior(data, structure)
    assert {t.dtype for t in tensors(narrow)} == {torch.float32}
    # 30 terms a sum, condition numbers of a few hundred: 1e-7 becomes 1e-5.
    assert_near(narrow.mean.double(), wide.mean, 1e-4)
    assert_near(dense_of(narrow, narrow.precision).double(), dense_of(wide, wide.precision), 1e-6)
    assert_near(dense_of(narrow, narrow.covariance()).double(), dense_of(wide, wide.covariance()), 1e-4)


@every_case
def test_half_precision_features_are_computed_in_float32(kind: str, structure: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        half = head_data(kind, missing=0.2).to(dtype)
        expected = posterior(half.to(torch.float32), structure)
        assert same_bits(posterior(half, structure), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert same_bits(posterior(half, structure), expected)


@every_case
def test_a_copy_in_float32_keeps_the_accuracy_of_float64(kind: str, structure: str) -> None:
    law = posterior(head_data(kind), structure)
    copy = law.to(torch.zeros((), dtype=torch.float32))
    assert torch.equal(copy.mean, law.mean.float())
    for mine, original in ((copy.covariance(), law.covariance()), (copy.contrasts, law.contrasts)):
        pairs = zip(mine, original) if isinstance(mine, tuple) else [(mine, original)]
        assert all(torch.equal(narrow, wide.float()) for narrow, wide in pairs)
    assert copy.exact is law


# ---- what is whose


@every_case
def test_state_round_trip(kind: str, structure: str) -> None:
    data = head_data(kind, missing=0.2)
    law = posterior(data.rows(slice(0, 20)), structure)
    file = io.BytesIO()
    torch.save(law.state(), file)
    file.seek(0)
    loaded = posterior_from_state(torch.load(file, weights_only=True))
    assert same_bits(loaded, law)
    assert (loaded.likelihood, loaded.structure, loaded.gamma) == (law.likelihood, law.structure, law.gamma)
    rest = data.rows(slice(20, 30))
    assert same_bits(loaded.update(rest.features, rest.targets), law.update(rest.features, rest.targets))


@every_case
def test_later_batches_change_no_state_and_no_copy(kind: str, structure: str) -> None:
    data = head_data(kind, missing=0.2)
    law = posterior(data, structure)
    state = law.state()
    copy, child, first = law.to(law.mean), posterior(data, structure, prior=law), posterior_from_state(state)
    child_mean = posterior_from_state(child.state()).mean
    law.update(data.features, data.targets)
    child.update(data.features, data.targets)
    second = posterior_from_state(state)
    assert same_bits(first, second)
    assert same_bits(copy, first)
    copy.update(data.features, data.targets)
    first.update(data.features, data.targets)
    assert same_bits(second, posterior_from_state(state))
    assert not torch.equal(child.mean, child_mean)


@pytest.mark.parametrize(("kind", "structure"), [case for case in POSTERIORS if case[0] != "regression"])
def test_weights_that_go_on_training_move_no_posterior(kind: str, structure: str) -> None:
    data = head_data(kind)
    parameter = torch.nn.Parameter(data.weight.clone())
    law = posterior(HeadData(kind, data.features, data.targets, parameter), structure)
    with torch.no_grad():
        parameter.add_(1.0)
    assert same_bits(law, posterior(data, structure))
    assert not any(t.requires_grad for t in tensors(law))


# ---- properties


@every_case
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_order_of_examples_and_outputs(kind: str, structure: str, data: Any) -> None:
    batch = head_data(kind, examples=12, missing=0.2)
    examples = torch.tensor(data.draw(st.permutations(range(12))))
    outputs = torch.tensor(data.draw(st.permutations(range(3))))
    law = posterior(batch, structure)
    same(posterior(batch.rows(examples), structure), law)
    if kind == "multiclass":  # class k of the old is class of[k] of the new
        of = torch.argsort(outputs)
        targets = torch.where(batch.targets < 0, batch.targets, of[batch.targets.clamp(min=0)])
    else:
        targets = batch.targets[:, outputs]
    moved = posterior(HeadData(kind, batch.features, targets, batch.weight[outputs]), structure)
    assert_near(moved.mean, law.mean[outputs], 1e-10)
    width = law.mean.shape[1]
    index = (outputs[:, None] * width + torch.arange(width)).flatten()
    assert_near(dense_of(moved, moved.covariance()), dense_of(law, law.covariance())[index][:, index], 1e-10)


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(scale=st.floats(0.1, 10.0))
def test_units_of_the_features(kind: str, scale: float) -> None:
    """Features in other units, weights and their prior likewise: the logits' law stays (biases held, so no prior on
    them: gamma is large)."""
    data = head_data(kind)
    unit = torch.ones(data.weight.shape[1], dtype=torch.float64)
    unit[:-1] = 1 / scale
    make_one = binary_posterior if kind == "binary" else multiclass_posterior
    law = make_one(data.features, data.targets, data.weight, gamma=1e8)
    scaled = make_one(scale * data.features, data.targets, data.weight * unit, gamma=1e8 / scale**2)
    # The biases' prior differs between the two: 1e-8 of a curvature of about one, and more where all classes move.
    centred, moved = (m - m.mean(0) if kind == "multiclass" else m for m in (law.mean, scaled.mean))
    assert_near(moved, centred * unit, 1e-4)


@every_kind
def test_repeating_the_data_doubles_what_they_say(kind: str) -> None:
    data = head_data(kind)
    twice = HeadData(
        kind, data.features.repeat(2, 1), data.targets.repeat(*[2] + [1] * (data.targets.dim() - 1)), data.weight
    )
    once, double = posterior(data), posterior(twice)
    prior = prior_precision(data)
    information = dense_of(once, once.precision) - prior
    assert_near(dense_of(double, double.precision) - prior, 2 * information, 1e-10)
