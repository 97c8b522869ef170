"""Losses to per-task gradients: one ``.jac`` a shared parameter, [T, *shape], TorchJD's convention.

``.jac`` is absent, never None, when there is none: ``del parameter.jac`` clears it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .ops.rows import dense

Losses = Sequence[Tensor | None] | Mapping[str, Tensor | None]


def named_losses(op: str, losses: Losses) -> tuple[list[str], list[Tensor | None]]:
    """Names for messages, and the losses in order; every one a scalar, or None for a task that is absent."""
    if isinstance(losses, Tensor):
        raise TypeError(
            f"{op}: losses: expected a sequence or a dict of scalar losses, one a task, found one tensor; "
            "use list(losses) for a tensor [T]"
        )
    if isinstance(losses, Mapping):
        names, values = [f"task {name!r}" for name in losses], list(losses.values())
    else:
        values = list(losses)
        names = [f"task {t}" for t in range(len(values))]
    if not values:
        raise ValueError(f"{op}: losses: expected at least one, found none")
    for name, loss in zip(names, values, strict=True):
        if loss is not None and not isinstance(loss, Tensor):
            raise TypeError(f"{op}: losses: expected a tensor for {name}, found {type(loss).__name__}")
        if loss is not None and loss.numel() != 1:
            raise ValueError(
                f"{op}: losses: expected a scalar for {name}, found shape {list(loss.shape)}; use loss.mean()"
            )
    return names, values


def parameter_list(op: str, name: str, parameters: Iterable[Tensor]) -> list[Tensor]:
    """The parameters that want gradients, each once."""
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    found = list(dict.fromkeys(parameters))
    for p in found:
        if not isinstance(p, Tensor):
            raise TypeError(f"{op}: {name}: expected tensors, found {type(p).__name__}; use module.parameters()")
        if p.requires_grad and not p.is_leaf:
            raise ValueError(f"{op}: {name}: expected leaf tensors, found the result of an operation {list(p.shape)}")
    wanted = [p for p in found if p.requires_grad]
    if not wanted:
        raise ValueError(f"{op}: {name}: expected at least one parameter that requires a gradient, found none")
    return wanted


def task_backward(
    losses: Losses,
    shared: Iterable[Tensor],
    *,
    features: Tensor | Sequence[Tensor] | None = None,
    retain_graph: bool = False,
) -> None:
    """Back-propagates every task's loss: shared parameters get ``.jac``, all others (the heads) ``.grad`` as usual.

    Both accumulate, so micro-batches add up. A parameter that a task does not reach has zeros in that task's row, and
    so has a task whose loss is constant (no labels in this batch, say) or None: neither is an error. If a pass raises,
    all ``.grad`` and ``.jac`` are as before.

    Args:
        losses: one scalar a task, in a sequence or a dict (whose order is the order of rows); None for an absent task.
        shared: the parameters whose gradients are kept apart, e.g. ``backbone.parameters()``. Those that require no
            gradient are left out.
        features: the backbone's output, [B, ...], or several such tensors, none computed from another, if the losses
            reach the shared parameters through them alone. Every head is then passed back once, to the features, and
            the backbone T times; without it the whole graph is, T times.
        retain_graph: keeps the graph for another backward.

    Raises:
        ValueError: a loss is not a scalar; a parameter's ``.jac`` is not of shape [T, *shape]; with ``features``, a
            loss reaches a shared parameter past them, or one of them is computed from another.

    Passes through the shared part are ordinary backwards: hooks on parameters and features run once per task,
    non-reentrant activation checkpointing works, and ``DistributedDataParallel`` needs ``no_sync()``. With ``features``
    the heads' gradients are accumulated here, without the hooks that follow an accumulation. T copies of the shared
    parameters' gradients are held.
    """
    op = "task_backward"
    names, values = named_losses(op, losses)
    parameters = parameter_list(op, "shared", shared)
    _check_jacobians(op, parameters, len(values))
    trunk = None if features is None else _trunk(op, features)
    heads: list[tuple[Tensor, Tensor]] = []
    if trunk is None:
        starts: list[_Start | None] = [None if loss is None or _constant(loss) else ([loss], [None]) for loss in values]
    else:
        starts = _through_heads(names, values, parameters, trunk, retain_graph, heads)
    last = max((t for t, start in enumerate(starts) if start is not None), default=-1)
    reached: list[set[int]] = [set() for _ in parameters]
    jacobians: list[Tensor | None] = [None] * len(parameters)
    others = dict.fromkeys(_leaves([tensor for start in starts if start is not None for tensor in start[0]], set()))
    for p in parameters:
        others.pop(p, None)
    with _added(list(others)), _set_aside(parameters):
        for t, start in enumerate(starts):
            if start is None:
                continue
            torch.autograd.backward(*start, retain_graph=retain_graph or t != last)
            for i, p in enumerate(parameters):
                if p.grad is None:
                    continue
                gradient = p.grad if p.grad.layout == torch.strided else p.grad.to_dense()
                if jacobians[i] is None:
                    jacobians[i] = _empty_rows(gradient, p, len(values))
                jacobians[i][t].copy_(gradient)  # type: ignore[index]
                reached[i].add(t)
                p.grad = None
    for p, gradient in heads:
        # Copied: it may be the gradient of another tensor too, as in a sum.
        p.grad = gradient.clone() if p.grad is None else p.grad.add_(gradient)
    for p, jacobian, tasks in zip(parameters, jacobians, reached, strict=True):
        if jacobian is None:
            if not hasattr(p, "jac"):
                p.jac = _empty_rows(p, p, len(values)).zero_()  # type: ignore[attr-defined]
            continue
        for t in range(len(values)):
            if t not in tasks:
                jacobian[t].zero_()
        if hasattr(p, "jac"):
            p.jac += jacobian
        else:
            p.jac = jacobian  # type: ignore[attr-defined]


def _empty_rows(gradient: Tensor, p: Tensor, tasks: int) -> Tensor:
    """[T, *shape], every row in the element order of the parameter (say, channels_last), as autograd's are."""
    if dense(p):
        return gradient.new_empty_strided((tasks, *p.shape), (p.numel(), *p.stride()))
    return gradient.new_empty(tasks, *p.shape)


