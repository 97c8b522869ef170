"""The state of AdaTask's optimizers before the first step, and distributed checkpoints across world sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import mtlgrad
from mtlgrad.distributed import global_means
from mtlgrad.optim import AdaTaskAdam
from tests.support.bounds import near, one_line, same, state_tensors, values
from tests.support.nets import OPTIMIZER_CASES, SETTINGS, inputs, make_adatask, new
from tests.support.ranks import (
    Pool,
    give_grad,
    give_jac,
    narrow_net,
    sharded_net,
    shared_and_heads,
    unsharded,
    unsharded_state,
)

# ---- state before the first step -------------------------------------------------------------------------------------


def started(optimizer: Any, shared: list[Any], heads: list[Any], tasks: int) -> dict[str, Tensor]:
    """The state that init_state makes; it runs no hooks, and leaves all else as it is."""
    give_jac(shared, 7, tasks)
    heads[0].grad = torch.ones_like(heads[0])
    hook = optimizer.register_step_pre_hook(lambda *_: pytest.fail("no step was asked for"))
    kept = values([*shared, *heads, *(p.jac for p in shared), heads[0].grad])
    groups = str(optimizer.param_groups)
    optimizer.init_state(iter(shared))
    hook.remove()
    for a, b in zip(kept, [*shared, *heads, *(p.jac for p in shared), heads[0].grad], strict=True):
        assert torch.equal(a.view(torch.int32), b.detach().view(torch.int32))  # the sign of zero, too
    assert str(optimizer.param_groups) == groups
    assert heads[1].grad is None
    first = state_tensors(optimizer)
    assert all(not value.any() for key, value in first.items() if "sum" not in key)
    optimizer.init_state(shared)  # what there is stays
    assert same(state_tensors(optimizer), first)
    return first


@pytest.mark.parametrize(("name", "case"), OPTIMIZER_CASES)
def test_init_state(name: str, case: int) -> None:
    """All of it, and nothing else has changed: training from there is what it is without, bit for bit."""
    for extra in ({}, {"moments_dtype": "bfloat16"}, {"num_tasks": 1}, {"dominance_decay": None, "eps": 0.0}):
        settings = {"num_tasks": 3, **SETTINGS[name][case], **extra}
        tasks = settings.pop("num_tasks")
        runs = []
        for early in (False, True):
            shared, heads = shared_and_heads()
            heads[1].data.fill_(-0.0)
            heads += [new(30, 3)]
            heads[2].requires_grad_(False)
            optimizer = make_adatask(
                name, [{"params": shared}, {"params": heads, "lr": torch.tensor(0.3)}], tasks, **settings
            )
            if early:
                first = started(optimizer, shared, heads, tasks)
            for seed in range(2):
                give_jac(shared, seed, tasks)
                give_grad(heads[:2], seed)
                optimizer.step()
            runs.append((shared + heads, state_tensors(optimizer)))
            if early:
                assert first.keys() == runs[0][1].keys()
        if settings.get("eps") != 0.0:
            assert same(runs[0][0], runs[1][0])
            assert same(runs[0][1], runs[1][1])


def test_init_state_of_other_parameters() -> None:
    optimizer = AdaTaskAdam([new(1, 3)], num_tasks=2)
    with pytest.raises(ValueError, match="shared") as error:
        optimizer.init_state([new(1, 3), new(2, 3)])
    one_line(error.value, "AdaTaskAdam.init_state: shared: expected parameters of this optimizer, found 2 others")


def test_state_that_torch_made() -> None:
    """Without init_state get_optimizer_state_dict takes all parameters for heads; the step says what to do."""
    net = narrow_net()
    optimizer = AdaTaskAdam(net.parameters(), num_tasks=3)
    get_optimizer_state_dict(net, optimizer)
    mtlgrad.task_backward([loss.mean() for loss in net(inputs())[1]], net.shared)
    with pytest.raises(ValueError, match=r"found \.jac") as error:
        optimizer.step()
    one_line(error.value, "call init_state(shared) before it")


# ---- checkpoints -----------------------------------------------------------------------------------------------------

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def states(net: nn.Module, optimizer: Any, kind: str) -> dict[str, Any]:
    if kind == "optimizer":
        return {"net": net.state_dict(), "optimizer": get_optimizer_state_dict(net, optimizer)}
    found = get_state_dict(net, optimizer, options=FLAT if kind == "flat" else None)
    return dict(zip(("net", "optimizer"), found))


def load(net: nn.Module, optimizer: Any, kind: str, path: str) -> None:
    optimizer.init_state(net.shared)  # type: ignore[operator]
    state = states(net, optimizer, kind)
    dcp.load(state, checkpoint_id=path)
    if kind == "optimizer":
        net.load_state_dict(state["net"])
        set_optimizer_state_dict(net, optimizer, state["optimizer"])
    else:
        options = FLAT if kind == "flat" else None
        set_state_dict(
            net, optimizer, model_state_dict=state["net"], optim_state_dict=state["optimizer"], options=options
        )


def resumed(name: str, settings: dict[str, Any], kind: str, path: str, first: int, last: int, save: bool) -> Any:
    """Trains from a checkpoint, if there is one at `path`, or writes one there in the end."""
    cut = dist.is_initialized()
    net = sharded_net(first) if cut else narrow_net(first)  # what is loaded is not what it begins with
    groups = [{"params": net.shared}, {"params": net.heads.parameters(), "lr": 0.02}]
    optimizer = make_adatask(name, groups, **(settings if first == 0 else {**settings, "lr": 9.0}))
    if first:
        load(net, optimizer, kind, path)
    for i in range(first, last):
        x = inputs(8, 100 + i)
        if cut:
            x = x.chunk(dist.get_world_size())[dist.get_rank()]
        mtlgrad.task_backward(global_means(net(x)[1]), net.shared)
        optimizer.step()
        optimizer.zero_grad()
    if save:
        dcp.save(states(net, optimizer, kind), checkpoint_id=path)
    return [unsharded(p) for p in net.parameters()], unsharded_state(optimizer), optimizer.dominance([net.shared])


ADAM = {"amsgrad": True, "eps": 1e-3, "task_weights": [1.0, 0.5, 2.0], "missing": "still"}
CHECKPOINTED: list[tuple[str, dict[str, Any], str]] = [
    ("adam", ADAM, "optimizer"),
    ("adam", ADAM, "both"),
    ("adam", ADAM, "flat"),
    ("adamw", {"eps": 1e-3, "betas": (0.8, 0.99)}, "flat"),
    ("rmsprop", {"momentum": 0.9, "centered": True, "eps": 1e-2, "lr": 1e-3}, "flat"),
    ("adagrad", {"initial_accumulator_value": 0.1, "lr_decay": 0.1}, "both"),
]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process reads and writes, too
@pytest.mark.parametrize(("name", "settings", "kind"), CHECKPOINTED)
def test_checkpoints_across_world_sizes(
    name: str, settings: dict[str, Any], kind: str, tmp_path: Path, two_ranks: Pool, four_ranks: Pool
) -> None:
    """Written by two ranks, one process or four, read by the others; no run differs from an uninterrupted one."""

    def one(function: Callable[..., Any], *arguments: Any) -> list[Any]:
        return [function(*arguments)]

    parameters, state, dominance = resumed(name, settings, kind, "", 0, 4, False)
    ways: list[tuple[Any, list[Any]]] = [(two_ranks, [four_ranks, one]), (one, [two_ranks])]
    if kind == "flat":
        ways = [(four_ranks, [two_ranks]), (two_ranks, [one])]
    for i, (writer, readers) in enumerate(ways):
        path = str(tmp_path / str(i))
        writer(resumed, name, settings, kind, path, 0, 2, True)
        for reader in readers:
            for found, kept, shares in reader(resumed, name, settings, kind, path, 2, 4, False):
                assert all(near(p, q, 1e-6) for p, q in zip(found, parameters, strict=True))
                assert kept.keys() == state.keys()
                assert all(near(kept[key], state[key], 1e-5) for key in state)
                assert near(shares, dominance, 1e-5)
