"""What AdaTask's optimizers refuse: one line that says where, what was expected and what was found; nothing changes."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.bounds import one_line, same, state_tensors, values
from tests.support.nets import PAIRS, fill, fill_grad, make_adatask, new

EVERY = pytest.mark.parametrize("name", PAIRS)

#: Settings out of their range, and what the message has to name.
WRONG: list[tuple[str, dict[str, Any], str]] = [
    *((name, {"lr": lr}, "lr|learning rate") for name in PAIRS for lr in (-0.1, math.nan)),
    *((name, {"eps": -1e-8}, "eps") for name in PAIRS),
    *((name, {"weight_decay": -1.0}, "weight_decay") for name in PAIRS),
    *((name, {"task_weights": w}, "task_weights") for name in PAIRS for w in ([1.0, 2.0], [1.0, -1.0, 1.0], 0.5)),
    *((name, {"task_weights": [1.0, math.nan, 1.0]}, "task_weights") for name in PAIRS),
    *((name, {"missing": "skip"}, "missing") for name in PAIRS),
    *((name, {"moments_dtype": m}, "moments_dtype") for name in PAIRS for m in ("float16", torch.float64, "int8", 16)),
    *((name, {"dominance_decay": d}, "dominance_decay") for name in PAIRS for d in (1.0, -0.1, math.nan)),
    *((name, {"num_tasks": n}, "num_tasks") for name in PAIRS for n in (0, -1, 1.5, True, None, "3")),
    *((name, {"fused": True}, "fused") for name in PAIRS if name != "rmsprop"),  # which torch has not fused
    *((name, {"differentiable": True}, "differentiable") for name in PAIRS),
    *((name, {"betas": b}, "beta") for name in ("adam", "adamw") for b in ((0.9, 1.0), (1.0, 0.9), (-0.1, 0.9))),
    ("rmsprop", {"alpha": 1.0}, "alpha"),
    ("rmsprop", {"alpha": -0.5}, "alpha"),
    ("rmsprop", {"momentum": -0.5}, "momentum"),
    ("adagrad", {"lr_decay": -0.5}, "lr_decay"),
    ("adagrad", {"initial_accumulator_value": -0.5}, "initial_accumulator_value"),
]


@pytest.mark.parametrize(("name", "settings", "named"), WRONG, ids=str)
def test_settings_out_of_range(name: str, settings: dict[str, Any], named: str) -> None:
    """In the constructor, in a group there, and in a group added later."""
    p, q = new(1, 3), new(2, 3)
    errors = []
    with pytest.raises(ValueError, match=named) as error:
        PAIRS[name][0]([p], **{"num_tasks": 3, **settings})
    errors.append(error.value)
    with pytest.raises(ValueError, match=named) as error:
        make_adatask(name, [{"params": [p]}, {"params": [q], **settings}])
    errors.append(error.value)
    optimizer = make_adatask(name, [p])
    with pytest.raises(ValueError, match=named) as error:
        optimizer.add_param_group({"params": [q], **settings})
    errors.append(error.value)
    for each in errors:
        one_line(each)
    one_line(errors[2], type(optimizer).__name__)
    assert len(optimizer.param_groups) == 1
    fill([p], 1)
    optimizer.step()


@EVERY
def test_settings_of_groups_that_torch_does_not_look_at(name: str) -> None:
    wrong: list[dict[str, Any]] = [{"num_tasks": 4}, {"lr": "fast"}, {"eps": None}, {"lr": torch.ones(2)}]
    if name.startswith("adam"):
        wrong += [{"betas": (0.9,)}, {"betas": 0.9}, {"betas": (0.9, 0.9, 0.9)}]
    for settings in wrong:
        optimizer = make_adatask(name, [new(1, 3)])
        with pytest.raises(ValueError, match=f"{type(optimizer).__name__}: {next(iter(settings))}: expected") as error:
            optimizer.add_param_group({"params": [new(2, 3)], **settings})
        one_line(error.value, "found")
        assert len(optimizer.param_groups) == 1


def test_num_tasks_is_asked_for() -> None:
    for kind, _ in PAIRS.values():
        with pytest.raises(TypeError, match="num_tasks"):
            kind([new(1, 3)])


def _jac(shape: tuple[int, ...], **options: Any) -> Any:
    return lambda p: setattr(p, "jac", torch.zeros(shape, **options))


def _nan(p: Any) -> None:
    p.jac[1, 2] = math.nan


def _infinite(p: Any) -> None:
    p.jac[2, 0] = -math.inf


def _only_grad(p: Any) -> None:
    del p.jac
    p.grad = torch.ones_like(p)


#: What happens to a parameter of four elements before a step, and what the message names.
BAD: dict[str, tuple[Any, list[str]]] = {
    "two tasks": (_jac((2, 4)), ["parameter 1 of group 0", "[3, 4]", "num_tasks=3", "[2, 4]"]),
    "no tasks": (_jac((4,)), ["parameter 1 of group 0", "[3, 4]", "found [4]"]),
    "another shape": (_jac((3, 5)), ["parameter 1 of group 0", "[3, 4]", "found [3, 5]"]),
    "another device": (_jac((3, 4), device="meta"), ["parameter 1 of group 0", "device", "cpu", "found meta"]),
    "another dtype": (_jac((3, 4), dtype=torch.float64), ["parameter 1 of group 0", "dtype", "found torch.float64"]),
    "whole numbers": (_jac((3, 4), dtype=torch.int64), ["parameter 1 of group 0", "found torch.int64"]),
    "no tensor": (lambda p: setattr(p, "jac", [1.0]), ["parameter 1 of group 0", "found list"]),
    "sparse": (lambda p: setattr(p, "jac", p.jac.to_sparse()), ["parameter 1 of group 0", "dense", "to_dense"]),
    "NaN": (_nan, ["NaN", "task 1"]),
    "infinite": (_infinite, ["infinity", "task 2"]),
    "changed sides": (_only_grad, ["parameter 1 of group 0", "expected .jac", "found .grad"]),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("kind", BAD)
@EVERY
def test_gradients_that_do_not_fit(name: str, kind: str) -> None:
    """Not even the parameters that come before it have moved, and not the heads; the next step is as if nothing was."""
    spoil, parts = BAD[kind]
    first, p, head, other = new(0, 4), new(1, 4), new(2, 4), new(3, 4)
    optimizer = make_adatask(
        name, [{"params": [first, p, head]}, {"params": [other]}], check_finite=True, missing="still"
    )
    everything = [first, p, head, other]
    for seed in (1, 2):
        fill([first, p, other], seed)
        fill_grad([head], seed)
        if seed == 1:
            optimizer.step()
    before, kept = values(everything), state_tensors(optimizer)
    spoil(p)
    with pytest.raises(ValueError, match=r"step: ") as error:
        optimizer.step()
    one_line(error.value, f"{PAIRS[name][0].__name__}.step", *parts)
    assert same(everything, before)
    assert same(state_tensors(optimizer), kept)
    fill([p], 3)
    p.grad = None
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(everything, before))


@EVERY
def test_heads_gradients_that_are_not_finite(name: str) -> None:
    p, head = new(1, 4), new(2, 4)
    optimizer = make_adatask(name, [{"params": [p]}, {"params": [new(3, 1), head]}], check_finite=True)
    fill([p], 1)
    fill_grad([head], 1)
    head.grad[1] = math.nan  # type: ignore[index]
    before = values([p, head])
    with pytest.raises(ValueError, match="parameter 1 of group 1") as error:
        optimizer.step()
    one_line(error.value, "NaN")
    assert same([p, head], before)
    assert not state_tensors(optimizer)


@EVERY
def test_large_and_small_numbers_are_finite_and_there(name: str) -> None:
    """Also those whose squares their type does not hold."""
    sizes = {torch.float32: (1e30, 1e-30), torch.bfloat16: (1e30, 1e-30), torch.float64: (1e30, 1e200, 1e-200)}
    for dtype, factors in sizes.items():
        for factor in factors:
            p = new(1, 4, dtype=dtype)
            fill([p], 1)
            p.jac *= factor  # type: ignore[attr-defined]
            optimizer = make_adatask(name, [p], check_finite=True, missing="still")
            optimizer.step()
            assert optimizer.state[p]["step"].tolist() == [1.0, 1.0, 1.0]


@EVERY
def test_parameters_without_kernels(name: str) -> None:
    """float16: in words, before the heads have moved."""
    head, p = new(1, 4), nn.Parameter(torch.ones(4, dtype=torch.float16))
    fill_grad([head], 1)
    p.jac = torch.ones(3, 4, dtype=torch.float16)  # type: ignore[attr-defined]
    optimizer = make_adatask(name, [head, p])
    before = values([head, p])
    with pytest.raises((ValueError, RuntimeError), match=r"torch\.float16") as error:
        optimizer.step()
    one_line(error.value, "parameter 1 of group 0", "float32")
    assert same([head, p], before)
    assert not state_tensors(optimizer)


@EVERY
def test_a_parameter_that_changes_sides(name: str) -> None:
    """From .grad to .jac too; its state deleted, it starts anew. With T = 1 there are no sides."""
    p = new(1, 4)
    optimizer = make_adatask(name, [p])
    fill_grad([p], 1)
    optimizer.step()
    fill([p], 1)
    before, kept = values([p]), state_tensors(optimizer)
    with pytest.raises(ValueError, match=r"expected \.grad") as error:
        optimizer.step()
    one_line(error.value, "parameter 0 of group 0", "found .jac", "optimizer.state")
    assert same([p], before)
    assert same(state_tensors(optimizer), kept)
    del optimizer.state[p]
    optimizer.step()
    assert optimizer.state[p]["step"].tolist() == [1.0, 1.0, 1.0]
    single = make_adatask(name, [p], 1)
    fill([p], 1, 1)
    single.step()
    del p.jac  # type: ignore[attr-defined]
    single.step()


def test_no_jac_is_none_too() -> None:
    """`.jac = None` is not the convention, but nothing stumbles over it."""
    p = new(1, 3)
    p.jac = None  # type: ignore[attr-defined]
    p.grad = torch.ones(3)
    optimizer = make_adatask("adam", [p])
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    optimizer.zero_grad(set_to_none=False)
    optimizer.zero_grad()


@EVERY
def test_dominance_without_records(name: str) -> None:
    p = new(1, 4)
    optimizer = make_adatask(name, [p], dominance_decay=None)
    fill([p], 1)
    optimizer.step()
    assert "update_square" not in optimizer.state[p]
    with pytest.raises(RuntimeError, match="dominance_decay") as error:
        optimizer.dominance()
    one_line(error.value, type(optimizer).__name__)
    fresh = make_adatask(name, [p])
    assert fresh.dominance().isnan().all()
    assert copy.deepcopy(fresh).dominance().shape == (1, 3)
