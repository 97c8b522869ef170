"""The batch of all ranks: what each needs of the others, so that it gets its rows of the gradient of all examples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..posterior.posteriors import Posterior, sum_over_ranks
from ..world.alike import check_same, digest
from ..world.ranks import World
from .aggregation import Batch, GlobalBatch
from .heads import Outputs


def gather_batch(
    batch: Batch, rows: Tensor, number: int, posteriors: Sequence[Posterior], agreed: bool, world: World
) -> Batch:
    """Return the batch with what its gradient needs from the other ranks.

    Bytes: 32 a rank; the features and targets of heads that :func:`uses_lemma`, in one gather; the sums of the others
    (:func:`sum_over_ranks`).

    Args:
        rows: the batch's features in their own dtype.
        number: of the pass.
        posteriors: full-data, in float64.
        agreed: whether this rank knows that all have the same of these.
    """
    if world.size == 1:
        return batch
    device = rows.device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "BayesAgg: expected no CUDA graph to be captured while several ranks train together, found one: the "
            "ranks' batch sizes are read by the host; capture the backbone alone"
        )
    kinds = f"{rows.dtype} and {', '.join(str(target.dtype) for target in batch.targets)}"
    every = world.gather_numbers([number, len(rows), digest(kinds), agreed], device)
    numbers, sizes, digests, agreements = map(list, zip(*every))
    if not all(agreements):
        norms = ", ".join(repr(float(posterior.mean.double().norm())) for posterior in posteriors)
        hint = "load the same checkpoint on all ranks, or call refresh() on all"
        check_same("BayesAgg", "full-data posterior", f"means of norm {norms}", hint, world, device)
    if len(set(numbers)) > 1:
        hint = "every rank must call the layer and refresh() as often as the others"
        check_same("BayesAgg", "number of passes", str(number), hint, world, device)
    if len(set(digests)) > 1:
        check_same("BayesAgg", "dtypes of features and targets", kinds, "give all ranks the same", world, device)
    heads, total = range(len(batch.heads)), sum(sizes)
    summing = [i for i in heads if batch.sums_precision(i, total)]
    gathered = [i for i in heads if i not in summing]
    outputs = None
    if gathered:
        every_row, *targets = _gather_together([rows, *(batch.targets[i] for i in gathered)], sizes, world)
        weight = torch.cat([batch.outputs.weights[i] for i in gathered])
        outputs = Outputs([batch.heads[i] for i in gathered], every_row, targets, weight)
    # The prior counts once.
    summed = {i: batch.own_posterior(i, with_prior=world.is_rank0) for i in summing}
    for dtype in (torch.float64, torch.float32):
        sum_over_ranks([p for p in summed.values() if p.anchor.dtype == dtype], world)
    end = list(accumulate(sizes))[world.rank]
    return batch._replace(
        global_batch=GlobalBatch(
            outputs=outputs,
            posteriors=[summed.get(i) for i in heads],
            rows=slice(end - sizes[world.rank], end),
            share=world.size * sizes[world.rank] / total,
        )
    )


def _gather_together(tensors: Sequence[Tensor], sizes: Sequence[int], world: World) -> list[Tensor]:
    """Return the ranks' rows of tensors of any dtypes, in one collective: as bytes."""
    matrices = [tensor.reshape(len(tensor), -1).contiguous() for tensor in tensors]
    every = world.gather_rows(torch.cat([matrix.view(torch.uint8) for matrix in matrices], 1), sizes)
    parts = every.split([matrix.shape[1] * matrix.element_size() for matrix in matrices], 1)
    return [part.contiguous().view(tensor.dtype).view(-1, *tensor.shape[1:]) for part, tensor in zip(parts, tensors)]
