"""Weights from a Gram matrix, rule by rule, on every backend: what each promises, and where there is no solution, or
several. Against solvers that are independent of the package: test_solutions_of_rules.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mtlgrad import ops, reference
from tests.support.bounds import normal

pytestmark = pytest.mark.usefixtures("one_thread")
Rule = Callable[..., Tensor]
ZERO = torch.tensor(0)
#: Each rule with the arguments after the Gram matrix.
RULES: dict[str, tuple[Rule, Rule, tuple[Any, ...]]] = {
    "upgrad": (ops.upgrad, reference.upgrad, ()),
    "dualproj": (ops.dualproj, reference.dualproj, ()),
    "mgda": (ops.mgda, reference.mgda, ()),
    "cagrad": (ops.cagrad, reference.cagrad, (0.5,)),
    "nash": (ops.fairgrad, reference.fairgrad, (1.0,)),
    "fairgrad": (ops.fairgrad, reference.fairgrad, (2.0, False)),
    "imtlg": (ops.imtlg, reference.imtlg, ()),
    "pcgrad": (ops.pcgrad, reference.pcgrad, (5, ZERO)),
}
every_rule = pytest.mark.parametrize("name", list(RULES))


def found(name: str, gram: Tensor, device: str = "cpu", **options: Any) -> Tensor:
    rule, _, arguments = RULES[name]
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
    return rule(gram.to(device), *moved, **options)


def update_error(rows: Tensor, weights: Tensor, want: Tensor) -> float:
    """Relative to what float64 could lose: the gradients' lengths times their weights."""
    return float(((weights.cpu() - want) @ rows).norm() / (rows.norm(dim=1) @ want.abs()).clamp_min(1e-300))


# ---- the reference ---------------------------------------------------------------------------------------------------


@every_rule
def test_the_reference_and_the_kernels(name: str, device: str) -> None:
    _, rule, arguments = RULES[name]
    for seed in range(12):
        tasks, rank = ((1, 1), (2, 1), (3, 3), (8, 5), (20, 20), (33, 9))[seed % 6]
        rows = normal(seed, tasks, rank) @ normal(seed + 50, rank, 2 * tasks)
        if seed % 2:
            rows = (rows + normal(seed + 90, 2 * tasks)) * torch.logspace(-1.0, 1.0, tasks).double()[:, None]
        gram = rows @ rows.mT
        assert update_error(rows, found(name, gram, device), rule(gram, *arguments)) < 1e-10


# ---- where there is no solution, or several --------------------------------------------------------------------------


def alike(names: list[str], weights: list[float]) -> dict[str, list[float] | None]:
    return dict.fromkeys(names, weights)


G = normal(1, 40)
H = normal(2, 40)
DEGENERATE: dict[str, tuple[list[Tensor], dict[str, list[float] | None]]] = {
    # None: whatever it is, all weights are finite and the update is zero
    "one task": (
        [G],
        alike(["upgrad", "dualproj", "mgda", "nash", "imtlg", "pcgrad"], [1.0]) | {"cagrad": [1.5]},
    ),
    "no gradient": (
        [0 * G, 0 * G],
        alike(["upgrad", "dualproj", "mgda", "cagrad", "imtlg"], [0.5, 0.5])
        | alike(["nash", "fairgrad", "pcgrad"], [1.0, 1.0]),
    ),
    "a zero task": (
        [G, 0 * G],
        {"upgrad": [0.5, 0.5], "dualproj": [0.5, 0.5], "mgda": [0.0, 1.0], "cagrad": [0.5, 0.5], "nash": [1.0, 0.0]}
        | {"imtlg": [1.0, 0.0], "pcgrad": [1.0, 1.0]},
    ),
    "duplicates": (
        [G, G],
        alike(["upgrad", "dualproj", "mgda", "imtlg"], [0.5, 0.5])
        | {"cagrad": [0.75, 0.75], "nash": [1.0, 1.0], "pcgrad": [1.0, 1.0]},
    ),
    "opposites": ([G, -G], dict.fromkeys(RULES, None) | {"cagrad": [0.5, 0.5], "imtlg": [0.0, 0.0]}),
    "opposites of unequal lengths": (
        [G, -2 * G],
        {"upgrad": None, "dualproj": None, "mgda": [2 / 3, 1 / 3], "nash": [2 / 3, 1 / 3], "fairgrad": [2 / 3, 1 / 3]}
        | {"imtlg": [0.0, 0.0], "pcgrad": None},
    ),
    "opposites, and another": ([G, -G, H], {"upgrad": None, "mgda": None, "nash": None, "pcgrad": None}),
    "rank one, of one direction": (
        [G, 2 * G, 4 * G],
        {"upgrad": [1 / 3] * 3, "mgda": [1.0, 0.0, 0.0], "imtlg": [4 / 7, 2 / 7, 1 / 7], "pcgrad": [1.0] * 3},
    ),
}


