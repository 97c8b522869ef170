"""Figures by which multi-task methods, the gradients they meet, and the updates they lead to are compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from . import ops
from .ops.checks import check_floating, check_same_device, check_shape
from .ops.rows import AnyRows, as_real
from .optim.base import TaskOptimizer
from .optim.dominance import Layers, layer_shares


def delta_m(metrics: Sequence[float], baseline: Sequence[float], higher_is_better: Sequence[bool]) -> float:
    """Average the relative change per task against a baseline, usually single-task nets, in percent; **+ is worse**.

    .. math::
        \\Delta_m = \\frac{100}{K} \\sum_{k=1}^{K} (-1)^{\\delta_k} \\frac{M_{m,k} - M_{b,k}}{M_{b,k}}

    with :math:`\\delta_k = 1` where a higher metric is better, else 0 (Maninis et al., "Attentive Single-Tasking of
    Multiple Tasks", CVPR 2019, with the sign that multi-task papers, BayesAgg-MTL and Aligned-MTL among them, print).

    Args:
        metrics: the method's metrics, one a task (or several a task, each its own entry), length K >= 1.
        baseline: the baseline's metrics, same order, none of them zero.
        higher_is_better: for each entry True (accuracy) or False (error).

    Returns:
        The change in percent: -1.0 means one percent better than the baseline on average.

    Raises:
        ValueError: lengths differ or are 0, an entry is not finite, or a baseline is zero.
    """
    if not len(metrics) == len(baseline) == len(higher_is_better) or not len(metrics):
        raise ValueError(
            "delta_m: metrics, baseline and higher_is_better must have one entry a task, "
            f"found {len(metrics)}, {len(baseline)} and {len(higher_is_better)}"
        )
    total = 0.0
    for k, (ours, base, higher) in enumerate(zip(metrics, baseline, higher_is_better, strict=True)):
        ours, base = float(ours), float(base)
        if not math.isfinite(ours) or not math.isfinite(base):
            raise ValueError(f"delta_m: entry {k} must be finite, found {ours} against the baseline {base}")
        if base == 0.0:
            raise ValueError(f"delta_m: baseline[{k}] must not be 0: no change is relative to it; leave the task out")
        change = (ours - base) / base
        total += -change if higher else change
    return 100.0 * total / len(metrics)


def mean_rank(metrics: Sequence[Sequence[float]] | Tensor, higher_is_better: Sequence[bool]) -> list[float]:
    """Average every method's rank among the methods (1 is best) over the metrics; **- is better**.

    .. math:: \\mathrm{MR}_m = \\frac{1}{K} \\sum_{k=1}^{K} \\Bigl(\\tfrac12 + \\tfrac12 \\#\\{j : M_j = M_m\\}
        + \\#\\{j : M_j \\text{ better than } M_m\\}\\Bigr)

    with M the k-th metric of every method: equal values share the average of their ranks. The column MR of the tables
    of Nash-MTL (Navon et al., ICML 2022, arXiv 2202.01017) and Aligned-MTL (arXiv 2305.19000).

    Args:
        metrics: one row a method, each with K >= 1 metrics. Infinite ones (a run that diverged) are ranked as such.
        higher_is_better: for each metric True (accuracy) or False (error).

    Returns:
        One average rank a method, from 1 to the number of methods.

    Raises:
        ValueError: no method, no metric, rows of other lengths than ``higher_is_better``, or NaN.
    """
    count = len(higher_is_better)
    table = [[float(value) for value in row] for row in metrics]
    if not table or not count:
        raise ValueError(
            "mean_rank: metrics: expected at least one method and one metric, "
            f"found {len(table)} methods and {count} entries in higher_is_better"
        )
    for m, row in enumerate(table):
        if len(row) != count:
            raise ValueError(
                f"mean_rank: metrics: expected {count} of every method, as in higher_is_better, "
                f"found {len(row)} of method {m}"
            )
        for k, value in enumerate(row):
            if math.isnan(value):
                raise ValueError(
                    f"mean_rank: metrics: expected numbers, found NaN in metric {k} of method {m}; leave the metric or "
                    "the method out, or give the worst value there is (infinity, for an error)"
                )
    totals = [0.0] * len(table)
    for k, higher in enumerate(higher_is_better):
        costs = [-row[k] if higher else row[k] for row in table]
        for m, cost in enumerate(costs):
            totals[m] += sum(other < cost for other in costs) + (1 + costs.count(cost)) / 2
    return [total / count for total in totals]


class GradientStatistics(NamedTuple):
    """How the gradients of T tasks lie to one another: float64, on their device."""

    condition_number: Tensor  #: []: the largest singular value over the smallest; infinite if that is 0, NaN if all are
    singular_values: Tensor  #: [T], of the matrix of gradients, descending
    cosine: Tensor  #: [T, T]: of the angle between two gradients; negative where they conflict
    magnitude_similarity: Tensor  #: [T, T]: 1 for gradients of one length, towards 0 the more one outweighs the other
    norms: Tensor  #: [T], Euclidean
    update_cosine: Tensor | None = None  #: [T]: of the angle to the update; negative where that turns against the task


@torch.no_grad()
def gradient_statistics(rows: AnyRows | ops.Stacked, weights: Tensor | None = None) -> GradientStatistics:
    r"""Measure conditioning, conflict and dominance among the gradients of T tasks, each read once, none by the host.

    With g_i the gradients, and G the matrix whose columns they are,

    .. math:: \kappa = \frac{\sigma_{\max}(G)}{\sigma_{\min}(G)}, \qquad
        \cos_{ij} = \frac{\langle g_i, g_j \rangle}{\|g_i\| \|g_j\|}, \qquad
        \Phi_{ij} = \frac{2 \|g_i\| \|g_j\|}{\|g_i\|^2 + \|g_j\|^2} .

    The condition number is the stability criterion of Aligned-MTL (arXiv 2305.19000), as
    :func:`mtlgrad.ops.align` has it; cosine and magnitude similarity :math:`\Phi` are definitions 1 and 2 of PCGrad (Yu
    et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, arXiv 2001.06782). All but norms and singular
    values are unchanged when all gradients are multiplied by one positive number. With weights w, and M the Gram
    matrix,

    .. math:: \cos_t = \frac{\langle g_t, u \rangle}{\|g_t\| \|u\|} = \frac{(M w)_t}{\|g_t\| \sqrt{w^T M w}},
        \qquad u = \sum_t w_t g_t,

    says whether a step along the update goes with each task or against it.

    Args:
        rows: T rows, as in :func:`mtlgrad.ops.gram`: a tensor [T, ...], T lists of tensors, or
            ``ops.Stacked([p.jac for p in parameters])``. float32, float64, float16 or bfloat16.
        weights: w, [T], of any floating dtype, on the gradients' device: a rule's ``.weights``. Then there is
            ``update_cosine``.

    Returns:
        :class:`GradientStatistics`. They come from the Gram matrix, so that a condition number above some 1e7 says no
        more than that the gradients are dependent.

        A gradient of zero has no direction: its cosines are NaN, with itself too; its magnitude similarity is 0 with
        others, and NaN with another zero. NaN or infinity in a gradient makes its own row and column of both matrices
        NaN, its norm NaN or infinite, and condition number and singular values NaN.

        ``update_cosine`` is NaN for a gradient of zero; for all tasks, if the update is zero (or not longer than what
        rounding leaves of gradients that cancel, some 1e-8 of theirs), or if anything is not finite.

    Raises:
        RuntimeError, ValueError: as :func:`mtlgrad.ops.gram`; ``RuntimeError`` for weights that do not fit.
    """
    gram = ops.gram(rows)
    if weights is not None:
        check_floating("gradient_statistics", weights=weights)
        check_shape("gradient_statistics", "weights", weights, (len(gram),))
        check_same_device("gradient_statistics", "rows", rows=gram, weights=weights)
    spectrum = ops.align(gram)
    squares = gram.diagonal()
    norms = squares.sqrt()
    products = norms[:, None] * norms
    return GradientStatistics(
        condition_number=spectrum.condition_number,
        singular_values=spectrum.singular_values,
        cosine=(gram / products).clamp(-1.0, 1.0),
        magnitude_similarity=(2.0 * products / (squares[:, None] + squares)).clamp(max=1.0),
        norms=norms,
        update_cosine=None if weights is None else _update_cosine(gram, norms, weights.detach().double()),
    )


def _update_cosine(gram: Tensor, norms: Tensor, weights: Tensor) -> Tensor:
    products = gram @ weights
    square = weights @ products
    rounding = len(weights) * torch.finfo(torch.float64).eps * (weights.abs() @ norms).square()
    lengths = norms * torch.where(square > rounding, square, torch.nan).sqrt()
    return (products / lengths).clamp(-1.0, 1.0)


_ADAM = (torch.optim.Adam, torch.optim.AdamW)


class Dominance:
    r"""Each task's share of what moves the parameters under an ordinary ``torch.optim`` optimizer: one that steps along
    the sum of the tasks' gradients. Under AdaTask's, ask ``optimizer.dominance()``.

    .. math:: u_t = \eta \frac{\hat m_t}{\sqrt{\hat v} + \epsilon}, \qquad
        AU_t \leftarrow \beta \, AU_t + (1 - \beta) \, \|u_t\|^2, \qquad
        \text{share}_t = \frac{AU_t}{\sum_s AU_s}

    the average of squared updates of AdaTask (Yang et al., AAAI 2023, arXiv 2211.15055, section 3), summed over a
    layer's elements. v is the optimizer's own second moment, of the summed gradient; m_t is the task's part of its
    first: Adam's average, with its beta1, of the task's gradients; for RMSprop and Adagrad, which have none, the
    gradient itself (RMSprop's momentum, linear in u_t, is left out). So :math:`\sum_t u_t` is what the step subtracts
    from a parameter, but for weight decay and momentum, which are no task's.

    ::

        dominance = mtlgrad.metrics.Dominance(optimizer, num_tasks=3)
        ...
        mtlgrad.task_backward(losses, shared)  # .jac
        for p in shared:
            p.grad = p.jac.sum(0)
        optimizer.step()
        dominance.update()
        ...
        dominance.shares({"first": first.parameters(), "second": second.parameters()})

    In the first steps v is hardly more than one squared gradient: where the tasks' gradients cancel in it, u_t is huge,
    and some elements of chance outweigh all others for hundreds of steps. Begin to measure after some tens of steps.

    Measured at every n-th step alone it costs an n-th, and is an estimate: the averages reach n times further back. A
    ``decay`` of ``0.99**n`` keeps the length of AU's.

    Args:
        optimizer: torch.optim's Adam, AdamW, RMSprop or Adagrad.
        num_tasks: T.
        decay: beta, from 0, below 1.

    One copy of the parameters a task is held with Adam and AdamW, in float32 or float64.

    Raises:
        TypeError: another optimizer.
        ValueError: a setting out of its range.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, num_tasks: int, decay: float = 0.99):
        kinds = (*_ADAM, torch.optim.RMSprop, torch.optim.Adagrad)
        if isinstance(optimizer, TaskOptimizer) or not isinstance(optimizer, kinds):
            way = "use its dominance()" if isinstance(optimizer, TaskOptimizer) else "its update is not known here"
            raise TypeError(
                "Dominance: optimizer: expected torch.optim's Adam, AdamW, RMSprop or Adagrad, found "
                f"{type(optimizer).__name__}; {way}"
            )
        if not isinstance(num_tasks, int) or isinstance(num_tasks, bool) or num_tasks < 1:
            raise ValueError(f"Dominance: num_tasks: expected a whole number from 1, found {num_tasks!r}")
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"Dominance: decay: expected a number from 0, below 1, found {decay!r}")
        self.optimizer, self.num_tasks, self.decay = optimizer, num_tasks, decay
        self._state: dict[Tensor, dict[str, Tensor]] = {}

    @torch.no_grad()
    def update(self, jacobians: Mapping[Tensor, Tensor] | None = None) -> None:
        """Take in a step that the optimizer has made: before a scheduler changes the learning rate.

        Args:
            jacobians: parameter -> the tasks' gradients [T, *shape] in that step, whose sum was its ``.grad``; the
                parameters' ``.jac`` if not given. Parameters without are left out.

        Raises:
            ValueError: gradients of another shape, of a parameter that the optimizer does not have or has not yet
                moved, or none at all.
        """
        groups = {p: group for group in self.optimizer.param_groups for p in group["params"]}
        if jacobians is None:
            jacobians = {p: p.jac for p in groups if hasattr(p, "jac")}
        if not jacobians:
            raise ValueError(
                "Dominance.update: jacobians: expected gradients of at least one parameter, found none, and no .jac; "
                "call it after task_backward and optimizer.step(), before zero_grad"
            )
        for p, jacobian in jacobians.items():
            expected, found = [self.num_tasks, *p.shape], list(jacobian.shape)
            if found != expected:
                raise ValueError(f"Dominance.update: jacobians: expected {expected}, one row a task, found {found}")
            if p not in groups or not self.optimizer.state.get(p):
                what = "moved by" if p in groups else "of"
                raise ValueError(
                    f"Dominance.update: jacobians: expected parameters {what} the optimizer, found one {list(p.shape)} "
                    "that is not; call it after optimizer.step()"
                )
        for p, jacobian in jacobians.items():
            self._add(p, groups[p], jacobian)

    @torch.no_grad()
    def shares(self, layers: Layers | None = None) -> Tensor:
        """Return the shares so far, in the form of ``dominance()`` of :mod:`mtlgrad.optim`.

        Args:
            layers: for each layer its parameters, in a sequence or a dict; the parameter groups if not given.

        Returns:
            [layers, T] float64, rows summing to one, on the device of the parameters. NaN in rows without a parameter
            that was measured, or whose updates were all zero.
        """
        if layers is None:
            layers = [group["params"] for group in self.optimizer.param_groups]
        return layer_shares(layers, self.num_tasks, lambda p: self._state.get(p, {}).get("update_square"))

    def state_dict(self) -> dict[str, Any]:
        """Return tensors alone, by the parameters' numbers in the optimizer."""
        return {"state": {i: dict(self._state[p]) for i, p in enumerate(self._parameters()) if p in self._state}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what was measured before.

        Args:
            state_dict: of :meth:`state_dict`; its tensors are copied.
        """
        known = list(self._parameters())
        self._state = {
            known[i]: {name: value.to(known[i].device, copy=True) for name, value in values.items()}
            for i, values in state_dict["state"].items()
        }

    def _parameters(self) -> Iterable[Tensor]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def _add(self, p: Tensor, group: dict[str, Any], jacobian: Tensor) -> None:
        [jacobian] = as_real([jacobian])
        gradients = jacobian if jacobian.dtype == torch.float64 else jacobian.float()
        state = self._state.setdefault(p, {})
        if not state:
            state["update_square"] = torch.zeros(self.num_tasks, dtype=torch.float64, device=p.device)
        if isinstance(self.optimizer, _ADAM):
            gradients = self._first_moment(state, group["betas"][0], gradients)
        own = {name: as_real([v])[0] for name, v in self.optimizer.state[p].items() if isinstance(v, Tensor)}
        updates = gradients * self._step_size(group, own).to(gradients.dtype)
        squares = updates.flatten(1).double().square().sum(1)
        state["update_square"].mul_(self.decay).add_(squares, alpha=1.0 - self.decay)

    def _first_moment(self, state: dict[str, Tensor], beta: float, gradients: Tensor) -> Tensor:
        if "exp_avg" not in state:
            state["exp_avg"], state["count"] = torch.zeros_like(gradients), torch.zeros((), device="cpu")
        average = state["exp_avg"].lerp_(gradients, 1.0 - beta)
        state["count"] += 1
        return average / (1.0 - beta ** float(state["count"]))

    def _step_size(self, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
        """Return what the optimizer multiplies a first moment, or a gradient, with."""
        lr, eps = group["lr"], group["eps"]
        step = state["step"].double()  # float32 would lose half the digits of 1 - beta2
        if isinstance(self.optimizer, _ADAM):
            square = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
            root = square.sqrt() / (1.0 - group["betas"][1] ** step) ** 0.5
        elif isinstance(self.optimizer, torch.optim.RMSprop):
            square = state["square_avg"]
            root = (
                square.addcmul(state["grad_avg"], state["grad_avg"], value=-1.0) if group["centered"] else square
            ).sqrt()
        else:
            root, lr = state["sum"].sqrt(), lr / (1.0 + (step - 1.0) * group["lr_decay"])
        return cast("Tensor", lr / (root + eps))
