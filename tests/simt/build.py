"""Builds what runs the CUDA sources without a GPU (see emulate.cmake) into build/simt; Ninja rebuilds what changed.

``python tests/simt/build.py _C`` builds the emulated extension, ``all`` the drivers under the sanitizers, too.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "simt" / str(sys.implementation.cache_tag)
VARIANTS = ("asan", "tsan")
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


@functools.cache  # what changes later Ninja sees
def _configure() -> None:
    import pybind11

    _run(
        *("cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja"),
        *("-DMTLGRAD_EMULATE=ON", f"-DPython_EXECUTABLE={sys.executable}"),
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    )


def build(target: str) -> Path:
    """The path of ``_C`` or ``DRIVER_VARIANT``, up to date; RuntimeError with the compiler's words if it fails."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:  # several pytest processes share the folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        _configure()
        _run("cmake", "--build", str(BUILD), "--target", target)
    return BUILD / (f"_C{sysconfig.get_config_var('EXT_SUFFIX')}" if target == "_C" else target)


if __name__ == "__main__":
    build(sys.argv[1])
