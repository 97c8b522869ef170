"""Losses to per-task gradients: one ``.jac`` a shared parameter, [T, *shape], TorchJD's convention.

``.jac`` is absent, never None, when there is none: ``del parameter.jac`` clears it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .arguments import Losses, check_tensor, named_losses, parameter_list
from .graph import check_ordinary_autograd, edges_of, leaves_of, walk
from .ops.rows import dense
from .world.jacobians import check_averaged, check_reached, mark_averaged, still_averaged
from .world.ranks import Averaging, World, name_of, world_of
from .world.shards import check_kept, check_no_shards, check_synchronised, is_sharded, like_sharded, local

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_Start = tuple[list[Tensor], list[Any]]  # what a backward starts from: tensors and the gradients that come into them


class Rows:
    """What is known of the rows of ``.jac``, one object for all that a call of :func:`task_backward` made."""

    def __init__(self, tasks: Sequence[str] | None):
        self.tasks = None if tasks is None else tuple(tasks)  # names, where the losses had some
        self.spent = False  # whether a step has used them


def rows_of(jacobian: Tensor) -> Rows | None:
    """None of those that others made (TorchJD)."""
    return getattr(jacobian, "_rows", None)


def is_spent(jacobian: Tensor) -> bool:
    """Whether ``.jac`` is over and done with: an optimizer's step or a merge has used it, or a GradScaler has looked at
    it and went on to the next step."""
    rows, unscaled = rows_of(jacobian), getattr(jacobian, "_unscaled", None)
    if unscaled is not None and unscaled[0] == local(jacobian)._version and unscaled[1]() is None:
        return True
    return rows is not None and rows.spent


def order_of(op: str, tasks: Sequence[str], wanted: Sequence[str], whose: str) -> list[int] | None:
    """Return where in ``tasks`` each of ``wanted`` is; None: in their places."""
    if tuple(tasks) == tuple(wanted):
        return None
    if set(tasks) != set(wanted):
        raise ValueError(
            f"{op}: losses: expected the tasks of {whose}, {', '.join(map(str, wanted))}, found "
            f"{', '.join(map(str, tasks))}; give None for a task that is absent, and new tasks a new start"
        )
    return [list(tasks).index(task) for task in wanted]


def task_backward(
    losses: Losses,
    shared: Iterable[Tensor],
    *,
    features: Tensor | Sequence[Tensor] | None = None,
    retain_graph: bool = False,
    process_group: ProcessGroup | None = None,
) -> None:
    """Back-propagate every task's loss: shared parameters get ``.jac``, all others (the heads) ``.grad`` as usual.

    Both accumulate, so micro-batches add up; ``.jac`` that an optimizer's step (or a merge) has used since is started
    anew, whether or not it was cleared. A parameter that some tasks reach has zeros in the rows of the others, and so
    has a task whose loss is constant (no labels in this batch, say) or None: neither is an error. A parameter that no
    task reaches, on any rank, gets no ``.jac``, as it would get no ``.grad``. If a pass raises, all ``.grad`` and
    ``.jac`` are as before.

    Args:
        losses: one scalar a task, in a sequence or a dict; None for an absent task. A dict's order is the order of the
            rows, the first time: from then on rows belong to names, here, in an optimizer and in a merge.
        shared: the parameters whose gradients are kept apart, e.g. ``backbone.parameters()``. Those that require no
            gradient are left out.
        features: the backbone's output, [B, ...], or several such tensors, none computed from another, if the losses
            reach the shared parameters through them alone. Every head is then passed back once, to the features, and
            the backbone T times; without it the whole graph is, T times.
        retain_graph: keeps the graph for another backward.
        process_group: the ranks that train together; all, if not given and torch.distributed is initialised. What this
            call adds to ``.jac`` and to the heads' ``.grad`` is then the mean over them, as
            ``DistributedDataParallel`` would make it: wrap forward and this call in its ``no_sync()``. A task's rows
            travel while the next task's pass runs. A task without labels on one rank needs a loss of zero there that
            reaches its head, as :func:`mtlgrad.distributed.global_means` makes it.

    Raises:
        ValueError: a loss is not a scalar; a parameter's ``.jac`` is not of shape [T, *shape], or of other tasks; no
            loss reaches any shared parameter; with ``features``, a loss reaches a shared parameter past them, or one
            of them is computed from another, or the shared parameters are shards (FSDP2).
        RuntimeError: the ranks do not have losses for the same tasks, or do not reach the same heads; a hook took a
            shared parameter's gradient away.

    Passes through the shared part are ordinary backwards: hooks on parameters and features run once per task, and
    non-reentrant activation checkpointing works. With ``features`` the heads' gradients are accumulated here, without
    the hooks that follow an accumulation. T copies of the shared parameters' gradients are held, on several ranks one
    more while it travels. Parameters that ``fully_shard`` shards get a ``.jac`` that is sharded like them; FSDP2
    averages it. On several ranks gradients of ``nn.Parameter`` are averaged; other leaves (inputs) are each rank's own.
    """
    op = "task_backward"
    check_ordinary_autograd(op)
    names, values = named_losses(op, losses)
    parameters = parameter_list(op, "shared", shared)
    rows = Rows(list(losses) if isinstance(losses, Mapping) else None)
    orders = _check_jacobians(op, parameters, len(values), rows)
    sharded = any(map(is_sharded, parameters))
    if sharded and features is not None:
        raise ValueError(
            f"{op}: features: expected none, since the shared parameters are shards (fully_shard), found some; FSDP2 "
            "averages gradients in whole backward passes alone; leave features out"
        )
    group = name_of(op, process_group)
    world = world_of(group)
    check_averaged(op, [p.jac for p in orders], group)  # type: ignore[attr-defined]
    heads: dict[Tensor, Tensor] = {}
    starts: list[_Start | None]
    if features is None:
        starts = [None if loss is None or not loss.requires_grad else ([loss], [None]) for loss in values]
    else:
        trunk = _trunk(op, features)
        nodes = [loss.grad_fn for loss in values if loss is not None and loss.grad_fn is not None]
        check_no_shards(op, (node for node, _ in walk(nodes, edges_of(trunk))), world)
        starts = _through_heads(names, values, parameters, trunk, retain_graph, heads)
    leaves = leaves_of([tensor for start in starts if start is not None for tensor in start[0]], set())
    own = set(parameters)
    others = [leaf for leaf in leaves if leaf not in own]
    check_reached(op, names, [start is not None for start in starts], [*others, *heads], world, parameters[0])
    with _added(others, world), as_gradients(dict.fromkeys(parameters)):
        jacobians, reached = _passes(op, parameters, leaves, starts, retain_graph, world)
        if not any(reached) and any(start is not None for start in starts):
            raise ValueError(
                f"{op}: shared: expected parameters that the losses were computed from, found none among "
                f"{len(parameters)}; give the parameters of the backbone that made the features"
            )
    _add(heads, world.average_present(list(heads.values()), list(heads)))
    for p, jacobian, some in zip(parameters, jacobians, reached, strict=True):
        if p in orders:
            if some:
                order = orders[p]
                local(p.jac).add_(jacobian if order is None else jacobian[order])  # type: ignore[attr-defined]
        elif some:
            p.jac = like_sharded(jacobian, p, len(values)) if is_sharded(p) else jacobian  # type: ignore[attr-defined]
            p.jac._rows = rows  # type: ignore[attr-defined]
        elif hasattr(p, "jac"):
            del p.jac
    mark_averaged([p.jac for p, some in zip(parameters, reached) if some], group)  # type: ignore[attr-defined]


def _passes(
    op: str,
    parameters: list[Tensor],
    leaves: list[Tensor],
    starts: Sequence[_Start | None],
    retain_graph: bool,
    world: World,
) -> tuple[list[Tensor], list[bool]]:
    """Pass back each task's start; return what arrives at each parameter, [T, *shape], the mean over the ranks, and
    whether anything does, on any rank. Where no task has a graph, zeros do."""
    last = max((t for t, start in enumerate(starts) if start is not None), default=-1)
    jacobians: list[Tensor] = []
    averaging = Averaging(world)
    lost = set(parameters).intersection(leaves)
    reached = [last < 0] * len(parameters)
    sharded = silent = any(map(is_sharded, parameters))
    hooked = {p for p in parameters if p._post_accumulate_grad_hooks}
    for t, start in enumerate(starts):
        if start is not None:
            expected = hooked and hooked.intersection(leaves_of(start[0], set()))
            torch.autograd.backward(*start, retain_graph=retain_graph or t != last)
            if taken := [p for p in expected if p.grad is None]:
                raise RuntimeError(
                    f"{op}: shared: expected gradients that stay where they arrive, found {len(taken)} that a hook "
                    "(register_post_accumulate_grad_hook) took: it would step by each task's alone; remove the hook, "
                    "and step after this"
                )
            if sharded:
                silent &= all(p.grad is None for p in parameters)
                check_synchronised(op, silent and t == last, leaves)
        for i, p in enumerate(parameters):
            gradient = p.grad
            if gradient is not None:
                gradient = local(gradient) if gradient.layout == torch.strided else gradient.to_dense()
            if t == 0:
                jacobians.append(_empty_rows(local(p) if gradient is None else gradient, local(p), len(starts)))
            if gradient is None:
                jacobians[i][t].zero_()
                continue
            jacobians[i][t].copy_(gradient)
            p.grad, reached[i] = None, True
            lost.discard(p)
        if start is not None:
            averaging.wait()  # the last task's, which had this pass to travel: its copies are let go
            averaging.add(jacobian[t] for p, jacobian in zip(parameters, jacobians) if not is_sharded(p))
    averaging.wait()
    check_kept(op, lost)
    if world.size > 1:
        anywhere = torch.tensor(reached, dtype=torch.float32, device=parameters[0].device)
        reached = [count > 0.0 for count in world.sum_(anywhere).tolist()]
    return jacobians, reached


def _empty_rows(gradient: Tensor, p: Tensor, tasks: int) -> Tensor:
    """Make [T, *shape], every row in the element order of the parameter (say, channels_last), as autograd's are."""
    if dense(p):
        return gradient.new_empty_strided((tasks, *p.shape), (p.numel(), *p.stride()))
    return gradient.new_empty(tasks, *p.shape)


