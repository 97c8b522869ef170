"""torch.compile through the layer, in one graph: backbone, layer, heads, total."""

from __future__ import annotations

import copy
import gc
import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional

from mtlgrad import BayesAgg, Regression
from mtlgrad.bayesagg import layer as layers
from tests.contracts.test_bayesagg_state import BayesNet
from tests.support.nets import head_data, unpacked

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Inductor itself uses what torch deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

Loss = Callable[[Tensor, list[Tensor]], Tensor]
# The last batch of an epoch is smaller.
EPOCH = (slice(0, 6), slice(6, 12), slice(12, 18), slice(18, 22))


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch.compiler.reset()


def losses_of(outputs: list[Tensor], targets: list[Tensor]) -> list[Tensor]:
    """Without looking at which labels are missing: shapes that depend on data cannot be compiled."""
    regression, binary, multiclass = (z.float() for z in outputs)
    first, second = (target.nan_to_num() for target in targets[:2])
    return [
        ((regression - first) * targets[0].isfinite()).square().mean(),
        (functional.binary_cross_entropy_with_logits(binary, second, reduction="none") * targets[1].isfinite()).mean(),
        functional.cross_entropy(multiclass, targets[2], ignore_index=-100, reduction="sum") / len(multiclass),
    ]


def whole(net: BayesNet) -> Loss:
    def loss(inputs: Tensor, targets: list[Tensor]) -> Tensor:
        features = net.layer(net.backbone(inputs), targets)
        return net.layer.total(losses_of([head(features) for head in net.heads], targets)) * 4

    return loss


