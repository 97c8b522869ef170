"""TorchJD's Aligned-MTL on the operations of this package: change the import, and nothing else.

``from mtlgrad.interop.torchjd import AlignedMTL`` instead of ``from torchjd.aggregation import AlignedMTL``. Made for
TorchJD 0.18. :class:`mtlgrad.AlignedMTL` reads the same ``Parameter.jac`` and needs no TorchJD.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from .. import ops, reference
from ..ops.align import Scale

try:
    from torchjd import aggregation as theirs
    from torchjd.linalg import Matrix, PSDMatrix
except ModuleNotFoundError as error:
    if error.name != "torchjd":
        raise
    raise ImportError(f"{__name__}: expected the package TorchJD, found none; pip install torchjd") from None

__all__ = ["AlignedMTL", "AlignedMTLWeighting"]


def _at_least_float32(weights: Tensor, like: Tensor) -> Tensor:
    return weights.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


class AlignedMTLWeighting(theirs.AlignedMTLWeighting):
    r"""The weights B p of Aligned-MTL from a Gramian, by :func:`mtlgrad.ops.align`, which has the equations.

    For ``torchjd.autogram``, and inside :class:`AlignedMTL`.

    Args:
        pref_vector, scale_mode, rtol: as in :class:`AlignedMTL`.

    Shapes: ``weighting(gramian)``, [m, m] of any floating dtype, gives [m], float64 for float64, else float32.
    Differentiable where no two eigenvalues are equal.

    Raises:
        ValueError: as :class:`AlignedMTL`.

    Source: Senushkin et al., CVPR 2023, arXiv 2305.19000, section 4, algorithm 1.
    """

    def __init__(self, pref_vector: Tensor | None = None, scale_mode: Scale = "min", *, rtol: float | None = None):
        super().__init__(pref_vector, scale_mode=scale_mode)
        self.rtol = rtol

    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        """Find the weights.

        Args:
            gramian: [m, m].

        Returns:
            [m], B p.

        Raises:
            ValueError: as the class says.
        """
        if self.scale_mode not in get_args(Scale):
            raise ValueError(
                f"AlignedMTL: Invalid scale_mode={self.scale_mode!r}. Expected one of {', '.join(get_args(Scale))}"
            )
        preference = self.weighting(gramian)
        differentiated = torch.is_grad_enabled() and (gramian.requires_grad or preference.requires_grad)
        align = reference.align if differentiated else ops.align
        return _at_least_float32(align(gramian, preference, self.scale_mode, self.rtol).weights, gramian)


class _JacobianWeighting(theirs.Weighting[Matrix]):
    """Weights from a Jacobian [m, n], through its float64 Gram matrix."""

    def __init__(self, gramian_weighting: AlignedMTLWeighting) -> None:
        super().__init__()
        self.gramian_weighting = gramian_weighting

    def forward(self, matrix: Matrix, /) -> Tensor:
        return _at_least_float32(self.gramian_weighting(ops.gram(matrix)), matrix)


class AlignedMTL(theirs.AlignedMTL):
    r"""Aligned-MTL as a TorchJD aggregator, a subclass of ``torchjd.aggregation.AlignedMTL``.

    With the eigenpairs l_i, v_i of the Gramian J J', those above rtol times the largest, the aggregation is

    .. math:: J^T B p, \qquad B = s \sum_i v_i v_i^T / \sqrt{l_i}.

    Called on a Jacobian (``jac_to_grad`` by default), the Gramian is accumulated in float64 and J read twice, without
    copies. With ``optimize_gramian_computation=True`` TorchJD makes the Gramian, in the Jacobians' dtype, and the
    weighted sum; the alignment alone is ours. :meth:`mtlgrad.AlignedMTL.merge` neither concatenates nor loses digits.

    Args:
        pref_vector: p, [m], any floating dtype; 1/m each if not given. (:class:`mtlgrad.AlignedMTL` has ones.)
        scale_mode: what s is: the smallest singular value kept (``"min"``), the median one (``"median"``) or their root
            mean square (``"rmse"``).
        rtol: m x 1.2e-7 if not given. TorchJD has the same for float32, and m x 2.2e-16 for float64.

    Shapes: ``aggregator(matrix)``, [m, n] of any floating dtype, gives [n] of that dtype. Differentiable where no two
    singular values are equal.

    Raises:
        ValueError: an unknown ``scale_mode`` (when called), a ``pref_vector`` that is no vector or has not m entries.

    NaN or infinity in a gradient gives a gradient of NaN, where TorchJD fails in ``eigh``.

    Source: Senushkin et al., CVPR 2023, arXiv 2305.19000, section 4, algorithm 1.
    """

    gramian_weighting: AlignedMTLWeighting

    def __init__(self, pref_vector: Tensor | None = None, scale_mode: Scale = "min", *, rtol: float | None = None):
        super().__init__(pref_vector, scale_mode=scale_mode)
        self.gramian_weighting = AlignedMTLWeighting(pref_vector, scale_mode, rtol=rtol)
        self.weighting = _JacobianWeighting(self.gramian_weighting)

    def forward(self, matrix: Matrix, /) -> Tensor:
        """Aggregate a Jacobian.

        Args:
            matrix: J, [m, n].

        Returns:
            [n].

        Raises:
            ValueError: as the class says.
        """
        result = ops.combine(matrix, self.weighting(matrix))
        assert isinstance(result, Tensor)
        return result

    def __repr__(self) -> str:
        text = super().__repr__()
        rtol = self.gramian_weighting.rtol
        return text if rtol is None else f"{text.removesuffix(')')}, rtol={rtol})"
