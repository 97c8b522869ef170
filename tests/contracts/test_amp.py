"""Mixed precision: bfloat16 and float16 autocast with GradScaler, every method on backbones with normalisation layers
(where the vmapped backward of TorchJD's issue 699 raises); the scaler and clipping see .jac, each task's gradient on
its own."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import pickle
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlgrad
from mtlgrad import AlignedMTL, AlphaVIL
from mtlgrad.alphavil import Task
from mtlgrad.optim import AdaTaskAdam, clip_task_grad_norm_, unscale_jac_
from tests.conftest import HAS_GPU
from tests.support.bounds import all_near, gradients, near, normal, one_line, same, values
from tests.support.nets import (
    BACKBONES,
    METHODS,
    PAIRS,
    AdaTask,
    Batch,
    Bayes,
    Case,
    Merge,
    Model,
    NamedBatch,
    Net,
    Sum,
    Trainer,
    autocast,
    backward,
    batch,
    case_on,
    epoch,
    fill,
    fill_grad,
    inputs,
    make_adatask,
    new,
    several,
)
from tests.support.oracles import at_features, development_loss, procrustes, pushed

pytestmark = pytest.mark.usefixtures("one_thread")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_GPU, reason="no usable GPU"))]
)
#: Of AdaTask's optimizers, which are outside autocast and share what the scaler sees, two stand for all.
WAYS = [*(name for name in METHODS if "adatask" not in name), "adatask adam", "adatask rmsprop, whole graph"]
each_way = pytest.mark.parametrize("method", WAYS)
halves = pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
each_backbone = pytest.mark.parametrize("backbone", BACKBONES)

# ---- autocast --------------------------------------------------------------------------------------------------------


def trainer_of(
    backbone: str, method: str, dtype: torch.dtype | None, device: str = "cpu", scale: float = 2.0**12
) -> Any:
    scaler = torch.amp.GradScaler(device, init_scale=scale) if dtype == F16 else None
    made: type[Trainer] = Sum if method == "sum" else METHODS[method]
    return made(Model(backbone).to(device), autocast(device, dtype), scaler)


def first_gradient(trainer: Trainer, backbone: str, device: str = "cpu") -> Tensor:
    """Of the last of some batches, since BayesAgg is plain summation before; no parameter moves. At the shared
    parameters, of each task where they have .jac; without the loss scale."""
    for i in range(Bayes.warm_up + 1):
        trainer.optimizer.zero_grad()
        trainer.backward(batch(backbone, i, device=device))
    found = [getattr(p, "jac", p.grad) for p in trainer.model.shared]
    assert all(g is not None and g.dtype == F32 and bool(g.isfinite().all()) for g in found)
    return torch.cat([g.flatten().cpu() for g in found]) / trainer.scaler.get_scale()  # type: ignore[union-attr]


def train(trainer: Trainer, backbone: str, device: str = "cpu", steps: int = 20) -> list[float]:
    """The sum of the losses, over as many batches as there are in an epoch."""
    shown = []
    for i in range(steps):
        losses = trainer.step(batch(backbone, i % 4, device=device))
        shown.append(float(torch.stack(losses).sum()))
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in trainer.model.parameters())
    return [sum(shown[i : i + 4]) / 4 for i in range(0, steps, 4)]


@functools.cache
def in_float32(backbone: str, method: str, device: str) -> tuple[Tensor, list[float]]:
    found = first_gradient(trainer_of(backbone, method, None, device), backbone, device)
    return found, train(trainer_of(backbone, method, None, device), backbone, device)


@functools.cache
def distance(backbone: str, method: str, dtype: torch.dtype, device: str) -> float:
    exact, _ = in_float32(backbone, method, device)
    found = first_gradient(trainer_of(backbone, method, dtype, device), backbone, device)
    return float((found - exact).norm() / exact.norm())


@each_device
@pytest.mark.parametrize(("backbone", "dtype"), [*((b, BF16) for b in BACKBONES), ("layer norm", F16)], ids=str)
@each_way
def test_trains_as_in_float32(device: str, backbone: str, method: str, dtype: torch.dtype) -> None:
    """A method loses of the gradient about what plain summation does; and it learns as well as in float32."""
    assert distance(backbone, method, dtype, device) <= 2.0 * distance(backbone, "sum", dtype, device)
    trainer = trainer_of(backbone, method, dtype, device)
    shown = train(trainer, backbone, device)
    _, exact = in_float32(backbone, method, device)
    assert shown[-1] < 0.7 * shown[0]
    assert shown[-1] == pytest.approx(exact[-1], rel=0.06)
    if dtype == F16:
        assert trainer.scaler.get_scale() == 2.0**12  # no step was skipped
    assert all(p.dtype == F32 for p in trainer.model.parameters())


def vil(backbone: str, dtype: torch.dtype | None, device: str, scale: float) -> tuple[AlphaVIL, Any]:
    """In training the loss is scaled, and the step is the scaler's; the development loss is not."""
    model = Model(backbone).to(device)
    mixed, scaler = autocast(device, dtype), torch.amp.GradScaler(device, scale, enabled=dtype == F16)
    batches = [batch(backbone, i, device=device) for i in range(4)]

    class ScaledSGD(torch.optim.SGD):
        def __init__(self, parameters: list[Tensor]):
            super().__init__(parameters, lr=0.1, momentum=0.5)
            self.inner = torch.optim.SGD(parameters, lr=0.1, momentum=0.5)

        def step(self, closure: Any = None) -> Any:
            scaler.step(self.inner)
            scaler.update()

    def loss(model: Model, data: Batch, task: int) -> Tensor:
        with mixed():
            found = model.losses(model.backbone(data.x), data.y)[task]
        return scaler.scale(found) if model.training else found  # type: ignore[no-any-return]

    names = ("size", "marks", "kind")
    tasks = {name: Task(batches, functools.partial(loss, task=t), batches) for t, name in enumerate(names)}
    return AlphaVIL(model, tasks, "size", make_optimizer=ScaledSGD, alpha_epochs=2), scaler


