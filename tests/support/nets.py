"""The nets of all tests, their data, and training steps of every method.

Three nets: :class:`Net`, smooth, with a regression head a task; :class:`NamedNet`, with heads by name for tasks of
every kind, dropout, buffers and tied weights by option; :class:`Model`, with normalisation layers or another backbone,
and linear heads.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mtlgrad
from mtlgrad import AlignedMTL, AlphaVIL, BayesAgg, Binary, Multiclass, Regression
from mtlgrad.alphavil import Round, Task
from mtlgrad.optim import AdaTaskAdagrad, AdaTaskAdam, AdaTaskAdamW, AdaTaskRMSprop
from mtlgrad.posterior import Posterior, binary_posterior, multiclass_posterior, regression_posterior
from tests.support.bounds import hushed, normal, seed_everything

# ---- a smooth net with T regression heads ----------------------------------------------------------------------------


class Net(nn.Module):
    """A backbone and T heads; smooth, so that finite differences and rounding behave."""

    def __init__(self, tasks: int = 3, seed: int = 0, backbone: nn.Module | None = None, width: int = 5):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.backbone = backbone or nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, width), nn.Tanh())
            self.heads = nn.ModuleList(
                nn.Sequential(nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, 1)) for _ in range(tasks)
            )

    def losses(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Mean squares of rather different sizes."""
        return [10.0**-t * (head(z) - t).square().mean() for t, (head, z) in enumerate(zip(self.heads, views))]

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The features, and each task's losses, example by example."""
        z = self.backbone(x)
        return z, [10.0**-t * (head(z) - t).square().flatten() for t, head in enumerate(self.heads)]

    def from_features(self, features: Tensor) -> list[Tensor]:
        return self.losses([features] * len(self.heads))

    @property
    def shared(self) -> list[nn.Parameter]:
        return list(self.backbone.parameters())


def inputs(batch: int = 16, seed: int = 1) -> Tensor:
    return normal(seed, batch, 6).float()


def step(net: Net, aligned: Callable[[Tensor], Sequence[Tensor]], x: Tensor) -> None:
    total: Any = sum(net.losses(aligned(net.backbone(x))))
    total.backward()


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


# ---- tasks of every kind, by name: alphaVIL --------------------------------------------------------------------------

SGD, MOMENTUM = partial(torch.optim.SGD, lr=0.03), partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=0.01)
#: A larger eps than usual: a bias before BatchNorm has a gradient of rounding errors only.
ADAM = partial(torch.optim.Adam, lr=0.002, eps=1e-3)
INNER = {"sgd": SGD, "momentum": MOMENTUM, "adam": ADAM}
ALPHA: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.5),
    "adam": partial(torch.optim.Adam, lr=0.1),
    "lbfgs": partial(torch.optim.LBFGS, lr=0.1, max_iter=2),
}


class NamedBatch(NamedTuple):
    number: int
    x: Tensor  # [B, 5]
    y: Tensor


class NamedNet(nn.Module):
    """A backbone and a head for each task: `size` has a value to tell, `kind` one of 3 classes, `marks` two marks.

    `norm`: BatchNorm; `tied`: one weight under two names; otherwise the layer that would have it is frozen.
    """

    def __init__(self, seed: int = 0, *, norm: bool = False, dropout: float = 0.0, tied: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 6)
            self.norm: nn.Module = nn.BatchNorm1d(8) if norm else nn.Identity()
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


def add_odd_parameters(net: NamedNet) -> None:
    """That no loss sees, without elements, without dimensions, not contiguous."""
    net.unseen, net.empty = nn.Parameter(torch.ones(3)), nn.Parameter(torch.empty(2, 0))
    net.norm = nn.Sequential(net.norm, Shift())
    net.second.weight = nn.Parameter(net.second.weight.detach().t().contiguous().t())


@dataclass
class NamedLoss:
    """Of one task; it notes the batches that it was trained on."""

    task: str
    factor: float = 1.0
    also: str | None = None  #: a task through whose head it goes, too
    noise: float = 0.0  #: in training: from torch, numpy and Python
    diary: list[tuple[str, int]] = field(default_factory=list)

    def __call__(self, model: Any, batch: NamedBatch) -> Tensor:
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


def named_batches(
    task: str, seed: int, count: int = 4, size: int = 16, dtype: torch.dtype = torch.float32
) -> list[NamedBatch]:
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
        found.append(NamedBatch(number, x.to(dtype), y.to(dtype) if y.is_floating_point() else y))
    return found


