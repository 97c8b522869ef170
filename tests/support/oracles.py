"""What the package should compute, by other means: singular values, autograd, torch.optim, dense matrices, mpmath."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from mpmath import mp
from numpy.typing import ArrayLike
from scipy.optimize import brentq, nnls
from torch import Tensor, nn

from mtlgrad import AlphaVIL, reference
from mtlgrad.alphavil import Round, Task
from mtlgrad.posterior import Posterior
from mtlgrad.posterior.posteriors import JointPosterior
from mtlgrad.reference.moments import dense_multiclass_covariance
from tests.support.bounds import contents, near
from tests.support.nets import (
    ALPHA,
    GAMMA,
    GAMMAS,
    PAIRS,
    POWERS,
    SGD,
    Case,
    HeadData,
    NamedBatch,
    Net,
    Problem,
    posterior,
)

# ---- alignment by singular values, no Gram matrix; gradients by autograd ---------------------------------------------


class Procrustes(NamedTuple):
    weights: Tensor
    update: Tensor  # [N]
    singular_values: Tensor  # [T]
    rank: int
    transform: Tensor  # [T, T]


def procrustes(
    rows: Tensor, preference: Tensor | None = None, scale: str = "min", rtol: float | None = None
) -> Procrustes:
    """The orthogonal system nearest to the rows of a float64 matrix [T, N], times a singular value of the matrix.

    With rows = U S V' the system is s U_R V_R', over the R singular values whose square is above rtol times the
    largest square: it takes the gradients, from the left, by the T x T matrix s U_R S_R^-1 U_R'.
    """
    tasks = len(rows)
    u, s, vh = torch.linalg.svd(rows.double(), full_matrices=False)
    rtol = tasks * 1.2e-7 if rtol is None else rtol
    rank = int((s.square() > rtol * s[:1].square()).sum())
    p = torch.ones(tasks, dtype=torch.float64) if preference is None else preference.double()
    values = torch.zeros(tasks, dtype=torch.float64)
    values[: len(s)] = s
    if rank == 0:
        return Procrustes(p, p @ rows.double(), values, 0, torch.eye(tasks, dtype=torch.float64))
    kept = s[:rank]
    length = {"min": kept.min(), "median": kept.median(), "rmse": kept.square().mean().sqrt()}[scale]
    transform = length * (u[:, :rank] / kept) @ u[:, :rank].mT
    return Procrustes(transform @ p, length * (p @ u[:, :rank]) @ vh[:rank], values, rank, transform)


def jacobian(losses: Iterable[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """[T, *shape] for each tensor, by one autograd.grad a task; the graph is kept."""
    rows = [
        torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True, materialize_grads=True)
        for loss in losses
    ]
    return [torch.stack(parts) for parts in zip(*rows)]


def at_features(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    """The features with their graph, and the tasks' gradients there, [T, B D]."""
    features = net.backbone(x)
    rows = jacobian(net.from_features(features), [features])[0]
    return features, rows.flatten(1)


def pushed(net: Net, features: Tensor, update: Tensor) -> list[Tensor]:
    """What arrives at the backbone's parameters of a gradient at the features."""
    return list(torch.autograd.grad(features, net.shared, update.view_as(features).to(features.dtype)))


# ---- AdaTask: torch.optim on each task alone -------------------------------------------------------------------------


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
            for own, theta, jacobian in zip(copies, self.theta, jacobians, strict=True):
                own.data.copy_(theta)
                own.grad = jacobian[t].double()
            if present is None or present[t]:
                optimizer.step()
            moves = zip(copies, self.theta)
            self.updates.append([self.weights[t] * (own.detach() - theta) for own, theta in moves])
        for i, theta in enumerate(self.theta):
            theta.mul_(1.0 - self.decay)
            for update in self.updates:
                theta += update[i]


# ---- posteriors, with every matrix written out that the package avoids forming ---------------------------------------


def dense_of(law: Posterior, matrix: Any) -> Tensor:
    """A posterior's precision or covariance as [R*W, R*W], row-major, whatever its structure."""
    rows, width = law.mean.shape
    if isinstance(matrix, tuple):
        return torch.kron(*(factor.contiguous() for factor in matrix))
    if law.structure == "diag":
        return matrix.flatten().diag()
    if matrix.dim() == 3:
        return torch.block_diag(*matrix)
    return matrix if matrix.shape[0] == rows * width else torch.block_diag(*[matrix] * rows)


