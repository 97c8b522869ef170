"""What arrives at the layer, taken apart: what each task's loss was multiplied by, and everything else (DESIGN 4.3).

The gradient of task t's plain loss at the heads' own weights is e_t = R_t W_t: the derivatives of the mean loss in the
logits, [B, K_t], times the head's weights, [K_t, D]. What arrives is g = sum_t s_t e_t + rest. Products of these small
factors make the T x T system <e_t, e_u> s_u = <e_t, g>, in float64, with a ridge towards the common scale. Where the
tasks explain g up to rounding, its solution is s, and nothing is left over. Where they do not, something else arrived,
which tilts the solution: then s is what ``total`` was multiplied by, or the power of two next to the common scale, and
the rest goes on into the backbone as it is. Nothing here waits for a device but :func:`find_foreign`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .heads import Head, Outputs

#: So many times the rounding error that :class:`Own` expects are nothing; it was 0.4 to 0.6 of it for all dtypes.
ROUNDINGS = 1.5
SMALLEST_RIDGE = 1e-13  # of float64 products
SMALLEST_EPS = 1e-11  # what is left of these
HALF_EPS = 2.0**-8  # of bfloat16: autocast rounds on the way, whatever the features' dtype
NEAR = (1e-10, 1e-2)  # a scale that is as near to a power of two is one: at least, and at most
SAME = 1e-3  # scales that are as near are the same
ROUGH_IS_NEAR = 0.05  # a scale found through half precision, as near to the common one or to total's, is that one
OTHER_LOSS = 0.02  # a head's gradient that is as far from any multiple of its plain loss's is that of another loss
OTHER_LAYER = 0.1  # weights that are as far from the space of the gradients had no part in them
NO_RANK = 10.0  # singular values below so many roundings of the largest

#: What a head's gradient may come from, and what to do about it.
WAYS_OUT = {
    "another loss": "use the registered one, or leave the head out",
    "another layer": "register the one that is used",
}


class Own:
    """The tasks' own gradients as factors, float64; K rows of weights, T tasks.

    Attributes:
        slopes: [B, K].
        weights: [K, D].
        groups: [T, K], one where the row is the task's.
    """

    def __init__(self, outputs: Outputs, groups: Tensor):
        self.outputs, self.groups = outputs, groups
        self.slopes = torch.cat([terms.slopes for terms in outputs.terms], 1) / outputs.hidden.shape[0]
        self.weights = outputs.weight[:, :-1]

    @cached_property
    def noise(self) -> Tensor:
        """[K], the squared norms of the errors that rounding leaves in each row's gradient, over eps^2: that of what a
        logit is summed up from, of itself, and of the target that it is subtracted from."""
        hidden, weight, heads = self.outputs.hidden, self.outputs.weight, self.outputs.heads
        others = torch.cat([terms.logits for terms in self.outputs.terms], 1)
        squares = hidden.square().sum(0) @ weight.T.square() + (self.outputs.logits.square() + others.square()).sum(0)
        steepness = [head.likelihood.steepness for head in heads for _ in range(head.outputs)]
        return squares * self.weights.square().sum(1) * (squares.new_tensor(steepness) / len(hidden)) ** 2

    def gradient(self, scales: Tensor) -> Tensor:
        """Return sum_t s_t e_t, [B, D]."""
        return (self.slopes * (scales @ self.groups)) @ self.weights


class Incoming(NamedTuple):
    scales: Tensor  # [T] float64: s
    rest: Tensor | None  # [B, D] float64; None: nothing
    explained: Tensor  # bool: whether the tasks explain what arrived, if half precision was on the way


def read(
    gradient: Tensor, own: Own, total: Tensor | None = None, share: float = 1.0, foreign: Tensor | None = None
) -> Incoming:
    """Take apart what arrived.

    Args:
        gradient: [B, D], in the dtype of the features.
        total: what the sum of the losses was multiplied by, a scalar, where that is known.
        share: with several ranks, W times this rank's examples over all: by which the losses may have been multiplied.
        foreign: [K] bool, rows of heads whose gradient is not that of the plain loss: their scale is zero.
    """
    g, eps = gradient.double(), _eps(gradient)
    slopes, weights, seen = own.slopes, own.weights, g
    if g.device.type == "cpu" and foreign is None:  # what is most usual, where looking costs nothing: one scale for all
        together = slopes @ weights
        flat, other = g.flatten(), together.flatten()
        size, product, norm = float(flat @ flat), float(flat @ other), float(other @ other)
        scale = float(total) if total is not None else _power_of_two(product / norm if norm else 1.0)
        left = torch.sub(flat, other, alpha=scale)
        missed, allowed = float(left @ left), (ROUNDINGS * eps) ** 2
        if missed <= allowed * size or missed <= allowed * (size + scale**2 * float(own.noise.sum())):
            scales = torch.full_like(own.groups[:, 0], scale)
            return Incoming(scales, None, torch.ones((), dtype=torch.bool, device=g.device))
    if foreign is not None:  # look where these heads cannot reach
        basis = torch.linalg.qr(weights[foreign].T).Q
        seen, weights = (x - (x @ basis) @ basis.T for x in (g, weights))
    gram = own.groups @ ((slopes.T @ slopes) * (weights @ weights.T)) @ own.groups.T
    products = own.groups @ (slopes * (seen @ weights.T)).sum(0)
    norms = gram.diagonal().sqrt()
    norms = torch.where(norms > 0.0, norms, 1.0)
    everything = gram.sum()
    common = torch.where(everything > 0.0, products.sum() / everything, 1.0 if total is None else total.double())
    # Two solutions: for a gradient that was computed in its dtype, and for one that passed through half precision.
    ridges = norms.new_tensor([max((4.0 * e) ** 2, SMALLEST_RIDGE) for e in (eps, HALF_EPS)])[:, None]
    systems = gram / torch.outer(norms, norms) + torch.diag_embed(ridges.expand(-1, len(norms)))
    solutions = torch.linalg.solve_ex(systems, products / norms + ridges * norms * common)[0] / norms
    exact = _rounded(solutions[0], min(max(64.0 * eps, NEAR[0]), NEAR[1]))
    # Tilted by what else arrived; but a loss scale is a power of two.
    power = torch.where(common > 0.0, torch.exp2(common.clamp(min=1e-300).log2().round()), 1.0)
    otherwise = power if total is None else total.double()
    if total is not None and share != 1.0:
        shared = otherwise * share
        otherwise = torch.where((common - shared).abs() < (common - otherwise).abs(), shared, otherwise)
    rough = torch.where((solutions[1] - otherwise).abs() <= ROUGH_IS_NEAR * otherwise.abs(), otherwise, solutions[1])
    scales, fits = otherwise.expand_as(exact), []
    for solution, e in ((rough, HALF_EPS), (exact, eps), (otherwise.expand_as(exact), eps)):  # the last that fits
        by_row = solution @ own.groups
        left = seen - (slopes * by_row) @ weights
        rounding = seen.square().sum() + (by_row.square() * own.noise).sum()
        fits.append(left.square().sum() <= (ROUNDINGS * e) ** 2 * rounding)
        scales = torch.where(fits[-1], solution, scales)
    if foreign is not None:
        scales = scales * (own.groups @ (~foreign).to(g) > 0.0)
    rest = g - own.gradient(scales)
    if foreign is None:
        rest = torch.where(fits[1] | fits[2], 0.0, rest)
    return Incoming(scales, rest, fits[0] | fits[1] | fits[2])


def as_published(scales: Tensor, total: Tensor, outputs: Sequence[int]) -> Tensor:
    """Return what the mean over the tasks is multiplied by, which is the same for a sum and for a mean over a head's
    outputs: where the loss is such a mean, ``total``. ``outputs``: for each task the number of its head's."""
    number = torch.tensor(outputs, dtype=torch.float64, device=scales.device)
    total = total.double()
    return torch.where((scales * number - total).abs() <= SAME * total.abs(), total, scales)


