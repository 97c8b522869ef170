"""AdaTask's steps on every backend: against the papers' rules in float64 and against torch.optim, for all types and
sizes; average squared updates; tensors however they lie, the same bits every time, stochastic rounding."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mtlgrad import ops, reference
from mtlgrad.ops import _native
from mtlgrad.reference.adatask import round_stochastically
from tests.ops import emulated
from tests.support.bounds import TINY, UNIT, normal

#: Of parameters and moments.
TYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float64),
]


class Rule(NamedTuple):
    op: str
    moments: tuple[str, ...]  #: per task
    settings: dict[str, Any]
    buffered: bool = False


_ADAM, _AMSGRAD = ("exp_avgs", "exp_avg_sqs"), ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
_SQUARE, _CENTERED, _SUM = ("square_avgs",), ("square_avgs", "grad_avgs"), ("state_sums",)

#: No two settings alike, and none a default, so that none can stand in for another.
RULES = {
    "adam": Rule("adam", _ADAM, {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6}),
    "adam, decay": Rule("adam", _ADAM, {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.3, "maximize": True}),
    "adamw": Rule("adam", _ADAM, {"lr": 0.02, "betas": (0.7, 0.9), "weight_decay": 0.3, "decoupled": True}),
    "amsgrad": Rule("adam", _AMSGRAD, {"lr": 0.03, "betas": (0.6, 0.98), "eps": 1e-3}),
    "amsgrad, adamw": Rule(
        "adam", _AMSGRAD, {"lr": 0.03, "weight_decay": 0.2, "decoupled": True, "maximize": True, "eps": 1e-4}
    ),
    "rmsprop": Rule("rmsprop", _SQUARE, {"lr": 0.02, "alpha": 0.9, "eps": 1e-3}),
    "rmsprop, decay": Rule("rmsprop", _SQUARE, {"lr": 0.02, "alpha": 0.8, "weight_decay": 0.3, "maximize": True}),
    "centered": Rule("rmsprop", _CENTERED, {"lr": 0.02, "alpha": 0.9, "weight_decay": 0.1}),
    "momentum": Rule("rmsprop", _SQUARE, {"lr": 0.03, "alpha": 0.9, "momentum": 0.6}, buffered=True),
    "centered, momentum": Rule(
        "rmsprop",
        _CENTERED,
        {"lr": 0.03, "alpha": 0.7, "momentum": 0.5, "weight_decay": 0.1, "maximize": True},
        buffered=True,
    ),
    "adagrad": Rule("adagrad", _SUM, {"lr": 0.05, "eps": 1e-3}),
    "adagrad, decay": Rule(
        "adagrad", _SUM, {"lr": 0.05, "lr_decay": 0.2, "weight_decay": 0.3, "maximize": True, "eps": 1e-5}
    ),
}
#: One of each kind of moments.
KINDS = ["adam", "amsgrad", "momentum", "centered", "adagrad, decay"]


@dataclass
class State:
    """What a step changes: per parameter, and in `moments` by name, per parameter and task."""

    parameters: list[Tensor]
    moments: dict[str, list[list[Tensor]]]
    buffers: list[Tensor]
    steps: list[Tensor]
    squares: list[Tensor] = field(default_factory=list)

    @staticmethod
    def of(named: dict[str, Tensor], rule: Rule) -> State:
        """The inverse of :meth:`named`."""

        def some(name: str) -> list[Tensor]:
            return [tensor for key, tensor in named.items() if key.startswith(f"{name}[")]

        count = len(some("parameters"))
        moments = {n: [some(f"{n}[{p}]") for p in range(count)] for n in rule.moments}
        return State(some("parameters"), moments, some("buffers"), some("steps"), some("squares"))

    def named(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for p, parameter in enumerate(self.parameters):
            found[f"parameters[{p}]"] = parameter
            found |= {f"{n}[{p}][{t}]": m for n, lists in self.moments.items() for t, m in enumerate(lists[p])}
        for name in ("buffers", "steps", "squares"):
            found |= {f"{name}[{p}]": tensor for p, tensor in enumerate(getattr(self, name))}
        return found

    def map(self, change: Any) -> State:
        """change(tensor) of parameters and moments; copies of steps and squares."""
        return State(
            [change(p) for p in self.parameters],
            {n: [[change(m) for m in row] for row in lists] for n, lists in self.moments.items()},
            [change(b) for b in self.buffers],
            [s.clone() for s in self.steps],
            [s.clone() for s in self.squares],
        )

    def clone(self) -> State:
        return self.map(lambda t: t.clone(memory_format=torch.preserve_format))

    def to(self, where: torch.dtype | str) -> State:
        """A copy, of parameters and moments in another dtype, or of everything elsewhere."""
        if isinstance(where, torch.dtype):
            return self.map(lambda t: t.to(where, copy=True))
        moved = self.map(lambda t: t.to(where, copy=True))
        moved.steps = [s.to(where) for s in moved.steps]
        moved.squares = [s.to(where) for s in moved.squares]
        return moved

    def wide(self) -> State:
        """In float32, or float64."""
        return self.map(lambda t: t.to(wider(t), copy=True))

    def task(self, t: int) -> State:
        """The only task of a state (which shares memory with this one)."""
        moments = {n: [[row[t]] for row in lists] for n, lists in self.moments.items()}
        return State(
            self.parameters,
            moments,
            self.buffers,
            [s[t : t + 1] for s in self.steps],
            [s[t : t + 1] for s in self.squares],
        )


def wider(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def begin(
    rule: Rule,
    shapes: Sequence[tuple[int, ...]],
    tasks: int,
    types: Sequence[tuple[torch.dtype, torch.dtype]] = ((torch.float32, torch.float32),),
    seed: int = 0,
    squares: bool = True,
) -> State:
    """In the middle of a training: all moments are there, and every task has made a number of steps of its own."""

    def moment(name: str, p: int, t: int) -> Tensor:
        g = 0.3 * normal(seed + 997 * p + 31 * t + 1, *shapes[p])
        if name in ("exp_avgs", "grad_avgs"):
            return g.to(types[p % len(types)][1])
        # Above the square of the mean, also once rounded; amsgrad's largest below some second moments, above others.
        noise = normal(seed + 997 * p + 31 * t + (3 if name == "max_exp_avg_sqs" else 2), *shapes[p])
        return (1.1 * g.square() + 0.01 + 0.5 * noise.square()).to(types[p % len(types)][1])

    count = len(shapes)
    return State(
        [normal(seed + 997 * p, *s).to(types[p % len(types)][0]) for p, s in enumerate(shapes)],
        {n: [[moment(n, p, t) for t in range(tasks)] for p in range(count)] for n in rule.moments},
        [normal(seed + 997 * p + 5, *s).to(types[p % len(types)][1]) for p, s in enumerate(shapes)]
        if rule.buffered
        else [],
        [torch.tensor([float((p + 2 * t) % 7) for t in range(tasks)]) for p in range(count)],
        [normal(seed + 997 * p + 6, tasks).square() * 1e-4 for p in range(count)] if squares else [],
    )


def gradients(state: State, tasks: int, seed: int = 0, size: float = 1.0) -> list[Tensor]:
    """[T, *shape] per parameter; the tasks' are of different sizes."""
    sizes = [0.5 * 1.3 ** (t % 9) for t in range(tasks)]
    return [
        torch.stack([size * sizes[t] * normal(seed + 499 * p + 17 * t + 7, *q.shape) for t in range(tasks)]).to(q.dtype)
        for p, q in enumerate(state.parameters)
    ]


def weights_of(tasks: int) -> list[float]:
    return [0.5 + 0.7 * ((3 * t + 1) % 5) for t in range(tasks)]


