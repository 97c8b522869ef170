"""Losses to per-task gradients: one ``.jac`` a shared parameter, [T, *shape], TorchJD's convention.

``.jac`` is absent, never None, when there is none: ``del parameter.jac`` clears it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed.collectives import Averaging, average_present, check_same, norm_bounds
from .distributed.groups import Ranks, name_of, ranks_of
from .distributed.jacobians import check_averaged, mark_averaged
from .distributed.shards import is_sharded, like_sharded, local
from .ops.checks import check_ordinary_autograd
from .ops.rows import dense

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ALIKE = 1e-3  #: relative; the same training leaves other last digits on another kind of machine

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
    process_group: ProcessGroup | None = None,
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
        process_group: the ranks that train together; all, if not given and torch.distributed is initialised. What this
            call adds to ``.jac`` and to the heads' ``.grad`` is then the mean over them, as
            ``DistributedDataParallel`` would make it: wrap forward and this call in its ``no_sync()``. A task's rows
            travel while the next task's pass runs. A task without labels on one rank needs a loss of zero there that
            reaches its head, as :func:`mtlgrad.distributed.global_means` makes it.

    Raises:
        ValueError: a loss is not a scalar; a parameter's ``.jac`` is not of shape [T, *shape]; with ``features``, a
            loss reaches a shared parameter past them, or one of them is computed from another, or the shared
            parameters are shards (FSDP2).
        RuntimeError: the ranks do not have losses for the same tasks, or do not reach the same heads.

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
    _check_jacobians(op, parameters, len(values))
    sharded = any(map(is_sharded, parameters))
    if sharded and features is not None:
        raise ValueError(
            f"{op}: features: expected none, since the shared parameters are shards (fully_shard), found some; FSDP2 "
            "averages gradients in whole backward passes alone; leave features out"
        )
    group = name_of(op, process_group)
    ranks = ranks_of(group)
    check_averaged(op, [p.jac for p in parameters if hasattr(p, "jac")], group)
    trunk = None if features is None else _trunk(op, features)
    heads: dict[Tensor, Tensor] = {}
    if trunk is None:
        starts: list[_Start | None] = [None if loss is None or _constant(loss) else ([loss], [None]) for loss in values]
    else:
        if ranks is not None:
            _check_no_fsdp(op, values, trunk)
        starts = _through_heads(names, values, parameters, trunk, retain_graph, heads)
    leaves = _leaves([tensor for start in starts if start is not None for tensor in start[0]], set())
    own = set(parameters)
    others = [leaf for leaf in leaves if leaf not in own]
    if ranks is not None:
        reached: list[Tensor] = [leaf for leaf in [*others, *heads] if isinstance(leaf, nn.Parameter)]
        _check_tasks(op, names, starts, reached, ranks, parameters[0].device)
    with _added(others, ranks), _set_aside(parameters):
        jacobians = _passes(op, parameters, leaves, starts, retain_graph, ranks)
    for p, gradient in zip(heads, _averaged(list(heads.values()), list(heads), ranks), strict=True):
        if gradient is not None:
            p.grad = gradient if p.grad is None else p.grad.add_(gradient)
    for p, jacobian in zip(parameters, jacobians, strict=True):
        if hasattr(p, "jac"):
            local(p.jac).add_(jacobian)
        else:
            p.jac = like_sharded(jacobian, p, len(values)) if is_sharded(p) else jacobian  # type: ignore[attr-defined]
    if ranks is not None:
        mark_averaged([p.jac for p in parameters], group)  # type: ignore[attr-defined]


def _passes(
    op: str,
    parameters: list[Tensor],
    leaves: list[Tensor],
    starts: Sequence[_Start | None],
    retain_graph: bool,
    ranks: Ranks | None,
) -> list[Tensor]:
    """One pass a task; what arrives at each parameter, [T, *shape], the mean over the ranks if there are any."""
    last = max((t for t, start in enumerate(starts) if start is not None), default=-1)
    jacobians: list[Tensor | None] = [None] * len(parameters)
    averaging = None if ranks is None else Averaging(ranks)
    lost = set(parameters).intersection(leaves) if dist.is_available() and dist.is_initialized() else set()
    sharded = silent = any(map(is_sharded, parameters))
    rest: list[tuple[int, int]] = []  # rows that no gradient came for
    for t, start in enumerate(starts):
        if start is not None:
            torch.autograd.backward(*start, retain_graph=retain_graph or t != last)
            if sharded:
                silent &= all(p.grad is None for p in parameters)
                _check_synchronised(op, silent and t == last, leaves)
        for i, p in enumerate(parameters):
            if p.grad is None:
                rest.append((i, t))
                continue
            gradient = local(p.grad) if p.grad.layout == torch.strided else p.grad.to_dense()
            if jacobians[i] is None:
                jacobians[i] = _empty_rows(gradient, local(p), len(starts))
            jacobians[i][t].copy_(gradient)  # type: ignore[index]
            p.grad = None
            lost.discard(p)
        if averaging is not None and start is not None:
            found = _rows_of(jacobians, parameters, rest, len(starts))
            averaging.wait()  # the last task's, which had this pass to travel: its copies are let go
            averaging.add([jacobian[t] for p, jacobian in zip(parameters, found) if not is_sharded(p)])
    found = _rows_of(jacobians, parameters, rest, len(starts))
    if averaging is not None:
        averaging.wait()
    _check_kept(op, lost)
    return found


def _check_kept(op: str, lost: set[Tensor]) -> None:
    """From the moment a module is computed FSDP2 has other parameters in the place of its shards, takes their gradients
    away and frees them: they would seem to be zero."""
    if any(p.numel() and not is_sharded(p) and not p.untyped_storage().size() for p in lost):
        raise ValueError(
            f"{op}: shared: expected parameters that keep their gradients, found {len(lost)} that fully_shard put in "
            "the place of its shards for a while; make the list before the model is called: "
            "shared = list(backbone.parameters())"
        )


def _check_synchronised(op: str, silent: bool, leaves: list[Tensor]) -> None:
    """Without synchronisation FSDP2 leaves gradients with what it put in the place of the shards, whose memory is
    mostly freed by now; the shards' own would seem to be zero."""
    if silent or any(t.grad is not None and t.numel() and not t.untyped_storage().size() for t in leaves):
        raise RuntimeError(
            f"{op}: shared: expected shards whose gradients are synchronised in every pass, found some without; leave "
            "set_requires_gradient_sync(False) and accelerator.no_sync out: micro-batches add up in .jac as they are"
        )