def train(net: BayesNet, loss: Loss, epochs: int = 2, autocast: bool = False) -> tuple[list[Tensor], Tensor]:
    """All parameters and the task weights at the end."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    for _ in range(epochs):
        for rows in EPOCH:
            optimizer.zero_grad()
            batches = [data.rows(rows) for data in net.data]
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                total = loss(batches[0].features, [batch.targets for batch in batches])
            total.backward()
            optimizer.step()
        net.layer.refresh()
    assert net.layer.task_weights is not None
    return [p.detach().clone() for p in net.parameters()], net.layer.task_weights


def near(found: tuple[list[Tensor], Tensor], expected: tuple[list[Tensor], Tensor], tolerance: float) -> None:
    for a, b in zip([*found[0], found[1]], [*expected[0], expected[1]], strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize(
    ("options", "autocast"),
    [
        ({}, False),
        ({}, True),
        ({"statistics": "streaming", "covariance": "kron"}, False),
        ({"moments": "sampled", "num_samples": 16}, False),
    ],
    ids=["stored", "bfloat16", "streaming", "sampled"],
)
def test_a_step_in_one_graph(options: dict[str, Any], autocast: bool) -> None:
    plain = BayesNet(**options)
    expected = train(plain, whole(plain), autocast=autocast)
    net = BayesNet(**options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(whole(net), fullgraph=True, backend=counter)
    found = train(net, compiled, autocast=autocast)
    near(found, expected, 0.0)
    # One graph for the first batch size, one for all; neither refresh nor step compiles anything again.
    assert counter.frame_count == 2
    assert torch.equal(net.layer.gradient_variance, plain.layer.gradient_variance)  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["layer", "total", "backbone and layer"])
def test_parts_in_graphs_of_their_own(where: str) -> None:
    plain, net = BayesNet(), BayesNet()
    layer: Any = net.layer
    entered, total = layer.__call__, layer.total
    if where == "layer":
        entered = torch.compile(layer, fullgraph=True, backend="aot_eager")
    elif where == "total":
        total = torch.compile(layer.total, fullgraph=True, backend="aot_eager")
    features_of: Any = lambda inputs, targets: entered(net.backbone(inputs), targets)  # noqa: E731
    if where == "backbone and layer":
        features_of = torch.compile(features_of, fullgraph=True, backend="aot_eager")

    def loss(inputs: Tensor, targets: list[Tensor]) -> Tensor:
        features = features_of(inputs, targets)
        return total(losses_of([head(features) for head in net.heads], targets)) * 4

    near(train(net, loss), train(plain, whole(plain)), 0.0)


def gradients_of_two_passes(compiled: bool, order: int) -> list[Tensor]:
    """Two passes of one layer with totals of their own scales; backwards in either order."""
    net = BayesNet()
    loss: Any = whole(net)
    if compiled:
        loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    train(net, whole(net))
    net.zero_grad()
    parts = []
    for rows, factor in ((slice(0, 6), 8.0), (slice(6, 12), 0.5)):
        batches = [data.rows(rows) for data in net.data]
        parts.append(loss(batches[0].features, [batch.targets for batch in batches]) * factor)
    found = []
    for part in parts[::order]:
        net.zero_grad()
        part.backward(retain_graph=True)
        found += [p.grad.clone() for p in net.backbone.parameters() if p.grad is not None]
    with pytest.raises(RuntimeError, match="expected one backward through a call of the layer, found a second"):
        parts[0].backward()
    return found


@pytest.mark.parametrize("order", [1, -1])
def test_interleaved_passes_and_a_refused_second_backward(order: int) -> None:
    with torch._functorch.config.patch(donated_buffer=False):  # torch's own condition for retain_graph
        found = gradients_of_two_passes(True, order)
    pairs = zip(found, gradients_of_two_passes(False, order), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_two_passes_in_one_graph() -> None:
    """Even of the same features: neither is left out, and each total belongs to the pass before it."""
    found = []
    for compiled in (False, True):
        data = head_data("regression", 30, 4)
        head = torch.nn.Linear(4, 3, dtype=torch.float64)
        with torch.no_grad():
            head.weight.copy_(data.weight)
        layer = BayesAgg([Regression(head)])
        layer(data.features.clone().requires_grad_(), [data.targets])
        layer.refresh()

        def twice(x: Tensor, y: Tensor, layer: BayesAgg = layer, head: torch.nn.Linear = head) -> Tensor:
            one = layer.total([(head(layer(x, [y])) - y).square().sum() / 5]) * 2
            return one + layer.total([(head(layer(x, [y])) - y).square().sum() / 5]) * 3

        call = torch.compile(twice, fullgraph=True, backend="aot_eager") if compiled else twice
        features = data.features[:5].clone().requires_grad_()
        call(features, data.targets[:5]).backward()
        assert unpacked(layer.get_extra_state())["full_data"][0]["counts"][0] == 10
        found.append(features.grad)
    assert torch.equal(*found)  # type: ignore[arg-type]
    torch.testing.assert_close(found[1], 5 * layer.aggregate(data.features[:5], [data.targets[:5]]))


def test_inductor() -> None:
    """What compiled code may reuse is not kept: features and targets that are made in the graph."""
    net, plain = BayesNet(statistics="streaming"), BayesNet(statistics="streaming")

    def loss(part: BayesNet) -> Loss:
        def shifted(inputs: Tensor, targets: list[Tensor]) -> Tensor:
            here = [targets[0] * 2 + 1, targets[1], targets[2]]
            return whole(part)(inputs, here)

        return shifted

    found = train(net, torch.compile(loss(net), fullgraph=True, dynamic=True))
    near(found, train(plain, loss(plain)), 1e-6)


def test_copies_of_a_compiled_layer_are_their_own() -> None:
    net = BayesNet()
    compiled = torch.compile(whole(net), fullgraph=True, backend="eager")
    train(net, compiled)
    twin = copy.deepcopy(net)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    before = unpacked(twin.layer.get_extra_state())["number"]
    expected = train(net, compiled)
    for other in (twin, loaded):
        assert unpacked(other.layer.get_extra_state())["number"] == before
        near(train(other, torch.compile(whole(other), fullgraph=True, backend="eager")), expected, 0.0)


def test_refused_inside_a_graph() -> None:
    net = BayesNet()
    compiled = torch.compile(whole(net), fullgraph=True, backend="aot_eager")
    targets = [data.targets[:6].clone() for data in net.data]
    targets[2][1] = 7
    with pytest.raises(ValueError, match=r"BayesAgg: heads\[2\]: targets: expected class indices from 0 to 2"):
        compiled(net.data[0].features[:6], targets)


def test_passes_end_with_their_graphs() -> None:
    net = BayesNet()
    compiled = torch.compile(whole(net), fullgraph=True, backend="aot_eager")
    for loss in (whole(net), compiled):
        gc.collect()  # of the tests before
        before = len(layers._PASSES)
        total = loss(net.data[0].features[:6], [data.targets[:6] for data in net.data])
        assert len(layers._PASSES) == before + 1
        total.backward()
        del total
        assert len(layers._PASSES) == before


def test_hooks_that_copy_what_is_saved() -> None:
    """Eager passes do not mind; compiled ones are refused."""
    net = BayesNet()
    train(net, whole(net))
    compiled = torch.compile(whole(net), fullgraph=True, backend="aot_eager")
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        eager, traced = (
            loss(net.data[0].features[:6], [data.targets[:6] for data in net.data]) for loss in (whole(net), compiled)
        )
    eager.backward()
    with pytest.raises(RuntimeError, match="BayesAgg: expected the pass that this backward belongs to, found it gone"):
        traced.backward()


WHOLE_STEP = """
import torch
from torch import nn
from mtlgrad import BayesAgg, Multiclass, Regression

def run(wrap):
    torch.manual_seed(0)
    backbone, level, kind = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 3)
    bayes = BayesAgg([Regression(level), Multiclass(kind)])

    def step(x, y, c):
        z = bayes(backbone(x), [y, c])
        bayes.total([(level(z) - y).square().mean(), nn.functional.cross_entropy(kind(z), c)]).backward()

    whole = wrap(step)
    found = []
    for i in range(6):
        if i % 2 == 0 and i:
            bayes.refresh()
        backbone.zero_grad()
        whole(torch.randn(32, 6), torch.randn(32, 2), torch.randint(0, 3, (32,)))
        found.append(backbone.weight.grad.clone())
    return torch.stack(found)

eager, compiled = run(lambda f: f), run(lambda f: torch.compile(f, backend="aot_eager"))
assert torch.allclose(eager, compiled, rtol=1e-5, atol=1e-7), (eager - compiled).abs().max()
"""


def test_a_compiled_step_with_its_backward_inside() -> None:
    """Dynamo then looks at the Python that autograd calls, too. In a process of its own, for it used to crash."""
    done = subprocess.run([sys.executable, "-c", WHOLE_STEP], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "data_ptr" not in done.stderr
