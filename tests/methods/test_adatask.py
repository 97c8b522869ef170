"""The rules of AdaTask's optimizers: against the published formulas, and against torch.optim for each task alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlgrad
from mtlgrad.metrics import Dominance
from mtlgrad.optim import AdaTaskAdam
from tests.support.bounds import near, normal, same, state_tensors, values
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
from tests.support.oracles import EachAlone


@pytest.mark.parametrize("through", [True, False], ids=["features", "whole graph"])
def test_ten_steps_of_the_published_rule(through: bool) -> None:
    """Adam's, as the paper writes it, with torch's place for eps; heads by torch.optim.Adam."""
    net = Net().double()
    other = copy.deepcopy(net)
    lr, b1, b2, eps = 3e-3, 0.9, 0.999, 1e-8
    optimizer = AdaTaskAdam(net.parameters(), lr=lr, num_tasks=3)
    ordinary = torch.optim.Adam(other.heads.parameters(), lr=lr)
    m = [[torch.zeros_like(p) for _ in range(3)] for p in other.shared]
    v = [[torch.zeros_like(p) for _ in range(3)] for p in other.shared]
    for k in range(1, 11):
        x = inputs(seed=k).double()
        optimizer.zero_grad()
        backward(net, x, through)
        optimizer.step()
        losses = other.from_features(other.backbone(x))
        rows = [torch.autograd.grad(loss, other.shared, retain_graph=True) for loss in losses]
        ordinary.zero_grad()
        sum(losses).backward()
        with torch.no_grad():
            for i, p in enumerate(other.shared):
                for t in range(3):
                    g = rows[t][i]
                    m[i][t] = b1 * m[i][t] + (1 - b1) * g
                    v[i][t] = b2 * v[i][t] + (1 - b2) * g**2
                    p -= lr / (1 - b1**k) * m[i][t] / (v[i][t].sqrt() / math.sqrt(1 - b2**k) + eps)
        ordinary.step()
    for p, want in zip(net.parameters(), other.parameters(), strict=True):
        assert near(p.detach(), want.detach(), 1e-12)
    for p, first, second in zip(net.shared, m, v, strict=True):
        for t in range(3):
            assert near(optimizer.state[p][f"exp_avg_{t}"], first[t], 1e-12)
            assert near(optimizer.state[p][f"exp_avg_sq_{t}"], second[t], 1e-12)


@pytest.mark.parametrize(
    ("name", "case", "dtype"),
    [*((*case, torch.float64) for case in OPTIMIZER_CASES), *((name, 1, torch.float32) for name in PAIRS)],
    ids=str,
)
def test_the_sum_of_what_each_task_would_do_alone(name: str, case: int, dtype: torch.dtype) -> None:
    settings, parameters = SETTINGS[name][case], several(dtype)
    weights = [1.0, 0.25, 3.0] if case else None
    alone = EachAlone(name, parameters, weights=weights, **settings)
    optimizer = make_adatask(name, parameters, task_weights=weights, dominance_decay=0.8, **settings)
    squares = [torch.zeros(3, dtype=torch.float64) for _ in parameters]
    for seed in range(10):
        fill(parameters, seed)
        fill_grad(parameters, seed)  # not read, and left there
        gradients = [p.grad for p in parameters]
        optimizer.step()
        assert all(p.grad is gradient for p, gradient in zip(parameters, gradients))
        alone.step([p.jac for p in parameters])
        for i, square in enumerate(squares):
            square.mul_(0.8).add_(torch.stack([update[i].square().sum() for update in alone.updates]), alpha=0.2)
        for p, theta in zip(parameters, alone.theta, strict=True):
            assert near(p.detach(), theta, 1e-12 if dtype == torch.float64 else 1e-5)
        assert all(optimizer.state[p]["step"].tolist() == [seed + 1.0] * 3 for p in parameters)
    if settings.get("momentum"):  # what is counted is the update that goes into the momentum
        return
    for p, square in zip(parameters, squares, strict=True):
        assert near(optimizer.state[p]["update_square"], square, 1e-5 if dtype == torch.float32 else 1e-9)
    shares = optimizer.dominance([parameters[:2], parameters[5:], parameters[3:4]])
    for row, part in zip(shares[:2], (squares[:2], squares[5:]), strict=True):
        total = torch.stack(part).sum(0)
        assert near(row, total / total.sum(), 1e-4)
    assert shares[2].isnan().all()  # nothing there
    assert torch.equal(optimizer.dominance({"a": parameters[:2]}), shares[:1])
    assert optimizer.dominance().shape == (1, 3)
    assert near(optimizer.dominance().sum(1), torch.ones(1), 1e-12)


@pytest.mark.parametrize(("name", "case"), OPTIMIZER_CASES)
def test_one_task_is_torch(name: str, case: int) -> None:
    """Whatever `foreach` is: each optimizer's settings take turns with it."""
    settings, parameters, foreach = SETTINGS[name][case], several(), (None, True, False)[case % 3]
    other = [nn.Parameter(p.detach().clone()) for p in parameters]
    optimizer = make_adatask(name, parameters, 1, foreach=foreach, **settings)
    ordinary: Any = PAIRS[name][1](other, foreach=foreach, **settings)
    for seed in range(10):
        fill(parameters, seed, 1)
        fill_grad(parameters[:1], seed)  # not read
        for i, (p, q) in enumerate(zip(parameters, other)):
            q.grad = p.jac[0].clone()
            if i % 2:
                p.grad = q.grad.clone()
                del p.jac
        optimizer.step()
        ordinary.step()
        assert same(parameters, other)
    assert same(state_tensors(optimizer), state_tensors(ordinary))


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_one_task_with_a_weight(weight: float) -> None:
    """It is on the update, which Adam makes of any size of gradients."""
    for name in PAIRS:
        parameters = several(torch.float64)
        settings = {"weight_decay": 0.0}
        alone = EachAlone(name, parameters, 1, [weight], **settings)
        optimizer = make_adatask(name, parameters, 1, task_weights=[weight], **settings)
        for seed in range(3):
            fill(parameters, seed, 1)
            optimizer.step()
            alone.step([p.jac for p in parameters])
        assert all(near(p.detach(), theta, 1e-12) for p, theta in zip(parameters, alone.theta)), name


