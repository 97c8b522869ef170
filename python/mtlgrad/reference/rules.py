"""Task weights from the Gram matrix of the tasks' gradients, rule by rule, in plain PyTorch.

Each function has the equation; :mod:`mtlgrad.ops.rules` says what comes out where that has no solution, or several. The
loops read from the device. If anything in the Gram matrix is not finite, every weight is NaN.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EPS = 2.3e-16  #: what float64 rounds by
RIDGE = 1e-13  #: added to a diagonal of ones
STATIONARY = 1e-12  #: w'Mw counts as zero if below this times |w|'|M||w|


def _symmetric(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Take the upper triangle, in float64, and give NaN for what is not finite."""

    @functools.wraps(rule)
    def weights(gram: Tensor, *options: Any) -> Tensor:
        gram = gram.double()
        if not gram.triu().isfinite().all():
            return torch.full_like(gram[0], torch.nan)
        return rule(gram.triu() + gram.triu(1).mT, *options)

    return weights


# ---- the dual cone ---------------------------------------------------------------------------------------------------


@_symmetric
def upgrad(gram: Tensor, preference: Tensor | None = None) -> Tensor:
    r"""Return :math:`\sum_i p_i \arg\min \{v^T M v : v \ge e_i\}` (Quinton and Rey, arXiv 2406.16232).

    Args:
        gram, preference: as in :func:`mtlgrad.ops.upgrad`.

    Returns:
        The weights, [T] float64.
    """
    each = torch.stack([_projected(gram, unit) for unit in torch.eye(len(gram)).to(gram)])
    return _preference(gram, preference) @ each


@_symmetric
def dualproj(gram: Tensor, preference: Tensor | None = None) -> Tensor:
    r"""Return :math:`\arg\min \{v^T M v : v \ge p\}` (arXiv 2406.16232; Lopez-Paz and Ranzato, NeurIPS 2017).

    Args:
        gram, preference: as in :func:`mtlgrad.ops.dualproj`.

    Returns:
        The weights, [T] float64.
    """
    return _projected(gram, _preference(gram, preference))


def _preference(gram: Tensor, preference: Tensor | None) -> Tensor:
    return torch.full_like(gram[0], 1.0 / len(gram)) if preference is None else preference.to(gram)


def _projected(gram: Tensor, least: Tensor) -> Tensor:
    """v = least + x with x >= 0; in units of the gradients' lengths, so that the matrix has ones on its diagonal."""
    cosines, lengths = _cosines(gram)
    some = (lengths > 0).nonzero().squeeze(1)
    linear = -cosines @ (least * lengths)
    found = least.clone()
    found[some] += non_negative(cosines[some][:, some], linear[some]) / lengths[some]
    return found


def _cosines(gram: Tensor) -> tuple[Tensor, Tensor]:
    lengths = gram.diagonal().clamp_min(0.0).sqrt()
    safe = lengths.where(lengths > 0, torch.inf)
    return gram / safe[:, None] / safe, lengths


def non_negative(matrix: Tensor, linear: Tensor) -> Tensor:
    """Minimise x'Ax / 2 - b'x over x >= 0 by the active set of Lawson and Hanson; A has ones on its diagonal.

    It starts from all that gain at x = 0, less those whom the members' solution has below zero. Then whoever gains most
    enters; of the members' solution, and on the way to it, whoever would fall below zero leaves. A ridge keeps members
    apart that depend on one another; where none do, it is taken out of the solution again.
    """
    n, x = len(linear), torch.zeros_like(linear)
    ridged = matrix + RIDGE * torch.eye(n).to(matrix)
    members = (linear > 0).nonzero().squeeze(1).tolist()
    while members:
        goal = torch.linalg.solve(ridged[members][:, members], linear[members])
        if (goal > 0).all():
            x[members] = goal
            break
        members = [j for j, value in zip(members, goal.tolist()) if value > 0]
    barred: set[int] = set()
    for _ in range(10 * n + 20):
        rest, bound = linear - ridged @ x, linear.abs() + ridged.abs() @ x
        rest[[*members, *barred]] = -torch.inf
        gain, entering = rest.where(rest > 2 * EPS * n * bound, -torch.inf).max(0)
        if gain == -torch.inf:
            break
        members.append(int(entering))
        moved = False
        while members:
            goal = torch.linalg.solve(ridged[members][:, members], linear[members])
            if (goal > 0).all():
                x[members], moved = goal, True
                break
            way = (x[members] / (x[members] - goal)).where(goal <= 0, torch.inf)
            part, first = way.min(0)
            x[members] = (x[members] + part * (goal - x[members])).clamp_min(0.0)
            gone = members.pop(int(first))
            x[gone] = 0.0
            if gone == entering and not moved:
                barred.add(gone)
            moved = moved or bool(part > 0)
        if moved:
            barred.clear()
    among = ridged[members][:, members]
    if members and torch.linalg.eigvalsh(among)[0] > 1e3 * RIDGE:
        for _ in range(3):
            refined = x[members] + torch.linalg.solve(among, linear[members] - matrix[members] @ x)
            if not (refined > 0).all():
                break
            x[members] = refined
    return x


