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

from ..ops import define_operator, hide_from_dynamo
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
        self.done = False  # its backward ran
        self.scale: Tensor | None = None  # what BayesAgg.total's sum was multiplied by
        self.layer: BayesAgg | None = None


def known_as(layer: BayesAgg) -> int:
    """A number for the layer, which traced code has in its place."""
    handle = next(_handles)
    _LAYERS[handle] = layer
    return handle


@hide_from_dynamo
def _record_batch(
    features: Tensor, targets: Sequence[Tensor], latest: Tensor, layer: int, count: bool, borrowed: bool = True
) -> Tensor:
    recorded = _LAYERS[layer]._record_batch(features, list(targets), borrowed, count)
    recorded.layer = _LAYERS[layer]
    number = next(_tokens)
    latest.fill_(number)
    token = latest.clone()
    token._mtlgrad_pass = recorded  # type: ignore[attr-defined]  # an attribute lives as long as the tensor, graphs or not
    _PASSES[number] = recorded
    return token


def _pass_of(token: Tensor) -> Pass | None:
    return _PASSES.get(int(token))


@hide_from_dynamo
def _replace(gradient: Tensor, token: Tensor) -> Tensor:
    recorded = _pass_of(token)
    if recorded is None or recorded.layer is None:
        raise RuntimeError(
            "BayesAgg: expected the pass that this backward belongs to, found it gone: something copies what compiled "
            "code saves for the backward (torch.autograd.graph.saved_tensors_hooks); keep the layer out of it"
        )
    return recorded.layer._replacement(recorded, gradient)


@hide_from_dynamo
def _record_scale(gradient: Tensor, token: Tensor) -> Tensor:
    recorded = _pass_of(token)
    if recorded is not None:
        recorded.scale = gradient.detach()
    return gradient


# Operators: results must be new tensors, and what they keep must be theirs.
_record_batch_op = define_operator(
    "bayesagg_record_batch(Tensor features, Tensor[] targets, Tensor(a!) latest, int layer, bool count) -> Tensor",
    _record_batch,
    lambda features, targets, latest, layer, count: torch.empty_like(latest),
)
_replace_op = define_operator(
    "bayesagg_replace(Tensor gradient, Tensor token) -> Tensor",
    lambda gradient, token: _replace(gradient, token).clone(memory_format=torch.contiguous_format),
    lambda gradient, token: gradient.new_empty(gradient.shape),
)
_record_scale_op = define_operator(
    "bayesagg_record_scale(Tensor gradient, Tensor token) -> Tensor",
    lambda gradient, token: _record_scale(gradient.clone(), token).clone(),
    lambda gradient, token: gradient.new_empty(gradient.shape),
)


def record_batch(features: Tensor, targets: list[Tensor], latest: Tensor, layer: int, count: bool) -> Tensor:
    """Return the token of a new pass."""
    if torch.compiler.is_compiling():
        token: Tensor = _record_batch_op(
            features.detach(), [target.detach() for target in targets], latest, layer, count
        )
        return token
    return _record_batch(features, targets, latest, layer, count, borrowed=False)


class ReplaceGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, token: Tensor) -> Tensor:
        ctx.save_for_backward(features, token)  # autograd then refuses features that were changed in place since
        if not torch.compiler.is_compiling():
            ctx.recorded = _pass_of(token)  # hooks on saved tensors may give back a copy
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
            return _record_scale_op(gradient, token), None
        return _record_scale(gradient, token), None
