"""The updates that the tasks' trainings made, and the parameters that they lead to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from .tasks import Task

Heads = Literal["own", "none", "all"]
Storage = Literal["parameters", "bfloat16", "host", "host-bfloat16"]
HEADS: tuple[Heads, ...] = ("own", "none", "all")
STORAGES: tuple[Storage, ...] = ("parameters", "bfloat16", "host", "host-bfloat16")

Copies = list[list[Tensor]]  #: [groups][parameters]


class Group(NamedTuple):
    """Parameters that the same tasks train."""

    names: list[str]  #: in the model
    parameters: list[nn.Parameter]
    tasks: tuple[int, ...]
    weighed: bool  #: False: moved by the whole delta, whatever alpha is


def groups_of(model: nn.Module, tasks: dict[str, Task], target: int, include_heads: Heads) -> list[Group]:
    """All parameters that require gradients: the shared ones, then each head's."""
    if include_heads not in HEADS:
        raise ValueError(f"AlphaVIL: include_heads: expected one of {', '.join(HEADS)}, found {include_heads!r}")
    known = {id(p) for p in model.parameters()}
    owners: dict[int, list[int]] = {}
    for t, (name, task) in enumerate(tasks.items()):
        for p in task.head_parameters():
            if id(p) not in known:
                raise ValueError(
                    f"AlphaVIL: tasks: {name!r}: head: expected parameters of the model, found one of shape "
                    f"{list(p.shape)} that is not in it"
                )
            if include_heads != "all":
                owners.setdefault(id(p), []).append(t)
    everyone = tuple(range(len(tasks)))
    members: dict[tuple[int, ...], list[tuple[str, nn.Parameter]]] = {everyone: []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            members.setdefault(tuple(owners.get(id(p), everyone)), []).append((name, p))
    groups = [
        Group([n for n, _ in found], [p for _, p in found], own, include_heads == "own" or own == everyone)
        for own, found in members.items()
        if found
    ]
    for t, name in enumerate(tasks):
        if not any(t in group.tasks for group in groups):
            raise ValueError(f"AlphaVIL: tasks: {name!r}: expected parameters that require gradients, found none")
    if not any(target in group.tasks and group.weighed for group in groups):
        raise ValueError(
            "AlphaVIL: include_heads: expected own or all, since no shared parameter requires gradients and alpha "
            f"would weigh nothing, found {include_heads}"
        )
    return groups


class Deltas:
    """delta_t of every task, [tasks of the group][parameters] a group, in memory that all rounds share."""

    def __init__(self, groups: list[Group], storage: Storage):
        if storage not in STORAGES:
            raise ValueError(f"AlphaVIL: delta_storage: expected one of {', '.join(STORAGES)}, found {storage!r}")
        self.groups, self.storage = groups, storage
        self.rows: list[list[list[Tensor]]] = []
        for group in groups:
            for name, p in zip(group.names, group.parameters, strict=True):
                if storage.endswith("bfloat16") and p.dtype not in (torch.float32, torch.bfloat16):
                    raise ValueError(
                        f"AlphaVIL: delta_storage: expected parameters or host for parameters of {p.dtype} ({name}), "
                        f"found {storage}"
                    )

    @property
    def device(self) -> torch.device:
        return self.groups[0].parameters[0].device

    def trained_by(self, task: int) -> list[nn.Parameter]:
        return [p for group in self.groups if task in group.tasks for p in group.parameters]

    def copy_parameters(self) -> Copies:
        return [[p.detach().clone() for p in group.parameters] for group in self.groups]

    @torch.no_grad()
    def put_back(self, theta: Copies) -> None:
        for group, before in zip(self.groups, theta, strict=True):
            for p, old in zip(group.parameters, before, strict=True):
                p.copy_(old)

    @torch.no_grad()
    def take(self, task: int, theta: Copies) -> bool:
        """Keep delta_task = parameters - theta. False where the parameters are not finite."""
        if not self.rows:
            self.rows = self._zeros()
        largest: list[Tensor] = []
        for group, rows, before in zip(self.groups, self.rows, theta, strict=True):
            if task not in group.tasks:
                continue
            for p, old, delta in zip(group.parameters, before, rows[group.tasks.index(task)], strict=True):
                if delta.dtype == p.dtype and delta.device == p.device:
                    torch.sub(p, old, out=delta)
                else:
                    delta.copy_(p - old, non_blocking=True)
                if p.numel():
                    largest.append(torch.linalg.vector_norm(p, torch.inf).double())
        # Reads from the device, so that copies to the host have arrived, too.
        return not largest or bool(torch.stack(largest).isfinite().all())

    def _zeros(self) -> list[list[list[Tensor]]]:
        return [[[self._zero(p) for p in group.parameters] for _ in group.tasks] for group in self.groups]

    def _zero(self, p: Tensor) -> Tensor:
        dtype = torch.bfloat16 if self.storage.endswith("bfloat16") else p.dtype
        if not self.storage.startswith("host"):
            return torch.zeros_like(p, dtype=dtype, requires_grad=False)
        return torch.zeros_like(p, dtype=dtype, device="cpu", pin_memory=p.device.type == "cuda", requires_grad=False)

    def weigh(self, task: int, absent: Sequence[int]) -> bool:
        """Whether alpha makes a difference to a task's loss."""
        return any(
            group.weighed and task in group.tasks and not set(group.tasks) <= set(absent) for group in self.groups
        )

    def displaced(self, alphas: Tensor, absent: Sequence[int]) -> dict[str, Tensor]:
        """Name -> theta + sum_t alpha_t delta_t, differentiable in alphas [T]; tasks in `absent` make no difference."""
        found: dict[str, Tensor] = {}
        for group, rows, chosen in self._present(absent):
            base = [p.detach() for p in group.parameters]
            moved = ops.displace(base, [rows[i] for i in chosen], _weights(group, alphas, chosen)) if chosen else base
            found.update(zip(group.names, moved, strict=True))
        return found

    @torch.no_grad()
    def move(self, alphas: Tensor, absent: Sequence[int]) -> None:
        """theta <- theta + sum_t alpha_t delta_t, bit for bit what `displaced` gives."""
        for group, rows, chosen in self._present(absent):
            if chosen:
                base = [p.detach() for p in group.parameters]
                # The parameters themselves as `out`: their version counters tell autograd.
                ops.displace(base, [rows[i] for i in chosen], _weights(group, alphas, chosen), out=base)

    def _present(self, absent: Sequence[int]) -> list[tuple[Group, list[list[Tensor]], list[int]]]:
        return [
            (group, rows, [i for i, t in enumerate(group.tasks) if t not in absent])
            for group, rows in zip(self.groups, self.rows, strict=True)
        ]

    def state_dict(self) -> list[list[list[Tensor]]]:
        return self.rows

    def load_state_dict(self, state: list[list[list[Tensor]]]) -> None:
        rows = self._zeros() if state else []
        # [groups][tasks][parameters] of shapes
        own, saved = ([[[p.shape for p in row] for row in g] for g in some] for some in (rows, state))
        if own != saved:
            raise ValueError(
                "AlphaVIL: load_state_dict: deltas: expected those of this model, its heads and include_heads, found "
                "others; resume with the arguments that the state was made with"
            )
        for group, others in zip(rows, state, strict=True):
            for row, other in zip(group, others, strict=True):
                for delta, value in zip(row, other, strict=True):
                    delta.copy_(value)
        self.rows = rows


def _weights(group: Group, alphas: Tensor, chosen: list[int]) -> Tensor:
    tasks = [group.tasks[i] for i in chosen]
    if not group.weighed:
        return torch.ones(len(tasks), dtype=alphas.dtype, device=alphas.device)
    return alphas if tasks == list(range(len(alphas))) else alphas[tasks]
