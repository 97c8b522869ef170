"""Several ranks equal one process with their batches in one; what they send is counted; and what differs between them
is refused on all of them."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import mtlgrad
from mtlgrad import AlignedMTL, AlphaVIL, BayesAgg, Binary
from mtlgrad.alphavil import Task
from mtlgrad.bayesagg import aggregation
from mtlgrad.distributed import average_jacobians, global_means
from mtlgrad.ops import _native
from mtlgrad.optim import AdaTaskAdam, clip_task_grad_norm_, unscale_jac_
from mtlgrad.world.alike import digest
from mtlgrad.world.jacobians import is_averaged
from mtlgrad.world.ranks import ALONE, Averaging, name_of, world_of
from tests.support.bounds import (
    contents,
    hushed,
    random_state,
    same,
    same_random_state,
    same_values,
    seed_everything,
    state_tensors,
    values,
)
from tests.support.nets import (
    ADAM,
    ALPHA,
    INNER,
    KINDS,
    LAYERS,
    PAIRS,
    Case,
    NamedBatch,
    Net,
    Unsized,
    epoch,
    fill,
    fill_grad,
    inputs,
    make_adatask,
    new,
    packed,
    published_layer,
    unpacked,
)
from tests.support.oracles import recorder
from tests.support.ranks import (
    RULES,
    TRAIN,
    WIDTH,
    Asked,
    Plan,
    Pool,
    agree,
    all_told,
    batches_of_rank,
    by_rank,
    collectives,
    cut_batch,
    dataset,
    joined,
    joined_batch,
    labelled_batches,
    labelled_losses,
    labelled_net,
    laws,
    layers,
    of_all_ranks,
    part_here,
    parted_case,
    parts_of,
    place,
    see,
    see_quietly,
    shown,
    told,
    trained_layer,
    two_rounds,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- ranks equal one process: rules over the Gram matrix, task_backward, DDP -----------------------------------------

FORMS = ("layer", "merge", "merge features", "weigh", "weigh features")
#: Examples by rank; which task has no label on which rank.
CUTS: dict[int, list[tuple[list[int], dict[int, int]]]] = {
    2: [([5, 3], {}), ([1, 7], {0: 0}), ([4, 4], {1: 1})],
    4: [([2, 1, 3, 2], {}), ([1, 4, 2, 1], {0: 0, 2: 2}), ([2, 2, 2, 2], {3: 1})],
}


def merged(form: str, size: int) -> dict[str, Tensor]:
    """What a step of every rule leaves of every cut; on four ranks of the first: a rule sees the Gram matrix alone."""
    found = {}
    for i, (counts, absent) in enumerate(CUTS[size]):
        batch = part_here(cut_batch(labelled_batches(1, 11, seed=len(absent))[0], counts, absent), joined_batch)
        for name in RULES if size == 2 or i == 0 else ["min"]:
            found.update({f"{name} {i} {key}": v for key, v in merged_by(RULES[name](), form, batch).items()})
    return found


def merged_by(rule: mtlgrad.GramRule, form: str, batch: Any) -> dict[str, Tensor]:
    net = labelled_net()
    model = DistributedDataParallel(net) if dist.is_initialized() else net
    shared = list(net.backbone.parameters())
    if form.startswith("merge"):
        with no_sync(model):
            z = model(batch.x)
            given = z if "features" in form else None
            mtlgrad.task_backward(labelled_losses(net, [z, z, z], batch), shared, features=given)
        rule.merge(shared)
    else:
        z = model(batch.x)
        views = list(rule(z)) if form == "layer" else [z, z, z]
        losses = torch.stack(labelled_losses(net, views, batch))
        if form.startswith("weigh"):
            losses = rule.weigh(list(losses), z if "features" in form else shared) * losses
        losses.sum().backward()
    # One vector each: an entry's error is measured by the largest of all, also in a bias whose gradient nearly cancels.
    return {**{name: flat_gradient(m) for name, m in net.named_children()}, **shown(rule)}


def no_sync(model: Any) -> Any:
    return model.no_sync() if hasattr(model, "no_sync") else torch.enable_grad()


def flat_gradient(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def accumulated() -> dict[str, Any]:
    """Two micro-batches on a net that another method's gradients are left in; a sparse head; layers of which rank 1
    alone passes through the second, and none through the third; a task that no rank has."""
    net = labelled_net()
    for p in net.parameters():
        p.grad = torch.full_like(p, 0.5)
    for batch in labelled_batches(2, 8):
        part = part_here(cut_batch(batch, [2, len(batch.x) - 2]), joined_batch)
        z = net(part.x)
        mtlgrad.task_backward(labelled_losses(net, [z, z, z], part), net.backbone.parameters())
    found: dict[str, Any] = {"jac": [p.jac for p in net.backbone.parameters()]}  # type: ignore[union-attr]
    found["grad"] = [p.grad for p in net.parameters()]

    torch.manual_seed(0)
    table, backbone = nn.Embedding(5, 3, sparse=True), nn.Linear(3, 3)
    rows = part_here(torch.tensor([[0, 1], [1, 4]]), torch.flatten)
    z = backbone(torch.ones(len(rows), 3))
    mtlgrad.task_backward([(z * table(rows)).mean(), z.square().mean()], backbone.parameters())
    assert table.weight.grad is not None
    found["sparse"] = table.weight.grad.to_dense()

    several = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])
    passes = [several[0](x) for x in (torch.arange(12.0).view(2, 2, 3) / 10)]
    z = part_here([passes[0], several[1](passes[1])], torch.cat)
    mtlgrad.task_backward([z.square().mean(), z.sin().mean()], several.parameters())
    found["reached"] = [hasattr(p, "jac") for p in several.parameters()]
    assert found["reached"] == [True] * 4 + [False] * 2
    found["left out"] = several[1].weight.jac

    net, aligned, x = labelled_net(), AlignedMTL(3), torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    z = net(x)
    mtlgrad.task_backward([net.heads[0](z).mean(), None, net.heads[2](z).mean()], net.backbone.parameters())
    aligned.merge(net.backbone.parameters())
    assert net.heads[1].weight.grad is None
    return {**found, **shown(aligned), "nobody's": [p.grad for p in net.backbone.parameters()]}


class Deep(nn.Module):
    """Layers in two places, and parameters between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(6, 12), nn.Tanh())
        self.branches = nn.ModuleList([nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(2)])
        self.heads = nn.ModuleList([nn.Linear(12, 1) for _ in range(4)])
        self.lower, self.upper = AlignedMTL(2), nn.ModuleList([AlignedMTL(2) for _ in range(2)])

    def forward(self, x: Tensor, order: list[int]) -> Tensor:
        views = self.lower(self.first(x))
        inner = [view for i in (0, 1) for view in self.upper[i](self.branches[i](views[i]))]
        return torch.stack([self.heads[i](inner[i]).square().mean() for i in order]).sum()


def interleaved(find_unused: bool) -> dict[str, Tensor]:
    """Ranks whose backward passes come to the heads, and so to DDP's buckets, in different orders."""
    net: Any = Deep()
    model = net
    if dist.is_initialized():
        model = DistributedDataParallel(net, bucket_cap_mb=1e-4, find_unused_parameters=find_unused)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(5)
    for _ in range(10):
        x = torch.randn(4, 6, generator=generator)
        optimizer.zero_grad()
        model(part_here(x.split(2), torch.cat), [0, 1, 2, 3] if place()[0] == 0 else [3, 2, 1, 0]).backward()
        optimizer.step()
    return {"parameters": torch.cat(values(p.flatten() for p in net.parameters()))}


def layer_in(kind: str) -> dict[str, Tensor]:
    """The layer behind a backbone in DDP, compiled or under checkpointing; one process does without."""
    batch = part_here(cut_batch(labelled_batches(1, 11)[0], [5, 3]), joined_batch)
    net, aligned, several = labelled_net(), AlignedMTL(3), dist.is_initialized()
    backbone = DistributedDataParallel(net.backbone) if several else net.backbone

    def heads(z: Tensor) -> list[Tensor]:
        return [head(view) for head, view in zip(net.heads, aligned(z))]

    if several and kind == "compile":
        heads = torch.compile(heads, backend="aot_eager", fullgraph=True)

    def loss(x: Tensor) -> Tensor:
        return torch.stack([output.square().sum() for output in heads(backbone(x))]).sum() * place()[1]

    x = batch.x.requires_grad_()
    (checkpoint(loss, x, use_reentrant=False) if several and kind == "checkpoint" else loss(x)).backward()
    return {"gradient": flat_gradient(net.backbone), **shown(aligned)}


# ---- BayesAgg