def _power_of_two(scale: float) -> float:
    return 2.0 ** round(math.log2(scale)) if 0.0 < scale < math.inf else 1.0


def _eps(gradient: Tensor) -> float:
    return min(max(torch.finfo(gradient.dtype).eps, SMALLEST_EPS), HALF_EPS)


def _rounded(scales: Tensor, near: float) -> Tensor:
    """Return the scales, those near a power of two (loss scales are, and one is) exactly."""
    power = torch.exp2(scales.abs().log2().round())
    return torch.where((scales.abs() - power).abs() <= near * power, power.copysign(scales), scales)


def find_foreign(gradient: Tensor, own: Own, heads: Sequence[Head]) -> dict[int, str]:
    """Return, by the index of the head, what is wrong with heads whose gradient is not that of their plain loss.

    For a gradient that the tasks do not explain. If its rows lie in the space of the weights, they tell the derivatives
    of the loss in each logit, and so which head has another loss. If not, but they span no more than the heads could,
    then some head is not the one that is registered: the one whose weights are not in their space. In all other cases
    something else was added to the losses, and nothing can be said of the heads. Reads the device.
    """
    g, eps, found = gradient.double(), _eps(gradient), dict[int, str]()
    weights, rows = own.weights, own.weights.split([head.outputs for head in heads])
    if not bool(g.isfinite().all()) or not bool(g.any()):
        return found
    if len(weights) < g.shape[1]:  # else everything lies there
        inverse = torch.linalg.pinv(weights)  # [D, K]
        slopes, sizes = g @ inverse, [head.outputs for head in heads]
        outside, size = (g - slopes @ weights).norm(), (g.square().sum() + own.noise.sum()).sqrt()
        levels = (eps, HALF_EPS) if gradient.dtype != torch.float64 else (eps,)
        inside = [e for e in levels if bool(outside <= ROUNDINGS * e * size)]
        if inside:
            errors = 8.0 * inside[0] * size * inverse.norm(dim=0)  # of each column of the derivatives
            parts = zip(heads, slopes.split(sizes, 1), own.slopes.split(sizes, 1), errors.split(sizes))
            for i, (head, mine, plain, error) in enumerate(parts):
                if head.likelihood.is_joint:  # all logits moved alike change nothing
                    mine = mine - mine.mean(1, keepdim=True)
                    mine, plain, error = mine.reshape(-1, 1), plain.reshape(-1, 1), error.norm()[None]
                if any(_differ(a, b, e) for a, b, e in zip(mine.T, plain.T, error)):
                    found[i] = "another loss"
            return found
    _, values, space = torch.linalg.svd(g, full_matrices=False)
    rank = int((values > NO_RANK * eps * values[0]).sum())
    if rank > len(weights) or rank >= min(g.shape):
        return found
    basis = space[:rank]
    for i, (head, w) in enumerate(zip(heads, rows)):
        if head.likelihood.is_joint:
            w = w - w.mean(0)
        far = (w - (w @ basis.T) @ basis).norm()
        if bool(far > OTHER_LAYER * w.norm()):
            found[i] = "another layer"
    return found


def _differ(slopes: Tensor, plain: Tensor, error: Tensor) -> bool:
    """Whether derivatives are no multiple of those of the plain loss."""
    norm = plain.norm().clamp(min=torch.finfo(plain.dtype).tiny)
    left = (slopes - (slopes @ plain) / norm**2 * plain).norm()
    return bool(left > OTHER_LOSS * slopes.norm()) and bool(left > error)
