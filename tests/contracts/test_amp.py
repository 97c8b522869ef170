"""Mixed precision: bfloat16 and float16 autocast with GradScaler, every method on backbones with normalisation layers
(where the vmapped backward of TorchJD's issue 699 raises)."""

from __future__ import annotations

import copy
import functools
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torchjd.autojac import mtl_backward

import mtlgrad
from mtlgrad import AlphaVIL
from mtlgrad.alphavil import Task
from tests.conftest import HAS_GPU
from tests.support.bounds import near
from tests.support.nets import (
    BACKBONES,
    METHODS,
    AdaTask,
    Batch,
    Bayes,
    Merge,
    Model,
    Sum,
    Trainer,
    autocast,
    batch,
    epoch,
)

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_GPU, reason="no usable GPU"))]

TASKS = ("size", "marks", "kind")

EVERY = {"sum": Sum, **METHODS}
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
STEPS = 20


def new(backbone: str, method: str, dtype: torch.dtype | None, device: str = "cpu", scale: float = 2.0**12) -> Trainer:
    scaler = torch.amp.GradScaler(device, init_scale=scale) if dtype == torch.float16 else None
    return EVERY[method](Model(backbone).to(device), autocast(device, dtype), scaler)


def gradient(trainer: Trainer) -> Tensor:
    """At the shared parameters, of each task where they have .jac; without the loss scale."""
    found = [getattr(p, "jac", p.grad) for p in trainer.model.shared]
    assert all(g is not None and g.dtype == torch.float32 and bool(g.isfinite().all()) for g in found)
    return torch.cat([g.flatten().cpu() for g in found]) / trainer.scaler.get_scale()  # type: ignore[union-attr]


def first_gradient(trainer: Trainer, backbone: str, device: str = "cpu") -> Tensor:
    """Of the last of some batches, since BayesAgg is plain summation before; no parameter moves."""
    for i in range(Bayes.warm_up + 1):
        trainer.optimizer.zero_grad()
        trainer.backward(batch(backbone, i, device=device))
    return gradient(trainer)


def train(trainer: Trainer, backbone: str, device: str = "cpu", steps: int = STEPS) -> list[float]:
    """The sum of the losses, over as many batches as there are in an epoch."""
    shown = []
    for i in range(steps):
        losses = trainer.step(batch(backbone, i % 4, device=device))
        shown.append(float(torch.stack(losses).sum()))
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in trainer.model.parameters())
    return [sum(shown[i : i + 4]) / 4 for i in range(0, steps, 4)]


@functools.cache
def in_float32(backbone: str, method: str, device: str) -> tuple[Tensor, list[float]]:
    found = first_gradient(new(backbone, method, None, device), backbone, device)
    return found, train(new(backbone, method, None, device), backbone, device)


