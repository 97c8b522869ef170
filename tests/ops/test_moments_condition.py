"""The batch posterior by the matrix inversion lemma is the batch posterior; in float32 it keeps its digits."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtlgrad import BayesAgg, Binary, Multiclass, Regression
from mtlgrad.bayesagg import aggregation
from mtlgrad.bayesagg.aggregation import Conditioned, batch_posterior, condition, softmax_curvature_factor
from mtlgrad.bayesagg.heads import Outputs
from mtlgrad.ops.moments import add_curvature, condition_on_batch, invert_at
from mtlgrad.posterior import Posterior
from mtlgrad.posterior.cholesky import checked_cholesky
from tests.support.bounds import assert_near
from tests.support.nets import POSTERIORS, HeadData, head_data, posterior
from tests.support.oracles import dense_of

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, OUTPUTS = 6, 3
every_case = pytest.mark.parametrize(("kind", "structure"), POSTERIORS)


def outputs_of(data: HeadData) -> Outputs:
    rows, width = len(data.weight), data.features.shape[1]
    layer = nn.Linear(width, rows)
    kinds = {"regression": partial(Regression, bias=False), "binary": Binary, "multiclass": Multiclass}
    weight = torch.cat([data.weight, data.weight.new_zeros(rows, width + 1 - data.weight.shape[1])], 1)
    return Outputs([kinds[data.kind](layer)], data.features, [data.targets], weight.double())


def conditioned(prior: Posterior, data: HeadData) -> list[Conditioned]:
    return list(condition(prior, outputs_of(data), 0, "a name"))


def of_batch(prior: Posterior, data: HeadData) -> Posterior:
    return batch_posterior(prior, outputs_of(data), 0)


def explicit(law: Posterior, matrix: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Of a covariance in any structure: Cov(w_c, z_k) for every example, [B, R, R, W], and the covariances of the
    weights at each dimension, [R, R, W]."""
    rows, width = law.mean.shape
    blocks = dense_of(law, matrix).reshape(rows, width, rows, width)
    return torch.einsum("cdkp,bp->bckd", blocks, hidden), blocks.diagonal(dim1=1, dim2=3)


def assembled(parts: list[Conditioned], rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, cross [B, R, R, W], spread [R, R, W]) from the shapes that the kernels want."""
    assert [part.first for part in parts] == [0] + [part.last for part in parts[:-1]]
    assert parts[-1].last == rows
    mean = torch.cat([part.at.mean for part in parts])
    structure = parts[0].at.structure
    eye = torch.eye(rows, dtype=mean.dtype)
    if structure == "full":
        cross = parts[0].at.cross_covariance.reshape(rows, -1, rows, mean.shape[1])  # [C(k), B, C(c), W]
        return mean, cross.permute(1, 2, 0, 3), parts[0].at.variances
    if structure == "kron":
        factor = parts[0].at.classes
        assert factor is not None
        return (
            mean,
            factor[None, :, :, None] * parts[0].at.cross_covariance[:, None, None],
            factor[..., None] * parts[0].at.variances,
        )
    # "rows" may hold one covariance for all of a part's rows
    cross = torch.cat([part.at.cross_covariance.expand(part.last - part.first, -1, -1) for part in parts])
    spread = torch.cat([part.at.variances.expand(part.last - part.first, -1) for part in parts])
    return mean, eye[None, :, :, None] * cross.permute(1, 0, 2)[:, :, None], eye[..., None] * spread[:, None]


@every_case
@pytest.mark.parametrize("batch", [1, WIDTH - 1, WIDTH + 1, 40])
@pytest.mark.parametrize("missing", [0.0, 0.4, 1.0])
def test_conditioning_is_the_batch_posterior(kind: str, structure: str, batch: int, missing: float) -> None:
    prior = posterior(head_data(kind, width=WIDTH, seed=1), structure)
    data = head_data(kind, batch, WIDTH, seed=2, missing=missing)
    law, parts = of_batch(prior, data), conditioned(prior, data)
    mean, cross, spread = assembled(parts, OUTPUTS)
    assert_near(mean, law.mean, 1e-10)
    expected_cross, expected_spread = explicit(law, law.covariance(), data.hidden)
    if kind == "multiclass":  # the kernels see differences between classes only
        expected_cross, expected_spread = (differences(x, -3) for x in (expected_cross, expected_spread))
        cross, spread = differences(cross, -3), differences(spread, -3)
    assert_near(cross, expected_cross, 1e-10)
    assert_near(spread, expected_spread, 1e-10)


def differences(covariances: Tensor, first: int) -> Tensor:
    """Of [..., C, C, W]: the covariances of the classes' deviations from their mean."""
    rows = covariances - covariances.mean(first, keepdim=True)
    return rows - rows.mean(first + 1, keepdim=True)


