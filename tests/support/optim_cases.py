"""AdaTask's optimizers for the tests: the four beside torch.optim's, and their rule, run by torch.optim on each task
alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import mtlgrad
from mtlgrad.optim import AdaTaskAdagrad, AdaTaskAdam, AdaTaskAdamW, AdaTaskRMSprop
from tests.support.gradient_cases import Net, inputs, normal
from tests.support.gradient_cases import near as near_some

#: The optimizers and torch.optim's of the same name.
PAIRS: dict[str, tuple[type[Any], type[torch.optim.Optimizer]]] = {
    "adam": (AdaTaskAdam, torch.optim.Adam),
    "adamw": (AdaTaskAdamW, torch.optim.AdamW),
    "rmsprop": (AdaTaskRMSprop, torch.optim.RMSprop),
    "adagrad": (AdaTaskAdagrad, torch.optim.Adagrad),
}

#: Settings to try with each.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "adam": [
        {},
        {"amsgrad": True, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.03, "betas": (0.5, 0.8), "eps": 1e-3},
        {"betas": (0.0, 0.0), "eps": 0.1, "amsgrad": True},
    ],
    "adamw": [{}, {"weight_decay": 0.3, "amsgrad": True, "lr": 0.1}, {"maximize": True, "betas": (0.8, 0.9)}],
    "rmsprop": [
        {},
        {"momentum": 0.9, "centered": True, "weight_decay": 0.1},
        {"alpha": 0.7, "eps": 1e-3, "maximize": True, "centered": True},
        {"momentum": 0.5, "lr": 1e-3},
    ],
    "adagrad": [
        {},
        {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5},
        {"lr": 0.1, "eps": 1e-3, "maximize": True},
    ],
}
CASES = [(name, i) for name, settings in SETTINGS.items() for i in range(len(settings))]
SHAPES = [(3, 4), (7,), (), (2, 0), (1, 2, 3, 4), (33,), (3,)]


def make(name: str, params: Any, num_tasks: int = 3, **settings: Any) -> Any:
    return PAIRS[name][0](params, num_tasks=num_tasks, **settings)


def new(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(normal(seed, *shape).to(dtype))


def several(dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    return [new(i, *shape, dtype=dtype) for i, shape in enumerate(shapes)]


def fill(parameters: Iterable[Tensor], seed: int, tasks: int = 3) -> None:
    """.jac, with tasks of rather different sizes."""
    sizes = 10.0 ** -torch.arange(tasks, dtype=torch.float64)
    for i, p in enumerate(parameters):
        jacobian = normal(1000 * seed + i, tasks, *p.shape) * sizes.view(-1, *[1] * p.dim())
        p.jac = jacobian.to(p.dtype)  # type: ignore[attr-defined]


def fill_grad(parameters: Iterable[Tensor], seed: int) -> None:
    for i, p in enumerate(parameters):
        p.grad = normal(1000 * seed + 500 + i, *p.shape).to(p.dtype)


def values(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def near(got: Tensor, want: Tensor, tolerance: float) -> bool:
    """Every element within `tolerance` of the largest."""
    return got.shape == want.shape and (not got.numel() or near_some(got, want, tolerance, 1e-300))


def same(first: Iterable[Tensor], second: Iterable[Tensor]) -> bool:
    """Bit for bit, with types and shapes."""
    pairs = list(zip(first, second, strict=True))
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies, by parameter and name."""
    state = optimizer.state_dict()["state"]
    return {f"{i} {name}": v.clone() for i, s in state.items() for name, v in s.items() if isinstance(v, Tensor)}


def same_state(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and same(first.values(), [second[name] for name in first])


class EachAlone:
    """What a step is to do, in float64: from where the parameters are, every task takes torch.optim's step alone, and
    the parameters move by the weighted sum of these steps. A decoupled weight decay is left out of them, and done once.
    """

    def __init__(self, name: str, parameters: Iterable[Tensor], tasks: int = 3, weights: Any = None, **settings: Any):
        self.theta = [p.detach().double().clone() for p in parameters]
        self.weights = [1.0] * tasks if weights is None else weights
        self.decay = 0.0
        self.copies = [[nn.Parameter(theta.clone()) for theta in self.theta] for _ in range(tasks)]
        ordinary = PAIRS[name][1]
        if name == "adamw":
            self.decay = settings.get("lr", 1e-3) * settings.get("weight_decay", 1e-2)
            settings = {**settings, "weight_decay": 0.0}
        self.optimizers = [ordinary(copies, **{"foreach": False, **settings}) for copies in self.copies]  # type: ignore[arg-type]
        self.updates: list[list[Tensor]] = []  # of the last step, per task

    def step(self, jacobians: Sequence[Tensor], present: Sequence[bool] | None = None) -> None:
        self.updates = []
        for t, (copies, optimizer) in enumerate(zip(self.copies, self.optimizers)):
            for copy, theta, jacobian in zip(copies, self.theta, jacobians, strict=True):
                copy.data.copy_(theta)
                copy.grad = jacobian[t].double()
            if present is None or present[t]:
                optimizer.step()
            moves = zip(copies, self.theta)
            self.updates.append([self.weights[t] * (copy.detach() - theta) for copy, theta in moves])
        for i, theta in enumerate(self.theta):
            theta.mul_(1.0 - self.decay)
            for update in self.updates:
                theta += update[i]


def backward(net: Net, x: Tensor, through: bool = True) -> None:
    features = net.backbone(x)
    losses = net.from_features(features)
    mtlgrad.task_backward(losses, net.shared, features=features if through else None)


def train(net: Net, optimizer: torch.optim.Optimizer, steps: range | int, scheduler: Any = None) -> list[float]:
    """The data of each step depends on its number alone. Returns the sums of losses."""
    dtype = next(net.parameters()).dtype
    shown = []
    for i in range(steps) if isinstance(steps, int) else steps:
        optimizer.zero_grad()
        features = net.backbone(inputs(seed=100 + i).to(dtype))
        losses = net.from_features(features)
        mtlgrad.task_backward(losses, net.shared, features=features)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        shown.append(float(sum(loss.detach() for loss in losses)))
    return shown


def checkpointed(path: str, steps: int, shown: bool = False) -> None:
    """Trains several nets, from the checkpoint if there is one, and writes one after every step."""
    runs = {}
    for kind in (*PAIRS, "bfloat16"):
        settings = {"moments_dtype": "bfloat16", "missing": "still"} if kind == "bfloat16" else {}
        net = Net(seed=3)
        optimizer = make("adam" if kind == "bfloat16" else kind, net.parameters(), **settings)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        runs[kind] = {"net": net, "optimizer": optimizer, "scheduler": scheduler}
    first = 0
    if os.path.exists(path):
        saved = torch.load(path, weights_only=True)
        first = saved["step"]
        for kind, run in runs.items():
            for part, loaded in run.items():
                loaded.load_state_dict(saved[kind][part])
    for i in range(first, steps):
        found: dict[str, Any] = {"step": i + 1}
        for kind, run in runs.items():
            train(run["net"], run["optimizer"], range(i, i + 1), run["scheduler"])
            found[kind] = {part: thing.state_dict() for part, thing in run.items()}
            found[kind]["dominance"] = run["optimizer"].dominance([run["net"].shared])
        torch.save(found, path + ".new")
        os.replace(path + ".new", path)
        if shown:
            print(i + 1, flush=True)


def one_line(error: BaseException, *parts: str) -> None:
    """A message is one line, and names all of this."""
    message = str(error)
    assert "\n" not in message
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in: {message}"