# ---- the simplex -----------------------------------------------------------------------------------------------------


@_symmetric
def mgda(gram: Tensor) -> Tensor:
    r"""Return :math:`\arg\min \{w^T M w : w \ge 0, 1^T w = 1\}` (Sener and Koltun, NeurIPS 2018, arXiv 1810.04650).

    Args:
        gram: as in :func:`mtlgrad.ops.mgda`.

    Returns:
        The weights, [T] float64.
    """
    largest = gram.diagonal().max()
    if not largest > 0:
        return torch.full_like(gram[0], 1.0 / len(gram))
    return _least_norm(gram / largest)


def _least_norm(gram: Tensor, rounding: Tensor | None = None) -> Tensor:
    """With x = r w, x'(M + s 11')x / 2 - s 1'x is least in r where r = s / (s + w'Mw), and increases in w'Mw then."""
    squares = gram.diagonal() if rounding is None else gram.diagonal().maximum(rounding)
    s = float(squares.min())
    if s <= 0:
        return (squares <= 0).double() / (squares <= 0).sum()
    scale = (squares + s).sqrt()
    matrix = ((gram + s) / scale[:, None] / scale).fill_diagonal_(1.0)
    x = non_negative(matrix, math.sqrt(s) / scale) / scale
    return x / x.sum()


@_symmetric
def cagrad(gram: Tensor, c: float = 0.5) -> Tensor:
    r"""Return :math:`u + k w / \sqrt{w^T M w}` with :math:`u = 1/T`, :math:`k = c \sqrt{u^T M u}`, and w on the simplex
    minimising :math:`w^T M u + k \sqrt{w^T M w}` (Liu et al., NeurIPS 2021, arXiv 2110.14048). With g_0 the mean
    gradient, w is also the point of least norm in the convex hull of the g_i + t g_0, for the t at which its
    :math:`\sqrt{w^T M w} = k t`: found by bisection, since :math:`\sqrt{w^T M w} / t` decreases in t.

    Args:
        gram, c: as in :func:`mtlgrad.ops.cagrad`.

    Returns:
        The weights, [T] float64.
    """
    mean = torch.full_like(gram[0], 1.0 / len(gram))
    largest = gram.diagonal().max()
    gram = gram / largest
    means = gram @ mean
    square = means @ mean
    if not largest > 0 or not c or square <= STATIONARY * (mean @ gram.abs() @ mean):
        return mean
    k = c * float(square.sqrt())

    def point(t: float) -> tuple[Tensor, float, float]:
        rounding = 1e-15 * t * (2 * means.abs() + t * square)  # what is left of a difference
        w = _least_norm(gram + t * (means[:, None] + means + t * square), rounding)
        return w, float(w @ gram @ w), float(w @ gram.abs() @ w)

    w, norm, bound = point(0.0)
    low, high = math.sqrt(max(norm, 0.0)) / k, 1.0 / k
    if norm <= STATIONARY * bound:  # zero is in the hull: sqrt(w'Mw) / t stays the same from some t downwards
        shortest = float(gram.diagonal()[gram.diagonal() > 0].min())
        low = 1e-6 * math.sqrt(max(bound, shortest)) / k
        w, norm, bound = point(low)
        if norm <= (k * low) ** 2:
            return mean
    for _ in range(200):
        t = math.sqrt(low * high)
        w, norm, bound = point(t)
        if abs(norm - (k * t) ** 2) <= 8 * EPS * bound or high <= low * (1.0 + EPS):
            break
        low, high = (t, high) if norm > (k * t) ** 2 else (low, t)
    return mean + k / math.sqrt(norm) * w


# ---- fairness --------------------------------------------------------------------------------------------------------


