"""Whether something is the same on all ranks: by a digest of its text, or by the norms of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .ranks import World


def digest(text: str) -> int:
    """Return a number of 56 bits that other texts do not have."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


def check_same(op: str, what: str, found: str, hint: str, world: World, device: torch.device) -> None:
    """Raise on all ranks alike if the text `found` is not the same on all. Bytes: 8 a rank."""
    digests = world.gather_numbers([digest(found)], device)
    if all(row == digests[0] for row in digests):
        return
    every: list[Any] = [None] * world.size
    dist.all_gather_object(every, found, group=world.group)
    other = next(r for r, text in enumerate(every) if text != every[0])
    raise RuntimeError(
        f"{op}: expected the same {what} on all ranks, found {every[0]} on rank 0 and {every[other]} on rank {other}; "
        f"{hint}"
    )


def first_unlike(tensors: Sequence[Tensor], rtol: float, world: World) -> tuple[int, float, float] | None:
    """Return the number of the first tensor whose norms on the ranks are further apart than rtol, the least and the
    largest of them; None if all are alike. As many tensors on all ranks. Bytes: 16 each.
    """
    if world.size == 1 or not tensors:
        return None
    device = tensors[0].device
    norms = torch.stack([_norm(tensor.detach()).to(device) for tensor in tensors])
    bounds = world.max_(torch.cat([-norms, norms]))
    least, most = -bounds[: len(tensors)], bounds[len(tensors) :]
    unlike = (most - least > rtol * most).tolist()
    if not any(unlike):
        return None
    i = unlike.index(True)
    return i, float(least[i]), float(most[i])


def _norm(value: Tensor) -> Tensor:
    if value.is_complex():
        value = torch.view_as_real(value)
    if not value.is_floating_point():
        value = value.double()
    return torch.linalg.vector_norm(value, dtype=torch.float64)
