"""A model with heads of every kind, and what BayesAgg should compute for it, written straight from the equations."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mtlgrad import BayesAgg, Binary, Multiclass, Regression, reference
from mtlgrad.posterior import Posterior, binary_posterior, multiclass_posterior, regression_posterior
from mtlgrad.posterior.posteriors import JointPosterior
from mtlgrad.reference.moments import dense_multiclass_covariance
from tests.support.posterior_cases import Data, dense_of, make

WIDTH = 4
GAMMAS = {"regression": 0.4, "binary": 0.3, "multiclass": 0.2}
POWERS = {"regression": 0.5, "binary": 1.0, "multiclass": 0.7}
ALL_KINDS = ("regression", "binary", "multiclass")
#: The published model: unit noise, no bias; an epoch's features; the mean over the tasks.
published_regression = partial(Regression, noise=1.0, bias=False)
published_layer = partial(BayesAgg, covariance="full", reduction="mean", statistics="stored")
LAYERS: dict[str, Any] = {"regression": published_regression, "binary": Binary, "multiclass": Multiclass}


@dataclass
class Model:
    """Heads of the kinds asked for, a layer before them, an epoch of batches on the same features."""

    data: list[Data]
    heads: list[nn.Linear]
    layer: BayesAgg

    def targets(self, rows: Any = slice(None)) -> list[Tensor]:
        return [data.targets[rows] for data in self.data]

    def losses(self, features: Tensor, rows: Any = slice(None)) -> list[Tensor]:
        return [mean_loss(data.rows(rows), head(features)) for data, head in zip(self.data, self.heads)]

    def see(self, rows: Any = slice(None)) -> Tensor:
        """A training step without the optimizer's: the gradient at the features."""
        features = self.data[0].features[rows].clone().requires_grad_()
        self.layer.total(self.losses(self.layer(features, self.targets(rows)), rows)).backward()
        assert features.grad is not None
        return features.grad

    def aggregate(self, rows: Any = slice(None)) -> Tensor:
        return self.layer.aggregate(self.data[0].features[rows], self.targets(rows))


def mean_loss(data: Data, logits: Tensor) -> Tensor:
    """Summed over a head's outputs, divided by the batch size; without a label no loss."""
    batch, there = len(data.features), data.labelled
    if data.kind == "multiclass":
        return functional.cross_entropy(logits, data.targets, ignore_index=-100, reduction="sum") / batch
    if data.kind == "binary":
        some = functional.binary_cross_entropy_with_logits(logits[there], data.targets[there], reduction="sum")
        return some / batch
    return (logits[there] - data.targets[there]).square().sum() / batch


def linear(data: Data) -> nn.Linear:
    rows, width = data.weight.shape
    head = nn.Linear(WIDTH, rows, dtype=data.weight.dtype)
    with torch.no_grad():
        head.weight.copy_(data.weight[:, :WIDTH])
        head.bias.copy_(data.weight[:, WIDTH] if width > WIDTH else torch.linspace(0, 1, rows))
    return head


def model(kinds: Sequence[str] = ALL_KINDS, examples: int = 40, missing: float = 0.0, **options: Any) -> Model:
    data = [make(kind, examples, WIDTH, seed=i, missing=missing) for i, kind in enumerate(kinds)]
    for other in data[1:]:
        other.features = data[0].features
    heads = [linear(d) for d in data]
    wrapped = [LAYERS[d.kind](head, gamma=GAMMAS[d.kind], power=POWERS[d.kind]) for d, head in zip(data, heads)]
    return Model(data, heads, published_layer(wrapped, **options))


# ---- what the layer should compute


