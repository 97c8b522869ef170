"""What trainings move beside the parameters that they train: buffers, and parameters without gradient (an average of
others, a codebook). Through a round: what the tasks made of them, as one copy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..world.ranks import World

RULES = ("target", "mean")
OF_TARGET = -1  # the count of what the target's training left


class Buffers:
    """Statistics that are linear in the data (BatchNorm's and InstanceNorm's) become the mean over the tasks whose
    training changed them, their counters of batches the largest: so a head's are those of its own task, the shared ones
    an even mixture with variances that stay positive, whatever alpha is.

    Of all others (vectors of a power iteration, queues with their pointers, codebooks, averages of parameters) a mean
    is nothing that a training could come to: they are as the target's training left them, or the last that changed
    them. ``rule`` says otherwise: "mean" or "target", for all of these or by name. One that the model makes or resizes
    in its forward is taken for a cache and left alone.
    """

    def __init__(self, model: nn.Module, rule: str | Mapping[str, str]):
        self.model = model
        self.rule = rule
        self.merged: dict[str, Tensor] = {}
        self.count: dict[str, int] = {}
        rules = {rule} if isinstance(rule, str) else set(rule.values())
        unknown = [] if isinstance(rule, str) else [name for name in rule if name not in self.named()]
        if not rules <= set(RULES) or unknown:
            found = f"the names {unknown}, which are none of the model's buffers" if unknown else repr(rule)
            raise ValueError(
                f'AlphaVIL: buffers: expected "target" or "mean", or a dict of them by name, found {found}'
            )

    def named(self) -> dict[str, Tensor]:
        still = ((name, p) for name, p in self.model.named_parameters() if not p.requires_grad)
        return {name: b.detach() for name, b in (*self.model.named_buffers(), *still)}

    def averaged(self) -> set[str]:
        """Return the names of those that are averaged."""
        rule, modules = self.rule, self.model.named_modules()
        known = {
            f"{m}.{b}" if m else b for m, module in modules if isinstance(module, _NormBase) for b in module._buffers
        }
        if isinstance(rule, str):
            return set(self.named()) if rule == "mean" else known
        return {name for name in self.named() if rule.get(name, "mean" if name in known else "target") == "mean"}

    def copy(self) -> dict[str, Tensor]:
        return {name: b.clone() for name, b in self.named().items()}

    @torch.no_grad()
    def put_back(self, before: dict[str, Tensor]) -> None:
        for name, b in self.named().items():
            if name in before and before[name].shape == b.shape:
                b.copy_(before[name])

    @torch.no_grad()
    def changed(self, before: dict[str, Tensor], world: World) -> dict[str, Tensor]:
        """Return what a task's training made of those that it changed on any rank, by name: their mean over the ranks
        (the largest where they hold no floats), or, of those that are not averaged, the first rank's.

        Bytes: 8 a buffer of the model; those of the changed floats; 8 an element of other changed ones.
        """
        named = {name: b for name, b in self.named().items() if name in before and before[name].shape == b.shape}
        if not named:
            return {}
        moved = [not torch.equal(b, before[name]) for name, b in named.items()]
        where = world.control_device(next(iter(named.values())).device)
        counts = world.sum_(torch.tensor(moved, dtype=torch.int64, device=where)).tolist()
        found = {name: b.clone() for (name, b), count in zip(named.items(), counts, strict=True) if count}
        averaged = self.averaged()
        if not world.is_rank0:
            for name in found.keys() - averaged:
                found[name].zero_()
        world.average_(b for name, b in found.items() if _has_floats(b) and name in averaged)
        for b in (b for name, b in found.items() if _has_floats(b) and name not in averaged):
            world.sum_(b)
        _largest((b for name, b in found.items() if not _has_floats(b)), world)
        return found

    @torch.no_grad()
    def take(self, changed: dict[str, Tensor], of_target: bool) -> None:
        averaged = self.averaged()
        for name, b in changed.items():
            if name not in averaged:
                if of_target or self.count.get(name) != OF_TARGET:
                    self.merged[name], self.count[name] = b.clone(), OF_TARGET if of_target else 1
                continue
            self.count[name] = self.count.get(name, 0) + 1
            if name not in self.merged:
                self.merged[name] = b.clone()
            elif _has_floats(b):
                self.merged[name] += (b - self.merged[name]) / self.count[name]
            else:
                self.merged[name] = torch.maximum(self.merged[name], b)

    def clear(self) -> None:
        self.merged, self.count = {}, {}

    @torch.no_grad()
    def move(self) -> None:
        self.put_back(self.merged)

    def state_dict(self) -> dict[str, Any]:
        return {"merged": self.merged, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = self.named()
        self.merged = {name: value.to(own[name].device, copy=True) for name, value in state["merged"].items()}
        self.count = dict(state["count"])


def _largest(tensors: Iterable[Tensor], world: World) -> None:
    """Integers and flags: the largest over the ranks, in place; what a rank does not have is zero there."""
    listed = list(tensors)
    if not listed:
        return
    flat = world.max_(torch.cat([b.reshape(-1).to(listed[0].device, torch.int64) for b in listed]))
    for b, part in zip(listed, flat.split([b.numel() for b in listed]), strict=True):
        b.copy_(part.view(b.shape))


def _has_floats(b: Tensor) -> bool:
    return b.is_floating_point() or b.is_complex()


def finite(buffers: dict[str, Tensor], before: dict[str, Tensor]) -> bool:
    """Whether nothing that was finite has become NaN or infinity; masks of attention hold infinity from the start."""
    return all(bool((b.isfinite() | ~before[name].isfinite()).all()) for name, b in buffers.items() if _has_floats(b))