def distance(backbone: str, method: str, dtype: torch.dtype, device: str) -> float:
    exact, _ = in_float32(backbone, method, device)
    found = first_gradient(new(backbone, method, dtype, device), backbone, device)
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("backbone", "dtype"), [*((b, torch.bfloat16) for b in BACKBONES), ("layer norm", torch.float16)], ids=str
)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("device", DEVICES)
def test_trains_as_in_float32(device: str, backbone: str, method: str, dtype: torch.dtype) -> None:
    """A method loses of the gradient about what plain summation does; and it learns as well as in float32."""
    assert distance(backbone, method, dtype, device) <= 2.0 * distance(backbone, "sum", dtype, device)
    trainer = new(backbone, method, dtype, device)
    shown = train(trainer, backbone, device)
    _, exact = in_float32(backbone, method, device)
    assert shown[-1] < 0.7 * shown[0]
    assert shown[-1] == pytest.approx(exact[-1], rel=0.06)
    if dtype == torch.float16:
        assert trainer.scaler.get_scale() == 2.0**12  # no step was skipped
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_the_whole_step_inside_autocast(method: str) -> None:
    """torch advises against a backward in there; here it changes no bit, as it changes none of torch's own."""
    found = []
    for inside in (nullcontext, autocast("cpu", torch.bfloat16)):
        trainer = new("batch norm", method, torch.bfloat16)
        for i in range(Bayes.warm_up + 2):
            with inside():
                trainer.step(batch("batch norm", i))
        found.append(copy.deepcopy(list(trainer.model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found))


# ---- overflow --------------------------------------------------------------------------------------------------------


def snapshot(trainer: Trainer) -> list[Tensor]:
    values = list[Tensor](trainer.model.parameters())
    values += [v for state in trainer.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return [v.detach().clone() for v in values]


def spoil(trainer: Trainer, where: str) -> None:
    """One task's gradient becomes infinite: from its loss on, or in the backbone's first layer alone."""
    if where == "loss":
        trainer.model.factors = (1.0, math.inf, 1.0)
        return
    passes: list[None] = []
    task = 1 if isinstance(trainer, (Merge, AdaTask)) else 0  # the others make one backward through the backbone

    def hook(gradient: Tensor) -> Tensor:
        passes.append(None)
        return gradient * math.inf if len(passes) == task + 1 else gradient

    trainer.model.shared[0].register_hook(hook)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("where", ["loss", "backbone"])
@pytest.mark.parametrize("method", METHODS)
def test_an_infinity_in_one_task_skips_the_step(method: str, where: str, device: str) -> None:
    """The scale falls; parameters, moments and step counts stay; and the next step is the one without it."""
    trainer = new("layer norm", method, torch.float16, device)
    for i in range(Bayes.warm_up + 2):
        trainer.step(batch(seed=i, device=device))
    before = snapshot(trainer)
    other = copy.deepcopy(trainer.model.state_dict()), copy.deepcopy(trainer.optimizer.state_dict())
    spoil(trainer, where)
    losses = trainer.step(batch(seed=7, device=device))
    assert [bool(loss.isfinite()) for loss in losses] == [True, where != "loss", True]
    assert trainer.scaler.get_scale() == 2.0**11
    assert all(torch.equal(a, b) for a, b in zip(snapshot(trainer), before, strict=True))
    if where == "backbone":
        return
    trainer.model.factors = (1.0, 1.0, 1.0)
    trainer.step(batch(seed=8, device=device))
    assert trainer.scaler.get_scale() == 2.0**11
    after = snapshot(trainer)
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True) if a.numel() > 1)
    if method == "bayesagg":
        return  # its statistics have the bad batch's features, and those are good
    trainer.model.load_state_dict(other[0])
    trainer.optimizer.load_state_dict(other[1])
    trainer.step(batch(seed=8, device=device))
    assert all(torch.equal(a, b) for a, b in zip(snapshot(trainer), after, strict=True))


