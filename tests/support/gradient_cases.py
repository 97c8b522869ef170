"""Task gradients for the tests of Aligned-MTL and of per-task gradients, and the alignment of a matrix of gradients
by its own singular value decomposition: nothing here forms a Gram matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TINY = {torch.float32: 2.0**-149, torch.float64: 0.0, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


def normal(seed: int, *shape: int) -> Tensor:
    """float64, but the numbers are float32's: rounding them further is what a test has to ask for."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


# ---- alignment -------------------------------------------------------------------------------------------------------


class Procrustes(NamedTuple):
    weights: Tensor
    update: Tensor  # [N]
    singular_values: Tensor  # [T]
    rank: int
    transform: Tensor  # [T, T]


def procrustes(
    rows: Tensor, preference: Tensor | None = None, scale: str = "min", rtol: float | None = None
) -> Procrustes:
    """The orthogonal system nearest to the rows of a float64 matrix [T, N], times a singular value of the matrix.

    With rows = U S V' the system is s U_R V_R', over the R singular values whose square is above rtol times the
    largest square: it takes the gradients, from the left, by the T x T matrix s U_R S_R^-1 U_R'.
    """
    tasks = len(rows)
    u, s, vh = torch.linalg.svd(rows.double(), full_matrices=False)
    rtol = tasks * 1.2e-7 if rtol is None else rtol
    rank = int((s.square() > rtol * s[:1].square()).sum())
    p = torch.ones(tasks, dtype=torch.float64) if preference is None else preference.double()
    values = torch.zeros(tasks, dtype=torch.float64)
    values[: len(s)] = s
    if rank == 0:
        return Procrustes(p, p @ rows.double(), values, 0, torch.eye(tasks, dtype=torch.float64))
    kept = s[:rank]
    length = {"min": kept.min(), "median": kept.median(), "rmse": kept.square().mean().sqrt()}[scale]
    transform = length * (u[:, :rank] / kept) @ u[:, :rank].mT
    return Procrustes(transform @ p, length * (p @ u[:, :rank]) @ vh[:rank], values, rank, transform)


def dependent(seed: int, tasks: int, columns: int) -> Tensor:
    """Whole numbers, the last row exactly the first less the second (T = 2: twice the first): the rank is T - 1. They
    are positive, so that sums grow from end to end, and with them the rounding of a careless one."""
    rows = torch.randint(1, 100, (tasks, columns), generator=torch.Generator().manual_seed(seed)).double()
    if tasks == 2:
        rows[1] = 2 * rows[0]
    elif tasks > 2:
        rows[-1] = rows[0] - rows[1]
    return rows


def _twice(rows: Tensor, factor: float) -> Tensor:
    rows[1] = factor * rows[0]
    return rows


def _scaled(rows: Tensor, factors: Sequence[float]) -> Tensor:
    return rows * torch.tensor(factors, dtype=rows.dtype)[:, None]


#: Systems of gradients [T, N] and their rank under the default tolerance.
SYSTEMS: dict[str, tuple[Callable[[], Tensor], int]] = {
    "full rank": (lambda: normal(1, 5, 300), 5),
    "two tasks": (lambda: normal(2, 2, 1000), 2),
    "one task": (lambda: normal(3, 1, 33), 1),
    "one number": (lambda: normal(4, 1, 1), 1),
    "dependent": (lambda: dependent(5, 4, 257), 3),
    "same twice": (lambda: _twice(normal(6, 3, 100), 1.0), 2),
    "opposite": (lambda: _twice(normal(7, 2, 100), -1.0), 1),
    "opposite of three": (lambda: _twice(normal(8, 3, 100), -1.0), 2),
    "nearly opposite": (lambda: torch.cat([n := normal(9, 1, 1000), 0.02 * normal(10, 1, 1000) - n]), 2),
    "dominated": (lambda: _scaled(normal(11, 3, 500), [1e3, 1.0, 1e-2]), 2),
    "dominated by six": (lambda: _scaled(normal(12, 3, 500), [1e3, 1.0, 1.0]), 3),
    "more tasks than columns": (lambda: normal(13, 6, 3), 3),
    "many more": (lambda: normal(14, 20, 7), 7),
    "twenty tasks": (lambda: normal(15, 20, 500), 20),
    "twenty tasks of rank 19": (lambda: dependent(16, 20, 500), 19),
    "absent task": (lambda: _scaled(normal(17, 4, 100), [1.0, 1.0, 0.0, 1.0]), 3),
    "no gradient": (lambda: torch.zeros(3, 50, dtype=torch.float64), 0),
    "orthonormal": (lambda: torch.eye(5, 9, dtype=torch.float64), 5),
    "alike": (lambda: normal(18, 1, 400) + 0.1 * normal(19, 8, 400), 8),
}


