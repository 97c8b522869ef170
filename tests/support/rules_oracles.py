"""Solvers of what rules over a Gram matrix minimise, to all the digits of float64: from the gradients themselves, one
column a task, where the package knows only their Gram matrix; residuals of the conditions that a minimiser meets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from hypothesis import strategies as st
from mpmath import mp
from numpy.typing import ArrayLike
from scipy.optimize import brentq, nnls

SIZES = (2, 3, 8, 20, 40)
_EXACT = np.vectorize(mp.mpf, otypes=[object])
_LOG = np.vectorize(mp.log, otypes=[object])


def systems(count: int, seed: int) -> Iterator[np.ndarray]:
    """Yield gradients [N, T] of many ranks: unrelated, of a common direction or in conflict; some of unequal norms."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        tasks = int(rng.choice(SIZES))
        rank = int(rng.integers(1, tasks + 1)) if rng.random() < 0.7 else tasks
        mixing, kind = rng.standard_normal((rank, tasks)), rng.integers(4)
        if kind == 1:  # few tasks conflict
            mixing[0] = np.abs(mixing[0]) + rng.choice([1.0, 3.0])
        elif kind == 2:  # nearly all of the mean cancels
            mixing -= rng.choice([0.9, 0.999]) * mixing.mean(1, keepdims=True)
        elif kind == 3:  # two camps
            mixing[0] += rng.choice([-3.0, 3.0], tasks)
        if rng.random() < 0.5:
            mixing *= 10.0 ** rng.uniform(-1.5, 1.5, tasks)
        yield rng.standard_normal((tasks + int(rng.integers(1, 12)), rank)) @ mixing


# -- solvers ---------------------------------------------------------------------------------------------------------


def dual_cone(G: ArrayLike, u: ArrayLike) -> np.ndarray:
    """Return the v >= u of least ||G v||; only G v is unique where columns of G depend on each other."""
    G, u = np.asarray(G, np.float64), np.asarray(u, np.float64)
    return (u + _nonnegative(G, -(G.astype(np.longdouble) @ u))).astype(np.float64)


def min_norm(G: ArrayLike) -> np.ndarray:
    """Return the w >= 0, of sum one, of least ||G w||; unique where the columns of G are affinely independent."""
    G = np.asarray(G, np.longdouble)
    squares = np.square(G).sum(0)
    if not squares.all():
        return np.eye(len(squares))[np.argmin(squares)]
    root = np.sqrt(np.float64(squares.min()))
    ones = np.full((1, G.shape[1]), root, np.longdouble)
    x = _nonnegative(np.vstack([G, ones]), np.append(np.zeros(len(G), np.longdouble), root))
    return (x / x.sum()).astype(np.float64)


def cagrad(G: ArrayLike, c: float) -> np.ndarray:
    """Return CAGrad's weights u + z; of the w that minimises F, z is c |g0| / ||G w|| w, and zero where G w is.

    F is the least, over s, of g0'G w + c |g0| (||G w||^2 / s + s) / 2; its w at a fixed s is the shortest convex
    combination of the gradients moved by s / (c |g0|) g0, and ||G w|| / s falls with s to one where F is least.
    """
    G = np.asarray(G, np.float64)
    tasks = G.shape[1]
    u = np.full(tasks, 1 / tasks)
    norms, mean = np.linalg.norm(G, axis=0), G @ u
    radius = c * np.linalg.norm(mean)
    if np.linalg.norm(mean) <= 1e-14 * norms.mean():
        return u

    def at(s: float) -> tuple[np.ndarray, float]:
        w = min_norm(G.astype(np.longdouble) + (s / radius * mean.astype(np.longdouble))[:, None])
        return w, float(np.linalg.norm(G @ w))

    least = min_norm(G)
    low, high = float(np.linalg.norm(G @ least)), float(norms.max())
    if low <= 1e-12 * (norms @ least):  # zero is a convex combination: is it the best?
        if np.linalg.norm(G @ (dual_cone(G, u) - u)) <= radius * (1 + 1e-12):
            return u
        low = high
    low *= 0.999
    while at(low)[1] < low and low > 1e-60 * high:
        low /= 8
    low, high = np.log(low), np.log(high * 1.001)
    root = np.exp(brentq(lambda s: at(np.exp(s))[1] / np.exp(s) - 1, low, high, xtol=1e-14, rtol=1e-14))
    w, length = at(root)
    return u + _on_face(G, radius / length * w, radius)