@pytest.mark.parametrize("method", [name for name in METHODS if issubclass(METHODS[name], AdaTask)])
def test_moments_do_not_see_the_scale(method: str) -> None:
    """Of each task; a power of two changes nothing but what float16 rounds to zero."""
    found = []
    for scale in (2.0**8, 2.0**13):
        trainer = new("layer norm", method, torch.float16, scale=scale)
        trainer.step(batch())
        states = [trainer.optimizer.state[p] for p in trainer.model.shared]
        found.append([v for state in states for name, v in state.items() if name[-1] in "012"])
    assert len(found[0]) >= 3 * len(trainer.model.shared)
    assert all(near(a, b, 0.02, 1e-6) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_scale_that_is_too_large_comes_down(method: str) -> None:
    """Where float16 overflows on the way back, and no loss is infinite."""
    trainer = new("layer norm", method, torch.float16, scale=2.0**22)
    before = snapshot(trainer)
    for i in range(12):
        last = trainer.scaler.get_scale()
        losses = trainer.step(batch(seed=i))
        assert all(bool(loss.isfinite()) for loss in losses)
        now = snapshot(trainer)
        skipped = trainer.scaler.get_scale() == last / 2
        assert skipped == all(torch.equal(a, b) for a, b in zip(now, before))
        assert skipped or i > 0
        before = now
    assert 2.0**11 <= trainer.scaler.get_scale() <= 2.0**21


@pytest.mark.parametrize("scale", [2.0**3, 2.0**14])
def test_bayesagg_sends_back_the_same_whatever_the_scale(scale: float) -> None:
    """Through total(), at float16 features: the same aggregate, rounded to float16 at another place."""
    trainer: Any = new("transformer", "bayesagg", torch.float16, scale=scale)
    seen: list[Tensor] = []

    def look(_module: Any, _inputs: Any, features: Tensor) -> None:
        if features.requires_grad:
            features.register_hook(seen.append)

    trainer.model.backbone.register_forward_hook(look)
    first_gradient(trainer, "transformer")
    data = batch("transformer", Bayes.warm_up)
    with trainer.mixed():
        features = trainer.model.backbone(data.x)
    want = trainer.bayes.aggregate(features, data.y)
    assert seen[-1].dtype == features.dtype == torch.float16
    # Half a unit in the last place; below 2^-14 over the scale those are all alike.
    error = (seen[-1].double() / scale - want.double()).abs()
    assert bool((error <= 2.0**-11 * want.abs() + 2.0**-25 / scale).all())
    assert float(want.abs().max()) > 1e-3


@pytest.mark.parametrize("scale", [2.0**3, 2.0**14])
@pytest.mark.parametrize("method", ["aligned layer", "aligned merge", "aligned weigh"])
def test_alignment_does_not_see_the_scale(method: str, scale: float) -> None:
    trainers: list[Any] = [new("layer norm", method, torch.float16, scale=s) for s in (2.0**10, scale)]
    for trainer in trainers:
        trainer.backward(batch())
    assert torch.allclose(trainers[0].aligned.weights, trainers[1].aligned.weights, rtol=5e-3)
    assert int(trainers[1].aligned.rank) == 3


# ---- alphaVIL --------------------------------------------------------------------------------------------------------


class ScaledSGD(torch.optim.SGD):
    """What alphaVIL is given for float16: its step is the scaler's."""

    def __init__(self, parameters: list[Tensor], scaler: Any, **settings: Any):
        super().__init__(parameters, **settings)
        self.inner, self.scaler = torch.optim.SGD(parameters, **settings), scaler

    def step(self, closure: Any = None) -> Any:
        self.scaler.step(self.inner)
        self.scaler.update()


def vil(backbone: str, dtype: torch.dtype | None, device: str, scale: float) -> tuple[AlphaVIL, Any]:
    """In training the loss is scaled; the development loss is not."""
    model = Model(backbone).to(device)
    mixed, scaler = autocast(device, dtype), torch.amp.GradScaler(device, scale, enabled=dtype == torch.float16)
    batches = [batch(backbone, i, device=device) for i in range(4)]

    def loss(model: Model, data: Batch, task: int) -> Tensor:
        with mixed():
            found = model.losses(model.backbone(data.x), data.y)[task]
        return scaler.scale(found) if model.training else found  # type: ignore[no-any-return]

    tasks = {name: Task(batches, functools.partial(loss, task=t), batches) for t, name in enumerate(TASKS)}
    make = functools.partial(ScaledSGD, scaler=scaler, lr=0.1, momentum=0.5)
    return AlphaVIL(model, tasks, "size", make_optimizer=make, alpha_epochs=2), scaler


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("device", DEVICES)
def test_alphavil_trains_as_in_float32(device: str, backbone: str, dtype: torch.dtype) -> None:
    ends, alphas = [], []
    for each in (None, dtype):
        trained, scaler = vil(backbone, each, device, 2.0**10)
        torch.manual_seed(1)  # the batches' order
        rounds = [epoch(trained) for _ in range(3)]
        assert rounds[-1].after < 0.8 * rounds[0].before
        assert not any(r.sat_out for r in rounds)
        ends.append(rounds[-1].after)
        alphas.append(rounds[0].alphas)
        assert scaler.get_scale() == (2.0**10 if each == torch.float16 else 1.0)
    assert ends[1] == pytest.approx(ends[0], rel=0.1)
    assert torch.allclose(*alphas, atol=0.05)


def test_alphavil_skips_steps_that_overflow() -> None:
    """And so no task sits out: one whose scale is far too large at first trains once it has come down."""
    trained, scaler = vil("layer norm", torch.float16, "cpu", 2.0**20)
    found = epoch(trained)
    assert scaler.get_scale() < 2.0**20
    assert not found.sat_out
    assert found.after < found.before


# ---- beside TorchJD --------------------------------------------------------------------------------------------------


@HALVES
@pytest.mark.parametrize("backbone", BACKBONES)
# Of torch, that vmap has no rule for attention's backward.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_where_torchjd_raises(backbone: str, dtype: torch.dtype) -> None:
    """TorchJD 0.18 (its issue 699, torch's 184890): one vmapped backward of all tasks, which normalisation layers of
    mixed types have no rule for. task_backward makes ordinary ones, with or without the features."""
    model, data = Model(backbone), batch(backbone)

    def forward() -> tuple[list[Tensor], Tensor]:
        with autocast("cpu", dtype)():
            features = model.backbone(data.x)
            return model.losses(features, data.y), features

    losses, features = forward()
    rows = [torch.autograd.grad(loss, model.shared, retain_graph=True) for loss in losses]
    want = [torch.stack(parts) for parts in zip(*rows)]
    with pytest.raises(RuntimeError, match="expected scalar type"):
        mtl_backward(losses, features=features)
    for through in (True, False):
        model.zero_grad()
        losses, features = forward()
        mtlgrad.task_backward(losses, model.shared, features=features if through else None)
        assert all(torch.equal(p.jac, w) for p, w in zip(model.shared, want))  # type: ignore[attr-defined]
        for p in model.shared:
            del p.jac  # type: ignore[attr-defined]