def call(module: ModuleType, rule: Rule, state: State, jacobians: Sequence[Tensor], **options: Any) -> None:
    """One step of mtlgrad.ops or mtlgrad.reference, in place."""
    moments = dict(state.moments)
    first = [moments.pop(n) for n in (_ADAM if rule.op == "adam" else rule.moments[:1])]
    named: dict[str, Any] = {**rule.settings, **moments, **options}
    if state.buffers:
        named["momentum_buffers"] = state.buffers
    if state.squares:
        named["squares"] = state.squares
    getattr(module, f"adatask_{rule.op}")(state.parameters, jacobians, *first, state.steps, **named)


# ---- the rules, in float64 -------------------------------------------------------------------------------------------


class Exact(NamedTuple):
    state: State  #: float64
    terms: dict[str, Tensor]  #: by the names of State.named: the sizes of what was added up for it
    tiny: dict[str, float]  #: what underflow may cost the average squares
    updates: list[Tensor]  #: [T, *shape], each task's


def exact(
    rule: Rule,
    state: State,
    jacobians: Sequence[Tensor],
    *,
    task_weights: Sequence[float] | None = None,
    present: Sequence[bool] | Tensor | None = None,
    square_decay: float = 0.99,
    **changed: Any,
) -> Exact:
    """The papers' rules for each task on its own, and the sum of their updates; `changed` settings of the rule.

    Adam (Kingma and Ba 2015), AMSGrad as torch has it (the largest v before bias correction), AdamW (Loshchilov and
    Hutter 2019), RMSProp and its centered form (Graves 2013, eps outside of the root), AdaGrad (Duchi et al. 2011).
    """
    chosen: dict[str, Any] = {
        "weight_decay": 0.0,
        "maximize": False,
        "decoupled": False,
        "lr_decay": 0.0,
        "momentum": 0.0,
    }
    chosen |= {"betas": (0.9, 0.999), "eps": {"adagrad": 1e-10}.get(rule.op, 1e-8), "alpha": 0.99}
    chosen |= {**rule.settings, **changed}
    lr, eps, decay = float(chosen["lr"]), chosen["eps"], chosen["weight_decay"]
    after, terms, tiny, updates = state.to("cpu").to(torch.float64), {}, {}, []
    steps = [s.double() for s in after.steps]
    for p, theta in enumerate(after.parameters):
        rows = jacobians[p].cpu().double()
        tasks, sum_, sum_terms = len(rows), torch.zeros_like(theta), torch.zeros_like(theta)
        each = torch.zeros_like(rows)
        old_squares = after.squares[p] * square_decay if after.squares else torch.zeros(tasks)
        squares, square_terms, lengths = old_squares.clone(), old_squares.clone(), torch.zeros(tasks).double()
        for t in range(tasks):
            named = {n: lists[p][t] for n, lists in after.moments.items()}
            terms |= {f"{n}[{p}][{t}]": m.abs() for n, m in named.items()}
            if present is not None and not bool(present[t]):
                continue
            steps[p][t] += 1
            k, w = int(steps[p][t]), 1.0 if task_weights is None else task_weights[t]
            g, g_terms = (-rows[t] if chosen["maximize"] else rows[t]), rows[t].abs()
            if decay and not chosen["decoupled"]:
                g, g_terms = g + decay * theta, g_terms + decay * theta.abs()
            x, x_terms, weight = g, g_terms, lr * w
            if rule.op == "adam":
                b1, b2 = chosen["betas"]
                m, v = named["exp_avgs"], named["exp_avg_sqs"]
                x_terms = m.abs() + (1 - b1) * (m.abs() + g_terms)
                v_terms = b2 * v + (1 - b2) * g_terms**2
                m.copy_(b1 * m + (1 - b1) * g)
                v.copy_(b2 * v + (1 - b2) * g**2)
                s, s_terms = v, v_terms
                if "max_exp_avg_sqs" in named:
                    s = named["max_exp_avg_sqs"]
                    s.copy_(torch.maximum(s, v))
                    s_terms = torch.maximum(s, v_terms)
                    terms[f"max_exp_avg_sqs[{p}][{t}]"] = s_terms
                terms[f"exp_avgs[{p}][{t}]"], terms[f"exp_avg_sqs[{p}][{t}]"] = x_terms, v_terms
                x, weight = m, weight / (1 - b1**k)
                root = (s / (1 - b2**k)).sqrt()
            elif rule.op == "rmsprop":
                a, v = chosen["alpha"], named["square_avgs"]
                v_terms = a * v + (1 - a) * g_terms**2
                v.copy_(a * v + (1 - a) * g**2)
                s, s_terms = v, v_terms
                terms[f"square_avgs[{p}][{t}]"] = v_terms
                if "grad_avgs" in named:
                    m = named["grad_avgs"]
                    m_terms = m.abs() + (1 - a) * (m.abs() + g_terms)
                    m.copy_(a * m + (1 - a) * g)
                    terms[f"grad_avgs[{p}][{t}]"] = m_terms
                    s, s_terms = (v - m**2).clamp(min=0), v_terms + m_terms**2
                root = s.sqrt()
            else:
                s = named["state_sums"]
                s_terms = s + g_terms**2
                s.copy_(s + g**2)
                terms[f"state_sums[{p}][{t}]"] = s_terms
                weight, root = weight / (1 + (k - 1) * chosen["lr_decay"]), s.sqrt()
            each[t] = weight * x / (root + eps)
            # Relative errors: of the root half those of what it is drawn from, and of four more operations.
            wrong = 4 + torch.where(s > 0, s_terms / s, torch.ones(()).double())
            u_terms = abs(weight) * x_terms / (root + eps) * wrong
            sum_ += each[t]
            sum_terms += u_terms
            squares[t] += (1 - square_decay) * (each[t] ** 2).sum()
            square_terms[t] += (1 - square_decay) * ((2 * each[t].abs() * u_terms).sum() + 32 * (each[t] ** 2).sum())
            lengths[t] = weight
        keep = 1 - lr * decay if chosen["decoupled"] else 1.0
        if after.buffers:
            b = after.buffers[p]
            b_terms = chosen["momentum"] * b.abs() + sum_terms / lr
            terms[f"buffers[{p}]"] = b_terms
            b.copy_(chosen["momentum"] * b + sum_ / lr)
            sum_, sum_terms = lr * b, 2 * lr * b_terms
        terms[f"parameters[{p}]"] = theta.abs() * (2 - keep) + sum_terms
        terms[f"steps[{p}]"] = steps[p]
        theta.copy_(keep * theta - sum_)
        updates.append(each)
        if after.squares:
            after.squares[p] = squares
            terms[f"squares[{p}]"] = square_terms
            tiny[f"squares[{p}]"] = float((lengths**2).max()) * theta.numel() * TINY[torch.float32] if tasks else 0.0
    after.steps = steps
    return Exact(after, terms, tiny, updates)


# ---- the bound -------------------------------------------------------------------------------------------------------


def assert_within_bound(
    got: State, eager: State, want: Exact, stored: State, what: str = "", stochastic: bool = False
) -> None:
    """Each element's error, as a share of its terms, is at most twice the largest of the eager computation in the same
    precision, plus eps; and half a unit of the last digit that `stored` has (if `stochastic`, a whole one)."""
    values, wide, types = got.to("cpu").named(), eager.named(), stored.named()
    for name, right in want.state.named().items():
        value, terms, dtype = values[name], want.terms[name], types[name].dtype
        assert value.dtype == dtype, f"{what} {name}"
        assert value.shape == right.shape, f"{what} {name}"
        assert value.isfinite().all(), f"{what} {name}: not finite"
        if not right.numel():
            continue
        if name.startswith("steps"):
            assert torch.equal(value.double(), right), f"{what} {name}"
            continue
        single = wide[f"parameters[{name.split('[')[1].rstrip(']')}]"].dtype == torch.float32
        unit = UNIT[torch.float32 if single else torch.float64]
        share = torch.where(terms > 0, (wide[name].double() - right).abs() / terms, torch.zeros(()).double())
        limit = (2 * share.max() + 2 * unit) * terms + 4 * TINY[torch.float32 if single else torch.float64]
        if dtype == torch.bfloat16:
            limit += UNIT[dtype] * (2 if stochastic else 1) * (right.abs() + limit) + 2 * TINY[dtype]
        limit += want.tiny.get(name, 0.0)
        excess = (value.double() - right).abs() - limit
        assert (excess <= 0).all(), f"{what} {name}: over its bound by {excess.max():.2e}, terms {terms.max():.2e}"


