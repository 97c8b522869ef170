"""Small models with tasks of every kind for the tests of AlphaVIL, and what looks at them."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtlgrad import AlphaVIL
from mtlgrad.alphavil import Round, Task

SGD, MOMENTUM = partial(torch.optim.SGD, lr=0.03), partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=0.01)
#: A larger eps than usual: a bias before BatchNorm has a gradient of rounding errors only.
ADAM = partial(torch.optim.Adam, lr=0.002, eps=1e-3)
INNER = {"sgd": SGD, "momentum": MOMENTUM, "adam": ADAM}
ALPHA: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.5),
    "adam": partial(torch.optim.Adam, lr=0.1),
    "lbfgs": partial(torch.optim.LBFGS, lr=0.1, max_iter=2),
}


class Batch(NamedTuple):
    number: int
    x: Tensor  # [B, 5]
    y: Tensor


class Net(nn.Module):
    """A backbone and a head for each task: `size` has a value to tell, `kind` one of 3 classes, `marks` two marks.

    `norm`: BatchNorm; `tied`: one weight under two names; otherwise the layer that would have it is frozen.
    """

    def __init__(self, seed: int = 0, *, norm: bool = False, dropout: float = 0.0, tied: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 6)
            self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
            self.dropout = nn.Dropout(dropout)
            self.heads = nn.ModuleDict({"size": nn.Linear(6, 1), "kind": nn.Linear(6, 3), "marks": nn.Linear(6, 2)})
            self.again = nn.Linear(5, 8)
        if tied:
            self.again.weight = self.first.weight
        else:
            self.again.requires_grad_(False)
        self.tied = tied

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        if self.tied:
            z = z - self.again(x.flip(1))
        return self.second(self.dropout(torch.tanh(self.norm(z))))


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(0.1))

    def forward(self, z: Tensor) -> Tensor:
        return z + self.by


def add_odd_parameters(net: Net) -> None:
    """That no loss sees, without elements, without dimensions, not contiguous."""
    net.unseen, net.empty = nn.Parameter(torch.ones(3)), nn.Parameter(torch.empty(2, 0))
    net.norm = nn.Sequential(net.norm, Shift())
    net.second.weight = nn.Parameter(net.second.weight.detach().t().contiguous().t())


@dataclass
class Loss:
    """Of one task; it notes the batches that it was trained on."""

    task: str
    factor: float = 1.0
    also: str | None = None  #: a task through whose head it goes, too
    noise: float = 0.0  #: in training: from torch, numpy and Python
    diary: list[tuple[str, int]] = field(default_factory=list)

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        x = batch.x
        if model.training:
            self.diary.append((self.task, int(batch.number)))
            if self.noise:
                x = x + self.noise * (torch.randn_like(x) + np.random.normal() + random.gauss(0.0, 1.0))  # noqa: NPY002
        features = model(x)
        out = model.heads[self.task](features)
        if self.task == "size":
            loss = F.mse_loss(out.squeeze(1), batch.y)
        elif self.task == "kind":
            loss = F.cross_entropy(out, batch.y)
        else:
            loss = F.binary_cross_entropy_with_logits(out, batch.y)
        if self.also is not None:
            loss = loss + 0.1 * model.heads[self.also](features).square().mean()
        return self.factor * loss


def batches(task: str, seed: int, count: int = 4, size: int = 16, dtype: torch.dtype = torch.float32) -> list[Batch]:
    found = []
    for number in range(count):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        x = torch.randn(size, 5, generator=generator)
        hidden = torch.tanh(0.4 * x @ torch.randn(5, 3, generator=torch.Generator().manual_seed(7)))
        y: Tensor = hidden.sum(1) + 0.1 * torch.randn(size, generator=generator)
        if task == "kind":
            y = hidden.argmax(1)
        elif task == "marks":
            y = (hidden[:, :2] > 0.2).to(dtype)
        found.append(Batch(number, x.to(dtype), y.to(dtype) if y.is_floating_point() else y))
    return found


class Unsized:
    """It can be iterated anew, and that is all."""

    def __init__(self, of: list[Batch]):
        self.of, self.passes, self.given = of, 0, 0

    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        for batch in self.of:
            self.given += 1
            yield batch


class Sized(Unsized):
    def __len__(self) -> int:
        return len(self.of)


class Case:
    """A model and its tasks. `target`: whose development data there are. Seeds the random state that a round draws
    from."""

    def __init__(
        self,
        *,
        tasks: Iterable[str] = ("size", "kind", "marks"),
        target: str | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        count: int = 4,
        also: bool = False,
        noise: float = 0.0,
        odd: bool = False,
        heads: bool = True,
        **net: Any,
    ):
        self.model: Any = Net(seed, **net)
        if odd:
            add_odd_parameters(self.model)
        self.model.to(dtype)
        names = list(tasks)
        self.target = names[0] if target is None else target
        self.diary: list[tuple[str, int]] = []
        self.tasks: dict[str, Task] = {}
        for i, name in enumerate(names):
            other = names[(i + 1) % len(names)] if also else None
            loss = Loss(name, also=other, noise=noise, diary=self.diary)
            dev = batches(name, 50 + seed, 2, 32, dtype) if name == self.target else None
            train = batches(name, 10 * seed + i, count, dtype=dtype)
            self.tasks[name] = Task(train, loss, dev, self.model.heads[name] if heads else None)
        self.heads = {n: [f"heads.{n}.weight", f"heads.{n}.bias"] if heads else [] for n in names}
        seed_everything(seed)

    def change(self, task: str, **fields: Any) -> None:
        """Another training, loss or development data."""
        old = self.tasks[task]
        known = {name: getattr(old, name) for name in ("train", "loss", "dev", "head")}
        self.tasks[task] = Task(**{**known, **fields})

    def vil(self, **options: Any) -> AlphaVIL:
        settings = {"make_optimizer": SGD, "alpha_optimizer": ALPHA["sgd"], "alpha_epochs": 2, **options}
        return AlphaVIL(self.model, self.tasks, self.target, **settings)

    def trained_on(self) -> dict[str, list[Batch]]:
        """The batches of the round, in their order; empties the diary."""
        found: dict[str, list[Batch]] = {name: [] for name in self.tasks}
        for name, number in self.diary:
            found[name].append(self.tasks[name].train[number])  # type: ignore[index]
        self.diary.clear()
        return found


@contextmanager
def hushed() -> Iterator[None]:
    """What a round says of itself is not at issue."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "AlphaVIL: ", RuntimeWarning)
        yield


