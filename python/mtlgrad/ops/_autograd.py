"""Derivatives of the operations: the kernels go forward, the reference's derivative comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _ViaReference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Callable[..., Any], reference: Callable[..., Any], *tensors: Tensor) -> Any:
        ctx.reference = reference
        ctx.save_for_backward(*tensors)
        return op(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        tensors = ctx.saved_tensors
        active = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]

        def reference(*some: Tensor) -> Any:
            full = list(tensors)
            for i, tensor in zip(active, some):
                full[i] = tensor
            return ctx.reference(*full)

        like, pull_back, *_ = torch.func.vjp(reference, *(tensors[i] for i in active))
        found = pull_back(gradients if isinstance(like, tuple) else gradients[0])
        result: list[Tensor | None] = [None] * len(tensors)
        for i, gradient in zip(active, found):
            result[i] = gradient
        return None, None, *result


def differentiable(op: Callable[..., Any], reference: Callable[..., Any], *tensors: Tensor) -> Any:
    """``op(*tensors)`` with the derivative of ``reference(*tensors)``; the op alone where none is wanted."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _ViaReference.apply(op, reference, *tensors)
    return op(*tensors)