@pytest.mark.parametrize(("name", "case"), OPTIMIZER_CASES)
def test_heads_take_torchs_own_steps(name: str, case: int) -> None:
    """Beside parameters with .jac, in one group or in several, whatever `foreach` and `lr` are."""
    settings, grouped = SETTINGS[name][case], bool(case % 2)
    for foreach in (None, True, False):
        for tensor_lr in (False, True):
            if tensor_lr and foreach:
                continue  # torch refuses
            lr = torch.tensor(0.02) if tensor_lr else 0.02
            options = {**settings, "foreach": foreach, "lr": lr}
            shared, heads = several(), several()
            other = [nn.Parameter(p.detach().clone()) for p in heads]
            mixed = [p for pair in zip(shared, heads) for p in pair]
            optimizer = make_adatask(name, [{"params": shared}, {"params": heads}] if grouped else mixed, **options)
            ordinary: Any = PAIRS[name][1](other, **options)
            for seed in range(4):
                fill(shared, seed)
                fill_grad(heads, seed)
                fill_grad(other, seed)
                optimizer.step()
                ordinary.step()
            assert same(heads, other)
            for p, q in zip(heads, other):
                assert optimizer.state[p].keys() == ordinary.state[q].keys()
            assert all(p.grad is None for p in shared)
            assert all(torch.equal(p.grad, q.grad) for p, q in zip(heads, other))


