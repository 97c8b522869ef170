"""Statistics that decay as training goes on, without refresh()."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mtlgrad import BayesAgg, Regression
from tests.support.bounds import all_near
from tests.support.nets import GAMMAS, KINDS, Problem, problem
from tests.support.oracles import dense_of

pytestmark = pytest.mark.usefixtures("one_thread")
BATCHES = [slice(i, i + 5) for i in range(0, 40, 5)]


def passed(m: Problem, rows: slice) -> Tensor:
    features = m.data[0].features[rows].clone().requires_grad_()
    torch.stack(m.losses(m.layer(features, m.targets(rows)), rows)).sum().backward()
    assert features.grad is not None
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
    assert m.layer.posteriors is not None
    found = dense_of(m.layer.posteriors[0], m.layer.posteriors[0].precision)
    all_near(found, expected_precision(m, 0, 0.5 ** (1 / half_life), len(BATCHES) - 1, 1.0), 1e-10)


def test_refresh_tells_how_many_examples_an_epoch_has() -> None:
    m = problem(("regression",), statistics="moving", half_life=2.0)
    for rows in BATCHES:
        passed(m, rows)
    m.layer.refresh()
    decay = 0.5**0.5
    weight = 5 * sum(decay**i for i in range(len(BATCHES)))
    assert m.layer.posteriors is not None
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
    for rows in BATCHES * 3:
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
    assert layer.noise is not None
    all_near(layer.noise, residuals / (40 - data.features.shape[1]), 1e-5)


@pytest.mark.parametrize("half_life", [0, -1.0, "long"])
def test_half_lives_that_are_refused(half_life: Any) -> None:
    with pytest.raises(ValueError, match="BayesAgg: half_life: expected a number of batches above 0, found"):
        BayesAgg(problem().layer.heads, statistics="moving", half_life=half_life)
