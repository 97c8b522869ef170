"""GradScaler and clipping see .jac, each task's gradient on its own."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_cases import Net, inputs, normal
from optim_cases import PAIRS, backward, fill, fill_grad, make, near, new, one_line, same, several, values
from torch import Tensor, nn

import mtlgrad
from mtlgrad.optim import AdaTaskAdam, clip_task_grad_norm_, unscale_jac_

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
    ours = [make(name, net.parameters()) for net in nets]
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
    optimizer, second, plain = make(name, [p, head]), AdaTaskAdam([q], num_tasks=2), torch.optim.SGD([other], lr=1.0)
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