class Unsized:
    """It can be iterated anew, and that is all."""

    def __init__(self, of: list[NamedBatch]):
        self.of, self.passes, self.given = of, 0, 0

    def __iter__(self) -> Iterator[NamedBatch]:
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
        self.model: Any = NamedNet(seed, **net)
        if odd:
            add_odd_parameters(self.model)
        self.model.to(dtype)
        names = list(tasks)
        self.target = names[0] if target is None else target
        self.diary: list[tuple[str, int]] = []
        self.tasks: dict[str, Task] = {}
        for i, name in enumerate(names):
            other = names[(i + 1) % len(names)] if also else None
            loss = NamedLoss(name, also=other, noise=noise, diary=self.diary)
            dev = named_batches(name, 50 + seed, 2, 32, dtype) if name == self.target else None
            train = named_batches(name, 10 * seed + i, count, dtype=dtype)
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

    def trained_on(self) -> dict[str, list[NamedBatch]]:
        """The batches of the round, in their order; empties the diary."""
        found: dict[str, list[NamedBatch]] = {name: [] for name in self.tasks}
        for name, number in self.diary:
            found[name].append(self.tasks[name].train[number])  # type: ignore[index]
        self.diary.clear()
        return found


def epoch(vil: AlphaVIL) -> Round:
    with hushed():
        return vil.epoch()


def case_on(case: Case, device: str) -> Case:
    """The case, its model and data there."""
    case.model.to(device)
    for name, task in list(case.tasks.items()):
        there = [
            None if some is None else [NamedBatch(b.number, b.x.to(device), b.y.to(device)) for b in some]
            for some in (task.train, task.dev)
        ]
        case.change(name, train=there[0], dev=there[1])
    return case


# ---- a head's data, and heads on features: BayesAgg ------------------------------------------------------------------

GAMMA = 0.3
KINDS = ("regression", "binary", "multiclass")
STRUCTURES = {"regression": ("full",), "binary": ("full", "diag"), "multiclass": ("full", "block", "kron", "diag")}
POSTERIORS = [(kind, structure) for kind in KINDS for structure in STRUCTURES[kind]]
HEAD_WIDTH = 4
GAMMAS = {"regression": 0.4, "binary": 0.3, "multiclass": 0.2}
POWERS = {"regression": 0.5, "binary": 1.0, "multiclass": 0.7}
#: The published model: unit noise, no bias; an epoch's features; the mean over the tasks.
published_regression = partial(Regression, noise=1.0, bias=False)
published_layer = partial(BayesAgg, covariance="full", reduction="mean", statistics="stored")
LAYERS: dict[str, Any] = {"regression": published_regression, "binary": Binary, "multiclass": Multiclass}


@dataclass
class HeadData:
    """One head's batch: features [B, D], targets, and the weights [R, W] at which a classifier stands."""

    kind: str
    features: Tensor
    targets: Tensor
    weight: Tensor

    def rows(self, which: Any) -> HeadData:
        return replace(self, features=self.features[which], targets=self.targets[which])

    def to(self, dtype: torch.dtype) -> HeadData:
        targets = self.targets if self.kind == "multiclass" else self.targets.to(dtype)
        return replace(self, features=self.features.to(dtype), targets=targets, weight=self.weight.to(dtype))

    @property
    def hidden(self) -> Tensor:
        return self.features if self.kind == "regression" else F.pad(self.features, (0, 1), value=1.0)

    @property
    def labelled(self) -> Tensor:
        return self.targets != -100 if self.kind == "multiclass" else ~self.targets.isnan()

    def loss(self, weight: Tensor) -> Tensor:
        """Summed over the batch, what has no label left out; regression: half the squared error (unit noise)."""
        logits, there = self.hidden @ weight.T, self.labelled
        if self.kind == "regression":
            return 0.5 * (logits[there] - self.targets[there]).square().sum()
        if self.kind == "binary":
            both = logits[there], self.targets[there]
            return F.binary_cross_entropy_with_logits(*both, reduction="sum")
        return F.cross_entropy(logits[there], self.targets[there], reduction="sum")

    def gradient(self, at: Tensor) -> Tensor:
        return torch.func.grad(self.loss)(at)

    def hessian(self, at: Tensor) -> Tensor:
        """[R*W, R*W]; these models are linear in their weights, so it is the generalised Gauss-Newton matrix."""
        return torch.autograd.functional.hessian(self.loss, at).reshape(at.numel(), at.numel())


