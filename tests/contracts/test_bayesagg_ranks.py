"""What the ranks say to each other: bytes, states, and what they refuse."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtlgrad import BayesAgg, Binary
from tests.support.bounds import assert_near
from tests.support.nets import LAYERS, packed, published_layer, unpacked
from tests.support.ranks import WIDTH, Pool, dataset, joined, layers, parts_of, rows_agree, see, see_quietly

pytestmark = pytest.mark.usefixtures("one_thread")


class Count:
    """Bytes by collective: of an all_reduce those of the tensor, of an all_gather those of all ranks together."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def __enter__(self) -> Count:
        self._before = dist.all_reduce, dist.all_gather, dist.all_gather_object
        dist.all_reduce, dist.all_gather = self._reduce, self._gather  # type: ignore[assignment]
        dist.all_gather_object = self._refused  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce, dist.all_gather, dist.all_gather_object = self._before

    def _refused(self, *_: Any, **__: Any) -> None:
        raise AssertionError("all_gather_object: not on a path without errors")

    def _reduce(self, tensor: Tensor, *rest: Any, **options: Any) -> Any:
        self.calls.append(("all_reduce", tensor.numel() * tensor.element_size()))
        return self._before[0](tensor, *rest, **options)

    def _gather(self, into: list[Tensor], tensor: Tensor, *rest: Any, **options: Any) -> Any:
        self.calls.append(("all_gather", sum(t.numel() * t.element_size() for t in into)))
        return self._before[1](into, tensor, *rest, **options)

    def taken(self) -> list[tuple[str, int]]:
        calls, self.calls = self.calls, []
        return calls


def numbers_in_sums(kind: str, covariance: str, rows: int, width: int, parted: bool = False) -> int:
    """What the guide says: of a residual and a precision."""
    if kind == "regression":
        return rows * width + (rows if parted else 1) * width**2
    wide = width + 1
    if covariance == "diag":
        return 2 * rows * wide
    if kind == "binary" or covariance == "block":
        return rows * wide + rows * wide**2
    return rows * wide + ((rows * wide) ** 2 if covariance == "full" else rows**2 + wide**2 + 1)


def counted(options: dict[str, Any], missing: float = 0.0) -> list[list[tuple[str, int]]]:
    rank = dist.get_rank()
    data = dataset(100, missing=missing)
    _, layer = layers(data, **options)
    found = []
    with Count() as count:
        for at, sizes in ((0, [3, 4]), (7, [3, 4]), (14, [40, 23])):
            batch = parts_of(data, at, sizes, {})[rank]
            features = batch[0].features.clone().requires_grad_()
            total = layer.total([layer(features, [d.targets for d in batch]).square().sum()])
            found.append(count.taken())
            total.backward()
            _ = layer.task_weights, layer.gradient_variance
            layer.predict(features)
            layer.eval()
            layer(features)
            layer.train()
            found.append(count.taken())
            if not at:
                layer.refresh()
                found.append(count.taken())
        # After a state was loaded the ranks ask each other once whether it was the same.
        layer.load_state_dict(layer.state_dict())
        layer.aggregate(features[:3], [d.targets[:3] for d in batch])
        found.append(count.taken())
    return found


CASES = [
    *[
        ({"covariance": covariance, "statistics": statistics}, 0.0)
        for covariance in ("full", "block", "kron", "diag")
        for statistics in ("stored", "streaming")
    ],
    ({"covariance": "full"}, 0.3),
    ({"covariance": "block", "moments": "sampled", "num_samples": 4}, 0.0),
]


@pytest.mark.parametrize(("options", "missing"), CASES)
def test_bytes_are_what_the_guide_says(two_ranks: Pool, options: dict[str, Any], missing: float) -> None:
    ranks, width, rows, covariance = 2, WIDTH, 3, options["covariance"]
    sampled = options.get("moments") == "sampled"

    def sums(kinds: Sequence[str], size: int = 8) -> list[tuple[str, int]]:
        numbers = sum(numbers_in_sums(kind, covariance, rows, width, missing > 0) for kind in kinds)
        return [*parted(kinds), ("all_reduce", size * numbers)] if kinds else []

    def parted(kinds: Sequence[str]) -> list[tuple[str, int]]:
        return [("all_gather", 8 * ranks)] if "regression" in kinds else []

    def sums_of_batch(kinds: Sequence[str]) -> list[tuple[str, int]]:
        if not sampled:
            return sums(kinds)
        return [*sums([k for k in kinds if k == "regression"]), *sums([k for k in kinds if k != "regression"], 4)]

    few = {"regression"}
    if not sampled:
        few |= {"binary"} if covariance != "diag" else set()
        few |= {"multiclass"} if covariance in ("full", "block") else set()
    others = [kind for kind in LAYERS if kind not in few]

    def gathered(longest: int) -> tuple[str, int]:
        target = {"regression": 4 * rows, "binary": 4 * rows, "multiclass": 8}
        return "all_gather", ranks * longest * (4 * width + sum(target[kind] for kind in few))

    asked = ("all_gather", 32 * ranks)
    weights = [("all_reduce", 8 * 2 * rows * (width + 1))] if options.get("statistics") == "streaming" else []
    refresh = [("all_gather", 16 * ranks), ("all_gather", 8 * ranks), *weights, *sums(list(LAYERS))]
    expected = [
        *([], [], refresh),
        *([asked, gathered(4), *sums_of_batch(others)], []),
        *([asked, *sums_of_batch(list(LAYERS))], []),
        [asked, ("all_gather", 8 * ranks), gathered(3), *sums_of_batch(others)],
    ]
    for found in two_ranks(counted, options, missing):
        assert found == expected


# ---- states