@pytest.mark.parametrize("name", PAIRS)
def test_groups_have_settings_of_their_own(name: str) -> None:
    """What a group does is what it does alone in an optimizer."""
    extra: dict[str, Any] = {"adam": {"betas": (0.5, 0.6)}, "adamw": {"betas": (0.2, 0.9), "amsgrad": True}}.get(
        name, {}
    )
    if name == "rmsprop":
        extra = {"alpha": 0.5, "momentum": 0.7, "centered": True}
    if name == "adagrad":
        extra = {"lr_decay": 0.5, "initial_accumulator_value": 2.0}
    settings: list[dict[str, Any]] = [
        {"lr": 0.1},
        {"eps": 0.01, "weight_decay": 0.3, "task_weights": [0.0, 2.0, 0.5]},
        {**extra, "maximize": True, "moments_dtype": "bfloat16", "dominance_decay": 0.5},
        {"lr": torch.tensor(0.3), "task_weights": torch.tensor([1.0, 2.0, 3.0]), "moments_dtype": torch.bfloat16},
    ]
    # Rounding to nearest where it is to bfloat16: random bits depend on where in the optimizer a parameter is.
    together = [several() for _ in settings]
    groups = [{"params": ps, **s} for ps, s in zip(together, settings)]
    optimizer = make_adatask(name, groups[:2], stochastic_rounding=False)
    for group in groups[2:]:
        optimizer.add_param_group(group)
    apart = [several() for _ in settings]
    optimizers = [make_adatask(name, ps, stochastic_rounding=False, **s) for ps, s in zip(apart, settings)]
    for seed in range(5):
        for i, (a, b) in enumerate(zip(together, apart)):
            fill([*a, *b][: len(a)], seed + 10 * i)
            fill(b, seed + 10 * i)
            optimizers[i].step()
        optimizer.step()
    for i, (a, b) in enumerate(zip(together, apart)):
        assert same(a, b)
        if i:
            assert not same(a, together[0])
        assert near(optimizer.dominance()[i], optimizers[i].dominance()[0], 1e-12)


