"""GradScaler and clipping see .jac, each task's gradient on its own."""

from __future__ import annotations

import inspect
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlgrad
from mtlgrad.optim import AdaTaskAdam, clip_task_grad_norm_, unscale_jac_
from tests.support.bounds import near, normal, one_line, same, values
from tests.support.nets import PAIRS, Net, backward, fill, fill_grad, inputs, make_adatask, new, several

EVERY = pytest.mark.parametrize("name", PAIRS)

# ---- GradScaler ------------------------------------------------------------------------------------------------------


def scaled(scaler: Any, net: Net, x: Tensor) -> None:
    losses = [scaler.scale(loss) for loss in net.from_features(net.backbone(x))]
    mtlgrad.task_backward(losses, net.shared)


@EVERY
def test_scaler(name: str) -> None:
    """Powers of two, so that the steps are those without a scaler, bit for bit; a plain optimizer beside it, too."""
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
        scaler.unscale_(ours[0])
        unscale_jac_(scaler, ours[0])
        for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            assert torch.equal(getattr(p, "jac", p.grad), getattr(q, "jac", q.grad))
        for optimizer in (ours[0], plain[0]):
            scaler.step(optimizer)
        scaler.update()
        for optimizer in (ours[1], plain[1]):
            optimizer.step()
        assert same(nets[0].parameters(), nets[1].parameters())
        assert same(beside[0].parameters(), beside[1].parameters())
    assert scaler.get_scale() == 2.0**12  # it grew twice


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@EVERY
def test_scaler_skips_a_step(name: str, bad: float, explicit: bool) -> None:
    """For a bad number in one task's .jac alone; another optimizer with the same scaler takes its step."""
    p, head, q, other = (new(i, 9) for i in range(4))
    optimizer, second, plain = (
        make_adatask(name, [p, head]),
        AdaTaskAdam([q], num_tasks=2),
        torch.optim.SGD([other], lr=1.0),
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    fill([p], 1)
    fill([q], 1, 2)
    fill_grad([head, other], 1)
    p.jac[2, 5] = bad  # type: ignore[attr-defined]
    before, jacobian = values([p, head, q, other]), q.jac.clone()  # type: ignore[attr-defined]
    if explicit:
        scaler.unscale_(optimizer)
        scaler.unscale_(second)
        with pytest.raises(RuntimeError, match="already been called"):
            scaler.unscale_(optimizer)
        unscale_jac_(scaler, optimizer)
        unscale_jac_(scaler, second)
    for each in (optimizer, second, plain):
        assert scaler.step(each) is None
    assert same([p, head], before[:2])
    assert not optimizer.state_dict()["state"]
    assert torch.equal(q.jac, jacobian / 4.0)  # type: ignore[attr-defined]
    assert not torch.equal(q, before[2])
    assert torch.equal(other, before[3] - other.grad)  # type: ignore[operator]
    scaler.update()
    assert scaler.get_scale() == 2.0


def test_scaler_sees_parameters_without_grad_and_none_at_all() -> None:
    """Parameters with .jac alone, .jac in another order than the parameter's, and a disabled scaler."""
    p = nn.Parameter(normal(1, 2, 3, 4, 5).float().contiguous(memory_format=torch.channels_last))
    optimizer = AdaTaskAdam([p], num_tasks=3)
    for enabled in (True, False):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=enabled)
        scaler.scale(torch.ones(()))
        fill([p], 1)
        p.grad = None
        want = p.jac / (8.0 if enabled else 1.0)  # type: ignore[attr-defined]
        found = p.jac  # type: ignore[attr-defined]
        scaler.step(optimizer)
        assert p.jac is found  # type: ignore[attr-defined]
        assert torch.equal(found, want)
        assert p.grad is None
        scaler.update()


def test_scaler_then_clipping_then_step() -> None:
    nets = [Net(), Net()]
    optimizers = [AdaTaskAdam(net.parameters(), num_tasks=3) for net in nets]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for seed in range(3):
        scaled(scaler, nets[0], inputs(seed=seed))
        backward(nets[1], inputs(seed=seed), False)
        scaler.unscale_(optimizers[0])
        unscale_jac_(scaler, optimizers[0])
        norms = [clip_task_grad_norm_(net.shared, 1e-3) for net in nets]
        assert torch.equal(*norms)
        assert (norms[0] > 1e-3).any()
        scaler.step(optimizers[0])
        scaler.update()
        optimizers[1].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        assert same(nets[0].parameters(), nets[1].parameters())


