"""What people's training loops do with every method: a row a method, and what only one has after that."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from mtlgrad import AlignedMTL, AlphaVIL, BayesAgg, Regression, task_backward
from mtlgrad.alphavil import Round, Stage, Task
from mtlgrad.optim import AdaTaskAdam, clip_task_grad_norm_
from tests.conftest import HAS_GPU
from tests.support.bounds import (
    all_near,
    assert_near,
    contents,
    gradients,
    hushed,
    near,
    normal,
    one_line,
    random_state,
    same,
    same_random_state,
    same_values,
    seed_everything,
    state_tensors,
    values,
)
from tests.support.nets import (
    LAYERS,
    METHODS,
    PAIRS,
    SGD,
    WIDTH,
    Batch,
    Case,
    Model,
    NamedBatch,
    Net,
    backward,
    batch,
    case_on,
    epoch,
    fill,
    fill_grad,
    head_data,
    inputs,
    make_adatask,
    named_batches,
    new,
    problem,
    published_layer,
    several,
    step,
    train,
)
from tests.support.oracles import EachAlone, at_features, development_loss, jacobian, procrustes, pushed

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY_OPTIMIZER = pytest.mark.parametrize("name", PAIRS, ids=[f"adatask {name}" for name in PAIRS])

# ---- a row a method --------------------------------------------------------------------------------------------------


class Rounds:
    """AlphaVIL as a trainer: a step is a round of one batch."""

    def __init__(self, model: Model):
        self.model, self.data = model, list[Batch]()
        losses = [lambda m, b, t=t: m.losses(m.backbone(b.x), b.y)[t] for t in range(3)]
        tasks = [Task(self.data, loss, self.data, head) for loss, head in zip(losses, model.heads)]
        self.vil = AlphaVIL(model, tasks, 0, make_optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1), alpha_epochs=1)

    def step(self, data: Batch) -> None:
        self.data[:] = [data]
        epoch(self.vil)


ROWS: dict[str, Any] = {**METHODS, "alphavil": Rounds}
EVERY = pytest.mark.parametrize("method", ROWS)
#: Where AdaTask's optimizers are of one code.
EACH = pytest.mark.parametrize("method", [name for name in ROWS if "adatask" not in name or name == "adatask adam"])
EVERY_STEP = pytest.mark.parametrize("method", METHODS)


def trainer(method: str, frozen: Sequence[str] = (), **settings: Any) -> Any:
    """Of a model whose backbone has a layer that a batch may drop."""
    model = Model(lambda: nn.Sequential(nn.Linear(6, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh()))
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(tuple(frozen)))
    return ROWS[method](model, **settings)


def drop(model: Model) -> None:
    first, _, last = model.backbone
    model.backbone.forward = lambda x: last(first(x))


@EVERY_STEP
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_module_zero_grad_is_as_good_as_the_optimizers(method: str, micro_batches: int) -> None:
    ends = []
    for by_module in (True, False):
        it = trainer(method)
        for first in range(0, 6, micro_batches):
            (it.model if by_module else it.optimizer).zero_grad()
            for seed in range(first, first + micro_batches):
                it.backward(batch(seed=seed))
            it.optimizer.step()
        ends.append(values(it.model.parameters()))
    assert same(*ends)


def test_alphavil_gradients_that_were_there_are_no_part_of_a_round() -> None:
    ends = []
    for by_module in (True, False):
        it = trainer("alphavil")
        for seed in range(2):
            sum(it.model.losses(it.model.backbone(batch().x), batch().y)).backward()
            if by_module:
                it.model.zero_grad()
            it.step(batch(seed=seed))
        ends.append(contents(it.model))
    assert same(*ends)


@EVERY_STEP
def test_a_step_that_a_scaler_skips_leaves_nothing_behind(method: str) -> None:
    it = trainer(method, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**126))  # overflows in the first step
    it.model.factors = (1e3, 1.0, 1.0)
    scales, start = [], values(it.model.parameters())
    for seed in range(16):
        it.model.zero_grad()
        it.backward(batch(seed=seed))
        it.scaler.step(it.optimizer)
        it.scaler.update()
        scales.append(it.scaler.get_scale())
        assert same(start, it.model.parameters()) or scales[-1] == scales[-2]  # a step is skipped, or its scale stays
    assert scales[0] == 2.0**125
    assert scales[-1] == scales[-2] > 2.0**100  # it has found its scale, and goes on
    assert all(bool(p.isfinite().all()) for p in it.model.parameters())
    assert not same(start, it.model.parameters())


@EVERY
def test_what_is_frozen_stays(method: str) -> None:
    """From the start; where steps are one's own, for a while as well: gradients of before are over and done with."""
    if method == "alphavil":
        it = trainer(method, frozen=["backbone.1."])
        before = contents(it.model)
        it.step(batch())
        stays = [name for name, value in contents(it.model).items() if torch.equal(value, before[name])]
        assert stays == ["backbone.1.weight", "backbone.1.bias"]
        return
    it = trainer(method, weight_decay=0.1)
    for number in range(6):
        it.model.zero_grad()
        it.model.backbone[1].requires_grad_(number in (0, 5))
        before = values(it.model.parameters())
        it.backward(batch(seed=number))
        it.optimizer.step()
        stays = [torch.equal(a, b) for a, b in zip(before, it.model.parameters())]
        assert stays == [False, False, *[0 < number < 5] * 2, *[False] * 6], number


@pytest.mark.parametrize("method", ["aligned layer", "bayesagg", "alphavil"])
def test_a_frozen_backbone_leaves_the_heads_to_train(method: str) -> None:
    it = trainer(method, frozen=["backbone."])
    before = contents(it.model)
    it.step(batch())
    for name, value in contents(it.model).items():
        assert torch.equal(value, before[name]) == name.startswith("backbone"), name
    assert all(p.grad is None for p in it.model.shared)
    assert method != "aligned layer" or it.aligned.weights is None  # no gradient came through


@EVERY
def test_what_no_task_reaches_stays(method: str) -> None:
    """A batch drops a layer: it has no gradient, as it would have none of a sum, and not a zero that decays it."""
    it = trainer(method) if method == "alphavil" else trainer(method, weight_decay=0.5, lr=0.1)
    for number in range(4):
        if number == 1:
            drop(it.model)
            before = values(it.model.backbone[1].parameters())
        if method == "alphavil":
            it.step(batch(seed=number))
            continue
        it.model.zero_grad()  # which does not know .jac
        it.backward(batch(seed=number))
        reached = [hasattr(p, "jac") or p.grad is not None for p in it.model.shared]
        assert reached == [True, True, number == 0, number == 0]
        it.optimizer.step()
    assert same(before, it.model.backbone[1].parameters())


