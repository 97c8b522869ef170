"""AlphaVIL on several ranks: what it refuses, what it sends, and how a run is resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtlgrad import AlphaVIL
from mtlgrad.alphavil import Task
from tests.contracts.test_alphavil_state import Run
from tests.support.bounds import contents, hushed, same_random_state, same_values, seed_everything
from tests.support.bounds import random_state as random_state_now
from tests.support.nets import ALPHA, INNER, Case, NamedBatch, Unsized, epoch
from tests.support.ranks import Pool, parted_case, place, two_rounds

# ---- models ----------------------------------------------------------------------------------------------------------


def refused_models() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    case = parted_case(*place())
    plain = case.model
    for wrap in (DistributedDataParallel, lambda model: nn.Sequential(DistributedDataParallel(model))):
        case.model = wrap(plain)
        with pytest.raises(TypeError, match=r"model: expected the plain module, .*; give its \.module$"):
            case.vil()
    # The way out, with hooks of DDP on the parameters.
    wrapped = DistributedDataParallel(plain, find_unused_parameters=True)
    wrapped(torch.ones(2, 5)).sum().backward()
    plain.zero_grad()
    case.model = plain
    vil = case.vil()
    assert epoch(vil).kept == "search"
    fully_shard(plain, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    for attempt in (case.vil, vil.epoch):
        with pytest.raises(TypeError, match=r"expected parameters that are whole on each rank, .* the DTensor first"):
            attempt()


def test_wrapped_models_are_refused(two_ranks: Pool) -> None:
    two_ranks(refused_models)


def test_process_group_is_one() -> None:
    with pytest.raises(TypeError, match=r"AlphaVIL: process_group: expected a torch.distr.*, found str"):
        Case().vil(process_group="world")


def sparse() -> None:
    model = nn.Sequential(nn.Embedding(5, 1, sparse=True))
    nn.init.constant_(model[0].weight, 0.5)
    batch = torch.tensor([1, 3])
    task = Task([batch], lambda model, batch: model(batch).square().mean(), [batch])
    with pytest.raises(TypeError, match=r"tasks: '0': loss: expected dense gradients .*, found a sparse one of shape"):
        AlphaVIL(model, [task], 0, make_optimizer=INNER["sgd"]).epoch()


def test_sparse_gradients_are_refused(two_ranks: Pool) -> None:
    two_ranks(sparse)


# ---- ranks that are not in step --------------------------------------------------------------------------------------


def message(attempt: Callable[[], Any], kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as error:
        attempt()
    return str(error.value)


def counts(what: str) -> list[str]:
    """Rank 1 has a batch less; for "streams", a task's on one rank has no length."""
    case, rank = parted_case(*place()), dist.get_rank()
    own = case.tasks["kind" if what == "train" else "size"]
    if rank == 1:
        case.change("kind" if what == "train" else "size", **{what: list(getattr(own, what))[:-1]})
    vil, before, numbers = case.vil(), contents(case.model), random_state_now()
    texts = [message(vil.epoch), message(vil.epoch)]
    # The stage that failed is as if it had not been, and what is left can be made good.
    assert same_values(contents(case.model), before)
    if what == "dev":
        return texts
    assert vil.state_dict()["stage"] == 1
    parts = case.vil(subset=2)
    assert epoch(parts).sat_out == []
    third = case.vil(subset=0.3)
    assert epoch(third).sat_out == []
    if rank == 0:
        case.change("kind", train=Unsized(list(own.train)[:-1]))  # not compared, and as many
    seed_everything(3)
    assert epoch(case.vil(subset=2)).sat_out == []
    assert not same_random_state(numbers, random_state_now())
    return texts


@pytest.mark.parametrize(("what", "task", "most"), [("train", "kind", 3), ("dev", "size", 2)])
def test_numbers_of_batches_must_be_equal(two_ranks: Pool, what: str, task: str, most: int) -> None:
    expected = f"AlphaVIL: tasks: '{task}': {what}: expected the same number of batches on all ranks, "
    for texts in two_ranks(counts, what):
        for text in texts:
            assert text.startswith(f"{expected}found {most - 1} on rank 1 and {most} on rank 0; split the examples")


