"""Posteriors, moments and aggregates equal the published estimator's in float64.

The published computation is transcribed in bench/peers/bayesagg_published.py, with the tensors that its authors form;
here it is the judge of formulas that form none of them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import mtlgrad
from bench.peers import bayesagg_published as published
from mtlgrad import posterior, reference

EXAMPLES, BATCH, WIDTH, SAMPLES = 200, 16, 7, 128
GAMMA, POWER = 0.3, 0.4
OUTPUTS = {"regression": 3, "binary": 4, "multiclass": 5}
KINDS = tuple(OUTPUTS)


def close(value: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """Within `tolerance` of the largest expected entry, and the same shape."""
    assert value.shape == expected.shape
    assert value.dtype == expected.dtype == torch.float64
    assert (value - expected).abs().max() <= tolerance * expected.abs().max()


class Problem:
    """Features, targets and a head of one kind, in float64: all examples, and the first few as a batch."""

    def __init__(self, kind: str, scale: float = 1.0, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        self.kind, outputs = kind, OUTPUTS[kind]
        self.all_features = scale * normal(EXAMPLES, WIDTH)
        self.weight = 0.5 * normal(outputs, WIDTH + 1)
        if kind == "regression":
            self.all_targets = normal(EXAMPLES, outputs)
        elif kind == "binary":
            self.all_targets = (normal(EXAMPLES, outputs) > 0).double()
        else:
            self.all_targets = torch.randint(outputs, (EXAMPLES,), generator=generator)
        self.features, self.targets = self.all_features[:BATCH], self.all_targets[:BATCH]
        self.group = published.Group(kind, outputs, None if kind == "regression" else self.weight, GAMMA, POWER)
        self.full_theirs = published.full_data_posterior(self.group, self.all_features, self.all_targets)
        self.batch_theirs = published.batch_posterior(self.group, self.features, self.targets, self.full_theirs)

    def ours(self, features: Tensor, targets: Tensor, **prior):
        if self.kind == "regression":
            return posterior.regression_posterior(features, targets, **prior)
        make = posterior.binary_posterior if self.kind == "binary" else posterior.multiclass_posterior
        return make(features, targets, self.weight, **prior)

    def head(self) -> torch.nn.Linear:
        head = torch.nn.Linear(WIDTH, OUTPUTS[self.kind], dtype=torch.float64)
        with torch.no_grad():
            head.weight.copy_(self.weight[:, :-1])
            head.bias.copy_(self.weight[:, -1])
        return head


def blocks(matrix: Tensor, count: int) -> Tensor:
    """The diagonal blocks of the published joint matrix over all outputs: [count, P, P]."""
    size = matrix.shape[0] // count
    return torch.stack([matrix[i : i + size, i : i + size] for i in range(0, count * size, size)])


@pytest.fixture(params=KINDS)
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param)


def same_posterior(mine, theirs, kind: str) -> None:
    outputs = OUTPUTS[kind]
    if kind == "regression":
        close(mine.mean, theirs.mean)
        close(mine.precision, theirs.precision_matrix[0])
        close(mine.covariance(), theirs.covariance_matrix[0])
    elif kind == "binary":
        close(mine.mean, theirs.mean.view(outputs, -1))
        close(mine.precision, blocks(theirs.precision_matrix, outputs))
        close(mine.covariance(), blocks(theirs.covariance_matrix, outputs))
        # A joint Gaussian over all tasks' weights says no more than one a task.
        close(torch.block_diag(*mine.covariance()), theirs.covariance_matrix)
    else:
        close(mine.mean, theirs.mean.view(outputs, -1))
        close(mine.precision, theirs.precision_matrix)
        close(mine.covariance(), theirs.covariance_matrix)


def test_full_data_posterior(problem: Problem) -> None:
    mine = problem.ours(problem.all_features, problem.all_targets, gamma=GAMMA)
    same_posterior(mine, problem.full_theirs, problem.kind)


def test_batch_posterior_with_the_full_data_posterior_as_prior(problem: Problem) -> None:
    prior = problem.ours(problem.all_features, problem.all_targets, gamma=GAMMA)
    mine = problem.ours(problem.features, problem.targets, prior=prior)
    same_posterior(mine, problem.batch_theirs, problem.kind)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_regression_moments(scale: float) -> None:
    problem = Problem("regression", scale)
    law = problem.batch_theirs
    expected = published.regression_moments(problem.features, problem.targets, law)
    found = reference.regression_moments(problem.features, problem.targets, law.mean, law.covariance_matrix[0])
    close(found[0], expected[0])
    close(found[1], expected[1])


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_sampled_moments(kind: str) -> None:
    problem = Problem(kind)
    torch.manual_seed(0)
    samples = published.draw_weights(problem.batch_theirs, OUTPUTS[kind], SAMPLES, kind=kind)
    expected = published.sampled_moments(problem.features, problem.targets, samples, kind=kind)
    found = reference.sampled_moments(problem.features, problem.targets, samples, kind=kind)
    close(found[0], expected[0])
    close(found[1], expected[1])


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_exact_moments_are_the_limit_of_the_published_samples(kind: str) -> None:
    problem = Problem(kind)
    torch.manual_seed(0)
    law, outputs = problem.batch_theirs, OUTPUTS[kind]
    samples = published.draw_weights(law, outputs, 20_000, kind=kind)
    expected = published.sampled_moments(problem.features, problem.targets, samples, kind=kind)
    mean = law.mean.view(outputs, -1)
    if kind == "binary":
        covariance = blocks(law.covariance_matrix, outputs)
        found = reference.binary_moments(problem.features, problem.targets, mean, covariance)
    else:
        found = reference.multiclass_moments(problem.features, problem.targets, mean, law.covariance_matrix)
    # Six standard errors of the mean, and the 3 % that 20,000 samples leave on a variance.
    assert ((found[0] - expected[0]).abs() <= 6 * (expected[1] / 20_000).sqrt() + 1e-9).all()
    assert (found[1] / expected[1] - 1).abs().mean() < 0.03


def test_precision_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(6, 5, WIDTH, generator=generator, dtype=torch.float64)
    variances = torch.rand(6, 5, WIDTH, generator=generator, dtype=torch.float64)
    variances[0, 0] = 1e-12  # below the floor
    expected = published.aggregate(means.split([1, 4], 1), variances.split([1, 4], 1), [1.0, 0.3])
    close(reference.precision_mean(means, variances, [1.0, 0.3, 0.3, 0.3, 0.3]), expected)
    expected = published.aggregate([means], [variances], [0.5])
    close(reference.precision_mean(means, variances, 0.5), expected)


def make_layer(problems: list[Problem], moments: str) -> mtlgrad.BayesAgg:
    """Ours, with the posterior of all examples as prior."""
    regression = partial(mtlgrad.Regression, noise=1.0, bias=False)
    classes: dict[str, Any] = {"regression": regression, "binary": mtlgrad.Binary, "multiclass": mtlgrad.Multiclass}
    heads = [classes[problem.kind](problem.head(), gamma=GAMMA, power=POWER) for problem in problems]
    published = {"covariance": "full", "reduction": "mean", "statistics": "stored"}
    layer = mtlgrad.BayesAgg(heads, moments=moments, num_samples=SAMPLES, **published)
    layer(problems[0].all_features.clone().requires_grad_(), [problem.all_targets for problem in problems])
    layer.refresh()
    return layer


@pytest.mark.parametrize("kinds", [("regression",), ("binary",), ("multiclass",), KINDS[::-1]])
@pytest.mark.parametrize("batch", [1, BATCH, EXAMPLES])  # fewer and more examples than weights
def test_aggregate(kinds: tuple[str, ...], batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [Problem(kind) for kind in kinds]
    features = problems[0].all_features[:batch]
    assert all(torch.equal(problem.all_features[:batch], features) for problem in problems)
    targets = [problem.all_targets[:batch] for problem in problems]
    groups, priors = [problem.group for problem in problems], [problem.full_theirs for problem in problems]
    torch.manual_seed(0)
    expected = published.published_step(groups, features, targets, priors, num_samples=SAMPLES)

    torch.manual_seed(0)  # the same weight samples again, for our layer in place of its own
    samples = {}
    for group, target, prior in zip(groups, targets, priors, strict=True):
        if group.kind != "regression":
            law = published.batch_posterior(group, features, target, prior)
            samples[group.kind] = published.draw_weights(law, group.outputs, SAMPLES, kind=group.kind)
    layer = make_layer(problems, "sampled")
    monkeypatch.setattr(posterior.Posterior, "sample", lambda self, n, generator=None: samples[self.likelihood.name])
    close(layer.aggregate(features, targets), expected)


def test_aggregate_of_regressions_needs_no_samples() -> None:
    problem = Problem("regression")
    expected = published.published_step([problem.group], problem.features, [problem.targets], [problem.full_theirs])
    close(make_layer([problem], "exact").aggregate(problem.features, [problem.targets]), expected)


def test_gradient_that_reaches_the_backbone() -> None:
    problem = Problem("regression")
    expected = published.published_step([problem.group], problem.features, [problem.targets], [problem.full_theirs])
    layer, head = make_layer([problem], "exact"), problem.head()
    features = problem.features.clone().requires_grad_()
    loss = (head(layer(features, [problem.targets])) - problem.targets).square().mean()
    layer.total([loss]).backward()
    close(features.grad, expected)


def test_a_training_ends_at_the_parameters_of_the_published_one() -> None:
    """60 steps of SGD, with a refresh every 15, of three regressions and a backbone."""
    outputs, batch = 3, 12
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(180, 5, generator=generator, dtype=torch.float64)
    targets = torch.tanh(inputs) @ torch.randn(5, outputs, generator=generator, dtype=torch.float64)

    def network() -> tuple[torch.nn.Module, torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        backbone = torch.nn.Sequential(torch.nn.Linear(5, WIDTH), torch.nn.Tanh()).double()
        head = torch.nn.Linear(WIDTH, outputs).double()
        return backbone, head, torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.05)

    def batches(epoch: int) -> tuple[Tensor, ...]:
        return torch.randperm(180, generator=torch.Generator().manual_seed(epoch)).split(batch)

    backbone, head, optimizer = network()
    layer = mtlgrad.BayesAgg(
        [mtlgrad.Regression(head, gamma=GAMMA, power=POWER, noise=1.0, bias=False)],
        statistics="stored",
        reduction="mean",
    )
    for epoch in range(4):
        for rows in batches(epoch):
            optimizer.zero_grad()
            z = layer(backbone(inputs[rows]), [targets[rows]])
            layer.total([(head(z) - targets[rows]).square().mean()]).backward()
            optimizer.step()
        layer.refresh()
    ours = [p.detach().clone() for p in [*backbone.parameters(), *head.parameters()]]

    backbone, head, optimizer = network()
    group, prior = published.Group("regression", outputs, None, GAMMA, POWER), None
    for epoch in range(4):
        seen = []
        for rows in batches(epoch):
            optimizer.zero_grad()
            z = backbone(inputs[rows])
            seen.append((z.detach().clone(), targets[rows]))
            leaf = z.detach().requires_grad_()
            (head(leaf) - targets[rows]).square().mean().backward()
            gradient = leaf.grad
            if prior is not None:
                gradient = published.published_step([group], z.detach(), [targets[rows]], [prior])
            z.backward(gradient)
            optimizer.step()
        prior = published.full_data_posterior(group, torch.cat([f for f, _ in seen]), torch.cat([t for _, t in seen]))
    for mine, theirs in zip(ours, [*backbone.parameters(), *head.parameters()], strict=True):
        close(mine, theirs.detach(), 1e-5)