@EACH
def test_averages_of_models(method: str) -> None:
    """AveragedModel, plain and exponential, follows; of a model that has the layer in it, with gradients in it."""
    it = trainer(method)
    it.model.method = getattr(it, "aligned", getattr(it, "bayes", nn.Identity()))
    it.step(batch())
    averages = [AveragedModel(it.model), AveragedModel(it.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))]
    seen = []
    for seed in range(4):
        it.step(batch(seed=seed))
        for average in averages:
            average.update_parameters(it.model)
        seen.append(values(it.model.parameters()))
    for i, (plain, exponential) in enumerate(zip(*(average.module.parameters() for average in averages))):
        assert near(plain.detach(), torch.stack([s[i] for s in seen]).mean(0), 1e-5)
        want = seen[0][i]
        for s in seen[1:]:
            want = 0.9 * want + 0.1 * s[i]
        assert near(exponential.detach(), want, 1e-5)


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_models_of_another_type(method: str, dtype: torch.dtype) -> None:
    """They train in it; in float64 as in float32, up to that one's rounding."""
    moves = []
    for kind in (dtype, torch.float32):
        model = trainer(method).model.to(kind)
        it, before = ROWS[method](model), contents(model)
        for seed in range(2):
            data = batch(seed=seed)
            it.step(data._replace(x=data.x.to(kind)))
        moves.append([(value - before[name]).double() for name, value in contents(model).items()])
        assert all(p.dtype == kind and bool(p.isfinite().all()) for p in model.parameters())
    if dtype == torch.float64:
        assert all(near(ours, theirs, 0.02) for ours, theirs in zip(*moves))
    assert sum(bool(ours.any()) for ours in moves[0]) > 6


@EACH
def test_steps_do_not_gather_tensors(method: str) -> None:
    it, counts = trainer(method), []
    gc.collect()
    gc.freeze()  # what there was is not looked at
    for seed in range(9):
        it.step(batch(seed=seed % 4))
        if seed % 4 == 0:
            gc.collect()
            counts.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
    gc.unfreeze()
    assert 0 < counts[1] == counts[2]


# ---- .jac: what the module's zero_grad does not know, and zero in the place of none ----------------------------------


def start() -> tuple[Net, list[Tensor]]:
    """A backbone of two layers, of which a batch may drop one; two tasks of different size, so that exchanged rows
    show."""
    torch.manual_seed(0)
    net = Net(2, backbone=nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 5)]))
    net.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(2))
    return net, [inputs(seed=seed) for seed in range(6)]


def features(net: Net, x: Tensor, drop: bool = False) -> Tensor:
    used, dropped = net.backbone
    return (used(x) if drop else used(x) + dropped(x)).tanh()


def losses_of(net: Net, x: Tensor, drop: bool = False) -> dict[str, Tensor]:
    return dict(zip("ac", net.from_features(features(net, x, drop))))


def rows_of(net: Net, x: Tensor, drop: bool = False) -> list[Tensor]:
    """By autograd alone: of each shared parameter that the batch reaches, [T, *shape]."""
    return jacobian(losses_of(net, x, drop).values(), net.shared[:2] if drop else net.shared)


def all_close(found: Any, want: Any, **bounds: float) -> None:
    torch.testing.assert_close(list(found), list(want), **bounds)


def jacs(net: Net) -> list[Any]:
    return [p.jac for p in net.shared]


@pytest.mark.parametrize("method", ["adatask", "aligned"])
def test_jac_of_a_step_is_one_steps(method: str) -> None:
    """A merge may keep it."""
    net, batches = start()
    adatask, aligned = AdaTaskAdam(net.parameters(), lr=1e-2, num_tasks=2), AlignedMTL(2)
    optimizer = adatask if method == "adatask" else torch.optim.SGD(net.parameters(), lr=1e-2)
    for x in batches:
        net.zero_grad()
        want = rows_of(net, x)
        task_backward(losses_of(net, x), net.shared)
        if method == "aligned":
            aligned.merge(net.shared, retain_jac=True)
        all_close(jacs(net), want)
        optimizer.step()


def test_adatask_zeroed_jac_is_added_to_in_place() -> None:
    """For whoever keeps its memory, as captured graphs do."""
    net, (x, y, *_) = start()
    opt = AdaTaskAdam(net.parameters(), lr=0.1, num_tasks=2)
    task_backward(losses_of(net, x), net.shared)
    kept = jacs(net)
    opt.step()
    opt.zero_grad(set_to_none=False)
    want = rows_of(net, y)
    task_backward(losses_of(net, y), net.shared)
    assert all(a is b for a, b in zip(jacs(net), kept))
    all_close(kept, want)


def test_adatask_a_micro_batch_that_drops_a_layer_adds_nothing_to_it() -> None:
    net, (x, y, *_) = start()
    first, second = rows_of(net, x), rows_of(net, y, drop=True)
    task_backward(losses_of(net, x), net.shared)
    task_backward(losses_of(net, y, drop=True), net.shared)
    all_close(jacs(net), [first[0] + second[0], first[1] + second[1], *first[2:]])


@EVERY_OPTIMIZER
def test_zero_grad(name: str) -> None:
    p, head = new(1, 5), new(2, 5)
    optimizer = make_adatask(name, [{"params": [p]}, {"params": [head]}])
    fill([p], 1)
    fill_grad([p, head], 1)
    kept = p.jac
    optimizer.zero_grad(set_to_none=False)
    assert p.jac is kept
    assert not kept.any()
    assert not head.grad.any()
    optimizer.zero_grad()
    assert not hasattr(p, "jac")
    assert head.grad is None
    before = values([p, head])
    optimizer.step()
    assert same([p, head], before)
    assert not optimizer.state_dict()["state"]
    optimizer.zero_grad()  # twice


@EVERY_OPTIMIZER
def test_micro_batches(name: str) -> None:
    """task_backward accumulates: four quarters of a batch are the whole of it."""
    nets = [Net().double(), Net().double()]
    optimizers = [make_adatask(name, net.parameters(), lr=1e-3) for net in nets]
    for seed in range(3):
        x = inputs(16, seed).double()
        for optimizer in optimizers:
            optimizer.zero_grad()
        for part in x.chunk(4):
            task_backward([0.25 * loss for loss in nets[0].from_features(nets[0].backbone(part))], nets[0].shared)
        backward(nets[1], x)
        for optimizer in optimizers:
            optimizer.step()
    assert all(near(a.detach(), b.detach(), 1e-9) for a, b in zip(nets[0].parameters(), nets[1].parameters()))


# ---- rows belong to names --------------------------------------------------------------------------------------------


