"""What each kind of head contributes: its terms of a posterior, its checks, and the moments of its gradient."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..ops import moments
from ..ops.checks import are_between, check_class_range, check_finite, check_tensors, refuse, shape_of
from ..ops.moments import BatchPosterior, Output
from ..reference.moments import IGNORE


class Terms(NamedTuple):
    """Of one batch, at given logits; rows without a label are zero throughout."""

    slopes: Tensor  # [B, R], derivatives of the loss in the logits
    logits: Tensor  # [B, R], where the quadratic is expanded: regression, exact anywhere, at the targets
    residual: Tensor | None  # [B, R], derivatives there of the negative log likelihood; None: zero
    curvature: Tensor | None  # [B, R], diagonal of Q; [B, 1]: one for all rows; None: one everywhere
    labels: Tensor | int  # [B], how many tasks have one; a number: all of them
    probability: Tensor | None = None  # [B, C], multiclass only: Q = diag(p) - p p'

    def to(self, like: Tensor) -> Terms:
        moved = (
            x if not isinstance(x, Tensor) else x.to(like) if x.is_floating_point() else x.to(like.device) for x in self
        )
        return Terms(*moved)  # type: ignore[arg-type]

    @staticmethod
    def joined(parts: Sequence[Terms]) -> Terms:
        """Return those of several batches of a head as those of one."""
        first, q = parts[0], [terms.curvature for terms in parts]
        rows = max([1 if some is None else some.shape[1] for some in q])
        filled = [p.slopes.new_ones(len(p.slopes), 1) if some is None else some for p, some in zip(parts, q)]
        labels = [p.slopes.new_ones(len(p.slopes)) * p.labels for p in parts]
        return Terms(
            torch.cat([terms.slopes for terms in parts]),
            torch.cat([terms.logits for terms in parts]),
            None if first.residual is None else torch.cat([p.residual for p in parts if p.residual is not None]),
            None if all(some is None for some in q) else torch.cat([some.expand(-1, rows) for some in filled]),
            torch.cat(labels),
            None
            if first.probability is None
            else torch.cat([p.probability for p in parts if p.probability is not None]),
        )

    def curved(self, logits: Tensor) -> Tensor:
        """Q_b logits_b for every example, [B, R], with the diagonal of Q alone."""
        return logits if self.curvature is None else logits * self.curvature

    def jointly_curved(self, logits: Tensor) -> Tensor:
        """Q_b logits_b with all of Q; multiclass only."""
        p = self.probability
        assert p is not None
        return p * logits - p * (p * logits).sum(1, keepdim=True)

    def innovation(self, logits: Tensor, jointly: bool = False) -> Tensor:
        """Return minus the derivatives of the quadratic at other logits, [B, R]."""
        curved = self.jointly_curved if jointly else self.curved
        found = curved(self.logits - logits)
        return found if self.residual is None else found - self.residual

    def diagonal(self, hidden: Tensor) -> Tensor:
        """Return the diagonal of sum_b J_b' Q_b J_b, [R, W]; classification only."""
        assert self.curvature is not None
        return self.curvature.T @ hidden**2


