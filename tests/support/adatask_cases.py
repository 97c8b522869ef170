"""AdaTask's rules for the tests of the `adatask` stem: states to begin with, one step of each rule in float64 as the
papers have it, and the bound that results must meet."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mtlgrad import ops, reference
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


def check_step(
    module: ModuleType,
    reference: ModuleType,
    rule: Rule,
    state: State,
    jacobians: Sequence[Tensor],
    device: str = "cpu",
    what: str = "",
    **options: Any,
) -> State:
    """One step of `module`, held to the rules; the state after it."""
    plain = {n: v for n, v in options.items() if n != "keys"}
    want = exact(rule, state, jacobians, **plain)
    eager, got = state.to("cpu").wide(), state.to(device)
    call(reference, rule, eager, [j.cpu().to(wider(j)) for j in jacobians], **on(plain, "cpu"))
    call(module, rule, got, [j.to(device) for j in jacobians], **on(options, device))
    assert_within_bound(got, eager, want, state, what, "keys" in options)
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
EVERY_TYPE = pytest.mark.parametrize("types", TYPES, ids=lambda pair: f"{NAMES[pair[0]]}-{NAMES[pair[1]]}")
SINGLE, HALF = (torch.float32, torch.float32), (torch.float32, torch.bfloat16)


def check(
    rule: str | Rule, state: State, jacobians: list[Tensor], device: str, what: str = "", **options: Any
) -> State:
    chosen = RULES[rule] if isinstance(rule, str) else rule
    return check_step(ops, reference, chosen, state, jacobians, device, f"{rule} {what}", **options)


def step(rule: str, state: State, jacobians: list[Tensor], device: str = "cpu", **options: Any) -> State:
    """A copy of a state after one step, on the host again."""
    after = state.to(device) if device != "cpu" else state.clone()
    call(ops, RULES[rule], after, [j.to(device) for j in jacobians], **on(options, device))
    return after.to("cpu") if device != "cpu" else after
