"""What every method refuses: one line that names the argument, what was expected, what was found and the way out.

The words are the whole beginning of a message; "..." stands for anything. Nothing changes with a refusal, which comes a
second time as well, and what is right goes on as if nothing had been.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mtlgrad import AlignedMTL, AlphaVIL, BayesAgg, Binary, Multiclass, Regression, task_backward
from mtlgrad.alphavil import Task
from mtlgrad.optim import AdaTaskAdam
from mtlgrad.posterior import binary_posterior, multiclass_posterior, regression_posterior
from mtlgrad.posterior.cholesky import JITTERS, checked_cholesky
from mtlgrad.posterior.posteriors import posterior_from_state
from tests.support.bounds import assert_near, contents, hushed, random_state, same, state_tensors, values
from tests.support.nets import (
    HEAD_WIDTH,
    KINDS,
    PAIRS,
    SGD,
    Case,
    NamedBatch,
    Net,
    Unsized,
    epoch,
    fill,
    fill_grad,
    head_data,
    inputs,
    linear,
    make_adatask,
    named_batches,
    new,
    packed,
    posterior,
    problem,
    published_layer,
    published_regression,
    unpacked,
)

pytestmark = pytest.mark.usefixtures("one_thread")

Refused = dict[str, Any]  #: the words, and one call or several, of what a method is used on
NAN, INF = math.nan, math.inf
ERRORS = (TypeError, ValueError, RuntimeError)


def says(error: BaseException, words: str) -> None:
    message = str(error)
    assert re.match(".*".join(map(re.escape, words.split("..."))), message), message
    assert "\n" not in message
    assert ": expected " in message
    assert "found " in message
    assert len(message) < 360


def everything(used: Any) -> Tensor:
    """The bytes of all that a refused call could change."""
    model, method = used.model, getattr(used, "method", None)
    parts = [
        contents(model),
        [(p.grad, getattr(p, "jac", None)) for p in model.parameters()],
        [module.training for module in model.modules()],
        None if method is None else method.state_dict(),
        random_state(),
    ]
    return packed(copy.deepcopy(parts))


def refuses(used: Any, words: str, call: Callable[[], object]) -> None:
    """Twice in these words, and nothing has changed."""
    before = everything(used)
    for _ in range(2):
        with pytest.raises(ERRORS) as error, hushed():
            call()
        says(error.value, words)
        assert torch.equal(everything(used), before)


class ModelOutput(NamedTuple):
    """As transformers' backbones return."""

    last_hidden_state: Tensor


