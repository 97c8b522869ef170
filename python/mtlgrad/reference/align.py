"""The alignment of Aligned-MTL (Senushkin et al., CVPR 2023, arXiv 2305.19000), in plain PyTorch."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Scale = Literal["min", "median", "rmse"]

EPS = 1.2e-7  #: float32's, rounded as in the published rule: eigenvalues below T EPS l_max are taken for zero


class AlignResult(NamedTuple):
    """What the gradients of T tasks are aligned with. float64, but for the rank; on the Gram matrix's device."""

    weights: Tensor  #: [T]: the aligned update is the sum of the gradients weighed by these
    singular_values: Tensor  #: [T], of the matrix of gradients, descending
    rank: Tensor  #: [] int64: how many of them are above the tolerance; -1 where the Gram matrix is not finite
    condition_number: Tensor  #: []: the largest singular value over the smallest: infinite if that is 0, NaN if all are
    transform: Tensor  #: [T, T], B of the paper: columns of G B are the aligned gradients, weights = B preference


def align(
    gram: Tensor, preference: Tensor | None = None, scale: Scale = "min", rtol: float | None = None
) -> AlignResult:
    r"""Make the condition number of the gradients' system one, as :func:`mtlgrad.ops.align`.

    The gradients are the columns of G = U S V' (their Gram matrix is G'G = V S^2 V'). The orthogonal system nearest to
    it is U V' (Procrustes), so that G becomes s U V' = G B with

    .. math:: B = s \sum_{i \le R} v_i v_i^T / \sqrt{l_i}, \qquad l_i = S_i^2,

    over the R eigenvalues above rtol times the largest; s is the square root of the smallest of them (``"min"``), of
    their median (the lower one) or of their mean (``"rmse"``). With R = 0 there is nothing to align, and B = I.

    Args:
        gram, preference, scale, rtol: as there.

    Returns:
        As there; differentiable where no two eigenvalues are equal.
    """
    tasks = gram.shape[0]
    gram = torch.triu(gram.double()) + torch.triu(gram.double(), 1).mT
    finite = gram.isfinite().all()
    one = torch.eye(tasks, dtype=gram.dtype, device=gram.device)
    largest = gram.diagonal().max()
    # An unscaled system near 1e-22 or 1e+18 would meet tolerances that are not its own.
    gram = torch.where(finite & (largest > 0), gram / largest, torch.where(finite, 0.0 * one, one))
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)

    kept = (values > values[0] * (tasks * EPS if rtol is None else rtol)) & (values > 0)
    rank = kept.sum()
    last = (rank - 1).clamp_min(0)
    if scale == "min":
        square = values[last]
    elif scale == "median":
        square = values[torch.where(rank > 0, rank // 2, last)]
    else:
        square = torch.where(kept, values, 0.0).sum() / rank
    stretch = torch.where(kept, (square / torch.where(kept, values, 1.0)).sqrt(), 0.0)
    transform = torch.where(rank > 0, (vectors * stretch) @ vectors.mT, one)

    preference = torch.ones(tasks, device=gram.device) if preference is None else preference
    nan = torch.full((), torch.nan, dtype=gram.dtype, device=gram.device)
    return AlignResult(
        weights=torch.where(finite, transform @ preference.double(), nan),
        singular_values=torch.where(finite, values.sqrt() * largest.sqrt(), nan),
        rank=torch.where(finite, rank, -1),
        condition_number=torch.where(finite, (values[0] / values[-1]).sqrt(), nan),
        transform=torch.where(finite, transform, nan),
    )