def check(
    rule: str | Rule, state: State, jacobians: list[Tensor], device: str, what: str = "", **options: Any
) -> State:
    """One step, held to the rules; the state after it."""
    chosen = RULES[rule] if isinstance(rule, str) else rule
    plain = {n: v for n, v in options.items() if n != "keys"}
    want = exact(chosen, state, jacobians, **plain)
    eager, got = state.to("cpu").wide(), state.to(device)
    call(reference, chosen, eager, [j.cpu().to(wider(j)) for j in jacobians], **on(plain, "cpu"))
    call(ops, chosen, got, [j.to(device) for j in jacobians], **on(options, device))
    assert_within_bound(got, eager, want, state, f"{rule} {what}", "keys" in options)
    return got


def on(options: dict[str, Any], device: str) -> dict[str, Any]:
    return {n: v.to(device) if isinstance(v, Tensor) else copy.copy(v) for n, v in options.items()}


def assert_same(got: State, want: State, what: str = "") -> None:
    """To the bit."""
    other = want.to("cpu").named()
    for name, tensor in got.to("cpu").named().items():
        assert tensor.dtype == other[name].dtype
        same = (tensor == other[name]) | (tensor.isnan() & other[name].isnan())
        assert same.all(), f"{what} {name}: {int((~same).sum())} of {same.numel()} differ"


# ---- for the tests --------------------------------------------------------------------------------------------------

NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float64: "f64"}
EVERY_RULE = pytest.mark.parametrize("rule", list(RULES))
EVERY_KIND = pytest.mark.parametrize("rule", KINDS)
EVERY_TYPE = pytest.mark.parametrize("types", TYPES, ids=lambda pair: f"{NAMES[pair[0]]}-{NAMES[pair[1]]}")
SINGLE, HALF = (torch.float32, torch.float32), (torch.float32, torch.bfloat16)


def step(rule: str, state: State, jacobians: list[Tensor], device: str = "cpu", **options: Any) -> State:
    """A copy of a state after one step, on the host again."""
    after = state.to(device) if device != "cpu" else state.clone()
    call(ops, RULES[rule], after, [j.to(device) for j in jacobians], **on(options, device))
    return after.to("cpu") if device != "cpu" else after


SIZES = [0, 1, 31, 32, 33, 255, 257, 1000, 70_000]

# ---- the rules -------------------------------------------------------------------------------------------------------


@EVERY_RULE
def test_reference_is_the_papers_rule(rule: str) -> None:
    """Ten steps in float64, tasks coming and going."""
    state = begin(RULES[rule], [(4, 5), (7,), ()], 3, [TYPES[-1]])
    options = {"task_weights": weights_of(3), "square_decay": 0.9}
    want = state
    for k in range(10):
        jacobians = gradients(state, 3, seed=100 * k)
        present = torch.tensor([k % 2 == 0, k % 3 != 1, True]) if k else None
        found = exact(RULES[rule], want, jacobians, present=present, **options)
        call(reference, RULES[rule], state, jacobians, present=present, **options)
        want = found.state
        for (name, got), right in zip(state.named().items(), want.named().values()):
            assert ((got.double() - right).abs() <= 1e-12 * found.terms[name]).all(), (name, k)


def peer(rule: str, parameter: Tensor) -> torch.optim.Optimizer:
    """torch.optim's optimizer of the name, on one parameter."""
    settings = dict(RULES[rule].settings)
    decoupled = settings.pop("decoupled", False)
    shared: dict[str, Any] = {"foreach": False, **settings}
    if RULES[rule].op == "adagrad":
        return torch.optim.Adagrad([parameter], initial_accumulator_value=0.1, **shared)
    if RULES[rule].op == "rmsprop":
        return torch.optim.RMSprop([parameter], centered="grad_avgs" in RULES[rule].moments, **shared)
    amsgrad = "max_exp_avg_sqs" in RULES[rule].moments
    return (torch.optim.AdamW if decoupled else torch.optim.Adam)(
        [parameter], amsgrad=amsgrad, **{"weight_decay": 0.0, **shared}
    )


STATE_NAMES = {"exp_avgs": "exp_avg", "exp_avg_sqs": "exp_avg_sq", "max_exp_avg_sqs": "max_exp_avg_sq"}
STATE_NAMES |= {"square_avgs": "square_avg", "grad_avgs": "grad_avg", "state_sums": "sum"}


@EVERY_RULE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("module", [ops, reference], ids=["ops", "reference"])
def test_one_task_is_torch_optim(module: Any, dtype: torch.dtype, rule: str, device: str) -> None:
    """From the first step on, in float64 to 1e-12 over all steps; in float32 every step by itself, from the same state,
    to four units of the last place of what was added up:
    two for each side, as the gradient with its weight decay is rounded twice before it is squared."""
    theirs = torch.nn.Parameter(normal(1, 300).to(dtype).to(device))
    optimizer = peer(rule, theirs)
    start = 0.1 if RULES[rule].op == "adagrad" else 0.0
    ours = State(
        [theirs.detach().clone()],
        {n: [[torch.full_like(theirs, start, requires_grad=False)]] for n in RULES[rule].moments},
        [torch.zeros_like(theirs, requires_grad=False)] if RULES[rule].buffered else [],
        [torch.zeros(1, device=device)],
    )
    for k in range(10):
        theirs.grad = normal(10 + k, 300).to(dtype).to(device) * 1.5 ** (k - 5)
        terms = exact(RULES[rule], ours, [theirs.grad[None]]).terms
        optimizer.step()
        call(module, RULES[rule], ours, [theirs.grad[None]])
        values = optimizer.state[theirs]
        pairs = {f"{n}[0][0]": (ours.moments[n][0][0], values[STATE_NAMES[n]]) for n in RULES[rule].moments}
        if ours.buffers:
            pairs["buffers[0]"] = (ours.buffers[0], values["momentum_buffer"])
        pairs["parameters[0]"] = (ours.parameters[0], theirs.detach())
        for name, (a, b) in pairs.items():
            limit = terms[name] * (1e-12 if dtype == torch.float64 else 4 * 2.0**-23)
            assert ((a - b).abs().cpu() <= limit).all(), (name, k)
            if dtype == torch.float32:
                a.copy_(b)
        assert ours.steps[0].item() == k + 1


@EVERY_RULE
def test_a_parameter_moves_by_the_sum_of_what_each_task_would_do(rule: str, device: str) -> None:
    """Every task alone, with moments of its own, starting from the same parameters and no weight on the others."""
    tasks, settings = 4, {n: v for n, v in RULES[rule].settings.items() if n != "weight_decay"}
    plain = RULES[rule]._replace(settings=settings)
    state = begin(plain, [(3, 11)], tasks, [TYPES[-1]])
    for buffer in state.buffers:
        buffer.zero_()
    jacobians, weights = gradients(state, tasks), weights_of(tasks)
    together, total = state.to(device), torch.zeros(3, 11, dtype=torch.float64)
    call(ops, plain, together, [j.to(device) for j in jacobians], task_weights=weights)
    for t in range(tasks):
        alone = state.clone().task(t).to(device)
        call(ops, plain, alone, [j[t : t + 1].to(device) for j in jacobians], task_weights=weights[t : t + 1])
        total += alone.parameters[0].cpu() - state.parameters[0]
        for name in plain.moments:
            assert torch.equal(alone.moments[name][0][0], together.moments[name][0][t])
    moved = together.parameters[0].cpu() - state.parameters[0]
    assert (moved - total).abs().max() <= 1e-14 * (1 + moved.abs().max())