@pytest.mark.parametrize("explicit", [False, True])
def test_scaler_with_jac_alone(explicit: bool) -> None:
    """No parameter has .grad: infinities in .jac are all that there is to skip a step, and to make the scale fall."""
    p, q = new(1, 9), new(2, 2, 3)
    optimizer, scaler = AdaTaskAdam([p, q], num_tasks=3), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    for step, bad in enumerate([True, True, False]):
        fill([p, q], step)
        if bad:
            q.jac[1, 0, 2] = math.inf  # type: ignore[attr-defined]
        before, wanted = values([p, q]), [each.jac / 8.0 * 2**step for each in (p, q)]  # type: ignore[attr-defined]
        if explicit:
            scaler.unscale_(optimizer)
            unscale_jac_(scaler, optimizer)
        scaler.step(optimizer)
        assert same([p.jac, q.jac], wanted)  # type: ignore[attr-defined]
        assert same([p, q], before) == bad
        assert p.grad is None and q.grad is None  # noqa: PT018
        scaler.update()
        assert scaler.get_scale() == (4.0 / 2**step if bad else 2.0)


@pytest.mark.parametrize("explicit", [False, True])
def test_scaler_skips_a_step_for_grad_alone(explicit: bool) -> None:
    p, head = new(1, 9), new(2, 9)
    optimizer, scaler = AdaTaskAdam([p, head], num_tasks=3), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    fill([p], 1)
    fill_grad([head], 1)
    head.grad[3] = math.nan  # type: ignore[index]
    before = values([p, head])
    if explicit:
        scaler.unscale_(optimizer)
        unscale_jac_(scaler, optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert same([p, head], before)
    assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize("explicit", [False, True])
def test_scaler_with_several_dtypes_and_grad_beside_jac(explicit: bool) -> None:
    """.grad is unscaled everywhere, and is what it was before."""
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float32]
    parameters, heads = ([new(i, 9 - i, dtype=dtype) for i, dtype in enumerate(dtypes)] for _ in range(2))
    optimizer = AdaTaskAdam([*parameters, *heads], num_tasks=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    fill(parameters, 1)
    fill_grad([*parameters, *heads], 1)
    for p in parameters[1:3]:
        p.grad = p.grad.to_sparse()  # type: ignore[union-attr]
    gradients: list[Any] = [p.grad for p in (*parameters, *heads)]
    wanted = [p.jac / 4.0 for p in parameters] + [g.to_dense() / 4.0 for g in gradients]  # type: ignore[attr-defined]
    if explicit:
        scaler.unscale_(optimizer)
        unscale_jac_(scaler, optimizer)
    scaler.step(optimizer)
    assert same([*(p.jac for p in parameters), *(g.to_dense() for g in gradients)], wanted)  # type: ignore[attr-defined]
    assert all(p.grad is g for p, g in zip((*parameters, *heads), gradients, strict=True))


def test_scaler_that_skips_again() -> None:
    """.jac of a step that was skipped is looked at anew in the next, as .grad is."""
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    ours, plain = AdaTaskAdam([p], num_tasks=2), torch.optim.Adam([q])
    p.jac = torch.full((2, 4), math.inf)  # type: ignore[attr-defined]
    q.grad = torch.full((4,), math.inf)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    for scale in (4.0, 2.0, 1.0):
        for optimizer in (ours, plain):
            scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale
    assert torch.equal(p, torch.ones(4))
    assert torch.equal(q, torch.ones(4))


def test_float16_is_refused_as_by_torch() -> None:
    p = new(1, 4, dtype=torch.float16)
    optimizer, scaler = AdaTaskAdam([p], num_tasks=1), torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    fill([p], 1, 1)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.step(optimizer)
    optimizer.zero_grad()
    assert p.grad is None
    fill([p], 1, 1)
    scaler.unscale_(optimizer)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        unscale_jac_(scaler, optimizer)


ASKED = [
    lambda optimizer: optimizer._step_supports_amp_scaling,
    inspect.getmembers,
    lambda optimizer: [
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0) for _ in inspect.getmembers(optimizer)
    ],
]


@pytest.mark.parametrize("ask", ASKED)
@pytest.mark.parametrize("own", [False, True])
def test_others_may_ask_as_the_scaler_does(ask: Any, own: bool) -> None:
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
            elif ask is ASKED[2]:
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


def test_who_asks_and_then_unscales_reaches_jac() -> None:
    """As Lightning; then there is nothing left for unscale_jac_ to do."""
    p = new(1, 5)
    optimizer, scaler = AdaTaskAdam([p], num_tasks=3), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    fill([p], 1)
    want = p.jac / 4.0  # type: ignore[attr-defined]
    assert not optimizer._step_supports_amp_scaling
    scaler.unscale_(optimizer)
    assert p.grad is None
    unscale_jac_(scaler, optimizer)
    assert torch.equal(p.jac, want)  # type: ignore[attr-defined]
    clip_task_grad_norm_([p], 1e-3)
    clipped = p.jac.clone()  # type: ignore[attr-defined]
    scaler.step(optimizer)
    assert torch.equal(p.jac, clipped)  # type: ignore[attr-defined]
    assert not torch.equal(clipped, want)


