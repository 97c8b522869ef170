"""The state of AdaTask's optimizers: checkpoints, copies, a run that is killed and goes on, two processes."""

from __future__ import annotations

import copy
import io
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtlgrad.optim import AdaTaskAdagrad, AdaTaskAdam, AdaTaskAdamW, AdaTaskRMSprop
from tests.support.bounds import one_line, same, state_tensors, values
from tests.support.nets import (
    OPTIMIZER_CASES,
    PAIRS,
    SETTINGS,
    Net,
    backward,
    fill,
    fill_grad,
    inputs,
    make_adatask,
    new,
    several,
    train,
)


def checkpointed(path: str, steps: int, shown: bool = False) -> None:
    """Trains several nets, from the checkpoint if there is one, and writes one after every step."""
    runs = {}
    for kind in (*PAIRS, "bfloat16"):
        settings = {"moments_dtype": "bfloat16", "missing": "still"} if kind == "bfloat16" else {}
        net = Net(seed=3)
        optimizer = make_adatask("adam" if kind == "bfloat16" else kind, net.parameters(), **settings)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        runs[kind] = {"net": net, "optimizer": optimizer, "scheduler": scheduler}
    first = 0
    if os.path.exists(path):
        saved = torch.load(path, weights_only=True)
        first = saved["step"]
        for kind, run in runs.items():
            for part, loaded in run.items():
                loaded.load_state_dict(saved[kind][part])
    for i in range(first, steps):
        found: dict[str, Any] = {"step": i + 1}
        for kind, run in runs.items():
            train(run["net"], run["optimizer"], range(i, i + 1), run["scheduler"])
            found[kind] = {part: thing.state_dict() for part, thing in run.items()}
            found[kind]["dominance"] = run["optimizer"].dominance([run["net"].shared])
        torch.save(found, path + ".new")
        os.replace(path + ".new", path)
        if shown:
            print(i + 1, flush=True)


EVERY = pytest.mark.parametrize("name", PAIRS)


def from_file(thing: Any, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def clones(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone(memory_format=torch.preserve_format), p.requires_grad) for p in parameters]


def turn(optimizer: Any, parameters: list[nn.Parameter], seed: int, tasks: int = 3) -> None:
    """A step with .jac for all but the last two parameters."""
    fill(parameters[:-2], seed, tasks)
    fill_grad(parameters[-2:], seed)
    optimizer.step()


@pytest.mark.parametrize("moments", [None, "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "case"), OPTIMIZER_CASES)
def test_round_trips(name: str, case: int, dtype: torch.dtype, moments: str | None) -> None:
    """Every way to carry the state over ends, a few steps later, in the same bits, and shares no memory with where it
    came from. Shapes with one number, none, and as many as tasks; settings that a checkpoint brings along."""
    settings = {**SETTINGS[name][case], "moments_dtype": moments, "task_weights": [1.0, 0.5, 2.0]}
    shapes = [(3, 4), (), (3,), (2, 0), (1,), (5,), (3, 4), (3,)]
    parameters = several(dtype, shapes)
    optimizer = make_adatask(name, parameters, **settings)
    optimizer.param_groups[0]["lr"] = 0.123
    for seed in range(3):
        turn(optimizer, parameters, seed)
    saved = optimizer.state_dict()
    kept = state_tensors(optimizer)
    expected = {torch.float64: torch.float64}.get(dtype, torch.bfloat16 if moments else torch.float32)
    for key, value in kept.items():
        if "avg" in key or "sum" in key or "buffer" in key:
            ordinary = dtype == torch.float32 and moments is None
            assert value.dtype == expected or ordinary
    others = []
    for state in (saved, from_file(saved), copy.deepcopy(saved), pickle.loads(pickle.dumps(saved))):
        ps = clones(parameters)
        other = make_adatask(name, ps)
        other.load_state_dict(state)
        assert same(state_tensors(other), kept)
        others.append((other, ps))
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), from_file(optimizer, False)):
        assert same(state_tensors(other), kept)
        others.append((other, other.param_groups[0]["params"]))
    for other, ps in others:
        assert other.param_groups[0]["lr"] == 0.123
        assert other.param_groups[0]["task_weights"] == [1.0, 0.5, 2.0]
        turn(other, ps, 7)
        turn(other, ps, 8)
        assert same(other.dominance(), others[0][0].dominance())
    assert same(state_tensors(optimizer), kept)  # none of them wrote to it
    assert same(state_tensors_of(saved), kept)
    turn(optimizer, parameters, 7)
    turn(optimizer, parameters, 8)
    after = state_tensors(optimizer)
    for other, ps in others:
        assert same(ps, parameters)
        assert same(state_tensors(other), after)


def state_tensors_of(saved: dict[str, Any]) -> dict[str, Tensor]:
    found = {f"{i} {k}": v for i, s in saved["state"].items() for k, v in s.items()}
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}


