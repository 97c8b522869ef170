"""alphaVIL where trainings or losses come to NaN, or to nothing at all."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtlgrad import AlphaVIL
from mtlgrad.alphavil import Round, Task
from tests.support.bounds import contents, one_line, same_values
from tests.support.nets import ADAM, INNER, Case, NamedBatch, epoch
from tests.support.oracles import Literal, development_loss

pytestmark = pytest.mark.usefixtures("one_thread")


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


def not_a_number_in_the_data(own: Spoiled, model: Any, batch: NamedBatch) -> Tensor:
    x = batch.x.clone()
    x[3, 2] = math.nan
    return own.loss(model, batch._replace(x=x))


def far_away(own: Spoiled, model: Any, batch: NamedBatch) -> Tensor:
    """BatchNorm makes finite numbers of it; only its statistics are infinite."""
    return own.loss(model, batch._replace(x=batch.x * 1e25))


def only_the_head(own: Spoiled, model: Any, batch: NamedBatch) -> Tensor:
    return own.loss(model, batch) + math.nan * model.heads[own.loss.task].bias.sum()


TROUBLE = {
    "NaN": times(math.nan),
    "infinity": times(math.inf),
    "in the last batch": last_batch,
    "in the data": not_a_number_in_the_data,
    "in a buffer": far_away,
    "in the head": only_the_head,
}


SITTING = [(trouble, who, "own") for trouble in TROUBLE for who in ("size", "kind")]
SITTING += [("in the head", who, heads) for who in ("size", "kind") for heads in ("all", "none")]


@pytest.mark.parametrize(("trouble", "who", "heads"), SITTING)
def test_who_sits_out(trouble: str, who: str, heads: Any) -> None:
    """With a warning; the others' round is as if it had moved nothing, and so is its next one. `size` is the target."""
    case = Case(norm=True, dtype=torch.float32)
    spoiled = Spoiled(case.tasks[who].loss, TROUBLE[trouble])
    case.change(who, loss=spoiled)
    number = list(case.tasks).index(who)
    vil, literal = case.vil(include_heads=heads), Literal(case, include_heads=heads)
    found, said = heard(vil)
    (text,) = (text for text in said if "sits" in text)
    one_line(Warning(text), "AlphaVIL: ", repr(who), "expected finite", "found NaN or infinity", "keeps its weight")
    assert found.sat_out == [number]
    parts = case.trained_on()
    for part in parts.values():
        assert len(part) in (0, 4)
    parts[who] = case.tasks[who].train  # type: ignore[assignment]
    spoiled.calls = 0
    literal.round(parts)
    assert literal.sat_out == [who]
    literal.compare(vil, found, 1e-5)
    assert vil.task_weights[number] == 1.0
    assert all(value.isfinite().all() for value in contents(case.model).values())
    spoiled.ill = False
    found = epoch(vil)
    literal.round(case.trained_on())
    literal.compare(vil, found, 1e-5)
    assert found.sat_out == []


