"""torch.func around the methods: parameters given from outside, Jacobians by jacrev, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

import mtlgrad
from mtlgrad import AlignedMTL, ops, reference
from tests.ops.test_moments import multiclass
from tests.support.bounds import near
from tests.support.nets import METHODS, Bayes, Layer, Model, batch

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # forward-mode differentiation uses it
]
Parameters = dict[str, Tensor]


def parameters_of(module: nn.Module) -> Parameters:
    return {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}


def detached(module: nn.Module) -> Parameters:
    return {name: p.detach() for name, p in module.named_parameters()}


class Total(nn.Module):
    """The sum of the losses of a batch, the layer inside."""

    def __init__(self, trainer: Any):
        super().__init__()
        self.model, self.layer = trainer.model, trainer.aligned if isinstance(trainer, Layer) else trainer.bayes

    def forward(self, x: Tensor, y: list[Tensor]) -> Tensor:
        features = self.model.backbone(x)
        if isinstance(self.layer, AlignedMTL):
            return torch.stack(self.model.losses(self.layer(features), y)).sum()
        return self.layer.total(self.model.losses(self.layer(features, y), y))  # type: ignore[no-any-return, operator]


def trained(method: str) -> Any:
    """Far enough for BayesAgg to have a posterior."""
    trainer: Any = METHODS[method](Model())
    for i in range(Bayes.warm_up):
        trainer.step(batch(seed=i))
    if method == "bayesagg":
        trainer.bayes.refresh()
    trainer.optimizer.zero_grad()
    return trainer


LAYERS = pytest.mark.parametrize("method", ["aligned layer", "bayesagg"])


@pytest.mark.parametrize("how", ["backward", "autograd.grad"])
@LAYERS
def test_functional_call(method: str, how: str) -> None:
    """The aligned, the aggregated gradient arrives at the parameters that were given, and none at the module's own."""
    whole, data = Total(trained(method)), batch(seed=9)
    whole(data.x, data.y).backward()
    want = {name: p.grad for name, p in whole.named_parameters()}
    whole.zero_grad()
    given = parameters_of(whole)
    loss = functional_call(whole, given, (data.x, data.y))
    if how == "backward":
        loss.backward()
        got = [p.grad for p in given.values()]
    else:
        got = list(torch.autograd.grad(loss, list(given.values())))
    assert all(near(g, want[name], 1e-6) for name, g in zip(given, got))  # type: ignore[arg-type]
    assert all(p.grad is None for p in whole.parameters())


def test_aligned_at_given_parameters() -> None:
    model, data, aligned = Model(), batch(), AlignedMTL(3)
    features = model.backbone(data.x)
    mtlgrad.task_backward(model.losses(features, data.y), model.shared, features=features)
    given = parameters_of(model.backbone)
    features = functional_call(model.backbone, given, (data.x,))
    losses = model.losses(features, data.y)
    weights = aligned.weigh(losses, given.values())
    mtlgrad.task_backward(losses, given.values(), features=features)
    assert all(near(p.jac, q.jac, 1e-6) for p, q in zip(given.values(), model.shared))  # type: ignore[attr-defined]
    aligned.merge(given.values())
    assert near(aligned.weights, weights, 1e-6)  # type: ignore[arg-type]
    assert all(p.grad is not None for p in given.values())


@pytest.mark.parametrize("method", ["aligned merge", "adatask adam"])
def test_jacobians_of_jacrev(method: str) -> None:
    """Whatever makes the rows: put into .jac they are merged, and AdaTask steps by them."""
    trainers: list[Any] = [METHODS[method](Model()) for _ in range(2)]
    data = batch()
    trainers[0].step(data)
    model, optimizer = trainers[1].model, trainers[1].optimizer

    def losses(p: Parameters) -> Tensor:
        return torch.stack(model.losses(functional_call(model.backbone, p, (data.x,)), data.y))

    rows = jacrev(losses)(detached(model.backbone))
    torch.stack(model.losses(model.backbone(data.x).detach(), data.y)).sum().backward()  # the heads
    for name, p in model.backbone.named_parameters():
        p.jac = rows[name].detach()
    if method == "aligned merge":
        trainers[1].aligned.merge(model.shared)
    optimizer.step()
    pairs = zip(model.parameters(), trainers[0].model.parameters(), strict=True)
    assert all(near(p.detach(), q.detach(), 1e-5) for p, q in pairs)