def isserlis(h: Tensor, y: Tensor, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """E and Var of 2 (w.h - y) w_d for one example and output, from the Gaussian's second, third and fourth moments
    written out as tensors of the weights."""
    second = covariance + torch.outer(mean, mean)
    m, s = mean, covariance
    third = torch.einsum("i,j,k->ijk", m, m, m)
    fourth = torch.einsum("i,j,k,l->ijkl", m, m, m, m)
    for pattern in ("ij,k->ijk", "ik,j->ijk", "jk,i->ijk"):
        third = third + torch.einsum(pattern, s, m)
    for pattern in ("ij,kl", "ik,jl", "il,jk"):
        fourth = fourth + torch.einsum(f"{pattern}->ijkl", s, s)
    for pattern in ("ij,k,l", "ik,j,l", "il,j,k", "jk,i,l", "jl,i,k", "kl,i,j"):
        fourth = fourth + torch.einsum(f"{pattern}->ijkl", s, m, m)
    expectation = 2 * (second @ h - y * m)
    squares = torch.einsum("ijkk,i,j->k", fourth, h, h) - 2 * y * torch.einsum("ikk,i->k", third, h)
    return expectation, 4 * (squares + y**2 * second.diagonal()) - expectation**2


def law_of(data: Data, structure: str, **prior: Any) -> Posterior:
    if data.kind == "regression":
        return regression_posterior(data.features, data.targets, **prior)
    function = binary_posterior if data.kind == "binary" else multiclass_posterior
    return function(data.features, data.targets, data.weight, structure=structure, **prior)


def moments(data: Data, full: Data, structure: str = "full") -> tuple[Tensor, Tensor]:
    """[B, T, D] each, from the explicit covariance of the batch's posterior, whose prior is the full data's."""
    prior = law_of(full, structure, gamma=GAMMAS[data.kind])
    law = law_of(data, structure, prior=prior)
    rows, width = law.mean.shape
    if data.kind == "regression":
        blocks = dense_of(law, law.covariance()).reshape(rows, width, rows, width)
        pairs = [
            [isserlis(h, y[o].nan_to_num(), law.mean[o], blocks[o, :, o]) for o in range(rows)]
            for h, y in zip(data.features, data.targets)
        ]
        mean, variance = (torch.stack([torch.stack([pair[i] for pair in row]) for row in pairs]) for i in (0, 1))
        missing = data.targets.isnan()[..., None]
        return mean.masked_fill(missing, 0.0), variance.masked_fill(missing, torch.inf)
    if data.kind == "binary":
        return reference.binary_moments(data.features, data.targets, law.mean, law.covariance())
    # 256 points leave an integration error that depends on how the logits' covariance is factorised, so both sides
    # must hold the same one: `contrasts`, which test_posterior.py shows to be as good as the covariance.
    contrasts = law.contrasts
    if isinstance(prior, JointPosterior) and len(data.features) * (rows - 1) < law.mean.numel():
        contrasts = torch.linalg.inv(torch.linalg.inv(prior.contrasts) + law.precision - prior.precision)
    covariance = dense_multiclass_covariance(contrasts, rows)
    return reference.multiclass_moments(data.features, data.targets, law.mean, covariance)


def combined(parts: Sequence[tuple[Tensor, Tensor]], powers: Sequence[float]) -> Tensor:
    """Section 4.3, written out: for every example and dimension a mean over the tasks that have a label."""
    numerator, denominator = torch.zeros(()), torch.zeros(())
    for (mean, variance), power in zip(parts, powers):
        for task in range(mean.shape[1]):
            there = variance[:, task] < torch.inf
            weight = torch.where(there, variance[:, task].clamp(min=1e-8) ** -power, 0.0)
            numerator, denominator = numerator + weight * mean[:, task], denominator + weight
    return torch.where(denominator > 0, numerator / denominator.clamp(min=1e-300), 0.0) / len(parts[0][0])


def expected(m: Model, rows: Any = slice(None), structure: str = "full") -> Tensor:
    parts = [moments(data.rows(rows), data, structure) for data in m.data]
    return combined(parts, [POWERS[data.kind] for data in m.data])


# ---- states


def unpacked(state: Tensor) -> dict[str, Any]:
    """What is in the tensor that the layer has in a state_dict."""
    found: dict[str, Any] = torch.load(io.BytesIO(bytes(state.numpy())), weights_only=True)
    return found


def packed(state: dict[str, Any]) -> Tensor:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