def test_defaults_are_those_of_torch(device: str) -> None:
    """Called without any setting."""
    classes = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop, "adagrad": torch.optim.Adagrad}
    for name, optimizer_class in classes.items():
        theirs = torch.nn.Parameter(normal(1, 50).to(device))
        rule = Rule(name, RULES[{"adam": "adam", "rmsprop": "rmsprop", "adagrad": "adagrad"}[name]].moments, {})
        moments = {n: [[torch.zeros_like(theirs, requires_grad=False)]] for n in rule.moments}
        ours = State([theirs.detach().clone()], moments, [], [torch.zeros(1, device=device)])
        optimizer = optimizer_class([theirs], foreach=False)
        for k in range(3):
            theirs.grad = normal(2 + k, 50).to(device)
            optimizer.step()
            call(ops, rule, ours, [theirs.grad[None]])
        # Each class has its own learning rate: ops' are Adam's 1e-3 and 1e-2 otherwise.
        assert optimizer.defaults["lr"] == {"adam": 1e-3}.get(name, 1e-2)
        assert (ours.parameters[0] - theirs.detach()).abs().max() <= 1e-13


# ---- parity ----------------------------------------------------------------------------------------------------------


@EVERY_TYPE
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size: int, types: tuple[torch.dtype, torch.dtype], device: str) -> None:
    for rule in RULES if size <= 1000 else ("amsgrad, adamw", "centered, momentum", "adagrad, decay"):
        tasks = 3 if size <= 1000 else 2
        state = begin(RULES[rule], [(size,)], tasks, [types], seed=size)
        check(rule, state, gradients(state, tasks), device, task_weights=weights_of(tasks), square_decay=0.9)


@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 5, 6, 7, 8, 20, 33])
def test_numbers_of_tasks(tasks: int, device: str) -> None:
    for rule in RULES:
        state = begin(RULES[rule], [(257,), (3, 11)], tasks)
        present = torch.tensor([t % 5 != 2 for t in range(tasks)])
        check(rule, state, gradients(state, tasks), device, task_weights=weights_of(tasks))
        check(rule, state, gradients(state, tasks), device, task_weights=weights_of(tasks), present=present)