def turned(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(reversed(losses.items()))


@EVERY_OPTIMIZER
def test_losses_in_another_order(name: str) -> None:
    """From micro-batch to micro-batch, and from step to step, where moments have an order, too, also in a state."""
    ends = []
    for turn in (False, True):
        net, batches = start()
        options = {"lr": 1e-2, "num_tasks": 2, "task_weights": [1.0, 3.0]}
        opt = PAIRS[name][0](net.parameters(), **options)
        for number, x in enumerate(batches):
            losses = losses_of(net, x)
            task_backward(turned(losses) if turn and number in (1, 2, 5) else losses, net.shared)
            if number % 2:
                opt.step()
                opt.zero_grad()
            if number == 3:
                saved = copy.deepcopy(opt.state_dict())
                opt = PAIRS[name][0](net.parameters(), **options)
                opt.load_state_dict(saved)
        ends.append(values(net.parameters()))
    all_close(*ends, rtol=1e-6, atol=1e-7)


def test_adatask_a_state_of_before_names_knows_no_order() -> None:
    net, (x, *_) = start()
    opt = AdaTaskAdam(net.parameters(), lr=1e-2, num_tasks=2)
    saved = opt.state_dict()
    for group in saved["param_groups"]:
        del group["tasks"]
    opt.load_state_dict(saved)
    task_backward(losses_of(net, x), net.shared)
    opt.step()


def test_adatask_other_tasks_are_an_error_that_keeps_the_first_micro_batch() -> None:
    net, (x, y, *_) = start()
    first, second = rows_of(net, x), rows_of(net, y)
    task_backward(losses_of(net, x), net.shared)
    losses = losses_of(net, y)
    with pytest.raises(ValueError, match=r"expected the tasks of the \.jac that there is, a, c, found a, b; give None"):
        task_backward({"a": losses["a"], "b": losses["c"]}, net.shared)
    task_backward({"c": None, "a": losses["a"]}, net.shared)
    all_close(jacs(net), [torch.stack([a[0] + b[0], a[1]]) for a, b in zip(first, second)])


def test_aligned_preference_belongs_to_names() -> None:
    net, (x, *_) = start()
    aligned, found = AlignedMTL(2, preference=[1.0, 5.0]), []
    for turn in (dict, turned):
        net.zero_grad()
        task_backward(turn(losses_of(net, x)), net.shared)
        aligned.merge(net.shared)
        found.append(values(p.grad for p in net.shared))
    all_close(*found)
    losses = losses_of(net, x)
    weights = aligned.weigh(losses, net.shared)
    torch.testing.assert_close(aligned.weigh(turned(losses), net.shared), weights.flip(0))
    with pytest.raises(ValueError, match=r"AlignedMTL.weigh: losses: expected the tasks of this module's first use, a"):
        aligned.weigh({"a": losses["a"], "b": losses["c"]}, net.shared)


# ---- a second place for gradients: clipping, sharpness-aware steps, hooks --------------------------------------------


@EVERY_OPTIMIZER
def test_the_optimizer_clips_in_its_step(name: str) -> None:
    """As clipping by hand does, tasks by clip_task_grad_norm_ and the heads by torch's; two groups are one. What is
    shorter is left as it is."""
    for max_norm in (0.05, 1.0, 1e6):
        ends = []
        for clips in ("by hand", "in its step", *(["not at all"] if max_norm == 1e6 else [])):
            net, batches = start()
            groups = [{"params": net.shared[:2]}, {"params": [*net.shared[2:], *net.heads.parameters()]}]
            opt = PAIRS[name][0](groups, lr=1e-2, num_tasks=2, max_norm=max_norm if clips == "in its step" else None)
            for x in batches:
                opt.zero_grad()
                z = features(net, x)
                task_backward(net.from_features(z), net.shared, features=z)
                if clips == "by hand":
                    clip_task_grad_norm_(net.shared, max_norm)
                    nn.utils.clip_grad_norm_(net.heads.parameters(), max_norm)
                opt.step()
            ends.append(values(net.parameters()))
        assert all(same(ends[0], end) for end in ends[1:])


def flat_norm(tensors: Any) -> Tensor:
    return torch.cat([t.flatten() for t in tensors]).norm()


def test_adatask_clipped_norms_are_what_was_asked_for() -> None:
    """Of tasks, and of the heads; torch's clipping of .grad takes the heads'."""
    net, (x, *_) = start()
    opt = AdaTaskAdam(net.parameters(), lr=1e-2, num_tasks=2, max_norm=0.1)
    want = rows_of(net, x)
    task_backward([1e3 * loss for loss in losses_of(net, x).values()], net.shared)
    opt.step()
    for t in range(2):
        length = flat_norm(row[t] for row in want)
        all_close([jac[t] for jac in jacs(net)], [0.1 * row[t] / length for row in want])
    torch.testing.assert_close(flat_norm(p.grad for p in net.heads.parameters()), torch.tensor(0.1))
    opt.zero_grad()
    task_backward(losses_of(net, x), net.shared)
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    assert float(flat_norm(p.grad for p in net.heads.parameters())) <= 0.001001


def test_adatask_sharpness_aware_steps_by_jac() -> None:
    """The guide's five lines: up by the sum of the tasks' gradients, the gradients there, back, and the step."""
    net, (x, *_) = start()
    opt = AdaTaskAdam(net.parameters(), lr=1e-2, num_tasks=2)
    other = copy.deepcopy(net)
    uphill = [row.sum(0) for row in rows_of(other, x)]
    with torch.no_grad():
        torch._foreach_add_(other.shared, uphill, alpha=0.05 / float(flat_norm(uphill)))
    want = rows_of(other, x)
    task_backward(losses_of(net, x), net.shared)
    with torch.no_grad():
        ups = [p.jac.sum(0) for p in net.shared]
        scale = 0.05 / flat_norm(ups)
        torch._foreach_add_(net.shared, ups, alpha=float(scale))
    opt.zero_grad()
    task_backward(losses_of(net, x), net.shared)
    with torch.no_grad():
        torch._foreach_sub_(net.shared, ups, alpha=float(scale))
    all_close(jacs(net), want, rtol=1e-4, atol=1e-5)
    opt.step()


class AddGradient(torch.autograd.Function):
    """Passes on what comes, and has a loss of its own in every backward."""

    @staticmethod
    def forward(_: Any, z: Tensor, own: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.ones(())


@pytest.mark.parametrize("form", ["aligned layer", "adatask features", "adatask whole graph"])
def test_a_loss_of_the_backbones_own(form: str) -> None:
    """As the guide says: once in the layer form, in every row where the backbone is passed back for each task."""
    net, (x, *_) = start()
    want, weight = rows_of(net, x)[0], net.shared[0]
    used, dropped = net.backbone
    [own] = torch.autograd.grad(used(x).square().mean(), weight)
    inner = used(x)
    z = AddGradient.apply((inner + dropped(x)).tanh(), inner.square().mean())
    if form == "aligned layer":
        aligned = AlignedMTL(2)
        sum(net.losses(aligned(z))).backward()
        torch.testing.assert_close(weight.grad, torch.einsum("t,tij->ij", aligned.weights.float(), want) + own)
        return
    task_backward(net.from_features(z), net.shared, features=z if form == "adatask features" else None)
    torch.testing.assert_close(weight.jac, want + own)


@pytest.mark.parametrize("through", [True, False], ids=["adatask features", "adatask whole graph"])
def test_a_hook_that_takes_gradients_is_an_error(through: bool) -> None:
    """An optimizer in the backward; one that looks at them is none."""
    net, (x, y, *_) = start()
    used, _, dropped, _ = net.shared
    inside, seen = torch.optim.SGD([used], lr=0.0), []

    def take(_: Tensor) -> None:
        inside.step()
        inside.zero_grad()

    def pass_back(x: Tensor, **options: Any) -> None:
        z = features(net, x, **options)
        task_backward(net.from_features(z), net.shared, features=z if through else None)

    dropped.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm()))
    pass_back(x)
    assert len(seen) == 2
    before = values(jacs(net))
    hook = used.register_post_accumulate_grad_hook(take)
    with pytest.raises(RuntimeError, match=r"task_backward: shared: expected gradients that stay .* found 1 that a ho"):
        pass_back(y)
    assert same(jacs(net), before)
    hook.remove()
    pass_back(y, drop=True)  # what no task reaches, the other hook did not take


