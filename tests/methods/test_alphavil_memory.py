"""Where alphaVIL keeps the deltas, in how many bits, and what it does not keep."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtlgrad import AlphaVIL
from mtlgrad.alphavil import Task
from tests.conftest import HAS_GPU
from tests.support.bounds import contents, hushed, near, same_values
from tests.support.nets import ADAM, ALPHA, SGD, Case, NamedBatch, case_on, epoch
from tests.support.oracles import Literal

pytestmark = pytest.mark.usefixtures("one_thread")

needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="no usable GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


# ---- where the deltas are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", ["own", "none", "all"])
def test_deltas_on_the_host_are_the_same(device: str, heads: Any) -> None:
    ends = []
    for storage in ("parameters", "host"):
        case = case_on(Case(norm=True, tied=True, odd=True, also=True), device)
        vil = case.vil(delta_storage=storage, include_heads=heads, alpha_optimizer=ALPHA["adam"])
        for _ in range(2):
            found = epoch(vil)
        ends.append((contents(case.model), found.alphas, vil.task_weights))
    if device == "cpu":
        assert same_values(ends[0][0], ends[1][0])
        assert torch.equal(ends[0][1], ends[1][1])
    assert all(near(value, ends[0][0][name], 1e-5) for name, value in ends[1][0].items())
    assert near(ends[0][2], ends[1][2], 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("storage", ["bfloat16", "host-bfloat16"])
def test_deltas_in_bfloat16_are_rounded_once(storage: Any, device: str) -> None:
    """theta + sum of the rounded deltas, in float64 and rounded: to the last digit, from deltas found apart."""
    case = case_on(Case(also=True), device)
    literal = Literal(case, make_optimizer=ADAM)
    theta = {n: p.detach().clone() for n, p in case.model.named_parameters() if p.requires_grad}
    found = epoch(case.vil(make_optimizer=ADAM, delta_storage=storage))
    assert found.kept == "search"
    parts, want = case.trained_on(), {n: value.double() for n, value in theta.items()}
    for task, alpha in zip(case.tasks, found.alphas.tolist()):
        for n, value in literal.train(task, parts[task])[0].items():
            want[n] = want[n] + alpha * (value - theta[n]).bfloat16().double()
    for n, p in case.model.named_parameters():
        assert n not in want or ((p.double() - want[n]).abs() <= 2.0**-23 * want[n].abs()).all(), n


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_deltas_change_little(device: str) -> None:
    """A round's move is within the rounding of its deltas of that of a round with exact ones."""
    moves, ends = [], []
    for storage in ("parameters", "bfloat16"):
        case = case_on(Case(norm=True), device)
        before = contents(case.model)
        found = epoch(case.vil(delta_storage=storage, make_optimizer=ADAM))
        ends.append(found)
        after = contents(case.model)
        moves.append({n: after[n].double() - before[n].double() for n, _ in case.model.named_parameters()})
    for n, move in moves[0].items():
        assert near(moves[1][n], move, 2.0**-6), n
    assert any(not torch.equal(moves[1][n], move) for n, move in moves[0].items())  # else nothing were rounded
    assert ends[1].after == pytest.approx(ends[0].after, rel=1e-2)
    assert ends[0].start != ends[1].start


@needs_gpu
def test_host_deltas_are_pinned_and_leave_the_gpu() -> None:
    peaks = {}
    for storage in ("parameters", "host"):
        torch.manual_seed(0)
        model = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(1024, 1024), nn.Tanh()))).cuda()
        data = [torch.randn(8, 1024, device="cuda")]
        tasks = [Task(data, lambda m, x, t=t: (m(x) - t).square().mean(), data) for t in range(8)]
        vil = AlphaVIL(model, tasks, 0, make_optimizer=SGD, delta_storage=storage, alpha_epochs=1)  # type: ignore[arg-type]
        torch.cuda.reset_peak_memory_stats()
        epoch(vil)
        peaks[storage] = torch.cuda.max_memory_allocated()
        tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.shape == (1024, 1024)]
        pinned = [t for t in tensors if not t.is_cuda]
        assert len(pinned) == (64 if storage == "host" else 0)
        assert all(t.is_pinned() for t in pinned)
        del vil, model, tensors, pinned
        gc.collect()
    assert peaks["host"] < 0.7 * peaks["parameters"]


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_no_graphs_are_left() -> None:
    """After a stage nothing holds its losses, outputs or gradients; after the vil is gone, nothing of it is left."""
    case, held = Case(norm=True), list[Any]()
    for name, task in list(case.tasks.items()):

        def loss(model: Any, batch: NamedBatch, of: Any = task.loss) -> Tensor:
            value: Tensor = of(model, batch)
            held.extend(weakref.ref(one) for one in (value, model(batch.x)))
            return value

        case.change(name, loss=loss)
    vil = case.vil()
    gc.disable()
    try:
        with hushed():
            for stage in vil.stages():
                assert all(one() is None for one in held), stage
        assert len(held) > 20
        living = weakref.ref(vil)
        del vil, stage
        gc.collect()
        assert living() is None
    finally:
        gc.enable()


def test_rounds_do_not_gather_tensors() -> None:
    case = Case(norm=True)
    vil = case.vil(make_optimizer=ADAM, alpha_optimizer=ALPHA["adam"])
    counts = []
    for _ in range(3):
        epoch(vil)
        case.diary.clear()
        gc.collect()
        counts.append(sum(issubclass(type(one), Tensor) for one in gc.get_objects()))
    assert counts[1] == counts[2]
