"""The ``mtlgrad::`` operator library and how an operation joins it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("mtlgrad", "DEF")


_Function = TypeVar("_Function", bound=Callable[..., Any])


def unseen(function: _Function) -> _Function:
    """Runs as it is, with all that it calls, also where torch.compile looks at every Python function.

    Kernels get pointers, of which Dynamo knows nothing: where it takes a function apart it lets go of tensors before
    the kernel has read or written them. As ``torch.compiler.disable``, without importing Dynamo (3 s). Goes under other
    decorators: their code is shared with functions of others.
    """
    frames = torch._C._dynamo.eval_frame
    if hasattr(frames, "set_code_exec_strategy"):  # torch from 2.7
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Defines the operator for the host and CUDA, with the shapes-only version that ``torch.compile`` traces.

    ``kernel`` itself picks the compiled code by the device of its arguments. Returns the operator.
    """
    name = schema.split("(")[0]

    # Inside an operator autocast would still turn the GEMMs before a kernel to half precision.
    @unseen
    @functools.wraps(kernel)
    def full_precision(*arguments: Any) -> Any:
        first = arguments[0]
        device_type = (first if isinstance(first, Tensor) else first[0]).device.type
        if not torch.is_autocast_enabled(device_type):
            return kernel(*arguments)
        with torch.autocast(device_type, enabled=False):
            return kernel(*arguments)

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, full_precision, "CPU")
    _LIBRARY.impl(name, full_precision, "CUDA")
    torch.library.register_fake(f"mtlgrad::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.mtlgrad, name).default
