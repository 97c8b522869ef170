"""The one door to the compiled kernels: nothing outside ``mtlgrad.ops`` imports ``_C``."""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

import torch  # before _C: it brings the libgomp.so.1 that _C is to share

_PACKAGE = __name__.partition(".")[0]

try:
    _C: Any = importlib.import_module(f"{_PACKAGE}._C")
except ModuleNotFoundError as error:
    if error.name != f"{_PACKAGE}._C":
        raise
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    raise ImportError(
        f"{_PACKAGE}: the compiled kernels are not in {folder}; this is a source tree that was never built: "
        "run `pip install .` at its root, and leave it off PYTHONPATH"
    ) from None
except ImportError as error:
    raise ImportError(
        f"{_PACKAGE}: the compiled kernels cannot be loaded ({error}); build them again: "
        f"pip install --force-reinstall --no-deps {_PACKAGE}"
    ) from None


# By device type; tests of the CUDA sources without a GPU put their emulated kernels in place of the host's.
KERNELS: dict[str, ModuleType | None] = {"cpu": _C.cpu, "cuda": _C.cuda if _C.cuda_compiled else None}


def launch_place(device: torch.device) -> tuple[int, int, int]:
    """Return (threads, stream, device index). The stream is read at every call: a CUDA graph capture changes it."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return 1, torch._C._cuda_getCurrentRawStream(index), index
    return torch.get_num_threads(), 0, 0


def _device_problem() -> str | None:
    """Why no CUDA device can be used, or None. Touches the driver."""
    if not _C.cuda_compiled:
        return "built without the CUDA kernels (no nvcc was found, or MTLGRAD_CUDA=OFF)"
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    if error := _C.cuda_device_error():
        return str(error)
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    oldest = min(int(arch.partition("-")[0]) for arch in _C.cuda_archs.split())
    if capability < oldest:
        return f"{torch.cuda.get_device_name()} is sm_{capability}, the kernels need sm_{oldest} or newer"
    return None


def build_info() -> dict[str, Any]:
    """Tell what was compiled in, and what this process can use. Touches the CUDA driver (importing mtlgrad does not).

    Returns:
        version, torch, compiler, openmp, threads, cuda_compiled, cuda_archs, nvcc and cudart; ``device``, the name of
        the CUDA device that can be used; where there is none it is None and ``device_problem`` says why.
    """
    problem = _device_problem()
    return {
        "version": importlib.import_module(_PACKAGE).__version__,
        "torch": str(torch.__version__),
        "compiler": _C.compiler,
        "openmp": _C.openmp or None,
        "threads": torch.get_num_threads(),
        "cuda_compiled": _C.cuda_compiled,
        "cuda_archs": _C.cuda_archs or None,
        "nvcc": _C.nvcc or None,
        "cudart": _C.cuda_runtime_version() if _C.cuda_compiled else None,
        "device": torch.cuda.get_device_name() if problem is None else None,
        "device_problem": problem,
    }