def test_a_loud_task_dominates_adam_and_not_adatask() -> None:
    """Of three, the second's loss is scaled by 100."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(256, 8), torch.randn(256, 3)
    factors = (1.0, 100.0, 1.0)

    def shares(make: Any) -> Tensor:
        torch.manual_seed(1)
        backbone = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        heads = nn.Linear(16, 3)
        shared = list(backbone.parameters())
        optimizer = make([*shared, *heads.parameters()])
        watch = None if isinstance(optimizer, AdaTaskAdam) else Dominance(optimizer, 3)
        for step in range(60):
            rows = torch.randint(256, (32,), generator=torch.Generator().manual_seed(step))
            features = backbone(inputs[rows])
            errors = (heads(features) - targets[rows]).square().mean(0)
            optimizer.zero_grad()
            for p in shared:
                p.__dict__.pop("jac", None)
            mtlgrad.task_backward([f * e for f, e in zip(factors, errors)], shared)
            if watch is not None:
                for p in shared:
                    p.grad = p.jac.sum(0)
            optimizer.step()
            if watch is not None:
                watch.update()
        layers = [list(backbone[0].parameters()), list(backbone[2].parameters())]
        return (watch.shares if watch else optimizer.dominance)(layers)

    ordinary = shares(lambda p: torch.optim.Adam(p, lr=1e-3))
    apart = shares(lambda p: AdaTaskAdam(p, lr=1e-3, num_tasks=3))
    assert ordinary[1, 1] > 0.8
    assert ordinary.shape == apart.shape
    assert (apart - 1 / 3).abs().max() < 0.1


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("missing", ["decay", "still"])
def test_missing_tasks(name: str, missing: str) -> None:
    """Still: as if that task's optimizer were not called. A task is there if it is anywhere, in any group: zeros in one
    parameter alone are a gradient."""
    settings = SETTINGS[name][1]
    parameters = several(torch.float64)
    alone = EachAlone(name, parameters, **settings) if name != "rmsprop" or missing == "decay" else None
    if alone is None:  # momentum is all tasks' together; it goes on
        settings = {"centered": True}
        alone = EachAlone(name, parameters, **settings)
    groups = [{"params": parameters[:2]}, {"params": parameters[2:]}]
    optimizer = make_adatask(name, groups, missing=missing, **settings)
    counts = [0, 0, 0]
    for seed, there in enumerate([(1, 1, 1), (1, 0, 1), (0, 0, 1), (0, 0, 0), (1, 1, 0), (1, 1, 1), (1, 0, 1)]):
        fill(parameters, seed)
        for i, p in enumerate(parameters):
            for t in range(3):
                if not there[t] or (t == 1 and i):
                    p.jac[t].zero_()
            if there[2]:
                p.jac[2] *= 1e-30  # small, but there
        optimizer.step()
        alone.step([p.jac for p in parameters], there if missing == "still" else None)
        counts = [c + (there[t] if missing == "still" else 1) for t, c in enumerate(counts)]
        for p, theta in zip(parameters, alone.theta, strict=True):
            assert near(p.detach(), theta, 1e-12)
            assert optimizer.state[p]["step"].tolist() == counts
    float32 = new(1, 4)
    fill([float32], 1)
    float32.jac[1] *= 1e-36  # whose squares float32 does not hold
    optimizer = make_adatask(name, [float32], missing="still")
    optimizer.step()
    assert optimizer.state[float32]["step"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", PAIRS)
def test_late_and_absent_parameters(name: str) -> None:
    """A parameter's steps are counted from its first; one without gradients is left alone, and has no state."""
    first, late, never, frozen = (new(i, 5, dtype=torch.float64) for i in range(4))
    frozen.requires_grad_(False)
    before = values([never, frozen])
    optimizer = make_adatask(name, [first, late, never, frozen])
    alone = [EachAlone(name, [p]) for p in (first, late)]
    for seed in range(6):
        for p, rule in zip((first, late), alone):
            if p is first or seed in (2, 3, 5):
                fill([p], seed)
                rule.step([p.jac])
        optimizer.step()
        optimizer.zero_grad()
        for p, rule in zip((first, late), alone):
            assert near(p.detach(), rule.theta[0], 1e-12)
    assert optimizer.state[late]["step"].tolist() == [3.0, 3.0, 3.0]
    assert same([never, frozen], before)
    assert set(optimizer.state) == {first, late}


@pytest.mark.parametrize("name", PAIRS)
def test_tensors_that_lie_otherwise(name: str) -> None:
    """Parameters and .jac transposed, sliced, expanded, in channels_last, of 0 elements."""
    x = normal(1, 2, 3, 4, 5)
    layouts = [
        x.clone().contiguous(memory_format=torch.channels_last),
        x.clone().transpose(0, 3),
        x.repeat(1, 1, 1, 2)[..., ::2],
        x[:, :0].clone(),
    ]
    for data in layouts:
        jac = normal(2, 3, *data.shape)
        for found in (jac, jac.transpose(1, 2).contiguous().transpose(1, 2), jac[:1].expand(3, *data.shape)):
            p, q = (
                nn.Parameter(data.clone(memory_format=torch.preserve_format)),
                nn.Parameter(data.contiguous().clone()),
            )
            optimizers = [make_adatask(name, [p]), make_adatask(name, [q])]
            for _ in range(3):
                p.jac, q.jac = found, found.contiguous()
                for optimizer in optimizers:
                    optimizer.step()
            assert near(p.detach(), q.detach(), 1e-14)
            assert torch.equal(p.jac, q.jac)
            for key, value in optimizers[0].state[p].items():
                assert near(value, optimizers[1].state[q][key], 1e-14)
                assert value.shape != p.shape or value.stride() == torch.empty_like(p).stride()


