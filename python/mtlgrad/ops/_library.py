"""The ``mtlgrad::`` operator library and how an operation joins it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("mtlgrad", "DEF")


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Defines the operator for the host and CUDA, with the shapes-only version that ``torch.compile`` traces.

    ``kernel`` itself picks the compiled code by the device of its arguments. Returns the operator.
    """
    name = schema.split("(")[0]

    # Inside an operator autocast would still turn the GEMMs before a kernel to half precision.
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
