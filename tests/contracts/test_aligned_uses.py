"""AlignedMTL as a layer of a net, in what nets are put through: copies, types, autocast, checkpoints, compilers."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtlgrad import AlignedMTL
from tests.conftest import HAS_GPU
from tests.support.bounds import all_near, flat, gradients, near, normal
from tests.support.nets import Net, inputs, step
from tests.support.oracles import at_features, jacobian, procrustes, pushed


def test_views_are_the_features() -> None:
    aligned, z = AlignedMTL(3), normal(1, 4, 5).float()
    for features in (z, z.clone().requires_grad_()):
        views = aligned(features)
        assert len(views) == 3
        assert all(torch.equal(v, features) and v.data_ptr() == features.data_ptr() for v in views)
        assert all(v.requires_grad == features.requires_grad for v in views)
    with torch.no_grad():
        assert not any(v.requires_grad for v in aligned.eval()(2 * z.clone().requires_grad_()))
    with torch.inference_mode():
        assert torch.equal(aligned(z)[2], z)


def test_a_view_is_not_changed_in_place_without_a_word() -> None:
    """The others would change with it."""
    aligned = AlignedMTL(2)
    views = aligned(normal(1, 4, 5).requires_grad_() * 1.0)
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        views[0].add_(1.0)


def test_frozen_backbone() -> None:
    net, x = Net(), inputs()
    net.backbone.requires_grad_(False)
    aligned = AlignedMTL(3)
    step(net, aligned, x)
    assert all(p.grad is None for p in net.shared)
    assert all(p.grad is not None for p in net.heads.parameters())
    assert aligned.weights is None  # no gradient came through


def test_two_layers_and_one_layer_twice() -> None:
    """Each backward aligns what it got; a layer shows its last use."""
    net, other, x, y = Net(), Net(seed=5), inputs(), inputs(seed=2)
    aligned, second = AlignedMTL(3), AlignedMTL(3, scale="rmse")
    want = []
    for n, layer, data in ((net, aligned, x), (other, second, x), (net, aligned, y)):
        n.zero_grad()
        step(n, layer, data)
        want.append((gradients(n.shared), layer.weights))
    net.zero_grad()
    other.zero_grad()
    total = sum(net.losses(aligned(net.backbone(x)))) + sum(other.losses(second(other.backbone(x))))
    total.backward()  # type: ignore[union-attr]
    all_near(gradients(net.shared), want[0][0], 1e-6)
    all_near(gradients(other.shared), want[1][0], 1e-6)
    assert near(aligned.weights, want[0][1], 1e-9)  # type: ignore[arg-type]
    assert near(second.weights, want[1][1], 1e-9)  # type: ignore[arg-type]
    net.zero_grad()
    first, again = (net.losses(aligned(net.backbone(data))) for data in (x, y))
    (sum(first) + sum(again)).backward()  # type: ignore[union-attr]
    all_near(gradients(net.shared), [a + b for a, b in zip(want[0][0], want[2][0])])  # type: ignore[operator]


def test_what_it_shows_is_not_overwritten_later() -> None:
    net, aligned = Net(), AlignedMTL(3)
    step(net, aligned, inputs())
    shown = [aligned.weights, aligned.singular_values, aligned.rank, aligned.condition_number]
    before = [v.clone() for v in shown if v is not None]
    aligned.weights.zero_()  # type: ignore[union-attr]
    assert torch.equal(aligned.weights, before[0])  # type: ignore[arg-type]
    step(net, aligned, inputs(seed=9))
    assert all(torch.equal(a, b) for a, b in zip(shown, before))  # type: ignore[arg-type]
    assert not torch.equal(aligned.weights, before[0])  # type: ignore[arg-type]


class Whole(Net):
    """With the layer, and the sum of losses, as users write it."""

    def __init__(self, seed: int = 0, **options: Any):
        super().__init__(seed=seed)
        self.aligned = AlignedMTL(3, **options)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        total: Any = sum(self.losses(self.aligned(self.backbone(x))))
        return total  # type: ignore[no-any-return]


@pytest.mark.parametrize("used", [False, True])
def test_copies_and_files(used: bool) -> None:
    model, x = Whole(preference=torch.tensor([1.0, 2.0, 3.0]), scale="rmse"), inputs()
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in Net().named_parameters()]
    assert not list(model.aligned.buffers())
    if used:
        model(x).backward()
        model.zero_grad()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    others = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
        Whole(seed=8, preference=[1.0, 2.0, 3.0], scale="rmse"),
    ]
    assert others[-1].load_state_dict(model.state_dict()) == torch.nn.modules.module._IncompatibleKeys([], [])
    before = model.aligned.weights
    model(x).backward()
    for other in others:
        if used and other is not others[-1]:
            assert torch.equal(other.aligned.weights, before)
        other(x).backward()
        all_near(gradients(other.parameters()), gradients(model.parameters()), 1e-6)
        assert torch.equal(other.aligned.weights, model.aligned.weights)
    assert "preference=(1.0, 2.0, 3.0), scale='rmse'" in repr(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_moved_to_another_type(dtype: torch.dtype) -> None:
    """The module converted after its first use: results stay float64, gradients are in the features' type."""
    preference = torch.tensor([1.0, 0.5, 3.0])
    model, x = Whole(preference=preference), inputs()
    model(x).backward()
    model.zero_grad()
    before = model.aligned.weights
    model, x = model.to(dtype), x.to(dtype)
    assert torch.equal(model.aligned.weights, before)  # type: ignore[arg-type]
    features, rows = at_features(model, x)
    want = procrustes(rows, preference)
    model(x).backward()
    assert near(model.aligned.weights, want.weights, 1e-9)  # type: ignore[arg-type]  # of the same rounded gradients
    assert model.aligned.weights.dtype == torch.float64  # type: ignore[union-attr]
    tolerance = {torch.float64: 1e-10, torch.bfloat16: 0.05, torch.float16: 5e-3}[dtype]
    all_near(gradients(model.shared), pushed(model, features, want.update), tolerance)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