@halves
@each_backbone
@each_device
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
        assert scaler.get_scale() == (2.0**10 if each == F16 else 1.0)
    assert ends[1] == pytest.approx(ends[0], rel=0.1)
    assert torch.allclose(*alphas, atol=0.05)


@each_way
def test_the_whole_step_inside_autocast(method: str) -> None:
    """torch advises against a backward in there; here it changes no bit, as it changes none of torch's own."""
    found = []
    for inside in (nullcontext, autocast("cpu", BF16)):
        trainer = trainer_of("batch norm", method, BF16)
        for i in range(Bayes.warm_up + 2):
            with inside():
                trainer.step(batch("batch norm", i))
        found.append(trainer.model.parameters())
    assert same(*found)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
def test_aligned_gradients_of_either_type(norm: type[nn.Module]) -> None:
    """Features in bfloat16 from a linear layer, in float32 from a LayerNorm."""
    torch.manual_seed(1)
    for layers in ((nn.Linear(6, 8), norm(8), nn.Linear(8, 5)), (nn.Linear(6, 5), norm(5))):
        net, x, aligned = Net(backbone=nn.Sequential(*layers)), inputs(), AlignedMTL(3)
        with torch.autocast("cpu", BF16):
            features, rows = at_features(net, x)
            want = procrustes(rows)
            expected = pushed(net, features, want.update)
            loss: Any = sum(net.losses(aligned(net.backbone(x))))
        loss.backward()
        assert near(aligned.weights, want.weights, 1e-9)  # type: ignore[arg-type]
        all_near(gradients(net.shared), expected, 0.02)
        assert all(p.grad.dtype == F32 for p in net.shared)  # type: ignore[union-attr]


@each_device
def test_alphavils_search_sees_what_the_model_then_has(device: str) -> None:
    """bfloat16 products of it, not of a weight that autocast has kept."""
    case = case_on(Case(), device)
    for name, task in list(case.tasks.items()):

        def loss(model: Any, batch: NamedBatch, of: Any = task.loss) -> Tensor:
            with torch.autocast(device, dtype=BF16):
                return of(model, batch)  # type: ignore[no-any-return]

        case.change(name, loss=loss)
    for _ in range(2):
        before = development_loss(case.model, case.tasks["size"])
        found = epoch(case.vil(make_optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1)))
        assert found.kept == "search"
        assert development_loss(case.model, case.tasks["size"]) == found.after < before == found.before
    assert all(p.dtype == F32 for p in case.model.parameters())