@EVERY_OPTIMIZER
def test_hooks_run_once(name: str) -> None:
    for build in (lambda ps: make_adatask(name, ps), lambda ps: make_adatask(name, ps, 1), PAIRS[name][1]):
        p, head = new(1, 5), new(2, 5)
        optimizer = build([p, head])
        PAIRS[name][1]([new(3, 2)])  # torch's own step is wrapped when one is made
        seen: list[str] = []
        optimizer.register_step_pre_hook(lambda o, a, k, seen=seen: seen.append("before"))
        optimizer.register_step_post_hook(lambda o, a, k, seen=seen: seen.append("after"))
        fill([p], 1, optimizer.param_groups[0].get("num_tasks", 1))
        fill_grad([head], 1)
        for _ in range(2):
            optimizer.step()
        assert seen == ["before", "after"] * 2


@EVERY_OPTIMIZER
def test_closures(name: str) -> None:
    nets = [Net(), Net()]
    optimizers = [make_adatask(name, net.parameters()) for net in nets]
    for seed in range(3):
        x = inputs(seed=seed)

        def closure(x: Tensor = x) -> Tensor:
            assert torch.is_grad_enabled()
            optimizers[0].zero_grad()
            backward(nets[0], x)
            return torch.tensor(7.5)

        with torch.no_grad():
            assert optimizers[0].step(closure).item() == 7.5
        optimizers[1].zero_grad()
        backward(nets[1], x)
        assert optimizers[1].step() is None
        assert same(nets[0].parameters(), nets[1].parameters())
    before = values(nets[0].parameters())

    def fails() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        optimizers[0].step(fails)
    assert same(nets[0].parameters(), before)


# ---- schedules -------------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.3),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1.0 / (1 + k)),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(
        o, 0.1, total_steps=12, cycle_momentum="betas" in o.defaults or "momentum" in o.defaults
    ),
    "warm-up": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.5)], [3]
    ),
    "averages": lambda o: SWALR(o, 0.05, 3),
}


@EVERY_OPTIMIZER
def test_schedulers(name: str) -> None:
    """T = 1 follows torch's optimizer under the same scheduler, bit for bit, and so does a head with T = 3, beside
    parameters that follow the rule with the numbers the scheduler has set."""
    for kind, schedule in SCHEDULERS.items():
        p, head, single, other = (new(i, 20, dtype=torch.float64) for i in (1, 2, 2, 2))
        optimizers = [make_adatask(name, [p, head]), make_adatask(name, [single], 1), PAIRS[name][1]([other])]
        schedulers = [schedule(o) for o in optimizers]
        alone = EachAlone(name, [p])
        for seed in range(8):
            fill([p], seed)
            fill([single], seed, 1)
            head.grad, other.grad = single.jac[0].clone(), single.jac[0].clone()
            now = optimizers[0].param_groups[0]
            for each in alone.optimizers:
                each.param_groups[0].update({k: now[k] for k in ("lr", "betas", "momentum") if k in now})
            alone.decay = now["lr"] * 0.01 * (name == "adamw")
            alone.step([p.jac])
            for it in (*optimizers, *schedulers):
                it.step()
            assert near(p.detach(), alone.theta[0], 1e-12), kind
            assert same([head, single], [other, other]), kind
        rates = [o.param_groups[0]["lr"] for o in optimizers]
        assert rates[0] == rates[2] != optimizers[0].defaults["lr"]


@EVERY_OPTIMIZER
def test_plateau_and_tensor_rates(name: str) -> None:
    p = new(1, 20)
    optimizer = make_adatask(name, [p], lr=0.1)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for loss in (1.0, 1.0, 1.0):
        fill([p], 1)
        optimizer.step()
        plateau.step(loss)
    assert optimizer.param_groups[0]["lr"] == 0.025
    # A tensor that the scheduler writes to, as good as numbers.
    ends = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        p = new(1, 20)
        optimizer = make_adatask(name, [p], lr=lr)
        scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
        for seed in range(4):
            fill([p], seed)
            optimizer.step()
            scheduler.step()
        ends.append(p.detach())
    assert torch.equal(*ends)


def test_alphavil_schedules_read_the_round() -> None:
    """make_optimizer is asked once a task and round, and may look at `rounds`, which are those that are done."""
    rates: list[float] = []

    def make(parameters: list[Tensor]) -> torch.optim.Optimizer:
        rates.append(0.1 * 0.5**vil.rounds)
        return torch.optim.SGD(parameters, lr=rates[-1])

    vil = Case(tasks=["size", "kind"]).vil(make_optimizer=make)
    for _ in range(3):
        epoch(vil)
    assert rates == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]


def test_alphavil_a_search_for_a_learning_rate() -> None:
    """Each rate from the same start: the model and the vil put back in memory, the random state with them."""
    rate = 0.0
    case = Case(norm=True, dropout=0.3)
    vil = case.vil(make_optimizer=lambda ps: torch.optim.SGD(ps, lr=rate))
    start, model = vil.state_dict(), copy.deepcopy(case.model.state_dict())
    found: dict[float, list[float]] = {}
    for rate in (1e-3, 1e-2, 1e9, 1e-1, 1e-3, 1e-2, 1e-1):
        case.model.load_state_dict(model)
        vil.load_state_dict(start)
        found.setdefault(rate, []).append(epoch(vil).after)
    assert all(len(set(losses)) == 1 for losses in found.values())
    assert found[1e-3] > found[1e-2] > found[1e-1]


# ---- the layers: one backward of one call, looks at gradients, evaluation --------------------------------------------


def bayes_of(net: Net) -> Any:
    """After a refresh; called with features it gives views, as AlignedMTL's layer does."""
    layer = BayesAgg([Regression(head) for head in net.heads])
    targets = [torch.full((16, 1), float(t)) for t in range(2)]
    layer(features(net, inputs()).detach().requires_grad_(), targets)
    layer.refresh()

    def call(z: Tensor, **options: Any) -> list[Tensor]:
        return [layer(z, targets if layer.training else None, **options)] * 2

    return SimpleNamespace(layer=layer, call=call)


def aligned_of(net: Net) -> Any:
    layer = AlignedMTL(2)
    return SimpleNamespace(layer=layer, call=layer)


def plain(net: Net, views: Any) -> list[Tensor]:
    return [(head(z) - t).square().mean() for t, (head, z) in enumerate(zip(net.heads, views))]


LAYER = pytest.mark.parametrize("make", [aligned_of, bayes_of], ids=["aligned", "bayesagg"])


@LAYER
def test_losses_one_by_one_are_an_error(make: Callable[[Net], Any]) -> None:
    net, (x, *_) = start()
    call = make(net).call
    first, second = plain(net, call(features(net, x)))
    first.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"expected one backward through a call of the layer, found a second"):
        second.backward()
    both = sum(plain(net, call(features(net, x))))
    both.backward(retain_graph=True)
    way = (
        "; add the losses"
        if make is bayes_of
        else r"add the losses and call backward\(\) once, or use task_backward and "
    )
    with pytest.raises(RuntimeError, match=f"a second.*{way}"):
        both.backward()