def head_data(
    kind: str, examples: int = 30, width: int = 4, outputs: int = 3, seed: int = 0, missing: float = 0.0
) -> HeadData:
    """In float64; ``missing`` is the share of labels that are left out, one by one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    features = normal(examples, width)
    weight = 0.7 * normal(outputs, width + (kind != "regression"))
    if kind == "multiclass":
        targets = torch.randint(outputs, (examples,), generator=generator)
        targets[torch.rand(examples, generator=generator) < missing] = -100
    else:
        targets = normal(examples, outputs)
        targets = targets if kind == "regression" else (targets > 0).double()
        targets[torch.rand(examples, outputs, generator=generator) < missing] = torch.nan
    return HeadData(kind, features, targets, weight)


def posterior(data: HeadData, structure: str = "full", **options: Any) -> Posterior:
    options = options if "prior" in options else {"gamma": GAMMA, **options}
    if data.kind == "regression":
        return regression_posterior(data.features, data.targets, **options)
    function = binary_posterior if data.kind == "binary" else multiclass_posterior
    return function(data.features, data.targets, data.weight, structure=structure, **options)


@dataclass
class Problem:
    """Heads of the kinds asked for, a layer before them, an epoch of batches on the same features."""

    data: list[HeadData]
    heads: list[nn.Linear]
    layer: BayesAgg

    def targets(self, rows: Any = slice(None)) -> list[Tensor]:
        return [data.targets[rows] for data in self.data]

    def losses(self, features: Tensor, rows: Any = slice(None)) -> list[Tensor]:
        return [mean_loss(data.rows(rows), head(features)) for data, head in zip(self.data, self.heads)]

    def see(self, rows: Any = slice(None)) -> Tensor:
        """A training step without the optimizer's: the gradient at the features."""
        features = self.data[0].features[rows].clone().requires_grad_()
        self.layer.total(self.losses(self.layer(features, self.targets(rows)), rows)).backward()
        assert features.grad is not None
        return features.grad

    def aggregate(self, rows: Any = slice(None)) -> Tensor:
        return self.layer.aggregate(self.data[0].features[rows], self.targets(rows))


def mean_loss(data: HeadData, logits: Tensor) -> Tensor:
    """Summed over a head's outputs, divided by the batch size; without a label no loss."""
    batch, there = len(data.features), data.labelled
    if data.kind == "multiclass":
        return F.cross_entropy(logits, data.targets, ignore_index=-100, reduction="sum") / batch
    if data.kind == "binary":
        some = F.binary_cross_entropy_with_logits(logits[there], data.targets[there], reduction="sum")
        return some / batch
    return (logits[there] - data.targets[there]).square().sum() / batch


def linear(data: HeadData) -> nn.Linear:
    rows, width = data.weight.shape
    head = nn.Linear(HEAD_WIDTH, rows, dtype=data.weight.dtype)
    with torch.no_grad():
        head.weight.copy_(data.weight[:, :HEAD_WIDTH])
        head.bias.copy_(data.weight[:, HEAD_WIDTH] if width > HEAD_WIDTH else torch.linspace(0, 1, rows))
    return head


def problem(kinds: Sequence[str] = KINDS, examples: int = 40, missing: float = 0.0, **options: Any) -> Problem:
    data = [head_data(kind, examples, HEAD_WIDTH, seed=i, missing=missing) for i, kind in enumerate(kinds)]
    for other in data[1:]:
        other.features = data[0].features
    heads = [linear(d) for d in data]
    wrapped = [LAYERS[d.kind](head, gamma=GAMMAS[d.kind], power=POWERS[d.kind]) for d, head in zip(data, heads)]
    return Problem(data, heads, published_layer(wrapped, **options))


def unpacked(state: Tensor) -> dict[str, Any]:
    """What is in the tensor that the layer has in a state_dict."""
    found: dict[str, Any] = torch.load(io.BytesIO(bytes(state.numpy())), weights_only=True)
    return found


def packed(state: dict[str, Any]) -> Tensor:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


# ---- AdaTask's optimizers, and parameters without a net --------------------------------------------------------------

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
OPTIMIZER_CASES = [(name, i) for name, settings in SETTINGS.items() for i in range(len(settings))]
SHAPES = [(3, 4), (7,), (), (2, 0), (1, 2, 3, 4), (33,), (3,)]