@halves
@each_backbone
# Of torch, that vmap has no rule for attention's backward.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_where_torchjd_raises(backbone: str, dtype: torch.dtype) -> None:
    """TorchJD 0.18 (its issue 699, torch's 184890): one vmapped backward of all tasks, which normalisation layers of
    mixed types have no rule for. task_backward makes ordinary ones, with or without the features."""
    from torchjd.autojac import mtl_backward

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


# ---- a loss scale, and overflow --------------------------------------------------------------------------------------


def snapshot(trainer: Trainer) -> list[Tensor]:
    states = [v for state in trainer.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return values([*trainer.model.parameters(), *states])


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


@each_device
@pytest.mark.parametrize("where", ["loss", "backbone"])
@each_way
def test_an_infinity_in_one_task_skips_the_step(method: str, where: str, device: str) -> None:
    """The scale falls; parameters, moments and step counts stay; and the next step is the one without it."""
    trainer = trainer_of("layer norm", method, F16, device)
    for i in range(Bayes.warm_up + 2):
        trainer.step(batch(seed=i, device=device))
    before = snapshot(trainer)
    other = copy.deepcopy(trainer.model.state_dict()), copy.deepcopy(trainer.optimizer.state_dict())
    spoil(trainer, where)
    losses = trainer.step(batch(seed=7, device=device))
    assert [bool(loss.isfinite()) for loss in losses] == [True, where != "loss", True]
    assert trainer.scaler.get_scale() == 2.0**11
    assert same(snapshot(trainer), before)
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
    assert same(snapshot(trainer), after)


@each_way
def test_a_scale_that_is_too_large_comes_down(method: str) -> None:
    """Where float16 overflows on the way back, and no loss is infinite."""
    trainer = trainer_of("layer norm", method, F16, scale=2.0**22)
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


def test_alphavil_skips_steps_that_overflow() -> None:
    """And so no task sits out: one whose scale is far too large at first trains once it has come down."""
    trained, scaler = vil("layer norm", F16, "cpu", 2.0**20)
    found = epoch(trained)
    assert scaler.get_scale() < 2.0**20
    assert not found.sat_out
    assert found.after < found.before


@pytest.mark.parametrize("method", [name for name in METHODS if "adatask" in name])
def test_moments_do_not_see_the_scale(method: str) -> None:
    """Of each task; a power of two changes nothing but what float16 rounds to zero."""
    found = []
    for scale in (2.0**8, 2.0**13):
        trainer = trainer_of("layer norm", method, F16, scale=scale)
        trainer.step(batch())
        states = [trainer.optimizer.state[p] for p in trainer.model.shared]
        found.append([v for state in states for name, v in state.items() if name[-1] in "012"])
    assert len(found[0]) >= 3 * len(trainer.model.shared)
    assert all(near(a, b, 0.02, 1e-6) for a, b in zip(*found, strict=True))


each_scale = pytest.mark.parametrize("scale", [2.0**3, 2.0**14])


@each_scale
@pytest.mark.parametrize("method", ["aligned layer", "aligned merge", "aligned weigh"])
def test_weights_do_not_see_the_scale(method: str, scale: float) -> None:
    trainers = [trainer_of("layer norm", method, F16, scale=s) for s in (2.0**10, scale)]
    for trainer in trainers:
        trainer.backward(batch())
    assert torch.allclose(trainers[0].aligned.weights, trainers[1].aligned.weights, rtol=5e-3)
    assert int(trainers[1].aligned.rank) == 3


@each_scale
def test_bayesagg_sends_back_the_same_whatever_the_scale(scale: float) -> None:
    """Through total(), at float16 features: the same aggregate, rounded to float16 at another place."""
    trainer = trainer_of("transformer", "bayesagg", F16, scale=scale)
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
    assert seen[-1].dtype == features.dtype == F16
    # Half a unit in the last place; below 2^-14 over the scale those are all alike.
    error = (seen[-1].double() / scale - want.double()).abs()
    assert bool((error <= 2.0**-11 * want.abs() + 2.0**-25 / scale).all())
    assert float(want.abs().max()) > 1e-3


# ---- AdaTask's optimizers with a scaler ------------------------------------------------------------------------------

each_rule = pytest.mark.parametrize("name", PAIRS, ids=lambda name: f"adatask {name}")
explicitly = pytest.mark.parametrize("explicit", [False, True])


def scaler_of(scale: float, **options: Any) -> Any:
    """That has a scale already, as after a loss."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, **options)
    scaler.scale(torch.ones(()))
    return scaler


def unscale(scaler: Any, *optimizers: Any) -> None:
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
        unscale_jac_(scaler, optimizer)


def scaled(scaler: Any, net: Net, x: Tensor) -> None:
    losses = [scaler.scale(loss) for loss in net.from_features(net.backbone(x))]
    mtlgrad.task_backward(losses, net.shared)


def jacs(parameters: Any) -> list[Tensor]:
    return [p.jac for p in parameters]


@each_rule
def test_scaled_steps_are_those_without_a_scaler(name: str) -> None:
    """Powers of two: bit for bit, clipped or not; a plain optimizer beside it, too."""
    nets = [Net(), Net()]
    beside = [nn.Linear(6, 2), nn.Linear(6, 2)]
    beside[1].load_state_dict(beside[0].state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    ours = [make_adatask(name, net.parameters()) for net in nets]
    plain = [torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.5) for layer in beside]
    for seed in range(5):
        x = inputs(seed=seed)
        for optimizer in (*ours, *plain):
            optimizer.zero_grad()
        scaled(scaler, nets[0], x)
        scaler.scale(beside[0](x).square().mean()).backward()
        backward(nets[1], x, False)
        beside[1](x).square().mean().backward()
        unscale(scaler, ours[0])
        for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            assert torch.equal(getattr(p, "jac", p.grad), getattr(q, "jac", q.grad))
        if seed > 1:
            norms = [clip_task_grad_norm_(net.shared, 1e-3) for net in nets]
            assert torch.equal(*norms)
            assert (norms[0] > 1e-3).any()
        for optimizer in (ours[0], plain[0]):
            scaler.step(optimizer)
        scaler.update()
        for optimizer in (ours[1], plain[1]):
            optimizer.step()
        assert same(nets[0].parameters(), nets[1].parameters())
        assert same(beside[0].parameters(), beside[1].parameters())
    assert scaler.get_scale() == 2.0**12  # it grew twice


@explicitly
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@each_rule
def test_scaler_skips_a_step(name: str, bad: float, explicit: bool) -> None:
    """For a bad number in one task's .jac alone; another optimizer with the same scaler takes its step."""
    p, head, q, other = (new(i, 9) for i in range(4))
    optimizer, second = make_adatask(name, [p, head]), AdaTaskAdam([q], num_tasks=2)
    plain, scaler = torch.optim.SGD([other], lr=1.0), scaler_of(4.0)
    fill([p], 1)
    fill([q], 1, 2)
    fill_grad([head, other], 1)
    p.jac[2, 5] = bad  # type: ignore[attr-defined]
    before, jacobian = values([p, head, q, other]), q.jac.clone()  # type: ignore[attr-defined]
    if explicit:
        unscale(scaler, optimizer, second)
        with pytest.raises(RuntimeError, match="already been called"):
            scaler.unscale_(optimizer)
    for each in (optimizer, second, plain):
        assert scaler.step(each) is None
    assert same([p, head], before[:2])
    assert not optimizer.state_dict()["state"]
    assert torch.equal(q.jac, jacobian / 4.0)  # type: ignore[attr-defined]
    assert not torch.equal(q, before[2])
    assert torch.equal(other, before[3] - other.grad)  # type: ignore[operator]
    scaler.update()
    assert scaler.get_scale() == 2.0


@explicitly
def test_adatask_scaler_with_jac_alone(explicit: bool) -> None:
    """No parameter has .grad: infinities in .jac are all that there is to skip a step, and to make the scale fall."""
    p, q = new(1, 9), new(2, 2, 3)
    optimizer, scaler = AdaTaskAdam([p, q], num_tasks=3), scaler_of(8.0)
    for step, bad in enumerate([True, True, False]):
        fill([p, q], step)
        if bad:
            q.jac[1, 0, 2] = math.inf  # type: ignore[attr-defined]
        before, wanted = values([p, q]), [each.jac / 8.0 * 2**step for each in (p, q)]  # type: ignore[attr-defined]
        if explicit:
            unscale(scaler, optimizer)
        scaler.step(optimizer)
        assert same(jacs([p, q]), wanted)
        assert same([p, q], before) == bad
        assert p.grad is None and q.grad is None  # noqa: PT018
        scaler.update()
        assert scaler.get_scale() == (4.0 / 2**step if bad else 2.0)


@explicitly
def test_adatask_scaler_skips_a_step_for_grad_alone(explicit: bool) -> None:
    p, head = new(1, 9), new(2, 9)
    optimizer, scaler = AdaTaskAdam([p, head], num_tasks=3), scaler_of(4.0)
    fill([p], 1)
    fill_grad([head], 1)
    head.grad[3] = math.nan  # type: ignore[index]
    before = values([p, head])
    if explicit:
        unscale(scaler, optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert same([p, head], before)
    assert not optimizer.state_dict()["state"]


def test_adatask_scaler_that_skips_again() -> None:
    """.jac of a step that was skipped is looked at anew in the next, as .grad is."""
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    ours, plain = AdaTaskAdam([p], num_tasks=2), torch.optim.Adam([q])
    p.jac, q.grad = torch.full((2, 4), math.inf), torch.full((4,), math.inf)  # type: ignore[attr-defined]
    scaler = scaler_of(8.0)
    for scale in (4.0, 2.0, 1.0):
        for optimizer in (ours, plain):
            scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale
    assert same([p, q], [torch.ones(4)] * 2)


@pytest.mark.parametrize("enabled", [True, False])
def test_adatask_scaler_sees_jac_in_another_order(enabled: bool) -> None:
    """Than the parameter's; and leaves it alone where it is disabled."""
    p = nn.Parameter(normal(1, 2, 3, 4, 5).float().contiguous(memory_format=torch.channels_last))
    optimizer, scaler = AdaTaskAdam([p], num_tasks=3), scaler_of(8.0, enabled=enabled)
    fill([p], 1)
    found: Tensor = p.jac  # type: ignore[attr-defined]
    want = found / (8.0 if enabled else 1.0)
    scaler.step(optimizer)
    assert p.jac is found  # type: ignore[attr-defined]
    assert torch.equal(found, want)
    assert p.grad is None


@explicitly
def test_adatask_scaler_with_several_dtypes_and_grad_beside_jac(explicit: bool) -> None:
    """.grad is unscaled everywhere, and is what it was before."""
    dtypes = [F32, BF16, F64, F32]
    parameters, heads = ([new(i, 9 - i, dtype=dtype) for i, dtype in enumerate(dtypes)] for _ in range(2))
    optimizer, scaler = AdaTaskAdam([*parameters, *heads], num_tasks=3), scaler_of(4.0)
    fill(parameters, 1)
    fill_grad([*parameters, *heads], 1)
    for p in parameters[1:3]:
        p.grad = p.grad.to_sparse()  # type: ignore[union-attr]
    grads: list[Any] = [p.grad for p in (*parameters, *heads)]
    wanted = [j / 4.0 for j in jacs(parameters)] + [g.to_dense() / 4.0 for g in grads]
    if explicit:
        unscale(scaler, optimizer)
    scaler.step(optimizer)
    assert same([*jacs(parameters), *(g.to_dense() for g in grads)], wanted)
    assert all(p.grad is g for p, g in zip((*parameters, *heads), grads, strict=True))


def test_adatask_refuses_float16_as_torch_does() -> None:
    p = new(1, 4, dtype=F16)
    optimizer, scaler = AdaTaskAdam([p], num_tasks=1), scaler_of(2.0)
    fill([p], 1, 1)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.step(optimizer)
    optimizer.zero_grad()
    assert p.grad is None
    fill([p], 1, 1)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        unscale(scaler, optimizer)


def clip_grads(optimizer: Any) -> None:
    for _ in inspect.getmembers(optimizer):
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)


ASKED = [lambda optimizer: optimizer._step_supports_amp_scaling, inspect.getmembers, clip_grads]


@pytest.mark.parametrize("ask", ASKED, ids=["flag", "members", "clipping"])
@pytest.mark.parametrize("own", [False, True])
def test_others_may_ask_adatask_as_the_scaler_does(ask: Any, own: bool) -> None:
    """Lightning does, before it clips .grad. The step is the same, and .grad is again what it was."""
    found = []
    for asked in (False, True):
        p, head = new(1, 3), new(2, 3)
        optimizer = AdaTaskAdam([p, head], num_tasks=3)
        for step in range(3):
            fill([p], step)
            fill_grad([p, head] if own else [head], step)
            gradient = p.grad
            if asked:
                assert not optimizer._step_supports_amp_scaling
                ask(optimizer)
                assert torch.equal(p.grad, torch.zeros(3))  # type: ignore[arg-type]
                assert str(p.grad) == "tensor([0., 0., 0.])"
            elif ask is clip_grads:
                nn.utils.clip_grad_norm_([head], 1.0)
            optimizer.step()
            assert p.grad is gradient
        optimizer._step_supports_amp_scaling  # noqa: B018
        optimizer.zero_grad(set_to_none=False)
        assert p.grad is gradient
        assert gradient is None or not gradient.any()
        optimizer._step_supports_amp_scaling  # noqa: B018
        (p.square().sum() + head.sum()).backward()
        optimizer.zero_grad()
        assert p.grad is None
        fill([p], 4)
        optimizer._step_supports_amp_scaling  # noqa: B018
        p.grad = gradient = torch.ones(3)
        optimizer.step()
        assert p.grad is gradient
        found.append([p, head])
    assert same(*found)


def test_who_asks_adatask_and_then_unscales_reaches_jac() -> None:
    """As Lightning; then there is nothing left for unscale_jac_ to do."""
    p = new(1, 5)
    optimizer, scaler = AdaTaskAdam([p], num_tasks=3), scaler_of(4.0)
    fill([p], 1)
    [want] = [j / 4.0 for j in jacs([p])]
    assert not optimizer._step_supports_amp_scaling
    scaler.unscale_(optimizer)
    assert p.grad is None
    unscale_jac_(scaler, optimizer)
    assert torch.equal(p.jac, want)  # type: ignore[attr-defined]
    clip_task_grad_norm_([p], 1e-3)
    [clipped] = values(jacs([p]))
    scaler.step(optimizer)
    assert torch.equal(p.jac, clipped)  # type: ignore[attr-defined]
    assert not torch.equal(clipped, want)


class Wrapped:
    def __init__(self, optimizer: Any):
        self.optimizer = optimizer


def test_adatask_wrapped_without_a_scaler_without_jac() -> None:
    p = new(1, 5)
    optimizer, scaler = AdaTaskAdam([p], num_tasks=3), scaler_of(4.0)
    fill([p], 1)
    before = values(jacs([p]))
    unscale_jac_(None, optimizer)
    unscale_jac_(torch.amp.GradScaler("cpu", enabled=False), optimizer)
    assert same(jacs([p]), before)
    scaler.unscale_(optimizer)
    unscale_jac_(scaler, Wrapped(Wrapped(optimizer)))
    assert torch.equal(p.jac, before[0] / 4.0)  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"optimizer: expected one of mtlgrad\.optim, found SGD") as error:
        unscale_jac_(scaler, torch.optim.SGD([p]))
    one_line(error.value, "scaler.unscale_ is enough")
    none = AdaTaskAdam([new(1, 5)], num_tasks=3)
    scaler.unscale_(none)
    with pytest.raises(ValueError, match="found none; call task_backward first") as missing:
        unscale_jac_(scaler, none)
    one_line(missing.value)


