"""A task as alphaVIL sees it: batches to train on, a loss, batches to judge by, and which parameters are its own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

from ..graph import walk

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Task:
    """A task of :class:`mtlgrad.AlphaVIL`.

    Args:
        train: batches, iterated anew in every round: a ``DataLoader``, a list.
        loss: (model, batch) -> the batch's loss, a scalar. ``model`` is the module that :class:`mtlgrad.AlphaVIL` was
            given; any of its methods and submodules may be called. The loss must take its parameters from there: during
            the search others stand in for them.
        dev: batches of development data, for the target; the others' are not read. What counts is the mean of the loss
            over batches: let them be of one size.
        head: the parameters (or a module with them) that this task trains and no other. What is in no task's head is
            shared.

    On several ranks each has a task of its own with its part of the data, but the same names and heads: see
    ``process_group`` of :class:`mtlgrad.AlphaVIL`.
    """

    train: Iterable[Any]
    loss: Loss
    dev: Iterable[Any] | None = None
    head: nn.Module | Iterable[Tensor] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.head, Iterable) and not isinstance(self.head, (nn.Module, Tensor)):
            object.__setattr__(self, "head", tuple(self.head))  # module.parameters() could be read once

    def head_parameters(self) -> list[Tensor]:
        """Return the parameters of the head; none without one."""
        if self.head is None:
            return []
        return list(self.head.parameters() if isinstance(self.head, nn.Module) else self.head)


def named(tasks: Mapping[str, Task] | Sequence[Task]) -> dict[str, Task]:
    """Return the tasks by name, which is their number where they have none; all checked."""
    if isinstance(tasks, Mapping):
        found = dict(tasks)
    elif isinstance(tasks, Sequence):
        found = {str(i): task for i, task in enumerate(tasks)}
    else:
        raise TypeError(f"AlphaVIL: tasks: expected a dict of names and tasks, or a list, found {type(tasks).__name__}")
    if not found:
        raise ValueError("AlphaVIL: tasks: expected at least one, found none")
    for name, task in found.items():
        if not isinstance(name, str):
            raise TypeError(f"AlphaVIL: tasks: expected names that are strings, found {name!r}")
        _check_task(name, task)
    return found


def _check_task(name: str, task: Task) -> None:
    if not isinstance(task, Task):
        raise TypeError(f"AlphaVIL: tasks: {name!r}: expected a mtlgrad.alphavil.Task, found {type(task).__name__}")
    if not callable(task.loss):
        raise TypeError(f"AlphaVIL: tasks: {name!r}: loss: expected a function, found {type(task.loss).__name__}")
    if not isinstance(task.head, (nn.Module, type(None))):
        odd = (
            [part for part in task.head if not isinstance(part, Tensor)]
            if isinstance(task.head, tuple)
            else [task.head]
        )
        if odd:
            found = ("a list with " if isinstance(task.head, tuple) else "") + type(odd[0]).__name__
            raise TypeError(
                f"AlphaVIL: tasks: {name!r}: head: expected a module or a list of parameters, found {found}"
            )
    for what, batches in (("train", task.train), ("dev", task.dev)):
        if batches is None and what == "dev":
            continue
        expected = (
            f"AlphaVIL: tasks: {name!r}: {what}: expected batches to iterate anew each time (a DataLoader, a list)"
        )
        if not isinstance(batches, Iterable) or isinstance(batches, (str, bytes, Tensor)):
            raise TypeError(f"{expected}, found {type(batches).__name__}")
        if isinstance(batches, Iterator):
            raise TypeError(f"{expected}, found {type(batches).__name__}, which ends after one pass; wrap it in a list")


def target_of(tasks: dict[str, Task], target: str | int) -> int:
    """Return the target's number."""
    names = list(tasks)
    if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(names):
        number = target
    elif isinstance(target, str) and target in names:
        number = names.index(target)
    else:
        raise ValueError(f"AlphaVIL: target: expected one of {', '.join(map(repr, names))}, found {target!r}")
    if tasks[names[number]].dev is None:
        raise ValueError(
            f"AlphaVIL: tasks: {names[number]!r}, the target: dev: expected batches of development data, found None"
        )
    return number


