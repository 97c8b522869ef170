"""alphaVIL with compiled models, and under autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import HAS_GPU
from tests.support.bounds import (
    contents,
    near,
)
from tests.support.nets import Case, NamedBatch, case_on, epoch
from tests.support.oracles import development_loss

pytestmark = pytest.mark.usefixtures("one_thread")
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="no usable GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
@pytest.mark.parametrize("how", ["model", "loss", "module"])
def test_compiled_models(how: str) -> None:
    """The compiled model handed over; a compiled one in the loss of a plain one; compiled in place. Parameters that
    others stand in for do not have it compiled over and over."""
    torch.compiler.reset()
    results, graphs = [], list[Any]()

    def eager(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for compiled in (False, True):
        case = Case(tasks=["size", "kind"], dtype=torch.float64, norm=True)
        model = case.model
        if compiled and how == "model":
            case.model = torch.compile(model, backend=eager)
        elif compiled and how == "module":
            model.compile(backend=eager)
        elif compiled:
            called = torch.compile(model, backend=eager)
            case.change(
                "size", loss=lambda m, b, to=called: (m.heads["size"](to(b.x)).squeeze(1) - b.y).square().mean()
            )
        vil = case.vil(alpha_epochs=1)
        for number in range(2):
            torch.manual_seed(number)
            assert epoch(vil).kept == "search"
        results.append(contents(model))
    assert all(near(value, results[0][name], 1e-12) for name, value in results[1].items())
    assert 1 <= len(graphs) <= 8
    torch.compiler.reset()


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_in_the_loss(device: str) -> None:
    """bfloat16 products: the search sees what the model then has, not a weight that autocast has kept."""
    case = case_on(Case(), device)
    for name, task in list(case.tasks.items()):

        def loss(model: Any, batch: NamedBatch, of: Any = task.loss) -> Tensor:
            with torch.autocast(device, dtype=torch.bfloat16):
                return of(model, batch)

        case.change(name, loss=loss)
    for _ in range(2):
        before = development_loss(case.model, case.tasks["size"])
        found = epoch(case.vil(make_optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1)))
        assert found.kept == "search"
        assert development_loss(case.model, case.tasks["size"]) == found.after < before == found.before
    assert all(p.dtype == torch.float32 for p in case.model.parameters())