#: What is called, and what the error of the last says.
WRONG: dict[str, tuple[list[str], str]] = {
    "unscale_ alone": (["unscale", "step"], "found it scaled"),
    "clipping while scaled": (["unscale", "clip", "step"], "found it scaled"),
    "another after unscaling": (["unscale", "unscale jac", "another", "step"], "found it scaled"),
    "more after unscaling": (["unscale", "unscale jac", "more", "step"], "found it scaled"),
    "clipping before the step": (["clip", "step"], "clip_task_grad_norm_ called before"),
    "clipping before both": (["clip", "unscale", "unscale jac"], "clip_task_grad_norm_ called before"),
    "clipping between": (["unscale", "clip", "unscale jac"], "clip_task_grad_norm_ called before"),
    "no unscale_": (["unscale jac"], "found none to that"),
    "unscale_ of the step before": (
        ["unscale", "unscale jac", "step", "update", "fresh", "unscale jac"],
        "none to that",
    ),
    "twice": (["unscale", "unscale jac", "unscale jac"], "found a second call"),
    "twice, clipped": (["unscale", "unscale jac", "clip", "unscale jac"], "found a second call"),
    "twice, with more": (["unscale", "unscale jac", "more", "unscale jac"], "found a second call"),
    "after the step": (["step", "unscale jac"], "found one to scaler.step"),
    "after both": (["unscale", "unscale jac", "step", "unscale jac"], "found a second call"),
}


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize(("calls", "words"), WRONG.values(), ids=WRONG)
def test_adatask_wrong_orders(calls: list[str], words: str, heads: bool) -> None:
    """An error in one line, with nothing changed; and the right order goes on."""
    p, other, head = new(1, 5), new(1, 5), new(2, 5)
    optimizer, scaler = AdaTaskAdam([p, other, head], num_tasks=3), scaler_of(4.0)

    def fresh() -> None:
        optimizer.zero_grad()
        fill([p], 3)
        p.jac *= scaler.get_scale()  # type: ignore[attr-defined]

    known: dict[str, Any] = {
        "unscale": lambda: scaler.unscale_(optimizer),
        "unscale jac": lambda: unscale_jac_(scaler, optimizer),
        "clip": lambda: clip_task_grad_norm_([p], 0.1),
        "step": lambda: scaler.step(optimizer),
        "update": lambda: scaler.update(),
        "fresh": fresh,
        "more": lambda: jacs([p])[0].add_(1.0),
        "another": lambda: fill([other], 4),
    }
    fresh()
    head.grad = torch.ones(5)
    for call in calls[:-1]:
        known[call]()
    before, states = values([p, head, *jacs([p])]), len(optimizer.state)
    with pytest.raises(RuntimeError) as error:
        known[calls[-1]]()
    names = ["AdaTaskAdam.step"] if words == "found it scaled" else []
    right = "unscale_jac_(scaler, optimizer), clip_task_grad_norm_ and scaler.step(optimizer)"
    one_line(error.value, *names, words, right)
    assert same([p, head, *jacs([p])], before)
    assert len(optimizer.state) == states
    assert p.grad is None
    scaler = scaler_of(4.0)
    fill([other], 3)
    clip_task_grad_norm_([other], 0.1)
    [want] = jacs([other])
    fresh()
    head.grad = torch.ones(5) if heads else None
    for call in ("unscale", "unscale jac", "clip", "step", "update"):
        known[call]()
    assert torch.equal(p.jac, want)  # type: ignore[attr-defined]
    assert not torch.equal(p, before[0])
    assert scaler.get_scale() == 4.0


