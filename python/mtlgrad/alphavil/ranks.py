"""What alphaVIL's ranks tell each other. Whatever a decision hangs on is made the same on all ranks first, so that all
take the same path; on one process (ranks: None) values stay as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed.collectives import (
    Averaging,
    average_gradients,
    check_same,
    gather_numbers,
    norm_bounds,
    sum_,
)
from ..distributed.groups import Ranks, control_device, group_of
from .deltas import Group

ALIKE = 1e-6  #: relative; the same training leaves other last digits on another kind of machine


def mean_(values: Tensor, ranks: Ranks | None) -> Tensor:
    """The mean over the ranks, in place. Bytes: those of `values`."""
    return values if ranks is None else sum_(values, ranks).div_(ranks.size)


def mean_gradients(task: str, parameters: Sequence[Tensor], ranks: Ranks | None) -> None:
    """``.grad`` becomes its mean over the ranks. Bytes: 8 a parameter, and those of the gradients."""
    if ranks is None:
        return
    for p in parameters:
        if p.grad is not None and p.grad.layout != torch.strided:
            raise TypeError(
                f"AlphaVIL: tasks: {task!r}: loss: expected dense gradients on several ranks, found a sparse one of "
                f"shape {list(p.shape)}; leave sparse=True out of its embedding"
            )
    average_gradients(parameters, ranks)


def settled(loss: float, sound: bool, ranks: Ranks | None, device: torch.device) -> tuple[float, bool]:
    """The ranks' mean loss, and whether all of them are sound. Bytes: 16."""
    if ranks is None:
        return loss, sound
    both = torch.tensor([loss, float(not sound)], dtype=torch.float64, device=control_device(ranks, device))
    mean, unsound = mean_(both, ranks).tolist()
    return mean, unsound == 0.0


def check_stage(stage: str, ranks: Ranks, device: torch.device) -> None:
    """Ranks at different stages would wait for each other, or take each other's numbers for their own. Bytes: 8 a
    rank."""
    hint = "resume all ranks from checkpoints of the same stage, and give them the same arguments and task_weights"
    check_same("AlphaVIL", "stage", stage, hint, ranks, device)


def check_counts(task: str, what: str, count: int | None, ranks: Ranks, device: torch.device) -> None:
    """Batches of a pass (None: not known): a rank with fewer would be waited for. Bytes: 8 a rank."""
    found = [row[0] for row in gather_numbers([-1 if count is None else count], ranks, device)]
    known = [(n, rank) for rank, n in enumerate(found) if n >= 0]
    if known and min(known)[0] != max(known)[0]:
        (fewest, one), (most, other) = min(known), max(known)
        raise ValueError(
            f"AlphaVIL: tasks: {task!r}: {what}: expected the same number of batches on all ranks, found {fewest} on "
            f"rank {one} and {most} on rank {other}; split the examples evenly, as torch's DistributedSampler does, or "
            "let each rank have as many batches of its own size, with mtlgrad.distributed.global_means in the loss"
        )


@torch.no_grad()
def check_models(model: nn.Module, groups: Sequence[Group], ranks: Ranks) -> None:
    """The same parameters and buffers, trained by the same tasks. Bytes: 8 a rank, 16 a parameter and buffer."""
    named = [*model.named_parameters(), *model.named_buffers()]
    device = groups[0].parameters[0].device
    shapes = [(name, tuple(value.shape), value.dtype) for name, value in named]
    layout = repr((shapes, [(group.names, group.tasks, group.weighed) for group in groups]))
    digest = hashlib.blake2b(layout.encode(), digest_size=4).hexdigest()
    elements = sum(value.numel() for _, value in named)
    found = f"{len(named)} parameters and buffers with {elements} elements (names, shapes and heads: {digest})"
    hint = "make them, and include_heads, alike on all ranks"
    check_same("AlphaVIL", "model, heads and frozen parameters", found, hint, ranks, device)
    least, most = norm_bounds([value for _, value in named], ranks)
    unlike = (most - least > ALIKE * most).tolist()
    if any(unlike):
        i = unlike.index(True)
        raise ValueError(
            f"AlphaVIL: model: expected the same parameters and buffers on all ranks, found {named[i][0]} with norms "
            f"from {float(least[i]):.7g} to {float(most[i]):.7g}; load the same checkpoint on all ranks, make the "
            "model from the same seed, or torch.distributed.broadcast each from rank 0 first"
        )


def merged_buffers(model: nn.Module, changed: dict[str, Tensor], ranks: Ranks | None) -> dict[str, Tensor]:
    """The buffers that changed on any rank, by name: the mean over all ranks, the largest where they hold no floats.

    Bytes: 8 a buffer of the model; those of the changed floats; 8 an element of other changed ones.
    """
    named = [(name, b.detach()) for name, b in model.named_buffers()]
    if ranks is None or not named:
        return changed
    where = control_device(ranks, named[0][1].device)
    counts = sum_(torch.tensor([name in changed for name, _ in named], dtype=torch.int64, device=where), ranks)
    found = {name: b.clone() for (name, b), count in zip(named, counts.tolist(), strict=True) if count}
    averaging = Averaging(ranks)
    averaging.add([b for b in found.values() if b.is_floating_point() or b.is_complex()])
    averaging.wait()
    others = [b for b in found.values() if not (b.is_floating_point() or b.is_complex())]
    if others:
        flat = torch.cat([b.reshape(-1).to(others[0].device, torch.int64) for b in others])
        dist.all_reduce(flat, dist.ReduceOp.MAX, group=group_of(ranks))
        for b, part in zip(others, flat.split([b.numel() for b in others]), strict=True):
            b.copy_(part.view(b.shape))
    return found
