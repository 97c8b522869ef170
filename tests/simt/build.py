"""Builds what runs the CUDA sources without a GPU (see emulate.cmake) into build/simt; Ninja rebuilds what changed.

``python tests/simt/build.py`` builds everything: the emulated extension, and the drivers under all sanitizers.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "simt" / str(sys.implementation.cache_tag)
VARIANTS = ("plain", "asan", "tsan")
DRIVERS = tuple(sorted(path.stem for path in Path(__file__).parent.glob("test_*.cpp")))


def _run(*command: str) -> None:
    # The tools of this environment first: cmake and ninja come with mtlgrad[test].
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which(command[0], path=path)
    if program is None:
        raise RuntimeError(f"{command[0]} is needed to build the emulated CUDA kernels: pip install 'mtlgrad[test]'")
    result = subprocess.run([program, *command[1:]], env={**os.environ, "PATH": path}, capture_output=True, text=True)
    if result.returncode:
        output = (result.stdout + result.stderr)[-6000:]
        raise RuntimeError(f"building the emulated CUDA kernels failed: {' '.join(command)}\n{output}")


def build(target: str) -> Path:
    """The path of ``_C`` or ``DRIVER_VARIANT``, up to date; RuntimeError with the compiler's words if it fails."""
    import pybind11

    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:  # several pytest processes share the folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        _run(
            *("cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja"),
            *("-DMTLGRAD_EMULATE=ON", f"-DPython_EXECUTABLE={sys.executable}"),
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        )
        _run("cmake", "--build", str(BUILD), "--target", target)
    return BUILD / (f"_C{sysconfig.get_config_var('EXT_SUFFIX')}" if target == "_C" else target)


if __name__ == "__main__":
    build("all")