UNTOUCHED = """
import pickle, sys, torch
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch import nn
kinds = [torch.amp.GradScaler, ShardedGradScaler, torch.optim.Optimizer, torch.optim.Adam, torch.Tensor, nn.Parameter]
before = [dict(vars(kind)) for kind in kinds]
import mtlgrad
loaded = pickle.load(open(sys.argv[1], "rb"))
[p] = loaded.param_groups[0]["params"]
for explicit in (True, False):  # with an optimizer from another process, and where none has been made
    p.jac = torch.full((2, 5), 8.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    if explicit:
        scaler.unscale_(loaded)
        mtlgrad.optim.unscale_jac_(scaler, loaded)
    else:
        scaler.step(loaded)
    assert (p.jac == 1.0).all(), p.jac
p = nn.Parameter(torch.ones(3))
optimizers = [getattr(mtlgrad.optim, name)([p], num_tasks=2) for name in mtlgrad.optim.__all__ if name[0] == "A"]
assert len(optimizers) == 4
scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
scaler.scale(torch.ones(()))
for optimizer in optimizers:
    p.jac = torch.full((2, 3), 8.0)
    scaler.step(optimizer)
    assert (p.jac == 1.0).all(), p.jac
assert [dict(vars(kind)) for kind in kinds] == before
class Later(torch.amp.GradScaler):
    def _unscale_grads_(self, *arguments):
        return super()._unscale_grads_(*arguments)
assert Later.__dict__["_unscale_grads_"].__code__.co_name == "_unscale_grads_"
assert "__init_subclass__" not in vars(torch.amp.GradScaler)
"""


