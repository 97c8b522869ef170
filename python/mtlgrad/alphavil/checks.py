"""What AlphaVIL checks beside tasks and heads; one line each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..world.alike import check_same, digest, first_unlike
from ..world.ranks import World
from ..world.shards import is_sharded
from .deltas import Group
from .tasks import count_of

ALIKE = 1e-6  #: relative; the same training leaves other last digits on another kind of machine


def check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"AlphaVIL: model: expected a torch.nn.Module, found {type(model).__name__}")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise TypeError(
            "AlphaVIL: model: expected the plain module, since AlphaVIL averages gradients over the ranks itself and a "
            "search makes none for DistributedDataParallel to wait for, found one that is or has a "
            "DistributedDataParallel; give its .module"
        )
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if is_sharded(value):
            raise TypeError(
                "AlphaVIL: model: expected parameters that are whole on each rank, since fully_shard puts its own in "
                f"the place of those that a search tries, found the DTensor {name}; leave fully_shard out, and save "
                'memory by delta_storage="host-bfloat16"'
            )


def check_epochs(alpha_epochs: Any) -> None:
    if not isinstance(alpha_epochs, int) or isinstance(alpha_epochs, bool) or alpha_epochs < 1:
        raise ValueError(f"AlphaVIL: alpha_epochs: expected a number from 1, found {alpha_epochs!r}")


def check_maker(name: str, make: Any) -> None:
    if not callable(make) or isinstance(make, torch.optim.Optimizer):
        raise TypeError(
            f"AlphaVIL: {name}: expected a function from parameters to an optimizer, found {type(make).__name__}; "
            "write lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
        )


def check_clip(clip: Any) -> None:
    if clip is None:
        return
    numbers = isinstance(clip, (tuple, list)) and len(clip) == 2 and all(isinstance(v, (int, float)) for v in clip)
    if not numbers or not -math.inf <= clip[0] <= 1.0 <= clip[1] <= math.inf:
        raise ValueError(
            "AlphaVIL: clip_alpha: expected None or (low, high) with low <= 1 <= high, since alpha starts at 1, "
            f"found {clip!r}"
        )


def check_min_weight(weight: Any) -> None:
    if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not weight <= 1.0:
        raise ValueError(
            f"AlphaVIL: min_weight: expected a number up to 1, where task weights start, or -inf, found {weight!r}"
        )


def checked_weights(weights: Any, tasks: int) -> Tensor:
    try:
        found = torch.as_tensor(weights, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0, device="cpu")
    if found.shape != (tasks,) or not found.isfinite().all():
        shown = f"shape {list(weights.shape)}" if isinstance(weights, Tensor) and weights.dim() != 1 else f"{weights!r}"
        if len(shown) > 80:
            shown = f"{len(weights)} of them"
        raise ValueError(f"AlphaVIL: task_weights: expected {tasks} finite numbers, one a task, found {shown}")
    return found


KEYS = (
    *("tasks", "target", "rounds", "task_weights", "last", "round", "stage"),
    *("deltas", "buffers", "search", "random"),
)


def check_state(state: Any, names: list[str], target: int, buffers: dict[str, Tensor], loaders: int) -> None:
    """All that can be told before anything is loaded, but for the deltas, which are checked and loaded first."""
    refused = "AlphaVIL: load_state_dict:"
    if not isinstance(state, dict) or not set(KEYS) <= state.keys():
        raise ValueError(f"{refused} expected what AlphaVIL.state_dict() gave, found something else")
    for what, own in (("tasks", names), ("target", target)):
        if state[what] != own:
            raise ValueError(f"{refused} {what}: expected {own}, found {state[what]}")
    for name, value in state["buffers"]["merged"].items():
        if name not in buffers or buffers[name].shape != value.shape:
            raise ValueError(
                f"{refused} buffers: expected those of this model, found {name} of shape {list(value.shape)}"
            )
    found = len(state["random"]["loaders"])
    if found != loaders:
        raise ValueError(
            f"{refused} random: expected the state of {loaders} generators that loaders were given, found {found}; "
            "resume with loaders like those that the state was made with"
        )


# ---- what several ranks must have alike ------------------------------------------------------------------------------


def check_models(model: nn.Module, groups: Sequence[Group], world: World) -> None:
    """Refuse other parameters and buffers, or other tasks that train them. Bytes: 8 a rank, 16 a parameter and
    buffer."""
    named = [*model.named_parameters(), *model.named_buffers()]
    shapes = [(name, tuple(value.shape), value.dtype) for name, value in named]
    layout = digest(repr((shapes, [(group.names, group.tasks, group.weighed) for group in groups])))
    elements = sum(value.numel() for _, value in named)
    found = f"{len(named)} parameters and buffers with {elements} elements (names, shapes and heads: {layout:x})"
    hint = "make them, and include_heads, alike on all ranks"
    check_same("AlphaVIL", "model, heads and frozen parameters", found, hint, world, groups[0].parameters[0].device)
    if unlike := first_unlike([value for _, value in named], ALIKE, world):
        i, least, most = unlike
        raise ValueError(
            f"AlphaVIL: model: expected the same parameters and buffers on all ranks, found {named[i][0]} with norms "
            f"from {least:.7g} to {most:.7g}; load the same checkpoint on all ranks, make the model from the same "
            "seed, or torch.distributed.broadcast each from rank 0 first"
        )


def check_counts(
    task: str, what: str, batches: Iterable[Any], subset: float | int, world: World, device: torch.device
) -> None:
    """Refuse a rank with fewer batches in a pass, for which the others would wait. Bytes: 8 a rank."""
    if world.size == 1:
        return
    count = count_of(batches, subset)
    found = [row[0] for row in world.gather_numbers([-1 if count is None else count], device)]
    known = [(n, rank) for rank, n in enumerate(found) if n >= 0]
    if known and min(known)[0] != max(known)[0]:
        (fewest, one), (most, other) = min(known), max(known)
        raise ValueError(
            f"AlphaVIL: tasks: {task!r}: {what}: expected the same number of batches on all ranks, found {fewest} on "
            f"rank {one} and {most} on rank {other}; split the examples evenly, as torch's DistributedSampler does, or "
            "let each rank have as many batches of its own size, with mtlgrad.distributed.global_means in the loss"
        )


def check_dense(task: str, parameters: Iterable[Tensor], world: World) -> None:
    """Refuse sparse gradients where they are to be averaged."""
    for p in parameters if world.size > 1 else ():
        if p.grad is not None and p.grad.layout != torch.strided:
            raise TypeError(
                f"AlphaVIL: tasks: {task!r}: loss: expected dense gradients on several ranks, found a sparse one of "
                f"shape {list(p.shape)}; leave sparse=True out of its embedding"
            )