@dataclass(frozen=True)
class Likelihood(ABC):
    """Common to the three kinds. ``bias``: whether the weights [R, W] have one, last: W is P = D + 1 then, else D."""

    bias: bool = True
    name: ClassVar[str]
    #: Whether the outputs are one task, whose targets are classes [B]; else each is one, with a column of [B, O].
    is_joint: ClassVar[bool] = False
    #: Whether the posterior does not depend on where it is expanded.
    is_exact: ClassVar[bool] = False
    #: How much a derivative of the loss changes with its logit, at most.
    steepness: ClassVar[float]
    letter: ClassVar[str] = "O"  # of the number of rows, in errors
    targets_like: ClassVar[str] = "B O!"

    def __str__(self) -> str:
        return self.name

    def width(self, features: int) -> int:
        return features + self.bias

    def augment(self, features: Tensor) -> Tensor:
        """Return the features with a one appended for the bias, [B, W]."""
        return functional.pad(features, (0, 1), value=1.0) if self.bias else features

    def check(self, op: str, features: Tensor, targets: Tensor, *weights: Any) -> Tensor:
        """Check shapes, dtypes, devices and, on the CPU, values. Return the targets with their column of outputs.
        ``weights`` are those of :meth:`check_targets`."""
        targets = self.check_targets(op, features, targets, *weights)
        if features.device.type == "cpu":
            check_finite(op, features=features)
        return targets

    def check_targets(
        self,
        op: str,
        features: Tensor,
        targets: Tensor,
        weight_shape: Sequence[int] | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """:meth:`check` but for the features' values. ``weight_shape`` is the posterior's [R, W] where that is known,
        ``weight`` where to expand."""
        needed: dict[str, object] = {"features": features, "targets": targets}
        if weight is not None or (weight_shape is None and not self.is_exact):
            needed["weight"] = weight
        for name, tensor in needed.items():
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{op}: {name}: expected a tensor, found {type(tensor).__name__}")
        if not self.is_joint and not targets.is_floating_point():
            floating = "float32, float64, float16 or bfloat16"
            refuse(f"{op}: targets: expected {floating}, found {targets.dtype}; use targets.float()")
        if self.is_joint and targets.dim() == 2 and targets.is_floating_point():
            refuse(
                f"{op}: targets: expected class indices [B] int64, found {targets.dtype} {shape_of(targets)}: of soft "
                "labels there is no posterior here; use targets.argmax(1), or leave the head out"
            )
        sizes = {}
        if weight_shape is not None:
            sizes = {self.letter: weight_shape[0], "D": weight_shape[1] - self.bias}
        if not self.is_joint and targets.dim() == 1:
            targets = targets[:, None]
        weights = {} if weight is None else {"weight": (weight, f"{self.letter}! P")}
        check_tensors(op, sizes, features=(features, "B! D!"), **weights, targets=(targets, self.targets_like))
        if features.device.type == "cpu":
            if weight is not None:
                check_finite(op, weight=weight)
            self.check_values(op, targets, sizes[self.letter])
        return targets

    @abstractmethod
    def check_values(self, op: str, targets: Tensor, outputs: int) -> None:
        """Read values: host tensors only."""

    @abstractmethod
    def terms(self, logits: Tensor, targets: Tensor) -> Terms:
        """Return those at the head's outputs, [B, R]."""

    @abstractmethod
    def at(self, features: Tensor, mean: Tensor, covariance: Any) -> Iterator[tuple[int, int, BatchPosterior]]:
        """Yield the posterior at the examples, rows [first, last) at a time."""

    @abstractmethod
    def moments(self, features: Tensor, targets: Tensor, at: BatchPosterior | Tensor, out: Output) -> None:
        """Have the moments of the gradient left in ``out``, for some rows of a posterior, or of weight samples
        [S, R, W], and these rows' targets."""


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Regression: the squared error; the terms are those of half of it, the negative log likelihood of unit noise."""

    bias: bool = False
    name = "regression"
    is_exact = True
    steepness = 2.0

    def check_values(self, op: str, targets: Tensor, outputs: int) -> None:
        if not math.isfinite(targets.sum()):  # the sum is quick, and finite if all are
            _refuse_outside(op, targets, targets.isinf(), "finite values")

    def terms(self, logits: Tensor, targets: Tensor) -> Terms:
        targets = _columns(targets, logits)
        slopes = 2.0 * (logits - targets)
        if _all_there(targets):
            return Terms(slopes, targets, None, None, targets.shape[1])
        missing = targets.isnan()
        slopes, targets = slopes.masked_fill(missing, 0.0), targets.masked_fill(missing, 0.0)
        return Terms(slopes, targets, None, _shared_curvature(missing, logits), (~missing).sum(1))

    def at(self, features: Tensor, mean: Tensor, covariance: Any) -> Iterator[tuple[int, int, BatchPosterior]]:
        if covariance.dim() == 2:
            yield 0, len(mean), moments.regression_posterior(features, mean, covariance)
            return
        for o in range(len(mean)):
            yield o, o + 1, moments.regression_posterior(features, mean[o : o + 1], covariance[o])

    def moments(self, features: Tensor, targets: Tensor, at: BatchPosterior | Tensor, out: Output) -> None:
        assert isinstance(at, BatchPosterior), "a closed form: never sampled"
        moments.run_regression(features, targets.to(features), at, out)


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Binary cross entropy with logits."""

    name = "binary"
    steepness = 0.25

    def check_values(self, op: str, targets: Tensor, outputs: int) -> None:
        if not are_between(targets, 0, 1):
            _refuse_outside(op, targets, (targets < 0) | (targets > 1), "values from 0 to 1")

    def terms(self, logits: Tensor, targets: Tensor) -> Terms:
        targets, p = _columns(targets, logits), torch.sigmoid(logits)
        residual, curvature = p - targets, p * (1 - p)
        if _all_there(targets):
            return Terms(residual, logits, residual, curvature, targets.shape[1])
        missing = targets.isnan()
        residual, curvature = (x.masked_fill(missing, 0.0) for x in (residual, curvature))
        return Terms(residual, logits, residual, curvature, (~missing).sum(1))

    def at(self, features: Tensor, mean: Tensor, covariance: Any) -> Iterator[tuple[int, int, BatchPosterior]]:
        for o in range(len(mean)):
            yield o, o + 1, moments.binary_posterior(features, mean[o : o + 1], covariance[o : o + 1])

    def moments(self, features: Tensor, targets: Tensor, at: BatchPosterior | Tensor, out: Output) -> None:
        targets = targets.to(features)
        if isinstance(at, Tensor):
            moments.run_sampled(features, targets, at, out, self.name)
        else:
            moments.run_binary(features, targets, at, out)


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Softmax cross entropy."""

    name = "multiclass"
    steepness = 0.5
    is_joint = True
    letter = "C"
    targets_like = "int64 B"

    def check_values(self, op: str, targets: Tensor, outputs: int) -> None:
        check_class_range(op, targets, outputs, IGNORE)

    def terms(self, logits: Tensor, targets: Tensor) -> Terms:
        p = torch.softmax(logits, 1)
        if p.device.type == "cpu" and targets.min() >= 0:
            residual = p.scatter(1, targets[:, None], -1.0, reduce="add")
            return Terms(residual, logits, residual, p * (1 - p), 1, p)
        labelled = (targets != IGNORE).to(logits)
        p = p * labelled[:, None]
        residual = p.scatter_add(1, targets.clamp(min=0)[:, None], -labelled[:, None])
        return Terms(residual, logits, residual, p * (1 - p), labelled, p)

    def at(self, features: Tensor, mean: Tensor, covariance: Any) -> Iterator[tuple[int, int, BatchPosterior]]:
        classes, covariance = covariance if isinstance(covariance, tuple) else (None, covariance)
        yield 0, len(mean), moments.multiclass_posterior(features, mean, covariance, classes)

    def moments(self, features: Tensor, targets: Tensor, at: BatchPosterior | Tensor, out: Output) -> None:
        if isinstance(at, Tensor):
            moments.run_sampled(features, targets, at, out, self.name)
        else:
            moments.run_multiclass(features, targets, at, out)


LIKELIHOODS: dict[str, type[Likelihood]] = {kind.name: kind for kind in (Gaussian, Bernoulli, Categorical)}


def _refuse_outside(op: str, targets: Tensor, outside: Tensor, expected: str) -> None:
    if bool(outside.any()):
        at = torch.nonzero(outside)[0].tolist()
        found = targets[tuple(at)].item()
        raise ValueError(f"{op}: targets: expected {expected}, or NaN for no label, found {found:g} at {at}")


def _columns(targets: Tensor, like: Tensor) -> Tensor:
    return (targets[:, None] if targets.dim() == 1 else targets).to(like)


def _all_there(targets: Tensor) -> bool:
    """Whether no label is missing, where that can be told without waiting for a device."""
    return targets.device.type == "cpu" and not math.isnan(targets.sum())


def _shared_curvature(missing: Tensor, like: Tensor) -> Tensor | None:
    """Regression: [B, O], or [B, 1] where every example has all labels or none, or None where nothing is missing: the
    outputs then share one precision. Reads the device, except while a CUDA graph is captured; an example whose labels
    are missing in part is then NaN for all, since the number of matrices cannot depend on the data."""
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        some, every = missing.any(1, keepdim=True), missing.all(1, keepdim=True)
        return torch.where(some & ~every, torch.nan, (~every).to(like))
    if not bool(missing.any()):
        return None
    if bool((missing == missing[:, :1]).all()):
        return (~missing[:, :1]).to(like)
    return (~missing).to(like)
