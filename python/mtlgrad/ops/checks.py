"""Checks that every operation shares: one line each, with the operation, the argument, what was expected and found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SMALLEST_NORM = 1.1754944e-38  #: of float32: below, every entry of a row is subnormal and has lost digits
SMALLEST_DOUBLE = 1.5e-154  #: the same of the squares of float64


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


def check_gram(op: str, gram: Tensor, row: Callable[[int], Sequence[Tensor]] | None = None) -> None:
    """Reads values: ValueError that names the task whose gradient has NaN or infinity, or not one entry with all its
    digits. `row` gives a task's gradient, where it is at hand: a norm alone cannot tell many small entries from few.
    """
    entries = gram.tolist()
    for t, line in enumerate(entries):
        square = line[t]
        if not square < math.inf:
            raise ValueError(
                f"{op}: rows: expected finite gradients, found NaN or infinity in task {t}; look at its loss, or skip "
                "the step (torch.amp.GradScaler does)"
            )
        # No row is longer than 2^40: a large norm needs no second look.
        if square < SMALLEST_NORM**2 * 2.0**40 and (
            0.0 < square < SMALLEST_NORM**2 if row is None else _lost(square, row(t))
        ):
            raise ValueError(
                f"{op}: rows: expected gradients that float32 holds with all digits, found norm {square**0.5:.1e} in "
                f"task {t}; scale the losses up"
            )
    for i, line in enumerate(entries):
        for j in range(i + 1, len(line)):
            if not abs(line[j]) < math.inf:
                raise ValueError(f"{op}: gram: expected finite products, found {line[j]} of tasks {i} and {j}")


def _lost(square: float, parts: Sequence[Tensor]) -> bool:
    """Whether a gradient that is not zero has no entry of normal size (for float64: whose square is one)."""
    doubles = any(part.dtype == torch.float64 for part in parts)
    if square >= SMALLEST_NORM**2 * sum(part.numel() for part in parts) or (square == 0.0 and not doubles):
        return False
    largest = [
        (float(part.detach().abs().max()), SMALLEST_DOUBLE if part.dtype == torch.float64 else SMALLEST_NORM)
        for part in parts
        if part.numel()
    ]
    return any(size > 0.0 for size, _ in largest) and all(size < limit for size, limit in largest)


def check_ordinary_autograd(op: str) -> None:
    """Inside a transform of torch.func a backward's side effects (``.grad``, the tasks' weights) have no place."""
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            f"{op}: expected ordinary autograd, found a torch.func transform (grad, vjp, jacrev, vmap); use "
            "loss.backward() or torch.autograd.grad, with torch.func.functional_call where parameters are to be given"
        )
