"""What a stranger meets first: building, installing and importing the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import mtlgrad

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_import_touches_no_cuda_and_is_light() -> None:
    result = python(
        "import sys, torch\n"
        "import mtlgrad\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = {'accelerate', 'lightning', 'matplotlib', 'rich', 'tensorboard', 'torch._dynamo', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_citation_has_the_version() -> None:
    assert re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M) == [mtlgrad.__version__]


def test_build_info() -> None:
    info = mtlgrad.build_info()
    assert info["version"] == mtlgrad.__version__
    assert (info["device"] is None) == bool(info["device_problem"])
    assert json.loads(json.dumps(info)) == info
    if not torch.cuda.is_available():
        assert info["device"] is None
    if not info["cuda_compiled"]:
        assert "without the CUDA kernels" in info["device_problem"]


@pytest.mark.skipif(
    not (Path(torch.__file__).parent / "lib" / "libgomp.so.1").exists() or not mtlgrad.build_info()["openmp"],
    reason="this torch does not ship libgomp.so.1, or mtlgrad is built without OpenMP",
)
def test_shares_the_openmp_library_of_torch() -> None:
    result = python("import mtlgrad\nprint(open('/proc/self/maps').read())")
    libraries = {line.split()[-1] for line in result.stdout.splitlines() if "libgomp" in line}
    assert libraries == {str(Path(torch.__file__).parent / "lib" / "libgomp.so.1")}


def test_source_tree_that_was_never_built(tmp_path: Path) -> None:
    # Under another name, since an editable install of mtlgrad comes before PYTHONPATH.
    shutil.copytree(ROOT / "python" / "mtlgrad", tmp_path / "unbuilt", ignore=shutil.ignore_patterns("*.so", "*.npz"))
    result = python("import unbuilt", cwd=tmp_path)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: unbuilt: the compiled kernels are not in")
    assert "pip install ." in last


def test_no_compiler(tmp_path: Path) -> None:
    cmake, ninja = (
        shutil.which(tool, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") for tool in ("cmake", "ninja")
    )
    assert cmake
    assert ninja
    (tmp_path / "bin").mkdir()
    environment = {key: value for key, value in os.environ.items() if key not in ("CC", "CXX", "CUDACXX")}
    result = subprocess.run(
        [cmake, "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"],
        env={**environment, "PATH": str(tmp_path / "bin")},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    [line] = [line for line in result.stderr.splitlines() if "mtlgrad:" in line]
    assert "no C++ compiler found" in line
    assert "apt install g++" in line


@pytest.mark.slow
def test_sdist_builds_a_complete_wheel(tmp_path: Path) -> None:
    made = python(f"from scikit_build_core.build import build_sdist; build_sdist({str(tmp_path)!r})", cwd=ROOT)
    assert made.returncode == 0, made.stderr
    [sdist] = tmp_path.glob("*.tar.gz")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    built = subprocess.run(
        # what is in it is the question, not how fast it is
        [
            *command,
            "--config-settings=cmake.define.MTLGRAD_CUDA=OFF",
            "--config-settings=cmake.build-type=None",
            str(sdist),
        ],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"mtlgrad"}
    installed = {name for name in names if name.startswith("mtlgrad/")}
    package = ROOT / "python"
    assert {
        str(p.relative_to(package)) for p in package.rglob("*") if p.suffix in (".py", ".typed", ".npz")
    } <= installed
    assert sum(name.startswith("mtlgrad/_C.") for name in installed) == 1
