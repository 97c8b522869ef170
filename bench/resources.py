"""Registers, spills, stack and shared memory of every CUDA kernel, from the compiler's own report. Needs nvcc, no GPU.

``python -m bench.resources`` builds the package's extension with csrc/cuda for every architecture, in build/cuda, and
prints a line a kernel; ``--write`` keeps them in bench/results/kernels/. Exit code 1 where a kernel spills or has a
stack.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cuda"
RESULT = ROOT / "bench" / "results" / "kernels" / "resources_cuda.csv"


@dataclass(frozen=True)
class Architecture:
    """What a multiprocessor has (CUDA programming guide, table of compute capabilities), and how it gives it out: warps
    get registers 256 at a time, one of its four parts each; a block's shared memory comes with 1 KB for the system."""

    shared: int
    registers: int = 65536
    warps: int = 64
    blocks: int = 32
    register_unit: int = 256
    shared_reserved: int = 1024


ARCHITECTURES = {"sm_80": Architecture(shared=164 << 10), "sm_90": Architecture(shared=228 << 10)}


class ResourceError(Exception):
    """In one line: what was expected, what was found, and the way out."""


@dataclass(frozen=True)
class Kernel:
    kernel: str  # as it is named in the source
    source: str
    arch: str
    threads: int  # of a block, at most; 0: the source does not say
    registers: int
    spill_stores: int  # bytes, as all that follow
    spill_loads: int
    stack: int
    static_shared: int

    @property
    def clean(self) -> bool:
        return not (self.spill_stores or self.spill_loads or self.stack)

    @property
    def resident_threads(self) -> int:
        """Threads that a multiprocessor holds at once, as far as registers and static shared memory decide it."""
        limits = ARCHITECTURES[self.arch]
        unit = limits.register_unit
        warps = (
            limits.registers // 4 // (-(-self.registers * 32 // unit) * unit) * 4 if self.registers else limits.warps
        )
        warps = min(warps, limits.warps)
        each = -(-self.threads // 32) or 1
        blocks = min(warps // each, limits.blocks, limits.shared // (self.static_shared + limits.shared_reserved))
        return blocks * each * 32


def parse(report: str, source: str, threads: dict[str, int] | None = None) -> list[Kernel]:
    """The kernels of one ``-Xptxas=-v`` report, names still mangled; device functions' own lines are left out."""
    kernels = []
    for entry in re.split(r"(?=ptxas info\s*: Compiling entry function)", report)[1:]:
        head = re.match(r"ptxas info\s*: Compiling entry function '([^']+)' for '([^']+)'", entry)
        if not head:
            raise ResourceError(
                f"{source}: expected a kernel and its architecture, found {entry.splitlines()[0]!r}; mend parse()"
            )
        name, arch = head.groups()
        own = rf"Function properties for {re.escape(name)}\s+"
        frame = re.search(own + r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        used = re.search(r"Used (\d+) registers(.*)", entry)
        if not frame or not used:
            raise ResourceError(f"{source}: expected registers and spills of {name}, found neither; mend parse()")
        shared = re.search(r"(\d+) bytes smem", used[2])
        stack, stores, loads = map(int, frame.groups())
        kernels.append(
            Kernel(
                *(name, source, arch, (threads or {}).get(name, 0), int(used[1])),
                *(stores, loads, stack, int(shared[1]) if shared else 0),
            )
        )
    return kernels


def launch_bounds(ptx: str) -> dict[str, int]:
    """Threads of a block at most, by kernel, from the directive .maxntid."""
    found = {}
    for name, rest in re.findall(r"\.entry\s+(\w+)\(([^{]*)\{", ptx):
        bound = re.search(r"\.maxntid\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", rest)
        if bound:
            found[name] = int(bound[1]) * int(bound[2] or 1) * int(bound[3] or 1)
    return found


def demangled(names: Iterable[str]) -> dict[str, str]:
    """Names as the source has them, without arguments and namespaces, by the C++ library's own means: c++filt need not
    be there. Where the library is not, they stay as they are."""
    try:
        demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    except (OSError, AttributeError):
        return {name: name for name in names}
    demangle.restype = ctypes.c_void_p
    free = ctypes.CDLL(None).free
    free.argtypes = [ctypes.c_void_p]
    plain = {}
    for name in names:
        status = ctypes.c_int()
        made = demangle(name.encode(), None, None, ctypes.byref(status))
        plain[name] = name
        if made and status.value == 0:
            plain[name] = short(ctypes.string_at(made).decode())
        free(made)
    return plain


def short(text: str) -> str:
    """``void space::kernel<A<b> >(int, (E)1)`` without result type, namespaces and arguments: ``kernel<A<b>>``."""
    text = re.sub(r"\((?:[\w:]+)\)(?=-?\d)", "", text)  # the type of an enumerator
    text = re.sub(r"\b(?:mtlgrad|cuda|math)::", "", text.removeprefix("void "))
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            text = text[:i]
            break
    return re.sub(r"\s+>", ">", text)


def compiler() -> str:
    """The path of nvcc: CUDACXX, CUDA_HOME, PATH."""
    home = os.environ.get("CUDA_HOME")
    choices = [os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"]
    for choice in filter(None, choices):
        found = shutil.which(choice)
        if found:
            return found
    raise ResourceError("resources: expected nvcc on PATH, found none; install the CUDA toolkit or set CUDACXX")


def compiler_version(nvcc: str) -> str:
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    match = re.search(r"release [\d.]+, V([\d.]+)", done.stdout)
    return match[1] if match else "unknown"


def build(archs: Sequence[str]) -> str:
    """What the compiler reports while the extension is built in BUILD, its PTX and all; kept until a source changes."""
    nvcc = compiler()
    mark = hashlib.sha256(repr((compiler_version(nvcc), *archs)).encode())
    for path in [*sorted((ROOT / "csrc").rglob("*.*")), ROOT / "CMakeLists.txt", Path(__file__)]:
        mark.update(path.read_bytes())
    log = BUILD / f"{mark.hexdigest()[:16]}.log"
    if not log.exists():
        import pybind11

        ptx = BUILD / "ptx"
        shutil.rmtree(BUILD, ignore_errors=True)
        ptx.mkdir(parents=True)
        tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=None"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_CUDA_COMPILER={nvcc}",
            f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(arch.replace('sm_', '') + '-real' for arch in archs)}",
            f'-DCMAKE_CUDA_FLAGS=-Xptxas=-v --keep --keep-dir="{ptx}"',
        ]
        one_report_at_a_time = os.environ.get("NVCC_APPEND_FLAGS", "") + " --threads=1"
        for command in (configure, ["cmake", "--build", str(BUILD)]):
            done = subprocess.run(
                [shutil.which("cmake", path=tools) or "cmake", *command[1:]],
                env={**os.environ, "PATH": tools, "NVCC_APPEND_FLAGS": one_report_at_a_time},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            if done.returncode:
                raise ResourceError(f"resources: expected the kernels to compile, found: {done.stdout.strip()[-2000:]}")
        log.write_text(done.stdout)
    return log.read_text()


def collect(archs: Sequence[str] = tuple(ARCHITECTURES)) -> list[Kernel]:
    """All kernels, sorted: after a change of a source some minutes on two cores."""
    report = build(archs)
    threads = launch_bounds("\n".join(path.read_text() for path in (BUILD / "ptx").glob("*.ptx")))
    sources = re.split(r"Building CUDA object \S+/(\w+\.cu)\.o", report)[1:]
    found = [kernel for name, text in zip(sources[::2], sources[1::2]) for kernel in parse(text, name, threads)]
    names = demangled(dict.fromkeys(kernel.kernel for kernel in found))
    renamed = [replace(kernel, kernel=names[kernel.kernel]) for kernel in found]
    return sorted(renamed, key=lambda kernel: (kernel.source, kernel.kernel, kernel.arch))


def rows_of(kernels: Sequence[Kernel], nvcc: str) -> list[dict[str, object]]:
    from bench import table  # torch with it, which a report does not need

    facts = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "machine": f"{platform.system()} {platform.machine()}, {table.processor()}",
        "nvcc": nvcc,
        "commit": table.commit(),
    }
    return [facts | asdict(kernel) | {"resident_threads": kernel.resident_threads} for kernel in kernels]


def write(path: Path, rows: Sequence[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    with draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draft.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--write", action="store_true", help="keep the rows in bench/results/kernels/resources_cuda.csv"
    )
    parser.add_argument("--results", type=Path, metavar="DIR", help="keep them in this folder instead")
    parser.add_argument("--arch", action="append", choices=list(ARCHITECTURES), help="(default: all)")
    args = parser.parse_args(argv)
    try:
        kernels = collect(archs=args.arch or tuple(ARCHITECTURES))
    except ResourceError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{'registers':>9} {'spilled':>8} {'stack':>6} {'shared':>7} {'resident':>8}  kernel")
    for kernel in kernels:
        spilled = f"{kernel.spill_stores}/{kernel.spill_loads}"
        print(
            f"{kernel.registers:>9} {spilled:>8} {kernel.stack:>6} {kernel.static_shared:>7}"
            f" {kernel.resident_threads:>8}  {kernel.arch} {kernel.kernel}"
        )
    if args.write or args.results:
        path = args.results / RESULT.name if args.results else RESULT
        write(path, rows_of(kernels, compiler_version(compiler())))
        print(f"written: {path}")
    bad = [kernel for kernel in kernels if not kernel.clean]
    for kernel in bad:
        print(
            f"resources: expected no spills and no stack, found them in {kernel.kernel} ({kernel.arch})",
            file=sys.stderr,
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
