"""The layer on several ranks is the layer of one process with the ranks' batches in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import mtlgrad
from mtlgrad import BayesAgg
from mtlgrad.bayesagg import aggregation
from tests.support.bounds import assert_near
from tests.support.nets import LAYERS, HeadData, Model, published_layer
from tests.support.ranks import WIDTH, Pool, by_rank, dataset, joined, layers, parts_of, rows_agree, see, see_quietly

pytestmark = pytest.mark.usefixtures("one_thread")


class Layered(Model):
    """A backbone, a head of each kind, and the layer between."""

    def __init__(self, data: Sequence[HeadData], noise: float | str = 1.0, bias: bool = False, **options: Any):
        width = data[0].features.shape[1]
        super().__init__(
            lambda: nn.Sequential(nn.Linear(width, 10), nn.Tanh(), nn.Linear(10, width)),
            heads=[len(d.weight) for d in data],
            width=width,
        )
        torch.manual_seed(0)
        powers = {"regression": 0.5, "binary": 1.0, "multiclass": 0.7}
        more: dict[str, dict[str, Any]] = {"regression": {"noise": noise, "bias": bias}}
        listed = [
            LAYERS[d.kind](head, gamma=0.3, power=powers[d.kind], **more.get(d.kind, {}))
            for d, head in zip(data, self.heads)
        ]
        self.layer = published_layer(listed, **options)

    def forward(self, inputs: Tensor, targets: list[Tensor]) -> tuple[Tensor, list[Tensor]]:  # type: ignore[override]
        features = self.backbone(inputs)
        if features.requires_grad:
            features.retain_grad()
        out = self.layer(features, targets)
        return features, [head(out) for head in self.heads]


def values_of(data: Sequence[HeadData], outputs: Sequence[Tensor]) -> list[Tensor]:
    """The losses of each head's labelled examples."""
    found = []
    for d, z in zip(data, outputs):
        there = d.labelled
        if d.kind == "multiclass":
            found.append(functional.cross_entropy(z[there], d.targets[there], reduction="none"))
        elif d.kind == "binary":
            found.append(functional.binary_cross_entropy_with_logits(z[there], d.targets[there], reduction="none"))
        else:
            found.append((z[there] - d.targets[there]).square())
    return found


Step = tuple[list[int], dict[int, list[str]]]  # rank -> examples; rank -> kinds without any label there


def dataset_for(plan: Sequence[Step | None], width: int = WIDTH) -> list[HeadData]:
    return dataset(sum(sum(step[0]) for step in plan if step), width)


def run(plan: Sequence[Step | None], options: dict[str, Any], width: int, rank: int | None) -> dict[str, list[Any]]:
    """Trains through the plan, None being a refresh, as one rank of DDP or, without one, as one process."""
    data = dataset_for(plan, width)
    net: Any = Layered(data, **options)
    layer = net.layer
    if rank is not None:
        net = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    gradients, at = [], 0
    for step in plan:
        if step is None:
            layer.refresh()
            continue
        parts = parts_of(data, at, *step)
        at += sum(step[0])
        batch = joined(parts) if rank is None else parts[rank]
        optimizer.zero_grad()
        features, outputs = net(batch[0].features, [d.targets for d in batch])
        losses = (
            mtlgrad.distributed.global_means(values_of(batch, outputs))
            if rank is not None
            else [v.sum() / max(v.numel(), 1) for v in values_of(batch, outputs)]
        )
        (layer.total(losses) * 0.5).backward()
        optimizer.step()
        gradients.append(features.grad)
    state = layer.posteriors
    return {
        "features": gradients,
        "parameters": [p.detach().clone() for p in net.parameters()],
        "means": [] if state is None else [p.mean for p in state],
        "covariances": [] if state is None else [m for p in state for m in listed_of(p.covariance())],
    }


def listed_of(matrix: Any) -> list[Tensor]:
    return list(matrix) if isinstance(matrix, tuple) else [matrix]


def as_rank(plan: Sequence[Step | None], options: dict[str, Any], width: int) -> dict[str, list[Any]]:
    return run(plan, options, width, dist.get_rank())


