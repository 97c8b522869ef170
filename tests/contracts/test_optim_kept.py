"""What a step keeps for the next one is made anew when it no longer fits: every step as if nothing had been kept."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mtlgrad.optim import AdaTaskAdam
from tests.support.bounds import same, state_tensors, values
from tests.support.nets import PAIRS, fill, make_adatask, new

EVERY = pytest.mark.parametrize("name", PAIRS)


def moved(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.data = p.data.clone()


def state_replaced(optimizer: Any) -> None:
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.clone()


def state_moved_in_place(optimizer: Any) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()


def turned(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.dim() == 2:  # the same shape, address and size
                p.data = p.data.t()


def loaded(optimizer: Any) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def narrow_moments(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["moments_dtype"], group["stochastic_rounding"] = "bfloat16", False


def other_settings(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"], group["task_weights"] = 0.3, 0.1, [1.0, 0.0, 2.0]


def missing(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["missing"] = "still"
        for p in group["params"]:
            p.jac[1] = 0.0


def jacobians_turned(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.dim() == 2:
                p.jac = p.jac.mT.contiguous().mT


def jacobian_gone(optimizer: Any) -> None:
    del optimizer.param_groups[0]["params"][0].jac


CHANGES: list[Callable[[Any], None]] = [
    moved,
    state_replaced,
    state_moved_in_place,
    turned,
    loaded,
    narrow_moments,
    other_settings,
    missing,
    jacobians_turned,
    jacobian_gone,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@EVERY
def test_as_if_nothing_had_been_kept(name: str, change: Callable[[Any], None]) -> None:
    found = []
    for forgetful in (False, True):
        parameters = [new(1, 4, 4), new(2, 7), new(3, 5)]
        optimizer = make_adatask(name, parameters)
        for step in range(6):
            fill(parameters, step)
            if step == 3:
                change(optimizer)
            if forgetful:
                optimizer._kept.clear()
            optimizer.step()
        found.append([*values(parameters), *state_tensors(optimizer).values()])
    assert same(*found)


def test_two_optimizers_of_the_same_shapes() -> None:
    found = []
    for together in (False, True):
        pairs = [[new(1, 9)], [new(2, 9)]]
        optimizers = [AdaTaskAdam(p, num_tasks=3) for p in pairs]
        for step in range(3) if together else ():
            for parameters, optimizer in zip(pairs, optimizers, strict=True):
                fill(parameters, step)
                optimizer.step()
        for parameters, optimizer in zip(pairs, optimizers, strict=True) if not together else ():
            for step in range(3):
                fill(parameters, step)
                optimizer.step()
        found.append([p for parameters in pairs for p in values(parameters)])
    assert same(*found)


def test_it_keeps_no_tensor_alive() -> None:
    """State that a user has put elsewhere is free at once."""
    p = new(1, 9)
    optimizer = AdaTaskAdam([p], num_tasks=2)
    fill([p], 1, 2)
    optimizer.step()
    seen = [weakref.ref(tensor) for tensor in optimizer.state[p].values()]
    optimizer.state[p] = {key: tensor.clone() for key, tensor in optimizer.state[p].items()}
    gc.collect()
    assert all(tensor() is None for tensor in seen)
    assert "_kept" not in pickle.loads(pickle.dumps(optimizer)).__getstate__()


def test_memory_that_was_freed_is_refused() -> None:
    p = new(1, 9)
    optimizer = AdaTaskAdam([p], num_tasks=2)
    for step in range(2):
        fill([p], step, 2)
        optimizer.step()
    optimizer.state[p]["exp_avg_1"].untyped_storage().resize_(0)
    fill([p], 2, 2)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="adatask_adam: expected tensors with memory, found one"):
        optimizer.step()
    assert torch.equal(p, before)
