"""Autograd: walks over its graph, and whether it is the ordinary one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Edges = set[tuple[Any, int]]  # nodes and the number of their output


def edges_of(tensors: Iterable[Tensor]) -> Edges:
    """Return where the tensors come from."""
    return {(tensor.grad_fn, tensor.output_nr) for tensor in tensors}


def walk(nodes: Iterable[Any], stop: Edges) -> Iterator[tuple[Any, int]]:
    """Yield the edges of the graph behind the nodes, but for those in `stop` and what is behind these alone."""
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


def leaves_of(tensors: Sequence[Tensor], stop: Edges) -> list[Tensor]:
    """Return the leaves that the tensors were computed from without passing the edges in `stop`."""
    found = dict.fromkeys(tensor for tensor in tensors if tensor.grad_fn is None)
    starts = [tensor.grad_fn for tensor in tensors if tensor.grad_fn and (tensor.grad_fn, tensor.output_nr) not in stop]
    for node, _ in walk(starts, stop):
        if node.name() == "torch::autograd::AccumulateGrad":
            found[node.variable] = None
    return list(found)


def goes_on(node: Any) -> bool:
    """Whether what this backward brings to a node goes on from there, and is not only looked at, as monitors do by
    torch.autograd.grad. None: a leaf, where it is kept."""
    behind = () if node is None else [following for following, _ in node.next_functions if following is not None]
    try:
        return not behind or any(map(torch._C._will_engine_execute_node, behind))
    except RuntimeError:  # torch refuses to tell of a leaf that torch.autograd.grad is to bring a gradient to
        return True


def in_a_trace() -> bool:
    """Whether this runs once for many: values and side effects of Python have no place there."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def check_ordinary_autograd(op: str) -> None:
    """Refuse torch.func's transforms: a backward's side effects (``.grad``, the tasks' weights) have no place there."""
    if torch._C._functorch.peek_interpreter_stack() is not None and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{op}: expected ordinary autograd, found a torch.func transform (grad, vjp, jacrev, vmap); use "
            "loss.backward() or torch.autograd.grad, with torch.func.functional_call where parameters are to be given"
        )
