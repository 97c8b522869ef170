"""alphaVIL's rounds: against the same done literally, and what heads, parts of the data, buffers and weights mean."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mtlgrad import AlphaVIL
from mtlgrad.alphavil import Task
from tests.support.bounds import contents, near, same_values, seed_everything
from tests.support.nets import ADAM, ALPHA, INNER, MOMENTUM, SGD, Case, Sized, epoch
from tests.support.oracles import Literal, development_loss, recorder, transplanted

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = ("own", "none", "all")
#: Each inner optimizer with each of alpha's, each of them with each kind of heads.
SETTINGS = [(i, a, HEADS[(n + m) % 3]) for n, i in enumerate(INNER) for m, a in enumerate(ALPHA)]


def follow(case: Case, vil: AlphaVIL, literal: Literal, tolerance: float, rounds: int = 3) -> list[str]:
    """Rounds of both, with the batches that the first drew. What was kept in each."""
    kept = []
    for number in range(rounds):
        torch.manual_seed(number)
        found = epoch(vil)
        literal.round(case.trained_on())
        literal.compare(vil, found, tolerance)
        kept.append(found.kept)
    assert vil.rounds == rounds
    return kept


@pytest.mark.parametrize(
    ("inner", "alpha", "heads", "dtype"),
    [*((*each, torch.float64) for each in SETTINGS), *((*each, torch.float32) for each in SETTINGS[::4])],
    ids=str,
)
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
    kept = follow(case, vil, literal, 1e-12)
    if name in ("away", "moves too far"):
        assert kept[0] == {"away": "start", "moves too far": "none"}[name]
    if "negative" in name:
        assert vil.task_weights.min() < 0
    if name == "narrow":
        assert vil.alphas.min() >= 0.99
        assert vil.alphas.max() <= 1.01


@pytest.mark.parametrize("target", ["size", "kind", "marks"])
def test_any_task_as_target(target: str) -> None:
    """By its name or number; frozen layers stay where they are."""
    case = Case(dtype=torch.float64, target=target)
    number = list(case.tasks).index(target)
    by_number = AlphaVIL(case.model, list(case.tasks.values()), number, make_optimizer=SGD)
    assert (case.vil().target, by_number.target) == (number, number)
    assert by_number.names == ["0", "1", "2"]
    frozen = contents(case.model.again)
    follow(case, case.vil(), Literal(case), 1e-12, 2)
    assert same_values(contents(case.model.again), frozen)


def test_tasks_without_heads_or_with_one_between_them() -> None:
    """A head that two tasks have is moved by both of them, and by nobody else."""
    for heads in HEADS:
        case = Case(dtype=torch.float64, heads=False, also=True)
        follow(case, case.vil(include_heads=heads), Literal(case, include_heads=heads), 1e-12, 1)
        case = Case(dtype=torch.float64, also=True)
        both = case.model.heads["kind"]
        case.change("marks", head=[*both.parameters(), *case.model.heads["marks"].parameters()])
        case.heads["marks"] += case.heads["kind"]
        literal = Literal(case, include_heads=heads)
        literal.owners_of_two = True
        follow(case, case.vil(include_heads=heads), literal, 1e-12, 1)


def test_loaders_and_dropout_done_literally() -> None:
    """The random numbers of a task's training are those of the plain loop: nothing else draws between them."""
    case = Case(norm=True, dropout=0.3, noise=0.1)
    for name, task in list(case.tasks.items()):
        case.change(name, train=DataLoader(task.train, batch_size=None, shuffle=True))  # type: ignore[arg-type]
    vil, literal = case.vil(), Literal(case)
    for seed in range(2):
        seed_everything(seed)
        found = epoch(vil)
        seed_everything(seed)
        literal.round({name: task.train for name, task in case.tasks.items()})
        literal.compare(vil, found, 1e-5)


# ---- the sum --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inner", INNER)
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


