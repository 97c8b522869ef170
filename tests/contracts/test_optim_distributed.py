"""AdaTask's optimizers under data parallelism: several ranks train as one process does on all their examples."""

from __future__ import annotations

import copy
import io
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mtlgrad
from mtlgrad.distributed import average_jacobians, global_means
from mtlgrad.optim import AdaTaskAdam, clip_task_grad_norm_, unscale_jac_
from mtlgrad.world.jacobians import is_averaged
from tests.support.bounds import near, one_line, same, state_tensors
from tests.support.nets import PAIRS, Net, fill, fill_grad, inputs, make_adatask, new
from tests.support.ranks import Pool, by_rank, environment, free_port

EVERY = pytest.mark.parametrize("name", PAIRS)
ROWS = 14
COUNTS = {2: [13, 1], 4: [6, 1, 4, 3]}

#: torch.optim's eps: gradients of about that size would have their rounding blown up to whole steps; these have not.
SETTINGS: dict[str, dict[str, Any]] = {
    "adam": {"lr": 1e-3},
    "adamw": {"lr": 1e-3, "missing": "still", "amsgrad": True},
    "rmsprop": {"lr": 1e-3, "momentum": 0.9, "centered": True},
    "adagrad": {"lr": 1e-3, "missing": "still"},
}


def labels(step: int) -> list[Tensor]:
    """Task 1 has labels on the last rank alone, and every third step none at all; task 2 for some examples."""
    index = torch.arange(ROWS)
    return [index >= 0, (index == ROWS - 1) & (step % 3 != 2), index % 3 != 0]


def trained(name: str, steps: int, dtype: torch.dtype, settings: dict[str, Any], through: bool, micro: int = 1) -> Any:
    """On several ranks with their parts of the batches, or on one process with all of them."""
    net: Any = Net().to(dtype)
    model = DistributedDataParallel(net) if dist.is_initialized() else net
    optimizer = make_adatask(name, net.parameters(), **settings)
    for i in range(steps):
        optimizer.zero_grad()
        for k in range(micro):
            x, masks = inputs(ROWS, 100 * k + i).to(dtype), labels(i + k)
            if model is not net:
                counts, rank = COUNTS[dist.get_world_size()], dist.get_rank()
                x, masks = by_rank(x, counts)[rank], [by_rank(mask, counts)[rank] for mask in masks]
            with net_sync_off(model):
                z, losses = model(x)
                means = global_means([loss[mask] for loss, mask in zip(losses, masks)])
                mtlgrad.task_backward(means, net.shared, features=z if through else None)
        optimizer.step()
    return [p.detach() for p in net.parameters()], state_tensors(optimizer), optimizer.dominance([net.shared])


def net_sync_off(model: Any) -> Any:
    return model.no_sync() if hasattr(model, "no_sync") else torch.enable_grad()


def compare(found: list[Any], want: Any, parameters: float, moments: float) -> None:
    for ps, state, shares in found:
        assert same(ps, found[0][0])  # no drift at all
        assert all(near(p, q, parameters) for p, q in zip(ps, want[0], strict=True))
        assert state.keys() == want[1].keys()
        assert all(near(state[key], value, moments) for key, value in want[1].items())
        assert near(shares, want[2], moments)


@pytest.mark.parametrize("pool", ["two_ranks", "four_ranks"])
@EVERY
def test_ranks_equal_one_process(name: str, pool: str, request: pytest.FixtureRequest) -> None:
    """float32; Adam 20 steps; uneven batches, a task without labels on all ranks but one, or on all."""
    arguments = (name, 20 if name == "adam" else 5, torch.float32, SETTINGS[name], name != "rmsprop")
    compare(request.getfixturevalue(pool)(trained, *arguments), trained(*arguments), 1e-6, 1e-5)


@EVERY
def test_nothing_but_rounding(name: str, four_ranks: Pool) -> None:
    """The same in float64 with torch.optim's own settings, and two micro-batches a step."""
    arguments = (name, 5, torch.float64, {"missing": "still"}, name != "adamw", 2)
    compare(four_ranks(trained, *arguments), trained(*arguments), 1e-12, 1e-11)


# ---- gradients of one rank alone -------------------------------------------------------------------------------------


