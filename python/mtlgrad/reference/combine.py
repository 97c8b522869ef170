"""Gram matrix, weighted sums and dot products of task gradients, in plain PyTorch.

A *row* is one task's gradient: a tensor, or a sequence of tensors, one per parameter. T rows of the same shapes are
given as a sequence, or as one tensor [T, ...]. They are never concatenated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Row = Tensor | Sequence[Tensor]
Rows = Tensor | Sequence[Row]

COLUMNS = 1 << 16  #: at a time: a float64 copy of whole gradients would not fit where the gradients just do


def _parameters(rows: Rows) -> list[list[Tensor]]:
    """Per parameter its T flattened gradients."""
    listed = [[row] if isinstance(row, Tensor) else list(row) for row in rows]
    return [[part.reshape(-1) for part in parameter] for parameter in zip(*listed, strict=True)]


def _blocks(parameters: list[list[Tensor]]) -> Iterator[Tensor]:
    """[T, at most COLUMNS] float64 each."""
    for parameter in parameters:
        for start in range(0, parameter[0].numel(), COLUMNS):
            yield torch.stack([part[start : start + COLUMNS].double() for part in parameter])


def gram(rows: Rows) -> Tensor:
    """Compute M_ij = <row i, row j>, as :func:`mtlgrad.ops.gram`.

    Args:
        rows: T rows, none of them ``Stacked``.

    Returns:
        [T, T] float64.
    """
    first = rows[0] if isinstance(rows[0], Tensor) else rows[0][0]
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=first.device)
    for block in _blocks(_parameters(rows)):
        total = total + block @ block.mT
    return total


def dots(rows: Rows, vector: Row) -> Tensor:
    """Compute <row t, vector>, as :func:`mtlgrad.ops.dots`.

    Args:
        rows: T rows.
        vector: shaped like a row.

    Returns:
        [T] float64.
    """
    parts = [vector] if isinstance(vector, Tensor) else list(vector)
    parameters = _parameters(rows)
    total = torch.zeros(len(rows), dtype=torch.float64, device=parts[0].device)
    for block in _blocks([[*parameter, part.reshape(-1)] for parameter, part in zip(parameters, parts, strict=True)]):
        total = total + block[:-1] @ block[-1]
    return total


def combine(rows: Rows, weights: Tensor) -> Tensor | list[Tensor]:
    """Compute sum_t weights_t row_t, as :func:`mtlgrad.ops.combine`.

    Args:
        rows: T rows.
        weights: [T].

    Returns:
        The sum, shaped and typed like a row.
    """

    def weighted(parts: Sequence[Tensor]) -> Tensor:
        dtype = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
        terms = [w * part.to(dtype) for w, part in zip(weights.to(dtype), parts, strict=True)]
        return torch.stack(terms).sum(0).to(parts[0].dtype)

    if all(isinstance(row, Tensor) for row in rows):
        return weighted([row for row in rows if isinstance(row, Tensor)])
    return [weighted(parts) for parts in zip(*rows, strict=True)]


def displace(base: Row, rows: Rows, weights: Tensor) -> Tensor | list[Tensor]:
    """Compute base + sum_t weights_t row_t, as :func:`mtlgrad.ops.displace`.

    Args:
        base: shaped like a row.
        rows: T rows.
        weights: [T].

    Returns:
        The sum, shaped and typed like base.
    """

    def displaced(part: Tensor, terms: Sequence[Tensor]) -> Tensor:
        total = part.double()
        for weight, term in zip(weights.double(), terms, strict=True):
            total = total + weight * term.double()
        return total.to(part.dtype)

    if isinstance(base, Tensor):
        return displaced(base, [row if isinstance(row, Tensor) else row[0] for row in rows])
    listed = [[row] if isinstance(row, Tensor) else row for row in rows]
    return [displaced(part, terms) for part, *terms in zip(base, *listed, strict=True)]