def compare(plan: Sequence[Step | None], options: dict[str, Any], width: int, ranks: Pool, tolerance: float) -> None:
    alone = run(plan, options, width, None)
    together = ranks(as_rank, plan, options, width)
    steps = [step for step in plan if step]
    for step, expected, *found in zip(steps, alone["features"], *(one["features"] for one in together)):
        for rank, (part, mine) in enumerate(zip(by_rank(expected, step[0]), found)):
            # Losses that are averaged over the ranks: gradients at a rank's own features are W times as large.
            error = (mine / ranks.size - part).abs().max() / expected.abs().max()
            assert error <= tolerance, f"rank {rank}: error {float(error):.3g}"
    for name in ("parameters", "means", "covariances"):
        for rank in together:
            for found, expected in zip(rank[name], alone[name], strict=True):
                assert_near(found, expected, tolerance)
        for mine, other in zip(together[0][name], together[1][name]):
            assert torch.equal(mine, other)


ALL = ["regression", "binary", "multiclass"]
# Fewer examples than weights, more for some heads, more for all; a task that is missing on a rank, everywhere, or
# (make's missing labels) partly; a rank with one example. The refreshes see uneven epochs.
SMALL: list[Step | None] = [
    ([4, 3], {}),
    ([3, 4], {0: ["regression"]}),
    None,
    ([4, 3], {}),
    ([6, 1], {1: ["binary"]}),
    ([2, 3], {0: ["multiclass"]}),
    None,
    ([1, 3], {0: ALL}),
    ([4, 4], {0: ["binary"], 1: ["binary"]}),
]
LARGE: list[Step | None] = [
    ([20, 20], {}),
    None,
    ([8, 7], {}),
    ([24, 20], {0: ["regression"]}),
    ([39, 1], {1: ["binary"]}),
    None,
    ([1, 30], {0: ALL}),
    ([20, 22], {0: ["multiclass"], 1: ["multiclass"]}),
]
FOUR: list[Step | None] = [
    ([4, 3, 2, 4], {}),
    None,
    ([2, 1, 3, 2], {2: ["binary"]}),
    ([20, 9, 1, 12], {0: ["regression"], 3: ["multiclass"]}),
    None,
    ([3, 3, 3, 1], {0: ALL, 1: ["regression"]}),
]
PLANS = {"small": SMALL, "large": LARGE}


@pytest.mark.parametrize("noise", [1.0, "estimated"])
@pytest.mark.parametrize("statistics", ["stored", "streaming", "moving"])
@pytest.mark.parametrize("covariance", ["full", "block", "kron", "diag"])
@pytest.mark.parametrize("plan", PLANS)
def test_training_on_two_ranks(
    two_ranks: Pool, plan: str, covariance: str, statistics: str, noise: float | str
) -> None:
    options = {"covariance": covariance, "statistics": statistics, "noise": noise, "half_life": 2.0}
    compare(PLANS[plan], options, WIDTH, two_ranks, 1e-6)


@pytest.mark.parametrize("plan", PLANS)
def test_weight_samples_are_the_same_on_all_ranks(two_ranks: Pool, plan: str) -> None:
    compare(PLANS[plan], {"moments": "sampled", "num_samples": 50}, WIDTH, two_ranks, 1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"covariance": "kron", "statistics": "streaming"},
        {"moments": "sampled"},
        {"statistics": "moving", "half_life": 2.0, "noise": "estimated", "bias": True, "reduction": "sum"},
    ],
)
def test_training_on_four_ranks(four_ranks: Pool, options: dict[str, Any]) -> None:
    compare(FOUR, options, WIDTH, four_ranks, 1e-6)


# ---- what the layer does without a backbone


def one_after_the_other(statistics: str, covariance: str, single: bool) -> list[Any]:
    """Rank 0 sees a batch, the weights move, rank 1 sees one; after the refresh only rank 1 does."""
    data = dataset(30)
    heads, layer = layers(data, statistics=statistics, covariance=covariance)
    found = []
    for epoch in ([[slice(0, 7)], [slice(7, 20)]], [[], [slice(20, 25), slice(25, 30)]]):
        for rank, batches in enumerate(epoch):
            for rows in batches:
                if single or rank == dist.get_rank():
                    see_quietly(layer, [d.rows(rows) for d in data])
                with torch.no_grad():
                    for head in heads:
                        head.weight.mul_(0.9)
        layer.refresh()
        assert layer.posteriors is not None
        found += [[p.mean, *listed_of(p.covariance())] for p in layer.posteriors]
    return found


