"""Checks that every operation shares: one line each, with the operation, the argument, what was expected and found."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIZES = {"B": "example", "C": "class", "D": "dimension", "O": "output", "S": "sample", "T": "task"}
SMALLEST_NORM = 1.1754944e-38  #: of float32: below, every entry of a row is subnormal and has lost digits
SMALLEST_DOUBLE = 1.5e-154  #: the same of the squares of float64


def refuse(message: str) -> None:
    """Raise RuntimeError, in a traced function too. Called where a check failed: torch._check costs 4 us each time."""
    torch._check(False, lambda: message)


def shape_of(tensor: Tensor) -> str:
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"


def check_shape(op: str, name: str, tensor: Tensor, expected: Sequence[int | str]) -> None:
    """Refuse another shape than ``expected``: sizes, or names of sizes that may be anything."""
    found = tensor.shape
    if len(found) != len(expected) or not all(isinstance(e, str) or e == f for e, f in zip(expected, found)):
        refuse(f"{op}: {name}: expected shape [{', '.join(map(str, expected))}], found {shape_of(tensor)}")


def check_floating(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATING:
            refuse(f"{op}: {name}: expected float32, float64, float16 or bfloat16, found {tensor.dtype}")


def check_same_device(op: str, first: str, **tensors: Tensor) -> None:
    """Refuse a tensor that is not on the device of the one called ``first``."""
    device = tensors[first].device
    for name, tensor in tensors.items():
        if tensor.device != device:
            refuse(f"{op}: {name}: expected device {device} like {first}, found {tensor.device}")


def check_tensors(op: str, sizes: dict[str, int], **tensors: tuple[Tensor, str]) -> None:
    """Check shapes, dtypes and devices at once: ``check_tensors(op, {}, features=(features, "B! D"), ...)``.

    A letter stands for its size in ``sizes``, which learns it where the letter comes first; P is D + 1; ``!`` refuses
    zero. ``"int64 B"`` are class targets, all else is floating. All are on the device of the first.
    """
    first = next(iter(tensors))
    for name, (tensor, text) in tensors.items():
        dims = text.removeprefix("int64 ").split()
        check_shape(op, name, tensor, [sizes.get(dim[0], dim[0]) for dim in dims])
        for dim, size in zip(dims, tensor.shape):
            sizes[dim[0]] = size
            if size == 0 and dim.endswith("!"):
                refuse(f"{op}: {name}: expected at least one {SIZES[dim[0]]}, found none")
            if dim[0] == "D":
                sizes["P"] = size + 1
        if not text.startswith("int64 "):
            check_floating(op, **{name: tensor})
        elif tensor.dtype != torch.int64:
            refuse(f"{op}: {name}: expected int64 class indices, found {tensor.dtype}; use {name}.long()")
        check_same_device(op, first, **{first: tensors[first][0], name: tensor})


def check_finite(op: str, **tensors: Tensor) -> None:
    """Read values: host tensors only."""
    for name, tensor in tensors.items():
        if not math.isfinite(tensor.sum()) and not tensor.isfinite().all():  # the sum is quick, and finite if all are
            at = torch.nonzero(~tensor.isfinite())[0].tolist()
            raise ValueError(f"{op}: {name}: expected finite values, found {tensor[tuple(at)].item()} at {at}")


def are_between(tensor: Tensor, low: float, high: float) -> bool:
    """Whether all entries are, and none is NaN. Reads values: host tensors only."""
    if not tensor.numel():
        return True
    smallest, largest = tensor.aminmax()
    return low <= smallest.item() and largest.item() <= high


def check_class_range(op: str, targets: Tensor, classes: int, ignore: int) -> None:
    """Read values: host tensors only."""
    if are_between(targets, 0, classes - 1):
        return
    outside = (targets != ignore) & ((targets < 0) | (targets >= classes))
    if outside.any():
        at = int(torch.nonzero(outside)[0])
        expected = f"class indices from 0 to {classes - 1}, or {ignore} for no label"
        raise ValueError(f"{op}: targets: expected {expected}, found {targets[at].item()} at example {at}")


def check_gram(op: str, gram: Tensor, row: Callable[[int], Sequence[Tensor]] | None = None) -> None:
    """Read values: ValueError that names the task whose gradient has NaN or infinity, or not one entry with all its
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
        small = square < SMALLEST_NORM**2 * (1.0 if row is None else 2.0**40)
        if small and (square > 0.0 if row is None else _lost(square, row(t))):
            raise ValueError(
                f"{op}: rows: expected gradients that float32 holds with all digits, found norm {square**0.5:.1e} in "
                f"task {t}; scale the losses up"
            )
    for i, j in itertools.combinations(range(len(entries)), 2):
        if not abs(entries[i][j]) < math.inf:
            raise ValueError(f"{op}: gram: expected finite products, found {entries[i][j]} of tasks {i} and {j}")


def _lost(square: float, parts: Sequence[Tensor]) -> bool:
    """Whether a gradient that is not zero has no entry of normal size (for float64: whose square is one)."""
    limits = [SMALLEST_DOUBLE if part.dtype == torch.float64 else SMALLEST_NORM for part in parts]
    if square == 0.0 and SMALLEST_DOUBLE not in limits:  # no square of a float32 is lost
        return False
    largest = [float(part.detach().abs().max()) if part.numel() else 0.0 for part in parts]
    return any(largest) and all(map(operator.lt, largest, limits))