def reorder(jacobians: Iterable[Tensor], order: list[int]) -> None:
    """Put rows that are one call's in another order, in place."""
    fresh: Rows | None = None
    for jacobian in jacobians:
        rows = rows_of(jacobian)
        assert rows is not None
        assert rows.tasks is not None
        fresh = fresh or Rows([rows.tasks[i] for i in order])
        with still_averaged([jacobian]):
            local(jacobian).copy_(local(jacobian)[order])
        jacobian._rows = fresh  # type: ignore[attr-defined]


@contextmanager
def as_gradients(wanted: Mapping[Tensor, Tensor | None]) -> Iterator[None]:
    """Give tensors these for ``.grad`` inside, and outside what they had before."""
    kept = [t.grad for t in wanted]
    for t, gradient in wanted.items():
        t.grad = gradient
    try:
        yield
    finally:
        for t, gradient in zip(wanted, kept, strict=True):
            t.grad = gradient


@contextmanager
def _added(tensors: Sequence[Tensor], world: World) -> Iterator[None]:
    """Add what becomes ``.grad`` inside (its mean over the ranks) to what there was; drop it if the inside raises."""
    with as_gradients(dict.fromkeys(tensors)):
        yield
        fresh = world.average_present([t.grad for t in tensors], tensors)
    _add(tensors, fresh)


