"""AdaTask's steps on every backend: against the papers' rules in float64 and against torch.optim, for all types and
sizes; average squared updates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mtlgrad import ops, reference
from tests.support.adatask_cases import (
    EVERY_RULE,
    EVERY_TYPE,
    HALF,
    KINDS,
    RULES,
    SINGLE,
    TYPES,
    Rule,
    State,
    assert_same,
    begin,
    call,
    check,
    exact,
    gradients,
    step,
    weights_of,
)
from tests.support.gradient_cases import normal

SIZES = [0, 1, 31, 32, 33, 255, 257, 1000, 70_000]

# ---- the rules -------------------------------------------------------------------------------------------------------


@EVERY_RULE
def test_reference_is_the_papers_rule(rule: str) -> None:
    """Ten steps in float64, tasks coming and going."""
    state = begin(RULES[rule], [(4, 5), (7,), ()], 3, [TYPES[-1]])
    options = {"task_weights": weights_of(3), "square_decay": 0.9}
    want = state
    for k in range(10):
        jacobians = gradients(state, 3, seed=100 * k)
        present = torch.tensor([k % 2 == 0, k % 3 != 1, True]) if k else None
        found = exact(RULES[rule], want, jacobians, present=present, **options)
        call(reference, RULES[rule], state, jacobians, present=present, **options)
        want = found.state
        for (name, got), right in zip(state.named().items(), want.named().values()):
            assert ((got.double() - right).abs() <= 1e-12 * found.terms[name]).all(), (name, k)


def peer(rule: str, parameter: Tensor) -> torch.optim.Optimizer:
    """torch.optim's optimizer of the name, on one parameter."""
    settings = dict(RULES[rule].settings)
    decoupled = settings.pop("decoupled", False)
    shared: dict[str, Any] = {"foreach": False, **settings}
    if RULES[rule].op == "adagrad":
        return torch.optim.Adagrad([parameter], initial_accumulator_value=0.1, **shared)
    if RULES[rule].op == "rmsprop":
        return torch.optim.RMSprop([parameter], centered="grad_avgs" in RULES[rule].moments, **shared)
    amsgrad = "max_exp_avg_sqs" in RULES[rule].moments
    return (torch.optim.AdamW if decoupled else torch.optim.Adam)(
        [parameter], amsgrad=amsgrad, **{"weight_decay": 0.0, **shared}
    )


STATE_NAMES = {"exp_avgs": "exp_avg", "exp_avg_sqs": "exp_avg_sq", "max_exp_avg_sqs": "max_exp_avg_sq"}
STATE_NAMES |= {"square_avgs": "square_avg", "grad_avgs": "grad_avg", "state_sums": "sum"}


@EVERY_RULE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("module", [ops, reference], ids=["ops", "reference"])
def test_one_task_is_torch_optim(module: Any, dtype: torch.dtype, rule: str, device: str) -> None:
    """From the first step on, in float64 to 1e-12 over all steps; in float32 every step by itself, from the same state,
    to four units of the last place of what was added up:
    two for each side, as the gradient with its weight decay is rounded twice before it is squared."""
    theirs = torch.nn.Parameter(normal(1, 300).to(dtype).to(device))
    optimizer = peer(rule, theirs)
    start = 0.1 if RULES[rule].op == "adagrad" else 0.0
    ours = State(
        [theirs.detach().clone()],
        {n: [[torch.full_like(theirs, start, requires_grad=False)]] for n in RULES[rule].moments},
        [torch.zeros_like(theirs, requires_grad=False)] if RULES[rule].buffered else [],
        [torch.zeros(1, device=device)],
    )
    for k in range(10):
        theirs.grad = normal(10 + k, 300).to(dtype).to(device) * 1.5 ** (k - 5)
        terms = exact(RULES[rule], ours, [theirs.grad[None]]).terms
        optimizer.step()
        call(module, RULES[rule], ours, [theirs.grad[None]])
        values = optimizer.state[theirs]
        pairs = {f"{n}[0][0]": (ours.moments[n][0][0], values[STATE_NAMES[n]]) for n in RULES[rule].moments}
        if ours.buffers:
            pairs["buffers[0]"] = (ours.buffers[0], values["momentum_buffer"])
        pairs["parameters[0]"] = (ours.parameters[0], theirs.detach())
        for name, (a, b) in pairs.items():
            limit = terms[name] * (1e-12 if dtype == torch.float64 else 4 * 2.0**-23)
            assert ((a - b).abs().cpu() <= limit).all(), (name, k)
            if dtype == torch.float32:
                a.copy_(b)
        assert ours.steps[0].item() == k + 1