def structured(matrix: Tensor, structure: str, rows: int) -> Tensor:
    """What a structure keeps of a dense [R*W, R*W] matrix: its diagonal, or its blocks on the diagonal."""
    if structure == "diag":
        return matrix.diagonal().diag()
    width = matrix.shape[0] // rows
    keep = torch.eye(rows, dtype=matrix.dtype) if structure == "block" else torch.ones(rows, rows, dtype=matrix.dtype)
    return matrix * keep.repeat_interleave(width, 0).repeat_interleave(width, 1)


def kron_terms(data: HeadData, at: Tensor) -> tuple[Tensor, Tensor, int]:
    """(sum of Q, sum of h~ h~', number of labels), example by example."""
    curvature = torch.zeros(len(at), len(at), dtype=at.dtype)
    gram = torch.zeros(at.shape[1], at.shape[1], dtype=at.dtype)
    there = data.labelled
    for h in data.hidden[there]:
        p = torch.softmax(at @ h, 0)
        curvature += torch.diag(p) - torch.outer(p, p)
        gram += torch.outer(h, h)
    return curvature, gram, int(there.sum())


def kron_precision(curvature: Tensor, gram: Tensor, count: int, gamma: float = GAMMA) -> tuple[Tensor, Tensor]:
    """A + a I and G + b I: a b = 1 / gamma, a : b as the mean diagonals of A (a mean over examples) and G (a sum)."""
    a = curvature / count
    ratio = a.diagonal().mean() / gram.diagonal().mean()
    share = (ratio / gamma).sqrt()
    eye_c, eye_p = torch.eye(len(a), dtype=a.dtype), torch.eye(len(gram), dtype=a.dtype)
    return a + share * eye_c, gram + eye_p / (gamma * share)


# ---- BayesAgg, from the paper's equations ----------------------------------------------------------------------------


