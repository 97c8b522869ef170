"""FSDP2: task_backward and merge on shards, and the layer between sharded modules, equal one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode

import mtlgrad
from tests.support.bounds import assert_near
from tests.support.nets import Model
from tests.support.ranks import (
    RULES,
    WIDTH,
    Labelled,
    Pool,
    counted,
    cut_batch,
    joined_batch,
    labelled_batches,
    labelled_losses,
    labelled_net,
    shown,
)


def sharded(net: Model, *, heads: bool = True, replicas: int = 1) -> Model:
    size = dist.get_world_size()
    if replicas > 1:
        mesh = init_device_mesh("cpu", (replicas, size // replicas), mesh_dim_names=("replica", "shard"))
    else:
        mesh = init_device_mesh("cpu", (size,))
    fully_shard(net.backbone[0], mesh=mesh)
    fully_shard(net.backbone, mesh=mesh)
    if heads:
        for head in net.heads:
            fully_shard(head, mesh=mesh)
    return net


def full(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def gradients(form: str, parts: list[Labelled], heads: bool, replicas: int, rule: str = "min") -> dict[str, Tensor]:
    alone = not dist.is_initialized()
    batch = joined_batch(parts) if alone else parts[dist.get_rank()]
    net = labelled_net() if alone else sharded(labelled_net(), heads=heads, replicas=replicas)
    shared = list(net.backbone.parameters())  # before the model is called, which swaps them for a while
    aligned = RULES[rule]()
    if form == "scaled":
        aligned.scale_heads = True
    z = net.backbone(batch.x)
    if form == "layer":
        torch.stack(labelled_losses(net, list(aligned(z)), batch)).sum().backward()
    else:
        for _ in range(2 if form == "twice" else 1):
            if form == "twice":
                z = net.backbone(batch.x)
            mtlgrad.task_backward(labelled_losses(net, [z, z, z], batch), shared)
        for p in shared:
            assert p.jac.shape == (3, *p.shape)  # type: ignore[attr-defined]
        listed = [head.parameters() for head in net.heads] if form == "scaled" else None
        aligned.merge(shared, heads=listed)
    if not alone and not heads:
        from mtlgrad.world.ranks import world_of

        world = world_of(None)
        assert world.size > 1
        if form == "layer":
            world.average_gradients(list(net.heads.parameters()))
    found = {
        name: torch.cat([full(p.grad).flatten() for p in module.parameters()])
        for name, module in {"backbone": net.backbone, "heads": net.heads}.items()
    }
    return {**found, **shown(aligned)}


@pytest.mark.parametrize("form", ["layer", "merge", "twice", "scaled"])
@pytest.mark.parametrize(("size", "heads", "replicas"), [(2, True, 1), (2, False, 1), (4, True, 1), (4, True, 2)])
def test_equal_to_one_process(
    form: str, size: int, heads: bool, replicas: int, two_ranks: Pool, four_ranks: Pool
) -> None:
    counts = [7, 4] if size == 2 else [1, 4, 4, 2]
    parts = cut_batch(labelled_batches(1, 14, seed=3)[0], counts, {1: 2})
    expected = gradients(form, parts, heads, replicas)
    for found in (two_ranks if size == 2 else four_ranks)(gradients, form, parts, heads, replicas):
        for name, value in expected.items():
            assert_near(found[name], value)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("min", "rmse")])
def test_every_rule(rule: str, two_ranks: Pool, four_ranks: Pool) -> None:
    for pool, counts, replicas in ((two_ranks, [7, 4], 1), (four_ranks, [1, 4, 4, 2], 2)):
        parts = cut_batch(labelled_batches(1, 14, seed=3)[0], counts, {1: 2})
        for form in ("layer", "merge", "scaled"):
            expected = gradients(form, parts, True, replicas, rule)
            for found in pool(gradients, form, parts, True, replicas, rule):
                for name, value in expected.items():
                    assert_near(found[name], value)


def shards() -> list[int]:
    """`.jac` lies where the parameter does; a head of one row leaves a rank without any."""
    net = sharded(labelled_net())
    everything = list(net.parameters())
    z = net.backbone(torch.randn(3, 6))
    values = [head(z).mean() for head in net.heads]
    mtlgrad.task_backward(values, everything)
    for p in everything:
        jac = p.jac  # type: ignore[attr-defined]
        assert isinstance(jac, DTensor)
        assert jac.placements == (Shard(1),)
        assert jac.to_local().shape == (3, *p.to_local().shape)  # type: ignore[attr-defined]
        assert not jac.requires_grad
    aligned = mtlgrad.AlignedMTL(3)
    aligned.merge(everything)
    for p in everything:
        assert p.grad is not None
        assert p.grad.placements == p.placements  # type: ignore[attr-defined]
    return [net.heads[0].weight.to_local().numel()]


def test_shards(two_ranks: Pool) -> None:
    assert two_ranks(shards) == [[12], [0]]


def refused() -> None:
    net = sharded(labelled_net())
    shared = list(net.backbone.parameters())
    z = net.backbone(torch.randn(3, 6))
    values = [head(z).mean() for head in net.heads]
    with pytest.raises(ValueError, match=r"task_backward: features: expected none, since the shared .* are shards"):
        mtlgrad.task_backward(values, shared, features=z)
    with pytest.raises(ValueError, match=r"AlignedMTL.weigh: shared: expected features, or parameters that are not sh"):
        mtlgrad.AlignedMTL(3).weigh(values, shared)
    plain = nn.Linear(6, WIDTH)
    z = plain(torch.randn(3, 6))
    with pytest.raises(ValueError, match=r"features: expected none, since a head is sharded"):
        mtlgrad.task_backward([head(z).mean() for head in net.heads], plain.parameters(), features=z)
    net = sharded(labelled_net())
    z = net.backbone(torch.randn(3, 6))
    with pytest.raises(
        ValueError, match=r"shared: expected parameters that keep their gradients, found \d+ that fully"
    ):
        mtlgrad.task_backward([head(z).mean() for head in net.heads], net.backbone.parameters())
    net = sharded(labelled_net())
    z = net.backbone(torch.randn(3, 6))
    values = [head(z).mean() for head in net.heads]
    # the features themselves are no shards
    weights = mtlgrad.AlignedMTL(3).weigh(values, z)
    (weights * torch.stack(values)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_refused(two_ranks: Pool) -> None:
    two_ranks(refused)


def replicated() -> tuple[Tensor, dict[str, int]]:
    """Of mixed placements each is summed over its own ranks alone; a replicated one counts once."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    jacobians = [torch.randn(2, 5, 3), torch.randn(2, 4), torch.randn(2, 2)]
    parameters = [nn.Parameter(torch.zeros(5, 3)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2))]
    from torch.distributed.tensor import distribute_tensor

    placed = [
        nn.Parameter(distribute_tensor(p.detach(), mesh, [place]))
        for p, place in zip(parameters, [Shard(0), Replicate()])
    ]
    placed.append(parameters[2])
    for p, jacobian, place in zip(placed, jacobians, [Shard(1), Replicate(), None]):
        p.jac = jacobian if place is None else distribute_tensor(jacobian, mesh, [place])  # type: ignore[attr-defined]
    mtlgrad.distributed.average_jacobians(placed[2:])
    aligned = mtlgrad.AlignedMTL(2, scale="rmse")
    with counted() as found:
        aligned.merge(placed)
    return torch.cat([full(p.grad).flatten() for p in placed]), found


