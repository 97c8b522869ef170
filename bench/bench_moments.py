"""Benchmark of the `moments` stem: whole BayesAgg-MTL aggregations at the published shapes (posterior of the batch,
moments, mean over tasks, with the full-data posterior as prior), and each operation by itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

import mtlgrad
from bench import moments_counts as counts
from bench.harness import Case, Contender, Work, relative_error, replayed
from bench.peers import bayesagg_published as published
from mtlgrad import ops, posterior, reference

GAMMA = 0.005  # the UTKFace experiment's values, as published
POWER = {"regression": 0.3, "binary": 0.1, "multiclass": 0.1}
BATCH = 128
SAMPLES = 1024

# Largest error allowed, relative to the largest entry. Monte Carlo contenders are compared with the exact moments too:
# theirs is the error of the estimator.
FLOAT32 = 2e-5
POINTS = 2e-3  # 128 points for a softmax: the layer integrates over other coordinates than the reference does
FACTORED = 1e-4  # the eager step factorises the batch's precision in float32
CANCELLING = 1e-2  # the published variance, E[g^2] - E[g]^2 in float32


def monte_carlo(samples: int) -> float:
    """Some five times what this many samples leave: 0.12 for 1,024."""
    return 4 / samples**0.5


@dataclass(frozen=True)
class Shape:
    """One aggregation: heads as (kind, outputs) on B x width features, with a full-data posterior of `examples`."""

    name: str
    heads: tuple[tuple[published.Kind, int], ...]
    width: int
    batch: int = BATCH
    samples: int = SAMPLES
    examples: int = 2048
    literal: Literal["timed", "once", "no"] = "timed"  #: the published step, which can take a minute or all memory
    sweep: bool = False  #: one of several, to show how the cost grows: without torch.compile

    @property
    def text(self) -> str:
        if self.sweep:
            return f"B={self.batch} D={self.width} T={self.heads[0][1]}"
        heads = "+".join(f"{kind}{outputs}" for kind, outputs in self.heads)
        return f"{self.name} B={self.batch} D={self.width} {heads} S={self.samples}"


SHAPES = (
    Shape("cifar-mtl", (("binary", 20),), 160),
    Shape("utkface", (("regression", 1), ("multiclass", 2), ("multiclass", 5)), 256),
    Shape("regression-2048", (("regression", 1),), 2048, examples=4096, literal="once"),
)


def sweeps() -> list[Shape]:
    """One size at a time from 20 binary tasks (B 128, D 160) and from one regression. The published step holds
    [S, B, T, D] tensors of the binary tasks, 3.5 GB at that size, and is left out where they would be larger."""
    found = []
    for batch, width, tasks in (
        *((batch, 160, 20) for batch in (32, 128, 512, 2048)),
        *((128, width, 20) for width in (40, 80, 320, 640)),
        *((128, 160, tasks) for tasks in (2, 5, 40)),
    ):
        small = batch * width * tasks <= 128 * 160 * 20
        literal: Literal["timed", "no"] = "timed" if small else "no"
        found.append(Shape("binary", (("binary", tasks),), width, batch=batch, literal=literal, sweep=True))
    for width in (128, 256, 512, 1024):
        once: Literal["timed", "once"] = "once" if width > 512 else "timed"
        found.append(Shape("regression", (("regression", 1),), width, literal=once, sweep=True))
    return found


def toy(shape: Shape) -> Shape:
    return replace(shape, width=min(shape.width, 24), batch=16, samples=64, examples=96, literal="timed")


@dataclass
class Data:
    """Features of a whole data set, rectified normal, with labels drawn from a linear teacher: the heads fit them."""

    features: Tensor
    targets: list[Tensor]
    weights: list[Tensor]  #: [O, P] per head, bias last
    shape: Shape

    def to(self, dtype: torch.dtype) -> Data:
        targets = [target.to(dtype) if target.is_floating_point() else target for target in self.targets]
        weights = [weight.to(dtype) for weight in self.weights]
        return replace(self, features=self.features.to(dtype), targets=targets, weights=weights)

    def batch(self) -> tuple[Tensor, list[Tensor]]:
        return self.features[: self.shape.batch], [target[: self.shape.batch] for target in self.targets]


def make_data(shape: Shape, device: torch.device) -> Data:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    features = normal(shape.examples, shape.width).relu()
    weights, targets = [], []
    for kind, outputs in shape.heads:
        weight = normal(outputs, shape.width + 1) * 2 / shape.width**0.5
        logits = features @ weight[:, :-1].t() + weight[:, -1]
        if kind == "regression":
            targets.append(logits + normal(*logits.shape))
        elif kind == "binary":
            targets.append((torch.rand(logits.shape, generator=generator) < logits.sigmoid()).float())
        else:
            targets.append(torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1))
        weights.append(weight)
    return Data(features.to(device), [t.to(device) for t in targets], [w.to(device) for w in weights], shape)


#: As the published code has them.
PUBLISHED_HEADS: dict[str, Callable[..., Any]] = {
    "regression": functools.partial(mtlgrad.Regression, noise=1.0, bias=False),
    "binary": mtlgrad.Binary,
    "multiclass": mtlgrad.Multiclass,
}


# One aggregation -----------------------------------------------------------------------------------------------------


def layer(data: Data, moments: str) -> mtlgrad.BayesAgg:
    """Ours, with the data set's posterior as prior."""
    groups = []
    for (kind, outputs), weight in zip(data.shape.heads, data.weights, strict=True):
        head = nn.Linear(data.shape.width, outputs, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            head.weight.copy_(weight[:, :-1])
            head.bias.copy_(weight[:, -1])
        groups.append(PUBLISHED_HEADS[kind](head, gamma=GAMMA, power=POWER[kind]))
    bayes = mtlgrad.BayesAgg(
        groups, moments, covariance="full", num_samples=data.shape.samples, statistics="stored", reduction="mean"
    )
    bayes(data.features.clone().requires_grad_(), data.targets)
    bayes.refresh()
    return bayes


def aggregating(data: Data, moments: str) -> Callable[[], Tensor]:
    """Ours, aggregating one batch."""
    return functools.partial(layer(data, moments).aggregate, *data.batch())


def eager(data: Data, prepare: Callable[..., Any] = lambda function: function) -> Callable[[], Tensor]:
    """The specification: posteriors, then the plain PyTorch moments, then the mean over tasks. `prepare` is applied to
    the functions of the reference: torch.compile, or nothing. (Posteriors check their input's values, which would only
    break graphs.)"""
    heads = list(zip(data.shape.heads, data.weights, strict=True))

    def posterior_of(kind: str, features: Tensor, target: Tensor, weight: Tensor, **prior: Any) -> Any:
        if kind == "regression":
            return posterior.regression_posterior(features, target, **prior)
        if kind == "binary":
            return posterior.binary_posterior(features, target, weight, **prior)
        return posterior.multiclass_posterior(features, target, weight, **prior)

    priors = [
        posterior_of(kind, data.features, target, weight, gamma=GAMMA)
        for ((kind, _), weight), target in zip(heads, data.targets, strict=True)
    ]
    moments = {kind: prepare(getattr(reference, f"{kind}_moments")) for kind in POWER}
    mean_over_tasks = prepare(reference.precision_mean)
    powers = [POWER[kind] for kind, outputs in data.shape.heads for _ in range(1 if kind == "multiclass" else outputs)]

    def step(features: Tensor, targets: Sequence[Tensor]) -> Tensor:
        means, variances = [], []
        for ((kind, _), weight), prior, target in zip(heads, priors, targets, strict=True):
            after = posterior_of(kind, features, target, weight, prior=prior)
            mean, variance = moments[kind](features, target, after.mean, after.covariance())
            means.append(mean)
            variances.append(variance)
        return mean_over_tasks(torch.cat(means, 1), torch.cat(variances, 1), powers)

    features, targets = data.batch()
    return lambda: step(features, targets)


def literal(data: Data) -> Callable[[], Tensor]:
    groups = [
        published.Group(kind, outputs, None if kind == "regression" else weight, GAMMA, POWER[kind])
        for (kind, outputs), weight in zip(data.shape.heads, data.weights, strict=True)
    ]
    priors = published.full_data_posteriors(groups, data.features, data.targets)
    features, targets = data.batch()
    return lambda: published.published_step(groups, features, targets, priors, num_samples=data.shape.samples)


def build_step(shape: Shape, device: torch.device, quick: bool, small: bool) -> Work:
    data = make_data(toy(shape) if small else shape, device)
    sampled = any(kind != "regression" for kind, _ in shape.heads)
    bound = monte_carlo(data.shape.samples) if sampled else CANCELLING
    ours = POINTS if any(kind == "multiclass" for kind, _ in shape.heads) else FLOAT32
    contenders = {"mtlgrad": Contender(aggregating(data, "exact"), ours)}
    if device.type == "cuda":
        contenders["mtlgrad graph"] = Contender(replayed(aggregating(data, "exact")), ours, "CUDA graph", optional=True)
    if sampled and not shape.sweep:
        contenders["mtlgrad sampled"] = Contender(aggregating(data, "sampled"), bound, "the paper's Monte Carlo")
    contenders["reference"] = Contender(eager(data), FACTORED)
    if not quick and not shape.sweep:
        contenders["compiled"] = Contender(
            eager(data, functools.partial(torch.compile, dynamic=False)),
            FACTORED,
            "torch.compile of the reference's functions",
            optional=True,
        )
    if data.shape.literal != "no":
        once = data.shape.literal == "once"
        # Monte Carlo: with few tasks its noise is larger than with the twenty that the bound is made for.
        contenders["published"] = Contender(
            literal(data), bound, "literal transcription", once=once, tolerated=shape.sweep
        )

    @functools.cache
    def exact() -> Tensor:
        return eager(data.to(torch.float64))()

    total = sum(
        (counts.step(kind, shape.batch, shape.width, outputs) for kind, outputs in shape.heads), start=counts.Count()
    )
    return Work(contenders, lambda output: relative_error(output, exact()), total.bytes, total.flops)


# Each operation by itself --------------------------------------------------------------------------------------------


def spread(generator: torch.Generator, size: int, outputs: int | None = None) -> Tensor:
    """A covariance of weights as a trained head has it: well conditioned, standard deviations around 0.1."""
    batch = () if outputs is None else (outputs,)
    root = torch.randn(*batch, size, 2 * size, generator=generator)
    return root @ root.mT * (0.01 / (2 * size))


def inputs(operation: str, size: dict[str, int], generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the function, the same for all contenders."""
    B, D, C = size["B"], size["D"], size.get("O") or size.get("C") or size["T"]
    features = torch.randn(B, D, generator=generator).relu()
    mean = torch.randn(C, D + 1, generator=generator) * 2 / D**0.5
    labels = torch.randint(0, 2, (B, C), generator=generator).float()
    classes = torch.randint(0, C, (B,), generator=generator)
    if operation == "regression_moments":
        return (features, torch.randn(B, C, generator=generator), mean[:, :-1].contiguous(), spread(generator, D)), {}
    if operation == "binary_moments":
        return (features, labels, mean, spread(generator, D + 1, C)), {}
    if operation == "multiclass_moments":
        return (features, classes, mean, spread(generator, C * (D + 1))), {}
    if operation.startswith("sampled_moments"):
        samples = mean + 0.1 * torch.randn(size["S"], C, D + 1, generator=generator)
        kind = operation.split()[1]
        return (features, labels if kind == "binary" else classes, samples), {"kind": kind}
    means = torch.randn(B, C, D, generator=generator)
    return (means, torch.rand(B, C, D, generator=generator) + 0.01, [0.3] * C), {}


def move(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    if isinstance(values, Tensor):
        return values.to(device, dtype if values.is_floating_point() else None)
    return tuple(move(value, device, dtype) for value in values) if isinstance(values, tuple) else values


def worst(output: Any, expected: Any) -> float:
    """The larger error of mean and variance, or the only one."""
    if isinstance(output, Tensor):
        return relative_error(output, expected)
    return max(relative_error(a, b) for a, b in zip(output, expected, strict=True))


def published_moments(operation: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Callable[[], Any] | None:
    """The transcription of the same operation, where there is one and it ends in seconds."""
    if operation.startswith("sampled"):
        # [S, B, C, D] tensors: 3.5 GB at the largest
        return lambda: published.sampled_moments(*arguments, **options)
    if operation == "regression_moments" and arguments[0].shape[1] <= 512:
        features, targets, mean, covariance = arguments
        law = MultivariateNormal(mean, scale_tril=torch.linalg.cholesky(covariance)[None])
        return lambda: published.regression_moments(features, targets, law)
    return None


def build_operation(operation: str, size: dict[str, int], device: torch.device, quick: bool, small: bool) -> Work:
    if small:
        size = {key: min(value, 16) for key, value in size.items()}
    arguments, options = inputs(operation, size, torch.Generator().manual_seed(0))
    double, arguments = move(arguments, device, torch.float64), move(arguments, device)
    # What holds all samples' gradients, several times.
    doubtful: dict[str, Any] = {"optional": math.prod(size.values()) > 4e9 and "S" in size}
    name = operation.split()[0]
    ours, plain = getattr(ops, name), getattr(reference, name)
    contenders = {
        "mtlgrad": Contender(lambda: ours(*arguments, **options), FLOAT32),
        "reference": Contender(lambda: plain(*arguments, **options), FLOAT32, **doubtful),
    }
    if not quick:
        fused = torch.compile(plain, dynamic=False)
        call = lambda: fused(*arguments, **options)  # noqa: E731
        contenders["compiled"] = Contender(call, FLOAT32, "torch.compile of the reference", optional=True)
    transcription = published_moments(operation, arguments, options)
    if transcription is not None:
        contenders["published"] = Contender(transcription, CANCELLING, "literal transcription", **doubtful)

    @functools.cache
    def exact() -> Any:
        if name == "precision_mean":
            return plain(*double)
        features, targets, *rest = double  # in parts: all samples' gradients in float64 would take 10 GB
        parts = zip(features.split(16), targets.split(16), strict=True)
        found = [plain(h, y, *rest, **options) for h, y in parts]
        return tuple(torch.cat(part) for part in zip(*found, strict=True))

    count = getattr(counts, name)(*size.values(), **options)
    return Work(contenders, lambda output: worst(output, exact()), count.bytes, count.flops)


OPERATIONS: tuple[tuple[str, dict[str, int]], ...] = (
    ("regression_moments", {"B": 128, "D": 256, "O": 1}),
    ("regression_moments", {"B": 128, "D": 2048, "O": 1}),
    ("binary_moments", {"B": 128, "D": 160, "O": 20}),
    ("multiclass_moments", {"B": 128, "D": 256, "C": 5}),
    ("sampled_moments binary", {"B": 128, "D": 160, "C": 20, "S": 1024}),
    *(("sampled_moments binary", {"B": 128, "D": 160, "C": 20, "S": samples}) for samples in (64, 256, 512)),
    ("sampled_moments multiclass", {"B": 128, "D": 256, "C": 5, "S": 1024}),
    ("precision_mean", {"B": 128, "D": 160, "T": 20}),
    ("precision_mean", {"B": 1024, "D": 2048, "T": 8}),
)


def cases(quick: bool, device: torch.device) -> list[Case]:
    """All there is to run, whole aggregations first."""
    found = []
    for shape in SHAPES:
        shape = toy(shape) if quick else shape
        found.append(Case("aggregate", shape.text, functools.partial(build_step, shape, device, quick)))
    for shape in sweeps():
        shape = toy(shape) if quick else shape
        build = functools.partial(build_step, shape, device, quick)
        found.append(Case(f"aggregate {shape.name}", shape.text, build, memory=False))
    large = {"B": 1024, "D": 2048, "C": 20, "S": 512}
    larger = [(f"sampled_moments {kind}", large) for kind in ("multiclass", "binary") if device.type == "cuda"]
    for operation, size in (*OPERATIONS, *larger):
        size = {key: min(value, 24) for key, value in size.items()} if quick else size
        text = " ".join(f"{key}={value}" for key, value in size.items())
        found.append(Case(operation, text, functools.partial(build_operation, operation, size, device, quick)))
    return list({case.title: case for case in found}.values())  # toy sizes may coincide