def isserlis(h: Tensor, y: Tensor, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """E and Var of 2 (w.h - y) w_d for one example and output, from the Gaussian's second, third and fourth moments
    written out as tensors of the weights."""
    second = covariance + torch.outer(mean, mean)
    m, s = mean, covariance
    third = torch.einsum("i,j,k->ijk", m, m, m)
    fourth = torch.einsum("i,j,k,l->ijkl", m, m, m, m)
    for pattern in ("ij,k->ijk", "ik,j->ijk", "jk,i->ijk"):
        third = third + torch.einsum(pattern, s, m)
    for pattern in ("ij,kl", "ik,jl", "il,jk"):
        fourth = fourth + torch.einsum(f"{pattern}->ijkl", s, s)
    for pattern in ("ij,k,l", "ik,j,l", "il,j,k", "jk,i,l", "jl,i,k", "kl,i,j"):
        fourth = fourth + torch.einsum(f"{pattern}->ijkl", s, m, m)
    expectation = 2 * (second @ h - y * m)
    squares = torch.einsum("ijkk,i,j->k", fourth, h, h) - 2 * y * torch.einsum("ikk,i->k", third, h)
    return expectation, 4 * (squares + y**2 * second.diagonal()) - expectation**2


def moments(data: HeadData, full: HeadData, structure: str = "full") -> tuple[Tensor, Tensor]:
    """[B, T, D] each, from the explicit covariance of the batch's posterior, whose prior is the full data's."""
    prior = posterior(full, structure, gamma=GAMMAS[data.kind])
    law = posterior(data, structure, prior=prior)
    rows, width = law.mean.shape
    if data.kind == "regression":
        blocks = dense_of(law, law.covariance()).reshape(rows, width, rows, width)
        pairs = [
            [isserlis(h, y[o].nan_to_num(), law.mean[o], blocks[o, :, o]) for o in range(rows)]
            for h, y in zip(data.features, data.targets)
        ]
        mean, variance = (torch.stack([torch.stack([pair[i] for pair in row]) for row in pairs]) for i in (0, 1))
        missing = data.targets.isnan()[..., None]
        return mean.masked_fill(missing, 0.0), variance.masked_fill(missing, torch.inf)
    if data.kind == "binary":
        return reference.binary_moments(data.features, data.targets, law.mean, law.covariance())
    # 256 points leave an integration error that depends on how the logits' covariance is factorised, so both sides
    # must hold the same one: `contrasts`, which test_posterior.py shows to be as good as the covariance.
    contrasts = law.contrasts
    if isinstance(prior, JointPosterior) and len(data.features) * (rows - 1) < law.mean.numel():
        contrasts = torch.linalg.inv(torch.linalg.inv(prior.contrasts) + law.precision - prior.precision)
    covariance = dense_multiclass_covariance(contrasts, rows)
    return reference.multiclass_moments(data.features, data.targets, law.mean, covariance)


def combined(parts: Sequence[tuple[Tensor, Tensor]], powers: Sequence[float]) -> Tensor:
    """Section 4.3, written out: for every example and dimension a mean over the tasks that have a label."""
    numerator, denominator = torch.zeros(()), torch.zeros(())
    for (mean, variance), power in zip(parts, powers):
        for task in range(mean.shape[1]):
            there = variance[:, task] < torch.inf
            weight = torch.where(there, variance[:, task].clamp(min=1e-8) ** -power, 0.0)
            numerator, denominator = numerator + weight * mean[:, task], denominator + weight
    return torch.where(denominator > 0, numerator / denominator.clamp(min=1e-300), 0.0) / len(parts[0][0])


def expected_gradient(m: Problem, rows: Any = slice(None), structure: str = "full") -> Tensor:
    parts = [moments(data.rows(rows), data, structure) for data in m.data]
    return combined(parts, [POWERS[data.kind] for data in m.data])


# ---- alphaVIL's round done over again, literally: a copy of the model a task, loops over names and tasks -------------


def transplanted(model: nn.Module, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> nn.Module:
    """A copy in evaluation mode with these tensors for its parameters: gradients flow to where they come from."""
    other = copy.deepcopy(model).eval()
    first = {id(p): name for name, p in model.named_parameters()}
    for name, p in model.named_parameters(remove_duplicate=False):
        if first[id(p)] in parameters:
            path, _, last = name.rpartition(".")
            module = other.get_submodule(path)
            del module._parameters[last]
            setattr(module, last, parameters[first[id(p)]])
    with torch.no_grad():
        for name, b in other.named_buffers():
            b.copy_(buffers[name])
    return other


class Literal:
    """theta, buffers and task weights, moved round after round. `alphas`, `kept` ... are those of the last."""

    def __init__(
        self,
        case: Case,
        *,
        make_optimizer: Any = SGD,
        alpha_optimizer: Any = ALPHA["sgd"],
        alpha_epochs: int = 2,
        clip_alpha: tuple[float, float] | None = None,
        include_heads: str = "own",
        min_weight: float = 0.01,
    ):
        self.case, self.model = case, copy.deepcopy(case.model)
        self.make_optimizer, self.alpha_optimizer = make_optimizer, alpha_optimizer
        self.alpha_epochs, self.clip, self.include_heads = alpha_epochs, clip_alpha, include_heads
        self.names, self.min_weight = list(case.tasks), min_weight
        self.weights = dict.fromkeys(self.names, 1.0)

    def owners(self, parameter: str) -> list[str]:
        found = [name for name in self.names if parameter in self.case.heads[name]]
        return [] if self.include_heads == "all" else found

    def may(self, task: str, parameter: str) -> bool:
        owners = self.owners(parameter)
        return not owners or task in owners

    def train(self, task: str, part: Iterable[NamedBatch]) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
        """What it makes of the parameters that it may move, and of the buffers; its mean loss."""
        model = copy.deepcopy(self.model)
        mine = {n: p for n, p in model.named_parameters() if p.requires_grad and self.may(task, n)}
        optimizer = self.make_optimizer(list(mine.values()))
        losses, weight = [], self.weights[task]
        weight = self.min_weight if weight < 0 and self.min_weight > weight else weight
        for batch in part:
            for p in model.parameters():
                p.grad = None
            loss = self.case.tasks[task].loss(model, batch)
            (weight * loss).backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        changed = {n: b for n, b in model.named_buffers() if not torch.equal(b, self.model.get_buffer(n))}
        return {n: p.detach() for n, p in mine.items()}, changed, sum(losses) / len(losses)

    def round(self, parts: Mapping[str, Iterable[NamedBatch]]) -> None:
        theta = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        deltas: dict[str, dict[str, Tensor]] = {}
        buffers: dict[str, list[Tensor]] = {n: [] for n, _ in self.model.named_buffers()}
        self.losses = []
        for task in self.names:
            after, changed, loss = self.train(task, parts[task])
            self.losses.append(loss)
            self.case.diary.clear()
            if all(bool(value.isfinite().all()) for value in (*after.values(), *changed.values())):
                deltas[task] = {n: after[n] - theta[n] for n in after}
                for n, value in changed.items():
                    buffers[n].append(value)
        self.sat_out = [name for name in self.names if name not in deltas]
        own = {n: b.clone() for n, b in self.model.named_buffers()}
        merged = dict(own)
        for n, found in buffers.items():
            if found:
                stacked = torch.stack(found)
                merged[n] = stacked.mean(0) if stacked.is_floating_point() else stacked.max(0).values

        def displaced(alphas: Tensor) -> dict[str, Tensor]:
            moved = {}
            for n, start in theta.items():
                total = start.double()
                for i, task in enumerate(self.names):
                    if n in deltas.get(task, {}):
                        weight = 1.0 if self.include_heads == "none" and self.owners(n) else alphas[i]
                        total = total + weight * deltas[task][n].double()
                moved[n] = total.to(start.dtype)
            return moved

        task = self.case.tasks[self.case.target]
        dev: list[NamedBatch] = list(task.dev)  # type: ignore[arg-type]

        def loss_at(parameters: Mapping[str, Tensor], statistics: Mapping[str, Tensor]) -> float:
            with torch.no_grad():
                model = transplanted(self.model, parameters, statistics)
                return sum(float(task.loss(model, batch)) for batch in dev) / len(dev)

        alphas = torch.ones(len(self.names), dtype=torch.float64, requires_grad=True)
        optimizer = self.alpha_optimizer([alphas])
        self.before, self.start = loss_at(theta, own), loss_at(displaced(alphas), merged)
        best, self.after, self.kept = torch.ones(len(self.names), dtype=torch.float64), self.start, "start"
        self.searched: list[float] = []
        while math.isfinite(self.start) and len(self.searched) < self.alpha_epochs:
            for batch in dev:

                def closure(batch: NamedBatch = batch) -> Tensor:
                    loss = task.loss(transplanted(self.model, displaced(alphas), merged), batch)
                    (alphas.grad,) = torch.autograd.grad(loss, alphas)
                    return loss.detach()

                optimizer.step(closure)
                if self.clip is not None:
                    alphas.data.clamp_(*self.clip)
            self.searched.append(loss_at(displaced(alphas), merged))
            if not math.isfinite(self.searched[-1]):
                break
            if self.searched[-1] < self.after:
                best, self.after, self.kept = alphas.detach().clone(), self.searched[-1], "search"
        self.alphas = best
        if self.after <= self.before:
            self.model.load_state_dict({**displaced(best), **merged}, strict=False)
            for i, name in enumerate(self.names):
                if name in deltas and float(best[i]) != 1.0:
                    self.weights[name] = self.weights[name] + float(best[i]) - 1.0
        else:
            self.alphas, self.after, self.kept = torch.zeros_like(best), self.before, "none"

    def compare(self, vil: AlphaVIL, found: Round, tolerance: float) -> None:
        assert (found.kept, found.sat_out) == (self.kept, [self.names.index(name) for name in self.sat_out])
        mine = contents(self.model)
        for name, got in contents(vil.model).items():
            assert near(got, mine[name], tolerance), name
        weights = torch.tensor(list(self.weights.values()), dtype=torch.float64)
        assert near(vil.task_weights, weights, tolerance)
        assert near(vil.alphas, self.alphas, tolerance)
        assert vil.alphas.dtype == vil.task_weights.dtype == torch.float64
        for ours, its in (
            ([found.before, found.start, found.after], [self.before, self.start, self.after]),
            (found.searched, self.searched),
            (found.losses, self.losses),
        ):
            a, b = (torch.tensor(some, dtype=torch.float64) for some in (ours, its))
            assert torch.equal(a.isnan(), b.isnan())
            assert near(a.nan_to_num(), b.nan_to_num(), tolerance)


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


# ---- what rules over a Gram matrix minimise, from the gradients, one column a task, to float64's last digits ---------

SIZES = (2, 3, 8, 20, 40)
_EXACT = np.vectorize(mp.mpf, otypes=[object])
_LOG = np.vectorize(mp.log, otypes=[object])


def gradient_systems(count: int, seed: int) -> Iterator[np.ndarray]:
    """Yield gradients [N, T] of many ranks: unrelated, of a common direction or in conflict; some of unequal norms."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        tasks = int(rng.choice(SIZES))
        rank = int(rng.integers(1, tasks + 1)) if rng.random() < 0.7 else tasks
        mixing, kind = rng.standard_normal((rank, tasks)), rng.integers(4)
        if kind == 1:  # few tasks conflict
            mixing[0] = np.abs(mixing[0]) + rng.choice([1.0, 3.0])
        elif kind == 2:  # nearly all of the mean cancels
            mixing -= rng.choice([0.9, 0.999]) * mixing.mean(1, keepdims=True)
        elif kind == 3:  # two camps
            mixing[0] += rng.choice([-3.0, 3.0], tasks)
        if rng.random() < 0.5:
            mixing *= 10.0 ** rng.uniform(-1.5, 1.5, tasks)
        yield rng.standard_normal((tasks + int(rng.integers(1, 12)), rank)) @ mixing


def dual_cone(G: ArrayLike, u: ArrayLike) -> np.ndarray:
    """Return the v >= u of least ||G v||; only G v is unique where columns of G depend on each other."""
    G, u = np.asarray(G, np.float64), np.asarray(u, np.float64)
    return (u + _nonnegative(G, -(G.astype(np.longdouble) @ u))).astype(np.float64)


def min_norm(G: ArrayLike) -> np.ndarray:
    """Return the w >= 0, of sum one, of least ||G w||; unique where the columns of G are affinely independent."""
    G = np.asarray(G, np.longdouble)
    squares = np.square(G).sum(0)
    if not squares.all():
        return np.eye(len(squares))[np.argmin(squares)]
    root = np.sqrt(np.float64(squares.min()))
    ones = np.full((1, G.shape[1]), root, np.longdouble)
    x = _nonnegative(np.vstack([G, ones]), np.append(np.zeros(len(G), np.longdouble), root))
    return (x / x.sum()).astype(np.float64)


def cagrad(G: ArrayLike, c: float) -> np.ndarray:
    """Return CAGrad's weights u + z; of the w that minimises F, z is c |g0| / ||G w|| w, and zero where G w is.

    F is the least, over s, of g0'G w + c |g0| (||G w||^2 / s + s) / 2; its w at a fixed s is the shortest convex
    combination of the gradients moved by s / (c |g0|) g0, and ||G w|| / s falls with s to one where F is least.
    """
    G = np.asarray(G, np.float64)
    tasks = G.shape[1]
    u = np.full(tasks, 1 / tasks)
    norms, mean = np.linalg.norm(G, axis=0), G @ u
    radius = c * np.linalg.norm(mean)
    if np.linalg.norm(mean) <= 1e-14 * norms.mean():
        return u

    def at(s: float) -> tuple[np.ndarray, float]:
        w = min_norm(G.astype(np.longdouble) + (s / radius * mean.astype(np.longdouble))[:, None])
        return w, float(np.linalg.norm(G @ w))

    least = min_norm(G)
    low, high = float(np.linalg.norm(G @ least)), float(norms.max())
    if low <= 1e-12 * (norms @ least):  # zero is a convex combination: is it the best?
        if np.linalg.norm(G @ (dual_cone(G, u) - u)) <= radius * (1 + 1e-12):
            return u
        low = high
    low *= 0.999
    while at(low)[1] < low and low > 1e-60 * high:
        low /= 8
    low, high = np.log(low), np.log(high * 1.001)
    root = np.exp(brentq(lambda s: at(np.exp(s))[1] / np.exp(s) - 1, low, high, xtol=1e-14, rtol=1e-14))
    w, length = at(root)
    return u + _on_face(G, radius / length * w, radius)


def fair(M: ArrayLike, alpha: float) -> np.ndarray:
    """Return the a > 0 with M a = a^(-1/alpha), by Newton's method in 50 digits; ValueError where none is found.

    It minimises a'M a / 2 - sum a^e / e, e = 1 - 1/alpha, or the logarithm in the power's place; there is none where
    some a >= 0 has M a = 0, as of opposite gradients.
    """
    with mp.workdps(50):
        exact, power = _EXACT(np.asarray(M, np.float64)), 1 / mp.mpf(alpha)
        diagonal = np.diag(exact)
        norms = diagonal**0.5
        cosines = (exact / norms / norms[:, None]).astype(np.float64)

        def value(a: np.ndarray) -> mp.mpf:
            return a @ (exact @ a) / 2 - (_LOG(a) if alpha == 1 else a ** (1 - power) / (1 - power)).sum()

        a = diagonal ** (-1 / (1 + power))
        now = value(a)
        for _ in range(200):
            want = a**-power
            gradient = exact @ a - want
            curved = (power * want / a / diagonal).astype(np.float64)
            left = (gradient / norms / (norms * a).max()).astype(np.float64)
            step = -_EXACT(np.linalg.solve(cosines + np.diag(curved), left)) * (norms * a).max() / norms
            size = np.abs(step / a).max()
            if size < 1e-30:
                return a.astype(np.float64)
            if a @ (exact @ a) < 1e-15 * (a @ (np.abs(exact) @ a)):
                break
            length = min(mp.mpf(1), 0.9 / max(-step / a)) if (step < 0).any() else mp.mpf(1)
            slope = gradient @ step
            shortest = length / 1e4
            while size > 1e-9 and length > shortest and value(a + length * step) > now + length * slope / 4:
                length /= 2
            if length <= shortest:
                break
            a = a + length * step
            now = value(a)
    raise ValueError("no a > 0 found with M a = a^(-1/alpha)")


def imtlg(G: ArrayLike, rtol: float = 1e-10) -> np.ndarray:
    """Return IMTL-G's weights; zero for a gradient that is zero. ValueError where they have no sum to divide by.

    Singular values of the unit gradients count as zero up to rtol times the largest: rtol^2 for those of the cosines.
    """
    G = np.asarray(G, np.longdouble)
    norms = np.sqrt(np.square(G).sum(0))
    kept = norms > 0
    units = G[:, kept] / norms[kept]
    _, values, rows = np.linalg.svd(units.astype(np.float64), full_matrices=False)
    rank = int((values > rtol * values.max(initial=0)).sum())
    values, rows = values[:rank], rows[:rank]
    y = rows.T @ (rows.sum(1) / values**2)
    if rank == units.shape[1]:
        y = _normal(units, np.zeros(len(units), np.longdouble), 1, y)
    weights = np.zeros(G.shape[1], np.longdouble)
    weights[kept] = y / norms[kept]
    if abs(weights.sum()) <= 1e-12 * np.abs(weights).sum():
        raise ValueError("the weights sum to zero")
    return (weights / weights.sum()).astype(np.float64)


def pcgrad(M: ArrayLike, order: Sequence[Sequence[int]]) -> np.ndarray:
    """Return PCGrad's weights, in 50 digits: task i is freed of its conflicts with the tasks order[i], one by one."""
    with mp.workdps(50):
        exact = _EXACT(np.asarray(M, np.float64))
        total = 0 * exact[0]
        for i, others in enumerate(order):
            w = 0 * exact[0]
            w[i] = mp.mpf(1)
            for j in others:
                if j != i and (along := exact[j] @ w) < 0:
                    w[j] -= along / exact[j, j]
            total = total + w
        return total.astype(np.float64)


def _nonnegative(A: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the x >= 0 of least ||A x - b||: SciPy's, for columns of about unit norm, then refined where positive."""
    A, b = A.astype(np.longdouble), b.astype(np.longdouble)
    norms = np.sqrt(np.square(A).sum(0))
    scale = np.exp2(np.round(np.log2(np.where(norms > 0, norms, 1))))
    size = np.abs(b).max() or np.longdouble(1)
    A, b = A / scale, b / size
    x = nnls(A.astype(np.float64), b.astype(np.float64), maxiter=100 * A.shape[1])[0].astype(np.longdouble)
    face = x > 0
    if face.any():
        better = _normal(A[:, face], b, 0, x[face])
        if (better > 0).all():
            x[face] = better
    return x * size / scale


def _normal(A: np.ndarray, b: np.ndarray, c: float, x: np.ndarray) -> np.ndarray:
    """Return x refined to A'A x = A'b + c in long doubles, or solved in 50 digits if ill-conditioned; x if singular."""
    triangle = np.linalg.qr(A.astype(np.float64), mode="r")
    if len(triangle) < len(x) or np.linalg.cond(triangle) > 1e6:
        with mp.workdps(50):
            A, b = (_EXACT(part := y.astype(np.float64)) + _EXACT((y - part).astype(np.float64)) for y in (A, b))
            try:
                solved = mp.lu_solve(mp.matrix((A.T @ A).tolist()), mp.matrix((A.T @ b + c).tolist()))
            except ZeroDivisionError:
                return x
            return np.array([float(y) for y in solved])
    left = A.T @ (b - A @ x) + c
    for _ in range(20):
        new = x + np.linalg.solve(triangle, np.linalg.solve(triangle.T, left.astype(np.float64)))
        after = A.T @ (b - A @ new) + c
        if not np.abs(after).max() < np.abs(left).max():
            break
        x, left = new, after
    return x


def _on_face(G: np.ndarray, z: np.ndarray, radius: float) -> np.ndarray:
    """Return z with M_S (u + z) = level and ||G z|| = radius on the face S where z > 0, by Newton's method."""
    face = z > 0
    part = G[:, face].astype(np.longdouble)
    norms = np.sqrt(np.square(part).sum(0))
    units, unit = part / norms, norms.min() / norms
    mean = G.astype(np.longdouble).mean(1) / radius

    def residual(y: np.ndarray) -> np.ndarray:  # y: all of z, in units in which it is about one, then the level
        moved = units @ y[:-1]
        return np.append(units.T @ (mean + moved) - y[-1] * unit, (moved @ moved - 1) / 2)

    y = np.append(z[face] * norms / radius, 0)
    left = residual(y)
    for _ in range(30):
        pull = units.T @ (units @ y[:-1])
        slopes = np.block([[units.T @ units, -unit[:, None]], [pull[None], np.zeros((1, 1))]]).astype(np.float64)
        try:
            new = y - np.linalg.solve(slopes, left.astype(np.float64))
        except np.linalg.LinAlgError:
            break
        after = residual(new)
        if not (np.abs(after).max() < np.abs(left).max() and (new[:-1] > 0).all()):
            break
        y, left = new, after
    z = z.copy()
    z[face] = y[:-1] * radius / norms
    return z


# ---- residuals of the conditions that a minimiser meets --------------------------------------------------------------


def kkt_dual_cone(M: ArrayLike, u: ArrayLike, v: ArrayLike, strict: bool = True) -> float:
    """Return how far v is from v >= u, M v >= 0 and, task by task, one of the two being equal; 0: met, 1: not at all.

    v - u counts relative to |v| + |u|, and M v to |M| |v|, so that a v above u, however little, needs (M v)_i = 0. Not
    `strict`: to norms norms' |v|, of which M's own roundings are a part, where entries of M are nearly zero.
    """
    M, u, v = (np.asarray(x, np.longdouble) for x in (M, u, v))
    slack, force = _ratio(v - u, np.abs(v) + np.abs(u)), _ratio(M @ v, _absolute(M, strict) @ np.abs(v))
    return float(np.abs(np.minimum(slack, force)).max())


def kkt_simplex(M: ArrayLike, w: ArrayLike, strict: bool = True) -> float:
    """Return how far w is from w >= 0, sum w = 1 and M w >= w'M w with equality where w > 0; 0: met, 1: not at all.

    M w - w'M w counts relative to |M| w + w'|M| w (`strict` as above); a negative weight, however small, is not at all.
    With a zero gradient all that counts is w'M w, relative to the shortest other one.
    """
    M, w = np.asarray(M, np.longdouble), np.asarray(w, np.longdouble)
    force, size, squares = M @ w, _absolute(M, strict) @ np.abs(w), np.diag(M)
    if squares.all():
        excess = _ratio(force - w @ force, size + np.abs(w) @ size)
    else:
        excess = np.full_like(w, w @ force / squares[squares > 0].min(initial=np.inf))
    return float(max(np.abs(np.minimum(np.sign(w), excess)).max(), abs(w.sum() - 1)))


def kkt_cagrad(M: ArrayLike, c: float, weights: ArrayLike, strict: bool = True) -> float:
    """Return how far z = weights - u is from z >= 0, z'M z = c^2 u'M u and M (u + z) least where z > 0; as above.

    For z = 0: how far a w is from w'M w = 0, and the dual cone from the ball around u of which the update is taken.
    Where G w is zero but for rounding, a z that is huge passes whatever it is: such systems need another look.
    """
    M, weights = np.asarray(M, np.longdouble), np.asarray(weights, np.longdouble)
    u, terms = np.full(len(M), 1 / len(M)).astype(np.longdouble), _absolute(M, strict)
    z, ball = weights - u, c**2 * (u @ M @ u)
    if np.abs(z).max() <= 1e-15 * u[0]:
        if ball <= 1e-15 * (u @ terms @ u):
            return 0.0
        root = _root(M)
        norms = np.sqrt(np.diag(M))
        w, x = _ratio(min_norm(_ratio(root, norms)).astype(np.longdouble), norms), dual_cone(root, u) - u
        outside = (x @ M @ x - ball) / (np.abs(x) @ terms @ np.abs(x) + ball)
        apart = (w @ M @ w) / (w @ terms @ w) if norms.all() else 0.0
        return float(max(outside, apart, 0))
    if z.sum() <= 0:
        return 1.0
    force, size = M @ weights, terms @ np.abs(weights)
    level, levels = z @ force / z.sum(), np.abs(z) @ size / np.abs(z).sum()
    slack, excess = _ratio(z, np.abs(weights) + u), _ratio(force - level, size + levels)
    norm = abs(z @ M @ z - ball) / (np.abs(z) @ size + c**2 * (u @ terms @ u))
    return float(max(np.abs(np.minimum(slack, excess)).max(), norm))


def kkt_fair(M: ArrayLike, alpha: float, a: ArrayLike) -> float:
    """Return how far a is from a_i (M a)_i = a_i^(1 - 1/alpha), relative to the absolute terms."""
    M, a = np.asarray(M, np.longdouble), np.asarray(a, np.longdouble)
    if not (a > 0).all():
        return 1.0
    want = a ** (-1 / np.longdouble(alpha))
    return float((np.abs(M @ a - want) / (np.abs(M) @ a + want)).max())


def _absolute(M: np.ndarray, strict: bool) -> np.ndarray:
    """Return what roundings of M v count against: |M|, or the products of norms that bound it."""
    norms = np.sqrt(np.diag(M))
    return np.abs(M) if strict else np.multiply.outer(norms, norms)


def _ratio(x: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return x / size, and zero where size is."""
    return np.divide(x, size, out=np.zeros(x.shape, np.longdouble), where=size > 0)


def _root(M: np.ndarray) -> np.ndarray:
    """Return a G with G'G = M: eigenvectors of the cosines, with the norms put back."""
    norms = np.sqrt(np.diag(M))
    cosines = _ratio(M, np.multiply.outer(norms, norms))
    values, vectors = np.linalg.eigh(cosines.astype(np.float64))
    return np.sqrt(np.maximum(values, 0))[:, None] * vectors.T * norms


# ---- strategies of gradients -----------------------------------------------------------------------------------------


@st.composite
def drawn_gradients(draw: st.DrawFn) -> np.ndarray:
    """Draw [N, T] of few values and low ranks; columns may be zero, equal, opposite or nearly so, at any scale."""
    tasks = draw(st.integers(1, 8) | st.sampled_from([12, 20]))
    rows = draw(st.integers(1, tasks + 2))
    if tasks > 8 or draw(st.booleans()):
        rng = np.random.default_rng(draw(st.integers(0, 9999)))
        G = rng.integers(-3, 4, (rows, tasks)) + draw(st.sampled_from([0.0, 0.3])) * rng.standard_normal((rows, tasks))
    else:
        entry = st.integers(-3, 3) | st.floats(-10, 10).map(lambda x: round(x, 3))
        G = np.array(draw(st.lists(entry, min_size=rows * tasks, max_size=rows * tasks)), np.float64)
        G = G.reshape(rows, tasks)
    one = st.integers(0, tasks - 1)
    for kind, i, j in draw(st.lists(st.tuples(st.integers(0, 5), one, one), max_size=tasks)):
        sign = -1.0 if kind % 2 else 1.0
        if kind < 2:  # equal or opposite
            G[:, i] = sign * G[:, j]
        elif kind < 4:  # nearly
            G[:, i] = sign * G[:, j] * (1 + 1e-8 * np.resize([1, -1, 2], rows))
        else:  # zero, or what cancels all others
            G[:, i] = 0
            if kind == 5:
                G[:, i] = -G.sum(1)
    power = st.integers(-24, 18).map(lambda k: 10.0**k)
    return G * draw(st.just(1.0) | power | st.lists(power, min_size=tasks, max_size=tasks).map(np.array))


def drawn_grams() -> st.SearchStrategy[np.ndarray]:
    """Return the strategy of G'G in float64 for G of :func:`gradients`: rounded, so not always quite semidefinite."""
    return drawn_gradients().map(lambda G: G.T @ G)