@EVERY_RULE
def test_a_parameter_moves_by_the_sum_of_what_each_task_would_do(rule: str, device: str) -> None:
    """Every task alone, with moments of its own, starting from the same parameters and no weight on the others."""
    tasks, settings = 4, {n: v for n, v in RULES[rule].settings.items() if n != "weight_decay"}
    plain = RULES[rule]._replace(settings=settings)
    state = begin(plain, [(3, 11)], tasks, [TYPES[-1]])
    for buffer in state.buffers:
        buffer.zero_()
    jacobians, weights = gradients(state, tasks), weights_of(tasks)
    together, total = state.to(device), torch.zeros(3, 11, dtype=torch.float64)
    call(ops, plain, together, [j.to(device) for j in jacobians], task_weights=weights)
    for t in range(tasks):
        alone = state.clone().task(t).to(device)
        call(ops, plain, alone, [j[t : t + 1].to(device) for j in jacobians], task_weights=weights[t : t + 1])
        total += alone.parameters[0].cpu() - state.parameters[0]
        for name in plain.moments:
            assert torch.equal(alone.moments[name][0][0], together.moments[name][0][t])
    moved = together.parameters[0].cpu() - state.parameters[0]
    assert (moved - total).abs().max() <= 1e-14 * (1 + moved.abs().max())


def test_defaults_are_those_of_torch(device: str) -> None:
    """Called without any setting."""
    classes = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop, "adagrad": torch.optim.Adagrad}
    for name, optimizer_class in classes.items():
        theirs = torch.nn.Parameter(normal(1, 50).to(device))
        rule = Rule(name, RULES[{"adam": "adam", "rmsprop": "rmsprop", "adagrad": "adagrad"}[name]].moments, {})
        moments = {n: [[torch.zeros_like(theirs, requires_grad=False)]] for n in rule.moments}
        ours = State([theirs.detach().clone()], moments, [], [torch.zeros(1, device=device)])
        optimizer = optimizer_class([theirs], foreach=False)
        for k in range(3):
            theirs.grad = normal(2 + k, 50).to(device)
            optimizer.step()
            call(ops, rule, ours, [theirs.grad[None]])
        # Each class has its own learning rate: ops' are Adam's 1e-3 and 1e-2 otherwise.
        assert optimizer.defaults["lr"] == {"adam": 1e-3}.get(name, 1e-2)
        assert (ours.parameters[0] - theirs.detach()).abs().max() <= 1e-13


# ---- parity ----------------------------------------------------------------------------------------------------------


@EVERY_TYPE
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size: int, types: tuple[torch.dtype, torch.dtype], device: str) -> None:
    for rule in RULES if size <= 1000 else ("amsgrad, adamw", "centered, momentum", "adagrad, decay"):
        tasks = 3 if size <= 1000 else 2
        state = begin(RULES[rule], [(size,)], tasks, [types], seed=size)
        check(rule, state, gradients(state, tasks), device, task_weights=weights_of(tasks), square_decay=0.9)


@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 5, 6, 7, 8, 20, 33])
def test_numbers_of_tasks(tasks: int, device: str) -> None:
    for rule in RULES:
        state = begin(RULES[rule], [(257,), (3, 11)], tasks)
        present = torch.tensor([t % 5 != 2 for t in range(tasks)])
        check(rule, state, gradients(state, tasks), device, task_weights=weights_of(tasks))
        check(rule, state, gradients(state, tasks), device, task_weights=weights_of(tasks), present=present)