def resumed(stop: int, statistics: str, again: bool) -> list[Tensor]:
    """Steps of an epoch on two ranks, a refresh, and one more; `again`: from a state saved after `stop` passes."""
    data = dataset(60)
    heads, layer = layers(data, statistics=statistics)
    found = []
    for i in range(6):
        if again and i == stop:
            state = layer.state_dict()
            layer = published_layer(layer.heads, statistics=statistics)
            layer.load_state_dict(state)
        if i in (2, 4):
            layer.refresh()
        found.append(see(layer, parts_of(data, 8 * i, [5, 3], {})[dist.get_rank()]))
        with torch.no_grad():
            for head in heads:
                head.weight.mul_(0.98)
    return found


@pytest.mark.parametrize("statistics", ["stored", "streaming"])
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_every_rank_resumes_from_its_own_state(two_ranks: Pool, stop: int, statistics: str) -> None:
    whole = two_ranks(resumed, stop, statistics, False)
    for mine, theirs in zip(two_ranks(resumed, stop, statistics, True), whole):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def an_epoch(single: bool) -> Any:
    data = dataset(30)
    _, layer = layers(data)
    parts = parts_of(data, 0, [9, 5], {})
    see(layer, joined(parts) if single else parts[dist.get_rank()])
    layer.refresh()
    return layer.state_dict()


def go_on(state: Any, single: bool) -> Tensor:
    data = dataset(30)
    _, layer = layers(data)
    layer.load_state_dict(state)
    parts = parts_of(data, 20, [2, 4], {})
    return see(layer, joined(parts) if single else parts[dist.get_rank()])


def test_between_epochs_any_number_of_ranks_goes_on(two_ranks: Pool) -> None:
    states = two_ranks(an_epoch, False)
    expected = go_on(an_epoch(True), True)
    rows_agree([[0], [2, 4]], [go_on(states[1], True)], [[part] for part in two_ranks(go_on, states[0], False)], 1e-6)
    assert_near(go_on(states[0], True), expected)


def loaded_by_one(own: bool) -> str:
    data = dataset(30)
    _, layer = layers(data)
    parts = parts_of(data, 0, [9, 5], {})
    see(layer, parts[dist.get_rank()])
    layer.refresh()
    before = layer.state_dict()
    see(layer, parts_of(data, 14, [9, 5], {})[dist.get_rank()])
    layer.refresh()
    if dist.get_rank() == 0:
        layer.load_state_dict(layer.state_dict() if own else before)
    layer._number = 7
    try:
        see(layer, parts[dist.get_rank()])
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_state_that_one_rank_alone_loads(two_ranks: Pool) -> None:
    assert two_ranks(loaded_by_one, True) == ["", ""]
    for message in two_ranks(loaded_by_one, False):
        assert "BayesAgg: expected the same full-data posterior on all ranks" in message


# ---- misuse, in words on every rank


def refused(how: str) -> str:
    rank = dist.get_rank()
    data = dataset(40)
    heads, layer = layers(data, moments="sampled" if how == "passes" else "exact")
    batch = parts_of(data, 0, [5, 3], {})[rank]
    words = ""
    try:
        if how == "nothing seen":
            layer.refresh()
        see(layer, batch)
        if how == "weights" and rank:
            with torch.no_grad():
                heads[1].weight.mul_(1.01)  # trained without DistributedDataParallel
        layer.refresh()
        if how == "posteriors":
            state = layer.state_dict()
            if rank:
                wrong = unpacked(state["_extra_state"])
                wrong["posteriors"][1]["residual"] *= 1.5
                state["_extra_state"] = packed(wrong)
            layer.load_state_dict(state)
        if how == "passes" and rank:
            see_quietly(layer, batch)
        if how == "dtypes" and rank:
            for d in batch:
                d.features = d.features.double()
        see(layer, batch)
    except RuntimeError as error:
        words = str(error)
    return words


REFUSED = {
    "nothing seen": r"BayesAgg.refresh: expected at least one training batch since the last refresh, found none on any",
    "weights": r"BayesAgg.refresh: expected the same weights of the heads on all ranks, found .* on rank 0 and .* on "
    r"rank 1; train the model in DistributedDataParallel, or give process_group=",
    "posteriors": r"BayesAgg: expected the same full-data posterior on all ranks, .*; load the same checkpoint",
    "passes": r"BayesAgg: expected the same number of passes on all ranks, found 2 on rank 0 and 3 on rank 1; every",
    "dtypes": r"BayesAgg: expected the same dtypes .*, found torch.float32 and .* on rank 0 and torch.float64",
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_would_stay_unsynchronised_is_refused_on_every_rank(two_ranks: Pool, how: str) -> None:
    for words in two_ranks(refused, how):
        assert re.match(REFUSED[how], words), words
        assert "\n" not in words


def test_passes_of_the_warm_up_may_differ(two_ranks: Pool) -> None:
    """Their number seeds the samples: after the refresh it is one again."""
    first, second = two_ranks(uneven_warm_up)
    assert first == second == 3


def uneven_warm_up() -> int:
    data = dataset(40)
    _, layer = layers(data, moments="sampled", num_samples=10)
    for _ in range(1 + dist.get_rank()):
        see_quietly(layer, [d.rows(slice(0, 4)) for d in data])
    layer.refresh()
    see(layer, [d.rows(slice(0, 4)) for d in data])
    return int(unpacked(layer.get_extra_state())["number"])


def test_process_group_of_another_type() -> None:
    with pytest.raises(TypeError, match=r"BayesAgg: process_group: expected a torch.distributed process group, found"):
        BayesAgg([Binary(nn.Linear(3, 1))], process_group="world")  # type: ignore[arg-type]