def test_unscale_jac_of_wrapped_optimizers_and_without_a_scaler() -> None:
    class Wrapped:
        def __init__(self, optimizer: Any):
            self.optimizer = optimizer

    p = new(1, 5)
    optimizer, scaler = AdaTaskAdam([p], num_tasks=3), torch.amp.GradScaler("cpu", init_scale=4.0)
    fill([p], 1)
    before = p.jac.clone()  # type: ignore[attr-defined]
    unscale_jac_(None, optimizer)
    unscale_jac_(torch.amp.GradScaler("cpu", enabled=False), optimizer)
    assert torch.equal(p.jac, before)  # type: ignore[attr-defined]
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    unscale_jac_(scaler, Wrapped(Wrapped(optimizer)))
    assert torch.equal(p.jac, before / 4.0)  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"optimizer: expected one of mtlgrad\.optim, found SGD") as error:
        unscale_jac_(scaler, torch.optim.SGD([p]))
    one_line(error.value, "scaler.unscale_ is enough")


def fresh(p: Tensor, scaler: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    fill([p], 3)
    p.jac *= scaler.get_scale()  # type: ignore[attr-defined]


#: What is called, and what the error of the last says.
WRONG: dict[str, tuple[list[str], list[str]]] = {
    "unscale_ alone": (["unscale", "step"], ["AdaTaskAdam.step", "found it scaled"]),
    "clipping while scaled": (["unscale", "clip", "step"], ["AdaTaskAdam.step", "found it scaled"]),
    "clipping before the step": (["clip", "step"], ["clip_task_grad_norm_ called before"]),
    "clipping before both": (["clip", "unscale", "unscale jac"], ["clip_task_grad_norm_ called before"]),
    "clipping between": (["unscale", "clip", "unscale jac"], ["clip_task_grad_norm_ called before"]),
    "no unscale_": (["unscale jac"], ["found none to that"]),
    "unscale_ of the step before": (
        ["unscale", "unscale jac", "step", "update", "fresh", "unscale jac"],
        ["none to that"],
    ),
    "twice": (["unscale", "unscale jac", "unscale jac"], ["found a second call"]),
    "twice, clipped": (["unscale", "unscale jac", "clip", "unscale jac"], ["found a second call"]),
    "twice, with more": (["unscale", "unscale jac", "more", "unscale jac"], ["found a second call"]),
    "after the step": (["step", "unscale jac"], ["found one to scaler.step"]),
    "after both": (["unscale", "unscale jac", "step", "unscale jac"], ["found a second call"]),
    "another after unscaling": (["unscale", "unscale jac", "another", "step"], ["AdaTaskAdam.step", "found it scaled"]),
    "more after unscaling": (["unscale", "unscale jac", "more", "step"], ["AdaTaskAdam.step", "found it scaled"]),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("heads", [False, True])
def test_wrong_orders(case: str, heads: bool) -> None:
    """An error in one line, with nothing changed; and the right order goes on."""
    p, other, head = new(1, 5), new(1, 5), new(2, 5)
    optimizer, scaler = AdaTaskAdam([p, other, head], num_tasks=3), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))

    def more() -> None:
        p.jac += 1.0  # type: ignore[attr-defined]

    calls: dict[str, Any] = {
        "unscale": lambda: scaler.unscale_(optimizer),
        "unscale jac": lambda: unscale_jac_(scaler, optimizer),
        "clip": lambda: clip_task_grad_norm_([p], 0.1),
        "step": lambda: scaler.step(optimizer),
        "update": lambda: scaler.update(),
        "fresh": lambda: fresh(p, scaler, optimizer),
        "more": more,
        "another": lambda: fill([other], 4),
    }
    calls["fresh"]()
    head.grad = torch.ones(5)
    (*first, last), parts = WRONG[case]
    for call in first:
        calls[call]()
    before, states, jacobian = values([p, head]), len(optimizer.state), p.jac.clone()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError) as error:
        calls[last]()
    one_line(error.value, *parts, "unscale_jac_(scaler, optimizer), clip_task_grad_norm_ and scaler.step(optimizer)")
    assert same([p, head], before)
    assert len(optimizer.state) == states
    assert torch.equal(p.jac, jacobian)  # type: ignore[attr-defined]
    assert p.grad is None
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    fill([other], 3)
    clip_task_grad_norm_([other], 0.1)
    want = other.jac  # type: ignore[attr-defined]
    calls["fresh"]()
    head.grad = torch.ones(5) if heads else None
    for call in ("unscale", "unscale jac", "clip", "step", "update"):
        calls[call]()
    assert torch.equal(p.jac, want)  # type: ignore[attr-defined]
    assert not torch.equal(p, before[0])
    assert scaler.get_scale() == 4.0