@pytest.mark.parametrize("case", list(DEGENERATE))
def test_degenerate_systems(case: str, device: str) -> None:
    rows, expected = DEGENERATE[case]
    for size in (1.0, 1e-24, 1e18):
        scaled = torch.stack(rows) * size
        gram = scaled @ scaled.mT
        for name, want in expected.items():
            got = found(name, gram, device).cpu()
            assert got.isfinite().all(), name
            if want is None:
                update = got @ scaled
                parts = scaled.norm(dim=1) @ got.abs()
                if case == "opposites, and another" and name in ("upgrad", "pcgrad"):
                    update = update @ scaled[0] / scaled[0].norm()  # in the way of neither
                assert float(update.norm()) <= 1e-6 * float(parts), name
            else:
                # Of duplicates any share is right: rounding decides, and a ridge. Their sum is not.
                atol = 1e-2 if case == "duplicates" else 1e-6
                assert torch.allclose(got, torch.tensor(want).double(), atol=atol), (name, got)
                assert float(got.sum()) == pytest.approx(sum(want), abs=1e-6), name


def test_more_tasks_than_numbers(device: str) -> None:
    rows = normal(3, 6, 2)
    gram = rows @ rows.mT
    for name in RULES:
        got = found(name, gram, device).cpu()
        assert update_error(rows, got, RULES[name][1](gram, *RULES[name][2])) < 1e-9


def test_what_rules_promise(device: str) -> None:
    rows = normal(4, 6, 50) - 0.8 * normal(5, 50)
    rows[0] += 3.0 * normal(5, 50)  # against all others
    gram = rows @ rows.mT
    assert (gram < 0).any()
    for name in ("upgrad", "dualproj"):  # no product is negative
        assert (gram @ found(name, gram, device).cpu() > -1e-12 * gram.diagonal().max()).all()
    products = gram @ (w := found("mgda", gram, device).cpu())
    assert torch.allclose(products[w > 0], w @ products)
    assert (products >= w @ products * (1 - 1e-12)).all()
    gains = found("nash", gram, device).cpu()
    assert torch.allclose(gains * (gram @ gains), torch.ones(6).double() * gram.norm(), rtol=1e-10)
    directions = (gram @ found("imtlg", gram, device).cpu()) / gram.diagonal().sqrt()
    assert torch.allclose(directions, directions.mean().expand(6))
    worst = (gram @ found("cagrad", gram, device).cpu()).min()
    assert worst > (gram @ torch.full((6,), 1 / 6).double()).min()
    fair = found("fairgrad", gram, device).cpu()
    assert torch.allclose(gram @ fair, fair**-0.5, rtol=1e-10)


# ---- sizes and types -------------------------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("exponent", [-80, -1, 60])
def test_powers_of_two(name: str, exponent: int, device: str) -> None:
    """They do not change the weights; those of FairGrad as published (alpha 2) they do: M a = a^(-1/2)."""
    rows = normal(6, 5, 30)
    want, got = (found(name, gram, device) for gram in (rows @ rows.mT, (rows @ rows.mT) * 4.0**exponent))
    factor = 4.0 ** (-2 / 3 * exponent) if name == "fairgrad" else 1.0
    assert torch.allclose(got, factor * want, rtol=1e-12, atol=0.0)


@every_rule
@pytest.mark.parametrize("tasks", [1, 3, 33, 64, 66])
def test_nan_and_infinity(name: str, tasks: int, device: str) -> None:
    gram = torch.eye(tasks, dtype=torch.float64)
    for i, j, bad in ((0, 0, torch.nan), (0, tasks - 1, torch.inf), (tasks - 1, tasks - 1, -torch.inf)):
        broken = gram.clone()
        broken[i, j] = bad
        assert found(name, broken, device).isnan().all()
    with pytest.raises(ValueError, match=r"found NaN or infinity in task 0"):
        found(name, torch.full_like(gram, torch.nan), device, check_finite=True)


@every_rule
def test_more_tasks_than_a_kernel_takes(name: str, device: str) -> None:
    rows = normal(7, 66, 100) + normal(8, 100)
    gram = rows @ rows.mT
    assert torch.equal(found(name, gram, device).cpu(), RULES[name][1](gram, *RULES[name][2]))


@every_rule
def test_only_the_upper_triangle_counts(name: str, device: str) -> None:
    rows = normal(9, 5, 30)
    gram = rows @ rows.mT
    broken = gram.triu() + torch.full_like(gram, torch.nan).tril(-1)
    assert torch.equal(found(name, broken, device), found(name, gram, device))


@every_rule
def test_layouts_and_dtypes(name: str, device: str) -> None:
    rows = normal(10, 5, 30).float()
    gram = (rows @ rows.mT).to(device)
    want = found(name, gram.double(), device)
    strided = torch.zeros(5, 10, device=device)[:, ::2].copy_(gram)
    assert torch.equal(found(name, gram, device), want)
    assert torch.equal(found(name, strided, device), want)
