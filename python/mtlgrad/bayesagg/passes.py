"""A pass through the layer as autograd and torch.compile see it: two autograd functions around three operators.

What a pass needs in its backward is in a :class:`Pass`. Traced code cannot hold one, nor touch what changes from step
to step; it hands on a *token* instead, a tensor with the pass's number, that the operators look up. The pass lives as
long as its token does: the graph has both.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops._library import register, unseen
from ..traced import copies, stand_ins
from .aggregation import Batch

if TYPE_CHECKING:
    from .layer import BayesAgg

_LAYERS: weakref.WeakValueDictionary[int, BayesAgg] = weakref.WeakValueDictionary()
_PASSES: weakref.WeakValueDictionary[int, Pass] = weakref.WeakValueDictionary()
_handles = itertools.count(1)
_tokens = itertools.count(1)


class Pass:
    """What its backward needs."""

    def __init__(self, number: int, batch: Batch | None):
        self.number = number
        self.batch = batch  # None: the gradient stays as it is (warm-up)
        self.scale: Tensor | None = None  # what BayesAgg.total's sum was multiplied by
        self.layer: BayesAgg | None = None


def known_as(layer: BayesAgg) -> int:
    """A number for the layer, which traced code has in its place."""
    handle = next(_handles)
    _LAYERS[handle] = layer
    return handle


@unseen
def _enter(features: Tensor, targets: Sequence[Tensor], latest: Tensor, layer: int, borrowed: bool = True) -> Tensor:
    entered = _LAYERS[layer]._enter(features, list(targets), borrowed)
    entered.layer = _LAYERS[layer]
    number = next(_tokens)
    latest.fill_(number)
    token = latest.clone()
    token._mtlgrad_pass = entered  # type: ignore[attr-defined]  # an attribute lives as long as the tensor, graphs or not
    _PASSES[number] = entered
    return token


def _pass_of(token: Tensor) -> Pass | None:
    return _PASSES.get(int(token))


@unseen
def _replace(gradient: Tensor, token: Tensor) -> Tensor:
    entered = _pass_of(token)
    if entered is None or entered.layer is None:
        raise RuntimeError(
            "BayesAgg: expected the pass that this backward belongs to, found it gone: something copies what compiled "
            "code saves for the backward (torch.autograd.graph.saved_tensors_hooks); keep the layer out of it"
        )
    return entered.layer._replacement(entered, gradient)


@unseen
def _record(gradient: Tensor, token: Tensor) -> Tensor:
    entered = _pass_of(token)
    if entered is not None:
        entered.scale = gradient.detach()
    return gradient


# Operators: results must be new tensors, and what they keep must be theirs.
_enter_op = register(
    "bayesagg_enter(Tensor features, Tensor[] targets, Tensor(a!) latest, int layer) -> Tensor",
    _enter,
    lambda features, targets, latest, layer: torch.empty_like(latest),
)
_replace_op = register(
    "bayesagg_replace(Tensor gradient, Tensor token) -> Tensor",
    lambda gradient, token: _replace(gradient, token).clone(memory_format=torch.contiguous_format),
    lambda gradient, token: gradient.new_empty(gradient.shape),
)
_record_op = register(
    "bayesagg_record(Tensor gradient, Tensor token) -> Tensor",
    lambda gradient, token: _record(gradient.clone(), token).clone(),
    lambda gradient, token: gradient.new_empty(gradient.shape),
)


def enter(features: Tensor, targets: list[Tensor], latest: Tensor, layer: int) -> Tensor:
    """The token of a new pass."""
    if torch.compiler.is_compiling():
        token: Tensor = _enter_op(features.detach(), [target.detach() for target in targets], latest, layer)
        return token
    return _enter(features, targets, latest, layer, borrowed=False)


class ReplaceGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, token: Tensor) -> Tensor:
        ctx.save_for_backward(features, token)  # autograd then refuses features that were changed in place since
        if not torch.compiler.is_compiling():
            ctx.entered = _pass_of(token)  # hooks on saved tensors may give back a copy
        return stand_ins(features, 1)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        _, token = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return _replace_op(gradient, token), None
        return _replace(gradient, token), None


class RecordScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, latest: Tensor) -> Tensor:
        total, token = copies([total, latest])  # together: what the forward does not need is made in the backward
        ctx.save_for_backward(token)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (token,) = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return _record_op(gradient, token), None
        return _record(gradient, token), None
