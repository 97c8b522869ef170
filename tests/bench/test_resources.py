"""No CUDA kernel spills registers or has a stack: the compiler says so. It needs nvcc, no GPU."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench import resources
from bench.resources import Kernel, ResourceError, launch_bounds, parse, rows_of, short

try:
    NVCC = resources.compiler()
except ResourceError:
    NVCC = ""
needs_nvcc = pytest.mark.skipif(not NVCC, reason="no nvcc")
REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5plainPf' for 'sm_90'
ptxas info    : Function properties for _Z5plainPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 1 barriers, 4096 bytes smem, 384 bytes cmem[0]
ptxas info    : Compile time = 3.108 ms
ptxas info    : Function properties for __internal_accurate_pow
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_Z5spillPf' for 'sm_90'
ptxas info    : Function properties for _Z5spillPf
    424 bytes stack frame, 404 bytes spill stores, 1512 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 424 bytes cumulative stack size
"""
SPILLS = """
extern "C" __global__ void __launch_bounds__(1024) spiller(float* x) {
  float v[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) x[i * 1024 + threadIdx.x] = v[i] + i * v[(i + 1) % 96];
}
extern "C" __global__ void __launch_bounds__(64) indexed(float* x, int k) {
  float v[64];
  for (int i = 0; i < 64; ++i) v[i * k % 64] = x[i];
  x[threadIdx.x] = v[threadIdx.x];
}
extern "C" __global__ void __launch_bounds__(32, 2) plain(float* x) { x[threadIdx.x] += 1.0f; }
"""


def kernel(**changed: int) -> Kernel:
    fields = {"threads": 128, "registers": 32, "spill_stores": 0, "spill_loads": 0, "stack": 0, "static_shared": 0}
    return Kernel("k", "k.cu", "sm_90", **(fields | changed))


def complaints(kernels: Sequence[Kernel]) -> list[str]:
    return [
        f"{k.kernel} ({k.source}, {k.arch}): {k.spill_stores} bytes spilled, {k.spill_loads} read back, stack {k.stack}"
        for k in kernels
        if not k.clean
    ]


@needs_nvcc
@pytest.mark.slow
def test_extension(tmp_path: Path) -> None:
    """One test for one build: no kernel spills, none is left out, and what they are linked into can be imported."""
    command = [sys.executable, "-m", "bench.resources", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=resources.ROOT, capture_output=True, text=True)
    everything = resources.collect()
    assert not complaints(everything)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "resources_cuda.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(everything)
    assert all(row[name] for row in rows for name in ("date", "machine", "nvcc", "commit", "kernel", "source", "arch"))

    # every source with a kernel, for every architecture, each with its name and its block's size
    with_kernels = {
        path.stem for path in (resources.ROOT / "csrc" / "cuda").glob("*.cuh") if "__global__" in path.read_text()
    }
    found = {(k.source.removesuffix(".cu"), k.arch) for k in everything}
    assert found == {(stem, arch) for stem in with_kernels for arch in resources.ARCHITECTURES}
    by_arch = [{k.kernel for k in everything if k.arch == arch} for arch in resources.ARCHITECTURES]
    assert by_arch[0] == by_arch[1]
    assert len(by_arch[0]) == len(everything) / 2, "two kernels have one name"
    assert all(k.kernel.partition("<")[0].endswith("_kernel") for k in everything)
    assert all(0 < k.threads <= 1024 and k.registers > 0 for k in everything)
    assert all(k.resident_threads >= k.threads for k in everything), "a block does not fit a multiprocessor"

    code = "import torch, _C; print(_C.cuda_compiled, _C.cuda_archs, _C.cuda_device_count() >= 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=resources.BUILD, capture_output=True, text=True)
    assert done.stdout == "True 80-real 90-real True\n", done.stderr


