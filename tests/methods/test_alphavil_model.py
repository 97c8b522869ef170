"""What alphaVIL makes of the model meanwhile, and leaves of it: parameters, buffers, modes, gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtlgrad import AlphaVIL
from mtlgrad.alphavil import Task
from tests.support.bounds import contents, near, one_line, same_values
from tests.support.nets import ALPHA, INNER, SGD, Case, NamedBatch, epoch
from tests.support.oracles import Recorder, checked

pytestmark = pytest.mark.usefixtures("one_thread")


class Watched:
    """Batches that have somebody look each time that one is asked for."""

    def __init__(self, of: Any, look: Callable[[], None]):
        self.of, self.look = of, look

    def __iter__(self) -> Iterator[NamedBatch]:
        for batch in self.of:
            self.look()
            yield batch
        self.look()


@pytest.mark.parametrize("alpha", ALPHA)
def test_the_search_never_touches_the_model(alpha: str) -> None:
    """From inside the development data and the loss: the same parameters, at the same place, not written once."""
    case = Case(norm=True, dropout=0.5, tied=True, odd=True)
    parameters, buffers = dict(case.model.named_parameters()), dict(case.model.named_buffers())
    before, tensors = contents(case.model), [*parameters.values(), *buffers.values()]
    places, versions = [t.data_ptr() for t in tensors], list[int]()
    looks = [0, 0]

    def look() -> None:
        looks[0] += 1
        assert [t.data_ptr() for t in tensors] == places
        versions[:] = versions or [t._version for t in tensors]
        assert [t._version for t in tensors] == versions
        assert same_values({**parameters, **buffers}, before)
        assert all(p.grad is None for p in parameters.values())

    target = case.tasks["size"]

    def loss(model: Any, batch: NamedBatch) -> Tensor:
        assert model is case.model
        if not model.training:
            looks[1] += 1
            look()
            assert not any(module.training for module in model.modules())
            assert model.again.weight is model.first.weight
        return target.loss(model, batch)

    case.change("size", dev=Watched(target.dev, look), loss=loss)
    vil, kinds = case.vil(alpha_optimizer=ALPHA[alpha]), []
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        for stage in vil.stages():
            kinds.append(stage.kind)
            if stage.kind != "move":
                versions.clear()  # the stages of training write, and put back
                look()
                assert dict(case.model.named_parameters()).keys() == parameters.keys()
                assert all(p is parameters[n] for n, p in case.model.named_parameters())
                assert all(b is buffers[n] for n, b in case.model.named_buffers())
    assert kinds == ["train", "train", "train", "evaluate", "alpha", "alpha", "move"]
    assert looks[1] >= 2 * (2 + 2 * 2)
    assert [t.data_ptr() for t in case.model.parameters()] == places[: len(parameters)]
    assert case.model.again.weight is case.model.first.weight
    assert all(p is parameters[n] for n, p in case.model.named_parameters())
    assert all(p.grad is None for p in case.model.parameters())
    assert all(module.training for module in case.model.modules())


class Counting(nn.Module):
    """It writes to its buffers in evaluation mode, too: in place, and by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("average", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.average = 0.9 * self.average + 0.1 * x.detach().mean()
        return self.weight * (x - self.average)


def test_buffers_that_evaluation_writes() -> None:
    """They are as training left them; between the stages, as they were before the round."""
    model, x = Counting(), torch.ones(3)
    task = Task([x, x], lambda m, b: m(b).square().mean(), [x, 2 * x])
    vil = AlphaVIL(model, [task, task], 0, make_optimizer=SGD, alpha_epochs=2)
    for number in range(2):
        before = contents(model)
        for stage in vil.stages():
            assert stage.kind == "move" or same_values(contents(model), before), stage
        assert model.calls.item() == 2 * (number + 1)
    assert not model.average.requires_grad


def test_a_loss_that_does_not_use_the_model_it_is_given() -> None:
    """A parameter that a closure has is never displaced: the search would see nothing, and the sum be taken unseen."""
    case = Case(tasks=["size"])
    weight = case.model.first.weight
    case.change("size", loss=lambda m, b: (b.x @ weight.T).square().mean())
    before = contents(case.model)
    with pytest.raises((TypeError, ValueError), match="loss") as error:
        case.vil().epoch()
    one_line(error.value, "AlphaVIL: tasks: 'size'", "expected", "found")
    assert same_values(contents(case.model), before)


def test_a_loss_that_calls_the_model_by_another_name() -> None:
    """Closures over the model or parts of it are as good as the argument."""
    results = []
    for closed in (False, True):
        case = Case(dtype=torch.float64)
        model, head = case.model, case.model.heads["size"]
        if closed:
            case.change("size", loss=lambda _, b, m=model, h=head: (h(m(b.x)).squeeze(1) - b.y).square().mean())
        torch.manual_seed(1)
        epoch(case.vil())
        results.append(contents(case.model))
    assert all(near(value, results[0][name], 1e-14) for name, value in results[1].items())


def test_a_loss_with_derivatives_of_its_own() -> None:
    """A penalty on the gradient in the inputs; the loss has to enable gradients where it needs them."""

    def loss(model: Any, batch: NamedBatch) -> Tensor:
        with torch.enable_grad():
            x = batch.x.clone().requires_grad_()
            out = model.heads["size"](model(x)).squeeze(1)
            (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            total: Tensor = (out - batch.y).square().mean() + slope.square().mean()
        return total

    case = Case(dtype=torch.float64)
    case.change("size", loss=loss)
    vil = case.vil(alpha_optimizer=checked(), alpha_epochs=1)
    assert epoch(vil).kept == "start"


@pytest.mark.parametrize("inner", INNER)
def test_every_kind_of_optimizer_sees_ones_first(inner: str) -> None:
    """Also the second time, and after a search that went far."""
    seen: list[Any] = []

    def make(parameters: list[Tensor]) -> torch.optim.Optimizer:
        (alphas,) = parameters
        assert alphas.is_leaf
        assert alphas.requires_grad
        assert alphas.grad is None
        seen.append(alphas.tolist())
        optimizer = Recorder(parameters, lr=50.0)
        optimizer.seen, optimizer.places = [], []
        return optimizer

    vil = Case().vil(make_optimizer=INNER[inner], alpha_optimizer=make)
    epoch(vil)
    epoch(vil)
    assert seen == [[1.0] * 3] * 2


# ---- afterwards -----------------------------------------------------------------------------------------------------


def with_modes(case: Case, kind: str) -> None:
    model = case.model
    if kind == "eval":
        model.eval()
    elif kind == "frozen BatchNorm":
        model.norm.eval()
    elif kind == "always frozen BatchNorm":
        model.norm.train = lambda mode=True: nn.Module.train(model.norm, False)
        model.train()
    elif kind == "dropout in evaluation":
        model.eval()
        model.dropout.train()


@pytest.mark.parametrize(
    "kind", ["train", "eval", "frozen BatchNorm", "always frozen BatchNorm", "dropout in evaluation"]
)
def test_modes_and_gradients(kind: str) -> None:
    """Every module is in the mode it was in, after each stage and after errors; BatchNorm that is frozen stays so."""
    case = Case(norm=True, dropout=0.5)
    with_modes(case, kind)
    modes, buffers = [m.training for m in case.model.modules()], dict(case.model.named_buffers())
    wants = [p.requires_grad for p in case.model.parameters()]
    before = {name: b.clone() for name, b in buffers.items()}
    seen: list[tuple[bool, bool]] = []
    loss = case.tasks["kind"].loss

    def spy(model: Any, batch: NamedBatch) -> Tensor:
        seen.append((model.training, model.dropout.training))
        if len(seen) == 2:
            raise OSError("once")
        return loss(model, batch)

    case.change("kind", loss=spy)
    for p in case.model.parameters():
        p.grad = torch.ones_like(p)
    vil = case.vil()
    with pytest.raises(OSError, match="once"):
        epoch(vil)
    assert [m.training for m in case.model.modules()] == modes
    for stage in vil.stages():
        assert [m.training for m in case.model.modules()] == modes, stage
        assert all(p.grad is None for p in case.model.parameters() if p.requires_grad)
    assert seen == [(True, True)] * 6  # training is training, whatever mode the model was in
    assert [p.requires_grad for p in case.model.parameters()] == wants
    assert same_values(buffers, before) == ("frozen" in kind)


def test_nothing_is_left_on_the_model() -> None:
    """No hooks, attributes or entries in the state dict."""
    case = Case(norm=True, tied=True)
    model = case.model

    def shape() -> Any:
        return {
            name: (sorted(vars(m)), list(m._parameters), list(m._buffers), len(m._forward_hooks))
            for name, m in model.named_modules()
        }

    before, keys = shape(), list(model.state_dict())
    epoch(case.vil())
    assert shape() == before
    assert list(model.state_dict()) == keys
    assert all(type(p) is nn.Parameter and p.is_leaf and p.requires_grad for p in model.parameters())
    assert not any(b.requires_grad for b in model.buffers())


def test_parametrized_weights() -> None:
    """weight_norm and spectral_norm, whose weights are made of others, and whose buffers training changes."""
    case = Case()
    torch.nn.utils.parametrizations.weight_norm(case.model.second)
    torch.nn.utils.parametrizations.spectral_norm(case.model.first)
    before = contents(case.model)
    found = epoch(case.vil())
    after = contents(case.model)
    assert found.kept == "search"
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert {"second.parametrizations.weight.original0", "first.parametrizations.weight.0._u"} <= moved