ALL = list(KINDS)
# Fewer examples than weights, more for some heads, more for all; a task that is missing on a rank, everywhere, or
# (make's missing labels) partly; a rank with one example. The refreshes see uneven epochs.
PLANS: dict[str, Plan] = {
    "small": [
        ([4, 3], {}),
        ([3, 4], {0: ["regression"]}),
        None,
        ([4, 3], {}),
        ([6, 1], {1: ["binary"]}),
        ([2, 3], {0: ["multiclass"]}),
        None,
        ([1, 3], {0: ALL}),
        ([4, 4], {0: ["binary"], 1: ["binary"]}),
    ],
    "large": [
        ([20, 20], {}),
        None,
        ([8, 7], {}),
        ([24, 20], {0: ["regression"]}),
        ([39, 1], {1: ["binary"]}),
        None,
        ([1, 30], {0: ALL}),
        ([20, 22], {0: ["multiclass"], 1: ["multiclass"]}),
    ],
    "four": [
        ([4, 3, 2, 4], {}),
        None,
        ([2, 1, 3, 2], {2: ["binary"]}),
        ([20, 9, 1, 12], {0: ["regression"], 3: ["multiclass"]}),
        None,
        ([3, 3, 3, 1], {0: ALL, 1: ["regression"]}),
    ],
}


#: The noise is the regression's, the covariance the classifiers': each with every kind of statistics.
OPTIONS: list[dict[str, Any]] = [
    {"covariance": covariance, "statistics": statistics, "noise": (1.0, "estimated")[(i + j) % 2], "half_life": 2.0}
    for i, covariance in enumerate(("full", "block", "kron", "diag"))
    for j, statistics in enumerate(("stored", "streaming", "moving"))
]
OPTIONS.append({"moments": "sampled", "num_samples": 50})
OPTIONS_OF_FOUR: list[dict[str, Any]] = [
    {},
    {"covariance": "kron", "statistics": "streaming"},
    {"moments": "sampled"},
    {"statistics": "moving", "half_life": 2.0, "noise": "estimated", "bias": True, "reduction": "sum"},
]