def unequal(count: int) -> list[tuple[int, ...]]:
    """Most tiny, some empty, one large, of one dimension or three, or none."""
    shapes: list[tuple[int, ...]] = [(), (0,), (1,), (3, 0, 2), (7,), (2, 3, 5), (64,), (33, 9)]
    chosen = [shapes[(5 * p + 3) % len(shapes)] for p in range(count)]
    chosen[count // 2] = (40_001,) if count < 100 else (3_000,)
    return chosen


@pytest.mark.parametrize("count", [1, 10, 300])
@pytest.mark.parametrize("rule", KINDS)
def test_many_tensors_of_mixed_sizes_and_types(rule: str, count: int, device: str) -> None:
    """In one call, and each by itself: the same bits, but for sums over a tensor."""
    state = begin(RULES[rule], unequal(count), 3, TYPES)
    jacobians = gradients(state, 3)
    got = check(rule, state, jacobians, device, task_weights=weights_of(3)).to("cpu").named()
    for p in range(0, count, 1 if count < 100 else 23):
        moments = {n: lists[p : p + 1] for n, lists in state.moments.items()}
        buffers, squares = state.buffers[p : p + 1], state.squares[p : p + 1]
        part = State(state.parameters[p : p + 1], moments, buffers, state.steps[p : p + 1], squares)
        alone = step(rule, part, jacobians[p : p + 1], device, task_weights=weights_of(3))
        for name, tensor in alone.named().items():
            other = got[name.replace("[0]", f"[{p}]", 1)]
            same = (
                torch.allclose(tensor, other, rtol=1e-6) if name.startswith("squares") else torch.equal(tensor, other)
            )
            assert same, (name, p)


def test_more_columns_than_a_share(device: str) -> None:
    """Shares of 32,768 columns and more begin and end inside of tensors; sums are put together from them."""
    sizes = [(20_000,), (40_000,), (1,), (33_000,)] if device != "cuda" else [(200_000,), (1,), (3_000_000,)]
    state = begin(RULES["adam, decay"], sizes, 2)
    check("adam, decay", state, gradients(state, 2), device, task_weights=weights_of(2), square_decay=0.5)


def test_nothing_to_do(device: str) -> None:
    ops.adatask_adam([], [], [], [], [])
    ops.adatask_rmsprop([], [], [], [])
    ops.adatask_adagrad([], [], [], [])
    for rule in KINDS:
        for shapes in ([(0,)], [(0, 3), (2, 0)]):
            state = begin(RULES[rule], shapes, 3)
            after = check(rule, state, gradients(state, 3), device)
            assert torch.equal(after.steps[0].cpu(), state.steps[0] + 1)


@pytest.mark.parametrize("rate", [0.05, torch.tensor(0.05), torch.tensor([0.05], dtype=torch.float64)], ids=type)
def test_learning_rate_as_number_or_tensor(rate: Any, device: str) -> None:
    for rule in KINDS:
        state = begin(RULES[rule], [(40,)], 3)
        jacobians = gradients(state, 3)
        after = state.to(device)
        call(ops, RULES[rule], after, [j.to(device) for j in jacobians], lr=rate)
        want = step(rule, state, jacobians, device, lr=float(rate))
        assert_same(after, want)
        if device == "cuda" and isinstance(rate, Tensor):
            after = state.to(device)
            call(ops, RULES[rule], after, [j.to(device) for j in jacobians], lr=rate.to(device))
            assert_same(after, want)
        check(rule, state, jacobians, device, lr=float(rate))


def test_learning_rate_of_zero_moves_nothing_but_moments(device: str) -> None:
    for rule in KINDS:
        state = begin(RULES[rule], [(40,)], 3, squares=False)
        after = check(rule, state, gradients(state, 3), device, lr=0.0) if not state.buffers else None
        after = after or step(rule, state, gradients(state, 3), device, lr=0.0)
        assert torch.equal(after.parameters[0].cpu(), state.parameters[0])
        assert not torch.equal(
            after.moments[RULES[rule].moments[0]][0][0].cpu(), state.moments[RULES[rule].moments[0]][0][0]
        )


def test_first_step(device: str) -> None:
    """From moments of zero, of which Adam makes a step of the learning rate in the direction of the sign."""
    for rule in RULES:
        state = begin(RULES[rule], [(100,)], 3)
        for tensor in [*state.steps, *(m for lists in state.moments.values() for row in lists for m in row)]:
            tensor.zero_()
        check(rule, state, gradients(state, 3), device)
    state = begin(Rule("adam", RULES["adam"].moments, {"lr": 0.5, "eps": 0.0}), [(100,)], 1, [TYPES[-1]], squares=False)
    for tensor in [*state.steps, *(m for lists in state.moments.values() for row in lists for m in row)]:
        tensor.zero_()
    before, jacobians = state.parameters[0].clone(), gradients(state, 1)
    call(ops, Rule("adam", (), {"lr": 0.5, "eps": 0.0}), state, jacobians)
    assert (state.parameters[0] - (before - 0.5 * jacobians[0][0].sign())).abs().max() <= 1e-14


@pytest.mark.parametrize("count", [1.0, 10.0, 1000.0, 1e6, 2.0**24 - 2])
def test_large_step_counts(count: float, device: str) -> None:
    for rule in ("adam", "amsgrad", "adagrad, decay"):
        state = begin(RULES[rule], [(100,)], 3)
        state.steps[0] = torch.tensor([count, 0.0, count / 2])
        check(rule, state, gradients(state, 3), device)


def test_thousand_small_steps(device: str) -> None:
    """Moments and average squares stay with those of a float64 run: no error grows with the number of steps."""
    rule, tasks = RULES["adam"], 2
    state = begin(rule, [(20,)], tasks)
    for tensor in [*state.steps, *state.squares]:
        tensor.zero_()
    single = state.to(device)
    want = state
    for k in range(1000):
        jacobians = gradients(state, tasks, seed=k % 13)
        want = exact(rule, want, jacobians, square_decay=0.95, lr=1e-5).state
        call(ops, rule, single, [j.to(device) for j in jacobians], square_decay=0.95, lr=1e-5)
    got = single.to("cpu").named()
    for name, right in want.named().items():
        largest = float(right.abs().max())
        # Of a moment, the errors of the last 1 / (1 - beta) steps; a parameter of size one rounds a thousand times.
        tolerance = 1000 * 2.0**-25 if name.startswith("parameters") else 2e-6
        assert (got[name].double() - right).abs().max() <= tolerance * largest, name


# ---- tasks -----------------------------------------------------------------------------------------------------------


@EVERY_RULE
@pytest.mark.parametrize("present", [[False] * 3, [True, False, True], [False, False, True], [True] * 3], ids=str)
def test_absent_tasks_keep_everything(present: list[bool], rule: str, device: str) -> None:
    """A gradient that is NaN or infinite does not matter there; average squares of theirs decay."""
    state = begin(RULES[rule], [(50,), (3, 4)], 3, TYPES[:2])
    jacobians = gradients(state, 3)
    mask = torch.tensor(present)
    check(rule, state, jacobians, device, present=mask, square_decay=0.9)
    spoiled = [j.clone() for j in jacobians]
    for j in spoiled:
        j[~mask] = torch.nan
        j[~mask, ..., 0] = torch.inf
    after, other = (step(rule, state, j, device, present=mask, square_decay=0.9) for j in (jacobians, spoiled))
    assert_same(after, other)
    for p in range(2):
        for t in range(3):
            if present[t]:
                continue
            assert all(torch.equal(after.moments[n][p][t], state.moments[n][p][t]) for n in RULES[rule].moments)
            assert after.steps[p][t] == state.steps[p][t]
            assert float(after.squares[p][t]) == pytest.approx(0.9 * float(state.squares[p][t]), rel=1e-14)
    if not any(present) and not (state.buffers or RULES[rule].settings.get("decoupled")):
        assert all(torch.equal(a, b) for a, b in zip(after.parameters, state.parameters))


def test_a_task_that_was_never_there(device: str) -> None:
    """No step of it: a bias correction of 1 - b^0 = 0, which must not meet its zeros."""
    for rule in RULES:
        state = begin(RULES[rule], [(50,)], 3)
        state.steps[0][1] = 0.0
        for n in RULES[rule].moments:
            state.moments[n][0][1].zero_()
        state.squares[0][1] = 0.0
        for k in range(3):
            mask = torch.tensor([True, False, k != 1])
            state = check(rule, state, gradients(state, 3, seed=k), device, present=mask).to("cpu")
        assert state.steps[0][1] == 0
        assert state.squares[0][1] == 0
        # And when it comes at last, its first step is that of a task that begins.
        check(rule, state, gradients(state, 3, seed=9), device, present=torch.tensor([False, True, False]))


@EVERY_RULE
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_stay_with_their_task_and_element(bad: float, rule: str, device: str) -> None:
    for size, at, types in ((1, 0, SINGLE), (33, 32, HALF), (1000, 511, SINGLE)):
        state = begin(RULES[rule], [(size,), (5,)], 3, [types])
        jacobians = gradients(state, 3)
        clean = step(rule, state, jacobians, device)
        jacobians[0][1, at] = bad
        got = step(rule, state, jacobians, device)
        for name, tensor in got.named().items():
            right = clean.named()[name]
            if name in ("parameters[0]", "buffers[0]") or (name.endswith("[0][1]") and "[0][1]" in name):
                # AdaGrad and RMSProp of an infinite gradient: infinite over infinite.
                if name.startswith(("parameters", "buffers")):
                    assert tensor[at].isnan(), name
                else:
                    assert not tensor[at].isfinite(), name
                mask = torch.arange(size) != at
                assert torch.equal(tensor[mask], right[mask]), name
            elif name == "squares[0]":
                assert tensor[1].isnan()
                assert torch.equal(tensor[[0, 2]], right[[0, 2]])
            else:
                assert torch.equal(tensor, right), name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_parameter_that_is_not_finite_spoils_no_moments(bad: float, device: str) -> None:
    """Without weight decay, which nothing times infinity would make NaN."""
    for rule in ("adam", "amsgrad, adamw", "rmsprop", "adagrad"):
        state = begin(RULES[rule], [(300,)], 2)
        clean = step(rule, state, gradients(state, 2), device)
        state.parameters[0][7] = bad
        got = step(rule, state, gradients(state, 2), device)
        assert torch.equal(got.parameters[0].isfinite(), torch.arange(300) != 7)
        got.parameters[0][7] = clean.parameters[0][7]
        assert_same(got, clean, rule)


def test_a_variance_of_zero_may_round_below(device: str) -> None:
    """Centered: of gradients that are always the same, whose mean square less squared mean is noise."""
    rule = Rule("rmsprop", RULES["centered"].moments, {"lr": 0.02, "alpha": 0.75})
    for types in (SINGLE, HALF):
        state = begin(rule, [(2000,)], 1, [types], squares=False)
        values = normal(1, 2000)
        state.moments["grad_avgs"][0][0].copy_(values)
        state.moments["square_avgs"][0][0].copy_(state.moments["grad_avgs"][0][0].double().square() * (1 - 2.0**-20))
        jacobian = state.moments["grad_avgs"][0][0].float()[None]
        for module in (ops, reference):
            after = state.to(device)
            call(module, rule, after, [jacobian.to(device)])
            assert after.parameters[0].isfinite().all()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-20, 1e-10, 1e10, 1e18])