def _add(tensors: Iterable[Tensor], gradients: Iterable[Tensor | None]) -> None:
    for t, gradient in zip(tensors, gradients, strict=True):
        if gradient is not None:
            t.grad = gradient if t.grad is None else t.grad.add_(gradient)


@contextmanager
def _without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Let the user's hooks on the tensors wait: they would run on the way to the features and again from there."""
    hooks = [t._backward_hooks for t in tensors if t._backward_hooks]
    kept = [dict(some) for some in hooks]
    for some in hooks:
        some.clear()
    try:
        yield
    finally:
        for some, before in zip(hooks, kept, strict=True):
            some.update(before)


def _check_jacobians(op: str, parameters: list[Tensor], tasks: int, rows: Rows) -> dict[Tensor, list[int] | None]:
    """Return the parameters whose ``.jac`` is to be added to, and how the new rows have to be ordered for that."""
    orders: dict[Tensor, list[int] | None] = {}
    for i, p in enumerate(parameters):
        if not hasattr(p, "jac") or (isinstance(p.jac, Tensor) and is_spent(p.jac)):
            continue
        shape = list(p.jac.shape) if isinstance(p.jac, Tensor) else type(p.jac).__name__
        if shape != [tasks, *p.shape]:
            raise ValueError(
                f"{op}: shared: expected .jac of shape {[tasks, *p.shape]}, one row a task, found {shape} in parameter "
                f"{i}; clear it with `del parameter.jac`"
            )
        known = rows_of(p.jac)
        named = known is not None and known.tasks is not None and rows.tasks is not None
        orders[p] = order_of(op, rows.tasks, known.tasks, "the .jac that there is") if named else None  # type: ignore[arg-type, union-attr]
    return orders


def _trunk(op: str, features: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if hasattr(features, "last_hidden_state"):
        check_tensor(op, "features", features)
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
    edges = edges_of(trunk)
    if len(trunk) > 1 and any(edge in edges for edge in walk([feature.grad_fn for feature in trunk], set())):
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
    found: dict[Tensor, Tensor],
) -> list[_Start | None]:
    """Pass each loss back through its head: gradients of its leaves are added to `found`, and the T passes start from
    what comes to the features."""
    op = "task_backward"
    edges, own = edges_of(trunk), set(shared)
    starts: list[_Start | None] = [None] * len(losses)
    reaching = [(t, loss) for t, loss in enumerate(losses) if loss is not None and loss.requires_grad]
    for t, loss in reaching:
        heads = leaves_of([loss], edges)
        if past := own.intersection(heads):
            raise ValueError(
                f"{op}: features: expected the loss of {names[t]} to reach the shared parameters through the features "
                f"alone, found {len(past)} reached past them; leave features out"
            )
        # Not backward(inputs=...): that would run the features' own node too, once per head.
        with _without_hooks(trunk):
            gradients = torch.autograd.grad(
                loss, [*trunk, *heads], retain_graph=retain_graph or t != reaching[-1][0], allow_unused=True
            )
        reached = [(f, g) for f, g in zip(trunk, gradients) if g is not None]
        if reached:
            starts[t] = ([f for f, _ in reached], [g for _, g in reached])
        for p, gradient in zip(heads, gradients[len(trunk) :]):
            if gradient is not None:
                # Copied: it may be the gradient of another tensor too, as in a sum.
                found[p] = found[p].add_(gradient) if p in found else gradient.clone()
    return starts
