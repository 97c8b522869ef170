"""Peak extra memory of one call.

On the CPU, in a fresh process, it is the operating system's own figure: the high-water mark of resident memory (VmHWM)
during the call, less what was resident just before. That counts everything: torch's tensors, scratch memory of our
kernels, workspaces of LAPACK. Three things make it exact:

- the process is fresh and has called the contender before, so libraries are loaded, threads started, and what a method
  keeps between steps (a prior's covariance, say) is there. Contenders that take minutes (`once`) have run at a toy size
  only, where that matters little;
- glibc is told to map every block from 64 KiB on its own and to give back what is freed (`MALLOC_MMAP_THRESHOLD_`,
  `MALLOC_TRIM_THRESHOLD_`), and MKL to keep no pool (`MKL_DISABLE_FAST_MM`): else memory freed during set-up would be
  used again, and would not count;
- writing 5 to /proc/self/clear_refs resets the mark just before the call.

For our layer the figure agrees with the sum of torch's allocator events within 2 MB.

On CUDA it is torch.cuda.max_memory_allocated less what was allocated before. Elsewhere than on Linux: NaN.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from bench.harness import Case, Contender

ROOT = Path(__file__).resolve().parent.parent
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MKL_DISABLE_FAST_MM": "1"}
TIMEOUT_S = 1800


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process in MB (10^6 bytes)."""
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match.group(1)) * 1024 / 1e6


def on_cuda(contender: Contender, device: torch.device) -> float:
    """Peak extra device memory in MB, by torch's allocator; after a first call."""
    contender.prepare()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = contender.call()
    torch.cuda.synchronize(device)
    del kept
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def measure(case: Case, name: str) -> float:
    """Peak extra memory of the contender in MB on the CPU; to be called once, in a process of its own."""
    toy = case.build(True).contenders.get(name)
    if toy is not None:  # at a toy size some contenders have another name, or are not there
        toy.prepare()
        toy.call()
    contender = case.build(False).contenders[name]
    contender.prepare()
    if not contender.once:
        contender.call()
        contender.prepare()
    marks = Path("/proc/self/clear_refs")
    if not marks.exists():
        return math.nan
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    marks.write_text("5")
    before = resident("VmRSS")
    kept = contender.call()
    peak = resident("VmHWM") - before
    del kept
    return max(peak, 0.0)


def in_fresh_process(stem: str, title: str, name: str, extra: Sequence[str]) -> float:
    """`measure` in a child: ``python -m bench STEM --memory-of``. NaN, with the reason on stderr, where that fails."""
    command = [sys.executable, "-m", "bench", stem, "--memory-of", title, name, *extra]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | ALLOCATOR,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        if done.returncode == 0:
            return float(done.stdout.split()[-1])
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
    except subprocess.TimeoutExpired:
        reason = f"took over {TIMEOUT_S} s"
    print(f"memory of {title}, {name}: not measured: {reason}", file=sys.stderr)
    return math.nan
