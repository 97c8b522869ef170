"""The peak memory of a round, as the operating system counts it, against the table in AlphaVIL's docstring."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Memory that is freed goes back at once, and large blocks are on their own: what is resident is what is held.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
CODE = """
import json, re, sys
from pathlib import Path
import torch
from torch import nn
import mtlgrad
from mtlgrad.alphavil import Task

tasks, storage, include, momentum = int(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])

def vil(width):
    shared = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(16)])
    heads = {f"h{t}": nn.Linear(width, 2 * width, bias=False) for t in range(tasks)}
    model = nn.ModuleDict({"shared": shared, **heads})
    batch = [torch.randn(2, width)]
    own = [Task(batch, lambda m, x, t=t: m[f"h{t}"](m["shared"](x)).square().mean(), batch, model[f"h{t}"])
           for t in range(tasks)]
    make = lambda ps: torch.optim.SGD(ps, 1e-3, momentum=momentum)
    made = mtlgrad.AlphaVIL(model, own, 0, make_optimizer=make, alpha_epochs=1, delta_storage=storage,
                            include_heads=include)
    return made

def resident(field):
    return int(re.search(rf"^{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text(), re.M).group(1)) * 1024
vil(64).epoch()  # threads, libraries
here, peaks = vil(1024), {}  # the shared parameters are 64 MiB, a head is 8
before = resident("VmRSS")
here.epoch()  # the deltas: they stay
stages = here.stages()
while True:
    Path("/proc/self/clear_refs").write_text("5")
    stage = next(stages, None)
    if stage is None:
        break
    peaks[stage.kind] = max(peaks.get(stage.kind, 0), resident("VmHWM") - before)
print(json.dumps(peaks))
"""
S, H = 16 << 22, 2 << 22  # bytes of the shared parameters, of a head


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc")
@pytest.mark.parametrize(
    ("tasks", "storage", "heads", "momentum"),
    [
        (3, "parameters", "own", 0.9),
        (3, "bfloat16", "none", 0.0),
        (2, "parameters", "all", 0.0),
        (1, "host", "own", 0.9),
    ],
)
def test_peak_of_each_stage(tasks: int, storage: str, heads: str, momentum: float) -> None:
    """Within 5 % of what the docstring says."""
    arguments = [str(tasks), storage, heads, str(momentum)]
    found = json.loads(
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", CODE, *arguments],
            env={**os.environ, **ENVIRONMENT},
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        ).stdout
    )
    parameters = S + tasks * H
    deltas = tasks * parameters if heads == "all" else parameters + (tasks - 1) * S
    deltas //= 2 if storage == "bfloat16" else 1
    states = 1 if momentum else 0  # copies that the optimizer keeps of what it trains
    expected = {
        "train": deltas + parameters + (1 + states) * (S + H),
        "alpha": deltas + parameters + S + (0 if heads == "none" else H),
        "move": deltas + parameters,
    }
    for kind, size in expected.items():
        assert abs(found[kind] / size - 1) < 0.05, (kind, found[kind] / 2**20, size / 2**20)