class Drifting(torch.optim.SGD):
    """Moves what has no gradient, too, as weight decay does."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        with torch.no_grad():
            self.param_groups[0]["params"][0][1] -= 0.3
        return result


@pytest.mark.parametrize("weight", [1.0, 0.5, 0.0, -1.0])
def test_who_sits_out_keeps_its_weight(weight: float) -> None:
    """Whatever the optimizer of alpha does, and whatever somebody has set the weight to."""
    case = Case()
    case.change("kind", loss=Spoiled(case.tasks["kind"].loss, times(math.nan)))
    vil = case.vil(alpha_optimizer=lambda ps: Drifting(ps, lr=0.5))
    vil.task_weights[1] = weight
    found = epoch(vil)
    assert (found.kept, found.sat_out) == ("search", [1])
    assert vil.task_weights[1] == weight


def test_a_task_out_and_in_again_takes_no_old_delta_along() -> None:
    """Two rounds: the delta of the first must not be there in the second."""
    case = Case(dtype=torch.float64)
    spoiled = Spoiled(case.tasks["kind"].loss, times(math.nan))
    spoiled.ill = False
    case.change("kind", loss=spoiled)
    vil, literal = case.vil(), Literal(case)
    for ill in (False, True, False):
        spoiled.ill = ill
        found = epoch(vil)
        parts = case.trained_on()
        literal.round(parts)
        literal.compare(vil, found, 1e-12)
        assert bool(found.sat_out) == ill


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("tasks", [["size"], ["size", "kind", "marks"]])
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


# ---- nothing to find ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("who", ["size", "kind", "all"])
def test_deltas_of_zero(who: str, inner: str) -> None:
    """A task that stands still has no derivative: its alpha and weight stay at 1."""
    case = Case(dtype=torch.float64)
    still = [name for name in case.tasks if who in ("all", name)]

    def make(parameters: list[Tensor]) -> torch.optim.Optimizer:
        mine = any(p is case.model.heads[name].bias for p in parameters for name in still)
        optimizer = INNER[inner](parameters)
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


@pytest.mark.parametrize("least", [0.01, 0.0, 1.0, -0.25, -math.inf])
def test_weights_below_zero(least: float) -> None:
    """They stay what they are; trainings take the least weight instead. One above zero is taken as it is."""
    case = Case(dtype=torch.float64)
    vil, literal = case.vil(min_weight=least), Literal(case, min_weight=least)
    literal.weights = {"size": 1.0, "kind": -0.5, "marks": 0.001}
    vil.task_weights = list(literal.weights.values())  # type: ignore[assignment]
    for _ in range(2):
        found = epoch(vil)
        literal.round(case.trained_on())
        literal.compare(vil, found, 1e-12)
    assert vil.task_weights[1] < 0.0


# ---- development losses that are no numbers -------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_development_loss_before_the_round(bad: float) -> None:
    """An error in words, and nothing has changed; with good data the round goes on where it was."""
    case = Case(norm=True)
    dev = list(case.tasks["size"].dev)  # type: ignore[arg-type]
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


@pytest.mark.parametrize("lr", [1e12, 1e30])
def test_no_development_loss_at_alpha_of_one(lr: float) -> None:
    """Parameters of 1e30 are finite, their loss is not: the round is not made."""

    def loss(model: Any, x: Tensor) -> Tensor:
        return model(x).sum() if model.training else model(x).square().sum() * model(x).square().sum()

    model = nn.Linear(3, 1)
    data = [torch.ones(2, 3)]
    before = contents(model)
    vil = AlphaVIL(model, [Task(data, loss, data)], 0, make_optimizer=lambda ps: torch.optim.SGD(ps, lr=lr))
    with pytest.warns(RuntimeWarning, match="stay as they were"):
        found = vil.epoch()
    assert (found.kept, found.sat_out, found.searched) == ("none", [], [])
    assert not math.isfinite(found.start)
    assert same_values(contents(model), before)
    assert vil.task_weights.tolist() == [1.0]


def test_no_development_loss_in_the_search() -> None:
    """It ends there, and what was best before is kept."""

    def loss(model: Any, x: Tensor) -> Tensor:
        if model.training:
            return -model(x).sum()
        out = model(x).sum()
        return (out - 3.0).square() if out < 2.4 else out * math.nan

    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    data = [torch.ones(1, 1).double()]
    sgd = lambda ps: torch.optim.SGD(ps, lr=1.0)  # noqa: E731
    slow = lambda ps: torch.optim.SGD(ps, lr=0.25)  # noqa: E731
    vil = AlphaVIL(model, [Task(data, loss, data)], 0, make_optimizer=sgd, alpha_optimizer=slow, alpha_epochs=9)
    found = vil.epoch()  # 1, 2, 2.5
    assert (found.kept, found.alphas.tolist(), model.weight.item()) == ("search", [2.0], 2.0)
    assert len(found.searched) == 2
    assert math.isnan(found.searched[1])


# ---- shapes of models -----------------------------------------------------------------------------------------------


def test_frozen_backbone_and_frozen_head() -> None:
    for frozen in ("backbone", "head"):
        case = Case(dtype=torch.float64)
        if frozen == "backbone":
            for p in case.model.parameters():
                p.requires_grad_(False)
            case.model.heads.requires_grad_(True)
        else:
            case.model.heads["kind"].requires_grad_(False)
        still = {n: p.detach().clone() for n, p in case.model.named_parameters() if not p.requires_grad}
        vil, literal = case.vil(), Literal(case)
        for _ in range(2):
            found = epoch(vil)
            literal.round(case.trained_on())
            literal.compare(vil, found, 1e-12)
        assert same_values({n: p for n, p in case.model.named_parameters() if n in still}, still)
        assert all(p.requires_grad == (n not in still) for n, p in case.model.named_parameters())


def test_layers_set_free_and_frozen_between_rounds() -> None:
    """Progressive unfreezing: what requires gradients when a round begins is what the round trains."""
    case = Case(dtype=torch.float64)
    case.model.first.requires_grad_(False)
    vil, literal = case.vil(), Literal(case)
    for free in (False, True, False):
        for model in (case.model, literal.model):
            model.first.requires_grad_(free)
        before = case.model.first.weight.detach().clone()
        found = epoch(vil)
        literal.round(case.trained_on())
        literal.compare(vil, found, 1e-12)
        assert torch.equal(case.model.first.weight, before) != free


def test_parameters_replaced_between_rounds() -> None:
    """load_state_dict(assign=True): what is trained is what the model has; or a word that it is not."""
    case = Case(dtype=torch.float64)
    vil = case.vil()
    epoch(vil)
    saved = {name: 0.5 * value.clone() for name, value in case.model.state_dict().items()}
    case.model.load_state_dict(saved, assign=True)
    before = contents(case.model)
    try:
        found = epoch(vil)
    except ValueError as error:
        one_line(error, "AlphaVIL: ", "expected", "found")
        return
    assert found.kept == "search"
    assert not any(torch.equal(p, before[n]) for n, p in case.model.heads["size"].named_parameters("heads.size"))


def test_an_optimizer_that_moves_more_than_it_was_given() -> None:
    """Of the model's parameters: another task's head is put back, whoever moved it."""
    case = Case(dtype=torch.float64, also=True)
    before = contents(case.model)
    vil = case.vil(make_optimizer=lambda _: ADAM([p for p in case.model.parameters() if p.requires_grad]))
    for stage in vil.stages():
        assert stage.kind == "move" or same_values(contents(case.model), before), stage
    assert development_loss(case.model, case.tasks["size"]) <= vil.last.before  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moves_beneath_the_last_digit(dtype: torch.dtype) -> None:
    """Steps too small to see change nothing; alpha has nothing to weigh, and nothing is wrong."""
    case = Case(dtype=dtype)
    before = contents(case.model)
    found = epoch(case.vil(make_optimizer=lambda ps: torch.optim.SGD(ps, lr=1e-30)))
    assert same_values(contents(case.model), before)
    assert found.alphas.tolist() == [1.0, 1.0, 1.0]
