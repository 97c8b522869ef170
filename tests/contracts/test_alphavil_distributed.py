"""AlphaVIL on several ranks: equal to one process on the ranks' batches put together, and all ranks take one path."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mtlgrad import AlphaVIL
from mtlgrad.alphavil import Task
from tests.support.bounds import contents, hushed, same_values, seed_everything
from tests.support.nets import ALPHA, INNER, Case
from tests.support.oracles import recorder
from tests.support.ranks import Pool, batches_of_rank, parted_case, place, two_rounds

TASKS = ("size", "kind", "marks")


def trained(inner: str, alpha: str, heads: Any, disagree: bool) -> dict[str, Any]:
    case = parted_case(*place(), disagree=disagree)
    return two_rounds(case, make_optimizer=INNER[inner], alpha_optimizer=ALPHA[alpha], include_heads=heads)


def check_equal(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if name == "said":
            assert all(one[name] == value for one in found)
            continue
        assert all(torch.equal(one[name], found[0][name]) for one in found), f"{name} is not the same on all ranks"
        # alpha - 1 is what is left of 1 + a small step, and of losses in float32
        most = (1e-5 if name == "moved" else 1e-6) * float(value.abs().max())
        assert float((found[0][name] - value).abs().max()) <= most, name


@pytest.mark.parametrize("heads", ["own", "none", "all"])
@pytest.mark.parametrize("alpha", ["sgd", "lbfgs"])
@pytest.mark.parametrize("inner", ["sgd", "adam"])
def test_two_rounds_equal_one_process(
    two_ranks: Pool, four_ranks: Pool, inner: str, alpha: str, heads: str, one_thread: None
) -> None:
    expected = trained(inner, alpha, heads, False)
    assert "search" in expected["said"]
    check_equal(two_ranks(trained, inner, alpha, heads, False), expected)
    if heads == "own":
        check_equal(four_ranks(trained, inner, alpha, heads, False), expected)


def test_ranks_that_disagree(two_ranks: Pool, four_ranks: Pool, one_thread: None) -> None:
    expected = trained("sgd", "sgd", "own", True)
    check_equal(two_ranks(trained, "sgd", "sgd", "own", True), expected)
    check_equal(four_ranks(trained, "sgd", "sgd", "own", True), expected)


def closures() -> list[Tensor]:
    """What an optimizer for alpha is told at several places: [calls, 1 + T]."""
    make, seen = recorder([torch.tensor([0.5, 1.5, 2.0]), torch.tensor([1.0, -1.0, 0.0])], lr=0.3)
    with hushed():
        parted_case(*place()).vil(alpha_optimizer=make).epoch()
    return [torch.cat([torch.tensor([loss], dtype=torch.float64), gradient]) for _, loss, gradient in seen]


def test_closures_give_the_mean_loss_and_gradient(two_ranks: Pool, one_thread: None) -> None:
    expected = torch.stack(closures())
    assert len(expected) == 2 * 2 * 3
    first, second = map(torch.stack, two_ranks(closures))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, rtol=1e-6, atol=1e-7)


def pairs() -> list[dict[str, Any]]:
    pair, _ = dist.new_subgroups(group_size=2)
    number = dist.get_rank() // 2
    case = parted_case(dist.get_rank() % 2, 2, seed=number, process_group=pair)
    return [two_rounds(case, process_group=pair, alpha_epochs=1 + number)]


def test_process_groups(four_ranks: Pool, one_thread: None) -> None:
    """Two pairs, each with a model and a number of stages of its own."""
    found = [one for (one,) in four_ranks(pairs)]
    for number in range(2):
        check_equal(found[2 * number : 2 * number + 2], two_rounds(parted_case(0, 1, number), alpha_epochs=1 + number))


# ---- buffers ---------------------------------------------------------------------------------------------------------


class Noted(nn.Module):
    """Its buffers, in training, are told by the batch what to become."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 1)
        nn.init.constant_(self.line.weight, 0.5)
        nn.init.constant_(self.line.bias, 0.1)
        self.register_buffer("some", torch.zeros(3, 2).t())
        self.register_buffer("pair", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("flag", torch.tensor([False, False]))
        self.register_buffer("mask", torch.full((2,), -math.inf))
        self.register_buffer("wave", torch.zeros(2, dtype=torch.complex64))

    def forward(self, batch: dict[str, Any]) -> Tensor:
        for name, value in batch.items():
            if name not in ("x", "y") and self.training:
                self.get_buffer(name).copy_(torch.as_tensor(value))
        return F.mse_loss(self.line(batch["x"]), batch["y"])


def call(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = model(batch)
    return loss


def noted(by_rank: list[dict[str, Any]], dev: list[float] | None = None, rule: str = "mean") -> tuple[Any, AlphaVIL]:
    """Tasks "a", the target, and "b", whose buffers become by_rank[rank]; dev: the target's y."""
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.3, -2.0]])
    plain: dict[str, Any] = {"x": x, "y": x.sum(1, keepdim=True) + 0.2}
    rank, _ = place()
    judged = {**plain, "y": plain["y"] * (1.0 if dev is None else dev[rank])}
    model = Noted()
    tasks = {"a": Task([plain], call, [judged]), "b": Task([{**plain, **by_rank[rank]}], call)}
    return model, AlphaVIL(model, tasks, "a", make_optimizer=INNER["sgd"], alpha_epochs=2, buffers=rule)


def buffers(
    by_rank: list[dict[str, Any]], rule: str = "mean"
) -> tuple[dict[str, Tensor], list[int], dict[str, Tensor]]:
    model, vil = noted(by_rank, rule=rule)
    with hushed():
        stages = vil.stages()
        next(stages), next(stages)
        merged = vil.state_dict()["buffers"]["merged"]
        last = vil.epoch()
    return merged, last.sat_out, contents(model)


