"""TorchJD's Aligned-MTL, called as its documentation does; imported when first called, so that it need not be there.

Its preference is ones here, as ours is by default; its own default is 1/T.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

OPTIONS: dict[str, Any] = {"optional": True, "tolerated": True}  #: of its contenders: its Gram matrix is float32


def version() -> str:
    try:
        return f"TorchJD {importlib.metadata.version('torchjd')}"
    except importlib.metadata.PackageNotFoundError:
        return "TorchJD"


@functools.cache
def aggregator(tasks: int, dtype: torch.dtype, device: torch.device) -> Any:
    from torchjd.aggregation import AlignedMTL

    return AlignedMTL(torch.ones(tasks, dtype=dtype, device=device))


def aggregate(rows: Tensor) -> Tensor:
    """[T, N] -> [N]."""
    return aggregator(len(rows), rows.dtype, rows.device)(rows)


def weights(gram: Tensor) -> Tensor:
    """The T x T part alone."""
    return aggregator(len(gram), gram.dtype, gram.device).gramian_weighting(gram)


def to_grad(parameters: Sequence[nn.Parameter], per_tensor: bool, retain: bool) -> None:
    """``.jac`` to ``.grad``: through the concatenated Jacobian (the default), or by a Gram matrix per parameter."""
    from torchjd.autojac import jac_to_grad

    jacobian = parameters[0].jac
    aligned = aggregator(len(jacobian), jacobian.dtype, jacobian.device)
    jac_to_grad(parameters, aligned, retain_jac=retain, optimize_gramian_computation=per_tensor)


def backward(losses: Sequence[Tensor], features: Tensor) -> None:
    """Losses to ``.jac`` of the parameters before the features and ``.grad`` of those after."""
    from torchjd.autojac import mtl_backward

    mtl_backward(losses, features=features)