def at(index: Any, value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed[index] = value
        return changed

    return change


def rows(words: str, call: Callable[..., object], wrong: dict[str, Any]) -> Refused:
    """What follows the words, and the arguments of the call: by name in a dict, several in a list."""

    def bound(given: Any) -> Callable[[Any], object]:
        return (lambda s: call(s, **given)) if isinstance(given, dict) else lambda s: call(s, given)

    return {
        words + end: [bound(one) for one in (given if isinstance(given, list) else [given])]
        for end, given in wrong.items()
    }


# ---- task_backward and the rules over the Gram matrix ----------------------------------------------------------------


class Aligned:
    """Losses of three tasks, and the rule, which knows .jac of the shared parameters."""

    def __init__(self, jac: bool = True):
        self.model, self.x, self.method = Net(), inputs(), AlignedMTL(3)
        self.shared = self.model.shared
        self.heads = [list(head.parameters()) for head in self.model.heads]
        self.features = self.model.backbone(self.x)
        self.losses = self.model.from_features(self.features)
        for p in self.shared if jac else ():
            p.jac = torch.ones(3, *p.shape)

    def backward(self, losses: Any = None, shared: Any = None, **options: Any) -> None:
        task_backward(self.losses if losses is None else losses, self.shared if shared is None else shared, **options)

    def past(self, names: Any = None) -> None:
        """A loss that reaches the backbone past the features."""
        losses = [*self.losses[:2], self.losses[2] + self.shared[0].square().sum()]
        self.backward(losses if names is None else dict(zip(names, losses)), features=self.features)

    def nested(self, turn: int) -> None:
        middle = self.model.backbone[0](self.x)
        last = self.model.backbone[1:](middle)
        both = [head(last).mean() + middle.mean() for head in self.model.heads]
        self.backward(both, features=[middle, last][::turn])

    def other_jac(self, jac: Any) -> None:
        other = Aligned(jac=False)
        other.shared[1].jac = jac
        try:
            other.backward()
        finally:
            assert all(p.grad is None for p in other.model.parameters())

    def use(self) -> None:
        self.backward(retain_graph=True)
        self.method.merge(self.shared)


def in_both_modes(name: str) -> Refused:
    """What is no tensor, in training and in evaluation."""

    def calls(value: Any) -> list[Callable[[Any], object]]:
        return [lambda s: s.method(value), lambda s: copy.deepcopy(s.method).eval()(value)]

    words = f"{name}: features: expected a tensor, found "
    return {
        words + "list; use one of its 2 parts": calls([torch.ones(5, 4)] * 2),
        words + "ModelOutput; use features.last_hidden_state": calls(ModelOutput(torch.ones(5, 4))),
    }


ALIGNED: Refused = {
    **rows(
        "AlignedMTL: ",
        lambda s, num_tasks=2, **options: AlignedMTL(num_tasks, **options),
        {
            "num_tasks: expected at least 1, found 0": {"num_tasks": 0},
            "scale: expected one of min, median, rmse, found 'max'": {"scale": "max"},
            "preference: expected 2 numbers, one a task, found 1": {"preference": [1.0]},
            "preference: expected finite numbers from 0, not all 0, found": [
                {"preference": p} for p in ([1.0, -1.0], [1.0, NAN], [0.0, 0.0])
            ],
        },
    ),
    **in_both_modes("AlignedMTL"),
    "AlignedMTL: features: expected a floating or complex dtype, found torch.int": lambda s: s.method(s.x.long()),
    "AlignedMTL.merge: parameters: expected at least one with .jac, found none; call task_backward first": (
        lambda s: s.method.merge(Net().shared)
    ),
    **rows(
        "AlignedMTL.merge: ",
        lambda s, given: AlignedMTL(given[0], scale_heads=given[1]).merge(s.shared, heads=given[2](s.heads)),
        {
            "parameters: expected .jac of shape [2, 7, 6], found": (2, False, lambda heads: None),
            "heads: expected ...found scale_heads=True and none": (3, True, lambda heads: None),
            "heads: expected ...found scale_heads=False and some": (3, False, lambda heads: heads),
            "heads: expected 3, found 2": (3, True, lambda heads: heads[:2]),
            "heads: expected every parameter in one head, found one in two": (3, True, lambda heads: heads[:1] * 3),
        },
    ),
    "AlignedMTL.merge: heads: expected parameters without .jac, found": (
        lambda s: AlignedMTL(3, scale_heads=True).merge(s.shared, heads=[*s.heads[:2], s.shared])
    ),
    "AlignedMTL.weigh: losses: expected 2, found 3": lambda s: AlignedMTL(2).weigh(s.losses, s.shared),
    "AlignedMTL.weigh: losses: expected a scalar for task 0, found shape [16, 6]": (
        lambda s: AlignedMTL(1).weigh([s.x], s.shared)
    ),
    "AlignedMTL.weigh: shared: expected a tensor that requires a gradient": lambda s: s.method.weigh(s.losses, [s.x]),
    **rows(
        "task_backward: ",
        lambda s, given: s.backward(**given(s)),
        {
            "losses: expected a sequence or a dict": lambda s: {"losses": torch.stack(s.losses)},
            "losses: expected at least one, found none": lambda s: {"losses": []},
            "losses: expected a scalar for task 1, found shape [16, 5]; use loss.mean": lambda s: {
                "losses": [s.losses[0], s.features]
            },
            "losses: expected a tensor for task 'a', found float": lambda s: {"losses": {"a": 1.0}},
            "shared: expected parameters that the losses were computed from, found none": [
                lambda s: {"shared": Net().shared, "retain_graph": True},
                lambda s: {"shared": Net().shared, "retain_graph": True, "features": s.features},
            ],
            "shared: expected at least one parameter": lambda s: {"shared": []},
            "shared: expected tensors, found Sequential": lambda s: {"shared": [s.model.backbone]},
            "shared: expected leaf tensors...[16, 5]": lambda s: {"shared": [s.features]},
            "features: expected tensors that the backbone computed with gradients, found a tensor without a graph": [
                lambda s: {"features": torch.ones(16, 5, requires_grad=True)},
                lambda s: {"features": s.features.detach()},
            ],
            "features: expected ...gradients, found NoneType": lambda s: {"features": [None]},
            "features: expected at least one tensor": lambda s: {"features": []},
            "features: expected ...found ModelOutput; use features.last_hidden_state": lambda s: {
                "features": ModelOutput(s.features)
            },
        },
    ),
    "task_backward: features: expected tensors none of which is computed from another": [
        *(lambda s: s.nested(1), lambda s: s.nested(-1))
    ],
    "task_backward: features: expected the loss of task 2 to reach ... the features alone, found 1 reached past them": (
        Aligned.past
    ),
    "task_backward: features: expected the loss of task 'race' to reach": lambda s: s.past(["age", "sex", "race"]),
    **rows(
        "task_backward: shared: expected .jac of shape [3, 7]..., found ",
        lambda s, jac: s.other_jac(jac[0]),
        {
            "[2, 7] in parameter 1; clear it with `del": (torch.zeros(2, 7),),
            "[3, 8]": (torch.zeros(3, 8),),
            "N": (None,),
        },
    ),
}

# ---- BayesAgg: heads, layer, posteriors ------------------------------------------------------------------------------


class Bayes:
    """A layer of three heads in the middle of an epoch; `see`: the next batch, some of it changed."""

    def __init__(self) -> None:
        self.problem = problem()
        self.method, self.model = self.problem.layer, nn.ModuleList(self.problem.heads)
        self.use()

    def see(self, features: Any = lambda x: x, targets: Any = lambda t: t) -> None:
        m = self.problem
        batch = features(m.data[0].features[:5].clone()).requires_grad_()
        self.method(batch, targets(m.targets(slice(0, 5))))

    def label(self, head: int, change: Callable[[Tensor], Any]) -> None:
        self.see(targets=lambda ts: [change(t) if i == head else t for i, t in enumerate(ts)])

    def use(self) -> None:
        self.problem.see(slice(20, 40))


def undrawn(make: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What draws random numbers, or warns, to be made."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        return make(*args, **options)


def lin(width: int = HEAD_WIDTH, outputs: int = 3, **options: Any) -> nn.Linear:
    return undrawn(nn.Linear, width, outputs, dtype=torch.float64, **options)


def layer(*heads: Any, **options: Any) -> BayesAgg:
    return BayesAgg(list(heads) or [Regression(lin())], **options)


BAYESAGG: Refused = {
    "BayesAgg: heads: expected at least one head, found none": lambda s: BayesAgg([]),
    "BayesAgg: heads: expected a sequence of heads, found Regression": lambda s: BayesAgg(Regression(lin())),
    **rows(
        "BayesAgg: ",
        lambda s, heads=(), **options: layer(*heads, **options),
        {
            "heads[0]: expected Regression, Binary or Multiclass, found Linear": {"heads": [lin()]},
            "heads: expected one width of the features for all, found [4, 5]": {
                "heads": [Regression(lin()), Binary(lin(5))]
            },
            "moments: expected one of exact, sampled, found 'precise'": {"moments": "precise"},
            "covariance: expected one of full, block, kron, diag, found 'banded'": {"covariance": "banded"},
            "statistics: expected one of stored, streaming, moving, found 'none'": {"statistics": "none"},
            "num_samples: expected at least 2, found 1": {"num_samples": 1},
            "seed: expected an integer, found 0.5": {"seed": 0.5},
        },
    ),
    "Binary: layers: expected at least one nn.Linear, found none": lambda s: Binary([]),
    "Binary: layers: expected nn.Linear, found NoneType": lambda s: Binary(None),
    "Multiclass: layers: expected nn.Linear, found Sequential": lambda s: Multiclass(nn.Sequential(lin())),
    "Binary: layers: expected one number of input features, found [4, 6]": lambda s: Binary([lin(), lin(6)]),
    "Multiclass: layers: expected a bias, ... found bias=False": lambda s: Multiclass(lin(bias=False)),
    "Regression: layers: expected at least one feature and one output, found Linear(...out_features=0": (
        lambda s: Regression(lin(outputs=0))
    ),
    "...gamma: expected a finite prior variance above 0, found -0.1": lambda s: Binary(lin(), gamma=-0.1),
    "Binary: power: expected finite numbers of at least 0": lambda s: Binary(lin(), power=-1.0),
    "Regression: power: expected one number or one per task (3), found 2": lambda s: Regression(lin(), power=[1.0] * 2),
    "Multiclass: power: expected one number or one per task (1), found 3": lambda s: Multiclass(lin(), power=[1.0] * 3),
    **in_both_modes("BayesAgg"),
    **rows(
        "BayesAgg: ",
        Bayes.see,
        {
            "targets: expected a sequence of 3, ...found none": {"targets": lambda t: None},
            "targets: expected a sequence of 3, one per head, found one tensor": {"targets": lambda t: t[0]},
            "targets: expected a sequence of 3, ...found 2": {"targets": lambda t: t[:2]},
            "features: expected shape [B, 4], ...found [5, 3]": lambda x: x[:, :3],
            "heads[0]: targets: expected shape [1, 5] like the features, or 3 numbers at each": lambda x: x[None],
            "heads[0]: features: expected at least one example, found none": {
                "features": lambda x: x[:0],
                "targets": lambda ts: [t[:0] for t in ts],
            },
            "heads[0]: features: expected finite values, found nan at [1, 2]": at((1, 2), NAN),
            "heads[0]: the head's weight: expected device meta like features, found cpu": lambda x: x.to("meta"),
        },
    ),
    **rows(
        "BayesAgg: heads[",
        lambda s, given: s.label(*given),
        {
            "1]: targets: expected a tensor, found list": (1, Tensor.tolist),
            "0]: targets: expected device cpu like features, found meta": (0, lambda t: t.to("meta")),
            "2]: targets: expected shape [5], found [3]": (2, lambda t: t[:3]),
            "1]: targets: expected shape [5, 3], found [5, 2]": (1, lambda t: t[:, :2]),
            "2]: targets: expected class indices from 0 to 2, ...found 3 at example 4": (2, at(4, 3)),
            "1]: targets: expected values from 0 to 1, ...found -1 at [0, 0]": (1, at((0, 0), -1.0)),
            "2]: targets: expected int64 class indices, found torch.float64": (2, Tensor.double),
        },
    ),
    **rows(
        "BayesAgg.total: losses: expected ",
        lambda s, given: s.method.total(given()),
        {
            "at least one, found none": lambda: [],
            "a sequence or a dict, found Tensor": lambda: torch.ones(3),
            "scalar tensors, found float at 1": lambda: [torch.ones(()), 1.0],
            "scalars ...found shape [2] at 0": lambda: [torch.ones(2)],
        },
    ),
    "BayesAgg.refresh: expected at least one training batch since the last refresh, found none": (
        lambda s: undrawn(problem).layer.refresh()
    ),
    "BayesAgg.aggregate: expected a full-data posterior, found none; call refresh() first": (
        lambda s: undrawn(problem).aggregate()
    ),
}

DATA = {kind: head_data(kind) for kind in KINDS}
H, Y = DATA["regression"].features, DATA["regression"].targets  # [30, 4], [30, 3]
B, W = DATA["binary"].targets, DATA["binary"].weight  # [30, 3], [3, 5]
C, V = DATA["multiclass"].targets, DATA["multiclass"].weight  # [30], [3, 5]


class Laws:
    """A posterior of each kind."""

    def __init__(self) -> None:
        self.model, self.of = nn.Module(), {kind: posterior(data) for kind, data in DATA.items()}
        self.method = SimpleNamespace(state_dict=lambda: {kind: law.state() for kind, law in self.of.items()})

    def update(self, kind: str = "binary", features: Tensor = H, **options: Any) -> None:
        self.of[kind].update(features, **{"targets": DATA[kind].targets, **options})

    def use(self) -> None:
        for kind in KINDS:
            self.update(kind)


GAMMA_WORDS = "...gamma: expected a finite prior variance above 0, found "
POSTERIORS: Refused = {
    **rows(
        "regression_posterior: ",
        lambda s, features=H, targets=Y: regression_posterior(features, targets),
        {
            "features: expected a tensor, found list": {"features": H.tolist()},
            "features: expected shape [B, D], found [4]": {"features": H[0]},
            "features: expected finite values, found nan at [2, 1]": {"features": at((2, 1), NAN)(H)},
            "targets: expected device cpu like features, found meta": {"targets": Y.to("meta")},
            "targets: expected shape [30, O], found [7, 3]": {"targets": Y[:7]},
            "targets: expected at least one output, found none": {"targets": Y[:, :0]},
            "targets: expected finite values, or NaN for no label, found inf at [3,": {"targets": at((3, 0), INF)(Y)},
        },
    ),
    **rows(
        "binary_posterior: ",
        lambda s, features=H, targets=B, weight=W: binary_posterior(features, targets, weight),
        {
            "features: expected float32, ...found torch.int64": {"features": H.long()},
            "features: expected at least one dimension, found none": {"features": H[:, :0], "weight": W[:, :1]},
            "features: expected finite values, found inf at [0, 3]": {"features": at((0, 3), INF)(H)},
            "weight: expected device cpu like features, found meta": {"weight": W.to("meta")},
            "targets: expected shape [30, 3], found [30, 2]": {"targets": B[:, :2]},
            "targets: expected float32, ...found torch.int64": {"targets": B.long()},
            "targets: expected values from 0 to 1, or NaN for no label, found 2 at [4, 1]": {
                "targets": at((4, 1), 2.0)(B)
            },
            "targets: expected values from 0 to 1, ...found -1 at [0, 2]": {"targets": at((0, 2), -1.0)(B)},
            "weight: expected a tensor, found NoneType": {"weight": None},
            "weight: expected shape [O, 5], found [3, 4]": {"weight": W[:, :4]},
        },
    ),
    **rows(
        "multiclass_posterior: ",
        lambda s, features=H, targets=C, weight=V: multiclass_posterior(features, targets, weight),
        {
            "features: expected at least one example, found none": {"features": H[:0], "targets": C[:0]},
            "targets: expected int64 class indices, found torch.float64; use targets.long()": {"targets": C.double()},
            "targets: expected shape [30], found [30, 1]": {"targets": C[:, None]},
            "targets: expected class indices from 0 to 2, or -100 ...found 3 at example 5": {"targets": at(5, 3)(C)},
            "targets: expected class indices from 0 to 2, or -100 ...found -1 at example 6": {"targets": at(6, -1)(C)},
            "weight: expected at least one class, found none": {"weight": V[:0]},
            "weight: expected finite values, found nan at [1, 4]": {"weight": at((1, 4), NAN)(V)},
        },
    ),
    **rows(
        GAMMA_WORDS,
        lambda s, gamma: regression_posterior(H, Y, gamma=gamma),
        {"0": 0, "inf": INF, "nan": NAN, "'1'": "1"},
    ),
    GAMMA_WORDS + "-1.0": lambda s: binary_posterior(H, B, W, gamma=-1.0),
    "...structure: expected one of full, block, kron, diag, found 'low rank'": (
        lambda s: multiclass_posterior(H, C, V, structure="low rank")
    ),
    **rows(
        "...prior: expected ",
        lambda s, given: given[0](*given[1:-1], prior=given[-1]),
        {
            "a regression posterior of structure 'full', found a binary one of structure 'full'": (
                *(regression_posterior, H, Y, binary_posterior(H, B, W)),
            ),
            "a multiclass posterior of structure 'full', found a multiclass one of structure 'kron'": (
                *(multiclass_posterior, H, C, V, multiclass_posterior(H, C, V, structure="kron")),
            ),
            "weights of shape [3, 4], found [3, 2]": (regression_posterior, H, Y, regression_posterior(H[:, :2], Y)),
            "weights of shape [3, 5], found [2, 5]": (
                *(binary_posterior, H, B, W, binary_posterior(H, B[:, :2], W[:2])),
            ),
            "a regression posterior of structure 'full', found Tensor": (regression_posterior, H, Y, H),
        },
    ),
    **rows(
        "...update: ",
        Laws.update,
        {
            "features: expected shape [B, 4], found [30, 2]": {"kind": "regression", "features": H[:, :2]},
            "targets: expected shape [30, 3], found [30, 1]": {"kind": "regression", "targets": Y[:, 0]},
            "targets: expected class indices from 0 to 2, ...found 3 at example 0": {
                "kind": "multiclass",
                "targets": at(0, 3)(C),
            },
            "features: expected finite values, found nan at [0, 0]": {"features": at((0, 0), NAN)(H)},
            "features: expected finite values, found inf at [29, 3]": [
                {"kind": kind, "features": at((29, 3), INF)(H)} for kind in KINDS
            ],
            "features: expected at least one example, found none": {"features": H[:0], "targets": B[:0]},
            "weight: expected shape [3, 5], found [2, 5]": {"weight": W[:2]},
            "weight: expected none, a regression posterior is exact": {"kind": "regression", "weight": W[:, :4]},
            "features: expected device cpu like posterior, found meta": {
                "features": H.to("meta"),
                "targets": B.to("meta"),
            },
        },
    ),
    "...sample: n: expected an integer of at least 1, found 0": lambda s: s.of["binary"].sample(0),
    "...sample: n: expected an integer ...found 1.5": lambda s: s.of["binary"].sample(1.5),
}

# ---- AdaTask's optimizers --------------------------------------------------------------------------------------------


class AdaTask:
    """Parameters with .jac, a head with .grad, another group, after a step; `p` is parameter 1 of group 0."""

    def __init__(self, rule: str = "adam"):
        self.first, self.p, self.head, self.other = (new(seed, 4) for seed in range(4))
        self.model = nn.ParameterList([self.first, self.p, self.head, self.other])
        groups = [{"params": [self.first, self.p, self.head]}, {"params": [self.other]}]
        self.method = make_adatask(rule, groups, check_finite=True, missing="still")
        self.op = type(self.method).__name__
        self.fill(1)
        self.method.step()
        self.fill(2)

    def fill(self, seed: int) -> None:
        fill([self.first, self.p, self.other], seed)
        fill_grad([self.head], seed)

    def group(self, **settings: Any) -> None:
        self.method.add_param_group({"params": [new(5, 3)], **settings})

    def use(self) -> None:
        self.method.step()


def clipped(s: Any, max_norm: Any) -> AdaTaskAdam:
    return AdaTaskAdam([new(1, 3)], num_tasks=2, max_norm=max_norm)


ADATASK: Refused = {
    **rows("AdaTaskAdam: max_norm: expected ", clipped, {"a number above 0, or None, found": [0.0, -1.0, NAN, "one"]}),
    "AdaTaskAdam: max_norm: expected 1.0 as in the other groups, found 2.0": (
        lambda s: clipped(s, 1.0).add_param_group({"params": [new(2, 3)], "max_norm": 2.0})
    ),
    **rows(
        "AdaTaskAdam: ",
        AdaTask.group,
        {
            "num_tasks: expected 3 as in the other groups, found 4": {"num_tasks": 4},
            "lr: expected a number from 0, found 'fast'": {"lr": "fast"},
            "lr: expected a number from 0, found tensor": {"lr": torch.ones(2)},
            "eps: expected a number from 0, found None": {"eps": None},
            "betas: expected two numbers from 0, below 1, found": [
                {"betas": betas} for betas in ((0.9,), 0.9, (0.9, 0.9, 0.9))
            ],
        },
    ),
}

# ---- alphaVIL --------------------------------------------------------------------------------------------------------


class Vil:
    def __init__(self) -> None:
        self.case = Case()
        self.model, self.method = self.case.model, self.case.vil()

    def make(self, dtype: Any = None, **changed: Any) -> AlphaVIL:
        case = self.case if dtype is None else Case(dtype=dtype)
        known = {"model": case.model, "tasks": case.tasks, "target": case.target, "make_optimizer": SGD}
        return AlphaVIL(**{**known, **changed})

    def field(self, value: Callable[[Case], Any], name: str) -> None:
        """In the constructor of the task or of AlphaVIL, with the task's name."""
        task = self.case.tasks["kind"]
        known = {"train": task.train, "loss": task.loss, "dev": task.dev, "head": task.head, name: value(self.case)}
        self.make(tasks={**self.case.tasks, "kind": Task(**known)})

    def use(self) -> None:
        epoch(self.method)


def given(name: str, *wrong: Any) -> list[dict[str, Any]]:
    return [{name: value} for value in wrong]


ONE = Task([0], print, [0])
SETTINGS_OF_VIL: dict[str, Any] = {
    "model: expected a torch.nn.Module, found": given("model", None, [], lambda x: x, nn.Linear, {"a": 1}),
    "tasks: expected a dict of names and tasks, or a list, found": given("tasks", None, 3),
    "tasks: expected at least one, found none": given("tasks", {}, []),
    "tasks: ...expected a mtlgrad.alphavil.Task, found": given(
        "tasks", [None], ["size"], {"size": None}, {"size": (1, 2)}, "size"
    ),
    "tasks: expected names that are strings, found": [  # nobody is dropped or taken for another
        {"tasks": dict.fromkeys(names, ONE), "target": 1} for names in ((1, "1"), (1, 0), (None,), (("a", "b"),))
    ],
    "target: expected one of 'size', 'kind', 'marks', found": given(
        "target", "age", "", None, 3, -1, True, 1.0, ["size"]
    ),
    "tasks: 'kind', the target: dev: expected batches of development data, found None": given("target", "kind"),
    **{
        f"{name}: expected a function from parameters to an optimizer, found ...; write lambda": given(
            name, None, "sgd", 0.1, {"lr": 0.1}, torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        )
        for name in ("make_optimizer", "alpha_optimizer")
    },
    "alpha_epochs: expected a number from 1, found": given("alpha_epochs", 0, -1, 1.5, 2.0, True, None, "5", INF),
    "subset: expected a fraction above 0.0 and up to 1.0, or a number of batches from 1, found": given(
        "subset", 0, -3, 0.0, -0.1, 1.1, 2.0, NAN, True, None, "half", [1], (0.1, 0.2)
    ),
    "clip_alpha: expected None or (low, high) with low <= 1 <= high, since alpha starts at 1, found": given(
        "clip_alpha",
        *(0.5, "01", (1.0,), (0.0, 1.0, 2.0), [], {"low": 0}, (None, 2.0), ("0", "2")),
        *((1.1, 2.0), (-1.0, 0.9), (2.0, 0.0), (NAN, 2.0), (0.0, NAN)),
    ),
    "include_heads: expected one of own, none, all, found": given(
        "include_heads", "Own", "both", "", None, True, 1, ["own"]
    ),
    "min_weight: expected a number up to 1, ...found": given("min_weight", "0", None, NAN, 1.5, INF, [0.0]),
    "delta_storage: expected one of parameters, bfloat16, host, host-bfloat16, found": given(
        "delta_storage", "cpu", None, 16, torch.bfloat16, ["host"], "Host"
    ),
    **{
        f"delta_storage: expected parameters or host for parameters of {dtype} (...), found {storage}": (
            {"dtype": dtype, "delta_storage": storage}
        )
        for dtype in (torch.float64, torch.float16)
        for storage in ("bfloat16", "host-bfloat16")
    },
}
ANEW = "batches to iterate anew each time (a DataLoader, a list), found "
LISTED = "a module or a list of parameters, found "
#: By the name of a task's field: what is expected, and what is given.
FIELDS: dict[str, dict[str, Any]] = {
    "train": {
        ANEW + "list_iterator, which ends after one pass; wrap it in a list": lambda c: iter(c.tasks["kind"].train),
        ANEW + "generator, which ends": lambda c: (b for b in c.tasks["kind"].train),
        ANEW + "zip": lambda c: zip([1], [2]),
        ANEW + "NoneType": lambda c: None,
        ANEW + "int": lambda c: 3,
        ANEW + "Tensor": lambda c: torch.ones(3, 5),
        ANEW + "str": lambda c: "data.csv",
        ANEW + "TensorDataset": lambda c: torch.utils.data.TensorDataset(torch.ones(3)),
        ANEW + "function": lambda c: lambda: c.tasks["kind"].train,
    },
    "dev": {ANEW + "list_iterator": lambda c: iter([]), ANEW + "int": lambda c: 5},
    "loss": {
        "a function, found NoneType": lambda c: None,
        "a function, found str": lambda c: "mse",
        "a function, found Tensor": lambda c: torch.tensor(1.0),
    },
    "head": {
        "parameters of the model, found one of shape [7, 3] that is not in it": lambda c: lin(3, 7),
        "parameters of the model, found one of shape [2, 9] that is not in it": lambda c: [torch.ones(2, 9)],
        LISTED + "a list with str": [
            *(lambda c: "kind", lambda c: ["heads.kind"], lambda c: c.model.heads["kind"].state_dict())
        ],
        LISTED + "int": lambda c: 1,
        LISTED + "a list with NoneType": lambda c: [None],
        LISTED + "a list with Linear": lambda c: [c.model.heads["kind"]],
        LISTED + "Parameter": lambda c: c.model.heads["kind"].weight,
        LISTED + "a list with tuple": lambda c: c.model.heads["kind"].named_parameters(),
    },
}
ALPHAVIL = rows("AlphaVIL: ", Vil.make, SETTINGS_OF_VIL)
for field, wrong in FIELDS.items():
    ALPHAVIL |= rows(f"AlphaVIL: tasks: 'kind': {field}: expected ", partial(Vil.field, name=field), wrong)

# ---- the table -------------------------------------------------------------------------------------------------------

TABLE = [
    pytest.param(start, words, calls if isinstance(calls, list) else [calls], id=f"{method} {words[:64]}")
    for method, start, refused in (
        ("aligned", Aligned, ALIGNED),
        ("bayesagg", Bayes, BAYESAGG),
        ("bayesagg", Laws, POSTERIORS),
        ("adatask", AdaTask, ADATASK),
        ("alphavil", Vil, ALPHAVIL),
    )
    for words, calls in refused.items()
]


@pytest.mark.parametrize(("start", "words", "calls"), TABLE)
def test_refused(start: Callable[[], Any], words: str, calls: list[Callable[[Any], object]]) -> None:
    torch.manual_seed(0)
    used = start()
    for call in calls:
        refuses(used, words, lambda call=call: call(used))


STARTS = [Aligned, Bayes, Laws, AdaTask, Vil]


@pytest.mark.parametrize("start", STARTS, ids=["aligned", "bayesagg", "bayesagg posteriors", "adatask", "alphavil"])
def test_the_next_use_is_as_if_nothing_had_been_refused(start: Callable[[], Any]) -> None:
    tables = {Aligned: ALIGNED, Bayes: BAYESAGG, Laws: POSTERIORS, AdaTask: ADATASK, Vil: ALPHAVIL}
    ends = []
    for refused in ({}, tables[start]):
        used = start()
        torch.manual_seed(1)
        for calls in refused.values():
            for call in calls if isinstance(calls, list) else [calls]:
                with pytest.raises(ERRORS):
                    call(used)
        torch.manual_seed(1)
        used.use()
        ends.append(everything(used))
    assert torch.equal(*ends)


# ---- tracers ---------------------------------------------------------------------------------------------------------


class Wrapped(nn.Sequential):
    """Not of torch's own containers: torch.fx looks into it."""

    def forward(self, x: Tensor) -> Any:
        return self[0].forward(x)


@pytest.mark.parametrize("make", [lambda: AlignedMTL(2), layer], ids=["aligned", "bayesagg"])
def test_tracers_that_cannot_follow_name_the_one_that_works(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(TypeError, match=r"expected a tensor, found Proxy; torch.fx cannot follow .* use torch.export"):
        torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), Wrapped(make())))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of what it deprecates
        with pytest.raises(RuntimeError, match=r"torch.jit.script can compile, .* use torch.export"):
            torch.jit.script(nn.Sequential(nn.Linear(4, 4), make()))