def make_adatask(name: str, params: Any, num_tasks: int = 3, **settings: Any) -> Any:
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


# ---- normalisation layers, and other backbones -----------------------------------------------------------------------

WIDTH = 8


class Batch(NamedTuple):
    x: Tensor
    y: list[Tensor]  #: a value, two marks and one of three classes


class LayerNorm(nn.Sequential):
    shape = (6,)

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, WIDTH), nn.LayerNorm(WIDTH))


class BatchNorm(nn.Sequential):
    shape = (2, 6, 6)

    def __init__(self) -> None:
        first, second = nn.Conv2d(2, 8, 3, bias=False), nn.Conv2d(8, WIDTH, 3, bias=False)
        norms = nn.BatchNorm2d(8), nn.BatchNorm2d(WIDTH)
        super().__init__(first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU(), nn.Flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(2)


class Transformer(nn.Module):
    shape = (4, 6)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, WIDTH)
        self.encode = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(self.embed(x)).mean(1)


BACKBONES: dict[str, type[Any]] = {"layer norm": LayerNorm, "batch norm": BatchNorm, "transformer": Transformer}


class Model(nn.Module):
    """A backbone to [B, width], by name or by what makes it, and linear heads, given or by their number of outputs."""

    factors = (1.0, 1.0, 1.0)  #: of the losses

    def __init__(
        self,
        backbone: str | Callable[[], nn.Module] = "layer norm",
        seed: int = 0,
        *,
        heads: Sequence[int | nn.Module] = (1, 2, 3),
        width: int = WIDTH,
    ):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.backbone = BACKBONES[backbone]() if isinstance(backbone, str) else backbone()
            self.heads = nn.ModuleList(nn.Linear(width, head) if isinstance(head, int) else head for head in heads)

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    @property
    def shared(self) -> list[nn.Parameter]:
        return list(self.backbone.parameters())

    def losses(self, views: Tensor | Sequence[Tensor], y: Sequence[Tensor]) -> list[Tensor]:
        """Batch means, as BayesAgg has them, from one view for all heads or one for each."""
        views = [views] * 3 if isinstance(views, Tensor) else views
        size, marks, kind = (head(view).float() for head, view in zip(self.heads, views))
        losses = [
            (size - y[0]).square().sum(1).mean(),
            F.binary_cross_entropy_with_logits(marks, y[1], reduction="none").sum(1).mean(),
            F.cross_entropy(kind, y[2]),
        ]
        return [factor * loss for factor, loss in zip(self.factors, losses)]


class BayesNet(Model):
    """With a small data set, labels missing, and BayesAgg between backbone and heads."""

    def __init__(self, **options: Any):
        self.data = [head_data(k, 24, seed=i, missing=0.2).to(torch.float32) for i, k in enumerate(KINDS)]
        super().__init__(
            lambda: nn.Sequential(nn.Linear(HEAD_WIDTH, 8), nn.Tanh(), nn.Linear(8, HEAD_WIDTH)),
            heads=[linear(one) for one in self.data],
        )
        heads: Any = self.heads
        regression, binary, multiclass = heads
        self.layer = BayesAgg([Regression(regression), Binary(binary), Multiclass(multiclass)], **options)

    def loss(self, rows: Any) -> Tensor:
        batches = [data.rows(rows) for data in self.data]
        features = self.layer(self.backbone(batches[0].features), [batch.targets for batch in batches])
        return self.layer.total([mean_loss(batch, head(features)) for batch, head in zip(batches, self.heads)])


def batch(backbone: str = "layer norm", seed: int = 0, size: int = 32, device: str = "cpu") -> Batch:
    """Two hidden numbers an example, which are all that its labels need, in some noise."""
    generator, shape = torch.Generator().manual_seed(seed), BACKBONES[backbone].shape
    hidden = torch.randn(size, 2, generator=generator)
    x = 0.3 * torch.randn(size, *shape, generator=generator)
    x.movedim(1 if backbone == "batch norm" else -1, -1)[..., :2] += hidden.view(size, *[1] * (len(shape) - 1), 2)
    value = hidden.sum(1, keepdim=True).tanh()
    kind = torch.bucketize(hidden[:, 0] - hidden[:, 1], torch.tensor([-0.5, 0.5]))
    return Batch(x.to(device), [y.to(device) for y in (value, (hidden > 0.0).float(), kind)])


# ---- a training step of every method, as users write it --------------------------------------------------------------

Autocast = Callable[[], Any]


