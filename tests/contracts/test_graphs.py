"""CUDA graphs and streams: captured steps are those that eager ones take, and every operation runs on the stream that
is current, and only there. They need a GPU."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlgrad
from mtlgrad import AlignedMTL, ops
from tests.conftest import HAS_GPU
from tests.ops.test_moments import binary, multiclass, regression
from tests.support.bounds import flat, near, normal
from tests.support.nets import METHODS, PAIRS, Batch, Bayes, Model, batch
from tests.support.oracles import procrustes

pytestmark = pytest.mark.skipif(not HAS_GPU, reason="no usable GPU")
#: Adagrad has no capturable step for heads.
CAPTURABLE = ["adam", "adamw", "rmsprop"]


# ---- graphs ----------------------------------------------------------------------------------------------------------


def static(data: Batch) -> Batch:
    return Batch(data.x.clone(), [y.clone() for y in data.y])


def captured(step: Callable[[], None], warm_up: int = 3) -> torch.cuda.CUDAGraph:
    """Some steps on another stream, then the capture, as torch's documentation has it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


class Steps:
    """A net, what trains it, and a step of both."""

    def __init__(self, method: str):
        self.method, self.model, self.aligned = method, Model().cuda(), AlignedMTL(3).cuda()
        made = PAIRS[method][0] if method in PAIRS else torch.optim.Adam
        tasks = {"num_tasks": 3} if method in PAIRS else {}
        self.optimizer: Any = made(self.model.parameters(), lr=0.01, capturable=True, **tasks)

    def __call__(self, data: Batch) -> None:
        model, aligned = self.model, self.aligned
        self.optimizer.zero_grad()  # inside the graph: .grad and .jac are its own memory
        features = model.backbone(data.x)
        losses = model.losses(aligned(features) if self.method == "layer" else features, data.y)
        if self.method == "layer":
            torch.stack(losses).sum().backward()
        elif self.method == "weigh":
            (aligned.weigh(losses, features) * torch.stack(losses)).sum().backward()
        else:
            mtlgrad.task_backward(losses, model.shared, features=features)
        if self.method == "merge":
            aligned.merge(model.shared)
        self.optimizer.step()


def alike(one: Model, other: Model) -> bool:
    return all(near(a.detach(), b.detach(), 1e-4) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    "method",
    ["layer", "merge", "weigh", *CAPTURABLE],
    ids=lambda name: f"adatask {name}" if name in PAIRS else f"aligned {name}",
)
def test_whole_steps(method: str) -> None:
    """Backward, alignment, optimizer: all of it, replayed on batches that are copied into place."""
    eager, other = Steps(method), Steps(method)
    place = static(batch(device="cuda"))
    graph = captured(lambda: other(place))
    for _ in range(3):  # what the warm-up has done
        eager(place)
    for i in range(5):
        data = batch(seed=10 + i, device="cuda")
        eager(data)
        for to, value in zip((place.x, *place.y), (data.x, *data.y)):
            to.copy_(value)
        graph.replay()
        if method not in CAPTURABLE:
            assert near(other.aligned.weights, eager.aligned.weights, 1e-4)  # type: ignore[arg-type]
            assert int(other.aligned.rank) == 3  # type: ignore[arg-type]
        assert alike(other.model, eager.model)
    if method in CAPTURABLE:
        assert near(other.optimizer.dominance(), eager.optimizer.dominance(), 1e-4)


def test_aligned_merge_alone() -> None:
    parameters = [nn.Parameter(torch.zeros(s, device="cuda")) for s in (1000, 33)]
    aligned = AlignedMTL(3)
    jacs = [torch.zeros(3, p.numel(), device="cuda") for p in parameters]

    def fill(seed: int) -> Tensor:
        for i, jac in enumerate(jacs):
            jac.copy_(normal(seed + i, *jac.shape))
        return procrustes(flat([j.cpu() for j in jacs], 3)).update

    def merge() -> None:
        for p, jac in zip(parameters, jacs):
            p.jac, p.grad = jac, None  # type: ignore[attr-defined]
        aligned.merge(parameters)

    fill(0)
    graph = captured(merge, 1)
    for seed in (10, 20):
        want = fill(seed)
        graph.replay()
        assert near(flat([p.grad for p in parameters]), want, 1e-6)  # type: ignore[misc]


@pytest.mark.parametrize("method", ["aligned layer", "bayesagg", "aligned merge", "adatask adam"])
def test_graphed_parts(method: str) -> None:
    """torch.cuda.make_graphed_callables of the backbone, everything else outside. task_backward goes through it T
    times, with retain_graph."""
    trainers = [METHODS[method](Model().cuda()) for _ in range(2)]
    model = trainers[1].model
    # A copy: its first steps move nothing of the model's.
    example = batch(device="cuda").x
    model.backbone = torch.cuda.make_graphed_callables(model.backbone, (example.clone(),))
    for i in range(Bayes.warm_up + 3):
        data = batch(seed=i, device="cuda")
        for trainer in trainers:
            trainer.step(data)
    assert alike(model, trainers[0].model)