def test_unscale_jac_without_jac() -> None:
    p = new(1, 5)
    optimizer, scaler = AdaTaskAdam([p], num_tasks=3), torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    with pytest.raises(ValueError, match="found none; call task_backward first") as error:
        unscale_jac_(scaler, optimizer)
    one_line(error.value)


UNTOUCHED = """
import torch
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch import nn
kinds = [torch.amp.GradScaler, ShardedGradScaler, torch.optim.Optimizer, torch.optim.Adam, torch.Tensor, nn.Parameter]
before = [dict(vars(kind)) for kind in kinds]
import mtlgrad
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


def test_torch_is_left_as_it_is() -> None:
    found = subprocess.run([sys.executable, "-c", UNTOUCHED], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


SCALED_AFTER_LOADING = """
import pickle, sys, torch, mtlgrad
optimizer = pickle.load(open(sys.argv[1], "rb"))
[p] = optimizer.param_groups[0]["params"]
p.jac = torch.full((2, 5), 8.0)
scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
scaler.scale(torch.ones(()))
scaler.unscale_(optimizer)
mtlgrad.optim.unscale_jac_(scaler, optimizer)
assert (p.jac == 1.0).all(), p.jac
scaler.update()
p.jac = torch.full((2, 5), 8.0)
scaler.step(optimizer)
assert (p.jac == 1.0).all(), p.jac
"""


def test_scaler_with_an_optimizer_from_another_process(tmp_path: Path) -> None:
    """Where none has been made, only unpickled."""
    (tmp_path / "optimizer").write_bytes(pickle.dumps(AdaTaskAdam([new(1, 5)], num_tasks=2)))
    command = [sys.executable, "-c", SCALED_AFTER_LOADING, str(tmp_path / "optimizer")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


# ---- clipping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_clipping_by_hand(dtype: torch.dtype) -> None:
    """Every task on its own, over all parameters together; .grad and parameters without .jac are left alone."""
    for max_norm in (0.0, 0.5, 3.0, 100.0):
        parameters, heads = several(dtype), several(dtype)
        fill(parameters, 1)
        fill_grad(parameters, 2)
        fill_grad(heads, 3)
        jacobians = [p.jac.double().clone() for p in parameters]  # type: ignore[attr-defined]
        grads = values(p.grad for p in [*parameters, *heads])  # type: ignore[misc]
        want = torch.stack([j.reshape(3, -1).square().sum(1) for j in jacobians]).sum(0).sqrt()
        factors = (max_norm / (want + 1e-6)).clamp(max=1.0)
        norms = clip_task_grad_norm_((p for p in [*parameters, *heads]), max_norm)
        assert norms.dtype == torch.float64
        assert near(norms, want, 1e-6)
        for p, j in zip(parameters, jacobians, strict=True):
            expected = j * factors.view(-1, *[1] * (j.dim() - 1))
            assert near(p.jac, expected, {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 0.01))  # type: ignore[attr-defined]
            if max_norm == 100.0:
                assert torch.equal(p.jac.double(), j)  # type: ignore[attr-defined]
        assert same((p.grad for p in [*parameters, *heads]), grads)  # type: ignore[misc]
    # As torch does for one task, and for heads, beside it.
    p, q = new(1, 50), new(1, 50)
    fill([p], 1, 1)
    q.grad = p.jac[0].clone()  # type: ignore[attr-defined]
    assert near(clip_task_grad_norm_(p, 2.0)[0], nn.utils.clip_grad_norm_([q], 2.0), 1e-6)
    assert near(p.jac[0], q.grad, 1e-6)  # type: ignore[attr-defined]


def test_clipping_of_bad_gradients() -> None:
    p = new(1, 5)
    fill([p], 1)
    p.jac[1, 2] = math.nan  # type: ignore[attr-defined]
    before = p.jac.clone()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError) as error:
        clip_task_grad_norm_([p], 1.0, error_if_nonfinite=True)
    one_line(error.value, "task 1", "nan")
    assert torch.equal(p.jac[[0, 2]], before[[0, 2]])  # type: ignore[attr-defined]
    norms = clip_task_grad_norm_([p], 1e-3)
    assert norms.isfinite().tolist() == [True, False, True]
    assert p.jac[[0, 2]].isfinite().all()  # type: ignore[attr-defined]  # the others are clipped all the same
    assert float(p.jac[0].norm()) <= 1e-3  # type: ignore[attr-defined]
    for wrong in (-1.0, math.nan):
        with pytest.raises(ValueError, match="max_norm: expected a number from 0") as refused:
            clip_task_grad_norm_([p], wrong)
        one_line(refused.value, str(wrong))
    with pytest.raises(ValueError, match="task_backward") as none:
        clip_task_grad_norm_([new(1, 5)], 1.0)
    one_line(none.value, "found none")