# (The mean of streamed Kronecker posteriors depends on where the first batch was expanded: on one process, too.)
@pytest.mark.parametrize(
    ("statistics", "covariance"), [("stored", "full"), ("stored", "kron"), ("streaming", "full"), ("streaming", "diag")]
)
def test_refresh_where_ranks_began_at_other_weights_or_had_nothing(
    two_ranks: Pool, statistics: str, covariance: str
) -> None:
    expected = one_after_the_other(statistics, covariance, True)
    for rank in two_ranks(one_after_the_other, statistics, covariance, False):
        for mine, theirs in zip(rank, expected, strict=True):
            for found, wanted in zip(mine, theirs, strict=True):
                assert_near(found, wanted, 1e-9)


def gradients_of(counts: list[list[int]], kernels: bool, dtype: torch.dtype, rank: int | None) -> list[Tensor]:
    """Of batches of the same layer, in `dtype`, as seen and as :meth:`BayesAgg.aggregate` tells beforehand."""
    from mtlgrad.ops import _native

    rank = dist.get_rank() if rank is None else rank
    data = [d.to(torch.float64) for d in dataset(60)]
    _, layer = layers(data)
    before = dict(_native.KERNELS)
    if not kernels:
        _native.KERNELS["cpu"] = None
    found, at = [], 0
    try:
        for i, sizes in enumerate(counts):
            parts = parts_of(data, at, sizes, {})
            at += sum(sizes)
            batch = joined(parts) if rank < 0 else parts[rank]
            told = None
            if i:
                told = layer.aggregate(batch[0].features.to(dtype), [d.targets for d in batch])
            seen = see(layer, batch, dtype)
            if told is None:
                layer.refresh()
            else:
                # The weights are samples or not: the same pass twice is the same.
                assert torch.equal(told.to(dtype), seen)
                found.append(seen)
    finally:
        _native.KERNELS.update(before)
    return found


@pytest.mark.parametrize("kernels", [True, False])
def test_float64_and_without_kernels(two_ranks: Pool, kernels: bool) -> None:
    counts = [[6, 7], [3, 1], [14, 16]]
    together = two_ranks(gradients_of, counts, kernels, torch.float64, None)
    rows_agree(counts, gradients_of(counts, kernels, torch.float64, -1), together, 1e-11)


def test_half_precision_features(two_ranks: Pool) -> None:
    counts = [[6, 7], [3, 1], [14, 16]]
    together = two_ranks(gradients_of, counts, True, torch.bfloat16, None)
    rows_agree(counts, gradients_of(counts, True, torch.bfloat16, -1), together, 2.0**-8)


def hard(rank: int | None) -> list[Tensor]:
    """Directions that the prior knows nothing of, a weak prior: float32 is not enough, and is left alike on all
    ranks."""
    rank = dist.get_rank() if rank is None else rank
    data = dataset(40)
    for d in data:
        d.features = 100 * d.features
        d.features[:20, : WIDTH // 2] = 0
        d.weight[:, :WIDTH] /= 100 * WIDTH**0.5
    heads, _ = layers(data)
    layer = BayesAgg([LAYERS[d.kind](head, gamma=1e3) for d, head in zip(data, heads)])
    found, answers, asked = [], [], aggregation._wants_float64

    def recorded(*arguments: Any) -> bool:
        answers.append(asked(*arguments))
        return answers[-1]

    aggregation._wants_float64 = recorded
    try:
        for at, sizes in ((0, [10, 10]), (20, [6, 2])):
            parts = parts_of(data, at, sizes, {})
            found.append(see(layer, joined(parts) if rank < 0 else parts[rank]))
            layer.refresh()
    finally:
        aggregation._wants_float64 = asked
    assert sum(answers) == 3
    return found[1:]


def test_where_float32_is_not_enough(two_ranks: Pool) -> None:
    rows_agree([[0], [6, 2]], hard(-1), two_ranks(hard, None), 1e-6)


def in_groups(rank: int | None) -> list[Tensor]:
    """Ranks 0 and 1 train together, and 2 and 3: each pair on data of its own."""
    pair = rank is None
    rank = dist.get_rank() if rank is None else rank
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])] if pair else [None, None]
    which = rank // 2
    data = dataset(30)
    _, layer = layers(data, **({"process_group": groups[which]} if pair else {}))
    found = []
    for at in (0, 7):
        parts = parts_of(data, at + 15 * which, [4, 3], {})
        found.append(see(layer, parts[rank % 2] if pair else joined(parts)))
        layer.refresh()
    return found[1:]