def unequal(count: int) -> list[tuple[int, ...]]:
    """Most tiny, some empty, one large, of one dimension or three, or none."""
    shapes: list[tuple[int, ...]] = [(), (0,), (1,), (3, 0, 2), (7,), (2, 3, 5), (64,), (33, 9)]
    chosen = [shapes[(5 * p + 3) % len(shapes)] for p in range(count)]
    chosen[count // 2] = (3_000 if count >= 100 or emulated() else 40_001,)
    return chosen


@pytest.mark.parametrize("count", [1, 10, 200])
@EVERY_KIND
def test_many_tensors_of_mixed_sizes_and_types(rule: str, count: int, device: str) -> None:
    """In one call, and each by itself: the same bits, but for sums over a tensor. 200, of five types: more than a small
    table of a CUDA kernel holds."""
    state = begin(RULES[rule], unequal(count), 3, TYPES)
    jacobians = gradients(state, 3)
    got = check(rule, state, jacobians, device, task_weights=weights_of(3)).to("cpu").named()
    for p in range(0, count, 1 if count < 100 else 23):
        moments = {n: lists[p : p + 1] for n, lists in state.moments.items()}
        buffers, squares = state.buffers[p : p + 1], state.squares[p : p + 1]
        part = State(state.parameters[p : p + 1], moments, buffers, state.steps[p : p + 1], squares)
        alone = step(rule, part, jacobians[p : p + 1], device, task_weights=weights_of(3))
        for name, tensor in alone.named().items():
            other = got[name.replace("[0]", f"[{p}]", 1)]
            same = (
                torch.allclose(tensor, other, rtol=1e-6) if name.startswith("squares") else torch.equal(tensor, other)
            )
            assert same, (name, p)


def test_more_columns_than_a_share(device: str) -> None:
    """Shares of 32,768 columns and more begin and end inside of tensors; sums are put together from them."""
    sizes = [(20_000,), (40_000,), (1,), (33_000,)] if device != "cuda" else [(200_000,), (1,), (3_000_000,)]
    state = begin(RULES["adam, decay"], sizes, 2)
    check("adam, decay", state, gradients(state, 2), device, task_weights=weights_of(2), square_decay=0.5)


def test_nothing_to_do(device: str) -> None:
    ops.adatask_adam([], [], [], [], [])
    ops.adatask_rmsprop([], [], [], [])
    ops.adatask_adagrad([], [], [], [])
    for rule in KINDS:
        for shapes in ([(0,)], [(0, 3), (2, 0)]):
            state = begin(RULES[rule], shapes, 3)
            after = check(rule, state, gradients(state, 3), device)
            assert torch.equal(after.steps[0].cpu(), state.steps[0] + 1)


@pytest.mark.parametrize("rate", [0.05, torch.tensor(0.05), torch.tensor([0.05], dtype=torch.float64)], ids=type)
def test_learning_rate_as_number_or_tensor(rate: Any, device: str) -> None:
    for rule in KINDS:
        state = begin(RULES[rule], [(40,)], 3)
        jacobians = gradients(state, 3)
        after = state.to(device)
        call(ops, RULES[rule], after, [j.to(device) for j in jacobians], lr=rate)
        want = step(rule, state, jacobians, device, lr=float(rate))
        assert_same(after, want)
        if device == "cuda" and isinstance(rate, Tensor):
            after = state.to(device)
            call(ops, RULES[rule], after, [j.to(device) for j in jacobians], lr=rate.to(device))
            assert_same(after, want)
        check(rule, state, jacobians, device, lr=float(rate))


def test_learning_rate_of_zero_moves_nothing_but_moments(device: str) -> None:
    for rule in KINDS:
        state = begin(RULES[rule], [(40,)], 3, squares=False)
        after = check(rule, state, gradients(state, 3), device, lr=0.0) if not state.buffers else None
        after = after or step(rule, state, gradients(state, 3), device, lr=0.0)
        assert torch.equal(after.parameters[0].cpu(), state.parameters[0])
        assert not torch.equal(
            after.moments[RULES[rule].moments[0]][0][0].cpu(), state.moments[RULES[rule].moments[0]][0][0]
        )


def test_first_step(device: str) -> None:
    """From moments of zero, of which Adam makes a step of the learning rate in the direction of the sign."""
    for rule in RULES:
        state = begin(RULES[rule], [(100,)], 3)
        for tensor in [*state.steps, *(m for lists in state.moments.values() for row in lists for m in row)]:
            tensor.zero_()
        check(rule, state, gradients(state, 3), device)
    state = begin(Rule("adam", RULES["adam"].moments, {"lr": 0.5, "eps": 0.0}), [(100,)], 1, [TYPES[-1]], squares=False)
    for tensor in [*state.steps, *(m for lists in state.moments.values() for row in lists for m in row)]:
        tensor.zero_()
    before, jacobians = state.parameters[0].clone(), gradients(state, 1)
    call(ops, Rule("adam", (), {"lr": 0.5, "eps": 0.0}), state, jacobians)
    assert (state.parameters[0] - (before - 0.5 * jacobians[0][0].sign())).abs().max() <= 1e-14


@pytest.mark.parametrize("count", [1.0, 10.0, 1000.0, 1e6, 2.0**24 - 2])
def test_large_step_counts(count: float, device: str) -> None:
    for rule in ("adam", "amsgrad", "adagrad, decay"):
        state = begin(RULES[rule], [(100,)], 3)
        state.steps[0] = torch.tensor([count, 0.0, count / 2])
        check(rule, state, gradients(state, 3), device)


def test_thousand_small_steps(device: str) -> None:
    """Moments and average squares stay with those of a float64 run: no error grows with the number of steps."""
    rule, tasks = RULES["adam"], 2
    state = begin(rule, [(20,)], tasks)
    for tensor in [*state.steps, *state.squares]:
        tensor.zero_()
    single = state.to(device)
    want = state
    for k in range(300 if emulated() else 1000):
        jacobians = gradients(state, tasks, seed=k % 13)
        want = exact(rule, want, jacobians, square_decay=0.95, lr=1e-5).state
        call(ops, rule, single, [j.to(device) for j in jacobians], square_decay=0.95, lr=1e-5)
    got = single.to("cpu").named()
    for name, right in want.named().items():
        largest = float(right.abs().max())
        # Of a moment, the errors of the last 1 / (1 - beta) steps; a parameter of size one rounds a thousand times.
        tolerance = 1000 * 2.0**-25 if name.startswith("parameters") else 2e-6
        assert (got[name].double() - right).abs().max() <= tolerance * largest, name


# ---- tasks -----------------------------------------------------------------------------------------------------------


@EVERY_RULE
@pytest.mark.parametrize("present", [[False] * 3, [True, False, True], [False, False, True], [True] * 3], ids=str)
def test_absent_tasks_keep_everything(present: list[bool], rule: str, device: str) -> None:
    """A gradient that is NaN or infinite does not matter there; average squares of theirs decay."""
    state = begin(RULES[rule], [(50,), (3, 4)], 3, TYPES[:2])
    jacobians = gradients(state, 3)
    mask = torch.tensor(present)
    check(rule, state, jacobians, device, present=mask, square_decay=0.9)
    spoiled = [j.clone() for j in jacobians]
    for j in spoiled:
        j[~mask] = torch.nan
        j[~mask, ..., 0] = torch.inf
    after, other = (step(rule, state, j, device, present=mask, square_decay=0.9) for j in (jacobians, spoiled))
    assert_same(after, other)
    for p in range(2):
        for t in range(3):
            if present[t]:
                continue
            assert all(torch.equal(after.moments[n][p][t], state.moments[n][p][t]) for n in RULES[rule].moments)
            assert after.steps[p][t] == state.steps[p][t]
            assert float(after.squares[p][t]) == pytest.approx(0.9 * float(state.squares[p][t]), rel=1e-14)
    if not any(present) and not (state.buffers or RULES[rule].settings.get("decoupled")):
        assert all(torch.equal(a, b) for a, b in zip(after.parameters, state.parameters))


def test_a_task_that_was_never_there(device: str) -> None:
    """No step of it: a bias correction of 1 - b^0 = 0, which must not meet its zeros."""
    for rule in RULES:
        state = begin(RULES[rule], [(50,)], 3)
        state.steps[0][1] = 0.0
        for n in RULES[rule].moments:
            state.moments[n][0][1].zero_()
        state.squares[0][1] = 0.0
        for k in range(3):
            mask = torch.tensor([True, False, k != 1])
            state = check(rule, state, gradients(state, 3, seed=k), device, present=mask).to("cpu")
        assert state.steps[0][1] == 0
        assert state.squares[0][1] == 0
        # And when it comes at last, its first step is that of a task that begins.
        check(rule, state, gradients(state, 3, seed=9), device, present=torch.tensor([False, True, False]))


@EVERY_RULE
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_stay_with_their_task_and_element(bad: float, rule: str, device: str) -> None:
    for size, at, types in ((1, 0, SINGLE), (33, 32, HALF), (1000, 511, SINGLE)):
        state = begin(RULES[rule], [(size,), (5,)], 3, [types])
        jacobians = gradients(state, 3)
        clean = step(rule, state, jacobians, device)
        jacobians[0][1, at] = bad
        got = step(rule, state, jacobians, device)
        for name, tensor in got.named().items():
            right = clean.named()[name]
            if name in ("parameters[0]", "buffers[0]") or (name.endswith("[0][1]") and "[0][1]" in name):
                # AdaGrad and RMSProp of an infinite gradient: infinite over infinite.
                if name.startswith(("parameters", "buffers")):
                    assert tensor[at].isnan(), name
                else:
                    assert not tensor[at].isfinite(), name
                mask = torch.arange(size) != at
                assert torch.equal(tensor[mask], right[mask]), name
            elif name == "squares[0]":
                assert tensor[1].isnan()
                assert torch.equal(tensor[[0, 2]], right[[0, 2]])
            else:
                assert torch.equal(tensor, right), name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_parameter_that_is_not_finite_spoils_no_moments(bad: float, device: str) -> None:
    """Without weight decay, which nothing times infinity would make NaN."""
    for rule in ("adam", "amsgrad, adamw", "rmsprop", "adagrad"):
        state = begin(RULES[rule], [(300,)], 2)
        clean = step(rule, state, gradients(state, 2), device)
        state.parameters[0][7] = bad
        got = step(rule, state, gradients(state, 2), device)
        assert torch.equal(got.parameters[0].isfinite(), torch.arange(300) != 7)
        got.parameters[0][7] = clean.parameters[0][7]
        assert_same(got, clean, rule)


def test_a_variance_of_zero_may_round_below(device: str) -> None:
    """Centered: of gradients that are always the same, whose mean square less squared mean is noise."""
    rule = Rule("rmsprop", RULES["centered"].moments, {"lr": 0.02, "alpha": 0.75})
    for types in (SINGLE, HALF):
        state = begin(rule, [(2000,)], 1, [types], squares=False)
        values = normal(1, 2000)
        state.moments["grad_avgs"][0][0].copy_(values)
        state.moments["square_avgs"][0][0].copy_(state.moments["grad_avgs"][0][0].double().square() * (1 - 2.0**-20))
        jacobian = state.moments["grad_avgs"][0][0].float()[None]
        for module in (ops, reference):
            after = state.to(device)
            call(module, rule, after, [jacobian.to(device)])
            assert after.parameters[0].isfinite().all()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-20, 1e-10, 1e10, 1e18])
def test_sizes_of_gradients(size: float, device: str) -> None:
    """Squares of 1e-60 underflow in float32, to no harm; those of 1e+36 are still there."""
    for rule in RULES:
        for types in (SINGLE, HALF):
            state = begin(RULES[rule], [(65,)], 3, [types])
            for lists in state.moments.values():
                for moment in lists[0]:
                    moment.mul_(min(size, 1.0)).mul_(min(size, 1.0))
            check(rule, state, gradients(state, 3, size=size), device, task_weights=weights_of(3))


def test_weights_multiply_the_update_and_nothing_else(device: str) -> None:
    for rule in RULES:
        state = begin(RULES[rule], [(50,)], 3)
        jacobians = gradients(state, 3)
        plain, ones = step(rule, state, jacobians, device), step(rule, state, jacobians, device, task_weights=[1.0] * 3)
        assert_same(plain, ones)
        other = step(rule, state, jacobians, device, task_weights=[2.0, 0.0, -1.0])
        for n in RULES[rule].moments:
            assert all(torch.equal(a, b) for a, b in zip(plain.moments[n][0], other.moments[n][0]))
        gain = (1 - 0.99) * torch.tensor([4.0, 0.0, 1.0], dtype=torch.float64)
        had = plain.squares[0] - 0.99 * state.squares[0]
        assert torch.allclose(other.squares[0], 0.99 * state.squares[0] + gain / (1 - 0.99) * had, rtol=1e-6)
        check(rule, state, jacobians, device, task_weights=[2.0, 0.0, -1.0])


# ---- average squared updates -----------------------------------------------------------------------------------------