def test_sizes_of_gradients(size: float, device: str) -> None:
    """Squares of 1e-60 underflow in float32, to no harm; those of 1e+36 are still there."""
    for rule in RULES:
        for types in (SINGLE, HALF):
            state = begin(RULES[rule], [(65,)], 3, [types])
            for lists in state.moments.values():
                for moment in lists[0]:
                    moment.mul_(min(size, 1.0)).mul_(min(size, 1.0))
            check(rule, state, gradients(state, 3, size=size), device, task_weights=weights_of(3))


def test_weights_multiply_the_update_and_nothing_else(device: str) -> None:
    for rule in RULES:
        state = begin(RULES[rule], [(50,)], 3)
        jacobians = gradients(state, 3)
        plain, ones = step(rule, state, jacobians, device), step(rule, state, jacobians, device, task_weights=[1.0] * 3)
        assert_same(plain, ones)
        other = step(rule, state, jacobians, device, task_weights=[2.0, 0.0, -1.0])
        for n in RULES[rule].moments:
            assert all(torch.equal(a, b) for a, b in zip(plain.moments[n][0], other.moments[n][0]))
        gain = (1 - 0.99) * torch.tensor([4.0, 0.0, 1.0], dtype=torch.float64)
        had = plain.squares[0] - 0.99 * state.squares[0]
        assert torch.allclose(other.squares[0], 0.99 * state.squares[0] + gain / (1 - 0.99) * had, rtol=1e-6)
        check(rule, state, jacobians, device, task_weights=[2.0, 0.0, -1.0])