def test_ranks_that_train_together_are_those_of_the_group(four_ranks: Pool) -> None:
    together = four_ranks(in_groups, None)
    for which in (0, 1):
        rows_agree([[0], [4, 3]], in_groups(2 * which), together[2 * which : 2 * which + 2], 1e-6)


def compiled_gradients(rank: int | None) -> list[Tensor]:
    """The layer and what follows in one graph; the ranks communicate in it."""
    single = rank is not None
    data = dataset(60)
    heads, layer = layers(data)

    def loss(features: Tensor, targets: list[Tensor], examples: Tensor) -> Tensor:
        """The losses' sums over all ranks' examples."""
        out = layer(features, targets)
        there = [~target.isnan() for target in targets[:2]]
        known = [target.nan_to_num() for target in targets[:2]]
        sums = [
            ((heads[0](out) - known[0]).square() * there[0]).sum(),
            functional.binary_cross_entropy_with_logits(heads[1](out), known[1], there[1].float(), reduction="sum"),
            functional.cross_entropy(heads[2](out), targets[2], reduction="sum"),
        ]
        return layer.total([one / examples for one in sums]) * 2

    call = loss if single else torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    found, at = [], 0
    for sizes in ([6, 7], [4, 2], [14, 16]):
        parts = parts_of(data, at, sizes, {})
        at += sum(sizes)
        batch = joined(parts) if single else parts[dist.get_rank()]
        features = batch[0].features.clone().requires_grad_()
        examples = torch.tensor(sum(sizes) / (1.0 if single else len(sizes)))
        call(features, [d.targets for d in batch], examples).backward()
        assert features.grad is not None
        found.append(features.grad)
        if len(found) == 1:
            layer.refresh()
    return found[1:]


def test_compiled(two_ranks: Pool) -> None:
    rows_agree([[], [4, 2], [14, 16]], compiled_gradients(0), two_ranks(compiled_gradients, None), 1e-6)


# ---- FSDP2


def sharded(plan: Sequence[Step | None], options: dict[str, Any], wrap_heads: bool) -> list[Tensor]:
    rank = dist.get_rank()
    data = dataset_for(plan)
    net = Layered(data, **options)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(net.backbone, mesh=mesh)
    for head in net.heads if wrap_heads else ():
        fully_shard(head, mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    at = 0
    for step in plan:
        if step is None:
            net.layer.refresh()
            continue
        batch = parts_of(data, at, *step)[rank]
        at += sum(step[0])
        optimizer.zero_grad()
        _, outputs = net(batch[0].features, [d.targets for d in batch])
        (net.layer.total(mtlgrad.distributed.global_means(values_of(batch, outputs))) * 0.5).backward()
        optimizer.step()
    assert [z.shape[1] for z in net.layer.predict(batch[0].features)] == [3, 3, 3]
    return [p.full_tensor().detach() for p in net.parameters()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("wrap_heads", [True, False])
@pytest.mark.parametrize("statistics", ["stored", "streaming"])
def test_fully_sharded(two_ranks: Pool, statistics: str, wrap_heads: bool) -> None:
    plan = SMALL[:6]
    options = {"statistics": statistics}
    expected = run(plan, options, WIDTH, None)["parameters"]
    for found in two_ranks(sharded, plan, options, wrap_heads):
        for mine, theirs in zip(found, expected, strict=True):
            assert_near(mine, theirs)


# ---- what the backward needs not


def test_the_backward_takes_the_weights_of_the_forward() -> None:
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
