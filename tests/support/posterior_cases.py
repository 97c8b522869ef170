"""Data for last-layer posteriors, and their formulas with every matrix written out that the package avoids forming."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mtlgrad.posterior import Posterior, binary_posterior, multiclass_posterior, regression_posterior

GAMMA = 0.3
KINDS = ("regression", "binary", "multiclass")
STRUCTURES = {"regression": ("full",), "binary": ("full", "diag"), "multiclass": ("full", "block", "kron", "diag")}
CASES = [(kind, structure) for kind in KINDS for structure in STRUCTURES[kind]]


@dataclass
class Data:
    """One head's batch: features [B, D], targets, and the weights [R, W] at which a classifier stands."""

    kind: str
    features: Tensor
    targets: Tensor
    weight: Tensor

    def rows(self, which: Any) -> Data:
        return replace(self, features=self.features[which], targets=self.targets[which])

    def to(self, dtype: torch.dtype) -> Data:
        targets = self.targets if self.kind == "multiclass" else self.targets.to(dtype)
        return replace(self, features=self.features.to(dtype), targets=targets, weight=self.weight.to(dtype))

    @property
    def hidden(self) -> Tensor:
        return self.features if self.kind == "regression" else functional.pad(self.features, (0, 1), value=1.0)

    @property
    def labelled(self) -> Tensor:
        return self.targets != -100 if self.kind == "multiclass" else ~self.targets.isnan()

    def loss(self, weight: Tensor) -> Tensor:
        """Summed over the batch, what has no label left out; regression: half the squared error (unit noise)."""
        logits, there = self.hidden @ weight.T, self.labelled
        if self.kind == "regression":
            return 0.5 * (logits[there] - self.targets[there]).square().sum()
        if self.kind == "binary":
            both = logits[there], self.targets[there]
            return functional.binary_cross_entropy_with_logits(*both, reduction="sum")
        return functional.cross_entropy(logits[there], self.targets[there], reduction="sum")

    def gradient(self, at: Tensor) -> Tensor:
        return torch.func.grad(self.loss)(at)

    def hessian(self, at: Tensor) -> Tensor:
        """[R*W, R*W]; these models are linear in their weights, so it is the generalised Gauss-Newton matrix."""
        return torch.autograd.functional.hessian(self.loss, at).reshape(at.numel(), at.numel())


def make(kind: str, examples: int = 30, width: int = 4, outputs: int = 3, seed: int = 0, missing: float = 0.0) -> Data:
    """In float64; ``missing`` is the share of labels that are left out, one by one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    features = normal(examples, width)
    weight = 0.7 * normal(outputs, width + (kind != "regression"))
    if kind == "multiclass":
        targets = torch.randint(outputs, (examples,), generator=generator)
        targets[torch.rand(examples, generator=generator) < missing] = -100
    else:
        targets = normal(examples, outputs)
        targets = targets if kind == "regression" else (targets > 0).double()
        targets[torch.rand(examples, outputs, generator=generator) < missing] = torch.nan
    return Data(kind, features, targets, weight)


def posterior(data: Data, structure: str = "full", **options: Any) -> Posterior:
    options = options if "prior" in options else {"gamma": GAMMA, **options}
    if data.kind == "regression":
        return regression_posterior(data.features, data.targets, **options)
    function = binary_posterior if data.kind == "binary" else multiclass_posterior
    return function(data.features, data.targets, data.weight, structure=structure, **options)


def dense_of(law: Posterior, matrix: Any) -> Tensor:
    """A posterior's precision or covariance as [R*W, R*W], row-major, whatever its structure."""
    rows, width = law.mean.shape
    if isinstance(matrix, tuple):
        return torch.kron(*(factor.contiguous() for factor in matrix))
    if law.structure == "diag":
        return matrix.flatten().diag()
    if matrix.dim() == 3:
        return torch.block_diag(*matrix)
    return matrix if matrix.shape[0] == rows * width else torch.block_diag(*[matrix] * rows)


def structured(matrix: Tensor, structure: str, rows: int) -> Tensor:
    """What a structure keeps of a dense [R*W, R*W] matrix: its diagonal, or its blocks on the diagonal."""
    if structure == "diag":
        return matrix.diagonal().diag()
    width = matrix.shape[0] // rows
    keep = torch.eye(rows, dtype=matrix.dtype) if structure == "block" else torch.ones(rows, rows, dtype=matrix.dtype)
    return matrix * keep.repeat_interleave(width, 0).repeat_interleave(width, 1)


def kron_terms(data: Data, at: Tensor) -> tuple[Tensor, Tensor, int]:
    """(sum of Q, sum of h~ h~', number of labels), example by example."""
    curvature = torch.zeros(len(at), len(at), dtype=at.dtype)
    gram = torch.zeros(at.shape[1], at.shape[1], dtype=at.dtype)
    there = data.labelled
    for h in data.hidden[there]:
        p = torch.softmax(at @ h, 0)
        curvature += torch.diag(p) - torch.outer(p, p)
        gram += torch.outer(h, h)
    return curvature, gram, int(there.sum())


def kron_precision(curvature: Tensor, gram: Tensor, count: int, gamma: float = GAMMA) -> tuple[Tensor, Tensor]:
    """A + a I and G + b I: a b = 1 / gamma, a : b as the mean diagonals of A (a mean over examples) and G (a sum)."""
    a = curvature / count
    ratio = a.diagonal().mean() / gram.diagonal().mean()
    share = (ratio / gamma).sqrt()
    eye_c, eye_p = torch.eye(len(a), dtype=a.dtype), torch.eye(len(gram), dtype=a.dtype)
    return a + share * eye_c, gram + eye_p / (gamma * share)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Within ``tolerance`` of the largest expected entry. The default leaves float64 six digits for the matrices'
    condition numbers, which are below 1e4 here."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert found.dtype == expected.dtype, (found.dtype, expected.dtype)
    error = (found - expected).abs().max() if found.numel() else torch.zeros(())
    assert error <= tolerance * expected.abs().max().clamp(min=1e-300), f"error {error:.3g}"