def fair(M: ArrayLike, alpha: float) -> np.ndarray:
    """Return the a > 0 with M a = a^(-1/alpha), by Newton's method in 50 digits; ValueError where none is found.

    It minimises a'M a / 2 - sum a^e / e, e = 1 - 1/alpha, or the logarithm in the power's place; there is none where
    some a >= 0 has M a = 0, as of opposite gradients.
    """
    with mp.workdps(50):
        exact, power = _EXACT(np.asarray(M, np.float64)), 1 / mp.mpf(alpha)
        diagonal = np.diag(exact)
        norms = diagonal**0.5
        cosines = (exact / norms / norms[:, None]).astype(np.float64)

        def value(a: np.ndarray) -> mp.mpf:
            return a @ (exact @ a) / 2 - (_LOG(a) if alpha == 1 else a ** (1 - power) / (1 - power)).sum()

        a = diagonal ** (-1 / (1 + power))
        now = value(a)
        for _ in range(200):
            want = a**-power
            gradient = exact @ a - want
            curved = (power * want / a / diagonal).astype(np.float64)
            left = (gradient / norms / (norms * a).max()).astype(np.float64)
            step = -_EXACT(np.linalg.solve(cosines + np.diag(curved), left)) * (norms * a).max() / norms
            size = np.abs(step / a).max()
            if size < 1e-30:
                return a.astype(np.float64)
            if a @ (exact @ a) < 1e-15 * (a @ (np.abs(exact) @ a)):
                break
            length = min(mp.mpf(1), 0.9 / max(-step / a)) if (step < 0).any() else mp.mpf(1)
            slope = gradient @ step
            shortest = length / 1e4
            while size > 1e-9 and length > shortest and value(a + length * step) > now + length * slope / 4:
                length /= 2
            if length <= shortest:
                break
            a = a + length * step
            now = value(a)
    raise ValueError("no a > 0 found with M a = a^(-1/alpha)")


def imtlg(G: ArrayLike, rtol: float = 1e-10) -> np.ndarray:
    """Return IMTL-G's weights; zero for a gradient that is zero. ValueError where they have no sum to divide by.

    Singular values of the unit gradients count as zero up to rtol times the largest: rtol^2 for those of the cosines.
    """
    G = np.asarray(G, np.longdouble)
    norms = np.sqrt(np.square(G).sum(0))
    kept = norms > 0
    units = G[:, kept] / norms[kept]
    _, values, rows = np.linalg.svd(units.astype(np.float64), full_matrices=False)
    rank = int((values > rtol * values.max(initial=0)).sum())
    values, rows = values[:rank], rows[:rank]
    y = rows.T @ (rows.sum(1) / values**2)
    if rank == units.shape[1]:
        y = _normal(units, np.zeros(len(units), np.longdouble), 1, y)
    weights = np.zeros(G.shape[1], np.longdouble)
    weights[kept] = y / norms[kept]
    if abs(weights.sum()) <= 1e-12 * np.abs(weights).sum():
        raise ValueError("the weights sum to zero")
    return (weights / weights.sum()).astype(np.float64)


def pcgrad(M: ArrayLike, order: Sequence[Sequence[int]]) -> np.ndarray:
    """Return PCGrad's weights, in 50 digits: task i is freed of its conflicts with the tasks order[i], one by one."""
    with mp.workdps(50):
        exact = _EXACT(np.asarray(M, np.float64))
        total = 0 * exact[0]
        for i, others in enumerate(order):
            w = 0 * exact[0]
            w[i] = mp.mpf(1)
            for j in others:
                if j != i and (along := exact[j] @ w) < 0:
                    w[j] -= along / exact[j, j]
            total = total + w
        return total.astype(np.float64)