@_symmetric
def fairgrad(gram: Tensor, alpha: float = 1.0, normalize: bool = True) -> Tensor:
    r"""Return a > 0 with :math:`M a = a^{-1/\alpha}` (Ban and Ji, ICML 2024, arXiv 2402.15638; Nash-MTL, Navon et al.,
    ICML 2022, arXiv 2202.01017, for :math:`\alpha = 1`), M divided by its Frobenius norm first with ``normalize``.

    With p = 1 / alpha and d the gradients' lengths, x = d a minimises x'Cx / 2 - sum_i k_i x_i^(1-p) / (1-p), where C
    are the cosines and k = d^(p-1): by Newton's method, each step halved until it gains enough.

    Args:
        gram, alpha, normalize: as in :func:`mtlgrad.ops.fairgrad`.

    Returns:
        The weights, [T] float64.
    """
    if not gram.diagonal().max() > 0:
        return torch.ones_like(gram[0])
    largest = gram.diagonal().max()
    some = (gram.diagonal() > 0).nonzero().squeeze(1)
    scaled = gram / largest
    norm = torch.linalg.matrix_norm(scaled) if normalize else 1.0 / largest
    cosines, lengths = _cosines(scaled[some][:, some] / norm)
    cosines.fill_diagonal_(1.0)
    p = 1.0 / alpha
    log_k = (p - 1.0) * lengths.log()
    top = log_k.max()  # x and k are relative to it
    k = (log_k - top).exp()

    def utility(x: Tensor, step: Tensor) -> Tensor:
        grown = torch.log1p(step / x)
        return k @ (grown if p == 1.0 else x ** (1.0 - p) * torch.expm1((1.0 - p) * grown) / (1.0 - p))

    x = k ** (1.0 / (1.0 + p))
    quadratic = x @ cosines @ x
    if quadratic > 0:
        x = x * ((k @ x ** (1.0 - p)) / quadratic) ** (1.0 / (1.0 + p))
    for _ in range(200):
        gains, slopes, sizes = k * x ** (1.0 - p), x * (cosines @ x), x * (cosines.abs() @ x)
        off = ((gains - slopes).abs() / (gains + sizes)).max()
        stationary = slopes.sum() <= STATIONARY * sizes.sum()
        if stationary or off <= 4 * EPS * len(x):
            break
        step = torch.linalg.solve(cosines + (p * gains / x**2).diag(), (gains - slopes) / x)
        decrement = step @ ((gains - slopes) / x)
        linear, curved = step @ (slopes / x), step @ cosines @ step
        part = min(1.0, 0.9 / max(float((-step / x).max()), 1e-300))
        for _ in range(40):
            change = part * (linear + 0.5 * part * curved) - utility(x, part * step)
            if decrement <= 1e-10 * slopes.sum() or change <= -1e-4 * part * decrement:
                break
            part *= 0.5
        x = x + part * step
    if stationary or not off <= 1e-9:
        return mgda(gram)
    weights = torch.zeros_like(gram[0])
    weights[some] = (top / (1.0 + p)).exp() * x / lengths
    return weights


# ---- the others ------------------------------------------------------------------------------------------------------


@_symmetric
def imtlg(gram: Tensor) -> Tensor:
    r"""Return a with :math:`M a = k \sqrt{\mathrm{diag} M}` and :math:`1^T a = 1` (Liu et al., ICLR 2021, section 3.1)

    With C the cosines and d the lengths, a is C^+ 1 / d over its sum.

    Args:
        gram: as in :func:`mtlgrad.ops.imtlg`.

    Returns:
        The weights, [T] float64.
    """
    cosines, lengths = _cosines(gram)
    if not lengths.max() > 0:
        return torch.full_like(gram[0], 1.0 / len(gram))
    some = lengths > 0
    values, vectors = torch.linalg.eigh(cosines.where(some[:, None] & some, 0.0))
    inverse = torch.where(values > 1e-14 * len(gram) * values.max(), 1.0 / values, 0.0)
    sums = vectors.mT @ some.double()
    y = vectors @ (inverse * sums.where(sums.abs() > STATIONARY, 0.0))
    weights = torch.where(some, y * (lengths.max() / lengths), 0.0)
    total = weights.sum()
    return weights / total if total.abs() > STATIONARY * weights.abs().sum() else torch.zeros_like(weights)


@_symmetric
def pcgrad(gram: Tensor, seed: int, step: Tensor) -> Tensor:
    r"""Return the sum over i of g_i without its conflicts: for each j, in a random order, where
    :math:`\langle v, g_j \rangle < 0`, v loses :math:`\langle v, g_j \rangle / |g_j|^2` times g_j (Yu et al., NeurIPS
    2020, arXiv 2001.06782, algorithm 1). The orders are drawn from seed, step and i alone.

    Args:
        gram, seed, step: as in :func:`mtlgrad.ops.pcgrad`.

    Returns:
        The weights, [T] float64.
    """
    n, m = len(gram), gram.tolist()
    weights = [0.0] * n
    for i in range(n):
        v = [float(j == i) for j in range(n)]
        for j in drawn_order(n, seed, int(step), i):
            product = sum(a * b for a, b in zip(m[j], v, strict=True))
            if j != i and product < 0.0:
                v[j] -= product / m[j][j]
        weights = [w + own for w, own in zip(weights, v, strict=True)]
    return torch.tensor(weights, dtype=torch.float64).to(gram)


def drawn_order(n: int, seed: int, step: int, i: int) -> list[int]:
    """Draw the order in which task i's gradient meets those of n tasks: Fisher and Yates' shuffle by splitmix64."""
    key = _scrambled(_scrambled(_scrambled(seed) + step) + i)
    order = list(range(n))
    for j in range(n - 1, 0, -1):
        other = _scrambled(key + j) % (j + 1)
        order[j], order[other] = order[other], order[j]
    return order


def _scrambled(x: int) -> int:
    mask = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)
