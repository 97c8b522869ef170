"""alphaVIL: its rounds against the same done literally; heads, parts of the data, buffers, weights, the search, what is
kept of it and what it leaves of the model, where trainings or losses come to NaN, and memory."""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from mtlgrad import AlphaVIL
from mtlgrad.alphavil import Round, Task
from tests.conftest import HAS_GPU
from tests.support.bounds import contents, hushed, near, one_line, same_values, seed_everything
from tests.support.nets import (
    ADAM,
    ALPHA,
    INNER,
    MOMENTUM,
    SGD,
    Case,
    NamedBatch,
    Sized,
    Unsized,
    case_on,
    epoch,
    named_batches,
)
from tests.support.oracles import Literal, checked, development_loss, recorder, transplanted

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = ("own", "none", "all")
#: Each inner optimizer with two of alpha's and of the kinds of heads, in both types.
SETTINGS = [
    (inner, list(ALPHA)[(n + shift) % 3], HEADS[(n - shift) % 3], dtype)
    for shift, dtype in enumerate((torch.float64, torch.float32))
    for n, inner in enumerate(INNER)
]
PLACES = [torch.tensor(p, dtype=torch.float64) for p in ([0.0, 0.0, 0.0], [1.0, -2.0, 0.5], [7.0, 0.0, 1.0])]

needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="no usable GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


# ---- rounds done literally -------------------------------------------------------------------------------------------


def follow(case: Case, vil: AlphaVIL, literal: Literal, tolerance: float = 1e-12, rounds: int = 3) -> list[str]:
    """Rounds of both, with the batches that the first drew. What was kept in each."""
    kept, before = [], vil.rounds
    for number in range(rounds):
        torch.manual_seed(number)
        found = epoch(vil)
        literal.round(case.trained_on())
        literal.compare(vil, found, tolerance)
        kept.append(found.kept)
    assert vil.rounds == before + rounds
    return kept


@pytest.mark.parametrize(("inner", "alpha", "heads", "dtype"), SETTINGS, ids=str)
def test_three_rounds_done_literally(inner: str, alpha: str, heads: Any, dtype: torch.dtype) -> None:
    """BatchNorm, a tied weight, losses that run through two heads, parameters of odd shapes and without a use."""
    case = Case(dtype=dtype, norm=True, tied=True, odd=True, also=True)
    settings = {"make_optimizer": INNER[inner], "alpha_optimizer": ALPHA[alpha], "include_heads": heads}
    vil, literal = case.vil(**settings), Literal(case, **settings)
    kept = follow(case, vil, literal, 1e-12 if dtype == torch.float64 else 1e-5)
    assert kept[0] == "search" or alpha == "lbfgs"


