"""Another default device (``torch.set_default_device``): what is made on the way lies where parameters do. That of no
memory, meta, stands for one that is not the parameters': what is made there by mistake cannot be read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtlgrad import AlignedMTL, AlphaVIL, BayesAgg, Multiclass, Regression, task_backward
from mtlgrad.alphavil import Task
from mtlgrad.metrics import Dominance, gradient_statistics
from mtlgrad.optim import AdaTaskAdam, AdaTaskAdamW, AdaTaskRMSprop
from tests.support.nets import Model

pytestmark = pytest.mark.usefixtures("one_thread")
Batch = tuple[Tensor, Tensor, Tensor]


def losses_of(net: Model, batch: Batch, views: Callable[[Tensor, Batch], Any] = lambda z, _: (z, z)) -> list[Tensor]:
    for_age, for_kind = (head(view) for head, view in zip(net.heads, views(net.backbone(batch[0]), batch)))
    return [F.mse_loss(for_age, batch[1]), F.cross_entropy(for_kind, batch[2])]


def descend(net: Model, batches: list[Batch], losses: Callable[[Batch], list[Tensor]]) -> None:
    opt = torch.optim.SGD(net.parameters(), lr=0.01)
    for batch in batches:
        opt.zero_grad()
        torch.stack(losses(batch)).sum().backward()
        opt.step()


def layer(net: Model, batches: list[Batch]) -> Any:
    aligned = AlignedMTL(2, preference=[1.0, 2.0])
    descend(net, batches, lambda batch: losses_of(net, batch, lambda z, _: aligned(z)))
    return aligned.weights


def weigh(net: Model, batches: list[Batch]) -> Any:
    aligned = AlignedMTL(2, [1.0, 2.0])

    def weighted(batch: Batch) -> list[Tensor]:
        losses = losses_of(net, batch)
        return list(aligned.weigh(losses, net.backbone.parameters()) * torch.stack(losses))

    descend(net, batches, weighted)


def merge(net: Model, batches: list[Batch]) -> Any:
    aligned, opt = AlignedMTL(2), torch.optim.Adam(net.parameters(), lr=0.01, foreach=True)
    watch = Dominance(opt, 2)
    for batch in batches:
        opt.zero_grad()
        task_backward(losses_of(net, batch), net.backbone.parameters())
        aligned.merge(net.backbone.parameters(), retain_jac=True)
        opt.step()
        watch.update()
    return watch.shares()


def bayes(statistics: Any) -> Callable[[Model, list[Batch]], Any]:
    def train(net: Model, batches: list[Batch]) -> Any:
        agg = BayesAgg([Regression(net.heads[0]), Multiclass(net.heads[1])], statistics=statistics)
        for _ in range(2):
            descend(net, batches, lambda batch: losses_of(net, batch, lambda z, b: [agg(z, b[1:])] * 2))
            agg.refresh()
            again = copy.deepcopy(agg)
            again.load_state_dict(agg.state_dict())
        descend(net, batches, lambda batch: losses_of(net, batch, lambda z, b: [agg(z, b[1:])] * 2))
        return agg.noise, agg.loss_weights, again.predict(net.backbone(batches[0][0]))

    return train


def adatask(make: Callable[..., Any], **options: Any) -> Callable[[Model, list[Batch]], Any]:
    def train(net: Model, batches: list[Batch]) -> Any:
        shared = list(net.backbone.parameters())
        opt = make(net.parameters(), num_tasks=2, max_norm=1.0, missing="still", check_finite=True, **options)
        for batch in batches:
            opt.zero_grad()
            z = net.backbone(batch[0])
            task_backward(losses_of(net, batch, lambda _, __: (z, z)), shared, features=z)  # noqa: B023
            opt.step()
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        return opt.dominance(), gradient_statistics([[p.jac[t] for p in shared] for t in range(2)])  # type: ignore[attr-defined]

    return train


def vil(net: Model, batches: list[Batch]) -> Any:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1e-3)

    tasks = {
        "age": Task(batches[:3], lambda m, b: losses_of(m, b)[0], batches[3:], head=net.heads[0]),
        "kind": Task(batches[:3], lambda m, b: losses_of(m, b)[1], head=net.heads[1]),
    }
    search = AlphaVIL(net, tasks, "age", make_optimizer=make, alpha_optimizer=make)
    search.epoch()
    search.load_state_dict(search.state_dict())
    search.epoch()
    return search.task_weights, search.alphas


METHODS: dict[str, Callable[[Model, list[Batch]], Any]] = {
    **{f.__name__: f for f in (layer, weigh, merge, vil)},
    **{name: bayes(name) for name in ("streaming", "stored", "moving")},
    "adam": adatask(AdaTaskAdam, amsgrad=True),
    "adamw": adatask(AdaTaskAdamW, moments_dtype=torch.bfloat16),
    "rmsprop": adatask(AdaTaskRMSprop, centered=True, momentum=0.9),
}


def run(method: str, default: str) -> tuple[list[Tensor], Any]:
    net = Model(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh()), heads=(1, 3), width=6)
    torch.manual_seed(0)
    batches = [(torch.randn(8, 4), torch.randn(8, 1), torch.randint(3, (8,))) for _ in range(6)]
    torch.manual_seed(1)
    with torch.device(default):
        found = METHODS[method](net, batches)
    return [p.detach() for p in net.parameters()], found


def torchs_own_can() -> bool:
    """In 2.11 torch.optim makes its step counts on the default device, and then wants them elsewhere."""
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    with torch.device("meta"):
        try:
            torch.optim.Adam([p]).step()
        except RuntimeError:
            return False
    return True


@pytest.mark.filterwarnings("ignore:AlphaVIL. target")
@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_made_elsewhere(method: str) -> None:
    if method in ("merge", "adam") and not torchs_own_can():
        pytest.skip("torch's own optimizer makes its state elsewhere")
    expected, shown = run(method, "cpu")
    found, seen = run(method, "meta")
    assert all(map(torch.equal, found, expected))
    torch.testing.assert_close(seen, shown, rtol=0.0, atol=0.0, equal_nan=True)
