"""Delta_m, mean rank, statistics of gradients, dominance: formulas, signs, scales, errors."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mtlgrad import IMTLG, ops
from mtlgrad.metrics import Dominance, delta_m, gradient_statistics, mean_rank
from mtlgrad.optim import AdaTaskAdam

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
    assert found.update_cosine is None
    assert all(value.dtype == torch.float64 for value in found[:5])
    assert [tuple(value.shape) for value in found[:5]] == [(), (4,), (4, 4), (4, 4), (4,)]


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 1e-20), (torch.float64, 1.0), (torch.bfloat16, 1e15)], ids=str
)
def test_update_cosine_against_the_update(dtype, scale):
    rows = gradients() * torch.tensor([[1.0], [-3.0], [1e-3], [40.0]])
    rows[1] -= 0.4 * rows[3]
    weights = torch.tensor([0.5, 0.25, -2.0, 0.125], dtype=dtype)  # the last two turn the update against themselves
    found = gradient_statistics(rows * scale, weights).update_cosine
    update = weights.double() @ rows.double()
    expected = torch.nn.functional.cosine_similarity(rows.double(), update[None])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert found.dtype == torch.float64
    assert found.min() < -0.1


def test_update_cosine_of_a_rules_weights():
    rule = IMTLG(3)
    p = torch.nn.Parameter(torch.zeros(20))
    p.jac = gradients(3, 20)
    jacobian = p.jac.clone()
    rule.merge([p])
    found = gradient_statistics(jacobian, rule.weights).update_cosine
    torch.testing.assert_close(found, found[:1].expand(3))  # equal projections on the unit gradients
    torch.testing.assert_close(found[0], torch.cosine_similarity(jacobian[0].double(), p.grad.double(), 0))


def test_an_update_without_a_direction():
    rows = gradients()
    assert gradient_statistics(rows, torch.zeros(4)).update_cosine.isnan().all()
    assert gradient_statistics(torch.zeros(2, 5), torch.ones(2)).update_cosine.isnan().all()
    rows[1] = 0.0
    found = gradient_statistics(rows, torch.ones(4)).update_cosine
    assert found.isnan().tolist() == [False, True, False, False]
    # Gradients that cancel up to rounding: what is left points nowhere.
    weights = torch.tensor([0.3, 0.7, 1.0], dtype=torch.float64)
    for seed in range(20):
        others = gradients(2, seed=seed).double()
        third = -(0.3 * others[0] + 0.7 * others[1])
        assert gradient_statistics([*others, third], weights).update_cosine.isnan().all()
    rows[2, 7] = math.nan
    assert gradient_statistics(rows, torch.ones(4)).update_cosine.isnan().all()


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
    found = gradient_statistics(gradients().requires_grad_(), torch.ones(4, requires_grad=True))
    assert not any(value.requires_grad for value in found)


def test_one_gram_and_nothing_read_by_the_host():
    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    called = []
    with Record():
        gradient_statistics(gradients(), torch.ones(4))
    assert called.count("mtlgrad.gram.default") == 1
    assert "aten._local_scalar_dense.default" not in called


@pytest.mark.parametrize("scale", [1e-24, 1e-3, 1e18])
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
    for weights, words in (
        (torch.ones(3), r"expected shape \[4\], found \[3\]"),
        (torch.ones(4, 1), r"expected shape \[4\], found \[4, 1\]"),
        (torch.ones(4, dtype=torch.int64), "expected float32, float64, float16 or bfloat16, found torch.int64"),
        (torch.ones(4, device="meta"), "expected device cpu like rows, found meta"),
    ):
        with pytest.raises(RuntimeError, match=f"^gradient_statistics: weights: {words}"):
            gradient_statistics(gradients(), weights)


# ---- dominance under an ordinary optimizer ---------------------------------------------------------------------------

ORDINARY = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.9), amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-3, weight_decay=0.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, eps=1e-2),
    "centered": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.3, initial_accumulator_value=0.2),
}


def moved(optimizer, parameters, jacobians):
    """Steps along the sum of the tasks' gradients; what is taken off each parameter."""
    before = [p.detach().clone() for p in parameters]
    for p, jacobian in zip(parameters, jacobians, strict=True):
        p.jac, p.grad = jacobian, jacobian.sum(0)
    optimizer.step()
    return [b - p.detach() for b, p in zip(before, parameters, strict=True)]


@pytest.mark.parametrize("make", ORDINARY.values(), ids=ORDINARY)
def test_the_tasks_updates_add_up_to_the_optimizers(make):
    """Parameters of one element and positive gradients: the root of the square, undamped, is a task's update."""
    torch.manual_seed(0)
    parameters = [torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(6)]
    optimizer = make(parameters)
    dominance = Dominance(optimizer, num_tasks=3, decay=0.0)
    for step in range(7):
        optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)  # of a schedule
        jacobians = [torch.rand(3, 1, dtype=torch.float64) * torch.tensor([[1.0], [5.0], [0.01]]) for _ in parameters]
        steps = moved(optimizer, parameters, jacobians)
        dominance.update()
        for i, taken in enumerate(steps):
            found = dominance.state_dict()["state"][i]["update_square"].sqrt()
            torch.testing.assert_close(found.sum(), taken.sum(), rtol=1e-9, atol=0.0)
            assert found.min() > 0.0