_Start = tuple[list[Tensor], list[Any]]  # what a backward starts from: tensors and the gradients that come into them


def _constant(loss: Tensor | None) -> bool:
    return loss is None or not loss.requires_grad


@contextmanager
def _set_aside(tensors: Sequence[Tensor]) -> Iterator[None]:
    """No ``.grad`` inside; outside, what there was before."""
    kept = [t.grad for t in tensors]
    for t in tensors:
        t.grad = None
    try:
        yield
    finally:
        for t, gradient in zip(tensors, kept, strict=True):
            t.grad = gradient


@contextmanager
def _added(tensors: Sequence[Tensor]) -> Iterator[None]:
    """What becomes ``.grad`` inside is added to what there was, or dropped if the inside raises."""
    fresh: list[Tensor | None] = []
    with _set_aside(tensors):
        yield
        fresh = [t.grad for t in tensors]
    for t, gradient in zip(tensors, fresh, strict=True):
        if t.grad is None:
            t.grad = gradient
        elif gradient is not None:
            t.grad.add_(gradient)


@contextmanager
def _without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Hooks that the user put on the tensors wait: they would run on the way to the features and again from there."""
    hooks = [t._backward_hooks for t in tensors if t._backward_hooks]
    kept = [dict(some) for some in hooks]
    for some in hooks:
        some.clear()
    try:
        yield
    finally:
        for some, before in zip(hooks, kept, strict=True):
            some.update(before)


def _check_jacobians(op: str, parameters: list[Tensor], tasks: int) -> None:
    for i, p in enumerate(parameters):
        if not hasattr(p, "jac"):
            continue
        shape = list(p.jac.shape) if isinstance(p.jac, Tensor) else type(p.jac).__name__
        if shape != [tasks, *p.shape]:
            raise ValueError(
                f"{op}: shared: expected .jac of shape {[tasks, *p.shape]}, one row a task, found {shape} in parameter "
                f"{i}; clear it with `del parameter.jac`"
            )


def _trunk(op: str, features: Tensor | Sequence[Tensor]) -> list[Tensor]:
    trunk = [features] if isinstance(features, Tensor) else list(features)
    if not trunk:
        raise ValueError(f"{op}: features: expected at least one tensor, found none")
    for feature in trunk:
        if not isinstance(feature, Tensor) or feature.grad_fn is None:
            raise ValueError(
                f"{op}: features: expected tensors that the backbone computed with gradients, found "
                f"{'a tensor without a graph' if isinstance(feature, Tensor) else type(feature).__name__}"
            )
    trunk = list(dict.fromkeys(trunk))
    edges = {(feature.grad_fn, feature.output_nr) for feature in trunk}
    if len(trunk) > 1 and any(edge in edges for edge in _walk([feature.grad_fn for feature in trunk], set())):
        # What arrives at one would hold what comes through the other, and be counted twice.
        raise ValueError(
            f"{op}: features: expected tensors none of which is computed from another, found one that is; leave "
            "features out"
        )
    return trunk


def _through_heads(
    names: list[str],
    losses: list[Tensor | None],
    shared: list[Tensor],
    trunk: list[Tensor],
    retain_graph: bool,
    found: list[tuple[Tensor, Tensor]],
) -> list[_Start | None]:
    """One pass per head: its leaves' gradients go to `found`, what arrives at the features is where T passes start."""
    op = "task_backward"
    edges = {(feature.grad_fn, feature.output_nr) for feature in trunk}
    own = set(shared)
    starts: list[_Start | None] = []
    last = max((t for t, loss in enumerate(losses) if not _constant(loss)), default=-1)
    for t, loss in enumerate(losses):
        if loss is None or _constant(loss):
            starts.append(None)
            continue
        heads = _leaves([loss], edges)
        if past := own.intersection(heads):
            raise ValueError(
                f"{op}: features: expected the loss of {names[t]} to reach the shared parameters through the features "
                f"alone, found {len(past)} reached past them; leave features out"
            )
        # Not backward(inputs=...): that would run the features' own node too, once per head.
        with _without_hooks(trunk):
            gradients = torch.autograd.grad(
                loss, [*trunk, *heads], retain_graph=retain_graph or t != last, allow_unused=True
            )
        reached = [(f, g) for f, g in zip(trunk, gradients) if g is not None]
        starts.append(([f for f, _ in reached], [g for _, g in reached]) if reached else None)
        found += [(p, g) for p, g in zip(heads, gradients[len(trunk) :]) if g is not None]
    return starts


def _walk(nodes: Iterable[Any], stop: set[tuple[Any, int]]) -> Iterator[tuple[Any, int]]:
    """The edges of the graph behind the nodes, but for those in `stop` and what is behind these alone."""
    stack = list(nodes)
    seen = set(stack)
    while stack:
        for edge in stack.pop().next_functions:
            if edge[0] is None or edge in stop:
                continue
            yield edge
            if edge[0] not in seen:
                seen.add(edge[0])
                stack.append(edge[0])


def _leaves(tensors: Sequence[Tensor], edges: set[tuple[Any, int]]) -> list[Tensor]:
    """The leaves that the tensors were computed from without passing the edges."""
    found = dict.fromkeys(tensor for tensor in tensors if tensor.grad_fn is None)
    starts = [
        tensor.grad_fn for tensor in tensors if tensor.grad_fn and (tensor.grad_fn, tensor.output_nr) not in edges
    ]
    for node, _ in _walk(starts, edges):
        if node.name() == "torch::autograd::AccumulateGrad":
            found[node.variable] = None
    return list(found)
