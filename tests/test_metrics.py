"""Delta_m, mean rank, statistics of gradients: formulas, signs, scales, errors."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mtlgrad import ops
from mtlgrad.metrics import delta_m, gradient_statistics, mean_rank

# ---- Delta_m ---------------------------------------------------------------------------------------------------------


def test_formula_and_sign():
    # Error 10 % higher: worse; accuracy 10 % higher: better; both 10 % worse.
    assert delta_m([1.1], [1.0], [False]) == pytest.approx(10.0)
    assert delta_m([1.1], [1.0], [True]) == pytest.approx(-10.0)
    assert delta_m([2.2, 0.45], [2.0, 0.5], [False, True]) == pytest.approx(10.0)
    assert delta_m([3.0, 4.0], [3.0, 4.0], [True, False]) == 0.0


def test_takes_tensors():
    assert delta_m(torch.tensor([1.5, 1.0]), torch.tensor([1.0, 1.0]), [False, False]) == pytest.approx(25.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([1.0], [1.0, 2.0], [True]), "one entry a task, found 1, 2 and 1"),
        (([], [], []), "found 0, 0 and 0"),
        (([1.0], [0.0], [True]), r"baseline\[0\] must not be 0"),
        (([float("nan")], [1.0], [True]), "must be finite, found nan"),
    ],
)
def test_errors_name_what_was_found(arguments, words):
    with pytest.raises(ValueError, match=words):
        delta_m(*arguments)


# ---- mean rank -------------------------------------------------------------------------------------------------------


def test_ranks_by_each_metric_and_averages():
    table = [
        [0.9, 10.0],  # first, third
        [0.8, 5.0],  # second, first
        [0.7, 7.0],  # third, second
    ]
    assert mean_rank(table, [True, False]) == [2.0, 1.5, 2.5]
    assert mean_rank(torch.tensor(table), [True, False]) == [2.0, 1.5, 2.5]
    assert mean_rank(table, [False, True]) == [2.0, 2.5, 1.5]


def test_equal_values_share_the_average_of_their_ranks():
    assert mean_rank([[1.0], [1.0], [0.0], [2.0]], [False]) == [2.5, 2.5, 1.0, 4.0]
    assert mean_rank([[3.0]] * 5, [True]) == [3.0] * 5
    assert mean_rank([[0.0], [-0.0]], [True]) == [1.5, 1.5]


def test_ranks_of_one_metric_add_up():
    torch.manual_seed(0)
    table = torch.randint(0, 4, (7, 30)).tolist()
    assert sum(mean_rank(table, [k % 2 == 0 for k in range(30)])) == pytest.approx(7 * 8 / 2)


def test_a_run_that_diverged_is_last():
    assert mean_rank([[math.inf], [1.0], [2.0]], [False]) == [3.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([], [True]), "found 0 methods and 1 entries"),
        (([[]], []), "found 1 methods and 0 entries"),
        (
            ([[1.0, 2.0], [1.0]], [True, False]),
            "expected 2 of every method, as in higher_is_better, found 1 of method 1",
        ),
        (([[1.0], [math.nan]], [True]), "found NaN in metric 0 of method 1; leave"),
    ],
)
def test_mean_rank_errors(arguments, words):
    with pytest.raises(ValueError, match=words):
        mean_rank(*arguments)


# ---- statistics of gradients -----------------------------------------------------------------------------------------


def gradients(tasks=4, columns=100, seed=0):
    return torch.randn(tasks, columns, generator=torch.Generator().manual_seed(seed))


def test_statistics_against_linalg():
    rows = gradients()
    exact = rows.double()
    found = gradient_statistics(rows)
    values = torch.linalg.svdvals(exact)
    norms = exact.norm(dim=1)
    torch.testing.assert_close(found.singular_values, values)
    torch.testing.assert_close(found.condition_number, values[0] / values[-1])
    torch.testing.assert_close(found.norms, norms)
    torch.testing.assert_close(found.cosine, torch.nn.functional.cosine_similarity(exact[:, None], exact[None], dim=2))
    outer = norms[:, None] * norms
    torch.testing.assert_close(found.magnitude_similarity, 2 * outer / (norms[:, None] ** 2 + norms**2))
    assert all(value.dtype == torch.float64 for value in found)
    assert [tuple(value.shape) for value in found] == [(), (4,), (4, 4), (4, 4), (4,)]


def test_known_values():
    found = gradient_statistics([torch.tensor([3.0, 0.0]), torch.tensor([0.0, 1.0])])
    assert found.condition_number == pytest.approx(3.0)
    assert found.magnitude_similarity[0, 1] == pytest.approx(0.6)
    assert found.cosine[0, 1] == 0.0
    opposite = gradient_statistics([torch.tensor([1.0, 2.0]), torch.tensor([-1.0, -2.0])])
    assert opposite.cosine[0, 1] == pytest.approx(-1.0)
    assert opposite.condition_number > 1e7


def test_takes_rows_in_every_form():
    rows = gradients(3, 10)
    expected = gradient_statistics(rows)
    parts = rows.split([4, 6], 1)
    for form in (list(rows), [[part[t] for part in parts] for t in range(3)], ops.Stacked(parts)):
        for found, value in zip(gradient_statistics(form), expected):
            torch.testing.assert_close(found, value)


def test_wants_no_gradient():
    assert not any(value.requires_grad for value in gradient_statistics(gradients().requires_grad_()))


def test_one_gram_and_nothing_read_by_the_host():
    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    called = []
    with Record():
        gradient_statistics(gradients())
    assert called.count("mtlgrad.gram.default") == 1
    assert "aten._local_scalar_dense.default" not in called


@pytest.mark.parametrize("scale", [1e-24, 1e-15, 1e-3, 1e6, 1e18])
def test_a_common_factor_changes_lengths_alone(scale):
    rows = gradients()
    expected, found = gradient_statistics(rows), gradient_statistics(rows * scale)
    for name in ("condition_number", "cosine", "magnitude_similarity"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-6)
    for name in ("singular_values", "norms"):
        torch.testing.assert_close(getattr(found, name) / scale, getattr(expected, name), rtol=1e-6, atol=0.0)


def test_lengths_far_apart():
    rows = gradients(2)
    found = gradient_statistics([rows[0] * 1e-20, rows[1] * 1e15])
    torch.testing.assert_close(found.cosine[0, 1], gradient_statistics(rows).cosine[0, 1], rtol=1e-5, atol=1e-7)
    assert 0.0 < found.magnitude_similarity[0, 1] < 1e-30


def test_bounds_hold_in_spite_of_rounding():
    rows = gradients(1, 1000).expand(5, -1) * torch.arange(1.0, 6.0)[:, None]
    found = gradient_statistics(rows)
    assert found.cosine.abs().max() <= 1.0
    assert found.magnitude_similarity.max() <= 1.0


def test_a_zero_gradient_has_no_direction():
    rows = gradients()
    others = gradient_statistics(rows[[0, 2, 3]])
    rows[1] = 0.0
    found = gradient_statistics(rows)
    assert found.cosine[1].isnan().all()
    assert found.cosine[:, 1].isnan().all()
    assert found.magnitude_similarity[1, [0, 2, 3]].eq(0.0).all()
    assert found.magnitude_similarity[1, 1].isnan()
    assert found.norms[1] == 0.0
    assert found.condition_number > 1e7  # infinite, but for rounding in the eigenvalues
    rest = torch.tensor([0, 2, 3])
    torch.testing.assert_close(found.cosine[rest][:, rest], others.cosine)
    torch.testing.assert_close(found.singular_values[:3], others.singular_values)


@pytest.mark.parametrize("rows", [torch.zeros(3, 5), torch.zeros(3, 0)])
def test_all_gradients_zero(rows):
    found = gradient_statistics(rows)
    assert found.condition_number.isnan()
    assert found.cosine.isnan().all()
    assert found.magnitude_similarity.isnan().all()
    assert found.norms.eq(0.0).all()
    assert found.singular_values.eq(0.0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_task_that_is_not_finite(value):
    rows = gradients()
    others = gradient_statistics(rows[[0, 2, 3]])
    rows[1, 7] = value
    found = gradient_statistics(rows)
    rest = torch.tensor([0, 2, 3])
    for name in ("cosine", "magnitude_similarity"):
        matrix = getattr(found, name)
        assert matrix[1].isnan().all()
        assert matrix[:, 1].isnan().all()
        torch.testing.assert_close(matrix[rest][:, rest], getattr(others, name))
    assert found.norms.isfinite().tolist() == [True, False, True, True]
    assert found.condition_number.isnan()
    assert found.singular_values.isnan().all()


def test_one_task():
    found = gradient_statistics(torch.ones(1, 4))
    assert found.condition_number == 1.0
    assert found.norms == 2.0


def test_statistics_errors():
    with pytest.raises(ValueError, match="gram: rows: expected at least one row"):
        gradient_statistics([])