def test_mixed_placements(two_ranks: Pool) -> None:
    torch.manual_seed(0)
    rows = torch.cat([torch.randn(2, 5, 3).flatten(1), torch.randn(2, 4), torch.randn(2, 2)], 1)
    expected = mtlgrad.ops.merge(rows, scale="rmse")[0]
    for found, size in two_ranks(replicated):
        assert isinstance(expected, Tensor)
        assert_near(found, expected)
        assert size == {"all_reduce": 8 * 2 * 2}


def without_sync(kind: str) -> None:
    net = sharded(labelled_net())
    shared = list(net.backbone.parameters())
    for module in {"all": [net.backbone, *net.heads], "part": [net.backbone[0]], "kept": [net.backbone]}[kind]:
        module.set_requires_gradient_sync(False)
    if kind == "kept":
        net.backbone.set_reshard_after_backward(False)
    z = net.backbone(torch.randn(3, 6))
    values = [head(z).mean() for head in net.heads]
    with pytest.raises(RuntimeError, match=r"task_backward: shared: expected shards whose gradients are synchronised"):
        mtlgrad.task_backward(values, shared)


@pytest.mark.parametrize("kind", ["all", "part", "kept"])
def test_gradient_sync_switched_off_is_refused(two_ranks: Pool, kind: str) -> None:
    two_ranks(without_sync, kind)


