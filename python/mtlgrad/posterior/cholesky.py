"""Cholesky factors of matrices that should be positive definite, and words where they are not."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

JITTERS = tuple(10.0**e for e in range(-7, 0))  # of the mean diagonal entry


def checked_cholesky(matrix: Tensor, name: str) -> Tensor:
    """Lower factor of [..., n, n]; where it fails, of the matrix with the least jitter, from 1e-7 to 1e-1 of its mean
    diagonal entry, that makes it succeed, with a warning.

    Reads from the device whether it succeeded, except while a CUDA graph is captured: there a failure gives NaN.

    Raises:
        ValueError: no jitter helps; names ``name``, which of the matrices, and the pivot that failed.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    if matrix.is_cuda and torch.cuda.is_current_stream_capturing():
        return factor.masked_fill((info > 0)[..., None, None], torch.nan)
    if not bool(info.any()) and not bool(factor.diagonal(dim1=-2, dim2=-1).sum().isnan()):
        return factor
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"{name}: expected a finite precision matrix, found NaN or infinity; check the features")
    mean_diagonal = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    for jitter in JITTERS:
        failed = info > 0
        lifted = matrix.clone()
        lifted.diagonal(dim1=-2, dim2=-1).add_((failed * (jitter * mean_diagonal))[..., None])
        factor, info = torch.linalg.cholesky_ex(lifted)
        if not bool(info.any()):
            message = f"{name}: precision not positive definite, added {jitter:.0e} of its mean diagonal"
            warnings.warn(message, stacklevel=2)
            return factor
        info = info + failed.to(info)  # what needed jitter goes on needing it
    which, pivot, value = _failed_pivot(matrix)
    raise ValueError(
        f"{name}: expected a positive definite precision matrix, found pivot {value:.3g} at row {pivot}{which} "
        f"even with {JITTERS[-1]:.0e} of the mean diagonal added; use a smaller gamma (a stronger prior)"
    )


def _failed_pivot(matrix: Tensor) -> tuple[str, int, float]:
    """Of the first matrix that fails: the row, and the pivot that is not positive there."""
    stack = matrix.reshape(-1, *matrix.shape[-2:])
    _, info = torch.linalg.cholesky_ex(stack)
    index = int(torch.nonzero(info)[0])
    row, a = int(info[index]) - 1, stack[index]
    value = a[row, row]
    if row > 0:
        factor = torch.linalg.cholesky(a[:row, :row])
        value = value - torch.linalg.solve_triangular(factor, a[:row, row, None], upper=False).square().sum()
    return (f" of matrix {index}" if stack.shape[0] > 1 else ""), row, float(value)