def _nonnegative(A: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the x >= 0 of least ||A x - b||: SciPy's, for columns of about unit norm, then refined where positive."""
    A, b = A.astype(np.longdouble), b.astype(np.longdouble)
    norms = np.sqrt(np.square(A).sum(0))
    scale = np.exp2(np.round(np.log2(np.where(norms > 0, norms, 1))))
    size = np.abs(b).max() or np.longdouble(1)
    A, b = A / scale, b / size
    x = nnls(A.astype(np.float64), b.astype(np.float64), maxiter=100 * A.shape[1])[0].astype(np.longdouble)
    face = x > 0
    if face.any():
        better = _normal(A[:, face], b, 0, x[face])
        if (better > 0).all():
            x[face] = better
    return x * size / scale


def _normal(A: np.ndarray, b: np.ndarray, c: float, x: np.ndarray) -> np.ndarray:
    """Return x refined to A'A x = A'b + c in long doubles, or solved in 50 digits if ill-conditioned; x if singular."""
    triangle = np.linalg.qr(A.astype(np.float64), mode="r")
    if len(triangle) < len(x) or np.linalg.cond(triangle) > 1e6:
        with mp.workdps(50):
            A, b = (_EXACT(part := y.astype(np.float64)) + _EXACT((y - part).astype(np.float64)) for y in (A, b))
            try:
                solved = mp.lu_solve(mp.matrix((A.T @ A).tolist()), mp.matrix((A.T @ b + c).tolist()))
            except ZeroDivisionError:
                return x
            return np.array([float(y) for y in solved])
    left = A.T @ (b - A @ x) + c
    for _ in range(20):
        new = x + np.linalg.solve(triangle, np.linalg.solve(triangle.T, left.astype(np.float64)))
        after = A.T @ (b - A @ new) + c
        if not np.abs(after).max() < np.abs(left).max():
            break
        x, left = new, after
    return x


def _on_face(G: np.ndarray, z: np.ndarray, radius: float) -> np.ndarray:
    """Return z with M_S (u + z) = level and ||G z|| = radius on the face S where z > 0, by Newton's method."""
    face = z > 0
    part = G[:, face].astype(np.longdouble)
    norms = np.sqrt(np.square(part).sum(0))
    units, unit = part / norms, norms.min() / norms
    mean = G.astype(np.longdouble).mean(1) / radius

    def residual(y: np.ndarray) -> np.ndarray:  # y: all of z, in units in which it is about one, then the level
        moved = units @ y[:-1]
        return np.append(units.T @ (mean + moved) - y[-1] * unit, (moved @ moved - 1) / 2)

    y = np.append(z[face] * norms / radius, 0)
    left = residual(y)
    for _ in range(30):
        pull = units.T @ (units @ y[:-1])
        slopes = np.block([[units.T @ units, -unit[:, None]], [pull[None], np.zeros((1, 1))]]).astype(np.float64)
        try:
            new = y - np.linalg.solve(slopes, left.astype(np.float64))
        except np.linalg.LinAlgError:
            break
        after = residual(new)
        if not (np.abs(after).max() < np.abs(left).max() and (new[:-1] > 0).all()):
            break
        y, left = new, after
    z = z.copy()
    z[face] = y[:-1] * radius / norms
    return z


# -- conditions ------------------------------------------------------------------------------------------------------


def kkt_dual_cone(M: ArrayLike, u: ArrayLike, v: ArrayLike, strict: bool = True) -> float:
    """Return how far v is from v >= u, M v >= 0 and, task by task, one of the two being equal; 0: met, 1: not at all.

    v - u counts relative to |v| + |u|, and M v to |M| |v|, so that a v above u, however little, needs (M v)_i = 0. Not
    `strict`: to norms norms' |v|, of which M's own roundings are a part, where entries of M are nearly zero.
    """
    M, u, v = (np.asarray(x, np.longdouble) for x in (M, u, v))
    slack, force = _ratio(v - u, np.abs(v) + np.abs(u)), _ratio(M @ v, _absolute(M, strict) @ np.abs(v))
    return float(np.abs(np.minimum(slack, force)).max())


def kkt_simplex(M: ArrayLike, w: ArrayLike, strict: bool = True) -> float:
    """Return how far w is from w >= 0, sum w = 1 and M w >= w'M w with equality where w > 0; 0: met, 1: not at all.

    M w - w'M w counts relative to |M| w + w'|M| w (`strict` as above); a negative weight, however small, is not at all.
    With a zero gradient all that counts is w'M w, relative to the shortest other one.
    """
    M, w = np.asarray(M, np.longdouble), np.asarray(w, np.longdouble)
    force, size, squares = M @ w, _absolute(M, strict) @ np.abs(w), np.diag(M)
    if squares.all():
        excess = _ratio(force - w @ force, size + np.abs(w) @ size)
    else:
        excess = np.full_like(w, w @ force / squares[squares > 0].min(initial=np.inf))
    return float(max(np.abs(np.minimum(np.sign(w), excess)).max(), abs(w.sum() - 1)))


def kkt_cagrad(M: ArrayLike, c: float, weights: ArrayLike, strict: bool = True) -> float:
    """Return how far z = weights - u is from z >= 0, z'M z = c^2 u'M u and M (u + z) least where z > 0; as above.

    For z = 0: how far a w is from w'M w = 0, and the dual cone from the ball around u of which the update is taken.
    Where G w is zero but for rounding, a z that is huge passes whatever it is: such systems need another look.
    """
    M, weights = np.asarray(M, np.longdouble), np.asarray(weights, np.longdouble)
    u, terms = np.full(len(M), 1 / len(M)).astype(np.longdouble), _absolute(M, strict)
    z, ball = weights - u, c**2 * (u @ M @ u)
    if np.abs(z).max() <= 1e-15 * u[0]:
        if ball <= 1e-15 * (u @ terms @ u):
            return 0.0
        root = _root(M)
        norms = np.sqrt(np.diag(M))
        w, x = _ratio(min_norm(_ratio(root, norms)).astype(np.longdouble), norms), dual_cone(root, u) - u
        outside = (x @ M @ x - ball) / (np.abs(x) @ terms @ np.abs(x) + ball)
        apart = (w @ M @ w) / (w @ terms @ w) if norms.all() else 0.0
        return float(max(outside, apart, 0))
    if z.sum() <= 0:
        return 1.0
    force, size = M @ weights, terms @ np.abs(weights)
    level, levels = z @ force / z.sum(), np.abs(z) @ size / np.abs(z).sum()
    slack, excess = _ratio(z, np.abs(weights) + u), _ratio(force - level, size + levels)
    norm = abs(z @ M @ z - ball) / (np.abs(z) @ size + c**2 * (u @ terms @ u))
    return float(max(np.abs(np.minimum(slack, excess)).max(), norm))


def kkt_fair(M: ArrayLike, alpha: float, a: ArrayLike) -> float:
    """Return how far a is from a_i (M a)_i = a_i^(1 - 1/alpha), relative to the absolute terms."""
    M, a = np.asarray(M, np.longdouble), np.asarray(a, np.longdouble)
    if not (a > 0).all():
        return 1.0
    want = a ** (-1 / np.longdouble(alpha))
    return float((np.abs(M @ a - want) / (np.abs(M) @ a + want)).max())


def _absolute(M: np.ndarray, strict: bool) -> np.ndarray:
    """Return what roundings of M v count against: |M|, or the products of norms that bound it."""
    norms = np.sqrt(np.diag(M))
    return np.abs(M) if strict else np.multiply.outer(norms, norms)


def _ratio(x: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return x / size, and zero where size is."""
    return np.divide(x, size, out=np.zeros(x.shape, np.longdouble), where=size > 0)


def _root(M: np.ndarray) -> np.ndarray:
    """Return a G with G'G = M: eigenvectors of the cosines, with the norms put back."""
    norms = np.sqrt(np.diag(M))
    cosines = _ratio(M, np.multiply.outer(norms, norms))
    values, vectors = np.linalg.eigh(cosines.astype(np.float64))
    return np.sqrt(np.maximum(values, 0))[:, None] * vectors.T * norms


# -- strategies ------------------------------------------------------------------------------------------------------


@st.composite
def gradients(draw: st.DrawFn) -> np.ndarray:
    """Draw [N, T] of few values and low ranks; columns may be zero, equal, opposite or nearly so, at any scale."""
    tasks = draw(st.integers(1, 8) | st.sampled_from([12, 20]))
    rows = draw(st.integers(1, tasks + 2))
    if tasks > 8 or draw(st.booleans()):
        rng = np.random.default_rng(draw(st.integers(0, 9999)))
        G = rng.integers(-3, 4, (rows, tasks)) + draw(st.sampled_from([0.0, 0.3])) * rng.standard_normal((rows, tasks))
    else:
        entry = st.integers(-3, 3) | st.floats(-10, 10).map(lambda x: round(x, 3))
        G = np.array(draw(st.lists(entry, min_size=rows * tasks, max_size=rows * tasks)), np.float64)
        G = G.reshape(rows, tasks)
    one = st.integers(0, tasks - 1)
    for kind, i, j in draw(st.lists(st.tuples(st.integers(0, 5), one, one), max_size=tasks)):
        sign = -1.0 if kind % 2 else 1.0
        if kind < 2:  # equal or opposite
            G[:, i] = sign * G[:, j]
        elif kind < 4:  # nearly
            G[:, i] = sign * G[:, j] * (1 + 1e-8 * np.resize([1, -1, 2], rows))
        else:  # zero, or what cancels all others
            G[:, i] = 0
            if kind == 5:
                G[:, i] = -G.sum(1)
    power = st.integers(-24, 18).map(lambda k: 10.0**k)
    return G * draw(st.just(1.0) | power | st.lists(power, min_size=tasks, max_size=tasks).map(np.array))


def grams() -> st.SearchStrategy[np.ndarray]:
    """Return the strategy of G'G in float64 for G of :func:`gradients`: rounded, so not always quite semidefinite."""
    return gradients().map(lambda G: G.T @ G)
