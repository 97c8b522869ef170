"""Bytes and floating-point operations of the `moments` stem, by formula.

Bytes are the compulsory traffic in float32, inputs once and outputs once. Operations are those of the cheapest
algorithm known for the leading terms (a multiply-add counts two, exp and the like one): the arithmetic floor that a run
is compared with, not what a kernel happens to do. B, D, P = D + 1, O, C, S, T as in the rest of the package.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT = 4


@dataclass(frozen=True)
class Count:
    bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Count) -> Count:
        return Count(self.bytes + other.bytes, self.flops + other.flops)


def regression_moments(B: int, D: int, O: int) -> Count:  # noqa: E741
    """S h is one product with a [D, D] matrix; the rest is some 14 operations an entry of [B, O, D]."""
    return Count(FLOAT * (B * D + B * O + O * D + D * D + 2 * B * O * D), 2 * B * D * D + 14 * B * O * D)


def binary_moments(B: int, D: int, O: int, nodes: int = 32) -> Count:  # noqa: E741
    """S h~ per output, some 15 operations a quadrature node and 14 an entry of [B, O, D]."""
    P = D + 1
    moved = B * D + B * O + O * P + O * P * P + 2 * B * O * D
    return Count(FLOAT * moved, O * (2 * B * P * P + 15 * B * nodes + 14 * B * D))


def multiclass_moments(B: int, D: int, C: int, points: int = 128) -> Count:
    """S_ck h~ for all pairs of classes; then n = C + C^2 numbers (the residuals, and times t) say all about an example:
    their means and products over the points, and one quadratic form a dimension."""
    P, n = D + 1, C + C * C
    moved = B * D + 2 * B + C * P + (C * P) ** 2 + 2 * B * D
    form = n * (n + 1)  # a symmetric quadratic form, or the update of a symmetric sum
    flops = 2 * C * C * B * P * P + B * points * (2 * C * C + 5 * C + form) + B * D * (form + 2 * C * C)
    return Count(FLOAT * moved, flops)


def sampled_moments(B: int, D: int, C: int, S: int, *, kind: str) -> Count:
    """Logits, then both moments: binary two multiply-adds a weight; multiclass C of them and then mean and square."""
    P, T = D + 1, C if kind == "binary" else 1
    logits = 2 * S * B * C * P
    gradients = 4 * S * B * C * D if kind == "binary" else S * B * D * (2 * C + 3)
    moved = B * D + B * T + S * C * P + 2 * B * T * D
    return Count(FLOAT * moved, logits + 6 * S * B * C + gradients)


def precision_mean(B: int, D: int, T: int) -> Count:
    """A power, a multiply-add and an addition a task; one division an entry."""
    return Count(FLOAT * (2 * B * T * D + B * D), B * D * (5 * T + 2))


def posterior(B: int, P: int, C: int) -> float:
    """Operations from a prior over C x P weights, kept as covariance or precision, to S J' and the diagonal of S.

    Directly: J'QJ, a Cholesky factorisation, an inverse, the products. Or, where the batch has fewer rows than there
    are weights, by the r = B C rows of J alone: S0 J', a factorisation of I + J S0 J', two triangular solves.
    """
    n, r = C * P, B * C
    direct = C * (C + 1) / 2 * B * P * P + n**3 + 2 * C * C * B * P * P
    low_rank = 2 * r * P * n + r * r * P + r**3 / 3 + 2 * r * r * n + 2 * r * n
    return min(direct, low_rank)


def step(kind: str, B: int, D: int, outputs: int, samples: int | None = None) -> Count:
    """One group's part of an aggregation: posterior of the batch, moments, their share of the mean over tasks.

    The products S h of `*_moments` are among the posterior's operations and are not counted twice.
    """
    P = D + 1
    if kind == "regression":
        size, moments = D * D, regression_moments(B, D, outputs)
        flops = posterior(B, D, 1) + 4 * D * outputs * B + moments.flops - 2 * B * D * D
    elif kind == "binary":
        size, moments = outputs * P * P, binary_moments(B, D, outputs)
        flops = outputs * posterior(B, P, 1) + moments.flops - 2 * outputs * B * P * P
    else:
        size, moments = (outputs * P) ** 2, multiclass_moments(B, D, outputs)
        flops = posterior(B, P, outputs) + moments.flops - 2 * outputs * outputs * B * P * P
    if samples is not None and kind != "regression":
        blocks = 1 if kind == "multiclass" else outputs
        n = outputs * P // blocks
        flops = blocks * (n**3 / 3 + samples * n * n) + sampled_moments(B, D, outputs, samples, kind=kind).flops
    tasks = 1 if kind == "multiclass" else outputs
    return Count(FLOAT * (B * D + B * tasks + size + outputs * P + B * D), flops + 7 * B * D * tasks)