def test_a_task_alone_at_alpha_of_one_is_its_training() -> None:
    """As far as theta + (after - theta) is after."""
    case = Case(tasks=["size"], dtype=torch.float64, norm=True)
    plain, task = copy.deepcopy(case.model), case.tasks["size"]
    epoch(case.vil(clip_alpha=(1.0, 1.0), make_optimizer=ADAM))
    optimizer = ADAM(plain.parameters())
    for batch in case.trained_on()["size"]:
        optimizer.zero_grad()
        task.loss(plain, batch).backward()
        optimizer.step()
    mine = contents(plain)
    assert all(near(value, mine[name], 1e-15) for name, value in contents(case.model).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_layouts_and_types_side_by_side(dtype: torch.dtype) -> None:
    """channels_last, parameters of two types in one model."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.head = nn.Linear(4, 1).to(dtype)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.conv(x).mean((2, 3)).to(dtype))
            return out.square().mean()

    torch.manual_seed(0)
    model = Mixed().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    data = [torch.randn(2, 3, 5, 5) for _ in range(3)]
    task = Task(data, lambda m, x: m(x), data)
    layout = model.conv.weight.stride()
    before = development_loss(model, task)
    found = AlphaVIL(model, [task], 0, make_optimizer=SGD).epoch()
    assert found.kept == "search"
    assert development_loss(model, task) == found.after < before
    assert model.conv.weight.stride() == layout
    assert (model.conv.weight.dtype, model.head.weight.dtype) == (torch.float32, dtype)


# ---- heads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", HEADS)
def test_who_trains_and_who_weighs_a_head(heads: Any) -> None:
    """own: its task's alpha moves it; none: it goes all the way; all: every task that reaches it moves it."""
    case = Case(dtype=torch.float64, also=True)
    literal, given = Literal(case), list[list[int]]()

    def make(parameters: list[Tensor]) -> torch.optim.Optimizer:
        given.append([id(p) for p in parameters])
        return SGD(parameters)

    theta = contents(case.model)
    vil = case.vil(include_heads=heads, make_optimizer=make, alpha_optimizer=ALPHA["adam"])
    found = epoch(vil)
    assert found.kept == "search"
    parts = case.trained_on()
    literal.include_heads = heads
    deltas = [{n: a - theta[n] for n, a in literal.train(task, parts[task])[0].items()} for task in case.tasks]
    everything = [p for p in case.model.parameters() if p.requires_grad]
    for t, task in enumerate(case.tasks):
        mine = {id(p) for p in case.model.heads[task].parameters()}
        others = {id(p) for p in case.model.heads.parameters()} - mine
        want = {id(p) for p in everything} - (set() if heads == "all" else others)
        assert (set(given[t]), len(given[t])) == (want, len(want))
        for name in case.heads[task]:
            alphas = found.alphas.tolist()
            movers = range(3) if heads == "all" else [t]
            move = sum((1.0 if heads == "none" else alphas[i]) * deltas[i][name] for i in movers)
            assert near(contents(case.model)[name] - theta[name], move, 1e-12)  # type: ignore[arg-type]
    if heads == "all":
        assert deltas[2]["heads.size.bias"].abs().max() > 0  # else it were "own"


@pytest.mark.parametrize("heads", HEADS)
def test_heads_as_module_list_or_generator(heads: Any) -> None:
    """And twice from the same tasks."""
    results = []
    for form in (lambda m: m, lambda m: list(m.parameters()), lambda m: m.parameters(), lambda m: nn.ModuleList([m])):
        case = Case(also=True)
        for name in case.tasks:
            case.change(name, head=form(case.model.heads[name]))
        case.vil(include_heads=heads)
        torch.manual_seed(1)
        epoch(case.vil(include_heads=heads))
        results.append(contents(case.model))
    assert all(same_values(result, results[0]) for result in results)


# ---- buffers --------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("rule", ["target", {"hidden": "mean"}])
def test_buffers_are_the_targets(rule: Any) -> None:
    """As its training left them; what it left alone, as the last that changed it did."""
    model, vil = buffered(buffers=rule)
    epoch(vil)
    assert model.value.tolist() == [1.0, 1.0]
    assert model.hidden.item() == (1.0 if rule == "target" else (1.0 + 8.0) / 2)
    assert model.count.item() == 8
    assert model.mark.item() is True
    assert model.still.isnan().tolist() == [True, False]


@pytest.mark.parametrize("rule", ["sum", {"value": "largest"}, {"nothing": "mean"}])
def test_a_rule_that_is_none(rule: Any) -> None:
    with pytest.raises(ValueError, match=r'AlphaVIL: buffers: expected "target" or "mean", or a dict of'):
        buffered(buffers=rule)


def test_the_rule_of_means() -> None:
    """The mean over the tasks whose training changed it, the largest of what holds no floats."""
    model, vil = buffered(buffers="mean")
    before = contents(model)
    seen = []
    for stage in vil.stages():
        seen.append(stage.kind)
        if stage.kind != "move":
            assert same_values(contents(model), before)
    assert seen == ["train", "train", "train", "evaluate", "alpha", "move"]
    assert model.value.tolist() == [2.5, 2.5]  # of 1 and 4: the third left it at 0
    assert model.hidden.item() == (1.0 + 8.0) / 2
    assert model.count.item() == 8
    assert model.count.dtype == torch.int64
    assert model.mark.item() is True
    assert model.still.isnan().tolist() == [True, False]


def test_the_search_sees_the_buffers_that_will_be() -> None:
    """At the parameters before the round the buffers are those before it."""
    case = Case(dtype=torch.float64, norm=True)
    make, seen = recorder()
    vil = case.vil(alpha_optimizer=make, alpha_epochs=1, clip_alpha=(1.0, 1.0))
    before = development_loss(case.model, case.tasks["size"])
    theta, buffers = contents(case.model), {n: b.clone() for n, b in case.model.named_buffers()}
    found = epoch(vil)
    assert found.before == pytest.approx(before, rel=1e-14)
    moved = dict(case.model.named_buffers())
    assert not same_values(moved, buffers)
    model = transplanted(case.model, {}, moved)
    wants = [float(case.tasks["size"].loss(model, batch).detach()) for batch in case.tasks["size"].dev]  # type: ignore[union-attr]
    assert [loss for _, loss, _ in seen] == pytest.approx(wants, rel=1e-14)
    assert not same_values(contents(case.model), theta)


# ---- weights --------------------------------------------------------------------------------------------------------


def test_the_order_of_tasks_is_a_matter_of_names() -> None:
    results = []
    for order in itertools.permutations(("size", "kind", "marks")):
        case = Case(dtype=torch.float64, norm=True, also=False)
        case.tasks = {name: case.tasks[name] for name in order}
        for name, task in list(case.tasks.items()):
            case.change(name, train=Sized(task.train))  # type: ignore[arg-type]
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


@pytest.mark.parametrize("factor", [0.25, 4.0, 1024.0])
def test_a_loss_times_c_with_a_weight_over_c(factor: float) -> None:
    """For SGD: powers of two give the same bits, and the losses shown are not weighed."""
    plain, scaled = Case(), Case()
    scaled.tasks["kind"].loss.factor = factor  # type: ignore[attr-defined]
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
        starts.append(parameters[0].tolist())
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


def test_shown_losses_are_means_over_batches() -> None:
    case = Case(dtype=torch.float64, tasks=["size", "kind"])
    vil = case.vil(make_optimizer=lambda ps: torch.optim.SGD(ps, lr=0.0))
    task = case.tasks["kind"]
    want = torch.stack([task.loss(case.model, batch) for batch in task.train]).mean()  # type: ignore[union-attr]
    dev = development_loss(case.model, case.tasks["size"])
    case.diary.clear()
    stages = []
    with pytest.warns(RuntimeWarning, match="alpha = 1"):
        stages.extend(vil.stages())
    found = vil.last
    assert found is not None
    assert found.losses[1] == pytest.approx(want.item(), rel=1e-14)
    assert [found.before, found.start, found.after, *found.searched] == pytest.approx([dev] * 5, rel=1e-14)
    assert stages[1].loss == found.losses[1]
    assert [stage.loss for stage in stages[2:]] == [found.start, *found.searched, found.after]