@pytest.mark.parametrize(("kind", "structure"), [case for case in POSTERIORS if case[1] in ("full", "block")])
def test_few_examples_factorise_no_matrix_of_weights(
    kind: str, structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior = posterior(head_data(kind, width=WIDTH, seed=1), structure)
    _ = prior.covariance(), prior.contrasts
    sizes = []

    def recorded(matrix: Tensor, name: str) -> Tensor:
        sizes.append(matrix.shape[-1])
        return checked_cholesky(matrix, name)

    def on_host(cross: Tensor, gram: Tensor, curvature: Tensor, variances: Tensor) -> bool:
        sizes.append(gram.shape[-1])
        return condition_on_batch(cross, gram, curvature, variances)

    monkeypatch.setattr(aggregation, "batch_posterior", None)
    monkeypatch.setattr(aggregation, "invert_at", None)
    monkeypatch.setattr(aggregation, "checked_cholesky", recorded)
    monkeypatch.setattr(aggregation, "condition_on_batch", on_host)
    conditioned(prior, head_data(kind, 3, WIDTH))
    assert set(sizes) == {3 * (OUTPUTS - 1 if kind == "multiclass" and structure == "full" else 1)}


@pytest.mark.parametrize("prior_labels", ["all", "some"])
@pytest.mark.parametrize("labels", ["all", "rows", "some"])
@pytest.mark.parametrize("batch", [4, 12])
def test_regression_labels_missing_in_prior_and_batch(prior_labels: str, labels: str, batch: int) -> None:
    """One covariance for all outputs or one each, on either side."""
    before, data = head_data("regression", width=WIDTH, seed=1), head_data("regression", batch, WIDTH)
    if prior_labels == "some":
        before.targets[0, 1] = torch.nan
    if labels != "all":
        data.targets[1, 2 if labels == "some" else slice(None)] = torch.nan
    prior = posterior(before)
    law = of_batch(prior, data)
    mean, cross, spread = assembled(conditioned(prior, data), OUTPUTS)
    assert_near(mean, law.mean, 1e-10)
    expected = explicit(law, law.covariance(), data.hidden)
    assert_near(cross, expected[0], 1e-10)
    assert_near(spread, expected[1], 1e-10)


def test_rows_in_one_piece_are_the_rows_one_by_one() -> None:
    """Devices take many outputs at a time, the host one: with and without curvature."""
    for kind in ("binary", "regression"):
        data = head_data(kind, 4, WIDTH)
        before = head_data(kind, width=WIDTH, seed=1, missing=0.2)
        prior = posterior(before)
        blocks = prior.covariance()
        curvature = None if kind == "regression" else torch.rand(OUTPUTS, 4, dtype=torch.float64)
        together = aggregation._condition_rows(prior, blocks, data.hidden, curvature, "x")
        assert together is not None
        for o in range(OUTPUTS):
            one = aggregation._condition_rows(
                prior, blocks[o : o + 1], data.hidden, None if curvature is None else curvature[o : o + 1], "x"
            )
            assert one is not None
            for a, b in zip(together, one):
                assert_near(a[o : o + 1], b, 1e-13)


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_factor_of_the_softmax_curvature(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 40 * torch.randn(200, classes, generator=generator, dtype=torch.float64)  # down to 1e-80
    p = torch.softmax(logits, 1)
    p[0] = 0.0  # an example without a label
    f = softmax_curvature_factor(p)
    assert f.shape == (200, classes, classes - 1)
    assert f.isfinite().all()
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    assert (f @ f.mT - curvature).abs().max() < 1e-15
    # Small entries to their own last digits too, where the subtraction p - p^2 has none left.
    assert ((f**2).sum(-1) - p * (p.sum(1, keepdim=True) - p)).abs().le(1e-13 * p).all()


def test_errors_name_the_task_on_every_path() -> None:
    for kind, structure in POSTERIORS:
        for batch in (2, 40):
            data = head_data(kind, batch, WIDTH)
            prior = posterior(head_data(kind, width=WIDTH, seed=1), structure)
            data.features[:] = torch.nan
            if structure == "diag":
                continue  # nothing to factorise: NaN goes on, and the layer refuses it
            with pytest.raises(ValueError, match=r"a name.*: expected a finite precision matrix, found NaN"):
                conditioned(prior, data)


# ---- float32


def errors(prior: Posterior, data: HeadData, narrow_prior: Posterior) -> list[float]:
    """Of a float32 batch against float64 for the same rounded batch: of the mean in standard deviations, of the
    variances, and of Cov(w, z) against the standard deviations of w and z, which bound it."""
    narrow = data.to(torch.float32)
    wide = narrow.to(torch.float64)
    found = (x.double() for x in assembled(conditioned(narrow_prior, narrow), OUTPUTS))
    expected = assembled(conditioned(prior, wide), OUTPUTS)
    (mean, cross, spread), (mean0, cross0, spread0) = found, expected
    variance = spread0.diagonal().T  # [R, W]
    logit = torch.einsum("bccd,bd->bc", cross0, wide.hidden)
    bound = (logit[:, None, :, None] * variance[:, None]).sqrt()
    relative = [(mean - mean0) / variance.sqrt(), spread.diagonal().T / variance - 1, (cross - cross0) / bound]
    return [float(x.abs().max()) for x in relative]


def hard_case(kind: str, scale: float, repeated: bool, unseen: bool, batch: int) -> tuple[HeadData, HeadData]:
    """What the prior saw, and a batch; weights such that the logits are of order one."""
    width = 24
    before, data = head_data(kind, 60, width, seed=1), head_data(kind, batch, width, seed=2)
    for part in (before, data):
        part.features *= scale
        part.weight[:, :width] /= scale * width**0.5
    if unseen:  # units that were dead in the last epoch
        before.features[:, : width // 2] = 0.0
    if repeated:
        data.features[1:] = data.features[0]
    return before, data


@every_case
@pytest.mark.parametrize("gamma", [0.005, 1e3])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e2])
@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("unseen", [False, True])
def test_float32_keeps_its_digits(
    kind: str, structure: str, gamma: float, scale: float, repeated: bool, unseen: bool
) -> None:
    """Strong and weak priors, features that are tiny and large, one example many times over, features that the prior
    never saw: where float32 would lose more than about 1e-7 LARGEST_TRACE, float64 takes over."""
    for batch in (8, 30):
        before, data = hard_case(kind, scale, repeated, unseen, batch)
        prior = posterior(before, structure, gamma=gamma)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no jitter either
            found = errors(prior, data, prior.to(data.features.float()))
        assert max(found) < 1e-7 * aggregation.LARGEST_TRACE, found


@pytest.mark.parametrize(("kind", "structure"), [case for case in POSTERIORS if case[1] != "diag"])
def test_without_float64_those_digits_would_be_lost(kind: str, structure: str) -> None:
    """That the cases above are hard."""
    before, data = hard_case(kind, 1e2, kind != "regression", True, 20)  # the batch settles all that was unseen
    prior = posterior(before, structure, gamma=1e3)
    narrow = prior.to(data.features.float())
    narrow.exact = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = errors(prior, data, narrow)
    assert not max(found) < 1e-7 * aggregation.LARGEST_TRACE, found


@pytest.mark.parametrize(("kind", "structure"), [case for case in POSTERIORS if case[1] in ("full", "block")])
def test_an_ordinary_batch_stays_in_float32(kind: str, structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float64 costs time: it must be the exception."""
    answers = []
    original = aggregation._wants_float64

    def recorded(*arguments: Any) -> bool:
        answers.append(original(*arguments))
        return answers[-1]

    monkeypatch.setattr(aggregation, "_wants_float64", recorded)
    before, data = head_data(kind, 300, 48, seed=1), head_data(kind, 32, 48, seed=2)
    prior = posterior(before, structure, gamma=0.005)
    conditioned(prior.to(data.features.float()), data.to(torch.float32))
    assert answers
    assert not any(answers)


# ---- the host's kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "batch", "width"), [(1, 1, 1), (3, 130, 5), (2, 257, 33), (7, 64, 65), (2, 9, 256)])
def test_precision_summed_and_inverted(rows: int, batch: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    hidden = torch.randn(batch, width, generator=generator, dtype=torch.float64).to(dtype)
    wide = hidden.double()
    curvature = torch.rand(rows, batch, generator=generator, dtype=torch.float64)
    before = torch.rand(rows, 1, 1, generator=generator, dtype=torch.float64) * torch.eye(width)
    sums = before.clone()
    add_curvature(sums, wide, curvature)
    expected = torch.einsum("rb,bv,bw->rvw", curvature, wide, wide)
    assert_near(sums, before + expected, 1e-13)
    shared = before.new_zeros(1, width, width)
    add_curvature(shared, wide, None)
    assert_near(shared[0], wide.T @ wide, 1e-13)
    prior = 0.1 * torch.eye(width, dtype=torch.float64)[None]
    found = invert_at(prior, sums, hidden)
    assert found is not None
    covariance = torch.linalg.inv(prior + sums)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-10
    assert_near(found[0], (wide @ covariance).to(dtype), tolerance)
    assert_near(found[1], covariance.diagonal(dim1=1, dim2=2).to(dtype), tolerance)


@pytest.mark.parametrize("value", [-1.0, torch.nan])
def test_a_precision_that_is_none_is_not_inverted(value: float) -> None:
    sums = torch.eye(6, dtype=torch.float64).repeat(3, 1, 1)
    sums[1, 4, 4] = value
    assert invert_at(torch.zeros(1, 6, 6, dtype=torch.float64), sums, torch.randn(8, 6)) is None


@pytest.mark.parametrize("batch", [12, 80])
@pytest.mark.parametrize("missing", ["none", "alike", "apart"])
def test_regressions_with_the_same_rows_share_one_covariance(
    batch: int, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two heads are as one of two outputs, and cost one factorisation; with other rows they are on their own."""
    torch.manual_seed(0)
    width, first, second = 24, nn.Linear(24, 1), nn.Linear(24, 1)
    both = nn.Linear(24, 2)
    with torch.no_grad():
        both.weight.copy_(torch.cat([first.weight, second.weight]))
        both.bias.copy_(torch.cat([first.bias, second.bias]))
    x, y = torch.randn(300, width).requires_grad_(), torch.randn(300, 2)
    if missing != "none":
        y[::3] = torch.nan
    if missing == "apart":
        y[1, 1] = torch.nan
    apart = BayesAgg([Regression(first), Regression(second)])
    together = BayesAgg([Regression(both)])
    for layer, targets in ((apart, [y[:, :1], y[:, 1:]]), (together, [y])):
        layer(x, targets)
        layer.refresh()
    apart.aggregate(x[:batch], [y[:batch, :1], y[:batch, 1:]])  # working copies are made once
    calls = []
    for name in ("invert_at", "_condition_rows"):
        original = getattr(aggregation, name)

        def counted(*arguments: Any, original: Any = original) -> Any:
            calls.append(len(arguments[0]) if isinstance(arguments[0], Tensor) else 1)
            return original(*arguments)

        monkeypatch.setattr(aggregation, name, counted)
    found = apart.aggregate(x[:batch], [y[:batch, :1], y[:batch, 1:]])
    assert len(calls) == (2 if missing == "apart" else 1)
    assert_near(found, together.aggregate(x[:batch], [y[:batch]]), 1e-6)


@pytest.mark.parametrize("batch", [12, 80])
def test_regressions_that_differ_share_nothing(batch: int) -> None:
    """With a bias and without; and of one full-data posterior, but other labels in the batch."""
    torch.manual_seed(0)
    x, y = torch.randn(300, 24).requires_grad_(), torch.randn(300, 2)
    lines = [nn.Linear(24, 1), nn.Linear(24, 1)]
    some = y[:batch].clone()
    some[::2, 1] = torch.nan
    for biases, labels in (((False, True), y[:batch]), ((True, True), some)):
        heads = [Regression(line, bias=bias) for line, bias in zip(lines, biases)]
        together = BayesAgg(heads, reduction="mean")
        together(x, [y[:, :1], y[:, 1:]])
        together.refresh()
        parts = list(labels.split(1, 1))
        found = together.aggregate(x[:batch], parts)
        assert together._working[0].covariance() is together._working[1].covariance() or biases[0] != biases[1]
        numerator, denominator = torch.zeros(batch, 24), torch.zeros(batch, 24)
        for t, head in enumerate(heads):
            alone = BayesAgg([head])
            alone(x, [y[:, t : t + 1]])
            alone.refresh()
            outputs = Outputs([head], x[:batch].detach(), [parts[t]], head.weight(torch.zeros(0, dtype=torch.float64)))
            row = alone._batch(x[:batch].detach(), [parts[t]], outputs)
            [(_, moments)] = aggregation._moments(row, 0)
            weight = torch.where(moments.second[:, 0] < torch.inf, moments.second[:, 0].clamp(min=1e-8) ** -0.05, 0.0)
            numerator += weight * moments.first[:, 0]
            denominator += weight
        assert_near(found, numerator / denominator / batch * together._balance, 1e-5)


@pytest.mark.parametrize("batch", [12, 80])
def test_many_outputs_of_one_head_are_as_many_heads(batch: int) -> None:
    """The host takes some at a time, each with its own power and loss weight."""
    torch.manual_seed(0)
    outputs, powers = 11, [0.05 * (o + 1) for o in range(11)]
    line = nn.Linear(24, outputs)
    x, y = torch.randn(300, 24).requires_grad_(), (torch.rand(300, outputs) > 0.5).float()
    lines = [nn.Linear(24, 1) for _ in range(outputs)]
    with torch.no_grad():
        for o, one in enumerate(lines):
            one.weight.copy_(line.weight[o : o + 1])
            one.bias.copy_(line.bias[o : o + 1])
    found = []
    for heads, targets in (
        ([Binary(line, power=powers)], [y]),
        ([Binary(one, power=p) for one, p in zip(lines, powers)], list(y.split(1, 1))),
    ):
        layer = BayesAgg(heads)
        layer(x, targets)
        layer.refresh()
        h = x[:batch].detach().requires_grad_()
        some = [target[:batch] for target in targets]
        z = layer(h, some)
        logits = torch.cat([part(z) for head in heads for part in head.layers], 1)
        losses = nn.functional.binary_cross_entropy_with_logits(logits, y[:batch], reduction="none").mean(0)
        (losses * torch.arange(1.0, outputs + 1.0)).sum().backward()
        found.append(h.grad)
    assert_near(*found, 1e-5)  # type: ignore[arg-type, misc]
