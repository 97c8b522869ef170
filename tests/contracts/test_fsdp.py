"""FSDP2: the shards of all ranks together are what one process has; what is sent is counted; what cannot be is refused.

alphaVIL refuses shards: tests/contracts/test_ranks.py.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode

import mtlgrad
from mtlgrad import AlignedMTL
from mtlgrad.distributed import average_jacobians, global_means
from mtlgrad.optim import AdaTaskAdam, clip_task_grad_norm_, unscale_jac_
from mtlgrad.world.jacobians import mark_averaged
from mtlgrad.world.ranks import world_of
from mtlgrad.world.shards import like_sharded, local
from tests.support.bounds import normal, same
from tests.support.nets import PAIRS, SETTINGS, Model, inputs, make_adatask, new
from tests.support.ranks import (
    RULES,
    SHARDED_SHAPES,
    WIDTH,
    Asked,
    Plan,
    Pool,
    all_told,
    by_rank,
    collectives,
    cut_batch,
    dataset,
    give_grad,
    give_jac,
    joined_batch,
    labelled_batches,
    labelled_losses,
    labelled_net,
    layers,
    local_jac,
    narrow_net,
    part_here,
    see,
    shard,
    sharded_net,
    shards,
    shared_and_heads,
    shown,
    told,
    trained_layer,
    unsharded,
    unsharded_state,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def whole(tensors: Any, rows: bool = False) -> Tensor:
    """One vector, or a row a task."""
    return torch.cat([unsharded(t).flatten(1) if rows else unsharded(t).flatten() for t in tensors], -1)


# ---- shards equal one process ----------------------------------------------------------------------------------------


def sharded(net: Model, heads: bool = True, replicas: int = 1) -> Model:
    if dist.is_initialized():
        size = dist.get_world_size()
        shape, names = ((replicas, size // replicas), ("replica", "shard")) if replicas > 1 else ((size,), None)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for module in (net.backbone[0], net.backbone, *(net.heads if heads else ())):  # type: ignore[index]
            fully_shard(module, mesh=mesh)
    return net


def merged(form: str, size: int, heads: bool, replicas: int) -> dict[str, Tensor]:
    """What a step of every rule leaves."""
    counts = [7, 4] if size == 2 else [1, 4, 4, 2]
    batch = part_here(cut_batch(labelled_batches(1, 14, seed=3)[0], counts, {1: 2}), joined_batch)
    found = {}
    for name, rule in RULES.items():
        net, aligned = sharded(labelled_net(), heads, replicas), rule()
        shared = list(net.backbone.parameters())  # before the model is called, which swaps them for a while
        aligned.scale_heads = form == "scaled" or None
        if form == "layer":
            torch.stack(labelled_losses(net, list(aligned(net.backbone(batch.x))), batch)).sum().backward()
            if not heads:
                world_of(None).average_gradients(list(net.heads.parameters()))
        else:
            for _ in range(2 if form == "twice" else 1):
                z = net.backbone(batch.x)
                mtlgrad.task_backward(labelled_losses(net, [z, z, z], batch), shared)
            for p in shared:
                assert p.jac.shape == (3, *p.shape)
            aligned.merge(shared, heads=[head.parameters() for head in net.heads] if form == "scaled" else None)
        for part, module in net.named_children():
            found[f"{name} {part}"] = whole(p.grad for p in module.parameters())
        found.update({f"{name} {key}": value for key, value in shown(aligned).items()})
        if form == "twice" or not heads or (size == 4 and replicas == 1):
            break  # of the sharding, not of the rules
    return found


def in_part() -> dict[str, Tensor]:
    """Of a backbone that is sharded in part, what is not is averaged here."""
    batch = part_here(cut_batch(labelled_batches(1, 14, seed=3)[0], [7, 4]), joined_batch)
    net = labelled_net()
    backbone: Any = net.backbone
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(backbone, mesh=mesh, ignored_params={backbone[3].weight, backbone[1].bias})
    shared = list(backbone.parameters())
    z = backbone(batch.x)
    mtlgrad.task_backward(labelled_losses(net, [z, z, z], batch), shared)
    jacobian = whole([p.jac for p in shared], rows=True)
    AlignedMTL(3).merge(shared)
    return {"jacobian": jacobian, "gradient": whole(p.grad for p in shared)}


def mixed_placements() -> dict[str, Tensor]:
    """Each is summed over its own ranks alone, by one all-reduce; a replicated one counts once."""
    torch.manual_seed(0)
    jacobians = [torch.randn(2, 5, 3), torch.randn(2, 4), torch.randn(2, 2)]
    parameters: list[Any] = [nn.Parameter(torch.zeros(j.shape[1:])) for j in jacobians]
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (2,))
        for i, places in enumerate(((Shard(0), Shard(1)), (Replicate(), Replicate()))):
            parameters[i] = nn.Parameter(shard(parameters[i].detach(), mesh, places[0]))
            jacobians[i] = shard(jacobians[i], mesh, places[1])
    for p, jacobian in zip(parameters, jacobians):
        p.jac = jacobian
    average_jacobians(parameters[2:])
    with collectives() as sent:
        AlignedMTL(2, scale="rmse").merge(parameters)
    assert sent == ([("all_reduce", 8 * 2 * 2)] if dist.is_initialized() else [])
    return {"gradient": whole(p.grad for p in parameters)}


BFLOAT16 = {"moments_dtype": "bfloat16", "stochastic_rounding": False}
BAYES: Plan = [
    ([4, 3], {}),
    ([3, 4], {0: ["regression"]}),
    None,
    ([4, 3], {}),
    ([6, 1], {1: ["binary"]}),
    ([2, 3], {0: ["multiclass"]}),
]


def bayes_trained(statistics: str, heads: bool) -> dict[str, Any]:
    def wrap(net: Any) -> Any:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in (net.backbone, *(net.heads if heads else ()), net):
            fully_shard(module, mesh=mesh)
        return net

    return {"parameters": trained_layer(BAYES, {"statistics": statistics}, wrap)["parameters"]}


def steps(name: str, tasks: int = 3) -> dict[str, Any]:
    """With all settings, shards that are even, uneven and empty, and a task that is absent once. One task is
    torch.optim's own code, or with bfloat16 moments (heads, too) this package's."""
    found: dict[str, Any] = {}
    still = {"missing": "still", "check_finite": True, "task_weights": [1.0, 0.5, 2.0]}
    several = [{**settings, **(still if case % 2 else {})} for case, settings in enumerate(SETTINGS[name])]
    for case, settings in enumerate(several if tasks > 1 else [{}, BFLOAT16]):
        shared, heads = shared_and_heads(torch.float64 if case == 1 < tasks else torch.float32)
        if dist.is_initialized():
            shared, heads = shards(shared), shards(heads)
        groups = [{"params": shared[:2]}, {"params": [*shared[2:], *heads], "lr": 0.1}]
        optimizer = make_adatask(name, groups, tasks, **settings)
        for seed in range(4):
            give_jac(shared, seed, tasks, absent=1 if seed == 2 and tasks > 1 else None)
            give_grad(heads, seed)
            optimizer.step()
            optimizer.zero_grad()
        found[f"{case} parameters"] = [unsharded(p) for p in (*shared, *heads)]
        found.update({f"{case} {key}": value for key, value in unsharded_state(optimizer).items()})
        if tasks > 1:
            found[f"{case} shares"] = optimizer.dominance()
    return found


def ada_trained(name: str) -> dict[str, Any]:
    """Forward, task_backward, clipping and step, with uneven batches and a task absent on some ranks."""
    cuts = {1: [12], 2: [11, 1], 4: [5, 1, 2, 4]}[dist.get_world_size() if dist.is_initialized() else 1]
    rank = dist.get_rank() if dist.is_initialized() else 0
    net = sharded_net() if dist.is_initialized() else narrow_net()
    optimizer = make_adatask(name, net.parameters(), eps=1e-3, missing="still")
    index = torch.arange(12)
    for i in range(6):
        labels = [index >= 0, index >= (9 if i % 2 else 0), index % 3 != 0]
        x, *masks = (by_rank(v, cuts)[rank] for v in (inputs(12, i), *labels))
        mtlgrad.task_backward(global_means([loss[mask] for loss, mask in zip(net(x)[1], masks)]), net.shared)
        clip_task_grad_norm_(net.shared, 5.0)
        optimizer.step()
        optimizer.zero_grad()
    parameters, shares = [unsharded(p) for p in net.parameters()], optimizer.dominance([net.shared])
    return {"parameters": parameters, "shares": shares, **unsharded_state(optimizer)}


def clipped() -> dict[str, Tensor]:
    shared = shared_and_heads()[0]
    shared = shards(shared) if dist.is_initialized() else shared
    give_jac(shared, 3)
    norms = clip_task_grad_norm_(iter([*shared, new(1, 2)]), 2.0)
    assert (norms > 2.0).any()
    assert (norms < 2.0).any()
    return {"norms": norms, "after": clip_task_grad_norm_(shared, math.inf)}


def hybrid() -> dict[str, Tensor]:
    """Over two ranks, with replicas on the two others: each element counts once, and replicas round alike."""
    p: Any = new(1, 5, 2)
    if dist.is_initialized():
        p = shards([p], hybrid=True)[0]
        [q] = shards([torch.zeros(1024)], hybrid=True)
        q.jac = like_sharded(torch.full((3, 512), 1.2345), q, 3)
        rounding = AdaTaskAdam([q], num_tasks=3, moments_dtype="bfloat16")
        rounding.step()
        every: list[Any] = [None] * 4
        dist.all_gather_object(every, local(rounding.state[q]["exp_avg_sq_1"]))
        assert same(every[:2], every[2:])
        assert not torch.equal(every[0], every[1])
    give_jac([p], 1)
    settings: dict[str, Any] = {"missing": "still", "check_finite": True} if dist.is_initialized() else {}
    optimizer = AdaTaskAdam([p], num_tasks=3, **settings)
    norms = clip_task_grad_norm_([p], 1.0)
    optimizer.step()
    return {"norms": norms, "parameter": unsharded(p), "squares": optimizer.state[p]["update_square"]}


def other_layouts() -> dict[str, Any]:
    """Parameters that are not sharded by rows."""
    found: dict[str, Any] = {}
    for placement in (Shard(1), Replicate()):
        p: Any = new(1, 4, 3)
        if dist.is_initialized():
            p = nn.Parameter(shard(p.detach(), init_device_mesh("cpu", (2,)), placement))
        give_jac([p], 1, 2)
        optimizer = AdaTaskAdam([p], num_tasks=2)
        mark_averaged([p.jac], None)
        optimizer.step()
        found.update({f"{placement} parameter": unsharded(p), f"{placement} shares": optimizer.dominance()})
    return found


# The kernels sum the squares of a block of elements in float32; parameters and moments are the same bits.
BITS = {"bound": 0.0, "update_square": 1e-6, "shares": 1e-6}
EQUAL: dict[str, Asked] = {
    **{
        f"aligned-{form}-{size}-{heads}-{replicas}": Asked(merged, (form, size, heads, replicas), size)
        for form in ("layer", "merge", "twice", "scaled")
        for size, heads, replicas in ((2, True, 1), (2, False, 1), (4, True, 1), (4, True, 2))
    },
    "aligned-in part": Asked(in_part, ()),
    "aligned-mixed": Asked(mixed_placements, ()),
    **{
        f"bayesagg-{statistics}-{heads}": Asked(bayes_trained, (statistics, heads))
        for statistics in ("stored", "streaming")
        for heads in (True, False)
    },
    **{f"adatask-{name}-{size}": Asked(steps, (name,), size, BITS) for name in PAIRS for size in (2, 4)},
    **{f"adatask-{name}-one": Asked(steps, (name, 1), 2, {"bound": 0.0}) for name in PAIRS},
    **{
        f"adatask-{name}-trained-{size}": Asked(
            ada_trained, (name,), size, {"bound": 2e-5, "parameters": 1e-6, "shares": 1e-5}
        )
        for name in PAIRS
        for size in (2, 4)
    },
    **{f"adatask-clipped-{size}": Asked(clipped, (), size, {"norms": 1e-13}) for size in (2, 4)},
    "adatask-hybrid": Asked(hybrid, (), 4, {"bound": 0.0, "norms": 1e-13, "squares": 1e-6}),
    "adatask-layouts": Asked(other_layouts, (), 2, BITS),
}


@Asked.each(EQUAL)
def test_shards_equal_one_process(row: str, request: pytest.FixtureRequest) -> None:
    EQUAL[row].check(request)


# ---- where things lie ------------------------------------------------------------------------------------------------


def lies() -> int:
    net = sharded(labelled_net())
    everything: list[Any] = list(net.parameters())
    z = net.backbone(torch.randn(3, 6))
    mtlgrad.task_backward([head(z).mean() for head in net.heads], everything)
    for p in everything:
        assert isinstance(p.jac, DTensor)
        assert p.jac.placements == (Shard(1),)
        assert p.jac.to_local().shape == (3, *p.to_local().shape)
        assert not p.jac.requires_grad
    AlignedMTL(3).merge(everything)
    for p in everything:
        assert p.grad.placements == p.placements
    weight: Any = net.heads[0].weight
    return int(weight.to_local().numel())


def test_aligned_and_adatask_jac_lies_where_the_parameter_does(two_ranks: Pool) -> None:
    """A head of one row leaves a rank without any."""
    assert two_ranks(lies) == [12, 0]


def rounded(cut: bool) -> Tensor:
    """The second moments of task 0 of a parameter whose elements are all alike, [1024]."""
    p = nn.Parameter(torch.zeros(1024))
    p = shards([p])[0] if cut else p
    optimizer = AdaTaskAdam([new(1, 1), p], num_tasks=2, moments_dtype="bfloat16")
    jacobian = torch.full((2, 1024), 1.2345)
    p.jac = like_sharded(local_jac(jacobian, p), p, 2) if cut else jacobian  # type: ignore[union-attr]
    optimizer.step()
    return unsharded(optimizer.state[p]["exp_avg_sq_0"]).double()


def test_adatask_random_bits(two_ranks: Pool) -> None:
    """The first shard has those of a parameter that is no longer; the other has others."""
    first, again = two_ranks(rounded, True)
    assert torch.equal(first, again)
    half = 512
    assert torch.equal(first[:half], rounded(False)[:half])
    assert 0.3 < (first[:half] == first[half:]).double().mean() < 0.7
    exact = 0.001 * 1.2345**2
    assert len(first.unique()) == 2
    assert abs(first.mean() - exact) < 0.1 * (first.max() - first.min())


def test_bayesagg_the_backward_takes_the_weights_of_the_forward() -> None:
    """Under fully_shard they are gone by then."""
    data = dataset(30)
    found = []
    for change in (False, True):
        heads, layer = layers(data)
        see(layer, [d.rows(slice(0, 10)) for d in data])
        layer.refresh()
        features = data[0].features[:9].clone().requires_grad_()
        total = layer.total([layer(features, [d.targets[:9] for d in data]).square().sum()])
        if change:
            with torch.no_grad():
                for head in heads:
                    head.weight.zero_()
        total.backward()
        found.append(features.grad)
    assert torch.equal(*found)  # type: ignore[arg-type]


# ---- bytes -----------------------------------------------------------------------------------------------------------


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


def sent_by_fsdp() -> tuple[Any, Any]:
    """docs/guide/fsdp2.md: T passes put the backbone together, and average its gradients, T times."""
    net, tasks = Even(), 3
    backbone, heads = (sum(p.numel() for p in part.parameters()) for part in (net.backbone, net.heads))
    fully_shard(net.backbone)
    fully_shard(net)
    shared = list(net.backbone.parameters())
    for _ in range(2):  # the first step sets things up
        losses = net(torch.randn(3, 6))
        with Sent() as sent:
            mtlgrad.task_backward(losses, shared)
    gathered, scattered = 4 * (tasks * backbone + (tasks - 1) * heads), 4 * (tasks * backbone + heads)
    return sent.found, {"_allgather_base_": gathered, "_reduce_scatter_base_": scattered}


def sent_by_step() -> tuple[Any, Any]:
    """8 P T for dominance, and 8 T a group for each of `missing` and `check_finite`."""
    shared = shards(shared_and_heads()[0])
    squares, marks = 8 * 3 * len(SHARDED_SHAPES), 8 * 3
    found, expected = [], []
    for settings, calls, size in (
        ({}, 1, squares),
        ({"dominance_decay": None}, 0, 0),
        ({"missing": "still", "check_finite": True}, 3, squares + 2 * marks),
    ):
        optimizer = AdaTaskAdam(shared, num_tasks=3, **settings)
        give_jac(shared, 1)
        with collectives() as sent:
            optimizer.step()
        assert {name for name, _ in sent} <= {"all_reduce"}
        found.append((len(sent), sum(size for _, size in sent)))
        expected.append((calls, size))
    return found, expected


@pytest.mark.parametrize(
    "what", [pytest.param(sent_by_fsdp, id="aligned-adatask"), pytest.param(sent_by_step, id="adatask")]
)
def test_bytes_are_what_the_guide_says(what: Callable[[], tuple[Any, Any]], two_ranks: Pool) -> None:
    for found, expected in two_ranks(what):
        assert found == expected


# ---- what is refused -------------------------------------------------------------------------------------------------


def losses_of(net: Model, backbone: Any = None) -> tuple[Tensor, list[Tensor]]:
    z = (backbone or net.backbone)(torch.randn(3, 6))
    return z, [head(z).mean() for head in net.heads]


def no_features() -> list[str]:
    """Features, and parameters that were listed too late; the features themselves are no shards."""
    net = sharded(labelled_net())
    shared = list(net.backbone.parameters())
    z, losses = losses_of(net)
    found = [
        told(lambda: mtlgrad.task_backward(losses, shared, features=z), ValueError),
        told(lambda: AlignedMTL(3).weigh(losses, shared), ValueError),
    ]
    plain = nn.Linear(6, WIDTH)
    z, losses = losses_of(net, plain)
    found.append(told(lambda: mtlgrad.task_backward(losses, plain.parameters(), features=z), ValueError))
    net = sharded(labelled_net())
    losses = losses_of(net)[1]
    found.append(told(lambda: mtlgrad.task_backward(losses, net.backbone.parameters()), ValueError))
    net = sharded(labelled_net())
    z, losses = losses_of(net)
    (AlignedMTL(3).weigh(losses, z) * torch.stack(losses)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    return found


def no_synchronisation() -> list[str]:
    found = []
    for kind in ("all", "part", "kept"):
        net: Any = sharded(labelled_net())
        shared = list(net.backbone.parameters())
        for module in {"all": [net.backbone, *net.heads], "part": [net.backbone[0]], "kept": [net.backbone]}[kind]:
            module.set_requires_gradient_sync(False)
        if kind == "kept":
            net.backbone.set_reshard_after_backward(False)
        found.append(told(partial(mtlgrad.task_backward, losses_of(net)[1], shared), RuntimeError))
    return found


def not_finite() -> list[str]:
    """A NaN in a shard of one rank alone: in .jac of a task, then in a head; then where norms are asked for."""
    found = []
    shared, heads = (shards(ps) for ps in shared_and_heads())
    optimizer = AdaTaskAdam([*shared, *heads], num_tasks=3, check_finite=True)
    for place in ("jac", "grad"):
        give_jac(shared, 1)
        give_grad(heads, 1)
        if dist.get_rank() == 1:
            (local(shared[0].jac)[2] if place == "jac" else local(heads[0].grad)).view(-1)[0] = math.nan
        before = [local(p).clone() for p in (*shared, *heads)]
        found.append(told(optimizer.step, ValueError))
        assert same(before, [local(p) for p in (*shared, *heads)])
        assert not optimizer.state
    give_jac(shared, 1)
    if dist.get_rank() == 1:
        local(shared[0].jac)[1].view(-1)[0] = math.inf
    return [*found, told(lambda: clip_task_grad_norm_(shared, 1.0, error_if_nonfinite=True), RuntimeError)]


def jac_of_another_layout() -> list[str]:
    p = shards([new(1, 4, 3)])[0]
    optimizer = AdaTaskAdam([p], num_tasks=2)
    jacobian = normal(1, 2, 4, 3).float()
    found = []
    for wrong in (jacobian, shard(jacobian, p.device_mesh, Replicate()), shard(jacobian, p.device_mesh)):
        p.jac = wrong
        found.append(told(optimizer.step, ValueError))
    q: Any = nn.Parameter(normal(1, 4, 3).float())
    q.jac = like_sharded(local_jac(jacobian, p), p, 2)
    return [*found, told(AdaTaskAdam([q], num_tasks=2).step, ValueError)]


LAYOUT = r"AdaTaskAdam.step: parameter 0 of group 0: expected \.jac sharded like the parameter, "
REFUSED: dict[str, tuple[Callable[[], list[str]], list[str]]] = {
    "aligned-adatask-features": (
        no_features,
        [
            "task_backward: features: expected none, since the shared .* are shards",
            "AlignedMTL.weigh: shared: expected features, or parameters that are not sh",
            ".*features: expected none, since a head is sharded",
            r".*shared: expected parameters that keep their gradients, found \d+ that fully",
        ],
    ),
    "aligned-adatask-synchronisation": (
        no_synchronisation,
        3 * ["task_backward: shared: expected shards whose gradients are synchronised"],
    ),
    "adatask-not finite": (
        not_finite,
        [
            r".*NaN or infinity in \.jac of task 2",
            r".*parameter 4 of group 0: expected a finite \.grad",
            ".*found a norm of inf in task 1",
        ],
    ),
    "adatask-layout": (
        jac_of_another_layout,
        [*3 * [LAYOUT + r"a DTensor \[Shard\(dim=0\)\].*task_backward"], LAYOUT + "an ordinary tensor"],
    ),
}


@pytest.mark.parametrize("row", REFUSED)
def test_what_cannot_be_is_refused_on_all_ranks(row: str, two_ranks: Pool) -> None:
    what, words = REFUSED[row]
    all_told(two_ranks(what), words)


# ---- GradScaler ------------------------------------------------------------------------------------------------------


def scaled(kind: str, bad: bool, explicit: bool) -> Any:
    shared, heads = (shards(ps) for ps in shared_and_heads())
    # Not sharded, as what fully_shard ignores; torch's own unscale_ cannot have both.
    plain = [] if explicit else [new(20, 6)]
    optimizer = AdaTaskAdam([*shared, *heads, *plain], num_tasks=3)
    made: Any = torch.amp.GradScaler if kind == "plain" else ShardedGradScaler
    scaler = made("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    give_jac(shared, 1)
    give_grad([*heads, *plain], 1)
    if bad and dist.get_rank() == 0:
        local(shared[1].jac)[2].view(-1)[1] = math.inf
    wanted = [local(p.jac) / 8.0 for p in shared] + [local(p.grad) / 8.0 for p in (*heads, *plain)]
    before = [local(p).clone() for p in (*shared, *heads, *plain)]
    if explicit:
        with warnings.catch_warnings():  # torch's own, of ShardedGradScaler and DTensors
            warnings.filterwarnings("ignore", "Found a non-scalar tensor with numel=1")
            scaler.unscale_(optimizer)
        with pytest.raises(RuntimeError, match="found it scaled"):
            scaler.step(optimizer)
        unscale_jac_(scaler, optimizer)
        if not bad:
            clip_task_grad_norm_(shared, math.inf)
    else:  # what others see that ask as the scaler does
        assert not optimizer._step_supports_amp_scaling
        assert torch.nn.utils.clip_grad_norm_([p for p in shared if p.grad is not None], 1.0) == 0.0
    scaler.step(optimizer)
    found = [local(p.jac) for p in shared] + [local(p.grad) for p in (*heads, *plain)]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert same(before, [local(p) for p in (*shared, *heads, *plain)]) == bad
    assert all(p.grad is None for p in shared)
    scaler.update()
    return scaler.get_scale(), [unsharded(p) for p in shared]


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("kind", ["plain", "sharded"])
def test_adatask_scalers(kind: str, explicit: bool, ranks: Pool) -> None:
    """An infinity in a shard of one rank skips the step of all, which agree on the scale."""
    shared = shared_and_heads()[0]
    optimizer = AdaTaskAdam(shared, num_tasks=3)
    give_jac(shared, 1)
    for p in shared:
        p.jac /= 8.0  # type: ignore[attr-defined]
    optimizer.step()
    assert {scale for scale, _ in ranks(scaled, kind, True, explicit)} == {4.0}
    every = ranks(scaled, kind, False, explicit)
    assert {scale for scale, _ in every} == {8.0}
    assert all(same(found, shared) for _, found in every)