OPTIONS: dict[str, dict[str, Any]] = {
    "narrow": {"clip_alpha": (0.99, 1.01), "alpha_optimizer": ALPHA["adam"], "alpha_epochs": 3},
    "from below": {"clip_alpha": (1.0, float("inf")), "alpha_optimizer": ALPHA["adam"]},
    "one epoch": {"alpha_epochs": 1},
    "far": {"alpha_optimizer": lambda ps: torch.optim.SGD(ps, lr=10.0), "alpha_epochs": 3},
    "away": {"alpha_optimizer": lambda ps: torch.optim.SGD(ps, lr=1.0, maximize=True)},
    "negative weights": {"min_weight": float("-inf"), "alpha_optimizer": ALPHA["adam"], "alpha_epochs": 9},
    "negative weights, trained on 0.5": {"min_weight": 0.5, "alpha_optimizer": ALPHA["adam"], "alpha_epochs": 9},
    "moves too far": {"make_optimizer": lambda ps: torch.optim.SGD(ps, lr=3.0)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_done_literally(name: str) -> None:
    """Also searches that lead away: what is best is kept, or nothing is."""
    case = Case(dtype=torch.float64, norm=True)
    vil, literal = case.vil(**OPTIONS[name]), Literal(case, **OPTIONS[name])
    kept = follow(case, vil, literal)
    if name in ("away", "moves too far"):
        assert kept[0] == {"away": "start", "moves too far": "none"}[name]
    if "negative" in name:
        assert vil.task_weights.min() < 0
    if name == "narrow":
        assert vil.alphas.min() >= 0.99
        assert vil.alphas.max() <= 1.01


@pytest.mark.parametrize("target", ["kind", "marks"])
def test_any_task_as_target(target: str) -> None:
    """By its name or number."""
    case = Case(dtype=torch.float64, target=target)
    number = list(case.tasks).index(target)
    by_number = AlphaVIL(case.model, list(case.tasks.values()), number, make_optimizer=SGD)
    assert (case.vil().target, by_number.target) == (number, number)
    assert by_number.names == ["0", "1", "2"]
    follow(case, case.vil(), Literal(case), rounds=2)


def test_tasks_without_heads_or_with_one_between_them() -> None:
    """A head that two tasks have is moved by both of them, and by nobody else."""
    for heads in HEADS:
        case = Case(dtype=torch.float64, heads=False, also=True)
        follow(case, case.vil(include_heads=heads), Literal(case, include_heads=heads), rounds=1)
        case = Case(dtype=torch.float64, also=True)
        both = case.model.heads["kind"]
        case.change("marks", head=[*both.parameters(), *case.model.heads["marks"].parameters()])
        case.heads["marks"] += case.heads["kind"]
        follow(case, case.vil(include_heads=heads), Literal(case, include_heads=heads), rounds=1)


def test_loaders_and_dropout_done_literally() -> None:
    """The random numbers of a task's training are those of the plain loop: nothing else draws between them."""
    case = Case(norm=True, dropout=0.3, noise=0.1)
    for name, task in list(case.tasks.items()):
        case.change(name, train=DataLoader(task.train, batch_size=None, shuffle=True))
    vil, literal = case.vil(), Literal(case)
    for seed in range(2):
        seed_everything(seed)
        found = epoch(vil)
        seed_everything(seed)
        literal.round({name: task.train for name, task in case.tasks.items()})
        literal.compare(vil, found, 1e-5)


@pytest.mark.parametrize("part", ["backbone", "head", "layer"])
def test_parts_frozen_and_set_free_between_rounds(part: str) -> None:
    """Progressive unfreezing: what requires gradients when a round begins is what the round trains."""
    case = Case(dtype=torch.float64)
    vil, literal, kinds = case.vil(), Literal(case), list[str]()
    kept = [n for n, p in case.model.named_parameters() if not p.requires_grad]
    starts = {"backbone": ("first", "second"), "head": ("heads.kind",), "layer": ("first",)}[part]
    some = [n for n, _ in case.model.named_parameters() if n.startswith(starts)]
    for free in (False, True, False):
        for model in (case.model, literal.model):
            for n in some:
                model.get_parameter(n).requires_grad_(free)
        before = contents(case.model)
        kinds += follow(case, vil, literal, rounds=1)
        for n, p in case.model.named_parameters():
            still = n in kept or (n in some and not free)
            assert p.requires_grad != still
            assert torch.equal(p, before[n]) == (still or kinds[-1] == "none"), n
    assert "search" in kinds


@pytest.mark.parametrize("least", [0.01, 0.0, -0.25])
def test_weights_below_zero(least: float) -> None:
    """They stay what they are; trainings take the least weight instead. One above zero is taken as it is."""
    case = Case(dtype=torch.float64)
    vil, literal = case.vil(min_weight=least), Literal(case, min_weight=least)
    literal.weights = {"size": 1.0, "kind": -0.5, "marks": 0.001}
    vil.task_weights = list(literal.weights.values())
    follow(case, vil, literal, rounds=2)
    assert vil.task_weights[1] < 0.0


# ---- the sum, heads, buffers, weights --------------------------------------------------------------------------------


@pytest.mark.parametrize(("inner", "dtype"), list(zip(INNER, (torch.float32, torch.float64, torch.bfloat16))), ids=str)
def test_alpha_of_one_is_the_sum_of_what_the_tasks_did(inner: str, dtype: torch.dtype) -> None:
    """Exactly, from copies that were trained alone: the sum in float64, in the order of the tasks, rounded once."""
    case = Case(dtype=dtype, also=True, heads=False)
    literal = Literal(case, make_optimizer=INNER[inner])
    found = case.vil(make_optimizer=INNER[inner], clip_alpha=(1.0, 1.0), alpha_epochs=1)
    theta = contents(case.model)
    with pytest.warns(RuntimeWarning, match="alpha = 1"):
        assert found.epoch().kept == "start"
    parts = case.trained_on()
    want = {name: value.double() for name, value in theta.items()}
    for task in case.tasks:
        after, _, _ = literal.train(task, parts[task])
        for name, value in after.items():
            want[name] = want[name] + (value - theta[name]).double()
    assert same_values(contents(case.model), {name: value.to(dtype) for name, value in want.items()})
    assert found.task_weights.tolist() == found.alphas.tolist() == [1.0, 1.0, 1.0]


def test_layouts_and_types_side_by_side() -> None:
    """channels_last, parameters of two types in one model."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.head = nn.Linear(4, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.conv(x).mean((2, 3)).double())
            return out.square().mean()

    torch.manual_seed(0)
    model = Mixed().to(memory_format=torch.channels_last)
    data = [torch.randn(2, 3, 5, 5) for _ in range(3)]
    task = Task(data, lambda m, x: m(x), data)
    layout = model.conv.weight.stride()
    before = development_loss(model, task)
    found = AlphaVIL(model, [task], 0, make_optimizer=SGD).epoch()
    assert found.kept == "search"
    assert development_loss(model, task) == found.after < before
    assert model.conv.weight.stride() == layout
    assert (model.conv.weight.dtype, model.head.weight.dtype) == (torch.float32, torch.float64)


@pytest.mark.parametrize("heads", HEADS)
def test_who_trains_a_head(heads: Any) -> None:
    """A task is given its own head and no other, or all of them; how far each moves is in the rounds done literally."""
    case, given = Case(dtype=torch.float64, also=True), list[list[int]]()

    def make(parameters: list[Tensor]) -> torch.optim.Optimizer:
        given.append([id(p) for p in parameters])
        return SGD(parameters)

    head = case.model.heads["size"].bias.detach().clone()
    found = epoch(case.vil(include_heads=heads, make_optimizer=make, alpha_optimizer=ALPHA["adam"]))
    assert found.kept == "search"
    everything = {id(p) for p in case.model.parameters() if p.requires_grad}
    for task, got in zip(case.tasks, given, strict=True):
        others = {id(p) for name, head in case.model.heads.items() if name != task for p in head.parameters()}
        want = everything - (set() if heads == "all" else others)
        assert (set(got), len(got)) == (want, len(want))
    assert not torch.equal(case.model.heads["size"].bias, head)


def test_heads_as_module_list_or_generator() -> None:
    """And twice from the same tasks."""
    results = []
    for form in (lambda m: m, lambda m: list(m.parameters()), lambda m: m.parameters(), lambda m: nn.ModuleList([m])):
        case = Case(also=True)
        for name in case.tasks:
            case.change(name, head=form(case.model.heads[name]))
        case.vil()
        torch.manual_seed(1)
        epoch(case.vil())
        results.append(contents(case.model))
    assert all(same_values(result, results[0]) for result in results)


class Buffered(nn.Module):
    """A value, a counter and a mark that training writes as it is told, beside one that nobody writes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("value", torch.zeros(2))
        self.register_buffer("count", torch.tensor(5))
        self.register_buffer("mark", torch.tensor(False))
        self.register_buffer("still", torch.tensor([float("nan"), 1.0]))
        self.register_buffer("hidden", torch.zeros(()), persistent=False)

    def forward(self, batch: Any) -> Tensor:
        if self.training and batch is not None:
            value, steps, mark = batch
            self.value.fill_(value)
            self.hidden.add_(value)
            self.count += steps
            self.mark.fill_(mark)
        return (self.weight * (2.0 - self.value.sum())).square().sum() if batch is None else self.weight.square().sum()


def buffered(**options: Any) -> tuple[Buffered, AlphaVIL]:
    model = Buffered()
    data: list[list[Any]] = [[(1.0, 3, False)], [(4.0, 1, True), (4.0, 1, True)], [(0.0, 0, False)]]
    tasks = [Task(each, lambda m, b: m(b), [(0.0, 0, False)]) for each in data]
    return model, AlphaVIL(model, tasks, 0, make_optimizer=SGD, alpha_epochs=1, **options)


#: Of the tasks that changed it (the third leaves the value at 0): the target's, or their mean.
BUFFERS: list[tuple[Any, float, float]] = [("target", 1.0, 1.0), ({"hidden": "mean"}, 1.0, 4.5), ("mean", 2.5, 4.5)]


@pytest.mark.parametrize(("rule", "value", "hidden"), BUFFERS, ids=["target", "one by name", "mean"])
def test_the_rules_of_buffers(rule: Any, value: float, hidden: float) -> None:
    """Under both rules the largest of what holds no floats; between the stages they are as before the round."""
    model, vil = buffered(buffers=rule)
    before = contents(model)
    with hushed():
        for stage in vil.stages():
            assert stage.kind == "move" or same_values(contents(model), before), stage
    assert model.value.tolist() == [value] * 2
    assert model.hidden.item() == hidden
    assert model.count.item() == 8
    assert model.count.dtype == torch.int64
    assert model.mark.item() is True
    assert model.still.isnan().tolist() == [True, False]


def test_a_rule_that_is_none() -> None:
    rules: list[Any] = ["sum", {"value": "largest"}, {"nothing": "mean"}]
    for rule in rules:
        with pytest.raises(ValueError, match=r'AlphaVIL: buffers: expected "target" or "mean", or a dict of'):
            buffered(buffers=rule)


def test_the_order_of_tasks_is_a_matter_of_names() -> None:
    results = []
    for order in (("size", "kind", "marks"), ("kind", "marks", "size"), ("marks", "kind", "size")):
        case = Case(dtype=torch.float64, norm=True, also=False)
        case.tasks = {name: case.tasks[name] for name in order}
        for name, task in list(case.tasks.items()):
            case.change(name, train=Sized(task.train))
        vil = case.vil(make_optimizer=MOMENTUM)
        for _ in range(2):
            found = epoch(vil)
        weights = dict(zip(vil.names, vil.task_weights.tolist()))
        alphas = dict(zip(vil.names, found.alphas.tolist()))
        results.append((contents(case.model), weights, alphas))
    first = results[0]
    for parameters, weights, alphas in results[1:]:
        assert all(near(value, first[0][name], 1e-12) for name, value in parameters.items())
        assert weights == pytest.approx(first[1], rel=1e-12)
        assert alphas == pytest.approx(first[2], rel=1e-12)


@pytest.mark.parametrize("factor", [0.25, 1024.0])
def test_a_loss_times_c_with_a_weight_over_c(factor: float) -> None:
    """For SGD: powers of two give the same bits, and the losses shown are not weighed."""
    plain, scaled = Case(), Case()
    scaled.tasks["kind"].loss.factor = factor
    found = []
    for case, weight in ((plain, 1.0), (scaled, 1.0 / factor)):
        vil = case.vil(make_optimizer=MOMENTUM)
        vil.task_weights[1] = weight
        torch.manual_seed(3)
        found.append(epoch(vil))
    assert same_values(contents(plain.model), contents(scaled.model))
    assert torch.equal(found[0].alphas, found[1].alphas)
    assert found[1].losses[1] == pytest.approx(factor * found[0].losses[1], rel=1e-12)
    assert found[1].losses[::2] == found[0].losses[::2]


def test_weights_gather_what_the_rounds_found() -> None:
    """w starts at 1, and weighs the loss of the next round; alpha starts at 1 in each."""
    case = Case(dtype=torch.float64)
    starts: list[list[float]] = []

    def make(parameters: list[Tensor]) -> torch.optim.Optimizer:
        (alphas,) = parameters
        assert alphas.is_leaf
        assert alphas.requires_grad
        assert alphas.grad is None
        starts.append(alphas.tolist())
        return ALPHA["adam"](parameters)

    vil, want = case.vil(alpha_optimizer=make), torch.ones(3, dtype=torch.float64)
    assert torch.equal(vil.task_weights, want)
    assert torch.equal(vil.alphas, want)
    for number in range(4):
        found = epoch(vil)
        assert vil.last is found
        assert vil.rounds == number + 1
        assert torch.equal(vil.alphas, found.alphas)
        if found.kept != "none":
            want = want + (found.alphas - 1.0)
        assert torch.equal(vil.task_weights, want)
    assert starts == [[1.0, 1.0, 1.0]] * 4
    assert not torch.equal(want, torch.ones(3))


# ---- which batches a round trains on ---------------------------------------------------------------------------------


class Read(Sequence[NamedBatch]):
    """A sequence that says which of it were read."""

    def __init__(self, of: list[NamedBatch]):
        self.of, self.seen = of, list[int]()

    def __len__(self) -> int:
        return len(self.of)

    def __getitem__(self, i: Any) -> Any:
        self.seen.append(i)
        return self.of[i]


@pytest.mark.parametrize(
    ("subset", "count"),
    [(1.0, 10), (0.31, 4), (0.3, 3), (0.01, 1), (1, 1), (3, 3), (99, 10)],
)
def test_the_part_of_a_sequence(subset: Any, count: int) -> None:
    """So many different batches, in an order of this round, and no others are read."""
    case = Case(tasks=["size"], count=10)
    case.change("size", train=Read(case.tasks["size"].train))
    vil, orders = case.vil(subset=subset, alpha_epochs=1), []
    for _ in range(8):
        epoch(vil)
        order = [number for _, number in case.diary]
        assert len(order) == len(set(order)) == count
        assert case.tasks["size"].train.seen == order
        case.tasks["size"].train.seen.clear()
        case.diary.clear()
        orders.append(order)
    assert len({tuple(order) for order in orders}) > 3
    drawn = set(itertools.chain(*orders))
    assert len(drawn) > min(count, 9)


def test_a_fraction_is_not_rounded_up_for_a_rounding_error() -> None:
    """0.07 * 100 is 7.000000000000001."""
    case = Case(tasks=["size"], count=100)
    for subset, count in ((0.07, 7), (0.14, 14), (0.55, 55), (0.071, 8)):
        epoch(case.vil(subset=subset, alpha_epochs=1))
        assert len(case.diary) == count
        case.diary.clear()


@pytest.mark.parametrize("kind", [Unsized, Sized])
def test_the_part_of_something_else(kind: Any) -> None:
    """The first of a new pass; no batch is asked for and thrown away."""
    case = Case(tasks=["size", "kind"], count=6)
    case.change("size", train=kind(case.tasks["size"].train))
    train: Any = case.tasks["size"].train
    vil = case.vil(subset=4, alpha_epochs=1)
    for passes in (1, 2):
        epoch(vil)
        assert [number for task, number in case.diary if task == "size"] == [0, 1, 2, 3]
        assert (train.passes, train.given) == (passes, 4 * passes)
        case.diary.clear()
    train.given = 0
    epoch(case.vil(alpha_epochs=1))
    assert [number for task, number in case.diary if task == "size"] == list(range(6))
    if kind is Unsized:
        with pytest.raises(ValueError, match=r"subset: .*no length"):
            case.vil(subset=0.5)
    else:
        case.diary.clear()
        epoch(case.vil(subset=0.5, alpha_epochs=1))
        assert [number for task, number in case.diary if task == "size"] == [0, 1, 2]


@pytest.mark.parametrize(("subset", "count"), [(1.0, 5), (0.5, 3), (2, 2)])
def test_the_part_of_a_loader(subset: Any, count: int) -> None:
    """Batches, not samples, are counted; their samples differ from each other and from round to round."""
    rows = [NamedBatch(i, b.x[0], b.y[0]) for i, b in enumerate(named_batches("size", 1, 20))]
    case = Case(tasks=["size"])
    case.change("size", train=DataLoader(rows, batch_size=4, shuffle=True))
    seen: list[list[int]] = []

    def loss(model: Any, batch: Any) -> Tensor:
        if model.training:
            seen.append(batch.number.tolist())
        return (model.heads["size"](model(batch.x)).squeeze(1) - batch.y).square().mean()

    case.change("size", loss=loss)
    vil, drawn = case.vil(subset=subset, alpha_epochs=1), []
    for _ in range(3):
        epoch(vil)
        numbers = list(itertools.chain(*seen))
        assert (len(seen), len(set(numbers))) == (count, 4 * count)
        drawn.append(numbers)
        seen.clear()
    assert drawn[0] != drawn[1] != drawn[2]


def test_a_loader_of_a_dataset_without_a_length() -> None:
    """Its len() raises, but for a number of batches nobody needs it."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[NamedBatch]:
            return iter(named_batches("size", 1, 6))

    case = Case(tasks=["size"])
    case.change("size", train=DataLoader(Stream(), batch_size=None))
    for subset, count in ((2, 2), (1.0, 6)):
        epoch(case.vil(subset=subset, alpha_epochs=1))
        assert [number for _, number in case.diary] == list(range(count))
        case.diary.clear()
    with pytest.raises(ValueError, match=r"subset: .*'size'"):
        case.vil(subset=0.5)


def test_loaders_that_do_not_shuffle() -> None:
    """A part of them would be the same in each round. With a batch sampler, it is that one which shuffles or does
    not: the loader's own sampler is never asked."""
    case = Case(tasks=["size"])
    rows: Any = case.tasks["size"].train
    orders = {
        "plain": (DataLoader(rows, batch_size=None), False),
        "batches": (DataLoader(rows, 2, collate_fn=first), False),
        "batch sampler": (
            DataLoader(rows, batch_sampler=BatchSampler(SequentialSampler(rows), 2, False), collate_fn=first),
            False,
        ),
        "shuffled": (DataLoader(rows, 2, shuffle=True, collate_fn=first), True),
        "shuffled batches": (
            DataLoader(rows, batch_sampler=BatchSampler(RandomSampler(rows), 2, False), collate_fn=first),
            True,
        ),
        "its own": (DataLoader(rows, batch_sampler=[[3, 1], [2, 0]], collate_fn=first), True),
    }
    for name, (loader, fine) in orders.items():
        case.change("size", train=loader)
        case.vil(subset=1.0)
        for subset in (1, 0.5):
            if fine:
                epoch(case.vil(subset=subset, alpha_epochs=1))
                assert len(case.diary) == 1, name
                case.diary.clear()
                continue
            with pytest.raises(ValueError, match=r"AlphaVIL: subset: .*'size'.*shuffle=True") as error:
                case.vil(subset=subset)
            one_line(error.value, "expected 1.0", "found")


def first(rows: list[NamedBatch]) -> NamedBatch:
    return rows[0]


# ---- the search: the derivative in alpha, and what is kept -----------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "dtype"), [*((heads, torch.float64) for heads in HEADS), ("own", torch.float32)], ids=str
)
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
        want = task.loss(transplanted(case.model, leaves, merged), task.dev[i // 4])
        slopes = torch.autograd.grad(want, list(leaves.values()), allow_unused=True)
        at = {n: s.double() for n, s in zip(leaves, slopes) if s is not None and n not in fixed}
        products = [sum(float((at[n] * d).sum()) for n, d in delta.items() if n in at) for delta in deltas]
        assert loss == pytest.approx(want.item(), rel=tolerance)
        assert near(gradient, torch.tensor(products, dtype=torch.float64), tolerance)


def test_a_loss_with_derivatives_of_its_own() -> None:
    """A penalty on the gradient in the inputs; the loss has to enable gradients where it needs them."""

    def loss(model: Any, batch: NamedBatch) -> Tensor:
        with torch.enable_grad():
            x = batch.x.clone().requires_grad_()
            out = model.heads["size"](model(x)).squeeze(1)
            (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            total: Tensor = (out - batch.y).square().mean() + slope.square().mean()
        return total

    case = Case(dtype=torch.float64)
    case.change("size", loss=loss)
    vil = case.vil(alpha_optimizer=checked(PLACES), alpha_epochs=1)
    assert epoch(vil).kept == "start"


@pytest.mark.parametrize("tasks", [1, 3])
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


class Walk(torch.optim.SGD):
    """Goes where it is told to, an entry a step."""

    def __init__(self, parameters: Any, path: list[float]):
        super().__init__(parameters, lr=0.0)
        self.path = iter(path)

    def step(self, closure: Any = None) -> Any:
        closure()
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(next(self.path))


def on(path: list[float], bottom: float = 3.0, bad: Callable[[float], bool] | None = None, **options: Any) -> AlphaVIL:
    """theta = 0, and a training to 1: the development loss is (alpha - bottom)^2, and NaN where `bad`."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    data = torch.ones(1, 1).double()

    def loss(m: Any, x: Tensor) -> Tensor:
        out = m(x).sum()
        if m.training:
            return -out
        return out * math.nan if bad is not None and bad(float(out.detach())) else (out - bottom).square()

    sgd = lambda ps: torch.optim.SGD(ps, lr=1.0)  # noqa: E731
    walk = lambda ps: Walk(ps, path)  # noqa: E731
    settings = {"make_optimizer": sgd, "alpha_optimizer": walk, "alpha_epochs": len(path), **options}
    return AlphaVIL(model, [Task([data], loss, [data])], 0, **settings)


NAN = math.nan
#: Where the search goes, with options; then the alpha that is kept as what, and the losses on the way.
WALKS: dict[str, tuple[list[float], dict[str, Any], float, str, list[float]]] = {
    "of equals the first": ([2.0, 3.5, 4.0, 2.5, 9.0], {}, 3.5, "search", [1.0, 0.25, 1.0, 0.25, 36.0]),
    "nothing better": ([6.0, -1.0], {}, 1.0, "start", [9.0, 16.0]),
    "nothing better than before": ([2.0, 3.0], {"bottom": -0.1}, 0.0, "none", [4.41, 9.61]),
    "alpha is NaN": ([2.5, NAN, 3.0], {}, 2.5, "search", [0.25, NAN]),
    "alpha is infinite": ([2.5, math.inf, 3.0], {}, 2.5, "search", [0.25, NAN]),
    "alpha is minus infinity": ([2.5, -math.inf, 3.0], {}, 2.5, "search", [0.25, NAN]),
    "the loss is NaN": ([1.5, 2.0, 2.5], {"bad": lambda out: out > 2.4}, 2.0, "search", [2.25, 1.0, NAN]),
    "the loss is NaN at 1": ([2.0], {"bad": lambda out: out > 0.5}, 0.0, "none", []),
    "clipped": ([9.0, -9.0, 2.0], {"clip_alpha": (0.5, 2.5), "bottom": 2.6}, 2.5, "search", [0.01, 4.41, 0.36]),
}
WORDS = {"start": ["expected", "found", "alpha = 1", "alpha_optimizer"], "none": ["found", "stay as they were"]}


@pytest.mark.parametrize("name", WALKS)
def test_the_best_alpha_seen_is_kept(name: str) -> None:
    """Neither the last nor the first. A search ends at NaN; one that finds nothing says so, in one line."""
    path, options, alpha, kept, searched = WALKS[name]
    vil = on(path, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = vil.epoch()
    assert (vil.model.weight.item(), vil.alphas.tolist()) == (alpha, [alpha])
    assert vil.task_weights.tolist() == [1.0 if kept == "none" else alpha]
    assert (found.kept, found.sat_out, vil.rounds) == (kept, [], 1)
    assert found.searched == pytest.approx(searched, nan_ok=True)
    bottom = options.get("bottom", 3.0)
    assert found.before == pytest.approx(bottom**2)
    assert found.start == pytest.approx(NAN if searched == [] else (1.0 - bottom) ** 2, nan_ok=True)
    assert found.after == pytest.approx((alpha - bottom) ** 2)
    assert len(caught) == (kept != "search")
    for warning in caught:
        one_line(warning.message, "AlphaVIL: ", "target '0'", *WORDS[kept])


def test_the_loss_shown_is_that_of_the_model_afterwards() -> None:
    """Bit for bit, rounded parameters too: the search has seen the very ones that the model then has."""
    case = Case(dtype=torch.bfloat16, also=True)
    found = epoch(case.vil(alpha_optimizer=ALPHA["adam"]))
    assert found.kept == "search"
    assert development_loss(case.model, case.tasks["size"]) == found.after


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_development_loss_before_the_round(bad: float) -> None:
    """An error in words, and nothing has changed; with good data the round goes on where it was."""
    case = Case(norm=True)
    dev = list(case.tasks["size"].dev)
    spoiled: list[NamedBatch] = [dev[0], dev[1]._replace(y=dev[1].y * bad)]
    case.change("size", dev=spoiled)
    vil, before = case.vil(), contents(case.model)
    for _ in range(2):
        with pytest.raises(ValueError, match="dev") as error:
            vil.epoch()
        one_line(error.value, "AlphaVIL: ", "'size'", "expected a finite loss", "found")
        assert same_values(contents(case.model), before)
        assert vil.rounds == 0
    trained = len(case.diary)
    spoiled[1] = dev[1]
    assert epoch(vil).kept == "search"
    assert len(case.diary) == trained  # not trained over again


# ---- trainings that come to NaN, or to nothing -----------------------------------------------------------------------


def heard(vil: AlphaVIL) -> tuple[Round, list[str]]:
    """A round and what it says of itself."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = vil.epoch()
    assert all(warning.category is RuntimeWarning for warning in caught)
    return found, [str(warning.message) for warning in caught]


class Spoiled:
    """A task's loss, with what makes a training fail; it heals."""

    def __init__(self, loss: Any, spoil: Any):
        self.loss, self.spoil, self.ill, self.calls = loss, spoil, True, 0

    def __call__(self, model: Any, batch: Any) -> Tensor:
        if not (self.ill and model.training):
            return self.loss(model, batch)
        self.calls += 1
        return self.spoil(self, model, batch)


def times(factor: float) -> Any:
    return lambda own, model, batch: own.loss(model, batch) * factor


def last_batch(own: Spoiled, model: Any, batch: NamedBatch) -> Tensor:
    return own.loss(model, batch) * (math.nan if own.calls % 4 == 0 else 1.0)


def far_away(own: Spoiled, model: Any, batch: NamedBatch) -> Tensor:
    """BatchNorm makes finite numbers of it; only its statistics are infinite."""
    return own.loss(model, batch._replace(x=batch.x * 1e25))


def only_the_head(own: Spoiled, model: Any, batch: NamedBatch) -> Tensor:
    return own.loss(model, batch) + math.nan * model.heads[own.loss.task].bias.sum()


TROUBLE = {
    "NaN": times(math.nan),
    "infinity": times(math.inf),
    "in the last batch": last_batch,
    "in a buffer": far_away,
    "in the head": only_the_head,
}
SITTING = [
    *((trouble, "kind", "own") for trouble in TROUBLE),
    *((trouble, "size", "own") for trouble in ("NaN", "in a buffer", "in the head")),
    *(("in the head", who, heads) for who in ("size", "kind") for heads in ("all", "none")),
]


@pytest.mark.parametrize(("trouble", "who", "heads"), SITTING)
def test_who_sits_out(trouble: str, who: str, heads: Any) -> None:
    """With a warning; the others' round is as if it had moved nothing, and no delta of the round before is left.

    `size` is the target."""
    wide = trouble != "in a buffer"  # which float64 holds
    case = Case(norm=True, dtype=torch.float64 if wide else torch.float32)
    spoiled = Spoiled(case.tasks[who].loss, TROUBLE[trouble])
    case.change(who, loss=spoiled)
    number = list(case.tasks).index(who)
    vil, literal = case.vil(include_heads=heads), Literal(case, include_heads=heads)
    for ill in (False, True, False) if wide else (True, False):
        spoiled.ill, spoiled.calls, weight = ill, 0, vil.task_weights[number].clone()
        found, said = heard(vil)
        parts = case.trained_on()
        assert all(len(part) in (0, 4) for part in parts.values())
        parts[who] = case.tasks[who].train if ill else parts[who]
        spoiled.calls = 0
        literal.round(parts)
        literal.compare(vil, found, 1e-12 if wide else 1e-5)
        assert found.sat_out == [number] * ill
        assert all(value.isfinite().all() for value in contents(case.model).values())
        texts = [text for text in said if "sits" in text]
        assert len(texts) == ill
        if ill:
            one_line(Warning(texts[0]), "AlphaVIL: ", repr(who), "expected finite", "found NaN or infinity")
            assert "keeps its weight" in texts[0]
            assert vil.task_weights[number] == weight


class Drifting(torch.optim.SGD):
    """Moves what has no gradient, too, as weight decay does."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        with torch.no_grad():
            self.param_groups[0]["params"][0][1] -= 0.3
        return result


@pytest.mark.parametrize("weight", [0.5, 0.0, -1.0])
def test_who_sits_out_keeps_its_weight(weight: float) -> None:
    """Whatever the optimizer of alpha does, and whatever somebody has set the weight to."""
    case = Case()
    case.change("kind", loss=Spoiled(case.tasks["kind"].loss, times(math.nan)))
    vil = case.vil(alpha_optimizer=lambda ps: Drifting(ps, lr=0.5))
    vil.task_weights[1] = weight
    found = epoch(vil)
    assert (found.kept, found.sat_out) == ("search", [1])
    assert vil.task_weights[1] == weight


@pytest.mark.parametrize(("tasks", "norm"), [(["size"], False), (["size", "kind", "marks"], True)])
def test_all_tasks_sit_out(tasks: list[str], norm: bool) -> None:
    """The round ends and changes nothing; the next one trains again."""
    case = Case(tasks=tasks, norm=norm)
    losses = {name: Spoiled(case.tasks[name].loss, times(math.nan)) for name in tasks}
    for name in tasks:
        case.change(name, loss=losses[name])
    vil, before = case.vil(), contents(case.model)
    found, said = heard(vil)
    assert [f"task {name!r}" in text and "sits" in text for name, text in zip(tasks, said)] == [True] * len(tasks)
    assert len(said) == len(tasks) + 1
    assert found.sat_out == list(range(len(tasks)))
    assert same_values(contents(case.model), before)
    assert vil.task_weights.tolist() == [1.0] * len(tasks)
    assert (vil.rounds, found.kept) == (1, "none")
    for loss in losses.values():
        loss.ill = False
    assert epoch(vil).kept == "search"


def test_the_target_out_with_nothing_else_to_weigh() -> None:
    """A frozen backbone: no other task makes a difference to the target. They still go their way."""
    case = Case(dtype=torch.float64)
    for p in case.model.parameters():
        p.requires_grad_(False)
    case.model.heads.requires_grad_(True)
    case.change("size", loss=Spoiled(case.tasks["size"].loss, times(math.nan)))
    before = contents(case.model)
    vil = case.vil()
    found = epoch(vil)
    after = contents(case.model)
    assert found.sat_out == [0]
    assert same_values({n: after[n] for n in case.heads["size"]}, {n: before[n] for n in case.heads["size"]})
    assert vil.task_weights.tolist() == [1.0, 1.0, 1.0]
    assert found.after == found.before


@pytest.mark.parametrize("who", ["size", "kind", "all"])
def test_deltas_of_zero(who: str) -> None:
    """A task that stands still has no derivative: its alpha and weight stay at 1."""
    case = Case(dtype=torch.float64)
    still = [name for name in case.tasks if who in ("all", name)]

    def make(parameters: list[Tensor]) -> torch.optim.Optimizer:
        mine = any(p is case.model.heads[name].bias for p in parameters for name in still)
        optimizer = MOMENTUM(parameters)
        for group in optimizer.param_groups if mine else ():
            group["lr"] = 0.0
        return optimizer

    theta, vil = contents(case.model), case.vil(make_optimizer=make)
    found = epoch(vil)
    number = 0 if who == "all" else list(case.tasks).index(who)
    assert vil.task_weights[number] == 1.0
    assert found.alphas[number] == (0.0 if found.kept == "none" else 1.0)
    moved = [n for n, p in case.model.named_parameters() if not torch.equal(p, theta[n])]
    assert not set(moved) & {n for name in still for n in case.heads[name]}
    assert bool(moved) == (found.kept == "search")
    assert found.kept != "search" or who != "all"


@pytest.mark.parametrize("inner", ["sgd", "adam"])
def test_a_weight_of_zero(inner: str) -> None:
    """It trains on nothing: no delta. BatchNorm's statistics are of its data, all the same."""
    case = Case(dtype=torch.float64)
    vil = case.vil(make_optimizer=INNER[inner])
    vil.task_weights[1] = 0.0
    theta = contents(case.model)
    found = epoch(vil)
    assert found.kept == "search"
    assert found.alphas[1] == 1.0
    assert vil.task_weights[1] == 0.0
    after = contents(case.model)
    assert same_values({n: after[n] for n in case.heads["kind"]}, {n: theta[n] for n in case.heads["kind"]})
    assert math.isfinite(found.losses[1])


# ---- what a round makes of the model meanwhile, and leaves of it -----------------------------------------------------


class Watched:
    """Batches that have somebody look each time that one is asked for."""

    def __init__(self, of: Any, look: Callable[[], None]):
        self.of, self.look = of, look

    def __iter__(self) -> Iterator[NamedBatch]:
        for batch in self.of:
            self.look()
            yield batch
        self.look()


@pytest.mark.parametrize("alpha", ["sgd", "lbfgs"])
def test_the_search_never_touches_the_model(alpha: str) -> None:
    """From inside the development data and the loss: the same parameters, at the same place, not written once."""
    case = Case(norm=True, dropout=0.5, tied=True, odd=True)
    parameters, buffers = dict(case.model.named_parameters()), dict(case.model.named_buffers())
    before, tensors = contents(case.model), [*parameters.values(), *buffers.values()]
    places, versions = [t.data_ptr() for t in tensors], list[int]()
    looks = [0, 0]

    def look() -> None:
        looks[0] += 1
        assert [t.data_ptr() for t in tensors] == places
        versions[:] = versions or [t._version for t in tensors]
        assert [t._version for t in tensors] == versions
        assert same_values({**parameters, **buffers}, before)
        assert all(p.grad is None for p in parameters.values())

    target = case.tasks["size"]

    def loss(model: Any, batch: NamedBatch) -> Tensor:
        assert model is case.model
        if not model.training:
            looks[1] += 1
            look()
            assert not any(module.training for module in model.modules())
            assert model.again.weight is model.first.weight
        return target.loss(model, batch)

    case.change("size", dev=Watched(target.dev, look), loss=loss)
    vil, kinds, losses = case.vil(alpha_optimizer=ALPHA[alpha]), [], []
    with hushed():
        for stage in vil.stages():
            kinds.append(stage.kind)
            losses.append(stage.loss)
            if stage.kind != "move":
                versions.clear()  # the stages of training write, and put back
                look()
                assert dict(case.model.named_parameters()).keys() == parameters.keys()
                assert all(p is parameters[n] for n, p in case.model.named_parameters())
                assert all(b is buffers[n] for n, b in case.model.named_buffers())
    assert kinds == ["train", "train", "train", "evaluate", "alpha", "alpha", "move"]
    assert looks[1] >= 2 * (2 + 2 * 2)
    assert losses == [*vil.last.losses, vil.last.start, *vil.last.searched, vil.last.after]
    assert [t.data_ptr() for t in case.model.parameters()] == places[: len(parameters)]
    assert case.model.again.weight is case.model.first.weight
    assert all(p is parameters[n] for n, p in case.model.named_parameters())
    assert all(p.grad is None for p in case.model.parameters())
    assert all(module.training for module in case.model.modules())


class Counting(nn.Module):
    """It writes to its buffers in evaluation mode, too: in place, and by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("average", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.average = 0.9 * self.average + 0.1 * x.detach().mean()
        return self.weight * (x - self.average)


def test_buffers_that_evaluation_writes() -> None:
    """They are as training left them; between the stages, as they were before the round."""
    model, x = Counting(), torch.ones(3)
    task = Task([x, x], lambda m, b: m(b).square().mean(), [x, 2 * x])
    vil = AlphaVIL(model, [task, task], 0, make_optimizer=SGD, alpha_epochs=2)
    for number in range(2):
        before = contents(model)
        for stage in vil.stages():
            assert stage.kind == "move" or same_values(contents(model), before), stage
        assert model.calls.item() == 2 * (number + 1)
    assert not model.average.requires_grad


def test_a_loss_that_does_not_use_the_model_it_is_given() -> None:
    """A parameter that a closure has is never displaced: the search would see nothing, and the sum be taken unseen."""
    case = Case(tasks=["size"])
    weight = case.model.first.weight
    case.change("size", loss=lambda m, b: (b.x @ weight.T).square().mean())
    before = contents(case.model)
    with pytest.raises((TypeError, ValueError), match="loss") as error:
        case.vil().epoch()
    one_line(error.value, "AlphaVIL: tasks: 'size'", "expected", "found")
    assert same_values(contents(case.model), before)


def test_a_loss_that_calls_the_model_by_another_name() -> None:
    """Closures over the model or parts of it are as good as the argument."""
    results = []
    for closed in (False, True):
        case = Case(dtype=torch.float64)
        model, head = case.model, case.model.heads["size"]
        if closed:
            case.change("size", loss=lambda _, b, m=model, h=head: (h(m(b.x)).squeeze(1) - b.y).square().mean())
        torch.manual_seed(1)
        epoch(case.vil())
        results.append(contents(case.model))
    assert all(near(value, results[0][name], 1e-14) for name, value in results[1].items())


def always_frozen(model: Any) -> None:
    model.norm.train = lambda mode=True: nn.Module.train(model.norm, False)
    model.train()


MODES: dict[str, Callable[[Any], Any]] = {
    "train": lambda model: None,
    "eval": lambda model: model.eval(),
    "frozen BatchNorm": lambda model: model.norm.eval(),
    "always frozen BatchNorm": always_frozen,
    "dropout in evaluation": lambda model: (model.eval(), model.dropout.train()),
}


@pytest.mark.parametrize("kind", MODES)
def test_modes_and_gradients(kind: str) -> None:
    """Every module is in the mode it was in, after each stage and after errors; BatchNorm that is frozen stays so."""
    case = Case(norm=True, dropout=0.5)
    MODES[kind](case.model)
    modes, buffers = [m.training for m in case.model.modules()], dict(case.model.named_buffers())
    wants = [p.requires_grad for p in case.model.parameters()]
    before = {name: b.clone() for name, b in buffers.items()}
    seen: list[tuple[bool, bool]] = []
    loss = case.tasks["kind"].loss

    def spy(model: Any, batch: NamedBatch) -> Tensor:
        seen.append((model.training, model.dropout.training))
        if len(seen) == 2:
            raise OSError("once")
        return loss(model, batch)

    case.change("kind", loss=spy)
    for p in case.model.parameters():
        p.grad = torch.ones_like(p)
    vil = case.vil()
    with pytest.raises(OSError, match="once"):
        epoch(vil)
    assert [m.training for m in case.model.modules()] == modes
    for stage in vil.stages():
        assert [m.training for m in case.model.modules()] == modes, stage
        assert all(p.grad is None for p in case.model.parameters() if p.requires_grad)
    assert seen == [(True, True)] * 6  # training is training, whatever mode the model was in
    assert [p.requires_grad for p in case.model.parameters()] == wants
    assert same_values(buffers, before) == ("frozen" in kind)


def test_nothing_is_left_on_the_model() -> None:
    """No hooks, attributes or entries in the state dict."""
    case = Case(norm=True, tied=True)
    model = case.model

    def shape() -> Any:
        return {
            name: (sorted(vars(m)), list(m._parameters), list(m._buffers), len(m._forward_hooks))
            for name, m in model.named_modules()
        }

    before, keys = shape(), list(model.state_dict())
    epoch(case.vil())
    assert shape() == before
    assert list(model.state_dict()) == keys
    assert all(type(p) is nn.Parameter and p.is_leaf and p.requires_grad for p in model.parameters())
    assert not any(b.requires_grad for b in model.buffers())


def test_parametrized_weights() -> None:
    """weight_norm and spectral_norm, whose weights are made of others, and whose buffers training changes."""
    case = Case()
    torch.nn.utils.parametrizations.weight_norm(case.model.second)
    torch.nn.utils.parametrizations.spectral_norm(case.model.first)
    before = contents(case.model)
    found = epoch(case.vil())
    after = contents(case.model)
    assert found.kept == "search"
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert {"second.parametrizations.weight.original0", "first.parametrizations.weight.0._u"} <= moved


def test_parameters_replaced_between_rounds() -> None:
    """load_state_dict(assign=True): what is trained is what the model has."""
    case = Case(dtype=torch.float64)
    vil = case.vil()
    epoch(vil)
    saved = {name: 0.5 * value.clone() for name, value in case.model.state_dict().items()}
    case.model.load_state_dict(saved, assign=True)
    before = contents(case.model)
    assert epoch(vil).kept == "search"
    assert not any(torch.equal(p, before[n]) for n, p in case.model.heads["size"].named_parameters("heads.size"))


def test_an_optimizer_that_moves_more_than_it_was_given() -> None:
    """Of the model's parameters: another task's head is put back, whoever moved it."""
    case = Case(dtype=torch.float64, also=True)
    before = contents(case.model)
    vil = case.vil(make_optimizer=lambda _: ADAM([p for p in case.model.parameters() if p.requires_grad]))
    for stage in vil.stages():
        assert stage.kind == "move" or same_values(contents(case.model), before), stage
    assert development_loss(case.model, case.tasks["size"]) <= vil.last.before


def test_deltas_of_tasks_to_come_are_zeros() -> None:
    """In the state of the first round: not what the memory held before."""
    vil = Case(seed=0).vil()
    torch.use_deterministic_algorithms(True)  # memory without values is filled with NaN
    try:
        assert next(vil.stages()).kind == "train"
    finally:
        torch.use_deterministic_algorithms(False)
    for group in vil.state_dict()["deltas"]:
        assert not any(delta.any() for row in group[1:] for delta in row)


# ---- where the deltas are, and memory --------------------------------------------------------------------------------


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


@needs_gpu
def test_host_deltas_are_pinned_and_leave_the_gpu() -> None:
    peaks = {}
    for storage in ("parameters", "host"):
        torch.manual_seed(0)
        model = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(1024, 1024), nn.Tanh()))).cuda()
        data = [torch.randn(8, 1024, device="cuda")]
        tasks = [Task(data, lambda m, x, t=t: (m(x) - t).square().mean(), data) for t in range(8)]
        vil = AlphaVIL(model, tasks, 0, make_optimizer=SGD, delta_storage=storage, alpha_epochs=1)
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


ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}

CODE = """
import json, re, sys
from pathlib import Path
import torch
from torch import nn
import mtlgrad
from mtlgrad.alphavil import Task

tasks, storage, include, momentum = int(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])

def vil(width):
    shared = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(16)])
    heads = {f"h{t}": nn.Linear(width, 2 * width, bias=False) for t in range(tasks)}
    model = nn.ModuleDict({"shared": shared, **heads})
    batch = [torch.randn(2, width)]
    own = [Task(batch, lambda m, x, t=t: m[f"h{t}"](m["shared"](x)).square().mean(), batch, model[f"h{t}"])
           for t in range(tasks)]
    make = lambda ps: torch.optim.SGD(ps, 1e-3, momentum=momentum)
    made = mtlgrad.AlphaVIL(model, own, 0, make_optimizer=make, alpha_epochs=1, delta_storage=storage,
                            include_heads=include)
    return made

def resident(field):
    return int(re.search(rf"^{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text(), re.M).group(1)) * 1024
vil(64).epoch()  # threads, libraries
here, peaks = vil(1024), {}  # the shared parameters are 64 MiB, a head is 8
before = resident("VmRSS")
here.epoch()  # the deltas: they stay
stages = here.stages()
while True:
    Path("/proc/self/clear_refs").write_text("5")
    stage = next(stages, None)
    if stage is None:
        break
    peaks[stage.kind] = max(peaks.get(stage.kind, 0), resident("VmHWM") - before)
print(json.dumps(peaks))
"""


S, H = 16 << 22, 2 << 22  # bytes of the shared parameters, of a head


#: Tasks, storage, whose deltas of heads there are, momentum.
KEPT = [
    (3, "parameters", "own", 0.9),
    (3, "bfloat16", "none", 0.0),
    (2, "parameters", "all", 0.0),
    (1, "host", "own", 0.9),
]


def bytes_of_deltas(tasks: int, storage: str, heads: str, shared: int, head: int) -> int:
    found = tasks * (shared + tasks * head) if heads == "all" else tasks * (shared + head)
    return found // 2 if storage == "bfloat16" else found


@pytest.mark.parametrize(("tasks", "storage", "heads", "momentum"), KEPT)
def test_what_a_round_keeps(tasks: int, storage: Any, heads: Any, momentum: float) -> None:
    """The deltas, and nothing else, however many rounds there are."""
    model = nn.ModuleDict({name: nn.Linear(128, 128, bias=False) for name in ("shared", *map(str, range(tasks)))})
    data = [torch.randn(2, 128)]
    own = [
        Task(data, lambda m, x, t=t: m[t](m["shared"](x)).square().mean(), data, model[t])
        for t in map(str, range(tasks))
    ]
    sgd = lambda ps: torch.optim.SGD(ps, 1e-3, momentum=momentum)  # noqa: E731
    vil = AlphaVIL(model, own, 0, make_optimizer=sgd, alpha_epochs=1, delta_storage=storage, include_heads=heads)
    gc.collect()
    gc.freeze()  # all that was there before, which takes seconds to go through
    held = []
    try:
        for _ in range(3):
            epoch(vil)
            gc.collect()
            tensors = [one.untyped_storage() for one in gc.get_objects() if issubclass(type(one), Tensor)]
            held.append((len(tensors), sum({one.data_ptr(): one.nbytes() for one in tensors}.values())))
    finally:
        gc.unfreeze()
    size = bytes_of_deltas(tasks, storage, heads, 4 * 128**2, 4 * 128**2)
    assert size <= held[0][1] <= 1.05 * size
    assert held[1] == held[2]
    assert held[1][1] == held[0][1]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc")
@pytest.mark.parametrize(("tasks", "storage", "heads", "momentum"), KEPT)
def test_peak_of_each_stage(tasks: int, storage: str, heads: str, momentum: float) -> None:
    """Within 5 % of what the docstring says, as the operating system counts it."""
    command = [sys.executable, "-W", "ignore", "-c", CODE, str(tasks), storage, heads, str(momentum)]
    ran = subprocess.run(
        command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=True, timeout=300
    )
    found, parameters = json.loads(ran.stdout), S + tasks * H
    deltas, states = bytes_of_deltas(tasks, storage, heads, S, H), 1 if momentum else 0  # copies of what is trained
    expected = {
        "train": deltas + parameters + (1 + states) * (S + H),
        "alpha": deltas + parameters + S + (0 if heads == "none" else H),
        "move": deltas + parameters,
    }
    for kind, size in expected.items():
        assert abs(found[kind] / size - 1) < 0.05, (kind, found[kind] / 2**20, size / 2**20)
