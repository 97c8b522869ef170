"""TorchJD's Aligned-MTL and UPGrad, called as its documentation does; imported when first called, so that it need not
be there. UPGrad also needs ``pip install torchjd[quadprog_projector]``.

The preference of Aligned-MTL is ones here, as ours is by default; its own default is 1/T. UPGrad's is its default, 1/T.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

OPTIONS: dict[str, Any] = {"optional": True, "tolerated": True}  #: of its contenders: its Gram matrix is float32
RIDGE = 1e-4  #: added by UPGrad to the diagonal of the Gram matrix, whose trace is one then


def version() -> str:
    try:
        return f"TorchJD {importlib.metadata.version('torchjd')}"
    except importlib.metadata.PackageNotFoundError:
        return "TorchJD"


@functools.cache
def aggregator(tasks: int, dtype: torch.dtype, device: torch.device) -> Any:
    from torchjd.aggregation import AlignedMTL

    return AlignedMTL(torch.ones(tasks, dtype=dtype, device=device))


@functools.cache
def upgrad() -> Any:
    from torchjd.aggregation import UPGrad

    return UPGrad()


def aggregate(rows: Tensor) -> Tensor:
    """[T, N] -> [N]."""
    return aggregator(len(rows), rows.dtype, rows.device)(rows)


def weights(gram: Tensor) -> Tensor:
    """The T x T part alone."""
    return aggregator(len(gram), gram.dtype, gram.device).gramian_weighting(gram)


def to_grad(parameters: Sequence[Any], per_tensor: bool, retain: bool) -> None:
    """``.jac`` to ``.grad`` by Aligned-MTL: through the concatenated Jacobian (the default), or by a Gram matrix per
    parameter."""
    from torchjd.autojac import jac_to_grad

    jacobian = parameters[0].jac
    aligned = aggregator(len(jacobian), jacobian.dtype, jacobian.device)
    jac_to_grad(parameters, aligned, retain_jac=retain, optimize_gramian_computation=per_tensor)


def upgrad_to_grad(parameters: Sequence[Any]) -> None:
    """``.jac`` to ``.grad`` by UPGrad."""
    from torchjd.autojac import jac_to_grad

    jac_to_grad(parameters, upgrad())


def backward(losses: Sequence[Tensor], features: Tensor) -> None:
    """Losses to ``.jac`` of the parameters before the features and ``.grad`` of those after."""
    from torchjd.autojac import mtl_backward

    mtl_backward(losses, features=features)


def aggregator_of(name: str, tasks: int) -> Any:
    """TorchJD's aggregator of a rule, which may need more of its extras; Nash-MTL's keeps no weights between calls."""
    from torchjd import aggregation

    makers: dict[str, Any] = {
        "upgrad": aggregation.UPGrad,
        "dualproj": aggregation.DualProj,
        "mgda": aggregation.MGDA,
        "cagrad": lambda: aggregation.CAGrad(c=0.5),
        "nash": lambda: aggregation.NashMTL(tasks, max_norm=0.0, update_weights_every=1, optim_niter=20),
        "fairgrad": lambda: aggregation.FairGrad(alpha=2.0),
        "imtlg": aggregation.IMTLG,
    }
    return makers[name]()


def weighting(name: str, tasks: int) -> Any:
    """[T, T] -> [T]. Nash-MTL's takes the gradients: their smallest ones with this Gram matrix, made untimed."""
    made = aggregator_of(name, tasks)
    if name != "nash":
        return made.gramian_weighting
    rows_of = functools.cache(torch.linalg.cholesky)

    def call(gram: Tensor) -> Tensor:
        made.reset()
        return made.weighting(rows_of(gram))

    return call


def merge_by(made: Any, parameters: Sequence[Any]) -> None:
    """``.jac`` to ``.grad``; ``.jac`` stays."""
    from torchjd.autojac import jac_to_grad

    if hasattr(made, "reset"):
        made.reset()
    jac_to_grad(parameters, made, retain_jac=True)