def bayes_trained(plans: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for plan in plans:
        trained = trained_layer(PLANS[plan], options, DistributedDataParallel)
        found.update({f"{plan} {name}": value for name, value in trained.items()})
    return found


def one_after_the_other(statistics: str, covariance: str) -> dict[str, Any]:
    """Rank 0 sees a batch, the weights move, rank 1 sees one; after the refresh only rank 1 does. (The mean of streamed
    Kronecker posteriors depends on where the first batch was expanded: on one process, too.)"""
    data = dataset(30)
    heads, layer = layers(data, statistics=statistics, covariance=covariance)
    found = {}
    for number, parts in enumerate(([[slice(0, 7)], [slice(7, 20)]], [[], [slice(20, 25), slice(25, 30)]])):
        for rank, batches in enumerate(parts):
            for rows in batches:
                if not dist.is_initialized() or rank == dist.get_rank():
                    see_quietly(layer, [d.rows(rows) for d in data])
                with torch.no_grad():
                    for head in heads:
                        head.weight.mul_(0.9)
        layer.refresh()
        found.update({f"{number} {name}": tensors for name, tensors in laws(layer).items()})
    return found


def bayes_seen(kernels: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Batches of a float64 layer, in `dtype`, as seen and as :meth:`BayesAgg.aggregate` tells beforehand."""
    data = [d.to(torch.float64) for d in dataset(60)]
    _, layer = layers(data)
    found, at = [], 0
    with pytest.MonkeyPatch.context() as patch:
        if not kernels:
            patch.setitem(_native.KERNELS, "cpu", None)
        for sizes in ([6, 7], [3, 1], [14, 16]):
            batch = part_here(parts_of(data, at, sizes, {}), joined)
            told = layer.aggregate(batch[0].features.to(dtype), [d.targets for d in batch]) if at else None
            at += sum(sizes)
            seen = see(layer, batch, dtype)
            if told is None:
                layer.refresh()
                continue
            assert torch.equal(told.to(dtype), seen)  # the same pass twice is the same
            found.append(of_all_ranks(seen))
    return {"features": found}


def bayes_hard() -> dict[str, Any]:
    """Directions that the prior knows nothing of, a weak prior: float32 is not enough, and is left alike on all
    ranks."""
    data = dataset(40)
    for d in data:
        d.features = 100 * d.features
        d.features[:20, : WIDTH // 2] = 0
        d.weight[:, :WIDTH] /= 100 * WIDTH**0.5
    heads, _ = layers(data)
    layer = BayesAgg([LAYERS[d.kind](head, gamma=1e3) for d, head in zip(data, heads)])
    answers: list[bool] = []
    asked = aggregation._wants_float64

    def recorded(*arguments: Any) -> bool:
        answers.append(asked(*arguments))
        return answers[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aggregation, "_wants_float64", recorded)
        for at, sizes in ((0, [10, 10]), (20, [6, 2])):
            found = see(layer, part_here(parts_of(data, at, sizes, {}), joined))
            layer.refresh()
    assert sum(answers) == 3
    return {"features": of_all_ranks(found)}


def bayes_compiled() -> dict[str, Any]:
    """The layer and what follows in one graph, in which the ranks communicate; one process does not compile."""
    data = dataset(60)
    heads, layer = layers(data)

    def loss(features: Tensor, targets: list[Tensor], examples: Tensor) -> Tensor:
        """The losses' sums over all ranks' examples."""
        out = layer(features, targets)
        there = [~target.isnan() for target in targets[:2]]
        known = [target.nan_to_num() for target in targets[:2]]
        sums = [
            ((heads[0](out) - known[0]).square() * there[0]).sum(),
            F.binary_cross_entropy_with_logits(heads[1](out), known[1], there[1].float(), reduction="sum"),
            F.cross_entropy(heads[2](out), targets[2], reduction="sum"),
        ]
        return layer.total([one / examples for one in sums]) * 2

    several = dist.is_initialized()
    call = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True) if several else loss
    found, at = [], 0
    for sizes in ([6, 7], [4, 2], [14, 16]):
        batch = part_here(parts_of(data, at, sizes, {}), joined)
        at += sum(sizes)
        features = batch[0].features.clone().requires_grad_()
        call(features, [d.targets for d in batch], torch.tensor(sum(sizes) / place()[1])).backward()
        found.append(of_all_ranks(features.grad))
        if len(found) == 1:
            layer.refresh()
    return {"features": found[1:]}


# ---- alphaVIL


def vil_trained(inner: str, alpha: str, heads: Any, disagree: bool) -> dict[str, Any]:
    case = parted_case(*place(), disagree=disagree)
    found = two_rounds(case, make_optimizer=INNER[inner], alpha_optimizer=ALPHA[alpha], include_heads=heads)
    assert disagree or "search" in found["said"]
    return found


def vil_left_out() -> dict[str, Any]:
    """The second rank's rows alone pass through a layer, which has no gradient on the first."""
    case = parted_case(*place())
    case.model.extra = nn.Linear(6, 6)
    nn.init.constant_(case.model.extra.weight, 0.1)
    nn.init.zeros_(case.model.extra.bias)

    def loss(model: Any, batch: NamedBatch) -> Tensor:
        z = model(batch.x)
        start = (len(z), 0)[place()[0]] if dist.is_initialized() else TRAIN[2][batch.number][0]
        if model.training and start < len(z):
            z = torch.cat([z[:start], model.extra(z[start:])])
        has = ~batch.y.isnan()
        return global_means([(model.heads["size"](z).squeeze(1) - batch.y)[has].square()])[0]

    case.change("size", loss=loss)
    return two_rounds(case)


def closures() -> dict[str, Any]:
    """What an optimizer for alpha is told at several places: [calls, 1 + T]."""
    make, seen = recorder([torch.tensor([0.5, 1.5, 2.0]), torch.tensor([1.0, -1.0, 0.0])], lr=0.3)
    with hushed():
        parted_case(*place()).vil(alpha_optimizer=make).epoch()
    assert len(seen) == 2 * 2 * 3
    return {"losses": [torch.tensor(loss).double() for _, loss, _ in seen], "gradients": [g for *_, g in seen]}


# ---- AdaTask

ROWS = 14
COUNTS = {2: [13, 1], 4: [6, 1, 4, 3]}
#: torch.optim's eps: gradients of about that size would have their rounding blown up to whole steps; these have not.
SETTINGS: dict[str, dict[str, Any]] = {
    "adam": {"lr": 1e-3},
    "adamw": {"lr": 1e-3, "missing": "still", "amsgrad": True},
    "rmsprop": {"lr": 1e-3, "momentum": 0.9, "centered": True},
    "adagrad": {"lr": 1e-3, "missing": "still"},
}


def labels(step: int) -> list[Tensor]:
    """Task 1 has labels on the last rank alone, and every third step none at all; task 2 for some examples."""
    index = torch.arange(ROWS)
    return [index >= 0, (index == ROWS - 1) & (step % 3 != 2), index % 3 != 0]


def ada_trained(name: str, exact: bool) -> dict[str, Any]:
    """Uneven batches, a task without labels on all ranks but one, or on all; exact: in float64, with torch.optim's own
    settings and two micro-batches a step."""
    steps, dtype, micro, through = 20 if name == "adam" else 5, torch.float32, 1, name != "rmsprop"
    if exact:
        steps, dtype, micro, through = 5, torch.float64, 2, name != "adamw"
    net: Any = Net().to(dtype)
    model, cuts = net, [ROWS]
    if dist.is_initialized():
        model, cuts = DistributedDataParallel(net), COUNTS[dist.get_world_size()]
    optimizer = make_adatask(name, net.parameters(), **({"missing": "still"} if exact else SETTINGS[name]))
    for i in range(steps):
        optimizer.zero_grad()
        for k in range(micro):
            x, *masks = (by_rank(v, cuts)[place()[0]] for v in (inputs(ROWS, 100 * k + i).to(dtype), *labels(i + k)))
            with no_sync(model):
                z, losses = model(x)
                means = global_means([loss[mask] for loss, mask in zip(losses, masks)])
                mtlgrad.task_backward(means, net.shared, features=z if through else None)
        optimizer.step()
    shares = optimizer.dominance([net.shared])
    return {"parameters": values(net.parameters()), "shares": shares, **state_tensors(optimizer)}


EQUAL: dict[str, Asked] = {
    **{f"aligned-{form}-{size}": Asked(merged, (form, size), size) for form in FORMS for size in CUTS},
    "aligned-adatask-task_backward": Asked(accumulated, ()),
    **{f"aligned-buckets-{unused}": Asked(interleaved, (unused,)) for unused in (False, True)},
    **{f"aligned-{kind}": Asked(layer_in, (kind,)) for kind in ("compile", "checkpoint")},
    **{f"bayesagg-{'-'.join(map(str, o.values()))}": Asked(bayes_trained, (["small", "large"], o)) for o in OPTIONS},
    **{f"bayesagg-four-{i}": Asked(bayes_trained, (["four"], o), 4) for i, o in enumerate(OPTIONS_OF_FOUR)},
    **{
        f"bayesagg-refresh-{'-'.join(kind)}": Asked(one_after_the_other, kind, 2, {"bound": 1e-9})
        for kind in (("stored", "full"), ("stored", "kron"), ("streaming", "full"), ("streaming", "diag"))
    },
    "bayesagg-float64": Asked(bayes_seen, (True, torch.float64), 2, {"bound": 1e-11}),
    "bayesagg-no kernels": Asked(bayes_seen, (False, torch.float64), 2, {"bound": 1e-11}),
    "bayesagg-bfloat16": Asked(bayes_seen, (True, torch.bfloat16), 2, {"bound": 2.0**-8}),
    "bayesagg-hard": Asked(bayes_hard, ()),
    "bayesagg-compile": Asked(bayes_compiled, ()),
    # alpha - 1 is what is left of 1 + a small step, and of losses in float32
    **{
        f"alphavil-{inner}-{alpha}-{heads}{'-disagree' if disagree else ''}-{size}": Asked(
            vil_trained, (inner, alpha, heads, disagree), size, {"moved": 1e-5}
        )
        for inner, alpha, heads, disagree, sizes in (
            ("sgd", "sgd", "own", False, (2, 4)),
            ("sgd", "lbfgs", "own", False, (2, 4)),
            ("adam", "sgd", "own", False, (2, 4)),
            ("adam", "lbfgs", "own", False, (2, 4)),
            ("sgd", "lbfgs", "none", False, (2,)),
            ("adam", "sgd", "all", False, (2,)),
            ("sgd", "sgd", "own", True, (2, 4)),
        )
        for size in sizes
    },
    "alphavil-left out": Asked(vil_left_out, (), 2, {"moved": 1e-5}),
    "alphavil-closures_give_the_mean_loss": Asked(closures, ()),
    **{
        f"adatask-{name}-{size}": Asked(ada_trained, (name, False), size, {"bound": 1e-5, "parameters": 1e-6})
        for name in PAIRS
        for size in (2, 4)
    },
    **{
        f"adatask-{name}-exact": Asked(ada_trained, (name, True), 4, {"bound": 1e-11, "parameters": 1e-12})
        for name in PAIRS
    },
}


@Asked.each(EQUAL)
def test_ranks_equal_one_process(row: str, request: pytest.FixtureRequest) -> None:
    EQUAL[row].check(request)


def test_aligned_and_adatask_leaves_beside_parameters(two_ranks: Pool) -> None:
    """Inputs' gradients are each rank's own; a parameter that is used, but has no gradient, gets no .jac."""
    two_ranks(leaves)


class Nothing(torch.autograd.Function):
    """Uses a parameter, and has no gradient for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def leaves() -> None:
    for counts in ([2, 2], [1, 3]):
        torch.manual_seed(0)
        backbone, head, unused = nn.Linear(3, 3), nn.Linear(3, 1), nn.Parameter(torch.ones(2))
        x = torch.randn(counts[dist.get_rank()], 3).requires_grad_()
        z = Nothing.apply(backbone(x), unused)
        mtlgrad.task_backward([head(z).mean(), z.square().mean()], [*backbone.parameters(), unused])
        together = torch.autograd.grad([head(backbone(x)).mean() + backbone(x).square().mean()], x)[0]
        torch.testing.assert_close(x.grad, together)
        assert not hasattr(unused, "jac")


# ---- a part of the ranks ---------------------------------------------------------------------------------------------


def pair_jacobians(method: str, number: int, rank: int, size: int, pair: Any) -> dict[str, Any]:
    net, x = Net(), inputs(8, seed=number)
    x = by_rank(x, [5, 3] if size == 2 else [8])[rank]
    rule = AlignedMTL(3, process_group=pair)
    if method == "layer":
        z = net.backbone(x)
        each = [(head(view) - t).square() for t, (head, view) in enumerate(zip(net.heads, rule(z)))]
        torch.stack(global_means(each, process_group=pair)).sum().backward()
        return shown(rule)
    losses = global_means(net(x)[1], process_group=pair)
    mtlgrad.task_backward(losses, net.shared, process_group=pair)
    if method == "merge":
        rule.merge(net.shared)
        return {"grad": [p.grad for p in net.parameters()], **shown(rule)}
    optimizer = AdaTaskAdam(net.parameters(), num_tasks=3, eps=1e-3, process_group=pair)
    optimizer.step()
    return {"parameters": values(net.parameters()), **state_tensors(optimizer)}


def pair_bayes(number: int, rank: int, size: int, pair: Any) -> dict[str, Any]:
    data = dataset(30)
    _, layer = layers(data, process_group=pair)
    for at in (0, 7):
        parts = parts_of(data, at + 15 * number, [4, 3] if size == 2 else [7], {})
        found = see(layer, parts[rank])
        layer.refresh()
    return {"features": of_all_ranks(found, pair) if size == 2 else found}


def pair_vil(number: int, rank: int, size: int, pair: Any) -> dict[str, Any]:
    """Each with a number of stages of its own."""
    case = parted_case(rank, size, number, process_group=pair)
    return two_rounds(case, process_group=pair, alpha_epochs=1 + number)


PAIRED: dict[str, Callable[..., dict[str, Any]]] = {
    "aligned-layer": partial(pair_jacobians, "layer"),
    "aligned-merge": partial(pair_jacobians, "merge"),
    "bayesagg": pair_bayes,
    "alphavil": pair_vil,
    "adatask": partial(pair_jacobians, "step"),
}


def in_pairs(method: str) -> tuple[dict[str, Any], dict[str, Any], list[Any]]:
    """What two pairs of ranks find; and each rank alone, and what it then sends."""
    pair, _ = dist.new_subgroups(group_size=2)
    alone, _ = dist.new_subgroups(group_size=1)
    found = PAIRED[method](dist.get_rank() // 2, dist.get_rank() % 2, 2, pair)
    with collectives() as sent:
        return found, PAIRED[method](0, 0, 1, alone), sent


@pytest.mark.slow
@pytest.mark.parametrize("method", PAIRED)
def test_a_part_of_the_ranks(method: str, four_ranks: Pool) -> None:
    """Two pairs, each on data of its own; a rank alone is one process, and sends nothing."""
    together, alone, sent = zip(*four_ranks(in_pairs, method))
    for number in (0, 1):
        expected = PAIRED[method](number, 0, 1, None)
        agree(together[2 * number : 2 * number + 2], expected, moved=1e-5)
        if number == 0:
            agree(alone, expected, 0.0)
    assert not any(sent)


def copied() -> list[float]:
    found = []
    for size in (2, 1):
        group, _ = dist.new_subgroups(group_size=size)
        p = new(1, 3)
        optimizer = AdaTaskAdam([p], num_tasks=2, process_group=group)
        others = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
        saved = optimizer.state_dict()
        assert not [key for key in saved["param_groups"][0] if "group" in key]
        torch.save(saved, io.BytesIO())
        loaded = AdaTaskAdam([p], num_tasks=2, process_group=group)
        loaded.load_state_dict(saved)
        for each in (optimizer, *others, loaded):
            [q] = each.param_groups[0]["params"]
            q.jac = torch.full((2, 3), float(dist.get_rank()))
            if size == 2:
                with pytest.raises(RuntimeError, match="mean over the 2 ranks, found this rank's own"):
                    each.step()
                average_jacobians([q], process_group=group)
                found.append(float(q.jac[0, 0]))
                with pytest.raises(RuntimeError, match=r"the mean over the 4 ranks"):
                    AdaTaskAdam([q], num_tasks=2).step()
            each.step()
    return found


@pytest.mark.slow
def test_adatask_groups_are_in_copies_and_never_in_what_is_saved(four_ranks: Pool) -> None:
    assert four_ranks(copied) == [[0.5] * 4] * 2 + [[2.5] * 4] * 2


def groups() -> None:
    first, second = world_of(None), world_of(None)
    assert first == second
    assert first != ALONE
    assert first.name != dist.group.WORLD.group_name
    alone, _ = dist.new_subgroups(group_size=1)
    assert world_of(name_of("test", alone)) == ALONE
    pair, _ = dist.new_subgroups(group_size=2)
    found = world_of(name_of("test", pair))
    assert (found.size, found.rank) == (2, dist.get_rank() % 2)
    backend = torch.device("cpu")
    timeout = dist.group.WORLD._get_backend(backend).options._timeout
    assert first.group._get_backend(backend).options._timeout == timeout
    if "sort_ranks" not in inspect.signature(dist.new_group).parameters:
        return  # an older torch sorts them always
    world = world_of(name_of("test", dist.new_group([3, 1, 0, 2], sort_ranks=False)))
    every = world.gather_rows(torch.full((1,), float(world.rank)), [1] * 4)
    assert every.tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.slow
def test_groups_are_of_the_packages_own(four_ranks: Pool) -> None:
    four_ranks(groups)


GROUPED: dict[str, Callable[[Any], Any]] = {
    "aligned": lambda group: AlignedMTL(2, process_group=group),
    "bayesagg": lambda group: BayesAgg([Binary(nn.Linear(3, 1))], process_group=group),
    "alphavil": lambda group: Case().vil(process_group=group),
    "adatask": lambda group: AdaTaskAdam([new(1, 3)], num_tasks=2, process_group=group),
}


@pytest.mark.parametrize("method", GROUPED)
def test_a_process_group_is_one(method: str) -> None:
    with pytest.raises(TypeError, match=r"process_group: expected a torch.distributed process group, found str"):
        GROUPED[method]("world")


def one_alone(method: str) -> float:
    """Rank 0 uses .jac of its own where the other does nothing: in a group that nobody has used yet."""
    both, start = dist.new_group([0, 1]), 0.0
    if dist.get_rank() == 0:
        p = nn.Parameter(torch.zeros(3))
        p.jac = torch.ones(2, 3)  # type: ignore[attr-defined]

        def use(group: Any) -> None:
            if method == "adatask":
                AdaTaskAdam([p], num_tasks=2, lr=1.0, process_group=group).step()
            else:
                AlignedMTL(2, process_group=group).merge([p])

        told(lambda: use(both), RuntimeError, "process_group=")
        use(dist.new_group([0], use_local_synchronization=True))
        start = float((p if p.grad is None else p.grad).detach().abs().sum())
    dist.barrier()
    return start


@pytest.mark.parametrize("method", ["aligned", "adatask"])
def test_one_rank_alone_is_told_and_does_not_wait(method: str, two_ranks: Pool) -> None:
    first, second = two_ranks(one_alone, method)
    assert first > 0.0 == second


# ---- bytes -----------------------------------------------------------------------------------------------------------

Calls = list[tuple[str, int]]


def sent_by_rules() -> list[tuple[Any, Any]]:
    """docs/guide/ddp.md, and AdaTask's step."""
    net, tasks, found = labelled_net(), 3, []
    shared, heads = list(net.backbone.parameters()), list(net.heads.parameters())
    numbers, others = (sum(p.numel() for p in ps) for ps in (shared, heads))
    world_of(None)  # what makes the group is not a step's communication
    batch = labelled_batches(1, 11)[0]
    expected = {
        "layer": {"all_reduce": 8 * tasks**2},
        "weigh features": {"all_reduce": 8 * tasks**2},
        "weigh": {"all_reduce": 4 * tasks * numbers},
        "merge": {"all_reduce": 4 * (tasks * numbers + others + len(shared)) + 24 * len(heads), "all_gather": 8},
        "adatask": {},
    }
    for form, wanted in expected.items():
        aligned, optimizer, z = AlignedMTL(3), AdaTaskAdam(net.parameters(), num_tasks=3), net(batch.x)
        with collectives() as means:
            losses = labelled_losses(net, [z, z, z], batch)
        assert means == [("all_reduce", 8 * tasks)]
        views = aligned(z)
        if form == "adatask":
            mtlgrad.task_backward(losses, shared)
        with collectives() as sent:
            if form == "merge":
                mtlgrad.task_backward(losses, shared)
                aligned.merge(shared)
            elif form == "layer":
                torch.stack([view.sum() for view in views]).sum().backward()
            elif form == "adatask":
                optimizer.step()
            else:
                aligned.weigh(losses, z if form == "weigh features" else shared)
        counts: Counter[str] = Counter()
        for name, size in sent:
            counts[name] += size
        found.append((dict(counts), wanted))
    return found


def numbers_in_sums(kind: str, covariance: str, rows: int, width: int, parted: bool = False) -> int:
    """What the guide says: of a residual and a precision."""
    if kind == "regression":
        return rows * width + (rows if parted else 1) * width**2
    wide = width + 1
    if covariance == "diag":
        return 2 * rows * wide
    if kind == "binary" or covariance == "block":
        return rows * wide + rows * wide**2
    return rows * wide + ((rows * wide) ** 2 if covariance == "full" else rows**2 + wide**2 + 1)


def sent_by_bayes(options: dict[str, Any], missing: float = 0.0) -> list[tuple[Any, Any]]:
    """docs/methods/bayesagg.md."""
    width, rows, covariance, sampled = WIDTH, 3, options["covariance"], options.get("moments") == "sampled"

    def sums(kinds: Sequence[str], size: int = 8) -> Calls:
        numbers = sum(numbers_in_sums(kind, covariance, rows, width, missing > 0) for kind in kinds)
        parted = [("all_gather", 8)] if "regression" in kinds else []
        return [*parted, ("all_reduce", size * numbers)] if kinds else []

    def sums_of_batch(kinds: Sequence[str]) -> Calls:
        if not sampled:
            return sums(kinds)
        return [*sums([k for k in kinds if k == "regression"]), *sums([k for k in kinds if k != "regression"], 4)]

    few = {"regression"}
    if not sampled:
        few |= {"binary"} if covariance != "diag" else set()
        few |= {"multiclass"} if covariance in ("full", "block") else set()
    others = [kind for kind in LAYERS if kind not in few]

    def gathered(longest: int) -> tuple[str, int]:
        target = {"regression": 4 * rows, "binary": 4 * rows, "multiclass": 8}
        return "all_gather", longest * (4 * width + sum(target[kind] for kind in few))

    asked = ("all_gather", 32)
    weights = [("all_reduce", 8 * 2 * rows * (width + 1))] if options.get("statistics") == "streaming" else []
    refresh = [("all_gather", 16), ("all_gather", 8), *weights, *sums(list(LAYERS))]
    expected: list[Calls] = [
        *([], [], refresh),
        *([asked, gathered(4), *sums_of_batch(others)], []),
        *([asked, *sums_of_batch(list(LAYERS))], []),
        [asked, ("all_gather", 8), gathered(3), *sums_of_batch(others)],
    ]

    data = dataset(100, missing=missing)
    _, layer = layers(data, **options)
    found: list[Calls] = []

    with collectives() as sent:

        def note() -> None:
            found.append(list(sent))
            sent.clear()

        for at, sizes in ((0, [3, 4]), (7, [3, 4]), (14, [40, 23])):
            batch = parts_of(data, at, sizes, {})[dist.get_rank()]
            features = batch[0].features.clone().requires_grad_()
            total = layer.total([layer(features, [d.targets for d in batch]).square().sum()])
            note()
            total.backward()
            _ = layer.task_weights, layer.gradient_variance
            layer.predict(features)
            layer.eval()
            layer(features)
            layer.train()
            note()
            if not at:
                layer.refresh()
                note()
        # After a state was loaded the ranks ask each other once whether it was the same.
        layer.load_state_dict(layer.state_dict())
        layer.aggregate(features[:3], [d.targets[:3] for d in batch])
        note()
    return list(zip(found, expected, strict=True))


def sent_by_vil(alpha: str, norm: bool) -> list[tuple[Any, Any]]:
    """docs/guide/alphavil.md, a stage at a time."""
    case = Case(norm=norm)
    looks = 0
    loss = case.tasks["size"].loss

    def looked(model: Any, batch: NamedBatch) -> Tensor:
        nonlocal looks
        looks += torch.is_grad_enabled() and not model.training
        return loss(model, batch)

    case.change("size", loss=looked)
    vil = case.vil(alpha_optimizer=ALPHA[alpha])
    tasks = len(case.tasks)
    tensors, buffers = [*case.model.parameters(), *case.model.buffers()], list(case.model.buffers())
    still = [p for p in case.model.parameters() if not p.requires_grad]
    shared = [p for n, p in case.model.named_parameters() if p.requires_grad and not n.startswith("heads")]
    found: list[tuple[Any, Any]] = []
    with collectives() as sent, hushed():
        for number in range(2):
            for stage in vil.stages():
                expected = [("all_gather", 8)]
                if number == 0 and stage.number == 1:
                    expected += [("all_gather", 8), ("all_reduce", 16 * len(tensors))]
                if stage.kind == "train":
                    trains = [*shared, *case.model.heads[stage.task].parameters()]
                    step = [("all_reduce", 8 * len(trains)), ("all_reduce", 4 * sum(p.numel() for p in trains))]
                    expected += [("all_gather", 8), *(4 * step)]
                    expected += [("all_reduce", 8 * (len(buffers) + len(still)))]
                    if norm:  # two of 8 floats, a counter
                        expected += [("all_reduce", 2 * 8 * 4), ("all_reduce", 8)]
                    expected += [("all_reduce", 16)]
                elif stage.kind == "evaluate":
                    expected += 2 * [("all_gather", 8), ("all_reduce", 8)]
                elif stage.kind == "alpha":
                    expected += [("all_gather", 8), *(looks * [("all_reduce", 8 * (tasks + 1))])]
                    expected += [("all_reduce", 8 * tasks), ("all_gather", 8), ("all_reduce", 8)]
                found.append((list(sent), expected))
                sent.clear()
                looks = 0
    assert len(found) == 14
    return found


SENT: dict[str, tuple[Callable[..., list[tuple[Any, Any]]], tuple[Any, ...]]] = {
    "aligned-adatask": (sent_by_rules, ()),
    **{
        f"bayesagg-{covariance}-{statistics}": (sent_by_bayes, ({"covariance": covariance, "statistics": statistics},))
        for covariance in ("full", "block", "kron", "diag")
        for statistics in ("stored", "streaming")
    },
    "bayesagg-missing": (sent_by_bayes, ({"covariance": "full"}, 0.3)),
    "bayesagg-sampled": (sent_by_bayes, ({"covariance": "block", "moments": "sampled", "num_samples": 4},)),
    "alphavil-norm": (sent_by_vil, ("sgd", True)),
    "alphavil-lbfgs": (sent_by_vil, ("lbfgs", False)),
}


@pytest.mark.parametrize("row", SENT)
def test_bytes_are_what_the_guides_say(row: str, two_ranks: Pool) -> None:
    """Of every collective, in their order, what a rank gives to it."""
    what, arguments = SENT[row]
    for pairs in two_ranks(what, *arguments):
        for sent, expected in pairs:
            assert sent == expected


# ---- what differs between ranks is refused on all --------------------------------------------------------------------


def other_tasks() -> list[str]:
    """A loss that is None or constant on one rank; a head that one rank does not reach; others of the same shapes."""
    found = []
    for kind in ("none", "constant", "features"):
        net = labelled_net()
        z = net(torch.randn(4, 6))
        losses: list[Tensor | None] = [net.heads[t](z).mean() for t in range(3)]
        if dist.get_rank() == 1:
            losses[1] = None if kind == "none" else torch.zeros(())
        use = partial(mtlgrad.task_backward, losses, features=z if kind == "features" else None)
        found.append(told(partial(use, net.backbone.parameters()), RuntimeError))
        assert not any(hasattr(p, "jac") or p.grad is not None for p in net.parameters())
    torch.manual_seed(0)
    backbone, heads = nn.Linear(3, 3), nn.ModuleList([nn.Linear(3, 1) for _ in range(2)])
    z = backbone(torch.ones(2, 3))
    partly = [heads[0](z).mean() if dist.get_rank() else z.sum(), z.square().sum()]
    use = partial(mtlgrad.task_backward, partly, retain_graph=True)
    found.append(told(partial(use, backbone.parameters()), RuntimeError))
    others = [heads[dist.get_rank()](z).mean(), z.mean()]
    for features in (None, z):
        use = partial(mtlgrad.task_backward, others, features=features, retain_graph=True)
        found.append(told(partial(use, backbone.parameters()), RuntimeError))
    assert not any(hasattr(p, "jac") or p.grad is not None for p in [*backbone.parameters(), *heads.parameters()])
    return found


def not_finite() -> list[str]:
    first, second = AlignedMTL(2, check_finite=True)(torch.ones(3, 2, requires_grad=True))
    factor = torch.nan if dist.get_rank() == 0 else 1.0
    return [told((first.sum() + factor * second.square().sum()).backward, ValueError)]


def own_jacobians(name: str) -> list[str]:
    """.jac of one rank alone; after the mean neither clipping nor zeroing makes it one's own."""
    found = []
    for tasks in (3, 1):
        p, head = new(1, 5), new(2, 3)
        optimizer = make_adatask(name, [head, p], tasks)
        fill([p], dist.get_rank(), tasks)
        fill_grad([head], 1)
        before = values([p, head])
        found.append(told(optimizer.step, RuntimeError))
        assert same(before, [p, head])
        assert not optimizer.state_dict()["state"]
        average_jacobians([p, head])
        average_jacobians([p])  # once is enough
        assert is_averaged(p.jac, None)  # type: ignore[attr-defined]
        if tasks == 3:
            norms = clip_task_grad_norm_([p], 1e-3)
            assert (norms > 1e-3).any()
            assert is_averaged(p.jac, None)  # type: ignore[attr-defined]
        optimizer.step()
        parts = [torch.empty_like(p) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, p.detach())
        assert same(parts, [p] * len(parts))
        optimizer.zero_grad(set_to_none=False)
        assert is_averaged(p.jac, None)  # type: ignore[attr-defined]
    return found


def own_jacobian_merged() -> list[str]:
    p, aligned = nn.Parameter(torch.zeros(3)), AlignedMTL(2)
    p.jac = torch.full((2, 3), float(dist.get_rank()))  # type: ignore[attr-defined]
    found = [told(lambda: aligned.merge([p]), RuntimeError)]
    q = nn.Parameter(torch.zeros(2, 2))
    q.jac = torch.full((2, 2, 2), float(dist.get_rank()))  # type: ignore[attr-defined]
    average_jacobians([p, nn.Parameter(torch.zeros(1)), q])
    aligned.merge([p, q], retain_jac=True)
    assert all(bool((each.jac == 0.5).all()) for each in (p, q))  # type: ignore[attr-defined]
    two = nn.ParameterList([torch.zeros(3), torch.zeros(3)])
    two[dist.get_rank()].jac = torch.ones(2, 3)
    return [*found, told(lambda: average_jacobians(two), RuntimeError)]


def a_mean_that_was_written_into() -> list[str]:
    """What others add to a mean is this rank's own again; what keeps it a mean is not."""
    rank = float(dist.get_rank())
    p = nn.Parameter(torch.zeros(3))
    optimizer = AdaTaskAdam([p], num_tasks=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    p.jac = torch.full((2, 3), rank)  # type: ignore[attr-defined]
    found = [told(lambda: clip_task_grad_norm_([p], 1.0), RuntimeError)]
    scaler.scale(torch.zeros(()))
    found.append(told(lambda: scaler.step(optimizer), RuntimeError))
    scaler.unscale_(optimizer)
    found.append(told(lambda: unscale_jac_(scaler, optimizer), RuntimeError))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    average_jacobians([p])
    scaler.scale(torch.zeros(()))
    scaler.unscale_(optimizer)
    unscale_jac_(scaler, optimizer)
    clip_task_grad_norm_([p], 0.1)
    optimizer.step()
    p.jac += rank  # type: ignore[attr-defined]  # as TorchJD accumulates
    found.append(told(optimizer.step, RuntimeError))
    average_jacobians([p])
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    return found


def bayes_refused(how: str) -> list[str]:
    rank = dist.get_rank()
    data = dataset(40)
    heads, layer = layers(data, moments="sampled" if how == "passes" else "exact")
    batch = parts_of(data, 0, [5, 3], {})[rank]
    if how == "nothing seen":
        return [told(layer.refresh, RuntimeError)]
    see(layer, batch)
    if how == "weights":
        with torch.no_grad():
            heads[1].weight.mul_(1.0 + 0.01 * rank)  # trained without DistributedDataParallel
        return [told(layer.refresh, RuntimeError)]
    layer.refresh()
    before = layer.state_dict()
    if how == "posteriors":
        state = layer.state_dict()
        if rank:
            wrong = unpacked(state["_extra_state"])
            wrong["posteriors"][1]["residual"] *= 1.5
            state["_extra_state"] = packed(wrong)
        layer.load_state_dict(state)
    if how == "loaded by one":
        see(layer, parts_of(data, 14, [9, 5], {})[rank])
        layer.refresh()
        for state in (None, before):  # its own state is no other
            if rank == 0:
                layer.load_state_dict(state or layer.state_dict())
            layer._number = 7
            if state is None:
                see(layer, batch)
    if how == "passes" and rank:
        see_quietly(layer, batch)
    if how == "dtypes" and rank:
        for d in batch:
            d.features = d.features.double()
    return [told(lambda: see(layer, batch), RuntimeError)]


def vil_models() -> list[str]:
    """DistributedDataParallel, whose module is the way out; and shards."""
    case = parted_case(*place())
    plain, found = case.model, []
    for wrap in (DistributedDataParallel, lambda model: nn.Sequential(DistributedDataParallel(model))):
        case.model = wrap(plain)
        found.append(told(case.vil, TypeError))
    # The way out, with hooks of DDP on the parameters.
    wrapped = DistributedDataParallel(plain, find_unused_parameters=True)
    wrapped(torch.ones(2, 5)).sum().backward()
    plain.zero_grad()
    case.model = plain
    vil = case.vil()
    assert epoch(vil).kept == "search"
    fully_shard(plain, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    found += [told(attempt, TypeError) for attempt in (case.vil, vil.epoch)]

    model = nn.Sequential(nn.Embedding(5, 1, sparse=True))
    nn.init.constant_(model[0].weight, 0.5)
    batch = torch.tensor([1, 3])
    task = Task([batch], lambda model, batch: model(batch).square().mean(), [batch])
    return [*found, told(AlphaVIL(model, [task], 0, make_optimizer=INNER["sgd"]).epoch, TypeError)]


def vil_counts(what: str) -> list[str]:
    """Rank 1 has a batch less; for "streams", a task's on one rank has no length."""
    case, rank = parted_case(*place()), dist.get_rank()
    name = "kind" if what == "train" else "size"
    own = case.tasks[name]
    if rank == 1:
        case.change(name, **{what: list(getattr(own, what))[:-1]})
    vil, before, numbers = case.vil(), contents(case.model), random_state()
    texts = [told(vil.epoch, ValueError), told(vil.epoch, ValueError)]
    # The stage that failed is as if it had not been, and what is left can be made good.
    assert same_values(contents(case.model), before)
    if what == "dev":
        return texts
    assert vil.state_dict()["stage"] == 1
    assert epoch(case.vil(subset=2)).sat_out == []
    assert epoch(case.vil(subset=0.3)).sat_out == []
    if rank == 0:
        case.change("kind", train=Unsized(list(own.train)[:-1]))  # not compared, and as many
    seed_everything(3)
    assert epoch(case.vil(subset=2)).sat_out == []
    assert not same_random_state(numbers, random_state())
    return texts


def vil_out_of_step() -> list[str]:
    case, rank = parted_case(*place()), dist.get_rank()
    found = []
    head = case.model.heads["kind"]
    with torch.no_grad():
        head.weight.mul_(1 + 1e-4 * rank)
    found.append(told(case.vil().epoch, ValueError))
    with torch.no_grad():
        dist.broadcast(head.weight, 0)
    case.model.register_buffer("extra", torch.full((2,), rank))
    found.append(told(case.vil().epoch, ValueError))
    case.model.extra.zero_()
    vil = case.vil()
    next(iter(vil.stages()))
    vil.task_weights = [1.0, 1.0, 1.0 + rank]
    found.append(told(vil.epoch, RuntimeError))
    vil.task_weights = [1.0, 1.0, 1.0]
    saved = vil.state_dict()
    next(iter(vil.stages()))
    if rank == 1:
        vil.load_state_dict(saved)
    found.append(told(vil.epoch, RuntimeError))
    vil.load_state_dict(saved)
    with torch.no_grad():
        head.bias.add_(rank)
    found.append(told(vil.epoch, ValueError))
    with torch.no_grad():
        dist.broadcast(head.bias, 0)
    assert epoch(vil).kept == "search"
    head.weight.requires_grad_(rank == 0)
    found.append(told(vil.epoch, RuntimeError))
    case.model.heads["kind"].weight.requires_grad_(False)
    found.append(told(case.vil(include_heads=("own", "none")[rank], alpha_epochs=1).epoch, RuntimeError))
    return found


TASKS_ALIKE = r"task_backward: expected the same tasks with a loss on all ranks, found "
MEAN = r"expected \.jac that is the mean over the 2 ranks, found this rank's own.*average_jacobians.*process_group="
BATCHES = (
    "AlphaVIL: tasks: '{}': {}: expected the same number of batches on all ranks, "
    "found {} on rank 1 and {} on rank 0; split the examples"
)
BAYES = {
    "nothing seen": r"BayesAgg.refresh: expected at least one training batch since the last refresh, found none on any",
    "weights": r"BayesAgg.refresh: expected the same weights of the heads on all ranks, found .* on rank 0 and .* on "
    r"rank 1; train the model in DistributedDataParallel, or give process_group=",
    "posteriors": r"BayesAgg: expected the same full-data posterior on all ranks, .*; load the same checkpoint",
    "loaded by one": r"BayesAgg: expected the same full-data posterior on all ranks",
    "passes": r"BayesAgg: expected the same number of passes on all ranks, found 2 on rank 0 and 3 on rank 1; every",
    "dtypes": r"BayesAgg: expected the same dtypes .*, found torch.float32 and .* on rank 0 and torch.float64",
}
REFUSED: dict[str, tuple[Callable[..., list[str]], tuple[Any, ...], list[str]]] = {
    "aligned-adatask-heads": (
        other_tasks,
        (),
        [
            *3 * [TASKS_ALIKE + "task 0, task 1, task 2 .* task 0, task 2 .* on rank 1; .*global_means"],
            TASKS_ALIKE,
            *2 * [r"task_backward: losses: expected to reach the same heads in the same"],
        ],
    ),
    "aligned-not finite": (not_finite, (), [".*task 1"]),
    "aligned-jac": (
        own_jacobian_merged,
        (),
        [f"AlignedMTL.merge: {MEAN}", r"average_jacobians: expected the same parameters with \.jac on all ranks"],
    ),
    **{
        f"adatask-jac-{name}": (own_jacobians, (name,), 2 * [f"{pair[0].__name__}.step: {MEAN}"])
        for name, pair in PAIRS.items()
    },
    "adatask-a_mean_that_was_written_into": (a_mean_that_was_written_into, (), 4 * [f".*: {MEAN}"]),
    **{f"bayesagg-{how}": (bayes_refused, (how,), [words]) for how, words in BAYES.items()},
    "alphavil-models": (
        vil_models,
        (),
        [
            *2 * [r".*model: expected the plain module, .*; give its \.module$"],
            *2 * [r".*expected parameters that are whole on each rank, .* the DTensor first"],
            r".*tasks: '0': loss: expected dense gradients .*, found a sparse one of shape",
        ],
    ),
    "alphavil-train": (vil_counts, ("train",), 2 * [BATCHES.format("kind", "train", 2, 3)]),
    "alphavil-dev": (vil_counts, ("dev",), 2 * [BATCHES.format("size", "dev", 1, 2)]),
    "alphavil-out of step": (
        vil_out_of_step,
        (),
        [
            ".*model: expected the same parameters and buffers on all ranks, found heads.kind.weight with n",
            ".*found extra with norms from 0 to 1.414214; load the same checkpoint",
            r".*found stage 2 of round 1, .*weights \[1.0, 1.0, 2.0\]",
            ".*expected the same stage on all ranks, found stage 3 of round 1, .*on rank 0 and stage 2 of round 1, ",
            ".*found heads.kind.bias with norms from ",
            ".*found stage 1 of round 2, (?=.*12 parameters to train)(?=.*11 parameters to train)",
            ".*expected the same model, heads and frozen parameters on all ranks, found 15 par",
        ],
    ),
}


@pytest.mark.parametrize("row", REFUSED)
def test_what_differs_between_ranks_is_refused_on_all(row: str, two_ranks: Pool) -> None:
    what, arguments, words = REFUSED[row]
    all_told(two_ranks(what, *arguments), words)


def without_no_sync(features: bool) -> list[Tensor] | str:
    """A mistake: DDP synchronises the first pass, and waits for the rest. Never a wrong gradient, unseen."""
    net = labelled_net()
    several = dist.is_initialized()
    model: Any = DistributedDataParallel(net) if several else net
    part = part_here(cut_batch(labelled_batches(1, 8)[0], [2, 3]), joined_batch)
    shared = list(net.backbone.parameters())
    try:
        z = model(part.x)
        mtlgrad.task_backward(labelled_losses(net, [z, z, z], part), shared, features=z if features else None)
        found = [p.jac for p in shared]
        model(part.x)
    except RuntimeError as error:
        return str(error)
    return found


@pytest.mark.parametrize("features", [True, False])
def test_aligned_and_adatask_without_no_sync(features: bool, two_ranks: Pool) -> None:
    for found in two_ranks(without_no_sync, features):
        if isinstance(found, str):
            assert "reduction in the prior iteration" in found or "marked as ready twice" in found
        else:
            agree([{"jac": found}], {"jac": without_no_sync(features)})


# ---- states ----------------------------------------------------------------------------------------------------------


def bayes_resumed() -> None:
    """An epoch, a refresh, and one more, from states that were saved after so many passes."""
    for statistics in ("stored", "streaming"):
        runs = []
        for stop in (None, 1, 3, 4):
            data = dataset(60)
            heads, layer = layers(data, statistics=statistics)
            found = []
            for i in range(6):
                if i == stop:
                    state = layer.state_dict()
                    layer = published_layer(layer.heads, statistics=statistics)
                    layer.load_state_dict(state)
                if i in (2, 4):
                    layer.refresh()
                found.append(see(layer, parts_of(data, 8 * i, [5, 3], {})[dist.get_rank()]))
                with torch.no_grad():
                    for head in heads:
                        head.weight.mul_(0.98)
            runs.append(found)
        assert all(same(runs[0], run) for run in runs)


def shuffled(number: int) -> tuple[Case, AlphaVIL, list[torch.Generator]]:
    """Each rank with data, generators and random numbers of its own; those of another number are elsewhere."""
    case, generators = Case(norm=True, dropout=0.3, noise=0.1, also=True), []
    for name, task in list(case.tasks.items()):
        loaders: dict[str, Any] = {}
        for what, batches in (("train", task.train), ("dev", task.dev)):
            if batches is not None:
                for batch in batches:
                    batch.x.add_(0.2 * dist.get_rank())
                generators.append(torch.Generator().manual_seed(number + len(generators)))
                loaders[what] = DataLoader(batches, batch_size=None, shuffle=True, generator=generators[-1])  # type: ignore[arg-type]
        case.change(name, **loaders)
    with torch.no_grad():
        for tensor in (*case.model.parameters(), *case.model.buffers()):
            tensor.add_(min(number, 1))
    options = {"make_optimizer": ADAM, "alpha_optimizer": ALPHA["adam"], "clip_alpha": (0.5, 1.5)}
    vil = case.vil(subset=2, **options)
    seed_everything(100 * number + dist.get_rank())
    return case, vil, generators


def vil_resumed() -> None:
    """Saved after every stage of two rounds: a new process's run goes on from there."""
    saved: list[bytes] = []
    finals = []
    for number in range(15):
        case, vil, generators = shuffled(number)
        if number:
            state = torch.load(io.BytesIO(saved[number - 1]), weights_only=True)
            case.model.load_state_dict(state["model"])
            vil.load_state_dict(state["vil"])
        with hushed():
            while vil.rounds < 2:
                for _ in vil.stages():
                    if number == 0:
                        file = io.BytesIO()
                        torch.save({"model": case.model.state_dict(), "vil": vil.state_dict()}, file)
                        saved.append(file.getvalue())
        assert vil.last is not None
        told = [vil.last.before, vil.last.start, vil.last.after, *vil.last.searched, *vil.last.losses]
        states = [g.get_state() for g in generators]
        finals.append((contents(case.model), [vil.task_weights, vil.alphas, *states], told, random_state()))
        assert same_values(finals[-1][0], finals[0][0]), f"resumed after stage {number}"
        assert same(finals[-1][1], finals[0][1])
        assert told == finals[0][2]
        assert same_random_state(finals[-1][3], finals[0][3])
    assert len(saved) == 14
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, finals[0])
    assert same_values(everyone[0][0], everyone[1][0])
    assert everyone[0][2] == everyone[1][2]
    assert not same_random_state(everyone[0][3], everyone[1][3])


@pytest.mark.parametrize("what", [pytest.param(bayes_resumed, id="bayesagg"), pytest.param(vil_resumed, id="alphavil")])
def test_every_rank_resumes_from_its_own_state(what: Callable[[], None], two_ranks: Pool) -> None:
    """In the same bits."""
    two_ranks(what)


def bayes_an_epoch() -> Any:
    data = dataset(30)
    _, layer = layers(data)
    see(layer, part_here(parts_of(data, 0, [9, 5], {}), joined))
    layer.refresh()
    return layer.state_dict()


def bayes_goes_on(state: Any) -> dict[str, Tensor]:
    data = dataset(30)
    _, layer = layers(data)
    layer.load_state_dict(state)
    return {"features": of_all_ranks(see(layer, part_here(parts_of(data, 20, [2, 4], {}), joined)))}


def test_bayesagg_between_epochs_any_number_of_ranks_goes_on(two_ranks: Pool) -> None:
    first, second = two_ranks(bayes_an_epoch)
    agree(two_ranks(bayes_goes_on, first), bayes_goes_on(second))
    agree([bayes_goes_on(first)], bayes_goes_on(bayes_an_epoch()))


def uneven_warm_up() -> int:
    data = dataset(40)
    _, layer = layers(data, moments="sampled", num_samples=10)
    for _ in range(1 + dist.get_rank()):
        see_quietly(layer, [d.rows(slice(0, 4)) for d in data])
    layer.refresh()
    see(layer, [d.rows(slice(0, 4)) for d in data])
    return int(unpacked(layer.get_extra_state())["number"])


def test_bayesagg_passes_of_the_warm_up_may_differ(two_ranks: Pool) -> None:
    """Their number seeds the samples: after the refresh it is one again."""
    assert two_ranks(uneven_warm_up) == [3, 3]


# ---- alphaVIL's buffers ----------------------------------------------------------------------------------------------


class Noted(nn.Module):
    """Its buffers, in training, are told by the batch what to become."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 1)
        nn.init.constant_(self.line.weight, 0.5)
        nn.init.constant_(self.line.bias, 0.1)
        self.register_buffer("some", torch.zeros(3, 2).t())
        self.register_buffer("pair", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("flag", torch.tensor([False, False]))
        self.register_buffer("mask", torch.full((2,), -math.inf))
        self.register_buffer("wave", torch.zeros(2, dtype=torch.complex64))

    def forward(self, batch: dict[str, Any]) -> Tensor:
        for name, value in batch.items():
            if name not in ("x", "y") and self.training:
                self.get_buffer(name).copy_(torch.as_tensor(value))
        return F.mse_loss(self.line(batch["x"]), batch["y"])


def noted(
    own: list[dict[str, Any]], dev: Sequence[float] = (1.0, 1.0), rule: str = "mean"
) -> tuple[nn.Module, AlphaVIL]:
    """Tasks "a", the target, and "b", whose buffers become own[rank]; dev: factors of the target's y."""
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.3, -2.0]])
    plain: dict[str, Any] = {"x": x, "y": x.sum(1, keepdim=True) + 0.2}
    judged = {**plain, "y": plain["y"] * dev[place()[0]]}
    model = Noted()
    call: Any = nn.Module.__call__
    tasks = {"a": Task([plain], call, [judged]), "b": Task([{**plain, **own[place()[0]]}], call)}
    return model, AlphaVIL(model, tasks, "a", make_optimizer=INNER["sgd"], alpha_epochs=2, buffers=rule)