@pytest.mark.slow
def test_adatask_leaves_torch_as_it_is(tmp_path: Path) -> None:
    """And a scaler serves an optimizer that has only been unpickled."""
    (tmp_path / "optimizer").write_bytes(pickle.dumps(AdaTaskAdam([new(1, 5)], num_tasks=2)))
    command = [sys.executable, "-c", UNTOUCHED, str(tmp_path / "optimizer")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


# ---- clipping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_adatask_clipping_by_hand(dtype: torch.dtype) -> None:
    """Every task on its own, over all parameters together; .grad and parameters without .jac are left alone."""
    for max_norm in (0.0, 0.5, 3.0, 100.0):
        parameters, heads = several(dtype), several(dtype)
        fill(parameters, 1)
        fill_grad(parameters, 2)
        fill_grad(heads, 3)
        jacobians, grads = [j.double().clone() for j in jacs(parameters)], gradients([*parameters, *heads])
        want = torch.stack([j.reshape(3, -1).square().sum(1) for j in jacobians]).sum(0).sqrt()
        factors = (max_norm / (want + 1e-6)).clamp(max=1.0)
        norms = clip_task_grad_norm_((p for p in [*parameters, *heads]), max_norm)
        assert norms.dtype == F64
        assert near(norms, want, 1e-6)
        for found, j in zip(jacs(parameters), jacobians, strict=True):
            expected = j * factors.view(-1, *[1] * (j.dim() - 1))
            assert near(found, expected, {F64: 1e-12, F32: 1e-6}.get(dtype, 0.01))
            if max_norm == 100.0:
                assert torch.equal(found.double(), j)
        assert same((p.grad for p in [*parameters, *heads]), grads)  # type: ignore[arg-type, misc]
    # As torch does for one task, and for heads, beside it.
    p, q = new(1, 50), new(1, 50)
    fill([p], 1, 1)
    q.grad = jacs([p])[0][0].clone()
    assert near(clip_task_grad_norm_(p, 2.0)[0], nn.utils.clip_grad_norm_([q], 2.0), 1e-6)
    assert near(jacs([p])[0][0], q.grad, 1e-6)


def test_adatask_clipping_of_bad_gradients() -> None:
    p = new(1, 5)
    fill([p], 1)
    [jacobian] = jacs([p])
    jacobian[1, 2] = math.nan
    before = jacobian.clone()
    with pytest.raises(RuntimeError) as error:
        clip_task_grad_norm_([p], 1.0, error_if_nonfinite=True)
    one_line(error.value, "task 1", "nan")
    assert torch.equal(jacobian[[0, 2]], before[[0, 2]])
    norms = clip_task_grad_norm_([p], 1e-3)
    assert norms.isfinite().tolist() == [True, False, True]
    assert jacs([p])[0][[0, 2]].isfinite().all()  # the others are clipped all the same
    assert float(jacs([p])[0][0].norm()) <= 1e-3
    for wrong in (-1.0, math.nan):
        with pytest.raises(ValueError, match="max_norm: expected a number from 0") as refused:
            clip_task_grad_norm_([p], wrong)
        one_line(refused.value, str(wrong))
    with pytest.raises(ValueError, match="task_backward") as none:
        clip_task_grad_norm_([new(1, 5)], 1.0)
    one_line(none.value, "found none")