def out_of_step() -> list[str]:
    case, rank = parted_case(*place()), dist.get_rank()
    found = []
    head = case.model.heads["kind"]
    with torch.no_grad():
        head.weight.mul_(1 + 1e-4 * rank)
    found.append(message(case.vil().epoch))
    with torch.no_grad():
        dist.broadcast(head.weight, 0)
    case.model.register_buffer("extra", torch.full((2,), rank))
    found.append(message(case.vil().epoch))
    case.model.extra.zero_()
    vil = case.vil()
    next(iter(vil.stages()))
    vil.task_weights = [1.0, 1.0, 1.0 + rank]
    found.append(message(vil.epoch, RuntimeError))
    vil.task_weights = [1.0, 1.0, 1.0]
    saved = vil.state_dict()
    next(iter(vil.stages()))
    if rank == 1:
        vil.load_state_dict(saved)
    found.append(message(vil.epoch, RuntimeError))
    vil.load_state_dict(saved)
    with torch.no_grad():
        head.bias.add_(rank)
    found.append(message(vil.epoch))
    with torch.no_grad():
        dist.broadcast(head.bias, 0)
    assert epoch(vil).kept == "search"
    head.weight.requires_grad_(rank == 0)
    found.append(message(vil.epoch, RuntimeError))
    case.model.heads["kind"].weight.requires_grad_(False)
    found.append(message(case.vil(include_heads=("own", "none")[rank], alpha_epochs=1).epoch, RuntimeError))
    return found


def test_ranks_out_of_step_are_told(two_ranks: Pool) -> None:
    first, second = two_ranks(out_of_step)
    assert first == second
    assert "model: expected the same parameters and buffers on all ranks, found heads.kind.weight with n" in first[0]
    assert "found extra with norms from 0 to 1.414214; load the same checkpoint" in first[1]
    assert "found stage 2 of round 1, " in first[2]
    assert "weights [1.0, 1.0, 2.0]" in first[2]
    assert "expected the same stage on all ranks, found stage 3 of round 1, " in first[3]
    assert "on rank 0 and stage 2 of round 1, " in first[3]
    assert "found heads.kind.bias with norms from " in first[4]
    assert "found stage 1 of round 2, " in first[5]
    assert "12 parameters to train" in first[5]
    assert "11 parameters to train" in first[5]
    assert "expected the same model, heads and frozen parameters on all ranks, found 15 par" in first[6]


# ---- resumed ---------------------------------------------------------------------------------------------------------


def random_run(seed: int) -> Run:
    """A run in which each rank has data and random numbers of its own."""
    run = Run("everything", seed)
    for task in run.case.tasks.values():
        for loader in (task.train, task.dev):
            for batch in () if loader is None else loader.dataset:  # type: ignore[attr-defined]
                batch.x.add_(0.2 * dist.get_rank())
    seed_everything(100 * seed + dist.get_rank())
    return run


def resumed(first: int, last: int) -> tuple[int, dict[str, Any]]:
    """Saves after every stage of two rounds; a new process's run goes on from some of them."""
    run, saved = random_run(0), []
    with hushed():
        for _ in range(2):
            saved += [run.save() for _ in run.vil.stages()]
    expected = run.fingerprint()
    assert expected["rounds"] == 2
    for number, state in enumerate(saved[first:last], 1):
        other = random_run(number)
        other.load(state)
        while other.vil.rounds < 2:
            epoch(other.vil)
        assert other.same(expected), f"resumed after stage {first + number}"
    return len(saved), expected


def test_resumed_equals_uninterrupted(two_ranks: Pool) -> None:
    for part in ((0, 7), (7, 14)):
        (stages, expected), (_, other) = two_ranks(resumed, *part)
        assert stages == 14
        assert same_values(expected["values"], other["values"])
        assert expected["losses"] == other["losses"]
        assert not same_random_state(expected["random"], other["random"])