def buffers(own: list[dict[str, Any]], rule: str = "mean") -> tuple[dict[str, Tensor], list[int], dict[str, Tensor]]:
    model, vil = noted(own, rule=rule)
    with hushed():
        stages = vil.stages()
        next(stages), next(stages)
        merged = vil.state_dict()["buffers"]["merged"]
        last = vil.epoch()
    return merged, last.sat_out, contents(model)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("mean", {"some": [[1.5] * 3] * 2, "pair": [0.5, 1.5], "wave": [2j, 2j], "count": 9, "flag": [True, False]}),
        ("target", {"some": [[2.0] * 3] * 2, "pair": [0.0, 0.0], "wave": [0j, 0j], "count": 4, "flag": [False, False]}),
    ],
)
def test_alphavil_buffers_are_the_mean_or_the_largest(rule: str, expected: dict[str, Any], two_ranks: Pool) -> None:
    """What is not averaged is the first rank's."""
    own = [{"some": 2.0, "count": 4}, {"some": 1.0, "pair": [1.0, 3.0], "wave": 4j, "count": 9}]
    own[rule == "target"]["flag"] = [True, False]
    found = two_ranks(buffers, own, rule)
    for merged, out, after in found:
        assert not out
        assert {name: value.tolist() for name, value in merged.items()} == expected
        assert rule == "target" or same_values(merged, {name: after[name] for name in merged})
    assert same_values(found[0][2], found[1][2])