#: Bytes of state an element takes with T tasks and float32 moments.
BYTES = [
    ("adam", {}, lambda t: 8 * t),
    ("adam", {"amsgrad": True}, lambda t: 12 * t),
    ("adamw", {}, lambda t: 8 * t),
    ("rmsprop", {}, lambda t: 4 * t),
    ("rmsprop", {"momentum": 0.9}, lambda t: 4 * t + 4),
    ("rmsprop", {"momentum": 0.9, "centered": True}, lambda t: 8 * t + 4),
    ("adagrad", {}, lambda t: 4 * t),
]


@pytest.mark.parametrize(("name", "settings", "size"), BYTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory(name: str, settings: dict[str, Any], size: Any, dtype: torch.dtype) -> None:
    n = 1000
    for moments, share in ((None, 1.0), ("float32", 1.0), ("bfloat16", 0.5), (torch.bfloat16, 0.5)):
        for tasks in (2, 5):
            p, head = new(1, n, dtype=dtype), new(2, n, dtype=dtype)
            optimizer = make_adatask(name, [p, head], tasks, moments_dtype=moments, **settings)
            fill([p], 1, tasks)
            fill_grad([head], 1)
            optimizer.step()
            for q, t in ((p, tasks), (head, 1)):
                found = sum(v.nbytes for v in optimizer.state[q].values())
                assert 0 <= found - n * share * size(t) <= 64  # counts and AU
            assert {v.dtype for k, v in optimizer.state[p].items() if k not in ("step", "update_square")} == {
                torch.float32 if share == 1.0 else torch.bfloat16
            }


@pytest.mark.parametrize(
    ("name", "steps"), [("adam", 60), *(pytest.param(name, 150, marks=pytest.mark.slow) for name in PAIRS)]
)
def test_bfloat16_moments_train_about_as_well(name: str, steps: int) -> None:
    found = {}
    for moments, stochastic in ((None, True), ("bfloat16", True), ("bfloat16", False)):
        net = Net(seed=1)
        options = {"moments_dtype": moments, "stochastic_rounding": stochastic, "lr": 0.01}
        losses = train(net, make_adatask(name, net.parameters(), **options), steps)
        found[moments, stochastic] = sum(losses[-20:]) / 20
        assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
        start = losses[0]
    for stochastic in (True, False):
        assert abs(found["bfloat16", stochastic] - found[None, True]) < 0.05 * found[None, True] + 0.002 * start


def test_stochastic_rounding_keeps_averages_moving() -> None:
    """Second moments of gradients that became ten times smaller: bfloat16 rounded to nearest never hears of it."""
    p = new(1, 4096)
    second = {}
    for stochastic in (True, False):
        optimizer = AdaTaskAdam([p], num_tasks=2, moments_dtype="bfloat16", stochastic_rounding=stochastic)
        for i in range(1200):
            if i in (0, 200):
                p.jac = torch.full((2, 4096), 1.0 if i == 0 else 0.1)
            optimizer.step()
        second[stochastic] = float(optimizer.state[p]["exp_avg_sq_1"].double().mean())
    want = (1 - 0.999**200) * 0.999**1000 + 0.01 * (1 - 0.999**1000)
    assert abs(second[True] - want) < 0.02 * want
    assert abs(second[False] - want) > 0.2 * want
    # The bits differ between tasks and parameters, in one group and in two, and are the same the next time.
    parameters = [new(1, 4096) for _ in range(3)]
    runs = []
    for _ in range(2):
        groups = [{"params": parameters[:2]}, {"params": parameters[2:]}]
        optimizer = AdaTaskAdam(groups, num_tasks=2, moments_dtype="bfloat16")
        for p in parameters:
            p.jac = normal(1, 1, 4096).float().expand(2, -1)
        optimizer.step()
        runs.append([optimizer.state[q][f"exp_avg_{t}"] for q in parameters for t in range(2)])
    assert same(*runs)
    assert all(not torch.equal(a, b) for i, a in enumerate(runs[0]) for b in runs[0][:i])