# ---- BayesAgg in the course of a training ----------------------------------------------------------------------------


def test_bayesagg_names_the_batch_in_which_a_head_became_nan() -> None:
    used = Bayes()
    used.method.refresh()
    with torch.no_grad():
        used.problem.heads[1].weight[2, 0] = NAN
    with pytest.raises(ValueError, match=r"BayesAgg: batch 2.*NaN"):
        used.use()


def test_bayesagg_names_a_posterior_that_cannot_be_had_at_refresh() -> None:
    used = Bayes()
    state = unpacked(used.method.get_extra_state())
    state["full_data"][0]["features"] = [torch.full((20, HEAD_WIDTH), 1e200, dtype=torch.float64)]  # squares overflow
    used.method.set_extra_state(packed(state))
    refuses(used, "BayesAgg.refresh: heads[0] (regression): expected a finite", used.method.refresh)
    assert used.method.posteriors is None


@pytest.mark.parametrize("batch", [3, 20])
def test_bayesagg_names_the_batch_whose_moments_are_out_of_range(batch: int) -> None:
    data = head_data("regression", 20, HEAD_WIDTH)
    layer = published_layer([published_regression(linear(data).float(), gamma=0.1)])
    features = data.features.float().requires_grad_()
    layer(features, [data.targets])
    layer.refresh()
    with pytest.raises(ValueError, match=r"BayesAgg: batch 1: expected finite moments of the gradients, found NaN at"):
        layer.aggregate(features.detach()[:batch] * 1e37, [data.targets[:batch]])