@LAYER
def test_who_only_looks_at_gradients_takes_no_backward(make: Callable[[Net], Any]) -> None:
    """Monitors ask for each loss's gradient at the features, or at a layer of the heads, and leave the graph; such a
    pass of BayesAgg need not count."""
    net, (x, *_) = start()
    call, found = make(net).call, []
    for looks in (False, True):
        net.zero_grad()
        z = features(net, x)
        views = call(z, count=not looks) if make is bayes_of else call(z)
        losses = plain(net, views)
        for loss in losses if looks else ():
            torch.autograd.grad(loss, z, retain_graph=True)
            torch.autograd.grad(loss, list(dict.fromkeys(views)), retain_graph=True, allow_unused=True)
        sum(losses).backward()
        found.append(values(p.grad for p in net.shared))
    assert same(*found)
    net.zero_grad()
    sum(plain(net, [features(net, x)] * 2)).backward()
    assert not same(found[0], [p.grad for p in net.shared])


@LAYER
def test_gradients_in_evaluation_mode_are_the_plain_ones(make: Callable[[Net], Any]) -> None:
    net, (x, *_) = start()
    it = make(net)
    sum(plain(net, it.call(features(net, x)))).backward()
    x.requires_grad_()
    z = features(net, x)
    want = torch.autograd.grad(sum(plain(net, [z, z])), x)[0]
    if make is aligned_of:
        assert bool(it.layer.weights.isfinite().all())
    it.layer.eval()
    for _ in range(2):
        first, second = plain(net, it.call(features(net, x)))
        found = torch.autograd.grad(first, x, retain_graph=True)[0] + torch.autograd.grad(second, x)[0]
        torch.testing.assert_close(found, want)
    if make is aligned_of:
        assert bool(it.layer.weights.isnan().all())
    for made in (copy.deepcopy(it), pickle.loads(pickle.dumps(it))) if make is aligned_of else (it,):
        made.layer.train()  # averages copy the model, and trainers pickle it
        assert made.call(features(net, x))[0].shape == (16, 5)


def test_aligned_a_call_for_one_task_at_a_time_is_told_once() -> None:
    net, batches = start()
    aligned = AlignedMTL(2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for x in batches:
            for t in range(2):
                net.losses(aligned(features(net, x)))[t].backward()
    [said] = told
    assert "found that of one alone, 3 times in a row: nothing is merged" in str(said.message)


def test_aligned_a_batch_without_a_tasks_labels_is_nothing_to_tell() -> None:
    net, batches = start()
    aligned = AlignedMTL(2)
    for number, x in enumerate(batches):
        losses = net.losses(aligned(features(net, x)))
        sum(losses if number % 3 == 2 else losses[:1]).backward()


@pytest.mark.parametrize("trains", [True, False])
def test_aligned_who_trains_in_evaluation_mode_is_told_once(trains: bool) -> None:
    """Who only looks at gradients between epochs is not."""
    net, batches = start()
    aligned, opt = AlignedMTL(2), torch.optim.SGD(net.parameters(), lr=1e-3)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for x in batches:
            aligned.train(not trains)
            opt.zero_grad()
            sum(net.losses(aligned(features(net, x)))).backward()
            opt.step()
            aligned.eval()
            if not trains:
                torch.autograd.grad(sum(net.losses(aligned(features(net, batches[0])))), net.shared[0])
    assert len(told) == trains
    assert all("expected to be trained in training mode" in str(warning.message) for warning in told)


class Views(Net):
    """Heads on the layer's views."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [head(z) for head, z in zip(self.heads, self.aligned(self.backbone(x)))]


def test_aligned_tracing_and_export_in_evaluation_mode() -> None:
    model, x = Views(2), inputs(5)
    model.aligned = AlignedMTL(2)
    want = model.eval()(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of what it deprecates
        traced = torch.jit.trace(model, x)
    for form in (traced, torch.export.export(model, (x,)).module()):
        all_close(form(x), want)


def test_aligned_views_are_the_features() -> None:
    """The others would change with one that is changed in place."""
    aligned, z = AlignedMTL(3), normal(1, 4, 5).float()
    for given in (z, z.clone().requires_grad_()):
        views = aligned(given)
        assert len(views) == 3
        assert all(torch.equal(v, given) and v.data_ptr() == given.data_ptr() for v in views)
        assert all(v.requires_grad == given.requires_grad for v in views)
    with torch.no_grad():
        assert not any(v.requires_grad for v in aligned.eval()(2 * z.clone().requires_grad_()))
    with torch.inference_mode():
        assert torch.equal(aligned(z)[2], z)
    views = AlignedMTL(2)(normal(1, 4, 5).requires_grad_() * 1.0)
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        views[0].add_(1.0)


def test_aligned_two_layers_and_one_layer_twice() -> None:
    """Each backward aligns what it got; a layer shows its last use, and what it has shown does not change."""
    net, other, x, y = Net(), Net(seed=5), inputs(), inputs(seed=2)
    aligned, second = AlignedMTL(3), AlignedMTL(3, scale="rmse")
    want = []
    for n, layer, data in ((net, aligned, x), (other, second, x), (net, aligned, y)):
        n.zero_grad()
        step(n, layer, data)
        want.append((gradients(n.shared), layer.weights))
    shown = [aligned.weights, aligned.singular_values, aligned.rank, aligned.condition_number]
    before = values(shown)
    aligned.weights.zero_()
    assert torch.equal(aligned.weights, before[0])
    net.zero_grad()
    other.zero_grad()
    (sum(net.losses(aligned(net.backbone(x)))) + sum(other.losses(second(other.backbone(x))))).backward()
    all_near(gradients(net.shared), want[0][0], 1e-6)
    all_near(gradients(other.shared), want[1][0], 1e-6)
    assert near(aligned.weights, want[0][1], 1e-9)
    assert near(second.weights, want[1][1], 1e-9)
    assert same(shown, before)
    assert not torch.equal(aligned.weights, before[0])
    net.zero_grad()
    first, again = (net.losses(aligned(net.backbone(data))) for data in (x, y))
    (sum(first) + sum(again)).backward()
    all_near(gradients(net.shared), [a + b for a, b in zip(want[0][0], want[2][0])])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_aligned_moved_to_another_type(dtype: torch.dtype) -> None:
    """The module converted after its first use: results stay float64, gradients are in the features' type."""
    preference = torch.tensor([1.0, 0.5, 3.0])
    net, x = Net(), inputs()
    net.aligned = AlignedMTL(3, preference)
    step(net, net.aligned, x)
    net.zero_grad()
    before = net.aligned.weights
    net, x = net.to(dtype), x.to(dtype)
    assert torch.equal(net.aligned.weights, before)
    z, rows = at_features(net, x)
    want = procrustes(rows, preference)
    step(net, net.aligned, x)
    assert near(net.aligned.weights, want.weights, 1e-9)  # of the same rounded gradients
    assert net.aligned.weights.dtype == torch.float64
    tolerance = {torch.float64: 1e-10, torch.bfloat16: 0.05, torch.float16: 5e-3}[dtype]
    all_near(gradients(net.shared), pushed(net, z, want.update), tolerance)
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in Net().named_parameters()]
    assert not list(net.aligned.buffers())
    assert "preference=(1.0, 0.5, 3.0), scale='min'" in repr(net)


