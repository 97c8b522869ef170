"""Task weights from the Gram matrix of the tasks' gradients: the rules other than Aligned-MTL's (:mod:`.align`).

Every function takes ``gram`` [T, T], symmetric positive semi-definite (the upper triangle is read), of any floating
dtype, and returns weights [T], float64 on its device, of which the update is the sum of the gradients weighed by them.
Up to 64 tasks one kernel finds them, and nothing is read by the host; beyond, the reference does, which reads. Not
differentiable. The weights are as exact as float64 can tell: see each for what comes out where its problem has no
solution, or several. If anything in ``gram`` is not finite, every weight is NaN.

``check_finite`` reads the matrix on the host: ``ValueError`` with the task's number if its norm is not finite. ``out``
[T], float64, is written in place if given.

Errors: ``RuntimeError`` for shapes, dtypes and devices, ``ValueError`` for options.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._native import launch_place
from ._operation import Operation
from .align import MAX_TASKS
from .checks import check_floating, check_gram, check_same_device, check_shape, refuse, shape_of

__all__ = ["cagrad", "dualproj", "fairgrad", "imtlg", "mgda", "pcgrad", "upgrad"]

Preference = Tensor | Sequence[float] | None


def upgrad(
    gram: Tensor, preference: Preference = None, *, check_finite: bool = False, out: Tensor | None = None
) -> Tensor:
    r"""Project every task's gradient onto the dual cone of all gradients, and weigh the projections.

    .. math:: w = \sum_i p_i \arg\min \{v^T M v : v \ge e_i\}

    The update has no negative product with any gradient (Quinton and Rey, "Jacobian Descent for Multi-Objective
    Optimization", arXiv 2406.16232). Without conflicts w is the preference.

    Args:
        gram: M, [T, T], symmetric positive semi-definite (the upper triangle is read), any floating dtype.
        preference: p, [T]; 1/T each if not given.
        check_finite: reads the matrix on the host: ``ValueError`` with the task's number if its norm is not finite.
        out: [T] float64, written in place if given.

    Returns:
        w, [T] float64 on the Gram matrix's device: ``out``, or new. NaN if anything in ``gram`` is not finite.

    Raises:
        RuntimeError: shapes, dtypes, devices.
        ValueError: by ``check_finite``.

    Several weights for one update exist where gradients depend on one another: then, up to rounding, those that are
    smallest in units of the gradients' lengths, so that duplicates share, about equally. A zero
    gradient has its preference as weight.
    """
    return _weights(_upgrad, gram, (_given(preference, gram),), check_finite, out)


def dualproj(
    gram: Tensor, preference: Preference = None, *, check_finite: bool = False, out: Tensor | None = None
) -> Tensor:
    r"""Project the weighed sum of the gradients onto their dual cone.

    .. math:: w = \arg\min \{v^T M v : v \ge p\}

    Source: arXiv 2406.16232, section 3; Lopez-Paz and Ranzato, NeurIPS 2017, equation 11.

    Args:
        gram, check_finite, out: as in :func:`upgrad`.
        preference: p, [T]; 1/T each if not given.

    Returns:
        As :func:`upgrad`.

    Raises:
        RuntimeError, ValueError: as :func:`upgrad`.

    Degenerate systems: as :func:`upgrad`.
    """
    return _weights(_dualproj, gram, (_given(preference, gram),), check_finite, out)


def mgda(gram: Tensor, *, check_finite: bool = False, out: Tensor | None = None) -> Tensor:
    r"""Find the shortest convex combination of the gradients.

    .. math:: w = \arg\min \{w^T M w : w \ge 0, 1^T w = 1\}

    Source: Désidéri, 2012; Sener and Koltun, NeurIPS 2018, arXiv 1810.04650 (there by Frank and Wolfe's method).

    If gradients are zero these tasks share the weight, and the update is zero. Duplicates share theirs, about
    equally.

    Args:
        gram, check_finite, out: as in :func:`upgrad`.

    Returns:
        As :func:`upgrad`.

    Raises:
        RuntimeError, ValueError: as :func:`upgrad`.
    """
    return _weights(_mgda, gram, (), check_finite, out)


def cagrad(gram: Tensor, c: float = 0.5, *, check_finite: bool = False, out: Tensor | None = None) -> Tensor:
    r"""Find the update near the mean gradient that is best for the task it is worst for.

    .. math:: d = g_0 + \frac{k}{|g_w|} g_w, \qquad k = c |g_0|, \qquad
        w = \arg\min_{w \ge 0, 1^T w = 1} \langle g_w, g_0 \rangle + k |g_w|, \qquad g_w = \sum_t w_t g_t

    which maximises :math:`\min_t \langle g_t, d \rangle` within :math:`|d - g_0| \le c |g_0|` (Liu et al., NeurIPS
    2021, arXiv 2110.14048, algorithm 1). The weights are 1/T + k w / \|g_w\|.

    Args:
        gram, check_finite, out: as in :func:`upgrad`.
        c: from 0 (the mean gradient); below 1 for convergence to a minimum of the mean loss.

    Returns:
        As :func:`upgrad`.

    Raises:
        RuntimeError, ValueError: as :func:`upgrad`; ``ValueError`` for ``c`` below 0 or not finite.

    Where g_0 or g_w is zero (a Pareto-stationary point) the weights are 1/T.
    """
    if not 0.0 <= c < math.inf:
        raise ValueError(f"cagrad: c: expected a finite number from 0, found {c}")
    return _weights(_cagrad, gram, (float(c),), check_finite, out)


def fairgrad(
    gram: Tensor, alpha: float = 1.0, normalize: bool = True, *, check_finite: bool = False, out: Tensor | None = None
) -> Tensor:
    r"""Balance the tasks' gains by alpha-fairness; Nash-MTL with ``alpha=1``.

    .. math:: M a = a^{-1/\alpha}, \quad a > 0

    Source: Ban and Ji, ICML 2024, arXiv 2402.15638, equation 4; Navon et al., ICML 2022, arXiv 2202.01017, equation 2.

    Args:
        gram, check_finite, out: as in :func:`upgrad`.
        alpha: above 0; towards 0 the sum of the losses, towards infinity the gain of the task that gains least.
        normalize: divides M by its Frobenius norm first, as Nash-MTL's published code does: then the weights do not
            depend on the losses' common scale (a ``GradScaler``'s). Without, as FairGrad's published code:
            the weights are the same but for a factor.

    Returns:
        As :func:`upgrad`.

    Raises:
        RuntimeError, ValueError: as :func:`upgrad`; ``ValueError`` for ``alpha`` not above 0 or not finite.

    A zero gradient has the weight 0 (all: 1). If a convex combination of the others is zero there is no solution
    (Pareto stationary): the weights are that combination's, by :func:`mgda`, and the update is zero.
    """
    if not 0.0 < alpha < math.inf:
        raise ValueError(f"fairgrad: alpha: expected a finite number above 0, found {alpha}")
    return _weights(_fairgrad, gram, (float(alpha), bool(normalize)), check_finite, out)


def imtlg(gram: Tensor, *, check_finite: bool = False, out: Tensor | None = None) -> Tensor:
    r"""Find the update with equal projections on all gradients' directions.

    .. math:: M a = k \sqrt{\mathrm{diag} M}, \quad 1^T a = 1

    Source: Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021, section 3.1.

    The weights may be negative, and k, too: then the update turns against every task, as published. Gradients that
    depend on one another: the least-squares solution of least norm, of the unit gradients, so that duplicates share.
    Where its sum is zero, as for opposites, the weights are. A zero gradient has the weight 0 (all: 1/T).

    Args:
        gram, check_finite, out: as in :func:`upgrad`.

    Returns:
        As :func:`upgrad`.

    Raises:
        RuntimeError, ValueError: as :func:`upgrad`.
    """
    return _weights(_imtlg, gram, (), check_finite, out)


def pcgrad(gram: Tensor, seed: int, step: Tensor, *, check_finite: bool = False, out: Tensor | None = None) -> Tensor:
    r"""Take from every gradient its part against each of the others, in a random order, and add them up.

    For each i, from v = g_i: for every other j, where :math:`\langle v, g_j \rangle < 0`,
    :math:`v \leftarrow v - \langle v, g_j \rangle g_j / |g_j|^2` (Yu et al., "Gradient Surgery for Multi-Task
    Learning", NeurIPS 2020, arXiv 2001.06782, algorithm 1).

    Args:
        gram, check_finite, out: as in :func:`upgrad`.
        seed, step: the orders follow from these alone, on every device. ``step`` is int64, [], on the Gram matrix's
            device, so that a CUDA graph can count it on.

    Returns:
        As :func:`upgrad`.

    Raises:
        RuntimeError, ValueError: as :func:`upgrad`.

    Without conflicts all weights are 1, a zero gradient's, too.
    """
    return _weights(_pcgrad, gram, (int(seed), step), check_finite, out)


def _given(preference: Preference, gram: Tensor) -> Tensor | None:
    if preference is None or isinstance(preference, Tensor):
        return None if preference is None else preference.detach()
    return torch.tensor(preference, dtype=torch.float64, device=gram.device)


def _weights(
    operation: Operation, gram: Tensor, options: tuple[Any, ...], check_finite: bool, out: Tensor | None
) -> Tensor:
    gram = gram.detach()
    if check_finite:
        check_gram(operation.name, gram)
    if out is None:
        return operation(gram, *options)
    operation.into([out], gram, *options)
    return out


def _declare(schema: str, reference: Callable[..., Tensor], *, workspace: bool = False) -> Operation:
    """Declare a rule. The kernel of the same name takes the matrix, the options and the number of tasks, and writes
    the weights; ``workspace``: to memory of the matrix's size, too.
    """
    op, _, listed = schema.partition("(")
    names = [text.split()[1] for text in listed.partition(")")[0].split(", ")[1:]]

    def check(gram: Tensor, *options: Any) -> None:
        check_floating(op, gram=gram)
        if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
            refuse(f"{op}: gram: expected shape [T, T] with T > 0, found {shape_of(gram)}")
        for name, option in zip(names, options, strict=True):
            if name == "preference" and option is not None:
                check_floating(op, preference=option)
                check_shape(op, name, option, (len(gram),))
            if name == "step" and (option.dtype != torch.int64 or option.dim() != 0):
                refuse(f"{op}: step: expected an int64 scalar tensor, found {option.dtype} {shape_of(option)}")
            if isinstance(option, Tensor):
                check_same_device(op, "gram", gram=gram, **{name: option})

    def check_out(out: list[Tensor], gram: Tensor, *_: object) -> None:
        [weights] = out
        check_shape(op, "out", weights, (len(gram),))
        if weights.dtype != torch.float64 or weights.device != gram.device or not weights.is_contiguous():
            found = f"found {weights.dtype} on {weights.device}"
            refuse(f"{op}: out: expected contiguous torch.float64 on {gram.device}, {found}")

    def run(kernels: ModuleType, gram: Tensor, *rest: Any) -> Any:
        *options, [weights] = rest
        if len(gram) > MAX_TASKS:
            return NotImplemented
        gram = gram.to(torch.float64).contiguous()
        # Kept until the kernel has them: what their addresses need alive.
        options = [
            o.to(torch.float64).contiguous() if n == "preference" and o is not None else o
            for n, o in zip(names, options)
        ]
        given = [0 if o is None else o.data_ptr() if isinstance(o, Tensor) else o for o in options]
        spare = [torch.empty_like(gram)] if workspace else []
        where = launch_place(gram.device)
        to = weights.data_ptr(), *[tensor.data_ptr() for tensor in spare]
        getattr(kernels, op)(gram.data_ptr(), *given, len(gram), *to, where)
        return None

    return Operation(
        schema,
        check=check,
        outputs=lambda gram, *_: [torch.empty(len(gram), dtype=torch.float64, device=gram.device)],
        check_out=check_out,
        kernel=run,
        reference=reference,
    )


_upgrad = _declare("upgrad(Tensor gram, Tensor? preference) -> Tensor", reference.upgrad, workspace=True)
_dualproj = _declare("dualproj(Tensor gram, Tensor? preference) -> Tensor", reference.dualproj)
_mgda = _declare("mgda(Tensor gram) -> Tensor", reference.mgda)
_cagrad = _declare("cagrad(Tensor gram, float c) -> Tensor", reference.cagrad)
_fairgrad = _declare("fairgrad(Tensor gram, float alpha, bool normalize) -> Tensor", reference.fairgrad)
_imtlg = _declare("imtlg(Tensor gram) -> Tensor", reference.imtlg)
_pcgrad = _declare("pcgrad(Tensor gram, int seed, Tensor step) -> Tensor", reference.pcgrad)