def test_buffers_are_the_mean_or_the_largest(two_ranks: Pool) -> None:
    own = [{"some": 2.0, "count": 4, "flag": [True, False]}, {"some": 1.0, "pair": [1.0, 3.0], "wave": 4j, "count": 9}]
    found = two_ranks(buffers, own)
    for merged, out, after in found:
        assert not out
        assert sorted(merged) == ["count", "flag", "pair", "some", "wave"]
        assert torch.equal(merged["some"], torch.full((2, 3), 1.5))
        assert merged["pair"].tolist() == [0.5, 1.5]
        assert merged["wave"].tolist() == [2j, 2j]
        assert merged["count"].tolist() == 9
        assert merged["flag"].tolist() == [True, False]
        assert all(torch.equal(after[name], value) for name, value in merged.items())
    assert same_values(found[0][2], found[1][2])


def test_what_is_not_averaged_is_the_first_ranks(two_ranks: Pool) -> None:
    own = [{"some": 2.0, "count": 4}, {"some": 1.0, "pair": [1.0, 3.0], "wave": 4j, "count": 9, "flag": [True, False]}]
    found = two_ranks(buffers, own, "target")
    for merged, out, _ in found:
        assert not out
        assert torch.equal(merged["some"], torch.full((2, 3), 2.0))
        assert merged["pair"].tolist() == [0.0, 0.0]
        assert merged["wave"].tolist() == [0j, 0j]
        assert merged["count"].tolist() == 4
        assert merged["flag"].tolist() == [False, False]
    assert same_values(found[0][2], found[1][2])


def batch_norm() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A training at a learning rate of zero: what its buffers become, and what this rank's would be alone."""
    case = Case(tasks=["size"], norm=True, count=3)
    train: Any = batches_of_rank(case.tasks["size"].train, [(8, 8), (9, 7), (10, 6)], place()[0])
    case.change("size", train=train)
    alone = Case(norm=True).model.train()
    seed_everything(place()[0])
    for i in torch.randperm(3).tolist():
        alone(train[i].x)
    vil = case.vil(make_optimizer=partial(torch.optim.SGD, lr=0.0))
    seed_everything(place()[0])  # each rank takes its batches in an order of its own
    next(iter(vil.stages()))
    return vil.state_dict()["buffers"]["merged"], dict(alone.named_buffers())


def test_batch_norm(two_ranks: Pool) -> None:
    (first, own), (second, others) = two_ranks(batch_norm)
    assert same_values(first, second)
    for name in ("norm.running_mean", "norm.running_var"):
        assert not torch.equal(own[name], others[name])
        torch.testing.assert_close(first[name], (own[name] + others[name]) / 2, rtol=1e-6, atol=1e-7)
    assert int(first["norm.num_batches_tracked"]) == 3


# ---- NaN -------------------------------------------------------------------------------------------------------------


def nan_in_data(task: str, rank: int) -> dict[str, Any]:
    case = parted_case(*place())
    if dist.get_rank() == rank:
        case.tasks[task].train[1].x[0, 0] = math.nan  # type: ignore[index]
    return two_rounds(case)


@pytest.mark.parametrize(("task", "rank"), [("kind", 1), ("size", 0)])
def test_nan_on_one_rank_sits_out_on_all(two_ranks: Pool, task: str, rank: int) -> None:
    first, second = two_ranks(nan_in_data, task, rank)
    assert first["said"] == second["said"]
    assert first["said"][1::2] == [[TASKS.index(task)]] * 2
    assert all(torch.equal(first[n].nan_to_num(), second[n].nan_to_num()) for n in first if n != "said")
    assert first["weights"][TASKS.index(task)] == 1.0
    assert all(v.isfinite().all() for n, v in first.items() if n not in ("losses", "said"))


@pytest.mark.parametrize("name", ["some", "pair", "wave"])
def test_nan_in_one_ranks_buffer(two_ranks: Pool, name: str) -> None:
    for _, out, after in two_ranks(buffers, [{"count": 5}, {name: math.nan}]):
        assert out == [1]
        assert bool(after[name].isfinite().all())
        assert int(after["count"]) == 3


def development_loss(dev: list[float]) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    model, vil = noted([{}, {}], dev)
    before = contents(model)
    with pytest.raises(ValueError, match="dev: expected a finite loss") as error:
        vil.epoch()
    return str(error.value), before, contents(model)


def test_nan_in_one_ranks_development_loss(two_ranks: Pool) -> None:
    for text, before, after in two_ranks(development_loss, [1.0, math.nan]):
        assert "found nan" in text
        assert same_values(before, after)


class Wild(torch.optim.SGD):
    """On rank 1 its last step of a pass leads to NaN, and none of the others'."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        self.steps += 1
        (first, *_) = self.param_groups[0]["params"]
        if dist.get_rank() == 1 and self.steps == (2 if first.dtype == torch.float64 else 3):
            with torch.no_grad():
                first.mul_(math.nan)


def wild(what: str) -> list[Any]:
    case = parted_case(*place())
    with hushed():
        last = case.vil(**{what: partial(Wild, lr=0.1)}).epoch()
    moved = float(case.model.first.bias.detach().sum())
    return [last.kept, last.sat_out, last.after, len(last.searched), str(last.searched), moved]


@pytest.mark.parametrize(
    ("what", "expected"), [("make_optimizer", ["none", [0, 1, 2]]), ("alpha_optimizer", ["start", []])]
)
def test_nan_of_one_ranks_optimizer(two_ranks: Pool, what: str, expected: list[Any]) -> None:
    first, second = two_ranks(wild, what)
    assert first == second
    assert first[:2] == expected
    assert first[4] == ("[]" if what == "make_optimizer" else "[nan]")
