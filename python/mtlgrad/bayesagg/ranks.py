"""What the ranks tell each other, so that each gets its rows of the gradient of all ranks' examples in one batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..distributed.collectives import check_same, gather_numbers, gather_rows, sum_
from ..distributed.groups import Ranks
from ..posterior.posteriors import Posterior, posterior_from_state
from ..posterior.summing import move, subtract, sum_over_ranks
from .aggregation import Batch, Everyone, own_posterior, sums_precision
from .full_data import FullData

EVERY_RANK = "every rank must call the layer and refresh() as often as the others"


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def with_everyone(
    batch: Batch, rows: Tensor, number: int, posteriors: Sequence[Posterior], agreed: bool, ranks: Ranks
) -> Batch:
    """The batch with what its gradient needs from the other ranks; ``rows`` are its features in their own dtype.
    ``agreed``: this rank knows that all have the same full-data posteriors.

    Bytes: 32 a rank; the features and targets of heads that :func:`uses_lemma`, in one gather; the sums of the others
    (:func:`sum_over_ranks`).
    """
    device = rows.device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "BayesAgg: expected no CUDA graph to be captured while several ranks train together, found one: the "
            "ranks' batch sizes are read by the host; capture the backbone alone"
        )
    kinds = f"{rows.dtype} and {', '.join(str(target.dtype) for target in batch.targets)}"
    told = gather_numbers([number, len(rows), _digest(kinds), agreed], ranks, device)
    if not all(line[3] for line in told):
        agree(posteriors, ranks, device)
    if len({line[0] for line in told}) > 1:
        check_same("BayesAgg", "number of passes", str(number), EVERY_RANK, ranks, device)
    if len({line[2] for line in told}) > 1:
        check_same("BayesAgg", "dtypes of features and targets", kinds, "give all ranks the same", ranks, device)
    sizes = [line[1] for line in told]
    total = sum(sizes)
    heads = range(len(batch.heads))
    summing = [i for i in heads if sums_precision(batch, i, total)]
    features: Tensor | None = None
    targets: list[Tensor | None] = [None for _ in heads]
    gathered = [i for i in heads if i not in summing]
    if gathered:
        every, *found = _gather_together([rows, *(batch.targets[i] for i in gathered)], sizes, ranks)
        features = every.to(batch.features.dtype)
        for i, target in zip(gathered, found):
            targets[i] = target
    # The prior counts once.
    own = {i: own_posterior(batch, i, with_prior=ranks.rank == 0) for i in summing}
    for dtype in (torch.float64, torch.float32):
        sum_over_ranks([own[i] for i in summing if own[i].anchor.dtype == dtype], ranks)
    end = list(accumulate(sizes))[ranks.rank]
    return batch._replace(
        everyone=Everyone(
            features=features,
            targets=targets,
            posteriors=[own.get(i) for i in heads],
            rows=slice(end - sizes[ranks.rank], end),
            share=ranks.size * sizes[ranks.rank] / total,
        )
    )


def _gather_together(tensors: Sequence[Tensor], sizes: Sequence[int], ranks: Ranks) -> list[Tensor]:
    """The ranks' rows of tensors of any dtypes, in one collective: as bytes."""
    matrices = [tensor.reshape(len(tensor), -1).contiguous() for tensor in tensors]
    every = gather_rows(torch.cat([matrix.view(torch.uint8) for matrix in matrices], 1), sizes, ranks)
    widths = [matrix.shape[1] * matrix.element_size() for matrix in matrices]
    parts = every.split(widths, 1)
    return [part.contiguous().view(tensor.dtype).view(-1, *tensor.shape[1:]) for part, tensor in zip(parts, tensors)]


def agree(posteriors: Sequence[Posterior], ranks: Ranks, device: torch.device) -> None:
    """Raises on all ranks if their full-data posteriors differ, as after only some loaded a checkpoint. 8 a rank."""
    norms = ", ".join(repr(float(posterior.mean.double().norm())) for posterior in posteriors)
    hint = "load the same checkpoint on all ranks, or call refresh() on all"
    check_same("BayesAgg", "full-data posterior", f"means of norm {norms}", hint, ranks, device)


def of_all_ranks(full_data: Sequence[FullData], number: int, ranks: Ranks) -> tuple[list[Posterior], int]:
    """The full-data posteriors of all ranks' examples, and the largest pass number.

    Bytes: 24 a rank; the sums (:func:`sum_over_ranks`); streaming: the classifiers' weights in float64.
    """
    device = full_data[0].device
    told = gather_numbers([full_data[0].count, number], ranks, device)
    counts = [line[0] for line in told]
    if not any(counts):
        raise RuntimeError(
            "BayesAgg.refresh: expected at least one training batch since the last refresh, found none on any rank"
        )
    current = [part.empty() for part in full_data]
    norms = ", ".join(repr(float(start.anchor.norm())) for start in current)
    hint = "train the model in DistributedDataParallel, or give process_group= the ranks that train together"
    check_same("BayesAgg.refresh", "weights of the heads", f"weights of norm {norms}", hint, ranks, device)
    posteriors = [_own(part) if part.count else start for part, start in zip(full_data, current)]
    if full_data[0].statistics == "streaming":
        _share_anchors(posteriors, counts, ranks)
    if ranks.rank > 0:  # the prior counts once
        for posterior, part in zip(posteriors, full_data):
            subtract(posterior, part.empty_at(posterior.anchor))
    sum_over_ranks(posteriors, ranks)
    return posteriors, max(line[1] for line in told)


def _own(part: FullData) -> Posterior:
    posterior = part.posterior()
    return posterior_from_state(posterior.state()) if posterior is part.running else posterior


def _share_anchors(posteriors: Sequence[Posterior], counts: Sequence[int], ranks: Ranks) -> None:
    """Sums in deviations from a point add up where that point is one: that of the first rank with examples."""
    classifiers = [p for p in posteriors if p.likelihood != "regression"]
    if not classifiers:
        return
    has = ranks.rank == next(rank for rank, count in enumerate(counts) if count)
    flat = torch.cat([p.anchor.reshape(-1) for p in classifiers])
    sum_(flat if has else flat.zero_(), ranks)
    for posterior, anchor in zip(classifiers, flat.split([p.anchor.numel() for p in classifiers])):
        move(posterior, anchor.view_as(posterior.anchor))
