"""Which batches a round of alphaVIL trains on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from tests.support.bounds import one_line
from tests.support.nets import Case, NamedBatch, Sized, Unsized, epoch, named_batches

pytestmark = pytest.mark.usefixtures("one_thread")


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
    [(1.0, 10), (0.5, 5), (0.31, 4), (0.3, 3), (0.01, 1), (1, 1), (3, 3), (10, 10), (99, 10), (0.7, 7), (0.2, 2)],
)
def test_the_part_of_a_sequence(subset: Any, count: int) -> None:
    """So many different batches, in an order of this round, and no others are read."""
    case = Case(tasks=["size"], count=10)
    case.change("size", train=Read(case.tasks["size"].train))  # type: ignore[arg-type]
    vil, orders = case.vil(subset=subset, alpha_epochs=1), []
    for _ in range(8):
        epoch(vil)
        order = [number for _, number in case.diary]
        assert len(order) == len(set(order)) == count
        assert case.tasks["size"].train.seen == order  # type: ignore[union-attr]
        case.tasks["size"].train.seen.clear()  # type: ignore[union-attr]
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


@pytest.mark.parametrize(("subset", "count"), [(1.0, 5), (0.5, 3), (2, 2), (77, 5)])
def test_the_part_of_a_loader(subset: Any, count: int) -> None:
    """Batches, not samples, are counted; their samples differ from each other and from round to round."""
    rows = [NamedBatch(i, b.x[0], b.y[0]) for i, b in enumerate(named_batches("size", 1, 20))]
    case = Case(tasks=["size"])
    case.change("size", train=DataLoader(rows, batch_size=4, shuffle=True))  # type: ignore[arg-type]
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

    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
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
        "its own": (DataLoader(rows, batch_sampler=[[3, 1], [2, 0]], collate_fn=first), True),  # type: ignore[arg-type]
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