def test_bayesagg_is_not_captured() -> None:
    """Its statistics are kept by Python, which a replay does not run."""
    trainer: Any = Bayes(Model().cuda())
    place = static(batch(device="cuda"))
    trainer.step(place)
    model, before = trainer.model, copy.deepcopy(trainer.model.state_dict())

    def losses() -> Tensor:
        features = trainer.bayes(model.backbone(place.x), place.y)
        return trainer.bayes.total(model.losses(features, place.y))  # type: ignore[no-any-return]

    refused = pytest.raises(RuntimeError, match=r"BayesAgg: expected .*make_graphed_callables")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        losses()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- streams ---------------------------------------------------------------------------------------------------------

Call = Callable[[], list[Tensor]]
NAMES = (
    *("regression", "binary", "multiclass", "sampled", "precision_mean"),
    *("gram", "dots", "combine", "displace", "align", "merge", "adatask_adam"),
)
#: Cycles that a stream is kept busy, a tenth of a second or so: far longer than any of these operations takes.
BUSY = 200_000_000


def call_of(name: str, leaf: Tensor) -> Call:
    """An operation all of whose inputs follow from `leaf`, in the order of the stream it is called on. Constants are on
    the device before."""
    rows = [[leaf.new_tensor(math.sin(7.0 * t + p)).expand(257).contiguous() for p in range(3)] for t in range(3)]
    weights = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, device="cuda")
    cases = {"regression": regression, "binary": binary, "multiclass": multiclass}
    kind = cases.get(name, binary)(1, 9, 33)
    h, y, mean = kind.features.float().cuda(), kind.targets.cuda(), kind.mean.float().cuda()
    y = y.float() if y.is_floating_point() else y
    covariance = kind.covariance.float().cuda() if isinstance(kind.covariance, Tensor) else kind.covariance
    samples = torch.randn(40, 3, 34, device="cuda")
    power = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64, device="cuda")
    state = [torch.zeros(257, device="cuda") for _ in range(12)]
    steps, lr = torch.zeros(3, device="cuda"), 1e-2

    def scaled() -> list[list[Tensor]]:
        return [[row * leaf for row in task] for task in rows]

    def adam() -> list[Tensor]:
        parameters = [x.clone() for x in state[:3]]
        first = [[torch.zeros_like(x) for _ in range(3)] for x in parameters]
        second = [[torch.zeros_like(x) for _ in range(3)] for x in parameters]
        jacobians = [torch.stack(column) for column in zip(*scaled())]
        ops.adatask_adam(parameters, jacobians, first, second, [steps + 1 for _ in parameters], lr=lr)
        return [*parameters, *(m for each in first for m in each)]

    calls: dict[str, Call] = {
        "regression": lambda: list(ops.regression_moments(h * leaf, y, mean, covariance)),
        "binary": lambda: list(ops.binary_moments(h * leaf, y, mean, covariance)),
        "multiclass": lambda: list(ops.multiclass_moments(h * leaf, y, mean, covariance)),
        "sampled": lambda: list(ops.sampled_moments(h * leaf, y, samples, kind="binary")),
        "precision_mean": lambda: [ops.precision_mean(samples[:, :, :33] * leaf, samples[:, :, :33] ** 2, power)],
        "gram": lambda: [ops.gram(scaled())],
        "dots": lambda: [ops.dots(scaled(), [row * leaf for row in rows[1]])],
        "combine": lambda: list(ops.combine(scaled(), weights)),
        "displace": lambda: list(ops.displace([row * leaf for row in rows[0]], scaled(), weights)),
        "align": lambda: [*ops.align(torch.diag(weights.abs()) * leaf.double())][:2],
        "merge": lambda: list(ops.merge(scaled())[0]),
        "adatask_adam": adam,
    }
    return calls[name]


@pytest.mark.parametrize("name", NAMES)
def test_an_operation_waits_for_its_own_stream(name: str) -> None:
    """The input becomes what it is only after the side stream has been busy for a while, the output is read on that
    stream: work on any other stream would see the value before."""
    leaf, side = torch.ones((), device="cuda"), torch.cuda.Stream()
    call = call_of(name, leaf)
    leaf.fill_(3.0)
    want = [x.clone() for x in call()]
    leaf.fill_(1.0)
    other = [x.clone() for x in call()]
    assert not all(torch.equal(a, b) for a, b in zip(want, other)), "the input does not matter: the test sees nothing"
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(BUSY)
        leaf.fill_(3.0)
        got = [x.clone() for x in call()]
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_an_operation_does_not_wait_for_the_default_stream(name: str) -> None:
    """While the default stream is busy, an operation on a side stream begins and ends."""
    leaf, side = torch.full((), 3.0, device="cuda"), torch.cuda.Stream()
    call = call_of(name, leaf)
    with torch.cuda.stream(side):
        want = [x.clone() for x in call()]  # loads kernels, fills caches of constants
    torch.cuda.synchronize()
    torch.cuda._sleep(10 * BUSY)
    busy = torch.cuda.Event()
    busy.record()
    with torch.cuda.stream(side):
        got = [x.clone() for x in call()]
    side.synchronize()
    assert not busy.query(), "it waited for the default stream, which was busy for a second"
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