def ignored(parts: list[Labelled]) -> tuple[Tensor, Tensor]:
    """Of a backbone that is sharded in part, what is not is averaged here."""
    alone = not dist.is_initialized()
    batch = joined_batch(parts) if alone else parts[dist.get_rank()]
    net = labelled_net()
    if not alone:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(net.backbone, mesh=mesh, ignored_params={net.backbone[3].weight, net.backbone[1].bias})
    shared = list(net.backbone.parameters())
    z = net.backbone(batch.x)
    mtlgrad.task_backward(labelled_losses(net, [z, z, z], batch), shared)
    jacobian = torch.cat([full(p.jac).flatten(1) for p in shared], 1)  # type: ignore[attr-defined]
    mtlgrad.AlignedMTL(3).merge(shared)
    return jacobian, torch.cat([full(p.grad).flatten() for p in shared])


def test_parameters_that_are_not_sharded(two_ranks: Pool) -> None:
    parts = cut_batch(labelled_batches(1, 14, seed=3)[0], [7, 4])
    for found in two_ranks(ignored, parts):
        for value, expected in zip(found, ignored(parts), strict=True):
            assert_near(value, expected)


class Sent(TorchDispatchMode):
    """Bytes of what is gathered, and of what is scattered, by whoever asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        for short, position in (("_allgather_base_", 0), ("_reduce_scatter_base_", 1)):
            if short in name:
                self.found[short] = self.found.get(short, 0) + args[position].numel() * args[position].element_size()
        return func(*args, **(kwargs or {}))


class Even(Model):
    """Every parameter has rows for both ranks: nothing is padded."""

    def __init__(self) -> None:
        super().__init__(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), heads=(2, 2, 2), width=4)

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        z = self.backbone(x)
        return [head(z).mean() for head in self.heads]


def fsdp_communication() -> tuple[dict[str, int], int, int]:
    net = Even()
    sizes = [sum(p.numel() for p in part.parameters()) for part in (net.backbone, net.heads)]
    fully_shard(net.backbone)
    fully_shard(net)
    shared = list(net.backbone.parameters())
    for _ in range(2):  # the first step sets things up
        values = net(torch.randn(3, 6))
        with Sent() as sent:
            mtlgrad.task_backward(values, shared)
    return sent.found, sizes[0], sizes[1]


def test_what_fsdp_communicates(two_ranks: Pool) -> None:
    """docs/guide/fsdp2.md: T passes put the backbone together, and average its gradients, T times."""
    tasks = 3
    for found, backbone, heads in two_ranks(fsdp_communication):
        assert found["_allgather_base_"] == 4 * (tasks * backbone + (tasks - 1) * heads)
        assert found["_reduce_scatter_base_"] == 4 * (tasks * backbone + heads)
