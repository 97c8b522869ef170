"""What alphaVIL tells about a round."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["train", "evaluate", "alpha", "move"]
Kept = Literal["search", "start", "none"]


@dataclass(frozen=True)
class Stage:
    """A part of a round that is done."""

    kind: Kind
    task: str  #: whose training it was; the target's name for all but "train"
    number: int  #: of the round's stages, from 1
    total: int  #: the most that a round has: the search ends early where the development loss is not finite
    loss: float  #: mean training loss, not weighed ("train"), or development loss


@dataclass
class Round:
    """One round: every list and tensor has an entry a task, in the order of the tasks."""

    alphas: Tensor  #: [T] float64, those kept
    losses: list[float] = field(default_factory=list)  #: means over the batches trained on, not weighed; NaN if none
    sat_out: list[int] = field(default_factory=list)  #: tasks whose training came to NaN or infinity
    before: float = float("nan")  #: development loss at the round's first parameters
    start: float = float("nan")  #: at alpha = 1
    searched: list[float] = field(default_factory=list)  #: after each epoch of the search
    after: float = float("nan")  #: at the alphas kept
    #: Whose alphas were kept: those of the "search"; "start", alpha = 1, where the search found none lower; or "none":
    #: alpha = 0, parameters and task weights stay, where all alphas seen were worse than the parameters before.
    kept: Kept = "none"

    def state_dict(self) -> dict[str, Any]:
        """Return the fields by name; lists are copied."""
        return {name: list(value) if isinstance(value, list) else value for name, value in vars(self).items()}

    @staticmethod
    def from_state(state: dict[str, Any]) -> Round:
        """Make the round of a :meth:`state_dict`.

        Args:
            state: what that gave; lists and tensors are copied.

        Returns:
            An equal round.
        """
        copied = {name: list(value) if isinstance(value, list) else value for name, value in state.items()}
        return Round(**{**copied, "alphas": state["alphas"].to("cpu", torch.float64, copy=True)})