def test_bayesagg_takes_one_example_of_one_dimension() -> None:
    for kind, head in (("regression", Regression), ("binary", Binary), ("multiclass", Multiclass)):
        data = head_data(kind, 1, 1, outputs=1)
        layer = BayesAgg([head(lin(1, 1))])
        layer(data.features.clone().requires_grad_(), [data.targets])
        layer.refresh()
        found = layer.aggregate(data.features, [data.targets])
        assert found.shape == (1, 1)
        assert bool(found.isfinite().all())
        assert bool((found == 0).all()) == (kind == "multiclass")  # a single class has no gradient at all


def stack(*diagonals: list[float]) -> Tensor:
    return torch.diag_embed(torch.tensor(diagonals, dtype=torch.float64))


def test_bayesagg_jitters_a_precision_as_little_as_helps_and_only_where_needed() -> None:
    """Two matrices, the second short of positive definite by 3e-5 of its mean diagonal: 1e-4 mends it."""
    good = stack([4.0, 9.0], [1.0, 16.0])
    assert torch.equal(checked_cholesky(good, "x"), good.sqrt())  # a warning would be an error
    matrix = stack([4.0, 2.0], [2.0 + 6e-5, -3e-5])
    with pytest.warns(UserWarning, match="a name: precision not positive definite, added 1e-04 of its mean diagonal"):
        factor = checked_cholesky(matrix, "a name")
    expected = matrix.clone()
    expected[1] += 1e-4 * (2.0 + 3e-5) / 2 * torch.eye(2, dtype=torch.float64)
    assert_near(factor @ factor.mT, expected, 1e-14)


