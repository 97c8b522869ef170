"""What last-layer posteriors refuse: one line each, with the argument, what was expected and what was found."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtlgrad.posterior import binary_posterior, multiclass_posterior, regression_posterior
from mtlgrad.posterior.cholesky import JITTERS, checked_cholesky
from mtlgrad.posterior.posteriors import posterior_from_state
from tests.support.bounds import assert_near
from tests.support.nets import head_data, posterior

REGRESSION, BINARY, MULTICLASS = head_data("regression"), head_data("binary"), head_data("multiclass")
H, Y = REGRESSION.features, REGRESSION.targets  # [30, 4], [30, 3]
B, W = BINARY.targets, BINARY.weight  # [30, 3], [3, 5]
C, V = MULTICLASS.targets, MULTICLASS.weight  # [30], [3, 5]


def at(tensor: Tensor, index: tuple[int, ...] | int, value: float) -> Tensor:
    changed = tensor.clone()
    changed[index] = value
    return changed


CALLS: dict[str, tuple[Callable[[], object], str]] = {
    "features not a tensor": (
        lambda: regression_posterior(H.tolist(), Y),  # type: ignore[arg-type]
        r"regression_posterior: features: expected a tensor, found list",
    ),
    "features of one dimension": (
        lambda: regression_posterior(H[0], Y),
        r"regression_posterior: features: expected shape \[B, D\], found \[4\]",
    ),
    "features of integers": (
        lambda: binary_posterior(H.long(), B, W),
        r"binary_posterior: features: expected float32, .* found torch.int64",
    ),
    "no example": (
        lambda: multiclass_posterior(H[:0], C[:0], V),
        r"multiclass_posterior: features: expected at least one example, found none",
    ),
    "no dimension": (
        lambda: binary_posterior(H[:, :0], B, W[:, :1]),
        r"binary_posterior: features: expected at least one dimension, found none",
    ),
    "NaN features": (
        lambda: regression_posterior(at(H, (2, 1), torch.nan), Y),
        r"regression_posterior: features: expected finite values, found nan at \[2, 1\]",
    ),
    "infinite features": (
        lambda: binary_posterior(at(H, (0, 3), torch.inf), B, W),
        r"binary_posterior: features: expected finite values, found inf at \[0, 3\]",
    ),
    "targets on another device": (
        lambda: regression_posterior(H, Y.to("meta")),
        r"regression_posterior: targets: expected device cpu like features, found meta",
    ),
    "weight on another device": (
        lambda: binary_posterior(H, B, W.to("meta")),
        r"binary_posterior: weight: expected device cpu like features, found meta",
    ),
    "targets of another length": (
        lambda: regression_posterior(H, Y[:7]),
        r"regression_posterior: targets: expected shape \[30, O\], found \[7, 3\]",
    ),
    "no output": (
        lambda: regression_posterior(H, Y[:, :0]),
        r"regression_posterior: targets: expected at least one output, found none",
    ),
    "targets of another width": (
        lambda: binary_posterior(H, B[:, :2], W),
        r"binary_posterior: targets: expected shape \[30, 3\], found \[30, 2\]",
    ),
    "integer targets of a binary task": (
        lambda: binary_posterior(H, B.long(), W),
        r"binary_posterior: targets: expected float32, .* found torch.int64",
    ),
    "binary targets above one": (
        lambda: binary_posterior(H, at(B, (4, 1), 2.0), W),
        r"binary_posterior: targets: expected values from 0 to 1, or NaN for no label, found 2 at \[4, 1\]",
    ),
    "binary targets below zero": (
        lambda: binary_posterior(H, at(B, (0, 2), -1.0), W),
        r"binary_posterior: targets: expected values from 0 to 1, .* found -1 at \[0, 2\]",
    ),
    "infinite regression targets": (
        lambda: regression_posterior(H, at(Y, (3, 0), torch.inf)),
        r"regression_posterior: targets: expected finite values, or NaN for no label, found inf at \[3, 0\]",
    ),
    "float class targets": (
        lambda: multiclass_posterior(H, C.double(), V),
        r"multiclass_posterior: targets: expected int64 class indices, found torch.float64; use targets.long\(\)",
    ),
    "class targets of two dimensions": (
        lambda: multiclass_posterior(H, C[:, None], V),
        r"multiclass_posterior: targets: expected shape \[30\], found \[30, 1\]",
    ),
    "class out of range": (
        lambda: multiclass_posterior(H, at(C, 5, 3), V),
        r"multiclass_posterior: targets: expected class indices from 0 to 2, or -100 .* found 3 at example 5",
    ),
    "negative class": (
        lambda: multiclass_posterior(H, at(C, 6, -1), V),
        r"multiclass_posterior: targets: expected class indices from 0 to 2, or -100 .* found -1 at example 6",
    ),
    "no weight": (
        lambda: binary_posterior(H, B, None),  # type: ignore[arg-type]
        r"binary_posterior: weight: expected a tensor, found NoneType",
    ),
    "weight without a bias": (
        lambda: binary_posterior(H, B, W[:, :4]),
        r"binary_posterior: weight: expected shape \[O, 5\], found \[3, 4\]",
    ),
    "weight without classes": (
        lambda: multiclass_posterior(H, C, V[:0]),
        r"multiclass_posterior: weight: expected at least one class, found none",
    ),
    "NaN weight": (
        lambda: multiclass_posterior(H, C, at(V, (1, 4), torch.nan)),
        r"multiclass_posterior: weight: expected finite values, found nan at \[1, 4\]",
    ),
    "gamma zero": (
        lambda: regression_posterior(H, Y, gamma=0),
        r"gamma: expected a finite prior variance above 0, found 0",
    ),
    "gamma negative": (lambda: binary_posterior(H, B, W, gamma=-1.0), r"gamma: expected .* above 0, found -1.0"),
    "gamma infinite": (lambda: regression_posterior(H, Y, gamma=torch.inf), r"gamma: expected a finite .* found inf"),
    "gamma NaN": (lambda: regression_posterior(H, Y, gamma=torch.nan), r"gamma: expected a finite .* found nan"),
    "gamma as words": (
        lambda: regression_posterior(H, Y, gamma="1"),  # type: ignore[arg-type]
        r"gamma: expected a finite prior variance above 0, found '1'",
    ),
    "unknown structure": (
        lambda: multiclass_posterior(H, C, V, structure="low rank"),
        r"structure: expected one of full, block, kron, diag, found 'low rank'",
    ),
    "prior of another kind": (
        lambda: regression_posterior(H, Y, prior=binary_posterior(H, B, W)),
        r"prior: expected a regression posterior of structure 'full', found a binary one of structure 'full'",
    ),
    "prior of another structure": (
        lambda: multiclass_posterior(H, C, V, prior=multiclass_posterior(H, C, V, structure="kron")),
        r"prior: expected a multiclass posterior of structure 'full', found a multiclass one of structure 'kron'",
    ),
    "prior of another width": (
        lambda: regression_posterior(H, Y, prior=regression_posterior(H[:, :2], Y)),
        r"prior: expected weights of shape \[3, 4\], found \[3, 2\]",
    ),
    "prior of other outputs": (
        lambda: binary_posterior(H, B, W, prior=binary_posterior(H, B[:, :2], W[:2])),
        r"prior: expected weights of shape \[3, 5\], found \[2, 5\]",
    ),
    "prior that is no posterior": (
        lambda: regression_posterior(H, Y, prior=H),  # type: ignore[arg-type]
        r"prior: expected a regression posterior of structure 'full', found Tensor",
    ),
    "update of another width": (
        lambda: posterior(REGRESSION).update(H[:, :2], Y),
        r"update: features: expected shape \[B, 4\], found \[30, 2\]",
    ),
    "update of other outputs": (
        lambda: posterior(REGRESSION).update(H, Y[:, 0]),
        r"update: targets: expected shape \[30, 3\], found \[30, 1\]",
    ),
    "update with a class out of range": (
        lambda: posterior(MULTICLASS).update(H, at(C, 0, 3)),
        r"update: targets: expected class indices from 0 to 2, .* found 3 at example 0",
    ),
    "update with NaN": (
        lambda: posterior(BINARY).update(at(H, (0, 0), torch.nan), B),
        r"update: features: expected finite values, found nan at \[0, 0\]",
    ),
    "update without examples": (
        lambda: posterior(BINARY).update(H[:0], B[:0]),
        r"update: features: expected at least one example, found none",
    ),
    "update with another weight's shape": (
        lambda: posterior(BINARY).update(H, B, W[:2]),
        r"update: weight: expected shape \[3, 5\], found \[2, 5\]",
    ),
    "update of a regression with a weight": (
        lambda: posterior(REGRESSION).update(H, Y, REGRESSION.weight),
        r"update: weight: expected none, a regression posterior is exact",
    ),
    "update on another device": (
        lambda: posterior(BINARY).update(H.to("meta"), B.to("meta")),
        r"update: features: expected device cpu like posterior, found meta",
    ),
    "no sample": (lambda: posterior(BINARY).sample(0), r"sample: n: expected an integer of at least 1, found 0"),
    "half a sample": (lambda: posterior(BINARY).sample(1.5), r"sample: n: expected an integer .* found 1.5"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", CALLS)
def test_one_line_that_names_argument_expected_and_found(name: str) -> None:
    call, words = CALLS[name]
    with pytest.raises((RuntimeError, ValueError), match=words) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["regression", "binary", "multiclass"])
def test_a_refused_update_changes_nothing(kind: str) -> None:
    data = head_data(kind)
    law = posterior(data)
    before = posterior_from_state(law.state())
    with pytest.raises(ValueError, match="finite"):
        law.update(at(data.features, (29, 3), torch.inf), data.targets)
    assert torch.equal(law.precision, before.precision)
    assert torch.equal(law.mean, before.mean)


# ---- precisions that are not positive definite


def stack(*diagonals: list[float]) -> Tensor:
    return torch.diag_embed(torch.tensor(diagonals, dtype=torch.float64))


def test_cholesky_leaves_a_good_matrix_alone() -> None:
    matrix = stack([4.0, 9.0], [1.0, 16.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(checked_cholesky(matrix, "x"), matrix.sqrt())


def test_least_jitter_that_helps_and_only_where_needed() -> None:
    """Two matrices, the second short of positive definite by 3e-5 of its mean diagonal: 1e-4 mends it."""
    matrix = stack([4.0, 2.0], [2.0 + 6e-5, -3e-5])
    with pytest.warns(UserWarning, match="a name: precision not positive definite, added 1e-04 of its mean diagonal"):
        factor = checked_cholesky(matrix, "a name")
    expected = matrix.clone()
    expected[1] += 1e-4 * (2.0 + 3e-5) / 2 * torch.eye(2, dtype=torch.float64)
    assert_near(factor @ factor.mT, expected, 1e-14)


def test_what_no_jitter_mends_is_named_with_its_pivot() -> None:
    # Rows 0 and 1 of the second matrix: pivots 1, then 1 - 2 * 2 = -3.
    bad = torch.tensor([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    matrices = torch.stack([torch.eye(3, dtype=torch.float64), bad])
    words = r"heads\[1\]: expected a positive definite precision matrix, found pivot -3 at row 1 of matrix 1 even with"
    with pytest.raises(ValueError, match=words) as error:
        checked_cholesky(matrices, "heads[1]")
    assert f"{JITTERS[-1]:.0e} of the mean diagonal" in str(error.value)
    assert "smaller gamma" in str(error.value)
    with pytest.raises(ValueError, match=r"found pivot -3 at row 1 even with"):
        checked_cholesky(bad, "one")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_jittered(value: float) -> None:
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[2, 1] = matrix[1, 2] = value
    with pytest.raises(ValueError, match=r"x: expected a finite precision matrix, found NaN or infinity; check the"):
        checked_cholesky(matrix, "x")


def test_a_nearly_singular_precision_warns_and_goes_on() -> None:
    """Identical huge examples and next to no prior: in float32 the precision is singular."""
    features = torch.full((64, 3), 1e4)
    law = regression_posterior(features, torch.ones(64, 1), gamma=1e3)
    with pytest.warns(UserWarning, match=r"regression posterior: precision not positive definite, added 1e-0\d of"):
        mean = law.mean
    # The one direction that the data determine is right all the same: predictions are 1, up to the jitter's 1e-6.
    assert_near(features[:1] @ mean.T, torch.ones(1, 1), 1e-4)


def test_an_indefinite_state_is_named_by_task_when_it_is_used() -> None:
    state = posterior(BINARY).state()
    state["sums"]["blocks"][2, 1, 1] = -100.0
    law = posterior_from_state(state)
    law.name = "task age"
    with pytest.raises(
        ValueError, match=r"task age: expected a positive definite .* found pivot -\d+ at row 1 of matrix 2"
    ):
        _ = law.mean
