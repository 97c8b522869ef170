"""AlignedMTL compiled, under autocast and in CUDA graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtlgrad import AlignedMTL
from tests.conftest import HAS_GPU
from tests.support.bounds import all_near, flat, gradients, near, normal
from tests.support.nets import Net, inputs
from tests.support.oracles import at_features, procrustes, pushed


class Whole(Net):
    """With the layer, and the sum of losses, as users write it."""

    def __init__(self, seed: int = 0, **options: Any):
        super().__init__(seed=seed)
        self.aligned = AlignedMTL(3, **options)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        total: Any = sum(self.losses(self.aligned(self.backbone(x))))
        return total  # type: ignore[no-any-return]


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