def test_aligned_images_in_channels_last() -> None:
    torch.manual_seed(2)
    conv = nn.Conv2d(3, 6, 3).to(memory_format=torch.channels_last)
    heads = [nn.Conv2d(6, 1, 3) for _ in range(3)]
    x = normal(1, 2, 3, 9, 9).float().contiguous(memory_format=torch.channels_last)
    z = conv(x)
    want = procrustes(jacobian([head(z).square().mean() for head in heads], [z])[0].flatten(1))
    expected = torch.autograd.grad(z, list(conv.parameters()), want.update.view_as(z).float())
    aligned = AlignedMTL(3)
    sum(head(view).square().mean() for head, view in zip(heads, aligned(conv(x)))).backward()
    all_near(gradients(conv.parameters()), list(expected))
    assert near(aligned.weights, want.weights, 1e-5)


# ---- BayesAgg: the scale of the loss, types, memory, threads ---------------------------------------------------------

SOME = slice(0, 6)


def bayes(**options: Any) -> Any:
    """After an epoch."""
    m = problem(**options)
    m.see()
    m.layer.refresh()
    return m


def scaled_by(
    m: Any, rows: slice, total: Callable[[list[Tensor]], Tensor], looks: bool = False
) -> tuple[Tensor, Tensor]:
    """The features and a loss; `looks`: someone looks at the features before there is one."""
    z = m.data[0].features[rows].clone().requires_grad_()
    out = m.layer(z, m.targets(rows))
    if looks:
        with torch.no_grad():
            m.layer(z)
    return z, total(m.losses(out, rows))


@pytest.mark.parametrize("looks", [False, True])
def test_bayesagg_total_carries_the_scale(looks: bool) -> None:
    """Of a GradScaler, of four accumulated batches; without total it is read. Powers of two: exact."""
    m = bayes()
    ways: list[Callable[[list[Tensor]], Tensor]] = [
        m.layer.total,
        lambda losses: m.layer.total(dict(zip("abc", losses))),
        sum,
    ]
    for factor in (1024.0, 0.25):
        for way in ways[: 2 if looks else 3]:
            z, total = scaled_by(m, SOME, way, looks)
            (total * factor).backward()
            assert torch.equal(z.grad, m.aggregate(SOME) * factor)


def test_bayesagg_interleaved_passes_keep_their_own_scales() -> None:
    m = bayes()
    parts = [(rows, factor, *scaled_by(m, rows, m.layer.total)) for rows, factor in ((SOME, 8.0), (slice(6, 10), 0.5))]
    for _, factor, _, total in parts[::-1]:
        with torch.no_grad():
            m.layer(m.data[0].features)
        (total * factor).backward()
    for rows, factor, z, _ in parts:
        assert torch.equal(z.grad, m.aggregate(rows) * factor)


def test_bayesagg_total_is_the_sum() -> None:
    m = problem()
    losses = m.losses(m.layer(m.data[0].features.clone().requires_grad_(), m.targets()))
    assert m.layer.total(losses).item() == pytest.approx(sum(loss.item() for loss in losses), rel=1e-15)
    mixed = [losses[0], losses[1].float().reshape(1), losses[2].bfloat16()]
    assert m.layer.total(mixed).dtype == torch.float64
    assert m.layer.total(loss for loss in losses).dim() == 0


