"""Posteriors whose data lie on several ranks: what each has of them is a sum, and sums add up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..distributed.collectives import gather_numbers, sum_
from ..distributed.groups import Ranks
from .posteriors import BlockPosterior, Posterior


def forget_prior(posterior: Posterior) -> None:
    """Of a posterior without data: leaves nothing. Of all ranks but one, so that the sum has the prior once."""
    posterior.residual = torch.zeros_like(posterior.residual)
    for value in posterior._sums().values():
        value.zero_()


def subtract(posterior: Posterior, start: Posterior) -> None:
    """Leaves what was added since ``start``, a posterior with the same anchor."""
    posterior.residual = posterior.residual - start.residual
    for name, value in start._sums().items():
        posterior._sums()[name].sub_(value)


def move(posterior: Posterior, anchor: Tensor) -> None:
    """The same posterior in deviations from another point. Of a Kronecker posterior the mean changes a little."""
    posterior.residual = posterior.residual + posterior.times_precision(anchor - posterior.anchor)
    posterior.anchor = anchor


def sum_over_ranks(posteriors: Sequence[Posterior], ranks: Ranks) -> None:
    """Their sum over the ranks, in place. The anchors must agree, and the prior be on one rank alone.

    Bytes: those of the residuals [R, W] and of the precisions, in one all-reduce; and 8 a rank for each regression of
    several outputs, to ask whether these share one precision on all ranks.
    """
    if not posteriors:
        return
    _part_alike(posteriors, ranks)
    pieces = [tensor for p in posteriors for tensor in (p.residual, *p._sums().values())]
    flat = sum_(torch.cat([piece.reshape(-1) for piece in pieces]), ranks)
    parts = iter(flat.split([piece.numel() for piece in pieces]))
    for posterior in posteriors:
        posterior.residual = next(parts).view_as(posterior.residual).clone()
        for value in posterior._sums().values():
            value.copy_(next(parts).view_as(value))
        posterior._forget()


def _part_alike(posteriors: Sequence[Posterior], ranks: Ranks) -> None:
    """Outputs whose labels are missing for some only have precisions of their own; so they must on all ranks."""
    several = [
        p for p in posteriors if p.likelihood == "regression" and isinstance(p, BlockPosterior) and len(p.anchor) > 1
    ]
    if not several:
        return
    found = gather_numbers([len(p.blocks) for p in several], ranks, several[0].anchor.device)
    for posterior, count in zip(several, (max(counts) for counts in zip(*found))):
        if len(posterior.blocks) < count:
            posterior.blocks = posterior.blocks.repeat(count, 1, 1)