# ---- average squared updates -----------------------------------------------------------------------------------------


@EVERY_RULE
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_average_squares_are_of_each_tasks_own_update(decay: float, rule: str, device: str) -> None:
    """The update by itself: what the parameter does from zero if the task is the only one present, without decay."""
    settings = {n: v for n, v in RULES[rule].settings.items() if n not in ("weight_decay", "momentum")}
    plain = RULES[rule]._replace(settings=settings)
    state = begin(plain, [(3000,), (7,)], 3)
    for tensor in [*state.parameters, *state.buffers]:
        tensor.zero_()
    jacobians, weights = gradients(state, 3), weights_of(3)
    after = state.to(device)
    call(ops, plain, after, [j.to(device) for j in jacobians], task_weights=weights, square_decay=decay)
    for t in range(3):
        alone = state.to(device)
        mask = torch.arange(3, device=device) == t
        call(ops, plain, alone, [j.to(device) for j in jacobians], task_weights=weights, present=mask)
        for p, parameter in enumerate(alone.parameters):
            want = decay * state.squares[p][t] + (1 - decay) * parameter.cpu().double().square().sum()
            assert float(after.squares[p][t]) == pytest.approx(float(want), rel=1e-6)


def test_average_squares_change_nothing_else(device: str) -> None:
    for rule in RULES:
        state = begin(RULES[rule], [(300,), (7,)], 3)
        jacobians = gradients(state, 3)
        counted = step(rule, state, jacobians, device)
        state.squares = []
        plain = step(rule, state, jacobians, device)
        counted.squares = []
        assert_same(plain, counted)