@EVERY
def test_loading_before_any_step_and_into_a_used_one(name: str) -> None:
    """What was there is gone; parameters without state in the checkpoint start anew."""
    parameters = several()
    fresh = make_adatask(name, parameters).state_dict()
    optimizer = make_adatask(name, parameters)
    turn(optimizer, parameters, 1)
    optimizer.load_state_dict(fresh)
    assert not optimizer.state_dict()["state"]
    again, ps = make_adatask(name, clones(parameters)), clones(parameters)
    again = make_adatask(name, ps)
    turn(optimizer, parameters, 2)
    turn(again, ps, 2)
    assert same(parameters, ps)
    assert same(state_tensors(optimizer), state_tensors(again))


def test_hooks_around_state_dicts() -> None:
    """They may change what is saved and loaded; the last of them sees what training goes on with."""
    p = new(1, 40, dtype=torch.bfloat16)
    optimizer = AdaTaskAdam([p], num_tasks=2)
    fill([p], 1, 2)
    optimizer.step()
    seen: list[Any] = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "mine": 7})
    saved = optimizer.state_dict()
    assert seen == ["saving"]
    assert saved["mine"] == 7
    other = AdaTaskAdam([p], num_tasks=2)

    def halve(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        assert state["mine"] == 7
        changed = {k: {n: v / 2 if n.startswith("exp") else v for n, v in s.items()} for k, s in state["state"].items()}
        return {**state, "state": changed}

    other.register_load_state_dict_pre_hook(halve)
    other.register_load_state_dict_post_hook(lambda o: seen.append(o.state[p]["exp_avg_1"].clone()))
    other.load_state_dict(saved)
    want = optimizer.state[p]["exp_avg_1"] / 2
    assert torch.equal(other.state[p]["exp_avg_1"], want)
    assert same([seen[1]], [want])
    forget = AdaTaskAdam([p], num_tasks=2)
    forget.register_load_state_dict_post_hook(lambda o: o.state.clear())
    forget.load_state_dict(optimizer.state_dict())
    assert not forget.state


def test_states_that_do_not_fit() -> None:
    """One line, and nothing has changed."""
    p = new(1, 4)

    def used(kind: Any, tasks: int | None, **settings: Any) -> Any:
        optimizer = kind([p], **settings) if tasks is None else kind([p], num_tasks=tasks, **settings)
        fill([p], 1, tasks or 1)
        if tasks is None:
            p.grad = torch.ones(4)
        optimizer.step()
        return optimizer

    cases: list[tuple[Any, Any, list[str]]] = [
        (AdaTaskAdam, used(AdaTaskAdam, 2), ["AdaTaskAdam.load_state_dict", "num_tasks=3", "found 2"]),
        (AdaTaskAdamW, used(AdaTaskAdamW, 4), ["AdaTaskAdamW.load_state_dict", "num_tasks=3", "found 4"]),
        (AdaTaskAdam, used(torch.optim.Adam, None), ["AdaTaskAdam.load_state_dict", "num_tasks"]),
        (AdaTaskRMSprop, used(torch.optim.RMSprop, None), ["AdaTaskRMSprop.load_state_dict", "num_tasks"]),
        (AdaTaskAdagrad, used(torch.optim.Adagrad, None), ["AdaTaskAdagrad.load_state_dict", "num_tasks"]),
        (AdaTaskAdam, used(AdaTaskRMSprop, 3), ["AdaTaskAdam.load_state_dict"]),
        (AdaTaskRMSprop, used(AdaTaskAdam, 3), ["AdaTaskRMSprop.load_state_dict"]),
        (AdaTaskAdagrad, used(AdaTaskAdam, 3), ["AdaTaskAdagrad.load_state_dict"]),
        (AdaTaskAdam, AdaTaskRMSprop([p], num_tasks=3), ["AdaTaskAdam.load_state_dict"]),
        (AdaTaskAdam, AdaTaskAdam([p, new(2, 2)], num_tasks=3), ["group"]),
        (AdaTaskAdam, AdaTaskAdam([{"params": [p]}, {"params": [new(2, 2)]}], num_tasks=3), ["group"]),
    ]
    for kind, saved, parts in cases:
        optimizer = used(kind, 3, lr=0.5)
        kept, groups = state_tensors(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
        with pytest.raises(ValueError, match=" ") as error:
            optimizer.load_state_dict(saved.state_dict())
        one_line(error.value, *parts)
        assert same(state_tensors(optimizer), kept)
        assert optimizer.state_dict()["param_groups"] == groups
        assert not optimizer._optimizer_load_state_dict_pre_hooks
        fill([p], 2)
        optimizer.step()


def test_a_hook_may_make_a_state_fit() -> None:
    """What counts is what the user's hooks make of a checkpoint."""
    p = new(1, 4)
    optimizer, other = AdaTaskAdam([p], num_tasks=2), AdaTaskAdam([p], num_tasks=3)
    groups = [{**g, "num_tasks": 3} for g in optimizer.state_dict()["param_groups"]]
    other.register_load_state_dict_pre_hook(lambda o, s: {"state": {}, "param_groups": groups})
    other.load_state_dict(optimizer.state_dict())
    fill([p], 1)
    other.step()


# ---- a run that is killed --------------------------------------------------------------------------------------------

RUN = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.contracts.test_optim_state import checkpointed
checkpointed(sys.argv[2], int(sys.argv[3]), shown=True)
"""


def test_killed_and_resumed(tmp_path: Path) -> None:
    """SIGKILL at any moment; the run that goes on from the checkpoint ends in the bits of one left alone: all four,
    bfloat16 moments with stochastic rounding, schedulers, dominance."""
    steps, paths = 60, [str(tmp_path / name) for name in ("killed.pt", "whole.pt")]
    command = [sys.executable, "-c", RUN, str(Path(__file__).parents[2]), paths[0], str(steps)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    at = 3 + os.urandom(1)[0] % 20
    for _ in range(at):  # it may be anywhere after this, in a step or in writing
        assert process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    process.stdout.close()
    reached = torch.load(paths[0], weights_only=True)["step"]
    assert at <= reached < steps
    for path in paths:
        checkpointed(path, steps)
    first, second = (torch.load(path, weights_only=True) for path in paths)
    assert first.pop("step") == second.pop("step") == steps
    for name, run in first.items():
        other = second[name]
        assert same(run["net"].values(), other["net"].values()), name
        assert same(state_tensors_of(run["optimizer"]), state_tensors_of(other["optimizer"]))
        assert run["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]
        assert torch.equal(run["dominance"], other["dominance"])
    assert any(v.dtype == torch.bfloat16 for v in state_tensors_of(first["bfloat16"]["optimizer"]).values())


# ---- two processes ---------------------------------------------------------------------------------------------------

RANK = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from tests.support.nets import PAIRS, Net, backward, inputs, make_adatask

rank = int(sys.argv[3])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
found = {}
for name in PAIRS:
    net = Net().double()
    optimizer = make_adatask(name, net.parameters(), lr=1e-3)
    for seed in range(5):
        optimizer.zero_grad()
        backward(net, inputs(16, seed).double().chunk(2)[rank])
        optimizer.step()
    found[name] = [list(p.detach() for p in net.parameters()), optimizer.state_dict(), optimizer.dominance()]
torch.save(found, sys.argv[2] + sys.argv[3])
dist.destroy_process_group()
"""


def test_two_processes(tmp_path: Path) -> None:
    """Each with half of the batch. They end alike, and as one process with the whole batch."""
    file = str(tmp_path / "store")
    commands = [[sys.executable, "-c", RANK, str(Path(__file__).parents[2]), file, str(rank)] for rank in range(2)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    ranks = [torch.load(file + str(rank), weights_only=True) for rank in range(2)]
    for name in PAIRS:
        (first, state, shares), (second, other, others) = (rank[name] for rank in ranks)
        assert same(first, second)
        assert same(state_tensors_of(state), state_tensors_of(other))
        assert torch.equal(shares, others)
        net = Net().double()
        optimizer = make_adatask(name, net.parameters(), lr=1e-3)
        for seed in range(5):
            optimizer.zero_grad()
            backward(net, inputs(16, seed).double())
            optimizer.step()
        for p, q in zip(net.parameters(), first, strict=True):
            assert torch.allclose(p, q, rtol=0.0, atol=1e-9)


@EVERY
def test_two_parameter_groups_keep_their_places(name: str) -> None:
    """A checkpoint of groups added later, of frozen and of late parameters."""
    parameters = several()
    parameters[1].requires_grad_(False)
    optimizer = make_adatask(name, parameters[:3])
    optimizer.add_param_group({"params": parameters[3:], "lr": 0.3, "missing": "still"})
    for seed in range(2):
        fill(parameters[2:5], seed)
        optimizer.step()
    ps = clones(parameters)
    other = make_adatask(name, [{"params": ps[:3]}, {"params": ps[3:]}])
    other.load_state_dict(from_file(optimizer.state_dict()))
    assert other.param_groups[1]["missing"] == "still"
    before = values([ps[1]])
    for seed in range(2, 4):
        for o, tensors in ((optimizer, parameters), (other, ps)):
            fill([tensors[0], *tensors[2:]], seed)
            o.step()
    assert same(parameters, ps)
    assert same([ps[1]], before)
    assert same(state_tensors(optimizer), state_tensors(other))


def test_training_from_a_checkpoint_with_other_settings() -> None:
    """A net of bfloat16 parameters; settings changed after loading hold from then on."""
    net = Net().bfloat16()
    optimizer = AdaTaskAdamW(net.parameters(), num_tasks=3)
    train(net, optimizer, 3)
    other_net = copy.deepcopy(net)
    other = AdaTaskAdamW(other_net.parameters(), num_tasks=3)
    other.load_state_dict(from_file(optimizer.state_dict()))
    assert all(v.dtype != torch.bfloat16 for v in state_tensors(other).values())
    for o in (optimizer, other):
        o.param_groups[0].update(lr=0.1, betas=(0.5, 0.5), task_weights=[1.0, 0.0, 0.0], dominance_decay=0.1)
    for n, o in ((net, optimizer), (other_net, other)):
        train(n, o, range(3, 6))
    assert same(net.parameters(), other_net.parameters())
    assert torch.equal(optimizer.dominance(), other.dominance())
