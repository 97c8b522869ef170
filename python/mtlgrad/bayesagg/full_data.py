"""What one head has seen in an epoch, and the full-data posteriors of what all heads on all ranks have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..posterior.posteriors import Posterior, empty_posterior, posterior_from_state, sum_over_ranks
from ..world.alike import check_same
from ..world.ranks import World
from .heads import Head, Regression

STATISTICS = ("stored", "streaming")
ROWS = 8192  # of stored features in float64 at a time
SMALLEST_NOISE = 1e-6  #: relative to the targets' mean square: a perfect fit is no reason to follow one task alone


class FullData:
    """``stored``: the features and targets themselves, as published; ``streaming``: sums, in a posterior that is
    updated batch by batch and expanded at the weights that each batch met. Both end in float64."""

    def __init__(self, head: Head, structure: str, statistics: str):
        self.head = head
        self.structure = structure
        self.statistics = statistics
        self.features: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.running: Posterior | None = None
        self.count = 0
        #: Where the noise is estimated: sum of the targets' squares and number of labels, float64 [2, O].
        self.squares: Tensor | None = None

    def clear(self) -> None:
        self.features, self.targets, self.running, self.count, self.squares = [], [], None, 0, None

    @property
    def estimates_noise(self) -> bool:
        return isinstance(self.head, Regression) and self.head.noise == "estimated"

    @property
    def device(self) -> torch.device:
        """A checkpoint's features may have been mapped elsewhere than those that came since."""
        if self.running is not None:
            return self.running.anchor.device
        return self.features[-1].device if self.features else self.head.layers[0].weight.device

    def add(self, features: Tensor, targets: Tensor, weight: Tensor | None) -> None:
        """A batch that was checked, and the head's weights in float64 (``streaming``). ``stored`` keeps the tensors,
        which the caller must leave as they are."""
        self.count += features.shape[0]
        if self.estimates_noise:
            wide = targets.double()
            found = torch.stack([wide.square().nansum(0), wide.isfinite().sum(0)])
            self.squares = found if self.squares is None else found + self.squares.to(found.device)
        if self.statistics == "stored":
            self.features.append(features)
            self.targets.append(targets)
            return
        features = features.double()
        if self.running is None:
            self.running = self.empty(self._anchor(features, weight))
        elif self.running.anchor.device != features.device:  # resumed from a checkpoint that was mapped elsewhere
            self.running = posterior_from_state(self.running.state(), features)
        self.running.add(features, targets, weight)

    def posterior(self, anchor: Tensor) -> Posterior:
        """Return a new one, or that of streaming itself, to be copied by those who change it."""
        if self.running is not None:
            return self.running
        posterior = self.empty(anchor)
        if not self.count:
            return posterior
        device = self.device
        features = torch.cat([rows.to(device) for rows in self.features])
        targets = torch.cat([labels.to(device) for labels in self.targets])
        for rows, labels in zip(features.split(ROWS), targets.split(ROWS)):
            posterior.add(rows.double(), labels)
        return posterior

    def anchor(self) -> Tensor:
        """Return the head's weights as they stand, float64 [R, W]; zeros for regression, which is exact anywhere."""
        like = torch.empty(0, dtype=torch.float64, device=self.device)
        return self._anchor(like, self.head.weight(like))

    def _anchor(self, like: Tensor, weight: Tensor | None) -> Tensor:
        return like.new_zeros(self.head.outputs, self.head.width) if weight is None else weight.double()

    def empty(self, anchor: Tensor) -> Posterior:
        """Return that of no data."""
        return empty_posterior(self.head.likelihood, anchor, None, self.head.gamma, self.structure)

    def state(self) -> dict[str, Any]:
        return {
            "features": list(self.features),
            "targets": list(self.targets),
            "running": None if self.running is None else self.running.state(),
            "count": self.count,
            "squares": self.squares,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.features, self.targets, self.count = list(state["features"]), list(state["targets"]), state["count"]
        self.running = None if state["running"] is None else posterior_from_state(state["running"])
        self.squares = state.get("squares")

    def noise(self, posterior: Posterior, world: World) -> Tensor | None:
        """Return the variance of all ranks' targets about the full-data posterior's mean, float64 [O]; None: one.

        The sum of squared residuals over the number of labels less that of effective parameters,
        trace(H'H precision^-1); SMALLEST_NOISE times the targets' mean square at least, and one where all targets are
        zero. Bytes: 16 an output.
        """
        if not isinstance(self.head, Regression) or self.head.noise == 1.0:
            return None
        mean = posterior.mean
        if not self.estimates_noise:
            return torch.full_like(mean[:, 0], float(self.head.noise))
        own = mean.new_zeros(2, len(mean)) if self.squares is None else self.squares.to(mean)
        squares, labels = world.sum_(own.clone())
        # The prior's mean is zero: precision mean = H'y.
        by_target, by_prior = posterior.times_precision(mean), mean / posterior.gamma
        residuals = squares - (mean * (by_target + by_prior)).sum(1)
        covariance = posterior.covariance()
        parameters = mean.shape[1] - covariance.diagonal(dim1=-2, dim2=-1).sum(-1) / posterior.gamma
        floor = SMALLEST_NOISE * squares / labels.clamp(min=1.0)
        noise = torch.maximum(residuals / (labels - parameters).clamp(min=1.0), floor)
        return torch.where(squares > 0.0, noise, 1.0)


def full_data_posteriors(full_data: Sequence[FullData], number: int, world: World) -> tuple[list[Posterior], int]:
    """Return the posteriors of all ranks' examples, and the largest of the ranks' pass numbers.

    Bytes: 24 a rank; the sums (:func:`sum_over_ranks`); streaming: the classifiers' weights in float64.
    """
    device = full_data[0].device
    counts, numbers = map(list, zip(*world.gather_numbers([full_data[0].count, number], device)))
    if not any(counts):
        raise RuntimeError(
            "BayesAgg.refresh: expected at least one training batch since the last refresh, found none on any rank"
        )
    anchors = [part.anchor() for part in full_data]
    norms = ", ".join(repr(float(anchor.norm())) for anchor in anchors)
    hint = "train the model in DistributedDataParallel, or give process_group= the ranks that train together"
    check_same("BayesAgg.refresh", "weights of the heads", f"weights of norm {norms}", hint, world, device)
    posteriors = [part.posterior(anchor) for part, anchor in zip(full_data, anchors)]
    if world.size == 1:
        return posteriors, number
    # A copy of streaming's own: a refresh that fails leaves the epoch's sums as they are.
    posteriors = [
        posterior_from_state(posterior.state()) if posterior is part.running else posterior
        for posterior, part in zip(posteriors, full_data)
    ]
    if full_data[0].statistics == "streaming":
        _share_anchors(posteriors, counts, world)
    if not world.is_rank0:  # the prior counts once
        for posterior, part in zip(posteriors, full_data):
            posterior.subtract(part.empty(posterior.anchor))
    sum_over_ranks(posteriors, world)
    return posteriors, max(numbers)


def _share_anchors(posteriors: Sequence[Posterior], counts: Sequence[int], world: World) -> None:
    """Sums in deviations from a point add up where that point is one: that of the first rank with examples."""
    classifiers = [p for p in posteriors if p.likelihood != "regression"]
    if not classifiers:
        return
    first = next(rank for rank, count in enumerate(counts) if count)
    flat = torch.cat([p.anchor.reshape(-1) for p in classifiers])
    world.sum_(flat if world.rank == first else flat.zero_())
    for posterior, anchor in zip(classifiers, flat.split([p.anchor.numel() for p in classifiers])):
        posterior.move(anchor.view_as(posterior.anchor))
