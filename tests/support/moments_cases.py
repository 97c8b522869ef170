"""Random posteriors and batches for the tests of the `moments` stem, and the bound that results must meet."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    features: Tensor
    targets: Tensor
    mean: Tensor
    covariance: Tensor | tuple[Tensor, Tensor]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def spd(g: torch.Generator, *batch: int, size: int) -> Tensor:
    """Covariances with eigenvalues between about 0.01 and 4."""
    a = normal(g, *batch, size, size)
    return a @ a.mT / max(size, 1) + 0.01 * torch.eye(size, dtype=torch.float64)


def regression(
    seed: int,
    batch: int,
    width: int,
    outputs: int = 3,
    scale: float = 1.0,
    per_output: bool = False,
    bias: bool = False,
) -> Case:
    g = generator(seed)
    shape = (outputs,) if per_output else ()
    return Case(
        normal(g, batch, width),
        normal(g, batch, outputs),
        normal(g, outputs, width + bias),
        scale * spd(g, *shape, size=width + bias),
    )


def binary(seed: int, batch: int, width: int, outputs: int = 3, scale: float = 1.0, diagonal: bool = False) -> Case:
    g = generator(seed)
    targets = torch.randint(0, 2, (batch, outputs), generator=g).double()
    mean = normal(g, outputs, width + 1) / (width + 1) ** 0.5
    covariance = scale * spd(g, outputs, size=width + 1)
    return Case(normal(g, batch, width), targets, mean, covariance.diagonal(dim1=1, dim2=2) if diagonal else covariance)


def multiclass(
    seed: int, batch: int, width: int, classes: int = 3, scale: float = 1.0, structure: str = "full"
) -> Case:
    g = generator(seed)
    targets = torch.randint(0, classes, (batch,), generator=g)
    size = width + 1
    mean = normal(g, classes, size) / size**0.5
    covariance: Tensor | tuple[Tensor, Tensor]
    if structure == "full":
        covariance = scale * spd(g, size=classes * size)
    elif structure == "block":
        covariance = scale * spd(g, classes, size=size)
    elif structure == "diag":
        covariance = scale * (0.1 + torch.rand(classes, size, generator=g, dtype=torch.float64))
    else:
        covariance = (spd(g, size=classes), scale * spd(g, size=size))
    return Case(normal(g, batch, width), targets, mean, covariance)


def cast(case: Case, dtype: torch.dtype) -> Case:
    """Floating tensors in another dtype; rounded once, so that the float64 reference sees the same numbers after."""

    def to(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() else t

    covariance = tuple(to(c) for c in case.covariance) if isinstance(case.covariance, tuple) else to(case.covariance)
    return Case(to(case.features), to(case.targets), to(case.mean), covariance)  # type: ignore[arg-type]


def worst(got: Tensor, want: Tensor) -> Tensor:
    """The largest error of each (example, task) row, [B, T]."""
    error = (got.double() - want).abs()
    return error.amax(-1) if error.shape[-1] else error.sum(-1)


def assert_within_bound(got: Tensor, eager: Tensor, want: Tensor, terms: Tensor, eps: float, what: str) -> None:
    """At most twice the eager computation's error in the same precision, plus a few eps of the size of the terms.

    By rows: one element's eager error may be zero by luck, a row's largest one is not.
    """
    assert got.shape == want.shape
    assert got.isfinite().all(), f"{what}: not finite"
    limit = 2 * worst(eager, want) + 8 * eps * (terms.amax(-1) if terms.shape[-1] else terms.sum(-1))
    excess = worst(got, want) - limit
    assert (excess <= 0).all(), f"{what}: error {worst(got, want).max():.2e} over its bound by {excess.max():.2e}"
