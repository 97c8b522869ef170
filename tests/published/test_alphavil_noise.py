"""Where an auxiliary task truly helps, alphaVIL weighs it above one whose labels are shuffled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtlgrad import AlphaVIL
from mtlgrad.alphavil import Task

Batch = tuple[Tensor, Tensor]


def batches(x: Tensor, y: Tensor, size: int = 32) -> list[Batch]:
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


@pytest.mark.filterwarnings("ignore:AlphaVIL. target:RuntimeWarning")
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_a_planted_noise_task_ends_with_the_least_weight(seed: int) -> None:
    """The target has few labels, a helper that asks for nearly the same has many, and another has the helper's labels
    shuffled."""
    torch.manual_seed(seed)
    x, dev, test = torch.randn(1024, 20), torch.randn(256, 20), torch.randn(1024, 20)
    hidden, mixed = torch.randn(20, 8) / 20**0.5, torch.randn(8, 1) / 8**0.5
    mixed = torch.cat([mixed, mixed + 0.1 * torch.randn(8, 1)], 1)

    def labels(inputs: Tensor) -> Tensor:
        return (2 * inputs @ hidden).tanh() @ mixed

    y = labels(x) + 0.1 * torch.randn(1024, 2)
    model = nn.ModuleDict({"trunk": nn.Sequential(nn.Linear(20, 32), nn.Tanh())})
    for name in ("target", "helper", "noise"):
        model[name] = nn.Linear(32, 1)
        # Heads start alike: with random ones, a helper's first steps may lead away from what the target's head reads.
        model[name].load_state_dict(model["target"].state_dict())

    def loss(name: str) -> Any:
        return lambda net, batch: nn.functional.mse_loss(net[name](net["trunk"](batch[0]))[:, 0], batch[1])

    tasks = {
        "target": Task(
            batches(x[:64], y[:64, 0]), loss("target"), batches(dev, labels(dev)[:, 0], 256), model["target"]
        ),
        "helper": Task(batches(x, y[:, 1]), loss("helper"), head=model["helper"]),
        "noise": Task(batches(x, y[torch.randperm(1024), 1]), loss("noise"), head=model["noise"]),
    }
    vil = AlphaVIL(
        model,
        tasks,
        "target",
        make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        alpha_optimizer=lambda alpha: torch.optim.SGD(alpha, lr=1.0),
        subset=32,
    )
    held_out: Batch = test, labels(test)[:, 0]
    with torch.no_grad():
        first = float(loss("target")(model, held_out))
    for _ in range(40):
        vil.epoch()
    target, helper, noise = vil.task_weights.tolist()
    assert noise < min(target, helper)
    with torch.no_grad():
        assert float(loss("target")(model, held_out)) < 0.5 * first