def test_bayesagg_no_second_derivative_and_no_changed_features() -> None:
    """gradcheck does not apply, the gradient is replaced; a second backward names the batch."""
    m = bayes()
    base = m.data[0].features.clone().requires_grad_()
    z = base * 1.0
    total = m.layer.total(m.losses(m.layer(z, m.targets())))
    (first,) = torch.autograd.grad(total, base, retain_graph=True)
    assert torch.equal(first, m.aggregate())
    with pytest.raises(RuntimeError, match=r"BayesAgg: batch 2: expected one backward .* a second; add the losses"):
        total.backward()
    total = m.layer.total([m.layer(z, m.targets()).square().sum()])
    (once,) = torch.autograd.grad(total, z, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        once.sum().backward()
    total = m.layer.total([(m.layer(z, m.targets()) * 1.0).sum()])
    with torch.no_grad():
        z.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("moments", ["exact", "sampled"])
def test_bayesagg_half_precision_features_are_those_features_in_float32(dtype: torch.dtype, moments: str) -> None:
    m = problem(missing=0.2, moments=moments)
    m.heads = [head.float() for head in m.heads]
    for data in m.data:
        data.features = data.features.to(dtype)
    wide = copy.deepcopy(m)
    for data in wide.data:
        data.features = data.features.float()
    found = []
    for part, kind in ((m, dtype), (wide, torch.float32)):
        for _ in range(2):
            z = part.data[0].features.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
                total = part.layer.total(part.losses(part.layer(z, part.targets()).float()))
            total.backward()
            part.layer.refresh()
        found.append(z.grad)
    assert found[0].dtype == dtype
    assert torch.equal(found[0], found[1].to(dtype))


def test_bayesagg_float32_is_close_to_float64() -> None:
    m = bayes(missing=0.2)
    z, targets = m.data[0].features[:9].float(), m.targets(slice(0, 9))
    narrow = m.layer.aggregate(z, [t.float() if t.is_floating_point() else t for t in targets])
    assert narrow.dtype == torch.float32
    assert_near(narrow.double(), m.layer.aggregate(z.double(), targets), 1e-5)


class LargestAllocation(TorchDispatchMode):
    """The largest storage, in bytes, that an operation returned and was not given."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, returned = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), out))
        known = {x.untyped_storage().data_ptr() for x in given}
        new = [x.untyped_storage() for x in returned if x.untyped_storage().data_ptr() not in known]
        self.bytes = max([self.bytes, *(storage.nbytes() for storage in new)])
        return out


@pytest.mark.parametrize("batch", [64, 100])  # fewer and more examples than weights
@pytest.mark.parametrize(("kind", "missing"), [("binary", 0.0), ("binary", 0.1), ("regression", 0.0)])
def test_bayesagg_no_tensor_of_all_tasks_and_dimensions(kind: str, missing: float, batch: int) -> None:
    """(Regression labels that are missing one by one cost a posterior for every output.)"""
    tasks, width = 40, 80
    data = head_data(kind, 200, width, tasks, missing=missing)
    layer = published_layer([LAYERS[kind](nn.Linear(width, tasks))])
    z, targets = data.features.float().requires_grad_(), data.targets.float()
    layer(z, [targets])
    layer.refresh()
    layer.aggregate(z[:batch], [targets[:batch]])  # copies of the posteriors in float32 are made once
    with LargestAllocation() as largest:
        layer.aggregate(z[:batch], [targets[:batch]])
    # With more examples than weights the batch's own precision is the largest, [T, P, P] in float64.
    allowed = 8 * tasks * (width + 1) ** 2 if batch > width and kind == "binary" else 4 * batch * tasks * width / 2
    assert 0 < largest.bytes <= allowed


@pytest.mark.parametrize("moments", ["exact", "sampled"])
def test_bayesagg_number_of_threads(moments: str) -> None:
    """The kernels give the same bits for any number of threads; BLAS splits its sums by it, so the whole is equal up to
    rounding."""
    m = bayes(examples=200, moments=moments)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(m.aggregate())
    assert_near(found[1], found[0], 1e-12)
    assert_near(found[2], found[0], 1e-12)


# ---- AdaTask's optimizers: layouts, sparse gradients, processes ------------------------------------------------------


@EVERY_OPTIMIZER
def test_convolutions_in_channels_last(name: str) -> None:
    torch.manual_seed(0)
    models = [nn.Conv2d(3, 4, 3).double() for _ in range(2)]
    heads = [nn.Conv2d(4, 1, 3).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[0].to(memory_format=torch.channels_last)
    optimizers = [make_adatask(name, model.parameters(), 2) for model in models]
    for seed in range(3):
        x = normal(seed, 2, 3, 8, 8)
        for model, optimizer in zip(models, optimizers):
            optimizer.zero_grad()
            z = model(x.contiguous(memory_format=torch.channels_last) if model is models[0] else x)
            task_backward([head(z).square().mean() for head in heads], model.parameters(), features=z)
            optimizer.step()
    assert models[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert near(models[0].weight.detach(), models[1].weight.detach(), 1e-9)
    moments = [v for v in optimizers[0].state[models[0].weight].values() if v.dim() == 4]
    assert len(moments) >= 2
    assert all(moment.stride() == models[0].weight.stride() for moment in moments)


def test_adatask_capturable_and_named_parameters_and_subclasses() -> None:
    """capturable says nothing to parameters with .jac, and to torch's ordinary step on the CPU what it says there."""

    class Mine(AdaTaskAdam):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["lr"] *= 0.5
            return super().step(closure)

    net, parameters, plain = Net(), several(), several()
    Mine(net.named_parameters(), num_tasks=3)
    optimizers = [Mine(parameters, num_tasks=3, capturable=True, lr=0.2), AdaTaskAdam(plain, num_tasks=3, lr=0.1)]
    for optimizer, ps in zip(optimizers, (parameters, plain)):
        fill(ps, 1)
        optimizer.step()
    assert same(parameters, plain)
    head = new(1, 3)
    fill_grad([head], 1)
    said = []
    for optimizer in (AdaTaskAdam([head], num_tasks=3, capturable=True), torch.optim.Adam([head], capturable=True)):
        with pytest.raises(AssertionError) as error:
            optimizer.step()
        said.append(str(error.value))
    assert said[0] == said[1]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_adatask_sparse_gradients() -> None:
    """Adagrad's ordinary rule takes them, as torch's does; the others refuse them, before anything moves."""
    for name, (_, ordinary) in PAIRS.items():
        tables = [nn.Embedding(9, 3, sparse=True) for _ in range(2)]
        tables[1].load_state_dict(tables[0].state_dict())
        p, head = new(1, 4), new(2, 4)
        optimizer = make_adatask(
            name, [{"params": [head]}, {"params": [p]}, {"params": tables[0].parameters()}], foreach=False
        )
        fill([p], 1)
        fill_grad([head], 1)
        for table in tables:
            table(torch.tensor([1, 2, 2])).square().sum().backward()
        before = values([p, head, tables[0].weight])
        if name == "adagrad":
            optimizer.step()
            ordinary(tables[1].parameters(), foreach=False).step()
            assert same([tables[0].weight], [tables[1].weight])
            continue
        with pytest.raises((RuntimeError, ValueError), match="sparse") as error:
            optimizer.step()
        one_line(error.value)
        assert same([p, head, tables[0].weight], before), name
        assert not state_tensors(optimizer)
    # What task_backward makes of them is dense.
    table = nn.Embedding(9, 3, sparse=True)
    optimizer = AdaTaskAdam(table.parameters(), num_tasks=2)
    z = table(torch.tensor([1, 2, 2]))
    task_backward([z.sum(), z.square().sum()], table.parameters())
    optimizer.step()
    assert table.weight.isfinite().all()


def work(net: Net, optimizer: Any) -> None:
    train(net, optimizer, 2)


@pytest.mark.parametrize("name", ["adagrad", pytest.param("adam", marks=pytest.mark.slow)], ids="adatask {}".format)
def test_shared_memory(name: str) -> None:
    """A process that trains a model in shared memory, with a pickled optimizer, is seen here."""
    nets = [Net(), Net()]
    nets[0].share_memory()
    optimizers = [make_adatask(name, net.parameters()) for net in nets]
    if name == "adagrad":
        with pytest.raises(RuntimeError, match="first step") as error:
            optimizers[0].share_memory()  # before there is anything to share
        one_line(error.value, "AdaTaskAdagrad.share_memory")
    train(nets[0], optimizers[0], 1)
    if name == "adagrad":
        optimizers[0].share_memory()
        assert all(v.is_shared() for s in optimizers[0].state.values() for k, v in s.items() if k.startswith("sum"))
        return
    process = torch.multiprocessing.get_context("spawn").Process(target=work, args=(nets[0], optimizers[0]))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    train(nets[1], optimizers[1], 1)
    train(nets[1], optimizers[1], 2)
    assert same(nets[0].parameters(), nets[1].parameters())


def test_adatask_a_double_parameter_leaves_the_rounding_of_others_stochastic() -> None:
    """In a group of mixed types: averages of bfloat16, rounded to nearest, stall above what they average."""
    for first in (torch.float32, torch.float64):
        parameters = [nn.Parameter(torch.zeros(1000, dtype=first)), nn.Parameter(torch.zeros(1000))]
        optimizer = AdaTaskAdam(parameters, num_tasks=2, moments_dtype="bfloat16")
        for size in [1.0] + [0.0] * 300:
            for p in parameters:
                p.jac = torch.full((2, *p.shape), size, dtype=p.dtype)
            optimizer.step()
        mean = float(optimizer.state[parameters[1]]["exp_avg_sq_1"].double().mean())
        assert mean == pytest.approx(1e-3 * 0.999**300, rel=0.02)  # to nearest: 1e-3


# ---- alphaVIL: loaders, models, what users build of it ---------------------------------------------------------------


class Rows(torch.utils.data.Dataset[NamedBatch]):
    """Each read with noise from the worker's own random state."""

    def __init__(self, task: str, seed: int):
        self.rows = [NamedBatch(i, b.x[0], b.y[0]) for i, b in enumerate(named_batches(task, seed, 12))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> NamedBatch:
        row = self.rows[i]
        return row._replace(x=row.x + 0.1 * torch.randn(5))


def with_workers(own: bool) -> Case:
    case = Case(tasks=["size", "kind"], dropout=0.2)

    def loss(model: Any, batch: NamedBatch, task: str) -> Tensor:
        out = model.heads[task](model(batch.x))
        return F.cross_entropy(out, batch.y) if task == "kind" else (out[:, 0] - batch.y).abs().mean()

    for i, name in enumerate(case.tasks):
        generator = torch.Generator().manual_seed(i) if own else None
        train = DataLoader(Rows(name, i), 4, shuffle=True, num_workers=1, generator=generator)
        dev = DataLoader(Rows(name, 9), 6, num_workers=1) if i == 0 else None
        case.change(name, train=train, dev=dev, loss=partial(loss, task=name))
    return case


@pytest.mark.parametrize("own", [False, True])
def test_alphavil_loaders_with_workers(own: bool) -> None:
    """Their random numbers come from the loader's: after a stop in the middle the bits are the same."""
    ends = []
    for stop in (None, 1) if own else (None, 0, 2):
        case = with_workers(own)
        vil = case.vil(subset=2, alpha_epochs=1)
        seed_everything(1)
        if stop is not None:
            for _ in zip(range(stop + 1), vil.stages()):
                pass
            state, model = copy.deepcopy(vil.state_dict()), copy.deepcopy(case.model.state_dict())
            case = with_workers(own)
            vil = case.vil(subset=2, alpha_epochs=1)
            case.model.load_state_dict(model)
            vil.load_state_dict(state)
        for _ in range(1 + own):
            epoch(vil)
        ends.append((contents(case.model), random_state()))
    for theta, state in ends[1:]:
        assert same_values(theta, ends[0][0])
        assert same_random_state(state, ends[0][1])


def test_alphavil_losses_as_methods_of_a_module_around_the_model() -> None:
    """One module with backbone, heads and losses, called through forward, as Lightning's are."""
    case = Case(dtype=torch.float64)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = case.model
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, task: str, batch: NamedBatch) -> Tensor:
            return self.scale * case.tasks[task].loss(self.net, batch)

    whole = Whole()
    tasks = {
        name: Task(task.train, lambda m, b, n=name: m(n, b), task.dev, whole.net.heads[name])
        for name, task in case.tasks.items()
    }
    assert AlphaVIL(whole, tasks, "size", make_optimizer=SGD).epoch().kept == "search"
    assert whole.scale.item() < 1.0


def test_alphavil_sparse_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(20, 4, sparse=True), nn.Linear(4, 1))
    data = [torch.randint(0, 20, (5, 3)) for _ in range(3)]
    task = Task(data, lambda m, x: m(x).square().mean(), data)
    assert AlphaVIL(model, [task], 0, make_optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1)).epoch().kept == "search"


