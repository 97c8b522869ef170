"""The two-task landscape of CAGrad (Liu et al., NeurIPS 2021, arXiv 2110.14048), as Nash-MTL and Aligned-MTL run it.

Two parameters, two losses. Below the axis they are bowls with their minima 14 apart, and the Pareto front runs between
these. Above it each has a narrow, curved valley whose floor falls gently and whose walls are steep: there the tasks'
gradients oppose each other and differ in length by orders of magnitude, so their sum bounces between walls. Starts and
optimizer (Adam at a learning rate of 1e-3, 35,000 steps) are Nash-MTL's (Navon et al., ICML 2022, arXiv 2202.01017),
which Aligned-MTL takes over (Senushkin et al., CVPR 2023, arXiv 2305.19000, section 5).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops.align import Scale

STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
REACHED = 0.1  #: distance in loss space up to which an optimum counts as reached; the losses span about 20
LOWEST = 5e-6  #: under the logarithm: the valleys' floors are cut off there


_SIGN = torch.tensor([1.0, -1.0])  # task 1, task 2: the landscape is the same for both, but for a reflection


def losses(x: Tensor) -> Tensor:
    """Both tasks' losses, [..., 2] -> [..., 2]."""
    a, b = x[..., :1], x[..., 1:]
    valley = (_SIGN * (b.tanh() - 3.5) - 0.5 * a).abs().clamp_min(LOWEST).log() + 6
    bowl = (a - 7 * _SIGN) ** 2 / 10 + (b + 8) ** 2 / 100 - 20
    blend = (0.5 * b).tanh()
    # Not clamps: at 0, where a trajectory starts, their derivative was 1 as here, and is 0 from torch 2.14.
    return valley * blend.where(blend >= 0, 0.0) - bowl * blend.where(blend <= 0, 0.0)


def optimum(preference: Sequence[float]) -> Tensor:
    """Where the sum of losses weighed by `preference` [2] is least, [2] float64.

    A dense grid, then finer ones around its best point: no gradient takes part, so descents can be judged by it.
    """
    weights = torch.tensor(preference, dtype=torch.float64)
    centre, reach = torch.zeros(2, dtype=torch.float64), 11.0
    for count in (441, 41, 41, 41, 41):
        axes = [centre[i] + torch.linspace(-reach, reach, count, dtype=torch.float64) for i in range(2)]
        grid = torch.cartesian_prod(*axes)
        centre = grid[(losses(grid) @ weights).argmin()]
        reach *= 4.0 / (count - 1)  # two cells to each side
    return centre


@functools.cache
def pareto_front(points: int = 41) -> Tensor:
    """Return all preferences' optima, [points, 2] parameters, float64; the front is convex: these are all of it."""
    return torch.stack([optimum((p, 1.0 - p)) for p in torch.linspace(0, 1, points, dtype=torch.float64).tolist()])


class Rule(NamedTuple):
    """How the tasks are weighed in a step, from the Gram matrix of their gradients."""

    title: str
    weights: Callable[[Tensor, Tensor, Scale], Tensor]  #: of Gram matrix [2, 2] and preference [2], [2], float64
    prefers: str = ""  #: what its preference is called, if it has one
    aims: bool = False  #: whether it goes for the optimum of its preference, not for any point of the Pareto front


_ONE_ORDER = torch.zeros((), dtype=torch.int64)  # of the one other task

RULES = {
    "sum": Rule("sum", lambda gram, p, scale: p, "weights", aims=True),
    "aligned": Rule("Aligned-MTL", lambda gram, p, scale: ops.align(gram, p, scale).weights, "preference", aims=True),
    "upgrad": Rule("UPGrad", lambda gram, p, scale: ops.upgrad(gram, p), "preference"),
    "dualproj": Rule("DualProj", lambda gram, p, scale: ops.dualproj(gram, p), "preference"),
    "mgda": Rule("MGDA", lambda gram, p, scale: ops.mgda(gram)),
    "cagrad": Rule("CAGrad", lambda gram, p, scale: ops.cagrad(gram), aims=True),
    "nash": Rule("Nash-MTL", lambda gram, p, scale: ops.fairgrad(gram)),
    "fairgrad": Rule("FairGrad", lambda gram, p, scale: ops.fairgrad(gram, 2.0)),
    "imtl": Rule("IMTL-G", lambda gram, p, scale: ops.imtlg(gram)),
    "pcgrad": Rule("PCGrad", lambda gram, p, scale: ops.pcgrad(gram, 0, _ONE_ORDER)),
}
WITH_PREFERENCE = tuple(name for name, rule in RULES.items() if rule.prefers)


@dataclass(frozen=True)
class Method:
    """A rule, perhaps with a preference."""

    name: str
    rule: Rule
    preference: tuple[float, float] = (1.0, 1.0)  #: what rules without one have

    @property
    def goal(self) -> tuple[float, float] | None:
        """The weights whose optimum it should reach; None: any point of the Pareto front."""
        return self.preference if self.rule.aims else None