# ---- a round's part of the batches -----------------------------------------------------------------------------------


def _length(batches: Iterable[Any]) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # a DataLoader over a stream has a __len__ that raises
        return None


def _shuffles(batches: Iterable[Any]) -> bool:
    """Return False of a DataLoader that is known to keep its order."""
    # One with a batch sampler has another sampler beside it, which nobody asks.
    batched = getattr(batches, "batch_sampler", None)
    return not isinstance(getattr(batches if batched is None else batched, "sampler", None), SequentialSampler)


def check_subset(tasks: dict[str, Task], subset: float | int) -> None:
    number = isinstance(subset, (int, float)) and not isinstance(subset, bool)
    if not number or not (subset >= 1 if isinstance(subset, int) else 0.0 < subset <= 1.0):
        raise ValueError(
            "AlphaVIL: subset: expected a fraction above 0.0 and up to 1.0, or a number of batches from 1, "
            f"found {subset!r}"
        )
    if subset == 1.0 and isinstance(subset, float):
        return
    for name, task in tasks.items():
        length = _length(task.train)
        if isinstance(subset, float) and length is None:
            raise ValueError(
                f"AlphaVIL: subset: expected a number of batches, since task {name!r}'s train has no length, "
                f"found the fraction {subset}"
            )
        part = isinstance(subset, float) or length is None or subset < length
        if part and not _shuffles(task.train):
            raise ValueError(
                f"AlphaVIL: subset: expected 1.0, since task {name!r}'s DataLoader does not shuffle and would give the "
                f"same part in each round, found {subset}; give it shuffle=True"
            )


def count_of(batches: Iterable[Any], subset: float | int) -> int | None:
    """How many batches :func:`sample` gives; None where that is not known before."""
    total = _length(batches)
    if total is None:
        return None
    # 0.07 of 100 is 7
    return min(subset, total) if isinstance(subset, int) else math.ceil(subset * total - 1e-9)


def sample(name: str, batches: Iterable[Any], subset: float | int) -> Iterator[Any]:
    """Yield a round's part of the batches.

    Of a sequence they are drawn without replacement, in random order, from torch's global generator; of anything else
    they are the first of a new pass, for which a shuffling loader is a random draw as well.
    """
    count = subset if isinstance(subset, int) else count_of(batches, subset)
    empty = True
    if isinstance(batches, Sequence):
        for i in torch.randperm(len(batches), device="cpu")[:count].tolist():
            empty = False
            yield batches[i]
    else:
        for batch in itertools.islice(batches, count):
            empty = False
            yield batch
    if empty:
        raise ValueError(f"AlphaVIL: tasks: {name!r}: train: expected at least one batch, found none")


# ---- losses ----------------------------------------------------------------------------------------------------------


def checked_loss(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        found = f"shape {list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"AlphaVIL: tasks: {name!r}: loss: expected a scalar tensor of floats, found {found}")
    return value.reshape(())


def check_gradient(name: str, loss: Tensor) -> None:
    if not loss.requires_grad:
        raise TypeError(
            f"AlphaVIL: tasks: {name!r}: loss: expected one that depends on the parameters of the model it is given, "
            "found one that does not; use that model, drop detach() and no_grad()"
        )


def check_checkpoints(name: str, loss: Tensor) -> None:
    """Reentrant ones hide the parameters that are used inside: alpha would seem to make no difference there."""
    if any(node.name() == "CheckpointFunctionBackward" for node, _ in walk([loss.grad_fn], set())):
        raise TypeError(
            f"AlphaVIL: tasks: {name!r}: loss: expected torch.utils.checkpoint with use_reentrant=False in the model, "
            "found use_reentrant=True, which hides the parameters inside from the search"
        )