def near(got: Tensor, want: Tensor, tolerance: float, least: float = 0.0) -> bool:
    """Every element within `tolerance` of the largest, or of `least` where all are smaller."""
    assert got.shape == want.shape
    size = max(float(want.double().abs().max()), least)
    return bool(((got.cpu().double() - want.cpu().double()).abs() <= tolerance * size).all())


# ---- models ----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A backbone and T heads; smooth, so that finite differences and rounding behave."""

    def __init__(self, tasks: int = 3, seed: int = 0, backbone: nn.Module | None = None, width: int = 5):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.backbone = backbone or nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, width), nn.Tanh())
            self.heads = nn.ModuleList(
                nn.Sequential(nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, 1)) for _ in range(tasks)
            )

    def losses(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Mean squares of rather different sizes."""
        return [10.0**-t * (head(z) - t).square().mean() for t, (head, z) in enumerate(zip(self.heads, views))]

    def from_features(self, features: Tensor) -> list[Tensor]:
        return self.losses([features] * len(self.heads))

    @property
    def shared(self) -> list[nn.Parameter]:
        return list(self.backbone.parameters())


def inputs(batch: int = 16, seed: int = 1) -> Tensor:
    return normal(seed, batch, 6).float()


def jacobian(losses: Iterable[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """[T, *shape] for each tensor, by one autograd.grad a task; the graph is kept."""
    rows = [
        torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True, materialize_grads=True)
        for loss in losses
    ]
    return [torch.stack(parts) for parts in zip(*rows)]


def flat(tensors: Iterable[Tensor], tasks: int | None = None) -> Tensor:
    """One float64 vector, or [T, N] of tensors [T, *shape]."""
    if tasks is None:
        return torch.cat([t.detach().double().reshape(-1) for t in tensors])
    return torch.cat([t.detach().double().reshape(tasks, -1) for t in tensors], 1)


def gradients(tensors: Iterable[Tensor]) -> list[Tensor | None]:
    """Copies of .grad."""
    return [None if t.grad is None else t.grad.clone() for t in tensors]


def at_features(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    """The features with their graph, and the tasks' gradients there, [T, B D]."""
    features = net.backbone(x)
    rows = jacobian(net.from_features(features), [features])[0]
    return features, rows.flatten(1)


def pushed(net: Net, features: Tensor, update: Tensor) -> list[Tensor]:
    """What arrives at the backbone's parameters of a gradient at the features."""
    return list(torch.autograd.grad(features, net.shared, update.view_as(features).to(features.dtype)))


def close(got: list[Tensor | None], want: list[Tensor | None], tolerance: float = 1e-5) -> None:
    for a, b in zip(got, want, strict=True):
        if b is None:
            assert a is None
            continue
        assert a is not None
        assert near(a, b, tolerance, 1e-7)


def step(net: Net, aligned: Callable[[Tensor], Sequence[Tensor]], x: Tensor) -> None:
    sum(net.losses(aligned(net.backbone(x)))).backward()  # type: ignore[attr-defined]