def methods(preference: tuple[float, float], names: Sequence[str] = ("sum", "aligned")) -> list[Method]:
    """Rules by the names of `RULES`: first without a preference, then, those that can have one, with it."""
    weights, chosen = ", ".join(f"{p:g}" for p in preference), []
    for rule in map(RULES.__getitem__, names):
        chosen.append(Method(rule.title, rule))
        if rule.prefers:
            chosen.append(Method(f"{rule.title}, {rule.prefers} {weights}", rule, preference))
    return chosen


# Explored with the preference 0.7, 0.3 (Adam, float32). At 1e-3 with scale "min", Aligned-MTL is at its optimum from
# all starts after 28,000 steps, while the sum with the same weights stays in the valleys from two, also for 70,000;
# likewise at 2e-3 after 20,000. Scale "rmse" is not there after 70,000 from (-8.5, 7.5); "median" is "min" for two
# tasks. Longer steps do not follow the bend of the valleys: at 3e-3 and 5e-3, 40 / lr steps of Aligned-MTL are not
# enough from (-8.5, 7.5), and from 5e-3 on the sum leaps out of a valley by itself.
# Equal preferences and 0.3, 0.7 are reached within 35,000 steps too; 0.9, 0.1 not within 50,000 from (-8.5, 7.5).
def descend(
    chosen: Sequence[Method],
    steps: int,
    lr: float,
    scale: Scale,
    every: int,
    watch: Callable[[int], None],
    starts: Sequence[tuple[float, float]] = STARTS,
) -> Tensor:
    """Adam from all starts with all methods, float32 as published.

    Returns:
        [records, methods, starts, 2], the parameters at the start, after every `every` steps, and at the end. `watch`
        is told the number of steps made, as often.
    """
    count = len(starts)
    x = torch.tensor([starts] * len(chosen)).flatten(0, 1)
    weights = torch.tensor([m.preference for m in chosen], dtype=torch.float64).repeat_interleave(count, 0)
    rules = [(i, chosen[i // count].rule, weights[i].clone()) for i in range(len(x))]
    rules = [each for each in rules if each[1] is not RULES["sum"]]  # its weights stay as they are
    # Adam works on every number by itself: one optimizer for all is one for each.
    optimizer = torch.optim.Adam([x], lr=lr, fused=True)
    record = [x.clone()]
    for step in range(1, steps + 1):
        rows = gradients(x).double()
        grams = rows @ rows.mT  # ops.gram's, of all trajectories in one call
        for i, rule, preference in rules:
            weights[i] = rule.weights(grams[i], preference, scale)
        x.grad = (weights.unsqueeze(1) @ rows).squeeze(1).float()
        optimizer.step()
        if step % every == 0 or step == steps:
            record.append(x.clone())
            watch(step)
    return torch.stack(record).unflatten(1, (len(chosen), count))


def gradients(x: Tensor) -> Tensor:
    """[N, 2] -> [N, task, 2], both losses' gradients at every point."""
    each = x.expand(2, *x.shape).detach().requires_grad_()
    return torch.autograd.grad(losses(each).diagonal(0, 0, 2).sum(), each)[0].transpose(0, 1)


@dataclass(frozen=True)
class Outcome:
    """Where one trajectory ended."""

    method: Method
    start: tuple[float, float]
    point: tuple[float, float]
    losses: tuple[float, float]
    distance: float  #: to the optimum of the method's goal, or to the Pareto front, in loss space

    @property
    def reached(self) -> bool:
        return self.distance <= REACHED


def outcomes(chosen: Sequence[Method], ends: Tensor, starts: Sequence[tuple[float, float]] = STARTS) -> list[Outcome]:
    """Return outcomes method by method, start by start; ends is [methods, starts, 2]."""
    found = []
    for method, points in zip(chosen, ends.double(), strict=True):
        # Of the front the line through its points, which is not 0.01 from it.
        goal = losses(pareto_front() if method.goal is None else optimum(method.goal)[None])
        for start, end in zip(starts, points, strict=True):
            value = losses(end)
            point, both = (float(end[0]), float(end[1])), (float(value[0]), float(value[1]))
            found.append(Outcome(method, start, point, both, _distance(value, goal)))
    return found


def _distance(point: Tensor, line: Tensor) -> float:
    """Of a point [2] from a line through points [P, 2]."""
    first, step = line[:-1], line.diff(dim=0)
    along = ((point - first) * step).sum(1, keepdim=True) / step.square().sum(1, keepdim=True)
    nearest = torch.cat([first + along.clamp(0.0, 1.0) * step, line[-1:]])
    return float((nearest - point).norm(dim=1).min())