def refused(name: str) -> list[str]:
    messages = []
    for tasks in (3, 1):
        p, head = new(1, 5), new(2, 3)
        optimizer = make_adatask(name, [head, p], tasks)
        fill([p], dist.get_rank(), tasks)
        fill_grad([head], 1)
        before = [p.detach().clone(), head.detach().clone()]
        with pytest.raises(RuntimeError, match="mean") as error:
            optimizer.step()
        messages.append(str(error.value))
        assert same(before, [p, head])
        assert not optimizer.state_dict()["state"]
        average_jacobians([p, head])
        assert is_averaged(p.jac, None)  # type: ignore[attr-defined]
        if tasks == 3:
            norms = clip_task_grad_norm_([p], 1e-3)
            assert (norms > 1e-3).any()
            assert is_averaged(p.jac, None)  # type: ignore[attr-defined]
        optimizer.step()
        parts = [torch.empty_like(p) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, p.detach())
        assert same(parts, [p] * len(parts))
        optimizer.zero_grad(set_to_none=False)
        assert is_averaged(p.jac, None)  # type: ignore[attr-defined]
    return messages


@EVERY
def test_jacobians_of_one_rank(name: str, two_ranks: Pool) -> None:
    for messages in two_ranks(refused, name):
        for message in messages:
            one_line(RuntimeError(message), f"{PAIRS[name][0].__name__}.step: expected .jac", "2 ranks", "average_jac")


def grouped() -> list[float]:
    """Pairs of ranks train on their own, and a rank alone."""
    pair, _ = dist.new_subgroups(group_size=2)
    alone, _ = dist.new_subgroups(group_size=1)
    found = []
    for group in (pair, alone):
        p = new(1, 3)
        optimizer = AdaTaskAdam([p], num_tasks=2, process_group=group)
        others = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
        saved = optimizer.state_dict()
        assert not [key for key in saved["param_groups"][0] if "group" in key]
        torch.save(saved, io.BytesIO())
        loaded = AdaTaskAdam([p], num_tasks=2, process_group=group)
        loaded.load_state_dict(saved)
        for each in (optimizer, *others, loaded):
            [q] = each.param_groups[0]["params"]
            q.jac = torch.full((2, 3), float(dist.get_rank()))
            if group is pair:
                with pytest.raises(RuntimeError, match="mean over the 2 ranks, found this rank's own"):
                    each.step()
                average_jacobians([q], process_group=pair)
                found.append(float(q.jac[0, 0]))
            each.step()
    with pytest.raises(TypeError, match="AdaTaskAdam: process_group: expected a torch"):
        AdaTaskAdam([p], num_tasks=2, process_group="world")  # type: ignore[arg-type]
    return found


def test_process_groups(four_ranks: Pool) -> None:
    """In copies, too; never in what is saved."""
    assert four_ranks(grouped) == [[0.5] * 4] * 2 + [[2.5] * 4] * 2


ALONE = """
import sys, torch
import torch.distributed as dist
from mtlgrad.optim import AdaTaskAdam
dist.init_process_group("gloo")
if dist.get_rank() == 0:
    p = torch.nn.Parameter(torch.zeros(3))
    p.jac = torch.ones(2, 3)
    try:
        AdaTaskAdam([p], num_tasks=2).step()
    except RuntimeError as error:
        assert "process_group=" in str(error)
        alone = dist.new_group([0], use_local_synchronization=True)
        AdaTaskAdam([p], num_tasks=2, process_group=alone).step()
        print("stepped")
dist.barrier()
dist.destroy_process_group()
"""


def test_one_rank_alone_is_told_and_does_not_wait() -> None:
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", ALONE], env=environment(r, 2, port), stdout=-1, stderr=-1, text=True, cwd=Path.cwd()
        )
        for r in range(2)
    ]
    outputs = [rank.communicate(timeout=100) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert outputs[0][0] == "stepped\n"


# ---- GradScaler ------------------------------------------------------------------------------------------------------


def scaled(bad: bool, explicit: bool) -> tuple[float, bool]:
    p, head = new(1, 5), nn.Parameter(torch.ones(2))
    optimizer = AdaTaskAdam([p, head], num_tasks=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    fill([p], 1)
    if bad and dist.get_rank() == 1:
        p.jac[2, 3] = math.inf  # type: ignore[attr-defined]
    average_jacobians([p])
    before = p.detach().clone()
    if explicit:
        scaler.unscale_(optimizer)
        unscale_jac_(scaler, optimizer)
        clip_task_grad_norm_([p], 1.0)
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale(), torch.equal(p, before)


@pytest.mark.parametrize("explicit", [False, True])
def test_scaler(explicit: bool, two_ranks: Pool) -> None:
    """An infinity on one rank is in the mean, and skips the step of all."""
    assert two_ranks(scaled, True, explicit) == [(2.0, True)] * 2
    assert two_ranks(scaled, False, explicit) == [(4.0, False)] * 2