def _check_no_fsdp(op: str, losses: list[Tensor | None], trunk: list[Tensor]) -> None:
    edges = {(feature.grad_fn, feature.output_nr) for feature in trunk}
    nodes = [loss.grad_fn for loss in losses if loss is not None and loss.grad_fn is not None]
    if any(node.name().startswith("RegisterPostBackwardFunction") for node, _ in walk(nodes, edges)):
        raise ValueError(
            f"{op}: features: expected none, since a head is sharded (fully_shard), found some; FSDP2 averages "
            "gradients in whole backward passes alone; leave features out"
        )


def _rows_of(
    jacobians: list[Tensor | None], parameters: list[Tensor], rest: list[tuple[int, int]], tasks: int
) -> list[Tensor]:
    """All of them, with zeros in the rows of `rest`."""
    for i, t in rest:
        jacobian = jacobians[i]
        if jacobian is None:
            jacobians[i] = _empty_rows(local(parameters[i]), local(parameters[i]), tasks).zero_()
        else:
            jacobian[t].zero_()
    rest.clear()
    return cast("list[Tensor]", jacobians)


def _check_tasks(
    op: str, names: list[str], starts: Sequence[_Start | None], heads: list[Tensor], ranks: Ranks, device: torch.device
) -> None:
    """Ranks that reach other heads would wait for each other."""
    present = [name for name, start in zip(names, starts, strict=True) if start is not None]
    shapes = " ".join("x".join(map(str, p.shape)) or "1" for p in heads)
    found = f"{', '.join(present) or 'none'} ({len(heads)} parameters of heads: {shapes})"
    hint = (
        "where a task has no labels give a loss of zero that is computed from its head "
        "(mtlgrad.distributed.global_means makes it)"
    )
    check_same(op, "tasks with a loss", found, hint, ranks, device)
    # Not of what fully_shard has freed for now.
    known = [p for p in heads if not is_sharded(p) and (p.untyped_storage().size() or not p.numel())]
    if known:
        least, most = norm_bounds(known, ranks)
        if bool((most - least > ALIKE * most).any()):
            raise RuntimeError(
                f"{op}: losses: expected to reach the same heads in the same order on all ranks, found others of the "
                "same shapes, or parameters that have drifted apart; start from the same parameters, and let every "
                "rank compute all heads"
            )


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


def _averaged(gradients: list[Tensor | None], leaves: Sequence[Tensor], ranks: Ranks | None) -> list[Tensor | None]:
    """Means over the ranks of the parameters' gradients. Other leaves (inputs) are each rank's own."""
    if ranks is None:
        return gradients
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, nn.Parameter)]
    means = average_present([gradients[i] for i in places], [leaves[i] for i in places], ranks)
    for i, mean in zip(places, means, strict=True):
        gradients[i] = mean
    return gradients


@contextmanager
def _added(tensors: Sequence[Tensor], ranks: Ranks | None) -> Iterator[None]:
    """What becomes ``.grad`` inside (its mean over the ranks) is added to what there was, or dropped if the inside
    raises."""
    fresh: list[Tensor | None] = []
    with _set_aside(tensors):
        yield
        fresh = [t.grad for t in tensors]
        fresh = _averaged(fresh, tensors, ranks)
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
    """One pass per head: its leaves' gradients are added to `found`; T passes start from what came to the features."""
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
        for p, gradient in zip(heads, gradients[len(trunk) :]):
            if gradient is not None:
                # Copied: it may be the gradient of another tensor too, as in a sum.
                found[p] = found[p].add_(gradient) if p in found else gradient.clone()
    return starts


def walk(nodes: Iterable[Any], stop: set[tuple[Any, int]]) -> Iterator[tuple[Any, int]]:
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
    for node, _ in walk(starts, edges):
        if node.name() == "torch::autograd::AccumulateGrad":
            found[node.variable] = None
    return list(found)