def test_alphavil_fused_optimizers() -> None:
    ends = []
    for fused in (False, True):
        case = Case(dtype=torch.float64)
        epoch(case.vil(make_optimizer=lambda ps, fused=fused: torch.optim.Adam(ps, lr=1e-3, eps=1e-3, fused=fused)))
        ends.append(contents(case.model))
    assert all(near(value, ends[0][name], 1e-9) for name, value in ends[1].items())


def test_alphavil_stages_drive_a_progress_bar() -> None:
    vil, shown = Case().vil(alpha_epochs=3), list[Stage]()
    with hushed():
        for stage in vil.stages():
            assert isinstance(stage, Stage)
            assert vil.rounds == (stage.kind == "move")
            shown.append(stage)
    assert [s.number for s in shown] == list(range(1, 9))
    assert {s.total for s in shown} == {8}
    assert [s.kind for s in shown] == ["train"] * 3 + ["evaluate"] + ["alpha"] * 3 + ["move"]
    assert [s.task for s in shown] == ["size", "kind", "marks"] + ["size"] * 5
    assert all(math.isfinite(s.loss) for s in shown)
    with pytest.raises((AttributeError, TypeError)):
        shown[0].loss = 0.0
    assert isinstance(vil.last, Round)
    assert "size" in repr(shown[0])
    assert next(iter(vil.stages())).number == 1


def test_alphavil_weights_set_by_the_user() -> None:
    """In place or whole, between rounds, as a list would not do."""
    case = Case(dtype=torch.float64)
    vil = case.vil(make_optimizer=lambda ps: torch.optim.SGD(ps, lr=0.03), clip_alpha=(1.0, 1.0))
    before = contents(case.model)
    vil.task_weights = torch.tensor([1.0, 0.0, 0.0])
    epoch(vil)
    after = contents(case.model)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {"first.weight", "first.bias", "second.weight", "second.bias", *case.heads["size"]}
    vil.task_weights.mul_(2.0)
    epoch(vil)
    assert vil.task_weights.tolist() == [2.0, 0.0, 0.0]
    mine = torch.ones(3, dtype=torch.float64)
    vil.task_weights = mine
    mine.zero_()
    assert vil.task_weights.tolist() == [1.0, 1.0, 1.0]


def test_alphavil_warnings_point_at_who_called() -> None:
    for staged in (False, True):
        vil = Case(tasks=["size"]).vil(clip_alpha=(1.0, 1.0))
        with pytest.warns(RuntimeWarning, match="alpha = 1") as warned:
            _ = list(vil.stages()) if staged else vil.epoch()
        assert warned[0].filename == __file__


def test_alphavil_forty_tasks() -> None:
    """More than the kernels take at a time."""

    def loss(model: Any, batch: tuple[Tensor, float]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    torch.manual_seed(0)
    data = [[(torch.randn(6, 5), float(torch.randn(())))] for _ in range(40)]
    model = nn.Linear(5, 1)
    theta, rate = contents(model), 0.001
    want = {name: value.double() for name, value in theta.items()}
    for ((x, y),) in data:
        slopes = torch.autograd.grad(loss(model, (x, y)), list(model.parameters()))
        for name, slope in zip(want, slopes):
            want[name] += ((theta[name] - rate * slope) - theta[name]).double()
    tasks = [Task(each, loss, data[7]) for each in data]
    vil = AlphaVIL(model, tasks, "7", make_optimizer=lambda ps: torch.optim.SGD(ps, lr=rate), clip_alpha=(1.0, 1.0))
    found = epoch(vil)
    assert (found.kept, len(found.losses), found.alphas.tolist()) == ("start", 40, [1.0] * 40)
    assert all(near(value.double(), want[name], 2.0**-23) for name, value in contents(model).items())


def test_alphavil_two_on_one_model() -> None:
    """Each with its own target, in turns."""
    case = Case(dtype=torch.float64)
    tasks = {
        name: Task(t.train, t.loss, named_batches(name, 70, 2, 32, torch.float64)) for name, t in case.tasks.items()
    }
    vils = [AlphaVIL(case.model, tasks, name, make_optimizer=SGD) for name in tasks]
    for _ in range(2):
        for vil in vils:
            before = development_loss(case.model, tasks[vil.names[vil.target]])
            epoch(vil)
            assert development_loss(case.model, tasks[vil.names[vil.target]]) <= before


def test_alphavil_a_model_of_another_type_than_its_deltas() -> None:
    """model.double() between two rounds: the next round is in the new type, or says what is wrong."""
    case, wide = Case(), Case(dtype=torch.float64)
    vil = case.vil()
    epoch(vil)
    case.model.double()
    for name, task in case.tasks.items():
        task.train[:] = wide.tasks[name].train
        if task.dev is not None:
            task.dev[:] = wide.tasks[name].dev
    before = contents(case.model)
    try:
        found = epoch(vil)
    except (RuntimeError, ValueError) as error:
        one_line(error, "expected", "found")
        assert same_values(contents(case.model), before)
    else:
        assert found.kept != "none"
        moved = {n: p for n, p in contents(case.model).items() if not torch.equal(p, before[n])}
        assert not [n for n, p in moved.items() if torch.equal(p.float().double(), p)]  # rounded


@pytest.mark.skipif(not HAS_GPU, reason="no usable GPU")
def test_alphavil_on_a_gpu() -> None:
    """The same numbers as on the host, as far as its sums are the same; weights and alphas are on the host."""
    case, other = Case(norm=True), case_on(Case(norm=True), "cuda")
    for vil in (case.vil(), other.vil()):
        seed_everything(4)
        found = epoch(vil)
        assert found.alphas.device.type == vil.task_weights.device.type == "cpu"
    theirs = contents(other.model)
    assert all(near(theirs[name].cpu(), value, 1e-4) for name, value in contents(case.model).items())