def test_autocast(norm: type[nn.Module]) -> None:
    """Features in bfloat16 from a linear layer, in float32 from a LayerNorm."""
    torch.manual_seed(1)
    for backbone in (
        nn.Sequential(nn.Linear(6, 8), norm(8), nn.Linear(8, 5)),
        nn.Sequential(nn.Linear(6, 5), norm(5)),
    ):
        net, x, aligned = Net(backbone=backbone), inputs(), AlignedMTL(3)
        with torch.autocast("cpu", torch.bfloat16):
            features, rows = at_features(net, x)
            want = procrustes(rows)
            backward = pushed(net, features, want.update)
            loss = sum(net.losses(aligned(net.backbone(x))))
        loss.backward()  # type: ignore[union-attr]
        assert near(aligned.weights, want.weights, 1e-9)  # type: ignore[arg-type]
        all_near(gradients(net.shared), backward, 0.02)
        assert all(p.grad.dtype == torch.float32 for p in net.shared)  # type: ignore[union-attr]


def test_checkpointed_backbone() -> None:
    net, x, aligned = Net(), inputs(), AlignedMTL(3)
    step(net, aligned, x)
    want = gradients(net.parameters())
    for whole in (False, True):  # the layer outside and inside what is run again
        net.zero_grad()
        if whole:
            views = checkpoint(lambda x: aligned(net.backbone(x)), x, use_reentrant=False)
        else:
            views = aligned(checkpoint(net.backbone, x, use_reentrant=False))
        sum(net.losses(views)).backward()  # type: ignore[attr-defined]
        all_near(gradients(net.parameters()), want, 1e-6)


def test_images_in_channels_last() -> None:
    torch.manual_seed(2)
    conv = nn.Conv2d(3, 6, 3).to(memory_format=torch.channels_last)
    heads = [nn.Conv2d(6, 1, 3) for _ in range(3)]
    x = normal(1, 2, 3, 9, 9).float().contiguous(memory_format=torch.channels_last)
    features = conv(x)
    rows = jacobian([head(features).square().mean() for head in heads], [features])[0]
    want = procrustes(rows.flatten(1))
    expected = torch.autograd.grad(features, list(conv.parameters()), want.update.view_as(features).float())
    aligned = AlignedMTL(3)
    sum(head(z).square().mean() for head, z in zip(heads, aligned(conv(x)))).backward()  # type: ignore[union-attr]
    all_near(gradients(conv.parameters()), list(expected))
    assert near(aligned.weights, want.weights, 1e-5)  # type: ignore[arg-type]


# Inductor itself uses what torch deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("used", [False, True], ids=["first use compiled", "used before"])
def test_compiles_without_graph_breaks(backend: str, used: bool) -> None:
    torch.compiler.reset()
    model, x, y = Whole(), inputs(), inputs(seed=2)
    eager = copy.deepcopy(model)
    if used:
        model(y).backward()
        model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for data in (x, y):
        eager.zero_grad()
        model.zero_grad()
        eager(data).backward()
        compiled(data).backward()
        all_near(gradients(model.parameters()), gradients(eager.parameters()), 1e-4)
        assert near(model.aligned.weights, eager.aligned.weights, 1e-4)  # type: ignore[arg-type]
        assert int(model.aligned.rank) == 3  # type: ignore[arg-type]


@pytest.mark.skipif(not HAS_GPU, reason="no usable GPU")
def test_merge_in_a_cuda_graph() -> None:
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
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        merge()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merge()
    for seed in (10, 20):
        want = fill(seed)
        graph.replay()
        assert near(flat([p.grad for p in parameters]), want, 1e-6)  # type: ignore[misc]
