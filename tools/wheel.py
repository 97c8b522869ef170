"""Makes a wheel in dist/ and checks it: ``make wheel``.

In a clean environment for each torch: tools/wheel_probe.py, and the tests of the operations but for emulated kernels,
which are not in the wheel.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ["adatask", "align", "combine", "contract", "displace", "moments", "rules"]
# auditwheel looks for patchelf on PATH; of Python's own variables PYTHONPATH above all must not get through.
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
ENVIRONMENT["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    subprocess.run(command, cwd=cwd, env=ENVIRONMENT, check=True)


def make(cuda: bool) -> Path:
    """The path of a new wheel in dist/, built as pip does it for a user, with the platform tag that it deserves."""
    option = "MTLGRAD_REQUIRE_CUDA=ON" if cuda else "MTLGRAD_CUDA=OFF"
    with tempfile.TemporaryDirectory() as temporary:
        built, repaired = Path(temporary, "built"), Path(temporary, "repaired")
        pip = (sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps")
        run(*pip, f"--config-settings=cmake.define.{option}", "--wheel-dir", built, ROOT)
        [wheel] = built.iterdir()
        run("auditwheel", "show", wheel)
        run("auditwheel", "repair", "--exclude", "libgomp.so.1", "--wheel-dir", repaired, wheel)
        [wheel] = repaired.iterdir()
        (ROOT / "dist").mkdir(exist_ok=True)
        return Path(shutil.copy(wheel, ROOT / "dist"))


def check(wheel: Path, torch: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        venv.create(folder, symlinks=True)
        python = folder / "bin" / "python"
        pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
        run(*pip, wheel, torch, "pytest", "hypothesis")
        run(python, "-I", "-W", "error", ROOT / "tools" / "wheel_probe.py", cwd=folder)
        tests = [ROOT / "tests" / "ops" / f"test_{name}.py" for name in TESTS]
        pytest = (python, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "-k", "not emulated")
        run(*pytest, *tests, cwd=folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", action="store_true", help="with the CUDA kernels, for which nvcc has to be on PATH")
    parser.add_argument(
        "--torch",
        nargs="+",
        default=["torch==2.13.0", "torch"],
        metavar="REQUIREMENT",
        help="which torch to check it under, as pip takes it (default: %(default)s; 'torch' is the newest)",
    )
    arguments = parser.parse_args()
    wheel = make(arguments.cuda)
    print(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
    for torch in arguments.torch:
        print(f"\n== {wheel.name} under {torch}", flush=True)
        check(wheel, torch)


if __name__ == "__main__":
    main()
