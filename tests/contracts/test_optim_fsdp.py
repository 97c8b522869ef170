"""AdaTask's optimizers on parameters that fully_shard shards: every rank's shards together are what one process has."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import Replicate, Shard

import mtlgrad
from mtlgrad.distributed import global_means
from mtlgrad.optim import AdaTaskAdam, clip_task_grad_norm_, unscale_jac_
from mtlgrad.world.jacobians import mark_averaged
from mtlgrad.world.shards import like_sharded, local
from tests.support.bounds import near, normal, one_line, same
from tests.support.nets import OPTIMIZER_CASES, PAIRS, SETTINGS, inputs, make_adatask, new
from tests.support.ranks import (
    SHARDED_SHAPES,
    Pool,
    by_rank,
    give_grad,
    give_jac,
    local_jac,
    narrow_net,
    shard,
    sharded_net,
    shards,
    shared_and_heads,
    unsharded,
    unsharded_state,
)

EVERY = pytest.mark.parametrize("name", PAIRS)
POOLS = pytest.mark.parametrize("pool", ["two_ranks", "four_ranks"])

# ---- a step ----------------------------------------------------------------------------------------------------------


def steps(name: str, settings: dict[str, Any], dtype: torch.dtype, cut: bool, tasks: int = 3) -> Any:
    shared, heads = shared_and_heads(dtype)
    if cut:
        shared, heads = shards(shared), shards(heads)
    optimizer = make_adatask(
        name, [{"params": shared[:2]}, {"params": [*shared[2:], *heads], "lr": 0.1}], tasks, **settings
    )
    for seed in range(4):
        give_jac(shared, seed, tasks, absent=1 if seed == 2 and tasks > 1 else None)
        give_grad(heads, seed)
        optimizer.step()
        optimizer.zero_grad()
    dominance = optimizer.dominance() if tasks > 1 else torch.zeros(1)
    return [unsharded(p) for p in (*shared, *heads)], unsharded_state(optimizer), dominance


@POOLS
@pytest.mark.parametrize(("name", "case"), OPTIMIZER_CASES)
def test_steps(name: str, case: int, pool: str, request: pytest.FixtureRequest) -> None:
    """Shards move in the same bits as the whole; sums over elements are those of the whole on every rank."""
    still = {"missing": "still", "check_finite": True, "task_weights": [1.0, 0.5, 2.0]}
    settings = {**SETTINGS[name][case], **(still if case % 2 else {})}
    dtype = torch.float64 if case == 1 else torch.float32
    parameters, state, dominance = steps(name, settings, dtype, False)
    for found, kept, shares in request.getfixturevalue(pool)(steps, name, settings, dtype, True):
        assert same(found, parameters)
        assert kept.keys() == state.keys()
        for key, value in kept.items():
            # The kernels sum the squares of a block of elements in float32.
            assert near(value, state[key], 1e-6) if "update_square" in key else torch.equal(value, state[key])
        assert near(shares, dominance, 1e-6)


@EVERY
def test_one_task_and_moments_of_another_dtype(name: str, two_ranks: Pool) -> None:
    """T = 1 is torch.optim's own code, or with bfloat16 moments (heads, too) this package's."""
    for tasks, settings in ((1, {}), (1, {"moments_dtype": "bfloat16", "stochastic_rounding": False})):
        parameters, state, _ = steps(name, settings, torch.float32, False, tasks)
        for found, kept, _ in two_ranks(steps, name, settings, torch.float32, True, tasks):
            assert same(found, parameters)
            assert same(kept, state)


def hybrid() -> Any:
    p = shards([new(1, 5, 2)], hybrid=True)[0]
    give_jac([p], 1)
    p.jac = like_sharded(local(p.jac), p, 3)
    optimizer = AdaTaskAdam([p], num_tasks=3, missing="still", check_finite=True)
    norms = clip_task_grad_norm_([p], 1.0)
    optimizer.step()
    q = shards([torch.zeros(1024)], hybrid=True)[0]
    q.jac = like_sharded(torch.full((3, 512), 1.2345), q, 3)
    rounding = AdaTaskAdam([q], num_tasks=3, moments_dtype="bfloat16")
    rounding.step()
    return norms, unsharded(p), optimizer.state[p]["update_square"], local(rounding.state[q]["exp_avg_sq_1"])


def test_shards_with_replicas(four_ranks: Pool) -> None:
    """Each element counts once, and replicas round alike."""
    p = new(1, 5, 2)
    give_jac([p], 1)
    optimizer = AdaTaskAdam([p], num_tasks=3)
    norms = clip_task_grad_norm_([p], 1.0)
    optimizer.step()
    found = four_ranks(hybrid)
    for got_norms, whole_p, squares, _ in found:
        assert near(got_norms, norms, 1e-13)
        assert torch.equal(whole_p, p)
        assert near(squares, optimizer.state[p]["update_square"], 1e-6)
    first, second, *replicas = (bits for *_, bits in found)
    assert same(replicas, [first, second])
    assert not torch.equal(first, second)


def counted() -> list[int]:
    """Bytes of the collectives of a step."""
    shared = shards(shared_and_heads()[0])
    found: list[int] = []
    original = dist.all_reduce
    for settings in ({}, {"dominance_decay": None}, {"missing": "still", "check_finite": True}):
        optimizer = AdaTaskAdam(shared, num_tasks=3, **settings)
        give_jac(shared, 1)
        sent: list[int] = []
        dist.all_reduce = lambda t, *a, **k: (sent.append(t.numel() * t.element_size()), original(t, *a, **k))[1]  # noqa: B023
        try:
            optimizer.step()
        finally:
            dist.all_reduce = original
        found += [len(sent), sum(sent)]
    return found


def test_bytes(two_ranks: Pool) -> None:
    """8 P T for dominance, and 8 T a group for each of `missing` and `check_finite`."""
    squares, marks = 8 * 3 * len(SHARDED_SHAPES), 8 * 3
    assert two_ranks(counted) == [[1, squares, 0, 0, 3, squares + 2 * marks]] * 2


# ---- training --------------------------------------------------------------------------------------------------------


def labels(step: int, rows: int) -> list[Tensor]:
    """Which examples of a batch have labels for each task: task 1 is absent on the first ranks every other step."""
    index = torch.arange(rows)
    return [index >= 0, index >= (rows - 3 if step % 2 else 0), index % 3 != 0]


def trained(name: str, settings: dict[str, Any], number: int, counts: list[int] | None, dtype: torch.dtype) -> Any:
    net = narrow_net() if counts is None else None
    net = (sharded_net() if net is None else net).to(dtype)
    optimizer = make_adatask(name, net.parameters(), **settings)
    for i in range(number):
        x, masks = inputs(12, i).to(dtype), labels(i, 12)
        if counts is not None:
            x = by_rank(x, counts)[dist.get_rank()]
            masks = [by_rank(mask, counts)[dist.get_rank()] for mask in masks]
        losses = global_means([loss[mask] for loss, mask in zip(net(x)[1], masks)])
        mtlgrad.task_backward(losses, net.shared)
        clip_task_grad_norm_(net.shared, 5.0)
        optimizer.step()
        optimizer.zero_grad()
    return [unsharded(p) for p in net.parameters()], unsharded_state(optimizer), optimizer.dominance([net.shared])


@pytest.mark.parametrize(("pool", "counts"), [("two_ranks", [11, 1]), ("four_ranks", [5, 1, 2, 4])])
@EVERY
def test_training(name: str, pool: str, counts: list[int], request: pytest.FixtureRequest) -> None:
    """Forward, task_backward, clipping and step under fully_shard, with uneven batches and a task absent on some
    ranks."""
    settings = {"eps": 1e-3, "missing": "still"}
    parameters, state, dominance = trained(name, settings, 6, None, torch.float32)
    for found, kept, shares in request.getfixturevalue(pool)(trained, name, settings, 6, counts, torch.float32):
        assert all(near(p, q, 1e-6) for p, q in zip(found, parameters, strict=True))
        assert kept.keys() == state.keys()
        assert all(near(kept[key], state[key], 2e-5) for key in state)
        assert near(shares, dominance, 1e-5)


# ---- what depends on values ------------------------------------------------------------------------------------------


def refusals() -> list[str]:
    """A NaN in a shard of one rank alone: in .jac of a task, then in a head."""
    messages = []
    shared, heads = (shards(ps) for ps in shared_and_heads())
    optimizer = AdaTaskAdam([*shared, *heads], num_tasks=3, check_finite=True)
    for place in ("jac", "grad"):
        give_jac(shared, 1)
        give_grad(heads, 1)
        if dist.get_rank() == 1:
            (local(shared[0].jac)[2] if place == "jac" else local(heads[0].grad)).view(-1)[0] = math.nan
        before = [local(p).clone() for p in (*shared, *heads)]
        with pytest.raises(ValueError, match="expected") as error:
            optimizer.step()
        messages.append(str(error.value))
        assert same(before, [local(p) for p in (*shared, *heads)])
        assert not optimizer.state
    give_jac(shared, 1)
    if dist.get_rank() == 1:
        local(shared[0].jac)[1].view(-1)[0] = math.inf
    with pytest.raises(RuntimeError, match="found a norm of inf in task 1"):
        clip_task_grad_norm_(shared, 1.0, error_if_nonfinite=True)
    return messages


def test_not_finite_on_one_rank(two_ranks: Pool) -> None:
    first, second = two_ranks(refusals)
    assert first == second
    assert "NaN or infinity in .jac of task 2" in first[0]
    assert "parameter 4 of group 0: expected a finite .grad" in first[1]


def clipped() -> Any:
    shared = shards(shared_and_heads()[0])
    give_jac(shared, 3)
    found = clip_task_grad_norm_(iter([*shared, new(1, 2)]), 2.0)
    return found, clip_task_grad_norm_(shared, math.inf)


@POOLS
def test_clipping(pool: str, request: pytest.FixtureRequest) -> None:
    shared = shared_and_heads()[0]
    give_jac(shared, 3)
    want, after = clip_task_grad_norm_(shared, 2.0), clip_task_grad_norm_(shared, math.inf)
    assert (want > 2.0).any()
    assert (want < 2.0).any()
    for found in request.getfixturevalue(pool)(clipped):
        assert near(found[0], want, 1e-13)
        assert near(found[1], after, 1e-6)


def layouts() -> None:
    p = shards([new(1, 4, 3)])[0]
    optimizer = AdaTaskAdam([p], num_tasks=2)
    jacobian = normal(1, 2, 4, 3).float()
    wrong = (jacobian, shard(jacobian, p.device_mesh, Replicate()), shard(jacobian, p.device_mesh))
    for each in wrong:
        p.jac = each
        with pytest.raises(ValueError, match=r"expected \.jac sharded like the parameter") as error:
            optimizer.step()
        one_line(error.value, "AdaTaskAdam.step: parameter 0 of group 0", "DTensor [Shard(dim=0)]", "task_backward")
    q = nn.Parameter(normal(1, 4, 3).float())
    q.jac = like_sharded(local_jac(jacobian, p), p, 2)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"expected \.jac sharded like the parameter, an ordinary tensor"):
        AdaTaskAdam([q], num_tasks=2).step()
    for placement in (Shard(1), Replicate()):
        r: Any = nn.Parameter(shard(new(1, 4, 3).detach(), p.device_mesh, placement))
        s = new(1, 4, 3)
        shares = []
        for each in (r, s):
            give_jac([each], 1, 2)
            one = AdaTaskAdam([each], num_tasks=2)
            one.step() if each is r else averaged_step(one, each)
            shares.append(one.dominance())
        assert torch.equal(unsharded(r), s)
        assert near(*shares, 1e-6)


def averaged_step(optimizer: Any, p: Any) -> None:
    mark_averaged([p.jac], None)
    optimizer.step()


def test_layouts(two_ranks: Pool) -> None:
    two_ranks(layouts)


# ---- stochastic rounding ---------------------------------------------------------------------------------------------


def rounded(cut: bool, seed: int = 0) -> Tensor:
    """The second moments of task 0 of a parameter whose elements are all alike, [1024]."""
    p = nn.Parameter(torch.zeros(1024))
    p = shards([p])[0] if cut else p
    optimizer = AdaTaskAdam([new(1, 1), p], num_tasks=2, moments_dtype="bfloat16")
    jacobian = torch.full((2, 1024), 1.2345)
    p.jac = like_sharded(local_jac(jacobian, p), p, 2) if cut else jacobian  # type: ignore[attr-defined]
    optimizer.step()
    return unsharded(optimizer.state[p]["exp_avg_sq_0"]).double()


def test_random_bits(two_ranks: Pool) -> None:
    """The first shard has those of a parameter that is no longer; the other has others."""
    first, again = two_ranks(rounded, True)
    assert torch.equal(first, again)
    alone = rounded(False)
    half = 512
    assert torch.equal(first[:half], alone[:half])
    assert 0.3 < (first[:half] == first[half:]).double().mean() < 0.7
    exact = 0.001 * 1.2345**2
    assert len(first.unique()) == 2
    assert abs(first.mean() - exact) < 0.1 * (first.max() - first.min())


# ---- GradScaler ------------------------------------------------------------------------------------------------------


def scaled(kind: str, bad: bool, explicit: bool) -> Any:
    shared, heads = (shards(ps) for ps in shared_and_heads())
    # Not sharded, as what fully_shard ignores; torch's own unscale_ cannot have both.
    plain = [] if explicit else [new(20, 6)]
    optimizer = AdaTaskAdam([*shared, *heads, *plain], num_tasks=3)
    made: Any = torch.amp.GradScaler if kind == "plain" else ShardedGradScaler
    scaler = made("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    give_jac(shared, 1)
    give_grad([*heads, *plain], 1)
    if bad and dist.get_rank() == 0:
        local(shared[1].jac)[2].view(-1)[1] = math.inf
    wanted = [local(p.jac) / 8.0 for p in shared] + [local(p.grad) / 8.0 for p in (*heads, *plain)]
    before = [local(p).clone() for p in (*shared, *heads, *plain)]
    if explicit:
        with warnings.catch_warnings():  # torch's own, of ShardedGradScaler and DTensors
            warnings.filterwarnings("ignore", "Found a non-scalar tensor with numel=1")
            scaler.unscale_(optimizer)
        with pytest.raises(RuntimeError, match="found it scaled"):
            scaler.step(optimizer)
        unscale_jac_(scaler, optimizer)
        if not bad:
            clip_task_grad_norm_(shared, math.inf)
    else:  # what others see that ask as the scaler does
        assert not optimizer._step_supports_amp_scaling
        assert torch.nn.utils.clip_grad_norm_([p for p in shared if p.grad is not None], 1.0) == 0.0
    scaler.step(optimizer)
    found = [local(p.jac) for p in shared] + [local(p.grad) for p in (*heads, *plain)]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert same(before, [local(p) for p in (*shared, *heads, *plain)]) == bad
    assert all(p.grad is None for p in shared)
    scaler.update()
    return scaler.get_scale(), [unsharded(p) for p in shared]


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("kind", ["plain", "sharded"])
def test_scalers(kind: str, explicit: bool, two_ranks: Pool, four_ranks: Pool) -> None:
    """An infinity in a shard of one rank skips the step of all, which agree on the scale."""
    for pool in (two_ranks, four_ranks):
        assert {scale for scale, _ in pool(scaled, kind, True, explicit)} == {4.0}
        every = pool(scaled, kind, False, explicit)
        assert {scale for scale, _ in every} == {8.0}
        shared = shared_and_heads()[0]
        optimizer = AdaTaskAdam(shared, num_tasks=3)
        give_jac(shared, 1)
        for p in shared:
            p.jac /= 8.0  # type: ignore[attr-defined]
        optimizer.step()
        assert all(same(found, shared) for _, found in every)
