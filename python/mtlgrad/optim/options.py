"""The settings of a parameter group, checked: one line each, with what was expected and found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MISSING = ("decay", "still")
MOMENTS = ("float32", "bfloat16")


class TaskOptions(NamedTuple):
    """What a group has beyond torch.optim's settings; see :class:`mtlgrad.optim.AdaTaskAdam`."""

    num_tasks: int
    task_weights: Sequence[float] | None
    missing: str
    moments_dtype: str | torch.dtype | None
    stochastic_rounding: bool
    dominance_decay: float | None
    check_finite: bool
    max_norm: float | None


#: torch.optim's settings that are numbers from zero on: below what.
_BELOW = {
    "lr": math.inf,
    "eps": math.inf,
    "weight_decay": math.inf,
    "alpha": 1.0,
    "momentum": math.inf,
    "lr_decay": math.inf,
    "initial_accumulator_value": math.inf,
    "dominance_decay": 1.0,
}

_REFUSED = {
    "fused": "torch's fused step unscales .grad itself, and GradScaler would leave .jac scaled",
    "differentiable": "the step cannot be differentiated",
}


def check_group(name: str, group: dict[str, Any], others: Sequence[dict[str, Any]]) -> None:
    """Raise ``ValueError`` for a setting that is out of its range, or another number of tasks than before."""

    def refuse(setting: str, expected: str) -> None:
        raise ValueError(f"{name}: {setting}: expected {expected}, found {group[setting]!r}")

    for setting, limit in _BELOW.items():
        value = group.get(setting, 0.0)
        if (setting == "dominance_decay" and value is None) or (
            isinstance(value, Tensor) and value.device.type != "cpu"
        ):
            continue  # reading a tensor would wait for its device
        if not 0.0 <= _number(value) < limit:
            refuse(setting, "a number from 0" + (f", below {limit:g}" if limit < math.inf else ""))
    betas = _numbers(group.get("betas", (0.0, 0.0)))
    if betas is None or len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        refuse("betas", "two numbers from 0, below 1")
    for setting, reason in _REFUSED.items():
        if group.get(setting):
            raise ValueError(f"{name}: {setting}: not available here, {reason}; leave it out")
    tasks = group["num_tasks"]
    if not isinstance(tasks, int) or isinstance(tasks, bool) or tasks < 1:
        refuse("num_tasks", "a whole number from 1")
    if any(other["num_tasks"] != tasks for other in others):
        refuse("num_tasks", f"{others[0]['num_tasks']} as in the other groups")
    max_norm = group["max_norm"]
    if max_norm is not None and not _number(max_norm) > 0.0:
        refuse("max_norm", "a number above 0, or None")
    if any(other["max_norm"] != max_norm for other in others):
        refuse("max_norm", f"{others[0]['max_norm']} as in the other groups")
    if group["task_weights"] is not None:
        weights = _numbers(group["task_weights"])
        if weights is None or len(weights) != tasks or not all(0.0 <= w < math.inf for w in weights):
            refuse("task_weights", f"{tasks} finite numbers from 0, one a task")
    if group["missing"] not in MISSING:
        refuse("missing", f"one of {', '.join(MISSING)}")
    if group["moments_dtype"] is not None and moments_name(group["moments_dtype"]) not in MOMENTS:
        refuse("moments_dtype", f"one of {', '.join(MOMENTS)}, or None for float32")


def _number(value: Any) -> float:
    """NaN for what is no number."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor with several
        return math.nan


def _numbers(values: Any) -> list[float] | None:
    try:
        return [_number(value) for value in values]
    except TypeError:
        return None


def moments_name(dtype: torch.dtype | str) -> str:
    """ "bfloat16" for torch.bfloat16: a string can be in any checkpoint."""
    return str(dtype).removeprefix("torch.")