def batch_norm() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A training at a learning rate of zero: what its buffers become, and what this rank's would be alone."""
    case = Case(tasks=["size"], norm=True, count=3)
    train: Any = batches_of_rank(case.tasks["size"].train, [(8, 8), (9, 7), (10, 6)], place()[0])
    case.change("size", train=train)
    alone = Case(norm=True).model.train()
    seed_everything(place()[0])
    for i in torch.randperm(3).tolist():
        alone(train[i].x)
    vil = case.vil(make_optimizer=partial(torch.optim.SGD, lr=0.0))
    seed_everything(place()[0])  # each rank takes its batches in an order of its own
    next(iter(vil.stages()))
    return vil.state_dict()["buffers"]["merged"], dict(alone.named_buffers())


def test_alphavil_batch_norm(two_ranks: Pool) -> None:
    (first, own), (second, others) = two_ranks(batch_norm)
    assert same_values(first, second)
    for name in ("norm.running_mean", "norm.running_var"):
        assert not torch.equal(own[name], others[name])
        torch.testing.assert_close(first[name], (own[name] + others[name]) / 2, rtol=1e-6, atol=1e-7)
    assert int(first["norm.num_batches_tracked"]) == 3


# ---- not finite on one rank ------------------------------------------------------------------------------------------


def nan_in_data(task: str, rank: int) -> dict[str, Any]:
    case = parted_case(*place())
    if dist.get_rank() == rank:
        case.tasks[task].train[1].x[0, 0] = math.nan  # type: ignore[index]
    return two_rounds(case)


