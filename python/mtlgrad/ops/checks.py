"""Checks that every operation shares: one line each, with the operation, the argument, what was expected and found."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_NORM = 1.1754944e-38  #: of float32: below, every entry of a row is subnormal and has lost digits


def refuse(message: str) -> None:
    """Raises RuntimeError, in a traced function too. Called where a check failed: torch._check costs 4 us each time."""
    torch._check(False, lambda: message)


def shape_of(tensor: Tensor) -> str:
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int | str, ...]) -> None:
    """``expected`` holds sizes, or names of sizes that may be anything."""
    found = tensor.shape
    fits = len(found) == len(expected) and all(isinstance(e, str) or e == f for e, f in zip(expected, found))
    if not fits:
        refuse(f"{op}: {name}: expected shape [{', '.join(map(str, expected))}], found {shape_of(tensor)}")


def check_floating(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            refuse(f"{op}: {name}: expected float32, float64, float16 or bfloat16, found {tensor.dtype}")


def check_class_targets(op: str, targets: Tensor) -> None:
    if targets.dtype != torch.int64:
        refuse(f"{op}: targets: expected int64 class indices, found {targets.dtype}; use targets.long()")


def check_same_device(op: str, first: str, **tensors: Tensor) -> None:
    """All on the device of the one called ``first``."""
    device = tensors[first].device
    for name, tensor in tensors.items():
        if tensor.device != device:
            refuse(f"{op}: {name}: expected device {device} like {first}, found {tensor.device}")


def check_not_empty(op: str, name: str, what: str, size: int) -> None:
    torch._check(size > 0, lambda: f"{op}: {name}: expected at least one {what}, found none")


def check_finite(op: str, **tensors: Tensor) -> None:
    """Reads values: host tensors only."""
    for name, tensor in tensors.items():
        if tensor.numel() and not bool(torch.isfinite(tensor.sum())):  # the sum is quick, and finite if all are
            finite = torch.isfinite(tensor)
            if bool(finite.all()):
                continue
            at = torch.nonzero(~finite)[0].tolist()
            value = tensor[tuple(at)].item()
            raise ValueError(f"{op}: {name}: expected finite values, found {value} at {at}")


def check_class_range(op: str, targets: Tensor, classes: int, ignore: int) -> None:
    """Reads values: host tensors only."""
    outside = (targets != ignore) & ((targets < 0) | (targets >= classes))
    if bool(outside.any()):
        at = int(torch.nonzero(outside)[0])
        raise ValueError(
            f"{op}: targets: expected class indices from 0 to {classes - 1}, or {ignore} for no label, "
            f"found {targets[at].item()} at example {at}"
        )


def check_gram(op: str, gram: Tensor) -> None:
    """Reads the diagonal: ValueError that names the task whose gradient float32 could not hold."""
    for t, square in enumerate(torch.diagonal(gram).tolist()):
        if not square < float("inf"):
            raise ValueError(
                f"{op}: rows: expected finite gradients, found NaN or infinity in task {t}; look at its loss, or skip "
                "the step (torch.amp.GradScaler does)"
            )
        if 0.0 < square < SMALLEST_NORM**2:
            raise ValueError(
                f"{op}: rows: expected gradients that float32 holds with all digits, found norm {square**0.5:.1e} in "
                f"task {t}; scale the losses up"
            )