def test_aligned_forward_alone() -> None:
    """Without gradients the layers are not there: vmap over examples, jvp of the sum of the losses."""
    trainer, data = trained("aligned layer"), batch()
    model, aligned = trainer.model, trainer.aligned
    given = detached(model)

    def loss(p: Parameters, x: Tensor, y: list[Tensor], layer: bool = True) -> Tensor:
        features = functional_call(model.backbone, {n[9:]: v for n, v in p.items() if n.startswith("backbone.")}, (x,))
        return torch.stack(model.losses(aligned(features) if layer else features, y)).sum()

    model.requires_grad_(False)
    each = vmap(lambda x, *y: loss(given, x[None], [v[None] for v in y]))(data.x, *data.y)
    assert near(each.mean(), loss(given, data.x, data.y), 1e-5)
    tangents = {name: torch.ones_like(p) for name, p in given.items()}
    with_layer, without = (jvp(lambda p, k=k: loss(p, *data, layer=k), (given,), (tangents,)) for k in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(with_layer, without))


def per_example(whole: Callable[..., Tensor], data: Any) -> Callable[[Parameters], Any]:
    one = grad(lambda p, x, *y: whole(p, x[None], [v[None] for v in y]))
    return lambda p: vmap(one, (None, 0, 0, 0, 0))(p, data.x, *data.y)


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], Any], Callable[[Parameters], Any]]] = {
    "grad": lambda f, data: grad(lambda p: f(p, *data)),
    "vjp": lambda f, data: lambda p: vjp(lambda q: f(q, *data), p)[1](torch.ones(())),
    "jacrev": lambda f, data: jacrev(lambda p: f(p, *data)),
    "hessian": lambda f, data: hessian(lambda p: f(p, *data)),
    "grad of each example": per_example,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@LAYERS
def test_transforms_of_the_backward_are_refused(method: str, transform: str) -> None:
    """They would differentiate a function, and the layers' backward is not that of one; the words say what to use."""
    whole, data = Total(trained(method)), batch(seed=9)

    def loss(p: Parameters, x: Tensor, y: list[Tensor]) -> Tensor:
        return functional_call(whole, p, (x, y))  # type: ignore[no-any-return]

    before = [p.clone() for p in whole.parameters()]
    name = "AlignedMTL" if method == "aligned layer" else "BayesAgg"
    with pytest.raises(RuntimeError, match=rf"{name}: expected .*torch\.func.*functional_call"):
        TRANSFORMS[transform](loss, data)(detached(whole))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), before))
    whole(data.x, data.y).backward()  # and it goes on
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in whole.parameters())


def test_one_vmapped_backward_is_refused() -> None:
    """As TorchJD makes it: the layer is not for a Jacobian, task_backward is."""
    model, data, aligned = Model(), batch(), AlignedMTL(3)
    losses = torch.stack(model.losses(aligned(model.backbone(data.x)), data.y))
    with pytest.raises(RuntimeError, match="atching rule"):
        torch.autograd.grad(losses, model.shared, torch.eye(3), is_grads_batched=True)


def test_task_backward_inside_a_transform_is_refused() -> None:
    model, data = Model(), batch()

    def f(p: Parameters) -> Tensor:
        losses = model.losses(functional_call(model.backbone, p, (data.x,)), data.y)
        mtlgrad.task_backward(losses, list(p.values()))
        return losses[0]

    with pytest.raises(RuntimeError, match=r"torch\.func|functorch"):
        grad(f)(detached(model.backbone))


@LAYERS
def test_second_derivatives_are_refused_by_backward(method: str) -> None:
    whole, data = Total(trained(method)), batch(seed=9)
    parameters = [p for name, p in whole.named_parameters() if "backbone" in name]
    first = torch.autograd.grad(whole(data.x, data.y), parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.stack([g.square().sum() for g in first]).sum().backward()


def test_a_bayesagg_quadrature_that_a_transform_was_the_first_to_ask_for() -> None:
    case = multiclass(2, 6, 4)

    def total(features: Tensor) -> Tensor:
        return reference.multiclass_moments(features, case.targets, case.mean, case.covariance, num_points=77)[0].sum()

    found = grad(total)(case.features)
    (expected,) = torch.autograd.grad(total(case.features.requires_grad_()), case.features)
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch 2.15, of operators without a batched form
def test_aligned_gram_matrices_under_vmap() -> None:
    """The T x T part takes a batch of Gram matrices."""
    rows = torch.randn(4, 3, 50, generator=torch.Generator().manual_seed(0))
    grams = rows @ rows.mT
    found = vmap(lambda gram: ops.align(gram).weights)(grams)
    assert near(found, torch.stack([ops.align(gram).weights for gram in grams]), 1e-12)