@EVERY_RULE
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_average_squares_are_of_each_tasks_own_update(decay: float, rule: str, device: str) -> None:
    """The update by itself: what the parameter does from zero if the task is the only one present, without decay."""
    settings = {n: v for n, v in RULES[rule].settings.items() if n not in ("weight_decay", "momentum")}
    plain = RULES[rule]._replace(settings=settings)
    state = begin(plain, [(3000,), (7,)], 3)
    for tensor in [*state.parameters, *state.buffers]:
        tensor.zero_()
    jacobians, weights = gradients(state, 3), weights_of(3)
    after = state.to(device)
    call(ops, plain, after, [j.to(device) for j in jacobians], task_weights=weights, square_decay=decay)
    for t in range(3):
        alone = state.to(device)
        mask = torch.arange(3, device=device) == t
        call(ops, plain, alone, [j.to(device) for j in jacobians], task_weights=weights, present=mask)
        for p, parameter in enumerate(alone.parameters):
            want = decay * state.squares[p][t] + (1 - decay) * parameter.cpu().double().square().sum()
            assert float(after.squares[p][t]) == pytest.approx(float(want), rel=1e-6)


def test_average_squares_change_nothing_else(device: str) -> None:
    for rule in RULES:
        state = begin(RULES[rule], [(300,), (7,)], 3)
        jacobians = gradients(state, 3)
        counted = step(rule, state, jacobians, device)
        state.squares = []
        plain = step(rule, state, jacobians, device)
        counted.squares = []
        assert_same(plain, counted)


# ---- layouts ---------------------------------------------------------------------------------------------------------

GUARD = 7.0


def _padded(t: Tensor, dim: int) -> Tensor:
    """Beside a neighbour."""
    return torch.cat([t, torch.full_like(t, GUARD)], dim).narrow(dim, 0, t.shape[dim])


def _offset(t: Tensor) -> Tensor:
    return torch.cat([t.new_full((1,), GUARD), t.reshape(-1), t.new_full((3,), GUARD)])[1:-3].view(t.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: t.clone(memory_format=torch.contiguous_format),
    "sliced": lambda t: _padded(t, -1),
    "sliced rows": lambda t: _padded(t, -4),
    "every other": lambda t: torch.stack([t, torch.full_like(t, GUARD)], -1)[..., 0],
    "transposed": lambda t: t.mT.contiguous().mT,
    "permuted": lambda t: t.movedim(-2, 0).contiguous().movedim(0, -2),
    "channels_last": lambda t: t.movedim(-3, -1).contiguous().movedim(-1, -3),
    "channels_last, offset": lambda t: _offset(t.movedim(-3, -1).contiguous()).movedim(-1, -3),
    "offset": _offset,
}
OF_JACOBIANS: dict[str, Callable[[Tensor], Tensor]] = {
    **LAYOUTS,
    "tasks last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "every other row": lambda t: torch.stack([t, torch.full_like(t, GUARD)], 1).flatten(0, 1)[::2],
    "flipped": lambda t: torch.stack(list(t)[::-1]).as_strided(t.shape, t.stride()).flip(0),
    "one row": lambda t: t[:1].expand_as(t),
    "one number": lambda t: t[:1, :1, :1, :1, :1].expand_as(t),
}


def around(tensor: Tensor) -> Tensor:
    """The elements of the memory behind a view that are not in the view."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    inside = torch.zeros(size, dtype=torch.bool, device=tensor.device)
    inside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())[~inside]


def lay(state: State, parameters: str, moments: str) -> State:
    laid = state.map(LAYOUTS[moments])
    laid.parameters = [LAYOUTS[parameters](q) for q in state.parameters]
    return laid


@pytest.mark.parametrize("types", [SINGLE, HALF, TYPES[2]], ids=lambda pair: f"{NAMES[pair[0]]}-{NAMES[pair[1]]}")
@EVERY_KIND
def test_layouts(rule: str, types: tuple[torch.dtype, torch.dtype], device: str) -> None:
    """The results of dense tensors in any layout, written where the tensors lie and nowhere else."""
    state = begin(RULES[rule], [(2, 3, 5, 4)], 3, [types]).to(device)
    jacobians = [j.to(device) for j in gradients(state.to("cpu"), 3)]
    cases = [(name, name, name) for name in LAYOUTS]
    cases += [(name, "dense", "dense") for name in LAYOUTS] + [("channels_last", name, name) for name in LAYOUTS]
    cases += [("dense", name, "dense") for name in LAYOUTS]
    cases += [(name, "dense", other) for name in ("dense", "channels_last") for other in OF_JACOBIANS]
    for parameters, moments, rows in cases:
        laid, given = lay(state, parameters, moments), [OF_JACOBIANS[rows](j) for j in jacobians]
        want = state.clone()
        call(ops, RULES[rule], want, [g.contiguous() for g in given])
        before = [(t, around(t).clone()) for t in (*laid.parameters, *laid.buffers, *_moments(laid))]
        copies = [(g, g.clone()) for g in given]
        where = [(t, t.data_ptr(), t.stride()) for t, _ in before]
        call(ops, RULES[rule], laid, given)
        for t, outside in before:
            assert torch.equal(around(t), outside), (parameters, moments, rows)
        assert all(torch.equal(g, c) for g, c in copies)
        assert all(t.data_ptr() == at and t.stride() == stride for t, at, stride in where)
        assert torch.allclose(laid.squares[0], want.squares[0], rtol=1e-6)
        laid.squares, want.squares = [], []
        assert_same(laid, want, f"{parameters}, {moments}, {rows}")


def _moments(state: State) -> list[Tensor]:
    return [m for lists in state.moments.values() for row in lists for m in row]


@pytest.mark.parametrize("size", [1, 5, 33, 1000])
def test_unaligned(size: int, device: str) -> None:
    """Any of the tensors at an address that is no multiple of a vector's: the same bits."""
    for types in TYPES:
        state = begin(RULES["centered, momentum"], [(size,)], 2, [types]).to(device)
        jacobians = [j.to(device) for j in gradients(state.to("cpu"), 2)]
        want = state.clone()
        call(ops, RULES["centered, momentum"], want, jacobians)
        for moved in range(5):
            laid = state.clone()
            given = [_offset(j) if moved == 0 else j for j in jacobians]
            if moved == 1:
                laid.parameters = [_offset(q) for q in laid.parameters]
            elif moved == 2:
                laid.buffers = [_offset(b) for b in laid.buffers]
            elif moved > 2:
                row = laid.moments[("square_avgs", "grad_avgs")[moved - 3]][0]
                row[1] = _offset(row[1])
            call(ops, RULES["centered, momentum"], laid, given)
            assert torch.allclose(laid.squares[0], want.squares[0], rtol=1e-6)
            laid.squares = want.squares
            assert_same(laid, want, f"{types} {moved}")
            assert all((around(t) == GUARD).all() for t in (*laid.parameters, *laid.buffers, *_moments(laid), *given))


# ---- the same bits ---------------------------------------------------------------------------------------------------


@EVERY_KIND
def test_threads_do_not_change_a_bit(rule: str) -> None:
    state = begin(RULES[rule], [(70_000,), (333,), (50_000,)], 2, [SINGLE, HALF])
    jacobians = gradients(state, 2)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(step(rule, state, jacobians, keys=[1, 2, 3]))
    finally:
        torch.set_num_threads(threads)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@EVERY_KIND
def test_same_bits_every_time(rule: str, device: str) -> None:
    """A training resumed from a copy of its state goes on as it would have."""
    state = begin(RULES[rule], [(3000,), (33,)], 2, [HALF, TYPES[3]])
    results = []
    for _ in range(2):
        now = state
        for k in range(2):
            now = step(rule, now, gradients(state, 2, seed=k), device, keys=[5, 6])
        results.append(now)
    assert_same(results[1], results[0])


