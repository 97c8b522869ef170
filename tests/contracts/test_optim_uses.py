"""AdaTask with a compiled model."""

from __future__ import annotations

import pytest
import torch

import mtlgrad
from mtlgrad.optim import AdaTaskRMSprop
from tests.support.bounds import near
from tests.support.nets import Net, inputs


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
