"""alphaVIL's search: the derivative in alpha, what is kept of it, and that it leaves the model alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mtlgrad import AlphaVIL
from mtlgrad.alphavil import Task
from tests.support.bounds import contents, near, one_line, same_values
from tests.support.nets import ALPHA, Case, epoch
from tests.support.oracles import Literal, checked, development_loss, recorder, transplanted

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = ("own", "none", "all")
PLACES = [torch.tensor(p, dtype=torch.float64) for p in ([0.0, 0.0, 0.0], [1.0, -2.0, 0.5], [7.0, 0.0, 1.0])]


# ---- the derivative -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("heads", HEADS)
def test_the_gradient_is_of_inner_products(heads: Any, dtype: torch.dtype) -> None:
    """d loss / d alpha_t = <gradient at theta + sum alpha delta, delta_t>, at 1 and far from it; the loss is that
    there."""
    case = Case(dtype=dtype, norm=True, tied=True, odd=True, also=True)
    literal = Literal(case, include_heads=heads)
    theta = {n: p.detach().clone() for n, p in case.model.named_parameters() if p.requires_grad}
    make, seen = recorder(PLACES)
    with pytest.warns(RuntimeWarning, match="alpha = 1"):
        case.vil(alpha_optimizer=make, include_heads=heads, alpha_epochs=1).epoch()
    merged = dict(case.model.named_buffers())
    parts, deltas = case.trained_on(), []
    for task in case.tasks:
        after, _, _ = literal.train(task, parts[task])
        deltas.append({n: (value - theta[n]).double() for n, value in after.items()})
    task, tolerance = case.tasks["size"], 1e-11 if dtype == torch.float64 else 1e-4
    assert len(seen) == 2 * 4
    for i, (alphas, loss, gradient) in enumerate(seen):
        assert gradient.dtype == torch.float64
        fixed = {n for n in theta if heads == "none" and literal.owners(n)}
        there = {n: value.double() for n, value in theta.items()}
        for alpha, delta in zip(alphas.tolist(), deltas):
            for n, d in delta.items():
                there[n] = there[n] + (1.0 if n in fixed else alpha) * d
        leaves = {n: value.to(dtype).requires_grad_() for n, value in there.items()}
        want = task.loss(transplanted(case.model, leaves, merged), task.dev[i // 4])  # type: ignore[index]
        slopes = torch.autograd.grad(want, list(leaves.values()), allow_unused=True)
        at = {n: s.double() for n, s in zip(leaves, slopes) if s is not None and n not in fixed}
        products = [sum(float((at[n] * d).sum()) for n, d in delta.items() if n in at) for delta in deltas]
        assert loss == pytest.approx(want.item(), rel=tolerance)
        assert near(gradient, torch.tensor(products, dtype=torch.float64), tolerance)


@pytest.mark.parametrize("heads", HEADS)
def test_gradcheck(heads: Any) -> None:
    case = Case(dtype=torch.float64, norm=True, tied=True, also=True)
    vil = case.vil(alpha_optimizer=checked(PLACES), include_heads=heads, alpha_epochs=1)
    assert epoch(vil).kept == "start"


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_a_quadratic_has_its_minimum_where_algebra_has_it(tasks: int) -> None:
    """A linear model: the development loss is a parabola in alpha, and LBFGS is to find its bottom."""

    def loss(model: Any, batch: Any) -> Tensor:
        x, y = batch
        return (model(x).squeeze(1) - y).square().mean()

    torch.manual_seed(0)
    model = nn.Linear(8, 1).double()
    data = [[(torch.randn(9, 8).double(), torch.randn(9).double())] for _ in range(tasks)]
    x, y = torch.randn(40, 8).double(), torch.randn(40).double()
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    deltas = []
    for ((a, b),) in data:
        slopes = torch.autograd.grad(loss(model, (a, b)), list(model.parameters()))
        deltas.append(-0.05 * torch.cat([s.flatten() for s in slopes]))
    whole = torch.cat([x, torch.ones(40, 1).double()], 1)
    moves = whole @ torch.stack(deltas, 1)
    best = torch.linalg.lstsq(moves, y - whole @ theta).solution
    names = [Task(each, loss, [(x, y)]) for each in data]
    exact = {"tolerance_grad": 0.0, "tolerance_change": 0.0}
    lbfgs = lambda ps: torch.optim.LBFGS(ps, max_iter=50, line_search_fn="strong_wolfe", **exact)  # noqa: E731
    sgd = lambda ps: torch.optim.SGD(ps, lr=0.05)  # noqa: E731
    vil = AlphaVIL(model, names, 0, make_optimizer=sgd, alpha_optimizer=lbfgs, alpha_epochs=3)
    assert vil.epoch().kept == "search"
    assert near(vil.alphas, best, 1e-6)
    moved = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert near(moved, theta + torch.stack(deltas, 1) @ best, 1e-6)


# ---- what is kept ---------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1000),
    lr=st.floats(-8.0, 8.0).map(lambda e: 10.0**e),
    alpha_lr=st.floats(-3.0, 5.0).map(lambda e: 10.0**e),
    inner=st.sampled_from([torch.optim.SGD, torch.optim.Adam]),
    alpha=st.sampled_from([torch.optim.SGD, torch.optim.Adam, torch.optim.LBFGS]),
    norm=st.booleans(),
    tasks=st.sampled_from([["size"], ["size"], ["size"], ["kind"], ["marks", "size"]]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_development_loss_is_never_raised(
    seed: int, lr: float, alpha_lr: float, inner: Any, alpha: Any, norm: bool, tasks: list[str], dtype: torch.dtype
) -> None:
    """Whatever the steps are: evaluated from outside, before and after, with the buffers that the model then has."""
    few: dict[str, Any] = {"max_iter": 3} if alpha is torch.optim.LBFGS else {}
    case = Case(tasks=tasks, seed=seed, norm=norm, count=2, dtype=dtype)
    task = case.tasks[case.target]
    vil = case.vil(make_optimizer=lambda ps: inner(ps, lr=lr), alpha_optimizer=lambda ps: alpha(ps, lr=alpha_lr, **few))
    for _ in range(2):
        theta, weights = contents(case.model), vil.task_weights.clone()
        before = development_loss(case.model, task)
        found = epoch(vil)
        after = development_loss(case.model, task)
        assert after <= before
        assert (found.before, found.after) == (before, after)
        assert all(value.isfinite().all() for value in contents(case.model).values())
        assert vil.task_weights.isfinite().all()
        if found.kept == "none":
            assert same_values(contents(case.model), theta)
            assert torch.equal(vil.task_weights, weights)
            assert after == before
            assert not vil.alphas.any()
        else:
            assert after == min([found.start, *(one for one in found.searched if not math.isnan(one))])


class Path(torch.optim.SGD):
    """Goes where it is told to, an entry a step, and nowhere then."""

    def __init__(self, parameters: Any, path: list[Any]):
        super().__init__(parameters, lr=0.0)
        self.path = iter(path)

    def step(self, closure: Any = None) -> Any:
        assert closure is not None
        closure()
        place = next(self.path, None)
        if place is not None:
            with torch.no_grad():
                self.param_groups[0]["params"][0].copy_(torch.as_tensor(place, dtype=torch.float64))


def quadratic(bottom: float = 3.0) -> tuple[nn.Linear, Task]:
    """theta = 0, and a step that brings it to 1: the development loss is (alpha - bottom)^2."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    data = torch.ones(1, 1).double()

    def loss(m: Any, x: Tensor) -> Tensor:
        return -m(x).sum() if m.training else (m(x) - bottom).square().sum()

    return model, Task([data], loss, [data])