def epoch(vil: AlphaVIL) -> Round:
    with hushed():
        return vil.epoch()


def heard(vil: AlphaVIL) -> tuple[Round, list[str]]:
    """A round and what it says of itself."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = vil.epoch()
    assert all(warning.category is RuntimeWarning for warning in caught)
    return found, [str(warning.message) for warning in caught]


def values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in (*model.named_parameters(), *model.named_buffers())}


def random_state() -> list[Any]:
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return [torch.get_rng_state(), (str(name), keys.tolist(), *rest), random.getstate()]


def set_random_state(state: list[Any]) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
    random.setstate(state[2])


def same_random_state(first: list[Any], second: list[Any]) -> bool:
    return torch.equal(first[0], second[0]) and first[1:] == second[1:]


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Bit for bit; NaN is NaN."""
    pairs = [(a, second[name]) for name, a in first.items()]
    return first.keys() == second.keys() and all(
        a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in pairs
    )


def development_loss(model: nn.Module, task: Task) -> float:
    """By hand, in evaluation mode, at the parameters that the model has."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        losses = torch.stack([task.loss(model, batch).double() for batch in task.dev])  # type: ignore[union-attr]
    for module, mode in modes.items():
        module.training = mode
    return float(losses.mean())


class Recorder(torch.optim.SGD):
    """An alpha optimizer that looks at the loss and its gradient where it is told to, and then makes SGD's step."""

    seen: list[tuple[Tensor, float, Tensor]]
    places: list[Tensor]

    def step(self, closure: Any = None) -> Any:
        (alphas,) = self.param_groups[0]["params"]
        own = alphas.detach().clone()
        for place in [*self.places, own]:
            with torch.no_grad():
                alphas.copy_(place)
            loss = float(closure())
            self.seen.append((alphas.detach().clone(), loss, alphas.grad.clone()))
        return super().step(None)


def recorder(places: Iterable[Tensor] = (), lr: float = 0.0) -> tuple[Any, list[tuple[Tensor, float, Tensor]]]:
    """An `alpha_optimizer`, and the (alpha, loss, gradient) that it has seen, batch by batch: `places`, then alpha."""
    seen: list[tuple[Tensor, float, Tensor]] = []

    def make(parameters: list[Tensor]) -> torch.optim.Optimizer:
        optimizer = Recorder(parameters, lr=lr)
        optimizer.seen, optimizer.places = seen, list(places)
        return optimizer

    return make, seen


class Checked(torch.optim.SGD):
    """Has autograd compare the closure's gradient with differences of its loss, here and elsewhere."""

    places: Sequence[Tensor] = ()

    def step(self, closure: Any = None) -> Any:
        (alphas,) = self.param_groups[0]["params"]

        class Closure(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, at: Tensor) -> Tensor:
                with torch.no_grad():
                    alphas.copy_(at)
                loss: Tensor = closure()
                ctx.gradient = alphas.grad.clone()
                return loss.double().clone()

            @staticmethod
            def backward(ctx: Any, out: Tensor) -> Tensor:
                return out * ctx.gradient

        own = alphas.detach().clone()
        for place in (own, *self.places):
            assert torch.autograd.gradcheck(Closure.apply, place.clone().requires_grad_(), atol=1e-9, rtol=1e-6)
        with torch.no_grad():
            alphas.copy_(own)


def checked(places: Iterable[Tensor] = ()) -> Any:
    """An `alpha_optimizer` that checks the derivative at `places` and at alpha, and stays there."""

    def make(parameters: list[Tensor]) -> torch.optim.Optimizer:
        optimizer = Checked(parameters, lr=0.0)
        optimizer.places = list(places)
        return optimizer

    return make


def on(case: Case, device: str) -> Case:
    """The case, its model and data there."""
    case.model.to(device)
    for name, task in list(case.tasks.items()):
        there = [
            None if some is None else [Batch(b.number, b.x.to(device), b.y.to(device)) for b in some]
            for some in (task.train, task.dev)
        ]
        case.change(name, train=there[0], dev=there[1])
    return case
