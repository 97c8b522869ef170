"""Aligned-MTL as multi-task libraries of the LibMTL kind run it; our own words, none of their code.

Task by task a backward through the whole backbone, whose result is copied piece by piece into that task's row of one
[T, N] matrix; then the Gram matrix and its eigenvectors in the matrix's own dtype, one product with the weights, and
the result copied back piece by piece into ``.grad``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

EPS = 1.2e-7  # float32's; eigenvalues up to T EPS of the largest are left out


def collect(losses: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
    """The gradients, [T, N]; the graph stays, since the heads' gradients are still to come."""
    return in_rows(
        (torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses), len(losses), parameters
    )


def in_rows(gradients: Iterable[Sequence[Tensor]], tasks: int, parameters: Sequence[nn.Parameter]) -> Tensor:
    """A task's gradients after another's, each copied to its place in [T, N]."""
    first = parameters[0]
    matrix = torch.zeros(tasks, sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
    for row, parts in zip(matrix, gradients, strict=True):
        start = 0
        for gradient in parts:
            row[start : start + gradient.numel()].copy_(gradient.reshape(-1))
            start += gradient.numel()
    return matrix


def aligned(matrix: Tensor) -> Tensor:
    """[T, N] -> [N], the sum of the aligned gradients; scaled by the smallest singular value. Reads from the device."""
    values, vectors = torch.linalg.eigh(matrix @ matrix.mT)
    rank = int((values > len(values) * EPS * values.max()).sum())
    if rank == 0:
        return matrix.sum(0)
    kept, basis = values[-rank:], vectors[:, -rank:]  # ascending
    transform = kept[0].sqrt() * (basis / kept.sqrt()) @ basis.mT
    return transform.sum(1) @ matrix


def write_back(total: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """[N] to ``.grad``."""
    start = 0
    for p in parameters:
        p.grad = total[start : start + p.numel()].view_as(p).clone()
        start += p.numel()


def aligned_backward(
    losses: Sequence[Tensor], parameters: Sequence[nn.Parameter], heads: Sequence[nn.Parameter]
) -> None:
    """Losses to ``.grad``: of the shared parameters the aligned sum, of the heads their own task's."""
    matrix = collect(losses, parameters)
    for p, gradient in zip(heads, torch.autograd.grad(torch.stack(list(losses)).sum(), heads), strict=True):
        p.grad = gradient
    write_back(aligned(matrix), parameters)