# ---- what is sent ----------------------------------------------------------------------------------------------------


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """Every collective of torch.distributed: its name, and the bytes that this rank gives."""
    found: list[tuple[str, int]] = []
    kinds = ("all_", "broadcast", "reduce", "gather", "scatter", "barrier", "send", "recv", "isend", "irecv", "batch_")
    names = [n for n, f in vars(dist).items() if n.startswith(kinds) and type(f) is FunctionType]
    before = {name: getattr(dist, name) for name in names}

    def wrapped(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            values = [value for value in arguments if isinstance(value, Tensor)]
            found.append((name, sum(value.numel() * value.element_size() for value in values)))
            return before[name](*arguments, **options)

        return call

    for name in names:
        setattr(dist, name, wrapped(name))
    try:
        yield found
    finally:
        for name in names:
            setattr(dist, name, before[name])


def communicated(alpha: str, norm: bool) -> list[tuple[list[tuple[str, int]], list[tuple[str, int]]]]:
    """A stage at a time: what was sent, and what docs/guide/ddp.md says."""
    case = Case(norm=norm)
    looks = 0
    loss = case.tasks["size"].loss

    def looked(model: Any, batch: NamedBatch) -> Tensor:
        nonlocal looks
        looks += torch.is_grad_enabled() and not model.training
        return loss(model, batch)

    case.change("size", loss=looked)
    vil = case.vil(alpha_optimizer=ALPHA[alpha])
    tasks = len(case.tasks)
    tensors, buffers = [*case.model.parameters(), *case.model.buffers()], list(case.model.buffers())
    still = [p for p in case.model.parameters() if not p.requires_grad]
    shared = [p for n, p in case.model.named_parameters() if p.requires_grad and not n.startswith("heads")]
    found = []
    with counted() as sent, hushed():
        for number in range(2):
            for stage in vil.stages():
                expected = [("all_gather", 8)]
                if number == 0 and stage.number == 1:
                    expected += [("all_gather", 8), ("all_reduce", 16 * len(tensors))]
                if stage.kind == "train":
                    trains = [*shared, *case.model.heads[stage.task].parameters()]
                    step = [("all_reduce", 8 * len(trains)), ("all_reduce", 4 * sum(p.numel() for p in trains))]
                    expected += [("all_gather", 8), *(4 * step)]
                    expected += [("all_reduce", 8 * (len(buffers) + len(still)))]
                    if norm:  # two of 8 floats, a counter
                        expected += [("all_reduce", 2 * 8 * 4), ("all_reduce", 8)]
                    expected += [("all_reduce", 16)]
                elif stage.kind == "evaluate":
                    expected += 2 * [("all_gather", 8), ("all_reduce", 8)]
                elif stage.kind == "alpha":
                    expected += [("all_gather", 8), *(looks * [("all_reduce", 8 * (tasks + 1))])]
                    expected += [("all_reduce", 8 * tasks), ("all_gather", 8), ("all_reduce", 8)]
                found.append((list(sent), expected))
                sent.clear()
                looks = 0
    return found


@pytest.mark.parametrize(("alpha", "norm"), [("sgd", True), ("lbfgs", False)])
def test_bytes(two_ranks: Pool, alpha: str, norm: bool) -> None:
    for stages in two_ranks(communicated, alpha, norm):
        assert len(stages) == 14
        for sent, expected in stages:
            assert sent == expected


def group_of_one() -> tuple[list[tuple[str, int]], dict[str, Any]]:
    alone, _ = dist.new_subgroups(group_size=1)
    with counted() as sent:
        found = two_rounds(parted_case(0, 1, process_group=alone), process_group=alone)
    return sent, found


def test_a_group_of_one_is_one_process(two_ranks: Pool, one_thread: None) -> None:
    expected = two_rounds(parted_case(0, 1))
    said = expected.pop("said")
    for sent, found in two_ranks(group_of_one):
        assert sent == []
        assert found.pop("said") == said
        assert same_values(found, expected)
