"""Every operation runs on the stream that is current, and only there. They need a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtlgrad import ops
from tests.conftest import HAS_GPU
from tests.support.moments_cases import binary, multiclass, regression

pytestmark = pytest.mark.skipif(not HAS_GPU, reason="no usable GPU")
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
def test_waits_for_its_own_stream(name: str) -> None:
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
def test_does_not_wait_for_the_default_stream(name: str) -> None:
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
