"""What one head has seen, and the full-data posteriors of what all heads on all ranks have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..posterior.likelihoods import Terms
from ..posterior.posteriors import Posterior, empty_posterior, posterior_from_state, sum_over_ranks
from ..world.alike import check_same
from ..world.ranks import World
from .heads import Head, Outputs, Regression

STATISTICS = ("stored", "streaming", "moving")
ROWS = 8192  # of stored features in float64 at a time
SMALLEST_NOISE = 1e-6  #: relative to the targets' mean square: a perfect fit is no reason to follow one task alone


class FullData:
    """``stored``: the features and targets themselves, as published; ``streaming``: sums, in a posterior without prior
    expanded at the weights that each batch met; ``moving``: these sums, of which half is left after ``half_life``
    batches. All end in float64.

    To add a small batch to large sums costs their memory's way to the cores and back, and hardly any arithmetic:
    ``streaming`` adds batches of fewer examples than weights together, as many as come to that number.
    """

    def __init__(self, head: Head, structure: str, statistics: str, half_life: float):
        self.head = head
        self.structure = structure
        self.statistics = statistics
        self.decay = 0.5 ** (1.0 / half_life) if statistics == "moving" else 1.0
        self.features: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.running: Posterior | None = None
        self.waiting: list[tuple[Tensor, Terms]] = []  # batches that are to be added to it: inputs [B, W] and terms
        self.count = 0  # of examples since the last refresh
        self.weight = 0.0  # of examples in the sums
        self.epoch = 0  # examples between the last two refreshes: what moving sums stand for; 0: not known
        #: Where the noise is estimated: sum of the targets' squares and number of labels, float64 [2, O].
        self.squares: Tensor | None = None

    def end_epoch(self) -> None:
        self.epoch, self.count = self.count, 0
        if self.statistics != "moving":
            self.features, self.targets, self.running, self.weight, self.squares = [], [], None, 0.0, None
            self.waiting = []

    @property
    def estimates_noise(self) -> bool:
        return isinstance(self.head, Regression) and self.head.noise == "estimated"

    @property
    def is_exact(self) -> bool:
        return self.head.likelihood.is_exact

    @property
    def device(self) -> torch.device:
        """A checkpoint's features may have been mapped elsewhere than those that came since."""
        if self.running is not None:
            return self.running.anchor.device
        return self.features[-1].device if self.features else self.head.layers[0].weight.device

    def add(self, features: Tensor, targets: Tensor, outputs: Outputs | None, index: int) -> None:
        """Take in a batch that was checked, of which the head is number ``index`` of ``outputs`` (not needed by
        ``stored``, which keeps the tensors: the caller must leave them as they are)."""
        self.count += features.shape[0]
        self.weight = self.decay * self.weight + features.shape[0]
        if self.estimates_noise:
            values = targets.double()
            there = ~values.isnan()
            values = torch.stack([values.masked_fill(~there, 0.0).square(), there]).sum(1)
            self.squares = values if self.squares is None else values + self.decay * self.squares.to(values.device)
        if self.statistics == "stored":
            self.features.append(features)
            self.targets.append(targets)
            return
        assert outputs is not None
        hidden, weight = outputs.hidden_of(index), outputs.weights[index]
        if self.running is None:
            self.running = self.empty(torch.zeros_like(weight[:, : hidden.shape[1]]) if self.is_exact else weight)
        elif self.running.anchor.device != features.device:  # resumed from a checkpoint that was mapped elsewhere
            self.running = posterior_from_state(self.running.state(), hidden)
            self.waiting = [(rows.to(hidden), terms.to(hidden)) for rows, terms in self.waiting]
        if self.decay < 1.0:
            self.running.scale(self.decay)
        if not self.running.uses_lemma(hidden.shape[0]):  # nor does the batch posterior: it needs the same sum
            self._take_in()
            self.running.add_terms(hidden, outputs.terms[index], weight, outputs.curvature(index, self.running))
        elif self.decay < 1.0:
            self.running.add_terms(hidden, outputs.terms[index], weight)
        else:
            self.waiting.append((hidden, outputs.terms[index]))
            if sum(len(rows) for rows, _ in self.waiting) >= hidden.shape[1]:
                self._take_in()

    def _take_in(self) -> None:
        """Add what waits. Where it was expanded, its terms know: structures that wait ask for no weights."""
        if self.waiting and self.running is not None:
            hidden, terms = (list(parts) for parts in zip(*self.waiting))
            self.running.add_terms(torch.cat(hidden), Terms.joined(terms), self.running.anchor)
            self.waiting = []

    def sums(self, anchor: Tensor) -> Posterior:
        """Return a new posterior of the data alone, without prior."""
        self._take_in()
        if self.running is not None:
            return posterior_from_state(self.running.state())
        posterior = self.empty(anchor)
        if not self.count:
            return posterior
        device = self.device
        features = torch.cat([rows.to(device) for rows in self.features])
        targets = torch.cat([rows.to(device) for rows in self.targets])
        for some, theirs in zip(features.split(ROWS), targets.split(ROWS)):
            posterior.add(some.double(), theirs)
        return posterior

    def anchor(self) -> Tensor:
        """Return the head's weights as they stand, float64 [R, W]; zeros for regression, which is exact anywhere."""
        like = torch.empty(0, dtype=torch.float64, device=self.device)
        if self.is_exact:
            return like.new_zeros(self.head.outputs, self.head.likelihood.width(self.head.width))
        return self.head.weight(like)

    def empty(self, anchor: Tensor) -> Posterior:
        """Return that of no data, without prior."""
        posterior = empty_posterior(self.head.likelihood, anchor, None, self.head.gamma, self.structure)
        posterior.scale(0.0)
        return posterior

    def state(self) -> dict[str, Any]:
        return {
            "features": list(self.features),
            "targets": list(self.targets),
            "running": None if self.running is None else self.running.state(),
            "waiting": [(hidden, tuple(terms)) for hidden, terms in self.waiting],
            "counts": (self.count, self.weight, self.epoch),
            "squares": self.squares,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.features, self.targets = list(state["features"]), list(state["targets"])
        self.count, self.weight, self.epoch = state["counts"]
        self.running = None if state["running"] is None else posterior_from_state(state["running"])
        self.waiting = [(hidden, Terms(*terms)) for hidden, terms in state["waiting"]]
        self.squares = state["squares"]

    def noise(self, posterior: Posterior, factor: float, world: World) -> Tensor | None:
        """Return the variance of all ranks' targets about the full-data posterior's mean, float64 [O]; None: one.

        The sum of squared residuals over the number of labels less that of effective parameters,
        trace(H'H precision^-1); SMALLEST_NOISE times the targets' mean square at least, and one where all targets are
        zero. ``factor`` is how many times the sums count. Bytes: 16 an output.
        """
        if not isinstance(self.head, Regression) or self.head.noise == 1.0:
            return None
        mean = posterior.mean
        if not self.estimates_noise:
            return torch.full_like(mean[:, 0], float(self.head.noise))
        own = mean.new_zeros(2, len(mean)) if self.squares is None else self.squares.to(mean)
        squares, labels = world.sum_(own.clone()) * factor
        # The prior's mean is zero: precision mean = H'y.
        by_target, by_prior = posterior.times_precision(mean), mean / posterior.gamma
        residuals = squares - (mean * (by_target + by_prior)).sum(1)
        covariance = posterior.covariance()
        parameters = mean.shape[1] - covariance.diagonal(dim1=-2, dim2=-1).sum(-1) / posterior.gamma
        floor = SMALLEST_NOISE * squares / labels.clamp(min=1.0)
        noise = torch.maximum(residuals / (labels - parameters).clamp(min=1.0), floor)
        return torch.where(squares > 0.0, noise, 1.0)


def full_data_posteriors(
    full_data: Sequence[FullData], number: int, world: World
) -> tuple[list[Posterior], list[Tensor | None], int]:
    """Return the posteriors of all ranks' examples, the variances of their regressions' targets, and the largest of the
    ranks' pass numbers.

    Bytes: 24 a rank; the sums (:func:`sum_over_ranks`); streaming and moving: the classifiers' weights in float64;
    moving: 16; and those of :meth:`FullData.noise`.
    """
    first = full_data[0]
    device = first.device
    seen, numbers = map(list, zip(*world.gather_numbers([int(first.weight > 0.0), number], device)))
    if not any(seen):
        raise RuntimeError(
            "BayesAgg.refresh: expected at least one training batch since the last refresh, found none on any rank"
        )
    anchors = [part.anchor() for part in full_data]
    norms = ", ".join(repr(float(anchor.norm())) for anchor in anchors)
    hint = "train the model in DistributedDataParallel, or give process_group= the ranks that train together"
    check_same("BayesAgg.refresh", "weights of the heads", f"weights of norm {norms}", hint, world, device)
    posteriors = [part.sums(anchor) for part, anchor in zip(full_data, anchors)]
    factor = 1.0
    if first.statistics == "moving":
        epoch, weight = world.sum_(
            torch.tensor([first.epoch, first.weight], dtype=torch.float64, device=device)
        ).tolist()
        factor = epoch / weight if epoch else 1.0
    if world.size > 1:
        if first.statistics != "stored":
            _share_anchors(posteriors, seen, world)
        sum_over_ranks(posteriors, world)
    for i, (posterior, part) in enumerate(zip(posteriors, full_data)):
        posterior.name = f"BayesAgg.refresh: heads[{i}] ({part.head.likelihood})"
        posterior.scale(factor)
        posterior.add_prior()
        posterior.covariance()  # where it cannot be had, say so now and not in the next batch
    noise = [part.noise(posterior, factor, world) for part, posterior in zip(full_data, posteriors)]
    return posteriors, noise, max(numbers)


def _share_anchors(posteriors: Sequence[Posterior], there: Sequence[int], world: World) -> None:
    """Move all to the anchors of the first rank with examples: sums of deviations from one point add up."""
    classifiers = [p for p in posteriors if not p.likelihood.is_exact]
    if not classifiers:
        return
    first = there.index(1)
    flat = torch.cat([p.anchor.reshape(-1) for p in classifiers])
    world.sum_(flat if world.rank == first else flat.zero_())
    for posterior, anchor in zip(classifiers, flat.split([p.anchor.numel() for p in classifiers])):
        posterior.move(anchor.view_as(posterior.anchor))