def test_bayesagg_names_a_precision_that_no_jitter_mends() -> None:
    """With its pivot: of rows 0 and 1 these are 1, then 1 - 2 * 2 = -3. What is not finite is not jittered."""
    bad = torch.tensor([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    matrices = torch.stack([torch.eye(3, dtype=torch.float64), bad])
    words = "{}: expected a positive definite precision matrix, found pivot -3 at row 1{} even with"
    for matrix, name, where in ((matrices, "heads[1]", " of matrix 1"), (bad, "one", "")):
        with pytest.raises(ValueError, match="precision") as error:
            checked_cholesky(matrix, name)
        says(error.value, f"{words.format(name, where)} ...{JITTERS[-1]:.0e} of the mean diagonal...smaller gamma")
    for value in (NAN, INF):
        with pytest.raises(
            ValueError, match=r"x: expected a finite precision matrix, found NaN or infinity; check the"
        ):
            checked_cholesky(at((2, 1), value)(at((1, 2), value)(torch.eye(3))), "x")


def test_bayesagg_warns_of_a_nearly_singular_precision_and_goes_on() -> None:
    """Identical huge examples and next to no prior: in float32 the precision is singular."""
    features = torch.full((64, 3), 1e4)
    law = regression_posterior(features, torch.ones(64, 1), gamma=1e3)
    with pytest.warns(UserWarning, match=r"regression posterior: precision not positive definite, added 1e-0\d of"):
        mean = law.mean
    # The one direction that the data determine is right all the same: predictions are 1, up to the jitter's 1e-6.
    assert_near(features[:1] @ mean.T, torch.ones(1, 1), 1e-4)


def test_bayesagg_names_the_task_of_an_indefinite_state_when_it_is_used() -> None:
    state = Laws().of["binary"].state()
    state["sums"]["blocks"][2, 1, 1] = -100.0
    law = posterior_from_state(state)
    law.name = "task age"
    with pytest.raises(ValueError, match=r"task age: expected a positive def.* found pivot -\d+ at row 1 of matrix 2"):
        _ = law.mean


# ---- AdaTask's settings and gradients --------------------------------------------------------------------------------

ADAM = ("adam", "adamw")
#: A setting, values out of its range, what a message has to name, and whose setting it is.
SETTINGS: list[tuple[str, list[Any], str, Any]] = [
    ("lr", [-0.1, NAN], "lr|learning rate", PAIRS),
    ("eps", [-1e-8], "eps", PAIRS),
    ("weight_decay", [-1.0], "weight_decay", PAIRS),
    ("task_weights", [[1.0, 2.0], [1.0, -1.0, 1.0], 0.5, [1.0, NAN, 1.0]], "task_weights", PAIRS),
    ("missing", ["skip"], "missing", PAIRS),
    ("moments_dtype", ["float16", torch.float64, "int8", 16], "moments_dtype", PAIRS),
    ("dominance_decay", [1.0, -0.1, NAN], "dominance_decay", PAIRS),
    ("num_tasks", [0, -1, 1.5, True, None, "3"], "num_tasks", PAIRS),
    ("fused", [True], "fused", [name for name in PAIRS if name != "rmsprop"]),  # which torch has not fused
    ("differentiable", [True], "differentiable", PAIRS),
    ("betas", [(0.9, 1.0), (1.0, 0.9), (-0.1, 0.9)], "beta", ADAM),
    ("alpha", [1.0, -0.5], "alpha", ["rmsprop"]),
    ("momentum", [-0.5], "momentum", ["rmsprop"]),
    ("lr_decay", [-0.5], "lr_decay", ["adagrad"]),
    ("initial_accumulator_value", [-0.5], "initial_accumulator_value", ["adagrad"]),
]


@pytest.mark.parametrize(("setting", "wrong", "named", "whose"), SETTINGS, ids=lambda v: v if type(v) is str else "")
def test_adatask_settings_out_of_range(setting: str, wrong: list[Any], named: str, whose: Any) -> None:
    """In the constructor, in a group there, and in a group added later."""
    for name in whose:
        for value in wrong:
            p, q = new(1, 3), new(2, 3)
            optimizer = make_adatask(name, [p])
            for call in (
                lambda name=name, p=p, value=value: PAIRS[name][0]([p], **{"num_tasks": 3, setting: value}),
                lambda name=name, p=p, q=q, value=value: make_adatask(
                    name, [{"params": [p]}, {"params": [q], setting: value}]
                ),
                lambda o=optimizer, q=q, value=value: o.add_param_group({"params": [q], setting: value}),
            ):
                with pytest.raises(ValueError, match=named) as error:
                    call()
                assert "\n" not in str(error.value)
            assert type(optimizer).__name__ in str(error.value)  # the last; the first are torch's own words
            assert len(optimizer.param_groups) == 1
            fill([p], 1)
            optimizer.step()


def test_adatask_num_tasks_is_asked_for() -> None:
    for kind, _ in PAIRS.values():
        with pytest.raises(TypeError, match="num_tasks"):
            kind([new(1, 3)])


def jac(shape: tuple[int, ...], **options: Any) -> Callable[[AdaTask], None]:
    return lambda s: setattr(s.p, "jac", torch.zeros(shape, **options))


def only_grad(s: AdaTask) -> None:
    del s.p.jac
    s.p.grad = torch.ones_like(s.p)


P = ".step: parameter 1 of group 0: expected "
#: What happens to a parameter of four elements before a step, and what the message says.
SPOILT: dict[str, tuple[Callable[[AdaTask], Any], str]] = {
    "two tasks": (jac((2, 4)), P + ".jac of shape [3, 4], one row for each of num_tasks=3, found [2, 4]; clear it"),
    "no tasks": (jac((4,)), P + ".jac of shape [3, 4]...found [4]"),
    "another shape": (jac((3, 5)), P + ".jac of shape [3, 4]...found [3, 5]"),
    "another device": (jac((3, 4), device="meta"), P + ".jac on the parameter's device, cpu, found meta"),
    "another dtype": (jac((3, 4), dtype=torch.float64), P + ".jac on the parameter's dtype...found torch.float64"),
    "whole numbers": (jac((3, 4), dtype=torch.int64), P + "...found torch.int64"),
    "no tensor": (lambda s: setattr(s.p, "jac", [1.0]), P + "...found list"),
    "sparse": (lambda s: setattr(s.p, "jac", s.p.jac.to_sparse()), P + "a dense .jac, found ...to_dense()"),
    "NaN": (lambda s: s.p.jac[1, 2].fill_(NAN), ".step: group 0: expected ...NaN or infinity in .jac of task 1"),
    "NaN in another group": (lambda s: s.other.jac[0, 0].fill_(NAN), ".step: group 1: expected ...in .jac of task 0"),
    "infinite": (lambda s: s.p.jac[2, 0].fill_(-INF), ".step: group 0: expected ...NaN or infinity in .jac of task 2"),
    "changed sides": (only_grad, P + ".jac, which its moments are made of, found .grad"),
    "NaN in a head": (
        lambda s: s.head.grad[1].fill_(NAN),
        ".step: parameter 2 of group 0: expected a finite .grad, found NaN or infinity",
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("kind", SPOILT)
def test_adatask_gradients_that_do_not_fit(kind: str) -> None:
    """Not even the parameters that come before it have moved, and not the heads; the next step is as if nothing was."""
    spoil, words = SPOILT[kind]
    for name in PAIRS:
        used, plain = AdaTask(name), AdaTask(name)
        spoil(used)
        before, kept = values(used.model), state_tensors(used.method)
        for _ in range(2):
            with pytest.raises(ValueError, match="step: ") as error:
                used.use()
            says(error.value, used.op + words)
            assert same(used.model, before)
            assert same(state_tensors(used.method), kept)
        used.p.grad = None
        for each in (used, plain):
            each.fill(3)
            each.use()
        assert same(used.model, plain.model)
        assert not any(torch.equal(a, b) for a, b in zip(used.model, before))


@pytest.mark.parametrize("name", PAIRS)
def test_adatask_takes_large_and_small_numbers(name: str) -> None:
    """Also those whose squares their type does not hold are finite, and there."""
    sizes = {torch.float32: (1e30, 1e-30), torch.bfloat16: (1e30, 1e-30), torch.float64: (1e30, 1e200, 1e-200)}
    for dtype, factors in sizes.items():
        for factor in factors:
            p: Any = new(1, 4, dtype=dtype)
            fill([p], 1)
            p.jac *= factor
            optimizer = make_adatask(name, [p], check_finite=True, missing="still")
            optimizer.step()
            assert optimizer.state[p]["step"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", PAIRS)
def test_adatask_parameters_without_kernels(name: str) -> None:
    """float16: in words, before the heads have moved."""
    head, p = new(1, 4), new(2, 4, dtype=torch.float16)
    fill_grad([head], 1)
    fill([p], 1)
    optimizer = make_adatask(name, [head, p])
    before = values([head, p])
    with pytest.raises(ValueError, match="float16") as error:
        optimizer.step()
    says(error.value, f"{type(optimizer).__name__}{P}float32, ...found torch.float16")
    assert same([head, p], before)
    assert not state_tensors(optimizer)


@pytest.mark.parametrize("name", PAIRS)
def test_adatask_parameters_that_change_sides(name: str) -> None:
    """From .grad to .jac too; its state deleted, it starts anew. With T = 1 there are no sides."""
    p: Any = new(1, 4)
    optimizer = make_adatask(name, [p])
    fill_grad([p], 1)
    optimizer.step()
    fill([p], 1)
    before, kept = values([p]), state_tensors(optimizer)
    with pytest.raises(ValueError, match=r"expected \.grad") as error:
        optimizer.step()
    says(error.value, f"{type(optimizer).__name__}.step: parameter 0 of group 0: ...found .jac...optimizer.state")
    assert same([p], before)
    assert same(state_tensors(optimizer), kept)
    del optimizer.state[p]
    optimizer.step()
    assert optimizer.state[p]["step"].tolist() == [1.0, 1.0, 1.0]
    single = make_adatask(name, [p], 1)
    fill([p], 1, 1)
    single.step()
    del p.jac
    single.step()


def test_adatask_takes_none_for_no_jac() -> None:
    """`.jac = None` is not the convention, but nothing stumbles over it."""
    p: Any = new(1, 3)
    p.jac, p.grad = None, torch.ones(3)
    optimizer = make_adatask("adam", [p])
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    optimizer.zero_grad(set_to_none=False)
    optimizer.zero_grad()


@pytest.mark.parametrize("name", PAIRS)
def test_adatask_dominance_without_records(name: str) -> None:
    p = new(1, 4)
    optimizer = make_adatask(name, [p], dominance_decay=None)
    fill([p], 1)
    optimizer.step()
    assert "update_square" not in optimizer.state[p]
    with pytest.raises(RuntimeError, match="dominance_decay") as error:
        optimizer.dominance()
    says(error.value, f"{type(optimizer).__name__}.dominance: expected dominance_decay to be a number, found None")
    fresh = make_adatask(name, [p])
    assert fresh.dominance().isnan().all()
    assert copy.deepcopy(fresh).dominance().shape == (1, 3)


# ---- alphaVIL in a round ---------------------------------------------------------------------------------------------


def test_alphavil_takes_lists_for_pairs_and_infinite_bounds() -> None:
    used = Vil()
    for fine in (
        {"clip_alpha": [0, 2]},
        {"clip_alpha": (1, 1)},
        {"clip_alpha": (-INF, INF)},
        {"subset": np.float64(0.5)},
        {"min_weight": 0},
        {"target": 0},
        {"tasks": tuple(used.case.tasks.values()), "target": "0"},
        {"make_optimizer": torch.optim.SGD},
    ):
        used.make(**fine)


def test_alphavil_models_with_nothing_to_train() -> None:
    used = Vil()
    used.model.requires_grad_(False)
    refuses(used, "AlphaVIL: ...expected parameters that require gradients, found none", used.make)
    used.model.heads["size"].requires_grad_(True)
    for include in ("own", "none"):
        refuses(used, "AlphaVIL: ", lambda include=include: used.make(include_heads=include))
    used.model.heads.requires_grad_(True)
    words = "AlphaVIL: include_heads: expected own or all, since no shared parameter...found none"
    refuses(used, words, lambda: used.make(include_heads="none"))
    used.make(include_heads="own")


def stays(case: Case, words: str, **options: Any) -> AlphaVIL:
    """The round is refused in these words, twice, and nothing has changed but what has been drawn."""
    vil, before = case.vil(**options), contents(case.model)
    for _ in range(2):
        with pytest.raises(ERRORS) as error, hushed():
            vil.epoch()
        says(error.value, words)
        assert same(contents(case.model), before)
        assert vil.task_weights.tolist() == [1.0, 1.0, 1.0]
        assert all(p.grad is None for p in case.model.parameters())
        assert all(module.training for module in case.model.modules())
        assert (vil.rounds, vil.last) == (0, None)
    return vil


#: What a loss makes of its value, and what is found.
RETURNS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "tuple": (lambda v: (v, {"accuracy": 1.0}), "tuple"),
    "dict": (lambda v: {"loss": v}, "dict"),
    "float": (lambda v: v.item(), "float"),
    "None": (lambda v: None, "NoneType"),
    "vector": (lambda v: v.expand(3), "shape [3]"),
    "matrix": (lambda v: v.expand(2, 1), "shape [2, 1]"),
    "nothing": (lambda v: v.expand(0), "shape [0]"),
    "numpy": (lambda v: v.detach().numpy(), "ndarray"),
    "integer": (lambda v: v.long(), "...torch.int64"),
    "complex": (lambda v: v + 0j, "...torch.complex64"),
    "detached": (lambda v: v.detach(), "one that does not; use that model, drop detach()"),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "development"])
@pytest.mark.parametrize("kind", RETURNS)
def test_alphavil_what_a_loss_returns(kind: str, training: bool) -> None:
    case, (turn, found) = Case(), RETURNS[kind]
    name = "kind" if training and kind != "detached" else "size"
    loss = case.tasks[name].loss
    case.change(name, loss=lambda m, b: turn(loss(m, b)) if m.training == training else loss(m, b))
    expected = "one that " if kind == "detached" else "a scalar tensor of floats"
    stays(case, f"AlphaVIL: tasks: '{name}': loss: expected {expected}...found {found}")


def test_alphavil_losses_of_one_element_and_rounds_under_no_grad() -> None:
    """[1] and [1, 1] are scalars enough; the round after one under no_grad is as good as any."""
    case = Case()
    with torch.no_grad():
        vil = stays(case, "AlphaVIL: tasks: 'size': loss: expected one that...no_grad()")
    assert epoch(vil).kept == "search"
    case = Case()
    for name, shape in (("size", (1,)), ("kind", (1, 1))):
        loss = case.tasks[name].loss
        case.change(name, loss=lambda m, b, of=loss, to=shape: of(m, b).reshape(to))
    assert epoch(case.vil()).kept == "search"


@pytest.mark.parametrize("what", ["train", "dev"])
def test_alphavil_nothing_in_the_data(what: str) -> None:
    """In the constructor, or when it is iterated."""
    for empty in ([], (), Unsized([]), torch.utils.data.DataLoader([], batch_size=2)):
        case = Case()
        case.change("size", **{what: empty})
        stays(case, f"AlphaVIL: tasks: 'size': {what}: expected at least one batch, found none")


def test_alphavil_data_that_ends_after_one_round() -> None:
    """An iterable whose second pass has nothing, as files that were read: in words, and only the round is lost."""

    class Once(Unsized):
        def __iter__(self) -> Iterator[NamedBatch]:
            found, self.of = self.of, []
            return iter(found)

    case = Case()
    case.change("kind", train=Once(named_batches("kind", 3)))
    vil = case.vil()
    epoch(vil)
    before = contents(case.model)
    with pytest.raises(ValueError, match="AlphaVIL: ") as error:
        vil.epoch()
    says(error.value, "AlphaVIL: tasks: 'kind': train: expected at least one batch, found none")
    assert same(contents(case.model), before)


@pytest.mark.parametrize("name", ["make_optimizer", "alpha_optimizer"])
def test_alphavil_functions_that_return_no_optimizer(name: str) -> None:
    for value, found in ((None, "NoneType"), (0.1, "float"), (SGD, "partial")):
        words = f"AlphaVIL: {name}: expected a function that returns a torch.optim.Optimizer, found {found}"
        stays(Case(), words, **{name: lambda ps, value=value: value})
    if name == "make_optimizer":
        words = "AlphaVIL: make_optimizer: expected one whose step needs no closure, found LBFGS; take SGD"
        stays(Case(), words, make_optimizer=torch.optim.LBFGS)


def test_alphavil_lets_the_users_own_errors_through() -> None:
    case = Case()
    loss = case.tasks["marks"].loss

    def out_of_range(model: Any, batch: NamedBatch) -> Tensor:
        if model.training:
            raise IndexError("target 3 is out of bounds.")
        return loss(model, batch)

    before = contents(case.model)
    one_argument = lambda batch: loss(case.model, batch)  # noqa: E731
    for wrong, words in ((out_of_range, r"^target 3 is out of bounds\.$"), (one_argument, "positional argument")):
        case.change("marks", loss=wrong)
        with pytest.raises((IndexError, TypeError), match=words), hushed():
            case.vil().epoch()
        assert same(contents(case.model), before)


WEIGHTS: list[Any] = [torch.ones(2), torch.ones(4), torch.ones(60), torch.ones(1), torch.tensor(1.0), torch.ones(3, 1)]
WEIGHTS += [[1.0, NAN, 1.0], [1.0, INF, 1.0], "111", None]


def test_alphavil_task_weights_that_do_not_fit() -> None:
    """Refused in words before anything is trained."""
    used = Vil()
    words = "AlphaVIL: task_weights: expected 3 finite numbers, one a task, found"
    for weights in WEIGHTS:
        refuses(used, words, lambda weights=weights: setattr(used.method, "task_weights", weights))
    assert not used.case.diary
    used.method.task_weights = [1.0, 0.5, 0.25]
    assert used.method.task_weights.tolist() == [1.0, 0.5, 0.25]
    epoch(used.method)
    assert used.method.task_weights.shape == (3,)