def on(path: list[float], bottom: float = 3.0, **options: Any) -> tuple[nn.Linear, AlphaVIL]:
    model, task = quadratic(bottom)
    make = lambda ps: torch.optim.SGD(ps, lr=1.0)  # noqa: E731
    walk = lambda ps: Path(ps, path)  # noqa: E731
    return model, AlphaVIL(
        model, [task], 0, make_optimizer=make, alpha_optimizer=walk, **{"alpha_epochs": len(path), **options}
    )


def test_the_best_alpha_seen_is_kept() -> None:
    """Neither the last nor the first; of equals the first."""
    model, vil = on([2.0, 3.5, 4.0, 2.5, 9.0])
    found = vil.epoch()
    assert (model.weight.item(), vil.alphas.tolist(), vil.task_weights.tolist()) == (3.5, [3.5], [3.5])
    assert (found.before, found.start, found.after, found.kept) == (9.0, 4.0, 0.25, "search")
    assert found.searched == [1.0, 0.25, 1.0, 0.25, 36.0]


def test_a_search_that_finds_nothing_says_so() -> None:
    model, vil = on([6.0, -1.0])
    with pytest.warns(RuntimeWarning, match="'0'") as warned:
        found = vil.epoch()
    assert (model.weight.item(), vil.alphas.tolist(), vil.task_weights.tolist()) == (1.0, [1.0], [1.0])
    assert (found.kept, found.after) == ("start", 4.0)
    (warning,) = warned
    one_line(warning.message, "AlphaVIL: ", "target '0'", "expected", "found", "alpha = 1", "alpha_optimizer")  # type: ignore[arg-type]


def test_a_round_that_finds_nothing_better_than_before_is_not_made() -> None:
    model, vil = on([2.0, 3.0], bottom=-0.1)
    with pytest.warns(RuntimeWarning, match="'0'") as warned:
        found = vil.epoch()
    assert (model.weight.item(), vil.alphas.tolist(), vil.task_weights.tolist()) == (0.0, [0.0], [1.0])
    assert (found.kept, found.after) == ("none", found.before)
    (warning,) = warned
    one_line(warning.message, "AlphaVIL: ", "target '0'", "expected", "found none", "stay")  # type: ignore[arg-type]
    assert vil.rounds == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_alphas_that_are_no_numbers(bad: float) -> None:
    """The search ends there, and what was best before it is kept."""
    model, vil = on([2.5, bad, 3.0])
    found = vil.epoch()
    assert (model.weight.item(), found.kept) == (2.5, "search")
    assert len(found.searched) == 2
    assert math.isnan(found.searched[1])
    assert epoch(vil).start == (2.5 + 2.5 - 3.0) ** 2  # the next is as if nothing was


def test_clipped_after_each_step() -> None:
    model, vil = on([9.0, -9.0, 2.0], clip_alpha=(0.5, 2.5), bottom=2.6)
    found = vil.epoch()
    assert (model.weight.item(), found.alphas.tolist()) == (2.5, [2.5])
    assert found.searched == pytest.approx([0.01, 4.41, 0.36])


def test_the_loss_shown_is_that_of_the_model_afterwards() -> None:
    """Bit for bit: the search has seen the very parameters that the model then has."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        case = Case(dtype=dtype, also=True)
        found = epoch(case.vil(alpha_optimizer=ALPHA["adam"]))
        assert found.kept == "search"
        assert development_loss(case.model, case.tasks["size"]) == found.after
