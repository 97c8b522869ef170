"""How people train with AdaTask's optimizers: schedulers, scalers, clipping, hooks, closures, averages, copies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import mtlgrad
from mtlgrad.optim import AdaTaskAdam, AdaTaskAdamW, AdaTaskRMSprop
from tests.support.bounds import near, normal, one_line, same, state_tensors, values
from tests.support.nets import PAIRS, Net, backward, fill, fill_grad, inputs, make_adatask, new, several, train
from tests.support.oracles import EachAlone

EVERY = pytest.mark.parametrize("name", PAIRS)

# ---- schedulers ------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("kind", SCHEDULERS)
@EVERY
def test_schedulers(name: str, kind: str) -> None:
    """T = 1 follows torch's optimizer under the same scheduler, bit for bit, and so does a head with T = 3, beside
    parameters that follow the rule with the numbers the scheduler has set."""
    p, head, single, other = (new(i, 20, dtype=torch.float64) for i in (1, 2, 2, 2))
    optimizers = [make_adatask(name, [p, head]), make_adatask(name, [single], 1), PAIRS[name][1]([other])]
    schedulers = [SCHEDULERS[kind](o) for o in optimizers]
    alone = EachAlone(name, [p])
    for seed in range(8):
        fill([p], seed)
        fill([single], seed, 1)
        head.grad, other.grad = single.jac[0].clone(), single.jac[0].clone()  # type: ignore[attr-defined]
        for each in alone.optimizers:
            for key in ("lr", "betas", "momentum"):
                if key in each.param_groups[0]:
                    each.param_groups[0][key] = optimizers[0].param_groups[0][key]
        alone.decay = optimizers[0].param_groups[0]["lr"] * 0.01 * (name == "adamw")
        alone.step([p.jac])  # type: ignore[attr-defined]
        for optimizer in optimizers:
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        assert near(p.detach(), alone.theta[0], 1e-12)
        assert same([head, single], [other, other])
    assert optimizers[0].param_groups[0]["lr"] == optimizers[2].param_groups[0]["lr"] != optimizers[0].defaults["lr"]


@EVERY
def test_plateau_and_tensor_rates(name: str) -> None:
    p = new(1, 20)
    optimizer = make_adatask(name, [p], lr=0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for loss in (1.0, 1.0, 1.0):
        fill([p], 1)
        optimizer.step()
        scheduler.step(loss)
    assert optimizer.param_groups[0]["lr"] == 0.025
    # A tensor that the scheduler writes to, as good as numbers.
    runs = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        p = new(1, 20)
        optimizer = make_adatask(name, [p], lr=lr)
        scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)  # type: ignore[assignment]
        for seed in range(4):
            fill([p], seed)
            optimizer.step()
            scheduler.step()  # type: ignore[call-arg]
        runs.append(p.detach())
    assert torch.equal(*runs)


# ---- the interface ---------------------------------------------------------------------------------------------------


@EVERY
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


@EVERY
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


@EVERY
def test_zero_grad(name: str) -> None:
    p, head = new(1, 5), new(2, 5)
    optimizer = make_adatask(name, [{"params": [p]}, {"params": [head]}])
    fill([p], 1)
    fill_grad([p, head], 1)
    kept = p.jac  # type: ignore[attr-defined]
    optimizer.zero_grad(set_to_none=False)
    assert p.jac is kept  # type: ignore[attr-defined]
    assert not kept.any()
    assert not head.grad.any()  # type: ignore[union-attr]
    optimizer.zero_grad()
    assert not hasattr(p, "jac")
    assert head.grad is None
    before = values([p, head])
    optimizer.step()
    assert same([p, head], before)
    assert not optimizer.state_dict()["state"]
    optimizer.zero_grad()  # twice


@EVERY
def test_micro_batches(name: str) -> None:
    """task_backward accumulates: four quarters of a batch are the whole of it."""
    nets = [Net().double(), Net().double()]
    optimizers = [make_adatask(name, net.parameters(), lr=1e-3) for net in nets]
    for seed in range(3):
        x = inputs(16, seed).double()
        for optimizer in optimizers:
            optimizer.zero_grad()
        for part in x.chunk(4):
            features = nets[0].backbone(part)
            mtlgrad.task_backward([0.25 * loss for loss in nets[0].from_features(features)], nets[0].shared)
        backward(nets[1], x)
        for optimizer in optimizers:
            optimizer.step()
    assert all(near(a.detach(), b.detach(), 1e-9) for a, b in zip(nets[0].parameters(), nets[1].parameters()))


def test_averages_of_models_and_clipped_heads() -> None:
    """AveragedModel, plain and exponential, follows; torch's clipping of .grad takes the heads'."""
    net = Net()
    optimizer = AdaTaskAdamW(net.parameters(), num_tasks=3, lr=0.05)
    backward(net, inputs())  # .jac in what is copied
    averages = [AveragedModel(net), AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))]
    seen = []
    for seed in range(4):
        optimizer.zero_grad()
        backward(net, inputs(seed=seed))
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        assert float(torch.stack([p.grad.norm() for p in net.heads.parameters()]).norm()) <= 0.1001  # type: ignore[union-attr]
        optimizer.step()
        for average in averages:
            average.update_parameters(net)
        seen.append(values(net.parameters()))
    for i, p in enumerate(averages[0].module.parameters()):
        assert near(p.detach(), torch.stack([s[i] for s in seen]).mean(0), 1e-5)
    for i, p in enumerate(averages[1].module.parameters()):
        want = seen[0][i]
        for s in seen[1:]:
            want = 0.9 * want + 0.1 * s[i]
        assert near(p.detach(), want, 1e-5)


@EVERY
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
            mtlgrad.task_backward([head(z).square().mean() for head in heads], model.parameters(), features=z)
            optimizer.step()
    assert models[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert near(models[0].weight.detach(), models[1].weight.detach(), 1e-9)
    moments = [v for v in optimizers[0].state[models[0].weight].values() if v.dim() == 4]
    assert len(moments) >= 2
    assert all(moment.stride() == models[0].weight.stride() for moment in moments)


# Inductor itself uses what torch deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled_model() -> None:
    torch.compiler.reset()
    nets = [Net(), Net()]
    backbone = torch.compile(nets[0].backbone, backend="aot_eager")
    optimizers = [AdaTaskRMSprop(net.parameters(), num_tasks=3) for net in nets]
    for seed in range(3):
        for net, forward, optimizer in zip(nets, (backbone, nets[1].backbone), optimizers):
            optimizer.zero_grad()
            features = forward(inputs(seed=seed))
            mtlgrad.task_backward(net.from_features(features), net.shared, features=features)
            optimizer.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters()):
        assert near(a.detach(), b.detach(), 1e-4)


def test_capturable_and_named_parameters_and_subclasses() -> None:
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
    with pytest.raises(AssertionError) as ours:
        AdaTaskAdam([head], num_tasks=3, capturable=True).step()
    with pytest.raises(AssertionError) as torchs:
        torch.optim.Adam([head], capturable=True).step()
    assert str(ours.value) == str(torchs.value)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_gradients() -> None:
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
            ordinary(tables[1].parameters(), foreach=False).step()  # type: ignore[call-arg]
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
    mtlgrad.task_backward([z.sum(), z.square().sum()], table.parameters())
    optimizer.step()
    assert table.weight.isfinite().all()


def _work(net: Net, optimizer: Any) -> None:
    train(net, optimizer, 2)


def test_shared_memory() -> None:
    """A process that trains a model in shared memory, with a pickled optimizer, is seen here."""
    import torch.multiprocessing as mp

    for name in PAIRS:
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
        if name == "adam":
            process = mp.get_context("spawn").Process(target=_work, args=(nets[0], optimizers[0]))
            process.start()
            process.join(60)
            assert process.exitcode == 0
            train(nets[1], optimizers[1], 1)
            train(nets[1], optimizers[1], 2)
            assert same(nets[0].parameters(), nets[1].parameters())


def test_copies_go_on_alike() -> None:
    """deepcopy of model and optimizer together, which is how one keeps them together."""
    for name in PAIRS:
        net = Net()
        optimizer = make_adatask(name, net.parameters(), moments_dtype="bfloat16", task_weights=[1.0, 2.0, 0.5])
        train(net, optimizer, 3)
        net2, optimizer2 = copy.deepcopy((net, optimizer))
        assert {id(p) for p in optimizer2.state} == {id(p) for p in net2.parameters()}
        for n, o in ((net, optimizer), (net2, optimizer2)):
            train(n, o, range(3, 6))
        assert same(net.parameters(), net2.parameters())
        assert same(state_tensors(optimizer), state_tensors(optimizer2))


@pytest.mark.parametrize("first", [torch.float32, torch.float64], ids=str)
def test_a_double_parameter_leaves_the_rounding_of_others_stochastic(first: torch.dtype) -> None:
    """In a group of mixed types: averages of bfloat16, rounded to nearest, stall above what they average."""
    parameters = [nn.Parameter(torch.zeros(1000, dtype=first)), nn.Parameter(torch.zeros(1000))]
    optimizer = AdaTaskAdam(parameters, num_tasks=2, moments_dtype="bfloat16")
    for size in [1.0] + [0.0] * 300:
        for p in parameters:
            p.jac = torch.full((2, *p.shape), size, dtype=p.dtype)  # type: ignore[attr-defined]
        optimizer.step()
    mean = float(optimizer.state[parameters[1]]["exp_avg_sq_1"].double().mean())
    assert mean == pytest.approx(1e-3 * 0.999**300, rel=0.02)  # to nearest: 1e-3
