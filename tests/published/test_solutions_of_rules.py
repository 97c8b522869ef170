"""Weights from a Gram matrix against solvers independent of the package (oracles.py), and by the conditions
that a solution meets."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from mtlgrad import ops
from mtlgrad.reference.rules import drawn_order
from tests.ops.test_rules import found, update_error
from tests.support import oracles
from tests.support.bounds import normal

pytestmark = pytest.mark.usefixtures("one_thread")


def per_rule(G: np.ndarray, M: np.ndarray) -> dict[str, np.ndarray | None]:
    """What independent solvers find; None where there is no solution."""
    u, tasks = np.full(G.shape[1], 1 / G.shape[1]), G.shape[1]

    def fair(gram: np.ndarray, alpha: float) -> np.ndarray | None:
        try:
            return oracles.fair(gram, alpha)
        except ValueError:
            return None

    return {
        "upgrad": np.mean([oracles.dual_cone(G, unit) for unit in np.eye(tasks)], 0),
        "dualproj": oracles.dual_cone(G, u),
        "mgda": oracles.min_norm(G),
        "cagrad": oracles.cagrad(G, 0.5),
        "nash": fair(M / np.linalg.norm(M), 1.0),
        "fairgrad": fair(M, 2.0),
        "imtlg": oracles.imtlg(G) if np.linalg.matrix_rank(G) == tasks else None,
        "pcgrad": oracles.pcgrad(M, [drawn_order(tasks, 5, 0, i) for i in range(tasks)]),
    }


@functools.cache
def solved(start: int, stop: int) -> list[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray | None]]]:
    """Some of sixty systems, with their solutions: once for all devices."""
    systems = itertools.islice(oracles.gradient_systems(60, seed=4), start, stop)
    return [(G, G.T @ G, per_rule(G, G.T @ G)) for G in systems]


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 9), *(pytest.param(*part, marks=pytest.mark.slow) for part in ((9, 25), (25, 60)))]
)
def test_against_independent_solvers(start: int, stop: int, device: str) -> None:
    worst: dict[str, float] = {}
    for G, M, wanted in solved(start, stop):
        for name, want in wanted.items():
            got = found(name, torch.tensor(M), device).cpu()
            if want is None:  # a convex combination of the gradients is zero, or has no equal projections
                assert name in ("nash", "fairgrad", "imtlg")
                if name != "imtlg":
                    assert torch.allclose(got, ops.mgda(torch.tensor(M)), rtol=1e-9)
                continue
            error = update_error(torch.tensor(G.T), got, torch.tensor(want))
            if np.linalg.matrix_rank(G) == len(M):
                error = max(error, float(np.abs(got.numpy() - want).max() / np.abs(want).max()))
            worst[name] = max(worst.get(name, 0.0), error)
    assert max(worst.values()) < 1e-6, worst
    assert worst["pcgrad"] < 1e-14


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(oracles.drawn_grams())
def test_conditions(M: np.ndarray) -> None:
    gram, tasks = torch.tensor(M), len(M)
    u, squares = np.full(tasks, 1 / tasks), np.diag(M)
    assert oracles.kkt_dual_cone(M, u, ops.dualproj(gram).numpy(), False) < 1e-8
    for unit in np.eye(tasks):
        assert oracles.kkt_dual_cone(M, unit, ops.dualproj(gram, torch.tensor(unit)).numpy(), False) < 1e-8
    assert oracles.kkt_simplex(M, ops.mgda(gram).numpy(), False) < 1e-8
    for c in (0.2, 0.5):
        assert oracles.kkt_cagrad(M, c, ops.cagrad(gram, c).numpy(), False) < 1e-8
    some = squares > 0
    for alpha in (0.5, 1.0, 2.0):
        weights = ops.fairgrad(gram, alpha).numpy()
        stationary = tasks > 1 and np.array_equal(weights, ops.mgda(gram).numpy())
        if some.any() and not stationary:
            norm = np.linalg.norm(M / squares.max()) * squares.max()
            assert oracles.kkt_fair((M / norm)[np.ix_(some, some)], alpha, weights[some]) < 1e-8


def test_preferences(device: str) -> None:
    rows = normal(11, 3, 20)
    rows[2] -= 2 * rows[0]
    gram, p = rows @ rows.mT, torch.tensor([0.2, 0.0, 3.0])
    units = [torch.tensor(oracles.dual_cone(rows.T.numpy(), unit)) for unit in np.eye(3)]
    want = sum(w * unit for w, unit in zip(p.double(), units))
    assert torch.allclose(ops.upgrad(gram.to(device), p.to(device)).cpu(), want)
    assert torch.allclose(ops.upgrad(gram.to(device), p.tolist()).cpu(), want)
    want = torch.tensor(oracles.dual_cone(rows.T.numpy(), p.numpy()))
    assert torch.allclose(ops.dualproj(gram.to(device), p.to(device)).cpu(), want)


def test_pcgrads_orders_follow_from_seed_and_step(device: str) -> None:
    rows = normal(12, 8, 6) - 1.2 * normal(12, 8, 6).mean(0)
    gram = (rows @ rows.mT).to(device)
    seen = {}
    for seed in (-3, 0, 2**62):
        for step in (0, 1, 2**40):
            at = torch.tensor(step, device=device)
            weights = ops.pcgrad(gram, seed, at).cpu()
            order = [drawn_order(8, seed, step, i) for i in range(8)]
            assert np.allclose(weights, oracles.pcgrad(gram.cpu().numpy(), order), rtol=1e-12)
            seen[tuple(weights.tolist())] = order
            assert int(at) == step
    assert len(seen) == 9
    firsts = [drawn_order(4, 0, step, 1)[0] for step in range(400)]
    assert all(70 <= firsts.count(j) <= 130 for j in range(4))