@needs_nvcc
@pytest.mark.parametrize("arch", list(resources.ARCHITECTURES))
def test_sees_real_spills(arch: str, tmp_path: Path) -> None:
    source = tmp_path / "spills.cu"
    source.write_text(SPILLS)
    command = [NVCC, f"-arch={arch}", "-cubin", "-Xptxas=-v", "--keep", f"--keep-dir={tmp_path}", str(source)]
    report = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stderr
    [ptx] = tmp_path.glob("*.ptx")
    found = {k.kernel: k for k in parse(report, source.name, launch_bounds(ptx.read_text()))}
    assert found["spiller"].spill_stores > 0
    assert found["spiller"].spill_loads > 0
    assert found["spiller"].registers <= 64
    assert found["indexed"].stack >= 256
    assert found["plain"].clean
    assert {k.arch for k in found.values()} == {arch}
    assert {name: k.threads for name, k in found.items()} == {"spiller": 1024, "indexed": 64, "plain": 32}
    assert len(complaints(list(found.values()))) == 2


@needs_nvcc
def test_build_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "CMakeLists.txt").write_text('message(FATAL_ERROR "planted")')
    monkeypatch.setattr(resources, "ROOT", tmp_path)
    monkeypatch.setattr(resources, "BUILD", tmp_path / "build")
    with pytest.raises(ResourceError, match=r"expected the kernels to compile, found: [\s\S]*planted"):
        resources.collect()


def test_parse() -> None:
    plain, spill = parse(REPORT, "x.cu", {"_Z5plainPf": 256})
    assert plain == Kernel("_Z5plainPf", "x.cu", "sm_90", 256, 24, 0, 0, 0, 4096)
    assert spill == Kernel("_Z5spillPf", "x.cu", "sm_90", 0, 255, 404, 1512, 424, 0)
    assert complaints([plain, spill]) == ["_Z5spillPf (x.cu, sm_90): 404 bytes spilled, 1512 read back, stack 424"]


@pytest.mark.parametrize("planted", ["8 bytes stack frame, 0", "0 bytes stack frame, 4"])
def test_parse_sees_what_is_planted(planted: str) -> None:
    kernels = parse(REPORT.replace("0 bytes stack frame, 0", planted, 1), "x.cu")
    assert [k.clean for k in kernels] == [False, False]


@pytest.mark.parametrize("lost", ["Used 24 registers", "Function properties for _Z5plainPf", "for 'sm_90'"])
def test_a_report_of_another_form_is_an_error(lost: str) -> None:
    """A compiler that says it in other words must not pass for one that has nothing to say."""
    with pytest.raises(ResourceError, match=r"x\.cu: expected .*; mend parse\(\)"):
        parse(REPORT.replace(lost, "something else"), "x.cu")


def test_launch_bounds() -> None:
    ptx = ".visible .entry a(\n.param .u64 x\n)\n.maxntid 32, 2, 2\n.minnctapersm 3\n{ }\n.entry b()\n{ .maxntid 64 }"
    assert launch_bounds(ptx) == {"a": 128}


def test_names() -> None:
    text = "void mtlgrad::cuda::k<float, 128, (mtlgrad::Structure)1, mtlgrad::cuda::Table<48, 420> >(float*, (int)2)"
    assert short(text) == "k<float, 128, 1, Table<48, 420>>"
    assert resources.demangled(["_Z5plainPf", "spiller"]) in (
        {"_Z5plainPf": "plain", "spiller": "spiller"},
        {"_Z5plainPf": "_Z5plainPf", "spiller": "spiller"},  # no libstdc++
    )


@pytest.mark.parametrize(
    ("changed", "threads"),
    [
        ({"registers": 32}, 2048),  # 16 blocks
        ({"registers": 33}, 1536),  # 40 registers each, 48 warps and a bit
        ({"registers": 128}, 512),
        ({"registers": 250}, 256),
        ({"registers": 255, "threads": 512}, 0),  # cannot be launched
        ({"static_shared": 33792}, 768),  # 6 times 34 KB of 228
        ({"threads": 32}, 1024),  # no more than 32 blocks
    ],
)
def test_resident_threads(changed: dict[str, int], threads: int) -> None:
    assert kernel(**changed).resident_threads == threads


def test_kept_rows() -> None:
    with resources.RESULT.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(rows_of([kernel()], "13.0")[0])
    assert all(row["spill_stores"] == row["spill_loads"] == row["stack"] == "0" for row in rows)
