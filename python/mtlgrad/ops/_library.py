"""The ``mtlgrad::`` operator library and how an operation joins it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("mtlgrad", "DEF")


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Defines the operator for the host and CUDA, with the shapes-only version that ``torch.compile`` traces.

    ``kernel`` itself picks the compiled code by the device of its arguments. Returns the operator.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, kernel, "CPU")
    _LIBRARY.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"mtlgrad::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.mtlgrad, name).default