def autocast(device: str, dtype: torch.dtype | None) -> Autocast:
    return nullcontext if dtype is None else lambda: torch.autocast(device, dtype)


class Trainer:
    """One step of a method under mixed precision: `forward` alone is under autocast."""

    def __init__(self, model: Model, mixed: Autocast = nullcontext, scaler: Any = None, **settings: Any):
        self.model, self.mixed = model, mixed
        self.scaler = torch.amp.GradScaler("cpu", enabled=False) if scaler is None else scaler
        self.optimizer = self.make(**settings)

    def make(self, **settings: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), **{"lr": 0.02, **settings})

    def step(self, data: Batch) -> list[Tensor]:
        self.optimizer.zero_grad()
        losses = self.backward(data)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return [loss.detach() for loss in losses]

    def backward(self, data: Batch) -> list[Tensor]:
        raise NotImplementedError


class Sum(Trainer):
    def backward(self, data: Batch) -> list[Tensor]:
        with self.mixed():
            losses = self.model.losses(self.model.backbone(data.x), data.y)
        self.scaler.scale(torch.stack(losses).sum()).backward()
        return losses


class Layer(Trainer):
    def make(self, **settings: Any) -> torch.optim.Optimizer:
        self.aligned = AlignedMTL(3).to(next(self.model.parameters()).device)
        return super().make(**settings)

    def backward(self, data: Batch) -> list[Tensor]:
        with self.mixed():
            losses = self.model.losses(self.aligned(self.model.backbone(data.x)), data.y)
        self.scaler.scale(torch.stack(losses).sum()).backward()
        return losses


class Merge(Layer):
    def backward(self, data: Batch) -> list[Tensor]:
        with self.mixed():
            features = self.model.backbone(data.x)
            losses = self.model.losses(features, data.y)
        mtlgrad.task_backward([self.scaler.scale(loss) for loss in losses], self.model.shared, features=features)
        self.aligned.merge(self.model.shared)
        return losses


class Weigh(Layer):
    def backward(self, data: Batch) -> list[Tensor]:
        with self.mixed():
            features = self.model.backbone(data.x)
            losses = self.model.losses(features, data.y)
        scaled = [self.scaler.scale(loss) for loss in losses]
        (self.aligned.weigh(scaled, features) * torch.stack(scaled)).sum().backward()
        return losses


class Bayes(Trainer):
    """The first `warm_up` steps are plain summation; then an epoch is as long as that."""

    warm_up = 4

    def make(self, **settings: Any) -> torch.optim.Optimizer:
        heads: Any = self.model.heads
        size, marks, kind = heads
        self.bayes, self.steps = BayesAgg([Regression(size), Binary(marks), Multiclass(kind)]), 0
        return super().make(**settings)

    def backward(self, data: Batch) -> list[Tensor]:
        if self.steps and self.steps % self.warm_up == 0:
            self.bayes.refresh()
        self.steps += 1
        with self.mixed():
            features = self.bayes(self.model.backbone(data.x), data.y)
            losses = self.model.losses(features, data.y)
            total = self.bayes.total(losses)
        self.scaler.scale(total).backward()
        return losses


class AdaTask(Trainer):
    rule, through = "adam", True

    def make(self, lr: float | None = None, **settings: Any) -> torch.optim.Optimizer:
        lr = (0.005 if self.rule == "rmsprop" else 0.02) if lr is None else lr  # RMSprop's first steps are long
        made: torch.optim.Optimizer = PAIRS[self.rule][0](self.model.parameters(), num_tasks=3, lr=lr, **settings)
        return made

    def backward(self, data: Batch) -> list[Tensor]:
        with self.mixed():
            features = self.model.backbone(data.x)
            losses = self.model.losses(features, data.y)
        scaled = [self.scaler.scale(loss) for loss in losses]
        mtlgrad.task_backward(scaled, self.model.shared, features=features if self.through else None)
        return losses


def adatask(rule: str, through: bool) -> type[Trainer]:
    return type(f"AdaTask_{rule}", (AdaTask,), {"rule": rule, "through": through})


METHODS: dict[str, type[Trainer]] = {
    "aligned layer": Layer,
    "aligned merge": Merge,
    "aligned weigh": Weigh,
    "bayesagg": Bayes,
    **{f"adatask {rule}": adatask(rule, True) for rule in PAIRS},
    **{f"adatask {rule}, whole graph": adatask(rule, False) for rule in ("adam", "rmsprop")},
}