# ---- stochastic rounding ---------------------------------------------------------------------------------------------


def neighbours(value: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 numbers below and above float64 numbers, in float64; the same where it is one."""
    nearest = value.bfloat16()
    bits = nearest.view(torch.int16)
    away = torch.where(nearest == 0, torch.where(value > 0, 1, -32767), bits + 1).short().view(torch.bfloat16).double()
    toward = (bits - 1).view(torch.bfloat16).double()
    near = nearest.double()
    other = torch.where(value.abs() > near.abs(), away, toward)
    other = torch.where(value == near, near, other)
    return torch.minimum(near, other), torch.maximum(near, other)


@EVERY_RULE
def test_stochastic_rounding_goes_to_a_neighbour_without_bias(rule: str, device: str) -> None:
    """All moments of many elements, with several keys from the same state: the mean error is zero, and every choice has
    the probability that makes it so."""
    size, tasks = (4000, 2) if device == "cpu" else (100_000, 2)
    state = begin(RULES[rule], [(size,)], tasks, [HALF])
    jacobians = gradients(state, tasks)
    errors: dict[str, list[Tensor]] = {}
    for key in range(4):
        found = exact(RULES[rule], state, jacobians)
        want, terms = found.state.named(), found.terms
        got = step(rule, state, jacobians, device, keys=[key * 977 - 5])
        for name, tensor in got.named().items():
            if tensor.dtype != torch.bfloat16:
                continue
            below, above = neighbours(want[name])
            # In float32 a number may lie on the other side of a bfloat16 one.
            slack, value = 2.0**-21 * terms[name], tensor.double()
            lowest, highest = neighbours(want[name] - slack)[0], neighbours(want[name] + slack)[1]
            assert ((value >= lowest) & (value <= highest)).all(), name
            inside = above > below
            share = ((want[name] - below) / (above - below))[inside]
            up = ((value - below) / (above - below))[inside]
            sigma = (share * (1 - share)).clamp_min(1e-12).sqrt()
            errors.setdefault(name, []).append((up - share) / sigma.pow(2).mean().sqrt())
    for name, all_ in errors.items():
        z = torch.cat(all_)
        assert abs(float(z.mean())) <= 5 / math.sqrt(len(z)), name
        # Its variance, too: of independent choices.
        assert abs(float(z.square().mean()) - 1) <= 0.1, name


@EVERY_RULE
def test_kernel_and_reference_round_alike(rule: str, device: str) -> None:
    """The same random bits for every element; only an ulp of the float32 number may tip the scale."""
    for types in ([HALF], [TYPES[3]], [SINGLE, TYPES[3], HALF]):
        state = begin(RULES[rule], [(3, 700), (90,), (80,)], 3, types)
        jacobians, keys = gradients(state, 3), [7, 2**40 + 12345, -(2**62)]
        got = step(rule, state, jacobians, device, keys=keys, task_weights=weights_of(3))
        eager = state.clone()
        call(reference, RULES[rule], eager, jacobians, keys=keys, task_weights=weights_of(3))
        for name, tensor in got.named().items():
            if tensor.dtype != torch.bfloat16:
                continue
            other = eager.named()[name]
            different = int((tensor != other).sum())
            # An ulp is 2^-16 of the gap between bfloat16 numbers; of the errors, a few.
            assert different <= 2 + 8 * 2.0**-16 * tensor.numel() * 16, (name, different)
        check(rule, state, jacobians, device, keys=keys)


@pytest.mark.parametrize("parameters", list(LAYOUTS))
@pytest.mark.parametrize("moments", ["dense", "channels_last", "sliced"])
def test_kernel_and_reference_count_elements_alike(parameters: str, moments: str, device: str) -> None:
    for rule in ("adam", "momentum"):
        state = lay(begin(RULES[rule], [(4, 3, 5, 8)], 2, [HALF]), parameters, moments)
        jacobians = gradients(state, 2)
        if device == "cuda":
            got = lay(begin(RULES[rule], [(4, 3, 5, 8)], 2, [HALF]).to(device), parameters, moments)
            call(ops, RULES[rule], got, [j.to(device) for j in jacobians], keys=[3])
        else:
            got = lay(begin(RULES[rule], [(4, 3, 5, 8)], 2, [HALF]), parameters, moments)
            call(ops, RULES[rule], got, jacobians, keys=[3])
        call(reference, RULES[rule], state, jacobians, keys=[3])
        for a, b in zip(_moments(got) + got.buffers, _moments(state) + state.buffers):
            assert int((a.cpu() != b).sum()) <= 2, rule


def test_exact_values_stay(device: str) -> None:
    """What bfloat16 has is not rounded, whatever the random bits: moments that a step multiplies by powers of two."""
    rule = Rule("adam", RULES["adam"].moments, {"betas": (0.5, 0.5), "lr": 0.1})
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    values = values[(values.abs() > 1e-30) & (values.abs() < 1e30)]
    values = values[:: 1 if device == "cpu" else 7]
    state = State(
        [torch.zeros(len(values))],
        {"exp_avgs": [[values.clone()]], "exp_avg_sqs": [[values.abs()]]},
        [],
        [torch.ones(1)],
    ).to(device)
    call(ops, rule, state, [torch.zeros(1, len(values), device=device)], keys=[1])
    assert torch.equal(state.moments["exp_avgs"][0][0].cpu(), values / 2)
    assert torch.equal(state.moments["exp_avg_sqs"][0][0].cpu(), values.abs() / 2)
    zeros = begin(RULES["momentum"], [(500,)], 2, [HALF])
    for tensor in [*zeros.buffers, *_moments(zeros)]:
        tensor.zero_()
    after = step("momentum", zeros, [torch.zeros(2, 500)], device, keys=[1])
    assert all((t == 0).all() for t in (*after.buffers, *_moments(after)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rounding_keeps_nan_and_infinity(bad: float, device: str) -> None:
    for rule in KINDS:
        state = begin(RULES[rule], [(400,)], 2, [HALF])
        jacobians = gradients(state, 2)
        jacobians[0][1, ::3] = bad
        got, eager = step(rule, state, jacobians, device, keys=[11]), state.clone()
        call(reference, RULES[rule], eager, jacobians, keys=[11])
        for name, tensor in got.named().items():
            other = eager.named()[name]
            assert torch.equal(tensor.isnan(), other.isnan()), name
            assert torch.equal(tensor.isinf(), other.isinf()), name
            if name.endswith("[0][1]"):
                assert not tensor[::3].isfinite().any()
                assert tensor[1::3].isfinite().all()


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC0FFFF, 0x7F800001, -0x7F0001])
def test_rounding_keeps_every_nan(bits: int, device: str) -> None:
    """Also those whose lower bits would carry, of all ones to minus zero."""
    jacobian = torch.full((1, 400), bits, dtype=torch.int32).view(torch.float32).to(device)
    assert jacobian.isnan().all()
    for rule in KINDS:
        state = begin(RULES[rule], [(400,)], 1, [HALF]).to(device)
        call(ops, RULES[rule], state, [jacobian], keys=[11])
        assert all(m.isnan().all() for m in (*_moments(state), *state.buffers, *state.parameters)), rule


def test_all_numbers_round_as_their_bits_say() -> None:
    """The helper by itself, for all upper halves and some lower ones: up exactly if the lower half and the random bits
    carry."""
    upper = torch.arange(2**16).repeat_interleave(4)
    lower = torch.tensor([0, 1, 0x8000, 0xFFFF]).repeat(2**16)
    whole = upper * 2**16 + lower
    value = torch.where(whole >= 2**31, whole - 2**32, whole).int().view(torch.float32)
    for bits in (0, 1, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF):
        got = round_stochastically(value, torch.full_like(whole, bits))
        want = upper + (lower + bits >= 2**16)
        number = ~value.isnan()
        assert torch.equal(got.isnan(), ~number | _nan(want))
        assert torch.equal(got.view(torch.int16).long()[number] & 0xFFFF, want[number])


def _nan(upper: Tensor) -> Tensor:
    return (upper & 0x7FFF) > 0x7F80


def test_random_bits_of_keys_tasks_steps_and_elements_are_independent(device: str) -> None:
    size, tasks = 4096, 3
    # Moments between two bfloat16 numbers after the step: 1.0039 times 0.8, and times 0.95.
    rule = Rule("adam", RULES["adam"].moments, {"betas": (0.8, 0.95), "lr": 0.0})

    def choices(key: int, count: float) -> Tensor:
        moments = {n: [[torch.ones(size).bfloat16() for _ in range(tasks)]] for n in rule.moments}
        state = State([torch.zeros(size)], moments, [], [torch.full((tasks,), count)]).to(device)
        call(ops, rule, state, [torch.zeros(tasks, size, device=device)], keys=[key])
        rounded = torch.stack([torch.stack(state.moments[n][0]) for n in rule.moments]).cpu().double()
        exactly = torch.tensor([0.8, 0.95], dtype=torch.float64)[:, None, None]
        return (rounded - exactly) / (rounded - exactly).square().mean().sqrt()

    streams: dict[str, Tensor] = {}
    for key in (0, 1, 2, 2**32, 2**33, -1):
        for count in (0.0, 1.0, 5.0):
            found = choices(key, count)
            streams |= {f"{key} {count} {m} {t}": found[m, t] for m in range(2) for t in range(tasks)}
    z = torch.stack(list(streams.values()))
    limit = 5.5 / math.sqrt(size)  # of thousands of pairs
    assert z.mean(1).abs().max() <= limit
    products = z @ z.mT / size
    assert (products - products.diagonal().diag()).abs().max() <= limit
    for lag in (1, 2, 3, 4, 8, 16, 32, 256, 1024):
        assert (z[:, lag:] * z[:, :-lag]).mean(1).abs().max() <= limit * 1.2


def test_an_average_of_bfloat16_converges_only_with_stochastic_rounding(device: str) -> None:
    """Of beta2 = 0.999 each step moves it by less than half a gap, long before it is there."""
    rule = Rule("adam", RULES["adam"].moments, {"betas": (0.9, 0.999), "lr": 0.0})
    size, steps = 512, 1000 if emulated() or device == "cuda" else 3000

    def end(keys: list[int] | None) -> Tensor:
        moments = {n: [[torch.zeros(size).bfloat16()]] for n in rule.moments}
        state = State([torch.zeros(size)], moments, [], [torch.zeros(1)]).to(device)
        ones = torch.ones(1, size, device=device)
        for _ in range(steps):
            call(ops, rule, state, [ones], keys=keys)
        return state.moments["exp_avg_sqs"][0][0].cpu().double()

    want = 1 - 0.999**steps
    rounded = end([9])
    assert abs(float(rounded.mean()) - want) <= 0.01 * want
    assert float(end(None).mean()) < 0.6 * want


def test_keys_matter_only_to_bfloat16_moments(device: str) -> None:
    for rule in KINDS:
        for types in (SINGLE, TYPES[2], TYPES[4]):
            state = begin(RULES[rule], [(100,)], 2, [types])
            jacobians = gradients(state, 2)
            assert_same(step(rule, state, jacobians, device, keys=[3]), step(rule, state, jacobians, device))
        state = begin(RULES[rule], [(100,)], 2, [HALF])
        with_keys, without = (step(rule, state, gradients(state, 2), device, keys=k) for k in ([3], None))
        # The parameter's step comes before the rounding, also that of a buffer.
        assert torch.allclose(with_keys.parameters[0], without.parameters[0], rtol=1e-6, atol=1e-6)
        assert torch.allclose(with_keys.squares[0], without.squares[0], rtol=1e-6)


# ---- calls -----------------------------------------------------------------------------------------------------------


@EVERY_RULE
def test_without_kernels_the_reference_serves(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit what the reference does, on a device that no kernel was built for."""
    for lr in (0.02, torch.tensor(0.02)):
        for options in ({}, {"present": torch.tensor([True, False, True]), "keys": [1, 2, 3, 4], "square_decay": 0.5}):
            state = begin(RULES[rule], [(4, 5), (2, 3, 4, 5), (0, 2), ()], 3, TYPES)
            jacobians, want = gradients(state, 3), state.clone()
            call(reference, RULES[rule], want, jacobians, task_weights=weights_of(3), lr=float(lr), **options)
            with monkeypatch.context() as patch:
                patch.setitem(_native.KERNELS, "cpu", None)
                call(ops, RULES[rule], state, jacobians, task_weights=weights_of(3), lr=lr, **options)
            assert_same(state, want)


@EVERY_KIND
def test_learning_rate_on_the_device(rule: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Handed to the kernel as a tensor, as under torch.compile and on CUDA."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        lr = torch.tensor(0.03125, dtype=dtype, device=device)
        state = begin(RULES[rule], [(40,), (3,)], 3)
        jacobians = [j.to(device) for j in gradients(state, 3)]
        number, tensor = state.to(device), state.to(device)
        call(ops, RULES[rule], number, jacobians, lr=0.03125)
        with monkeypatch.context() as patch:
            patch.setattr("torch.compiler.is_compiling", lambda: True)
            call(ops, RULES[rule], tensor, jacobians, lr=lr)
        assert_same(tensor, number)


def test_as_many_tasks_as_a_kernel_takes(device: str) -> None:
    """64 on a device, any number on the host; one more is refused before anything is changed, or done right."""
    for tasks in (64, 65):
        for rule in ("amsgrad", "adagrad"):
            state = begin(RULES[rule], [(5,)], tasks)
            jacobians, want = gradients(state, tasks), state.to(device)
            got = state.to(device)
            try:
                call(ops, RULES[rule], got, [j.to(device) for j in jacobians])
            except (RuntimeError, ValueError) as error:
                assert tasks == 65
                assert re.match(r"adatask.*64 tasks", str(error))  # noqa: PT017
                assert_same(got, want)
                continue
            right = exact(RULES[rule], state, jacobians).state.parameters[0]
            assert (got.parameters[0].cpu() - right).abs().max() < 1e-4


def test_keys_may_be_any_number_of_64_bits(device: str) -> None:
    """One that differs in any of its bits gives other decisions."""
    state = begin(RULES["adam"], [(400,)], 1, [TYPES[1]])
    jacobians = [j.to(device) for j in gradients(state, 1)]
    seen = []
    for key in (0, 1, 2**31, 2**32, 2**62, -1, -(2**62), 2**63 - 1):
        got, eager = state.to(device), state.clone()
        call(ops, RULES["adam"], got, jacobians, **on({"keys": [key]}, device))
        call(reference, RULES["adam"], eager, gradients(state, 1), keys=[key])
        assert (got.moments["exp_avgs"][0][0].cpu() != eager.moments["exp_avgs"][0][0]).sum() <= 2
        seen.append(got.moments["exp_avgs"][0][0].cpu())
    for i, a in enumerate(seen):
        assert all((a != b).float().mean() > 0.1 for b in seen[:i])


def test_calls_do_not_share_anything(device: str) -> None:
    """Two optimizers in turn, as if each were alone."""
    one, two = (begin(RULES["momentum"], [(50,)], 2, seed=s).to(device) for s in (1, 2))
    alone = [one.clone(), two.clone()]
    jacobians = [normal(3, 2, 50).float().to(device)]
    for state in alone:
        for _ in range(2):
            call(ops, RULES["momentum"], state, jacobians)
    for _ in range(2):
        for state in (one, two):
            call(ops, RULES["momentum"], state, jacobians)
    assert_same(one, alone[0])
    assert_same(two, alone[1])