@pytest.mark.parametrize("make", ORDINARY.values(), ids=ORDINARY)
def test_shares_are_of_averaged_squares_of_real_updates(make):
    """Each task reaches elements of its own, so that what moved there is its update."""
    torch.manual_seed(1)
    parameters = [torch.zeros(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    optimizer = make(parameters)
    dominance, squares = Dominance(optimizer, num_tasks=3, decay=0.7), torch.zeros(2, 3, dtype=torch.float64)
    factors = torch.tensor([1.0, 30.0, 0.1], dtype=torch.float64)
    for _ in range(6):
        jacobians = [torch.diag_embed(torch.randn(4, 3).double() * factors).permute(1, 0, 2) for _ in parameters]
        taken = torch.stack([step.square().sum(0) for step in moved(optimizer, parameters, jacobians)])
        squares = 0.7 * squares + 0.3 * taken
        dominance.update(dict(zip(parameters, jacobians, strict=True)))
    both = dominance.shares()
    torch.testing.assert_close(both, squares.sum(0, keepdim=True) / squares.sum(), rtol=1e-8, atol=0.0)
    each = dominance.shares({"a": [parameters[0]], "b": iter([parameters[1]]), "none": [torch.zeros(3)], "empty": []})
    torch.testing.assert_close(each[:2], squares / squares.sum(1, keepdim=True), rtol=1e-8, atol=0.0)
    assert each.shape == (4, 3)
    assert each.dtype == torch.float64
    assert each[2:].isnan().all()


def test_weight_decay_is_no_tasks_and_its_momentum_no_updates():
    torch.manual_seed(0)
    jacobian = torch.randn(2, 5)
    for settings in ({"weight_decay": 0.5}, {"momentum": 0.9}):
        found = []
        for extra in ({}, settings):
            p = torch.ones(5, requires_grad=True)
            optimizer = torch.optim.RMSprop([p], lr=1e-3, **extra)
            dominance = Dominance(optimizer, 2)
            p.grad = jacobian.sum(0)
            optimizer.step()
            with torch.no_grad():
                optimizer.state[p]["square_avg"].fill_(1.0)
            dominance.update({p: jacobian})
            found.append(dominance.state_dict()["state"][0]["update_square"])
        torch.testing.assert_close(*found)


def test_dominance_goes_on_from_a_checkpoint():
    torch.manual_seed(0)
    parameters = [torch.zeros(3, requires_grad=True), torch.zeros(2, 2, requires_grad=True)]
    optimizer = torch.optim.Adam(parameters)
    whole = Dominance(optimizer, 2)

    def step(*watching):
        moved(optimizer, parameters, [torch.randn(2, *p.shape) for p in parameters])
        for one in watching:
            one.update()

    for _ in range(3):
        step(whole)
    state = whole.state_dict()
    second = Dominance(optimizer, 2)
    second.load_state_dict(state)
    for _ in range(3):
        step(whole, second)
    assert torch.equal(whole.shares([[p] for p in parameters]), second.shares([[p] for p in parameters]))


def test_half_precision_is_measured_in_float32():
    p = torch.zeros(1000, dtype=torch.bfloat16, requires_grad=True)
    optimizer = torch.optim.Adam([p], lr=1e-3)
    dominance = Dominance(optimizer, 2)
    for _ in range(300):
        p.grad = torch.full_like(p, 3.0)
        optimizer.step()
        dominance.update({p: torch.stack([torch.full_like(p, 1.0), torch.full_like(p, 2.0)])})
    torch.testing.assert_close(dominance.shares(), torch.tensor([[0.2, 0.8]], dtype=torch.float64), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (lambda p: Dominance(torch.optim.SGD([p], 0.1), 2), "or Adagrad, found SGD; its update is not known here"),
        (lambda p: Dominance(AdaTaskAdam([p], num_tasks=2), 2), r"found AdaTaskAdam; use its dominance\(\)"),
        (lambda p: Dominance(torch.optim.Adam([p]), 0), "num_tasks: expected a whole number from 1, found 0"),
        (lambda p: Dominance(torch.optim.Adam([p]), 2, 1.0), "decay: expected a number from 0, below 1, found 1.0"),
        (
            lambda p: Dominance(torch.optim.Adam([p]), 2).update(),
            r"found none, and no .jac; call it after task_backward",
        ),
        (
            lambda p: Dominance(torch.optim.Adam([p]), 2).update({p: torch.zeros(3, 4)}),
            r"expected \[2, 4\], one row a task, found \[3, 4\]",
        ),
        (
            lambda p: Dominance(torch.optim.Adam([p]), 2).update({p: torch.zeros(2, 4)}),
            r"moved by the optimizer, found one \[4\] that is not; call it after optimizer.step",
        ),
        (
            lambda p: Dominance(torch.optim.Adam([p]), 2).update({torch.zeros(4): torch.zeros(2, 4)}),
            r"parameters of the optimizer, found one \[4\]",
        ),
    ],
)
def test_dominance_errors(work, words):
    with pytest.raises((TypeError, ValueError), match=words):
        work(torch.zeros(4, requires_grad=True))