@pytest.mark.parametrize(("task", "number", "rank"), [("kind", 1, 1), ("size", 0, 0)])
def test_alphavil_nan_on_one_rank_sits_out_on_all(task: str, number: int, rank: int, two_ranks: Pool) -> None:
    first, second = two_ranks(nan_in_data, task, rank)
    assert first.pop("said")[1::2] == second.pop("said")[1::2] == [[number]] * 2
    assert same_values(first, second)
    assert first["weights"][number] == 1.0
    assert all(v.isfinite().all() for n, v in first.items() if n != "losses")


def nan_in_buffers() -> None:
    for name in ("some", "pair", "wave"):
        _, out, after = buffers([{"count": 5}, {name: math.nan}])
        assert out == [1]
        assert bool(after[name].isfinite().all())
        assert int(after["count"]) == 3


def nan_in_development() -> None:
    model, vil = noted([{}, {}], [1.0, math.nan])
    before = contents(model)
    told(vil.epoch, ValueError, "dev: expected a finite loss", "found nan")
    assert same_values(before, contents(model))


def test_alphavil_nan_in_one_ranks_buffer_and_development_loss(two_ranks: Pool) -> None:
    two_ranks(nan_in_buffers)
    two_ranks(nan_in_development)


class Wild(torch.optim.SGD):
    """On rank 1 its last step of a pass leads to NaN, and none of the others'."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        self.steps += 1
        (first, *_) = self.param_groups[0]["params"]
        if dist.get_rank() == 1 and self.steps == (2 if first.dtype == torch.float64 else 3):
            with torch.no_grad():
                first.mul_(math.nan)


def wild(what: str) -> list[Any]:
    case = parted_case(*place())
    with hushed():
        last = case.vil(**{what: partial(Wild, lr=0.1)}).epoch()
    moved = float(case.model.first.bias.detach().sum())
    return [last.kept, last.sat_out, str(last.searched), last.after, moved]


@pytest.mark.parametrize(
    ("what", "expected"),
    [("make_optimizer", ["none", [0, 1, 2], "[]"]), ("alpha_optimizer", ["start", [], "[nan]"])],
)
def test_alphavil_nan_of_one_ranks_optimizer(two_ranks: Pool, what: str, expected: list[Any]) -> None:
    first, second = two_ranks(wild, what)
    assert first == second
    assert first[:3] == expected


def scaled(bad: bool, explicit: bool) -> tuple[float, bool]:
    p, head = new(1, 5), nn.Parameter(torch.ones(2))
    optimizer = AdaTaskAdam([p, head], num_tasks=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    fill([p], 1)
    if bad and dist.get_rank() == 1:
        p.jac[2, 3] = math.inf  # type: ignore[attr-defined]
    average_jacobians([p])
    before = p.detach().clone()
    if explicit:
        scaler.unscale_(optimizer)
        unscale_jac_(scaler, optimizer)
        clip_task_grad_norm_([p], 1.0)
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale(), torch.equal(p, before)


@pytest.mark.parametrize("explicit", [False, True])
def test_adatask_scaler(explicit: bool, two_ranks: Pool) -> None:
    """An infinity on one rank is in the mean, and skips the step of all."""
    assert two_ranks(scaled, True, explicit) == [(2.0, True)] * 2
    assert two_ranks(scaled, False, explicit) == [(4.0, False)] * 2


# ---- mtlgrad.distributed and mtlgrad.world ---------------------------------------------------------------------------


def means(counts: list[list[int]]) -> list[float]:
    own = counts[dist.get_rank()]
    columns = [(torch.arange(n, dtype=torch.float64) + 10 * dist.get_rank()).requires_grad_() for n in own]
    losses = global_means(columns)
    torch.stack(losses).sum().backward()
    for value, column in zip(columns, zip(*counts)):
        expected = torch.full_like(value, dist.get_world_size() / max(sum(column), 1))
        torch.testing.assert_close(value.grad, expected, rtol=1e-15, atol=0)
    return [float(loss.detach()) for loss in losses]


@pytest.mark.parametrize("counts", [[[4, 2, 0], [4, 3, 0]], [[5, 0, 1], [1, 2, 1]]])
def test_global_means(two_ranks: Pool, counts: list[list[int]]) -> None:
    found = two_ranks(means, counts)
    for t in range(3):
        every = [i + 10.0 * r for r in range(2) for i in range(counts[r][t])]
        expected = sum(every) / len(every) if every else 0.0
        assert sum(loss[t] for loss in found) / 2 == pytest.approx(expected, rel=1e-14)


def test_global_means_of_one_process() -> None:
    found = global_means({"a": torch.tensor([1.0, 3.0]), "b": torch.empty(0)})
    assert {name: float(value) for name, value in found.items()} == {"a": 2.0, "b": 0.0}
    with pytest.raises(TypeError, match="values: expected tensors, found NoneType for task 1"):
        global_means([torch.ones(2), None])  # type: ignore[list-item]


def rows() -> None:
    world = world_of(None)
    assert world.size == dist.get_world_size()
    assert world.rank == dist.get_rank()
    count = 3 * world.rank
    counts = [row[0] for row in world.gather_numbers([count], torch.device("cpu"))]
    assert counts == [3 * r for r in range(world.size)]
    every = world.gather_rows(torch.full((count, 2), float(world.rank)), counts)
    assert every[:, 0].tolist() == [float(r) for r in range(world.size) for _ in range(3 * r)]
    # more than a bucket, several dtypes, not contiguous, empty, scalar
    tensors = [torch.full(s, float(world.rank)) for s in ((9_000_000,), (7, 3), (0,), (), (5,))]
    tensors += [torch.full((4, 6), float(world.rank)).t(), torch.full((3,), float(world.rank), dtype=torch.float64)]
    averaging = Averaging(world)
    averaging.add(tensors)
    averaging.wait()
    for tensor in tensors:
        assert torch.equal(tensor, torch.full_like(tensor, (world.size - 1) / 2))


def test_collectives(ranks: Pool) -> None:
    ranks(rows)


def test_digests_are_of_the_whole_text() -> None:
    """Ranks whose models differ in their last layer alone must not seem alike."""
    assert digest("a" * 10_000 + "b") != digest("a" * 10_000 + "c")
