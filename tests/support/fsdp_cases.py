"""Nets and parameters that fully_shard shards, with .jac as one process would have it, for the tests of optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mtlgrad.world.shards import like_sharded, local
from tests.support.gradient_cases import Net, normal
from tests.support.optim_cases import new

SHAPES = [(8, 3), (5, 2, 2), (1, 4), (3,)]  # shards of 2 and 4 ranks: even, uneven, empty
HEADS = [(5, 2), (1,)]


class Whole(Net):
    """With a forward, as fully_shard needs it; a backbone of 1 and 3 rows, which four ranks do not all have."""

    def __init__(self, seed: int = 0):
        backbone = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1), nn.Linear(1, 3), nn.Tanh())
        super().__init__(seed=seed, backbone=backbone, width=3)
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            nn.init.normal_(p, std=0.6, generator=generator)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Each task's losses, example by example."""
        z = self.backbone(x)
        return [10.0**-t * (head(z) - t).square().flatten() for t, head in enumerate(self.heads)]


def sharded_net(seed: int = 0) -> Whole:
    net = Whole(seed)
    for layer in net.backbone:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(net)
    return net


def shards(parameters: Iterable[Tensor], hybrid: bool = False) -> list[Any]:
    """Over all ranks; hybrid: over two, with replicas on the others."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size // 2, 2) if hybrid else (size,))
    placements = [Replicate(), Shard(0)] if hybrid else [Shard(0)]
    return [nn.Parameter(cut(p.detach(), mesh, *placements)) for p in parameters]


def cut(tensor: Tensor, mesh: Any, *placements: Any) -> DTensor:
    return distribute_tensor(tensor, mesh, placements or [Shard(0)], src_data_rank=None)


def part(whole: Tensor, p: Any) -> Tensor:
    """This rank's part of .jac of a parameter."""
    where = cut(torch.arange(p.numel()).view(p.shape), p.device_mesh, *p.placements)
    return whole.flatten(1)[:, local(where).flatten()].view(len(whole), *local(p).shape)


def whole(tensor: Tensor) -> Tensor:
    found: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach().clone()


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{i} {key}": whole(v) for i, s in state.items() for key, v in s.items()}


def give(parameters: Sequence[Any], seed: int, tasks: int = 3, absent: int | None = None) -> None:
    """.jac: all of it to ordinary parameters, this rank's part to shards."""
    for i, p in enumerate(parameters):
        jacobian = normal(1000 * seed + i, tasks, *p.shape) * 10.0 ** -torch.arange(tasks).view(-1, *[1] * p.dim())
        if absent is not None:
            jacobian[absent] = 0.0
        jacobian = jacobian.to(p.dtype)
        p.jac = like_sharded(part(jacobian, p), p, tasks) if isinstance(p, DTensor) else jacobian


def give_grad(parameters: Sequence[Any], seed: int) -> None:
    for i, p in enumerate(parameters):
        gradient = normal(1000 * seed + 500 + i, *p.shape).to(p.dtype)
        p.grad = cut(gradient, p.device_mesh, *p.placements) if isinstance(p, DTensor) else gradient


def both(dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Shared parameters and heads."""
    found = [new(i, *shape, dtype=dtype) for i, shape in enumerate((*SHAPES, *HEADS))]
    return found[: len(SHAPES)], found[len(SHAPES) :]
