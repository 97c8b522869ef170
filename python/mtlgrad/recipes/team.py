"""Several processes that train one net together, as torchrun starts them: who they are, and what they agree on.

Which of them does what follows from :class:`Place`; what a training computes from the process group alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..world.ranks import World, world_of
from .base import TrainError

Made = TypeVar("Made")

#: How long a process waits for the others. One that has ended is noticed at once; this is for one that hangs.
TIMEOUT = timedelta(minutes=5)
_HOST = torch.device("cpu")


class ElsewhereError(TrainError):
    """Rank 0 could not begin, and says why itself."""


@dataclass(frozen=True)
class Place:
    """This process among those that torchrun has started."""

    rank: int
    size: int
    local_rank: int  #: among those on this machine
    local_size: int


def place() -> Place | None:
    """None: this process trains alone."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ:
        return None
    found = {}
    for name, default in (("RANK", ""), ("WORLD_SIZE", ""), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")):
        text = os.environ.get(name, default)
        if not text.isdecimal():
            raise TrainError(f"environment: expected a number in {name}, as torchrun sets it, found {text!r}")
        found[name] = int(text)
    return Place(*(found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))


@contextmanager
def joined(here: Place | None, *, cuda: bool) -> Iterator[None]:
    """All processes are there inside; with `cuda` they can exchange what is on their GPUs, too."""
    if here is None:
        yield
        return
    # Numbers that the host reads travel on the host in either case: no device waits for them.
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    try:
        dist.init_process_group(backend, rank=here.rank, world_size=here.size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise TrainError(f"cannot join the other {here.size - 1} processes: {one_line(error)}; use torchrun") from error
    try:
        yield
    except TrainError as error:
        # Not after one of this process's own: NCCL would wait for the others. That this one ends tells them.
        if error.__cause__ is None:
            dist.destroy_process_group()
        raise
    except RuntimeError as error:
        if not lost(error):
            raise
        raise TrainError(words_for_lost(error)) from error
    dist.destroy_process_group()


def is_rank0() -> bool:
    """Return whether this process is the one that writes and prints."""
    return world_of(None).is_rank0


def broadcast_from_rank0(make: Callable[[], Made], elsewhere: Callable[[Made], Made]) -> Made:
    """Return what rank 0 makes; on the others what `elsewhere` makes of it, once it has travelled there."""
    world = world_of(None)
    if world.size == 1:
        return make()
    parcel: list[Any] = [None]
    if world.is_rank0:
        try:
            made = make()
            parcel = [(elsewhere(made),)]
        finally:
            dist.broadcast_object_list(parcel, 0, device=_HOST)
        return made
    dist.broadcast_object_list(parcel, 0, device=_HOST)
    if parcel[0] is None:
        raise ElsewhereError("rank 0 could not begin")
    return parcel[0][0]


def any_rank(flag: bool) -> bool:
    """Return whether it is set on some rank."""
    return any(row[0] for row in world_of(None).gather_numbers([flag], _HOST))


def from_rank0(number: int) -> int:
    """Return rank 0's."""
    return world_of(None).gather_numbers([number], _HOST)[0][0]


def lost(error: BaseException) -> bool:
    """Whether it says that another process is gone, or does not answer."""
    return isinstance(error, getattr(dist, "DistError", ())) or "gloo" in str(error).lower()


def words_for_lost(error: BaseException) -> str:
    return f"lost another process, or it did not answer within {TIMEOUT.seconds} s ({one_line(error)})"


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


# ---- of a step -------------------------------------------------------------------------------------------------------


def slices(rows: int, size: int, world: World) -> list[tuple[int, int]]:
    """Of every batch of `size` of the rows, the last one shorter, this rank's part: from and to; perhaps none."""
    found = []
    for start in range(0, rows, size):
        own = min(size, rows - start)
        found.append((start + own * world.rank // world.size, start + own * (world.rank + 1) // world.size))
    return found


class _Valued(torch.autograd.Function):
    """Another value, the same gradient."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def with_global_values(losses: Sequence[Tensor], world: World) -> list[Tensor]:
    """Losses whose values are the means over the ranks, while their gradients stay this rank's.

    A formula over them, even one that is not linear, then has a gradient whose mean over the ranks is the right one.
    """
    if world.size == 1:
        return list(losses)
    values = world.mean_(torch.stack([loss.detach() for loss in losses]))
    return [_Valued.apply(loss, value) for loss, value in zip(losses, values, strict=True)]


def seed_epoch(seed: int, epoch: int, world: World) -> None:
    """Each rank draws its own (dropout), the same again when the epoch is repeated. One process goes on as before."""
    if world.size > 1:
        torch.manual_seed((seed * 1_000_003 + epoch) * 4096 + 1 + world.rank)
