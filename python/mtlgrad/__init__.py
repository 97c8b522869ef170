"""mtlgrad: merges the gradients of several tasks that share one backbone."""

from .ops._native import build_info

__version__ = "0.1.0"

__all__ = ["__version__", "build_info"]
